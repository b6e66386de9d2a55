//! scale · q·(k + W x).

use super::super::backward::add_outer;
use super::super::features::{Coefficients, FeatureSums, FeatureTile};
use super::super::{BoxedScore, EdgeColumns, EdgeProblem, EdgeScore, ScoreSums, ScoreTiles};
use crate::kernels::Float;
use crate::kernels::gathered::{Gather, Weights};
use crate::kernels::rows::Tile;
use fearless_simd::Level;

/// Returns the logits.
pub(in super::super::super) fn dot_product<F: Float>() -> BoxedScore<F> {
    BoxedScore(Box::new(DotProduct))
}

#[derive(Debug)]
struct DotProduct;

struct Tiles<'p, F: Float> {
    problem: &'p EdgeProblem<'p, F>,
    columns: EdgeColumns<'p, F>,
    /// The query times the scale, and W of each head times that.
    own: Vec<F>,
    coefficients: Coefficients<F>,
    query: usize,
    /// Σ ds x over the row, and W times that.
    sums: FeatureSums<F>,
    projected: Coefficients<F>,
}

impl<F: Float> EdgeScore<F> for DotProduct {
    fn num_attention(&self) -> usize {
        0
    }

    fn reads_queries_by_key(&self) -> bool {
        true
    }

    fn tiles<'p>(
        &'p self,
        level: Level,
        problem: &'p EdgeProblem<'p, F>,
        _: &Tile<F>,
    ) -> Box<dyn ScoreTiles<F> + 'p> {
        let softmax = &problem.softmax;
        let (heads, dim) = (softmax.heads, problem.feature_dim());
        Box::new(Tiles {
            problem,
            columns: EdgeColumns::new(level, problem),
            own: vec![F::zero(); heads * softmax.key_dim],
            coefficients: Coefficients::zeros(level, heads, dim),
            query: 0,
            sums: FeatureSums::zeros(level, heads, dim),
            projected: Coefficients::zeros(level, heads, dim),
        })
    }
}

impl<F: Float> ScoreTiles<F> for Tiles<'_, F> {
    fn begin(&mut self, query: usize) {
        let softmax = &self.problem.softmax;
        self.query = query;
        let row = self.own.iter_mut().zip(softmax.query.row(query));
        row.for_each(|(own, &value)| *own = softmax.scale * value);
        self.columns.project(&self.own, &mut self.coefficients);
        self.sums.clear();
    }

    fn score(&mut self, tile: &mut Tile<F>, features: &FeatureTile<F>) {
        let softmax = &self.problem.softmax;
        let count = tile.pairs.len();
        let Tile { stride, others, weights, .. } = tile;
        let rows = Gather { rows: softmax.key.slices(), at: others };
        self.columns.columns.dots(&self.own, rows, weights, *stride);
        features.add_scores(softmax.heads, count, &self.coefficients, weights);
    }

    fn query_vjp(
        &mut self,
        tile: &Tile<F>,
        features: &FeatureTile<F>,
        grads: &mut [F],
        sums: &mut ScoreSums<'_, F>,
    ) {
        let EdgeProblem { softmax, ones, .. } = self.problem;
        let count = tile.pairs.len();
        let of_pairs = Weights { factors: Some(ones), weights: grads, stride: tile.stride };
        let keys = tile.gather(softmax.key.slices());
        self.columns.columns.add_weighted(sums.query, of_pairs, keys);
        features.add_sums(ones, grads, count, &mut self.sums);
        sums.features.add_outer(softmax.heads, count, grads, &self.coefficients);
    }

    fn finish_query(&mut self, sums: &mut ScoreSums<'_, F>) {
        let softmax = &self.problem.softmax;
        self.sums.store(&mut self.projected);
        self.columns.add_projected(&self.projected, sums.query);
        sums.query.iter_mut().for_each(|sum| *sum *= softmax.scale);
        let query = softmax.query.row(self.query);
        add_outer(softmax.scale, query, softmax.value_dim, &self.projected, sums.edge_weight);
    }

    fn key_vjp(&mut self, tile: &Tile<F>, _: usize, grads: &[F], _: Gather<'_, F>, sum: &mut [F]) {
        let EdgeProblem { softmax, ones, .. } = self.problem;
        let of_pairs = Weights { factors: Some(ones), weights: grads, stride: tile.stride };
        let queries = tile.gather(softmax.query.slices());
        self.columns.columns.add_weighted(sum, of_pairs, queries);
    }

    fn finish_key(&mut self, sum: &mut [F]) {
        let scale = self.problem.softmax.scale;
        sum.iter_mut().for_each(|sum| *sum *= scale);
    }
}
