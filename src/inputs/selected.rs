//! Selection of queries, keys or pairs of inputs as new inputs.

use super::bias::{Logits, slot_of};
use super::{Inputs, Origin, Pair, Pattern, Positions, View2, View3};
use crate::element::{Element, try_array};
use crate::error::{Channel, Error, Result};
use crate::gradients::GradientsMut;
use crate::graph::Graph;
use crate::prefetch::prefetch;
use crate::segments::Segments;
use ndarray::{
    Array, Array1, Array2, Array3, ArrayBase, ArrayView2, ArrayViewMut, ArrayViewMut2,
    ArrayViewMut3, Axis, Dim, Dimension, Ix2, Ix3, Slice, ViewRepr, s,
};
use std::ops::Range;

/// The inputs of some queries, gathered by [`Inputs::select_queries`]. Owns the arrays that had to be
/// copied and borrows the others: keys and values, and evenly spaced queries.
/// [`inputs`](Self::inputs) returns them as [`Inputs`].
#[derive(Debug)]
pub struct SelectedInputs<'a, F: Element> {
    whole: Inputs<'a, F>,
    numbers: Numbers,
    /// The numbers in the inputs that `whole` was selected from, if it was.
    outermost: Option<Numbers>,
    // Arrays that are `None` here are taken from `whole`.
    query: Option<Gathered<'a, F>>,
    key: Option<Gathered<'a, F>>,
    value: Option<Gathered<'a, F>>,
    graph: Option<Graph>,
    segments: Option<Segments>,
    mask: Option<Gathered<'a, bool, Ix3>>,
    pair_mask: Option<Array1<bool>>,
    /// Has three axes.
    bias: Option<Gathered<'a, F, Ix3>>,
    pair_weights: Option<Gathered<'a, F>>,
    edge_features: Option<Gathered<'a, F>>,
    /// Has one column.
    distances: Option<Gathered<'a, F>>,
    layers: Option<Vec<u8>>,
    query_positions: Option<Gathered<'a, F>>,
    latent: Option<Graph>,
}

/// Some rows of a matrix, or some queries and keys of heads × queries × keys.
#[derive(Debug)]
pub(crate) enum Gathered<'a, T, D: Dimension = Ix2> {
    /// A view of the original array.
    View(ArrayBase<ViewRepr<&'a T>, D, T>),
    Copy(Array<T, D>),
}

impl<T, D: Dimension> Gathered<'_, T, D> {
    pub(crate) fn view(&self) -> ArrayBase<ViewRepr<&T>, D, T> {
        match self {
            Self::View(rows) => rows.view(),
            Self::Copy(rows) => rows.view(),
        }
    }
}

/// The numbers of selected rows.
#[derive(Clone, Debug)]
pub(crate) enum Rows {
    /// `len` rows from `first` on, `step` apart.
    Every { first: usize, step: usize, len: usize },
    /// Ranges of consecutive rows.
    Runs(Vec<Range<usize>>),
}

impl Rows {
    /// Creates rows from ascending numbers.
    fn new(numbers: &[usize]) -> Self {
        let first = numbers.first().copied().unwrap_or(0);
        let step = numbers.get(1).map_or(1, |second| second - first);
        if numbers.windows(2).all(|pair| pair[0] + step == pair[1]) {
            return Self::Every { first, step, len: numbers.len() };
        }
        Self::Runs(runs(numbers))
    }

    /// Returns the slice of an axis that they form; `None` for runs.
    fn slice(&self) -> Option<Slice> {
        let &Self::Every { first, step, len } = self else { return None };
        let end = first + if len == 0 { 0 } else { (len - 1) * step + 1 };
        Some(Slice::new(first as isize, Some(end as isize), step as isize))
    }

    /// Returns a view of these rows of a matrix; `None` for runs.
    pub(crate) fn of_mut<'m, T>(
        &self,
        matrix: ArrayViewMut2<'m, T>,
    ) -> Option<ArrayViewMut2<'m, T>> {
        self.along_mut(Axis(0), matrix)
    }

    fn along_mut<'m, T, D: Dimension>(
        &self,
        axis: Axis,
        mut array: ArrayViewMut<'m, T, D>,
    ) -> Option<ArrayViewMut<'m, T, D>> {
        array.slice_axis_inplace(axis, self.slice()?);
        Some(array)
    }
}

/// The numbers of selected queries, keys and pairs in other inputs; `None` if all are selected.
#[derive(Debug, Default)]
struct Numbers {
    /// Strictly ascending.
    queries: Option<Vec<usize>>,
    /// Strictly ascending.
    keys: Option<Vec<usize>>,
    /// Only on a graph; in dense inputs the numbers follow from query and key.
    pairs: Option<Vec<usize>>,
    /// The pairs of the second graph.
    latent_pairs: Option<Vec<usize>>,
}

impl<'a, F: Element> Inputs<'a, F> {
    /// Selects some queries: query i of the result is query `queries[i]`, with its pairs and all channels.
    /// For mechanisms that pass different queries to different mechanisms, such as a mixture of experts.
    ///
    /// Gathers the rows of the queries and of their pairs in O(selected queries · columns + selected pairs
    /// with data); keys and values are shared. The pairs get new numbers, which the gathered per-pair
    /// arrays follow, but a causal pattern keeps its diagonal and [dropout](Self::dropout_multiplier) its
    /// mask: the output of a query is the same as in the whole inputs.
    ///
    /// ```
    /// use graph_attention::{Attention, Flash, Inputs};
    /// use graph_attention::ndarray::{Axis, array};
    ///
    /// let x = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
    /// let inputs = Inputs::dense(x.view(), x.view(), x.view())?.with_causal();
    /// let selected = inputs.select_queries(&[0, 2])?;
    /// let out = Flash::new().forward(&selected.inputs())?;
    /// assert_eq!(out, Flash::new().forward(&inputs)?.select(Axis(0), &[0, 2]));
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `queries` are not numbers of queries in strictly ascending order;
    /// [`Error::TooLarge`] if the arrays do not fit in memory.
    pub fn select_queries(&self, queries: &[usize]) -> Result<SelectedInputs<'a, F>> {
        let mut first = 0;
        for (position, &query) in queries.iter().enumerate() {
            if query < first || query >= self.num_queries() {
                let expected = format!("numbers below {}, in ascending order", self.num_queries());
                let actual = format!("{query} at position {position}");
                return Err(Error::config("queries", expected, actual));
            }
            first = query + 1;
        }
        let (graph, pairs) = match self.pattern {
            Pattern::Dense | Pattern::Packed(_) => (None, None),
            Pattern::Graph(graph) => {
                let (graph, pairs) = graph.select_queries(queries)?;
                (Some(graph), Some(pairs))
            }
        };
        let queries = Some(queries.to_vec());
        let numbers = Numbers { queries, pairs, ..Numbers::default() };
        self.gather(numbers, graph)
    }

    /// Selects some queries and keys of dense inputs, both by ascending numbers, `None` for all. Keeps
    /// everything that exact softmax attention reads; data of pairs, positions and latent neighbours are
    /// left out.
    pub(crate) fn select_block(
        &self,
        queries: Option<Vec<usize>>,
        keys: Option<Vec<usize>>,
    ) -> Result<SelectedInputs<'a, F>> {
        debug_assert!(matches!(self.pattern, Pattern::Dense));
        let read = self.with_only(&[Channel::EdgeLayers]);
        read.gather(Numbers { queries, keys, ..Numbers::default() }, None)
    }

    /// Selects the keys from the first to the last that causal pattern and window leave to some query of dense
    /// inputs; `None` if these are all keys. So the cost of a window follows the window, not the number of keys.
    /// Of data of pairs, keeps what is read; positions and latent neighbours are left out.
    pub(crate) fn select_visible_keys(
        &self,
        reads: &[Channel],
    ) -> Result<Option<SelectedInputs<'a, F>>> {
        let is_limited = self.causal.is_some() || self.has_window();
        if !self.is_dense() || !is_limited || self.num_queries() == 0 {
            return Ok(None);
        }
        let keys = self.first_visible_key(0)..self.num_visible_keys(self.num_queries() - 1);
        if keys.len() == self.num_keys() {
            return Ok(None);
        }
        let numbers = Numbers { keys: Some(keys.collect()), ..Numbers::default() };
        self.with_only(reads).gather(numbers, None).map(Some)
    }

    /// As [`select_visible_keys`](Self::select_visible_keys), and also selects the keys of a graph with few edges:
    /// for mechanisms that first compute something of each key.
    pub(crate) fn select_seen_keys(
        &self,
        reads: &[Channel],
    ) -> Result<Option<SelectedInputs<'a, F>>> {
        let Pattern::Graph(graph) = self.pattern else { return self.select_visible_keys(reads) };
        // The segments count keys in the whole inputs.
        if graph.num_edges() >= self.num_keys() / 2 || self.segments.is_some() {
            return Ok(None);
        }
        let (graph, keys) = graph.select_linked_keys()?;
        let numbers = Numbers { keys: Some(keys), ..Numbers::default() };
        self.with_only(reads).gather(numbers, Some(graph)).map(Some)
    }

    /// Returns the same inputs without the data of pairs that are not read, positions and latent neighbours.
    fn with_only(&self, reads: &[Channel]) -> Self {
        let reads = |channel| reads.contains(&channel);
        Inputs {
            edge_features: self.edge_features.filter(|_| reads(Channel::EdgeFeatures)),
            distances: self.distances.filter(|_| reads(Channel::Distances)),
            layers: self.layers.filter(|_| reads(Channel::EdgeLayers)),
            positions: None,
            latent: None,
            ..*self
        }
    }

    /// Selects some of the pairs. Dense inputs get a mask and keep all data unchanged.
    pub(crate) fn select_pairs(
        &self,
        keep: impl Fn(Pair) -> bool,
    ) -> Result<SelectedInputs<'a, F>> {
        let mut numbers = Numbers::default();
        match self.pattern {
            Pattern::Dense => {
                let heads = self.mask.map_or(1, |mask| mask.shape()[0]);
                let shape = [heads, self.num_queries(), self.num_keys()];
                let mut mask = try_array("mask", Dim(shape), false)?;
                for pair in (0..shape[1]).flat_map(|query| self.row(query)) {
                    let is_kept = keep(pair);
                    for head in 0..heads {
                        let sees = |mask: View3<'_, bool>| mask[slot_of(&mask, pair, head)];
                        mask[[head, pair.query, pair.key]] = is_kept && self.mask.is_none_or(sees);
                    }
                }
                let mask = Some(Gathered::Copy(mask));
                Ok(SelectedInputs { mask, ..self.gather(numbers, None)? })
            }
            Pattern::Packed(_) => {
                let mut mask = try_array("mask", Dim([self.num_pairs()]), false)?;
                for pair in (0..self.num_queries()).flat_map(|query| self.row(query)) {
                    mask[pair.index] = keep(pair);
                }
                Ok(SelectedInputs { pair_mask: Some(mask), ..self.gather(numbers, None)? })
            }
            Pattern::Graph(graph) => {
                let (graph, pairs) =
                    graph.filter_edges(|query, key, index| keep(Pair { query, key, index }))?;
                numbers.pairs = Some(pairs);
                self.gather(numbers, Some(graph))
            }
        }
    }

    fn gather(&self, mut numbers: Numbers, graph: Option<Graph>) -> Result<SelectedInputs<'a, F>> {
        let latent = self.latent.zip(numbers.queries.as_deref());
        let latent = latent.map(|(latent, queries)| latent.select_queries(queries)).transpose()?;
        let (latent, latent_pairs) = latent.unzip();
        numbers.latent_pairs = latent_pairs;
        let segments = self.segments.zip(numbers.queries.as_deref());
        let segments =
            segments.map(|(segments, queries)| segments.select_queries(queries)).transpose()?;
        let outermost = self.origin.map(|origin| Numbers {
            queries: renumber(numbers.queries.as_deref(), origin.queries),
            keys: renumber(numbers.keys.as_deref(), origin.keys),
            pairs: renumber(numbers.pairs.as_deref(), origin.pairs),
            latent_pairs: renumber(numbers.latent_pairs.as_deref(), origin.latent_pairs),
        });
        let [rows, columns] =
            [&numbers.queries, &numbers.keys].map(|numbers| numbers.as_deref().map(Rows::new));
        let pairs = self.rows_of_pairs(&numbers);
        let of_queries = |what, array| gather_rows(what, array, rows.as_ref());
        let of_keys = |what, array| gather_rows(what, array, columns.as_ref());
        let rows_of_pairs = pairs.clone().map(Rows::Runs);
        let of_pairs = |what, array: Option<View2<'a, F>>| match array {
            Some(array) => gather_rows(what, array, rows_of_pairs.as_ref()),
            None => Ok(None),
        };
        let bias = match self.bias {
            Some(Logits::Grid { grid, .. }) => gather_grid("bias", grid, &numbers)?,
            Some(Logits::Pairs(logits)) => of_pairs("bias", Some(logits))?.map(|rows| match rows {
                Gathered::View(rows) => Gathered::View(rows.insert_axis(Axis(0))),
                Gathered::Copy(rows) => Gathered::Copy(rows.insert_axis(Axis(0))),
            }),
            None => None,
        };
        let distances = self.distances.map(|distances| distances.insert_axis(Axis(1)));
        let layers = self.layers.zip(pairs.as_ref()).map(|(layers, pairs)| {
            pairs.iter().flat_map(|pairs| &layers[pairs.clone()]).copied().collect()
        });
        let pair_mask = self.pair_mask.zip(pairs.as_ref()).map(|(mask, pairs)| {
            pairs.iter().flat_map(|pairs| pairs.clone().map(|pair| mask[pair])).collect()
        });
        Ok(SelectedInputs {
            outermost,
            segments,
            query: of_queries("query", self.query)?,
            key: of_keys("key", self.key)?,
            value: of_keys("value", self.value)?,
            graph,
            mask: self.mask.map_or(Ok(None), |mask| gather_grid("mask", mask, &numbers))?,
            pair_mask,
            bias,
            pair_weights: of_pairs("pair_weights", self.pair_weights)?,
            edge_features: of_pairs("edge_features", self.edge_features)?,
            distances: of_pairs("distances", distances)?,
            layers,
            query_positions: (self.positions)
                .map_or(Ok(None), |positions| of_queries("query positions", positions.query))?,
            latent,
            whole: *self,
            numbers,
        })
    }

    /// Returns the rows of the selected pairs in arrays with one row per pair; `None` if all are selected or
    /// there are no such arrays.
    fn rows_of_pairs(&self, numbers: &Numbers) -> Option<Vec<Range<usize>>> {
        let channels = [
            Channel::Bias,
            Channel::PairWeights,
            Channel::EdgeFeatures,
            Channel::Distances,
            Channel::EdgeLayers,
        ];
        let is_there = channels.into_iter().any(|channel| self.has(channel));
        if !is_there && self.pair_mask.is_none() {
            return None;
        }
        if let Some(pairs) = &numbers.pairs {
            return Some(runs(pairs));
        }
        if let Pattern::Graph(_) = self.pattern {
            return None;
        }
        if let Pattern::Packed(segments) = self.pattern {
            let queries = numbers.queries.as_deref()?.iter();
            return Some(queries.map(|&query| segments.pairs_of_query(query)).collect());
        }
        let num_keys = self.num_keys();
        let rows = numbers.queries.as_deref().map(runs);
        let Some(keys) = &numbers.keys else {
            let in_pairs = |rows: Range<usize>| rows.start * num_keys..rows.end * num_keys;
            return rows.map(|rows| rows.into_iter().map(in_pairs).collect());
        };
        let all = 0..self.num_queries();
        let rows = rows.unwrap_or_else(|| vec![all]).into_iter().flatten();
        let keys = runs(keys);
        let of_row = |row: usize| {
            let first = row * num_keys;
            keys.iter().map(move |keys| first + keys.start..first + keys.end)
        };
        Some(rows.flat_map(of_row).collect())
    }
}

impl<F: Element> SelectedInputs<'_, F> {
    /// Returns the selected inputs, to run a mechanism on.
    #[must_use]
    pub fn inputs(&self) -> Inputs<'_, F> {
        let numbers = self.outermost.as_ref().unwrap_or(&self.numbers);
        let [num_queries, num_keys] = self.whole.whole_sizes();
        fn view<'s, T, D: Dimension>(
            array: &'s Option<Gathered<'_, T, D>>,
        ) -> Option<ArrayBase<ViewRepr<&'s T>, D, T>> {
            array.as_ref().map(Gathered::view)
        }
        let whole = &self.whole;
        let segments = self.segments.as_ref().or(whole.segments);
        Inputs {
            query: view(&self.query).unwrap_or(whole.query),
            key: view(&self.key).unwrap_or(whole.key),
            value: view(&self.value).unwrap_or(whole.value),
            pattern: match (&self.graph, segments) {
                (Some(graph), _) => Pattern::Graph(graph),
                (None, Some(segments)) => Pattern::Packed(segments),
                (None, None) => Pattern::Dense,
            },
            segments,
            mask: view(&self.mask).or(whole.mask),
            pair_mask: self.pair_mask.as_ref().map(|mask| mask.view()).or(whole.pair_mask),
            bias: whole.bias.map(|bias| match view(&self.bias) {
                Some(logits) => bias.with_grid(logits),
                None => bias,
            }),
            pair_weights: view(&self.pair_weights).or(whole.pair_weights),
            edge_features: view(&self.edge_features).or(whole.edge_features),
            distances: view(&self.distances)
                .map(|distances| distances.index_axis_move(Axis(1), 0))
                .or(whole.distances),
            layers: self.layers.as_deref().or(whole.layers),
            positions: whole.positions.map(|positions| Positions {
                query: view(&self.query_positions).unwrap_or(positions.query),
                ..positions
            }),
            latent: self.latent.as_ref().or(whole.latent),
            origin: Some(Origin {
                queries: numbers.queries.as_deref(),
                keys: numbers.keys.as_deref(),
                pairs: numbers.pairs.as_deref(),
                latent_pairs: numbers.latent_pairs.as_deref(),
                num_queries,
                num_keys,
                first_query: whole.first_number(),
                segments: whole.whole_segments(),
            }),
            ..*whole
        }
    }

    /// Returns the numbers of the queries in the inputs that they were selected from, ascending.
    #[must_use]
    pub fn queries(&self) -> &[usize] {
        self.some_queries().unwrap_or_default()
    }

    /// Returns the [`queries`](Self::queries); `None` if all were selected.
    pub(crate) fn some_queries(&self) -> Option<&[usize]> {
        self.numbers.queries.as_deref()
    }

    /// Returns the rows of the queries in the inputs that they were selected from; `None` for all.
    pub(crate) fn query_rows(&self) -> Option<Rows> {
        self.some_queries().map(Rows::new)
    }

    /// Selects the rows of these queries from a matrix with one row per query of the whole inputs.
    pub(crate) fn rows_of_queries<'m>(
        &self,
        what: &'static str,
        matrix: ArrayView2<'m, F>,
    ) -> Result<Gathered<'m, F>> {
        let rows = self.query_rows();
        Ok(gather_rows(what, matrix, rows.as_ref())?.unwrap_or(Gathered::View(matrix)))
    }

    /// Selects the rows of these pairs from a matrix with one row per pair of the whole inputs.
    pub(crate) fn rows_of_weights<'m>(
        &self,
        weights: ArrayView2<'m, F>,
    ) -> Result<Gathered<'m, F>> {
        let rows = self.numbers.pairs.as_deref().map(|pairs| Rows::Runs(runs(pairs)));
        let rows = gather_rows("grad_weights", weights, rows.as_ref())?;
        Ok(rows.unwrap_or(Gathered::View(weights)))
    }

    /// Adds the weights of these pairs, times `factor(query, head)`, to the weights of all pairs.
    pub(crate) fn add_weights(
        &self,
        weights: &Array2<F>,
        total: &mut Array2<F>,
        factor: impl Fn(usize, usize) -> F,
    ) {
        let inputs = self.inputs();
        for pair in (0..inputs.num_queries()).flat_map(|query| inputs.row(query)) {
            let index = self.numbers.pairs.as_ref().map_or(pair.index, |pairs| pairs[pair.index]);
            for head in 0..weights.ncols() {
                let weight = weights[[pair.index, head]];
                total[[index, head]] += factor(pair.query, head) * weight;
            }
        }
    }

    /// Returns an error about a selected key as one about the same key of the whole inputs.
    pub(crate) fn in_whole(&self, error: Error) -> Error {
        match (error, &self.numbers.keys) {
            (Error::Domain { what, row, norm, limit }, Some(keys)) if !what.ends_with("query") => {
                Error::Domain { what, row: keys[row], norm, limit }
            }
            (error, _) => error,
        }
    }

    /// Runs [`backward`](Self::backward) for inputs from which data of pairs and positions may have been left out,
    /// because the mechanism does not read them. Their gradients stay as they are.
    pub(crate) fn backward_of_read(
        &self,
        mut grads: GradientsMut<'_, F>,
        backward: impl FnOnce(&Inputs<'_, F>, GradientsMut<'_, F>) -> Result<()>,
    ) -> Result<()> {
        let mut read = grads.reborrow();
        read.edge_features = read.edge_features.filter(|_| self.whole.edge_features.is_some());
        read.distances = read.distances.filter(|_| self.whole.distances.is_some());
        (read.query_positions, read.key_positions) = (None, None);
        self.backward(read, backward)
    }

    /// Runs a backward pass on [`inputs`](Self::inputs) with gradients of their shapes, and adds the result
    /// to `grads`, the gradients of the inputs that these were selected from. `backward` writes directly to
    /// the gradients of the parameters and of arrays that were not copied.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::MissingInput`] if `grads` does not fit the whole inputs;
    /// [`Error::TooLarge`] if the arrays do not fit in memory; the errors of `backward`.
    pub fn backward(
        &self,
        mut grads: GradientsMut<'_, F>,
        backward: impl FnOnce(&Inputs<'_, F>, GradientsMut<'_, F>) -> Result<()>,
    ) -> Result<()> {
        grads.check_inputs("selected queries", &self.whole)?;
        let [rows, columns] = [&self.numbers.queries, &self.numbers.keys]
            .map(|numbers| numbers.as_deref().map(Rows::new));
        let mut copies = GatheredGradients {
            query: zeros_like("grads.query", &grads.query, &self.query)?,
            key: zeros_like("grads.key", &grads.key, &self.key)?,
            value: zeros_like("grads.value", &grads.value, &self.value)?,
            bias: zeros_like("grads.bias", &grads.bias, &self.bias)?,
            pair_weights: zeros_like(
                "grads.pair_weights",
                &grads.pair_weights,
                &self.pair_weights,
            )?,
            edge_features: zeros_like(
                "grads.edge_features",
                &grads.edge_features,
                &self.edge_features,
            )?,
            distances: zeros_like("grads.distances", &grads.distances, &self.distances)?,
            query_positions: zeros_like(
                "grads.query_positions",
                &grads.query_positions,
                &self.query_positions,
            )?,
        };
        // A bias that all queries share keeps its one row.
        let has_rows =
            matches!(self.whole.bias, Some(Logits::Grid { grid, .. }) if grid.shape()[1] > 1);
        let bias_rows = rows.as_ref().filter(|_| has_rows);
        let lent = copies.lend(grads.reborrow(), rows.as_ref(), columns.as_ref(), bias_rows);
        backward(&self.inputs(), lent)?;

        let GatheredGradients {
            query,
            key,
            value,
            bias,
            pair_weights,
            edge_features,
            distances,
            query_positions,
        } = copies;
        let pairs = self.whole.rows_of_pairs(&self.numbers).map(Rows::Runs);
        let distances_of_whole = grads.distances.map(|grad| grad.insert_axis(Axis(1)));
        let (whole_bias, bias) = match (grads.bias, bias, self.whole.bias) {
            (Some(whole), Some(bias), Some(Logits::Grid { .. })) => {
                scatter_grid(&bias, &self.numbers, whole);
                (None, None)
            }
            (whole, bias, _) => (
                whole.map(|whole| whole.index_axis_move(Axis(0), 0)),
                bias.map(|bias| bias.index_axis_move(Axis(0), 0)),
            ),
        };
        for (whole, selected, rows) in [
            (grads.query, query, &rows),
            (grads.key, key, &columns),
            (grads.value, value, &columns),
            (grads.query_positions, query_positions, &rows),
            (whole_bias, bias, &pairs),
            (grads.pair_weights, pair_weights, &pairs),
            (grads.edge_features, edge_features, &pairs),
            (distances_of_whole, distances, &pairs),
        ] {
            if let (Some(whole), Some(selected), Some(Rows::Runs(runs))) = (whole, selected, rows) {
                scatter_rows(&selected, runs, whole);
            }
        }
        Ok(())
    }
}

/// The gradients of copied arrays; `None` if the gradient is not wanted or the array was not copied.
struct GatheredGradients<F> {
    query: Option<Array2<F>>,
    key: Option<Array2<F>>,
    value: Option<Array2<F>>,
    bias: Option<Array3<F>>,
    pair_weights: Option<Array2<F>>,
    edge_features: Option<Array2<F>>,
    distances: Option<Array2<F>>,
    query_positions: Option<Array2<F>>,
}

impl<F: Element> GatheredGradients<F> {
    /// Returns views of these gradients, and of `whole` for the missing ones.
    fn lend<'g>(
        &'g mut self,
        whole: GradientsMut<'g, F>,
        rows: Option<&Rows>,
        columns: Option<&Rows>,
        bias_rows: Option<&Rows>,
    ) -> GradientsMut<'g, F> {
        fn lend<'g, F, D: Dimension>(
            copy: &'g mut Option<Array<F, D>>,
            whole: Option<ArrayViewMut<'g, F, D>>,
            rows: Option<&Rows>,
            axis: usize,
        ) -> Option<ArrayViewMut<'g, F, D>> {
            match (copy, rows) {
                (Some(copy), _) => Some(copy.view_mut()),
                (None, Some(rows)) => whole.and_then(|whole| rows.along_mut(Axis(axis), whole)),
                (None, None) => whole,
            }
        }
        let distances =
            self.distances.as_mut().map(|copy| copy.view_mut().index_axis_move(Axis(1), 0));
        GradientsMut {
            query: lend(&mut self.query, whole.query, rows, 0),
            key: lend(&mut self.key, whole.key, columns, 0),
            value: lend(&mut self.value, whole.value, columns, 0),
            bias: lend(&mut self.bias, whole.bias, bias_rows, 1),
            pair_weights: lend(&mut self.pair_weights, whole.pair_weights, None, 0),
            edge_features: lend(&mut self.edge_features, whole.edge_features, None, 0),
            distances: distances.or(whole.distances),
            query_positions: lend(&mut self.query_positions, whole.query_positions, rows, 0),
            key_positions: whole.key_positions,
            params: whole.params,
        }
    }
}

/// Creates zeros for the gradient of a copied array, if it is wanted.
fn zeros_like<F: Element, D: Dimension, G>(
    what: &'static str,
    wanted: &Option<G>,
    copy: &Option<Gathered<'_, F, D>>,
) -> Result<Option<Array<F, D>>> {
    match (wanted, copy) {
        (Some(_), Some(Gathered::Copy(copy))) => {
            try_array(what, copy.raw_dim(), F::zero()).map(Some)
        }
        _ => Ok(None),
    }
}

/// Converts numbers in selected inputs to numbers in the inputs that those were selected from.
fn renumber(numbers: Option<&[usize]>, origin: Option<&[usize]>) -> Option<Vec<usize>> {
    match (numbers, origin) {
        (Some(numbers), Some(origin)) => {
            Some(numbers.iter().map(|&number| origin[number]).collect())
        }
        (numbers, origin) => numbers.or(origin).map(<[usize]>::to_vec),
    }
}

/// Groups numbers into ranges of consecutive ones, in the same order.
fn runs(numbers: &[usize]) -> Vec<Range<usize>> {
    let runs = numbers.chunk_by(|&number, &next| number + 1 == next);
    runs.map(|run| run[0]..run[0] + run.len()).collect()
}

/// How many runs ahead to prefetch: the CPU cannot predict the next run if they are far apart.
const ASKED_AHEAD: usize = 12;

/// Selects rows of a matrix: evenly spaced rows as a view, others as a copy, run by run.
fn gather_rows<'a, T: Copy>(
    what: &'static str,
    mut matrix: View2<'a, T>,
    rows: Option<&Rows>,
) -> Result<Option<Gathered<'a, T>>> {
    let runs = match rows {
        None => return Ok(None),
        Some(Rows::Runs(runs)) => runs,
        Some(every) => {
            if let Some(slice) = every.slice() {
                matrix.slice_axis_inplace(Axis(0), slice);
            }
            return Ok(Some(Gathered::View(matrix)));
        }
    };
    let (rows, columns) = (runs.iter().map(|run| run.len()).sum(), matrix.ncols());
    let too_large = || Error::TooLarge { what, shape: vec![rows, columns] };
    let len = usize::checked_mul(rows, columns).ok_or_else(too_large)?;
    // Filling with zeros first would be an extra pass over memory.
    let mut gathered = Vec::new();
    gathered.try_reserve_exact(len).map_err(|_| too_large())?;
    match matrix.to_slice() {
        Some(data) => {
            let of_run = |run: &Range<usize>| &data[run.start * columns..run.end * columns];
            for (at, run) in runs.iter().enumerate() {
                if let Some(run) = runs.get(at + ASKED_AHEAD) {
                    prefetch(of_run(run));
                }
                gathered.extend_from_slice(of_run(run));
            }
        }
        None => {
            runs.iter().for_each(|run| gathered.extend(matrix.slice(s![run.clone(), ..]).iter()));
        }
    }
    let gathered = Array2::from_shape_vec((rows, columns), gathered).map_err(|_| too_large())?;
    Ok(Some(Gathered::Copy(gathered)))
}

/// Adds gathered rows to the rows that they came from.
fn scatter_rows<F: Element>(
    gathered: &Array2<F>,
    runs: &[Range<usize>],
    mut matrix: ArrayViewMut2<'_, F>,
) {
    let columns = gathered.ncols();
    let of_run = |run: &Range<usize>| run.start * columns..run.end * columns;
    let mut first = 0;
    if let (Some(gathered), Some(data)) = (gathered.as_slice(), matrix.as_slice_mut()) {
        for (at, run) in runs.iter().enumerate() {
            if let Some(run) = runs.get(at + ASKED_AHEAD) {
                prefetch(&data[of_run(run)]);
            }
            let end = first + run.len() * columns;
            let sums = data[of_run(run)].iter_mut().zip(&gathered[first..end]);
            sums.for_each(|(sum, &grad)| *sum += grad);
            first = end;
        }
        return;
    }
    for run in runs {
        let end = first + run.len();
        let mut rows = matrix.slice_mut(s![run.clone(), ..]);
        rows += &gathered.slice(s![first..end, ..]);
        first = end;
    }
}

/// Selects queries and keys of heads × queries × keys; an axis of length 1 is shared and is kept.
/// Evenly spaced queries with all keys are a view.
fn gather_grid<'a, T: Copy>(
    what: &'static str,
    mut grid: View3<'a, T>,
    numbers: &Numbers,
) -> Result<Option<Gathered<'a, T, Ix3>>> {
    let [queries, keys] = of_grid(grid.shape(), numbers);
    if let (Some(queries), None) = (queries, keys)
        && let Some(slice) = Rows::new(queries).slice()
    {
        grid.slice_axis_inplace(Axis(1), slice);
        return Ok(Some(Gathered::View(grid)));
    }
    let selected = |axis, numbers: Option<&[usize]>| numbers.map_or(grid.shape()[axis], <[_]>::len);
    let shape = [grid.shape()[0], selected(1, queries), selected(2, keys)];
    let too_large = || Error::TooLarge { what, shape: shape.to_vec() };
    if queries.is_none() && keys.is_none() {
        return Ok(None);
    }
    let len = shape.iter().try_fold(1, |len: usize, &axis| len.checked_mul(axis));
    let mut gathered = Vec::new();
    gathered.try_reserve_exact(len.ok_or_else(too_large)?).map_err(|_| too_large())?;
    for head in 0..shape[0] {
        for row in 0..shape[1] {
            let row = grid.slice(s![head, queries.map_or(row, |queries| queries[row]), ..]);
            match keys {
                Some(keys) => gathered.extend(keys.iter().map(|&key| row[key])),
                None => gathered.extend(row),
            }
        }
    }
    let gathered = Array3::from_shape_vec(shape, gathered).map_err(|_| too_large())?;
    Ok(Some(Gathered::Copy(gathered)))
}

/// Returns the selected queries and keys; `None` for an axis of heads × queries × keys that is shared.
fn of_grid<'n>(shape: &[usize], numbers: &'n Numbers) -> [Option<&'n [usize]>; 2] {
    let along = |axis: usize, numbers: &'n Option<Vec<usize>>| {
        numbers.as_deref().filter(|_| shape[axis] != 1)
    };
    [along(1, &numbers.queries), along(2, &numbers.keys)]
}

/// Adds gathered entries to the entries that they came from.
fn scatter_grid<F: Element>(
    gathered: &Array3<F>,
    numbers: &Numbers,
    mut grid: ArrayViewMut3<'_, F>,
) {
    let [queries, keys] = of_grid(grid.shape(), numbers);
    for ((head, row, column), &grad) in gathered.indexed_iter() {
        let query = queries.map_or(row, |queries| queries[row]);
        let key = keys.map_or(column, |keys| keys[column]);
        grid[[head, query, key]] += grad;
    }
}
