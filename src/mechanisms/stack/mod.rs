//! Layers one after the other: [`Stack`].

mod config;

pub use config::StackConfig;

use crate::attention::{Attention, Saved, check_output};
use crate::cache::KeyValueCache;
use crate::element::try_zeros;
use crate::error::{Error, Result, check_shape};
use crate::gradients::GradientsMut;
use crate::inputs::{Inputs, Pattern};
use crate::kernels::Float;
use crate::params::{self, Params, prefixed};
use crate::rowwise::Norm;
use ndarray::{Array2, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD, aview0};
use std::mem::take;

const NAME: &str = "stack";

/// Layers one after the other as one mechanism, with one list of parameters: PyTorch's `nn.TransformerEncoder`.
///
/// ```text
/// h₁ = layer₁(q, k, v)      hₗ = layerₗ(hₗ₋₁, hₗ₋₁, hₗ₋₁)                      self-attention
/// h₁ = layer₁(q, k, v)      hₗ = layerₗ(hₗ₋₁, k, v)            `cross_attention`
/// y = hₙ, or norm(hₙ)
/// ```
///
/// The layers may be any mechanisms: of one type, or `Box<dyn Attention<F>>`. Every layer gets the same pairs
/// and their data (mask, bias, edge features, distances, positions, …), whose gradients are the sums over all
/// layers.
///
/// * **Self-attention** (default): row i of queries and of keys is the same node, so there must be as many keys as
///   queries, in packed inputs in each segment, and in a block-diagonal graph in each block. For mini-batches with fewer targets than nodes, make the graph
///   over all nodes and use the rows of the targets.
/// * **Cross-attention** ([`StackConfig::cross_attention`]): queries and keys are different rows, in any
///   numbers. Keys and values stay as they are, and the queries go through the layers.
/// * **Output** num_queries × columns of the last layer.
/// * **Dropout** Each layer has a seed of its own: [`Dropout::of_layer`](crate::Dropout::of_layer). (In a
///   stack of stacks, layer 2 of stack 1 and layer 1 of stack 2 share one.)
/// * **Weights** [`attention_weights`](Attention::attention_weights) is
///   [`Error::NoWeights`], since each layer has its own: [`weights_by_layer`](Self::weights_by_layer).
/// * **Parameters** those of the layers with the prefixes `layers.0.`, `layers.1.`, …, then `norm.weight` and
///   `norm.bias` if there is a norm. With [`TransformerLayer`](crate::TransformerLayer)s these are the names
///   of PyTorch's `nn.TransformerEncoder`.
/// * **Cost** the layers one after the other. Training keeps the output and the state of every layer; with
///   [`StackConfig::checkpointing`] only the outputs, at the price of a second forward pass.
/// * **Errors** [`Error::Shape`] if there are not as many keys as queries in self-attention, or a layer cannot
///   read the output of the one before it. Errors of a layer name it: `layers.1 (multi_head)`.
///
/// ```
/// use graph_attention::ndarray::Array2;
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
/// use graph_attention::rowwise::{NormConfig, Normalization};
/// use graph_attention::{
///     Attention, Flash, Graph, Inputs, MultiHeadConfig, Result, StackConfig, TransformerLayerConfig,
/// };
///
/// // Three pre-norm layers with 2 heads each, and a norm.
/// let mut rng = Xoshiro256PlusPlus::seed_from_u64(7);
/// let layers = (0..3).map(|_| {
///     let heads = MultiHeadConfig::new(8, 2).init(Flash::new(), &mut rng)?;
///     TransformerLayerConfig::new(8, 32).norm_first(true).init(heads, &mut rng)
/// });
/// let layers = layers.collect::<Result<Vec<_>>>()?;
/// let encoder = StackConfig::new().norm(NormConfig::new(Normalization::Layer, 8)).init(layers)?;
///
/// let nodes = Array2::<f32>::ones((3, 8));
/// let graph = Graph::from_edges(3, 3, [(0, 1), (1, 2), (2, 0)])?.with_self_loops()?;
/// let inputs = Inputs::self_attention(nodes.view(), &graph)?;
/// let (out, saved) = encoder.forward_train(&inputs)?;
/// let grads = encoder.backward(&inputs, &saved, out.view())?;
/// assert_eq!(grads.param(&encoder, "layers.2.linear1.weight")?.shape(), [32, 8]);
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Stack<F, A> {
    layers: Vec<A>,
    norm: Option<Norm<F>>,
    cross_attention: bool,
    checkpointing: bool,
}

/// The state saved by a forward pass.
struct State<F> {
    /// The outputs of the layers: of all but the last one, and of that too if there is a norm.
    outputs: Vec<Array2<F>>,
    /// The states of the layers, unless the backward pass computes them again.
    layers: Option<Vec<Saved>>,
}

impl<F: Float, A: Attention<F>> Stack<F, A> {
    /// Returns the layers, the first one first.
    pub fn layers(&self) -> &[A] {
        &self.layers
    }

    /// Returns the attention weights of every layer, each as from
    /// [`attention_weights`](Attention::attention_weights).
    ///
    /// # Errors
    /// [`Error::NoWeights`] if a layer has none; otherwise as [`forward`](Attention::forward).
    pub fn weights_by_layer(&self, inputs: &Inputs<'_, F>) -> Result<Vec<Array2<F>>> {
        self.check(inputs)?;
        let (mut weights, mut output) = (Vec::with_capacity(self.layers.len()), None);
        for (number, layer) in self.layers.iter().enumerate() {
            let x = output.as_ref().map(|x: &Array2<F>| x.view());
            let of_layer = self.layer_inputs(inputs, number, x).and_then(|inputs| {
                let is_last = number + 1 == self.layers.len();
                let output = if is_last { None } else { Some(layer.forward(&inputs)?) };
                Ok((layer.attention_weights(&inputs)?, output))
            });
            let (of_layer, next) = of_layer.map_err(|error| self.in_layer(error, number))?;
            weights.push(of_layer);
            output = next;
        }
        Ok(weights)
    }

    /// Checks that queries and keys are the same nodes, if they must be.
    fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        if self.cross_attention {
            return Ok(());
        }
        let keys = "key, which must be the nodes of the queries unless `cross_attention` is set";
        check_shape(keys, &[inputs.num_queries(), inputs.key().ncols()], inputs.key().shape())?;
        let segments = match inputs.pattern() {
            Pattern::Dense => None,
            Pattern::Graph(graph) => graph.blocks(),
            Pattern::Packed(segments) => Some(segments),
        };
        if let Some(segments) = segments {
            for segment in 0..segments.len() {
                let [queries, keys] = [segments.queries(segment), segments.keys(segment)];
                check_shape(format!("keys of segment {segment}"), &[queries.len()], &[keys.len()])?;
            }
        }
        Ok(())
    }

    /// Returns the inputs of a layer, given the output of the one before it.
    fn layer_inputs<'b>(
        &self,
        inputs: &Inputs<'b, F>,
        number: usize,
        output: Option<ArrayView2<'b, F>>,
    ) -> Result<Inputs<'b, F>> {
        let mut layer_inputs = match output {
            None => *inputs,
            Some(x) if self.cross_attention => {
                inputs.with_arrays(x, inputs.key(), inputs.value())?
            }
            Some(x) => inputs.with_arrays(x, x, x)?,
        };
        if let Some(dropout) = inputs.dropout() {
            layer_inputs = layer_inputs.with_dropout(dropout.of_layer(number))?;
        }
        Ok(layer_inputs)
    }

    /// The forward pass, given that of a layer. Overwrites `out`; returns the outputs in [`State`] if they are
    /// to be kept, and the results of all layers.
    fn run<T>(
        &self,
        inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
        keep: bool,
        mut forward: impl FnMut(&A, &Inputs<'_, F>, ArrayViewMut2<'_, F>) -> Result<T>,
    ) -> Result<(Vec<Array2<F>>, Vec<T>)> {
        self.check(inputs)?;
        check_output(self, "out", inputs, out.shape())?;
        let (mut outputs, mut results) = (Vec::<Array2<F>>::new(), Vec::new());
        for (number, layer) in self.layers.iter().enumerate() {
            let x = outputs.last().map(|x| x.view());
            let of_layer = self.layer_inputs(inputs, number, x).and_then(|inputs| {
                if number + 1 == self.layers.len() && self.norm.is_none() {
                    return Ok((forward(layer, &inputs, out.view_mut())?, None));
                }
                let columns = layer.output_dim(&inputs);
                let mut output = try_zeros("output", inputs.num_queries(), columns)?;
                Ok((forward(layer, &inputs, output.view_mut())?, Some(output)))
            });
            let (result, output) = of_layer.map_err(|error| self.in_layer(error, number))?;
            results.push(result);
            if !keep && output.is_some() {
                outputs.clear();
            }
            outputs.extend(output);
        }
        if let (Some(norm), Some(x)) = (&self.norm, outputs.last()) {
            norm.forward_into(x.view(), out)
                .map_err(|error| error.in_part("norm", "norm", None))?;
        }
        Ok((outputs, results))
    }

    /// Adds the number of the layer to an error.
    fn in_layer(&self, error: Error, number: usize) -> Error {
        error.in_part(format_args!("layers.{number}"), self.layers[number].name(), None)
    }
}

impl<F: Float, A: Attention<F>> Params<F> for Stack<F, A> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        for (number, layer) in self.layers.iter().enumerate() {
            layer.visit_params(&mut prefixed(format_args!("layers.{number}"), visitor));
        }
        if let Some(norm) = &self.norm {
            norm.visit_params(&mut prefixed("norm", visitor));
        }
    }

    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        for (number, layer) in self.layers.iter_mut().enumerate() {
            layer.visit_params_mut(&mut prefixed(format_args!("layers.{number}"), visitor));
        }
        if let Some(norm) = &mut self.norm {
            norm.visit_params_mut(&mut prefixed("norm", visitor));
        }
    }

    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        for (number, layer) in self.layers.iter().enumerate() {
            layer.visit_buffers(&mut prefixed(format_args!("layers.{number}"), visitor));
        }
    }

    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        for (number, layer) in self.layers.iter_mut().enumerate() {
            layer.visit_buffers_mut(&mut prefixed(format_args!("layers.{number}"), visitor));
        }
    }
}

impl<F: Float, A: Attention<F>> Attention<F> for Stack<F, A> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, inputs: &Inputs<'_, F>) -> usize {
        let zero = F::zero();
        let mut columns = 0;
        for (number, layer) in self.layers.iter().enumerate() {
            // Only the shape of the rows matters. If they do not fit, the forward pass returns the error.
            let output = aview0(&zero);
            let output =
                if number == 0 { None } else { output.broadcast((inputs.num_queries(), columns)) };
            let layer_inputs = self.layer_inputs(inputs, number, output);
            columns = layer_inputs.map_or(0, |inputs| layer.output_dim(&inputs));
        }
        columns
    }

    fn forward_into(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        self.run(inputs, out, false, A::forward_into).map(drop)
    }

    /// As for any mechanism, but with a cache for each layer and sequence, layer by layer.
    fn decode_into(
        &self,
        inputs: &Inputs<'_, F>,
        caches: &mut [KeyValueCache<F>],
        out: ArrayViewMut2<'_, F>,
    ) -> Result<()> {
        if self.cross_attention {
            let expected = "a stack without `cross_attention`, since its keys are not the outputs";
            return Err(Error::config("mechanism", expected, NAME));
        }
        let sequences = inputs.packed_segments().map_or(1, |segments| segments.len());
        check_shape("caches", &[self.layers.len() * sequences], &[caches.len()])?;
        let lens: Vec<usize> = caches.iter().map(KeyValueCache::len).collect();
        let mut of_layers = caches.chunks_mut(sequences.max(1));
        let result = self.run(inputs, out, false, |layer, inputs, out| {
            layer.decode_into(inputs, of_layers.next().unwrap_or_default(), out)
        });
        if result.is_err() {
            caches.iter_mut().zip(lens).for_each(|(cache, len)| cache.truncate(len));
        }
        result.map(drop)
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<Saved> {
        let (outputs, layers) = if self.checkpointing {
            (self.run(inputs, out, true, A::forward_into)?.0, None)
        } else {
            let (outputs, layers) = self.run(inputs, out, true, A::forward_train_into)?;
            (outputs, Some(layers))
        };
        Ok(Saved::new(NAME, State { outputs, layers }))
    }

    fn backward_into(
        &self,
        inputs: &Inputs<'_, F>,
        saved: &Saved,
        grad_out: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        let State { outputs, layers } = saved.state::<State<F>>(NAME)?;
        self.check(inputs)?;
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        grads.check(NAME, inputs, self)?;
        let num_outputs = self.layers.len() - usize::from(self.norm.is_none());
        check_shape("number of saved outputs", &[num_outputs], &[outputs.len()])?;
        for output in outputs {
            check_shape("saved output", &[inputs.num_queries(), output.ncols()], output.shape())?;
        }
        if let Some(layers) = layers {
            check_shape("number of saved layers", &[self.layers.len()], &[layers.len()])?;
        }
        let mut rest = take(&mut grads.params);
        let mut of_layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let (of_layer, others) = rest.split_at_mut(params::count(layer));
            of_layers.push(of_layer);
            rest = others;
        }

        // y = norm(hₙ)
        let mut grad = grad_out.to_owned();
        if let (Some(norm), Some(x)) = (&self.norm, outputs.last()) {
            let mut grad_x = try_zeros("grads", x.nrows(), x.ncols())?;
            norm.backward_into(x.view(), grad_out, Some(grad_x.view_mut()), rest)?;
            grad = grad_x;
        }
        // hₗ = layerₗ(…)
        for (number, (layer, params)) in self.layers.iter().zip(of_layers).enumerate().rev() {
            let x = number.checked_sub(1).map(|before| &outputs[before]);
            let backward = |grads: GradientsMut<'_, F>| {
                let inputs = self.layer_inputs(inputs, number, x.map(|x| x.view()))?;
                let again;
                let saved = match layers {
                    Some(layers) => &layers[number],
                    None => {
                        again = layer.forward_train(&inputs)?.1;
                        &again
                    }
                };
                layer.backward_into(&inputs, saved, grad.view(), grads)
            };
            let in_layer = |error| self.in_layer(error, number);
            let Some(x) = x else {
                return backward(GradientsMut { params, ..grads }).map_err(in_layer);
            };
            let mut grads_of_x = [(); 3].map(|()| Array2::zeros(x.raw_dim()));
            let [query, key, value] = grads_of_x.each_mut().map(|grad| Some(grad.view_mut()));
            let others = grads.reborrow();
            let layer_grads = if self.cross_attention {
                GradientsMut { query, params, ..others }
            } else {
                GradientsMut { query, key, value, params, ..others }
            };
            backward(layer_grads).map_err(in_layer)?;
            let [query, key, value] = grads_of_x;
            grad = if self.cross_attention { query } else { query + key + value };
        }
        Ok(())
    }
}
