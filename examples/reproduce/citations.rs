//! The topics of papers from their words and citations: the network of Veličković et al. 2018, 1710.10903, with the
//! initial parameters, weight decay and patience of its authors' code, and with its dropout in three places: the
//! words, with other masks for each head; the projected rows, where they are values; and the attention weights.

use examples::{Adam, data::Nodes, dropped, metrics, with_dropout};
use graph_attention::edge_gat::Score;
use graph_attention::ndarray::{Array2, ArrayD, ArrayViewD, ArrayViewMutD};
use graph_attention::rand::{Rng, RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::rowwise::Activation;
use graph_attention::{
    Attention, Dropout, EdgeGat, EdgeGatConfig, Flash, Graph, Inputs, Params, Result, Saved,
};
use std::{error::Error, path::PathBuf};

/// The heads of the first layer, and the columns of each.
const HEADS: usize = 8;
const COLUMNS: usize = 8;

/// Returns the accuracy on the test nodes, in percent.
pub fn run(folder: Option<PathBuf>, seed: u64) -> std::result::Result<f64, Box<dyn Error>> {
    let nodes = folder.map_or_else(|| Ok(Nodes::karate_club()), Nodes::read)?;
    let [train, val, test] = ["train", "val", "test"].map(|split| nodes.split(split));
    let papers = Papers::new(&nodes)?;
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut model = Network::new(nodes.features.ncols(), nodes.classes(), &mut rng)?;
    let mut adam = Adam::new(0.005, &model).weight_decay(5e-4);
    // A loss or an accuracy on the validation nodes that is at least as good as before adds 100 epochs; if both
    // are, the model is the best so far.
    let (mut best_loss, mut best_accuracy, mut answer) = (f32::INFINITY, 0.0, None);
    let (mut epoch, mut end) = (0, 100);
    while epoch < end {
        epoch += 1;
        let dropout = Some(Dropout { probability: 0.6, seed: rng.next_u64() });
        let (logits, passed) = model.forward(&papers, dropout)?;
        let (_, grad) = metrics::cross_entropy(&logits, &train);
        let grads = model.backward(&papers, dropout, &passed, &grad)?;
        adam.step(&mut model, &grads)?;

        let (logits, _) = model.forward(&papers, None)?;
        let (loss, _) = metrics::cross_entropy(&logits, &val);
        let accuracy = metrics::accuracy(&logits, &val);
        if loss <= best_loss || accuracy >= best_accuracy {
            if loss <= best_loss && accuracy >= best_accuracy {
                answer = Some(metrics::accuracy(&logits, &test));
            }
            (best_loss, best_accuracy) = (loss.min(best_loss), accuracy.max(best_accuracy));
            end = epoch + 100;
        }
    }
    let accuracy =
        answer.ok_or("no epoch improved the loss and accuracy on the validation nodes")?;
    Ok(100.0 * accuracy)
}

/// Each place of the network has its own dropout.
fn of_layer(dropout: Option<Dropout>, layer: usize) -> Option<Dropout> {
    dropout.map(|dropout| dropout.of_layer(layer))
}

struct Papers {
    /// From each paper to its words.
    words: Graph,
    /// From each paper to itself and those that it cites or is cited by.
    links: Graph,
    /// Papers and words say nothing about the weights of words.
    blank: [Array2<f32>; 2],
}

impl Papers {
    fn new(nodes: &Nodes) -> Result<Self> {
        let (n, words) = nodes.features.dim();
        let of_papers = nodes.features.indexed_iter().filter(|&(_, &is)| is > 0.0);
        Ok(Self {
            words: Graph::from_edges(n, words, of_papers.map(|(pair, _)| pair))?,
            links: nodes.graph.with_self_loops()?,
            blank: [n, words].map(|rows| Array2::zeros((rows, HEADS))),
        })
    }

    /// Attention with equal weights is the mean of a paper's words, so dropout of the weights drops words, other
    /// ones for each head.
    fn words<'a>(
        &'a self,
        weight: &'a Array2<f32>,
        dropout: Option<Dropout>,
    ) -> Result<Inputs<'a, f32>> {
        let [query, key] = &self.blank;
        let inputs = Inputs::graph(query.view(), key.view(), weight.view(), &self.words)?;
        with_dropout(inputs.with_heads(HEADS)?, dropout)
    }
}

struct Network {
    layers: [Layer; 2],
}

/// What the backward pass needs of a forward pass.
struct Passed {
    words: Saved,
    layers: [PassedLayer; 2],
    /// The output of the first layer, before the ELU.
    hidden: Array2<f32>,
    /// The input of the second.
    input: Array2<f32>,
}

impl Network {
    fn new(words: usize, classes: usize, rng: &mut impl Rng) -> Result<Self> {
        let first = Layer::new([words, COLUMNS, HEADS], rng)?;
        Ok(Self { layers: [first, Layer::new([HEADS * COLUMNS, classes, 1], rng)?] })
    }

    fn forward(&self, papers: &Papers, dropout: Option<Dropout>) -> Result<(Array2<f32>, Passed)> {
        let [first, second] = &self.layers;
        let [of_words, of_first, of_hidden, of_second] =
            [0, 1, 2, 3].map(|at| of_layer(dropout, at));
        let x = papers.words(&first.weight, of_words)?;
        let (projected, words) = Flash::new().forward_train(&x)?;
        let (hidden, passed_first) = first.attend(&papers.links, projected, of_first)?;
        let input = dropped(hidden.mapv(|x| Activation::Elu.value(x)).view(), of_hidden);
        let projected = input.dot(&second.weight);
        let (out, passed_second) = second.attend(&papers.links, projected, of_second)?;
        Ok((out, Passed { words, layers: [passed_first, passed_second], hidden, input }))
    }

    /// Returns the gradients of the parameters.
    fn backward(
        &self,
        papers: &Papers,
        dropout: Option<Dropout>,
        passed: &Passed,
        grad_out: &Array2<f32>,
    ) -> Result<Vec<ArrayD<f32>>> {
        let [first, second] = &self.layers;
        let [of_words, of_first, of_hidden, of_second] =
            [0, 1, 2, 3].map(|at| of_layer(dropout, at));
        let [passed_first, passed_second] = &passed.layers;
        let (grad, params_second) =
            second.backward(&papers.links, passed_second, grad_out, of_second)?;
        let grad_second = passed.input.t().dot(&grad);
        let mut grad = dropped(grad.dot(&second.weight.t()).view(), of_hidden);
        grad.zip_mut_with(&passed.hidden, |grad, &x| *grad *= Activation::Elu.slope(x));
        let (grad, params_first) = first.backward(&papers.links, passed_first, &grad, of_first)?;
        let x = papers.words(&first.weight, of_words)?;
        let grad_first = Flash::new().backward(&x, &passed.words, grad.view())?.value;
        let [grad_first, grad_second] = [grad_first, grad_second].map(|grad| vec![grad.into_dyn()]);
        Ok([grad_first, params_first, grad_second, params_second].concat())
    }
}

/// A projection, and attention over its result. They are apart because dropout comes between them: `EdgeGat` has
/// a projection too, which is the identity here.
struct Layer {
    weight: Array2<f32>,
    attention: EdgeGat<f32>,
}

/// The projected rows, as keys and as values, and the state of attention.
type PassedLayer = (Array2<f32>, Array2<f32>, Saved);

impl Layer {
    fn new([inputs, columns, heads]: [usize; 3], rng: &mut impl Rng) -> Result<Self> {
        let config = EdgeGatConfig::new(Score::Gat, heads * columns, columns, heads);
        let mut attention = config.init(rng)?;
        // Each head is a layer of its own in the authors' code, with two more layers that compute its scores.
        let mut glorot = |inputs: usize, outputs: usize| {
            let bound = (6.0 / (inputs + outputs) as f32).sqrt();
            rng.random_range(-bound..bound)
        };
        let weight =
            Array2::from_shape_simple_fn((inputs, heads * columns), || glorot(inputs, columns));
        attention.visit_params_mut(&mut |name, mut param| match name {
            "lin.weight" => param.assign(&Array2::eye(heads * columns)),
            "bias" => {}
            _ => param.mapv_inplace(|_| glorot(columns, 1)),
        });
        Ok(Self { weight, attention })
    }

    fn attend(
        &self,
        links: &Graph,
        projected: Array2<f32>,
        dropout: Option<Dropout>,
    ) -> Result<(Array2<f32>, PassedLayer)> {
        let value = dropped(projected.view(), of_layer(dropout, 1));
        let inputs = Inputs::graph(projected.view(), projected.view(), value.view(), links)?;
        let (out, saved) = self.attention.forward_train(&with_dropout(inputs, dropout)?)?;
        Ok((out, (projected, value, saved)))
    }

    /// Returns the gradients of the projected rows and of the parameters of attention.
    fn backward(
        &self,
        links: &Graph,
        (projected, value, saved): &PassedLayer,
        grad_out: &Array2<f32>,
        dropout: Option<Dropout>,
    ) -> Result<(Array2<f32>, Vec<ArrayD<f32>>)> {
        let inputs = Inputs::graph(projected.view(), projected.view(), value.view(), links)?;
        let inputs = with_dropout(inputs, dropout)?;
        let mut grads = self.attention.backward(&inputs, saved, grad_out.view())?;
        grads.params.pop(); // of the identity
        let value = dropped(grads.value.view(), of_layer(dropout, 1));
        Ok((grads.query + grads.key + value, grads.params))
    }
}

impl Params<f32> for Network {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        for layer in &self.layers {
            visitor("weight", layer.weight.view().into_dyn());
            layer.attention.visit_params(&mut |name, param| match name {
                "lin.weight" => {}
                _ => visitor(name, param),
            });
        }
    }
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        for layer in &mut self.layers {
            visitor("weight", layer.weight.view_mut().into_dyn());
            layer.attention.visit_params_mut(&mut |name, param| match name {
                "lin.weight" => {}
                _ => visitor(name, param),
            });
        }
    }
}
