//! Attention in the Poincaré ball: [`Poincare`].

mod config;
mod deep;
mod hessian;
mod mean;
mod partial;
mod plain;
mod polar;
mod wide;

pub use config::{Aggregation, Coordinates, PoincareConfig};
pub use partial::PartialMean;

use crate::attention::{Attention, Saved, check_output};
use crate::element::{softplus, try_zeros};
use crate::error::{Channel, Error, Result, check_shape};
use crate::gradients::GradientsMut;
use crate::inputs::{Inputs, Pattern};
use crate::kernels::Float;
use crate::kernels::dense::FEW_QUERIES;
use crate::kernels::dense::TileSizes;
use crate::kernels::level::level;
use crate::kernels::normalizer::Normalizer;
use crate::kernels::poincare::{HyperbolicProblem, Mass, Points, Upstream};
use crate::kernels::problem::{Problem, Rows, output_dim};
use crate::mechanisms::packed;
use crate::params::Params;
use crate::softmax::Softmax;
use mean::Sums;
use ndarray::{Array0, Array2, ArrayD, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD};
use plain::Plain;
use polar::{DirectionFactor, Polar, Space};
use wide::Wide;

const NAME: &str = "poincare";

/// The sizes of tiles, as in [`Flash`](crate::Flash).
const TILES: TileSizes = TileSizes { queries: 96, keys: 96 };

/// Attention by distance in the Poincaré ball (Gulcehre et al. 2019, 1805.09786; Ganea et al. 2018,
/// 1805.09112; Shimizu et al. 2021, 2006.08210; Ungar 2009), which has room to embed trees.
///
/// ```text
/// d(x, y) = (2/√c) asinh(√c |x − y| / √((1 − c|x|²)(1 − c|y|²)))
/// pᵢⱼ = softmaxⱼ(−d(qᵢ, kⱼ)/τ + bᵢⱼ)          oᵢ = ½ ⊗ (Σⱼ pᵢⱼ λⱼ vⱼ / Σⱼ pᵢⱼ (λⱼ − 1)),   λⱼ = 2/(1 − c|vⱼ|²)
/// ```
///
/// with j over the visible pairs of query i, for each head: several heads are a product of balls. The
/// mean is the weighted gyromidpoint or another [`Aggregation`]. The underlying functions are public:
/// [`geometry::poincare`](crate::geometry::poincare).
///
/// * **Reads** query (n_q × heads·d), key (n_k × kv_heads·d), value (n_k × kv_heads·d_v; d_v may differ from
///   d, but not for [`Aggregation::TangentAtQuery`]); mask, causal, bias, dropout; dense inputs and graphs;
///   [weights of pairs](Inputs::with_pair_weights) are refused, because a mean has no meaning with weights
///   below 0. All are points of the ball, with norm less than 1/√c, or tangent vectors at its center:
///   [`Coordinates`].
/// * **Output** n_q × heads·d_v, in the same coordinates. A query without visible keys, or with all pairs
///   removed by dropout, gets the center, zeros.
/// * **Parameters** `raw_curvature` and `raw_temperature` if they are learned: c = log(1 + e^raw).
/// * **Cost** O(pairs · (d + d_v)) time per head, O(n · (d + d_v) · heads) memory. The weights are not
///   stored, except by means that are computed pair by pair and by
///   [`attention_weights`](Attention::attention_weights).
/// * **Errors** [`Error::Domain`] for a point on or outside the boundary, with its row (a key that no query
///   sees may not be checked); [`Error::Shape`] if the heads of queries and keys have different sizes. NaN and infinities are not
///   errors but give NaN.
/// * **Shards** [`PartialMean`] holds the sums over some of the keys, for midpoints and for means at the origin.
///
/// # Accuracy
///
/// Internally, a point is a direction u and a radius R = √c d(0, x), and distances are computed from
/// sinh²(√c d/2) = sinh²((Rᵢ − Rⱼ)/2) + sinh Rᵢ sinh Rⱼ |uᵢ − uⱼ|²/4, which has no cancellation:
/// |uᵢ − uⱼ|² is summed from differences, because computing it from norms and a product, with half the
/// instructions, would be wrong for close points. Distances, means and gradients are accurate to a few
/// tens of rounding units in the inputs, even near the boundary and far from the center; tangent
/// coordinates reach distances of 350/√c from the center, see [`Coordinates::Tangent`]. A mean farther
/// than about 2/√c from the center takes a second pass over its pairs, because the first pass loses
/// digits, and a mean farther than 8/√c is computed pair by pair on one thread. Only the gradient of c is
/// less accurate: it is a difference of terms as large as ⟨x, ∂L/∂x⟩/2c, and loses digits as c|x|² goes
/// to 0.
///
/// The distance has no derivative if query and key are the same point; 0 is used there.
///
/// Difference from the papers: Gulcehre et al. learn β and an offset in exp(−β d − γ); in a softmax only
/// β = 1/τ has an effect.
///
/// ```
/// use graph_attention::{Attention, Inputs, PoincareConfig};
/// use graph_attention::ndarray::array;
///
/// // Two leaves on one branch of a tree and one on another branch, at the same depth.
/// let leaves = array![[0.9, 0.1], [0.9, -0.1], [-0.9, 0.1]];
/// let inputs = Inputs::dense(leaves.view(), leaves.view(), leaves.view())?;
/// let attention = PoincareConfig::new().temperature(0.5).init::<f64>()?;
/// let weights = attention.attention_weights(&inputs)?; // pairs × heads
/// assert!(weights[[1, 0]] > 100.0 * weights[[2, 0]]);
///
/// let (out, saved) = attention.forward_train(&inputs)?;
/// assert!(out.row(0).dot(&out.row(0)) < 1.0); // outputs are points of the ball
/// let grads = attention.backward(&inputs, &saved, out.view())?;
/// assert_eq!(grads.query.dim(), (3, 2));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Poincare<F> {
    config: PoincareConfig,
    /// softplus⁻¹ of c and τ if they are learned.
    raw_curvature: Option<Array0<F>>,
    raw_temperature: Option<Array0<F>>,
}

/// The points of the inputs, in the form that both passes need.
struct Embedded<F> {
    space: Space,
    kappa: f64,
    query: Polar<F>,
    key: Polar<F>,
    value: Polar<F>,
    /// The terms of the sums over values.
    sums: Array2<F>,
}

struct State<F> {
    /// The configuration that made the state: it decides what the numbers mean.
    config: PoincareConfig,
    attended: Attended<F>,
}

/// The state saved by a forward pass.
enum Attended<F> {
    /// The weights of all pairs, for means that are computed pair by pair.
    Pairs(Softmax<F>),
    Sums(Sums<F>),
    /// The state of the same mechanism computed in `f64`.
    Wide(Saved),
}

impl<F: Float> Poincare<F> {
    /// Returns the configuration, which has the initial values of learned parameters.
    #[must_use]
    pub fn config(&self) -> &PoincareConfig {
        &self.config
    }

    /// Returns c, minus the curvature.
    #[must_use]
    pub fn curvature(&self) -> f64 {
        value_of(&self.raw_curvature, self.config.curvature)
    }

    /// Returns the temperature τ, which divides the distances.
    #[must_use]
    pub fn temperature(&self) -> f64 {
        value_of(&self.raw_temperature, self.config.temperature)
    }

    fn space(&self) -> Result<Space> {
        let c = self.curvature();
        let (temperature, coordinates) = (self.temperature(), self.config.coordinates);
        let raw = |param: &Option<Array0<F>>| param.as_ref().map(|raw| raw[()]);
        config::check_range("curvature", c, raw(&self.raw_curvature))?;
        config::check_range("temperature", temperature, raw(&self.raw_temperature))?;
        let largest_radius = config::largest_radius(self.config.aggregation);
        Ok(Space { c, coordinates, largest_radius })
    }

    fn embed(&self, inputs: &Inputs<'_, F>) -> Result<Embedded<F>> {
        let space = self.space()?;
        let (heads, kv_heads) = (inputs.num_heads(), inputs.num_kv_heads());
        let key_dim = inputs.query().ncols() / heads;
        check_shape("key", &[inputs.num_keys(), kv_heads * key_dim], inputs.key().shape())?;
        if self.config.aggregation == Aggregation::TangentAtQuery {
            let shape = [inputs.num_keys(), kv_heads * key_dim];
            check_shape("value", &shape, inputs.value().shape())?;
        }
        let value = space.polar("value", inputs.value(), kv_heads)?;
        let sums = match self.config.aggregation {
            Aggregation::TangentAtOrigin => value.tangents()?,
            _ => value.sums()?,
        };
        Ok(Embedded {
            space,
            kappa: 2.0 / (space.c.sqrt() * self.temperature()),
            query: space.polar("query", inputs.query(), heads)?,
            key: space.polar("key", inputs.key(), kv_heads)?,
            value,
            sums,
        })
    }

    /// Computes the weights of all pairs.
    fn softmax(&self, inputs: &Inputs<'_, F>, embedded: &Embedded<F>) -> Result<Softmax<F>> {
        let polar = embedded.inputs(inputs)?;
        plain::weights(&embedded.problem(&polar, self.is_linear())?)
    }

    /// Adds the gradients of the parameters, if there are any.
    fn params_vjp(&self, grad_c: f64, grad_temperature: f64, params: &mut [ArrayD<F>]) {
        let learned = [
            self.raw_curvature.as_ref().map(|_| (self.curvature(), grad_c)),
            self.raw_temperature.as_ref().map(|_| (self.temperature(), grad_temperature)),
        ];
        for (param, (value, grad)) in params.iter_mut().zip(learned.into_iter().flatten()) {
            // The derivative of softplus is 1 − e^{−softplus}.
            *param += F::from_f64(grad * -(-value).exp_m1());
        }
    }

    fn is_linear(&self) -> bool {
        self.config.aggregation == Aggregation::TangentAtOrigin
    }

    fn run(&self, inputs: &Inputs<'_, F>, embedded: &Embedded<F>) -> Result<Sums<F>> {
        let (num_queries, heads) = (inputs.num_queries(), inputs.num_heads());
        let polar = embedded.inputs(inputs)?;
        let problem = embedded.problem(&polar, self.is_linear())?;
        let columns = problem.softmax.value_dim;
        let mut sums = try_zeros("sums", num_queries, heads * columns)?;
        let mut normalizer = Normalizer::empty(num_queries, heads)?;
        let level = level();
        match inputs.pattern() {
            Pattern::Dense if num_queries >= FEW_QUERIES => {
                F::hyperbolic_dense_forward(
                    &problem,
                    TILES,
                    level,
                    sums.view_mut(),
                    &mut normalizer,
                );
            }
            _ => F::hyperbolic_rows_forward(
                &problem,
                TILES.keys,
                level,
                sums.view_mut(),
                &mut normalizer,
            ),
        }
        Sums::new(&problem, self.is_linear(), sums, normalizer)
    }

    /// The backward pass of the sums, which may be over more pairs. `grad_c` is the part of the gradient of c that
    /// does not go through them.
    #[expect(
        clippy::too_many_arguments,
        reason = "the arguments of a backward pass, and what precedes it"
    )]
    fn sums_vjp(
        &self,
        inputs: &Inputs<'_, F>,
        embedded: &Embedded<F>,
        sums: &Sums<F>,
        upstream: Upstream<F>,
        mut grad_c: f64,
        grad_out: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let polar = embedded.inputs(inputs)?;
        let problem = embedded.problem(&polar, self.is_linear())?;
        let points = Points {
            query: embedded.query.half_sinh_directions()?,
            key: embedded.key.half_sinh_directions()?,
        };
        let GradientsMut { query, key, value, mut bias, params, .. } = grads;
        let is_learned = !params.is_empty();
        let wanted =
            [is_learned || query.is_some(), is_learned || key.is_some() || value.is_some()];
        let level = level();
        let of_bias = bias.as_mut().map(|bias| bias.view_mut());
        let mut grads = match inputs.pattern() {
            Pattern::Dense if inputs.num_queries() >= FEW_QUERIES => {
                F::hyperbolic_dense_backward(&problem, &points, &upstream, TILES, level, of_bias)?
            }
            _ => F::hyperbolic_rows_backward(
                &problem, &points, &upstream, TILES.keys, level, wanted, of_bias,
            )?,
        };
        // All gradients are allocated, also unwanted ones.
        sums.deep_vjp(&problem, &points, embedded.space, grad_out, &mut grads, bias);
        let space = embedded.space;
        if wanted[0] {
            grad_c += space.vjp(&embedded.query, &grads.query, DirectionFactor::HalfSinh, query);
        }
        if wanted[1] {
            let of_value =
                if self.is_linear() { DirectionFactor::Radius } else { DirectionFactor::Sinh };
            grad_c += space.vjp(&embedded.key, &grads.key, DirectionFactor::HalfSinh, key);
            grad_c += space.vjp(&embedded.value, &grads.value, of_value, value);
        }
        // κ = 2/(√c τ)
        let grad_kappa: f64 = grads.kappa.iter().map(|grad| grad.as_f64()).sum();
        grad_c -= grad_kappa * embedded.kappa / (2.0 * space.c);
        let grad_temperature = -grad_kappa * embedded.kappa / self.temperature();
        self.params_vjp(grad_c, grad_temperature, params);
        Ok(())
    }
}

impl<F: Float> Embedded<F> {
    /// Whether all points are close enough to the origin to be processed in this type.
    fn is_within_range(&self, aggregation: Aggregation) -> bool {
        let [radius, of_values] = config::radii_within::<F>(aggregation);
        let is_within = [&self.query, &self.key].map(|polar| polar.is_within(radius));
        is_within == [true; 2] && self.value.is_within(of_values)
    }

    /// Returns inputs with the same pairs over the directions and the terms to sum.
    fn inputs<'e>(&'e self, inputs: &Inputs<'e, F>) -> Result<Inputs<'e, F>> {
        let arrays = [&self.query.directions, &self.key.directions, &self.sums];
        let [query, key, value] = arrays.map(|array| array.view());
        inputs.with_arrays(query, key, value)
    }

    fn problem<'e>(
        &'e self,
        polar: &Inputs<'e, F>,
        is_linear: bool,
    ) -> Result<HyperbolicProblem<'e, F>> {
        let directions = if is_linear {
            Rows::new("value", self.sums.view())?
        } else {
            self.value.finite_directions()?
        };
        let masses = if is_linear {
            // The directions themselves are summed.
            let (zero, one) = (F::zero(), F::one());
            let mass = Mass { expm1: zero, half_inverse: zero, sinh: one, cosh: zero };
            vec![mass; polar.num_keys() * polar.num_kv_heads()]
        } else {
            self.value.for_sums()
        };
        Ok(HyperbolicProblem {
            softmax: Problem::new(polar, None)?,
            query: self.query.for_logits(),
            key: self.key.for_logits(),
            kappa: F::from_f64(self.kappa),
            dim: self.value.directions.ncols() / polar.num_kv_heads(),
            directions,
            masses,
        })
    }
}

impl<F: Float> Params<F> for Poincare<F> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        if let Some(raw) = &self.raw_curvature {
            visitor("raw_curvature", raw.view().into_dyn());
        }
        if let Some(raw) = &self.raw_temperature {
            visitor("raw_temperature", raw.view().into_dyn());
        }
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        if let Some(raw) = &mut self.raw_curvature {
            visitor("raw_curvature", raw.view_mut().into_dyn());
        }
        if let Some(raw) = &mut self.raw_temperature {
            visitor("raw_temperature", raw.view_mut().into_dyn());
        }
    }
}

impl<F: Float> Attention<F> for Poincare<F> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, inputs: &Inputs<'_, F>) -> usize {
        output_dim(inputs)
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        self.forward_train_into(inputs, out).map(drop)
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        if let Some(segments) = inputs.packed_segments() {
            return packed::forward_train(self, inputs, segments, out);
        }
        if let Some(seen) = inputs.select_seen_keys(&[])? {
            let saved = self.forward_train_into(&seen.inputs(), out);
            return saved.map_err(|error| seen.in_whole(error));
        }
        check_output(self, "out", inputs, out.shape())?;
        inputs.check_absent(NAME, &[Channel::PairWeights])?;
        let embedded = self.embed(inputs)?;
        let attended = if !embedded.is_within_range(self.config.aggregation) {
            Attended::Wide(Wide::new(self, inputs)?.forward(inputs, out)?)
        } else if self.config.aggregation.is_plain() {
            let softmax = self.softmax(inputs, &embedded)?;
            Plain::new(self, inputs, &softmax)?.forward(out)?;
            Attended::Pairs(softmax)
        } else {
            let sums = self.run(inputs, &embedded)?;
            sums.finish(embedded.space, out);
            Attended::Sums(sums)
        };
        Ok(Saved::new(NAME, State { config: self.config.clone(), attended }))
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
            let backward = |inputs: &Inputs<'_, F>, grads: GradientsMut<'_, F>| {
                self.backward_into(inputs, saved, grad_out, grads)
            };
            return seen.backward_of_read(grads, backward).map_err(|error| seen.in_whole(error));
        }
        let State { config, attended } = saved.state::<State<F>>(NAME)?;
        if *config != self.config {
            return Err(Error::saved_options(NAME, &self.config, config));
        }
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        grads.check(NAME, inputs, self)?;
        let sums = match attended {
            Attended::Sums(sums) => sums,
            Attended::Wide(saved) => {
                return Wide::new(self, inputs)?.backward(inputs, saved, grad_out, grads);
            }
            Attended::Pairs(softmax) => {
                let shape = [inputs.num_pairs(), inputs.num_heads()];
                check_shape("saved weights", &shape, softmax.weights().shape())?;
                let plain = Plain::new(self, inputs, softmax)?;
                let [grad_c, grad_temperature] = plain.backward(grad_out, &mut grads)?;
                self.params_vjp(grad_c, grad_temperature, grads.params);
                return Ok(());
            }
        };
        sums.check(inputs)?;
        let embedded = self.embed(inputs)?;
        let (upstream, grad_c) = sums.upstream(embedded.space, grad_out, None, false)?;
        self.sums_vjp(inputs, &embedded, sums, upstream, grad_c, grad_out, grads)
    }

    fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        // As in the forward pass, points that no query of a graph sees are not looked at.
        if let (Pattern::Graph(_), Some(seen)) = (inputs.pattern(), inputs.select_seen_keys(&[])?) {
            let weights = self.attention_weights(&seen.inputs());
            return weights.map_err(|error| seen.in_whole(error));
        }
        let embedded = self.embed(inputs)?;
        if !embedded.is_within_range(self.config.aggregation) {
            return Wide::new(self, inputs)?.attention_weights(inputs);
        }
        Ok(self.softmax(inputs, &embedded)?.into_weights())
    }

    fn attention_weights_backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        grads.check(NAME, inputs, self)?;
        if let (Pattern::Graph(_), Some(seen)) = (inputs.pattern(), inputs.select_seen_keys(&[])?) {
            let backward = |inputs: &Inputs<'_, F>, grads: GradientsMut<'_, F>| {
                self.attention_weights_backward_into(inputs, grad_weights, grads)
            };
            return seen.backward_of_read(grads, backward).map_err(|error| seen.in_whole(error));
        }
        let embedded = self.embed(inputs)?;
        if !embedded.is_within_range(self.config.aggregation) {
            return Wide::new(self, inputs)?.weights_backward(inputs, grad_weights, grads);
        }
        let softmax = self.softmax(inputs, &embedded)?;
        let plain = Plain::new(self, inputs, &softmax)?;
        let [grad_c, grad_temperature] = plain.weights_backward(grad_weights, &mut grads)?;
        self.params_vjp(grad_c, grad_temperature, grads.params);
        Ok(())
    }
}

/// Returns the softplus of a raw parameter, or the fixed value.
fn value_of<F: Float>(raw: &Option<Array0<F>>, fixed: f64) -> f64 {
    match raw {
        Some(raw) => softplus(raw[()].as_f64()),
        None => fixed,
    }
}
