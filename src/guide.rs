//! The guide: how to use this crate well. Documentation only; all code in it runs as tests.
//!
//! | page | for |
//! |---|---|
//! | [`choosing`] | which mechanism for which problem, what each of them reads, how they compose |
//! | [`from_pytorch`] | names, shapes and conventions of PyTorch and PyG in those of this crate |
//! | [`training`] | several layers, optimisers, accumulation, checkpointing, saving and loading |
//! | [`numerics`] | what is exact, what is the same on every run, what NaN and empty rows do |
//! | [`performance`] | what costs time and memory, and what to do about it |
//! | [`own_mechanism`] | the contract of [`Attention`], and a mechanism with a parameter |
//!
//! The model itself (pairs, inputs, heads, training) is on the [page of the crate](crate).

// For the links of the pages.
#[cfg(doc)]
use crate::*;

#[doc = include_str!("guide/choosing.md")]
pub mod choosing {}

#[doc = include_str!("guide/from_pytorch.md")]
pub mod from_pytorch {}

#[doc = include_str!("guide/training.md")]
pub mod training {}

#[doc = include_str!("guide/numerics.md")]
pub mod numerics {}

#[doc = include_str!("guide/performance.md")]
pub mod performance {}

#[doc = include_str!("guide/own_mechanism.md")]
pub mod own_mechanism {}
