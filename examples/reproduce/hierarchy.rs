//! Positions of the nodes of a hierarchy in the Poincaré ball, learned from its (descendant, ancestor) pairs as in
//! Nickel & Kiela 2017, 1705.08039, with the gradients of hyperbolic attention: 5 columns and 300 epochs as in the
//! script of its authors for WordNet's mammals.

use examples::{data, metrics};
use graph_attention::geometry::poincare::{conformal_factor, exp_map, project};
use graph_attention::ndarray::{Array1, Array2, Axis};
use graph_attention::rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus, seq::SliceRandom};
use graph_attention::{Attention, Graph, Inputs, PoincareConfig, poincare::Aggregation};
use std::{collections::BTreeMap, error::Error, iter, path::PathBuf};

/// For each descendant: an ancestor, then nodes that are not ancestors.
const KEYS: usize = 1 + 50;
const COLUMNS: usize = 5;

/// Returns the mean average precision of ancestors among all nodes ranked by attention, in percent. The folder
/// contains `closure.csv` with the columns `descendant` and `ancestor`.
pub fn run(folder: Option<PathBuf>, seed: u64) -> Result<f64, Box<dyn Error>> {
    // Without a folder, a tree in which every node has three children.
    let parent = |&node: &usize| Some(node.checked_sub(1)? / 3);
    let ancestors = |node| iter::successors(Some(node), parent).skip(1);
    let mut pairs = match folder {
        Some(folder) => data::pairs(&data::text(folder.join("closure.csv"))?)?,
        None => (1..40).flat_map(|node| ancestors(node).map(move |up| (node, up))).collect(),
    };
    let n = pairs.iter().map(|&(u, v)| u.max(v) + 1).max().unwrap_or(0);
    let mut is_ancestor = Array2::from_elem((n, n), false);
    pairs.iter().for_each(|&pair| is_ancestor[pair] = true);
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut points = Array2::from_shape_simple_fn((n, COLUMNS), || rng.random_range(-1e-3..1e-3));
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
                *sums.entry(node).or_insert(Array1::zeros(COLUMNS)) += &grad;
            }
            for (node, sum) in sums {
                // The metric of the ball is λ² times the flat metric, and steps follow geodesics.
                let (x, mut end) = (points.row(node).to_vec(), vec![0.0; COLUMNS]);
                let v = sum * (-rate / conformal_factor(&x, 1.0)?.powi(2));
                exp_map(&x, &v.to_vec(), 1.0, &mut end)?;
                project(&end, 1.0, 1e-5, points.row_mut(node).as_slice_mut().expect("contiguous"))?;
            }
        }
    }
    let learned = precision(&points, &is_ancestor)?;
    assert!(learned > 4.0 * before, "it learns");
    Ok(100.0 * learned)
}

fn precision(points: &Array2<f64>, is_ancestor: &Array2<bool>) -> graph_attention::Result<f64> {
    let (n, x) = (points.nrows(), points.view());
    let weights = PoincareConfig::new().init()?.attention_weights(&Inputs::dense(x, x, x)?)?;
    let mut precisions = Vec::new();
    for node in 0..n {
        let total = is_ancestor.row(node).iter().filter(|&&is| is).count();
        if total == 0 {
            continue; // the root
        }
        let mut others: Vec<_> = (0..n).filter(|&other| other != node).collect();
        others.sort_by(|&a, &b| weights[[node * n + b, 0]].total_cmp(&weights[[node * n + a, 0]]));
        let ranking = others.into_iter().map(|other| is_ancestor[[node, other]]);
        precisions.push(metrics::average_precision(ranking, total));
    }
    let [mean, _] = metrics::mean_and_std(&precisions);
    Ok(mean)
}
