//! The answers of PyTorch and PyG, generated in `f64` by the scripts in `tests/golden`.

mod common;

use graph_attention::ndarray::{
    Array, Array2, ArrayD, ArrayView, Axis, Dimension, Ix2, Ix3, IxDyn,
};
use graph_attention::{
    Attention, Causal, EdgeGatConfig, Flash, Graph, Inputs, LoopFill, MultiHeadConfig,
    ScaledDotProduct, edge_gat::Score, params,
};
use serde_json::Value;

/// Two computations in `f64` in another order: some hundred roundings, relative to the largest
/// number of an array. (The weights of logits of size s have a relative error of s ε of their own.)
const TOLERANCE: f64 = 1e-13;

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/torch_attention.json")).unwrap()
}

fn pyg() -> Value {
    serde_json::from_str(include_str!("golden/pyg_conv.json")).unwrap()
}

fn dynamic(value: &Value) -> ArrayD<f64> {
    let shape: Vec<usize> =
        value["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
    let number = |n: &Value| n.as_f64().unwrap_or_else(|| n.as_str().unwrap().parse().unwrap());
    let data = value["data"].as_array().unwrap().iter().map(number).collect();
    Array::from_shape_vec(IxDyn(&shape), data).unwrap()
}

fn array<D: Dimension>(value: &Value) -> Array<f64, D> {
    dynamic(value).into_dimensionality().unwrap()
}

fn size(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

/// heads × queries × keys, as PyTorch has it, becomes pairs × heads.
fn by_pair(array: Array<f64, Ix3>) -> Array2<f64> {
    let (heads, queries, keys) = array.dim();
    array.into_shape_with_order((heads, queries * keys)).unwrap().reversed_axes()
}

/// A bias or its gradient, of either form.
fn bias(value: &Value) -> Array2<f64> {
    match dynamic(value).ndim() {
        2 => array::<Ix2>(value),
        _ => by_pair(array(value)),
    }
}

/// The edges of a PyG `edge_index`: targets are queries, sources are keys.
fn edges(value: &Value) -> Vec<(usize, usize)> {
    let end = |name: &str| value[name].as_array().unwrap().iter().map(size);
    end("dst").zip(end("src")).collect()
}

fn mask(value: &Value) -> Option<Array2<bool>> {
    (!value.is_null()).then(|| array::<Ix2>(value).mapv(|n| n == 1.0))
}

fn assert_close<D: Dimension>(
    what: &str,
    tolerance: f64,
    actual: ArrayView<'_, f64, D>,
    expected: ArrayView<'_, f64, D>,
) {
    assert_eq!(actual.shape(), expected.shape(), "{what}");
    let largest = expected.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
    assert!(largest.is_finite(), "infinite numbers are compared with nothing");
    for (a, b) in actual.iter().zip(expected) {
        assert!((a - b).abs() <= tolerance * largest, "{what}: {a:e} instead of {b:e}");
    }
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
            ["query", "key", "value", "grad_out", "out"].map(|name| array::<Ix2>(&case[name]));
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
            assert_close(&what("out"), tolerance, ours.view(), out.view());
            let grads = attention.backward(&inputs, &saved, grad_out.view()).unwrap();
            for (array_name, grad) in [
                ("grad_query", &grads.query),
                ("grad_key", &grads.key),
                ("grad_value", &grads.value),
            ] {
                let expected = array::<Ix2>(&case[array_name]);
                assert_close(&what(array_name), tolerance, grad.view(), expected.view());
            }
            assert_eq!(grads.bias.is_some(), logits.is_some());
            if let Some(grad) = &grads.bias {
                assert_close(
                    &what("grad_bias"),
                    tolerance,
                    grad.view(),
                    bias(&case["grad_bias"]).into_dyn().view(),
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
            ["query", "key", "value", "grad_out", "out"].map(|name| array::<Ix2>(&case[name]));
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
            assert_close(&what("out"), TOLERANCE, ours.view(), out.view());
            let weights = attention.attention_weights(&inputs).unwrap();
            let expected = by_pair(array(&case["weights"]));
            assert_close(&what("weights"), TOLERANCE, weights.view(), expected.view());

            let grads = attention.backward(&inputs, &saved, grad_out.view()).unwrap();
            for (array_name, grad) in [
                ("grad_query", &grads.query),
                ("grad_key", &grads.key),
                ("grad_value", &grads.value),
            ] {
                let expected = array::<Ix2>(&case[array_name]);
                assert_close(&what(array_name), TOLERANCE, grad.view(), expected.view());
            }
            let names = params::state(&*attention);
            assert_eq!(names.len(), case["grad_params"].as_object().unwrap().len());
            for ((param, _), grad) in names.iter().zip(&grads.params) {
                let expected = dynamic(&case["grad_params"][param]);
                assert_close(&what(param), TOLERANCE, grad.view(), expected.view());
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
    common::hold_simd();
    let golden = pyg();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 30);
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
        let edge_attr = (!case["edge_attr"].is_null()).then(|| array::<Ix2>(&case["edge_attr"]));
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

        let state = case["params"].as_object().unwrap();
        let gat = config.from_params(state.iter().map(|(n, value)| (n, dynamic(value)))).unwrap();
        let what = |array: &str| format!("{name}, {array}");
        let (ours, saved) = gat.forward_train(&inputs).unwrap();
        assert_close(&what("out"), TOLERANCE, ours.view(), array::<Ix2>(&case["out"]).view());
        let weights = gat.attention_weights(&inputs).unwrap();
        assert_close(&what("alpha"), TOLERANCE, weights.view(), array(&case["alpha"]).view());

        let grad_out: Array2<f64> = array(&case["grad_out"]);
        let grads = gat.backward(&inputs, &saved, grad_out.view()).unwrap();
        let expected = &case["grads"];
        let of_source = &grads.key + &grads.value;
        if expected["x_dst"].is_null() {
            let sum = &of_source + &grads.query;
            assert_close(&what("x"), TOLERANCE, sum.view(), array(&expected["x_src"]).view());
        } else {
            let grad = array(&expected["x_src"]);
            assert_close(&what("x_src"), TOLERANCE, of_source.view(), grad.view());
            let grad = array(&expected["x_dst"]);
            assert_close(&what("x_dst"), TOLERANCE, grads.query.view(), grad.view());
        }
        assert_eq!(grads.edge_features.is_some(), edge_attr.is_some());
        if let Some(grad) = &grads.edge_features {
            let expected = array(&expected["edge_attr"]);
            assert_close(&what("edge_attr"), TOLERANCE, grad.view(), expected.view());
        }
        let params = params::state(&gat);
        assert_eq!(params.len(), grads.params.len());
        for ((param, _), grad) in params.iter().zip(&grads.params) {
            let expected = dynamic(&expected["params"][param]);
            assert_close(&what(param), TOLERANCE, grad.view(), expected.view());
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
        assert_close(name, TOLERANCE, features.view(), expected.view());
    }
}
