//! The steps over the pairs of a row, inlined into a pass over a block of rows.
//!
//! The numbers of the pairs, one for each head, stand slot by slot; in a slot pair by pair, without gaps up to the
//! end of the last vector. Only pairs meet rows, so no number past the end meets any.

use super::super::super::dense::SLACK;
use super::super::super::gathered::{fold_halves, fold_quarters, mask, vector};
use super::super::super::primitives::compensated::TERMS_OF_SUM;
use super::super::super::primitives::exp::exp;
use super::super::super::primitives::matmul::Vector;
use super::super::super::problem::Slices;
use super::super::backward::logits_vjp;
use crate::kernels::Float;
use fearless_simd::{Select, Simd, SimdBase, SimdFloat};
use std::ops::Range;

/// Vectors of a row at a time: as many sums as keep both units for multiply-add busy, and leave registers.
const VECTORS: usize = 8;

/// Some rows of the other side, from a column on.
#[derive(Clone, Copy)]
pub(super) struct Others<'r, F> {
    pub(super) rows: Slices<'r, F>,
    pub(super) at: &'r [u32],
    pub(super) first: usize,
}

impl<'r, F: Copy> Others<'r, F> {
    /// The same rows from a later column on.
    #[inline(always)]
    pub(super) fn skip(self, columns: usize) -> Self {
        Self { first: self.first + columns, ..self }
    }

    #[inline(always)]
    fn row(self, at: u32, len: usize) -> &'r [F] {
        &self.rows.row(at as usize)[self.first..][..len]
    }
}

/// How the numbers of the pairs of a row are laid out.
#[derive(Clone, Copy)]
pub(super) struct Shape<'s> {
    /// Heads of a slot.
    pub(super) width: usize,
    /// For each slot, which vectors of the own row and of the other rows it reads.
    pub(super) slots: &'s [[usize; 2]],
    /// The distance between slots.
    pub(super) stride: usize,
}

impl Shape<'_> {
    /// Where the numbers of a slot stand. Iterators over chunks would divide by the distance.
    #[inline(always)]
    fn numbers(self, slot: usize) -> Range<usize> {
        slot * self.stride..(slot + 1) * self.stride
    }
}

/// The numbers of pairs up to the end of the last vector.
#[inline(always)]
fn padded<S: Simd, F: Float>(width: usize, count: usize) -> usize {
    let len = Vector::<S, F>::LEN;
    // `next_multiple_of` would divide.
    (count * width + len - 1) & !(len - 1)
}

/// Loads the numbers of a pair, in each block of a vector.
#[inline(always)]
fn repeated<S: Simd, F: Float>(simd: S, heads: &[F]) -> Vector<S, F> {
    if heads.len() == Vector::<S, F>::LEN {
        return Vector::<S, F>::from_slice(simd, heads);
    }
    let block = <Vector<S, F> as SimdBase<S>>::Block::from_slice(simd, heads);
    Vector::<S, F>::block_splat(block)
}

/// Combines the blocks of a vector, if a pair has only one of them.
#[inline(always)]
fn over_blocks<S: Simd, F: Float>(
    width: usize,
    vector: Vector<S, F>,
    combine: impl Fn(Vector<S, F>, Vector<S, F>) -> Vector<S, F>,
) -> Vector<S, F> {
    let len = Vector::<S, F>::LEN;
    let mut vector = vector;
    if width < len {
        vector = combine(
            vector,
            match len {
                4 => vector.slide::<2>(vector),
                8 => vector.slide::<4>(vector),
                _ => vector.slide::<8>(vector),
            },
        );
    }
    if 2 * width < len {
        vector = combine(
            vector,
            match len {
                8 => vector.slide::<2>(vector),
                _ => vector.slide::<4>(vector),
            },
        );
    }
    vector
}

/// Overwrites `out` with the products of each pair, and with `past` after the last one. `raw` has room for a vector of
/// each pair, and of the pairs that would fill the last vector.
#[inline(always)]
pub(super) fn dots<S: Simd, F: Float>(
    simd: S,
    shape: Shape<'_>,
    own: &[F],
    others: Others<'_, F>,
    len_of_slot: usize,
    [raw, out]: [&mut [F]; 2],
    past: F,
) {
    let (len, width) = (Vector::<S, F>::LEN, shape.width);
    let count = others.at.len();
    let padded = padded::<S, F>(width, count);
    for (slot, &[own_slot, other_slot]) in shape.slots.iter().enumerate() {
        let out = &mut out[shape.numbers(slot)];
        let own = &own[own_slot * len_of_slot..][..len_of_slot];
        let others = others.skip(other_slot * len_of_slot);
        let products = if width == len { &mut *out } else { &mut *raw };
        let mut column = 0;
        while column < len_of_slot {
            let (own, others) = (&own[column..], others.skip(column));
            let is_first = column == 0;
            column += match own.len() / len {
                VECTORS.. => add_products::<S, F, VECTORS>(simd, own, others, products, is_first),
                4.. => add_products::<S, F, 4>(simd, own, others, products, is_first),
                _ => add_products::<S, F, 1>(simd, own, others, products, is_first),
            };
        }
        if width < len {
            fold_blocks(simd, width, raw, &mut out[..padded]);
        }
        out[count * width..padded].fill(past);
    }
}

/// Adds the products of N vectors to those of the previous ones, unless they are the first. Returns their columns.
#[inline(always)]
fn add_products<S: Simd, F: Float, const N: usize>(
    simd: S,
    own: &[F],
    others: Others<'_, F>,
    products: &mut [F],
    is_first: bool,
) -> usize {
    let len = Vector::<S, F>::LEN;
    let zero = Vector::<S, F>::splat(simd, F::zero());
    let mut own_vectors = [zero; N];
    for (n, own_vector) in own_vectors.iter_mut().enumerate() {
        *own_vector = vector::<S, F>(simd, own, n);
    }
    for (&at, products) in others.at.iter().zip(products.chunks_exact_mut(len)) {
        let row = others.row(at, N * len);
        let mut sum = if is_first { zero } else { Vector::<S, F>::from_slice(simd, products) };
        for (n, &own) in own_vectors.iter().enumerate() {
            sum = vector::<S, F>(simd, row, n).mul_add(own, sum);
        }
        sum.store_slice(products);
    }
    N * len
}

/// Replaces the blocks of each vector by their sum, so that the vectors of as many pairs as a vector has blocks become
/// one.
#[inline(always)]
fn fold_blocks<S: Simd, F: Float>(simd: S, width: usize, raw: &[F], out: &mut [F]) {
    let len = Vector::<S, F>::LEN;
    if len == 2 * width {
        for (at, out) in out.chunks_exact_mut(len).enumerate() {
            let n = |n| vector::<S, F>(simd, raw, 2 * at + n);
            fold_halves::<S, F>(simd, n(0), n(1)).store_slice(out);
        }
    } else {
        for (at, out) in out.chunks_exact_mut(len).enumerate() {
            let n = |n| vector::<S, F>(simd, raw, 4 * at + n);
            fold_quarters::<S, F>(simd, [n(0), n(1), n(2), n(3)]).store_slice(out);
        }
    }
}

/// The softmax of a row over its pairs so far, for each head slot by slot: m, l = Σ e^{s − m}, and the factors of
/// the previous sums.
pub(super) struct Running<'r, F> {
    pub(super) maxima: &'r mut [F],
    pub(super) sums: &'r mut [F],
    pub(super) alphas: &'r mut [F],
}

/// Replaces logits s by e^{s − m}, and overwrites the sums with those of these exponentials. The maxima m are raised
/// if the logits exceed them by more than the slack.
#[inline(always)]
pub(super) fn exponentials<S: Simd, F: Float>(
    simd: S,
    shape: Shape<'_>,
    count: usize,
    logits: &mut [F],
    running: Running<'_, F>,
) {
    let width = shape.width;
    let padded = padded::<S, F>(width, count);
    let Running { maxima, sums, alphas } = running;
    for slot in 0..shape.slots.len() {
        let logits = &mut logits[shape.numbers(slot)];
        let heads = slot * width..(slot + 1) * width;
        let of_slot = Running {
            maxima: &mut maxima[heads.clone()],
            sums: &mut sums[heads.clone()],
            alphas: &mut alphas[heads],
        };
        exponentials_of(simd, &mut logits[..padded], of_slot);
    }
}

/// The larger of two numbers, ignoring NaN in `b`.
#[inline(always)]
fn larger<S: Simd, F: Float>(a: Vector<S, F>, b: Vector<S, F>) -> Vector<S, F> {
    b.simd_gt(a).select(b, a)
}

#[inline(always)]
fn exponentials_of<S: Simd, F: Float>(simd: S, logits: &mut [F], running: Running<'_, F>) {
    /// The number of vectors that are summed from zero: small terms added one by one to a large sum would be lost.
    const VECTORS_OF_SUM: usize = 8;
    let Running { maxima, sums, alphas } = running;
    let (len, width) = (Vector::<S, F>::LEN, maxima.len());
    let lowest = Vector::<S, F>::splat(simd, F::neg_infinity());
    let mut of_tile = lowest;
    for logits in logits.chunks_exact(len) {
        of_tile = larger::<S, F>(of_tile, Vector::<S, F>::from_slice(simd, logits));
    }
    let of_tile = over_blocks::<S, F>(width, of_tile, larger::<S, F>);
    let old = repeated::<S, F>(simd, maxima);
    let max = of_tile.simd_gt(old + F::from_f64(SLACK)).select(of_tile, old);
    for ((alpha, old), &max) in alphas.iter_mut().zip(maxima).zip(max.as_slice()) {
        *alpha = match *old {
            _ if *old == max => F::one(),
            // Before the first key there is nothing to rescale.
            _ if *old == F::neg_infinity() => F::zero(),
            _ => (*old - max).exp(),
        };
        *old = max;
    }
    // Before the first key there is no maximum.
    let zero = Vector::<S, F>::splat(simd, F::zero());
    let shift = max.simd_eq(lowest).select(zero, max);
    let mut sum = zero;
    for logits in logits.chunks_mut(VECTORS_OF_SUM * len) {
        let mut of_block = zero;
        for logits in logits.chunks_exact_mut(len) {
            let weights = exp::<S, F>(simd, Vector::<S, F>::from_slice(simd, logits) - shift);
            of_block += weights;
            weights.store_slice(logits);
        }
        sum += of_block;
    }
    let sum = over_blocks::<S, F>(
        width,
        sum,
        #[inline(always)]
        |a, b| a + b,
    );
    if width == len {
        sum.store_slice(sums);
    } else {
        // A known length: else the compiler would call a function that copies memory.
        let len = <Vector<S, F> as SimdBase<S>>::Block::LEN;
        sums[..len].copy_from_slice(&sum.as_slice()[..len]);
    }
}

/// Sums the rows, times the weights of their pairs, in the vectors of the own row: overwrites the sums, or adds to
/// them.
#[inline(always)]
pub(super) fn weighted_sums<S: Simd, F: Float>(
    simd: S,
    shape: Shape<'_>,
    weights: &[F],
    others: Others<'_, F>,
    len_of_slot: usize,
    sums: &mut [F],
    overwrite: bool,
) {
    let (len, width) = (Vector::<S, F>::LEN, shape.width);
    let mut last = usize::MAX;
    for (slot, &[own_slot, other_slot]) in shape.slots.iter().enumerate() {
        let weights = &weights[shape.numbers(slot)];
        let sums = &mut sums[own_slot * len_of_slot..][..len_of_slot];
        let others = others.skip(other_slot * len_of_slot);
        // Several slots may add to the same sums, one after another.
        let overwrite = overwrite && own_slot != last;
        last = own_slot;
        let mut column = 0;
        while column < len_of_slot {
            let (sums, others) = (&mut sums[column..], others.skip(column));
            let weights = (weights, width);
            column += match sums.len() / len {
                VECTORS.. => add_weighted::<S, F, VECTORS>(simd, weights, others, sums, overwrite),
                4.. => add_weighted::<S, F, 4>(simd, weights, others, sums, overwrite),
                _ => add_weighted::<S, F, 1>(simd, weights, others, sums, overwrite),
            };
        }
    }
}

/// Sums N vectors of the rows. Returns their columns.
#[inline(always)]
fn add_weighted<S: Simd, F: Float, const N: usize>(
    simd: S,
    (weights, width): (&[F], usize),
    others: Others<'_, F>,
    sums: &mut [F],
    overwrite: bool,
) -> usize {
    let len = Vector::<S, F>::LEN;
    let zero = Vector::<S, F>::splat(simd, F::zero());
    for start in (0..others.at.len()).step_by(TERMS_OF_SUM) {
        let mut of_rows = [zero; N];
        for (&at, t) in others.at[start..].iter().take(TERMS_OF_SUM).zip(start..) {
            let weight = repeated::<S, F>(simd, &weights[t * width..][..width]);
            let row = others.row(at, N * len);
            for (n, sum) in of_rows.iter_mut().enumerate() {
                *sum = weight.mul_add(vector::<S, F>(simd, row, n), *sum);
            }
        }
        let is_first = overwrite && start == 0;
        for (&of_rows, sum) in of_rows.iter().zip(sums.chunks_exact_mut(len)) {
            // Zeros are added too: to store the sums as they are, the compiler would call a function.
            let before = if is_first { zero } else { Vector::<S, F>::from_slice(simd, sum) };
            (before + of_rows).store_slice(sum);
        }
    }
    N * len
}

/// Divides the sums of a row by those of its weights.
#[inline(always)]
pub(super) fn divide<S: Simd, F: Float>(
    simd: S,
    shape: Shape<'_>,
    len_of_slot: usize,
    values: &mut [F],
    sums: &[F],
) {
    let zero = Vector::<S, F>::splat(simd, F::zero());
    for slot in 0..shape.slots.len() {
        let values = &mut values[slot * len_of_slot..][..len_of_slot];
        let sum = repeated::<S, F>(simd, &sums[slot * shape.width..][..shape.width]);
        let (is_empty, factor) = (sum.simd_eq(zero), Vector::<S, F>::splat(simd, F::one()) / sum);
        for values in values.chunks_exact_mut(Vector::<S, F>::LEN) {
            let value = Vector::<S, F>::from_slice(simd, values) * factor;
            // Nothing seen: zeros, whatever was there before.
            is_empty.select(zero, value).store_slice(values);
        }
    }
}

/// m, 1/l and δ of the queries of pairs: three vectors for each slot, with the heads in every block.
#[derive(Clone, Copy)]
pub(super) enum Terms<'t, F> {
    /// All pairs have this query.
    OfQuery(&'t [F]),
    /// Each pair has another query.
    OfPairs(Others<'t, F>),
}

/// Replaces the logits of `count` pairs by p = e^{s − m} / l, and the gradients of the weights by ds = p (dp − δ).
#[inline(always)]
pub(super) fn vjp<S: Simd, F: Float>(
    simd: S,
    shape: Shape<'_>,
    count: usize,
    terms: Terms<'_, F>,
    [logits, grads]: [&mut [F]; 2],
) {
    let len = Vector::<S, F>::LEN;
    let padded = padded::<S, F>(shape.width, count);
    for slot in 0..shape.slots.len() {
        let of_slot = slot * shape.stride..slot * shape.stride + padded;
        let numbers = (&mut logits[of_slot.clone()], &mut grads[of_slot]);
        match terms {
            Terms::OfQuery(terms) => {
                let terms = vectors_of_terms(simd, &terms[slot * 3 * len..][..3 * len]);
                vjp_of_slot(
                    simd,
                    numbers,
                    #[inline(always)]
                    |_| terms,
                );
            }
            Terms::OfPairs(others) => {
                let others = others.skip(slot * 3 * len);
                // By a shift: a width is a power of two.
                let pairs = len >> shape.width.trailing_zeros();
                vjp_of_slot(
                    simd,
                    numbers,
                    #[inline(always)]
                    |n| terms_of_pairs(simd, others, n * pairs, pairs),
                );
            }
        }
    }
}

#[inline(always)]
fn vjp_of_slot<S: Simd, F: Float>(
    simd: S,
    (logits, grads): (&mut [F], &mut [F]),
    terms: impl Fn(usize) -> [Vector<S, F>; 3],
) {
    let len = Vector::<S, F>::LEN;
    for n in 0..logits.len() / len {
        let [logits, grads] = [&mut *logits, &mut *grads].map(|all| &mut all[n * len..][..len]);
        let numbers =
            [Vector::<S, F>::from_slice(simd, logits), Vector::<S, F>::from_slice(simd, grads)];
        let [weight, grad] = logits_vjp::<S, F>(simd, numbers, terms(n));
        weight.store_slice(logits);
        grad.store_slice(grads);
    }
}

#[inline(always)]
fn vectors_of_terms<S: Simd, F: Float>(simd: S, terms: &[F]) -> [Vector<S, F>; 3] {
    [vector::<S, F>(simd, terms, 0), vector::<S, F>(simd, terms, 1), vector::<S, F>(simd, terms, 2)]
}

/// Loads the terms of some pairs from `first` on, one in each block.
#[inline(always)]
fn terms_of_pairs<S: Simd, F: Float>(
    simd: S,
    others: Others<'_, F>,
    first: usize,
    pairs: usize,
) -> [Vector<S, F>; 3] {
    let len = Vector::<S, F>::LEN;
    let mut terms = terms_of_pair(simd, others, first);
    if pairs == 2 {
        let second = terms_of_pair(simd, others, first + 1);
        let low = mask::<S, F>(simd, (1 << (len / 2)) - 1);
        for n in 0..3 {
            terms[n] = low.select(terms[n], second[n]);
        }
    } else if pairs == 4 {
        let second = terms_of_pair(simd, others, first + 1);
        let third = terms_of_pair(simd, others, first + 2);
        let fourth = terms_of_pair(simd, others, first + 3);
        let low = mask::<S, F>(simd, (1 << (len / 2)) - 1);
        let even = mask::<S, F>(simd, ((1 << (len / 4)) - 1) * (1 + (1 << (len / 2))));
        for n in 0..3 {
            let high = even.select(third[n], fourth[n]);
            terms[n] = low.select(even.select(terms[n], second[n]), high);
        }
    }
    terms
}

/// Loads the terms of a pair; past the last one any will do.
#[inline(always)]
fn terms_of_pair<S: Simd, F: Float>(
    simd: S,
    others: Others<'_, F>,
    pair: usize,
) -> [Vector<S, F>; 3] {
    let at = others.at[pair.min(others.at.len() - 1)];
    vectors_of_terms(simd, others.row(at, 3 * Vector::<S, F>::LEN))
}
