//! Loads a graph network trained in PyG and reproduces PyG's output: a `GATv2Conv` with two heads, ELU,
//! and a `GATConv`, both with edge features, from one safetensors file.
//!
//! ```sh
//! cargo run --release -p examples --example load_pyg --features safetensors
//! ```
//!
//! In PyG, write the file with `safetensors.torch.save_file(model.state_dict(), path)`; this file also
//! contains the nodes, edge features and outputs of a graph for comparison. No dev-dependency.

use graph_attention::ndarray::{Array2, ArrayD, Ix2};
use graph_attention::{
    Attention, EdgeGat, EdgeGatConfig, Graph, Inputs, edge_gat::Score, safetensors,
};
use std::error::Error;
use std::path::Path;

/// PyG's `edge_index`: sources, then targets.
#[rustfmt::skip]
const EDGE_INDEX: [[usize; 14]; 2] = [
    [0, 2, 1, 4, 3, 1, 5, 2, 0, 5, 2, 4, 0, 3],
    [1, 3, 0, 5, 4, 2, 0, 2, 3, 4, 1, 1, 0, 5],
];

fn main() -> Result<(), Box<dyn Error>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/pyg_gat.safetensors");
    // A layer's parameters have its name as prefix; sizes and options are not in the file.
    let layer = |prefix| safetensors::read::<f32>(&file, prefix);
    let first = EdgeGatConfig::new(Score::GatV2, 4, 3, 2).edge_dim(2);
    let first = first.from_params(layer("conv1.")?)?;
    let second = EdgeGatConfig::new(Score::Gat, 6, 2, 1).edge_dim(2);
    let second = second.from_params(layer("conv2.")?)?;

    let array = |name| -> Result<Array2<f32>, Box<dyn Error>> {
        let mut tensors: Vec<(String, ArrayD<f32>)> = safetensors::read(&file, name)?;
        let (_, array) = tensors.pop().ok_or_else(|| format!("no {name} in the file"))?;
        Ok(array.into_dimensionality::<Ix2>()?)
    };
    let (x, edge_attr, expected) =
        (array("graph.x")?, array("graph.edge_attr")?, array("graph.out")?);

    // Targets are the queries, sources the keys.
    let [sources, targets] = EDGE_INDEX;
    let graph = Graph::from_edges(x.nrows(), x.nrows(), targets.into_iter().zip(sources))?;
    let forward = |layer: &EdgeGat<f32>, x: &Array2<f32>| {
        let inputs = Inputs::self_attention(x.view(), &graph)?;
        layer.forward(&inputs.with_edge_features(edge_attr.view())?)
    };
    let hidden = forward(&first, &x)?;
    let hidden = hidden.mapv(|h| if h > 0.0 { h } else { h.exp_m1() });
    let out = forward(&second, &hidden)?;

    println!("node       this crate           PyG");
    for (node, (ours, theirs)) in out.rows().into_iter().zip(expected.rows()).enumerate() {
        println!("{node:4}   {ours:>8.5}   {theirs:>8.5}");
    }
    let largest = (&out - &expected).iter().fold(0f32, |max, difference| max.max(difference.abs()));
    println!("largest difference {largest:.1e}");
    assert!(largest < 1e-5);
    Ok(())
}
