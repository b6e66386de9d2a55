//! Checks of the contract of [`Attention`], for the mechanisms of this crate and for your own.
//!
//! [`check_attention`] runs a mechanism on small random inputs (dense, causal, masked, biased, graphs
//! with isolated nodes, parallel edges and self-loops, empty inputs) and checks laws that need no
//! reference: permutations, other representations of the same pairs, other memory layouts, NaN that must
//! not spread. [`check_gradients`] compares the backward pass with central differences.
//! [`guide::own_mechanism`](crate::guide::own_mechanism) implements and checks a mechanism.
//!
//! ```
//! use graph_attention::testing::{Shapes, check_attention, check_gradients};
//! use graph_attention::{Attention, Flash};
//!
//! // Queries and keys of 2 heads × 3 columns, values of 2 × 5.
//! let shapes = Shapes::new(6, 6, 10).heads(2);
//! let mut flash = Flash::new();
//! check_attention::<f32>(&flash, &shapes)?;
//! check_gradients(&mut flash, &shapes)?;
//! # Ok::<(), graph_attention::testing::Violation>(())
//! ```

mod gradients;
mod laws;
mod sample;

pub use gradients::check_gradients;
pub use laws::check_attention;
use sample::Sample;
pub use sample::Shapes;

use crate::{Attention, Error, Float, Gradients};
use ndarray::ArrayViewD;

/// Limits the instruction set of the kernels to the one in the environment variable
/// `GRAPH_ATTENTION_SIMD` (`avx512`, `avx2`, `sse2`; `scalar` with the feature of that name), and returns
/// its name. `ndarray`'s products, which projections use, are not limited. Call it before anything else; for the
/// tests, benches and examples of this crate.
///
/// # Errors
/// [`Error::InvalidArgument`] if the CPU does not have this instruction set, or another one is already in
/// use.
#[doc(hidden)]
pub fn hold_simd() -> crate::Result<String> {
    crate::kernels::level::hold_down()
}

/// Compiles the mechanisms with this crate. Builds with little optimisation, such as tests, share the
/// code compiled in a dependency, so it is not compiled again for each test. Release builds do not share
/// it.
#[cfg(all(debug_assertions, not(test)))]
#[doc(hidden)]
pub fn compile_here() {
    use crate::{
        Attention, DualSpace, EdgeGat, EdgeRope, Flash, Float, GraphRope, LocalGlobal, Moe,
        MultiHead, Performer, Poincare, ScaledDotProduct, Stack, TransformerLayer,
    };
    use std::ptr::null;

    fn of<F: Float>() {
        // The vtable of a type contains all of its methods.
        let mechanisms: [*const dyn Attention<F>; 13] = [
            null::<ScaledDotProduct>(),
            null::<Flash>(),
            null::<MultiHead<F, Flash>>(),
            null::<EdgeGat<F>>(),
            null::<Poincare<F>>(),
            null::<LocalGlobal<F>>(),
            null::<Performer<F>>(),
            null::<GraphRope<F, Flash>>(),
            null::<EdgeRope<F>>(),
            null::<Moe<F>>(),
            null::<DualSpace<F>>(),
            null::<TransformerLayer<F, MultiHead<F, Flash>>>(),
            null::<Stack<F, TransformerLayer<F, MultiHead<F, Flash>>>>(),
        ];
        std::hint::black_box((mechanisms, check_attention::<F> as fn(_, _) -> _));
    }
    of::<f32>();
    of::<f64>();
}

/// The cases of a check. Look at [`refused`](Self::refused): the cases listed there were not checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The cases that were checked.
    pub checked: Vec<&'static str>,
    /// The cases that the mechanism refused with [`Error::Unsupported`], as it is allowed to.
    pub refused: Vec<&'static str>,
}

/// A law that a mechanism violated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{mechanism}, case `{case}`: {law}: {detail}")]
pub struct Violation {
    /// The mechanism's name.
    pub mechanism: &'static str,
    /// The inputs on which it violated the law.
    pub case: &'static str,
    /// The law.
    pub law: &'static str,
    /// The numbers that violate the law.
    pub detail: String,
}

/// Runs `check` on all cases, except those that the mechanism refuses. It must accept plain dense inputs
/// or a plain graph.
fn for_each_case<F: Float>(
    mechanism: &mut dyn Attention<F>,
    shapes: &Shapes,
    mut check: impl FnMut(&mut dyn Attention<F>, &Sample<F>) -> Result<(), Broken>,
) -> Result<Report, Violation> {
    let name = mechanism.name();
    let violation = move |case, law, detail| Violation { mechanism: name, case, law, detail };
    let mut report = Report::default();
    for (case, sample) in sample::cases(shapes) {
        let accepted = sample.inputs().and_then(|inputs| mechanism.forward(&inputs));
        if let Err(Error::Unsupported { .. }) = accepted {
            report.refused.push(case);
            continue;
        }
        check(mechanism, &sample).map_err(|broken| violation(case, broken.law, broken.detail))?;
        report.checked.push(case);
    }
    if ["dense", "graph"].iter().all(|case| report.refused.contains(case)) {
        let detail = "it refuses both".to_owned();
        return Err(violation("dense", "accepts plain dense inputs or a plain graph", detail));
    }
    Ok(report)
}

/// A violated law, without the mechanism and the case.
#[derive(Debug)]
struct Broken {
    law: &'static str,
    detail: String,
}

/// Returns an error unless `holds`.
fn require(law: &'static str, holds: bool, detail: impl FnOnce() -> String) -> Result<(), Broken> {
    if holds { Ok(()) } else { Err(Broken { law, detail: detail() }) }
}

/// Returns the value of a call that must succeed.
fn succeed<T>(law: &'static str, result: crate::Result<T>) -> Result<T, Broken> {
    result.map_err(|error| Broken { law, detail: error.to_string() })
}

/// Returns all gradients with their names: first those of the existing inputs, then those of the
/// parameters.
fn arrays<F: Float>(gradients: &Gradients<F>) -> Vec<(&'static str, ArrayViewD<'_, F>)> {
    let Gradients {
        query,
        key,
        value,
        bias,
        pair_weights,
        edge_features,
        distances,
        query_positions,
        key_positions,
        params,
    } = gradients;
    let mut arrays = vec![
        ("query", query.view().into_dyn()),
        ("key", key.view().into_dyn()),
        ("value", value.view().into_dyn()),
    ];
    arrays.extend(bias.as_ref().map(|grad| ("bias", grad.view())));
    arrays.extend(pair_weights.as_ref().map(|grad| ("pair_weights", grad.view().into_dyn())));
    arrays.extend(edge_features.as_ref().map(|grad| ("edge_features", grad.view().into_dyn())));
    arrays.extend(distances.as_ref().map(|grad| ("distances", grad.view().into_dyn())));
    arrays.extend(query_positions.as_ref().map(|grad| ("query_positions", grad.view().into_dyn())));
    arrays.extend(key_positions.as_ref().map(|grad| ("key_positions", grad.view().into_dyn())));
    arrays.extend(params.iter().map(|grad| ("params", grad.view())));
    arrays
}
