#[cfg(feature = "serde")]
mod serde;

use crate::element::try_zeros;
use crate::error::{Error, Result, check_shape};
use crate::inputs::head_columns;
use crate::kernels::Float;
use crate::kernels::normalizer::{Normalizer, Part, merge};
use crate::kernels::problem::{Rows, Upstream};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, s};
use std::ops::Range;

/// `backward_partial` of a mechanism, from its `backward_partial_into`.
macro_rules! backward_partial {
    ($partial:ident $(, $float:ident, $score:ident: $bound:path)?) => {
        /// Runs [`backward_partial_into`](Self::backward_partial_into) and returns new gradients.
        ///
        /// # Errors
        /// As [`backward_partial_into`](Self::backward_partial_into).
        pub fn backward_partial$(<$float: Float>)?(
            &self,
            inputs: &Inputs<'_, F>,
            partial: &$partial<F>,
            grad_out: ArrayView2<'_, F>,
            grad_log_sum_exp: Option<ArrayView2<'_, F>>,
        ) -> Result<Gradients<F>>
        $(where
            $score: $bound,)?
        {
            let mut grads = Gradients::zeros(inputs, self)?;
            let views = grads.view_mut();
            self.backward_partial_into(inputs, partial, grad_out, grad_log_sum_exp, views)?;
            Ok(grads)
        }
    };
}
pub(crate) use backward_partial;

/// The result of softmax attention over some of the keys: the outputs o and their normalizer (m, l).
/// Results over disjoint sets of keys can be merged into the exact result over all keys, and the backward
/// pass of each set can be run by itself.
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
/// `forward_partial` and `backward_partial` of [`Flash`](crate::Flash::forward_partial),
/// [`ScaledDotProduct`](crate::ScaledDotProduct::forward_partial),
/// [`LocalGlobal`](crate::LocalGlobal::forward_partial), [`EdgeGat`](crate::EdgeGat::forward_partial) and
/// [`EdgeRope`](crate::EdgeRope::forward_partial) return and take it. Those of
/// [`Poincare`](crate::Poincare::forward_partial) have [`PartialMean`](crate::poincare::PartialMean), and a
/// [`Performer`](crate::Performer) has [`PerformerState`](crate::performer::PerformerState). [`guide::beyond_one_machine`](crate::guide::beyond_one_machine) explains how to
/// share keys, queries or edges among machines.
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
/// let inputs = Inputs::dense(q.view(), k.view(), v.view())?;
/// let (whole, saved) = flash.forward_train(&inputs)?;
/// assert!((merged.out()[[0, 0]] - whole[[0, 0]]).abs() < 1e-15);
///
/// // Backwards, each shard adds what its keys contribute to the gradient of the query.
/// let grad_out = array![[1.0]];
/// let of = |keys: std::ops::Range<usize>| {
///     let (k, v) = (k.slice(s![keys.clone(), ..]), v.slice(s![keys, ..]));
///     flash.backward_partial(&Inputs::dense(q.view(), k, v)?, &merged, grad_out.view(), None)
/// };
/// let sum = of(0..2)?.query + of(2..3)?.query;
/// let whole = flash.backward(&inputs, &saved, grad_out.view())?.query;
/// assert!((sum - whole).iter().all(|difference| difference.abs() < 1e-15));
/// # Ok::<(), graph_attention::Error>(())
/// ```
///
/// # Gradients
///
/// With the gradients g of o and h of L = m + log l, the gradient of the logit of a pair is
///
/// ```text
/// ds = e^{s − m} / l · (g·v − g·o + h)
/// ```
///
/// so a shard needs no other keys, only o, m and l over *all* keys, g, and h if it is not 0. There are two
/// ways to run the backward pass of a merged result. They give the same gradients:
///
/// * Pass the merged result and its gradients to `backward_partial` of each shard, as above.
/// * Pass them to [`merge_vjp`](Self::merge_vjp) for each part, and the part with the gradients that it
///   returns to `backward_partial`. Then every shard keeps only its own part.
///
/// # Serialisation
///
/// With the feature `serde`, a partial result can be sent in any [serde](https://serde.rs) format, also
/// JSON: the shift −∞ of a query without keys is written as 0. It is checked like the arguments of
/// [`new`](Self::new) when it is read.
#[derive(Clone, Debug, PartialEq)]
pub struct Partial<F> {
    out: Array2<F>,
    normalizer: Normalizer<F>,
}

impl<F: Float> Partial<F> {
    /// Creates a result from outputs, num_queries × (heads · d_v), and the shift m and sum l, num_queries
    /// × heads each. A sum of 0 means that no key was seen, and sets the outputs to 0 and the shift to −∞.
    ///
    /// # Errors
    /// [`Error::Shape`] if the numbers of rows or heads differ; [`Error::Heads`] if the outputs cannot be
    /// split into as many blocks as there are heads.
    pub fn new(mut out: Array2<F>, mut shift: Array2<F>, sum: Array2<F>) -> Result<Self> {
        let (heads, columns) = (shift.ncols(), out.ncols());
        check_shape("shift", &[out.nrows(), heads], shift.shape())?;
        check_shape("sum", &[out.nrows(), heads], sum.shape())?;
        if heads == 0 || !columns.is_multiple_of(heads) {
            return Err(Error::Heads { what: "out", heads, columns });
        }
        let dim = columns / heads;
        for ((query, head), &sum) in sum.indexed_iter() {
            if sum == F::zero() {
                shift[[query, head]] = F::neg_infinity();
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
        self.merge_with(None, other, &|_, _, _| {})?;
        Ok(self)
    }

    /// Merges a result over other pairs of some of the queries: row r of `other` is of query `queries[r]`.
    /// For shards that only get the queries that have keys there.
    ///
    /// # Errors
    /// [`Error::Shape`] if `other` has another number of rows than `queries`, or other numbers of heads or
    /// columns than `self`; [`Error::InvalidArgument`] for a query that does not exist.
    pub fn merge_queries(mut self, queries: &[usize], other: &Self) -> Result<Self> {
        self.merge_with(Some(queries), other, &|_, _, _| {})?;
        Ok(self)
    }

    /// Merges a result of these queries, `None` for all, and passes the two parts and the merged row of each query
    /// and head to `adjust`.
    pub(crate) fn merge_with(
        &mut self,
        queries: Option<&[usize]>,
        other: &Self,
        adjust: &Adjust<'_, F>,
    ) -> Result<()> {
        self.check_like(queries.map_or(self.out.nrows(), <[_]>::len), other)?;
        self.check_queries(queries.unwrap_or_default())?;
        let (out, normalizer) = (self.out.view_mut(), &mut self.normalizer);
        match queries {
            None => merge_rows(out, normalizer, other, 0..other.out.nrows(), adjust),
            Some(queries) => {
                merge_rows(out, normalizer, other, queries.iter().copied(), adjust);
            }
        }
        Ok(())
    }

    /// Returns the results of some of the queries, in their order.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a query that does not exist.
    pub fn select_queries(&self, queries: &[usize]) -> Result<Self> {
        self.check_queries(queries)?;
        let rows = |array: &Array2<F>| array.select(Axis(0), queries);
        let Normalizer { shift, sum } = &self.normalizer;
        let normalizer = Normalizer { shift: rows(shift), sum: rows(sum) };
        Ok(Self { out: rows(&self.out), normalizer })
    }

    /// Returns the gradients of the outputs and of the log-sum-exp of a part, given those of the result
    /// over all parts, which is `self`. A `grad_log_sum_exp` of `None` is zeros.
    ///
    /// ```text
    /// w = e^{m₁ − m} l₁ / l      g₁ = w g      h₁ = w (g·(o₁ − o) + h)
    /// ```
    ///
    /// A part without keys gets zeros. The order in which the parts were merged does not matter.
    ///
    /// ```
    /// use graph_attention::Partial;
    /// use graph_attention::ndarray::array;
    ///
    /// // Two parts of equal weight.
    /// let part = |out: f64| Partial::from_log_sum_exp(array![[out]], array![[0.0]]);
    /// let (a, b) = (part(1.0)?, part(3.0)?);
    /// let merged = a.clone().merge(&b)?;
    /// let (grad_out, grad_log_sum_exp) = merged.merge_vjp(&a, array![[10.0]].view(), None)?;
    /// assert_eq!(grad_out, array![[5.0]]);
    /// assert_eq!(grad_log_sum_exp, array![[-5.0]]); // more weight for 1 makes 2 smaller
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] if the part or a gradient does not fit.
    pub fn merge_vjp(
        &self,
        part: &Self,
        grad_out: ArrayView2<'_, F>,
        grad_log_sum_exp: Option<ArrayView2<'_, F>>,
    ) -> Result<(Array2<F>, Array2<F>)> {
        self.check_like(self.out.nrows(), part)?;
        let upstream = self.upstream(grad_out, grad_log_sum_exp)?;
        let (num_queries, heads) = self.normalizer.sum.dim();
        let dim = self.out.ncols() / heads;
        let mut grad_part = try_zeros("grad_out", num_queries, self.out.ncols())?;
        let mut grad_log_sum = try_zeros("grad_log_sum_exp", num_queries, heads)?;
        for ((query, head), grad_log_sum) in grad_log_sum.indexed_iter_mut() {
            if self.normalizer.is_empty(query, head) || part.normalizer.is_empty(query, head) {
                continue;
            }
            let weight = upstream.weight_of_part(&part.normalizer, query, head);
            let at = s![query, head_columns(head, dim)];
            let (grad, out) = (grad_out.slice(at), self.out.slice(at));
            let mut sum = (upstream.grad_log_sum_exp).map_or(0.0, |h| h[[query, head]].as_f64());
            for ((g, of_part), o) in grad.iter().zip(part.out.slice(at)).zip(out) {
                sum += g.as_f64() * (of_part.as_f64() - o.as_f64());
            }
            *grad_log_sum = F::from_f64(weight * sum);
            let scaled = |into: &mut F, g: &F| *into = F::from_f64(weight * g.as_f64());
            grad_part.slice_mut(at).zip_mut_with(&grad, scaled);
        }
        Ok((grad_part, grad_log_sum))
    }

    /// Returns the shifts and sums.
    pub(crate) fn normalizer(&self) -> &Normalizer<F> {
        &self.normalizer
    }

    /// Returns the inputs of a backward pass.
    ///
    /// # Errors
    /// [`Error::Shape`] if a gradient does not fit.
    pub(crate) fn upstream<'u>(
        &'u self,
        grad_out: ArrayView2<'u, F>,
        grad_log_sum_exp: Option<ArrayView2<'u, F>>,
    ) -> Result<PartialUpstream<'u, F>> {
        check_shape("grad_out", self.out.shape(), grad_out.shape())?;
        if let Some(grad) = grad_log_sum_exp {
            check_shape("grad_log_sum_exp", self.shift().shape(), grad.shape())?;
        }
        let (out, normalizer) = (self.out.view(), &self.normalizer);
        Ok(PartialUpstream { out, normalizer, grad_out, grad_log_sum_exp })
    }

    /// Checks the numbers of queries, columns and heads.
    pub(crate) fn check(&self, num_queries: usize, columns: usize, heads: usize) -> Result<()> {
        check_shape("partial.out", &[num_queries, columns], self.out.shape())?;
        check_shape("partial.shift", &[num_queries, heads], self.shift().shape())
    }

    /// Checks that another result has as many columns and heads, and this number of rows.
    fn check_like(&self, num_queries: usize, other: &Self) -> Result<()> {
        other.check(num_queries, self.out.ncols(), self.normalizer.sum.ncols())
    }

    fn check_queries(&self, queries: &[usize]) -> Result<()> {
        let num_queries = self.out.nrows();
        match queries.iter().find(|&&query| query >= num_queries) {
            Some(query) => Err(Error::config("queries", format!("below {num_queries}"), query)),
            None => Ok(()),
        }
    }
}

/// The inputs of the backward pass of a softmax. Outputs and normalizer may be over more keys than the pass
/// visits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PartialUpstream<'u, F> {
    pub(crate) out: ArrayView2<'u, F>,
    pub(crate) normalizer: &'u Normalizer<F>,
    pub(crate) grad_out: ArrayView2<'u, F>,
    /// `None` is zeros.
    pub(crate) grad_log_sum_exp: Option<ArrayView2<'u, F>>,
}

impl<F: Float> PartialUpstream<'_, F> {
    /// Returns e^{m₁ − m} l₁ / l, the weight of a part with the normalizer (m₁, l₁) among all parts; 0 if no
    /// key was seen.
    pub(crate) fn weight_of_part(&self, part: &Normalizer<F>, query: usize, head: usize) -> f64 {
        if self.normalizer.is_empty(query, head) {
            return 0.0;
        }
        let [shift, sum] = self.normalizer.terms(query, head);
        let [part_shift, part_sum] = part.terms(query, head);
        (part_shift - shift).exp() * part_sum / sum
    }

    /// Runs a function with the form that the kernels take.
    pub(crate) fn in_rows<T>(&self, run: impl FnOnce(Upstream<'_, F>) -> Result<T>) -> Result<T> {
        let out = Rows::new("out", self.out)?;
        let grad_out = Rows::new("grad_out", self.grad_out)?;
        let grad_log_sum_exp =
            (self.grad_log_sum_exp).map(|grad| Rows::new("grad_log_sum_exp", grad)).transpose()?;
        run(Upstream {
            out: out.slices(),
            normalizer: self.normalizer,
            grad_out: grad_out.slices(),
            grad_log_sum_exp: grad_log_sum_exp.as_ref().map(Rows::slices),
            grad_weights: None,
        })
    }

    /// Returns δ = g·o − h.
    pub(crate) fn delta(&self, query: usize, head: usize) -> F {
        let dim = self.out.ncols() / self.normalizer.sum.ncols();
        let at = s![query, head_columns(head, dim)];
        let of_log_sum_exp = self.grad_log_sum_exp.map_or(F::zero(), |grad| grad[[query, head]]);
        self.grad_out.slice(at).dot(&self.out.slice(at)) - of_log_sum_exp
    }

    /// Runs a function with those of some queries.
    pub(crate) fn with_queries<T>(
        &self,
        queries: Range<usize>,
        run: impl FnOnce(PartialUpstream<'_, F>) -> T,
    ) -> T {
        let normalizer = self.normalizer.rows(queries.clone());
        let rows = s![queries, ..];
        run(PartialUpstream {
            out: self.out.slice(rows),
            normalizer: &normalizer,
            grad_out: self.grad_out.slice(rows),
            grad_log_sum_exp: self.grad_log_sum_exp.as_ref().map(|grad| grad.slice(rows)),
        })
    }
}

/// Changes the merged outputs of a query and head, given its two parts and the merged shift and sum.
pub(crate) type Adjust<'a, F> =
    dyn Fn(&[Part<ArrayView1<'_, F>, F>; 2], [F; 2], ArrayViewMut1<'_, F>) + 'a;

/// Merges another part into outputs and their normalizer; `rows` are the target rows.
pub(crate) fn merge_rows<F: Float>(
    mut out: ArrayViewMut2<'_, F>,
    normalizer: &mut Normalizer<F>,
    other: &Partial<F>,
    rows: impl IntoIterator<Item = usize>,
    adjust: &Adjust<'_, F>,
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
            let merged = merge(&parts, out.view_mut());
            adjust(&parts, merged, out);
            [normalizer.shift[[into, head]], normalizer.sum[[into, head]]] = merged;
        }
    }
}
