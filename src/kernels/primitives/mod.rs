//! Building blocks of all kernels: products of small matrices, vectorised transposes and functions, and
//! scratch memory.

pub(crate) mod asinh;
pub(crate) mod buffer;
pub(crate) mod compensated;
pub(crate) mod exp;
pub(crate) mod matmul;
pub(crate) mod sincos;
pub(crate) mod tanh;
pub(crate) mod transpose;
