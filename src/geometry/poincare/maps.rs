//! The exponential and logarithmic maps.

use super::ball::{Ball, add, assign, check_lengths, dot, norm, norm_of, stretch, sum};
use super::gyro::Addition;
use super::radial::{
    artanh_ratio, artanh_ratio_derivative, log_ratio, log_ratio_derivatives, sech2, tanh_ratio,
    tanh_ratio_derivative,
};
use crate::error::Result;
use crate::kernels::Float;

/// Computes the point at time 1 on the geodesic that starts at x with velocity v.
///
/// ```text
/// exp_x(v) = x ⊕ tanh(t) v/(√c|v|),  t = √c λ|v|/2        x + v at c = 0, where λ = 2
/// ```
///
/// v is any vector. 1 − tanh²(t), which matters close to the boundary, is computed directly, not from
/// tanh(t). From λ|v|√c of about 37 (17 for `f32`) on, the result is the last point inside. (Ganea et al.
/// 2018, arXiv:1805.09112.)
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for vectors of different lengths,
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a c that is negative or not finite,
/// [`Error::Domain`](crate::Error::Domain) for a point outside the ball.
pub fn exp_map<F: Float>(x: &[F], v: &[F], c: F, out: &mut [F]) -> Result<()> {
    let (ball, n) = (Ball::new(c)?, x.len());
    check_lengths(n, &[("v", v.len()), ("out", out.len())])?;
    let ax = ball.alpha("x", x)?;
    let step = Step::new(ball, norm_of(v), ax);
    let sum = step.addition(ball, x, v, ax);
    ball.assign_point(out, |i| sum.value(i));
    Ok(())
}

/// Computes the vector–Jacobian product of [`exp_map`]: adds to `grad_x` and `grad_v` and returns the
/// derivative with respect to c.
///
/// Differentiates exp_x(v) = x ⊕ w, w = tanh(t) v/(√c|v|), t = √c|v|/αx.
///
/// # Errors
/// As [`exp_map`].
pub fn exp_map_vjp<F: Float>(
    x: &[F],
    v: &[F],
    c: F,
    grad_out: &[F],
    grad_x: &mut [F],
    grad_v: &mut [F],
) -> Result<F> {
    let (ball, n) = (Ball::new(c)?, x.len());
    let lengths = [("grad_out", grad_out.len()), ("grad_x", grad_x.len())];
    check_lengths(n, &[("v", v.len()), lengths[0], lengths[1], ("grad_v", grad_v.len())])?;
    let ax = ball.alpha("x", x)?;
    let (v_norm, x_norm) = (norm_of(v), norm_of(x));
    let step = Step::new(ball, v_norm, ax);
    let g = |i: usize| grad_out[i].as_f64();
    let vjp = step.addition(ball, x, v, ax).vjp(n, g);

    // Along v, w grows by sech²(t)/αx; across v, by its own length.
    let grad_w = |i| vjp.grad_y(g(i), i);
    add(grad_v, stretch(n, |i| v[i].as_f64(), v_norm, grad_w, step.sech2 / ax, step.scale));
    let grad_w_v = sum(n, |i| grad_w(i) * v[i].as_f64());
    let of_alpha = -step.sech2 / ax * grad_w_v / ax;
    add(grad_x, |i| vjp.grad_x(g(i), i) - 2.0 * ball.c * x[i].as_f64() * of_alpha);
    let of_step = step.scale_by_c(ball) * grad_w_v;
    if step.t > 0.25 {
        return Ok(F::from_f64(vjp.grad_c + of_step - x_norm * x_norm * of_alpha));
    }

    // For a short step the first and the last term cancel, up to the square of its length: in their sum
    // −|z|² g·e/den² + (|x|² sech²(t)/(ratio den)) (g·w − 2c z·w g·e/den + 2c|w|² g·(x ⊕ w)), the factor
    // of g·w is computed from parts that are all small.
    let (c, to) = (ball.c, &vjp.sum);
    let (den, ratio) = (to.den, step.scale * ax);
    let [g_x, g_w] = [dot(grad_out, x), step.scale * dot(grad_out, v)];
    let dot_w = |a: &dyn Fn(usize) -> f64| sum(n, |i| a(i) * to.y(i));
    let (x_w, z_w, w2) = (dot_w(&|i| to.x(i)), dot_w(&|i| to.z(i)), dot_w(&|i| to.y(i)));
    let x2 = x_norm * x_norm;
    let den_less_1 = 2.0 * c * x_w + (c * x2) * (c * w2);
    let length = step.v_norm / ax;
    // sech² − ratio = 2τ ratio'(τ)
    let sech2_less_ratio = 2.0 * ball.c_norm2(length) * tanh_ratio_derivative(step.t);
    let of_g_w = x2 * (sech2_less_ratio + step.sech2 * den_less_1) - (2.0 * x_w + w2) * ratio;
    let rest = x2 * step.sech2 / (ratio * den) * (2.0 * c * w2 * vjp.g_w - z_w * vjp.of_z)
        - to.z2 / den * c * w2 * g_x / den;
    let of_sum = w2 * vjp.g_w * ax / den;
    Ok(F::from_f64(of_sum + of_step + g_w * of_g_w / (ratio * den * den) + rest))
}

/// tanh(t) v/(√c|v|) = `scale` · v with t = √c|v|/α.
pub(super) struct Step {
    v_norm: f64,
    alpha: f64,
    t: f64,
    pub(super) scale: f64,
    pub(super) sech2: f64,
}

impl Step {
    pub(super) fn new(ball: Ball, v_norm: f64, alpha: f64) -> Self {
        let t = ball.root * v_norm / alpha;
        // The second form is also used if t overflows.
        let scale = if t < 1.0 { tanh_ratio(t) / alpha } else { t.tanh() / (ball.root * v_norm) };
        Self { v_norm, alpha, t, scale, sech2: sech2(t) }
    }

    /// d scale/dc.
    pub(super) fn scale_by_c(&self, ball: Ball) -> f64 {
        if self.t < 1.0 {
            let length = self.v_norm / self.alpha;
            tanh_ratio_derivative(self.t) * length * length / self.alpha
        } else {
            (self.sech2 / self.alpha - self.scale) / (2.0 * ball.c)
        }
    }

    /// x ⊕ (scale · v)
    fn addition<'a, F: Float>(
        &self,
        ball: Ball,
        x: &'a [F],
        v: &'a [F],
        ax: f64,
    ) -> Addition<impl Fn(usize) -> f64 + 'a, impl Fn(usize) -> f64 + 'a> {
        let scale = self.scale;
        let x_side = (|i: usize| x[i].as_f64(), ax, norm_of(x));
        let w_side = (move |i: usize| scale * v[i].as_f64(), self.sech2, scale * self.v_norm);
        Addition::new(ball, x.len(), x_side, w_side)
    }
}

/// Computes the velocity at x of the geodesic that is at y at time 1: the inverse of [`exp_map`].
///
/// ```text
/// log_x(y) = (2/(√c λ)) artanh(√c|−x ⊕ y|) (−x ⊕ y)/|−x ⊕ y|        λ = 2/αx, α = 1 − c|·|²
///          = (h(q)/αy) (αx z − c|z|² x)                             z = y − x; y − x at c = 0
/// q = c|z|²/(αx αy),  h(q) = asinh(√q)/√(q(1 + q))
/// ```
///
/// The second form is used: nothing in it cancels except y − x, and λ|log_x(y)| equals the distance up to
/// a few ulps. (Ganea et al. 2018, arXiv:1805.09112.)
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for vectors of different lengths,
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a c that is negative or not finite,
/// [`Error::Domain`](crate::Error::Domain) for a point outside the ball.
pub fn log_map<F: Float>(x: &[F], y: &[F], c: F, out: &mut [F]) -> Result<()> {
    let (ball, n) = (Ball::new(c)?, x.len());
    check_lengths(n, &[("y", y.len()), ("out", out.len())])?;
    let (ax, ay) = (ball.alpha("x", x)?, ball.alpha("y", y)?);
    let z = |i: usize| y[i].as_f64() - x[i].as_f64();
    let cz2 = ball.c_norm2(norm(n, z));
    let scale = log_ratio(cz2 / (ax * ay)) / ay;
    assign(out, |i| scale * (ax * z(i) - cz2 * x[i].as_f64()));
    Ok(())
}

/// Computes the vector–Jacobian product of [`log_map`]: adds to the gradients of the points and returns
/// the derivative with respect to c.
///
/// Differentiates log_x(y) = (h(q)/αy) N, N = αx z − c|z|² x, q = c|z|²/(αx αy), z = y − x.
///
/// # Errors
/// As [`log_map`].
pub fn log_map_vjp<F: Float>(
    x: &[F],
    y: &[F],
    c: F,
    grad_out: &[F],
    grad_x: &mut [F],
    grad_y: &mut [F],
) -> Result<F> {
    let (ball, n) = (Ball::new(c)?, x.len());
    let lengths = [("grad_out", grad_out.len()), ("grad_x", grad_x.len())];
    check_lengths(n, &[("y", y.len()), lengths[0], lengths[1], ("grad_y", grad_y.len())])?;
    let (ax, ay) = (ball.alpha("x", x)?, ball.alpha("y", y)?);
    let z = |i: usize| y[i].as_f64() - x[i].as_f64();
    let g = |i: usize| grad_out[i].as_f64();
    let z_norm = norm(n, z);
    let cz2 = ball.c_norm2(z_norm);
    let q = cz2 / (ax * ay);
    let h = log_ratio(q);
    let (slope, of_product) = log_ratio_derivatives(q, h);

    let (g_x, g_z) = (dot(grad_out, x), sum(n, |i| g(i) * z(i)));
    let g_n = sum(n, |i| g(i) * (ax * z(i) - cz2 * x[i].as_f64()));
    // The derivatives with respect to c|z|², αx and αy; in each the parts that would cancel for large q
    // are combined by (q h)' = h + q h'.
    let of_cz2 = slope * g_z / ay / ay - of_product * g_x / ay;
    let of_ax = (2.0 * h - of_product) * g_z / ay + q * q * slope * g_x;
    let of_ay = -of_product * g_n / ay / ay;
    let (direct, shift) = (h * ax / ay, h * cz2 / ay);
    let of_z = |i| direct * g(i) + 2.0 * ball.c * of_cz2 * z(i);
    add(grad_x, |i| -of_z(i) - shift * g(i) - 2.0 * ball.c * of_ax * x[i].as_f64());
    add(grad_y, |i| of_z(i) - 2.0 * ball.c * of_ay * y[i].as_f64());
    let square = |norm: f64| norm * norm;
    let of_c = square(z_norm) * of_cz2 - square(norm_of(x)) * of_ax - square(norm_of(y)) * of_ay;
    Ok(F::from_f64(of_c))
}

/// Computes the point at time 1 on the geodesic that starts at the origin with velocity v.
///
/// ```text
/// exp₀(v) = tanh(√c|v|) v/(√c|v|)        v at c = 0
/// ```
///
/// Accurate to a few ulps; from √c|v| of about 19 (9 for `f32`) on, the result is the last point inside.
/// (Ganea et al. 2018, arXiv:1805.09112.)
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for vectors of different lengths,
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a c that is negative or not finite.
pub fn exp_map_origin<F: Float>(v: &[F], c: F, out: &mut [F]) -> Result<()> {
    let ball = Ball::new(c)?;
    check_lengths(v.len(), &[("out", out.len())])?;
    let step = Step::new(ball, norm_of(v), 1.0);
    ball.assign_point(out, |i| step.scale * v[i].as_f64());
    Ok(())
}

/// Computes the vector–Jacobian product of [`exp_map_origin`]: adds to `grad_v` and returns the
/// derivative with respect to c.
///
/// Differentiates exp₀(v) = tanh(t) v/t, t = √c|v|.
///
/// # Errors
/// As [`exp_map_origin`].
pub fn exp_map_origin_vjp<F: Float>(v: &[F], c: F, grad_out: &[F], grad_v: &mut [F]) -> Result<F> {
    let (ball, n) = (Ball::new(c)?, v.len());
    check_lengths(n, &[("grad_out", grad_out.len()), ("grad_v", grad_v.len())])?;
    let v_norm = norm_of(v);
    let step = Step::new(ball, v_norm, 1.0);
    let g = |i: usize| grad_out[i].as_f64();
    add(grad_v, stretch(n, |i| v[i].as_f64(), v_norm, g, step.sech2, step.scale));
    Ok(F::from_f64(step.scale_by_c(ball) * dot(grad_out, v)))
}

/// Computes the velocity at the origin of the geodesic that is at y at time 1: the inverse of
/// [`exp_map_origin`].
///
/// ```text
/// log₀(y) = artanh(√c|y|) y/(√c|y|)        y at c = 0
/// ```
///
/// Accurate to a few ulps, also close to the boundary, where artanh is computed from 1 − c|y|².
/// (Ganea et al. 2018, arXiv:1805.09112.)
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for vectors of different lengths,
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a c that is negative or not finite,
/// [`Error::Domain`](crate::Error::Domain) for a point outside the ball.
pub fn log_map_origin<F: Float>(y: &[F], c: F, out: &mut [F]) -> Result<()> {
    let ball = Ball::new(c)?;
    check_lengths(y.len(), &[("out", out.len())])?;
    let alpha = ball.alpha("y", y)?;
    let scale = artanh_ratio(ball.root * norm_of(y), alpha);
    assign(out, |i| scale * y[i].as_f64());
    Ok(())
}

/// Computes the vector–Jacobian product of [`log_map_origin`]: adds to `grad_y` and returns the
/// derivative with respect to c.
///
/// Differentiates log₀(y) = artanh(r) y/r, r = √c|y|.
///
/// # Errors
/// As [`log_map_origin`].
pub fn log_map_origin_vjp<F: Float>(y: &[F], c: F, grad_out: &[F], grad_y: &mut [F]) -> Result<F> {
    let (ball, n) = (Ball::new(c)?, y.len());
    check_lengths(n, &[("grad_out", grad_out.len()), ("grad_y", grad_y.len())])?;
    let alpha = ball.alpha("y", y)?;
    let y_norm = norm_of(y);
    let r = ball.root * y_norm;
    let g = |i: usize| grad_out[i].as_f64();
    let across = artanh_ratio(r, alpha);
    add(grad_y, stretch(n, |i| y[i].as_f64(), y_norm, g, alpha.recip(), across));
    Ok(F::from_f64(dot(grad_out, y) * y_norm * y_norm * artanh_ratio_derivative(r, alpha)))
}
