//! The backward pass row by row: once by query, and once by key.

use super::dominant::{PairDistance, add_point};
use super::pairs::{MASS, PairGradients, Pairs as VectorOfPairs, RADIUS, TERMS, Terms, vjp};
use super::{HyperbolicProblem, Lanes, Mass, Radius, splat_all};
use crate::element::try_zeros;
use crate::error::Result;
use crate::inputs::{Pair, head_columns};
use crate::kernels::Float;
use crate::kernels::gathered::{Columns, Gather, Weights};
use crate::kernels::primitives::matmul::Vector;
use crate::kernels::problem::{Rows, Slices};
use crate::kernels::rows::{
    Outputs, Pairs, Part, Tile, add_bias_gradients, add_to_row, add_up, for_each_part, level_for,
    parts,
};
use fearless_simd::{Level, Simd, SimdBase};
use ndarray::{Array2, ArrayViewMut3};
use std::mem;

/// The rows that are summed for gradients: directions times sinh R / 2, without NaN and infinities.
#[derive(Debug)]
pub struct Points<F: Float> {
    /// num_queries × heads · key_dim.
    pub(crate) query: Rows<'static, F>,
    /// num_keys × kv_heads · key_dim.
    pub(crate) key: Rows<'static, F>,
}

/// The inputs of the backward pass: the gradients of the sums.
#[derive(Debug)]
pub struct Upstream<F: Float> {
    /// w and û, num_queries × heads · dim.
    pub(crate) weights: Rows<'static, F>,
    pub(crate) directions: Rows<'static, F>,
    /// The gradient of a value's direction without the weight, without NaN and infinities.
    pub(crate) sums: Rows<'static, F>,
    /// num_queries × heads.
    pub(crate) terms: Vec<Terms<F>>,
    /// Whether all spreads are 0, so that distances to û are not needed.
    pub(crate) is_linear: bool,
    /// The smallest weight of a dominant pair; infinite if the sums are over more pairs than the problem has: the
    /// gradients of its logits then do not sum to zero.
    pub(crate) dominant: F,
}

/// The gradients of points in polar form. The gradient of a direction u is `directions` times sinh R / 2,
/// or times sinh R for values.
#[derive(Debug)]
pub struct PointGradients<F> {
    /// num_queries × heads · key_dim, and × heads.
    pub(crate) query: [Array2<F>; 2],
    pub(crate) key: [Array2<F>; 2],
    pub(crate) value: [Array2<F>; 2],
    /// The gradient of κ, num_queries × heads.
    pub(crate) kappa: Array2<F>,
}

impl<F: Float> PointGradients<F> {
    /// Creates zeros for the wanted gradients: by query and by key.
    pub(super) fn zeros(
        problem: &HyperbolicProblem<'_, F>,
        [by_query, by_key]: [bool; 2],
    ) -> Result<Self> {
        let softmax = &problem.softmax;
        let inputs = &softmax.inputs;
        let num_queries = if by_query { inputs.num_queries() } else { 0 };
        let num_keys = if by_key { inputs.num_keys() } else { 0 };
        let zeros = |rows, columns| try_zeros("gradients", rows, columns);
        let points = |rows, heads, dim| Ok([zeros(rows, heads * dim)?, zeros(rows, heads)?]);
        Ok(Self {
            query: points(num_queries, softmax.heads, softmax.key_dim)?,
            key: points(num_keys, inputs.num_kv_heads(), softmax.key_dim)?,
            value: points(num_keys, inputs.num_kv_heads(), problem.dim)?,
            kappa: zeros(num_queries, softmax.heads)?,
        })
    }
}

/// Computes the gradients; those of queries and κ only if `by_query`, those of keys and values only if
/// `by_key`. Adds the gradients of the logits of all pairs to `grad_bias`.
pub(in super::super) fn backward<F: Float>(
    problem: &HyperbolicProblem<'_, F>,
    points: &Points<F>,
    upstream: &Upstream<F>,
    tile_len: usize,
    level: Level,
    [by_query, by_key]: [bool; 2],
    mut grad_bias: Option<ArrayViewMut3<'_, F>>,
) -> Result<PointGradients<F>> {
    let softmax = &problem.softmax;
    let inputs = &softmax.inputs;
    let (num_queries, heads) = (inputs.num_queries(), softmax.heads);
    let mut grads = PointGradients::zeros(problem, [by_query, by_key])?;
    let level = level_for::<F>(level, [softmax.key_dim, problem.dim]);
    let pass = |pairs| Pass { problem, points, upstream, dominant_logits: None, pairs, tile_len };

    // Always by query, because only then are the gradients of all logits known.
    let mut dominant_logits: Array2<F> = try_zeros("gradients", num_queries, heads)?;
    {
        let pairs = Pairs::by_query(inputs);
        let pass = pass(pairs);
        let parts = parts(pairs);
        let mut unwanted = [heads * softmax.key_dim, heads, heads]
            .map(|columns| Array2::zeros((if by_query { 0 } else { num_queries }, columns)));
        let by_row = if by_query {
            let [directions, radii] = grads.query.each_mut();
            [directions.view_mut(), radii.view_mut(), grads.kappa.view_mut()]
        } else {
            unwanted.each_mut().map(|array| array.view_mut())
        };
        let [directions, radii, kappa] = by_row;
        let by_row = [directions, radii, kappa, dominant_logits.view_mut()];
        let columns = if grad_bias.is_some() { heads } else { 0 };
        let mut grad_logits: Array2<F> = try_zeros("grads.bias", inputs.num_pairs(), columns)?;
        let outputs = Outputs::by_row(by_row, &parts);
        let outputs = Outputs {
            by_row: outputs.by_row,
            by_slot: [grad_logits.view_mut()],
            by_part: outputs.by_part,
        };
        for_each_part(
            &parts,
            softmax.work(),
            outputs,
            |part, outputs| pass.queries(level, part, outputs),
            add_up,
        );
        add_bias_gradients(softmax, &grad_logits, &mut grad_bias);
    }
    if by_key {
        let pairs = Pairs::by_key(inputs);
        let pass = Pass { dominant_logits: Some(&dominant_logits), ..pass(pairs) };
        let parts = parts(pairs);
        let ([key, key_radii], [value, value_radii]) =
            (grads.key.each_mut(), grads.value.each_mut());
        let by_row = [key, key_radii, value, value_radii].map(|array| array.view_mut());
        for_each_part(
            &parts,
            softmax.work(),
            Outputs::by_row(by_row, &parts),
            |part, outputs| pass.keys(level, part, outputs),
            add_up,
        );
    }
    Ok(grads)
}

/// One pass over the pairs, summing the gradients of one side.
struct Pass<'p, F: Float> {
    problem: &'p HyperbolicProblem<'p, F>,
    points: &'p Points<F>,
    upstream: &'p Upstream<F>,
    /// The gradients of the logits of dominant pairs, num_queries × heads, when known.
    dominant_logits: Option<&'p Array2<F>>,
    pairs: Pairs<'p>,
    tile_len: usize,
}

/// Buffers of a pass, each with a number for every head and pair of a tile.
struct Scratch<F> {
    tile: Tile<F>,
    key_columns: Columns<F>,
    value_columns: Columns<F>,
    squared: Vec<F>,
    products: Vec<F>,
    spreads: Vec<F>,
    /// The factors of the directions of pairs.
    directions: Vec<F>,
    grad_logits: Vec<F>,
    /// For each head, the sum of the gradients of the logits of a query so far, and the pair with nearly
    /// all weight, with its slot.
    sums: Vec<F>,
    dominant: Vec<Option<(Pair, usize)>>,
    /// For one head: bias, multiplier and dominant logit; gathered data of queries and keys.
    pairs: Lanes<F, 3>,
    queries: Lanes<F, RADIUS>,
    terms: Lanes<F, TERMS>,
    keys: Lanes<F, RADIUS>,
    masses: Lanes<F, MASS>,
    ones: Vec<F>,
}

/// Sums over the pairs of a tile for one head: the gradients of the own radius, and of κ or the value's
/// radius.
type Sums<F> = [F; 2];

impl<'p, F: Float> Pass<'p, F> {
    fn scratch(&self, level: Level, own_are_keys: bool) -> Scratch<F> {
        let softmax = &self.problem.softmax;
        let columns = |dim| {
            Columns::new(level, softmax.heads, dim, |head| {
                let [query, key] = [head * dim, softmax.kv_head(head) * dim];
                if own_are_keys { [key, query] } else { [query, key] }
            })
        };
        let tile = Tile::new(level, softmax.heads, self.pairs.tile_len(self.tile_len));
        let (len, stride) = (tile.weights.len(), tile.stride);
        let zeros = || vec![F::zero(); len];
        Scratch {
            key_columns: columns(softmax.key_dim),
            value_columns: columns(self.problem.dim),
            squared: zeros(),
            products: zeros(),
            spreads: zeros(),
            directions: zeros(),
            grad_logits: zeros(),
            sums: vec![F::zero(); softmax.heads],
            dominant: vec![None; softmax.heads],
            pairs: Lanes::new(stride),
            queries: Lanes::new(stride),
            terms: Lanes::new(stride),
            keys: Lanes::new(stride),
            masses: Lanes::new(stride),
            ones: vec![F::one(); softmax.heads],
            tile,
        }
    }

    fn queries(&self, level: Level, part: &Part, outputs: Outputs<'_, F, 4, 1>) {
        let [mut grad_directions, mut grad_radii, mut grad_kappa, mut dominant_logits] =
            outputs.by_row;
        let [mut grad_of_slots] = outputs.by_slot;
        let Self { problem, upstream, .. } = self;
        let softmax = &problem.softmax;
        let mut scratch = self.scratch(level, false);
        let own: [Slices<'_, F>; 3] =
            [softmax.query.slices(), upstream.weights.slices(), upstream.directions.slices()];
        let others =
            [softmax.key.slices(), problem.directions.slices(), problem.directions.slices()];
        let mut sum = vec![F::zero(); own[0].columns];
        for (r, mut row) in part.rows(self.pairs).enumerate() {
            let query = row.row;
            sum.fill(F::zero());
            while scratch.tile.fill(softmax, &mut row, &others[..2]) {
                self.products(own.map(|rows| rows.row(query)), others, &mut scratch);
                for head in 0..softmax.heads {
                    let [radius, kappa] = self.differentiate::<false>(query, head, &mut scratch);
                    grad_radii[[r, head]] += radius;
                    // s = −κ ln 2 · log₂ e^{d/2}
                    grad_kappa[[r, head]] -= kappa * F::from_f64(std::f64::consts::LN_2);
                }
                let Scratch { tile, key_columns, directions, grad_logits, ones, .. } = &scratch;
                let weights =
                    Weights { factors: Some(ones), weights: directions, stride: tile.stride };
                let points = Gather { rows: self.points.key.slices(), at: &tile.others };
                key_columns.add_weighted(&mut sum, weights, points);
                tile.store(grad_logits, part.slots.start, &mut grad_of_slots);
            }
            for head in 0..softmax.heads {
                let grad_logit = -mem::take(&mut scratch.sums[head]);
                dominant_logits[[r, head]] = grad_logit;
                let Some((pair, slot)) = scratch.dominant[head].take() else { continue };
                let distance = PairDistance::new(problem, pair, head);
                let of_logit = distance.vjp(problem.kappa, grad_logit.as_f64());
                grad_radii[[r, head]] += of_logit.query;
                grad_kappa[[r, head]] += of_logit.kappa;
                let of_key = head_columns(softmax.kv_head(head), softmax.key_dim);
                let point = &self.points.key.slices().row(pair.key)[of_key];
                let of_query = head_columns(head, softmax.key_dim);
                add_point(&mut sum[of_query], of_logit.direction, point);
                if grad_of_slots.ncols() > 0 {
                    grad_of_slots[[slot - part.slots.start, head]] += grad_logit;
                }
            }
            add_to_row(grad_directions.row_mut(r), F::one(), &sum);
        }
    }

    fn keys(&self, level: Level, part: &Part, outputs: Outputs<'_, F, 4, 0>) {
        let [mut grad_keys, mut grad_key_radii, mut grad_values, mut grad_value_radii] =
            outputs.by_row;
        let Self { problem, upstream, .. } = self;
        let softmax = &problem.softmax;
        let mut scratch = self.scratch(level, true);
        let own: [Slices<'_, F>; 3] =
            [softmax.key.slices(), problem.directions.slices(), problem.directions.slices()];
        let others =
            [softmax.query.slices(), upstream.weights.slices(), upstream.directions.slices()];
        let mut sum = vec![F::zero(); own[0].columns];
        let mut value_sum = vec![F::zero(); own[1].columns];
        for (r, mut row) in part.rows(self.pairs).enumerate() {
            let key = row.row;
            sum.fill(F::zero());
            value_sum.fill(F::zero());
            while scratch.tile.fill(softmax, &mut row, &others[..2]) {
                self.products(own.map(|rows| rows.row(key)), others, &mut scratch);
                for head in 0..softmax.heads {
                    let [radius, value] = self.differentiate::<true>(key, head, &mut scratch);
                    grad_key_radii[[r, softmax.kv_head(head)]] += radius;
                    grad_value_radii[[r, softmax.kv_head(head)]] += value;
                }
                let Scratch { tile, key_columns, value_columns, directions, ones, .. } = &scratch;
                let weights =
                    Weights { factors: Some(ones), weights: directions, stride: tile.stride };
                let points = Gather { rows: self.points.query.slices(), at: &tile.others };
                key_columns.add_weighted(&mut sum, weights, points);
                let sums = Gather { rows: upstream.sums.slices(), at: &tile.others };
                value_columns.add_weighted(&mut value_sum, tile.weights(Some(ones)), sums);
            }
            add_to_row(grad_keys.row_mut(r), F::one(), &sum);
            add_to_row(grad_values.row_mut(r), F::one(), &value_sum);
        }
    }

    /// Computes the squared distances and products of the own row with the rows of the tile.
    fn products(&self, own: [&[F]; 3], others: [Slices<'_, F>; 3], scratch: &mut Scratch<F>) {
        let Scratch { tile, key_columns, value_columns, squared, products, spreads, .. } = scratch;
        let [points, weights, directions] = others.map(|rows| Gather { rows, at: &tile.others });
        key_columns.squared_distances(own[0], points, squared, tile.stride);
        value_columns.dots(own[1], weights, products, tile.stride);
        if !self.upstream.is_linear {
            value_columns.squared_distances(own[2], directions, spreads, tile.stride);
        }
    }

    /// Overwrites the weights, directions and gradients of the logits of a head; returns its sums.
    #[inline(never)]
    fn differentiate<const OWN_IS_KEY: bool>(
        &self,
        own: usize,
        head: usize,
        scratch: &mut Scratch<F>,
    ) -> Sums<F> {
        dispatch!(scratch.tile.level, simd => {
            self.differentiate_in_vectors::<_, OWN_IS_KEY>(simd, own, head, scratch)
        })
    }

    #[inline(always)]
    fn differentiate_in_vectors<S: Simd, const OWN_IS_KEY: bool>(
        &self,
        simd: S,
        own: usize,
        head: usize,
        scratch: &mut Scratch<F>,
    ) -> Sums<F> {
        let Self { problem, upstream, dominant_logits, .. } = self;
        let softmax = &problem.softmax;
        let Scratch { tile, pairs, queries, terms, keys, masses, .. } = scratch;
        pairs.fill(tile.pairs.iter().map(|&pair| {
            let bias = softmax.bias_of(pair, head);
            let dominant = dominant_logits.map_or(F::zero(), |logits| logits[[pair.query, head]]);
            let bias = bias.unwrap_or(F::neg_infinity());
            [bias, softmax.multiplier(pair, head), dominant]
        }));
        let [of_head, vectors] = tile.of_head(head);
        let count = of_head.len();
        pairs.data[count..vectors.len()].fill(F::neg_infinity());
        let query_at = |query: usize| query * softmax.heads + head;
        let key_at = |key: usize| problem.key_at(key, head);
        if OWN_IS_KEY {
            let at = || tile.pairs.iter().map(|pair| query_at(pair.query));
            queries.fill(at().map(|at| problem.query[at].array()));
            terms.fill(at().map(|at| upstream.terms[at].array()));
        } else {
            let at = || tile.pairs.iter().map(|pair| key_at(pair.key));
            keys.fill(at().map(|at| problem.key[at].array()));
            masses.fill(at().map(|at| problem.masses[at].array()));
        }
        let own_query = (!OWN_IS_KEY).then(|| {
            let at = query_at(own);
            (
                splat_all(simd, problem.query[at].array()),
                splat_all(simd, upstream.terms[at].array()),
            )
        });
        let own_key = OWN_IS_KEY.then(|| {
            // The heads of the keys; each head of the queries reads one.
            let at = problem.key_at(own, head);
            (splat_all(simd, problem.key[at].array()), splat_all(simd, problem.masses[at].array()))
        });

        let len = Vector::<S, F>::LEN;
        let mut sums = [Vector::<S, F>::splat(simd, F::zero()); 2];
        let mut sum_of_logits = Vector::<S, F>::splat(simd, F::zero());
        for at in (0..vectors.len()).step_by(len) {
            let (query, terms) = match own_query {
                Some(own) => own,
                None => (queries.load(simd, at), terms.load(simd, at)),
            };
            let (key, mass) = match own_key {
                Some(own) => own,
                None => (keys.load(simd, at), masses.load(simd, at)),
            };
            let [bias, multiplier, dominant_logit] = pairs.load(simd, at);
            let place = vectors.start + at..vectors.start + at + len;
            let load = |from: &[F]| Vector::<S, F>::from_slice(simd, &from[place.clone()]);
            let pairs = VectorOfPairs {
                query: Radius::of(query),
                key: Radius::of(key),
                mass: Mass::of(mass),
                terms: Terms::of(terms),
                squared: load(&scratch.squared),
                product: load(&scratch.products),
                spread: load(&scratch.spreads),
                bias,
                multiplier,
                dominant_logit,
            };
            let PairGradients {
                weight,
                logit,
                direction,
                query,
                key,
                value,
                factor,
                mut dominates,
            } = vjp::<S, F>(simd, &pairs, problem.kappa, problem.factor(), upstream.dominant);
            if !OWN_IS_KEY {
                sum_of_logits += logit;
                while dominates != 0 {
                    let t = at + dominates.trailing_zeros() as usize;
                    scratch.dominant[head] = Some((tile.pairs[t], tile.slots[t]));
                    dominates &= dominates - 1;
                }
            }
            weight.store_slice(&mut tile.weights[place.clone()]);
            direction.store_slice(&mut scratch.directions[place.clone()]);
            logit.store_slice(&mut scratch.grad_logits[place]);
            sums[0] += if OWN_IS_KEY { key } else { query };
            sums[1] += if OWN_IS_KEY { value } else { factor };
        }
        scratch.sums[head] += sum_of_logits.reduce_sum();
        [sums[0].reduce_sum(), sums[1].reduce_sum()]
    }
}
