//! Trains a graph layer to recognise a node's neighbours: multi-head attention over the edges of a ring,
//! trained by gradient descent with the crate's backward pass.
//!
//! ```sh
//! cargo run --release -p examples --example graph_layer
//! ```

use graph_attention::ndarray::{Array2, Axis};
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Attention, Flash, Graph, Inputs, MultiHeadConfig, Result, params};

fn main() -> Result<()> {
    // Twelve nodes in a ring; each attends to its two neighbours.
    let n = 12;
    let ring = (0..n).flat_map(|i| [(i, (i + 1) % n), (i, (i + n - 1) % n)]);
    let graph = Graph::from_edges(n, n, ring)?;
    // Each node has its own column; it should output the mean of its neighbours' columns.
    let nodes = Array2::<f32>::eye(n);
    let mut target = Array2::<f32>::zeros((n, n));
    for node in 0..n {
        for &neighbour in graph.neighbors(node) {
            target.row_mut(node).scaled_add(0.5, &nodes.index_axis(Axis(0), neighbour as usize));
        }
    }

    let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
    let mut layer = MultiHeadConfig::new(n, 2).head_dim(8).init(Flash::new(), &mut rng)?;
    let inputs = Inputs::self_attention(nodes.view(), &graph)?;
    let mut losses = Vec::new();
    for step in 0..=300 {
        let (out, saved) = layer.forward_train(&inputs)?;
        // The loss is half of the squared error, so its gradient is the error.
        let error = out - &target;
        losses.push(0.5 * error.mapv(|e| e * e).sum());
        if step % 100 == 0 {
            println!("step {step:3}: loss {:.4}", losses[step]);
        }
        let grads = layer.backward(&inputs, &saved, error.view())?;
        params::update(&mut layer, &grads.params, |_name, mut param, grad| {
            param.scaled_add(-0.05, &grad);
        })?;
    }
    assert!(losses[300] < losses[0] / 20.0, "it learns");
    Ok(())
}
