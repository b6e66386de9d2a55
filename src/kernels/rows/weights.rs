//! The attention weights.

use super::super::normalizer::Normalizer;
use super::{Outputs, Pairs, Part, Scorer, SlotOfPair, Tile, for_each_part, level_for, parts};
use crate::element::try_zeros;
use crate::error::Result;
use crate::kernels::Float;
use fearless_simd::Level;
use ndarray::{Array2, ArrayViewMut2};

/// Computes the weights before dropout, pairs × heads in the caller's order, given the normalizer of the
/// forward pass.
pub(in super::super) fn weights<'p, F: Float, C: Scorer<'p, F>>(
    problem: &'p C::Problem,
    tile_len: usize,
    level: Level,
    normalizer: &Normalizer<F>,
) -> Result<Array2<F>> {
    let softmax = C::softmax(problem);
    let level = level_for::<F>(level, [softmax.key_dim, softmax.value_dim]);
    let pairs = Pairs::by_query(&softmax.inputs);
    let parts = parts(pairs);
    let tile_len = pairs.tile_len(tile_len);
    let mut weights = try_zeros("weights", softmax.inputs.num_pairs(), softmax.heads)?;
    let outputs = Outputs::by_row([], &parts);
    for_each_part(
        &parts,
        softmax.work(),
        Outputs { by_row: [], by_slot: [weights.view_mut()], by_part: outputs.by_part },
        |part, Outputs { by_slot: [weights], .. }| {
            run::<_, C>(level, problem, pairs, tile_len, part, normalizer, weights);
        },
        |[], []| {},
    );
    SlotOfPair::new(softmax.inputs.pattern())?.in_callers_order(weights)
}

fn run<'p, F: Float, C: Scorer<'p, F>>(
    level: Level,
    problem: &'p C::Problem,
    pairs: Pairs<'_>,
    tile_len: usize,
    part: &Part,
    normalizer: &Normalizer<F>,
    mut weights: ArrayViewMut2<'_, F>,
) {
    let softmax = C::softmax(problem);
    let mut tile = Tile::new(level, softmax.heads, tile_len);
    let mut scorer = C::new(level, problem, &tile);
    for mut row in part.rows(pairs) {
        scorer.begin(row.row);
        while tile.fill(softmax, &mut row, &[softmax.key.slices()]) {
            scorer.score(&mut tile);
            debug_assert!(softmax.scoring.is_none());
            tile.add_bias(softmax);
            for (t, slot) in tile.slots.iter().enumerate() {
                for head in 0..softmax.heads {
                    let logit = tile.weights[head * tile.stride + t];
                    let [shift, inverse] = normalizer.factors(row.row, head);
                    weights[[slot - part.slots.start, head]] = match logit {
                        _ if logit == F::neg_infinity() => F::zero(),
                        logit => (logit - shift).exp() * inverse,
                    };
                }
            }
        }
    }
}
