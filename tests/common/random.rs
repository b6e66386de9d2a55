//! Random arrays, from a seed or a generator.

use graph_attention::{Float, ndarray::Array2};
use rand::{Rng, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};

pub(crate) fn rng(seed: u64) -> Xoshiro256PlusPlus {
    Xoshiro256PlusPlus::seed_from_u64(seed)
}

/// Draws normally distributed numbers, in `f64` for any precision.
pub(crate) fn normal<F: Float>(rows: usize, columns: usize, rng: &mut impl Rng) -> Array2<F> {
    let mut draw = || -> f64 { StandardNormal.sample(rng) };
    Array2::from_shape_simple_fn((rows, columns), || F::from_f64(draw()))
}

/// Draws [`normal`] numbers from a new generator.
pub(crate) fn matrix(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
    normal(rows, columns, &mut rng(seed))
}
