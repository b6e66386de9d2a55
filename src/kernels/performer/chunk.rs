//! The features of a chunk of rows.

use super::products::{product, transposed};
use super::{FeatureProblem, KeySums, Map};
use crate::kernels::Float;
use crate::kernels::gathered::unrolled_dot;
use crate::kernels::primitives::exp::exp2;
use crate::kernels::primitives::matmul::{Left, Target, Vector, panel_len};
use crate::kernels::primitives::sincos::sin_cos;
use fearless_simd::{Level, Select, Simd, SimdBase};
use std::f64::consts::{LN_2, LOG2_E};

/// The number of rows processed at a time.
pub(super) const CHUNK: usize = 128;

/// The features of up to [`CHUNK`] rows, and their buffers.
pub(super) struct Chunk<F> {
    pub(super) level: Level,
    /// The number of rows.
    pub(super) len: usize,
    pub(super) num_features: usize,
    /// The length of a row of features, in whole panels.
    pub(super) stride: usize,
    /// The length of a row of E, in whole panels.
    pub(super) padded: usize,
    /// The number of columns of E.
    columns: usize,
    map: Map<F>,
    /// The inputs, rows × dim.
    pub(super) inputs: Vec<F>,
    dim: usize,
    square_scale: F,
    /// E, rows × padded.
    products: Vec<F>,
    /// h of each row.
    squares: Vec<F>,
    /// Rows × stride, zeros past the features.
    pub(super) features: Vec<F>,
    /// The shift of the exponents of each row, for queries and in [`own_features`](Self::own_features).
    pub(super) shifts: Vec<F>,
    /// The gradients of E, rows × padded, and of h.
    pub(super) grad_products: Vec<F>,
    pub(super) grad_squares: Vec<F>,
    /// The largest exponent of each feature of a chunk.
    largest: Vec<F>,
    /// The projection, dim × padded.
    projection: Vec<F>,
}

impl<F: Float> Chunk<F> {
    pub(super) fn new(level: Level, problem: &FeatureProblem<'_, F>) -> Self {
        let panel = panel_len::<F>(level);
        let (dim, columns) = problem.projection.dim();
        let padded = columns.next_multiple_of(panel);
        let stride = problem.num_features().next_multiple_of(panel);
        let mut projection = Vec::new();
        match problem.projection.t().as_slice() {
            Some(rows) => transposed(rows, dim, padded, &mut projection),
            None => {
                projection.resize(dim * padded, F::zero());
                for ((row, column), &entry) in problem.projection.indexed_iter() {
                    projection[row * padded + column] = entry;
                }
            }
        }
        Self {
            level,
            len: 0,
            num_features: problem.num_features(),
            stride,
            padded,
            columns,
            map: problem.map,
            inputs: Vec::new(),
            dim: problem.dim,
            square_scale: problem.square_scale,
            products: Vec::new(),
            squares: Vec::new(),
            features: Vec::new(),
            shifts: Vec::new(),
            grad_products: Vec::new(),
            grad_squares: Vec::new(),
            largest: vec![F::zero(); stride],
            projection,
        }
    }

    /// Returns the features as the left factor of a product.
    pub(super) fn left(&self) -> Left<'_, F> {
        Left::new(&self.features, self.stride).with_len(self.num_features)
    }

    /// Returns the features, row by row.
    pub(super) fn rows(&self) -> &[F] {
        &self.features[..self.len * self.stride]
    }

    pub(super) fn row(&self, at: usize) -> &[F] {
        &self.features[at * self.stride..][..self.stride]
    }

    /// Overwrites `out` with the product of each row of features and a vector.
    #[inline(never)]
    pub(super) fn products_with(&self, vector: &[F], out: &mut Vec<F>) {
        dispatch!(self.level, _simd => {
            out.clear();
            out.extend((0..self.len).map(|at| unrolled_dot(vector, self.row(at))));
        });
    }

    /// Clears a row, so that it does not contribute to a sum.
    pub(super) fn clear_row(&mut self, at: usize) {
        self.features[at * self.stride..][..self.stride].fill(F::zero());
        self.products[at * self.padded..][..self.padded].fill(F::zero());
        self.inputs[at * self.dim..][..self.dim].fill(F::zero());
    }

    /// Loads rows: computes E and h, and clears the gradients.
    pub(super) fn load<'r>(&mut self, len: usize, row: impl Fn(usize) -> &'r [F])
    where
        F: 'r,
    {
        self.len = len;
        self.reserve(len);
        self.grad_products[..len * self.padded].fill(F::zero());
        self.grad_squares[..len].fill(F::zero());
        for at in 0..len {
            self.inputs[at * self.dim..][..self.dim].copy_from_slice(row(at));
        }
        self.square();
        if let Map::Elu = self.map {
            for at in 0..len {
                self.products[at * self.padded..][..self.dim]
                    .copy_from_slice(&self.inputs[at * self.dim..][..self.dim]);
            }
            return;
        }
        let left = Left::new(&self.inputs, self.dim);
        product(
            self.level,
            len,
            left,
            (&self.projection, self.padded),
            Target::Overwrite,
            &mut self.products,
        );
    }

    /// Makes room for rows. A few rows get little memory, because clearing it would take longer than their features.
    fn reserve(&mut self, len: usize) {
        for (buffer, columns) in [
            (&mut self.inputs, self.dim),
            (&mut self.products, self.padded),
            (&mut self.squares, 1),
            (&mut self.features, self.stride),
            (&mut self.shifts, 1),
            (&mut self.grad_products, self.padded),
            (&mut self.grad_squares, 1),
        ] {
            if buffer.len() < len * columns {
                buffer.resize(len * columns, F::zero());
            }
        }
    }

    /// h of each row.
    #[inline(never)]
    fn square(&mut self) {
        dispatch!(self.level, _simd => {
            let rows = self.inputs.chunks_exact(self.dim.max(1)).take(self.len);
            for (square, row) in self.squares.iter_mut().zip(rows) {
                *square = self.square_scale * unrolled_dot(row, row);
            }
        });
    }

    /// Computes the features of keys, relative to the shifts of the sums, which are raised to the largest
    /// exponents if these are larger.
    #[inline(never)]
    pub(super) fn key_features(&mut self, sums: &mut KeySums<F>) {
        dispatch!(self.level, simd => self.key_features_in_vectors(simd, sums));
    }

    #[inline(always)]
    fn key_features_in_vectors<S: Simd>(&mut self, simd: S, sums: &mut KeySums<F>) {
        let Self { map, columns, stride, padded, num_features, .. } = *self;
        let rows = self.features.chunks_exact_mut(stride).take(self.len);
        let products = self.products.chunks_exact(padded).zip(&self.squares);
        if !map.is_exponential() {
            let shift = match map {
                Map::Circular => largest_of(&self.squares[..self.len]),
                _ => F::zero(),
            };
            (0..num_features).for_each(|feature| sums.raise(feature, shift));
            let shift = sums.shifts[0];
            for (row, (products, &square)) in rows.zip(products) {
                plain_features(simd, map, &products[..columns], row);
                if let Map::Circular = map {
                    let factor = (square - shift).exp2();
                    row[..num_features].iter_mut().for_each(|feature| *feature *= factor);
                }
            }
            return;
        }
        let largest = &mut self.largest;
        largest.fill(F::neg_infinity());
        for (row, (products, &square)) in rows.zip(products) {
            exponents(map, &products[..columns], square, row);
            max_into(simd, row, largest);
        }
        (0..num_features).for_each(|feature| sums.raise(feature, largest[feature]));
        largest[..num_features].copy_from_slice(&sums.shifts);
        // A difference of infinities past the features would be NaN.
        largest[num_features..].fill(F::zero());
        let rows = self.features.chunks_exact_mut(stride).take(self.len);
        for (row, products) in rows.zip(self.products.chunks_exact(padded)) {
            powers(simd, row, largest);
            mantissas(map, &products[..columns], row);
        }
    }

    /// Computes the features of queries, relative to terms that cancel: exponents plus the shifts of the
    /// keys' sums, minus the largest.
    #[inline(never)]
    pub(super) fn query_features(&mut self, shifts: &[F]) {
        dispatch!(self.level, simd => self.query_features_in_vectors(simd, shifts));
    }

    #[inline(always)]
    fn query_features_in_vectors<S: Simd>(&mut self, simd: S, shifts: &[F]) {
        let Self { map, columns, .. } = *self;
        // Other features all have the same shift.
        let shift = shifts[0];
        for at in 0..self.len {
            let row = &mut self.features[at * self.stride..][..self.stride];
            let products = &self.products[at * self.padded..][..columns];
            if !map.is_exponential() {
                plain_features(simd, map, products, row);
                self.shifts[at] = shift;
                continue;
            }
            exponents(map, products, F::zero(), row);
            for (exponent, &shift) in row.iter_mut().zip(shifts) {
                *exponent += shift;
            }
            self.shifts[at] = powers_below_largest(simd, row);
            mantissas(map, products, row);
        }
    }

    /// Computes the features of queries or keys, relative to the largest exponent of each row, without
    /// the terms of queries that cancel.
    #[inline(never)]
    pub(super) fn own_features(&mut self, is_query: bool) {
        dispatch!(self.level, simd => self.own_features_in_vectors(simd, is_query));
    }

    #[inline(always)]
    fn own_features_in_vectors<S: Simd>(&mut self, simd: S, is_query: bool) {
        let Self { map, columns, .. } = *self;
        for at in 0..self.len {
            let row = &mut self.features[at * self.stride..][..self.stride];
            let products = &self.products[at * self.padded..][..columns];
            let square = if is_query { F::zero() } else { self.squares[at] };
            if !map.is_exponential() {
                plain_features(simd, map, products, row);
                let has_shift = map == Map::Circular;
                self.shifts[at] = if has_shift { square } else { F::zero() };
                continue;
            }
            exponents(map, products, square, row);
            self.shifts[at] = powers_below_largest(simd, row);
            mantissas(map, products, row);
        }
    }

    /// Adds the gradients of E, given those of the features, and for keys the gradients of h of each row.
    #[inline(never)]
    pub(super) fn features_vjp(&mut self, grads: &[F]) {
        dispatch!(self.level, _simd => self.features_vjp_in_vectors(grads));
    }

    #[inline(always)]
    fn features_vjp_in_vectors(&mut self, grads: &[F]) {
        let Self { map, columns, stride, padded, .. } = *self;
        let ln_2 = F::from_f64(LN_2);
        for at in 0..self.len {
            let row = &self.features[at * stride..][..stride];
            let grads = &grads[at * stride..][..stride];
            let products = &self.products[at * padded..][..columns];
            let out = &mut self.grad_products[at * padded..][..columns];
            let (first, second) = match map {
                Map::Both | Map::Circular => (&row[..columns], &row[columns..2 * columns]),
                _ => (&row[..columns], &row[..0]),
            };
            let grad_first = &grads[..columns];
            self.grad_squares[at] += match map {
                // 2^{E − h}
                Map::Exponential => {
                    let steps = out.iter_mut().zip(first.iter().zip(grad_first));
                    for (out, (&feature, &grad)) in steps {
                        *out += ln_2 * (feature * grad);
                    }
                    -ln_2 * unrolled_dot(first, grad_first)
                }
                Map::Both => {
                    let grad_second = &grads[columns..2 * columns];
                    for c in 0..columns {
                        let difference = first[c] * grad_first[c] - second[c] * grad_second[c];
                        out[c] += ln_2 * difference;
                    }
                    let sum = unrolled_dot(first, grad_first);
                    -ln_2 * (sum + unrolled_dot(second, grad_second))
                }
                // 2^h cos E, 2^h sin E
                Map::Circular => {
                    let grad_second = &grads[columns..2 * columns];
                    for c in 0..columns {
                        out[c] += first[c] * grad_second[c] - second[c] * grad_first[c];
                    }
                    let sum = unrolled_dot(first, grad_first);
                    ln_2 * (sum + unrolled_dot(second, grad_second))
                }
                Map::Relu(_) => {
                    let steps = out.iter_mut().zip(products.iter().zip(grad_first));
                    for (out, (&product, &grad)) in steps {
                        *out += if product > F::zero() { grad } else { F::zero() };
                    }
                    F::zero()
                }
                // (x + 1) 2^{−shift} or e^x 2^{−shift}
                Map::Elu => {
                    let steps = first.iter().zip(grad_first);
                    for ((out, &x), (&feature, &grad)) in out.iter_mut().zip(products).zip(steps) {
                        *out += feature / mantissa(x) * grad;
                    }
                    F::zero()
                }
            };
        }
    }
}

/// Writes the exponents of a row in units of ln 2, −∞ past the features.
#[inline(always)]
fn exponents<F: Float>(map: Map<F>, products: &[F], square: F, row: &mut [F]) {
    let columns = products.len();
    let (first, rest) = row.split_at_mut(columns);
    let first = first.iter_mut().zip(products);
    if let Map::Elu = map {
        let log2_e = F::from_f64(LOG2_E);
        // NaN stays.
        first.for_each(|(e, &x)| *e = if x > F::zero() { F::zero() } else { x * log2_e });
        rest.fill(F::neg_infinity());
        return;
    }
    first.for_each(|(exponent, &product)| *exponent = product - square);
    let num_second = if let Map::Both = map { columns } else { 0 };
    let (second, rest) = rest.split_at_mut(num_second);
    second.iter_mut().zip(products).for_each(|(exponent, &product)| *exponent = -product - square);
    rest.fill(F::neg_infinity());
}

/// Returns the factor that turns a power of two into the feature of [`Map::Elu`].
#[inline(always)]
fn mantissa<F: Float>(x: F) -> F {
    if x > F::zero() { x + F::one() } else { F::one() }
}

#[inline(always)]
fn mantissas<F: Float>(map: Map<F>, products: &[F], row: &mut [F]) {
    if let Map::Elu = map {
        row.iter_mut().zip(products).for_each(|(feature, &x)| *feature *= mantissa(x));
    }
}

/// Writes features that need no exponents, with zeros past them.
#[inline(always)]
fn plain_features<S: Simd, F: Float>(simd: S, map: Map<F>, products: &[F], row: &mut [F]) {
    let columns = products.len();
    row[map.num_features(columns)..].fill(F::zero());
    if let Map::Relu(epsilon) = map {
        for (feature, &product) in row.iter_mut().zip(products) {
            // NaN stays NaN.
            *feature = if product < F::zero() { epsilon } else { product + epsilon };
        }
        return;
    }
    let len = Vector::<S, F>::LEN;
    for start in (0..columns).step_by(len) {
        let count = len.min(columns - start);
        let mut x = Vector::<S, F>::splat(simd, F::zero());
        x.as_mut_slice()[..count].copy_from_slice(&products[start..start + count]);
        let [sin, cos] = sin_cos::<S, F>(simd, x);
        row[start..start + count].copy_from_slice(&cos.as_slice()[..count]);
        row[columns + start..][..count].copy_from_slice(&sin.as_slice()[..count]);
    }
}

#[inline(always)]
fn max_into<S: Simd, F: Float>(simd: S, row: &[F], largest: &mut [F]) {
    let len = Vector::<S, F>::LEN;
    for (row, largest) in row.chunks_exact(len).zip(largest.chunks_exact_mut(len)) {
        let row = Vector::<S, F>::from_slice(simd, row);
        let old = Vector::<S, F>::from_slice(simd, largest);
        row.simd_gt(old).select(row, old).store_slice(largest);
    }
}

/// Replaces exponents by 2^{exponent − shift}.
#[inline(always)]
fn powers<S: Simd, F: Float>(simd: S, row: &mut [F], shifts: &[F]) {
    let len = Vector::<S, F>::LEN;
    for (row, shifts) in row.chunks_exact_mut(len).zip(shifts.chunks_exact(len)) {
        let exponent = Vector::<S, F>::from_slice(simd, row);
        exp2::<S, F>(simd, exponent - Vector::<S, F>::from_slice(simd, shifts)).store_slice(row);
    }
}

/// Replaces exponents by 2^{exponent − largest} and returns the largest.
#[inline(always)]
fn powers_below_largest<S: Simd, F: Float>(simd: S, row: &mut [F]) -> F {
    let mut largest = Vector::<S, F>::splat(simd, F::neg_infinity());
    for row in row.chunks_exact(Vector::<S, F>::LEN) {
        let row = Vector::<S, F>::from_slice(simd, row);
        largest = row.simd_gt(largest).select(row, largest);
    }
    let largest = largest.reduce_max();
    shifted_powers(simd, row, largest);
    largest
}

/// Replaces exponents by 2^{exponent − shift}, in whole vectors.
#[inline(always)]
pub(super) fn shifted_powers<S: Simd, F: Float>(simd: S, row: &mut [F], shift: F) {
    let shift = Vector::<S, F>::splat(simd, shift);
    for row in row.chunks_exact_mut(Vector::<S, F>::LEN) {
        exp2::<S, F>(simd, Vector::<S, F>::from_slice(simd, row) - shift).store_slice(row);
    }
}

/// Returns the largest of some numbers, ignoring NaN.
fn largest_of<F: Float>(numbers: &[F]) -> F {
    numbers.iter().copied().fold(F::neg_infinity(), |a, b| if b > a { b } else { a })
}
