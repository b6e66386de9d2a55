//! Bounds of the rounding errors of every number of an output or gradient.
//!
//! Every operation returns its exact result times 1 + δ, |δ| ≤ u, or, below the smallest normal number, a
//! result with an error below that number (it may be 0). So a product of k such factors lies
//! within e^{ku} of 1. The error of a sum of n terms is at most (e^{nu} − 1) Σ |terms|, in any order,
//! by tiles or lanes, fused or not (Higham 2002, *Accuracy and Stability of Numerical Algorithms*,
//! §4.2). Hence a bound is a number of roundings times the sum of the absolute values of the terms;
//! both follow here from the equations in [`super`]. Nothing is fitted to an implementation, which may
//!
//! * work in units of ln 2, which costs a logit one more rounding per conversion,
//! * subtract from the logits any maximum so far and rescale when a larger one comes, at most once per
//!   pair,
//! * divide by the sum, or subtract its logarithm from the logits less their maximum, but *not* subtract
//!   a rounded log-sum-exp: its error grows with the logits,
//! * form delta_i as Σ_j p_ij dp_ij or as g_i · out_i.
//!
//! In the sums over the pairs of one row, `i` and `h` are fixed.

use super::{Inputs, Problem, backward, forward, softmax};

/// The number of roundings that an exponential or logarithm counts as: two units in the last place.
const ELEMENTARY: f64 = 4.0;

/// The bound of the error of each number of an [`Answer`](super::Answer) and of
/// [`Gradients`](super::Gradients).
pub(crate) struct Bounds {
    pub(crate) out: Vec<f64>,
    pub(crate) log_sum_exp: Vec<f64>,
    pub(crate) weights: Vec<f64>,
    pub(crate) query: Vec<f64>,
    pub(crate) key: Vec<f64>,
    pub(crate) value: Vec<f64>,
    /// Includes the roundings of a sum over heads that share a logit.
    pub(crate) bias: Vec<f64>,
}

/// The sums over a row.
#[derive(Clone, Default)]
struct Row {
    /// The number of pairs that are not skipped.
    pairs: f64,
    max: f64,
    /// The relative error of Z, as a number of roundings.
    sum: f64,
    /// ln Z
    log_sum: f64,
    delta: f64,
    delta_error: f64,
}

/// `unit` is u, the relative error of one operation; `tiny` is the smallest normal number.
pub(crate) fn bounds(p: &Problem, grad_out: &[f64], unit: f64, tiny: f64) -> Bounds {
    // The error of 1 after a number of roundings.
    let after = |roundings: f64| (roundings * unit).exp_m1();
    let x = Inputs::<f64>::of(p);
    let softmax = softmax(p, &x);
    let (answer, gradients) = (forward::<f64>(p), backward::<f64>(p, grad_out));
    // Every pair that is not skipped, for each head: (e, i, j, h).
    let live = || {
        let pairs = p.pairs.iter().enumerate();
        let all = pairs.flat_map(|(e, &(i, j))| (0..p.heads).map(move |h| (e, i, j, h)));
        all.filter(|&(e, _, _, h)| softmax.logits[p.pair_at(e, h)].is_some())
    };
    let weight = |e, h| answer.weights[p.pair_at(e, h)];

    let mut rows = vec![Row { max: f64::NEG_INFINITY, ..Row::default() }; p.num_queries * p.heads];
    let mut seen_by = vec![0.0; p.num_keys * p.kv_heads];
    for (e, i, j, h) in live() {
        let row = &mut rows[p.row_at(i, h)];
        row.pairs += 1.0;
        row.max = row.max.max(softmax.logits[p.pair_at(e, h)].unwrap());
        seen_by[j * p.kv_heads + p.kv_head(h)] += 1.0;
    }

    // s_ij: in each of the terms scale · q · k, one rounding of scale, one of 1 / ln 2, two products,
    // one product in the sum and at most key_dim additions. The bias is converted and added. What is
    // subtracted (the maximum, by and by, and ln Z) rounds the differences s − m and ln p. An error of
    // s is one of e^s, relative to it.
    let mut exponential = vec![0.0; p.pairs.len() * p.heads];
    for (e, i, j, h) in live() {
        let product = |c| x.query[p.query_at(i, h, c)] * x.key[p.key_at(j, h, c)];
        let products: f64 = (0..p.key_dim).map(|c| f64::abs(x.scale * product(c))).sum();
        let below_max = rows[p.row_at(i, h)].max - softmax.logits[p.pair_at(e, h)].unwrap();
        exponential[p.pair_at(e, h)] = (p.key_dim as f64 + 5.0) * products
            + 3.0 * x.bias[p.pair_at(e, h)].abs()
            + 2.0 * below_max
            + ELEMENTARY;
    }

    // Z_i: each of its n terms is wrong as its exponential is; then n additions, and n times an
    // exponential and a product that rescale what has been added so far.
    let of_sum = |row: &Row| row.pairs * (ELEMENTARY + 2.0);
    for (e, i, _, h) in live() {
        rows[p.row_at(i, h)].sum += weight(e, h) * exponential[p.pair_at(e, h)];
    }
    for (row, log_sum_exp) in rows.iter_mut().zip(&answer.log_sum_exp) {
        row.sum += of_sum(row);
        row.log_sum = log_sum_exp - row.max;
    }

    // p_ij: the exponential and Z; then a division or a reciprocal and a product, or ln Z with its
    // roundings.
    // The error of p_ij after more roundings.
    let error_of_weight = |rows: &[Row], e, i, h, more: f64| {
        let row = &rows[p.row_at(i, h)];
        let division = (ELEMENTARY + 2.0) * row.log_sum.max(1.0);
        let roundings = exponential[p.pair_at(e, h)] + row.sum + division + more;
        weight(e, h) * after(roundings) + tiny
    };
    let mut weights = vec![0.0; p.pairs.len() * p.heads];
    for (e, i, _, h) in live() {
        weights[p.pair_at(e, h)] = error_of_weight(&rows, e, i, h, 0.0);
    }

    // L_i = m_i + ln Z_i, with m converted from units of ln 2.
    let log_sum_exp = rows.iter().map(|row| {
        let roundings = row.sum + ELEMENTARY * row.log_sum.max(1.0) + 4.0 * row.max.abs();
        if row.pairs == 0.0 { 0.0 } else { after(roundings) }
    });
    let log_sum_exp = log_sum_exp.collect();

    // out_i and dv_j, products of three factors, one of which may be a product itself. The terms of out are
    // rescaled as those of Z.
    let mut out = vec![0.0; answer.out.len()];
    let mut value = vec![0.0; x.value.len()];
    for (e, i, j, h) in live() {
        let keep = x.keep[p.pair_at(e, h)].abs();
        let in_out = error_of_weight(&rows, e, i, h, of_sum(&rows[p.row_at(i, h)]) + 3.0);
        let in_value =
            error_of_weight(&rows, e, i, h, seen_by[j * p.kv_heads + p.kv_head(h)] + 3.0);
        for c in 0..p.value_dim {
            let (o, v) = (p.out_at(i, h, c), p.value_at(j, h, c));
            out[o] += in_out * keep * x.value[v].abs() + tiny;
            value[v] += in_value * keep * grad_out[o].abs() + tiny;
        }
    }

    // dp_ij, a sum of value_dim products with the two factors of keep_ij: itself, and Σ |terms|.
    let grad_weight = |e, i, j, h| -> [f64; 2] {
        let product = |c| grad_out[p.out_at(i, h, c)] * x.value[p.value_at(j, h, c)];
        let keep = x.keep[p.pair_at(e, h)];
        [
            keep * (0..p.value_dim).map(product).sum::<f64>(),
            keep.abs() * (0..p.value_dim).map(|c| f64::abs(product(c))).sum::<f64>(),
        ]
    };
    let of_grad_weight = p.value_dim as f64 + 2.0;
    // delta_i, whichever of the sums over j and c is the inner one.
    for (e, i, j, h) in live() {
        let [exact, terms] = grad_weight(e, i, j, h);
        let more = of_sum(&rows[p.row_at(i, h)]) + of_grad_weight + 2.0;
        let error = error_of_weight(&rows, e, i, h, more) * terms;
        let row = &mut rows[p.row_at(i, h)];
        row.delta += weight(e, h) * exact;
        row.delta_error += error;
    }

    // ds_ij = p_ij · (dp_ij − delta_i): the error of p times the exact difference, and p times the errors
    // of dp and delta, which do not shrink if the two cancel.
    let mut logit = vec![0.0; p.pairs.len() * p.heads];
    for (e, i, j, h) in live() {
        let ([exact, terms], row) = (grad_weight(e, i, j, h), &rows[p.row_at(i, h)]);
        let error = error_of_weight(&rows, e, i, h, 2.0);
        logit[p.pair_at(e, h)] = error * (exact - row.delta).abs()
            + (weight(e, h) + error) * (after(of_grad_weight) * terms + row.delta_error)
            + tiny;
    }

    // dq_i, dk_j, and the sum over heads that share a bias: n terms ds_ij times two factors.
    let term = |at: usize, roundings: f64| {
        logit[at] + after(roundings) * (gradients.bias[at].abs() + logit[at])
    };
    let mut query = vec![0.0; x.query.len()];
    let mut key = vec![0.0; x.key.len()];
    let mut bias = vec![0.0; logit.len()];
    for (e, i, j, h) in live() {
        let at = p.pair_at(e, h);
        let in_query = term(at, rows[p.row_at(i, h)].pairs + 3.0) * x.scale.abs();
        let in_key = term(at, seen_by[j * p.kv_heads + p.kv_head(h)] + 3.0) * x.scale.abs();
        for c in 0..p.key_dim {
            let (q, k) = (p.query_at(i, h, c), p.key_at(j, h, c));
            query[q] += in_query * x.key[k].abs() + tiny;
            key[k] += in_key * x.query[q].abs() + tiny;
        }
        bias[at] = term(at, p.heads as f64);
    }
    Bounds { out, log_sum_exp, weights, query, key, value, bias }
}
