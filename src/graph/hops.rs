use super::Graph;
use crate::element::{Element, try_vec, try_zeros};
use crate::error::{Error, Result, check_shape};
use ndarray::{Array1, Array2};

impl Graph {
    /// Returns all pairs of different nodes at a distance of 1 to `k` edges, and the distance of each
    /// pair (for [`Inputs::with_edge_layers`](crate::Inputs::with_edge_layers)). The nodes of a row are
    /// sorted by distance. A node is at distance 0 from itself, so it is not in its own row.
    ///
    /// Uses a breadth-first search from every node: O(n + visited edges).
    ///
    /// # Errors
    /// [`Error::Graph`] if the numbers of queries and keys differ, or if there would be more than
    /// `u32::MAX` pairs.
    pub fn k_hop(&self, k: u8) -> Result<(Self, Vec<u8>)> {
        let mut search = Search::new(self, "k_hop")?;
        let n = self.num_keys;
        let mut hops = Vec::new();
        let graph = Self::from_rows(n, n, 0, |start, row| {
            search.start([start as u32]);
            for distance in 1..=k {
                let nodes = search.step();
                if nodes.is_empty() {
                    break;
                }
                row.extend(nodes);
                hops.resize(row.len(), distance);
            }
        })?;
        Ok((graph, hops))
    }

    /// Returns the number of edges from each set of anchors to every node, n × sets: entry (i, a) is the
    /// length of the shortest path to node i from the nearest node in `anchors[a]`. These are coordinates
    /// of the nodes, with one axis per set (for
    /// [`Inputs::with_positions`](crate::Inputs::with_positions)).
    ///
    /// ```text
    /// hops[i, a] = min over s in anchors[a] of the number of edges from s to i
    /// ```
    ///
    /// Paths follow the edges from query to key. For paths *to* the anchors use the
    /// [`transpose`](Self::transpose); in an undirected graph, which has every edge in both directions,
    /// they have the same length. If there is no path, the entry is `unreachable`: coordinates must be
    /// real numbers, and only you know how far is far enough, so there is no default. Pass NaN or −1 to
    /// find nodes without a path.
    ///
    /// Uses a breadth-first search from each set: O(sets · (n + edges)). In `f32` more than 2²⁴ hops are
    /// rounded.
    ///
    /// ```
    /// use graph_attention::{Graph, Inputs};
    /// use graph_attention::ndarray::{Array2, array};
    ///
    /// // 0 – 1 – 2, and an isolated node 3.
    /// let path = Graph::from_edges(4, 4, [(0, 1), (1, 0), (1, 2), (2, 1)])?;
    /// // Two axes: hops from node 0, and hops from the nearer of nodes 2 and 3.
    /// let positions = path.hops_from(&[vec![0], vec![2, 3]], 9f32)?;
    /// assert_eq!(positions, array![[0., 2.], [1., 1.], [2., 0.], [9., 0.]]);
    ///
    /// let x = Array2::zeros((4, 8));
    /// let inputs = Inputs::graph(x.view(), x.view(), x.view(), &path)?
    ///     .with_positions(positions.view(), positions.view())?;
    /// # assert_eq!(inputs.num_pairs(), 4);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Graph`] if the numbers of queries and keys differ, or if an anchor is not a node;
    /// [`Error::TooLarge`] if the result does not fit in memory.
    pub fn hops_from<F: Element, A: AsRef<[usize]>>(
        &self,
        anchors: &[A],
        unreachable: F,
    ) -> Result<Array2<F>> {
        let mut search = Search::new(self, "hops_from")?;
        let n = self.num_keys;
        for (axis, set) in anchors.iter().enumerate() {
            let set = set.as_ref();
            if let Some(position) = set.iter().position(|&node| node >= n) {
                let what = format!("anchors[{axis}][{position}]");
                return Err(Error::graph(what, format!("a node below {n}"), set[position]));
            }
        }
        let mut hops = try_zeros("hops_from", n, anchors.len())?;
        for (set, mut axis) in anchors.iter().zip(hops.columns_mut()) {
            search.start(set.as_ref().iter().map(|&node| node as u32));
            while !search.step().is_empty() {}
            for (node, hops) in (0..n as u32).zip(&mut axis) {
                *hops = search.hops(node).map_or(unreachable, |hops| F::from_f64(f64::from(hops)));
            }
        }
        Ok(hops)
    }

    /// Returns the distance in this graph for every pair of `pattern`, a graph over the same nodes: the
    /// number of edges on the shortest path from the query to the key, 0 for a pair (i, i). The distances
    /// are in the pair order of `pattern` (for [`Inputs::with_distances`](crate::Inputs::with_distances)
    /// of inputs on `pattern`).
    ///
    /// Paths follow the edges from query to key. If there is no path with at most `max_hops` edges, the
    /// distance is `unreachable`, as in [`hops_from`](Self::hops_from).
    ///
    /// Uses a breadth-first search from every query with pairs, until its keys are found:
    /// O(n + visited edges + pairs · hops).
    ///
    /// ```
    /// use graph_attention::Graph;
    /// use graph_attention::ndarray::array;
    ///
    /// // A ring of six nodes, in one direction; every node attends to itself and the nodes next to it.
    /// let ring = Graph::from_edges(6, 6, (0..6).map(|i| (i, (i + 1) % 6)))?;
    /// let pattern = Graph::window(6, 1)?;
    /// let distances = ring.hop_distances(&pattern, 4, 10.0)?;
    /// // From 0 to 0 and 1; from 1 to 0 (5 hops, more than 4), 1 and 2.
    /// assert_eq!(distances.slice_move(graph_attention::ndarray::s![..5]), array![0., 1., 10., 0., 1.]);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Graph`] if the numbers of queries and keys differ; [`Error::Shape`] if `pattern` is not
    /// over the same nodes; [`Error::TooLarge`] if the result does not fit in memory.
    pub fn hop_distances<F: Element>(
        &self,
        pattern: &Graph,
        max_hops: usize,
        unreachable: F,
    ) -> Result<Array1<F>> {
        let mut search = Search::new(self, "hop_distances")?;
        let n = self.num_keys;
        check_shape("pattern", &[n, n], &[pattern.num_queries(), pattern.num_keys()])?;
        let mut distances = try_vec("distances", &[pattern.num_edges()], unreachable)?;
        for query in 0..n {
            let keys = pattern.neighbors(query);
            search.start([query as u32]);
            for _ in 0..max_hops {
                let found = keys.iter().all(|&key| search.hops(key).is_some());
                if found || search.step().is_empty() {
                    break;
                }
            }
            for (key, pair) in pattern.row(query) {
                if let Some(hops) = search.hops(key as u32) {
                    distances[pair] = F::from_f64(f64::from(hops));
                }
            }
        }
        Ok(distances.into())
    }

    /// Returns the level of every node, n × 1: the highest layer of its edges, outgoing or incoming; 0
    /// for a node without edges. These are coordinates of the nodes of a hierarchy such as an HNSW index
    /// (for [`Inputs::with_positions`](crate::Inputs::with_positions)), derived from the layers of its
    /// links. A node that is alone in a layer has no link there, so at the top of an index its level may
    /// be lower than its layer in the index.
    ///
    /// O(n + edges).
    ///
    /// ```
    /// use graph_attention::Graph;
    /// use graph_attention::ndarray::{Array2, array};
    ///
    /// // Four nodes in a line; the first and the last are also linked, in layer 1.
    /// let line = Graph::from_edges(4, 4, [(0, 1), (1, 2), (2, 3), (0, 3)])?;
    /// let levels: Array2<f32> = line.levels(&[0, 0, 0, 1])?;
    /// assert_eq!(levels, array![[1.0], [0.0], [0.0], [1.0]]);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Graph`] if the numbers of queries and keys differ; [`Error::Shape`] if there is not one
    /// layer per edge; [`Error::TooLarge`] if the result does not fit in memory.
    pub fn levels<F: Element>(&self, layers: &[u8]) -> Result<Array2<F>> {
        self.check_square("levels")?;
        check_shape("layers", &[self.num_edges()], &[layers.len()])?;
        let mut levels = try_zeros("levels", self.num_keys, 1)?;
        for query in 0..self.num_keys {
            for (key, edge) in self.row(query) {
                let layer = F::from_f64(f64::from(layers[edge]));
                for node in [query, key] {
                    levels[[node, 0]] = layer.max(levels[[node, 0]]);
                }
            }
        }
        Ok(levels)
    }
}

/// A breadth-first search along the edges from query to key, one hop at a time. Restarting takes time
/// proportional to the nodes that the last search reached.
struct Search<'a> {
    graph: &'a Graph,
    /// The number of hops to every node, `UNSEEN` if it was not reached.
    hops: Vec<u32>,
    /// The reached nodes, in order of distance.
    reached: Vec<u32>,
    /// The start of the nodes reached by the last hop.
    frontier: usize,
    /// The number of hops so far.
    distance: u32,
}

/// More hops than possible: a shortest path visits no node twice.
const UNSEEN: u32 = u32::MAX;

impl<'a> Search<'a> {
    fn new(graph: &'a Graph, what: &'static str) -> Result<Self> {
        graph.check_square(what)?;
        let hops = try_vec(what, &[graph.num_keys], UNSEEN)?;
        Ok(Self { graph, hops, reached: Vec::new(), frontier: 0, distance: 0 })
    }

    fn start(&mut self, sources: impl IntoIterator<Item = u32>) {
        self.reached.drain(..).for_each(|node| self.hops[node as usize] = UNSEEN);
        (self.frontier, self.distance) = (0, 0);
        sources.into_iter().for_each(|node| self.reach(node));
    }

    /// Goes one hop farther and returns the nodes reached by it.
    fn step(&mut self) -> &[u32] {
        let last = self.frontier..self.reached.len();
        self.frontier = last.end;
        self.distance += 1;
        for position in last {
            let node = self.reached[position];
            self.graph.neighbors(node as usize).iter().for_each(|&next| self.reach(next));
        }
        &self.reached[self.frontier..]
    }

    fn reach(&mut self, node: u32) {
        let hops = &mut self.hops[node as usize];
        if *hops == UNSEEN {
            *hops = self.distance;
            self.reached.push(node);
        }
    }

    fn hops(&self, node: u32) -> Option<u32> {
        Some(self.hops[node as usize]).filter(|&hops| hops != UNSEEN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn k_hop_counts_the_shortest_way() -> Result<()> {
        // A path 0 - 1 - 2 - 3 with a shortcut 0 -> 2.
        let edges = [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2), (0, 2)];
        let graph = Graph::from_edges(4, 4, edges)?;
        let (two, hops) = graph.k_hop(2)?;
        assert_eq!(two.neighbors(0), [1, 2, 3]);
        assert_eq!(two.neighbors(3), [2, 1]);
        assert_eq!(hops[..3], [1, 1, 2]);
        assert_eq!(graph.k_hop(0)?.0.num_edges(), 0);
        assert_eq!(graph.k_hop(255)?.0.num_edges(), 4 * 3);
        Ok(())
    }

    #[test]
    fn anchors_are_counted_from_along_the_edges() -> Result<()> {
        // 0 → 1 → 2 → 3, back from 3 to 1, and 4 on its own.
        let graph = Graph::from_edges(5, 5, [(2, 3), (0, 1), (1, 2), (3, 1), (3, 3)])?;
        let anchors: [&[usize]; 4] = [&[0], &[3], &[3, 0, 3], &[]];
        let no = -1.0;
        let expected = array![
            [0.0, no, 0.0, no],
            [1.0, 1.0, 1.0, no],
            [2.0, 2.0, 2.0, no],
            [3.0, 0.0, 0.0, no],
            [no, no, no, no],
        ];
        assert_eq!(graph.hops_from(&anchors, no)?, expected);
        assert_eq!(
            graph.transpose().hops_from(&[[3]], 7.0f32)?,
            array![[3.], [2.], [1.], [0.], [7.]]
        );
        assert_eq!(graph.hops_from::<f64, [usize; 1]>(&[], no)?.dim(), (5, 0));
        Ok(())
    }

    #[test]
    fn distances_follow_the_pairs_of_the_pattern() -> Result<()> {
        let graph = Graph::from_edges(5, 5, [(2, 3), (0, 1), (1, 2), (3, 1), (3, 3)])?;
        let pattern = Graph::from_edges(5, 5, [(3, 0), (0, 3), (2, 2), (3, 2), (0, 3), (2, 1)])?;
        let far = f64::INFINITY;
        let distances = |max_hops| graph.hop_distances(&pattern, max_hops, far);
        assert_eq!(distances(usize::MAX)?, array![far, 3.0, 0.0, 2.0, 3.0, 2.0]);
        assert_eq!(distances(2)?, array![far, far, 0.0, 2.0, far, 2.0]);
        assert_eq!(distances(0)?, array![far, far, 0.0, far, far, far]);
        Ok(())
    }

    #[test]
    fn levels_are_the_highest_layers_of_the_edges_either_way() -> Result<()> {
        let graph = Graph::from_edges(5, 5, [(3, 1), (0, 1), (0, 1), (2, 3)])?;
        let levels: Array2<f32> = graph.levels(&[7, 4, 2, 0])?;
        assert_eq!(levels, array![[4.0], [7.0], [0.0], [7.0], [0.0]]);
        let message =
            |graph: Graph, layers: &[u8]| graph.levels::<f64>(layers).unwrap_err().to_string();
        assert!(message(graph, &[1]).contains("[4], got [1]"));
        assert!(message(Graph::from_edges(2, 3, [])?, &[]).contains("2 queries"));
        Ok(())
    }
}
