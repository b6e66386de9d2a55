//! Linear attention over a long context: its cost, its error, and its own estimate of the error.
//!
//! ```sh
//! cargo run --release -p examples --example long_context            # 50,000 keys
//! cargo run --release -p examples --example long_context -- 20000
//! ```
//!
//! Every vector attends to all others, exactly and with more and more random features. The error is
//! measured against exact attention and predicted from the features alone; the bars plot it on a
//! logarithmic scale. Dev-dependencies: `peak_alloc`, `rand_distr`.

use graph_attention::ndarray::{Array2, s};
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Attention, Flash, Inputs, PerformerConfig, Result};
use peak_alloc::PeakAlloc;
use rand_distr::{Distribution, StandardNormal};
use std::time::Instant;

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

const COLUMNS: usize = 64;

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let n = std::env::args().nth(1).map_or(Ok(50_000), |n| n.parse())?;
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2021);
    let mut normal = || -> f32 { StandardNormal.sample(&mut rng) };
    let [query, key] =
        [(); 2].map(|()| Array2::from_shape_simple_fn((n, COLUMNS), || 0.4 * normal()));
    let value = key.mapv(|x| (3.0 * x).sin()); // similar keys have similar values
    let inputs = Inputs::dense(query.view(), key.view(), value.view())?;
    // The prediction is an average over some of the queries.
    let some = Inputs::dense(query.slice(s![..n.min(200), ..]), key.view(), value.view())?;

    let run = |attention: &dyn Attention<f32>| -> Result<_> {
        let mut out = Array2::zeros((n, COLUMNS));
        PEAK.reset_peak_usage();
        let (start, before) = (Instant::now(), PEAK.current_usage());
        attention.forward_into(&inputs, out.view_mut())?;
        let (time, memory) = (start.elapsed(), PEAK.peak_usage() - before);
        Ok((out, format!("{:6.0} ms {:8} KiB", time.as_secs_f64() * 1e3, memory / 1024)))
    };
    // Summed in f64: a sum of millions of squares in f32 would lose digits.
    let rms = |x: &Array2<f32>| {
        let sum: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        (sum / x.len() as f64).sqrt()
    };
    println!("{n} queries over {n} keys, {COLUMNS} columns; errors are root mean squares");
    println!("features        time       memory   error  predicted");
    let (exact, cost) = run(&Flash::new())?;
    println!("exact      {cost}       0          0  (outputs: {:.4})", rms(&exact));

    let mut last = None;
    for num_features in [64, 256, 1024, 4096] {
        let performer = PerformerConfig::new(COLUMNS, num_features).init(&mut rng)?;
        let (out, cost) = run(&performer)?;
        let error = rms(&(out - &exact));
        // The prediction is for a whole row; convert it to the root mean square over the columns.
        let predicted =
            rms(&performer.estimate_error(&some)?.standard_error) / (COLUMNS as f64).sqrt();
        let bar = "#".repeat((10.0 * (error / 0.001).log2().max(0.0)) as usize);
        println!("{num_features:8}   {cost}  {error:.4}     {predicted:.4}  {bar}");
        assert!(
            (0.5..2.0).contains(&(predicted / error)),
            "the prediction is right within a factor of 2"
        );
        let fall = last.replace(error).map_or(0.5, |last| error / last);
        assert!((0.35..0.75).contains(&fall), "four times the features, half the error");
    }
    Ok(())
}
