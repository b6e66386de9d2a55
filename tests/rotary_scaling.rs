//! Rotary frequencies for longer contexts against transformers (`tests/golden/rotary_scaling.py`), and frequencies
//! of each head.

mod common;

use common::close::assert_close;
use common::golden::{array as golden_array, size};
use common::random::matrix;
use common::refused;
use graph_attention::ndarray::{Array1, Array2, Axis, array, s};
use graph_attention::testing::{Shapes, check_attention, check_gradients};
use graph_attention::{
    Attention, EdgeRope, Flash, GraphRope, GraphRopeConfig, Inputs, Result,
    graph_rope::{Layout, Scaling},
};
use serde_json::Value;

fn cases() -> Vec<Value> {
    let golden: Value = serde_json::from_str(include_str!("golden/rotary_scaling.json")).unwrap();
    golden["cases"].as_array().unwrap().clone()
}

/// Returns the configuration of a model of transformers.
fn config(case: &Value) -> GraphRopeConfig {
    let parameters = &case["parameters"];
    let get = |name: &str| parameters[name].as_f64();
    let number = |name: &str| get(name).unwrap();
    let factor = number("factor");
    let scaling = match case["rope_type"].as_str().unwrap() {
        "linear" => Scaling::Linear { factor },
        "dynamic" => {
            let len = case["positions"].as_array().unwrap().iter().map(size).max().unwrap() + 1;
            let ratio = len as f64 / case["max_len"].as_f64().unwrap();
            Scaling::Ntk { factor: factor * ratio - (factor - 1.0) }
        }
        "yarn" => Scaling::Yarn {
            factor,
            original_len: number("original_max_position_embeddings"),
            beta_fast: get("beta_fast").unwrap_or(32.0),
            beta_slow: get("beta_slow").unwrap_or(1.0),
            truncate: parameters["truncate"].as_bool().unwrap_or(true),
        },
        "llama3" => Scaling::Llama3 {
            factor,
            low_freq_factor: number("low_freq_factor"),
            high_freq_factor: number("high_freq_factor"),
            original_len: number("original_max_position_embeddings"),
        },
        other => panic!("{other}"),
    };
    let mut config = GraphRopeConfig::new(size(&case["head_dim"]), Layout::Half)
        .rotary_dim(size(&case["rotary_dim"]))
        .base(case["base"].as_f64().unwrap())
        .scaling(scaling);
    if let Some(factor) = get("attention_factor") {
        config = config.attention_factor(factor);
    }
    if let (Some(a), Some(b)) = (get("mscale"), get("mscale_all_dim")) {
        let of = |m: f64| 0.1 * m * factor.ln() + 1.0;
        config = config.attention_factor(of(a) / of(b));
    }
    config
}

#[test]
fn frequencies_and_rotated_rows_are_those_of_transformers() -> Result<()> {
    let cases = cases();
    let of = |rope_type| cases.iter().filter(|case| case["rope_type"] == rope_type).count();
    assert_eq!(["linear", "dynamic", "yarn", "llama3"].map(of), [2, 2, 11, 3]);
    for case in &cases {
        let name = &case["name"];
        let rope: GraphRope<f64, _> = config(case).init(Flash::new())?;
        let frequencies: Array1<f64> = golden_array(&case["frequencies"]);
        let frequencies = frequencies.insert_axis(Axis(0));
        let ratio = rope.frequencies() / &frequencies;
        assert_close(name, 1e-13, &ratio, &Array2::ones(frequencies.raw_dim()));
        let factor = case["attention_factor"].as_f64().unwrap();
        assert!((rope.attention_factor() / factor - 1.0).abs() < 1e-15, "{name}");

        let x: Array2<f64> = golden_array(&case["x"]);
        let at = case["positions"].as_array().unwrap().iter().map(|at| at.as_f64().unwrap());
        let at: Array2<f64> = at.collect::<Array1<f64>>().insert_axis(Axis(1));
        let out = rope.rotate(x.view(), at.view())?;
        // Their angles of 131,071 radians are rounded.
        assert_close(name, 2e-10, &out, &golden_array(&case["out"]));
        let single: GraphRope<f32, _> = config(case).init(Flash::new())?;
        let out = single.rotate(x.mapv(|x| x as f32).view(), at.mapv(|x| x as f32).view())?;
        assert_close(name, 2e-6, &out.mapv(f64::from), &golden_array(&case["out"]));
    }
    Ok(())
}

#[test]
fn scalings_are_defined_at_their_ends() -> Result<()> {
    // YaRN with so few positions that both ends of its ramp are pair 0: a step after that pair.
    let config = GraphRopeConfig::new(16, Layout::Half).scaling(Scaling::yarn(4.0, 6.0));
    let frequencies = config.init::<f64, _>(Flash::new())?.frequencies();
    let expected = Array2::from_shape_fn((1, 8), |(_, pair)| {
        let theta = 10_000f64.powf(-(pair as f64) / 8.0);
        if pair == 0 { theta } else { theta / 4.0 }
    });
    assert_close("yarn", 1e-15, &frequencies, &expected);
    // NTK-aware scaling of a single pair, which is the highest frequency.
    let config = GraphRopeConfig::new(2, Layout::Half).scaling(Scaling::Ntk { factor: 4.0 });
    assert_eq!(config.init::<f64, _>(Flash::new())?.frequencies(), array![[1.0]]);
    Ok(())
}

#[test]
fn an_attention_factor_multiplies_logits_of_rotated_columns_by_its_square() -> Result<()> {
    let x = matrix(9, 12, 1);
    let at = Array2::from_shape_fn((9, 1), |(row, _)| row as f64 * 3.0);
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?.with_heads(2)?;
    let inputs = inputs.with_positions(at.view(), at.view())?;
    // Over all columns, it is a scale.
    let config = GraphRopeConfig::new(6, Layout::Interleaved);
    let with = config.clone().attention_factor(1.5).init(Flash::new())?;
    let scaled = Flash::new().with_scale(1.5 * 1.5 / 6f64.sqrt())?;
    let expected = config.init(scaled)?.forward(&inputs)?;
    assert_close("all", 1e-14, &with.forward(&inputs)?, &expected);

    // Of distances too, where only keys are rotated.
    let scaling = Scaling::yarn(16.0, 8.0);
    for dim in [6, 4] {
        let config = GraphRopeConfig::new(6, Layout::Half).rotary_dim(dim).scaling(scaling);
        let distances = Array1::from_shape_fn(81, |pair| at[[pair % 9, 0]] - at[[pair / 9, 0]]);
        let of_distances = inputs.with_distances(distances.view())?;
        let edges: EdgeRope<f64> = config.init_edges()?;
        let expected = config.init(Flash::new())?.forward(&inputs)?;
        assert_close(dim, 1e-13, &edges.forward(&of_distances)?, &expected);
    }
    Ok(())
}

/// Frequencies of three key heads with two axes and two pairs; the second head is not rotated.
fn of_heads() -> Array2<f64> {
    array![[0.3, -1.0, 0.0, 0.0, 0.7, 0.2], [0.1, 0.5, 0.0, 0.0, -0.4, 0.0]]
}

fn rope_of_heads(layout: Layout) -> GraphRopeConfig {
    GraphRopeConfig::new(5, layout).rotary_dim(4).frequencies(of_heads())
}

#[test]
fn each_head_has_its_own_frequencies() -> Result<()> {
    for layout in [Layout::Half, Layout::Interleaved] {
        let (query, key) = (matrix(7, 30, 1), matrix(8, 15, 2));
        let (query_at, key_at) = (matrix(7, 2, 3), matrix(8, 2, 4));
        let rope = rope_of_heads(layout).init::<f64, _>(Flash::new())?;
        let inputs = Inputs::dense(query.view(), key.view(), key.view())?
            .with_grouped_heads(6, 3)?
            .with_positions(query_at.view(), key_at.view())?;
        let out = rope.forward(&inputs)?;
        for kv_head in 0..3 {
            let of_head = of_heads().slice(s![.., 2 * kv_head..2 * kv_head + 2]).to_owned();
            let config = GraphRopeConfig::new(5, layout).rotary_dim(4).frequencies(of_head);
            let (queries, keys) = (10 * kv_head..10 * kv_head + 10, 5 * kv_head..5 * kv_head + 5);
            let query = query.slice(s![.., queries.clone()]);
            let key = key.slice(s![.., keys.clone()]);
            let alone = Inputs::dense(query, key, key)?
                .with_grouped_heads(2, 1)?
                .with_positions(query_at.view(), key_at.view())?;
            let expected = config.init(Flash::new())?.forward(&alone)?;
            assert_eq!(out.slice(s![.., queries]), expected, "{layout:?}, {kv_head}");
        }
        let turned = rope.rotate(key.view(), key_at.view())?;
        assert_eq!(turned.slice(s![.., 5..10]), key.slice(s![.., 5..10])); // not rotated
        assert_ne!(turned.slice(s![.., ..5]), key.slice(s![.., ..5]));
        let norms = |x: &Array2<f64>| (x * x).sum_axis(Axis(1));
        assert_close("norms", 1e-13, &norms(&turned), &norms(&key));

        // Two heads cannot share three blocks.
        let narrow = key.slice(s![.., ..10]);
        let two = Inputs::dense(narrow, narrow, narrow)?.with_heads(2)?;
        let two = two.with_positions(key_at.view(), key_at.view())?;
        refused(
            rope.forward(&two),
            "InvalidArgument | kv_heads | multiple of the 3 blocks | got 2",
        );
        refused(rope.rotate(narrow, key_at.view()), "InvalidArgument | heads | 3 blocks | got 2");
    }
    Ok(())
}

#[test]
fn gradients_of_frequencies_of_each_head_are_the_derivatives() {
    let shapes = Shapes::new(10, 10, 4).heads(2).axes(2);
    for layout in [Layout::Half, Layout::Interleaved] {
        let frequencies = array![[0.3, -1.0, 0.0, 0.0], [0.1, 0.5, 0.0, 0.0]];
        let config = GraphRopeConfig::new(5, layout).rotary_dim(4).frequencies(frequencies);
        let config = config.learn_frequencies(true).attention_factor(1.3);
        let mut rope = config.init::<f64, _>(Flash::new()).unwrap();
        check_attention(&rope, &shapes).unwrap();
        check_gradients(&mut rope, &shapes).unwrap();
        let frequencies = array![[0.3, -1.0, 0.2, 0.0]];
        let config = GraphRopeConfig::new(5, layout).rotary_dim(4).frequencies(frequencies);
        let config = config.learn_frequencies(true).attention_factor(1.3);
        let mut edges: EdgeRope<f64> = config.init_edges().unwrap();
        let shapes = Shapes::new(10, 10, 4).heads(2);
        check_attention(&edges, &shapes).unwrap();
        check_gradients(&mut edges, &shapes).unwrap();
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    let new = || GraphRopeConfig::new(8, Layout::Half);
    let yarn = |beta_slow, beta_fast, original_len| Scaling::Yarn {
        factor: 2.0,
        original_len,
        beta_fast,
        beta_slow,
        truncate: true,
    };
    let llama = |low_freq_factor, high_freq_factor, original_len| Scaling::Llama3 {
        factor: 2.0,
        low_freq_factor,
        high_freq_factor,
        original_len,
    };
    for (scaling, expected) in [
        (Scaling::Linear { factor: 0.5 }, "factor | at least 1 | 0.5"),
        (Scaling::Ntk { factor: f64::NAN }, "factor | at least 1 | NaN"),
        (Scaling::yarn(f64::INFINITY, 64.0), "factor | finite | inf"),
        (Scaling::yarn(2.0, 0.0), "original_len | positive | 0"),
        (yarn(0.0, 32.0, 64.0), "beta_slow | positive | 0"),
        (yarn(1.0, f64::NAN, 64.0), "beta_fast | positive | NaN"),
        (yarn(4.0, 4.0, 64.0), "beta_fast | above 4 | 4"),
        (llama(-1.0, 4.0, 64.0), "low_freq_factor | positive | -1"),
        (llama(1.0, f64::INFINITY, 64.0), "high_freq_factor | positive | inf"),
        (llama(4.0, 1.0, 64.0), "high_freq_factor | above 4 | 1"),
        (llama(1.0, 4.0, f64::NAN), "original_len | positive | NaN"),
    ] {
        let result = new().scaling(scaling).init::<f64, _>(Flash::new());
        refused(result, &format!("InvalidArgument | {expected}"));
    }
    let result = new().base(1.0).scaling(Scaling::yarn(2.0, 64.0)).init::<f64, _>(Flash::new());
    refused(result, "InvalidArgument | base, with YaRN | above 1 | got 1");
    let given = new().frequencies(Array2::ones((1, 4))).scaling(Scaling::Linear { factor: 2.0 });
    refused(given.init::<f64, _>(Flash::new()), "InvalidArgument | scaling | given | Linear");
    let result = new().attention_factor(f64::NAN).init::<f64, _>(Flash::new());
    refused(result, "InvalidArgument | attention_factor | finite | NaN");
    let result = new().frequencies(Array2::ones((1, 6))).init::<f64, _>(Flash::new());
    refused(result, "Shape | frequencies | [1, 4] | [1, 6]");
}
