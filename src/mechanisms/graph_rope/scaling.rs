//! Frequencies for contexts longer than those of the training.

use crate::error::{Error, Result};
use std::f64::consts::TAU;

/// How the frequencies of a [`GraphRopeConfig`](super::GraphRopeConfig) change so that a model trained with
/// positions up to L₀ (`original_len`) reads positions up to s · L₀, where s is the `factor`.
///
/// In each block of m pairs, θₚ = base^{−p/m} becomes θ'ₚ:
///
/// | scaling | θ'ₚ | `rope_type` in transformers |
/// |---|---|---|
/// | `Linear` | θₚ / s | `linear` |
/// | `Ntk` | θₚ · s^{−p/(m−1)}: that of a base multiplied by s^{2m/(2m−2)} | `dynamic`, see below |
/// | `Yarn` | γₚ θₚ / s + (1 − γₚ) θₚ, where the ramp γ rises from 0 to 1 between two pairs | `yarn` |
/// | `Llama3` | θₚ for wavelengths λₚ = 2π/θₚ below L₀ / h, θₚ / s above L₀ / l, in between the mean with the weights w = (L₀/λₚ − l) / (h − l) of θₚ and 1 − w of θₚ / s, where l and h are the two frequency factors | `llama3` |
///
/// YaRN's ramp begins at the pair that turns `beta_fast` times within L₀ positions and ends at the one that
/// turns `beta_slow` times; p(β) = m ln(L₀ / 2πβ) / ln base. With `truncate` both are rounded outwards to whole
/// numbers. Both are limited to 0 … 2m − 1, as in the authors' code.
///
/// YaRN also multiplies the cosines and sines of queries and keys by the attention factor 0.1 ln s + 1, so
/// the part of a logit from rotated columns grows by its square. Set another one with
/// [`attention_factor`](super::GraphRopeConfig::attention_factor).
///
/// Dynamic NTK scaling is `Ntk` with the factor s L / L₀ − (s − 1) for a sequence of L > L₀ positions.
///
/// (Linear: Chen et al. 2023, 2306.15595. NTK-aware: bloc97 2023, described by Peng et al. YaRN: Peng et al. 2023,
/// 2309.00071. Llama 3: Grattafiori et al. 2024, 2407.21783, and the code of Llama 3.1.)
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub enum Scaling {
    /// Linear interpolation of positions.
    Linear {
        /// s.
        factor: f64,
    },
    /// NTK-aware scaling: the highest frequency stays, the lowest is divided by s.
    Ntk {
        /// s.
        factor: f64,
    },
    /// YaRN: high frequencies stay, low ones are divided by s. [`Scaling::yarn`] has the usual settings.
    Yarn {
        /// s.
        factor: f64,
        /// L₀.
        original_len: f64,
        /// Pairs that turn more often within L₀ positions keep their frequencies. Usually 32.
        beta_fast: f64,
        /// Pairs that turn less often are divided by s. Usually 1.
        beta_slow: f64,
        /// Whether the ends of the ramp are rounded to whole pairs. Usually `true`.
        truncate: bool,
    },
    /// The scaling of Llama 3.1.
    Llama3 {
        /// s.
        factor: f64,
        /// l. 1 in Llama 3.1.
        low_freq_factor: f64,
        /// h. 4 in Llama 3.1.
        high_freq_factor: f64,
        /// L₀.
        original_len: f64,
    },
}

impl Scaling {
    /// Creates YaRN with the settings of the paper: β from 1 to 32, rounded to whole pairs.
    #[must_use]
    pub fn yarn(factor: f64, original_len: f64) -> Self {
        Self::Yarn { factor, original_len, beta_fast: 32.0, beta_slow: 1.0, truncate: true }
    }

    /// Returns the factor of cosines and sines.
    pub(super) fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn { factor, .. } => 0.1 * factor.ln() + 1.0,
            _ => 1.0,
        }
    }

    pub(super) fn validate(&self, base: f64) -> Result<()> {
        let at_least = |what, least: f64, value: f64| match value >= least && value.is_finite() {
            true => Ok(()),
            false => {
                Err(Error::config(what, format!("a finite number of at least {least}"), value))
            }
        };
        let positive = |what, value: f64| match value > 0.0 && value.is_finite() {
            true => Ok(()),
            false => Err(Error::config(what, "a positive finite number", value)),
        };
        let ordered = |what, less: f64, more: f64| match less < more {
            true => Ok(()),
            false => Err(Error::config(what, format!("a number above {less}"), more)),
        };
        match *self {
            Self::Linear { factor } | Self::Ntk { factor } => at_least("factor", 1.0, factor),
            Self::Yarn { factor, original_len, beta_fast, beta_slow, .. } => {
                at_least("factor", 1.0, factor)?;
                positive("original_len", original_len)?;
                positive("beta_slow", beta_slow)?;
                positive("beta_fast", beta_fast)?;
                ordered("beta_fast", beta_slow, beta_fast)?;
                ordered("base, with YaRN", 1.0, base)
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => {
                at_least("factor", 1.0, factor)?;
                positive("original_len", original_len)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("high_freq_factor", high_freq_factor)?;
                ordered("high_freq_factor", low_freq_factor, high_freq_factor)
            }
        }
    }

    /// Returns the scaled frequency of pair p of m.
    pub(super) fn scale(&self, base: f64, p: usize, m: usize) -> f64 {
        let (p, m) = (p as f64, m as f64);
        let theta = base.powf(-p / m);
        match *self {
            Self::Linear { factor } => theta / factor,
            Self::Ntk { .. } if p == 0.0 => theta,
            Self::Ntk { factor } => theta * factor.powf(-p / (m - 1.0)),
            Self::Yarn { factor, original_len, beta_fast, beta_slow, truncate } => {
                let pair_turning = |times: f64| m * (original_len / (times * TAU)).ln() / base.ln();
                let (mut start, mut end) = (pair_turning(beta_fast), pair_turning(beta_slow));
                if truncate {
                    (start, end) = (start.floor(), end.ceil());
                }
                (start, end) = (start.max(0.0), end.min(2.0 * m - 1.0));
                if start == end {
                    end += 0.001;
                }
                let ramp = ((p - start) / (end - start)).clamp(0.0, 1.0);
                theta / factor * ramp + theta * (1.0 - ramp)
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => {
                let turns = original_len * theta / TAU;
                let weight = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let weight = weight.clamp(0.0, 1.0);
                (1.0 - weight) * theta / factor + weight * theta
            }
        }
    }
}
