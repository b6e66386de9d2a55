//! The limits of the machine, measured in the same run as the benches that are compared with them.

use fearless_simd::{Level, Simd, SimdBase, SimdFloat, dispatch};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use std::hint::black_box;
use std::time::Instant;

/// Measures multiply-adds in registers: FLOP/s of one thread in `f32`, the best of several runs.
pub(crate) fn fma_peak() -> f64 {
    #[inline(always)]
    fn run<S: Simd>(simd: S, rounds: usize) -> (f32, usize) {
        let [factor, term] = [0.999, 0.001].map(|x| S::f32s::splat(simd, black_box(x)));
        let mut sums = [S::f32s::splat(simd, 0.0); 12];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = factor.mul_add(*sum, term);
            }
        }
        let first = sums.map(|sum| sum.as_slice()[0]).iter().sum();
        (first, 2 * 12 * S::f32s::LEN * rounds)
    }
    let level = level();
    let best = (0..50).map(|_| {
        let start = Instant::now();
        let (sum, operations) = dispatch!(level, simd => run(simd, 100_000));
        black_box(sum);
        operations as f64 / start.elapsed().as_secs_f64()
    });
    best.fold(0.0, f64::max)
}

/// The instruction set that `GRAPH_ATTENTION_SIMD` limits the crate to.
fn level() -> Level {
    let best = Level::new();
    #[cfg(target_arch = "x86_64")]
    match std::env::var("GRAPH_ATTENTION_SIMD").as_deref() {
        Ok("avx2") => return best.as_avx2().map_or(best, Simd::level),
        Ok("sse2") => return best.as_sse2().map_or(best, Simd::level),
        _ => {}
    }
    best
}

/// Measures reading 256 MB once: bytes/s of one thread, the best of several runs.
pub(crate) fn read_bandwidth() -> f64 {
    let data = vec![1u64; 32 << 20];
    let best = (0..5).map(|_| {
        let start = Instant::now();
        let mut sums = [0u64; 16];
        for chunk in data.chunks_exact(16) {
            sums.iter_mut().zip(chunk).for_each(|(sum, &x)| *sum = sum.wrapping_add(x));
        }
        black_box(sums);
        (8 * data.len()) as f64 / start.elapsed().as_secs_f64()
    });
    best.fold(0.0, f64::max)
}

/// Measures reading rows of a matrix in random order, each from its first byte to its last: rows/s of one
/// thread, the best of several runs.
pub(crate) fn random_reads(num_rows: usize, bytes: usize) -> f64 {
    let len = bytes.div_ceil(64) * 8;
    let data = vec![1u64; num_rows * len];
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(7);
    let rows: Vec<usize> = (0..200_000).map(|_| rng.random_range(0..num_rows)).collect();
    let best = (0..5).map(|_| {
        let start = Instant::now();
        let mut sums = [0u64; 8];
        for row in &rows {
            for chunk in data[row * len..][..len].chunks_exact(8) {
                sums.iter_mut().zip(chunk).for_each(|(sum, &x)| *sum = sum.wrapping_add(x));
            }
        }
        black_box(sums);
        rows.len() as f64 / start.elapsed().as_secs_f64()
    });
    best.fold(0.0, f64::max)
}

/// Prints the limits to compare the figures of a bench with.
pub(crate) fn print_limits() {
    println!("one thread of this machine: {:.0} GFLOP/s in f32 multiply-adds", fma_peak() / 1e9);
    println!("                            {:.1} GB/s read from memory", read_bandwidth() / 1e9);
}

pub(crate) const ONE_THREAD: &str = "one thread";

/// Returns a pool of one thread and a pool of all threads.
pub(crate) fn pools() -> [(&'static str, rayon::ThreadPool); 2] {
    [(ONE_THREAD, 1), ("all threads", 0)].map(|(name, threads)| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        (name, pool.expect("a thread pool"))
    })
}
