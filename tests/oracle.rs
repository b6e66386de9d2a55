//! Softmax attention against straight-line loops (`reference`) that share no code with the crate.
//!
//! In `f32` the tolerance is what the loops themselves lose: the error against `f64` may be at most
//! twice that of the loops in `f32`, for gradients three times.

mod reference;

use graph_attention::ndarray::{Array2, ArrayView2, s};
use graph_attention::{Attention, Causal, Dropout, Flash, Float, Graph, Inputs, ScaledDotProduct};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};
use reference::{Answer, Problem};

type Rng = Xoshiro256PlusPlus;

/// A random problem, and the parts of it that only the crate knows about.
struct Case {
    problem: Problem,
    grad_out: Vec<f64>,
    /// In the caller's order; `None` is dense.
    graph: Option<Graph>,
    causal: Option<Causal>,
    mask: Option<Array2<bool>>,
    bias: Bias,
    dropout: Option<Dropout>,
    explicit_scale: Option<f64>,
}

enum Bias {
    None,
    Matrix,
    PerPair,
    PerHead,
}

fn normal(len: usize, rng: &mut Rng) -> Vec<f64> {
    // Numbers that f32 holds exactly, so that both precisions solve one problem.
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
    let causal = pick(&[None, None, Some(Causal::TopLeft), Some(Causal::BottomRight)], rng);
    let mask = rng.random::<bool>().then(|| {
        Array2::from_shape_simple_fn((num_queries, num_keys), || rng.random_range(0..4) > 0)
    });
    let visible = |&(query, key): &(usize, usize)| {
        let below_diagonal = match causal {
            None => true,
            Some(Causal::TopLeft) => key <= query,
            Some(Causal::BottomRight) => key + num_queries <= query + num_keys,
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
    let keep = dropout.map(|dropout| {
        let pairs = 0..pairs.len();
        pairs.flat_map(|pair| (0..heads).map(move |head| dropout.multiplier(pair, head))).collect()
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
    Case { problem, grad_out, graph, causal, mask, bias: bias_kind, dropout, explicit_scale }
}

fn matrix<F: Float>(data: &[f64], rows: usize) -> Array2<F> {
    let columns = data.len() / rows;
    Array2::from_shape_fn((rows, columns), |(row, column)| F::of(data[row * columns + column]))
}

fn flat<F: Float>(array: ArrayView2<'_, F>) -> Vec<f64> {
    array.iter().map(|value| value.as_f64()).collect()
}

#[derive(Clone, Copy, Debug)]
enum Mechanism {
    Plain,
    Flash { queries: usize, keys: usize },
}

/// The crate's answers.
struct Ours {
    answer: Answer,
    /// Of query, key and value.
    grad_inputs: [Vec<f64>; 3],
    grad_bias: Option<Vec<f64>>,
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
    inputs = inputs.with_kv_heads(p.heads, p.kv_heads).unwrap();
    if let Some(alignment) = case.causal {
        inputs = inputs.with_causal(alignment);
    }
    if let Some(mask) = &case.mask {
        inputs = inputs.with_mask(mask.view()).unwrap();
    }
    let per_head = |logits: &Vec<f64>| {
        let logit = |(pair, head)| F::of(logits[pair * p.heads + head]);
        Array2::from_shape_fn((p.pairs.len(), p.heads), logit)
    };
    let bias: Option<Array2<F>> = p.bias.as_ref().map(|logits| match case.bias {
        Bias::PerHead | Bias::None => per_head(logits),
        Bias::PerPair => per_head(logits).slice_move(s![.., ..1]),
        Bias::Matrix => Array2::from_shape_fn((p.num_queries, p.num_keys), |(query, key)| {
            F::of(logits[(query * p.num_keys + key) * p.heads])
        }),
    });
    if let Some(bias) = &bias {
        inputs = inputs.with_bias(bias.view()).unwrap();
    }
    if let Some(dropout) = case.dropout {
        inputs = inputs.with_dropout(dropout).unwrap();
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
            weights: flat(attention.weights(&inputs).unwrap().view()),
        },
        grad_bias: gradients.bias.map(|bias| flat(bias.view())),
        grad_inputs: [gradients.query, gradients.key, gradients.value]
            .map(|grad| flat(grad.view())),
    }
}

/// The oracle's gradient of each pair and head, summed where they share a logit.
fn shared_bias_gradient(case: &Case, per_head: &[f64]) -> Vec<f64> {
    match case.bias {
        Bias::PerHead | Bias::None => per_head.to_vec(),
        Bias::Matrix | Bias::PerPair => {
            per_head.chunks(case.problem.heads).map(|heads| heads.iter().sum()).collect()
        }
    }
}

/// The weight of each pair and head of a problem, with Σ |aᵢ bᵢ| for its rows in two arrays: what the
/// error of the dot product Σ aᵢ bᵢ is measured by (Higham 2002, §3.1).
fn products<'a>(
    p: &'a Problem,
    weights: &'a [f64],
    a: (&'a [f64], usize),
    b: (&'a [f64], usize),
) -> impl Iterator<Item = (f64, f64)> + 'a {
    (0..p.pairs.len() * p.heads).map(move |at| {
        let ((query, key), head) = (p.pairs[at / p.heads], at % p.heads);
        let kv_head = head * p.kv_heads / p.heads;
        let a = &a.0[(query * p.heads + head) * a.1..][..a.1];
        let b = &b.0[(key * p.kv_heads + kv_head) * b.1..][..b.1];
        (weights[at], a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum())
    })
}

fn largest(numbers: impl IntoIterator<Item = f64>) -> f64 {
    numbers.into_iter().fold(0.0, |largest, number| largest.max(number.abs()))
}

/// The largest error against `exact`. Infinities must agree.
fn error(actual: &[f64], exact: &[f64]) -> f64 {
    assert_eq!(actual.len(), exact.len());
    largest(actual.iter().zip(exact).filter(|(_, exact)| exact.is_finite()).map(|(a, b)| a - b))
}

/// `ours` may be `factor` times as wrong as the naive computation, or `floor`, where the naive
/// computation happens to be lucky.
fn assert_error(what: &str, factor: f64, floor: f64, ours: &[f64], naive: &[f64], exact: &[f64]) {
    let same_infinities = ours.iter().zip(exact).all(|(a, b)| a.is_finite() == b.is_finite());
    assert!(same_infinities, "{what}: {ours:?} instead of {exact:?}");
    let (ours, naive) = (error(ours, exact), error(naive, exact));
    assert!(
        ours <= f64::max(factor * naive, floor),
        "{what}: error {ours:e}, naive {naive:e}, floor {floor:e}"
    );
}

fn check<F: Float + num_traits::Float>(seed: u64, mechanism: Mechanism) {
    let case = random_case(seed);
    let p = &case.problem;
    let what = |array| format!("seed {seed}, {mechanism:?}, {} bits, {array}", 8 * size_of::<F>());
    let ours = solve::<F>(&case, mechanism);
    let exact = reference::forward::<f64>(p);
    let naive = reference::forward::<F>(p);

    // The rounding error of a logit is that of the weight relative to itself. In f64 the oracle has errors of its own, and they
    // count in full.
    let epsilon = <F as num_traits::Float>::epsilon().as_f64();
    let epsilon = if size_of::<F>() == 8 { 4.0 * epsilon } else { epsilon };
    let logits = products(p, &exact.weights, (&p.query, p.key_dim), (&p.key, p.key_dim));
    let relative = epsilon * largest(logits.map(|(_, product)| p.scale * product)).max(1.0);
    for (array, ours, naive, exact) in [
        ("out", &ours.answer.out, &naive.out, &exact.out),
        ("log_sum_exp", &ours.answer.log_sum_exp, &naive.log_sum_exp, &exact.log_sum_exp),
        ("weights", &ours.answer.weights, &naive.weights, &exact.weights),
    ] {
        // A log-sum-exp near 0 comes from logits that are not.
        let largest = largest(exact.iter().copied().filter(|number| number.is_finite()));
        let size = if array == "log_sum_exp" { largest.max(1.0) } else { largest };
        let floor = relative * size;
        assert_error(&what(array), 2.0, floor, ours, naive, exact);
    }

    // Keys and values sum over the queries that see them, and rounding errors add up like a random
    // walk. The gradient of a logit is a difference of terms p g·v, which may cancel altogether.
    let grads = (&case.grad_out[..], p.value_dim);
    let terms = products(p, &exact.weights, grads, (&p.value, p.value_dim));
    let keep = p.keep.as_ref().map_or(1.0, |keep| largest(keep.iter().copied()));
    let floor = relative * keep * largest(terms.map(|(weight, product)| weight * product));
    let seen = |key| p.pairs.iter().filter(|pair| pair.1 == key).count() * p.heads / p.kv_heads;
    let walk = ((0..p.num_keys).map(seen).max().unwrap_or(0) as f64).sqrt();
    let largest_of = |array: &[f64]| largest(array.iter().copied());
    let exact = reference::backward::<f64>(p, &case.grad_out);
    let naive = reference::backward::<F>(p, &case.grad_out);
    let [query, key, value] = &ours.grad_inputs;
    for (array, size, ours, naive, exact) in [
        ("grad query", p.scale.abs() * largest_of(&p.key), query, &naive.query, &exact.query),
        ("grad key", walk * p.scale.abs() * largest_of(&p.query), key, &naive.key, &exact.key),
    ] {
        let floor = f64::max(floor * size, relative * largest_of(exact));
        assert_error(&what(array), 3.0, floor, ours, naive, exact);
    }
    let value_floor = walk * relative * keep * largest_of(&case.grad_out);
    assert_error(&what("grad value"), 3.0, value_floor, value, &naive.value, &exact.value);
    if let Some(ours) = &ours.grad_bias {
        let naive = shared_bias_gradient(&case, &naive.bias);
        let exact = shared_bias_gradient(&case, &exact.bias);
        assert_error(&what("grad bias"), 3.0, floor, ours, &naive, &exact);
    }
}

const CASES: u64 = 300;

#[test]
fn scaled_dot_product_is_the_oracle() {
    for seed in 0..CASES {
        check::<f32>(seed, Mechanism::Plain);
        check::<f64>(seed, Mechanism::Plain);
    }
}

#[test]
fn flash_is_the_oracle_for_any_tiles() {
    for seed in 0..CASES {
        let rng = &mut Rng::seed_from_u64(!seed);
        let sizes = [1, 3, 31, 64, 67, 1000];
        let mechanism = Mechanism::Flash { queries: pick(&sizes, rng), keys: pick(&sizes, rng) };
        check::<f32>(seed, mechanism);
        check::<f64>(seed, mechanism);
    }
}
