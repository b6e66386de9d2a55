//! Dot products and weighted sums of rows that contain several heads side by side.
//!
//! The two main functions are compiled once for each type and instruction set, and called for a tile of
//! rows at a time: if inlined everywhere, they would make the build take minutes.
//!
//! One row, the *own* row, meets many others: a query its keys, or a key its queries. The columns of a
//! head may have different positions in the own row and the others, because heads of queries may share
//! heads of keys.

use super::primitives::matmul::{ROWS_OF_SUM, Vector, vector_len};
use super::problem::Slices;
use crate::float::Float;
use fearless_simd::{Level, Simd, SimdBase, SimdFloat};

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
#[inline]
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

/// The start of the columns of each head.
#[derive(Clone, Copy, Debug)]
struct Start {
    head: usize,
    own: usize,
    other: usize,
    /// Whether it is the first vector of the head.
    is_first: bool,
}

/// The columns of heads in own and other rows.
#[derive(Clone, Debug)]
pub(crate) struct Columns<F> {
    level: Level,
    /// Columns of a head.
    dim: usize,
    heads: usize,
    /// The vectors of columns of all heads: in groups of four if they are consecutive in both rows.
    fours: Vec<[Start; 4]>,
    ones: Vec<Start>,
    /// The remaining columns of each head.
    rest: Vec<Start>,
    /// For [`dots`](Self::dots): a vector of products for each head and lane; empty before.
    scratch: Vec<F>,
}

impl<F: Float> Columns<F> {
    /// `starts(head)` are a head's first columns in own and other rows.
    pub(crate) fn new(
        level: Level,
        heads: usize,
        dim: usize,
        starts: impl Fn(usize) -> [usize; 2],
    ) -> Self {
        let len = vector_len::<F>(level);
        let at = |head, columns| {
            let [own, other] = starts(head);
            let is_first = columns == 0;
            Start { head, own: own + columns, other: other + columns, is_first }
        };
        let vectors_of_head = dim / len;
        let vector = |v: usize| at(v / vectors_of_head, v % vectors_of_head * len);
        let num_vectors = heads * vectors_of_head;
        let with_rest = if dim.is_multiple_of(len) { 0 } else { heads };
        let rest = (0..with_rest).map(|head| at(head, dim - dim % len)).collect();
        let (mut fours, mut ones) = (Vec::with_capacity(num_vectors / 4), Vec::new());
        // Heads of several vectors one by one, the others side by side.
        let mut v = 0;
        while v < num_vectors {
            let first = vector(v);
            let follows = |n: usize| {
                let next = vector(v + n);
                let is_same = dim == len || next.head == first.head;
                is_same && [next.own, next.other] == [first.own + n * len, first.other + n * len]
            };
            if v + 4 <= num_vectors && (1..4).all(follows) {
                fours.push([first, vector(v + 1), vector(v + 2), vector(v + 3)]);
                v += 4;
            } else {
                ones.push(first);
                v += 1;
            }
        }
        Self { level, dim, heads, fours, ones, rest, scratch: Vec::new() }
    }

    /// out[h · stride + t] = own · row t in the columns of head h. Overwrites up to a whole vector of
    /// `out` with meaningless values.
    ///
    /// The products of as many rows as a vector has lanes are kept as vectors and folded into one vector
    /// of sums, which takes a quarter of the shuffles of one row at a time.
    #[inline(never)]
    pub(crate) fn dots(&mut self, own: &[F], rows: Gather<'_, F>, out: &mut [F], stride: usize) {
        dispatch!(self.level, simd => self.sums::<_, false>(simd, own, rows, out, stride));
    }

    /// Like [`dots`](Self::dots), but |own − row t|², computed from differences.
    #[inline(never)]
    pub(crate) fn squared_distances(
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
        let count = rows.at.len();
        let len = Vector::<S, F>::LEN;
        let whole = self.dim - self.dim % len;
        let Self { fours, ones, scratch, .. } = self;
        scratch.resize(self.heads * len * len, F::zero());
        if whole == 0 {
            // Not used in any sum, but values left by a previous tile might be NaN.
            scratch.fill(F::zero());
        }

        for start in (0..count).step_by(len) {
            let rows = Gather { at: &rows.at[start..count.min(start + len)], ..rows };
            if whole == len {
                for &vectors in fours.iter() {
                    multiply::<S, F, 4, SQUARE>(simd, vectors, own, rows, scratch);
                }
                for &vector in ones.iter() {
                    multiply::<S, F, 1, SQUARE>(simd, [vector], own, rows, scratch);
                }
            } else {
                // A head's fours come before its ones.
                for &vectors in fours.iter() {
                    add_products::<S, F, 4, SQUARE>(simd, vectors, own, rows, scratch);
                }
                for &vector in ones.iter() {
                    add_products::<S, F, 1, SQUARE>(simd, [vector], own, rows, scratch);
                }
            }
            for (head, products) in scratch.chunks_exact(len * len).enumerate() {
                let sums = fold_lanes::<S, F>(simd, products);
                sums.store_slice(&mut out[head * stride + start..][..len]);
            }
        }
        for rest in &self.rest {
            let len = self.dim - whole;
            for (t, out) in out[rest.head * stride..][..count].iter_mut().enumerate() {
                let (own, row) = (&own[rest.own..][..len], &rows.row(t)[rest.other..][..len]);
                *out += if SQUARE { plain_squared_distance(own, row) } else { plain_dot(own, row) };
            }
        }
    }

    /// sum ← factors[h] · sum + Σₜ weights[h · stride + t] · row t in the columns of each head h.
    ///
    /// The sum stays in registers over all rows, four vectors of it at a time.
    #[inline(never)]
    pub(crate) fn add_weighted(&self, sum: &mut [F], weights: Weights<'_, F>, rows: Gather<'_, F>) {
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
        for &vectors in &self.fours {
            add_weighted_vectors(simd, vectors, sum, weights, rows);
        }
        for &vector in &self.ones {
            add_weighted_vectors(simd, [vector], sum, weights, rows);
        }
        for rest in &self.rest {
            let len = self.dim % Vector::<S, F>::LEN;
            let sum = &mut sum[rest.own..][..len];
            for sum in sum.iter_mut() {
                *sum *= weights.factors[rest.head];
            }
            for (t, &weight) in weights.of_head(rest.head, rows.at.len()).iter().enumerate() {
                let row = &rows.row(t)[rest.other..][..len];
                sum.iter_mut().zip(row).for_each(|(sum, &value)| *sum += weight * value);
            }
        }
    }
}

/// Computes products of heads of one vector each.
#[inline(always)]
fn multiply<S: Simd, F: Float, const N: usize, const SQUARE: bool>(
    simd: S,
    vectors: [Start; N],
    own: &[F],
    rows: Gather<'_, F>,
    products: &mut [F],
) {
    let len = Vector::<S, F>::LEN;
    let mut own_vectors = [Vector::<S, F>::splat(simd, F::zero()); N];
    let own = &own[vectors[0].own..][..N * len];
    for n in 0..N {
        own_vectors[n] = Vector::<S, F>::from_slice(simd, &own[n * len..][..len]);
    }
    let products = &mut products[vectors[0].head * len * len..][..N * len * len];
    for t in 0..rows.at.len() {
        let row = &rows.row(t)[vectors[0].other..][..N * len];
        for n in 0..N {
            let row = Vector::<S, F>::from_slice(simd, &row[n * len..][..len]);
            let difference = row - own_vectors[n];
            let product = if SQUARE { difference * difference } else { row * own_vectors[n] };
            product.store_slice(&mut products[(n * len + t) * len..][..len]);
        }
    }
}

/// Adds the products of vectors of one head to the previous ones, unless they are the first.
#[inline(always)]
fn add_products<S: Simd, F: Float, const N: usize, const SQUARE: bool>(
    simd: S,
    vectors: [Start; N],
    own: &[F],
    rows: Gather<'_, F>,
    products: &mut [F],
) {
    let len = Vector::<S, F>::LEN;
    let Start { head, is_first, .. } = vectors[0];
    let products = &mut products[head * len * len..][..rows.at.len() * len];
    let mut own_vectors = [Vector::<S, F>::splat(simd, F::zero()); N];
    let own = &own[vectors[0].own..][..N * len];
    for n in 0..N {
        own_vectors[n] = Vector::<S, F>::from_slice(simd, &own[n * len..][..len]);
    }
    for (t, products) in products.chunks_exact_mut(len).enumerate() {
        let row = &rows.row(t)[vectors[0].other..][..N * len];
        let mut sum = match is_first {
            true => Vector::<S, F>::splat(simd, F::zero()),
            false => Vector::<S, F>::from_slice(simd, products),
        };
        for n in 0..N {
            let row = Vector::<S, F>::from_slice(simd, &row[n * len..][..len]);
            let difference = row - own_vectors[n];
            sum = match SQUARE {
                true => difference.mul_add(difference, sum),
                false => row.mul_add(own_vectors[n], sum),
            };
        }
        sum.store_slice(products);
    }
}

/// Returns a vector whose lane t is the sum of the lanes of vector t.
#[inline(always)]
fn fold_lanes<S: Simd, F: Float>(simd: S, vectors: &[F]) -> Vector<S, F> {
    let len = Vector::<S, F>::LEN;
    let vectors = &vectors[..len * len];
    match len {
        2 => fold_two(simd, vectors),
        4 => fold_four(simd, vectors),
        8 => fold_eight(simd, vectors),
        16 => {
            let (first, second) = vectors.split_at(8 * len);
            fold::<S, F>(fold_eight(simd, first), fold_eight(simd, second))
        }
        _ => unreachable!("no CPU has vectors of {len} numbers"),
    }
}

/// Returns the sums of adjacent lanes: those of `a`, then those of `b`.
#[inline(always)]
fn fold<S: Simd, F: Float>(a: Vector<S, F>, b: Vector<S, F>) -> Vector<S, F> {
    a.unzip_low(b) + a.unzip_high(b)
}

// Depth first, so that few vectors are live at a time; functions, because a closure would not be inlined.
#[inline(always)]
fn fold_two<S: Simd, F: Float>(simd: S, vectors: &[F]) -> Vector<S, F> {
    let (a, b) = vectors.split_at(Vector::<S, F>::LEN);
    let a = Vector::<S, F>::from_slice(simd, a);
    fold::<S, F>(a, Vector::<S, F>::from_slice(simd, &b[..Vector::<S, F>::LEN]))
}

#[inline(always)]
fn fold_four<S: Simd, F: Float>(simd: S, vectors: &[F]) -> Vector<S, F> {
    let (a, b) = vectors.split_at(2 * Vector::<S, F>::LEN);
    fold::<S, F>(fold_two(simd, a), fold_two(simd, b))
}

#[inline(always)]
fn fold_eight<S: Simd, F: Float>(simd: S, vectors: &[F]) -> Vector<S, F> {
    let (a, b) = vectors.split_at(4 * Vector::<S, F>::LEN);
    fold::<S, F>(fold_four(simd, a), fold_four(simd, b))
}

/// Some rows of a matrix, in some order.
#[derive(Clone, Copy)]
pub(crate) struct Gather<'r, F> {
    pub(crate) rows: Slices<'r, F>,
    pub(crate) at: &'r [usize],
}

impl<'r, F: Copy> Gather<'r, F> {
    #[inline(always)]
    fn row(self, t: usize) -> &'r [F] {
        self.rows.row(self.at[t])
    }

    /// Returns the given columns of a row.
    #[inline(always)]
    fn columns(self, t: usize, [first, len]: [usize; 2]) -> &'r [F] {
        &self.row(t)[first..][..len]
    }
}

/// The factors of [`Columns::add_weighted`].
#[derive(Clone, Copy)]
pub(crate) struct Weights<'w, F> {
    /// The factors of the previous sum of each head.
    pub(crate) factors: &'w [F],
    /// The weights of the rows; those of head h start at h · stride.
    pub(crate) weights: &'w [F],
    pub(crate) stride: usize,
}

impl<'w, F> Weights<'w, F> {
    #[inline(always)]
    fn of_head(&self, head: usize, count: usize) -> &'w [F] {
        &self.weights[head * self.stride..][..count]
    }
}

#[inline(always)]
fn add_weighted_vectors<S: Simd, F: Float, const N: usize>(
    simd: S,
    vectors: [Start; N],
    sum: &mut [F],
    weights: Weights<'_, F>,
    rows: Gather<'_, F>,
) {
    let len = Vector::<S, F>::LEN;
    let count = rows.at.len();
    let zero = Vector::<S, F>::splat(simd, F::zero());
    let mut of_head = [weights.weights; N];
    let mut total = [zero; N];
    let sum = &mut sum[vectors[0].own..][..N * len];
    for n in 0..N {
        let factor = Vector::<S, F>::splat(simd, weights.factors[vectors[n].head]);
        total[n] = Vector::<S, F>::from_slice(simd, &sum[n * len..][..len]) * factor;
        of_head[n] = weights.of_head(vectors[n].head, count);
    }
    let columns = [vectors[0].other, N * len];
    for start in (0..count).step_by(2 * ROWS_OF_SUM) {
        let end = count.min(start + 2 * ROWS_OF_SUM);
        // Two sums in turn, so that an addition need not wait for the previous one.
        let (mut even, mut odd) = ([zero; N], [zero; N]);
        for t in (start..end - (end - start) % 2).step_by(2) {
            let (even_row, odd_row) = (rows.columns(t, columns), rows.columns(t + 1, columns));
            for n in 0..N {
                let a = Vector::<S, F>::from_slice(simd, &even_row[n * len..][..len]);
                let b = Vector::<S, F>::from_slice(simd, &odd_row[n * len..][..len]);
                even[n] = Vector::<S, F>::splat(simd, of_head[n][t]).mul_add(a, even[n]);
                odd[n] = Vector::<S, F>::splat(simd, of_head[n][t + 1]).mul_add(b, odd[n]);
            }
        }
        if (end - start) % 2 == 1 {
            let row = rows.columns(end - 1, columns);
            for n in 0..N {
                let row = Vector::<S, F>::from_slice(simd, &row[n * len..][..len]);
                even[n] = Vector::<S, F>::splat(simd, of_head[n][end - 1]).mul_add(row, even[n]);
            }
        }
        for n in 0..N {
            total[n] += even[n] + odd[n];
        }
    }
    for n in 0..N {
        total[n].store_slice(&mut sum[n * len..][..len]);
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
        // What a tile before left behind must not matter.
        columns.scratch.fill(F::nan());
        let mut products = vec![F::nan(); heads * stride];
        columns.dots(&own, gather(&others, other_len), &mut products, stride);
        columns.scratch.fill(F::nan());
        let mut squares = vec![F::nan(); heads * stride];
        columns.squared_distances(&own, gather(&others, other_len), &mut squares, stride);
        let [weights, factors] = [entries(heads * stride, 3), entries::<F>(heads, 4)];
        let mut sum: Vec<F> = entries(own_len, 5);
        let before = sum.clone();
        let all = Weights { factors: &factors, weights: &weights, stride };
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
        let all = Weights { factors: &ones, ..all };
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
