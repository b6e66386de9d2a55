//! The graphs of the page.

use graph_attention::rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Error, Graph, Result};
use std::f64::consts::TAU;

pub(crate) const NAMES: [&str; 4] = ["karate club", "tree", "three groups", "ring with shortcuts"];

pub(crate) struct Example {
    /// The edges in both directions, and of each node to itself.
    pub(crate) graph: Graph,
    pub(crate) edges: Vec<(usize, usize)>,
    /// The places of the nodes in the picture, from 0 to 1.
    pub(crate) places: Vec<[f64; 2]>,
    pub(crate) classes: Vec<usize>,
    /// The nodes whose class is known.
    pub(crate) known: Vec<usize>,
}

impl Example {
    pub(crate) fn new(name: &str) -> Result<Self> {
        match name {
            "karate club" => karate_club(),
            "tree" => tree(),
            "three groups" => groups(),
            "ring with shortcuts" => ring(),
            _ => {
                let expected = NAMES.join(", ").into();
                Err(Error::InvalidArgument { argument: "graph", expected, actual: name.into() })
            }
        }
    }

    fn of(
        edges: Vec<(usize, usize)>,
        places: Vec<[f64; 2]>,
        classes: Vec<usize>,
        known: &[usize],
    ) -> Result<Self> {
        let both_ways = edges.iter().flat_map(|&(u, v)| [(u, v), (v, u)]);
        let graph = Graph::from_edges(places.len(), places.len(), both_ways)?.with_self_loops()?;
        Ok(Self { graph, edges, places, classes, known: known.to_vec() })
    }
}

fn on_circle(share: f64, radius: f64, [x, y]: [f64; 2]) -> [f64; 2] {
    [x + radius * (TAU * share).cos(), y + radius * (TAU * share).sin()]
}

/// The sides of a club that split; only the two who quarrelled are known.
fn karate_club() -> Result<Example> {
    let places = PLACES.map(|[x, y]| [f64::from(x) / 200.0, f64::from(y) / 124.0]);
    let sides = SIDES.bytes().map(|side| usize::from(side == b'o')).collect();
    Example::of(KARATE_CLUB.to_vec(), places.to_vec(), sides, &[0, 33])
}

/// A tree of 63 nodes in which each has two children; classes are the four branches two steps from the root.
fn tree() -> Result<Example> {
    let depth = |node: usize| (node + 1).ilog2();
    let place = |node: usize| {
        let level = depth(node);
        let share = (node as f64 + 1.5) / f64::from(1 << level) - 1.0;
        on_circle(share, 0.1 * f64::from(level), [0.5, 0.5])
    };
    // Above the branches, as the next branch below them on the left.
    let branch = |mut node: usize| {
        while depth(node) < 2 {
            node = 2 * node + 1;
        }
        while depth(node) > 2 {
            node = (node - 1) / 2;
        }
        node - 3
    };
    let edges = (1..63).map(|node| ((node - 1) / 2, node)).collect();
    let known: Vec<usize> = (7..15).collect();
    Example::of(edges, (0..63).map(place).collect(), (0..63).map(branch).collect(), &known)
}

/// Three groups of 14, with many edges inside and few between.
fn groups() -> Result<Example> {
    let rng = &mut Xoshiro256PlusPlus::seed_from_u64(4);
    let group = |node: usize| node / 14;
    let mut edges = Vec::new();
    for (u, v) in (0..42).flat_map(|u| (u + 1..42).map(move |v| (u, v))) {
        let probability = if group(u) == group(v) { 0.4 } else { 0.015 };
        if rng.random_range(0.0..1.0) < probability {
            edges.push((u, v));
        }
    }
    let place = |node: usize| {
        let center = on_circle(group(node) as f64 / 3.0 - 0.25, 0.28, [0.5, 0.54]);
        on_circle(node as f64 / 14.0, 0.19, center)
    };
    let places = (0..42).map(place).collect();
    Example::of(edges, places, (0..42).map(group).collect(), &[3, 10, 17, 24, 31, 38])
}

/// A ring of 48 nodes, each with two neighbours on either side, and six shortcuts; classes are its quarters.
fn ring() -> Result<Example> {
    let near = (0..48).flat_map(|node| [(node, (node + 1) % 48), (node, (node + 2) % 48)]);
    let shortcuts = [(1, 26), (8, 41), (14, 34), (19, 45), (5, 30), (22, 38)];
    let places = (0..48).map(|node| on_circle(node as f64 / 48.0, 0.46, [0.5, 0.5])).collect();
    let quarters = (0..48).map(|node| node / 12).collect();
    let known: Vec<usize> = (0..48).filter(|node| node % 4 == 1).collect();
    Example::of(near.chain(shortcuts).collect(), places, quarters, &known)
}

/// The side that each member took: Mr Hi's (member 0) or the officer's (member 33).
const SIDES: &str = "hhhhhhhhhohhhhoohhohohoooooooooooo";

/// The positions of the members in the picture, with distances roughly proportional to hops.
#[rustfmt::skip]
const PLACES: [[u8; 2]; 34] = [
    [56, 62], [68, 42], [91, 33], [54, 25], [18, 57], [34, 99], [18, 82], [69, 9], [103, 64],
    [138, 9], [37, 75], [54, 102], [23, 24], [84, 56], [197, 61], [200, 38], [0, 109], [35, 44],
    [158, 6], [84, 80], [186, 22], [39, 10], [178, 0], [170, 90], [139, 122], [160, 120], [197,
    85], [150, 87], [136, 57], [178, 68], [132, 32], [130, 81], [160, 37], [156, 60],
];

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
