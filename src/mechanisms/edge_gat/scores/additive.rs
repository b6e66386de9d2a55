//! [`Score::Additive`](super::Score::Additive): the logit is a·tanh(q + k + W x). Everything but the activation
//! is that of [`Score::GatV2`](super::Score::GatV2).

pub(super) use super::gat_v2::FORM;

use super::super::{EdgeGat, ParamGradients, Projected};
use super::gat_v2;
use crate::error::Result;
use crate::kernels::Float;
use crate::inputs::Inputs;
use crate::kernels::edge_gat::EdgeScore;
use crate::kernels::edge_gat::activation::Activation;
use crate::kernels::primitives::matmul::Vector;
use crate::kernels::primitives::tanh::tanh;
use fearless_simd::{Simd, SimdBase, SimdFloat};
use ndarray::Array1;

pub(super) struct Rules;

impl<F: Float> super::Rules<F> for Rules {
    fn project(&self, gat: &EdgeGat<F>, inputs: &Inputs<'_, F>) -> Result<Projected<F>> {
        gat_v2::Rules.project(gat, inputs)
    }

    fn score(&self, gat: &EdgeGat<F>) -> Box<dyn EdgeScore<F>> {
        gat_v2::score(gat, Tanh)
    }

    fn score_vjp(&self, params: &mut ParamGradients<'_, '_, F>, grad_attention: &Array1<F>) {
        gat_v2::Rules.score_vjp(params, grad_attention);
    }
}

#[derive(Clone, Copy, Debug)]
struct Tanh;

impl<F: Float> Activation<F> for Tanh {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: Vector<S, F>) -> Vector<S, F> {
        let [magnitude, _] = tanh::<S, F>(simd, x, F::from_f64(-2.0));
        magnitude.copysign(x)
    }

    #[inline(always)]
    fn derivative<S: Simd>(self, simd: S, result: Vector<S, F>) -> Vector<S, F> {
        Vector::<S, F>::splat(simd, F::one()) - result * result
    }
}
