//! A tree, and its place in the Poincaré disk.

use graph_attention::geometry::poincare::{exp_map, exp_map_origin, log_map};
use graph_attention::{Graph, Result};
use std::f64::consts::TAU;

/// Returns the first nodes of a binary tree, joined in both directions: node i has the children 2i + 1 and 2i + 2.
pub fn binary(nodes: usize) -> Result<Graph> {
    let edges = (1..nodes).flat_map(|child| [(child, (child - 1) / 2), ((child - 1) / 2, child)]);
    Graph::from_edges(nodes, nodes, edges)
}

/// Places the nodes of a binary tree in the disk, with edges of equal length and at equal angles around each node
/// (Sarkar 2011; De Sa et al. 2018, 1804.03329).
pub fn sarkar(tree: &Graph, length: f64) -> Result<Vec<[f64; 2]>> {
    let mut points = vec![[0.0; 2]; tree.num_keys()];
    exp_map_origin(&[length / 2.0, 0.0], 1.0, &mut points[1])?;
    for node in 0..points.len() {
        // The first neighbour is already placed: the parent, or a child for the root.
        let (point, neighbors, mut v) = (points[node], tree.neighbors(node), [0.0; 2]);
        log_map(&point, &points[neighbors[0] as usize], 1.0, &mut v)?;
        for (turn, &neighbor) in neighbors.iter().enumerate().skip(1) {
            let (sin, cos) = (TAU * turn as f64 / neighbors.len() as f64).sin_cos();
            let turned = [cos * v[0] - sin * v[1], sin * v[0] + cos * v[1]];
            exp_map(&point, &turned, 1.0, &mut points[neighbor as usize])?;
        }
    }
    Ok(points)
}
