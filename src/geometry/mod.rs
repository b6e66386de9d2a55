//! Spaces of constant curvature, as pure functions with their vector–Jacobian products.

pub mod poincare;
