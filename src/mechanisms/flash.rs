use crate::attention::{Attention, Saved, check_output};
use crate::element::try_zeros;
use crate::error::{Channel, Error, Result, check_shape};
use crate::gradients::{Gradients, GradientsMut};
use crate::inputs::{Inputs, Pattern, head_columns};
use crate::kernels::Float;
use crate::kernels::dense::{FEW_QUERIES, TileSizes};
use crate::kernels::level::level;
use crate::kernels::normalizer::Normalizer;
use crate::kernels::problem::{Problem, check_scale, output_dim};
use crate::mechanisms::scaled_dot_product::ScaledDotProduct;
use crate::mechanisms::{packed, seen_keys};
use crate::params::{self, Params, params_of};
use crate::partial::{Partial, PartialUpstream, backward_partial};
use crate::score::{ScoreFunction, add_entries, num_entries};
use ndarray::{Array2, ArrayD, ArrayView2, ArrayViewMut2, s};

const NAME: &str = "flash";

/// Exact scaled dot-product attention in tiles (Dao et al. 2022, 2205.14135; Dao 2023, 2307.08691;
/// Rabe & Staats 2021, 2112.05682; Milakov & Gimelshein 2018, 1805.02867): computes the same function as
/// [`ScaledDotProduct`] without storing the weights.
///
/// ```text
/// for each tile of keys:   S = scale · Q Kᵀ + B      m' = max(m, rowmax S)      α = e^{m − m'}
///                          l ← α l + Σ e^{S − m'}    O ← α O + e^{S − m'} V     m ← m'
/// at the end:              O ← O / l
/// ```
///
/// The maximum is only updated when a score exceeds it by more than 4, which avoids most rescaling. Sums
/// over many tiles are compensated (Kahan 1965), so their error does not grow with the number of keys.
/// The backward pass recomputes e^{S − m} / l tile by tile from the saved O, m and l. Other
/// implementations save m + log l, whose rounding causes an error in the weights when logits are large.
///
/// Dense inputs are processed in tiles of queries × keys; graphs, and inputs with fewer than 8 queries,
/// in tiles of one query's neighbours. Both use the CPU's SIMD units, and threads if the feature
/// `parallel` is on. On a graph the backward pass runs once by query and once by key
/// ([`Graph::transpose`](crate::Graph::transpose), computed on first use and cached). If the number of heads of keys
/// is a multiple of 4 (of 2 in `f64`) and neither bias nor mask hides pairs, both passes copy queries, keys and values
/// of a graph first, with the heads side by side for each column, which needs no sums across the lanes of a vector.
///
/// * **Reads** and **output** as [`ScaledDotProduct`]: dense, causal (whole tiles above the diagonal
///   are never computed), mask, bias, dropout, weights of pairs and the gradients of both, grouped heads,
///   graphs.
/// * **Parameters** those of the [score function](crate::score), if one is [set](Self::with_score); otherwise none.
/// * **Cost** O(pairs · (d + d_v)) time per head; memory O(n · (d + d_v) · heads) for copies, saved
///   outputs and gradients, plus O(tile). Only [`attention_weights`](Attention::attention_weights) takes
///   O(pairs · heads), the size of its result.
/// * **Errors** as [`ScaledDotProduct`].
///
/// ```
/// use graph_attention::{Attention, Flash, Inputs, ScaledDotProduct};
/// use graph_attention::ndarray::Array2;
///
/// let x = Array2::from_shape_fn((300, 8), |(i, j)| ((i * 7 + j * 3) % 11) as f64 / 11.0);
/// let inputs = Inputs::dense(x.view(), x.view(), x.view())?.with_heads(2)?.with_causal();
/// let fast = Flash::new().forward(&inputs)?;
/// let plain = ScaledDotProduct::new().forward(&inputs)?;
/// assert!((fast - plain).iter().all(|difference| difference.abs() < 1e-14));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Flash<S = ()> {
    /// `None` is 1/√d.
    pub(crate) scale: Option<f64>,
    tiles: TileSizes,
    pub(crate) score: S,
}

/// The inputs of the backward pass of one softmax.
pub(crate) struct State<F> {
    pub(crate) out: Array2<F>,
    pub(crate) normalizer: Normalizer<F>,
}

impl<F: Float> State<F> {
    pub(crate) fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        let (queries, heads) = (inputs.num_queries(), inputs.num_heads());
        check_shape("saved out", &[queries, output_dim(inputs)], self.out.shape())?;
        self.normalizer.check(queries, heads)
    }

    pub(crate) fn upstream<'u>(&'u self, grad_out: ArrayView2<'u, F>) -> PartialUpstream<'u, F> {
        let Self { out, normalizer } = self;
        PartialUpstream { out: out.view(), normalizer, grad_out, grad_log_sum_exp: None }
    }
}

impl Default for Flash {
    /// Tiles with scores that stay in the first-level cache.
    fn default() -> Self {
        Self { scale: None, tiles: TileSizes { queries: 96, keys: 96 }, score: () }
    }
}

impl Flash {
    /// Creates the mechanism with the scale 1/√d.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl<S> Flash<S> {
    /// Sets a function of the logits, which is applied to scale · q·k before bias and mask: a soft cap, ALiBi, a
    /// learned table, sinks, or your own. Its parameters become the parameters of the mechanism. The module
    /// [`score`](crate::score) has the functions and an example.
    #[must_use]
    pub fn with_score<T>(self, score: T) -> Flash<T> {
        let Self { scale, tiles, .. } = self;
        Flash { scale, tiles, score }
    }

    /// Returns the function of the logits.
    pub fn score(&self) -> &S {
        &self.score
    }

    /// Sets the scale of the dot products, 1/√d by default. A larger scale makes the weights sharper.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `scale` is not finite.
    pub fn with_scale(mut self, scale: f64) -> Result<Self> {
        check_scale(scale)?;
        self.scale = Some(scale);
        Ok(self)
    }

    /// Sets the size of the tiles, 96 × 96 by default. The result is the same up to rounding. Sizes
    /// larger than the problem, or than 1024, are reduced, and so is `queries` if only a few tiles would be
    /// of unequal length. On a graph only `keys` is used.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a size is 0.
    pub fn with_tiles(mut self, queries: usize, keys: usize) -> Result<Self> {
        for (field, size) in [("tiles.queries", queries), ("tiles.keys", keys)] {
            if size == 0 {
                return Err(Error::config(field, "at least 1", size));
            }
        }
        self.tiles = TileSizes { queries, keys };
        Ok(self)
    }

    /// Returns the outputs and their normalizer, so that outputs over several sets of keys can be merged
    /// with [`Partial::merge`]. [Sinks](crate::score::Sinks) are left out: see
    /// [`sink_partial`](Self::sink_partial).
    ///
    /// # Errors
    /// As [`Attention::forward_into`].
    pub fn forward_partial<F: Float>(&self, inputs: &Inputs<'_, F>) -> Result<Partial<F>>
    where
        S: ScoreFunction<F>,
    {
        let mut out = try_zeros("out", inputs.num_queries(), output_dim(inputs))?;
        let Normalizer { shift, sum } = self.run_pairs(inputs, out.view_mut())?;
        Partial::new(out, shift, sum)
    }

    /// Returns the sinks of the score function as one more partial result, with outputs of 0, to be merged once with
    /// those over keys. It is [empty](Partial::empty) if there are no sinks.
    ///
    /// [`Partial::merge_vjp`] returns the gradient of its log-sum-exp, for
    /// [`sink_partial_backward_into`](Self::sink_partial_backward_into).
    ///
    /// # Errors
    /// As [`Attention::forward_into`].
    pub fn sink_partial<F: Float>(&self, inputs: &Inputs<'_, F>) -> Result<Partial<F>>
    where
        S: ScoreFunction<F>,
    {
        self.score.check(inputs)?;
        let mut out = try_zeros("out", inputs.num_queries(), output_dim(inputs))?;
        let mut normalizer = Normalizer::empty(inputs.num_queries(), inputs.num_heads())?;
        normalizer.add_sinks(&self.score, out.view_mut());
        Partial::new(out, normalizer.shift, normalizer.sum)
    }

    /// Adds the gradients of the sinks to the gradients of the parameters, given that of the log-sum-exp of
    /// [`sink_partial`](Self::sink_partial), num_queries × heads.
    ///
    /// # Errors
    /// As [`Attention::backward_into`].
    pub fn sink_partial_backward_into<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        grad_log_sum_exp: ArrayView2<'_, F>,
        grad_params: &mut [ArrayD<F>],
    ) -> Result<()>
    where
        S: ScoreFunction<F>,
    {
        self.score.check(inputs)?;
        let shape = [inputs.num_queries(), inputs.num_heads()];
        check_shape("grad_log_sum_exp", &shape, grad_log_sum_exp.shape())?;
        params::check_gradients(self, grad_params)?;
        let mut entries = vec![0.0; num_entries(&self.score)];
        for (head, of_head) in grad_log_sum_exp.columns().into_iter().enumerate() {
            let sum = of_head.iter().map(|grad| grad.as_f64()).sum();
            self.score.sink_vjp(head, sum, &mut entries);
        }
        add_entries(&entries, grad_params);
        Ok(())
    }

    /// Adds to `grads` the gradients that the keys in `inputs` contribute, given a result over these and any
    /// other keys and its gradients: `grad_out` of the outputs, num_queries × (heads · d_v), and
    /// `grad_log_sum_exp` of [`Partial::log_sum_exp`], num_queries × heads, where `None` is zeros.
    ///
    /// With `partial` merged over all shards, the sum of the gradients over the shards is the gradient of
    /// attention to all keys. With the [`forward_partial`](Self::forward_partial) of `inputs` alone, this is
    /// its backward pass. That `partial` includes the keys in `inputs` cannot be checked.
    ///
    /// Dropout draws by the number of a pair within its shard, so give each shard a seed of its own, the
    /// same forwards and backwards. [Sinks](crate::score::Sinks) are not keys: see
    /// [`sink_partial`](Self::sink_partial).
    ///
    /// # Errors
    /// As [`Attention::backward_into`].
    pub fn backward_partial_into<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        partial: &Partial<F>,
        grad_out: ArrayView2<'_, F>,
        grad_log_sum_exp: Option<ArrayView2<'_, F>>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()>
    where
        S: ScoreFunction<F>,
    {
        partial.check(inputs.num_queries(), output_dim(inputs), inputs.num_heads())?;
        grads.check(NAME, inputs, self)?;
        let upstream = partial.upstream(grad_out, grad_log_sum_exp)?;
        self.add_gradients(inputs, upstream, &mut grads)
    }

    backward_partial!(Partial, F, S: ScoreFunction<F>);

    /// Whether inputs are processed in tiles, in both passes, so that logits are rounded the same way.
    fn uses_tiles<F: Float>(inputs: &Inputs<'_, F>) -> bool {
        matches!(inputs.pattern(), Pattern::Dense) && inputs.num_queries() >= FEW_QUERIES
    }

    /// Overwrites `out` and returns the normalizer.
    pub(crate) fn run<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
    ) -> Result<Normalizer<F>>
    where
        S: ScoreFunction<F>,
    {
        let mut normalizer = self.run_pairs(inputs, out.view_mut())?;
        normalizer.add_sinks(&self.score, out);
        Ok(normalizer)
    }

    /// Runs [`run`](Self::run) without sinks.
    pub(crate) fn run_pairs<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Normalizer<F>>
    where
        S: ScoreFunction<F>,
    {
        check_output(self, "out", inputs, out.shape())?;
        self.score.check(inputs)?;
        let inputs = &self.read_inputs(inputs);
        if let Some(segments) = inputs.packed_segments() {
            let run =
                |inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>| self.run_pairs(inputs, out);
            let parts = packed::for_each_segment(inputs, segments, out, run)?;
            return Ok(Normalizer::join(&parts, inputs.num_heads()));
        }
        if let Some(seen) = seen_keys(inputs, &[Channel::EdgeLayers])? {
            return self.run_pairs(&seen.inputs(), out);
        }
        let problem = self.problem(inputs)?;
        let mut normalizer = Normalizer::empty(inputs.num_queries(), problem.heads)?;
        let (tiles, level) = (self.tiles, level());
        match Self::uses_tiles(inputs) {
            true => F::dense_forward(&problem, tiles, level, out, &mut normalizer),
            false => F::rows_forward(&problem, tiles.keys, level, out, &mut normalizer),
        }
        Ok(normalizer)
    }

    /// Adds the gradients, given the outputs and the normalizer. These may be over more keys than
    /// `inputs` holds; the gradients are then the contribution of the keys in `inputs`. Those of sinks are left
    /// out.
    pub(crate) fn add_gradients<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        upstream: PartialUpstream<'_, F>,
        grads: &mut GradientsMut<'_, F>,
    ) -> Result<()>
    where
        S: ScoreFunction<F>,
    {
        self.score.check(inputs)?;
        let inputs = &self.read_inputs(inputs);
        if let Some(segments) = inputs.packed_segments() {
            let grads = grads.reborrow();
            let run = |number, inputs: &Inputs<'_, F>, mut grads: GradientsMut<'_, F>| {
                upstream.with_queries(segments.queries(number), |upstream| {
                    self.add_gradients(inputs, upstream, &mut grads)
                })
            };
            return packed::backward_by_segment(self, inputs, segments, grads, run);
        }
        if let Some(seen) = seen_keys(inputs, &[Channel::EdgeLayers])? {
            return seen.backward_of_read(grads.reborrow(), |inputs, mut grads| {
                self.add_gradients(inputs, upstream, &mut grads)
            });
        }
        let problem = self.problem(inputs)?;
        let (tiles, level) = (self.tiles, level());
        upstream.in_rows(|upstream| {
            let of_params = match Self::uses_tiles(inputs) {
                true => F::dense_backward(&problem, tiles, level, upstream, grads),
                false => F::rows_backward(&problem, tiles.keys, level, upstream, grads),
            };
            add_entries(&of_params, grads.params);
            Ok(())
        })
    }

    /// Adds the gradients of sinks, given the state of the forward pass.
    pub(crate) fn add_sink_gradients<F: Float>(
        &self,
        state: &State<F>,
        grad_out: ArrayView2<'_, F>,
        grad_params: &mut [ArrayD<F>],
    ) where
        S: ScoreFunction<F>,
    {
        let mut entries = vec![0.0; num_entries(&self.score)];
        if entries.is_empty() {
            return;
        }
        let deltas = row_products(grad_out, state.out.view(), state.normalizer.sum.ncols());
        state.normalizer.sinks_vjp(&self.score, &deltas, &mut entries);
        add_entries(&entries, grad_params);
    }

    pub(crate) fn problem<'a, F: Float>(&'a self, inputs: &Inputs<'a, F>) -> Result<Problem<'a, F>>
    where
        S: ScoreFunction<F>,
    {
        Problem::new(inputs, self.scale)?.with_score(&self.score)
    }

    /// Leaves out edge layers that the score function does not read.
    fn read_inputs<'a, F: Float>(&self, inputs: &Inputs<'a, F>) -> Inputs<'a, F>
    where
        S: ScoreFunction<F>,
    {
        if self.score.reads_edge_layers() { *inputs } else { inputs.without_layers() }
    }

    /// The plain form of the mechanism.
    fn plain(&self) -> ScaledDotProduct<&S> {
        ScaledDotProduct { scale: self.scale, score: &self.score }
    }
}

/// Returns g·o of each query and head.
pub(super) fn row_products<F: Float>(
    grad_out: ArrayView2<'_, F>,
    out: ArrayView2<'_, F>,
    heads: usize,
) -> Array2<f64> {
    let dim = out.ncols() / heads;
    Array2::from_shape_fn((out.nrows(), heads), |(query, head)| {
        let of_head = s![query, head_columns(head, dim)];
        let products = grad_out.slice_move(of_head).into_iter().zip(out.slice_move(of_head));
        products.map(|(g, o)| g.as_f64() * o.as_f64()).sum()
    })
}

impl<F: Float, S: Params<F>> Params<F> for Flash<S> {
    params_of!(self => self.score);
}

impl<F: Float, S: ScoreFunction<F>> Attention<F> for Flash<S> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, inputs: &Inputs<'_, F>) -> usize {
        output_dim(inputs)
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        self.run(inputs, out).map(drop)
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        let normalizer = self.run(inputs, out.view_mut())?;
        Ok(Saved::new(NAME, State { out: out.to_owned(), normalizer }))
    }

    fn backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let state = saved.state::<State<F>>(NAME)?;
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        state.check(inputs)?;
        grads.check(NAME, inputs, self)?;
        self.add_gradients(inputs, state.upstream(grad_out), &mut grads)?;
        self.add_sink_gradients(state, grad_out, grads.params);
        Ok(())
    }

    fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        self.plain().attention_weights(inputs)
    }

    fn attention_weights_backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        self.plain().attention_weights_backward_into(inputs, grad_weights, grads)
    }
}
