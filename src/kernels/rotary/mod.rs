//! Rotary positions: pairs of columns rotated by angles, each a frequency times a position.
//!
//! Angles, sines and cosines are computed in `f64` for all element types, in vectors along the
//! frequencies. They are computed once per row for all heads and then discarded. `nodes` rotates the rows
//! of a matrix, for any mechanism; `edges` rotates the rows that a query meets, each by its own distance.

mod edges;
mod nodes;

pub(crate) use edges::RotaryProblem;
pub(super) use edges::{RotaryScorer, backward};
pub(crate) use nodes::RotationGradients;
pub(super) use nodes::{rotate, rotate_vjp};

use super::primitives::matmul::{Vector, vector_len};
use super::primitives::sincos::sin_cos;
use crate::kernels::Float;
use fearless_simd::{Level, Simd, SimdBase, SimdMask};
use ndarray::Array2;

/// The columns of a head that rotate together. Weights trained with one layout do not work with the
/// other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Layout {
    /// Columns 2p and 2p + 1, as in the paper, GPT-J and torchtune.
    Interleaved,
    /// Columns p and p + d/2, where d is the number of rotated columns of a head, as in GPT-NeoX and in
    /// Llama's weights in Hugging Face's transformers (`rotate_half`).
    Half,
}

/// The rotated columns and their frequencies.
#[derive(Clone, Debug)]
pub struct Rotary {
    pub(crate) layout: Layout,
    /// The number of columns of a head; the first 2 · pairs of them rotate.
    pub(crate) head_dim: usize,
    /// The number of rotated pairs of a head.
    pub(crate) pairs: usize,
    /// θ, axes × (blocks · pairs): the angle of pair p at position x is Σₐ θₐₚ xₐ. All heads share one block
    /// of pairs, or consecutive heads share each.
    pub(crate) frequencies: Array2<f64>,
    /// The factor of sines and cosines.
    pub(crate) factor: f64,
}

/// The rotation of one row.
struct Turn<F> {
    level: Level,
    layout: Layout,
    head_dim: usize,
    pairs: usize,
    factor: f64,
    blocks: usize,
    /// The number of pairs, rounded up to whole vectors.
    stride: usize,
    /// Frequencies, and their upper and lower halves, axes × blocks × stride each.
    frequencies: [Vec<f64>; 3],
    /// blocks × stride.
    cos: Vec<F>,
    sin: Vec<F>,
}

/// In one pass, so that it is vectorised.
#[inline(always)]
fn is_zero<F: Float>(values: &[F]) -> bool {
    values.iter().fold(true, |all, &value| all & (value == F::zero()))
}

/// Splits a number into a sum of two numbers with few enough bits that products of such halves are exact.
fn halves(x: f64) -> [f64; 2] {
    let high = f64::from_bits(x.to_bits() & (u64::MAX << 27));
    [high, x - high]
}

impl<F: Float> Turn<F> {
    fn new(level: Level, rotary: &Rotary) -> Self {
        let len = vector_len::<f64>(level);
        let Rotary { layout, head_dim, pairs, factor, .. } = *rotary;
        let (axes, columns) = rotary.frequencies.dim();
        let (blocks, stride) = (columns / pairs, pairs.next_multiple_of(len));
        let mut frequencies = [(); 3].map(|()| vec![0.0; axes * blocks * stride]);
        for ((axis, column), &frequency) in rotary.frequencies.indexed_iter() {
            let [high, low] = halves(frequency);
            let at = (axis * blocks + column / pairs) * stride + column % pairs;
            for (all, part) in frequencies.iter_mut().zip([frequency, high, low]) {
                all[at] = part;
            }
        }
        let [cos, sin] = [(); 2].map(|()| vec![F::zero(); blocks * stride]);
        Self { level, layout, head_dim, pairs, factor, blocks, stride, frequencies, cos, sin }
    }

    /// Returns the block of a head.
    #[inline(always)]
    fn block(&self, head: usize, num_heads: usize) -> usize {
        head * self.blocks / num_heads
    }

    /// Sets the angles to those of `sign` times a position.
    #[inline(never)]
    fn set(&mut self, position: &[F], sign: f64) {
        dispatch!(self.level, simd => self.set_in_vectors(simd, position, sign));
    }

    #[inline(always)]
    fn set_in_vectors<S: Simd>(&mut self, simd: S, position: &[F], sign: f64) {
        let splat = |x: f64| Vector::<S, f64>::splat(simd, x);
        let len = Vector::<S, f64>::LEN;
        let columns = self.blocks * self.stride;
        let factor = splat(self.factor);
        for at in (0..columns).step_by(len) {
            let [mut angle, mut error] = [splat(0.0); 2];
            for (axis, &x) in position.iter().enumerate() {
                let x = sign * x.as_f64();
                let halves = halves(x).map(splat);
                let frequencies = self.frequencies.each_ref().map(|all| {
                    Vector::<S, f64>::from_slice(simd, &all[axis * columns + at..][..len])
                });
                let [product, rest] = exact_product::<S>(frequencies, splat(x), halves);
                let [sum, lost] = exact_sum::<S>(angle, product);
                angle = sum;
                error += rest + lost;
            }
            let [sin, cos] = sin_cos_of_sum(simd, angle, error).map(|value| value * factor);
            let (cos_of, sin_of) = (&mut self.cos[at..][..len], &mut self.sin[at..][..len]);
            for lane in 0..len {
                cos_of[lane] = F::from_f64(cos.as_slice()[lane]);
                sin_of[lane] = F::from_f64(sin.as_slice()[lane]);
            }
        }
    }

    /// Overwrites one head, or several side by side, with the rotated heads.
    #[inline(never)]
    fn apply(&self, heads: &[F], out: &mut [F]) {
        let num_heads = heads.len() / self.head_dim;
        dispatch!(self.level, _simd => {
            self.rotate(heads, out, #[inline(always)] |head| self.block(head, num_heads));
        });
    }

    /// Overwrites one head, which has this block of frequencies.
    #[inline(never)]
    fn apply_block(&self, block: usize, head: &[F], out: &mut [F]) {
        dispatch!(self.level, _simd => self.rotate(head, out, #[inline(always)] |_| block));
    }

    #[inline(always)]
    fn rotate(&self, heads: &[F], out: &mut [F], block_of: impl Fn(usize) -> usize) {
        let pairs = self.pairs;
        let heads = heads.chunks_exact(self.head_dim).zip(out.chunks_exact_mut(self.head_dim));
        for (number, (head, out)) in heads.enumerate() {
            let first = block_of(number) * self.stride;
            let (cos, sin) = (&self.cos[first..][..pairs], &self.sin[first..][..pairs]);
            let (head, rest) = head.split_at(2 * pairs);
            let (out, out_rest) = out.split_at_mut(2 * pairs);
            out_rest.copy_from_slice(rest);
            match self.layout {
                Layout::Interleaved => {
                    let columns = head.chunks_exact(2).zip(out.chunks_exact_mut(2));
                    for ((x, out), (&cos, &sin)) in columns.zip(cos.iter().zip(sin)) {
                        out[0] = x[0] * cos - x[1] * sin;
                        out[1] = x[0] * sin + x[1] * cos;
                    }
                }
                Layout::Half => {
                    let ((a, b), (out_a, out_b)) = (head.split_at(pairs), out.split_at_mut(pairs));
                    for p in 0..pairs {
                        out_a[p] = a[p] * cos[p] - b[p] * sin[p];
                        out_b[p] = a[p] * sin[p] + b[p] * cos[p];
                    }
                }
            }
        }
    }

    /// Overwrites `out` with the factors of a row y in the derivative of scale · x·y, when y turns with a
    /// position on one axis.
    fn slope(&self, scale: F, x: &[F], out: &mut [F]) {
        out.fill(F::zero());
        let num_heads = x.len() / self.head_dim;
        let heads = x.chunks_exact(self.head_dim).zip(out.chunks_exact_mut(self.head_dim));
        for (head, (x, out)) in heads.enumerate() {
            let first = self.block(head, num_heads) * self.stride;
            let frequencies = &self.frequencies[0][first..][..self.pairs];
            for (p, &frequency) in frequencies.iter().enumerate() {
                let [a, b] = match self.layout {
                    Layout::Interleaved => [2 * p, 2 * p + 1],
                    Layout::Half => [p, p + self.pairs],
                };
                let factor = scale * F::from_f64(frequency);
                // y turns (a, b) into (−b, a).
                out[a] = factor * x[b];
                out[b] = -factor * x[a];
            }
        }
    }

    /// sums\[p\] += x × y, the cross product of the columns of pair p: the derivative of ⟨y, x⟩ with
    /// respect to its angle, for one head. The sums of its block follow those of the blocks before.
    #[inline(never)]
    fn add_cross_products(&self, block: usize, x: &[F], y: &[F], sums: &mut [F]) {
        dispatch!(self.level, _simd => self.add_cross(x, y, &mut sums[block * self.pairs..]));
    }

    #[inline(always)]
    fn add_cross(&self, x: &[F], y: &[F], sums: &mut [F]) {
        let pairs = self.pairs;
        let sums = &mut sums[..pairs];
        let (x, y) = (&x[..2 * pairs], &y[..2 * pairs]);
        match self.layout {
            Layout::Interleaved => {
                let columns = x.chunks_exact(2).zip(y.chunks_exact(2));
                for ((x, y), sum) in columns.zip(sums.iter_mut()) {
                    *sum += x[0] * y[1] - x[1] * y[0];
                }
            }
            Layout::Half => {
                let ((a, b), (c, d)) = (x.split_at(pairs), y.split_at(pairs));
                for p in 0..pairs {
                    sums[p] += a[p] * d[p] - b[p] * c[p];
                }
            }
        }
    }
}

/// Returns a x and its rounding error, from the halves of both (Dekker 1971). Not by fused multiply-add,
/// which not every instruction set has.
#[inline(always)]
fn exact_product<S: Simd>(
    [a, a_high, a_low]: [Vector<S, f64>; 3],
    x: Vector<S, f64>,
    [x_high, x_low]: [Vector<S, f64>; 2],
) -> [Vector<S, f64>; 2] {
    let product = a * x;
    let rest = a_high * x_high - product + a_high * x_low + a_low * x_high + a_low * x_low;
    [product, rest]
}

/// Returns a + b and its rounding error (Knuth).
#[inline(always)]
fn exact_sum<S: Simd>(a: Vector<S, f64>, b: Vector<S, f64>) -> [Vector<S, f64>; 2] {
    let sum = a + b;
    let of_b = sum - a;
    [sum, (a - (sum - of_b)) + (b - of_b)]
}

/// Returns [sin, cos] of the sum of an angle and its rounding error.
#[inline(always)]
fn sin_cos_of_sum<S: Simd>(
    simd: S,
    angle: Vector<S, f64>,
    error: Vector<S, f64>,
) -> [Vector<S, f64>; 2] {
    let [sin, cos] = sin_cos::<S, f64>(simd, angle);
    // The square of the error is below rounding, except for angles of billions.
    let is_small = error.abs().simd_le(Vector::<S, f64>::splat(simd, 1e-9));
    let [sin_error, cos_error] = if is_small.all_true() {
        [error, Vector::<S, f64>::splat(simd, 1.0)]
    } else {
        sin_cos::<S, f64>(simd, error)
    };
    [sin * cos_error + cos * sin_error, cos * cos_error - sin * sin_error]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::levels;
    use crate::kernels::problem::Rows;
    use ndarray::array;

    /// The rotation of a row of columns 1, 2, 3, …, in two heads, with a column that stays.
    fn rotated<F: Float>(layout: Layout, frequencies: &Array2<f64>, position: &[f64]) -> Vec<F> {
        let (pairs, head_dim) = (frequencies.ncols(), 2 * frequencies.ncols() + 1);
        let x = |column: usize| (column + 1) as f64;
        let mut out: Vec<F> = (0..2 * head_dim).map(|column| F::from_f64(x(column))).collect();
        for head in [0, head_dim] {
            for p in 0..pairs {
                let [a, b] = match layout {
                    Layout::Interleaved => [head + 2 * p, head + 2 * p + 1],
                    Layout::Half => [head + p, head + p + pairs],
                };
                // Angles of a few: rounding of the products does not matter.
                let angles = position.iter().zip(frequencies.column(p)).map(|(x, theta)| x * theta);
                let (sin, cos) = angles.sum::<f64>().sin_cos();
                out[a] = F::from_f64(x(a) * cos - x(b) * sin);
                out[b] = F::from_f64(x(a) * sin + x(b) * cos);
            }
        }
        out
    }

    fn rotations_are_those_of_plain_loops<F: Float>() {
        for level in levels() {
            for pairs in [1, 2, 3, 4, 5, 8, 9, 17] {
                let frequencies =
                    Array2::from_shape_fn((2, pairs), |(a, p)| 1.0 / (1 + a + p) as f64 - 0.2);
                let positions = array![[1.5, -2.0], [0.0, 0.25], [-3.0, 4.5]];
                for layout in [Layout::Interleaved, Layout::Half] {
                    let head_dim = 2 * pairs + 1;
                    let frequencies = frequencies.clone();
                    let rotary = Rotary { layout, head_dim, pairs, frequencies, factor: 1.0 };
                    let x = Array2::from_shape_fn((3, 2 * head_dim), |(_, c)| {
                        F::from_f64((c + 1) as f64)
                    });
                    let x = Rows::new("x", x.view()).unwrap();
                    let mut out = Array2::from_elem((3, 2 * head_dim), F::nan());
                    let at = positions.mapv(F::from_f64);
                    let at = Rows::new("positions", at.view()).unwrap();
                    rotate(&rotary, level, &at, &x, out.view_mut());
                    for (out, position) in out.rows().into_iter().zip(positions.rows()) {
                        let expected =
                            rotated::<F>(layout, &rotary.frequencies, position.to_slice().unwrap());
                        let tolerance = F::from_f64(8.0 * head_dim as f64) * F::epsilon();
                        for (&a, &b) in out.iter().zip(&expected) {
                            assert!(
                                (a - b).abs() <= tolerance,
                                "{level:?} {layout:?} {pairs}: {a} {b}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rotations_are_those_of_plain_loops_in_either_precision() {
        rotations_are_those_of_plain_loops::<f32>();
        rotations_are_those_of_plain_loops::<f64>();
    }

    /// sin and cos of θ x on one axis, from a Turn.
    fn sin_cos_of(level: fearless_simd::Level, theta: f64, x: f64) -> [f64; 2] {
        let rotary = Rotary {
            layout: Layout::Half,
            head_dim: 2,
            pairs: 1,
            frequencies: Array2::from_elem((1, 1), theta),
            factor: 1.0,
        };
        let mut turn = Turn::<f64>::new(level, &rotary);
        turn.set(&[x], 1.0);
        [turn.sin[0], turn.cos[0]]
    }

    #[test]
    fn large_angles_are_those_of_the_exact_product() {
        for level in levels() {
            for theta in [0.1, 0.7, 1.0 / 3.0, 1.333_521e-4] {
                for x in [3.7, 1e5 + 0.1, -7.7e6, 1.3e10, 4.1e15] {
                    // sin(a + b) of a product and what rounding takes of it.
                    let product = theta * x;
                    let rest = f64::mul_add(theta, x, -product);
                    let ((sin_a, cos_a), (sin_b, cos_b)) = (product.sin_cos(), rest.sin_cos());
                    let expected = [sin_a * cos_b + cos_a * sin_b, cos_a * cos_b - sin_a * sin_b];
                    for (a, b) in sin_cos_of(level, theta, x).into_iter().zip(expected) {
                        assert!((a - b).abs() < 4e-16, "{level:?}: {theta} · {x}: {a} {b}");
                    }
                }
            }
        }
    }
}
