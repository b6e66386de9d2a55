use super::config::Rotation;
use crate::attention::{Attention, Saved, check_output};
use crate::element::try_zeros;
use crate::error::{Channel, Result};
use crate::gradients::{Gradients, GradientsMut};
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::kernels::level::level;
use crate::kernels::normalizer::Normalizer;
use crate::kernels::problem::{Problem, Rows, Upstream, WeightGradients, output_dim};
use crate::kernels::rotary::RotaryProblem;
use crate::mechanisms::flash::State;
use crate::mechanisms::seen_keys;
use crate::params::Params;
use crate::partial::{Partial, PartialUpstream, backward_partial};
use ndarray::{Array2, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD, Axis};

const NAME: &str = "edge_rope";

/// The number of pairs in a tile, small enough for their rotated keys to stay in the first-level cache.
const TILE: usize = 32;

/// The data of pairs that it reads.
const READS: &[Channel] = &[Channel::Distances];

/// Rotary embeddings of distances (Su et al. 2021, 2104.09864; on graphs Reid et al. 2025, 2509.22259):
/// the key of each pair is rotated by the distance of the pair, which can be any number (hops, a layer, a
/// weight) and need not be a difference of positions.
///
/// ```text
/// sᵢⱼ = qᵢ·R(δᵢⱼ)kⱼ / √d + bᵢⱼ      pᵢⱼ = softmaxⱼ(sᵢⱼ)      oᵢ = Σⱼ pᵢⱼ vⱼ
/// ```
///
/// with j over the visible pairs of query i, for each head: the query is at position 0, the key at δ. R
/// is the rotation of [`GraphRope`](crate::GraphRope) with one axis. If δᵢⱼ = xⱼ − xᵢ, the result equals
/// `GraphRope` around [`Flash`](crate::Flash) with the positions x.
///
/// Build it with [`GraphRopeConfig::init_edges`](crate::GraphRopeConfig::init_edges).
///
/// * **Reads** query (n_q × heads·d), key (n_k × kv_heads·d), d = `head_dim`, value (n_k ×
///   kv_heads·d_v); [`Inputs::with_distances`]; mask, causal, bias, dropout, weights of pairs; dense inputs
///   and graphs.
/// * **Output** n_q × heads·d_v. A query without visible keys gets zeros.
/// * **Parameters** `frequencies` (1 × pairs of columns) if they are learned; otherwise they are a
///   buffer of that name. The backward pass also returns the gradient of the distances.
/// * **Cost** O(pairs · (d + d_v)) time per head, and a sine and cosine for each (query, key) pair and
///   pair of columns; memory O(n · (d + d_v) · heads), never the weights.
/// * **Errors** [`Error::MissingInput`](crate::Error::MissingInput) without distances,
///   [`Error::Shape`](crate::Error::Shape) if heads have a different size. A distance that is NaN or
///   infinite makes its query's row NaN.
///
/// ```
/// use graph_attention::{Attention, Graph, GraphRopeConfig, Inputs, graph_rope::Layout};
/// use graph_attention::ndarray::{Array2, array};
///
/// let graph = Graph::from_edges(3, 3, [(0, 1), (0, 2), (1, 2)])?;
/// let hops = array![1.0, 2.0, 1.0];
/// let x = Array2::from_shape_fn((3, 4), |(i, j)| ((3 * i + 5 * j) % 7) as f64);
/// let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)?.with_distances(hops.view())?;
///
/// let rope = GraphRopeConfig::new(4, Layout::Half).init_edges()?;
/// let (out, saved) = rope.forward_train(&inputs)?;
/// let grads = rope.backward(&inputs, &saved, out.view())?;
/// let grad_hops = grads.distances.expect("the inputs have distances");
/// assert!(grad_hops[0] != 0.0 && grad_hops[2] == 0.0); // node 1 has a single neighbour
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EdgeRope<F> {
    pub(super) rotation: Rotation<F>,
}

impl<F: Float> EdgeRope<F> {
    /// Returns the frequencies, 1 × pairs of columns.
    #[must_use]
    pub fn frequencies(&self) -> Array2<f64> {
        self.rotation.frequencies()
    }

    fn problem<'p>(&self, inputs: &Inputs<'p, F>) -> Result<RotaryProblem<'p, F>> {
        let distances = inputs.distances(NAME)?;
        self.rotation.check(inputs)?;
        Ok(RotaryProblem {
            softmax: Problem::new(inputs, None)?,
            rotary: self.rotation.rotary(),
            distances: Rows::new("distances", distances.insert_axis(Axis(1)))?,
            wants_distances: false,
            wants_frequencies: false,
        })
    }

    /// Returns the outputs and their normalizer, so that outputs over several sets of keys or edges can be merged
    /// with [`Partial::merge`].
    ///
    /// # Errors
    /// As [`Attention::forward_into`].
    pub fn forward_partial(&self, inputs: &Inputs<'_, F>) -> Result<Partial<F>> {
        let mut out = try_zeros("out", inputs.num_queries(), output_dim(inputs))?;
        let Normalizer { shift, sum } = self.run(inputs, out.view_mut())?;
        Partial::new(out, shift, sum)
    }

    /// Adds to `grads` the gradients that the pairs in `inputs` contribute, given a result over these and any
    /// other pairs and its gradients, as
    /// [`Flash::backward_partial_into`](crate::Flash::backward_partial_into).
    ///
    /// # Errors
    /// As [`Attention::backward_into`].
    pub fn backward_partial_into(
        &self,
        inputs: &Inputs<'_, F>,
        partial: &Partial<F>,
        grad_out: ArrayView2<'_, F>,
        grad_log_sum_exp: Option<ArrayView2<'_, F>>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        partial.check(inputs.num_queries(), output_dim(inputs), inputs.num_heads())?;
        grads.check(NAME, inputs, self)?;
        self.add_gradients(inputs, partial.upstream(grad_out, grad_log_sum_exp)?, grads)
    }

    backward_partial!(Partial);

    /// Overwrites `out` and returns the normalizer.
    fn run(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<Normalizer<F>> {
        check_output(self, "out", inputs, out.shape())?;
        if let Some(seen) = seen_keys(inputs, READS)? {
            return self.run(&seen.inputs(), out);
        }
        self.attend(&self.problem(inputs)?, out)
    }

    fn attend(
        &self,
        problem: &RotaryProblem<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Normalizer<F>> {
        let softmax = &problem.softmax;
        let mut normalizer = Normalizer::empty(softmax.inputs.num_queries(), softmax.heads)?;
        F::rotary_forward(problem, TILE, level(), out, &mut normalizer);
        Ok(normalizer)
    }

    /// Adds the gradients, given outputs and a normalizer that may be over more pairs.
    fn add_gradients(
        &self,
        inputs: &Inputs<'_, F>,
        upstream: PartialUpstream<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        if let Some(seen) = seen_keys(inputs, READS)? {
            return seen.backward_of_read(grads, |inputs, grads| {
                self.add_gradients(inputs, upstream, grads)
            });
        }
        upstream.in_rows(|upstream| self.vjp(inputs, upstream, grads))
    }

    fn vjp(
        &self,
        inputs: &Inputs<'_, F>,
        upstream: Upstream<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let problem = RotaryProblem {
            wants_distances: grads.distances.is_some(),
            wants_frequencies: !grads.params.is_empty(),
            ..self.problem(inputs)?
        };
        let grad = F::rotary_backward(&problem, TILE, level(), upstream, &mut grads);
        self.rotation.params_vjp(&grad.insert_axis(Axis(0)).mapv(F::as_f64), grads.params);
        Ok(())
    }
}

impl<F: Float> Params<F> for EdgeRope<F> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        self.rotation.visit_params(visitor);
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        self.rotation.visit_params_mut(visitor);
    }

    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        self.rotation.visit_buffers(visitor);
    }

    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        self.rotation.visit_buffers_mut(visitor);
    }
}

impl<F: Float> Attention<F> for EdgeRope<F> {
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
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let state = saved.state::<State<F>>(NAME)?;
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        state.check(inputs)?;
        grads.check(NAME, inputs, self)?;
        self.add_gradients(inputs, state.upstream(grad_out), grads)
    }

    fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        let problem = self.problem(inputs)?;
        let mut out = try_zeros("out", inputs.num_queries(), self.output_dim(inputs))?;
        let normalizer = self.attend(&problem, out.view_mut())?;
        F::rotary_weights(&problem, TILE, level(), &normalizer)
    }

    fn attention_weights_backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        grads.check(NAME, inputs, self)?;
        let problem = self.problem(inputs)?;
        let mut out = try_zeros("out", inputs.num_queries(), self.output_dim(inputs))?;
        let normalizer = self.attend(&problem, out.view_mut())?;
        let weights = F::rotary_weights(&problem, TILE, level(), &normalizer)?;
        let grad_weights = WeightGradients::new(inputs, &weights, grad_weights)?;
        out.fill(F::zero());
        let zeros = Rows::from(out);
        let upstream = Upstream {
            out: zeros.slices(),
            normalizer: &normalizer,
            grad_out: zeros.slices(),
            grad_log_sum_exp: None,
            grad_weights: Some(&grad_weights),
        };
        self.vjp(inputs, upstream, grads)
    }
}
