//! Parts of a graph, and a graph with its nodes in another order.

use super::Graph;
use crate::element::try_vec;
use crate::error::{Error, Result, check_shape};
use ndarray::{Array, ArrayView, ArrayViewMut, Axis, RemoveAxis, Zip};
use rand::Rng;
use std::collections::HashMap;

/// Some nodes and edges of a graph, numbered from 0, and their numbers in the whole graph.
///
/// Edges are numbered row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Subgraph {
    graph: Graph,
    nodes: Vec<usize>,
    edges: Vec<usize>,
    num_within: Vec<usize>,
    /// The numbers of nodes and edges of the whole graph.
    whole: [usize; 2],
}

impl Subgraph {
    /// Returns the edges between the nodes.
    #[must_use]
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Returns the number of each node in the whole graph.
    #[must_use]
    pub fn nodes(&self) -> &[usize] {
        &self.nodes
    }

    /// Returns the number of each edge in the whole graph.
    #[must_use]
    pub fn edges(&self) -> &[usize] {
        &self.edges
    }

    /// Returns the number of nodes at most 0, 1, … hops away from the seeds; these are the first nodes. If there
    /// are no seeds, the only entry is the number of nodes.
    #[must_use]
    pub fn num_within(&self) -> &[usize] {
        &self.num_within
    }

    /// Returns the graph of one layer of a model, which only computes what later layers read.
    ///
    /// A model of as many layers as there are hops computes the outputs of the seeds. Its layer 0 reads all
    /// nodes; each layer computes the nodes that are one hop nearer to the seeds than those it reads. The queries
    /// of the result are the first of its keys ([`Inputs::self_attention`](crate::Inputs::self_attention)), and
    /// its edges are the first edges of [`graph`](Self::graph).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `layer` is not below the number of hops.
    pub fn layer(&self, layer: usize) -> Result<Graph> {
        let hops = self.num_within.len() - 1;
        if layer >= hops {
            return Err(Error::config("layer", format!("below {hops}, the number of hops"), layer));
        }
        let [queries, keys] = [hops - 1 - layer, hops - layer].map(|hops| self.num_within[hops]);
        let offsets = self.graph.offsets()[..=queries].to_vec();
        let indices = self.graph.indices()[..offsets[queries]].to_vec();
        Graph::from_csr(keys, offsets, indices)
    }

    /// Returns the rows of the nodes from an array with one row for each node of the whole graph.
    ///
    /// # Errors
    /// [`Error::Shape`] if `rows` does not have that many rows.
    pub fn rows_of_nodes<A: Clone, D: RemoveAxis>(
        &self,
        rows: ArrayView<'_, A, D>,
    ) -> Result<Array<A, D>> {
        select("rows of nodes", rows, self.whole[0], &self.nodes)
    }

    /// Returns the rows of the edges from an array with one row for each edge of the whole graph, such as edge
    /// features.
    ///
    /// # Errors
    /// [`Error::Shape`] if `rows` does not have that many rows.
    pub fn rows_of_edges<A: Clone, D: RemoveAxis>(
        &self,
        rows: ArrayView<'_, A, D>,
    ) -> Result<Array<A, D>> {
        select("rows of edges", rows, self.whole[1], &self.edges)
    }

    /// Copies rows of these nodes to their places in an array with one row for each node of the whole graph.
    ///
    /// # Errors
    /// [`Error::Shape`] if the arrays do not have one row for each node, or differ in their other axes.
    pub fn put_rows_of_nodes<A: Clone, D: RemoveAxis>(
        &self,
        rows: ArrayView<'_, A, D>,
        whole: ArrayViewMut<'_, A, D>,
    ) -> Result<()> {
        put(["rows of nodes", "rows of all nodes"], rows, whole, self.whole[0], &self.nodes)
    }

    /// Copies rows of these edges to their places in an array with one row for each edge of the whole graph.
    ///
    /// # Errors
    /// [`Error::Shape`] if the arrays do not have one row for each edge, or differ in their other axes.
    pub fn put_rows_of_edges<A: Clone, D: RemoveAxis>(
        &self,
        rows: ArrayView<'_, A, D>,
        whole: ArrayViewMut<'_, A, D>,
    ) -> Result<()> {
        put(["rows of edges", "rows of all edges"], rows, whole, self.whole[1], &self.edges)
    }
}

/// Checks that an array has this many rows.
fn check_rows(what: &'static str, shape: &[usize], num_rows: usize) -> Result<()> {
    let mut expected = shape.to_vec();
    if let Some(rows) = expected.first_mut() {
        *rows = num_rows;
    }
    check_shape(what, &expected, shape)
}

fn select<A: Clone, D: RemoveAxis>(
    what: &'static str,
    rows: ArrayView<'_, A, D>,
    num_rows: usize,
    numbers: &[usize],
) -> Result<Array<A, D>> {
    check_rows(what, rows.shape(), num_rows)?;
    Ok(rows.select(Axis(0), numbers))
}

fn put<A: Clone, D: RemoveAxis>(
    [what, what_whole]: [&'static str; 2],
    rows: ArrayView<'_, A, D>,
    mut whole: ArrayViewMut<'_, A, D>,
    num_rows: usize,
    numbers: &[usize],
) -> Result<()> {
    check_rows(what_whole, whole.shape(), num_rows)?;
    check_rows(what, rows.shape(), numbers.len())?;
    let mut expected = whole.shape().to_vec();
    expected[0] = numbers.len();
    check_shape(what, &expected, rows.shape())?;
    for (row, &number) in rows.axis_iter(Axis(0)).zip(numbers) {
        Zip::from(whole.index_axis_mut(Axis(0), number))
            .and(row)
            .for_each(|to, from| to.clone_from(from));
    }
    Ok(())
}

/// New numbers of some nodes.
enum Numbers {
    /// For each node of the whole graph; `u32::MAX` for those without a number. Faster than a table, but as long
    /// as the whole graph.
    List(Vec<u32>),
    Table(HashMap<usize, u32>),
}

impl Numbers {
    /// At least `expected` of `num_nodes` nodes will have a number.
    fn new(num_nodes: usize, expected: usize) -> Result<Self> {
        Ok(match expected >= num_nodes / 16 {
            true => Self::List(try_vec("nodes", &[num_nodes], u32::MAX)?),
            false => Self::Table(HashMap::with_capacity(expected)),
        })
    }

    fn get(&self, node: usize) -> Option<u32> {
        match self {
            Self::List(numbers) => Some(numbers[node]).filter(|&number| number != u32::MAX),
            Self::Table(numbers) => numbers.get(&node).copied(),
        }
    }

    /// Returns the number of a node, and whether it is new: the given one, if it had none.
    fn get_or_insert(&mut self, node: usize, next: usize) -> (u32, bool) {
        if let Some(number) = self.get(node) {
            return (number, false);
        }
        let next = next as u32;
        match self {
            Self::List(numbers) => numbers[node] = next,
            Self::Table(numbers) => drop(numbers.insert(node, next)),
        }
        (next, true)
    }
}

impl Graph {
    /// Numbers some nodes in their order.
    fn number(&self, what: &'static str, nodes: &[usize]) -> Result<Numbers> {
        self.check_square(what)?;
        let n = self.num_keys();
        let mut numbers = Numbers::new(n, nodes.len())?;
        for (position, &node) in nodes.iter().enumerate() {
            let error =
                |expected: String| Error::graph(format!("{what}[{position}]"), expected, node);
            if node >= n {
                return Err(error(format!("a node below {n}")));
            }
            if !numbers.get_or_insert(node, position).1 {
                return Err(error("every node once".to_owned()));
            }
        }
        Ok(numbers)
    }

    /// Returns the edges whose two nodes are in a list, in the order of the list.
    ///
    /// O(edges of these nodes). [Blocks](Self::blocks) are not kept.
    ///
    /// ```
    /// use graph_attention::Graph;
    /// use graph_attention::ndarray::array;
    ///
    /// let ring = Graph::from_edges(4, 4, [(0, 1), (1, 2), (2, 3), (3, 0)])?;
    /// let part = ring.subgraph(&[3, 2])?;
    /// // Node 2 attends to node 3: the new nodes 1 and 0.
    /// assert_eq!(*part.graph(), Graph::from_edges(2, 2, [(1, 0)])?);
    /// assert_eq!(part.edges(), [2]);
    ///
    /// let features = array![[0.0], [0.1], [0.2], [0.3]];
    /// assert_eq!(part.rows_of_nodes(features.view())?, array![[0.3], [0.2]]);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Graph`] if queries and keys differ in number, or if a node does not exist or appears twice.
    pub fn subgraph(&self, nodes: &[usize]) -> Result<Subgraph> {
        let numbers = self.number("nodes", nodes)?;
        self.between(nodes.to_vec(), &numbers, vec![nodes.len()])
    }

    /// Returns all edges between these nodes.
    fn between(
        &self,
        nodes: Vec<usize>,
        numbers: &Numbers,
        num_within: Vec<usize>,
    ) -> Result<Subgraph> {
        let mut edges = Vec::new();
        let graph = Self::from_rows(nodes.len(), nodes.len(), 0, |row, keys| {
            for (key, edge) in self.row(nodes[row]) {
                if let Some(key) = numbers.get(key) {
                    keys.push(key);
                    edges.push(edge);
                }
            }
        })?;
        let whole = [self.num_keys(), self.num_edges()];
        Ok(Subgraph { graph, nodes, edges, num_within, whole })
    }

    /// Returns the graph with its nodes in another order: the new node p is `order[p]`. With an order in which
    /// near nodes have near numbers, such as a [`reordering`](Self::reordering), attention on a large graph is
    /// faster.
    ///
    /// ```
    /// use graph_attention::{Graph, Reordering};
    /// use graph_attention::ndarray::array;
    ///
    /// let path = Graph::from_edges(4, 4, [(0, 2), (2, 0), (2, 1), (1, 2), (1, 3), (3, 1)])?;
    /// let ordered = path.permute(&path.reordering(Reordering::ReverseCuthillMcKee)?)?;
    /// // Now every edge joins consecutive nodes.
    /// let near = |(node, key): (usize, u32)| node.abs_diff(key as usize) == 1;
    /// assert!((0..4).all(|node| ordered.graph().neighbors(node).iter().all(|&key| near((node, key)))));
    ///
    /// let x = array![0.0, 0.1, 0.2, 0.3];
    /// let there = ordered.rows_of_nodes(x.view())?;
    /// let mut back = array![0.0, 0.0, 0.0, 0.0];
    /// ordered.put_rows_of_nodes(there.view(), back.view_mut())?;
    /// assert_eq!(back, x);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// O(nodes + edges). [Blocks](Self::blocks) are not kept.
    ///
    /// # Errors
    /// [`Error::Graph`] if queries and keys differ in number; [`Error::Shape`] if `order` does not have one entry
    /// for each node; [`Error::Graph`] if a node does not exist or appears twice.
    pub fn permute(&self, order: &[usize]) -> Result<Subgraph> {
        self.check_square("permute")?;
        check_shape("order", &[self.num_keys()], &[order.len()])?;
        let numbers = self.number("order", order)?;
        self.between(order.to_vec(), &numbers, vec![order.len()])
    }

    /// Returns the nodes that can be reached from some seeds by at most `hops` edges, from query to key, and all
    /// edges between them. The seeds come first, then the others by distance.
    ///
    /// A model of `hops` layers on this graph computes the same outputs of the seeds as on the whole graph.
    ///
    /// O(edges of these nodes).
    ///
    /// # Errors
    /// As [`subgraph`](Self::subgraph).
    pub fn k_hop_subgraph(&self, seeds: &[usize], hops: usize) -> Result<Subgraph> {
        let mut numbers = self.number("seeds", seeds)?;
        let mut nodes = seeds.to_vec();
        let mut num_within = vec![nodes.len()];
        let mut start = 0;
        for _ in 0..hops {
            let last = start..nodes.len();
            start = last.end;
            for at in last {
                for &key in self.neighbors(nodes[at]) {
                    if numbers.get_or_insert(key as usize, nodes.len()).1 {
                        nodes.push(key as usize);
                    }
                }
            }
            num_within.push(nodes.len());
        }
        self.between(nodes, &numbers, num_within)
    }

    /// Returns random neighbours of some seeds, random neighbours of these, and so on: for each node that is h
    /// hops away from the seeds, `fanouts[h]` of its edges, or all if it has no more. They are drawn uniformly
    /// without replacement (GraphSAGE, Hamilton et al. 2017, 1706.02216; PyG's `NeighborLoader`). Nodes at the
    /// last distance have no edges. The seeds come first, then the others by distance.
    ///
    /// A sum over the edges of a node is estimated without bias by the sum over its edges in the sample, times
    /// its edges in the whole graph, divided by its edges in the sample. For sums over several layers this only
    /// holds where no path returns to a node, because a node has one sample of its edges for all layers. The
    /// outputs of attention are quotients of two sums, so they have a bias that falls as the fanout grows.
    ///
    /// ```
    /// use graph_attention::Graph;
    /// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
    ///
    /// let graph = Graph::local_global(1000, 50, &[])?;
    /// let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    /// let batch = graph.sample(&[7, 500], &[10, 5], &mut rng)?;
    /// assert_eq!(batch.nodes()[..2], [7, 500]);
    /// assert!(batch.nodes().len() <= 2 + 20 + 100);
    ///
    /// // The first layer computes the nodes at most one hop away, the second one the seeds.
    /// let [first, second] = [batch.layer(0)?, batch.layer(1)?];
    /// assert_eq!(first.num_queries(), batch.num_within()[1]);
    /// assert_eq!((second.num_queries(), second.num_edges()), (2, 20));
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// O(edges of these nodes).
    ///
    /// # Errors
    /// As [`subgraph`](Self::subgraph).
    pub fn sample(
        &self,
        seeds: &[usize],
        fanouts: &[usize],
        rng: &mut (impl Rng + ?Sized),
    ) -> Result<Subgraph> {
        let mut numbers = self.number("seeds", seeds)?;
        let mut nodes = seeds.to_vec();
        let mut num_within = vec![nodes.len()];
        let (mut offsets, mut indices, mut edges) = (vec![0], Vec::new(), Vec::new());
        for &fanout in fanouts {
            for at in offsets.len() - 1..nodes.len() {
                let slots = self.slots(nodes[at]);
                let mut chosen: Vec<usize> = match slots.len() <= fanout {
                    true => slots.collect(),
                    false => rand::seq::index::sample(rng, slots.len(), fanout)
                        .iter()
                        .map(|place| slots.start + place)
                        .collect(),
                };
                chosen.sort_unstable();
                for slot in chosen {
                    let key = self.key(slot);
                    let (number, is_new) = numbers.get_or_insert(key, nodes.len());
                    if is_new {
                        nodes.push(key);
                    }
                    indices.push(number);
                    edges.push(self.edge_id(slot));
                }
                offsets.push(indices.len());
            }
            num_within.push(nodes.len());
        }
        offsets.resize(nodes.len() + 1, indices.len());
        let graph = Self::from_csr(nodes.len(), offsets, indices)?;
        let whole = [self.num_keys(), self.num_edges()];
        Ok(Subgraph { graph, nodes, edges, num_within, whole })
    }

    /// Returns some of the edges; the edge p of the result is the edge `edges[p]` of this graph. Dropping random
    /// edges in each step of training is DropEdge (Rong et al. 2020, 1907.10903).
    ///
    /// ```
    /// use graph_attention::Graph;
    /// use graph_attention::ndarray::{Axis, array};
    ///
    /// let graph = Graph::from_edges(3, 3, [(0, 1), (1, 2), (2, 0)])?;
    /// let kept = [2, 1];
    /// assert_eq!(graph.select_edges(&kept)?, Graph::from_edges(3, 3, [(2, 0), (1, 2)])?);
    /// let features = array![[0.1], [0.2], [0.3]].select(Axis(0), &kept);
    /// assert_eq!(features, array![[0.3], [0.2]]);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// O(nodes + edges). An edge may appear more than once. [Blocks](Self::blocks) are not kept.
    ///
    /// # Errors
    /// [`Error::Graph`] if an edge does not exist, or if there are more than `u32::MAX`.
    pub fn select_edges(&self, edges: &[usize]) -> Result<Self> {
        let all = self.num_edges();
        if let Some(position) = edges.iter().position(|&edge| edge >= all) {
            let expected = format!("an edge below {all}");
            return Err(Error::graph(format!("edges[{position}]"), expected, edges[position]));
        }
        let ends = self.ends()?;
        let selected = edges.iter().map(|&edge| ends[edge]);
        Self::from_edges(self.num_queries(), self.num_keys(), selected)
    }

    /// Returns the graph whose nodes are the edges of this one, by their numbers: the edge (i, j) attends to
    /// every edge (j, k). Messages along the result go one edge further, for example from bond to bond in a
    /// molecule.
    ///
    /// O(edges of the result).
    ///
    /// # Errors
    /// [`Error::Graph`] if queries and keys differ in number, or if there would be more than `u32::MAX` edges.
    pub fn line_graph(&self) -> Result<Self> {
        self.check_square("line_graph")?;
        let ends = self.ends()?;
        let len = |&(_, key): &(usize, usize)| self.slots(key).len();
        let num_edges = ends.iter().map(len).fold(0usize, usize::saturating_add);
        Self::from_rows(ends.len(), ends.len(), num_edges, |edge, row| {
            row.extend(self.row(ends[edge].1).map(|(_, next)| next as u32));
        })
    }

    /// The query and key of each edge.
    pub(super) fn ends(&self) -> Result<Vec<(usize, usize)>> {
        let mut ends = try_vec("edges", &[self.num_edges()], (0, 0))?;
        for query in 0..self.num_queries() {
            for (key, edge) in self.row(query) {
                ends[edge] = (query, key);
            }
        }
        Ok(ends)
    }
}
