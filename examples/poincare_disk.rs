//! Draws a tree in the Poincaré disk and the nodes that one node attends to, by hyperbolic distance.
//!
//! ```sh
//! cargo run --release -p examples --example poincare_disk              # to the temporary folder
//! cargo run --release -p examples --example poincare_disk -- disk.svg
//! ```
//!
//! Nodes get smaller towards the boundary, as all lengths do: in hyperbolic length, all edges are equal.
//! The layout is the same as in `hyperbolic_tree`.

use examples::tree;
use graph_attention::geometry::poincare::{conformal_factor, exp_map, log_map};
use graph_attention::ndarray::Array2;
use graph_attention::{Attention, Inputs, PoincareConfig};
use std::{env, error::Error, fmt::Write, fs, path::PathBuf};

/// The complete binary tree of depth 5: node i has the children 2i + 1 and 2i + 2.
const NODES: usize = 63;
/// The node with the attention to draw.
const QUERY: usize = 4;

fn main() -> Result<(), Box<dyn Error>> {
    let points = tree::sarkar(&tree::binary(NODES)?, 1.0)?;
    let (query, keys) = (Array2::from(vec![points[QUERY]]), Array2::from(points.clone()));
    let attention = PoincareConfig::new().temperature(0.25).init()?;
    let weights =
        attention.attention_weights(&Inputs::dense(query.view(), keys.view(), keys.view())?)?;

    let mut svg = r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1.05 -1.05 2.1 2.1">
<rect x="-1.05" y="-1.05" width="2.1" height="2.1" fill="white"/><circle r="1" fill="#f3f3f3"/>"##
        .to_owned();
    for child in 1..NODES {
        let line = geodesic(&points[(child - 1) / 2], &points[child])?;
        writeln!(svg, "{line} stroke='#999' stroke-width='0.005'/>")?;
    }
    let mut others: Vec<_> = (0..NODES).filter(|&node| node != QUERY).collect();
    others.sort_by(|&a, &b| weights[[b, 0]].total_cmp(&weights[[a, 0]]));
    for &node in &others {
        // Relative to the attention that is not to itself.
        let width = 0.06 * weights[[node, 0]] / (1.0 - weights[[QUERY, 0]]);
        let line = geodesic(&points[QUERY], &points[node])?;
        writeln!(svg, "{line} stroke='#e8590c' stroke-width='{width:.5}' opacity='0.7'/>")?;
    }
    for (node, point) in points.iter().enumerate() {
        let ([x, y], radius) = (point, 0.004 + 0.04 / conformal_factor(point, 1.0)?);
        let color = if node == QUERY { "#e8590c" } else { "#3b528b" };
        writeln!(svg, "<circle cx='{x:.4}' cy='{y:.4}' r='{radius:.4}' fill='{color}'/>")?;
    }
    let temporary = env::temp_dir().join("poincare_disk.svg");
    let path = env::args().nth(1).map_or(temporary, PathBuf::from);
    fs::write(&path, svg + "</svg>\n")?;

    println!("node {QUERY} attends most to itself, {:.3}, and to", weights[[QUERY, 0]]);
    for &node in &others[..5] {
        println!("  node {node:2}  {:.3}", weights[[node, 0]]);
    }
    println!("picture: {}", path.display());
    others.truncate(3);
    others.sort();
    assert_eq!(others, [1, 9, 10], "its parent and its children");
    Ok(())
}

/// The start of an SVG element: the shortest line in the disk.
fn geodesic(from: &[f64], to: &[f64]) -> Result<String, Box<dyn Error>> {
    let (mut v, mut at) = ([0.0; 2], [0.0; 2]);
    log_map(from, to, 1.0, &mut v)?;
    let mut line = "<polyline fill='none' points='".to_owned();
    for step in 0..=16 {
        exp_map(from, &v.map(|v| v * f64::from(step) / 16.0), 1.0, &mut at)?;
        write!(line, "{:.4},{:.4} ", at[0], at[1])?;
    }
    Ok(line + "'")
}
