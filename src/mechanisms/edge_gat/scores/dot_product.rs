//! [`Score::DotProduct`](super::Score::DotProduct): the logit is scale · q·(k + W x).

use super::super::{EdgeGat, Projected};
use super::{Form, Linear, Names};
use crate::error::Result;
use crate::kernels::Float;
use crate::inputs::Inputs;
use crate::kernels::edge_gat::BoxedScore;

pub(super) const FORM: Form = Form {
    separate: Names {
        key: Linear::with_bias("lin_key.weight", "lin_key.bias"),
        query: Linear::with_bias("lin_query.weight", "lin_query.bias"),
        value: Linear::with_bias("lin_value.weight", "lin_value.bias"),
        residual: Linear::with_bias("lin_skip.weight", "lin_skip.bias"),
    },
    shared: None,
    shares_weights: false,
    attention: &[],
    output_bias: false,
    residual: true,
    edge_values: true,
    spare_residual: true,
    is_dot_product: true,
    aliases: &[],
};

pub(super) struct Rules;

impl<F: Float> super::Rules<F> for Rules {
    fn project(&self, gat: &EdgeGat<F>, inputs: &Inputs<'_, F>) -> Result<Projected<F>> {
        let Names { key, query, value, .. } = gat.names;
        Ok(Projected {
            query: gat.linear(inputs.query(), query)?,
            key: gat.linear(inputs.key(), key)?,
            value: Some(gat.linear(inputs.value(), value)?),
        })
    }

    fn score(&self, _: &EdgeGat<F>) -> BoxedScore<F> {
        F::dot_product_score()
    }
}
