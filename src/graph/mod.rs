mod hops;
mod order;
mod patterns;
#[cfg(feature = "petgraph")]
mod petgraph;
#[cfg(feature = "serde")]
mod serde;
mod spectral;
#[cfg(feature = "sprs")]
mod sprs;
mod subgraph;

pub use order::Reordering;
pub use subgraph::Subgraph;

use crate::element::{Element, try_vec, try_zeros};
use crate::error::{Error, Result, check_shape};
use crate::segments::Segments;
use ndarray::{Array2, ArrayView2, Axis};
use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

/// The keys that each query attends to: a list of (query, key) pairs, grouped by query.
///
/// An edge `(i, j)` means "query i attends to key j". (In PyG the same edge is a column of `edge_index`
/// with source j and target i.) Queries and keys may be different node sets. Parallel edges stay distinct
/// pairs, self-loops are ordinary edges and are never added silently, and a query may have no edges.
///
/// **Pair order.** The rows of every per-edge array, input or output (edge features, distances, biases,
/// weights, their gradients), are in *the caller's edge order*: the order of the list given to
/// [`from_edges`](Self::from_edges), or the order of the slots for [`from_csr`](Self::from_csr) and the
/// pattern builders.
///
/// A graph is stored as compressed sparse rows: `u32` keys, `usize` offsets, and one `u32` edge number
/// per slot if the caller's order differs from the order of the rows. It has at most `u32::MAX` queries,
/// keys and edges.
///
/// ```
/// use graph_attention::Graph;
///
/// // Two queries over three keys; the edges are in no particular order.
/// let graph = Graph::from_edges(2, 3, [(1, 2), (0, 1), (1, 0)])?;
/// // Query 1 attends to key 2 (edge 0) and key 0 (edge 2).
/// assert_eq!(graph.row(1).collect::<Vec<_>>(), [(2, 0), (0, 2)]);
/// # Ok::<(), graph_attention::Error>(())
/// ```
///
/// **Saving.** With the feature `serde` a graph is serialised as [`num_keys`](Self::num_keys),
/// [`offsets`](Self::offsets), [`indices`](Self::indices), [`edge_ids`](Self::edge_ids) and
/// [`blocks`](Self::blocks), so it is restored with the same pair order. Deserialisation checks everything,
/// like [`from_csr`](Self::from_csr), including edge numbers and blocks, which may be left out; serde's error
/// has the message of [`Error::Graph`].
#[derive(Clone)]
#[cfg_attr(
    feature = "serde",
    derive(::serde::Serialize, ::serde::Deserialize),
    serde(try_from = "serde::Parts")
)]
pub struct Graph {
    /// All keys in `indices` are below this.
    num_keys: usize,
    /// Row i is `indices[offsets[i]..offsets[i + 1]]`. Starts at 0, never decreases, ends at
    /// `indices.len()`, and has one entry more than there are queries.
    offsets: Vec<usize>,
    /// The key of each slot.
    indices: Vec<u32>,
    /// The caller's edge number of each slot, a permutation; `None` is the identity.
    edge_ids: Option<Vec<u32>>,
    /// Computed on first use.
    #[cfg_attr(feature = "serde", serde(skip))]
    transposed: OnceLock<Box<Graph>>,
    /// The graphs that this one consists of.
    blocks: Option<Box<Segments>>,
}

/// The features of new self-loops: see [`Graph::with_self_loops_and_features`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LoopFill<F> {
    /// This value in every column.
    Value(F),
    /// The mean over the node's other edges as a query; 0 if it has none.
    Mean,
}

impl Graph {
    /// Creates a graph from a list of `(query, key)` edges. They can be in any order, which becomes the
    /// pair order.
    ///
    /// Uses a stable counting sort: O(queries + edges) time and memory.
    ///
    /// # Errors
    /// [`Error::Graph`] if a query or key of an edge does not exist, or if there are more than `u32::MAX`
    /// queries, keys or edges.
    pub fn from_edges(
        num_queries: usize,
        num_keys: usize,
        edges: impl IntoIterator<Item = (usize, usize)>,
    ) -> Result<Self> {
        check_sizes(num_queries, num_keys)?;
        let mut list = Vec::new();
        for (position, (query, key)) in edges.into_iter().enumerate() {
            let checked = |side: &str, index: usize, len: usize| {
                if index < len {
                    return Ok(index as u32);
                }
                let what = format!("edges[{position}].{side}");
                Err(Error::graph(what, format!("an index below {len}"), index))
            };
            list.push((checked("query", query, num_queries)?, checked("key", key, num_keys)?));
        }
        check_num_edges(list.len())?;

        let offsets = try_vec("graph", &[num_queries + 1], 0)?;
        let (offsets, slots) = counting_sort(offsets, list.iter().map(|&(query, _)| query));
        let in_row_order = slots.iter().enumerate().all(|(slot, &id)| slot == id as usize);
        Ok(Self {
            num_keys,
            offsets,
            indices: slots.iter().map(|&id| list[id as usize].1).collect(),
            edge_ids: (!in_row_order).then_some(slots),
            transposed: OnceLock::new(),
            blocks: None,
        })
    }

    /// Creates a graph from compressed sparse rows; the pair order is the order of `indices`.
    ///
    /// Query i attends to the keys `indices[offsets[i]..offsets[i + 1]]`.
    ///
    /// # Errors
    /// [`Error::Graph`] if `offsets` is empty, does not start at 0, decreases, or does not end at
    /// `indices.len()`; if an index is not below `num_keys`; or if there are more than `u32::MAX`
    /// queries, keys or edges.
    pub fn from_csr(num_keys: usize, offsets: Vec<usize>, indices: Vec<u32>) -> Result<Self> {
        let Some((&first, rest)) = offsets.split_first() else {
            return Err(Error::graph("offsets", "one entry more than queries", "no entries"));
        };
        if first != 0 {
            return Err(Error::graph("offsets[0]", 0, first));
        }
        check_sizes(rest.len(), num_keys)?;
        check_num_edges(indices.len())?;
        for (i, pair) in offsets.windows(2).enumerate() {
            if pair[1] < pair[0] {
                let what = format!("offsets[{}]", i + 1);
                return Err(Error::graph(what, format!("at least {}", pair[0]), pair[1]));
            }
        }
        let last = offsets[rest.len()];
        if last != indices.len() {
            let what = format!("offsets[{}]", rest.len());
            return Err(Error::graph(what, format!("indices.len() = {}", indices.len()), last));
        }
        if let Some(slot) = indices.iter().position(|&key| key as usize >= num_keys) {
            let what = format!("indices[{slot}]");
            return Err(Error::graph(what, format!("a key below {num_keys}"), indices[slot]));
        }
        Ok(Self {
            num_keys,
            offsets,
            indices,
            edge_ids: None,
            transposed: OnceLock::new(),
            blocks: None,
        })
    }

    /// Creates a graph from the pairs that are `true` in a `num_queries × num_keys` mask, in row-major
    /// order.
    ///
    /// # Errors
    /// [`Error::Graph`] if there are more than `u32::MAX` queries, keys or pairs.
    pub fn from_mask(mask: ArrayView2<'_, bool>) -> Result<Self> {
        check_sizes(mask.nrows(), mask.ncols())?;
        let num_edges = mask.iter().filter(|&&seen| seen).count();
        Self::from_rows(mask.nrows(), mask.ncols(), num_edges, |query, row| {
            let keys = (0..mask.ncols() as u32).zip(mask.row(query));
            row.extend(keys.filter(|(_, seen)| **seen).map(|(key, _)| key));
        })
    }

    /// Combines several graphs into one, without edges between them. Use it for batches, because this
    /// crate has no batch axis. Concatenate the rows of queries, keys and values, and the per-edge
    /// arrays, in the same order. The result remembers its [`blocks`](Self::blocks), but graphs made from
    /// it, by [`with_self_loops`](Self::with_self_loops) for instance, do not.
    ///
    /// # Errors
    /// [`Error::Graph`] if the sum of queries, keys or edges exceeds `u32::MAX`.
    pub fn block_diagonal(graphs: &[&Graph]) -> Result<Self> {
        let total = |size: fn(&Graph) -> usize| graphs.iter().map(|graph| size(graph)).sum();
        let (num_queries, num_keys) = (total(Self::num_queries), total(Self::num_keys));
        let num_edges = total(Self::num_edges);
        check_sizes(num_queries, num_keys)?;
        check_num_edges(num_edges)?;

        let mut offsets = reserved(num_queries + 1)?;
        let mut indices = reserved(num_edges)?;
        let mut edge_ids = reserved(num_edges)?;
        offsets.push(0);
        let mut first_key = 0;
        for graph in graphs {
            let first_edge = indices.len();
            offsets.extend(graph.offsets[1..].iter().map(|end| first_edge + end));
            indices.extend(graph.indices.iter().map(|key| first_key as u32 + key));
            edge_ids.extend(
                (0..graph.num_edges()).map(|slot| (first_edge + graph.edge_id(slot)) as u32),
            );
            first_key += graph.num_keys;
        }
        let permuted = graphs.iter().any(|graph| graph.edge_ids.is_some());
        let sizes = |size: fn(&Graph) -> usize| graphs.iter().map(|graph| size(graph)).collect();
        let (queries, keys): (Vec<usize>, Vec<usize>) =
            (sizes(Self::num_queries), sizes(Self::num_keys));
        let blocks = Segments::from_query_key_lengths(&queries, &keys)?;
        let blocks = (graphs.len() > 1).then(|| Box::new(blocks));
        Ok(Self {
            num_keys,
            offsets,
            indices,
            edge_ids: permuted.then_some(edge_ids),
            transposed: OnceLock::new(),
            blocks,
        })
    }

    /// Returns the queries and keys of each graph in a [`block_diagonal`](Self::block_diagonal) of several. Causal
    /// patterns and windows count within each, and latent neighbours are found there.
    #[must_use]
    pub fn blocks(&self) -> Option<&Segments> {
        self.blocks.as_deref()
    }

    /// Returns the number of queries.
    #[must_use]
    pub fn num_queries(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Returns the number of keys.
    #[must_use]
    pub fn num_keys(&self) -> usize {
        self.num_keys
    }

    /// Returns the number of edges, which are the (query, key) pairs.
    #[must_use]
    pub fn num_edges(&self) -> usize {
        self.indices.len()
    }

    /// Returns the offsets of the rows in [`indices`](Self::indices): one more entry than there are
    /// queries.
    #[must_use]
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// Returns the keys of all rows, concatenated.
    #[must_use]
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// Returns the caller's edge number of each entry of [`indices`](Self::indices); `None` if each edge
    /// number is the position of the entry.
    #[must_use]
    pub fn edge_ids(&self) -> Option<&[u32]> {
        self.edge_ids.as_deref()
    }

    /// Returns the keys that a query attends to; empty for a query that does not exist.
    #[must_use]
    pub fn neighbors(&self, query: usize) -> &[u32] {
        &self.indices[self.slots(query)]
    }

    /// Iterates over the edges of a query as `(key, edge number)`; empty for a query that does not exist.
    pub fn row(&self, query: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.slots(query).map(|slot| (self.indices[slot] as usize, self.edge_id(slot)))
    }

    /// Returns the slots of a query's row.
    #[inline]
    pub(crate) fn slots(&self, query: usize) -> Range<usize> {
        match self.offsets.get(query..) {
            Some(&[start, end, ..]) => start..end,
            _ => 0..0,
        }
    }

    /// Returns the key of a slot.
    #[inline]
    pub(crate) fn key(&self, slot: usize) -> usize {
        self.indices[slot] as usize
    }

    /// Returns the caller's edge number of a slot.
    #[inline]
    pub(crate) fn edge_id(&self, slot: usize) -> usize {
        self.edge_ids.as_ref().map_or(slot, |ids| ids[slot] as usize)
    }

    /// Returns the same edges with queries and keys exchanged: row j lists the queries that attend to key
    /// j, in ascending order. Edge numbers stay the same, so per-edge arrays fit both directions.
    ///
    /// Computed on first use, in O(queries + keys + edges) time and memory, and cached.
    #[must_use]
    pub fn transpose(&self) -> &Graph {
        self.transposed.get_or_init(|| {
            let queries: Vec<u32> = (0..self.num_queries())
                .flat_map(|query| std::iter::repeat_n(query as u32, self.slots(query).len()))
                .collect();
            let offsets = vec![0; self.num_keys + 1];
            let (offsets, slots) = counting_sort(offsets, self.indices.iter().copied());
            Box::new(Self {
                num_keys: self.num_queries(),
                offsets,
                indices: slots.iter().map(|&slot| queries[slot as usize]).collect(),
                edge_ids: Some(
                    slots.iter().map(|&slot| self.edge_id(slot as usize) as u32).collect(),
                ),
                transposed: OnceLock::new(),
                blocks: None,
            })
        })
    }

    /// Returns the graph with exactly one self-loop per node: existing loops are removed, then n new ones
    /// are appended after the remaining edges (which keep their order), node by node. PyG's graph
    /// convolutions do this inside; here it is done once and explicitly.
    ///
    /// If sources and targets are different node sets there are no self-loops, and this is an error. (PyG
    /// then treats nodes with equal numbers as the same node, adds loops up to the smaller number of
    /// nodes, and, with the mean as fill value, fails on edges to the other targets.)
    ///
    /// # Errors
    /// [`Error::Graph`] if the numbers of queries and keys differ, or if there would be more than
    /// `u32::MAX` edges.
    pub fn with_self_loops(&self) -> Result<Self> {
        Ok(self.replace_self_loops()?.0)
    }

    /// Like [`with_self_loops`](Self::with_self_loops), but for a graph with edge features: also returns
    /// the features of the new edges, in the new pair order.
    ///
    /// # Errors
    /// As [`with_self_loops`](Self::with_self_loops); [`Error::Shape`] if `features` does not have one
    /// row per edge.
    pub fn with_self_loops_and_features<F: Element>(
        &self,
        features: ArrayView2<'_, F>,
        fill: LoopFill<F>,
    ) -> Result<(Self, Array2<F>)> {
        let columns = features.ncols();
        check_shape("edge_features", &[self.num_edges(), columns], features.shape())?;
        let (graph, kept) = self.replace_self_loops()?;

        let mut filled = try_zeros("edge_features", graph.num_edges(), columns)?;
        let (mut old, mut new) = filled.view_mut().split_at(Axis(0), kept.len());
        for (mut row, &edge) in old.rows_mut().into_iter().zip(&kept) {
            row.assign(&features.row(edge));
        }
        match fill {
            LoopFill::Value(value) => new.fill(value),
            LoopFill::Mean => {
                for (node, mut mean) in new.rows_mut().into_iter().enumerate() {
                    let others = || self.row(node).filter(|&(key, _)| key != node);
                    others().for_each(|(_, edge)| mean += &features.row(edge));
                    mean /= F::from_f64(others().count().max(1) as f64);
                }
            }
        }
        Ok((graph, filled))
    }

    /// Returns the graph with new self-loops, and the old edge numbers of the remaining edges.
    fn replace_self_loops(&self) -> Result<(Self, Vec<usize>)> {
        self.check_square("with_self_loops")?;
        let n = self.num_keys;
        let ends = self.ends()?;
        let kept: Vec<usize> =
            (0..ends.len()).filter(|&edge| ends[edge].0 != ends[edge].1).collect();
        let edges = kept.iter().map(|&edge| ends[edge]).chain((0..n).map(|node| (node, node)));
        Ok((Self::from_edges(n, n, edges)?, kept))
    }

    /// Returns the rows of some queries, in the given order, and the number in `self` of each edge of the
    /// result, to gather per-edge arrays with. A query may appear more than once.
    ///
    /// # Errors
    /// [`Error::Graph`] if a query does not exist, or if there would be more than `u32::MAX`
    /// queries or edges.
    pub fn select_queries(&self, queries: &[usize]) -> Result<(Self, Vec<usize>)> {
        if let Some(position) = queries.iter().position(|&query| query >= self.num_queries()) {
            let expected = format!("a query below {}", self.num_queries());
            return Err(Error::graph(format!("queries[{position}]"), expected, queries[position]));
        }
        let num_edges = queries.iter().map(|&query| self.slots(query).len());
        let num_edges = num_edges.fold(0usize, usize::saturating_add);
        let graph = Self::from_rows(queries.len(), self.num_keys, num_edges, |row, keys| {
            keys.extend(self.neighbors(queries[row]));
        })?;
        let mut edges = reserved(num_edges)?;
        for &query in queries {
            match &self.edge_ids {
                Some(ids) => edges.extend(ids[self.slots(query)].iter().map(|&id| id as usize)),
                None => edges.extend(self.slots(query)),
            }
        }
        Ok((graph, edges))
    }

    /// Returns the edges for which `keep(query, key, edge number)` is true, and their numbers in `self`.
    pub(crate) fn filter_edges(
        &self,
        keep: impl Fn(usize, usize, usize) -> bool,
    ) -> Result<(Self, Vec<usize>)> {
        let mut edges = Vec::new();
        let graph = Self::from_rows(self.num_queries(), self.num_keys, 0, |query, keys| {
            for (key, edge) in self.row(query).filter(|&(key, edge)| keep(query, key, edge)) {
                keys.push(key as u32);
                edges.push(edge);
            }
        })?;
        Ok((graph, edges))
    }

    /// Returns the same edges over only the keys that have any, and the numbers of these, ascending.
    pub(crate) fn select_linked_keys(&self) -> Result<(Self, Vec<usize>)> {
        let mut keys = try_vec("graph", &[self.indices.len()], 0)?;
        keys.copy_from_slice(&self.indices);
        keys.sort_unstable();
        keys.dedup();
        let place = |key: &u32| keys.partition_point(|other| other < key) as u32;
        let mut indices = try_vec("graph", &[self.indices.len()], 0)?;
        indices.iter_mut().zip(&self.indices).for_each(|(index, key)| *index = place(key));
        let graph = Self {
            num_keys: keys.len(),
            offsets: self.offsets.clone(),
            indices,
            edge_ids: self.edge_ids.clone(),
            transposed: OnceLock::new(),
            blocks: None,
        };
        Ok((graph, keys.into_iter().map(|key| key as usize).collect()))
    }

    /// Builds a graph row by row: `fill` appends the keys of a query to the list of all keys. `num_edges`
    /// is their final number if known, else 0.
    fn from_rows(
        num_queries: usize,
        num_keys: usize,
        num_edges: usize,
        mut fill: impl FnMut(usize, &mut Vec<u32>),
    ) -> Result<Self> {
        check_sizes(num_queries, num_keys)?;
        check_num_edges(num_edges)?;
        let mut offsets = try_vec("graph", &[num_queries + 1], 0)?;
        let mut indices = reserved(num_edges)?;
        for query in 0..num_queries {
            fill(query, &mut indices);
            check_num_edges(indices.len())?;
            offsets[query + 1] = indices.len();
        }
        Ok(Self {
            num_keys,
            offsets,
            indices,
            edge_ids: None,
            transposed: OnceLock::new(),
            blocks: None,
        })
    }

    fn check_square(&self, what: &'static str) -> Result<()> {
        if self.num_queries() == self.num_keys {
            return Ok(());
        }
        let expected = format!("one node set, with as many queries as {} keys", self.num_keys);
        Err(Error::graph(what, expected, format!("{} queries", self.num_queries())))
    }
}

/// Compares the edges, their order and the blocks, but not whether the transpose is cached.
impl PartialEq for Graph {
    fn eq(&self, other: &Self) -> bool {
        self.num_keys == other.num_keys
            && self.offsets == other.offsets
            && self.indices == other.indices
            && self.blocks == other.blocks
            && (0..self.num_edges()).all(|slot| self.edge_id(slot) == other.edge_id(slot))
    }
}

/// Shows the sizes and whether edges are permuted, but not the edges, because graphs are large.
impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph")
            .field("num_queries", &self.num_queries())
            .field("num_keys", &self.num_keys)
            .field("num_edges", &self.num_edges())
            .finish_non_exhaustive()
    }
}

fn check_sizes(num_queries: usize, num_keys: usize) -> Result<()> {
    for (what, size) in [("num_queries", num_queries), ("num_keys", num_keys)] {
        if u32::try_from(size).is_err() {
            return Err(Error::graph(what, format!("at most {}", u32::MAX), size));
        }
    }
    Ok(())
}

/// Returns an empty list with capacity for `len` entries.
fn reserved<T>(len: usize) -> Result<Vec<T>> {
    let mut list = Vec::new();
    list.try_reserve_exact(len).map_err(|_| too_large(len))?;
    Ok(list)
}

fn too_large(len: usize) -> Error {
    Error::TooLarge { what: "graph", shape: vec![len] }
}

fn check_num_edges(num_edges: usize) -> Result<()> {
    if u32::try_from(num_edges).is_err() {
        return Err(Error::graph("edges", format!("at most {}", u32::MAX), num_edges));
    }
    Ok(())
}

/// Sorts items by row with a stable counting sort. `offsets`, zeros of length `rows + 1`, becomes the
/// offsets of the rows; returns the items' numbers in row order.
fn counting_sort(
    mut offsets: Vec<usize>,
    row_of_item: impl ExactSizeIterator<Item = u32> + Clone,
) -> (Vec<usize>, Vec<u32>) {
    for row in row_of_item.clone() {
        offsets[row as usize + 1] += 1;
    }
    for row in 1..offsets.len() {
        offsets[row] += offsets[row - 1];
    }
    let mut next = offsets.clone();
    let mut items = vec![0; row_of_item.len()];
    for (item, row) in row_of_item.enumerate() {
        items[next[row as usize]] = item as u32;
        next[row as usize] += 1;
    }
    (offsets, items)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{array, s};

    fn edges_of(graph: &Graph) -> Vec<(usize, usize)> {
        let mut edges = vec![(usize::MAX, usize::MAX); graph.num_edges()];
        for query in 0..graph.num_queries() {
            for (key, edge) in graph.row(query) {
                edges[edge] = (query, key);
            }
        }
        edges
    }

    #[test]
    fn keeps_the_callers_edge_order_parallel_edges_and_loops() -> Result<()> {
        let edges = [(2, 1), (0, 3), (2, 1), (2, 2), (0, 0)];
        let graph = Graph::from_edges(3, 5, edges)?;
        assert_eq!(edges_of(&graph), edges);
        assert_eq!(graph.neighbors(0), [3, 0]);
        assert!(graph.neighbors(1).is_empty());
        assert!(graph.neighbors(3).is_empty());
        assert!(graph.neighbors(usize::MAX).is_empty());
        assert_eq!(graph.row(2).collect::<Vec<_>>(), [(1, 0), (1, 2), (2, 3)]);
        Ok(())
    }

    #[test]
    fn transposing_twice_gives_the_same_edges() -> Result<()> {
        let edges = [(2, 1), (0, 3), (2, 1), (2, 2), (0, 0)];
        let graph = Graph::from_edges(3, 5, edges)?;
        let transposed = graph.transpose();
        assert_eq!(edges_of(transposed), edges.map(|(query, key)| (key, query)));
        assert_eq!(edges_of(transposed.transpose()), edges);
        assert_eq!(transposed.neighbors(1), [2, 2]);
        assert!(transposed.neighbors(4).is_empty());
        Ok(())
    }

    #[test]
    fn self_loops_replace_existing_ones_and_take_the_mean_of_the_rest() -> Result<()> {
        let graph = Graph::from_edges(3, 3, [(0, 0), (1, 0), (1, 2), (1, 1)])?;
        let features = array![[9.0, 9.0], [1.0, 2.0], [3.0, 6.0], [9.0, 9.0]];
        let (looped, mean) = graph.with_self_loops_and_features(features.view(), LoopFill::Mean)?;
        assert_eq!(edges_of(&looped), [(1, 0), (1, 2), (0, 0), (1, 1), (2, 2)]);
        assert_eq!(mean, array![[1., 2.], [3., 6.], [0., 0.], [2., 4.], [0., 0.]]);
        let (_, fives) =
            graph.with_self_loops_and_features(features.view(), LoopFill::Value(5.0))?;
        assert_eq!(fives.slice(s![2.., ..]), Array2::from_elem((3, 2), 5.0));
        assert_eq!(graph.with_self_loops()?, looped);
        Ok(())
    }

    #[test]
    fn blocks_and_selections_carry_the_edge_order() -> Result<()> {
        let a = Graph::from_edges(2, 3, [(1, 2), (0, 1), (1, 0)])?;
        let b = Graph::from_edges(1, 2, [(0, 1)])?;
        let both = Graph::block_diagonal(&[&a, &b, &a])?;
        let expected = [(1, 2), (0, 1), (1, 0), (2, 4), (4, 7), (3, 6), (4, 5)];
        assert_eq!(edges_of(&both), expected);
        assert_eq!((both.num_queries(), both.num_keys()), (5, 8));

        let (selected, edges) = both.select_queries(&[4, 2, 4])?;
        assert_eq!(edges_of(&selected), [(0, 7), (0, 5), (1, 4), (2, 7), (2, 5)]);
        assert_eq!(edges, [4, 6, 3, 4, 6]);
        assert_eq!(Graph::block_diagonal(&[])?.num_queries(), 0);
        Ok(())
    }
}
