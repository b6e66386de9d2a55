//! [`Score::Additive`](super::Score::Additive): the logit is a·tanh(q + k + W x). Everything but the activation
//! is that of [`Score::GatV2`](super::Score::GatV2).

pub(super) use super::gat_v2::FORM;

use super::super::{EdgeGat, ParamGradients, Projected};
use super::gat_v2;
use crate::error::Result;
use crate::kernels::Float;
use crate::inputs::Inputs;
use crate::kernels::edge_gat::BoxedScore;
use ndarray::Array1;

pub(super) struct Rules;

impl<F: Float> super::Rules<F> for Rules {
    fn project(&self, gat: &EdgeGat<F>, inputs: &Inputs<'_, F>) -> Result<Projected<F>> {
        gat_v2::Rules.project(gat, inputs)
    }

    fn score(&self, gat: &EdgeGat<F>) -> BoxedScore<F> {
        F::additive_score(gat_v2::attention(gat))
    }

    fn score_vjp(&self, params: &mut ParamGradients<'_, '_, F>, grad_attention: &Array1<F>) {
        gat_v2::Rules.score_vjp(params, grad_attention);
    }
}
