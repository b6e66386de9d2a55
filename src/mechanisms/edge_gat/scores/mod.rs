//! The scores of [`EdgeGat`], one file each: its parameters and its projections. A new score is a file with a
//! `FORM` and a `Rules`, and an entry in the list below. The formulas of the logits are in
//! `kernels::edge_gat::scores`.

use super::{EdgeGat, ParamGradients, Projected};
use crate::error::Result;
use crate::inputs::Inputs;
use crate::kernels::Float;
use crate::kernels::edge_gat::BoxedScore;
use ndarray::{Array1, Array2, ArrayViewMut2};

/// Generates the modules and the public list of scores.
macro_rules! scores {
    ($($(#[$doc:meta])* $name:ident = $module:ident,)*) => {
        $(mod $module;)*

        /// How [`EdgeGat`](crate::EdgeGat) scores a query node i against a neighbour j with edge features x.
        #[non_exhaustive]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        pub enum Score {
            $($(#[$doc])* $name,)*
        }

        impl Score {
            pub(super) fn form(self) -> &'static Form {
                match self {
                    $(Self::$name => &$module::FORM,)*
                }
            }

            pub(super) fn rules<F: Float>(self) -> &'static dyn Rules<F> {
                match self {
                    $(Self::$name => &$module::Rules,)*
                }
            }
        }
    };
}

scores! {
    /// LeakyReLU(a_dst · W_dst h_i + a_src · W_src h_j + a_edge · W_e x): the graph attention network
    /// of Veličković et al. 2018, PyG's `GATConv`. Its attention is *static*: within a head, all
    /// queries rank the same keys in the same order (Brody et al. 2022).
    Gat = gat,
    /// a · LeakyReLU(W_dst h_i + W_src h_j + W_e x), of Brody et al. 2022, PyG's `GATv2Conv`: any
    /// query can prefer any key.
    GatV2 = gat_v2,
    /// a · tanh(W_dst h_i + W_src h_j + W_e x), the additive attention of Bahdanau et al. 2015, 1409.0473,
    /// with the parameters of `GatV2`: its logits are bounded by the sum of |a|.
    Additive = additive,
    /// (W_q h_i) · (W_k h_j + W_e x) / √d, of Shi et al. 2021, PyG's `TransformerConv`.
    DotProduct = dot_product,
}

/// What a configuration needs to know of a score.
#[derive(Debug)]
pub(super) struct Form {
    /// The linear maps if the ends of an edge have separate weights, and if they share one, where that is
    /// possible.
    pub(super) separate: Names,
    pub(super) shared: Option<Names>,
    /// Whether they share one by default.
    pub(super) shares_weights: bool,
    /// The attention vectors, heads × columns; `att_edge` only exists with edge features.
    pub(super) attention: &'static [&'static str],
    /// Whether the output has a `bias`; otherwise those of the linear maps take its place.
    pub(super) output_bias: bool,
    /// The defaults of `residual` and `edge_values`.
    pub(super) residual: bool,
    pub(super) edge_values: bool,
    /// Whether state dicts have the weights of a residual that is not used.
    pub(super) spare_residual: bool,
    /// Whether this is scaled dot-product attention if there are no edge features.
    pub(super) is_dot_product: bool,
    /// Other names of shared parameters, and their names in this crate.
    pub(super) aliases: &'static [(&'static str, &'static str)],
}

/// The names of the parameters of a linear map. The bias is optional.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Linear {
    pub(super) weight: &'static str,
    pub(super) bias: Option<&'static str>,
}

impl Linear {
    const fn with_bias(weight: &'static str, bias: &'static str) -> Self {
        Self { weight, bias: Some(bias) }
    }

    const fn plain(weight: &'static str) -> Self {
        Self { weight, bias: None }
    }
}

/// The linear maps of a score, by the array that each is applied to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    pub(super) key: Linear,
    pub(super) query: Linear,
    pub(super) value: Linear,
    pub(super) residual: Linear,
}

/// What a score does with parameters and inputs.
pub(super) trait Rules<F: Float> {
    /// Projects queries, keys and values.
    fn project(&self, gat: &EdgeGat<F>, inputs: &Inputs<'_, F>) -> Result<Projected<F>>;

    /// Returns the logits of projected queries and keys.
    fn score(&self, gat: &EdgeGat<F>) -> BoxedScore<F>;

    /// Adds the gradients of the parameters that [`score`](Self::score) has read, given that of its numbers.
    fn score_vjp(&self, _params: &mut ParamGradients<'_, '_, F>, _grad_attention: &Array1<F>) {}

    /// Adds the gradients of [`project`](Self::project): of the parameters and, where wanted, of query, key
    /// and value.
    fn project_vjp(
        &self,
        params: &mut ParamGradients<'_, '_, F>,
        inputs: &Inputs<'_, F>,
        projected: [Array2<F>; 3],
        grads: [Option<ArrayViewMut2<'_, F>>; 3],
    ) -> Result<()> {
        let gat = params.gat;
        let maps = [gat.names.query, gat.names.key, gat.names.value];
        let arrays = [inputs.query(), inputs.key(), inputs.value()];
        for (((map, x), projected), grad) in maps.into_iter().zip(arrays).zip(projected).zip(grads)
        {
            params.linear(map, x, projected.view(), grad)?;
        }
        Ok(())
    }
}
