//! The page: `page.html`, filled with tables and plots.

use crate::measure::{Cost, Report, Row};
use crate::mechanisms::{FEATURES, RADIUS};
use crate::plot::{Line, figure, plot};

pub(crate) fn page(report: &Report) -> String {
    let flash = report.find("flash");
    // A line and the rows of its mechanism light up together.
    let names = report.rows.iter().map(|row| row.mechanism.attention.name());
    let light = names.map(|name| {
        format!(
            "body:has(.{name}:is(:hover, :focus-within, :focus)) .line:not(.{name}) {{ opacity: .15; }}\n\
             body:has(.{name}:is(:hover, :focus-within, :focus)) .line.{name} polyline {{ stroke-width: 3; }}\n"
        )
    });
    include_str!("page.html")
        .replace("/* lines that light up */", &light.collect::<String>())
        .replace("{machine}", &report.machine)
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
    let name = row.mechanism.attention.name();
    format!("<tr class='{name}'>{head}<td>{when}<small>{known}</small></td>{ratios}</tr>")
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
        format!("n^{growth:.1}"),
        figure(dense.forward_memory),
        figure(dense.training_memory),
        figure(graph.forward),
        figure(graph.training),
        format!("{:.0e}", row.rounding),
    ];
    let name = row.mechanism.attention.name();
    format!("<tr class='{name}'>{}{}</tr>", head(row), cells(figures))
}

fn figures(report: &Report) -> String {
    type Costs = fn(&Row) -> &[Cost];
    type Plot = (&'static str, [&'static str; 2], Costs, fn(&Cost) -> f64);
    let (dense, graph): (Costs, Costs) = (|row| &row.dense, |row| &row.graph);
    let one_query: Costs = |row| &row.one_query;
    let [dense_time, dense_memory] = [["keys and queries n", "ms"], ["keys and queries n", "MiB"]];
    let graph_time = ["nodes", "ms"];
    let plots: [Plot; 7] = [
        ("Dense, forward: time", dense_time, dense, |cost| cost.forward),
        ("Dense, training: time", dense_time, dense, |cost| cost.training),
        ("Dense, forward: peak memory", dense_memory, dense, |cost| cost.forward_memory),
        ("Dense, training: peak memory", dense_memory, dense, |cost| cost.training_memory),
        ("Graph, 16 neighbours per node, forward: time", graph_time, graph, |cost| cost.forward),
        ("Graph, 16 neighbours per node, training: time", graph_time, graph, |cost| cost.training),
        ("One query, forward: time", ["keys", "ms"], one_query, |cost| cost.forward),
    ];
    let mut figures = String::new();
    for (caption, names, costs, y) in plots {
        let plot = of_sizes(report, names, costs, y);
        figures += &format!("<figure><figcaption>{caption}</figcaption>{plot}</figure>");
    }
    let n = report.find("flash").dense().size;
    let plot = plot(["forward, ms", "|out − exact| / |exact|"], None, &errors(report));
    let caption = format!("Error against time, {n} keys; m features, r keys on either side");
    figures + &format!("<figure><figcaption>{caption}</figcaption>{plot}</figure>")
}

/// Plots a cost of every mechanism as inputs grow.
fn of_sizes(
    report: &Report,
    names: [&str; 2],
    costs: fn(&Row) -> &[Cost],
    y: fn(&Cost) -> f64,
) -> String {
    let line = |row: &Row| Line {
        name: row.mechanism.attention.name(),
        color: row.mechanism.color,
        points: costs(row).iter().map(|cost| (cost.size as f64, y(cost), "")).collect(),
    };
    let lines: Vec<_> = report.rows.iter().map(line).collect();
    let sizes: Vec<_> = lines[0].points.iter().map(|point| point.0).collect();
    plot(names, Some(&sizes), &lines)
}

/// The time of dense attention as a picture of its own, readable on light and dark pages.
pub(crate) fn picture(report: &Report) -> String {
    let names = ["keys and queries n", "ms, forward, dense, 64 columns of f32"];
    let style = "<style>svg { font: 13px sans-serif; color: #768390 } text { fill: currentColor } \
                 .axes path { stroke: #768390; opacity: .3 } .line polyline { fill: none; stroke: \
                 currentColor; stroke-width: 1.8 } .line path { stroke: currentColor; opacity: .45 } \
                 .line circle { fill: currentColor } .line.flash polyline { stroke-width: 3.5 }</style>";
    of_sizes(report, names, |row| &row.dense, |cost| cost.forward).replacen(
        '>',
        &format!(">{style}"),
        1,
    )
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
