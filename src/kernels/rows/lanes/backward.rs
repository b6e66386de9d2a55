//! The backward pass: twice over the pairs, by query and by key, like that of [`rows`](super::super).

use super::super::super::normalizer::Normalizer;
use super::super::super::primitives::buffer::Buffer;
use super::super::super::problem::{Slices, Upstream, WeightGradients};
use super::super::super::score::Scoring;
use super::super::backward::asked_or;
use super::super::{
    Outputs, Pairs, Part, Row, add_pair_weight_gradients, add_up, for_each_part, parts,
};
use super::copies::{Copies, Which, from_lanes, to_lanes};
use super::steps::{Others, Terms, dots, vjp, weighted_sums};
use super::tile_pairs::TilePairs;
use super::{Lanes, ROWS_AT_A_TIME, Tile, with_slice};
use crate::gradients::GradientsMut;
use crate::graph::Graph;
use crate::kernels::Float;
use fearless_simd::Simd;
use ndarray::{Array2, ArrayViewMut2, Axis, s};
use std::ops::Range;

/// Copies of one side: `a` and `b` as in the other backward pass, and then m, 1/l and δ of queries.
#[derive(Clone, Copy)]
struct Side<'c, F: Float> {
    copies: &'c Copies<F>,
    /// The lengths of `a` and of `b`.
    lens: [usize; 2],
}

impl<'c, F: Float> Side<'c, F> {
    /// Returns `a`, `b`, and what follows.
    #[inline]
    fn row(self, row: usize) -> [&'c [F]; 3] {
        let (a, rest) = self.copies.slices().row(row).split_at(self.lens[0]);
        let (b, rest) = rest.split_at(self.lens[1]);
        [a, b, rest]
    }
}

/// One pass over the pairs, summing the gradients of one side.
struct Pass<'s, F: Float> {
    own: Side<'s, F>,
    other: Side<'s, F>,
    slots: &'s [[usize; 2]],
    is_by_query: bool,
    /// The graph, or its transpose.
    graph: &'s Graph,
    /// The row of the other side that each pair reads.
    at: &'s [u32],
    /// Whether the own side has a copy for each pair, not for each row.
    own_by_slot: bool,
    tile_len: usize,
}

impl<'s, F: Float> Pass<'s, F> {
    fn pairs(&self) -> Pairs<'s> {
        if self.is_by_query { Pairs::ByQuery(self.graph) } else { Pairs::ByKey(self.graph) }
    }
}

impl<F: Float> Lanes<'_, F> {
    /// Adds the gradients, given the outputs and normalizer of the forward pass. Returns those of the parameters of the
    /// score function.
    pub(in super::super) fn backward(
        &self,
        tile_len: usize,
        upstream: Upstream<'_, F>,
        grads: &mut GradientsMut<'_, F>,
    ) -> Vec<f64> {
        let problem = self.problem;
        let indices = self.graph.indices();
        let (keys, in_order): (_, Vec<u32>) = if self.has_few_edges() {
            (self.keys_listed(indices), (0..indices.len() as u32).collect())
        } else {
            (self.keys(), Vec::new())
        };
        let queries = self.queries(upstream);
        let [key_len, value_len] = [self.key_len, self.value_len];
        let lens = |slots: usize| [slots * key_len, slots * value_len];
        let queries = Side { copies: &queries, lens: lens(self.slots) };
        let of_keys = |copies| Side { copies, lens: lens(self.groups) };
        let by_query = self.slots_by_query();
        let num_params = problem.scoring.as_ref().map_or(0, Scoring::num_params);
        let num_weights = if grads.pair_weights.is_some() { problem.heads } else { 0 };
        let mut unasked = [(); 3].map(|()| Array2::zeros((0, 0)));
        let [for_query, for_key, for_value] = &mut unasked;
        let pairs = Pairs::ByQuery(self.graph);
        let of_parts = parts(pairs);
        let mut grad_params = Array2::zeros((of_parts.len(), num_params));
        let mut of_pair_weights = Array2::zeros((problem.inputs.num_pairs(), num_weights));
        if grads.query.is_some() || num_params + num_weights > 0 {
            let pass = Pass {
                own: queries,
                other: of_keys(&keys),
                slots: &by_query,
                is_by_query: true,
                graph: self.graph,
                at: if self.has_few_edges() { &in_order } else { indices },
                own_by_slot: false,
                tile_len: pairs.tile_len(tile_len),
            };
            let query = asked_or(&mut grads.query, for_query, problem.inputs.query().dim());
            for_each_part(
                &of_parts,
                problem.work(),
                Outputs {
                    by_row: [query],
                    by_slot: [of_pair_weights.view_mut()],
                    by_part: grad_params.view_mut(),
                },
                |part, Outputs { by_row: [grads], by_slot: [of_weights], by_part }| {
                    let of_query = Some((of_weights, by_part));
                    self.run(&pass, upstream, part, (grads, None), of_query);
                },
                add_up,
            );
        }
        if grads.key.is_some() || grads.value.is_some() {
            let graph = self.graph.transpose();
            let pairs = Pairs::ByKey(graph);
            let keys_by_slot = self.has_few_edges().then(|| {
                let key_of = |row: usize| graph.slots(row).map(move |_| row as u32);
                let keys: Vec<_> = (0..problem.inputs.num_keys()).flat_map(key_of).collect();
                self.keys_listed(&keys)
            });
            let by_key: Vec<_> = by_query.iter().map(|&[query, key]| [key, query]).collect();
            let pass = Pass {
                own: of_keys(keys_by_slot.as_ref().unwrap_or(&keys)),
                other: queries,
                slots: &by_key,
                is_by_query: false,
                graph,
                at: graph.indices(),
                own_by_slot: keys_by_slot.is_some(),
                tile_len: pairs.tile_len(tile_len),
            };
            let parts = parts(pairs);
            let key = asked_or(&mut grads.key, for_key, problem.inputs.key().dim());
            let value = asked_or(&mut grads.value, for_value, problem.inputs.value().dim());
            for_each_part(
                &parts,
                problem.work(),
                Outputs::by_row([key, value], &parts),
                |part, Outputs { by_row: [key, value], .. }| {
                    self.run(&pass, upstream, part, (key, Some(value)), None);
                },
                add_up,
            );
        }
        add_pair_weight_gradients(problem, &of_pair_weights, grads);
        grad_params.sum_axis(Axis(0)).iter().map(|grad: &F| grad.as_f64()).collect()
    }

    /// Returns the queries times the scale, each followed by its g, m, 1/l and δ = g·o. Queries and g of heads that saw no
    /// key are zeros: times a weight of 0, infinities would be NaN.
    fn queries(&self, upstream: Upstream<'_, F>) -> Copies<F> {
        let problem = self.problem;
        let [query_len, out_len] = [self.key_len, self.value_len].map(|len| self.slots * len);
        let stride = query_len + out_len + self.slots * 3 * self.len;
        let of_query = self.places(false, problem.key_dim, stride);
        let of_grad = self.places(false, problem.value_dim, stride);
        let of_out = self.places(false, problem.value_dim, out_len);
        Copies::new(problem.inputs.num_queries(), stride, |rows, copies| {
            let mut outs = Buffer::stale(ROWS_AT_A_TIME * out_len);
            let mut products = Buffer::stale(ROWS_AT_A_TIME * self.slots * self.len);
            let blocks = rows.clone().step_by(ROWS_AT_A_TIME);
            for (start, copies) in blocks.zip(copies.chunks_mut(ROWS_AT_A_TIME * stride)) {
                let rows = start..rows.end.min(start + ROWS_AT_A_TIME);
                let which = Which::From(start);
                let outs = &mut outs[..rows.len() * out_len];
                to_lanes(of_query, (problem.query.slices(), which), 0, copies);
                to_lanes(of_grad, (upstream.grad_out, which), query_len, copies);
                to_lanes(of_out, (upstream.out, which), 0, outs);
                self.scale_and_multiply(copies, outs, &mut products);
                let copies = copies.chunks_exact_mut(stride);
                let products = products.chunks_exact(self.slots * self.len);
                for (row, (copy, products)) in rows.zip(copies.zip(products)) {
                    self.write_terms(upstream, row, copy, products);
                }
            }
        })
    }

    /// Multiplies the queries in their copies by the scale, and overwrites `products` with g·o. They are summed in the
    /// same steps as g·v of a pair: with only one visible key o is v, and ds is 0.
    #[inline(never)]
    fn scale_and_multiply(&self, copies: &mut [F], outs: &[F], products: &mut [F]) {
        let [query_len, out_len] = [self.key_len, self.value_len].map(|len| self.slots * len);
        let same: Vec<_> = (0..self.slots).map(|slot| [slot; 2]).collect();
        let Tile { stride, mut raw, numbers: [] } = self.tile(1);
        let (shape, scale) = (self.shape(&same, stride), self.problem.scale);
        let copies = copies.chunks_exact_mut(query_len + out_len + self.slots * 3 * self.len);
        let products = products.chunks_exact_mut(self.slots * stride);
        let rows = copies.zip(outs.chunks_exact(out_len)).zip(products);
        dispatch!(self.level, simd => {
            for ((copy, out), products) in rows {
                let (query, rest) = copy.split_at_mut(query_len);
                query.iter_mut().for_each(|entry| *entry *= scale);
                let rows = Slices { data: out, columns: out_len };
                let out = Others { rows, at: &[0], first: 0 };
                let to = [&mut *raw, products];
                dots(simd, shape, &rest[..out_len], out, self.value_len, to, F::zero());
            }
        });
    }

    /// Writes m, 1/l and δ behind the copy of a query and its g, and zeros for heads that saw no key.
    fn write_terms(&self, upstream: Upstream<'_, F>, row: usize, copy: &mut [F], products: &[F]) {
        let [query_len, out_len] = [self.key_len, self.value_len].map(|len| self.slots * len);
        let (columns, terms) = copy.split_at_mut(query_len + out_len);
        let numbers = products.chunks_exact(self.len).zip(terms.chunks_exact_mut(3 * self.len));
        let of_slots = self.query_heads.chunks_exact(self.width).zip(numbers).enumerate();
        for (slot, (heads, (products, terms))) in of_slots {
            for (lane, (&head, &product)) in heads.iter().zip(products).enumerate() {
                let [shift, inverse] = upstream.normalizer.factors(row, head);
                let delta = product + upstream.more_delta(row, head);
                let mut block = lane;
                while block < self.len {
                    terms[block] = shift;
                    terms[self.len + block] = inverse;
                    terms[2 * self.len + block] = delta;
                    block += self.width;
                }
                if upstream.normalizer.is_empty(row, head) {
                    let (query, grad_out) = columns.split_at_mut(query_len);
                    for copy in [query, grad_out] {
                        let entries = self.entries_of(slot * self.width + lane, copy);
                        entries.for_each(|entry| *entry = F::zero());
                    }
                }
            }
        }
    }

    /// Processes the rows of a part: adds the gradients of `a` and, if wanted, of `b`; overwrites those of the weights of
    /// pairs, and of the parameters of the score function.
    fn run(
        &self,
        pass: &Pass<'_, F>,
        upstream: Upstream<'_, F>,
        part: &Part,
        (mut grad_a, mut grad_b): (ArrayViewMut2<'_, F>, Option<ArrayViewMut2<'_, F>>),
        of_query: Option<(ArrayViewMut2<'_, F>, ArrayViewMut2<'_, F>)>,
    ) {
        let problem = self.problem;
        let [len_a, len_b] = pass.own.lens;
        let of_a = self.places(!pass.is_by_query, problem.key_dim, len_a);
        let of_b = self.places(!pass.is_by_query, problem.value_dim, len_b);
        let num_rows = ROWS_AT_A_TIME.min(part.rows.len());
        let mut sums_a = Buffer::stale(num_rows * len_a);
        // Empty if not wanted.
        let mut sums_b = Buffer::stale(if grad_b.is_some() { num_rows * len_b } else { 0 });
        let mut tile = self.tile(pass.tile_len);
        let num_params = problem.scoring.as_ref().map_or(0, Scoring::num_params);
        let (of_weights, of_params) = of_query.unzip();
        let mut extras = TilePairs::new(self, pass.is_by_query).map(|pairs| Extras {
            pairs,
            raw: vec![F::zero(); tile.numbers[0].len()],
            grad_params: vec![0.0; num_params],
            of_weights: of_weights.filter(|of_weights| of_weights.ncols() > 0),
            first: part.slots.start,
        });
        // The scale is already in the queries of the pass by key.
        let scale = if pass.is_by_query { problem.scale } else { F::one() };
        for start in part.rows.clone().step_by(ROWS_AT_A_TIME) {
            let rows = start..part.rows.end.min(start + ROWS_AT_A_TIME);
            let of_block = Part { rows: rows.clone(), ..part.clone() };
            let rows_of_block: Vec<_> = of_block.rows(pass.pairs()).collect();
            let sums = [&mut *sums_a, &mut *sums_b];
            self.run_block(pass, upstream, &rows_of_block, (&mut tile, &mut extras), sums);
            let first = start - part.rows.start;
            let of_rows = first..first + rows.len();
            with_slice(grad_a.slice_mut(s![of_rows.clone(), ..]), |grad_a| {
                from_lanes(of_a, &sums_a, Some(scale), grad_a);
            });
            if let Some(grad_b) = &mut grad_b {
                with_slice(grad_b.slice_mut(s![of_rows, ..]), |grad_b| {
                    from_lanes(of_b, &sums_b, Some(F::one()), grad_b);
                });
            }
        }
        if let (Some(mut of_params), Some(extras)) = (of_params, extras) {
            let grads = of_params.iter_mut().zip(&extras.grad_params);
            grads.for_each(|(out, &grad)| *out = F::from_f64(grad));
        }
    }

    /// Overwrites the sums of some rows.
    #[inline(never)]
    fn run_block(
        &self,
        pass: &Pass<'_, F>,
        upstream: Upstream<'_, F>,
        rows: &[Row<'_>],
        (tile, extras): (&mut Tile<F, 2>, &mut Option<Extras<'_, F>>),
        [sums_a, sums_b]: [&mut [F]; 2],
    ) {
        let [len_a, len_b] = pass.own.lens;
        dispatch!(self.level, simd => {
            for (r, row) in rows.iter().enumerate() {
                let sum_a = &mut sums_a[r * len_a..][..len_a];
                let sum_b = sums_b.get_mut(r * len_b..(r + 1) * len_b);
                let memory = (&mut *tile, &mut *extras);
                self.run_row(simd, pass, upstream, row, memory, (sum_a, sum_b));
            }
        });
    }

    /// Overwrites the sums of a row.
    #[inline(always)]
    fn run_row<S: Simd>(
        &self,
        simd: S,
        pass: &Pass<'_, F>,
        upstream: Upstream<'_, F>,
        row: &Row<'_>,
        (tile, extras): (&mut Tile<F, 2>, &mut Option<Extras<'_, F>>),
        (sum_a, mut sum_b): (&mut [F], Option<&mut [F]>),
    ) {
        let [key_len, value_len] = [self.key_len, self.value_len];
        let Tile { stride, raw, numbers: [weights, grads] } = tile;
        let shape = self.shape(pass.slots, *stride);
        if row.slots.is_empty() {
            sum_a.fill(F::zero());
            sum_b.iter_mut().for_each(|sum| sum.fill(F::zero()));
            return;
        }
        let own = if pass.own_by_slot { row.slots.start } else { row.row };
        let [own_a, own_b, terms] = pass.own.row(own);
        let mut start = row.slots.start;
        while start < row.slots.end {
            let at = start..row.slots.end.min(start + pass.tile_len);
            pass.other.copies.prefetch(pass.at, at.clone());
            let is_first = start == row.slots.start;
            start = at.end;
            let rows = pass.other.copies.slices();
            let others_a = Others { rows, at: &pass.at[at.clone()], first: 0 };
            let others_b = others_a.skip(pass.other.lens[0]);
            dots(simd, shape, own_a, others_a, key_len, [raw, weights], F::neg_infinity());
            if let Some(extras) = extras {
                extras.pairs.load(pass.graph, row.row, at.clone());
                extras.raw.copy_from_slice(weights);
                extras.pairs.apply_score(weights, *stride);
            }
            // dp = m g·v
            dots(simd, shape, own_b, others_b, value_len, [raw, grads], F::zero());
            if let Some(extras) = extras {
                extras.read_grads(at.clone(), grads, *stride);
            }
            if let Some(of_weights) = upstream.grad_weights {
                self.add_grad_weights(of_weights, pass.graph, at.clone(), grads, *stride);
            }
            let terms = match pass.is_by_query {
                true => Terms::OfQuery(terms),
                false => Terms::OfPairs(others_b.skip(pass.other.lens[1])),
            };
            vjp(simd, shape, others_a.at.len(), terms, [weights, grads]);
            if let Some(extras) = extras {
                extras.finish(at, [weights, grads], *stride);
            }
            // s = a·a'
            weighted_sums(simd, shape, grads, others_a, key_len, sum_a, is_first);
            if let Some(sum_b) = &mut sum_b {
                weighted_sums(simd, shape, weights, others_b, value_len, sum_b, is_first);
            }
        }
        if pass.is_by_query {
            self.clear_empty(upstream.normalizer, row.row, sum_a);
        }
    }

    /// Overwrites the gradient of a query by 0 for heads that saw no key: 0 times an infinite key is NaN.
    fn clear_empty(&self, normalizer: &Normalizer<F>, query: usize, sums: &mut [F]) {
        for (n, &head) in self.query_heads.iter().enumerate() {
            if normalizer.is_empty(query, head) {
                self.entries_of(n, sums).for_each(|entry| *entry = F::zero());
            }
        }
    }

    /// The entries of the n-th head, slot by slot, in a copy with the heads of queries.
    fn entries_of<'c>(
        &self,
        n: usize,
        copy: &'c mut [F],
    ) -> impl Iterator<Item = &'c mut F> + use<'c, F> {
        let len_of_slot = copy.len() / self.slots;
        let of_slot = copy[n / self.width * len_of_slot..][..len_of_slot].iter_mut();
        of_slot.skip(n % self.width).step_by(self.width)
    }

    /// Adds the gradients of the weights of pairs, for each head.
    fn add_grad_weights(
        &self,
        of_weights: &WeightGradients<F>,
        graph: &Graph,
        pairs: Range<usize>,
        grads: &mut [F],
        stride: usize,
    ) {
        for (n, &head) in self.query_heads.iter().enumerate() {
            let of_head = &mut grads[n / self.width * stride + n % self.width..];
            for (slot, grad) in pairs.clone().zip(of_head.iter_mut().step_by(self.width)) {
                let pair = graph.edge_ids().map_or(slot, |ids| ids[slot] as usize);
                *grad += of_weights.grads[[pair, head]];
            }
        }
    }
}

/// What a score function and factors of the weights need.
struct Extras<'e, F: Float> {
    pairs: TilePairs<'e, F>,
    /// The logits that the score function is given.
    raw: Vec<F>,
    grad_params: Vec<f64>,
    /// The gradients of the weights of pairs of a part, from its first slot on; `None` if they are not wanted.
    of_weights: Option<ArrayViewMut2<'e, F>>,
    first: usize,
}

impl<F: Float> Extras<'_, F> {
    /// Reads the gradients of the weights, g·v, and multiplies them by the factors of the weights.
    fn read_grads(&mut self, slots: Range<usize>, grads: &mut [F], stride: usize) {
        if let Some(of_weights) = &mut self.of_weights {
            let of_weights =
                of_weights.slice_mut(s![slots.start - self.first..slots.end - self.first, ..]);
            self.pairs.pair_weights_vjp(grads, stride, of_weights);
        }
        self.pairs.multiply(grads, stride);
    }

    /// Multiplies the weights by their factors, and replaces the gradients of the results of the score function by those
    /// of the logits.
    fn finish(&mut self, slots: Range<usize>, [weights, grads]: [&mut [F]; 2], stride: usize) {
        if let Some(of_weights) = &mut self.of_weights {
            let of_weights =
                of_weights.slice_mut(s![slots.start - self.first..slots.end - self.first, ..]);
            self.pairs.multiply_by_weights(weights, stride, of_weights);
        }
        self.pairs.multiply(weights, stride);
        self.pairs.score_vjp(&self.raw, grads, stride, &mut self.grad_params);
    }
}
