//! What several examples of `graph-attention` share: data, models, an optimiser, metrics and a tree.
//!
//! ```sh
//! cargo run --release -p examples --example compare
//! ```

mod adam;
mod args;
pub mod data;
pub mod metrics;
mod models;
pub mod tree;

pub use adam::Adam;
pub use args::Args;
pub use models::{Between, Gat, GatPassed, Passed, dropped, with_dropout};
