//! The user guide. Documentation only; all of its code is tested.
//!
//! | page | topic |
//! |---|---|
//! | [`choosing`] | which mechanism suits which problem, what each one reads, how they compose |
//! | [`from_pytorch`] | how the names, shapes and conventions of PyTorch and PyG map to this crate |
//! | [`from_flex_attention`] | score functions: five examples of PyTorch's `flex_attention` translated |
//! | [`training`] | several layers, optimisers, accumulation, checkpointing, saving and loading |
//! | [`numerics`] | accuracy, reproducibility, NaN and empty rows |
//! | [`performance`] | what costs time and memory, and what to do about it |
//! | [`beyond_one_machine`] | keys, queries or edges in shards: what is exact, traffic, order, when not to |
//! | [`own_mechanism`] | the contract of [`Attention`], and a mechanism with a parameter |
//!
//! The [crate page](crate) introduces the concepts (pairs, inputs, heads, training).

// For the links in the pages.
#[cfg(doc)]
use crate::softmax::Softmax;
#[cfg(doc)]
use crate::*;

#[doc = include_str!("guide/choosing.md")]
pub mod choosing {}

#[doc = include_str!("guide/from_pytorch.md")]
pub mod from_pytorch {}

#[doc = include_str!("guide/from_flex_attention.md")]
pub mod from_flex_attention {}

#[doc = include_str!("guide/training.md")]
pub mod training {}

#[doc = include_str!("guide/numerics.md")]
pub mod numerics {}

#[doc = include_str!("guide/performance.md")]
pub mod performance {}

#[doc = include_str!("guide/beyond_one_machine.md")]
pub mod beyond_one_machine {}

#[doc = include_str!("guide/own_mechanism.md")]
pub mod own_mechanism {}
