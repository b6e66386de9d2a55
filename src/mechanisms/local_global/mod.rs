//! Sliding windows with global positions, and local and global edges: [`LocalGlobal`].

mod gate;
mod partial;
mod window;

pub use window::Window;
use window::{Block, Kind};

use crate::attention::{Attention, Saved, check_output};
use crate::cache::{self, KeyValueCache};
use crate::element::{try_vec, try_zeros};
use crate::error::{Error, Result};
use crate::gradients::GradientsMut;
use crate::inputs::{Inputs, Pattern, SelectedInputs};
use crate::kernels::Float;
use crate::kernels::normalizer::Normalizer;
use crate::kernels::problem::{Problem, output_dim};
use crate::mechanisms::fill_uniform;
use crate::mechanisms::flash::{Flash, State};
use crate::mechanisms::packed;
use crate::mechanisms::scaled_dot_product::{dot_logit, dot_logit_vjp};
use crate::params::{Params, prefixed};
use crate::partial::{PartialUpstream, merge_rows};
use crate::score::ScoreFunction;
use crate::segments::Segments;
use crate::softmax::Softmax;
use gate::{Gate, SIDES};
use ndarray::{Array1, Array2, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD};
use rand::Rng;
use std::borrow::Cow;

const NAME: &str = "local_global";

/// Attention to nearby keys and a few distant ones, in one of two ways:
/// [`sliding_window`](Self::sliding_window) uses the order of the nodes and attends within a window and
/// to global positions; [`joint`](Self::joint) and [`gated`](Self::gated) distinguish local and global
/// edges by their layer: layer 0 is local, as in an HNSW index, and the layers above are global.
///
/// # A sliding window
///
/// Longformer's pattern (Beltagy et al. 2020, 2004.05150; Zaheer et al. 2020, 2007.14062): one softmax
/// of scaled dot products over the pairs
///
/// ```text
/// −left · dilation ≤ j − i ≤ right · dilation  and  dilation | i − j,    or i global, or j global
/// ```
///
/// each counted once, except pairs hidden by mask, causal pattern or bias. The result is that of
/// [`Flash`] with the equivalent mask, but neither the mask nor a list of the pairs is built: the pairs
/// are split into dense blocks (the window, for each run of queries the global keys outside it, and
/// global queries with all keys), which are processed in the tiles of [`Flash`] and merged like
/// [`Partial`](crate::Partial)s.
///
/// * **Positions** Query i is at the position of key i, with [`Causal::BottomRight`](crate::Causal) of
///   key i + num_keys − num_queries, and with [`Causal::Offset`](crate::Causal) of key i + offset, so
///   windows and globals are also defined if the numbers of queries and keys differ.
///   [Selected](Inputs::select_queries) queries keep their original positions.
/// * **Reads** and **output** as [`Flash`]: mask, causal, bias, dropout (the same mask as over all pairs),
///   weights of pairs, grouped heads. On a graph, edges outside the window and the globals are hidden.
/// * **Cost** O(n · (radius + globals) · (d + d_v)) time per head; memory O(n · (d + d_v) · heads). The
///   rows of globals are copied; with a dilation also queries, keys, values, and the given mask and bias,
///   for one class of positions with the same remainder at a time.
/// * **Errors** as [`Flash`], and [`Error::InvalidArgument`] if there is no node at a global position: in
///   packed inputs, in none of the segments. [`decode`](Attention::decode) needs a causal pattern, which gives the
///   new queries their positions, and accepts global positions that the sequence has not reached yet.
///
/// ```
/// use graph_attention::ndarray::Array2;
/// use graph_attention::{Attention, Flash, Inputs, LocalGlobal, local_global::Window};
///
/// let x = Array2::from_shape_fn((500, 8), |(i, j)| ((i * 7 + j * 3) % 11) as f64 / 11.0);
/// let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
/// let window = Window::new(3).globals(&[0, 250]);
/// let sparse = LocalGlobal::sliding_window(window, Flash::new())?.forward(&inputs)?;
///
/// let mask = Array2::from_shape_fn((500, 500), |(i, j): (usize, usize)| {
///     i.abs_diff(j) <= 3 || [0, 250].contains(&i) || [0, 250].contains(&j)
/// });
/// let masked = Flash::new().forward(&inputs.with_mask(mask.view())?)?;
/// assert!((sparse - masked).iter().all(|difference| difference.abs() < 1e-14));
/// # Ok::<(), graph_attention::Error>(())
/// ```
///
/// # Local and global edges
///
/// ```text
/// joint:  one softmax over both kinds, merged as `Partial`s:  o = (e^{L₀} o_local + e^{L₁} o_global) / (e^{L₀} + e^{L₁})
/// gated:  o = a o_local + (1 − a) o_global,             a = σ(w · q_i + b) for each head
/// ```
///
/// A query (and head) that sees edges of only one kind takes the output of that kind, and one that sees
/// none gets zeros.
///
/// * **Reads** edge layers ([`Inputs::with_edge_layers`]) and what the inner mechanisms read, each for the
///   edges of its own kind; the gate reads queries.
/// * **Output** as the inner mechanisms; with a gate, in one block per head.
/// * **Parameters** of `gated`: `gate.weight` (heads × columns of a head of queries), `gate.bias`
///   (heads), and the parameters of the inner mechanisms with the prefixes `local.` and `global.`.
///   `joint` has none.
/// * **Cost** the inner mechanisms, plus O(pairs) for the two graphs and copies of the per-pair data; on dense
///   inputs, for two masks.
/// * **Errors** [`Error::MissingInput`] without edge layers; with a gate [`Error::Shape`] if the number
///   of heads or of query columns is not the configured one, or if the inner mechanisms return different
///   numbers of columns. Errors of an inner mechanism name it: `local (flash)`.
///
/// ```
/// use graph_attention::ndarray::array;
/// use graph_attention::{Attention, Flash, Graph, Inputs, LocalGlobal};
///
/// let graph = Graph::from_edges(3, 3, [(0, 1), (0, 2), (1, 0), (2, 0)])?;
/// let x = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
/// let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)?.with_edge_layers(&[0, 1, 0, 2])?;
///
/// // One softmax over both kinds equals attention to all neighbours, if both use the same scale.
/// let joint = LocalGlobal::joint(Flash::new(), Flash::new()).forward(&inputs)?;
/// let all = Flash::new().forward(&inputs)?;
/// assert!((joint - all).iter().all(|difference: &f64| difference.abs() < 1e-14));
/// let sharper = Flash::new().with_scale(3.0)?;
/// let joint = LocalGlobal::joint(sharper, Flash::new()).forward(&inputs)?;
/// assert_eq!(joint.row(1), x.row(0));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Debug)]
pub struct LocalGlobal<F: Float, S = ()> {
    form: Form<F, S>,
}

#[derive(Debug)]
enum Form<F: Float, S> {
    SlidingWindow {
        window: Window,
        flash: Flash<S>,
    },
    /// One softmax over local pairs and global ones.
    Joint([Flash<S>; 2]),
    Gated(Gate<F>),
}

/// A part of the pairs of one softmax.
struct Part<'p, 'a, F: Float, S> {
    flash: &'p Flash<S>,
    selected: SelectedInputs<'a, F>,
    /// The window that contains these pairs, if not all are kept.
    reach: Option<[usize; 2]>,
    role: Role,
}

/// The role of a part in the outputs of its queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The first of their pairs.
    First,
    /// More of them.
    More,
    /// All of them: the other parts are ignored.
    Whole,
}

impl<F: Float, S> Part<'_, '_, F, S> {
    fn inputs(&self) -> Inputs<'_, F> {
        self.in_window(self.selected.inputs())
    }

    fn in_window<'i>(&self, inputs: Inputs<'i, F>) -> Inputs<'i, F> {
        self.reach.map_or(inputs, |reach| inputs.with_window(reach))
    }
}

impl<F: Float, S: ScoreFunction<F>> LocalGlobal<F, S> {
    /// Creates attention within a window and to global positions, with scaled dot products that use the
    /// scale, the tiles and the [score function](crate::score) of `flash`. Edge layers are ignored, unless the
    /// score function reads them: only the order of the nodes matters.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the dilation is 0.
    pub fn sliding_window(window: Window, flash: Flash<S>) -> Result<Self> {
        window.validate()?;
        Ok(Self { form: Form::SlidingWindow { window, flash } })
    }
}

impl<F: Float> LocalGlobal<F> {
    /// Creates attention with one softmax over local and global pairs, each kind with the scale of its
    /// own [`Flash`].
    #[must_use]
    pub fn joint(local: Flash, global: Flash) -> Self {
        Self { form: Form::Joint([local, global]) }
    }

    /// Creates attention with two mechanisms of any kind and a learned gate for each of `heads` heads,
    /// whose queries have `head_dim` columns. These are the heads of the inputs, so use 1 if the
    /// mechanisms make their own heads. Initially w is uniform in ±1/√`head_dim` and b is 0.
    ///
    /// ```
    /// use graph_attention::ndarray::array;
    /// use graph_attention::{Attention, Flash, Graph, Inputs, LocalGlobal, params};
    /// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
    ///
    /// let graph = Graph::from_edges(2, 2, [(0, 1), (0, 0), (1, 0)])?;
    /// let x = array![[1.0, 0.0], [0.0, 1.0]];
    /// let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)?.with_edge_layers(&[0, 1, 1])?;
    ///
    /// let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    /// let mut attention = LocalGlobal::gated(2, 1, Flash::new(), Flash::new(), &mut rng)?;
    /// params::load_state(
    ///     &mut attention,
    ///     [("gate.weight", array![[0.0, 0.0]].into_dyn()), ("gate.bias", array![3f64.ln()].into_dyn())],
    /// )?;
    /// let out = attention.forward(&inputs)?;
    /// assert!((out[[0, 1]] - 0.75).abs() < 1e-15); // three quarters local
    /// assert_eq!(out.row(1), x.row(0)); // node 1 only sees a global edge
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `head_dim` or `heads` is 0; [`Error::TooLarge`].
    pub fn gated(
        head_dim: usize,
        heads: usize,
        local: impl Attention<F> + 'static,
        global: impl Attention<F> + 'static,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        for (field, size) in [("head_dim", head_dim), ("heads", heads)] {
            if size == 0 {
                return Err(Error::config(field, "at least 1", size));
            }
        }
        let mut weight = try_zeros("gate.weight", heads, head_dim)?;
        fill_uniform(weight.view_mut(), 1.0 / (head_dim as f64).sqrt(), rng);
        let bias = Array1::from(try_vec("gate.bias", &[heads], F::zero())?);
        let inner: [Box<dyn Attention<F>>; 2] = [Box::new(local), Box::new(global)];
        Ok(Self { form: Form::Gated(Gate { weight, bias, inner }) })
    }
}

impl<F: Float, S: ScoreFunction<F>> LocalGlobal<F, S> {
    /// Visits the pairs of the single softmax (without a gate), one part at a time, so that only one part
    /// is copied at a time.
    fn for_each_part<'a>(
        &self,
        inputs: &Inputs<'a, F>,
        mut visit: impl FnMut(&Part<'_, 'a, F, S>) -> Result<()>,
    ) -> Result<()> {
        match &self.form {
            Form::SlidingWindow { window, flash } => {
                if let Pattern::Graph(_) = inputs.pattern() {
                    let selected = inputs.select_pairs(|pair| window.keeps(inputs, pair))?;
                    return visit(&Part { flash, selected, reach: None, role: Role::First });
                }
                window.for_each_block(inputs, |Block { queries, keys, kind }| {
                    let selected = inputs.select_block(queries, keys)?;
                    let (reach, role) = match kind {
                        Kind::Window => (Some(window.reach()), Role::First),
                        Kind::Far => (None, Role::More),
                        Kind::Global => (None, Role::Whole),
                    };
                    visit(&Part { flash, selected, reach, role })
                })
            }
            Form::Joint(sides) => {
                let parts = sides.iter().zip(by_edge_layer(inputs)?).zip([Role::First, Role::More]);
                for ((flash, selected), role) in parts {
                    visit(&Part { flash, selected, reach: None, role })?;
                }
                Ok(())
            }
            Form::Gated(_) => Ok(()),
        }
    }

    /// Returns the queries that have all of their pairs in one part.
    fn whole_queries(&self, inputs: &Inputs<'_, F>) -> Vec<usize> {
        match (&self.form, inputs.pattern()) {
            (Form::SlidingWindow { window, .. }, Pattern::Dense) => window.global_queries(inputs),
            _ => Vec::new(),
        }
    }

    /// Overwrites `out` and returns the normalizer over all parts and sinks.
    fn run(&self, inputs: &Inputs<'_, F>, mut out: ArrayViewMut2<'_, F>) -> Result<Normalizer<F>> {
        let mut normalizer = self.run_pairs(inputs, out.view_mut())?;
        if let Form::SlidingWindow { flash, .. } = &self.form {
            normalizer.add_sinks(flash.score(), out);
        }
        Ok(normalizer)
    }

    /// Runs [`run`](Self::run) without sinks.
    fn run_pairs(
        &self,
        inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
    ) -> Result<Normalizer<F>> {
        if let Form::SlidingWindow { flash, .. } = &self.form {
            flash.score().check(inputs)?;
        }
        if let Some(segments) = self.segments_with_windows(inputs) {
            let run =
                |inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>| self.run_pairs(inputs, out);
            let parts = packed::for_each_segment(inputs, segments, out, run)?;
            return Ok(Normalizer::join(&parts, inputs.num_heads()));
        }
        let mut normalizer = Normalizer::empty(inputs.num_queries(), inputs.num_heads())?;
        out.fill(F::zero());
        self.for_each_part(inputs, |part| {
            if part.role != Role::More {
                let Normalizer { shift, sum } = &mut normalizer;
                let arrays = [out.view_mut(), shift.view_mut(), sum.view_mut()];
                let places = match part.selected.query_rows() {
                    Some(rows) => {
                        let [out, shift, sum] = arrays.map(|array| rows.of_mut(array));
                        out.zip(shift).zip(sum).map(|((out, shift), sum)| [out, shift, sum])
                    }
                    None => Some(arrays),
                };
                if let Some([out, mut shift, mut sum]) = places {
                    let of_part = part.flash.run_pairs(&part.inputs(), out)?;
                    shift.assign(&of_part.shift);
                    sum.assign(&of_part.sum);
                    return Ok(());
                }
            }
            let partial = part.flash.forward_partial(&part.inputs())?;
            let queries = part.selected.some_queries();
            let into = (0..partial.out().nrows()).map(|row| queries.map_or(row, |all| all[row]));
            if part.role == Role::Whole {
                for query in into.clone() {
                    out.row_mut(query).fill(F::zero());
                    normalizer.clear_row(query);
                }
            }
            merge_rows(out.view_mut(), &mut normalizer, &partial, into, &|_, _, _| {});
            Ok(())
        })?;
        Ok(normalizer)
    }
}

/// The dot products of local and of global pairs, with the scales of both.
fn joint_problems<'p, F: Float, S>(
    inputs: &Inputs<'p, F>,
    [local, global]: &[Flash<S>; 2],
) -> Result<[Problem<'p, F>; 2]> {
    Ok([Problem::new(inputs, local.scale)?, Problem::new(inputs, global.scale)?])
}

fn joint_softmax<F: Float>(
    inputs: &Inputs<'_, F>,
    [local, global]: &[Problem<'_, F>; 2],
) -> Result<Softmax<F>> {
    let layers = inputs.edge_layers(NAME)?;
    Softmax::new(inputs, |pair, head| {
        dot_logit(if layers[pair.index] == 0 { local } else { global }, pair, head)
    })
}

/// Returns the inputs with the pairs of layer 0, and the inputs with the pairs of the layers above.
fn by_edge_layer<'a, F: Float>(inputs: &Inputs<'a, F>) -> Result<[SelectedInputs<'a, F>; 2]> {
    let layers = inputs.edge_layers(NAME)?;
    Ok([
        inputs.select_pairs(|pair| layers[pair.index] == 0)?,
        inputs.select_pairs(|pair| layers[pair.index] > 0)?,
    ])
}

impl<F: Float, S: Params<F>> Params<F> for LocalGlobal<F, S> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        let gate = match &self.form {
            Form::SlidingWindow { flash, .. } => return flash.visit_params(visitor),
            Form::Joint(_) => return,
            Form::Gated(gate) => gate,
        };
        visitor("gate.weight", gate.weight.view().into_dyn());
        visitor("gate.bias", gate.bias.view().into_dyn());
        for (side, inner) in SIDES.iter().zip(&gate.inner) {
            inner.visit_params(&mut prefixed(side, visitor));
        }
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        let gate = match &mut self.form {
            Form::SlidingWindow { flash, .. } => return flash.visit_params_mut(visitor),
            Form::Joint(_) => return,
            Form::Gated(gate) => gate,
        };
        visitor("gate.weight", gate.weight.view_mut().into_dyn());
        visitor("gate.bias", gate.bias.view_mut().into_dyn());
        for (side, inner) in SIDES.iter().zip(&mut gate.inner) {
            inner.visit_params_mut(&mut prefixed(side, visitor));
        }
    }

    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        let gate = match &self.form {
            Form::SlidingWindow { flash, .. } => return flash.visit_buffers(visitor),
            Form::Joint(_) => return,
            Form::Gated(gate) => gate,
        };
        for (side, inner) in SIDES.iter().zip(&gate.inner) {
            inner.visit_buffers(&mut prefixed(side, visitor));
        }
    }

    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        let gate = match &mut self.form {
            Form::SlidingWindow { flash, .. } => return flash.visit_buffers_mut(visitor),
            Form::Joint(_) => return,
            Form::Gated(gate) => gate,
        };
        for (side, inner) in SIDES.iter().zip(&mut gate.inner) {
            inner.visit_buffers_mut(&mut prefixed(side, visitor));
        }
    }
}

impl<F: Float, S: ScoreFunction<F>> Attention<F> for LocalGlobal<F, S> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, inputs: &Inputs<'_, F>) -> usize {
        match &self.form {
            Form::Gated(gate) => gate.output_dim(inputs),
            _ => output_dim(inputs),
        }
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        check_output(self, "out", inputs, out.shape())?;
        match &self.form {
            Form::Gated(gate) => gate.forward(inputs, out),
            _ => {
                self.check_globals(inputs)?;
                self.run(inputs, out).map(drop)
            }
        }
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        check_output(self, "out", inputs, out.shape())?;
        match &self.form {
            Form::Gated(gate) => Ok(Saved::new(NAME, gate.forward_train(inputs, out)?)),
            _ => {
                self.check_globals(inputs)?;
                let normalizer = self.run(inputs, out.view_mut())?;
                Ok(Saved::new(NAME, State { out: out.to_owned(), normalizer }))
            }
        }
    }

    fn backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        grads.check(NAME, inputs, self)?;
        if let Form::Gated(gate) = &self.form {
            return gate.backward(inputs, saved.state(NAME)?, grad_out, grads);
        }
        let state = saved.state::<State<F>>(NAME)?;
        state.check(inputs)?;
        self.check_globals(inputs)?;
        self.vjp(inputs, state.upstream(grad_out), grads.reborrow())?;
        if let Form::SlidingWindow { flash, .. } = &self.form {
            flash.add_sink_gradients(state, grad_out, grads.params);
        }
        Ok(())
    }

    fn decode_into(
        &self,
        inputs: &Inputs<'_, F>,
        caches: &mut [KeyValueCache<F>],
        out: ArrayViewMut2<'_, F>,
    ) -> Result<()> {
        if !matches!(self.form, Form::SlidingWindow { .. }) {
            return cache::decode(self, inputs, caches, out);
        }
        if inputs.causal_alignment().is_none() {
            let expected =
                "a causal pattern, which gives new queries their place after cached keys";
            return Err(Error::config("inputs", expected, "none"));
        }
        // Later rows may be at global positions.
        let forward =
            |inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>| self.run(inputs, out).map(drop);
        cache::decode_by(self, inputs, caches, out, forward)
    }

    fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        match &self.form {
            Form::Gated(gate) => gate.attention_weights(inputs),
            Form::SlidingWindow { window, flash } => {
                window.check_globals(inputs)?;
                let selected = inputs.select_pairs(|pair| window.keeps(inputs, pair))?;
                let weights = flash.attention_weights(&selected.inputs())?;
                let mut total = try_zeros("weights", inputs.num_pairs(), inputs.num_heads())?;
                selected.add_weights(&weights, &mut total, |_, _| F::one());
                Ok(total)
            }
            Form::Joint(sides) => {
                Ok(joint_softmax(inputs, &joint_problems(inputs, sides)?)?.into_weights())
            }
        }
    }

    fn attention_weights_backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        grads.check(NAME, inputs, self)?;
        match &self.form {
            Form::Gated(gate) => gate.attention_weights_backward(inputs, grad_weights, grads),
            Form::SlidingWindow { window, flash } => {
                window.check_globals(inputs)?;
                let selected = inputs.select_pairs(|pair| window.keeps(inputs, pair))?;
                let grad_weights = selected.rows_of_weights(grad_weights)?;
                selected.backward(grads, |inputs, grads| {
                    flash.attention_weights_backward_into(inputs, grad_weights.view(), grads)
                })
            }
            Form::Joint(sides) => {
                let layers = inputs.edge_layers(NAME)?;
                let problems = joint_problems(inputs, sides)?;
                let softmax = joint_softmax(inputs, &problems)?;
                let [local, global] = &problems;
                let grads = &mut grads;
                softmax.weights_backward_into(
                    inputs,
                    grad_weights,
                    grads,
                    |pair, head, grad, grads| {
                        let problem = if layers[pair.index] == 0 { local } else { global };
                        dot_logit_vjp(problem, pair, head, grad, grads);
                    },
                )
            }
        }
    }
}

impl<F: Float, S: ScoreFunction<F>> LocalGlobal<F, S> {
    /// The segments of packed inputs, each of which has windows of its own.
    fn segments_with_windows<'a>(&self, inputs: &Inputs<'a, F>) -> Option<&'a Segments> {
        inputs.packed_segments().filter(|_| matches!(self.form, Form::SlidingWindow { .. }))
    }

    fn check_globals(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        match &self.form {
            Form::SlidingWindow { window, .. } => window.check_globals(inputs),
            _ => Ok(()),
        }
    }

    /// Adds the gradients of the one softmax, given its outputs and normalizer.
    fn vjp(
        &self,
        inputs: &Inputs<'_, F>,
        upstream: PartialUpstream<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        if let Some(segments) = self.segments_with_windows(inputs) {
            let run = |number, inputs: &Inputs<'_, F>, grads: GradientsMut<'_, F>| {
                upstream.with_queries(segments.queries(number), |upstream| {
                    self.vjp(inputs, upstream, grads)
                })
            };
            return packed::backward_by_segment(self, inputs, segments, grads, run);
        }
        // The softmax does not read them, and blocks do not contain them.
        (grads.edge_features, grads.distances) = (None, None);
        (grads.query_positions, grads.key_positions) = (None, None);
        // For queries that see nothing all weights are 0.
        let mut of_others = Cow::Borrowed(upstream.normalizer);
        for query in self.whole_queries(inputs) {
            of_others.to_mut().clear_row(query);
        }
        self.for_each_part(inputs, |part| {
            // e^{s − m} / l with the normalizer over all parts is the weight among all pairs.
            let is_whole = part.role == Role::Whole;
            let normalizer = if is_whole { upstream.normalizer } else { &*of_others };
            let selected = &part.selected;
            let rows = |array: &Array2<F>| -> Result<Array2<F>> {
                let rows = selected.rows_of_queries("normalizer", array.view())?;
                Ok(rows.view().to_owned())
            };
            let normalizer =
                Normalizer { shift: rows(&normalizer.shift)?, sum: rows(&normalizer.sum)? };
            let out = selected.rows_of_queries("out", upstream.out)?;
            let grad_out = selected.rows_of_queries("grad_out", upstream.grad_out)?;
            let of_log_sum = (upstream.grad_log_sum_exp)
                .map(|grad| selected.rows_of_queries("grad_log_sum_exp", grad))
                .transpose()?;
            part.selected.backward(grads.reborrow(), |inputs, mut grads| {
                let upstream = PartialUpstream {
                    out: out.view(),
                    normalizer: &normalizer,
                    grad_out: grad_out.view(),
                    grad_log_sum_exp: of_log_sum.as_ref().map(|grad| grad.view()),
                };
                part.flash.add_gradients(&part.in_window(*inputs), upstream, &mut grads)
            })
        })
    }
}
