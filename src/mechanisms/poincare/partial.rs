//! Means over some of the keys.

use super::config::radii_within;
use super::mean::Sums;
use super::{Aggregation, Embedded, NAME, Poincare};
use crate::element::try_zeros;
use crate::error::{Channel, Error, Result, check_shape};
use crate::gradients::{Gradients, GradientsMut};
use crate::inputs::{Inputs, head_columns};
use crate::kernels::Float;
use crate::kernels::normalizer::{Normalizer, Part};
use crate::mechanisms::packed;
use crate::params;
use crate::partial::{Partial, backward_partial};
use ndarray::{Array2, ArrayD, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, s};

/// The result of a [`Poincare`] over some of the keys, before the mean is taken. Results over disjoint sets of keys
/// can be merged into the exact result over all keys.
///
/// A mean of points is not a weighted sum of the means of the shards. But the [midpoint](Aggregation::Midpoint) is
/// the direction of a sum of vectors of the hyperboloid, and the mean in the tangent space
/// [at the origin](Aggregation::TangentAtOrigin) is a sum of tangent vectors:
///
/// ```text
/// midpoint           (T, S) = Σ p (cosh R, sinh R u)      out = S/(T + √(T² − |S|²)) / √c
/// at the origin      S = Σ p R u                          out = tanh(|S|/2) S/|S| / √c
/// ```
///
/// where R u is a value in polar form, R = √c d(0, v). A partial mean holds these sums with the weights p of its own
/// keys, as a [`Partial`] ([`sums`](Self::sums)). So a shard sends d_v + 3 numbers for each query and head, or d_v + 2:
/// S, T − |S| for midpoints, shift and sum.
///
/// Far from the origin T and |S| are large and nearly equal, so T − |S| is summed by itself, when parts are merged as
/// well as within a part. With û = S/|S| and the shares w₁ + w₂ = 1 of the weight:
///
/// ```text
/// T − |S| = w₁ (T₁ − |S₁| + |S₁| |û₁ − û|²/2) + w₂ (T₂ − |S₂| + |S₂| |û₂ − û|²/2)
/// ```
///
/// The other two means have no partial result: that at the query is a sum of vectors, but is computed point by point,
/// and the Fréchet mean is not a function of such sums.
///
/// ```
/// use graph_attention::{Attention, Gradients, Inputs, PoincareConfig};
/// use graph_attention::ndarray::{Array2, s};
///
/// let x = Array2::from_shape_fn((6, 2), |(i, j)| 0.3 * ((i * 7 + j * 3) as f64).sin());
/// let poincare = PoincareConfig::new().init::<f64>()?;
/// let whole = Inputs::dense(x.view(), x.view(), x.view())?;
/// let shards = [0..4, 4..6].map(|keys| {
///     let keys = x.slice(s![keys, ..]);
///     Inputs::dense(x.view(), keys, keys).unwrap()
/// });
///
/// let [first, second] = [&shards[0], &shards[1]].map(|shard| poincare.forward_partial(shard));
/// let merged = first?.merge(&second?)?;
/// let (out, saved) = poincare.forward_train(&whole)?;
/// assert!((poincare.finish_partial(&merged)? - &out).iter().all(|difference| difference.abs() < 1e-14));
///
/// // Backwards, each shard adds what its keys contribute to the gradient of the queries.
/// let mut grad_query = Array2::zeros((6, 2));
/// for shard in &shards {
///     grad_query += &poincare.backward_partial(shard, &merged, out.view(), None)?.query;
/// }
/// let of_whole = poincare.backward(&whole, &saved, out.view())?.query;
/// assert!((grad_query - of_whole).iter().all(|difference| difference.abs() < 1e-14));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize),
    serde(bound(serialize = "F: serde::Serialize"))
)]
pub struct PartialMean<F: Float> {
    aggregation: Aggregation,
    sums: Partial<F>,
}

impl<F: Float> PartialMean<F> {
    /// Creates a partial mean from its [`sums`](Self::sums).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the aggregation has no partial result; [`Error::Shape`] if the sums for a
    /// midpoint have no columns.
    pub fn new(aggregation: Aggregation, sums: Partial<F>) -> Result<Self> {
        check_aggregation(aggregation)?;
        let partial = Self { aggregation, sums };
        if num_gaps(aggregation) > partial.columns() {
            return Err(Error::shape("sums of a head", &[1], &[0]));
        }
        Ok(partial)
    }

    /// Creates the result over no keys, for values of `value_dim` columns per head.
    ///
    /// # Errors
    /// As [`new`](Self::new) and [`Partial::empty`].
    pub fn empty(
        aggregation: Aggregation,
        num_queries: usize,
        value_dim: usize,
        heads: usize,
    ) -> Result<Self> {
        check_aggregation(aggregation)?;
        let columns = value_dim + num_gaps(aggregation);
        let sums = Partial::empty(num_queries, heads.saturating_mul(columns), heads)?;
        Self::new(aggregation, sums)
    }

    /// Returns the mean that is taken of the sums.
    #[must_use]
    pub fn aggregation(&self) -> Aggregation {
        self.aggregation
    }

    /// Returns S of each head, for midpoints followed by T − |S|, with the normalizer of the weights. To merge two of
    /// them with [`Partial::merge`] would lose a part of T − |S|.
    #[must_use]
    pub fn sums(&self) -> &Partial<F> {
        &self.sums
    }

    /// Merges two results over disjoint sets of pairs.
    ///
    /// # Errors
    /// [`Error::Shape`] if the numbers of queries, heads or columns differ; [`Error::InvalidArgument`] if the
    /// aggregations do.
    pub fn merge(self, other: &Self) -> Result<Self> {
        self.merge_with(None, other)
    }

    /// Merges a result over other pairs of some of the queries, as [`Partial::merge_queries`].
    ///
    /// # Errors
    /// As [`merge`](Self::merge) and [`Partial::merge_queries`].
    pub fn merge_queries(self, queries: &[usize], other: &Self) -> Result<Self> {
        self.merge_with(Some(queries), other)
    }

    fn merge_with(mut self, queries: Option<&[usize]>, other: &Self) -> Result<Self> {
        if self.aggregation != other.aggregation {
            let (expected, actual) = (self.aggregation, other.aggregation);
            return Err(Error::config(
                "aggregation",
                format!("{expected:?}"),
                format!("{actual:?}"),
            ));
        }
        match self.is_linear() {
            true => self.sums.merge_with(queries, &other.sums, &|_, _, _| {})?,
            false => self.sums.merge_with(queries, &other.sums, &add_spread)?,
        }
        Ok(self)
    }

    /// Returns the results of some of the queries, in their order.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a query that does not exist.
    pub fn select_queries(&self, queries: &[usize]) -> Result<Self> {
        Ok(Self { aggregation: self.aggregation, sums: self.sums.select_queries(queries)? })
    }

    pub(super) fn is_linear(&self) -> bool {
        num_gaps(self.aggregation) == 0
    }

    pub(super) fn normalizer(&self) -> Normalizer<F> {
        self.sums.normalizer().clone()
    }

    /// Returns the number of columns of S for a head.
    pub(super) fn dim(&self) -> usize {
        self.columns() - num_gaps(self.aggregation)
    }

    fn columns(&self) -> usize {
        self.sums.out().ncols() / self.sums.sum().ncols()
    }

    /// Returns S, and T − |S| for midpoints.
    pub(super) fn sum_and_gap(&self, query: usize, head: usize) -> (ArrayView1<'_, F>, Option<F>) {
        let row = self.sums.out().slice_move(s![query, head_columns(head, self.columns())]);
        let (sum, gap) = row.split_at(Axis(0), self.dim());
        (sum, gap.first().copied())
    }

    fn check(&self, poincare: &Poincare<F>, [num_queries, dim, heads]: [usize; 3]) -> Result<()> {
        if self.aggregation != poincare.config.aggregation {
            let (expected, actual) = (poincare.config.aggregation, self.aggregation);
            return Err(Error::config(
                "partial.aggregation",
                format!("{expected:?}"),
                format!("{actual:?}"),
            ));
        }
        let columns = heads.saturating_mul(dim + num_gaps(self.aggregation));
        self.sums.check(num_queries, columns, heads)
    }
}

/// Returns how many numbers follow S.
fn num_gaps(aggregation: Aggregation) -> usize {
    usize::from(aggregation == Aggregation::Midpoint)
}

fn check_aggregation(aggregation: Aggregation) -> Result<()> {
    if aggregation.is_plain() {
        let expected = "Midpoint or TangentAtOrigin, whose sums can be merged";
        return Err(Error::config("aggregation", expected, format!("{aggregation:?}")));
    }
    Ok(())
}

/// Adds to T − |S| what the directions of two parts differ: Σ w |S| |û − û'|²/2, where w are the shares of the weight
/// and û' is the merged direction.
fn add_spread<F: Float>(
    parts: &[Part<ArrayView1<'_, F>, F>; 2],
    [shift, sum]: [F; 2],
    mut out: ArrayViewMut1<'_, F>,
) {
    let dim = out.len() - 1;
    let norm = |row: ArrayView1<'_, F>| {
        let max = row.iter().fold(0.0, |max: f64, x| max.max(x.as_f64().abs()));
        // NaN stays; squares of large numbers overflow.
        let scale = if max > 0.0 { max } else { 1.0 };
        scale * row.iter().map(|x| (x.as_f64() / scale).powi(2)).sum::<f64>().sqrt()
    };
    let merged = norm(out.slice(s![..dim]));
    let mut spread = 0.0;
    for part in parts.iter().filter(|part| part.sum != F::zero()) {
        let own = norm(part.out.slice(s![..dim]));
        if own == 0.0 {
            continue;
        }
        let weight =
            (part.shift.as_f64() - shift.as_f64()).exp() * part.sum.as_f64() / sum.as_f64();
        let columns = part.out.iter().zip(&out).take(dim);
        let squared: f64 = columns
            .map(|(a, b)| {
                let direction = if merged == 0.0 { 0.0 } else { b.as_f64() / merged };
                (a.as_f64() / own - direction).powi(2)
            })
            .sum();
        // Without a common direction, |S| is 0 and T all that there is.
        spread += weight * own * if merged == 0.0 { 1.0 } else { 0.5 * squared };
    }
    out[dim] = F::from_f64(out[dim].as_f64() + spread);
}

/// Keys in several shards: each shard sums over its keys, the sums are merged, and the mean is taken once.
impl<F: Float> Poincare<F> {
    /// Returns the sums over the keys in `inputs`, so that those over several sets of keys can be merged with
    /// [`PartialMean::merge`].
    ///
    /// # Errors
    /// As [`Attention::forward_into`](crate::Attention::forward_into); [`Error::InvalidArgument`] for another mean
    /// than the midpoint and that at the origin, and for points that would be processed in `f64`
    /// ([`Coordinates::Tangent`](super::Coordinates::Tangent) says which).
    pub fn forward_partial(&self, inputs: &Inputs<'_, F>) -> Result<PartialMean<F>> {
        let aggregation = self.config.aggregation;
        check_aggregation(aggregation)?;
        if let Some(segments) = inputs.packed_segments() {
            let (heads, columns) = (inputs.num_heads(), sums_dim(inputs, aggregation));
            let mut all = try_zeros("sums", inputs.num_queries(), heads * columns)?;
            let run = |inputs: &Inputs<'_, F>, mut out: ArrayViewMut2<'_, F>| {
                let part = self.forward_partial(inputs)?;
                out.assign(&part.sums.out());
                Ok(part.normalizer())
            };
            let normalizers = packed::for_each_segment(inputs, segments, all.view_mut(), run)?;
            let Normalizer { shift, sum } = Normalizer::join(&normalizers, heads);
            return PartialMean::new(aggregation, Partial::new(all, shift, sum)?);
        }
        let embedded = self.embed_for_partial(inputs)?;
        let (sums, Normalizer { shift, sum }) = self.run(inputs, &embedded)?.into_partial()?;
        PartialMean::new(aggregation, Partial::new(sums, shift, sum)?)
    }

    /// Returns the output, num_queries × heads · d_v, given the sums over all keys.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `partial` is of another mean; [`Error::TooLarge`].
    pub fn finish_partial(&self, partial: &PartialMean<F>) -> Result<Array2<F>> {
        let (space, dims) = (self.space()?, dims_of(partial));
        partial.check(self, dims)?;
        let mut out = try_zeros("out", dims[0], dims[1] * dims[2])?;
        Sums::of_partial(partial)?.finish(space, out.view_mut());
        Ok(out)
    }

    /// Adds to the gradients of the parameters, in the order of [`Params`](crate::Params), what does not go through
    /// the keys: that of the curvature, if it is learned, from the coordinates of the output. Call it once, with the
    /// sums over all keys, besides [`backward_partial_into`](Self::backward_partial_into) for each shard.
    ///
    /// # Errors
    /// As [`finish_partial`](Self::finish_partial); [`Error::Shape`] if `grad_out` or a gradient does not fit.
    pub fn finish_partial_backward_into(
        &self,
        partial: &PartialMean<F>,
        grad_out: ArrayView2<'_, F>,
        grad_params: &mut [ArrayD<F>],
    ) -> Result<()> {
        let dims = dims_of(partial);
        partial.check(self, dims)?;
        check_shape("grad_out", &[dims[0], dims[1] * dims[2]], grad_out.shape())?;
        params::check_gradients(self, grad_params)?;
        let sums = Sums::of_partial(partial)?;
        let (_, grad_c) = sums.upstream(self.space()?, grad_out, None, true)?;
        self.params_vjp(grad_c, 0.0, grad_params);
        Ok(())
    }

    /// Adds to `grads` the gradients that the keys in `inputs` contribute, given the sums over these and any other
    /// keys and the gradient of the output, num_queries × heads · d_v; and `grad_log_sum_exp`, that of the
    /// log-sum-exp of [`PartialMean::sums`], where `None` is zeros.
    ///
    /// The sum over the shards is the gradient of attention to all keys, up to a rounding error of e^{2R} times the
    /// unit, where R = √c d(0, out). (The whole has this error up to R = 8, and computes means farther out pair by
    /// pair.)
    ///
    /// # Errors
    /// As [`Attention::backward_into`](crate::Attention::backward_into) and
    /// [`forward_partial`](Self::forward_partial).
    pub fn backward_partial_into(
        &self,
        inputs: &Inputs<'_, F>,
        partial: &PartialMean<F>,
        grad_out: ArrayView2<'_, F>,
        grad_log_sum_exp: Option<ArrayView2<'_, F>>,
        grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let (num_queries, heads) = (inputs.num_queries(), inputs.num_heads());
        let dim = inputs.value().ncols() / inputs.num_kv_heads();
        partial.check(self, [num_queries, dim, heads])?;
        check_shape("grad_out", &[num_queries, heads * dim], grad_out.shape())?;
        if let Some(grad) = grad_log_sum_exp {
            check_shape("grad_log_sum_exp", &[num_queries, heads], grad.shape())?;
        }
        grads.check(NAME, inputs, self)?;
        if let Some(segments) = inputs.packed_segments() {
            return packed::backward_by_segment(
                self,
                inputs,
                segments,
                grads,
                |at, inputs, grads| {
                    let queries = segments.queries(at);
                    let rows = s![queries.clone(), ..];
                    let partial = partial.select_queries(&queries.collect::<Vec<_>>())?;
                    let of_log_sum = grad_log_sum_exp.as_ref().map(|grad| grad.slice(rows));
                    self.backward_partial_into(
                        inputs,
                        &partial,
                        grad_out.slice(rows),
                        of_log_sum,
                        grads,
                    )
                },
            );
        }
        let embedded = self.embed_for_partial(inputs)?;
        let sums = Sums::of_partial(partial)?;
        let (upstream, _) = sums.upstream(embedded.space, grad_out, grad_log_sum_exp, true)?;
        self.sums_vjp(inputs, &embedded, &sums, upstream, 0.0, grad_out, grads)
    }

    backward_partial!(PartialMean);

    fn embed_for_partial(&self, inputs: &Inputs<'_, F>) -> Result<Embedded<F>> {
        let aggregation = self.config.aggregation;
        check_aggregation(aggregation)?;
        inputs.check_absent(NAME, &[Channel::PairWeights])?;
        let embedded = self.embed(inputs)?;
        if !embedded.is_within_range(aggregation) {
            let [radius, of_values] = radii_within::<F>(aggregation);
            let expected = format!(
                "queries and keys within {radius}/√c of the origin and values within {of_values}/√c, or f64"
            );
            return Err(Error::config("inputs", expected, "points farther out"));
        }
        Ok(embedded)
    }
}

/// Returns the numbers of queries, of columns of S for a head, and of heads.
fn dims_of<F: Float>(partial: &PartialMean<F>) -> [usize; 3] {
    let (num_queries, heads) = partial.sums.sum().dim();
    [num_queries, partial.dim(), heads]
}

/// Returns the number of columns of the sums for a head.
fn sums_dim<F: Float>(inputs: &Inputs<'_, F>, aggregation: Aggregation) -> usize {
    inputs.value().ncols() / inputs.num_kv_heads() + num_gaps(aggregation)
}

#[cfg(feature = "serde")]
mod serde_impl {
    use super::{Aggregation, Float, Partial, PartialMean};
    use serde::de::Error;
    use serde::{Deserialize, Deserializer};

    #[derive(Deserialize)]
    #[serde(rename = "PartialMean", deny_unknown_fields, bound = "F: Float + Deserialize<'de>")]
    struct Parts<F: Float> {
        aggregation: Aggregation,
        sums: Partial<F>,
    }

    impl<'de, F: Float + Deserialize<'de>> Deserialize<'de> for PartialMean<F> {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let Parts { aggregation, sums } = Parts::deserialize(deserializer)?;
            Self::new(aggregation, sums).map_err(D::Error::custom)
        }
    }
}
