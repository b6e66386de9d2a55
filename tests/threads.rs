//! Results have the same bits for any number of threads.
#![cfg(feature = "parallel")]

use graph_attention::ndarray::{Array1, Array2, s};
use graph_attention::neighbors::{ExactIndex, HnswConfig, Metric, NeighborIndex, NeighborSearch};
use graph_attention::{
    Attention, Causal, DualSpaceConfig, Flash, Gradients, Graph, GraphRopeConfig, Inputs,
    LocalGlobal, MoeConfig, MultiHeadConfig, PerformerConfig, PoincareConfig, ScaledDotProduct,
    StackConfig, TransformerLayerConfig,
    dual_space::{Fusion, LatentSearch},
    graph_rope::Layout,
    local_global::Window,
    poincare::{Aggregation, Coordinates},
    rowwise::{Activation, NormConfig, Normalization},
    score::{Alibi, BucketBias, Buckets, Sinks, SoftCap},
};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};

fn run(
    threads: usize,
    attention: &dyn Attention<f32>,
    inputs: &Inputs<'_, f32>,
) -> (Array2<f32>, Gradients<f32>) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let (out, saved) = attention.forward_train(inputs).unwrap();
        let grads = attention.backward(inputs, &saved, out.view()).unwrap();
        (out, grads)
    })
}

#[test]
fn one_two_and_seven_threads_give_the_same_bits() {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    // Enough work to be split between threads.
    let (n, columns) = (700, 32);
    let x = Array2::from_shape_simple_fn((n, columns), || StandardNormal.sample(&mut rng));
    let logits = Array2::from_shape_simple_fn((n, n), || rng.random_range(-1.0..1.0f32));
    let edges: Vec<_> =
        (0..300 * n).map(|_| (rng.random_range(0..n), rng.random_range(0..n))).collect();
    // A query, and a key, with so many edges that their rows are split.
    let hubs = (0..60 * n).map(|at| (0, at % n)).chain((0..60 * n).map(|at| (at % n, 1)));
    let graph = Graph::from_edges(n, n, edges.into_iter().chain(hubs)).unwrap();
    let edge_logits = Array2::from_shape_fn((graph.num_edges(), 1), |(e, _)| (e % 7) as f32);
    let multi_head = MultiHeadConfig::new(columns, 4).init(Flash::new(), &mut rng).unwrap();

    let dense = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let sparse = Inputs::graph(x.view(), x.view(), x.view(), &graph).unwrap();
    for inputs in [
        dense.with_heads(2).unwrap(),
        dense.with_causal_alignment(Causal::BottomRight),
        dense.with_bias(logits.view()).unwrap(),
        sparse.with_heads(4).unwrap(),
        sparse.with_bias(edge_logits.view()).unwrap(),
    ] {
        let one = run(1, &Flash::new(), &inputs);
        assert_eq!(one, run(2, &Flash::new(), &inputs));
        assert_eq!(one, run(7, &Flash::new(), &inputs));
    }
    // With gradients of parameters of a score function.
    let score = (
        (Alibi::new(4).unwrap().learned(), SoftCap::new(3.0).unwrap()),
        (BucketBias::new(Buckets::clipped(20).unwrap(), 4).unwrap(), Sinks::new(4).unwrap()),
    );
    let attention = Flash::new().with_score(score);
    for inputs in [dense.with_causal(), sparse] {
        let inputs = inputs.with_heads(4).unwrap();
        let one = run(1, &attention, &inputs);
        assert_eq!(one, run(2, &attention, &inputs));
        assert_eq!(one, run(7, &attention, &inputs));
    }
    // In tiles and in rows; far from the center, where sums are taken a second time, and near it.
    for (factor, inputs) in [(1.0, dense), (1.0, sparse), (0.1, dense.with_causal())] {
        let near = x.mapv(|x| factor * x);
        let inputs = inputs.with_arrays(near.view(), near.view(), near.view()).unwrap();
        for aggregation in [Aggregation::Midpoint, Aggregation::TangentAtOrigin] {
            let config = PoincareConfig::new().coordinates(Coordinates::Tangent);
            let poincare = config.aggregation(aggregation).learn_curvature(true).init().unwrap();
            let one = run(1, &poincare, &inputs);
            assert_eq!(one, run(2, &poincare, &inputs));
            assert_eq!(one, run(7, &poincare, &inputs));
        }
    }
    let performer = PerformerConfig::new(8, 64).init(&mut rng).unwrap();
    for inputs in [dense, dense.with_causal(), sparse] {
        let inputs = inputs.with_heads(4).unwrap();
        let one = run(1, &performer, &inputs);
        assert_eq!(one, run(2, &performer, &inputs));
        assert_eq!(one, run(7, &performer, &inputs));
    }
    let experts = (1..5).map(|_| {
        let expert = MultiHeadConfig::new(columns, 4).init(Flash::new(), &mut rng).unwrap();
        Box::new(expert) as Box<dyn Attention<f32>>
    });
    let experts = experts.collect();
    let moe = MoeConfig::new(columns, 2).init(experts, &mut rng).unwrap();
    let config = GraphRopeConfig::new(columns, Layout::Half).learn_frequencies(true);
    let positions = Array2::from_shape_fn((n, 1), |(node, _)| node as f32 / 7.0);
    for inputs in [dense, sparse] {
        let distances =
            (0..inputs.num_pairs()).map(|pair| (pair % 11) as f32).collect::<Array1<_>>();
        let inputs = inputs.with_positions(positions.view(), positions.view()).unwrap();
        let inputs = inputs.with_distances(distances.view()).unwrap();
        let of_nodes = config.init(Flash::new()).unwrap();
        let of_edges = config.init_edges().unwrap();
        for rope in [&of_nodes as &dyn Attention<f32>, &of_edges] {
            let one = run(1, rope, &inputs);
            assert_eq!(one, run(2, rope, &inputs));
            assert_eq!(one, run(7, rope, &inputs));
        }
    }
    let [linear, gated] = [Fusion::Linear { output_dim: 23 }, Fusion::Gated].map(|fusion| {
        let config = DualSpaceConfig::new(fusion, columns);
        let dual = config.init(multi_head.clone(), Flash::new(), Flash::new(), &mut rng).unwrap();
        dual.with_search(LatentSearch::new(7, Metric::Cosine))
    });
    for attention in [&linear as &dyn Attention<f32>, &gated] {
        for inputs in [sparse, dense.with_causal()] {
            let one = run(1, attention, &inputs);
            assert_eq!(one, run(2, attention, &inputs));
            assert_eq!(one, run(7, attention, &inputs));
        }
    }
    let layer = TransformerLayerConfig::new(columns, 200).activation(Activation::Gelu).gated(true);
    let layer = layer.init(multi_head.clone(), &mut rng).unwrap();
    let config = StackConfig::new().norm(NormConfig::new(Normalization::Layer, columns));
    let stack = config.init([layer.clone(), layer]).unwrap();
    let plain = ScaledDotProduct::new();
    for attention in [&multi_head as &dyn Attention<f32>, &moe, &plain, &stack] {
        for inputs in [dense, sparse, dense.with_causal()] {
            assert_eq!(run(1, attention, &inputs), run(7, attention, &inputs));
        }
    }
}

#[test]
fn windows_and_layers_give_the_same_bits() {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
    let n = 1_009;
    let x = Array2::from_shape_simple_fn((n, 32), || StandardNormal.sample(&mut rng));
    let dense = Inputs::dense(x.view(), x.view(), x.view()).unwrap().with_heads(2).unwrap();
    let layers: Vec<u8> = (0..n * n).map(|_| rng.random_range(0..3)).collect();
    let sliding_window = |window| LocalGlobal::sliding_window(window, Flash::new()).unwrap();
    let flash = || Box::new(Flash::new()) as Box<dyn Attention<f32>>;
    let gate = LocalGlobal::gated(16, 2, flash(), flash(), &mut rng).unwrap();
    for attention in [
        sliding_window(Window::new(300)),
        sliding_window(Window::new(200).dilation(2).globals(&[0, 500])),
        LocalGlobal::joint(Flash::new(), Flash::new()),
        gate,
    ] {
        let inputs = dense.with_edge_layers(&layers).unwrap();
        for inputs in [inputs, inputs.with_causal()] {
            let one = run(1, &attention, &inputs);
            assert_eq!(one, run(2, &attention, &inputs));
            assert_eq!(one, run(7, &attention, &inputs));
        }
    }
}

#[test]
fn neighbours_are_the_same_for_any_number_of_threads() {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2);
    let x: Array2<f32> =
        Array2::from_shape_simple_fn((1_009, 31), || StandardNormal.sample(&mut rng));
    let search = NeighborSearch::new(7).exclude_self(true);
    let mut one_index = None;
    for metric in [Metric::Cosine, Metric::Dot, Metric::Euclidean] {
        let index = ExactIndex::new(x.view(), metric).unwrap();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| index.search(x.view(), &search).unwrap())
        };
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(7));
    }
    for threads in [1, 2, 7] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let result = pool.install(|| {
            let config = HnswConfig::new(Metric::Cosine).connections(4).ef_search(10);
            let mut index = config.build(x.slice(s![..700, ..]).to_owned()).unwrap();
            index.insert(x.slice(s![700.., ..])).unwrap();
            index.remove(&[3, 800]).unwrap();
            // Few queries at a time follow links.
            let few = x.slice(s![..20, ..]);
            let found = index.search(few, &NeighborSearch::new(7)).unwrap();
            (found, index.search(x.view(), &search).unwrap(), index.links().unwrap())
        });
        assert_eq!(one_index.get_or_insert(result.clone()), &result);
    }
}
