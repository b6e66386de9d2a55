//! Points on geodesics.

use super::ball::{Ball, add, check_lengths, dot, norm, norm_of, stretch, sum};
use super::radial::{asinh_ratio, log_ratio, tanh_ratio};
use super::transport::Gyration;
use crate::error::{Error, Result};
use crate::kernels::Float;

/// Computes the point at time t on the geodesic that is at x at time 0 and at y at time 1.
///
/// ```text
/// γ(t) = x ⊕ (t ⊗ (−x ⊕ y)) = exp_x(t log_x(y))        x + t (y − x) at c = 0
///      = x + (b λy (y − x) − μ x)/(a λx + b λy + μ)
/// a = sinh((1 − t) δ)/sinh δ,  b = sinh(t δ)/sinh δ,  μ = 1 − a − b,  δ = √c d(x, y),  λ = 2/(1 − c|·|²)
/// ```
///
/// The second form is used, or the same form from y if t > ½: it combines both points on the hyperboloid.
/// For t from 0 to 1 nothing in it cancels except y − x, so γ(t) is accurate to a few ulps of its
/// coordinates wherever x and y are. In contrast, exp_x(t log_x(y)) loses digits if x is close to the
/// boundary, because its direction is rounded. Other t go beyond x and y, and the error of the directions
/// then grows with the distance. γ(0) is x and γ(1) is y. (Ungar 2009.)
///
/// # Errors
/// [`Error::Shape`] for vectors of different lengths, [`Error::InvalidArgument`] for a c that is negative
/// or not finite, or an infinite t, [`Error::Domain`] for a point outside the ball.
pub fn geodesic<F: Float>(x: &[F], y: &[F], t: F, c: F, out: &mut [F]) -> Result<()> {
    let (ball, n) = (Ball::new(c)?, x.len());
    check_lengths(n, &[("y", y.len()), ("out", out.len())])?;
    let course = Course::new(ball, x, y, t)?;
    ball.assign_point(out, |i| course.point(x[i], y[i]));
    Ok(())
}

/// Computes the vector–Jacobian product of [`geodesic`]: adds to the gradients of the points and returns
/// the derivatives with respect to t and c.
///
/// Differentiates γ(t) = exp_x(t log_x(y)).
///
/// ```text
/// ∂γ/∂x = P ((1 − t) ∥ + a ⊥),  ∂γ/∂y = P' (t ∥ + b ⊥),  ∂γ/∂t = P log_x(y)
/// ```
///
/// where P and P' are the parallel transports from x and from y to γ(t), and ∥ and ⊥ are the components
/// of a vector along the geodesic and orthogonal to it (Jacobi fields).
///
/// # Errors
/// As [`geodesic`].
pub fn geodesic_vjp<F: Float>(
    x: &[F],
    y: &[F],
    t: F,
    c: F,
    grad_out: &[F],
    grad_x: &mut [F],
    grad_y: &mut [F],
) -> Result<(F, F)> {
    let (ball, n) = (Ball::new(c)?, x.len());
    let lengths = [("grad_out", grad_out.len()), ("grad_x", grad_x.len())];
    check_lengths(n, &[("y", y.len()), lengths[0], lengths[1], ("grad_y", grad_y.len())])?;
    let course = Course::new(ball, x, y, t)?;
    let Course { t, ax, ay, z_norm, a, b, mu, den, unit, .. } = course;
    let g = |i: usize| grad_out[i].as_f64();
    let z = |i: usize| y[i].as_f64() - x[i].as_f64();
    let minus_point = |i: usize| -course.point(x[i], y[i]);

    // The gradient, transported from γ(t) to either end.
    let alpha = (2.0 * unit / den).max(1e-289);
    let carried = |end: &[F], of_end: f64, from_point: &dyn Fn(usize) -> f64| -> Vec<f64> {
        let end = |i: usize| end[i].as_f64();
        let gyration = Gyration::new(ball, n, (end, of_end), (minus_point, alpha), from_point, g);
        (0..n).map(|i| gyration.value(i) * 2.0 / of_end / den).collect()
    };
    let from_x = carried(x, ax, &|i| course.x_from_point(x[i], y[i]));
    let from_y = carried(y, ay, &|i| course.y_from_point(x[i], y[i]));
    let cz2 = ball.c_norm2(z_norm);
    let at_x = |i: usize| ax * z(i) - cz2 * x[i].as_f64();
    let at_y = |i: usize| ay * z(i) + cz2 * y[i].as_f64();
    let along = [(1.0 - t) * unit, t * unit];
    add(grad_x, stretch(n, at_x, norm(n, at_x), |i| from_x[i], along[0], a));
    add(grad_y, stretch(n, at_y, norm(n, at_y), |i| from_y[i], along[1], b));
    let log = log_ratio(cz2 / (ax * ay)) / ay;
    let grad_t = unit * log * sum(n, |i| from_x[i] * at_x(i));

    // Through the weights and λ, with terms combined that would cancel for x close to y.
    let [g_x, g_y] = [dot(grad_out, x), dot(grad_out, y)];
    let g_z = sum(n, |i| g(i) * z(i));
    let g_point = -sum(n, |i| g(i) * minus_point(i));
    let [x2, y2] = [norm_of(x), norm_of(y)].map(|norm| norm * norm);
    let z_sum = sum(n, |i| z(i) * (x[i].as_f64() + y[i].as_f64()));
    let (lx, ly) = (2.0 / ax, 2.0 / ay);
    let derivatives = course.derivatives(ball);
    // c dδ/dc = tanh(δ/2) (1 + c|x|²/αx + c|y|²/αy)
    let growth = 1.0 + ball.c * (x2 / ax + y2 / ay);
    let between = a * b * z_sum * lx * ly / 4.0 - derivatives.between * growth;
    let [of_a, of_b] = derivatives.weights;
    let by_mu = course.mu_by_c * growth * (of_a * lx * g_x + of_b * ly * g_y)
        + mu * (a * lx * lx * x2 * g_x + b * ly * ly * y2 * g_y) / 2.0;
    let grad_c = (lx / den) * (ly / den) * g_z * between + by_mu / den / den
        - derivatives.of_mu * growth * g_point / den;
    Ok((F::from_f64(grad_t), F::from_f64(grad_c)))
}

/// A geodesic and a time. Beyond x and y the weights may overflow, so a, b, μ, `unit` and `den` are all
/// multiplied by a common factor.
struct Course {
    t: f64,
    /// 1 − c|·|² of x and y.
    ax: f64,
    ay: f64,
    z_norm: f64,
    /// |z|/√(αx αy) = sinh(δ/2)/√c, and δ.
    p: f64,
    delta: f64,
    a: f64,
    b: f64,
    mu: f64,
    mu_by_c: f64,
    /// a λx + b λy + μ, the λ of γ(t).
    den: f64,
    /// 1 times the common factor.
    unit: f64,
}

/// The factors of the weights in the derivative with respect to c, as functions of δ.
struct Derivatives {
    /// (a' b − a b')/c times tanh(δ/2).
    between: f64,
    /// [a', b'] times tanh(δ/2), which are multiplied by μ/c.
    weights: [f64; 2],
    /// μ'/c times tanh(δ/2).
    of_mu: f64,
}

impl Course {
    fn new<F: Float>(ball: Ball, x: &[F], y: &[F], t: F) -> Result<Self> {
        if t.is_infinite() {
            return Err(Error::config("t", "a finite number", t));
        }
        let (ax, ay, t) = (ball.alpha("x", x)?, ball.alpha("y", y)?, t.as_f64());
        let z_norm = norm(x.len(), |i| y[i].as_f64() - x[i].as_f64());
        let p = z_norm / (ax * ay).sqrt();
        let sinh2 = ball.c_norm2(p);
        let delta = 2.0 * sinh2.sqrt().asinh();
        // Weights relative to the largest exponential.
        let shrinks = [-delta * t.clamp(0.0, 1.0), -delta * (1.0 - t).clamp(0.0, 1.0)];
        let [a, b] = [sinh_ratio(1.0 - t, delta, shrinks[0]), sinh_ratio(t, delta, shrinks[1])];
        let halves = sinh_ratio(1.0 - t, 0.5 * delta, 0.5 * shrinks[0])
            * sinh_ratio(t, 0.5 * delta, 0.5 * shrinks[1]);
        let mu = 2.0 * sinh2 / (1.0 + sinh2).sqrt() * halves;
        let mu_by_c = 2.0 * p * p / (1.0 + sinh2).sqrt() * halves;
        let beyond = (t.abs().max((1.0 - t).abs()) - 1.0).max(0.0);
        let unit = (-beyond * delta).exp();
        let (of_x, of_y) = (2.0 * a / ax, 2.0 * b / ay);
        // At least the possible rounding error.
        let least = 0.25 * f64::EPSILON * (of_x.abs() + of_y.abs());
        let den = of_x + of_y + mu;
        let den = if den < least.max(2.0 * unit) { least.max(2.0 * unit) } else { den };
        Ok(Self { t, ax, ay, z_norm, p, delta, a, b, mu, mu_by_c, den, unit })
    }

    /// Computes a coordinate of γ(t).
    fn point<F: Float>(&self, x: F, y: F) -> f64 {
        if self.t <= 0.5 {
            x.as_f64() - self.x_from_point(x, y)
        } else {
            y.as_f64() - self.y_from_point(x, y)
        }
    }

    /// x − γ(t)
    fn x_from_point<F: Float>(&self, x: F, y: F) -> f64 {
        let (x, y) = (x.as_f64(), y.as_f64());
        (self.mu * x - 2.0 * self.b / self.ay * (y - x)) / self.den
    }

    /// y − γ(t)
    fn y_from_point<F: Float>(&self, x: F, y: F) -> f64 {
        let (x, y) = (x.as_f64(), y.as_f64());
        (self.mu * y + 2.0 * self.a / self.ax * (y - x)) / self.den
    }

    fn derivatives(&self, ball: Ball) -> Derivatives {
        let Self { t, p, delta, a, b, unit, .. } = *self;
        let sinh2 = ball.c_norm2(p);
        let cosh2 = 1.0 + sinh2;
        let shrinks = [t.clamp(0.0, 1.0), (1.0 - t).clamp(0.0, 1.0)];
        // cosh((1 − t) δ) and cosh(t δ)
        let cosh = |k: f64, shrink: f64| {
            0.5 * (delta * (1.0 - shrink)).exp() * (1.0 + (-2.0 * k.abs() * delta).exp())
        };
        let [cosh_a, cosh_b] = [cosh(1.0 - t, shrinks[0]), cosh(t, shrinks[1])];
        // a' = ((2 − t) b/sinh δ − t (a coth δ + cosh((1 − t) δ)/sinh δ))/2, and tanh(δ/2)/sinh δ is
        // 1/(2 cosh²(δ/2)); the same for b' from the other end.
        let weight = |t: f64, a: f64, b: f64, cosh: f64| {
            ((2.0 - t) * b - t * (a * (cosh2 + sinh2) + cosh)) / (4.0 * cosh2)
        };
        let weights = [weight(t, a, b, cosh_a), weight(1.0 - t, b, a, cosh_b)];

        // (a' b − a b') sinh² δ = (k sinh δ − sinh(k δ))/2, k = 1 − 2t.
        let k = 1.0 - 2.0 * t;
        let length = 2.0 * p * asinh_ratio(sinh2);
        let tanh = 0.5 * tanh_ratio(0.5 * delta); // tanh(δ/2)/δ
        let between = if delta < 1.0 && (k * delta).abs() < 1.0 {
            // k (1 − k²) δ³ Σ (1 + k² + … + k²ⁿ⁻²) δ²ⁿ⁻²/(2n + 1)!
            let (mut power, mut powers, mut term, mut series) = (1.0, 0.0, 1.0, 0.0);
            for n in 1..=10 {
                let n = f64::from(n);
                powers += power;
                power *= k * k;
                term /= 2.0 * n * (2.0 * n + 1.0);
                series += powers * term;
                term *= delta * delta;
            }
            let by_sinh = if delta == 0.0 { 1.0 } else { delta / delta.sinh() };
            k * 4.0 * t * (1.0 - t) * series * (by_sinh * unit).powi(2) * tanh
        } else {
            let sinh = delta.sinh();
            let difference = if k.abs() < 0.5 {
                let inner = k * delta;
                let ratio = if inner == 0.0 { 1.0 } else { inner.sinh() / inner };
                k * (1.0 - delta / sinh * ratio)
            } else if k > 0.0 {
                2.0 * (b * cosh_a - t * unit * unit)
            } else {
                2.0 * ((1.0 - t) * unit * unit - a * cosh_b)
            };
            difference / sinh * tanh / delta
        };
        Derivatives {
            between: 0.5 * between * length * length,
            weights,
            of_mu: p * p / cosh2 * ((1.0 - t) * b + t * a),
        }
    }
}

/// Computes sinh(k δ)/sinh δ for δ ≥ 0, with e^{shrink} instead of e^{(|k| − 1) δ}.
fn sinh_ratio(k: f64, delta: f64, shrink: f64) -> f64 {
    if delta * k.abs().max(1.0) < 1e-8 {
        return k;
    }
    let ratio = (-2.0 * k.abs() * delta).exp_m1() / (-2.0 * delta).exp_m1();
    shrink.exp() * ratio.copysign(k)
}
