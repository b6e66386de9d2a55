//! The configuration and the rotation that it describes.

use super::{EdgeRope, GraphRope};
use crate::attention::Attention;
use crate::error::{Error, Result, check_shape};
use crate::float::{Float, try_zeros};
use crate::gradients::param_slot;
use crate::inputs::Inputs;
use crate::kernels::rotary::{Layout, Rotary};
use ndarray::{Array2, ArrayD, ArrayViewD, ArrayViewMutD, Ix2, Zip, s};

/// The sizes and options of a [`GraphRope`] or an [`EdgeRope`].
///
/// **Frequencies.** The d rotated columns form d/2 pairs, and pair p has the frequency θₚ = base^{−2p/d}.
/// If positions have several axes, each axis gets a block of consecutive pairs: ⌊d/2 / axes⌋ of them, and
/// one more in each of the first (d/2 mod axes) blocks. Each block of m pairs has the frequencies
/// base^{−p/m} for p = 0 … m − 1. Alternatively the frequencies are [given](Self::frequencies), and each
/// pair may depend on several axes.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct GraphRopeConfig {
    head_dim: usize,
    layout: Layout,
    rotary_dim: Option<usize>,
    base: f64,
    spectrum: Spectrum,
    learn_frequencies: bool,
}

/// Where the frequencies come from.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
enum Spectrum {
    /// Powers of the base, with the pairs split among this number of axes.
    Axes(usize),
    /// axes × pairs.
    Frequencies(Array2<f64>),
}

impl GraphRopeConfig {
    /// Creates a configuration for heads of `head_dim` columns, all of them rotated: base 10000, one
    /// axis, fixed frequencies. The layout has no default, because it cannot be inferred from weights.
    #[must_use]
    pub fn new(head_dim: usize, layout: Layout) -> Self {
        Self {
            head_dim,
            layout,
            rotary_dim: None,
            base: 10_000.0,
            spectrum: Spectrum::Axes(1),
            learn_frequencies: false,
        }
    }

    /// Rotates only the first `dim` columns of each head: GPT-J's `rotary_dim`. This does not change the
    /// scale of the scores.
    #[must_use]
    pub fn rotary_dim(mut self, dim: usize) -> Self {
        self.rotary_dim = Some(dim);
        self
    }

    /// Sets the base of the frequencies, if they are not given. Default: 10000, as in the paper.
    #[must_use]
    pub fn base(mut self, base: f64) -> Self {
        self.base = base;
        self
    }

    /// Sets the number of axes, the columns of the positions, which share the pairs as described
    /// [above](Self). Replaces given frequencies.
    #[must_use]
    pub fn axes(mut self, axes: usize) -> Self {
        self.spectrum = Spectrum::Axes(axes);
        self
    }

    /// Sets all frequencies, axes × pairs: at position x, pair p turns by Σₐ θₐₚ xₐ. Replaces base and
    /// axes.
    #[must_use]
    pub fn frequencies(mut self, frequencies: Array2<f64>) -> Self {
        self.spectrum = Spectrum::Frequencies(frequencies);
        self
    }

    /// Sets whether the frequencies, axes × pairs, are a parameter that starts at the configured values,
    /// or a buffer that keeps them. Both have the name `frequencies`, so the state of one loads into the
    /// other. Default: `false`, a buffer.
    ///
    /// A buffer is used in `f64`. A state holds it rounded to the precision of the mechanism, and loading
    /// replaces only the frequencies whose rounded values differ from the state, so loading a state saved
    /// by a mechanism with the same configuration changes nothing.
    #[must_use]
    pub fn learn_frequencies(mut self, learn: bool) -> Self {
        self.learn_frequencies = learn;
        self
    }

    /// Builds a [`GraphRope`], which rotates queries and keys by node positions before `inner`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the number of rotated columns is odd, 0 or more than a head has, if
    /// the base is not positive and finite, if there are no axes or more axes than pairs, or if a given
    /// frequency is not finite; [`Error::Shape`] if there is not one given frequency per pair.
    pub fn init<F: Float, A: Attention<F>>(&self, inner: A) -> Result<GraphRope<F, A>> {
        Ok(GraphRope { rotation: self.rotation()?, inner })
    }

    /// Builds an [`EdgeRope`], which rotates each key by its distance from the query.
    ///
    /// # Errors
    /// As [`init`](Self::init), and [`Error::InvalidArgument`] if there is more than one axis.
    pub fn init_edges<F: Float>(&self) -> Result<EdgeRope<F>> {
        let rotation: Rotation<F> = self.rotation()?;
        match rotation.axes() {
            1 => Ok(EdgeRope { rotation }),
            axes => Err(Error::config("axes", "1, for distances", axes)),
        }
    }

    fn rotation<F: Float>(&self) -> Result<Rotation<F>> {
        let Self { head_dim, layout, base, .. } = *self;
        let rotary_dim = self.rotary_dim.unwrap_or(head_dim);
        if rotary_dim == 0 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
            let expected = format!("an even number from 2 to head_dim = {head_dim}");
            return Err(Error::config("rotary_dim", expected, rotary_dim));
        }
        let pairs = rotary_dim / 2;
        let frequencies = match &self.spectrum {
            Spectrum::Axes(axes) => split(*axes, pairs, base)?,
            Spectrum::Frequencies(frequencies) => {
                check_shape(
                    "frequencies",
                    &[frequencies.nrows().max(1), pairs],
                    frequencies.shape(),
                )?;
                if let Some(bad) = frequencies.iter().find(|frequency| !frequency.is_finite()) {
                    return Err(Error::config("frequencies", "finite numbers", bad));
                }
                frequencies.clone()
            }
        };
        let frequencies = if self.learn_frequencies {
            Frequencies::Learned(frequencies.mapv(F::from_f64))
        } else {
            Frequencies::fixed(frequencies)
        };
        Ok(Rotation { layout, head_dim, frequencies })
    }
}

/// Computes the frequencies of pairs split among axes: axes × pairs.
fn split(axes: usize, pairs: usize, base: f64) -> Result<Array2<f64>> {
    if !(base > 0.0 && base.is_finite()) {
        return Err(Error::config("base", "a positive finite number", base));
    }
    if axes == 0 || axes > pairs {
        let expected = format!("from 1 to the number of rotated pairs, {pairs}");
        return Err(Error::config("axes", expected, axes));
    }
    let mut frequencies = try_zeros("frequencies", axes, pairs)?;
    let mut start = 0;
    for axis in 0..axes {
        let count = pairs / axes + usize::from(axis < pairs % axes);
        let mut block = frequencies.slice_mut(s![axis, start..start + count]);
        for (p, frequency) in block.iter_mut().enumerate() {
            *frequency = base.powf(-(p as f64) / count as f64);
        }
        start += count;
    }
    Ok(frequencies)
}

/// The rotation that a configuration describes, with its parameter or buffer.
#[derive(Clone, Debug)]
pub(super) struct Rotation<F> {
    layout: Layout,
    head_dim: usize,
    frequencies: Frequencies<F>,
}

/// axes × pairs.
#[derive(Clone, Debug)]
enum Frequencies<F> {
    /// As configured, and as lent to visitors. An unchanged frequency keeps the digits of the configured
    /// one beyond the precision of F.
    Fixed {
        configured: Array2<f64>,
        lent: Array2<F>,
    },
    Learned(Array2<F>),
}

impl<F: Float> Frequencies<F> {
    fn fixed(configured: Array2<f64>) -> Self {
        let lent = configured.mapv(F::from_f64);
        Self::Fixed { configured, lent }
    }
}

impl<F: Float> Rotation<F> {
    pub(super) fn frequencies(&self) -> Array2<f64> {
        match &self.frequencies {
            Frequencies::Fixed { configured, lent } => {
                Zip::from(configured).and(lent).map_collect(|&configured, &lent| {
                    let is_unchanged = lent == F::from_f64(configured);
                    if is_unchanged { configured } else { lent.as_f64() }
                })
            }
            Frequencies::Learned(frequencies) => frequencies.mapv(F::as_f64),
        }
    }

    pub(super) fn axes(&self) -> usize {
        match &self.frequencies {
            Frequencies::Fixed { lent, .. } => lent.nrows(),
            Frequencies::Learned(frequencies) => frequencies.nrows(),
        }
    }

    pub(super) fn rotary(&self) -> Rotary {
        let Self { layout, head_dim, .. } = *self;
        Rotary { layout, head_dim, frequencies: self.frequencies() }
    }

    /// Returns the number of parameters: 0 or 1.
    pub(super) fn num_params(&self) -> usize {
        usize::from(matches!(self.frequencies, Frequencies::Learned(_)))
    }

    pub(super) fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        if let Frequencies::Learned(frequencies) = &self.frequencies {
            visitor("frequencies", frequencies.view().into_dyn());
        }
    }

    pub(super) fn visit_params_mut<'a>(
        &'a mut self,
        visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>),
    ) {
        if let Frequencies::Learned(frequencies) = &mut self.frequencies {
            visitor("frequencies", frequencies.view_mut().into_dyn());
        }
    }

    pub(super) fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        if let Frequencies::Fixed { lent, .. } = &self.frequencies {
            visitor("frequencies", lent.view().into_dyn());
        }
    }

    pub(super) fn visit_buffers_mut<'a>(
        &'a mut self,
        visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>),
    ) {
        if let Frequencies::Fixed { lent, .. } = &mut self.frequencies {
            visitor("frequencies", lent.view_mut().into_dyn());
        }
    }

    /// Adds the gradient of the frequencies if they are a parameter.
    pub(super) fn params_vjp(&self, grad: &Array2<f64>, params: &mut [ArrayD<F>]) {
        if let Some(slot) = params.first_mut() {
            param_slot::<F, Ix2>(slot).zip_mut_with(grad, |sum, &grad| *sum += F::from_f64(grad));
        }
    }

    /// Checks that the heads of queries and keys have the configured size.
    pub(super) fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        for (what, array, heads) in [
            ("query", inputs.query(), inputs.num_heads()),
            ("key", inputs.key(), inputs.num_kv_heads()),
        ] {
            let columns = heads.saturating_mul(self.head_dim);
            check_shape(what, &[array.nrows(), columns], array.shape())?;
        }
        Ok(())
    }
}
