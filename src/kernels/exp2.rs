//! 2^x for x ≤ 0: the exponential of a softmax, whose logits are kept in units of ln 2.

use crate::kernels::matmul::Vector;
use fearless_simd::{Select, Simd, SimdBase, SimdFloat, SimdFloatElement};

/// The constants of [`exp2`] for one type.
#[derive(Debug)]
pub struct Exp2<F: 'static> {
    /// Below this the result is 0: one less than the exponent of the smallest normal number.
    min: F,
    /// 1.5 · 2^(mantissa bits) + exponent bias. Adding it rounds x to an integer j, leaves j + bias
    /// in the lowest bits, and the sum minus it is j.
    magic: F,
    /// The number of mantissa bits: moves j + bias into the exponent.
    shift: u32,
    /// c₁, c₂, … of 2^r ≈ 1 + c₁ r + c₂ r² + …, |r| ≤ ½, with the smallest maximal relative error
    /// (by the Remez algorithm, in 60 digits).
    coefficients: &'static [F],
}

/// A type with a 2^x.
pub trait HasExp2: SimdFloatElement + 'static {
    /// Its constants.
    const EXP2: Exp2<Self>;
}

impl HasExp2 for f32 {
    /// Relative error of the polynomial 2^-28.5.
    const EXP2: Exp2<f32> = Exp2 {
        min: -127.0,
        magic: 12_582_912.0 + 127.0,
        shift: 23,
        coefficients: &[
            std::f32::consts::LN_2,
            0.240_226_53,
            0.055_503_104,
            0.009_617_693,
            0.001_340_664_4,
            0.000_155_946_78,
        ],
    };
}

impl HasExp2 for f64 {
    /// Relative error of the polynomial 2^-63.9.
    const EXP2: Exp2<f64> = Exp2 {
        min: -1023.0,
        magic: 6_755_399_441_055_744.0 + 1023.0,
        shift: 52,
        coefficients: &[
            std::f64::consts::LN_2,
            0.240_226_506_959_100_7,
            0.055_504_108_664_821_73,
            0.009_618_129_107_628_56,
            0.001_333_355_814_638_173_8,
            0.000_154_035_303_941_718_33,
            0.000_015_252_733_864_845_1,
            0.000_001_321_548_700_340_765,
            1.017_804_753_168_117_8e-7,
            7.054_814_836_763_028e-9,
            4.457_239_313_740_301e-10,
            2.585_523_844_459_004e-11,
        ],
    };
}

/// 2^x for x ≤ 0, to 1.5 units in the last place; 0 where 2^x is not a normal number, NaN for
/// NaN. Positive x that do not overflow come out right too.
#[inline(always)]
pub(crate) fn exp2<S: Simd, F: HasExp2>(simd: S, x: Vector<S, F>) -> Vector<S, F> {
    let Exp2 { min, magic, shift, coefficients } = F::EXP2;
    let min = Vector::<S, F>::splat(simd, min);
    // A comparison with NaN is false, so NaN stays.
    let x = x.simd_lt(min).select(min, x);
    let shifted = x + magic;
    let r = x - (shifted - magic);
    let (last, rest) = coefficients.split_last().expect("there are coefficients");
    let mut sum = Vector::<S, F>::splat(simd, *last);
    for &coefficient in rest.iter().rev() {
        sum = sum.mul_add(r, Vector::<S, F>::splat(simd, coefficient));
    }
    let sum = sum.mul_add(r, Vector::<S, F>::splat(simd, F::from(1u8)));
    sum * Vector::<S, F>::from_bits(shifted.to_bits() << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::levels;
    use fearless_simd::Level;

    /// 2^x of every number of a list.
    fn exp2_of<F: HasExp2>(level: Level, xs: &[F]) -> Vec<F> {
        #[inline(always)]
        fn run<S: Simd, F: HasExp2>(simd: S, xs: &mut [F]) {
            for chunk in xs.chunks_mut(Vector::<S, F>::LEN) {
                let mut padded = Vector::<S, F>::splat(simd, F::from(0u8));
                padded.as_mut_slice()[..chunk.len()].copy_from_slice(chunk);
                chunk.copy_from_slice(&exp2::<S, F>(simd, padded).as_slice()[..chunk.len()]);
            }
        }
        let mut xs = xs.to_vec();
        dispatch!(level, simd => run(simd, &mut xs));
        xs
    }

    /// The largest error over some f32 in [-126, 0], in units in the last place of the result.
    fn largest_error(level: Level, bits: impl Iterator<Item = u32>) -> f64 {
        let xs: Vec<f32> = bits.map(|bits| -f32::from_bits(bits)).collect();
        let ys = exp2_of(level, &xs);
        let errors = xs.iter().zip(ys).map(|(&x, y)| {
            let exact = f64::from(x).exp2();
            let ulp = (exact.log2().floor() - 23.0).exp2();
            (f64::from(y) - exact).abs() / ulp
        });
        errors.fold(0.0, f64::max)
    }

    const LAST: u32 = 126f32.to_bits();

    #[test]
    fn f32_is_good_to_the_last_place_everywhere() {
        for level in levels() {
            let error = largest_error(level, (0..=LAST).step_by(997));
            // Without fused multiply-add each step of the polynomial rounds twice.
            assert!(error < 1.5, "{level:?}: {error}");
        }
    }

    /// `cargo test --release exhaustive -- --ignored`
    #[test]
    #[ignore = "a billion numbers: some seconds in release mode"]
    fn exhaustive_f32() {
        for start in (0..=LAST).step_by(1 << 20) {
            let error = largest_error(Level::new(), start..LAST.min(start + (1 << 20)));
            assert!(error < 1.5, "from {start:#x}: {error}");
        }
    }

    #[test]
    fn f64_is_good_to_the_last_place() {
        let xs: Vec<f64> = (0..=1_022_000).map(|i| -f64::from(i) / 1000.0 + 1e-4).collect();
        for level in levels() {
            for (&x, y) in xs.iter().zip(exp2_of(level, &xs)) {
                // The standard library's is itself within one unit.
                let error = (y - x.exp2()).abs() / x.exp2();
                assert!(error <= 2.0 * f64::EPSILON, "{level:?}: 2^{x} = {y}");
            }
        }
    }

    #[test]
    fn special_values() {
        for level in levels() {
            let xs =
                [0.0, -0.0, f32::NEG_INFINITY, -1e30, -127.0, -1.0, f32::NAN, -1e-40, f32::MIN];
            let ys = exp2_of(level, &xs);
            assert_eq!(ys[..6], [1.0, 1.0, 0.0, 0.0, 0.0, 0.5], "{level:?}");
            assert!(ys[6].is_nan() && ys[7] == 1.0 && ys[8] == 0.0, "{level:?}");
            let xs = [0.0, f64::NEG_INFINITY, -1e300, -1023.0, -2.0, f64::NAN, -1e-310];
            let ys = exp2_of(level, &xs);
            assert_eq!(ys[..5], [1.0, 0.0, 0.0, 0.0, 0.25], "{level:?}");
            assert!(ys[5].is_nan() && ys[6] == 1.0, "{level:?}");
        }
    }
}
