//! What all kernels are built of: products of small matrices, transposes and functions in vectors, and scratch
//! memory.

pub(crate) mod asinh;
pub(crate) mod buffer;
pub(crate) mod compensated;
pub(crate) mod exp;
pub(crate) mod matmul;
pub(crate) mod prefetch;
pub(crate) mod sincos;
pub(crate) mod transpose;
