//! Learns positions of the nodes of a hierarchy in the Poincaré ball from its (descendant, ancestor)
//! pairs, as in Nickel & Kiela 2017, arXiv:1705.08039, with the gradients of hyperbolic attention.
//!
//! ```sh
//! cargo run --release -p examples --features csv --example learn_hierarchy                      # a tree of 40 nodes, 2 dimensions
//! cargo run --release -p examples --features csv --example learn_hierarchy -- <folder> --dim 5  # WordNet's mammals: mAP 0.96
//! ```
//!
//! The folder contains `closure.csv` with the columns `descendant` and `ancestor`, nodes numbered from 0.
//! mAP is the mean average precision of ancestors among all nodes ranked by attention. Dev-dependency:
//! `csv`.

use graph_attention::geometry::poincare::{conformal_factor, exp_map, project};
use graph_attention::ndarray::{Array1, Array2, Axis};
use graph_attention::rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus, seq::SliceRandom};
use graph_attention::{Attention, Graph, Inputs, PoincareConfig, poincare::Aggregation};
use std::{collections::BTreeMap, env, error::Error, iter};

const KEYS: usize = 1 + 50; // for each descendant: an ancestor, then nodes that are not ancestors

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let dim = args.get(2).map_or(Ok(2), |dim| dim.parse())?;
    // Without a folder, a tree in which every node has three children.
    let parent = |&node: &usize| Some(node.checked_sub(1)? / 3);
    let ancestors = |node| iter::successors(Some(node), parent).skip(1);
    let file = args.first().map(|folder| csv::Reader::from_path(format!("{folder}/closure.csv")));
    let mut pairs: Vec<(usize, usize)> = match file {
        Some(file) => file?.into_deserialize().collect::<Result<_, _>>()?,
        None => (1..40).flat_map(|node| ancestors(node).map(move |up| (node, up))).collect(),
    };
    let n = pairs.iter().map(|&(u, v)| u.max(v) + 1).max().unwrap_or(0);
    let mut is_ancestor = Array2::from_elem((n, n), false);
    pairs.iter().for_each(|&pair| is_ancestor[pair] = true);
    println!("{n} nodes, {} pairs, {dim} dimensions", pairs.len());
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2017);
    let mut points = Array2::from_shape_simple_fn((n, dim), || rng.random_range(-1e-3..1e-3));
    let before = precision(&points, &is_ancestor)?;
    let attention = PoincareConfig::new().aggregation(Aggregation::TangentAtOrigin).init()?;
    for epoch in 0..300 {
        // While all nodes are near the origin, small steps find the directions.
        let rate = if epoch < 20 { 0.005 } else { 0.05 };
        pairs.shuffle(&mut rng);
        for batch in pairs.chunks(10) {
            let descendants: Vec<_> = batch.iter().map(|&(descendant, _)| descendant).collect();
            let mut others = Vec::new();
            for &(node, ancestor) in batch {
                let is_none = |&other: &usize| other != node && !is_ancestor[[node, other]];
                let draws = iter::repeat_with(|| rng.random_range(0..n)).filter(is_none);
                others.extend(iter::once(ancestor).chain(draws.take(KEYS - 1)));
            }
            // In the tangent space the value of the ancestor is 1 and the others are 0, so the weighted
            // mean is the weight of the ancestor.
            let query = points.select(Axis(0), &descendants);
            let key = points.select(Axis(0), &others);
            let value = |(key, _)| if key % KEYS == 0 { 1f64.tanh() } else { 0.0 };
            let value = Array2::from_shape_fn((others.len(), 1), value);
            let own_keys = (0..others.len()).map(|key| (key / KEYS, key));
            let graph = Graph::from_edges(batch.len(), others.len(), own_keys)?;
            let inputs = Inputs::graph(query.view(), key.view(), value.view(), &graph)?;
            let (out, saved) = attention.forward_train(&inputs)?;
            // The loss is minus the logarithm of this weight.
            let grad_out = out.mapv(|out| -1.0 / (out.atanh() * (1.0 - out * out)));
            let grads = attention.backward(&inputs, &saved, grad_out.view())?;
            let mut sums = BTreeMap::new();
            let rows = grads.query.rows().into_iter().chain(grads.key.rows());
            for (node, grad) in descendants.into_iter().chain(others).zip(rows) {
                *sums.entry(node).or_insert(Array1::zeros(dim)) += &grad;
            }
            for (node, sum) in sums {
                // The metric of the ball is λ² times the flat metric, and steps follow geodesics.
                let (x, mut end) = (points.row(node).to_vec(), vec![0.0; dim]);
                let v = sum * (-rate / conformal_factor(&x, 1.0)?.powi(2));
                exp_map(&x, &v.to_vec(), 1.0, &mut end)?;
                project(&end, 1.0, 1e-5, points.row_mut(node).as_slice_mut().expect("contiguous"))?;
            }
        }
    }
    let learned = precision(&points, &is_ancestor)?;
    let mut order: Vec<_> = (0..n).collect();
    order.sort_by_key(|&node| points.row(node).dot(&points.row(node)).to_bits());
    println!("mAP of ancestors: random positions {before:.3}, learned {learned:.3}");
    println!("nearest to the origin: nodes {:?}", &order[..n.min(4)]);
    assert!(learned > 5.0 * before, "it learns");
    Ok(())
}

fn precision(points: &Array2<f64>, is_ancestor: &Array2<bool>) -> graph_attention::Result<f64> {
    let (n, x) = (points.nrows(), points.view());
    let weights = PoincareConfig::new().init()?.attention_weights(&Inputs::dense(x, x, x)?)?;
    let mut precisions = Vec::new();
    for node in 0..n {
        let mut others: Vec<_> = (0..n).filter(|&other| other != node).collect();
        others.sort_by(|&a, &b| weights[[node * n + b, 0]].total_cmp(&weights[[node * n + a, 0]]));
        let places = (1..).zip(others).filter(|&(_, other)| is_ancestor[[node, other]]);
        let found = (1..).zip(places).map(|(k, (place, _))| f64::from(k) / f64::from(place));
        precisions.extend(Array1::from_iter(found).mean());
    }
    Ok(precisions.iter().sum::<f64>() / precisions.len() as f64)
}
