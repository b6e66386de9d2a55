//! The backward pass in tiles of queries × keys.

use super::backward::{PointGradients, Points, Upstream};
use super::dominant::{PairDistance, add_point};
use super::pairs::{PairGradients, Pairs, RADIUS, TERMS, Terms, vjp};
use super::{HyperbolicProblem, Lanes, Mass, Radius, splat_all};
use crate::error::Result;
use crate::gradients::PartOfBias;
use crate::inputs::{Pair, head_columns};
use crate::kernels::Float;
use crate::kernels::dense::{
    BLOCKS_OF_PART, Block, HeadRows, PARTS, TileSizes, add_head_rows, block, clip, pack_rows,
    split_bias,
};
use crate::kernels::parallel::{self, parts_of_work, ranges, row_chunks};
use crate::kernels::primitives::buffer::Buffer;
use crate::kernels::primitives::matmul::{
    Left, Matrix, Out, Target, Vector, columns_times, panel_len, panel_width, rows_times,
    squared_distances,
};
use fearless_simd::{Level, Simd, SimdBase};
use ndarray::{ArrayViewMut2, ArrayViewMut3, s};
use std::f64::consts::LN_2;
use std::iter;
use std::ops::Range;

/// The outputs of one task.
struct Part<'g, F> {
    queries: Range<usize>,
    grad_query: ArrayViewMut2<'g, F>,
    grad_radius: ArrayViewMut2<'g, F>,
    grad_kappa: ArrayViewMut2<'g, F>,
    grad_bias: Option<PartOfBias<'g, F>>,
    keys: KeySums<F>,
}

/// Sums over the queries of a part: for each head, row after row of padded length, and radii.
struct KeySums<F> {
    key: Vec<F>,
    value: Vec<F>,
    key_radii: Vec<F>,
    value_radii: Vec<F>,
}

/// Buffers for one block at a time.
struct Scratch<F: Float> {
    /// Directions, w and û, transposed to columns × width.
    queries: Buffer<F>,
    weights: Buffer<F>,
    directions: Buffer<F>,
    /// The right factors of products, width × padded columns.
    query_rows: Buffer<F>,
    sum_rows: Buffer<F>,
    radii: Lanes<F, RADIUS>,
    terms: Lanes<F, TERMS>,
    /// Tiles, keys × width: squared distances, then weights; products, then the factors of the keys'
    /// directions; distances to û, then gradients of the logits; bias; multipliers.
    squared: Buffer<F>,
    products: Buffer<F>,
    spreads: Buffer<F>,
    bias: Buffer<F>,
    multipliers: Buffer<F>,
    /// For numbers that are added to scores or multiply weights.
    rows: Vec<F>,
    /// key_dim × width.
    grad_query: Buffer<F>,
    /// Gradients of radius and κ, and the sums of the gradients of the logits, lane by lane.
    grad_radius: Buffer<F>,
    grad_kappa: Buffer<F>,
    grad_logits: Buffer<F>,
    /// The key with nearly all weight.
    dominant: Vec<Option<usize>>,
    /// [`Upstream::dominant`].
    least_dominant: F,
}

/// [`backward`](super::backward) for dense inputs.
pub(in super::super) fn dense_backward<F: Float>(
    problem: &HyperbolicProblem<'_, F>,
    points: &Points<F>,
    upstream: &Upstream<F>,
    sizes: TileSizes,
    level: Level,
    mut grad_bias: Option<ArrayViewMut3<'_, F>>,
) -> Result<PointGradients<F>> {
    let softmax = &problem.softmax;
    let inputs = &softmax.inputs;
    let sizes = clip(softmax, sizes);
    let mut grads = PointGradients::zeros(problem, [true; 2])?;
    let num_keys = inputs.num_keys();
    let panel = panel_len::<F>(level);
    let padded = [softmax.key_dim, problem.dim].map(|dim| dim.next_multiple_of(panel));
    let rows = inputs.num_kv_heads() * num_keys;
    let blocks = inputs.num_queries().div_ceil(sizes.queries);
    let num_parts = (blocks / BLOCKS_OF_PART).clamp(1, PARTS);
    let ranges = parts_of_work(inputs.num_queries(), sizes.queries, num_parts, |block| {
        softmax.num_visible_keys(&block)
    });
    let lens = || ranges.iter().map(Range::len);
    let [grad_query, grad_radius] = grads.query.each_mut();
    let mut grad_query = row_chunks(grad_query.view_mut(), lens());
    let mut grad_radius = row_chunks(grad_radius.view_mut(), lens());
    let mut grad_kappa = row_chunks(grads.kappa.view_mut(), lens());
    let grad_biases = split_bias(softmax, grad_bias.as_mut(), &ranges);
    let mut parts = Vec::with_capacity(ranges.len());
    for (queries, grad_bias) in ranges.iter().cloned().zip(grad_biases) {
        let zeros = |columns: usize| vec![F::zero(); rows * columns];
        let chunk = "a chunk for each part";
        parts.push(Part {
            queries,
            grad_query: grad_query.next().expect(chunk),
            grad_radius: grad_radius.next().expect(chunk),
            grad_kappa: grad_kappa.next().expect(chunk),
            grad_bias,
            keys: KeySums {
                key: zeros(padded[0]),
                value: zeros(padded[1]),
                key_radii: zeros(1),
                value_radii: zeros(1),
            },
        });
    }
    drop((grad_query, grad_radius, grad_kappa));
    parallel::for_each(parts.iter_mut().collect(), softmax.work(), |part: &mut Part<'_, F>| {
        backward_part(level, problem, points, upstream, sizes, part);
    });
    let rests =
        parts.into_iter().map(|part| (part.keys, part.grad_bias.and_then(PartOfBias::into_copy)));
    let (sums, shared): (Vec<KeySums<F>>, Vec<_>) = rests.unzip();
    if let Some(grad) = &mut grad_bias {
        shared.iter().flatten().for_each(|rows| *grad += rows);
    }
    for KeySums { key, value, key_radii, value_radii } in sums {
        add_head_rows(&key, padded[0], softmax.key_dim, grads.key[0].view_mut());
        add_head_rows(&key_radii, 1, 1, grads.key[1].view_mut());
        add_head_rows(&value, padded[1], problem.dim, grads.value[0].view_mut());
        add_head_rows(&value_radii, 1, 1, grads.value[1].view_mut());
    }
    Ok(grads)
}

fn backward_part<F: Float>(
    level: Level,
    problem: &HyperbolicProblem<'_, F>,
    points: &Points<F>,
    upstream: &Upstream<F>,
    sizes: TileSizes,
    part: &mut Part<'_, F>,
) {
    let softmax = &problem.softmax;
    let panel = panel_len::<F>(level);
    let width = sizes.queries.next_multiple_of(panel);
    let tile = || Buffer::zeros(sizes.keys * width);
    let (key_dim, dim) = (softmax.key_dim, problem.dim);
    let [padded_key, padded] = [key_dim, dim].map(|dim| dim.next_multiple_of(panel));
    let mut scratch = Scratch {
        queries: Buffer::zeros(key_dim * width),
        weights: Buffer::zeros(dim * width),
        directions: Buffer::zeros(dim * width),
        query_rows: Buffer::zeros(width * padded_key),
        sum_rows: Buffer::zeros(width * padded),
        radii: Lanes::new(width),
        terms: Lanes::new(width),
        squared: tile(),
        products: tile(),
        spreads: tile(),
        bias: tile(),
        multipliers: tile(),
        rows: Vec::new(),
        grad_query: Buffer::zeros(key_dim * width),
        grad_radius: Buffer::zeros(width),
        grad_kappa: Buffer::zeros(width),
        grad_logits: Buffer::zeros(width),
        dominant: vec![None; width],
        least_dominant: upstream.dominant,
    };
    for rows in ranges(part.queries.len(), sizes.queries) {
        for head in 0..softmax.heads {
            let block = block(level, softmax, head, &part.queries, &rows);
            pack(problem, points, upstream, &block, &mut scratch);
            for tile in block.tiles(sizes.keys) {
                backward_tile(
                    problem,
                    points,
                    upstream,
                    &block,
                    &tile,
                    &mut scratch,
                    &mut part.keys,
                );
                if let Some(grad) = &mut part.grad_bias {
                    let (lanes, first) = (0..block.queries.len(), part.queries.start);
                    let grad = &mut grad.view_mut();
                    block.add_bias_gradients(lanes, &tile, &scratch.spreads, first, grad);
                }
            }
            let columns = head_columns(head, softmax.key_dim);
            let sum = part.grad_query.slice_mut(s![rows.clone(), columns]);
            block.add_lanes(F::one(), &scratch.grad_query, sum);
            for (lane, row) in rows.clone().enumerate() {
                part.grad_radius[[row, head]] += scratch.grad_radius[lane];
                // s = −κ ln 2 · asinh(…)/ln 2
                part.grad_kappa[[row, head]] -= scratch.grad_kappa[lane] * F::from_f64(LN_2);
                if let Some(key) = scratch.dominant[lane] {
                    part.settle(problem, points, [row, key], head, -scratch.grad_logits[lane]);
                }
            }
        }
    }
}

impl<F: Float> Part<'_, F> {
    /// Adds the terms from the gradient of the logit of a row and a key that was left out.
    fn settle(
        &mut self,
        problem: &HyperbolicProblem<'_, F>,
        points: &Points<F>,
        [row, key]: [usize; 2],
        head: usize,
        grad_logit: F,
    ) {
        let softmax = &problem.softmax;
        let (key_dim, num_keys) = (softmax.key_dim, softmax.inputs.num_keys());
        let (query, kv_head) = (self.queries.start + row, softmax.kv_head(head));
        let pair = Pair { query, key, index: query * num_keys + key };
        let distance = PairDistance::new(problem, pair, head);
        let of_logit = distance.vjp(problem.kappa, grad_logit.as_f64());
        self.grad_radius[[row, head]] += of_logit.query;
        self.grad_kappa[[row, head]] += of_logit.kappa;
        let columns = head_columns(head, key_dim);
        let kv_columns = head_columns(kv_head, key_dim);
        let mut grad = self.grad_query.slice_mut(s![row, columns.clone()]);
        let grad = grad.as_slice_mut().expect("rows of our own");
        add_point(grad, of_logit.direction, &points.key.slices().row(key)[kv_columns]);
        let at = kv_head * num_keys + key;
        self.keys.key_radii[at] += of_logit.key;
        let padded = self.keys.key.len() / self.keys.key_radii.len();
        let grad = &mut self.keys.key[at * padded..][..key_dim];
        add_point(grad, of_logit.direction, &points.query.slices().row(query)[columns]);
        if let (Some(grad), Some(bias)) = (&mut self.grad_bias, softmax.bias) {
            let first = self.queries.start;
            let (query, index) = (query - first, pair.index - first * num_keys);
            let slot = bias.slot(Pair { query, index, ..pair }, head);
            grad.view_mut()[slot] += grad_logit;
        }
    }
}

/// Loads the queries of a block.
fn pack<F: Float>(
    problem: &HyperbolicProblem<'_, F>,
    points: &Points<F>,
    upstream: &Upstream<F>,
    block: &Block<'_, '_, F>,
    scratch: &mut Scratch<F>,
) {
    let Block { level, head, width, .. } = *block;
    let (key_dim, dim) = (problem.softmax.key_dim, problem.dim);
    let queries = || block.queries.clone();
    block.pack_queries(F::one(), &mut scratch.queries);
    for (rows, packed) in [
        (upstream.weights.slices(), &mut scratch.weights),
        (upstream.directions.slices(), &mut scratch.directions),
    ] {
        block.pack_transposed(rows, dim, F::one(), packed);
    }
    let panel = panel_len::<F>(level);
    let [padded_key, padded] = [key_dim, dim].map(|dim| dim.next_multiple_of(panel));
    let (one, query_rows, sum_rows) = (F::one(), &mut scratch.query_rows, &mut scratch.sum_rows);
    pack_rows(points.query.slices(), block, key_dim, padded_key, one, query_rows);
    pack_rows(upstream.sums.slices(), block, dim, padded, one, sum_rows);
    scratch.radii.fill(queries().map(|query| problem.query(query, head).array()));
    let heads = problem.softmax.heads;
    let terms = queries().map(|query| upstream.terms[query * heads + head]);
    // Lanes past the end are unused.
    let padding = iter::repeat(Terms::none());
    scratch.terms.fill(terms.chain(padding).take(width).map(Terms::array));
    scratch.grad_query.fill(F::zero());
    scratch.grad_radius.fill(F::zero());
    scratch.grad_kappa.fill(F::zero());
    scratch.grad_logits.fill(F::zero());
    scratch.dominant.fill(None);
}

/// Adds the gradient of the queries to `scratch`, the gradients of keys and values to `sums`, and writes
/// the gradients of the logits to `scratch.spreads`.
fn backward_tile<F: Float>(
    problem: &HyperbolicProblem<'_, F>,
    points: &Points<F>,
    upstream: &Upstream<F>,
    block: &Block<'_, '_, F>,
    tile: &Range<usize>,
    scratch: &mut Scratch<F>,
    sums: &mut KeySums<F>,
) {
    let Block { level, problem: softmax, head, width, .. } = *block;
    let panel = panel_len::<F>(level);
    let kv_head = softmax.kv_head(head);
    let (key_dim, dim) = (softmax.key_dim, problem.dim);
    let [padded_key, padded] = [key_dim, dim].map(|dim| dim.next_multiple_of(panel));
    let first_row = kv_head * softmax.inputs.num_keys() + tile.start;
    let keys = block.keys();
    let values = HeadRows::new(problem.directions.slices(), kv_head, dim);
    let len = tile.len();
    for columns in ranges(width, panel) {
        let column = columns.start;
        let [squared, products, spreads, bias, multipliers] = [
            &mut scratch.squared,
            &mut scratch.products,
            &mut scratch.spreads,
            &mut scratch.bias,
            &mut scratch.multipliers,
        ]
        .map(|numbers| &mut numbers[..len * width]);
        let right = |packed| Matrix::new(packed, width).skip_columns(column);
        let key = keys.left(tile.start);
        let value = values.left(tile.start);
        let out = Out::columns(squared, width, columns.clone());
        squared_distances(level, len, key, right(&scratch.queries[..]), out);
        let out = Out::columns(products, width, columns.clone());
        let weights = right(&scratch.weights[..]);
        rows_times(level, len, value, weights, Target::Overwrite, out);
        if !upstream.is_linear {
            let out = Out::columns(spreads, width, columns.clone());
            squared_distances(level, len, value, right(&scratch.directions[..]), out);
        }
        let lanes = block.lanes(&columns);
        if block.may_hide_in(&lanes, tile) {
            for bias in bias.chunks_exact_mut(width) {
                bias[column..column + panel].fill(F::zero());
            }
            block.restrict(lanes.clone(), tile, bias, &mut scratch.rows);
        }
        if softmax.has_dropout() {
            for multipliers in multipliers.chunks_exact_mut(width) {
                multipliers[column..column + panel].fill(F::one());
            }
            block.drop_out(lanes, tile, multipliers, &mut scratch.rows);
        }

        differentiate(problem, block, tile, column, scratch, sums);
    }
    let (squared, products) = (&scratch.squared[..len * width], &scratch.products[..len * width]);

    for (factors, rows, padded, sums) in [
        (squared, &scratch.sum_rows, padded, &mut sums.value),
        (products, &scratch.query_rows, padded_key, &mut sums.key),
    ] {
        let (left, right) = (Left::new(factors, width), Matrix::new(rows, padded));
        let sums = &mut sums[first_row * padded..];
        rows_times(level, len, left, right, Target::Add, Out::new(sums, padded));
    }
    let right = Matrix::new(products, width);
    let left = HeadRows::new(points.key.slices(), kv_head, key_dim).left(tile.start);
    columns_times(level, left, right, Target::Add, Out::new(&mut scratch.grad_query, width));
}

/// Computes the gradients of the pairs of a panel: writes the weights, the factors of the directions, and
/// the gradients of the logits to `squared`, `products` and `spreads`.
#[inline(never)]
fn differentiate<F: Float>(
    problem: &HyperbolicProblem<'_, F>,
    block: &Block<'_, '_, F>,
    tile: &Range<usize>,
    column: usize,
    scratch: &mut Scratch<F>,
    sums: &mut KeySums<F>,
) {
    #[inline(always)]
    fn run<S: Simd, F: Float>(
        simd: S,
        problem: &HyperbolicProblem<'_, F>,
        block: &Block<'_, '_, F>,
        tile: &Range<usize>,
        column: usize,
        scratch: &mut Scratch<F>,
        sums: &mut KeySums<F>,
    ) {
        let Block { problem: softmax, head, width, .. } = *block;
        let lanes = block.lanes(&(column..column + panel_width::<S, F>()));
        let may_hide = block.may_hide_in(&lanes, tile);
        let len = tile.len();
        let first_row = softmax.kv_head(head) * softmax.inputs.num_keys() + tile.start;
        let (squared, products, spreads) = (
            &mut scratch.squared[..len * width],
            &mut scratch.products[..len * width],
            &mut scratch.spreads[..len * width],
        );
        let (bias, multipliers) =
            (&scratch.bias[..len * width], &scratch.multipliers[..len * width]);
        let vector_len = Vector::<S, F>::LEN;
        for half in 0..2 {
            let at = column + half * vector_len;
            let query = Radius::of(scratch.radii.load(simd, at));
            let terms = Terms::of(scratch.terms.load(simd, at));
            let from = |data: &[F]| Vector::<S, F>::from_slice(simd, &data[..vector_len]);
            let mut grad_radius = from(&scratch.grad_radius[at..]);
            let mut grad_kappa = from(&scratch.grad_kappa[at..]);
            let mut grad_logits = from(&scratch.grad_logits[at..]);
            for k in 0..len {
                let place = k * width + at;
                let point = problem.key_at(tile.start + k, head);
                let pairs = Pairs {
                    query,
                    key: Radius::of(splat_all(simd, problem.key[point].array())),
                    mass: Mass::of(splat_all(simd, problem.masses[point].array())),
                    terms,
                    squared: from(&squared[place..]),
                    product: from(&products[place..]),
                    spread: from(&spreads[place..]),
                    bias: match may_hide {
                        true => from(&bias[place..]),
                        false => Vector::<S, F>::splat(simd, F::zero()),
                    },
                    multiplier: match softmax.has_dropout() {
                        true => from(&multipliers[place..]),
                        false => Vector::<S, F>::splat(simd, F::one()),
                    },
                    dominant_logit: Vector::<S, F>::splat(simd, F::zero()),
                };
                let PairGradients {
                    weight,
                    logit,
                    direction,
                    query,
                    key,
                    value,
                    factor,
                    mut dominates,
                } = vjp::<S, F>(
                    simd,
                    &pairs,
                    problem.kappa,
                    problem.factor(),
                    scratch.least_dominant,
                );
                grad_logits += logit;
                while dominates != 0 {
                    let lane = dominates.trailing_zeros() as usize;
                    scratch.dominant[at + lane] = Some(tile.start + k);
                    dominates &= dominates - 1;
                }
                weight.store_slice(&mut squared[place..place + vector_len]);
                direction.store_slice(&mut products[place..place + vector_len]);
                logit.store_slice(&mut spreads[place..place + vector_len]);
                grad_radius += query;
                grad_kappa += factor;
                sums.key_radii[first_row + k] += key.reduce_sum();
                sums.value_radii[first_row + k] += value.reduce_sum();
            }
            grad_radius.store_slice(&mut scratch.grad_radius[at..at + vector_len]);
            grad_kappa.store_slice(&mut scratch.grad_kappa[at..at + vector_len]);
            grad_logits.store_slice(&mut scratch.grad_logits[at..at + vector_len]);
        }
    }
    dispatch!(block.level, simd => {
        run(simd, problem, block, tile, column, scratch, sums);
    });
}
