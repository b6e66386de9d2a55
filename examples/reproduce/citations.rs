//! The two-layer graph attention network of Veličković et al. 2018, 1710.10903, with the dropout, weight decay and
//! patience of its authors' code: the topics of papers from their words and citations.

use examples::{Adam, Gat, data::Nodes, metrics};
use graph_attention::rand::{Rng, SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Dropout, Inputs};
use std::{error::Error, path::PathBuf};

/// Returns the accuracy on the test nodes, in percent.
pub fn run(folder: Option<PathBuf>, seed: u64) -> Result<f64, Box<dyn Error>> {
    let nodes = folder.map_or_else(|| Ok(Nodes::karate_club()), Nodes::read)?;
    let [train, val, test] = ["train", "val", "test"].map(|split| nodes.split(split));
    let graph = nodes.graph.with_self_loops()?;
    let x = nodes.features_by_count();
    let inputs = Inputs::self_attention(x.view(), &graph)?;

    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut model = Gat::new(x.ncols(), nodes.classes(), &mut rng)?;
    let mut adam = Adam::new(0.005, &model).weight_decay(5e-4);
    // A loss or an accuracy on the validation nodes that is at least as good as before adds 100 epochs; if both
    // are, the model is the best so far.
    let (mut best_loss, mut best_accuracy, mut answer) = (f32::INFINITY, 0.0, None);
    let (mut epoch, mut end) = (0, 100);
    while epoch < end {
        epoch += 1;
        let dropout = Dropout { probability: 0.6, seed: rng.next_u64() };
        let dropped = inputs.with_dropout(dropout)?;
        let (logits, passed) = model.forward_train(&dropped)?;
        let (_, grad) = metrics::cross_entropy(&logits, &train);
        let grads = model.backward(&dropped, &passed, grad.view())?;
        adam.step(&mut model, &grads)?;

        let logits = model.forward(&inputs)?;
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
