//! The time of one more token as the past grows: `cargo bench -p benches --bench decode`.
//!
//! A layer of 512 columns in 8 heads of 64, in `f32`, on one thread: the whole step of a `MultiHead` with its
//! cache; the same with rotary positions and with a window; attention alone over the same cached rows (`Flash`) and
//! over a window of them; and the step of a linear state of one head. Throughput is in bytes of keys and values
//! read, for comparison with the limit that is printed first.

mod workload;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use graph_attention::ndarray::{Array2, ArrayView2, s};
use graph_attention::{
    Attention, Causal, Flash, GraphRopeConfig, Inputs, KeyValueCache, LocalGlobal, MultiHeadConfig,
    PerformerConfig, graph_rope::Layout, local_global::Window,
};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use workload::{machine, matrix};

const COLUMNS: usize = 512;
const HEADS: usize = 8;
const HEAD_DIM: usize = COLUMNS / HEADS;
const WINDOW: usize = 256;

fn window() -> LocalGlobal<f32> {
    let window = Window::sides(WINDOW - 1, 0);
    LocalGlobal::sliding_window(window, Flash::new()).expect("the dilation is positive")
}

fn layers() -> [(&'static str, Box<dyn Attention<f32>>); 3] {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let config = MultiHeadConfig::new(COLUMNS, HEADS);
    let rope = GraphRopeConfig::new(HEAD_DIM, Layout::Half).init(Flash::new());
    let rope = rope.expect("the sizes are valid");
    let layer = config.init(Flash::new(), &mut rng).expect("the sizes are valid");
    let with_rope = config.init(rope, &mut rng).expect("the sizes are valid");
    let with_window = config.init(window(), &mut rng).expect("the sizes are valid");
    [
        ("multi_head", Box::new(layer)),
        ("multi_head, rope", Box::new(with_rope)),
        ("multi_head, window", Box::new(with_window)),
    ]
}

fn inputs<'a>(x: ArrayView2<'a, f32>, at: ArrayView2<'a, f32>) -> Inputs<'a, f32> {
    let inputs = Inputs::dense(x, x, x).expect("shapes fit").with_causal();
    inputs.with_positions(at, at).expect("shapes fit")
}

fn decode(c: &mut Criterion) {
    machine::print_limits();
    let (_, pool) = machine::pools().into_iter().next().expect("a pool of one thread");
    for len in [1 << 8, 1 << 11, 1 << 13, 1 << 16] {
        let (token, at) = (matrix::<f32>(1, COLUMNS, 1), Array2::from_elem((1, 1), len as f32));
        let [key, value] = [2, 3].map(|seed| matrix::<f32>(len, COLUMNS, seed));
        let bytes = |keys: usize| 2 * keys * COLUMNS * size_of::<f32>();
        let full = || {
            let mut cache = [KeyValueCache::new()];
            let positions = Array2::from_shape_fn((len, 1), |(row, _)| row as f32);
            let filled = cache[0].append_at(key.view(), value.view(), positions.view());
            filled.expect("shapes fit");
            cache
        };
        let mut out = Array2::zeros((1, COLUMNS));
        for (name, layer) in layers() {
            let keys = if name.contains("window") { len.min(WINDOW) } else { len };
            let inputs = inputs(token.view(), at.view());
            let mut cache = full();
            let mut group = workload::group(c, "decode", bytes(keys));
            group.bench_function(BenchmarkId::new(name, len), |bencher| {
                pool.install(|| {
                    bencher.iter(|| {
                        let decoded = layer.decode_into(&inputs, &mut cache, out.view_mut());
                        decoded.expect("shapes fit");
                        cache[0].truncate(len);
                    });
                });
            });
        }
        let over_all = Inputs::dense(token.view(), key.view(), value.view()).expect("shapes fit");
        let over_all = over_all.with_heads(HEADS).expect("the columns divide");
        let over_all = over_all.with_causal_alignment(Causal::BottomRight);
        for (name, attention, keys) in [
            ("flash alone", Box::new(Flash::new()) as Box<dyn Attention<f32>>, len),
            ("window alone", Box::new(window()), len.min(WINDOW)),
        ] {
            let mut group = workload::group(c, "decode", bytes(keys));
            let id = BenchmarkId::new(name, len);
            workload::forward(&mut group, id, &pool, &*attention, &over_all);
        }

        let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
        let performer = PerformerConfig::new(HEAD_DIM, 256).init::<f32>(&mut rng);
        let mut state = performer.and_then(|performer| performer.state(HEAD_DIM)).expect("valid");
        let of_head = s![.., ..HEAD_DIM];
        state.add(key.slice(of_head), value.slice(of_head)).expect("finite");
        let mut group = c.benchmark_group("decode");
        group.bench_function(BenchmarkId::new("linear state of one head", len), |bencher| {
            let of_token = token.slice(of_head);
            pool.install(|| {
                bencher.iter(|| {
                    state.add(of_token, of_token).expect("finite");
                    state.attend(of_token).expect("nothing was removed")
                });
            });
        });
    }
}

criterion_group! {
    name = all;
    config = workload::criterion();
    targets = decode
}
criterion_main!(all);
