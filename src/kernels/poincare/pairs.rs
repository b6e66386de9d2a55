//! The vectorised computations for each pair: the logit, and everything that depends on it in the
//! backward pass.

use super::{Mass, Radius};
use crate::kernels::Float;
use crate::kernels::primitives::asinh::asinh;
use crate::kernels::primitives::exp::exp;
use crate::kernels::primitives::matmul::Vector;
use fearless_simd::{Select, Simd, SimdBase, SimdFloat, SimdMask};

/// The number of fields of a [`Radius`] and of a [`Mass`].
pub(super) const RADIUS: usize = 5;
pub(super) const MASS: usize = 4;

impl<T: Copy> Radius<T> {
    #[inline(always)]
    pub(super) fn array(self) -> [T; RADIUS] {
        [self.expm1, self.half_inverse, self.half_sinh, self.root, self.half_cosh]
    }

    #[inline(always)]
    pub(super) fn of([expm1, half_inverse, half_sinh, root, half_cosh]: [T; RADIUS]) -> Self {
        Self { expm1, half_inverse, half_sinh, root, half_cosh }
    }

    #[inline(always)]
    fn form(self) -> [T; 2] {
        [self.expm1, self.half_inverse]
    }
}

impl<T: Copy> Mass<T> {
    #[inline(always)]
    pub(super) fn array(self) -> [T; MASS] {
        [self.expm1, self.half_inverse, self.sinh, self.cosh]
    }

    #[inline(always)]
    pub(super) fn of([expm1, half_inverse, sinh, cosh]: [T; MASS]) -> Self {
        Self { expm1, half_inverse, sinh, cosh }
    }
}

/// [sinh((R − R')/2), cosh((R − R')/2)] of two radii in the forms e^{R/2} − 1 and e^{−R/2}/2. The first,
/// (e^{R/2} − e^{R'/2})(e^{−R/2} + e^{−R'/2})/2, is as accurate for radii of 1e-300 as for radii of 30.
#[inline(always)]
fn radial<S: Simd, F: Float>(
    simd: S,
    [a, half_inverse_a]: [Vector<S, F>; 2],
    [b, half_inverse_b]: [Vector<S, F>; 2],
) -> [Vector<S, F>; 2] {
    let one = Vector::<S, F>::splat(simd, F::one());
    let sinh = (a - b) * (half_inverse_a + half_inverse_b);
    [sinh, (a + one).mul_add(half_inverse_b, (b + one) * half_inverse_a)]
}

/// [sinh(d/2), cosh(d/2)], from the squared distance of the directions.
#[inline(always)]
fn sinh_and_cosh<S: Simd, F: Float>(
    simd: S,
    squared: Vector<S, F>,
    query: Radius<Vector<S, F>>,
    key: Radius<Vector<S, F>>,
) -> [Vector<S, F>; 2] {
    let [radial, _] = radial::<S, F>(simd, query.form(), key.form());
    let square = squared.mul_add(query.half_sinh * key.half_sinh, radial * radial);
    [square.sqrt(), (square + Vector::<S, F>::splat(simd, F::one())).sqrt()]
}

/// factor · d/2, d in units of ln 2.
#[inline(always)]
pub(super) fn logit<S: Simd, F: Float>(
    simd: S,
    squared: Vector<S, F>,
    query: Radius<Vector<S, F>>,
    key: Radius<Vector<S, F>>,
    factor: Vector<S, F>,
) -> Vector<S, F> {
    let [sinh, cosh] = sinh_and_cosh::<S, F>(simd, squared, query, key);
    factor * asinh::<S, F>(simd, sinh, cosh)
}

/// The number of fields of a [`Terms`].
pub(super) const TERMS: usize = 7;

/// The terms of a query and head in the backward pass, besides its point.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<T> {
    /// The gradient of a weight is radial · sinh(Rⱼ − R) + sinh Rⱼ (w·uⱼ − spread |uⱼ − û|²), where R is
    /// the radius of the midpoint.
    pub(crate) radial: T,
    pub(crate) spread: T,
    /// e^{R/2} − 1 and e^{−R/2}/2.
    pub(crate) expm1: T,
    pub(crate) half_inverse: T,
    /// m and 1/l; +∞ and 0 if no key was seen, so that all weights e^{s − m} / l are 0.
    pub(crate) shift: T,
    pub(crate) inverse: T,
    /// The mean of the gradients of the weights.
    pub(crate) delta: T,
}

impl<F: Float> Terms<F> {
    /// The terms of an unused query.
    pub(crate) fn none() -> Self {
        let zero = F::zero();
        Self::of([zero, zero, zero, zero, F::infinity(), zero, zero])
    }
}

impl<T: Copy> Terms<T> {
    #[inline(always)]
    pub(super) fn array(self) -> [T; TERMS] {
        let Self { radial, spread, expm1, half_inverse, shift, inverse, delta } = self;
        [radial, spread, expm1, half_inverse, shift, inverse, delta]
    }

    #[inline(always)]
    pub(super) fn of(
        [radial, spread, expm1, half_inverse, shift, inverse, delta]: [T; TERMS],
    ) -> Self {
        Self { radial, spread, expm1, half_inverse, shift, inverse, delta }
    }
}

/// The terms of a vector of pairs.
pub(super) struct Pairs<V> {
    pub(super) query: Radius<V>,
    pub(super) key: Radius<V>,
    pub(super) mass: Mass<V>,
    pub(super) terms: Terms<V>,
    /// |u_q − u_k|².
    pub(super) squared: V,
    /// w·u_v and |u_v − û|².
    pub(super) product: V,
    pub(super) spread: V,
    /// Additive logits; −∞ hides a pair.
    pub(super) bias: V,
    /// The factors by which dropout multiplies the weights.
    pub(super) multiplier: V,
    /// The gradient of the logit of a pair that [dominates](PairGradients::dominates); 0 if it is not
    /// known yet.
    pub(super) dominant_logit: V,
}

/// The contributions of a vector of pairs to the gradients.
pub(super) struct PairGradients<V> {
    /// The weight after dropout.
    pub(super) weight: V,
    pub(super) logit: V,
    /// The gradient of u_q is Σⱼ direction · (sinh Rⱼ/2) uⱼ times sinh R_q/2, and the same for u_k.
    pub(super) direction: V,
    /// The gradients of the radii of query, key and value.
    pub(super) query: V,
    pub(super) key: V,
    pub(super) value: V,
    /// The gradient of −κ ln 2.
    pub(super) factor: V,
    /// The lanes with a pair that has most of the weight of its query: see [`super::dominant`].
    pub(super) dominates: u64,
}

/// Computes the weight of a pair and the gradients that follow from it; zeros for hidden pairs, whatever
/// they hold.
#[inline(always)]
pub(super) fn vjp<S: Simd, F: Float>(
    simd: S,
    pairs: &Pairs<Vector<S, F>>,
    kappa: F,
    factor: F,
    dominant: F,
) -> PairGradients<Vector<S, F>> {
    let Pairs { query, key, mass, terms, .. } = *pairs;
    let splat = |value: F| Vector::<S, F>::splat(simd, value);
    let (zero, lowest, highest) =
        (splat(F::zero()), splat(F::neg_infinity()), splat(F::infinity()));
    let [sinh, cosh] = sinh_and_cosh::<S, F>(simd, pairs.squared, query, key);
    let distance = asinh::<S, F>(simd, sinh, cosh);

    // p = e^{s − m} / l, masked by the logit itself: −∞ minus a NaN shift is no longer −∞. The logit is
    // bitwise identical to the forward pass: if it is large, a different rounding would change the
    // weight.
    let logit = splat(factor) * distance + pairs.bias;
    let logit = pairs.bias.simd_eq(lowest).select(lowest, logit);
    let logit = terms.shift.simd_eq(highest).select(lowest, logit);
    let is_hidden = logit.simd_eq(lowest);
    let weight = exp::<S, F>(simd, logit - terms.shift) * terms.inverse;
    let weight = is_hidden.select(zero, weight);
    let kept = weight * pairs.multiplier;

    // The gradients of the weight and of the value's radius.
    let tangential = pairs.product - terms.spread * pairs.spread;
    // sinh and cosh of Rⱼ − R, from those of half of it.
    let from_mean = [terms.expm1, terms.half_inverse];
    let [half_sinh, half_cosh] = radial::<S, F>(simd, [mass.expm1, mass.half_inverse], from_mean);
    let twice = half_sinh + half_sinh;
    let (sinh, cosh_1) = (twice * half_cosh, twice * half_sinh);
    let along = terms.radial * sinh;
    let grad_weight = mass.sinh.mul_add(tangential, along);
    let grad_logit = is_hidden.select(zero, kept * grad_weight - weight * terms.delta);
    let dominates = weight.simd_gt(splat(dominant));
    let grad_logit = dominates.select(pairs.dominant_logit, grad_logit);
    let along = terms.radial.mul_add(cosh_1, terms.radial);
    let grad_value = is_hidden.select(zero, kept * mass.cosh.mul_add(tangential, along));

    // s = −κ asinh(x), x² = radial² + tangential²: ds = −κ / (2 x cosh) dx². Without squares, which would
    // be 0 for pairs closer than 1e-19 in f32; d has no derivative if the points are the same.
    let [radial, radial_cosh] = radial::<S, F>(simd, query.form(), key.form());
    let across = pairs.squared.sqrt() * query.root * key.root;
    let (a, b) = (radial.abs(), across.abs());
    let is_larger = a.simd_gt(b);
    let (large, small) = (is_larger.select(a, b), is_larger.select(b, a));
    let is_same = large.simd_lt(splat(F::min_positive_value() / F::epsilon()));
    let large = is_same.select(splat(F::one()), large);
    let ratio = small / large;
    let sinh = large * (ratio * ratio + splat(F::one())).sqrt();
    let coefficient = splat(-kappa / F::from_f64(2.0)) * grad_logit / (sinh * cosh);
    let coefficient = is_hidden.select(zero, is_same.select(zero, coefficient));

    // dx²/dR_q = sinh((R_q − R_k)/2) cosh((R_q − R_k)/2) + |u_q − u_k|² (cosh R_q/2) (sinh R_k/2).
    let radial = radial * radial_cosh;
    let grad_query = (pairs.squared * query.half_cosh).mul_add(key.half_sinh, radial);
    let grad_key = (pairs.squared * key.half_cosh).mul_add(query.half_sinh, -radial);
    PairGradients {
        weight: kept,
        logit: grad_logit,
        direction: coefficient * splat(F::from_f64(-2.0)),
        query: is_hidden.select(zero, coefficient * grad_query),
        key: is_hidden.select(zero, coefficient * grad_key),
        value: grad_value,
        factor: is_hidden.select(zero, distance * grad_logit),
        dominates: dominates.to_bitmask(),
    }
}
