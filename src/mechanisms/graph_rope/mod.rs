//! Rotary embeddings of node positions, [`GraphRope`], and of distances, [`EdgeRope`].

mod config;
mod edges;
mod scaling;

pub use crate::kernels::rotary::Layout;
pub use config::GraphRopeConfig;
pub use edges::EdgeRope;
pub use scaling::Scaling;

use crate::attention::{Attention, Saved, check_output};
use crate::cache::KeyValueCache;
use crate::element::try_zeros;
use crate::error::{Result, check_shape};
use crate::gradients::GradientsMut;
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::kernels::level::level;
use crate::kernels::problem::Rows;
use crate::kernels::rotary::RotationGradients;
use crate::params::{Params, prefixed};
use config::Rotation;
use ndarray::{Array2, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD};

const NAME: &str = "graph_rope";

/// Rotary position embeddings of nodes (Su et al. 2021, 2104.09864; on graphs Reid et al. 2025, 2509.22259)
/// around any inner mechanism: queries and keys are rotated by their positions, which are real numbers on
/// one or several axes (hops from an anchor, a level, coordinates, eigenvectors).
///
/// ```text
/// q'ᵢ = R(xᵢ) qᵢ      k'ⱼ = R(xⱼ) kⱼ      o = inner(q', k', v)
/// R(x): pair p of the columns of each head turns by αₚ = Σₐ θₐₚ xₐ,
///       (a, b) ↦ f · (a cos αₚ − b sin αₚ, a sin αₚ + b cos αₚ)
/// ```
///
/// The attention factor f is 1, unless a [`Scaling`] for longer contexts sets it.
///
/// With f = 1 the rotation preserves norms, and q'ᵢ·k'ⱼ = qᵢ·R(xⱼ − xᵢ)kⱼ depends only on differences of positions.
/// The [`Layout`] determines which columns form a pair, the [`GraphRopeConfig`] determines θ.
///
/// * **Reads** query (n_q × heads·d) and key (n_k × kv_heads·d), d = `head_dim`;
///   [`Inputs::with_positions`], with one column for each axis of the configuration. Values and all
///   channels are passed to the inner mechanism, including the positions: a second `GraphRope` inside
///   rotates by them again.
/// * **Output** the output of the inner mechanism.
/// * **Parameters** `frequencies` (axes × pairs, or axes × (heads · pairs)) if they are learned; otherwise they are a buffer of
///   that name. Then the parameters of the inner mechanism with the prefix `inner.`.
/// * **Cost** O(n · d) time per head, and a sine and cosine for each row and pair of columns; memory for
///   the rotated queries and keys, but not for a table of angles.
/// * **Errors** [`Error::MissingInput`](crate::Error::MissingInput) without positions,
///   [`Error::Shape`](crate::Error::Shape) if the number of axes or the size of the heads does not fit
///   the configuration. A position that is NaN or infinite makes its row NaN.
///
/// Angles are computed in `f64`, and products θ x without rounding. Shifting all positions by any amount
/// therefore changes the result by no more than its own rounding, as long as the positions themselves are
/// exact. Positions are trained too: [`Gradients::query_positions`](crate::Gradients::query_positions) and
/// [`key_positions`](crate::Gradients::key_positions).
///
/// With [`Flash`](crate::Flash) inside, and inside a [`MultiHead`](crate::MultiHead), this is the
/// attention of rotary transformers:
///
/// ```
/// use graph_attention::{Attention, Flash, Graph, GraphRopeConfig, Inputs, graph_rope::Layout};
/// use graph_attention::ndarray::{Array2, array};
///
/// // The positions are levels in a tree; each node attends to itself and its parent.
/// let levels = array![[0.0], [1.0], [1.0], [2.0]];
/// let graph = Graph::from_edges(4, 4, [(1, 0), (2, 0), (3, 1)])?.with_self_loops()?;
/// let x = Array2::from_shape_fn((4, 8), |(i, j)| ((3 * i + 5 * j) % 7) as f64);
/// let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)?.with_heads(2)?;
///
/// let rope = GraphRopeConfig::new(4, Layout::Interleaved).init(Flash::new())?;
/// let out = rope.forward(&inputs.with_positions(levels.view(), levels.view())?)?;
/// // Only differences of levels matter.
/// let higher = &levels + 1000.0;
/// let shifted = rope.forward(&inputs.with_positions(higher.view(), higher.view())?)?;
/// assert!((out - shifted).iter().all(|difference| difference.abs() < 1e-13));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GraphRope<F, A> {
    rotation: Rotation<F>,
    inner: A,
}

/// The state saved by a forward pass.
struct State<F> {
    /// Queries and keys.
    rotated: [Array2<F>; 2],
    inner: Saved,
}

impl<F: Float, A: Attention<F>> GraphRope<F, A> {
    /// Returns the inner mechanism.
    pub fn inner(&self) -> &A {
        &self.inner
    }

    /// Returns the frequencies, axes × pairs; with a block of pairs for each head, axes × (heads · pairs).
    #[must_use]
    pub fn frequencies(&self) -> Array2<f64> {
        self.rotation.frequencies()
    }

    /// Returns the factor of rotated columns: 1, unless a scaling or the configuration sets it.
    #[must_use]
    pub fn attention_factor(&self) -> f64 {
        self.rotation.attention_factor
    }

    /// Returns queries and keys with their positions if they fit the configuration.
    fn sides<'a>(&self, inputs: &Inputs<'a, F>) -> Result<[Side<'a, F>; 2]> {
        let (query, key) = inputs.positions(NAME)?;
        self.rotation.check(inputs)?;
        let axes = self.rotation.axes();
        check_shape("query positions", &[query.nrows(), axes], query.shape())?;
        check_shape("key positions", &[key.nrows(), axes], key.shape())?;
        let side = |what, x, positions| {
            Ok(Side { x: Rows::new(what, x)?, positions: Rows::new("positions", positions)? })
        };
        Ok([side("query", inputs.query(), query)?, side("key", inputs.key(), key)?])
    }

    /// Rotates rows of one or several heads, n × (heads · d), by their positions, n × axes. For a cache or an
    /// attention of your own; [`decode`](Attention::decode) rotates each key once.
    ///
    /// ```
    /// use graph_attention::{Flash, GraphRopeConfig, graph_rope::Layout};
    /// use graph_attention::ndarray::array;
    ///
    /// let config = GraphRopeConfig::new(2, Layout::Half).frequencies(array![[1.0]]);
    /// let rope = config.init(Flash::new())?;
    /// let quarter = array![[std::f64::consts::FRAC_PI_2]];
    /// let turned = rope.rotate(array![[1.0, 2.0]].view(), quarter.view())?;
    /// assert!((turned - array![[-2.0, 1.0]]).iter().all(|difference| difference.abs() < 1e-15));
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the columns are not those of whole heads, or if the positions
    /// have another number of rows or axes.
    pub fn rotate(&self, x: ArrayView2<'_, F>, positions: ArrayView2<'_, F>) -> Result<Array2<F>> {
        self.rotation.check_heads(x)?;
        check_shape("positions", &[x.nrows(), self.rotation.axes()], positions.shape())?;
        let mut out = try_zeros("rotated rows", x.nrows(), x.ncols())?;
        let [x, positions] = [Rows::new("x", x)?, Rows::new("positions", positions)?];
        F::rotate(&self.rotation.rotary(), level(), &positions, &x, out.view_mut());
        Ok(out)
    }

    fn rotate_sides(&self, inputs: &Inputs<'_, F>) -> Result<[Array2<F>; 2]> {
        let (rotary, level) = (self.rotation.rotary(), level());
        let [query, key] = self.sides(inputs)?;
        let mut rotated = [
            try_zeros("rotated query", inputs.num_queries(), inputs.query().ncols())?,
            try_zeros("rotated key", inputs.num_keys(), inputs.key().ncols())?,
        ];
        for (Side { x, positions }, out) in [query, key].iter().zip(&mut rotated) {
            F::rotate(&rotary, level, positions, x, out.view_mut());
        }
        Ok(rotated)
    }

    /// Returns the inputs of the inner mechanism.
    fn inner_inputs<'b>(
        &self,
        inputs: &Inputs<'b, F>,
        rotated: &'b [Array2<F>; 2],
    ) -> Result<Inputs<'b, F>> {
        let [query, key] = rotated.each_ref().map(|array| array.view());
        inputs.with_arrays(query, key, inputs.value())
    }
}

/// One side of the rotation: queries or keys, and their positions.
struct Side<'a, F: Float> {
    x: Rows<'a, F>,
    positions: Rows<'a, F>,
}

impl<F: Float, A: Attention<F>> Params<F> for GraphRope<F, A> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        self.rotation.visit_params(visitor);
        self.inner.visit_params(&mut prefixed("inner", visitor));
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        self.rotation.visit_params_mut(visitor);
        self.inner.visit_params_mut(&mut prefixed("inner", visitor));
    }

    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        self.rotation.visit_buffers(visitor);
        self.inner.visit_buffers(&mut prefixed("inner", visitor));
    }

    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        self.rotation.visit_buffers_mut(visitor);
        self.inner.visit_buffers_mut(&mut prefixed("inner", visitor));
    }
}

impl<F: Float, A: Attention<F>> Attention<F> for GraphRope<F, A> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, inputs: &Inputs<'_, F>) -> usize {
        self.inner.output_dim(inputs)
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        check_output(self, "out", inputs, out.shape())?;
        let rotated = self.rotate_sides(inputs)?;
        self.inner.forward_into(&self.inner_inputs(inputs, &rotated)?, out)
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        check_output(self, "out", inputs, out.shape())?;
        let rotated = self.rotate_sides(inputs)?;
        let inner = self.inner.forward_train_into(&self.inner_inputs(inputs, &rotated)?, out)?;
        Ok(Saved::new(NAME, State { rotated, inner }))
    }

    fn backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let State { rotated, inner } = saved.state::<State<F>>(NAME)?;
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        self.vjp(inputs, rotated, grads, |inputs, grads| {
            self.inner.backward_into(inputs, inner, grad_out, grads)
        })
    }

    fn decode_into(
        &self,
        inputs: &Inputs<'_, F>,
        caches: &mut [KeyValueCache<F>],
        out: ArrayViewMut2<'_, F>,
    ) -> Result<()> {
        check_output(self, "out", inputs, out.shape())?;
        let rotated = self.rotate_sides(inputs)?;
        self.inner.decode_into(&self.inner_inputs(inputs, &rotated)?, caches, out)
    }

    fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        let rotated = self.rotate_sides(inputs)?;
        self.inner.attention_weights(&self.inner_inputs(inputs, &rotated)?)
    }

    fn attention_weights_backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        self.vjp(inputs, &self.rotate_sides(inputs)?, grads, |inputs, grads| {
            self.inner.attention_weights_backward_into(inputs, grad_weights, grads)
        })
    }
}

impl<F: Float, A: Attention<F>> GraphRope<F, A> {
    /// The backward pass, given that of the inner mechanism.
    fn vjp(
        &self,
        inputs: &Inputs<'_, F>,
        rotated: &[Array2<F>; 2],
        mut grads: GradientsMut<'_, F>,
        inner_vjp: impl FnOnce(&Inputs<'_, F>, GradientsMut<'_, F>) -> Result<()>,
    ) -> Result<()> {
        grads.check(NAME, inputs, self)?;
        let sides = self.sides(inputs)?;
        check_shape("saved query", inputs.query().shape(), rotated[0].shape())?;
        check_shape("saved key", inputs.key().shape(), rotated[1].shape())?;
        let inner_inputs = self.inner_inputs(inputs, rotated)?;
        let grads_of_x = [grads.query.take(), grads.key.take()];
        let (own_params, mut grads) = grads.split_params(self.rotation.num_params())?;

        // o = inner(q', k', v); a mechanism inside may read the positions too.
        let is_learned = !own_params.is_empty();
        let of_positions = [grads.query_positions.is_some(), grads.key_positions.is_some()];
        let mut grad_rotated = [None, None];
        for (side, x) in [inputs.query(), inputs.key()].into_iter().enumerate() {
            if is_learned || of_positions[side] || grads_of_x[side].is_some() {
                grad_rotated[side] = Some(try_zeros("rotated rows", x.nrows(), x.ncols())?);
            }
        }
        let [query, key] =
            grad_rotated.each_mut().map(|grad| grad.as_mut().map(|grad| grad.view_mut()));
        let inner_grads = GradientsMut { query, key, ..grads.reborrow() };
        inner_vjp(&inner_inputs, inner_grads)?;

        // x' = R x for query and key
        let (rotary, level) = (self.rotation.rotary(), level());
        let mut grad_frequencies = Array2::zeros(rotary.frequencies.raw_dim());
        let grads_of_positions = [grads.query_positions, grads.key_positions];
        let of_sides =
            sides.iter().zip(&grad_rotated).zip(grads_of_x.into_iter().zip(grads_of_positions));
        for ((Side { x, positions }, grad_rotated), (grad_x, grad_positions)) in of_sides {
            if let Some(grad_rotated) = grad_rotated {
                let grads = RotationGradients {
                    x: grad_x,
                    positions: grad_positions,
                    frequencies: is_learned.then_some(&mut grad_frequencies),
                };
                F::rotate_vjp(&rotary, level, positions, x, grad_rotated, grads);
            }
        }
        self.rotation.params_vjp(&grad_frequencies, own_params);
        Ok(())
    }
}
