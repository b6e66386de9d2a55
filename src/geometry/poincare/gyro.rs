//! Möbius addition.

use super::ball::{Ball, add, check_lengths, norm, norm_of, sum};
use crate::error::Result;
use crate::kernels::Float;

/// x ⊕ y for any source of coordinates, with the norms and the α = 1 − c|·|² of both; for y they may be
/// more accurate than its coordinates.
pub(super) struct Addition<X, Y> {
    ball: Ball,
    x: X,
    y: Y,
    ax: f64,
    ay: f64,
    x_norm: f64,
    y_norm: f64,
    /// |z|² and c|z|², z = x + y.
    pub(super) z2: f64,
    cz2: f64,
    /// αx αy + c|z|²: a sum of positive terms, even if 1 + 2c x·y + c²|x|²|y|² would cancel.
    pub(super) den: f64,
}

impl<X: Fn(usize) -> f64, Y: Fn(usize) -> f64> Addition<X, Y> {
    pub(super) fn new(
        ball: Ball,
        n: usize,
        (x, ax, x_norm): (X, f64, f64),
        (y, ay, y_norm): (Y, f64, f64),
    ) -> Self {
        let z_norm = norm(n, |i| x(i) + y(i));
        let cz2 = ball.c_norm2(z_norm);
        let den = ax * ay + cz2;
        Self { ball, x, y, ax, ay, x_norm, y_norm, z2: z_norm * z_norm, cz2, den }
    }

    pub(super) fn x(&self, i: usize) -> f64 {
        (self.x)(i)
    }

    pub(super) fn y(&self, i: usize) -> f64 {
        (self.y)(i)
    }

    pub(super) fn z(&self, i: usize) -> f64 {
        self.x(i) + self.y(i)
    }

    /// w = (αx z + c|z|² x) / (αx αy + c|z|²)
    pub(super) fn value(&self, i: usize) -> f64 {
        (self.ax * self.z(i) + self.cz2 * self.x(i)) / self.den
    }

    /// Computes the coefficients of the gradients.
    ///
    /// With e = y + c|y|² x = z − αy x, of length |y| √den, the differences that occur are
    /// w − x = αx e/den and z − αy w = c|z|² e/den, so they are computed without cancellation.
    pub(super) fn vjp(self, n: usize, g: impl Fn(usize) -> f64 + Copy) -> AdditionVjp<X, Y> {
        let c = self.ball.c;
        let y2 = self.ball.c_norm2(self.y_norm);
        let g_w = sum(n, |i| g(i) * self.value(i));
        let z_norm = self.z2.sqrt();
        // The form of e with the smaller terms.
        let by_z = z_norm + self.ay * self.x_norm < self.y_norm + y2 * self.x_norm;
        let g_e = if by_z {
            sum(n, |i| g(i) * (self.z(i) - self.ay * self.x(i)))
        } else {
            sum(n, |i| g(i) * (self.y(i) + y2 * self.x(i)))
        } / self.den;
        let (scale, shift) = (self.ax / self.den, self.cz2 / self.den);
        let grad_c = if self.x_norm < 0.25 * self.y_norm {
            self.short_x_grad_c(n, g)
        } else {
            self.y_norm * self.y_norm * g_w * scale - g_e * self.z2 / self.den
        };
        let (of_z, of_y) = (2.0 * c * g_e, 2.0 * c * g_w);
        AdditionVjp { of_z, of_y, scale, shift, g_w, grad_c, sum: self }
    }

    /// Computes the derivative with respect to c for |x| ≪ |y|, where |y|² αx g·w and |z|² g·e cancel up
    /// to |x|, from their expanded difference.
    ///
    /// ```text
    /// (|y|² g·x (1 − c|x|² (2 + 2c x·y + c|y|²)) − g·y (|x|² + 2x·y + c|x|²|y|² (2 − c|x|²))) / den²
    /// ```
    fn short_x_grad_c(&self, n: usize, g: impl Fn(usize) -> f64) -> f64 {
        let [x2, y2] = [self.x_norm, self.y_norm].map(|norm| norm * norm);
        let [cx2, cy2] = [self.x_norm, self.y_norm].map(|norm| self.ball.c_norm2(norm));
        let x_y = sum(n, |i| self.x(i) * self.y(i));
        let g_x = sum(n, |i| g(i) * self.x(i));
        let g_y = sum(n, |i| g(i) * self.y(i));
        let of_x = 1.0 - cx2 * (2.0 + 2.0 * self.ball.c * x_y + cy2);
        let of_y = x2 + 2.0 * x_y + cx2 * y2 * (2.0 - cx2);
        (y2 * g_x * of_x - g_y * of_y) / self.den / self.den
    }
}

/// The gradients of x ⊕ y.
pub(super) struct AdditionVjp<X, Y> {
    pub(super) sum: Addition<X, Y>,
    /// 2c g·e/den and 2c g·w.
    pub(super) of_z: f64,
    of_y: f64,
    /// αx/den and c|z|²/den.
    scale: f64,
    shift: f64,
    pub(super) g_w: f64,
    pub(super) grad_c: f64,
}

impl<X: Fn(usize) -> f64, Y: Fn(usize) -> f64> AdditionVjp<X, Y> {
    /// (αx/den)(g − 2c z g·e/den) + (c|z|²/den)(g − 2c x g·e/den)
    pub(super) fn grad_x(&self, g: f64, i: usize) -> f64 {
        self.scale * (g - self.of_z * self.sum.z(i)) + self.shift * (g - self.of_z * self.sum.x(i))
    }

    /// (αx/den)(g − 2c z g·e/den + 2c y g·w): the bracket only rotates g.
    pub(super) fn grad_y(&self, g: f64, i: usize) -> f64 {
        self.scale * (g - self.of_z * self.sum.z(i) + self.of_y * self.sum.y(i))
    }
}

/// Computes the Möbius sum x ⊕ y: the translation along the geodesic from 0 to x, applied to y.
///
/// ```text
/// x ⊕ y = ((1 + 2c x·y + c|y|²) x + (1 − c|x|²) y) / (1 + 2c x·y + c²|x|²|y|²)
///       = (αx z + c|z|² x) / (αx αy + c|z|²)        z = x + y, α = 1 − c|·|²
/// ```
///
/// The second form is used: nothing in it cancels except x + y. The sum is neither commutative nor
/// associative. (Ungar 2009; Ganea et al. 2018, arXiv:1805.09112.)
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for vectors of different lengths,
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a c that is negative or not finite,
/// [`Error::Domain`](crate::Error::Domain) for a point outside the ball.
pub fn mobius_add<F: Float>(x: &[F], y: &[F], c: F, out: &mut [F]) -> Result<()> {
    let (ball, n) = (Ball::new(c)?, x.len());
    check_lengths(n, &[("y", y.len()), ("out", out.len())])?;
    let sum = addition(ball, x, y)?;
    ball.assign_point(out, |i| sum.value(i));
    Ok(())
}

/// Computes the vector–Jacobian product of [`mobius_add`]: adds to the gradients of the points and
/// returns the derivative with respect to c.
///
/// Differentiates x ⊕ y = (αx z + c|z|² x) / (αx αy + c|z|²).
///
/// # Errors
/// As [`mobius_add`].
pub fn mobius_add_vjp<F: Float>(
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
    let g = |i: usize| grad_out[i].as_f64();
    let vjp = addition(ball, x, y)?.vjp(n, g);
    add(grad_x, |i| vjp.grad_x(g(i), i));
    add(grad_y, |i| vjp.grad_y(g(i), i));
    Ok(F::from_f64(vjp.grad_c))
}

fn addition<'a, F: Float>(
    ball: Ball,
    x: &'a [F],
    y: &'a [F],
) -> Result<Addition<impl Fn(usize) -> f64 + 'a, impl Fn(usize) -> f64 + 'a>> {
    let (ax, ay) = (ball.alpha("x", x)?, ball.alpha("y", y)?);
    let x_side = (|i: usize| x[i].as_f64(), ax, norm_of(x));
    let y_side = (|i: usize| y[i].as_f64(), ay, norm_of(y));
    Ok(Addition::new(ball, x.len(), x_side, y_side))
}
