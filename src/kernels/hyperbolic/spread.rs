//! The sum that the midpoint of far points is too sensitive to.

use super::{DistanceScorer, HyperbolicProblem};
use crate::float::Float;
use crate::kernels::exp2::exp2;
use crate::kernels::heads::{Columns, Gather};
use crate::kernels::matmul::Vector;
use crate::kernels::problem::Slices;
use crate::kernels::rows::{
    Outputs, Pairs, Part, Scorer, Tile, add_up, for_each_part, level_for, parts,
};
use fearless_simd::{Level, Select, Simd, SimdBase};
use ndarray::{Array2, ArrayViewMut2};
use std::f64::consts::LOG2_E;

/// Adds Σⱼ pᵢⱼ sinh Rⱼ |uⱼ − ûᵢ|²/2 to `sums`, num_queries × heads, for those queries that have a û
/// (num_queries × heads · dim) other than 0 in any head.
pub(in super::super) fn spread<F: Float>(
    problem: &HyperbolicProblem<'_, F>,
    directions: Slices<'_, F>,
    log_sum_exp: &Array2<F>,
    tile_len: usize,
    level: Level,
    sums: ArrayViewMut2<'_, F>,
) {
    let softmax = &problem.softmax;
    let pairs = Pairs::by_query(&softmax.inputs);
    let level = level_for::<F>(level, [softmax.key_dim, problem.dim]);
    let parts = parts(pairs);
    let tile_len = pairs.tile_len(tile_len);
    for_each_part(
        &parts,
        softmax.work(),
        Outputs::by_row([sums], &parts),
        |part, Outputs { by_row: [sums], .. }| {
            dispatch!(level, simd => {
                spread_rows(simd, problem, directions, log_sum_exp, tile_len, part, sums);
            });
        },
        add_up,
    );
}

#[inline(always)]
fn spread_rows<S: Simd, F: Float>(
    simd: S,
    problem: &HyperbolicProblem<'_, F>,
    directions: Slices<'_, F>,
    log_sum_exp: &Array2<F>,
    tile_len: usize,
    part: &Part,
    mut sums: ArrayViewMut2<'_, F>,
) {
    let softmax = &problem.softmax;
    let pairs = Pairs::by_query(&softmax.inputs);
    let mut columns: Columns<F> = problem.columns(simd, problem.dim);
    let mut tile = Tile::new(simd, softmax.heads, tile_len);
    let mut scorer = DistanceScorer::new(simd, problem, &tile);
    let mut spreads = vec![F::zero(); tile.weights.len()];
    for (r, mut row) in part.rows(pairs).enumerate() {
        let query = row.row;
        let own = directions.row(query);
        if own.iter().all(|&entry| entry == F::zero()) {
            continue;
        }
        scorer.begin(simd, query);
        while tile.fill(softmax, &mut row, [softmax.key.slices(), problem.directions.slices()]) {
            scorer.score(simd, &mut tile);
            tile.add_bias(simd, softmax);
            let rows = Gather { rows: problem.directions.slices(), at: &tile.others };
            columns.squared_distances(simd, own, rows, &mut spreads, tile.stride);
            for head in 0..softmax.heads {
                let [of_head, vectors] = tile.of_head(simd, head);
                let log_sum = log_sum_exp[[query, head]] * F::of(LOG2_E);
                weigh(simd, &mut tile.weights[vectors], log_sum);
                let weights = &tile.weights[of_head.clone()];
                let terms = weights.iter().zip(&spreads[of_head]).zip(&tile.pairs);
                let half = F::of(0.5);
                sums[[r, head]] += terms.fold(F::zero(), |sum, ((&weight, &spread), pair)| {
                    let sinh = problem.masses[problem.key_at(pair.key, head)].sinh;
                    let weight = weight * softmax.multiplier(pair.index, head);
                    sum + weight * (half * sinh * spread)
                });
            }
        }
    }
}

/// p = e^{s − L} in place of logits. Whole vectors.
#[inline(always)]
fn weigh<S: Simd, F: Float>(simd: S, logits: &mut [F], log_sum: F) {
    let lowest = Vector::<S, F>::splat(simd, F::neg_infinity());
    let log_sum = Vector::<S, F>::splat(simd, log_sum);
    for logits in logits.chunks_exact_mut(Vector::<S, F>::LEN) {
        let logit = Vector::<S, F>::from_slice(simd, logits);
        let logit = logit.simd_eq(lowest).select(lowest, logit - log_sum);
        exp2::<S, F>(simd, logit).store_slice(logits);
    }
}
