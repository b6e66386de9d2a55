use super::{Graph, check_sizes};
use crate::error::{Error, Result};
use crate::float::try_vec;

impl Graph {
    /// The sliding window of Longformer (Beltagy et al. 2020, 2004.05150) over n nodes in a line:
    /// node i attends to all j with |i − j| ≤ `radius`, itself included.
    ///
    /// # Errors
    /// [`Error::Graph`] if there are more than `u32::MAX` nodes or pairs.
    pub fn window(n: usize, radius: usize) -> Result<Self> {
        Self::local_global(n, radius, &[])
    }

    /// A window and global nodes (Longformer, 2004.05150; BigBird, 2007.14062): the pairs (i, j)
    /// with |i − j| ≤ `radius`, or i global, or j global. Each pair once, keys ascending.
    ///
    /// Repeated entries in `globals` count once. O(n + pairs).
    ///
    /// # Errors
    /// [`Error::Graph`] if a global node is not below n, or if there are more than `u32::MAX` nodes
    /// or pairs.
    pub fn local_global(n: usize, radius: usize, globals: &[usize]) -> Result<Self> {
        check_sizes(n, n)?;
        let mut is_global = try_vec("local_global", &[n], false)?;
        for (position, &node) in globals.iter().enumerate() {
            *(is_global.get_mut(node)).ok_or_else(|| {
                let what = format!("globals[{position}]");
                Error::graph(what, format!("a node below {n}"), node)
            })? = true;
        }
        let globals: Vec<u32> = (0..n as u32).filter(|&j| is_global[j as usize]).collect();
        let window = |i: usize| {
            i.saturating_sub(radius) as u32..(i.saturating_add(radius).min(n - 1) + 1) as u32
        };
        // The window of a node, and the globals before and after it.
        let split = |i: usize| {
            let window = window(i);
            let before = globals.partition_point(|&j| j < window.start);
            let after = globals.partition_point(|&j| j < window.end);
            (&globals[..before], window, &globals[after..])
        };
        let len = |i: usize| {
            let (before, window, after) = split(i);
            if is_global[i] { n } else { before.len() + window.len() + after.len() }
        };
        let num_edges = (0..n).fold(0usize, |sum, i| sum.saturating_add(len(i)));
        Self::from_rows(n, n, num_edges, |i, row| {
            if is_global[i] {
                return row.extend(0..n as u32);
            }
            let (before, window, after) = split(i);
            row.extend(before);
            row.extend(window);
            row.extend(after);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;

    #[test]
    fn patterns_hold_the_pairs_they_promise_each_once() -> Result<()> {
        for (n, radius, globals) in
            [(7, 2, vec![]), (7, 0, vec![6, 0, 6]), (5, 9, vec![2]), (0, 1, vec![])]
        {
            let mask = Array2::from_shape_fn((n, n), |(i, j)| {
                i.abs_diff(j) <= radius || globals.contains(&i) || globals.contains(&j)
            });
            let graph = Graph::local_global(n, radius, &globals)?;
            assert_eq!(graph, Graph::from_mask(mask.view())?);
        }
        assert_eq!(Graph::window(4, usize::MAX)?.num_edges(), 16);
        Ok(())
    }
}
