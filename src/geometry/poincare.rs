//! The Poincaré ball of curvature −c.
//!
//! Points are the vectors x with c|x|² < 1, and the metric at x is λ² times the Euclidean metric, where
//! λ = 2/(1 − c|x|²) is the [`conformal_factor`]. At c = 0 the ball is the whole space, λ = 2, and every
//! function is its Euclidean limit, with continuous value and gradient, including the derivative with
//! respect to c; only the Lorentz coordinates, which diverge, need c > 0.
//!
//! The module has functions on slices and their vector–Jacobian products, which all work the same way:
//! outputs are overwritten, gradients of the arguments are added to, and the derivative with respect to c
//! is returned.
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
//! # Accuracy
//!
//! Everything is computed in `f64`, also for `f32`, whose only rounding errors are those of arguments and
//! results. For `f64`:
//!
//! * 1 − c|x|², which matters most near the boundary, is computed from exact products and sums, so it is
//!   accurate to an ulp for the given point, up to the last `f64` inside the ball.
//! * Differences of points are computed first, never as differences of norms: x ⊕ y, for example, is
//!   written in terms of x + y. Distances are accurate to a relative error of about 10⁻¹⁵, even for
//!   points 10⁻³⁰⁰ apart.
//! * The remaining error is the condition of the problem: changing a coordinate by an ulp moves a point
//!   by ε/(1 − c|x|²), which no formula can avoid.
//!
//! A result that is a point is rounded to the nearest representable point. If that is on or outside the
//! boundary, the result is a point inside instead, either the nearest one or at most twice as far away.
//! So every output point is a valid input, even if the exact point is closer to the boundary than any
//! representable number. Gradients are those of the functions themselves, not of their rounding.
//! [`project`] keeps points away from the boundary by a margin and has a matching gradient. A NaN in the
//! arguments gives NaN, not an error.
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
