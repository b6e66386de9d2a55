//! Tests of what is special to `Stack`: self-attention through several layers, and checkpointing.

mod common;

use allocation_counter::AllocationInfo;
use common::close::assert_close_in_size;
use common::{hold_simd, on_one_thread, random, refused};
use graph_attention::ndarray::{Array2, s};
use graph_attention::{
    Attention, Dropout, EdgeGatConfig, Error, Flash, Gradients, Graph, GraphRopeConfig, Inputs,
    MultiHeadConfig, Result, Segments, Stack, StackConfig, TransformerLayerConfig,
    edge_gat::Score,
    graph_rope::Layout,
    params,
    rowwise::{Activation, NormConfig, Normalization},
};

type Boxed = Box<dyn Attention<f64>>;

/// Three layers that read edge features, positions and a bias.
fn layers(seed: u64) -> Vec<Boxed> {
    let rng = &mut random::rng(seed);
    let gat = EdgeGatConfig::new(Score::GatV2, 6, 3, 2).edge_dim(2).init(rng).unwrap();
    let rope = GraphRopeConfig::new(3, Layout::Half).rotary_dim(2).learn_frequencies(true);
    let rope = rope.init(Flash::new()).unwrap();
    let rotary = MultiHeadConfig::new(6, 2).init(rope, rng).unwrap();
    let heads = MultiHeadConfig::new(6, 3).init(Flash::new(), rng).unwrap();
    let config = TransformerLayerConfig::new(6, 4).activation(Activation::Gelu);
    vec![
        Box::new(config.init(gat, rng).unwrap()),
        Box::new(config.clone().norm_first(true).init(rotary, rng).unwrap()),
        Box::new(config.gated(true).init(heads, rng).unwrap()),
    ]
}

fn stack(config: StackConfig, seed: u64) -> Stack<f64, Boxed> {
    config.norm(NormConfig::new(Normalization::Layer, 6)).init(layers(seed)).unwrap()
}

struct Data {
    x: Array2<f64>,
    edge_features: Array2<f64>,
    positions: Array2<f64>,
    graph: Graph,
}

impl Data {
    fn new() -> Self {
        let edges = [(0, 0), (0, 1), (1, 2), (2, 1), (2, 2), (3, 0), (3, 3), (1, 1), (3, 3)];
        Self {
            x: random::matrix(4, 6, 1),
            edge_features: random::matrix(9, 2, 2),
            positions: random::matrix(4, 1, 3),
            graph: Graph::from_edges(4, 4, edges).unwrap(),
        }
    }

    fn inputs(&self) -> Inputs<'_, f64> {
        let inputs = Inputs::self_attention(self.x.view(), &self.graph).unwrap();
        let inputs = inputs.with_edge_features(self.edge_features.view()).unwrap();
        let positions = self.positions.view();
        let inputs = inputs.with_positions(positions, positions).unwrap();
        inputs.with_dropout(Dropout { probability: 0.3, seed: 4 }).unwrap()
    }
}

#[test]
fn a_stack_is_its_layers_called_one_after_the_other() -> Result<()> {
    hold_simd();
    let (data, stack) = (Data::new(), stack(StackConfig::new(), 1));
    let inputs = data.inputs();
    let mut h = data.x.clone();
    for (number, layer) in layers(1).iter().enumerate() {
        let dropout = inputs.dropout().unwrap().of_layer(number);
        let layer_inputs = inputs.with_arrays(h.view(), h.view(), h.view())?;
        h = layer.forward(&layer_inputs.with_dropout(dropout)?)?;
    }
    let y = NormConfig::new(Normalization::Layer, 6).init()?.forward(h.view())?;
    assert_eq!(stack.forward(&inputs)?, y);
    assert_eq!(stack.output_dim(&inputs), 6);

    // Keys and values of the inputs in each layer, if they are another set of nodes.
    let keys = random::matrix(3, 6, 5);
    let inputs = Inputs::dense(data.x.view(), keys.view(), keys.view())?;
    let cross = StackConfig::new().cross_attention(true);
    let heads = MultiHeadConfig::new(6, 2).init(Flash::new(), &mut random::rng(3))?;
    let layer = TransformerLayerConfig::new(6, 4).init(heads, &mut random::rng(3))?;
    let first = layer.forward(&inputs)?;
    let second = layer.forward(&inputs.with_arrays(first.view(), keys.view(), keys.view())?)?;
    let weights =
        layer.attention_weights(&inputs.with_arrays(first.view(), keys.view(), keys.view())?)?;
    let cross = cross.init([layer.clone(), layer.clone()])?;
    assert_eq!(cross.forward(&inputs)?, second);
    assert_eq!(cross.weights_by_layer(&inputs)?, [layer.attention_weights(&inputs)?, weights]);
    Ok(())
}

/// Central differences along a direction, for every input and parameter at once: what differs between nodes as
/// queries, keys and values is checked by the three parts of the sum.
#[test]
fn gradients_through_all_layers_are_derivatives() -> Result<()> {
    hold_simd();
    for checkpointing in [false, true] {
        let mut stack = stack(StackConfig::new().checkpointing(checkpointing), 1);
        let data = Data::new();
        let grad_out = random::matrix(4, 6, 7);
        let inputs = data.inputs();
        let (_, saved) = stack.forward_train(&inputs)?;
        let grads = stack.backward(&inputs, &saved, grad_out.view())?;
        let loss = |stack: &dyn Attention<f64>, data: &Data| {
            (stack.forward(&data.inputs()).unwrap() * &grad_out).sum()
        };
        let agrees = |what: &str, numeric: f64, expected: f64| {
            let holds = (numeric - expected).abs() < 1e-7 * expected.abs().max(1.0);
            assert!(holds && expected != 0.0, "{what}: {numeric} {expected}");
        };
        let h = 1e-5;
        for (what, gradient, array) in [
            (
                "x",
                grads.self_attention()?,
                (|data| &mut data.x) as fn(&mut Data) -> &mut Array2<f64>,
            ),
            ("edge features", grads.edge_features.clone().unwrap(), |data| &mut data.edge_features),
            (
                "positions",
                grads.query_positions.clone().unwrap() + grads.key_positions.as_ref().unwrap(),
                |data| &mut data.positions,
            ),
        ] {
            for seed in [11, 12] {
                let direction = random::matrix(gradient.nrows(), gradient.ncols(), seed);
                let at = |step: f64| {
                    let mut moved = Data::new();
                    array(&mut moved).scaled_add(step, &direction);
                    loss(&stack, &moved)
                };
                agrees(what, (at(h) - at(-h)) / (2.0 * h), (&gradient * &direction).sum());
            }
        }
        let state = params::state(&stack);
        let names = state.iter().map(|(name, _)| name);
        for (name, gradient) in names.zip(&grads.params) {
            // The bias of keys shifts all logits of a query alike, and so does a bias of a GAT's scores.
            let direction =
                gradient.mapv(|g| if g.abs() > 1e-12 { 1.0 + g.signum() * 0.5 } else { 0.0 });
            let expected = (gradient * &direction).sum();
            if expected == 0.0 {
                continue;
            }
            let mut at = |step: f64| {
                let mut moved = state.clone();
                let param = moved.iter_mut().find(|(known, _)| known == name).unwrap();
                param.1.scaled_add(step, &direction);
                params::load_state(&mut stack, moved).unwrap();
                loss(&stack, &data)
            };
            agrees(name, (at(h) - at(-h)) / (2.0 * h), expected);
        }
    }
    Ok(())
}

#[test]
fn checkpointing_gives_the_same_bits_with_less_memory() -> Result<()> {
    hold_simd();
    let data = Data::new();
    let run = |stack: &dyn Attention<f64>, inputs: &Inputs<'_, f64>| -> Result<_> {
        let (out, saved) = stack.forward_train(inputs)?;
        let grads = stack.backward(inputs, &saved, out.view())?;
        Ok((out, grads))
    };
    let checkpointed = StackConfig::new().checkpointing(true);
    let [all, few] = [stack(StackConfig::new(), 1), stack(checkpointed.clone(), 1)];
    assert_eq!(run(&all, &data.inputs())?, run(&few, &data.inputs())?);
    // One stack reads the state of the other.
    let (out, saved) = few.forward_train(&data.inputs())?;
    let grads = all.backward(&data.inputs(), &saved, out.view())?;
    assert_eq!(grads, run(&all, &data.inputs())?.1);

    // Four layers keep their outputs, and not their twelve times as large states.
    let x = random::matrix(50, 6, 2);
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
    let layer = |seed| {
        let rng = &mut random::rng(seed);
        let heads = MultiHeadConfig::new(6, 2).init(Flash::new(), rng).unwrap();
        TransformerLayerConfig::new(6, 24).init(heads, rng).unwrap()
    };
    let kept = |config: StackConfig| -> u64 {
        let stack = config.init((0..4).map(layer)).unwrap();
        let mut kept = None;
        let scratch: AllocationInfo = on_one_thread(|| drop(stack.forward_train(&inputs).unwrap()));
        let info = on_one_thread(|| kept = Some(stack.forward_train(&inputs).unwrap()));
        assert!(kept.is_some());
        // Beside what the thread keeps as scratch memory.
        (info.bytes_current - scratch.bytes_current) as u64
    };
    let outputs = 4 * 50 * 6 * 8;
    let bytes = kept(checkpointed);
    assert!((outputs..2 * outputs).contains(&bytes), "{bytes}");
    let bytes = kept(StackConfig::new());
    assert!(bytes > 10 * outputs, "{bytes}");
    Ok(())
}

#[test]
fn segments_get_what_they_get_alone() -> Result<()> {
    hold_simd();
    let rng = &mut random::rng(3);
    let heads = MultiHeadConfig::new(6, 2).init(Flash::new(), rng)?;
    let layer = TransformerLayerConfig::new(6, 4).norm_first(true).init(heads, rng)?;
    let stack = StackConfig::new().init([layer.clone(), layer])?;
    let x = random::matrix(7, 6, 4);
    let segments = Segments::from_lengths(&[3, 0, 4])?;
    let dropout = Dropout { probability: 0.4, seed: 8 };
    let packed = Inputs::packed(x.view(), x.view(), x.view(), &segments)?.with_dropout(dropout)?;
    let (out, saved) = stack.forward_train(&packed)?;
    let grad = stack.backward(&packed, &saved, out.view())?.self_attention()?;
    for segment in [0, 2] {
        let rows = s![segments.queries(segment), ..];
        let part = x.slice(rows);
        let inputs = Inputs::dense(part, part, part)?.with_dropout(dropout.of_segment(segment))?;
        let (alone, saved) = stack.forward_train(&inputs)?;
        assert_close_in_size("out", 1e-13, 1.0, &out.slice(rows).to_owned(), &alone);
        let of_part = stack.backward(&inputs, &saved, alone.view())?.self_attention()?;
        assert_close_in_size("grad", 1e-12, 1.0, &grad.slice(rows).to_owned(), &of_part);
    }
    Ok(())
}

#[test]
fn heads_of_the_inputs_stay_apart() -> Result<()> {
    hold_simd();
    let x = random::matrix(4, 6, 4);
    for cross_attention in [false, true] {
        let config = StackConfig::new().cross_attention(cross_attention);
        let two: Stack<f64, _> = config.init([Flash::new(), Flash::new()])?;
        let out = two.forward(&Inputs::dense(x.view(), x.view(), x.view())?.with_heads(2)?)?;
        for columns in [0..3, 3..6] {
            let head = x.slice(s![.., columns.clone()]);
            let alone = two.forward(&Inputs::dense(head, head, head)?)?;
            assert_close_in_size(
                "head",
                1e-14,
                1.0,
                &out.slice(s![.., columns]).to_owned(),
                &alone,
            );
        }
    }
    Ok(())
}

#[test]
fn nan_goes_one_edge_further_in_each_layer() -> Result<()> {
    hold_simd();
    let rng = &mut random::rng(3);
    let heads = MultiHeadConfig::new(6, 2).init(Flash::new(), rng)?;
    let layer = TransformerLayerConfig::new(6, 4).init(heads, rng)?;
    let stack = StackConfig::new().init([layer.clone(), layer])?;
    // A path: node i reads node i − 1.
    let path = Graph::from_edges(5, 5, (1..5).map(|node| (node, node - 1)))?;
    let mut x = random::matrix(5, 6, 4);
    let clean = stack.forward(&Inputs::self_attention(x.view(), &path)?)?;
    x.row_mut(1).fill(f64::NAN);
    let out = stack.forward(&Inputs::self_attention(x.view(), &path)?)?;
    for node in [0, 4] {
        assert_eq!(out.row(node), clean.row(node));
    }
    assert!(out.slice(s![1..4, ..]).iter().all(|y| y.is_nan()));
    Ok(())
}

#[test]
fn an_inner_gradient_may_be_left_out() -> Result<()> {
    hold_simd();
    let (data, stack) = (Data::new(), stack(StackConfig::new(), 1));
    let inputs = data.inputs();
    let (out, saved) = stack.forward_train(&inputs)?;
    let all = stack.backward(&inputs, &saved, out.view())?;
    assert_eq!(stack.backward_params(&inputs, &saved, out.view())?, all.params);
    // Gradients are added to what is there.
    let mut twice = all.clone();
    stack.backward_into(&inputs, &saved, out.view(), twice.view_mut())?;
    let positions = |grads: &Gradients<f64>| grads.key_positions.clone().unwrap();
    assert_close_in_size("sum", 1e-13, 1e-3, &positions(&twice), &(positions(&all) * 2.0));
    assert_close_in_size("sum", 1e-13, 1e-3, &twice.value, &(all.value * 2.0));
    Ok(())
}

#[test]
fn bad_stacks_and_inputs_are_refused() -> Result<()> {
    let none: Vec<Flash> = vec![];
    refused(
        StackConfig::new().init::<f64, _>(none),
        "InvalidArgument | layers | at least 1 | got 0",
    );
    let two: Stack<f64, _> = StackConfig::new().init([Flash::new(), Flash::new()])?;
    let (x, y, wide) = (random::matrix(3, 4, 1), random::matrix(5, 4, 2), random::matrix(3, 6, 2));
    let dense = |q: &Array2<f64>, k: &Array2<f64>, v: &Array2<f64>| {
        two.forward(&Inputs::dense(q.view(), k.view(), v.view()).unwrap())
    };
    refused(
        dense(&x, &y, &y),
        "Shape | key, which must be the nodes | cross_attention | [3, 4] | [5, 4]",
    );
    // A sampled mini-batch has no keys for the second layer.
    let graph = Graph::from_edges(2, 5, [(0, 4), (1, 3)])?;
    refused(
        two.forward(&Inputs::self_attention(y.view(), &graph)?),
        "Shape | key | [2, 4] | [5, 4]",
    );
    // As many keys as queries, but in other segments.
    let segments = Segments::from_query_key_lengths(&[1, 2], &[2, 1])?;
    let packed = Inputs::packed(x.view(), x.view(), x.view(), &segments)?;
    refused(two.forward(&packed), "Shape | keys of segment 0 | [1] | [2]");
    // Errors of a layer name it.
    let cross = StackConfig::new().cross_attention(true).init([Flash::new(), Flash::new()])?;
    let inputs = Inputs::dense(x.view(), x.view(), wide.view())?;
    refused(cross.forward(&inputs), "Shape | layers.1 (flash) | key");
    let norm = StackConfig::new().norm(NormConfig::new(Normalization::Rms, 5));
    let norm = norm.init([Flash::new()])?;
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
    refused(norm.forward(&inputs), "Shape | norm | [3, 5] | [3, 4]");
    let error = two.attention_weights(&inputs).unwrap_err();
    assert_eq!(error, Error::NoWeights { mechanism: "stack" });
    assert_eq!(two.weights_by_layer(&inputs)?.len(), 2);
    let (out, saved) = two.forward_train(&inputs)?;
    let three: Stack<f64, _> = StackConfig::new().init((0..3).map(|_| Flash::new()))?;
    let words = "Shape | number of saved outputs | [2] | [1]";
    refused(three.backward(&inputs, &saved, out.view()), words);
    Ok(())
}
