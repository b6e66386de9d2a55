//! One vector attends to its neighbours, as in vector search: the neighbours returned by an index are
//! averaged with weights by how well they match, and the results of two shards are merged into the exact
//! result.
//!
//! ```sh
//! cargo run --release -p examples --example single_query
//! ```
//!
//! No dev-dependency.

use graph_attention::ndarray::{array, s};
use graph_attention::{Attention, Flash, Inputs, Result};

fn main() -> Result<()> {
    let query = array![1.0f64, 0.0, 1.0];
    // The results of the index: embeddings and known values.
    let neighbours = array![[0.9, 0.1, 0.8], [0.2, 1.0, 0.1], [1.0, 0.0, 0.6], [-1.0, 0.3, -0.5]];
    let payloads = array![[10.0], [20.0], [30.0], [40.0]];

    // A higher scale than 1/√d makes the best matches count more.
    let attention = Flash::new().with_scale(2.0)?;
    let inputs = Inputs::single(query.view(), neighbours.view(), payloads.view())?;
    let weights = attention.attention_weights(&inputs)?;
    let out = attention.forward(&inputs)?;
    for (neighbour, weight) in weights.column(0).iter().enumerate() {
        println!("neighbour {neighbour}: weight {weight:.3}");
    }
    println!("weighted mean of the values: {:.3}", out[[0, 0]]);
    assert!((weights.sum() - 1.0).abs() < 1e-12);
    assert!(weights[[0, 0]] > weights[[2, 0]] && weights[[2, 0]] > weights[[1, 0]]);

    // Each of two shards has two of the neighbours and never sees the others.
    let shard = |rows: std::ops::Range<usize>| {
        let (keys, values) = (s![rows.clone(), ..], s![rows, ..]);
        let (keys, values) = (neighbours.slice(keys), payloads.slice(values));
        attention.forward_partial(&Inputs::single(query.view(), keys, values)?)
    };
    let merged = shard(0..2)?.merge(&shard(2..4)?)?;
    println!("merged from two shards: {:.3}", merged.out()[[0, 0]]);
    assert!((merged.out()[[0, 0]] - out[[0, 0]]).abs() < 1e-12);
    Ok(())
}
