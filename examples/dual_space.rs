//! Classifies members of a karate club with attention over two kinds of neighbours: their friends, and
//! members who are not friends but have the same friends. Learned gates combine them.
//!
//! ```sh
//! cargo run --release -p examples --example dual_space
//! ```

use examples::data::Nodes;
use graph_attention::ndarray::{Array2, Axis};
use graph_attention::neighbors::Metric;
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Attention, DualSpaceConfig, Flash, Inputs,
    dual_space::{Fusion, LatentSearch},
};
use graph_attention::{MultiHeadConfig, Result, params};

fn main() -> Result<()> {
    let club = Nodes::karate_club();
    let (n, friends) = (34, &club.graph);
    // Members are similar if they have the same friends. Their values are the sides they took.
    let is_friend = |(u, v): (usize, usize)| friends.neighbors(u).contains(&(v as u32));
    let x = Array2::from_shape_fn((n, n), |pair| f64::from(is_friend(pair)));
    let sides = Array2::from_shape_fn((n, 1), |(member, _)| [1.0, -1.0][club.class(member)]);
    let inputs = Inputs::graph(x.view(), x.view(), sides.view(), friends)?;

    // The queries of the cross branch are the sides that friends took; keys have more columns, so they
    // are projected.
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let cross = MultiHeadConfig::new(1, 1).key_dim(n).init(Flash::new(), &mut rng)?;
    let search = LatentSearch::new(4, Metric::Cosine).threshold(0.5).exclude_graph(true);
    let mut dual = DualSpaceConfig::new(Fusion::Gated, 1)
        .init(Flash::new(), Flash::new(), cross, &mut rng)?
        .with_search(search);
    let alike = dual.latent_neighbors(&inputs)?.into_owned();
    println!("friends of 14: {:?}; similar: {:?}", friends.neighbors(14), alike.neighbors(14));
    assert_eq!(alike.neighbors(14), [15, 18, 20, 22]);
    let strangers = |u| alike.neighbors(u).iter().all(|&v| !is_friend((u, v as usize)));
    assert!((0..n).all(strangers));

    // Predict the side of each member from the others: gradient descent on half of the squared error.
    for step in 0..=300 {
        let (out, saved) = dual.forward_train(&inputs)?;
        let error = out - &sides;
        if step % 100 == 0 {
            println!("step {step:3}: loss {:.3}", 0.5 * error.mapv(|e| e * e).sum());
        }
        let grads = dual.backward_params(&inputs, &saved, error.view())?;
        params::update(&mut dual, &grads, |_, mut param, grad| param.scaled_add(-0.02, &grad))?;
    }
    let loss = |out: &Array2<f64>| 0.5 * (out - &sides).mapv(|e| e * e).sum();
    let right = |out: &Array2<f64>| (out * &sides).iter().filter(|&&agree| agree > 0.0).count();
    let (both, alone) = (dual.forward(&inputs)?, Flash::new().forward(&inputs)?);
    println!("only friends: loss {:.3}, {} of {n} right", loss(&alone), right(&alone));
    println!("friends and similar members: loss {:.3}, {} right", loss(&both), right(&both));
    let shares = dual.gates(&inputs)?.sum_axis(Axis(0)) / n as f64;
    println!("shares of the graph, latent and cross branches: {shares:.2}");
    assert!(loss(&both) < 0.9 * loss(&alone) && right(&both) > right(&alone));
    assert!(shares.iter().all(|&share| share > 0.1), "all branches are used");
    Ok(())
}
