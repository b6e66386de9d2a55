//! The functions of one variable that describe the curvature, each as the ratio to its Euclidean limit,
//! which is smooth at zero, with derivatives.
//!
//! Derivatives of the ratios are differences that cancel near zero. For arguments below [`SMALL`] they
//! are computed from power series of order [`ORDER`]: the first omitted term is less than 2⁻⁵⁴ of the
//! sum.

/// The series are summed below this; at this argument the differences lose about 10 ulps.
const SMALL: f64 = 0.125;
/// 8⁻¹⁸ = 2⁻⁵⁴.
const ORDER: usize = 18;

/// Computes the derivative at u of Σ aₙ uⁿ, from a₀ and the ratios aₙ/aₙ₋₁.
fn series_derivative(u: f64, first: f64, ratio: impl Fn(f64) -> f64) -> f64 {
    let (mut coefficient, mut power, mut sum) = (first, 1.0, 0.0);
    for n in 1..=ORDER {
        let n = n as f64;
        coefficient *= ratio(n);
        sum += n * coefficient * power;
        power *= u;
    }
    sum
}

/// asinh(√u)/√u for u ≥ 0.
pub(super) fn asinh_ratio(u: f64) -> f64 {
    // Two terms are exact here, and for larger u, √u loses nothing.
    if u < 1e-16 { 1.0 - u / 6.0 } else { u.sqrt().asinh() / u.sqrt() }
}

/// d/du of [`asinh_ratio`].
pub(super) fn asinh_ratio_derivative(u: f64) -> f64 {
    if u < SMALL {
        // aₙ = (−1)ⁿ (2n)! / (4ⁿ n!² (2n + 1))
        return series_derivative(u, 1.0, |n| {
            let odd = 2.0 * n - 1.0;
            -odd * odd / (2.0 * n * (2.0 * n + 1.0))
        });
    }
    ((1.0 + u).sqrt().recip() - asinh_ratio(u)) / (2.0 * u)
}

/// artanh(r)/r, where α = 1 − r² is more accurate than r.
pub(super) fn artanh_ratio(r: f64, alpha: f64) -> f64 {
    if r < 1e-8 { 1.0 + r * r / 3.0 } else { (r / alpha.sqrt()).asinh() / r }
}

/// d/du of artanh(√u)/√u at u = r².
pub(super) fn artanh_ratio_derivative(r: f64, alpha: f64) -> f64 {
    let u = r * r;
    if u < SMALL {
        // aₙ = 1/(2n + 1)
        return series_derivative(u, 1.0, |n| (2.0 * n - 1.0) / (2.0 * n + 1.0));
    }
    (alpha.recip() - artanh_ratio(r, alpha)) / (2.0 * u)
}

/// asinh(√q)/√(q(1 + q)), the ratio h of the logarithmic map, for q ≥ 0.
pub(super) fn log_ratio(q: f64) -> f64 {
    if q < 1e-16 { 1.0 - 2.0 * q / 3.0 } else { q.sqrt().asinh() / (q.sqrt() * (1.0 + q).sqrt()) }
}

/// h'(q), and (q h(q))' = (1 + h)/(2(1 + q)), which h + q h' cannot represent for large q.
pub(super) fn log_ratio_derivatives(q: f64, h: f64) -> (f64, f64) {
    let of_product = (1.0 + h) / (2.0 * (1.0 + q));
    if q < SMALL {
        // aₙ = (−4)ⁿ n!² / (2n + 1)!
        return (series_derivative(q, 1.0, |n| -2.0 * n / (2.0 * n + 1.0)), of_product);
    }
    ((1.0 - (1.0 + 2.0 * q) * h) / (2.0 * q * (1.0 + q)), of_product)
}

/// tanh(t)/t for t ≥ 0.
pub(super) fn tanh_ratio(t: f64) -> f64 {
    if t < 1e-8 { 1.0 - t * t / 3.0 } else { t.tanh() / t }
}

/// 1 − tanh²(t) for t ≥ 0, computed without the difference.
///
/// From t = 333 on it stays at 10⁻²⁸⁹, which avoids 0/0: the terms it is added to are zero or much
/// larger.
pub(super) fn sech2(t: f64) -> f64 {
    // Written so that NaN stays NaN.
    let t = if t > 333.0 { 333.0 } else { t };
    let e = (-2.0 * t).exp();
    4.0 * e / ((1.0 + e) * (1.0 + e))
}

/// d/dτ of tanh(√τ)/√τ at τ = t².
pub(super) fn tanh_ratio_derivative(t: f64) -> f64 {
    let ratio = tanh_ratio(t);
    if t > 1.0 {
        return (sech2(t) - ratio) / (2.0 * t) / t;
    }
    // ((1 − ratio)/τ − ratio²)/2, where (t − tanh t) cosh t = Σ 2n/(2n + 1)! t^(2n+1): positive
    // terms, twelve of them for t ≤ 1.
    let (mut term, mut sum) = (1.0, 0.0);
    for n in 1..=12 {
        let n = f64::from(n);
        term /= 2.0 * n * (2.0 * n + 1.0);
        sum += 2.0 * n * term;
        term *= t * t;
    }
    (sum / t.cosh() - ratio * ratio) / 2.0
}
