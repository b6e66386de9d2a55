//! Causal self-attention over a sequence of hidden states, with heads that share keys and values,
//! and the gradient of a loss with respect to the queries.
//!
//! ```sh
//! cargo run --release -p examples --example dense_batch
//! ```
//!
//! Dev-dependency: `rand_distr`.

use graph_attention::ndarray::{Array2, s};
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Attention, Flash, Inputs, Result};
use rand_distr::{Distribution, StandardNormal};

fn main() -> Result<()> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut normal = |rows, columns| {
        Array2::<f32>::from_shape_simple_fn((rows, columns), || StandardNormal.sample(&mut rng))
    };
    // 100 tokens; 8 query heads of 16 columns that share 2 heads of keys and values.
    let (tokens, heads, kv_heads, head_dim) = (100, 8, 2, 16);
    let query = normal(tokens, heads * head_dim);
    let key = normal(tokens, kv_heads * head_dim);
    let value = normal(tokens, kv_heads * head_dim);

    let inputs = Inputs::dense(query.view(), key.view(), value.view())?;
    let inputs = inputs.with_grouped_heads(heads, kv_heads)?.with_causal();
    let attention = Flash::new();
    let (out, saved) = attention.forward_train(&inputs)?;
    println!("{tokens} tokens, output {:?}", out.dim());

    // The past does not depend on the future: the first half of the sequence alone gives the same outputs.
    let half = tokens / 2;
    let first = |array: &Array2<f32>| array.slice(s![..half, ..]).to_owned();
    let (query, key, value) = (first(&query), first(&key), first(&value));
    let half_inputs = Inputs::dense(query.view(), key.view(), value.view())?;
    let half_inputs = half_inputs.with_grouped_heads(heads, kv_heads)?.with_causal();
    let half_out = attention.forward(&half_inputs)?;
    let difference = (&half_out - &out.slice(s![..half, ..])).mapv(f32::abs).sum();
    println!("change of the first {half} outputs without the later tokens: {difference:e}");
    assert!(difference < 1e-3);

    // The loss is the sum of the last output, so only the last query has a gradient, but every key does.
    let mut grad_out = Array2::zeros(out.raw_dim());
    grad_out.row_mut(tokens - 1).fill(1.0);
    let grads = attention.backward(&inputs, &saved, grad_out.view())?;
    let has_gradient = |grad: &Array2<f32>| {
        grad.rows().into_iter().filter(|row| row.iter().any(|&x| x != 0.0)).count()
    };
    let (queries, keys) = (has_gradient(&grads.query), has_gradient(&grads.key));
    println!("rows with a gradient: {queries} of the queries, {keys} of the keys");
    assert_eq!((queries, keys), (1, tokens));
    Ok(())
}
