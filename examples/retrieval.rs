//! Attention over the keys that an index finds: how many of the nearest it finds, and what the missed ones do
//! to the output.
//!
//! ```sh
//! cargo run --release -p examples --example retrieval
//! ```
//!
//! Queries and keys are different projections of the same hidden states, as in a transformer, so queries are
//! not distributed like keys, and links between keys lead to their nearest keys less often. Each query
//! attends to the 32 keys that are found; then the weight of all others is estimated with random features and
//! added. Dev-dependency: `rand_distr`.

use graph_attention::ndarray::{Array2, Axis, s};
use graph_attention::neighbors::{
    ExactIndex, HnswConfig, Metric, NeighborIndex, NeighborSearch, Neighbors,
};
use graph_attention::rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Attention, Flash, Inputs, PerformerConfig, Result};
use rand_distr::StandardNormal;

const KEYS: usize = 8_000;
const QUERIES: usize = 100;
const DIM: usize = 32;
const K: usize = 32;

fn main() -> Result<()> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2409);
    let mut normal = |rows, columns| {
        Array2::from_shape_simple_fn((rows, columns), || rng.sample::<f32, _>(StandardNormal))
    };
    // The columns of hidden states have different sizes.
    let mut hidden = normal(KEYS + QUERIES, DIM);
    for (c, mut column) in hidden.columns_mut().into_iter().enumerate() {
        column *= 2.0 / (1.0 + c as f32).sqrt();
    }
    let [of_queries, of_keys, of_values] = [0; 3].map(|_| normal(DIM, DIM) / (DIM as f32).sqrt());
    let (keys, values) = (hidden.dot(&of_keys), hidden.dot(&of_values));
    let (keys, values) = (keys.slice(s![..KEYS, ..]), values.slice(s![..KEYS, ..]));
    let last = hidden.slice(s![KEYS.., ..]);

    let mut index = HnswConfig::new(Metric::Dot).connections(8).build(keys.to_owned())?;
    let exact = ExactIndex::new(keys, Metric::Dot)?;
    let performer = PerformerConfig::new(DIM, 256).init::<f32>(&mut rng)?;
    let mut state = performer.state(DIM)?;
    state.add(keys, values)?;

    let (flash, search) = (Flash::new(), NeighborSearch::new(K));
    println!("the {K} keys with the largest products, of {KEYS}");
    println!("queries       candidates  recall  error of the output  with an estimate of the rest");
    let mut errors = Vec::new();
    let kinds = [("like keys", last.dot(&of_keys)), ("of their own", last.dot(&of_queries))];
    for (kind, queries) in &kinds {
        let all = flash.forward(&Inputs::dense(queries.view(), keys, values)?)?;
        for candidates in [32, 64, KEYS] {
            index.set_ef_search(candidates)?;
            let (mut hits, mut squares) = (0, [0.0; 3]);
            for query in 0..QUERIES {
                let row = queries.row(query).insert_axis(Axis(0));
                let found = index.search(row, &search)?;
                let nearest = exact.search(row, &search)?;
                let has = |found: &Neighbors<f32>, key| found.graph.neighbors(0).contains(key);
                hits += nearest.graph.indices().iter().filter(|key| has(&found, key)).count();

                let some = Inputs::graph(row, keys, values, &found.graph)?;
                let partial = flash.forward_partial(&some)?;
                let alone = partial.out().to_owned();
                let merged = partial.merge(&state.attend_rest(&some)?)?;
                let all = all.row(query);
                let square = |out: &Array2<f32>| (&out.row(0) - &all).mapv(|e| e * e).sum();
                squares[0] += square(&alone);
                squares[1] += square(&merged.out().to_owned());
                squares[2] += all.dot(&all);
            }
            let recall = hits as f32 / (K * QUERIES) as f32;
            let [found, merged] = [0, 1].map(|i| (squares[i] / squares[2]).sqrt());
            println!("{kind:12} {candidates:11} {recall:7.3} {found:20.3} {merged:29.3}");
            errors.push((recall, found, merged));
        }
    }
    assert!(errors[0].0 > errors[3].0, "links are made for queries like keys");
    assert!(errors.iter().all(|&(_, found, merged)| merged < found));
    Ok(())
}
