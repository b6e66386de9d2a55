//! [`Score::Gat`](super::Score::Gat): the projections are one number for each head, q = a_dst · W_dst h_i
//! and k = a_src · W_src h_j, and the logit is LeakyReLU(q + k + a·x) with a = a_edge W_e.

use super::super::{EdgeGat, ParamGradients, Projected, fold};
use super::{Form, Linear, Names};
use crate::error::Result;
use crate::kernels::Float;
use crate::inputs::Inputs;
use crate::kernels::edge_gat::BoxedScore;
use ndarray::{Array1, Array2, ArrayViewMut2};

const fn names(key: Linear, query: Linear) -> Names {
    Names { key, query, value: key, residual: Linear::plain("res.weight") }
}

pub(super) const FORM: Form = Form {
    separate: names(Linear::plain("lin_src.weight"), Linear::plain("lin_dst.weight")),
    shared: Some(names(Linear::plain("lin.weight"), Linear::plain("lin.weight"))),
    shares_weights: true,
    attention: &["att_src", "att_dst", "att_edge"],
    output_bias: true,
    residual: false,
    edge_values: false,
    spare_residual: false,
    is_dot_product: false,
    aliases: &[
        ("lin.weight", "lin.weight"),
        ("lin_src.weight", "lin.weight"),
        ("lin_dst.weight", "lin.weight"),
    ],
};

pub(super) struct Rules;

impl<F: Float> super::Rules<F> for Rules {
    /// a · (W h) = (Wᵀ a) · h: the scores do not need W h.
    fn project(&self, gat: &EdgeGat<F>, inputs: &Inputs<'_, F>) -> Result<Projected<F>> {
        let Names { key, query, value, .. } = gat.names;
        let folded = |attention, map: Linear| fold(gat.attention(attention), gat.weight(map.weight));
        Ok(Projected {
            query: F::linear(inputs.query(), folded("att_dst", query).view(), None)?,
            key: F::linear(inputs.key(), folded("att_src", key).view(), None)?,
            value: Some(gat.linear(inputs.value(), value)?),
        })
    }

    fn score(&self, gat: &EdgeGat<F>) -> BoxedScore<F> {
        let attention = match gat.config.edge_dim {
            0 => Array2::zeros((gat.config.num_heads, 0)),
            _ => fold(gat.attention("att_edge"), gat.weight("lin_edge.weight")),
        };
        F::gat_score(gat.negative_slope(), attention)
    }

    fn score_vjp(&self, params: &mut ParamGradients<'_, '_, F>, grad_attention: &Array1<F>) {
        let config = &params.gat.config;
        if config.edge_dim > 0 {
            let shape = (config.num_heads, config.edge_dim);
            let grad = grad_attention.view().into_shape_with_order(shape).expect("one for each");
            params.unfold("att_edge", "lin_edge.weight", grad);
        }
    }

    fn project_vjp(
        &self,
        params: &mut ParamGradients<'_, '_, F>,
        inputs: &Inputs<'_, F>,
        [query, key, value]: [Array2<F>; 3],
        [grad_query, grad_key, grad_value]: [Option<ArrayViewMut2<'_, F>>; 3],
    ) -> Result<()> {
        let names = params.gat.names;
        params.folded("att_dst", names.query, inputs.query(), query.view(), grad_query)?;
        params.folded("att_src", names.key, inputs.key(), key.view(), grad_key)?;
        params.linear(names.value, inputs.value(), value.view(), grad_value)
    }
}
