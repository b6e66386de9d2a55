//! Copies of rows with a head in each lane, and back.

use super::super::super::parallel;
use super::super::super::primitives::buffer::Buffer;
use super::super::super::primitives::matmul::Vector;
use super::super::super::primitives::transpose::{deinterleave, interleave};
use super::super::super::problem::Slices;
use super::super::{PREFETCH_AHEAD, PREFETCH_FROM};
use crate::kernels::Float;
use crate::prefetch::prefetch;
use fearless_simd::{Level, Simd, SimdBase};
use std::ops::Range;

/// Rows that are copied by one task.
const ROWS_OF_TASK: usize = 1024;

/// The time to copy a number, which memory bounds, in multiplications.
const WORK_OF_COPY: usize = 16;

/// Rows with a head in each lane.
pub(super) struct Copies<F: Float> {
    data: Buffer<F>,
    stride: usize,
}

impl<F: Float> Copies<F> {
    /// `copy` overwrites some of the rows, which it is given as one slice.
    pub(super) fn new(
        num_rows: usize,
        stride: usize,
        copy: impl Fn(Range<usize>, &mut [F]) + Sync + Send,
    ) -> Self {
        let mut data = Buffer::stale(num_rows * stride);
        let starts = (0..num_rows).step_by(ROWS_OF_TASK);
        let tasks: Vec<_> = starts.zip(data.chunks_mut(stride * ROWS_OF_TASK)).collect();
        let work = (num_rows * stride).saturating_mul(WORK_OF_COPY);
        parallel::for_each(tasks, work, |(start, copies)| {
            copy(start..start + copies.len() / stride, copies);
        });
        Self { data, stride }
    }

    pub(super) fn slices(&self) -> Slices<'_, F> {
        Slices { data: &self.data, columns: self.stride }
    }

    /// Prefetches the rows of the pairs after some slots.
    #[inline(always)]
    pub(super) fn prefetch(&self, indices: &[u32], slots: Range<usize>) {
        if size_of_val(&*self.data) >= PREFETCH_FROM {
            let ahead = indices.get(slots.start + PREFETCH_AHEAD..).unwrap_or_default();
            for &row in ahead.iter().take(slots.len()) {
                prefetch(self.slices().row(row as usize));
            }
        }
    }
}

/// Where the numbers of some heads stand in rows, and in their copies with a head in each lane.
#[derive(Clone, Copy)]
pub(super) struct Transposition<'t> {
    pub(super) level: Level,
    /// Heads of a slot.
    pub(super) width: usize,
    /// The head in each lane, slot by slot.
    pub(super) heads: &'t [usize],
    /// Columns of a head.
    pub(super) dim: usize,
    /// The columns of a row.
    pub(super) columns: usize,
    /// The columns of a copy, and of a slot in it.
    pub(super) stride: usize,
    pub(super) len_of_slot: usize,
}

/// Some rows of a matrix, in this order.
#[derive(Clone, Copy)]
pub(super) enum Which<'w> {
    From(usize),
    Listed(&'w [u32]),
}

/// Copies rows to `first` and the following columns of the copies, as many as there are copies. Columns of slots past
/// the last one of their heads are zeros.
#[inline(never)]
pub(super) fn to_lanes<F: Float>(
    places: Transposition<'_>,
    (rows, which): (Slices<'_, F>, Which<'_>),
    first: usize,
    copies: &mut [F],
) {
    #[inline(always)]
    fn run<S: Simd, F: Float, const W: usize>(
        simd: S,
        places: Transposition<'_>,
        (rows, which): (Slices<'_, F>, Which<'_>),
        first: usize,
        copies: &mut [F],
    ) {
        let Transposition { dim, len_of_slot, .. } = places;
        let len = Vector::<S, F>::LEN;
        for (slot, heads) in places.heads.chunks_exact(W).enumerate() {
            let starts = starts::<W>(heads, dim);
            let first = first + slot * len_of_slot;
            for (n, copy) in copies.chunks_exact_mut(places.stride).enumerate() {
                let row = match which {
                    Which::From(start) => rows.row(start + n),
                    Which::Listed(list) => {
                        if let Some(&ahead) = list.get(n + PREFETCH_AHEAD) {
                            prefetch(rows.row(ahead as usize));
                        }
                        rows.row(list[n] as usize)
                    }
                };
                let copy = &mut copy[first..][..len_of_slot];
                let mut rows = [&[] as &[F]; W];
                for (of_head, start) in rows.iter_mut().zip(starts) {
                    *of_head = &row[start..][..dim];
                }
                let mut column = 0;
                while column + len <= dim {
                    let mut block = [Vector::<S, F>::splat(simd, F::zero()); W];
                    for (vector, row) in block.iter_mut().zip(rows) {
                        *vector = Vector::<S, F>::from_slice(simd, &row[column..][..len]);
                    }
                    let block = interleave::<S, F, W>(block, W);
                    let copy = &mut copy[column * W..][..W * len];
                    for (at, vector) in block.iter().enumerate() {
                        vector.store_slice(&mut copy[at * len..][..len]);
                    }
                    column += len;
                }
                for column in column..dim {
                    for (entry, row) in copy[column * W..][..W].iter_mut().zip(rows) {
                        *entry = row[column];
                    }
                }
                copy[dim * W..].fill(F::zero());
            }
        }
    }
    // Of four widths, a level has only those of a vector and of a block; no code is compiled for the others.
    #[inline(always)]
    fn run_width<S: Simd, F: Float>(
        simd: S,
        places: Transposition<'_>,
        (rows, which): (Slices<'_, F>, Which<'_>),
        first: usize,
        copies: &mut [F],
    ) {
        match places.width {
            2 if const { is_width::<S, F>(2) } => {
                run::<S, F, 2>(simd, places, (rows, which), first, copies)
            }
            4 if const { is_width::<S, F>(4) } => {
                run::<S, F, 4>(simd, places, (rows, which), first, copies)
            }
            8 if const { is_width::<S, F>(8) } => {
                run::<S, F, 8>(simd, places, (rows, which), first, copies)
            }
            16 if const { is_width::<S, F>(16) } => {
                run::<S, F, 16>(simd, places, (rows, which), first, copies)
            }
            width => unreachable!("no slot has {width} heads"),
        }
    }
    dispatch!(places.level, simd => run_width(simd, places, (rows, which), first, copies));
}

/// Copies rows back: overwrites them, or adds the copies times a factor.
#[inline(never)]
pub(super) fn from_lanes<F: Float>(
    places: Transposition<'_>,
    copies: &[F],
    factor: Option<F>,
    rows: &mut [F],
) {
    #[inline(always)]
    fn run<S: Simd, F: Float, const W: usize, const ADD: bool>(
        simd: S,
        places: Transposition<'_>,
        copies: &[F],
        factor: F,
        rows: &mut [F],
    ) {
        let Transposition { dim, len_of_slot, .. } = places;
        let len = Vector::<S, F>::LEN;
        for (slot, heads) in places.heads.chunks_exact(W).enumerate() {
            let starts = starts::<W>(heads, dim);
            let copies = copies.chunks_exact(places.stride);
            for (row, copy) in rows.chunks_exact_mut(places.columns).zip(copies) {
                let copy = &copy[slot * len_of_slot..][..len_of_slot];
                let mut column = 0;
                while column + len <= dim {
                    let copy = &copy[column * W..][..W * len];
                    let mut block = [Vector::<S, F>::splat(simd, F::zero()); W];
                    for (at, vector) in block.iter_mut().enumerate() {
                        *vector = Vector::<S, F>::from_slice(simd, &copy[at * len..][..len]);
                    }
                    let block = deinterleave::<S, F, W>(block);
                    for (&vector, start) in block.iter().zip(starts) {
                        let row = &mut row[start + column..][..len];
                        let vector = match ADD {
                            true => Vector::<S, F>::from_slice(simd, row) + vector * factor,
                            false => vector,
                        };
                        vector.store_slice(row);
                    }
                    column += len;
                }
                for column in column..dim {
                    for (&entry, start) in copy[column * W..][..W].iter().zip(starts) {
                        let out = &mut row[start + column];
                        *out = if ADD { *out + factor * entry } else { entry };
                    }
                }
            }
        }
    }
    // Of four widths, a level has only those of a vector and of a block; no code is compiled for the others.
    #[inline(always)]
    fn run_width<S: Simd, F: Float, const ADD: bool>(
        simd: S,
        places: Transposition<'_>,
        copies: &[F],
        factor: F,
        rows: &mut [F],
    ) {
        match places.width {
            2 if const { is_width::<S, F>(2) } => {
                run::<S, F, 2, ADD>(simd, places, copies, factor, rows)
            }
            4 if const { is_width::<S, F>(4) } => {
                run::<S, F, 4, ADD>(simd, places, copies, factor, rows)
            }
            8 if const { is_width::<S, F>(8) } => {
                run::<S, F, 8, ADD>(simd, places, copies, factor, rows)
            }
            16 if const { is_width::<S, F>(16) } => {
                run::<S, F, 16, ADD>(simd, places, copies, factor, rows)
            }
            width => unreachable!("no slot has {width} heads"),
        }
    }
    dispatch!(places.level, simd => match factor {
        Some(factor) => run_width::<_, F, true>(simd, places, copies, factor, rows),
        None => run_width::<_, F, false>(simd, places, copies, F::one(), rows),
    });
}

/// Whether a slot may have so many heads: those of a vector or of a block.
const fn is_width<S: Simd, F: Float>(width: usize) -> bool {
    width == Vector::<S, F>::LEN || width == 16 / size_of::<F>()
}

/// The first columns of heads.
#[inline(always)]
fn starts<const W: usize>(heads: &[usize], dim: usize) -> [usize; W] {
    let mut starts = [0; W];
    for (start, &head) in starts.iter_mut().zip(heads) {
        *start = head * dim;
    }
    starts
}
