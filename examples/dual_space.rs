//! Classifies members of a karate club with attention over two kinds of neighbours: their friends, and
//! members who are not friends but have the same friends. Learned gates combine them.
//!
//! ```sh
//! cargo run --release -p examples --example dual_space
//! ```

use graph_attention::ndarray::{Array2, Axis};
use graph_attention::neighbors::Metric;
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Attention, DualSpaceConfig, Flash, Graph, Inputs,
    dual_space::{Fusion, LatentSearch},
};
use graph_attention::{MultiHeadConfig, Result, params};

fn main() -> Result<()> {
    let n = 34;
    let both_ways = KARATE_CLUB.iter().flat_map(|&(u, v)| [(u, v), (v, u)]);
    let friends = Graph::from_edges(n, n, both_ways)?;
    // Members are similar if they have the same friends. Their values are the sides they took.
    let is_friend = |(u, v): (usize, usize)| friends.neighbors(u).contains(&(v as u32));
    let x = Array2::from_shape_fn((n, n), |pair| f64::from(is_friend(pair)));
    let side = |(member, _)| if MR_HI.contains(&member) { 1.0 } else { -1.0 };
    let sides = Array2::from_shape_fn((n, 1), side);
    let inputs = Inputs::graph(x.view(), x.view(), sides.view(), &friends)?;

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

/// The members who stayed with Mr. Hi when the club split.
const MR_HI: [usize; 17] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 16, 17, 19, 21];

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
