//! Linear attention over a long context: what it costs, what it is wrong by, and that it says so
//! itself.
//!
//! ```sh
//! cargo run --release --example long_context                          # 50,000 keys
//! cargo run --release --example long_context -- 20000 --svg plot.svg
//! ```
//!
//! Every vector attends to all others, exactly and through more and more random features. The error
//! is measured against the exact answer, and predicted from the features alone. The plot goes into
//! the temporary folder unless a file is given. Dev-dependencies: `peak_alloc`, `rand`,
//! `rand_distr`, `svg`.

use graph_attention::ndarray::{Array2, s};
use graph_attention::{Attention, Flash, Inputs, PerformerConfig};
use peak_alloc::PeakAlloc;
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};
use std::time::Instant;
use svg::Document;
use svg::node::element::{Circle, Polyline, Text};

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

const COLUMNS: usize = 64;
/// The prediction is an average over so many queries.
const SAMPLE: usize = 200;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1).peekable();
    let n = args.next_if(|arg| arg != "--svg").map_or(Ok(50_000), |arg| arg.parse())?;
    let svg = match (args.next(), args.next()) {
        (None, _) => std::env::temp_dir().join("long_context.svg"),
        (Some(_), Some(path)) => path.into(),
        _ => return Err("usage: long_context [<number of keys>] [--svg <file>]".into()),
    };
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2021);
    let mut normal = |size: f32| {
        let mut draw = || -> f32 { StandardNormal.sample(&mut rng) };
        Array2::from_shape_simple_fn((n, COLUMNS), || size * draw())
    };
    let (query, key) = (normal(0.4), normal(0.4));
    let value = key.mapv(|x| (3.0 * x).sin()); // what is near in the keys is near in the values
    let inputs = Inputs::dense(query.view(), key.view(), value.view())?;
    let sample = Inputs::dense(query.slice(s![..SAMPLE.min(n), ..]), key.view(), value.view())?;

    // The output, the milliseconds and the KiB that it takes.
    let run = |attention: &dyn Attention<f32>| -> graph_attention::Result<_> {
        let mut out = Array2::zeros((n, COLUMNS));
        PEAK.reset_peak_usage();
        let (start, before) = (Instant::now(), PEAK.current_usage());
        attention.forward_into(&inputs, out.view_mut())?;
        let time = start.elapsed().as_secs_f64() * 1e3;
        Ok((out, time, (PEAK.peak_usage() - before) as f64 / 1024.0))
    };
    let (exact, exact_time, memory) = run(&Flash::new())?;
    let rms = |x: &Array2<f32>| (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt();
    println!("{n} queries over {n} keys, {COLUMNS} columns; errors are root mean squares");
    println!(
        "exact           {exact_time:8.1} ms  {memory:8.0} KiB  outputs of {:.4}",
        rms(&exact)
    );
    println!("features            time         memory  error  predicted  by a pair's variance");

    let mut points = Vec::new();
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(9);
    for num_features in [64, 256, 1024, 4096] {
        let performer = PerformerConfig::new(COLUMNS, num_features).init::<f32>(&mut rng)?;
        let (out, time, memory) = run(&performer)?;
        let error = rms(&(out - &exact));
        // Of the features' own scatter: the error of a whole row, so of each column its root mean
        // square.
        let of_rows = performer.accuracy(&sample)?.standard_error;
        let predicted = rms(&of_rows) / (COLUMNS as f32).sqrt();
        // From the closed form, before any feature is drawn: the relative error of one weight.
        let of_pair = performer.relative_variance(query.row(0), key.row(1))?.sqrt();
        println!(
            "{num_features:8}        {time:8.1} ms  {memory:8.0} KiB  {error:.4}     {predicted:.4}  {of_pair:.3} of a weight"
        );
        assert!((0.5..2.0).contains(&(predicted / error)), "the prediction holds");
        points.push([num_features as f64, error.into(), predicted.into(), time]);
    }
    for pair in points.windows(2) {
        let fall = pair[1][1] / pair[0][1];
        assert!((0.35..0.75).contains(&fall), "four times the features, half the error: {fall}");
    }
    draw(&points, exact_time).and_then(|picture| svg::save(&svg, &picture))?;
    println!("plot: {}", svg.display());
    Ok(())
}

/// Errors on the left and times on the right, against the number of features; all axes logarithmic.
fn draw(points: &[[f64; 4]], exact_time: f64) -> std::io::Result<Document> {
    let mut picture =
        Document::new().set("viewBox", (0, 0, 760, 340)).set("font-family", "sans-serif");
    let label = |x: f64, y: f64, text: String, color: &str| {
        Text::new(text).set("x", x).set("y", y).set("font-size", 13).set("fill", color.to_owned())
    };
    let curves = [
        (1, "measured error", "#c33", 0.0),
        (2, "predicted error", "#36c", 0.0),
        (3, "time in ms", "#283", 380.0),
    ];
    for (column, name, color, left) in curves {
        let in_panel = |column: usize| if left > 0.0 { column == 3 } else { column < 3 };
        let values = points.iter().flat_map(|p| (1..4).filter(|&c| in_panel(c)).map(|c| p[c]));
        let values = values.chain((left > 0.0).then_some(exact_time));
        let (low, high) = values.fold((f64::MAX, 0f64), |(low, high), v| (low.min(v), high.max(v)));
        let y = |value: f64| 280.0 - 220.0 * (value / low).ln() / (high / low).ln();
        let x = |at: usize| left + 60.0 + 80.0 * at as f64;
        let line: Vec<String> = points
            .iter()
            .enumerate()
            .map(|(at, p)| format!("{},{}", x(at), y(p[column])))
            .collect();
        let line = Polyline::new().set("points", line.join(" ")).set("fill", "none");
        picture = picture.add(line.set("stroke", color).set("stroke-width", 2));
        for (at, point) in points.iter().enumerate() {
            let dot = Circle::new().set("cx", x(at)).set("cy", y(point[column])).set("r", 4);
            picture = picture.add(dot.set("fill", color));
            picture = picture.add(label(x(at) - 14.0, 310.0, format!("{}", point[0]), "#555"));
            if column != 2 {
                let digits = if column == 1 { 4 } else { 0 };
                let text = format!("{:.digits$}", point[column]);
                picture = picture.add(label(x(at) + 6.0, y(point[column]) - 8.0, text, color));
            }
        }
        picture = picture.add(label(
            left + 120.0,
            20.0 + 18.0 * f64::from(column == 2),
            name.into(),
            color,
        ));
        if left > 0.0 {
            let exact =
                Polyline::new().set("points", format!("{},{1} {2},{1}", x(0), y(exact_time), x(3)));
            picture = picture.add(exact.set("stroke", "#555").set("stroke-dasharray", "5 4"));
            picture = picture.add(label(
                x(2),
                y(exact_time) + 16.0,
                format!("exact: {exact_time:.0} ms"),
                "#555",
            ));
        }
    }
    Ok(picture.add(label(320.0, 332.0, "number of features; all axes logarithmic".into(), "#555")))
}
