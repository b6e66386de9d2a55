use super::Graph;
use crate::element::try_vec;
use crate::error::{Error, Result};

#[cfg(feature = "spectral")]
use crate::element::{Element, try_zeros};
#[cfg(feature = "spectral")]
use crate::error::check_shape;
#[cfg(feature = "spectral")]
use nalgebra::{DMatrix, SymmetricEigen};
#[cfg(feature = "spectral")]
use ndarray::{Array2, ArrayView1};

impl Graph {
    /// Computes the spectral gap of an undirected graph, which measures how good an expander it is: every
    /// step of the random walk removes at least this fraction of any difference between its nodes.
    ///
    /// ```text
    /// 1 − max(|μ₂|, |μ_n|),   1 = μ₁ ≥ μ₂ ≥ … ≥ μ_n ≥ −1 the eigenvalues of D^(−1/2) A D^(−1/2)
    /// ```
    ///
    /// A counts the edges between nodes (a self-loop once) and D the edges of a node. For a regular graph
    /// of degree d the μ are the eigenvalues λ of A divided by d, and the gap is the 1 − ε of the
    /// ε-expanders in Exphormer (Shirzad et al. 2023, 2303.06147): max(|λ₂|, |λ_n|) ≤ ε d. The gap of a
    /// large regular graph is not much more than 1 − 2√(d − 1) / d (Alon & Boppana; Nilli 1991,
    /// 10.1016/0012-365X(91)90112-F). It is 0 for a disconnected graph and for a bipartite graph, on which
    /// the walk never converges, and 1 for the complete graph with self-loops.
    ///
    /// Uses the Lanczos method, accurate to about nine decimal places. Takes O(n + edges) per step and
    /// O(n) memory; some hundreds of steps for an expander with 100,000 nodes, about n steps for graphs
    /// without a gap, such as rings. It starts from a fixed vector without structure, so the result is
    /// the same on every run; it would miss an eigenvector that happens to be orthogonal to this vector.
    ///
    /// ```
    /// use graph_attention::Graph;
    ///
    /// // The complete graph of 5 nodes: every other eigenvalue is −1 / 4.
    /// let complete = Graph::from_edges(5, 5, (0..25).map(|x| (x / 5, x % 5)).filter(|(i, j)| i != j))?;
    /// assert!((complete.spectral_gap()? - 0.75).abs() < 1e-9);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Graph`] if the numbers of queries and keys differ, if there are no nodes or nodes without
    /// edges, or if an edge exists in one direction only.
    pub fn spectral_gap(&self) -> Result<f64> {
        self.check_square("spectral_gap")?;
        self.check_symmetric("spectral_gap")?;
        let n = self.num_keys;
        let degree = |node: usize| self.slots(node).len() as f64;
        if let Some(node) = (0..n.max(1)).find(|&node| self.slots(node).is_empty()) {
            let actual = if n == 0 { "no nodes".into() } else { format!("none at node {node}") };
            return Err(Error::graph("spectral_gap", "edges at every node", actual));
        }
        if n == 1 {
            return Ok(1.0);
        }

        // The eigenvector of μ₁ = 1, to which all others are kept orthogonal.
        let total = self.num_edges() as f64;
        let root_degrees: Vec<f64> = (0..n).map(|node| degree(node).sqrt()).collect();
        let without_first = |x: &mut [f64]| {
            let share = dot(x, &root_degrees) / total;
            x.iter_mut().zip(&root_degrees).for_each(|(x, root)| *x -= share * root);
        };
        let step = |x: &[f64], y: &mut [f64]| {
            for (node, y) in y.iter_mut().enumerate() {
                let terms = self.neighbors(node).iter().map(|&key| key as usize);
                *y = terms.map(|key| x[key] / root_degrees[key]).sum::<f64>() / root_degrees[node];
            }
        };

        // Only three vectors are kept, so orthogonality is gradually lost. This only repeats eigenvalues
        // that are already found (Paige 1980, 10.1016/0024-3795(80)90167-6), and does not move the
        // outermost ones.
        let golden = (5f64.sqrt() - 1.0) / 2.0;
        let mut x: Vec<f64> =
            (0..n).map(|i| (i as f64 * i as f64 * golden).fract() - 0.5).collect();
        without_first(&mut x);
        let norm = dot(&x, &x).sqrt();
        x.iter_mut().for_each(|x| *x /= norm);
        let (mut before, mut next) = (try_vec("spectral_gap", &[n], 0.0)?, x.clone());
        let (mut diagonals, mut off_diagonals) = (Vec::new(), vec![0.0]);
        let (mut checked, mut next_check) = ([f64::NEG_INFINITY; 2], 1);
        loop {
            step(&x, &mut next);
            let diagonal = dot(&x, &next);
            let off_diagonal = off_diagonals[diagonals.len()];
            for ((next, x), before) in next.iter_mut().zip(&x).zip(&before) {
                *next -= diagonal * x + off_diagonal * before;
            }
            without_first(&mut next);
            let norm = dot(&next, &next).sqrt();
            diagonals.push(diagonal);
            off_diagonals.push(norm);
            // The found part of the spectrum only grows, within [−1, 1], so this ends: when another
            // quarter of the steps adds nothing, or when there is nothing left to find. (The rest is at
            // most twice the last increase, even if the spectrum is dense at its end and the error only
            // falls with the square of the steps.)
            if diagonals.len() == next_check || norm < 1e-12 {
                let ends = [1.0, -1.0].map(|sign| largest(&diagonals, &off_diagonals, sign));
                let grown = ends.iter().zip(checked).map(|(now, before)| now - before);
                if norm < 1e-12 || grown.fold(0.0, f64::max) < 1e-10 {
                    return Ok((1.0 - ends[0].max(ends[1])).max(0.0));
                }
                (checked, next_check) = (ends, next_check + next_check.div_ceil(4));
            }
            next.iter_mut().for_each(|next| *next /= norm);
            (before, x, next) = (x, next, before);
        }
    }

    /// Computes coordinates r_i of the nodes of a connected undirected graph, n × `num_axes`, in which
    /// squared distances are effective resistances (Klein & Randić 1993, 10.1007/BF01164627). Use them
    /// with [`Inputs::with_positions`](crate::Inputs::with_positions); Reid et al. (2025, 2509.22259)
    /// rotate queries and keys by them.
    ///
    /// ```text
    /// L = Σ over undirected edges i–j of w_ij (e_i − e_j)(e_i − e_j)ᵀ = Σ_k λ_k u_k u_kᵀ,
    /// 0 = λ₀ < λ₁ ≤ λ₂ ≤ …,   |u_k| = 1
    /// r_i = (u₁[i] / √λ₁, u₂[i] / √λ₂, …)
    /// |r_i − r_j|² = the resistance from i to j, if num_axes = n − 1
    /// ```
    ///
    /// L is the Laplacian. An undirected edge, stored in both directions, counts once with its weight
    /// (its conductance; 1 without `weights`), parallel edges add up and self-loops have no effect. With
    /// fewer axes, the slowest modes are kept, and distances are less than the whole resistance.
    ///
    /// **Signs and rotations.** u_k and −u_k are both eigenvectors; the one returned has a positive entry
    /// of largest magnitude, the first if there are several. If eigenvalues coincide, as in symmetric
    /// graphs, any rotation of their eigenvectors is equally valid. The axes then depend on the solver:
    /// they are the same on every run, but not for a different node order, and distances are meaningful
    /// only with all or none of the axes of such an eigenvalue.
    ///
    /// Uses a dense eigensolver in `f64`, also for `f32`: O(n³) time, O(n²) memory. Eigenvalues are
    /// accurate to about 1e-15 of the largest, so weights of very different sizes lose digits.
    ///
    /// ```
    /// use graph_attention::Graph;
    /// use graph_attention::ndarray::Array2;
    ///
    /// // The path 0 – 1 – 2: resistances in series add up.
    /// let path = Graph::from_edges(3, 3, [(0, 1), (1, 0), (1, 2), (2, 1)])?;
    /// let positions: Array2<f64> = path.spectral_coordinates(2, None)?;
    /// let difference = &positions.row(0) - &positions.row(2);
    /// assert!((difference.dot(&difference) - 2.0).abs() < 1e-12);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Graph`] if the numbers of queries and keys differ; if an edge exists in one direction
    /// only, or has different weights in the two directions; if a weight is not positive and finite, or
    /// the sum of a node's weights is not finite; if the graph is disconnected, so that resistances are
    /// infinite; or if weights differ so much that rounding hides the smallest eigenvalue.
    /// [`Error::InvalidArgument`] if `num_axes` is above n − 1; [`Error::Shape`] if there is not one
    /// weight per edge; [`Error::TooLarge`] if the Laplacian does not fit in memory.
    #[cfg(feature = "spectral")]
    pub fn spectral_coordinates<F: Element>(
        &self,
        num_axes: usize,
        weights: Option<ArrayView1<'_, F>>,
    ) -> Result<Array2<F>> {
        let what = "spectral_coordinates";
        self.check_square(what)?;
        let n = self.num_keys;
        if num_axes > n.saturating_sub(1) {
            let expected = format!("at most {} for {n} nodes", n.saturating_sub(1));
            return Err(Error::config("num_axes", expected, num_axes));
        }
        let laplacian = self.laplacian(weights)?;
        if n == 0 {
            return try_zeros(what, 0, 0);
        }
        let hops = self.hops_from(&[[0]], f64::INFINITY)?;
        if let Some(node) = hops.iter().position(|hops| hops.is_infinite()) {
            let actual = format!("no way from node 0 to node {node}");
            return Err(Error::graph(what, "a connected graph", actual));
        }

        // A few iterations per eigenvalue suffice; the limit guarantees that it ends.
        let eigen = SymmetricEigen::try_new(laplacian, f64::EPSILON, 1000 * n);
        let failed =
            |actual: &str| Error::graph(what, "eigenvalues that f64 can tell apart", actual);
        let eigen = eigen.ok_or_else(|| failed("none"))?;
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| eigen.eigenvalues[a].total_cmp(&eigen.eigenvalues[b]));
        let largest = eigen.eigenvalues[order[n - 1]];
        let mut coordinates = try_zeros(what, n, num_axes)?;
        for (&k, mut axis) in order[1..].iter().zip(coordinates.columns_mut()) {
            let (value, vector) = (eigen.eigenvalues[k], eigen.eigenvectors.column(k));
            if value <= n as f64 * f64::EPSILON * largest {
                return Err(failed(&format!("{value:e} next to {largest:e}")));
            }
            // Entries that are equal by symmetry are not exactly equal after rounding.
            let size = vector.amax() * (1.0 - 1e-6);
            let sign = vector.iter().find(|x| x.abs() >= size).map_or(1.0, |x| x.signum());
            let scale = sign / value.sqrt();
            axis.iter_mut().zip(vector.iter()).for_each(|(r, u)| *r = F::from_f64(scale * u));
        }
        Ok(coordinates)
    }

    /// Returns the dense Laplacian.
    #[cfg(feature = "spectral")]
    fn laplacian<F: Element>(&self, weights: Option<ArrayView1<'_, F>>) -> Result<DMatrix<f64>> {
        let n = self.num_keys;
        if let Some(weights) = weights {
            check_shape("weights", &[self.num_edges()], weights.shape())?;
            let bad = |weight: &F| !(weight.is_finite() && *weight > F::zero());
            if let Some(edge) = weights.iter().position(bad) {
                let what = format!("weights[{edge}]");
                return Err(Error::graph(what, "a positive finite number", weights[edge]));
            }
        }
        let mut laplacian = DMatrix::from_vec(n, n, try_vec("laplacian", &[n, n], 0.0)?);
        for node in 0..n {
            for (key, edge) in self.row(node).filter(|&(key, _)| key != node) {
                laplacian[(node, key)] += weights.map_or(1.0, |weights| weights[edge].as_f64());
            }
        }
        for node in 0..n {
            for &key in self.neighbors(node) {
                let key = key as usize;
                let (there, back) = (laplacian[(node, key)], laplacian[(key, node)]);
                if there != back {
                    let what = format!("weight of the edge from {node} to {key}");
                    return Err(Error::graph(
                        what,
                        format!("{back}, as from {key} to {node}"),
                        there,
                    ));
                }
            }
            let degree = laplacian.column(node).sum();
            if !degree.is_finite() {
                let what = format!("sum of the weights at node {node}");
                return Err(Error::graph(what, "a finite number", degree));
            }
            laplacian[(node, node)] = -degree;
        }
        laplacian.neg_mut();
        Ok(laplacian)
    }

    fn check_symmetric(&self, what: &'static str) -> Result<()> {
        let transposed = self.transpose();
        let mut row: Vec<u32> = Vec::new();
        for node in 0..self.num_keys {
            row.clear();
            row.extend(self.neighbors(node));
            row.sort_unstable();
            if row != transposed.neighbors(node) {
                let actual = format!("an edge in one direction only, at node {node}");
                return Err(Error::graph(what, "every edge in both directions", actual));
            }
        }
        Ok(())
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// Finds the largest eigenvalue in [−2, 2] of `sign` times a tridiagonal matrix by bisection: θ is above
/// all eigenvalues if and only if all pivots in the elimination of the matrix − θ are negative.
/// `off_diagonals[i]` precedes `diagonals[i]`.
fn largest(diagonals: &[f64], off_diagonals: &[f64], sign: f64) -> f64 {
    let is_above_all = |theta: f64| {
        let mut pivot = f64::NEG_INFINITY;
        diagonals.iter().zip(off_diagonals).all(|(diagonal, off_diagonal)| {
            pivot = sign * diagonal - theta - off_diagonal * off_diagonal / pivot;
            pivot < 0.0
        })
    };
    let (mut low, mut high) = (-2.0, 2.0);
    loop {
        let middle = low + (high - low) / 2.0;
        if middle <= low || middle >= high {
            return high;
        }
        *(if is_above_all(middle) { &mut high } else { &mut low }) = middle;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::abs_diff_eq;
    use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
    use std::f64::consts::PI;

    fn undirected(n: usize, edges: impl IntoIterator<Item = (usize, usize)>) -> Graph {
        let both = edges.into_iter().flat_map(|(i, j)| [(i, j), (j, i)]);
        Graph::from_edges(n, n, both).unwrap()
    }

    fn complete(n: usize) -> Graph {
        undirected(n, (0..n).flat_map(|i| (0..i).map(move |j| (i, j))))
    }

    fn ring(n: usize) -> Graph {
        undirected(n, (0..n).map(|i| (i, (i + 1) % n)))
    }

    fn path(n: usize) -> Graph {
        undirected(n, (1..n).map(|i| (i - 1, i)))
    }

    #[test]
    fn gaps_of_known_spectra() -> Result<()> {
        // Outer ring, spokes, inner star: the eigenvalues 3, 1 and −2.
        let petersen = undirected(
            10,
            (0..5).flat_map(|i| [(i, (i + 1) % 5), (i, i + 5), (i + 5, (i + 2) % 5 + 5)]),
        );
        // Corners that differ in one of 4 bits, and in all: folded, of the eigenvalues 5, 1, −3.
        let folded = undirected(
            16,
            (0..16usize)
                .flat_map(|i| [1, 2, 4, 8, 15].map(|bit| (i, i ^ bit)))
                .filter(|(i, j)| i < j),
        );
        let cube = undirected(
            8,
            (0..8usize).flat_map(|i| [1, 2, 4].map(|bit| (i, i ^ bit))).filter(|(i, j)| i < j),
        );
        let lazy_cube = cube.with_self_loops()?;
        let two = Graph::block_diagonal(&[&petersen, &complete(3)])?;
        let angle = |n: f64| (PI / n).cos();
        for (what, graph, expected) in [
            ("complete 2", complete(2), 0.0),
            ("complete 3", complete(3), 0.5),
            ("complete 31", complete(31), 1.0 - 1.0 / 30.0),
            ("complete with loops", Graph::window(31, 31)?, 1.0),
            ("one node", Graph::window(1, 0)?, 1.0),
            ("ring of 5", ring(5), 1.0 - angle(5.0)),
            ("ring of 101", ring(101), 1.0 - angle(101.0)),
            ("ring of 1009", ring(1009), 1.0 - angle(1009.0)),
            ("even ring", ring(10), 0.0),
            ("path", path(13), 0.0),
            // A walk that stays at an end with a probability of 1/2.
            (
                "path with loops at its ends",
                {
                    let inner = (1..13).flat_map(|i| [(i - 1, i), (i, i - 1)]);
                    Graph::from_edges(13, 13, inner.chain([(0, 0), (12, 12)]))?
                },
                1.0 - angle(13.0),
            ),
            ("Petersen", petersen, 1.0 / 3.0),
            ("cube", cube, 0.0),
            ("cube with loops", lazy_cube, 0.5),
            ("folded cube", folded, 0.4),
            ("two pieces", two, 0.0),
            // Every edge of a triangle twice: the same walk.
            (
                "parallel edges",
                undirected(3, [(0, 1), (1, 2), (2, 0), (0, 1), (1, 2), (2, 0)]),
                0.5,
            ),
        ] {
            let gap = graph.spectral_gap()?;
            let is_gap = abs_diff_eq!(gap, expected, epsilon = 1e-9);
            assert!(is_gap, "{what}: {gap} instead of {expected}");
        }
        Ok(())
    }

    #[test]
    fn expanders_come_near_the_best_gap_there_is() -> Result<()> {
        for (n, degree) in [(1009, 4), (1009, 6), (1014, 3), (503, 10), (10007, 4)] {
            let graph = Graph::expander(n, degree, &mut Xoshiro256PlusPlus::seed_from_u64(1))?;
            let (gap, d) = (graph.spectral_gap()?, degree as f64);
            let best = 1.0 - 2.0 * (d - 1.0).sqrt() / d;
            assert!((gap - best).abs() < 0.02, "n {n}, degree {degree}: {gap} beside {best}");
        }
        Ok(())
    }

    #[test]
    fn a_gap_needs_edges_both_ways_at_every_node() -> Result<()> {
        let message = |graph: Graph| graph.spectral_gap().unwrap_err().to_string();
        let one_way = Graph::from_edges(3, 3, [(0, 1), (1, 0), (1, 2), (2, 1), (1, 2)])?;
        assert!(
            message(one_way)
                .contains("both directions, got an edge in one direction only, at node 1")
        );
        let one_way_ring = Graph::from_edges(3, 3, [(0, 1), (1, 2), (2, 0)])?;
        assert!(message(one_way_ring).contains("got an edge in one direction only, at node 0"));
        assert!(message(undirected(3, [(0, 2)])).contains("none at node 1"));
        assert!(message(Graph::window(0, 0)?).contains("no nodes"));
        assert!(message(Graph::from_edges(2, 3, [])?).contains("2 queries"));
        Ok(())
    }

    #[cfg(feature = "spectral")]
    mod with_eigensolver {
        use super::*;
        use approx::{assert_abs_diff_eq, assert_relative_eq};
        use ndarray::{Array1, array};
        use rand::RngExt;

        fn resistances(positions: &Array2<f64>) -> Array2<f64> {
            let n = positions.nrows();
            Array2::from_shape_fn((n, n), |(i, j)| {
                (&positions.row(i) - &positions.row(j)).mapv(|x| x * x).sum()
            })
        }

        /// By Kirchhoff's law: node 0 at potential 0, a current into one node, Gauss and Jordan.
        fn kirchhoff(n: usize, edges: &[(usize, usize, f64)]) -> Array2<f64> {
            let mut matrix = Array2::zeros((n, 2 * n));
            for &(i, j, weight) in edges {
                for (a, b) in [(i, j), (j, i)] {
                    matrix[[a, a]] += weight;
                    matrix[[a, b]] -= weight;
                }
            }
            matrix.row_mut(0).fill(0.0);
            matrix.column_mut(0).fill(0.0);
            (0..n).for_each(|i| matrix[[i, n + i]] = 1.0);
            matrix[[0, 0]] = 1.0;
            matrix[[0, n]] = 0.0;
            for i in 0..n {
                let pivot_row = matrix.row(i).mapv(|x| x / matrix[[i, i]]);
                for (j, mut row) in matrix.rows_mut().into_iter().enumerate() {
                    let factor = row[i];
                    row.zip_mut_with(&pivot_row, |x, p| {
                        *x = if i == j { *p } else { *x - factor * p }
                    });
                }
            }
            // The potential at i of a current into j.
            let g = |i: usize, j: usize| matrix[[i, n + j]];
            Array2::from_shape_fn((n, n), |(i, j)| g(i, i) + g(j, j) - g(i, j) - g(j, i))
        }

        #[test]
        fn distances_are_known_resistances() -> Result<()> {
            let n = 13;
            let all = |graph: &Graph| graph.spectral_coordinates(n - 1, None);
            let of = |f: &dyn Fn(f64) -> f64| {
                Array2::from_shape_fn((n, n), |(i, j)| f(i.abs_diff(j) as f64))
            };
            assert_abs_diff_eq!(resistances(&all(&path(n))?), of(&|k| k), epsilon = 1e-12);
            let of_ring = of(&|k| k * (13.0 - k) / 13.0);
            assert_abs_diff_eq!(resistances(&all(&ring(n))?), of_ring, epsilon = 1e-12);
            let two = of(&|k| if k == 0.0 { 0.0 } else { 2.0 / 13.0 });
            assert_abs_diff_eq!(resistances(&all(&complete(n))?), two, epsilon = 1e-12);
            Ok(())
        }

        #[test]
        fn distances_are_resistances_by_kirchhoffs_law() -> Result<()> {
            let n = 31;
            let mut rng = Xoshiro256PlusPlus::seed_from_u64(5);
            // A tree, and more edges, some of them twice; weights between 1/4 and 4.
            let mut edges: Vec<(usize, usize, f64)> =
                (1..n).map(|i| (i, rng.random_range(0..i), 1.0)).collect();
            edges.extend((0..23).map(|i| (i, i + 1 + rng.random_range(0..n - 23), 1.0)));
            edges.push(edges[3]);
            edges.iter_mut().for_each(|edge| edge.2 = rng.random_range(-2.0..2.0f64).exp2());
            let both = edges.iter().flat_map(|&(i, j, w)| [(i, j, w), (j, i, w)]);
            let both: Vec<_> = both.chain([(2, 2, 7.0)]).rev().collect();
            let graph = Graph::from_edges(n, n, both.iter().map(|&(i, j, _)| (i, j)))?;
            let weights: Array1<f64> = both.iter().map(|&(.., w)| w).collect();
            let positions = graph.spectral_coordinates(n - 1, Some(weights.view()))?;
            let expected = kirchhoff(n, &edges);
            assert_abs_diff_eq!(resistances(&positions), expected, epsilon = 1e-11);
            // The trees through each edge are so many of all trees (Foster 1949).
            let foster: f64 = edges.iter().map(|&(i, j, w)| w * expected[[i, j]]).sum();
            assert_abs_diff_eq!(foster, (n - 1) as f64, epsilon = 1e-11);

            // The slowest modes come first, and fewer axes are the first of all.
            let few = graph.spectral_coordinates(5, Some(weights.view()))?;
            assert_eq!(few, positions.slice(ndarray::s![.., ..5]));
            let spread: Vec<f64> = positions.columns().into_iter().map(|u| u.dot(&u)).collect();
            assert!(spread.is_sorted_by(|a, b| a >= b));
            for axis in positions.columns() {
                assert_abs_diff_eq!(axis.sum(), 0.0, epsilon = 1e-12);
                let largest = axis.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs()));
                assert!(largest.unwrap() > 0.0);
            }
            let single = weights.mapv(|w| w as f32);
            let single = graph.spectral_coordinates(5, Some(single.view()))?.mapv(f64::from);
            assert_abs_diff_eq!(single, few, epsilon = 1e-5);
            Ok(())
        }

        #[test]
        fn signs_are_fixed_where_symmetry_leaves_them_open() -> Result<()> {
            // The odd modes of a path have their largest entries at both ends.
            for n in [5, 13, 31] {
                let positions: Array2<f64> = path(n).spectral_coordinates(1, None)?;
                assert!(positions[[0, 0]] > 0.0 && positions[[n - 1, 0]] < 0.0);
                // cos(π (i + 1/2) / n) · √(2 / n) over √λ = 2 sin(π / 2n).
                let expected = Array2::from_shape_fn((n, 1), |(i, _)| {
                    let (n, i) = (n as f64, i as f64);
                    (PI * (i + 0.5) / n).cos() * (2.0 / n).sqrt() / (2.0 * (PI / (2.0 * n)).sin())
                });
                assert_abs_diff_eq!(positions, expected, epsilon = 1e-12);
            }
            Ok(())
        }

        #[test]
        fn coordinates_need_a_connected_undirected_graph() -> Result<()> {
            let none: Option<ArrayView1<'_, f64>> = None;
            let message = |graph: &Graph, axes, weights: Option<ArrayView1<'_, f64>>| {
                graph.spectral_coordinates(axes, weights).unwrap_err().to_string()
            };
            let path = path(3);
            assert!(message(&path, 3, none).contains("num_axes: expected at most 2"));
            assert!(message(&Graph::window(0, 0)?, 1, none).contains("num_axes"));
            assert!(message(&Graph::from_edges(2, 3, [])?, 1, none).contains("2 queries"));
            let one_way = Graph::from_edges(3, 3, [(0, 1), (1, 0), (1, 2)])?;
            assert!(message(&one_way, 1, none).contains("from 1 to 2: expected 0, as from 2"));
            let pieces = undirected(3, [(0, 1)]);
            assert!(message(&pieces, 1, none).contains("no way from node 0 to node 2"));

            let with =
                |weights: [f64; 4]| message(&path, 1, Some(Array1::from(weights.to_vec()).view()));
            assert!(
                with([1.0, 1.0, 1.0, 2.0])
                    .contains("from 1 to 2: expected 2, as from 2 to 1, got 1")
            );
            for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
                assert!(with([1.0, 1.0, bad, bad]).contains("weights[2]: expected a positive"));
            }
            assert!(with([1e308; 4]).contains("sum of the weights at node 1"));
            assert!(with([1.0, 1.0, 1e-30, 1e-30]).contains("eigenvalues that f64 can tell apart"));
            assert!(message(&path, 1, Some(array![1.0].view())).contains("[4], got [1]"));

            assert_eq!(Graph::window(0, 0)?.spectral_coordinates(0, none)?.dim(), (0, 0));
            assert_eq!(Graph::window(1, 0)?.spectral_coordinates(0, none)?.dim(), (1, 0));
            // All of one size, however small.
            let tiny = Array1::from_elem(4, 1e-300);
            let positions = path.spectral_coordinates(2, Some(tiny.view()))?;
            let resistance = resistances(&positions)[[0, 2]];
            assert_relative_eq!(resistance, 2e300, epsilon = 0.0, max_relative = 1e-12);
            Ok(())
        }

        #[test]
        fn gaps_are_those_of_all_eigenvalues() -> Result<()> {
            for seed in 0..20 {
                let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
                let n = 53;
                let tree: Vec<_> = (1..n).map(|i| (i, rng.random_range(0..i))).collect();
                let more = (0..n).map(|_| (rng.random_range(0..n), rng.random_range(0..n)));
                let graph = undirected(n, tree.into_iter().chain(more.collect::<Vec<_>>()));
                let walk = DMatrix::from_fn(n, n, |i, j| {
                    let edges = |i: usize| graph.neighbors(i);
                    let count = edges(i).iter().filter(|&&key| key as usize == j).count();
                    count as f64 / ((edges(i).len() * edges(j).len()) as f64).sqrt()
                });
                let mut sizes: Vec<f64> =
                    walk.symmetric_eigenvalues().iter().map(|x| x.abs()).collect();
                sizes.sort_by(f64::total_cmp);
                let (gap, expected) = (graph.spectral_gap()?, 1.0 - sizes[n - 2]);
                let is_gap = abs_diff_eq!(gap, expected, epsilon = 1e-9);
                assert!(is_gap, "seed {seed}: {gap} instead of {expected}");
            }
            Ok(())
        }
    }
}
