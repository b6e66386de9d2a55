//! Tests of what is special to `DualSpace`: two kinds of neighbours, a branch whose queries are the output
//! of another, and a fusion. The laws of every mechanism are in `conformance`.

mod common;

use common::close::{assert_close, assert_close_in_size};
use common::random::{matrix, rng};
use common::refused;
use graph_attention::ndarray::{
    Array2, ArrayD, ArrayView1, ArrayView2, Axis, Ix1, Ix2, concatenate, s,
};
use graph_attention::neighbors::{ExactIndex, Metric, Neighbor, NeighborIndex};
use graph_attention::testing::{Shapes, check_gradients};
use graph_attention::{
    Attention, Channel, Dropout, DualSpace, DualSpaceConfig, EdgeGatConfig, Error, Flash,
    Gradients, Graph, Inputs, MoeConfig, MultiHeadConfig, PoincareConfig, Result, ScaledDotProduct,
    dual_space::{Fusion, LatentSearch},
    edge_gat::Score,
    params,
};
use rand::RngExt;

/// Returns a graph with about two in seven of all pairs; query 3 has none.
fn random_graph(num_queries: usize, num_keys: usize, seed: u64) -> Graph {
    let mut rng = rng(seed);
    let pairs = (0..num_queries * num_keys).filter(|_| rng.random_range(0..7) < 2);
    let edges: Vec<_> =
        pairs.map(|pair| (pair / num_keys, pair % num_keys)).filter(|edge| edge.0 != 3).collect();
    Graph::from_edges(num_queries, num_keys, edges).unwrap()
}

fn linear(output_dim: usize, branch_dim: usize) -> DualSpaceConfig {
    DualSpaceConfig::new(Fusion::Linear { output_dim }, branch_dim)
}

fn gated(branch_dim: usize) -> DualSpaceConfig {
    DualSpaceConfig::new(Fusion::Gated, branch_dim)
}

/// Three different mechanisms without parameters.
fn plain(config: &DualSpaceConfig) -> DualSpace<f64> {
    let scaled = |scale| Flash::new().with_scale(scale).unwrap();
    config.init(scaled(0.7), scaled(-0.4), ScaledDotProduct::new(), &mut rng(5)).unwrap()
}

fn square<'a>(x: &'a Array2<f64>, graph: &'a Graph) -> Inputs<'a, f64> {
    Inputs::graph(x.view(), x.view(), x.view(), graph).unwrap()
}

fn train(
    attention: &dyn Attention<f64>,
    inputs: &Inputs<'_, f64>,
) -> (Array2<f64>, Gradients<f64>) {
    let (out, saved) = attention.forward_train(inputs).unwrap();
    let grads = attention.backward(inputs, &saved, out.view()).unwrap();
    (out, grads)
}

/// Asserts that two computations in `f64` in different order agree.
#[track_caller]
fn close(what: &str, actual: &Array2<f64>, expected: &Array2<f64>) {
    assert_close_in_size(what, 1e-13, 1.0, actual, expected);
}

/// Computes softmax attention of each query over a list of keys, for several heads side by side.
fn attend(
    query: ArrayView2<'_, f64>,
    key: ArrayView2<'_, f64>,
    value: ArrayView2<'_, f64>,
    keys: &[Vec<usize>],
    heads: usize,
    scale: f64,
) -> Array2<f64> {
    let (dim, value_dim) = (key.ncols() / heads, value.ncols() / heads);
    let mut out = Array2::zeros((query.nrows(), value.ncols()));
    for (i, keys) in keys.iter().enumerate() {
        for head in 0..heads {
            let (columns, values) = (head * dim, head * value_dim);
            let weight = |j: usize| {
                let dot: f64 = (columns..columns + dim).map(|c| query[[i, c]] * key[[j, c]]).sum();
                (scale * dot).exp()
            };
            let sum: f64 = keys.iter().map(|&j| weight(j)).sum();
            for &j in keys {
                for c in values..values + value_dim {
                    out[[i, c]] += weight(j) / sum * value[[j, c]];
                }
            }
        }
    }
    out
}

#[test]
fn outputs_are_those_of_the_equations() {
    let (n, heads, dim) = (11, 2, 3);
    let [q, k, v] = [1, 2, 3].map(|seed| matrix(n, heads * dim, seed));
    let (graph, latent) = (random_graph(n, n, 4), random_graph(n, n, 7));
    // Node 3 has no neighbours of either kind, node 5 only in the graph.
    let mut mask = Array2::from_shape_fn((n, n), |(i, j)| (i + 2 * j) % 5 != 0);
    latent.neighbors(5).iter().for_each(|&key| mask[[5, key as usize]] = false);
    let inputs = Inputs::graph(q.view(), k.view(), v.view(), &graph).unwrap();
    let inputs = inputs.with_latent(&latent).unwrap().with_mask(mask.view()).unwrap().with_causal();
    let inputs = inputs.with_heads(heads).unwrap();

    let visible = |graph: &Graph| -> Vec<Vec<usize>> {
        let sees = |i: usize, &j: &usize| j <= i && mask[[i, j]];
        let row = |i| graph.neighbors(i).iter().map(|&j| j as usize).filter(move |j| sees(i, j));
        (0..n).map(|i| row(i).collect()).collect()
    };
    let (near, alike) = (visible(&graph), visible(&latent));
    let (k, v) = (k.view(), v.view());
    let of_graph = attend(q.view(), k, v, &near, heads, 0.7);
    let of_latent = attend(q.view(), k, v, &alike, heads, -0.4);
    let cross = attend(of_graph.view(), k, v, &alike, heads, (dim as f64).sqrt().recip());
    let x = concatenate![Axis(1), of_graph, of_latent, cross];
    let fusion = |dual: &DualSpace<f64>| {
        let [weight, bias] = [0, 1].map(|at| params::state(dual)[at].1.clone());
        x.dot(&weight.into_dimensionality::<Ix2>().unwrap().t())
            + &bias.into_dimensionality::<Ix1>().unwrap()
    };

    let dual = plain(&linear(5, heads * dim));
    close("linear", &dual.forward(&inputs).unwrap(), &fusion(&dual));

    let dual = plain(&gated(heads * dim));
    let mut gates = fusion(&dual);
    for (i, mut gates) in gates.rows_mut().into_iter().enumerate() {
        let open = [!near[i].is_empty(), !alike[i].is_empty(), !alike[i].is_empty()];
        for (gate, open) in gates.iter_mut().zip(open) {
            *gate = if open { gate.exp() } else { 0.0 };
        }
        let sum = gates.sum();
        gates.mapv_inplace(|gate| if sum > 0.0 { gate / sum } else { 0.0 });
    }
    assert_eq!(gates.row(3).sum(), 0.0);
    assert_eq!(gates.row(5).to_vec(), [1.0, 0.0, 0.0]);
    assert!((0..n).any(|i| near[i].is_empty() && !alike[i].is_empty()));
    assert!((0..n).any(|i| !near[i].is_empty() && !alike[i].is_empty()));
    close("gates", &dual.gates(&inputs).unwrap(), &gates);
    let gate = |branch| gates.slice(s![.., branch..branch + 1]);
    let expected = &of_graph * &gate(0) + &of_latent * &gate(1) + &cross * &gate(2);
    close("gated", &dual.forward(&inputs).unwrap(), &expected);
}

#[test]
fn a_fusion_that_takes_one_branch_is_that_mechanism_alone() {
    let n = 13;
    let x = matrix(n, 5, 1);
    let (graph, latent) = (random_graph(n, n, 2), random_graph(n, n, 8));
    let features = matrix(graph.num_edges(), 3, 3);
    let inputs = square(&x, &graph).with_latent(&latent).unwrap();
    let inputs = inputs.with_edge_features(features.view()).unwrap();
    let bare = square(&x, &latent);
    let gat = || EdgeGatConfig::new(Score::GatV2, 5, 5, 1).edge_dim(3).init(&mut rng(4)).unwrap();
    let of_latent = || MultiHeadConfig::new(5, 1).init(Flash::new(), &mut rng(6)).unwrap();
    let (near, grads_near) = train(&gat(), &inputs);
    let (alike, grads_alike) = train(&of_latent(), &bare);
    let of_graph = Inputs::graph(near.view(), x.view(), x.view(), &latent).unwrap();
    let (cross, _) = train(&Flash::new(), &of_graph);

    for (branch, expected) in [near, alike, cross].iter().enumerate() {
        let mut dual = linear(5, 5).init(gat(), of_latent(), Flash::new(), &mut rng(9)).unwrap();
        let mut state = params::state(&dual);
        state[0].1.fill(0.0);
        state[1].1.fill(0.0);
        (0..5).for_each(|column| state[0].1[[column, 5 * branch + column]] = 1.0);
        params::load_state(&mut dual, state).unwrap();
        let (out, grads) = train(&dual, &inputs);
        close(&format!("out of branch {branch}"), &out, expected);
        let alone = match branch {
            0 => &grads_near,
            1 => &grads_alike,
            _ => continue,
        };
        close(&format!("query of branch {branch}"), &grads.query, &alone.query);
        close(&format!("key of branch {branch}"), &grads.key, &alone.key);
        close(&format!("value of branch {branch}"), &grads.value, &alone.value);
        let gradient_of = |prefix: &str| -> Vec<ArrayD<f64>> {
            let names = params::state(&dual).into_iter().map(|(name, _)| name);
            let of_branch = names.zip(&grads.params).filter(|(name, _)| name.starts_with(prefix));
            of_branch.map(|(_, grad)| grad.clone()).collect()
        };
        let [own, other] = if branch == 0 { ["graph.", "latent."] } else { ["latent.", "graph."] };
        for (grad, expected) in gradient_of(own).iter().zip(&alone.params) {
            assert_close(own, 1e-12, grad, expected);
        }
        assert_eq!(gradient_of(own).len(), alone.params.len());
        assert!(gradient_of(other).iter().all(|grad| grad.iter().all(|&grad| grad == 0.0)));
        let of_features = grads.edge_features.unwrap();
        assert_eq!(of_features.iter().any(|&grad| grad != 0.0), branch == 0);
    }
}

#[test]
fn parameters_have_names_and_are_loaded_by_them() {
    let inner = |seed| MultiHeadConfig::new(4, 2).init(Flash::new(), &mut rng(seed)).unwrap();
    for config in [linear(3, 4), gated(4)] {
        let dual = config.init(inner(1), Flash::new(), inner(2), &mut rng(3)).unwrap();
        let state = params::state::<f64>(&dual);
        let names: Vec<_> =
            state.iter().map(|(name, value)| (name.as_str(), value.len())).collect();
        let (fusion, rows) = if config == gated(4) { ("gate", 3) } else { ("fusion", 3) };
        assert_eq!(names[0], (&*format!("{fusion}.weight"), rows * 12));
        assert_eq!(names[1], (&*format!("{fusion}.bias"), rows));
        assert_eq!(names[2].0, "graph.in_proj_weight");
        assert_eq!(names[6].0, "cross.in_proj_weight");
        assert_eq!(names.len(), 10);
        let loaded = config.from_params(inner(4), Flash::new(), inner(5), state).unwrap();
        assert_eq!(params::state(&dual), params::state(&loaded));
    }
}

#[test]
fn backward_is_the_derivative_with_several_heads() {
    let heads = || Shapes::new(6, 6, 6).heads(2).reads_latent();
    check_gradients(&mut plain(&linear(5, 6)), &heads()).unwrap();
    check_gradients(&mut plain(&gated(6)), &heads()).unwrap();
    let grouped = Shapes::new(12, 6, 6).kv_heads(4, 2).reads_latent();
    check_gradients(&mut plain(&gated(12)), &grouped).unwrap();
}

/// Computes N_L as lists, by comparing all pairs.
fn nearest(
    x: &Array2<f64>,
    similarity: impl Fn(usize, usize) -> f64,
    k: usize,
    threshold: f64,
    excluded: impl Fn(usize, usize) -> bool,
) -> Vec<Vec<u32>> {
    let row = |i: usize| {
        let mut row: Vec<usize> = (0..x.nrows())
            .filter(|&j| j != i && !excluded(i, j) && similarity(i, j) >= threshold)
            .collect();
        row.sort_by(|&a, &b| similarity(i, b).total_cmp(&similarity(i, a)));
        row.into_iter().take(k).map(|j| j as u32).collect()
    };
    (0..x.nrows()).map(row).collect()
}

fn lists(graph: &Graph) -> Vec<Vec<u32>> {
    (0..graph.num_queries()).map(|query| graph.neighbors(query).to_vec()).collect()
}

#[test]
fn a_search_finds_the_nearest_but_for_those_excluded() {
    let n = 23;
    let x = matrix(n, 5, 1);
    let graph = random_graph(n, n, 2);
    let dot = |i: usize, j: usize| x.row(i).dot(&x.row(j));
    let cosine = |i: usize, j: usize| dot(i, j) / (dot(i, i) * dot(j, j)).sqrt();
    let euclidean = |i: usize, j: usize| -(&x.row(i) - &x.row(j)).mapv(|d| d * d).sum();
    let in_graph = |i: usize, j: usize| graph.neighbors(i).contains(&(j as u32));
    let dual = |search| plain(&gated(5)).with_search(search);
    let search = LatentSearch::new;
    let found = |dual: &DualSpace<f64>, inputs: &Inputs<'_, f64>| {
        lists(&dual.latent_neighbors(inputs).unwrap())
    };
    let inputs = square(&x, &graph);

    let cosines = dual(search(3, Metric::Cosine).threshold(0.4).exclude_graph(true));
    let expected = nearest(&x, cosine, 3, 0.4, in_graph);
    assert_eq!(found(&cosines, &inputs), expected);
    // Each condition makes a difference.
    assert_ne!(expected, nearest(&x, cosine, 3, f64::NEG_INFINITY, in_graph));
    assert_ne!(expected, nearest(&x, cosine, 3, 0.4, |_, _| false));
    assert_ne!(expected, nearest(&x, cosine, n, 0.4, in_graph));

    let any = f64::NEG_INFINITY;
    let dots = dual(search(4, Metric::Dot));
    assert_eq!(found(&dots, &inputs), nearest(&x, dot, 4, any, |_, _| false));
    let distances = dual(search(2, Metric::Euclidean).threshold(-6.0));
    assert_eq!(found(&distances, &inputs), nearest(&x, euclidean, 2, -6.0, |_, _| false));
    let with_self = dual(search(1, Metric::Euclidean).exclude_self(false));
    let own: Vec<Vec<u32>> = (0..n as u32).map(|node| vec![node]).collect();
    assert_eq!(found(&with_self, &inputs), own);
    // In dense inputs all pairs belong to the graph.
    let dense = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    assert!(found(&cosines, &dense).iter().all(Vec::is_empty));
    assert_eq!(found(&dots, &dense), nearest(&x, dot, 4, any, |_, _| false));

    // Hidden keys take no place among the k.
    let mask = Array2::from_shape_fn((n, n), |(i, j)| (3 * i + j) % 4 != 0);
    let masked = inputs.with_mask(mask.view()).unwrap().with_causal();
    let hidden = |i: usize, j: usize| j > i || !mask[[i, j]];
    assert_eq!(found(&dots, &masked), nearest(&x, dot, 4, any, hidden));

    // Selected queries are the nodes of their numbers in the whole inputs.
    let selected = masked.select_queries(&[2, 7, 19]).unwrap();
    let expected = nearest(&x, dot, 4, any, hidden);
    let expected: Vec<_> = [2, 7, 19].map(|query: usize| expected[query].clone()).into();
    assert_eq!(found(&dots, &selected.inputs()), expected);
}

/// A custom index, which does not know the excluded keys.
#[derive(Debug)]
struct Own(ExactIndex<'static, f64>);

impl NeighborIndex<f64> for Own {
    fn num_keys(&self) -> usize {
        self.0.num_keys()
    }
    fn dim(&self) -> usize {
        self.0.dim()
    }
    fn nearest_into(
        &self,
        query: ArrayView1<'_, f64>,
        k: usize,
        nearest: &mut Vec<Neighbor<f64>>,
    ) -> Result<()> {
        self.0.nearest_into(query, k, nearest)
    }
}

#[test]
fn what_a_search_finds_is_as_if_the_inputs_had_brought_it() {
    let n = 17;
    let x = matrix(n, 4, 1);
    let graph = random_graph(n, n, 2);
    let dropout = Dropout { probability: 0.3, seed: 5 };
    let mask = Array2::from_shape_fn((n, n), |(i, j)| (3 * i + j) % 4 != 0);
    let index = || ExactIndex::from_array(x.clone(), Metric::Cosine).unwrap();
    let options = |search: LatentSearch<f64>| search.threshold(-0.2).exclude_graph(true);
    for config in [linear(3, 4), gated(4)] {
        for inputs in [
            square(&x, &graph),
            square(&x, &graph).with_mask(mask.view()).unwrap().with_causal(),
            square(&x, &graph).with_dropout(dropout).unwrap().with_heads(2).unwrap(),
        ] {
            let search = plain(&config).with_search(options(LatentSearch::new(5, Metric::Cosine)));
            let latent = search.latent_neighbors(&inputs).unwrap().into_owned();
            assert!(latent.num_edges() > n);
            let with_latent = inputs.with_latent(&latent).unwrap();
            let expected = train(&plain(&config), &with_latent);
            assert_eq!(train(&search, &inputs), expected);
            let kept = options(LatentSearch::with_index(5, index()));
            assert_eq!(train(&plain(&config).with_search(kept), &inputs), expected);
            let own = options(LatentSearch::with_index(5, Own(index())));
            assert_eq!(train(&plain(&config).with_search(own), &inputs), expected);

            // Latent neighbours in the inputs take precedence.
            let other = Graph::window(n, 1).unwrap();
            let with_other = inputs.with_latent(&other).unwrap();
            let expected = train(&plain(&config), &with_other);
            assert_eq!(train(&search, &with_other), expected);
            assert_ne!(train(&search, &inputs).0, expected.0);
        }
    }
}

#[test]
fn selected_queries_get_the_answer_that_they_get_among_all() {
    let n = 19;
    let x = matrix(n, 4, 1);
    let (graph, latent) = (random_graph(n, n, 2), random_graph(n, n, 8));
    let dropout = Dropout { probability: 0.4, seed: 3 };
    let inputs = square(&x, &graph).with_latent(&latent).unwrap().with_causal();
    let inputs = inputs.with_dropout(dropout).unwrap();
    let dual = plain(&gated(4));
    let queries = [1, 4, 5, 9, 12, 18];
    let selected = inputs.select_queries(&queries).unwrap();
    let all = dual.forward(&inputs).unwrap();
    let some = dual.forward(&selected.inputs()).unwrap();
    close("some", &some, &all.select(Axis(0), &queries));
    let again = selected.inputs();
    let again = again.select_queries(&[0, 2, 5]).unwrap();
    let fewer = dual.forward(&again.inputs()).unwrap();
    close("some of some", &fewer, &all.select(Axis(0), &[1, 5, 18]));

    // Replaces the selected latent neighbours by others, with other numbers.
    let everyone = Graph::from_mask(Array2::from_elem((queries.len(), n), true).view()).unwrap();
    let other = dual.forward(&selected.inputs().with_latent(&everyone).unwrap()).unwrap();
    assert!(other.iter().all(|value| value.is_finite()));

    // The same as an expert of a mixture, with a search.
    let expert = || {
        let search = LatentSearch::new(4, Metric::Cosine).exclude_graph(true);
        plain(&gated(4)).with_search(search)
    };
    let experts: Vec<Box<dyn Attention<f64>>> = vec![Box::new(expert()), Box::new(expert())];
    let moe = MoeConfig::new(4, 1).init(experts, &mut rng(4)).unwrap();
    let inputs = square(&x, &graph).with_causal();
    assert!(moe.route(&inputs).unwrap().shares().iter().all(|&share| share > 0.2));
    let alone = expert().forward(&inputs).unwrap();
    close("in a mixture", &moe.forward(&inputs).unwrap(), &alone);
}

#[test]
fn every_branch_drops_pairs_of_its_own() {
    let n = 29;
    let x = matrix(n, 4, 1);
    let graph = random_graph(n, n, 2);
    // All branches have the same pattern, so that equal seeds would drop equal pairs.
    let inputs = square(&x, &graph).with_latent(&graph).unwrap();
    let inputs = inputs.with_dropout(Dropout { probability: 0.5, seed: 8 }).unwrap();
    let uniform = || Flash::new().with_scale(1e-300).unwrap();
    let mut dual = linear(4, 4).init(uniform(), uniform(), uniform(), &mut rng(1)).unwrap();
    let outs = [0, 1, 2].map(|branch| {
        let mut state = params::state(&dual);
        state.iter_mut().for_each(|(_, value)| value.fill(0.0));
        (0..4).for_each(|column| state[0].1[[column, 4 * branch + column]] = 1.0);
        params::load_state(&mut dual, state).unwrap();
        dual.forward(&inputs).unwrap()
    });
    close("graph", &outs[0], &uniform().forward(&inputs).unwrap());
    assert!(outs[0] != outs[1] && outs[1] != outs[2] && outs[0] != outs[2]);
}

#[test]
fn data_of_the_graphs_pairs_reach_the_graph_branch_alone() {
    let n = 7;
    let x = matrix(n, 3, 1);
    let latent = random_graph(n, n, 5);
    let bias = matrix(n, n, 6);
    // Dense inputs: the bias is a matrix that could be read for latent pairs too.
    let inputs = Inputs::dense(x.view(), x.view(), x.view()).unwrap();
    let inputs = inputs.with_latent(&latent).unwrap();
    let biased = inputs.with_bias(bias.view()).unwrap();
    let mut dual = plain(&linear(3, 3));
    let mut state = params::state(&dual);
    state[0].1.slice_mut(s![.., ..3]).fill(0.0);
    state[0].1.slice_mut(s![.., 6..]).fill(0.0);
    params::load_state(&mut dual, state).unwrap();
    assert_eq!(dual.forward(&biased).unwrap(), dual.forward(&inputs).unwrap());
    assert_eq!(train(&dual, &biased).1.bias.unwrap().sum(), 0.0);
    assert_ne!(plain(&gated(3)).forward(&biased), plain(&gated(3)).forward(&inputs));

    let gat = || EdgeGatConfig::new(Score::Gat, 3, 3, 1).edge_dim(2).init(&mut rng(1)).unwrap();
    let features = matrix(n * n, 2, 7);
    let inputs = inputs.with_edge_features(features.view()).unwrap();
    let dual = linear(3, 3).init(gat(), gat(), gat(), &mut rng(1)).unwrap();
    let expected = Error::MissingInput {
        mechanism: "latent (edge_gat)".into(),
        channel: Channel::EdgeFeatures,
    };
    assert_eq!(dual.forward(&inputs), Err(expected));
}

#[test]
fn nan_and_zero_vectors_and_too_many_neighbours_are_no_trouble() {
    let n = 11;
    let mut x = matrix(n, 3, 1);
    x.row_mut(2).fill(0.0);
    let path = Graph::from_edges(n, n, (0..n - 1).map(|node| (node, node + 1))).unwrap();
    for config in [linear(4, 3), gated(3)] {
        let dual = plain(&config).with_search(LatentSearch::new(100, Metric::Cosine));
        let clean = dual.forward(&square(&x, &path)).unwrap();
        assert!(clean.iter().all(|value| value.is_finite()));
        let found = dual.latent_neighbors(&square(&x, &path)).unwrap().into_owned();
        assert!((0..n).all(|node| found.neighbors(node).len() == n - 1));

        let mut poisoned = x.clone();
        poisoned[[6, 1]] = f64::NAN;
        let inputs = square(&poisoned, &path);
        let found = dual.latent_neighbors(&inputs).unwrap().into_owned();
        assert!(found.neighbors(6).is_empty() && !found.indices().contains(&6));
        let (out, grads) = train(&dual, &inputs);
        for node in 0..n {
            // Node 5 has node 6 as its neighbour in the graph.
            let touched = [5, 6].contains(&node);
            assert_eq!(out.row(node).iter().any(|value| value.is_nan()), touched, "{node}");
            let grad = grads.query.row(node);
            assert_eq!(grad.iter().any(|value| value.is_nan()), touched, "{node}");
        }

        let nothing = Graph::from_edges(n, n, []).unwrap();
        let lonely = dual.forward(&square(&x, &nothing)).unwrap();
        assert!(lonely.iter().all(|value| value.is_finite()));
        let none = Array2::zeros((0, 3));
        let no_nodes = Graph::from_edges(0, 0, []).unwrap();
        assert_eq!(dual.forward(&square(&none, &no_nodes)).unwrap().nrows(), 0);
    }
    let zeros = Array2::zeros((n, 3));
    let search = LatentSearch::new(2, Metric::Cosine).threshold(0.1);
    let alone = plain(&gated(3)).with_search(search);
    let nothing = Graph::from_edges(n, n, []).unwrap();
    assert_eq!(alone.forward(&square(&zeros, &nothing)).unwrap(), zeros);
    assert_eq!(alone.gates(&square(&zeros, &nothing)).unwrap(), zeros);
}

#[test]
fn bad_calls_are_refused_in_the_name_of_the_branch() {
    let x = matrix(5, 4, 1);
    let graph = Graph::window(5, 1).unwrap();
    let inputs = square(&x, &graph);
    let latent = inputs.with_latent(&graph).unwrap();
    let missing = Error::MissingInput { mechanism: "dual_space".into(), channel: Channel::Latent };
    assert_eq!(plain(&gated(4)).forward(&inputs), Err(missing.clone()));
    assert_eq!(plain(&gated(4)).gates(&inputs), Err(missing.clone()));
    assert_eq!(plain(&gated(4)).latent_neighbors(&inputs), Err(missing));
    let no_gates = plain(&linear(4, 4)).gates(&latent);
    refused(no_gates, "InvalidArgument | fusion: expected `Fusion::Gated`");
    let init = |config: &DualSpaceConfig| {
        config.init::<f64>(Flash::new(), Flash::new(), Flash::new(), &mut rng(1))
    };
    refused(init(&linear(0, 3)), "InvalidArgument | output_dim: expected at least 1, got 0");
    refused(init(&gated(0)), "InvalidArgument | branch_dim: expected at least 1, got 0");
    refused(init(&gated(usize::MAX)), "TooLarge | fusion weight");

    // Branches of other sizes, and inner mechanisms that refuse.
    let dims = |dims: [usize; 3]| {
        let [graph, latent, cross] = dims.map(|dim| {
            let config = MultiHeadConfig::new(4, 1).output_dim(dim);
            config.init(Flash::new(), &mut rng(1)).unwrap()
        });
        gated(4).init(graph, latent, cross, &mut rng(2)).unwrap()
    };
    for (wrong, name) in [([3, 4, 4], "graph"), ([4, 3, 4], "latent"), ([4, 4, 3], "cross")] {
        let words = format!("Shape | {name} (multi_head): output columns | [4], got [3]");
        refused(dims(wrong).forward(&latent), &words);
    }
    let with_heads = latent.with_heads(2).unwrap();
    refused(dims([4; 3]).forward(&with_heads), "Unsupported | graph (multi_head) | heads");
    // The output of the graph branch does not fit keys of another size.
    let wide = matrix(5, 6, 2);
    let other_values = latent.with_arrays(x.view(), x.view(), wide.view()).unwrap();
    let words = "Shape | cross (flash):  | [5, 4] | [5, 6]";
    let flashes = init(&gated(6)).unwrap();
    refused(flashes.forward(&other_values), words);
    let odd = || plain(&linear(3, 4));
    let odd = linear(2, 3).init(odd(), odd(), Flash::new(), &mut rng(2)).unwrap();
    refused(odd.forward(&with_heads), "Heads | query of the cross branch | 2 heads | got 3");
    let far = Array2::from_elem((5, 4), 0.4);
    let ball = PoincareConfig::new().init().unwrap();
    let dual = gated(4).init(Flash::new(), Flash::new(), ball.clone(), &mut rng(4)).unwrap();
    assert!(dual.forward(&square(&far, &graph).with_latent(&graph).unwrap()).is_ok());
    let outside = dual.forward(&square(&(2.0 * &far), &graph).with_latent(&graph).unwrap());
    refused(outside, "Domain | cross (poincare): value | row 0");

    // Invalid searches.
    let search = |search| plain(&gated(4)).with_search(search);
    let cosine = |k| LatentSearch::new(k, Metric::Cosine);
    let refused_search = search(cosine(2).threshold(f64::NAN)).forward(&inputs);
    refused(refused_search, "InvalidArgument | threshold");
    let few = x.slice(s![..3, ..]);
    let other_nodes = Inputs::dense(few, x.view(), x.view()).unwrap();
    refused(search(cosine(2)).forward(&other_nodes), "Shape | queries | [5, 4] | [3, 4]");
    assert!(search(cosine(2).exclude_self(false)).forward(&other_nodes).is_ok());
    let narrow = x.slice(s![.., ..3]);
    let narrow = Inputs::graph(narrow, x.view(), x.view(), &graph).unwrap();
    refused(search(cosine(2)).latent_neighbors(&narrow), "Shape | queries | [5, 3]");
    let index = ExactIndex::from_array(matrix(6, 4, 1), Metric::Dot).unwrap();
    let kept = search(LatentSearch::with_index(2, index)).forward(&inputs);
    refused(kept, "Shape | keys of the index | [5] | [6]");

    // The saved state of another mechanism.
    let (out, saved) = plain(&linear(4, 4)).forward_train(&latent).unwrap();
    let other = plain(&gated(4)).backward(&latent, &saved, out.view());
    refused(other, "Shape | saved gates");
    let small = matrix(3, 4, 1);
    let small_graph = Graph::window(3, 1).unwrap();
    let small = square(&small, &small_graph).with_latent(&small_graph).unwrap();
    let other = plain(&linear(4, 4)).backward(&small, &saved, out.slice(s![..3, ..]));
    refused(other, "Shape | saved branches | [3, 12] | [5, 12]");
}
