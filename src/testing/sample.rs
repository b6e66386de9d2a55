use crate::{Causal, Dropout, Float, Graph, Inputs, Segments};
use ndarray::{Array, Array1, Array2, Array3, ArrayD, Axis, Dimension, ShapeBuilder, Slice};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, StandardNormal};

/// The numbers of columns that a mechanism under test takes, and other properties that the checks need.
#[derive(Clone, Debug, PartialEq)]
pub struct Shapes {
    query_dim: usize,
    key_dim: usize,
    value_dim: usize,
    heads: usize,
    kv_heads: usize,
    bias_heads: usize,
    edge_dim: usize,
    axes: usize,
    scale: f64,
    whole_queries: bool,
    drops_rows: bool,
    reads_latent: bool,
}

impl Shapes {
    /// Creates shapes with the numbers of columns of queries, keys and values for all heads together, and
    /// one head.
    #[must_use]
    pub fn new(query_dim: usize, key_dim: usize, value_dim: usize) -> Self {
        Self {
            query_dim,
            key_dim,
            value_dim,
            heads: 1,
            kv_heads: 1,
            bias_heads: 1,
            edge_dim: 3,
            axes: 2,
            scale: 1.0,
            whole_queries: false,
            drops_rows: false,
            reads_latent: false,
        }
    }

    /// Sets the number of heads in the inputs. Check a mechanism that honours heads a second time with
    /// several heads; one that does not must refuse them ([`Channel::Heads`](crate::Channel::Heads)).
    #[must_use]
    pub fn heads(self, heads: usize) -> Self {
        self.kv_heads(heads, heads)
    }

    /// Sets the numbers of grouped heads in the inputs: [`Inputs::with_grouped_heads`].
    #[must_use]
    pub fn kv_heads(mut self, heads: usize, kv_heads: usize) -> Self {
        (self.heads, self.kv_heads, self.bias_heads) = (heads, kv_heads, heads);
        self
    }

    /// Sets the number of columns of a per-head bias, for a mechanism that makes its own heads. Default:
    /// the number of heads.
    #[must_use]
    pub fn bias_heads(mut self, heads: usize) -> Self {
        self.bias_heads = heads;
        self
    }

    /// Sets the number of columns of the edge features. Default: 3. Use 0 for a mechanism that is
    /// configured without edge features ([`Error::MissingSetting`](crate::Error::MissingSetting)).
    #[must_use]
    pub fn edge_dim(mut self, columns: usize) -> Self {
        self.edge_dim = columns;
        self
    }

    /// Sets the number of columns of the positions. Default: 2.
    #[must_use]
    pub fn axes(mut self, axes: usize) -> Self {
        self.axes = axes;
        self
    }

    /// Allows every head to depend on the whole row of the query, as with a router. Heads are then
    /// expected to read only their own columns of keys and values.
    #[must_use]
    pub fn whole_queries(mut self) -> Self {
        self.whole_queries = true;
        self
    }

    /// Declares that dropout also drops entries of the output of each query, by the number of the query, as a
    /// [`TransformerLayer`](crate::TransformerLayer) does. With dropout, the order of the queries then matters.
    #[must_use]
    pub fn drops_rows(mut self) -> Self {
        self.drops_rows = true;
        self
    }

    /// Declares that the mechanism also attends to latent neighbours ([`Inputs::with_latent`]). Queries
    /// are then expected to see those keys too, unless mask or causal pattern hide them.
    #[must_use]
    pub fn reads_latent(mut self) -> Self {
        self.reads_latent = true;
        self
    }

    /// Sets the standard deviation of queries, keys and values, which are normally distributed. Default: 1.
    #[must_use]
    pub fn scale(mut self, scale: f64) -> Self {
        self.scale = scale;
        self
    }
}

/// Owned, mutable [`Inputs`] with every data channel.
#[derive(Clone, Debug)]
pub(super) struct Sample<F> {
    /// num_queries × query columns.
    pub(super) query: Array2<F>,
    /// num_keys × key columns.
    pub(super) key: Array2<F>,
    /// num_keys × value columns.
    pub(super) value: Array2<F>,
    /// The pairs; all pairs if `None`.
    pub(super) graph: Option<Graph>,
    /// The segments of packed inputs; then there is no graph.
    pub(super) segments: Option<Segments>,
    /// Whether all heads read whole rows of queries.
    pub(super) whole_queries: bool,
    /// Whether dropout depends on the numbers of the queries.
    pub(super) drops_rows: bool,
    /// Whether queries see latent neighbours.
    pub(super) reads_latent: bool,
    /// Whether some rows are zeros.
    pub(super) has_zeros: bool,
    /// The causal pattern.
    pub(super) causal: Option<Causal>,
    /// The number of heads of the queries.
    pub(super) heads: usize,
    /// The number of heads of keys and values.
    pub(super) kv_heads: usize,
    /// The mask, with two or three axes.
    pub(super) mask: Option<ArrayD<bool>>,
    /// The mask of pairs.
    pub(super) pair_mask: Option<Array1<bool>>,
    /// The additive logits, with two or three axes.
    pub(super) bias: Option<ArrayD<F>>,
    /// Dropout.
    pub(super) dropout: Option<Dropout>,
    /// Pairs × heads, or × 1.
    pub(super) pair_weights: Option<Array2<F>>,
    /// Pairs × columns.
    pub(super) edge_features: Array2<F>,
    /// One per pair, positive.
    pub(super) distances: Array1<F>,
    /// One per pair, 0 to 2.
    pub(super) layers: Vec<u8>,
    /// num_queries × axes.
    pub(super) query_positions: Array2<F>,
    /// num_keys × axes.
    pub(super) key_positions: Array2<F>,
    /// The second graph of neighbours.
    pub(super) latent: Graph,
}

impl<F: Float> Sample<F> {
    /// Draws random inputs over all pairs of `num_queries` and `num_keys`. The same `rng` state gives the
    /// same values for `f32` and `f64`, up to rounding.
    pub(super) fn dense(
        shapes: &Shapes,
        num_queries: usize,
        num_keys: usize,
        rng: &mut impl rand::Rng,
    ) -> Self {
        let pairs = num_queries * num_keys;
        let query = normal([num_queries, shapes.query_dim], shapes.scale, rng);
        let key = normal([num_keys, shapes.key_dim], shapes.scale, rng);
        let value = normal([num_keys, shapes.value_dim], shapes.scale, rng);
        let latent = (0..pairs).filter(|_| rng.random_range(0..3) == 0);
        let latent = latent.map(|pair| (pair / num_keys, pair % num_keys));
        let latent = Graph::from_edges(num_queries, num_keys, latent.collect::<Vec<_>>());
        let mut sample = Self {
            query,
            key,
            value,
            graph: None,
            segments: None,
            has_zeros: false,
            whole_queries: shapes.whole_queries,
            drops_rows: shapes.drops_rows,
            reads_latent: shapes.reads_latent,
            causal: None,
            heads: shapes.heads,
            kv_heads: shapes.kv_heads,
            mask: None,
            pair_mask: None,
            bias: None,
            dropout: None,
            pair_weights: None,
            edge_features: Array2::zeros((0, shapes.edge_dim)),
            distances: Array1::zeros(0),
            layers: Vec::new(),
            query_positions: normal([num_queries, shapes.axes], 1.0, rng),
            key_positions: normal([num_keys, shapes.axes], 1.0, rng),
            latent: latent.expect("the edges are in range"),
        };
        sample.draw_pair_data(pairs, rng);
        sample
    }

    /// Draws random inputs over the edges of a graph.
    pub(super) fn graph(shapes: &Shapes, graph: Graph, rng: &mut impl rand::Rng) -> Self {
        let mut sample = Self::dense(shapes, graph.num_queries(), graph.num_keys(), rng);
        sample.draw_pair_data(graph.num_edges(), rng);
        sample.graph = Some(graph);
        sample
    }

    fn draw_pair_data(&mut self, pairs: usize, rng: &mut impl rand::Rng) {
        self.edge_features = normal([pairs, self.edge_features.ncols()], 1.0, rng);
        self.distances =
            Array1::from_shape_simple_fn(pairs, || F::from_f64(rng.random_range(0.5..2.0)));
        self.layers = (0..pairs).map(|_| rng.random_range(0..3)).collect();
    }

    /// Returns the inputs of this sample.
    pub(super) fn inputs(&self) -> crate::Result<Inputs<'_, F>> {
        let (query, key, value) = (self.query.view(), self.key.view(), self.value.view());
        let mut inputs = match (&self.graph, &self.segments) {
            (_, Some(segments)) => Inputs::packed(query, key, value, segments)?,
            (None, _) if self.query.nrows() == 1 => Inputs::single(self.query.row(0), key, value)?,
            (None, _) => Inputs::dense(query, key, value)?,
            (Some(graph), _) => Inputs::graph(query, key, value, graph)?,
        };
        inputs = inputs
            .with_grouped_heads(self.heads, self.kv_heads)?
            .with_edge_features(self.edge_features.view())?
            .with_distances(self.distances.view())?
            .with_edge_layers(&self.layers)?
            .with_positions(self.query_positions.view(), self.key_positions.view())?
            .with_latent(&self.latent)?;
        if let Some(alignment) = self.causal {
            inputs = inputs.with_causal_alignment(alignment);
        }
        if let Some(mask) = &self.mask {
            inputs = inputs.with_mask(mask.view())?;
        }
        if let Some(mask) = &self.pair_mask {
            inputs = inputs.with_pair_mask(mask.view())?;
        }
        if let Some(bias) = &self.bias {
            inputs = inputs.with_bias(bias.view())?;
        }
        if let Some(dropout) = self.dropout {
            inputs = inputs.with_dropout(dropout)?;
        }
        if let Some(weights) = &self.pair_weights {
            inputs = inputs.with_pair_weights(weights.view())?;
        }
        Ok(inputs)
    }

    /// Returns an equal sample with another memory layout of all arrays but layers and pair mask.
    pub(super) fn relayout(&self, layout: Layout) -> Self {
        let mut sample = self.clone();
        for array in [
            &mut sample.query,
            &mut sample.key,
            &mut sample.value,
            &mut sample.edge_features,
            &mut sample.query_positions,
            &mut sample.key_positions,
        ] {
            *array = layout.of(array);
        }
        sample.bias = sample.bias.as_ref().map(|bias| layout.of(bias));
        sample.mask = sample.mask.as_ref().map(|mask| layout.of(mask));
        sample.pair_weights = sample.pair_weights.as_ref().map(|weights| layout.of(weights));
        let column = layout.of(&sample.distances.clone().insert_axis(Axis(1)));
        sample.distances = column.index_axis_move(Axis(1), 0);
        sample
    }

    /// Selects rows of all per-pair arrays.
    pub(super) fn select_pairs(&mut self, pairs: &[usize]) {
        self.pair_weights =
            self.pair_weights.as_ref().map(|weights| weights.select(Axis(0), pairs));
        self.edge_features = self.edge_features.select(Axis(0), pairs);
        self.distances = self.distances.select(Axis(0), pairs);
        self.layers = pairs.iter().map(|&pair| self.layers[pair]).collect();
        self.pair_mask = self.pair_mask.as_ref().map(|mask| mask.select(Axis(0), pairs));
    }
}

/// A memory layout of an array.
#[derive(Clone, Copy, Debug)]
pub(super) enum Layout {
    ColumnMajor,
    EveryOther,
    Reversed,
}

impl Layout {
    /// Returns an equal array with this layout.
    pub(super) fn of<T: Copy + Default, D: Dimension>(self, array: &Array<T, D>) -> Array<T, D> {
        let (shape, num_axes) = (array.raw_dim(), array.ndim());
        let mut other = match self {
            Self::ColumnMajor => Array::from_elem(shape.f(), T::default()),
            Self::EveryOther => {
                let mut wide = shape;
                wide.slice_mut().iter_mut().for_each(|len| *len = 3 * *len + 1);
                let mut wide = Array::from_elem(wide, T::default());
                wide.slice_each_axis_inplace(|_| Slice::new(1, None, 3));
                wide
            }
            Self::Reversed => {
                let mut reversed = Array::from_elem(shape, T::default());
                (0..num_axes).for_each(|axis| reversed.invert_axis(Axis(axis)));
                reversed
            }
        };
        other.assign(array);
        other
    }
}

/// Returns inputs of every kind in the contract, small enough to differentiate numerically.
pub(super) fn cases<F: Float>(shapes: &Shapes) -> Vec<(&'static str, Sample<F>)> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(2017);
    let mut other_rng = Xoshiro256PlusPlus::seed_from_u64(2018);
    let (num_queries, num_keys) = (5, 7);
    let dropout = Some(Dropout { probability: 0.4, seed: 11 });
    let mut cases = Vec::new();

    let dense = Sample::dense(shapes, num_queries, num_keys, &mut rng);
    cases.push(("causal", Sample { causal: Some(Causal::TopLeft), ..dense.clone() }));
    let tall = Sample::dense(shapes, num_keys, num_queries, &mut rng);
    cases.push(("causal bottom right", Sample { causal: Some(Causal::BottomRight), ..tall }));
    // Query 2 sees nothing, and no query sees key 4.
    let mask = Array2::from_shape_fn((num_queries, num_keys), |(query, key)| {
        query != 2 && key != 4 && rng.random_range(0..3) > 0
    });
    cases.push(("mask", Sample { mask: Some(mask.clone().into_dyn()), ..dense.clone() }));
    let bias = normal([num_queries, num_keys], 1.0, &mut rng);
    cases.push(("bias", Sample { bias: Some(bias.into_dyn()), ..dense.clone() }));
    let pairs = num_queries * num_keys;
    let mut bias = normal([pairs, shapes.bias_heads], 1.0, &mut rng);
    cases.push(("bias per head", Sample { bias: Some(bias.clone().into_dyn()), ..dense.clone() }));
    hide_some(&mut bias, &mut rng);
    // Query 0 sees nothing, and no query sees key 4.
    bias.slice_axis_mut(Axis(0), Slice::from(..num_keys)).fill(F::neg_infinity());
    let key_4 = Slice::new(4, None, num_keys as isize);
    bias.slice_axis_mut(Axis(0), key_4).fill(F::neg_infinity());
    cases.push(("bias that hides", Sample { bias: Some(bias.into_dyn()), ..dense.clone() }));
    let bias_of_keys = normal([shapes.bias_heads, num_keys], 1.0, &mut other_rng);
    let bias_of_keys = Some(bias_of_keys.insert_axis(Axis(1)).into_dyn());
    cases.push(("bias of keys", Sample { bias: bias_of_keys.clone(), ..dense.clone() }));
    // Head 0 sees nothing at query 3.
    let heads = (shapes.bias_heads, num_queries, num_keys);
    let of_heads = Array3::from_shape_fn(heads, |(head, query, _)| {
        (head, query) != (0, 3) && other_rng.random_range(0..3) > 0
    });
    let of_heads = Some(of_heads.into_dyn());
    cases.push(("mask per head", Sample { mask: of_heads.clone(), ..dense.clone() }));
    let some = |pairs: usize| Array1::from_shape_fn(pairs, |pair| pair % 4 != 1);
    cases.push(("mask of pairs", Sample { pair_mask: Some(some(pairs)), ..dense.clone() }));
    cases.push(("dropout", Sample { dropout, ..dense.clone() }));
    let mut weights_rng = Xoshiro256PlusPlus::seed_from_u64(2019);
    let weights = normal([pairs, 1], 1.0, &mut weights_rng);
    cases.push(("weights of pairs", Sample { pair_weights: Some(weights), ..dense.clone() }));
    let mut hides = normal([pairs, shapes.bias_heads], 1.0, &mut weights_rng);
    hide_some(&mut hides, &mut weights_rng);
    let bias = Some(hides.into_dyn());
    let mut weights_of_heads =
        |pairs: usize| Some(normal([pairs, shapes.bias_heads], 1.0, &mut weights_rng));
    let pair_weights = weights_of_heads(pairs);
    let weighted = Sample { pair_weights, bias, dropout, ..dense.clone() };
    cases.push(("weights of pairs under bias and dropout", weighted));
    let (causal, pair_weights) = (Some(Causal::TopLeft), weights_of_heads(pairs));
    cases.push(("causal weights of pairs", Sample { causal, pair_weights, ..dense.clone() }));
    let mut zeros = Sample { has_zeros: true, ..dense.clone() };
    zeros.query.row_mut(1).fill(F::zero());
    [3, 5].into_iter().for_each(|key| zeros.key.row_mut(key).fill(F::zero()));
    zeros.value.row_mut(3).fill(F::zero());
    cases.push(("rows of zeros", zeros));
    cases.push(("dense", dense));
    for (case, num_queries, num_keys) in [
        ("one query", 1, num_keys),
        ("one key", num_queries, 1),
        ("no keys", num_queries, 0),
        ("no queries", 0, num_keys),
    ] {
        cases.push((case, Sample::dense(shapes, num_queries, num_keys, &mut rng)));
    }

    // Queries 0 and 1 see the keys 0 to 2, nobody sees key 3, and queries 2 to 4 see the keys 4 to 6.
    let segments = Segments::from_query_key_lengths(&[2, 0, 3], &[3, 1, 3]).expect("as many");
    let pairs = segments.num_pairs();
    let mut packed = Sample::dense(shapes, num_queries, num_keys, &mut other_rng);
    packed.draw_pair_data(pairs, &mut other_rng);
    packed.segments = Some(segments);
    for (case, causal) in [
        ("packed", None),
        ("packed causal", Some(Causal::TopLeft)),
        ("packed causal bottom right", Some(Causal::BottomRight)),
    ] {
        cases.push((case, Sample { causal, ..packed.clone() }));
    }
    let mut bias = normal([pairs, shapes.bias_heads], 1.0, &mut other_rng);
    hide_some(&mut bias, &mut other_rng);
    cases.push(("packed bias", Sample { bias: Some(bias.into_dyn()), ..packed.clone() }));
    let bias = normal([shapes.bias_heads, num_keys], 1.0, &mut other_rng).insert_axis(Axis(1));
    cases.push(("packed bias of keys", Sample { bias: Some(bias.into_dyn()), ..packed.clone() }));
    let packed_mask = Some(mask.clone().into_dyn());
    cases.push(("packed mask", Sample { mask: packed_mask, ..packed.clone() }));
    let pair_mask = Some(some(pairs));
    cases.push(("packed mask of pairs", Sample { pair_mask, ..packed.clone() }));
    let pair_weights = weights_of_heads(pairs);
    cases.push(("packed weights of pairs", Sample { pair_weights, ..packed.clone() }));
    cases.push(("packed dropout", Sample { dropout, ..packed }));

    // Query 3 and key 6 have no edges; some edges are parallel, some are loops.
    let mut edges: Vec<(usize, usize)> =
        (0..13).map(|_| ([0, 1, 2, 4][rng.random_range(0..4)], rng.random_range(0..6))).collect();
    edges.extend([(1, 1), (4, 4), edges[0], edges[5], (1, 1)]);
    let num_edges = edges.len();
    let graph = Graph::from_edges(num_queries, num_keys, edges).expect("edges in range");
    let graph = Sample::graph(shapes, graph, &mut rng);
    cases.push(("graph mask", Sample { mask: Some(mask.into_dyn()), ..graph.clone() }));
    cases.push(("graph mask per head", Sample { mask: of_heads, ..graph.clone() }));
    let pair_mask = Some(some(num_edges));
    cases.push(("graph mask of pairs", Sample { pair_mask, ..graph.clone() }));
    cases.push(("graph causal", Sample { causal: Some(Causal::TopLeft), ..graph.clone() }));
    let mut bias = normal([num_edges, shapes.bias_heads], 1.0, &mut rng);
    hide_some(&mut bias, &mut rng);
    // No query sees key 1.
    let edges_to_1 = graph.graph.iter().flat_map(|graph| graph.transpose().row(1));
    edges_to_1.for_each(|(_, edge)| bias.row_mut(edge).fill(F::neg_infinity()));
    cases.push(("graph bias", Sample { bias: Some(bias.into_dyn()), ..graph.clone() }));
    cases.push(("graph bias of keys", Sample { bias: bias_of_keys, ..graph.clone() }));
    let pair_weights = weights_of_heads(num_edges);
    cases.push(("graph weights of pairs", Sample { pair_weights, ..graph.clone() }));
    cases.push(("graph dropout", Sample { dropout, ..graph.clone() }));
    cases.push(("graph", graph));
    let empty = Graph::from_edges(num_queries, num_keys, []).expect("no edges");
    cases.push(("graph without edges", Sample::graph(shapes, empty, &mut rng)));
    cases
}

fn hide_some<F: Float>(bias: &mut Array2<F>, rng: &mut impl rand::Rng) {
    for logit in bias.iter_mut() {
        if rng.random_range(0..4) == 0 {
            *logit = F::neg_infinity();
        }
    }
}

/// Draws normal numbers with the given standard deviation.
pub(super) fn normal<F: Float>(
    shape: [usize; 2],
    deviation: f64,
    rng: &mut impl rand::Rng,
) -> Array2<F> {
    Array2::from_shape_simple_fn(shape, || {
        let value: f64 = StandardNormal.sample(rng);
        F::from_f64(deviation * value)
    })
}
