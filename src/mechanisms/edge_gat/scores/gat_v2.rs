//! [`Score::GatV2`](super::Score::GatV2): the logit is a·LeakyReLU(q + k + W x).

use super::super::{EdgeGat, ParamGradients, Projected, same_view};
use super::{Form, Linear, Names};
use crate::error::Result;
use crate::kernels::Float;
use crate::inputs::Inputs;
use crate::kernels::edge_gat::BoxedScore;
use ndarray::Array1;

const LEFT: Linear = Linear::with_bias("lin_l.weight", "lin_l.bias");

const fn names(query: Linear) -> Names {
    Names { key: LEFT, query, value: LEFT, residual: Linear::plain("res.weight") }
}

pub(super) const FORM: Form = Form {
    separate: names(Linear::with_bias("lin_r.weight", "lin_r.bias")),
    shared: Some(names(LEFT)),
    shares_weights: false,
    attention: &["att"],
    output_bias: true,
    residual: false,
    edge_values: false,
    spare_residual: false,
    is_dot_product: false,
    aliases: &[
        ("lin_l.weight", "lin_l.weight"),
        ("lin_r.weight", "lin_l.weight"),
        ("lin_l.bias", "lin_l.bias"),
        ("lin_r.bias", "lin_l.bias"),
    ],
};

pub(super) struct Rules;

impl<F: Float> super::Rules<F> for Rules {
    /// The keys are also the values, if both come from one array.
    fn project(&self, gat: &EdgeGat<F>, inputs: &Inputs<'_, F>) -> Result<Projected<F>> {
        let Names { key, query, value, .. } = gat.names;
        let is_one = same_view(inputs.key(), inputs.value());
        let values = || gat.linear(inputs.value(), value);
        Ok(Projected {
            query: gat.linear(inputs.query(), query)?,
            key: gat.linear(inputs.key(), key)?,
            value: (!is_one).then(values).transpose()?,
        })
    }

    fn score(&self, gat: &EdgeGat<F>) -> BoxedScore<F> {
        F::gat_v2_score(gat.negative_slope(), attention(gat))
    }

    fn score_vjp(&self, params: &mut ParamGradients<'_, '_, F>, grad_attention: &Array1<F>) {
        let config = &params.gat.config;
        let shape = (config.num_heads, config.head_dim);
        let grad = grad_attention.view().into_shape_with_order(shape).expect("one for each");
        params.add_attention("att", grad);
    }
}

/// Returns a, one number for each column.
pub(super) fn attention<F: Float>(gat: &EdgeGat<F>) -> Vec<F> {
    gat.attention("att").iter().copied().collect()
}
