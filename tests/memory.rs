//! Peak memory besides inputs and outputs, measured with a counting allocator.

mod common;

use allocation_counter::AllocationInfo;
use common::on_one_thread;
use common::random::rng;
use graph_attention::ndarray::{Array1, Array2};
use graph_attention::neighbors::Metric;
use graph_attention::{
    Attention, Causal, DualSpace, DualSpaceConfig, EdgeGatConfig, EdgeRope, Flash, Gradients,
    Graph, GraphRope, GraphRopeConfig, Inputs, LocalGlobal, Moe, MoeConfig, MultiHead,
    MultiHeadConfig, Performer, PerformerConfig, Poincare, PoincareConfig, ScaledDotProduct,
    dual_space::{Fusion, LatentSearch},
    edge_gat::Score,
    graph_rope::Layout,
    local_global::Window,
    poincare::Coordinates,
    score::{BucketBias, Buckets, SoftCap},
};

const COLUMNS: usize = 4;

fn matrix(rows: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, COLUMNS), |(i, j)| ((i * 31 + j * 17) % 97) as f32 / 97.0)
}

/// Measures the allocations of a forward and backward pass into arrays of the caller.
fn training(attention: &dyn Attention<f32>, inputs: &Inputs<'_, f32>) -> AllocationInfo {
    let mut out = Array2::zeros((inputs.num_queries(), COLUMNS));
    let grad_out = Array2::ones(out.raw_dim());
    let mut grads = Gradients::zeros(inputs, attention).unwrap();
    on_one_thread(|| {
        let saved = attention.forward_train_into(inputs, out.view_mut()).unwrap();
        let grads = grads.view_mut();
        attention.backward_into(inputs, &saved, grad_out.view(), grads).unwrap();
    })
}

fn dense_training_peak(attention: &dyn Attention<f32>, n: usize) -> u64 {
    let (x, at) = (matrix(n), positions(n));
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap().with_causal();
    training(attention, &inputs.with_positions(at.view(), at.view()).unwrap()).bytes_max
}

fn positions(n: usize) -> Array2<f32> {
    Array2::from_shape_fn((n, 1), |(node, _)| node as f32)
}

/// For `heads` heads.
fn rope(heads: usize) -> GraphRope<f32, Flash> {
    let config = GraphRopeConfig::new(COLUMNS / heads, Layout::Half).learn_frequencies(true);
    config.init(Flash::new()).unwrap()
}

fn edge_rope(heads: usize) -> EdgeRope<f32> {
    GraphRopeConfig::new(COLUMNS / heads, Layout::Half).init_edges().unwrap()
}

/// With the means that are not computed pair by pair.
fn poincare() -> Poincare<f32> {
    PoincareConfig::new().coordinates(Coordinates::Tangent).learn_curvature(true).init().unwrap()
}

fn performer(head_dim: usize) -> Performer<f32> {
    PerformerConfig::new(head_dim, 8).init(&mut rng(1)).unwrap()
}

/// With experts that need no memory per pair.
fn moe() -> Moe<f32> {
    let experts = (0..4).map(|_| Box::new(Flash::new()) as Box<dyn Attention<f32>>).collect();
    let mut rng = rng(1);
    MoeConfig::new(COLUMNS, 2).init(experts, &mut rng).unwrap()
}

fn multi_head() -> MultiHead<f32, Flash> {
    let mut rng = rng(1);
    MultiHeadConfig::new(COLUMNS, 2).init(Flash::new(), &mut rng).unwrap()
}

/// With a search among all keys.
fn dual() -> DualSpace<f32> {
    let mut rng = rng(1);
    let config = DualSpaceConfig::new(Fusion::Gated, COLUMNS);
    let dual = config.init(Flash::new(), Flash::new(), Flash::new(), &mut rng).unwrap();
    dual.with_search(LatentSearch::new(4, Metric::Cosine))
}

/// For a mechanism with so many heads.
fn trains_in_memory_linear_in_n(attention: &dyn Attention<f32>, heads: u64) {
    let peaks: Vec<u64> =
        [1, 2, 4, 8].map(|k| dense_training_peak(attention, k * 1024)).into_iter().collect();
    // From 2k on the queries are split into a fixed number of parts, below into fewer.
    assert!(peaks[0] <= peaks[1], "{}: {peaks:?}", attention.name());
    for doubled in peaks[1..].windows(2) {
        assert!(doubled[1] <= doubled[0] * 21 / 10, "{}: {peaks:?}", attention.name());
    }
    // Far less than one number per pair and head: at 8k by a factor of twenty. Most of it are sums of gradients, in rows
    // of two vectors for each head.
    assert!(peaks[3] < 8 * 1024 * 8 * 1024 * 4 * heads / 20, "{}: {peaks:?}", attention.name());
}

#[test]
fn without_a_number_for_each_pair_they_train_in_memory_linear_in_n() {
    trains_in_memory_linear_in_n(&Flash::new(), 1);
    let scores = (
        BucketBias::new(Buckets::t5(32, 128, true).unwrap(), 1).unwrap(),
        SoftCap::new(9.0).unwrap(),
    );
    trains_in_memory_linear_in_n(&Flash::new().with_score(scores), 1);
    trains_in_memory_linear_in_n(&multi_head(), 2);
    trains_in_memory_linear_in_n(&poincare(), 1);
    trains_in_memory_linear_in_n(&performer(COLUMNS), 1);
    // The causal pattern of selected queries needs no quadratic memory either.
    trains_in_memory_linear_in_n(&moe(), 1);
    trains_in_memory_linear_in_n(&rope(1), 1);
    trains_in_memory_linear_in_n(&dual(), 1);
}

#[test]
fn a_window_and_globals_train_in_memory_linear_in_n() {
    for window in [
        Window::new(16),
        Window::new(5).dilation(3),
        Window::new(16).globals(&[0, 7, 900]),
        Window::new(3).dilation(2).globals(&[1_000]),
    ] {
        let attention = LocalGlobal::sliding_window(window, Flash::new()).unwrap();
        let peaks: Vec<u64> =
            (0..8).map(|doublings| dense_training_peak(&attention, 1024 << doublings)).collect();
        assert!(peaks[0] <= peaks[1], "{attention:?}: {peaks:?}");
        for doubled in peaks[1..].windows(2) {
            assert!(doubled[1] <= doubled[0] * 21 / 10, "{attention:?}: {peaks:?}");
        }
        // Most of it sums of gradients of keys and values, in rows of 32 columns; at 128k a number for
        // each pair would be 800 times as much.
        assert!(peaks[7] < (128 << 10) * 160 * 4, "{attention:?}: {peaks:?}");
    }
}

#[test]
fn a_window_of_one_query_takes_the_same_memory_over_any_number_of_keys() {
    let bytes = |attention: &dyn Attention<f32>, n: usize, causal: Causal| {
        let (query, cache) = (matrix(1), matrix(n));
        let inputs = Inputs::dense(query.view(), cache.view(), cache.view()).unwrap();
        let inputs = inputs.with_causal_alignment(causal);
        let mut out = Array2::zeros((1, COLUMNS));
        on_one_thread(|| attention.forward_into(&inputs, out.view_mut()).unwrap()).bytes_total
    };
    let mut mechanisms: Vec<(Box<dyn Attention<f32>>, Causal)> = vec![
        (Box::new(Flash::new()), Causal::TopLeft),
        (Box::new(Flash::new()), Causal::Offset(200)),
    ];
    for window in [
        Window::new(100),
        Window::new(30).dilation(7),
        Window::new(50).globals(&[0, 1, 2, 3]),
        Window::new(50).dilation(2).globals(&[0, 3]),
    ] {
        let window = LocalGlobal::sliding_window(window, Flash::new()).unwrap();
        mechanisms.push((Box::new(window), Causal::BottomRight));
    }
    for (attention, causal) in mechanisms {
        let [few, many] = [10_000, 200_000].map(|n| bytes(&*attention, n, causal));
        assert!(few == many && few > 0, "{attention:?}: {few} {many}");
    }
}

/// The causal pattern of a preallocated cache, and a graph, show the query 32 keys.
#[test]
fn a_query_of_few_keys_takes_the_same_memory_over_any_number_of_keys() {
    let gat = EdgeGatConfig::new(Score::GatV2, COLUMNS, 2, 2).init::<f32>(&mut rng(1)).unwrap();
    let mechanisms: [&dyn Attention<f32>; 5] =
        [&Flash::new(), &gat, &poincare(), &performer(COLUMNS), &edge_rope(1)];
    for attention in mechanisms {
        for what in ["causal", "graph", "graph with a bias"] {
            if what == "graph with a bias" && attention.name() == "edge_gat" {
                continue; // refuses a bias
            }
            let bytes = |n: usize| {
                let (query, cache) = (matrix(1), matrix(n));
                let edges = (0..32).map(|edge| (0, edge * n / 32));
                let graph = Graph::from_edges(1, n, edges).unwrap();
                let inputs = match what {
                    "causal" => Inputs::dense(query.view(), cache.view(), cache.view())
                        .unwrap()
                        .with_causal_alignment(Causal::Offset(31)),
                    _ => Inputs::graph(query.view(), cache.view(), cache.view(), &graph).unwrap(),
                };
                let distances = Array1::ones(inputs.num_pairs());
                let bias = Array2::zeros((32, 1));
                let inputs = inputs.with_distances(distances.view()).unwrap();
                let inputs = match what {
                    "graph with a bias" => inputs.with_bias(bias.view()).unwrap(),
                    _ => inputs,
                };
                let mut out = Array2::zeros((1, COLUMNS));
                on_one_thread(|| attention.forward_into(&inputs, out.view_mut()).unwrap())
                    .bytes_total
            };
            // Equal steps from key to key in both.
            let [few, many] = [12_800, 204_800].map(bytes);
            assert!(few == many && few > 0, "{}, {what}: {few} {many}", attention.name());
        }
    }
}

#[test]
fn scaled_dot_product_trains_in_quadratic_memory() {
    let plain = ScaledDotProduct::new();
    let [one, two] = [1024, 2048].map(|n| dense_training_peak(&plain, n));
    assert!(two > one * 39 / 10, "{one} {two}");
}

#[test]
fn on_a_graph_no_memory_is_needed_per_edge() {
    let n = 2000;
    let x = matrix(n);
    let at = positions(n);
    let peak = |attention: &dyn Attention<f32>, degree: usize| {
        let neighbours = |i: usize| (0..degree).map(move |j| (i, (i * 7 + j * 13) % n));
        let graph = Graph::from_edges(n, n, (0..n).flat_map(neighbours)).unwrap();
        let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph).unwrap();
        let inputs = inputs.with_positions(at.view(), at.view()).unwrap();
        // Part of the graph: computed once and kept there.
        let _ = graph.transpose();
        training(attention, &inputs).bytes_max
    };
    for attention in [&Flash::new() as &dyn Attention<f32>, &poincare(), &rope(1)] {
        let (few, many) = (peak(attention, 64), peak(attention, 256));
        assert!(many < few * 11 / 10, "{}: {few} {many}", attention.name());
    }
}

#[test]
fn inference_allocates_a_constant_number_of_times() {
    let count = |attention: &dyn Attention<f32>, n: usize, sparse: bool| {
        let x = matrix(n);
        let graph = Graph::window(n, 3).unwrap();
        let inputs = if sparse {
            Inputs::graph(x.view(), x.view(), x.view(), &graph).unwrap()
        } else {
            Inputs::dense(x.view(), x.view(), x.view()).unwrap()
        };
        let (at, distances) = (positions(n), Array1::ones(graph.num_edges()));
        let inputs = inputs.with_heads(2).unwrap();
        let inputs = inputs.with_positions(at.view(), at.view()).unwrap();
        let inputs = if sparse { inputs.with_distances(distances.view()).unwrap() } else { inputs };
        let mut out = Array2::zeros((n, COLUMNS));
        on_one_thread(|| attention.forward_into(&inputs, out.view_mut()).unwrap()).count_total
    };
    let plain = ScaledDotProduct::new();
    let performer = performer(COLUMNS / 2);
    let ropes: [&dyn Attention<f32>; 2] = [&rope(2), &edge_rope(2)];
    let others = [&Flash::new() as &dyn Attention<f32>, &plain, &poincare(), &performer];
    for attention in others.into_iter().chain(ropes) {
        // These store all weights or read a distance per pair: so many nodes are only possible on a graph.
        let is_sparse = ["scaled_dot_product", "edge_rope"].contains(&attention.name());
        for sparse in [is_sparse, true] {
            // Small problems are split into fewer parts.
            let [few, many] = [5_000, 10_000].map(|n| count(attention, n, sparse));
            assert!(few == many && few > 0, "{}: {few} {many}", attention.name());
        }
    }
}
