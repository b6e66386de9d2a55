use super::sample::{Layout, normal};
use super::{Broken, Report, Sample, Shapes, Violation, arrays, for_each_case, require, succeed};
use crate::{Attention, Error, Float, Gradients, GradientsMut, Graph, Inputs, Pair, Saved, params};
use ndarray::{Array, Array1, Array2, ArrayD, ArrayView2, ArrayViewD, Axis, Dimension, Slice, s};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;

/// Checks the contract of [`Attention`] on small random inputs, without a reference.
///
/// The laws:
///
/// * Outputs are overwritten, and gradients are added to.
/// * The training pass gives the same numbers as inference, and every run is bitwise identical.
/// * Memory layouts do not matter.
/// * Permuting keys changes nothing, and permuting queries permutes the output.
/// * Dense, masked, causal and graph inputs with the same visible pairs agree.
/// * A query without visible keys reads no key, and hidden pairs leak nothing, forward or backward.
/// * NaN spreads to the rows it touches and no others, forward and backward.
/// * Bias, dropout and weights of pairs change the output or are refused; weights of pairs that are 1 change
///   nothing.
/// * A head reads its own columns, and grouped heads read the right ones.
/// * Weights are non-negative and sum to 1, also in the backward pass and for large logits.
/// * Parameters and buffers have different names and a fixed order.
/// * Wrong shapes and the saved state of another mechanism are errors.
///
/// The laws do not determine the correct output: compare it with a reference, and call
/// [`check_gradients`](super::check_gradients).
///
/// # Errors
/// The first law that is violated, with the case.
pub fn check_attention<F: Float>(
    mechanism: &dyn Attention<F>,
    shapes: &Shapes,
) -> Result<Report, Violation> {
    let mut shared = mechanism;
    for_each_case(&mut shared, shapes, |mechanism, sample| {
        names_are_unique(mechanism)?;
        let check = Check::new(mechanism, sample)?;
        check.runs_agree()?;
        check.finite_inputs_give_finite_results()?;
        check.layouts_agree()?;
        check.permutations_agree()?;
        check.representations_agree()?;
        check.packed_inputs_are_a_loop()?;
        check.hidden_pairs_do_not_leak()?;
        check.nan_stays_in_its_rows()?;
        check.channels_are_honoured()?;
        check.weights_are_a_distribution()?;
        check.gradients_are_added()?;
        check.nothing_flows_through_empty_rows()?;
        check.large_logits_have_weights_too()?;
        check.bad_calls_are_errors()
    })
}

fn names_are_unique<F: Float>(mechanism: &dyn Attention<F>) -> Result<(), Broken> {
    let names =
        || -> Vec<String> { params::state(mechanism).into_iter().map(|(name, _)| name).collect() };
    let law = "all parameters and buffers have different names";
    let names_once = names();
    for (number, name) in names_once.iter().enumerate() {
        require(law, !names_once[..number].contains(name), || format!("two are called {name}"))?;
    }
    let law = "parameters and buffers are visited in a fixed order";
    let names_again = names();
    require(law, names_once == names_again, || format!("{names_once:?}, then {names_again:?}"))
}

/// A mechanism, inputs, and its results for them.
struct Check<'a, F: Float> {
    mechanism: &'a dyn Attention<F>,
    sample: &'a Sample<F>,
    out: Array2<F>,
    grad_out: Array2<F>,
    gradients: Gradients<F>,
    /// num_queries × num_keys: whether any head sees the key.
    sees: Array2<bool>,
}

impl<'a, F: Float> Check<'a, F> {
    fn new(mechanism: &'a dyn Attention<F>, sample: &'a Sample<F>) -> Result<Self, Broken> {
        let inputs = succeed("the sample is valid", sample.inputs())?;
        let out = succeed("forward succeeds", mechanism.forward(&inputs))?;
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
        let grad_out = normal([out.nrows(), out.ncols()], 1.0, &mut rng);
        let mut sees = Array2::from_elem((inputs.num_queries(), inputs.num_keys()), false);
        for pair in visible_pairs(&inputs) {
            sees[[pair.query, pair.key]] = true;
        }
        if sample.reads_latent {
            let latent = visible_edges(&sample.latent, &inputs);
            latent.into_iter().for_each(|edge| sees[edge] = true);
        }
        let gradients = gradients(mechanism, sample, grad_out.view())?;
        Ok(Self { mechanism, sample, out, grad_out, gradients, sees })
    }

    fn forward(&self, law: &'static str, sample: &Sample<F>) -> Result<Array2<F>, Broken> {
        let inputs = succeed(law, sample.inputs())?;
        succeed(law, self.mechanism.forward(&inputs))
    }

    fn is_empty_row(&self, query: usize) -> bool {
        !self.sees.row(query).iter().any(|&sees| sees)
    }

    fn runs_agree(&self) -> Result<(), Broken> {
        let law = "forward_into overwrites its output and repeats its bits";
        let inputs = succeed(law, self.sample.inputs())?;
        let mut dirty = Array2::from_elem(self.out.raw_dim(), F::nan());
        succeed(law, self.mechanism.forward_into(&inputs, dirty.view_mut()))?;
        same_bits(law, &dirty, &self.out)?;

        let law = "forward_train_into gives the numbers of forward_into";
        let mut dirty = Array2::from_elem(self.out.raw_dim(), F::nan());
        succeed(law, self.mechanism.forward_train_into(&inputs, dirty.view_mut()))?;
        same_bits(law, &dirty, &self.out)?;

        let law = "backward_into repeats its bits";
        let again = gradients(self.mechanism, self.sample, self.grad_out.view())?;
        require(law, again == self.gradients, || "gradients differ".into())
    }

    fn layouts_agree(&self) -> Result<(), Broken> {
        for layout in [Layout::ColumnMajor, Layout::EveryOther, Layout::Reversed] {
            let law = "strided, transposed and reversed views give the answer of contiguous ones";
            let sample = self.sample.relayout(layout);
            let inputs = succeed(law, sample.inputs())?;
            let mut out = layout.of(&self.out.mapv(|_| F::nan()));
            let mut grads = self.gradients.clone();
            for array in [&mut grads.query, &mut grads.key, &mut grads.value]
                .into_iter()
                .chain(&mut grads.pair_weights)
                .chain(&mut grads.edge_features)
                .chain(&mut grads.query_positions)
                .chain(&mut grads.key_positions)
            {
                *array = layout.of(&array.mapv(|_| F::zero()));
            }
            if let Some(bias) = &mut grads.bias {
                *bias = layout.of(&bias.mapv(|_| F::zero()));
            }
            grads.params.iter_mut().for_each(|param| param.fill(F::zero()));
            grads.distances.iter_mut().for_each(|grad| grad.fill(F::zero()));
            let saved = self.mechanism.forward_train_into(&inputs, out.view_mut());
            let saved = succeed(law, saved)?;
            close(law, &out, &self.out)?;
            let grad_out = layout.of(&self.grad_out);
            let backward =
                self.mechanism.backward_into(&inputs, &saved, grad_out.view(), grads.view_mut());
            succeed(law, backward)?;
            close_gradients(law, &grads, &self.gradients)?;
        }
        Ok(())
    }

    fn permutations_agree(&self) -> Result<(), Broken> {
        // A causal pattern depends on the order; dropout in dense inputs hashes pair numbers.
        let is_dense = self.sample.graph.is_none();
        let is_ordered = self.sample.causal.is_some() || self.sample.segments.is_some();
        if is_ordered || (is_dense && self.sample.dropout.is_some()) {
            return Ok(());
        }
        let law = "permuting the keys changes nothing";
        let keys = permutation(self.sample.key.nrows());
        let queries: Vec<usize> = (0..self.sample.query.nrows()).collect();
        let out = self.forward(law, &self.sample.permuted(&queries, &keys))?;
        close(law, &out, &self.out)?;

        if self.sample.dropout.is_some() && self.sample.drops_rows {
            return Ok(());
        }
        let law = "permuting the queries permutes the output";
        let keys: Vec<usize> = (0..self.sample.key.nrows()).collect();
        let queries = permutation(self.sample.query.nrows());
        let out = self.forward(law, &self.sample.permuted(&queries, &keys))?;
        close(law, &out, &self.out.select(Axis(0), &queries))
    }

    fn representations_agree(&self) -> Result<(), Broken> {
        if self.sample.dropout.is_some() {
            return Ok(());
        }
        let law = "the same visible pairs as a graph, in any order, give the same answer";
        let inputs = succeed(law, self.sample.inputs())?;
        let mut pairs: Vec<Pair> =
            (0..inputs.num_queries()).flat_map(|query| inputs.row(query)).collect();
        pairs.shuffle(&mut Xoshiro256PlusPlus::seed_from_u64(4));
        let sample = succeed(law, self.sample.as_graph(&inputs, &pairs))?;
        let graph_inputs = succeed(law, sample.inputs())?;
        let out = match self.mechanism.forward(&graph_inputs) {
            Err(Error::Unsupported { .. }) => return Ok(()),
            out => succeed(law, out)?,
        };
        close(law, &out, &self.out)?;

        let law = "weights follow the pair order";
        let indices: Vec<usize> = pairs.iter().map(|pair| pair.index).collect();
        if let Ok(weights) = self.mechanism.attention_weights(&inputs) {
            let shuffled = succeed(law, self.mechanism.attention_weights(&graph_inputs))?;
            close(law, &shuffled, &weights.select(Axis(0), &indices))?;
        }
        Ok(())
    }

    fn packed_inputs_are_a_loop(&self) -> Result<(), Broken> {
        let Some(segments) = &self.sample.segments else { return Ok(()) };
        // The edges of latent neighbours have no numbers of their own in a segment.
        if self.sample.reads_latent && self.sample.dropout.is_some() {
            return Ok(());
        }
        let law = "packed inputs give what a loop over their segments gives";
        let mut params: Option<Vec<ArrayD<F>>> = None;
        for segment in 0..segments.len() {
            let sample = self.sample.segment(segment);
            let (queries, keys) = (segments.queries(segment), segments.keys(segment));
            // Alone, a segment may be too short for a mechanism.
            let inputs = succeed(law, sample.inputs())?;
            let out = match self.mechanism.forward(&inputs) {
                Err(Error::InvalidArgument { .. }) => continue,
                out => succeed(law, out)?,
            };
            close(law, &self.out.slice(s![queries.clone(), ..]).to_owned(), &out)?;
            let grad_out = self.grad_out.slice(s![queries.clone(), ..]);
            let grads = gradients(self.mechanism, &sample, grad_out)?;
            for (packed, alone, rows) in [
                (&self.gradients.query, &grads.query, queries),
                (&self.gradients.key, &grads.key, keys.clone()),
                (&self.gradients.value, &grads.value, keys),
            ] {
                close(law, &packed.slice(s![rows, ..]).to_owned(), alone)?;
            }
            match &mut params {
                None => params = Some(grads.params),
                Some(params) => {
                    params.iter_mut().zip(&grads.params).for_each(|(sum, grad)| *sum += grad)
                }
            }
        }
        for (packed, sum) in self.gradients.params.iter().zip(params.into_iter().flatten()) {
            close(law, packed, &sum)?;
        }
        Ok(())
    }

    fn hidden_pairs_do_not_leak(&self) -> Result<(), Broken> {
        let law = "the data of hidden pairs and of unseen keys changes nothing";
        let mut poisoned = self.sample.clone();
        let inputs = succeed(law, self.sample.inputs())?;
        let mut visible = vec![false; inputs.num_pairs()];
        visible_pairs(&inputs).for_each(|pair| visible[pair.index] = true);
        for pair in (0..visible.len()).filter(|&pair| !visible[pair]) {
            poisoned.edge_features.row_mut(pair).fill(F::nan());
            poisoned.pair_weights.iter_mut().for_each(|of| of.row_mut(pair).fill(F::nan()));
            poisoned.distances[pair] = F::nan();
        }
        let unseen: Vec<usize> = (0..inputs.num_keys())
            .filter(|&key| !self.sees.column(key).iter().any(|&sees| sees))
            .collect();
        for &key in &unseen {
            poisoned.key.row_mut(key).fill(F::nan());
            poisoned.value.row_mut(key).fill(F::infinity());
            poisoned.key_positions.row_mut(key).fill(F::nan());
        }
        same_bits(law, &self.forward(law, &poisoned)?, &self.out)?;

        let law = "unseen keys have zero gradients and change no others";
        let grads = gradients(self.mechanism, &poisoned, self.grad_out.view())?;
        close_gradients(law, &grads, &self.gradients)?;
        for &key in &unseen {
            let rows = [grads.key.row(key), grads.value.row(key)];
            let zero = rows.iter().all(|row| row.iter().all(|&grad| grad == F::zero()));
            require(law, zero, || format!("key {key} has one"))?;
        }
        Ok(())
    }

    fn nan_stays_in_its_rows(&self) -> Result<(), Broken> {
        let law = "NaN in a key and value reaches the queries that see it, and no others";
        for key in 0..self.sample.key.nrows() {
            let mut poisoned = self.sample.clone();
            poisoned.key.row_mut(key).fill(F::nan());
            poisoned.value.row_mut(key).fill(F::nan());
            let out = self.forward(law, &poisoned)?;
            self.nan_exactly_in(law, &out, |query| self.sees[[query, key]])?;
        }
        let law = "NaN in a query reaches its own row, unless it is not read, and no other";
        for poisoned_query in 0..self.sample.query.nrows() {
            let mut poisoned = self.sample.clone();
            poisoned.query.row_mut(poisoned_query).fill(F::nan());
            let out = self.forward(law, &poisoned)?;
            let unread = out.row(poisoned_query) == self.out.row(poisoned_query);
            self.nan_exactly_in(law, &out, |query| query == poisoned_query && !unread)?;
        }

        let law = "NaN in a query reaches the gradients of the keys it sees, and of no other rows";
        for poisoned_query in 0..self.sample.query.nrows() {
            let mut poisoned = self.sample.clone();
            poisoned.query.row_mut(poisoned_query).fill(F::nan());
            let grads = gradients(self.mechanism, &poisoned, self.grad_out.view())?;
            for query in (0..self.sample.query.nrows()).filter(|&query| query != poisoned_query) {
                // Not the same bits: a mixture gathers other queries when one is NaN.
                let [grad, expected] = [&grads.query, &self.gradients.query];
                close(law, &grad.row(query).to_owned(), &expected.row(query).to_owned())?;
            }
            let seen = self.sees.row(poisoned_query);
            for key in (0..self.sample.key.nrows()).filter(|&key| !seen[key]) {
                // Not bitwise: rows with NaN may be summed elsewhere.
                for (grad, expected) in
                    [(&grads.key, &self.gradients.key), (&grads.value, &self.gradients.value)]
                {
                    close(law, &grad.row(key).to_owned(), &expected.row(key).to_owned())?;
                }
            }
        }
        Ok(())
    }

    /// Touched rows contain NaN, the others are unchanged. An empty row may be either.
    fn nan_exactly_in(
        &self,
        law: &'static str,
        out: &Array2<F>,
        touched: impl Fn(usize) -> bool,
    ) -> Result<(), Broken> {
        for (query, (row, expected)) in out.rows().into_iter().zip(self.out.rows()).enumerate() {
            if !touched(query) {
                require(law, row == expected, || format!("row {query} became {row}"))?;
            } else if !self.is_empty_row(query) && !row.is_empty() {
                let nan = row.iter().any(|value| value.is_nan());
                require(law, nan, || format!("row {query} is {row}"))?;
            }
        }
        Ok(())
    }

    fn channels_are_honoured(&self) -> Result<(), Broken> {
        let law = "bias, dropout and weights of pairs change the answer, or are refused";
        let Sample { bias, dropout, pair_weights, .. } = self.sample;
        if bias.is_some() || dropout.is_some() || pair_weights.is_some() {
            let (bias, dropout, pair_weights) = (None, None, None);
            let plain = Sample { bias, dropout, pair_weights, ..self.sample.clone() };
            let changes = self.forward(law, &plain)? != self.out;
            require(law, changes, || "they change nothing".into())?;
        }
        self.weights_of_one_change_nothing()?;
        let law = "a head reads its own columns, and no others";
        if self.sample.heads > 1 {
            let mut poisoned = self.sample.clone();
            let Sample { heads, kv_heads, .. } = *self.sample;
            let poison = |array: &mut Array2<F>, heads| {
                let first = Slice::from(..array.ncols() / heads);
                array.slice_axis_mut(Axis(1), first).fill(F::nan());
            };
            let touched = if self.sample.whole_queries {
                poison(&mut poisoned.key, kv_heads);
                poison(&mut poisoned.value, kv_heads);
                heads / kv_heads
            } else {
                poison(&mut poisoned.query, heads);
                1
            };
            let rest = Slice::from(self.out.ncols() / heads * touched..);
            let actual = self.forward(law, &poisoned)?;
            let [actual, expected] = [&actual, &self.out].map(|out| out.slice_axis(Axis(1), rest));
            same_bits(law, &actual.to_owned(), &expected.to_owned())?;
        }
        let law = "grouped heads are the same as heads with repeated keys and values";
        if self.sample.kv_heads < self.sample.heads {
            let out = self.forward(law, &self.sample.ungrouped())?;
            close(law, &out, &self.out)?;
        }
        Ok(())
    }

    fn weights_of_one_change_nothing(&self) -> Result<(), Broken> {
        let law = "weights of pairs that are 1 change nothing, or are refused";
        if self.sample.pair_weights.is_some() {
            return Ok(());
        }
        let weights = Array2::from_elem((self.sample.layers.len(), 1), F::one());
        let sample = Sample { pair_weights: Some(weights), ..self.sample.clone() };
        let inputs = succeed(law, sample.inputs())?;
        let out = match self.mechanism.forward(&inputs) {
            Err(Error::Unsupported { .. }) => return Ok(()),
            out => succeed(law, out)?,
        };
        close(law, &out, &self.out)?;
        let mut grads = gradients(self.mechanism, &sample, self.grad_out.view())?;
        grads.pair_weights = None;
        close_gradients(law, &grads, &self.gradients)
    }

    fn weights_are_a_distribution(&self) -> Result<(), Broken> {
        self.has_a_distribution(self.sample)
    }

    /// Checks logits of 1e6 and more, from keys or from a bias such as the −1e9 that other libraries use
    /// as a mask: even if rounded, their weights sum to 1. If outputs are sums of values times weights,
    /// the gradients of the values reveal the weights in the backward pass: Σ v·dv = Σ g·o.
    fn large_logits_have_weights_too(&self) -> Result<(), Broken> {
        let Sample { causal, mask, pair_mask, bias, dropout, pair_weights, .. } = self.sample;
        let is_masked = causal.is_some() || mask.is_some() || pair_mask.is_some();
        if is_masked || bias.is_some() || dropout.is_some() || pair_weights.is_some() {
            return Ok(()); // the plain cases cover it
        }
        let mut samples = vec![];
        for exponent in [20, 28] {
            let factor = F::from_f64(2f64.powi(exponent));
            let key = self.sample.key.mapv(|entry| entry * factor);
            samples.push(Sample { key, ..self.sample.clone() });
        }
        let pairs = match &self.sample.graph {
            Some(graph) => (graph.num_edges(), 1),
            None if self.sample.segments.is_some() => (self.sample.layers.len(), 1),
            None => (self.sample.query.nrows(), self.sample.key.nrows()),
        };
        let bias = Some(Array2::from_elem(pairs, F::from_f64(-1e9)).into_dyn());
        samples.push(Sample { bias, ..self.sample.clone() });

        for sample in samples {
            // A mechanism may refuse a bias and keys outside its domain.
            let Ok(out) = sample.inputs().and_then(|inputs| self.mechanism.forward(&inputs)) else {
                continue;
            };
            self.has_a_distribution(&sample)?;
            let law = "Σ v·dv = Σ g·o for large logits, if the output is linear in the values";
            let two = F::from_f64(2.0);
            let twice = Sample { value: &sample.value * two, ..sample.clone() };
            let inputs = succeed(law, twice.inputs())?;
            let is_linear = self.mechanism.forward(&inputs).is_ok_and(|twice| twice == &out * two);
            if !is_linear {
                continue;
            }
            let gradients = gradients(self.mechanism, &sample, self.grad_out.view())?;
            let sum = |a: &Array2<F>, b: &Array2<F>| {
                let products = a.iter().zip(b).map(|(a, b)| a.as_f64() * b.as_f64());
                products.fold([0.0; 2], |[sum, size], x| [sum + x, size + x.abs()])
            };
            let [of_values, size] = sum(&sample.value, &gradients.value);
            let [of_outputs, size_of_outputs] = sum(&self.grad_out, &out);
            let allowed = rounding::<F>().as_f64() * size.max(size_of_outputs);
            require(law, (of_values - of_outputs).abs() <= allowed, || {
                format!("{of_values} and {of_outputs}")
            })?;
        }
        Ok(())
    }

    fn has_a_distribution(&self, sample: &Sample<F>) -> Result<(), Broken> {
        let law = "weights are non-negative, 0 for hidden pairs, and sum to 1 (0 for empty rows)";
        let inputs = succeed(law, sample.inputs())?;
        let weights = match self.mechanism.attention_weights(&inputs) {
            Err(Error::NoWeights { .. }) => return Ok(()),
            weights => succeed(law, weights)?,
        };
        require(law, weights.nrows() == inputs.num_pairs(), || {
            format!("{} rows for {} pairs", weights.nrows(), inputs.num_pairs())
        })?;
        require(law, weights.iter().all(|&weight| weight >= F::zero()), || weights.to_string())?;
        let mut rest = weights.clone();
        for query in 0..inputs.num_queries() {
            let mut sums = Array1::<F>::zeros(weights.ncols());
            for pair in inputs.row(query) {
                sums += &weights.row(pair.index);
                rest.row_mut(pair.index).fill(F::zero());
            }
            // Heads for which a bias hides the whole row.
            let empty = |head| {
                let hidden = |pair| is_hidden_from(&inputs, pair, head);
                inputs.row(query).all(hidden)
            };
            for (head, &sum) in sums.iter().enumerate() {
                let expected = if empty(head) { F::zero() } else { F::one() };
                let holds = (sum - expected).abs() <= rounding::<F>();
                require(law, holds, || format!("query {query}, head {head}: sum {sum}"))?;
            }
        }
        require(law, rest.iter().all(|&weight| weight == F::zero()), || {
            "a hidden pair has a weight".into()
        })
    }

    fn gradients_are_added(&self) -> Result<(), Broken> {
        let law = "gradients are added to what is there";
        let inputs = succeed(law, self.sample.inputs())?;
        let (_, saved) = succeed(law, self.mechanism.forward_train(&inputs))?;
        let mut twice = self.gradients.clone();
        let (grad_out, grads) = (self.grad_out.view(), twice.view_mut());
        succeed(law, self.mechanism.backward_into(&inputs, &saved, grad_out, grads))?;
        for ((_, twice), (_, once)) in arrays(&twice).into_iter().zip(arrays(&self.gradients)) {
            close(law, &twice.to_owned(), &(&once + &once))?;
        }

        let law = "unwanted gradients may be None";
        let inputs_of = ["query", "key", "value"];
        let others = [
            "bias",
            "pair_weights",
            "edge_features",
            "distances",
            "query_positions",
            "key_positions",
        ];
        let all = [&inputs_of[..], &others].concat();
        for names in [&["query"][..], &["key"], &["value"], &inputs_of, &others, &all] {
            let mut rest = succeed(law, Gradients::zeros(&inputs, self.mechanism))?;
            let mut grads = rest.view_mut();
            names.iter().for_each(|name| leave_out(&mut grads, name));
            succeed(law, self.mechanism.backward_into(&inputs, &saved, grad_out, grads))?;
            let pairs = arrays(&rest).into_iter().zip(arrays(&self.gradients));
            for ((_, rest), (_, all)) in pairs.filter(|((name, _), _)| !names.contains(name)) {
                close(law, &rest.to_owned(), &all.to_owned())?;
            }
        }
        Ok(())
    }

    fn finite_inputs_give_finite_results(&self) -> Result<(), Broken> {
        let law = "finite inputs give finite outputs and gradients";
        let finite = |array: ArrayViewD<'_, F>| array.iter().all(|x| x.is_finite());
        require(law, finite(self.out.view().into_dyn()), || self.out.to_string())?;
        for (name, gradient) in arrays(&self.gradients) {
            require(law, finite(gradient.view()), || format!("{name}: {gradient}"))?;
        }
        Ok(())
    }

    fn nothing_flows_through_empty_rows(&self) -> Result<(), Broken> {
        let law = "a query that sees no key reads none";
        let empty: Vec<usize> =
            (0..self.out.nrows()).filter(|&query| self.is_empty_row(query)).collect();
        let mut other = self.sample.clone();
        // Other keys with the same norms, for mechanisms that accept only some norms.
        other.key.mapv_inplace(|value| -value);
        other.value.mapv_inplace(|value| -value);
        let out = self.forward(law, &other)?;
        same_bits(law, &out.select(Axis(0), &empty), &self.out.select(Axis(0), &empty))?;

        let has_params = params::count(self.mechanism) > 0;
        let law = "a query that sees no key gets zeros, unless there are parameters";
        let zero = empty.iter().all(|&query| self.out.row(query).iter().all(|&o| o == F::zero()));
        require(law, zero || has_params, || self.out.to_string())?;

        let law = "gradients do not flow from empty rows to keys and values";
        let mut grad_out = Array2::zeros(self.grad_out.raw_dim());
        for &query in &empty {
            grad_out.row_mut(query).assign(&self.grad_out.row(query));
        }
        let grads = gradients(self.mechanism, self.sample, grad_out.view())?;
        let zero = |grad: &Array2<F>| grad.iter().all(|&grad| grad == F::zero());
        require(law, zero(&grads.key) && zero(&grads.value), || format!("{grads:?}"))?;
        require(law, zero(&grads.query) || has_params, || grads.query.to_string())
    }

    fn bad_calls_are_errors(&self) -> Result<(), Broken> {
        let inputs = succeed("the sample is valid", self.sample.inputs())?;
        let (rows, columns) = self.out.dim();
        for shape in [(rows + 1, columns), (rows, columns + 1)] {
            let law = "an output of the wrong shape is Error::Shape";
            let mut wrong = Array2::zeros(shape);
            let results = [
                self.mechanism.forward_into(&inputs, wrong.view_mut()),
                self.mechanism.forward_train_into(&inputs, wrong.view_mut()).map(drop),
            ];
            for result in results {
                let holds = matches!(result, Err(Error::Shape { .. }));
                require(law, holds, || format!("{result:?}"))?;
            }
            let law = "a grad_out of the wrong shape is Error::Shape";
            let (_, saved) = succeed(law, self.mechanism.forward_train(&inputs))?;
            let result = self.mechanism.backward(&inputs, &saved, wrong.view());
            require(law, matches!(result, Err(Error::Shape { .. })), || format!("{result:?}"))?;
        }
        let law = "gradients of the wrong shape are Error::Shape";
        let (_, saved) = succeed(law, self.mechanism.forward_train(&inputs))?;
        let grad_out = self.grad_out.view();
        for array in 0..arrays(&self.gradients).len() {
            let mut wrong = self.gradients.clone();
            wrong.widen(array);
            let result = self.mechanism.backward_into(&inputs, &saved, grad_out, wrong.view_mut());
            require(law, matches!(result, Err(Error::Shape { .. })), || {
                format!("{result:?} for {}", arrays(&wrong)[array].0)
            })?;
        }

        let law = "another mechanism's saved state is Error::SavedMismatch";
        let result = self.mechanism.backward(&inputs, &Saved::new("nobody", ()), grad_out);
        let holds = matches!(result, Err(Error::SavedMismatch { .. }));
        require(law, holds, || format!("{result:?}"))
    }
}

/// Sets one of the gradients, by its name in [`arrays`], to `None`.
fn leave_out<F>(grads: &mut GradientsMut<'_, F>, name: &str) {
    match name {
        "query" => grads.query = None,
        "key" => grads.key = None,
        "value" => grads.value = None,
        "bias" => grads.bias = None,
        "pair_weights" => grads.pair_weights = None,
        "edge_features" => grads.edge_features = None,
        "distances" => grads.distances = None,
        "query_positions" => grads.query_positions = None,
        _ => grads.key_positions = None,
    }
}

impl<F: Float> Gradients<F> {
    /// Changes the shape of one of [`arrays`].
    fn widen(&mut self, array: usize) {
        fn widen<F: Float, D: Dimension>(gradient: &mut Array<F, D>) {
            let mut shape = gradient.raw_dim();
            shape[0] += 1;
            *gradient = Array::zeros(shape);
        }
        let Self {
            query,
            key,
            value,
            bias,
            pair_weights,
            edge_features,
            distances,
            query_positions,
            key_positions,
            params,
        } = self;
        let mut number = 0..;
        let mut is_next = || number.next() == Some(array);
        let matrices = [query, key, value].into_iter();
        matrices.filter(|_| is_next()).for_each(widen);
        bias.iter_mut().filter(|_| is_next()).for_each(widen);
        pair_weights.iter_mut().filter(|_| is_next()).for_each(widen);
        edge_features.iter_mut().filter(|_| is_next()).for_each(widen);
        distances.iter_mut().filter(|_| is_next()).for_each(widen);
        let positions = query_positions.iter_mut().chain(key_positions);
        positions.filter(|_| is_next()).for_each(widen);
        let params = params.iter_mut().filter(|_| is_next());
        params.for_each(|param| *param = param.clone().insert_axis(Axis(0)));
    }
}

impl<F: Float> Sample<F> {
    /// Returns a sample whose query i is query `queries[i]` of this sample, and the same for keys.
    fn permuted(&self, queries: &[usize], keys: &[usize]) -> Self {
        let mut sample = self.clone();
        sample.query = self.query.select(Axis(0), queries);
        sample.query_positions = self.query_positions.select(Axis(0), queries);
        sample.key = self.key.select(Axis(0), keys);
        sample.value = self.value.select(Axis(0), keys);
        sample.key_positions = self.key_positions.select(Axis(0), keys);
        sample.mask = self.mask.as_ref().map(|mask| permuted(mask, queries, keys));
        let relabelled = |graph: &Graph| {
            let new = |order: &[usize], old| order.iter().position(|&node| node == old);
            let edges = edges(graph).into_iter().map(|(query, key)| {
                let edge = new(queries, query).zip(new(keys, key));
                edge.expect("a permutation holds every node")
            });
            let graph = Graph::from_edges(queries.len(), keys.len(), edges);
            graph.expect("relabelled edges are in range")
        };
        sample.latent = relabelled(&self.latent);
        if let Some(graph) = &self.graph {
            // The edges keep their order, and so do their data.
            let by_keys = self.bias.as_ref().filter(|bias| bias.ndim() == 3);
            let bias = by_keys.map(|bias| permuted(bias, queries, keys));
            sample.bias = bias.or(sample.bias);
            sample.graph = Some(relabelled(graph));
            return sample;
        }
        let pairs: Vec<usize> = (queries.iter())
            .flat_map(|query| keys.iter().map(move |key| query * keys.len() + key))
            .collect();
        sample.select_pairs(&pairs);
        sample.bias = self.bias.as_ref().map(|bias| {
            let is_by_pair = bias.ndim() == 2 && *bias.shape() != [queries.len(), keys.len()];
            if is_by_pair { bias.select(Axis(0), &pairs) } else { permuted(bias, queries, keys) }
        });
        sample
    }

    /// Returns one segment, as dense inputs.
    fn segment(&self, segment: usize) -> Self {
        let segments = self.segments.as_ref().expect("packed inputs");
        let queries: Vec<usize> = segments.queries(segment).collect();
        let keys: Vec<usize> = segments.keys(segment).collect();
        let mut sample = self.clone();
        sample.segments = None;
        sample.query = self.query.select(Axis(0), &queries);
        sample.query_positions = self.query_positions.select(Axis(0), &queries);
        sample.key = self.key.select(Axis(0), &keys);
        sample.value = self.value.select(Axis(0), &keys);
        sample.key_positions = self.key_positions.select(Axis(0), &keys);
        sample.mask = self.mask.as_ref().map(|mask| permuted(mask, &queries, &keys));
        let pairs: Vec<usize> = segments.pairs(segment).collect();
        sample.select_pairs(&pairs);
        sample.bias = self.bias.as_ref().map(|bias| match bias.ndim() {
            2 => bias.select(Axis(0), &pairs),
            _ => permuted(bias, &queries, &keys),
        });
        sample.dropout = self.dropout.map(|dropout| dropout.of_segment(segment));
        let latent = edges(&self.latent).into_iter().filter_map(|(query, key)| {
            let query = query.checked_sub(segments.queries(segment).start)?;
            let key = key.checked_sub(segments.keys(segment).start)?;
            (query < queries.len() && key < keys.len()).then_some((query, key))
        });
        let latent = latent.collect::<Vec<_>>();
        sample.latent = Graph::from_edges(queries.len(), keys.len(), latent).expect("in range");
        sample
    }

    /// Returns a sample with as many heads of keys and values as of queries: each query head has its own
    /// copy.
    fn ungrouped(&self) -> Self {
        let repeated = |array: &Array2<F>| {
            let dim = array.ncols() / self.kv_heads;
            let kv_head = |head| head * self.kv_heads / self.heads;
            let columns = (0..self.heads)
                .flat_map(|head| kv_head(head) * dim..(kv_head(head) + 1) * dim)
                .collect::<Vec<_>>();
            array.select(Axis(1), &columns)
        };
        let (key, value) = (repeated(&self.key), repeated(&self.value));
        Self { key, value, kv_heads: self.heads, ..self.clone() }
    }

    /// Returns the given pairs of these inputs as a graph.
    fn as_graph(&self, inputs: &Inputs<'_, F>, pairs: &[Pair]) -> crate::Result<Self> {
        let mut sample = self.clone();
        let edges = pairs.iter().map(|pair| (pair.query, pair.key));
        sample.graph = Some(Graph::from_edges(inputs.num_queries(), inputs.num_keys(), edges)?);
        let latent = visible_edges(&self.latent, inputs);
        sample.latent = Graph::from_edges(inputs.num_queries(), inputs.num_keys(), latent)?;
        sample.segments = None;
        sample.causal = None;
        sample.mask = None;
        sample.pair_mask = None;
        sample.select_pairs(&pairs.iter().map(|pair| pair.index).collect::<Vec<_>>());
        sample.bias = inputs.bias().map(|bias| {
            let logit = |(pair, head): (usize, usize)| bias.at(pairs[pair], head);
            Array2::from_shape_fn((pairs.len(), bias.num_heads()), logit).into_dyn()
        });
        Ok(sample)
    }
}

/// Permutes an array whose last two axes are queries and keys, or 1 where they share an entry.
fn permuted<T: Copy>(array: &ArrayD<T>, queries: &[usize], keys: &[usize]) -> ArrayD<T> {
    let mut permuted = array.clone();
    for (axis, order) in (array.ndim() - 2..).zip([queries, keys]) {
        if permuted.shape()[axis] != 1 {
            permuted = permuted.select(Axis(axis), order);
        }
    }
    permuted
}

/// Iterates over the pairs that any head sees.
fn visible_pairs<F: Float>(inputs: &Inputs<'_, F>) -> impl Iterator<Item = Pair> {
    let rows = (0..inputs.num_queries()).flat_map(|query| inputs.row(query));
    rows.filter(|&pair| (0..bias_heads(inputs)).any(|head| !is_hidden_from(inputs, pair, head)))
}

fn is_hidden_from<F: Float>(inputs: &Inputs<'_, F>, pair: Pair, head: usize) -> bool {
    let head = head.min(bias_heads(inputs) - 1);
    inputs.bias().is_some_and(|bias| bias.at(pair, head) == F::neg_infinity())
}

/// Returns the number of heads with separate biases.
fn bias_heads<F: Float>(inputs: &Inputs<'_, F>) -> usize {
    inputs.bias().map_or(1, |bias| bias.num_heads())
}

/// Returns the edges of a graph that mask and causal pattern do not hide.
fn visible_edges<F: Float>(graph: &Graph, inputs: &Inputs<'_, F>) -> Vec<(usize, usize)> {
    let sees = |&(query, key): &_| inputs.sees_key(query, key);
    edges(graph).into_iter().filter(sees).collect()
}

/// Returns query and key of every edge, in the caller's order.
fn edges(graph: &Graph) -> Vec<(usize, usize)> {
    let mut edges = vec![(0, 0); graph.num_edges()];
    for query in 0..graph.num_queries() {
        for (key, edge) in graph.row(query) {
            edges[edge] = (query, key);
        }
    }
    edges
}

fn permutation(n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(&mut Xoshiro256PlusPlus::seed_from_u64(5));
    order
}

fn gradients<F: Float>(
    mechanism: &dyn Attention<F>,
    sample: &Sample<F>,
    grad_out: ArrayView2<'_, F>,
) -> Result<Gradients<F>, Broken> {
    let law = "backward succeeds after forward_train";
    let inputs = succeed(law, sample.inputs())?;
    let (_, saved) = succeed(law, mechanism.forward_train(&inputs))?;
    succeed(law, mechanism.backward(&inputs, &saved, grad_out))
}

/// The allowed difference of two sums of the same numbers of order 1 in a different order: some hundred
/// terms, each with a few roundings.
fn rounding<F: Float>() -> F {
    F::from_f64(1e3) * F::epsilon()
}

fn same_bits<F: Float>(
    law: &'static str,
    actual: &Array2<F>,
    expected: &Array2<F>,
) -> Result<(), Broken> {
    require(law, actual == expected, || format!("{actual}\ninstead of\n{expected}"))
}

/// Requires equality up to rounding, relative to the largest entry; NaN and infinities are never close.
fn close<F: Float, D: Dimension>(
    law: &'static str,
    actual: &Array<F, D>,
    expected: &Array<F, D>,
) -> Result<(), Broken> {
    let largest = expected.iter().fold(F::one(), |max, value| max.max(value.abs()));
    let close = |a: F, b: F| (a - b).abs() <= rounding::<F>() * largest;
    let holds = largest.is_finite()
        && actual.shape() == expected.shape()
        && actual.iter().zip(expected).all(|(&a, &b)| close(a, b));
    require(law, holds, || format!("{actual}\ninstead of\n{expected}"))
}

fn close_gradients<F: Float>(
    law: &'static str,
    actual: &Gradients<F>,
    expected: &Gradients<F>,
) -> Result<(), Broken> {
    for ((_, actual), (_, expected)) in arrays(actual).into_iter().zip(arrays(expected)) {
        close(law, &actual.to_owned(), &expected.to_owned())?;
    }
    Ok(())
}
