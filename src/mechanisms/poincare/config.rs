//! Options.

use super::Poincare;
use crate::error::{Error, Result};
use crate::float::Float;
use ndarray::Array0;

/// The coordinates of points, in and out.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Coordinates {
    /// Points of the ball, of norm less than 1/√c. Numbers near 1 are coarse: `f32` reaches distances
    /// of 17/√c from the origin, `f64` of 37/√c.
    Ball,
    /// Tangent vectors v at the origin: the point is exp₀(v), 2|v| from the origin. Every finite vector
    /// is a point, so that c may grow and no vector is refused.
    ///
    /// Distances reach to 350/√c from the origin. Farther out, where their exponentials would overflow, a
    /// vector stands for the point at 350/√c in its direction: longer vectors of one direction are one
    /// point. Then its gradient has no part along the vector, and the gradient of c holds its distance
    /// fixed in units of 1/√c. [`Aggregation::TangentAtQuery`] and [`Aggregation::FrechetMean`] do the same
    /// from 36/√c on.
    ///
    /// In `f32`, inputs with a query or key farther than 40/√c from the origin, or a value whose midpoints
    /// are wanted farther than 8/√c, are computed in `f64`, in two to three times the time: so in
    /// [`Ball`](Self::Ball) too.
    Tangent,
}

/// How the weighted points of a query become one.
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
    /// The mean in the tangent space at the query, exp_q(Σ p log_q v). Values have the size of
    /// queries. Pair by pair on one thread, and in the coordinates of the ball in `f64`: distances from
    /// the origin up to 36/√c. A mean farther out is the last point of the ball in its direction.
    TangentAtQuery,
    /// The Fréchet mean, the point with the least Σ p d². By Newton's method to the last places of
    /// `f64`, or a hundred steps; its gradient is that of the exact mean. Every step takes the time of
    /// [`TangentAtQuery`](Self::TangentAtQuery); it has the same bounds.
    FrechetMean,
}

impl Aggregation {
    /// Whether it is formed pair by pair.
    pub(super) fn is_plain(self) -> bool {
        matches!(self, Self::TangentAtQuery | Self::FrechetMean)
    }
}

/// The options of a [`Poincare`], which [`init`](Self::init) makes.
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
    /// The ball of radius 1 (c = 1) in its own coordinates, τ = 1, both fixed, and the midpoint.
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

    /// c > 0, minus the curvature: the ball has the radius 1/√c. As c goes to 0 it becomes flat space, with
    /// 2|x − y| for a distance. Default: 1.
    #[must_use]
    pub fn curvature(mut self, c: f64) -> Self {
        self.curvature = c;
        self
    }

    /// τ > 0, which the distances are divided by: the smaller, the sharper. Default: 1.
    #[must_use]
    pub fn temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// Whether c is learned: the parameter is `raw_curvature`, and c = softplus(`raw_curvature`), so that it
    /// stays positive. As c grows the ball shrinks, and points may be left outside; so learn it with
    /// [`Coordinates::Tangent`], in which every vector is a point. Default: `false`.
    #[must_use]
    pub fn learn_curvature(mut self, learn: bool) -> Self {
        self.learn_curvature = learn;
        self
    }

    /// Whether τ is learned: the parameter is `raw_temperature`, and τ = softplus(`raw_temperature`).
    /// Default: `false`.
    #[must_use]
    pub fn learn_temperature(mut self, learn: bool) -> Self {
        self.learn_temperature = learn;
        self
    }

    /// The coordinates of queries, keys, values and outputs. Default: those of the ball.
    #[must_use]
    pub fn coordinates(mut self, coordinates: Coordinates) -> Self {
        self.coordinates = coordinates;
        self
    }

    /// How the weighted points become one. Default: the midpoint.
    #[must_use]
    pub fn aggregation(mut self, aggregation: Aggregation) -> Self {
        self.aggregation = aggregation;
        self
    }

    /// The mechanism.
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

/// `Ok` for a usable c or τ: one whose root and inverse neither under- nor overflow. `raw` is what it is
/// the softplus of, if it is learned.
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

/// √c d(0, x) up to which points are exact in `f64`: squares of its hyperbolic sine must not overflow.
/// Vectors that lie farther out in tangent coordinates are moved here.
pub(super) fn largest_radius(aggregation: Aggregation) -> f64 {
    // In the coordinates of the ball, points of `f64` round to the boundary farther out.
    if aggregation.is_plain() { 36.0 } else { 350.0 }
}

/// The radii of queries and keys, and of values, up to which a type can compute.
pub(super) fn radii_within<F: Float>(aggregation: Aggregation) -> [f64; 2] {
    if F::max_value().as_f64() > 1e300 {
        return [f64::INFINITY; 2];
    }
    // The gradient of a value is rounded by e^{2R} ε where a midpoint is near to it.
    [40.0, if aggregation == Aggregation::Midpoint { 8.0 } else { 40.0 }]
}
