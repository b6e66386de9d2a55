//! The benches of `graph-attention`: `cargo bench -p benches --bench dense`.
