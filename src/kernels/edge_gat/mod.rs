//! Softmax attention with features of pairs: the logits of graph attention networks.
//!
//! Queries, keys and values are already projected. The terms for each pair are computed in tiles and
//! never stored. For the logits, the features of a tile are used; for the values, the features of a whole
//! row are summed with the weights before they are projected.
//!
//! The logits are those of an [`EdgeScore`]. Its methods are called once for each tile, so they are called
//! through a pointer, and both passes are compiled once for all `scores`.

mod activation;
mod backward;
mod features;
pub(super) mod scores;

pub(crate) use backward::EdgeGradients;
pub(super) use backward::backward;

use super::gathered::{Columns, Gather, Weights};
use super::problem::{Problem, Rows, Slices};
use super::rows::{Pairs, Scorer, Tile};
use crate::kernels::Float;
use fearless_simd::Level;
use features::{Coefficients, FeatureSums, FeatureTile};
use ndarray::Array2;
use std::fmt::Debug;

/// How the logit of a pair is computed from its query q, key k and features x.
trait EdgeScore<F: Float>: Debug + Send + Sync {
    /// Returns the number of parameters besides W that all pairs share: [`EdgeGradients::attention`].
    fn num_attention(&self) -> usize;

    /// Returns how many numbers of a pair the pass by query saves for the pass by key.
    fn num_saved(&self, _problem: &EdgeProblem<'_, F>) -> usize {
        0
    }

    /// Whether the pass by key reads the queries.
    fn reads_queries_by_key(&self) -> bool {
        false
    }

    /// Creates the buffers of a pass over the pairs, for tiles like this one.
    fn tiles<'p>(
        &'p self,
        level: Level,
        problem: &'p EdgeProblem<'p, F>,
        tile: &Tile<F>,
    ) -> Box<dyn ScoreTiles<F> + 'p>;
}

/// Any [`EdgeScore`].
#[derive(Debug)]
pub struct BoxedScore<F>(Box<dyn EdgeScore<F>>);

/// An [`EdgeScore`] in a pass over the pairs, tile by tile. The forward pass and the first pass of the
/// backward pass go by query, and the second pass of the backward pass by key.
trait ScoreTiles<F: Float> {
    /// By query: loads the row of a query.
    fn begin(&mut self, query: usize);

    /// By query: overwrites the weights of a tile with the logits of its pairs.
    fn score(&mut self, tile: &mut Tile<F>, features: &FeatureTile<F>);

    /// By query: given the gradients of the logits that [`score`](Self::score) has just computed, adds the
    /// gradients to the sums. May change the gradients to what [`key_vjp`](Self::key_vjp) is to receive.
    fn query_vjp(
        &mut self,
        tile: &Tile<F>,
        features: &FeatureTile<F>,
        grads: &mut [F],
        sums: &mut ScoreSums<'_, F>,
    );

    /// By query: adds the gradients that were summed over all tiles of the row.
    fn finish_query(&mut self, _sums: &mut ScoreSums<'_, F>) {}

    /// By query: adds the gradients that were summed over all rows to that of the parameters.
    fn finish_part(&mut self, _grad_attention: &mut [F]) {}

    /// By query: returns the numbers of each pair of the tile to save, after [`query_vjp`](Self::query_vjp).
    fn saved(&self) -> &[F] {
        &[]
    }

    /// By key: adds the gradient of the key of a tile to `sum`, given the gradients of its logits and rows that end with
    /// the saved numbers.
    fn key_vjp(
        &mut self,
        tile: &Tile<F>,
        key: usize,
        grads: &[F],
        saved: Gather<'_, F>,
        sum: &mut [F],
    );

    /// By key: completes the gradient of a key.
    fn finish_key(&mut self, _sum: &mut [F]) {}
}

/// The gradients that the pass by query adds to.
struct ScoreSums<'s, F> {
    /// Of the query of the row.
    query: &'s mut [F],
    /// Of the parameters.
    attention: &'s mut [F],
    /// Of Wᵀ, features × columns of the values.
    edge_weight: &'s mut [F],
    /// Of the features of the tile, if they are wanted; otherwise it has none.
    features: &'s mut FeatureTile<F>,
    wants_features: bool,
}

/// Inputs of attention with features of the pairs.
#[derive(Debug)]
pub struct EdgeProblem<'p, F: Float> {
    /// Queries, keys and values for the logits and sums.
    pub(crate) softmax: Problem<'p, F>,
    pub(crate) score: BoxedScore<F>,
    /// pairs × features, in the caller's order; no columns without features.
    pub(crate) features: Rows<'p, F>,
    /// Wᵀ: features × columns of the values.
    pub(crate) edge_weight: Array2<F>,
    /// Whether a value is v + W x.
    pub(crate) in_values: bool,
    /// A 1 for each head: the factor of a sum that is only added to.
    pub(crate) ones: Vec<F>,
}

impl<F: Float> EdgeProblem<'_, F> {
    pub(crate) fn feature_dim(&self) -> usize {
        self.edge_weight.nrows()
    }

    /// Returns row c of Wᵀ.
    #[inline(always)]
    pub(crate) fn edge_weight(&self) -> Slices<'_, F> {
        let data = self.edge_weight.as_slice().expect("a matrix of our own");
        Slices { data, columns: self.edge_weight.ncols() }
    }

    /// Returns the features of the values, if they have any.
    fn value_feature_dim(&self) -> usize {
        if self.in_values { self.feature_dim() } else { 0 }
    }
}

/// The columns of the heads of values, which are also those of W and of keys with as many columns.
struct EdgeColumns<'p, F: Float> {
    problem: &'p EdgeProblem<'p, F>,
    columns: Columns<F>,
    /// 0, 1, 2, …: all rows of a matrix in order.
    rows: Vec<usize>,
}

impl<'p, F: Float> EdgeColumns<'p, F> {
    fn new(level: Level, problem: &'p EdgeProblem<'p, F>) -> Self {
        let dim = problem.softmax.value_dim;
        let columns = Columns::new(level, problem.softmax.heads, dim, |head| [head * dim; 2]);
        Self { problem, columns, rows: (0..problem.feature_dim()).collect() }
    }

    /// Computes, for each head, Wᵀ row in the columns of that head.
    fn project(&mut self, row: &[F], projected: &mut Coefficients<F>) {
        let weight = Gather { rows: self.problem.edge_weight(), at: &self.rows };
        self.columns.dots(row, weight, &mut projected.data, projected.stride);
    }

    /// out += W x for each head in its columns.
    fn add_projected(&self, x: &Coefficients<F>, out: &mut [F]) {
        let weight = Gather { rows: self.problem.edge_weight(), at: &self.rows };
        let x = Weights { factors: Some(&self.problem.ones), weights: &x.data, stride: x.stride };
        self.columns.add_weighted(out, x, weight);
    }
}

/// The logits, and the part of the output that comes from the features.
pub(super) struct EdgeScorer<'p, F: Float> {
    problem: &'p EdgeProblem<'p, F>,
    score: Box<dyn ScoreTiles<F> + 'p>,
    columns: EdgeColumns<'p, F>,
    features: FeatureTile<F>,
    pairs: Pairs<'p>,
    value_sums: FeatureSums<F>,
    value_coefficients: Coefficients<F>,
}

impl<'p, F: Float> Scorer<'p, F> for EdgeScorer<'p, F> {
    type Problem = EdgeProblem<'p, F>;

    fn softmax(problem: &'p Self::Problem) -> &'p Problem<'p, F> {
        &problem.softmax
    }

    fn new(level: Level, problem: &'p Self::Problem, tile: &Tile<F>) -> Self {
        let (heads, value_dim) = (problem.softmax.heads, problem.value_feature_dim());
        Self {
            problem,
            score: problem.score.0.tiles(level, problem, tile),
            columns: EdgeColumns::new(level, problem),
            features: FeatureTile::new(level, problem.feature_dim(), tile.stride),
            pairs: Pairs::by_query(&problem.softmax.inputs),
            value_sums: FeatureSums::zeros(level, heads, value_dim),
            value_coefficients: Coefficients::zeros(level, heads, value_dim),
        }
    }

    fn begin(&mut self, query: usize) {
        self.value_sums.clear();
        self.score.begin(query);
    }

    fn score(&mut self, tile: &mut Tile<F>) {
        let features = self.problem.features.slices();
        tile.prefetch_pairs(self.pairs, features, |pair| pair);
        self.features.load(features, &tile.pairs);
        self.score.score(tile, &self.features);
    }

    fn add_values(&mut self, tile: &Tile<F>, alphas: &[F]) {
        if self.problem.in_values {
            let count = tile.pairs.len();
            self.features.add_sums(alphas, &tile.weights, count, &mut self.value_sums);
        }
    }

    fn finish(&mut self, out: &mut [F]) {
        if self.problem.in_values {
            self.value_sums.store(&mut self.value_coefficients);
            self.columns.add_projected(&self.value_coefficients, out);
        }
    }
}
