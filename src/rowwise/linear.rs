use super::RowGradients;
use crate::element::{try_vec, try_zeros};
use crate::error::{Error, Result, check_shape};
use crate::gradients::param_slot;
use crate::kernels::Float;
use crate::mechanisms::fill_uniform;
use crate::params::{self, Params};
use ndarray::{
    Array1, Array2, ArrayD, ArrayView1, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD,
};
use rand::Rng;

/// The sizes of a [`Linear`]. Build one with initial parameters with [`init`](Self::init), or with given
/// parameters with [`from_params`](Self::from_params).
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct LinearConfig {
    inputs: usize,
    outputs: usize,
    bias: bool,
}

impl LinearConfig {
    /// Creates the configuration of PyTorch's `nn.Linear(inputs, outputs)`.
    #[must_use]
    pub fn new(inputs: usize, outputs: usize) -> Self {
        Self { inputs, outputs, bias: true }
    }

    /// Sets whether there is a bias. Default: `true`.
    #[must_use]
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Builds a `Linear` with weight and bias uniform in ±1/√`inputs`, as in PyTorch.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a size is 0, [`Error::TooLarge`].
    pub fn init<F: Float>(&self, rng: &mut impl Rng) -> Result<Linear<F>> {
        let mut linear = self.zeros()?;
        let bound = 1.0 / (self.inputs as f64).sqrt();
        fill_uniform(linear.weight.view_mut(), bound, rng);
        if let Some(bias) = &mut linear.bias {
            fill_uniform(bias.view_mut(), bound, rng);
        }
        Ok(linear)
    }

    /// Builds a `Linear` with given parameters, named as in PyTorch: `weight` and `bias`.
    ///
    /// # Errors
    /// As [`init`](Self::init) and [`params::load_state`].
    pub fn from_params<F: Float>(
        &self,
        state: impl IntoIterator<Item = (impl AsRef<str>, ArrayD<F>)>,
    ) -> Result<Linear<F>> {
        let mut linear = self.zeros()?;
        params::load_state(&mut linear, state)?;
        Ok(linear)
    }

    pub(crate) fn zeros<F: Float>(&self) -> Result<Linear<F>> {
        for (argument, size) in [("inputs", self.inputs), ("outputs", self.outputs)] {
            if size == 0 {
                return Err(Error::config(argument, "at least 1", size));
            }
        }
        let bias = || try_vec("bias", &[self.outputs], F::zero()).map(Array1::from);
        Ok(Linear {
            weight: try_zeros("weight", self.outputs, self.inputs)?,
            bias: self.bias.then(bias).transpose()?,
        })
    }
}

/// An affine map of each row, PyTorch's `nn.Linear`, for the projection of inputs to the columns of a layer and
/// for the head of a model.
///
/// ```text
/// y = x Wᵀ + b
/// ```
///
/// * **Parameters** `weight` (outputs × inputs) and `bias` (outputs).
/// * **Cost** O(n · inputs · outputs); a sparse x, such as the words of documents, costs only its nonzero
///   entries.
///
/// [The module](crate::rowwise) has an example.
#[derive(Clone, Debug)]
pub struct Linear<F> {
    weight: Array2<F>,
    bias: Option<Array1<F>>,
}

impl<F: Float> Linear<F> {
    /// Returns W, outputs × inputs.
    #[must_use]
    pub fn weight(&self) -> ArrayView2<'_, F> {
        self.weight.view()
    }

    /// Returns b, if there is one.
    #[must_use]
    pub fn bias(&self) -> Option<ArrayView1<'_, F>> {
        self.bias.as_ref().map(|bias| bias.view())
    }

    /// Returns y for rows x, n × inputs: n × outputs.
    ///
    /// # Errors
    /// [`Error::Shape`] if x has another number of columns, [`Error::TooLarge`].
    pub fn forward(&self, x: ArrayView2<'_, F>) -> Result<Array2<F>> {
        let mut out = try_zeros("out", x.nrows(), self.weight.nrows())?;
        self.forward_into(x, out.view_mut())?;
        Ok(out)
    }

    /// Overwrites `out`, n × outputs, with y.
    ///
    /// # Errors
    /// [`Error::Shape`] if x or `out` does not fit.
    pub fn forward_into(&self, x: ArrayView2<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        check_shape("x", &[x.nrows(), self.weight.ncols()], x.shape())?;
        check_shape("out", &[x.nrows(), self.weight.nrows()], out.shape())?;
        F::linear_into(x, self.weight(), self.bias(), out)
    }

    /// Returns the gradients of ⟨grad_out, y⟩ with respect to x and the parameters.
    ///
    /// # Errors
    /// [`Error::Shape`] if x or `grad_out` does not fit, [`Error::TooLarge`].
    pub fn backward(
        &self,
        x: ArrayView2<'_, F>,
        grad_out: ArrayView2<'_, F>,
    ) -> Result<RowGradients<F>> {
        let mut grad_x = try_zeros("grad_x", x.nrows(), x.ncols())?;
        let mut params = params::zeros(self);
        self.backward_into(x, grad_out, Some(grad_x.view_mut()), &mut params)?;
        Ok(RowGradients { x: grad_x, params })
    }

    /// Adds the gradients of ⟨grad_out, y⟩ to those of x, if they are wanted, and of the parameters. A row whose
    /// gradient is 0 is not read.
    ///
    /// # Errors
    /// [`Error::Shape`] if an array does not fit.
    pub fn backward_into(
        &self,
        x: ArrayView2<'_, F>,
        grad_out: ArrayView2<'_, F>,
        grad_x: Option<ArrayViewMut2<'_, F>>,
        grad_params: &mut [ArrayD<F>],
    ) -> Result<()> {
        check_shape("x", &[x.nrows(), self.weight.ncols()], x.shape())?;
        check_shape("grad_out", &[x.nrows(), self.weight.nrows()], grad_out.shape())?;
        params::check_gradients(self, grad_params)?;
        if let Some(grad_x) = grad_x {
            check_shape("grad_x", x.shape(), grad_x.shape())?;
            F::linear_input_vjp(self.weight(), grad_out, grad_x)?;
        }
        let (weight, bias) = grad_params.split_at_mut(1);
        let bias = bias.first_mut().map(param_slot);
        F::linear_params_vjp(x, grad_out, param_slot(&mut weight[0]), bias)
    }
}

impl<F: Float> Params<F> for Linear<F> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        visitor("weight", self.weight.view().into_dyn());
        if let Some(bias) = &self.bias {
            visitor("bias", bias.view().into_dyn());
        }
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        visitor("weight", self.weight.view_mut().into_dyn());
        if let Some(bias) = &mut self.bias {
            visitor("bias", bias.view_mut().into_dyn());
        }
    }
}
