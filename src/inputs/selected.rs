//! Some of the queries of inputs, as inputs of their own.

use super::{Bias, Inputs, Origin, Pattern, Positions, View2};
use crate::error::{Channel, Error, Result};
use crate::float::{Float, try_vec, try_zeros};
use crate::gradients::GradientsMut;
use crate::graph::Graph;
use ndarray::{Array2, ArrayViewMut2, Axis, s};
use std::ops::Range;

/// Inputs of some queries: what [`Inputs::select_queries`] gathers. Owns what it had to copy and
/// lends it as [`inputs`](Self::inputs); keys and values are still the caller's.
#[derive(Debug)]
pub struct SelectedInputs<'a, F: Float> {
    whole: Inputs<'a, F>,
    numbers: Numbers,
    /// Numbers further back, where `whole` itself is selected.
    outermost: Option<Numbers>,
    query: Array2<F>,
    graph: Option<Graph>,
    mask: Option<Array2<bool>>,
    bias: Option<Array2<F>>,
    edge_features: Option<Array2<F>>,
    /// One column.
    distances: Option<Array2<F>>,
    layers: Option<Vec<u8>>,
    query_positions: Option<Array2<F>>,
    latent: Option<Graph>,
}

/// The numbers that selected queries and pairs have in other inputs.
#[derive(Debug)]
struct Numbers {
    /// Strictly ascending.
    queries: Vec<usize>,
    /// On a graph; in dense inputs the numbers follow from query and key.
    pairs: Option<Vec<usize>>,
    /// Of the second graph.
    latent_pairs: Option<Vec<usize>>,
}

impl<'a, F: Float> Inputs<'a, F> {
    /// The inputs of some queries: query i of the result is query `queries[i]`, with its pairs and
    /// all channels. For mechanisms that hand each query to another one, such as a mixture of experts.
    ///
    /// Gathers the rows of queries and of their pairs, O(selected queries · columns + selected pairs
    /// with data); keys and values are shared. The pairs are numbered anew, for the gathered per-pair
    /// arrays, but a causal pattern keeps its diagonal and [dropout](Self::dropout_multiplier) its
    /// mask: a query gets the answer that it gets among all.
    ///
    /// ```
    /// use graph_attention::{Attention, Flash, Inputs};
    /// use graph_attention::ndarray::{Axis, array};
    ///
    /// let x = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
    /// let inputs = Inputs::dense(x.view(), x.view(), x.view())?.causal();
    /// let selected = inputs.select_queries(&[0, 2])?;
    /// let out = Flash::new().forward(&selected.inputs())?;
    /// assert_eq!(out, Flash::new().forward(&inputs)?.select(Axis(0), &[0, 2]));
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] if `queries` are not numbers of queries in strictly ascending order;
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
            Pattern::Dense => (None, None),
            Pattern::Graph(graph) => {
                let (graph, pairs) = graph.select_queries(queries)?;
                (Some(graph), Some(pairs))
            }
        };
        let (latent, latent_pairs) = match self.latent {
            None => (None, None),
            Some(latent) => {
                let (latent, pairs) = latent.select_queries(queries)?;
                (Some(latent), Some(pairs))
            }
        };
        let numbers = Numbers { queries: queries.to_vec(), pairs, latent_pairs };
        let back = |pairs: &Option<Vec<usize>>, numbers: Option<&[usize]>| {
            let pairs = pairs.as_ref().zip(numbers);
            pairs.map(|(pairs, numbers)| pairs.iter().map(|&pair| numbers[pair]).collect())
        };
        let outermost = self.origin.map(|origin| Numbers {
            queries: queries.iter().map(|&query| origin.queries[query]).collect(),
            pairs: back(&numbers.pairs, origin.pairs),
            latent_pairs: back(&numbers.latent_pairs, origin.latent_pairs),
        });
        let rows = runs(queries);
        let pairs = self.rows_of_pairs(&numbers);
        let of_pairs = |what, array: Option<View2<'a, F>>| {
            array.map(|array| gather(what, array, &pairs)).transpose()
        };
        let bias = self
            .bias
            .map(|bias| gather("bias", bias.logits, if bias.is_matrix { &rows } else { &pairs }));
        let distances = self.distances.map(|distances| distances.insert_axis(Axis(1)));
        let layers = self
            .layers
            .map(|layers| pairs.iter().flat_map(|pairs| &layers[pairs.clone()]).copied().collect());
        Ok(SelectedInputs {
            outermost,
            query: gather("query", self.query, &rows)?,
            graph,
            mask: self.mask.map(|mask| gather("mask", mask, &rows)).transpose()?,
            bias: bias.transpose()?,
            edge_features: of_pairs("edge_features", self.edge_features)?,
            distances: of_pairs("distances", distances)?,
            layers,
            query_positions: (self.positions)
                .map(|positions| gather("query positions", positions.query, &rows))
                .transpose()?,
            latent,
            whole: *self,
            numbers,
        })
    }

    /// Where the data of selected pairs stand in arrays with one row per pair; not looked for if there
    /// is none.
    fn rows_of_pairs(&self, numbers: &Numbers) -> Vec<Range<usize>> {
        let channels = [Channel::Bias, Channel::EdgeFeatures, Channel::Distances, Channel::Layers];
        if !channels.into_iter().any(|channel| self.has(channel)) {
            return Vec::new();
        }
        if let Some(pairs) = &numbers.pairs {
            return runs(pairs);
        }
        let num_keys = self.num_keys();
        let rows = runs(&numbers.queries).into_iter();
        rows.map(|rows| rows.start * num_keys..rows.end * num_keys).collect()
    }
}

impl<F: Float> SelectedInputs<'_, F> {
    /// The inputs.
    #[must_use]
    pub fn inputs(&self) -> Inputs<'_, F> {
        let Numbers { queries, pairs, latent_pairs } =
            self.outermost.as_ref().unwrap_or(&self.numbers);
        let num_queries = self.whole.num_whole_queries();
        Inputs {
            query: self.query.view(),
            pattern: self.graph.as_ref().map_or(Pattern::Dense, Pattern::Graph),
            mask: self.mask.as_ref().map(|mask| mask.view()),
            bias: (self.bias.as_ref().zip(self.whole.bias))
                .map(|(logits, bias)| Bias { logits: logits.view(), ..bias }),
            edge_features: self.edge_features.as_ref().map(|features| features.view()),
            distances: self.distances.as_ref().map(|distances| distances.column(0)),
            layers: self.layers.as_deref(),
            positions: (self.query_positions.as_ref().zip(self.whole.positions))
                .map(|(query, positions)| Positions { query: query.view(), ..positions }),
            latent: self.latent.as_ref(),
            origin: Some(Origin {
                queries,
                pairs: pairs.as_deref(),
                latent_pairs: latent_pairs.as_deref(),
                num_queries,
            }),
            ..self.whole
        }
    }

    /// The numbers of the queries in the inputs that they were selected from, ascending.
    #[must_use]
    pub fn queries(&self) -> &[usize] {
        &self.numbers.queries
    }

    /// Runs a backward pass on [`inputs`](Self::inputs) with gradients that fit them, and adds what
    /// it finds to `grads`, the gradients of the inputs that these were selected from. Those of keys,
    /// values and parameters are lent as they are.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::MissingInput`] if `grads` do not fit the whole inputs,
    /// [`Error::TooLarge`], and those of `backward`.
    pub fn backward(
        &self,
        grads: GradientsMut<'_, F>,
        backward: impl FnOnce(&Inputs<'_, F>, GradientsMut<'_, F>) -> Result<()>,
    ) -> Result<()> {
        grads.check_inputs("selected queries", &self.whole)?;
        let GradientsMut { query, key, value, bias, edge_features, distances, params } = grads;
        let inputs = self.inputs();
        let shapes = inputs.gradient_shapes();
        let zeros = |what, wanted: bool, shape: Option<[usize; 2]>| {
            let shape = shape.filter(|_| wanted);
            shape.map(|[rows, columns]| try_zeros::<F>(what, rows, columns)).transpose()
        };
        let distances = distances.map(|grad| grad.insert_axis(Axis(1)));
        let column = shapes.distances.map(|[len]| [len, 1]);
        let mut of_query = zeros("grads.query", query.is_some(), Some(shapes.query))?;
        let mut of_bias = zeros("grads.bias", bias.is_some(), shapes.bias)?;
        let mut of_features =
            zeros("grads.edge_features", edge_features.is_some(), shapes.edge_features)?;
        let mut of_distances = zeros("grads.distances", distances.is_some(), column)?;
        let selected = GradientsMut {
            query: of_query.as_mut().map(|grad| grad.view_mut()),
            key,
            value,
            bias: of_bias.as_mut().map(|grad| grad.view_mut()),
            edge_features: of_features.as_mut().map(|grad| grad.view_mut()),
            distances: (of_distances.as_mut()).map(|grad| grad.index_axis_mut(Axis(1), 0)),
            params,
        };
        backward(&inputs, selected)?;

        let rows = runs(&self.numbers.queries);
        let pairs = self.whole.rows_of_pairs(&self.numbers);
        let is_matrix = self.whole.bias.is_some_and(|bias| bias.is_matrix);
        for (whole, selected, runs) in [
            (query, of_query, &rows),
            (bias, of_bias, if is_matrix { &rows } else { &pairs }),
            (edge_features, of_features, &pairs),
            (distances, of_distances, &pairs),
        ] {
            if let (Some(whole), Some(selected)) = (whole, selected) {
                scatter(&selected, runs, whole);
            }
        }
        Ok(())
    }
}

/// Numbers as ranges of consecutive ones, in the same order.
fn runs(numbers: &[usize]) -> Vec<Range<usize>> {
    let runs = numbers.chunk_by(|&number, &next| number + 1 == next);
    runs.map(|run| run[0]..run[0] + run.len()).collect()
}

/// The rows of a matrix, one run after the other.
fn gather<T: Copy + Default>(
    what: &'static str,
    matrix: View2<'_, T>,
    runs: &[Range<usize>],
) -> Result<Array2<T>> {
    let shape = (runs.iter().map(|run| run.len()).sum(), matrix.ncols());
    let data = try_vec(what, &[shape.0, shape.1], T::default())?;
    let mut gathered = Array2::from_shape_vec(shape, data)
        .map_err(|_| Error::TooLarge { what, shape: vec![shape.0, shape.1] })?;
    let mut first = 0;
    for run in runs {
        let end = first + run.len();
        gathered.slice_mut(s![first..end, ..]).assign(&matrix.slice(s![run.clone(), ..]));
        first = end;
    }
    Ok(gathered)
}

/// Adds gathered rows to where they came from.
fn scatter<F: Float>(
    gathered: &Array2<F>,
    runs: &[Range<usize>],
    mut matrix: ArrayViewMut2<'_, F>,
) {
    let mut first = 0;
    for run in runs {
        let end = first + run.len();
        let mut rows = matrix.slice_mut(s![run.clone(), ..]);
        rows += &gathered.slice(s![first..end, ..]);
        first = end;
    }
}
