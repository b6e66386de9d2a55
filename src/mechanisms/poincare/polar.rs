//! Points of the ball as a direction and a radius. In this form distances do not suffer from
//! cancellation, neither small ones nor those far from the origin.

use super::Coordinates;
use crate::element::{all_finite, try_vec, try_zeros};
use crate::error::{Error, Result};
use crate::geometry::poincare::ball::{norm_of, one_minus_c_norm2};
use crate::inputs::head_columns;
use crate::kernels::Float;
use crate::kernels::poincare::{Mass, Radius};
use crate::kernels::problem::Rows;
use ndarray::{Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2};

/// A ball and its coordinates.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space {
    /// Minus the curvature.
    pub(super) c: f64,
    pub(super) coordinates: Coordinates,
    /// Tangent vectors with a larger radius represent the point at this radius.
    pub(super) largest_radius: f64,
}

/// The radius R = √c d(0, x) of a point in the required forms, computed from its norm.
#[derive(Clone, Copy, Debug)]
struct Node {
    norm: f64,
    /// e^{R/2} − 1.
    expm1: f64,
    /// 1 − c|x|² of a point in ball coordinates.
    gap: f64,
}

impl Node {
    fn radius(self) -> f64 {
        2.0 * self.expm1.ln_1p()
    }

    fn half_sinh_and_cosh(self) -> [f64; 2] {
        let exp = 1.0 + self.expm1;
        // sinh(R/2) and cosh(R/2).
        let sinh = 0.5 * self.expm1 * (2.0 + self.expm1) / exp;
        let cosh = 0.5 * (exp + exp.recip());
        [sinh * cosh, 0.5 + sinh * sinh]
    }

    fn for_logits<F: Float>(self) -> Radius<F> {
        let [half_sinh, half_cosh] = self.half_sinh_and_cosh();
        Radius {
            expm1: F::from_f64(self.expm1),
            half_inverse: F::from_f64(0.5 / (1.0 + self.expm1)),
            half_sinh: F::from_f64(half_sinh),
            root: F::from_f64(half_sinh.sqrt()),
            half_cosh: F::from_f64(half_cosh),
        }
    }

    fn for_sums<F: Float>(self) -> Mass<F> {
        let [half_sinh, half_cosh] = self.half_sinh_and_cosh();
        Mass {
            expm1: F::from_f64(self.expm1),
            half_inverse: F::from_f64(0.5 / (1.0 + self.expm1)),
            sinh: F::from_f64(2.0 * half_sinh),
            cosh: F::from_f64(2.0 * half_cosh),
        }
    }
}

/// All points of an array, in the form that the mechanism needs.
pub(super) struct Polar<F> {
    nodes: Vec<Node>,
    /// rows × heads · dim; 0 for the origin, NaN if a point is not finite.
    pub(super) directions: Array2<F>,
    heads: usize,
}

impl Space {
    /// Converts rows of `heads` points each.
    pub(super) fn polar<F: Float>(
        &self,
        what: &'static str,
        points: ArrayView2<'_, F>,
        heads: usize,
    ) -> Result<Polar<F>> {
        let (rows, columns) = points.dim();
        let points = Rows::new(what, points)?;
        let dim = columns / heads;
        let mut directions = try_zeros(what, rows, columns)?;
        let nan = Node { norm: f64::NAN, expm1: f64::NAN, gap: f64::NAN };
        let mut nodes = try_vec(what, &[rows, heads], nan)?;
        let all = directions.as_slice_mut().expect("a matrix of our own");
        for (at, node) in nodes.iter_mut().enumerate() {
            let (row, head) = (at / heads, at % heads);
            let x = &points.row(row)[head_columns(head, dim)];
            let direction = &mut all[row * columns..][head_columns(head, dim)];
            let mut norm = norm_of(x);
            let mut inverse = norm.recip();
            if norm.is_infinite() && all_finite(x) {
                // For vectors whose norm overflows.
                let quarter =
                    norm_of(&x.iter().map(|&x| x * F::from_f64(0.25)).collect::<Vec<_>>());
                (norm, inverse) = (f64::MAX, 0.25 / quarter);
            }
            if !norm.is_finite() {
                direction.fill(F::nan());
                continue;
            }
            *node = self.node(what, row, x, norm)?;
            for (direction, x) in direction.iter_mut().zip(x) {
                *direction = match norm {
                    0.0 => F::zero(),
                    _ if inverse.is_finite() => F::from_f64(x.as_f64() * inverse),
                    _ => F::from_f64(x.as_f64() / norm),
                };
            }
        }
        Ok(Polar { nodes, directions, heads })
    }

    fn node<F: Float>(&self, what: &'static str, row: usize, x: &[F], norm: f64) -> Result<Node> {
        let root = self.c.sqrt();
        match self.coordinates {
            Coordinates::Ball => {
                let gap = one_minus_c_norm2(self.c, x.len(), |i| x[i].as_f64());
                if gap <= 0.0 {
                    let limit = root.recip();
                    return Err(Error::Domain { what: what.into(), row, norm, limit });
                }
                // e^{R/2} = (1 + √c|x|)/√gap, minus 1 without cancellation.
                let rho = root * norm;
                let expm1 = (rho + rho * rho / (1.0 + gap.sqrt())) / gap.sqrt();
                Ok(Node { norm, expm1, gap })
            }
            Coordinates::Tangent => {
                let half = (root * norm).min(0.5 * self.largest_radius);
                Ok(Node { norm, expm1: half.exp_m1(), gap: f64::NAN })
            }
        }
    }

    /// Whether a tangent vector of this norm represents a shorter one.
    fn is_past_the_largest(&self, norm: f64) -> bool {
        self.c.sqrt() * norm > 0.5 * self.largest_radius
    }

    /// Replaces a tangent vector by the one that it represents; returns the factor between them if they
    /// differ.
    pub(super) fn shorten(&self, tangent: &mut [f64]) -> Option<f64> {
        let norm = norm_of(tangent);
        if !self.is_past_the_largest(norm) || !all_finite(tangent) {
            return None;
        }
        let largest = 0.5 * self.largest_radius / self.c.sqrt();
        let factor = if norm.is_finite() {
            largest / norm
        } else {
            let quarter: Vec<f64> = tangent.iter().map(|x| 0.25 * x).collect();
            0.25 * largest / norm_of(&quarter)
        };
        tangent.iter_mut().for_each(|x| *x *= factor);
        Some(factor)
    }

    /// [dR/d|x|, dR/dc, R/|x|, (sinh R / 2)/|x|].
    fn derivatives(&self, node: Node) -> [f64; 4] {
        let root = self.c.sqrt();
        let radius = node.radius();
        match self.coordinates {
            Coordinates::Ball => {
                let slope = if node.norm == 0.0 { 2.0 * root } else { radius / node.norm };
                let by_c = node.norm / (root * node.gap);
                [2.0 * root / node.gap, by_c, slope, root / node.gap]
            }
            Coordinates::Tangent => {
                let [half_sinh, _] = node.half_sinh_and_cosh();
                if self.is_past_the_largest(node.norm) {
                    return [0.0, 0.0, radius / node.norm, half_sinh / node.norm];
                }
                let slope = if node.norm == 0.0 { root } else { half_sinh / node.norm };
                [2.0 * root, radius / (2.0 * self.c), 2.0 * root, slope]
            }
        }
    }

    /// Adds the gradient of the points and returns the gradient of c, given the gradients of their
    /// directions (up to a factor) and radii.
    pub(super) fn vjp<F: Float>(
        &self,
        polar: &Polar<F>,
        [grad_directions, grad_radii]: &[Array2<F>; 2],
        factor: DirectionFactor,
        mut grad: Option<ArrayViewMut2<'_, F>>,
    ) -> f64 {
        let dim = polar.directions.ncols() / polar.heads;
        let mut grad_c = 0.0;
        let directions = polar.directions.as_slice().expect("a matrix of our own");
        let all_grads = grad_directions.as_slice().expect("a matrix of our own");
        for (at, node) in polar.nodes.iter().enumerate() {
            let (row, head) = (at / polar.heads, at % polar.heads);
            let columns = head_columns(at, dim);
            let (u, h) = (&directions[columns.clone()], &all_grads[columns]);
            let grad_radius = grad_radii[[row, head]].as_f64();
            let mut sink = grad.as_mut().map(|grad| {
                let (_, of_row) = grad.view_mut().split_at(ndarray::Axis(0), row);
                of_row.index_axis_move(ndarray::Axis(0), 0)
            });
            let mut add = |c: usize, value: f64| {
                if let Some(sink) = &mut sink {
                    let sink: &mut ArrayViewMut1<'_, F> = sink;
                    sink[head * dim + c] += F::from_f64(value);
                }
            };
            if node.norm.is_nan() {
                // No query saw it, or its gradient is NaN like the point.
                if grad_radius != 0.0 || h.iter().any(|&h| h != F::zero()) {
                    (0..dim).for_each(|c| add(c, f64::NAN));
                    grad_c = f64::NAN;
                }
                continue;
            }
            let [by_norm, by_c, ratio, half_sinh_ratio] = self.derivatives(*node);
            let along: f64 = u.iter().zip(h).map(|(u, h)| u.as_f64() * h.as_f64()).sum();
            // u is a unit vector except for rounding, and at the origin there is no u.
            let square: f64 = u.iter().map(|u| u.as_f64().powi(2)).sum();
            let along = if square == 0.0 { 0.0 } else { along / square };
            let (across, radial) = match factor {
                DirectionFactor::HalfSinh => (half_sinh_ratio, grad_radius),
                DirectionFactor::Sinh => (2.0 * half_sinh_ratio, grad_radius),
                DirectionFactor::Radius => (ratio, along * square),
            };
            grad_c += radial * by_c;
            for (c, (u, h)) in u.iter().zip(h).enumerate() {
                let (u, h) = (u.as_f64(), h.as_f64());
                add(c, across * (h - along * u) + radial * by_norm * u);
            }
        }
        grad_c
    }
}

/// The factors that are missing from the gradients of directions: sinh R / 2, sinh R, or R, including the
/// gradient of R.
#[derive(Clone, Copy, Debug)]
pub(super) enum DirectionFactor {
    HalfSinh,
    Sinh,
    Radius,
}

impl<F: Float> Polar<F> {
    /// Whether no point is farther from the origin than `radius`.
    pub(super) fn is_within(&self, radius: f64) -> bool {
        let largest = (0.5 * radius).exp_m1();
        self.nodes.iter().all(|node| node.norm.is_nan() || node.expm1 <= largest)
    }

    pub(super) fn for_logits(&self) -> Vec<Radius<F>> {
        self.nodes.iter().map(|node| node.for_logits()).collect()
    }

    /// Returns the masses for the sums, with zeros for points that are not finite.
    pub(super) fn for_sums(&self) -> Vec<Mass<F>> {
        let zero = F::zero();
        let none = Mass { expm1: zero, half_inverse: zero, sinh: zero, cosh: zero };
        let mass = |node: &Node| if node.norm.is_nan() { none } else { node.for_sums() };
        self.nodes.iter().map(mass).collect()
    }

    /// Returns the vectors that are summed in the tangent space at the origin: R u.
    pub(super) fn tangents(&self) -> Result<Array2<F>> {
        self.scaled(|node| node.radius())
    }

    /// Returns the directions, each times its factor.
    fn scaled(&self, factor: impl Fn(&Node) -> f64) -> Result<Array2<F>> {
        let mut scaled = try_zeros("points", self.directions.nrows(), self.directions.ncols())?;
        let dim = self.directions.ncols() / self.heads;
        let rows = (scaled.as_slice_mut().expect("a matrix of our own")).chunks_mut(dim.max(1));
        let directions = self.directions.as_slice().expect("a matrix of our own");
        let directions = directions.chunks(dim.max(1));
        for ((scaled, direction), node) in rows.zip(directions).zip(&self.nodes) {
            let factor = factor(node);
            for (scaled, u) in scaled.iter_mut().zip(direction) {
                *scaled = F::from_f64(factor * u.as_f64());
            }
        }
        Ok(scaled)
    }

    /// Returns sinh R u / 2, with zeros for points that are not finite.
    pub(super) fn half_sinh_directions(&self) -> Result<Rows<'static, F>> {
        let mut rows = self.scaled(|node| node.half_sinh_and_cosh()[0])?;
        zero_nan(&mut rows);
        Ok(Rows::from(rows))
    }

    /// Returns \[sinh R u, sinh R, e^{−R}\] for each head.
    pub(super) fn sums(&self) -> Result<Array2<F>> {
        let (rows, heads) = (self.directions.nrows(), self.heads);
        let dim = self.directions.ncols() / heads;
        let mut sums = try_zeros("points", rows, heads * (dim + 2))?;
        let all = sums.as_slice_mut().expect("a matrix of our own").chunks_exact_mut(dim + 2);
        let directions = self.directions.as_slice().expect("a matrix of our own");
        for (at, (sums, node)) in all.zip(&self.nodes).enumerate() {
            let [half_sinh, _] = node.half_sinh_and_cosh();
            let sinh = F::from_f64(2.0 * half_sinh);
            for (sum, &u) in sums.iter_mut().zip(&directions[head_columns(at, dim)]) {
                *sum = sinh * u;
            }
            sums[dim] = sinh;
            sums[dim + 1] = F::from_f64((1.0 + node.expm1).powi(-2));
        }
        Ok(sums)
    }

    /// Returns the directions, with zeros for points that are not finite.
    pub(super) fn finite_directions(&self) -> Result<Rows<'_, F>> {
        if self.nodes.iter().all(|node| node.norm.is_finite()) {
            return Rows::new("value", self.directions.view());
        }
        let mut directions = self.directions.clone();
        zero_nan(&mut directions);
        Ok(Rows::from(directions))
    }
}

/// Replaces NaN by zeros.
pub(super) fn zero_nan<F: Float>(array: &mut Array2<F>) {
    array.iter_mut().filter(|entry| entry.is_nan()).for_each(|entry| *entry = F::zero());
}
