//! Where are the mines? Every field of a board is a node, joined with the up to eight fields around it. Half of the
//! fields show how many mines are around them, so a field alone says nothing about itself.
//!
//! Transformer layers as in Platonov et al. 2023, 2302.11640: pre-norm, GELU, a feed-forward network as wide as the
//! layer, between two linear maps; the step with the best validation score counts. With a *separated self* a node
//! does not attend to itself; a linear map of its own row is added to the output of its attention instead.

use super::Options;
use examples::{Adam, Between, data, metrics};
use graph_attention::ndarray::Array2;
use graph_attention::rand::{Rng, RngExt, SeedableRng, rngs::Xoshiro256PlusPlus, seq::SliceRandom};
use graph_attention::rowwise::{Activation, NormConfig, Normalization};
use graph_attention::{
    Attention, Dropout, EdgeGatConfig, Flash, Graph, Inputs, MultiHeadConfig, Result, Stack,
    StackConfig, TransformerLayer, TransformerLayerConfig, edge_gat::Score,
};
use std::{error::Error, path::PathBuf};

#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Gat,
    GatSeparated,
    Transformer,
    TransformerSeparated,
}

/// Returns the area under the ROC curve on the test fields of split `run`, in percent.
pub fn run(
    options: &Options,
    folder: Option<PathBuf>,
    kind: Kind,
    run: u64,
) -> std::result::Result<f64, Box<dyn Error>> {
    let Board { x, graph, splits: [train, val, test] } = board(folder, run)?;
    let is_separated = matches!(kind, Kind::GatSeparated | Kind::TransformerSeparated);
    let graph = if is_separated { graph } else { graph.with_self_loops()? };
    let inputs = Inputs::self_attention(x.view(), &graph)?;
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(run);
    let body = layers(options, kind, &mut rng)?;
    let mut model = Between::new([x.ncols(), options.width, 1], body, &mut rng)?;
    let mut adam = Adam::new(options.rate, &model);
    let auc = |logits: &Array2<f32>, fields: &[(usize, usize)]| {
        metrics::roc_auc(fields.iter().map(|&(field, mine)| (logits[[field, 0]], mine == 1)))
    };
    let (mut best, mut answer) = (0.0, 0.0);
    for step in 1..=options.steps {
        let dropout = Dropout { probability: 0.2, seed: rng.next_u64() };
        let dropped = inputs.with_dropout(dropout)?;
        let (logits, passed) = model.forward_train(&dropped)?;
        let (_, grad) = metrics::binary_cross_entropy(&logits, &train);
        let grads = model.backward(&dropped, &passed, grad.view())?;
        adam.step(&mut model, &grads)?;
        if step % 10 == 0 || step == options.steps {
            let logits = model.forward(&inputs)?;
            let on_val = auc(&logits, &val);
            if on_val > best {
                (best, answer) = (on_val, auc(&logits, &test));
            }
        }
    }
    Ok(100.0 * answer)
}

type Layer = TransformerLayer<f32, Box<dyn Attention<f32>>>;

fn layers(options: &Options, kind: Kind, rng: &mut impl Rng) -> Result<Stack<f32, Layer>> {
    let (width, heads) = (options.width, 8);
    let layers = (0..options.layers).map(|_| {
        let graph_layer = |score| EdgeGatConfig::new(score, width, width / heads, heads);
        let attention: Box<dyn Attention<f32>> = match kind {
            Kind::Gat => Box::new(graph_layer(Score::Gat).init(rng)?),
            Kind::GatSeparated => Box::new(graph_layer(Score::Gat).residual(true).init(rng)?),
            Kind::Transformer => {
                Box::new(MultiHeadConfig::new(width, heads).init(Flash::new(), rng)?)
            }
            // This score has a residual map by default.
            Kind::TransformerSeparated => Box::new(graph_layer(Score::DotProduct).init(rng)?),
        };
        let config = TransformerLayerConfig::new(width, width).norm_first(true);
        config.activation(Activation::Gelu).init(attention, rng)
    });
    let norm = NormConfig::new(Normalization::Layer, width);
    StackConfig::new().norm(norm).init(layers.collect::<Result<Vec<_>>>()?)
}

struct Board {
    /// What a field shows: one column for each number, and one for nothing.
    x: Array2<f32>,
    graph: Graph,
    /// The fields to train on, for validation and for the test, each with 1 if it is a mine.
    splits: [Vec<(usize, usize)>; 3],
}

/// Reads the board of the paper, or draws a smaller one.
fn board(folder: Option<PathBuf>, run: u64) -> std::result::Result<Board, Box<dyn Error>> {
    let Some(folder) = folder else { return drawn(30, run) };
    let nodes = data::rows(&data::text(folder.join("nodes.csv"))?)?;
    let mut x = Array2::zeros((nodes.len(), 7));
    let mut splits = [(); 3].map(|()| Vec::new());
    for (field, node) in nodes.iter().enumerate() {
        x[[field, node["column"].parse()?]] = 1.0;
        let letter = node["splits"].chars().nth(run as usize % 10);
        let split = letter.and_then(|letter| "tve".find(letter)).ok_or("no such split")?;
        splits[split].push((field, node["label"].parse()?));
    }
    let edges = data::pairs(&data::text(folder.join("edges.csv"))?)?;
    let graph = data::undirected(nodes.len(), &edges)?;
    Ok(Board { x, graph, splits })
}

/// Draws a square board: a mine on a fifth of the fields, and numbers hidden on half of them.
fn drawn(side: usize, seed: u64) -> std::result::Result<Board, Box<dyn Error>> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let around = |field: usize| {
        let near = move |i: usize| i.saturating_sub(1)..(i + 2).min(side);
        let fields =
            near(field / side).flat_map(move |i| near(field % side).map(move |j| i * side + j));
        fields.filter(move |&other| other != field)
    };
    let n = side * side;
    let mines: Vec<usize> = (0..n).map(|_| usize::from(rng.random_bool(0.2))).collect();
    let edges = (0..n).flat_map(|field| around(field).map(move |other| (field, other)));
    let mut x = Array2::zeros((n, 7));
    for field in 0..n {
        let number = around(field).map(|other| mines[other]).sum::<usize>().min(5);
        x[[field, if rng.random_bool(0.5) { 0 } else { 1 + number }]] = 1.0;
    }
    let mut fields: Vec<_> = mines.iter().copied().enumerate().collect();
    fields.shuffle(&mut rng);
    let (test, rest) = fields.split_at(n / 4);
    let (val, train) = rest.split_at(n / 4);
    let splits = [train, val, test].map(|fields| fields.to_vec());
    Ok(Board { x, graph: Graph::from_edges(n, n, edges)?, splits })
}
