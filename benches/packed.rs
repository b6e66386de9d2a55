//! Many short sequences in one call, compared with a loop over them:
//! `cargo bench -p benches --bench packed`.
//!
//! `Flash` with 8 heads of 64 columns in `f32`: 64 sequences of 20 to 120 rows, 16 of 512 rows with a causal
//! pattern, and 256 of 32 rows; `packed` is `Inputs::packed`, `loop` calls dense inputs one after the other,
//! `padded` is one dense call for each sequence, filled up to the longest and masked. Throughput is in (query,
//! key) pairs within the sequences, before the causal pattern.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::ndarray::{Array2, ArrayView2, Axis, s};
use graph_attention::{Attention, Flash, Inputs, Segments};
use workload::{machine, matrix};

const HEADS: usize = 8;
const COLUMNS: usize = 64 * HEADS;

fn dense<'a>(x: [ArrayView2<'a, f32>; 3], is_causal: bool) -> Inputs<'a, f32> {
    let [query, key, value] = x;
    let inputs = Inputs::dense(query, key, value).and_then(|inputs| inputs.with_heads(HEADS));
    let inputs = inputs.expect("shapes fit");
    if is_causal { inputs.with_causal() } else { inputs }
}

fn run(inputs: &Inputs<'_, f32>, grad: ArrayView2<'_, f32>, trains: bool) {
    let flash = Flash::new();
    if trains {
        let (_, saved) = flash.forward_train(inputs).expect("valid inputs");
        flash.backward(inputs, &saved, grad).expect("valid inputs");
    } else {
        flash.forward(inputs).expect("valid inputs");
    }
}

fn packed(c: &mut Criterion) {
    machine::print_limits();
    let lengths = |count: usize, len: fn(usize) -> usize| (0..count).map(len).collect::<Vec<_>>();
    let workloads = [
        ("64 of 20 to 120", lengths(64, |number| 20 + number * 37 % 101), false),
        ("16 of 512, causal", lengths(16, |_| 512), true),
        ("256 of 32", lengths(256, |_| 32), false),
    ];
    for (name, lengths, is_causal) in workloads {
        let segments = Segments::from_lengths(&lengths).expect("few pairs");
        let [query, key, value, grad] =
            [1, 2, 3, 4].map(|seed| matrix::<f32>(segments.num_queries(), COLUMNS, seed));
        let inputs = Inputs::packed(query.view(), key.view(), value.view(), &segments);
        let inputs = inputs.and_then(|inputs| inputs.with_heads(HEADS)).expect("shapes fit");
        let inputs = if is_causal { inputs.with_causal() } else { inputs };
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let padded: Vec<Array2<f32>> = (0..segments.len())
            .map(|number| {
                let mut rows = Array2::zeros((longest, COLUMNS));
                let len = lengths[number];
                rows.slice_mut(s![..len, ..]).assign(&query.slice(s![segments.queries(number), ..]));
                rows
            })
            .collect();
        let masks: Vec<Array2<bool>> =
            lengths.iter().map(|&len| Array2::from_shape_fn((1, longest), |(_, key)| key < len)).collect();
        for (trains, kind) in [(false, "packed"), (true, "training packed")] {
            for (threads, pool) in machine::pools() {
                let mut group = workload::group(c, format!("{kind}, {threads}"), segments.num_pairs());
                group.bench_function(BenchmarkId::new("packed", name), |bencher| {
                    bencher.iter(|| pool.install(|| run(&inputs, grad.view(), trains)));
                });
                let each = |number: usize| {
                    let rows = s![segments.queries(number), ..];
                    let x = [&query, &key, &value].map(|array| array.slice(rows));
                    run(&dense(x, is_causal), grad.slice(rows), trains);
                };
                group.bench_function(BenchmarkId::new("loop", name), |bencher| {
                    bencher.iter(|| pool.install(|| (0..segments.len()).for_each(each)));
                });
                let grad = grad.select(Axis(0), &vec![0; longest]);
                let each = |number: usize| {
                    let x = padded[number].view();
                    let inputs = dense([x, x, x], is_causal).with_mask(masks[number].view());
                    run(&inputs.expect("shapes fit"), grad.view(), trains);
                };
                group.bench_function(BenchmarkId::new("padded", name), |bencher| {
                    bencher.iter(|| pool.install(|| (0..segments.len()).for_each(each)));
                });
                group.finish();
            }
        }
    }
}

criterion_group! {
    name = benches;
    config = workload::criterion();
    targets = packed
}
criterion_main!(benches);
