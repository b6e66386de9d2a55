//! Code that several test files share: comparisons, random arrays, golden data, an oracle, lists of all
//! mechanisms, and the choice of the instruction set.
#![allow(dead_code, reason = "every test file is a separate crate and uses only a part")]

pub(crate) mod close;
pub(crate) mod golden;
pub(crate) mod parameters;
pub(crate) mod random;
pub(crate) mod reference;
pub(crate) mod strategies;

use allocation_counter::{AllocationInfo, measure};
use graph_attention::{
    Attention, DualSpaceConfig, EdgeGatConfig, Flash, Float, GraphRopeConfig, LocalGlobal,
    MoeConfig, MultiHeadConfig, PerformerConfig, PoincareConfig, Result, ScaledDotProduct,
    StackConfig, TransformerLayerConfig, dual_space::Fusion, edge_gat::Score, graph_rope::Layout,
    local_global::Window,
};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Selects the instruction set in the environment variable `GRAPH_ATTENTION_SIMD`. Called first in every test
/// of the files that run on each instruction set.
pub(crate) fn hold_simd() {
    graph_attention::testing::hold_simd().unwrap();
}

/// Asserts that a call was refused. `expected` is the variant of the error and the texts that its message
/// must contain, separated by ` | `.
#[track_caller]
pub(crate) fn refused<T>(result: Result<T>, expected: &str) {
    let error = result.err().unwrap_or_else(|| panic!("accepted instead of {expected}"));
    let (variant, words) = expected.split_once(" | ").unwrap();
    let (debug, message) = (format!("{error:?}"), error.to_string());
    assert!(debug.starts_with(&format!("{variant} {{")), "{debug} instead of {variant}");
    for word in words.split(" | ") {
        assert!(message.contains(word), "`{message}` does not say `{word}`");
    }
}

/// Runs on one thread, because the allocator counts each thread separately.
pub(crate) fn on_one_thread(run: impl FnOnce() + Send) -> AllocationInfo {
    #[cfg(feature = "parallel")]
    {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        pool.install(|| measure(run))
    }
    // A new thread has no scratch memory yet.
    #[cfg(not(feature = "parallel"))]
    std::thread::scope(|scope| scope.spawn(|| measure(run)).join().unwrap())
}

/// Returns every mechanism once, for queries, keys, values and outputs of four columns. Some also read edge
/// features of two columns, distances, positions with one axis, or latent neighbours.
pub(crate) fn mechanisms<F: Float>() -> Vec<Box<dyn Attention<F>>> {
    let rng = &mut random::rng(3);
    let rope = GraphRopeConfig::new(4, Layout::Half);
    let experts = (0..2).map(|_| Box::new(Flash::new()) as Box<dyn Attention<F>>).collect();
    let dual = DualSpaceConfig::new(Fusion::Gated, 4);
    // The only stack for queries and keys of different numbers.
    let stack = StackConfig::new().cross_attention(true);
    let mechanisms: Vec<Box<dyn Attention<F>>> = vec![
        Box::new(ScaledDotProduct::new()),
        Box::new(Flash::new()),
        Box::new(MultiHeadConfig::new(4, 2).init(Flash::new(), rng).unwrap()),
        Box::new(MoeConfig::new(4, 1).init(experts, rng).unwrap()),
        Box::new(LocalGlobal::sliding_window(Window::new(9), Flash::new()).unwrap()),
        Box::new(dual.init(Flash::new(), Flash::new(), Flash::new(), rng).unwrap()),
        Box::new(EdgeGatConfig::new(Score::GatV2, 4, 2, 2).edge_dim(2).init(rng).unwrap()),
        Box::new(PoincareConfig::new().init().unwrap()),
        Box::new(PerformerConfig::new(4, 8).init(rng).unwrap()),
        Box::new(rope.init(Flash::new()).unwrap()),
        Box::new(rope.init_edges().unwrap()),
        Box::new(TransformerLayerConfig::new(4, 3).init(Flash::new(), rng).unwrap()),
        Box::new(stack.init([Flash::new(), Flash::new()]).unwrap()),
    ];
    assert_every_mechanism(mechanisms.iter().map(|mechanism| mechanism.name()));
    mechanisms
}

/// Asserts that no mechanism in the source of the crate is missing.
#[track_caller]
pub(crate) fn assert_every_mechanism(names: impl Iterator<Item = &'static str>) {
    let mut defined = BTreeSet::new();
    names_defined_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/mechanisms"), &mut defined);
    let listed: BTreeSet<String> = names.map(str::to_owned).collect();
    assert_eq!(listed, defined, "the list differs from the mechanisms of the crate");
}

fn names_defined_in(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            names_defined_in(&path, names);
        } else {
            let source = fs::read_to_string(path).unwrap();
            let name =
                source.split_once("const NAME: &str = \"").and_then(|it| it.1.split_once('"'));
            names.extend(name.map(|(name, _)| name.to_owned()));
        }
    }
}
