//! Attention over a graph as one operation in burn's autodiff.
//!
//! The operation runs a mechanism's forward pass and, when burn goes back through its graph, the
//! mechanism's own backward pass; it only processes the edges. With burn alone, attention computes all
//! pairs and masks those that are not edges. The gradients must be the same.

use burn_autodiff::checkpoint::{base::Checkpointer, strategy::NoCheckpointing};
use burn_autodiff::ops::{Backward, Ops, OpsKind};
use burn_autodiff::{Autodiff, grads::Gradients};
use burn_flex::{Flex, FlexTensor};
use burn_tensor::{Bool, Device, Element, Tensor, TensorData, module, ops::AttentionModuleOptions};
use graph_attention::ndarray::{Array2, ArrayView2};
use graph_attention::{Attention, Flash, Float, Graph, Inputs, Result, Saved};
use std::sync::Arc;

/// The operation on the tape. Its data is in the state, because burn may run several at once.
#[derive(Debug)]
struct Attend<F>(std::marker::PhantomData<F>);

/// What the backward pass needs: the mechanism, the graph, queries, keys and values, and the state that the
/// forward pass saved.
#[derive(Clone, Debug)]
struct State<F> {
    attention: Arc<dyn Attention<F>>,
    graph: Arc<Graph>,
    inputs: [TensorData; 3],
    saved: Arc<Saved>,
}

impl<F: Float + Element> Backward<Flex, 3> for Attend<F> {
    type State = State<F>;

    fn backward(self, ops: Ops<State<F>, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let State { attention, graph, inputs, saved } = ops.state;
        let grad_out = grads.consume::<Flex>(&ops.node).into_data();
        let inputs = graph_inputs::<F>(&inputs, &graph);
        let found = inputs.and_then(|inputs| attention.backward(&inputs, &saved, view(&grad_out)));
        // burn has no errors in backward passes.
        let found = found.expect("the forward pass accepted these inputs");
        for (parent, grad) in ops.parents.iter().zip([found.query, found.key, found.value]) {
            if let Some(parent) = parent {
                grads.register::<Flex>(parent.id, FlexTensor::from_data(data(grad)));
            }
        }
    }
}

/// Attention over the edges of a graph, for tensors on a Flex device with autodiff.
fn attend<F: Float + Element>(
    attention: Arc<dyn Attention<F>>,
    graph: Arc<Graph>,
    inputs: [Tensor<2>; 3],
) -> Result<Tensor<2>> {
    let inputs = inputs.map(|input| {
        let input = input.try_into_primitive::<Autodiff<Flex>>();
        input.expect("a Flex device with autodiff").into_parts()
    });
    let [query, key, value] = inputs;
    let nodes = [query.1, key.1, value.1];
    let inputs = [query.0, key.0, value.0].map(FlexTensor::into_data);
    let (out, saved) = attention.forward_train(&graph_inputs::<F>(&inputs, &graph)?)?;
    let out = FlexTensor::from_data(data(out));
    let step = Attend(std::marker::PhantomData).prepare::<NoCheckpointing>(nodes);
    Ok(Tensor::from_primitive::<Autodiff<Flex>>(match step.compute_bound().stateful() {
        OpsKind::Tracked(step) => {
            step.finish(State { attention, graph, inputs, saved: Arc::new(saved) }, out)
        }
        OpsKind::UnTracked(step) => step.finish(out),
    }))
}

fn graph_inputs<'a, F: Float + Element>(
    [query, key, value]: &'a [TensorData; 3],
    graph: &'a Graph,
) -> Result<Inputs<'a, F>> {
    Inputs::graph(view(query), view(key), view(value), graph)
}

fn view<F: Element>(data: &TensorData) -> ArrayView2<'_, F> {
    let values = data.as_slice().expect("tensors have the type of the operation");
    let [rows, columns] = data.shape().dims();
    ArrayView2::from_shape([rows, columns], values).expect("rows × columns values")
}

fn data<F: Float + Element>(array: Array2<F>) -> TensorData {
    let shape: [usize; 2] = array.dim().into();
    TensorData::new(array.into_iter().collect::<Vec<F>>(), shape)
}

/// Computes the gradients of the sum of squares of the output.
fn gradients<F: Float + Element>(graph: &Arc<Graph>, by_burn: bool) -> Result<Vec<f64>> {
    let (n, device) = (graph.num_queries(), Device::flex().autodiff());
    let rows = |x: f64| {
        let rows = Array2::from_shape_fn((n, 8), |(i, j)| {
            <F as graph_attention::Element>::from_f64((x * (8 * i + j) as f64).sin())
        });
        Tensor::<2>::from_data(data(rows), (&device, F::dtype())).require_grad()
    };
    let [query, key, value] = [rows(1.3), rows(1.7), rows(2.1)];
    let inputs = [&query, &key, &value].map(Tensor::clone);
    let out = if by_burn {
        let mut hidden = vec![true; n * n];
        (0..n).for_each(|i| graph.row(i).for_each(|(j, _)| hidden[n * i + j] = false));
        let hidden = Tensor::<4, Bool>::from_data(TensorData::new(hidden, [1, 1, n, n]), &device);
        let [query, key, value] = inputs.map(|input| input.reshape([1, 1, n, 8]));
        let options = AttentionModuleOptions::default();
        module::attention(query, key, value, Some(hidden), None, options).reshape([n, 8])
    } else {
        attend::<F>(Arc::new(Flash::new()), graph.clone(), inputs)?
    };
    let grads = out.powi_scalar(2).sum().backward();
    let grad = |input: &Tensor<2>| input.grad(&grads).expect("it requires a gradient").into_data();
    let grads = [grad(&query), grad(&key), grad(&value)];
    Ok(grads.iter().flat_map(|grad| grad.iter::<f64>().collect::<Vec<_>>()).collect())
}

fn main() -> Result<()> {
    let graph = Arc::new(Graph::window(64, 3)?);
    let exact = gradients::<f64>(&graph, true)?;
    let error = |other: Result<Vec<f64>>| -> Result<f64> {
        let squares = exact.iter().zip(other?).map(|(exact, other)| (exact - other).powi(2));
        Ok(squares.sum::<f64>().sqrt())
    };
    let burn = error(gradients::<f32>(&graph, true))?;
    let single = error(gradients::<f32>(&graph, false))?;
    let double = error(gradients::<f64>(&graph, false))?;
    println!("Gradients over {} pairs, |difference from burn's in f64|:", graph.num_edges());
    println!("burn's in f32 {burn:.1e}, ours in f32 {single:.1e}, ours in f64 {double:.1e}");
    // The tolerance is burn's own error in f32, times 3 for a different order of roundings; in f64 each
    // rounding is 2⁻²⁹ as large.
    assert!(burn > 0.0 && single <= 3.0 * burn);
    assert!(double <= 3.0 * burn / f64::from(1 << 29));
    Ok(())
}
