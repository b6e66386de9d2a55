//! Access to parameters and buffers, for optimisers and for saving and loading.
//!
//! **Saving.** A trained mechanism consists of its type, a configuration and a [`state`]. With the
//! feature `serde`, configuration and state can be saved in any [serde](https://serde.rs) format; when
//! loaded, the state is checked by `from_params` or [`load_state`], as always. (With the feature
//! `safetensors`, a state is saved in the file format that PyTorch and others use.)
//!
//! ```
//! # #[cfg(feature = "serde")] {
//! use graph_attention::ndarray::ArrayD;
//! use graph_attention::{EdgeGat, EdgeGatConfig, edge_gat::Score, params};
//! use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
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
//! In JSON, numbers are restored exactly only with the feature `float_roundtrip` of `serde_json`. NaN and
//! infinity cannot be restored: they are written as `null`, which is refused on reading.

use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use ndarray::{ArrayD, ArrayViewD, ArrayViewMutD};
use std::fmt::Display;
use std::sync::Arc;

/// The parameters and buffers of a mechanism, named as in PyTorch and PyG (`out_proj.weight`, `att_src`).
/// For a mechanism inside another, the names have a prefix (`inner.att_src`).
///
/// As in PyTorch, **parameters** are trained and **buffers** are not, and both are saved and loaded:
///
/// | | parameters | buffers |
/// |---|---|---|
/// | examples | weights, and everything else that a loss can improve | the random projection of a [`Performer`](crate::Performer), the expert bias of a [`Moe`](crate::Moe), rotary frequencies that are not learned |
/// | [`update`], [`Gradients::params`](crate::Gradients::params) | yes | no |
/// | [`state`], [`load_state`], safetensors, serde | yes | yes |
///
/// Each pair of methods visits the same arrays in the same order. Gradients
/// ([`Gradients::params`](crate::Gradients::params)) have the order of the parameters. A parameter and a
/// buffer must not have the same name. A mechanism without parameters has two empty methods; the two
/// methods for buffers can be left out if there are none.
///
/// **A mechanism around others must forward all four methods.** The compiler does not notice if the
/// methods for buffers are missing, and the inner buffers are then not saved.
/// [`guide::training`](crate::guide::training) implements the trait for a model of several layers.
pub trait Params<F: Element> {
    /// Visits every parameter with its name. The views outlive the call.
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>));

    /// Visits every parameter with its name, for writing.
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>));

    /// Visits every buffer with its name. Default: no buffers.
    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        let _ = visitor;
    }

    /// Visits every buffer with its name, for writing. Default: no buffers.
    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        let _ = visitor;
    }
}

/// Returns a visitor that puts a prefix and a dot before each name, for a mechanism around others. It serves all
/// four methods of [`Params`].
///
/// ```
/// use graph_attention::ndarray::{ArrayViewD, ArrayViewMutD};
/// use graph_attention::{Attention, Params, params::prefixed};
///
/// struct Around<A>(A);
///
/// impl<A: Attention<f32>> Params<f32> for Around<A> {
///     fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
///         self.0.visit_params(&mut prefixed("inner", visitor));
///     }
///     fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
///         self.0.visit_params_mut(&mut prefixed("inner", visitor));
///     }
///     fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
///         self.0.visit_buffers(&mut prefixed("inner", visitor));
///     }
///     fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
///         self.0.visit_buffers_mut(&mut prefixed("inner", visitor));
///     }
/// }
/// ```
pub fn prefixed<V>(prefix: impl Display, visitor: &mut dyn FnMut(&str, V)) -> impl FnMut(&str, V) {
    move |name, array| visitor(&format!("{prefix}.{name}"), array)
}

/// Returns copies of all parameters and then of all buffers, with their names: PyTorch's state dict.
///
/// ```
/// use graph_attention::{EdgeGat, EdgeGatConfig, edge_gat::Score, params};
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
///
/// let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
/// let gat: EdgeGat<f32> = EdgeGatConfig::new(Score::GatV2, 3, 4, 2).init(&mut rng)?;
/// let shapes = params::state(&gat).into_iter().map(|(name, param)| (name, param.shape().to_vec()));
/// let shapes: Vec<(String, Vec<usize>)> = shapes.collect();
/// assert_eq!(shapes[0], ("att".to_owned(), vec![1, 2, 4]));
/// # Ok::<(), graph_attention::Error>(())
/// ```
pub fn state<F: Element>(params: &(impl Params<F> + ?Sized)) -> Vec<(String, ArrayD<F>)> {
    let mut state = Vec::new();
    params.visit_params(&mut |name, param| state.push((name.to_owned(), param.to_owned())));
    state.extend(buffers(params));
    state
}

/// Returns copies of all buffers with their names, for example to complete a state that has only
/// parameters.
///
/// ```
/// use graph_attention::{Flash, GraphRopeConfig, MultiHeadConfig, graph_rope::Layout, params};
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
///
/// let config = MultiHeadConfig::new(8, 2);
/// # let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
/// # let other = config.init::<f32, _>(Flash::new(), &mut rng)?;
/// // A state from elsewhere, without the frequencies.
/// let mut state = params::state(&other);
///
/// let rope = || GraphRopeConfig::new(4, Layout::Half).init(Flash::new());
/// let mut layer = config.init::<f32, _>(rope()?, &mut rng)?;
/// state.extend(params::buffers(&layer)); // `inner.frequencies`, as configured
/// params::load_state(&mut layer, state)?;
/// # Ok::<(), graph_attention::Error>(())
/// ```
pub fn buffers<F: Element>(params: &(impl Params<F> + ?Sized)) -> Vec<(String, ArrayD<F>)> {
    let mut buffers = Vec::new();
    params.visit_buffers(&mut |name, buffer| buffers.push((name.to_owned(), buffer.to_owned())));
    buffers
}

/// Returns the parameter or buffer with this name, without a copy; `None` if there is none.
///
/// ```
/// use graph_attention::edge_gat::Score;
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
/// use graph_attention::{EdgeGat, EdgeGatConfig, params};
///
/// let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
/// let gat: EdgeGat<f32> = EdgeGatConfig::new(Score::GatV2, 3, 4, 2).init(&mut rng)?;
/// assert_eq!(params::get(&gat, "att").unwrap().shape(), [1, 2, 4]);
/// assert!(params::get(&gat, "attention").is_none());
/// # Ok::<(), graph_attention::Error>(())
/// ```
pub fn get<'a, F: Element>(
    params: &'a (impl Params<F> + ?Sized),
    name: &str,
) -> Option<ArrayViewD<'a, F>> {
    let mut found = None;
    let mut visitor = |known: &str, array| {
        if known == name {
            found = Some(array);
        }
    };
    params.visit_params(&mut visitor);
    params.visit_buffers(&mut visitor);
    found
}

/// Returns the names of the parameters, in order.
pub(crate) fn names<F: Element>(params: &(impl Params<F> + ?Sized)) -> Vec<String> {
    let mut names = Vec::new();
    params.visit_params(&mut |name, _| names.push(name.to_owned()));
    names
}

/// Returns zeros in the shapes of the parameters, in order, as gradients to add to.
pub fn zeros<F: Element>(params: &(impl Params<F> + ?Sized)) -> Vec<ArrayD<F>> {
    let mut zeros = Vec::new();
    params.visit_params(&mut |_, param| zeros.push(ArrayD::zeros(param.raw_dim())));
    zeros
}

/// Sets all parameters and buffers from a state dict, in any order. On an error nothing is changed.
///
/// # Errors
/// [`Error::UnknownParam`] for a name that does not exist, [`Error::DuplicateParam`] for a name that
/// appears twice, [`Error::MissingParam`] for a parameter or buffer that is not in the state,
/// [`Error::Shape`] for a value with a wrong shape, and [`Error::InvalidArgument`] if the parameters are
/// shared and so cannot be written.
pub fn load_state<F: Element, P: Params<F> + ?Sized>(
    params: &mut P,
    new: impl IntoIterator<Item = (impl AsRef<str>, ArrayD<F>)>,
) -> Result<()> {
    let old = state(params);
    let mut writable = count_writable(params);
    params.visit_buffers_mut(&mut |_, _| writable += 1);
    check_writable(writable, old.len())?;
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
    let mut set = |_: &str, mut array: ArrayViewMutD<'_, F>| {
        if let Some(value) = values.next() {
            array.assign(&value);
        }
    };
    params.visit_params_mut(&mut set);
    params.visit_buffers_mut(&mut set);
    Ok(())
}

/// Performs one step of an optimiser: calls `step` with each parameter's name, value and gradient.
/// Buffers are not visited.
///
/// ```
/// use graph_attention::{params, Attention, Inputs, MultiHeadConfig, ScaledDotProduct};
/// use graph_attention::ndarray::Array2;
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
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
/// [`Error::Shape`] if the gradients do not fit the parameters, [`Error::InvalidArgument`] if the
/// parameters are shared and so cannot be written.
pub fn update<F: Element, P: Params<F> + ?Sized>(
    params: &mut P,
    gradients: &[ArrayD<F>],
    mut step: impl FnMut(&str, ArrayViewMutD<'_, F>, ArrayViewD<'_, F>),
) -> Result<()> {
    check_gradients(params, gradients)?;
    check_writable(count_writable(params), gradients.len())?;
    let mut gradients = gradients.iter();
    params.visit_params_mut(&mut |name, param| {
        if let Some(gradient) = gradients.next() {
            step(name, param, gradient.view());
        }
    });
    Ok(())
}

/// Returns the number of parameter arrays, not counting buffers.
pub(crate) fn count<F: Element>(params: &(impl Params<F> + ?Sized)) -> usize {
    let mut count = 0;
    params.visit_params(&mut |_, _| count += 1);
    count
}

/// Checks that there is one gradient of the right shape for each parameter.
pub(crate) fn check_gradients<F: Element>(
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

fn count_writable<F: Element>(params: &mut (impl Params<F> + ?Sized)) -> usize {
    let mut writable = 0;
    params.visit_params_mut(&mut |_, _| writable += 1);
    writable
}

fn check_writable(writable: usize, count: usize) -> Result<()> {
    if writable == count {
        return Ok(());
    }
    let expected = format!("all {count} writable");
    Err(Error::config("params", expected, format!("{writable} writable, the rest are shared")))
}

/// The methods of an implementation of [`Params`] that has those of another value, as in
/// `params_of!(self => self.score);`.
macro_rules! params_of {
    ($self:ident => $inner:expr) => {
        fn visit_params<'a>(&'a $self, visitor: &mut dyn FnMut(&str, ndarray::ArrayViewD<'a, F>)) {
            $inner.visit_params(visitor);
        }
        fn visit_params_mut<'a>(
            &'a mut $self,
            visitor: &mut dyn FnMut(&str, ndarray::ArrayViewMutD<'a, F>),
        ) {
            $inner.visit_params_mut(visitor);
        }
        fn visit_buffers<'a>(&'a $self, visitor: &mut dyn FnMut(&str, ndarray::ArrayViewD<'a, F>)) {
            $inner.visit_buffers(visitor);
        }
        fn visit_buffers_mut<'a>(
            &'a mut $self,
            visitor: &mut dyn FnMut(&str, ndarray::ArrayViewMutD<'a, F>),
        ) {
            $inner.visit_buffers_mut(visitor);
        }
    };
}
pub(crate) use params_of;

impl<F: Element, P: Params<F> + ?Sized> Params<F> for Box<P> {
    params_of!(self => (**self));
}

impl<F: Element, P: Params<F> + ?Sized> Params<F> for &mut P {
    params_of!(self => (**self));
}

/// A shared reference gives no access for writing, so [`load_state`] and [`update`] refuse it.
impl<F: Element, P: Params<F> + ?Sized> Params<F> for &P {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        (**self).visit_params(visitor);
    }
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {}
    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        (**self).visit_buffers(visitor);
    }
    fn visit_buffers_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {}
}

/// Gives access for writing only if this is the only reference; otherwise [`load_state`] and [`update`]
/// refuse it.
impl<F: Element, P: Params<F> + ?Sized> Params<F> for Arc<P> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        (**self).visit_params(visitor);
    }
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        if let Some(params) = Arc::get_mut(self) {
            params.visit_params_mut(visitor);
        }
    }
    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        (**self).visit_buffers(visitor);
    }
    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        if let Some(params) = Arc::get_mut(self) {
            params.visit_buffers_mut(visitor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{ArrayD, IxDyn};

    /// Two parameters and a buffer.
    #[derive(Clone)]
    struct Two {
        first: ArrayD<f64>,
        second: ArrayD<f64>,
        kept: ArrayD<f64>,
    }

    impl Params<f64> for Two {
        fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f64>)) {
            visitor("first", self.first.view());
            visitor("second", self.second.view());
        }
        fn visit_params_mut<'a>(
            &'a mut self,
            visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f64>),
        ) {
            visitor("first", self.first.view_mut());
            visitor("second", self.second.view_mut());
        }
        fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f64>)) {
            visitor("kept", self.kept.view());
        }
        fn visit_buffers_mut<'a>(
            &'a mut self,
            visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f64>),
        ) {
            visitor("kept", self.kept.view_mut());
        }
    }

    fn ones(shape: &[usize]) -> ArrayD<f64> {
        ArrayD::ones(IxDyn(shape))
    }

    fn two() -> Two {
        Two { first: 0.0 * ones(&[2]), second: 0.0 * ones(&[1, 3]), kept: 0.0 * ones(&[4]) }
    }

    #[test]
    fn a_state_is_loaded_whole_or_not_at_all() {
        let new =
            [("kept", ones(&[4])), ("second", 2.0 * ones(&[1, 3])), ("first", 3.0 * ones(&[2]))];
        let mut params = two();
        load_state(&mut params, new.clone()).unwrap();
        assert_eq!(
            state(&params),
            new.clone().map(|(name, x)| (name.to_owned(), x)).into_iter().rev().collect::<Vec<_>>()
        );
        assert_eq!(buffers(&params), [("kept".into(), ones(&[4]))]);

        let mut params = two();
        let mut load =
            |new: &[(&str, ArrayD<f64>)]| load_state(&mut params, new.iter().cloned()).unwrap_err();
        let [kept, second, first] = new;
        assert!(load(&[first.clone(), ("third", ones(&[2]))]).to_string().contains("third"));
        let twice = |name: &str| Error::DuplicateParam { name: name.into() };
        assert_eq!(load(&[first.clone(), first.clone()]), twice("first"));
        assert_eq!(load(&[kept.clone(), kept.clone()]), twice("kept"));
        let missing = |name: &str| Error::MissingParam { name: name.into() };
        assert_eq!(load(&[second.clone(), kept.clone()]), missing("first"));
        assert_eq!(load(&[second.clone(), first.clone()]), missing("kept"));
        let shape = Error::shape("second", &[1, 3], &[3]);
        assert_eq!(load(&[first.clone(), ("second", ones(&[3]))]), shape);
        let shape = Error::shape("kept", &[4], &[2]);
        assert_eq!(load(&[first, second, ("kept", ones(&[2]))]), shape);
        assert!(state(&params).iter().all(|(_, value)| value.sum() == 0.0));
    }

    #[test]
    fn buffers_are_kept_from_the_optimiser() {
        let mut params: Box<dyn Params<f64>> = Box::new(two());
        assert_eq!(zeros(&params), [0.0 * ones(&[2]), 0.0 * ones(&[1, 3])]);
        let mut names = Vec::new();
        update(&mut params, &[ones(&[2]), ones(&[1, 3])], |name, mut param, grad| {
            names.push(name.to_owned());
            param += &grad;
        })
        .unwrap();
        assert_eq!(names, ["first", "second"]);
        let expected =
            [("first", ones(&[2])), ("second", ones(&[1, 3])), ("kept", 0.0 * ones(&[4]))];
        assert_eq!(state(&params), expected.map(|(name, value)| (name.to_owned(), value)));
        let three = [ones(&[2]), ones(&[1, 3]), ones(&[4])];
        let error = update(&mut params, &three, |_, _, _| {}).unwrap_err();
        assert_eq!(error, Error::shape("number of grads.params", &[2], &[3]));
    }

    #[test]
    fn shared_parameters_are_read_but_not_written() {
        let gradients = [ones(&[2]), ones(&[1, 3])];
        let owner = two();
        let mut borrowed = &owner;
        assert_eq!(count(&borrowed), 2);
        assert_eq!(state(&borrowed), state(&owner));
        let refused = update(&mut borrowed, &gradients, |_, _, _| {}).unwrap_err();
        assert!(refused.to_string().contains("shared"), "{refused}");
        assert!(load_state(&mut borrowed, state(&owner)).is_err());

        let mut shared = Arc::new(two());
        update(&mut shared, &gradients, |_, mut param, grad| param += &grad).unwrap();
        assert_eq!(shared.first, ones(&[2]));
        load_state(&mut shared, state(&owner)).unwrap();
        assert_eq!(state(&shared), state(&owner));
        let _other = Arc::clone(&shared);
        assert!(update(&mut shared, &gradients, |_, _, _| {}).is_err());
        assert!(load_state(&mut shared, state(&owner)).is_err());
    }

    #[test]
    fn gradients_must_fit() {
        let wrong = [ones(&[2]), ones(&[3])];
        let error = update(&mut two(), &wrong, |_, _, _| {}).unwrap_err();
        assert_eq!(error, Error::shape("grads.params: second", &[1, 3], &[3]));
        assert!(update(&mut two(), &wrong[..1], |_, _, _| {}).is_err());
    }
}
