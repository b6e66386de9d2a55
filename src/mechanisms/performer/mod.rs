//! Linear attention with random features: [`Performer`].

mod config;
mod error_estimate;
mod map;
mod pairs;
mod rest;
mod state;

pub use config::{Features, PerformerConfig, Projection};
pub use error_estimate::ErrorEstimate;
pub use state::{PerformerState, StateGradient};

use crate::attention::{Attention, Saved, check_output};
use crate::element::{all_finite, try_zeros};
use crate::error::{Channel, Error, Result, check_shape};
use crate::gradients::{GradientsMut, param_slot};
use crate::inputs::{Inputs, head_columns};
use crate::kernels::Float;
use crate::kernels::level::level;
use crate::kernels::performer::{FeatureGradients, FeatureProblem, FeatureUpstream, KeySums};
use crate::kernels::problem::output_dim;
use crate::mechanisms::packed;
use crate::params::Params;
use map::FeatureMap;
use ndarray::{Array2, ArrayD, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD, Ix2, s};
use pairs::{Pairs, RowSums, Upstream as PairUpstream, all_rows, least_sum};
use rand::Rng;

const NAME: &str = "performer";

/// Linear attention with random features (Choromanski et al. 2021, 2009.14794; Likhosherstov et al.
/// 2022, 2205.15317; Katharopoulos et al. 2020, 2006.16236): softmax attention with the exponential
/// replaced by a dot product of m features, so the sums over keys are computed once for all queries.
///
/// ```text
/// e^{scale·q·k} ≈ φ(q)·φ(k)      φ(x) = m^{−½} e^{√scale w·x − scale |x|²/2}   for m rows w; others: see Features
/// S = Σⱼ φ(kⱼ) vⱼᵀ    z = Σⱼ φ(kⱼ)     oᵢ = φ(qᵢ)ᵀ S / φ(qᵢ)ᵀ z
/// ```
///
/// The estimates of numerator and denominator are unbiased, and the error decreases like m^{−½}, but
/// grows like e^{scale |q + k|²/2}. [`relative_variance`](Self::relative_variance) predicts the error,
/// and [`estimate_error`](Self::estimate_error) measures it on given inputs. [`PerformerState`] holds S
/// and z, and lets you add and remove keys.
///
/// * **Reads** query (n_q × heads·d), key (n_k × kv_heads·d), value (n_k × kv_heads·d_v; d_v may
///   differ from d); mask, causal, bias, dropout, weights of pairs; dense inputs and graphs. All heads
///   share one projection.
/// * **Output** n_q × heads·d_v. A query without visible keys gets zeros.
/// * **Buffers** `projection_matrix`, projections × d: saved and loaded but not trained, so that features
///   remain estimates of a softmax. [`redraw`](Self::redraw) it from time to time.
/// * **Parameters** none, or `projection_matrix` with its exact gradient instead of the buffer:
///   [`PerformerConfig::learn_projection`].
/// * **Cost** O(n m (d + d_v)) time, and besides the output O(m d_v) memory per head and one number per
///   key and query, for dense inputs in which all queries see the same keys, or with the causal pattern
///   (prefix sums; one task per head of keys). A mask with the same row for all queries, such as a
///   padding mask, leaves keys out of both sums.
/// * **Pair by pair**, in O(pairs · (m + d_v) + n m) on one thread: graphs, masks that differ between
///   queries, biases, dropout, weights of pairs,
///   [`attention_weights`](Attention::attention_weights). Exact attention is
///   faster then.
/// * **Errors** [`Error::Shape`] if heads do not have `head_dim` columns; [`Error::NoWeights`] from
///   `attention_weights` with trigonometric features, whose weights may be negative.
///
/// # Numerics
///
/// There is no ε in the denominator. Exponents of keys are relative to the largest exponent of each
/// feature, and exponents of a query are relative to its largest sum with these. Both cancel, also in the
/// gradients, and the denominator is at least 1 (at least ε² for [`Features::Relu`]; any number for
/// [`Features::Trigonometric`]). With the causal pattern the largest exponents are running maxima. If the
/// denominator of a row underflows, because later keys in its block of 128 are much larger, the row is
/// summed pair by pair.
///
/// Differences from the paper and its code: no ε is added to positive features, and the maximum is taken
/// per feature instead of over all keys. For the same projection the outputs are the same except for
/// rounding.
///
/// ```
/// use graph_attention::{Attention, Flash, Inputs, PerformerConfig};
/// use graph_attention::ndarray::Array2;
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
///
/// let mut rng = Xoshiro256PlusPlus::seed_from_u64(7);
/// let performer = PerformerConfig::new(4, 512).init::<f64>(&mut rng)?;
/// let x = Array2::from_shape_fn((50, 4), |(i, j)| ((i * 7 + j * 3) as f64).sin());
/// let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
///
/// assert!(performer.relative_variance(x.row(0), x.row(1))?.sqrt() < 0.1);
/// let (out, saved) = performer.forward_train(&inputs)?;
/// let error = (&out - &Flash::new().forward(&inputs)?).mapv(f64::abs);
/// assert!(error.iter().all(|&error| error < 0.1));
/// let grads = performer.backward(&inputs, &saved, out.view())?;
/// assert_eq!(grads.key.dim(), (50, 4));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Performer<F> {
    config: PerformerConfig,
    map: FeatureMap<F>,
}

/// How inputs are processed.
enum Path {
    /// No query sees a key.
    Nothing,
    /// All queries see these keys.
    Sums(Vec<usize>),
    /// Each query sees these keys, which no mask hides, up to the diagonal.
    Causal(Vec<usize>),
    Pairs,
}

struct State<F> {
    out: Array2<F>,
    num_keys: usize,
    attended: Attended<F>,
}

/// The state saved by a forward pass.
enum Attended<F> {
    Nothing,
    Sums { keys: Vec<usize>, sums: Vec<KeySums<F>>, denominators: Array2<F> },
    Causal { keys: Vec<usize>, rows: CausalRows, sums: RowSums<F> },
    Pairs(RowSums<F>),
}

impl<F: Float> Attended<F> {
    /// Checks that the state is from inputs with the same heads and a map with `num_features` features.
    fn check(&self, inputs: &Inputs<'_, F>, num_features: usize) -> Result<()> {
        let denominators = match self {
            Self::Nothing => return Ok(()),
            Self::Sums { sums, denominators, .. } => {
                let features = sums.first().map_or(0, |sums| sums.totals.len());
                let expected = [inputs.num_kv_heads(), num_features];
                check_shape("saved sums", &expected, &[sums.len(), features])?;
                denominators
            }
            Self::Causal { rows, sums, .. } => {
                check_shape("saved heads", &[inputs.num_kv_heads()], &[rows.num_finite.len()])?;
                &sums.denominators
            }
            Self::Pairs(sums) => &sums.denominators,
        };
        let expected = [inputs.num_queries(), inputs.num_heads()];
        check_shape("saved denominators", &expected, denominators.shape())
    }
}

/// How the rows of a causal pattern are summed.
struct CausalRows {
    /// For each head of keys, the number of queries before the first that sees a key or value that is not
    /// finite.
    num_finite: Vec<usize>,
    /// The rows (query and head) that underflowed.
    underflown: Vec<(usize, usize)>,
}

impl<F: Float> Performer<F> {
    /// Returns the configuration.
    #[must_use]
    pub fn config(&self) -> &PerformerConfig {
        &self.config
    }

    /// Draws a new projection of the same kind, in place. Use it from time to time in training, so that
    /// the model does not overfit to one projection.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn redraw(&mut self, rng: &mut impl Rng) -> Result<()> {
        self.map = FeatureMap::draw(&self.config, rng)?;
        Ok(())
    }

    /// Computes φ of each row of `x` (n × head_dim), n × num_features, as in the papers: φ(q)·φ(k)
    /// estimates e^{scale·q·k}. It overflows if that does; the mechanism itself works with exponents.
    ///
    /// # Errors
    /// [`Error::Shape`] for a different number of columns; [`Error::TooLarge`].
    pub fn feature_map(&self, x: ArrayView2<'_, F>) -> Result<Array2<F>> {
        self.map.apply(x)
    }

    fn path(&self, inputs: &Inputs<'_, F>) -> Path {
        if inputs.num_queries() == 0 || inputs.value().ncols() == 0 {
            return Path::Nothing;
        }
        let of_pairs = [Channel::Bias, Channel::Dropout, Channel::PairWeights];
        let reads_pairs = of_pairs.into_iter().any(|channel| inputs.has(channel));
        let keys = inputs.keys_in_mask().filter(|_| inputs.is_dense() && !reads_pairs);
        let Some(keys) = keys else { return Path::Pairs };
        match inputs.causal_alignment() {
            _ if keys.is_empty() => Path::Nothing,
            // The next token sees all keys that are selected for it.
            Some(_) if keys.last().is_some_and(|&last| last < inputs.num_visible_keys(0)) => {
                Path::Sums(keys)
            }
            None => Path::Sums(keys),
            Some(_) => Path::Causal(keys),
        }
    }

    fn run(&self, inputs: &Inputs<'_, F>, mut out: ArrayViewMut2<'_, F>) -> Result<Attended<F>> {
        check_output(self, "out", inputs, out.shape())?;
        self.map.check(inputs)?;
        let level = level();
        match self.path(inputs) {
            Path::Nothing => {
                out.fill(F::zero());
                Ok(Attended::Nothing)
            }
            Path::Sums(keys) => {
                let problem = self.map.problem(inputs, keys)?;
                let sums = F::sum_keys(&problem, level);
                let mut denominators =
                    try_zeros("denominators", inputs.num_queries(), inputs.num_heads())?;
                F::features_forward(&problem, &sums, level, out, &mut denominators);
                Ok(Attended::Sums { keys: problem.keys, sums, denominators })
            }
            Path::Causal(keys) => {
                let problem = self.map.problem(inputs, keys)?;
                let mut sums = RowSums::new(inputs)?;
                let num_finite = num_finite(&problem);
                let denominators = &mut sums.denominators;
                F::causal_features_forward(
                    &problem,
                    &num_finite,
                    level,
                    out.view_mut(),
                    denominators,
                );
                let underflown = repair(&problem, &num_finite, &mut out, denominators);
                if !underflown.is_empty() {
                    let pairs = Pairs::new(&self.map, inputs)?;
                    pairs.forward(underflown.iter().copied(), &mut out, &mut sums);
                }
                let rows = CausalRows { num_finite, underflown };
                Ok(Attended::Causal { keys: problem.keys, rows, sums })
            }
            Path::Pairs => {
                let mut sums = RowSums::new(inputs)?;
                Pairs::new(&self.map, inputs)?.forward(all_rows(inputs), &mut out, &mut sums);
                Ok(Attended::Pairs(sums))
            }
        }
    }
}

/// Returns, for each head of keys, the number of queries before the first that sees a key or value that
/// is not finite.
fn num_finite<F: Float>(problem: &FeatureProblem<'_, F>) -> Vec<usize> {
    let num_queries = problem.inputs.num_queries();
    let of_head = |kv_head| {
        let is_bad = |&key: &usize| {
            !all_finite(problem.key(key, kv_head)) || !all_finite(problem.value(key, kv_head))
        };
        let first = problem.keys.iter().copied().find(is_bad);
        first.map_or(num_queries, |key| problem.inputs.first_query_seeing(key).min(num_queries))
    };
    (0..problem.kv_heads).map(of_head).collect()
}

/// Writes zeros to the rows that see no key and NaN to those that see one that is not finite; returns the
/// rows that underflowed.
fn repair<F: Float>(
    problem: &FeatureProblem<'_, F>,
    num_finite: &[usize],
    out: &mut ArrayViewMut2<'_, F>,
    denominators: &mut Array2<F>,
) -> Vec<(usize, usize)> {
    let mut underflown = Vec::new();
    for (query, head) in all_rows(&problem.inputs) {
        let denominator = &mut denominators[[query, head]];
        let mut fill = |value| {
            out.slice_mut(s![query, head_columns(head, problem.value_dim)]).fill(value);
        };
        if query >= num_finite[problem.kv_head(head)] {
            *denominator = F::nan();
            fill(F::nan());
        } else if problem.num_seen(query) == 0 {
            fill(F::zero());
        } else if denominator.abs() < least_sum() {
            underflown.push((query, head));
        }
    }
    underflown
}

impl<F: Float> Params<F> for Performer<F> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        if self.config.learn_projection {
            self.map.visit(visitor);
        }
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        if self.config.learn_projection {
            self.map.visit_mut(visitor);
        }
    }

    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        if !self.config.learn_projection {
            self.map.visit(visitor);
        }
    }

    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        if !self.config.learn_projection {
            self.map.visit_mut(visitor);
        }
    }
}

impl<F: Float> Attention<F> for Performer<F> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, inputs: &Inputs<'_, F>) -> usize {
        output_dim(inputs)
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        if let Some(segments) = inputs.packed_segments() {
            return packed::forward(self, inputs, segments, out);
        }
        if let Some(seen) = inputs.select_seen_keys(&[])? {
            return self.forward_into(&seen.inputs(), out);
        }
        self.run(inputs, out).map(drop)
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        if let Some(segments) = inputs.packed_segments() {
            return packed::forward_train(self, inputs, segments, out);
        }
        if let Some(seen) = inputs.select_seen_keys(&[])? {
            return self.forward_train_into(&seen.inputs(), out);
        }
        let attended = self.run(inputs, out.view_mut())?;
        let mut copy = try_zeros("saved output", out.nrows(), out.ncols())?;
        copy.assign(&out);
        Ok(Saved::new(NAME, State { out: copy, num_keys: inputs.num_keys(), attended }))
    }

    fn backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        if let Some(segments) = inputs.packed_segments() {
            return packed::backward(self, inputs, segments, saved, grad_out, grads);
        }
        if let Some(seen) = inputs.select_seen_keys(&[])? {
            grads.check(NAME, inputs, self)?;
            return seen.backward_of_read(grads, |inputs, grads| {
                self.backward_into(inputs, saved, grad_out, grads)
            });
        }
        let State { out, num_keys, attended }: &State<F> = saved.state(NAME)?;
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        check_output(self, "saved output", inputs, out.shape())?;
        check_shape("saved keys", &[inputs.num_keys()], &[*num_keys])?;
        attended.check(inputs, self.config.num_features)?;
        self.map.check(inputs)?;
        grads.check(NAME, inputs, self)?;
        let mut grad_weight = zeros_for_projection(grads.params)?;
        let level = level();
        let wants_projection = grad_weight.is_some();
        let problem = |keys: &Vec<usize>| -> Result<_> {
            let problem = self.map.problem(inputs, keys.clone())?;
            Ok(FeatureProblem { wants_projection, ..problem })
        };
        match attended {
            Attended::Nothing => return Ok(()),
            Attended::Sums { keys, sums, denominators } => {
                let problem = problem(keys)?;
                let upstream = FeatureUpstream { out: out.view(), denominators, grad_out };
                let of_features = F::features_backward(&problem, sums, &upstream, level)?;
                add(&of_features, keys, &mut grads, &mut grad_weight);
            }
            Attended::Causal { keys, rows, sums } => {
                let problem = problem(keys)?;
                let denominators = &sums.denominators;
                let upstream = FeatureUpstream { out: out.view(), denominators, grad_out };
                let num_finite = &rows.num_finite;
                let is_summed = |query: usize, head: usize| {
                    let denominator = denominators[[query, head]];
                    denominator.is_finite()
                        && denominator != F::zero()
                        && rows.underflown.binary_search(&(query, head)).is_err()
                };
                let mut of_features = F::causal_features_backward(
                    &problem, num_finite, &upstream, &is_summed, level,
                )?;
                spread_nan(&problem, denominators, &mut of_features);
                add(&of_features, keys, &mut grads, &mut grad_weight);
                if !rows.underflown.is_empty() {
                    let underflown = rows.underflown.iter().copied();
                    let pairs = Pairs::new(&self.map, inputs)?;
                    let upstream = PairUpstream::Out { out: out.view(), sums, grad_out };
                    pairs.backward(underflown, upstream, &mut grads, &mut grad_weight)?;
                }
            }
            Attended::Pairs(sums) => {
                let pairs = Pairs::new(&self.map, inputs)?;
                let upstream = PairUpstream::Out { out: out.view(), sums, grad_out };
                pairs.backward(all_rows(inputs), upstream, &mut grads, &mut grad_weight)?;
            }
        }
        self.projection_vjp(grad_weight, grads.params);
        Ok(())
    }

    fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        self.map.check(inputs)?;
        if self.config.features == Features::Trigonometric {
            return Err(Error::NoWeights { mechanism: NAME });
        }
        Pairs::new(&self.map, inputs)?.weights()
    }

    fn attention_weights_backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        self.map.check(inputs)?;
        if self.config.features == Features::Trigonometric {
            return Err(Error::NoWeights { mechanism: NAME });
        }
        grads.check(NAME, inputs, self)?;
        let shape = [inputs.num_pairs(), inputs.num_heads()];
        check_shape("grad_weights", &shape, grad_weights.shape())?;
        let mut grad_projection = zeros_for_projection(grads.params)?;
        let upstream = PairUpstream::Weights(grad_weights);
        let pairs = Pairs::new(&self.map, inputs)?;
        pairs.backward(all_rows(inputs), upstream, &mut grads, &mut grad_projection)?;
        self.projection_vjp(grad_projection, grads.params);
        Ok(())
    }
}

impl<F: Float> Performer<F> {
    /// Adds the gradient of the projection, if it is a parameter, given that of the kernels' weight.
    fn projection_vjp(&self, grad_weight: Option<Array2<F>>, params: &mut [ArrayD<F>]) {
        if let (Some(slot), Some(grad_weight)) = (params.first_mut(), grad_weight) {
            let factor = F::from_f64(self.map.weight_factor());
            param_slot::<F, Ix2>(slot).scaled_add(factor, &grad_weight);
        }
    }
}

/// Zeros for the gradient of the projection; `None` if it is a buffer.
fn zeros_for_projection<F: Float>(params: &[ArrayD<F>]) -> Result<Option<Array2<F>>> {
    let zeros = |param: &ArrayD<F>| try_zeros("projection", param.shape()[0], param.shape()[1]);
    params.first().map(zeros).transpose()
}

/// Adds the results of the kernels.
fn add<F: Float>(
    of_features: &FeatureGradients<F>,
    keys: &[usize],
    grads: &mut GradientsMut<'_, F>,
    grad_weight: &mut Option<Array2<F>>,
) {
    if let Some(grad) = &mut grads.query {
        *grad += &of_features.query;
    }
    for (grad, rows) in [(&mut grads.key, &of_features.key), (&mut grads.value, &of_features.value)]
    {
        if let Some(grad) = grad {
            keys.iter().zip(rows.rows()).for_each(|(&key, row)| {
                let mut grad = grad.row_mut(key);
                grad += &row;
            });
        }
    }
    if let Some(grad) = grad_weight {
        *grad += &of_features.projection;
    }
}

/// Writes NaN to the gradients of NaN rows of a causal pattern, of the keys that these see, and of the
/// projection.
fn spread_nan<F: Float>(
    problem: &FeatureProblem<'_, F>,
    denominators: &Array2<F>,
    grads: &mut FeatureGradients<F>,
) {
    for kv_head in 0..problem.kv_heads {
        let mut num_touched = 0;
        for (query, head) in all_rows(&problem.inputs) {
            if problem.kv_head(head) == kv_head && !denominators[[query, head]].is_finite() {
                num_touched = num_touched.max(problem.num_seen(query));
                let columns = head_columns(head, problem.dim);
                grads.query.slice_mut(s![query, columns]).fill(F::nan());
                grads.projection.fill(F::nan());
            }
        }
        let columns = head_columns(kv_head, problem.dim);
        grads.key.slice_mut(s![..num_touched, columns]).fill(F::nan());
        let columns = head_columns(kv_head, problem.value_dim);
        grads.value.slice_mut(s![..num_touched, columns]).fill(F::nan());
    }
}
