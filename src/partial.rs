use crate::error::{Error, Result, check_shape};
use crate::float::{Float, nan_max, try_vec, try_zeros};
use crate::inputs::head_columns;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

/// The result of softmax attention over a part of the keys: outputs, and the log-sum-exp of the
/// logits, with which parts are put together to the exact answer over all keys.
///
/// ```text
/// L = log(e^{L₁} + e^{L₂}),   o = e^{L₁−L} o₁ + e^{L₂−L} o₂
/// ```
///
/// So one query's keys can live in several shards, HNSW layers or machines. The merge is
/// associative and commutative up to rounding, and [`empty`](Self::empty) (output 0, log-sum-exp
/// −∞) is its identity. A part whose only logits are −∞ counts as empty, whatever its values.
/// (Milakov & Gimelshein 2018, 1805.02867; Rabe & Staats 2021, 2112.05682.)
///
/// Made by [`ScaledDotProduct::forward_partial`](crate::ScaledDotProduct::forward_partial) and
/// [`Flash::forward_partial`](crate::Flash::forward_partial):
///
/// ```
/// use graph_attention::{Attention, Flash, Inputs};
/// use graph_attention::ndarray::{array, s};
///
/// let q = array![[0.3f64, -0.1]];
/// let k = array![[1.0, 2.0], [0.5, 0.1], [-1.0, 0.7]];
/// let v = array![[1.0], [2.0], [3.0]];
/// let flash = Flash::new();
/// let over = |keys: std::ops::Range<usize>| {
///     let (k, v) = (k.slice(s![keys.clone(), ..]), v.slice(s![keys, ..]));
///     flash.forward_partial(&Inputs::dense(q.view(), k, v)?)
/// };
/// let merged = over(0..2)?.merge(&over(2..3)?)?;
/// let whole = flash.forward(&Inputs::dense(q.view(), k.view(), v.view())?)?;
/// assert!((merged.out()[[0, 0]] - whole[[0, 0]]).abs() < 1e-15);
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Partial<F> {
    out: Array2<F>,
    log_sum_exp: Array2<F>,
}

impl<F: Float> Partial<F> {
    /// From outputs, num_queries × (heads · d_v), and the log-sum-exp, num_queries × heads. Where
    /// that is −∞ no key was seen, and the outputs are set to 0.
    ///
    /// # Errors
    /// [`Error::Shape`] if the numbers of rows differ; [`Error::Heads`] if the outputs cannot be
    /// split into as many blocks as the log-sum-exp has columns.
    pub fn new(mut out: Array2<F>, log_sum_exp: Array2<F>) -> Result<Self> {
        let (heads, columns) = (log_sum_exp.ncols(), out.ncols());
        check_shape("log_sum_exp", &[out.nrows(), heads], log_sum_exp.shape())?;
        if heads == 0 || !columns.is_multiple_of(heads) {
            return Err(Error::Heads { what: "out", heads, columns });
        }
        let dim = columns / heads;
        for ((query, head), &log_sum) in log_sum_exp.indexed_iter() {
            if log_sum == F::neg_infinity() {
                out.slice_mut(s![query, head_columns(head, dim)]).fill(F::zero());
            }
        }
        Ok(Self { out, log_sum_exp })
    }

    /// The result over no keys: output 0 and log-sum-exp −∞.
    ///
    /// # Errors
    /// [`Error::Heads`] if the columns cannot be split into `heads`; [`Error::TooLarge`] if it does
    /// not fit in memory.
    pub fn empty(num_queries: usize, output_dim: usize, heads: usize) -> Result<Self> {
        let shape = [num_queries, heads];
        let log_sum_exp = try_vec("log_sum_exp", &shape, F::neg_infinity())?;
        let log_sum_exp = Array2::from_shape_vec(shape, log_sum_exp)
            .map_err(|_| Error::TooLarge { what: "log_sum_exp", shape: shape.to_vec() })?;
        Self::new(try_zeros("out", num_queries, output_dim)?, log_sum_exp)
    }

    /// The outputs over the keys seen so far.
    #[must_use]
    pub fn out(&self) -> ArrayView2<'_, F> {
        self.out.view()
    }

    /// log Σ e^{logit} over the keys seen so far, for each query and head; −∞ where there are none.
    #[must_use]
    pub fn log_sum_exp(&self) -> ArrayView2<'_, F> {
        self.log_sum_exp.view()
    }

    /// Outputs and log-sum-exp.
    #[must_use]
    pub fn into_parts(self) -> (Array2<F>, Array2<F>) {
        (self.out, self.log_sum_exp)
    }

    /// The result over the keys of both, which must be disjoint sets of pairs.
    ///
    /// # Errors
    /// [`Error::Shape`] if the two are over different queries, heads or columns.
    pub fn merge(mut self, other: &Self) -> Result<Self> {
        check_shape("partial.out", self.out.shape(), other.out.shape())?;
        check_shape("partial.log_sum_exp", self.log_sum_exp.shape(), other.log_sum_exp.shape())?;
        let log_sum_exp = self.log_sum_exp.view_mut();
        merge_rows(self.out.view_mut(), log_sum_exp, other, 0..other.out.nrows());
        Ok(self)
    }
}

/// Merges another part into outputs and their log-sum-exp; `rows` says where its rows belong.
pub(crate) fn merge_rows<F: Float>(
    mut out: ArrayViewMut2<'_, F>,
    mut log_sum_exp: ArrayViewMut2<'_, F>,
    other: &Partial<F>,
    rows: impl IntoIterator<Item = usize>,
) {
    let heads = log_sum_exp.ncols();
    let dim = out.ncols() / heads;
    for (row, into) in rows.into_iter().enumerate() {
        for head in 0..heads {
            let (a, b) = (&mut log_sum_exp[[into, head]], other.log_sum_exp[[row, head]]);
            if b == F::neg_infinity() {
                continue;
            }
            let columns = head_columns(head, dim);
            let mut out = out.slice_mut(s![into, columns.clone()]);
            let other = other.out.slice(s![row, columns]);
            if *a == F::neg_infinity() {
                // A part without keys is left out, not multiplied by zero.
                out.assign(&other);
                *a = b;
                continue;
            }
            let max = nan_max(*a, b);
            let (weight_a, weight_b) = ((*a - max).exp(), (b - max).exp());
            let sum = weight_a + weight_b;
            out.zip_mut_with(&other, |a, &b| *a = (*a * weight_a + b * weight_b) / sum);
            *a = max + sum.ln();
        }
    }
}
