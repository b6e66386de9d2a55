//! sin x and cos x together.

use crate::kernels::primitives::matmul::Vector;
use fearless_simd::{Select, Simd, SimdBase, SimdFloat, SimdFloatElement, SimdMask};

/// The constants of [`sin_cos`] for one type.
#[derive(Debug)]
pub struct SinCos<F: 'static> {
    /// 1.5 · 2^(mantissa bits): adding it rounds to an integer, whose last bits are those of the sum.
    magic: F,
    two_over_pi: F,
    /// π/2 in parts. The first two have few enough bits that their products with the integers below the
    /// limit are exact.
    half_pi: [F; 3],
    /// The limit above which the standard library is used.
    limit: F,
    /// (−1)^k/(2k + 1)! and (−1)^k/(2k)!, k ≥ 1: the rest is less than a tenth of the last place, |r| ≤
    /// π/4.
    sin: &'static [F],
    cos: &'static [F],
}

/// A type with sine and cosine.
pub trait HasSinCos: SimdFloatElement + 'static {
    /// Their constants.
    const SIN_COS: SinCos<Self>;
    /// Sine and cosine of the standard library.
    fn plain_sin_cos(self) -> (Self, Self);
}

const fn reciprocal_factorial(n: u32) -> f64 {
    let (mut product, mut k) = (1.0, 2);
    while k <= n {
        product *= k as f64;
        k += 1;
    }
    if n / 2 % 2 == 1 { -1.0 / product } else { 1.0 / product }
}

/// π/2 to 33 bits, to 66, and the rest; to 11 bits, to 22, and the rest.
const HALF_PI_F64: [f64; 3] =
    [1.570_796_326_734_125_6, 6.077_100_506_303_966e-11, 2.022_266_248_795_950_6e-21];
const HALF_PI_F32: [f32; 3] = [1.570_312_5, 4.837_513e-4, 7.549_79e-8];

impl HasSinCos for f32 {
    const SIN_COS: SinCos<f32> = SinCos {
        magic: 12_582_912.0,
        two_over_pi: std::f32::consts::FRAC_2_PI,
        half_pi: HALF_PI_F32,
        limit: 8192.0,
        sin: &[
            reciprocal_factorial(3) as f32,
            reciprocal_factorial(5) as f32,
            reciprocal_factorial(7) as f32,
            reciprocal_factorial(9) as f32,
        ],
        cos: &[
            reciprocal_factorial(2) as f32,
            reciprocal_factorial(4) as f32,
            reciprocal_factorial(6) as f32,
            reciprocal_factorial(8) as f32,
            reciprocal_factorial(10) as f32,
        ],
    };

    fn plain_sin_cos(self) -> (Self, Self) {
        self.sin_cos()
    }
}

impl HasSinCos for f64 {
    const SIN_COS: SinCos<f64> = SinCos {
        magic: 6_755_399_441_055_744.0,
        two_over_pi: std::f64::consts::FRAC_2_PI,
        half_pi: HALF_PI_F64,
        limit: 1e6,
        sin: &[
            reciprocal_factorial(3),
            reciprocal_factorial(5),
            reciprocal_factorial(7),
            reciprocal_factorial(9),
            reciprocal_factorial(11),
            reciprocal_factorial(13),
            reciprocal_factorial(15),
        ],
        cos: &[
            reciprocal_factorial(2),
            reciprocal_factorial(4),
            reciprocal_factorial(6),
            reciprocal_factorial(8),
            reciprocal_factorial(10),
            reciprocal_factorial(12),
            reciprocal_factorial(14),
            reciprocal_factorial(16),
        ],
    };

    fn plain_sin_cos(self) -> (Self, Self) {
        self.sin_cos()
    }
}

/// [sin x, cos x], accurate to a unit in the last place of 1; NaN for NaN and infinities.
#[inline(always)]
pub(crate) fn sin_cos<S: Simd, F: HasSinCos>(simd: S, x: Vector<S, F>) -> [Vector<S, F>; 2] {
    let SinCos { magic, two_over_pi, half_pi, limit, sin, cos } = F::SIN_COS;
    let splat = |value: F| Vector::<S, F>::splat(simd, value);
    let magic = splat(magic);
    let shifted = x.mul_add(splat(two_over_pi), magic);
    let j = shifted - magic;
    let mut r = x;
    for part in half_pi {
        r = (-j).mul_add(splat(part), r);
    }
    let square = r * r;
    let mut sums = [splat(F::from(0u8)); 2];
    for (sum, coefficients) in sums.iter_mut().zip([sin, cos]) {
        for &coefficient in coefficients.iter().rev() {
            *sum = sum.mul_add(square, splat(coefficient));
        }
    }
    let sine = (sums[0] * square).mul_add(r, r);
    let cosine = sums[1].mul_add(square, splat(F::from(1u8)));
    // The quadrant is in the last two bits: odd ones swap the two.
    let one = splat(F::from(1u8));
    let half = splat(F::from(1u8) / F::from(2u8));
    let of =
        |quotient: Vector<S, F>| quotient - ((quotient * half).floor() + (quotient * half).floor());
    let is_odd = of(j).simd_eq(one);
    let (sine, cosine) = (is_odd.select(cosine, sine), is_odd.select(sine, cosine));
    let is_second_half = of((j * half).floor()).simd_eq(one);
    let is_middle = of(((j + one) * half).floor()).simd_eq(one);
    let mut result = [is_second_half.select(-sine, sine), is_middle.select(-cosine, cosine)];
    let is_small = x.abs().simd_le(splat(limit));
    if !is_small.all_true() {
        for lane in 0..Vector::<S, F>::LEN {
            let (sine, cosine) = x.as_slice()[lane].plain_sin_cos();
            result[0].as_mut_slice()[lane] = sine;
            result[1].as_mut_slice()[lane] = cosine;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::levels;
    use fearless_simd::Level;

    fn sin_cos_of<F: HasSinCos>(level: Level, xs: &[F]) -> Vec<[F; 2]> {
        #[inline(always)]
        fn run<S: Simd, F: HasSinCos>(simd: S, xs: &[F]) -> Vec<[F; 2]> {
            let mut all = Vec::new();
            for chunk in xs.chunks(Vector::<S, F>::LEN) {
                let mut x = Vector::<S, F>::splat(simd, F::from(0u8));
                x.as_mut_slice()[..chunk.len()].copy_from_slice(chunk);
                let [sin, cos] = sin_cos::<S, F>(simd, x);
                all.extend((0..chunk.len()).map(|l| [sin.as_slice()[l], cos.as_slice()[l]]));
            }
            all
        }
        dispatch!(level, simd => run(simd, xs))
    }

    /// The largest error over some f32 of either sign, in units of 2^-24.
    fn largest_error(level: Level, bits: impl Iterator<Item = u32>) -> f64 {
        let xs: Vec<f32> = bits.map(f32::from_bits).flat_map(|x| [x, -x]).collect();
        let errors = xs.iter().zip(sin_cos_of(level, &xs)).map(|(&x, [sin, cos])| {
            let (exact_sin, exact_cos) = f64::from(x).sin_cos();
            let error = (f64::from(sin) - exact_sin).abs().max((f64::from(cos) - exact_cos).abs());
            error * 24f64.exp2()
        });
        errors.fold(0.0, f64::max)
    }

    const LAST: u32 = f32::MAX.to_bits();

    #[test]
    fn f32_is_good_to_the_last_place_of_one_everywhere() {
        for level in levels() {
            let error = largest_error(level, (0..=LAST).step_by(997));
            // Without fused multiply-add each step rounds twice.
            assert!(error <= 2.0, "{level:?}: {error}");
        }
    }

    #[test]
    fn small_angles_keep_their_relative_error() {
        for level in levels() {
            for x in [1e-30f32, -1e-10, 1e-3, 0.01, -0.1] {
                let [sin, _] = sin_cos_of(level, &[x])[0];
                let exact = f64::from(x).sin();
                assert!((f64::from(sin) / exact - 1.0).abs() < 1.2e-7, "{level:?}: {x}");
            }
        }
    }

    /// `cargo test --release exhaustive -- --ignored`
    #[test]
    #[ignore = "billions of numbers: a minute in release mode"]
    fn exhaustive_f32_sin_cos() {
        for start in (0..=LAST).step_by(1 << 20) {
            let error = largest_error(Level::new(), start..=LAST.min(start + (1 << 20)));
            assert!(error <= 2.0, "from {start:#x}: {error}");
        }
    }

    #[test]
    fn f64_is_good_to_the_last_place_of_one() {
        let fine = (-400_000..400_000).map(|i| f64::from(i) * 1e-3 + 1e-7);
        let coarse = (0..200_000).map(|i| f64::from(i) * 5.117_3);
        let powers = (-1000..1000).map(|i| f64::from(i).exp2());
        let xs: Vec<f64> = fine.chain(coarse).chain(powers).collect();
        for level in levels() {
            for (&x, [sin, cos]) in xs.iter().zip(sin_cos_of(level, &xs)) {
                let (exact_sin, exact_cos) = x.sin_cos();
                let error = (sin - exact_sin).abs().max((cos - exact_cos).abs());
                assert!(error <= 1.5 * f64::EPSILON, "{level:?}: {x}: {error:e}");
            }
        }
    }

    #[test]
    fn special_values() {
        for level in levels() {
            let values = sin_cos_of(level, &[0.0f32, -0.0, f32::NAN, f32::INFINITY, f32::MIN]);
            assert_eq!(values[..2], [[0.0, 1.0], [0.0, 1.0]], "{level:?}");
            assert!(values[1][0].is_sign_negative(), "{level:?}");
            assert!(values[2..4].iter().flatten().all(|value| value.is_nan()), "{level:?}");
            let (sin, cos) = f32::MIN.sin_cos();
            assert_eq!(values[4], [sin, cos], "{level:?}");
        }
    }
}
