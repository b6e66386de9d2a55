//! Nearest neighbours against a full sort of similarities in `f64`.

mod common;

use approx::abs_diff_eq;
use common::random::{self, rng};
use graph_attention::ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, array, s};
use graph_attention::neighbors::{ExactIndex, Metric, Neighbor, NeighborIndex, NeighborSearch};
use graph_attention::{Error, Float, Graph, Inputs, Result};
use rand::RngExt;

/// Normal vectors of up to 64 columns are in this ball.
const BALL: Metric = Metric::Poincare { curvature: 0.003 };
const METRICS: [Metric; 4] = [Metric::Cosine, Metric::Dot, Metric::Euclidean, BALL];

/// The oracle's result for a query: keys and similarities, the nearest first.
type Row = Vec<(usize, f64)>;

fn wide<F: Float>(row: ArrayView1<'_, F>) -> Option<Vec<f64>> {
    row.iter().map(|x| x.is_finite().then(|| x.as_f64())).collect()
}

fn similarity(metric: Metric, query: &[f64], key: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    match metric {
        Metric::Dot => dot(query, key),
        Metric::Euclidean => -query.iter().zip(key).map(|(q, k)| (q - k).powi(2)).sum::<f64>(),
        Metric::Cosine => match dot(query, query).sqrt() * dot(key, key).sqrt() {
            0.0 => 0.0,
            norms => dot(query, key) / norms,
        },
        Metric::Poincare { curvature: c } => {
            let distance: f64 = query.iter().zip(key).map(|(q, k)| (q - k).powi(2)).sum();
            let gaps = (1.0 - c * dot(query, query)) * (1.0 - c * dot(key, key));
            // d = 2 arsinh(√(c |q − k|² / gaps)) / √c, by the half-angle formula.
            -2.0 * (c * distance / gaps).sqrt().asinh() / c.sqrt()
        }
        other => unreachable!("{other:?}"),
    }
}

/// Whether a vector is similar to any.
fn exists(metric: Metric, x: &[f64]) -> bool {
    match metric {
        Metric::Poincare { curvature } => curvature * x.iter().map(|x| x * x).sum::<f64>() < 1.0,
        _ => true,
    }
}

/// Sorts all similarities with a stable sort, so ties go to the lower key.
fn brute_force<F: Float>(
    metric: Metric,
    keys: ArrayView2<'_, F>,
    queries: ArrayView2<'_, F>,
    k: usize,
    admits: impl Fn(usize, usize, f64) -> bool,
) -> Vec<Row> {
    let wide = |row| wide(row).filter(|row| exists(metric, row));
    let keys: Vec<_> = keys.rows().into_iter().map(wide).collect();
    let find = |(i, query): (usize, Option<Vec<f64>>)| {
        let Some(query) = query else { return Vec::new() };
        let all = keys.iter().enumerate();
        let all = all.filter_map(|(j, key)| Some((j, similarity(metric, &query, key.as_ref()?))));
        let mut found: Row = all.filter(|&(j, similarity)| admits(i, j, similarity)).collect();
        found.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap());
        found.truncate(k);
        found
    };
    queries.rows().into_iter().map(wide).enumerate().map(find).collect()
}

/// Asserts that keys and order are the oracle's, and similarities are right to a few roundings.
#[track_caller]
fn assert_found<F: Float>(
    index: &dyn NeighborIndex<F>,
    queries: ArrayView2<'_, F>,
    search: &NeighborSearch<'_, F>,
    expected: &[Row],
    what: &str,
) {
    let found = index.search(queries, search).unwrap();
    assert_eq!(found.graph.num_queries(), expected.len(), "{what}");
    assert_eq!(found.graph.num_keys(), index.num_keys(), "{what}");
    assert_eq!(found.similarities.len(), found.graph.num_edges(), "{what}");
    for (query, expected) in expected.iter().enumerate() {
        let keys: Vec<usize> = found.graph.row(query).map(|(key, _)| key).collect();
        let expected_keys: Vec<usize> = expected.iter().map(|&(key, _)| key).collect();
        assert_eq!(keys, expected_keys, "{what}, query {query}");
        for ((_, pair), &(_, similarity)) in found.graph.row(query).zip(expected) {
            let found = found.similarities[pair].as_f64();
            let bound = F::epsilon().as_f64() + 64.0 * f64::EPSILON;
            let bound = bound * similarity.abs().max(1.0);
            let is_right = abs_diff_eq!(found, similarity, epsilon = bound);
            assert!(is_right, "{what}, query {query}: {found:e} instead of {similarity:e}");
        }
    }
}

fn normal<F: Float>(rows: usize, dim: usize, seed: u64) -> Array2<F> {
    random::normal(rows, dim, &mut rng(seed))
}

fn check_sizes<F: Float>() {
    for (num_queries, num_keys, dim) in
        [(1, 1, 1), (1, 97, 3), (2, 193, 8), (7, 31, 17), (67, 211, 64), (131, 89, 5), (65, 96, 23)]
    {
        let (queries, keys) = (normal::<F>(num_queries, dim, 1), normal::<F>(num_keys, dim, 2));
        for metric in METRICS {
            let index = ExactIndex::new(keys.view(), metric).unwrap();
            assert_eq!((index.num_keys(), index.dim(), index.metric()), (num_keys, dim, metric));
            for k in [1, 5, num_keys, num_keys + 3, usize::MAX] {
                let what = format!("{metric:?} {num_queries} x {num_keys} x {dim}, k = {k}");
                let all = brute_force(metric, keys.view(), queries.view(), k, |_, _, _| true);
                assert_found(&index, queries.view(), &NeighborSearch::new(k), &all, &what);
            }
            let positive = NeighborSearch::new(num_keys).threshold(F::from_f64(-0.3));
            let admits = |_, _, similarity| similarity >= F::from_f64(-0.3).as_f64();
            let near = brute_force(metric, keys.view(), queries.view(), num_keys, admits);
            assert_found(&index, queries.view(), &positive, &near, "threshold");
        }
    }
}

#[test]
fn the_exact_index_finds_what_a_full_sort_finds() {
    check_sizes::<f32>();
    check_sizes::<f64>();
}

#[test]
fn near_points_far_from_the_origin_and_of_all_sizes_are_told_apart() {
    // Distances of 1e-3 at 1e4 are lost in squared norms in f32, but not in differences.
    let far = normal::<f32>(173, 13, 3).mapv(|x| 1e4 + x * 4e-3);
    let mut scales = normal::<f32>(173, 13, 4);
    for (i, mut row) in scales.rows_mut().into_iter().enumerate() {
        row *= 10f32.powi(i as i32 % 37 - 18);
    }
    // Sums of squares or products overflow, or all of them underflow.
    let huge = normal::<f32>(173, 13, 5).mapv(|x| x * 2e37);
    let tiny = normal::<f32>(173, 13, 6).mapv(|x| x * 3e-39);
    // Products keep only a few bits.
    let small = normal::<f32>(173, 13, 7).mapv(|x| x * 1e-22);
    for (name, points) in
        [("far", far), ("scales", scales), ("huge", huge), ("tiny", tiny), ("small", small)]
    {
        for metric in METRICS {
            if (name, metric) == ("far", Metric::Cosine) {
                // These cosines differ from 1 by less than f64 can represent.
                continue;
            }
            let index = ExactIndex::new(points.view(), metric).unwrap();
            let all = brute_force(metric, points.view(), points.view(), 11, |_, _, _| true);
            let found = index.search(points.view(), &NeighborSearch::new(11)).unwrap();
            for (query, expected) in all.iter().enumerate() {
                let keys: Vec<usize> = found.graph.row(query).map(|(key, _)| key).collect();
                let expected: Vec<usize> = expected.iter().map(|&(key, _)| key).collect();
                assert_eq!(keys, expected, "{name} {metric:?}, query {query}");
            }
        }
    }
}

#[test]
fn hyperbolic_neighbours_are_right_near_the_boundary() {
    use graph_attention::geometry::poincare::distance;
    let curvature = 0.7;
    let metric = Metric::Poincare { curvature };
    // Half of the points are pairs close to each other, and ever closer to the boundary.
    let mut points = normal::<f64>(160, 5, 17);
    for (i, mut point) in points.rows_mut().into_iter().enumerate() {
        let radius = (1.0 - 0.5f64.powf(i as f64 / 8.0 + 0.3)) / curvature.sqrt();
        let norm = point.dot(&point).sqrt();
        point *= radius / norm;
    }
    for i in (0..160).step_by(4) {
        let twin = points.row(i).mapv(|x| x * (1.0 - 1e-9));
        points.row_mut(i + 1).assign(&twin);
    }
    let index = ExactIndex::new(points.view(), metric).unwrap();
    let expected = brute_force(metric, points.view(), points.view(), 9, |_, _, _| true);
    let found = index.search(points.view(), &NeighborSearch::new(9)).unwrap();
    for (query, expected) in expected.iter().enumerate() {
        let keys: Vec<usize> = found.graph.row(query).map(|(key, _)| key).collect();
        assert_eq!(keys, expected.iter().map(|found| found.0).collect::<Vec<_>>(), "{query}");
        for found in found.row(query) {
            let [a, b] = [query, found.key].map(|row| points.row(row).to_vec());
            let expected = -distance(&a, &b, curvature).unwrap();
            assert!((found.similarity - expected).abs() < 1e-6 * (1.0 - expected), "{query}");
        }
    }
    // A threshold is a distance; a neighbour at exactly this distance is accepted.
    for query in 0..160 {
        let row: Vec<_> = found.row(query).collect();
        let search = NeighborSearch::new(9).threshold(row[4].similarity);
        let one = points.slice(s![query..query + 1, ..]);
        let near = index.search(one, &search).unwrap();
        let least = row.iter().filter(|found| found.similarity >= row[4].similarity);
        assert_eq!(near.row(0).collect::<Vec<_>>(), least.copied().collect::<Vec<_>>());
    }
    // f32 cannot tell apart points that close to the boundary, but what it stores is searched exactly.
    let narrow = points.mapv(|x| x as f32);
    let index = ExactIndex::new(narrow.view(), metric).unwrap();
    let expected = brute_force(metric, narrow.view(), narrow.view(), 9, |_, _, _| true);
    let found = index.search(narrow.view(), &NeighborSearch::new(9)).unwrap();
    for (query, expected) in expected.iter().enumerate() {
        let keys: Vec<usize> = found.graph.row(query).map(|(key, _)| key).collect();
        assert_eq!(keys, expected.iter().map(|found| found.0).collect::<Vec<_>>(), "{query}");
    }
    // Points on the sphere or outside are similar to none.
    let few = array![[0.0, 0.5], [1.0, 0.0], [3.0, 4.0], [0.0, 0.0]];
    let index = ExactIndex::new(few.view(), Metric::Poincare { curvature: 1.0 }).unwrap();
    let found = index.search(few.view(), &NeighborSearch::new(4)).unwrap().graph;
    let rows: Vec<_> = (0..4).map(|query| found.neighbors(query).to_vec()).collect();
    assert_eq!(rows, [vec![0, 3], vec![], vec![], vec![3, 0]]);
    for curvature in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = ExactIndex::new(few.view(), Metric::Poincare { curvature }).unwrap_err();
        let expected = format!("curvature: expected a positive finite number, got {curvature}");
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn ties_go_to_the_lower_key_across_tiles() {
    // Every key occurs eight times, in different tiles. Small integers make all sums exact.
    let mut rng = rng(7);
    let few = Array2::from_shape_simple_fn((47, 3), || rng.random_range(-2..=2) as f32);
    let keys = Array2::from_shape_fn((8 * 47, 3), |(i, axis)| few[[i * 5 % 47, axis]]);
    for metric in [Metric::Dot, Metric::Euclidean] {
        let index = ExactIndex::new(keys.view(), metric).unwrap();
        for k in [1, 8, 13, 100] {
            let all = brute_force(metric, keys.view(), few.view(), k, |_, _, _| true);
            assert_found(&index, few.view(), &NeighborSearch::new(k), &all, &format!("k = {k}"));
        }
    }
    // Copies of a key have the same cosine, whatever its last bit.
    let index = ExactIndex::new(keys.view(), Metric::Cosine).unwrap();
    let found = index.search(few.view(), &NeighborSearch::new(8 * 47)).unwrap();
    for query in 0..47 {
        let row: Vec<_> = found.graph.row(query).map(|(key, _)| key).collect();
        let places: Vec<usize> =
            (0..8 * 47).map(|key| row.iter().position(|&k| k == key).unwrap()).collect();
        for key in 47..8 * 47 {
            assert!(places[key] > places[key - 47], "query {query}: {key} before its copy");
        }
    }
}

#[test]
fn what_is_not_finite_is_never_chosen_and_has_no_neighbours() {
    let (clean_queries, clean_keys) = (normal::<f32>(71, 7, 8), normal::<f32>(109, 7, 9));
    let (mut queries, mut keys) = (clean_queries.clone(), clean_keys.clone());
    let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for (at, &value) in bad.iter().cycle().take(31).enumerate() {
        keys[[at * 3 + 1, at % 7]] = value;
        queries[[at * 2, at % 5]] = value;
    }
    for metric in METRICS {
        let index = ExactIndex::new(keys.view(), metric).unwrap();
        for k in [4, 109] {
            let all = brute_force(metric, keys.view(), queries.view(), k, |_, _, _| true);
            assert_found(&index, queries.view(), &NeighborSearch::new(k), &all, "not finite");
        }
        let found = index.search(queries.view(), &NeighborSearch::new(109)).unwrap().graph;
        assert!(found.neighbors(0).is_empty() && found.neighbors(1).len() == 109 - 31);
        let nobody = keys.mapv(|_| f32::NAN);
        let index = ExactIndex::new(nobody.view(), metric).unwrap();
        let none = index.search(clean_queries.view(), &NeighborSearch::new(3)).unwrap();
        assert_eq!(none.graph.num_edges(), 0);
    }
}

#[test]
fn zero_vectors_have_cosine_zero() -> Result<()> {
    let keys = array![[-1.0, 0.0], [0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.0, -2.0]];
    let queries = array![[0.0, 0.0], [1.0, 0.0]];
    let index = ExactIndex::new(keys.view(), Metric::Cosine)?;
    let found = index.search(queries.view(), &NeighborSearch::new(5))?;
    assert_eq!(found.graph.neighbors(0), [0, 1, 2, 3, 4]);
    assert_eq!(found.graph.neighbors(1), [2, 1, 3, 4, 0]);
    let cosines = [0.0, 0.0, 0.0, 0.0, 0.0, 0.6, 0.0, 0.0, 0.0, -1.0];
    assert_eq!(found.similarities.to_vec(), cosines);
    Ok(())
}

/// A search of nodes among themselves with many exclusions and one hub.
fn excluding(n: usize) -> Graph {
    let mut rng = rng(10);
    let edges = (0..6 * n).map(|_| (rng.random_range(0..n), rng.random_range(0..n)));
    let hub = (0..n - 2).map(|key| (3, key));
    Graph::from_edges(n, n, edges.chain(hub).collect::<Vec<_>>()).unwrap()
}

/// The provided methods of the trait, for an index that searches for one query at a time.
#[derive(Debug)]
struct OneByOne<'a>(ExactIndex<'a, f32>);

impl NeighborIndex<f32> for OneByOne<'_> {
    fn num_keys(&self) -> usize {
        self.0.num_keys()
    }
    fn dim(&self) -> usize {
        self.0.dim()
    }
    fn nearest_into(
        &self,
        query: ArrayView1<'_, f32>,
        k: usize,
        nearest: &mut Vec<Neighbor<f32>>,
    ) -> Result<()> {
        self.0.nearest_into(query, k, nearest)
    }
}

#[test]
fn thresholds_and_exclusions_hold_in_both_ways_to_search() {
    let nodes = normal::<f32>(103, 6, 11);
    let known = excluding(103);
    for (metric, threshold) in
        [(Metric::Cosine, 0.25f32), (Metric::Dot, 1.5), (Metric::Euclidean, -7.5)]
    {
        let index = ExactIndex::new(nodes.view(), metric).unwrap();
        let provided = OneByOne(ExactIndex::new(nodes.view(), metric).unwrap());
        for (has_threshold, exclude_self, exclude) in
            (0..8).map(|bits| (bits & 1 > 0, bits & 2 > 0, bits & 4 > 0))
        {
            let mut search = NeighborSearch::new(9).exclude_self(exclude_self);
            assert_eq!(search.k(), 9);
            if has_threshold {
                search = search.threshold(threshold);
            }
            if exclude {
                search = search.exclude(&known);
            }
            let expected =
                brute_force(metric, nodes.view(), nodes.view(), 9, |query, key, similarity| {
                    let is_known = known.neighbors(query).contains(&(key as u32));
                    let is_excluded = (exclude_self && query == key) || (exclude && is_known);
                    let is_far = has_threshold && similarity < f64::from(threshold);
                    !is_excluded && !is_far
                });
            let what = format!("{search:?}");
            assert_found(&index, nodes.view(), &search, &expected, &what);
            assert_found(&provided, nodes.view(), &search, &expected, &what);
        }
    }
}

#[test]
fn a_threshold_is_met_by_what_equals_it() -> Result<()> {
    let keys = array![[1.0f32], [2.0], [3.0]];
    let index = ExactIndex::new(keys.view(), Metric::Dot)?;
    for (threshold, expected) in [(2.0, vec![2, 1]), (3.0, vec![2]), (3.1, vec![])] {
        let search = NeighborSearch::new(3).threshold(threshold);
        assert_eq!(index.search(array![[1.0]].view(), &search)?.graph.neighbors(0), expected);
    }
    Ok(())
}

#[test]
fn views_of_any_layout_and_owned_keys_give_the_same_bits() -> Result<()> {
    let (queries, keys) = (normal::<f32>(29, 11, 12), normal::<f32>(61, 11, 13));
    let search = NeighborSearch::new(5);
    let expected = ExactIndex::new(keys.view(), Metric::Cosine)?.search(queries.view(), &search)?;
    let mut spread = Array2::from_elem((2 * 61, 3 * 11), f32::NAN);
    spread.slice_mut(s![..;2, ..;-3]).assign(&keys);
    let view = spread.slice(s![..;2, ..;-3]);
    let columns = queries.t().as_standard_layout().into_owned();
    let strided = ExactIndex::new(view, Metric::Cosine)?.search(columns.t(), &search)?;
    assert_eq!(strided, expected);
    // Owned arrays: in row-major and column-major order, reversed, and with rows sliced off.
    let by_columns = keys.t().as_standard_layout().into_owned().reversed_axes();
    let mut reversed = keys.slice(s![..;-1, ..]).as_standard_layout().into_owned();
    reversed.invert_axis(Axis(0));
    let mut longer = Array2::from_elem((71, 11), f32::NAN);
    longer.slice_mut(s![4..65, ..]).assign(&keys);
    let sliced = longer.slice_move(s![4..65, ..]);
    for owned in [keys.clone(), by_columns, reversed, sliced] {
        assert_eq!(owned, keys);
        let index = ExactIndex::from_array(owned, Metric::Cosine)?;
        assert_eq!(index.search(queries.view(), &search)?, expected);
    }
    let mut nearest = vec![Neighbor { key: 99, similarity: f32::NAN }];
    let index = ExactIndex::new(keys.view(), Metric::Cosine)?;
    for query in 0..29 {
        index.nearest_into(queries.row(query), 5, &mut nearest)?;
        assert_eq!(nearest, expected.row(query).collect::<Vec<_>>());
    }
    Ok(())
}

#[test]
fn nothing_to_find_is_not_an_error() -> Result<()> {
    let some = normal::<f64>(5, 3, 14);
    for metric in METRICS {
        for (queries, keys, k) in [(5, 5, 0), (0, 5, 3), (5, 0, 3), (0, 0, 3)] {
            let keys = some.slice(s![..keys, ..]);
            let found = ExactIndex::new(keys, metric)?
                .search(some.slice(s![..queries, ..]), &NeighborSearch::new(k))?;
            assert_eq!(found.graph.num_queries(), queries);
            assert_eq!((found.graph.num_edges(), found.similarities), (0, Array1::zeros(0)));
        }
        // Vectors without columns are all equal.
        let flat = Array2::<f64>::zeros((4, 0));
        let found = ExactIndex::new(flat.view(), metric)?
            .search(flat.view(), &NeighborSearch::new(2).exclude_self(true))?;
        assert_eq!(found.graph.indices(), [1, 2, 0, 2, 0, 1, 0, 1]);
    }
    Ok(())
}

#[test]
fn bad_input_is_refused() {
    let (nodes, others) = (normal::<f32>(5, 3, 15), normal::<f32>(4, 2, 16));
    let graph = Graph::from_edges(5, 4, []).unwrap();
    let index = ExactIndex::new(nodes.view(), Metric::Dot).unwrap();
    let shape = |what: &'static str, expected: [usize; 2], actual: [usize; 2]| Error::Shape {
        what: what.into(),
        expected: expected.into(),
        actual: actual.into(),
    };
    let refused = |queries: ArrayView2<'_, f32>, search: &NeighborSearch<'_, f32>| {
        let provided = OneByOne(ExactIndex::new(nodes.view(), Metric::Dot).unwrap());
        let error = index.search(queries, search).unwrap_err();
        assert_eq!(provided.search(queries, search).unwrap_err(), error);
        error
    };
    let plain = NeighborSearch::new(2);
    assert_eq!(refused(others.view(), &plain), shape("queries", [4, 3], [4, 2]));
    let four = nodes.slice(s![..4, ..]);
    assert_eq!(refused(four, &plain.exclude_self(true)), shape("queries", [5, 3], [4, 3]));
    assert_eq!(refused(nodes.view(), &plain.exclude(&graph)), shape("exclude", [5, 5], [5, 4]));
    let other_keys = Inputs::dense(nodes.view(), four, four).unwrap();
    let other_keys = refused(nodes.view(), &plain.visible_in(&other_keys));
    assert_eq!(other_keys, shape("visible_in", [5, 5], [5, 4]));
    let error = refused(nodes.view(), &plain.threshold(f32::NAN)).to_string();
    assert_eq!(error, "threshold: expected a number, got NaN");
    let error = index.nearest_into(others.row(0), 1, &mut Vec::new()).unwrap_err();
    let expected = Error::Shape { what: "query".into(), expected: vec![3], actual: vec![2] };
    assert_eq!(error, expected);
    // More lists than fit in memory, or than a `usize` can count.
    let nothing = ArrayView2::from_shape((usize::MAX / 64, 0), &[] as &[f32]).unwrap();
    let index = ExactIndex::from_array(Array2::zeros((7, 0)), Metric::Dot).unwrap();
    assert!(matches!(index.search(nothing, &plain), Err(Error::TooLarge { .. })));
    assert!(matches!(ExactIndex::new(nothing, Metric::Dot), Err(Error::Graph { .. })));
}
