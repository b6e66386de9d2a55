//! The mechanisms, one per module.

pub mod dual_space;
pub mod edge_gat;
pub(crate) mod flash;
pub mod graph_rope;
pub mod local_global;
pub mod moe;
pub mod multi_head;
mod packed;
pub mod performer;
pub mod poincare;
pub(crate) mod scaled_dot_product;
pub mod stack;
pub mod transformer;

use crate::error::{Channel, Result};
use crate::inputs::{Inputs, SelectedInputs};
use crate::kernels::Float;
use ndarray::{ArrayViewMut, Dimension};
use rand::Rng;
use rand_distr::{Distribution, Uniform};

/// Selects the keys that some query may see, for exact softmax attention that reads keys as they are. These of a
/// graph are only selected if there is a bias: then all values are searched for infinities and NaN.
fn seen_keys<'a, F: Float>(
    inputs: &Inputs<'a, F>,
    reads: &[Channel],
) -> Result<Option<SelectedInputs<'a, F>>> {
    match inputs.bias() {
        Some(_) => inputs.select_seen_keys(reads),
        None => inputs.select_visible_keys(reads),
    }
}

/// Draws initial parameters uniformly in ±`bound`.
pub(crate) fn fill_uniform<F: Float, D: Dimension>(
    mut param: ArrayViewMut<'_, F, D>,
    bound: f64,
    rng: &mut impl Rng,
) {
    if let Ok(uniform) = Uniform::new_inclusive(-bound, bound) {
        param.mapv_inplace(|_| F::from_f64(uniform.sample(rng)));
    }
}
