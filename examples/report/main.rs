//! Measures every mechanism on this machine and writes one page to help you choose: time and memory as
//! the inputs grow, the error against exact attention, and which mechanism to use when.
//!
//! ```sh
//! cargo run --release -p examples --example report                         # target/report.html, in seconds
//! cargo run --release -p examples --example report -- report.html --full   # larger inputs, some minutes
//! ```
//!
//! The page is self-contained; beside it, `report.svg` has the first of its plots. Dev-dependencies: `peak_alloc`, `rand_distr`.

mod measure;
mod mechanisms;
mod page;
mod plot;

use measure::{Cost, Report};

#[global_allocator]
static PEAK: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (full, paths): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|arg| arg == "--full");
    let path = match &paths[..] {
        [] => "target/report.html",
        [path] if !path.starts_with('-') => path,
        _ => return Err("usage: report [<file.html>] [--full]".into()),
    };
    let (dense, graph): (&[usize], &[usize]) = match full.is_empty() {
        true => (&[64, 128, 256, 512, 1024], &[500, 2000, 8000]),
        false => (&[64, 128, 256, 512, 1024, 2048, 4096], &[500, 2000, 8000, 32_000, 128_000]),
    };
    // The best instruction set of the CPU, or the one in the environment variable GRAPH_ATTENTION_SIMD.
    let simd = graph_attention::testing::hold_simd()?;
    let report = Report::measure(&simd, dense, graph, &[16, 64, 256, 1024, 4096])?;
    check(&report);
    println!("{}", report.machine);
    let page = page::page(&report);
    for outside in ["src=", "href=", "url(", "@import", "<link"] {
        assert!(!page.contains(outside), "the page is self-contained");
    }

    let of_flash = *report.find("flash").dense();
    println!(
        "dense {}           forward, ms      / Flash     training      / Flash",
        of_flash.size
    );
    for row in &report.rows {
        let (name, Cost { forward, training, .. }) = (row.mechanism.attention.name(), *row.dense());
        let [ratio, training_ratio] = [forward / of_flash.forward, training / of_flash.training];
        println!(
            "{name:<20} {forward:>10.2} {ratio:>12.2} {training:>12.2} {training_ratio:>12.2}"
        );
    }
    std::fs::create_dir_all("target")?;
    std::fs::write(path, &page)?;
    let picture = std::path::Path::new(path).with_extension("svg");
    std::fs::write(&picture, page::picture(&report))?;
    println!("page: {path} ({} KB), its first plot: {}", page.len() / 1000, picture.display());
    Ok(())
}

/// Checks memory and errors, which depend much less on the machine and on the run than times.
fn check(report: &Report) {
    // The growth of the memory when n doubles.
    let costs = &report.find("scaled_dot_product").dense;
    let [before, last] = [costs[costs.len() - 2], costs[costs.len() - 1]];
    assert!(last.forward_memory > 3.0 * before.forward_memory, "it stores the weights");
    // Its growth would not do: a few tens of KiB more or less, depending on which thread takes which block.
    let flash = report.find("flash").dense();
    assert!(flash.forward_memory < last.forward_memory / 4.0, "it does not store the weights");
    for row in &report.rows {
        assert!(row.rounding < 1e-5, "{}: f32 agrees with f64", row.mechanism.attention.name());
    }
    for pair in report.approximations.windows(2).filter(|pair| pair[0].name == pair[1].name) {
        assert!(pair[1].error < pair[0].error, "more features or more keys give a smaller error");
    }
}
