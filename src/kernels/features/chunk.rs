//! The features of a chunk of rows.

use super::{FeatureProblem, KeySums, Map};
use crate::float::Float;
use crate::kernels::exp2::exp2;
use crate::kernels::matmul::{Matrix, Vector, panel_width, rows_times, store};
use crate::kernels::sincos::sin_cos;
use fearless_simd::{Select, Simd, SimdBase, SimdFloat};
use std::f64::consts::LN_2;

/// Rows that are worked on at a time.
pub(super) const CHUNK: usize = 128;

/// The features of up to [`CHUNK`] rows, and their buffers.
pub(super) struct Chunk<F> {
    /// Columns of E, of features, and of inputs, in whole panels.
    pub(super) padded: usize,
    pub(super) stride: usize,
    pub(super) len: usize,
    /// E, rows × padded.
    pub(super) products: Vec<F>,
    /// h of each row.
    pub(super) squares: Vec<F>,
    /// Rows × stride, zeros past the features.
    pub(super) features: Vec<F>,
    /// The projection, dim × padded.
    projection: Vec<F>,
}

impl<F: Float> Chunk<F> {
    #[inline(always)]
    pub(super) fn new<S: Simd>(_: S, problem: &FeatureProblem<'_, F>) -> Self {
        let panel = panel_width::<S, F>();
        let (dim, columns) = problem.projection.dim();
        let padded = columns.next_multiple_of(panel);
        let stride = problem.num_features().next_multiple_of(panel);
        let mut projection = vec![F::zero(); dim * padded];
        for (row, padded) in
            problem.projection.rows().into_iter().zip(projection.chunks_mut(padded.max(1)))
        {
            row.iter().zip(padded).for_each(|(&entry, padded)| *padded = entry);
        }
        Self {
            padded,
            stride,
            len: 0,
            products: vec![F::zero(); CHUNK * padded],
            squares: vec![F::zero(); CHUNK],
            features: vec![F::zero(); CHUNK * stride],
            projection,
        }
    }

    /// Takes up rows: E and h.
    #[inline(never)]
    pub(super) fn load<'r, S: Simd>(
        &mut self,
        simd: S,
        problem: &FeatureProblem<'_, F>,
        len: usize,
        row: impl Fn(usize) -> &'r [F],
    ) {
        self.len = len;
        simd.vectorize(
            #[inline(always)]
            || {
                let Self { products, padded, projection, .. } = self;
                if let Map::Elu = problem.map {
                    for (at, products) in
                        products.chunks_mut((*padded).max(1)).take(len).enumerate()
                    {
                        products[..problem.dim].copy_from_slice(row(at));
                    }
                    return;
                }
                let right = Matrix { data: &projection[..], stride: *padded };
                rows_times(simd, len, &row, right, *padded, |at, column, sums| {
                    store::<S, F>(sums, &mut products[at * *padded + column..]);
                });
            },
        );
        for (at, square) in self.squares[..len].iter_mut().enumerate() {
            let row = row(at);
            *square = problem.square_scale * crate::kernels::heads::unrolled_dot(row, row);
        }
    }

    /// The features of keys, relative to shifts that are raised to the largest exponents.
    #[inline(never)]
    pub(super) fn key_features<S: Simd>(
        &mut self,
        simd: S,
        map: Map<F>,
        columns: usize,
        sums: &mut KeySums<F>,
        may_raise: bool,
    ) {
        simd.vectorize(
            #[inline(always)]
            || self.key_features_inline(simd, map, columns, sums, may_raise),
        );
    }

    #[inline(always)]
    fn key_features_inline<S: Simd>(
        &mut self,
        simd: S,
        map: Map<F>,
        columns: usize,
        sums: &mut KeySums<F>,
        may_raise: bool,
    ) {
        let features = map.num_features(columns);
        let Self { padded, stride, len, products, squares, features: rows, .. } = self;
        let (padded, stride, len) = (*padded, *stride, *len);
        let products = || products.chunks_exact(padded.max(1)).zip(&squares[..len]);
        if map.is_exponential() {
            let mut largest = vec![F::neg_infinity(); stride];
            for (row, (products, &square)) in rows.chunks_exact_mut(stride).zip(products()) {
                exponents(map, &products[..columns], square, row);
                max_into(simd, row, &mut largest);
            }
            if may_raise {
                (0..features).for_each(|feature| sums.raise(feature, largest[feature]));
            }
            largest[..features].copy_from_slice(&sums.shifts);
            // A difference of infinities past the features would not be a number.
            largest[features..].fill(F::zero());
            rows.chunks_exact_mut(stride).take(len).for_each(|row| powers(simd, row, &largest));
            return;
        }
        if may_raise {
            let shift = match map {
                Map::Circular => largest_of(&squares[..len]),
                _ => F::zero(),
            };
            (0..features).for_each(|feature| sums.raise(feature, shift));
        }
        let shift = sums.shifts.first().copied().unwrap_or(F::zero());
        for (row, (products, &square)) in rows.chunks_exact_mut(stride).zip(products()) {
            plain_features(simd, map, products, columns, row);
            if let Map::Circular = map {
                let factor = (square - shift).exp2();
                row[..features].iter_mut().for_each(|feature| *feature *= factor);
            }
        }
    }

    /// The features of queries, relative to what cancels: exponents with the shifts of the keys.
    #[inline(never)]
    pub(super) fn query_features<S: Simd>(
        &mut self,
        simd: S,
        map: Map<F>,
        columns: usize,
        shifts: &[F],
    ) {
        simd.vectorize(
            #[inline(always)]
            || {
                let Self { padded, stride, len, products, features: rows, .. } = self;
                let rows = rows.chunks_exact_mut((*stride).max(1)).take(*len);
                for (row, products) in rows.zip(products.chunks_exact((*padded).max(1))) {
                    if !map.is_exponential() {
                        plain_features(simd, map, products, columns, row);
                        continue;
                    }
                    exponents(map, &products[..columns], F::zero(), row);
                    for (exponent, &shift) in row.iter_mut().zip(shifts) {
                        *exponent += shift;
                    }
                    let largest = largest(simd, row);
                    shifted_powers(simd, row, largest);
                }
            },
        );
    }

    /// The gradient of E, in place of E, from those of the features; and that of h of each row, in
    /// place of h, for keys.
    #[inline(never)]
    pub(super) fn features_vjp<S: Simd>(
        &mut self,
        simd: S,
        map: Map<F>,
        columns: usize,
        grads: &[F],
    ) {
        simd.vectorize(
            #[inline(always)]
            || {
                let Self { padded, stride, len, products, features, squares, .. } = self;
                let ln_2 = F::of(LN_2);
                let rows = features.chunks_exact((*stride).max(1)).take(*len);
                let products = products.chunks_exact_mut((*padded).max(1));
                let grads = grads.chunks_exact((*stride).max(1));
                for (((row, products), grads), square) in
                    rows.zip(products).zip(grads).zip(squares.iter_mut())
                {
                    let products = &mut products[..columns];
                    let twice =
                        |at: usize| (row[at] * grads[at], row[columns + at] * grads[columns + at]);
                    match map {
                        // 2^{E − h}
                        Map::Exponential => {
                            let mut sum = F::zero();
                            for ((product, &feature), &grad) in
                                products.iter_mut().zip(row).zip(grads)
                            {
                                *product = ln_2 * (feature * grad);
                                sum += *product;
                            }
                            *square = -sum;
                        }
                        Map::Both => {
                            let mut sum = F::zero();
                            for (at, product) in products.iter_mut().enumerate() {
                                let (plus, minus) = twice(at);
                                *product = ln_2 * (plus - minus);
                                sum += plus + minus;
                            }
                            *square = -ln_2 * sum;
                        }
                        Map::Circular => {
                            let mut sum = F::zero();
                            for (at, product) in products.iter_mut().enumerate() {
                                let (cos, sin) = (row[at], row[columns + at]);
                                let (grad_cos, grad_sin) = (grads[at], grads[columns + at]);
                                *product = cos * grad_sin - sin * grad_cos;
                                sum += cos * grad_cos + sin * grad_sin;
                            }
                            *square = ln_2 * sum;
                        }
                        Map::Relu(_) => {
                            for (product, &grad) in products.iter_mut().zip(grads) {
                                *product = if *product > F::zero() { grad } else { F::zero() };
                            }
                            *square = F::zero();
                        }
                        Map::Elu => {
                            for ((product, &feature), &grad) in
                                products.iter_mut().zip(row).zip(grads)
                            {
                                let slope = if *product > F::zero() { F::one() } else { feature };
                                *product = slope * grad;
                            }
                            *square = F::zero();
                        }
                    }
                }
            },
        );
    }
}

/// Exponents of a row in units of ln 2, −∞ past the features.
#[inline(always)]
fn exponents<F: Float>(map: Map<F>, products: &[F], square: F, row: &mut [F]) {
    let columns = products.len();
    let (first, rest) = row.split_at_mut(columns);
    first.iter_mut().zip(products).for_each(|(exponent, &product)| *exponent = product - square);
    let rest = if let Map::Both = map {
        let (second, rest) = rest.split_at_mut(columns);
        second
            .iter_mut()
            .zip(products)
            .for_each(|(exponent, &product)| *exponent = -product - square);
        rest
    } else {
        rest
    };
    rest.fill(F::neg_infinity());
}

/// Features that need no exponents, zeros past them.
#[inline(always)]
fn plain_features<S: Simd, F: Float>(
    simd: S,
    map: Map<F>,
    products: &[F],
    columns: usize,
    row: &mut [F],
) {
    let products = &products[..columns];
    let features = map.num_features(columns);
    row[features..].fill(F::zero());
    match map {
        Map::Relu(epsilon) => {
            for (feature, &product) in row.iter_mut().zip(products) {
                // A NaN stays one.
                *feature = if product < F::zero() { epsilon } else { product + epsilon };
            }
        }
        Map::Elu => {
            for (feature, &x) in row.iter_mut().zip(products) {
                *feature = if x > F::zero() { x + F::one() } else { x.exp() };
            }
        }
        _ => {
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
    }
}

#[inline(always)]
fn max_into<S: Simd, F: Float>(simd: S, row: &[F], largest: &mut [F]) {
    let len = Vector::<S, F>::LEN;
    for (row, largest) in row.chunks_exact(len).zip(largest.chunks_exact_mut(len)) {
        let (a, b) =
            (Vector::<S, F>::from_slice(simd, row), Vector::<S, F>::from_slice(simd, largest));
        a.simd_gt(b).select(a, b).store_slice(largest);
    }
}

#[inline(always)]
fn largest<S: Simd, F: Float>(simd: S, row: &[F]) -> F {
    let mut largest = Vector::<S, F>::splat(simd, F::neg_infinity());
    for row in row.chunks_exact(Vector::<S, F>::LEN) {
        let row = Vector::<S, F>::from_slice(simd, row);
        largest = row.simd_gt(largest).select(row, largest);
    }
    largest.reduce_max()
}

/// 2^{exponent − shift} in place of exponents.
#[inline(always)]
fn powers<S: Simd, F: Float>(simd: S, row: &mut [F], shifts: &[F]) {
    let len = Vector::<S, F>::LEN;
    for (row, shifts) in row.chunks_exact_mut(len).zip(shifts.chunks_exact(len)) {
        let exponent = Vector::<S, F>::from_slice(simd, row);
        exp2::<S, F>(simd, exponent - Vector::<S, F>::from_slice(simd, shifts)).store_slice(row);
    }
}

#[inline(always)]
fn shifted_powers<S: Simd, F: Float>(simd: S, row: &mut [F], shift: F) {
    let shift = Vector::<S, F>::splat(simd, shift);
    for row in row.chunks_exact_mut(Vector::<S, F>::LEN) {
        exp2::<S, F>(simd, Vector::<S, F>::from_slice(simd, row) - shift).store_slice(row);
    }
}

/// The largest of some finite numbers.
fn largest_of<F: Float>(numbers: &[F]) -> F {
    numbers.iter().copied().fold(F::neg_infinity(), |a, b| if b > a { b } else { a })
}
