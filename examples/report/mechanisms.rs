//! The list of mechanisms; add new ones here.

use crate::measure::{COLUMNS, DEGREE};
use graph_attention::neighbors::Metric;
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Attention, DualSpaceConfig, EdgeGatConfig, Flash, Float, GraphRopeConfig, LocalGlobal,
    MoeConfig, MultiHeadConfig, PerformerConfig, PoincareConfig, Result, ScaledDotProduct,
    StackConfig, TransformerLayerConfig,
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
    let layer = |rng: &mut Xoshiro256PlusPlus| {
        let heads = MultiHeadConfig::new(COLUMNS, 4).init(Flash::new(), rng)?;
        TransformerLayerConfig::new(COLUMNS, 4 * COLUMNS).init(heads, rng)
    };
    // The only stack for queries and keys of different numbers.
    let stack = StackConfig::new().cross_attention(true);
    let of = |attention, color, when, unless| Mechanism { attention, when, unless, color };
    Ok(vec![
        of(
            Box::new(Flash::new()),
            "currentColor",
            "exact softmax attention over any pairs: the default",
            "you need the weights in every step",
        ),
        of(
            Box::new(ScaledDotProduct::new()),
            "#8b929c",
            "small inputs, to read the weights or to check against",
            "inputs are large: it stores all weights",
        ),
        of(
            Box::new(MultiHeadConfig::new(COLUMNS, 4).init(Flash::new(), rng)?),
            "#3b82f6",
            "a layer that learns projections",
            "queries and keys can be compared directly",
        ),
        of(
            Box::new(MoeConfig::new(COLUMNS, 2).init(experts, rng)?),
            "#8b5cf6",
            "queries that need different mechanisms (here 2 of 8 Flash)",
            "one mechanism suits all queries",
        ),
        of(
            Box::new(LocalGlobal::sliding_window(Window::new(RADIUS), Flash::new())?),
            "#0d9f6e",
            "a long sequence in which near keys matter",
            "important keys are far away and not global",
        ),
        of(
            Box::new(PerformerConfig::new(COLUMNS, FEATURES).init(rng)?),
            "#0ea5c6",
            "very many keys, and a tolerance for errors",
            "keys are few, masks are by pair, or weights are sharp",
        ),
        of(
            Box::new(dual.with_search(search)),
            "#e0529c",
            "neighbours in a graph, and similar nodes without a link",
            "links already join similar nodes",
        ),
        of(
            Box::new(EdgeGatConfig::new(Score::GatV2, COLUMNS, COLUMNS / 4, 4).init(rng)?),
            "#d98a06",
            "graphs with edge features, and networks trained in PyG",
            "inputs are dense: it scores pairs one by one",
        ),
        of(
            Box::new(PoincareConfig::new().coordinates(Coordinates::Tangent).init()?),
            "#e5484d",
            "trees and hierarchies",
            "the data has no hierarchy",
        ),
        of(
            Box::new(rope.init(Flash::new())?),
            "#7aa116",
            "positions of nodes: order, coordinates, hops from anchors",
            "only distances between pairs are known",
        ),
        of(
            Box::new(rope.init_edges()?),
            "#a8703c",
            "distances between pairs: hops, lengths, layers",
            "inputs are dense and large: it rotates every pair",
        ),
        of(
            Box::new(layer(rng)?),
            "#14b8a6",
            "a whole layer: attention (here Flash), feed-forward, norms",
            "your model has its own residual connections",
        ),
        of(
            Box::new(stack.init([layer(rng)?, layer(rng)?])?),
            "#f472b6",
            "several layers, one after the other (here 2 over the same keys)",
            "activations of a layer are needed between the layers",
        ),
    ])
}
