//! Two layers of GATv2 that learn the classes of all nodes from those of a few.

use crate::graphs::Example;
use crate::weights;
use graph_attention::ndarray::{Array1, Array2, ArrayD};
use graph_attention::rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Attention, EdgeGat, EdgeGatConfig, Graph, Inputs, Result, Saved, edge_gat::Score, params,
};

const RATE: f64 = 0.2;

#[derive(Clone)]
pub(crate) struct Training {
    graph: Graph,
    /// The known nodes and their classes.
    known: Vec<(usize, usize)>,
    /// Each node has its own column.
    nodes: Array2<f64>,
    first: EdgeGat<f64>,
    second: EdgeGat<f64>,
}

/// The results of a forward pass, and what the backward pass needs.
pub(crate) struct Forward {
    pub(crate) loss: f64,
    /// Probabilities, nodes × classes.
    pub(crate) shares: Array2<f64>,
    hidden: Array2<f64>,
    saved: [Saved; 2],
}

struct Backward {
    first: Vec<ArrayD<f64>>,
    second: Vec<ArrayD<f64>>,
    nodes: Array2<f64>,
}

impl Training {
    pub(crate) fn new(example: &Example, seed: u64) -> Result<Self> {
        let (n, rng) = (example.classes.len(), &mut Xoshiro256PlusPlus::seed_from_u64(seed));
        let classes = example.classes.iter().max().map_or(0, |last| last + 1);
        Ok(Self {
            graph: example.graph.clone(),
            known: example.known.iter().map(|&node| (node, example.classes[node])).collect(),
            nodes: Array2::eye(n),
            first: EdgeGatConfig::new(Score::GatV2, n, 8, 4).init(rng)?,
            second: EdgeGatConfig::new(Score::GatV2, 4 * 8, classes, 1).init(rng)?,
        })
    }

    /// The mean cross-entropy of the known nodes.
    pub(crate) fn forward(&self) -> Result<Forward> {
        let inputs = Inputs::self_attention(self.nodes.view(), &self.graph)?;
        let (out, first_saved) = self.first.forward_train(&inputs)?;
        let hidden = out.mapv(|x: f64| if x > 0.0 { x } else { x.exp_m1() }); // ELU
        let inputs = Inputs::self_attention(hidden.view(), &self.graph)?;
        let (logits, second_saved) = self.second.forward_train(&inputs)?;
        let mut shares = logits.mapv(f64::exp);
        for mut row in shares.rows_mut() {
            row /= row.sum();
        }
        let losses = self.known.iter().map(|&(node, class)| -shares[[node, class]].ln());
        let loss = losses.sum::<f64>() / self.known.len() as f64;
        Ok(Forward { loss, shares, hidden, saved: [first_saved, second_saved] })
    }

    fn backward(&self, forward: &Forward) -> Result<Backward> {
        // The gradient of the mean cross-entropy: softmax(logits) − one-hot class.
        let mut grad = Array2::zeros(forward.shares.raw_dim());
        for &(node, class) in &self.known {
            grad.row_mut(node).assign(&forward.shares.row(node));
            grad[[node, class]] -= 1.0;
        }
        grad /= self.known.len() as f64;
        let inputs = Inputs::self_attention(forward.hidden.view(), &self.graph)?;
        let second = self.second.backward(&inputs, &forward.saved[1], grad.view())?;
        // The slope of ELU from its value y: 1 if y > 0, else eˣ = y + 1.
        let grad = second.self_attention()? * forward.hidden.mapv(|y| 1.0 + y.min(0.0));
        let inputs = Inputs::self_attention(self.nodes.view(), &self.graph)?;
        let first = self.first.backward(&inputs, &forward.saved[0], grad.view())?;
        let nodes = first.self_attention()?;
        Ok(Backward { first: first.params, second: second.params, nodes })
    }

    /// Takes one step of gradient descent and returns the loss before it.
    pub(crate) fn step(&mut self) -> Result<f64> {
        let forward = self.forward()?;
        let grads = self.backward(&forward)?;
        for (layer, grads) in [(&mut self.first, grads.first), (&mut self.second, grads.second)] {
            params::update(layer, &grads, |_, mut param, grad| param.scaled_add(-RATE, &grad))?;
        }
        Ok(forward.loss)
    }

    /// The weights of the first layer, the mean over its heads.
    pub(crate) fn weights(&self) -> Result<Array2<f64>> {
        weights::of(&self.first, &Inputs::self_attention(self.nodes.view(), &self.graph)?)
    }

    /// The norm of the gradient of the loss with respect to each node.
    pub(crate) fn node_gradients(&self) -> Result<Array1<f64>> {
        let grads = self.backward(&self.forward()?)?.nodes;
        Ok(grads.rows().into_iter().map(|row| row.dot(&row).sqrt()).collect())
    }

    /// The change of the loss in a random direction of the parameters: by the gradient, and by central
    /// differences.
    pub(crate) fn gradient_check(&self) -> Result<[f64; 2]> {
        let grads = self.backward(&self.forward()?)?;
        let mut by_gradient = 0.0;
        let mut losses = [0.0; 2];
        for (loss, distance) in losses.iter_mut().zip([1e-5, -1e-5]) {
            // The same direction both times.
            let rng = &mut Xoshiro256PlusPlus::seed_from_u64(9);
            let mut moved = self.clone();
            by_gradient = 0.0;
            for (layer, grads) in
                [(&mut moved.first, &grads.first), (&mut moved.second, &grads.second)]
            {
                params::update(layer, grads, |_, mut param, grad| {
                    for (param, grad) in param.iter_mut().zip(grad) {
                        let direction = rng.random_range(-1.0..1.0);
                        *param += distance * direction;
                        by_gradient += direction * grad;
                    }
                })?;
            }
            *loss = moved.forward()?.loss;
        }
        Ok([by_gradient, (losses[0] - losses[1]) / 2e-5])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graphs::NAMES;

    #[test]
    fn networks_learn_and_gradients_agree_with_differences() -> Result<()> {
        for name in NAMES {
            let example = Example::new(name)?;
            let mut training = Training::new(&example, 5)?;
            let [by_gradient, by_difference] = training.gradient_check()?;
            let error = (by_gradient - by_difference).abs();
            assert!(
                error < 1e-8 * (1.0 + by_gradient.abs()),
                "{name}: {by_gradient} {by_difference}"
            );
            for _ in 0..300 {
                training.step()?;
            }
            let Forward { loss, shares, .. } = training.forward()?;
            // Below it, no known node loses ln 2 or more, so each one's own class has more than half.
            let bound = 2f64.ln() / example.known.len() as f64;
            assert!(loss < bound, "{name}: {loss}, expected less than {bound}");

            // A guess of the most frequent class is right for n p of the n other nodes, and a random one that
            // often for n p ± √(n p (1 − p)). The network must be better by four times that.
            let others: Vec<_> =
                (0..example.classes.len()).filter(|node| !example.known.contains(node)).collect();
            let of_class = |class| others.iter().filter(|&&u| example.classes[u] == class).count();
            let (n, most) = (others.len(), (0..shares.ncols()).map(of_class).max().unwrap_or(0));
            let (n, p) = (n as f64, most as f64 / n as f64);
            let guessed = n * p + 4.0 * (n * p * (1.0 - p)).sqrt();
            let is_right = |&&node: &&usize| {
                let own = shares[[node, example.classes[node]]];
                shares.row(node).iter().all(|&share| share <= own)
            };
            let right = others.iter().filter(is_right).count() as f64;
            println!("{name}: loss {loss:.4} < {bound:.4}, {right} > {guessed:.1} of {n} right");
            assert!(right > guessed, "{name}: {right} of {n}, expected more than {guessed}");
        }
        Ok(())
    }
}
