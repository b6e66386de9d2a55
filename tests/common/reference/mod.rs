//! Exact softmax attention and its gradient, written out as plain loops.
//!
//! This is the oracle of the tests: it shares no code with the crate and makes no attempt to be
//! fast or numerically clever. Every loop computes the one equation written above it, for
//!
//! * `i` a query, `j` a key, `e` a pair (i, j), in the caller's order,
//! * `h` a query head, `c` a column of that head.
//!
//! `forward::<f64>` is the reference value, and [`bounds`] says for each number how far rounding errors
//! may take an implementation from it.
//!
//! NaN and infinity get no special treatment: they go wherever the equations take them. The one
//! exception is a *skipped* pair (invisible, or with a bias of -inf), whose numbers are never read.

pub(crate) mod bounds;

use num_traits::{Float, NumCast};

/// One attention problem, as flat row-major arrays.
#[derive(Clone)]
pub(crate) struct Problem {
    pub(crate) num_queries: usize,
    pub(crate) num_keys: usize,
    /// Number of query heads. Query head `h` reads key/value head `h * kv_heads / heads`.
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// Columns of one head of `query` and `key`.
    pub(crate) key_dim: usize,
    /// Columns of one head of `value` and of the output.
    pub(crate) value_dim: usize,
    pub(crate) scale: f64,
    /// (query, key) of every pair, in the caller's order; repeats count separately.
    pub(crate) pairs: Vec<(usize, usize)>,
    /// One per pair; an invisible pair is skipped for every head.
    pub(crate) visible: Vec<bool>,
    /// pairs × heads, added to the logits; -inf = the pair is skipped for that head.
    pub(crate) bias: Option<Vec<f64>>,
    /// pairs × heads, factors of the weights: dropout's, which are 0 or 1/(1-rho), times weights of pairs.
    pub(crate) keep: Option<Vec<f64>>,
    /// num_queries × (heads * key_dim)
    pub(crate) query: Vec<f64>,
    /// num_keys × (kv_heads * key_dim)
    pub(crate) key: Vec<f64>,
    /// num_keys × (kv_heads * value_dim)
    pub(crate) value: Vec<f64>,
}

/// The result of [`forward`].
pub(crate) struct Answer {
    /// num_queries × (heads * value_dim)
    pub(crate) out: Vec<f64>,
    /// num_queries × heads
    pub(crate) log_sum_exp: Vec<f64>,
    /// pairs × heads, before dropout; 0 for a skipped pair.
    pub(crate) weights: Vec<f64>,
}

/// The result of [`backward`]: the gradients of ⟨grad_out, out⟩.
pub(crate) struct Gradients {
    /// Shaped like [`Problem::query`].
    pub(crate) query: Vec<f64>,
    /// Shaped like [`Problem::key`].
    pub(crate) key: Vec<f64>,
    /// Shaped like [`Problem::value`].
    pub(crate) value: Vec<f64>,
    /// pairs × heads, even if the problem has no bias; 0 for a skipped pair.
    pub(crate) bias: Vec<f64>,
}

/// Computes attention in `T`.
pub(crate) fn forward<T: Float>(p: &Problem) -> Answer {
    let x = Inputs::<T>::of(p);
    let softmax = softmax(p, &x);

    // out_i = Σ_j p_ij · keep_ij · v_j
    let mut out = vec![T::zero(); p.num_queries * p.heads * p.value_dim];
    for h in 0..p.heads {
        for (e, &(i, j)) in p.pairs.iter().enumerate() {
            if let Some(weight) = softmax.weights[p.pair_at(e, h)] {
                for c in 0..p.value_dim {
                    let o = p.out_at(i, h, c);
                    let v = x.value[p.value_at(j, h, c)];
                    out[o] = out[o] + weight * x.keep[p.pair_at(e, h)] * v;
                }
            }
        }
    }

    let weights: Vec<T> =
        softmax.weights.iter().map(|weight| weight.unwrap_or(T::zero())).collect();
    Answer {
        out: to_f64s(&out),
        log_sum_exp: to_f64s(&softmax.log_sum_exp),
        weights: to_f64s(&weights),
    }
}

/// Computes the gradients of ⟨`grad_out`, out⟩ in `T`. `grad_out` is shaped like [`Answer::out`].
pub(crate) fn backward<T: Float>(p: &Problem, grad_out: &[f64]) -> Gradients {
    let x = Inputs::<T>::of(p);
    let g: Vec<T> = from_f64s(grad_out);
    let softmax = softmax(p, &x);

    let mut d_query = vec![T::zero(); p.num_queries * p.heads * p.key_dim];
    let mut d_key = vec![T::zero(); p.num_keys * p.kv_heads * p.key_dim];
    let mut d_value = vec![T::zero(); p.num_keys * p.kv_heads * p.value_dim];
    let mut d_weight = vec![T::zero(); p.pairs.len() * p.heads];
    let mut d_logit = vec![T::zero(); p.pairs.len() * p.heads];
    let mut delta = vec![T::zero(); p.num_queries * p.heads];

    // dv_j = Σ_i p_ij · keep_ij · g_i
    for h in 0..p.heads {
        for (e, &(i, j)) in p.pairs.iter().enumerate() {
            if let Some(weight) = softmax.weights[p.pair_at(e, h)] {
                for c in 0..p.value_dim {
                    let v = p.value_at(j, h, c);
                    let g_ic = g[p.out_at(i, h, c)];
                    d_value[v] = d_value[v] + weight * x.keep[p.pair_at(e, h)] * g_ic;
                }
            }
        }
    }

    // dp_ij = keep_ij · (g_i · v_j)
    for h in 0..p.heads {
        for (e, &(i, j)) in p.pairs.iter().enumerate() {
            if softmax.weights[p.pair_at(e, h)].is_some() {
                let mut dot = T::zero();
                for c in 0..p.value_dim {
                    dot = dot + g[p.out_at(i, h, c)] * x.value[p.value_at(j, h, c)];
                }
                d_weight[p.pair_at(e, h)] = x.keep[p.pair_at(e, h)] * dot;
            }
        }
    }

    // delta_i = Σ_j p_ij · dp_ij
    for h in 0..p.heads {
        for (e, &(i, _)) in p.pairs.iter().enumerate() {
            if let Some(weight) = softmax.weights[p.pair_at(e, h)] {
                let row = p.row_at(i, h);
                delta[row] = delta[row] + weight * d_weight[p.pair_at(e, h)];
            }
        }
    }

    // ds_ij = p_ij · (dp_ij − delta_i), which is also the gradient of the bias
    for h in 0..p.heads {
        for (e, &(i, _)) in p.pairs.iter().enumerate() {
            if let Some(weight) = softmax.weights[p.pair_at(e, h)] {
                d_logit[p.pair_at(e, h)] =
                    weight * (d_weight[p.pair_at(e, h)] - delta[p.row_at(i, h)]);
            }
        }
    }

    // dq_i = Σ_j scale · ds_ij · k_j   and   dk_j = Σ_i scale · ds_ij · q_i
    for h in 0..p.heads {
        for (e, &(i, j)) in p.pairs.iter().enumerate() {
            if softmax.weights[p.pair_at(e, h)].is_some() {
                let ds = d_logit[p.pair_at(e, h)];
                for c in 0..p.key_dim {
                    let q = p.query_at(i, h, c);
                    let k = p.key_at(j, h, c);
                    d_query[q] = d_query[q] + x.scale * ds * x.key[k];
                    d_key[k] = d_key[k] + x.scale * ds * x.query[q];
                }
            }
        }
    }

    Gradients {
        query: to_f64s(&d_query),
        key: to_f64s(&d_key),
        value: to_f64s(&d_value),
        bias: to_f64s(&d_logit),
    }
}

/// The softmax over each row, a row being one query and one head.
struct Softmax<T> {
    /// pairs × heads; `None` = the pair is skipped for that head.
    logits: Vec<Option<T>>,
    /// pairs × heads, before dropout; `None` as in `logits`.
    weights: Vec<Option<T>>,
    /// num_queries × heads
    log_sum_exp: Vec<T>,
}

fn softmax<T: Float>(p: &Problem, x: &Inputs<T>) -> Softmax<T> {
    let mut logits: Vec<Option<T>> = vec![None; p.pairs.len() * p.heads];
    let mut row_max = vec![T::neg_infinity(); p.num_queries * p.heads];
    let mut row_sum = vec![T::zero(); p.num_queries * p.heads];

    // s_ij = scale · (q_i · k_j) + bias_ij, for the pairs that are not skipped
    for h in 0..p.heads {
        for (e, &(i, j)) in p.pairs.iter().enumerate() {
            let bias = x.bias[p.pair_at(e, h)];
            if p.visible[e] && bias != T::neg_infinity() {
                let mut dot = T::zero();
                for c in 0..p.key_dim {
                    dot = dot + x.query[p.query_at(i, h, c)] * x.key[p.key_at(j, h, c)];
                }
                logits[p.pair_at(e, h)] = Some(x.scale * dot + bias);
            }
        }
    }

    // m_i = max_j s_ij   (a NaN is never the maximum; it makes the sum below NaN instead)
    for h in 0..p.heads {
        for (e, &(i, _)) in p.pairs.iter().enumerate() {
            if let Some(logit) = logits[p.pair_at(e, h)] {
                let row = p.row_at(i, h);
                if logit > row_max[row] {
                    row_max[row] = logit;
                }
            }
        }
    }

    // Z_i = Σ_j e^{s_ij − m_i}
    for h in 0..p.heads {
        for (e, &(i, _)) in p.pairs.iter().enumerate() {
            if let Some(logit) = logits[p.pair_at(e, h)] {
                let row = p.row_at(i, h);
                row_sum[row] = row_sum[row] + (logit - row_max[row]).exp();
            }
        }
    }

    // p_ij = e^{s_ij − m_i} / Z_i
    let mut weights: Vec<Option<T>> = vec![None; p.pairs.len() * p.heads];
    for h in 0..p.heads {
        for (e, &(i, _)) in p.pairs.iter().enumerate() {
            if let Some(logit) = logits[p.pair_at(e, h)] {
                let row = p.row_at(i, h);
                weights[p.pair_at(e, h)] = Some((logit - row_max[row]).exp() / row_sum[row]);
            }
        }
    }

    // L_i = m_i + ln Z_i   (a row without pairs has m = -inf and Z = 0, so L = -inf)
    let log_sum_exp = row_max.iter().zip(&row_sum).map(|(&max, &sum)| max + sum.ln()).collect();

    Softmax { logits, weights, log_sum_exp }
}

/// The numbers of a [`Problem`], rounded to `T`.
struct Inputs<T> {
    scale: T,
    /// pairs × heads; 0 if the problem has no bias.
    bias: Vec<T>,
    /// pairs × heads; 1 if the problem has none.
    keep: Vec<T>,
    query: Vec<T>,
    key: Vec<T>,
    value: Vec<T>,
}

impl<T: Float> Inputs<T> {
    fn of(p: &Problem) -> Self {
        let per_pair = p.pairs.len() * p.heads;
        Inputs {
            scale: from_f64(p.scale),
            bias: match &p.bias {
                Some(bias) => from_f64s(bias),
                None => vec![T::zero(); per_pair],
            },
            keep: match &p.keep {
                Some(keep) => from_f64s(keep),
                None => vec![T::one(); per_pair],
            },
            query: from_f64s(&p.query),
            key: from_f64s(&p.key),
            value: from_f64s(&p.value),
        }
    }
}

/// Indices in the flat arrays. `h` is always a *query* head.
impl Problem {
    /// Pair `e`, head `h`, in an array of pairs × heads.
    fn pair_at(&self, e: usize, h: usize) -> usize {
        e * self.heads + h
    }

    /// Query `i`, head `h`, in an array of num_queries × heads.
    fn row_at(&self, i: usize, h: usize) -> usize {
        i * self.heads + h
    }

    /// Column `c` of head `h` of query `i`, in `query`.
    fn query_at(&self, i: usize, h: usize, c: usize) -> usize {
        i * (self.heads * self.key_dim) + h * self.key_dim + c
    }

    /// Column `c` of key `j`, in `key`, of the key/value head that query head `h` reads.
    fn key_at(&self, j: usize, h: usize, c: usize) -> usize {
        j * (self.kv_heads * self.key_dim) + self.kv_head(h) * self.key_dim + c
    }

    /// Column `c` of key `j`, in `value`, of the key/value head that query head `h` reads.
    fn value_at(&self, j: usize, h: usize, c: usize) -> usize {
        j * (self.kv_heads * self.value_dim) + self.kv_head(h) * self.value_dim + c
    }

    /// Column `c` of head `h` of query `i`, in the output.
    fn out_at(&self, i: usize, h: usize, c: usize) -> usize {
        i * (self.heads * self.value_dim) + h * self.value_dim + c
    }

    /// The key/value head that query head `h` reads.
    fn kv_head(&self, h: usize) -> usize {
        h * self.kv_heads / self.heads
    }
}

/// `x` rounded to `T`. (Float-to-float conversion always succeeds; out of range is ±inf.)
fn from_f64<T: Float>(x: f64) -> T {
    <T as NumCast>::from(x).unwrap_or(T::nan())
}

fn from_f64s<T: Float>(xs: &[f64]) -> Vec<T> {
    xs.iter().map(|&x| from_f64(x)).collect()
}

fn to_f64s<T: Float>(xs: &[T]) -> Vec<f64> {
    xs.iter().map(|x| x.to_f64().unwrap_or(f64::NAN)).collect()
}
