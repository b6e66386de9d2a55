//! Many short sequences in one call, compared with a loop over them:
//! `cargo bench -p benches --bench packed`.
//!
//! `Flash` with 8 heads of 64 columns in `f32`: 64 sequences of 20 to 120 rows, 16 of 512 rows with a causal
//! pattern, 256 of 32 rows, and one of 2048 rows among 64 of 64; `packed` is `Inputs::packed`, `loop` calls dense
//! inputs one after the other, `padded` is one dense call for each sequence, filled up to the longest and masked.
//! Throughput is in (query, key) pairs within the sequences, before the causal pattern.
//!
//! Then 16 documents of 256 rows, packed and as one call with a mask of all pairs, and a mask that hides 7/8 of
//! 16,384 keys, compared with the other keys alone.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::ndarray::{Array2, ArrayView2, s};
use graph_attention::{Attention, Flash, GradientsMut, Inputs, Segments};
use std::ops::Range;
use workload::{machine, matrix};

const HEADS: usize = 8;
const COLUMNS: usize = 64 * HEADS;

fn dense<'a>(x: [ArrayView2<'a, f32>; 3], is_causal: bool) -> Inputs<'a, f32> {
    let [query, key, value] = x;
    let inputs = Inputs::dense(query, key, value).and_then(|inputs| inputs.with_heads(HEADS));
    let inputs = inputs.expect("shapes fit");
    if is_causal { inputs.with_causal() } else { inputs }
}

/// Outputs and gradients for all rows, so that no run allocates them.
struct Arrays {
    out: Array2<f32>,
    grad_out: Array2<f32>,
    grads: [Array2<f32>; 3],
}

impl Arrays {
    fn new(rows: usize) -> Self {
        let zeros = || Array2::zeros((rows, COLUMNS));
        Self {
            out: zeros(),
            grad_out: matrix(rows, COLUMNS, 4),
            grads: [zeros(), zeros(), zeros()],
        }
    }

    /// One pass, or both.
    fn run(&mut self, inputs: &Inputs<'_, f32>, trains: bool) {
        self.run_rows(inputs, [0..inputs.num_queries(), 0..inputs.num_keys()], trains);
    }

    /// The same, over inputs that are these rows of queries and keys.
    fn run_rows(&mut self, inputs: &Inputs<'_, f32>, rows: [Range<usize>; 2], trains: bool) {
        let [rows, key_rows] = rows.map(|rows| s![rows, ..]);
        let (flash, out) = (Flash::new(), self.out.slice_mut(rows));
        if !trains {
            return flash.forward_into(inputs, out).expect("valid inputs");
        }
        let saved = flash.forward_train_into(inputs, out).expect("valid inputs");
        let mut grads = GradientsMut::of_params(&mut []);
        let [query, key, value] = self.grads.each_mut();
        grads.query = Some(query.slice_mut(rows));
        (grads.key, grads.value) = (Some(key.slice_mut(key_rows)), Some(value.slice_mut(key_rows)));
        let grad_out = self.grad_out.slice(rows);
        flash.backward_into(inputs, &saved, grad_out, grads).expect("valid inputs");
    }
}

fn packed(c: &mut Criterion) {
    machine::print_limits();
    let lengths = |count: usize, len: fn(usize) -> usize| (0..count).map(len).collect::<Vec<_>>();
    let workloads = [
        ("64 of 20 to 120", lengths(64, |number| 20 + number * 37 % 101), false),
        ("16 of 512, causal", lengths(16, |_| 512), true),
        ("256 of 32", lengths(256, |_| 32), false),
        ("1 of 2048, 64 of 64", lengths(65, |number| if number == 20 { 2048 } else { 64 }), false),
    ];
    for (name, lengths, is_causal) in workloads {
        let segments = Segments::from_lengths(&lengths).expect("few pairs");
        let [query, key, value] =
            [1, 2, 3].map(|seed| matrix::<f32>(segments.num_queries(), COLUMNS, seed));
        let inputs = Inputs::packed(query.view(), key.view(), value.view(), &segments);
        let inputs = inputs.and_then(|inputs| inputs.with_heads(HEADS)).expect("shapes fit");
        let inputs = if is_causal { inputs.with_causal() } else { inputs };
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let padded: Vec<Array2<f32>> = (0..segments.len())
            .map(|number| {
                let mut rows = Array2::zeros((longest, COLUMNS));
                let len = lengths[number];
                rows.slice_mut(s![..len, ..])
                    .assign(&query.slice(s![segments.queries(number), ..]));
                rows
            })
            .collect();
        let masks: Vec<Array2<bool>> = lengths
            .iter()
            .map(|&len| Array2::from_shape_fn((1, longest), |(_, key)| key < len))
            .collect();
        let mut arrays = Arrays::new(segments.num_queries().max(longest));
        for (trains, kind) in [(false, "packed"), (true, "training packed")] {
            for (threads, pool) in machine::pools() {
                let mut group =
                    workload::group(c, format!("{kind}, {threads}"), segments.num_pairs());
                group.bench_function(BenchmarkId::new("packed", name), |bencher| {
                    let mut run = || arrays.run(&inputs, trains);
                    pool.install(|| bencher.iter(&mut run));
                });
                group.bench_function(BenchmarkId::new("loop", name), |bencher| {
                    let mut each = |number: usize| {
                        let rows = segments.queries(number);
                        let x =
                            [&query, &key, &value].map(|array| array.slice(s![rows.clone(), ..]));
                        arrays.run_rows(&dense(x, is_causal), [rows.clone(), rows], trains);
                    };
                    pool.install(|| bencher.iter(|| (0..segments.len()).for_each(&mut each)));
                });
                group.bench_function(BenchmarkId::new("padded", name), |bencher| {
                    let mut each = |number: usize| {
                        let x = padded[number].view();
                        let inputs = dense([x, x, x], is_causal).with_mask(masks[number].view());
                        arrays.run(&inputs.expect("shapes fit"), trains);
                    };
                    pool.install(|| bencher.iter(|| (0..segments.len()).for_each(&mut each)));
                });
                group.finish();
            }
        }
    }
}

fn masked(c: &mut Criterion) {
    let rows = 4096;
    let segments = Segments::from_lengths(&[256; 16]).expect("few pairs");
    let [query, key, value] = [1, 2, 3].map(|seed| matrix::<f32>(rows, COLUMNS, seed));
    let packed = Inputs::packed(query.view(), key.view(), value.view(), &segments);
    let packed = packed.and_then(|inputs| inputs.with_heads(HEADS)).expect("shapes fit");
    let documents = Array2::from_shape_fn((rows, rows), |(query, key)| query / 256 == key / 256);
    let as_mask = dense([query.view(), key.view(), value.view()], false);
    let as_mask = as_mask.with_mask(documents.view()).expect("shapes fit");

    let (queries, keys) = (512, 16_384);
    let query = matrix::<f32>(queries, COLUMNS, 1);
    let [key, value] = [2, 3].map(|seed| matrix::<f32>(keys, COLUMNS, seed));
    let padding = Array2::from_shape_fn((1, keys), |(_, key)| key < keys / 8);
    let padded = dense([query.view(), key.view(), value.view()], false);
    let padded = padded.with_mask(padding.view()).expect("shapes fit");
    let rest = s![..keys / 8, ..];
    let sliced = dense([query.view(), key.slice(rest), value.slice(rest)], false);

    let mut arrays = Arrays::new(keys);
    for (trains, kind) in [(false, "masks"), (true, "training with masks")] {
        for (threads, pool) in machine::pools() {
            let mut group = workload::group(c, format!("{kind}, {threads}"), segments.num_pairs());
            for (name, inputs) in [
                ("16 documents of 256, packed", &packed),
                ("16 documents of 256, mask", &as_mask),
                ("1/8 of 16384 keys, sliced", &sliced),
                ("1/8 of 16384 keys, mask", &padded),
            ] {
                group.bench_function(name, |bencher| {
                    pool.install(|| bencher.iter(|| arrays.run(inputs, trains)));
                });
            }
            group.finish();
        }
    }
}

criterion_group! {
    name = benches;
    config = workload::criterion();
    targets = packed, masked
}
criterion_main!(benches);
