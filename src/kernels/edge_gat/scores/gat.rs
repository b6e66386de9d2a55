//! LeakyReLU(q + k + a·x), where queries and keys have one number for each head.

use super::super::activation::{Activation, LeakyRelu, activate};
use super::super::features::{Coefficients, FeatureSums, FeatureTile};
use super::super::{BoxedScore, EdgeProblem, EdgeScore, ScoreSums, ScoreTiles};
use crate::kernels::Float;
use crate::kernels::gathered::Gather;
use crate::kernels::primitives::matmul::Vector;
use crate::kernels::rows::Tile;
use fearless_simd::{Level, Simd, SimdBase};
use ndarray::Array2;

/// Returns the logits, given the slope and a, heads × features.
pub(in super::super::super) fn gat<F: Float>(slope: F, attention: Array2<F>) -> BoxedScore<F> {
    BoxedScore(Box::new(Scalars { activation: LeakyRelu(slope), attention }))
}

/// An activation of q + k + a·x.
#[derive(Debug)]
struct Scalars<F, A> {
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

impl<F: Float, A: Activation<F>> EdgeScore<F> for Scalars<F, A> {
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

    fn key_vjp(&mut self, tile: &Tile<F>, _: usize, grads: &[F], _: Gather<'_, F>, sum: &mut [F]) {
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
