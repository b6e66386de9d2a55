//! candle's attention for CPUs; with gradients, attention made of its matrix products.

use crate::{COLUMNS, Case, Result, Run};
use candle_core::{D, Device, Tensor, Var};
use candle_nn::attention::{AttnMask, cpu_flash::flash_attn};
use std::time::Instant;

pub(crate) fn run(case: &Case) -> Result<Option<Run<'_>>> {
    let bias = match case.hidden() {
        // The products have no causal pattern of their own.
        None if case.causal && case.training => {
            Some((0..case.n * case.n).map(|pair| pair % case.n > pair / case.n).collect())
        }
        hidden => hidden,
    };
    let bias = bias.map(|hidden: Vec<bool>| {
        let bias = hidden.iter().map(|&hidden| if hidden { f32::NEG_INFINITY } else { 0.0 });
        Tensor::from_iter(bias, &Device::Cpu)?.reshape((1, 1, case.n, case.n))
    });
    let bias = bias.transpose()?;
    if case.training { products(case, bias) } else { fused(case, bias) }
}

/// 1 × n × heads × 64.
fn tensors(case: &Case) -> candle_core::Result<[Tensor; 3]> {
    let [q, k, v] = case
        .values()
        .map(|values| Tensor::from_vec(values, (1, case.n, case.heads, COLUMNS), &Device::Cpu));
    Ok([q?, k?, v?])
}

fn fused(case: &Case, bias: Option<Tensor>) -> Result<Option<Run<'_>>> {
    let [q, k, v] = tensors(case)?;
    Ok(Some(Box::new(move || {
        let start = Instant::now();
        let mask = match &bias {
            Some(bias) => AttnMask::Mask(bias.clone()),
            None if case.causal => AttnMask::causal(),
            None => AttnMask::None,
        };
        let scale = 1.0 / (COLUMNS as f32).sqrt();
        let out = flash_attn::<f32>(&q, &k, &v, scale, mask, None, None)?;
        Ok((start.elapsed(), out.transpose(1, 2)?.flatten_all()?.to_vec1()?))
    })))
}

fn products(case: &Case, bias: Option<Tensor>) -> Result<Option<Run<'_>>> {
    let [q, k, v] = tensors(case)?.map(|x| Var::from_tensor(&x));
    let inputs = [q?, k?, v?];
    Ok(Some(Box::new(move || {
        let start = Instant::now();
        let [q, k, v] = inputs.each_ref().map(|x| x.transpose(1, 2)?.contiguous());
        let mut logits = (q?.matmul(&k?.t()?)? / (COLUMNS as f64).sqrt())?;
        if let Some(bias) = &bias {
            logits = logits.broadcast_add(bias)?;
        }
        let weights = candle_nn::ops::softmax(&logits, D::Minus1)?;
        let grads = weights.matmul(&v?)?.sqr()?.sum_all()?.backward()?;
        let time = start.elapsed();
        let mut values = Vec::new();
        for x in &inputs {
            let grad = grads.get(x).ok_or("no gradient")?;
            values.extend(grad.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok((time, values))
    })))
}
