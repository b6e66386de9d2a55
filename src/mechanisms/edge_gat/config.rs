//! The configuration, and the parameters that follow from it.

use super::EdgeGat;
use super::scores::{Linear, Names, Score};
use crate::element::try_zeros;
use crate::error::{Error, Result};
use crate::kernels::Float;
use crate::mechanisms::fill_uniform;
use crate::params;
use ndarray::{ArrayD, Axis};
use rand::Rng;

/// The sizes and options of an [`EdgeGat`]. Build one with initial parameters with [`init`](Self::init),
/// or with given parameters with [`from_params`](Self::from_params).
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct EdgeGatConfig {
    pub(super) score: Score,
    pub(super) query_dim: usize,
    pub(super) key_dim: usize,
    pub(super) head_dim: usize,
    pub(super) num_heads: usize,
    pub(super) edge_dim: usize,
    pub(super) average_heads: bool,
    pub(super) negative_slope: f64,
    pub(super) bias: bool,
    pub(super) share_weights: bool,
    pub(super) residual: bool,
    pub(super) gate: bool,
    pub(super) edge_values: bool,
}

impl EdgeGatConfig {
    /// Creates a configuration for nodes with `input_dim` columns and `num_heads` heads of `head_dim`
    /// columns, with the defaults of PyG: a bias, concatenated heads, a slope of 0.2; [`Score::Gat`] has
    /// one weight for both ends of an edge, [`Score::DotProduct`] a residual and edge features in its
    /// values.
    #[must_use]
    pub fn new(score: Score, input_dim: usize, head_dim: usize, num_heads: usize) -> Self {
        let form = score.form();
        Self {
            score,
            query_dim: input_dim,
            key_dim: input_dim,
            head_dim,
            num_heads,
            edge_dim: 0,
            average_heads: false,
            negative_slope: 0.2,
            bias: true,
            share_weights: form.shares_weights,
            residual: form.residual,
            gate: false,
            edge_values: form.edge_values,
        }
    }

    /// Sets the number of columns of keys and values, if it differs from that of queries: PyG's
    /// `in_channels = (keys, queries)`. The two ends of an edge then have separate weights.
    #[must_use]
    pub fn key_dim(mut self, dim: usize) -> Self {
        self.key_dim = dim;
        self.share_weights = false;
        self
    }

    /// Sets the number of columns of the edge features, which the inputs must then have: PyG's
    /// `edge_dim`. Default: 0, no edge features; inputs that have some are then refused with
    /// [`Error::MissingSetting`]. (PyG ignores them.)
    #[must_use]
    pub fn edge_dim(mut self, dim: usize) -> Self {
        self.edge_dim = dim;
        self
    }

    /// Sets whether the heads are averaged instead of concatenated: PyG's `concat=False`. Default:
    /// `false`.
    #[must_use]
    pub fn average_heads(mut self, average: bool) -> Self {
        self.average_heads = average;
        self
    }

    /// Sets the slope of LeakyReLU on the negative side; has no effect on [`Score::Additive`] and
    /// [`Score::DotProduct`]. Default: 0.2.
    #[must_use]
    pub fn negative_slope(mut self, slope: f64) -> Self {
        self.negative_slope = slope;
        self
    }

    /// Sets whether the output has a bias, and also the linear maps of nodes that have one in PyG.
    /// Default: `true`.
    #[must_use]
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// Sets whether both ends of an edge share one weight: PyG's `share_weights`; not supported by
    /// [`Score::DotProduct`]. Default: `true` for [`Score::Gat`] if queries and keys have the same number
    /// of columns, as in PyG.
    #[must_use]
    pub fn share_weights(mut self, share: bool) -> Self {
        self.share_weights = share;
        self
    }

    /// Sets whether a linear map of the query node is added to the output: PyG's `residual` or
    /// `root_weight`. Default: `true` for [`Score::DotProduct`], `false` otherwise.
    #[must_use]
    pub fn residual(mut self, residual: bool) -> Self {
        self.residual = residual;
        self
    }

    /// Sets whether a gate mixes the residual r and the attention o of each node: β r + (1 − β) o, β =
    /// σ(w · \[o, r, o − r\]). This is PyG's `beta`. Needs the residual. Default: `false`.
    #[must_use]
    pub fn gate(mut self, gate: bool) -> Self {
        self.gate = gate;
        self
    }

    /// Sets whether a value is W h_j + W_e x, or only W h_j; has no effect without edge features.
    /// Default: `true` for [`Score::DotProduct`], `false` otherwise, as in PyG.
    #[must_use]
    pub fn edge_values(mut self, edge_values: bool) -> Self {
        self.edge_values = edge_values;
        self
    }

    /// Builds an [`EdgeGat`] with initial parameters: weights and attention vectors are drawn from
    /// Glorot's uniform in ±√(6/(rows + columns)) (Glorot & Bengio 2010), as in Veličković et al., and
    /// biases are zero. (PyG draws the linear maps of `TransformerConv` from ±1/√columns.)
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a size is 0, the slope is negative or not finite, weights are shared
    /// although queries and keys have different numbers of columns or the score is [`Score::DotProduct`],
    /// or there is a gate without a residual; [`Error::TooLarge`].
    pub fn init<F: Float>(&self, rng: &mut impl Rng) -> Result<EdgeGat<F>> {
        let mut gat = self.zeros()?;
        for (name, param) in &mut gat.params {
            let shape = param.shape();
            if let [.., rows, columns] = *shape
                && !name.ends_with("bias")
            {
                let bound = (6.0 / (rows + columns) as f64).sqrt();
                fill_uniform(param.view_mut(), bound, rng);
            }
        }
        Ok(gat)
    }

    /// Builds an [`EdgeGat`] with given parameters, named as in PyG's state dict (see [`EdgeGat`]), in
    /// any order.
    ///
    /// If both ends of an edge share a weight, it may be given under the name of either end or of both
    /// (older versions of PyG write `lin_src.weight` and `lin_dst.weight` for a `GATConv` with one
    /// node set). The unused `lin_skip` of a `TransformerConv` is ignored.
    ///
    /// # Errors
    /// As [`init`](Self::init) and [`params::load_state`]; [`Error::InvalidArgument`] if a shared weight
    /// is given under two names with different values.
    pub fn from_params<F: Float>(
        &self,
        state: impl IntoIterator<Item = (impl AsRef<str>, ArrayD<F>)>,
    ) -> Result<EdgeGat<F>> {
        let mut gat = self.zeros()?;
        let Linear { weight, bias } = gat.names.residual;
        let has_spare = self.score.form().spare_residual && !self.residual;
        // With the name under which a value was given.
        let mut known: Vec<(String, String, ArrayD<F>)> = Vec::new();
        for (name, value) in state {
            let came_as = name.as_ref().to_owned();
            if has_spare && (came_as == weight || bias == Some(&came_as)) {
                continue;
            }
            let shared = self.shared_name(&came_as);
            let name = shared.map_or_else(|| came_as.clone(), str::to_owned);
            let is_twin = |(known, as_name, _): &&(String, String, ArrayD<F>)| {
                shared.is_some() && *known == name && *as_name != came_as
            };
            match known.iter().find(is_twin) {
                Some((.., twin)) if is_same(twin, &value) => {}
                Some((_, twin, _)) => {
                    let expected = format!("the same values under {twin} and {came_as}");
                    return Err(Error::config("share_weights", expected, "different values"));
                }
                None => known.push((name, came_as, value)),
            }
        }
        let known = known.into_iter().map(|(name, _, value)| (name, value));
        params::load_state(&mut gat, known)?;
        Ok(gat)
    }

    /// Returns the name of a shared parameter in this crate.
    fn shared_name(&self, name: &str) -> Option<&'static str> {
        let mut aliases = self.score.form().aliases.iter();
        let shared = aliases.find(|(alias, _)| *alias == name)?.1;
        self.share_weights.then_some(shared)
    }

    /// Validates the configuration and allocates all parameters as zeros.
    fn zeros<F: Float>(&self) -> Result<EdgeGat<F>> {
        for (field, size) in [
            ("input_dim", self.query_dim),
            ("key_dim", self.key_dim),
            ("head_dim", self.head_dim),
            ("num_heads", self.num_heads),
        ] {
            if size == 0 {
                return Err(Error::config(field, "at least 1", size));
            }
        }
        let slope = F::from_f64(self.negative_slope).as_f64();
        if !(slope.is_finite() && slope >= 0.0) {
            let expected = "a finite number of at least 0";
            return Err(Error::config("negative_slope", expected, self.negative_slope));
        }
        if self.gate && !self.residual {
            return Err(Error::config("gate", "`residual(true)` with the gate", "no residual"));
        }
        let form = self.score.form();
        if self.share_weights && form.shared.is_none() {
            let expected = format!("false for Score::{:?}", self.score);
            return Err(Error::config("share_weights", expected, true));
        }
        if self.share_weights && self.key_dim != self.query_dim {
            let expected =
                format!("false, since key_dim = {} differs from input_dim", self.key_dim);
            return Err(Error::config("share_weights", expected, true));
        }
        let columns = self.num_heads.saturating_mul(self.head_dim);
        let out = self.output_columns();
        let names = self.names();
        let mut params = Vec::new();
        let mut matrix = |name: &'static str, rows: usize, columns: usize| -> Result<()> {
            params.push((name, try_zeros(name, rows, columns)?.into_dyn()));
            Ok(())
        };
        let has_edges = self.edge_dim > 0;
        // In the order of PyG's state dicts. Parameters of rank 1 or 3 get their shape below.
        for &name in form.attention {
            if has_edges || name != "att_edge" {
                matrix(name, self.num_heads, self.head_dim)?;
            }
        }
        if self.bias && form.output_bias {
            matrix("bias", 1, out)?;
        }
        let ends = [(names.key, self.key_dim), (names.query, self.query_dim)];
        for (&(name, dim), which) in ends.iter().zip(0..) {
            if which == 0 || name != names.key {
                matrix(name.weight, columns, dim)?;
                if let Some(bias) = name.bias.filter(|_| self.bias) {
                    matrix(bias, 1, columns)?;
                }
            }
        }
        if names.value != names.key {
            matrix(names.value.weight, columns, self.key_dim)?;
            if let Some(bias) = names.value.bias.filter(|_| self.bias) {
                matrix(bias, 1, columns)?;
            }
        }
        if has_edges {
            matrix("lin_edge.weight", columns, self.edge_dim)?;
        }
        if self.residual {
            matrix(names.residual.weight, out, self.query_dim)?;
            if let Some(bias) = names.residual.bias.filter(|_| self.bias) {
                matrix(bias, 1, out)?;
            }
        }
        if self.gate {
            matrix("lin_beta.weight", 1, out.saturating_mul(3))?;
        }
        for (name, param) in &mut params {
            if name.ends_with("bias") {
                param.index_axis_inplace(Axis(0), 0);
            } else if name.starts_with("att") {
                param.insert_axis_inplace(Axis(0));
            }
        }
        Ok(EdgeGat { config: self.clone(), names, params })
    }

    pub(super) fn output_columns(&self) -> usize {
        if self.average_heads {
            self.head_dim
        } else {
            self.num_heads.saturating_mul(self.head_dim)
        }
    }

    fn names(&self) -> Names {
        let form = self.score.form();
        form.shared.filter(|_| self.share_weights).unwrap_or(form.separate)
    }
}

/// Whether two arrays are equal, with NaN equal to NaN.
fn is_same<F: Float>(a: &ArrayD<F>, b: &ArrayD<F>) -> bool {
    let same = |(a, b): (&F, &F)| a == b || (a.is_nan() && b.is_nan());
    a.shape() == b.shape() && a.iter().zip(b).all(same)
}
