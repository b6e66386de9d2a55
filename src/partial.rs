use crate::error::{Error, Result, check_shape};
use crate::float::{Float, try_zeros};
use crate::inputs::head_columns;
use crate::kernels::normalizer::{Normalizer, Part, merge};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

/// The result of softmax attention over some of the keys: the outputs o and their normalizer (m, l).
/// Results over disjoint sets of keys can be merged into the exact result over all keys.
///
/// ```text
/// o = Σ e^{s − m} v / l,                   l = Σ e^{s − m}
/// m = max(m₁, m₂),                         l = e^{m₁ − m} l₁ + e^{m₂ − m} l₂
/// o = (e^{m₁ − m} l₁ o₁ + e^{m₂ − m} l₂ o₂) / l
/// ```
///
/// The keys of a query can therefore be in several shards, HNSW layers or machines. The merge is
/// associative and commutative up to rounding, and [`empty`](Self::empty) (output 0, m = −∞, l = 0) is
/// its identity. A part with only logits of −∞ counts as empty, whatever its values.
/// (Milakov & Gimelshein 2018, 1805.02867; Rabe & Staats 2021, 2112.05682.)
///
/// The shift m and the sum l are stored separately. Other libraries store only the log-sum-exp L = m +
/// log l, which is enough for logits of ordinary size. If |L| is large, for example with a bias of −1e9,
/// its rounding error is large too, and parts would get wrong weights.
///
/// Returned by [`ScaledDotProduct::forward_partial`](crate::ScaledDotProduct::forward_partial) and
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
    normalizer: Normalizer<F>,
}

impl<F: Float> Partial<F> {
    /// Creates a result from outputs, num_queries × (heads · d_v), and the shift m and sum l, num_queries
    /// × heads each. A sum of 0 means that no key was seen, and sets the outputs to 0.
    ///
    /// # Errors
    /// [`Error::Shape`] if the numbers of rows or heads differ; [`Error::Heads`] if the outputs cannot be
    /// split into as many blocks as there are heads.
    pub fn new(mut out: Array2<F>, shift: Array2<F>, sum: Array2<F>) -> Result<Self> {
        let (heads, columns) = (shift.ncols(), out.ncols());
        check_shape("shift", &[out.nrows(), heads], shift.shape())?;
        check_shape("sum", &[out.nrows(), heads], sum.shape())?;
        if heads == 0 || !columns.is_multiple_of(heads) {
            return Err(Error::Heads { what: "out", heads, columns });
        }
        let dim = columns / heads;
        for ((query, head), &sum) in sum.indexed_iter() {
            if sum == F::zero() {
                out.slice_mut(s![query, head_columns(head, dim)]).fill(F::zero());
            }
        }
        Ok(Self { out, normalizer: Normalizer { shift, sum } })
    }

    /// Creates a result from outputs and the log-sum-exp L of another library, num_queries × heads: the
    /// shift is L and the sum is 1, or 0 if L is −∞. It is only as accurate as L.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_log_sum_exp(out: Array2<F>, log_sum_exp: Array2<F>) -> Result<Self> {
        check_shape("log_sum_exp", &[out.nrows(), log_sum_exp.ncols()], log_sum_exp.shape())?;
        let is_seen = |&log_sum: &F| log_sum != F::neg_infinity();
        let sum = log_sum_exp.map(|log_sum| if is_seen(log_sum) { F::one() } else { F::zero() });
        Self::new(out, log_sum_exp, sum)
    }

    /// Creates the result over no keys.
    ///
    /// # Errors
    /// [`Error::Heads`] if the columns cannot be split into `heads`; [`Error::TooLarge`] if it does
    /// not fit in memory.
    pub fn empty(num_queries: usize, output_dim: usize, heads: usize) -> Result<Self> {
        let Normalizer { shift, sum } = Normalizer::empty(num_queries, heads)?;
        Self::new(try_zeros("out", num_queries, output_dim)?, shift, sum)
    }

    /// Returns the outputs over the keys seen so far.
    #[must_use]
    pub fn out(&self) -> ArrayView2<'_, F> {
        self.out.view()
    }

    /// Returns m for each query and head: the largest logit or a number slightly below it; −∞ without
    /// keys.
    #[must_use]
    pub fn shift(&self) -> ArrayView2<'_, F> {
        self.normalizer.shift.view()
    }

    /// Returns l = Σ e^{s − m} over the keys seen so far, for each query and head; 0 without keys.
    #[must_use]
    pub fn sum(&self) -> ArrayView2<'_, F> {
        self.normalizer.sum.view()
    }

    /// Returns L = m + log l = log Σ e^s over the keys seen so far, for each query and head; −∞ without
    /// keys.
    #[must_use]
    pub fn log_sum_exp(&self) -> Array2<F> {
        self.normalizer.log_sum_exp()
    }

    /// Returns outputs, shift and sum.
    #[must_use]
    pub fn into_parts(self) -> (Array2<F>, Array2<F>, Array2<F>) {
        (self.out, self.normalizer.shift, self.normalizer.sum)
    }

    /// Merges two results over disjoint sets of pairs.
    ///
    /// # Errors
    /// [`Error::Shape`] if the numbers of queries, heads or columns differ.
    pub fn merge(mut self, other: &Self) -> Result<Self> {
        check_shape("partial.out", self.out.shape(), other.out.shape())?;
        check_shape("partial.shift", self.shift().shape(), other.shift().shape())?;
        let rows = 0..other.out.nrows();
        merge_rows(self.out.view_mut(), &mut self.normalizer, other, rows);
        Ok(self)
    }
}

/// Merges another part into outputs and their normalizer; `rows` are the target rows.
pub(crate) fn merge_rows<F: Float>(
    mut out: ArrayViewMut2<'_, F>,
    normalizer: &mut Normalizer<F>,
    other: &Partial<F>,
    rows: impl IntoIterator<Item = usize>,
) {
    let heads = normalizer.shift.ncols();
    let dim = out.ncols() / heads;
    for (row, into) in rows.into_iter().enumerate() {
        for head in 0..heads {
            if other.normalizer.is_empty(row, head) {
                continue;
            }
            let columns = head_columns(head, dim);
            let mut out = out.slice_mut(s![into, columns.clone()]);
            let before = out.to_owned();
            let part = |out, normalizer: &Normalizer<F>, query| {
                let (shift, sum) = (normalizer.shift[[query, head]], normalizer.sum[[query, head]]);
                Part { out, shift, sum }
            };
            let parts = [
                part(before.view(), normalizer, into),
                part(other.out.slice(s![row, columns]), &other.normalizer, row),
            ];
            [normalizer.shift[[into, head]], normalizer.sum[[into, head]]] =
                merge(&parts, out.view_mut());
        }
    }
}
