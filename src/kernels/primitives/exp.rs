//! e^x and 2^x for x ≤ 0: the exponentials of softmax and of random features.

use crate::kernels::primitives::matmul::Vector;
use fearless_simd::{Select, Simd, SimdBase, SimdFloat, SimdFloatElement};

/// The constants of [`exp`] and [`exp2`] for one type.
#[derive(Debug)]
pub struct Exp<F: 'static> {
    /// Below this 2^x is 0: one less than the exponent of the smallest normal number.
    min: F,
    /// The same bound for e^x.
    min_natural: F,
    /// log₂ e, and its rounding error.
    log2_e: [F; 2],
    /// 1.5 · 2^(mantissa bits) + exponent bias. Adding it rounds x to an integer j, leaves j + bias
    /// in the lowest bits, and the sum minus it is j.
    magic: F,
    /// The number of mantissa bits: moves j + bias into the exponent.
    shift: u32,
    /// c₁, c₂, … of 2^r ≈ 1 + c₁ r + c₂ r² + …, |r| ≤ ½, with the smallest maximal relative error
    /// (by the Remez algorithm, in 60 digits).
    coefficients: &'static [F],
}

/// A type with e^x.
pub trait HasExp: SimdFloatElement + 'static {
    /// Its constants.
    const EXP: Exp<Self>;
}

impl HasExp for f32 {
    /// Relative error of the polynomial 2^-28.5.
    const EXP: Exp<f32> = Exp {
        min: -127.0,
        min_natural: -127.0 * std::f32::consts::LN_2,
        log2_e: [std::f32::consts::LOG2_E, 1.925_963e-8],
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

impl HasExp for f64 {
    /// Relative error of the polynomial 2^-63.9.
    const EXP: Exp<f64> = Exp {
        min: -1023.0,
        min_natural: -1023.0 * std::f64::consts::LN_2,
        log2_e: [std::f64::consts::LOG2_E, 2.035_527_374_093_103_3e-17],
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

/// e^x for x ≤ 0, accurate to 1.5 units in the last place if the CPU has fused multiply-add, and |x| / 2
/// more otherwise; 0 if e^x is not a normal number, NaN for NaN. Also correct for positive x that do not
/// overflow.
#[inline(always)]
pub(crate) fn exp<S: Simd, F: HasExp>(simd: S, x: Vector<S, F>) -> Vector<S, F> {
    let [shifted, r] = reduced::<S, F>(simd, x);
    power::<S, F>(simd, shifted, r)
}

/// e^x and e^x − 1 for x ≤ 0, the second one accurate to a few units in its last place also near 0. 0 and −1 if e^x is
/// not a normal number, NaN for NaN.
///
/// ```text
/// e^x = 2^{j + r} = 2^j (2^r − 1) + 2^j      e^x − 1 = 2^j (2^r − 1) + (2^j − 1)
/// ```
#[inline(always)]
pub(crate) fn exp_and_m1<S: Simd, F: HasExp>(simd: S, x: Vector<S, F>) -> [Vector<S, F>; 2] {
    let [shifted, r] = reduced::<S, F>(simd, x);
    let of_r = series::<S, F>(simd, r) * r;
    let power = Vector::<S, F>::from_bits(shifted.to_bits() << F::EXP.shift);
    [of_r.mul_add(power, power), of_r.mul_add(power, power - F::from(1u8))]
}

/// j + magic and r with x log₂ e = j + r and |r| ≤ ½, for x that is not below the smallest.
#[inline(always)]
fn reduced<S: Simd, F: HasExp>(simd: S, x: Vector<S, F>) -> [Vector<S, F>; 2] {
    let Exp { min_natural, magic, log2_e, .. } = F::EXP;
    let min = Vector::<S, F>::splat(simd, min_natural);
    let log2_e = [Vector::<S, F>::splat(simd, log2_e[0]), Vector::<S, F>::splat(simd, log2_e[1])];
    // A comparison with NaN is false, so NaN stays.
    let x = x.simd_lt(min).select(min, x);
    // The rounding error of the product is in r.
    let shifted = x.mul_add(log2_e[0], Vector::<S, F>::splat(simd, magic));
    let r = x.mul_add(log2_e[0], -(shifted - magic));
    [shifted, x.mul_add(log2_e[1], r)]
}

/// 2^x for x ≤ 0, accurate to 1.5 units in the last place; 0 if 2^x is not a normal number, NaN for NaN.
/// Also correct for positive x that do not overflow.
#[inline(always)]
pub(crate) fn exp2<S: Simd, F: HasExp>(simd: S, x: Vector<S, F>) -> Vector<S, F> {
    let Exp { min, magic, .. } = F::EXP;
    let min = Vector::<S, F>::splat(simd, min);
    let x = x.simd_lt(min).select(min, x);
    let shifted = x + magic;
    power::<S, F>(simd, shifted, x - (shifted - magic))
}

/// 2^{j + r} for |r| ≤ ½, from j + magic and r.
#[inline(always)]
fn power<S: Simd, F: HasExp>(simd: S, shifted: Vector<S, F>, r: Vector<S, F>) -> Vector<S, F> {
    let sum = series::<S, F>(simd, r).mul_add(r, Vector::<S, F>::splat(simd, F::from(1u8)));
    sum * Vector::<S, F>::from_bits(shifted.to_bits() << F::EXP.shift)
}

/// (2^r − 1) / r for |r| ≤ ½.
#[inline(always)]
fn series<S: Simd, F: HasExp>(simd: S, r: Vector<S, F>) -> Vector<S, F> {
    let (last, rest) = F::EXP.coefficients.split_last().expect("there are coefficients");
    let mut sum = Vector::<S, F>::splat(simd, *last);
    for &coefficient in rest.iter().rev() {
        sum = sum.mul_add(r, Vector::<S, F>::splat(simd, coefficient));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::levels;
    use fearless_simd::Level;

    /// e^x or 2^x of every number of a list.
    fn powers_of<F: HasExp>(level: Level, is_natural: bool, xs: &[F]) -> Vec<F> {
        #[inline(always)]
        fn run<S: Simd, F: HasExp>(simd: S, is_natural: bool, xs: &mut [F]) {
            for chunk in xs.chunks_mut(Vector::<S, F>::LEN) {
                let mut padded = Vector::<S, F>::splat(simd, F::from(0u8));
                padded.as_mut_slice()[..chunk.len()].copy_from_slice(chunk);
                let powers =
                    if is_natural { exp::<S, F>(simd, padded) } else { exp2::<S, F>(simd, padded) };
                chunk.copy_from_slice(&powers.as_slice()[..chunk.len()]);
            }
        }
        let mut xs = xs.to_vec();
        dispatch!(level, simd => run(simd, is_natural, &mut xs));
        xs
    }

    fn exp2_of<F: HasExp>(level: Level, xs: &[F]) -> Vec<F> {
        powers_of(level, false, xs)
    }

    #[test]
    fn natural_exponentials_are_good_to_the_last_place() {
        let singles: Vec<f32> =
            (0..=(87f32).to_bits()).step_by(997).map(|x| -f32::from_bits(x)).collect();
        let doubles: Vec<f64> = (0..=708_000).map(|i| -f64::from(i) / 1000.0 + 1e-4).collect();
        for level in levels() {
            // Without fused multiply-add the product with log₂ e rounds, which |x| magnifies.
            let product = if has_fused_multiply_add(level) { 0.0 } else { 0.5 };
            for (&x, y) in singles.iter().zip(powers_of(level, true, &singles)) {
                let exact = f64::from(x).exp();
                let error = (f64::from(y) - exact).abs() / exact / f64::from(f32::EPSILON);
                assert!(error < 1.5 - product * f64::from(x), "{level:?}: e^{x} = {y}, {error}");
            }
            for (&x, y) in doubles.iter().zip(powers_of(level, true, &doubles)) {
                let error = (y - x.exp()).abs() / x.exp() / f64::EPSILON;
                assert!(error <= 2.0 - product * x, "{level:?}: e^{x} = {y}, {error}");
            }
            let xs = [0.0, -0.0, f32::NEG_INFINITY, f32::MIN, -88.1, f32::NAN, -1e-40];
            let ys = powers_of(level, true, &xs);
            assert_eq!(ys[..5], [1.0, 1.0, 0.0, 0.0, 0.0], "{level:?}");
            assert!(ys[5].is_nan() && ys[6] == 1.0, "{level:?}");
            let ys = powers_of(level, true, &[f64::NEG_INFINITY, f64::MIN, -709.2, f64::NAN]);
            assert_eq!(ys[..3], [0.0; 3], "{level:?}");
            assert!(ys[3].is_nan(), "{level:?}");
        }
    }

    /// Whether (1 + ε)² − (1 + 2ε) is ε², not 0.
    fn has_fused_multiply_add(level: Level) -> bool {
        #[inline(always)]
        fn run<S: Simd>(simd: S) -> bool {
            let x = Vector::<S, f32>::splat(simd, 1.0 + f32::EPSILON);
            let square = Vector::<S, f32>::splat(simd, -1.0 - 2.0 * f32::EPSILON);
            x.mul_add(x, square).as_slice()[0] != 0.0
        }
        dispatch!(level, simd => run(simd))
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
