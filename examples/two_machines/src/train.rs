//! A layer of graph attention, trained over the nodes of all workers.

use crate::exchange::{Exchange, Message, Result};
use crate::partition::{Edges, Links, Partition};
use graph_attention::ndarray::{Array2, ArrayView1, Axis, s};
use graph_attention::rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Attention, Flash, Graph, Inputs, Partial};

const FEATURES: usize = 16;
const HEADS: usize = 2;
/// The columns of all heads of queries, keys and values.
const COLUMNS: usize = HEADS * 8;
const LEARNING_RATE: f64 = 1.0;

/// The weights of queries, keys and values. Every worker has them all.
struct Layer([Array2<f64>; 3]);

impl Layer {
    fn new(seed: u64) -> Self {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        Self([(); 3].map(|()| {
            let weights = || rng.random_range(-1.0..1.0);
            Array2::from_shape_simple_fn((FEATURES, COLUMNS), weights)
        }))
    }

    /// The queries, keys and values of nodes.
    fn project(&self, x: &Array2<f64>) -> [Array2<f64>; 3] {
        self.0.each_ref().map(|weights| x.dot(weights))
    }

    /// A step of gradient descent.
    fn update(&mut self, grads: &[f64]) {
        for (weights, grads) in self.0.iter_mut().zip(grads.chunks(FEATURES * COLUMNS)) {
            let grads = ArrayView1::from(grads).into_shape_with_order((FEATURES, COLUMNS));
            weights.scaled_add(-LEARNING_RATE, &grads.expect("one for each weight"));
        }
    }
}

/// The gradients of the weights, given those of queries, keys and values.
fn weight_gradients(x: &Array2<f64>, grads: [&Array2<f64>; 3]) -> Vec<f64> {
    grads.iter().flat_map(|grad| x.t().dot(*grad).iter().copied().collect::<Vec<_>>()).collect()
}

/// The features of a node, by its number, so that a worker makes only those of its own nodes.
fn features(nodes: std::ops::Range<usize>) -> Array2<f64> {
    let mut x = Array2::zeros((nodes.len(), FEATURES));
    for (node, mut row) in nodes.zip(x.rows_mut()) {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(!(node as u64));
        row.mapv_inplace(|_: f64| rng.random_range(-1.0..1.0));
    }
    x
}

/// The nodes of one worker.
pub(crate) struct Shard {
    x: Array2<f64>,
    links: Links,
    num_nodes: usize,
}

/// What the backward pass needs.
struct Forward {
    key: Array2<f64>,
    value: Array2<f64>,
    /// The asking queries of each worker, and the partial results that were sent back.
    queries: Vec<Array2<f64>>,
    sent: Vec<Partial<f64>>,
    /// The partial results that each worker returned for the own nodes, and all of them merged.
    returned: Vec<Partial<f64>>,
    merged: Partial<f64>,
}

impl Shard {
    pub(crate) fn new(edges: &Edges, partition: &Partition, me: usize) -> Result<Self> {
        let links = Links::new(edges, partition, me)?;
        Ok(Self { x: features(partition.nodes(me)), links, num_nodes: partition.num_nodes })
    }

    /// The layer learns the outputs of another one. Returns the loss of each step.
    pub(crate) fn train(
        &self,
        exchange: &mut Exchange<'_>,
        steps: usize,
        report: impl Fn(usize, f64),
    ) -> Result<Vec<f64>> {
        let target = self.forward(&Layer::new(1), exchange)?.merged.into_parts().0;
        let mut layer = Layer::new(2);
        let mut losses = vec![];
        for step in 0..steps {
            let forward = self.forward(&layer, exchange)?;
            let (loss, grad_out) = loss(&forward.merged.out().to_owned(), &target, self.num_nodes);
            let mut sums = self.backward(&forward, &grad_out, exchange)?;
            sums.push(loss);
            let sums = exchange.sum(sums)?;
            layer.update(&sums[..sums.len() - 1]);
            losses.push(sums[sums.len() - 1]);
            report(step, losses[step]);
        }
        Ok(losses)
    }

    fn inputs<'a>(
        query: &'a Array2<f64>,
        key: &'a Array2<f64>,
        value: &'a Array2<f64>,
        graph: &'a Graph,
    ) -> Result<Inputs<'a, f64>> {
        Ok(Inputs::graph(query.view(), key.view(), value.view(), graph)?.with_heads(HEADS)?)
    }

    /// Queries travel to the keys, and partial results travel back.
    fn forward(&self, layer: &Layer, exchange: &mut Exchange<'_>) -> Result<Forward> {
        let Links { asking, asked } = &self.links;
        let [query, key, value] = layer.project(&self.x);
        let rows = asking.iter().map(|nodes| Message::Rows(query.select(Axis(0), nodes)));
        let rows = exchange.swap(rows.collect())?.into_iter().enumerate();
        let shape = |from: usize| [asked[from].num_queries(), COLUMNS];
        let queries: Vec<_> =
            rows.map(|(from, rows)| rows.rows(from, shape(from))).collect::<Result<_>>()?;

        let attend = |(query, graph)| -> Result<_> {
            Ok(Flash::new().forward_partial(&Self::inputs(query, &key, &value, graph)?)?)
        };
        let sent: Vec<_> = queries.iter().zip(asked).map(attend).collect::<Result<_>>()?;
        let returned = exchange.swap(sent.iter().cloned().map(Message::Partial).collect())?;
        let returned = returned.into_iter().enumerate();
        let returned: Vec<_> =
            returned.map(|(from, partial)| partial.partial(from)).collect::<Result<_>>()?;
        let mut merged = Partial::empty(self.x.nrows(), COLUMNS, HEADS)?;
        for (nodes, partial) in asking.iter().zip(&returned) {
            merged = merged.merge_queries(nodes, partial)?;
        }
        Ok(Forward { key, value, queries, sent, returned, merged })
    }

    /// Gradients of partial results travel to the keys, and gradients of queries travel back. Returns what the
    /// nodes contribute to the gradients of the weights.
    fn backward(
        &self,
        forward: &Forward,
        grad_out: &Array2<f64>,
        exchange: &mut Exchange<'_>,
    ) -> Result<Vec<f64>> {
        let Links { asking, asked } = &self.links;
        let Forward { key, value, queries, sent, returned, merged } = forward;
        let grads = asking.iter().zip(returned).map(|(nodes, partial)| {
            let all = merged.select_queries(nodes)?;
            let grad = grad_out.select(Axis(0), nodes);
            let (out, log_sum_exp) = all.merge_vjp(partial, grad.view(), None)?;
            Ok(Message::Gradients { out, log_sum_exp })
        });
        let grads = exchange.swap(grads.collect::<Result<_>>()?)?;

        let (mut grad_key, mut grad_value) = (Array2::zeros(key.dim()), Array2::zeros(value.dim()));
        let mut grad_queries = vec![];
        for (from, grads) in grads.into_iter().enumerate() {
            let [out, log_sum_exp] = grads.gradients(from)?;
            let inputs = Self::inputs(&queries[from], key, value, &asked[from])?;
            let grads = Flash::new().backward_partial(
                &inputs,
                &sent[from],
                out.view(),
                Some(log_sum_exp.view()),
            )?;
            grad_key += &grads.key;
            grad_value += &grads.value;
            grad_queries.push(Message::Rows(grads.query));
        }
        let mut grad_query = Array2::zeros((self.x.nrows(), COLUMNS));
        for (from, rows) in exchange.swap(grad_queries)?.into_iter().enumerate() {
            let rows = rows.rows(from, [asking[from].len(), COLUMNS])?;
            for (&node, row) in asking[from].iter().zip(rows.rows()) {
                let mut sum = grad_query.slice_mut(s![node, ..]);
                sum += &row;
            }
        }
        Ok(weight_gradients(&self.x, [&grad_query, &grad_key, &grad_value]))
    }
}

/// Half the mean squared error over all nodes, and its gradient.
fn loss(out: &Array2<f64>, target: &Array2<f64>, num_nodes: usize) -> (f64, Array2<f64>) {
    let error = out - target;
    let loss = error.iter().map(|error| error * error).sum::<f64>() / (2 * num_nodes) as f64;
    (loss, error / num_nodes as f64)
}

/// The same training with the whole graph in one piece, without partial results.
pub(crate) fn losses_of_the_whole(edges: &Edges, steps: usize) -> Result<Vec<f64>> {
    let num_nodes = edges.num_nodes();
    let mut list = vec![];
    edges.for_each(|query, key| list.push((query, key)))?;
    let graph = Graph::from_edges(num_nodes, num_nodes, list)?;
    let (x, flash) = (features(0..num_nodes), Flash::new());
    let [query, key, value] = Layer::new(1).project(&x);
    let target = flash.forward(&Shard::inputs(&query, &key, &value, &graph)?)?;
    let mut layer = Layer::new(2);
    let mut losses = vec![];
    for _ in 0..steps {
        let [query, key, value] = layer.project(&x);
        let inputs = Shard::inputs(&query, &key, &value, &graph)?;
        let (out, saved) = flash.forward_train(&inputs)?;
        let (loss, grad_out) = loss(&out, &target, num_nodes);
        let grads = flash.backward(&inputs, &saved, grad_out.view())?;
        layer.update(&weight_gradients(&x, [&grads.query, &grads.key, &grads.value]));
        losses.push(loss);
    }
    Ok(losses)
}
