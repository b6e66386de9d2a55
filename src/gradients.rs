use crate::error::{Channel, Error, Result, check_shape};
use crate::float::{Float, try_vec, try_zeros};
use crate::inputs::Inputs;
use crate::params::{self, Params};
use ndarray::{Array1, Array2, ArrayD, ArrayViewMut, ArrayViewMut1, ArrayViewMut2, Dimension};

/// The gradients of a loss with respect to the inputs and parameters of a mechanism, as
/// [`Attention::backward`](crate::Attention::backward) returns them. Each array has the shape of
/// what it is the gradient of.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients<F> {
    /// With respect to the queries.
    pub query: Array2<F>,
    /// With respect to the keys.
    pub key: Array2<F>,
    /// With respect to the values.
    pub value: Array2<F>,
    /// With respect to the additive logits, where the inputs have them.
    pub bias: Option<Array2<F>>,
    /// With respect to the edge features, where the inputs have them.
    pub edge_features: Option<Array2<F>>,
    /// With respect to the distances, where the inputs have them.
    pub distances: Option<Array1<F>>,
    /// With respect to the parameters, in the order in which [`Params`] visits them; buffers have none.
    pub params: Vec<ArrayD<F>>,
}

/// Where [`Attention::backward_into`](crate::Attention::backward_into) adds the gradients: views,
/// so that they may be parts of larger arrays. A `None` is not computed, which saves its time.
///
/// [`Gradients::view_mut`] makes one of everything; [`guide::training`](crate::guide::training) adds up
/// the gradients of a batch, and [`guide::performance`](crate::guide::performance) leaves some out.
#[derive(Debug)]
pub struct GradientsMut<'a, F> {
    /// With respect to the queries.
    pub query: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the keys.
    pub key: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the values.
    pub value: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the additive logits.
    pub bias: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the edge features.
    pub edge_features: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the distances.
    pub distances: Option<ArrayViewMut1<'a, F>>,
    /// With respect to the parameters, in the order in which [`Params`] visits them. A mechanism
    /// around others lends each its own part: `split_at_mut`.
    pub params: &'a mut [ArrayD<F>],
}

impl<F: Float> Gradients<F> {
    /// Zeros for everything that `inputs` carry and `params` hold.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if they do not fit in memory.
    pub fn zeros(inputs: &Inputs<'_, F>, params: &(impl Params<F> + ?Sized)) -> Result<Self> {
        let shapes = inputs.gradient_shapes();
        let zeros = |what, [rows, columns]: [usize; 2]| try_zeros(what, rows, columns);
        let optional = |what, shape: Option<_>| shape.map(|shape| zeros(what, shape)).transpose();
        let vector = |[len]: [usize; 1]| try_vec("grads.distances", &[len], F::zero());
        Ok(Self {
            query: zeros("grads.query", shapes.query)?,
            key: zeros("grads.key", shapes.key)?,
            value: zeros("grads.value", shapes.value)?,
            bias: optional("grads.bias", shapes.bias)?,
            edge_features: optional("grads.edge_features", shapes.edge_features)?,
            distances: shapes.distances.map(vector).transpose()?.map(Array1::from),
            params: params::zeros(params),
        })
    }

    /// Views of all of them, for [`Attention::backward_into`](crate::Attention::backward_into) to add to.
    pub fn view_mut(&mut self) -> GradientsMut<'_, F> {
        GradientsMut {
            query: Some(self.query.view_mut()),
            key: Some(self.key.view_mut()),
            value: Some(self.value.view_mut()),
            bias: self.bias.as_mut().map(|grad| grad.view_mut()),
            edge_features: self.edge_features.as_mut().map(|grad| grad.view_mut()),
            distances: self.distances.as_mut().map(|grad| grad.view_mut()),
            params: &mut self.params,
        }
    }

    /// The gradient with respect to h where query = key = value = h: the sum of the three. Takes
    /// `self`, so use [`params`](Self::params) before.
    ///
    /// # Errors
    /// [`Error::Shape`] if query, key and value were not of one shape.
    pub fn into_self_attention(self) -> Result<Array2<F>> {
        check_shape("grads.key", self.query.shape(), self.key.shape())?;
        check_shape("grads.value", self.query.shape(), self.value.shape())?;
        Ok(self.query + &self.key + &self.value)
    }
}

impl<F: Float> GradientsMut<'_, F> {
    /// The same views for a shorter time, for lending them more than once: to one inner mechanism after
    /// the other, say.
    pub fn reborrow(&mut self) -> GradientsMut<'_, F> {
        GradientsMut {
            query: self.query.as_mut().map(|grad| grad.view_mut()),
            key: self.key.as_mut().map(|grad| grad.view_mut()),
            value: self.value.as_mut().map(|grad| grad.view_mut()),
            bias: self.bias.as_mut().map(|grad| grad.view_mut()),
            edge_features: self.edge_features.as_mut().map(|grad| grad.view_mut()),
            distances: self.distances.as_mut().map(|grad| grad.view_mut()),
            params: self.params,
        }
    }

    /// The gradient of a parameter, by its number in the order of [`Params`], with its rank: `Ix0`
    /// for a scalar.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such parameter, or it has another rank.
    pub fn param<D: Dimension>(&mut self, number: usize) -> Result<ArrayViewMut<'_, F, D>> {
        let len = self.params.len();
        let slot = self.params.get_mut(number);
        let slot = slot.ok_or_else(|| Error::shape("grads.params", &[number + 1], &[len]))?;
        let (expected, rank) = (D::NDIM.unwrap_or(slot.ndim()), slot.ndim());
        let wrong_rank =
            || Error::shape(format!("rank of grads.params[{number}]"), &[expected], &[rank]);
        slot.view_mut().into_dimensionality().map_err(|_| wrong_rank())
    }

    /// Checks every shape against the inputs and parameters: the first line of a `backward_into`.
    ///
    /// # Errors
    /// [`Error::Shape`] naming the array; [`Error::MissingInput`] for the gradient of a channel
    /// that the inputs do not carry.
    pub fn check(
        &self,
        mechanism: &'static str,
        inputs: &Inputs<'_, F>,
        params: &(impl Params<F> + ?Sized),
    ) -> Result<()> {
        self.check_inputs(mechanism, inputs)?;
        params::check_gradients(params, self.params)
    }

    /// [`check`](Self::check) of all but the parameters.
    pub(crate) fn check_inputs(
        &self,
        mechanism: &'static str,
        inputs: &Inputs<'_, F>,
    ) -> Result<()> {
        let shapes = inputs.gradient_shapes();
        for (what, expected, actual) in [
            ("grads.query", &shapes.query, &self.query),
            ("grads.key", &shapes.key, &self.key),
            ("grads.value", &shapes.value, &self.value),
        ] {
            if let Some(actual) = actual {
                check_shape(what, expected, actual.shape())?;
            }
        }
        let channel = |what, channel, expected: Option<&[usize]>, actual: Option<&[usize]>| match (
            expected, actual,
        ) {
            (_, None) => Ok(()),
            (None, Some(_)) => Err(Error::MissingInput { mechanism: mechanism.into(), channel }),
            (Some(expected), Some(actual)) => check_shape(what, expected, actual),
        };
        channel(
            "grads.bias",
            Channel::Bias,
            shapes.bias.as_ref().map(<[usize; 2]>::as_slice),
            self.bias.as_ref().map(|grad| grad.shape()),
        )?;
        channel(
            "grads.edge_features",
            Channel::EdgeFeatures,
            shapes.edge_features.as_ref().map(<[usize; 2]>::as_slice),
            self.edge_features.as_ref().map(|grad| grad.shape()),
        )?;
        channel(
            "grads.distances",
            Channel::Distances,
            shapes.distances.as_ref().map(<[usize; 1]>::as_slice),
            self.distances.as_ref().map(|grad| grad.shape()),
        )
    }
}

/// A slot of [`GradientsMut::params`] with the rank of its parameter. Only for slots that
/// [`GradientsMut::check`] has seen.
pub(crate) fn param_slot<F, D: Dimension>(slot: &mut ArrayD<F>) -> ArrayViewMut<'_, F, D> {
    let slot = slot.view_mut().into_dimensionality();
    slot.expect("the shapes of parameter gradients have been checked")
}
