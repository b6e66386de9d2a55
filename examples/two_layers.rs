//! Two members of a karate club say which side they took when it split; a graph attention network infers
//! the sides of the other 32. Its two layers are trained together: the gradient is passed from the second
//! to the first, through the activation between them.
//!
//! ```sh
//! cargo run --release -p examples --example two_layers
//! ```

use graph_attention::ndarray::Array2;
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Attention, EdgeGatConfig, Graph, Inputs, Result, edge_gat::Score, params};

fn main() -> Result<()> {
    let n = SIDES.len();
    let both_ways = KARATE_CLUB.iter().flat_map(|&(u, v)| [(u, v), (v, u)]);
    let graph = Graph::from_edges(n, n, both_ways)?.with_self_loops()?;
    let members = Array2::<f32>::eye(n); // each member has its own column
    let inputs = Inputs::self_attention(members.view(), &graph)?;
    // The two members who quarrelled, and the target signs of their outputs.
    let known = [(0, 1.0), (33, -1.0)];

    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut first = EdgeGatConfig::new(Score::GatV2, n, 8, 4).init(&mut rng)?;
    let mut second = EdgeGatConfig::new(Score::GatV2, 4 * 8, 1, 1).init(&mut rng)?;
    let elu = |x: f32| if x > 0.0 { x } else { x.exp_m1() };
    let mut losses = Vec::new();
    for step in 0..=300 {
        let (out, first_saved) = first.forward_train(&inputs)?;
        let hidden = out.mapv(elu);
        let hidden_inputs = Inputs::self_attention(hidden.view(), &graph)?;
        let (out, second_saved) = second.forward_train(&hidden_inputs)?;

        // The logistic loss ln(1 + exp(−sign · output)) of the two, and its gradient.
        let mut grad_out = Array2::zeros(out.raw_dim());
        let mut loss = 0.0;
        for (member, sign) in known {
            let wrong = (-sign * out[[member, 0]]).exp();
            loss += wrong.ln_1p();
            grad_out[[member, 0]] = -sign * wrong / (1.0 + wrong);
        }
        losses.push(loss);

        let grads = second.backward(&hidden_inputs, &second_saved, grad_out.view())?;
        params::update(&mut second, &grads.params, |_, mut param, grad| {
            param.scaled_add(-0.03, &grad);
        })?;
        // The slope of ELU from its value y: 1 if y > 0, else eˣ = y + 1.
        let grad_hidden = grads.self_attention()? * hidden.mapv(|y| 1.0 + y.min(0.0));
        // The members themselves are data and need no gradient.
        let grads = first.backward_params(&inputs, &first_saved, grad_hidden.view())?;
        params::update(&mut first, &grads, |_, mut param, grad| param.scaled_add(-0.03, &grad))?;

        if step % 50 == 0 {
            let right = |(&out, side): (&f32, u8)| (out > 0.0) == (side == b'h');
            let right = out.iter().zip(SIDES.bytes()).filter(|&pair| right(pair)).count();
            println!("step {step:3}: loss {loss:.3}, {right} of {n} sides right");
            assert!(step < 300 || right >= 31, "friends take sides together");
        }
    }
    assert!(losses[300] < losses[0] / 2.0, "it learns");
    Ok(())
}

/// The side that each member took: Mr Hi's (member 0) or the officer's (member 33).
const SIDES: &str = "hhhhhhhhhohhhhoohhohohoooooooooooo";

/// Friendships in a karate club (Zachary 1977, doi 10.1086/jar.33.4.3629752).
#[rustfmt::skip]
const KARATE_CLUB: [(usize, usize); 78] = [
    (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (0, 7), (0, 8), (0, 10), (0, 11), (0, 12),
    (0, 13), (0, 17), (0, 19), (0, 21), (0, 31), (1, 2), (1, 3), (1, 7), (1, 13), (1, 17), (1, 19),
    (1, 21), (1, 30), (2, 3), (2, 7), (2, 8), (2, 9), (2, 13), (2, 27), (2, 28), (2, 32), (3, 7),
    (3, 12), (3, 13), (4, 6), (4, 10), (5, 6), (5, 10), (5, 16), (6, 16), (8, 30), (8, 32), (8, 33),
    (9, 33), (13, 33), (14, 32), (14, 33), (15, 32), (15, 33), (18, 32), (18, 33), (19, 33),
    (20, 32), (20, 33), (22, 32), (22, 33), (23, 25), (23, 27), (23, 29), (23, 32), (23, 33),
    (24, 25), (24, 27), (24, 31), (25, 31), (26, 29), (26, 33), (27, 33), (28, 31), (28, 33),
    (29, 32), (29, 33), (30, 32), (30, 33), (31, 32), (31, 33), (32, 33),
];
