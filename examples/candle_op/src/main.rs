//! Attention over a graph as one operation in candle's autograd.
//!
//! The operation runs a mechanism's forward pass and, when candle goes back along its tape, the
//! mechanism's own backward pass; it only processes the edges. With candle alone, attention computes all
//! pairs and masks those that are not edges. The gradients must be the same.

use candle_core::{CpuStorage, CustomOp3, D, Device, Error, Layout, Result, Shape, Tensor};
use candle_core::{Var, WithDType};
use graph_attention::ndarray::{Array2, ArrayView2, ShapeBuilder};
use graph_attention::{Attention, Element, Flash, Float, Graph, Inputs, Saved};
use std::sync::OnceLock;

/// One step of the tape, which keeps the state that the forward pass saves for the backward pass.
struct Attend<F> {
    attention: Box<dyn Attention<F>>,
    graph: Graph,
    saved: OnceLock<Saved>,
}

impl<F: Float + WithDType> CustomOp3 for Attend<F> {
    fn name(&self) -> &'static str {
        self.attention.name()
    }

    #[rustfmt::skip]
    fn cpu_fwd(
        &self, q: &CpuStorage, lq: &Layout, k: &CpuStorage, lk: &Layout, v: &CpuStorage, lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [q, k, v] = [view(q, lq)?, view(k, lk)?, view(v, lv)?];
        let inputs = Inputs::graph(q, k, v, &self.graph).map_err(Error::wrap)?;
        let (out, saved) = self.attention.forward_train(&inputs).map_err(Error::wrap)?;
        self.saved.set(saved).map_err(|_| Error::msg("an Attend is one step"))?;
        let shape = Shape::from(out.dim());
        Ok((F::to_cpu_storage_owned(out.into_raw_vec_and_offset().0), shape))
    }

    #[rustfmt::skip]
    fn bwd(
        &self, q: &Tensor, k: &Tensor, v: &Tensor, _out: &Tensor, grad_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [q, k, v, grad_out] = [array(q)?, array(k)?, array(v)?, array(grad_out)?];
        let inputs = Inputs::graph(q.view(), k.view(), v.view(), &self.graph).map_err(Error::wrap)?;
        let saved = self.saved.get().ok_or_else(|| Error::msg("backward before forward"))?;
        let grads = self.attention.backward(&inputs, saved, grad_out.view()).map_err(Error::wrap)?;
        Ok((Some(tensor(&grads.query)?), Some(tensor(&grads.key)?), Some(tensor(&grads.value)?)))
    }
}

/// A view of a tensor in place, whatever its strides.
fn view<'a, F: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<ArrayView2<'a, F>> {
    let (shape, stride) = (layout.shape().dims2()?, layout.stride());
    let values = &storage.as_slice()?[layout.start_offset()..];
    ArrayView2::from_shape(shape.strides((stride[0], stride[1])), values).map_err(Error::wrap)
}

fn array<F: WithDType>(tensor: &Tensor) -> Result<Array2<F>> {
    let values = tensor.flatten_all()?.to_vec1()?;
    Array2::from_shape_vec(tensor.dims2()?, values).map_err(Error::wrap)
}

fn tensor<F: WithDType>(array: &Array2<F>) -> Result<Tensor> {
    Tensor::from_iter(array.iter().copied(), &Device::Cpu)?.reshape(array.dim())
}

/// Computes the gradients of the sum of squares of the output.
fn gradients<F: Float + WithDType>(graph: &Graph, by_candle: bool) -> Result<Vec<f64>> {
    let shape = (graph.num_queries(), 8);
    let var = |x: f64| {
        let rows = Array2::from_shape_fn(shape, |(i, j)| {
            <F as Element>::from_f64((x * (8 * i + j) as f64).sin())
        });
        Var::from_tensor(&tensor(&rows)?)
    };
    let [q, k, v] = [var(1.3)?, var(1.7)?, var(2.1)?];
    let out = if by_candle {
        let mut mask = Array2::from_elem((shape.0, shape.0), F::neg_infinity());
        (0..shape.0).for_each(|i| graph.row(i).for_each(|(j, _)| mask[[i, j]] = F::zero()));
        let exp = ((q.matmul(&k.t()?)? / 8f64.sqrt())? + tensor(&mask)?)?.exp()?;
        exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?.matmul(&v)?
    } else {
        let (attention, graph) = (Box::new(Flash::new()), graph.clone());
        q.apply_op3(&k, &v, Attend::<F> { attention, graph, saved: OnceLock::new() })?
    };
    let grads = out.sqr()?.sum_all()?.backward()?;
    let grad = |var: &Var| array::<F>(grads.get(var).ok_or_else(|| Error::msg("no gradient"))?);
    let all = [grad(&q)?, grad(&k)?, grad(&v)?].into_iter().flatten();
    Ok(all.map(F::as_f64).collect())
}

fn main() -> Result<()> {
    let graph = Graph::window(64, 3).map_err(Error::wrap)?;
    let exact = gradients::<f64>(&graph, true)?;
    let error = |other: Result<Vec<f64>>| -> Result<f64> {
        let squares = exact.iter().zip(other?).map(|(exact, other)| (exact - other).powi(2));
        Ok(squares.sum::<f64>().sqrt())
    };
    let candle = error(gradients::<f32>(&graph, true))?;
    let single = error(gradients::<f32>(&graph, false))?;
    let double = error(gradients::<f64>(&graph, false))?;
    println!("Gradients over {} pairs, |difference from candle's in f64|:", graph.num_edges());
    println!("candle's in f32 {candle:.1e}, ours in f32 {single:.1e}, ours in f64 {double:.1e}");
    // The tolerance is candle's own error in f32, times 3 for a different order of roundings; in f64 each
    // rounding is 2⁻²⁹ as large.
    assert!(candle > 0.0 && single <= 3.0 * candle);
    assert!(double <= 3.0 * candle / f64::from(1 << 29));
    Ok(())
}
