use super::{Graph, check_num_edges, check_sizes, too_large};
use crate::element::try_vec;
use crate::error::{Error, Result, check_shape};
use rand::seq::SliceRandom;
use rand::{Rng, RngExt};

impl Graph {
    /// Creates the sliding window of Longformer (Beltagy et al. 2020, 2004.05150) over n nodes in a line:
    /// node i attends to all j with |i − j| ≤ `radius`, including itself.
    ///
    /// # Errors
    /// [`Error::Graph`] if there are more than `u32::MAX` nodes or pairs.
    pub fn window(n: usize, radius: usize) -> Result<Self> {
        Self::local_global(n, radius, &[])
    }

    /// Creates a window with global nodes (Longformer, 2004.05150; BigBird, 2007.14062): the pairs (i, j)
    /// with
    /// |i − j| ≤ `radius`, or i global, or j global. Each pair appears once, keys are ascending.
    ///
    /// Duplicates in `globals` count once. O(n + pairs).
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

    /// Creates a random regular graph: every node has `degree` random neighbours, so a few steps lead
    /// from every node to every other. These are the long-range edges of Exphormer (Shirzad et al. 2023,
    /// 2303.06147). [`spectral_gap`](Self::spectral_gap) measures how good an expander it is: for
    /// `degree` ≥ 3 the gap is nearly always close to the optimum 1 − 2√(degree − 1) / degree (Friedman
    /// 2008, cs/0405020). Degrees of 0, 1 and 2 are allowed, but give disconnected graphs or rings.
    ///
    /// The graph is undirected and simple: it has both (i, j) and (j, i), each once, and no self-loops.
    /// Pairs are ordered row by row, keys ascending.
    ///
    /// **Distribution.** Half-edges are paired at random. Every loop and double edge is then removed by a
    /// switch with another edge, which replaces u–v and x–y by u–x and v–y. Finally every half-edge tries
    /// a switch with a random one. (Pairing and switches are as in McKay & Wormald 1990, Journal of
    /// Algorithms 11, but without rejection.) The final switches preserve the uniform distribution over
    /// all simple regular graphs and move every other distribution closer to it, so the graph is close to
    /// uniform, but not exactly uniform. For degrees of n / 2 or more the complement is drawn instead.
    /// The same numbers from `rng` give the same graph.
    ///
    /// O(n · degree²), plus O(n²) for degrees above (n − 1) / 2.
    ///
    /// ```
    /// use graph_attention::Graph;
    /// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
    ///
    /// let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    /// let expander = Graph::expander(100, 4, &mut rng)?;
    /// assert!((0..100).all(|node| expander.neighbors(node).len() == 4));
    /// assert!(expander.spectral_gap()? > 0.1); // the optimum is about 0.134
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if no such graph exists, because there are fewer than `degree` other
    /// nodes or n · `degree` is odd; [`Error::Graph`] if there would be more than `u32::MAX` nodes or
    /// pairs.
    pub fn expander(n: usize, degree: usize, rng: &mut (impl Rng + ?Sized)) -> Result<Self> {
        check_sizes(n, n)?;
        let others = n.saturating_sub(1);
        if degree > others {
            let expected = format!("at most {others}, the number of other nodes");
            return Err(Error::config("degree", expected, degree));
        }
        let num_edges = n.checked_mul(degree).ok_or_else(|| too_large(n))?;
        check_num_edges(num_edges)?;
        if !num_edges.is_multiple_of(2) {
            let expected = format!("an even number for {n} nodes");
            return Err(Error::config("degree", expected, degree));
        }
        if degree <= others / 2 {
            let drawn = HalfEdges::random(n, degree, rng)?;
            return Self::from_rows(n, n, num_edges, |node, row| {
                let start = row.len();
                row.extend(drawn.neighbors(node as u32));
                row[start..].sort_unstable();
            });
        }
        let hidden = HalfEdges::random(n, others - degree, rng)?;
        let mut is_hidden = try_vec("expander", &[n], false)?;
        Self::from_rows(n, n, num_edges, |node, row| {
            let without = || hidden.neighbors(node as u32).chain([node as u32]);
            without().for_each(|key| is_hidden[key as usize] = true);
            row.extend((0..n as u32).filter(|&key| !is_hidden[key as usize]));
            without().for_each(|key| is_hidden[key as usize] = false);
        })
    }

    /// Combines several patterns: returns every pair of any of the graphs once, and for each pair the
    /// number of the first graph that has it (for
    /// [`Inputs::with_edge_layers`](crate::Inputs::with_edge_layers)). **Pair order:** row by row, keys
    /// ascending, whatever the order in the graphs.
    ///
    /// O(edges · log edges of a row).
    ///
    /// ```
    /// use graph_attention::{Graph, Inputs};
    /// use graph_attention::ndarray::Array2;
    /// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
    ///
    /// // The sparse pattern of Exphormer and BigBird: nearby, global, and random distant nodes.
    /// let near = Graph::window(50, 1)?;
    /// let global = Graph::local_global(50, 0, &[0])?;
    /// let far = Graph::expander(50, 4, &mut Xoshiro256PlusPlus::seed_from_u64(1))?;
    /// let (graph, layers) = Graph::union(&[&near, &global, &far])?;
    /// assert_eq!(graph.neighbors(0).len(), 50);
    /// assert_eq!(layers[..4], [0, 0, 1, 1]); // for the pairs (0, 0), (0, 1), (0, 2), (0, 3)
    ///
    /// let x = Array2::<f32>::zeros((50, 8));
    /// let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)?.with_edge_layers(&layers)?;
    /// assert!(inputs.num_pairs() < 50 + 50 * (3 + 1 + 4));
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are no graphs or more than 256; [`Error::Shape`] if they do
    /// not all have as many queries and keys as the first; [`Error::Graph`] if there would be more than
    /// `u32::MAX` pairs.
    pub fn union(graphs: &[&Graph]) -> Result<(Self, Vec<u8>)> {
        let first = match graphs {
            [first, ..] if graphs.len() <= 256 => first,
            _ => return Err(Error::config("number of graphs", "1 to 256", graphs.len())),
        };
        let (num_queries, num_keys) = (first.num_queries(), first.num_keys());
        for (number, graph) in graphs.iter().enumerate() {
            let size = [graph.num_queries(), graph.num_keys()];
            check_shape(format!("graphs[{number}]"), &[num_queries, num_keys], &size)?;
        }
        let mut layers = Vec::new();
        let mut pairs = Vec::new();
        let graph = Self::from_rows(num_queries, num_keys, 0, |query, row| {
            for (layer, graph) in (0..=u8::MAX).zip(graphs) {
                pairs.extend(graph.neighbors(query).iter().map(|&key| (key, layer)));
            }
            // Among pairs with the same key, the pair of the first graph comes first and is kept.
            pairs.sort_unstable();
            pairs.dedup_by_key(|pair| pair.0);
            row.extend(pairs.iter().map(|pair| pair.0));
            layers.extend(pairs.drain(..).map(|pair| pair.1));
        })?;
        Ok((graph, layers))
    }
}

/// An undirected regular graph as a pairing of half-edges. Node i has the half-edges from i · degree to
/// (i + 1) · degree − 1.
struct HalfEdges {
    degree: u32,
    /// The other half of each half-edge; an involution.
    other: Vec<u32>,
}

impl HalfEdges {
    /// For an even n · degree within `u32`, and 2 · degree < n.
    fn random(n: usize, degree: usize, rng: &mut (impl Rng + ?Sized)) -> Result<Self> {
        let len = n * degree;
        let mut order = try_vec("expander", &[n, degree], 0)?;
        (0..len as u32).zip(&mut order).for_each(|(half, slot)| *slot = half);
        order.shuffle(rng);
        let mut other = try_vec("expander", &[n, degree], 0)?;
        for pair in order.chunks_exact(2) {
            other[pair[0] as usize] = pair[1];
            other[pair[1] as usize] = pair[0];
        }
        let mut halves = Self { degree: degree as u32, other };

        // There is always a switch that removes a loop or double edge at u–v. There are n · degree ways
        // to choose an edge x–y with its start x. The neighbours of u and u itself, which are at most
        // `degree` nodes because one of them counts twice, exclude degree² of them as x, and those of v
        // as many as y. Every switch reduces the number of loops and surplus copies, so this ends for any
        // numbers from `rng`.
        for half in 0..len as u32 {
            while halves.is_bad(half) {
                let mut with = rng.random_range(0..len as u32);
                while !halves.switch(half, with) {
                    with = (with + 1) % len as u32;
                }
            }
        }
        // From both halves of each edge, otherwise switching back would be less likely than switching.
        for half in 0..len as u32 {
            halves.switch(half, rng.random_range(0..len as u32));
        }
        Ok(halves)
    }

    fn node(&self, half: u32) -> u32 {
        half / self.degree
    }

    fn neighbors(&self, node: u32) -> impl Iterator<Item = u32> + '_ {
        let start = node as usize * self.degree as usize;
        let halves = &self.other[start..start + self.degree as usize];
        halves.iter().map(|&other| self.node(other))
    }

    /// Whether the edge is a loop or has a copy.
    fn is_bad(&self, half: u32) -> bool {
        let (u, v) = (self.node(half), self.node(self.other[half as usize]));
        u == v || self.neighbors(u).filter(|&neighbor| neighbor == v).count() > 1
    }

    /// Replaces u–v and x–y, given as the halves at u and x, by u–x and v–y, if neither is a loop or
    /// exists already. Returns whether it did.
    fn switch(&mut self, u: u32, x: u32) -> bool {
        let (v, y) = (self.other[u as usize], self.other[x as usize]);
        let fits = |a: u32, b: u32| {
            let (a, b) = (self.node(a), self.node(b));
            a != b && self.neighbors(a).all(|neighbor| neighbor != b)
        };
        if !fits(u, x) || !fits(v, y) {
            return false;
        }
        for (a, b) in [(u, x), (v, y)] {
            self.other[a as usize] = b;
            self.other[b as usize] = a;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;
    use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
    use std::collections::BTreeMap;

    fn rng(seed: u64) -> Xoshiro256PlusPlus {
        Xoshiro256PlusPlus::seed_from_u64(seed)
    }

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

    #[test]
    fn expanders_are_simple_and_regular() -> Result<()> {
        for (n, degree) in [
            (0, 0),
            (1, 0),
            (2, 1),
            (7, 0),
            (7, 2),
            (7, 4),
            (7, 6),
            (8, 3),
            (8, 4),
            (8, 5),
            (64, 31),
            (101, 8),
        ] {
            for seed in 0..50 {
                let graph = Graph::expander(n, degree, &mut rng(seed))?;
                assert_eq!((graph.num_queries(), graph.num_keys()), (n, n));
                let mut mask = Array2::from_elem((n, n), false);
                for node in 0..n {
                    assert_eq!(graph.neighbors(node).len(), degree);
                    graph.neighbors(node).iter().for_each(|&key| mask[[node, key as usize]] = true);
                    assert!(!mask[[node, node]]);
                }
                assert_eq!(mask, mask.t());
                // No edge twice, and in order.
                assert_eq!(graph, Graph::from_mask(mask.view())?);
            }
        }
        Ok(())
    }

    /// Without the last switches the excess is over 80 standard deviations in each case.
    #[test]
    fn all_regular_graphs_are_equally_likely() -> Result<()> {
        // The number of labelled graphs (OEIS A001205, A002829); of degree 3 on 6 nodes and of 4 on
        // 7 drawn as complements.
        for (n, degree, kinds) in [(5, 2, 12), (6, 2, 70), (6, 3, 70), (7, 2, 465), (7, 4, 465)] {
            let mut rng = rng(2);
            let mut drawn: BTreeMap<Vec<u32>, f64> = BTreeMap::new();
            let mean = 200.0;
            for _ in 0..200 * kinds {
                let graph = Graph::expander(n, degree, &mut rng)?;
                *drawn.entry(graph.indices().to_vec()).or_default() += 1.0;
            }
            assert_eq!(drawn.len(), kinds);
            // χ² of `kinds − 1` degrees of freedom, as many standard deviations above its mean.
            let chi_squared: f64 = drawn.values().map(|count| (count - mean).powi(2) / mean).sum();
            let freedom = (kinds - 1) as f64;
            let excess = (chi_squared - freedom) / (2.0 * freedom).sqrt();
            assert!(excess < 4.0, "n {n}, degree {degree}: {excess}");
        }
        Ok(())
    }

    #[test]
    fn an_expander_ends_whatever_the_generator_says() -> Result<()> {
        /// Always the same number.
        struct Constant(u64);
        impl rand::TryRng for Constant {
            type Error = std::convert::Infallible;
            fn try_next_u32(&mut self) -> std::result::Result<u32, Self::Error> {
                Ok(self.0 as u32)
            }
            fn try_next_u64(&mut self) -> std::result::Result<u64, Self::Error> {
                Ok(self.0)
            }
            fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> std::result::Result<(), Self::Error> {
                bytes.fill(self.0 as u8);
                Ok(())
            }
        }
        for (n, degree) in [(5, 2), (23, 10), (23, 11 + 1), (101, 6)] {
            for number in [0, 1, 0x5555_5555_5555_5555, u64::MAX / 3, u64::MAX] {
                let graph = Graph::expander(n, degree, &mut Constant(number))?;
                assert!((0..n).all(|node| graph.neighbors(node).len() == degree));
            }
        }
        Ok(())
    }

    #[test]
    fn a_union_is_the_or_of_masks_and_knows_the_first() -> Result<()> {
        let a = Graph::from_edges(3, 5, [(2, 4), (0, 3), (2, 1), (2, 4), (0, 0)])?;
        let b = Graph::from_edges(3, 5, [(2, 1), (1, 1), (2, 0), (0, 4)])?;
        let (both, layers) = Graph::union(&[&a, &b])?;
        let expected = [(0, 0), (0, 3), (0, 4), (1, 1), (2, 0), (2, 1), (2, 4)];
        assert_eq!(both, Graph::from_edges(3, 5, expected)?);
        assert_eq!(layers, [0, 0, 1, 1, 1, 0, 0]);
        let (swapped, layers) = Graph::union(&[&b, &a])?;
        assert_eq!(swapped, both);
        assert_eq!(layers, [1, 1, 0, 0, 0, 0, 1]);
        // As many as there are layers.
        let empty = Graph::from_edges(3, 5, [])?;
        let mut many = vec![&empty; 255];
        many.push(&a);
        assert_eq!(Graph::union(&many)?.1, [255; 4]);
        many.push(&a);
        assert!(Graph::union(&many).is_err());
        Ok(())
    }
}
