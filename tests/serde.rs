//! Serialisation of configurations, graphs and parameters: values are restored, and invalid ones are
//! refused.
#![cfg(feature = "serde")]

mod common;

use allocation_counter::measure;
use common::parameters::mechanisms;
use graph_attention::ndarray::{Array2, ArrayD, ArrayView1, ArrayViewD, ArrayViewMutD, array, s};
use graph_attention::neighbors::{HnswConfig, HnswIndex, Metric, NeighborIndex, NeighborSearch};
use graph_attention::{
    Dropout, DualSpaceConfig, EdgeGatConfig, Error, Flash, Float, Graph, GraphRopeConfig, Inputs,
    KeyValueCache, LinearConfig, LocalGlobal, MoeConfig, MultiHeadConfig, Params, Partial,
    PerformerConfig, PoincareConfig, Result, StackConfig, TransformerLayerConfig,
    dual_space::Fusion,
    edge_gat::Score,
    graph_rope::{Layout, Scaling},
    local_global::Window,
    moe::{Gating, Priority},
    params,
    performer::{Features, Projection},
    poincare::{Aggregation, Coordinates},
    rowwise::{Activation, NormConfig, Normalization},
};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use serde::de::DeserializeOwned;
use serde::de::value::{MapAccessDeserializer, MapDeserializer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Debug;

#[track_caller]
fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap()
}

#[track_caller]
fn from_json<T: DeserializeOwned>(json: &Value) -> T {
    serde_json::from_value(json.clone()).unwrap()
}

#[track_caller]
fn refusal<T: DeserializeOwned>(json: &str) -> String {
    match serde_json::from_str::<T>(json) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("accepted: {json}"),
    }
}

/// Checks that a value is restored, and that an extra or missing field is refused, unless it is `None`.
#[track_caller]
fn comes_back<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) {
    assert_eq!(&serde_json::from_str::<T>(&to_json(value)).unwrap(), value);
    let Value::Object(fields) = serde_json::to_value(value).unwrap() else {
        panic!("no fields: {value:?}");
    };
    let mut more = fields.clone();
    more.insert("colour".into(), json!(1));
    let message = refusal::<T>(&to_json(&more));
    assert!(message.contains("unknown field `colour`"), "{message}");
    for (name, value) in &fields {
        let mut less = fields.clone();
        less.remove(name);
        match serde_json::from_value::<T>(less.into()) {
            Err(error) => assert!(error.to_string().contains(&format!("missing field `{name}`"))),
            Ok(without) => {
                let absent = serde_json::to_value(without).unwrap()[name].clone();
                assert_eq!(absent, Value::Null, "{name} = {value}");
            }
        }
    }
}

#[test]
fn configurations_come_back() {
    let multi_head = MultiHeadConfig::new(12, 6);
    comes_back(&multi_head);
    comes_back(&multi_head.kv_heads(3).head_dim(5).value_head_dim(7).output_dim(11).bias(false));
    for score in [Score::Gat, Score::GatV2, Score::DotProduct] {
        let config = EdgeGatConfig::new(score, 5, 3, 2);
        comes_back(&config);
        comes_back(&config.key_dim(7).edge_dim(2).average_heads(true).negative_slope(1.0 / 3.0));
    }
    for aggregation in [
        Aggregation::Midpoint,
        Aggregation::TangentAtOrigin,
        Aggregation::TangentAtQuery,
        Aggregation::FrechetMean,
    ] {
        for coordinates in [Coordinates::Ball, Coordinates::Tangent] {
            let config = PoincareConfig::new().aggregation(aggregation).coordinates(coordinates);
            comes_back(&config.learn_curvature(true).curvature(0.1).temperature(1e-7));
        }
    }
    for features in [
        Features::Positive,
        Features::Hyperbolic,
        Features::Trigonometric,
        Features::Relu { epsilon: 1e-3 },
        Features::Elu,
    ] {
        let config = PerformerConfig::new(3, 8).features(features);
        comes_back(&config);
        comes_back(&config.projection(Projection::Iid).scale(0.7).learn_projection(true));
    }
    comes_back(&MoeConfig::new(6, 2));
    comes_back(&MoeConfig::new(6, 2).renormalize(false).noise(true).capacity_factor(1.25));
    for gating in [Gating::Softmax, Gating::Sigmoid] {
        for priority in [Priority::Rank, Priority::Gate, Priority::Query] {
            comes_back(&MoeConfig::new(6, 2).gating(gating).priority(priority).capacity(7));
        }
    }
    for layout in [Layout::Half, Layout::Interleaved] {
        comes_back(&GraphRopeConfig::new(6, layout).axes(3).base(123.0).rotary_dim(4));
        let (factor, original_len) = (8.0, 8192.0);
        for scaling in [
            Scaling::Linear { factor },
            Scaling::Ntk { factor },
            Scaling::yarn(factor, original_len),
            Scaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_len },
        ] {
            let config = GraphRopeConfig::new(6, layout).scaling(scaling);
            comes_back(&config.attention_factor(1.0 / 3.0));
        }
    }
    comes_back(
        &GraphRopeConfig::new(4, Layout::Half).frequencies(array![[0.1, 1e-9], [-3.0, 0.0]]),
    );
    let norm = NormConfig::new(Normalization::Rms, 6).epsilon(1e-8).bias(false);
    for activation in [Activation::Relu, Activation::Gelu, Activation::Silu, Activation::Elu] {
        let config = TransformerLayerConfig::new(6, 5).activation(activation).gated(true);
        let config = config.normalization(Normalization::Rms).norm_first(true).bias(false);
        comes_back(&config.epsilon(0.1));
    }
    comes_back(&StackConfig::new());
    comes_back(&StackConfig::new().norm(norm.clone()).cross_attention(true).checkpointing(true));
    comes_back(&norm);
    comes_back(&LinearConfig::new(3, 4).bias(false));
    comes_back(&DualSpaceConfig::new(Fusion::Gated, 6));
    comes_back(&DualSpaceConfig::new(Fusion::Linear { output_dim: 5 }, 6));
    comes_back(&Window::new(3).dilation(2).globals(&[250, 0, 250]));
    comes_back(&Dropout { probability: 0.1, seed: u64::MAX });
    for metric in
        [Metric::Cosine, Metric::Dot, Metric::Euclidean, Metric::Poincare { curvature: 0.1 }]
    {
        assert_eq!(from_json::<Metric>(&serde_json::to_value(metric).unwrap()), metric);
        comes_back(&HnswConfig::new(metric).ef_search(7));
    }
}

#[test]
fn a_cache_comes_back_without_what_it_forgot() {
    let rows = Array2::from_shape_fn((9, 3), |(i, j)| 1.0 / (1 + i + j) as f64);
    let wide = Array2::from_shape_fn((9, 4), |(i, j)| (i * j) as f64);
    let mut cache = KeyValueCache::new();
    comes_back(&cache);
    cache.append(rows.view(), wide.view()).unwrap();
    comes_back(&cache);
    cache.truncate(0);
    cache.append_at(rows.view(), wide.view(), rows.view()).unwrap();
    cache.remove(1..3).unwrap();
    cache.keep_last(5);
    comes_back(&cache);
    let mut again: KeyValueCache<f64> = serde_json::from_str(&to_json(&cache)).unwrap();
    again.append_at(rows.view(), wide.view(), rows.view()).unwrap();
    assert_eq!((again.len(), again.key().row(0)), (14, rows.row(4)));

    let mut json = serde_json::to_value(&cache).unwrap();
    json["value"] = serde_json::to_value(&wide).unwrap();
    let message = refusal::<KeyValueCache<f64>>(&json.to_string());
    assert!(message.contains("value: expected shape [5, 4], got [9, 4]"), "{message}");
}

#[test]
fn an_index_is_loaded_with_its_links() -> Result<()> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(7);
    let mut keys: Array2<f64> = common::random::normal(900, 5, &mut rng);
    // Copies, and a key without links.
    let first = keys.row(0).to_owned();
    keys.slice_mut(s![400..420, ..]).assign(&first);
    keys.row_mut(500).fill(1e20);
    let queries = keys.slice(s![..20, ..]);
    for metric in [Metric::Dot, Metric::Poincare { curvature: 0.02 }] {
        let config = HnswConfig::new(metric).connections(4).ef_search(10);
        let mut index = config.build(keys.slice(s![..600, ..]).to_owned())?;
        index.insert(keys.slice(s![600..800, ..]))?;
        index.remove(&[0, 7])?;
        let json = to_json(&index);
        let mut loaded: HnswIndex<f64> = serde_json::from_str(&json).unwrap();
        assert_eq!(to_json(&loaded), json);
        for step in 0..2 {
            let search = NeighborSearch::new(5);
            assert_eq!(loaded.search(queries, &search)?, index.search(queries, &search)?);
            assert_eq!(loaded.links()?, index.links()?);
            assert_eq!(loaded.num_removed(), 2);
            // They also grow in the same way.
            if step == 0 {
                loaded.insert(keys.slice(s![800.., ..]))?;
                index.insert(keys.slice(s![800.., ..]))?;
            }
        }

        let value: Value = serde_json::from_str(&json).unwrap();
        let refused = |change: &dyn Fn(&mut Value)| {
            let mut value = value.clone();
            change(&mut value);
            refusal::<HnswIndex<f64>>(&value.to_string())
        };
        let links =
            |value: &mut Value, key: usize, new: Value| value["links"]["links"][key][0] = new;
        let message = refused(&|value| links(value, 3, json!([1, 900])));
        assert!(
            message.contains("links of key 3: expected at most 8 keys of layer 0"),
            "{message}"
        );
        // A copy has no links.
        assert!(refused(&|value| links(value, 3, json!([1, 405]))).contains("links of key 3"));
        assert!(refused(&|value| links(value, 3, json!(vec![9; 9]))).contains("links of key 3"));
        let message = refused(&|value| value["links"]["links"][3] = json!([]));
        assert!(message.contains("layers of key 3"), "{message}");
        let message = refused(&|value| value["links"]["kept"] = json!([1]));
        assert!(message.contains("number of kept links"), "{message}");
        assert!(refused(&|value| value["links"]["kept"][3] = json!(9)).contains("links of key 3"));
        let message = refused(&|value| value["removed"] = json!([1, 1]));
        assert!(message.contains("removed: expected different numbers below 800"), "{message}");
        let message = refused(&|value| value["config"]["connections"] = json!(1));
        assert!(message.contains("connections: expected a number from 2 to 256"), "{message}");
        assert!(refused(&|value| value["colour"] = json!(1)).contains("unknown field `colour`"));
    }
    Ok(())
}

#[test]
fn names_are_those_of_the_documentation() {
    let config = GraphRopeConfig::new(6, Layout::Half).axes(2);
    assert_eq!(serde_json::to_value(config).unwrap()["spectrum"], json!({"Axes": 2}));
    let config = PerformerConfig::new(3, 8).features(Features::Relu { epsilon: 0.5 });
    let expected = json!({
        "head_dim": 3,
        "num_features": 8,
        "features": {"Relu": {"epsilon": 0.5}},
        "projection": "Orthogonal",
        "scale": null,
        "learn_projection": false,
    });
    assert_eq!(serde_json::to_value(config).unwrap(), expected);
    let unknown = refusal::<Score>(r#""GatV3""#);
    assert!(unknown.contains("unknown variant `GatV3`") && unknown.contains("DotProduct"));
    let field = refusal::<Features>(r#"{"Relu":{"epsilon":1,"delta":2}}"#);
    assert!(field.contains("unknown field `delta`"), "{field}");
}

#[test]
fn globals_are_put_in_order() {
    let window: Window =
        from_json(&json!({"left": 1, "right": 1, "dilation": 1, "globals": [9, 2, 9, 0]}));
    assert_eq!(window, Window::new(1).globals(&[0, 2, 9]));
}

/// Returns the error for a configuration with one field changed.
fn changed<C: Serialize + DeserializeOwned, T>(
    config: &C,
    field: &str,
    value: Value,
    init: impl Fn(&C) -> Result<T>,
) -> String {
    assert!(init(config).is_ok());
    let mut fields = serde_json::to_value(config).unwrap();
    assert!(fields.get(field).is_some(), "{field}");
    fields[field] = value;
    match init(&from_json::<C>(&fields)) {
        Err(error @ (Error::InvalidArgument { .. } | Error::Shape { .. })) => error.to_string(),
        Err(error) => panic!("{error:?}"),
        Ok(_) => panic!("accepted: {fields}"),
    }
}

#[test]
fn invalid_configurations_are_refused_by_init() {
    let rng = || Xoshiro256PlusPlus::seed_from_u64(1);
    let multi_head = |config: &MultiHeadConfig| config.init::<f32, _>(Flash::new(), &mut rng());
    let gat = |config: &EdgeGatConfig| config.init::<f32>(&mut rng());
    let poincare = |config: &PoincareConfig| config.init::<f32>();
    let performer = |config: &PerformerConfig| config.init::<f32>(&mut rng());
    let moe = |config: &MoeConfig| config.init::<f32>(vec![Box::new(Flash::new())], &mut rng());
    let rope = |config: &GraphRopeConfig| config.init::<f32, _>(Flash::new());
    let layer = |config: &TransformerLayerConfig| config.init::<f32, _>(Flash::new(), &mut rng());
    let dual = |config: &DualSpaceConfig| {
        config.init::<f32>(Flash::new(), Flash::new(), Flash::new(), &mut rng())
    };
    let window = |window: &Window| LocalGlobal::<f32>::sliding_window(window.clone(), Flash::new());
    let x = array![[1f32]];
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let dropout = |dropout: &Dropout| inputs.with_dropout(*dropout);

    let rope_config = GraphRopeConfig::new(6, Layout::Half);
    let too_few = json!({"Frequencies": {"v": 1, "dim": [1, 2], "data": [1.0, 2.0]}});
    let messages = [
        changed(&MultiHeadConfig::new(6, 2), "num_heads", json!(0), multi_head),
        changed(&MultiHeadConfig::new(6, 2), "embed_dim", json!(u64::MAX), multi_head),
        changed(&EdgeGatConfig::new(Score::Gat, 5, 3, 2), "negative_slope", json!(-0.1), gat),
        changed(&EdgeGatConfig::new(Score::Gat, 5, 3, 2), "gate", json!(true), gat),
        changed(&PoincareConfig::new(), "curvature", json!(-1.0), poincare),
        changed(&PoincareConfig::new(), "temperature", json!(0), poincare),
        changed(&PerformerConfig::new(3, 8), "scale", json!(-2.0), performer),
        changed(&PerformerConfig::new(3, 8), "features", json!("Elu"), performer),
        changed(&MoeConfig::new(6, 1), "k", json!(2), moe),
        changed(&MoeConfig::new(6, 1), "capacity_factor", json!(0.0), moe),
        changed(&MoeConfig::new(6, 1), "capacity", json!(0), moe),
        changed(&rope_config, "rotary_dim", json!(8), rope),
        changed(&rope_config, "base", json!(-1.0), rope),
        changed(&rope_config, "spectrum", json!({"Axes": 4}), rope),
        changed(&rope_config, "spectrum", too_few, rope),
        changed(&DualSpaceConfig::new(Fusion::Gated, 6), "branch_dim", json!(0), dual),
        changed(&TransformerLayerConfig::new(6, 5), "feedforward_dim", json!(0), layer),
        changed(&TransformerLayerConfig::new(6, 5), "epsilon", json!(-1.0), layer),
        changed(&Window::new(3), "dilation", json!(0), window),
        changed(&Dropout { probability: 0.1, seed: 1 }, "probability", json!(1.0), dropout),
    ];
    let fields = [
        "num_heads",
        "embed_dim",
        "negative_slope",
        "gate",
        "curvature",
        "temperature",
        "scale",
        "num_features",
        "k",
        "capacity_factor",
        "capacity",
        "rotary_dim",
        "base",
        "axes",
        "frequencies",
        "branch_dim",
        "feedforward_dim",
        "epsilon",
        "dilation",
        "dropout.probability",
    ];
    assert_eq!(messages.len(), fields.len());
    for (message, field) in messages.iter().zip(fields) {
        assert!(message.starts_with(&format!("{field}: expected ")), "{field}: {message}");
    }
}

#[test]
fn not_a_number_is_refused() {
    // JSON has none: it is written as `null`.
    let json = to_json(&PoincareConfig::new().curvature(f64::NAN));
    let message = refusal::<PoincareConfig>(&json);
    assert!(message.contains("null, expected f64"), "{message}");
    let json = to_json(&MoeConfig::new(6, 1)).replace("null", "1e999");
    assert!(refusal::<MoeConfig>(&json).contains("out of range"));
    let json = to_json(&MoeConfig::new(6, 1)).replace("\"k\":1", "\"k\":-1");
    assert!(refusal::<MoeConfig>(&json).contains("`-1`, expected usize"));

    // Other formats have infinity.
    let epsilon = MapDeserializer::new([("epsilon", f64::NAN)].into_iter());
    let relu = MapDeserializer::<_, serde::de::value::Error>::new([("Relu", epsilon)].into_iter());
    let features = Features::deserialize(MapAccessDeserializer::new(relu)).unwrap();
    let config = PerformerConfig::new(3, 8).features(features);
    let error = config.init::<f64>(&mut Xoshiro256PlusPlus::seed_from_u64(1)).unwrap_err();
    assert!(error.to_string().starts_with("features.epsilon: expected a number"), "{error}");
}

/// The lists that a graph is, and its edges row by row.
fn contents(graph: &Graph) -> (usize, Vec<usize>, Vec<(usize, usize)>) {
    let rows = (0..graph.num_queries()).flat_map(|query| graph.row(query));
    (graph.num_keys(), graph.offsets().to_vec(), rows.collect())
}

#[test]
fn graphs_come_back_with_their_edge_order() -> Result<()> {
    let shuffled = Graph::from_edges(4, 5, [(2, 1), (0, 3), (2, 1), (2, 2), (0, 0), (3, 0)])?;
    let hidden = Array2::from_shape_fn((3, 7), |(i, j)| (i + j) % 3 == 0);
    let graphs = [
        Graph::from_edges(0, 0, [])?,
        Graph::from_edges(0, 3, [])?,
        Graph::from_edges(3, 0, [])?,
        Graph::from_edges(3, 3, [])?,
        Graph::from_csr(3, vec![0, 2, 2, 3], vec![2, 0, 1])?,
        Graph::from_mask(hidden.view())?,
        Graph::window(11, 2)?,
        // The slots of its rows are not in the order of the edges.
        shuffled.transpose().clone(),
        Graph::block_diagonal(&[&shuffled, &shuffled])?,
        shuffled,
    ];
    for graph in &graphs {
        let json = to_json(graph);
        let loaded: Graph = serde_json::from_str(&json).unwrap();
        assert_eq!(&loaded, graph);
        assert_eq!(contents(&loaded), contents(graph));
        assert_eq!(loaded.transpose(), graph.transpose());
        assert_eq!(to_json(&loaded), json);
    }
    Ok(())
}

#[test]
fn a_graph_is_written_as_its_slices() -> Result<()> {
    let graph = Graph::from_edges(2, 3, [(1, 2), (0, 1), (1, 0)])?;
    // A computed transpose makes no difference.
    let _ = graph.transpose();
    let json =
        r#"{"num_keys":3,"offsets":[0,1,3],"indices":[1,2,0],"edge_ids":[1,0,2],"blocks":null}"#;
    assert_eq!(to_json(&graph), json);

    let rows = Graph::from_csr(3, vec![0, 1, 3], vec![1, 2, 0])?;
    let json =
        r#"{"num_keys":3,"offsets":[0,1,3],"indices":[1,2,0],"edge_ids":null,"blocks":null}"#;
    assert_eq!(to_json(&rows), json);
    let short = r#"{"offsets":[0,1,3],"num_keys":3,"indices":[1,2,0]}"#;
    assert_eq!(serde_json::from_str::<Graph>(short).unwrap(), rows);
    comes_back(&rows);

    let both = Graph::block_diagonal(&[&rows, &graph])?;
    assert!(to_json(&both).ends_with(r#""blocks":{"queries":[0,2,4],"keys":[0,3,6]}}"#));
    comes_back(&both);
    assert!(both.blocks().is_some());
    Ok(())
}

#[test]
fn corrupt_graphs_are_refused() {
    let good = json!({
        "num_keys": 3, "offsets": [0, 1, 3], "indices": [1, 2, 0], "edge_ids": [1, 0, 2],
    });
    from_json::<Graph>(&good);
    let large = u64::from(u32::MAX) + 1;
    // The crate's errors, complete, and serde's.
    for (field, value, expected) in [
        ("num_keys", json!(2), "graph: indices[1]: expected a key below 2, got 2"),
        ("num_keys", json!(large), "graph: num_keys: expected at most 4294967295, got 4294967296"),
        ("num_keys", json!(u64::MAX), "graph: num_keys: expected at most 4294967295, got 18446744"),
        ("num_keys", json!(1e30), "invalid type: floating point `1e+30`, expected usize"),
        ("num_keys", json!(-1), "invalid value: integer `-1`, expected usize"),
        ("num_keys", json!(null), "invalid type: null, expected usize"),
        (
            "blocks",
            json!({"queries": [0, 1], "keys": [0, 3]}),
            "graph: queries and keys of the blocks: expected [2, 3], got [1, 3]",
        ),
        (
            "blocks",
            json!({"queries": [0, 2], "keys": [1, 3]}),
            "key offsets: expected numbers that begin with 0",
        ),
        ("offsets", json!([]), "graph: offsets: expected one entry more than queries, got no"),
        ("offsets", json!([1, 1, 3]), "graph: offsets[0]: expected 0, got 1"),
        ("offsets", json!([0, 2, 1]), "graph: offsets[2]: expected at least 2, got 1"),
        ("offsets", json!([0, 4, 3]), "graph: offsets[2]: expected at least 4, got 3"),
        ("offsets", json!([0, 1]), "graph: offsets[1]: expected indices.len() = 3, got 1"),
        ("offsets", json!([0, u64::MAX]), "graph: offsets[1]: expected indices.len() = 3, got 184"),
        ("offsets", json!([0, 1, -3]), "invalid value: integer `-3`, expected usize"),
        ("offsets", json!([0, 1.5, 3]), "invalid type: floating point `1.5`, expected usize"),
        ("offsets", json!("AAAB"), "invalid type: string \"AAAB\", expected a sequence"),
        ("indices", json!([1, 2, 3]), "graph: indices[2]: expected a key below 3, got 3"),
        ("indices", json!([1, large, 0]), "invalid value: integer `4294967296`, expected u32"),
        ("indices", json!([1, -2, 0]), "invalid value: integer `-2`, expected u32"),
        ("indices", json!([1, 2]), "graph: offsets[2]: expected indices.len() = 2, got 3"),
        ("indices", json!({"0": 1}), "invalid type: map, expected a sequence"),
        ("edge_ids", json!([1, 0]), "graph: edge_ids: expected one per slot, 3, got 2"),
        ("edge_ids", json!([1, 0, 2, 3]), "graph: edge_ids: expected one per slot, 3, got 4"),
        ("edge_ids", json!([]), "graph: edge_ids: expected one per slot, 3, got 0"),
        (
            "edge_ids",
            json!([1, 0, 3]),
            "graph: edge_ids[2]: expected a number below 3 that no other slot has, got 3",
        ),
        (
            "edge_ids",
            json!([1, 0, 1]),
            "graph: edge_ids[2]: expected a number below 3 that no other slot has, got 1",
        ),
        ("edge_ids", json!([1, 0, u32::MAX]), "graph: edge_ids[2]: expected a number below 3"),
        ("edge_ids", json!([[1, 0, 2]]), "invalid type: sequence, expected u32"),
        ("transposed", json!({}), "unknown field `transposed`"),
        ("num_queries", json!(2), "unknown field `num_queries`"),
    ] {
        let mut bad = good.clone();
        bad[field] = value;
        let message = refusal::<Graph>(&bad.to_string());
        assert!(message.starts_with(expected), "{bad}\n{message}\n{expected}");
    }
    for (json, expected) in [
        ("", "EOF"),
        ("null", "invalid type: null, expected a graph"),
        ("[3]", "invalid length 1, expected a graph"),
        (r#"{"num_keys":1,"num_keys":2}"#, "duplicate field `num_keys`"),
        (r#"{"num_keys":1,"offsets":[0]}"#, "missing field `indices`"),
    ] {
        let message = refusal::<Graph>(json);
        assert!(message.starts_with(expected), "{json}: {message}");
    }
}

#[test]
fn no_damaged_byte_makes_an_invalid_graph() -> Result<()> {
    let json = to_json(&Graph::from_edges(2, 3, [(1, 2), (0, 1), (1, 0)])?).into_bytes();
    for length in 0..json.len() {
        assert!(serde_json::from_slice::<Graph>(&json[..length]).is_err());
    }
    let mut accepted = 0;
    for at in 0..json.len() {
        for flip in 1..=u8::MAX {
            let mut json = json.clone();
            json[at] ^= flip;
            // Another digit may make another graph, but a whole one.
            if let Ok(graph) = serde_json::from_slice::<Graph>(&json) {
                let (num_keys, offsets, _) = contents(&graph);
                Graph::from_csr(num_keys, offsets, graph.indices().to_vec())?;
                let mut ids = graph.edge_ids().map_or(vec![0, 1, 2], <[u32]>::to_vec);
                ids.sort_unstable();
                assert_eq!(ids, [0, 1, 2]);
                accepted += 1;
            }
        }
    }
    assert!(accepted > 0);
    Ok(())
}

#[test]
fn reading_a_graph_takes_no_more_memory_than_what_is_read() {
    let most_keys = r#"{"num_keys":4294967295,"offsets":[0],"indices":[]}"#;
    let allocations = measure(|| assert!(serde_json::from_str::<Graph>(most_keys).is_ok()));
    assert!(allocations.bytes_max < 1024, "{allocations:?}");
    let offsets = vec!["4294967295"; 1000].join(",");
    let rows = format!(r#"{{"num_keys":4294967295,"offsets":[0,{offsets}],"indices":[]}}"#);
    let allocations = measure(|| assert!(serde_json::from_str::<Graph>(&rows).is_err()));
    assert!(allocations.bytes_max < 4 * rows.len() as u64, "{allocations:?}");
}

fn partial_results_come_back_as<F: Float + Serialize + DeserializeOwned>() -> Result<()> {
    let query = Array2::from_shape_fn((3, 4), |(i, j)| F::from_f64((i * 7 + j) as f64 / 3.0));
    // The second query sees no key; its shift is −∞, which JSON does not have.
    let mask = array![[true, true, false], [false; 3], [true, false, true]];
    for logit in [0.0, -1e9] {
        let bias = Array2::from_elem((1, 3), F::from_f64(logit));
        let inputs = Inputs::dense(query.view(), query.view(), query.view())?
            .with_heads(2)?
            .with_mask(mask.view())?
            .with_bias(bias.view())?;
        let partial = Flash::new().forward_partial(&inputs)?;
        assert_eq!(partial.shift()[[1, 0]], F::neg_infinity());
        comes_back(&partial);
    }
    comes_back(&Partial::<F>::empty(0, 0, 1)?);
    Ok(())
}

#[test]
fn partial_results_come_back() -> Result<()> {
    partial_results_come_back_as::<f32>()?;
    partial_results_come_back_as::<f64>()
}

#[test]
fn invalid_partial_results_are_refused() {
    let array = |dim: [usize; 2]| {
        let data = vec![1.0; dim[0] * dim[1]];
        json!({"v": 1, "dim": dim, "data": data})
    };
    let refusal_of = |out, shift, sum| {
        let json = json!({"out": array(out), "shift": array(shift), "sum": array(sum)});
        refusal::<Partial<f64>>(&json.to_string())
    };
    let message = refusal_of([2, 4], [3, 1], [2, 1]);
    assert!(message.contains("shift: expected shape [2, 1], got [3, 1]"), "{message}");
    let message = refusal_of([2, 4], [2, 1], [2, 2]);
    assert!(message.contains("sum: expected shape [2, 1], got [2, 2]"), "{message}");
    let message = refusal_of([2, 4], [2, 3], [2, 3]);
    assert!(message.contains("out: expected columns that split into 3 heads"), "{message}");
    let mut short = array([2, 4]);
    short["data"].as_array_mut().unwrap().pop();
    let json = json!({"out": short, "shift": array([2, 1]), "sum": array([2, 1])}).to_string();
    assert!(refusal::<Partial<f64>>(&json).contains("data and dimension must match in size"));
    let message = refusal::<Partial<f64>>("[]");
    assert!(message.contains("expected a partial result"), "{message}");
}

/// Returns the names, shapes and bits of a state.
fn bits<F: Float>(state: &[(String, ArrayD<F>)]) -> Vec<(String, Vec<usize>, Vec<u64>)> {
    let bits = |value: &ArrayD<F>| value.iter().map(|x| x.as_f64().to_bits()).collect();
    let entry =
        |(name, value): &(String, ArrayD<F>)| (name.clone(), value.shape().to_vec(), bits(value));
    state.iter().map(entry).collect()
}

fn parameters_come_back<F: Float + Serialize + DeserializeOwned>() -> Result<()> {
    for (saved, mut loaded) in mechanisms::<F>(1).into_iter().zip(mechanisms::<F>(9)) {
        let state = params::state(&saved);
        assert!(state.is_empty() || params::state(&loaded) != state, "{}", saved.name());
        let read: Vec<(String, ArrayD<F>)> = serde_json::from_str(&to_json(&state)).unwrap();
        params::load_state(&mut *loaded, read)?;
        assert_eq!(bits(&params::state(&loaded)), bits(&state));

        // By name in any order.
        let map: BTreeMap<_, _> = state.iter().cloned().collect();
        let read: BTreeMap<String, ArrayD<F>> = serde_json::from_str(&to_json(&map)).unwrap();
        let mut loaded = mechanisms::<F>(9);
        let loaded = loaded.iter_mut().find(|other| {
            let names = |state: Vec<(String, ArrayD<F>)>| {
                state.into_iter().map(|(name, value)| (name, value.shape().to_vec()))
            };
            names(params::state(&***other)).eq(names(state.clone()))
        });
        let loaded = loaded.expect("a mechanism of these names and shapes");
        params::load_state(&mut **loaded, read)?;
        assert_eq!(bits(&params::state(&**loaded)), bits(&state));
    }
    Ok(())
}

#[test]
fn parameters_come_back_as_the_same_bits() -> Result<()> {
    parameters_come_back::<f32>()?;
    parameters_come_back::<f64>()
}

/// Returns one array with its name.
struct One<F>(ArrayD<F>);

impl<F: Float> Params<F> for One<F> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        visitor("x", self.0.view());
    }
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        visitor("x", self.0.view_mut());
    }
}

fn values_come_back<F: Float + Serialize + DeserializeOwned>(values: &[F]) {
    let values = One(ArrayView1::from(values).to_owned().into_dyn());
    let state = params::state(&values);
    let read: Vec<(String, ArrayD<F>)> = serde_json::from_str(&to_json(&state)).unwrap();
    assert_eq!(bits(&read), bits(&state));
}

#[test]
fn special_values_come_back_or_are_refused() {
    let edges =
        [-0.0, f32::from_bits(1), f32::MIN_POSITIVE / 2.0, f32::MAX, 1.0 / 3.0, 16_777_217.];
    values_come_back(&edges);
    // The last is read one bit off without serde_json's `float_roundtrip`.
    let edges =
        [-0.0, f64::from_bits(1), f64::MIN_POSITIVE / 2.0, f64::MAX, 0.249_921_804_623_519_98];
    values_come_back(&edges);
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let json = to_json(&params::state(&One(array![value].into_dyn())));
        let message = refusal::<Vec<(String, ArrayD<f64>)>>(&json);
        assert!(message.contains("null, expected f64"), "{message}");
    }
}

#[test]
fn other_parameters_are_refused_and_change_nothing() {
    let mut params = One(array![[1.0, 2.0]].into_dyn());
    let before = params::state(&params);
    let mut load = |json: Value| {
        let state: Vec<(String, ArrayD<f64>)> = from_json(&json);
        let error = params::load_state(&mut params, state).unwrap_err();
        assert_eq!(params::state(&params), before);
        error
    };
    let array = |dim: Value, data: Value| json!({"v": 1, "dim": dim, "data": data});
    let good = array(json!([1, 2]), json!([3.0, 4.0]));
    assert_eq!(load(json!([])), Error::MissingParam { name: "x".into() });
    assert_eq!(load(json!([["x", good], ["x", good]])), Error::DuplicateParam { name: "x".into() });
    let unknown = Error::UnknownParam { name: "y".into(), known: vec!["x".into()] };
    assert_eq!(load(json!([["y", good]])), unknown);
    let shape = |actual: &[usize]| Error::Shape {
        what: "x".into(),
        expected: vec![1, 2],
        actual: actual.to_vec(),
    };
    let column = array(json!([2, 1]), json!([3.0, 4.0]));
    assert_eq!(load(json!([["x", column]])), shape(&[2, 1]));
    assert_eq!(load(json!([["x", array(json!([0, 2]), json!([]))]])), shape(&[0, 2]));

    for bad in [
        array(json!([2, 2]), json!([3.0, 4.0])),
        array(json!([1, 2]), json!([3.0, 4.0, 5.0])),
        array(json!([1, 2]), json!([3.0, "4"])),
        array(json!([-1, 2]), json!([])),
        array(json!([1u64 << 63, 2]), json!([])),
        array(json!([u64::MAX, u64::MAX]), json!([])),
        array(json!([0, u64::MAX, 2]), json!([])),
        json!({"v": 2, "dim": [1, 2], "data": [3.0, 4.0]}),
        json!({"v": 1, "dim": [1, 2]}),
        json!([[3.0, 4.0]]),
        json!(null),
    ] {
        let json = json!([["x", bad]]).to_string();
        let allocations = measure(|| drop(refusal::<Vec<(String, ArrayD<f64>)>>(&json)));
        assert!(allocations.bytes_max < 4096, "{json}: {allocations:?}");
    }
}
