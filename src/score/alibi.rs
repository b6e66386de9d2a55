use super::{ScoreFunction, ScorePairs, dot};
use crate::element::{Element, try_vec};
use crate::error::{Error, Result, check_shape};
use crate::inputs::Inputs;
use crate::params::Params;
use ndarray::{Array1, ArrayViewD, ArrayViewMutD};

/// Attention with linear biases (Press et al. 2021, 2108.12409): s ↦ s − slope · |i − j|, with a slope for each
/// head and the positions i and j of query and key.
///
/// The slopes of n heads are 2^(−8 (h + 1) / n) if n is a power of two; otherwise those of the next smaller power
/// of two, and then every other one of the next larger, as in the authors' code. They are a buffer, or with
/// [`learned`](Self::learned) the parameter `slopes` (heads).
///
/// ```
/// use graph_attention::params;
/// use graph_attention::score::Alibi;
///
/// let slopes = params::buffers::<f64>(&Alibi::new(4)?);
/// assert_eq!(slopes[0].1.as_slice(), Some(&[0.25, 0.0625, 0.015625, 0.00390625][..]));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Alibi<F> {
    slopes: Array1<F>,
    is_learned: bool,
}

impl<F: Element> Alibi<F> {
    /// Creates the slopes of the paper for this number of heads.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without heads; [`Error::TooLarge`].
    pub fn new(heads: usize) -> Result<Self> {
        if heads == 0 {
            return Err(Error::config("heads", "at least 1", heads));
        }
        let mut slopes = try_vec("slopes", &[heads], F::zero())?;
        let power = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
        let slope =
            |number: usize, of: usize| F::from_f64((-8.0 * number as f64 / of as f64).exp2());
        for (head, of_head) in slopes.iter_mut().enumerate() {
            *of_head = match head.checked_sub(power) {
                None => slope(head + 1, power),
                Some(more) => slope(2 * more + 1, 2 * power),
            };
        }
        Ok(Self { slopes: slopes.into(), is_learned: false })
    }

    /// Creates given slopes, one for each head.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without heads.
    pub fn from_slopes(slopes: Array1<F>) -> Result<Self> {
        if slopes.is_empty() {
            return Err(Error::config("heads", "at least 1", 0));
        }
        Ok(Self { slopes, is_learned: false })
    }

    /// Makes the slopes a parameter instead of a buffer.
    #[must_use]
    pub fn learned(mut self) -> Self {
        self.is_learned = true;
        self
    }
}

impl<F: Element> Params<F> for Alibi<F> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        if self.is_learned {
            visitor("slopes", self.slopes.view().into_dyn());
        }
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        if self.is_learned {
            visitor("slopes", self.slopes.view_mut().into_dyn());
        }
    }

    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        if !self.is_learned {
            visitor("slopes", self.slopes.view().into_dyn());
        }
    }

    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        if !self.is_learned {
            visitor("slopes", self.slopes.view_mut().into_dyn());
        }
    }
}

impl<F: Element> ScoreFunction<F> for Alibi<F> {
    #[inline]
    fn apply(&self, pairs: &ScorePairs<'_>, logits: &mut [F]) {
        let slope = self.slopes[pairs.head()];
        pairs.for_each(
            logits,
            #[inline(always)]
            |pair, logit| *logit -= slope * length::<F>(pair.distance),
        );
    }

    #[inline]
    fn vjp(&self, pairs: &ScorePairs<'_>, _: &[F], grads: &mut [F], grad_params: &mut [f64]) {
        if self.is_learned {
            let mut lengths = vec![F::zero(); grads.len()];
            pairs.for_each(
                &mut lengths,
                #[inline(always)]
                |pair, of_pair| *of_pair = length(pair.distance),
            );
            grad_params[pairs.head()] -= dot(grads, |i| lengths[i]);
        }
    }

    fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        check_shape("slopes", &[inputs.num_heads()], self.slopes.shape())
    }
}

#[inline(always)]
fn length<F: Element>(distance: i32) -> F {
    F::from_f64(f64::from(distance.abs()))
}
