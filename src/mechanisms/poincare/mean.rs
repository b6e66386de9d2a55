//! The means that weighted sums represent, and the gradients of the sums.

use super::deep::DeepRow;
use super::partial::PartialMean;
use super::polar::{Space, zero_nan};
use super::{Coordinates, TILES};
use crate::element::try_zeros;
use crate::error::{Result, check_shape};
use crate::geometry::poincare::ball::norm_of;
use crate::inputs::{Inputs, head_columns};
use crate::kernels::Float;
use crate::kernels::level::level;
use crate::kernels::normalizer::Normalizer;
use crate::kernels::poincare::{
    DOMINANT, HyperbolicProblem, PointGradients, Points, Terms, Upstream,
};
use crate::kernels::problem::Rows;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, ArrayViewMut3, s};

/// T − |S| is the sum of e^{−R} and of the difference of sinh R and |S|. If it is less than this fraction
/// of sinh R, the difference has lost five bits and is summed again from differences.
const FAR: f64 = 1.0 / 32.0;

/// The sinh R from which on a mean is computed pair by pair: otherwise the gradient of a value close to
/// the mean would have a rounding error of e^{2R} ε. Not reached in `f32`, see
/// [`radii_within`](super::config::radii_within).
const DEEP: f64 = 1500.0;

/// The sums of a forward pass for each query and head.
pub(super) struct Sums<F> {
    /// Whether S is R û, for the mean in the tangent space at the origin; otherwise it is sinh R û.
    is_linear: bool,
    /// S = Σ p sinh R u, Σ p sinh R and Σ p e^{−R}; or Σ p R u.
    sums: Array2<F>,
    /// T − |S|, T = Σ p cosh R; num_queries × heads. Unused if the sums are linear.
    gaps: Array2<F>,
    normalizer: Normalizer<F>,
    /// Queries and heads with a mean so far out that both passes are computed pair by pair.
    deep: Vec<[usize; 2]>,
}

impl<F: Float> Sums<F> {
    pub(super) fn new(
        problem: &HyperbolicProblem<'_, F>,
        is_linear: bool,
        sums: Array2<F>,
        normalizer: Normalizer<F>,
    ) -> Result<Self> {
        let gaps = match is_linear {
            true => Array2::zeros((0, 0)),
            false => gaps(problem, &sums, &normalizer)?,
        };
        let mut sums = Self { is_linear, sums, gaps, normalizer, deep: Vec::new() };
        if !is_linear {
            sums.settle_deep(problem);
        }
        Ok(sums)
    }

    /// Finds the means so far out that the rounding of their direction would spoil them, and recomputes
    /// them.
    fn settle_deep(&mut self, problem: &HyperbolicProblem<'_, F>) {
        let (num_queries, heads) = self.gaps.dim();
        for (query, head) in (0..num_queries).flat_map(|query| (0..heads).map(move |h| (query, h)))
        {
            let center = self.center(query, head, problem.dim);
            let is_deep = center.norm > DEEP * center.lorentz();
            if center.is_empty() || !is_deep {
                continue;
            }
            let row = DeepRow::new(problem, query, head);
            let first = head * (problem.dim + 2);
            for (c, &u) in row.direction.iter().enumerate() {
                self.sums[[query, first + c]] = F::from_f64(row.norm * u);
            }
            self.gaps[[query, head]] = F::from_f64(row.gap);
            self.deep.push([query, head]);
        }
    }

    /// Adds the gradients of the means that are computed pair by pair.
    pub(super) fn deep_vjp(
        &self,
        problem: &HyperbolicProblem<'_, F>,
        points: &Points<F>,
        space: Space,
        grad_out: ArrayView2<'_, F>,
        grads: &mut PointGradients<F>,
        mut grad_bias: Option<ArrayViewMut3<'_, F>>,
    ) {
        for &[query, head] in &self.deep {
            let row = DeepRow::new(problem, query, head);
            let columns = head_columns(head, problem.dim);
            let grad_out: Vec<f64> =
                grad_out.slice(s![query, columns]).iter().map(|grad| grad.as_f64()).collect();
            let slopes = self.center(query, head, problem.dim).slopes(space);
            row.vjp(problem, points, slopes, &grad_out, grads, grad_bias.as_mut());
        }
    }

    /// Creates the sums of a merged result, given S and T − |S| of each head.
    pub(super) fn of_partial(partial: &PartialMean<F>) -> Result<Self> {
        let is_linear = partial.is_linear();
        let normalizer = partial.normalizer();
        let (num_queries, heads) = normalizer.sum.dim();
        let dim = partial.dim();
        let columns = if is_linear { dim } else { dim + 2 };
        let mut sums = try_zeros("sums", num_queries, heads * columns)?;
        let mut gaps = try_zeros("gaps", num_queries, if is_linear { 0 } else { heads })?;
        for (query, head) in (0..num_queries).flat_map(|query| (0..heads).map(move |h| (query, h)))
        {
            let (sum, gap) = partial.sum_and_gap(query, head);
            sums.slice_mut(s![query, head * columns..head * columns + dim]).assign(&sum);
            if let Some(gap) = gap {
                gaps[[query, head]] = gap;
            }
        }
        Ok(Self { is_linear, sums, gaps, normalizer, deep: Vec::new() })
    }

    /// Returns S and T − |S| of each head side by side, and the normalizer.
    pub(super) fn into_partial(self) -> Result<(Array2<F>, Normalizer<F>)> {
        if self.is_linear {
            return Ok((self.sums, self.normalizer));
        }
        let (num_queries, heads) = self.gaps.dim();
        let dim = self.dim();
        let mut out = try_zeros("sums", num_queries, heads * (dim + 1))?;
        for ((query, head), &gap) in self.gaps.indexed_iter() {
            let first = head * (dim + 1);
            let sum = self.sums.slice(s![query, head_columns(head, dim + 2)]);
            out.slice_mut(s![query, first..first + dim]).assign(&sum.slice(s![..dim]));
            out[[query, first + dim]] = gap;
        }
        Ok((out, self.normalizer))
    }

    /// Returns the number of columns of S for a head.
    fn dim(&self) -> usize {
        let columns = self.sums.ncols() / self.normalizer.sum.ncols();
        if self.is_linear { columns } else { columns - 2 }
    }

    /// Checks that the shapes fit the inputs.
    pub(super) fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        let shape = [inputs.num_queries(), inputs.num_heads()];
        self.normalizer.check(shape[0], shape[1])?;
        let dim = inputs.value().ncols() / inputs.num_kv_heads();
        let columns = if self.is_linear { dim } else { dim + 2 };
        check_shape("saved sums", &[shape[0], shape[1] * columns], self.sums.shape())
    }

    fn center(&self, query: usize, head: usize, dim: usize) -> Center<'_, F> {
        let columns = if self.is_linear { dim } else { dim + 2 };
        let row = &self.sums.as_slice().expect("a matrix of our own")[query * self.sums.ncols()..]
            [head_columns(head, columns)];
        let sum = &row[..dim];
        let gap = (!self.is_linear).then(|| self.gaps[[query, head]].as_f64());
        Center { sum, norm: norm_of(sum), gap }
    }

    /// Overwrites `out` with the points.
    pub(super) fn finish(&self, space: Space, mut out: ArrayViewMut2<'_, F>) {
        let (num_queries, heads) = self.normalizer.sum.dim();
        let dim = self.dim();
        for query in 0..num_queries {
            for head in 0..heads {
                let center = self.center(query, head, dim);
                let factor = center.factor(space);
                let out = out.slice_mut(s![query, head_columns(head, dim)]);
                let sum = out.into_iter().zip(center.sum);
                sum.for_each(|(out, sum)| *out = F::from_f64(factor * sum.as_f64()));
            }
        }
    }

    /// Returns the gradients of the sums, and the part of the gradient of c that does not go through
    /// them. If the sums are over more pairs than the pass visits, `is_part` is true and no logit may be
    /// corrected by the others; `grad_log_sum_exp` is the gradient of m + log l, `None` for zeros.
    ///
    /// A change of the sums moves the mean by its component orthogonal to the mean, on the hyperboloid:
    ///
    /// ```text
    /// dR = Σ p̃ (sinh(Rⱼ − R) − sinh Rⱼ cosh R |uⱼ − û|²/2) / N     dû = Σ p̃ sinh Rⱼ (uⱼ)⊥ / (N sinh R)
    /// ```
    pub(super) fn upstream(
        &self,
        space: Space,
        grad_out: ArrayView2<'_, F>,
        grad_log_sum_exp: Option<ArrayView2<'_, F>>,
        is_part: bool,
    ) -> Result<(Upstream<F>, f64)> {
        let (num_queries, heads) = self.normalizer.sum.dim();
        let dim = self.dim();
        let zeros = || try_zeros("gradients", num_queries, heads * dim);
        let (mut weights, mut directions, mut sums) = (zeros()?, zeros()?, zeros()?);
        let mut terms = Vec::with_capacity(num_queries * heads);
        let mut grad_c = 0.0;
        for (query, head) in (0..num_queries).flat_map(|query| (0..heads).map(move |h| (query, h)))
        {
            let center = self.center(query, head, dim);
            let grad_log_sum = grad_log_sum_exp.map_or(0.0, |grad| grad[[query, head]].as_f64());
            if self.normalizer.is_empty(query, head) || center.is_empty() {
                let mut none = Terms::none();
                if grad_log_sum != 0.0 {
                    [none.shift, none.inverse] = self.normalizer.factors(query, head);
                    none.delta = F::from_f64(-grad_log_sum);
                }
                terms.push(none);
                continue;
            }
            let is_deep = self.deep.binary_search(&[query, head]).is_ok();
            let columns = head_columns(head, dim);
            let grad_out = grad_out.slice(s![query, columns.clone()]);
            let unit = |sum: F| if center.norm == 0.0 { 0.0 } else { sum.as_f64() / center.norm };
            let along = grad_out.iter().zip(center.sum).map(|(g, &sum)| g.as_f64() * unit(sum));
            let along: f64 = along.sum();
            // out = r û, r ~ 1/√c at the same R
            grad_c -= 0.5 / space.c * center.factor(space) * center.norm * along;
            if is_deep {
                terms.push(Terms::none());
                continue;
            }

            let [slope, ratio] = center.slopes(space);
            let lorentz = center.lorentz();
            let grad_radius = slope * along / lorentz;
            let spread =
                (center.gap).map_or(0.0, |gap| 0.5 * grad_radius * (gap + center.norm) / lorentz);
            let mut weight = weights.slice_mut(s![query, columns.clone()]);
            let mut direction = directions.slice_mut(s![query, columns.clone()]);
            let mut of_values = sums.slice_mut(s![query, columns]);
            let mut delta = 0.0;
            for (c, (&g, &sum)) in grad_out.iter().zip(center.sum).enumerate() {
                let u = unit(sum);
                let mut w = ratio * (g.as_f64() - along * u) / lorentz;
                if self.is_linear {
                    w += grad_radius * u;
                    delta += w * sum.as_f64();
                }
                weight[c] = F::from_f64(w);
                direction[c] = F::from_f64(u);
                of_values[c] = F::from_f64(w + 2.0 * spread * u);
            }
            let expm1 = (0.5 * center.radius()).exp_m1();
            let [shift, inverse] = self.normalizer.factors(query, head);
            terms.push(Terms {
                radial: F::from_f64(if self.is_linear { 0.0 } else { grad_radius }),
                spread: F::from_f64(spread),
                expm1: F::from_f64(expm1),
                half_inverse: F::from_f64(0.5 / (1.0 + expm1)),
                shift,
                inverse,
                delta: F::from_f64(delta - grad_log_sum),
            });
        }
        zero_nan(&mut sums);
        let upstream = Upstream {
            weights: Rows::from(weights),
            directions: Rows::from(directions),
            sums: Rows::from(sums),
            terms,
            is_linear: self.is_linear,
            dominant: F::from_f64(if is_part { f64::INFINITY } else { DOMINANT }),
        };
        Ok((upstream, grad_c))
    }
}

/// The mean that the sums of a query and head represent: a point at distance R in the direction of S.
#[derive(Clone, Copy)]
struct Center<'s, F> {
    /// S.
    sum: &'s [F],
    /// |S|.
    norm: f64,
    /// T − |S|; `None` if S is R û.
    gap: Option<f64>,
}

impl<F: Float> Center<'_, F> {
    /// Whether nothing was summed: there was no visible pair, or dropout removed them all.
    fn is_empty(&self) -> bool {
        self.norm == 0.0 && self.gap == Some(0.0)
    }

    /// Returns the Lorentz norm N = √(T² − |S|²).
    fn lorentz(&self) -> f64 {
        self.gap.map_or(1.0, |gap| (gap * (gap + 2.0 * self.norm)).sqrt())
    }

    fn radius(&self) -> f64 {
        match self.gap {
            None => self.norm,
            Some(_) => (self.norm / self.lorentz()).asinh(),
        }
    }

    /// Returns the factor of S in the output.
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

    /// Returns [dr/dR, r/sinh R, or r/R if S is R û] for the norm r of the output.
    fn slopes(&self, space: Space) -> [f64; 2] {
        let (radius, root) = (self.radius(), space.c.sqrt());
        // tanh(R/2)' = (1 + cosh R)⁻¹ = tanh(R/2) / sinh R
        let slope = 1.0 / ((1.0 + radius.cosh()) * root);
        let ratio = |function: fn(f64) -> f64, x: f64| if x == 0.0 { 1.0 } else { function(x) / x };
        match (self.gap, space.coordinates) {
            (Some(_), Coordinates::Ball) => [slope; 2],
            (None, Coordinates::Ball) => [slope, 0.5 / root * ratio(f64::tanh, 0.5 * radius)],
            (Some(_), Coordinates::Tangent) => [0.5 / root, 0.5 / root / ratio(f64::sinh, radius)],
            (None, Coordinates::Tangent) => [0.5 / root; 2],
        }
    }
}

/// Computes T − |S| for each query and head. It determines the distance of a mean from the origin. For
/// points far away and close to each other it is a difference of large numbers and is therefore summed as
/// Σ p (e^{−R} + sinh R |u − S/|S||²/2), once S is known.
fn gaps<F: Float>(
    problem: &HyperbolicProblem<'_, F>,
    sums: &Array2<F>,
    normalizer: &Normalizer<F>,
) -> Result<Array2<F>> {
    let (num_queries, heads) = normalizer.sum.dim();
    let dim = problem.dim;
    let mut gaps = try_zeros("gaps", num_queries, heads)?;
    let mut is_far = Vec::new();
    for query in 0..num_queries {
        for head in 0..heads {
            let row = sums.slice(s![query, head_columns(head, dim + 2)]);
            let row = row.as_slice().expect("a matrix of our own");
            let (sinh, inverse) = (row[dim].as_f64(), row[dim + 1].as_f64());
            let gap = inverse + (sinh - norm_of(&row[..dim]));
            gaps[[query, head]] = F::from_f64(gap);
            if gap < FAR * sinh {
                gaps[[query, head]] = row[dim + 1];
                is_far.push([query, head]);
            }
        }
    }
    if is_far.is_empty() {
        return Ok(gaps);
    }
    let mut directions = try_zeros("directions", num_queries, heads * dim)?;
    for &[query, head] in &is_far {
        let sum = sums.slice(s![query, head_columns(head, dim + 2)]);
        let sum = &sum.as_slice().expect("a matrix of our own")[..dim];
        let norm = norm_of(sum);
        let direction = directions.slice_mut(s![query, head_columns(head, dim)]);
        let direction = direction.into_iter().zip(sum);
        direction.for_each(|(direction, sum)| *direction = F::from_f64(sum.as_f64() / norm));
    }
    let mut spreads = try_zeros("spreads", num_queries, heads)?;
    let (directions, level) = (Rows::from(directions), level());
    let sums = spreads.view_mut();
    F::hyperbolic_spread(problem, directions.slices(), normalizer, TILES, level, sums);
    is_far.into_iter().for_each(|at| gaps[at] += spreads[at]);
    Ok(gaps)
}
