//! Four sources of positions for rotary attention on one graph, and what a node can learn from each.
//!
//! ```sh
//! cargo run --release -p examples --features spectral --example positions
//! ```
//!
//! There are two villages of five people who all know each other; the only road between them joins their
//! mayors, nodes 4 and 5. Every node attends to all nodes, and the table shows the weights of mayor 4.
//! All nodes have the same features, so without positions all scores would be equal: all differences come
//! from the positions. No dev-dependency.

use graph_attention::ndarray::{Array2, array};
use graph_attention::{Attention, Graph, GraphRopeConfig, Inputs, graph_rope::Layout};
use graph_attention::{Result, ScaledDotProduct};

const N: usize = 10;
/// Enough for one pair of columns per axis, for N − 1 axes.
const COLUMNS: usize = 2 * (N - 1);

fn main() -> Result<()> {
    let village = |node: usize| node / 5;
    let is_mayor = |node: usize| node == 4 || node == 5;
    let knows = |i, j| i != j && (village(i) == village(j) || is_mayor(i) && is_mayor(j));
    let pairs = (0..N * N).map(|pair| (pair / N, pair % N));
    let graph = Graph::from_edges(N, N, pairs.clone().filter(|&(i, j)| knows(i, j)))?;
    let all_pairs = Graph::from_edges(N, N, pairs)?;
    let features = Array2::from_elem((N, COLUMNS), 2.0);
    let inputs = Inputs::self_attention(features.view(), &all_pairs)?;

    let same = |a: f64, b: f64| (a - b).abs() < 1e-12;
    println!("                              own village     |     other village");
    println!("                        itself  node 0  1 – 3 | mayor 5   6 – 9");
    let show = |source: &str, weights: Array2<f64>| {
        let of_mayor: Vec<f64> = all_pairs.row(4).map(|(_, pair)| weights[[pair, 0]]).collect();
        let [itself, anchor, friend, mayor, other] = [4, 0, 1, 5, 9].map(|node| of_mayor[node]);
        let is = |node: usize, shown: f64| (of_mayor[node] - shown).abs() < 5e-4;
        assert!((1..4).all(|node| is(node, friend)) && (6..N).all(|node| is(node, other)));
        println!("{source:<22} {itself:7.3} {anchor:7.3} {friend:6.3} | {mayor:7.3} {other:7.3}");
        of_mayor
    };
    let weights = show("no positions", ScaledDotProduct::new().attention_weights(&inputs)?);
    assert!(weights.iter().all(|&weight| same(weight, 1.0 / N as f64)), "all weights are equal");

    // A score decreases with the difference of two positions, as long as it is below π.
    let config = GraphRopeConfig::new(COLUMNS, Layout::Half);
    let by_node = config.init(ScaledDotProduct::new())?;

    // Coordinates: hops from node 0; infinity without a path.
    let hops = graph.hops_from(&[[0]], f64::INFINITY)?;
    let anchored = inputs.with_positions(hops.view(), hops.view())?;
    let weights = show("hops from node 0", by_node.attention_weights(&anchored)?);
    assert!(same(weights[1], weights[4]), "as far from the anchor as itself");
    assert!(same(weights[0], weights[5]), "one hop nearer is like one hop farther");
    assert!(weights[4] > weights[5] && weights[5] > weights[9], "farther nodes have less weight");

    // A number per pair, which need not come from coordinates: the hops between the two nodes.
    let between = graph.hop_distances(&all_pairs, N, f64::INFINITY)?;
    let apart = inputs.with_distances(between.view())?;
    let weights = show("hops of the pair", config.init_edges()?.attention_weights(&apart)?);
    assert!(weights[4] > weights[1] && weights[1] > weights[9], "weights fall with every hop");
    assert!(same(weights[1], weights[5]), "nodes one hop away are equal, in either village");

    // Other properties of a node, such as its level in a hierarchy.
    let levels = Array2::from_shape_fn((N, 1), |(node, _)| f64::from(is_mayor(node)));
    let ranked = inputs.with_positions(levels.view(), levels.view())?;
    let weights = show("level", by_node.attention_weights(&ranked)?);
    assert!(same(weights[4], weights[5]) && weights[5] > weights[1], "mayors see mayors");
    assert!(same(weights[1], weights[9]), "villages make no difference");

    // Spectral coordinates: the squared distance is the resistance between the nodes, which decreases
    // with every additional path. With as many axes as pairs of columns, all turn equally fast.
    let spectral = graph.spectral_coordinates(N - 1, None)?;
    let resistance = |j| (&spectral.row(4) - &spectral.row(j)).mapv(|x: f64| x * x).sum();
    let embedded = inputs.with_positions(spectral.view(), spectral.view())?;
    let by_axes = config.axes(N - 1).init(ScaledDotProduct::new())?;
    let weights = show("spectral", by_axes.attention_weights(&embedded)?);
    println!("resistance, in theory    0.000   0.400  0.400 |   1.000   1.400");
    // It is 2/5 between five nodes that all know each other, and 1 along a road without a detour.
    let expected = array![0.4, 0.4, 0.4, 0.4, 0.0, 1.0, 1.4, 1.4, 1.4, 1.4];
    assert!((0..N).all(|node| same(resistance(node), expected[node])), "agrees with the theory");
    assert!(weights[1] > weights[5], "at one hop, nodes with more paths are nearer");
    assert!(weights[4] > weights[1] && weights[5] > weights[9], "more resistance, less weight");
    Ok(())
}
