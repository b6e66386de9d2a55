use crate::error::{Channel, Error, Result, check_shape};
use crate::float::{Float, try_array, try_vec, try_zeros};
use crate::inputs::Inputs;
use crate::params::{self, Params};
use ndarray::{
    Array1, Array2, ArrayD, ArrayViewMut, ArrayViewMut1, ArrayViewMut2, ArrayViewMut3, Axis,
    Dimension, IxDyn, s,
};

/// The gradients of a loss with respect to the inputs and parameters of a mechanism, as
/// [`Attention::backward`](crate::Attention::backward) returns them. Each array has the shape of
/// what it is the gradient of.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients<F> {
    /// With respect to the queries.
    pub query: Array2<F>,
    /// With respect to the keys.
    pub key: Array2<F>,
    /// With respect to the values.
    pub value: Array2<F>,
    /// With respect to the additive logits, where the inputs have them: two axes or three, as theirs.
    pub bias: Option<ArrayD<F>>,
    /// With respect to the edge features, where the inputs have them.
    pub edge_features: Option<Array2<F>>,
    /// With respect to the distances, where the inputs have them.
    pub distances: Option<Array1<F>>,
    /// With respect to the positions of the queries, where the inputs have positions.
    pub query_positions: Option<Array2<F>>,
    /// With respect to the positions of the keys, where the inputs have positions.
    pub key_positions: Option<Array2<F>>,
    /// With respect to the parameters, in the order in which [`Params`] visits them; buffers have none.
    pub params: Vec<ArrayD<F>>,
}

/// Where [`Attention::backward_into`](crate::Attention::backward_into) adds the gradients: views,
/// so that they may be parts of larger arrays. A `None` is not computed, which saves its time.
///
/// [`Gradients::view_mut`] makes one of everything, [`of_params`](Self::of_params) one of the parameters
/// alone. [`guide::training`](crate::guide::training) adds up the gradients of a batch, and
/// [`guide::performance`](crate::guide::performance) leaves some out. New fields may be added: a mechanism
/// around others changes the fields that it knows, and hands on the rest.
#[non_exhaustive]
#[derive(Debug)]
pub struct GradientsMut<'a, F> {
    /// With respect to the queries.
    pub query: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the keys.
    pub key: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the values.
    pub value: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the additive logits, with an axis of length 1 in front where their array has two axes:
    /// [`Bias::slot`](crate::Bias::slot) says where the gradient of a pair goes.
    pub bias: Option<ArrayViewMut3<'a, F>>,
    /// With respect to the edge features.
    pub edge_features: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the distances.
    pub distances: Option<ArrayViewMut1<'a, F>>,
    /// With respect to the positions of the queries.
    pub query_positions: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the positions of the keys.
    pub key_positions: Option<ArrayViewMut2<'a, F>>,
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
        let of_bias = |shape: Vec<usize>| try_array("grads.bias", IxDyn(&shape), F::zero());
        Ok(Self {
            query: zeros("grads.query", shapes.query)?,
            key: zeros("grads.key", shapes.key)?,
            value: zeros("grads.value", shapes.value)?,
            bias: shapes.bias.map(of_bias).transpose()?,
            edge_features: optional("grads.edge_features", shapes.edge_features)?,
            distances: shapes.distances.map(vector).transpose()?.map(Array1::from),
            query_positions: optional("grads.query_positions", shapes.query_positions)?,
            key_positions: optional("grads.key_positions", shapes.key_positions)?,
            params: params::zeros(params),
        })
    }

    /// Views of all of them, for [`Attention::backward_into`](crate::Attention::backward_into) to add to.
    pub fn view_mut(&mut self) -> GradientsMut<'_, F> {
        GradientsMut {
            query: Some(self.query.view_mut()),
            key: Some(self.key.view_mut()),
            value: Some(self.value.view_mut()),
            bias: self.bias.as_mut().map(with_three_axes),
            edge_features: self.edge_features.as_mut().map(|grad| grad.view_mut()),
            distances: self.distances.as_mut().map(|grad| grad.view_mut()),
            query_positions: self.query_positions.as_mut().map(|grad| grad.view_mut()),
            key_positions: self.key_positions.as_mut().map(|grad| grad.view_mut()),
            params: &mut self.params,
        }
    }

    /// The gradient of the nodes h where keys and values are h and the queries are its first rows: all of
    /// them in self-attention ([`Inputs::self_attention`]), the targets of a sampled bipartite graph
    /// otherwise. The sum of the gradients of query, key and value.
    ///
    /// # Errors
    /// [`Error::Shape`] if query, key and value do not have as many columns, key and value not as many
    /// rows, or there are more queries than keys.
    pub fn self_attention(&self) -> Result<Array2<F>> {
        let mut nodes = self.key_value()?;
        let [queries, columns] = [self.query.nrows().min(nodes.nrows()), nodes.ncols()];
        check_shape("grads.query", &[queries, columns], self.query.shape())?;
        let mut targets = nodes.slice_mut(s![..queries, ..]);
        targets += &self.query;
        Ok(nodes)
    }

    /// The gradient of the source nodes h where keys and values are h and the queries are other nodes: the
    /// sum of the gradients of key and value. That of the targets is [`query`](Self::query).
    ///
    /// # Errors
    /// [`Error::Shape`] if key and value are not of one shape.
    pub fn key_value(&self) -> Result<Array2<F>> {
        check_shape("grads.value", self.key.shape(), self.value.shape())?;
        Ok(&self.key + &self.value)
    }

    /// The gradients of the parameters with their names, in their order. `params` is the mechanism that
    /// they are the gradients of.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are another mechanism's.
    pub fn named(
        &self,
        params: &(impl Params<F> + ?Sized),
    ) -> Result<impl Iterator<Item = (String, &ArrayD<F>)>> {
        params::check_gradients(params, &self.params)?;
        Ok(params::names(params).into_iter().zip(&self.params))
    }

    /// The gradient of the parameter of this name, such as `experts.2.in_proj_weight`. `params` is the
    /// mechanism that they are the gradients of.
    ///
    /// ```
    /// use graph_attention::edge_gat::Score;
    /// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
    /// use graph_attention::{Attention, EdgeGatConfig, Graph, Inputs, ndarray::array};
    ///
    /// let nodes = array![[1.0, 0.0], [0.0, 1.0]];
    /// let graph = Graph::from_edges(2, 2, [(0, 0), (0, 1), (1, 0)])?;
    /// let inputs = Inputs::self_attention(nodes.view(), &graph)?;
    /// let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    /// let gat = EdgeGatConfig::new(Score::GatV2, 2, 3, 1).init::<f64>(&mut rng)?;
    /// let (out, saved) = gat.forward_train(&inputs)?;
    /// let grads = gat.backward(&inputs, &saved, out.view())?;
    /// assert_eq!(grads.param(&gat, "att")?.shape(), [1, 1, 3]);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::UnknownParam`] if there is none; [`Error::Shape`] if they are another mechanism's.
    pub fn param(&self, params: &(impl Params<F> + ?Sized), name: &str) -> Result<&ArrayD<F>> {
        let mut named = self.named(params)?;
        let found = named.find(|(known, _)| known == name).map(|(_, gradient)| gradient);
        let unknown =
            || Error::UnknownParam { name: name.to_owned(), known: params::names(params) };
        found.ok_or_else(unknown)
    }
}

impl<'a, F> GradientsMut<'a, F> {
    /// Of the parameters alone: nothing else is computed. Set the fields of what else is wanted.
    pub fn of_params(params: &'a mut [ArrayD<F>]) -> Self {
        Self {
            query: None,
            key: None,
            value: None,
            bias: None,
            edge_features: None,
            distances: None,
            query_positions: None,
            key_positions: None,
            params,
        }
    }

    /// The first parameters, and everything else with the rest of the parameters: for a mechanism whose own
    /// parameters come before those of the mechanism inside.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are fewer parameters.
    pub fn split_params(self, count: usize) -> Result<(&'a mut [ArrayD<F>], Self)> {
        let len = self.params.len();
        let (first, params) = (self.params.split_at_mut_checked(count))
            .ok_or_else(|| Error::shape("number of grads.params", &[count], &[len]))?;
        Ok((first, Self { params, ..self }))
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
            query_positions: self.query_positions.as_mut().map(|grad| grad.view_mut()),
            key_positions: self.key_positions.as_mut().map(|grad| grad.view_mut()),
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
        // Without the axis in front, which the caller's array may not have.
        let num_axes = shapes.bias.as_ref().map_or(3, Vec::len);
        let first_axis = if self.bias.as_ref().is_some_and(|grad| grad.shape()[0] == 1) {
            3 - num_axes
        } else {
            0
        };
        channel(
            "grads.bias",
            Channel::Bias,
            shapes.bias.as_deref(),
            self.bias.as_ref().map(|grad| &grad.shape()[first_axis..]),
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
        )?;
        channel(
            "grads.query_positions",
            Channel::Positions,
            shapes.query_positions.as_ref().map(<[usize; 2]>::as_slice),
            self.query_positions.as_ref().map(|grad| grad.shape()),
        )?;
        channel(
            "grads.key_positions",
            Channel::Positions,
            shapes.key_positions.as_ref().map(<[usize; 2]>::as_slice),
            self.key_positions.as_ref().map(|grad| grad.shape()),
        )
    }
}

/// The gradient of additive logits as [`GradientsMut::bias`] has it.
fn with_three_axes<F>(bias: &mut ArrayD<F>) -> ArrayViewMut3<'_, F> {
    let mut bias = bias.view_mut();
    if bias.ndim() == 2 {
        bias.insert_axis_inplace(Axis(0));
    }
    bias.into_dimensionality().expect("additive logits have two axes or three")
}

/// A slot of [`GradientsMut::params`] with the rank of its parameter. Only for slots that
/// [`GradientsMut::check`] has seen.
pub(crate) fn param_slot<F, D: Dimension>(slot: &mut ArrayD<F>) -> ArrayViewMut<'_, F, D> {
    let slot = slot.view_mut().into_dimensionality();
    slot.expect("the shapes of parameter gradients have been checked")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    fn gradients(queries: usize) -> Gradients<f64> {
        let rows = array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]];
        Gradients {
            query: 100.0 * &rows.slice(s![..queries, ..]),
            key: rows.clone(),
            value: 10.0 * &rows,
            bias: None,
            edge_features: None,
            distances: None,
            query_positions: None,
            key_positions: None,
            params: vec![],
        }
    }

    #[test]
    fn queries_are_the_first_of_the_keys() -> Result<()> {
        let whole = array![[111.0, 222.0], [333.0, 444.0], [555.0, 666.0]];
        assert_eq!(gradients(3).self_attention()?, whole);
        let targets = array![[111.0, 222.0], [33.0, 44.0], [55.0, 66.0]];
        assert_eq!(gradients(1).self_attention()?, targets);
        assert_eq!(gradients(1).key_value()?, array![[11.0, 22.0], [33.0, 44.0], [55.0, 66.0]]);
        Ok(())
    }

    #[test]
    fn everything_but_the_first_parameters_is_handed_on() -> Result<()> {
        let mut all = gradients(2);
        all.params = vec![ArrayD::zeros(vec![1]), ArrayD::zeros(vec![2])];
        let (own, rest) = all.view_mut().split_params(1)?;
        assert_eq!((own[0].len(), rest.params[0].len()), (1, 2));
        assert!(rest.query.is_some() && rest.key.is_some() && rest.value.is_some());
        let params = GradientsMut::<f64>::of_params(&mut []);
        assert!(params.query.is_none() && params.key.is_none() && params.value.is_none());
        let error = all.view_mut().split_params(3).unwrap_err();
        assert_eq!(error, Error::shape("number of grads.params", &[3], &[2]));
        Ok(())
    }
}
