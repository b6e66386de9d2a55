//! Packed inputs: several sequences in one call.

mod common;

use common::random::{matrix, rng};
use graph_attention::ndarray::{Array2, Array3, ArrayView2, Axis, s};
use graph_attention::{
    Attention, Causal, Dropout, DualSpaceConfig, Error, Flash, Graph, Inputs, LocalGlobal,
    PoincareConfig, Result, ScaledDotProduct, Segments,
    dual_space::{Fusion, LatentSearch},
    local_global::Window,
    neighbors::Metric,
};
use rand::RngExt;
use rayon::ThreadPoolBuilder;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Sequences of all kinds of lengths, some of them empty.
fn lengths() -> [Vec<usize>; 2] {
    let mut rng = rng(1);
    let mut draw = |_| match rng.random_range(0..6) {
        0 => 0,
        1 => 1,
        2 => 300,
        _ => rng.random_range(2..120),
    };
    [(0..25).map(&mut draw).collect(), (0..25).map(&mut draw).collect()]
}

#[test]
fn the_same_bits_as_a_loop_on_any_number_of_threads() -> Result<()> {
    let [queries, keys] = lengths();
    let segments = Segments::from_query_key_lengths(&queries, &keys)?;
    let q = 0.1 * matrix(segments.num_queries(), 8, 2);
    let k = 0.1 * matrix(segments.num_keys(), 4, 3);
    let v = 0.1 * matrix(segments.num_keys(), 6, 4);
    let grad = matrix(segments.num_queries(), 12, 5);
    let dropout = Dropout { probability: 0.2, seed: 7 };
    let bias = matrix(segments.num_pairs(), 1, 6);
    let packed = Inputs::packed(q.view(), k.view(), v.view(), &segments)?
        .with_grouped_heads(4, 2)?
        .with_causal_alignment(Causal::BottomRight)
        .with_dropout(dropout)?
        .with_bias(bias.view())?;
    let window = LocalGlobal::sliding_window(Window::sides(20, 4).globals(&[0]), Flash::new())?;
    let mechanisms: [Box<dyn Attention<f64>>; 4] = [
        Box::new(Flash::new()),
        Box::new(ScaledDotProduct::new()),
        Box::new(PoincareConfig::new().init()?),
        Box::new(window),
    ];
    for attention in mechanisms {
        let name = attention.name();
        let run = || -> Result<_> {
            let (out, saved) = attention.forward_train(&packed)?;
            Ok((out, attention.backward(&packed, &saved, grad.view())?))
        };
        let (out, grads) = run()?;
        // `.ci/run` compares them with and without the feature `parallel`.
        let mut hasher = DefaultHasher::new();
        let numbers = [&out, &grads.query, &grads.key, &grads.value].into_iter().flatten();
        numbers.for_each(|x| x.to_bits().hash(&mut hasher));
        println!("bits {name} {:016x}", hasher.finish());
        for threads in [1, 2, 3] {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert!(
                pool.install(run)? == (out.clone(), grads.clone()),
                "{name}, {threads} threads"
            );
        }
        for segment in 0..segments.len() {
            let (queries, keys) = (segments.queries(segment), segments.keys(segment));
            let pairs = s![segments.pairs(segment), ..];
            let rows = |array: &Array2<f64>, rows: &std::ops::Range<usize>| {
                array.slice(s![rows.clone(), ..]).to_owned()
            };
            let [q, k, v] = [rows(&q, &queries), rows(&k, &keys), rows(&v, &keys)];
            let alone = Inputs::dense(q.view(), k.view(), v.view())?
                .with_grouped_heads(4, 2)?
                .with_causal_alignment(Causal::BottomRight)
                .with_dropout(dropout.of_segment(segment))?
                .with_bias(bias.slice(pairs))?;
            if name == "local_global" && queries.is_empty() && keys.is_empty() {
                continue; // there is no position 0
            }
            let (expected, saved) = attention.forward_train(&alone)?;
            assert_eq!(rows(&out, &queries), expected, "{name}, segment {segment}");
            let grad = rows(&grad, &queries);
            let expected = attention.backward(&alone, &saved, grad.view())?;
            assert_eq!(rows(&grads.query, &queries), expected.query, "{name}, segment {segment}");
            assert_eq!(rows(&grads.key, &keys), expected.key, "{name}, segment {segment}");
            assert_eq!(rows(&grads.value, &keys), expected.value, "{name}, segment {segment}");
        }
    }
    Ok(())
}

#[test]
fn normalizers_and_shared_biases_are_those_of_the_graph() -> Result<()> {
    let segments = Segments::from_query_key_lengths(&[3, 0, 9, 1], &[5, 2, 4, 0])?;
    let [q, k, v] = [(13, 4, 1), (11, 4, 2), (11, 2, 3)]
        .map(|(rows, columns, seed)| matrix(rows, columns, seed));
    let edges = (0..segments.len()).flat_map(|segment| {
        let keys = segments.keys(segment);
        segments.queries(segment).flat_map(move |query| keys.clone().map(move |key| (query, key)))
    });
    let graph = Graph::from_edges(13, 11, edges)?;
    let packed = Inputs::packed(q.view(), k.view(), v.view(), &segments)?.with_heads(2)?;
    let sparse = Inputs::graph(q.view(), k.view(), v.view(), &graph)?.with_heads(2)?;
    for (heads, queries, keys) in [(2, 13, 11), (1, 13, 11), (2, 1, 11), (2, 13, 1), (2, 1, 1)] {
        let bias = Array3::from_shape_fn((heads, queries, keys), |(h, i, j)| {
            ((h * 31 + i * 7 + j * 3) as f64).sin()
        });
        let (packed, sparse) = (packed.with_bias(bias.view())?, sparse.with_bias(bias.view())?);
        let (a, b) =
            (Flash::new().forward_partial(&packed)?, Flash::new().forward_partial(&sparse)?);
        common::close::assert_close("out", 1e-14, &a.out(), &b.out());
        let finite = |x: f64| if x.is_finite() { x } else { -1e3 };
        let [a, b] = [a, b].map(|partial| partial.log_sum_exp().mapv(finite));
        common::close::assert_close("log_sum_exp", 1e-13, &a, &b);

        let grad = matrix(13, 2, 5);
        let grads = |inputs: &Inputs<'_, f64>| -> Result<_> {
            let (_, saved) = Flash::new().forward_train(inputs)?;
            Ok(Flash::new().backward(inputs, &saved, grad.view())?.bias.unwrap())
        };
        let (a, b) = (grads(&packed)?, grads(&sparse)?);
        assert_eq!(a.shape(), [heads, queries, keys]);
        common::close::assert_close("grads.bias", 1e-13, &a, &b);
    }
    Ok(())
}

#[test]
fn blocks_of_a_graph_have_diagonals_of_their_own() -> Result<()> {
    let complete = |queries: usize, keys: usize| {
        let edges = (0..queries).flat_map(|query| (0..keys).map(move |key| (query, key)));
        Graph::from_edges(queries, keys, edges)
    };
    let (a, b) = (complete(2, 5)?, complete(4, 3)?);
    let graph = Graph::block_diagonal(&[&a, &b])?;
    let segments = Segments::from_query_key_lengths(&[2, 4], &[5, 3])?;
    assert_eq!(graph.blocks(), Some(&segments));
    let (q, k) = (matrix(6, 3, 1), matrix(8, 3, 2));
    let sparse = Inputs::graph(q.view(), k.view(), k.view(), &graph)?;
    let packed = Inputs::packed(q.view(), k.view(), k.view(), &segments)?;
    for alignment in [Causal::TopLeft, Causal::BottomRight, Causal::Offset(1)] {
        let [sparse, packed] =
            [sparse, packed].map(|inputs| inputs.with_causal_alignment(alignment));
        let out = Flash::new().forward(&sparse)?;
        common::close::assert_close("out", 1e-14, &out, &Flash::new().forward(&packed)?);
        // Some of the queries keep their places in their blocks.
        for inputs in [sparse, packed] {
            let some = inputs.select_queries(&[1, 3, 5])?;
            let some = Flash::new().forward(&some.inputs())?;
            common::close::assert_close("some", 1e-14, &some, &out.select(Axis(0), &[1, 3, 5]));
        }
    }
    let window = LocalGlobal::sliding_window(Window::new(1).globals(&[2]), Flash::new())?;
    let out = window.forward(&sparse)?;
    common::close::assert_close("window", 1e-14, &out, &window.forward(&packed)?);
    Ok(())
}

#[test]
fn latent_neighbours_are_found_in_the_segment() -> Result<()> {
    let segments = Segments::from_lengths(&[4, 5])?;
    let x = matrix(9, 3, 1);
    let of = |x: ArrayView2<'_, f64>, segments: Option<&Segments>| -> Result<Array2<f64>> {
        let config = DualSpaceConfig::new(Fusion::Gated, 3);
        let dual = config.init(Flash::new(), Flash::new(), Flash::new(), &mut rng(2))?;
        let dual = dual.with_search(LatentSearch::new(2, Metric::Cosine));
        match segments {
            Some(segments) => dual.forward(&Inputs::packed(x, x, x, segments)?),
            None => dual.forward(&Inputs::dense(x, x, x)?),
        }
    };
    let out = of(x.view(), Some(&segments))?;
    for segment in 0..2 {
        let rows = s![segments.queries(segment), ..];
        let alone = of(x.slice(rows), None)?;
        common::close::assert_close("out", 1e-14, &out.slice(rows).to_owned(), &alone);
    }
    Ok(())
}

#[test]
fn sizes_that_do_not_fit_are_errors() -> Result<()> {
    let segments = Segments::from_lengths(&[1, 2])?;
    let (x, y) = (Array2::<f32>::zeros((3, 2)), Array2::zeros((4, 2)));
    let error = Inputs::packed(x.view(), y.view(), y.view(), &segments).unwrap_err();
    assert_eq!(error, shape("segments", &[3, 4], &[3, 3]));
    let inputs = Inputs::packed(x.view(), x.view(), x.view(), &segments)?;
    let error = inputs.with_bias(Array2::zeros((3, 3)).view()).unwrap_err();
    assert_eq!(error, shape("bias", &[5, 1], &[3, 3]));
    let (_, saved) = Flash::new().forward_train(&inputs)?;
    let poincare = PoincareConfig::new().init::<f32>()?;
    assert!(matches!(
        poincare.backward(&inputs, &saved, x.view()),
        Err(Error::SavedMismatch { .. })
    ));
    let one = Segments::from_lengths(&[3])?;
    let (_, saved) =
        poincare.forward_train(&Inputs::packed(x.view(), x.view(), x.view(), &one)?)?;
    let error = poincare.backward(&inputs, &saved, x.view()).unwrap_err();
    assert_eq!(error, shape("saved segments", &[2], &[1]));
    Ok(())
}

fn shape(what: &'static str, expected: &[usize], actual: &[usize]) -> Error {
    Error::Shape { what: what.into(), expected: expected.to_vec(), actual: actual.to_vec() }
}
