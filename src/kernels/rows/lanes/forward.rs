//! The forward pass.

use super::super::super::normalizer::Normalizer;
use super::super::super::primitives::buffer::Buffer;
use super::super::super::problem::Slices;
use super::super::forward::{add_tile, merge_segments};
use super::super::{Outputs, Pairs, Part, Row, for_each_part, parts};
use super::copies::{Copies, Which, from_lanes, to_lanes};
use super::steps::{Others, Running, divide, dots, exponentials, weighted_sums};
use super::tile_pairs::TilePairs;
use super::{Lanes, ROWS_AT_A_TIME, Tile, with_slice};
use crate::kernels::Float;
use fearless_simd::Simd;
use ndarray::{ArrayViewMut2, s};

impl<F: Float> Lanes<'_, F> {
    /// Overwrites `out` and the normalizer.
    pub(in super::super) fn forward(
        &self,
        tile_len: usize,
        out: ArrayViewMut2<'_, F>,
        normalizer: &mut Normalizer<F>,
    ) {
        let problem = self.problem;
        let pairs = Pairs::ByQuery(self.graph);
        let tile_len = pairs.tile_len(tile_len);
        let keys = (!self.has_few_edges()).then(|| self.keys());
        let parts = parts(pairs);
        let Normalizer { shift, sum } = normalizer;
        for_each_part(
            &parts,
            problem.work(),
            Outputs::by_row([out, shift.view_mut(), sum.view_mut()], &parts),
            |part, outputs| self.forward_rows(keys.as_ref(), tile_len, part, outputs),
            |row, segments| merge_segments(problem, row, segments),
        );
    }

    fn forward_rows(
        &self,
        keys: Option<&Copies<F>>,
        tile_len: usize,
        part: &Part,
        outputs: Outputs<'_, F, 3, 0>,
    ) {
        let [mut out, mut shift_out, mut sum_out] = outputs.by_row;
        let problem = self.problem;
        let [query_len, out_len] = [self.key_len, self.value_len].map(|len| self.slots * len);
        let of_query = self.places(false, problem.key_dim, query_len);
        let of_out = self.places(false, problem.value_dim, out_len);
        let num_rows = ROWS_AT_A_TIME.min(part.rows.len());
        let mut queries = Buffer::stale(num_rows * query_len);
        let mut outs = Buffer::stale(num_rows * out_len);
        let mut of_rows = OfRows::new(self, keys, tile_len);
        for start in part.rows.clone().step_by(ROWS_AT_A_TIME) {
            let rows = start..part.rows.end.min(start + ROWS_AT_A_TIME);
            let block = &mut queries[..rows.len() * query_len];
            to_lanes(of_query, (problem.query.slices(), Which::From(start)), 0, block);
            block.iter_mut().for_each(|entry| *entry *= problem.scale);
            let first = start - part.rows.start;
            let of_block = Part { rows: rows.clone(), ..part.clone() };
            of_rows.run_block(of_block.rows(Pairs::ByQuery(self.graph)), &queries, &mut outs);
            let numbers = of_rows.maxima.chunks_exact(problem.heads);
            let numbers = numbers.zip(of_rows.sums.chunks_exact(problem.heads));
            for (r, (maxima, sums)) in (first..first + rows.len()).zip(numbers) {
                let (mut shift_out, mut sum_out) = (shift_out.row_mut(r), sum_out.row_mut(r));
                for (&head, (&max, &sum)) in self.query_heads.iter().zip(maxima.iter().zip(sums)) {
                    shift_out[head] = if sum == F::zero() { F::neg_infinity() } else { max };
                    sum_out[head] = sum;
                }
            }
            with_slice(out.slice_mut(s![first..first + rows.len(), ..]), |out| {
                from_lanes(of_out, &outs, None, out);
            });
        }
    }
}

/// The pass over the pairs of a block of rows, and its memory.
struct OfRows<'r, F: Float> {
    lanes: &'r Lanes<'r, F>,
    /// The copies of all keys, or else memory for those of a tile, with their numbers 0, 1, …
    keys: Option<&'r Copies<F>>,
    of_tile_keys: Buffer<F>,
    in_order: Vec<u32>,
    slots: Vec<[usize; 2]>,
    pairs: Option<TilePairs<'r, F>>,
    tile: Tile<F, 1>,
    tile_len: usize,
    /// For each row, for each head slot by slot, m and l = Σ e^{s − m}.
    maxima: Buffer<F>,
    sums: Buffer<F>,
    /// The factors of the previous sums.
    alphas: Vec<F>,
    /// Both kinds of sums over the last tile, and the rounding errors of the sums, if a row has several tiles.
    of_tile: Vec<F>,
    lacks: Vec<F>,
}

impl<'r, F: Float> OfRows<'r, F> {
    fn new(lanes: &'r Lanes<'r, F>, keys: Option<&'r Copies<F>>, tile_len: usize) -> Self {
        let heads = lanes.problem.heads;
        let [maxima, sums] = [(); 2].map(|()| Buffer::stale(ROWS_AT_A_TIME * heads));
        let keys_of_tile = if keys.is_some() { 0 } else { tile_len };
        Self {
            lanes,
            keys,
            of_tile_keys: Buffer::stale(keys_of_tile * lanes.key_stride()),
            in_order: (0..keys_of_tile as u32).collect(),
            slots: lanes.slots_by_query(),
            pairs: TilePairs::new(lanes, true),
            tile: lanes.tile(tile_len),
            tile_len,
            maxima,
            sums,
            alphas: vec![F::zero(); heads],
            of_tile: Vec::new(),
            lacks: Vec::new(),
        }
    }

    /// Overwrites the outputs of some queries, their maxima and sums.
    #[inline(never)]
    fn run_block<'g>(
        &mut self,
        rows: impl Iterator<Item = Row<'g>>,
        queries: &[F],
        outs: &mut [F],
    ) {
        let rows: Vec<_> = rows.collect();
        let (lanes, heads) = (self.lanes, self.alphas.len());
        let [query_len, out_len] = [lanes.key_len, lanes.value_len].map(|len| lanes.slots * len);
        dispatch!(lanes.level, simd => {
            let copies = queries.chunks_exact(query_len).zip(outs.chunks_exact_mut(out_len));
            for (r, (row, (query, values))) in rows.iter().zip(copies).enumerate() {
                self.run(simd, row, query, values, r * heads);
            }
        });
    }

    /// Overwrites the output of a query, given its pairs, and its maxima and sums from a place on.
    #[inline(always)]
    fn run<S: Simd>(
        &mut self,
        simd: S,
        row: &Row<'_>,
        query: &[F],
        values: &mut [F],
        place: usize,
    ) {
        let Self { lanes, keys, ref slots, ref mut tile, tile_len, .. } = *self;
        let Self { maxima, sums, alphas, of_tile, lacks, pairs, .. } = self;
        let (of_tile_keys, in_order) = (&mut self.of_tile_keys, &self.in_order);
        let row_slots = row.slots.clone();
        let maxima = &mut maxima[place..][..alphas.len()];
        let sums = &mut sums[place..][..alphas.len()];
        let [key_len, value_len] = [lanes.key_len, lanes.value_len];
        let Tile { stride, raw, numbers: [weights] } = tile;
        let shape = lanes.shape(slots, *stride);
        maxima.fill(F::neg_infinity());
        if row_slots.is_empty() {
            sums.fill(F::zero());
        }
        let mut start = row_slots.start;
        while start < row_slots.end {
            let at = start..row_slots.end.min(start + tile_len);
            let is_first = start == row_slots.start;
            start = at.end;
            let (values_of, sums_of) = if is_first {
                lacks.clear();
                (&mut *values, &mut *sums)
            } else {
                of_tile.resize(values.len() + sums.len(), F::zero());
                lacks.resize(values.len() + sums.len(), F::zero());
                of_tile.split_at_mut(values.len())
            };
            let indices = lanes.graph.indices();
            let others = if let Some(keys) = keys {
                keys.prefetch(indices, at.clone());
                Others { rows: keys.slices(), at: &indices[at.clone()], first: 0 }
            } else {
                let columns = lanes.key_stride();
                let data = &mut of_tile_keys[..at.len() * columns];
                // Up to the end of the graph, for prefetching.
                lanes.copy_keys(Which::Listed(&indices[at.start..]), data);
                Others { rows: Slices { data, columns }, at: &in_order[..at.len()], first: 0 }
            };
            dots(simd, shape, query, others, key_len, [raw, weights], F::neg_infinity());
            if let Some(pairs) = pairs {
                pairs.load(lanes.graph, row.row, at);
                pairs.apply_score(weights, *stride);
            }
            let running = Running { maxima, sums: sums_of, alphas };
            exponentials(simd, shape, others.at.len(), weights, running);
            if let Some(pairs) = pairs {
                pairs.multiply(weights, *stride);
            }
            let others = others.skip(lanes.groups * key_len);
            weighted_sums(simd, shape, weights, others, value_len, values_of, true);
            if !is_first {
                let (len, width) = (values.len(), lanes.width);
                let alpha = |at: usize| match at.checked_sub(len) {
                    Some(head) => alphas[head],
                    None => alphas[at / value_len * width + at % width],
                };
                add_tile(values.iter_mut().chain(sums.iter_mut()), lacks, of_tile, alpha);
            }
        }
        divide(simd, shape, value_len, values, sums);
    }
}
