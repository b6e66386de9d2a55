//! `Poincare` compared with `Flash` on the same pairs: `cargo bench -p benches --bench poincare`.
//!
//! `near` are points with means near the center, `far` are clusters at the boundary, whose sums are
//! computed twice, and `tangent` is `near` in tangent coordinates.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::ndarray::Array2;
use graph_attention::{Attention, Flash, Graph, Inputs, PoincareConfig, poincare::Coordinates};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use workload::{machine, random_graph};

/// Points of norms up to `norm`, or within (1 − norm)/2 of one of norm `norm`.
fn points(rows: usize, dim: usize, norm: f32, is_far: bool, seed: u64) -> Array2<f32> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let bound = 1.0 / (dim as f32).sqrt();
    let mut x = Array2::from_shape_simple_fn((rows, dim), || rng.random_range(-bound..bound));
    if is_far {
        x *= (1.0 - norm) / 2.0;
        x.column_mut(0).mapv_inplace(|x| x + norm);
    } else {
        x *= norm;
    }
    x
}

fn mechanisms() -> [(&'static str, bool, Box<dyn Attention<f32>>); 4] {
    let ball = PoincareConfig::new();
    let tangent = ball.clone().coordinates(Coordinates::Tangent);
    let init = |config: PoincareConfig| Box::new(config.init().expect("the options are valid"));
    [
        ("flash", false, Box::new(Flash::new())),
        ("near", false, init(ball.clone())),
        ("far", true, init(ball)),
        ("tangent", false, init(tangent)),
    ]
}

fn run(c: &mut Criterion, pattern: &str, size: &str, graph: Option<&Graph>, n: usize, dim: usize) {
    for (name, is_far, attention) in mechanisms() {
        // Tangent vectors cost the same as points of the ball; one size is enough to show that.
        if name == "tangent" && n != 1024 {
            continue;
        }
        let norm = if is_far { 0.95 } else { 0.8 };
        let [query, key, value] = [1, 2, 3].map(|seed| points(n, dim, norm, is_far, seed));
        let inputs = match graph {
            None => Inputs::dense(query.view(), key.view(), value.view()),
            Some(graph) => Inputs::graph(query.view(), key.view(), value.view(), graph),
        };
        let inputs = inputs.expect("shapes fit");
        for (threads, pool) in machine::pools() {
            let group = format!("poincare {pattern}, {threads}");
            let id = || BenchmarkId::new(name, size);
            let mut forward = workload::group(c, &group, inputs.num_pairs());
            workload::forward(&mut forward, id(), &pool, &*attention, &inputs);
            forward.finish();
            let mut training = workload::group(c, format!("training {group}"), inputs.num_pairs());
            workload::training(&mut training, id(), &pool, &*attention, &inputs);
        }
    }
}

fn benches(c: &mut Criterion) {
    machine::print_limits();
    for (n, dim) in [(1024, 64), (1024, 8), (4096, 64)] {
        run(c, "dense", &format!("{n}x{dim}"), None, n, dim);
    }
    run(c, "graph", "50000x16x64", Some(&random_graph(50_000, 16, 3)), 50_000, 64);
}

criterion_group! {
    name = all;
    config = workload::criterion();
    targets = benches
}
criterion_main!(all);
