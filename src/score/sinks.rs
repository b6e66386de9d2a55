use super::{ScoreFunction, ScorePairs};
use crate::element::{Element, try_vec};
use crate::error::{Error, Result, check_shape};
use crate::inputs::Inputs;
use crate::params::Params;
use ndarray::{Array1, ArrayViewD, ArrayViewMutD};

/// Attention sinks: a learned logit for each head that takes part in the softmax and has no value (gpt-oss, OpenAI
/// 2025, 2508.10925; Miller 2023 with the logit 0; Xiao et al. 2023, 2309.17453, on why). A head can so attend to
/// nothing.
///
/// ```text
/// oᵢ = Σⱼ e^{sᵢⱼ} vⱼ / (Σⱼ e^{sᵢⱼ} + e^{sink})
/// ```
///
/// * **Parameters** `sinks` (heads), as in gpt-oss. A sink of −∞ is none.
/// * Attention weights sum to less than 1; a query without visible keys still gets zeros. Dropout leaves the sink
///   alone.
/// * Partial results ([`Flash::forward_partial`](crate::Flash::forward_partial)) leave sinks out, or each shard
///   would count them: merge [`Flash::sink_partial`](crate::Flash::sink_partial) once.
///
/// ```
/// use graph_attention::ndarray::array;
/// use graph_attention::score::Sinks;
/// use graph_attention::{Attention, Flash, Inputs};
///
/// // One key with the logit 0 and the value 8; the sink has the logit ln 3, so three quarters of the weight.
/// let (q, v) = (array![[0.0]], array![[8.0]]);
/// let inputs = Inputs::dense(q.view(), q.view(), v.view())?;
/// let sinks = Sinks::from_logits(array![3f64.ln()])?;
/// let out = Flash::new().with_score(sinks).forward(&inputs)?;
/// assert!((out[[0, 0]] - 2.0).abs() < 1e-14);
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Sinks<F> {
    sinks: Array1<F>,
}

impl<F: Element> Sinks<F> {
    /// Creates sinks with the logit 0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without heads; [`Error::TooLarge`].
    pub fn new(heads: usize) -> Result<Self> {
        Self::from_logits(try_vec("sinks", &[heads], F::zero())?.into())
    }

    /// Creates sinks with these logits, one for each head.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without heads.
    pub fn from_logits(sinks: Array1<F>) -> Result<Self> {
        if sinks.is_empty() {
            return Err(Error::config("heads", "at least 1", 0));
        }
        Ok(Self { sinks })
    }
}

impl<F: Element> Params<F> for Sinks<F> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        visitor("sinks", self.sinks.view().into_dyn());
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        visitor("sinks", self.sinks.view_mut().into_dyn());
    }
}

impl<F: Element> ScoreFunction<F> for Sinks<F> {
    fn apply(&self, _: &ScorePairs<'_>, _: &mut [F]) {}

    fn vjp(&self, _: &ScorePairs<'_>, _: &[F], _: &mut [F], _: &mut [f64]) {}

    fn changes_logits(&self) -> bool {
        false
    }

    fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        check_shape("sinks", &[inputs.num_heads()], self.sinks.shape())
    }

    fn sink(&self, head: usize) -> F {
        self.sinks[head]
    }

    fn sink_vjp(&self, head: usize, grad: f64, grad_params: &mut [f64]) {
        grad_params[head] += grad;
    }
}

/// The shift is only raised if the sink exceeds it by more than this.
const SLACK: f64 = 4.0;

/// Returns what an output over keys with the shift m and the sum l is multiplied by because of a sink, and the shift
/// and sum of both.
///
/// ```text
/// l' = e^{m − m'} l + e^{sink − m'}      factor = e^{m − m'} l / l'
/// ```
pub(crate) fn with_sink(sink: f64, [shift, sum]: [f64; 2]) -> [f64; 3] {
    if sum == 0.0 {
        return [0.0, sink, 1.0];
    }
    let larger = if sink > shift + SLACK { sink } else { shift };
    let of_keys = (shift - larger).exp() * sum;
    let of_all = of_keys + (sink - larger).exp();
    [of_keys / of_all, larger, of_all]
}
