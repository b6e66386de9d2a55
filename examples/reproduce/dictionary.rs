//! A dictionary: every query asks for the value of one key, and any key can have any value (Brody et al. 2022,
//! 2105.14491). Within a head, the scores of GAT rank the keys in the same order for all queries, so it can look up
//! only a few; those of GATv2 can look up all.

use examples::{Adam, metrics};
use graph_attention::edge_gat::Score;
use graph_attention::ndarray::Array2;
use graph_attention::rand::{Rng, RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Attention, EdgeGatConfig, Graph, Inputs, LinearConfig};
use std::error::Error;

/// The number of keys, of their queries, and of values.
const KEYS: usize = 10;
/// The queries of a batch of dictionaries.
const QUERIES: usize = 64 * KEYS;

/// Returns the accuracy on new dictionaries, in percent.
pub fn run(score: Score, heads: usize, seed: u64) -> Result<f64, Box<dyn Error>> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let config = EdgeGatConfig::new(score, KEYS, 64, heads).key_dim(2 * KEYS);
    let mut layer = config.init(&mut rng)?;
    let mut head = LinearConfig::new(64 * heads, KEYS).init(&mut rng)?;
    let mut adams = [Adam::new(0.003, &layer), Adam::new(0.003, &head)];
    // Query i of a dictionary asks for its key i and attends to all its keys.
    let query = Array2::from_shape_fn((QUERIES, KEYS), |(i, key)| f32::from(i % KEYS == key));
    let keys_of = |i: usize| i - i % KEYS..i - i % KEYS + KEYS;
    let pairs = (0..QUERIES).flat_map(|i| keys_of(i).map(move |key| (i, key)));
    let graph = Graph::from_edges(QUERIES, QUERIES, pairs)?;
    for _step in 0..600 {
        let (key, answers) = dictionaries(&mut rng);
        let inputs = Inputs::graph(query.view(), key.view(), key.view(), &graph)?;
        let (hidden, saved) = layer.forward_train(&inputs)?;
        let logits = head.forward(hidden.view())?;
        let (_, grad) = metrics::cross_entropy(&logits, &answers);
        let of_head = head.backward(hidden.view(), grad.view())?;
        let of_layer = layer.backward_params(&inputs, &saved, of_head.x.view())?;
        adams[0].step(&mut layer, &of_layer)?;
        adams[1].step(&mut head, &of_head.params)?;
    }
    let (key, answers) = dictionaries(&mut rng);
    let inputs = Inputs::graph(query.view(), key.view(), key.view(), &graph)?;
    let logits = head.forward(layer.forward(&inputs)?.view())?;
    Ok(100.0 * metrics::accuracy(&logits, &answers))
}

/// Draws dictionaries: rows with a column for each key and each value, and the value that each query asks for.
fn dictionaries(rng: &mut impl Rng) -> (Array2<f32>, Vec<(usize, usize)>) {
    let answers: Vec<_> = (0..QUERIES).map(|i| (i, rng.random_range(0..KEYS))).collect();
    let mut rows = Array2::zeros((QUERIES, 2 * KEYS));
    for &(i, value) in &answers {
        rows[[i, i % KEYS]] = 1.0;
        rows[[i, KEYS + value]] = 1.0;
    }
    (rows, answers)
}
