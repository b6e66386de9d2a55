use crate::element::Element;
use crate::error::{Error, Result};

/// Dropout on attention weights: each weight is kept with probability `1 − probability` and then divided
/// by that probability (Srivastava et al. 2014; as in Vaswani et al. 2017, 1706.03762).
///
/// ```text
/// p̃ = m p / (1 − ρ),   m = 0 with probability ρ, else 1
/// ```
///
/// A hash of seed, pair and head decides whether the weight of a (pair, head) is kept. Nothing is stored,
/// the backward pass sees the same mask, and neither threads nor tiles change it. Use a different seed
/// for every training step and layer.
///
/// ```
/// use graph_attention::ndarray::Array2;
/// use graph_attention::{Attention, Dropout, Flash, Inputs};
///
/// let x = Array2::<f32>::eye(20);
/// let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
/// let step = |seed| Flash::new().forward(&inputs.with_dropout(Dropout { probability: 0.5, seed })?);
/// assert_eq!(step(1)?, step(1)?);
/// assert_ne!(step(1)?, step(2)?);
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct Dropout {
    /// The share ρ of weights that are dropped, in `[0, 1)`.
    pub probability: f64,
    /// The seed, which determines the mask.
    pub seed: u64,
}

// The kinds of numbers that shift a seed, above all numbers that occur.
const SEGMENT: u64 = 0;
const LAYER: u64 = 1 << 62;
const PLACE: u64 = 2 << 62;

impl Dropout {
    pub(crate) fn validate(&self) -> Result<()> {
        if (0.0..1.0).contains(&self.probability) {
            Ok(())
        } else {
            Err(Error::config("dropout.probability", "a number in [0, 1)", self.probability))
        }
    }

    /// Returns the dropout of a segment of [packed inputs](crate::Inputs::packed), with a seed of its own for
    /// each segment but the first.
    #[must_use]
    pub fn of_segment(self, segment: usize) -> Self {
        self.with_shifted_seed(SEGMENT, segment)
    }

    /// Returns the dropout of a layer of a [`Stack`](crate::Stack), with a seed of its own for each layer but the
    /// first. Use it also for layers that you call one after the other yourself.
    #[must_use]
    pub fn of_layer(self, layer: usize) -> Self {
        self.with_shifted_seed(LAYER, layer)
    }

    /// Returns the dropout of the entries of an array inside a layer; place 0 is that of the attention weights.
    pub(crate) fn of_place(self, place: usize) -> Self {
        self.with_shifted_seed(PLACE, place)
    }

    /// Seeds are shifted by addition, so segments, layers and places may be chosen in any order.
    fn with_shifted_seed(self, kind: u64, number: usize) -> Self {
        let shift = if number == 0 { 0 } else { mix(kind ^ number as u64) };
        Self { seed: self.seed.wrapping_add(shift), ..self }
    }

    /// Returns the factor of the weight of this (pair, head): 0 or `1 / (1 − probability)`.
    ///
    /// `pair` is the caller's pair number: `i · num_keys + j` in dense inputs, the edge number in a
    /// graph; in packed inputs, of the segment's dropout and as in dense inputs of the segment.
    #[inline]
    #[must_use]
    pub fn multiplier<F: Element>(&self, pair: usize, head: usize) -> F {
        self.of_pair(pair).multiplier(head)
    }

    /// Returns the dropout of a pair, for the factors of several heads.
    #[inline]
    pub(crate) fn of_pair<F: Element>(&self, pair: usize) -> PairDropout<F> {
        // The upper 53 bits of a hash, as a number in [0, 1), are less than the probability; compared as integers, which
        // can be vectorised. Rounded up by hand: `ceil` is a call on CPUs without SSE4.1.
        let bound = self.probability * (1u64 << 53) as f64;
        let dropped = bound as u64 + u64::from((bound as u64 as f64) < bound);
        let hash = mix(mix(self.seed) ^ pair as u64);
        PairDropout { hash, dropped, kept: F::from_f64(1.0 / (1.0 - self.probability)) }
    }
}

/// The [`Dropout`] of one pair.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PairDropout<F> {
    hash: u64,
    /// Hashes whose upper 53 bits are less than this are dropped.
    dropped: u64,
    /// The factor of the others.
    kept: F,
}

impl<F: Element> PairDropout<F> {
    /// Returns the factor of the weight of a head.
    #[inline]
    pub(crate) fn multiplier(self, head: usize) -> F {
        if mix(self.hash ^ head as u64) >> 11 < self.dropped { F::zero() } else { self.kept }
    }
}

/// The output function of SplitMix64 (Steele, Lea & Flood 2014, doi 10.1145/2714064.2660195):
/// a bijection of `u64` in which every input bit flips every output bit about half of the time.
#[inline]
pub(crate) fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_wanted_share_in_every_direction() {
        let dropout = Dropout { probability: 0.3, seed: 7 };
        // 100,000 draws: the standard error of the share is 0.0015; 5 of them are allowed.
        let share = |kept: &dyn Fn(usize) -> f64| {
            (0..100_000).filter(|&n| kept(n) == 0.0).count() as f64 / 1e5
        };
        let along_pairs = share(&|n| dropout.multiplier(n, 0));
        let along_heads = share(&|n| dropout.multiplier(5, n));
        let along_seeds = share(&|n| {
            let seed = n as u64;
            Dropout { seed, ..dropout }.multiplier(3, 1)
        });
        for share in [along_pairs, along_heads, along_seeds] {
            assert!((share - 0.3).abs() < 0.0075, "{share}");
        }
        let kept: f64 = dropout.multiplier(0, 0);
        assert!(kept == 0.0 || kept == 1.0 / 0.7);
    }

    #[test]
    fn segments_layers_and_places_differ_and_commute() {
        let dropout = Dropout { probability: 0.5, seed: 3 };
        let mut seeds = vec![];
        for (segment, layer, place) in (0..27).map(|n| (n / 9, n / 3 % 3, n % 3)) {
            let one = dropout.of_segment(segment).of_layer(layer).of_place(place);
            assert_eq!(one, dropout.of_place(place).of_layer(layer).of_segment(segment));
            seeds.push(one.seed);
        }
        assert_eq!(seeds[0], 3);
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 27);
    }

    #[test]
    fn neighbouring_pairs_and_heads_are_uncorrelated() {
        let dropout = Dropout { probability: 0.5, seed: 0 };
        let kept = |pair, head| f64::from(dropout.multiplier::<f64>(pair, head) > 0.0);
        let n = 100_000;
        let agree = |f: &dyn Fn(usize) -> (f64, f64)| {
            (0..n).filter(|&i| f(i).0 == f(i).1).count() as f64 / n as f64
        };
        for share in [
            agree(&|i| (kept(i, 0), kept(i + 1, 0))),
            agree(&|i| (kept(i, 0), kept(i, 1))),
            agree(&|i| (kept(i, 1), kept(i + 1, 0))),
        ] {
            assert!((share - 0.5).abs() < 0.008, "{share}");
        }
    }
}
