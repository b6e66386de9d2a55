//! Graph attention networks with edge features: [`EdgeGat`].

mod config;
mod finish;
mod partial;
mod scores;

pub use config::EdgeGatConfig;
pub use scores::Score;

use crate::attention::{Attention, Saved, check_output};
use crate::element::try_zeros;
use crate::error::{Channel, Error, Result, check_shape};
use crate::gradients::GradientsMut;
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::kernels::edge_gat::EdgeProblem;
use crate::kernels::level::level;
use crate::kernels::normalizer::Normalizer;
use crate::kernels::problem::{Problem, Rows, Upstream, WeightGradients};
use crate::mechanisms::flash::Flash;
use crate::mechanisms::scaled_dot_product::ScaledDotProduct;
use crate::params::Params;
use crate::partial::PartialUpstream;
use ndarray::{
    Array2, ArrayD, ArrayView1, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD, Axis,
    Dimension, Ix2,
};
use scores::{Linear, Names};

const NAME: &str = "edge_gat";

/// The data of pairs that it reads.
const READS: &[Channel] = &[Channel::EdgeFeatures];

/// The number of pairs of a row processed at a time, so that the intermediate results of
/// [`Score::GatV2`] stay in the first levels of the cache.
const TILE: usize = 64;

/// Graph attention with edge features (Veličković et al. 2018, 1710.10903; Brody et al. 2022,
/// 2105.14491; Shi et al. 2021, 2009.03509), one mechanism with several [`Score`]s.
///
/// ```text
/// e_ij  = score(h_i, h_j, x_ij)            query node i, neighbour j, edge features x
/// p_i   = softmax over the pairs of i of e_ij
/// o_i   = Σ_j p_ij (W h_j [+ W_e x_ij])    for each head; heads concatenated or averaged
/// out_i = o_i [+ W_res h_i] [+ b]          or β W_res h_i + (1 − β) o_i
/// ```
///
/// * **Reads** queries (the target nodes), keys (the neighbours in the score) and values (the neighbours
///   in the sum), usually three times the same array; edge features, num_pairs × `edge_dim`, if
///   configured; mask, causal pattern, bias (added to e_ij) and its gradient, dropout, weights of pairs.
///   Inputs with several heads are refused, because the heads are made here; a bias and weights of pairs have
///   `num_heads` of them or one that all share. Self-loops must be in the graph:
///   [`Graph::with_self_loops_and_features`](crate::Graph::with_self_loops_and_features).
/// * **Output** num_queries × (`num_heads` · `head_dim`), or × `head_dim` for averaged heads. A node
///   without neighbours has o_i = 0.
/// * **Parameters** named as in PyG, whose state dicts can be loaded directly
///   ([`EdgeGatConfig::from_params`]): `GATConv`: `att_src`, `att_dst`, `att_edge`, `bias`, `lin.weight` (or
///   `lin_src.weight`, `lin_dst.weight`), `lin_edge.weight`, `res.weight`; `GATv2Conv`, and `Additive`:
///   `att`, `bias`, `lin_l.weight`, `lin_l.bias`, `lin_r.weight`, `lin_r.bias`, `lin_edge.weight`,
///   `res.weight`; `TransformerConv`: `lin_key`, `lin_query`, `lin_value`, `lin_skip` (each `.weight` and
///   `.bias`), `lin_edge.weight`, `lin_beta.weight`. Weights are outputs × inputs; a weight shared by both
///   ends is one parameter, under the first of its names.
/// * **Cost** one projection of every node, O(n · inputs · heads · d), then per pair O(heads · (d +
///   edge_dim)) for `Gat` and `DotProduct`, O(heads · d · edge_dim) for `GatV2` and `Additive`. Memory O(n ·
///   heads · d), and in the backward pass two numbers for each pair and head, with `GatV2` one more for every
///   16 of the d columns (and, if the edges were not given in the order of the queries, a second copy of the
///   gradients of their features). Vectors of heads · d numbers per pair exist only within a tile.
/// * **Errors** [`Error::Shape`] for columns that do not fit the configuration,
///   [`Error::MissingInput`] if configured edge features are missing, [`Error::MissingSetting`] if the
///   inputs have edge features that are not configured.
///
/// A bias of −∞ hides a pair, and a pair that is hidden from all heads is not read at all; if it is hidden from
/// some heads only, NaN in its key or features reaches all heads of its query.
///
/// PyG gives the same result for a node without neighbours. It divides by the sum of exponentials plus
/// 1e-16, which makes no difference in practice. `lin_edge` never has a bias, as in PyG.
///
/// ```
/// use graph_attention::{Attention, EdgeGatConfig, Graph, Inputs, LoopFill, edge_gat::Score};
/// use graph_attention::ndarray::array;
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
///
/// let nodes = array![[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]];
/// let graph = Graph::from_edges(3, 3, [(0, 1), (1, 0), (1, 2)])?;
/// let lengths = array![[0.5], [0.5], [2.0]];
/// let (graph, lengths) = graph.with_self_loops_and_features(lengths.view(), LoopFill::Mean)?;
///
/// let config = EdgeGatConfig::new(Score::GatV2, 2, 4, 2).edge_dim(1);
/// let gat = config.init::<f64>(&mut Xoshiro256PlusPlus::seed_from_u64(1))?;
/// let inputs = Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)?
///     .with_edge_features(lengths.view())?;
/// let (out, saved) = gat.forward_train(&inputs)?;
/// assert_eq!(out.dim(), (3, 8));
/// let grads = gat.backward(&inputs, &saved, out.view())?;
/// assert_eq!(grads.edge_features.map(|grad| grad.dim()), Some((6, 1)));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EdgeGat<F> {
    config: EdgeGatConfig,
    names: Names,
    params: Vec<(&'static str, ArrayD<F>)>,
}

/// The projected queries, keys and values: for [`Score::Gat`], queries and keys are one number per head.
/// If `value` is `None`, the keys are the values.
struct Projected<F> {
    query: Array2<F>,
    key: Array2<F>,
    value: Option<Array2<F>>,
}

struct State<F> {
    /// The configuration that made the state: it decides what the arrays mean.
    config: EdgeGatConfig,
    projected: Projected<F>,
    /// Σ p v, heads concatenated.
    context: Array2<F>,
    normalizer: Normalizer<F>,
}

impl<F: Float> EdgeGat<F> {
    /// Returns the configuration.
    pub fn config(&self) -> &EdgeGatConfig {
        &self.config
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.params.iter().position(|(known, _)| *known == name)
    }

    fn param<D: Dimension>(&self, name: &str) -> Option<ndarray::ArrayView<'_, F, D>> {
        let param = &self.params[self.position(name)?].1;
        Some(param.view().into_dimensionality().expect("shapes are fixed when it is made"))
    }

    fn weight(&self, name: &str) -> ArrayView2<'_, F> {
        self.param(name).expect("the configuration has it")
    }

    /// Returns an attention vector, heads × d.
    fn attention(&self, name: &str) -> ArrayView2<'_, F> {
        let attention: ndarray::ArrayView3<'_, F> =
            self.param(name).expect("the configuration has it");
        attention.index_axis_move(Axis(0), 0)
    }

    fn bias(&self, linear: Linear) -> Option<ArrayView1<'_, F>> {
        self.param(linear.bias?)
    }

    fn linear(&self, x: ArrayView2<'_, F>, map: Linear) -> Result<Array2<F>> {
        F::linear(x, self.weight(map.weight), self.bias(map))
    }

    /// Checks the inputs against the configuration.
    fn check_inputs(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        inputs.check_absent(NAME, &[Channel::Heads])?;
        let config = &self.config;
        check_shape("query", &[inputs.num_queries(), config.query_dim], inputs.query().shape())?;
        check_shape("key", &[inputs.num_keys(), config.key_dim], inputs.key().shape())?;
        check_shape("value", &[inputs.num_keys(), config.key_dim], inputs.value().shape())?;
        if config.edge_dim > 0 {
            let features = inputs.edge_features(NAME)?;
            let expected = [inputs.num_pairs(), config.edge_dim];
            return check_shape("edge_features", &expected, features.shape());
        }
        match inputs.edge_features(NAME) {
            Ok(features) if features.ncols() > 0 => Err(Error::MissingSetting {
                mechanism: NAME.into(),
                setting: "EdgeGatConfig::edge_dim",
                channel: Channel::EdgeFeatures,
            }),
            _ => Ok(()),
        }
    }

    fn project(&self, inputs: &Inputs<'_, F>) -> Result<Projected<F>> {
        self.check_inputs(inputs)?;
        self.config.score.rules().project(self, inputs)
    }

    fn negative_slope(&self) -> F {
        F::from_f64(self.config.negative_slope)
    }

    /// Returns the inputs of the softmax.
    fn inner_inputs<'b>(
        &self,
        inputs: &Inputs<'b, F>,
        projected: &'b Projected<F>,
    ) -> Result<Inputs<'b, F>> {
        let Projected { query, key, value } = projected;
        let value = value.as_ref().unwrap_or(key);
        inputs
            .with_arrays(query.view(), key.view(), value.view())?
            .with_heads(self.config.num_heads)
    }

    /// Whether this is plain scaled dot-product attention.
    fn is_plain(&self) -> bool {
        self.config.score.form().is_dot_product && self.config.edge_dim == 0
    }

    fn problem<'b>(&self, inner: &Inputs<'b, F>) -> Result<EdgeProblem<'b, F>> {
        let config = &self.config;
        let columns = config.num_heads * config.head_dim;
        let has_edges = config.edge_dim > 0;
        let edge_weight = self.param::<Ix2>("lin_edge.weight");
        let none = ArrayView2::from_shape((inner.num_pairs(), 0), &[]).expect("it is empty");
        let features = if has_edges { inner.edge_features(NAME)? } else { none };
        let mut transposed = try_zeros("lin_edge.weight", config.edge_dim, columns)?;
        if let Some(weight) = edge_weight {
            transposed.assign(&weight.t());
        }
        Ok(EdgeProblem {
            softmax: Problem { skips_hidden: inner.bias().is_some(), ..Problem::new(inner, None)? },
            score: config.score.rules().score(self),
            features: Rows::new("edge_features", features)?,
            edge_weight: transposed,
            in_values: has_edges && config.edge_values,
            ones: vec![F::one(); config.num_heads],
        })
    }

    /// Overwrites `context` with the concatenated outputs of all heads; returns their normalizer.
    fn attend(
        &self,
        inner: &Inputs<'_, F>,
        context: ArrayViewMut2<'_, F>,
    ) -> Result<Normalizer<F>> {
        if self.is_plain() {
            return Flash::new().run(inner, context);
        }
        let heads = self.config.num_heads;
        let mut normalizer = Normalizer::empty(inner.num_queries(), heads)?;
        let problem = self.problem(inner)?;
        F::edges_forward(&problem, TILE, level(), context, &mut normalizer);
        Ok(normalizer)
    }

    fn new_context(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        try_zeros("context", inputs.num_queries(), self.context_columns())
    }
}

/// Whether two views show the same entries in the same order.
fn same_view<F>(a: ArrayView2<'_, F>, b: ArrayView2<'_, F>) -> bool {
    a.as_ptr() == b.as_ptr() && a.shape() == b.shape() && a.strides() == b.strides()
}

/// Computes a_hᵀ W_h for each head h, where W has one block of rows per head.
fn fold<F: Float>(attention: ArrayView2<'_, F>, weight: ArrayView2<'_, F>) -> Array2<F> {
    let mut folded = Array2::zeros((attention.nrows(), weight.ncols()));
    for (head, attention) in attention.rows().into_iter().enumerate() {
        for (c, &a) in attention.iter().enumerate() {
            folded.row_mut(head).scaled_add(a, &weight.row(head * attention.len() + c));
        }
    }
    folded
}

/// Adds the gradients of [`fold`].
fn fold_vjp<F: Float>(
    attention: ArrayView2<'_, F>,
    weight: ArrayView2<'_, F>,
    grad_folded: ArrayView2<'_, F>,
    mut grad_attention: ArrayViewMut2<'_, F>,
    mut grad_weight: ArrayViewMut2<'_, F>,
) {
    let dim = attention.ncols();
    for ((head, c), &a) in attention.indexed_iter() {
        let (row, grad) = (head * dim + c, grad_folded.row(head));
        grad_attention[[head, c]] += grad.dot(&weight.row(row));
        grad_weight.row_mut(row).scaled_add(a, &grad);
    }
}

impl<F: Float> Params<F> for EdgeGat<F> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        self.params.iter().for_each(|(name, param)| visitor(name, param.view()));
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        self.params.iter_mut().for_each(|(name, param)| visitor(name, param.view_mut()));
    }
}

/// The gradients of the parameters, by name.
struct ParamGradients<'g, 'p, F> {
    gat: &'p EdgeGat<F>,
    grads: &'g mut [ArrayD<F>],
}

impl<F: Float> ParamGradients<'_, '_, F> {
    fn view<D: Dimension>(&mut self, name: &str) -> Option<ndarray::ArrayViewMut<'_, F, D>> {
        let grad = &mut self.grads[self.gat.position(name)?];
        Some(grad.view_mut().into_dimensionality().expect("shapes have been checked"))
    }

    fn weight(&mut self, name: &str) -> ArrayViewMut2<'_, F> {
        self.view(name).expect("the configuration has it")
    }

    /// Adds the gradients of W and b in y = x Wᵀ + b, and of x if wanted.
    fn linear(
        &mut self,
        map: Linear,
        x: ArrayView2<'_, F>,
        grad: ArrayView2<'_, F>,
        grad_x: Option<ArrayViewMut2<'_, F>>,
    ) -> Result<()> {
        F::linear_params_vjp(x, grad, self.weight(map.weight), None)?;
        if let Some(mut bias) = map.bias.and_then(|name| self.view::<ndarray::Ix1>(name)) {
            bias += &grad.sum_axis(Axis(0));
        }
        match grad_x {
            Some(grad_x) => F::linear_input_vjp(self.gat.weight(map.weight), grad, grad_x),
            None => Ok(()),
        }
    }

    /// Adds the gradients of the folded arrays in y = x foldᵀ, and of x if wanted.
    fn folded(
        &mut self,
        attention: &str,
        map: Linear,
        x: ArrayView2<'_, F>,
        grad: ArrayView2<'_, F>,
        grad_x: Option<ArrayViewMut2<'_, F>>,
    ) -> Result<()> {
        let folded = fold(self.gat.attention(attention), self.gat.weight(map.weight));
        let mut grad_folded = Array2::zeros(folded.raw_dim());
        F::linear_params_vjp(x, grad, grad_folded.view_mut(), None)?;
        self.unfold(attention, map.weight, grad_folded.view());
        match grad_x {
            Some(grad_x) => F::linear_input_vjp(folded.view(), grad, grad_x),
            None => Ok(()),
        }
    }

    fn unfold(&mut self, attention: &str, weight: &str, grad_folded: ArrayView2<'_, F>) {
        let gat = self.gat;
        let (attention_value, weight_value) = (gat.attention(attention), gat.weight(weight));
        let mut grad_attention = Array2::zeros(attention_value.raw_dim());
        let grad_weight = self.weight(weight);
        fold_vjp(
            attention_value,
            weight_value,
            grad_folded,
            grad_attention.view_mut(),
            grad_weight,
        );
        self.add_attention(attention, grad_attention.view());
    }

    fn add_attention(&mut self, name: &str, grad: ArrayView2<'_, F>) {
        if let Some(mut sum) = self.view::<ndarray::Ix3>(name) {
            sum.index_axis_mut(Axis(0), 0).zip_mut_with(&grad, |sum, &grad| *sum += grad);
        }
    }
}

impl<F: Float> Attention<F> for EdgeGat<F> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, _: &Inputs<'_, F>) -> usize {
        self.config.output_columns()
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, mut out: ArrayViewMut2<'_, F>) -> Result<()> {
        if self.config.average_heads || self.config.gate {
            return self.forward_train_into(inputs, out).map(drop);
        }
        // The heads' outputs are the output and are not needed afterwards.
        check_output(self, "out", inputs, out.shape())?;
        if let Some(seen) = inputs.select_seen_keys(READS)? {
            return self.forward_into(&seen.inputs(), out);
        }
        let projected = self.project(inputs)?;
        self.attend(&self.inner_inputs(inputs, &projected)?, out.view_mut())?;
        self.add_residual(inputs, out.view_mut())?;
        self.add_bias(out);
        Ok(())
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        check_output(self, "out", inputs, out.shape())?;
        if let Some(seen) = inputs.select_seen_keys(READS)? {
            return self.forward_train_into(&seen.inputs(), out);
        }
        let projected = self.project(inputs)?;
        let mut context = self.new_context(inputs)?;
        let inner = self.inner_inputs(inputs, &projected)?;
        let normalizer = self.attend(&inner, context.view_mut())?;
        self.finish(inputs, context.view(), out)?;
        let config = self.config.clone();
        Ok(Saved::new(NAME, State { config, projected, context, normalizer }))
    }

    fn backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let State { config, projected, context, normalizer } = saved.state::<State<F>>(NAME)?;
        if *config != self.config {
            return Err(Error::saved_options(NAME, &self.config, config));
        }
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        grads.check(NAME, inputs, self)?;
        self.check_inputs(inputs)?;
        if let Some(seen) = inputs.select_seen_keys(READS)? {
            return seen.backward_of_read(grads, |inputs, grads| {
                self.backward_into(inputs, saved, grad_out, grads)
            });
        }
        let shape = [inputs.num_queries(), self.context_columns()];
        check_shape("saved context", &shape, context.shape())?;
        let out = context.view();
        let grad_context = self.finish_vjp(inputs, out, grad_out, &mut grads)?;
        let upstream = PartialUpstream {
            out,
            normalizer,
            grad_out: grad_context.view(),
            grad_log_sum_exp: None,
        };
        self.attend_vjp(inputs, projected, upstream, grads)
    }

    fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        let projected = self.project(inputs)?;
        let inner = self.inner_inputs(inputs, &projected)?;
        if self.is_plain() {
            return ScaledDotProduct::new().attention_weights(&inner);
        }
        Ok(self.edges_weights(inputs, &inner)?.1)
    }

    fn attention_weights_backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        grads.check(NAME, inputs, self)?;
        let projected = self.project(inputs)?;
        let inner = self.inner_inputs(inputs, &projected)?;
        let (mut params, mut grads) = self.split_params(grads)?;
        let projected = if self.is_plain() {
            self.plain_vjp(&inner, grads.reborrow(), |grads| {
                let plain = ScaledDotProduct::new();
                plain.attention_weights_backward_into(&inner, grad_weights, grads)
            })?
        } else {
            let (normalizer, weights) = self.edges_weights(inputs, &inner)?;
            let grad_weights = WeightGradients::new(&inner, &weights, grad_weights)?;
            let zeros = Rows::from(self.new_context(inputs)?);
            let upstream = Upstream {
                out: zeros.slices(),
                normalizer: &normalizer,
                grad_out: zeros.slices(),
                grad_log_sum_exp: None,
                grad_weights: Some(&grad_weights),
            };
            self.edges_vjp(&inner, upstream, &mut grads, &mut params)?
        };
        let grads = [grads.query, grads.key, grads.value];
        self.config.score.rules().project_vjp(&mut params, inputs, projected, grads)
    }
}

impl<F: Float> EdgeGat<F> {
    /// The number of columns of all heads, before they are averaged.
    fn context_columns(&self) -> usize {
        self.config.num_heads * self.config.head_dim
    }

    /// Adds the gradients of the softmax and of the projections before it. Outputs and normalizer may be
    /// over more pairs, but then `grad_log_sum_exp` must be `Some`.
    fn attend_vjp(
        &self,
        inputs: &Inputs<'_, F>,
        projected: &Projected<F>,
        upstream: PartialUpstream<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let inner = self.inner_inputs(inputs, projected)?;
        let (mut params, mut grads) = self.split_params(grads)?;
        let projected = if self.is_plain() {
            self.plain_vjp(&inner, grads.reborrow(), |mut grads| {
                Flash::new().add_gradients(&inner, upstream, &mut grads)
            })?
        } else {
            upstream
                .in_rows(|upstream| self.edges_vjp(&inner, upstream, &mut grads, &mut params))?
        };
        let grads = [grads.query, grads.key, grads.value];
        self.config.score.rules().project_vjp(&mut params, inputs, projected, grads)
    }

    /// Computes the normalizer and the weights of the edges.
    fn edges_weights(
        &self,
        inputs: &Inputs<'_, F>,
        inner: &Inputs<'_, F>,
    ) -> Result<(Normalizer<F>, Array2<F>)> {
        let mut context = self.new_context(inputs)?;
        let normalizer = self.attend(inner, context.view_mut())?;
        let weights = F::edges_weights(&self.problem(inner)?, TILE, level(), &normalizer)?;
        Ok((normalizer, weights))
    }

    /// Splits off the gradients of the parameters.
    fn split_params<'g>(
        &self,
        grads: GradientsMut<'g, F>,
    ) -> Result<(ParamGradients<'g, '_, F>, GradientsMut<'g, F>)> {
        let count = grads.params.len();
        let (params, others) = grads.split_params(count)?;
        Ok((ParamGradients { gat: self, grads: params }, others))
    }

    /// Runs a backward pass of plain scaled dot-product attention. Returns the gradients of the projected
    /// queries, keys and values; adds those of the pairs.
    fn plain_vjp(
        &self,
        inner: &Inputs<'_, F>,
        of_pairs: GradientsMut<'_, F>,
        backward: impl FnOnce(GradientsMut<'_, F>) -> Result<()>,
    ) -> Result<[Array2<F>; 3]> {
        let zeros = |array: ArrayView2<'_, F>| try_zeros("gradients", array.nrows(), array.ncols());
        let mut query = zeros(inner.query())?;
        let [mut key, mut value] = [zeros(inner.key())?, zeros(inner.value())?];
        backward(GradientsMut {
            query: Some(query.view_mut()),
            key: Some(key.view_mut()),
            value: Some(value.view_mut()),
            ..of_pairs
        })?;
        Ok([query, key, value])
    }

    /// Returns the gradients of the projected queries, keys and values; adds those of the pairs and of the
    /// parameters of the score.
    fn edges_vjp(
        &self,
        inner: &Inputs<'_, F>,
        upstream: Upstream<'_, F>,
        of_pairs: &mut GradientsMut<'_, F>,
        params: &mut ParamGradients<'_, '_, F>,
    ) -> Result<[Array2<F>; 3]> {
        let problem = self.problem(inner)?;
        let inner = F::edges_backward(&problem, TILE, level(), upstream, of_pairs)?;
        self.config.score.rules().score_vjp(params, &inner.attention);
        if let Some(mut weight) = params.view::<Ix2>("lin_edge.weight") {
            weight += &inner.edge_weight.t();
        }
        Ok([inner.query, inner.key, inner.value])
    }
}
