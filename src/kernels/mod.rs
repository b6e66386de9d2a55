//! The inner loops, on slices: the only place where speed may cost beauty.
//!
//! `vector` and `linear` are the primitives. `problem` is softmax attention with its data laid out
//! for them: rows as slices, one logit at a time. `dense` walks it in tiles of queries × keys and
//! `graph` row by row; neither ever holds more than a tile of logits. The plain version that they
//! are checked against is `ScaledDotProduct`.

pub(crate) mod dense;
pub(crate) mod graph;
pub(crate) mod linear;
pub(crate) mod problem;
pub(crate) mod vector;
