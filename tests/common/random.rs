//! Random arrays, of a seed or of a generator.

use graph_attention::{Float, ndarray::Array2};
use rand::{Rng, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};

pub(crate) fn rng(seed: u64) -> Xoshiro256PlusPlus {
    Xoshiro256PlusPlus::seed_from_u64(seed)
}

/// Numbers with a normal distribution, drawn in `f64` whatever the precision.
pub(crate) fn normal<F: Float>(rows: usize, columns: usize, rng: &mut impl Rng) -> Array2<F> {
    let mut draw = || -> f64 { StandardNormal.sample(rng) };
    Array2::from_shape_simple_fn((rows, columns), || F::from_f64(draw()))
}

/// [`normal`] numbers of a generator of their own.
pub(crate) fn matrix(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
    normal(rows, columns, &mut rng(seed))
}
