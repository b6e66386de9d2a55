use super::RowGradients;
use crate::element::{try_vec, try_zeros};
use crate::error::{Error, Result, check_shape};
use crate::gradients::param_slot;
use crate::kernels::Float;
use crate::kernels::norm::RowNorm;
use crate::params::{self, Params};
use ndarray::{Array1, Array2, ArrayD, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD};

/// How rows are normalised.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Normalization {
    /// Subtracts the mean and divides by the standard deviation (Ba et al. 2016, 1607.06450): PyTorch's
    /// `nn.LayerNorm`.
    Layer,
    /// Divides by the root mean square (Zhang & Sennrich 2019, 1910.07467): PyTorch's `nn.RMSNorm`.
    Rms,
}

/// The size and options of a [`Norm`]. Build one with initial parameters with [`init`](Self::init), or with given
/// parameters with [`from_params`](Self::from_params).
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct NormConfig {
    normalization: Normalization,
    dim: usize,
    epsilon: f64,
    bias: bool,
}

impl NormConfig {
    /// Creates a configuration for rows of `dim` columns, with ε = 1e-5 and, in a layer norm, a bias.
    #[must_use]
    pub fn new(normalization: Normalization, dim: usize) -> Self {
        Self { normalization, dim, epsilon: 1e-5, bias: true }
    }

    /// Sets ε, which is added to the mean square. Default: 1e-5, as in PyTorch's `nn.LayerNorm`. (Its
    /// `nn.RMSNorm` defaults to the machine epsilon.)
    #[must_use]
    pub fn epsilon(mut self, epsilon: f64) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// Sets whether a layer norm has a bias. Default: `true`. An RMS norm has none.
    #[must_use]
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Builds a `Norm` with weights 1 and biases 0, as in PyTorch.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `dim` is 0 or ε is not positive and finite, [`Error::TooLarge`].
    pub fn init<F: Float>(&self) -> Result<Norm<F>> {
        let Self { normalization, dim, epsilon, bias } = *self;
        if dim == 0 {
            return Err(Error::config("dim", "at least 1", dim));
        }
        if !(epsilon > 0.0 && epsilon.is_finite()) {
            return Err(Error::config("epsilon", "a positive finite number", epsilon));
        }
        let has_bias = bias && normalization == Normalization::Layer;
        let vector = |value| try_vec("norm", &[dim], value).map(Array1::from);
        Ok(Norm {
            normalization,
            epsilon,
            weight: vector(F::one())?,
            bias: has_bias.then(|| vector(F::zero())).transpose()?,
        })
    }

    /// Builds a `Norm` with given parameters, named as in PyTorch: `weight` and `bias`.
    ///
    /// # Errors
    /// As [`init`](Self::init) and [`params::load_state`].
    pub fn from_params<F: Float>(
        &self,
        state: impl IntoIterator<Item = (impl AsRef<str>, ArrayD<F>)>,
    ) -> Result<Norm<F>> {
        let mut norm = self.init()?;
        params::load_state(&mut norm, state)?;
        Ok(norm)
    }
}

/// Layer norm or RMS norm of each row.
///
/// ```text
/// Normalization::Layer   y = γ (x − mean(x)) / √(mean((x − mean(x))²) + ε) + β
/// Normalization::Rms     y = γ x / √(mean(x²) + ε)
/// ```
///
/// * **Parameters** `weight` (γ) and, in a layer norm, `bias` (β), of as many numbers as x has columns.
/// * **Cost** O(n · columns).
///
/// Computed in `f64` for both precisions, and rounded once. Rows of numbers of any size are normalised without
/// overflow.
///
/// ```
/// use graph_attention::ndarray::array;
/// use graph_attention::rowwise::{Norm, NormConfig, Normalization};
///
/// let norm: Norm<f64> = NormConfig::new(Normalization::Layer, 2).init()?;
/// let y = norm.forward(array![[1.0, 5.0], [-1e200, 1e200]].view())?;
/// assert!((y - array![[-1.0, 1.0], [-1.0, 1.0]]).iter().all(|error| error.abs() < 1e-5));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Norm<F> {
    normalization: Normalization,
    epsilon: f64,
    weight: Array1<F>,
    bias: Option<Array1<F>>,
}

impl<F: Float> Norm<F> {
    /// Returns y for rows x, in the shape of x.
    ///
    /// # Errors
    /// [`Error::Shape`] if x has another number of columns, [`Error::TooLarge`].
    pub fn forward(&self, x: ArrayView2<'_, F>) -> Result<Array2<F>> {
        let mut out = try_zeros("out", x.nrows(), x.ncols())?;
        self.forward_into(x, out.view_mut())?;
        Ok(out)
    }

    /// Overwrites `out`, in the shape of x, with y.
    ///
    /// # Errors
    /// [`Error::Shape`] if x or `out` does not fit.
    pub fn forward_into(&self, x: ArrayView2<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        check_shape("x", &[x.nrows(), self.weight.len()], x.shape())?;
        check_shape("out", x.shape(), out.shape())?;
        F::normalize_into(self.kernel(), x, out)
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
        check_shape("x", &[x.nrows(), self.weight.len()], x.shape())?;
        check_shape("grad_out", x.shape(), grad_out.shape())?;
        if let Some(grad_x) = &grad_x {
            check_shape("grad_x", x.shape(), grad_x.shape())?;
        }
        params::check_gradients(self, grad_params)?;
        let (weight, bias) = grad_params.split_at_mut(1);
        let (weight, bias) = (param_slot(&mut weight[0]), bias.first_mut().map(param_slot));
        F::normalize_vjp(self.kernel(), x, grad_out, grad_x, weight, bias)
    }

    fn kernel(&self) -> RowNorm<'_, F> {
        fn slice<F>(array: &Array1<F>) -> &[F] {
            array.as_slice().expect("an array of our own")
        }
        RowNorm {
            is_centred: self.normalization == Normalization::Layer,
            epsilon: self.epsilon,
            weight: slice(&self.weight),
            bias: self.bias.as_ref().map(slice),
        }
    }
}

impl<F: Float> Params<F> for Norm<F> {
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
