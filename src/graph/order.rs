//! Orders of the nodes in which near nodes have near numbers.

use super::Graph;
use crate::element::try_vec;
use crate::error::Result;

/// A method of [`Graph::reordering`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reordering {
    /// Breadth-first from a node with few neighbours, neighbours with fewer neighbours first, and then reversed
    /// (Cuthill & McKee 1969; George 1971). For graphs with long paths: meshes, roads, grids, molecules.
    ReverseCuthillMcKee,
    /// By communities, which label propagation finds (Raghavan et al. 2007, 0709.2938): in each of at most 10
    /// rounds every node takes the label that most of its neighbours have. Communities, and the nodes in each,
    /// are in breadth-first order. For social networks, citations and other graphs with short paths and dense
    /// parts.
    Communities,
}

/// Label propagation stops after so many rounds; most labels are found in the first ones.
const ROUNDS: usize = 10;

impl Graph {
    /// Returns an order of the nodes in which near nodes have near numbers, for [`permute`](Self::permute): the
    /// rows that attention gathers are then often in the cache. Edges count in both directions. The same graph
    /// always gives the same order.
    ///
    /// ```
    /// # use graph_attention::{Graph, Reordering};
    /// # let graph = Graph::local_global(10, 2, &[])?;
    /// let ordered = graph.permute(&graph.reordering(Reordering::Communities)?)?;
    /// # assert_eq!(ordered.nodes().len(), 10);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// O(nodes + edges · log edges of a node).
    ///
    /// # Errors
    /// [`Error::Graph`](crate::Error::Graph) if queries and keys differ in number;
    /// [`Error::TooLarge`](crate::Error::TooLarge) if there is not enough memory.
    pub fn reordering(&self, method: Reordering) -> Result<Vec<usize>> {
        self.check_square("reordering")?;
        let breadth_first = self.breadth_first()?;
        let order = match method {
            Reordering::ReverseCuthillMcKee => {
                breadth_first.iter().rev().map(|&node| node as usize).collect()
            }
            Reordering::Communities => {
                let labels = self.communities()?;
                // The place of the first node of each community, then the nodes by it, in a stable order.
                let mut places = try_vec("reordering", &[self.num_keys()], u32::MAX)?;
                for (place, &node) in breadth_first.iter().enumerate() {
                    let first = &mut places[labels[node as usize] as usize];
                    *first = (*first).min(place as u32);
                }
                let mut order: Vec<usize> =
                    breadth_first.iter().map(|&node| node as usize).collect();
                order.sort_by_key(|&node| places[labels[node] as usize]);
                order
            }
        };
        Ok(order)
    }

    /// The neighbours of a node in both directions; those joined in both appear twice.
    fn both_ways(&self, node: u32) -> impl Iterator<Item = u32> {
        let [out, back] = [self, self.transpose()].map(|graph| graph.neighbors(node as usize));
        out.iter().chain(back).copied()
    }

    /// The nodes in the order of Cuthill and McKee, component by component.
    fn breadth_first(&self) -> Result<Vec<u32>> {
        let n = self.num_keys();
        let degree = |node: u32| self.both_ways(node).count();
        let mut is_seen = try_vec("reordering", &[n], false)?;
        let mut starts: Vec<u32> = (0..n as u32).collect();
        starts.sort_by_key(|&node| degree(node));
        let mut order: Vec<u32> = Vec::with_capacity(n);
        let mut next = Vec::new();
        for start in starts {
            if is_seen[start as usize] {
                continue;
            }
            let mut at = order.len();
            is_seen[start as usize] = true;
            order.push(start);
            while let Some(&node) = order.get(at) {
                for other in self.both_ways(node) {
                    if !is_seen[other as usize] {
                        is_seen[other as usize] = true;
                        next.push(other);
                    }
                }
                next.sort_by_key(|&node| degree(node));
                order.append(&mut next);
                at += 1;
            }
        }
        Ok(order)
    }

    /// A label for each node, the same for the nodes of a community.
    fn communities(&self) -> Result<Vec<u32>> {
        let n = self.num_keys();
        let mut labels = try_vec("reordering", &[n], 0u32)?;
        labels.iter_mut().zip(0..).for_each(|(label, node)| *label = node);
        let mut of_neighbors = Vec::new();
        for _ in 0..ROUNDS {
            let mut num_changed = 0;
            for node in 0..n as u32 {
                of_neighbors.clear();
                of_neighbors.extend(self.both_ways(node).map(|other| labels[other as usize]));
                of_neighbors.sort_unstable();
                let own = labels[node as usize];
                let count_of = |label| of_neighbors.iter().filter(|&&other| other == label).count();
                let runs = of_neighbors.chunk_by(|a, b| a == b);
                // Of equally frequent labels the first, but the own one stays.
                let most = runs
                    .map(|run| (run.len(), run[0]))
                    .reduce(|best, next| if next.0 > best.0 { next } else { best });
                if let Some((count, label)) = most
                    && count > count_of(own)
                {
                    labels[node as usize] = label;
                    num_changed += 1;
                }
            }
            if num_changed == 0 {
                break;
            }
        }
        Ok(labels)
    }
}
