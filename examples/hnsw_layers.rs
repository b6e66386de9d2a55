//! Local and global attention over the layers of an HNSW index.
//!
//! ```sh
//! cargo run --release -p examples --example hnsw_layers
//! ```
//!
//! An index for nearest neighbours is already a graph to attend over: layer 0 links nearby vectors, the
//! layers above are long links. Each of 2,000 vectors starts with the number of its cluster as its value
//! and attends in several rounds; its value then shows which clusters have reached it. Dev-dependency:
//! `rand_distr`.

use graph_attention::ndarray::Array2;
use graph_attention::neighbors::{HnswConfig, Metric};
use graph_attention::rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Attention, Flash, Graph, Inputs, LocalGlobal, Result};
use rand_distr::StandardNormal;

const VECTORS: usize = 2_000;
const CLUSTERS: usize = 20;

fn main() -> Result<()> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2018);
    let mut normal = || rng.sample::<f32, _>(StandardNormal);
    let centers = Array2::from_shape_simple_fn((CLUSTERS, 16), || 4.0 * normal());
    let cluster = |vector: usize| vector % CLUSTERS;
    let x = Array2::from_shape_fn((VECTORS, 16), |(vector, column)| {
        centers[[cluster(vector), column]] + normal()
    });

    let index = HnswConfig::new(Metric::Euclidean).connections(8).build(x.clone())?;
    let (graph, layers) = index.links()?;
    let of_query = |query| graph.row(query).map(move |(key, pair)| (query, key, pair));
    let links: Vec<_> = (0..VECTORS).flat_map(of_query).collect();
    println!("{VECTORS} vectors in {CLUSTERS} clusters, {} links", links.len());
    println!("layer  links  mean distance  to another cluster");
    let mut means = Vec::new();
    for layer in 0..=layers.iter().copied().max().unwrap_or(0) {
        let (mut count, mut sum, mut away) = (0, 0.0, 0);
        for &(query, key, _) in links.iter().filter(|&&(_, _, pair)| layers[pair] == layer) {
            let difference = &x.row(query) - &x.row(key);
            sum += difference.dot(&difference).sqrt();
            away += usize::from(cluster(query) != cluster(key));
            count += 1;
        }
        means.push(sum / count as f32);
        let away = 100.0 * away as f32 / count as f32;
        println!("{layer:5} {count:6} {:14.1} {away:18.0} %", sum / count as f32);
    }
    assert!(means.is_sorted(), "links of higher layers are longer");

    // Scores by similarity would hide distant vectors, so all links get the same weight: the scale is 0.
    let flash = Flash::new().with_scale(0.0)?;
    let both = LocalGlobal::joint(flash.clone(), flash.clone());
    let near = links.iter().filter(|&&(_, _, pair)| layers[pair] == 0);
    let local = Graph::from_edges(VECTORS, VECTORS, near.map(|&(query, key, _)| (query, key)))?;
    let start = Array2::from_shape_fn((VECTORS, CLUSTERS), |(vector, column)| {
        if cluster(vector) == column { 1f32 } else { 0.0 }
    });
    let (mut of_local, mut of_both) = (start.clone(), start);
    println!("mean number of clusters that have reached a vector");
    println!("round  layer 0 alone  all layers");
    let mut heard = [1.0; 2];
    for round in 1..=2 {
        let inputs = Inputs::graph(x.view(), x.view(), of_local.view(), &local)?;
        of_local = (&of_local + &flash.forward(&inputs)?) / 2.0;
        let inputs = Inputs::graph(x.view(), x.view(), of_both.view(), &graph)?;
        of_both = (&of_both + &both.forward(&inputs.with_edge_layers(&layers)?)?) / 2.0;
        heard = [&of_local, &of_both].map(|shares| {
            shares.iter().filter(|&&share| share > 0.0).count() as f32 / VECTORS as f32
        });
        println!("{round:5} {:14.1} {:11.1}", heard[0], heard[1]);
    }
    assert!(heard[1] > 1.1 * heard[0], "long links reach more clusters");
    Ok(())
}
