//! Decoding with a `KeyValueCache`: it equals one call over all rows, for every mechanism.

mod common;

use common::close::{assert_close, assert_close_in_size};
use common::random::{matrix, rng};
use common::{mechanisms, refused};
use graph_attention::ndarray::{Array2, ArrayView2, Axis, array, concatenate, s};
use graph_attention::{
    Attention, Causal, Flash, Float, Gradients, Graph, GraphRopeConfig, Inputs, KeyValueCache,
    LocalGlobal, MoeConfig, MultiHead, MultiHeadConfig, Params, Result, ScaledDotProduct, Segments,
    StackConfig, TransformerLayerConfig, graph_rope::Layout, local_global::Window,
};
use std::ops::Range;

/// Rows of a sequence with their positions.
struct Sequence<F> {
    x: Array2<F>,
    at: Array2<F>,
}

impl<F: Float> Sequence<F> {
    fn new(len: usize, columns: usize, seed: u64) -> Self {
        let x = matrix(len, columns, seed).mapv(F::from_f64);
        let at = Array2::from_shape_fn((len, 1), |(row, _)| F::from_f64(row as f64 * 0.5));
        Self { x, at }
    }

    fn inputs(&self, rows: Range<usize>) -> Inputs<'_, F> {
        let (x, at) = (self.x.slice(s![rows.clone(), ..]), self.at.slice(s![rows, ..]));
        Inputs::dense(x, x, x).unwrap().with_positions(at, at).unwrap().with_causal()
    }

    /// Decodes all rows in chunks of these lengths.
    fn decode(&self, attention: &dyn Attention<F>, chunks: &[usize]) -> Result<Array2<F>> {
        self.decode_with(attention, &mut [KeyValueCache::new()], chunks)
    }

    /// Decodes with the caches of all layers.
    fn decode_with(
        &self,
        attention: &dyn Attention<F>,
        cache: &mut [KeyValueCache<F>],
        chunks: &[usize],
    ) -> Result<Array2<F>> {
        let (mut outs, mut start) = (Vec::new(), 0);
        for &len in chunks {
            outs.push(attention.decode(&self.inputs(start..start + len), cache)?);
            start += len;
            assert!(cache.iter().all(|cache| cache.len() == start));
        }
        assert_eq!(start, self.x.nrows());
        let outs: Vec<ArrayView2<'_, F>> = outs.iter().map(|out| out.view()).collect();
        Ok(concatenate(Axis(0), &outs).unwrap())
    }
}

fn layer<F: Float, A: Attention<F>>(inner: A) -> MultiHead<F, A> {
    let mut layer = MultiHeadConfig::new(24, 6).kv_heads(2).init(inner, &mut rng(5)).unwrap();
    // They are zeros at first.
    layer.visit_params_mut(&mut |name, mut param| {
        if name.ends_with("bias") {
            param.iter_mut().zip(1..).for_each(|(bias, at)| *bias = F::from_f64(0.01 * at as f64));
        }
    });
    layer
}

fn rope<F: Float>() -> impl Attention<F> {
    GraphRopeConfig::new(4, Layout::Half).init(Flash::new()).unwrap()
}

fn layers<F: Float>() -> Vec<Box<dyn Attention<F>>> {
    let experts =
        || -> Vec<Box<dyn Attention<F>>> { vec![Box::new(rope()), Box::new(Flash::new())] };
    let twice = GraphRopeConfig::new(4, Layout::Interleaved).init(rope()).unwrap();
    let moe = MoeConfig::new(24, 1).init(experts_of_layers(), &mut rng(6)).unwrap();
    let of_heads = MoeConfig::new(4, 1).init(experts(), &mut rng(6)).unwrap();
    let window = Window::sides(4, 1).globals(&[0, 1]);
    let window = LocalGlobal::sliding_window(window, Flash::new()).unwrap();
    let gaps = LocalGlobal::sliding_window(Window::new(2).dilation(3), Flash::new()).unwrap();
    let nested = MultiHeadConfig::new(4, 2).init(Flash::new(), &mut rng(7)).unwrap();
    let nested = MultiHeadConfig::new(24, 1).head_dim(4).init(nested, &mut rng(8)).unwrap();
    let of_heads = MultiHeadConfig::new(24, 1).head_dim(4).init(of_heads, &mut rng(9)).unwrap();
    vec![
        Box::new(layer(Flash::new())),
        Box::new(layer(ScaledDotProduct::new())),
        Box::new(layer(rope())),
        Box::new(layer(twice)),
        Box::new(layer(window)),
        Box::new(layer(gaps)),
        Box::new(nested),
        // Rotates cached keys again and again, inside its experts.
        Box::new(moe),
        Box::new(of_heads),
    ]
}

fn experts_of_layers<F: Float>() -> Vec<Box<dyn Attention<F>>> {
    vec![Box::new(layer(rope())), Box::new(layer(Flash::new()))]
}

fn tolerance<F: Float>() -> f64 {
    200.0 * F::epsilon().as_f64()
}

fn layers_decode_what_they_compute_at_once<F: Float>() {
    let sequence = Sequence::<F>::new(23, 24, 1);
    for layer in layers() {
        let at_once = layer.forward(&sequence.inputs(0..23)).unwrap();
        for chunks in [&[1; 23][..], &[23], &[10, 1, 1, 1, 7, 3], &[3, 0, 12, 8]] {
            let out = sequence.decode(&*layer, chunks).unwrap();
            let what = format_args!("{layer:?}, {chunks:?}");
            assert_close_in_size(what, tolerance::<F>(), 0.1, &out, &at_once);
        }
    }
}

#[test]
fn layers_decode_what_they_compute_at_once_in_either_precision() {
    layers_decode_what_they_compute_at_once::<f32>();
    layers_decode_what_they_compute_at_once::<f64>();
}

#[test]
fn a_stack_has_caches_for_each_layer() -> Result<()> {
    let sequence = Sequence::<f64>::new(23, 24, 1);
    let rng = &mut rng(11);
    let layers = [false, true, true].map(|norm_first| {
        let config = TransformerLayerConfig::new(24, 32).norm_first(norm_first);
        config.init(layer(rope()), rng).unwrap()
    });
    let stack = StackConfig::new().init(Vec::from(layers))?;
    let at_once = stack.forward(&sequence.inputs(0..23))?;
    for chunks in [&[1; 23][..], &[10, 1, 5, 7]] {
        let mut caches = [(); 3].map(|()| KeyValueCache::new());
        let out = sequence.decode_with(&stack, &mut caches, chunks)?;
        assert_close_in_size(format_args!("{chunks:?}"), 1e-13, 0.1, &out, &at_once);
    }
    // Two sequences: the caches of the first layer come first.
    let (first, second) = (Sequence::<f64>::new(5, 24, 3), Sequence::<f64>::new(3, 24, 4));
    let x = concatenate(Axis(0), &[first.x.view(), second.x.view()]).unwrap();
    let at = concatenate(Axis(0), &[first.at.view(), second.at.view()]).unwrap();
    let segments = Segments::from_lengths(&[5, 3])?;
    let inputs = Inputs::packed(x.view(), x.view(), x.view(), &segments)?
        .with_positions(at.view(), at.view())?
        .with_causal();
    let mut caches = [(); 6].map(|()| KeyValueCache::new());
    let out = stack.decode(&inputs, &mut caches)?;
    assert_eq!(caches.each_ref().map(KeyValueCache::len), [5, 3, 5, 3, 5, 3]);
    let expected = stack.forward(&inputs)?;
    assert_close_in_size("packed", 1e-13, 0.1, &out, &expected);

    refused(stack.decode(&sequence.inputs(0..1), &mut caches), "Shape | caches | [3] | [6]");
    // The second layer refuses its cache, and the first one forgets what it appended.
    let mut caches = [(); 3].map(|()| KeyValueCache::new());
    stack.decode(&sequence.inputs(0..2), &mut caches)?;
    let narrow = array![[0.5]];
    caches[1] = KeyValueCache::new();
    caches[1].append_at(narrow.view(), narrow.view(), narrow.view())?;
    let before = caches.clone();
    refused(stack.decode(&sequence.inputs(2..3), &mut caches), "Shape | layers.1");
    assert_eq!(caches, before);
    let cross = StackConfig::new().cross_attention(true).init(vec![layer(Flash::new())])?;
    refused(
        cross.decode(&sequence.inputs(0..1), &mut caches[..1]),
        "InvalidArgument | cross_attention",
    );
    Ok(())
}

#[test]
fn every_mechanism_decodes_what_it_computes_at_once_or_says_what_it_lacks() {
    let mut sequence = Sequence::<f64>::new(17, 4, 2);
    sequence.x *= 0.1; // within the Poincaré ball
    let mut decoded = 0;
    for attention in mechanisms::<f64>() {
        let result = sequence.decode(&*attention, &[9, 1, 1, 4, 2]);
        match attention.name() {
            // They read data of pairs.
            "edge_gat" => refused(result, "MissingInput | edge features"),
            "edge_rope" => refused(result, "MissingInput | distances"),
            "dual_space" => refused(result, "MissingInput | latent"),
            "stack" => refused(result, "InvalidArgument | cross_attention"),
            name => {
                let at_once = attention.forward(&sequence.inputs(0..17)).unwrap();
                assert_close_in_size(name, 1e-12, 0.01, &result.unwrap(), &at_once);
                decoded += 1;
            }
        }
    }
    assert!(decoded >= 8);
}

#[test]
fn the_same_path_gives_the_same_bits() {
    // Fewer than 8 queries go row by row, in one call as in several.
    let sequence = Sequence::<f32>::new(7, 24, 3);
    for layer in [&layer(Flash::new()) as &dyn Attention<f32>, &layer(rope())] {
        let at_once = layer.forward(&sequence.inputs(0..7)).unwrap();
        assert_eq!(sequence.decode(layer, &[1; 7]).unwrap(), at_once);
        assert_eq!(sequence.decode(layer, &[2, 4, 1]).unwrap(), at_once);
    }
}

#[test]
fn without_a_causal_pattern_queries_see_all_rows() -> Result<()> {
    // Cross-attention: the keys of the source first, then queries without keys of their own.
    let (source, target) = (Sequence::<f64>::new(12, 24, 4), Sequence::<f64>::new(5, 24, 5));
    let layer = layer(Flash::new());
    let mut cache = [KeyValueCache::new()];
    let none = target.x.slice(s![..0, ..]);
    let out = layer.decode(&Inputs::dense(none, source.x.view(), source.x.view())?, &mut cache)?;
    assert_eq!(out.dim(), (0, 24));
    let out = layer.decode(&Inputs::dense(target.x.view(), none, none)?, &mut cache)?;
    let expected =
        layer.forward(&Inputs::dense(target.x.view(), source.x.view(), source.x.view())?)?;
    assert_close("cross", 1e-13, &out, &expected);

    // Other diagonals are those of the last rows.
    let all = Sequence::<f64>::new(12, 24, 6);
    let x = all.x.view();
    for (new, whole) in [
        (Causal::BottomRight, Causal::BottomRight),
        (Causal::TopLeft, Causal::Offset(8)),
        (Causal::Offset(1), Causal::Offset(9)),
    ] {
        let mut cache = [KeyValueCache::new()];
        let first = x.slice(s![..8, ..]);
        layer.decode(&Inputs::dense(first, first, first)?.with_causal(), &mut cache)?;
        let (queries, keys) = (x.slice(s![9..12, ..]), x.slice(s![8..12, ..]));
        let inputs = Inputs::dense(queries, keys, keys)?.with_causal_alignment(new);
        let out = layer.decode(&inputs, &mut cache)?;
        let inputs = Inputs::dense(queries, x, x)?.with_causal_alignment(whole);
        assert_close(format_args!("{new:?}"), 1e-13, &out, &layer.forward(&inputs)?);
    }
    Ok(())
}

#[test]
fn a_batch_decodes_each_sequence_as_if_alone() -> Result<()> {
    let lens = [0, 5, 40, 1];
    let sequences: Vec<_> = (0..4).map(|n| Sequence::<f64>::new(45, 24, 10 + n as u64)).collect();
    for layer in layers::<f64>() {
        let mut caches: Vec<KeyValueCache<f64>> = vec![KeyValueCache::new(); 4];
        let mut alone = caches.clone();
        for (n, sequence) in sequences.iter().enumerate() {
            for caches in [&mut caches, &mut alone] {
                layer.decode(&sequence.inputs(0..lens[n]), &mut caches[n..n + 1])?;
            }
        }
        // In each step another number of new rows.
        let mut done = lens;
        for new in [[1, 1, 1, 1], [3, 0, 1, 2]] {
            let segments = Segments::from_lengths(&new)?;
            let rows = |of: fn(&Sequence<f64>) -> &Array2<f64>| {
                let parts =
                    sequences.iter().zip(done).zip(new).map(|((sequence, done), new)| {
                        of(sequence).slice(s![done..done + new, ..])
                    });
                concatenate(Axis(0), &parts.collect::<Vec<_>>()).unwrap()
            };
            let (x, at) = (rows(|sequence| &sequence.x), rows(|sequence| &sequence.at));
            let inputs = Inputs::packed(x.view(), x.view(), x.view(), &segments)?;
            let inputs = inputs.with_positions(at.view(), at.view())?.with_causal();
            let out = layer.decode(&inputs, &mut caches)?;
            for (n, sequence) in sequences.iter().enumerate() {
                let inputs = sequence.inputs(done[n]..done[n] + new[n]);
                let expected = layer.decode(&inputs, &mut alone[n..n + 1])?;
                let out = out.slice(s![segments.queries(n), ..]).to_owned();
                assert_close(format_args!("{layer:?}, {n}"), 1e-13, &out, &expected);
                assert_eq!(caches[n].len(), alone[n].len());
                done[n] += new[n];
            }
        }
    }
    Ok(())
}

#[test]
fn forgotten_rows_are_as_if_never_seen() -> Result<()> {
    let sequence = Sequence::<f64>::new(30, 24, 7);
    let layer = layer(rope());
    let x = |rows: &[usize]| {
        let [x, at] = [&sequence.x, &sequence.at].map(|array| array.select(Axis(0), rows));
        Sequence { x, at }
    };
    let decode = |cache: &mut KeyValueCache<f64>, rows: Range<usize>| {
        layer.decode(&sequence.inputs(rows), std::slice::from_mut(cache))
    };
    // Rejected drafts.
    let mut cache = KeyValueCache::new();
    decode(&mut cache, 0..20)?;
    cache.truncate(12);
    let out = decode(&mut cache, 12..13)?;
    let expected = layer.forward(&sequence.inputs(0..13))?;
    assert_close("drafts", 1e-13, &out, &expected.slice(s![12.., ..]).to_owned());

    // Sinks and a window; the positions stay.
    let rows: Vec<usize> = (0..2).chain(14..25).collect();
    let kept = x(&rows);
    let mut cache = KeyValueCache::new();
    for row in 0..25 {
        let len = cache.len();
        if len == 12 {
            cache.remove(2..3)?;
        }
        let out = decode(&mut cache, row..row + 1)?;
        if row == 24 {
            let expected = layer.forward(&kept.inputs(0..rows.len()))?;
            let expected = expected.slice(s![rows.len() - 1.., ..]).to_owned();
            assert_eq!(cache.len(), 12);
            // Row 13 was forgotten before the last.
            assert_eq!(cache.positions().unwrap()[[2, 0]], 0.5 * 15.0);
            let mut without = KeyValueCache::new();
            let last = x(&(0..2).chain(15..25).collect::<Vec<_>>());
            let again = layer.decode(&last.inputs(0..12), std::slice::from_mut(&mut without))?;
            assert_close("sinks", 1e-13, &out, &again.slice(s![11.., ..]).to_owned());
            assert!((out - expected).iter().any(|difference| difference.abs() > 1e-6));
        }
    }
    cache.keep_last(4);
    assert_eq!(cache.positions().unwrap(), array![[10.5], [11.0], [11.5], [12.0]]);
    cache.keep_last(100);
    cache.truncate(100);
    assert_eq!(cache.len(), 4);
    refused(cache.remove(3..5), "InvalidArgument | rows | 0..4 | 3..5");
    #[expect(clippy::reversed_empty_ranges, reason = "a mistake of the caller")]
    refused(cache.remove(3..2), "InvalidArgument | rows | 3..2");
    cache.keep_last(0);
    assert!(cache.is_empty() && cache.key().dim() == (0, 8));
    Ok(())
}

#[test]
fn a_window_that_moves_keeps_its_rows() -> Result<()> {
    // The memory of rows that were removed is used again.
    let rows = matrix(200, 3, 1);
    let mut cache = KeyValueCache::new();
    for row in 0..200 {
        let new = rows.slice(s![row..row + 1, ..]);
        cache.append_at(new, new.slice(s![.., 1..]), new.slice(s![.., ..1]))?;
        cache.keep_last(5);
        let kept = rows.slice(s![(row + 1usize).saturating_sub(5)..row + 1, ..]);
        assert_eq!(cache.key(), kept);
        assert_eq!(cache.value(), kept.slice(s![.., 1..]));
        assert_eq!(cache.positions().unwrap(), kept.slice(s![.., ..1]));
    }
    Ok(())
}

#[test]
fn steps_of_your_own_are_those_of_decode() -> Result<()> {
    let sequence = Sequence::<f64>::new(9, 24, 8);
    let rope = GraphRopeConfig::new(4, Layout::Half).init(Flash::new())?;
    let layer = layer(rope.clone());
    let inputs = sequence.inputs(0..9);
    let [query, key, value] = layer.project(&inputs)?;
    assert_eq!([query.dim(), key.dim(), value.dim()], [(9, 24), (9, 8), (9, 8)]);
    let [query, key] = [query, key].map(|x| rope.rotate(x.view(), sequence.at.view()));
    let (query, key) = (query?, key?);
    let mut cache = KeyValueCache::new();
    cache.append_at(key.view(), value.view(), sequence.at.view())?;
    let inputs = Inputs::dense(query.view(), cache.key(), cache.value())?.with_causal();
    let context = Flash::new().forward(&inputs.with_grouped_heads(6, 2)?)?;
    let out = layer.project_output(context.view())?;

    let mut decoded = [KeyValueCache::new()];
    assert_eq!(layer.decode(&sequence.inputs(0..9), &mut decoded)?, out);
    assert_eq!(decoded[0], cache);

    let wrong = Array2::<f64>::zeros((9, 7));
    refused(layer.project_output(wrong.view()), "Shape | context | [9, 24] | [9, 7]");
    refused(rope.rotate(wrong.view(), sequence.at.view()), "Shape | x | [9, 4] | [9, 7]");
    refused(rope.rotate(key.view(), wrong.view()), "Shape | positions | [9, 1] | [9, 7]");
    Ok(())
}

#[test]
fn a_failed_step_leaves_the_caches_as_they_were() -> Result<()> {
    let sequence = Sequence::<f64>::new(10, 24, 9);
    let layer = layer(rope());
    let mut caches = vec![KeyValueCache::new(); 2];
    for cache in &mut caches {
        layer.decode(&sequence.inputs(0..6), std::slice::from_mut(cache))?;
    }
    let before = caches.clone();
    let inputs = sequence.inputs(6..10);
    let pairs = Array2::<f64>::zeros((4, 4));
    let mask = pairs.mapv(|x| x == 0.0);
    let graph = Graph::from_edges(4, 4, [(0, 0)])?;
    let x = sequence.x.slice(s![6..10, ..]);
    let at = sequence.at.slice(s![6..10, ..]);
    let of_graph = Inputs::graph(x, x, x, &graph)?.with_positions(at, at)?;
    let selected = inputs.select_queries(&[1, 2])?;
    for (inputs, expected) in [
        (inputs.with_mask(mask.view())?, "Unsupported | mask"),
        (inputs.with_bias(pairs.view())?, "Unsupported | bias"),
        (inputs, "Shape | caches | [1] | [2]"),
        (of_graph, "InvalidArgument | dense or packed | a graph"),
        (selected.inputs(), "InvalidArgument | all queries | selected"),
        (Inputs::dense(x, x, x)?, "MissingInput | positions"),
    ] {
        refused(layer.decode(&inputs, &mut caches), expected);
        assert_eq!(caches, before);
    }
    // A mechanism that fails after the rows were appended, in one of the sequences.
    let segments = Segments::from_lengths(&[2, 2])?;
    let wide = Array2::<f64>::zeros((6, 5));
    caches[1] = KeyValueCache::new();
    caches[1].append(wide.view(), wide.view())?;
    let before = caches.clone();
    let inputs = Inputs::packed(x, x, x, &segments)?.with_positions(at, at)?.with_causal();
    refused(layer.decode(&inputs, &mut caches), "Shape | key | [2, 5] | [2, 8]");
    assert_eq!(caches, before);
    let rows = Array2::<f64>::zeros((3, 6));
    let inputs = Inputs::dense(rows.view(), rows.view(), rows.view())?;
    let narrow = Inputs::dense(wide.slice(s![..3, ..]), rows.view(), rows.view())?;
    let mut cache = [KeyValueCache::new()];
    refused(Flash::new().decode(&narrow, &mut cache), "Shape | key | [3, 5] | [3, 6]");
    assert!(cache[0].is_empty());
    Flash::new().decode(&inputs, &mut cache)?;

    // Without a causal pattern the place of a new query is unknown.
    let window = LocalGlobal::sliding_window(Window::new(2), Flash::new())?;
    refused(window.decode(&inputs, &mut cache), "InvalidArgument | inputs | causal");
    window.decode(&inputs.with_causal(), &mut cache)?;
    Ok(())
}

#[test]
fn rows_that_do_not_fit_are_refused() -> Result<()> {
    let [three, four] = [3, 4].map(|columns| Array2::<f32>::ones((2, columns)));
    let mut cache = KeyValueCache::new();
    let one = three.slice(s![..1, ..]);
    refused(cache.append(three.view(), one), "Shape | value | [2, 3] | [1, 3]");
    cache.append(three.view(), four.view())?;
    refused(cache.append(four.view(), four.view()), "Shape | key | [2, 3] | [2, 4]");
    refused(cache.append(three.view(), three.view()), "Shape | value | [2, 4] | [2, 3]");
    let at = Array2::<f32>::ones((2, 1));
    let result = cache.append_at(three.view(), four.view(), at.view());
    refused(result, "Shape | key positions | [2, 0] | [2, 1]");
    assert_eq!((cache.len(), cache.positions()), (2, None));
    // Rows in any memory layout.
    cache.append(four.slice(s![..;-1, ..;-1]).slice(s![.., 1..]), four.t().t())?;
    assert_eq!(cache.key(), Array2::<f32>::ones((4, 3)));
    Ok(())
}

#[test]
fn keys_that_no_query_sees_are_not_read() -> Result<()> {
    // Rows of a preallocated cache past the last query, and before a window.
    let (n, len) = (60, 40);
    for num_queries in [1, 3, 8, 20] {
        let [query, mut key, mut value, grad_out] =
            [num_queries, n, n, num_queries].map(|rows| matrix(rows, 8, rows as u64));
        let offset = len - num_queries;
        let window = LocalGlobal::sliding_window(Window::sides(5, 2), Flash::new())?;
        let mechanisms: [(&dyn Attention<f64>, usize); 2] =
            [(&Flash::new(), 0), (&window, offset - 5)];
        for (attention, first) in mechanisms {
            let seen = s![first..len, ..];
            let (seen_key, seen_value) = (key.slice(seen).to_owned(), value.slice(seen).to_owned());
            let alone = Inputs::dense(query.view(), seen_key.view(), seen_value.view())?
                .with_heads(2)?
                .with_causal_alignment(Causal::Offset(offset - first));
            let (expected, saved) = attention.forward_train(&alone)?;
            let of_alone = attention.backward(&alone, &saved, grad_out.view())?;
            for hidden in [0..first, len..n] {
                key.slice_mut(s![hidden.clone(), ..]).fill(f64::NAN);
                value.slice_mut(s![hidden, ..]).fill(f64::NAN);
            }
            let inputs = Inputs::dense(query.view(), key.view(), value.view())?
                .with_heads(2)?
                .with_causal_alignment(Causal::Offset(offset));
            let (out, saved) = attention.forward_train(&inputs)?;
            assert_eq!(out, expected, "{attention:?}, {num_queries}");
            assert_eq!(attention.forward(&inputs)?, expected);
            let grads: Gradients<f64> = attention.backward(&inputs, &saved, grad_out.view())?;
            assert_eq!(grads.query, of_alone.query);
            for (grad, of_alone) in [(&grads.key, &of_alone.key), (&grads.value, &of_alone.value)] {
                assert_eq!(grad.slice(seen), of_alone);
                assert_eq!(grad.sum(), grad.slice(seen).sum()); // zeros elsewhere, not NaN
            }
            key.slice_mut(seen).assign(&seen_key);
            value.slice_mut(seen).assign(&seen_value);
            key.mapv_inplace(|x| if x.is_nan() { 0.5 } else { x });
            value.mapv_inplace(|x| if x.is_nan() { 0.5 } else { x });
        }
    }
    Ok(())
}
