//! The approximate index.
//!
//! It is written here and not taken from a crate, because the crates in pure Rust cannot do what it needs.
//! `hnsw_rs`, used before, and `instant-distance` cannot remove keys, filter by query or repair links, and keys
//! that lost their last link could not be found; `hnswlib-rs` needs a nightly compiler. On the kernels of the
//! exact index it is two short files, without some 55 other crates.

mod links;
#[cfg(feature = "serde")]
mod saved;

use super::{Metric, Neighbor, NeighborIndex, NeighborSearch, Neighbors, collect};
use crate::element::try_zeros;
use crate::error::{Error, Result, check_shape};
use crate::graph::Graph;
use crate::kernels::Float;
use crate::kernels::keys::{Keys, Origin, Query};
use crate::kernels::level::level;
use crate::kernels::nearest::Candidate;
use crate::kernels::problem::Rows;
use links::{Links, Scored, Scratch};
use ndarray::{Array2, ArrayView1, ArrayView2};
use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::ops::Range;

/// Packed keys have 31 bits.
const MOST_KEYS: usize = i32::MAX as usize;

/// Following links costs about as much as comparing with this many keys, for each candidate and
/// connection: keys in order, for one query, or for many queries in tiles of [`ExactIndex`](super::ExactIndex).
const KEYS_PER_LINK: f64 = 3.0;
const KEYS_PER_LINK_IN_TILES: f64 = 25.0;
/// The number of queries from which tiles are full.
const FULL_TILE: usize = 16;

/// The options for building and searching an [`HnswIndex`].
///
/// ```
/// use graph_attention::neighbors::{HnswConfig, Metric, NeighborIndex};
/// use graph_attention::ndarray::array;
///
/// let config = HnswConfig::new(Metric::Euclidean).connections(24).ef_search(200);
/// assert_eq!(config.build(array![[0.0, 1.0], [2.0, 3.0]])?.num_keys(), 2);
/// assert!(config.connections(1).build(array![[0.0]]).is_err());
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct HnswConfig {
    metric: Metric,
    connections: usize,
    ef_construction: usize,
    ef_search: usize,
}

impl HnswConfig {
    /// Creates a configuration with 16 connections, 200 candidates in construction and 100 in search.
    #[must_use]
    pub fn new(metric: Metric) -> Self {
        Self { metric, connections: 16, ef_construction: 200, ef_search: 100 }
    }

    /// Sets M, the largest number of links of a key in each layer (twice as many in the lowest layer), from 2
    /// to 256. Use more for many columns. Default: 16.
    #[must_use]
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections;
        self
    }

    /// Sets the number of candidates for the links of a new key (`ef_construction` in the paper's code), which
    /// is at least 1. More candidates give a better index but a slower build. Default: 200.
    #[must_use]
    pub fn ef_construction(mut self, candidates: usize) -> Self {
        self.ef_construction = candidates;
        self
    }

    /// Sets the number of candidates that a search collects (or k, if larger) before it returns the best
    /// k, at least 1. More candidates find more of the nearest keys but take more time. Default: 100.
    #[must_use]
    pub fn ef_search(mut self, candidates: usize) -> Self {
        self.ef_search = candidates;
        self
    }

    /// Builds an index of `keys`, num_keys × dim, in about O(num_keys log num_keys · dim), on several
    /// threads.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a setting is outside its range, [`Error::Graph`] if there are more
    /// than 2³¹ − 1 keys, [`Error::TooLarge`] if memory is refused.
    pub fn build<F: Float>(&self, keys: Array2<F>) -> Result<HnswIndex<F>> {
        let num_keys = keys.nrows();
        let keys = Keys::new(Rows::owned("keys", keys)?, num_keys, self.metric)?;
        let mut index = self.empty(keys)?;
        index.add(0..num_keys)?;
        Ok(index)
    }

    /// Checks the settings; returns an index that knows none of the keys yet.
    fn empty<F: Float>(&self, keys: Keys<'static, F>) -> Result<HnswIndex<F>> {
        if !(2..=256).contains(&self.connections) {
            return Err(Error::config("connections", "a number from 2 to 256", self.connections));
        }
        let candidates = [("ef_construction", self.ef_construction), ("ef_search", self.ef_search)];
        if let Some((field, count)) = candidates.into_iter().find(|&(_, count)| count == 0) {
            return Err(Error::config(field, "at least 1", count));
        }
        let links = Links::new(self.connections);
        let (copies, unlinked, removed) = Default::default();
        Ok(HnswIndex { config: self.clone(), keys, links, copies, unlinked, removed })
    }
}

/// A hierarchical navigable small world index (Malkov & Yashunin 2016, 1603.09320): links between nearby
/// keys, in layers that each have fewer keys than the one below, and a search that follows these links.
///
/// The index is approximate: a search compares a query with some thousand keys, not all, and misses some
/// of the nearest. The keys that it finds have the same similarities and order as with
/// [`ExactIndex`](super::ExactIndex). On 20,000 × 64 normal variates, with the defaults, a single query finds
/// 0.89 of the ten nearest by cosine.
///
/// * **Small or filtered searches are exact.** If comparing a query with every key that it may find costs
///   less than following links, that is done: with 16 connections and 100 candidates, for less than 40,000
///   keys if there are at least 16 queries, otherwise for less than 4800; also for large k, and for masks
///   or causal patterns that hide most keys. Else links to excluded keys are followed too, and a search finds
///   k keys if there are as many.
/// * **Every key can be reached.** A tree of links that are never dropped connects all keys, so a search with
///   enough candidates finds outliers too. Copies of a key share its links and are all found. Keys
///   with norms below 10⁻¹⁵ or above 10¹⁵ have no links: every query is compared with them.
/// * **A weak case** are inner products with many neighbours of keys that are nearly of low rank: the search stays
///   among the longest keys. Of 20,000 × 64 normal keys of rank 4 it finds 0.998 of the ten nearest but 0.80 of the
///   400 nearest, of rank 2 only 0.46 of these; use [`ExactIndex`](super::ExactIndex) for them. Cosine and Euclidean
///   distance find all.
/// * **It can change.** [`insert`](Self::insert) adds keys. [`remove`](Self::remove) hides keys, but
///   searches still follow their links, until [`compact`](Self::compact) builds the index again without
///   them. With the feature `serde` an index can be saved, with its links, and loaded.
/// * **It is reproducible.** Layers are drawn from the numbers of the keys, and keys are inserted in
///   batches of fixed size. The same calls give the same index and the same neighbours on every run, with
///   any number of threads and any instruction set.
///
/// Links are chosen among the keys, so queries should be distributed like keys. Queries of attention often
/// are not: they point away from the keys, and their nearest keys are not near each other. Then more of them
/// are missed (Liu et al. 2024, 2409.10516). Compare the results with an `ExactIndex` on a few of your own
/// queries, and increase [`ef_search`](HnswConfig::ef_search). [`Metric::Dot`] suffers most; long keys are
/// found best. What is missed can be estimated:
/// [`PerformerState::attend_rest`](crate::performer::PerformerState::attend_rest).
///
/// Needs 8 M + 8 bytes for each key besides the keys themselves.
///
/// ```
/// use graph_attention::neighbors::{HnswConfig, Metric, NeighborIndex, NeighborSearch};
/// use graph_attention::ndarray::{Array2, s};
///
/// // Points on a circle; the nearest are the two neighbours.
/// let angle = |i: usize| i as f64 / 100.0 * std::f64::consts::TAU;
/// let nodes = Array2::from_shape_fn((100, 2), |(i, axis)| [angle(i).cos(), angle(i).sin()][axis]);
/// let mut index = HnswConfig::new(Metric::Cosine).build(nodes.slice(s![..99, ..]).to_owned())?;
/// assert_eq!(index.insert(nodes.slice(s![99.., ..]))?, 99..100);
/// let search = NeighborSearch::new(2).exclude_self(true);
/// let mut nearest = index.search(nodes.view(), &search)?.graph.neighbors(7).to_vec();
/// nearest.sort();
/// assert_eq!(nearest, [6, 8]);
///
/// // Numbers stay the same until the index is compacted.
/// index.remove(&[6])?;
/// assert_eq!(index.search(nodes.view(), &search)?.graph.neighbors(7), [8, 5]);
/// let old_numbers = index.compact()?;
/// assert_eq!((index.num_keys(), old_numbers[6]), (99, 7));
///
/// // Its links, for `Inputs::graph` and `Inputs::with_edge_layers`.
/// let (links, layers) = index.links()?;
/// assert_eq!(links.num_edges(), layers.len());
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone)]
pub struct HnswIndex<F: Float> {
    config: HnswConfig,
    keys: Keys<'static, F>,
    links: Links,
    copies: Copies,
    /// The keys without links that every query is compared with.
    unlinked: Vec<u32>,
    removed: Vec<u32>,
}

/// Which keys are equal.
#[derive(Clone, Debug, Default)]
struct Copies {
    /// By the hash of a key, the first with this hash.
    first: HashMap<u64, u32, BuildHasherDefault<DefaultHasher>>,
    /// The later copies of a first key, ascending.
    later: HashMap<u32, Vec<u32>, BuildHasherDefault<DefaultHasher>>,
}

/// The memory of a search, kept from one to the next.
#[derive(Default)]
struct Buffers {
    scratch: Scratch,
    ids: Vec<u32>,
    scores: Vec<f32>,
    sorted: Vec<f32>,
}

impl<F: Float> HnswIndex<F> {
    /// Returns the configuration.
    #[must_use]
    pub fn config(&self) -> &HnswConfig {
        &self.config
    }

    /// Returns the measure of similarity.
    #[must_use]
    pub fn metric(&self) -> Metric {
        self.keys.metric()
    }

    /// Returns the number of keys that were removed since the index was built or compacted.
    #[must_use]
    pub fn num_removed(&self) -> usize {
        self.removed.len()
    }

    /// Sets the number of candidates of later searches: see [`HnswConfig::ef_search`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for 0.
    pub fn set_ef_search(&mut self, candidates: usize) -> Result<()> {
        if candidates == 0 {
            return Err(Error::config("ef_search", "at least 1", candidates));
        }
        self.config.ef_search = candidates;
        Ok(())
    }

    /// Adds keys, n × [`dim`](NeighborIndex::dim), and returns their numbers, which follow those of the
    /// other keys. Many keys at once are faster, and use several threads.
    ///
    /// # Errors
    /// [`Error::Shape`] for a different number of columns, [`Error::Graph`] if there would be more than
    /// 2³¹ − 1 keys, [`Error::TooLarge`] if memory is refused.
    pub fn insert(&mut self, keys: ArrayView2<'_, F>) -> Result<Range<usize>> {
        check_shape("keys", &[keys.nrows(), self.dim()], keys.shape())?;
        let new = self.num_keys()..self.num_keys().saturating_add(keys.nrows());
        check_num_keys(new.end)?;
        self.keys.extend(keys)?;
        self.add(new.clone())?;
        Ok(new)
    }

    /// Hides keys from later searches. Other keys keep their numbers, and
    /// [`num_keys`](NeighborIndex::num_keys) does not change.
    ///
    /// Takes O(1) for each key. Searches still follow the links of removed keys, so the more of them there
    /// are, the longer a search takes: [`compact`](Self::compact) when half are.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a key does not exist, is given twice or was removed before; then none
    /// is removed.
    pub fn remove(&mut self, keys: &[usize]) -> Result<()> {
        let mut new: Vec<usize> = keys.to_vec();
        new.sort_unstable();
        let twice = new.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
        let is_missing = |&key: &usize| {
            key >= self.num_keys() || self.removed.binary_search(&(key as u32)).is_ok()
        };
        if let Some(key) = twice.or_else(|| new.iter().copied().find(is_missing)) {
            return Err(Error::config("keys", "different keys of the index", format!("key {key}")));
        }
        new.iter().for_each(|&key| self.keys.hide(key));
        self.removed.extend(new.iter().map(|&key| key as u32));
        self.removed.sort_unstable();
        Ok(())
    }

    /// Builds the index again without the removed keys, and returns the old number of each key. O(n log n ·
    /// dim).
    ///
    /// # Errors
    /// [`Error::TooLarge`] if memory is refused; the index is unchanged then.
    pub fn compact(&mut self) -> Result<Vec<usize>> {
        let is_left = |key: &usize| self.removed.binary_search(&(*key as u32)).is_err();
        let left: Vec<usize> = (0..self.num_keys()).filter(is_left).collect();
        let mut keys = try_zeros("keys", left.len(), self.dim())?;
        for (mut row, &key) in keys.rows_mut().into_iter().zip(&left) {
            row.assign(&ArrayView1::from(self.keys.row(key as u32)));
        }
        *self = self.config.build(keys)?;
        Ok(left)
    }

    /// Returns the links between keys in all layers, and the layer of each link: 0 is the lowest, which
    /// contains every key that differs from all others. A pair that is linked in several layers appears
    /// once for each. The links of a key are sorted by layer, and within a layer nearest first. Links need
    /// not exist in both directions. Later copies of a key have no links; removed keys have.
    ///
    /// # Errors
    /// [`Error::Graph`] if there are more than `u32::MAX` links.
    pub fn links(&self) -> Result<(Graph, Vec<u8>)> {
        let mut offsets = vec![0];
        let (mut indices, mut layers, mut scores) = (Vec::new(), Vec::new(), Vec::new());
        for key in 0..self.num_keys() as u32 {
            let num_layers = if self.links.is_linked(key) { 1 + self.links.top_of(key) } else { 0 };
            for (layer, number) in (0..num_layers).zip(0..) {
                let links = self.links.of(key, layer);
                F::scores(level(), &self.keys, Origin::of_key(&self.keys, key), links, &mut scores);
                let mut sorted: Vec<_> = links.iter().zip(&scores).collect();
                sorted.sort_by(|a, b| b.1.total_cmp(a.1).then(a.0.cmp(b.0)));
                indices.extend(sorted.iter().map(|(link, _)| **link));
                layers.resize(indices.len(), number);
            }
            offsets.push(indices.len());
        }
        Ok((Graph::from_csr(self.num_keys(), offsets, indices)?, layers))
    }

    /// Sets the links of keys that are already stored.
    fn add(&mut self, new: Range<usize>) -> Result<()> {
        check_num_keys(new.end)?;
        let linked = self.register(new)?;
        self.links.insert(&self.keys, &linked, self.config.ef_construction);
        Ok(())
    }

    /// Finds out which of the keys are copies of others or have no links; returns those to link.
    fn register(&mut self, new: Range<usize>) -> Result<Vec<u32>> {
        if !self.links.grow(new.len()) {
            return Err(Error::TooLarge { what: "links", shape: vec![self.num_keys()] });
        }
        let mut linked = Vec::new();
        for key in new.filter(|&key| self.keys.is_visible(key)) {
            let id = key as u32;
            if !self.keys.is_ordinary(key) {
                self.unlinked.push(id);
                continue;
            }
            let first = *self.copies.first.entry(self.keys.hash(id)).or_insert(id);
            if first != id && self.keys.row(first) == self.keys.row(id) {
                self.copies.later.entry(first).or_default().push(id);
            } else {
                linked.push(id);
            }
        }
        Ok(linked)
    }

    /// Returns how many keys in order cost as much as following links, if so many of them are visible.
    fn cost_of_links(&self, k: usize, visible: usize) -> f64 {
        // For each visible candidate, links to hidden keys are followed as well.
        let hidden = self.num_keys() as f64 / visible.max(1) as f64;
        self.config.ef_search.max(k) as f64 * self.config.connections as f64 * hidden
    }

    /// Overwrites `nearest` with the best of the keys that are accepted, and not hidden.
    fn nearest(
        &self,
        query: &Query,
        k: usize,
        num_excluded: usize,
        accepts: impl Fn(usize) -> bool,
        buffers: &mut Buffers,
        nearest: &mut Vec<Candidate>,
    ) {
        nearest.clear();
        let visible = self.num_keys().saturating_sub(self.removed.len() + num_excluded);
        if k == 0 {
            return;
        }
        let admits = |key: u32| accepts(key as usize);
        let accepts = |key: u32| self.keys.is_visible(key as usize) && admits(key);
        let follows = visible as f64 > KEYS_PER_LINK * self.cost_of_links(k, visible);
        let point = query.point(&self.keys).filter(|_| follows);
        let Buffers { scratch, ids, .. } = buffers;
        ids.clear();
        let Some(point) = point else {
            ids.extend((0..self.num_keys() as u32).filter(|&key| accepts(key)));
            return self.best(query, k, buffers, nearest);
        };
        let later = |key: &u32| self.copies.later.get(key).into_iter().flatten();
        // Keys with links, and their copies, are visible unless they were removed. Nothing is read then.
        let is_whole = self.removed.is_empty();
        let accepts = |key: u32| (is_whole || self.keys.is_visible(key as usize)) && admits(key);
        let accepts_any = |key: u32| accepts(key) || later(&key).any(|&copy| accepts(copy));
        let ef = self.config.ef_search.max(k);
        let found = self.links.search(&self.keys, &point, ef, accepts_any, scratch);
        for Scored { key, .. } in &found {
            let copies = std::iter::once(key).chain(later(key));
            ids.extend(copies.filter(|&&key| accepts(key)).take(k));
        }
        ids.extend(self.unlinked.iter().filter(|&&key| accepts(key)));
        self.best(query, k, buffers, nearest);
    }

    /// Returns a candidate with its similarity in the units of the metric.
    fn neighbor(&self, query: &Query, found: &Candidate) -> Neighbor<F> {
        let similarity = self.keys.reported(query, found.similarity);
        Neighbor { key: found.key as usize, similarity }
    }

    /// Adds the k nearest of the keys in `buffers.ids`, exactly: scores exclude most of them, with a margin
    /// for their rounding error.
    fn best(&self, query: &Query, k: usize, buffers: &mut Buffers, nearest: &mut Vec<Candidate>) {
        let Buffers { ids, scores, sorted, .. } = buffers;
        let mut least = f64::NEG_INFINITY;
        let values: Vec<F> = query.values().iter().map(|&value| F::from_f64(value)).collect();
        if ids.len() > k {
            F::scores(level(), &self.keys, Origin::of_query(&values), ids, scores);
            sorted.clear();
            sorted.extend(scores.iter().filter(|score| !score.is_nan()));
            if sorted.len() >= k {
                let (_, kth, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
                let kth = f64::from(*kth);
                // Scores are rounded to f32.
                let relative = self.keys.relative_error() + f64::from(f32::EPSILON);
                let error = self.keys.absolute_error(query) + relative * kth.abs();
                let error = error + f64::from(f32::MIN_POSITIVE);
                // The k-th and the excluded keys may both be wrong by that much.
                least = if error.is_finite() { kth - 2.0 * error } else { least };
            }
        } else {
            scores.clear();
            scores.resize(ids.len(), f32::NAN);
        }
        let is_excluded = |&(_, &score): &(&u32, &f32)| f64::from(score) < least;
        let left = ids.iter().zip(scores.iter()).filter(|found| !is_excluded(found));
        nearest.extend(left.map(|(&key, _)| Candidate {
            similarity: self.keys.similarity(query, key as usize),
            key,
        }));
        nearest.sort_unstable();
        nearest.truncate(k);
    }
}

impl<F: Float> NeighborIndex<F> for HnswIndex<F> {
    /// Removed keys count.
    fn num_keys(&self) -> usize {
        self.keys.len()
    }

    fn dim(&self) -> usize {
        self.keys.dim()
    }

    fn nearest_into(
        &self,
        query: ArrayView1<'_, F>,
        k: usize,
        nearest: &mut Vec<Neighbor<F>>,
    ) -> Result<()> {
        check_shape("query", &[self.dim()], query.shape())?;
        nearest.clear();
        if let Some(query) = self.keys.prepare_row(query) {
            let mut found = Vec::new();
            self.nearest(&query, k, 0, |_| true, &mut Buffers::default(), &mut found);
            nearest.extend(found.iter().map(|found| self.neighbor(&query, found)));
        }
        Ok(())
    }

    fn search(
        &self,
        queries: ArrayView2<'_, F>,
        search: &NeighborSearch<'_, F>,
    ) -> Result<Neighbors<F>> {
        let num_keys = self.num_keys();
        search.check(queries.dim(), num_keys, self.dim())?;
        let left = num_keys - self.removed.len();
        let cost_of_links = KEYS_PER_LINK_IN_TILES * self.cost_of_links(search.k, left);
        if queries.nrows() >= FULL_TILE && num_keys as f64 <= cost_of_links {
            let rows = Rows::new("queries", queries)?;
            return super::exact::search_all(&self.keys, &rows, queries.nrows(), search);
        }
        let work = queries.len().saturating_mul(num_keys.min(1000));
        collect(queries.nrows(), num_keys, search.k, work, |rows, mut lists| {
            let (mut buffers, mut found) = (Buffers::default(), Vec::new());
            for number in rows {
                let query = self.keys.prepare_row(queries.row(number));
                found.clear();
                if let Some(query) = &query {
                    let hidden = search.num_excluded(number);
                    let accepts = |key| search.admits(number, key);
                    self.nearest(query, search.k, hidden, accepts, &mut buffers, &mut found);
                }
                lists.push(query.iter().flat_map(|query| {
                    let neighbors = found.iter().map(|found| self.neighbor(query, found));
                    neighbors
                        .filter(|found| search.accepts(number, *found))
                        .map(|found| found.entry())
                }));
            }
            Ok(())
        })
    }
}

fn check_num_keys(num_keys: usize) -> Result<()> {
    if num_keys <= MOST_KEYS {
        return Ok(());
    }
    Err(Error::graph("num_keys", format!("at most {MOST_KEYS}"), num_keys))
}

/// Shows the sizes, not the links.
impl<F: Float> fmt::Debug for HnswIndex<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HnswIndex")
            .field("config", &self.config)
            .field("num_keys", &self.num_keys())
            .field("num_removed", &self.num_removed())
            .field("dim", &self.dim())
            .finish_non_exhaustive()
    }
}
