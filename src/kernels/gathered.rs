//! Dot products and weighted sums of rows that contain several heads side by side.
//!
//! The two main functions are compiled once for each type and instruction set, and called for a tile of
//! rows at a time: if inlined everywhere, they would make the build take minutes.
//!
//! One row, the *own* row, meets many others: a query its keys, or a key its queries. The columns of a
//! head may have different positions in the own row and the others, because heads of queries may share
//! heads of keys.

use super::primitives::compensated::TERMS_OF_SUM;
use super::primitives::matmul::{Vector, vector_len};
use super::problem::Slices;
use crate::kernels::Float;
use fearless_simd::{Level, Select, Simd, SimdBase, SimdFloat, SimdMask};

/// Σ aᵢ bᵢ over the common length, without SIMD.
#[inline]
pub(crate) fn plain_dot<F: Float>(a: &[F], b: &[F]) -> F {
    a.iter().zip(b).fold(F::zero(), |sum, (&a, &b)| sum + a * b)
}

/// Σ (aᵢ − bᵢ)² over the common length, without SIMD.
#[inline]
fn plain_squared_distance<F: Float>(a: &[F], b: &[F]) -> F {
    a.iter().zip(b).fold(F::zero(), |sum, (&a, &b)| sum + (a - b) * (a - b))
}

/// Σ aᵢ bᵢ over the common length in eight sums, which compilers vectorise.
#[inline(always)]
pub(crate) fn unrolled_dot<F: Float>(a: &[F], b: &[F]) -> F {
    let len = a.len().min(b.len());
    let (a, b) = (a[..len].chunks_exact(8), b[..len].chunks_exact(8));
    let rest = plain_dot(a.remainder(), b.remainder());
    let mut sums = [F::zero(); 8];
    for (a, b) in a.zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.into_iter().sum::<F>() + rest
}

/// Sums in registers at a time: as many as keep both units for multiply-add busy.
const SUMS: usize = 8;

/// Some vectors of columns of some heads, which are summed together: [`SUMS`], 4 or 1.
#[derive(Clone, Copy, Debug)]
struct Group {
    /// The first head, and the number of heads.
    head: usize,
    heads: usize,
    /// Vectors of each head.
    vectors: usize,
    /// Whether they are the first vectors of the heads.
    is_first: bool,
    /// The first column of each head in own and other rows.
    own: [usize; SUMS],
    other: [usize; SUMS],
}

impl Group {
    /// Returns the first column of head h of a group of `H` heads in other rows. Heads of a group of eight are
    /// adjacent: there are not enough registers for eight columns beside eight pointers to weights.
    #[inline(always)]
    fn first_of<const H: usize>(&self, h: usize, len: usize) -> usize {
        if H == SUMS { self.other[0] + h * len } else { self.other[h] }
    }
}

/// The columns of heads in own and other rows.
#[derive(Clone, Debug)]
pub(super) struct Columns<F> {
    level: Level,
    /// Columns of a head.
    dim: usize,
    heads: usize,
    /// The whole vectors of columns of all heads.
    groups: Vec<Group>,
    /// The other columns of each head, in own and other rows.
    rest: Vec<[usize; 2]>,
    /// For [`dots`](Self::dots): a vector of products for each head and lane; empty before.
    scratch: Vec<F>,
}

impl<F: Float> Columns<F> {
    /// `starts(head)` are a head's first columns in own and other rows.
    pub(super) fn new(
        level: Level,
        heads: usize,
        dim: usize,
        starts: impl Fn(usize) -> [usize; 2],
    ) -> Self {
        let len = vector_len::<F>(level);
        let starts: Vec<_> = (0..heads).map(starts).collect();
        let groups = groups(&starts, dim / len, len);
        let rest_len = dim % len;
        let with_rest = if rest_len > 0 { heads } else { 0 };
        let first_of_rest = |start: &[usize; 2]| start.map(|start| start + dim - rest_len);
        let rest = starts[..with_rest].iter().map(first_of_rest).collect();
        Self { level, dim, heads, groups, rest, scratch: Vec::new() }
    }

    /// out[h · stride + t] = own · row t in the columns of head h. Overwrites up to a whole vector of
    /// `out` with meaningless values.
    ///
    /// The products of as many rows as a vector has lanes are kept as vectors and folded into one vector
    /// of sums, which takes a third of the shuffles of one row at a time.
    #[inline(never)]
    pub(super) fn dots(&mut self, own: &[F], rows: Gather<'_, F>, out: &mut [F], stride: usize) {
        dispatch!(self.level, simd => self.sums::<_, false>(simd, own, rows, out, stride));
    }

    /// Like [`dots`](Self::dots), but |own − row t|², computed from differences.
    #[inline(never)]
    pub(super) fn squared_distances(
        &mut self,
        own: &[F],
        rows: Gather<'_, F>,
        out: &mut [F],
        stride: usize,
    ) {
        dispatch!(self.level, simd => self.sums::<_, true>(simd, own, rows, out, stride));
    }

    #[inline(always)]
    fn sums<S: Simd, const SQUARE: bool>(
        &mut self,
        simd: S,
        own: &[F],
        rows: Gather<'_, F>,
        out: &mut [F],
        stride: usize,
    ) {
        let len = Vector::<S, F>::LEN;
        let Self { groups, scratch, .. } = self;
        scratch.resize(self.heads * len * len, F::zero());
        if groups.is_empty() {
            // Not used in any sum, but values left by a previous tile might be NaN.
            scratch.fill(F::zero());
        }
        for (at, start) in rows.at.chunks(len).zip((0..).step_by(len)) {
            let rows = Gather { at, ..rows };
            for group in groups.iter() {
                match [group.heads, group.vectors] {
                    [1, 8] => add_products::<S, F, 1, 8, SQUARE>(simd, group, own, rows, scratch),
                    [2, 4] => add_products::<S, F, 2, 4, SQUARE>(simd, group, own, rows, scratch),
                    [4, 2] => add_products::<S, F, 4, 2, SQUARE>(simd, group, own, rows, scratch),
                    [8, 1] => add_products::<S, F, 8, 1, SQUARE>(simd, group, own, rows, scratch),
                    [1, 4] => add_products::<S, F, 1, 4, SQUARE>(simd, group, own, rows, scratch),
                    [2, 2] => add_products::<S, F, 2, 2, SQUARE>(simd, group, own, rows, scratch),
                    [4, 1] => add_products::<S, F, 4, 1, SQUARE>(simd, group, own, rows, scratch),
                    _ => add_products::<S, F, 1, 1, SQUARE>(simd, group, own, rows, scratch),
                }
            }
            for (head, products) in scratch.chunks_exact(len * len).enumerate() {
                let sums = fold_lanes::<S, F>(simd, products);
                sums.store_slice(&mut out[head * stride + start..][..len]);
            }
        }
        let len = self.dim % len;
        for (head, &[first_own, first_other]) in self.rest.iter().enumerate() {
            let own = &own[first_own..][..len];
            for (t, out) in out[head * stride..][..rows.at.len()].iter_mut().enumerate() {
                let row = &rows.row(t)[first_other..][..len];
                *out += if SQUARE { plain_squared_distance(own, row) } else { plain_dot(own, row) };
            }
        }
    }

    /// sum ← factors[h] · sum + Σₜ weights[h · stride + t] · row t in the columns of each head h. Without factors
    /// the sum is overwritten, so heads must have different columns.
    ///
    /// The sum stays in registers over many rows: [`SUMS`] vectors of it, or fewer, with even and odd rows apart.
    #[inline(never)]
    pub(super) fn add_weighted(&self, sum: &mut [F], weights: Weights<'_, F>, rows: Gather<'_, F>) {
        dispatch!(self.level, simd => self.weighted_sums(simd, sum, weights, rows));
    }

    #[inline(always)]
    fn weighted_sums<S: Simd>(
        &self,
        simd: S,
        sum: &mut [F],
        weights: Weights<'_, F>,
        rows: Gather<'_, F>,
    ) {
        for group in &self.groups {
            match [group.heads, group.vectors] {
                [1, 8] => add_weighted_group::<S, F, 1, 8, 1>(simd, group, sum, weights, rows),
                [2, 4] => add_weighted_group::<S, F, 2, 4, 1>(simd, group, sum, weights, rows),
                [4, 2] => add_weighted_group::<S, F, 4, 2, 1>(simd, group, sum, weights, rows),
                [8, 1] => add_weighted_group::<S, F, 8, 1, 1>(simd, group, sum, weights, rows),
                [1, 4] => add_weighted_group::<S, F, 1, 4, 2>(simd, group, sum, weights, rows),
                [2, 2] => add_weighted_group::<S, F, 2, 2, 2>(simd, group, sum, weights, rows),
                [4, 1] => add_weighted_group::<S, F, 4, 1, 2>(simd, group, sum, weights, rows),
                _ => add_weighted_group::<S, F, 1, 1, 2>(simd, group, sum, weights, rows),
            }
        }
        let len = self.dim % Vector::<S, F>::LEN;
        for (head, &[first_own, first_other]) in self.rest.iter().enumerate() {
            let sum = &mut sum[first_own..][..len];
            match weights.factors {
                Some(factors) => sum.iter_mut().for_each(|sum| *sum *= factors[head]),
                None => sum.fill(F::zero()),
            }
            for (t, &weight) in weights.of_head(head, rows.at.len()).iter().enumerate() {
                let row = &rows.row(t)[first_other..][..len];
                sum.iter_mut().zip(row).for_each(|(sum, &value)| *sum += weight * value);
            }
        }
    }
}

/// Splits the whole vectors of columns of all heads into groups. `starts` are the heads' first columns in own and
/// other rows.
fn groups(starts: &[[usize; 2]], vectors_of_head: usize, len: usize) -> Vec<Group> {
    let group = |head: usize, first: usize, heads: usize, vectors: usize| {
        let [mut own, mut other] = [[0; SUMS]; 2];
        for (h, start) in starts[head..head + heads].iter().enumerate() {
            [own[h], other[h]] = start.map(|start| start + first * len);
        }
        Group { head, heads, vectors, is_first: first == 0, own, other }
    };
    let mut groups = Vec::with_capacity((starts.len() * vectors_of_head).div_ceil(SUMS));
    let mut head = 0;
    while head < starts.len() && vectors_of_head > 0 {
        let next = &starts[head..];
        let fit = |&heads: &usize| {
            let is_next = |h: usize| next[h][1] == next[0][1] + h * len;
            let are_enough = matches!(vectors_of_head, 1 | 2 | 4) && heads <= next.len();
            are_enough && (heads < SUMS || (1..heads).all(is_next))
        };
        if let Some(heads) = [SUMS, 4].map(|sums| sums / vectors_of_head).into_iter().find(fit) {
            groups.push(group(head, 0, heads, vectors_of_head));
            head += heads;
            continue;
        }
        let mut first = 0;
        while first < vectors_of_head {
            let vectors = match vectors_of_head - first {
                SUMS.. => SUMS,
                4.. => 4,
                _ => 1,
            };
            groups.push(group(head, first, 1, vectors));
            first += vectors;
        }
        head += 1;
    }
    groups
}

/// Adds the products of N vectors of each of H heads to those of the previous vectors, if there are any.
#[inline(always)]
fn add_products<S: Simd, F: Float, const H: usize, const N: usize, const SQUARE: bool>(
    simd: S,
    group: &Group,
    own: &[F],
    rows: Gather<'_, F>,
    products: &mut [F],
) {
    let len = Vector::<S, F>::LEN;
    let zero = Vector::<S, F>::splat(simd, F::zero());
    let mut own_vectors = [[zero; N]; H];
    for h in 0..H {
        assert!(group.first_of::<H>(h, len) + N * len <= rows.rows.columns);
        let own = &own[group.own[h]..][..N * len];
        for n in 0..N {
            own_vectors[h][n] = Vector::<S, F>::from_slice(simd, &own[n * len..][..len]);
        }
    }
    let products = &mut products[group.head * len * len..][..H * len * len];
    for (t, &row) in rows.at.iter().enumerate().take(len) {
        let row = rows.rows.row(row);
        for h in 0..H {
            let first = group.first_of::<H>(h, len);
            let row = &row[first..first + N * len];
            let products = &mut products[(h * len + t) * len..][..len];
            let mut sum = zero;
            if H == 1 && !group.is_first {
                sum = Vector::<S, F>::from_slice(simd, products);
            }
            for n in 0..N {
                let row = Vector::<S, F>::from_slice(simd, &row[n * len..][..len]);
                let difference = row - own_vectors[h][n];
                sum = match SQUARE {
                    true => difference.mul_add(difference, sum),
                    false => row.mul_add(own_vectors[h][n], sum),
                };
            }
            sum.store_slice(products);
        }
    }
}

/// Returns a vector whose lane t is the sum of the lanes of vector t. Every lane adds in the same order, so
/// that a product does not depend on its place among the rows.
///
/// In registers of blocks of 16 bytes: first within blocks, then across them.
#[inline(always)]
fn fold_lanes<S: Simd, F: Float>(simd: S, vectors: &[F]) -> Vector<S, F> {
    let len = Vector::<S, F>::LEN;
    let vectors = &vectors[..len * len];
    match (len, size_of::<F>()) {
        (2, _) => fold_two(simd, vectors, 0),
        (4, 4) => fold_four(simd, vectors, 0),
        (4, _) => {
            let low = fold_two(simd, vectors, 0);
            fold_halves::<S, F>(simd, low, fold_two(simd, vectors, 2))
        }
        (8, 4) => {
            let low = fold_four(simd, vectors, 0);
            fold_halves::<S, F>(simd, low, fold_four(simd, vectors, 4))
        }
        (8, _) => {
            let (a, b) = (fold_two(simd, vectors, 0), fold_two(simd, vectors, 2));
            let (c, d) = (fold_two(simd, vectors, 4), fold_two(simd, vectors, 6));
            fold_quarters::<S, F>(simd, [a, b, c, d])
        }
        (16, _) => {
            let (a, b) = (fold_four(simd, vectors, 0), fold_four(simd, vectors, 4));
            let (c, d) = (fold_four(simd, vectors, 8), fold_four(simd, vectors, 12));
            fold_quarters::<S, F>(simd, [a, b, c, d])
        }
        _ => unreachable!("no CPU has vectors of {len} numbers"),
    }
}

/// Returns vector t.
#[inline(always)]
pub(super) fn vector<S: Simd, F: Float>(simd: S, vectors: &[F], t: usize) -> Vector<S, F> {
    let len = Vector::<S, F>::LEN;
    Vector::<S, F>::from_slice(simd, &vectors[t * len..][..len])
}

/// A mask that takes lanes from its first operand where the bit is set.
#[inline(always)]
pub(super) fn mask<S: Simd, F: Float>(simd: S, bits: u64) -> <Vector<S, F> as SimdBase<S>>::Mask {
    SimdMask::from_bitmask(simd, bits)
}

/// For blocks of two lanes: in each block the sums of that block of vectors t and t + 1.
#[inline(always)]
fn fold_two<S: Simd, F: Float>(simd: S, vectors: &[F], t: usize) -> Vector<S, F> {
    let (a, b) = (vector::<S, F>(simd, vectors, t), vector::<S, F>(simd, vectors, t + 1));
    mask::<S, F>(simd, 0b0101_0101).select(a, b) + a.slide_within_blocks::<1>(b)
}

/// For blocks of four lanes: in each block the sums of that block of vectors t to t + 3.
///
/// ```text
/// a₀₂ a₁₃ c₀₂ c₁₃   of vectors t and t + 2
/// d₀₂ b₁₃ b₀₂ d₁₃   of t + 1 and t + 3: one shuffle more, so that the second one is a rotation
/// a   b   c   d
/// ```
#[inline(always)]
fn fold_four<S: Simd, F: Float>(simd: S, vectors: &[F], t: usize) -> Vector<S, F> {
    let (a, c) = (vector::<S, F>(simd, vectors, t), vector::<S, F>(simd, vectors, t + 2));
    let ac = mask::<S, F>(simd, 0x3333).select(a, c) + a.slide_within_blocks::<2>(c);
    let (b, d) = (vector::<S, F>(simd, vectors, t + 1), vector::<S, F>(simd, vectors, t + 3));
    let middle = mask::<S, F>(simd, 0x6666);
    let swapped = middle.select(d, b);
    let bd = middle.select(b, d) + swapped.slide_within_blocks::<2>(swapped);
    let even = mask::<S, F>(simd, 0x5555);
    let swapped = even.select(bd, ac);
    even.select(ac, bd) + swapped.slide_within_blocks::<1>(swapped)
}

/// For two blocks: their sum in `a`, then in `b`.
#[inline(always)]
pub(super) fn fold_halves<S: Simd, F: Float>(
    simd: S,
    a: Vector<S, F>,
    b: Vector<S, F>,
) -> Vector<S, F> {
    match Vector::<S, F>::LEN {
        4 => mask::<S, F>(simd, 0b0011).select(a, b) + a.slide::<2>(b),
        _ => mask::<S, F>(simd, 0b0000_1111).select(a, b) + a.slide::<4>(b),
    }
}

/// For four blocks: their sums in each vector, like [`fold_four`] with blocks in place of lanes.
#[inline(always)]
pub(super) fn fold_quarters<S: Simd, F: Float>(
    simd: S,
    [a, b, c, d]: [Vector<S, F>; 4],
) -> Vector<S, F> {
    // For eight lanes in blocks of two, and for sixteen in blocks of four.
    let is_short = Vector::<S, F>::LEN == 8;
    let [first, middle, even] =
        if is_short { [0x0f, 0x3c, 0x33] } else { [0x00ff, 0x0ff0, 0x0f0f] };
    let [first, middle, even] =
        [mask::<S, F>(simd, first), mask::<S, F>(simd, middle), mask::<S, F>(simd, even)];
    let swapped = middle.select(d, b);
    let rotated = if is_short { swapped.slide::<4>(swapped) } else { swapped.slide::<8>(swapped) };
    let ac = first.select(a, c) + if is_short { a.slide::<4>(c) } else { a.slide::<8>(c) };
    let bd = middle.select(b, d) + rotated;
    let swapped = even.select(bd, ac);
    let rotated = if is_short { swapped.slide::<2>(swapped) } else { swapped.slide::<4>(swapped) };
    even.select(ac, bd) + rotated
}

/// Some rows of a matrix, in some order.
#[derive(Clone, Copy)]
pub(super) struct Gather<'r, F> {
    pub(super) rows: Slices<'r, F>,
    pub(super) at: &'r [usize],
}

impl<'r, F: Copy> Gather<'r, F> {
    #[inline(always)]
    fn row(self, t: usize) -> &'r [F] {
        self.rows.row(self.at[t])
    }
}

/// The factors of [`Columns::add_weighted`].
#[derive(Clone, Copy)]
pub(super) struct Weights<'w, F> {
    /// The factors of the previous sum of each head, if there is one.
    pub(super) factors: Option<&'w [F]>,
    /// The weights of the rows; those of head h start at h · stride.
    pub(super) weights: &'w [F],
    pub(super) stride: usize,
}

impl<'w, F> Weights<'w, F> {
    #[inline(always)]
    fn of_head(&self, head: usize, count: usize) -> &'w [F] {
        &self.weights[head * self.stride..][..count]
    }
}

/// sum ← factors · sum + Σₜ weights · row t for N vectors of each of H heads; R rows in turn are summed apart, so that an
/// addition need not wait for the previous one.
#[inline(always)]
fn add_weighted_group<S: Simd, F: Float, const H: usize, const N: usize, const R: usize>(
    simd: S,
    group: &Group,
    sum: &mut [F],
    weights: Weights<'_, F>,
    rows: Gather<'_, F>,
) {
    let len = Vector::<S, F>::LEN;
    let count = rows.at.len();
    let mut of_head = [weights.weights; H];
    let factors = weights.factors.map(
        #[inline(always)]
        |factors| &factors[group.head..][..H],
    );
    for (h, of_head) in of_head.iter_mut().enumerate() {
        assert!(group.first_of::<H>(h, len) + N * len <= rows.rows.columns);
        *of_head = weights.of_head(group.head + h, count);
    }
    for start in (0..count.max(1)).step_by(R * TERMS_OF_SUM) {
        let mut sums = [[[Vector::<S, F>::splat(simd, F::zero()); N]; H]; R];
        let end = count.min(start + R * TERMS_OF_SUM);
        let whole = end - (end - start) % R;
        for t in (start..whole).step_by(R) {
            for (r, sums) in sums.iter_mut().enumerate() {
                add_row::<S, F, H, N>(simd, group, sums, (of_head, t + r), rows);
            }
        }
        for t in whole..end {
            add_row::<S, F, H, N>(simd, group, &mut sums[0], (of_head, t), rows);
        }
        for h in 0..H {
            let sum = &mut sum[group.own[h]..][..N * len];
            for n in 0..N {
                let mut of_rows = sums[0][h][n];
                for sums in &sums[1..] {
                    of_rows += sums[h][n];
                }
                let sum = &mut sum[n * len..][..len];
                let total = match factors {
                    Some(factors) if start == 0 => {
                        let factor = Vector::<S, F>::splat(simd, factors[h]);
                        Vector::<S, F>::from_slice(simd, sum).mul_add(factor, of_rows)
                    }
                    None if start == 0 => of_rows,
                    _ => Vector::<S, F>::from_slice(simd, sum) + of_rows,
                };
                total.store_slice(sum);
            }
        }
    }
}

/// Adds row t, times its weight for each head, to the sums.
#[inline(always)]
fn add_row<S: Simd, F: Float, const H: usize, const N: usize>(
    simd: S,
    group: &Group,
    sums: &mut [[Vector<S, F>; N]; H],
    (weights, t): ([&[F]; H], usize),
    rows: Gather<'_, F>,
) {
    let len = Vector::<S, F>::LEN;
    let row = rows.row(t);
    for h in 0..H {
        let weight = Vector::<S, F>::splat(simd, weights[h][t]);
        let first = group.first_of::<H>(h, len);
        let row = &row[first..first + N * len];
        for n in 0..N {
            let row = Vector::<S, F>::from_slice(simd, &row[n * len..][..len]);
            sums[h][n] = weight.mul_add(row, sums[h][n]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::levels;

    /// Small integers, so that every order of summation gives the same sum.
    fn entries<F: Float>(len: usize, seed: usize) -> Vec<F> {
        (0..len).map(|i| F::from_f64(((i * 7 + seed * 3) % 11) as f64 - 5.0)).collect()
    }

    /// `dots` and `add_weighted` against plain loops; `kv` heads of the other rows.
    fn check<F: Float>(level: Level, [heads, kv, dim, count]: [usize; 4]) {
        let [own_len, other_len] = [heads * dim, kv * dim];
        let kv_head = |head: usize| head * kv / heads;
        let stride = count.next_multiple_of(vector_len::<F>(level));
        let own: Vec<F> = entries(own_len, 1);
        let others: Vec<F> = entries(count * other_len, 2);
        let row = |t: usize| &others[t * other_len..][..other_len];
        let at: Vec<usize> = (0..count).collect();
        let gather = |data, columns| Gather { rows: Slices { data, columns }, at: &at };

        let mut columns = Columns::new(level, heads, dim, |head| [head * dim, kv_head(head) * dim]);
        let mut products = vec![F::nan(); heads * stride];
        // What a tile before left behind must not matter.
        columns.scratch.fill(F::nan());
        columns.dots(&own, gather(&others, other_len), &mut products, stride);
        let mut squares = vec![F::nan(); heads * stride];
        columns.scratch.fill(F::nan());
        columns.squared_distances(&own, gather(&others, other_len), &mut squares, stride);
        let [weights, factors] = [entries(heads * stride, 3), entries::<F>(heads, 4)];
        let mut sum: Vec<F> = entries(own_len, 5);
        let before = sum.clone();
        let all = Weights { factors: Some(&factors), weights: &weights, stride };
        columns.add_weighted(&mut sum, all, gather(&others, other_len));
        for head in 0..heads {
            let other = |t: usize| &row(t)[kv_head(head) * dim..][..dim];
            for t in 0..count {
                let expected = plain_dot(&own[head * dim..][..dim], other(t));
                assert_eq!(products[head * stride + t], expected, "{heads} {kv} {dim} {count}");
                let expected = plain_squared_distance(&own[head * dim..][..dim], other(t));
                assert_eq!(squares[head * stride + t], expected, "{heads} {kv} {dim} {count}");
            }
            for c in 0..dim {
                let at = head * dim + c;
                let terms = (0..count).map(|t| weights[head * stride + t] * other(t)[c]);
                let expected = factors[head] * before[at] + terms.sum::<F>();
                assert_eq!(sum[at], expected, "{heads} {kv} {dim} {count}");
            }
        }

        // The other way round several heads add to the same columns.
        let columns = Columns::new(level, heads, dim, |head| [kv_head(head) * dim, head * dim]);
        let others: Vec<F> = entries(count * own_len, 6);
        let row = |t: usize| &others[t * own_len..][..own_len];
        let mut sum = vec![F::zero(); other_len];
        let ones = vec![F::one(); heads];
        let all = Weights { factors: Some(&ones), ..all };
        columns.add_weighted(&mut sum, all, gather(&others, own_len));
        for (kv_column, &sum) in sum.iter().enumerate() {
            let of_heads = (0..heads).filter(|&head| kv_head(head) == kv_column / dim);
            let terms = of_heads.flat_map(|head| {
                let column = head * dim + kv_column % dim;
                (0..count).map(move |t| (head, t, column))
            });
            let expected: F =
                terms.map(|(head, t, c)| weights[head * stride + t] * row(t)[c]).sum();
            assert_eq!(sum, expected, "{heads} {kv} {dim} {count}");
        }
    }

    #[test]
    fn an_unrolled_sum_is_the_plain_one() {
        for len in 0..40 {
            let (a, b) = (entries::<f64>(len, 1), entries(len + 3, 2));
            assert_eq!(unrolled_dot(&a, &b), plain_dot(&a, &b));
        }
    }

    #[test]
    fn sums_are_those_of_plain_loops_at_every_size() {
        for level in levels() {
            for dim in (0..=33).chain([47, 48, 64, 67, 80]) {
                for count in [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33] {
                    for [heads, kv] in [[1, 1], [4, 4], [5, 5], [6, 2]] {
                        let sizes = [heads, kv, dim, count];
                        check::<f32>(level, sizes);
                        check::<f64>(level, sizes);
                    }
                }
            }
        }
    }
}
