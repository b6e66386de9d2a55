//! [`Score::Gat`](super::Score::Gat): the projections are one number for each head, q = a_dst · W_dst h_i
//! and k = a_src · W_src h_j, and the logit is LeakyReLU(q + k + a·x) with a = a_edge W_e.

use super::super::{EdgeGat, ParamGradients, Projected, fold};
use super::{Form, Linear, Names};
use crate::error::Result;
use crate::kernels::Float;
use crate::inputs::Inputs;
use crate::kernels::edge_gat::activation::{Activation, LeakyRelu, activate};
use crate::kernels::edge_gat::features::{Coefficients, FeatureSums, FeatureTile};
use crate::kernels::edge_gat::{EdgeProblem, EdgeScore, ScoreSums, ScoreTiles};
use crate::kernels::linear::linear;
use crate::kernels::primitives::matmul::Vector;
use crate::kernels::rows::Tile;
use fearless_simd::{Level, Simd, SimdBase};
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
            query: linear(inputs.query(), folded("att_dst", query).view(), None)?,
            key: linear(inputs.key(), folded("att_src", key).view(), None)?,
            value: Some(gat.linear(inputs.value(), value)?),
        })
    }

    fn score(&self, gat: &EdgeGat<F>) -> Box<dyn EdgeScore<F>> {
        let attention = match gat.config.edge_dim {
            0 => Array2::zeros((gat.config.num_heads, 0)),
            _ => fold(gat.attention("att_edge"), gat.weight("lin_edge.weight")),
        };
        Box::new(Additive { activation: LeakyRelu(gat.negative_slope()), attention })
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

/// An activation of q + k + a·x.
#[derive(Debug)]
struct Additive<F, A> {
    activation: A,
    /// a: heads × features.
    attention: Array2<F>,
}

struct Tiles<'p, F: Float, A> {
    problem: &'p EdgeProblem<'p, F>,
    activation: A,
    level: Level,
    /// a.
    coefficients: Coefficients<F>,
    query: usize,
    /// The logits of a tile.
    logits: Vec<F>,
    /// Σ ds x over all pairs.
    sums: FeatureSums<F>,
}

impl<F: Float, A: Activation<F>> EdgeScore<F> for Additive<F, A> {
    fn num_attention(&self) -> usize {
        self.attention.len()
    }

    fn tiles<'p>(
        &'p self,
        level: Level,
        problem: &'p EdgeProblem<'p, F>,
        tile: &Tile<F>,
    ) -> Box<dyn ScoreTiles<F> + 'p> {
        let (heads, dim) = self.attention.dim();
        let rows = self.attention.as_slice().expect("a matrix of our own");
        Box::new(Tiles {
            problem,
            activation: self.activation,
            level,
            coefficients: Coefficients::from_rows(level, rows, heads, dim),
            query: 0,
            logits: vec![F::zero(); tile.weights.len()],
            sums: FeatureSums::zeros(level, heads, dim),
        })
    }
}

impl<F: Float, A: Activation<F>> ScoreTiles<F> for Tiles<'_, F, A> {
    fn begin(&mut self, query: usize) {
        self.query = query;
    }

    fn score(&mut self, tile: &mut Tile<F>, features: &FeatureTile<F>) {
        let softmax = &self.problem.softmax;
        let own = softmax.query.row(self.query);
        for (t, pair) in tile.pairs.iter().enumerate() {
            let key = softmax.key.row(pair.key);
            for (head, (&own, &key)) in own.iter().zip(key).enumerate() {
                tile.weights[head * tile.stride + t] = own + key;
            }
        }
        let (heads, count) = (softmax.heads, tile.pairs.len());
        features.add_scores(heads, count, &self.coefficients, &mut tile.weights);
        dispatch!(self.level, simd => {
            for head in 0..heads {
                let [_, vectors] = tile.of_head(head);
                let logits = &mut tile.weights[vectors.clone()];
                activate(simd, self.activation, logits);
                self.logits[vectors].copy_from_slice(logits);
            }
        });
    }

    fn query_vjp(
        &mut self,
        tile: &Tile<F>,
        features: &FeatureTile<F>,
        grads: &mut [F],
        sums: &mut ScoreSums<'_, F>,
    ) {
        let (heads, count) = (self.problem.softmax.heads, tile.pairs.len());
        dispatch!(self.level, simd => {
            for head in 0..heads {
                let [_, vectors] = tile.of_head(head);
                let logits = &self.logits[vectors.clone()];
                multiply_by_derivatives(simd, self.activation, logits, &mut grads[vectors]);
            }
        });
        for (sum, grads) in sums.query.iter_mut().zip(grads.chunks_exact(tile.stride)) {
            *sum += grads[..count].iter().copied().sum::<F>();
        }
        features.add_sums(&self.problem.ones, grads, count, &mut self.sums);
        sums.features.add_outer(heads, count, grads, &self.coefficients);
    }

    fn finish_part(&mut self, grad_attention: &mut [F]) {
        let (heads, dim) = (self.problem.softmax.heads, self.problem.feature_dim());
        let mut sums = Coefficients::zeros(self.level, heads, dim);
        self.sums.store(&mut sums);
        for (head, grad) in grad_attention.chunks_exact_mut(dim.max(1)).enumerate() {
            grad.copy_from_slice(&sums.of_head(head)[..dim]);
        }
    }

    fn key_vjp(&mut self, tile: &Tile<F>, _: usize, grads: &[F], sum: &mut [F]) {
        let count = tile.pairs.len();
        for (sum, grads) in sum.iter_mut().zip(grads.chunks_exact(tile.stride)) {
            *sum += grads[..count].iter().copied().sum::<F>();
        }
    }
}

/// Multiplies gradients by the derivatives of an activation with these results, in whole vectors.
#[inline(always)]
fn multiply_by_derivatives<S: Simd, F: Float>(
    simd: S,
    activation: impl Activation<F>,
    results: &[F],
    grads: &mut [F],
) {
    let len = Vector::<S, F>::LEN;
    for (result, grads) in results.chunks_exact(len).zip(grads.chunks_exact_mut(len)) {
        let derivative = activation.derivative(simd, Vector::<S, F>::from_slice(simd, result));
        (Vector::<S, F>::from_slice(simd, grads) * derivative).store_slice(grads);
    }
}
