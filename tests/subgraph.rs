//! Parts of graphs, samples of neighbours, and other orders of the nodes.

mod common;

use common::close::assert_close;
use common::random::{matrix, rng};
use common::refused;
use common::strategies::edge_lists;
use graph_attention::ndarray::{Array1, Array2, ArrayView2, Axis, array, s};
use graph_attention::rand::RngExt;
use graph_attention::rand::seq::SliceRandom;
use graph_attention::{Attention, EdgeGat, EdgeGatConfig, Graph, Inputs, Reordering, Result};
use graph_attention::{Subgraph, edge_gat::Score};
use proptest::prelude::*;
use std::collections::BTreeSet;

/// Query, key and number of each edge, row by row.
fn edges(graph: &Graph) -> Vec<(usize, usize, usize)> {
    let of_row = |query| graph.row(query).map(move |(key, edge)| (query, key, edge));
    (0..graph.num_queries()).flat_map(of_row).collect()
}

/// Asserts that each edge is that of the whole graph with its number.
fn check_numbers(part: &Subgraph, whole: &Graph) {
    let mut ends = vec![(0, 0); whole.num_edges()];
    edges(whole).iter().for_each(|&(query, key, edge)| ends[edge] = (query, key));
    for (query, key, edge) in edges(part.graph()) {
        assert_eq!((part.nodes()[query], part.nodes()[key]), ends[part.edges()[edge]]);
    }
    assert_eq!(part.edges().len(), part.graph().num_edges());
    assert_eq!(part.edges().iter().collect::<BTreeSet<_>>().len(), part.edges().len());
    assert_eq!(part.num_within().last(), Some(&part.nodes().len()));
}

/// A graph of `communities` groups of `size` nodes with 8 edges a node, 7 of them inside, and no order.
fn shuffled_communities(communities: usize, size: usize) -> Result<Graph> {
    let rng = &mut rng(5);
    let n = communities * size;
    let mut names: Vec<usize> = (0..n).collect();
    names.shuffle(rng);
    let mut edges = Vec::new();
    for node in 0..n {
        let first = node / size * size;
        for inside in [true, true, true, true, true, true, true, false] {
            let key =
                if inside { first + rng.random_range(0..size) } else { rng.random_range(0..n) };
            edges.push((names[node], names[key]));
        }
    }
    Graph::from_edges(n, n, edges)
}

fn mean_distance(graph: &Graph) -> f64 {
    let distances = edges(graph).into_iter().map(|(query, key, _)| query.abs_diff(key) as f64);
    distances.sum::<f64>() / graph.num_edges() as f64
}

/// A number of nodes, and edges between them in any order.
fn square_graphs() -> impl Strategy<Value = (usize, Vec<(usize, usize)>)> {
    edge_lists().prop_map(|(queries, keys, edges)| (queries.max(keys), edges))
}

proptest! {
    #[test]
    fn a_subgraph_has_the_edges_between_its_nodes((n, list) in square_graphs(), seed in 0..99u64) {
        let whole = Graph::from_edges(n, n, list).unwrap();
        let mut nodes: Vec<usize> = (0..n).collect();
        nodes.shuffle(&mut rng(seed));
        nodes.truncate(n * 2 / 3);
        let part = whole.subgraph(&nodes).unwrap();
        check_numbers(&part, &whole);
        let is_in = |node: &usize| nodes.contains(node);
        let expected: BTreeSet<usize> = edges(&whole)
            .into_iter()
            .filter(|(query, key, _)| is_in(query) && is_in(key))
            .map(|(_, _, edge)| edge)
            .collect();
        prop_assert_eq!(part.edges().iter().copied().collect::<BTreeSet<_>>(), expected);
        prop_assert_eq!(part.nodes(), &nodes);
    }

    #[test]
    fn k_hops_reach_the_nodes_that_breadth_first_search_reaches((n, list) in square_graphs(), hops in 0..4usize) {
        let whole = Graph::from_edges(n, n, list).unwrap();
        let seeds: Vec<usize> = (0..n).filter(|node| node % 4 == 1).collect();
        let part = whole.k_hop_subgraph(&seeds, hops).unwrap();
        check_numbers(&part, &whole);
        let distances = whole.hops_from(std::slice::from_ref(&seeds), f64::INFINITY).unwrap();
        prop_assert_eq!(part.num_within().len(), hops + 1);
        for (hop, &count) in part.num_within().iter().enumerate() {
            let near: BTreeSet<usize> =
                (0..n).filter(|&node| !seeds.is_empty() && distances[[node, 0]] <= hop as f64).collect();
            prop_assert_eq!(part.nodes()[..count].iter().copied().collect::<BTreeSet<_>>(), near);
        }
        let between = whole.subgraph(part.nodes()).unwrap();
        prop_assert_eq!(part.graph(), between.graph());
    }

    #[test]
    fn a_permutation_has_all_edges((n, list) in square_graphs(), seed in 0..99u64) {
        let whole = Graph::from_edges(n, n, list).unwrap();
        let mut order: Vec<usize> = (0..n).collect();
        order.shuffle(&mut rng(seed));
        let permuted = whole.permute(&order).unwrap();
        check_numbers(&permuted, &whole);
        prop_assert_eq!(permuted.graph().num_edges(), whole.num_edges());
        for method in [Reordering::ReverseCuthillMcKee, Reordering::Communities] {
            let mut order = whole.reordering(method).unwrap();
            prop_assert_eq!(&order, &whole.reordering(method).unwrap());
            order.sort_unstable();
            prop_assert_eq!(order, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn selected_edges_and_line_graphs_follow_the_definition((n, list) in square_graphs(), seed in 0..99u64) {
        let whole = Graph::from_edges(n, n, list.clone()).unwrap();
        let rng = &mut rng(seed);
        let mut kept: Vec<usize> = (0..list.len()).filter(|_| rng.random_bool(0.6)).collect();
        kept.shuffle(rng);
        let expected = kept.iter().map(|&edge| list[edge]);
        prop_assert_eq!(whole.select_edges(&kept).unwrap(), Graph::from_edges(n, n, expected).unwrap());

        let line = whole.line_graph().unwrap();
        let pairs: BTreeSet<(usize, usize)> =
            edges(&line).into_iter().map(|(edge, next, _)| (edge, next)).collect();
        let follows = |(edge, next): &(usize, usize)| list[*edge].1 == list[*next].0;
        let all = (0..list.len()).flat_map(|edge| (0..list.len()).map(move |next| (edge, next)));
        prop_assert_eq!(pairs, all.filter(follows).collect::<BTreeSet<_>>());
        prop_assert_eq!(line.num_queries(), list.len());
    }
}

#[test]
fn samples_have_distinct_edges_up_to_the_fanout() -> Result<()> {
    let whole = shuffled_communities(20, 25)?;
    let rng = &mut rng(1);
    let fanouts = [5, 3, 100];
    let seeds = [7, 3, 400];
    let part = whole.sample(&seeds, &fanouts, rng)?;
    check_numbers(&part, &whole);
    assert_eq!(part.nodes()[..3], seeds);
    assert_eq!(part.num_within().len(), 4);
    for node in 0..part.nodes().len() {
        let hop = part.num_within().iter().position(|&count| node < count).unwrap();
        let all = whole.neighbors(part.nodes()[node]).len();
        let expected = fanouts.get(hop).map_or(0, |&fanout| all.min(fanout));
        assert_eq!(part.graph().neighbors(node).len(), expected);
    }
    assert_ne!(part, whole.sample(&seeds, &fanouts, rng)?);
    Ok(())
}

/// The mean over many samples of degree / fanout · Σ over the sample is the sum over all edges, for seeds and for
/// nodes one hop away.
#[test]
fn sums_over_samples_are_unbiased() -> Result<()> {
    // A seed that is its own neighbour has one sample of its edges for both sums, which then are not independent.
    let communities = shuffled_communities(4, 10)?;
    let ends = edges(&communities).into_iter().map(|(query, key, _)| (query, key));
    let whole = Graph::from_edges(40, 40, ends.filter(|&(_, key)| key != 6))?;
    let x = matrix(1, whole.num_keys(), 2).row(0).mapv(|x| x + 1.0);
    let rng = &mut rng(3);
    let sum = |graph: &Graph, values: &Array1<f64>, node: usize| -> f64 {
        graph.neighbors(node).iter().map(|&key| values[key as usize]).sum()
    };
    let once: Array1<f64> = (0..whole.num_keys()).map(|node| sum(&whole, &x, node)).collect();
    let twice: f64 = sum(&whole, &once, 6);
    let rounds = 20_000;
    let estimates: Array1<f64> = (0..rounds)
        .map(|_| {
            let part = whole.sample(&[6], &[3, 2], rng)?;
            let values = part.rows_of_nodes(x.view())?;
            let scaled = |node: usize, values: &Array1<f64>| {
                let all = whole.neighbors(part.nodes()[node]).len() as f64;
                let sampled = part.graph().neighbors(node).len() as f64;
                if sampled == 0.0 { 0.0 } else { all / sampled * sum(part.graph(), values, node) }
            };
            let once = (0..part.nodes().len()).map(|node| scaled(node, &values)).collect();
            Ok(scaled(0, &once))
        })
        .collect::<Result<_>>()?;
    let error = estimates.std(1.0) / f64::from(rounds).sqrt();
    let distance = (estimates.mean().unwrap() - twice).abs();
    assert!(distance < 4.0 * error, "{distance} off, standard error {error}");
    assert!(error < 0.02 * twice);
    Ok(())
}

fn layers(rng: &mut impl graph_attention::rand::Rng) -> Result<[EdgeGat<f64>; 2]> {
    let config = EdgeGatConfig::new(Score::GatV2, 4, 2, 2).edge_dim(3);
    Ok([config.init(rng)?, config.init(rng)?])
}

fn run(
    gat: &EdgeGat<f64>,
    x: ArrayView2<'_, f64>,
    graph: &Graph,
    features: ArrayView2<'_, f64>,
) -> Result<Array2<f64>> {
    let queries = x.slice(s![..graph.num_queries(), ..]);
    let inputs = Inputs::graph(queries, x, x, graph)?.with_edge_features(features)?;
    gat.forward(&inputs)
}

/// Two layers on the part of a graph within two hops, and on only the nodes that each layer needs, are two layers
/// on the whole graph.
#[test]
fn layers_on_a_part_are_those_on_the_whole() -> Result<()> {
    let whole = shuffled_communities(6, 12)?;
    let x = matrix(whole.num_keys(), 4, 1);
    let features = matrix(whole.num_edges(), 3, 2);
    let [first, second] = layers(&mut rng(4))?;
    let hidden = run(&first, x.view(), &whole, features.view())?;
    let expected = run(&second, hidden.view(), &whole, features.view())?;

    let seeds = [50, 2];
    let everything = [whole.num_edges(); 2];
    for part in [whole.k_hop_subgraph(&seeds, 2)?, whole.sample(&seeds, &everything, &mut rng(9))?]
    {
        let mut rows = part.rows_of_nodes(x.view())?;
        let features = part.rows_of_edges(features.view())?;
        for (number, gat) in [&first, &second].into_iter().enumerate() {
            let graph = part.layer(number)?;
            let features = features.slice(s![..graph.num_edges(), ..]);
            rows = run(gat, rows.view(), &graph, features)?;
        }
        assert_close("outputs", 1e-14, &rows, &expected.select(Axis(0), &seeds));
        refused(part.layer(2), "InvalidArgument | layer | below 2 | 2");
    }
    // Permuted, and back.
    let permuted = whole.permute(&whole.reordering(Reordering::Communities)?)?;
    let rows = permuted.rows_of_nodes(x.view())?;
    let of_edges = permuted.rows_of_edges(features.view())?;
    let out = run(&first, rows.view(), permuted.graph(), of_edges.view())?;
    let mut back = Array2::zeros(out.raw_dim());
    permuted.put_rows_of_nodes(out.view(), back.view_mut())?;
    assert_close("outputs", 1e-14, &back, &hidden);
    let mut back = Array2::zeros(features.raw_dim());
    permuted.put_rows_of_edges(of_edges.view(), back.view_mut())?;
    assert_eq!(back, features);
    Ok(())
}

#[test]
fn near_nodes_get_near_numbers() -> Result<()> {
    let communities = shuffled_communities(50, 20)?;
    let order = communities.reordering(Reordering::Communities)?;
    let ordered = communities.permute(&order)?.graph().clone();
    let (before, after) = (mean_distance(&communities), mean_distance(&ordered));
    assert!(after < 0.3 * before, "{before} to {after}");

    // A shuffled ring: every edge joins nodes at most two places apart.
    let n = 100;
    let name = |node: usize| node * 37 % n;
    let ring = (0..n)
        .flat_map(|node| [(name(node), name((node + 1) % n)), (name((node + 1) % n), name(node))]);
    let ring = Graph::from_edges(n, n, ring)?;
    let ordered = ring.permute(&ring.reordering(Reordering::ReverseCuthillMcKee)?)?.graph().clone();
    assert!(edges(&ordered).into_iter().all(|(query, key, _)| query.abs_diff(key) <= 2));
    Ok(())
}

#[test]
fn nodes_that_do_not_fit_are_errors() -> Result<()> {
    let graph = Graph::from_edges(3, 3, [(0, 1), (1, 2)])?;
    refused(graph.subgraph(&[0, 3]), "Graph | nodes[1] | a node below 3 | 3");
    refused(graph.subgraph(&[2, 0, 2]), "Graph | nodes[2] | every node once | 2");
    refused(graph.k_hop_subgraph(&[5], 1), "Graph | seeds[0] | a node below 3 | 5");
    refused(graph.sample(&[1, 1], &[2], &mut rng(1)), "Graph | seeds[1] | every node once | 1");
    refused(graph.permute(&[0, 1]), "Shape | order | 3 | 2");
    refused(graph.permute(&[0, 1, 1]), "Graph | order[2] | every node once | 1");
    refused(graph.select_edges(&[1, 2]), "Graph | edges[1] | an edge below 2 | 2");
    let two_sets = Graph::from_edges(2, 3, [(0, 1)])?;
    for error in [
        two_sets.subgraph(&[0]).map(drop),
        two_sets.permute(&[0, 1]).map(drop),
        two_sets.line_graph().map(drop),
        two_sets.reordering(Reordering::Communities).map(drop),
        two_sets.sample(&[0], &[1], &mut rng(1)).map(drop),
    ] {
        refused(error, "Graph | one node set");
    }
    let part = graph.subgraph(&[2, 1])?;
    refused(part.rows_of_nodes(array![1.0].view()), "Shape | rows of nodes | [3] | [1]");
    refused(part.rows_of_edges(array![[1.0]].view()), "Shape | rows of edges | [2, 1] | [1, 1]");
    let mut whole = Array2::<f64>::zeros((3, 2));
    let rows = Array2::zeros((2, 3));
    refused(
        part.put_rows_of_nodes(rows.view(), whole.view_mut()),
        "Shape | rows of nodes | [2, 2] | [2, 3]",
    );
    // Nothing at all.
    let empty = Graph::from_edges(0, 0, [])?;
    assert_eq!(empty.sample(&[], &[3], &mut rng(1))?.num_within(), [0, 0]);
    assert!(empty.reordering(Reordering::Communities)?.is_empty());
    assert_eq!(graph.subgraph(&[])?.graph(), &empty);
    Ok(())
}
