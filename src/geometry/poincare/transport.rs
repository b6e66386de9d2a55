//! Gyration and parallel transport.

use super::ball::{Ball, add, assign, check_lengths, norm, sum};
use crate::error::Result;
use crate::kernels::Float;

/// gyr[a, b] v for any source of coordinates; z = a + b may be more accurate than the coordinates of a
/// and b.
pub(super) struct Gyration<A, B, Z, V> {
    n: usize,
    c: f64,
    a: A,
    b: B,
    z: Z,
    v: V,
    aa: f64,
    ab: f64,
    /// |a|², |b|², |z|², c|a|² and c|z|².
    a2: f64,
    b2: f64,
    z2: f64,
    ca2: f64,
    cz2: f64,
    den: f64,
    /// 2c/den, and products with v.
    factor: f64,
    a_v: f64,
    b_v: f64,
    z_v: f64,
    p: f64,
    q: f64,
}

/// Gradients as combinations of vectors.
pub(super) struct GyrationVjp {
    /// The gradient of a: multiples of g, v, a, b and z; the same for b.
    of_a: [f64; 5],
    of_b: [f64; 5],
    /// The gradient of v is g + multiples of a, b and z.
    of_v: [f64; 3],
    of_c: f64,
}

impl<A, B, Z, V> Gyration<A, B, Z, V>
where
    A: Fn(usize) -> f64,
    B: Fn(usize) -> f64,
    Z: Fn(usize) -> f64,
    V: Fn(usize) -> f64,
{
    pub(super) fn new(
        ball: Ball,
        n: usize,
        (a, aa): (A, f64),
        (b, ab): (B, f64),
        z: Z,
        v: V,
    ) -> Self {
        let (a_norm, b_norm, z_norm) = (norm(n, &a), norm(n, &b), norm(n, &z));
        let (ca2, cz2) = (ball.c_norm2(a_norm), ball.c_norm2(z_norm));
        let den = aa * ab + cz2;
        let a_v = sum(n, |i| a(i) * v(i));
        let b_v = sum(n, |i| b(i) * v(i));
        let z_v = sum(n, |i| z(i) * v(i));
        let (p, q) = (ab * z_v + cz2 * b_v, aa * a_v + ca2 * z_v);
        let [a2, b2, z2] = [a_norm, b_norm, z_norm].map(|norm| norm * norm);
        let factor = 2.0 * ball.c / den;
        let c = ball.c;
        Self { n, c, a, b, z, v, aa, ab, a2, b2, z2, ca2, cz2, den, factor, a_v, b_v, z_v, p, q }
    }

    /// v + (2c/den)(p a − q z)
    pub(super) fn value(&self, i: usize) -> f64 {
        (self.v)(i) + self.factor * (self.p * (self.a)(i) - self.q * (self.z)(i))
    }

    fn vjp(&self, g: impl Fn(usize) -> f64) -> GyrationVjp {
        // If b is short, p a and q z are nearly the same.
        if self.b2 < self.a2 / 16.0 { self.short_b_vjp(g) } else { self.usual_vjp(g) }
    }

    fn usual_vjp(&self, g: impl Fn(usize) -> f64) -> GyrationVjp {
        let Self { c, aa, ab, ca2, cz2, factor, .. } = *self;
        let g_a = sum(self.n, |i| g(i) * (self.a)(i));
        let g_z = sum(self.n, |i| g(i) * (self.z)(i));
        let turn = (self.p * g_a - self.q * g_z) / self.den;
        let of_aa = factor * (g_z * self.b_v - turn * ab);
        let of_ab = factor * (g_a * self.z_v - turn * aa);
        let of_cz2 = factor * (g_a * self.b_v - turn);
        // The part of both gradients that comes from z = a + b.
        let (g_by_z, v_by_z) = (-factor * self.q, factor * (g_a * ab - g_z * ca2));
        let z_by_z = 2.0 * c * of_cz2;
        GyrationVjp {
            of_a: [
                g_by_z + factor * self.p,
                v_by_z - factor * g_z * aa,
                -2.0 * c * of_aa,
                0.0,
                z_by_z,
            ],
            of_b: [g_by_z, v_by_z + factor * g_a * cz2, 0.0, -2.0 * c * of_ab, z_by_z],
            of_v: [-factor * g_z * aa, factor * g_a * cz2, factor * (g_a * ab - g_z * ca2)],
            of_c: 2.0 * turn + self.z2 * of_cz2 - self.a2 * of_aa - self.b2 * of_ab,
        }
    }

    /// The same for gyr[a, b] v = v + 2(s a − t b)/den with everything expanded, so that all terms are as
    /// short as b:
    ///
    /// ```text
    /// s = c b·v (1 + 2c a·b) − c² a·v |b|²,  t = c a·v + c² b·v |a|²,  den = 1 + 2c a·b + c²|a|²|b|²
    /// ```
    fn short_b_vjp(&self, g: impl Fn(usize) -> f64) -> GyrationVjp {
        let Self { n, c, a2, b2, a_v, b_v, .. } = *self;
        let a_b = sum(n, |i| (self.a)(i) * (self.b)(i));
        let g_a = sum(n, |i| g(i) * (self.a)(i));
        let g_b = sum(n, |i| g(i) * (self.b)(i));
        let one = 1.0 + 2.0 * c * a_b;
        let (s, t) = (c * (b_v * one - c * a_v * b2), c * (a_v + c * b_v * a2));
        let k = 2.0 / (one + (c * a2) * (c * b2));
        // Minus the derivative with respect to den.
        let of_den = k * k / 2.0 * (s * g_a - t * g_b);
        let of_a_v = -k * c * (c * b2 * g_a + g_b);
        let of_b_v = k * c * (one * g_a - c * a2 * g_b);
        let of_a_b = 2.0 * c * (k * c * b_v * g_a - of_den);
        let of_a2 = -c * c * (k * b_v * g_b + b2 * of_den);
        let of_b2 = -c * c * (k * a_v * g_a + a2 * of_den);
        let of_s = b_v + 4.0 * c * a_b * b_v - 2.0 * c * a_v * b2;
        let of_t = a_v + 2.0 * c * b_v * a2;
        GyrationVjp {
            of_a: [k * s, of_a_v, 2.0 * of_a2, of_a_b, 0.0],
            of_b: [-k * t, of_b_v, of_a_b, 2.0 * of_b2, 0.0],
            of_v: [of_a_v, of_b_v, 0.0],
            of_c: k * (of_s * g_a - of_t * g_b) - of_den * 2.0 * (a_b + c * a2 * b2),
        }
    }

    fn grad_point(&self, of: &[f64; 5], g: f64, i: usize) -> f64 {
        let (a, b, z) = ((self.a)(i), (self.b)(i), (self.z)(i));
        of[0] * g + of[1] * (self.v)(i) + of[2] * a + of[3] * b + of[4] * z
    }

    fn grad_v(&self, vjp: &GyrationVjp, g: f64, i: usize) -> f64 {
        let [of_a, of_b, of_z] = vjp.of_v;
        g + of_a * (self.a)(i) + of_b * (self.b)(i) + of_z * (self.z)(i)
    }
}

/// Computes the gyration of v by a and b: the rotation by which Möbius addition fails to be associative.
///
/// ```text
/// gyr[a, b] v = −(a ⊕ b) ⊕ (a ⊕ (b ⊕ v))        linear in v
///             = v + (2c/den)(p a − q z)          v at c = 0
/// z = a + b,  α = 1 − c|·|²,  den = αa αb + c|z|²
/// p = αb z·v + c|z|² b·v,  q = αa a·v + c|a|² z·v
/// ```
///
/// a and b are points of the ball, v is any vector. The second form is used: if den is small, so are p
/// and q, and nothing in it cancels except a + b. (Ungar 2009.)
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for vectors of different lengths,
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a c that is negative or not finite,
/// [`Error::Domain`](crate::Error::Domain) for a point outside the ball.
pub fn gyration<F: Float>(a: &[F], b: &[F], v: &[F], c: F, out: &mut [F]) -> Result<()> {
    let (ball, n) = (Ball::new(c)?, a.len());
    check_lengths(n, &[("b", b.len()), ("v", v.len()), ("out", out.len())])?;
    let a_side = (|i: usize| a[i].as_f64(), ball.alpha("a", a)?);
    let b_side = (|i: usize| b[i].as_f64(), ball.alpha("b", b)?);
    let z = |i: usize| a[i].as_f64() + b[i].as_f64();
    let gyration = Gyration::new(ball, n, a_side, b_side, z, |i: usize| v[i].as_f64());
    assign(out, |i| gyration.value(i));
    Ok(())
}

/// Computes the vector–Jacobian product of [`gyration`]: adds to the gradients of the arrays and returns
/// the derivative with respect to c.
///
/// Differentiates gyr[a, b] v = v + (2c/den)(p a − q z).
///
/// # Errors
/// As [`gyration`].
#[allow(clippy::too_many_arguments, reason = "three vectors and their gradients")]
pub fn gyration_vjp<F: Float>(
    a: &[F],
    b: &[F],
    v: &[F],
    c: F,
    grad_out: &[F],
    grad_a: &mut [F],
    grad_b: &mut [F],
    grad_v: &mut [F],
) -> Result<F> {
    let (ball, n) = (Ball::new(c)?, a.len());
    check_lengths(n, &[("b", b.len()), ("v", v.len()), ("grad_out", grad_out.len())])?;
    let grads = [("grad_a", grad_a.len()), ("grad_b", grad_b.len()), ("grad_v", grad_v.len())];
    check_lengths(n, &grads)?;
    let a_side = (|i: usize| a[i].as_f64(), ball.alpha("a", a)?);
    let b_side = (|i: usize| b[i].as_f64(), ball.alpha("b", b)?);
    let z = |i: usize| a[i].as_f64() + b[i].as_f64();
    let gyration = Gyration::new(ball, n, a_side, b_side, z, |i: usize| v[i].as_f64());
    let g = |i: usize| grad_out[i].as_f64();
    let vjp = gyration.vjp(g);
    add(grad_a, |i| gyration.grad_point(&vjp.of_a, g(i), i));
    add(grad_b, |i| gyration.grad_point(&vjp.of_b, g(i), i));
    add(grad_v, |i| gyration.grad_v(&vjp, g(i), i));
    Ok(F::from_f64(vjp.of_c))
}

/// Transports the vector v from x to y along the geodesic.
///
/// ```text
/// P(v) = (λx/λy) gyr[y, −x] v = (αy/αx) gyr[y, −x] v        v at c = 0
/// ```
///
/// Preserves lengths and angles: λy|P(v)| = λx|v| up to a few ulps. (Ganea et al. 2018,
/// arXiv:1805.09112.)
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for vectors of different lengths,
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a c that is negative or not finite,
/// [`Error::Domain`](crate::Error::Domain) for a point outside the ball.
pub fn parallel_transport<F: Float>(x: &[F], y: &[F], v: &[F], c: F, out: &mut [F]) -> Result<()> {
    let (ball, n) = (Ball::new(c)?, x.len());
    check_lengths(n, &[("y", y.len()), ("v", v.len()), ("out", out.len())])?;
    let (ax, ay) = (ball.alpha("x", x)?, ball.alpha("y", y)?);
    let y_side = (|i: usize| y[i].as_f64(), ay);
    let x_side = (|i: usize| -x[i].as_f64(), ax);
    let z = |i: usize| y[i].as_f64() - x[i].as_f64();
    let gyration = Gyration::new(ball, n, y_side, x_side, z, |i: usize| v[i].as_f64());
    assign(out, |i| ay / ax * gyration.value(i));
    Ok(())
}

/// Computes the vector–Jacobian product of [`parallel_transport`]: adds to the gradients of the arrays
/// and returns the derivative with respect to c.
///
/// Differentiates P(v) = (αy/αx) gyr[y, −x] v.
///
/// # Errors
/// As [`parallel_transport`].
#[allow(clippy::too_many_arguments, reason = "three vectors and their gradients")]
pub fn parallel_transport_vjp<F: Float>(
    x: &[F],
    y: &[F],
    v: &[F],
    c: F,
    grad_out: &[F],
    grad_x: &mut [F],
    grad_y: &mut [F],
    grad_v: &mut [F],
) -> Result<F> {
    let (ball, n) = (Ball::new(c)?, x.len());
    check_lengths(n, &[("y", y.len()), ("v", v.len()), ("grad_out", grad_out.len())])?;
    let grads = [("grad_x", grad_x.len()), ("grad_y", grad_y.len()), ("grad_v", grad_v.len())];
    check_lengths(n, &grads)?;
    let (ax, ay) = (ball.alpha("x", x)?, ball.alpha("y", y)?);
    let y_side = (|i: usize| y[i].as_f64(), ay);
    let x_side = (|i: usize| -x[i].as_f64(), ax);
    let z = |i: usize| y[i].as_f64() - x[i].as_f64();
    let gyration = Gyration::new(ball, n, y_side, x_side, z, |i: usize| v[i].as_f64());
    let g = |i: usize| ay / ax * grad_out[i].as_f64();
    let mut vjp = gyration.vjp(g);
    // The derivatives of the factor αy/αx.
    let length = sum(n, |i| g(i) * gyration.value(i));
    let (of_ay, of_ax) = (length / ay, -length / ax);
    vjp.of_a[2] -= 2.0 * ball.c * of_ay;
    vjp.of_b[3] -= 2.0 * ball.c * of_ax;
    vjp.of_c -= gyration.a2 * of_ay + gyration.b2 * of_ax;
    add(grad_x, |i| -gyration.grad_point(&vjp.of_b, g(i), i));
    add(grad_y, |i| gyration.grad_point(&vjp.of_a, g(i), i));
    add(grad_v, |i| gyration.grad_v(&vjp, g(i), i));
    Ok(F::from_f64(vjp.of_c))
}
