//! rten's operator `MultiHeadAttention`, in a model that has no other.

use crate::{COLUMNS, Case, Result, Run};
use rten::{Model, Value, ValueOrView};
use rten_onnx::onnx::{
    AttributeProto, AttributeType, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    ValueInfoProto,
};
use rten_tensor::NdTensor;
use std::time::Instant;

pub(crate) fn run(case: &Case) -> Result<Option<Run<'_>>> {
    if case.training {
        return Ok(None);
    }
    let Case { n, heads, .. } = *case;
    let mut inputs: Vec<(&str, Value)> = Vec::new();
    for (name, values) in ["query", "key", "value"].into_iter().zip(case.values()) {
        inputs.push((name, NdTensor::from_data([1, n, heads * COLUMNS], values).into()));
    }
    if let Some(hidden) = case.hidden() {
        let bias = hidden.iter().map(|&hidden| if hidden { f32::NEG_INFINITY } else { 0.0 });
        inputs.push(("bias", NdTensor::from_data([1, 1, n, n], bias.collect::<Vec<_>>()).into()));
    }
    let names: Vec<_> = inputs.iter().map(|&(name, _)| name).collect();
    let model = Model::load(model(&names, heads, case.causal).write_buf()?)?;
    let inputs = inputs.into_iter().map(|(name, x)| Ok((model.node_id(name)?, x)));
    let (inputs, out) = (inputs.collect::<Result<Vec<_>>>()?, model.node_id("out")?);
    Ok(Some(Box::new(move || {
        let start = Instant::now();
        let views = inputs.iter().map(|(id, x)| (*id, ValueOrView::from(x)));
        let [out] = model.run_n(views.collect(), [out], None)?;
        let time = start.elapsed();
        let out: NdTensor<f32, 3> = out.try_into()?;
        Ok((time, out.into_data()))
    })))
}

fn model(inputs: &[&str], heads: usize, causal: bool) -> ModelProto {
    let version = |domain: &str, version| OperatorSetIdProto {
        domain: Some(domain.into()),
        version: Some(version),
    };
    let value = |name: &str| ValueInfoProto { name: Some(name.into()), ..Default::default() };
    let attribute = |name: &str, value: usize| AttributeProto {
        name: Some(name.into()),
        i: Some(value as i64),
        r#type: Some(AttributeType::INT),
        ..Default::default()
    };
    // An empty name leaves out an input, here the bias of projections and the mask of keys.
    let order = ["query", "key", "value", "", "", "bias"];
    let order = order.iter().filter(|name| name.is_empty() || inputs.contains(name));
    let node = NodeProto {
        domain: Some("com.microsoft".into()),
        op_type: Some("MultiHeadAttention".into()),
        input: order.map(|&name| name.into()).collect(),
        output: vec!["out".into()],
        attribute: vec![
            attribute("num_heads", heads),
            attribute("unidirectional", usize::from(causal)),
        ],
        ..Default::default()
    };
    ModelProto {
        ir_version: Some(8),
        graph: Some(GraphProto {
            node: vec![node],
            input: inputs.iter().map(|name| value(name)).collect(),
            output: vec![value("out")],
            ..Default::default()
        }),
        opset_import: vec![version("", 17), version("com.microsoft", 1)],
        ..Default::default()
    }
}
