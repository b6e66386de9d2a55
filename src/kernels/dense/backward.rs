use super::{
    BLOCKS_OF_PART, Block, HeadRows, MaskedTiles, PARTS, TileSizes, block, clip, heads_differ,
    split_bias,
};
use crate::gradients::{GradientsMut, PartOfBias};
use crate::inputs::{head_columns, hull};
use crate::kernels::Float;
use crate::kernels::parallel::{self, Rest, parts_of_work, ranges, row_chunks};
use crate::kernels::primitives::buffer::Buffer;
use crate::kernels::primitives::exp::exp;
use crate::kernels::primitives::matmul::{
    Left, Matrix, Out, Target, columns_times, load, panel_len, panel_width, rows_times, splat,
    store,
};
use crate::kernels::problem::{FiniteRows, Problem, Slices, Upstream};
use crate::kernels::score::{Scoring, StripScratch};
use fearless_simd::{Level, Select, Simd, SimdBase, SimdFloat};
use ndarray::{Array2, ArrayView1, ArrayViewMut2, s};
use std::ops::Range;

/// The inputs of the backward pass, and the factors of weights and logit gradients.
struct Operands<'r, F: Clone> {
    upstream: Upstream<'r, F>,
    query: FiniteRows<'r, F>,
    key: FiniteRows<'r, F>,
    grad_out: FiniteRows<'r, F>,
}

/// Buffers of a backward pass, used for one block at a time.
struct BackwardScratch<F: Float> {
    /// key_dim × width, and width × padded key_dim.
    queries: Buffer<F>,
    query_rows: Buffer<F>,
    /// value_dim × width, and width × padded value_dim.
    out: Buffer<F>,
    grad_out: Buffer<F>,
    grad_out_rows: Buffer<F>,
    /// keys × width: P̃ and dS.
    weights: Buffer<F>,
    grad_scores: Buffer<F>,
    /// The gradients of the weights of pairs, if wanted.
    of_pair_weights: Buffer<F>,
    /// For numbers that are added to scores or multiply weights.
    rows: Vec<F>,
    strip: StripScratch<F>,
    /// m, 1/l and δ; +∞, 0 and 0 for unused lanes, so that their weights are 0.
    shifts: Buffer<F>,
    inverses: Buffer<F>,
    deltas: Buffer<F>,
    /// key_dim × width.
    grad_query: Buffer<F>,
}

/// Gradients of the keys and values that a part of the queries may see: for each head, rows of padded
/// length.
struct KeyGradients<F: Float> {
    keys: Range<usize>,
    key: Buffer<F>,
    value: Buffer<F>,
}

/// The outputs of one task of a backward pass.
struct BackwardPart<'g, F: Float> {
    queries: Range<usize>,
    grad_query: ArrayViewMut2<'g, F>,
    grad_bias: Option<PartOfBias<'g, F>>,
    grad_pair_weights: Option<ArrayViewMut2<'g, F>>,
    keys: KeyGradients<F>,
    /// With respect to the parameters of the score function.
    params: Vec<f64>,
}

/// Adds the gradients, given the outputs and normalizer of the forward pass. Returns those of the parameters of the
/// score function.
pub(in super::super) fn backward<F: Float>(
    problem: &Problem<'_, F>,
    sizes: TileSizes,
    level: Level,
    upstream: Upstream<'_, F>,
    grads: &mut GradientsMut<'_, F>,
) -> Vec<f64> {
    let num_params = problem.scoring.as_ref().map_or(0, Scoring::num_params);
    let sizes = clip(problem, sizes);
    // A query without a visible key hides all of its pairs.
    let may_hide = problem.may_hide() || upstream.normalizer.has_empty_rows();
    let operands = Operands {
        upstream,
        query: FiniteRows::new(problem.query.slices(), may_hide),
        key: FiniteRows::new(problem.key.slices(), may_hide),
        grad_out: FiniteRows::new(upstream.grad_out, may_hide),
    };

    let blocks = problem.inputs.num_queries().div_ceil(sizes.queries);
    let num_parts = (blocks / BLOCKS_OF_PART).clamp(1, PARTS);
    let parts = parts_of_work(problem.inputs.num_queries(), sizes.queries, num_parts, |block| {
        problem.num_visible_keys(&block)
    });
    let mut unasked;
    let grad_query = match &mut grads.query {
        Some(grad) => grad.view_mut(),
        None => {
            unasked = Array2::zeros(problem.inputs.query().raw_dim());
            unasked.view_mut()
        }
    };
    let grad_queries = row_chunks(grad_query, parts.iter().map(Range::len));
    let grad_biases = split_bias(problem, grads.bias.as_mut(), &parts);
    let num_keys = problem.inputs.num_keys();
    let mut pair_weights = grads.pair_weights.as_mut().map(|grad| Rest::new(grad.view_mut()));
    let mut parts: Vec<_> = (parts.iter().cloned().zip(grad_queries).zip(grad_biases))
        .map(|((queries, grad_query), grad_bias)| {
            let num_pairs = queries.len() * num_keys;
            let grad_pair_weights = pair_weights.as_mut().map(|rest| rest.take(num_pairs));
            // Each part finds out which keys it sees.
            let keys = KeyGradients { keys: 0..0, key: Buffer::zeros(0), value: Buffer::zeros(0) };
            let params = vec![0.0; num_params];
            BackwardPart { queries, grad_query, grad_bias, grad_pair_weights, keys, params }
        })
        .collect();
    let tasks = parts.iter_mut().collect();
    parallel::for_each(tasks, problem.work(), |part: &mut BackwardPart<'_, F>| {
        backward_part(level, problem, &operands, sizes, part);
    });

    let panel = panel_len::<F>(level);
    let padded = [problem.key_dim, problem.value_dim].map(|dim| dim.next_multiple_of(panel));
    for part in &parts {
        let rows = s![part.keys.keys.clone(), ..];
        if let Some(grad) = &mut grads.key {
            add_head_rows(&part.keys.key, padded[0], problem.key_dim, grad.slice_mut(rows));
        }
        if let Some(grad) = &mut grads.value {
            add_head_rows(&part.keys.value, padded[1], problem.value_dim, grad.slice_mut(rows));
        }
    }
    let mut params = vec![0.0; num_params];
    for part in &parts {
        params.iter_mut().zip(&part.params).for_each(|(sum, of_part)| *sum += of_part);
    }
    let shared: Vec<_> = parts.into_iter().filter_map(|part| part.grad_bias?.into_copy()).collect();
    if let Some(grad) = &mut grads.bias {
        shared.iter().for_each(|rows| *grad += rows);
    }
    params
}

/// Adds rows of padded length, head after head, to the head's columns of a matrix.
pub(in super::super) fn add_head_rows<F: Float>(
    rows: &[F],
    padded: usize,
    dim: usize,
    mut sum: ArrayViewMut2<'_, F>,
) {
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

fn backward_part<F: Float>(
    level: Level,
    problem: &Problem<'_, F>,
    operands: &Operands<'_, F>,
    sizes: TileSizes,
    part: &mut BackwardPart<'_, F>,
) {
    let panel = panel_len::<F>(level);
    let width = sizes.queries.next_multiple_of(panel);
    let tile = sizes.keys * width;
    let [padded_key, padded_value] =
        [problem.key_dim, problem.value_dim].map(|dim| dim.next_multiple_of(panel));
    let mut scratch = BackwardScratch {
        queries: Buffer::zeros(problem.key_dim * width),
        query_rows: Buffer::zeros(width * padded_key),
        grad_out: Buffer::zeros(problem.value_dim * width),
        out: Buffer::zeros(problem.value_dim * width),
        grad_out_rows: Buffer::zeros(width * padded_value),
        weights: Buffer::zeros(tile),
        grad_scores: Buffer::zeros(tile),
        of_pair_weights: Buffer::zeros(if part.grad_pair_weights.is_some() { tile } else { 0 }),
        rows: Vec::new(),
        strip: StripScratch::default(),
        shifts: Buffer::zeros(width),
        inverses: Buffer::zeros(width),
        deltas: Buffer::zeros(width),
        grad_query: Buffer::zeros(problem.key_dim * width),
    };
    let blocks: Vec<_> = ranges(part.queries.len(), sizes.queries).collect();
    let mut masked: Vec<_> = blocks.iter().map(|_| MaskedTiles::default()).collect();
    let keys = visible_keys(level, problem, sizes.keys, &part.queries, &blocks, &mut masked);
    let num_rows = problem.inputs.num_kv_heads() * keys.len();
    part.keys = KeyGradients {
        keys,
        key: Buffer::zeros(num_rows * padded_key),
        value: Buffer::zeros(num_rows * padded_value),
    };
    for (rows, masked) in blocks.into_iter().zip(&mut masked) {
        for head in 0..problem.heads {
            let block = block(level, problem, head, &part.queries, &rows);
            masked.find(&block, sizes.keys);
            backward_block(&block, operands, sizes.keys, masked, &mut scratch, part);
            // s = scale q·k
            let columns = head_columns(head, problem.key_dim);
            let sum = part.grad_query.slice_mut(s![rows.clone(), columns]);
            block.add_lanes(problem.scale, &scratch.grad_query, sum);
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
fn backward_block<F: Float>(
    block: &Block<'_, '_, F>,
    operands: &Operands<'_, F>,
    keys_per_tile: usize,
    masked: &MaskedTiles,
    scratch: &mut BackwardScratch<F>,
    part: &mut BackwardPart<'_, F>,
) {
    let Block { level, problem, head, width, .. } = *block;
    let BackwardPart { queries, keys: sums, grad_bias, grad_pair_weights, params, .. } = part;
    let first_query = queries.start;
    let panel = panel_len::<F>(level);
    let kv_head = problem.kv_head(head);
    let (key_dim, value_dim) = (problem.key_dim, problem.value_dim);
    let keys = block.keys();
    let finite_keys = HeadRows::new(operands.key.slices(), kv_head, key_dim);
    let values = HeadRows::new(problem.value.slices(), kv_head, value_dim);
    let [padded_key, padded_value] = [key_dim, value_dim].map(|dim| dim.next_multiple_of(panel));
    let (first_row, first_key) = (kv_head * sums.keys.len(), sums.keys.start);

    let Upstream { out, grad_out, .. } = operands.upstream;
    block.pack_queries(problem.scale, &mut scratch.queries);
    block.pack_transposed(grad_out, value_dim, F::one(), &mut scratch.grad_out);
    block.pack_transposed(out, value_dim, F::one(), &mut scratch.out);
    pack_rows(
        operands.query.slices(),
        block,
        key_dim,
        padded_key,
        problem.scale,
        &mut scratch.query_rows,
    );
    pack_rows(
        operands.grad_out.slices(),
        block,
        value_dim,
        padded_value,
        F::one(),
        &mut scratch.grad_out_rows,
    );
    scratch.shifts.fill(F::infinity());
    scratch.inverses.fill(F::zero());
    for (lane, query) in block.queries.clone().enumerate() {
        [scratch.shifts[lane], scratch.inverses[lane]] =
            operands.upstream.normalizer.factors(query, head);
    }
    // δ = g·o, by the same steps as g·v: with only one visible key o is v, and ds is 0.
    let BackwardScratch { out, grad_out, deltas, .. } = &mut *scratch;
    column_products(level, width, value_dim, [out, grad_out], deltas);
    for (query, delta) in block.queries.clone().zip(deltas.iter_mut()) {
        *delta += operands.upstream.more_delta(query, head);
    }
    scratch.grad_query.fill(F::zero());

    for (number, tile) in block.tiles(keys_per_tile).enumerate() {
        // What each strip sees. Keys and strips at the ends that see nothing are left out.
        let see = |columns| {
            let lanes = block.lanes(&columns);
            let (keys, may_hide) = block.visible_in(masked, &lanes, (number, &tile));
            (columns, lanes, keys, may_hide)
        };
        let seen = block.strips().map(see).filter(|(_, _, keys, _)| !keys.is_empty());
        let Some((tile, whole)) = seen.fold(None, |whole, (columns, _, keys, _)| {
            Some(match whole {
                None => (keys, columns),
                Some((tile, before)) => (hull(&tile, &keys), hull(&before, &columns)),
            })
        }) else {
            continue;
        };
        let weights = &mut scratch.weights[..tile.len() * width];
        let grad_scores = &mut scratch.grad_scores[..tile.len() * width];
        let strips = block.strips().filter(|columns| whole.contains(&columns.start));
        for (columns, lanes, seen, may_hide) in strips.map(see) {
            let column = columns.start;
            let start = seen.start.clamp(tile.start, tile.end);
            let seen = start..seen.end.clamp(start, tile.end);
            for k in (tile.start..seen.start).chain(seen.end..tile.end) {
                let first = (k - tile.start) * width;
                weights[first..][columns.clone()].fill(F::zero());
                grad_scores[first..][columns.clone()].fill(F::zero());
            }
            if seen.is_empty() {
                continue;
            }
            let entries = (seen.start - tile.start) * width..(seen.end - tile.start) * width;
            let weights = &mut weights[entries.clone()];
            let grad_scores = &mut grad_scores[entries];

            // S = K Qᵀ and dP̃ = V Gᵀ
            for (rows, packed, out) in [
                (keys, &scratch.queries, &mut *weights),
                (values, &scratch.grad_out, &mut *grad_scores),
            ] {
                let right = Matrix::new(packed, width).skip_columns(column);
                let out = Out::columns(out, width, columns.clone());
                rows_times(level, seen.len(), rows.left(seen.start), right, Target::Overwrite, out);
            }
            if let Some(scoring) = &problem.scoring {
                block.strip(&lanes, &seen).apply(problem, scoring, weights, &mut scratch.strip);
            }
            if may_hide {
                block.restrict(lanes.clone(), &seen, weights, &mut scratch.rows);
            }

            // dP = m w dP̃, and for now m dP̃ as the gradient of w.
            block.drop_out(lanes.clone(), &seen, grad_scores, &mut scratch.rows);
            let of_pair_weights = grad_pair_weights.as_ref().map(|_| {
                let of_pair_weights = &mut scratch.of_pair_weights[..grad_scores.len()];
                of_pair_weights.copy_from_slice(grad_scores);
                of_pair_weights
            });
            block.multiply_by_pair_weights(lanes.clone(), &seen, grad_scores, &mut scratch.rows);

            // P = e^{S − m} / l, dS = P (dP − δ)
            let terms = [&scratch.shifts, &scratch.inverses, &scratch.deltas];
            let terms = terms.map(|terms| &terms[columns.clone()]);
            weights_and_logits_vjp(level, width, column, weights, grad_scores, terms);
            // dW = m P dP̃
            if let (Some(grads), Some(sums)) = (of_pair_weights, &mut *grad_pair_weights) {
                grads.iter_mut().zip(&*weights).for_each(|(grad, &weight)| *grad *= weight);
                let lanes = lanes.clone();
                block.add_pair_weight_gradients(lanes, &seen, grads, first_query, sums);
            }
            // P̃ = m w P
            block.multiply(lanes.clone(), &seen, weights, &mut scratch.rows);
            if let Some(grad) = grad_bias {
                let grad = &mut grad.view_mut();
                block.add_bias_gradients(lanes.clone(), &seen, grad_scores, first_query, grad);
            }
            if let Some(scoring) = &problem.scoring {
                let strip = block.strip(&lanes, &seen);
                strip.vjp(problem, scoring, grad_scores, &mut scratch.strip, params);
            }
            // dQ += dS K
            let right = Matrix::new(grad_scores, width).skip_columns(column);
            let out = Out::columns(&mut scratch.grad_query, width, columns);
            columns_times(level, finite_keys.left(seen.start), right, Target::Add, out);
        }

        // dV += P̃ᵀ G, dK += dSᵀ (scale Q)
        for (factors, rows, padded, sums) in [
            (&*weights, &scratch.grad_out_rows, padded_value, &mut sums.value),
            (&*grad_scores, &scratch.query_rows, padded_key, &mut sums.key),
        ] {
            let left = Matrix::new(factors, width).skip_columns(whole.start);
            let left = Left { rows: left, len: whole.len() };
            let right = Matrix::new(&rows[whole.start * padded..], padded);
            let sums = &mut sums[(first_row + tile.start - first_key) * padded..];
            rows_times(level, tile.len(), left, right, Target::Add, Out::new(sums, padded));
        }

        // Values that are not finite, pair by pair.
        let lanes_of = |bad: &[usize]| -> Vec<usize> {
            let queries = bad.iter().filter(|query| block.queries.contains(query));
            let lanes = queries.map(|query| query - block.queries.start);
            lanes.filter(|&lane| scratch.shifts[lane] != F::infinity()).collect()
        };
        let not_finite = |x: &(usize, &F)| !x.1.is_finite();
        let bad = lanes_of(&operands.grad_out.bad);
        block.for_each_visible(bad.into_iter(), tile.clone(), |lane, key| {
            let weight = weights[(key - tile.start) * width + lane];
            let grad = operands.upstream.grad_out.row(block.queries.start + lane);
            let grad = grad[head_columns(head, value_dim)].iter().enumerate();
            for (c, &grad) in grad.filter(not_finite) {
                sums.value[(first_row + key - first_key) * padded_value + c] += weight * grad;
            }
        });
        let bad = lanes_of(&operands.query.bad);
        block.for_each_visible(bad.into_iter(), tile.clone(), |lane, key| {
            let grad_score = problem.scale * grad_scores[(key - tile.start) * width + lane];
            let query = problem.query(block.queries.start + lane, head).iter().enumerate();
            for (c, &query) in query.filter(not_finite) {
                sums.key[(first_row + key - first_key) * padded_key + c] += grad_score * query;
            }
        });
        let bad = operands.key.bad.iter().copied().filter(|key| tile.contains(key));
        let lanes = 0..block.queries.len();
        let live = lanes.filter(|&lane| scratch.shifts[lane] != F::infinity());
        block.for_each_visible(live.collect::<Vec<_>>().into_iter(), bad, |lane, key| {
            let grad_score = grad_scores[(key - tile.start) * width + lane];
            for (c, &key) in problem.key(key, head).iter().enumerate().filter(not_finite) {
                scratch.grad_query[c * width + lane] += grad_score * key;
            }
        });
    }
}

/// Overwrites `sums` with Σ a b over the rows of two matrices, columns × width, lane by lane.
#[inline(never)]
fn column_products<F: Float>(
    level: Level,
    width: usize,
    num_rows: usize,
    [a, b]: [&[F]; 2],
    sums: &mut [F],
) {
    #[inline(always)]
    fn run<S: Simd, F: Float>(
        simd: S,
        width: usize,
        num_rows: usize,
        [a, b]: [&[F]; 2],
        sums: &mut [F],
    ) {
        for column in (0..width).step_by(panel_width::<S, F>()) {
            let mut sum = splat::<S, F>(simd, F::zero());
            for row in 0..num_rows {
                let at = row * width + column;
                let (a, b) = (load::<S, F>(simd, &a[at..]), load::<S, F>(simd, &b[at..]));
                sum = [a[0].mul_add(b[0], sum[0]), a[1].mul_add(b[1], sum[1])];
            }
            store::<S, F>(sum, &mut sums[column..]);
        }
    }
    dispatch!(level, simd => run(simd, width, num_rows, [a, b], sums));
}

/// Replaces the scores S of a strip by P = e^{S − m} / l, and dP by dS = P (dP − δ). Hidden pairs have S =
/// −∞ and get zeros, whatever dP.
#[inline(never)]
fn weights_and_logits_vjp<F: Float>(
    level: Level,
    width: usize,
    column: usize,
    scores: &mut [F],
    grads: &mut [F],
    terms: [&[F]; 3],
) {
    #[inline(always)]
    fn run<S: Simd, F: Float>(
        simd: S,
        width: usize,
        column: usize,
        scores: &mut [F],
        grads: &mut [F],
        [shifts, inverses, deltas]: [&[F]; 3],
    ) {
        let panel = panel_width::<S, F>();
        let terms = shifts.chunks_exact(panel).zip(inverses.chunks_exact(panel));
        let terms = terms.zip(deltas.chunks_exact(panel));
        for (column, ((shifts, inverses), deltas)) in (column..).step_by(panel).zip(terms) {
            of_panel(simd, (width, column), scores, grads, [shifts, inverses, deltas]);
        }
    }

    #[inline(always)]
    fn of_panel<S: Simd, F: Float>(
        simd: S,
        (width, column): (usize, usize),
        scores: &mut [F],
        grads: &mut [F],
        terms: [&[F]; 3],
    ) {
        let [shifts, inverses, deltas] = terms.map(
            #[inline(always)]
            |terms| load::<S, F>(simd, terms),
        );
        let [zero, _] = splat::<S, F>(simd, F::zero());
        let [lowest, _] = splat::<S, F>(simd, F::neg_infinity());
        let [highest, _] = splat::<S, F>(simd, F::infinity());
        for (scores, grads) in scores.chunks_exact_mut(width).zip(grads.chunks_exact_mut(width)) {
            let (scores, grads) = (&mut scores[column..], &mut grads[column..]);
            let score = load::<S, F>(simd, scores);
            let mut grad = load::<S, F>(simd, grads);
            let mut weight = score;
            for v in 0..2 {
                // By the score itself: −∞ minus a NaN shift is no longer −∞.
                let score = shifts[v].simd_eq(highest).select(lowest, score[v]);
                let is_hidden = score.simd_eq(lowest);
                let exponential = exp::<S, F>(simd, score - shifts[v]);
                weight[v] = is_hidden.select(zero, exponential * inverses[v]);
                grad[v] = is_hidden.select(zero, weight[v] * (grad[v] - deltas[v]));
            }
            store::<S, F>(grad, grads);
            store::<S, F>(weight, scores);
        }
    }
    dispatch!(level, simd => run(simd, width, column, scores, grads, terms));
}

/// Overwrites `packed`, width × padded, with `factor` × a head's rows of a block, and zeros.
pub(in super::super) fn pack_rows<F: Float>(
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
