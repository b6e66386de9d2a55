//! Graph attention over more than one machine: the nodes are divided among workers, and training gives the
//! losses of a single process.
//!
//! A worker is a thread, a process or a machine, by the options of timely dataflow. It holds the features of
//! its own nodes only. For a node that attends to nodes of another worker, the row of its query travels there
//! and a partial result travels back; [`Partial`](graph_attention::Partial) merges them exactly. Backwards,
//! gradients of the partial results go the same way, and gradients of the queries come back.
//!
//! ```sh
//! run() { cargo run --release --manifest-path examples/two_machines/Cargo.toml -- "$@"; }
//! run                                       # one worker
//! run -w 2                                  # two threads
//! run -n 2 -p 0 & run -n 2 -p 1             # two processes, on ports 2101 and 2102 of this machine
//! run -n 2 -p 0 -h hosts.txt                # two machines: a line `host:port` for each
//! run -w 2 --nodes 200000                   # a larger graph
//! run -w 2 --edges edges.txt                # a line `query key` for each edge
//! ```
//!
//! Every process needs the same options but `-p`. The losses have the same bits for the same number of
//! workers, wherever they run. A worker that fails, dies or sends something else than expected ends the run of
//! all with an error.

mod exchange;
mod partition;
mod train;
mod watch;

use exchange::{Exchange, Result, Traffic};
use partition::{Edges, Partition};
use peak_alloc::PeakAlloc;
use std::process::ExitCode;
use std::time::Duration;
use timely::worker::Worker;
use train::Shard;
use watch::Watch;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Up to this number of nodes, the losses are compared with those of the whole graph in one piece.
const CHECKED_NODES: usize = 20_000;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut parser = getopts::Options::new();
    timely::Config::install_options(&mut parser);
    parser.optopt("", "nodes", "nodes of the generated graph (2000)", "NUM");
    parser.optopt("", "edges", "a file with a line `query key` for each edge", "FILE");
    parser.optopt("", "steps", "steps of training (5)", "NUM");
    parser.optopt("", "patience", "seconds without a word from the others (120)", "NUM");
    let usage = || parser.usage("two_machines [options]");
    let matches =
        parser.parse(std::env::args().skip(1)).map_err(|e| format!("{e}\n{}", usage()))?;
    let config = timely::Config::from_matches(&matches)?;
    let steps = matches.opt_get_default("steps", 5)?;
    let edges = match matches.opt_str("edges") {
        Some(path) => Edges::read(path.as_ref())?,
        None => Edges::Generated { num_nodes: matches.opt_get_default("nodes", 2000)? },
    };

    watch::end_with_any_thread();
    let watch = Watch::start(Duration::from_secs(matches.opt_get_default("patience", 120)?));
    let (of_workers, beat) = (edges.clone(), watch.clone());
    let guards = timely::execute(config, move |worker| {
        // If this one stops, the others miss its next message and stop too.
        let losses = work(worker, &of_workers, steps, &beat);
        losses.map_err(|error| format!("worker {}: {error}", worker.index()))
    })?;
    let (mut losses, mut errors) = (vec![], vec![]);
    for result in guards.join() {
        match result {
            Ok(Ok(of_worker)) => losses = of_worker,
            Ok(Err(error)) | Err(error) => errors.push(error),
        }
    }
    watch.stop();
    if !errors.is_empty() {
        return Err(errors.join("\nerror: ").into());
    }
    if edges.num_nodes() <= CHECKED_NODES {
        compare(&losses, &train::losses_of_the_whole(&edges, steps)?)?;
        println!("the same losses as in one piece, to 1e-12");
    }
    Ok(())
}

fn compare(losses: &[f64], whole: &[f64]) -> Result<()> {
    for (step, (loss, whole)) in losses.iter().zip(whole).enumerate() {
        let is_same = (loss - whole).abs() <= 1e-12;
        if !is_same {
            return Err(format!("step {step}: expected the loss {whole:?}, got {loss:?}").into());
        }
    }
    Ok(())
}

/// Trains, and returns the losses. Worker 0 prints them and what all workers did.
fn work(worker: &mut Worker, edges: &Edges, steps: usize, watch: &Watch) -> Result<Vec<f64>> {
    let partition = Partition { num_nodes: edges.num_nodes(), workers: worker.peers() };
    let (me, workers) = (worker.index(), worker.peers());
    if partition.num_nodes < workers {
        return Err(format!("expected a node for each worker, got {}", partition.num_nodes).into());
    }
    let mut exchange = Exchange::new(worker, watch);
    let shard = Shard::new(edges, &partition, me)?;
    let losses = shard.train(&mut exchange, steps, |step, loss| {
        if me == 0 {
            println!("step {step}  loss {loss:?}");
        }
    })?;

    let Traffic { rows, bytes, waiting, running } = exchange.traffic();
    let mine = [rows as f64, bytes as f64, running - waiting, waiting];
    let memory = ALLOCATOR.peak_usage_as_mb() as f64;
    let all = exchange.gather(mine.into_iter().chain([memory]).collect())?;
    if me == 0 {
        let sum = |column: usize| all.iter().map(|row| row[column]).sum::<f64>();
        let largest = |column: usize| all.iter().map(|row| row[column]).fold(0.0, f64::max);
        println!(
            "{workers} workers, {} nodes, {} edges, {} of them between workers",
            edges.num_nodes(),
            edges.num_edges()?,
            partition.num_cut(edges)?,
        );
        println!("sent between workers: {} rows, {:.1} MB", sum(0), sum(1) / 1e6);
        println!("slowest worker: {:.2} s of compute, {:.2} s of exchange", largest(2), largest(3));
        println!("most memory of a process, for all of its workers: {:.0} MB", largest(4));
    }
    Ok(losses)
}
