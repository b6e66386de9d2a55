//! A tree fits into the hyperbolic plane but not into the Euclidean plane: attention by distance in the
//! Poincaré disk ranks the neighbours in the tree first.
//!
//! ```sh
//! cargo run --release -p examples --example hyperbolic_tree
//! ```
//!
//! Sarkar's construction (2011; De Sa et al. 2018, arXiv:1804.03329) places a tree with edges of equal
//! length, at equal angles around each node. Distortion: the largest ratio of distance to hops divided by
//! the smallest. mAP: the mean average precision of tree neighbours, ranked by attention.

use examples::{metrics, tree};
use graph_attention::geometry::poincare::distance;
use graph_attention::ndarray::Array2;
use graph_attention::{Attention, Graph, Inputs, PoincareConfig, Result};
use std::f64::consts::TAU;

/// The complete binary tree of depth 5: node i has the children 2i + 1 and 2i + 2.
const NODES: usize = 63;

fn main() -> Result<()> {
    let tree = tree::binary(NODES)?;
    println!("layout                               distortion    mAP");
    for (length, known) in (1..).zip([2.493, 1.199, 1.102, 1.070, 1.054]) {
        let (distortion, precision) =
            quality(&tree, &tree::sarkar(&tree, f64::from(length))?, 1.0)?;
        println!("Poincaré disk, edges of length {length}     {distortion:>10.3}  {precision:.3}");
        assert!((distortion - known).abs() < 5e-4 && precision == 1.0, "agrees with the theory");
    }
    // The same in the plane, each level at equal angles on a circle. Such a large ball is practically
    // flat.
    let circles = (0..NODES).map(|node| {
        let first = (1 << (node + 1).ilog2()) - 1;
        let (sin, cos) = (TAU * ((node - first) as f64 + 0.5) / (first + 1) as f64).sin_cos();
        [cos, sin].map(|x| x * f64::from((node + 1).ilog2()))
    });
    let (distortion, precision) = quality(&tree, &circles.collect::<Vec<_>>(), 1e-12)?;
    println!("Euclidean plane, levels on circles   {distortion:>10.3}  {precision:.3}");
    assert!(distortion > 7.0 && precision < 0.7, "the tree does not fit into the plane");
    Ok(())
}

/// Returns distortion and mAP.
fn quality(tree: &Graph, points: &[[f64; 2]], curvature: f64) -> Result<(f64, f64)> {
    let hops = tree.hops_from(&(0..NODES).map(|node| [node]).collect::<Vec<_>>(), f64::INFINITY)?;
    let x = Array2::from(points.to_vec());
    let attention = PoincareConfig::new().curvature(curvature).init()?;
    let weights = attention.attention_weights(&Inputs::dense(x.view(), x.view(), x.view())?)?;
    let (mut least, mut most, mut precision) = (f64::INFINITY, 0f64, 0.0);
    for node in 0..NODES {
        let mut others: Vec<_> = (0..NODES).filter(|&other| other != node).collect();
        for &other in &others {
            let ratio = distance(&points[node], &points[other], curvature)? / hops[[node, other]];
            (least, most) = (least.min(ratio), most.max(ratio));
        }
        let weight = |other: usize| weights[[node * NODES + other, 0]];
        others.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)));
        let is_neighbor = others.into_iter().map(|other| hops[[node, other]] == 1.0);
        precision += metrics::average_precision(is_neighbor, tree.neighbors(node).len());
    }
    Ok((most / least, precision / NODES as f64))
}
