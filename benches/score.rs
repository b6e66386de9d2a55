//! Functions of the logits, compared with none and with the same numbers as an array:
//! `cargo bench -p benches --bench score`.
//!
//! 4096 × 4096 pairs with 64 columns, and a power-law graph of 50,000 nodes with 16 edges each, forward, and forward
//! and backward, `f32`, one thread. Throughput is in pairs.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::score::{Alibi, BucketBias, Buckets, Elementwise, ScorePair, Sinks, SoftCap};
use graph_attention::{Attention, Flash, Inputs, Result};
use workload::{machine, matrix, power_law_graph};

type Named = (&'static str, Box<dyn Attention<f32>>);

fn mechanisms() -> Result<Vec<Named>> {
    let t5 = BucketBias::from_weight(Buckets::t5(32, 128, true)?, matrix(32, 1, 7))?;
    let closure = Elementwise::new(
        |score: f32, pair: ScorePair| 0.9 * score + 0.01 * pair.distance as f32,
        |_: f32, _: ScorePair| 0.9,
    );
    let both = (SoftCap::new(30.0)?, Alibi::new(1)?);
    Ok(vec![
        ("none", Box::new(Flash::new())),
        ("soft cap", Box::new(Flash::new().with_score(SoftCap::new(30.0)?))),
        ("ALiBi", Box::new(Flash::new().with_score(Alibi::new(1)?))),
        ("ALiBi, learned", Box::new(Flash::new().with_score(Alibi::new(1)?.learned()))),
        ("T5 buckets", Box::new(Flash::new().with_score(t5))),
        ("sinks", Box::new(Flash::new().with_score(Sinks::new(1)?))),
        ("closure", Box::new(Flash::new().with_score(closure))),
        ("soft cap and ALiBi", Box::new(Flash::new().with_score(both))),
    ])
}

fn all(c: &mut Criterion, workload: &str, inputs: &Inputs<'_, f32>, bias: &Inputs<'_, f32>) {
    let [(_, pool), _] = machine::pools();
    let mechanisms = mechanisms().expect("the options are valid");
    let mut group = workload::group(c, format!("score, {workload}"), inputs.num_pairs());
    for (name, attention) in &mechanisms {
        workload::forward(
            &mut group,
            BenchmarkId::from_parameter(name),
            &pool,
            &**attention,
            inputs,
        );
    }
    workload::forward(&mut group, BenchmarkId::from_parameter("array"), &pool, &Flash::new(), bias);
    group.finish();
    let mut group = workload::group(c, format!("training score, {workload}"), inputs.num_pairs());
    for (name, attention) in &mechanisms {
        workload::training(
            &mut group,
            BenchmarkId::from_parameter(name),
            &pool,
            &**attention,
            inputs,
        );
    }
    workload::training(
        &mut group,
        BenchmarkId::from_parameter("array"),
        &pool,
        &Flash::new(),
        bias,
    );
}

fn benches(c: &mut Criterion) {
    machine::print_limits();
    let [q, k, v] = [1, 2, 3].map(|seed| matrix::<f32>(4096, 64, seed));
    let dense = Inputs::dense(q.view(), k.view(), v.view()).expect("shapes fit");
    let bias = matrix(4096, 4096, 4);
    all(c, "dense", &dense, &dense.with_bias(bias.view()).expect("shapes fit"));

    let graph = power_law_graph(50_000, 16, true);
    let x = matrix::<f32>(50_000, 64, 2);
    let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph).expect("shapes fit");
    let bias = matrix(graph.num_edges(), 1, 4);
    all(c, "graph", &inputs, &inputs.with_bias(bias.view()).expect("shapes fit"));
}

criterion_group! {
    name = of_scores;
    config = workload::criterion();
    targets = benches
}
criterion_main!(of_scores);
