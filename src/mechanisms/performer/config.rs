//! The configuration.

use super::Performer;
use super::map::FeatureMap;
use crate::error::{Error, Result};
use crate::kernels::Float;
use crate::params;
use ndarray::ArrayD;
use rand::Rng;

/// The feature map φ of a [`Performer`], whose products φ(q)·φ(k) approximate e^{q·k}; w are the rows of
/// the projection.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub enum Features {
    /// φ(x) = m^{−½} e^{w·x − |x|²/2} (FAVOR+): positive, so weights are positive too.
    Positive,
    /// Positive features with both ±w of m/2 projections; never worse than [`Positive`](Self::Positive).
    Hyperbolic,
    /// φ(x) = (m/2)^{−½} e^{|x|²/2} (cos w·x, sin w·x), of Rahimi & Recht 2007: a baseline for
    /// comparison. It is accurate if q is close to k, but weights may be negative and their sum close to
    /// zero, so outputs may be arbitrarily large.
    Trigonometric,
    /// φ(x) = m^{−½} (max(w·x, 0) + ε): a different kernel, not an estimate of the softmax.
    Relu {
        /// ε > 0, which keeps denominators away from zero; 10⁻³ in the authors' code.
        epsilon: f64,
    },
    /// φ(x) = elu(x) + 1 for each column, without a projection or a scale (Katharopoulos et al. 2020,
    /// 2006.16236): a different kernel, with one feature for each column of a head.
    Elu,
}

impl Features {
    /// Returns how many features share a projection.
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

/// How the rows of a projection, each distributed like a normal vector, are drawn.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Projection {
    /// Blocks of orthogonal rows, which are uniformly distributed rotations, scaled to the lengths of
    /// normal vectors (χ distributed). Estimates are still unbiased and have a smaller error.
    Orthogonal,
    /// Independent rows.
    Iid,
}

/// The sizes and options of a [`Performer`]. Build one with a random projection with
/// [`init`](Self::init), or with a given projection with [`from_params`](Self::from_params).
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
    /// Creates a configuration for heads of `head_dim` columns with `num_features` positive features, an
    /// orthogonal projection and the scale 1/√head_dim.
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

    /// Sets the kind of features. Default: [`Features::Positive`].
    #[must_use]
    pub fn features(mut self, features: Features) -> Self {
        self.features = features;
        self
    }

    /// Sets how the projection is drawn. Default: [`Projection::Orthogonal`].
    #[must_use]
    pub fn projection(mut self, projection: Projection) -> Self {
        self.projection = projection;
        self
    }

    /// Sets the scale of the dot products, a positive number. Default: 1/√head_dim. [`Features::Elu`] has
    /// no scale.
    #[must_use]
    pub fn scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Sets whether the projection is a parameter, which is trained, or a buffer, which is only saved and
    /// loaded. Features estimate the softmax only with an unchanged random projection; training and
    /// weight decay change it. Default: `false`, a buffer, as in performer-pytorch.
    #[must_use]
    pub fn learn_projection(mut self, learn: bool) -> Self {
        self.learn_projection = learn;
        self
    }

    /// Builds a `Performer` with a projection drawn from `rng`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a size is 0, if the number of features is odd for features that come
    /// in pairs, or not `head_dim` for [`Features::Elu`], or if the scale is not between 10⁻³⁰ and 10³⁰
    /// or ε not between 10⁻¹⁵ and 10³⁰; [`Error::TooLarge`].
    pub fn init<F: Float>(&self, rng: &mut impl Rng) -> Result<Performer<F>> {
        Ok(Performer { config: self.clone(), map: FeatureMap::draw(self, rng)? })
    }

    /// Builds a `Performer` with a given `projection_matrix`, projections × head_dim, from a state dict.
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
            let expected = "an even number, because these features come in pairs";
            return Err(Error::config("num_features", expected, num_features));
        }
        if features == Features::Elu && num_features != head_dim {
            let expected = format!("head_dim = {head_dim}, one feature per column");
            return Err(Error::config("num_features", expected, num_features));
        }
        if let Features::Relu { epsilon } = features {
            // Its square, the smallest denominator, is a normal `f32`.
            check_size("features.epsilon", epsilon, 1e-15)?;
        }
        // Roots and products with it are normal too.
        self.scale.map_or(Ok(()), |scale| check_size("scale", scale, 1e-30))
    }
}

fn check_size(field: &'static str, value: f64, least: f64) -> Result<()> {
    if (least..=1e30).contains(&value) {
        return Ok(());
    }
    Err(Error::config(field, format!("a number from {least:e} to 1e30"), value))
}
