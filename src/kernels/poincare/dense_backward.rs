//! The backward pass in tiles of queries × keys.

use super::backward::{PointGradients, Points, Upstream};
use super::dominant::{PairDistance, add_point};
use super::pairs::{PairGradients, Pairs, RADIUS, TERMS, Terms, vjp};
use super::{HyperbolicProblem, Lanes, Mass, Radius, splat_all};
use crate::error::Result;
use crate::inputs::{Pair, head_columns};
use crate::kernels::Float;
use crate::kernels::dense::{
    BackwardPart, Block, HeadRows, KeyGradients, StripOfTile, Summed, Targets, TileSizes, TileVjp,
    backward,
};
use crate::kernels::primitives::buffer::Buffer;
use crate::kernels::primitives::matmul::{
    Matrix, Out, Target, Vector, panel_len, rows_times, squared_distances,
};
use crate::kernels::problem::Problem;
use fearless_simd::{Level, Simd, SimdBase};
use ndarray::{ArrayViewMut3, s};
use std::f64::consts::LN_2;
use std::iter;
use std::ops::Range;

/// [`backward`](super::backward) for dense inputs.
pub(in super::super) fn dense_backward<F: Float>(
    problem: &HyperbolicProblem<'_, F>,
    points: &Points<F>,
    upstream: &Upstream<F>,
    sizes: TileSizes,
    level: Level,
    bias: Option<ArrayViewMut3<'_, F>>,
) -> Result<PointGradients<F>> {
    let mut grads = PointGradients::zeros(problem, [true; 2])?;
    let PointGradients { query, key, value, kappa } = &mut grads;
    let [query, query_radii] = query.each_mut().map(|grad| grad.view_mut());
    let [key, key_radii] = key.each_mut().map(|grad| grad.view_mut());
    let [value, value_radii] = value.each_mut().map(|grad| grad.view_mut());
    let targets = Targets {
        query: Some(query),
        key: Some(key),
        value: Some(value),
        bias,
        pair_weights: None,
        of_queries: vec![query_radii, kappa.view_mut()],
        of_keys: vec![key_radii, value_radii],
    };
    let operands = Operands { problem, points, upstream };
    backward::<_, DistanceVjp<'_, _>>(&operands, sizes, level, targets);
    Ok(grads)
}

/// The inputs of the backward pass.
struct Operands<'p, F: Float> {
    problem: &'p HyperbolicProblem<'p, F>,
    points: &'p Points<F>,
    upstream: &'p Upstream<F>,
}

/// Buffers for one block at a time.
struct DistanceVjp<'p, F: Float> {
    operands: &'p Operands<'p, F>,
    /// Directions, w and û, transposed to columns × width.
    queries: Buffer<F>,
    weights: Buffer<F>,
    directions: Buffer<F>,
    radii: Lanes<F, RADIUS>,
    terms: Lanes<F, TERMS>,
    /// Tiles, keys × width: distances to û, then gradients of the logits; bias; multipliers.
    spreads: Buffer<F>,
    bias: Buffer<F>,
    multipliers: Buffer<F>,
    /// For numbers that are added to scores or multiply weights.
    rows: Vec<F>,
    /// Gradients of radius and κ, and the sums of the gradients of the logits, lane by lane.
    grad_radius: Buffer<F>,
    grad_kappa: Buffer<F>,
    grad_logits: Buffer<F>,
    /// The key with nearly all weight.
    dominant: Vec<Option<usize>>,
}

impl<'p, F: Float> TileVjp<'p, F> for DistanceVjp<'p, F> {
    type Problem = Operands<'p, F>;

    fn softmax(operands: &'p Self::Problem) -> &'p Problem<'p, F> {
        &operands.problem.softmax
    }

    fn summed(operands: &'p Self::Problem) -> Summed<'p, F> {
        Summed {
            query: operands.points.query.slices(),
            key: operands.points.key.slices(),
            scale: F::one(),
            grad_out: operands.upstream.sums.slices(),
            value_dim: operands.problem.dim,
        }
    }

    fn new(operands: &'p Self::Problem, width: usize, keys_per_tile: usize) -> Self {
        let tile = || Buffer::zeros(keys_per_tile * width);
        let (key_dim, dim) = (operands.problem.softmax.key_dim, operands.problem.dim);
        Self {
            operands,
            queries: Buffer::zeros(key_dim * width),
            weights: Buffer::zeros(dim * width),
            directions: Buffer::zeros(dim * width),
            radii: Lanes::new(width),
            terms: Lanes::new(width),
            spreads: tile(),
            bias: tile(),
            multipliers: tile(),
            rows: Vec::new(),
            grad_radius: Buffer::zeros(width),
            grad_kappa: Buffer::zeros(width),
            grad_logits: Buffer::zeros(width),
            dominant: vec![None; width],
        }
    }

    fn begin(&mut self, block: &Block<'_, '_, F>) {
        let Operands { problem, upstream, .. } = *self.operands;
        let Block { problem: softmax, head, width, .. } = *block;
        let queries = || block.queries.clone();
        block.pack_queries(F::one(), &mut self.queries);
        for (rows, packed) in [
            (upstream.weights.slices(), &mut self.weights),
            (upstream.directions.slices(), &mut self.directions),
        ] {
            block.pack_transposed(rows, problem.dim, F::one(), packed);
        }
        self.radii.fill(queries().map(|query| problem.query(query, head).array()));
        let terms = queries().map(|query| upstream.terms[query * softmax.heads + head]);
        // Lanes past the end are unused.
        let padding = iter::repeat(Terms::none());
        self.terms.fill(terms.chain(padding).take(width).map(Terms::array));
        self.grad_radius.fill(F::zero());
        self.grad_kappa.fill(F::zero());
        self.grad_logits.fill(F::zero());
        self.dominant.fill(None);
    }

    fn differentiate(
        &mut self,
        block: &Block<'_, '_, F>,
        strip: &StripOfTile,
        [squared, products]: [&mut [F]; 2],
        part: &mut BackwardPart<'_, F>,
    ) {
        let Operands { problem, upstream, .. } = *self.operands;
        let Block { level, problem: softmax, head, width, .. } = *block;
        let StripOfTile { columns, lanes, keys, may_hide } = strip;
        let len = keys.len();
        if *may_hide {
            let bias = &mut self.bias[..len * width];
            bias.chunks_exact_mut(width).for_each(|row| row[columns.clone()].fill(F::zero()));
            block.restrict(lanes.clone(), keys, bias, &mut self.rows);
        }
        if softmax.has_dropout() {
            let multipliers = &mut self.multipliers[..len * width];
            multipliers.chunks_exact_mut(width).for_each(|row| row[columns.clone()].fill(F::one()));
            block.drop_out(lanes.clone(), keys, multipliers, &mut self.rows);
        }
        let key = block.keys().left(keys.start);
        let value = HeadRows::new(problem.directions.slices(), softmax.kv_head(head), problem.dim);
        let value = value.left(keys.start);
        // A panel at a time, whose numbers stay in the cache.
        let panel = panel_len::<F>(level);
        for column in columns.clone().step_by(panel) {
            let right = |packed| Matrix::new(packed, width).skip_columns(column);
            let out = |numbers| Out::columns(numbers, width, column..column + panel);
            squared_distances(level, len, key, right(&self.queries[..]), out(squared));
            let weights = right(&self.weights[..]);
            rows_times(level, len, value, weights, Target::Overwrite, out(products));
            if !upstream.is_linear {
                let spreads = &mut self.spreads[..len * width];
                squared_distances(level, len, value, right(&self.directions[..]), out(spreads));
            }
            let place = (strip, column..column + panel);
            self.differentiate_pairs(block, place, [squared, products], &mut part.keys);
        }
        if let Some(grad) = &mut part.grad_bias {
            let grad = &mut grad.view_mut();
            block.add_bias_gradients(lanes.clone(), keys, &self.spreads, part.queries.start, grad);
        }
    }

    fn finish(&mut self, block: &Block<'_, '_, F>, part: &mut BackwardPart<'_, F>) {
        for (lane, query) in block.queries.clone().enumerate() {
            let at = [query - part.queries.start, block.head];
            part.of_queries[0][at] += self.grad_radius[lane];
            // s = −κ ln 2 · asinh(…)/ln 2
            part.of_queries[1][at] -= self.grad_kappa[lane] * F::from_f64(LN_2);
            if let Some(key) = self.dominant[lane] {
                self.settle(block.pair(lane, key), block.head, -self.grad_logits[lane], part);
            }
        }
    }
}

impl<F: Float> DistanceVjp<'_, F> {
    /// Adds the terms from the gradient of the logit of a pair that was left out.
    fn settle(&self, pair: Pair, head: usize, grad_logit: F, part: &mut BackwardPart<'_, F>) {
        let Operands { problem, points, .. } = *self.operands;
        let softmax = &problem.softmax;
        let (key_dim, kv_head) = (softmax.key_dim, softmax.kv_head(head));
        let distance = PairDistance::new(problem, pair, head);
        let of_logit = distance.vjp(problem.kappa, grad_logit.as_f64());
        let first = part.queries.start;
        let at = [pair.query - first, head];
        part.of_queries[0][at] += of_logit.query;
        part.of_queries[1][at] += of_logit.kappa;
        let (columns, kv_columns) = (head_columns(head, key_dim), head_columns(kv_head, key_dim));
        let mut grad = part.grad_query.slice_mut(s![at[0], columns.clone()]);
        let grad = grad.as_slice_mut().expect("rows of our own");
        add_point(grad, of_logit.direction, &points.key.slices().row(pair.key)[kv_columns]);
        let row = part.keys.row(kv_head, pair.key);
        part.keys.of_keys[0][row] += of_logit.key;
        let [grad, _] = part.keys.row_mut(row);
        let point = &points.query.slices().row(pair.query)[columns];
        add_point(&mut grad[..key_dim], of_logit.direction, point);
        if let (Some(grad), Some(bias)) = (&mut part.grad_bias, softmax.bias) {
            let index = pair.index - first * softmax.inputs.num_keys();
            let slot = bias.slot(Pair { query: at[0], index, ..pair }, head);
            grad.view_mut()[slot] += grad_logit;
        }
    }

    /// Computes the gradients of the pairs in some columns of a strip: replaces squared distances by weights, and products by the
    /// factors of the directions, and writes the gradients of the logits to `spreads`.
    #[inline(never)]
    fn differentiate_pairs(
        &mut self,
        block: &Block<'_, '_, F>,
        place: (&StripOfTile, Range<usize>),
        squared_and_products: [&mut [F]; 2],
        sums: &mut KeyGradients<F>,
    ) {
        dispatch!(block.level, simd => {
            self.differentiate_in_vectors(simd, block, place, squared_and_products, sums);
        });
    }

    #[inline(always)]
    fn differentiate_in_vectors<S: Simd>(
        &mut self,
        simd: S,
        block: &Block<'_, '_, F>,
        (strip, columns): (&StripOfTile, Range<usize>),
        [squared, products]: [&mut [F]; 2],
        sums: &mut KeyGradients<F>,
    ) {
        let Operands { problem, upstream, .. } = *self.operands;
        let Block { problem: softmax, head, width, .. } = *block;
        let tiles = strip.keys.len() * width;
        let spreads = &mut self.spreads[..tiles];
        let (bias, multipliers) = (&self.bias[..tiles], &self.multipliers[..tiles]);
        let first_row = sums.row(softmax.kv_head(head), strip.keys.start);
        let [key_radii, value_radii] = &mut sums.of_keys[..] else {
            unreachable!("there are two numbers for each key");
        };
        let vector_len = Vector::<S, F>::LEN;
        for at in columns.step_by(vector_len) {
            let query = Radius::of(self.radii.load(simd, at));
            let terms = Terms::of(self.terms.load(simd, at));
            let from = |data: &[F]| Vector::<S, F>::from_slice(simd, &data[..vector_len]);
            let mut grad_radius = from(&self.grad_radius[at..]);
            let mut grad_kappa = from(&self.grad_kappa[at..]);
            let mut grad_logits = from(&self.grad_logits[at..]);
            for (k, key) in strip.keys.clone().enumerate() {
                let place = k * width + at;
                let point = problem.key_at(key, head);
                let pairs = Pairs {
                    query,
                    key: Radius::of(splat_all(simd, problem.key[point].array())),
                    mass: Mass::of(splat_all(simd, problem.masses[point].array())),
                    terms,
                    squared: from(&squared[place..]),
                    product: from(&products[place..]),
                    spread: from(&spreads[place..]),
                    bias: match strip.may_hide {
                        true => from(&bias[place..]),
                        false => Vector::<S, F>::splat(simd, F::zero()),
                    },
                    multiplier: match softmax.has_dropout() {
                        true => from(&multipliers[place..]),
                        false => Vector::<S, F>::splat(simd, F::one()),
                    },
                    dominant_logit: Vector::<S, F>::splat(simd, F::zero()),
                };
                let (kappa, factor) = (problem.kappa, problem.factor());
                let PairGradients {
                    weight,
                    logit,
                    direction,
                    query,
                    key: of_key,
                    value,
                    factor,
                    mut dominates,
                } = vjp::<S, F>(simd, &pairs, kappa, factor, upstream.dominant);
                grad_logits += logit;
                while dominates != 0 {
                    let lane = dominates.trailing_zeros() as usize;
                    self.dominant[at + lane] = Some(key);
                    dominates &= dominates - 1;
                }
                weight.store_slice(&mut squared[place..place + vector_len]);
                direction.store_slice(&mut products[place..place + vector_len]);
                logit.store_slice(&mut spreads[place..place + vector_len]);
                grad_radius += query;
                grad_kappa += factor;
                key_radii[first_row + k] += of_key.reduce_sum();
                value_radii[first_row + k] += value.reduce_sum();
            }
            grad_radius.store_slice(&mut self.grad_radius[at..at + vector_len]);
            grad_kappa.store_slice(&mut self.grad_kappa[at..at + vector_len]);
            grad_logits.store_slice(&mut self.grad_logits[at..at + vector_len]);
        }
    }
}
