//! Parameters seen from outside: by optimisers, and by whoever saves and loads them.
//!
//! **Saving.** What a trained mechanism is, beside its type, is a configuration and a [`state`]. With the
//! feature `serde` both are written and read by any format of [serde](https://serde.rs); what is read is
//! checked by `from_params` or [`load_state`], as ever. (With the feature `safetensors` a state goes to
//! the files of PyTorch and others.)
//!
//! ```
//! # #[cfg(feature = "serde")] {
//! use graph_attention::ndarray::ArrayD;
//! use graph_attention::{EdgeGat, EdgeGatConfig, Score, params};
//! use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
//!
//! let config = EdgeGatConfig::new(Score::GatV2, 4, 3, 2);
//! let trained: EdgeGat<f32> = config.init(&mut Xoshiro256PlusPlus::seed_from_u64(1))?;
//! let json = serde_json::to_string(&(&config, params::state(&trained)))?;
//!
//! let (config, state): (EdgeGatConfig, Vec<(String, ArrayD<f32>)>) = serde_json::from_str(&json)?;
//! let loaded = config.from_params(state)?;
//! assert_eq!(params::state(&loaded), params::state(&trained));
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! In JSON a number comes back as the same bits if `serde_json` has its feature `float_roundtrip`, and
//! NaN and infinity not at all: they are written as `null`, which is refused where a number is read.

use crate::error::{Error, Result, check_shape};
use crate::float::Float;
use ndarray::{ArrayD, ArrayViewD, ArrayViewMutD};
use std::sync::Arc;

/// The trainable parameters of a mechanism, named as PyTorch and PyG name them (`out_proj.weight`,
/// `att_src`); those of a mechanism inside another carry its name and a dot (`inner.att_src`).
///
/// Both methods visit the same parameters in the same order, and gradients
/// ([`Gradients::params`](crate::Gradients::params)) come in that order. A mechanism without
/// parameters has two empty methods. [`guide::training`](crate::guide::training) implements it for a
/// model of several layers.
pub trait Params<F: Float> {
    /// Shows every parameter with its name.
    fn visit_params(&self, visitor: &mut dyn FnMut(&str, ArrayViewD<'_, F>));

    /// Lends every parameter with its name for writing.
    fn visit_params_mut(&mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'_, F>));
}

/// A copy of all parameters with their names: PyTorch's state dict.
///
/// ```
/// use graph_attention::{EdgeGat, EdgeGatConfig, Score, params};
/// use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
///
/// let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
/// let gat: EdgeGat<f32> = EdgeGatConfig::new(Score::GatV2, 3, 4, 2).init(&mut rng)?;
/// let shapes = params::state(&gat).into_iter().map(|(name, param)| (name, param.shape().to_vec()));
/// let shapes: Vec<(String, Vec<usize>)> = shapes.collect();
/// assert_eq!(shapes[0], ("att".to_owned(), vec![1, 2, 4]));
/// # Ok::<(), graph_attention::Error>(())
/// ```
pub fn state<F: Float>(params: &(impl Params<F> + ?Sized)) -> Vec<(String, ArrayD<F>)> {
    let mut state = Vec::new();
    params.visit_params(&mut |name, param| state.push((name.to_owned(), param.to_owned())));
    state
}

/// Sets all parameters from a state dict, in any order. Nothing is changed if anything is wrong.
///
/// # Errors
/// [`Error::UnknownParam`] for a name that does not exist, [`Error::DuplicateParam`] for one that comes
/// twice, [`Error::MissingParam`] for one that is not in the state, [`Error::Shape`] for a value of another shape, and
/// [`Error::InvalidConfig`] if the parameters are shared and so cannot be written.
pub fn load_state<F: Float, P: Params<F> + ?Sized>(
    params: &mut P,
    new: impl IntoIterator<Item = (impl AsRef<str>, ArrayD<F>)>,
) -> Result<()> {
    let old = state(params);
    check_writable(params, old.len())?;
    let mut values: Vec<Option<ArrayD<F>>> = vec![None; old.len()];
    for (name, value) in new {
        let name = name.as_ref();
        let position = old.iter().position(|(known, _)| known == name);
        let Some(position) = position else {
            let known = old.into_iter().map(|(name, _)| name).collect();
            return Err(Error::UnknownParam { name: name.to_owned(), known });
        };
        if values[position].is_some() {
            return Err(Error::DuplicateParam { name: name.to_owned() });
        }
        check_shape(name.to_owned(), old[position].1.shape(), value.shape())?;
        values[position] = Some(value);
    }
    if let Some(position) = values.iter().position(Option::is_none) {
        return Err(Error::MissingParam { name: old[position].0.clone() });
    }
    let mut values = values.into_iter().flatten();
    params.visit_params_mut(&mut |_, mut param| {
        if let Some(value) = values.next() {
            param.assign(&value);
        }
    });
    Ok(())
}

/// One step of an optimiser: calls `step` with each parameter's name, value and gradient.
///
/// ```
/// use graph_attention::{params, Attention, Inputs, MultiHeadConfig, ScaledDotProduct};
/// use graph_attention::ndarray::Array2;
/// use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
///
/// let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
/// let mut attention = MultiHeadConfig::new(4, 2).init(ScaledDotProduct::new(), &mut rng)?;
/// let x = Array2::<f64>::from_shape_fn((3, 4), |(i, j)| (i + 2 * j) as f64 / 10.0);
/// let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
/// let (out, saved) = attention.forward_train(&inputs)?;
/// // The loss is the sum of squares of the output.
/// let gradients = attention.backward(&inputs, &saved, (2.0 * &out).view())?;
/// // Plain gradient descent.
/// params::update(&mut attention, &gradients.params, |_, mut param, grad| {
///     param.scaled_add(-0.01, &grad);
/// })?;
/// let loss = |out: Array2<f64>| out.mapv(|y| y * y).sum();
/// assert!(loss(attention.forward(&inputs)?) < loss(out));
/// # Ok::<(), graph_attention::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] if the gradients are not those of the parameters, [`Error::InvalidConfig`] if
/// the parameters are shared and so cannot be written.
pub fn update<F: Float, P: Params<F> + ?Sized>(
    params: &mut P,
    gradients: &[ArrayD<F>],
    mut step: impl FnMut(&str, ArrayViewMutD<'_, F>, ArrayViewD<'_, F>),
) -> Result<()> {
    check_gradients(params, gradients)?;
    check_writable(params, gradients.len())?;
    let mut gradients = gradients.iter();
    params.visit_params_mut(&mut |name, param| {
        if let Some(gradient) = gradients.next() {
            step(name, param, gradient.view());
        }
    });
    Ok(())
}

/// How many parameter arrays there are.
pub(crate) fn count<F: Float>(params: &(impl Params<F> + ?Sized)) -> usize {
    let mut count = 0;
    params.visit_params(&mut |_, _| count += 1);
    count
}

/// `Ok` when there is one gradient of the right shape for each parameter.
pub(crate) fn check_gradients<F: Float>(
    params: &(impl Params<F> + ?Sized),
    gradients: &[ArrayD<F>],
) -> Result<()> {
    check_shape("number of grads.params", &[count(params)], &[gradients.len()])?;
    let mut result = Ok(());
    let mut gradients = gradients.iter();
    params.visit_params(&mut |name, param| {
        if let (Ok(()), Some(gradient)) = (&result, gradients.next()) {
            result = check_shape(format!("grads.params: {name}"), param.shape(), gradient.shape());
        }
    });
    result
}

fn check_writable<F: Float>(params: &mut (impl Params<F> + ?Sized), count: usize) -> Result<()> {
    let mut writable = 0;
    params.visit_params_mut(&mut |_, _| writable += 1);
    if writable == count {
        return Ok(());
    }
    let expected = format!("all {count} writable");
    Err(Error::config("params", expected, format!("{writable} writable, the rest are shared")))
}

impl<F: Float, P: Params<F> + ?Sized> Params<F> for Box<P> {
    fn visit_params(&self, visitor: &mut dyn FnMut(&str, ArrayViewD<'_, F>)) {
        (**self).visit_params(visitor);
    }
    fn visit_params_mut(&mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'_, F>)) {
        (**self).visit_params_mut(visitor);
    }
}

impl<F: Float, P: Params<F> + ?Sized> Params<F> for &mut P {
    fn visit_params(&self, visitor: &mut dyn FnMut(&str, ArrayViewD<'_, F>)) {
        (**self).visit_params(visitor);
    }
    fn visit_params_mut(&mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'_, F>)) {
        (**self).visit_params_mut(visitor);
    }
}

/// A shared reference shows its parameters but lends none for writing, so that
/// [`load_state`] and [`update`] refuse it.
impl<F: Float, P: Params<F> + ?Sized> Params<F> for &P {
    fn visit_params(&self, visitor: &mut dyn FnMut(&str, ArrayViewD<'_, F>)) {
        (**self).visit_params(visitor);
    }
    fn visit_params_mut(&mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'_, F>)) {}
}

/// Lends its parameters for writing while it is the only one that holds them; afterwards
/// [`load_state`] and [`update`] refuse it.
impl<F: Float, P: Params<F> + ?Sized> Params<F> for Arc<P> {
    fn visit_params(&self, visitor: &mut dyn FnMut(&str, ArrayViewD<'_, F>)) {
        (**self).visit_params(visitor);
    }
    fn visit_params_mut(&mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'_, F>)) {
        if let Some(params) = Arc::get_mut(self) {
            params.visit_params_mut(visitor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{ArrayD, IxDyn};

    #[derive(Clone)]
    struct Two {
        first: ArrayD<f64>,
        second: ArrayD<f64>,
    }

    impl Params<f64> for Two {
        fn visit_params(&self, visitor: &mut dyn FnMut(&str, ArrayViewD<'_, f64>)) {
            visitor("first", self.first.view());
            visitor("second", self.second.view());
        }
        fn visit_params_mut(&mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'_, f64>)) {
            visitor("first", self.first.view_mut());
            visitor("second", self.second.view_mut());
        }
    }

    fn ones(shape: &[usize]) -> ArrayD<f64> {
        ArrayD::ones(IxDyn(shape))
    }

    fn two() -> Two {
        Two { first: 0.0 * ones(&[2]), second: 0.0 * ones(&[1, 3]) }
    }

    #[test]
    fn a_state_is_loaded_whole_or_not_at_all() {
        let mut params = two();
        load_state(&mut params, [("second", ones(&[1, 3])), ("first", ones(&[2]))]).unwrap();
        assert_eq!(
            state(&params),
            [("first".into(), ones(&[2])), ("second".into(), ones(&[1, 3]))]
        );

        let mut params = two();
        let unknown = load_state(&mut params, [("first", ones(&[2])), ("third", ones(&[2]))]);
        assert!(unknown.unwrap_err().to_string().contains("third"));
        let twice = load_state(&mut params, [("first", ones(&[2])), ("first", ones(&[2]))]);
        assert_eq!(twice, Err(Error::DuplicateParam { name: "first".into() }));
        let missing = load_state(&mut params, [("second", ones(&[1, 3]))]);
        assert_eq!(missing, Err(Error::MissingParam { name: "first".into() }));
        let shape = load_state(&mut params, [("first", ones(&[2])), ("second", ones(&[3]))]);
        assert_eq!(shape, Err(Error::shape("second", &[1, 3], &[3])));
        assert!(state(&params).iter().all(|(_, value)| value.sum() == 0.0));
    }

    #[test]
    fn shared_parameters_are_read_but_not_written() {
        let gradients = [ones(&[2]), ones(&[1, 3])];
        let owner = two();
        let mut borrowed = &owner;
        assert_eq!(count(&borrowed), 2);
        let refused = update(&mut borrowed, &gradients, |_, _, _| {}).unwrap_err();
        assert!(refused.to_string().contains("shared"), "{refused}");

        let mut shared = Arc::new(two());
        update(&mut shared, &gradients, |_, mut param, grad| param += &grad).unwrap();
        assert_eq!(shared.first, ones(&[2]));
        let _other = Arc::clone(&shared);
        assert!(update(&mut shared, &gradients, |_, _, _| {}).is_err());
    }

    #[test]
    fn gradients_must_fit() {
        let wrong = [ones(&[2]), ones(&[3])];
        let error = update(&mut two(), &wrong, |_, _, _| {}).unwrap_err();
        assert_eq!(error, Error::shape("grads.params: second", &[1, 3], &[3]));
        assert!(update(&mut two(), &wrong[..1], |_, _, _| {}).is_err());
    }
}
