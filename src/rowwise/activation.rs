use crate::kernels::Float;
use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// The nonlinear function of a feed-forward network, applied to each entry.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Activation {
    /// max(x, 0), with the slope 0 at 0.
    Relu,
    /// x Φ(x), where Φ is the distribution function of the standard normal distribution (Hendrycks & Gimpel
    /// 2016, 1606.08415). This is PyTorch's default, with the error function, not the approximation by tanh.
    Gelu,
    /// x / (1 + e⁻ˣ), also called swish (Ramachandran et al. 2017, 1710.05941).
    Silu,
    /// x if x > 0, else eˣ − 1 (Clevert et al. 2016, 1511.07289): the activation between the layers of a graph
    /// attention network.
    Elu,
}

impl Activation {
    /// Returns the function at `x`.
    #[must_use]
    pub fn value<F: Float>(self, x: F) -> F {
        F::from_f64(self.value_and_slope(x.as_f64())[0])
    }

    /// Returns the derivative at `x`.
    #[must_use]
    pub fn slope<F: Float>(self, x: F) -> F {
        F::from_f64(self.value_and_slope(x.as_f64())[1])
    }

    #[inline(always)]
    pub(crate) fn value_and_slope(self, x: f64) -> [f64; 2] {
        match self {
            Self::Relu if x.is_nan() => [x; 2],
            Self::Relu if x > 0.0 => [x, 1.0],
            Self::Relu => [0.0; 2],
            Self::Gelu => {
                // Not 1 + erf, which rounds to 0 for large negative x.
                let below = 0.5 * libm::erfc(-x * FRAC_1_SQRT_2);
                let density = (-0.5 * x * x).exp() / (2.0 * PI).sqrt();
                [x * below, below + x * density]
            }
            Self::Silu => {
                let share = 1.0 / (1.0 + (-x).exp());
                [x * share, share * (1.0 + x * (1.0 - share))]
            }
            Self::Elu if x > 0.0 => [x, 1.0],
            Self::Elu => [x.exp_m1(), x.exp()],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Activation; 4] =
        [Activation::Relu, Activation::Gelu, Activation::Silu, Activation::Elu];

    #[test]
    fn values_are_known() {
        // From mpmath: x·ncdf(x), x/(1 + exp(−x)), and expm1(x) below 0.
        for (x, gelu, silu, elu) in [
            (1.0, 0.841_344_746_068_542_9, 0.731_058_578_630_004_9, 1.0),
            (-1.0, -0.158_655_253_931_457_05, -0.268_941_421_369_995_1, -0.632_120_558_828_557_7),
            (
                -10.0,
                -7.619_853_024_160_527e-23,
                -0.000_453_978_687_024_343_95,
                -0.999_954_600_070_237_5,
            ),
            (30.0, 30.0, 29.999_999_999_997_193, 30.0),
        ] {
            let close = |a: f64, b: f64| assert!((a - b).abs() <= 1e-14 * b.abs(), "{x}: {a}, {b}");
            close(Activation::Gelu.value(x), gelu);
            close(Activation::Silu.value(x), silu);
            close(Activation::Elu.value(x), elu);
        }
    }

    #[test]
    fn slopes_are_derivatives() {
        for activation in ALL {
            for x in [-9.0, -2.0, -0.5, 0.1, 0.7, 3.0, 12.0] {
                let h = 1e-4;
                let at = |x: f64| activation.value(x);
                let near = 8.0 * (at(x + h) - at(x - h)) - (at(x + 2.0 * h) - at(x - 2.0 * h));
                let slope = activation.slope(x);
                assert!((slope - near / (12.0 * h)).abs() < 1e-10, "{activation:?} at {x}");
            }
        }
    }

    #[test]
    fn finite_stays_finite_and_nan_stays_nan() {
        for activation in ALL {
            for x in [f64::MAX, -f64::MAX, 1e20, -1e20, 0.0, -0.0, 1e-300] {
                assert!(activation.value(x).is_finite() && activation.slope(x).is_finite());
            }
            assert!(activation.value(f64::NAN).is_nan() && activation.slope(f32::NAN).is_nan());
        }
    }
}
