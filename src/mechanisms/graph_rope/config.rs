//! The configuration and the rotation that it describes.

use super::scaling::Scaling;
use super::{EdgeRope, GraphRope};
use crate::attention::Attention;
use crate::element::try_zeros;
use crate::error::{Error, Result, check_shape};
use crate::gradients::param_slot;
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::kernels::rotary::{Layout, Rotary};
use ndarray::{Array2, ArrayD, ArrayView2, ArrayViewD, ArrayViewMutD, Ix2, Zip, s};

/// The sizes and options of a [`GraphRope`] or an [`EdgeRope`].
///
/// **Frequencies.** The d rotated columns form d/2 pairs, and pair p has the frequency θₚ = base^{−2p/d}.
/// If positions have several axes, each axis gets a block of consecutive pairs: ⌊d/2 / axes⌋ of them, and
/// one more in each of the first (d/2 mod axes) blocks. Each block of m pairs has the frequencies
/// base^{−p/m} for p = 0 … m − 1, which a [`Scaling`] changes for longer contexts. Alternatively the frequencies
/// are [given](Self::frequencies): each pair may depend on several axes, and each head may have its own.
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
    scaling: Option<Scaling>,
    attention_factor: Option<f64>,
    learn_frequencies: bool,
}

/// Where the frequencies come from.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
enum Spectrum {
    /// Powers of the base, with the pairs split among this number of axes.
    Axes(usize),
    /// axes × pairs, or axes × (heads · pairs).
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
            scaling: None,
            attention_factor: None,
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
    ///
    /// With one block of pairs for each key head, axes × (kv_heads · pairs), each head has its own, and
    /// grouped query heads those of their key head. (Fewer blocks are shared by consecutive heads.) Zeros leave
    /// a head unrotated:
    ///
    /// ```
    /// use graph_attention::{Flash, GraphRopeConfig, graph_rope::Layout};
    /// use graph_attention::ndarray::array;
    ///
    /// let frequencies = array![[1.0, 0.01, 0.0, 0.0]]; // of two heads with two pairs each
    /// let rope = GraphRopeConfig::new(4, Layout::Half).frequencies(frequencies).init(Flash::new())?;
    /// let x = array![[1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]];
    /// let turned = rope.rotate(x.view(), array![[7.0]].view())?;
    /// assert!(turned[[0, 0]] != 1.0 && turned[[0, 4]] == 1.0);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    #[must_use]
    pub fn frequencies(mut self, frequencies: Array2<f64>) -> Self {
        self.spectrum = Spectrum::Frequencies(frequencies);
        self
    }

    /// Sets the scaling of the frequencies for longer contexts, with its attention factor. Default: none.
    ///
    /// ```
    /// use graph_attention::{Flash, GraphRopeConfig, graph_rope::{Layout, Scaling}};
    ///
    /// // Qwen's extension from 32,768 to 131,072 positions.
    /// let config = GraphRopeConfig::new(128, Layout::Half).base(1e6).scaling(Scaling::yarn(4.0, 32_768.0));
    /// let rope = config.init::<f32, _>(Flash::new())?;
    /// assert_eq!(rope.frequencies()[[0, 0]], 1.0); // the highest stays
    /// assert!((rope.attention_factor() - 1.1386).abs() < 1e-4);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    #[must_use]
    pub fn scaling(mut self, scaling: Scaling) -> Self {
        self.scaling = Some(scaling);
        self
    }

    /// Sets a factor by which rotated columns of queries and keys are multiplied: transformers'
    /// `attention_factor`. Columns that are not rotated ([`rotary_dim`](Self::rotary_dim)) are not multiplied,
    /// in keeping with transformers. Default: that of the scaling, or 1.
    ///
    /// DeepSeek's `mscale` a and `mscale_all_dim` b are the factor (0.1 a ln s + 1) / (0.1 b ln s + 1).
    #[must_use]
    pub fn attention_factor(mut self, factor: f64) -> Self {
        self.attention_factor = Some(factor);
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
    /// the base is not positive and finite, if there are no axes or more axes than pairs, if a given
    /// frequency or the attention factor is not finite, if a number of the scaling is out of range, or if
    /// there are both a scaling and given frequencies; [`Error::Shape`] if there is not one given frequency
    /// per pair.
    pub fn init<F: Float, A: Attention<F>>(&self, inner: A) -> Result<GraphRope<F, A>> {
        Ok(GraphRope { rotation: self.rotation()?, inner })
    }

    /// Builds an [`EdgeRope`], which rotates each key by its distance from the query, and multiplies it by the
    /// square of the attention factor.
    ///
    /// # Errors
    /// As [`init`](Self::init), and [`Error::InvalidArgument`] if there is more than one axis.
    pub fn init_edges<F: Float>(&self) -> Result<EdgeRope<F>> {
        let mut rotation: Rotation<F> = self.rotation()?;
        // Only keys are rotated, so they take the factor of the queries too.
        rotation.attention_factor *= rotation.attention_factor;
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
            Spectrum::Axes(axes) => split(*axes, pairs, base, self.scaling)?,
            Spectrum::Frequencies(frequencies) => {
                if let Some(scaling) = self.scaling {
                    let expected = "none with given frequencies";
                    return Err(Error::config("scaling", expected, format!("{scaling:?}")));
                }
                // One block of pairs, or one for each head.
                let blocks = (frequencies.ncols() / pairs).max(1);
                let expected = [frequencies.nrows().max(1), blocks * pairs];
                check_shape("frequencies", &expected, frequencies.shape())?;
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
        let of_scaling = self.scaling.map_or(1.0, |scaling| scaling.attention_factor());
        let attention_factor = self.attention_factor.unwrap_or(of_scaling);
        if !attention_factor.is_finite() {
            return Err(Error::config("attention_factor", "a finite number", attention_factor));
        }
        Ok(Rotation { layout, head_dim, pairs, frequencies, attention_factor })
    }
}

/// Computes the frequencies of pairs split among axes: axes × pairs.
fn split(axes: usize, pairs: usize, base: f64, scaling: Option<Scaling>) -> Result<Array2<f64>> {
    if !(base > 0.0 && base.is_finite()) {
        return Err(Error::config("base", "a positive finite number", base));
    }
    if axes == 0 || axes > pairs {
        let expected = format!("from 1 to the number of rotated pairs, {pairs}");
        return Err(Error::config("axes", expected, axes));
    }
    scaling.map_or(Ok(()), |scaling| scaling.validate(base))?;
    let mut frequencies = try_zeros("frequencies", axes, pairs)?;
    let mut start = 0;
    for axis in 0..axes {
        let count = pairs / axes + usize::from(axis < pairs % axes);
        let mut block = frequencies.slice_mut(s![axis, start..start + count]);
        for (p, frequency) in block.iter_mut().enumerate() {
            *frequency = match scaling {
                Some(scaling) => scaling.scale(base, p, count),
                None => base.powf(-(p as f64) / count as f64),
            };
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
    /// Of a head.
    pairs: usize,
    frequencies: Frequencies<F>,
    pub(super) attention_factor: f64,
}

/// axes × (blocks · pairs).
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
        let Self { layout, head_dim, pairs, attention_factor: factor, .. } = *self;
        Rotary { layout, head_dim, pairs, frequencies: self.frequencies(), factor }
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

    /// Checks that rows consist of whole heads.
    pub(super) fn check_heads(&self, x: ArrayView2<'_, F>) -> Result<()> {
        let heads = (x.ncols() / self.head_dim).max(1);
        check_shape("x", &[x.nrows(), heads * self.head_dim], x.shape())?;
        self.check_blocks("heads", heads)
    }

    /// Checks that each block of frequencies belongs to as many heads.
    fn check_blocks(&self, what: &'static str, heads: usize) -> Result<()> {
        let columns = match &self.frequencies {
            Frequencies::Fixed { lent, .. } => lent.ncols(),
            Frequencies::Learned(frequencies) => frequencies.ncols(),
        };
        let blocks = columns / self.pairs;
        if heads.is_multiple_of(blocks) {
            return Ok(());
        }
        let expected = format!("a multiple of the {blocks} blocks of frequencies");
        Err(Error::config(what, expected, heads))
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
        self.check_blocks("kv_heads", inputs.num_kv_heads())
    }
}
