//! Attention over the neighbours in a graph and over latent neighbours: [`DualSpace`].

mod config;
mod search;

pub use config::{DualSpaceConfig, Fusion};
pub use search::LatentSearch;

use crate::attention::{Attention, Saved, check_output};
use crate::dropout::{Dropout, mix};
use crate::element::try_zeros;
use crate::error::{Channel, Error, Result, check_shape};
use crate::gradients::{GradientsMut, param_slot};
use crate::graph::Graph;
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::params::{self, Params, prefixed};
use crate::softmax::softmax;
use ndarray::{
    Array1, Array2, ArrayD, ArrayView2, ArrayViewD, ArrayViewMut1, ArrayViewMut2, ArrayViewMutD,
    Axis, s,
};
use std::borrow::Cow;
use std::mem::take;
use std::ops::Range;

const NAME: &str = "dual_space";

/// The names of the branches in parameters and errors.
const BRANCHES: [&str; 3] = ["graph", "latent", "cross"];
const GRAPH: usize = 0;
const LATENT: usize = 1;
const CROSS: usize = 2;

/// Attention in two spaces: each node attends to its neighbours in the graph and to its latent
/// neighbours, the nodes most similar to it; then the output of the graph branch attends to the latent
/// neighbours (cross-attention). The outputs of the three inner mechanisms, which can be of any kind, are
/// fused.
///
/// ```text
/// graph_i  = A_graph(q_i; N_G(i))
/// latent_i = A_latent(q_i; N_L(i))
/// cross_i  = A_cross(graph_i; N_L(i))                 over the same keys and values
/// x_i = graph_i ‖ latent_i ‖ cross_i
/// o_i = W x_i + b                                     Fusion::Linear
/// o_i = Γ_i1 graph_i + Γ_i2 latent_i + Γ_i3 cross_i   Fusion::Gated
/// Γ_i = softmax(W x_i + b)
/// ```
///
/// * **Neighbours** N_G are the pairs of the inputs, dense or of a graph. N_L are the pairs of
///   [`Inputs::with_latent`] or, if the inputs have none, those found by a [`LatentSearch`]
///   ([`with_search`](Self::with_search)): the k most similar keys except the node itself, optionally
///   above a threshold and without N_G. They are constant for the gradient. A query with NaN finds no
///   neighbours, a key with NaN is never found, and k may exceed the number of keys. If they come from an
///   approximate index and queries are distributed differently than keys, as after separate projections,
///   check its recall: see [`HnswIndex`](crate::neighbors::HnswIndex).
/// * **Shapes** Every branch returns `branch_dim` columns. The output of the graph branch is the query of
///   the cross branch. If keys have a different number of columns, the cross mechanism must project them,
///   as [`MultiHead`](crate::MultiHead) does with `key_dim`. All three branches use the heads of the
///   inputs; the fusion reads whole rows.
/// * **Reads** mask and causal pattern for both kinds of neighbours. Bias, edge features, distances and
///   layers are data of the graph's pairs and go only to the graph branch: a bias of −∞ hides no latent
///   pair. Dropout applies to all three branches; the latent and the cross branch have their own seeds.
///   (Latent pairs are numbered as in their graph, so pairs found for queries
///   [selected](Inputs::select_queries) by a mixture are dropped differently than among all queries.)
/// * **Output** `output_dim` columns with a linear fusion, `branch_dim` with a gated one. For a query
///   without neighbours of a kind, the branch returns zeros or its biases; a gate leaves the branch out,
///   and a query without any neighbours then gets zeros.
/// * **Parameters** `fusion.weight` (`output_dim` × 3 `branch_dim`) and `fusion.bias`, or `gate.weight`
///   (3 × 3 `branch_dim`) and `gate.bias`; then the parameters of the branches with the prefixes
///   `graph.`, `latent.` and `cross.`.
/// * **Cost** the branches, O(n · 3 `branch_dim` · rows of W) for the fusion, and the search,
///   O(n_q · n_k · d) if it is exact.
/// * **Errors** [`Error::MissingInput`] without latent neighbours, [`Error::Shape`] if a branch returns a
///   different number of columns or if queries and keys cannot be compared. Errors of a branch name it:
///   `cross (flash)`.
///
/// ```
/// use graph_attention::ndarray::array;
/// use graph_attention::neighbors::Metric;
/// use graph_attention::{Attention, DualSpaceConfig, Flash, Graph, Inputs, dual_space::{Fusion, LatentSearch}};
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
///
/// // A path 0 – 1 – 2 – 3 with similar ends.
/// let nodes = array![[1.0, 0.2], [0.0, 1.0], [-1.0, 0.0], [0.9, 0.1]];
/// let path = [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)];
/// let graph = Graph::from_edges(4, 4, path)?;
/// let inputs = Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)?;
///
/// let mut rng = Xoshiro256PlusPlus::seed_from_u64(2);
/// let search = LatentSearch::new(1, Metric::Cosine).threshold(0.5).exclude_graph(true);
/// let dual = DualSpaceConfig::new(Fusion::Gated, 2)
///     .init(Flash::new(), Flash::new(), Flash::new(), &mut rng)?
///     .with_search(search);
/// assert_eq!(dual.latent_neighbors(&inputs)?.neighbors(0), [3]);
/// assert_eq!(dual.forward(&inputs)?.dim(), (4, 2));
///
/// let gates = dual.gates(&inputs)?;
/// assert!((gates.row(0).sum() - 1.0f64).abs() < 1e-12);
/// assert_eq!(gates.row(1).to_vec(), [1.0, 0.0, 0.0]); // no node is similar to node 1
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Debug)]
pub struct DualSpace<F: Float> {
    config: DualSpaceConfig,
    /// W, output_dim or 3 × 3 branch_dim.
    weight: Array2<F>,
    bias: Array1<F>,
    branches: [Box<dyn Attention<F>>; 3],
    search: Option<LatentSearch<F>>,
}

struct State<F> {
    /// The neighbours that the search found, if there was one.
    found: Option<Graph>,
    /// x, num_queries × 3 branch_dim.
    x: Array2<F>,
    /// Γ of a gated fusion.
    gates: Option<Array2<F>>,
    branches: [Saved; 3],
}

impl<F: Float> DualSpace<F> {
    /// Adds a search for latent neighbours, used if the inputs have none.
    #[must_use]
    pub fn with_search(mut self, search: LatentSearch<F>) -> Self {
        self.search = Some(search);
        self
    }

    /// Returns the configuration.
    #[must_use]
    pub fn config(&self) -> &DualSpaceConfig {
        &self.config
    }

    /// Returns the mechanisms of the branches graph, latent and cross.
    #[must_use]
    pub fn branches(&self) -> [&dyn Attention<F>; 3] {
        self.branches.each_ref().map(|branch| &**branch)
    }

    /// Returns N_L: the latent neighbours of the inputs or, if they have none, those found by the search.
    ///
    /// # Errors
    /// [`Error::MissingInput`] without latent neighbours and without a search. From the search:
    /// [`Error::Shape`] if queries and keys, or the keys of a given index, do not fit each other, or if
    /// self is excluded and queries and keys are not the same nodes; [`Error::InvalidArgument`] if the
    /// threshold is NaN; [`Error::TooLarge`] or [`Error::Graph`] if there are too many.
    pub fn latent_neighbors<'a>(&self, inputs: &Inputs<'a, F>) -> Result<Cow<'a, Graph>> {
        match self.search(inputs)? {
            Some(found) => Ok(Cow::Owned(found)),
            None => inputs.latent(NAME).map(Cow::Borrowed),
        }
    }

    /// Returns Γ, the shares of the graph, latent and cross branches in the output of each query,
    /// num_queries × 3. They sum to 1, or to 0 for a query without neighbours.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the fusion is not gated; otherwise as
    /// [`forward`](Attention::forward).
    pub fn gates(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        if self.config.fusion != Fusion::Gated {
            return Err(Error::config("fusion", "`Fusion::Gated`", "`Fusion::Linear`"));
        }
        let found = self.search(inputs)?;
        let latent_inputs = latent_inputs(inputs, found.as_ref())?;
        let (x, _) = self.run(inputs, &latent_inputs, |mechanism, inputs, out| {
            mechanism.forward_into(inputs, out)
        })?;
        self.gate(x.view(), inputs, &latent_inputs)
    }

    /// Searches for latent neighbours, if the inputs have none and there is a search.
    fn search(&self, inputs: &Inputs<'_, F>) -> Result<Option<Graph>> {
        let search = self.search.as_ref().filter(|_| !inputs.has(Channel::Latent));
        search.map(|search| search.find(inputs)).transpose()
    }

    /// Computes x: runs each branch with `forward` and keeps the results.
    fn run<T>(
        &self,
        inputs: &Inputs<'_, F>,
        latent_inputs: &Inputs<'_, F>,
        forward: impl Fn(&dyn Attention<F>, &Inputs<'_, F>, ArrayViewMut2<'_, F>) -> Result<T>,
    ) -> Result<(Array2<F>, [T; 3])> {
        let dim = self.config.branch_dim;
        let run = |branch: usize, inputs: Result<Inputs<'_, F>>, out: ArrayViewMut2<'_, F>| {
            let mechanism = &*self.branches[branch];
            let answer = inputs.and_then(|inputs| {
                let columns = mechanism.output_dim(&inputs);
                check_shape("output columns, which must equal branch_dim", &[dim], &[columns])?;
                forward(mechanism, &inputs, out)
            });
            answer.map_err(|error| error.in_part(BRANCHES[branch], mechanism.name(), None))
        };
        let mut x = try_zeros("branches", inputs.num_queries(), self.weight.ncols())?;
        let [mut graph, latent, cross] = split(x.view_mut(), dim);
        let answers = [
            run(GRAPH, Ok(*inputs), graph.view_mut())?,
            run(LATENT, Ok(*latent_inputs), latent)?,
            run(CROSS, cross_inputs(latent_inputs, graph.view()), cross)?,
        ];
        Ok((x, answers))
    }

    /// Computes Γ.
    fn gate(
        &self,
        x: ArrayView2<'_, F>,
        inputs: &Inputs<'_, F>,
        latent_inputs: &Inputs<'_, F>,
    ) -> Result<Array2<F>> {
        let mut gates = F::linear(x, self.weight.view(), Some(self.bias.view()))?;
        for (query, gates) in gates.rows_mut().into_iter().enumerate() {
            gates_among(gates, branches_of(inputs, latent_inputs, query));
        }
        Ok(gates)
    }

    /// Overwrites `out`; returns Γ if the fusion is gated.
    fn fuse(
        &self,
        x: ArrayView2<'_, F>,
        inputs: &Inputs<'_, F>,
        latent_inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
    ) -> Result<Option<Array2<F>>> {
        if self.config.fusion != Fusion::Gated {
            F::linear_into(x, self.weight.view(), Some(self.bias.view()), out)?;
            return Ok(None);
        }
        let gates = self.gate(x, inputs, latent_inputs)?;
        out.fill(F::zero());
        for (query, mut out) in out.rows_mut().into_iter().enumerate() {
            for &branch in branches_of(inputs, latent_inputs, query) {
                let x = x.slice(s![query, self.columns(branch)]);
                out.scaled_add(gates[[query, branch]], &x);
            }
        }
        Ok(Some(gates))
    }

    /// Adds to the gradients of the fusion's parameters; returns the gradient of x.
    fn fuse_vjp(
        &self,
        State { x, gates, .. }: &State<F>,
        inputs: &Inputs<'_, F>,
        latent_inputs: &Inputs<'_, F>,
        grad_out: ArrayView2<'_, F>,
        params: &mut [ArrayD<F>],
    ) -> Result<Array2<F>> {
        let mut grad_x = try_zeros("grad_branches", x.nrows(), x.ncols())?;
        let grad_gates = gates.as_ref().map(|gates| {
            // o = Σ_b Γ_b x_b, Γ = softmax(z)
            let mut grad_z = Array2::zeros(gates.raw_dim());
            for (query, grad_out) in grad_out.rows().into_iter().enumerate() {
                let branches = branches_of(inputs, latent_inputs, query);
                let (gates, mut grad_z) = (gates.row(query), grad_z.row_mut(query));
                for &branch in branches {
                    let columns = s![query, self.columns(branch)];
                    grad_z[branch] = grad_out.dot(&x.slice(columns));
                    grad_x.slice_mut(columns).scaled_add(gates[branch], &grad_out);
                }
                let mean: F = branches.iter().map(|&b| gates[b] * grad_z[b]).sum();
                branches.iter().for_each(|&b| grad_z[b] = gates[b] * (grad_z[b] - mean));
            }
            grad_z
        });
        // z = W x + b, or o
        let grad_z = grad_gates.as_ref().map_or(grad_out, |grad| grad.view());
        if let [weight, bias] = params {
            F::linear_params_vjp(x.view(), grad_z, param_slot(weight), Some(param_slot(bias)))?;
        }
        F::linear_input_vjp(self.weight.view(), grad_z, grad_x.view_mut())?;
        Ok(grad_x)
    }

    /// Returns the columns of a branch in x.
    fn columns(&self, branch: usize) -> Range<usize> {
        let dim = self.config.branch_dim;
        branch * dim..(branch + 1) * dim
    }

    /// Returns the names of the fusion's parameters.
    fn names(&self) -> [&'static str; 2] {
        match self.config.fusion {
            Fusion::Linear { .. } => ["fusion.weight", "fusion.bias"],
            Fusion::Gated => ["gate.weight", "gate.bias"],
        }
    }
}

impl<F: Float> Params<F> for DualSpace<F> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        let [weight, bias] = self.names();
        visitor(weight, self.weight.view().into_dyn());
        visitor(bias, self.bias.view().into_dyn());
        for (prefix, branch) in BRANCHES.iter().zip(&self.branches) {
            branch.visit_params(&mut prefixed(prefix, visitor));
        }
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        let [weight, bias] = self.names();
        visitor(weight, self.weight.view_mut().into_dyn());
        visitor(bias, self.bias.view_mut().into_dyn());
        for (prefix, branch) in BRANCHES.iter().zip(&mut self.branches) {
            branch.visit_params_mut(&mut prefixed(prefix, visitor));
        }
    }

    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        for (prefix, branch) in BRANCHES.iter().zip(&self.branches) {
            branch.visit_buffers(&mut prefixed(prefix, visitor));
        }
    }

    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        for (prefix, branch) in BRANCHES.iter().zip(&mut self.branches) {
            branch.visit_buffers_mut(&mut prefixed(prefix, visitor));
        }
    }
}

impl<F: Float> Attention<F> for DualSpace<F> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, _: &Inputs<'_, F>) -> usize {
        match self.config.fusion {
            Fusion::Linear { output_dim } => output_dim,
            Fusion::Gated => self.config.branch_dim,
        }
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        check_output(self, "out", inputs, out.shape())?;
        let found = self.search(inputs)?;
        let latent_inputs = latent_inputs(inputs, found.as_ref())?;
        let (x, _) = self.run(inputs, &latent_inputs, |mechanism, inputs, out| {
            mechanism.forward_into(inputs, out)
        })?;
        self.fuse(x.view(), inputs, &latent_inputs, out).map(drop)
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        check_output(self, "out", inputs, out.shape())?;
        let found = self.search(inputs)?;
        let latent_inputs = latent_inputs(inputs, found.as_ref())?;
        let (x, branches) = self.run(inputs, &latent_inputs, |mechanism, inputs, out| {
            mechanism.forward_train_into(inputs, out)
        })?;
        let gates = self.fuse(x.view(), inputs, &latent_inputs, out)?;
        Ok(Saved::new(NAME, State { found, x, gates, branches }))
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
        grads.check(NAME, inputs, self)?;
        let shape = [inputs.num_queries(), self.weight.ncols()];
        check_shape("saved branches", &shape, state.x.shape())?;
        let gates = (self.config.fusion == Fusion::Gated).then_some(shape[0]);
        let saved_gates = state.gates.as_ref().map(|gates| gates.nrows());
        check_shape("saved gates", gates.as_slice(), saved_gates.as_slice())?;
        let latent_inputs = latent_inputs(inputs, state.found.as_ref())?;
        let (own, params) = take(&mut grads.params).split_at_mut(2);
        let (of_graph, params) = params.split_at_mut(params::count(&self.branches[GRAPH]));
        let (of_latent, of_cross) = params.split_at_mut(params::count(&self.branches[LATENT]));

        // o = fusion(x)
        let mut grad_x = self.fuse_vjp(state, inputs, &latent_inputs, grad_out, own)?;
        let backward = |branch: usize,
                        inputs: Result<Inputs<'_, F>>,
                        grad_out: ArrayView2<'_, F>,
                        grads: GradientsMut<'_, F>| {
            let mechanism = &*self.branches[branch];
            let saved = &state.branches[branch];
            inputs
                .and_then(|inputs| mechanism.backward_into(&inputs, saved, grad_out, grads))
                .map_err(|error| error.in_part(BRANCHES[branch], mechanism.name(), None))
        };
        let dim = self.config.branch_dim;
        let [mut grad_graph, grad_latent, grad_cross] = split(grad_x.view_mut(), dim);

        // cross = A_cross(graph; N_L)
        // Bias, weights of pairs, edge features and distances belong to the pairs of the graph.
        let query = Some(grad_graph.view_mut());
        let cross_grads =
            GradientsMut { query, params: of_cross, ..without_pairs(grads.reborrow()) };
        let graph = state.x.slice(s![.., self.columns(GRAPH)]);
        let inputs_of_cross = cross_inputs(&latent_inputs, graph);
        backward(CROSS, inputs_of_cross, grad_cross.view(), cross_grads)?;

        // latent = A_latent(q; N_L)
        let latent_grads = GradientsMut { params: of_latent, ..without_pairs(grads.reborrow()) };
        backward(LATENT, Ok(latent_inputs), grad_latent.view(), latent_grads)?;

        // graph = A_graph(q; N_G)
        let graph_grads = GradientsMut { params: of_graph, ..grads };
        backward(GRAPH, Ok(*inputs), grad_graph.view(), graph_grads)
    }
}

/// Without the gradients of the data of pairs.
fn without_pairs<F>(grads: GradientsMut<'_, F>) -> GradientsMut<'_, F> {
    let (bias, pair_weights, edge_features, distances) = (None, None, None, None);
    GradientsMut { bias, pair_weights, edge_features, distances, ..grads }
}

/// Returns the inputs of the latent branch, over the neighbours that were found or those of the inputs.
fn latent_inputs<'b, F: Float>(
    inputs: &Inputs<'b, F>,
    found: Option<&'b Graph>,
) -> Result<Inputs<'b, F>> {
    let inputs = found.map_or(Ok(*inputs), |found| inputs.with_latent(found))?;
    with_next_seed(inputs.over_latent(NAME)?)
}

/// Returns the inputs of the cross branch: the output of the graph branch attends to the latent
/// neighbours.
fn cross_inputs<'b, F: Float>(
    latent_inputs: &Inputs<'b, F>,
    graph: ArrayView2<'b, F>,
) -> Result<Inputs<'b, F>> {
    let (heads, columns) = (latent_inputs.num_heads(), graph.ncols());
    let inputs = latent_inputs.with_arrays(graph, latent_inputs.key(), latent_inputs.value());
    let what = "query of the cross branch (the output of the graph branch)";
    with_next_seed(inputs.map_err(|_| Error::Heads { what, heads, columns })?)
}

/// Changes the dropout seed, so that the branches do not drop the same pairs.
fn with_next_seed<F: Float>(inputs: Inputs<'_, F>) -> Result<Inputs<'_, F>> {
    let Some(dropout) = inputs.dropout() else { return Ok(inputs) };
    inputs.with_dropout(Dropout { seed: mix(dropout.seed), ..dropout })
}

/// Returns the branches in which a query has visible neighbours.
fn branches_of<F: Float>(
    inputs: &Inputs<'_, F>,
    latent_inputs: &Inputs<'_, F>,
    query: usize,
) -> &'static [usize] {
    let has_any = |inputs: &Inputs<'_, F>| inputs.row(query).next().is_some();
    match (has_any(inputs), has_any(latent_inputs)) {
        (true, true) => &[GRAPH, LATENT, CROSS],
        (true, false) => &[GRAPH],
        (false, true) => &[LATENT, CROSS],
        (false, false) => &[],
    }
}

/// Overwrites the logits in `some` with their softmax and the others with zeros.
fn gates_among<F: Float>(mut logits: ArrayViewMut1<'_, F>, some: &[usize]) {
    if some.is_empty() {
        return logits.fill(F::zero());
    }
    for (at, logit) in logits.indexed_iter_mut() {
        if !some.contains(&at) {
            *logit = F::neg_infinity();
        }
    }
    softmax(logits);
}

/// Splits x into the columns of the three branches.
fn split<F: Float>(x: ArrayViewMut2<'_, F>, dim: usize) -> [ArrayViewMut2<'_, F>; 3] {
    let (graph, others) = x.split_at(Axis(1), dim);
    let (latent, cross) = others.split_at(Axis(1), dim);
    [graph, latent, cross]
}
