//! Gyration and parallel transport.

use super::ball::{Ball, add, assign, check_lengths, norm, sum};
use crate::error::Result;
use crate::float::Float;

/// gyr[a, b] v for any source of coordinates.
struct Gyration<A, B, V> {
    n: usize,
    c: f64,
    a: A,
    b: B,
    v: V,
    aa: f64,
    ab: f64,
    /// |a|², |b|², |z|², c|a|² and c|z|²; z = a + b.
    a2: f64,
    b2: f64,
    z2: f64,
    ca2: f64,
    cz2: f64,
    den: f64,
    /// 2c/den, and products with v.
    factor: f64,
    b_v: f64,
    z_v: f64,
    p: f64,
    q: f64,
}

/// What multiplies the derivatives of αa and αb, and the derivative with respect to c without them.
struct GyrationVjp {
    of_aa: f64,
    of_ab: f64,
    of_cz2: f64,
    of_c: f64,
    g_a: f64,
    g_z: f64,
}

impl<A: Fn(usize) -> f64, B: Fn(usize) -> f64, V: Fn(usize) -> f64> Gyration<A, B, V> {
    fn new(ball: Ball, n: usize, (a, aa): (A, f64), (b, ab): (B, f64), v: V) -> Self {
        let z_norm = norm(n, |i| a(i) + b(i));
        let (a_norm, b_norm) = (norm(n, &a), norm(n, &b));
        let (ca2, cz2) = (ball.c_norm2(a_norm), ball.c_norm2(z_norm));
        let den = aa * ab + cz2;
        let a_v = sum(n, |i| a(i) * v(i));
        let b_v = sum(n, |i| b(i) * v(i));
        let z_v = sum(n, |i| (a(i) + b(i)) * v(i));
        let (p, q) = (ab * z_v + cz2 * b_v, aa * a_v + ca2 * z_v);
        let [a2, b2, z2] = [a_norm, b_norm, z_norm].map(|norm| norm * norm);
        let factor = 2.0 * ball.c / den;
        let c = ball.c;
        Self { n, c, a, b, v, aa, ab, a2, b2, z2, ca2, cz2, den, factor, b_v, z_v, p, q }
    }

    fn z(&self, i: usize) -> f64 {
        (self.a)(i) + (self.b)(i)
    }

    /// v + (2c/den)(p a − q z)
    fn value(&self, i: usize) -> f64 {
        (self.v)(i) + self.factor * (self.p * (self.a)(i) - self.q * self.z(i))
    }

    fn vjp(&self, g: impl Fn(usize) -> f64) -> GyrationVjp {
        let g_a = sum(self.n, |i| g(i) * (self.a)(i));
        let g_z = sum(self.n, |i| g(i) * self.z(i));
        let turn = (self.p * g_a - self.q * g_z) / self.den;
        GyrationVjp {
            of_aa: self.factor * (g_z * self.b_v - turn * self.ab),
            of_ab: self.factor * (g_a * self.z_v - turn * self.aa),
            of_cz2: self.factor * (g_a * self.b_v - turn),
            of_c: 2.0 * turn,
            g_a,
            g_z,
        }
    }

    fn grad_z(&self, vjp: &GyrationVjp, g: f64, i: usize) -> f64 {
        let along_v = vjp.g_a * self.ab - vjp.g_z * self.ca2;
        self.factor * (along_v * (self.v)(i) - self.q * g) + 2.0 * self.c * vjp.of_cz2 * self.z(i)
    }

    fn grad_a(&self, vjp: &GyrationVjp, g: f64, i: usize) -> f64 {
        self.grad_z(vjp, g, i) + self.factor * (self.p * g - vjp.g_z * self.aa * (self.v)(i))
            - 2.0 * self.c * vjp.of_aa * (self.a)(i)
    }

    fn grad_b(&self, vjp: &GyrationVjp, g: f64, i: usize) -> f64 {
        self.grad_z(vjp, g, i) + self.factor * vjp.g_a * self.cz2 * (self.v)(i)
            - 2.0 * self.c * vjp.of_ab * (self.b)(i)
    }

    fn grad_v(&self, vjp: &GyrationVjp, g: f64, i: usize) -> f64 {
        let (a, b, z) = ((self.a)(i), (self.b)(i), self.z(i));
        let by_a = vjp.g_a * (self.ab * z + self.cz2 * b);
        let by_z = vjp.g_z * (self.aa * a + self.ca2 * z);
        g + self.factor * (by_a - by_z)
    }

    fn grad_c(&self, vjp: &GyrationVjp) -> f64 {
        vjp.of_c + self.z2 * vjp.of_cz2 - self.a2 * vjp.of_aa - self.b2 * vjp.of_ab
    }
}

/// The gyration of v by a and b: the rotation by which Möbius addition fails to be associative.
///
/// ```text
/// gyr[a, b] v = −(a ⊕ b) ⊕ (a ⊕ (b ⊕ v))        linear in v
///             = v + (2c/den)(p a − q z)          v at c = 0
/// z = a + b,  α = 1 − c|·|²,  den = αa αb + c|z|²
/// p = αb z·v + c|z|² b·v,  q = αa a·v + c|a|² z·v
/// ```
///
/// a and b are points of the ball, v is any vector. The second form is the one computed: where den
/// is small so are p and q, and nothing in it cancels but a + b. (Ungar 2009.)
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for vectors of different lengths,
/// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for a c that is negative or not finite,
/// [`Error::Domain`](crate::Error::Domain) for a point outside the ball.
pub fn gyration<F: Float>(a: &[F], b: &[F], v: &[F], c: F, out: &mut [F]) -> Result<()> {
    let (ball, n) = (Ball::new(c)?, a.len());
    check_lengths(n, &[("b", b.len()), ("v", v.len()), ("out", out.len())])?;
    let a_side = (|i: usize| a[i].as_f64(), ball.alpha("a", a)?);
    let b_side = (|i: usize| b[i].as_f64(), ball.alpha("b", b)?);
    let gyration = Gyration::new(ball, n, a_side, b_side, |i: usize| v[i].as_f64());
    assign(out, |i| gyration.value(i));
    Ok(())
}

/// gyr[a, b] v = v + (2c/den)(p a − q z). The vector–Jacobian product of [`gyration`]: adds to the
/// gradients of the arrays, returns the derivative with respect to c.
///
/// # Errors
/// Those of [`gyration`].
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
    let gyration = Gyration::new(ball, n, a_side, b_side, |i: usize| v[i].as_f64());
    let g = |i: usize| grad_out[i].as_f64();
    let vjp = gyration.vjp(g);
    add(grad_a, |i| gyration.grad_a(&vjp, g(i), i));
    add(grad_b, |i| gyration.grad_b(&vjp, g(i), i));
    add(grad_v, |i| gyration.grad_v(&vjp, g(i), i));
    Ok(F::of(gyration.grad_c(&vjp)))
}

/// The vector v at x, carried to y along the geodesic.
///
/// ```text
/// P(v) = (λx/λy) gyr[y, −x] v = (αy/αx) gyr[y, −x] v        v at c = 0
/// ```
///
/// Keeps lengths and angles: λy|P(v)| = λx|v| to some ulps. (Ganea et al. 2018, arXiv:1805.09112.)
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for vectors of different lengths,
/// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for a c that is negative or not finite,
/// [`Error::Domain`](crate::Error::Domain) for a point outside the ball.
pub fn parallel_transport<F: Float>(x: &[F], y: &[F], v: &[F], c: F, out: &mut [F]) -> Result<()> {
    let (ball, n) = (Ball::new(c)?, x.len());
    check_lengths(n, &[("y", y.len()), ("v", v.len()), ("out", out.len())])?;
    let (ax, ay) = (ball.alpha("x", x)?, ball.alpha("y", y)?);
    let y_side = (|i: usize| y[i].as_f64(), ay);
    let x_side = (|i: usize| -x[i].as_f64(), ax);
    let gyration = Gyration::new(ball, n, y_side, x_side, |i: usize| v[i].as_f64());
    assign(out, |i| ay / ax * gyration.value(i));
    Ok(())
}

/// P(v) = (αy/αx) gyr[y, −x] v. The vector–Jacobian product of [`parallel_transport`]: adds to the
/// gradients of the arrays, returns the derivative with respect to c.
///
/// # Errors
/// Those of [`parallel_transport`].
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
    let gyration = Gyration::new(ball, n, y_side, x_side, |i: usize| v[i].as_f64());
    let g = |i: usize| ay / ax * grad_out[i].as_f64();
    let mut vjp = gyration.vjp(g);
    // The derivatives of the factor αy/αx.
    let length = sum(n, |i| g(i) * gyration.value(i));
    vjp.of_aa += length / ay;
    vjp.of_ab -= length / ax;
    add(grad_x, |i| -gyration.grad_b(&vjp, g(i), i));
    add(grad_y, |i| gyration.grad_a(&vjp, g(i), i));
    add(grad_v, |i| gyration.grad_v(&vjp, g(i), i));
    Ok(F::of(gyration.grad_c(&vjp)))
}
