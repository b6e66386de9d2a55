//! A stream of 10,000 steps, each attending to all that came before: exactly, in a window, and linearly.
//!
//! ```sh
//! cargo run --release -p examples --example streams            # 10,000 steps
//! cargo run --release -p examples --example streams -- 3000
//! ```
//!
//! A growing past can be held as rows, in a `KeyValueCache`: exact, and each step costs more than the one before.
//! Forgetting all but the last rows bounds the cost, but the first rows of this stream are attention sinks, as in
//! language models: they take a part of every softmax, and forgetting them changes all other weights. So they are
//! kept, in the cache or as a `Partial` of their own. A `PerformerState` holds sums instead of rows: it forgets
//! nothing, in constant time and memory, with an error. Dev-dependency: `rand_distr`.

use graph_attention::ndarray::{Array2, ArrayView2, s};
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Attention, Flash, Inputs, KeyValueCache, PerformerConfig, Result};
use rand_distr::{Distribution, StandardNormal};
use std::time::{Duration, Instant};

const COLUMNS: usize = 32;
const SINKS: usize = 4;
const WINDOW: usize = 512;
const FEATURES: usize = 512;

/// Queries, keys and values that change slowly: similar rows are close in time.
struct Stream {
    query: Array2<f32>,
    key: Array2<f32>,
    value: Array2<f32>,
}

impl Stream {
    fn new(steps: usize, sinks: usize, rng: &mut Xoshiro256PlusPlus) -> Self {
        let mut normal = || -> f32 { StandardNormal.sample(rng) };
        let mut x = Array2::<f32>::zeros((steps, COLUMNS));
        for step in 0..steps {
            for column in 1..COLUMNS {
                let last = if step == 0 { normal() } else { 0.98 * x[[step - 1, column]] };
                x[[step, column]] = last + 0.2 * normal();
            }
        }
        let mut value = x.mapv(|x| (2.0 * x).sin());
        let mut key = 0.6 * x;
        let mut query = key.clone();
        // All queries prefer the sinks by the same amount, through column 0, and these have no values.
        if sinks > 0 {
            query.column_mut(0).fill(2.0);
            key.slice_mut(s![..sinks, ..]).fill(0.0);
            key.slice_mut(s![..sinks, 0]).fill(20.0);
            value.slice_mut(s![..sinks, ..]).fill(0.0);
        }
        Self { query, key, value }
    }

    /// Computes the outputs of all steps at once.
    fn exact(&self) -> Result<Array2<f32>> {
        let inputs = Inputs::dense(self.query.view(), self.key.view(), self.value.view())?;
        Flash::new().forward(&inputs.with_causal())
    }

    /// Runs all steps and returns their outputs, with the times of the first and of the last tenth of them.
    fn run(
        &self,
        mut step: impl FnMut([ArrayView2<'_, f32>; 3]) -> Result<Array2<f32>>,
    ) -> Result<(Array2<f32>, [Duration; 2])> {
        let steps = self.query.nrows();
        let mut out = Array2::zeros((steps, COLUMNS));
        let mut times = [Duration::ZERO; 2];
        for now in 0..steps {
            let row = |of: &'_ Array2<f32>| of.slice(s![now..now + 1, ..]).to_owned();
            let rows = [&self.query, &self.key, &self.value].map(row);
            let start = Instant::now();
            let of_step = step(rows.each_ref().map(|row| row.view()))?;
            let time = start.elapsed();
            out.row_mut(now).assign(&of_step.row(0));
            match now * 10 / steps {
                0 => times[0] += time,
                9 => times[1] += time,
                _ => {}
            }
        }
        Ok((out, times.map(|time| time * 10 / steps as u32)))
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let steps = std::env::args().nth(1).map_or(Ok(10_000), |steps| steps.parse())?;
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2023);
    let stream = Stream::new(steps, SINKS, &mut rng);
    let flash = Flash::new();
    println!("{steps} steps, {COLUMNS} columns; µs per step in the first and last tenth");
    println!("past                              first    last   error in the last tenth");
    let report = |name: &str, exact: &Array2<f32>, (out, times): (Array2<f32>, [Duration; 2])| {
        let of_last = s![steps - steps / 10.., ..];
        let squares = (&out - exact).slice(of_last).mapv(|x| f64::from(x).powi(2));
        let error = squares.mean().unwrap_or(0.0).sqrt();
        let [first, last] = times.map(|time| time.as_secs_f64() * 1e6);
        println!("{name:30} {first:8.1} {last:7.1}   {error:.5}");
        (out, error)
    };

    // All rows.
    let mut cache = [KeyValueCache::new()];
    let run = stream.run(|[query, key, value]| {
        flash.decode(&Inputs::dense(query, key, value)?.with_causal(), &mut cache)
    })?;
    let exact = stream.exact()?;
    let (_, of_rounding) = report("all rows", &exact, run);
    assert!(of_rounding < 1e-5 && cache[0].len() == steps);

    // The last rows.
    let mut cache = [KeyValueCache::new()];
    let run = stream.run(|[query, key, value]| {
        cache[0].keep_last(WINDOW - 1);
        flash.decode(&Inputs::dense(query, key, value)?.with_causal(), &mut cache)
    })?;
    let (_, without_sinks) = report("a window", &exact, run);

    // The first and the last rows.
    let mut cache = [KeyValueCache::new()];
    let run = stream.run(|[query, key, value]| {
        let len = cache[0].len();
        if len >= SINKS + WINDOW {
            cache[0].remove(SINKS..len - (WINDOW - 1))?;
        }
        flash.decode(&Inputs::dense(query, key, value)?.with_causal(), &mut cache)
    })?;
    let (in_cache, with_sinks) = report("a window and sinks", &exact, run);

    // The same as two parts that are merged. The parts could be on two machines.
    let [mut sinks, mut window] = [(); 2].map(|()| KeyValueCache::new());
    let run = stream.run(|[query, key, value]| {
        let newest = if sinks.len() < SINKS { &mut sinks } else { &mut window };
        newest.append(key, value)?;
        window.keep_last(WINDOW);
        let over = |part: &KeyValueCache<f32>| {
            flash.forward_partial(&Inputs::dense(query, part.key(), part.value())?)
        };
        // An empty cache does not know its columns yet.
        let parts = match window.is_empty() {
            true => over(&sinks)?,
            false => over(&sinks)?.merge(&over(&window)?)?,
        };
        Ok(parts.out().to_owned())
    })?;
    let (merged, _) = report("… as two merged parts", &exact, run);
    assert!((&merged - &in_cache).iter().all(|difference| difference.abs() < 1e-4));

    // Sums instead of rows. Random features are poor at weights as sharp as those of sinks: no sinks here.
    let stream = Stream::new(steps, 0, &mut rng);
    let performer = PerformerConfig::new(COLUMNS, FEATURES).init::<f32>(&mut rng)?;
    let mut state = performer.state(COLUMNS)?;
    let run = stream.run(|[query, key, value]| {
        state.add(key, value)?;
        state.attend(query)
    })?;
    let (_, linear) = report("sums, of a stream without sinks", &stream.exact()?, run);

    assert!(with_sinks < without_sinks / 2.0, "sinks matter");
    assert!(linear < 0.1, "sums forget nothing");
    Ok(())
}
