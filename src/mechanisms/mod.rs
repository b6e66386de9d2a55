//! The mechanisms, one a file.

pub(crate) mod flash;
pub(crate) mod multi_head;
pub(crate) mod scaled_dot_product;
