//! The configuration.

use super::Poincare;
use crate::error::{Error, Result};
use crate::kernels::Float;
use ndarray::Array0;

/// The coordinates of input and output points.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Coordinates {
    /// Points of the ball, with norm less than 1/√c. Floating-point numbers near 1 are coarse, so points
    /// can be at most 17/√c from the origin in `f32` and 37/√c in `f64`.
    Ball,
    /// Tangent vectors v at the origin: the point is exp₀(v), at distance 2|v| from the origin. Every
    /// finite vector is a point, so no vector is refused, even if c grows.
    ///
    /// Points can be up to 350/√c from the origin. Beyond that, where exponentials would overflow, a
    /// vector represents the point at 350/√c in its direction, so all longer vectors in one direction are
    /// the same point. Its gradient then has no component along the vector, and the gradient of c keeps
    /// its distance fixed in units of 1/√c. For [`Aggregation::TangentAtQuery`] and
    /// [`Aggregation::FrechetMean`] the bound is 36/√c.
    ///
    /// In `f32`, inputs with a query or key farther than 40/√c from the origin, or with a value farther
    /// than 8/√c if midpoints are computed, are processed in `f64`, which takes two to three times as
    /// long. This also applies to [`Ball`](Self::Ball).
    Tangent,
}

/// The mean that combines the weighted points of a query into one.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Aggregation {
    /// The weighted gyromidpoint ½ ⊗ (Σ p λ v / Σ p (λ − 1)): the Einstein midpoint in Klein's model,
    /// the centroid in Lorentz's.
    Midpoint,
    /// The mean in the tangent space at the origin, exp₀(Σ p log₀ v). Not invariant under
    /// translations of the ball.
    TangentAtOrigin,
    /// The mean in the tangent space at the query, exp_q(Σ p log_q v). Values must have as many columns
    /// as queries. Computed pair by pair on one thread, in ball coordinates in `f64`, for distances from
    /// the origin up to 36/√c. A mean farther out becomes the last point of the ball in its direction.
    TangentAtQuery,
    /// The Fréchet mean, the point that minimises Σ p d². Computed by Newton's method to the last digits
    /// of `f64`, in at most a hundred steps; its gradient is the gradient of the exact mean. Every step
    /// takes as long as [`TangentAtQuery`](Self::TangentAtQuery), with the same bounds.
    FrechetMean,
}

impl Aggregation {
    /// Whether it is computed pair by pair.
    pub(super) fn is_plain(self) -> bool {
        matches!(self, Self::TangentAtQuery | Self::FrechetMean)
    }
}

/// The options of a [`Poincare`], which [`init`](Self::init) builds.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct PoincareConfig {
    pub(super) curvature: f64,
    pub(super) temperature: f64,
    pub(super) learn_curvature: bool,
    pub(super) learn_temperature: bool,
    pub(super) coordinates: Coordinates,
    pub(super) aggregation: Aggregation,
}

impl Default for PoincareConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl PoincareConfig {
    /// Creates a configuration with the ball of radius 1 (c = 1), τ = 1, both fixed, ball coordinates and
    /// the midpoint.
    #[must_use]
    pub fn new() -> Self {
        Self {
            curvature: 1.0,
            temperature: 1.0,
            learn_curvature: false,
            learn_temperature: false,
            coordinates: Coordinates::Ball,
            aggregation: Aggregation::Midpoint,
        }
    }

    /// Sets c > 0, minus the curvature: the ball has the radius 1/√c. As c goes to 0, the space becomes
    /// flat, with the distance 2|x − y|. Default: 1.
    #[must_use]
    pub fn curvature(mut self, c: f64) -> Self {
        self.curvature = c;
        self
    }

    /// Sets the temperature τ > 0, which divides the distances: smaller values make the weights sharper.
    /// Default: 1.
    #[must_use]
    pub fn temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// Sets whether c is learned. Use it with [`Coordinates::Tangent`], in which every vector is a point: as c
    /// grows the ball shrinks, and points of [`Coordinates::Ball`] end up outside, which is an error. The
    /// parameter is `raw_curvature`, and c = softplus(`raw_curvature`) stays positive. Default: `false`.
    #[must_use]
    pub fn learn_curvature(mut self, learn: bool) -> Self {
        self.learn_curvature = learn;
        self
    }

    /// Sets whether τ is learned: the parameter is `raw_temperature`, and τ =
    /// softplus(`raw_temperature`). Default: `false`.
    #[must_use]
    pub fn learn_temperature(mut self, learn: bool) -> Self {
        self.learn_temperature = learn;
        self
    }

    /// Sets the coordinates of queries, keys, values and outputs. Default: [`Coordinates::Ball`].
    #[must_use]
    pub fn coordinates(mut self, coordinates: Coordinates) -> Self {
        self.coordinates = coordinates;
        self
    }

    /// Sets the mean of the weighted points. Default: [`Aggregation::Midpoint`].
    #[must_use]
    pub fn aggregation(mut self, aggregation: Aggregation) -> Self {
        self.aggregation = aggregation;
        self
    }

    /// Builds the mechanism.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if c or τ is not between 10⁻³⁰ and 10³⁰.
    pub fn init<F: Float>(&self) -> Result<Poincare<F>> {
        check_range("curvature", self.curvature, None::<F>)?;
        check_range("temperature", self.temperature, None::<F>)?;
        // softplus⁻¹(y) = y + ln(1 − e^{−y})
        let raw = |value: f64| F::from_f64(value + (-(-value).exp_m1()).ln());
        let learned = |learn: bool, value| learn.then(|| Array0::from_elem((), raw(value)));
        Ok(Poincare {
            config: self.clone(),
            raw_curvature: learned(self.learn_curvature, self.curvature),
            raw_temperature: learned(self.learn_temperature, self.temperature),
        })
    }
}

/// Checks that c or τ is usable: its root and inverse must neither underflow nor overflow. If it is
/// learned, it is the softplus of `raw`.
pub(super) fn check_range<F: Float>(field: &'static str, value: f64, raw: Option<F>) -> Result<()> {
    if value > 1e-30 && value < 1e30 {
        return Ok(());
    }
    let actual = match raw {
        Some(raw) => format!("{value:?}, the softplus of raw_{field} = {raw:?}"),
        None => format!("{value:?}"),
    };
    Err(Error::config(field, "a number above 1e-30 and below 1e30", actual))
}

/// The largest √c d(0, x) for which points are exact in `f64`: squares of its hyperbolic sine must not
/// overflow. Vectors farther out in tangent coordinates are moved to this radius.
pub(super) fn largest_radius(aggregation: Aggregation) -> f64 {
    // In ball coordinates, `f64` points farther out round to the boundary.
    if aggregation.is_plain() { 36.0 } else { 350.0 }
}

/// The largest radii of queries and keys, and of values, for which a type can be used.
pub(super) fn radii_within<F: Float>(aggregation: Aggregation) -> [f64; 2] {
    if F::max_value().as_f64() > 1e300 {
        return [f64::INFINITY; 2];
    }
    // The gradient of a value has a rounding error of e^{2R} ε if a midpoint is close to it.
    [40.0, if aggregation == Aggregation::Midpoint { 8.0 } else { 40.0 }]
}
