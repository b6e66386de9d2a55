//! Calls with bad input return the right variant of `Error`, and its message names the argument, the
//! expected and the actual value. Empty but valid input is accepted.

mod common;

use common::{mechanisms, refused};
use graph_attention::ndarray::{Array, Array2, ArrayD, ArrayView1, ArrayView2, Axis};
use graph_attention::ndarray::{Dimension, Ix1, Ix2, ShapeBuilder, s};
use graph_attention::{
    Attention, Channel, Dropout, DualSpaceConfig, EdgeGatConfig, Error, Flash, Gradients, Graph,
    Inputs, LocalGlobal, LoopFill, MoeConfig, MultiHead, MultiHeadConfig, Partial, Result, Saved,
    ScaledDotProduct, dual_space::Fusion, edge_gat::Score, params,
};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use std::sync::LazyLock;

/// Too many for a `u32`, for memory, and, squared, for a `usize`.
const HUGE: usize = usize::MAX / 8;

/// Two queries, three keys, four edges.
static GRAPH: LazyLock<Graph> =
    LazyLock::new(|| Graph::from_edges(2, 3, [(1, 2), (0, 1), (1, 0), (0, 2)]).unwrap());

/// Returns a matrix of any shape with one value in every entry, without allocating it.
fn fill<T>(value: &'static T, rows: usize, columns: usize) -> ArrayView2<'static, T> {
    ArrayView2::from_shape((rows, columns).strides((0, 0)), std::slice::from_ref(value)).unwrap()
}

fn zeros(rows: usize, columns: usize) -> ArrayView2<'static, f64> {
    fill(&0.0, rows, columns)
}

fn zero_row(len: usize) -> ArrayView1<'static, f64> {
    zeros(1, len).index_axis_move(Axis(0), 0)
}

fn dense([queries, keys, key_dim, value_dim]: [usize; 4]) -> Inputs<'static, f64> {
    Inputs::dense(zeros(queries, key_dim), zeros(keys, key_dim), zeros(keys, value_dim)).unwrap()
}

/// Two queries, three keys, four columns each, over the edges of `GRAPH`.
fn sparse() -> Inputs<'static, f64> {
    Inputs::graph(zeros(2, 4), zeros(3, 4), zeros(3, 4), &GRAPH).unwrap()
}

fn init<A: Attention<f64>>(config: &MultiHeadConfig, inner: A) -> Result<MultiHead<f64, A>> {
    config.init(inner, &mut Xoshiro256PlusPlus::seed_from_u64(3))
}

fn multi_head<A: Attention<f64>>(inner: A) -> MultiHead<f64, A> {
    init(&MultiHeadConfig::new(4, 2), inner).unwrap()
}

/// An array of any rank.
fn bad<const RANK: usize, D: Dimension>(shape: [usize; RANK]) -> Array<f64, D> {
    ArrayD::zeros(&shape[..]).into_dimensionality().unwrap()
}

/// Breaks a valid value.
type Spoil<T> = fn(&mut T);

/// Returns inputs with zeros in every channel that any of `mechanisms` needs, except `without`.
fn suited(inputs: Inputs<'_, f64>, without: Option<Channel>) -> Inputs<'_, f64> {
    let (queries, keys, pairs) = (inputs.num_queries(), inputs.num_keys(), inputs.num_pairs());
    let all = (0..queries).flat_map(|query| (0..keys).map(move |key| (query, key)));
    let latent = Box::leak(Box::new(Graph::from_edges(queries, keys, all).unwrap()));
    let mut suited = inputs.with_positions(zeros(queries, 1), zeros(keys, 1)).unwrap();
    suited = suited.with_latent(latent).unwrap();
    if without != Some(Channel::EdgeFeatures) {
        suited = suited.with_edge_features(zeros(pairs, 2)).unwrap();
    }
    if without != Some(Channel::Distances) {
        suited = suited.with_distances(zero_row(pairs)).unwrap();
    }
    suited
}

#[test]
fn arrays_that_do_not_belong_together() {
    let (q, k, v, bad) = (zeros(2, 4), zeros(3, 4), zeros(3, 5), zeros(7, 5));
    let inputs = Inputs::dense(q, k, v).unwrap();
    for (result, words) in [
        (Inputs::single(q.row(0), k, bad), "value | [3, 5] | [7, 5]"),
        (Inputs::dense(q, k, bad), "value | [3, 5] | [7, 5]"),
        (Inputs::graph(q, k, bad, &GRAPH), "value | [3, 5] | [7, 5]"),
        (Inputs::graph(bad, k, v, &GRAPH), "graph | [7, 3] | [2, 3]"),
        (Inputs::graph(q, bad, bad, &GRAPH), "graph | [2, 7] | [2, 3]"),
        (Inputs::self_attention(q, &GRAPH), "graph | [2, 2] | [2, 3]"),
        (inputs.with_arrays(bad, k, v), "query | [2, 5] | [7, 5]"),
        (inputs.with_arrays(q, bad, v), "key | [3, 5] | [7, 5]"),
        (inputs.with_arrays(q, k, bad), "value | [3, 5] | [7, 5]"),
    ] {
        refused(result, &format!("Shape | {words}"));
    }
}

#[test]
fn heads_that_do_not_divide() {
    let inputs = Inputs::dense(zeros(2, 12), zeros(3, 8), zeros(3, 6)).unwrap();
    let no_columns = dense([2, 3, 0, 0]);
    for (result, expected) in [
        (inputs.with_heads(5), "Heads | query | 5 heads | 12 columns"),
        (inputs.with_heads(3), "Heads | key | 3 heads | 8 columns"),
        (inputs.with_heads(4), "Heads | value | 4 heads | 6 columns"),
        (inputs.with_heads(24), "Heads | query | 24 heads | 12 columns"),
        (inputs.with_heads(usize::MAX), "Heads | query | 18446744073709551615 heads | 12 columns"),
        (inputs.with_grouped_heads(6, 3), "Heads | key | 3 heads | 8 columns"),
        (inputs.with_grouped_heads(12, 4), "Heads | value | 4 heads | 6 columns"),
        (no_columns.with_heads(2), "Heads | query | 2 heads | 0 columns"),
        (inputs.with_heads(0), "InvalidArgument | heads | at least 1 | got 0"),
        (inputs.with_grouped_heads(0, 0), "InvalidArgument | heads | at least 1 | got 0"),
        (
            inputs.with_grouped_heads(2, 0),
            "InvalidArgument | kv_heads | a divisor of heads = 2 | got 0",
        ),
        (
            inputs.with_grouped_heads(4, 3),
            "InvalidArgument | kv_heads | a divisor of heads = 4 | got 3",
        ),
        (
            inputs.with_grouped_heads(2, 4),
            "InvalidArgument | kv_heads | a divisor of heads = 2 | got 4",
        ),
    ] {
        refused(result, expected);
    }
}

#[test]
fn channels_of_other_shapes() {
    let (dense, sparse, square) = (dense([2, 3, 4, 4]), sparse(), Graph::window(3, 1).unwrap());
    for (result, words) in [
        (dense.with_mask(fill(&true, 3, 3)), "mask | [2, 3] | [3, 3]"),
        (dense.with_mask(fill(&true, 2, 4)), "mask | [2, 3] | [2, 4]"),
        (sparse.with_mask(fill(&true, 4, 1)), "mask | [2, 3] | [4, 1]"),
        (dense.with_bias(zeros(3, 3)), "bias | [2, 3] | [3, 3]"),
        (dense.with_bias(zeros(2, 4)), "bias | [2, 3] | [2, 4]"),
        (dense.with_bias(zeros(6, 0)), "bias | [2, 3] | [6, 0]"),
        (sparse.with_bias(zeros(2, 3)), "bias | [4, 1] | [2, 3]"),
        (sparse.with_bias(zeros(5, 1)), "bias | [4, 1] | [5, 1]"),
        (sparse.with_bias(zeros(4, 0)), "bias | [4, 1] | [4, 0]"),
        (dense.with_pair_weights(zeros(2, 3)), "pair_weights | [6, 3] | [2, 3]"),
        (dense.with_pair_weights(zeros(6, 0)), "pair_weights | [6, 1] | [6, 0]"),
        (sparse.with_pair_weights(zeros(6, 1)), "pair_weights | [4, 1] | [6, 1]"),
        (dense.with_edge_features(zeros(2, 3)), "edge_features | [6, 3] | [2, 3]"),
        (sparse.with_edge_features(zeros(6, 2)), "edge_features | [4, 2] | [6, 2]"),
        (dense.with_distances(zero_row(3)), "distances | [6] | [3]"),
        (sparse.with_distances(zero_row(6)), "distances | [4] | [6]"),
        (dense.with_edge_layers(&[0; 4]), "layers | [6] | [4]"),
        (sparse.with_edge_layers(&[0; 6]), "edge layers | [4] | [6]"),
        (dense.with_positions(zeros(3, 2), zeros(3, 2)), "query positions | [2, 2] | [3, 2]"),
        (dense.with_positions(zeros(2, 2), zeros(2, 2)), "key positions | [3, 2] | [2, 2]"),
        (dense.with_positions(zeros(2, 2), zeros(3, 9)), "key positions | [3, 2] | [3, 9]"),
        (dense.with_latent(&square), "latent | [2, 3] | [3, 3]"),
    ] {
        refused(result, &format!("Shape | {words}"));
    }
    for probability in [f64::NAN, -0.1, 1.0, f64::INFINITY, f64::NEG_INFINITY] {
        let expected =
            format!("InvalidArgument | dropout.probability | [0, 1) | got {probability}");
        refused(dense.with_dropout(Dropout { probability, seed: 0 }), &expected);
    }
}

#[test]
fn channels_that_are_missing_or_refused() {
    let inputs = dense([2, 3, 4, 4]);
    for (missing, channel) in [
        (inputs.edge_features("edge_gat").map(drop), "edge features"),
        (inputs.distances("edge_gat").map(drop), "distances"),
        (inputs.edge_layers("edge_gat").map(drop), "edge layers"),
        (inputs.positions("edge_gat").map(drop), "positions"),
        (inputs.latent("edge_gat").map(drop), "latent neighbours"),
    ] {
        let words = format!("edge_gat needs {channel}: set them with `Inputs::with_");
        refused(missing, &format!("MissingInput | {words}"));
    }
    let dropout = Dropout { probability: 0.5, seed: 0 };
    for (channel, with, name) in [
        (Channel::Mask, inputs.with_mask(fill(&true, 2, 3)), "a mask or causal pattern"),
        (Channel::Mask, Ok(inputs.with_causal()), "a mask or causal pattern"),
        (Channel::Bias, inputs.with_bias(zeros(2, 3)), "an additive bias"),
        (Channel::Dropout, inputs.with_dropout(dropout), "dropout"),
        (Channel::PairWeights, inputs.with_pair_weights(zeros(6, 1)), "weights of pairs"),
        (Channel::Heads, inputs.with_heads(2), "several heads"),
        (Channel::EdgeFeatures, inputs.with_edge_features(zeros(6, 1)), "edge features"),
        (Channel::Distances, inputs.with_distances(zero_row(6)), "distances"),
        (Channel::EdgeLayers, inputs.with_edge_layers(&[0; 6]), "edge layers"),
        (Channel::Positions, inputs.with_positions(zeros(2, 2), zeros(3, 2)), "positions"),
        (Channel::Latent, inputs.with_latent(&GRAPH), "latent neighbours"),
    ] {
        inputs.check_absent("edge_gat", &[channel]).unwrap();
        let refusal = with.unwrap().check_absent("edge_gat", &[channel]);
        let words = format!("edge_gat does not support {name}: | leave it out");
        let words = if channel == Channel::Heads {
            words.replace("leave it out", "with_heads")
        } else {
            words
        };
        refused(refusal, &format!("Unsupported | {words}"));
    }
}

#[test]
fn data_that_the_configuration_leaves_unread() {
    let gat = || {
        let config = EdgeGatConfig::new(Score::GatV2, 4, 2, 2);
        config.init(&mut Xoshiro256PlusPlus::seed_from_u64(1)).unwrap()
    };
    let with_features = suited(dense([2, 3, 4, 4]), None);
    let without = suited(dense([2, 3, 4, 4]), Some(Channel::EdgeFeatures));
    let (out, saved) = gat().forward_train(&without).unwrap();
    let words = "edge features | `EdgeGatConfig::edge_dim` | leave edge features out";
    let refused = |result: Result<()>, mechanism: &str| {
        refused(result, &format!("MissingSetting | {mechanism} reads | {words}"));
    };
    refused(gat().forward(&with_features).map(drop), "edge_gat");
    refused(gat().forward_train(&with_features).map(drop), "edge_gat");
    refused(gat().attention_weights(&with_features).map(drop), "edge_gat");
    refused(gat().backward(&with_features, &saved, out.view()).map(drop), "edge_gat");
    // Features without columns count as absent.
    gat().forward(&without.with_edge_features(zeros(6, 0)).unwrap()).unwrap();

    // For an inner mechanism, the message says which one it is.
    let rng = &mut Xoshiro256PlusPlus::seed_from_u64(2);
    let moe = MoeConfig::new(4, 1).init(vec![Box::new(gat())], rng).unwrap();
    refused(moe.forward(&with_features).map(drop), "expert 0 (edge_gat)");
    moe.forward(&without).unwrap();
    let dual = DualSpaceConfig::new(Fusion::Gated, 4);
    let dual = dual.init(gat(), gat(), gat(), rng).unwrap();
    refused(dual.forward(&with_features).map(drop), "graph (edge_gat)");
    dual.forward(&without).unwrap();
    // Latent pairs have no features.
    let dual = DualSpaceConfig::new(Fusion::Gated, 4);
    dual.init(Flash::new(), gat(), gat(), rng).unwrap().forward(&with_features).unwrap();
}

#[test]
fn data_that_a_mechanism_never_reads_changes_nothing() {
    let x = Array2::from_shape_fn((3, 4), |(i, j)| ((i * 5 + j * 3) % 7) as f64 / 20.0);
    let numbers = Array2::from_shape_fn((9, 2), |(i, j)| (i + 3 * j) as f64 / 4.0);
    let latent = Graph::window(3, 1).unwrap();
    let bare = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let channels = ["edge features", "distances", "layers", "positions", "latent neighbours"];
    let with = |channels: &[&str]| {
        channels.iter().fold(bare, |inputs, &channel| {
            let at = numbers.slice(s![..3, ..1]);
            match channel {
                "edge features" => inputs.with_edge_features(numbers.view()),
                "distances" => inputs.with_distances(numbers.column(0)),
                "layers" => inputs.with_edge_layers(&[0, 1, 2, 0, 1, 2, 0, 1, 2]),
                "positions" => inputs.with_positions(at, at),
                _ => inputs.with_latent(&latent),
            }
            .unwrap()
        })
    };
    let mut num_needed = 0;
    for attention in mechanisms::<f64>() {
        let needed: Vec<&str> = channels
            .into_iter()
            .filter(|&left_out| {
                let others: Vec<&str> =
                    channels.into_iter().filter(|&channel| channel != left_out).collect();
                match attention.forward(&with(&others)) {
                    Err(Error::MissingInput { channel, .. }) => channel.to_string() == left_out,
                    out => out.map(|_| false).unwrap(),
                }
            })
            .collect();
        num_needed += needed.len();
        let out = attention.forward(&with(&needed)).unwrap();
        assert_eq!(attention.forward(&with(&channels)).unwrap(), out, "{}", attention.name());
    }
    // By edge_gat, edge_rope, graph_rope and dual_space.
    assert_eq!(num_needed, 4);
}

#[test]
fn graphs_that_contradict_themselves() {
    let complete = Graph::window(2048, HUGE).unwrap();
    let csr = |offsets: &[_], indices: &[_]| Graph::from_csr(3, offsets.to_vec(), indices.to_vec());
    let select = |queries: &[usize]| GRAPH.select_queries(queries).map(|it| it.0);
    let loops = |rows| GRAPH.with_self_loops_and_features(zeros(rows, 2), LoopFill::Mean);
    let most_keys = Graph::from_csr(u32::MAX as usize, vec![0], vec![]).unwrap();
    let expander =
        |n, degree| Graph::expander(n, degree, &mut Xoshiro256PlusPlus::seed_from_u64(1));
    for (result, words) in [
        (Graph::from_edges(2, 3, [(0, 0), (2, 0)]), "edges[1].query | below 2 | got 2"),
        (Graph::from_edges(2, 3, [(0, 3)]), "edges[0].key | below 3 | got 3"),
        (Graph::from_edges(2, 0, [(0, 7)]), "edges[0].key | below 0 | got 7"),
        (Graph::from_edges(HUGE, 3, []), "num_queries | at most 4294967295 | got 23058"),
        (Graph::from_edges(3, HUGE, []), "num_keys | at most 4294967295 | got 23058"),
        (csr(&[], &[]), "offsets | one entry more than queries | no entries"),
        (csr(&[1, 1], &[0]), "offsets[0] | expected 0 | got 1"),
        (csr(&[0, 2, 1], &[0, 1]), "offsets[2] | at least 2 | got 1"),
        (csr(&[0, usize::MAX, 1], &[0]), "offsets[2] | at least 18446744073709551615 | got 1"),
        (csr(&[0, 1], &[0, 1]), "offsets[1] | indices.len() = 2 | got 1"),
        (csr(&[0, 3], &[0, 1]), "offsets[1] | indices.len() = 2 | got 3"),
        (csr(&[0], &[0]), "offsets[0] | indices.len() = 1 | got 0"),
        (csr(&[0, 2], &[2, 3]), "indices[1] | below 3 | got 3"),
        (csr(&[0, 1], &[u32::MAX]), "indices[0] | below 3 | got 4294967295"),
        (Graph::from_csr(HUGE, vec![0], vec![]), "num_keys | at most 4294967295 | got 23058"),
        (Graph::from_mask(fill(&true, HUGE, 1)), "num_queries | at most 4294967295 | got 23058"),
        (Graph::from_mask(fill(&true, 1, HUGE)), "num_keys | at most 4294967295 | got 23058"),
        (Graph::window(1 << 20, HUGE), "edges | at most 4294967295 | got 1099511627776"),
        (Graph::window(HUGE, HUGE), "num_queries | at most 4294967295 | got 23058"),
        (Graph::local_global(3, 1, &[0, 3]), "globals[1] | below 3 | got 3"),
        (Graph::local_global(0, 1, &[0]), "globals[0] | below 0 | got 0"),
        (Graph::block_diagonal(&[&most_keys; 2]), "num_keys | at most 4294967295 | got 8589934590"),
        (select(&[1, 2]), "queries[1] | below 2 | got 2"),
        (
            complete.select_queries(&vec![0; 1 << 22]).map(|it| it.0),
            "edges | at most 4294967295 | got 8589934592",
        ),
        (select(&[HUGE]), "queries[0] | below 2 | got 2305843009213693951"),
        (GRAPH.with_self_loops(), "with_self_loops | as many queries as 3 keys | 2 queries"),
        (GRAPH.k_hop(2).map(|it| it.0), "k_hop | as many queries as 3 keys | 2 queries"),
        (expander(HUGE, 4), "num_queries | at most 4294967295 | got 23058"),
        (expander(1 << 20, 1 << 12), "edges | at most 4294967295 | got 4294967296"),
    ] {
        refused(result, &format!("Graph | {words}"));
    }
    refused(
        expander(5, 5),
        "InvalidArgument | degree | at most 4, the number of other nodes | got 5",
    );
    refused(expander(5, HUGE), "InvalidArgument | degree | at most 4, the number of other nodes");
    refused(
        expander(0, 1),
        "InvalidArgument | degree | at most 0, the number of other nodes | got 1",
    );
    refused(expander(7, 3), "InvalidArgument | degree | an even number for 7 nodes | got 3");
    let square = Graph::window(3, 1).unwrap();
    let union = Graph::union;
    refused(union(&[]), "InvalidArgument | number of graphs | 1 to 256 | got 0");
    refused(union(&[&square; 257]), "InvalidArgument | number of graphs | 1 to 256 | got 257");
    refused(union(&[&square, &square, &complete]), "Shape | graphs[2] | [3, 3] | [2048, 2048]");
    let hops = |graph: &Graph, anchors: &[&[usize]]| graph.hops_from(anchors, -1.0);
    refused(hops(&GRAPH, &[]), "Graph | hops_from | as many queries as 3 keys | 2 queries");
    refused(hops(&square, &[&[0], &[1, 3]]), "Graph | anchors[1][1] | a node below 3 | got 3");
    let distances = |graph: &Graph, pattern| graph.hop_distances(pattern, 2, -1.0);
    refused(distances(&GRAPH, &GRAPH), "Graph | hop_distances | as many queries as 3 keys");
    refused(distances(&square, &GRAPH), "Shape | pattern | [3, 3] | [2, 3]");
    refused(loops(4), "Graph | with_self_loops | as many queries as 3 keys | 2 queries");
    refused(loops(1), "Shape | edge_features | [4, 2] | [1, 2]");
}

#[test]
fn settings_out_of_range() {
    let single = Inputs::dense(fill(&0f32, 1, 1), fill(&0.0, 1, 1), fill(&0.0, 1, 1)).unwrap();
    let beyond_f32 = Flash::new().with_scale(1e300).unwrap().forward(&single);
    refused(beyond_f32, "InvalidArgument | scale | a finite number | got inf");
    for scale in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let expected = format!("InvalidArgument | scale | a finite number | got {scale}");
        refused(ScaledDotProduct::new().with_scale(scale), &expected);
        refused(Flash::new().with_scale(scale), &expected);
    }
    let tiles = |queries, keys| Flash::new().with_tiles(queries, keys);
    refused(tiles(0, 4), "InvalidArgument | tiles.queries | at least 1 | got 0");
    refused(tiles(4, 0), "InvalidArgument | tiles.keys | at least 1 | got 0");

    let config = MultiHeadConfig::new;
    for (config, expected) in [
        (config(4, 0), "InvalidArgument | num_heads | at least 1 | got 0"),
        (config(0, 2), "InvalidArgument | embed_dim | at least 1 | got 0"),
        (config(0, 2).head_dim(1), "InvalidArgument | embed_dim | at least 1 | got 0"),
        (config(4, 2).key_dim(0), "InvalidArgument | key_dim | at least 1 | got 0"),
        (config(4, 2).value_dim(0), "InvalidArgument | value_dim | at least 1 | got 0"),
        (config(4, 2).output_dim(0), "InvalidArgument | output_dim | at least 1 | got 0"),
        (config(4, 2).head_dim(0), "InvalidArgument | head_dim | at least 1 | got 0"),
        (config(4, 2).value_head_dim(0), "InvalidArgument | value_head_dim | at least 1 | got 0"),
        (config(4, 3), "InvalidArgument | embed_dim | a multiple of num_heads = 3 | got 4"),
        (config(4, 8), "InvalidArgument | embed_dim | a multiple of num_heads = 8 | got 4"),
        (
            config(4, 2).kv_heads(0),
            "InvalidArgument | kv_heads | a divisor of num_heads = 2 | got 0",
        ),
        (
            config(4, 2).kv_heads(4),
            "InvalidArgument | kv_heads | a divisor of num_heads = 2 | got 4",
        ),
        (config(HUGE, 1), "TooLarge | in_proj_weight | 2305843009213693951]"),
        (config(4, 2).head_dim(HUGE), "TooLarge | in_proj_weight | , 4]"),
        (config(4, HUGE).head_dim(HUGE), "TooLarge | in_proj_weight | [18446744073709551615, 4]"),
        (config(4, 2).key_dim(HUGE), "TooLarge | k_proj_weight | [4, 2305843009213693951]"),
        (config(4, 2).value_dim(HUGE), "TooLarge | v_proj_weight | [4, 2305843009213693951]"),
        (config(4, 2).output_dim(HUGE), "TooLarge | out_proj.weight | [2305843009213693951, 4]"),
    ] {
        refused(init(&config, Flash::new()), expected);
    }
}

#[test]
fn inputs_that_a_mechanism_cannot_take() {
    let (plain, flash) = (ScaledDotProduct::new(), Flash::new());
    let keys = Inputs::dense(zeros(2, 8), zeros(3, 4), zeros(3, 4)).unwrap();
    let heads = dense([2, 3, 4, 4]).with_heads(2).unwrap();
    let bias = heads.with_bias(zeros(6, 3)).unwrap();
    for attention in [&plain as &dyn Attention<f64>, &flash] {
        refused(attention.forward(&keys), "Shape | key | [3, 8] | [3, 4]");
        refused(attention.attention_weights(&keys), "Shape | key | [3, 8] | [3, 4]");
        refused(attention.forward_train(&bias), "Shape | bias | [6, 2] | [6, 3]");
    }
    refused(plain.forward_partial(&keys), "Shape | key | [3, 8] | [3, 4]");
    refused(flash.forward_partial(&bias), "Shape | bias | [6, 2] | [6, 3]");

    let attention = multi_head(flash);
    let forward = |query, key, value| {
        attention.forward(&Inputs::dense(zeros(2, query), zeros(3, key), zeros(3, value))?)
    };
    refused(forward(8, 4, 4), "Shape | query | [2, 4] | [2, 8]");
    refused(forward(4, 8, 4), "Shape | key | [3, 4] | [3, 8]");
    refused(forward(4, 4, 8), "Shape | value | [3, 4] | [3, 8]");
    let bias = bias.with_heads(1).unwrap();
    refused(attention.forward(&bias), "Shape | bias | [6, 2] | [6, 3]");
    refused(attention.forward(&heads), "Unsupported | multi_head | several heads");
    refused(attention.attention_weights(&heads), "Unsupported | multi_head | several heads");
}

#[test]
fn outputs_and_gradients_of_other_shapes() {
    let bare = dense([2, 3, 4, 4]);
    let with_data = suited(bare, None);
    let spoils: [(Spoil<Gradients<f64>>, _, _); 8] = [
        (|it| it.query = bad([7, 9]), "query | [2, 4] | [7, 9]", None),
        (|it| it.key = bad([7, 9]), "key | [3, 4] | [7, 9]", None),
        (|it| it.value = bad([7, 9]), "value | [3, 4] | [7, 9]", None),
        (|it| it.params.push(bad([])), "params | expected shape [", None),
        (|it| it.bias = Some(bad([7, 9])), "bias | [2, 3] | [7, 9]", Some(Channel::Bias)),
        (
            |it| it.edge_features = Some(bad([7, 9])),
            "edge_features | [6, 2]",
            Some(Channel::EdgeFeatures),
        ),
        (
            |it| it.pair_weights = Some(bad([7, 9])),
            "pair_weights | [6, 1] | [7, 9]",
            Some(Channel::PairWeights),
        ),
        (|it| it.distances = Some(bad([7])), "distances | [6] | [7]", Some(Channel::Distances)),
    ];
    for attention in mechanisms() {
        let name = attention.name();
        let (mut out, saved) = attention.forward_train(&with_data).unwrap();
        let mut out = out.slice_mut(s![.., 1..]);
        let forward = attention.forward_into(&with_data, out.view_mut());
        refused(forward, "Shape | out | [2, 4] | [2, 3]");
        let forward_train = attention.forward_train_into(&with_data, out.view_mut());
        refused(forward_train, "Shape | out | [2, 4] | [2, 3]");
        let backward = attention.backward(&with_data, &saved, out.view());
        refused(backward, "Shape | grad_out | [2, 4] | [2, 3]");

        for (spoil, words, channel) in spoils {
            let backward = |inputs| {
                let mut grads = Gradients::zeros(inputs, &attention)?;
                let (out, saved) = attention.forward_train(inputs)?;
                spoil(&mut grads);
                attention.backward_into(inputs, &saved, out.view(), grads.view_mut())
            };
            let inputs = match channel {
                Some(Channel::Bias) => with_data.with_bias(zeros(2, 3)).unwrap(),
                Some(Channel::PairWeights) => with_data.with_pair_weights(zeros(6, 1)).unwrap(),
                _ => with_data,
            };
            let result = backward(&inputs);
            if name == "poincare" && channel == Some(Channel::PairWeights) {
                refused(result, "Unsupported | poincare | weights of pairs");
            } else {
                refused(result, &format!("Shape | grads.{words}"));
            }
            if let Some(channel) = channel {
                let words = format!("{name} needs {channel}: set them with `Inputs::with_");
                let result = backward(&suited(bare, Some(channel)));
                refused(result, &format!("MissingInput | {words}"));
            }
        }
    }
    let attention = multi_head(Flash::new());
    let (out, saved) = attention.forward_train(&bare).unwrap();
    let mut grads = Gradients::zeros(&bare, &attention).unwrap();
    grads.params[1] = bad([7]);
    let backward = attention.backward_into(&bare, &saved, out.view(), grads.view_mut());
    refused(backward, "Shape | grads.params: in_proj_bias | [12] | [7]");

    let mut grads = Gradients::zeros(&bare, &attention).unwrap();
    let mut grads = grads.view_mut();
    assert_eq!(grads.param::<Ix1>(1).unwrap().len(), 12);
    refused(grads.param::<Ix2>(1), "Shape | rank of grads.params[1] | [2] | [1]");
    refused(grads.param::<Ix1>(4), "Shape | grads.params | [5] | [4]");

    let sum = |sizes| Gradients::zeros(&dense(sizes), &Flash::new())?.self_attention();
    refused(sum([4, 3, 4, 4]), "Shape | grads.query | [3, 4] | [4, 4]");
    refused(sum([3, 3, 4, 5]), "Shape | grads.value | [3, 4] | [3, 5]");
    let grads = Gradients::zeros(&bare, &attention).unwrap();
    refused(grads.param(&attention, "in_proj"), "UnknownParam | in_proj | in_proj_weight");
    refused(grads.named(&Flash::new()).map(drop), "Shape | number of grads.params | [0] | [4]");
}

#[test]
fn states_saved_by_somebody_else() {
    let inputs = suited(dense([2, 3, 4, 4]), None);
    let other_sizes = suited(dense([5, 6, 4, 4]), None);
    let save = |attention: &dyn Attention<f64>, inputs: &Inputs<'_, f64>| {
        attention.forward_train(inputs).unwrap().1
    };
    let backward = |attention: &dyn Attention<f64>, saved: Saved| {
        attention.backward(&inputs, &saved, zeros(2, 4))
    };
    for attention in mechanisms() {
        let name = attention.name();
        for stranger in mechanisms().into_iter().filter(|stranger| stranger.name() != name) {
            let words = format!("{name}: | its own forward pass | by {}", stranger.name());
            let strange = backward(&attention, save(&stranger, &inputs));
            refused(strange, &format!("SavedMismatch | {words}"));
        }
        let forged = backward(&attention, Saved::new(name, "not its state"));
        refused(forged, &format!("SavedMismatch | {name}: | its own forward pass"));
        let expected = match name {
            "scaled_dot_product" => "saved weights | [6, 1] | [30, 1]",
            "multi_head" => "saved context | [2, 4] | [5, 4]",
            "moe" => "saved routing | [2, 2] | [5, 2]",
            "dual_space" => "saved branches | [2, 12] | [5, 12]",
            "edge_gat" => "saved context | [2, 4] | [5, 4]",
            "poincare" => "saved normalizer | [2, 1] | [5, 1]",
            "graph_rope" => "saved query | [2, 4] | [5, 4]",
            "transformer_layer" => "saved sum | [2, 4] | [5, 4]",
            "stack" => "saved output | [2, 4] | [5, 4]",
            _ => "saved out | [2, 4] | [5, 4]",
        };
        let of_other_sizes = backward(&attention, save(&attention, &other_sizes));
        refused(of_other_sizes, &format!("Shape | {expected}"));
    }
    let of_another = Saved::new("another", 7u8);
    refused(of_another.state::<u8>("its_own"), "SavedMismatch | its_own: | by another");
    let (plain, flash) = (ScaledDotProduct::new(), Flash::new());
    let single = Inputs::dense(fill(&0f32, 2, 4), fill(&0.0, 3, 4), fill(&0.0, 3, 4)).unwrap();
    let (_, saved) = flash.forward_train(&single).unwrap();
    refused(backward(&flash, saved), "SavedMismatch | flash: | own forward pass");

    let other_inner = backward(&multi_head(&plain), save(&multi_head(&flash), &inputs));
    refused(other_inner, "SavedMismatch | scaled_dot_product: | by flash");
    let other_heads = backward(&flash, save(&flash, &inputs.with_heads(2).unwrap()));
    refused(other_heads, "Shape | saved normalizer | [2, 1] | [2, 2]");
    let other_columns = backward(&flash, save(&flash, &dense([2, 3, 4, 6])));
    refused(other_columns, "Shape | saved out | [2, 4] | [2, 6]");
    refused(backward(&plain, save(&plain, &sparse())), "Shape | saved weights | [6, 1] | [4, 1]");
}

#[test]
fn partials_that_do_not_fit() {
    let new = |out: [usize; 2], log_sum: [usize; 2]| {
        Partial::<f64>::from_log_sum_exp(Array2::zeros(out), Array2::zeros(log_sum))
    };
    refused(new([2, 4], [3, 1]), "Shape | log_sum_exp | [2, 1] | [3, 1]");
    refused(new([2, 4], [2, 3]), "Heads | out | 3 heads | 4 columns");
    refused(new([2, 4], [2, 0]), "Heads | out | 0 heads | 4 columns");
    refused(Partial::<f64>::empty(2, 4, 3), "Heads | out | 3 heads | 4 columns");
    let merge = |out, log_sum| new([2, 4], [2, 2])?.merge(&new(out, log_sum)?);
    refused(merge([3, 4], [3, 2]), "Shape | partial.out | [2, 4] | [3, 4]");
    refused(merge([2, 6], [2, 2]), "Shape | partial.out | [2, 4] | [2, 6]");
    refused(merge([2, 4], [2, 1]), "Shape | partial.shift | [2, 2] | [2, 1]");
    let merge_queries = |queries: &[usize], out| {
        new([2, 4], [2, 2])?.merge_queries(queries, &new(out, [out[0], 2])?)
    };
    refused(merge_queries(&[1], [2, 4]), "Shape | partial.out | [1, 4] | [2, 4]");
    refused(merge_queries(&[1], [1, 6]), "Shape | partial.out | [1, 4] | [1, 6]");
    refused(merge_queries(&[2], [1, 4]), "InvalidArgument | queries | below 2 | 2");
    let selected = new([2, 4], [2, 2]).unwrap().select_queries(&[0, 5]);
    refused(selected, "InvalidArgument | queries | below 2 | 5");

    let merged = new([2, 4], [2, 2]).unwrap();
    let vjp = |part: [usize; 2], grad_out: [usize; 2], grad_log_sum: [usize; 2]| {
        let (grad_out, grad_log_sum) = (Array2::zeros(grad_out), Array2::zeros(grad_log_sum));
        merged.merge_vjp(&new(part, [2, 2])?, grad_out.view(), Some(grad_log_sum.view()))
    };
    refused(vjp([2, 6], [2, 4], [2, 2]), "Shape | partial.out | [2, 4] | [2, 6]");
    refused(vjp([2, 4], [2, 6], [2, 2]), "Shape | grad_out | [2, 4] | [2, 6]");
    refused(vjp([2, 4], [2, 4], [2, 1]), "Shape | grad_log_sum_exp | [2, 2] | [2, 1]");
}

#[test]
fn partials_and_gradients_that_do_not_fit_the_inputs() {
    let x = Array2::<f64>::zeros((2, 4));
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap().with_heads(2).unwrap();
    let (good, gat_inputs) = (Partial::empty(2, 4, 2).unwrap(), inputs.with_heads(1).unwrap());
    let plain = ScaledDotProduct::new();
    let flash = Flash::new();
    let local_global = LocalGlobal::joint(Flash::new(), Flash::new());
    let gat = EdgeGatConfig::new(Score::Gat, 4, 2, 2)
        .init(&mut Xoshiro256PlusPlus::seed_from_u64(1))
        .unwrap();
    let run = |partial: &Partial<f64>, grad: [usize; 2], log_sum: [usize; 2]| {
        let (grad, log_sum) = (Array2::zeros(grad), Array2::zeros(log_sum));
        let (grad, log_sum) = (grad.view(), Some(log_sum.view()));
        [
            plain.backward_partial(&inputs, partial, grad, log_sum),
            flash.backward_partial(&inputs, partial, grad, log_sum),
            local_global.backward_partial(&inputs, partial, grad, log_sum),
            gat.backward_partial(&gat_inputs, partial, grad, log_sum),
        ]
    };
    let empty = |queries, columns, heads| Partial::empty(queries, columns, heads).unwrap();
    for (partial, grad, log_sum, expected) in [
        (empty(3, 4, 2), [2, 4], [2, 2], "Shape | partial.out | [2, 4] | [3, 4]"),
        (empty(2, 6, 2), [2, 4], [2, 2], "Shape | partial.out | [2, 4] | [2, 6]"),
        (empty(2, 4, 1), [2, 4], [2, 2], "Shape | partial.shift | [2, 2] | [2, 1]"),
        (good.clone(), [2, 6], [2, 2], "Shape | grad_out | [2, 4] | [2, 6]"),
        (good.clone(), [2, 4], [1, 2], "Shape | grad_log_sum_exp | [2, 2] | [1, 2]"),
    ] {
        run(&partial, grad, log_sum).into_iter().for_each(|result| refused(result, expected));
    }

    let finished = |queries: ArrayView2<'_, f64>, partial| {
        gat.finish_partial(&Inputs::dense(queries, x.view(), x.view())?, partial)
    };
    refused(finished(x.slice(s![.., ..3]), &good), "Shape | query | [2, 4] | [2, 3]");
    refused(finished(x.view(), &empty(2, 6, 2)), "Shape | partial.out | [2, 4] | [2, 6]");
    let mut grads = Gradients::zeros(&gat_inputs, &gat).unwrap();
    let grad = Array2::zeros((2, 3));
    let views = grads.view_mut();
    let error = gat.finish_partial_backward_into(&gat_inputs, &good, grad.view(), views);
    refused(error, "Shape | grad_out | [2, 4] | [2, 3]");

    // Two softmaxes are not one.
    let gated = LocalGlobal::gated(
        2,
        2,
        Flash::new(),
        Flash::new(),
        &mut Xoshiro256PlusPlus::seed_from_u64(1),
    )
    .unwrap();
    let inputs = inputs.with_edge_layers(&[0; 4]).unwrap();
    let expected = "InvalidArgument | local_global | one softmax | gated";
    refused(gated.forward_partial(&inputs), expected);
    refused(gated.backward_partial(&inputs, &good, x.view(), None), expected);
}

#[test]
fn parameters_that_do_not_fit() {
    type State = Vec<(String, ArrayD<f64>)>;
    let mut attention = multi_head(Flash::new());
    let state = params::state(&attention);
    let spoils: [(Spoil<State>, _); 6] = [
        (|it| it[2].0 = "w_o".into(), "UnknownParam | w_o | out_proj.weight | unknown"),
        (|it| it.push(it[2].clone()), "DuplicateParam | out_proj.weight | one value | two"),
        (|it| drop(it.remove(2)), "MissingParam | out_proj.weight | without this name"),
        (|it| it.clear(), "MissingParam | in_proj_weight | without this name"),
        (|it| it[2].1 = bad([4, 5]), "Shape | out_proj.weight | [4, 4] | [4, 5]"),
        (|it| it[2].1 = bad([]), "Shape | out_proj.weight | [4, 4] | []"),
    ];
    for (spoil, expected) in spoils {
        let mut spoilt = state.clone();
        spoil(&mut spoilt);
        let from_params = MultiHeadConfig::new(4, 2).from_params(Flash::new(), spoilt.clone());
        refused(from_params, expected);
        refused(params::load_state(&mut attention, spoilt), expected);
        assert_eq!(params::state(&attention), state);
    }
    let mut gradients: Vec<_> = state.iter().map(|(_, value)| value.clone()).collect();
    let shared = "InvalidArgument | params | all 4 writable | 0 writable";
    refused(params::load_state(&mut &attention, state), shared);
    refused(params::update(&mut &attention, &gradients, |_, _, _| {}), shared);
    let update = params::update(&mut attention, &gradients[..3], |_, _, _| {});
    refused(update, "Shape | number of grads.params | [4] | [3]");
    gradients[1] = bad([3]);
    let update = params::update(&mut attention, &gradients, |_, _, _| {});
    refused(update, "Shape | grads.params: in_proj_bias | [12] | [3]");
}

#[test]
fn sizes_beyond_memory() {
    let (many_queries, many_keys) = (dense([HUGE, 2, 1, 1]), dense([2, HUGE, 0, 0]));
    let (plain, flash) = (ScaledDotProduct::new(), Flash::new());
    let weights = format!("TooLarge | weights | [{}, 1]", 2 * HUGE);
    let large = |what| format!("TooLarge | {what} | [{HUGE}, 1]");
    for attention in [&plain as &dyn Attention<f64>, &flash] {
        refused(attention.attention_weights(&many_keys), &weights);
        refused(attention.forward(&many_queries), &large("out"));
        refused(attention.forward_train(&many_queries), &large("out"));
    }
    refused(plain.forward(&many_keys), &weights);
    refused(flash.forward_partial(&many_queries), &large("out"));
    refused(Gradients::zeros(&many_queries, &flash), &large("grads.query"));
    refused(Gradients::zeros(&dense([2, HUGE, 1, 1]), &flash), &large("grads.key"));
    refused(Partial::<f64>::empty(HUGE, 1, 1), &large("log_sum_exp"));
    let pairs = Inputs::dense(zeros(HUGE, 1), zeros(HUGE, 1), zeros(HUGE, 1));
    refused(pairs, &format!("TooLarge | pairs | [{HUGE}, {HUGE}]"));
    // Arrays that are not contiguous are copied.
    let wide = Inputs::dense(zeros(1, HUGE), zeros(2, HUGE), zeros(2, 1)).unwrap();
    refused(flash.forward(&wide), &format!("TooLarge | query | [1, {HUGE}]"));
    let many = Inputs::dense(zeros(0, 0), zeros(HUGE, 0), zeros(HUGE, 0)).unwrap();
    let distances =
        Gradients::zeros(&dense([1, HUGE, 0, 0]).with_distances(zero_row(HUGE)).unwrap(), &flash);
    refused(distances, &format!("TooLarge | grads.distances | [{HUGE}]"));
    // Tiles are limited to useful sizes.
    let largest_tiles = flash.clone().with_tiles(usize::MAX, usize::MAX).unwrap();
    assert_eq!(largest_tiles.forward(&many).unwrap().dim(), (0, 0));
    let projection = multi_head(flash).attention_weights(&dense([HUGE / 4, 1, 4, 4]));
    refused(projection, &format!("TooLarge | projection | [{}, 4]", HUGE / 4));
}

#[test]
fn empty_inputs_are_valid() {
    for sizes in
        [[0, 3, 4, 4], [2, 0, 4, 4], [0, 0, 4, 4], [2, 3, 4, 4], [2, 3, 0, 4], [2, 3, 4, 0], [0; 4]]
    {
        let ([num_queries, num_keys, key_dim, value_dim], dense) = (sizes, dense(sizes));
        let no_edges = Graph::from_edges(num_queries, num_keys, []).unwrap();
        let sparse = Inputs::graph(dense.query(), dense.key(), dense.value(), &no_edges).unwrap();
        // These take any number of columns; all mechanisms take four.
        let any = ["scaled_dot_product", "flash", "poincare", "local_global"];
        let fits = |name: &str| (key_dim, value_dim) == (4, 4) || any.contains(&name);
        for inputs in [dense, dense.with_causal(), sparse].map(|inputs| suited(inputs, None)) {
            let fitting: Vec<_> = mechanisms().into_iter().filter(|it| fits(it.name())).collect();
            assert!(fitting.len() >= any.len());
            for attention in fitting {
                let (out, saved) = attention.forward_train(&inputs).unwrap();
                match attention.name() {
                    // The feed-forward network has biases.
                    "transformer_layer" => assert_eq!(out.dim(), (num_queries, value_dim)),
                    _ => assert_eq!(out, zeros(num_queries, value_dim)),
                }
                let grads = attention.backward(&inputs, &saved, out.view()).unwrap();
                assert_eq!(grads.query.dim(), (num_queries, key_dim));
                match attention.attention_weights(&inputs) {
                    Err(Error::NoWeights { .. }) => {}
                    weights => assert_eq!(weights.unwrap().nrows(), inputs.num_pairs()),
                }
            }
            let partial = ScaledDotProduct::new().forward_partial(&inputs).unwrap();
            partial.merge(&Flash::new().forward_partial(&inputs).unwrap()).unwrap();
        }
    }
    let inputs = dense([2, 0, 4, 4]).with_mask(fill(&true, 2, 0)).unwrap();
    let inputs = inputs.with_bias(zeros(2, 0)).unwrap().with_edge_layers(&[]).unwrap();
    inputs.with_edge_features(zeros(0, 5)).unwrap();
    inputs.with_positions(zeros(2, 0), zeros(0, 0)).unwrap();
    Partial::<f64>::empty(0, 0, 1).unwrap();
}

#[test]
fn empty_graphs_are_valid() {
    let empty = Graph::from_edges(0, 0, []).unwrap();
    for (result, what) in [
        (Graph::from_csr(0, vec![0], vec![]), "from_csr"),
        (Graph::from_mask(fill(&true, 0, 0)), "from_mask"),
        (Graph::window(0, 3), "window"),
        (Graph::block_diagonal(&[]), "block_diagonal"),
        (empty.with_self_loops(), "with_self_loops"),
        (empty.k_hop(3).map(|it| it.0), "k_hop"),
        (empty.select_queries(&[]).map(|it| it.0), "select_queries"),
        (Graph::expander(0, 0, &mut Xoshiro256PlusPlus::seed_from_u64(1)), "expander"),
        (Graph::union(&[&empty, &empty]).map(|it| it.0), "union"),
        (Ok(empty.transpose().clone()), "transpose"),
    ] {
        assert_eq!(result.as_ref(), Ok(&empty), "{what}");
    }
    assert_eq!(empty.hops_from(&[[], []] as &[[usize; 0]], -1.0).unwrap().dim(), (0, 2));
    assert_eq!(empty.hop_distances(&empty, 3, -1.0).unwrap().len(), 0);
}
