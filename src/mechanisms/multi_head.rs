//! Multi-head attention with learned projections: [`MultiHead`].

use crate::attention::{Attention, Saved, check_output};
use crate::cache::KeyValueCache;
use crate::element::try_zeros;
use crate::error::{Channel, Error, Result, check_shape};
use crate::gradients::{GradientsMut, param_slot};
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::mechanisms::fill_uniform;
use crate::params::{self, Params, prefixed};
use ndarray::{
    Array1, Array2, ArrayD, ArrayView1, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD, Axis,
    Ix1, Ix2, s,
};
use rand::Rng;
use std::ops::Range;

const NAME: &str = "multi_head";

/// The sizes and options of a [`MultiHead`]. Build one with initial parameters with [`init`](Self::init),
/// or with given parameters with [`from_params`](Self::from_params).
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct MultiHeadConfig {
    embed_dim: usize,
    num_heads: usize,
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    output_dim: usize,
    head_dim: Option<usize>,
    value_head_dim: Option<usize>,
    bias: bool,
}

impl MultiHeadConfig {
    /// Creates the configuration of PyTorch's `nn.MultiheadAttention(embed_dim, num_heads)`: queries,
    /// keys, values and outputs with `embed_dim` columns, heads with `embed_dim / num_heads` columns, and
    /// biases.
    #[must_use]
    pub fn new(embed_dim: usize, num_heads: usize) -> Self {
        Self {
            embed_dim,
            num_heads,
            kv_heads: num_heads,
            key_dim: embed_dim,
            value_dim: embed_dim,
            output_dim: embed_dim,
            head_dim: None,
            value_head_dim: None,
            bias: true,
        }
    }

    /// Sets the number of columns of the keys: PyTorch's `kdim`. Default: `embed_dim`.
    #[must_use]
    pub fn key_dim(mut self, dim: usize) -> Self {
        self.key_dim = dim;
        self
    }

    /// Sets the number of columns of the values: PyTorch's `vdim`. Default: `embed_dim`.
    #[must_use]
    pub fn value_dim(mut self, dim: usize) -> Self {
        self.value_dim = dim;
        self
    }

    /// Sets the number of columns of the outputs. Default: `embed_dim`.
    #[must_use]
    pub fn output_dim(mut self, dim: usize) -> Self {
        self.output_dim = dim;
        self
    }

    /// Sets the number of columns per head of the projected queries and keys. Default:
    /// `embed_dim / num_heads`.
    #[must_use]
    pub fn head_dim(mut self, dim: usize) -> Self {
        self.head_dim = Some(dim);
        self
    }

    /// Sets the number of columns per head of the projected values. Default: the same as for keys.
    #[must_use]
    pub fn value_head_dim(mut self, dim: usize) -> Self {
        self.value_head_dim = Some(dim);
        self
    }

    /// Sets the number of heads of keys and values, shared by groups of query heads as in
    /// [`Inputs::with_grouped_heads`]. Default: `num_heads`.
    #[must_use]
    pub fn kv_heads(mut self, heads: usize) -> Self {
        self.kv_heads = heads;
        self
    }

    /// Sets whether the projections add biases. Default: `true`.
    #[must_use]
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Builds a `MultiHead` around `inner` with parameters initialised as in PyTorch: Glorot uniform
    /// input projections, output weights uniform in ±1/√inputs, biases zero.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `num_heads` is 0, or does not divide `embed_dim` and no head size is
    /// set, if `kv_heads` does not divide `num_heads`, or if a size is 0 or huge.
    pub fn init<F: Float, A: Attention<F>>(
        &self,
        inner: A,
        rng: &mut impl Rng,
    ) -> Result<MultiHead<F, A>> {
        let mut multi_head = self.zeros(inner)?;
        for weight in multi_head.in_proj_weights.iter_mut() {
            let bound = (6.0 / (weight.nrows() + weight.ncols()) as f64).sqrt();
            fill_uniform(weight.view_mut(), bound, rng);
        }
        let weight = &mut multi_head.out_proj_weight;
        let bound = 1.0 / (weight.ncols() as f64).sqrt();
        fill_uniform(weight.view_mut(), bound, rng);
        Ok(multi_head)
    }

    /// Builds a `MultiHead` around `inner` with given parameters, named as in PyTorch's state dict (see
    /// [`MultiHead`]). Parameters of the inner mechanism, if it has any, are named `inner.…`.
    ///
    /// # Errors
    /// As [`init`](Self::init) and [`params::load_state`].
    pub fn from_params<F: Float, A: Attention<F>>(
        &self,
        inner: A,
        state: impl IntoIterator<Item = (impl AsRef<str>, ArrayD<F>)>,
    ) -> Result<MultiHead<F, A>> {
        let mut multi_head = self.zeros(inner)?;
        params::load_state(&mut multi_head, state)?;
        Ok(multi_head)
    }

    /// Validates the configuration and allocates all parameters as zeros.
    fn zeros<F: Float, A: Attention<F>>(&self, inner: A) -> Result<MultiHead<F, A>> {
        let Self { embed_dim, num_heads, kv_heads, .. } = *self;
        if num_heads == 0 {
            return Err(Error::config("num_heads", "at least 1", num_heads));
        }
        if kv_heads == 0 || !num_heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_heads = {num_heads}");
            return Err(Error::config("kv_heads", expected, kv_heads));
        }
        if self.head_dim.is_none() && !embed_dim.is_multiple_of(num_heads) {
            let expected = format!("a multiple of num_heads = {num_heads}, unless head_dim is set");
            return Err(Error::config("embed_dim", expected, embed_dim));
        }
        let head_dim = self.head_dim.unwrap_or(embed_dim / num_heads);
        let value_head_dim = self.value_head_dim.unwrap_or(head_dim);
        for (field, size) in [
            ("embed_dim", embed_dim),
            ("key_dim", self.key_dim),
            ("value_dim", self.value_dim),
            ("output_dim", self.output_dim),
            ("head_dim", head_dim),
            ("value_head_dim", value_head_dim),
        ] {
            if size == 0 {
                return Err(Error::config(field, "at least 1", size));
            }
        }
        let rows = [
            num_heads.saturating_mul(head_dim),
            kv_heads.saturating_mul(head_dim),
            kv_heads.saturating_mul(value_head_dim),
        ];
        let all_rows = rows.iter().fold(0usize, |sum, &rows| sum.saturating_add(rows));
        let zeros = |columns| try_zeros("in_proj_weight", all_rows, columns);
        let packed = self.key_dim == embed_dim && self.value_dim == embed_dim;
        let in_proj_weights = if packed {
            InProjection::Packed(zeros(embed_dim)?)
        } else {
            InProjection::Separate([
                try_zeros("q_proj_weight", rows[0], embed_dim)?,
                try_zeros("k_proj_weight", rows[1], self.key_dim)?,
                try_zeros("v_proj_weight", rows[2], self.value_dim)?,
            ])
        };
        let context_dim = num_heads.saturating_mul(value_head_dim);
        Ok(MultiHead {
            num_heads,
            kv_heads,
            rows: [0..rows[0], rows[0]..rows[0] + rows[1], rows[0] + rows[1]..all_rows],
            in_proj_weights,
            in_proj_bias: self.bias.then(|| Array1::zeros(all_rows)),
            out_proj_weight: try_zeros("out_proj.weight", self.output_dim, context_dim)?,
            out_proj_bias: self.bias.then(|| Array1::zeros(self.output_dim)),
            inner,
        })
    }
}

/// Multi-head attention (Vaswani et al. 2017, 1706.03762): learned projections around any inner
/// mechanism.
///
/// ```text
/// q' = q W_qᵀ + b_q    k' = k W_kᵀ + b_k    v' = v W_vᵀ + b_v
/// o  = inner(q', k', v' in heads) W_oᵀ + b_o
/// ```
///
/// * **Reads** query, key and value, which may have different numbers of columns. All channels are passed
///   to the inner mechanism (a per-head bias needs one column for each head of the configuration). Inputs
///   with several heads are refused, because the heads are made here.
/// * **Output** num_queries × `output_dim`. The row of a query without visible keys is b_o.
/// * **Parameters** named as in the state dict of PyTorch's `nn.MultiheadAttention`, which can be loaded
///   directly ([`MultiHeadConfig::from_params`]): `in_proj_weight` (the rows of W_q, W_k and W_v stacked)
///   if queries, keys and values have the same number of columns, otherwise `q_proj_weight`,
///   `k_proj_weight`, `v_proj_weight`; then `in_proj_bias`, `out_proj.weight`, `out_proj.bias`, and the
///   parameters of the inner mechanism with the prefix `inner.`.
/// * **Cost** four matrix products, O(n · inputs · outputs) each, plus the inner mechanism.
/// * **Errors** [`Error::Shape`] if the columns of the inputs do not fit the projections, or the inner
///   mechanism's output does not fit `out_proj.weight`.
///
/// To decode token by token, use [`decode`](Attention::decode) with a [`KeyValueCache`], which projects only
/// the new rows.
///
/// Unlike in PyTorch, `true` in a mask means that a pair takes part ([`Inputs::with_mask`]), weights are
/// returned per head, and a query without visible keys gives b_o instead of NaN.
///
/// ```
/// use graph_attention::{Attention, Flash, Graph, Inputs, MultiHeadConfig};
/// use graph_attention::ndarray::Array2;
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
///
/// let mut rng = Xoshiro256PlusPlus::seed_from_u64(7);
/// let layer = MultiHeadConfig::new(8, 2).init(Flash::new(), &mut rng)?;
/// let nodes = Array2::<f32>::ones((3, 8));
/// let graph = Graph::from_edges(3, 3, [(0, 1), (1, 2), (2, 0)])?.with_self_loops()?;
/// let out = layer.forward(&Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)?)?;
/// assert_eq!(out.dim(), (3, 8));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MultiHead<F, A> {
    num_heads: usize,
    kv_heads: usize,
    /// The rows of query, key and value in the packed input projection and its bias.
    rows: [Range<usize>; 3],
    in_proj_weights: InProjection<Array2<F>>,
    in_proj_bias: Option<Array1<F>>,
    /// output_dim × context columns.
    out_proj_weight: Array2<F>,
    out_proj_bias: Option<Array1<F>>,
    inner: A,
}

/// One matrix for query, key and value together, or one for each.
#[derive(Clone, Debug)]
enum InProjection<M> {
    Packed(M),
    Separate([M; 3]),
}

impl<M> InProjection<M> {
    fn names(&self) -> &'static [&'static str] {
        match self {
            Self::Packed(_) => &["in_proj_weight"],
            Self::Separate(_) => &["q_proj_weight", "k_proj_weight", "v_proj_weight"],
        }
    }

    fn iter(&self) -> std::slice::Iter<'_, M> {
        match self {
            Self::Packed(weight) => std::slice::from_ref(weight).iter(),
            Self::Separate(weights) => weights.iter(),
        }
    }

    fn iter_mut(&mut self) -> std::slice::IterMut<'_, M> {
        match self {
            Self::Packed(weight) => std::slice::from_mut(weight).iter_mut(),
            Self::Separate(weights) => weights.iter_mut(),
        }
    }
}

/// The results of the projections of a forward pass.
struct State<F> {
    /// q', k' and v'.
    projected: [Array2<F>; 3],
    /// The inner mechanism's output.
    context: Array2<F>,
    inner: Saved,
}

impl<F: Float, A: Attention<F>> MultiHead<F, A> {
    /// Returns the inner mechanism.
    pub fn inner(&self) -> &A {
        &self.inner
    }

    /// Returns W_q, W_k or W_v.
    fn in_weight(&self, which: usize) -> ArrayView2<'_, F> {
        match &self.in_proj_weights {
            InProjection::Packed(weight) => weight.slice(s![self.rows[which].clone(), ..]),
            InProjection::Separate(weights) => weights[which].view(),
        }
    }

    /// Returns b_q, b_k or b_v.
    fn in_bias(&self, which: usize) -> Option<ArrayView1<'_, F>> {
        let bias = self.in_proj_bias.as_ref()?;
        Some(bias.slice(s![self.rows[which].clone()]))
    }

    fn out_bias(&self) -> Option<ArrayView1<'_, F>> {
        self.out_proj_bias.as_ref().map(|bias| bias.view())
    }

    /// Returns query, key and value if they fit the projections.
    fn arrays<'a>(&self, inputs: &Inputs<'a, F>) -> Result<[ArrayView2<'a, F>; 3]> {
        inputs.check_absent(NAME, &[Channel::Heads])?;
        let arrays = [inputs.query(), inputs.key(), inputs.value()];
        for (which, what) in ["query", "key", "value"].into_iter().enumerate() {
            let expected = [arrays[which].nrows(), self.in_weight(which).ncols()];
            check_shape(what, &expected, arrays[which].shape())?;
        }
        Ok(arrays)
    }

    /// Computes the projected queries, keys and values: n_q × heads·d, n_k × kv_heads·d and n_k × kv_heads·d_v.
    /// For a cache or an attention of your own; [`decode`](Attention::decode) does all steps.
    ///
    /// # Errors
    /// [`Error::Shape`] if the columns of the inputs do not fit the projections, [`Error::Unsupported`] if
    /// they have several heads.
    pub fn project(&self, inputs: &Inputs<'_, F>) -> Result<[Array2<F>; 3]> {
        let [query, key, value] = self.arrays(inputs)?;
        Ok([
            F::linear(query, self.in_weight(0), self.in_bias(0))?,
            F::linear(key, self.in_weight(1), self.in_bias(1))?,
            F::linear(value, self.in_weight(2), self.in_bias(2))?,
        ])
    }

    /// Computes the outputs from those of the heads, n_q × heads·d_v: the last step after
    /// [`project`](Self::project) and attention.
    ///
    /// # Errors
    /// [`Error::Shape`] if `context` has another number of columns.
    pub fn project_output(&self, context: ArrayView2<'_, F>) -> Result<Array2<F>> {
        let expected = [context.nrows(), self.out_proj_weight.ncols()];
        check_shape("context", &expected, context.shape())?;
        F::linear(context, self.out_proj_weight.view(), self.out_bias())
    }

    /// Returns the inputs of the inner mechanism.
    fn inner_inputs<'b>(
        &self,
        inputs: &Inputs<'b, F>,
        projected: &'b [Array2<F>; 3],
    ) -> Result<Inputs<'b, F>> {
        let [query, key, value] = projected.each_ref().map(|array| array.view());
        let inner = inputs.with_arrays(query, key, value)?;
        inner.with_grouped_heads(self.num_heads, self.kv_heads)
    }

    /// Allocates the output of the inner mechanism, which must fit the output projection.
    fn context(&self, inner_inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        let columns = self.inner.output_dim(inner_inputs);
        check_shape("inner output columns", &[self.out_proj_weight.ncols()], &[columns])?;
        try_zeros("context", inner_inputs.num_queries(), columns)
    }
}

impl<F: Float, A: Attention<F>> Params<F> for MultiHead<F, A> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        for (name, weight) in self.in_proj_weights.names().iter().zip(self.in_proj_weights.iter()) {
            visitor(name, weight.view().into_dyn());
        }
        if let Some(bias) = &self.in_proj_bias {
            visitor("in_proj_bias", bias.view().into_dyn());
        }
        visitor("out_proj.weight", self.out_proj_weight.view().into_dyn());
        if let Some(bias) = &self.out_proj_bias {
            visitor("out_proj.bias", bias.view().into_dyn());
        }
        self.inner.visit_params(&mut prefixed("inner", visitor));
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        let names = self.in_proj_weights.names();
        for (name, weight) in names.iter().zip(self.in_proj_weights.iter_mut()) {
            visitor(name, weight.view_mut().into_dyn());
        }
        if let Some(bias) = &mut self.in_proj_bias {
            visitor("in_proj_bias", bias.view_mut().into_dyn());
        }
        visitor("out_proj.weight", self.out_proj_weight.view_mut().into_dyn());
        if let Some(bias) = &mut self.out_proj_bias {
            visitor("out_proj.bias", bias.view_mut().into_dyn());
        }
        self.inner.visit_params_mut(&mut prefixed("inner", visitor));
    }

    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        self.inner.visit_buffers(&mut prefixed("inner", visitor));
    }

    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        self.inner.visit_buffers_mut(&mut prefixed("inner", visitor));
    }
}

impl<F: Float, A: Attention<F>> Attention<F> for MultiHead<F, A> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, _: &Inputs<'_, F>) -> usize {
        self.out_proj_weight.nrows()
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        check_output(self, "out", inputs, out.shape())?;
        let projected = self.project(inputs)?;
        let inner_inputs = self.inner_inputs(inputs, &projected)?;
        let mut context = self.context(&inner_inputs)?;
        self.inner.forward_into(&inner_inputs, context.view_mut())?;
        F::linear_into(context.view(), self.out_proj_weight.view(), self.out_bias(), out)
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        check_output(self, "out", inputs, out.shape())?;
        let projected = self.project(inputs)?;
        let inner_inputs = self.inner_inputs(inputs, &projected)?;
        let mut context = self.context(&inner_inputs)?;
        let inner = self.inner.forward_train_into(&inner_inputs, context.view_mut())?;
        F::linear_into(context.view(), self.out_proj_weight.view(), self.out_bias(), out)?;
        Ok(Saved::new(NAME, State { projected, context, inner }))
    }

    fn backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let State { projected, context, inner } = saved.state::<State<F>>(NAME)?;
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        grads.check(NAME, inputs, self)?;
        let context_shape = [inputs.num_queries(), self.out_proj_weight.ncols()];
        check_shape("saved context", &context_shape, context.shape())?;
        // o = context W_oᵀ + b_o
        let mut grad_context = Array2::zeros(context.raw_dim());
        F::linear_input_vjp(self.out_proj_weight.view(), grad_out, grad_context.view_mut())?;
        let [_, _, out_weight, out_bias] = self.split_params(grads.params);
        F::linear_params_vjp(
            context.view(),
            grad_out,
            param_slot(&mut out_weight[0]),
            out_bias.first_mut().map(param_slot),
        )?;
        // context = inner(q', k', v')
        self.in_proj_vjp(inputs, projected, grads, |inputs, grads| {
            self.inner.backward_into(inputs, inner, grad_context.view(), grads)
        })
    }

    fn decode_into(
        &self,
        inputs: &Inputs<'_, F>,
        caches: &mut [KeyValueCache<F>],
        out: ArrayViewMut2<'_, F>,
    ) -> Result<()> {
        check_output(self, "out", inputs, out.shape())?;
        let projected = self.project(inputs)?;
        let inner_inputs = self.inner_inputs(inputs, &projected)?;
        let mut context = self.context(&inner_inputs)?;
        self.inner.decode_into(&inner_inputs, caches, context.view_mut())?;
        F::linear_into(context.view(), self.out_proj_weight.view(), self.out_bias(), out)
    }

    fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        let projected = self.project(inputs)?;
        self.inner.attention_weights(&self.inner_inputs(inputs, &projected)?)
    }

    fn attention_weights_backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        grads.check(NAME, inputs, self)?;
        self.in_proj_vjp(inputs, &self.project(inputs)?, grads, |inputs, grads| {
            self.inner.attention_weights_backward_into(inputs, grad_weights, grads)
        })
    }
}

impl<F: Float, A: Attention<F>> MultiHead<F, A> {
    /// Splits gradients of parameters into those of the weights and bias of the input projections, and of
    /// the weight and bias of the output projection; the biases may be missing. Those of the inner mechanism
    /// follow and are left out.
    fn split_params<'g>(&self, params: &'g mut [ArrayD<F>]) -> [&'g mut [ArrayD<F>]; 4] {
        let (in_weights, params) = params.split_at_mut(self.in_proj_weights.names().len());
        let (in_bias, params) = params.split_at_mut(usize::from(self.in_proj_bias.is_some()));
        let (out_weight, params) = params.split_at_mut(1);
        let (out_bias, _) = params.split_at_mut(usize::from(self.out_proj_bias.is_some()));
        [in_weights, in_bias, out_weight, out_bias]
    }

    /// The backward pass of the input projections, given that of the inner mechanism.
    fn in_proj_vjp(
        &self,
        inputs: &Inputs<'_, F>,
        projected: &[Array2<F>; 3],
        mut grads: GradientsMut<'_, F>,
        inner_vjp: impl FnOnce(&Inputs<'_, F>, GradientsMut<'_, F>) -> Result<()>,
    ) -> Result<()> {
        let arrays = self.arrays(inputs)?;
        for (which, x) in arrays.iter().enumerate() {
            let expected = [x.nrows(), self.in_weight(which).nrows()];
            check_shape("saved projection", &expected, projected[which].shape())?;
        }
        let inner_inputs = self.inner_inputs(inputs, projected)?;
        let grads_of_arrays = [grads.query.take(), grads.key.take(), grads.value.take()];
        let num_own = params::count(self) - params::count(&self.inner);
        let (params, inner_grads) = grads.split_params(num_own)?;

        let mut grad_projected = projected.each_ref().map(|array| Array2::zeros(array.raw_dim()));
        let [query, key, value] = grad_projected.each_mut().map(|array| Some(array.view_mut()));
        let inner_grads = GradientsMut { query, key, value, ..inner_grads };
        inner_vjp(&inner_inputs, inner_grads)?;

        // x' = x Wᵀ + b for query, key and value
        let [in_weights, in_bias, ..] = self.split_params(params);
        let packed = in_weights.len() == 1;
        let mut in_bias = in_bias.first_mut().map(param_slot::<F, Ix1>);
        for (which, grad_x) in grads_of_arrays.into_iter().enumerate() {
            let rows = self.rows[which].clone();
            let mut weight = param_slot::<F, Ix2>(&mut in_weights[if packed { 0 } else { which }]);
            if packed {
                weight.slice_axis_inplace(Axis(0), rows.clone().into());
            }
            let grad = grad_projected[which].view();
            let bias = in_bias.as_mut().map(|bias| bias.slice_mut(s![rows]));
            F::linear_params_vjp(arrays[which], grad, weight, bias)?;
            if let Some(grad_x) = grad_x {
                F::linear_input_vjp(self.in_weight(which), grad, grad_x)?;
            }
        }
        Ok(())
    }
}
