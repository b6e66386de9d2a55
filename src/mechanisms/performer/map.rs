//! The feature map φ and its projection.

use super::config::{Features, PerformerConfig, Projection};
use crate::element::try_zeros;
use crate::error::{Result, check_shape};
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::kernels::performer::{FeatureProblem, Map};
use crate::kernels::problem::Rows;
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewD, ArrayViewMut1, ArrayViewMutD};
use rand::Rng;
use rand_distr::{Distribution, StandardNormal};
use std::f64::consts::LOG2_E;

/// A feature map φ for heads of one size.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct FeatureMap<F> {
    pub(super) features: Features,
    pub(super) head_dim: usize,
    pub(super) num_features: usize,
    pub(super) scale: f64,
    /// Projections × head_dim; none for [`Features::Elu`].
    pub(super) projection: Option<Array2<F>>,
}

impl<F: Float> FeatureMap<F> {
    /// Creates a map with a projection of zeros.
    pub(super) fn zeros(config: &PerformerConfig) -> Result<Self> {
        config.validate()?;
        let PerformerConfig { head_dim, num_features, features, scale, .. } = *config;
        let rows = num_features / features.per_projection();
        let projection = match features {
            Features::Elu => None,
            _ => Some(try_zeros("projection_matrix", rows, head_dim)?),
        };
        let scale = scale.unwrap_or(1.0 / (head_dim as f64).sqrt());
        Ok(Self { features, head_dim, num_features, scale, projection })
    }

    pub(super) fn draw(config: &PerformerConfig, rng: &mut impl Rng) -> Result<Self> {
        let mut map = Self::zeros(config)?;
        if let Some(projection) = &mut map.projection {
            draw(config.projection, projection, rng);
        }
        Ok(map)
    }

    /// Visits the projection by its name, if there is one.
    pub(super) fn visit<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        if let Some(projection) = &self.projection {
            visitor("projection_matrix", projection.view().into_dyn());
        }
    }

    /// Visits the projection for writing.
    pub(super) fn visit_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        if let Some(projection) = &mut self.projection {
            visitor("projection_matrix", projection.view_mut().into_dyn());
        }
    }

    /// Returns the same map in `f64`.
    pub(super) fn as_f64(&self) -> FeatureMap<f64> {
        let projection = self.projection.as_ref().map(|matrix| matrix.mapv(F::as_f64));
        let Self { features, head_dim, num_features, scale, .. } = *self;
        FeatureMap { features, head_dim, num_features, scale, projection }
    }

    /// Returns the map in the form for the kernels.
    pub(super) fn map(&self) -> Map<F> {
        match self.features {
            Features::Positive => Map::Exponential,
            Features::Hyperbolic => Map::Both,
            Features::Trigonometric => Map::Circular,
            Features::Relu { epsilon } => Map::Relu(F::from_f64(epsilon)),
            Features::Elu => Map::Elu,
        }
    }

    /// Returns the factor of the projection in the kernels: E = weight x is an exponent in units of ln 2,
    /// an angle, or a plain product.
    pub(super) fn weight_factor(&self) -> f64 {
        match self.features {
            Features::Positive | Features::Hyperbolic => self.scale.sqrt() * LOG2_E,
            _ => self.scale.sqrt(),
        }
    }

    /// Returns the projection times this factor: columns of E × head_dim. Zeros without a projection.
    pub(super) fn weight(&self) -> Result<Array2<F>> {
        match &self.projection {
            Some(projection) => {
                let factor = self.weight_factor();
                let mut weight = try_zeros("projection", projection.nrows(), projection.ncols())?;
                weight.zip_mut_with(projection, |out, &w| *out = F::from_f64(w.as_f64() * factor));
                Ok(weight)
            }
            None => try_zeros("projection", self.head_dim, self.head_dim),
        }
    }

    /// Returns the factor of |x|² in h.
    pub(super) fn square_scale(&self) -> F {
        F::from_f64(if self.features.is_estimate() { self.scale / 2.0 * LOG2_E } else { 0.0 })
    }

    /// Checks the sizes of heads.
    pub(super) fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        let columns = |heads: usize| heads.saturating_mul(self.head_dim);
        let expected = [inputs.num_queries(), columns(inputs.num_heads())];
        check_shape("query", &expected, inputs.query().shape())?;
        check_shape(
            "key",
            &[inputs.num_keys(), columns(inputs.num_kv_heads())],
            inputs.key().shape(),
        )
    }

    /// Returns the problem for the kernels; `keys` are the keys that the queries see.
    pub(super) fn problem<'p>(
        &self,
        inputs: &Inputs<'p, F>,
        keys: Vec<usize>,
    ) -> Result<FeatureProblem<'p, F>> {
        Ok(FeatureProblem {
            inputs: *inputs,
            query: Rows::new("query", inputs.query())?,
            key: Rows::new("key", inputs.key())?,
            value: Rows::new("value", inputs.value())?,
            heads: inputs.num_heads(),
            kv_heads: inputs.num_kv_heads(),
            dim: self.head_dim,
            value_dim: inputs.value().ncols() / inputs.num_kv_heads(),
            map: self.map(),
            projection: self.weight()?.reversed_axes(),
            square_scale: self.square_scale(),
            keys,
            wants_projection: false,
        })
    }

    /// Computes E for some rows.
    pub(super) fn products(&self, x: ArrayView2<'_, F>) -> Result<Array2<F>> {
        match self.projection {
            Some(_) => F::linear(x, self.weight()?.view(), None),
            None => Ok(x.to_owned()),
        }
    }

    /// Computes log₂ of the features of a row if they are positive, otherwise the features themselves,
    /// trigonometric ones without the factor e^{|x|²/2}.
    pub(super) fn exponents_or_features(
        &self,
        x: ArrayView1<'_, F>,
        products: ArrayView1<'_, F>,
        mut out: ArrayViewMut1<'_, F>,
    ) {
        let square = self.square_scale() * x.dot(&x);
        let columns = products.len();
        for (c, &product) in products.iter().enumerate() {
            match self.map() {
                Map::Exponential => out[c] = product - square,
                Map::Both => {
                    out[c] = product - square;
                    out[columns + c] = -product - square;
                }
                Map::Circular => {
                    let (sin, cos) = product.sin_cos();
                    out[c] = cos;
                    out[columns + c] = sin;
                }
                // NaN stays in both.
                Map::Relu(epsilon) => {
                    out[c] = if product < F::zero() { epsilon } else { product + epsilon };
                }
                Map::Elu => {
                    let is_positive = product > F::zero();
                    out[c] =
                        if is_positive { product.ln_1p() } else { product } * F::from_f64(LOG2_E);
                }
            }
        }
    }

    /// Computes φ of each row as in the papers; it may overflow.
    pub(super) fn apply(&self, x: ArrayView2<'_, F>) -> Result<Array2<F>> {
        check_shape("x", &[x.nrows(), self.head_dim], x.shape())?;
        let products = self.products(x)?;
        let mut out = try_zeros("features", x.nrows(), self.num_features)?;
        let norm = match self.features {
            Features::Elu => 1.0,
            Features::Trigonometric => (2.0 / self.num_features as f64).sqrt(),
            _ => (1.0 / self.num_features as f64).sqrt(),
        };
        let norm = F::from_f64(norm);
        for ((x, products), mut out) in
            x.rows().into_iter().zip(products.rows()).zip(out.rows_mut())
        {
            self.exponents_or_features(x, products, out.view_mut());
            let square = self.square_scale() * x.dot(&x);
            out.mapv_inplace(|entry| match self.map() {
                map if map.is_exponential() => norm * entry.exp2(),
                Map::Circular => norm * square.exp2() * entry,
                _ => norm * entry,
            });
        }
        Ok(out)
    }
}

/// Draws normal rows, independent or in orthogonal blocks.
fn draw<F: Float>(projection: Projection, matrix: &mut Array2<F>, rng: &mut impl Rng) {
    let mut normal = || -> f64 { StandardNormal.sample(rng) };
    if projection == Projection::Iid {
        matrix.mapv_inplace(|_| F::from_f64(normal()));
        return;
    }
    let dim = matrix.ncols();
    let mut block: Vec<Vec<f64>> = Vec::new();
    for mut row in matrix.rows_mut() {
        if block.len() == dim {
            block.clear();
        }
        let direction = loop {
            let mut direction: Vec<f64> = (0..dim).map(|_| normal()).collect();
            // The component orthogonal to the previous rows; twice, because of rounding. For a normal
            // vector its direction is uniform, so the block is a uniform rotation.
            for other in block.iter().chain(&block) {
                let product = dot(&direction, other);
                direction
                    .iter_mut()
                    .zip(other)
                    .for_each(|(entry, other)| *entry -= product * other);
            }
            let norm = dot(&direction, &direction).sqrt();
            // About once in 10¹⁰ times only rounding errors remain of it.
            if norm > 1e-10 {
                direction.iter_mut().for_each(|entry| *entry /= norm);
                break direction;
            }
        };
        let norm = (0..dim).map(|_| normal().powi(2)).sum::<f64>().sqrt();
        row.iter_mut().zip(&direction).for_each(|(out, entry)| *out = F::from_f64(norm * entry));
        block.push(direction);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
