//! asinh in units of ln 2: distances, whose exponentials are weights.

use crate::kernels::primitives::matmul::Vector;
use fearless_simd::{Select, Simd, SimdBase, SimdFloat, SimdFloatElement};

/// The constants of [`asinh`] for one type.
#[derive(Debug)]
pub struct Asinh<F: SimdFloatElement + 'static> {
    /// The bits of √½.
    sqrt_half: F::Bits,
    /// The number of mantissa bits.
    shift: u32,
    /// 2^(mantissa bits): the bits of an integer below it, put under these, are the integer plus it.
    magic: F,
    /// 2 / ((2k + 1) ln 2): the series of 2 artanh(t) / (t ln 2) in t², |t| ≤ (√2 − 1)/(√2 + 1); the rest
    /// is less than a quarter of the last place.
    coefficients: &'static [F],
}

/// A type with asinh.
pub trait HasAsinh: SimdFloatElement + 'static {
    /// Its constants.
    const ASINH: Asinh<Self>;
}

const fn coefficient(k: u32) -> f64 {
    2.0 * std::f64::consts::LOG2_E / (2 * k + 1) as f64
}

impl HasAsinh for f32 {
    const ASINH: Asinh<f32> = Asinh {
        sqrt_half: std::f32::consts::FRAC_1_SQRT_2.to_bits(),
        shift: 23,
        magic: 8_388_608.0,
        coefficients: &[
            coefficient(0) as f32,
            coefficient(1) as f32,
            coefficient(2) as f32,
            coefficient(3) as f32,
            coefficient(4) as f32,
        ],
    };
}

impl HasAsinh for f64 {
    const ASINH: Asinh<f64> = Asinh {
        sqrt_half: std::f64::consts::FRAC_1_SQRT_2.to_bits(),
        shift: 52,
        magic: 4_503_599_627_370_496.0,
        coefficients: &[
            coefficient(0),
            coefficient(1),
            coefficient(2),
            coefficient(3),
            coefficient(4),
            coefficient(5),
            coefficient(6),
            coefficient(7),
            coefficient(8),
            coefficient(9),
            coefficient(10),
        ],
    };
}

/// asinh(x) / ln 2 for finite x ≥ 0, given √(1 + x²); accurate to 4 units in the last place however small
/// x is, and NaN for NaN.
#[inline(always)]
pub(crate) fn asinh<S: Simd, F: HasAsinh>(
    simd: S,
    x: Vector<S, F>,
    root: Vector<S, F>,
) -> Vector<S, F> {
    let Asinh { sqrt_half, shift, magic, coefficients } = F::ASINH;
    // e^{asinh x} = x + √(1 + x²) = 2^j m with m in [√½, √2).
    let exponential = x + root;
    let bits = exponential.to_bits();
    let j = (bits - sqrt_half) >> shift;
    let m = Vector::<S, F>::from_bits(bits - (j << shift));
    let magic = Vector::<S, F>::splat(simd, magic);
    let j = Vector::<S, F>::from_bits(j | magic.to_bits()) - magic;
    // ln m = 2 artanh(t), t = (m − 1)/(m + 1). For j = 0 this is tanh(asinh(x)/2), without the rounding
    // error of m.
    let (zero, one) =
        (Vector::<S, F>::splat(simd, F::from(0u8)), Vector::<S, F>::splat(simd, F::from(1u8)));
    let is_small = j.simd_eq(zero);
    let t = is_small.select(x, m - one) / (is_small.select(root, m) + one);
    let square = t * t;
    let (last, rest) = coefficients.split_last().expect("there are coefficients");
    let mut sum = Vector::<S, F>::splat(simd, *last);
    for &coefficient in rest.iter().rev() {
        sum = sum.mul_add(square, Vector::<S, F>::splat(simd, coefficient));
    }
    // The bits of a NaN gave some number; 0 · NaN restores NaN.
    exponential.mul_add(zero, sum.mul_add(t, j))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::levels;
    use fearless_simd::Level;
    use std::f64::consts::LOG2_E;

    fn asinh_of<F: HasAsinh>(level: Level, xs: &[F]) -> Vec<F> {
        #[inline(always)]
        fn run<S: Simd, F: HasAsinh>(simd: S, xs: &mut [F]) {
            for chunk in xs.chunks_mut(Vector::<S, F>::LEN) {
                let mut x = Vector::<S, F>::splat(simd, F::from(0u8));
                x.as_mut_slice()[..chunk.len()].copy_from_slice(chunk);
                let one = Vector::<S, F>::splat(simd, F::from(1u8));
                let y = asinh::<S, F>(simd, x, (x * x + one).sqrt());
                chunk.copy_from_slice(&y.as_slice()[..chunk.len()]);
            }
        }
        let mut xs = xs.to_vec();
        dispatch!(level, simd => run(simd, &mut xs));
        xs
    }

    /// The largest relative error over some f32, in units of 2^-24.
    fn largest_error(level: Level, bits: impl Iterator<Item = u32>) -> f64 {
        let xs: Vec<f32> = bits.map(f32::from_bits).collect();
        let errors = xs.iter().zip(asinh_of(level, &xs)).map(|(&x, y)| {
            let exact = f64::from(x).asinh() * LOG2_E;
            (f64::from(y) / exact - 1.0).abs() * 24f64.exp2()
        });
        errors.fold(0.0, f64::max)
    }

    /// Half of it is still normal.
    const FIRST: u32 = 1e-37f32.to_bits();
    /// Its square is still finite.
    const LAST: u32 = 1.8e19f32.to_bits();

    #[test]
    fn f32_is_good_to_the_last_places_everywhere() {
        for level in levels() {
            let error = largest_error(level, (FIRST..=LAST).step_by(499));
            assert!(error < 8.0, "{level:?}: {error}");
        }
    }

    /// `cargo test --release exhaustive -- --ignored`
    #[test]
    #[ignore = "a billion numbers: some seconds in release mode"]
    fn exhaustive_f32_asinh() {
        for start in (FIRST..=LAST).step_by(1 << 20) {
            let error = largest_error(Level::new(), start..=LAST.min(start + (1 << 20)));
            assert!(error < 8.0, "from {start:#x}: {error}");
        }
    }

    #[test]
    fn f64_is_good_to_the_last_places() {
        let xs: Vec<f64> = (-30_000..15_000).map(|i| (f64::from(i) * 0.0331).exp2()).collect();
        for level in levels() {
            for (&x, y) in xs.iter().zip(asinh_of(level, &xs)) {
                // Through ln(1 + y), which the standard library has to an ulp.
                let exact = (x + x * x / (1.0 + (1.0 + x * x).sqrt())).ln_1p() * LOG2_E;
                assert!((y / exact - 1.0).abs() <= 4.0 * f64::EPSILON, "{level:?}: {x:e}: {y:e}");
            }
        }
    }

    #[test]
    fn special_values() {
        for level in levels() {
            let ys = asinh_of(level, &[0.0, f32::NAN, 0.75, 63f32.exp2()]);
            assert!(ys[0] == 0.0 && ys[1].is_nan(), "{level:?}: {ys:?}");
            assert_eq!(ys[2..], [1.0, 64.0], "{level:?}");
            let ys = asinh_of(level, &[0.0, f64::NAN, 0.75, 511f64.exp2()]);
            assert!(ys[0] == 0.0 && ys[1].is_nan(), "{level:?}: {ys:?}");
            assert_eq!(ys[2..], [1.0, 512.0], "{level:?}");
        }
    }
}
