//! The Hessian of ½ d(q, y)² with respect to q, as a matrix in the tangent space at q:
//!
//! ```text
//! H(v) = φ + (1 − φ) n nᵀ = φ − ψ κ² v vᵀ        v = log_q(y), n = v/|v|
//! φ = r coth r,  ψ = (φ − 1)/r²,  r = κ|v|       κ = √c λq
//! ```
//!
//! −H(v) is the derivative of the logarithm log_q(y) with respect to q.

use crate::geometry::poincare::ball::dot;

/// H(v), represented by two numbers.
pub(super) struct Hessian {
    /// φ
    across: f64,
    /// ψ κ²
    along: f64,
}

impl Hessian {
    pub(super) fn new(v: &[f64], kappa: f64) -> Self {
        let r2 = kappa * kappa * dot(v, v);
        let psi = psi(r2);
        Self { across: 1.0 + r2 * psi, along: kappa * kappa * psi }
    }

    /// y += factor H(v) x, for the v of this Hessian.
    pub(super) fn add_product(&self, factor: f64, v: &[f64], x: &[f64], y: &mut [f64]) {
        let (across, along) = (factor * self.across, factor * self.along * dot(v, x));
        y.iter_mut().zip(v).zip(x).for_each(|((y, v), x)| *y += across * x - along * v);
    }
}

/// y += factor (H(a) − H(b)) x with e = a − b. Every term has a factor e, which the caller may know more
/// accurately than the difference of a and b.
pub(super) fn add_difference(
    factor: f64,
    [a, b, e]: [&[f64]; 3],
    kappa: f64,
    x: &[f64],
    y: &mut [f64],
) {
    let kappa2 = kappa * kappa;
    let (a2, b2) = (kappa2 * dot(a, a), kappa2 * dot(b, b));
    // |a|² − |b|²
    let difference = kappa2 * (dot(e, a) + dot(e, b));
    let (psi_a, psi_difference) = (psi(a2), psi_difference(a2, b2, difference));
    let of_x = factor * (psi_a * difference + b2 * psi_difference);
    // a aᵀ − b bᵀ = e aᵀ + b eᵀ
    let of_e = factor * kappa2 * psi_a * dot(a, x);
    let of_b = factor * kappa2 * (psi_a * dot(e, x) + psi_difference * dot(b, x));
    let vectors = e.iter().zip(b).zip(x);
    y.iter_mut().zip(vectors).for_each(|(y, ((e, b), x))| *y += of_x * x - of_e * e - of_b * b);
}

/// Up to this r² the continued fraction r coth r = 1 + r²/(3 + r²/(5 + …)) is used.
const SMALL: f64 = 9.0;
/// The number of its terms; at `SMALL` the rest is below 1e-20.
const NUM_TERMS: usize = 16;

fn odd(term: usize) -> f64 {
    (2 * term + 1) as f64
}

/// ψ(r²).
fn psi(r2: f64) -> f64 {
    if r2 > SMALL {
        let r = r2.sqrt();
        return (r / r.tanh() - 1.0) / r2;
    }
    let denominator = |next: f64, term| odd(term) + r2 / next;
    (1..NUM_TERMS).rev().fold(odd(NUM_TERMS), denominator).recip()
}

/// ψ(a²) − ψ(b²), with a² − b² also given.
fn psi_difference(a2: f64, b2: f64, difference: f64) -> f64 {
    if a2 < b2 {
        return -psi_difference(b2, a2, -difference);
    }
    if a2 > SMALL {
        // coth a − coth b = −2 (e^−2b − e^−2a)/((1 − e^−2a)(1 − e^−2b))
        let (a, b) = (a2.sqrt(), b2.sqrt());
        let step = difference / (a + b);
        let coth_difference = 2.0 * (-2.0 * b).exp() * (-2.0 * step).exp_m1() / (-2.0 * a).exp_m1();
        let b_over = if b == 0.0 { -0.5 } else { b / (-2.0 * b).exp_m1() };
        let phi_difference = step / a.tanh() + coth_difference * b_over;
        return (phi_difference - psi(b2) * difference) / a2;
    }
    // f_k(s) = 2k + 1 + s/f_{k+1}(s): f_k(a²) − f_k(b²) from the difference for f_{k+1}.
    let (mut of_a, mut of_b, mut f_difference) = (odd(NUM_TERMS), odd(NUM_TERMS), 0.0);
    for term in (1..NUM_TERMS).rev() {
        f_difference = difference / of_a - b2 * f_difference / (of_a * of_b);
        (of_a, of_b) = (odd(term) + a2 / of_a, odd(term) + b2 / of_b);
    }
    -f_difference / (of_a * of_b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f64::consts::PI;

    /// By r coth r = 1 + 2 Σₖ r²/(r² + k²π²), the rest of the sum as an integral.
    #[test]
    fn differences_are_those_of_the_partial_fractions() {
        const TERMS: u32 = 20_000;
        let points = [0.0, 1e-9, 1e-3, 0.7, 3.0, 8.999, 9.0, 9.001, 40.0, 700.0, 5000.0];
        for b2 in points {
            let near = [1e-12, 1e-3].map(|relative| b2 + relative * (b2 + 1e-3));
            for a2 in near.into_iter().chain(points).filter(|&a2| a2 > b2) {
                let pole = |k: u32| (f64::from(k) * PI).powi(2);
                let terms = (1..=TERMS).rev().map(|k| ((a2 + pole(k)) * (b2 + pole(k))).recip());
                let rest = ((f64::from(TERMS) + 0.5).powi(3) * 3.0 * PI.powi(4)).recip();
                let expected = -2.0 * (a2 - b2) * (rest + terms.sum::<f64>());
                let actual = psi_difference(a2, b2, a2 - b2);
                assert!((actual / expected - 1.0).abs() < 1e-14, "{a2} {b2}: {actual} {expected}");
                assert_eq!(psi_difference(b2, a2, b2 - a2), -actual);
            }
            let r = b2.sqrt();
            let direct = if b2 < 0.1 { 1.0 / 3.0 - b2 / 45.0 } else { (r / r.tanh() - 1.0) / b2 };
            assert!((psi(b2) / direct - 1.0).abs() < 1e-8, "{b2}");
        }
    }
}
