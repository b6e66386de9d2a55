//! Scratch memory.

use crate::kernels::Float;
use std::ops::{Deref, DerefMut};

/// The size of a cache line, and of the longest vector, in bytes.
const LINE: usize = 64;

/// Numbers aligned to a cache line; otherwise every long vector of a row would span two lines.
#[derive(Debug)]
pub(crate) struct Buffer<F> {
    data: Vec<F>,
    start: usize,
    len: usize,
}

impl<F: Float> Buffer<F> {
    pub(crate) fn zeros(len: usize) -> Self {
        let data = vec![F::zero(); len + LINE / size_of::<F>()];
        // It may be `usize::MAX` if addresses are unknown.
        let start = data.as_ptr().align_offset(LINE).min(data.len() - len);
        Self { data, start, len }
    }
}

impl<F> Deref for Buffer<F> {
    type Target = [F];

    #[inline]
    fn deref(&self) -> &[F] {
        &self.data[self.start..][..self.len]
    }
}

impl<F> DerefMut for Buffer<F> {
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
            for len in [0, 1, 5, 1000] {
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
}
