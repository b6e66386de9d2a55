use super::Graph;
use crate::error::Result;
use ::petgraph::visit::{EdgeIndexable, EdgeRef, GraphProp, IntoEdgeReferences, NodeIndexable};

impl Graph {
    /// Creates a graph from a graph of the crate `petgraph`. Also returns the original edge of each pair,
    /// to gather per-edge arrays with. Requires the feature `petgraph`.
    ///
    /// **Direction.** Information flows along the edges, as in PyG: the edge `a → b` lets node b attend
    /// to node a, so its target is the query. If nodes should attend to the targets of their edges, pass
    /// [`Reversed(&graph)`](::petgraph::visit::Reversed). An edge of an undirected graph becomes two
    /// consecutive pairs, one for each direction, and a self-loop becomes one pair.
    ///
    /// **Numbers.** Rows of queries and keys are the node indices, and pairs are in the order of
    /// [`edge_references`](IntoEdgeReferences::edge_references), so in a directed `petgraph::Graph` pair
    /// p is edge p. A node removed from a `StableGraph` keeps its number, without pairs, if there are
    /// nodes with larger numbers: as a query it gets zeros. Nodes of a `GraphMap` are numbered in the
    /// order of `nodes`.
    ///
    /// Accepts `&Graph`, `&StableGraph` and `&GraphMap`, and their views in `petgraph::visit`. O(nodes +
    /// edges).
    ///
    /// ```
    /// use graph_attention::{Attention, EdgeRope, Graph, GraphRopeConfig, Inputs, graph_rope::Layout};
    /// use graph_attention::ndarray::{Array1, array};
    /// use petgraph::graph::UnGraph;
    ///
    /// let roads = UnGraph::<(), f64>::from_edges([(0, 1, 3.5), (1, 2, 0.5)]);
    /// let (graph, edges) = Graph::from_petgraph(&roads)?;
    /// assert_eq!(graph.neighbors(1), [0, 2]);
    /// let lengths: Array1<f64> = edges.iter().map(|&edge| roads[edge]).collect();
    /// assert_eq!(lengths, array![3.5, 3.5, 0.5, 0.5]); // each road in both directions
    ///
    /// let towns = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
    /// let inputs = Inputs::graph(towns.view(), towns.view(), towns.view(), &graph)?;
    /// let attention: EdgeRope<f64> = GraphRopeConfig::new(2, Layout::Half).init_edges()?;
    /// let out = attention.forward(&inputs.with_distances(lengths.view())?)?;
    /// assert_eq!(out.row(0), towns.row(1)); // its only neighbour
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Graph`](crate::Error::Graph) if there are more than `u32::MAX` nodes or pairs.
    // Edges with numbers, `EdgeIndexable`, also keep out `Csr`, which lists an undirected edge twice.
    pub fn from_petgraph<G>(graph: G) -> Result<(Self, Vec<G::EdgeId>)>
    where
        G: IntoEdgeReferences + EdgeIndexable + NodeIndexable + GraphProp,
    {
        let num_nodes = graph.node_bound();
        let mut edges = Vec::with_capacity(graph.edge_bound());
        let pairs = graph.edge_references().flat_map(|edge| {
            let [source, target] =
                [edge.source(), edge.target()].map(|node| NodeIndexable::to_index(&graph, node));
            let is_mirrored = !graph.is_directed() && source != target;
            edges.extend(std::iter::repeat_n(edge.id(), 1 + usize::from(is_mirrored)));
            std::iter::once((target, source)).chain(is_mirrored.then_some((source, target)))
        });
        let graph = Self::from_edges(num_nodes, num_nodes, pairs)?;
        Ok((graph, edges))
    }
}
