//! Attention on graphs, vectors and hidden states.
//!
//! **The idea.** One query over its neighbours, a dense batch, and a graph in which every node
//! attends to its neighbours are one problem: a set of (query, key) *pairs*, grouped by query.
//! [`Inputs`] hold the arrays and the pairs, and any data of the pairs (edge features, distances,
//! biases) as arrays with one row per pair; an [`Attention`] maps them to outputs and has an exact,
//! hand-written backward pass. So there is one trait, object-safe, for every mechanism.
//!
//! ```
//! use graph_attention::{Attention, Flash, Graph, Inputs};
//! use graph_attention::ndarray::array;
//!
//! // Three nodes; node 0 attends to 1 and 2, node 1 to 2, node 2 to nobody.
//! let nodes = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
//! let graph = Graph::from_edges(3, 3, [(0, 1), (0, 2), (1, 2)])?;
//! let inputs = Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)?;
//!
//! let attention = Flash::new();
//! let (out, saved) = attention.forward_train(&inputs)?;
//! let grads = attention.backward(&inputs, &saved, out.view())?; // of the loss |out|² / 2
//! let grad_nodes = grads.into_self_attention()?;
//! assert_eq!(grad_nodes.dim(), nodes.dim());
//! # Ok::<(), graph_attention::Error>(())
//! ```
//!
//! | mechanism | computes | memory beside the output |
//! |---|---|---|
//! | [`ScaledDotProduct`] | softmax attention, in the form to read; returns its weights | O(pairs · heads) |
//! | [`Flash`] | the same function in tiles | O(n) |
//! | [`MultiHead`] | learned projections around any mechanism | O(n) and the inner's |
//! | [`Moe`] | a mixture of experts of any kind, of which each query asks its own few | O(n) and the experts' |
//! | [`LocalGlobal`] | sliding windows and global positions in O(n) time; local and global layers, in one softmax or by a learned gate | O(n); by layer O(pairs) |
//! | [`DualSpace`] | attention over the neighbours in a graph, over the nodes most alike, and of one over the other | O(n) and the inner ones' |
//! | [`EdgeGat`] | graph attention networks with edge features: GAT, GATv2, graph transformer | O(n); O(pairs · heads) in training |
//! | [`Poincare`] | softmax of hyperbolic distances, and midpoints in the Poincaré ball | O(n) |
//! | [`Performer`] | linear attention by random features, in O(n) time | O(n) |
//! | [`GraphRope`] | rotary embeddings of node positions, before any mechanism | O(n) and the inner's |
//! | [`EdgeRope`] | softmax attention with rotary embeddings of distances | O(n) |
//!
//! [`neighbors`] finds the keys nearest to queries, as a [`Graph`] to attend over.
//!
//! Arrays are [`ndarray`], re-exported here. Inner loops use the widest SIMD units that the CPU turns
//! out to have (AVX-512, AVX2, SSE2, NEON, WebAssembly's), without flags to the compiler and, but for
//! one prefetch instruction, without unsafe code of our own. Results are the same bits on every run
//! and for any number of threads; another instruction set rounds differently. There is no C and no OS
//! entropy: randomness comes in through an `rng` argument or an explicit seed.
//!
//! | feature | default | what it does |
//! |---|---|---|
//! | `parallel` | yes | shares work of more than some 50 µs among threads, by rayon; the results are the same bits with and without it, for any number of threads |
//! | `spectral` | no | `Graph::spectral_coordinates`, by the eigensolver of nalgebra (8 crates) |
//! | `safetensors` | no | the module `safetensors`: parameters to and from files, PyTorch's among them |
//! | `serde` | no | `Serialize` and `Deserialize` of configurations, [`Graph`] and [states](params), in any format |
//! | `petgraph` | no | `Graph::from_petgraph`: graphs of the crate `petgraph` 0.8 |
//! | `sprs` | no | `Graph::from_sprs`: sparse matrices of the crate `sprs` 0.11, by rows or by columns |
//! | `hnsw` | no | `neighbors::HnswIndex`, an approximate index of nearest neighbours, by the crate `hnsw_rs` |

mod attention;
mod dropout;
mod error;
mod float;
pub mod geometry;
mod gradients;
mod graph;
mod inputs;
mod kernels;
mod mechanisms;
pub mod neighbors;
pub mod params;
mod partial;
#[cfg(feature = "safetensors")]
pub mod safetensors;
pub mod testing;

pub use ndarray;

pub use attention::{Attention, Saved};
pub use dropout::Dropout;
pub use error::{Channel, Error, Result};
pub use float::Float;
pub use gradients::{Gradients, GradientsMut};
pub use graph::{Graph, LoopFill};
pub use inputs::{Bias, Causal, Inputs, Pair, Pattern, SelectedInputs};
pub use mechanisms::dual_space::{DualSpace, DualSpaceConfig, Fusion, LatentSearch};
pub use mechanisms::edge_gat::{EdgeGat, EdgeGatConfig, Score};
pub use mechanisms::flash::Flash;
pub use mechanisms::graph_rope::{EdgeRope, GraphRope, GraphRopeConfig, Layout};
pub use mechanisms::local_global::{LocalGlobal, Window};
pub use mechanisms::moe::{Moe, MoeConfig, Routing};
pub use mechanisms::multi_head::{MultiHead, MultiHeadConfig};
pub use mechanisms::performer::{
    Accuracy, Features, Performer, PerformerConfig, PerformerState, Projection,
};
pub use mechanisms::poincare::{Aggregation, Coordinates, Poincare, PoincareConfig};
pub use mechanisms::scaled_dot_product::ScaledDotProduct;
pub use params::Params;
pub use partial::Partial;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
