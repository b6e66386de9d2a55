//! The divisor of the exponentials of a softmax.

use crate::element::{nan_max, try_array};
use crate::error::{Result, check_shape};
use crate::inputs::head_columns;
use crate::kernels::Float;
use crate::score::{ScoreFunction, with_sink};
use ndarray::{Array2, ArrayView1, ArrayViewMut1, ArrayViewMut2, Axis, Ix2, s};
use std::ops::Range;

/// The normalizer of the softmax of each query and head, in two parts:
///
/// ```text
/// p = e^{s − m} / l,   l = Σ e^{s − m}
/// ```
///
/// m is the largest logit or a number slightly below it. The log-sum-exp L = m + log l alone would not be
/// enough: if
/// |L| is large, its rounding error is large too, and e^{s − L} is wrong by a factor.
#[derive(Clone, Debug, PartialEq)]
pub struct Normalizer<F> {
    /// m, num_queries × heads; −∞ if no key is seen.
    pub(crate) shift: Array2<F>,
    /// l, num_queries × heads; 0 where no key is seen.
    pub(crate) sum: Array2<F>,
}

impl<F: Float> Normalizer<F> {
    /// Joins those of consecutive queries.
    pub(crate) fn join(parts: &[Self], heads: usize) -> Self {
        let joined = |array: fn(&Self) -> &Array2<F>| {
            let mut joined = Array2::zeros((0, heads));
            for part in parts {
                joined.append(Axis(0), array(part).view()).expect("as many heads");
            }
            joined
        };
        Self { shift: joined(|part| &part.shift), sum: joined(|part| &part.sum) }
    }

    /// Returns that of some queries.
    pub(crate) fn rows(&self, queries: Range<usize>) -> Self {
        let rows = |array: &Array2<F>| array.slice(s![queries.clone(), ..]).to_owned();
        Self { shift: rows(&self.shift), sum: rows(&self.sum) }
    }

    /// Creates a normalizer of queries that have seen no key.
    pub(crate) fn empty(num_queries: usize, heads: usize) -> Result<Self> {
        let filled = |value| try_array("log_sum_exp", Ix2(num_queries, heads), value);
        Ok(Self { shift: filled(F::neg_infinity())?, sum: filled(F::zero())? })
    }

    /// Checks the numbers of queries and heads.
    pub(crate) fn check(&self, num_queries: usize, heads: usize) -> Result<()> {
        check_shape("saved normalizer", &[num_queries, heads], self.shift.shape())
    }

    #[inline]
    pub(crate) fn is_empty(&self, query: usize, head: usize) -> bool {
        self.sum[[query, head]] == F::zero()
    }

    /// Whether any query saw no key.
    pub(crate) fn has_empty_rows(&self) -> bool {
        self.sum.iter().any(|&sum| sum == F::zero())
    }

    /// Returns [m, 1/l], or [+∞, 0] if no key was seen, so that all weights e^{s − m} / l are 0.
    #[inline]
    pub(crate) fn factors(&self, query: usize, head: usize) -> [F; 2] {
        if self.is_empty(query, head) {
            return [F::infinity(), F::zero()];
        }
        [self.shift[[query, head]], F::one() / self.sum[[query, head]]]
    }

    /// Returns [m, l] in `f64`.
    pub(crate) fn terms(&self, query: usize, head: usize) -> [f64; 2] {
        [self.shift[[query, head]].as_f64(), self.sum[[query, head]].as_f64()]
    }

    /// Returns L = m + log l, or −∞ if no key was seen.
    pub(crate) fn log_sum_exp(&self) -> Array2<F> {
        let mut log_sum_exp = self.shift.clone();
        log_sum_exp.zip_mut_with(&self.sum, |shift, sum| *shift += sum.ln());
        log_sum_exp
    }

    /// Resets a query to having seen no key.
    pub(crate) fn clear_row(&mut self, query: usize) {
        self.shift.row_mut(query).fill(F::neg_infinity());
        self.sum.row_mut(query).fill(F::zero());
    }

    /// Adds the sinks of a score function to the outputs and to this normalizer.
    pub(crate) fn add_sinks(
        &mut self,
        score: &impl ScoreFunction<F>,
        mut out: ArrayViewMut2<'_, F>,
    ) {
        let heads = self.sum.ncols();
        let dim = out.ncols() / heads;
        for head in 0..heads {
            let sink = score.sink(head);
            if sink == F::neg_infinity() {
                continue;
            }
            let mut out = out.slice_mut(s![.., head_columns(head, dim)]);
            for (query, mut row) in out.rows_mut().into_iter().enumerate() {
                let [factor, shift, sum] =
                    with_sink(sink.as_f64(), self.terms(query, head)).map(F::from_f64);
                row.iter_mut().for_each(|out| *out *= factor);
                self.shift[[query, head]] = shift;
                self.sum[[query, head]] = sum;
            }
        }
    }

    /// Adds the gradients of the sinks: −p δ for each query, where p is the weight of the sink and δ = g·o,
    /// num_queries × heads.
    pub(crate) fn sinks_vjp(
        &self,
        score: &impl ScoreFunction<F>,
        deltas: &Array2<f64>,
        grad_params: &mut [f64],
    ) {
        for head in 0..self.sum.ncols() {
            let sink = score.sink(head);
            if sink == F::neg_infinity() {
                continue;
            }
            let of_query = |(query, &delta): (usize, &f64)| {
                let [shift, sum] = self.terms(query, head);
                (sink.as_f64() - shift).exp() / sum * delta
            };
            let sum: f64 = deltas.column(head).iter().enumerate().map(of_query).sum();
            score.sink_vjp(head, -sum, grad_params);
        }
    }
}

/// The output of a query and head over the keys of one part, with its normalizer.
pub(crate) struct Part<V, F> {
    pub(crate) out: V,
    pub(crate) shift: F,
    pub(crate) sum: F,
}

/// Overwrites `out` with the output over the keys of all parts; returns its normalizer m and l. A part
/// without keys is skipped, not multiplied by zero.
///
/// ```text
/// m = max mᵢ,   l = Σ e^{mᵢ − m} lᵢ,   o = Σ e^{mᵢ − m} lᵢ oᵢ / l
/// ```
///
/// In `f64`, so that the error does not grow with the number of parts.
pub(crate) fn merge<'r, F: Float>(
    parts: &[Part<ArrayView1<'r, F>, F>],
    mut out: ArrayViewMut1<'_, F>,
) -> [F; 2] {
    let parts = || parts.iter().filter(|part| part.sum != F::zero());
    let shift = parts().fold(F::neg_infinity(), |max, part| nan_max(max, part.shift));
    let weight = |part: &Part<_, F>| (part.shift - shift).as_f64().exp() * part.sum.as_f64();
    let sum: f64 = parts().map(weight).sum();
    if sum == 0.0 {
        out.fill(F::zero());
        return [F::neg_infinity(), F::zero()];
    }
    let weights: Vec<f64> = parts().map(|part| weight(part) / sum).collect();
    for (column, out) in out.iter_mut().enumerate() {
        let terms = parts().zip(&weights).map(|(part, weight)| weight * part.out[column].as_f64());
        *out = F::from_f64(terms.sum());
    }
    [shift, F::from_f64(sum)]
}
