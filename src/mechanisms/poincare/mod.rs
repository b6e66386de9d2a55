mod config;
mod plain;
mod polar;

pub use config::{Aggregation, Coordinates, PoincareConfig};

use crate::attention::{Attention, Saved};
use crate::error::{Result, check_shape};
use crate::float::{Float, try_zeros};
use crate::geometry::poincare::ball::norm_of;
use crate::gradients::GradientsMut;
use crate::inputs::{Inputs, Pattern, head_columns};
use crate::kernels::dense::TileSizes;
use crate::kernels::hyperbolic::{HyperbolicProblem, Points, Terms, Upstream};
use crate::kernels::problem::{Problem, Rows};
use crate::mechanisms::FEW_QUERIES;
use crate::mechanisms::scaled_dot_product::Softmax;
use crate::params::Params;
use fearless_simd::Level;
use ndarray::{Array0, Array2, ArrayD, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD, s};
use plain::Plain;
use polar::{DirectionFactor, Polar, Space, zero_nan};
use std::f64::consts::LOG2_E;

const NAME: &str = "poincare";

/// Sizes of tiles, those of [`Flash`](crate::Flash).
const TILES: TileSizes = TileSizes { queries: 96, keys: 96 };

/// T − |S| is the sum of e^{−R} and of what sinh R and |S| differ by; where it is less than this part
/// of |S|, the difference has lost five bits and is summed again from differences.
const FAR: f64 = 1.0 / 32.0;

/// Attention by hyperbolic distance.
#[derive(Clone, Debug)]
pub struct Poincare<F> {
    config: PoincareConfig,
    /// softplus⁻¹ of c and τ, where they are learned.
    raw_curvature: Option<Array0<F>>,
    raw_temperature: Option<Array0<F>>,
}

/// The points of some inputs, as a forward and a backward pass need them.
struct Embedded<F> {
    space: Space,
    kappa: f64,
    query: Polar<F>,
    key: Polar<F>,
    value: Polar<F>,
    /// What is summed of the values.
    sums: Array2<F>,
}

struct State<F> {
    config: PoincareConfig,
    /// Σ p × what is summed, num_queries × heads · columns.
    sums: Array2<F>,
    /// T − |S|, num_queries × heads; for the midpoint.
    gaps: Array2<F>,
    /// num_queries × heads.
    log_sum_exp: Array2<F>,
}

impl<F: Float> Poincare<F> {
    /// The configuration; what is learned starts at its values.
    #[must_use]
    pub fn config(&self) -> &PoincareConfig {
        &self.config
    }

    /// c, minus the curvature.
    #[must_use]
    pub fn curvature(&self) -> f64 {
        value_of(&self.raw_curvature, self.config.curvature)
    }

    /// τ, which the distances are divided by.
    #[must_use]
    pub fn temperature(&self) -> f64 {
        value_of(&self.raw_temperature, self.config.temperature)
    }

    fn space(&self) -> Result<Space> {
        let c = self.curvature();
        let (temperature, coordinates) = (self.temperature(), self.config.coordinates);
        config::check_positive("curvature", c)?;
        config::check_positive("temperature", temperature)?;
        let largest_radius = config::largest_radius::<F>(self.config.aggregation);
        Ok(Space { c, coordinates, largest_radius })
    }

    fn embed(&self, inputs: &Inputs<'_, F>) -> Result<Embedded<F>> {
        let space = self.space()?;
        let (heads, kv_heads) = (inputs.heads(), inputs.kv_heads());
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

    /// The weights of all pairs.
    fn softmax(&self, inputs: &Inputs<'_, F>, embedded: &Embedded<F>) -> Result<Softmax<F>> {
        let polar = embedded.inputs(inputs)?;
        plain::weights(&embedded.problem(&polar, self.is_linear())?)
    }

    /// Adds the gradients of the parameters that there are.
    fn params_vjp(&self, grad_c: f64, grad_temperature: f64, params: &mut [ArrayD<F>]) {
        let learned = [
            self.raw_curvature.as_ref().map(|_| (self.curvature(), grad_c)),
            self.raw_temperature.as_ref().map(|_| (self.temperature(), grad_temperature)),
        ];
        for (param, (value, grad)) in params.iter_mut().zip(learned.into_iter().flatten()) {
            // The derivative of softplus is 1 − e^{−softplus}.
            *param += F::of(grad * -(-value).exp_m1());
        }
    }

    fn is_linear(&self) -> bool {
        self.config.aggregation == Aggregation::TangentAtOrigin
    }

    fn run(&self, inputs: &Inputs<'_, F>, embedded: &Embedded<F>) -> Result<State<F>> {
        let (num_queries, heads) = (inputs.num_queries(), inputs.heads());
        let polar = embedded.inputs(inputs)?;
        let problem = embedded.problem(&polar, self.is_linear())?;
        let columns = problem.softmax.value_dim;
        let mut sums = try_zeros("sums", num_queries, heads * columns)?;
        let mut log_sum_exp = try_zeros("log_sum_exp", num_queries, heads)?;
        let level = Level::new();
        match inputs.pattern() {
            Pattern::Dense if num_queries >= FEW_QUERIES => {
                F::hyperbolic_dense_forward(
                    &problem,
                    TILES,
                    level,
                    sums.view_mut(),
                    &mut log_sum_exp,
                );
            }
            _ => F::hyperbolic_rows_forward(
                &problem,
                TILES.keys,
                level,
                sums.view_mut(),
                &mut log_sum_exp,
            ),
        }
        let gaps = match self.is_linear() {
            true => Array2::zeros((0, 0)),
            false => gaps(&problem, &sums, &log_sum_exp)?,
        };
        Ok(State { config: self.config.clone(), sums, gaps, log_sum_exp })
    }

    /// Overwrites `out` with the points that the sums stand for.
    fn finish(
        &self,
        space: Space,
        inputs: &Inputs<'_, F>,
        state: &State<F>,
        mut out: ArrayViewMut2<'_, F>,
    ) {
        let heads = inputs.heads();
        let dim = inputs.value().ncols() / inputs.kv_heads();
        for query in 0..inputs.num_queries() {
            for head in 0..heads {
                let center = state.center(query, head, dim);
                let factor = center.factor(space);
                let out = out.slice_mut(s![query, head_columns(head, dim)]);
                out.into_iter()
                    .zip(center.sum)
                    .for_each(|(out, sum)| *out = F::of(factor * sum.as_f64()));
            }
        }
    }
}

/// What the sums of a query and head stand for: a point at distance R in the direction of S.
#[derive(Clone, Copy)]
struct Center<'s, F> {
    /// S.
    sum: &'s [F],
    /// |S|.
    norm: f64,
    /// T − |S|; `None` where S is R û itself.
    gap: Option<f64>,
}

impl<F: Float> State<F> {
    fn center(&self, query: usize, head: usize, dim: usize) -> Center<'_, F> {
        let is_linear = self.config.aggregation == Aggregation::TangentAtOrigin;
        let columns = if is_linear { dim } else { dim + 2 };
        let row = &self.sums.as_slice().expect("a matrix of our own")[query * self.sums.ncols()..]
            [head_columns(head, columns)];
        let sum = &row[..dim];
        let gap = (!is_linear).then(|| self.gaps[[query, head]].as_f64());
        Center { sum, norm: norm_of(sum), gap }
    }
}

impl<F: Float> Center<'_, F> {
    /// Whether nothing has been summed: no pair was seen, or dropout left none.
    fn is_empty(&self) -> bool {
        self.norm == 0.0 && self.gap == Some(0.0)
    }

    /// The Lorentz norm N = √(T² − |S|²).
    fn lorentz(&self) -> f64 {
        self.gap.map_or(f64::NAN, |gap| (gap * (gap + 2.0 * self.norm)).sqrt())
    }

    fn radius(&self) -> f64 {
        match self.gap {
            None => self.norm,
            Some(_) => (self.norm / self.lorentz()).asinh(),
        }
    }

    /// What S is multiplied by to give the output.
    fn factor(&self, space: Space) -> f64 {
        if self.norm == 0.0 {
            return 0.0;
        }
        let root = space.c.sqrt();
        match (self.gap, space.coordinates) {
            // ½ ⊗ (S/T) = S/(T + N)
            (Some(gap), Coordinates::Ball) => (root * (gap + self.norm + self.lorentz())).recip(),
            (None, Coordinates::Ball) => (0.5 * self.norm).tanh() / (root * self.norm),
            (_, Coordinates::Tangent) => self.radius() / (2.0 * root * self.norm),
        }
    }

    /// [dr/dR, r/sinh R, or r/R where S is R û] for the norm r of the output.
    fn slopes(&self, space: Space) -> [f64; 2] {
        let (radius, root) = (self.radius(), space.c.sqrt());
        let ratio = |function: f64| if radius == 0.0 { 1.0 } else { function };
        match (self.gap, space.coordinates) {
            (None, Coordinates::Tangent) => [0.5 / root; 2],
            (None, Coordinates::Ball) => {
                let slope = 1.0 / ((1.0 + radius.cosh()) * root);
                [slope, 0.5 / root * ratio((0.5 * radius).tanh() / (0.5 * radius))]
            }
            (Some(_), Coordinates::Ball) => [1.0 / ((1.0 + radius.cosh()) * root); 2],
            (Some(_), Coordinates::Tangent) => {
                [0.5 / root, 0.5 / root * ratio(radius / radius.sinh())]
            }
        }
    }
}

/// T − |S| for each query and head.
fn gaps<F: Float>(
    problem: &HyperbolicProblem<'_, F>,
    sums: &Array2<F>,
    log_sum_exp: &Array2<F>,
) -> Result<Array2<F>> {
    let (num_queries, heads) = log_sum_exp.dim();
    let dim = problem.dim;
    let mut gaps = try_zeros("gaps", num_queries, heads)?;
    let mut far: Option<Array2<F>> = None;
    let mut is_far = Vec::new();
    for query in 0..num_queries {
        for head in 0..heads {
            let row = sums.slice(s![query, head_columns(head, dim + 2)]);
            let row = row.as_slice().expect("a matrix of our own");
            let length = norm_of(&row[..dim]);
            let (sinh, inverse) = (row[dim].as_f64(), row[dim + 1].as_f64());
            let difference = sinh - length;
            gaps[[query, head]] = F::of(inverse + difference);
            if inverse + difference < FAR * sinh {
                gaps[[query, head]] = F::of(inverse);
                is_far.push([query, head]);
                let far = match &mut far {
                    Some(far) => far,
                    None => far.insert(try_zeros("directions", num_queries, heads * dim)?),
                };
                let far = far.slice_mut(s![query, head_columns(head, dim)]);
                far.into_iter()
                    .zip(row)
                    .for_each(|(far, &sum)| *far = F::of(sum.as_f64() / length));
            }
        }
    }
    if let Some(far) = far {
        let mut spreads = try_zeros("spreads", num_queries, heads)?;
        let far = Rows::from(far);
        F::hyperbolic_spread(
            problem,
            far.slices(),
            log_sum_exp,
            TILES.keys,
            Level::new(),
            spreads.view_mut(),
        );
        for at in is_far {
            gaps[at] += spreads[at];
        }
    }
    Ok(gaps)
}

impl<F: Float> Embedded<F> {
    /// The pairs of some inputs over directions, and what is summed.
    fn inputs<'e>(&'e self, inputs: &Inputs<'e, F>) -> Result<Inputs<'e, F>> {
        let arrays = [&self.query.directions, &self.key.directions, &self.sums];
        let [query, key, value] = arrays.map(|array| array.view());
        inputs.with_arrays(query, key, value)?.with_kv_heads(inputs.heads(), inputs.kv_heads())
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
            // Then the sums are those of the directions themselves.
            let (zero, one) = (F::zero(), F::one());
            let mass = crate::kernels::hyperbolic::Mass {
                expm1: zero,
                half_inverse: zero,
                sinh: one,
                cosh: zero,
            };
            vec![mass; polar.num_keys() * polar.kv_heads()]
        } else {
            self.value.for_sums()
        };
        Ok(HyperbolicProblem {
            softmax: Problem::new(polar, None)?,
            query: self.query.for_logits(),
            key: self.key.for_logits(),
            kappa: F::of(self.kappa),
            dim: self.value.directions.ncols() / polar.kv_heads(),
            directions,
            masses,
        })
    }
}

/// Where the gradients of the sums come from, and what of them is c's.
fn upstream<F: Float>(
    space: Space,
    inputs: &Inputs<'_, F>,
    state: &State<F>,
    grad_out: ArrayView2<'_, F>,
) -> Result<(Upstream<F>, f64)> {
    let (num_queries, heads) = (inputs.num_queries(), inputs.heads());
    let dim = inputs.value().ncols() / inputs.kv_heads();
    let is_linear = state.config.aggregation == Aggregation::TangentAtOrigin;
    let zeros = || try_zeros("gradients", num_queries, heads * dim);
    let (mut weights, mut directions, mut sums) = (zeros()?, zeros()?, zeros()?);
    let mut terms = Vec::with_capacity(num_queries * heads);
    let mut grad_c = 0.0;
    for query in 0..num_queries {
        for head in 0..heads {
            let log_sum = state.log_sum_exp[[query, head]];
            let center = state.center(query, head, dim);
            if log_sum == F::neg_infinity() || center.is_empty() {
                let [zero, log_sum] = [F::zero(), F::infinity()];
                let (radial, spread, delta) = (zero, zero, zero);
                let (expm1, half_inverse) = (zero, zero);
                terms.push(Terms { radial, spread, expm1, half_inverse, log_sum, delta });
                continue;
            }
            let columns = head_columns(head, dim);
            let grad_out = grad_out.slice(s![query, columns.clone()]);
            let unit = |sum: F| if center.norm == 0.0 { 0.0 } else { sum.as_f64() / center.norm };
            let along: f64 =
                grad_out.iter().zip(center.sum).map(|(g, &sum)| g.as_f64() * unit(sum)).sum();
            // out = r(R, c) û with r ~ 1/√c
            grad_c -= 0.5 / space.c * center.factor(space) * center.norm * along;
            let [slope, ratio] = center.slopes(space);
            let lorentz = if is_linear { 1.0 } else { center.lorentz() };
            let grad_radius = slope * along / lorentz;
            let spread =
                center.gap.map_or(0.0, |gap| 0.5 * grad_radius * (gap + center.norm) / lorentz);
            let expm1 = (0.5 * center.radius()).exp_m1();
            let mut row = weights.slice_mut(s![query, columns.clone()]);
            let mut direction = directions.slice_mut(s![query, columns.clone()]);
            let mut sum_row = sums.slice_mut(s![query, columns]);
            let mut delta = 0.0;
            for (c, (&g, &sum)) in grad_out.iter().zip(center.sum).enumerate() {
                let u = unit(sum);
                let across = ratio * (g.as_f64() - along * u) / lorentz;
                let weight = if is_linear { across + grad_radius * u } else { across };
                delta += if is_linear { weight * sum.as_f64() } else { 0.0 };
                row[c] = F::of(weight);
                direction[c] = F::of(u);
                sum_row[c] = F::of(weight + 2.0 * spread * u);
            }
            terms.push(Terms {
                radial: F::of(if is_linear { 0.0 } else { grad_radius }),
                spread: F::of(spread),
                expm1: F::of(expm1),
                half_inverse: F::of(0.5 / (1.0 + expm1)),
                log_sum: log_sum * F::of(LOG2_E),
                delta: F::of(delta),
            });
        }
    }
    zero_nan(&mut sums);
    let upstream = Upstream {
        weights: Rows::from(weights),
        directions: Rows::from(directions),
        sums: Rows::from(sums),
        terms,
        is_linear,
    };
    Ok((upstream, grad_c))
}

impl<F: Float> Params<F> for Poincare<F> {
    fn visit_params(&self, visitor: &mut dyn FnMut(&str, ArrayViewD<'_, F>)) {
        if let Some(raw) = &self.raw_curvature {
            visitor("raw_curvature", raw.view().into_dyn());
        }
        if let Some(raw) = &self.raw_temperature {
            visitor("raw_temperature", raw.view().into_dyn());
        }
    }

    fn visit_params_mut(&mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'_, F>)) {
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
        crate::kernels::problem::output_dim(inputs)
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        self.forward_train_into(inputs, out).map(drop)
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        self.check_output("out", inputs, out.shape())?;
        let embedded = self.embed(inputs)?;
        if self.config.aggregation.is_plain() {
            let softmax = self.softmax(inputs, &embedded)?;
            Plain::new(self, inputs, &softmax)?.forward(out)?;
            return Ok(Saved::new(NAME, softmax));
        }
        let state = self.run(inputs, &embedded)?;
        self.finish(embedded.space, inputs, &state, out);
        Ok(Saved::new(NAME, state))
    }

    fn backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        self.check_output("grad_out", inputs, grad_out.shape())?;
        grads.check(NAME, inputs, self)?;
        if self.config.aggregation.is_plain() {
            let softmax: &Softmax<F> = saved.state(NAME)?;
            let shape = [inputs.num_pairs(), inputs.heads()];
            check_shape("saved weights", &shape, softmax.weights.shape())?;
            let mut grads = grads;
            let [grad_c, grad_temperature] =
                Plain::new(self, inputs, softmax)?.backward(grad_out, &mut grads)?;
            self.params_vjp(grad_c, grad_temperature, grads.params);
            return Ok(());
        }
        let state: &State<F> = saved.state(NAME)?;
        let embedded = self.embed(inputs)?;
        let sums =
            [inputs.num_queries(), inputs.heads() * embedded.sums.ncols() / inputs.kv_heads()];
        check_shape("saved sums", &sums, state.sums.shape())?;
        check_shape("saved log_sum_exp", &[sums[0], inputs.heads()], state.log_sum_exp.shape())?;
        let polar = embedded.inputs(inputs)?;
        let problem = embedded.problem(&polar, self.is_linear())?;
        let (upstream, mut grad_c) = upstream(embedded.space, inputs, state, grad_out)?;
        let points = Points {
            query: embedded.query.half_sinh_directions()?,
            key: embedded.key.half_sinh_directions()?,
        };
        let GradientsMut { query, key, value, bias, params, .. } = grads;
        let is_learned = !params.is_empty();
        let wanted =
            [is_learned || query.is_some(), is_learned || key.is_some() || value.is_some()];
        let level = Level::new();
        let grads = match inputs.pattern() {
            Pattern::Dense if inputs.num_queries() >= FEW_QUERIES => {
                F::hyperbolic_dense_backward(&problem, &points, &upstream, TILES, level, bias)?
            }
            _ => F::hyperbolic_rows_backward(
                &problem, &points, &upstream, TILES.keys, level, wanted, bias,
            )?,
        };
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

    fn weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        let embedded = self.embed(inputs)?;
        Ok(self.softmax(inputs, &embedded)?.weights)
    }
}

/// softplus of a raw parameter, or the fixed value.
fn value_of<F: Float>(raw: &Option<Array0<F>>, fixed: f64) -> f64 {
    match raw {
        Some(raw) => {
            let raw = raw[()].as_f64();
            raw.max(0.0) + (-raw.abs()).exp().ln_1p()
        }
        None => fixed,
    }
}
