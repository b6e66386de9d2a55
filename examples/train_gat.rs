//! The two-layer graph attention network of Veličković et al. 2018, arXiv:1710.10903, with the dropout,
//! Adam, weight decay and early stopping of its authors' code. Longer than 100 lines, to reproduce all of
//! the paper.
//!
//! ```sh
//! cargo run --release -p examples --features csv --example train_gat                         # the karate club in examples/data
//! cargo run --release -p examples --features csv --example train_gat -- <folder> --seeds 10  # Cora: 0.831; the paper has 0.830
//! ```
//!
//! The folder contains `nodes.csv` with columns `label` and `split` (`train`, `val`, `test`, others),
//! `edges.csv` with `u` and `v`, and `features.txt`, whose line i lists the columns that are 1 for node
//! i. Cora is at github.com/kimiyoung/planetoid. Dev-dependency: `csv`.

use graph_attention::ndarray::{Array1, Array2, ArrayD};
use graph_attention::rand::{Rng, SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Attention, Dropout, EdgeGat, EdgeGatConfig, Graph, Inputs, edge_gat::Score, params,
};
use std::{collections::HashMap, env, error::Error, fs};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let contained = concat!(env!("CARGO_MANIFEST_DIR"), "/data/karate_club");
    let folder = args.first().map_or(contained, String::as_str);
    let seeds = args.get(2).map_or(Ok(3), |seeds| seeds.parse())?;
    let csv = |file| csv::Reader::from_path(format!("{folder}/{file}"));
    let nodes = csv("nodes.csv")?.into_deserialize().collect::<Result<_, _>>()?;
    let nodes: Vec<HashMap<String, String>> = nodes;
    // The nodes of a split and their classes.
    let split = |name: &str| -> Vec<(usize, usize)> {
        let nodes = nodes.iter().enumerate().filter(|(_, node)| node["split"] == name);
        nodes.filter_map(|(i, node)| Some((i, node["label"].parse().ok()?))).collect()
    };
    let [train, val, test] = ["train", "val", "test"].map(split);
    let edges: Vec<[usize; 2]> = csv("edges.csv")?.into_deserialize().collect::<Result<_, _>>()?;
    let both_ways = edges.iter().flat_map(|&[u, v]| [(u, v), (v, u)]);
    let graph = Graph::from_edges(nodes.len(), nodes.len(), both_ways)?.with_self_loops()?;
    let text = fs::read_to_string(format!("{folder}/features.txt"))?;
    let ones = text.lines().map(|line| line.split_whitespace().map(str::parse).collect());
    let ones: Vec<Vec<usize>> = ones.collect::<Result<_, _>>()?;
    let columns = ones.iter().flatten().max().map_or(0, |last| last + 1);
    let mut features = Array2::zeros((nodes.len(), columns));
    for (mut row, ones) in features.rows_mut().into_iter().zip(&ones) {
        ones.iter().for_each(|&column| row[column] = 1.0 / ones.len() as f32);
    }
    let classes = train.iter().map(|&(_, class)| class + 1).max().unwrap_or(1);
    let elu = |x: f32| if x > 0.0 { x } else { x.exp_m1() };
    // Dropout on entries, with the same hash that the crate uses for weights. Zeros are skipped.
    let dropped = |x: &Array2<f32>, dropout: Dropout| {
        Array2::from_shape_fn(x.raw_dim(), |(i, j)| match x[[i, j]] {
            0.0 => 0.0,
            x => x * dropout.multiplier::<f32>(i, j),
        })
    };

    // The mean cross-entropy over some nodes, and the share of nodes whose class has the largest logit.
    let evaluate = |first: &EdgeGat<f32>, second: &EdgeGat<f32>, nodes: &[(usize, usize)]| {
        let hidden = first.forward(&Inputs::self_attention(features.view(), &graph)?)?.mapv(elu);
        let logits = second.forward(&Inputs::self_attention(hidden.view(), &graph)?)?;
        let [mut loss, mut accuracy] = [0.0; 2];
        for &(node, class) in nodes {
            let row = logits.row(node);
            loss += (row.mapv(f32::exp).sum().ln() - row[class]) / nodes.len() as f32;
            accuracy += f32::from(row.iter().all(|&x| x <= row[class])) / nodes.len() as f32;
        }
        graph_attention::Result::Ok([loss, accuracy])
    };

    let mut accuracies = Vec::new();
    for seed in 0..seeds {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let first = EdgeGatConfig::new(Score::Gat, columns, 8, 8);
        let second = EdgeGatConfig::new(Score::Gat, 8 * 8, classes, 1).average_heads(true);
        let (mut first, mut second) = (first.init(&mut rng)?, second.init(&mut rng)?);
        let mut moments = HashMap::new();
        // The patience of the authors' code: a loss or an accuracy on the validation nodes that is at
        // least as good as before adds 100 epochs; if both are, the model is the best so far.
        let (mut best, mut best_loss, mut best_accuracy) = (None, f32::INFINITY, 0.0);
        let (mut epoch, mut end) = (0, 100);
        while epoch < end {
            epoch += 1;
            let [on_x, on_first, on_hidden, on_second] =
                [(); 4].map(|()| Dropout { probability: 0.6, seed: rng.next_u64() });
            let x = dropped(&features, on_x);
            let x = Inputs::self_attention(x.view(), &graph)?.with_dropout(on_first)?;
            let (out, first_saved) = first.forward_train(&x)?;
            let hidden = out.mapv(elu);
            let h = dropped(&hidden, on_hidden);
            let h = Inputs::self_attention(h.view(), &graph)?.with_dropout(on_second)?;
            let (logits, second_saved) = second.forward_train(&h)?;

            // Adam (Kingma & Ba 2015), with weight decay in the gradient.
            let rate = 0.005 * (1.0 - 0.999f32.powi(epoch)).sqrt() / (1.0 - 0.9f32.powi(epoch));
            let mut adam = |layer: &mut EdgeGat<f32>, which, grads: &[ArrayD<f32>]| {
                params::update(layer, grads, |name, mut param, grad| {
                    let zeros = || [(); 2].map(|()| ArrayD::<f32>::zeros(grad.raw_dim()));
                    let key = (which, name.to_owned());
                    let [mean, square] = moments.entry(key).or_insert_with(zeros);
                    let grad = &grad + 5e-4 * &param;
                    *mean = 0.9 * &*mean + 0.1 * &grad;
                    *square = 0.999 * &*square + 0.001 * &grad * &grad;
                    param.scaled_add(-rate, &(&*mean / square.mapv(|square| square.sqrt() + 1e-8)));
                })
            };
            // The gradient of the mean cross-entropy: softmax(logits) − one-hot class.
            let mut grad = Array2::zeros(logits.raw_dim());
            for &(node, class) in &train {
                let exps = logits.row(node).mapv(f32::exp);
                grad.row_mut(node).assign(&(&exps / exps.sum()));
                grad[[node, class]] -= 1.0;
            }
            grad /= train.len() as f32;
            let grads = second.backward(&h, &second_saved, grad.view())?;
            adam(&mut second, 2, &grads.params)?;
            // The backward pass of dropout drops the same entries; the slope of ELU follows from its value.
            let grad = dropped(&grads.self_attention()?, on_hidden);
            let grad = grad * hidden.mapv(|y| 1.0 + y.min(0.0));
            let grads = first.backward_params(&x, &first_saved, grad.view())?;
            adam(&mut first, 1, &grads)?;

            let [loss, accuracy] = evaluate(&first, &second, &val)?;
            if loss <= best_loss || accuracy >= best_accuracy {
                if loss <= best_loss && accuracy >= best_accuracy {
                    best = Some((first.clone(), second.clone()));
                }
                (best_loss, best_accuracy) = (loss.min(best_loss), accuracy.max(best_accuracy));
                end = epoch + 100;
            }
        }
        let (first, second) =
            best.ok_or("no epoch improved the loss and accuracy on the validation nodes")?;
        accuracies.push(evaluate(&first, &second, &test)?[1]);
        println!(
            "seed {seed}: test accuracy {:.3}, {epoch} epochs",
            accuracies[accuracies.len() - 1]
        );
    }
    let accuracies = Array1::from(accuracies);
    let mean = accuracies.mean().unwrap_or(0.0);
    println!("test accuracy {mean:.3} ± {:.3} over {seeds} seeds", accuracies.std(0.0));
    assert!(mean > 1.5 / classes as f32, "better than chance");
    Ok(())
}
