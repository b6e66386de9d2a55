//! Softmax attention by hyperbolic distance.
//!
//! Points are in polar form: a direction u, and a few functions of the radius R, the distance from the
//! origin in units of the radius of curvature. In this form nothing cancels, however close the points are
//! to each other or to the boundary:
//!
//! ```text
//! sinh²(d/2) = sinh²((Rᵢ − Rⱼ)/2) + sinh Rᵢ sinh Rⱼ |uᵢ − uⱼ|²/4
//! ```
//!
//! So a tile of logits is a tile of squared distances between directions, computed from their
//! differences, plus elementwise work (`pairs`). The forward pass is the same as for any softmax
//! attention: the sums are linear in the terms of the values, and the mechanism turns them into means.
//! `spread` recomputes sums that the first pass gives too inaccurately; `backward` is the backward pass,
//! in which `dominant` corrects rounding for a nearly one-hot softmax.

mod backward;
mod dense_backward;
mod dominant;
mod pairs;
mod spread;

pub(super) use backward::backward;
pub(crate) use backward::{PointGradients, Points, Upstream};
pub(super) use dense_backward::dense_backward;
pub(crate) use dominant::{DOMINANT, OfLogit, PairDistance, add_point};
pub(crate) use pairs::Terms;
pub(super) use spread::spread;

use super::dense::{Block, TileScorer};
use super::gathered::{Columns, Gather};
use super::primitives::buffer::Buffer;
use super::primitives::matmul::{Matrix, Out, Vector, load, panel_len, squared_distances, store};
use super::problem::{Problem, Rows};
use super::rows::{Scorer, Tile};
use crate::kernels::Float;
use fearless_simd::{Level, Simd, SimdBase};
use pairs::{RADIUS, logit};
use std::f64::consts::LN_2;
use std::ops::Range;

/// The terms of the radius R of a point in a logit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Radius<T> {
    /// e^{R/2} − 1.
    pub(crate) expm1: T,
    /// e^{−R/2} / 2.
    pub(crate) half_inverse: T,
    /// sinh R / 2, and its square root.
    pub(crate) half_sinh: T,
    pub(crate) root: T,
    /// cosh R / 2.
    pub(crate) half_cosh: T,
}

/// The terms of the radius R of a value in a sum.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mass<T> {
    /// e^{R/2} − 1 and e^{−R/2} / 2.
    pub(crate) expm1: T,
    pub(crate) half_inverse: T,
    pub(crate) sinh: T,
    pub(crate) cosh: T,
}

/// Inputs of attention by hyperbolic distance.
#[derive(Debug)]
pub struct HyperbolicProblem<'p, F: Float> {
    /// Directions of queries and keys, and the summed terms of the values, as inputs of softmax
    /// attention.
    pub(crate) softmax: Problem<'p, F>,
    /// num_queries × heads.
    pub(crate) query: Vec<Radius<F>>,
    /// num_keys × kv_heads.
    pub(crate) key: Vec<Radius<F>>,
    /// Logits are −κ d/2, where d is the distance in units of the radius of curvature.
    pub(crate) kappa: F,
    /// Directions of the values, num_keys × kv_heads · dim, without NaN and infinities.
    pub(crate) directions: Rows<'p, F>,
    /// The number of columns of a head of them.
    pub(crate) dim: usize,
    /// num_keys × kv_heads.
    pub(crate) masses: Vec<Mass<F>>,
}

impl<F: Float> HyperbolicProblem<'_, F> {
    #[inline(always)]
    pub(crate) fn query(&self, query: usize, head: usize) -> Radius<F> {
        self.query[query * self.softmax.heads + head]
    }

    /// Returns the points of a key and its value for a head of the queries.
    #[inline(always)]
    pub(crate) fn key_at(&self, key: usize, head: usize) -> usize {
        key * self.softmax.inputs.num_kv_heads() + self.softmax.kv_head(head)
    }

    /// Returns the factor of d/2 in the logit, in units of ln 2.
    #[inline(always)]
    fn factor(&self) -> F {
        F::from_f64(-self.kappa.as_f64() * LN_2)
    }

    /// Returns the columns of heads of queries in own rows and of keys in others.
    fn columns(&self, level: Level, dim: usize) -> Columns<F> {
        Columns::new(level, self.softmax.heads, dim, |head| {
            [head * dim, self.softmax.kv_head(head) * dim]
        })
    }
}

/// N numbers for each pair of a tile, or for each query of a block.
struct Lanes<F, const N: usize> {
    data: Vec<F>,
    stride: usize,
}

impl<F: Float, const N: usize> Lanes<F, N> {
    fn new(stride: usize) -> Self {
        Self { data: vec![F::zero(); N * stride], stride }
    }

    #[inline(always)]
    fn fill(&mut self, lanes: impl Iterator<Item = [F; N]>) {
        for (t, numbers) in lanes.enumerate() {
            for (n, number) in numbers.into_iter().enumerate() {
                self.data[n * self.stride + t] = number;
            }
        }
    }

    /// Returns the numbers of a vector of lanes.
    #[inline(always)]
    fn load<S: Simd>(&self, simd: S, at: usize) -> [Vector<S, F>; N] {
        let mut vectors = [Vector::<S, F>::splat(simd, F::zero()); N];
        for (n, vector) in vectors.iter_mut().enumerate() {
            let lanes = &self.data[n * self.stride + at..][..Vector::<S, F>::LEN];
            *vector = Vector::<S, F>::from_slice(simd, lanes);
        }
        vectors
    }
}

/// The same numbers in all lanes.
#[inline(always)]
fn splat_all<S: Simd, F: Float, const N: usize>(simd: S, numbers: [F; N]) -> [Vector<S, F>; N] {
    let mut vectors = [Vector::<S, F>::splat(simd, F::zero()); N];
    for (vector, number) in vectors.iter_mut().zip(numbers) {
        *vector = Vector::<S, F>::splat(simd, number);
    }
    vectors
}

/// Logits row by row.
pub(super) struct DistanceScorer<'p, F: Float> {
    problem: &'p HyperbolicProblem<'p, F>,
    columns: Columns<F>,
    keys: Lanes<F, RADIUS>,
    query: usize,
}

impl<'p, F: Float> Scorer<'p, F> for DistanceScorer<'p, F> {
    type Problem = HyperbolicProblem<'p, F>;

    fn softmax(problem: &'p Self::Problem) -> &'p Problem<'p, F> {
        &problem.softmax
    }

    fn new(level: Level, problem: &'p Self::Problem, tile: &Tile<F>) -> Self {
        let columns = problem.columns(level, problem.softmax.key_dim);
        Self { problem, columns, keys: Lanes::new(tile.stride), query: 0 }
    }

    fn begin(&mut self, query: usize) {
        self.query = query;
    }

    fn score(&mut self, tile: &mut Tile<F>) {
        dispatch!(tile.level, simd => self.score_in_vectors(simd, tile));
    }
}

impl<F: Float> DistanceScorer<'_, F> {
    #[inline(always)]
    fn score_in_vectors<S: Simd>(&mut self, simd: S, tile: &mut Tile<F>) {
        let Self { problem, columns, keys, query } = self;
        let softmax = &problem.softmax;
        let own = softmax.query.row(*query);
        let rows = Gather { rows: softmax.key.slices(), at: &tile.others };
        columns.squared_distances(own, rows, &mut tile.weights, tile.stride);
        let factor = Vector::<S, F>::splat(simd, problem.factor());
        for head in 0..softmax.heads {
            keys.fill(
                (tile.pairs.iter()).map(|pair| problem.key[problem.key_at(pair.key, head)].array()),
            );
            let own = Radius::of(splat_all(simd, problem.query(*query, head).array()));
            let [_, vectors] = tile.of_head(head);
            let logits = tile.weights[vectors].chunks_exact_mut(Vector::<S, F>::LEN);
            for (v, logits) in logits.enumerate() {
                let squared = Vector::<S, F>::from_slice(simd, logits);
                let key = Radius::of(keys.load(simd, v * Vector::<S, F>::LEN));
                logit::<S, F>(simd, squared, own, key, factor).store_slice(logits);
            }
        }
    }
}

/// Logits in tiles.
pub(super) struct DistanceTiles<'p, F: Float> {
    problem: &'p HyperbolicProblem<'p, F>,
    /// Directions, dim × width.
    directions: Buffer<F>,
    queries: Lanes<F, RADIUS>,
}

impl<'p, F: Float> TileScorer<'p, F> for DistanceTiles<'p, F> {
    type Problem = HyperbolicProblem<'p, F>;

    fn softmax(problem: &'p Self::Problem) -> &'p Problem<'p, F> {
        &problem.softmax
    }

    fn new(problem: &'p Self::Problem, width: usize) -> Self {
        let directions = Buffer::zeros(problem.softmax.key_dim * width);
        Self { problem, directions, queries: Lanes::new(width) }
    }

    fn begin(&mut self, block: &Block<'_, '_, F>) {
        block.pack_queries(F::one(), &mut self.directions);
        let queries = block.queries.clone();
        self.queries.fill(queries.map(|query| self.problem.query(query, block.head).array()));
    }

    fn score(
        &self,
        block: &Block<'_, '_, F>,
        tile: &Range<usize>,
        column: usize,
        maxima: &mut [F],
        scores: &mut [F],
    ) {
        let width = block.width;
        let right = Matrix::new(&self.directions, width).skip_columns(column);
        let keys = block.keys().left(tile.start);
        let out = Out::columns(scores, width, column..column + maxima.len());
        squared_distances(block.level, tile.len(), keys, right, out);
        let panel = panel_len::<F>(block.level);
        for (column, maxima) in (column..).step_by(panel).zip(maxima.chunks_exact_mut(panel)) {
            dispatch!(block.level, simd => {
                self.logits(simd, block, tile, column, maxima, scores);
            });
        }
    }
}

impl<F: Float> DistanceTiles<'_, F> {
    /// Replaces squared distances of directions by logits.
    #[inline(always)]
    fn logits<S: Simd>(
        &self,
        simd: S,
        block: &Block<'_, '_, F>,
        tile: &Range<usize>,
        column: usize,
        maxima: &mut [F],
        scores: &mut [F],
    ) {
        let (problem, width) = (self.problem, block.width);
        let mut max = load::<S, F>(simd, maxima);
        let factor = Vector::<S, F>::splat(simd, problem.factor());
        let len = Vector::<S, F>::LEN;
        let queries = [
            Radius::of(self.queries.load(simd, column)),
            Radius::of(self.queries.load(simd, column + len)),
        ];
        for (key, scores) in tile.clone().zip(scores.chunks_exact_mut(width)) {
            let key = problem.key[problem.key_at(key, block.head)].array();
            let key = Radius::of(splat_all(simd, key));
            let scores = &mut scores[column..];
            let squared = load::<S, F>(simd, scores);
            let logits = [
                logit::<S, F>(simd, squared[0], queries[0], key, factor),
                logit::<S, F>(simd, squared[1], queries[1], key, factor),
            ];
            max = [max[0].max(logits[0]), max[1].max(logits[1])];
            store::<S, F>(logits, scores);
        }
        store::<S, F>(max, maxima);
    }
}
