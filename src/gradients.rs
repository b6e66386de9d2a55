use crate::element::{Element, try_array, try_vec, try_zeros};
use crate::error::{Channel, Error, Result, check_shape};
use crate::inputs::Inputs;
use crate::params::{self, Params};
use ndarray::{
    Array1, Array2, Array3, ArrayD, ArrayViewMut, ArrayViewMut1, ArrayViewMut2, ArrayViewMut3,
    Axis, Dimension, IxDyn, aview_mut1, s,
};

/// The gradients of a loss with respect to the inputs and parameters of a mechanism, as returned by
/// [`Attention::backward`](crate::Attention::backward). Each gradient has the shape of its input or
/// parameter.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients<F> {
    /// With respect to the queries.
    pub query: Array2<F>,
    /// With respect to the keys.
    pub key: Array2<F>,
    /// With respect to the values.
    pub value: Array2<F>,
    /// With respect to the additive logits, if the inputs have them, with as many axes: two or three.
    pub bias: Option<ArrayD<F>>,
    /// With respect to the weights of pairs, if the inputs have them.
    pub pair_weights: Option<Array2<F>>,
    /// With respect to the edge features, if the inputs have them.
    pub edge_features: Option<Array2<F>>,
    /// With respect to the distances, if the inputs have them.
    pub distances: Option<Array1<F>>,
    /// With respect to the positions of the queries, if the inputs have positions.
    pub query_positions: Option<Array2<F>>,
    /// With respect to the positions of the keys, if the inputs have positions.
    pub key_positions: Option<Array2<F>>,
    /// With respect to the parameters, in the order in which [`Params`] visits them; buffers have none.
    pub params: Vec<ArrayD<F>>,
}

/// Mutable views of gradients, to which [`Attention::backward_into`](crate::Attention::backward_into)
/// adds. They may be parts of larger arrays. A gradient that is `None` is not computed, which saves time.
///
/// [`Gradients::view_mut`] creates views of all gradients, [`of_params`](Self::of_params) of the parameters
/// only. [`guide::training`](crate::guide::training) adds up the gradients of a batch, and
/// [`guide::performance`](crate::guide::performance) leaves some out. Fields may be added later: a mechanism
/// that wraps others changes the fields that it knows and passes on the rest.
#[non_exhaustive]
#[derive(Debug)]
pub struct GradientsMut<'a, F> {
    /// With respect to the queries.
    pub query: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the keys.
    pub key: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the values.
    pub value: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the additive logits, with a leading axis of length 1 if their array has two axes.
    /// [`Bias::slot`](crate::Bias::slot) returns the index of the gradient of a pair.
    pub bias: Option<ArrayViewMut3<'a, F>>,
    /// With respect to the weights of pairs.
    pub pair_weights: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the edge features.
    pub edge_features: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the distances.
    pub distances: Option<ArrayViewMut1<'a, F>>,
    /// With respect to the positions of the queries.
    pub query_positions: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the positions of the keys.
    pub key_positions: Option<ArrayViewMut2<'a, F>>,
    /// With respect to the parameters, in the order in which [`Params`] visits them. A mechanism
    /// that wraps others gives each its part with `split_at_mut`.
    pub params: &'a mut [ArrayD<F>],
}

impl<F: Element> Gradients<F> {
    /// Creates zeros for all arrays of `inputs` and all parameters of `params`.
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
            pair_weights: optional("grads.pair_weights", shapes.pair_weights)?,
            edge_features: optional("grads.edge_features", shapes.edge_features)?,
            distances: shapes.distances.map(vector).transpose()?.map(Array1::from),
            query_positions: optional("grads.query_positions", shapes.query_positions)?,
            key_positions: optional("grads.key_positions", shapes.key_positions)?,
            params: params::zeros(params),
        })
    }

    /// Returns views of all gradients, for [`Attention::backward_into`](crate::Attention::backward_into) to
    /// add to.
    pub fn view_mut(&mut self) -> GradientsMut<'_, F> {
        GradientsMut {
            query: Some(self.query.view_mut()),
            key: Some(self.key.view_mut()),
            value: Some(self.value.view_mut()),
            bias: self.bias.as_mut().map(with_three_axes),
            pair_weights: self.pair_weights.as_mut().map(|grad| grad.view_mut()),
            edge_features: self.edge_features.as_mut().map(|grad| grad.view_mut()),
            distances: self.distances.as_mut().map(|grad| grad.view_mut()),
            query_positions: self.query_positions.as_mut().map(|grad| grad.view_mut()),
            key_positions: self.key_positions.as_mut().map(|grad| grad.view_mut()),
            params: &mut self.params,
        }
    }

    /// Returns the gradient of the nodes if they are the keys and values, and their first rows are the
    /// queries: all rows in self-attention ([`Inputs::self_attention`]), the targets in a sampled bipartite
    /// graph. It is the sum of the gradients of query, key and value.
    ///
    /// # Errors
    /// [`Error::Shape`] if query, key and value differ in their number of columns, key and value differ in
    /// their number of rows, or there are more queries than keys.
    pub fn self_attention(&self) -> Result<Array2<F>> {
        let mut nodes = self.key_value()?;
        let [queries, columns] = [self.query.nrows().min(nodes.nrows()), nodes.ncols()];
        check_shape("grads.query", &[queries, columns], self.query.shape())?;
        let mut targets = nodes.slice_mut(s![..queries, ..]);
        targets += &self.query;
        Ok(nodes)
    }

    /// Returns the gradient of the source nodes if they are the keys and values, and other nodes are the
    /// queries. It is the sum of the gradients of key and value; the gradient of the targets is
    /// [`query`](Self::query).
    ///
    /// # Errors
    /// [`Error::Shape`] if key and value differ in shape.
    pub fn key_value(&self) -> Result<Array2<F>> {
        check_shape("grads.value", self.key.shape(), self.value.shape())?;
        Ok(&self.key + &self.value)
    }

    /// Returns the names and gradients of the parameters, in order. `params` is the mechanism that the
    /// gradients belong to.
    ///
    /// # Errors
    /// [`Error::Shape`] if they belong to another mechanism.
    pub fn named(
        &self,
        params: &(impl Params<F> + ?Sized),
    ) -> Result<impl Iterator<Item = (String, &ArrayD<F>)>> {
        params::check_gradients(params, &self.params)?;
        Ok(params::names(params).into_iter().zip(&self.params))
    }

    /// Returns the gradient of the parameter with this name, such as `experts.2.in_proj_weight`. `params` is
    /// the mechanism that the gradients belong to.
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
    /// [`Error::UnknownParam`] if there is no such parameter; [`Error::Shape`] if the gradients belong to
    /// another mechanism.
    pub fn param(&self, params: &(impl Params<F> + ?Sized), name: &str) -> Result<&ArrayD<F>> {
        let mut named = self.named(params)?;
        let found = named.find(|(known, _)| known == name).map(|(_, gradient)| gradient);
        let unknown =
            || Error::UnknownParam { name: name.to_owned(), known: params::names(params) };
        found.ok_or_else(unknown)
    }
}

impl<'a, F> GradientsMut<'a, F> {
    /// Creates views of the parameter gradients only. Set other fields to compute more gradients.
    pub fn of_params(params: &'a mut [ArrayD<F>]) -> Self {
        Self {
            query: None,
            key: None,
            value: None,
            bias: None,
            pair_weights: None,
            edge_features: None,
            distances: None,
            query_positions: None,
            key_positions: None,
            params,
        }
    }

    /// Splits off the gradients of the first `count` parameters; the second result has the remaining ones
    /// and all other gradients. For a mechanism whose own parameters come before its inner mechanism's.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are fewer parameters than `count`.
    pub fn split_params(self, count: usize) -> Result<(&'a mut [ArrayD<F>], Self)> {
        let len = self.params.len();
        let (first, params) = (self.params.split_at_mut_checked(count))
            .ok_or_else(|| Error::shape("number of grads.params", &[count], &[len]))?;
        Ok((first, Self { params, ..self }))
    }
}

impl<F: Element> GradientsMut<'_, F> {
    /// Reborrows the views, so that they can be passed on more than once, say to several inner mechanisms
    /// in turn.
    pub fn reborrow(&mut self) -> GradientsMut<'_, F> {
        GradientsMut {
            query: self.query.as_mut().map(|grad| grad.view_mut()),
            key: self.key.as_mut().map(|grad| grad.view_mut()),
            value: self.value.as_mut().map(|grad| grad.view_mut()),
            bias: self.bias.as_mut().map(|grad| grad.view_mut()),
            pair_weights: self.pair_weights.as_mut().map(|grad| grad.view_mut()),
            edge_features: self.edge_features.as_mut().map(|grad| grad.view_mut()),
            distances: self.distances.as_mut().map(|grad| grad.view_mut()),
            query_positions: self.query_positions.as_mut().map(|grad| grad.view_mut()),
            key_positions: self.key_positions.as_mut().map(|grad| grad.view_mut()),
            params: self.params,
        }
    }

    /// Returns the gradient of a parameter, by its number in the order of [`Params`]. `D` is its rank: `Ix0`
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

    /// Checks all shapes against the inputs and parameters. Call it first in `backward_into`.
    ///
    /// # Errors
    /// [`Error::Shape`], naming the array, if a gradient has another shape; [`Error::MissingInput`] for the
    /// gradient of a channel that the inputs do not have.
    pub fn check(
        &self,
        mechanism: &'static str,
        inputs: &Inputs<'_, F>,
        params: &(impl Params<F> + ?Sized),
    ) -> Result<()> {
        self.check_inputs(mechanism, inputs)?;
        params::check_gradients(params, self.params)
    }

    /// Runs [`check`](Self::check) on all gradients except those of the parameters.
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
        // Drop the leading axis if the caller's array does not have it.
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
            "grads.pair_weights",
            Channel::PairWeights,
            shapes.pair_weights.as_ref().map(<[usize; 2]>::as_slice),
            self.pair_weights.as_ref().map(|grad| grad.shape()),
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

/// Returns the gradient of additive logits in the form of [`GradientsMut::bias`]. The field is public, so
/// the array may have any number of axes: one with more than three gives an empty view, which
/// [`GradientsMut::check`] refuses.
fn with_three_axes<F>(bias: &mut ArrayD<F>) -> ArrayViewMut3<'_, F> {
    let mut bias = bias.view_mut();
    while bias.ndim() < 3 {
        bias.insert_axis_inplace(Axis(0));
    }
    let empty = || aview_mut1(&mut []).insert_axis(Axis(0)).insert_axis(Axis(0));
    bias.into_dimensionality().unwrap_or_else(|_| empty())
}

/// Views an entry of [`GradientsMut::params`] with the rank of its parameter. Only for entries that
/// [`GradientsMut::check`] has checked.
pub(crate) fn param_slot<F, D: Dimension>(slot: &mut ArrayD<F>) -> ArrayViewMut<'_, F, D> {
    let slot = slot.view_mut().into_dimensionality();
    slot.expect("the shapes of parameter gradients have been checked")
}

/// Where one of several parts of the work adds to the gradient of a bias.
pub(crate) enum PartOfBias<'g, F> {
    /// Rows or columns that no other part has.
    Own(ArrayViewMut3<'g, F>),
    /// A copy of what all parts share. The copies are added up in order at the end.
    Copy(Array3<F>),
}

impl<F: Element> PartOfBias<'_, F> {
    pub(crate) fn view_mut(&mut self) -> ArrayViewMut3<'_, F> {
        match self {
            Self::Own(part) => part.view_mut(),
            Self::Copy(copy) => copy.view_mut(),
        }
    }

    pub(crate) fn into_copy(self) -> Option<Array3<F>> {
        match self {
            Self::Own(_) => None,
            Self::Copy(copy) => Some(copy),
        }
    }
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
            pair_weights: None,
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

    #[test]
    fn a_bias_gradient_of_any_rank_is_viewed_and_checked() -> Result<()> {
        let rows = Array2::<f64>::ones((2, 2));
        let bias = Array2::zeros((2, 2));
        let inputs =
            Inputs::dense(rows.view(), rows.view(), rows.view())?.with_bias(bias.view())?;
        for shape in [vec![], vec![2], vec![2, 2], vec![1, 2, 2], vec![2, 2, 2], vec![1, 1, 2, 2]] {
            let mut grads = Gradients::zeros(&inputs, &crate::ScaledDotProduct::new())?;
            grads.bias = Some(ArrayD::zeros(shape.clone()));
            let checked = grads.view_mut().check("test", &inputs, &crate::ScaledDotProduct::new());
            match shape.as_slice() {
                [2, 2] | [1, 2, 2] => checked?,
                _ => assert!(matches!(checked, Err(Error::Shape { .. })), "{shape:?}: {checked:?}"),
            }
        }
        Ok(())
    }
}
