//! Trains the two-layer graph attention network of Veličković et al. 2018 (1710.10903) to classify
//! nodes, with the crate's backward passes and an Adam written out here.
//!
//! ```sh
//! cargo run --release --example train_gat                       # Zachary's karate club
//! cargo run --release --example train_gat -- <folder> --seeds 10  # Cora, say
//! ```
//!
//! The karate club knows one member of each faction and infers the others. A folder holds a data set
//! in three text files, nodes numbered from 0 in the order of their lines:
//!
//! * `nodes.csv` with at least the columns `label` (a class from 0, or −1 for unknown) and `split`
//!   (`train`, `val`, `test` or `none`);
//! * `features.txt`: line i lists the columns that are 1 for node i, with spaces between;
//! * `edges.csv` with the columns `u` and `v`: each undirected edge once.
//!
//! For Cora, write the files of <https://github.com/kimiyoung/planetoid> in this form: its 140, 500
//! and 1,000 nodes are the splits of the paper, which reports a test accuracy of 0.830 ± 0.007.
//! Dev-dependencies: `csv` and `serde` (files), `indicatif` (progress bars), `rand`.

use graph_attention::ndarray::{Array2, ArrayD, Zip};
use graph_attention::{
    Attention, Dropout, EdgeGat, EdgeGatConfig, Graph, Inputs, Params, Score, params,
};
use indicatif::{ProgressBar, ProgressStyle};
use rand::{Rng, SeedableRng, rngs::Xoshiro256PlusPlus};
use serde::{Deserialize, de::DeserializeOwned};
use std::{collections::HashMap, env, error::Error, fs, num::NonZero, path::Path, time::Instant};

const DROPOUT: f64 = 0.6;
const LEARNING_RATE: f32 = 0.005;
const WEIGHT_DECAY: f32 = 5e-4;
const PATIENCE: u64 = 100;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Nodes with their classes.
type Labelled = Vec<(usize, usize)>;

struct Dataset {
    features: Array2<f32>,
    graph: Graph,
    classes: usize,
    train: Labelled,
    val: Labelled,
    test: Labelled,
}

/// Each node attends to its neighbours and itself.
fn undirected(nodes: usize, edges: &[(usize, usize)]) -> Result<Graph> {
    let both_ways = edges.iter().flat_map(|&(u, v)| [(u, v), (v, u)]);
    Ok(Graph::from_edges(nodes, nodes, both_ways)?.with_self_loops()?)
}

#[derive(Clone)]
struct Gat {
    first: EdgeGat<f32>,
    second: EdgeGat<f32>,
}

impl Gat {
    fn new(data: &Dataset, rng: &mut impl Rng) -> Result<Self> {
        let first = EdgeGatConfig::new(Score::Gat, data.features.ncols(), 8, 8);
        let second = EdgeGatConfig::new(Score::Gat, 8 * 8, data.classes, 1).average_heads(true);
        Ok(Self { first: first.init(rng)?, second: second.init(rng)? })
    }

    /// Inference: without dropout.
    fn logits(&self, data: &Dataset) -> Result<Array2<f32>> {
        let x = data.features.view();
        let hidden = self.first.forward(&Inputs::graph(x, x, x, &data.graph)?)?.mapv(elu);
        let h = hidden.view();
        Ok(self.second.forward(&Inputs::graph(h, h, h, &data.graph)?)?)
    }

    /// The gradients of the training loss with respect to the parameters of both layers, under
    /// dropout drawn afresh.
    fn gradients(&self, data: &Dataset, rng: &mut impl Rng) -> Result<[Vec<ArrayD<f32>>; 2]> {
        let mut draw = || Dropout { probability: DROPOUT, seed: rng.next_u64() };
        let [on_x, on_first, on_h, on_second] = [draw(), draw(), draw(), draw()];

        let mut dropped_x = data.features.clone();
        drop_entries(&mut dropped_x, on_x);
        let x = dropped_x.view();
        let first_inputs = Inputs::graph(x, x, x, &data.graph)?.with_dropout(on_first)?;
        let (out, first_saved) = self.first.forward_train(&first_inputs)?;
        let hidden = out.mapv(elu);

        let mut dropped_h = hidden.clone();
        drop_entries(&mut dropped_h, on_h);
        let h = dropped_h.view();
        let second_inputs = Inputs::graph(h, h, h, &data.graph)?.with_dropout(on_second)?;
        let (logits, second_saved) = self.second.forward_train(&second_inputs)?;

        // Backwards through all of it. Dropout is linear: its gradient is dropped the same way.
        let (_, _, grad_logits) = evaluate(&logits, &data.train);
        let mut second = self.second.backward(&second_inputs, &second_saved, grad_logits.view())?;
        let second_params = std::mem::take(&mut second.params);
        let mut grad_hidden = second.into_self_attention()?;
        drop_entries(&mut grad_hidden, on_h);
        // The slope of ELU, from its value y: 1 where y > 0, else eˣ = y + 1.
        Zip::from(&mut grad_hidden).and(&hidden).for_each(|grad, &y| *grad *= 1.0 + y.min(0.0));
        // Its inputs are data: nobody needs their gradient.
        let grad = grad_hidden.view();
        let first_params = self.first.backward_params(&first_inputs, &first_saved, grad)?;
        Ok([first_params, second_params])
    }
}

fn elu(x: f32) -> f32 {
    if x > 0.0 { x } else { x.exp_m1() }
}

/// Dropout on the inputs of a layer, by the same hash as the crate's on attention weights. Zeros
/// stay zeros, so that the crate can skip them in products with sparse features.
fn drop_entries(x: &mut Array2<f32>, dropout: Dropout) {
    for ((row, column), value) in x.indexed_iter_mut().filter(|(_, value)| **value != 0.0) {
        *value *= dropout.multiplier::<f32>(row, column);
    }
}

/// Over some nodes: the mean cross-entropy of softmax(logits), the share of nodes whose largest logit
/// is that of their class, and the gradient of the first.
fn evaluate(logits: &Array2<f32>, labelled: &Labelled) -> (f32, f32, Array2<f32>) {
    let count = labelled.len() as f32;
    let (mut loss, mut correct) = (0.0, 0.0);
    let mut grad = Array2::zeros(logits.raw_dim());
    for &(node, class) in labelled {
        let row = logits.row(node);
        // Less the maximum, so that no exponential overflows.
        let max = row.fold(f32::NEG_INFINITY, |max, &x| max.max(x));
        let exps = row.mapv(|x| (x - max).exp());
        loss += (exps.sum().ln() + max - row[class]) / count;
        correct += f32::from(row[class] == max);
        grad.row_mut(node).assign(&(&exps / (exps.sum() * count)));
        grad[[node, class]] -= 1.0 / count;
    }
    (loss, correct / count, grad)
}

/// Adam (Kingma & Ba 2015) with weight decay as L2 in the gradient, as in `torch.optim.Adam`.
#[derive(Default)]
struct Adam {
    steps: i32,
    /// The running means of a parameter's gradient and of its square.
    moments: HashMap<String, [ArrayD<f32>; 2]>,
}

impl Adam {
    fn step(&mut self, layer: &mut impl Params<f32>, grads: &[ArrayD<f32>]) -> Result<()> {
        self.steps += 1;
        // Both means start at 0; this makes up for it.
        let correct = |beta: f32| 1.0 / (1.0 - beta.powi(self.steps));
        let (correct_mean, correct_square) = (correct(0.9), correct(0.999));
        Ok(params::update(layer, grads, |name, param, grad| {
            let zeros = || [(); 2].map(|()| ArrayD::zeros(grad.raw_dim()));
            let [means, squares] = self.moments.entry(name.to_owned()).or_insert_with(zeros);
            let arrays = Zip::from(param).and(grad).and(means).and(squares);
            arrays.for_each(|param, &grad, mean, square| {
                let grad = grad + WEIGHT_DECAY * *param;
                *mean = 0.9 * *mean + 0.1 * grad;
                *square = 0.999 * *square + 0.001 * grad * grad;
                let scale = (*square * correct_square).sqrt() + 1e-8;
                *param -= LEARNING_RATE * *mean * correct_mean / scale;
            });
        })?)
    }
}

/// Trains until neither loss nor accuracy on the validation nodes has been at its best for 100
/// epochs. The rule of the authors' code (github.com/PetarV-/GAT): *either* at least as good as ever
/// restarts the patience, *both* in one epoch save the model. Returns that model and the epochs.
fn train(data: &Dataset, seed: u64, max_epochs: u64, bar: &ProgressBar) -> Result<(Gat, u64)> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut gat = Gat::new(data, &mut rng)?;
    let mut adam = [Adam::default(), Adam::default()];
    let (mut best, mut best_loss, mut best_accuracy) = (gat.clone(), f32::INFINITY, 0.0);
    let (mut epoch, mut end) = (0, PATIENCE);
    while epoch < end.min(max_epochs) {
        let [first, second] = gat.gradients(data, &mut rng)?;
        adam[0].step(&mut gat.first, &first)?;
        adam[1].step(&mut gat.second, &second)?;
        epoch += 1;

        let (loss, accuracy, _) = evaluate(&gat.logits(data)?, &data.val);
        if loss <= best_loss || accuracy >= best_accuracy {
            if loss <= best_loss && accuracy >= best_accuracy {
                best = gat.clone();
            }
            (best_loss, best_accuracy) = (loss.min(best_loss), accuracy.max(best_accuracy));
            end = epoch + PATIENCE;
        }
        // The end of the bar is the first epoch that may be the last one.
        bar.set_length(end);
        bar.set_position(epoch);
        bar.set_message(format!("val accuracy {accuracy:.3}, best {best_accuracy:.3}"));
    }
    Ok((best, epoch))
}

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let usage = "usage: train_gat [<folder> [--seeds <number>]]";
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => karate_club(),
        [folder] if !folder.starts_with('-') => many_seeds(Path::new(folder), 10),
        [folder, "--seeds", n] | ["--seeds", n, folder] => {
            let seeds: NonZero<u32> = n.parse().map_err(|_| usage)?;
            many_seeds(Path::new(folder), seeds.get())
        }
        _ => Err(usage.into()),
    }
}

fn karate_club() -> Result<()> {
    // A node is known by its own column. Without validation nodes, the two that are labelled do.
    let nodes = FACTIONS.len();
    let labels = FACTIONS.bytes().map(|faction| usize::from(faction == b'o'));
    let (train_nodes, test) =
        labels.enumerate().partition::<Labelled, _>(|&(node, _)| node == 0 || node == 33);
    let data = Dataset {
        features: Array2::eye(nodes),
        graph: undirected(nodes, &KARATE_CLUB)?,
        classes: 2,
        val: train_nodes.clone(),
        train: train_nodes,
        test,
    };
    let (gat, epochs) = train(&data, 1, 500, &ProgressBar::hidden())?;
    let (_, accuracy, _) = evaluate(&gat.logits(&data)?, &data.test);
    println!("karate club: accuracy {accuracy:.3} on the other 32 after {epochs} epochs");
    assert!(accuracy >= 0.9);
    Ok(())
}

fn many_seeds(folder: &Path, seeds: u32) -> Result<()> {
    let data = read(folder)?;
    let style = "seed {prefix} {wide_bar} epoch {pos}/{len}, {msg} [{elapsed}]";
    let mut accuracies = Vec::new();
    for seed in 0..seeds {
        let bar = ProgressBar::new(PATIENCE).with_style(ProgressStyle::with_template(style)?);
        bar.set_prefix(seed.to_string());
        let start = Instant::now();
        let (gat, epochs) = train(&data, seed.into(), 100_000, &bar)?;
        bar.finish_and_clear();
        let (_, accuracy, _) = evaluate(&gat.logits(&data)?, &data.test);
        let seconds = start.elapsed().as_secs_f64();
        println!("seed {seed}: test accuracy {accuracy:.3}, {epochs} epochs, {seconds:.1} s");
        accuracies.push(f64::from(accuracy));
    }
    // Mean and standard deviation (of these seeds, not an estimate from them).
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let average = mean(&accuracies);
    let squares: Vec<_> = accuracies.iter().map(|accuracy| (accuracy - average).powi(2)).collect();
    let deviation = mean(&squares).sqrt();
    println!("test accuracy {average:.3} ± {deviation:.3} over {seeds} seeds");
    Ok(())
}

#[derive(Deserialize)]
struct Node {
    label: i64,
    split: String,
}

/// The rows of a CSV file. Errors name the file and the line.
fn read_csv<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let rows = csv::Reader::from_path(path).and_then(|mut reader| reader.deserialize().collect());
    rows.map_err(|error| format!("{}: {error}", path.display()).into())
}

fn read(folder: &Path) -> Result<Dataset> {
    let nodes: Vec<Node> = read_csv(&folder.join("nodes.csv"))?;
    let edges: Vec<(usize, usize)> = read_csv(&folder.join("edges.csv"))?;
    let path = folder.join("features.txt");
    let wrong = |what: String| format!("{}: {what}", path.display());
    let text = fs::read_to_string(&path).map_err(|error| wrong(error.to_string()))?;
    let mut ones = Vec::new();
    for (line, number) in text.lines().zip(1..) {
        let columns: std::result::Result<Vec<usize>, _> =
            line.split_whitespace().map(str::parse).collect();
        ones.push(columns.map_err(|error| wrong(format!("line {number}: {error}")))?);
    }
    if ones.len() != nodes.len() {
        return Err(wrong(format!("{} lines for {} nodes", ones.len(), nodes.len())).into());
    }
    // Row-normalised: the ones of a node become parts of 1.
    let columns = ones.iter().flatten().max().map_or(0, |last| last + 1);
    let mut features = Array2::zeros((nodes.len(), columns));
    for (node, ones) in ones.iter().enumerate() {
        ones.iter().for_each(|&column| features[[node, column]] = 1.0 / ones.len() as f32);
    }
    let labelled = |split: &str| {
        let mut labelled = Vec::new();
        for (i, node) in nodes.iter().enumerate().filter(|(_, node)| node.split == split) {
            let class = usize::try_from(node.label);
            labelled
                .push((i, class.map_err(|_| format!("nodes.csv: {split} node {i} has no label"))?));
        }
        if labelled.is_empty() {
            return Err(format!("nodes.csv: no {split} nodes"));
        }
        Ok(labelled)
    };
    Ok(Dataset {
        features,
        graph: undirected(nodes.len(), &edges).map_err(|error| format!("edges.csv: {error}"))?,
        classes: nodes.iter().map(|node| node.label + 1).max().unwrap_or(0) as usize,
        train: labelled("train")?,
        val: labelled("val")?,
        test: labelled("test")?,
    })
}

/// The side that each member took: Mr Hi's (node 0) or the officer's (node 33).
const FACTIONS: &str = "hhhhhhhhhohhhhoohhohohoooooooooooo";

/// Friendships in a karate club (Zachary 1977, doi 10.1086/jar.33.4.3629752).
#[rustfmt::skip]
const KARATE_CLUB: [(usize, usize); 78] = [
    (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (0, 7), (0, 8), (0, 10), (0, 11), (0, 12),
    (0, 13), (0, 17), (0, 19), (0, 21), (0, 31), (1, 2), (1, 3), (1, 7), (1, 13), (1, 17), (1, 19),
    (1, 21), (1, 30), (2, 3), (2, 7), (2, 8), (2, 9), (2, 13), (2, 27), (2, 28), (2, 32), (3, 7),
    (3, 12), (3, 13), (4, 6), (4, 10), (5, 6), (5, 10), (5, 16), (6, 16), (8, 30), (8, 32), (8, 33),
    (9, 33), (13, 33), (14, 32), (14, 33), (15, 32), (15, 33), (18, 32), (18, 33), (19, 33),
    (20, 32), (20, 33), (22, 32), (22, 33), (23, 25), (23, 27), (23, 29), (23, 32), (23, 33),
    (24, 25), (24, 27), (24, 31), (25, 31), (26, 29), (26, 33), (27, 33), (28, 31), (28, 33),
    (29, 32), (29, 33), (30, 32), (30, 33), (31, 32), (31, 33), (32, 33),
];
