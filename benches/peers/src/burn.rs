//! burn's attention on its flex backend.

use crate::{COLUMNS, Case, Result, Run};
use burn_tensor::{Bool, Device, Tensor, TensorData, module, ops::AttentionModuleOptions};
use std::time::Instant;

pub(crate) fn run(case: &Case) -> Result<Option<Run<'_>>> {
    let Case { n, heads, causal, training, .. } = *case;
    let device = if training { Device::flex().autodiff() } else { Device::flex() };
    let inputs = case.values().map(|values| {
        let rows = TensorData::new(values, [1, n, heads, COLUMNS]);
        // Heads first, in memory too.
        let heads = Tensor::<4>::from_data(rows, &device).swap_dims(1, 2).into_data();
        Tensor::<4>::from_data(heads, &device)
    });
    let hidden = case
        .hidden()
        .map(|hidden| Tensor::<4, Bool>::from_data(TensorData::new(hidden, [1, 1, n, n]), &device));
    let rows = |x: Tensor<4>| -> Result<Vec<f32>> {
        x.swap_dims(1, 2).into_data().try_into_vec().map_err(|error| format!("{error:?}").into())
    };
    Ok(Some(Box::new(move || {
        let start = Instant::now();
        let [q, k, v] = inputs.clone().map(|x| if training { x.require_grad() } else { x });
        let options = AttentionModuleOptions { is_causal: causal, ..Default::default() };
        let out = module::attention(q.clone(), k.clone(), v.clone(), hidden.clone(), None, options);
        if !training {
            return Ok((start.elapsed(), rows(out)?));
        }
        let grads = out.powi_scalar(2).sum().backward();
        let time = start.elapsed();
        let mut values = Vec::new();
        for x in [q, k, v] {
            values.extend(rows(x.grad(&grads).ok_or("no gradient")?)?);
        }
        Ok((time, values))
    })))
}
