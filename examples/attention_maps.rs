//! Shows who attends to whom: the weights of the mechanisms on Zachary's karate club, drawn on the graph
//! and as matrices. The club split in two, and the weights show it. (`Flash` has the same weights as
//! `ScaledDotProduct`; `Moe` and `DualSpace` only have the weights of their inner mechanisms.)
//!
//! ```sh
//! cargo run --release -p examples --example attention_maps               # target/attention_maps.svg
//! cargo run --release -p examples --example attention_maps -- maps.svg
//! ```
//!
//! Beside it, `karate_club.svg` has four of the graphs.

use examples::data::Nodes;
use graph_attention::ndarray::{Array1, Array2};
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Attention, EdgeGatConfig, Flash, Graph, GraphRopeConfig, Inputs, LocalGlobal, MultiHeadConfig,
    PerformerConfig, PoincareConfig, Result, ScaledDotProduct, edge_gat::Score, graph_rope::Layout,
    local_global::Window, params, poincare::Coordinates,
};
use std::{f64::consts::PI, sync::LazyLock};

const N: usize = 34;
static CLUB: LazyLock<Nodes> = LazyLock::new(Nodes::karate_club);
const LEADERS: [usize; 2] = [0, 33];

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let friends = &CLUB.graph;
    let is_friend = |u: usize, v: usize| u == v || friends.neighbors(u).contains(&(v as u32));

    // Members are similar if they have the same friends: scores are 4 times the cosine of two rows.
    let mut x = Array2::from_shape_fn((N, N), |(u, v)| f64::from(is_friend(u, v)));
    for mut row in x.rows_mut() {
        row *= (4.0 * (N as f64).sqrt() / row.sum()).sqrt();
    }
    let alike = Inputs::dense(x.view(), x.view(), x.view())?;
    // Each member is the mean of its friends, so a member with many friends is close to the origin.
    let means = Array2::from_shape_fn((N, N), |(u, v)| 3.0 * x[[u, v]] / x.row(u).sum());
    let central = Inputs::dense(means.view(), means.view(), means.view())?;

    // Or all members are the same except for their position in hops: 5 hops, the maximum, turn by π.
    let same = Array2::from_elem((N, 4), 2.0);
    let from_leaders = friends.hops_from(&LEADERS.map(|leader| [leader]), 5.0)? * (PI / 5.0);
    let pairs = Graph::from_edges(N, N, (0..N * N).map(|pair| (pair / N, pair % N)))?;
    let between: Array1<f64> = friends.hop_distances(&pairs, 5, 5.0)? * (PI / 5.0);
    let placed = Inputs::dense(same.view(), same.view(), same.view())?
        .with_positions(from_leaders.view(), from_leaders.view())?
        .with_distances(between.view())?;

    // Or they learn which friends to attend to, to predict their own side: from the sides that their
    // friends took, or from the number of friends in common.
    let sides = Array2::from_shape_fn((N, 1), |(u, _)| [1.0, -1.0][side(u)]);
    let told = Inputs::graph(x.view(), x.view(), sides.view(), friends)?;
    let mut shared = Array2::zeros((friends.num_edges(), 1));
    for (u, v, edge) in (0..N).flat_map(|u| friends.row(u).map(move |(v, edge)| (u, v, edge))) {
        let both = (0..N).filter(|&w| is_friend(u, w) && is_friend(v, w));
        shared[[edge, 0]] = 0.3 * both.count() as f64;
    }
    let sharing = Inputs::graph(x.view(), x.view(), x.view(), friends)?;
    let sharing = sharing.with_edge_features(shared.view())?;

    let rng = &mut Xoshiro256PlusPlus::seed_from_u64(1);
    let poincare = PoincareConfig::new().coordinates(Coordinates::Tangent);
    let window = LocalGlobal::sliding_window(Window::new(4).globals(&LEADERS), Flash::new())?;
    let rope = GraphRopeConfig::new(4, Layout::Half).base(1.0);
    let nodes = rope.clone().axes(2).init(Flash::new())?;
    let votes = MultiHeadConfig::new(N, 1).value_dim(1).init(Flash::new(), rng)?;
    let gat = EdgeGatConfig::new(Score::Gat, N, 8, 1).edge_dim(1).init(rng)?;
    let performer = PerformerConfig::new(N, 1024).init(rng)?;
    let maps: [(Box<dyn Attention<f64>>, _, _); 8] = [
        (Box::new(ScaledDotProduct::new()), "all pairs: by friends in common", alike),
        (Box::new(performer), "the same, with 1024 random features", alike),
        (Box::new(window), "the same: near numbers and leaders", alike),
        (Box::new(poincare.init()?), "all pairs: hyperbolic, hubs at the centre", central),
        (Box::new(nodes), "all pairs: by hops from the two leaders", placed),
        (Box::new(rope.init_edges()?), "all pairs: by hops between them", placed),
        (Box::new(votes), "friends: learned from their sides", told),
        (Box::new(gat), "friends: learned from friends in common", sharing),
    ];

    let (mut picture, mut four) = (String::new(), String::new());
    println!("share of the weight on other members that goes to the same side:");
    println!("mechanism              uniform   here");
    for (at, (mut attention, sees, inputs)) in maps.into_iter().enumerate() {
        let name = attention.name();
        if ["multi_head", "edge_gat"].contains(&name) {
            learn(&mut attention, &inputs, &sides)?;
        }
        let weights = attention.attention_weights(&inputs)?;
        let even = ScaledDotProduct::new().with_scale(0.0)?.attention_weights(&inputs)?;
        let [even, share] = [&even, &weights].map(|weights| {
            let mut sums = [0.0; 2];
            for pair in (0..N).flat_map(|u| inputs.row(u)).filter(|pair| pair.query != pair.key) {
                let stays = side(pair.query) == side(pair.key);
                sums[usize::from(stays)] += weights[[pair.index, 0]];
            }
            sums[1] / (sums[0] + sums[1])
        });
        println!("{name:<24} {even:.3}   {share:.3}");
        assert!(share > even + 0.05, "{name} prefers the same side");
        let share =
            format!("{:.0}% to the same side; {:.0}% if uniform", 100.0 * share, 100.0 * even);
        let [graph, matrix] = map(&inputs, &weights);
        let (left, top) = (24 + 250 * (at % 4), 28 + 428 * (at / 4));
        picture += &format!(
            "<g transform='translate({left},{top})'><text font-weight='bold'>{name}</text>
            <text y='17'>{sees}</text><text y='391'>{share}</text><g transform='translate(2,34)'>{graph}</g>
            <g transform='translate(0,172)'>{matrix}</g></g>"
        );
        if ["scaled_dot_product", "poincare", "edge_rope", "edge_gat"].contains(&name) {
            let at = four.matches("bold").count();
            let (left, top) = (8 + 262 * (at % 2), 20 + 192 * (at / 2));
            four += &format!(
                "<g transform='translate({left},{top})'><text font-weight='bold'>{name}</text>
                <text y='17'>{sees}</text><g transform='translate(2,34)'>{graph}</g></g>"
            );
        }
    }
    std::fs::create_dir_all("target")?;
    let path = std::env::args().nth(1).unwrap_or("target/attention_maps.svg".into());
    let svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 1010 916' font-family='sans-serif'
        font-size='12' fill='#1e293b'><rect width='1010' height='916' fill='#fff'/>{picture}
        <text x='24' y='882'>A row of the matrix, a member's weights, sums to 1. Blue is within Mr. Hi's side,
        orange within the officer's, grey between them. Shares exclude the weight on
        oneself.</text>
        <text x='24' y='899'>Lines show both directions; dots grow with the weight received. Opacity is the
        square root of a cell's weight in all maps. Learned maps were trained on all
        sides.</text></svg>"
    );
    std::fs::write(&path, svg)?;
    // Greys that are readable on light and dark pages.
    let four = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 520 384' font-family='sans-serif'
        font-size='12' fill='#768390'>{four}</svg>\n"
    );
    let beside = std::path::Path::new(&path).with_file_name("karate_club.svg");
    std::fs::write(&beside, four)?;
    println!("pictures: {path}, {}", beside.display());
    Ok(())
}

/// Learns the side of each member, in the first column of the output, by gradient descent on the squared
/// error.
fn learn(
    attention: &mut dyn Attention<f64>,
    inputs: &Inputs<'_, f64>,
    sides: &Array2<f64>,
) -> Result<()> {
    for _ in 0..500 {
        let (mut out, saved) = attention.forward_train(inputs)?;
        for ((member, column), out) in out.indexed_iter_mut() {
            *out = if column == 0 { *out - sides[[member, 0]] } else { 0.0 };
        }
        let grads = attention.backward_params(inputs, &saved, out.view())?;
        params::update(attention, &grads, |_, mut param, grad| param.scaled_add(-0.003, &grad))?;
    }
    Ok(())
}

/// Draws the weights as a graph and as a matrix with Mr. Hi's side first.
fn map(inputs: &Inputs<'_, f64>, weights: &Array2<f64>) -> [String; 2] {
    let color = |u, v| match side(u) == side(v) {
        true => ["#2563eb", "#ea580c"][side(u)],
        false => "#64748b",
    };
    let rank = |u: usize| (0..N).filter(|&v| (side(v), v) < (side(u), u)).count();
    let [mut lines, mut cells, mut dots] = [const { String::new() }; 3];
    let (mut received, mut between) = ([0.0f64; N], Array2::<f64>::zeros((N, N)));
    for pair in (0..N).flat_map(|u| inputs.row(u)) {
        let (u, v, weight) = (pair.query, pair.key, weights[[pair.index, 0]]);
        received[v] += weight;
        between[[u.min(v), u.max(v)]] += weight / 2.0;
        let (x, y, fill, opacity) = (6 * rank(v), 6 * rank(u), color(u, v), weight.sqrt());
        cells += &format!("<path d='M{x} {y}h6v6h-6z' fill='{fill}' opacity='{opacity:.2}'/>");
    }
    for ((u, v), weight) in between.indexed_iter().filter(|((u, v), w)| u != v && **w > 0.01) {
        let ([x, y], [to_x, to_y], stroke) = (PLACES[u], PLACES[v], color(u, v));
        let line = format!("d='M{x} {y}L{to_x} {to_y}' stroke='{stroke}'");
        lines += &format!("<path {line} stroke-width='{:.1}'/>", 8.0 * weight);
    }
    for (u, [x, y]) in PLACES.iter().enumerate() {
        let (radius, fill) = (2.0 + 2.2 * received[u].sqrt(), color(u, u));
        dots += &format!("<circle cx='{x}' cy='{y}' r='{radius:.1}' fill='{fill}' stroke='#fff'/>");
    }
    [
        format!("<g stroke-opacity='0.6'>{lines}{dots}</g>"),
        format!(
            "{cells}<path d='M0 0h204v204h-204zM102 0v204M0 102h204' fill='none' stroke='#cbd5e1'/>"
        ),
    ]
}

/// The side that a member took when the club split: 0 is Mr Hi's.
fn side(member: usize) -> usize {
    CLUB.class(member)
}

/// The positions of the members in the picture, with distances roughly proportional to hops.
#[rustfmt::skip]
const PLACES: [[u8; 2]; N] = [
    [56, 62], [68, 42], [91, 33], [54, 25], [18, 57], [34, 99], [18, 82], [69, 9], [103, 64],
    [138, 9], [37, 75], [54, 102], [23, 24], [84, 56], [197, 61], [200, 38], [0, 109], [35, 44],
    [158, 6], [84, 80], [186, 22], [39, 10], [178, 0], [170, 90], [139, 122], [160, 120], [197,
    85], [150, 87], [136, 57], [178, 68], [132, 32], [130, 81], [160, 37], [156, 60],
];
