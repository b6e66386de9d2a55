//! The backward pass, generic over how a mechanism differentiates tiles.

use super::{
    BLOCKS_OF_PART, Block, HeadRows, MaskedTiles, PARTS, TileSizes, TileVjp, block, clip,
    heads_differ, split_bias,
};
use crate::gradients::PartOfBias;
use crate::inputs::{head_columns, hull};
use crate::kernels::Float;
use crate::kernels::parallel::{self, Rest, parts_of_work, ranges};
use crate::kernels::primitives::buffer::Buffer;
use crate::kernels::primitives::matmul::{
    Left, Matrix, Out, Target, columns_times, panel_len, rows_times,
};
use crate::kernels::problem::{Problem, Slices};
use crate::kernels::score::Scoring;
use fearless_simd::Level;
use ndarray::{Array2, ArrayView1, ArrayViewMut2, ArrayViewMut3, s};
use std::ops::Range;

/// The arrays to which a backward pass adds, `None` where no gradient is wanted.
pub(in super::super) struct Targets<'g, F> {
    pub(in super::super) query: Option<ArrayViewMut2<'g, F>>,
    pub(in super::super) key: Option<ArrayViewMut2<'g, F>>,
    pub(in super::super) value: Option<ArrayViewMut2<'g, F>>,
    pub(in super::super) bias: Option<ArrayViewMut3<'g, F>>,
    pub(in super::super) pair_weights: Option<ArrayViewMut2<'g, F>>,
    /// More gradients of a mechanism: arrays of queries × heads, and of keys × kv_heads.
    pub(in super::super) of_queries: Vec<ArrayViewMut2<'g, F>>,
    pub(in super::super) of_keys: Vec<ArrayViewMut2<'g, F>>,
}

/// The rows whose weighted sums are gradients.
pub(in super::super) struct Summed<'r, F> {
    /// Σ over the queries for the gradient of a key, and over the keys for that of a query. Both gradients are
    /// multiplied by `scale`.
    pub(in super::super) query: Slices<'r, F>,
    pub(in super::super) key: Slices<'r, F>,
    pub(in super::super) scale: F,
    /// Σ over the queries for the gradient of a value.
    pub(in super::super) grad_out: Slices<'r, F>,
    pub(in super::super) value_dim: usize,
}

/// The outputs of one task of a backward pass.
pub(in super::super) struct BackwardPart<'g, F: Float> {
    pub(in super::super) queries: Range<usize>,
    pub(in super::super) grad_query: ArrayViewMut2<'g, F>,
    pub(in super::super) of_queries: Vec<ArrayViewMut2<'g, F>>,
    pub(in super::super) grad_bias: Option<PartOfBias<'g, F>>,
    pub(in super::super) grad_pair_weights: Option<ArrayViewMut2<'g, F>>,
    pub(in super::super) keys: KeyGradients<F>,
    /// With respect to the parameters of the score function.
    pub(in super::super) params: Vec<f64>,
}

/// Gradients of the keys and values that a part of the queries may see: for each head, rows of padded
/// length.
pub(in super::super) struct KeyGradients<F: Float> {
    keys: Range<usize>,
    key: Buffer<F>,
    value: Buffer<F>,
    padded: [usize; 2],
    /// A number for each row.
    pub(in super::super) of_keys: Vec<Vec<F>>,
}

impl<F: Float> KeyGradients<F> {
    /// Creates zeros for some keys, with rows of padded length and so many numbers for each.
    fn zeros(
        num_kv_heads: usize,
        keys: Range<usize>,
        padded: [usize; 2],
        num_numbers: usize,
    ) -> Self {
        let num_rows = num_kv_heads * keys.len();
        let [key, value] = padded.map(|padded| Buffer::zeros(num_rows * padded));
        let of_keys = vec![vec![F::zero(); num_rows]; num_numbers];
        Self { keys, key, value, padded, of_keys }
    }

    /// Returns the number of the row of a key.
    pub(in super::super) fn row(&self, kv_head: usize, key: usize) -> usize {
        kv_head * self.keys.len() + key - self.keys.start
    }

    /// Returns the gradients of keys and values, from a row on.
    pub(in super::super) fn rows_from(&mut self, row: usize) -> [&mut [F]; 2] {
        let [key, value] = self.padded.map(|padded| row * padded);
        [&mut self.key[key..], &mut self.value[value..]]
    }

    /// Returns the gradients of a key and its value.
    pub(in super::super) fn row_mut(&mut self, row: usize) -> [&mut [F]; 2] {
        let [key, value] = self.padded;
        let [of_key, of_value] = self.rows_from(row);
        [&mut of_key[..key], &mut of_value[..value]]
    }
}

/// Buffers of a backward pass, used for one block at a time.
struct Scratch<F: Float> {
    /// The right factors of the gradients of keys and values, width × padded columns.
    query_rows: Buffer<F>,
    grad_out_rows: Buffer<F>,
    /// keys × width: the factors of the gradients of values, and of those of queries and keys.
    weights: Buffer<F>,
    factors: Buffer<F>,
    /// key_dim × width.
    grad_query: Buffer<F>,
}

/// Adds the gradients to the targets. Returns those of the parameters of the score function.
pub(in super::super) fn backward<'p, F: Float, C: TileVjp<'p, F>>(
    of_scorer: &'p C::Problem,
    sizes: TileSizes,
    level: Level,
    mut targets: Targets<'_, F>,
) -> Vec<f64> {
    let problem = C::softmax(of_scorer);
    let summed = C::summed(of_scorer);
    let num_params = problem.scoring.as_ref().map_or(0, Scoring::num_params);
    let sizes = clip(problem, sizes);
    let blocks = problem.inputs.num_queries().div_ceil(sizes.queries);
    let num_parts = (blocks / BLOCKS_OF_PART).clamp(1, PARTS);
    let parts = parts_of_work(problem.inputs.num_queries(), sizes.queries, num_parts, |block| {
        problem.num_visible_keys(&block)
    });
    let mut unasked = Array2::zeros((0, 0));
    let grad_query = targets.query.take().unwrap_or_else(|| {
        unasked = Array2::zeros(problem.inputs.query().raw_dim());
        unasked.view_mut()
    });
    let mut grad_query = Rest::new(grad_query);
    let mut of_queries: Vec<_> = targets.of_queries.into_iter().map(Rest::new).collect();
    let mut pair_weights = targets.pair_weights.map(Rest::new);
    let grad_biases = split_bias(problem, targets.bias.as_mut(), &parts);
    let num_keys = problem.inputs.num_keys();
    let panel = panel_len::<F>(level);
    let padded = [problem.key_dim, summed.value_dim].map(|columns| columns.next_multiple_of(panel));
    let num_kv_heads = problem.inputs.num_kv_heads();
    let num_numbers = targets.of_keys.len();
    let mut parts: Vec<_> = (parts.into_iter().zip(grad_biases))
        .map(|(queries, grad_bias)| {
            let len = queries.len();
            let pair_weights = pair_weights.as_mut().map(|rest| rest.take(len * num_keys));
            BackwardPart {
                grad_query: grad_query.take(len),
                of_queries: of_queries.iter_mut().map(|rest| rest.take(len)).collect(),
                queries,
                grad_bias,
                grad_pair_weights: pair_weights,
                // Each part finds out which keys it sees.
                keys: KeyGradients::zeros(num_kv_heads, 0..0, padded, num_numbers),
                params: vec![0.0; num_params],
            }
        })
        .collect();
    let tasks = parts.iter_mut().collect();
    parallel::for_each(tasks, problem.work(), |part: &mut BackwardPart<'_, F>| {
        backward_part::<_, C>(level, of_scorer, &summed, sizes, part);
    });

    let mut params = vec![0.0; num_params];
    let dims = [problem.key_dim, summed.value_dim];
    for part in &parts {
        let KeyGradients { keys, key, value, of_keys, .. } = &part.keys;
        let rows = s![keys.clone(), ..];
        let vectors = [&mut targets.key, &mut targets.value].into_iter().zip([key, value]);
        for ((target, sums), (padded, dim)) in vectors.zip(padded.into_iter().zip(dims)) {
            if let Some(target) = target {
                add_head_rows(sums, padded, dim, target.slice_mut(rows));
            }
        }
        for (target, sums) in targets.of_keys.iter_mut().zip(of_keys) {
            add_head_rows(sums, 1, 1, target.slice_mut(rows));
        }
        params.iter_mut().zip(&part.params).for_each(|(sum, of_part)| *sum += of_part);
    }
    let shared: Vec<_> = parts.into_iter().filter_map(|part| part.grad_bias?.into_copy()).collect();
    if let Some(grad) = &mut targets.bias {
        shared.iter().for_each(|rows| *grad += rows);
    }
    params
}

/// Adds rows of padded length, head after head, to the head's columns of a matrix.
fn add_head_rows<F: Float>(rows: &[F], padded: usize, dim: usize, mut sum: ArrayViewMut2<'_, F>) {
    let of_head = (padded * sum.nrows()).max(1);
    for (head, rows) in rows.chunks(of_head).enumerate() {
        let mut sum = sum.slice_mut(s![.., head_columns(head, dim)]);
        for (mut sum, row) in sum.rows_mut().into_iter().zip(rows.chunks(padded.max(1))) {
            match sum.as_slice_mut() {
                // Faster for a few columns than the sum of two views.
                Some(sum) => sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += x),
                None => sum += &ArrayView1::from(&row[..dim]),
            }
        }
    }
}

fn backward_part<'p, F: Float, C: TileVjp<'p, F>>(
    level: Level,
    of_scorer: &'p C::Problem,
    summed: &Summed<'_, F>,
    sizes: TileSizes,
    part: &mut BackwardPart<'_, F>,
) {
    let problem = C::softmax(of_scorer);
    let width = sizes.queries.next_multiple_of(panel_len::<F>(level));
    let padded = part.keys.padded;
    let mut scratch = Scratch {
        query_rows: Buffer::zeros(width * padded[0]),
        grad_out_rows: Buffer::zeros(width * padded[1]),
        weights: Buffer::zeros(sizes.keys * width),
        factors: Buffer::zeros(sizes.keys * width),
        grad_query: Buffer::zeros(problem.key_dim * width),
    };
    let mut scorer = C::new(of_scorer, width, sizes.keys);
    let blocks: Vec<_> = ranges(part.queries.len(), sizes.queries).collect();
    let mut masked: Vec<_> = blocks.iter().map(|_| MaskedTiles::default()).collect();
    let keys = visible_keys(level, problem, sizes.keys, &part.queries, &blocks, &mut masked);
    let (num_kv_heads, num_numbers) = (problem.inputs.num_kv_heads(), part.keys.of_keys.len());
    part.keys = KeyGradients::zeros(num_kv_heads, keys, padded, num_numbers);
    for (rows, masked) in blocks.into_iter().zip(&mut masked) {
        for head in 0..problem.heads {
            let block = block(level, problem, head, &part.queries, &rows);
            masked.find(&block, sizes.keys);
            backward_block(&block, &mut scorer, summed, sizes.keys, masked, &mut scratch, part);
            let columns = head_columns(head, problem.key_dim);
            let sum = part.grad_query.slice_mut(s![rows.clone(), columns]);
            block.add_lanes(summed.scale, &scratch.grad_query, sum);
            scorer.finish(&block, part);
        }
    }
}

/// Returns a range of all keys that the blocks of a part see; only their gradients take memory.
fn visible_keys<F: Float>(
    level: Level,
    problem: &Problem<'_, F>,
    keys_per_tile: usize,
    queries: &Range<usize>,
    blocks: &[Range<usize>],
    masked: &mut [MaskedTiles],
) -> Range<usize> {
    let mut seen: Option<Range<usize>> = None;
    for (rows, masked) in blocks.iter().zip(masked) {
        let block = block(level, problem, 0, queries, rows);
        // What one head sees says nothing of the others.
        let shown = (!heads_differ(problem)).then(|| {
            masked.find(&block, keys_per_tile);
            masked.keys()
        });
        let keys = shown.flatten().unwrap_or_else(|| block.visible_keys(&(0..rows.len())));
        if !keys.is_empty() {
            seen = Some(seen.map_or(keys.clone(), |seen| hull(&seen, &keys)));
        }
    }
    seen.unwrap_or(0..0)
}

/// Writes the gradient of the queries, without the scale, to `scratch`; adds the gradients of keys,
/// values and bias to the part.
fn backward_block<'p, F: Float, C: TileVjp<'p, F>>(
    block: &Block<'_, '_, F>,
    scorer: &mut C,
    summed: &Summed<'_, F>,
    keys_per_tile: usize,
    masked: &MaskedTiles,
    scratch: &mut Scratch<F>,
    part: &mut BackwardPart<'_, F>,
) {
    let Block { level, problem, head, width, .. } = *block;
    let kv_head = problem.kv_head(head);
    let padded = part.keys.padded;
    let keys = HeadRows::new(summed.key, kv_head, problem.key_dim);
    let Scratch { query_rows, grad_out_rows, weights, factors, grad_query } = scratch;
    scorer.begin(block);
    pack_rows(summed.query, block, problem.key_dim, padded[0], summed.scale, query_rows);
    pack_rows(summed.grad_out, block, summed.value_dim, padded[1], F::one(), grad_out_rows);
    grad_query.fill(F::zero());

    for (number, tile) in block.tiles(keys_per_tile).enumerate() {
        // What each strip sees. Keys and strips at the ends that see nothing are left out.
        let see = |columns| block.strip_of_tile(masked, columns, (number, &tile));
        let seen = block.strips().map(see).filter(|strip| !strip.keys.is_empty());
        let Some((tile, whole)) = seen.fold(None, |whole, strip| {
            Some(match whole {
                None => (strip.keys, strip.columns),
                Some((tile, before)) => (hull(&tile, &strip.keys), hull(&before, &strip.columns)),
            })
        }) else {
            continue;
        };
        let weights = &mut weights[..tile.len() * width];
        let factors = &mut factors[..tile.len() * width];
        let strips = block.strips().filter(|columns| whole.contains(&columns.start));
        for mut strip in strips.map(see) {
            let columns = strip.columns.clone();
            let start = strip.keys.start.clamp(tile.start, tile.end);
            strip.keys = start..strip.keys.end.clamp(start, tile.end);
            let seen = &strip.keys;
            for k in (tile.start..seen.start).chain(seen.end..tile.end) {
                let first = (k - tile.start) * width;
                weights[first..][columns.clone()].fill(F::zero());
                factors[first..][columns.clone()].fill(F::zero());
            }
            if seen.is_empty() {
                continue;
            }
            let entries = (seen.start - tile.start) * width..(seen.end - tile.start) * width;
            let of_strip = [&mut weights[entries.clone()], &mut factors[entries.clone()]];
            scorer.differentiate(block, &strip, of_strip, part);
            // dQ += Fᵀ K
            let right = Matrix::new(&factors[entries], width).skip_columns(columns.start);
            let out = Out::columns(grad_query, width, columns);
            columns_times(level, keys.left(strip.keys.start), right, Target::Add, out);
        }

        // dK += F Q and dV += P̃ G
        let [of_keys, of_values] = part.keys.rows_from(part.keys.row(kv_head, tile.start));
        for (factors, rows, padded, sums) in [
            (&*weights, &*grad_out_rows, padded[1], of_values),
            (&*factors, &*query_rows, padded[0], of_keys),
        ] {
            let left = Matrix::new(factors, width).skip_columns(whole.start);
            let left = Left { rows: left, len: whole.len() };
            let right = Matrix::new(&rows[whole.start * padded..], padded);
            rows_times(level, tile.len(), left, right, Target::Add, Out::new(sums, padded));
        }
        scorer.finish_tile(block, &tile, [weights, factors], grad_query, part);
    }
}

/// Overwrites `packed`, width × padded, with `factor` × a head's rows of a block, and zeros.
fn pack_rows<F: Float>(
    rows: Slices<'_, F>,
    block: &Block<'_, '_, F>,
    dim: usize,
    padded: usize,
    factor: F,
    packed: &mut [F],
) {
    packed.fill(F::zero());
    let rows = HeadRows::new(rows, block.head, dim);
    for (packed, query) in packed.chunks_exact_mut(padded.max(1)).zip(block.queries.clone()) {
        packed
            .iter_mut()
            .zip(rows.row(query))
            .for_each(|(packed, &value)| *packed = factor * value);
    }
}
