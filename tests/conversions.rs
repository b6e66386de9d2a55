//! Conversion of graphs of other crates: their pairs and the order of them.

/// Returns the edges in pair order.
#[cfg(any(feature = "petgraph", feature = "sprs"))]
fn pairs(graph: &graph_attention::Graph) -> Vec<(usize, usize)> {
    let mut pairs = vec![(usize::MAX, usize::MAX); graph.num_edges()];
    for query in 0..graph.num_queries() {
        for (key, pair) in graph.row(query) {
            pairs[pair] = (query, key);
        }
    }
    pairs
}

#[cfg(feature = "petgraph")]
mod petgraph {
    use super::pairs;
    use ::petgraph::graph::{DiGraph, EdgeIndex, NodeIndex, UnGraph};
    use ::petgraph::graphmap::{DiGraphMap, UnGraphMap};
    use ::petgraph::stable_graph::{StableDiGraph, StableUnGraph};
    use ::petgraph::visit::{EdgeFiltered, NodeFiltered, Reversed};
    use approx::assert_abs_diff_eq;
    use graph_attention::ndarray::{Array2, ArrayView2, array};
    use graph_attention::{Attention, Flash, Graph, Inputs, Result};

    /// In no order, with two parallel edges and a self-loop; (source, target, weight).
    const EDGES: [(u32, u32, f64); 6] =
        [(3, 1, 0.5), (0, 2, -1.0), (3, 1, 2.0), (2, 2, 0.25), (1, 3, 1.5), (0, 1, -0.5)];

    fn turned() -> Vec<(usize, usize)> {
        EDGES.iter().map(|&(source, target, _)| (target as usize, source as usize)).collect()
    }

    #[test]
    fn a_directed_edge_lets_its_target_attend_to_its_source() -> Result<()> {
        let mut network = DiGraph::<(), f64>::from_edges(EDGES);
        network.add_node(());
        let (graph, edges) = Graph::from_petgraph(&network)?;
        assert_eq!(graph, Graph::from_edges(5, 5, turned())?);
        assert_eq!(edges, network.edge_indices().collect::<Vec<_>>());
        assert_eq!(pairs(&graph), turned());

        // So weights match: the bias of each edge is added to its own pair.
        let x = Array2::from_shape_fn((5, 2), |(i, j)| (i as f64 - 2.0) * (j as f64 + 0.5));
        let bias: Vec<f64> = network.edge_weights().copied().collect();
        let bias = ArrayView2::from_shape((6, 1), &bias).unwrap();
        let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)?.with_bias(bias)?;
        let out = Flash::new().forward(&inputs)?;
        // Node 1 attends to node 3 over two edges and to node 0 over one.
        let logit = |key: usize, bias: f64| (x.row(1).dot(&x.row(key)) / 2f64.sqrt() + bias).exp();
        let [a, b, c] = [logit(3, 0.5), logit(3, 2.0), logit(0, -0.5)];
        let expected = (&x.row(3) * (a + b) + &x.row(0) * c) / (a + b + c);
        assert_abs_diff_eq!(out.row(1), expected, epsilon = 1e-14);
        assert_eq!(out.row(0), array![0.0, 0.0]);
        Ok(())
    }

    #[test]
    fn reversed_edges_let_sources_attend() -> Result<()> {
        let network = DiGraph::<(), f64>::from_edges(EDGES);
        let (graph, edges) = Graph::from_petgraph(Reversed(&network))?;
        let (forward, _) = Graph::from_petgraph(&network)?;
        let expected: Vec<_> = turned().into_iter().map(|(query, key)| (key, query)).collect();
        assert_eq!(pairs(&graph), expected);
        assert_eq!(pairs(&graph), pairs(forward.transpose()));
        assert_eq!(edges, network.edge_indices().collect::<Vec<_>>());
        Ok(())
    }

    #[test]
    fn an_undirected_edge_is_a_pair_in_each_direction_and_a_loop_is_one() -> Result<()> {
        let network = UnGraph::<(), f64>::from_edges(EDGES);
        let (graph, edges) = Graph::from_petgraph(&network)?;
        let mut expected = Vec::new();
        for &(a, b, weight) in &EDGES {
            let (a, b) = (a as usize, b as usize);
            expected.push((b, a, weight));
            if a != b {
                expected.push((a, b, weight));
            }
        }
        let actual = pairs(&graph).into_iter().zip(&edges);
        let actual: Vec<_> =
            actual.map(|((query, key), &edge)| (query, key, network[edge])).collect();
        assert_eq!(actual, expected);
        let mut neighbors: Vec<_> =
            network.neighbors(NodeIndex::new(1)).map(|n| n.index()).collect();
        neighbors.sort_unstable();
        let mut keys: Vec<_> = graph.neighbors(1).iter().map(|&key| key as usize).collect();
        keys.sort_unstable();
        assert_eq!(keys, neighbors);
        Ok(())
    }

    #[test]
    fn removed_nodes_keep_their_numbers_without_pairs() -> Result<()> {
        let mut network = StableDiGraph::<(), f64>::from_edges(EDGES);
        network.remove_node(NodeIndex::new(2));
        network.remove_edge(EdgeIndex::new(2));
        let (graph, edges) = Graph::from_petgraph(&network)?;
        assert_eq!(graph, Graph::from_edges(4, 4, [(1, 3), (3, 1), (1, 0)])?);
        assert_eq!(edges.iter().map(|edge| edge.index()).collect::<Vec<_>>(), [0, 4, 5]);
        assert_eq!(edges.iter().map(|&edge| network[edge]).collect::<Vec<_>>(), [0.5, 1.5, -0.5]);
        let x = Array2::from_elem((4, 1), 1.0);
        let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)?;
        assert_eq!(Flash::new().forward(&inputs)?, array![[0.0], [1.0], [0.0], [1.0]]);

        // The largest index belongs to the last remaining node.
        network.remove_node(NodeIndex::new(3));
        let (graph, _) = Graph::from_petgraph(&network)?;
        assert_eq!(graph, Graph::from_edges(2, 2, [(1, 0)])?);

        let mut network = StableUnGraph::<(), f64>::from_edges(EDGES);
        network.remove_node(NodeIndex::new(1));
        let (graph, edges) = Graph::from_petgraph(&network)?;
        assert_eq!(pairs(&graph), [(2, 0), (0, 2), (2, 2)]);
        assert_eq!(edges.iter().map(|edge| edge.index()).collect::<Vec<_>>(), [1, 1, 3]);
        Ok(())
    }

    #[test]
    fn nodes_of_a_map_are_numbered_in_its_order() -> Result<()> {
        let network: DiGraphMap<_, _> =
            DiGraphMap::from_edges([("c", "a", 3), ("a", "b", 1), ("b", "b", 2)]);
        assert_eq!(network.nodes().collect::<Vec<_>>(), ["c", "a", "b"]);
        let (graph, edges) = Graph::from_petgraph(&network)?;
        assert_eq!(pairs(&graph), [(1, 0), (2, 1), (2, 2)]);
        assert_eq!(edges, [("c", "a"), ("a", "b"), ("b", "b")]);

        let network: UnGraphMap<_, _> = UnGraphMap::from_edges([(7, -1, 3), (-1, 4, 1), (4, 4, 2)]);
        let (graph, edges) = Graph::from_petgraph(&network)?;
        let weights: Vec<_> = edges.iter().map(|&(a, b)| network[(a, b)]).collect();
        assert_eq!(weights, [3, 3, 1, 1, 2]);
        let nodes: Vec<_> = network.nodes().collect();
        let ends = |(query, key): (usize, usize)| {
            let mut ends = [nodes[query], nodes[key]];
            ends.sort_unstable();
            ends
        };
        let ends: Vec<_> = pairs(&graph).into_iter().map(ends).collect();
        assert_eq!(ends, [[-1, 7], [-1, 7], [-1, 4], [-1, 4], [4, 4]]);
        assert_ne!(pairs(&graph)[0], pairs(&graph)[1]);
        Ok(())
    }

    #[test]
    fn filtered_graphs_keep_the_numbers_of_nodes() -> Result<()> {
        let network = DiGraph::<(), f64>::from_edges(EDGES);
        let without = NodeFiltered::from_fn(&network, |node| node != NodeIndex::new(3));
        let (graph, edges) = Graph::from_petgraph(&without)?;
        assert_eq!(graph, Graph::from_edges(4, 4, [(2, 0), (2, 2), (1, 0)])?);
        assert_eq!(edges.iter().map(|edge| edge.index()).collect::<Vec<_>>(), [1, 3, 5]);

        let positive = EdgeFiltered::from_fn(&network, |edge| *edge.weight() > 0.0);
        let (graph, _) = Graph::from_petgraph(&positive)?;
        assert_eq!(graph, Graph::from_edges(4, 4, [(1, 3), (1, 3), (2, 2), (3, 1)])?);
        Ok(())
    }

    #[test]
    fn any_index_type_and_no_nodes_will_do() -> Result<()> {
        let small: DiGraph<(), (), u8> = DiGraph::from_edges([(0u8, 1u8), (2, 0)]);
        assert_eq!(pairs(&Graph::from_petgraph(&small)?.0), [(1, 0), (0, 2)]);
        let large: UnGraph<(), (), usize> = UnGraph::from_edges([(0usize, 1usize)]);
        assert_eq!(pairs(&Graph::from_petgraph(&large)?.0), [(1, 0), (0, 1)]);
        let (graph, edges) = Graph::from_petgraph(&DiGraph::<(), ()>::new())?;
        assert_eq!((graph.num_queries(), graph.num_keys(), edges.len()), (0, 0, 0));
        let (graph, _) = Graph::from_petgraph(&StableDiGraph::<(), ()>::new())?;
        assert_eq!((graph.num_queries(), graph.num_keys()), (0, 0));
        Ok(())
    }
}

#[cfg(feature = "sprs")]
mod sprs {
    use super::pairs;
    use ::sprs::{CsMat, CsMatI, TriMat};
    use approx::assert_abs_diff_eq;
    use graph_attention::ndarray::{Array2, ArrayView2};
    use graph_attention::{Attention, Error, Flash, Graph, Inputs, Result, ScaledDotProduct};

    /// 3 × 5, with an empty row, an empty column and a stored zero.
    fn entries() -> TriMat<f64> {
        let mut entries = TriMat::new((3, 5));
        for (row, column, value) in
            [(2, 0, 6.0), (0, 3, 4.0), (2, 4, 8.0), (0, 0, 3.0), (2, 3, 0.0), (0, 1, 5.0)]
        {
            entries.add_triplet(row, column, value);
        }
        entries
    }

    /// Returns the values of a matrix in pair order.
    fn dense(graph: &Graph, values: &[f64]) -> Array2<f64> {
        let mut dense = Array2::zeros((graph.num_queries(), graph.num_keys()));
        for (pair, value) in pairs(graph).into_iter().zip(values) {
            dense[pair] = *value;
        }
        dense
    }

    #[test]
    fn rows_are_queries_in_the_order_of_the_data() -> Result<()> {
        let matrix: CsMat<f64> = entries().to_csr();
        let graph = Graph::from_sprs(matrix.view())?;
        let expected = [(0, 0), (0, 1), (0, 3), (2, 0), (2, 3), (2, 4)];
        assert_eq!(graph, Graph::from_edges(3, 5, expected)?);
        assert_eq!(graph.edge_ids(), None);
        assert_eq!(dense(&graph, matrix.data()), matrix.to_dense());
        Ok(())
    }

    #[test]
    fn columns_are_keys_and_pairs_keep_the_order_of_the_data() -> Result<()> {
        let matrix: CsMat<f64> = entries().to_csc();
        let graph = Graph::from_sprs(matrix.view())?;
        let expected = [(0, 0), (2, 0), (0, 1), (0, 3), (2, 3), (2, 4)];
        assert_eq!(pairs(&graph), expected);
        assert_eq!(graph, Graph::from_edges(3, 5, expected)?);
        assert_eq!(dense(&graph, matrix.data()), matrix.to_dense());
        // The transpose of the matrix is the transpose of the graph.
        let transposed = Graph::from_sprs(matrix.transpose_view())?;
        assert_eq!((transposed.num_queries(), transposed.num_keys()), (5, 3));
        assert_eq!(pairs(&transposed), pairs(graph.transpose()));
        Ok(())
    }

    #[test]
    fn attention_is_the_matrix_of_weights_times_the_values() -> Result<()> {
        let matrix: CsMat<f64> = entries().to_csr();
        let graph = Graph::from_sprs(matrix.view())?;
        let of = |rows: usize, seed: f64| {
            Array2::from_shape_fn((rows, 2), |(i, j)| ((i + 3 * j) as f64 + seed).sin())
        };
        let (query, key, value) = (of(3, 0.1), of(5, 0.2), of(5, 0.3));
        let bias = ArrayView2::from_shape((6, 1), matrix.data()).unwrap();
        let inputs =
            Inputs::graph(query.view(), key.view(), value.view(), &graph)?.with_bias(bias)?;
        let weights =
            ScaledDotProduct::new().attention_weights(&inputs)?.into_raw_vec_and_offset().0;
        let (indptr, indices) = (matrix.proper_indptr().to_vec(), matrix.indices().to_vec());
        let weights = CsMat::new((3, 5), indptr, indices, weights);
        let out = Flash::new().forward(&inputs)?;
        assert_abs_diff_eq!(&weights * &value, out, epsilon = 1e-15);
        assert!(out.row(0).iter().all(|&x| x != 0.0) && out.row(1).iter().all(|&x| x == 0.0));
        Ok(())
    }

    #[test]
    fn parts_of_a_matrix_count_from_their_own_start() -> Result<()> {
        let matrix: CsMat<f64> = entries().to_csr();
        let rows = matrix.slice_outer(1..3);
        let graph = Graph::from_sprs(rows.view())?;
        assert_eq!(pairs(&graph), [(1, 0), (1, 3), (1, 4)]);
        assert_eq!(dense(&graph, rows.data()), rows.to_dense());
        let matrix: CsMat<f64> = entries().to_csc();
        let columns = matrix.slice_outer(3..5);
        let graph = Graph::from_sprs(columns.view())?;
        assert_eq!((graph.num_queries(), graph.num_keys()), (3, 2));
        assert_eq!(pairs(&graph), [(0, 0), (2, 0), (2, 1)]);
        assert_eq!(dense(&graph, columns.data()), columns.to_dense());
        Ok(())
    }

    #[test]
    fn any_index_type_and_no_entries_will_do() -> Result<()> {
        // More rows than the index type of the columns can hold.
        let mut indptr = vec![0u32; 70_001];
        indptr[70_000] = 1;
        let matrix = CsMatI::<&str, u16, u32>::new((70_000, 3), indptr, vec![2], vec!["a"]);
        assert_eq!(pairs(&Graph::from_sprs(matrix.view())?), [(69_999, 2)]);
        let matrix = CsMatI::<f64, i32, i64>::new_csc((2, 1), vec![0, 2], vec![0, 1], vec![1.; 2]);
        assert_eq!(pairs(&Graph::from_sprs(matrix.view())?), [(0, 0), (1, 0)]);
        for (rows, columns) in [(0, 0), (0, 4), (4, 0), (2, 3)] {
            for matrix in [CsMat::<f32>::zero((rows, columns)), CsMat::zero((columns, rows))] {
                let graph = Graph::from_sprs(matrix.view())?;
                let size = (graph.num_queries(), graph.num_keys(), graph.num_edges());
                assert_eq!(size, (matrix.rows(), matrix.cols(), 0));
            }
        }
        Ok(())
    }

    #[test]
    fn more_columns_than_a_graph_has_keys_are_refused() {
        let columns = u32::MAX as usize + 1;
        let matrix = CsMat::new((1, columns), vec![0, 1], vec![columns - 1], vec![1.0]);
        let refused = Graph::from_sprs(matrix.view()).unwrap_err();
        assert!(matches!(refused, Error::Graph { .. }));
        assert_eq!(
            refused.to_string(),
            "graph: num_keys: expected at most 4294967295, got 4294967296"
        );
    }
}
