//! The Poincaré ball of curvature −c.
//!
//! Points are the vectors x with c|x|² < 1, and the metric at x is λ² times the Euclidean one, where
//! λ = 2/(1 − c|x|²) is the [`conformal_factor`]. At c = 0 the ball is all of space, λ = 2, and every
//! function here is its Euclidean limit, continuous in value and gradient, the derivative with
//! respect to c included; only the Lorentz coordinates, which run off to infinity, need c > 0.
//!
//! Functions on slices and their vector–Jacobian products, all of one form. Outputs are
//! overwritten; gradients of the arguments are added to; the derivative with respect to c is
//! returned.
//!
//! ```
//! use graph_attention::geometry::poincare::{distance, distance_vjp, exp_map, log_map};
//!
//! let (x, y, c) = ([0.1, 0.2], [-0.3, 0.4], 1.0_f64);
//! let d = distance(&x, &y, c)?;
//! let mut v = [0.0; 2];
//! log_map(&x, &y, c, &mut v)?;
//! let mut end = [0.0; 2];
//! exp_map(&x, &v, c, &mut end)?; // follows the geodesic from x to y
//! assert!((end[0] - y[0]).abs() < 1e-15 && (end[1] - y[1]).abs() < 1e-15);
//!
//! let (mut grad_x, mut grad_y) = ([0.0; 2], [0.0; 2]);
//! let grad_c = distance_vjp(&x, &y, c, 1.0, &mut grad_x, &mut grad_y)?;
//! assert!(d > 0.0 && grad_c > 0.0);
//! # Ok::<(), graph_attention::Error>(())
//! ```
//!
//! # ErrorEstimate
//!
//! Everything is computed in `f64`, for `f32` too, so that `f32` only knows the rounding of its
//! arguments and results. For `f64`:
//!
//! * 1 − c|x|², on which all depends near the boundary, is formed from exact products and sums and
//!   so is right to an ulp for the point as given, up to the last `f64` inside the ball.
//! * Differences of points are formed first and never as differences of norms: x ⊕ y, for one, is
//!   written in x + y. So distances are right to some 10⁻¹⁵ of themselves for points 10⁻³⁰⁰ apart.
//! * What remains is the condition of the problem: an ulp more in a coordinate moves a point by
//!   ε/(1 − c|x|²), and no formula can know better.
//!
//! A result that is a point is rounded to the nearest representable one. Where that lies on the
//! boundary or past it, the result is a point inside instead, of all the nearest or at most twice as
//! far. So every point that comes out can go in again, even if the true one lies nearer to the boundary
//! than any number can say. The gradients are those of the functions themselves, not of their rounding.
//! [`project`] keeps points away from the boundary by a margin, with a gradient that knows of it. A NaN
//! among the arguments makes NaN, not an error.
//!
//! # Sources
//!
//! A. A. Ungar, *A Gyrovector Space Approach to Hyperbolic Geometry*, 2009 (addition, gyration,
//! scalar multiplication, midpoints); Ganea, Bécigneul and Hofmann, *Hyperbolic Neural Networks*,
//! 2018, arXiv:1805.09112 (maps, transport, matrices, in this notation).

pub(crate) mod ball;
mod geodesic;
mod gyro;
mod maps;
mod metric;
mod midpoint;
mod models;
mod projection;
mod radial;
mod scaling;
mod transport;

pub use geodesic::{geodesic, geodesic_vjp};
pub use gyro::{mobius_add, mobius_add_vjp};
pub use maps::{
    exp_map, exp_map_origin, exp_map_origin_vjp, exp_map_vjp, log_map, log_map_origin,
    log_map_origin_vjp, log_map_vjp,
};
pub use metric::{conformal_factor, conformal_factor_vjp, distance, distance_vjp};
pub use midpoint::{midpoint, midpoint_vjp};
pub use models::{
    from_klein, from_klein_vjp, from_lorentz, from_lorentz_vjp, to_klein, to_klein_vjp, to_lorentz,
    to_lorentz_vjp,
};
pub use projection::{project, project_vjp};
pub use scaling::{mobius_mat_vec, mobius_mat_vec_vjp, mobius_scalar_mul, mobius_scalar_mul_vjp};
pub use transport::{gyration, gyration_vjp, parallel_transport, parallel_transport_vjp};
