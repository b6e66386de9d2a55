//! Measures every mechanism on this machine and writes one page to choose by: time and memory as
//! inputs grow, the error of what is approximate, and "which mechanism when" from the figures.
//!
//! ```sh
//! cargo run --release --example report                          # into the temporary folder
//! cargo run --release --example report -- report.html --full    # larger inputs, some minutes
//! ```
//!
//! The page needs nothing but itself. Dev-dependencies: `peak_alloc`, `plotters`, `rand`,
//! `rand_distr`.

use graph_attention::ndarray::{Array1, Array2, s};
use graph_attention::neighbors::Metric;
use graph_attention::{
    Attention, Coordinates, DualSpaceConfig, EdgeGatConfig, Flash, Float, Fusion, Gradients, Graph,
    GraphRopeConfig, Inputs, LatentSearch, Layout, LocalGlobal, MoeConfig, MultiHeadConfig,
    PerformerConfig, PoincareConfig, Result, ScaledDotProduct, Score, Window, params,
};
use peak_alloc::PeakAlloc;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};
use std::fmt::Write;
use std::time::{Duration, Instant};

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

const COLUMNS: usize = 64;
const DEGREE: usize = 16;
const RADIUS: usize = 64;
const FEATURES: usize = 256;

type Failure = Box<dyn std::error::Error>;

/// A mechanism, what it computes in a few words, and the colour of its lines.
struct Entry<F: Float>(Box<dyn Attention<F>>, &'static str, RGBColor);

fn mechanisms<F: Float>() -> Result<Vec<Entry<F>>> {
    let rng = &mut Xoshiro256PlusPlus::seed_from_u64(1);
    let experts = (0..8).map(|_| Box::new(Flash::new()) as Box<dyn Attention<F>>).collect();
    let dual = DualSpaceConfig::new(Fusion::Gated, COLUMNS);
    let dual = dual.init(Flash::new(), Flash::new(), Flash::new(), rng)?;
    let search = LatentSearch::new(DEGREE, Metric::Cosine).exclude_self(false);
    let rope = GraphRopeConfig::new(COLUMNS, Layout::Half);
    let entry = |attention: Box<dyn Attention<F>>, computes, [r, g, b]: [u8; 3]| {
        Entry(attention, computes, RGBColor(r, g, b))
    };
    let multi_head = MultiHeadConfig::new(COLUMNS, 4).init(Flash::new(), rng)?;
    let moe = MoeConfig::new(COLUMNS, 2).init(experts, rng)?;
    let window = LocalGlobal::by_order(Window::new(RADIUS), Flash::new())?;
    let gat = EdgeGatConfig::new(Score::GatV2, COLUMNS, COLUMNS / 4, 4).init(rng)?;
    let poincare = PoincareConfig::new().coordinates(Coordinates::Tangent).init()?;
    let performer = PerformerConfig::new(COLUMNS, FEATURES).init(rng)?;
    Ok(vec![
        entry(Box::new(ScaledDotProduct::new()), "softmax, weights held", [120, 125, 135]),
        entry(Box::new(Flash::new()), "softmax, in tiles", [17, 24, 39]),
        entry(Box::new(multi_head), "projections, 4 heads of Flash", [37, 99, 235]),
        entry(Box::new(moe), "2 of 8 Flash a query", [124, 58, 237]),
        entry(Box::new(window), "Flash in a window of 64 to either side", [5, 150, 105]),
        entry(Box::new(dual.with_search(search)), "three Flash, 16 latent keys", [219, 39, 119]),
        entry(Box::new(gat), "GATv2, 4 heads", [217, 119, 6]),
        entry(Box::new(poincare), "softmax of hyperbolic distances", [220, 38, 38]),
        entry(Box::new(performer), "256 positive features", [8, 145, 178]),
        entry(Box::new(rope.init(Flash::new())?), "node rotations, Flash", [101, 163, 13]),
        entry(Box::new(rope.init_edges()?), "rotations of pairs' distances", [146, 64, 14]),
    ])
}

/// Milliseconds and KiB of one mechanism on one input.
#[derive(Clone, Copy)]
struct Cost {
    size: usize,
    forward: f64,
    training: f64,
    forward_memory: f64,
    training_memory: f64,
}

/// The median over at least 3 runs and the time given.
fn median_time(budget: Duration, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let (mut times, start) = (Vec::new(), Instant::now());
    while times.len() < 3 || start.elapsed() < budget {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn peak_memory(run: impl FnOnce() -> Result<()>) -> Result<f64> {
    PEAK.reset_peak_usage();
    let before = PEAK.current_usage();
    run()?;
    Ok((PEAK.peak_usage() - before) as f64 / 1024.0)
}

fn cost(attention: &dyn Attention<f32>, inputs: &Inputs<'_, f32>, size: usize) -> Result<Cost> {
    let budget = Duration::from_millis(40);
    let mut out = Array2::zeros((inputs.num_queries(), attention.output_dim(inputs)));
    let grad_out = Array2::ones(out.raw_dim());
    let mut grads = Gradients::zeros(inputs, attention)?;
    let mut forward = || attention.forward_into(inputs, out.view_mut());
    let (forward_memory, forward) = (peak_memory(&mut forward)?, median_time(budget, forward)?);
    let mut train = || {
        let saved = attention.forward_train_into(inputs, out.view_mut())?;
        attention.backward_into(inputs, &saved, grad_out.view(), grads.view_mut())
    };
    let (training_memory, training) = (peak_memory(&mut train)?, median_time(budget, train)?);
    Ok(Cost { size, forward, training, forward_memory, training_memory })
}

/// Nodes of which neighbours in the order are alike: Σ 0.95^{i−j} εⱼ, of norm 4 or so.
fn nodes(n: usize) -> Array2<f32> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(7);
    let mut x = Array2::zeros((n + 1, COLUMNS));
    for node in 1..=n {
        for column in 0..COLUMNS {
            let step: f32 = StandardNormal.sample(&mut rng);
            x[[node, column]] = 0.95 * x[[node - 1, column]] + 0.15 * step;
        }
    }
    x.slice_move(s![1.., ..])
}

/// Positions and distances, for the mechanisms that read them.
fn places(pairs: usize, nodes: usize) -> (Array2<f32>, Array1<f32>) {
    let positions = Array2::from_shape_fn((nodes, 1), |(node, _)| node as f32);
    (positions, (0..pairs).map(|pair| (pair % 101) as f32).collect())
}

/// The costs of every mechanism, for each size.
fn measure_all(
    sizes: &[usize],
    measure: impl Fn(&dyn Attention<f32>, usize) -> Result<Cost>,
) -> Result<Vec<Vec<Cost>>> {
    let costs = |Entry(attention, ..): &Entry<f32>| {
        sizes.iter().map(|&size| measure(&**attention, size)).collect()
    };
    mechanisms()?.iter().map(costs).collect()
}

fn dense(attention: &dyn Attention<f32>, n: usize) -> Result<Cost> {
    let (x, (positions, distances)) = (nodes(n), places(n * n, n));
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?
        .with_positions(positions.view(), positions.view())?
        .with_distances(distances.view())?;
    cost(attention, &inputs, n)
}

/// Half of the neighbours are near in the order.
fn on_graph(attention: &dyn Attention<f32>, n: usize) -> Result<Cost> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
    let edges = (0..n * DEGREE).map(|edge| match (edge / DEGREE, edge % DEGREE) {
        (node, at) if at < DEGREE / 2 => (node, (node + at) % n),
        (node, _) => (node, rng.random_range(0..n)),
    });
    let graph = Graph::from_edges(n, n, edges)?;
    let _ = graph.transpose();
    let (x, (positions, distances)) = (nodes(n), places(graph.num_edges(), n));
    let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)?
        .with_positions(positions.view(), positions.view())?
        .with_distances(distances.view())?
        .with_latent(&graph)?;
    cost(attention, &inputs, n)
}

fn one_query(attention: &dyn Attention<f32>, neighbours: usize) -> Result<Cost> {
    let (keys, (positions, distances)) = (nodes(neighbours), places(neighbours, neighbours));
    let query = keys.slice(s![..1, ..]);
    let inputs = Inputs::dense(query, keys.view(), keys.view())?
        .with_positions(positions.slice(s![..1, ..]), positions.view())?
        .with_distances(distances.view())?;
    cost(attention, &inputs, neighbours)
}

fn relative_error(out: &Array2<f64>, exact: &Array2<f64>) -> f64 {
    let norm = |x: &Array2<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    norm(&(out - exact)) / norm(exact)
}

fn widen(x: Array2<f32>) -> Array2<f64> {
    x.mapv(f64::from)
}

/// |f32 − f64| / |f64| of every mechanism, with the same parameters and inputs.
fn rounding(n: usize) -> Result<Vec<f64>> {
    let (x, (positions, distances)) = (nodes(n), places(n * n, n));
    let (wide_x, wide_positions) = (widen(x.clone()), widen(positions.clone()));
    let wide_distances = distances.mapv(f64::from);
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?
        .with_positions(positions.view(), positions.view())?
        .with_distances(distances.view())?;
    let wide_inputs = Inputs::dense(wide_x.view(), wide_x.view(), wide_x.view())?
        .with_positions(wide_positions.view(), wide_positions.view())?
        .with_distances(wide_distances.view())?;
    let mut errors = Vec::new();
    for (Entry(narrow, ..), Entry(mut wide, ..)) in mechanisms()?.into_iter().zip(mechanisms()?) {
        let state = params::state(&narrow).into_iter();
        params::load_state(&mut wide, state.map(|(name, value)| (name, value.mapv(f64::from))))?;
        let out = widen(narrow.forward(&inputs)?);
        errors.push(relative_error(&out, &wide.forward(&wide_inputs)?));
    }
    Ok(errors)
}

/// Name, setting, milliseconds and relative error of what approximates softmax attention.
type Approximation = (&'static str, String, f64, f64);

fn approximations(n: usize) -> Result<Vec<Approximation>> {
    let x = nodes(n);
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
    let exact = widen(Flash::new().forward(&inputs)?);
    let run = |name, setting, attention: &dyn Attention<f32>| -> Result<Approximation> {
        let mut out = Array2::zeros(x.raw_dim());
        let run = || attention.forward_into(&inputs, out.view_mut());
        let time = median_time(Duration::from_millis(100), run)?;
        Ok((name, setting, time, relative_error(&widen(out), &exact)))
    };
    let mut found = Vec::new();
    for features in [32, 64, 128, 256, 512, 1024] {
        let rng = &mut Xoshiro256PlusPlus::seed_from_u64(5);
        let performer = PerformerConfig::new(COLUMNS, features).init(rng)?;
        found.push(run("performer", format!("m = {features}"), &performer)?);
    }
    for radius in [8, 32, 128, 512] {
        let window = LocalGlobal::by_order(Window::new(radius), Flash::new())?;
        found.push(run("local_global", format!("r = {radius}"), &window)?);
    }
    Ok(found)
}

/// Where a falls below b for good, by straight lines between the points in log–log axes; the size and
/// whether it lies beyond what was measured.
fn crossing(a: &[Cost], b: &[Cost]) -> Option<(f64, bool)> {
    let gaps: Vec<[f64; 2]> = (a.iter().zip(b))
        .map(|(a, b)| [(a.size as f64).ln(), (a.forward / b.forward).ln()])
        .collect();
    let at = |[from, to]: [[f64; 2]; 2]| {
        (from[0] + (to[0] - from[0]) * from[1] / (from[1] - to[1])).exp()
    };
    let last = [gaps[gaps.len() - 2], gaps[gaps.len() - 1]];
    if last[1][1] > 0.0 {
        return (last[1][1] < last[0][1]).then(|| (at(last), true));
    }
    let fall = gaps.windows(2).rev().find(|pair| pair[0][1] > 0.0)?;
    Some((at([fall[0], fall[1]]), false))
}

fn main() -> std::result::Result<(), Failure> {
    let (full, rest): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|arg| arg == "--full");
    let path = match &rest[..] {
        [] => std::env::temp_dir().join("graph_attention_report.html"),
        [path] if !path.starts_with('-') => path.into(),
        _ => return Err("usage: report [<file.html>] [--full]".into()),
    };
    let (dense_sizes, graph_sizes, approximated): (&[usize], &[usize], _) = match full.is_empty() {
        true => (&[64, 128, 256, 512, 1024, 2048], &[1000, 4000, 16_000], 2048),
        false => (
            &[64, 128, 256, 512, 1024, 2048, 4096, 8192],
            &[1000, 4000, 16_000, 64_000, 256_000],
            8192,
        ),
    };
    let measured = Measured {
        dense: measure_all(dense_sizes, dense)?,
        graph: measure_all(graph_sizes, on_graph)?,
        single: measure_all(&[16, 64, 256, 1024, 4096], one_query)?,
        rounding: rounding(512)?,
        approximations: approximations(approximated)?,
        approximated,
    };

    let [_, flash, ..] = &measured.dense[..] else { return Err("no mechanisms".into()) };
    let last = flash[flash.len() - 1];
    let weights = (last.size * last.size * size_of::<f32>()) as f64 / 1024.0;
    assert!(last.forward_memory < weights / 2.0, "Flash never holds the weights");
    assert!(measured.rounding.iter().all(|&error| error < 1e-3), "f32 is f64, rounded");
    for pair in measured.approximations.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
        assert!(pair[1].3 < pair[0].3, "more features, or more keys, and less error");
    }

    let page = measured.page()?;
    for outside in ["src=", "href=", "url(", "@import"] {
        assert!(!page.contains(outside), "the page needs nothing but itself");
    }
    std::fs::write(&path, &page)?;
    println!("{} mechanisms, on {} threads", measured.dense.len(), threads());
    println!("{:<20} {:>14} {:>14}", "forward, ms", dense_label(&last), "of Flash's");
    for (Entry(attention, ..), costs) in mechanisms::<f32>()?.iter().zip(&measured.dense) {
        let time = costs[costs.len() - 1].forward;
        println!("{:<20} {time:>14.2} {:>14.2}", attention.name(), time / last.forward);
    }
    println!("page: {} ({} KB)", path.display(), page.len() / 1000);
    Ok(())
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn dense_label(cost: &Cost) -> String {
    format!("dense {}", cost.size)
}

struct Measured {
    dense: Vec<Vec<Cost>>,
    graph: Vec<Vec<Cost>>,
    single: Vec<Vec<Cost>>,
    rounding: Vec<f64>,
    approximations: Vec<Approximation>,
    approximated: usize,
}

/// A line of a plot: name, colour, points with what is written beside them.
struct Line {
    name: String,
    color: RGBColor,
    points: Vec<(f64, f64, String)>,
}

impl Measured {
    fn lines(&self, costs: &[Vec<Cost>], y: fn(&Cost) -> f64) -> Result<Vec<Line>> {
        let line = |(Entry(attention, _, color), costs): (Entry<f32>, &Vec<Cost>)| Line {
            name: attention.name().to_owned(),
            color,
            points: costs.iter().map(|cost| (cost.size as f64, y(cost), String::new())).collect(),
        };
        Ok(mechanisms()?.into_iter().zip(costs).map(line).collect())
    }

    fn page(&self) -> std::result::Result<String, Failure> {
        let plots = [
            ("Dense, forward: ms", "nodes n", self.lines(&self.dense, |cost| cost.forward)?),
            ("Dense, training: ms", "nodes n", self.lines(&self.dense, |cost| cost.training)?),
            (
                "Dense, forward: peak memory in KiB",
                "nodes n",
                self.lines(&self.dense, |cost| cost.forward_memory)?,
            ),
            (
                "Dense, training: peak memory in KiB",
                "nodes n",
                self.lines(&self.dense, |cost| cost.training_memory)?,
            ),
            (
                "Graph with 16 neighbours a node, forward: ms",
                "nodes",
                self.lines(&self.graph, |cost| cost.forward)?,
            ),
            (
                "Graph with 16 neighbours a node, training: ms",
                "nodes",
                self.lines(&self.graph, |cost| cost.training)?,
            ),
            (
                "One query, forward: ms",
                "neighbours",
                self.lines(&self.single, |cost| cost.forward)?,
            ),
        ];
        let mut figures = String::new();
        for (title, x, lines) in &plots {
            write!(figures, "<figure>{}</figure>", plot(title, x, lines)?)?;
        }
        let error = format!("Relative error against exact, {} nodes", self.approximated);
        write!(figures, "<figure>{}</figure>", plot(&error, "ms, forward", &self.errors()?)?)?;
        Ok(PAGE
            .replace("{threads}", &threads().to_string())
            .replace("{choose}", &self.choose())
            .replace("{costs}", &self.costs()?)
            .replace("{figures}", &figures))
    }

    fn errors(&self) -> Result<Vec<Line>> {
        let mut lines: Vec<Line> = Vec::new();
        for Entry(attention, _, color) in mechanisms::<f32>()? {
            let of_it = self.approximations.iter().filter(|of| of.0 == attention.name());
            let points: Vec<_> =
                of_it.map(|(_, setting, time, error)| (*time, *error, setting.clone())).collect();
            if !points.is_empty() {
                lines.push(Line { name: attention.name().to_owned(), color, points });
            }
        }
        Ok(lines)
    }

    /// What a mechanism costs at the largest size, by the cost of Flash.
    fn by_flash(&self, costs: &[Vec<Cost>], name: &str) -> String {
        let ratio = || {
            let names: Vec<_> = mechanisms::<f32>().ok()?.iter().map(|of| of.0.name()).collect();
            let at = |name| Some(*costs[names.iter().position(|of| *of == name)?].last()?);
            let (of_it, of_flash): (Cost, Cost) = (at(name)?, at("flash")?);
            Some([of_it.forward / of_flash.forward, of_it.training / of_flash.training])
        };
        let [forward, training] = ratio().unwrap_or([f64::NAN; 2]);
        format!("{forward:.2} × Flash forward, {training:.2} × in training")
    }

    fn choose(&self) -> String {
        let [scaled, flash, _, _, window, _, _, _, performer, ..] = &self.dense[..] else {
            return String::new();
        };
        let last = |costs: &[Cost]| costs[costs.len() - 1];
        let (n, nodes) = (last(flash).size, last(&self.graph[1]).size);
        let overtakes = |costs: &[Cost]| match crossing(costs, flash) {
            Some((size, false)) => format!("faster than Flash from n ≈ {size:.0}"),
            Some((size, true)) => {
                format!("faster than Flash from n ≈ {size:.0}, by the slope of the last two sizes")
            }
            None => format!("never faster than Flash up to n = {n}"),
        };
        let error = |name: &str| {
            let of_it = self.approximations.iter().filter(|of| of.0 == name);
            let errors = of_it.map(|(_, setting, _, error)| format!("{setting}: {error:.3}"));
            errors.collect::<Vec<_>>().join(", ")
        };
        let memory = last(scaled).forward_memory / last(flash).forward_memory;
        let query = self.single[1]
            .iter()
            .map(|cost| format!("{} neighbours {:.1} µs", cost.size, cost.forward * 1e3));
        let dense = |name| format!("dense {n}: {}", self.by_flash(&self.dense, name));
        let graph = |name| format!("graph of {nodes}: {}", self.by_flash(&self.graph, name));
        let rows = [
            (
                "Softmax attention, whatever the pairs",
                "flash",
                format!(
                    "dense {n}: {:.1} ms; graph of {nodes}: {:.1} ms; {}",
                    last(flash).forward,
                    last(&self.graph[1]).forward,
                    query.collect::<Vec<_>>().join(", ")
                ),
                "you want to read the weights while training",
            ),
            (
                "The weights themselves, or a text to check against",
                "scaled_dot_product",
                format!(
                    "dense {n}: {memory:.0} × the memory of Flash; {}",
                    dense("scaled_dot_product")
                ),
                "inputs are large",
            ),
            (
                "Tokens or nodes whose roles are to be learned",
                "multi_head",
                format!("{}; {}", dense("multi_head"), graph("multi_head")),
                "queries and keys are comparable as they are",
            ),
            (
                "Graphs with edge features",
                "edge_gat",
                graph("edge_gat"),
                "all pairs attend: it scores pair by pair",
            ),
            (
                "Trees and hierarchies",
                "poincare",
                format!("{}; {}", dense("poincare"), graph("poincare")),
                "the nodes are not points of the ball",
            ),
            (
                "Many keys for every query, and an error is allowed",
                "performer",
                format!(
                    "{} (m = {FEATURES}); error at {} nodes: {}",
                    overtakes(performer),
                    self.approximated,
                    error("performer")
                ),
                "keys are few, or weights sharp: the error grows with |q| and |k|",
            ),
            (
                "A long order in which near ones matter",
                "local_global",
                format!(
                    "{} (r = {RADIUS}); error at {} nodes: {}",
                    overtakes(window),
                    self.approximated,
                    error("local_global")
                ),
                "what matters is far away and not among the globals",
            ),
            (
                "Positions of nodes: order, coordinates, hops from anchors",
                "graph_rope",
                format!("{}; {}", dense("graph_rope"), graph("graph_rope")),
                "only distances of pairs are known",
            ),
            (
                "Distances of pairs",
                "edge_rope",
                format!("{}; {}", graph("edge_rope"), dense("edge_rope")),
                "inputs are dense and large",
            ),
            (
                "Queries that need different mechanisms",
                "moe",
                format!("2 of 8 Flash: {}; {}", dense("moe"), graph("moe")),
                "one mechanism serves all, or graphs are sparse",
            ),
            (
                "Neighbours in a graph, and others that are alike",
                "dual_space",
                format!("{}; {}", graph("dual_space"), dense("dual_space")),
                "links already say who is alike",
            ),
        ];
        let row = |(when, name, cost, unless): &(&str, &str, String, &str)| {
            format!("<tr><td>{when}</td><th>{name}</th><td>{cost}</td><td>{unless}</td></tr>")
        };
        rows.iter().map(row).collect()
    }

    fn costs(&self) -> Result<String> {
        let mut table = String::new();
        for (at, Entry(attention, computes, RGBColor(r, g, b))) in
            mechanisms::<f32>()?.iter().enumerate()
        {
            let [dense, graph, single] = [&self.dense[at], &self.graph[at], &self.single[at]];
            let [before, last] = [dense[dense.len() - 2], dense[dense.len() - 1]];
            let growth = (last.forward / before.forward).log2()
                / (last.size as f64 / before.size as f64).log2();
            let of_graph = graph[graph.len() - 1];
            table += &format!(
                "<tr><th><i style=\"background:rgb({r},{g},{b})\"></i>{}</th><td>{computes}</td>",
                attention.name()
            );
            let figures = [
                format!("{:.1} µs", single[2].forward * 1e3),
                format!("{:.2} ms", last.forward),
                format!("{:.2} ms", last.training),
                format!("n<sup>{growth:.1}</sup>"),
                format!("{:.0}", last.forward_memory),
                format!("{:.2} ms", of_graph.forward),
                format!("{:.2} ms", of_graph.training),
                format!("{:.0e}", self.rounding[at]),
            ];
            for figure in figures {
                table += &format!("<td class=\"n\">{figure}</td>");
            }
            table += "</tr>";
        }
        let (dense, graph) = (&self.dense[0], &self.graph[0]);
        let (n, nodes) = (dense[dense.len() - 1].size, graph[graph.len() - 1].size);
        Ok(format!(
            "<tr><th>mechanism</th><th>computes</th><th>one query, 256 keys</th><th>dense {n}, \
             forward</th><th>training</th><th>grows as</th><th>KiB, forward</th><th>graph of \
             {nodes}, forward</th><th>training</th><th>f32 rounds by</th></tr>{table}"
        ))
    }
}

/// Lines in logarithmic axes, with their names at the right end, as SVG.
fn plot(title: &str, x_name: &str, lines: &[Line]) -> std::result::Result<String, Failure> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (760, 460)).into_drawing_area();
        let points = || lines.iter().flat_map(|line| &line.points);
        let bounds = |of: fn(&(f64, f64, String)) -> f64, room: f64| {
            let (low, high) = points()
                .map(of)
                .fold((f64::MAX, f64::MIN_POSITIVE), |(low, high), v| (low.min(v), high.max(v)));
            low / room..high * room
        };
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 19))
            .margin(12)
            .margin_right(150)
            .x_label_area_size(44)
            .y_label_area_size(62)
            .build_cartesian_2d(
                bounds(|point| point.0, 1.05).log_scale(),
                bounds(|point| point.1, 1.3).log_scale(),
            )?;
        let number = |value: &f64| match *value {
            value if value >= 1e6 => format!("{}M", value / 1e6),
            value if value >= 1e4 => format!("{}k", value / 1e3),
            value => format!("{value}"),
        };
        chart
            .configure_mesh()
            .x_desc(x_name)
            .x_label_formatter(&number)
            .y_label_formatter(&number)
            .label_style(("sans-serif", 14))
            .axis_style(RGBColor(150, 150, 150))
            .bold_line_style(RGBColor(225, 225, 225))
            .light_line_style(RGBColor(244, 244, 244))
            .draw()?;
        let mut ends = Vec::new();
        for line in lines {
            let width = if line.name == "flash" { 3 } else { 2 };
            let style = line.color.stroke_width(width);
            let places = || line.points.iter().map(|&(x, y, _)| (x, y));
            chart.draw_series(LineSeries::new(places(), style))?;
            chart.draw_series(places().map(|place| Circle::new(place, 3, line.color.filled())))?;
            for (x, y, beside) in &line.points {
                let text = Text::new(beside.clone(), (*x, *y), ("sans-serif", 13));
                chart.draw_series([text])?;
            }
            if let Some(place) = places().last() {
                ends.push((chart.backend_coord(&place), line));
            }
        }
        // Names that would overlap are moved apart.
        ends.sort_by_key(|((_, y), _)| *y);
        let mut free = 40;
        let left = ends.iter().map(|((x, _), _)| *x).max().unwrap_or(0) + 26;
        let below = ends.iter().rev().fold((440, Vec::new()), |(floor, mut tops), ((_, y), _)| {
            let top = (*y).min(floor);
            tops.push(top);
            (top - 17, tops)
        });
        for (((x, y), line), &top) in ends.iter().zip(below.1.iter().rev()) {
            let at = top.max(free);
            free = at + 17;
            let leader = vec![(x + 5, *y), (left - 4, at)];
            root.draw(&PathElement::new(leader, line.color.mix(0.5)))?;
            let style = ("sans-serif", 15).into_text_style(&root).color(&line.color);
            let style = style.pos(Pos::new(HPos::Left, VPos::Center));
            root.draw(&Text::new(line.name.clone(), (left, at), style))?;
        }
        root.present()?;
    }
    Ok(svg)
}

const PAGE: &str = r#"<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Attention mechanisms, measured</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; margin: 2rem auto; max-width: 1560px;
       padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p { max-width: 60rem; margin: .4rem 0; color: #444c56; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0;
         border-bottom: 1px solid #e3e6ea; }
tr:first-child th { color: #57606a; font-weight: 600; }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th { white-space: nowrap; } th i { display: inline-block; width: .7em; height: .7em;
     border-radius: 50%; margin-right: .5em; }
.costs tr:first-child th { white-space: normal; max-width: 7rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(560px, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid #e3e6ea; border-radius: 8px; padding: .4rem; }
svg { width: 100%; height: auto; }
</style></head><body>
<h1>Attention mechanisms, measured</h1>
<p>f32, 64 columns, {threads} threads, medians; memory is the peak beside inputs, output and
gradients. Times on a shared machine vary: compare within a plot.</p>
<h2>Which mechanism when</h2>
<table><tr><th>you have</th><th>take</th><th>which costs, here</th><th>unless</th></tr>{choose}</table>
<h2>What each costs</h2>
<table class="costs">{costs}</table>
<p>“Grows as” is the slope between the two largest dense inputs; “f32 rounds by” is the relative
distance from the same in f64, on 512 nodes.</p>
<h2>As inputs grow</h2>
<div class="figures">{figures}</div>
</body></html>
"#;
