use super::{Metric, Neighbor, NeighborIndex};
use crate::error::{Error, Result, check_shape};
use crate::float::Float;
use crate::graph::Graph;
use crate::kernels::level::level;
use crate::kernels::nearest::{Candidate, Keys};
use crate::kernels::problem::Rows;
use fearless_simd::Level;
use hnsw_rs::anndists::dist::Distance;
use hnsw_rs::hnsw::Hnsw;
use ndarray::{Array2, ArrayView1};
use std::fmt;

/// The largest number of layers in the crate.
const MAX_LAYERS: usize = 16;

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

    /// Builds an index of `keys`, num_keys × dim, one key at a time, in about O(num_keys log num_keys ·
    /// dim).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a setting is outside its range, [`Error::Graph`] if there are more
    /// than `u32::MAX` keys, [`Error::TooLarge`] if memory is refused.
    pub fn build<F: Float>(&self, keys: Array2<F>) -> Result<HnswIndex<F>> {
        if !(2..=256).contains(&self.connections) {
            return Err(Error::config("connections", "a number from 2 to 256", self.connections));
        }
        let candidates = [("ef_construction", self.ef_construction), ("ef_search", self.ef_search)];
        if let Some((field, count)) = candidates.into_iter().find(|&(_, count)| count == 0) {
            return Err(Error::config(field, "at least 1", count));
        }
        let num_keys = keys.nrows();
        let keys = Keys::new(Rows::owned("keys", keys)?, num_keys, self.metric)?;
        // No more candidates than keys, because the crate reserves memory for them.
        let ef_construction = self.ef_construction.min(num_keys.max(1));
        let distance = Euclidean(level());
        let layers = Hnsw::new(self.connections, num_keys, MAX_LAYERS, ef_construction, distance);
        // With several threads, the index would differ every time.
        for key in 0..num_keys {
            if let Some(point) = keys.key_point(key) {
                layers.insert_slice((&point, key));
            }
        }
        Ok(HnswIndex { keys, layers, ef_search: self.ef_search })
    }
}

/// A hierarchical navigable small world index (Malkov & Yashunin 2016, 1603.09320): links between nearby
/// keys, in layers that each have fewer keys than the one below, and a search that follows these links.
/// Requires the feature `hnsw`; uses the crate `hnsw_rs`.
///
/// The index is approximate: a search compares a query with some thousand keys, not all, and misses some
/// of the nearest. The keys that it finds have the same similarities and order as with
/// [`ExactIndex`](super::ExactIndex). [`search`](NeighborIndex::search) drops excluded keys after they
/// are found, so if few candidates remain, a query has fewer than k neighbours. On 20,000 × 64 normal
/// variates, 24 connections and 200 candidates in search find 0.996 of the ten nearest by cosine.
///
/// All metrics are converted to the Euclidean distance of points: [`Metric::Cosine`] of unit vectors,
/// [`Metric::Dot`] of vectors with one more coordinate that gives all keys the same norm (Bachrach et al.
/// 2014). With `Dot`, keys much shorter than the longest end up close together: if norms differ by
/// factors of ten, many of the nearest are missed.
///
/// The index stores the keys twice, once in the crate's points. Keys are inserted in order on one thread,
/// and their layers are drawn from a fixed seed, so the same keys give the same index, also with another
/// instruction set. Links between many copies of one key replace all other links and make neighbours hard
/// to find.
///
/// ```
/// use graph_attention::neighbors::{HnswConfig, Metric, NeighborIndex, NeighborSearch};
/// use graph_attention::ndarray::Array2;
///
/// // Points on a circle; the nearest are the two neighbours.
/// let angle = |i: usize| i as f64 / 100.0 * std::f64::consts::TAU;
/// let nodes = Array2::from_shape_fn((100, 2), |(i, axis)| [angle(i).cos(), angle(i).sin()][axis]);
/// let index = HnswConfig::new(Metric::Cosine).build(nodes.clone())?;
/// let found = index.search(nodes.view(), &NeighborSearch::new(2).exclude_self(true))?;
/// let mut nearest = found.graph.neighbors(7).to_vec();
/// nearest.sort();
/// assert_eq!(nearest, [6, 8]);
///
/// // Its links, for `Inputs::graph` and `Inputs::with_edge_layers`.
/// let (links, layers) = index.links()?;
/// assert_eq!(links.num_edges(), layers.len());
/// # Ok::<(), graph_attention::Error>(())
/// ```
pub struct HnswIndex<F: Float> {
    keys: Keys<'static, F>,
    layers: Hnsw<'static, F, Euclidean>,
    ef_search: usize,
}

impl<F: Float> HnswIndex<F> {
    /// Returns the measure of similarity.
    #[must_use]
    pub fn metric(&self) -> Metric {
        self.keys.metric()
    }

    /// Returns the links between keys in all layers, and the layer of each link: 0 is the lowest, which
    /// contains every key. A pair that is linked in several layers appears once for each. The links of a
    /// key are sorted by layer, and within a layer nearest first. Links need not exist in both
    /// directions.
    ///
    /// # Errors
    /// [`Error::Graph`] if there are more than `u32::MAX` links.
    pub fn links(&self) -> Result<(Graph, Vec<u8>)> {
        let points = self.layers.get_point_indexation();
        let mut of_key = vec![Vec::new(); self.num_keys()];
        for layer in 0..=usize::from(points.get_max_level_observed()) {
            // The points with this as their highest layer; they have their links in all layers.
            for point in points.get_layer_iterator(layer) {
                of_key[point.get_origin_id()] = point.get_neighborhood_id();
            }
        }
        let mut offsets = vec![0];
        let (mut indices, mut layers) = (Vec::new(), Vec::new());
        for links in &of_key {
            for (layer, links) in (0..).zip(links) {
                indices.extend(links.iter().map(|link| link.d_id as u32));
                layers.resize(indices.len(), layer);
            }
            offsets.push(indices.len());
        }
        Ok((Graph::from_csr(self.num_keys(), offsets, indices)?, layers))
    }
}

impl<F: Float> NeighborIndex<F> for HnswIndex<F> {
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
        let Some(query) = self.keys.prepare(&query.to_vec()).filter(|_| k > 0) else {
            return Ok(());
        };
        let ef = self.ef_search.max(k).min(self.num_keys());
        let found = self.layers.search(&self.keys.query_point(&query), ef, ef);
        let candidate =
            |key| Candidate { similarity: self.keys.similarity(&query, key), key: key as u32 };
        let mut found: Vec<_> = found.iter().map(|found| candidate(found.d_id)).collect();
        found.sort_unstable();
        nearest.extend(found.into_iter().take(k).map(Candidate::into_neighbor));
        Ok(())
    }
}

/// Shows the sizes, not the links.
impl<F: Float> fmt::Debug for HnswIndex<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HnswIndex")
            .field("metric", &self.metric())
            .field("num_keys", &self.num_keys())
            .field("dim", &self.dim())
            .field("ef_search", &self.ef_search)
            .finish_non_exhaustive()
    }
}

/// The distance that the crate uses. It is never NaN or negative, which the crate could not handle,
/// because all points are finite.
struct Euclidean(Level);

impl<F: Float> Distance<F> for Euclidean {
    fn eval(&self, a: &[F], b: &[F]) -> f32 {
        F::squared_distance(self.0, a, b).sqrt().as_f64() as f32
    }
}
