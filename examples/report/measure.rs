//! Time, memory and error of every mechanism on the same inputs.

use crate::PEAK;
use crate::mechanisms::{Mechanism, mechanisms};
use graph_attention::ndarray::{Array1, Array2, s};
use graph_attention::rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Attention, Flash, Float, Gradients, Graph, Inputs, LocalGlobal, PerformerConfig, Result,
    local_global::Window, params,
};
use rand_distr::{Distribution, StandardNormal};
use std::time::{Duration, Instant};

pub(crate) const COLUMNS: usize = 64;
pub(crate) const DEGREE: usize = 16;

/// Milliseconds, and MiB besides inputs, output and gradients.
#[derive(Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) size: usize,
    pub(crate) forward: f64,
    pub(crate) training: f64,
    pub(crate) forward_memory: f64,
    pub(crate) training_memory: f64,
}

/// The results of a mechanism at every size, and the difference between its `f32` and `f64` outputs.
pub(crate) struct Row {
    pub(crate) mechanism: Mechanism<f32>,
    pub(crate) dense: Vec<Cost>,
    pub(crate) graph: Vec<Cost>,
    pub(crate) one_query: Vec<Cost>,
    pub(crate) rounding: f64,
}

/// An approximation of softmax attention over all pairs, with its time and error.
pub(crate) struct Approximation {
    pub(crate) name: &'static str,
    pub(crate) setting: String,
    pub(crate) milliseconds: f64,
    pub(crate) error: f64,
}

pub(crate) struct Report {
    /// The CPU, its instruction set, and the number of threads.
    pub(crate) machine: String,
    pub(crate) rows: Vec<Row>,
    pub(crate) approximations: Vec<Approximation>,
}

impl Row {
    /// Returns the cost for the largest dense inputs.
    pub(crate) fn dense(&self) -> &Cost {
        &self.dense[self.dense.len() - 1]
    }

    /// Returns the cost for the largest graph.
    pub(crate) fn graph(&self) -> &Cost {
        &self.graph[self.graph.len() - 1]
    }
}

impl Report {
    /// Writes its progress to the standard error, since it takes a while.
    pub(crate) fn measure(
        simd: &str,
        dense: &[usize],
        graph: &[usize],
        keys: &[usize],
    ) -> Result<Self> {
        let start = Instant::now();
        let largest = dense[dense.len() - 1];
        let of_sizes = |sizes: &[usize], make: fn(usize) -> Result<Workload<f32>>| {
            sizes.iter().map(|&size| make(size)).collect::<Result<Vec<_>>>()
        };
        let dense = of_sizes(dense, Workload::dense)?;
        let graph = of_sizes(graph, Workload::graph)?;
        let one_query = of_sizes(keys, Workload::one_query)?;
        let small = Workload::graph(500)?;
        let wide_small = small.widen();
        let mut rows = Vec::new();
        let all = mechanisms()?;
        let number = all.len();
        for (at, (mechanism, mut wide)) in all.into_iter().zip(mechanisms::<f64>()?).enumerate() {
            let attention = &*mechanism.attention;
            let seconds = start.elapsed().as_secs();
            eprintln!("{seconds:>4} s  {:>2} of {number}  {}", at + 1, attention.name());
            let costs = |loads: &[Workload<f32>]| -> Result<Vec<Cost>> {
                loads.iter().map(|load| cost(attention, load)).collect()
            };
            let (dense, graph, one_query) = (costs(&dense)?, costs(&graph)?, costs(&one_query)?);
            // Give both precisions the same parameters: they are drawn in the precision of the mechanism.
            // Both use frequencies in f64; only the views of them are rounded.
            let own = params::state(&wide.attention).into_iter();
            let state =
                params::state(attention).into_iter().zip(own).map(|((name, value), own)| {
                    let is_rounded = own.1.mapv(|x| x as f32) == value;
                    (name, if is_rounded { own.1 } else { value.mapv(f64::from) })
                });
            let state: Vec<_> = state.collect();
            params::load_state(&mut wide.attention, state)?;
            let out = attention.forward(&small.inputs()?)?.mapv(f64::from);
            let rounding = relative_error(&out, &wide.attention.forward(&wide_small.inputs()?)?);
            rows.push(Row { mechanism, dense, graph, one_query, rounding });
        }
        eprintln!("{:>4} s  errors of approximations", start.elapsed().as_secs());
        Ok(Self {
            machine: machine(simd),
            rows,
            approximations: approximations(&Workload::dense(largest)?)?,
        })
    }

    pub(crate) fn find(&self, name: &str) -> &Row {
        let row = self.rows.iter().find(|row| row.mechanism.attention.name() == name);
        row.unwrap_or_else(|| panic!("{name} is in the list"))
    }
}

/// As in "AMD EPYC 7B13, AVX2, 2 threads".
fn machine(simd: &str) -> String {
    // Only Linux has this file; elsewhere the architecture must do.
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or(std::env::consts::ARCH, |(_, model)| model.trim());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{model}, {}, {threads} threads", simd.to_uppercase())
}

/// Nodes and pairs, with positions and distances for the mechanisms that read them.
struct Workload<F> {
    nodes: Array2<F>,
    queries: usize,
    graph: Option<Graph>,
    positions: Array2<F>,
    distances: Array1<F>,
}

impl Workload<f32> {
    /// Nodes along a walk, xᵢ = 0.99 xᵢ₋₁ + √(1 − 0.99²) ε, with norms of about 4.5: nodes close in the
    /// order are similar.
    fn new(n: usize, queries: usize, graph: Option<Graph>) -> Self {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(7);
        let mut nodes = Array2::zeros((n, COLUMNS));
        for node in 0..n {
            for column in 0..COLUMNS {
                let draw: f32 = StandardNormal.sample(&mut rng);
                let step = 0.56 * draw;
                nodes[[node, column]] = match node.checked_sub(1) {
                    Some(before) => 0.99 * nodes[[before, column]] + 0.141 * step,
                    None => step,
                };
            }
        }
        let pairs = graph.as_ref().map_or(queries * n, Graph::num_edges);
        Self {
            nodes,
            queries,
            graph,
            positions: Array2::from_shape_fn((n, 1), |(node, _)| node as f32),
            distances: (0..pairs).map(|pair| (pair % 101) as f32).collect(),
        }
    }

    fn dense(n: usize) -> Result<Self> {
        Ok(Self::new(n, n, None))
    }

    fn one_query(keys: usize) -> Result<Self> {
        Ok(Self::new(keys, 1, None))
    }

    /// Half of the neighbours are close in the order, half are random.
    fn graph(n: usize) -> Result<Self> {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
        let edges = (0..n * DEGREE).map(|edge| match (edge / DEGREE, edge % DEGREE) {
            (node, at) if at < DEGREE / 2 => (node, (node + at) % n),
            (node, _) => (node, rng.random_range(0..n)),
        });
        let graph = Graph::from_edges(n, n, edges)?;
        let _ = graph.transpose(); // computed once for all backward passes
        Ok(Self::new(n, n, Some(graph)))
    }

    fn widen(&self) -> Workload<f64> {
        Workload {
            nodes: self.nodes.mapv(f64::from),
            queries: self.queries,
            graph: self.graph.clone(),
            positions: self.positions.mapv(f64::from),
            distances: self.distances.mapv(f64::from),
        }
    }
}

impl<F: Float> Workload<F> {
    fn inputs(&self) -> Result<Inputs<'_, F>> {
        let (keys, queries) = (self.nodes.view(), s![..self.queries, ..]);
        let query = self.nodes.slice(queries);
        let inputs = match &self.graph {
            // Latent neighbours are given here; in dense inputs they are searched for.
            Some(graph) => Inputs::graph(query, keys, keys, graph)?.with_latent(graph)?,
            None => Inputs::dense(query, keys, keys)?,
        };
        inputs
            .with_positions(self.positions.slice(queries), self.positions.view())?
            .with_distances(self.distances.view())
    }
}

fn cost(attention: &dyn Attention<f32>, load: &Workload<f32>) -> Result<Cost> {
    let inputs = load.inputs()?;
    let mut out = Array2::zeros((inputs.num_queries(), attention.output_dim(&inputs)));
    let grad_out = Array2::ones(out.raw_dim());
    let mut grads = Gradients::zeros(&inputs, attention)?;
    let (forward, forward_memory) = measure(|| attention.forward_into(&inputs, out.view_mut()))?;
    let (training, training_memory) = measure(|| {
        let saved = attention.forward_train_into(&inputs, out.view_mut())?;
        attention.backward_into(&inputs, &saved, grad_out.view(), grads.view_mut())
    })?;
    Ok(Cost { size: inputs.num_keys(), forward, training, forward_memory, training_memory })
}

/// Returns milliseconds, the median over at least 3 runs and 25 ms, and the peak memory in MiB.
fn measure(mut run: impl FnMut() -> Result<()>) -> Result<(f64, f64)> {
    run()?; // starts the threads
    let mut times = Vec::with_capacity(1 << 16); // does not grow while memory is measured
    PEAK.reset_peak_usage();
    let (before, start) = (PEAK.current_usage(), Instant::now());
    while times.len() < 3 || start.elapsed() < Duration::from_millis(25) {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let memory = PEAK.peak_usage().saturating_sub(before) as f64 / f64::from(1 << 20);
    times.sort_by(f64::total_cmp);
    Ok((times[times.len() / 2], memory))
}

fn approximations(load: &Workload<f32>) -> Result<Vec<Approximation>> {
    let inputs = load.inputs()?;
    let exact = Flash::new().forward(&inputs)?.mapv(f64::from);
    // The root mean square of the errors over several draws of the features.
    let approximate = |setting, draws: &[Box<dyn Attention<f32>>]| -> Result<Approximation> {
        let mut out = Array2::zeros(load.nodes.raw_dim());
        let (milliseconds, _) = measure(|| draws[0].forward_into(&inputs, out.view_mut()))?;
        let mut squares = 0.0;
        for attention in draws {
            let out = attention.forward(&inputs)?.mapv(f64::from);
            squares += relative_error(&out, &exact).powi(2);
        }
        let error = (squares / draws.len() as f64).sqrt();
        Ok(Approximation { name: draws[0].name(), setting, milliseconds, error })
    };
    let mut found = Vec::new();
    let rng = &mut Xoshiro256PlusPlus::seed_from_u64(5);
    for features in [32, 128, 512, 2048] {
        let config = PerformerConfig::new(COLUMNS, features);
        let draw = |_| Ok(Box::new(config.init(rng)?) as Box<dyn Attention<f32>>);
        let draws = (0..8).map(draw).collect::<Result<Vec<_>>>()?;
        found.push(approximate(format!("m = {features}"), &draws)?);
    }
    for radius in [8, 32, 128, 512] {
        let window = LocalGlobal::sliding_window(Window::new(radius), Flash::new())?;
        found.push(approximate(format!("r = {radius}"), &[Box::new(window)])?);
    }
    Ok(found)
}

/// |out − exact| / |exact|
fn relative_error(out: &Array2<f64>, exact: &Array2<f64>) -> f64 {
    let norm = |x: &Array2<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    norm(&(out - exact)) / norm(exact)
}
