//! The list of mechanisms; add new ones here.

use crate::measure::{COLUMNS, DEGREE};
use graph_attention::neighbors::Metric;
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Attention, DualSpaceConfig, EdgeGatConfig, Flash, Float, GraphRopeConfig, LocalGlobal,
    MoeConfig, MultiHeadConfig, PerformerConfig, PoincareConfig, Result, ScaledDotProduct,
    dual_space::{Fusion, LatentSearch},
    edge_gat::Score,
    graph_rope::Layout,
    local_global::Window,
    poincare::Coordinates,
};

pub(crate) const RADIUS: usize = 64;
pub(crate) const FEATURES: usize = 256;

/// A mechanism, its use, its drawbacks, and the colour of its lines.
pub(crate) struct Mechanism<F: Float> {
    pub(crate) attention: Box<dyn Attention<F>>,
    pub(crate) when: &'static str,
    pub(crate) unless: &'static str,
    pub(crate) color: &'static str,
}

/// Returns all mechanisms, with the same parameters on every call.
pub(crate) fn mechanisms<F: Float>() -> Result<Vec<Mechanism<F>>> {
    let rng = &mut Xoshiro256PlusPlus::seed_from_u64(1);
    let experts = (0..8).map(|_| Box::new(Flash::new()) as Box<dyn Attention<F>>).collect();
    let dual = DualSpaceConfig::new(Fusion::Gated, COLUMNS);
    let dual = dual.init(Flash::new(), Flash::new(), Flash::new(), rng)?;
    let search = LatentSearch::new(DEGREE, Metric::Cosine).exclude_self(false);
    let rope = GraphRopeConfig::new(COLUMNS, Layout::Half);
    let of = |attention, color, when, unless| Mechanism { attention, when, unless, color };
    Ok(vec![
        of(
            Box::new(Flash::new()),
            "currentColor",
            "softmax attention over any pairs: the default",
            "you want to read the weights of every step",
        ),
        of(
            Box::new(ScaledDotProduct::new()),
            "#8b929c",
            "weights to look at, or a text to check against",
            "inputs are large: it holds all weights",
        ),
        of(
            Box::new(MultiHeadConfig::new(COLUMNS, 4).init(Flash::new(), rng)?),
            "#3b82f6",
            "a layer that learns what to compare",
            "queries and keys are comparable as they are",
        ),
        of(
            Box::new(MoeConfig::new(COLUMNS, 2).init(experts, rng)?),
            "#8b5cf6",
            "queries that need different mechanisms (here 2 of 8 Flash)",
            "one mechanism serves all",
        ),
        of(
            Box::new(LocalGlobal::sliding_window(Window::new(RADIUS), Flash::new())?),
            "#0d9f6e",
            "a long order in which near keys matter",
            "what matters is far, and not among the globals",
        ),
        of(
            Box::new(PerformerConfig::new(COLUMNS, FEATURES).init(rng)?),
            "#0ea5c6",
            "very many keys, and an error is allowed",
            "keys are few or masked pair by pair, or weights are sharp",
        ),
        of(
            Box::new(dual.with_search(search)),
            "#e0529c",
            "neighbours in a graph, and others that are alike",
            "links already say who is alike",
        ),
        of(
            Box::new(EdgeGatConfig::new(Score::GatV2, COLUMNS, COLUMNS / 4, 4).init(rng)?),
            "#d98a06",
            "graphs with edge features, and networks trained in PyG",
            "all pairs attend: it scores them one by one",
        ),
        of(
            Box::new(PoincareConfig::new().coordinates(Coordinates::Tangent).init()?),
            "#e5484d",
            "trees and hierarchies",
            "nothing in the data branches",
        ),
        of(
            Box::new(rope.init(Flash::new())?),
            "#7aa116",
            "positions of nodes: order, coordinates, hops from anchors",
            "only distances of pairs are known",
        ),
        of(
            Box::new(rope.init_edges()?),
            "#a8703c",
            "distances of pairs: hops, lengths, layers",
            "inputs are dense and large: it turns every pair",
        ),
    ])
}
