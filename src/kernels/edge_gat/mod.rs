//! Softmax attention with features of pairs: the logits of graph attention networks.
//!
//! Queries, keys and values are already projected. The terms for each pair are computed in tiles and
//! never stored. For the logits, the features of a tile are used; for the values, the features of a whole
//! row are summed with the weights before they are projected.

mod backward;
mod features;

pub(crate) use backward::EdgeGradients;
pub(super) use backward::backward;

use super::gathered::{Columns, Gather, Weights};
use super::primitives::matmul::Vector;
use super::problem::{Problem, Rows, Slices};
use super::rows::{DotScorer, Pairs, Scorer, Tile};
use crate::float::Float;
use fearless_simd::{Level, Select, Simd, SimdBase, SimdFloat};
use features::{Coefficients, FeatureSums, FeatureTile};
use ndarray::Array2;

/// How the logit of a pair is computed from its query q, key k and features x.
#[derive(Debug)]
pub(crate) enum Logit<F> {
    /// scale · q·(k + W x).
    DotProduct,
    /// LeakyReLU(q + k + a·x): one column for each head.
    Additive {
        /// The slope on the negative side.
        slope: F,
        /// heads × features.
        edge_attention: Array2<F>,
    },
    /// a·LeakyReLU(q + k + W x).
    Concatenated {
        /// The slope on the negative side.
        slope: F,
        /// One number for each column.
        attention: Vec<F>,
    },
}

/// Inputs of attention with features of the pairs.
#[derive(Debug)]
pub struct EdgeProblem<'p, F: Float> {
    /// Queries, keys and values for the logits and sums.
    pub(crate) softmax: Problem<'p, F>,
    pub(crate) logit: Logit<F>,
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
    fn feature_dim(&self) -> usize {
        self.edge_weight.nrows()
    }

    /// Returns row c of Wᵀ.
    #[inline(always)]
    fn edge_weight(&self) -> Slices<'_, F> {
        let data = self.edge_weight.as_slice().expect("a matrix of our own");
        Slices { data, columns: self.edge_weight.ncols() }
    }

    /// Returns the features of the values, if they have any.
    fn value_feature_dim(&self) -> usize {
        if self.in_values { self.feature_dim() } else { 0 }
    }
}

/// The logits, and the part of the output that comes from the features.
pub(super) struct EdgeScorer<'p, F: Float> {
    problem: &'p EdgeProblem<'p, F>,
    dot: DotScorer<'p, F>,
    /// The columns of the heads of values, which are also those of W and of `attention`.
    columns: Columns<F>,
    features: FeatureTile<F>,
    /// The factors of a head's features in a logit.
    coefficients: Coefficients<F>,
    activated: Activated<F>,
    pairs: Pairs<'p>,
    /// 0, 1, 2, …: all rows of a matrix in order.
    rows: Vec<usize>,
    query: usize,
    value_sums: FeatureSums<F>,
    value_coefficients: Coefficients<F>,
}

impl<'p, F: Float> Scorer<'p, F> for EdgeScorer<'p, F> {
    type Problem = EdgeProblem<'p, F>;

    fn softmax(problem: &'p Self::Problem) -> &'p Problem<'p, F> {
        &problem.softmax
    }

    fn new(level: Level, problem: &'p Self::Problem, tile: &Tile<F>) -> Self {
        let (heads, dim) = (problem.softmax.heads, problem.feature_dim());
        let coefficients = match &problem.logit {
            Logit::Additive { edge_attention, .. } => {
                let rows = edge_attention.as_slice().expect("a matrix of our own");
                Coefficients::from_rows(level, rows, heads, dim)
            }
            _ => Coefficients::zeros(level, heads, dim),
        };
        let value_dim = problem.value_feature_dim();
        Self {
            problem,
            dot: DotScorer::new(level, &problem.softmax, tile),
            columns: value_columns(level, problem),
            features: FeatureTile::new(level, dim, tile.stride),
            coefficients,
            activated: Activated::new(problem, tile),
            pairs: Pairs::by_query(&problem.softmax.inputs),
            rows: (0..tile.len.max(dim)).collect(),
            query: 0,
            value_sums: FeatureSums::zeros(level, heads, value_dim),
            value_coefficients: Coefficients::zeros(level, heads, value_dim),
        }
    }

    fn begin(&mut self, query: usize) {
        self.query = query;
        self.value_sums.clear();
        if let Logit::DotProduct = self.problem.logit {
            self.dot.begin(query);
            let Self { columns, problem, dot, coefficients, rows, .. } = self;
            project(columns, problem, rows, &dot.own, coefficients);
        }
    }

    fn score(&mut self, tile: &mut Tile<F>) {
        let problem = self.problem;
        let softmax = &problem.softmax;
        let (heads, count) = (softmax.heads, tile.pairs.len());
        tile.prefetch_pairs(self.pairs, problem.features.slices(), |pair| pair);
        self.features.load(problem.features.slices(), &tile.pairs);
        match &problem.logit {
            Logit::DotProduct => {
                self.dot.score(tile);
                let coefficients = &self.coefficients;
                self.features.add_scores(heads, count, coefficients, &mut tile.weights);
            }
            Logit::Additive { slope, .. } => {
                let own = softmax.query.row(self.query);
                for (t, pair) in tile.pairs.iter().enumerate() {
                    let key = softmax.key.row(pair.key);
                    for (head, (&own, &key)) in own.iter().zip(key).enumerate() {
                        tile.weights[head * tile.stride + t] = own + key;
                    }
                }
                let coefficients = &self.coefficients;
                self.features.add_scores(heads, count, coefficients, &mut tile.weights);
                dispatch!(tile.level, simd => {
                    for head in 0..heads {
                        let [_, vectors] = tile.of_head(head);
                        leaky_relu(simd, *slope, &mut tile.weights[vectors]);
                    }
                });
            }
            Logit::Concatenated { attention, .. } => {
                let own = softmax.query.row(self.query);
                self.activated.fill(problem, own, softmax.key.slices(), tile);
                let rows = self.activated.gather(&self.rows[..count]);
                let Tile { weights, stride, .. } = tile;
                self.columns.dots(attention, rows, weights, *stride);
            }
        }
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
            let Self { columns, problem, rows, value_coefficients, .. } = self;
            add_projected(columns, problem, rows, value_coefficients, out);
        }
    }
}

/// Returns the columns of the heads of values.
fn value_columns<F: Float>(level: Level, problem: &EdgeProblem<'_, F>) -> Columns<F> {
    let dim = problem.softmax.value_dim;
    Columns::new(level, problem.softmax.heads, dim, |head| [head * dim; 2])
}

/// Computes, for each head, Wᵀ row in the columns of that head.
fn project<F: Float>(
    columns: &mut Columns<F>,
    problem: &EdgeProblem<'_, F>,
    rows: &[usize],
    row: &[F],
    projected: &mut Coefficients<F>,
) {
    let weight = Gather { rows: problem.edge_weight(), at: &rows[..problem.feature_dim()] };
    columns.dots(row, weight, &mut projected.data, projected.stride);
}

/// out += W x for each head in its columns.
fn add_projected<F: Float>(
    columns: &Columns<F>,
    problem: &EdgeProblem<'_, F>,
    rows: &[usize],
    x: &Coefficients<F>,
    out: &mut [F],
) {
    let weight = Gather { rows: problem.edge_weight(), at: &rows[..problem.feature_dim()] };
    let x = Weights { factors: &problem.ones, weights: &x.data, stride: x.stride };
    columns.add_weighted(out, x, weight);
}

/// LeakyReLU of each entry, in whole vectors.
#[inline(always)]
fn leaky_relu<S: Simd, F: Float>(simd: S, slope: F, values: &mut [F]) {
    let zero = Vector::<S, F>::splat(simd, F::zero());
    let (positive, negative) =
        (Vector::<S, F>::splat(simd, F::one()), Vector::<S, F>::splat(simd, slope));
    for values in values.chunks_exact_mut(Vector::<S, F>::LEN) {
        let value = Vector::<S, F>::from_slice(simd, values);
        (value * value.simd_gt(zero).select(positive, negative)).store_slice(values);
    }
}

/// LeakyReLU(q + k + W x) for the pairs of a tile: one row each, with the columns of the values. Empty
/// for logits that do not need it.
pub(super) struct Activated<F> {
    columns: usize,
    rows: Vec<F>,
}

impl<F: Float> Activated<F> {
    fn new(problem: &EdgeProblem<'_, F>, tile: &Tile<F>) -> Self {
        let columns = match problem.logit {
            Logit::Concatenated { .. } => problem.edge_weight.ncols(),
            _ => 0,
        };
        Self { columns, rows: vec![F::zero(); columns * tile.len] }
    }

    #[inline(always)]
    fn gather<'r>(&'r self, at: &'r [usize]) -> Gather<'r, F> {
        Gather { rows: Slices { data: &self.rows, columns: self.columns }, at }
    }

    #[inline(never)]
    fn fill(
        &mut self,
        problem: &EdgeProblem<'_, F>,
        own: &[F],
        others: Slices<'_, F>,
        tile: &Tile<F>,
    ) {
        dispatch!(tile.level, simd => self.fill_in_vectors(simd, problem, own, others, tile));
    }

    #[inline(always)]
    fn fill_in_vectors<S: Simd>(
        &mut self,
        simd: S,
        problem: &EdgeProblem<'_, F>,
        own: &[F],
        others: Slices<'_, F>,
        tile: &Tile<F>,
    ) {
        let Logit::Concatenated { slope, .. } = problem.logit else {
            return;
        };
        let len = Vector::<S, F>::LEN;
        let columns = self.columns;
        let weight = problem.edge_weight();
        let pairs = tile.pairs.iter().zip(&tile.others);
        for ((pair, &other), row) in pairs.zip(self.rows.chunks_exact_mut(columns.max(1))) {
            let (other, x) = (others.row(other), problem.features.row(pair.index));
            let (mut start, own) = (0, &own[..columns]);
            while start + 4 * len <= columns {
                sum_columns::<S, F, 4>(simd, slope, [own, other], x, weight, start, row);
                start += 4 * len;
            }
            while start + len <= columns {
                sum_columns::<S, F, 1>(simd, slope, [own, other], x, weight, start, row);
                start += len;
            }
            for c in start..columns {
                let edge = x.iter().enumerate().map(|(f, &x)| x * weight.row(f)[c]);
                let sum = edge.fold(own[c] + other[c], |sum, edge| sum + edge);
                row[c] = if sum > F::zero() { sum } else { slope * sum };
            }
        }
    }
}

/// N vectors of columns from `start` on.
#[inline(always)]
fn sum_columns<S: Simd, F: Float, const N: usize>(
    simd: S,
    slope: F,
    [own, other]: [&[F]; 2],
    x: &[F],
    weight: Slices<'_, F>,
    start: usize,
    row: &mut [F],
) {
    let len = Vector::<S, F>::LEN;
    let columns = start..start + N * len;
    let (own, other) = (&own[columns.clone()], &other[columns.clone()]);
    let mut sums = [Vector::<S, F>::splat(simd, F::zero()); N];
    for n in 0..N {
        let own = Vector::<S, F>::from_slice(simd, &own[n * len..][..len]);
        sums[n] = own + Vector::<S, F>::from_slice(simd, &other[n * len..][..len]);
    }
    for (f, &x) in x.iter().enumerate() {
        let x = Vector::<S, F>::splat(simd, x);
        let weight = &weight.row(f)[columns.clone()];
        for n in 0..N {
            let weight = Vector::<S, F>::from_slice(simd, &weight[n * len..][..len]);
            sums[n] = weight.mul_add(x, sums[n]);
        }
    }
    for n in 0..N {
        sums[n].store_slice(&mut row[start + n * len..][..len]);
    }
    leaky_relu(simd, slope, &mut row[columns]);
}
