//! The Poincaré ball of curvature −c.
