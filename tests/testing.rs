//! Tests of the checks in `testing`: for every law there is a faulty mechanism that it must catch.

use graph_attention::ndarray::{
    Array2, ArrayView1, ArrayView2, ArrayViewD, ArrayViewMut, ArrayViewMut1, ArrayViewMut2,
    ArrayViewMutD, Axis, Dimension,
};
use graph_attention::testing::{Shapes, check_attention, check_gradients};
use graph_attention::{
    Attention, Channel, Dropout, DualSpaceConfig, Error, Flash, GradientsMut, Inputs,
    MultiHeadConfig, Params, Pattern, Result, Saved, dual_space::Fusion, params,
};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use std::sync::atomic::{AtomicU32, Ordering};

type In<'a> = Inputs<'a, f64>;
type Out = Array2<f64>;

/// The one step in which a mechanism differs from the correct one inside.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Nothing,
    Refuses(&'static [Channel]),
    /// It hides errors that begin with this text.
    Hides(&'static str),
    /// It fails in the forward (`true`) or backward pass.
    Fails(bool),
    /// It reads these inputs instead.
    Sees(for<'a> fn(&In<'a>) -> Result<In<'a>>),
    /// It changes the query, key and value that it computes with.
    Reads(fn(&In<'_>, [&mut Out; 3])),
    /// It changes the output, given the previous contents.
    Computes(fn(&In<'_>, &Out, &mut Out)),
    TrainsOtherwise,
    /// It also changes the gradients, given grad_out.
    Adds(fn(&In<'_>, ArrayView2<'_, f64>, &mut GradientsMut<'_, f64>)),
    NeedsEveryGradient,
    Weighs(fn(&In<'_>, &mut Out)),
    /// The gradients that it adds to those of the weights.
    AddsOfWeights(fn(&mut GradientsMut<'_, f64>)),
    /// The name of a buffer that it shows, and of the one that it lends for writing.
    Keeps(fn() -> &'static str, &'static str),
    /// A buffer that is shown as it was, whatever is written.
    Forgets,
    /// The last bias of a `MultiHead` is a parameter and a buffer.
    ShowsTwice,
}

use Fault::*;

/// A correct mechanism with a fault.
#[derive(Debug)]
struct Wrong<A>(Fault, A);

impl<A> Wrong<A> {
    fn hide(&self, result: Result<()>) -> Result<()> {
        match (self.0, result) {
            (Hides(start), Err(error)) if error.to_string().starts_with(start) => Ok(()),
            (_, result) => result,
        }
    }

    /// Returns the query, key and value that it computes with.
    fn read(&self, inputs: &In<'_>) -> [Out; 3] {
        let mut arrays = [inputs.query(), inputs.key(), inputs.value()].map(|x| x.to_owned());
        if let Reads(change) = self.0 {
            change(inputs, arrays.each_mut());
        }
        arrays
    }

    fn fail_if(&self, fails: bool) -> Result<()> {
        if fails { Err(Error::NoWeights { mechanism: "wrong" }) } else { Ok(()) }
    }
}

/// Returns leaked numbers.
fn two_more() -> ArrayViewMut1<'static, f64> {
    ArrayViewMut1::from(&mut Box::leak(Box::new([0.0; 2]))[..])
}

impl<A: Params<f64>> Params<f64> for Wrong<A> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f64>)) {
        self.1.visit_params(visitor);
    }
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f64>)) {
        self.1.visit_params_mut(visitor);
    }
    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f64>)) {
        match self.0 {
            Keeps(name, _) => visitor(name(), ArrayView1::from(&[0.0; 2]).into_dyn()),
            Forgets => visitor("kept", ArrayView1::from(&[0.0; 2]).into_dyn()),
            ShowsTwice => self.1.visit_params(&mut |name, param| {
                if name == "out_proj.bias" {
                    visitor(name, param);
                }
            }),
            _ => self.1.visit_buffers(visitor),
        }
    }
    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f64>)) {
        match self.0 {
            Keeps(_, name) => visitor(name, two_more().into_dyn()),
            Forgets => visitor("kept", two_more().into_dyn()),
            ShowsTwice => self.1.visit_params_mut(&mut |name, param| {
                if name == "out_proj.bias" {
                    visitor(name, param);
                }
            }),
            _ => self.1.visit_buffers_mut(visitor),
        }
    }
}

impl<A: Attention<f64>> Attention<f64> for Wrong<A> {
    fn name(&self) -> &'static str {
        "wrong"
    }
    fn output_dim(&self, inputs: &In<'_>) -> usize {
        self.1.output_dim(inputs)
    }
    fn forward_into(&self, inputs: &In<'_>, mut out: ArrayViewMut2<'_, f64>) -> Result<()> {
        match self.0 {
            Refuses(channels) => inputs.check_absent("wrong", channels)?,
            Fails(forward) => self.fail_if(forward)?,
            _ => {}
        }
        let arrays = self.read(inputs);
        let mut seen = with_arrays(inputs, &arrays)?;
        if let Sees(change) = self.0 {
            seen = change(&seen)?;
        }
        let mut answer = Array2::zeros(out.raw_dim());
        self.hide(self.1.forward_into(&seen, answer.view_mut()))?;
        if let Computes(change) = self.0 {
            change(inputs, &out.to_owned(), &mut answer);
        }
        out.assign(&answer);
        Ok(())
    }
    fn forward_train_into(&self, x: &In<'_>, mut out: ArrayViewMut2<'_, f64>) -> Result<Saved> {
        self.forward_into(x, out.view_mut())?;
        if let TrainsOtherwise = self.0 {
            out += 1e-9;
        }
        let arrays = self.read(x);
        Ok(self.1.forward_train(&with_arrays(x, &arrays)?)?.1)
    }
    fn backward_into(
        &self,
        inputs: &In<'_>,
        saved: &Saved,
        grad_out: ArrayView2<'_, f64>,
        mut grads: GradientsMut<'_, f64>,
    ) -> Result<()> {
        match self.0 {
            Fails(forward) => self.fail_if(!forward)?,
            NeedsEveryGradient => self.fail_if(grads.distances.is_none())?,
            Adds(change) => change(inputs, grad_out, &mut grads),
            _ => {}
        }
        let arrays = self.read(inputs);
        let seen = with_arrays(inputs, &arrays)?;
        self.hide(self.1.backward_into(&seen, saved, grad_out, grads))
    }
    fn attention_weights(&self, inputs: &In<'_>) -> Result<Out> {
        let mut weights = self.1.attention_weights(inputs)?;
        if let Weighs(change) = self.0 {
            change(inputs, &mut weights);
        }
        Ok(weights)
    }
    fn attention_weights_backward_into(
        &self,
        inputs: &In<'_>,
        grad_weights: ArrayView2<'_, f64>,
        mut grads: GradientsMut<'_, f64>,
    ) -> Result<()> {
        if let AddsOfWeights(change) = self.0 {
            change(&mut grads);
        }
        self.1.attention_weights_backward_into(inputs, grad_weights, grads)
    }
}

fn with_arrays<'a>(inputs: &In<'a>, arrays: &'a [Out; 3]) -> Result<In<'a>> {
    let [query, key, value] = arrays.each_ref().map(|array| array.view());
    inputs.with_arrays(query, key, value)
}

fn rng() -> Xoshiro256PlusPlus {
    Xoshiro256PlusPlus::seed_from_u64(1)
}

/// Returns a small number, different in each call.
fn drift() -> f64 {
    static CALLS: AtomicU32 = AtomicU32::new(0);
    1e-9 * f64::from(CALLS.fetch_add(1, Ordering::Relaxed))
}

/// As dividing by a norm of 0 would.
fn divide_by_norms(x: &In<'_>, _: &Out, out: &mut Out) {
    for (query, mut out) in x.query().rows().into_iter().zip(out.rows_mut()) {
        if query.iter().all(|&q| q == 0.0) {
            out.fill(f64::INFINITY);
        }
    }
}

fn other_dropout_if_packed<'a>(x: &In<'a>) -> Result<In<'a>> {
    match (x.pattern(), x.dropout()) {
        (Pattern::Packed(_), Some(dropout)) => x.with_dropout(dropout.of_segment(9)),
        _ => Ok(*x),
    }
}

fn ones_for_pair_weights<'a>(x: &In<'a>) -> Result<In<'a>> {
    if !x.has(Channel::PairWeights) {
        return Ok(*x);
    }
    let ones: &Out = Box::leak(Box::new(Array2::ones((x.num_pairs(), 1))));
    x.with_pair_weights(ones.view())
}

fn double_with_pair_weights(x: &In<'_>, _: &Out, out: &mut Out) {
    if x.has(Channel::PairWeights) {
        *out *= 2.0;
    }
}

fn visible(x: &In<'_>) -> Vec<usize> {
    (0..x.num_queries()).flat_map(|query| x.row(query)).map(|pair| pair.index).collect()
}

fn empty_rows(x: &In<'_>) -> impl Iterator<Item = usize> {
    (0..x.num_queries()).filter(|&query| x.row(query).next().is_none())
}

fn leave_empty_rows(x: &In<'_>, old: &Out, out: &mut Out) {
    empty_rows(x).for_each(|query| out.row_mut(query).assign(&old.row(query)));
}

fn fill_empty_rows(x: &In<'_>, out: &mut Out) {
    empty_rows(x).for_each(|query| out.row_mut(query).fill(1.0));
}

/// Returns the sum of the rows of grad_out whose queries see no key.
fn leak(x: &In<'_>, grad_out: ArrayView2<'_, f64>) -> f64 {
    empty_rows(x).map(|query| grad_out.row(query).sum()).sum()
}

/// What it takes to read a channel.
fn distances(x: &In<'_>) -> f64 {
    x.distances("wrong").unwrap().sum()
}

fn features(x: &In<'_>) -> f64 {
    x.edge_features("wrong").unwrap().sum()
}

fn number_rows(array: &mut Out) {
    array.rows_mut().into_iter().zip(1u8..).for_each(|(mut row, i)| row *= f64::from(i));
}

fn nan_to_zero(array: &mut Out) {
    array.mapv_inplace(|entry| if entry.is_nan() { 0.0 } else { entry });
}

/// Reads values in memory order instead of row-major order.
fn read_memory(x: &In<'_>, [_, _, value]: [&mut Out; 3]) {
    let data = x.value().to_slice_memory_order().into_iter().flatten();
    value.iter_mut().zip(data).for_each(|(value, &data)| *value = data);
}

/// Neither honours masks and causal patterns nor refuses them.
fn ignore_masks<'a>(x: &In<'a>) -> Result<In<'a>> {
    match x.pattern() {
        Pattern::Dense => {
            let all = Inputs::dense(x.query(), x.key(), x.value())?;
            all.with_grouped_heads(x.num_heads(), x.num_kv_heads())
        }
        _ => Ok(*x),
    }
}

fn weights_by_row(x: &In<'_>, weights: &mut Out) {
    if let Pattern::Graph(_) = x.pattern() {
        *weights = weights.select(Axis(0), &visible(x));
    }
}

/// Moves weights a thousand times farther from the mean of their row, which keeps the sum.
fn spread_weights(x: &In<'_>, weights: &mut Out) {
    for pair in (0..x.num_queries()).flat_map(|query| x.row(query)) {
        let mean = 1.0 / x.row(pair.query).count() as f64;
        weights.row_mut(pair.index).mapv_inplace(|weight| mean + 1e3 * (weight - mean));
    }
}

fn weigh_hidden_pairs(x: &In<'_>, weights: &mut Out) {
    let hidden = (0..x.num_pairs()).filter(|pair| !visible(x).contains(pair));
    hidden.for_each(|pair| weights.row_mut(pair).fill(1.0));
}

fn read_values_in_empty_rows(x: &In<'_>, _: &Out, out: &mut Out) {
    // Only if some query sees every key, so that the laws about unseen keys do not catch this.
    let sees_all = x.num_queries() > x.num_keys();
    if sees_all && x.value().first().is_some_and(|&value| value > 0.0) {
        fill_empty_rows(x, out);
    }
}

fn add<D: Dimension>(grad: &mut Option<ArrayViewMut<'_, f64, D>>, value: f64) {
    grad.iter_mut().for_each(|grad| *grad += value);
}

fn adds_where_large(x: &In<'_>, _: ArrayView2<'_, f64>, grads: &mut GradientsMut<'_, f64>) {
    let is_large = x.key().iter().any(|entry| entry.abs() > 1e4);
    add(&mut grads.value, f64::from(u8::from(is_large)));
}

fn adds_where_strided(_: &In<'_>, _: ArrayView2<'_, f64>, grads: &mut GradientsMut<'_, f64>) {
    let strided = grads.value.as_ref().is_some_and(|value| !value.is_standard_layout());
    add(&mut grads.value, f64::from(u8::from(strided)));
}

/// Multiplies hidden keys by zero: harmless unless a query that does not see them is NaN.
fn nan_query_leaks(x: &In<'_>, _: ArrayView2<'_, f64>, grads: &mut GradientsMut<'_, f64>) {
    add(&mut grads.key, 0.0 * x.query().sum());
}

/// Lets query heads read the keys and values of the other group.
fn swap_groups(x: &In<'_>, [_, key, value]: [&mut Out; 3]) {
    if x.num_kv_heads() < x.num_heads() {
        for array in [key, value] {
            let half = array.ncols() / 2;
            let order: Vec<usize> = (half..array.ncols()).chain(0..half).collect();
            *array = array.select(Axis(1), &order);
        }
    }
}

/// Faults, each with the first words of the law that it breaks.
const FAULTS: &[(Fault, &str)] = &[
    (Refuses(&[Channel::Distances]), "accepts plain dense inputs or a plain graph"),
    (Fails(true), "forward succeeds"),
    (Fails(false), "backward succeeds after forward_train"),
    (Computes(|_, old, out| *out += old), "forward_into overwrites its output"),
    (Computes(leave_empty_rows), "forward_into overwrites its output"),
    (Computes(|_, _, out| *out += drift()), "forward_into overwrites its output and repeats its"),
    (TrainsOtherwise, "forward_train_into gives the numbers of forward_into"),
    (Adds(|_, _, grads| add(&mut grads.query, drift())), "backward_into repeats its bits"),
    (Reads(read_memory), "strided, transposed and reversed views"),
    (Adds(adds_where_strided), "strided, transposed and reversed views"),
    (Adds(adds_where_large), "Σ v·dv = Σ g·o for large logits"),
    (Reads(|_, [_, key, _]| number_rows(key)), "permuting the keys changes nothing"),
    (Reads(|_, [query, _, _]| number_rows(query)), "permuting the queries permutes the output"),
    (Sees(ignore_masks), "the same visible pairs as a graph"),
    (Weighs(weights_by_row), "weights follow the pair order"),
    // Hidden data is multiplied by zero instead of skipped.
    (Computes(|x, _, out| *out += 0.0 * x.key().sum()), "the data of hidden pairs"),
    (Computes(|x, _, out| *out += 0.0 * x.value().sum()), "the data of hidden pairs"),
    (Computes(|x, _, out| *out += 0.0 * distances(x)), "the data of hidden pairs"),
    (Computes(|x, _, out| *out += 0.0 * features(x)), "the data of hidden pairs"),
    (Adds(|x, _, grads| add(&mut grads.query, 0.0 * x.key().sum())), "unseen keys"),
    (Adds(|x, _, grads| add(&mut grads.key, 0.0 * x.key().sum())), "unseen keys"),
    (Adds(|x, _, grads| add(&mut grads.value, 0.0 * x.key().sum())), "unseen keys"),
    (Adds(|_, _, grads| add(&mut grads.value, 1e-9)), "unseen keys have zero gradients"),
    (
        Adds(|x, _, g| g.distances.iter_mut().for_each(|grad| *grad += 0.0 * distances(x))),
        "unseen keys",
    ),
    (
        Adds(|x, _, g| g.edge_features.iter_mut().for_each(|grad| *grad += 0.0 * features(x))),
        "unseen keys",
    ),
    (
        Adds(|x, _, g| g.bias.iter_mut().for_each(|grad| *grad += 0.0 * x.key().sum())),
        "unseen keys",
    ),
    (Reads(|_, [_, key, value]| [key, value].into_iter().for_each(nan_to_zero)), "NaN in a key"),
    (Computes(|x, _, out| *out += 0.0 * x.key().first().unwrap_or(&0.0)), "NaN in a key and"),
    (Reads(|_, [query, _, _]| nan_to_zero(query)), "NaN in a query reaches its own row"),
    (Computes(|x, _, out| *out += 0.0 * x.query().sum()), "NaN in a query reaches its own row"),
    (Adds(nan_query_leaks), "NaN in a query reaches the gradients"),
    (Sees(|x| x.with_dropout(Dropout { probability: 0.0, seed: 0 })), "bias, dropout and weights"),
    (Sees(ones_for_pair_weights), "bias, dropout and weights"),
    (Computes(double_with_pair_weights), "weights of pairs that are 1 change nothing"),
    (Computes(divide_by_norms), "finite inputs give finite outputs and gradients"),
    (Sees(other_dropout_if_packed), "packed inputs give what a loop over their segments gives"),
    (Reads(swap_groups), "grouped heads are the same"),
    (Sees(|x| x.with_grouped_heads(2, 1)), "a head reads its own columns, and no others"),
    (Weighs(|_, weights| *weights /= 2.0), "weights are non-negative"),
    (Weighs(spread_weights), "weights are non-negative"),
    (Weighs(weigh_hidden_pairs), "weights are non-negative, 0 for hidden pairs"),
    (
        Adds(|_, _, g| add(&mut g.bias, f64::from(u8::from(g.query.is_none())))),
        "unwanted gradients may",
    ),
    (
        Adds(|_, _, grads| grads.query.iter_mut().for_each(|grad| grad.fill(0.0))),
        "gradients are added to what is there",
    ),
    (NeedsEveryGradient, "unwanted gradients may be None"),
    (Computes(read_values_in_empty_rows), "a query that sees no key reads none"),
    (Computes(|x, _, out| fill_empty_rows(x, out)), "a query that sees no key gets zeros"),
    (Adds(|x, grad_out, grads| add(&mut grads.value, leak(x, grad_out))), "gradients do not flow"),
    (Adds(|x, grad_out, grads| add(&mut grads.query, leak(x, grad_out))), "gradients do not flow"),
    (Hides("out:"), "an output of the wrong shape is Error::Shape"),
    (Hides("grad_out:"), "a grad_out of the wrong shape is Error::Shape"),
    (Hides("grads.query:"), "gradients of the wrong shape are Error::Shape"),
    (Hides("grads.key:"), "gradients of the wrong shape are Error::Shape"),
    (Hides("grads.value:"), "gradients of the wrong shape are Error::Shape"),
    (Hides("grads.bias:"), "gradients of the wrong shape are Error::Shape"),
    (Hides("grads.query_positions:"), "gradients of the wrong shape are Error::Shape"),
    (Hides("grads.key_positions:"), "gradients of the wrong shape are Error::Shape"),
    (Hides("grads.edge_features:"), "gradients of the wrong shape are Error::Shape"),
    (Hides("grads.distances:"), "gradients of the wrong shape are Error::Shape"),
    (Hides("flash: expected the state"), "another mechanism's saved state"),
    (Keeps(changing_name, "kept"), "parameters and buffers are visited in a fixed order"),
];

/// Returns a different name in each call.
fn changing_name() -> &'static str {
    static CALLS: AtomicU32 = AtomicU32::new(0);
    ["one", "other"][CALLS.fetch_add(1, Ordering::Relaxed) as usize % 2]
}

/// Faults of a mechanism with parameters.
const NAME_FAULTS: &[(Fault, &str)] =
    &[(ShowsTwice, "all parameters and buffers have different names")];

#[test]
fn every_law_is_broken_by_a_fault() {
    // Small numbers, so that a value above 1/2 must have been changed by the check.
    let shapes = Shapes::new(8, 4, 4).kv_heads(4, 2).scale(0.1);
    check_attention(&Wrong(Nothing, Flash::new()), &shapes).unwrap();
    for &(fault, law) in FAULTS {
        let broken = check_attention(&Wrong(fault, Flash::new()), &shapes).map_err(|v| v.law);
        assert!(matches!(broken, Err(broken) if broken.starts_with(law)), "{law}: {broken:?}");
    }
    for &(fault, law) in NAME_FAULTS {
        let layer = MultiHeadConfig::new(2, 1).init(Flash::new(), &mut rng()).unwrap();
        let broken = check_attention(&Wrong(fault, layer), &Shapes::new(2, 2, 2));
        assert!(matches!(broken, Err(broken) if broken.law.starts_with(law)), "{law}");
    }
    let faults = || FAULTS.iter().chain(NAME_FAULTS);
    for law in include_str!("../src/testing/laws.rs").split("let law = \"").skip(1) {
        assert!(faults().any(|fault| law.starts_with(fault.1)), "no fault breaks {law:.70}");
    }
}

#[test]
fn heads_may_share_queries_but_not_keys() {
    // Like a router: every head uses the sum of all columns of its query.
    let routed = Reads(|_, [query, ..]| {
        let sums = query.sum_axis(Axis(1)).insert_axis(Axis(1));
        *query += &sums;
    });
    let shapes = Shapes::new(8, 4, 4).kv_heads(4, 2).scale(0.1);
    let law = |fault, shapes: &Shapes| {
        check_attention(&Wrong(fault, Flash::new()), shapes).map_err(|violation| violation.law)
    };
    let own_columns = Err("a head reads its own columns, and no others");
    assert_eq!(law(routed, &shapes).map(drop), own_columns);
    let shapes = shapes.whole_queries();
    assert!(law(routed, &shapes).is_ok());
    assert_eq!(law(Sees(|x| x.with_grouped_heads(2, 1)), &shapes).map(drop), own_columns);
}

#[test]
fn latent_neighbours_are_seen_where_they_are_read() {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let config = DualSpaceConfig::new(Fusion::Gated, 3);
    let dual = config.init(Flash::new(), Flash::new(), Flash::new(), &mut rng).unwrap();
    let law = |shapes| {
        check_attention::<f64>(&dual, &shapes).map(drop).map_err(|violation| violation.law)
    };
    assert_eq!(law(Shapes::new(3, 3, 3).reads_latent()), Ok(()));
    let unseen = law(Shapes::new(3, 3, 3)).unwrap_err();
    assert!(unseen.starts_with("the data of hidden pairs and of unseen keys"), "{unseen}");
}

#[test]
fn every_gradient_is_compared() {
    let wrong =
        |fault| Wrong(fault, MultiHeadConfig::new(2, 1).init(Flash::new(), &mut rng()).unwrap());
    let mut right = wrong(Nothing);
    check_gradients(&mut right, &Shapes::new(2, 2, 2)).unwrap();
    assert_eq!(params::state(&right), params::state(&wrong(Nothing)), "not put back");

    // Slightly wrong, or read in the forward pass and ignored in the backward pass.
    let faults: &[(Fault, &str)] = &[
        (Adds(|_, _, grads| add(&mut grads.query, 1e-5)), "query,"),
        (Adds(|_, _, grads| add(&mut grads.key, 1e-5)), "key,"),
        (Adds(|_, _, grads| add(&mut grads.value, 1e-5)), "value,"),
        (Adds(|_, _, grads| add(&mut grads.value, f64::INFINITY)), "value,"),
        (Adds(|_, _, grads| add(&mut grads.key, f64::NAN)), "key,"),
        (Adds(|_, _, grads| grads.bias.iter_mut().for_each(|grad| *grad += 1e-5)), "bias,"),
        (Adds(|_, _, grads| add(&mut grads.query_positions, 1e-5)), "query_positions,"),
        (Adds(|_, _, grads| add(&mut grads.key_positions, 1e-5)), "key_positions,"),
        (Computes(|x, _, out| *out += distances(x)), "distances,"),
        (Computes(|x, _, out| *out += features(x)), "edge_features,"),
        (Adds(|_, _, grads| grads.params[0] += 1e-5), "in_proj_weight,"),
        (Adds(|_, _, grads| grads.params[3] += 1e-5), "out_proj.bias,"),
        (AddsOfWeights(|grads| add(&mut grads.key, 1e-5)), "key,"),
        (AddsOfWeights(|grads| grads.params[0] += 1e-5), "in_proj_weight,"),
        (Fails(false), "wrong has no attention weights"),
    ];
    for &(fault, array) in faults {
        let violation = check_gradients(&mut wrong(fault), &Shapes::new(2, 2, 2)).unwrap_err();
        assert!(violation.detail.starts_with(array), "{array} {violation}");
    }
}

#[test]
fn a_state_that_does_not_come_back_is_a_violation() {
    let shapes = Shapes::new(2, 2, 2);
    for (fault, law) in [
        (Keeps(|| "kept", "other"), "the arrays visited for writing are those"),
        (Forgets, "the arrays visited for writing are those"),
    ] {
        let violation = check_gradients(&mut Wrong(fault, Flash::new()), &shapes).unwrap_err();
        assert!(violation.law.starts_with(law), "{violation}");
    }
    let layer = MultiHeadConfig::new(2, 1).init(Flash::new(), &mut rng()).unwrap();
    let violation = check_gradients(&mut Wrong(ShowsTwice, layer), &shapes).unwrap_err();
    assert_eq!(violation.law, "a saved state can be restored", "{violation}");
}

#[test]
fn channels_may_be_refused() {
    for (channels, cases) in [
        (
            &[Channel::Mask],
            "causal, causal bottom right, mask, mask per head, mask of pairs, \
             causal weights of pairs, packed causal, packed causal bottom right, packed mask, packed mask of pairs, graph mask, \
             graph mask per head, graph mask of pairs, graph causal",
        ),
        (
            &[Channel::Bias],
            "bias, bias per head, bias that hides, bias of keys, \
             weights of pairs under bias and dropout, packed bias, packed bias of keys, graph bias, \
             graph bias of keys",
        ),
        (
            &[Channel::Dropout],
            "dropout, weights of pairs under bias and dropout, packed dropout, graph dropout",
        ),
        (
            &[Channel::PairWeights],
            "weights of pairs, weights of pairs under bias and dropout, causal weights of pairs, \
             packed weights of pairs, graph weights of pairs",
        ),
    ] {
        let choosy = Wrong(Refuses(channels), Flash::new());
        let report = check_attention(&choosy, &Shapes::new(3, 3, 2)).unwrap();
        assert_eq!(report.refused.join(", "), cases);
    }
}
