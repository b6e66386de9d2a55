//! The ball: its curvature, its points, and sums over coordinates.

use crate::error::{Error, Result, check_shape};
use crate::kernels::Float;

/// The checked curvature: c and its square root.
#[derive(Clone, Copy)]
pub(super) struct Ball {
    pub(super) c: f64,
    pub(super) root: f64,
}

impl Ball {
    pub(super) fn new<F: Float>(c: F) -> Result<Self> {
        let value = c.as_f64();
        if !(value.is_finite() && value >= 0.0) {
            return Err(Error::config("c", "a finite number, at least 0", c));
        }
        // Not −0, whose square root has a reciprocal with the wrong sign.
        let c = value.abs();
        Ok(Self { c, root: c.sqrt() })
    }

    /// Creates a ball with a boundary.
    pub(super) fn curved<F: Float>(c: F) -> Result<Self> {
        let ball = Self::new(c)?;
        if ball.c > 0.0 { Ok(ball) } else { Err(Error::config("c", "a finite number above 0", c)) }
    }
    /// Computes α = 1 − c|x|² of a point in the ball, accurate to an ulp or two.
    pub(super) fn alpha<F: Float>(self, what: &'static str, x: &[F]) -> Result<f64> {
        self.alpha_of_row(what, 0, x.len(), |i| x[i].as_f64())
    }

    pub(super) fn alpha_of_row(
        self,
        what: &'static str,
        row: usize,
        n: usize,
        x: impl Fn(usize) -> f64,
    ) -> Result<f64> {
        let alpha = one_minus_c_norm2(self.c, n, &x);
        // NaN is allowed.
        if alpha <= 0.0 {
            return Err(Error::Domain {
                what: what.into(),
                row,
                norm: norm(n, x),
                limit: self.root.recip(),
            });
        }
        Ok(alpha)
    }

    /// Overwrites an output with a point of the ball: rounded to the nearest point, or moved inside if
    /// that is on or outside the boundary.
    pub(super) fn assign_point<F: Float>(self, out: &mut [F], value: impl Fn(usize) -> f64) {
        assign(out, &value);
        let n = out.len();
        if one_minus_c_norm2(self.c, n, |i| out[i].as_f64()) <= 0.0 {
            let reach = self.root * norm(n, &value);
            if reach.is_finite() {
                // This does not correct the rounding of the value itself.
                let scale = if reach > 1.0 + 1e-14 { reach.recip() } else { 1.0 };
                assign(out, |i| scale * value(i));
                self.move_inside(out, |i| scale * value(i));
            }
        }
    }

    /// Moves a rounded value inside by steps of one ulp towards 0 in one coordinate. While one step is
    /// not enough, takes the step with the largest inward movement relative to the added squared distance
    /// from the value; finally takes the step that adds the least. Then undoes steps that are no longer
    /// needed.
    fn move_inside<F: Float>(self, out: &mut [F], value: impl Fn(usize) -> f64) {
        // Rounds to the neighbour on the side of 0.
        let inwards = |x: F| x * (F::one() - F::epsilon() / F::from_f64(2.0));
        let alpha = |out: &[F]| one_minus_c_norm2(self.c, out.len(), |i| out[i].as_f64());
        let mut slack = alpha(out);
        while slack <= 0.0 {
            let excess = -slack;
            // The best single step, as (added per reduction, added, reduction, coordinate), and the least
            // distance added by enough steps in one coordinate.
            let mut step = (f64::INFINITY, 0.0, 0.0, 0);
            let mut last = (f64::INFINITY, 0.0, 0);
            for (i, &x) in out.iter().enumerate() {
                let place = self.root * (x.as_f64() - inwards(x).as_f64()).abs();
                let reduction = 2.0 * self.root * x.as_f64().abs() * place;
                if reduction == 0.0 {
                    continue;
                }
                let off = self.root * (x.as_f64().abs() - value(i).abs());
                let added = |steps: f64| steps * place * (steps * place - 2.0 * off);
                if added(1.0) / reduction < step.0 {
                    step = (added(1.0) / reduction, added(1.0), reduction, i);
                }
                let steps = (excess / reduction).floor() + 1.0;
                if added(steps) < last.0 {
                    last = (added(steps), steps * place / self.root, i);
                }
            }
            let (per_reduction, added, reduction, i) = step;
            if last.0 <= added + per_reduction * (excess - reduction).max(0.0) {
                let (_, by, i) = last;
                // At least to the neighbour.
                let x = out[i].as_f64();
                let (far, near) = (F::from_f64(x - by.copysign(x)), inwards(out[i]));
                out[i] = if far.abs() < near.abs() { far } else { near };
            } else {
                out[i] = inwards(out[i]);
            }
            slack = alpha(out);
        }
        for i in 0..out.len() {
            let x = out[i];
            // The neighbour on the other side.
            let place = x - inwards(x);
            let back = x + if inwards(x + place) == x { place } else { place + place };
            let growth = 2.0 * self.c * x.as_f64().abs() * place.as_f64().abs();
            let off = |x: F| (x.as_f64() - value(i)).abs();
            if growth < slack && off(back) < off(x) {
                out[i] = back;
                let new = alpha(out);
                (out[i], slack) = if new > 0.0 { (back, new) } else { (x, slack) };
            }
        }
    }

    /// Computes c|z|² for a vector with this norm, without overflow in |z|² and exactly zero at c = 0.
    pub(super) fn c_norm2(self, norm: f64) -> f64 {
        let scaled = self.root * norm;
        scaled * scaled
    }
}

/// Computes 1 − c|x|², which is negative or zero outside the ball and −∞ if a coordinate is infinite.
pub(crate) fn one_minus_c_norm2(c: f64, n: usize, x: impl Fn(usize) -> f64) -> f64 {
    if c == 0.0 {
        // The ball has no finite boundary; NaN stays NaN.
        let largest = (0..n).fold(0.0, |sum: f64, i| sum + 0.0 * x(i));
        let infinite = (0..n).any(|i| x(i).is_infinite());
        return if infinite { f64::NEG_INFINITY } else { 1.0 + largest };
    }
    // c = c' 4^k with c' in [1, 4), and x' = 2^k x: exact, and no relevant square over- or underflows. A
    // subnormal c is made normal first.
    let (c, scale) = if c < f64::MIN_POSITIVE { (c * TWO_108, TWO_54.recip()) } else { (c, 1.0) };
    let exponent = (c.to_bits() >> 52) as i64 - 1023;
    let k = exponent.div_euclid(2);
    let c = c * power_of_two(-k) * power_of_two(-k);
    let x = |i| x(i) * scale * power_of_two(k);
    let plain = 1.0 - c * sum(n, |i| x(i) * x(i));
    if plain >= 1.0 / 16.0 || plain.is_nan() || plain < -1.0 {
        return plain;
    }
    // Near the boundary: Σ x² = high + low, with the rounding error of each product and sum.
    let (mut high, mut low) = (0.0, 0.0);
    for i in 0..n {
        let (square, square_error) = two_product(x(i), x(i));
        let (total, total_error) = two_sum(high, square);
        high = total;
        low += square_error + total_error;
    }
    let (product, product_error) = two_product(c, high);
    // 1 − product is exact here (Sterbenz).
    (1.0 - product) - (product_error + c * low)
}

const TWO_54: f64 = (1_u64 << 54) as f64;
const TWO_108: f64 = TWO_54 * TWO_54;

/// 2^k for |k| < 1023.
fn power_of_two(k: i64) -> f64 {
    f64::from_bits(((1023 + k) as u64) << 52)
}

/// Returns a + b and its rounding error (Knuth, *TAOCP* 2, 4.2.2).
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let b_part = sum - a;
    (sum, (a - (sum - b_part)) + (b - b_part))
}

/// Returns a · b and its rounding error, by splitting both into halves (Dekker 1971). `mul_add` would be
/// a slow call if the compiler cannot assume the instruction.
fn two_product(a: f64, b: f64) -> (f64, f64) {
    let split = |a: f64| {
        let big = a * ((1_u64 << 27) + 1) as f64;
        let high = big - (big - a);
        (high, a - high)
    };
    let product = a * b;
    let ((a_high, a_low), (b_high, b_low)) = (split(a), split(b));
    let error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
    (product, error)
}

/// Computes the sum of n terms.
pub(super) fn sum(n: usize, term: impl Fn(usize) -> f64) -> f64 {
    (0..n).fold(0.0, |sum, i| sum + term(i))
}

/// Computes the Euclidean norm; squares that would over- or underflow are scaled by a power of two.
pub(super) fn norm(n: usize, x: impl Fn(usize) -> f64) -> f64 {
    let squares = sum(n, |i| x(i) * x(i));
    if (1e-280..1e280).contains(&squares) || squares.is_nan() {
        return squares.sqrt();
    }
    let largest = (0..n).fold(0.0, |max: f64, i| max.max(x(i).abs()));
    if largest == 0.0 || largest.is_infinite() {
        return largest;
    }
    let scale = power_of_two_below(largest);
    let scaled = |i| x(i) / scale;
    scale * sum(n, |i| scaled(i) * scaled(i)).sqrt()
}

/// Returns the largest power of two not above a positive number, except for subnormal numbers.
pub(super) fn power_of_two_below(x: f64) -> f64 {
    f64::from_bits(x.to_bits() & (0x7ff << 52)).max(f64::MIN_POSITIVE)
}

/// Computes the norm of a slice.
pub(crate) fn norm_of<F: Float>(x: &[F]) -> f64 {
    norm(x.len(), |i| x[i].as_f64())
}

/// Computes the dot product of two slices.
pub(crate) fn dot<F: Float>(x: &[F], y: &[F]) -> f64 {
    sum(x.len(), |i| x[i].as_f64() * y[i].as_f64())
}

/// Adds to a gradient.
pub(super) fn add<F: Float>(grad: &mut [F], term: impl Fn(usize) -> f64) {
    for (i, grad) in grad.iter_mut().enumerate() {
        *grad += F::from_f64(term(i));
    }
}

/// Overwrites an output.
pub(super) fn assign<F: Float>(out: &mut [F], value: impl Fn(usize) -> f64) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = F::from_f64(value(i));
    }
}

/// Checks that every slice has n coordinates.
pub(super) fn check_lengths(n: usize, slices: &[(&'static str, usize)]) -> Result<()> {
    slices.iter().try_for_each(|&(what, len)| check_shape(what, &[n], &[len]))
}

/// Returns the component of `g` along `v` times `along`, plus the rest times `across`.
///
/// Uses the unit vector, so that for a `g` along `v` the rest is zero except for rounding.
pub(super) fn stretch(
    n: usize,
    v: impl Fn(usize) -> f64,
    v_norm: f64,
    g: impl Fn(usize) -> f64,
    along: f64,
    across: f64,
) -> impl Fn(usize) -> f64 {
    let unit = move |i: usize| if v_norm == 0.0 { 0.0 } else { v(i) / v_norm };
    let g_u = sum(n, |i| g(i) * unit(i));
    move |i| across * (g(i) - g_u * unit(i)) + along * g_u * unit(i)
}
