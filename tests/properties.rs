//! Properties over random inputs: graphs, and results over parts of the keys.

mod common;

use approx::relative_eq;
use common::close::{assert_close, close};
use common::random::rng;
use common::strategies::{edge_lists, matrices};
use graph_attention::ndarray::{Array2, ArrayView2, Axis, array, concatenate, s};
use graph_attention::{Attention, Dropout, Error, Flash, Graph, Inputs, Partial, ScaledDotProduct};
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn edges(graph: &Graph) -> Vec<(usize, usize)> {
    let rows = (0..graph.num_queries())
        .flat_map(|query| graph.row(query).map(move |(key, edge)| (edge, (query, key))));
    let mut edges: Vec<_> = rows.collect();
    edges.sort();
    assert!(edges.iter().enumerate().all(|(number, &(edge, _))| number == edge));
    edges.into_iter().map(|(_, edge)| edge).collect()
}

/// Returns the shortest distance of every pair of nodes; more than n if there is no path.
fn floyd_warshall(n: usize, edges: &[(usize, usize)]) -> Array2<usize> {
    let mut distance = Array2::from_elem((n, n), usize::MAX / 2);
    edges.iter().for_each(|&edge| distance[edge] = 1);
    (0..n).for_each(|node| distance[[node, node]] = 0);
    for (via, from, to) in (0..n * n * n).map(|x| (x / (n * n), x / n % n, x % n)) {
        let detour = distance[[from, via]] + distance[[via, to]];
        distance[[from, to]] = distance[[from, to]].min(detour);
    }
    distance
}

/// Equal infinities, from empty parts, count as close.
fn close_partials(a: &Partial<f64>, b: &Partial<f64>) -> bool {
    relative_eq!(a.out(), b.out(), epsilon = 1e-13, max_relative = 0.0)
        && relative_eq!(a.log_sum_exp(), b.log_sum_exp(), epsilon = 1e-13, max_relative = 0.0)
}

proptest! {
    #[test]
    fn a_graph_is_its_edge_list((num_queries, num_keys, list) in edge_lists()) {
        let graph = Graph::from_edges(num_queries, num_keys, list.iter().copied()).unwrap();
        prop_assert_eq!(edges(&graph), list.clone());
        prop_assert_eq!(edges(graph.transpose().transpose()), list.clone());
        let flipped: Vec<_> = list.iter().map(|&(query, key)| (key, query)).collect();
        prop_assert_eq!(edges(graph.transpose()), flipped);

        // The rows as stored, with edges numbered by slot.
        let (offsets, indices) = (graph.offsets().to_vec(), graph.indices().to_vec());
        let stored = Graph::from_csr(num_keys, offsets, indices).unwrap();
        for query in 0..num_queries {
            prop_assert_eq!(stored.neighbors(query), graph.neighbors(query));
        }
    }

    #[test]
    fn the_sum_of_blocks_selects_back_to_the_blocks(
        (queries_a, keys_a, a) in edge_lists(),
        (queries_b, keys_b, b) in edge_lists(),
    ) {
        let a = Graph::from_edges(queries_a, keys_a, a).unwrap();
        let b = Graph::from_edges(queries_b, keys_b, b).unwrap();
        let both = Graph::block_diagonal(&[&a, &b]).unwrap();
        let (first, edges_of_first) = both.select_queries(&(0..queries_a).collect::<Vec<_>>()).unwrap();
        for query in 0..queries_a {
            prop_assert_eq!(first.neighbors(query), a.neighbors(query));
            for ((_, slot), (_, edge)) in first.row(query).zip(a.row(query)) {
                prop_assert_eq!(edges_of_first[slot], edge);
            }
        }
        for query in 0..queries_b {
            let shifted: Vec<u32> = b.neighbors(query).iter().map(|key| key + keys_a as u32).collect();
            prop_assert_eq!(both.neighbors(queries_a + query), shifted);
        }
    }

    #[test]
    fn k_hop_is_the_reachability_of_powers((n, _, list) in edge_lists(), k in 0..5u8) {
        let list: Vec<_> = list.into_iter().map(|(query, key)| (query, key % n)).collect();
        let graph = Graph::from_edges(n, n, list.iter().copied()).unwrap();
        let (reached, hops) = graph.k_hop(k).unwrap();
        let distance = floyd_warshall(n, &list);
        let mut expected: Vec<_> = distance.indexed_iter()
            .filter(|&(_, &hops)| hops >= 1 && hops <= k.into())
            .map(|((from, to), &hops)| (from, to, hops as u8))
            .collect();
        let mut actual: Vec<_> = edges(&reached).into_iter().zip(&hops)
            .map(|((from, to), &hops)| (from, to, hops))
            .collect();
        expected.sort();
        actual.sort();
        prop_assert_eq!(actual, expected);
    }

    #[test]
    fn hops_and_distances_are_those_of_all_shortest_ways(
        (n, _, list) in edge_lists(),
        (_, _, pairs) in edge_lists(),
        anchors in vec(vec(0..12usize, 0..4), 0..5),
        max_hops in 0..7usize,
    ) {
        let inside = |list: Vec<(usize, usize)>| -> Vec<_> {
            list.into_iter().map(|(query, key)| (query % n, key % n)).collect()
        };
        let (list, pairs) = (inside(list), inside(pairs));
        let anchors: Vec<Vec<usize>> =
            anchors.into_iter().map(|set| set.into_iter().map(|node| node % n).collect()).collect();
        let graph = Graph::from_edges(n, n, list.iter().copied()).unwrap();
        let pattern = Graph::from_edges(n, n, pairs.iter().copied()).unwrap();
        let distance = floyd_warshall(n, &list);
        let or_far = |hops: Option<usize>, max: usize| match hops {
            Some(hops) if hops <= max => hops as f64,
            _ => -3.5,
        };

        let positions = graph.hops_from(&anchors, -3.5).unwrap();
        prop_assert_eq!(positions.dim(), (n, anchors.len()));
        for ((node, axis), &hops) in positions.indexed_iter() {
            let nearest = anchors[axis].iter().map(|&anchor| distance[[anchor, node]]).min();
            prop_assert_eq!(hops, or_far(nearest, n));
        }
        let distances = graph.hop_distances(&pattern, max_hops, -3.5).unwrap().to_vec();
        let expected: Vec<f64> =
            pairs.iter().map(|&pair| or_far(Some(distance[pair]), max_hops)).collect();
        prop_assert_eq!(distances, expected);
    }

    #[test]
    fn a_union_has_every_pair_once_and_says_whence(
        (num_queries, num_keys, _) in edge_lists(),
        lists in vec(vec((0..12usize, 0..12usize), 0..30), 1..6),
    ) {
        let graphs: Vec<Graph> = lists.iter().map(|list| {
            let list = list.iter().map(|&(query, key)| (query % num_queries, key % num_keys));
            Graph::from_edges(num_queries, num_keys, list).unwrap()
        }).collect();
        let (union, layers) = Graph::union(&graphs.iter().collect::<Vec<_>>()).unwrap();
        let mut first = BTreeMap::new();
        for (number, graph) in graphs.iter().enumerate() {
            edges(graph).into_iter().for_each(|pair| { first.entry(pair).or_insert(number as u8); });
        }
        // The map is in the order that the union promises.
        prop_assert_eq!(edges(&union), first.keys().copied().collect::<Vec<_>>());
        prop_assert_eq!(layers, first.into_values().collect::<Vec<_>>());
    }

    #[test]
    fn an_expander_is_simple_regular_and_undirected(
        n in 1..40usize,
        degree in 0..40usize,
        seed in any::<u64>(),
    ) {
        let result = Graph::expander(n, degree, &mut rng(seed));
        if degree >= n || n * degree % 2 == 1 {
            let refused = matches!(result, Err(Error::InvalidArgument { argument: "degree", .. }));
            prop_assert!(refused, "{:?}", result);
            return Ok(());
        }
        let graph = result.unwrap();
        for node in 0..n {
            let row = graph.neighbors(node);
            prop_assert_eq!(row.len(), degree);
            prop_assert!(row.is_sorted_by(|a, b| a < b));
            prop_assert!(!row.contains(&(node as u32)));
            prop_assert_eq!(row, graph.transpose().neighbors(node));
        }
        let again = Graph::expander(n, degree, &mut rng(seed));
        prop_assert_eq!(graph, again.unwrap());
    }

    #[test]
    fn keys_in_shards_give_the_exact_answer(
        query in matrices(3, 4),
        key in matrices(11, 4),
        value in matrices(11, 6),
        mut cuts in vec(0..=11usize, 0..5),
        offset in -1e3..1e3f64,
    ) {
        // A common offset of the logits does not change the softmax, but does change the sum of exponentials.
        let logits = Array2::from_elem((3, 11), offset);
        let over = |keys: std::ops::Range<usize>| {
            let (k, v) = (key.slice(s![keys.clone(), ..]), value.slice(s![keys.clone(), ..]));
            let inputs = Inputs::dense(query.view(), k, v).unwrap().with_heads(2).unwrap();
            let inputs = inputs.with_bias(logits.slice(s![.., keys.clone()])).unwrap();
            let plain = ScaledDotProduct::new().forward_partial(&inputs).unwrap();
            let flash = Flash::new().with_tiles(2, 3).unwrap().forward_partial(&inputs).unwrap();
            let what = format!("keys {keys:?}");
            close(what, 1e-11, &flash.out(), &plain.out()).map_err(TestCaseError::fail)?;
            Ok(flash)
        };
        let whole = over(0..11)?;
        cuts.extend([0, 11]);
        cuts.sort();
        let shards = cuts.windows(2).map(|cut| over(cut[0]..cut[1]));
        let shards = shards.collect::<Result<Vec<_>, TestCaseError>>()?;
        let empty = Partial::empty(3, 6, 2).unwrap();
        let merge = |a: Partial<f64>, b: &Partial<f64>| a.merge(b).unwrap();
        let from_the_left = shards.iter().fold(empty.clone(), merge);
        let from_the_right = shards.iter().rev().fold(empty.clone(), merge);
        // The parts of 1e3 keep 13 digits.
        let [left, right, all] = [&from_the_left, &from_the_right, &whole].map(|part| part.out());
        let (log_sum, log_sums) = (from_the_left.log_sum_exp(), whole.log_sum_exp());
        close("from the left", 1e-11, &left, &all)
            .and_then(|()| close("from the right", 1e-11, &right, &all))
            .and_then(|()| close("log sums", 1e-11, &log_sum, &log_sums))
            .map_err(TestCaseError::fail)?;
        // The identity, exactly, from either side.
        prop_assert_eq!(&merge(whole.clone(), &empty), &whole);
        prop_assert_eq!(&merge(empty, &whole), &whole);
    }

    #[test]
    fn merging_commutes_and_associates(
        outs in matrices(3, 4),
        log_sums in vec(prop_oneof![Just(f64::NEG_INFINITY), -30.0..30.0], 3),
    ) {
        let part = |i: usize| {
            let log_sum = array![[log_sums[i], 1.0]];
            Partial::from_log_sum_exp(outs.slice(s![i..=i, ..]).to_owned(), log_sum).unwrap()
        };
        let merge = |a: &Partial<f64>, b: &Partial<f64>| a.clone().merge(b).unwrap();
        let (a, b, c) = (part(0), part(1), part(2));
        prop_assert!(close_partials(&merge(&merge(&a, &b), &c), &merge(&a, &merge(&b, &c))));
        prop_assert!(close_partials(&merge(&a, &b), &merge(&b, &a)));
    }
}

#[test]
fn a_batch_is_a_block_diagonal_graph() -> Result<(), Error> {
    let a = array![[0.1, 0.7], [0.4, -1.0]];
    let b = array![[2.0, 0.2], [0.5, 0.6], [1.0, -0.3]];
    let graph_a = Graph::from_edges(2, 2, [(1, 0), (0, 1), (0, 0)])?;
    let graph_b = Graph::from_edges(3, 3, [(0, 1), (2, 2), (2, 0)])?;
    let run = |x: ArrayView2<'_, f64>, graph: &Graph| {
        Flash::new().forward(&Inputs::graph(x, x, x, graph)?)
    };
    let apart = concatenate![Axis(0), run(a.view(), &graph_a)?, run(b.view(), &graph_b)?];
    let batch = concatenate![Axis(0), a, b];
    assert_eq!(run(batch.view(), &Graph::block_diagonal(&[&graph_a, &graph_b])?)?, apart);
    Ok(())
}

#[test]
fn rows_at_the_edges_of_the_numbers() -> Result<(), Error> {
    let value = array![[1.0, f64::INFINITY], [3.0, 4.0]];
    let run = |attention: &dyn Attention<f64>, query: f64| {
        let (query, key) = (array![[query]], array![[1.0], [1.0]]);
        let inputs = Inputs::dense(query.view(), key.view(), value.view())?;
        let (out, saved) = attention.forward_train(&inputs)?;
        let grads = attention.backward(&inputs, &saved, array![[1.0, 0.0]].view())?;
        Ok::<_, Error>((out, grads))
    };
    for attention in [&ScaledDotProduct::new() as &dyn Attention<f64>, &Flash::new()] {
        // No logit above −∞: the query attends to nothing, for any values, and no gradient flows back,
        // not even 0 · ∞ from the query.
        let (out, grads) = run(attention, f64::NEG_INFINITY)?;
        assert_eq!(out, array![[0.0, 0.0]]);
        assert_eq!(grads.value.sum(), 0.0);
        assert_eq!(grads.query.sum(), 0.0);
        assert_eq!(grads.key.sum(), 0.0);
        // Logits of +∞ or NaN have no softmax.
        for query in [f64::INFINITY, f64::NAN] {
            assert!(run(attention, query)?.0.iter().all(|x| x.is_nan()));
        }
        // An infinite value is attended to, and stays in its column.
        let (out, _) = run(attention, 0.0)?;
        assert_eq!(out, array![[2.0, f64::INFINITY]]);
        // Logits whose exponentials would overflow.
        assert_eq!(run(attention, 1e300)?.0, array![[2.0, f64::INFINITY]]);
    }
    Ok(())
}

#[test]
fn parts_that_are_nan_or_empty() -> Result<(), Error> {
    let part = |out: f64, log_sum: f64| Partial::from_log_sum_exp(array![[out]], array![[log_sum]]);
    let nan = f64::NAN;
    // NaN in either part is NaN in the whole, from both sides.
    for (a, b) in [(part(1.0, 0.0)?, part(nan, nan)?), (part(1.0, 0.0)?, part(nan, 0.0)?)] {
        assert!(a.clone().merge(&b)?.out()[[0, 0]].is_nan());
        assert!(b.merge(&a)?.out()[[0, 0]].is_nan());
    }
    // The numbers of an empty part are not read, not even multiplied by zero.
    let (seen, empty) = (part(1.0, 0.5)?, part(nan, f64::NEG_INFINITY)?);
    assert_eq!(seen.clone().merge(&empty)?, seen);
    assert_eq!(empty.merge(&seen)?, seen);
    Ok(())
}

/// A query with 40,000 keys and a key with 20,000 queries, among many with a few.
#[test]
fn a_row_longer_than_any_part_is_like_the_others() -> Result<(), Error> {
    let n = 40_000;
    let matrix = |salt: usize| {
        Array2::from_shape_fn((n, 4), |(i, j)| ((i * 31 + j * 17 + salt) % 101) as f64 / 50.0 - 1.0)
    };
    let [q, k, v, g] = [1, 2, 3, 4].map(matrix);
    let hubs = (0..n).map(|key| (7, key)).chain((0..n / 2).map(|query| (query, 5)));
    let edges = (0..n).map(|i| (i, (i * 13) % n)).chain(hubs);
    let graph = Graph::from_edges(n, n, edges)?;
    let mask = Array2::from_shape_fn((1, n), |(_, key)| key % 3 != 0);
    let logits =
        Array2::from_shape_fn((graph.num_edges(), 2), |(edge, head)| (edge % 7 + head) as f64);
    let sparse = Inputs::graph(q.view(), k.view(), v.view(), &graph)?.with_heads(2)?;
    let one = q.slice(s![..1, ..]);
    let dense = Inputs::dense(one, k.view(), v.view())?;
    for (what, inputs) in [
        ("sparse", sparse),
        ("biased", sparse.with_bias(logits.view())?),
        ("dropped", sparse.with_dropout(Dropout { probability: 0.3, seed: 9 })?),
        ("dense", dense),
        ("masked", dense.with_mask(mask.view())?),
    ] {
        let (plain, flash) = (ScaledDotProduct::new(), Flash::new());
        let (out, saved) = flash.forward_train(&inputs)?;
        let (expected, saved_plain) = plain.forward_train(&inputs)?;
        assert_close(what, 1e-13, &out, &expected);
        let grad_out = g.slice(s![..out.nrows(), ..]);
        let grads = flash.backward(&inputs, &saved, grad_out)?;
        let expected = plain.backward(&inputs, &saved_plain, grad_out)?;
        // The gradients of a hub are sums of thousands of terms of order 1.
        for (name, grad, expected) in [
            ("query", &grads.query, &expected.query),
            ("key", &grads.key, &expected.key),
            ("value", &grads.value, &expected.value),
        ] {
            assert_close(format_args!("{what}, {name}"), 1e-10, grad, expected);
        }
        assert_eq!(grads.bias.is_some(), expected.bias.is_some(), "{what}");
        if let (Some(grad), Some(expected)) = (&grads.bias, &expected.bias) {
            assert_close(format_args!("{what}, bias"), 1e-10, grad, expected);
        }
    }
    Ok(())
}
