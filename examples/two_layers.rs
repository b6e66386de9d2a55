//! Two members of a karate club say which side they took when it split; a graph attention network infers
//! the sides of the other 32. Its two layers are trained together: the gradient is passed from the second
//! to the first, through the activation between them.
//!
//! ```sh
//! cargo run --release -p examples --example two_layers
//! ```

use examples::data::Nodes;
use graph_attention::ndarray::Array2;
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Attention, EdgeGatConfig, Inputs, Result, edge_gat::Score, params};

fn main() -> Result<()> {
    let club = Nodes::karate_club();
    let graph = club.graph.with_self_loops()?;
    let n = club.features.ncols(); // each member has its own column
    let inputs = Inputs::self_attention(club.features.view(), &graph)?;
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
            let is_right = |&member: &usize| (out[[member, 0]] > 0.0) == (club.class(member) == 0);
            let right = (0..n).filter(is_right).count();
            println!("step {step:3}: loss {loss:.3}, {right} of {n} sides right");
            assert!(step < 300 || right >= 31, "friends take sides together");
        }
    }
    assert!(losses[300] < losses[0] / 2.0, "it learns");
    Ok(())
}
