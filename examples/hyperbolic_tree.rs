//! Trees in hyperbolic space: a binary tree in the Poincaré disk, where attention by distance finds
//! the neighbours in the tree; and a hierarchy learned from its pairs, with the crate's gradients.
//!
//! ```sh
//! cargo run --release --example hyperbolic_tree                        # the binary tree, and a picture
//! cargo run --release --example hyperbolic_tree -- --svg tree.svg
//! cargo run --release --example hyperbolic_tree -- <folder> --dim 5    # WordNet's mammals, say
//! ```
//!
//! The tree is laid out by Sarkar's construction (*Low distortion Delaunay embedding of trees in
//! hyperbolic plane*, 2011; De Sa et al. 2018, arXiv:1804.03329): every edge has the same length τ, and
//! the neighbours of a node lie at equal angles around it. Distances in the disk come as near to those
//! in the tree as one likes; no layout in the plane can do that. (A layout of the plane that is trained
//! for the ranking alone can put the neighbours of so small a tree first too, at a distortion of 14.)
//!
//! A folder holds a hierarchy in two text files with names of the columns in the first line:
//!
//! * `nodes.csv` with at least the column `name`, nodes numbered from 0 in the order of the lines;
//! * `closure.csv` with the columns `descendant` and `ancestor`: all pairs of the transitive closure.
//!
//! It is learned as in Nickel and Kiela 2017, arXiv:1705.08039: the 1,182 mammals of WordNet in five
//! dimensions in a minute, to a mean rank of 1.2 and a mean average precision of 0.96.
//! Dev-dependencies: `csv` and `serde` (files), `indicatif` (progress bar), `svg` (the picture), `rand`.

use graph_attention::geometry::poincare::{
    conformal_factor, distance, exp_map, exp_map_origin, log_map, mobius_add, project,
};
use graph_attention::ndarray::{Array2, ArrayView2, Axis};
use graph_attention::{Aggregation, Attention, Graph, Inputs, Poincare, PoincareConfig};
use indicatif::{ProgressBar, ProgressStyle};
use rand::{Rng, RngExt, SeedableRng, rngs::Xoshiro256PlusPlus, seq::SliceRandom};
use serde::{Deserialize, de::DeserializeOwned};
use std::path::{Path, PathBuf};
use std::{env, error::Error, f64::consts::TAU, num::NonZero, time::Instant};
use svg::Document;
use svg::node::element::{Circle, Polyline, Rectangle, Text};

/// The ball of radius 1, and one so large that the tree lies in what is flat to ten digits: there the
/// distance is twice the Euclidean one.
const HYPERBOLIC: f64 = 1.0;
const FLAT: f64 = 1e-12;

/// The complete binary tree of depth 5; node i has the children 2i + 1 and 2i + 2.
const NODES: usize = 63;

type Result<T> = std::result::Result<T, Box<dyn Error>>;
type Points = Vec<[f64; 2]>;

fn main() -> Result<()> {
    let usage = "usage: hyperbolic_tree [--svg <file>] | <folder> [--dim <number>]";
    let (mut folder, mut dim, mut svg) = (None, 5, env::temp_dir().join("hyperbolic_tree.svg"));
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--svg" => svg = args.next().ok_or(usage)?.into(),
            "--dim" => {
                let number = args.next().and_then(|dim| dim.parse::<NonZero<usize>>().ok());
                dim = number.ok_or(usage)?.get();
            }
            _ if folder.is_none() && !arg.starts_with('-') => folder = Some(PathBuf::from(arg)),
            _ => return Err(usage.into()),
        }
    }
    match folder {
        Some(folder) => learn(&read(&folder)?, dim),
        None => binary_tree(&svg),
    }
}

fn binary_tree(svg: &Path) -> Result<()> {
    println!("the complete binary tree of depth 5 in two dimensions");
    println!("layout                             distortion  mAP of neighbours under attention");
    let known = [2.493, 1.199, 1.102, 1.070, 1.054];
    for (length, known) in (1..).zip(known) {
        let layout = sarkar(f64::from(length))?;
        let (distortion, precision) = quality(&layout, HYPERBOLIC)?;
        println!("Poincaré disk, edges of length {length}   {distortion:>10.3}  {precision:>10.3}");
        assert!((distortion - known).abs() < 5e-4);
        assert_eq!(precision, 1.0);
    }
    let disk = sarkar(1.0)?;
    let plane = by_stress()?;
    for (name, layout, bound) in [
        ("the first disk's points", &disk, 0.98),
        ("levels on circles", &radial(), 0.7),
        ("least stress", &plane, 0.7),
    ] {
        let (distortion, precision) = quality(layout, FLAT)?;
        println!("plane, {name:<26}  {distortion:>10.3}  {precision:>10.3}");
        assert!(distortion > 7.0 && precision < bound);
    }
    draw(&disk, &plane, svg)?;
    println!("picture: {}", svg.display());
    Ok(())
}

fn neighbors(node: usize) -> Vec<usize> {
    let parent = node.checked_sub(1).map(|below| below / 2);
    let children = [2 * node + 1, 2 * node + 2].into_iter().filter(|&child| child < NODES);
    parent.into_iter().chain(children).collect()
}

fn depth(node: usize) -> u32 {
    (node + 1).ilog2()
}

/// The number of edges between two nodes.
fn hops(mut u: usize, mut v: usize) -> f64 {
    let mut hops = 0.0;
    while u != v {
        let deeper = if u > v { &mut u } else { &mut v };
        *deeper = (*deeper - 1) / 2;
        hops += 1.0;
    }
    hops
}

/// The neighbours of a node lie at equal angles, all edges have the same length.
fn sarkar(length: f64) -> Result<Points> {
    let mut points = vec![[0.0; 2]; NODES];
    exp_map_origin(&[length / 2.0, 0.0], HYPERBOLIC, &mut points[1])?;
    for node in 0..NODES {
        let neighbors = neighbors(node);
        // The root has no parent: its first child is where to start from.
        let mut first = [0.0; 2];
        log_map(&points[node], &points[neighbors[0]], HYPERBOLIC, &mut first)?;
        for (turn, &neighbor) in neighbors.iter().enumerate().skip(1) {
            let (sin, cos) = (TAU * turn as f64 / neighbors.len() as f64).sin_cos();
            let turned = [cos * first[0] - sin * first[1], sin * first[0] + cos * first[1]];
            let point = points[node];
            exp_map(&point, &turned, HYPERBOLIC, &mut points[neighbor])?;
        }
    }
    Ok(points)
}

/// Each level on a circle, at equal angles.
fn radial() -> Points {
    let place = |node: usize| {
        let radius = f64::from(depth(node));
        let level = 1 << depth(node);
        let (sin, cos) = (TAU * ((node + 1 - level) as f64 + 0.5) / level as f64).sin_cos();
        [radius * cos, radius * sin]
    };
    (0..NODES).map(place).collect()
}

/// The best of ten layouts that bring Euclidean distances as near as they can to those in the tree,
/// least squares of relative errors, by stochastic gradient descent (Zheng, Pawar and Goodman 2019,
/// arXiv:1710.04626): pair by pair, a step moves both ends towards their distance.
fn by_stress() -> Result<Points> {
    let (mut best, mut best_precision) = (Points::new(), 0.0);
    for seed in 0..10 {
        let rng = &mut Xoshiro256PlusPlus::seed_from_u64(seed);
        let mut draw = || rng.random_range(-1.0..1.0);
        let mut points: Points = (0..NODES).map(|_| [draw(), draw()]).collect();
        let mut pairs: Vec<_> = (0..NODES).flat_map(|v| (0..v).map(move |u| (u, v))).collect();
        for step in 0..100 {
            let rate = 100.0 * 1e-3_f64.powf(f64::from(step) / 99.0);
            pairs.shuffle(rng);
            for &(u, v) in &pairs {
                let ([ux, uy], [vx, vy]) = (points[u], points[v]);
                let (target, actual) = (hops(u, v), (ux - vx).hypot(uy - vy));
                let scale = (rate / (target * target)).min(1.0) * (target / actual - 1.0) / 2.0;
                let (dx, dy) = (scale * (ux - vx), scale * (uy - vy));
                points[u] = [ux + dx, uy + dy];
                points[v] = [vx - dx, vy - dy];
            }
        }
        let (_, precision) = quality(&points, FLAT)?;
        if precision > best_precision {
            (best, best_precision) = (points, precision);
        }
    }
    Ok(best)
}

/// The worst-case distortion of the distances in the tree, and the mean average precision of the
/// neighbours under attention.
fn quality(points: &[[f64; 2]], curvature: f64) -> Result<(f64, f64)> {
    let (mut min, mut max) = (f64::INFINITY, 0.0f64);
    for (v, y) in points.iter().enumerate() {
        for (u, x) in points[..v].iter().enumerate() {
            let ratio = distance(x, y, curvature)? / hops(u, v);
            (min, max) = (min.min(ratio), max.max(ratio));
        }
    }
    let attention = PoincareConfig::new().curvature(curvature).init()?;
    let weights = all_weights(&attention, Array2::from(points.to_vec()).view())?;
    let related: Vec<_> = (0..NODES).map(neighbors).collect();
    Ok((max / min, rank(&weights, &related).1))
}

/// The attention of every node to every node.
fn all_weights(attention: &Poincare<f64>, points: ArrayView2<'_, f64>) -> Result<Array2<f64>> {
    let weights = attention.weights(&Inputs::dense(points, points, points)?)?;
    Ok(weights.into_shape_with_order((points.nrows(), points.nrows()))?)
}

/// Every node ranks all others by its attention to them. Returns, over the nodes that are related to
/// any, the mean rank of those among the unrelated and the mean average precision.
fn rank(weights: &Array2<f64>, related: &[Vec<usize>]) -> (f64, f64) {
    let (mut ranks, mut pairs, mut precisions, mut nodes) = (0.0, 0.0, 0.0, 0.0);
    for (node, related) in related.iter().enumerate().filter(|(_, related)| !related.is_empty()) {
        let row = weights.row(node);
        let mut is_related = vec![false; row.len()];
        related.iter().for_each(|&other| is_related[other] = true);
        let mut order: Vec<_> = (0..row.len()).filter(|&other| other != node).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let (mut found, mut precision) = (0.0, 0.0);
        for (place, _) in (1..).zip(order).filter(|&(_, other)| is_related[other]) {
            ranks += f64::from(place) - found;
            found += 1.0;
            precision += found / f64::from(place);
        }
        (pairs, precisions, nodes) = (pairs + found, precisions + precision / found, nodes + 1.0);
    }
    (ranks / pairs, precisions / nodes)
}

/// The node whose attention is drawn.
const QUERY: usize = 20;
/// Where the middle of the panels is, from the top of the picture.
const MIDDLE: f64 = 245.0;
/// Of the depths 0 to 5.
const COLORS: [&str; 6] = ["#440154", "#3b528b", "#21918c", "#35b779", "#90d743", "#d9d02c"];
const ATTENTION: &str = "#e8590c";

/// In the disk and in the plane, the tree and the attention of one node.
fn draw(disk: &[[f64; 2]], plane: &[[f64; 2]], svg: &Path) -> Result<()> {
    // Translations of the disk change no distance: this one brings the node to the centre.
    let away = disk[QUERY].map(|x| -x);
    let mut moved = disk.to_vec();
    for (from, to) in disk.iter().zip(&mut moved) {
        mobius_add(&away, from, HYPERBOLIC, to)?;
    }
    let mut picture = Document::new()
        .set("viewBox", (0, 0, 1260, 500))
        .set("font-family", "Helvetica, Arial, sans-serif")
        .set("text-anchor", "middle")
        .add(Rectangle::new().set("width", 1260).set("height", 500).set("fill", "white"));
    for x in [215.0, 625.0] {
        let boundary = circle([x, MIDDLE], 190.0).set("fill", "#fafafa");
        picture = picture.add(boundary.set("stroke", "#333333").set("stroke-width", 1.5));
    }
    let reach = plane.iter().map(|[x, y]| x.hypot(*y)).fold(0.0, f64::max);
    // A quarter of an edge is the temperature; in the plane, where distances are doubled, an edge is 2.
    picture = panel(picture, disk, HYPERBOLIC, 0.25, [215.0, 190.0])?;
    picture = panel(picture, &moved, HYPERBOLIC, 0.25, [625.0, 190.0])?;
    picture = panel(picture, plane, FLAT, 0.5, [1035.0, 190.0 / reach])?;
    let label = |x: f64, y: f64, size: u8, text: &str| {
        let text = Text::new(text).set("x", x).set("y", y).set("font-size", size);
        text.set("fill", "#222222")
    };
    for (x, title) in [
        (215.0, "Poincaré disk"),
        (625.0, "the same, ringed node at the centre"),
        (1035.0, "Euclidean plane, least stress"),
    ] {
        picture = picture.add(label(x, 30.0, 19, title));
    }
    for (depth, color) in COLORS.into_iter().enumerate() {
        let x = 205.0 + 92.0 * depth as f64;
        picture = picture.add(circle([x, 473.0], 6.0).set("fill", color));
        picture = picture.add(label(x + 38.0, 478.0, 14, &format!("depth {depth}")));
    }
    picture = picture.add(line(&[[800.0, 473.0], [835.0, 473.0]], ATTENTION, 6.0));
    picture = picture.add(label(948.0, 478.0, 14, "attention of the ringed node"));
    let saved = svg::save(svg, &picture);
    saved.map_err(|error| format!("{}: {error}", svg.display()).into())
}

/// Adds the tree and the attention of the query; the origin is at x = `center`.
fn panel(
    mut picture: Document,
    points: &[[f64; 2]],
    curvature: f64,
    temperature: f64,
    [center, scale]: [f64; 2],
) -> Result<Document> {
    let place = |[x, y]: [f64; 2]| [center + scale * x, MIDDLE - scale * y];
    let geodesic = |from: usize, to: usize| -> Result<Points> {
        let mut v = [0.0; 2];
        log_map(&points[from], &points[to], curvature, &mut v)?;
        let at = |step: u8| {
            let mut point = [0.0; 2];
            let v = v.map(|v| v * f64::from(step) / 24.0);
            exp_map(&points[from], &v, curvature, &mut point).map(|()| place(point))
        };
        Ok((0..=24).map(at).collect::<graph_attention::Result<_>>()?)
    };
    // Smaller towards the boundary, as lengths are.
    let radius = |point| Ok::<_, Box<dyn Error>>(2.0 + 7.0 / conformal_factor(point, curvature)?);
    for child in 1..NODES {
        picture = picture.add(line(&geodesic((child - 1) / 2, child)?, "#b0b0b0", 1.3));
    }
    let attention = PoincareConfig::new().curvature(curvature).temperature(temperature).init()?;
    let weights = all_weights(&attention, Array2::from(points.to_vec()).view())?;
    // What it gives to itself is left out.
    let rest = 1.0 - weights[[QUERY, QUERY]];
    for node in (0..NODES).filter(|&node| node != QUERY) {
        let weight = weights[[QUERY, node]] / rest;
        let line = line(&geodesic(QUERY, node)?, ATTENTION, 16.0 * weight);
        picture = picture.add(line.set("stroke-opacity", (0.2 + 2.0 * weight).min(0.9)));
    }
    for (node, point) in points.iter().enumerate().rev() {
        let dot = circle(place(*point), radius(point)?).set("fill", COLORS[depth(node) as usize]);
        picture = picture.add(dot.set("stroke", "white").set("stroke-width", 0.7));
    }
    let query = &points[QUERY];
    let ring = circle(place(*query), 1.5 * radius(query)? + 1.5).set("fill", "none");
    Ok(picture.add(ring.set("stroke", ATTENTION).set("stroke-width", 2.5)))
}

fn circle([x, y]: [f64; 2], radius: f64) -> Circle {
    Circle::new().set("cx", x).set("cy", y).set("r", radius)
}

fn line(points: &[[f64; 2]], color: &str, width: f64) -> Polyline {
    let points: Vec<_> = points.iter().map(|[x, y]| format!("{x:.2},{y:.2}")).collect();
    let line = Polyline::new().set("points", points.join(" ")).set("fill", "none");
    line.set("stroke", color).set("stroke-width", width).set("stroke-linecap", "round")
}

const EPOCHS: u64 = 300;
const BURN_IN: u64 = 20;
const LEARNING_RATE: f64 = 0.05;
const BATCH: usize = 10;
/// Nodes sampled for each pair that are no ancestors.
const NEGATIVES: usize = 50;
/// Points stay this far inside the boundary, as in the paper.
const MARGIN: f64 = 1e-5;

struct Hierarchy {
    names: Vec<String>,
    /// Descendant and ancestor.
    pairs: Vec<(usize, usize)>,
    ancestors: Vec<Vec<usize>>,
}

fn learn(hierarchy: &Hierarchy, dim: usize) -> Result<()> {
    let start = Instant::now();
    let (nodes, mut pairs) = (hierarchy.names.len(), hierarchy.pairs.clone());
    println!("{nodes} nodes, {} pairs, {dim} dimensions", pairs.len());
    let rng = &mut Xoshiro256PlusPlus::seed_from_u64(2017);
    let mut points = Array2::from_shape_simple_fn((nodes, dim), || rng.random_range(-1e-3..1e-3));
    let attention = PoincareConfig::new().init()?;
    let evaluate = |when: &str, points: &Array2<f64>| -> Result<f64> {
        let weights = all_weights(&attention, points.view())?;
        let (rank, precision) = rank(&weights, &hierarchy.ancestors);
        println!("{when}: mean rank {rank:.2}, mAP {precision:.3}");
        Ok(precision)
    };
    let before = evaluate("at random", &points)?;

    let style = "{wide_bar} epoch {pos}/{len}, {msg} [{elapsed}]";
    let bar = ProgressBar::new(EPOCHS).with_style(ProgressStyle::with_template(style)?);
    for epoch in 0..EPOCHS {
        // While all are near the origin, small steps find the directions.
        let rate = if epoch < BURN_IN { LEARNING_RATE / 10.0 } else { LEARNING_RATE };
        pairs.shuffle(rng);
        let mut loss = 0.0;
        for batch in pairs.chunks(BATCH) {
            loss += step(hierarchy, &mut points, batch, rate, rng)?;
        }
        bar.set_message(format!("loss {:.3}", loss / pairs.len() as f64));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let after = evaluate("learned", &points)?;
    assert!(after > before, "it learns");

    let norm = |node: usize| points.row(node).dot(&points.row(node)).sqrt();
    let mut order: Vec<_> = (0..nodes).collect();
    order.sort_by(|&a, &b| norm(a).total_cmp(&norm(b)));
    let names: Vec<_> = order.iter().take(5).map(|&node| &*hierarchy.names[node]).collect();
    println!("nearest to the origin: {}", names.join(", "));
    println!("{:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// A step of Riemannian gradient descent on −ln softmax(−d) of each pair's ancestor against nodes that
/// are none. Returns the sum of the losses.
fn step(
    hierarchy: &Hierarchy,
    points: &mut Array2<f64>,
    pairs: &[(usize, usize)],
    rate: f64,
    rng: &mut impl Rng,
) -> Result<f64> {
    let mut others = Vec::new();
    for &(descendant, ancestor) in pairs {
        let is_negative =
            |node| node != descendant && !hierarchy.ancestors[descendant].contains(&node);
        let draws = std::iter::repeat_with(|| rng.random_range(0..points.nrows()));
        others.push(ancestor);
        others.extend(draws.filter(|&node| is_negative(node)).take(NEGATIVES));
    }
    // Every descendant is a query over keys of its own.
    let descendants: Vec<_> = pairs.iter().map(|&(descendant, _)| descendant).collect();
    let (query, key) = (points.select(Axis(0), &descendants), points.select(Axis(0), &others));
    let offsets = (0..=pairs.len()).map(|pair| pair * (1 + NEGATIVES)).collect();
    let graph = Graph::from_csr(others.len(), offsets, (0..others.len() as u32).collect())?;
    // The value of the ancestor is the point whose logarithm is 1, that of the negatives is 0: then
    // the logarithm of the output, the mean of these, is the weight of the ancestor.
    let is_ancestor = |(key, _)| if key % (1 + NEGATIVES) == 0 { 1f64.tanh() } else { 0.0 };
    let value = Array2::from_shape_fn((others.len(), 1), is_ancestor);
    let inputs = Inputs::graph(query.view(), key.view(), value.view(), &graph)?;
    let attention = PoincareConfig::new().aggregation(Aggregation::TangentAtOrigin).init()?;
    let (out, saved) = attention.forward_train(&inputs)?;
    let loss = -out.iter().map(|out| out.atanh().ln()).sum::<f64>();
    let grad_out = out.mapv(|out| -1.0 / (out.atanh() * (1.0 - out * out)));
    let grads = attention.backward(&inputs, &saved, grad_out.view())?;

    // A node may be in several pairs.
    let mut sums = Array2::zeros(points.raw_dim());
    let queries = descendants.iter().zip(grads.query.rows());
    for (&node, grad) in queries.chain(others.iter().zip(grads.key.rows())) {
        sums.row_mut(node).scaled_add(1.0, &grad);
    }
    for (mut point, sum) in points.rows_mut().into_iter().zip(sums.rows()) {
        if sum.iter().all(|&sum| sum == 0.0) {
            continue;
        }
        let x = point.to_vec();
        // The gradient in the metric of the ball, which is λ² times the Euclidean one.
        let scale = -rate / conformal_factor(&x, HYPERBOLIC)?.powi(2);
        let (v, mut end) = ((scale * &sum).to_vec(), vec![0.0; x.len()]);
        exp_map(&x, &v, HYPERBOLIC, &mut end)?;
        project(&end, HYPERBOLIC, MARGIN, point.as_slice_mut().expect("a row of our own"))?;
    }
    Ok(loss)
}

#[derive(Deserialize)]
struct Node {
    name: String,
}

#[derive(Deserialize)]
struct Pair {
    descendant: usize,
    ancestor: usize,
}

/// The rows of a CSV file. Errors name the file and the line.
fn read_csv<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let rows = csv::Reader::from_path(path).and_then(|mut reader| reader.deserialize().collect());
    rows.map_err(|error| format!("{}: {error}", path.display()).into())
}

fn read(folder: &Path) -> Result<Hierarchy> {
    let nodes: Vec<Node> = read_csv(&folder.join("nodes.csv"))?;
    let names: Vec<_> = nodes.into_iter().map(|node| node.name).collect();
    let mut ancestors = vec![Vec::new(); names.len()];
    let mut pairs = Vec::new();
    for Pair { descendant, ancestor } in read_csv(&folder.join("closure.csv"))? {
        if descendant.max(ancestor) >= names.len() || descendant == ancestor {
            let last = names.len() - 1;
            let expected = format!("closure.csv: expected two nodes of 0 to {last}");
            return Err(format!("{expected}, got {descendant},{ancestor}").into());
        }
        ancestors[descendant].push(ancestor);
        pairs.push((descendant, ancestor));
    }
    if pairs.is_empty() || ancestors.iter().any(|ancestors| ancestors.len() + 1 >= names.len()) {
        return Err("closure.csv: expected pairs, and for each node one that is no ancestor".into());
    }
    Ok(Hierarchy { names, pairs, ancestors })
}
