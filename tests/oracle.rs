//! Softmax attention against plain loops in `f64` (`common::reference`) that share no code with the
//! crate. `common::reference::bounds` derives the allowed error of each number; a separate test checks
//! that faults exceed it.

mod common;

use common::close::error_in_bounds;
use common::reference::{
    self, Answer, Problem,
    bounds::{Bounds, bounds},
};
use graph_attention::ndarray::{Array2, ArrayView2, s};
use graph_attention::{Attention, Causal, Dropout, Flash, Float, Graph, Inputs, ScaledDotProduct};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};

type Rng = Xoshiro256PlusPlus;

/// A random problem, and those parts of it that only the crate takes.
struct Case {
    problem: Problem,
    grad_out: Vec<f64>,
    /// In the caller's order; `None` is dense.
    graph: Option<Graph>,
    causal: Option<Causal>,
    mask: Option<Array2<bool>>,
    bias: Bias,
    dropout: Option<Dropout>,
    /// Pairs × (heads or 1): factors of the weights, also in the problem's `keep`.
    pair_weights: Option<Array2<f64>>,
    explicit_scale: Option<f64>,
}

enum Bias {
    None,
    Matrix,
    PerPair,
    PerHead,
}

fn normal(len: usize, rng: &mut Rng) -> Vec<f64> {
    // Numbers that are exact in f32, so that both precisions solve the same problem.
    (0..len)
        .map(|_| {
            let value: f64 = StandardNormal.sample(rng);
            f64::from(value as f32)
        })
        .collect()
}

fn pick<T: Clone>(choices: &[T], rng: &mut Rng) -> T {
    choices[rng.random_range(0..choices.len())].clone()
}

fn random_case(seed: u64) -> Case {
    let rng = &mut Rng::seed_from_u64(seed);
    let num_queries = pick(&[1, 2, 5, 13, 67, 131], rng);
    let num_keys = pick(&[1, 3, 7, 31, 64, 129], rng);
    let (heads, kv_heads) = pick(&[(1, 1), (2, 2), (3, 1), (4, 2)], rng);
    let (key_dim, value_dim) = (pick(&[1, 3, 17, 40], rng), pick(&[1, 2, 5, 19], rng));

    let is_dense = rng.random();
    let pairs: Vec<(usize, usize)> = if is_dense {
        (0..num_queries * num_keys).map(|pair| (pair / num_keys, pair % num_keys)).collect()
    } else {
        let num_edges = rng.random_range(0..4 * num_queries + 1);
        let edge =
            |rng: &mut Rng| (rng.random_range(0..num_queries), rng.random_range(0..num_keys));
        (0..num_edges).map(|_| edge(rng)).collect()
    };
    let graph = Graph::from_edges(num_queries, num_keys, pairs.iter().copied()).unwrap();
    let causal = pick(
        &[None, None, Some(Causal::TopLeft), Some(Causal::BottomRight), Some(Causal::Offset(3))],
        rng,
    );
    let mask = rng.random::<bool>().then(|| {
        Array2::from_shape_simple_fn((num_queries, num_keys), || rng.random_range(0..4) > 0)
    });
    let visible = |&(query, key): &(usize, usize)| {
        let below_diagonal = match causal {
            None => true,
            Some(Causal::TopLeft) => key <= query,
            Some(Causal::BottomRight) => key + num_queries <= query + num_keys,
            Some(Causal::Offset(offset)) => key <= query + offset,
            Some(other) => unreachable!("{other:?}"),
        };
        below_diagonal && mask.as_ref().is_none_or(|mask| mask[[query, key]])
    };
    let visible = pairs.iter().map(visible).collect();

    let bias_kind = match rng.random_range(0..4) {
        0 if is_dense => Bias::Matrix,
        1 => Bias::PerPair,
        2 => Bias::PerHead,
        _ => Bias::None,
    };
    let logit = |rng: &mut Rng| {
        if rng.random_range(0..8) == 0 { f64::NEG_INFINITY } else { normal(1, rng)[0] }
    };
    let bias = match bias_kind {
        Bias::None => None,
        Bias::Matrix | Bias::PerPair => {
            let shared: Vec<f64> = pairs.iter().map(|_| logit(rng)).collect();
            Some(shared.into_iter().flat_map(|logit| vec![logit; heads]).collect())
        }
        Bias::PerHead => Some((0..pairs.len() * heads).map(|_| logit(rng)).collect()),
    };
    let dropout = rng.random::<bool>().then_some(Dropout { probability: 0.5, seed });
    let pair_weights = rng.random::<bool>().then(|| {
        let columns = pick(&[1, heads], rng);
        Array2::from_shape_simple_fn((pairs.len(), columns), || normal(1, rng)[0])
    });
    let keep = (dropout.is_some() || pair_weights.is_some()).then(|| {
        let all = (0..pairs.len()).flat_map(|pair| (0..heads).map(move |head| (pair, head)));
        let factor = |(pair, head)| {
            let weight = pair_weights.as_ref().map_or(1.0, |weights| {
                weights[[pair, if weights.ncols() == 1 { 0 } else { head }]]
            });
            weight * dropout_of(dropout, pair, head)
        };
        all.map(factor).collect()
    });
    let explicit_scale = pick(&[None, Some(0.25), Some(-2.0)], rng);
    let problem = Problem {
        num_queries,
        num_keys,
        heads,
        kv_heads,
        key_dim,
        value_dim,
        scale: explicit_scale.unwrap_or(1.0 / (key_dim as f64).sqrt()),
        pairs,
        visible,
        bias,
        keep,
        query: normal(num_queries * heads * key_dim, rng),
        key: normal(num_keys * kv_heads * key_dim, rng),
        value: normal(num_keys * kv_heads * value_dim, rng),
    };
    let grad_out = normal(num_queries * heads * value_dim, rng);
    let graph = (!is_dense).then_some(graph);
    let bias = bias_kind;
    Case { problem, grad_out, graph, causal, mask, bias, dropout, pair_weights, explicit_scale }
}

fn dropout_of(dropout: Option<Dropout>, pair: usize, head: usize) -> f64 {
    dropout.map_or(1.0, |dropout| dropout.multiplier(pair, head))
}

fn matrix<F: Float>(data: &[f64], rows: usize) -> Array2<F> {
    let columns = data.len() / rows;
    Array2::from_shape_fn((rows, columns), |(row, column)| {
        F::from_f64(data[row * columns + column])
    })
}

fn flat<F: Float>(array: ArrayView2<'_, F>) -> Vec<f64> {
    array.iter().map(|value| value.as_f64()).collect()
}

#[derive(Clone, Copy, Debug)]
enum Mechanism {
    Plain,
    Flash { queries: usize, keys: usize },
}

/// The crate's output and gradients.
struct Ours {
    answer: Answer,
    /// The gradients of query, key and value.
    grad_inputs: [Vec<f64>; 3],
    grad_bias: Option<Vec<f64>>,
    grad_pair_weights: Option<Array2<f64>>,
}

fn solve<F: Float>(case: &Case, mechanism: Mechanism) -> Ours {
    let p = &case.problem;
    let query: Array2<F> = matrix(&p.query, p.num_queries);
    let key: Array2<F> = matrix(&p.key, p.num_keys);
    let value: Array2<F> = matrix(&p.value, p.num_keys);
    let mut inputs = match &case.graph {
        Some(graph) => Inputs::graph(query.view(), key.view(), value.view(), graph).unwrap(),
        None => Inputs::dense(query.view(), key.view(), value.view()).unwrap(),
    };
    inputs = inputs.with_grouped_heads(p.heads, p.kv_heads).unwrap();
    if let Some(alignment) = case.causal {
        inputs = inputs.with_causal_alignment(alignment);
    }
    if let Some(mask) = &case.mask {
        inputs = inputs.with_mask(mask.view()).unwrap();
    }
    let per_head = |logits: &Vec<f64>| {
        let logit = |(pair, head)| F::from_f64(logits[pair * p.heads + head]);
        Array2::from_shape_fn((p.pairs.len(), p.heads), logit)
    };
    let bias: Option<Array2<F>> = p.bias.as_ref().map(|logits| match case.bias {
        Bias::PerHead | Bias::None => per_head(logits),
        Bias::PerPair => per_head(logits).slice_move(s![.., ..1]),
        Bias::Matrix => Array2::from_shape_fn((p.num_queries, p.num_keys), |(query, key)| {
            F::from_f64(logits[(query * p.num_keys + key) * p.heads])
        }),
    });
    if let Some(bias) = &bias {
        inputs = inputs.with_bias(bias.view()).unwrap();
    }
    if let Some(dropout) = case.dropout {
        inputs = inputs.with_dropout(dropout).unwrap();
    }
    let pair_weights = case.pair_weights.as_ref().map(|weights| weights.mapv(F::from_f64));
    if let Some(weights) = &pair_weights {
        inputs = inputs.with_pair_weights(weights.view()).unwrap();
    }
    let grad_out: Array2<F> = matrix(&case.grad_out, p.num_queries);
    let (partial, attention): (_, Box<dyn Attention<F>>) = match mechanism {
        Mechanism::Plain => {
            let mut plain = ScaledDotProduct::new();
            if let Some(scale) = case.explicit_scale {
                plain = plain.with_scale(scale).unwrap();
            }
            (plain.forward_partial(&inputs).unwrap(), Box::new(plain))
        }
        Mechanism::Flash { queries, keys } => {
            let mut flash = Flash::new().with_tiles(queries, keys).unwrap();
            if let Some(scale) = case.explicit_scale {
                flash = flash.with_scale(scale).unwrap();
            }
            (flash.forward_partial(&inputs).unwrap(), Box::new(flash))
        }
    };
    let (out, saved) = attention.forward_train(&inputs).unwrap();
    assert_eq!(out, partial.out());
    let gradients = attention.backward(&inputs, &saved, grad_out.view()).unwrap();
    Ours {
        answer: Answer {
            out: flat(out.view()),
            log_sum_exp: flat(partial.log_sum_exp().view()),
            weights: flat(attention.attention_weights(&inputs).unwrap().view()),
        },
        grad_pair_weights: gradients.pair_weights.map(|grad| grad.mapv(F::as_f64)),
        grad_bias: gradients.bias.map(|bias| flat(bias.view().into_dimensionality().unwrap())),
        grad_inputs: [gradients.query, gradients.key, gradients.value]
            .map(|grad| flat(grad.view())),
    }
}

/// Sums the oracle's gradients of pairs and heads that share a logit.
fn shared_bias_gradient(case: &Case, per_head: &[f64]) -> Vec<f64> {
    match case.bias {
        Bias::PerHead | Bias::None => per_head.to_vec(),
        Bias::Matrix | Bias::PerPair => {
            per_head.chunks(case.problem.heads).map(|heads| heads.iter().sum()).collect()
        }
    }
}

/// Computes the gradients of the weights of pairs, m_ij p_ij (g_i · v_j), summed over heads that share one, and
/// the bounds of their errors.
fn pair_weights_gradient<F: num_traits::Float>(
    case: &Case,
    expected: &Expected,
    columns: usize,
) -> [Vec<f64>; 2] {
    let p = &case.problem;
    let unit = (F::epsilon().to_f64().unwrap() + f64::EPSILON) / 2.0;
    let tiny = F::min_positive_value().to_f64().unwrap();
    // The sum of value_dim products, three factors, and the sum over heads.
    let after = ((p.value_dim + 4 + p.heads) as f64 * unit).exp_m1();
    let mut sums = [0, 1].map(|_| vec![0.0; p.pairs.len() * columns]);
    for (e, &(i, j)) in p.pairs.iter().enumerate() {
        for h in 0..p.heads {
            let kv_head = h * p.kv_heads / p.heads;
            let product = |c| {
                let g = case.grad_out[(i * p.heads + h) * p.value_dim + c];
                g * p.value[(j * p.kv_heads + kv_head) * p.value_dim + c]
            };
            let exact: f64 = (0..p.value_dim).map(product).sum();
            let terms: f64 = (0..p.value_dim).map(|c| product(c).abs()).sum();
            let keep = dropout_of(case.dropout, e, h);
            let [weight, error] = [&expected.answer.weights, &expected.bounds.weights]
                .map(|of_pairs| of_pairs[e * p.heads + h]);
            let at = e * columns + if columns == 1 { 0 } else { h };
            sums[0][at] += keep * weight * exact;
            sums[1][at] += keep * (error + (weight + error) * after) * terms + tiny;
        }
    }
    sums
}

/// The result of the loops, and the bounds of rounding errors in precision `F`.
struct Expected {
    answer: Answer,
    gradients: reference::Gradients,
    bounds: Bounds,
}

fn expected<F: num_traits::Float>(case: &Case) -> Expected {
    let p = &case.problem;
    // Half an epsilon per operation in F, plus the rounding errors of the loops.
    let unit = (F::epsilon().to_f64().unwrap() + f64::EPSILON) / 2.0;
    let tiny = F::min_positive_value().to_f64().unwrap();
    Expected {
        answer: reference::forward::<f64>(p),
        gradients: reference::backward::<f64>(p, &case.grad_out),
        bounds: bounds(p, &case.grad_out, unit, tiny),
    }
}

/// Returns the largest error, as a multiple of its bound. Infinities and NaN must be equal.
fn worst(actual: &[f64], exact: &[f64], bounds: &[f64]) -> f64 {
    assert_eq!([actual.len(), bounds.len()], [exact.len(); 2]);
    let ratio = |((&actual, &exact), &bound): ((&f64, &f64), &f64)| {
        assert!(bound.is_finite(), "a bound that allows everything");
        error_in_bounds(actual, exact, bound)
    };
    actual.iter().zip(exact).zip(bounds).map(ratio).fold(0.0, f64::max)
}

/// Returns the largest error of each array, as a multiple of its bound.
fn worst_of_answer(actual: &Answer, expected: &Expected) -> [(&'static str, f64); 3] {
    let Expected { answer, bounds, .. } = expected;
    [
        ("out", worst(&actual.out, &answer.out, &bounds.out)),
        ("log_sum_exp", worst(&actual.log_sum_exp, &answer.log_sum_exp, &bounds.log_sum_exp)),
        ("weights", worst(&actual.weights, &answer.weights, &bounds.weights)),
    ]
}

/// Returns the largest error of a mechanism, as a multiple of its bound.
fn check<F: Float + num_traits::Float>(seed: u64, mechanism: Mechanism) -> f64 {
    let case = random_case(seed);
    let ours = solve::<F>(&case, mechanism);
    let expected = expected::<F>(&case);
    let Expected { gradients, bounds, .. } = &expected;
    let [query, key, value] = &ours.grad_inputs;
    let mut all = worst_of_answer(&ours.answer, &expected).to_vec();
    all.extend([
        ("grad query", worst(query, &gradients.query, &bounds.query)),
        ("grad key", worst(key, &gradients.key, &bounds.key)),
        ("grad value", worst(value, &gradients.value, &bounds.value)),
    ]);
    assert_eq!(ours.grad_bias.is_some(), case.problem.bias.is_some());
    if let Some(ours) = &ours.grad_bias {
        let [exact, bounds] =
            [&gradients.bias, &bounds.bias].map(|per_head| shared_bias_gradient(&case, per_head));
        all.push(("grad bias", worst(ours, &exact, &bounds)));
    }
    assert_eq!(ours.grad_pair_weights.is_some(), case.pair_weights.is_some());
    if let Some(ours) = &ours.grad_pair_weights {
        let [exact, bounds] = pair_weights_gradient::<F>(&case, &expected, ours.ncols());
        let ours: Vec<f64> = ours.iter().copied().collect();
        all.push(("grad pair weights", worst(&ours, &exact, &bounds)));
    }
    for (array, worst) in &all {
        let bits = 8 * size_of::<F>();
        let what = format!("seed {seed}, {mechanism:?}, {bits} bits, {array}");
        assert!(*worst <= 1.0, "{what}: the error is {worst} times its bound");
    }
    all.iter().fold(0.0, |largest, (_, worst)| worst.max(largest))
}

const CASES: u64 = 300;

/// Checks every case in both precisions.
fn check_all(mechanism: impl Fn(u64) -> Mechanism) {
    let mut largest = [0f64; 2];
    for seed in 0..CASES {
        let mechanism = mechanism(seed);
        let errors = [check::<f32>(seed, mechanism), check::<f64>(seed, mechanism)];
        largest = [largest[0].max(errors[0]), largest[1].max(errors[1])];
    }
    println!("the largest errors in f32 and f64, as multiples of their bounds: {largest:?}");
}

#[test]
fn scaled_dot_product_is_the_oracle() {
    common::hold_simd();
    check_all(|_| Mechanism::Plain);
}

#[test]
fn flash_is_the_oracle_for_any_tiles() {
    common::hold_simd();
    check_all(|seed| {
        let rng = &mut Rng::seed_from_u64(!seed);
        let sizes = [1, 3, 31, 64, 67, 1000];
        Mechanism::Flash { queries: pick(&sizes, rng), keys: pick(&sizes, rng) }
    });
}

/// A fault to make in the loops.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// A relative error of 10⁻⁵.
    Scale,
    /// One key is left out of one query's row.
    Key,
    /// The sums are not rescaled when the maximum rises, halfway through a row.
    Rescale,
    /// Σ p dp is left out of the gradient of one row's logits.
    Delta,
    /// One pair's weight is computed from its logit rounded to half the digits.
    Logit,
}

/// Returns whether a faulty result exceeds the bounds of `F`; `None` if the fault changes nothing.
fn is_caught<F: num_traits::Float>(case: &Case, fault: Fault) -> Option<bool> {
    let p = &case.problem;
    let expected = expected::<F>(case);
    let rng = &mut Rng::seed_from_u64(17);
    // A pair whose weight is neither tiny nor nearly 1, and the others of its row.
    let counts = |&at: &usize| (0.01..0.99).contains(&expected.answer.weights[at]);
    let counting: Vec<usize> = (0..expected.answer.weights.len()).filter(counts).collect();
    let at = (!counting.is_empty()).then(|| pick(&counting, rng))?;
    let (pair, head) = (at / p.heads, at % p.heads);
    let query = p.pairs[pair].0;
    let row = query * p.heads + head;
    let mut faulty = p.clone();
    let none = vec![0.0; p.pairs.len() * p.heads];
    let bias = faulty.bias.get_or_insert(none);
    let weights = &expected.answer.weights;
    match fault {
        Fault::Scale => faulty.scale *= 1.0 + 1e-5,
        Fault::Key => bias[at] = f64::NEG_INFINITY,
        Fault::Logit => bias[at] += f64::sqrt(F::epsilon().to_f64().unwrap()),
        Fault::Rescale => {
            // The rise of the maximum, in units of the logits.
            let of_row: Vec<usize> = (0..p.pairs.len())
                .filter(|&e| p.pairs[e].0 == query && weights[e * p.heads + head] > 0.0)
                .map(|e| e * p.heads + head)
                .collect();
            let (before, after) = of_row.split_at(of_row.len() / 2);
            let max = |ats: &[usize]| ats.iter().fold(0.0, |max, &at| f64::max(max, weights[at]));
            let rise = (max(after) / max(before)).ln();
            if !(rise > 0.0 && rise.is_finite()) {
                return None;
            }
            before.iter().for_each(|&at| bias[at] += rise);
        }
        Fault::Delta => {
            let columns = row * p.value_dim..(row + 1) * p.value_dim;
            let out = &expected.answer.out[columns.clone()];
            let delta: f64 = out.iter().zip(&case.grad_out[columns]).map(|(o, g)| o * g).sum();
            if delta == 0.0 {
                return None;
            }
            let mut grad = reference::backward::<F>(p, &case.grad_out).bias;
            grad[at] += weights[at] * delta;
            return Some(worst(&grad, &expected.gradients.bias, &expected.bounds.bias) > 1.0);
        }
    }
    let answer = reference::forward::<F>(&faulty);
    Some(worst_of_answer(&answer, &expected).iter().any(|(_, worst)| *worst > 1.0))
}

#[test]
fn faults_are_farther_off_than_roundings() {
    common::hold_simd();
    fn caught<F: num_traits::Float>(fault: Fault) -> (usize, usize) {
        let caught: Vec<bool> =
            (0..CASES).filter_map(|seed| is_caught::<F>(&random_case(seed), fault)).collect();
        (caught.iter().filter(|caught| **caught).count(), caught.len())
    }
    for fault in [Fault::Scale, Fault::Key, Fault::Rescale, Fault::Delta, Fault::Logit] {
        for (precision, (caught, all)) in
            [("f32", caught::<f32>(fault)), ("f64", caught::<f64>(fault))]
        {
            assert!(all >= 100, "{fault:?} changes only {all} cases");
            // In f32, small faults are within the bounds of sums of many terms.
            let is_small = matches!(fault, Fault::Scale | Fault::Logit) && precision == "f32";
            let enough = if is_small { all * 9 / 10 } else { all };
            assert!(caught >= enough, "{fault:?} in {precision}: {caught} of {all} caught");
        }
    }
}

#[test]
fn the_loops_keep_their_own_bounds() {
    common::hold_simd();
    for seed in 0..CASES {
        let case = random_case(seed);
        let expected = expected::<f32>(&case);
        for (array, worst) in worst_of_answer(&reference::forward::<f32>(&case.problem), &expected)
        {
            assert!(worst <= 1.0, "seed {seed}, {array}: {worst}");
        }
    }
}

#[test]
fn only_the_same_infinity_is_no_error() {
    common::hold_simd();
    let (infinity, nan) = (f64::INFINITY, f64::NAN);
    let ratio = |actual: f64, exact: f64| worst(&[actual], &[exact], &[0.5]);
    for number in [infinity, -infinity, nan, 0.0, 3.0] {
        assert_eq!(ratio(number, number), 0.0);
    }
    for (a, b) in [(infinity, -infinity), (infinity, nan), (infinity, 3.0), (nan, 3.0)] {
        assert_eq!([ratio(a, b), ratio(b, a)], [infinity; 2], "{a} and {b}");
    }
    assert_eq!(ratio(3.0, 4.0), 2.0);
    assert_eq!(worst(&[3.0], &[4.0], &[0.0]), infinity);
}
