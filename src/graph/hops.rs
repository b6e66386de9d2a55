use super::Graph;
use crate::error::Result;
use std::collections::VecDeque;

impl Graph {
    /// All pairs of different nodes at a distance of 1 to `k` edges, and that distance for each
    /// pair (fit for [`Inputs::with_layers`](crate::Inputs::with_layers)). The nodes of a row are
    /// in order of distance. A node is at distance 0 from itself, so it is not in its own row.
    ///
    /// Breadth-first search from every node: O(n + the edges walked).
    ///
    /// # Errors
    /// [`Error::Graph`] if queries and keys are not the same number of nodes, or if there would be
    /// more than `u32::MAX` pairs.
    pub fn k_hop(&self, k: u8) -> Result<(Self, Vec<u8>)> {
        self.check_square("k_hop")?;
        let n = self.num_keys;
        let mut hops = Vec::new();
        let mut seen_from = vec![u32::MAX; n];
        let mut queue = VecDeque::new();
        let graph = Self::from_rows(n, n, 0, |start, row| {
            seen_from[start] = start as u32;
            queue.push_back((start as u32, 0));
            while let Some((node, distance)) = queue.pop_front() {
                if distance > 0 {
                    row.push(node);
                    hops.push(distance);
                }
                if distance == k {
                    continue;
                }
                for &next in self.neighbors(node as usize) {
                    if seen_from[next as usize] != start as u32 {
                        seen_from[next as usize] = start as u32;
                        queue.push_back((next, distance + 1));
                    }
                }
            }
        })?;
        Ok((graph, hops))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
