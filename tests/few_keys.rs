//! Few queries over few of many keys, by a causal pattern or a graph: the same as over these keys alone, and the
//! others are not read.

mod common;

use common::close::assert_close_in_size;
use common::random::matrix;
use common::{mechanisms, refused};
use graph_attention::ndarray::{Array1, Array2, ArrayD, Axis, s};
use graph_attention::{
    Attention, Causal, Dropout, Gradients, Graph, Inputs, Poincare, PoincareConfig, Result,
};

/// Data of pairs for any mechanism.
struct Pairs {
    features: Array2<f64>,
    distances: Array1<f64>,
    bias: Array2<f64>,
    dropout: Dropout,
}

impl Pairs {
    fn new(pairs: usize) -> Self {
        Self {
            features: matrix(pairs, 2, 5),
            distances: matrix(pairs, 1, 6).remove_axis(Axis(1)),
            bias: matrix(pairs, 1, 7),
            dropout: Dropout { probability: 0.3, seed: 8 },
        }
    }

    fn add_to<'a>(
        &'a self,
        inputs: Inputs<'a, f64>,
        attention: &dyn Attention<f64>,
    ) -> Result<Inputs<'a, f64>> {
        let inputs = inputs.with_distances(self.distances.view())?;
        let inputs = match attention.name() {
            "edge_gat" => inputs.with_edge_features(self.features.view())?,
            _ => inputs.with_bias(self.bias.view())?,
        };
        inputs.with_dropout(self.dropout)
    }
}

/// Those that compute something of each key by themselves.
fn of_keys() -> Vec<Box<dyn Attention<f64>>> {
    let names = ["flash", "edge_gat", "poincare", "performer", "edge_rope"];
    let all: Vec<_> =
        mechanisms::<f64>().into_iter().filter(|it| names.contains(&it.name())).collect();
    assert_eq!(all.len(), names.len());
    all
}

fn run(
    attention: &dyn Attention<f64>,
    inputs: &Inputs<'_, f64>,
    grad_out: &Array2<f64>,
) -> Result<(Array2<f64>, Gradients<f64>)> {
    let (out, saved) = attention.forward_train(inputs)?;
    assert_eq!(attention.forward(inputs)?, out);
    Ok((out, attention.backward(inputs, &saved, grad_out.view())?))
}

#[test]
fn few_edges_among_many_keys_are_as_among_few() -> Result<()> {
    let (queries, n) = (3, 90);
    // Not in the order of the rows, and with a key that two queries see.
    let edges = [(2, 80), (0, 41), (2, 3), (0, 3), (1, 77), (2, 42), (0, 89), (1, 41)];
    let keys = [3, 41, 42, 77, 80, 89];
    let place = |key: usize| keys.binary_search(&key).unwrap();
    let graph = Graph::from_edges(queries, n, edges)?;
    let alone = Graph::from_edges(queries, 6, edges.map(|(query, key)| (query, place(key))))?;
    let query = matrix(queries, 4, 1) * 0.1;
    let [mut key, mut value] = [2, 3].map(|seed| matrix(n, 4, seed) * 0.1);
    for row in (0..n).filter(|row| !keys.contains(row)) {
        key.row_mut(row).fill(f64::NAN);
        value.row_mut(row).fill(f64::INFINITY);
    }
    let [few_keys, few_values] = [&key, &value].map(|rows| rows.select(Axis(0), &keys));
    let pairs = Pairs::new(edges.len());
    for attention in of_keys() {
        let name = attention.name();
        // Graph attention reads its keys as values.
        let (all, few_values) = match name {
            "edge_gat" => (&key, &few_keys),
            _ => (&value, &few_values),
        };
        let inputs = Inputs::graph(query.view(), key.view(), all.view(), &graph)?;
        let inputs = pairs.add_to(inputs, &*attention)?;
        let few = Inputs::graph(query.view(), few_keys.view(), few_values.view(), &alone)?;
        let few = pairs.add_to(few, &*attention)?;
        let grad_out = matrix(queries, attention.output_dim(&inputs), 9);
        let (out, grads) = run(&*attention, &inputs, &grad_out)?;
        let (expected, of_few) = run(&*attention, &few, &grad_out)?;
        let close = |what: &str, actual: ArrayD<f64>, expected: ArrayD<f64>| {
            let what = format_args!("{name}, {what}");
            assert_close_in_size(what, 1e-14, 1e-3, &actual, &expected);
        };
        close("out", out.into_dyn(), expected.into_dyn());
        close("query", grads.query.into_dyn(), of_few.query.into_dyn());
        for (what, grad, of_few) in
            [("key", &grads.key, of_few.key), ("value", &grads.value, of_few.value)]
        {
            let of_keys = grad.select(Axis(0), &keys);
            let others = (0..n).filter(|row| !keys.contains(row));
            assert!(grad.select(Axis(0), &others.collect::<Vec<_>>()).iter().all(|&it| it == 0.0));
            close(what, of_keys.into_dyn(), of_few.into_dyn());
        }
        for (what, grad, of_few) in [
            ("bias", grads.bias, of_few.bias),
            (
                "features",
                grads.edge_features.map(|it| it.into_dyn()),
                of_few.edge_features.map(|it| it.into_dyn()),
            ),
            (
                "distances",
                grads.distances.map(|it| it.into_dyn()),
                of_few.distances.map(|it| it.into_dyn()),
            ),
        ] {
            if let (Some(grad), Some(of_few)) = (grad, of_few)
                && of_few.iter().any(|&grad| grad != 0.0)
            {
                close(what, grad, of_few);
            }
        }
        for (grad, of_few) in grads.params.into_iter().zip(of_few.params) {
            close("params", grad, of_few);
        }
    }
    Ok(())
}

#[test]
fn few_keys_up_to_a_diagonal_are_as_alone() -> Result<()> {
    let n = 90;
    for queries in [1, 2, 3, 9] {
        // The last query sees 12 keys.
        let offset = 12 - queries;
        let query = matrix(queries, 4, 1) * 0.1;
        let [mut key, mut value] = [2, 3].map(|seed| matrix(n, 4, seed) * 0.1);
        key.slice_mut(s![12.., ..]).fill(f64::NAN);
        value.slice_mut(s![12.., ..]).fill(f64::NAN);
        let distances = matrix(queries, n, 6);
        let features = matrix(queries * n, 2, 5);
        let of_few = |columns: usize, rows: &Array2<f64>| {
            let rows = rows.view().into_shape_with_order((queries, n, columns)).unwrap();
            let few = rows.slice(s![.., ..12, ..]).to_owned();
            few.into_shape_with_order((queries * 12, columns)).unwrap()
        };
        let all_distances = distances.view().into_shape_with_order(queries * n).unwrap();
        let few_distances =
            of_few(1, &all_distances.insert_axis(Axis(1)).to_owned()).remove_axis(Axis(1));
        let few_features = of_few(2, &features);
        for attention in of_keys() {
            let name = attention.name();
            let values = if name == "edge_gat" { &key } else { &value };
            let inputs = Inputs::dense(query.view(), key.view(), values.view())?
                .with_causal_alignment(Causal::Offset(offset))
                .with_distances(all_distances)?;
            let few = s![..12, ..];
            let alone = Inputs::dense(query.view(), key.slice(few), values.slice(few))?
                .with_causal_alignment(Causal::Offset(offset))
                .with_distances(few_distances.view())?;
            let [inputs, alone] = match name {
                "edge_gat" => [
                    inputs.with_edge_features(features.view())?,
                    alone.with_edge_features(few_features.view())?,
                ],
                _ => [inputs, alone],
            };
            let grad_out = matrix(queries, attention.output_dim(&inputs), 9);
            let (out, grads) = run(&*attention, &inputs, &grad_out)?;
            let (expected, of_alone) = run(&*attention, &alone, &grad_out)?;
            assert_eq!(out, expected, "{name}, {queries}");
            // The first query does not see what the others do.
            let first = inputs.select_queries(&[0])?;
            let of_first = attention.forward(&first.inputs())?;
            let expected = out.slice(s![..1, ..]).to_owned();
            assert_close_in_size(format_args!("{name}, first"), 1e-13, 1e-3, &of_first, &expected);
            assert_eq!(grads.query, of_alone.query, "{name}, {queries}");
            for (grad, of_alone) in [(&grads.key, &of_alone.key), (&grads.value, &of_alone.value)] {
                assert_eq!(grad.slice(few), of_alone, "{name}, {queries}");
                assert_eq!(grad.sum(), of_alone.sum(), "{name}, {queries}"); // zeros elsewhere, not NaN
            }
            if let (Some(grad), Some(of_alone)) = (&grads.distances, &of_alone.distances) {
                let grad = of_few(1, &grad.view().insert_axis(Axis(1)).to_owned());
                assert_eq!(grad.remove_axis(Axis(1)), of_alone, "{name}, {queries}");
            }
            if let (Some(grad), Some(of_alone)) = (&grads.edge_features, &of_alone.edge_features) {
                assert_eq!(&of_few(2, grad), of_alone, "{name}, {queries}");
            }
            assert_eq!(grads.params, of_alone.params, "{name}, {queries}");
        }
    }
    Ok(())
}

#[test]
fn a_point_outside_the_ball_is_named_by_its_own_row() -> Result<()> {
    let poincare: Poincare<f64> = PoincareConfig::new().init()?;
    let graph = Graph::from_edges(1, 90, [(0, 41), (0, 7)])?;
    let query = matrix(1, 4, 1) * 0.1;
    let mut key = matrix(90, 4, 2) * 0.1;
    key.row_mut(3).fill(9.0); // no query sees it
    poincare.forward(&Inputs::graph(query.view(), key.view(), key.view(), &graph)?)?;
    key.row_mut(41).fill(9.0);
    let inputs = Inputs::graph(query.view(), key.view(), key.view(), &graph)?;
    refused(poincare.forward(&inputs), "Domain | value | row 41");
    let outside = Array2::from_elem((1, 4), 9.0);
    let inside = matrix(90, 4, 2) * 0.1;
    let inputs = Inputs::graph(outside.view(), inside.view(), inside.view(), &graph)?;
    refused(poincare.forward(&inputs), "Domain | query | row 0");
    Ok(())
}
