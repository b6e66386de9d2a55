//! Nearest-neighbour search: finds the pairs that attend by similarity instead of by a given graph.
//!
//! A [`NeighborIndex`] holds keys and finds those most similar to queries. A [`NeighborSearch`] describes
//! the search; the result is a [`Graph`] from queries to keys, for
//! [`Inputs::graph`](crate::Inputs::graph) and [`Inputs::with_latent`](crate::Inputs::with_latent), with
//! the similarity of each pair.
//!
//! [`ExactIndex`] compares every query with every key. [`HnswIndex`] compares only a few keys and may miss
//! some neighbours.
//!
//! ```
//! use graph_attention::neighbors::{ExactIndex, Metric, NeighborIndex, NeighborSearch};
//! use graph_attention::ndarray::array;
//!
//! let nodes = array![[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]];
//! let index = ExactIndex::new(nodes.view(), Metric::Cosine)?;
//! let search = NeighborSearch::new(2).threshold(0.0).exclude_self(true);
//! let found = index.search(nodes.view(), &search)?;
//! assert_eq!(found.graph.neighbors(0), [1, 2]);
//! assert_eq!(found.graph.neighbors(2), [1, 0]); // the nearest first
//! assert_eq!(found.graph.neighbors(3), [2]); // all others point away
//! # Ok::<(), graph_attention::Error>(())
//! ```
//!
//! # Search, then attend
//!
//! You need not gather the hits: attention over the resulting graph reads their rows in place. The
//! weights have the same pair order as the similarities, nearest hit first. For vectors from elsewhere,
//! such as a database, use [`Inputs::single`](crate::Inputs::single) instead.
//!
//! ```
//! use graph_attention::neighbors::{ExactIndex, Metric, NeighborIndex, NeighborSearch};
//! use graph_attention::ndarray::{Axis, array};
//! use graph_attention::{Attention, Flash, Inputs};
//!
//! let documents = array![[1.0, 0.0], [4.0, 3.0], [0.0, 1.0], [-1.0, 0.2]];
//! let query = array![[1.0f64, 0.1]]; // one row; for a vector use `query.view().insert_axis(Axis(0))`
//!
//! // Candidates by cosine.
//! let index = ExactIndex::new(documents.view(), Metric::Cosine)?;
//! let found = index.search(query.view(), &NeighborSearch::new(2))?;
//! assert_eq!(found.graph.neighbors(0), [0, 1]);
//!
//! // Rank them again by attention, here by the dot product, in which long vectors count more.
//! let flash = Flash::new().with_scale(1.0)?;
//! let inputs = Inputs::graph(query.view(), documents.view(), documents.view(), &found.graph)?;
//! let weights = flash.attention_weights(&inputs)?; // hits × 1 head
//! assert!(weights[[1, 0]] > weights[[0, 0]]);
//! let blended = flash.forward(&inputs)?; // Σ weight · document, 1 × 2
//!
//! // The same with your own vectors.
//! let hits: Vec<usize> = found.row(0).map(|hit| hit.key).collect();
//! let vectors = documents.select(Axis(0), &hits);
//! let inputs = Inputs::single(query.row(0), vectors.view(), vectors.view())?;
//! assert!((flash.forward(&inputs)? - blended).iter().all(|difference| difference.abs() < 1e-12));
//! # Ok::<(), graph_attention::Error>(())
//! ```

mod exact;
mod hnsw;

pub use crate::kernels::keys::Metric;
pub use exact::ExactIndex;
pub use hnsw::{HnswConfig, HnswIndex};

use crate::element::try_vec;
use crate::error::{Error, Result, check_shape};
use crate::graph::Graph;
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::kernels::nearest::Lists;
use crate::kernels::parallel::{self, parts};
use ndarray::{Array1, ArrayView1, ArrayView2};
use std::fmt;
use std::ops::Range;

/// A key that was found, and its similarity to the query.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbor<F> {
    /// The number of the key.
    pub key: usize,
    /// The similarity; larger is nearer.
    pub similarity: F,
}

impl<F: Float> Neighbor<F> {
    /// Returns the key in the form of the kernels, and its similarity. A key out of range stays out of range.
    fn entry(&self) -> (u32, F) {
        (u32::try_from(self.key).unwrap_or(u32::MAX), self.similarity)
    }
}

/// The result of [`NeighborIndex::search`].
#[derive(Clone, Debug, PartialEq)]
pub struct Neighbors<F> {
    /// The edges from each query to its neighbours, nearest first.
    pub graph: Graph,
    /// The similarity of each pair of the graph, in its pair order: larger is nearer. As one column it is a
    /// [bias](crate::Inputs::with_bias). For [`Inputs::with_distances`](crate::Inputs::with_distances),
    /// convert it to a distance first: √−s for the Euclidean metric.
    pub similarities: Array1<F>,
}

impl<F: Float> Neighbors<F> {
    /// Iterates over the neighbours of a query, nearest first; empty for a query that does not exist.
    pub fn row(&self, query: usize) -> impl Iterator<Item = Neighbor<F>> + '_ {
        let row = self.graph.row(query);
        row.map(|(key, pair)| Neighbor { key, similarity: self.similarities[pair] })
    }
}

/// An index of keys that finds the keys nearest to a query.
///
/// The trait is object-safe, so a mechanism can hold a `Box<dyn NeighborIndex<F>>`. To use your own
/// index, implement the number of keys and the search for one query:
///
/// ```
/// use graph_attention::neighbors::{Neighbor, NeighborIndex, NeighborSearch};
/// use graph_attention::ndarray::{Array1, ArrayView1, array};
/// use graph_attention::Result;
///
/// /// Numbers on a line.
/// #[derive(Debug)]
/// struct Line(Array1<f64>);
///
/// impl NeighborIndex<f64> for Line {
///     fn num_keys(&self) -> usize {
///         self.0.len()
///     }
///     fn dim(&self) -> usize {
///         1
///     }
///     fn nearest_into(
///         &self,
///         query: ArrayView1<'_, f64>,
///         k: usize,
///         nearest: &mut Vec<Neighbor<f64>>,
///     ) -> Result<()> {
///         let keys = self.0.iter().enumerate();
///         nearest.clear();
///         nearest.extend(keys.map(|(key, at)| Neighbor { key, similarity: -(at - query[0]).abs() }));
///         nearest.sort_by(|a, b| b.similarity.total_cmp(&a.similarity));
///         nearest.truncate(k);
///         Ok(())
///     }
/// }
///
/// let line = Line(array![0.0, 1.0, 5.0]);
/// let search = NeighborSearch::new(1).exclude_self(true);
/// let found = line.search(array![[0.0], [1.0], [5.0]].view(), &search)?;
/// assert_eq!(found.graph.indices(), [1, 0, 1]);
/// # Ok::<(), graph_attention::Error>(())
/// ```
pub trait NeighborIndex<F: Float>: fmt::Debug + Send + Sync {
    /// Returns the number of keys.
    fn num_keys(&self) -> usize;

    /// Returns the number of columns of keys and queries.
    fn dim(&self) -> usize;

    /// Overwrites `nearest` with the `k` keys most similar to a query, nearest first. There are fewer if
    /// the index has fewer keys, or if an approximate index does not find them. No key appears twice.
    ///
    /// # Errors
    /// [`Error::Shape`] if the query does not have [`dim`](Self::dim) columns; your own index may return
    /// other errors.
    fn nearest_into(
        &self,
        query: ArrayView1<'_, F>,
        k: usize,
        nearest: &mut Vec<Neighbor<F>>,
    ) -> Result<()>;

    /// Finds the neighbours of many queries, num_queries × [`dim`](Self::dim). For a single vector, pass
    /// `query.view().insert_axis(Axis(0))`.
    ///
    /// The default implementation requests as many more than k keys from
    /// [`nearest_into`](Self::nearest_into) as may be excluded for the query, drops those that the search
    /// does not [accept](NeighborSearch::accepts), and keeps the first k. An approximate index may
    /// therefore return fewer than k, even if there are more.
    ///
    /// # Errors
    /// As [`NeighborSearch::check`] and [`nearest_into`](Self::nearest_into); [`Error::TooLarge`] if
    /// num_queries × k pairs do not fit in memory, [`Error::Graph`] if there may be more than `u32::MAX`
    /// pairs.
    fn search(
        &self,
        queries: ArrayView2<'_, F>,
        search: &NeighborSearch<'_, F>,
    ) -> Result<Neighbors<F>> {
        let num_keys = self.num_keys();
        search.check(queries.dim(), num_keys, self.dim())?;
        // An index examines some thousand keys to find the nearest.
        let work = queries.len().saturating_mul(num_keys.min(1000));
        collect(queries.nrows(), num_keys, search.k, work, |rows, mut lists| {
            let mut nearest = Vec::new();
            for query in rows {
                let k = search.k.saturating_add(search.num_excluded(query)).min(num_keys);
                self.nearest_into(queries.row(query), k, &mut nearest)?;
                let accepted = nearest.iter().filter(|found| search.accepts(query, **found));
                lists.push(accepted.map(Neighbor::entry));
            }
            Ok(())
        })
    }
}

/// A search for the k nearest keys of each query that are near enough and not excluded.
///
/// ```
/// use graph_attention::neighbors::{ExactIndex, Metric, NeighborIndex, NeighborSearch};
/// use graph_attention::{Graph, ndarray::array};
///
/// // Four points on a line, each linked to the next; find latent neighbours other than these.
/// let nodes = array![[0.0], [1.0], [2.0], [7.0]];
/// let known = Graph::from_edges(4, 4, [(0, 1), (1, 2), (2, 3)])?;
/// let search = NeighborSearch::new(1).threshold(-9.0).exclude_self(true).exclude(&known);
/// let index = ExactIndex::new(nodes.view(), Metric::Euclidean)?;
/// let latent = index.search(nodes.view(), &search)?.graph;
/// assert_eq!(latent.indices(), [2, 0, 1]);
/// assert!(latent.neighbors(3).is_empty()); // none within a distance of 3
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct NeighborSearch<'a, F: Float> {
    pub(crate) k: usize,
    threshold: Option<F>,
    exclude_self: bool,
    exclude: Option<&'a Graph>,
    visible_in: Option<Inputs<'a, F>>,
}

impl<'a, F: Float> NeighborSearch<'a, F> {
    /// Creates a search for the k nearest keys of each query, without threshold or exclusions.
    #[must_use]
    pub fn new(k: usize) -> Self {
        Self { k, threshold: None, exclude_self: false, exclude: None, visible_in: None }
    }

    /// Sets the smallest similarity of keys, in the units of the index's [`Metric`]. Default: no
    /// threshold.
    #[must_use]
    pub fn threshold(mut self, similarity: F) -> Self {
        self.threshold = Some(similarity);
        self
    }

    /// Sets whether query i never finds key i, for queries and keys that are the same nodes. Default:
    /// `false`.
    #[must_use]
    pub fn exclude_self(mut self, exclude: bool) -> Self {
        self.exclude_self = exclude;
        self
    }

    /// Excludes the keys that a query is already linked to in `graph`. Default: none are excluded.
    #[must_use]
    pub fn exclude(mut self, graph: &'a Graph) -> Self {
        self.exclude = Some(graph);
        self
    }

    /// Restricts the search to keys that the mask and the causal pattern of `inputs` let a query see,
    /// whatever the pairs are. If the queries were [selected](Inputs::select_queries) from others, their
    /// original numbers are used for [excluding self](Self::exclude_self). Default: all keys are visible.
    ///
    /// ```
    /// use graph_attention::Inputs;
    /// use graph_attention::neighbors::{ExactIndex, Metric, NeighborIndex, NeighborSearch};
    /// use graph_attention::ndarray::array;
    ///
    /// let x = array![[0.0], [1.0], [1.1]];
    /// let inputs = Inputs::dense(x.view(), x.view(), x.view())?.with_causal();
    /// let search = NeighborSearch::new(1).exclude_self(true).visible_in(&inputs);
    /// let found = ExactIndex::new(x.view(), Metric::Euclidean)?.search(x.view(), &search)?;
    /// assert_eq!(found.graph.indices(), [0, 1]); // for nodes 1 and 2; node 0 sees no other
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    #[must_use]
    pub fn visible_in(mut self, inputs: &Inputs<'a, F>) -> Self {
        self.visible_in = Some(*inputs);
        self
    }

    /// Checks that the search is valid for queries of this shape in an index of `num_keys` × `dim`. Call
    /// it in the first line of [`NeighborIndex::search`].
    ///
    /// # Errors
    /// [`Error::Shape`] if the queries have a different number of columns, if self is excluded and the
    /// numbers of queries and keys differ, or if the excluded graph or the inputs that hide keys have
    /// different numbers of queries or keys; [`Error::InvalidArgument`] if the threshold is NaN.
    pub fn check(
        &self,
        (num_queries, columns): (usize, usize),
        num_keys: usize,
        dim: usize,
    ) -> Result<()> {
        let num_nodes = self.visible_in.map_or(num_queries, |inputs| inputs.whole_sizes()[0]);
        let rows = if self.exclude_self && num_nodes != num_keys { num_keys } else { num_queries };
        check_shape("queries", &[rows, dim], &[num_queries, columns])?;
        if let Some(graph) = self.exclude {
            let actual = [graph.num_queries(), graph.num_keys()];
            check_shape("exclude", &[num_queries, num_keys], &actual)?;
        }
        if let Some(inputs) = self.visible_in {
            let actual = [inputs.num_queries(), inputs.num_keys()];
            check_shape("visible_in", &[num_queries, num_keys], &actual)?;
        }
        match self.threshold {
            Some(threshold) if threshold.is_nan() => {
                Err(Error::config("threshold", "a number", threshold))
            }
            _ => Ok(()),
        }
    }

    /// Returns the number of keys to find for each query.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// Returns the largest number of keys that may be excluded for a query. An index must find this many
    /// more than [`k`](Self::k).
    #[must_use]
    pub fn num_excluded(&self, query: usize) -> usize {
        let known = self.exclude.map_or(0, |graph| graph.neighbors(query).len());
        let hiding = self.visible_in.filter(|inputs| inputs.may_hide_keys());
        let hidden = hiding.map_or(0, |inputs| {
            (0..inputs.num_keys()).filter(|&key| !self.sees(query, key)).count()
        });
        known + usize::from(self.exclude_self) + hidden
    }

    /// Whether mask and causal pattern let a query see a key.
    fn sees(&self, query: usize, key: usize) -> bool {
        let is_visible =
            |inputs: &Inputs<'_, F>| query < inputs.num_queries() && inputs.sees_key(query, key);
        self.visible_in.as_ref().is_none_or(is_visible)
    }

    /// Whether a query may have this neighbour: it is not excluded, and its similarity is neither NaN nor
    /// below the threshold.
    #[must_use]
    pub fn accepts(&self, query: usize, Neighbor { key, similarity }: Neighbor<F>) -> bool {
        let is_near = self.threshold.is_none_or(|threshold| similarity >= threshold);
        is_near && !similarity.is_nan() && self.admits(query, key)
    }

    /// Whether a key is not excluded for a query, whatever its similarity.
    pub(crate) fn admits(&self, query: usize, key: usize) -> bool {
        let is_known = |graph: &Graph| graph.neighbors(query).iter().any(|&k| k as usize == key);
        let number = || self.visible_in.map_or(query, |inputs| inputs.query_number(query));
        let is_excluded =
            (self.exclude_self && number() == key) || self.exclude.is_some_and(is_known);
        !is_excluded && self.sees(query, key)
    }
}

/// The largest number of parts, in whole blocks, in which queries are distributed to threads.
const PARTS: usize = 64;
const BLOCK: usize = 64;

/// Runs `fill` for parts of the queries; it pushes one list for each query.
pub(crate) fn collect<F: Float>(
    num_queries: usize,
    num_keys: usize,
    k: usize,
    work: usize,
    fill: impl Fn(Range<usize>, Lists<'_, F>) -> Result<()> + Send + Sync,
) -> Result<Neighbors<F>> {
    let k = k.min(num_keys);
    let mut offsets = try_vec("neighbors", &[num_queries], 0)?;
    let mut keys = try_vec("neighbors", &[num_queries, k], 0)?;
    let mut similarities = try_vec("neighbors", &[num_queries, k], F::zero())?;
    // Nothing to find if k is 0.
    let parts = if k == 0 { Vec::new() } else { parts(num_queries, BLOCK, PARTS) };
    let mut results = vec![Ok(()); parts.len()];
    let mut rest = (&mut offsets[..], &mut keys[..], &mut similarities[..]);
    let tasks = (parts.iter().cloned().zip(&mut results))
        .map(|(rows, result)| {
            let (lens, keys, similarities) = std::mem::take(&mut rest);
            let (lens, other_lens) = lens.split_at_mut(rows.len());
            let (keys, other_keys) = keys.split_at_mut(rows.len() * k);
            let (similarities, others) = similarities.split_at_mut(rows.len() * k);
            rest = (other_lens, other_keys, others);
            (rows, Lists { k, lens: lens.iter_mut(), keys, similarities }, result)
        })
        .collect();
    parallel::for_each(tasks, work, |(rows, lists, result)| *result = fill(rows, lists));
    results.into_iter().collect::<Result<()>>()?;

    // Move the lists together, in place.
    let mut end = 0;
    for (query, len) in offsets.iter_mut().enumerate() {
        keys.copy_within(query * k..query * k + *len, end);
        similarities.copy_within(query * k..query * k + *len, end);
        end += *len;
        *len = end;
    }
    keys.truncate(end);
    similarities.truncate(end);
    offsets.insert(0, 0);
    let graph = Graph::from_csr(num_keys, offsets, keys)?;
    Ok(Neighbors { graph, similarities: similarities.into() })
}
