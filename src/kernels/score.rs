//! Score functions on panels of a tile, on rows of pairs, and on one pair.

use super::level::level;
use super::parallel::ranges;
use super::primitives::matmul::{load, panel_width, store};
use super::problem::Problem;
use crate::element::try_vec;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, Pair};
use crate::kernels::Float;
use crate::score::{AnyScore, Indices, ScorePairs, Side};
use fearless_simd::{Level, Simd, SimdBase};
use std::ops::Range;

/// A score function, and what it is told of queries and keys.
#[derive(Debug)]
pub(crate) struct Scoring<'a, F: Float> {
    function: &'a dyn AnyScore<F>,
    queries: Places,
    keys: Places,
    layers: Option<&'a [u8]>,
}

/// The numbers and positions of queries or keys.
#[derive(Debug, Default)]
struct Places {
    numbers: Vec<u32>,
    positions: Vec<i32>,
}

impl Places {
    fn slice(&self, range: Range<usize>) -> Side<'_> {
        Side { numbers: &self.numbers[range.clone()], positions: &self.positions[range] }
    }

    fn one(&self, number: usize) -> Side<'_> {
        self.slice(number..number + 1)
    }

    /// Overwrites these with those of some queries or keys of `all`.
    fn gather(&mut self, all: &Self, of: &[usize]) {
        self.numbers.clear();
        self.positions.clear();
        self.numbers.extend(of.iter().map(|&number| all.numbers[number]));
        self.positions.extend(of.iter().map(|&number| all.positions[number]));
    }

    fn new(len: usize, place: impl Fn(usize) -> (usize, i64)) -> Result<Self> {
        let mut places = Self {
            numbers: try_vec("numbers", &[len], 0)?,
            positions: try_vec("positions", &[len], 0)?,
        };
        let both = places.numbers.iter_mut().zip(&mut places.positions);
        for (at, (number, position)) in both.enumerate() {
            let (of_place, at_position) = place(at);
            // Half of the range, so that differences fit too.
            let limit = i64::from(i32::MAX / 2);
            let is_small = at_position.abs() <= limit;
            let found = u32::try_from(of_place).ok().filter(|_| is_small);
            let too_large = || {
                let expected = format!("at most {limit} with a score function");
                Error::config("positions", expected, at_position)
            };
            (*number, *position) = (found.ok_or_else(too_large)?, at_position as i32);
        }
        Ok(places)
    }
}

impl<'a, F: Float> Scoring<'a, F> {
    pub(crate) fn new(inputs: &Inputs<'a, F>, function: &'a dyn AnyScore<F>) -> Result<Self> {
        let of_query = |query| (inputs.query_number(query), inputs.query_position(query));
        let of_key = |key| (inputs.key_number(key), inputs.key_place(key) as i64);
        Ok(Self {
            function,
            queries: Places::new(inputs.num_queries(), of_query)?,
            keys: Places::new(inputs.num_keys(), of_key)?,
            layers: inputs.layers(),
        })
    }

    /// The number of entries of all parameters.
    pub(crate) fn num_params(&self) -> usize {
        self.function.num_params()
    }
}

/// A block of keys × queries of dense inputs, of one head.
pub(crate) struct Strip {
    pub(crate) level: Level,
    pub(crate) head: usize,
    pub(crate) queries: Range<usize>,
    pub(crate) keys: Range<usize>,
    /// Where its first entry is in a tile, and how far apart the rows of keys are.
    pub(crate) column: usize,
    pub(crate) width: usize,
}

/// Copies of a strip without gaps.
#[derive(Debug, Default)]
pub(crate) struct StripScratch<F> {
    logits: Vec<F>,
    grads: Vec<F>,
}

impl Strip {
    fn pairs<'s, F: Float>(
        &self,
        scoring: &'s Scoring<'_, F>,
        inputs: &Inputs<'_, F>,
    ) -> ScorePairs<'s> {
        let num_keys = inputs.num_keys();
        ScorePairs {
            level: self.level,
            head: self.head,
            outer: scoring.keys.slice(self.keys.clone()),
            inner: scoring.queries.slice(self.queries.clone()),
            rows_are_queries: false,
            indices: Indices::Dense {
                first: self.queries.start * num_keys + self.keys.start,
                num_keys,
                num_keys_of_whole: inputs.whole_sizes()[1],
            },
            layers: scoring.layers,
        }
    }

    /// Replaces the logits of the strip, and raises the maxima of its lanes to the largest results.
    pub(crate) fn apply_with_max<F: Float>(
        &self,
        problem: &Problem<'_, F>,
        scoring: &Scoring<'_, F>,
        tile: &mut [F],
        scratch: &mut StripScratch<F>,
        maxima: &mut [F],
    ) {
        let logits = &mut scratch.logits;
        self.gather(tile, logits);
        scoring.function.apply_to(&self.pairs(scoring, &problem.inputs), logits);
        self.scatter(logits, tile, maxima);
    }

    /// Replaces the logits of the strip, and keeps the original ones in the scratch.
    pub(crate) fn apply<F: Float>(
        &self,
        problem: &Problem<'_, F>,
        scoring: &Scoring<'_, F>,
        tile: &mut [F],
        scratch: &mut StripScratch<F>,
    ) {
        let StripScratch { logits, grads: scored } = scratch;
        self.gather(tile, logits);
        scored.clone_from(logits);
        scoring.function.apply_to(&self.pairs(scoring, &problem.inputs), scored);
        self.scatter(scored, tile, &mut []);
    }

    /// Copies the strip out of a tile.
    #[inline(never)]
    fn gather<F: Float>(&self, tile: &[F], strip: &mut Vec<F>) {
        let len = self.queries.len();
        strip.resize(self.keys.len() * len, F::zero());
        dispatch!(self.level, simd => self.gather_rows(simd, tile, strip));
    }

    #[inline(always)]
    fn gather_rows<S: Simd, F: Float>(&self, simd: S, tile: &[F], strip: &mut [F]) {
        let len = self.queries.len();
        for lanes in ranges(len, panel_width::<S, F>()) {
            let rows = strip.chunks_exact_mut(len).zip(tile.chunks(self.width));
            let rows = rows
                .map(|(row, from)| (&mut row[lanes.clone()], &from[self.column..][lanes.clone()]));
            if lanes.len() == panel_width::<S, F>() {
                rows.for_each(|(row, from)| store::<S, F>(load::<S, F>(simd, from), row));
            } else {
                rows.for_each(|(row, from)| row.copy_from_slice(from));
            }
        }
    }

    /// Copies the strip into a tile, and raises `maxima` to the largest entry of each lane, unless it is empty.
    #[inline(never)]
    fn scatter<F: Float>(&self, strip: &[F], tile: &mut [F], maxima: &mut [F]) {
        dispatch!(self.level, simd => self.scatter_rows(simd, strip, tile, maxima));
    }

    #[inline(always)]
    fn scatter_rows<S: Simd, F: Float>(
        &self,
        simd: S,
        strip: &[F],
        tile: &mut [F],
        maxima: &mut [F],
    ) {
        let len = self.queries.len();
        for lanes in ranges(len, panel_width::<S, F>()) {
            let rows = strip.chunks_exact(len).zip(tile.chunks_mut(self.width));
            let rows = rows
                .map(|(row, into)| (&row[lanes.clone()], &mut into[self.column..][lanes.clone()]));
            let maxima = maxima.get_mut(lanes.clone()).unwrap_or_default();
            if lanes.len() < panel_width::<S, F>() {
                for (row, into) in rows {
                    into.copy_from_slice(row);
                    for (max, &entry) in maxima.iter_mut().zip(row) {
                        *max = if entry > *max { entry } else { *max };
                    }
                }
            } else if maxima.is_empty() {
                for (row, into) in rows {
                    store::<S, F>(load::<S, F>(simd, row), into);
                }
            } else {
                let mut max = load::<S, F>(simd, maxima);
                for (row, into) in rows {
                    let row = load::<S, F>(simd, row);
                    max = [max[0].max(row[0]), max[1].max(row[1])];
                    store::<S, F>(row, into);
                }
                store::<S, F>(max, maxima);
            }
        }
    }

    /// Replaces the gradients of the results by those of the logits, which [`apply`](Self::apply) left in the
    /// scratch.
    pub(crate) fn vjp<F: Float>(
        &self,
        problem: &Problem<'_, F>,
        scoring: &Scoring<'_, F>,
        tile: &mut [F],
        scratch: &mut StripScratch<F>,
        grad_params: &mut [f64],
    ) {
        let StripScratch { logits, grads } = scratch;
        self.gather(tile, grads);
        hide(logits, grads);
        let pairs = self.pairs(scoring, &problem.inputs);
        scoring.function.add_vjp(&pairs, logits, grads, grad_params);
        self.scatter(grads, tile, &mut []);
    }
}

/// Sets the logits of pairs without a gradient to 0: hidden pairs, whose keys may be NaN.
fn hide<F: Float>(logits: &mut [F], grads: &[F]) {
    for (logit, &grad) in logits.iter_mut().zip(grads) {
        *logit = if grad == F::zero() { F::zero() } else { *logit };
    }
}

/// The pairs of a row, for a score function.
#[derive(Debug, Default)]
pub(crate) struct ScoredRow {
    places: Places,
    numbers: Vec<usize>,
}

impl ScoredRow {
    /// Replaces the logits of some pairs with one query or one key.
    pub(crate) fn load<F: Float>(
        &mut self,
        problem: &Problem<'_, F>,
        scoring: &Scoring<'_, F>,
        pairs: &[Pair],
        others: &[usize],
        rows_are_queries: bool,
    ) {
        let all = if rows_are_queries { &scoring.keys } else { &scoring.queries };
        self.places.gather(all, others);
        self.numbers.clear();
        if problem.inputs.is_selected() {
            self.numbers.extend(pairs.iter().map(|&pair| problem.inputs.pair_number(pair)));
        }
    }

    fn pairs<'s, F: Float>(
        &'s self,
        level: Level,
        scoring: &'s Scoring<'_, F>,
        pairs: &'s [Pair],
        head: usize,
        rows_are_queries: bool,
    ) -> ScorePairs<'s> {
        let Pair { query, key, .. } = pairs[0];
        ScorePairs {
            level,
            head,
            outer: if rows_are_queries {
                scoring.queries.one(query)
            } else {
                scoring.keys.one(key)
            },
            inner: self.places.slice(0..pairs.len()),
            rows_are_queries,
            indices: Indices::Listed {
                pairs,
                numbers: (!self.numbers.is_empty()).then_some(&self.numbers),
            },
            layers: scoring.layers,
        }
    }

    pub(crate) fn apply<F: Float>(
        &self,
        level: Level,
        scoring: &Scoring<'_, F>,
        (pairs, head, rows_are_queries): (&[Pair], usize, bool),
        logits: &mut [F],
    ) {
        let pairs = self.pairs(level, scoring, pairs, head, rows_are_queries);
        scoring.function.apply_to(&pairs, logits);
    }

    pub(crate) fn vjp<F: Float>(
        &self,
        level: Level,
        scoring: &Scoring<'_, F>,
        (pairs, head, rows_are_queries): (&[Pair], usize, bool),
        [logits, grads]: [&mut [F]; 2],
        grad_params: &mut [f64],
    ) {
        hide(logits, grads);
        let pairs = self.pairs(level, scoring, pairs, head, rows_are_queries);
        scoring.function.add_vjp(&pairs, logits, grads, grad_params);
    }
}

impl<F: Float> Problem<'_, F> {
    /// Returns f(s) of a pair.
    pub(crate) fn score_of(&self, pair: Pair, head: usize, logit: F) -> F {
        let Some(scoring) = &self.scoring else { return logit };
        let (mut logits, row) = ([logit], self.row_of(scoring, pair));
        row.apply(level(), scoring, (&[pair], head, true), &mut logits);
        logits[0]
    }

    /// Returns the gradient of the logit of a pair, given that of its result, and adds those of the parameters.
    pub(crate) fn score_vjp(
        &self,
        pair: Pair,
        head: usize,
        logit: F,
        grad: F,
        grad_params: &mut [f64],
    ) -> F {
        let Some(scoring) = &self.scoring else { return grad };
        let (mut logits, mut grads) = ([logit], [grad]);
        let row = self.row_of(scoring, pair);
        let of_pair = (&[pair][..], head, true);
        row.vjp(level(), scoring, of_pair, [&mut logits, &mut grads], grad_params);
        grads[0]
    }

    fn row_of(&self, scoring: &Scoring<'_, F>, pair: Pair) -> ScoredRow {
        let mut row = ScoredRow::default();
        row.load(self, scoring, &[pair], &[pair.key], true);
        row
    }
}
