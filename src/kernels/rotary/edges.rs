//! Softmax attention in which each pair has its own rotation: the query is at 0, the key at the pair's
//! distance.
//!
//! A logit is (scale q)·(R k) in the forward pass and in both backward passes, because large logits must
//! be rounded the same way. The pass by key also rotates the queries in the opposite direction, for the
//! gradients.

use super::super::gathered::{Columns, Gather, Weights};
use super::super::problem::{Problem, Rows, Slices, Upstream};
use super::super::rows::{self, Pairs, Scorer, Tile, TwoSided, key_columns};
use super::{Rotary, Turn, is_zero};
use crate::gradients::GradientsMut;
use crate::inputs::head_columns;
use crate::kernels::Float;
use fearless_simd::Level;
use ndarray::Array1;

/// Inputs of attention with rotations of the pairs.
#[derive(Debug)]
pub struct RotaryProblem<'p, F: Float> {
    pub(crate) softmax: Problem<'p, F>,
    /// The rotation on one axis.
    pub(crate) rotary: Rotary,
    /// One row for each pair.
    pub(crate) distances: Rows<'p, F>,
    /// Whether the backward pass computes the gradients of distances and frequencies.
    pub(crate) wants_distances: bool,
    pub(crate) wants_frequencies: bool,
}

/// The logits, row by row.
pub(in super::super) struct RotaryScorer<'p, F: Float> {
    problem: &'p RotaryProblem<'p, F>,
    /// The queries times the scale, in the pass by key.
    scaled_queries: Option<Slices<'p, F>>,
    is_backward: bool,
    pairs: Pairs<'p>,
    columns: Columns<F>,
    /// The columns of one query and the keys, in either pass.
    query_columns: Columns<F>,
    turn: Turn<F>,
    /// The common row of all pairs.
    row: usize,
    /// It, times the scale if it is a query.
    own: Vec<F>,
    /// The rotated rows of a tile: keys, or the queries by key.
    rotated: Vec<F>,
    /// In the pass by key: the own key rotated for a pair, and the logits of that pair.
    rotated_key: Vec<F>,
    logits: Vec<F>,
    /// 0, 1, 2, …
    all: Vec<usize>,
    /// The factors of the rotated rows in the derivative of a logit with respect to its distance.
    slope: Vec<F>,
    /// For each head and pair of a tile.
    scratch: Vec<F>,
    ones: Vec<F>,
    /// scale · Σ ds δ R k of the row.
    moments: Vec<F>,
}

impl<'p, F: Float> RotaryScorer<'p, F> {
    fn make(
        level: Level,
        problem: &'p RotaryProblem<'p, F>,
        scaled_queries: Option<Slices<'p, F>>,
        is_backward: bool,
        tile: &Tile<F>,
    ) -> Self {
        let softmax = &problem.softmax;
        let own_are_keys = scaled_queries.is_some();
        let (query, key) = (softmax.query.slices(), softmax.key.slices());
        let (own, others) = if own_are_keys { (key, query) } else { (query, key) };
        let inputs = &softmax.inputs;
        let zeros = |len| vec![F::zero(); len];
        let if_wanted = |is_wanted: bool, len| zeros(if is_wanted { len } else { 0 });
        Self {
            problem,
            scaled_queries,
            is_backward,
            pairs: if own_are_keys { Pairs::by_key(inputs) } else { Pairs::by_query(inputs) },
            columns: key_columns(level, softmax, own_are_keys),
            query_columns: key_columns(level, softmax, false),
            turn: Turn::new(level, &problem.rotary),
            row: 0,
            own: zeros(own.columns),
            rotated: zeros(tile.len * others.columns),
            rotated_key: zeros(if own_are_keys { own.columns } else { 0 }),
            logits: zeros(softmax.heads * tile.stride),
            all: (0..tile.len).collect(),
            slope: if_wanted(problem.wants_distances, own.columns),
            scratch: zeros(tile.weights.len()),
            ones: vec![F::one(); softmax.heads],
            moments: if_wanted(problem.wants_frequencies, own.columns),
        }
    }

    fn own_rows(&self) -> Slices<'p, F> {
        let softmax = &self.problem.softmax;
        if self.scaled_queries.is_some() { softmax.key.slices() } else { softmax.query.slices() }
    }

    fn others(&self) -> Slices<'p, F> {
        let softmax = &self.problem.softmax;
        if self.scaled_queries.is_some() { softmax.query.slices() } else { softmax.key.slices() }
    }
}

impl<'p, F: Float> Scorer<'p, F> for RotaryScorer<'p, F> {
    type Problem = RotaryProblem<'p, F>;

    fn softmax(problem: &'p Self::Problem) -> &'p Problem<'p, F> {
        &problem.softmax
    }

    fn new(level: Level, problem: &'p Self::Problem, tile: &Tile<F>) -> Self {
        Self::make(level, problem, None, false, tile)
    }

    fn begin(&mut self, row: usize) {
        let scale = self.problem.softmax.scale;
        self.row = row;
        let values = self.own_rows().row(row);
        self.own.iter_mut().zip(values).for_each(|(own, &value)| *own = scale * value);
        if self.is_backward && !self.slope.is_empty() {
            self.turn.slope(scale, values, &mut self.slope);
        }
    }

    fn score(&mut self, tile: &mut Tile<F>) {
        let distances = self.problem.distances.slices();
        tile.prefetch_pairs(self.pairs, distances, |pair| pair);
        let (own, others) = (self.own_rows().row(self.row), self.others());
        let rows = self.rotated.chunks_exact_mut(others.columns.max(1));
        for (t, rotated) in rows.take(tile.pairs.len()).enumerate() {
            let (distance, other) = (distances.row(tile.pairs[t].index), tile.others[t]);
            self.turn.set(distance, 1.0);
            let Some(queries) = self.scaled_queries else {
                self.turn.apply(others.row(other), rotated);
                continue;
            };
            self.turn.apply(own, &mut self.rotated_key);
            let rows = Slices { data: &self.rotated_key, columns: own.len() };
            let key = Gather { rows, at: &[0] };
            self.query_columns.dots(queries.row(other), key, &mut self.logits, tile.stride);
            for (head, logits) in self.logits.chunks_exact(tile.stride).enumerate() {
                tile.weights[head * tile.stride + t] = logits[0];
            }
            self.turn.set(distance, -1.0);
            self.turn.apply(others.row(other), rotated);
        }
        if self.scaled_queries.is_none() {
            let rows = Slices { data: &self.rotated, columns: others.columns };
            let rows = Gather { rows, at: &self.all[..tile.pairs.len()] };
            self.columns.dots(&self.own, rows, &mut tile.weights, tile.stride);
        }
        if self.is_backward {
            // A NaN logit makes its gradient NaN. Pairs hidden by a bias are multiplied by 0.
            for x in &mut self.rotated[..tile.pairs.len() * others.columns] {
                *x = if x.is_finite() { *x } else { F::zero() };
            }
        }
    }
}

impl<'p, F: Float> TwoSided<'p, F> for RotaryScorer<'p, F> {
    fn num_extras(problem: &'p Self::Problem) -> [usize; 2] {
        let sums = if problem.wants_frequencies { problem.rotary.frequencies.ncols() } else { 0 };
        [usize::from(problem.wants_distances), sums]
    }

    fn of_side(
        level: Level,
        problem: &'p Self::Problem,
        scaled_queries: Option<Slices<'p, F>>,
        tile: &Tile<F>,
    ) -> Self {
        Self::make(level, problem, scaled_queries, true, tile)
    }

    fn factors<'t>(&'t self, tile: &'t Tile<F>, others: Slices<'t, F>) -> Gather<'t, F> {
        let rows = Slices { data: &self.rotated, columns: others.columns };
        Gather { rows, at: &self.all[..tile.pairs.len()] }
    }

    fn logits_vjp(&mut self, tile: &Tile<F>, grads: &[F], of_pairs: &mut [F]) {
        let (heads, stride) = (self.problem.softmax.heads, tile.stride);
        let rows = Slices { data: &self.rotated, columns: self.others().columns };
        let rows = Gather { rows, at: &self.all[..tile.pairs.len()] };
        // If the gradient is 0 the pair may be hidden, and the rest NaN.
        let times = |grad: F, x: F| if grad == F::zero() { grad } else { grad * x };
        if self.problem.wants_distances {
            self.columns.dots(&self.slope, rows, &mut self.scratch, stride);
            of_pairs.fill(F::zero());
            for head in 0..heads {
                let of_head = head * stride..(head + 1) * stride;
                let slopes = grads[of_head.clone()].iter().zip(&self.scratch[of_head]);
                let sums = of_pairs.iter_mut().zip(slopes);
                sums.for_each(|(sum, (&grad, &slope))| *sum += times(grad, slope));
            }
        }
        if self.problem.wants_frequencies {
            let distances = self.problem.distances.slices();
            for head in 0..heads {
                for (t, pair) in tile.pairs.iter().enumerate() {
                    let distance = distances.row(pair.index)[0];
                    self.scratch[head * stride + t] = times(grads[head * stride + t], distance);
                }
            }
            let weights = Weights { factors: Some(&self.ones), weights: &self.scratch, stride };
            self.columns.add_weighted(&mut self.moments, weights, rows);
        }
    }

    fn finish_vjp(&mut self, sums: &mut [F]) {
        let Problem { heads, key_dim: dim, scale, .. } = self.problem.softmax;
        if self.moments.is_empty() {
            return;
        }
        for head in 0..heads {
            let moments = &mut self.moments[head_columns(head, dim)];
            // The query of a head that sees nothing may be NaN.
            if !is_zero(moments) {
                let query = self.problem.softmax.query(self.row, head);
                moments.iter_mut().for_each(|moment| *moment *= scale);
                let block = self.turn.block(head, heads);
                self.turn.add_cross_products(block, moments, query, sums);
                moments.fill(F::zero());
            }
        }
    }
}

/// Computes the gradients and returns the gradient of the frequencies.
pub(in super::super) fn backward<F: Float>(
    problem: &RotaryProblem<'_, F>,
    tile_len: usize,
    level: Level,
    upstream: Upstream<'_, F>,
    grads: &mut GradientsMut<'_, F>,
) -> Array1<F> {
    let scaled = rows::scaled_queries(&problem.softmax);
    rows::backward::<_, RotaryScorer<'_, _>>(problem, &scaled, tile_len, level, upstream, grads)
}

#[cfg(test)]
mod tests {
    use super::super::Layout;
    use super::*;
    use crate::gradients::GradientsMut;
    use crate::inputs::Inputs;
    use crate::kernels::normalizer::Normalizer;
    use crate::kernels::problem::Upstream;
    use crate::kernels::{Kernels, levels};
    use fearless_simd::Level;
    use ndarray::{Array2, ArrayD, Axis};

    fn matrix(rows: usize, columns: usize, seed: usize) -> Array2<f64> {
        let entry = |(i, j)| ((i * 37 + j * 11 + seed * 5) % 23) as f64 / 11.5 - 1.0;
        Array2::from_shape_fn((rows, columns), entry)
    }

    /// The output and the gradients of query, key, value, distances and frequencies.
    fn run(level: Level, layout: Layout, pairs: usize) -> Vec<ArrayD<f64>> {
        let (n_q, n_k, heads, kv_heads, head_dim, value_dim) = (3, 41, 4, 2, 2 * pairs + 1, 5);
        let query = matrix(n_q, heads * head_dim, 1);
        let [key, value] = [head_dim, value_dim].map(|dim| matrix(n_k, kv_heads * dim, 2));
        let distances = matrix(n_q * n_k, 1, 3) * 40.0;
        let inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
        let inputs = inputs.with_grouped_heads(heads, kv_heads).unwrap().with_causal();
        let inputs = inputs.with_distances(distances.column(0)).unwrap();
        let problem = RotaryProblem {
            softmax: Problem::new(&inputs, None).unwrap(),
            rotary: Rotary {
                layout,
                head_dim,
                pairs,
                frequencies: matrix(1, 2 * pairs, 4),
                factor: 1.5,
            },
            distances: Rows::new("distances", distances.view()).unwrap(),
            wants_distances: true,
            wants_frequencies: true,
        };
        let mut out = Array2::zeros((n_q, heads * value_dim));
        let mut normalizer = Normalizer::empty(n_q, heads).unwrap();
        f64::rotary_forward(&problem, 8, level, out.view_mut(), &mut normalizer);
        let mut grads = [&query, &key, &value, &distances].map(|x| Array2::zeros(x.raw_dim()));
        let [grad_query, grad_key, grad_value, grad_distances] =
            grads.each_mut().map(|grad| grad.view_mut());
        let slices = Slices { data: out.as_slice().unwrap(), columns: heads * value_dim };
        let upstream = Upstream {
            out: slices,
            normalizer: &normalizer,
            grad_out: slices,
            grad_log_sum_exp: None,
            grad_weights: None,
        };
        let grad_frequencies = f64::rotary_backward(
            &problem,
            8,
            level,
            upstream,
            &mut GradientsMut {
                query: Some(grad_query),
                key: Some(grad_key),
                value: Some(grad_value),
                distances: Some(grad_distances.index_axis_move(Axis(1), 0)),
                ..GradientsMut::of_params(&mut [])
            },
        );
        let arrays = std::iter::once(out).chain(grads).map(Array2::into_dyn);
        arrays.chain([grad_frequencies.into_dyn()]).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_same_answer() {
        let [best, others @ ..] = &levels()[..] else { panic!("there is always a best") };
        for layout in [Layout::Interleaved, Layout::Half] {
            for pairs in [1, 2, 7, 8, 19] {
                let expected = run(*best, layout, pairs);
                assert!(expected.iter().all(|array| array.iter().any(|&x| x.abs() > 1e-3)));
                for &level in others {
                    for (array, (a, b)) in
                        run(level, layout, pairs).iter().zip(&expected).enumerate()
                    {
                        let error =
                            (a - b).mapv(f64::abs).into_iter().fold(0.0, crate::element::nan_max);
                        assert!(error < 1e-12, "{level:?} {layout:?} {pairs} {array}: {error:e}");
                    }
                }
            }
        }
    }
}
