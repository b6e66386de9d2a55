//! Spaces of constant curvature: pure functions and their vector–Jacobian products.

pub mod poincare;
