//! The formulas of the scores, one file each, forward beside derivative.

mod dot_product;
mod gat;
mod gat_v2;

pub(in super::super) use dot_product::dot_product;
pub(in super::super) use gat::gat;
pub(in super::super) use gat_v2::{additive, gat_v2};
