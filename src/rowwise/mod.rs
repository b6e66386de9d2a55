//! Maps of single rows, which a model needs around its attention: [`Linear`], [`Norm`] and [`Activation`].
//!
//! They are not mechanisms, because no row reads another. Their backward passes are methods that take the
//! input again: nothing is saved.
//!
//! ```
//! use graph_attention::ndarray::array;
//! use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
//! use graph_attention::{LinearConfig, params};
//!
//! // The loss |Wx + b − target|² / 2.
//! let mut head = LinearConfig::new(2, 1).init::<f64>(&mut Xoshiro256PlusPlus::seed_from_u64(1))?;
//! let (x, target) = (array![[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], array![[1.0], [2.0], [4.0]]);
//! for _step in 0..200 {
//!     let error = head.forward(x.view())? - &target;
//!     let grads = head.backward(x.view(), error.view())?;
//!     params::update(&mut head, &grads.params, |_, mut param, grad| param.scaled_add(-0.3, &grad))?;
//! }
//! assert!((head.forward(x.view())? - &target).iter().all(|error| error.abs() < 1e-2));
//! # Ok::<(), graph_attention::Error>(())
//! ```

mod activation;
mod linear;
mod norm;

pub use activation::Activation;
pub use linear::{Linear, LinearConfig};
pub use norm::{Norm, NormConfig, Normalization};

use ndarray::{Array2, ArrayD};

/// The gradients of a loss with respect to the input and the parameters of a [`Linear`] or a [`Norm`].
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct RowGradients<F> {
    /// With respect to the rows.
    pub x: Array2<F>,
    /// With respect to the parameters, in the order of [`Params`](crate::Params).
    pub params: Vec<ArrayD<F>>,
}
