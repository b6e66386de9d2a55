//! The examples of `graph-attention`: `cargo run --release -p examples --example compare`.
