//! A sliding window compared with dense attention as inputs grow:
//! `cargo bench -p benches --bench local_global`.
//!
//! `LocalGlobal::sliding_window` with 128 keys on either side, without and with 4 global positions and
//! with gaps, and `Flash`, over n nodes of 64 columns. Throughput is in (query, key) pairs that take
//! part.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::ndarray::Array2;
use graph_attention::{Attention, Flash, Gradients, Inputs, LocalGlobal, local_global::Window};
use peak_alloc::PeakAlloc;
use workload::{machine, matrix};

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

const COLUMNS: usize = 64;
const RADIUS: usize = 128;
const GLOBALS: usize = 4;

fn pairs_in_window(n: usize, dilation: usize) -> usize {
    let steps = |keys: usize| (keys / dilation).min(RADIUS);
    (0..n).map(|query| 1 + steps(query) + steps(n - 1 - query)).sum()
}

/// Name, mechanism, and the number of pairs.
fn mechanisms(n: usize) -> Vec<(&'static str, Box<dyn Attention<f32>>, usize)> {
    let sliding_window = |window| -> Box<dyn Attention<f32>> {
        Box::new(
            LocalGlobal::sliding_window(window, Flash::new()).expect("the dilation is positive"),
        )
    };
    let globals: Vec<usize> = (0..GLOBALS).map(|global| (2 * global + 1) * n / 9).collect();
    // In both directions, minus the pairs already in the windows.
    let with_globals = pairs_in_window(n, 1)
        + globals
            .iter()
            .map(|&node| 2 * (n - (n.min(node + RADIUS + 1) - node.saturating_sub(RADIUS))))
            .sum::<usize>();
    let mut mechanisms = vec![
        ("window", sliding_window(Window::new(RADIUS)), pairs_in_window(n, 1)),
        ("window and globals", sliding_window(Window::new(RADIUS).globals(&globals)), with_globals),
        ("dilated by 4", sliding_window(Window::new(RADIUS).dilation(4)), pairs_in_window(n, 4)),
    ];
    if n <= 1 << 14 {
        mechanisms.push(("flash", Box::new(Flash::new()), n * n));
    }
    mechanisms
}

fn local_global(c: &mut Criterion) {
    machine::print_limits();
    for n in [1 << 10, 1 << 12, 1 << 14, 1 << 17] {
        let [query, key, value] = [1, 2, 3].map(|seed| matrix(n, COLUMNS, seed));
        let inputs = Inputs::dense(query.view(), key.view(), value.view()).expect("shapes fit");
        for (name, attention, pairs) in mechanisms(n) {
            for (threads, pool) in machine::pools() {
                let id = || BenchmarkId::new(name, n);
                let mut group = workload::group(c, format!("local_global, {threads}"), pairs);
                workload::forward(&mut group, id(), &pool, &*attention, &inputs);
                group.finish();
                if n <= 1 << 14 || name == "window" {
                    let group = format!("training local_global, {threads}");
                    let mut group = workload::group(c, group, pairs);
                    workload::training(&mut group, id(), &pool, &*attention, &inputs);
                }
            }
            let mut out = Array2::zeros((n, COLUMNS));
            let mut grads = Gradients::zeros(&inputs, &attention).expect("they fit in memory");
            PEAK.reset_peak_usage();
            let before = PEAK.current_usage();
            let saved = attention.forward_train_into(&inputs, out.view_mut()).expect("shapes fit");
            let backward = attention.backward_into(&inputs, &saved, query.view(), grads.view_mut());
            backward.expect("shapes fit");
            let peak = (PEAK.peak_usage() - before) as f64 / 1024.0;
            println!("{name}, {n}: {peak:.0} KiB in training, beside inputs, output and gradients");
        }
    }
}

criterion_group! {
    name = all;
    config = workload::criterion();
    targets = local_global
}
criterion_main!(all);
