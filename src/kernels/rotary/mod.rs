//! Rotary positions: pairs of columns rotated by angles, a frequency times a position each.
//!
//! Angles, sines and cosines are computed in `f64`, whatever the element, in vectors along the
//! frequencies; those of one row are used for all its heads and then forgotten. `nodes` rotates the
//! rows of a matrix, for any mechanism to go on with.

mod nodes;

pub(super) use nodes::{rotate, rotate_vjp};

use super::matmul::Vector;
use super::sincos::sin_cos;
use crate::float::Float;
use fearless_simd::{Simd, SimdBase, SimdMask};
use ndarray::Array2;

/// Which columns of a head rotate together. Weights trained with one layout mean nothing in the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Columns 2p and 2p + 1: the paper's, GPT-J's and torchtune's.
    Interleaved,
    /// Columns p and p + d/2, d the rotated columns of a head: GPT-NeoX's and that of Llama's weights in
    /// Hugging Face's transformers (`rotate_half`).
    Half,
}

/// Which columns rotate, and how fast.
#[derive(Clone, Debug)]
pub struct Rotary {
    pub(crate) layout: Layout,
    /// Columns of a head; the first 2 · pairs of them rotate.
    pub(crate) head_dim: usize,
    /// θ, axes × pairs: the angle of pair p at position x is Σₐ θₐₚ xₐ.
    pub(crate) frequencies: Array2<f64>,
}

impl Rotary {
    fn pairs(&self) -> usize {
        self.frequencies.ncols()
    }
}

/// The rotation of one row.
struct Turn<F> {
    layout: Layout,
    head_dim: usize,
    pairs: usize,
    /// Pairs in whole vectors.
    stride: usize,
    /// Frequencies, and their upper and lower halves, axes × stride each.
    frequencies: [Vec<f64>; 3],
    cos: Vec<F>,
    sin: Vec<F>,
}

/// A number as the sum of two that have few enough bits for the products of such halves to be exact.
fn halves(x: f64) -> [f64; 2] {
    let high = f64::from_bits(x.to_bits() & (u64::MAX << 27));
    [high, x - high]
}

impl<F: Float> Turn<F> {
    #[inline(always)]
    fn new<S: Simd>(_: S, rotary: &Rotary) -> Self {
        Self::of_vectors(Vector::<S, f64>::LEN, rotary)
    }

    /// For vectors of so many numbers.
    fn of_vectors(len: usize, rotary: &Rotary) -> Self {
        let pairs = rotary.pairs();
        let stride = pairs.next_multiple_of(len);
        let mut frequencies = [(); 3].map(|()| vec![0.0; rotary.frequencies.nrows() * stride]);
        for ((axis, pair), &frequency) in rotary.frequencies.indexed_iter() {
            let [high, low] = halves(frequency);
            for (all, part) in frequencies.iter_mut().zip([frequency, high, low]) {
                all[axis * stride + pair] = part;
            }
        }
        let zeros = || vec![F::zero(); stride];
        let Rotary { layout, head_dim, .. } = *rotary;
        Self { layout, head_dim, pairs, stride, frequencies, cos: zeros(), sin: zeros() }
    }

    /// Takes up the angles of `sign` times a position.
    #[inline(always)]
    fn set<S: Simd>(&mut self, simd: S, position: &[F], sign: f64) {
        let splat = |x: f64| Vector::<S, f64>::splat(simd, x);
        let len = Vector::<S, f64>::LEN;
        for at in (0..self.stride).step_by(len) {
            let [mut angle, mut error] = [splat(0.0); 2];
            for (axis, &x) in position.iter().enumerate() {
                let x = sign * x.as_f64();
                let halves = halves(x).map(splat);
                let frequencies = self.frequencies.each_ref().map(|all| {
                    Vector::<S, f64>::from_slice(simd, &all[axis * self.stride + at..][..len])
                });
                let [product, rest] = exact_product::<S>(frequencies, splat(x), halves);
                let [sum, lost] = exact_sum::<S>(angle, product);
                angle = sum;
                error += rest + lost;
            }
            let [sin, cos] = sin_cos_of_sum(simd, angle, error);
            let (cos_of, sin_of) = (&mut self.cos[at..][..len], &mut self.sin[at..][..len]);
            for lane in 0..len {
                cos_of[lane] = F::of(cos.as_slice()[lane]);
                sin_of[lane] = F::of(sin.as_slice()[lane]);
            }
        }
    }

    /// Overwrites a head, or several side by side, with the rotated ones.
    #[inline(always)]
    fn apply(&self, heads: &[F], out: &mut [F]) {
        let pairs = self.pairs;
        let (cos, sin) = (&self.cos[..pairs], &self.sin[..pairs]);
        let heads = heads.chunks_exact(self.head_dim).zip(out.chunks_exact_mut(self.head_dim));
        for (head, out) in heads {
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

    /// sums\[p\] += x × y, the cross product of the columns of pair p: what a change of its angle by 1
    /// adds to ⟨y, x⟩, over one head or several.
    #[inline(always)]
    fn add_cross_products(&self, x: &[F], y: &[F], sums: &mut [F]) {
        let pairs = self.pairs;
        let sums = &mut sums[..pairs];
        for (x, y) in x.chunks_exact(self.head_dim).zip(y.chunks_exact(self.head_dim)) {
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
}

/// [a x, what rounding takes of it], of the halves of both (Dekker 1971). Not by fused multiply-add,
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

/// [a + b, what rounding takes of it] (Knuth).
#[inline(always)]
fn exact_sum<S: Simd>(a: Vector<S, f64>, b: Vector<S, f64>) -> [Vector<S, f64>; 2] {
    let sum = a + b;
    let of_b = sum - a;
    [sum, (a - (sum - of_b)) + (b - of_b)]
}

/// [sin, cos] of the sum of an angle and its rounding error.
#[inline(always)]
fn sin_cos_of_sum<S: Simd>(
    simd: S,
    angle: Vector<S, f64>,
    error: Vector<S, f64>,
) -> [Vector<S, f64>; 2] {
    let [sin, cos] = sin_cos::<S, f64>(simd, angle);
    // The square of the error is below rounding, but for angles of billions.
    let is_small = error.abs().simd_le(Vector::<S, f64>::splat(simd, 1e-9));
    let [sin_error, cos_error] = if is_small.all_true() {
        [error, Vector::<S, f64>::splat(simd, 1.0)]
    } else {
        sin_cos::<S, f64>(simd, error)
    };
    [sin * cos_error + cos * sin_error, cos * cos_error - sin * sin_error]
}
