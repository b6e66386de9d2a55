//! The layers of an HNSW index drive local and global attention.
//!
//! ```sh
//! cargo run --release --example hnsw_layers --features hnsw
//! ```
//!
//! An index for nearest neighbours is already a graph to attend over: layer 0 links near vectors,
//! the layers above are its long links. Each of 2,000 vectors starts with the number of its cluster
//! as a value and attends round by round; what a value has become tells which clusters a vector has
//! heard of. Dev-dependencies: `rand`, `rand_distr`.

use graph_attention::ndarray::Array2;
use graph_attention::neighbors::{HnswConfig, Metric};
use graph_attention::{Attention, Flash, Graph, Inputs, LocalGlobal, Result};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::StandardNormal;

const VECTORS: usize = 2_000;
const CLUSTERS: usize = 20;
const COLUMNS: usize = 16;
const ROUNDS: usize = 2;

fn main() -> Result<()> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2018);
    let mut normal = |rows, size: f32| {
        let mut draw = || size * rng.sample::<f32, _>(StandardNormal);
        Array2::from_shape_simple_fn((rows, COLUMNS), &mut draw)
    };
    let (centers, noise) = (normal(CLUSTERS, 4.0), normal(VECTORS, 1.0));
    let cluster = |vector: usize| vector % CLUSTERS;
    let x = Array2::from_shape_fn((VECTORS, COLUMNS), |(vector, column)| {
        centers[[cluster(vector), column]] + noise[[vector, column]]
    });

    let index = HnswConfig::new(Metric::Euclidean).connections(8).build(x.clone())?;
    let (graph, layers) = index.links()?;
    println!("{VECTORS} vectors in {CLUSTERS} clusters, {} links", graph.num_edges());
    println!("layer  links  mean distance  to another cluster");
    let mut means = Vec::new();
    for layer in 0..=layers.iter().copied().max().unwrap_or(0) {
        let pairs = pairs(&graph).filter(|&(_, _, pair)| layers[pair] == layer);
        let (mut links, mut sum, mut away) = (0, 0.0, 0);
        for (query, key, _) in pairs {
            let difference = &x.row(query) - &x.row(key);
            links += 1;
            sum += difference.dot(&difference).sqrt();
            away += usize::from(cluster(query) != cluster(key));
        }
        let (mean, away) = (sum / links as f32, 100.0 * away as f32 / links as f32);
        println!("{layer:5} {links:6} {mean:14.1} {away:18.0} %");
        means.push(mean);
    }
    assert!(means.is_sorted(), "the higher, the farther");

    // Scores by nearness would hide what is far, so all links count the same: the scale is 0.
    let flash = || Flash::new().with_scale(0.0);
    let both = LocalGlobal::by_layer_union(flash()?, flash()?);
    let only_local: Vec<_> =
        pairs(&graph).filter(|&(_, _, pair)| layers[pair] == 0).map(|(q, k, _)| (q, k)).collect();
    let local = Graph::from_edges(VECTORS, VECTORS, only_local)?;
    let start = Array2::from_shape_fn((VECTORS, CLUSTERS), |(vector, column)| {
        f32::from(u8::from(cluster(vector) == column))
    });
    let (mut of_local, mut of_both) = (start.clone(), start);
    println!("clusters that a vector has heard of, on average, after so many rounds");
    println!("round  layer 0 alone  all layers");
    let mut heard = (1.0, 1.0);
    for round in 1..=ROUNDS {
        let inputs = Inputs::graph(x.view(), x.view(), of_local.view(), &local)?;
        of_local = (&of_local + &flash()?.forward(&inputs)?) / 2.0;
        let inputs = Inputs::graph(x.view(), x.view(), of_both.view(), &graph)?;
        of_both = (&of_both + &both.forward(&inputs.with_layers(&layers)?)?) / 2.0;
        let count = |x: &Array2<f32>| {
            x.iter().filter(|&&share| share > 0.0).count() as f32 / VECTORS as f32
        };
        heard = (count(&of_local), count(&of_both));
        println!("{round:5} {:14.1} {:11.1}", heard.0, heard.1);
    }
    assert!(heard.1 > 1.5 * heard.0, "long links carry what near ones do not");
    Ok(())
}

/// Query, key and number of every pair.
fn pairs(graph: &Graph) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
    (0..graph.num_queries())
        .flat_map(|query| graph.row(query).map(move |(key, pair)| (query, key, pair)))
}
