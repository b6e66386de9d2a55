use super::{ScoreFunction, ScorePairs, dot};
use crate::element::{Element, try_zeros};
use crate::error::{Error, Result, check_shape};
use crate::inputs::Inputs;
use crate::params::Params;
use ndarray::{Array2, ArrayViewD, ArrayViewMutD};

/// A learned number for each bucket of pairs and each head, added to the logit: s ↦ s + weight\[bucket, head\].
///
/// The buckets are distances ([`Buckets::t5`], [`Buckets::clipped`]) or the edge layers of the inputs
/// ([`Buckets::edge_layers`]): hops, types of edges, or the layers of an HNSW index. With hops this is the
/// spatial bias of Graphormer (Ying et al. 2021, 2106.05234).
///
/// * **Parameters** `weight`, buckets × heads: T5's `relative_attention_bias.weight`. Initially zeros.
/// * **Memory** O(buckets · heads). The same as an array for
///   [`Inputs::with_bias`](crate::Inputs::with_bias) takes pairs · heads, and its gradient as much again.
/// * **Errors** [`Error::Shape`] if the number of heads differs; for edge layers [`Error::MissingInput`]
///   without them, [`Error::InvalidArgument`] for a layer without a bucket.
///
/// ```
/// use graph_attention::ndarray::{Array2, array};
/// use graph_attention::score::{BucketBias, Buckets};
/// use graph_attention::{Attention, Flash, Graph, Inputs};
///
/// // Two kinds of edges, and one head that prefers the second kind by a factor of e^2.
/// let graph = Graph::from_edges(1, 2, [(0, 0), (0, 1)])?;
/// let bias = BucketBias::from_weight(Buckets::edge_layers(2)?, array![[0.0], [2.0]])?;
/// let (x, zeros) = (array![[0.0], [1.0]], Array2::zeros((1, 1)));
/// let inputs = Inputs::graph(zeros.view(), x.view(), x.view(), &graph)?.with_edge_layers(&[0, 1])?;
/// let out = Flash::new().with_score(bias).forward(&inputs)?;
/// assert!((out[[0, 0]] - 1.0 / (1.0 + (-2f64).exp())).abs() < 1e-15);
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct BucketBias<F> {
    buckets: Buckets,
    weight: Array2<F>,
}

/// How pairs are divided into buckets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buckets {
    kind: Kind,
    count: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// The buckets of the distances −r, …, r; farther ones are in the first and the last of these.
    Distance {
        of_distance: Vec<u32>,
    },
    EdgeLayer,
}

/// Larger distances of their own would only cost memory.
const LARGEST_DISTANCE: usize = 1 << 20;

impl Buckets {
    /// The buckets of T5 (Raffel et al. 2019, 1910.10683): each small distance has its own, larger ones share
    /// one with others of similar logarithm, up to `max_distance`; T5 uses 32 buckets and 128. If
    /// `is_bidirectional`, as in an encoder, half of the buckets are for keys after the query; otherwise all of
    /// these share bucket 0 with the query's own key.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are fewer than 2 buckets for each direction, or if `max_distance`
    /// is not larger than half of these, or above 2²⁰.
    pub fn t5(count: usize, max_distance: usize, is_bidirectional: bool) -> Result<Self> {
        let directions = if is_bidirectional { 2 } else { 1 };
        let of_direction = count / directions;
        if of_direction < 2 || !count.is_multiple_of(directions) || u32::try_from(count).is_err() {
            let expected = match is_bidirectional {
                true => "an even number, at least 4",
                false => "at least 2",
            };
            return Err(Error::config("number of buckets", expected, count));
        }
        let num_exact = of_direction / 2;
        check_distance(num_exact, max_distance)?;
        let of_length = |length: usize| {
            if length < num_exact {
                return length;
            }
            let ratio = |of: usize| (of as f64 / num_exact as f64).ln();
            let share = ratio(length) / ratio(max_distance) * (of_direction - num_exact) as f64;
            // The quotient of two logarithms may be a last place below a whole number.
            (num_exact + (share + 1e-9) as usize).min(of_direction - 1)
        };
        let before = (0..=max_distance).rev().map(of_length);
        let after = (1..=max_distance).map(|length| match is_bidirectional {
            true => of_direction + of_length(length),
            false => 0,
        });
        let of_distance = before.chain(after).map(|bucket| bucket as u32).collect();
        Ok(Self { kind: Kind::Distance { of_distance }, count })
    }

    /// One bucket for each distance −r, …, r of a key from a query, 2 r + 1 in all; farther ones are in the first and
    /// the last, as in Shaw et al. 2018 (1803.02155). Bucket r + d is that of distance d.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if r is 0 or above 2²⁰.
    pub fn clipped(max_distance: usize) -> Result<Self> {
        check_distance(0, max_distance)?;
        let count = 2 * max_distance + 1;
        Ok(Self { kind: Kind::Distance { of_distance: (0..count as u32).collect() }, count })
    }

    /// The edge layers 0, …, `count` − 1 of [`Inputs::with_edge_layers`](crate::Inputs::with_edge_layers).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `count` is 0 or above 256.
    pub fn edge_layers(count: usize) -> Result<Self> {
        if !(1..=256).contains(&count) {
            return Err(Error::config("number of buckets", "1 to 256", count));
        }
        Ok(Self { kind: Kind::EdgeLayer, count })
    }

    /// Returns the number of buckets.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Returns the bucket of a distance, that of the key minus that of the query; `None` if buckets are not of
    /// distances.
    #[must_use]
    pub fn of_distance(&self, distance: i32) -> Option<usize> {
        match &self.kind {
            Kind::Distance { of_distance } => Some(bucket_of(of_distance, distance) as usize),
            Kind::EdgeLayer => None,
        }
    }
}

fn check_distance(num_exact: usize, max_distance: usize) -> Result<()> {
    if max_distance <= num_exact || max_distance > LARGEST_DISTANCE {
        let expected = format!("above {num_exact}, at most {LARGEST_DISTANCE}");
        return Err(Error::config("max_distance", expected, max_distance));
    }
    Ok(())
}

#[inline(always)]
fn bucket_of(of_distance: &[u32], distance: i32) -> u32 {
    let last = of_distance.len() - 1;
    let at = distance.saturating_add((last / 2) as i32).max(0) as usize;
    of_distance[at.min(last)]
}

impl<F: Element> BucketBias<F> {
    /// Creates zeros.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without heads; [`Error::TooLarge`].
    pub fn new(buckets: Buckets, heads: usize) -> Result<Self> {
        let weight = try_zeros("weight", buckets.count, heads)?;
        Self::from_weight(buckets, weight)
    }

    /// Creates a bias with this weight, buckets × heads.
    ///
    /// # Errors
    /// [`Error::Shape`] if it has another number of rows than there are buckets;
    /// [`Error::InvalidArgument`] without heads.
    pub fn from_weight(buckets: Buckets, weight: Array2<F>) -> Result<Self> {
        check_shape("weight", &[buckets.count, weight.ncols()], weight.shape())?;
        if weight.ncols() == 0 {
            return Err(Error::config("heads", "at least 1", 0));
        }
        Ok(Self { buckets, weight })
    }

    /// Returns the buckets.
    #[must_use]
    pub fn buckets(&self) -> &Buckets {
        &self.buckets
    }

    /// Returns the common bucket of all pairs, if they are known to have one.
    #[inline]
    fn common_bucket(&self, pairs: &ScorePairs<'_>) -> Option<usize> {
        let Kind::Distance { of_distance } = &self.buckets.kind else { return None };
        let reach = (of_distance.len() / 2) as i32;
        let distances = pairs.distances();
        let is_one = distances.start >= reach || distances.end - 1 <= -reach;
        is_one.then(|| bucket_of(of_distance, distances.start) as usize)
    }
}

impl<F: Element> Params<F> for BucketBias<F> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        visitor("weight", self.weight.view().into_dyn());
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        visitor("weight", self.weight.view_mut().into_dyn());
    }
}

impl<F: Element> ScoreFunction<F> for BucketBias<F> {
    #[inline]
    fn apply(&self, pairs: &ScorePairs<'_>, logits: &mut [F]) {
        if let Some(bucket) = self.common_bucket(pairs) {
            let weight = self.weight[[bucket, pairs.head()]];
            return logits.iter_mut().for_each(|logit| *logit += weight);
        }
        let weights = self.weight.column(pairs.head());
        match &self.buckets.kind {
            Kind::Distance { of_distance } => pairs.for_each(
                logits,
                #[inline(always)]
                |pair, logit| *logit += weights[bucket_of(of_distance, pair.distance) as usize],
            ),
            Kind::EdgeLayer => {
                pairs.for_each(logits, |pair, logit| {
                    *logit += weights[usize::from(pairs.layer(pair))]
                });
            }
        }
    }

    #[inline]
    fn vjp(&self, pairs: &ScorePairs<'_>, _: &[F], grads: &mut [F], grad_params: &mut [f64]) {
        let (head, heads) = (pairs.head(), self.weight.ncols());
        if let Some(bucket) = self.common_bucket(pairs) {
            grad_params[bucket * heads + head] += dot(grads, |_| F::one());
            return;
        }
        match &self.buckets.kind {
            Kind::Distance { of_distance } => pairs.for_each(
                grads,
                #[inline(always)]
                |pair, grad| {
                    let bucket = bucket_of(of_distance, pair.distance) as usize;
                    grad_params[bucket * heads + head] += grad.as_f64();
                },
            ),
            Kind::EdgeLayer => pairs.for_each(grads, |pair, grad| {
                let bucket = usize::from(pairs.layer(pair));
                grad_params[bucket * heads + head] += grad.as_f64();
            }),
        }
    }

    fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        check_shape(
            "heads of the score function's weight",
            &[inputs.num_heads()],
            &[self.weight.ncols()],
        )?;
        if self.buckets.kind == Kind::EdgeLayer {
            let layers = inputs.edge_layers("bucket_bias")?;
            let count = self.buckets.count;
            if let Some(layer) = layers.iter().find(|&&layer| usize::from(layer) >= count) {
                return Err(Error::config("edge layers", format!("below {count}"), layer));
            }
        }
        Ok(())
    }

    fn reads_edge_layers(&self) -> bool {
        self.buckets.kind == Kind::EdgeLayer
    }
}
