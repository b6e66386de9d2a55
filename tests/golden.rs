//! Comparison with PyTorch and PyG. Their outputs were generated in `f64` by the scripts in `tests/golden`.

mod common;

use common::close::assert_close_in_size;
use common::golden::{array, dynamic, size};
use graph_attention::ndarray::{Array, Array2, Axis, Ix2, Ix3};
use graph_attention::{
    Attention, Causal, EdgeGatConfig, Flash, Graph, Inputs, LoopFill, MultiHeadConfig,
    ScaledDotProduct, edge_gat::Score, params,
};
use serde_json::Value;

/// For two computations in `f64` in different order: some hundred roundings, relative to the largest
/// number of an array. (Weights of logits of size s have a relative error of s ε anyway.)
const TOLERANCE: f64 = 1e-13;

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/torch_attention.json")).unwrap()
}

fn pyg() -> Value {
    serde_json::from_str(include_str!("golden/pyg_conv.json")).unwrap()
}

/// Converts heads × queries × keys, as in PyTorch, to pairs × heads.
fn by_pair(array: Array<f64, Ix3>) -> Array2<f64> {
    let (heads, queries, keys) = array.dim();
    array.into_shape_with_order((heads, queries * keys)).unwrap().reversed_axes()
}

/// Reads a bias or its gradient, in either form.
fn bias(value: &Value) -> Array2<f64> {
    match dynamic::<f64>(value).ndim() {
        2 => array::<f64, Ix2>(value),
        _ => by_pair(array(value)),
    }
}

/// Reads the edges of a PyG `edge_index`: targets are queries, sources are keys.
fn edges(value: &Value) -> Vec<(usize, usize)> {
    let end = |name: &str| value[name].as_array().unwrap().iter().map(size);
    end("dst").zip(end("src")).collect()
}

fn mask(value: &Value) -> Option<Array2<bool>> {
    (!value.is_null()).then(|| array::<f64, Ix2>(value).mapv(|n| n == 1.0))
}

#[test]
fn scaled_dot_product_attention_of_pytorch() {
    common::hold_simd();
    let golden = golden();
    let cases = golden["sdpa"].as_array().unwrap();
    assert!(cases.len() >= 20);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let [query, key, value, grad_out, out] =
            ["query", "key", "value", "grad_out", "out"].map(|name| array::<f64, Ix2>(&case[name]));
        let mask = mask(&case["mask"]);
        let logits = (!case["bias"].is_null()).then(|| bias(&case["bias"]));
        let mut inputs = Inputs::dense(query.view(), key.view(), value.view())
            .and_then(|inputs| {
                inputs.with_grouped_heads(size(&case["heads"]), size(&case["kv_heads"]))
            })
            .unwrap();
        match case["causal"].as_str() {
            None => {}
            Some("top_left") => inputs = inputs.with_causal(),
            Some("bottom_right") => inputs = inputs.with_causal_alignment(Causal::BottomRight),
            Some(other) => panic!("{other}"),
        }
        if let Some(mask) = &mask {
            inputs = inputs.with_mask(mask.view()).unwrap();
        }
        if let Some(logits) = &logits {
            inputs = inputs.with_bias(logits.view()).unwrap();
        }

        let scale = case["scale"].as_f64();
        let largest_logit = {
            let largest = |array: &Array2<f64>| array.iter().fold(0.0, |max, x| x.abs().max(max));
            let dim = query.ncols() as f64 / inputs.num_heads() as f64;
            scale.unwrap_or(dim.sqrt().recip()).abs() * dim * largest(&query) * largest(&key)
        };
        let tolerance = TOLERANCE.max(largest_logit * f64::EPSILON);
        let mut plain = ScaledDotProduct::new();
        let mut flash = Flash::new().with_tiles(4, 3).unwrap();
        if let Some(scale) = scale {
            plain = plain.with_scale(scale).unwrap();
            flash = flash.with_scale(scale).unwrap();
        }
        for attention in [&plain as &dyn Attention<f64>, &flash] {
            let what = |array| format!("{name}, {}, {array}", attention.name());
            let (ours, saved) = attention.forward_train(&inputs).unwrap();
            assert_close_in_size(what("out"), tolerance, 1.0, &ours, &out);
            let grads = attention.backward(&inputs, &saved, grad_out.view()).unwrap();
            for (array_name, grad) in [
                ("grad_query", &grads.query),
                ("grad_key", &grads.key),
                ("grad_value", &grads.value),
            ] {
                let expected = array::<f64, Ix2>(&case[array_name]);
                assert_close_in_size(what(array_name), tolerance, 1.0, grad, &expected);
            }
            assert_eq!(grads.bias.is_some(), logits.is_some());
            if let Some(grad) = &grads.bias {
                assert_close_in_size(
                    what("grad_bias"),
                    tolerance,
                    1.0,
                    grad,
                    &bias(&case["grad_bias"]).into_dyn(),
                );
            }
        }
    }
}

#[test]
fn multihead_attention_of_pytorch_loads_by_name() {
    common::hold_simd();
    let golden = golden();
    let cases = golden["multi_head"].as_array().unwrap();
    assert!(cases.len() >= 8);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let [query, key, value, grad_out, out] =
            ["query", "key", "value", "grad_out", "out"].map(|name| array::<f64, Ix2>(&case[name]));
        let mask = mask(&case["mask"]);
        let logits = (!case["attn_bias"].is_null()).then(|| bias(&case["attn_bias"]));
        let mut inputs = Inputs::dense(query.view(), key.view(), value.view()).unwrap();
        if let Some(mask) = &mask {
            inputs = inputs.with_mask(mask.view()).unwrap();
        }
        if let Some(logits) = &logits {
            inputs = inputs.with_bias(logits.view()).unwrap();
        }
        if case["causal"].as_bool().unwrap() {
            inputs = inputs.with_causal();
        }

        let config = MultiHeadConfig::new(size(&case["embed_dim"]), size(&case["num_heads"]))
            .key_dim(size(&case["kdim"]))
            .value_dim(size(&case["vdim"]))
            .bias(case["bias"].as_bool().unwrap());
        let state = case["params"].as_object().unwrap();
        let state = || state.iter().map(|(name, value)| (name, dynamic(value)));
        for attention in [
            Box::new(config.from_params(ScaledDotProduct::new(), state()).unwrap())
                as Box<dyn Attention<f64>>,
            Box::new(config.from_params(Flash::new(), state()).unwrap()),
        ] {
            let what = |array: &str| format!("{name}, {array}");
            let (ours, saved) = attention.forward_train(&inputs).unwrap();
            assert_close_in_size(what("out"), TOLERANCE, 1.0, &ours, &out);
            let weights = attention.attention_weights(&inputs).unwrap();
            let expected = by_pair(array(&case["weights"]));
            assert_close_in_size(what("weights"), TOLERANCE, 1.0, &weights, &expected);

            let grads = attention.backward(&inputs, &saved, grad_out.view()).unwrap();
            for (array_name, grad) in [
                ("grad_query", &grads.query),
                ("grad_key", &grads.key),
                ("grad_value", &grads.value),
            ] {
                let expected = array::<f64, Ix2>(&case[array_name]);
                assert_close_in_size(what(array_name), TOLERANCE, 1.0, grad, &expected);
            }
            let names = params::state(&*attention);
            assert_eq!(names.len(), case["grad_params"].as_object().unwrap().len());
            for ((param, _), grad) in names.iter().zip(&grads.params) {
                let expected = dynamic(&case["grad_params"][param]);
                assert_close_in_size(what(param), TOLERANCE, 1.0, grad, &expected);
            }
        }
    }
}

#[test]
fn a_permuted_pytorch_bias_needs_no_copy() {
    common::hold_simd();
    // What the documentation of `Inputs::with_bias` recommends.
    let torch = Array::from_shape_fn((2, 3, 5), |(h, i, j)| (100 * h + 10 * i + j) as f64);
    let by_pair = torch.to_shape((2, 15)).unwrap();
    assert!(by_pair.is_view());
    assert_eq!(by_pair.t().index_axis(Axis(0), 7).to_vec(), [12.0, 112.0]);
}

#[test]
fn graph_convolutions_of_pyg_load_by_name() {
    check_pyg(&pyg(), 30);
}

#[test]
fn weights_and_biases_of_edges_are_those_of_pyg() {
    check_pyg(&serde_json::from_str(include_str!("golden/pyg_pairs.json")).unwrap(), 16);
}

/// Checks layers of PyG with their gradients.
fn check_pyg(golden: &Value, at_least: usize) {
    common::hold_simd();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= at_least);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let flag = |name: &str| case[name].as_bool().unwrap();
        let score = match case["conv"].as_str().unwrap() {
            "GATConv" => Score::Gat,
            "GATv2Conv" => Score::GatV2,
            "TransformerConv" => Score::DotProduct,
            conv => panic!("{conv}"),
        };
        let (in_src, in_dst) = (size(&case["in_src"]), size(&case["in_dst"]));
        let mut config =
            EdgeGatConfig::new(score, in_dst, size(&case["out_channels"]), size(&case["heads"]))
                .key_dim(in_src)
                .share_weights(flag("share_weights"))
                .average_heads(!flag("concat"))
                .bias(flag("bias"))
                .residual(flag("residual"))
                .gate(flag("beta"));
        if let Some(slope) = case["negative_slope"].as_f64() {
            config = config.negative_slope(slope);
        }
        let edge_attr =
            (!case["edge_attr"].is_null()).then(|| array::<f64, Ix2>(&case["edge_attr"]));
        if let Some(edge_attr) = &edge_attr {
            config = config.edge_dim(edge_attr.ncols());
        }
        let source: Array2<f64> = array(&case["x_src"]);
        let target = if case["x_dst"].is_null() { source.clone() } else { array(&case["x_dst"]) };
        let graph =
            Graph::from_edges(target.nrows(), source.nrows(), edges(&case["edge_index"])).unwrap();
        let mut inputs =
            Inputs::graph(target.view(), source.view(), source.view(), &graph).unwrap();
        if let Some(edge_attr) = &edge_attr {
            inputs = inputs.with_edge_features(edge_attr.view()).unwrap();
        }
        let of_edges = |name: &str| (!case[name].is_null()).then(|| array::<f64, Ix2>(&case[name]));
        let (pair_weights, edge_bias) = (of_edges("weights"), of_edges("edge_bias"));
        if let Some(weights) = &pair_weights {
            inputs = inputs.with_pair_weights(weights.view()).unwrap();
        }
        if let Some(bias) = &edge_bias {
            inputs = inputs.with_bias(bias.view()).unwrap();
        }

        let state = case["params"].as_object().unwrap();
        let gat = config.from_params(state.iter().map(|(n, value)| (n, dynamic(value)))).unwrap();
        let what = |array: &str| format!("{name}, {array}");
        let (ours, saved) = gat.forward_train(&inputs).unwrap();
        assert_close_in_size(what("out"), TOLERANCE, 1.0, &ours, &array::<f64, Ix2>(&case["out"]));
        let weights = gat.attention_weights(&inputs).unwrap();
        assert_close_in_size(what("alpha"), TOLERANCE, 1.0, &weights, &array(&case["alpha"]));

        let grad_out: Array2<f64> = array(&case["grad_out"]);
        let grads = gat.backward(&inputs, &saved, grad_out.view()).unwrap();
        let expected = &case["grads"];
        let of_source = &grads.key + &grads.value;
        if expected["x_dst"].is_null() {
            let sum = &of_source + &grads.query;
            assert_close_in_size(what("x"), TOLERANCE, 1.0, &sum, &array(&expected["x_src"]));
        } else {
            let grad = array(&expected["x_src"]);
            assert_close_in_size(what("x_src"), TOLERANCE, 1.0, &of_source, &grad);
            let grad = array(&expected["x_dst"]);
            assert_close_in_size(what("x_dst"), TOLERANCE, 1.0, &grads.query, &grad);
        }
        assert_eq!(grads.edge_features.is_some(), edge_attr.is_some());
        if let Some(grad) = &grads.edge_features {
            let expected = array(&expected["edge_attr"]);
            assert_close_in_size(what("edge_attr"), TOLERANCE, 1.0, grad, &expected);
        }
        assert_eq!(
            [grads.pair_weights.is_some(), grads.bias.is_some()],
            [pair_weights.is_some(), edge_bias.is_some()]
        );
        for (name, grad) in
            [("weights", grads.pair_weights.map(Array::into_dyn)), ("edge_bias", grads.bias)]
        {
            if let Some(grad) = grad {
                let expected = dynamic(&expected[name]);
                assert_close_in_size(what(name), TOLERANCE, 1.0, &grad, &expected);
            }
        }
        let params = params::state(&gat);
        assert_eq!(params.len(), grads.params.len());
        for ((param, _), grad) in params.iter().zip(&grads.params) {
            let expected = dynamic(&expected["params"][param]);
            assert_close_in_size(what(param), TOLERANCE, 1.0, grad, &expected);
        }
    }
}

#[test]
fn self_loops_are_those_of_pyg() {
    common::hold_simd();
    let golden = pyg();
    let cases = golden["self_loops"].as_array().unwrap();
    assert!(cases.len() >= 6);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let n = size(&case["num_nodes"]);
        let graph = Graph::from_edges(n, n, edges(&case["edge_index"])).unwrap();
        let expected = Graph::from_edges(n, n, edges(&case["out_edge_index"])).unwrap();
        assert_eq!(graph.with_self_loops().unwrap(), expected, "{name}");
        if case["edge_attr"].is_null() {
            continue;
        }
        let features: Array2<f64> = array(&case["edge_attr"]);
        let fill = case["fill_value"].as_f64().map_or(LoopFill::Mean, LoopFill::Value);
        let (looped, features) = graph.with_self_loops_and_features(features.view(), fill).unwrap();
        assert_eq!(looped, expected, "{name}");
        let expected = array(&case["out_edge_attr"]);
        assert_close_in_size(name, TOLERANCE, 1.0, &features, &expected);
    }
}
