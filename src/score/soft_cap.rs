use super::{ScoreFunction, ScorePairs};
use crate::error::{Error, Result};
use crate::kernels::Float;
use crate::params::Params;
use ndarray::{ArrayViewD, ArrayViewMutD};

/// Limits logits smoothly to ±c, as in Gemma 2 (2408.00118): s ↦ c tanh(s / c), before bias and mask.
///
/// Gemma 2 uses c = 50 for attention, Grok-1 uses 30. ONNX's `Attention` calls c `softcap`. With c = ∞ it is the
/// identity.
///
/// ```
/// use graph_attention::ndarray::array;
/// use graph_attention::score::SoftCap;
/// use graph_attention::{Attention, Flash, Inputs};
///
/// // Logits 0 and 1000: without a cap the second key has all the weight.
/// let (q, k) = (array![[1000f64]], array![[0.0], [1.0]]);
/// let inputs = Inputs::dense(q.view(), k.view(), k.view())?;
/// let capped = Flash::new().with_score(SoftCap::new(3f64.ln())?).forward(&inputs)?;
/// assert!((capped[[0, 0]] - 0.75).abs() < 1e-15); // e^{ln 3} against e^0
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SoftCap {
    cap: f64,
}

impl SoftCap {
    /// Creates a soft cap c.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless c > 0.
    pub fn new(cap: f64) -> Result<Self> {
        if cap.is_nan() || cap <= 0.0 {
            return Err(Error::config("cap", "a positive number", cap));
        }
        Ok(Self { cap })
    }
}

impl<F: Float> Params<F> for SoftCap {
    fn visit_params<'a>(&'a self, _: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {}
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {}
}

impl<F: Float> ScoreFunction<F> for SoftCap {
    #[inline(never)]
    fn apply(&self, pairs: &ScorePairs<'_>, logits: &mut [F]) {
        F::soft_cap(pairs.level, F::from_f64(self.cap), logits);
    }

    #[inline(never)]
    fn vjp(&self, pairs: &ScorePairs<'_>, logits: &[F], grads: &mut [F], _: &mut [f64]) {
        F::soft_cap_vjp(pairs.level, F::from_f64(self.cap), logits, grads);
    }

    fn changes_logits(&self) -> bool {
        F::from_f64(self.cap).is_finite()
    }
}
