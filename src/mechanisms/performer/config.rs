//! Sizes and options.

use super::Performer;
use super::map::FeatureMap;
use crate::error::{Error, Result};
use crate::float::Float;
use crate::params;
use ndarray::ArrayD;
use rand::Rng;

/// The feature map φ of a [`Performer`], whose products φ(q)·φ(k) stand for e^{q·k}; w are the rows of the
/// projection.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub enum Features {
    /// φ(x) = m^{−½} e^{w·x − |x|²/2} (FAVOR+): positive, so that the weights are.
    Positive,
    /// Both ±w of m/2 projections: positive, and never worse than [`Positive`](Self::Positive).
    Hyperbolic,
    /// φ(x) = (m/2)^{−½} e^{|x|²/2} (cos w·x, sin w·x), of Rahimi & Recht 2007: the baseline, for
    /// comparison. It is accurate where q is near k, but weights may be negative and their sum near
    /// zero, so that outputs may be arbitrarily large.
    Trigonometric,
    /// φ(x) = m^{−½} (max(w·x, 0) + ε): a kernel of its own, not an estimate of the softmax.
    Relu {
        /// ε > 0, which keeps denominators from zero; 10⁻³ in the authors' code.
        epsilon: f64,
    },
    /// φ(x) = elu(x) + 1, by columns and without a projection or a scale (Katharopoulos et al.
    /// 2020, 2006.16236): a kernel of its own, with as many features as a head has columns.
    Elu,
}

impl Features {
    /// How many features share a projection.
    pub(super) fn per_projection(self) -> usize {
        match self {
            Self::Hyperbolic | Self::Trigonometric => 2,
            _ => 1,
        }
    }

    /// Whether φ(q)·φ(k) estimates e^{q·k}.
    pub(super) fn is_estimate(self) -> bool {
        matches!(self, Self::Positive | Self::Hyperbolic | Self::Trigonometric)
    }
}

/// How the rows of a projection are drawn, each like a normal vector.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Projection {
    /// In blocks of orthogonal rows, uniformly distributed rotations, with the lengths of normal
    /// vectors (χ distributed): the estimates stay unbiased, and err less.
    Orthogonal,
    /// Independently.
    Iid,
}

/// The sizes and options of a [`Performer`], from which [`init`](Self::init) makes one with a fresh
/// projection and [`from_params`](Self::from_params) one with a given one.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct PerformerConfig {
    pub(super) head_dim: usize,
    pub(super) num_features: usize,
    pub(super) features: Features,
    pub(super) projection: Projection,
    pub(super) scale: Option<f64>,
    pub(super) learn_projection: bool,
}

impl PerformerConfig {
    /// Heads of `head_dim` columns and `num_features` features: positive ones of an orthogonal
    /// projection, for the scale 1/√head_dim.
    #[must_use]
    pub fn new(head_dim: usize, num_features: usize) -> Self {
        Self {
            head_dim,
            num_features,
            features: Features::Positive,
            projection: Projection::Orthogonal,
            scale: None,
            learn_projection: false,
        }
    }

    /// The kind of features. Default: [`Features::Positive`].
    #[must_use]
    pub fn features(mut self, features: Features) -> Self {
        self.features = features;
        self
    }

    /// How the projection is drawn. Default: [`Projection::Orthogonal`].
    #[must_use]
    pub fn projection(mut self, projection: Projection) -> Self {
        self.projection = projection;
        self
    }

    /// The scale of the dot products, positive. Default: 1/√head_dim. [`Features::Elu`] has none.
    #[must_use]
    pub fn scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Whether the projection is a parameter, which is trained, or a buffer, which is only saved and
    /// loaded. Features estimate the softmax as long as the projection is as it was drawn; training and
    /// weight decay change that. Default: `false`, a buffer, as in performer-pytorch.
    #[must_use]
    pub fn learn_projection(mut self, learn: bool) -> Self {
        self.learn_projection = learn;
        self
    }

    /// A `Performer` with a projection drawn from `rng`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a size is 0, features that come in pairs are an odd number,
    /// those of [`Features::Elu`] not `head_dim`, the scale is not from 10⁻³⁰ to 10³⁰ or ε not from
    /// 10⁻¹⁵; [`Error::TooLarge`].
    pub fn init<F: Float>(&self, rng: &mut impl Rng) -> Result<Performer<F>> {
        Ok(Performer { config: self.clone(), map: FeatureMap::draw(self, rng)? })
    }

    /// A `Performer` with a given `projection_matrix`, projections × head_dim, from a state dict.
    ///
    /// # Errors
    /// As [`init`](Self::init) and [`params::load_state`].
    pub fn from_params<F: Float>(
        &self,
        state: impl IntoIterator<Item = (impl AsRef<str>, ArrayD<F>)>,
    ) -> Result<Performer<F>> {
        let mut performer = Performer { config: self.clone(), map: FeatureMap::zeros(self)? };
        params::load_state(&mut performer, state)?;
        Ok(performer)
    }

    pub(super) fn validate(&self) -> Result<()> {
        let Self { head_dim, num_features, features, .. } = *self;
        for (field, size) in [("head_dim", head_dim), ("num_features", num_features)] {
            if size == 0 {
                return Err(Error::config(field, "at least 1", size));
            }
        }
        if !num_features.is_multiple_of(features.per_projection()) {
            let expected = "an even number, for features in pairs";
            return Err(Error::config("num_features", expected, num_features));
        }
        if features == Features::Elu && num_features != head_dim {
            let expected = format!("head_dim = {head_dim}, for one feature a column");
            return Err(Error::config("num_features", expected, num_features));
        }
        if let Features::Relu { epsilon } = features {
            // Its square, the least denominator, is a normal number of `f32`.
            check_size("features.epsilon", epsilon, 1e-15)?;
        }
        // And so are roots and products with it.
        self.scale.map_or(Ok(()), |scale| check_size("scale", scale, 1e-30))
    }
}

fn check_size(field: &'static str, value: f64, least: f64) -> Result<()> {
    if (least..=1e30).contains(&value) {
        return Ok(());
    }
    Err(Error::config(field, format!("a number from {least:e} to 1e30"), value))
}
