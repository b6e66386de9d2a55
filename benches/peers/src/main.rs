//! `Flash` and the attention of other Rust libraries on the CPU, on the same inputs in the same run. Prints a table of
//! milliseconds, the fastest of several rounds in which the libraries take turns, and compares their results.
//!
//! burn and candle differentiate attention made of matrix products and a softmax: their fused attention has no
//! backward pass. rten has no gradients. None has attention over a graph, so they get a mask of all pairs.

mod burn;
mod candle;
mod rten;

use graph_attention::ndarray::Array2;
use graph_attention::rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus, seq::index::sample};
use graph_attention::{Attention, Causal, Flash, Graph, Inputs};
use rand_distr::StandardNormal;
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Computes the output of a case, or the gradients of the sum of its squares with respect to queries, keys and values,
/// one after the other. Returns the time too.
type Run<'a> = Box<dyn FnMut() -> Result<(Duration, Vec<f32>)> + 'a>;

/// Prepares the inputs; `None` if the library cannot compute this case.
type Library = fn(&Case) -> Result<Option<Run<'_>>>;

const LIBRARIES: [(&str, Library); 4] =
    [("`Flash`", flash), ("burn", burn::run), ("candle", candle::run), ("rten", rten::run)];
/// Columns of a head.
const COLUMNS: usize = 64;
const ROUNDS: usize = 15;

/// Attention of n rows to each other.
struct Case {
    name: &'static str,
    n: usize,
    heads: usize,
    causal: bool,
    graph: Option<Graph>,
    training: bool,
    /// Queries, keys and values, n × heads · 64.
    inputs: [Array2<f32>; 3],
}

impl Case {
    fn new(name: &'static str, n: usize, heads: usize) -> Self {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
        let inputs = [(); 3].map(|()| {
            Array2::from_shape_simple_fn((n, heads * COLUMNS), || rng.sample(StandardNormal))
        });
        Self { name, n, heads, causal: false, graph: None, training: false, inputs }
    }

    fn on_graph(name: &'static str, graph: &Graph) -> Self {
        Self { graph: Some(graph.clone()), ..Self::new(name, graph.num_queries(), 1) }
    }

    fn causal(self) -> Self {
        Self { causal: true, ..self }
    }

    fn training(self) -> Self {
        Self { training: true, ..self }
    }

    fn values(&self) -> [Vec<f32>; 3] {
        self.inputs.each_ref().map(|input| input.iter().copied().collect())
    }

    /// With a graph, whether each of n × n pairs is no edge.
    fn hidden(&self) -> Option<Vec<bool>> {
        let graph = self.graph.as_ref()?;
        let mut hidden = vec![true; self.n * self.n];
        for query in 0..self.n {
            graph.row(query).for_each(|(key, _)| hidden[query * self.n + key] = false);
        }
        Some(hidden)
    }
}

fn flash(case: &Case) -> Result<Option<Run<'_>>> {
    let [q, k, v] = case.inputs.each_ref().map(|input| input.view());
    let mut inputs = match &case.graph {
        Some(graph) => Inputs::graph(q, k, v, graph)?,
        None => Inputs::dense(q, k, v)?,
    }
    .with_heads(case.heads)?;
    if case.causal {
        inputs = inputs.with_causal_alignment(Causal::TopLeft);
    }
    let flash = Flash::new();
    Ok(Some(Box::new(move || {
        let start = Instant::now();
        if !case.training {
            let out = flash.forward(&inputs)?;
            return Ok((start.elapsed(), out.into_iter().collect()));
        }
        let (out, saved) = flash.forward_train(&inputs)?;
        let grads = flash.backward(&inputs, &saved, (2.0 * out).view())?;
        let time = start.elapsed();
        Ok((time, [grads.query, grads.key, grads.value].into_iter().flatten().collect()))
    })))
}

/// Returns the fastest time of each library in milliseconds, or infinity.
fn measure(case: &Case) -> Result<[f64; LIBRARIES.len()]> {
    let mut best = [f64::INFINITY; LIBRARIES.len()];
    let mut runs = Vec::new();
    for (_, library) in LIBRARIES {
        runs.push(library(case)?);
    }
    let mut expected = Vec::new();
    for _ in 0..ROUNDS {
        for (library, run) in runs.iter_mut().enumerate() {
            let Some(run) = run else { continue };
            let (time, values) = run()?;
            best[library] = best[library].min(time.as_secs_f64() * 1e3);
            if library == 0 {
                expected = values;
                continue;
            }
            let (name, case) = (LIBRARIES[library].0, case.name);
            assert_eq!(values.len(), expected.len(), "{name}, {case}");
            for (value, expected) in values.iter().zip(&expected) {
                let error = (value - expected).abs();
                assert!(
                    error < 1e-4 * (1.0 + expected.abs()),
                    "{name}, {case}: {value} {expected}"
                );
            }
        }
    }
    Ok(best)
}

fn main() -> Result<()> {
    println!("{}, ms, the fastest of {ROUNDS} rounds\n", graph_attention::testing::hold_simd()?);
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2);
    let edges = (0..2048)
        .flat_map(|query| sample(&mut rng, 2048, 16).into_iter().map(move |key| (query, key)));
    let graph = &Graph::from_edges(2048, 2048, edges)?;
    let _ = graph.transpose(); // computed once for all backward passes
    let cases = [
        Case::new("forward, 1024 × 64", 1024, 1),
        Case::new("forward, 1024 × 64, causal", 1024, 1).causal(),
        Case::new("forward, 1024 × 8 × 64", 1024, 8),
        Case::on_graph("forward, 2048 nodes × 64, 16 edges each", graph),
        Case::new("forward and backward, 1024 × 64", 1024, 1).training(),
        Case::new("forward and backward, 1024 × 64, causal", 1024, 1).causal().training(),
        Case::on_graph("forward and backward, 2048 nodes × 64, 16 edges each", graph).training(),
    ];
    let [ours, others @ ..] = LIBRARIES.map(|(name, _)| name);
    println!("| | {ours} | {} | ratio |", others.join(" | ratio | "));
    println!("|---|{}", "---|".repeat(2 * LIBRARIES.len() - 1));
    for case in &cases {
        let [ours, others @ ..] = measure(case)?;
        print!("| {} | {ours:.2} |", case.name);
        for ms in others {
            match ms.is_finite() {
                true => print!(" {ms:.2} | {:.1} |", ms / ours),
                false => print!(" | |"),
            }
        }
        println!();
    }
    Ok(())
}
