//! a · LeakyReLU(q + k + W x), or another activation.

use super::super::activation::{Activation, LeakyRelu, Tanh, activate};
use super::super::features::FeatureTile;
use super::super::{BoxedScore, EdgeColumns, EdgeProblem, EdgeScore, ScoreSums, ScoreTiles};
use crate::kernels::Float;
use crate::kernels::gathered::{Columns, Gather, Weights, mask};
use crate::kernels::primitives::matmul::Vector;
use crate::kernels::problem::Slices;
use crate::kernels::rows::{Pairs, Tile};
use fearless_simd::{Level, Select, Simd, SimdBase, SimdFloat, SimdMask};

/// The columns whose signs are saved in one number, as an integer: few enough for `f32` to represent it exactly.
const SIGNS: usize = 16;

/// Returns the logits, given the slope and a, one number for each column.
pub(in super::super::super) fn gat_v2<F: Float>(slope: F, attention: Vec<F>) -> BoxedScore<F> {
    BoxedScore(Box::new(Concatenated { activation: LeakyRelu(slope), attention }))
}

/// The same with tanh in place of LeakyReLU.
pub(in super::super::super) fn additive<F: Float>(attention: Vec<F>) -> BoxedScore<F> {
    BoxedScore(Box::new(Concatenated { activation: Tanh, attention }))
}

/// a · the activation of q + k + W x.
#[derive(Debug)]
struct Concatenated<F, A> {
    activation: A,
    /// a: one number for each column.
    attention: Vec<F>,
}

struct Tiles<'p, F: Float, A> {
    problem: &'p EdgeProblem<'p, F>,
    score: &'p Concatenated<F, A>,
    level: Level,
    columns: EdgeColumns<'p, F>,
    /// All columns as one head.
    whole: Columns<F>,
    query: usize,
    /// For each pair of a tile a row with the columns of the values: the activation of q + k + W x, and in
    /// the backward pass then the gradient of that sum.
    rows: Vec<F>,
    /// For each pair of a tile and head, which of those sums are positive, if that tells their derivatives.
    signs: Vec<F>,
    /// 0, 1, 2, …: all of these rows.
    at: Vec<usize>,
    by_key: Pairs<'p>,
}

impl<F: Float, A: Activation<F>> EdgeScore<F> for Concatenated<F, A> {
    fn num_attention(&self) -> usize {
        self.attention.len()
    }

    fn num_saved(&self, problem: &EdgeProblem<'_, F>) -> usize {
        match self.activation.slope() {
            Some(_) => problem.softmax.heads * problem.softmax.value_dim.div_ceil(SIGNS),
            None => 0,
        }
    }

    fn reads_queries_by_key(&self) -> bool {
        self.activation.slope().is_none()
    }

    fn tiles<'p>(
        &'p self,
        level: Level,
        problem: &'p EdgeProblem<'p, F>,
        tile: &Tile<F>,
    ) -> Box<dyn ScoreTiles<F> + 'p> {
        let num_columns = self.attention.len();
        Box::new(Tiles {
            problem,
            score: self,
            level,
            columns: EdgeColumns::new(level, problem),
            whole: Columns::new(level, 1, num_columns, |_| [0, 0]),
            query: 0,
            rows: vec![F::zero(); num_columns * tile.len],
            signs: vec![F::zero(); self.num_saved(problem) * tile.len],
            at: (0..tile.len).collect(),
            by_key: Pairs::by_key(&problem.softmax.inputs),
        })
    }
}

impl<F: Float, A: Activation<F>> ScoreTiles<F> for Tiles<'_, F, A> {
    fn begin(&mut self, query: usize) {
        self.query = query;
    }

    fn score(&mut self, tile: &mut Tile<F>, _: &FeatureTile<F>) {
        let softmax = &self.problem.softmax;
        self.activate_sums(softmax.query.row(self.query), softmax.key.slices(), tile);
        let columns = self.score.attention.len();
        let rows = Slices { data: &self.rows, columns };
        let rows = Gather { rows, at: &self.at[..tile.pairs.len()] };
        let Tile { weights, stride, .. } = tile;
        self.columns.columns.dots(&self.score.attention, rows, weights, *stride);
    }

    fn query_vjp(
        &mut self,
        tile: &Tile<F>,
        features: &FeatureTile<F>,
        grads: &mut [F],
        sums: &mut ScoreSums<'_, F>,
    ) {
        let EdgeProblem { ones, .. } = self.problem;
        let (stride, count, num_columns) =
            (tile.stride, tile.pairs.len(), self.score.attention.len());
        let of_pairs = Weights { factors: Some(ones), weights: grads, stride };
        let rows = Slices { data: &self.rows, columns: num_columns };
        let rows = Gather { rows, at: &self.at[..count] };
        self.columns.columns.add_weighted(sums.attention, of_pairs, rows);

        self.differentiate(grads, stride, count);
        add_rows(self.level, sums.query, &self.rows, count);
        let rows = Slices { data: &self.rows, columns: num_columns };
        let rows = Gather { rows, at: &self.at[..count] };
        let weight = self.problem.edge_weight();
        for feature in 0..self.problem.feature_dim() {
            let x = Weights { factors: Some(ones), weights: features.of_feature(feature), stride };
            let grad = &mut sums.edge_weight[feature * num_columns..][..num_columns];
            self.whole.add_weighted(grad, x, rows);
            if sums.wants_features {
                let grad = sums.features.of_feature_mut(feature);
                self.whole.dots(weight.row(feature), rows, grad, stride);
            }
        }
    }

    fn saved(&self) -> &[F] {
        &self.signs
    }

    fn key_vjp(
        &mut self,
        tile: &Tile<F>,
        key: usize,
        grads: &[F],
        saved: Gather<'_, F>,
        sum: &mut [F],
    ) {
        let softmax = &self.problem.softmax;
        if let Some(slope) = self.score.activation.slope() {
            let grads = Slices { data: grads, columns: tile.stride };
            add_slopes(self.level, slope, grads, saved, softmax.value_dim, sum);
            return;
        }
        tile.prefetch_pairs(self.by_key, self.problem.features.slices(), |pair| pair);
        self.activate_sums(softmax.key.row(key), softmax.query.slices(), tile);
        self.differentiate(grads, tile.stride, tile.pairs.len());
        add_rows(self.level, sum, &self.rows, tile.pairs.len());
    }

    fn finish_key(&mut self, sum: &mut [F]) {
        if self.score.activation.slope().is_some() {
            sum.iter_mut().zip(&self.score.attention).for_each(|(sum, &factor)| *sum *= factor);
        }
    }
}

impl<F: Float, A: Activation<F>> Tiles<'_, F, A> {
    /// Overwrites the rows with the activation of own + other + W x, for the pairs of a tile.
    #[inline(never)]
    fn activate_sums(&mut self, own: &[F], others: Slices<'_, F>, tile: &Tile<F>) {
        dispatch!(self.level, simd => self.activate_in_vectors(simd, own, others, tile));
    }

    #[inline(always)]
    fn activate_in_vectors<S: Simd>(
        &mut self,
        simd: S,
        own: &[F],
        others: Slices<'_, F>,
        tile: &Tile<F>,
    ) {
        let (activation, columns) = (self.score.activation, self.score.attention.len());
        let len = Vector::<S, F>::LEN;
        let weight = self.problem.edge_weight();
        let pairs = tile.pairs.iter().zip(&tile.others);
        for ((pair, &other), row) in pairs.zip(self.rows.chunks_exact_mut(columns.max(1))) {
            let (other, x) = (others.row(other), self.problem.features.row(pair.index));
            let (mut start, own) = (0, &own[..columns]);
            while start + 4 * len <= columns {
                sum_columns::<S, F, 4>(simd, activation, [own, other], x, weight, start, row);
                start += 4 * len;
            }
            while start + len <= columns {
                sum_columns::<S, F, 1>(simd, activation, [own, other], x, weight, start, row);
                start += len;
            }
            for c in start..columns {
                let edge = x.iter().enumerate().map(|(f, &x)| x * weight.row(f)[c]);
                let sum = edge.fold(own[c] + other[c], |sum, edge| sum + edge);
                row[c] = activation.of(simd, Vector::<S, F>::splat(simd, sum)).as_slice()[0];
            }
        }
    }

    /// Replaces the activations of the pairs of a tile by dm = ds · a · their derivatives, and saves their signs.
    #[inline(never)]
    fn differentiate(&mut self, grads: &[F], stride: usize, count: usize) {
        dispatch!(self.level, simd => self.differentiate_in_vectors(simd, grads, stride, count));
    }

    #[inline(always)]
    fn differentiate_in_vectors<S: Simd>(
        &mut self,
        simd: S,
        grads: &[F],
        stride: usize,
        count: usize,
    ) {
        let Concatenated { activation, attention } = self.score;
        let (len, dim) = (Vector::<S, F>::LEN, self.problem.softmax.value_dim);
        let zero = Vector::<S, F>::splat(simd, F::zero());
        let rows = self.rows.chunks_exact_mut(attention.len().max(1)).take(count);
        let mut all_signs = self.signs.iter_mut();
        for (t, row) in rows.enumerate() {
            let of_heads = row.chunks_exact_mut(dim).zip(attention.chunks_exact(dim));
            for (head, (row, attention)) in of_heads.enumerate() {
                let grad = grads[head * stride + t];
                let grads = Vector::<S, F>::splat(simd, grad);
                for (row, attention) in row.chunks_mut(SIGNS).zip(attention.chunks(SIGNS)) {
                    let (mut signs, mut column) = (0, 0);
                    let (mut rows, attentions) =
                        (row.chunks_exact_mut(len), attention.chunks_exact(len));
                    let rest = attentions.remainder();
                    for (row, attention) in rows.by_ref().zip(attentions) {
                        let result = Vector::<S, F>::from_slice(simd, row);
                        let attention = Vector::<S, F>::from_slice(simd, attention);
                        let slope = activation.derivative(simd, result);
                        (attention * (grads * slope)).store_slice(row);
                        if activation.slope().is_some() {
                            signs |= result.simd_gt(zero).to_bitmask() << column;
                            column += len;
                        }
                    }
                    for (value, &attention) in rows.into_remainder().iter_mut().zip(rest) {
                        let result = Vector::<S, F>::splat(simd, *value);
                        let slope = activation.derivative(simd, result).as_slice()[0];
                        signs |= u64::from(*value > F::zero()) << column;
                        column += 1;
                        *value = grad * slope * attention;
                    }
                    if activation.slope().is_some()
                        && let Some(saved) = all_signs.next()
                    {
                        *saved = F::from_f64(f64::from(signs as u32));
                    }
                }
            }
        }
    }
}

/// N vectors of columns from `start` on.
#[inline(always)]
fn sum_columns<S: Simd, F: Float, const N: usize>(
    simd: S,
    activation: impl Activation<F>,
    [own, other]: [&[F]; 2],
    x: &[F],
    weight: Slices<'_, F>,
    start: usize,
    row: &mut [F],
) {
    let len = Vector::<S, F>::LEN;
    let columns = start..start + N * len;
    let (own, other) = (&own[columns.clone()], &other[columns.clone()]);
    let mut sums = [Vector::<S, F>::splat(simd, F::zero()); N];
    for n in 0..N {
        let own = Vector::<S, F>::from_slice(simd, &own[n * len..][..len]);
        sums[n] = own + Vector::<S, F>::from_slice(simd, &other[n * len..][..len]);
    }
    for (f, &x) in x.iter().enumerate() {
        let x = Vector::<S, F>::splat(simd, x);
        let weight = &weight.row(f)[columns.clone()];
        for n in 0..N {
            let weight = Vector::<S, F>::from_slice(simd, &weight[n * len..][..len]);
            sums[n] = weight.mul_add(x, sums[n]);
        }
    }
    for n in 0..N {
        sums[n].store_slice(&mut row[start + n * len..][..len]);
    }
    activate(simd, activation, &mut row[columns]);
}

/// sum += Σₜ ds · the derivatives, which are 1 where a sign is set and `slope` elsewhere. Heads have `dim` columns; rows
/// of `saved` end with the signs, and row h of `grads` is ds of head h.
#[inline(never)]
fn add_slopes<F: Float>(
    level: Level,
    slope: F,
    grads: Slices<'_, F>,
    saved: Gather<'_, F>,
    dim: usize,
    sum: &mut [F],
) {
    dispatch!(level, simd => add_slopes_in_vectors(simd, slope, grads, saved, dim, sum));
}

#[inline(always)]
fn add_slopes_in_vectors<S: Simd, F: Float>(
    simd: S,
    slope: F,
    grads: Slices<'_, F>,
    saved: Gather<'_, F>,
    dim: usize,
    sum: &mut [F],
) {
    let len = Vector::<S, F>::LEN;
    let heads = sum.len() / dim.max(1);
    let first = saved.rows.columns - heads * dim.div_ceil(SIGNS);
    let parts = sum.chunks_exact_mut(dim.max(1)).enumerate().flat_map(
        #[inline(always)]
        |(head, sum)| {
            sum.chunks_mut(SIGNS).map(
                #[inline(always)]
                move |sum| (head, sum),
            )
        },
    );
    for (part, (head, sum)) in parts.enumerate() {
        let signs = saved.at.iter().map(
            #[inline(always)]
            |&row| saved.rows.row(row)[first + part].as_f64() as u64,
        );
        let pairs = signs.zip(grads.row(head).iter().copied());
        // If the number of vectors is known at compile time, their sums stay in registers.
        if sum.len() == SIGNS {
            add_slopes_of_part(simd, SIGNS / len, slope, pairs, sum);
        } else {
            add_slopes_of_part(simd, sum.len().div_ceil(len), slope, pairs, sum);
        }
    }
}

/// [`add_slopes`] for the columns of one number, which are so many vectors; pairs are signs and ds.
#[inline(always)]
fn add_slopes_of_part<S: Simd, F: Float>(
    simd: S,
    count: usize,
    slope: F,
    pairs: impl Iterator<Item = (u64, F)>,
    sum: &mut [F],
) {
    let len = Vector::<S, F>::LEN;
    let mut sums = [Vector::<S, F>::splat(simd, F::zero()); SIGNS];
    for (signs, grad) in pairs {
        let small = Vector::<S, F>::splat(simd, slope * grad);
        let grad = Vector::<S, F>::splat(simd, grad);
        for (n, sum) in sums[..count].iter_mut().enumerate() {
            *sum += mask::<S, F>(simd, signs >> (n * len)).select(grad, small);
        }
    }
    for (sum, sums) in sum.chunks_mut(len).zip(sums) {
        sum.iter_mut().zip(sums.as_slice()).for_each(|(sum, &of_tile)| *sum += of_tile);
    }
}

/// sum += Σ of the first rows.
#[inline(never)]
fn add_rows<F: Float>(level: Level, sum: &mut [F], rows: &[F], count: usize) {
    dispatch!(level, _simd => {
        for row in rows.chunks_exact(sum.len().max(1)).take(count) {
            sum.iter_mut().zip(row).for_each(|(sum, &value)| *sum += value);
        }
    });
}
