//! Attention on graphs, vectors and hidden states: one trait for every mechanism, with exact,
//! hand-written gradients.
//!
//! # Pairs
//!
//! A single query over its neighbours, a dense sequence, a packed batch of sequences of different lengths,
//! and a graph whose nodes attend to their neighbours are all the same problem: a set of (query, key)
//! *pairs*, grouped by query. [`Inputs`] holds the arrays
//! and the pairs; an [`Attention`] maps it to an output with one row per query.
//!
//! ```
//! use graph_attention::ndarray::array;
//! use graph_attention::{Attention, Flash, Inputs};
//!
//! // Three nodes with two columns each. Every node attends to all three: 9 pairs.
//! let nodes = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
//! let inputs = Inputs::dense(nodes.view(), nodes.view(), nodes.view())?; // query, key, value
//! let out = Flash::new().forward(&inputs)?;
//! assert_eq!(out.dim(), (3, 2)); // queries × columns of the values
//! # Ok::<(), graph_attention::Error>(())
//! ```
//!
//! A [`Graph`] lists the pairs explicitly. Nothing else changes: every mechanism takes both.
//!
//! ```
//! use graph_attention::ndarray::array;
//! use graph_attention::{Attention, Flash, Graph, Inputs};
//!
//! let nodes = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
//! // Node 0 attends to nodes 1 and 2, node 1 to node 2, node 2 to none.
//! let graph = Graph::from_edges(3, 3, [(0, 1), (0, 2), (1, 2)])?;
//! let inputs = Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)?;
//! let out = Flash::new().forward(&inputs)?;
//! assert_eq!(out.row(1), nodes.row(2)); // the only node that node 1 sees
//! assert_eq!(out.row(2).sum(), 0.0); // zeros for a query without keys
//! # Ok::<(), graph_attention::Error>(())
//! ```
//!
//! # Per-pair data and heads
//!
//! Per-pair data (edge features, distances, a bias) are arrays with one row per pair, in the order of
//! your edge list; attention weights are returned in the same order. A mechanism with parameters is built
//! from a configuration, which initialises them with an `rng` that you pass. [`EdgeGat`] and
//! [`MultiHead`] split into heads themselves; for the others, use [`Inputs::with_heads`].
//!
//! ```
//! use graph_attention::ndarray::array;
//! use graph_attention::{Attention, EdgeGatConfig, Graph, Inputs, edge_gat::Score};
//! use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
//!
//! let nodes = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
//! let graph = Graph::from_edges(3, 3, [(0, 1), (0, 2), (1, 2)])?;
//! let lengths = array![[0.5], [2.0], [1.0]]; // for the edges (0, 1), (0, 2), (1, 2)
//! let inputs = Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)?
//!     .with_edge_features(lengths.view())?;
//!
//! // A graph attention layer: nodes with 2 columns, 3 heads of 4 columns, edges with 1 feature.
//! let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
//! let layer = EdgeGatConfig::new(Score::GatV2, 2, 4, 3).edge_dim(1).init::<f64>(&mut rng)?;
//! assert_eq!(layer.forward(&inputs)?.dim(), (3, 12)); // heads side by side
//! let weights = layer.attention_weights(&inputs)?; // pairs × heads
//! assert!((weights[[0, 0]] + weights[[1, 0]] - 1.0).abs() < 1e-12); // the two edges of node 0
//! # Ok::<(), graph_attention::Error>(())
//! ```
//!
//! # Training
//!
//! There is no tape. [`forward_train`](Attention::forward_train) also returns the state that the backward
//! pass needs, and [`backward`](Attention::backward) turns the gradient of your loss with respect to the
//! output into [`Gradients`] of the inputs, the per-pair data and the parameters. [`params::update`]
//! passes each parameter and its gradient to your optimiser and skips buffers, which are saved but not
//! trained. The optimiser here is plain gradient descent.
//!
//! ```
//! use graph_attention::ndarray::array;
//! use graph_attention::{Attention, EdgeGatConfig, Graph, Inputs, edge_gat::Score, params};
//! use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
//!
//! let nodes = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
//! let graph = Graph::from_edges(3, 3, [(0, 1), (0, 2), (1, 2)])?;
//! let lengths = array![[0.5], [2.0], [1.0]];
//! let inputs = Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)?
//!     .with_edge_features(lengths.view())?;
//! let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
//!
//! // One number for each node: the mean of 3 heads of 1 column.
//! let config = EdgeGatConfig::new(Score::GatV2, 2, 1, 3).edge_dim(1).average_heads(true);
//! let mut layer = config.init::<f64>(&mut rng)?;
//! let target = array![[1.0], [3.0], [0.0]];
//! let mut losses = vec![];
//! for _step in 0..50 {
//!     let (out, saved) = layer.forward_train(&inputs)?;
//!     let error = out - &target; // the gradient of the loss |out − target|² / 2
//!     losses.push(error.mapv(|e| e * e).sum() / 2.0);
//!     let grads = layer.backward(&inputs, &saved, error.view())?;
//!     params::update(&mut layer, &grads.params, |_name, mut param, grad| {
//!         param.scaled_add(-0.2, &grad);
//!     })?;
//! }
//! assert!(losses[49] < losses[0] / 100.0);
//! # Ok::<(), graph_attention::Error>(())
//! ```
//!
//! [`guide::training`] covers several layers, other optimisers and saving. The [`guide`] also explains
//! how to [choose a mechanism](guide::choosing), [port from PyTorch or PyG](guide::from_pytorch) and from
//! [`flex_attention`](guide::from_flex_attention), and
//! [write your own mechanism](guide::own_mechanism), and covers [numerics](guide::numerics),
//! [performance](guide::performance) and work [beyond one machine](guide::beyond_one_machine).
//!
//! # Mechanisms
//!
//! | mechanism | computes | memory besides the output |
//! |---|---|---|
//! | [`ScaledDotProduct`] | softmax attention, written for readability | O(pairs · heads) |
//! | [`Flash`] | the same function, fast, in tiles | O(n) |
//! | [`MultiHead`] | learned projections around any mechanism | O(n), plus the inner mechanism's |
//! | [`Moe`] | a mixture of attention experts; a router picks a few for each query | O(n), plus the experts' |
//! | [`LocalGlobal`] | sliding windows and global positions in O(n) time; local and global edges, in one softmax or with a learned gate | O(n); O(pairs) with edge layers |
//! | [`DualSpace`] | attention over graph neighbours, over latent neighbours, and cross-attention between the two | O(n), plus the inner mechanisms' |
//! | [`EdgeGat`] | graph attention networks with edge features: GAT, GATv2, graph transformer | O(n); O(pairs · heads) in training |
//! | [`Poincare`] | softmax of hyperbolic distances, and midpoints in the Poincaré ball | O(n) |
//! | [`Performer`] | linear attention with random features, in O(n) time | O(n) |
//! | [`GraphRope`] | rotary embeddings of node positions, applied before any mechanism | O(n), plus the inner mechanism's |
//! | [`EdgeRope`] | softmax attention with rotary embeddings of distances | O(n) |
//! | [`TransformerLayer`] | attention by any mechanism and a feed-forward network, with residual connections and norms | O(n), plus the inner mechanism's |
//! | [`Stack`] | layers one after the other, of any mechanisms | O(n); in training O(n · layers), plus the layers' |
//!
//! Each page gives the equations, the inputs that the mechanism reads, shapes, cost, errors and sources.
//! Numbers such as 1706.03762 are arXiv identifiers.
//!
//! Besides the mechanisms, [`neighbors`] finds the keys nearest to each query and returns them as a
//! [`Graph`] to attend over; [`KeyValueCache`] holds the past of a growing sequence for [`Attention::decode`];
//! [`score`] has functions of the logits (soft caps, ALiBi, relative positions, sinks, your own);
//! [`Partial`] merges outputs over shards of the keys, and has gradients; [`geometry::poincare`]
//! has the functions of the Poincaré ball; [`rowwise`] has linear maps and norms; [`testing`] checks your
//! own mechanism.
//!
//! # Arrays, speed, randomness
//!
//! Arrays are those of [`ndarray`], re-exported here. Inner loops use the widest SIMD units that the CPU
//! has (AVX-512, AVX2, SSE2, NEON), found at run time without compiler flags and,
//! except for one prefetch instruction, without unsafe code in this crate. WebAssembly has no such search: build
//! with `-C target-feature=+simd128`, and without the feature `parallel`, as the example `browser` does. Results are bitwise identical
//! on every run and for any number of threads; another instruction set rounds differently. There is no C
//! and no OS entropy: randomness comes from an `rng` argument, which can be any generator of [`rand`] 0.10
//! (also re-exported), or from an explicit seed.
//!
//! # Features
//!
//! | feature | default | what it does |
//! |---|---|---|
//! | `parallel` | yes | shares large work among threads with rayon; results are bitwise identical with and without it, for any number of threads |
//! | `spectral` | no | `Graph::spectral_coordinates`, with the eigensolver of nalgebra (8 crates) |
//! | `safetensors` | no | the module `safetensors`: saves and loads parameters and buffers, including files from PyTorch |
//! | `serde` | no | `Serialize` and `Deserialize` for configurations, [`Graph`], [`Partial`] and [states](params), in any format; saves an HNSW index with its links |
//! | `petgraph` | no | `Graph::from_petgraph`: converts graphs of the crate `petgraph` 0.8 |
//! | `sprs` | no | `Graph::from_sprs`: converts sparse matrices of the crate `sprs` 0.11, stored by rows or by columns |

// docs.rs marks what needs a feature.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod attention;
mod cache;
mod dropout;
mod element;
mod error;
pub mod geometry;
mod gradients;
mod graph;
pub mod guide;
mod inputs;
// With the macro that chooses the instruction set.
#[macro_use]
mod kernels;
pub mod layout;
mod mechanisms;
pub mod neighbors;
pub mod params;
mod partial;
mod prefetch;
pub mod rowwise;
#[cfg(feature = "safetensors")]
pub mod safetensors;
pub mod score;
mod segments;
pub mod softmax;
pub mod testing;

pub use ndarray;
pub use rand;

pub use attention::{Attention, Saved, check_output};
pub use cache::KeyValueCache;
pub use dropout::Dropout;
pub use element::Element;
pub use error::{Channel, Error, Result};
pub use gradients::{Gradients, GradientsMut};
pub use graph::{Graph, LoopFill, Reordering, Subgraph};
pub use inputs::{Bias, Causal, Inputs, Pair, Pattern, SelectedInputs};
pub use kernels::Float;
pub use mechanisms::{
    dual_space, edge_gat, graph_rope, local_global, moe, multi_head, performer, poincare, stack,
    transformer,
};

pub use dual_space::{DualSpace, DualSpaceConfig};
pub use edge_gat::{EdgeGat, EdgeGatConfig};
pub use graph_rope::{EdgeRope, GraphRope, GraphRopeConfig};
pub use local_global::LocalGlobal;
pub use mechanisms::flash::Flash;
pub use mechanisms::scaled_dot_product::ScaledDotProduct;
pub use moe::{Moe, MoeConfig};
pub use multi_head::{MultiHead, MultiHeadConfig};
pub use params::Params;
pub use partial::Partial;
pub use performer::{Performer, PerformerConfig};
pub use poincare::{Poincare, PoincareConfig};
pub use rowwise::{Linear, LinearConfig};
pub use segments::Segments;
pub use stack::{Stack, StackConfig};
pub use transformer::{TransformerLayer, TransformerLayerConfig};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
