//! The mechanisms, one a file.

pub(crate) mod dual_space;
pub(crate) mod edge_gat;
pub(crate) mod flash;
pub(crate) mod graph_rope;
pub(crate) mod local_global;
pub(crate) mod moe;
pub(crate) mod multi_head;
pub(crate) mod performer;
pub(crate) mod poincare;
pub(crate) mod scaled_dot_product;

use crate::float::Float;
use ndarray::{ArrayViewMut, Dimension};
use rand::Rng;
use rand_distr::{Distribution, Uniform};

/// Fresh parameters: uniform in ±`bound`.
fn fill_uniform<F: Float, D: Dimension>(
    mut param: ArrayViewMut<'_, F, D>,
    bound: f64,
    rng: &mut impl Rng,
) {
    if let Ok(uniform) = Uniform::new_inclusive(-bound, bound) {
        param.mapv_inplace(|_| F::of(uniform.sample(rng)));
    }
}
