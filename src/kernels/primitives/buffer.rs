//! Scratch memory, which threads keep from call to call.
//!
//! If a call returned all its scratch memory to the operating system, the next one would fault for each page: with
//! 128 queries that takes a fifth of the time, and so do the copies of 4,000 nodes with 64 columns, which only one thread
//! can ask for.

use crate::kernels::Float;
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// The size of a cache line, and of the longest vector, in bytes.
const LINE: usize = 64;

/// The most bytes that a thread keeps of each type, and in how many pieces.
const MOST_BYTES: usize = 8 << 20;
const MOST_PIECES: usize = 32;

/// The memory that a thread keeps.
#[derive(Debug)]
pub struct Pool<F> {
    pieces: Vec<Vec<F>>,
    bytes: usize,
}

impl<F> Pool<F> {
    const fn new() -> Self {
        Self { pieces: Vec::new(), bytes: 0 }
    }

    /// Removes the smallest piece that has room for so many numbers. If there is none, frees the smallest, so that
    /// sizes that are no longer needed make room.
    fn take(&mut self, len: usize) -> Option<Vec<F>> {
        let sizes = || self.pieces.iter().map(Vec::capacity).enumerate();
        let (at, fits) =
            match sizes().filter(|&(_, size)| size >= len).min_by_key(|&(_, size)| size) {
                Some((at, _)) => (at, true),
                None => (sizes().min_by_key(|&(_, size)| size)?.0, false),
            };
        let piece = self.pieces.swap_remove(at);
        self.bytes -= size_of::<F>() * piece.capacity();
        fits.then_some(piece)
    }

    fn keep(&mut self, piece: Vec<F>) {
        let bytes = size_of::<F>() * piece.capacity();
        if self.bytes + bytes <= MOST_BYTES && self.pieces.len() < MOST_PIECES {
            self.bytes += bytes;
            self.pieces.push(piece);
        }
    }
}

/// A type with a pool in each thread.
pub trait HasPool: Sized {
    /// Calls `visit`, unless the thread is about to end.
    fn with_pool<R>(visit: impl FnOnce(&mut Pool<Self>) -> R) -> Option<R>;
}

macro_rules! has_pool {
    ($type:ty) => {
        impl HasPool for $type {
            fn with_pool<R>(visit: impl FnOnce(&mut Pool<Self>) -> R) -> Option<R> {
                thread_local! {
                    static POOL: RefCell<Pool<$type>> = const { RefCell::new(Pool::new()) };
                }
                POOL.try_with(|pool| visit(&mut pool.borrow_mut())).ok()
            }
        }
    };
}
has_pool!(f32);
has_pool!(f64);

/// Numbers aligned to a cache line; otherwise every long vector of a row would span two lines.
#[derive(Debug)]
pub(crate) struct Buffer<F: HasPool> {
    data: Vec<F>,
    start: usize,
    len: usize,
}

impl<F: Float> Buffer<F> {
    pub(crate) fn zeros(len: usize) -> Self {
        let mut buffer = Self::stale(len);
        buffer.fill(F::zero());
        buffer
    }

    /// Creates a buffer with arbitrary numbers, which the caller must overwrite.
    pub(crate) fn stale(len: usize) -> Self {
        let whole = len + LINE / size_of::<F>();
        let data = match F::with_pool(|pool| pool.take(whole)).flatten() {
            Some(mut data) => {
                data.resize(whole, F::zero());
                data
            }
            None => vec![F::zero(); whole],
        };
        // It may be `usize::MAX` if addresses are unknown.
        let start = data.as_ptr().align_offset(LINE).min(data.len() - len);
        Self { data, start, len }
    }
}

impl<F: HasPool> Drop for Buffer<F> {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        F::with_pool(|pool| pool.keep(data));
    }
}

impl<F: HasPool> Deref for Buffer<F> {
    type Target = [F];

    #[inline]
    fn deref(&self) -> &[F] {
        &self.data[self.start..][..self.len]
    }
}

impl<F: HasPool> DerefMut for Buffer<F> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [F] {
        &mut self.data[self.start..][..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_start_at_a_line_and_have_their_length() {
        fn check<F: Float>() {
            for len in [0, 1, 5, 1000, 3, 1000, 5] {
                let mut buffer = Buffer::<F>::zeros(len);
                assert_eq!(buffer.as_ptr() as usize % LINE, 0);
                assert_eq!(buffer.len(), len);
                assert!(buffer.iter().all(|&entry| entry == F::zero()));
                buffer.fill(F::one());
                assert!(buffer.iter().all(|&entry| entry == F::one()));
            }
        }
        check::<f32>();
        check::<f64>();
    }

    #[test]
    fn a_thread_keeps_a_piece_that_fits_and_no_more_than_the_most() {
        let kept = |pool: &Pool<f32>| (pool.bytes, pool.pieces.len());
        let mut pool = Pool::new();
        assert!(pool.take(1).is_none());
        for size in [100, 10, 1000] {
            pool.keep(Vec::with_capacity(size));
        }
        assert_eq!(kept(&pool), (4440, 3));
        assert_eq!(pool.take(50).map(|piece| piece.capacity()), Some(100));
        assert_eq!(kept(&pool), (4040, 2));
        // Too small for this.
        assert!(pool.take(2000).is_none());
        assert_eq!(kept(&pool), (4000, 1));
        pool.keep(Vec::with_capacity(MOST_BYTES / 4));
        assert_eq!(kept(&pool), (4000, 1));
        for _ in 0..2 * MOST_PIECES {
            pool.keep(Vec::with_capacity(1));
        }
        assert_eq!(pool.pieces.len(), MOST_PIECES);
        while pool.take(1).is_some() {}
        assert_eq!(kept(&pool), (0, 0));
    }
}
