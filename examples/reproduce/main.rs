//! Results of papers, beside those of this crate: one table, of which each row also runs alone.
//!
//! ```sh
//! cargo run --release -p examples --example reproduce                                  # every row on small data
//! cargo run --release -p examples --example reproduce -- --data <folder> --runs 10     # every row on the paper's
//! cargo run --release -p examples --example reproduce -- cora mammals --data <folder>
//! ```
//!
//! The folder contains the folders `cora`, `citeseer`, `minesweeper` and `wordnet_mammals`, whose files are
//! described at the functions that read them. Without it the rows take a karate club, small boards and a small
//! tree, which only shows that they work. Runs differ in their seed, those of Minesweeper also in their split.

mod citations;
mod dictionary;
mod hierarchy;
mod minesweeper;
mod random_features;

use examples::{Args, metrics};
use graph_attention::edge_gat::Score;
use minesweeper::Kind;
use std::{
    error::Error,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Instant,
};

/// Columns, layers, steps and learning rate for the boards of Minesweeper.
pub struct Options {
    width: usize,
    layers: usize,
    steps: usize,
    rate: f32,
}

type Run = fn(&Options, Option<PathBuf>, u64) -> Result<f64, Box<dyn Error>>;

/// A result of a paper.
struct Row {
    name: &'static str,
    source: &'static str,
    /// The figure in the paper.
    there: &'static str,
    /// The folder with the paper's data, if it has some.
    data: Option<&'static str>,
    /// What the figure here must be, on any data.
    plausible: RangeInclusive<f64>,
    /// Returns the figure of a run with this number, given the folder.
    run: Run,
}

const ROWS: [Row; 10] = [
    Row {
        name: "cora",
        source: "Veličković 2018, accuracy in %",
        there: "83.0 ± 0.7",
        data: Some("cora"),
        plausible: 70.0..=100.0,
        run: |_, folder, run| citations::run(folder, run),
    },
    Row {
        name: "citeseer",
        source: "Veličković 2018, accuracy in %",
        there: "72.5 ± 0.7",
        data: Some("citeseer"),
        plausible: 65.0..=100.0,
        run: |_, folder, run| citations::run(folder, run),
    },
    Row {
        name: "minesweeper-gat",
        source: "Platonov 2023, ROC AUC in %",
        there: "92.01 ± 0.68",
        data: Some("minesweeper"),
        plausible: 75.0..=100.0,
        run: |options, folder, run| minesweeper::run(options, folder, Kind::Gat, run),
    },
    Row {
        name: "minesweeper-gat-sep",
        source: "Platonov 2023, ROC AUC in %",
        there: "93.91 ± 0.35",
        data: Some("minesweeper"),
        plausible: 75.0..=100.0,
        run: |options, folder, run| minesweeper::run(options, folder, Kind::GatSeparated, run),
    },
    Row {
        name: "minesweeper-gt",
        source: "Platonov 2023, ROC AUC in %",
        there: "91.85 ± 0.76",
        data: Some("minesweeper"),
        plausible: 75.0..=100.0,
        run: |options, folder, run| minesweeper::run(options, folder, Kind::Transformer, run),
    },
    Row {
        name: "minesweeper-gt-sep",
        source: "Platonov 2023, ROC AUC in %",
        there: "92.29 ± 0.47",
        data: Some("minesweeper"),
        plausible: 75.0..=100.0,
        run: |options, folder, run| {
            minesweeper::run(options, folder, Kind::TransformerSeparated, run)
        },
    },
    Row {
        name: "dictionary-gat",
        source: "Brody 2022, accuracy in %",
        there: "fails",
        data: None,
        plausible: 0.0..=90.0,
        run: |_, _, run| dictionary::run(Score::Gat, 8, run),
    },
    Row {
        name: "dictionary-gatv2",
        source: "Brody 2022, accuracy in %",
        there: "100",
        data: None,
        plausible: 99.0..=100.0,
        run: |_, _, run| dictionary::run(Score::GatV2, 1, run),
    },
    Row {
        name: "mammals",
        source: "Nickel 2017, mAP in %",
        there: "no figure",
        data: Some("wordnet_mammals"),
        plausible: 90.0..=100.0,
        run: |_, folder, run| hierarchy::run(folder, run),
    },
    Row {
        name: "performer",
        source: "Choromanski 2021, squared error / that of Lemma 2",
        there: "1",
        data: None,
        plausible: 0.9..=1.1,
        run: |_, _, run| random_features::run(run),
    },
];

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::from_env(&["data", "runs", "first-run", "width", "layers", "steps", "rate"])?;
    let data: String = args.option("data", String::new())?;
    let is_small = data.is_empty();
    let options = Options {
        width: args.option("width", 64)?,
        layers: args.option("layers", if is_small { 2 } else { 5 })?,
        steps: args.option("steps", if is_small { 40 } else { 400 })?,
        rate: args.option("rate", 3e-3)?,
    };
    let first = args.option("first-run", 0)?;
    let runs = first..first + args.option("runs", 1)?;
    let names = ROWS.map(|row| row.name);
    if let Some(word) = args.words.iter().find(|word| !names.contains(&word.as_str())) {
        return Err(format!("no row {word}; there are {}", names.join(", ")).into());
    }
    let mut table = Vec::new();
    for Row { name, source, there, data: folder, plausible, run: figure } in ROWS {
        if !args.words.is_empty() && !args.words.iter().any(|word| word == name) {
            continue;
        }
        let path = folder.filter(|_| !is_small).map(|folder| Path::new(&data).join(folder));
        let there = if folder.is_some() && is_small { "(other data)" } else { there };
        let (start, mut figures) = (Instant::now(), Vec::new());
        for run in runs.clone() {
            figures.push(figure(&options, path.clone(), run)?);
            eprintln!("{name}, run {run}: {:.2}", figures[figures.len() - 1]);
        }
        let time = start.elapsed().as_secs_f64() / figures.len() as f64;
        let [mean, std] = metrics::mean_and_std(&figures);
        assert!(plausible.contains(&mean), "{name}: {mean} is not in {plausible:?}");
        let here = match figures.len() {
            1 => format!("{mean:.2}"),
            _ => format!("{mean:.2} ± {std:.2}"),
        };
        let runs = figures.len();
        table.push(format!("| {name} | {source} | {there} | {here} | {runs} | {time:.1} s |"));
    }
    println!("| row | source | there | here | runs | time of a run |\n|---|---|---|---|---|---|");
    println!("{}", table.join("\n"));
    Ok(())
}
