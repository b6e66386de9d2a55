//! The page: `page.html`, filled with tables and plots.

use crate::measure::{Cost, Report, Row};
use crate::mechanisms::{FEATURES, RADIUS};
use crate::plot::{Line, plot};

pub(crate) fn page(report: &Report) -> String {
    let flash = report.find("flash");
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    include_str!("page.html")
        .replace("{threads}", &threads.to_string())
        .replace("{n}", &flash.dense().size.to_string())
        .replace("{nodes}", &flash.graph().size.to_string())
        .replace("{radius}", &RADIUS.to_string())
        .replace("{features}", &FEATURES.to_string())
        .replace("{dense_ms}", &figure(flash.dense().forward))
        .replace("{dense_training_ms}", &figure(flash.dense().training))
        .replace("{graph_ms}", &figure(flash.graph().forward))
        .replace("{graph_training_ms}", &figure(flash.graph().training))
        .replace("{dense_training_mib}", &figure(flash.dense().training_memory))
        .replace("{choose}", &report.rows.iter().map(|row| choose(row, report)).collect::<String>())
        .replace("{costs}", &report.rows.iter().map(costs).collect::<String>())
        .replace("{figures}", &figures(report))
}

/// Formats a number with about three digits.
fn figure(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value if value >= 0.1 => format!("{value:.2}"),
        value => format!("{value:.3}"),
    }
}

fn cells(figures: impl IntoIterator<Item = String>) -> String {
    figures.into_iter().map(|figure| format!("<td class='number'>{figure}</td>")).collect()
}

fn head(row: &Row) -> String {
    let (name, color) = (row.mechanism.attention.name(), row.mechanism.color);
    format!("<th scope='row'><i style='background:{color}'></i>{name}</th>")
}

/// Returns a row with the use of a mechanism, its cost relative to Flash, and its drawbacks.
fn choose(row: &Row, report: &Report) -> String {
    let flash = report.find("flash");
    let ([dense, graph], [of_dense, of_graph]) =
        ([row.dense(), row.graph()], [flash.dense(), flash.graph()]);
    let ratios = [
        dense.forward / of_dense.forward,
        dense.training / of_dense.training,
        dense.training_memory / of_dense.training_memory,
        graph.forward / of_graph.forward,
        graph.training / of_graph.training,
    ];
    let (when, unless) = (row.mechanism.when, row.mechanism.unless);
    let mut known = format!("not if {unless}");
    let found = report.approximations.iter().filter(|of| of.name == row.mechanism.attention.name());
    let errors: Vec<_> =
        found.map(|of| format!("{} at {}", figure(of.error), of.setting)).collect();
    if !errors.is_empty() {
        let (overtakes, errors) = (overtakes(&row.dense, &flash.dense), errors.join(", "));
        known += &format!(". Here {overtakes}; error {errors}");
    }
    let (head, ratios) = (head(row), cells(ratios.map(figure)));
    format!("<tr>{head}<td>{when}</td>{ratios}<td class='known'>{known}</td></tr>")
}

/// Describes from which size on a mechanism is faster than Flash.
fn overtakes(costs: &[Cost], of_flash: &[Cost]) -> String {
    let pairs = costs.iter().zip(of_flash).rev();
    match pairs.take_while(|(cost, flash)| cost.forward < flash.forward).last() {
        Some((cost, _)) => format!("faster than Flash from {} keys", cost.size),
        None => format!("not faster than Flash up to {} keys", costs[costs.len() - 1].size),
    }
}

fn costs(row: &Row) -> String {
    let (dense, graph) = (row.dense(), row.graph());
    let before = row.dense[row.dense.len() - 2];
    let growth =
        (dense.forward / before.forward).ln() / (dense.size as f64 / before.size as f64).ln();
    let one_query = row.one_query.iter().find(|cost| cost.size == 256);
    let figures = [
        one_query.map_or(String::new(), |cost| figure(1e3 * cost.forward)),
        figure(dense.forward),
        figure(dense.training),
        format!("n<sup>{growth:.1}</sup>"),
        figure(dense.forward_memory),
        figure(dense.training_memory),
        figure(graph.forward),
        figure(graph.training),
        format!("{:.0e}", row.rounding),
    ];
    format!("<tr>{}{}</tr>", head(row), cells(figures))
}

fn figures(report: &Report) -> String {
    type Costs = fn(&Row) -> &[Cost];
    type Plot = (&'static str, &'static str, Costs, fn(&Cost) -> f64);
    let (dense, graph): (Costs, Costs) = (|row| &row.dense, |row| &row.graph);
    let one_query: Costs = |row| &row.one_query;
    let plots: [Plot; 7] = [
        ("Dense, forward: ms", "keys and queries n", dense, |cost| cost.forward),
        ("Dense, training: ms", "keys and queries n", dense, |cost| cost.training),
        ("Dense, forward: peak MiB", "keys and queries n", dense, |cost| cost.forward_memory),
        ("Dense, training: peak MiB", "keys and queries n", dense, |cost| cost.training_memory),
        ("Graph, 16 neighbours per node, forward: ms", "nodes", graph, |cost| cost.forward),
        ("Graph, 16 neighbours per node, training: ms", "nodes", graph, |cost| cost.training),
        ("One query, forward: ms", "keys", one_query, |cost| cost.forward),
    ];
    let mut figures = String::new();
    for (caption, x_name, costs, y) in plots {
        let line = |row: &Row| Line {
            name: row.mechanism.attention.name(),
            color: row.mechanism.color,
            points: costs(row).iter().map(|cost| (cost.size as f64, y(cost), "")).collect(),
        };
        let lines: Vec<_> = report.rows.iter().map(line).collect();
        let sizes: Vec<_> = lines[0].points.iter().map(|point| point.0).collect();
        let plot = plot(x_name, Some(&sizes), &lines);
        figures += &format!("<figure><figcaption>{caption}</figcaption>{plot}</figure>");
    }
    let n = report.find("flash").dense().size;
    let plot = plot("forward: ms", None, &errors(report));
    let caption = format!("Relative error, {n} keys; m features, r keys on either side");
    figures + &format!("<figure><figcaption>{caption}</figcaption>{plot}</figure>")
}

/// Plots errors against milliseconds; exact attention is a vertical line, beyond which no approximation
/// is useful.
fn errors(report: &Report) -> Vec<Line<'_>> {
    let mut lines: Vec<Line<'_>> = Vec::new();
    for of in &report.approximations {
        if lines.last().is_none_or(|line| line.name != of.name) {
            let color = report.find(of.name).mechanism.color;
            lines.push(Line { name: of.name, color, points: Vec::new() });
        }
        let line = lines.last_mut().expect("it is there by now");
        line.points.push((of.milliseconds, of.error, of.setting.as_str()));
    }
    let errors = report.approximations.iter().map(|of| of.error);
    let (low, high) = (errors.clone().fold(f64::INFINITY, f64::min), errors.fold(0.0, f64::max));
    let flash = report.find("flash").dense().forward;
    lines.push(Line {
        name: "flash",
        color: "currentColor",
        points: vec![(flash, low, ""), (flash, high, "exact")],
    });
    lines
}
