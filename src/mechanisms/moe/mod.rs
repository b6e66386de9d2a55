//! A mixture of attention experts with a router: [`Moe`].

mod config;
mod losses;
mod routing;

pub use config::{Gating, MoeConfig, Priority};
pub use routing::Routing;

use crate::attention::{Attention, Saved, check_output};
use crate::dropout::mix;
use crate::element::{sigmoid, softplus, try_zeros};
use crate::error::{Error, Result, check_shape};
use crate::gradients::{GradientsMut, param_slot};
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::params::{self, Params, prefixed};
use ndarray::{
    Array1, Array2, ArrayView1, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD, Zip, s,
};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use rand_distr::{Distribution, StandardNormal};
use routing::Served;
use std::mem::take;

const NAME: &str = "moe";

/// A mixture of attention experts of any kind, in which each query is sent to only a few experts (Shazeer
/// et al. 2017, 1701.06538; Fedus et al. 2021, 2101.03961; Jiang et al. 2024, 2401.04088; DeepSeek-AI
/// 2024, 2412.19437).
///
/// ```text
/// z_i = W q_i + b [+ ε_i ⊙ softplus(W_noise q_i)]    ε standard normal
/// g_i = softmax(z_i)           or σ(z_i)             (MoeConfig::gating)
/// T_i = the k experts with the largest g_ie + c_e; ties: the larger z_ie, then the lower number
/// w_ie = g_ie / Σ_{T_i} g_ie   or g_ie itself        (MoeConfig::renormalize)
/// o_i = Σ_{e ∈ T_i} w_ie Expert_e(i)                 except for queries that a full expert drops
/// ```
///
/// * **Reads** whole rows of queries, all heads together, for the router. Each expert gets the keys,
///   values, heads and all channels for the pairs of its own queries ([`Inputs::select_queries`]).
///   Experts that make their own heads refuse inputs with heads.
/// * **Output** as many columns as every expert returns. The output for a query without visible keys
///   depends on the experts: zeros, or their biases.
/// * **Sparse execution**: queries are grouped, and each expert runs once on its own queries, one expert
///   after the other. An expert that no query chose does not run and does not check its inputs.
/// * **Choice** If the biases of two experts are equal, the logits themselves are compared, however small
///   or close to 1 their gates are. An expert whose logit is −∞ is chosen after all others, whatever its
///   bias, with the weight 0. A query whose logits are NaN, all −∞ or, with softmax, +∞ goes to the first
///   k experts, and its row becomes NaN.
/// * **Order of the queries** Choices, weights and outputs of a query do not depend on other queries
///   (noise and dropout are drawn by its number), except with a capacity ([`MoeConfig::capacity`],
///   [`MoeConfig::capacity_factor`]): outputs then depend on the other queries, and on their order as
///   described at [`Priority`].
/// * **Parameters** `router.weight` (N × `query_dim`), `router.bias` (N), with [`MoeConfig::noise`]
///   `router.noise_weight` (N × `query_dim`), and the experts' parameters with the prefixes `experts.0.`,
///   `experts.1.`, …. The gradient treats the choice as constant, although the function jumps where the
///   choice changes; [`Routing`] has losses that keep all experts in use.
/// * **Buffers** `router.expert_bias` (N), the c above, and the experts' buffers. The bias only affects
///   the choice. It is not trained but adjusted against the load
///   ([`update_expert_bias`](Self::update_expert_bias), Wang et al. 2024, 2408.15664).
/// * **Cost** the experts, each on a share k/N of the queries on average, plus O(n · N · (`query_dim` +
///   k)) for the router, and copies of k · n rows of queries, outputs and pair data. An expert that
///   projects its keys projects all of them even for few queries. Training stores the experts' outputs.
/// * **Errors** [`Error::Shape`] if queries do not have `query_dim` columns, or experts return different
///   numbers of columns. Errors of an expert name it: `expert 2 (edge_gat)`.
///
/// Dropout is numbered by the pairs of the whole inputs, so identical experts drop the same pairs.
///
/// ```
/// use graph_attention::ndarray::Array2;
/// use graph_attention::{Attention, Flash, Inputs, MoeConfig, MultiHeadConfig, ScaledDotProduct};
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
///
/// let mut rng = Xoshiro256PlusPlus::seed_from_u64(5);
/// let experts: Vec<Box<dyn Attention<f32>>> = vec![
///     Box::new(Flash::new()),
///     Box::new(ScaledDotProduct::new().with_scale(0.1)?),
///     Box::new(MultiHeadConfig::new(6, 2).init(Flash::new(), &mut rng)?),
/// ];
/// let moe = MoeConfig::new(6, 2).init(experts, &mut rng)?;
/// let x = Array2::from_shape_fn((5, 6), |(i, j)| ((7 * i + 3 * j) % 5) as f32 - 2.0);
/// let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
/// assert_eq!(moe.forward(&inputs)?.dim(), (5, 6));
///
/// let routing = moe.route(&inputs)?;
/// assert_eq!(routing.experts().dim(), (5, 2));
/// assert_eq!(routing.shares().iter().sum::<f64>(), 1.0);
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Debug)]
pub struct Moe<F: Float> {
    config: MoeConfig,
    /// W, experts × query_dim.
    weight: Array2<F>,
    bias: Array1<F>,
    /// W_noise, experts × query_dim.
    noise_weight: Option<Array2<F>>,
    noise_seed: Option<u64>,
    /// c.
    expert_bias: Array1<F>,
    experts: Vec<Box<dyn Attention<F>>>,
}

struct State<F> {
    routing: Routing<F>,
    /// The output and the state of each expert that ran, in the order of the experts.
    experts: Vec<(Array2<F>, Saved)>,
}

impl<F: Float> Moe<F> {
    /// Returns the configuration.
    #[must_use]
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// Returns the experts.
    #[must_use]
    pub fn experts(&self) -> &[Box<dyn Attention<F>>] {
        &self.experts
    }

    /// Switches the noise of the router on, with a seed, or off, with `None`. Use it only for training,
    /// with a new seed in every step. The noise comes from a separate generator for each (seed, query
    /// number), so a seed always gives the same result, forward and backward.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is a seed but the configuration has no noise
    /// ([`MoeConfig::noise`]).
    pub fn set_noise(&mut self, seed: Option<u64>) -> Result<()> {
        if seed.is_some() && self.noise_weight.is_none() {
            let actual = "a configuration without noise";
            return Err(Error::config("noise", "`MoeConfig::noise(true)`", actual));
        }
        self.noise_seed = seed;
        Ok(())
    }

    /// Returns the bias that is added to the gate of each expert when experts are chosen, initially
    /// zeros.
    #[must_use]
    pub fn expert_bias(&self) -> ArrayView1<'_, F> {
        self.expert_bias.view()
    }

    /// Sets the expert bias.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is not one number per expert, [`Error::InvalidArgument`] if a number is
    /// not finite.
    pub fn set_expert_bias(&mut self, bias: Array1<F>) -> Result<()> {
        check_expert_bias(self.experts.len(), bias.view())?;
        self.expert_bias = bias;
        Ok(())
    }

    /// Balances the experts without a loss (Wang et al. 2024, 2408.15664): raises the bias of experts
    /// chosen by fewer queries than the mean by `step`, and lowers the bias of the others by `step`. (The
    /// paper uses 0.001.)
    ///
    /// # Errors
    /// [`Error::Shape`] if the routing has a different number of experts, [`Error::InvalidArgument`] if
    /// `step` or the new bias is not finite.
    pub fn update_expert_bias(&mut self, routing: &Routing<F>, step: f64) -> Result<()> {
        let choices = routing.choices();
        check_shape("routing", &[self.experts.len()], &[choices.len()])?;
        if !step.is_finite() {
            return Err(Error::config("step", "a finite number", step));
        }
        let (total, count) = (routing.experts().len(), choices.len());
        let mut bias = self.expert_bias.clone();
        for (bias, choices) in bias.iter_mut().zip(choices) {
            // Compare the load with the mean load in integers.
            *bias += match (choices * count).cmp(&total) {
                std::cmp::Ordering::Less => F::from_f64(step),
                std::cmp::Ordering::Equal => F::zero(),
                std::cmp::Ordering::Greater => -F::from_f64(step),
            };
        }
        self.set_expert_bias(bias)
    }

    /// Computes the routing of the queries without running an expert.
    ///
    /// # Errors
    /// [`Error::Shape`] if queries do not have `query_dim` columns, [`Error::TooLarge`].
    pub fn route(&self, inputs: &Inputs<'_, F>) -> Result<Routing<F>> {
        let query = inputs.query();
        check_shape("query", &[query.nrows(), self.config.query_dim], query.shape())?;
        let mut logits = F::linear(query, self.weight.view(), Some(self.bias.view()))?;
        let mut slopes = None;
        if let (Some(weight), Some(seed)) = (&self.noise_weight, self.noise_seed) {
            let mut raw = F::linear(query, weight.view(), None)?;
            for (row, (mut z, mut u)) in
                logits.rows_mut().into_iter().zip(raw.rows_mut()).enumerate()
            {
                let hash = mix(mix(seed) ^ inputs.query_number(row) as u64);
                let mut rng = Xoshiro256PlusPlus::seed_from_u64(hash);
                Zip::from(&mut z).and(&mut u).for_each(|z, u| {
                    let noise: f64 = StandardNormal.sample(&mut rng);
                    // z += ε softplus(u), dz/du = ε σ(u)
                    *z += F::from_f64(noise) * softplus(*u);
                    *u = F::from_f64(noise) * sigmoid(*u);
                });
            }
            slopes = Some(raw);
        }
        Routing::new(&self.config, logits, slopes, self.expert_bias.view())
    }

    /// Returns the routing of a forward pass.
    ///
    /// # Errors
    /// [`Error::SavedMismatch`] if `saved` is from another mechanism.
    pub fn routing<'s>(&self, saved: &'s Saved) -> Result<&'s Routing<F>> {
        Ok(&saved.state::<State<F>>(NAME)?.routing)
    }

    /// Propagates a gradient with respect to the router's logits to the router's parameters and the
    /// queries, and adds it to `grads`. Use it to train with the losses of [`Routing`].
    ///
    /// ```
    /// use graph_attention::ndarray::Array2;
    /// use graph_attention::{Attention, Flash, Inputs, MoeConfig, MultiHeadConfig, params};
    /// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
    ///
    /// let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
    /// let mut expert = || MultiHeadConfig::new(4, 2).init(Flash::new(), &mut rng);
    /// let experts: Vec<Box<dyn Attention<f64>>> =
    ///     vec![Box::new(expert()?), Box::new(expert()?), Box::new(expert()?)];
    /// let mut moe = MoeConfig::new(4, 1).renormalize(false).init(experts, &mut rng)?;
    /// let x = Array2::from_shape_fn((7, 4), |(i, j)| ((5 * i + 3 * j) % 7) as f64 / 3.0 - 1.0);
    /// let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
    /// let loss = |out: &Array2<f64>, balance| out.mapv(|y| y * y).sum() / 2.0 + 0.1 * balance;
    ///
    /// // One step of training on |out|² / 2 + 0.1 · balance.
    /// let (out, saved) = moe.forward_train(&inputs)?;
    /// let mut grads = moe.backward(&inputs, &saved, out.view())?;
    /// let routing = moe.routing(&saved)?;
    /// let (balance, grad_logits) = routing.switch_load_balance()?;
    /// moe.router_backward(&inputs, routing, (0.1 * grad_logits).view(), grads.view_mut())?;
    /// params::update(&mut moe, &grads.params, |_, mut param, grad| {
    ///     param.scaled_add(-0.01, &grad);
    /// })?;
    ///
    /// let new_balance = moe.route(&inputs)?.switch_load_balance()?.0;
    /// assert!(loss(&moe.forward(&inputs)?, new_balance) < loss(&out, balance));
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] if an array or the routing does not fit the inputs and the experts.
    pub fn router_backward(
        &self,
        inputs: &Inputs<'_, F>,
        routing: &Routing<F>,
        grad_logits: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        grads.check(NAME, inputs, self)?;
        let shape = [inputs.num_queries(), self.experts.len()];
        check_shape("query", &[shape[0], self.config.query_dim], inputs.query().shape())?;
        check_shape("routing", &shape, routing.logits.shape())?;
        check_shape("grad_logits", &shape, grad_logits.shape())?;
        let (params, query) = (&mut *grads.params, inputs.query());
        // z = W q + b
        let [weight, bias, noise @ ..] = params else { return Ok(()) };
        F::linear_params_vjp(query, grad_logits, param_slot(weight), Some(param_slot(bias)))?;
        if let Some(grad_query) = &mut grads.query {
            F::linear_input_vjp(self.weight.view(), grad_logits, grad_query.view_mut())?;
        }
        // z += ε softplus(u), u = W_noise q
        if let (Some(noise_weight), Some(slopes)) = (&self.noise_weight, &routing.noise_slopes) {
            let grad_raw = slopes * &grad_logits;
            F::linear_params_vjp(query, grad_raw.view(), param_slot(&mut noise[0]), None)?;
            if let Some(grad_query) = grads.query {
                F::linear_input_vjp(noise_weight.view(), grad_raw.view(), grad_query)?;
            }
        }
        Ok(())
    }

    /// Iterates over the experts that have queries, with their numbers.
    fn busy<'s>(
        &'s self,
        routing: &'s Routing<F>,
    ) -> impl Iterator<Item = (usize, &'s dyn Attention<F>, &'s Served)> {
        let experts = self.experts.iter().zip(&routing.served).enumerate();
        let experts = experts.map(|(number, (expert, served))| (number, &**expert, served));
        experts.filter(|(.., served)| !served.queries.is_empty())
    }

    /// Refuses experts whose outputs cannot be added.
    fn check_experts(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        let first = &self.experts[0];
        for (number, expert) in self.experts.iter().enumerate() {
            let what = || {
                let (name, first) = (expert.name(), first.name());
                format!(
                    "output columns of expert {number} ({name}), which must match expert 0 ({first})"
                )
            };
            let columns = [first, expert].map(|expert| expert.output_dim(inputs));
            if columns[0] != columns[1] {
                return Err(Error::shape(what(), &columns[..1], &columns[1..]));
            }
        }
        Ok(())
    }

    /// Overwrites `out`. `ask` runs an expert and passes its outputs to a closure that adds them.
    fn run(
        &self,
        inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
        mut ask: impl FnMut(
            &dyn Attention<F>,
            &Inputs<'_, F>,
            &mut dyn FnMut(ArrayView2<'_, F>),
        ) -> Result<()>,
    ) -> Result<Routing<F>> {
        check_output(self, "out", inputs, out.shape())?;
        self.check_experts(inputs)?;
        let routing = self.route(inputs)?;
        out.fill(F::zero());
        for (number, expert, served) in self.busy(&routing) {
            let mut add = |answers: ArrayView2<'_, F>| {
                let rows = routing.weights_of(served).zip(answers.rows());
                for (at, ((query, weight), answer)) in rows.enumerate() {
                    served.ask_ahead(at, out.view());
                    out.row_mut(query).scaled_add(weight, &answer);
                }
            };
            let selected = inputs.select_queries(&served.queries)?;
            ask(expert, &selected.inputs(), &mut add)
                .map_err(|error| in_expert(error, number, expert, served))?;
        }
        Ok(routing)
    }
}

impl<F: Float> Params<F> for Moe<F> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        visitor("router.weight", self.weight.view().into_dyn());
        visitor("router.bias", self.bias.view().into_dyn());
        if let Some(weight) = &self.noise_weight {
            visitor("router.noise_weight", weight.view().into_dyn());
        }
        for (number, expert) in self.experts.iter().enumerate() {
            expert.visit_params(&mut prefixed(format_args!("experts.{number}"), visitor));
        }
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        visitor("router.weight", self.weight.view_mut().into_dyn());
        visitor("router.bias", self.bias.view_mut().into_dyn());
        if let Some(weight) = &mut self.noise_weight {
            visitor("router.noise_weight", weight.view_mut().into_dyn());
        }
        for (number, expert) in self.experts.iter_mut().enumerate() {
            expert.visit_params_mut(&mut prefixed(format_args!("experts.{number}"), visitor));
        }
    }

    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        visitor("router.expert_bias", self.expert_bias.view().into_dyn());
        for (number, expert) in self.experts.iter().enumerate() {
            expert.visit_buffers(&mut prefixed(format_args!("experts.{number}"), visitor));
        }
    }

    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        visitor("router.expert_bias", self.expert_bias.view_mut().into_dyn());
        for (number, expert) in self.experts.iter_mut().enumerate() {
            expert.visit_buffers_mut(&mut prefixed(format_args!("experts.{number}"), visitor));
        }
    }
}

impl<F: Float> Attention<F> for Moe<F> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, inputs: &Inputs<'_, F>) -> usize {
        self.experts[0].output_dim(inputs)
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        // The outputs of one expert at a time.
        let mut answers = Array2::zeros((0, 0));
        let columns = out.ncols();
        self.run(inputs, out, |expert, inputs, add| {
            let len = inputs.num_queries();
            if answers.nrows() < len {
                answers = try_zeros("answers", len, columns)?;
            }
            let mut answers = answers.slice_mut(s![..len, ..]);
            expert.forward_into(inputs, answers.view_mut())?;
            add(answers.view());
            Ok(())
        })
        .map(drop)
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        let mut experts = Vec::new();
        let routing = self.run(inputs, out, |expert, inputs, add| {
            let (answers, saved) = expert.forward_train(inputs)?;
            add(answers.view());
            experts.push((answers, saved));
            Ok(())
        })?;
        Ok(Saved::new(NAME, State { routing, experts }))
    }

    fn backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let State { routing, experts } = saved.state::<State<F>>(NAME)?;
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        grads.check(NAME, inputs, self)?;
        let shape = [inputs.num_queries(), self.experts.len()];
        check_shape("saved routing", &shape, routing.logits.shape())?;

        // o_i = Σ w_ie y_ie
        let mut grad_weights = try_zeros("grad_weights", shape[0], routing.experts.ncols())?;
        let num_router = 2 + usize::from(self.noise_weight.is_some());
        let counts: Vec<usize> = self.experts.iter().map(|expert| params::count(expert)).collect();
        for ((number, expert, served), (answer, saved)) in self.busy(routing).zip(experts) {
            check_shape(
                "saved answers",
                &[served.queries.len(), grad_out.ncols()],
                answer.shape(),
            )?;
            let mut grad_answer = try_zeros("grad_answer", answer.nrows(), answer.ncols())?;
            let rows = routing.weights_of(served).zip(&served.ranks).zip(answer.rows());
            for (at, ((((query, weight), &rank), answer), mut grad)) in
                rows.zip(grad_answer.rows_mut()).enumerate()
            {
                served.ask_ahead(at, grad_out);
                grad.scaled_add(weight, &grad_out.row(query));
                grad_weights[[query, rank]] = grad_out.row(query).dot(&answer);
            }
            let first = num_router + counts[..number].iter().sum::<usize>();
            let mut grads = grads.reborrow();
            grads.params = &mut take(&mut grads.params)[first..first + counts[number]];
            inputs.select_queries(&served.queries)?.backward(grads, |inputs, grads| {
                expert
                    .backward_into(inputs, saved, grad_answer.view(), grads)
                    .map_err(|error| in_expert(error, number, expert, served))
            })?;
        }
        let grad_logits = routing.weights_vjp(grad_weights.view())?;
        self.router_backward(inputs, routing, grad_logits.view(), grads)
    }
}

fn in_expert<F: Float>(
    error: Error,
    number: usize,
    expert: &dyn Attention<F>,
    served: &Served,
) -> Error {
    error.in_part(format_args!("expert {number}"), expert.name(), Some(&served.queries))
}

/// Checks that there is one finite bias per expert.
fn check_expert_bias<F: Float>(num_experts: usize, bias: ArrayView1<'_, F>) -> Result<()> {
    check_shape("expert_bias", &[num_experts], bias.shape())?;
    match bias.iter().find(|number| !number.is_finite()) {
        Some(number) => Err(Error::config("expert_bias", "finite numbers", number)),
        None => Ok(()),
    }
}
