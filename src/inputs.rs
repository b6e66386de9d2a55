mod bias;
mod selected;
mod visible;

pub use bias::Bias;
pub(crate) use bias::BiasAxes;
pub use selected::SelectedInputs;
pub(crate) use visible::{Shown, hull};

use crate::dropout::{Dropout, PairDropout};
use crate::element::Element;
use crate::error::{Channel, Error, Result, check_shape};
use crate::graph::Graph;
use crate::segments::Segments;
use bias::{Logits, grid, hide_row, slot_of};
use ndarray::{
    ArrayBase, ArrayView, ArrayView1, ArrayView2, ArrayView3, Axis, Dimension, Ix1, Ix2, Ix3,
    ViewRepr, s,
};
use std::ops::Range;

// `ArrayView2<'a, F>` names its element through an associated type, which makes a struct that
// stores it invariant in `'a`, and then no decorator could lend it shorter-lived arrays. These are
// the same types with the element spelled out, and covariant.
type View1<'a, A> = ArrayBase<ViewRepr<&'a A>, Ix1, A>;
type View2<'a, A> = ArrayBase<ViewRepr<&'a A>, Ix2, A>;
type View3<'a, A> = ArrayBase<ViewRepr<&'a A>, Ix3, A>;

/// The inputs of an [`Attention`](crate::Attention): queries, keys, values, the pairs that
/// attend, and optional data for each pair. Holds only views, is cheap to copy, and is validated on
/// construction.
///
/// **Pairs.** A (query, key) that attends is a *pair*, and every pair has a number. In dense inputs
/// all `num_queries · num_keys` pairs exist, and query i with key j has the number
/// `i · num_keys + j`; in a graph the pairs are its edges, numbered in the caller's edge order; in packed
/// inputs they are numbered segment by segment, in each as in dense inputs. Arrays with one row per pair
/// (edge features, distances, …) follow this numbering, and so do returned weights and gradients.
///
/// **Heads** are a layout: after [`with_heads(h)`](Self::with_heads) the columns of query, key and
/// value are h equal blocks. The blocks attend independently, and their outputs are placed side by side.
///
/// **Channels** are the optional inputs. A mechanism either honours those that change the result (mask,
/// causal, bias, dropout, weights of pairs, heads) or refuses them with [`Error::Unsupported`]. The others
/// (edge features, distances, layers, positions, latent neighbours) are data:
///
/// * If data that a mechanism needs is absent, it returns [`Error::MissingInput`].
/// * Data that a mechanism never reads is ignored and costs nothing, so one `Inputs` can feed a
///   mixture whose experts read different data. Each mechanism's page says what it reads.
/// * Data that a mechanism reads only with a certain setting is refused with
///   [`Error::MissingSetting`] if the setting is missing: edge features for an
///   [`EdgeGat`](crate::EdgeGat) without [`edge_dim`](crate::EdgeGatConfig::edge_dim).
/// * Some constructors ignore data that others of the same mechanism read, and say so:
///   [`LocalGlobal::sliding_window`](crate::LocalGlobal::sliding_window) ignores layers.
///
/// Setting a channel again replaces it: two masks are not combined.
///
/// ```
/// use graph_attention::{Graph, Inputs};
/// use graph_attention::ndarray::Array2;
///
/// let nodes = Array2::<f32>::zeros((3, 8));
/// let weights_of_edges = Array2::<f32>::ones((2, 1));
/// let graph = Graph::from_edges(3, 3, [(0, 1), (2, 1)])?;
/// let inputs = Inputs::graph(nodes.view(), nodes.view(), nodes.view(), &graph)?
///     .with_heads(2)?
///     .with_edge_features(weights_of_edges.view())?;
/// assert_eq!((inputs.num_pairs(), inputs.num_heads()), (2, 2));
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, F: Element> {
    query: View2<'a, F>,
    key: View2<'a, F>,
    value: View2<'a, F>,
    pattern: Pattern<'a>,
    causal: Option<Causal>,
    heads: usize,
    kv_heads: usize,
    /// Heads × queries × keys, each of full length or 1.
    mask: Option<View3<'a, bool>>,
    pair_mask: Option<View1<'a, bool>>,
    bias: Option<Logits<'a, F>>,
    /// Pairs × (heads or 1).
    pair_weights: Option<View2<'a, F>>,
    edge_features: Option<View2<'a, F>>,
    distances: Option<View1<'a, F>>,
    layers: Option<&'a [u8]>,
    positions: Option<Positions<'a, F>>,
    latent: Option<&'a Graph>,
    dropout: Option<Dropout>,
    /// Each query sees at most this many keys before its own, and after it.
    window: Option<[usize; 2]>,
    /// Where queries, keys and pairs come from, if they were selected from other inputs.
    origin: Option<Origin<'a>>,
    /// Queries see only keys of their own segment, and causal pattern and window count within it.
    segments: Option<&'a Segments>,
}

/// The pairs that exist, before mask and causal pattern hide some: [`Inputs::pattern`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug)]
pub enum Pattern<'a> {
    /// Every query is paired with every key.
    Dense,
    /// The edges of a graph.
    Graph(&'a Graph),
    /// Every query is paired with every key of its segment.
    Packed(&'a Segments),
}

/// The alignment of a causal pattern: where its diagonal starts if queries and keys differ in number.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Causal {
    /// Query i sees the keys j ≤ i: PyTorch's `is_causal`.
    TopLeft,
    /// Query i sees the keys j ≤ i + num_keys − num_queries, so the last query sees every key, as when
    /// decoding with a cache: flash-attention's convention.
    BottomRight,
    /// Query i sees the keys j ≤ i + offset, where `offset` is the number of cached keys before the first
    /// query. Keys after the last query's are allowed, and hidden. ONNX's past sequence length.
    Offset(usize),
}

/// A (query, key) that attends, as listed by [`Inputs::row`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The row in the queries.
    pub query: usize,
    /// The row in the keys and values.
    pub key: usize,
    /// The row in per-pair arrays.
    pub index: usize,
}

/// The numbers of queries, keys and pairs in the inputs that they were selected from; `None` if all
/// were selected.
#[derive(Clone, Copy, Debug)]
struct Origin<'a> {
    /// Ascending.
    queries: Option<&'a [usize]>,
    /// Ascending.
    keys: Option<&'a [usize]>,
    /// Only on a graph; in dense inputs the numbers follow from query and key.
    pairs: Option<&'a [usize]>,
    /// The pairs of the second graph, if they were selected with the queries.
    latent_pairs: Option<&'a [usize]>,
    /// The sizes of the whole inputs.
    num_queries: usize,
    num_keys: usize,
    /// The number in `queries` that counts as 0: not 0 in a segment of packed inputs.
    first_query: usize,
    /// The segments of the whole inputs.
    segments: Option<&'a Segments>,
}

#[derive(Clone, Copy, Debug)]
struct Positions<'a, F> {
    query: View2<'a, F>,
    key: View2<'a, F>,
}

impl<'a, F: Element> Inputs<'a, F> {
    /// Creates inputs of one query over all keys: `query` of length d, `key` n × d, `value` n × d_v.
    ///
    /// # Errors
    /// As [`dense`](Self::dense).
    pub fn single(
        query: ArrayView1<'a, F>,
        key: ArrayView2<'a, F>,
        value: ArrayView2<'a, F>,
    ) -> Result<Self> {
        Self::dense(query.insert_axis(Axis(0)), key, value)
    }

    /// Creates inputs of all queries over all keys: `query` n_q × d, `key` n_k × d, `value` n_k × d_v.
    /// They are one sequence or set; for several, use [`packed`](Self::packed).
    ///
    /// Whether queries and keys must have the same number of columns depends on the mechanism:
    /// a dot product requires it, a mechanism with its own projections does not.
    ///
    /// # Errors
    /// [`Error::Shape`] if the numbers of keys and values differ; [`Error::TooLarge`] if the number
    /// of pairs overflows.
    pub fn dense(
        query: ArrayView2<'a, F>,
        key: ArrayView2<'a, F>,
        value: ArrayView2<'a, F>,
    ) -> Result<Self> {
        if query.nrows().checked_mul(key.nrows()).is_none() {
            let shape = vec![query.nrows(), key.nrows()];
            return Err(Error::TooLarge { what: "pairs", shape });
        }
        Self::new(query, key, value, Pattern::Dense)
    }

    /// Creates inputs of several sequences or sets at once, without padding: the rows of all segments one
    /// after the other, where every query is paired with every key of its own segment. Gives each segment
    /// what [`dense`](Self::dense) inputs of its own would, and shares the work of all among threads.
    ///
    /// Causal pattern and windows count within each segment. Pairs are numbered segment by segment, in
    /// each as in dense inputs: [`Segments::pairs`]. Dropout uses
    /// [`Dropout::of_segment`](crate::Dropout::of_segment), so that segments do not drop the same pairs.
    ///
    /// ```
    /// use graph_attention::ndarray::{array, s};
    /// use graph_attention::{Attention, Flash, Inputs, Segments};
    ///
    /// // A sequence of two rows and one of three.
    /// let x = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [1.0, 1.0], [0.0, 3.0]];
    /// let segments = Segments::from_lengths(&[2, 3])?;
    /// let inputs = Inputs::packed(x.view(), x.view(), x.view(), &segments)?.with_causal();
    /// let out = Flash::new().forward(&inputs)?;
    ///
    /// let second = x.slice(s![2.., ..]);
    /// let alone = Inputs::dense(second, second, second)?.with_causal();
    /// assert_eq!(out.slice(s![2.., ..]), Flash::new().forward(&alone)?);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] if the numbers of keys and values differ, or if the segments have a different
    /// number of queries or keys.
    pub fn packed(
        query: ArrayView2<'a, F>,
        key: ArrayView2<'a, F>,
        value: ArrayView2<'a, F>,
        segments: &'a Segments,
    ) -> Result<Self> {
        let actual = [segments.num_queries(), segments.num_keys()];
        check_shape("segments", &[query.nrows(), key.nrows()], &actual)?;
        let inputs = Self::new(query, key, value, Pattern::Packed(segments))?;
        Ok(Self { segments: Some(segments), ..inputs })
    }

    /// Creates inputs of every query over its neighbours: `query` has one row per query of the graph,
    /// `key` and `value` one per key. If nodes attend to nodes, use
    /// [`self_attention`](Self::self_attention).
    ///
    /// # Errors
    /// [`Error::Shape`] if the numbers of keys and values differ, or if the graph has a different
    /// number of queries or keys.
    pub fn graph(
        query: ArrayView2<'a, F>,
        key: ArrayView2<'a, F>,
        value: ArrayView2<'a, F>,
        graph: &'a Graph,
    ) -> Result<Self> {
        check_graph("graph", graph, &query, &key)?;
        let inputs = Self::new(query, key, value, Pattern::Graph(graph))?;
        Ok(Self { segments: graph.blocks(), ..inputs })
    }

    /// Creates inputs of every node over its neighbours: `nodes`, one row per key of the graph, are the keys
    /// and values, and their first rows the queries: all nodes, or the targets of a sampled mini-batch.
    /// [`Gradients::self_attention`](crate::Gradients::self_attention) returns their gradient.
    ///
    /// ```
    /// use graph_attention::{Attention, Flash, Graph, Inputs};
    /// use graph_attention::ndarray::array;
    ///
    /// let graph = Graph::from_edges(3, 3, [(0, 1), (0, 2), (1, 2)])?;
    /// let nodes = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
    /// let inputs = Inputs::self_attention(nodes.view(), &graph)?;
    /// let out = Flash::new().forward(&inputs)?;
    /// assert_eq!(out.row(1), nodes.row(2)); // its only neighbour
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of keys of the graph is not the number of nodes, or the graph has more
    /// queries.
    pub fn self_attention(nodes: ArrayView2<'a, F>, graph: &'a Graph) -> Result<Self> {
        let queries = graph.num_queries().min(nodes.nrows());
        Self::graph(nodes.slice_move(s![..queries, ..]), nodes, nodes, graph)
    }

    fn new(
        query: ArrayView2<'a, F>,
        key: ArrayView2<'a, F>,
        value: ArrayView2<'a, F>,
        pattern: Pattern<'a>,
    ) -> Result<Self> {
        check_shape("value", &[key.nrows(), value.ncols()], value.shape())?;
        Ok(Self {
            query,
            key,
            value,
            pattern,
            causal: None,
            heads: 1,
            kv_heads: 1,
            mask: None,
            pair_mask: None,
            bias: None,
            pair_weights: None,
            edge_features: None,
            distances: None,
            layers: None,
            positions: None,
            latent: None,
            dropout: None,
            window: None,
            origin: None,
            segments: None,
        })
    }

    /// Returns the same pairs, heads and channels over other queries, keys and values, for a mechanism
    /// that projects or transforms its inputs before it calls an inner one.
    ///
    /// # Errors
    /// [`Error::Shape`] if a number of rows changes; [`Error::Heads`] if an array cannot be split into the
    /// heads.
    pub fn with_arrays<'b>(
        &self,
        query: ArrayView2<'b, F>,
        key: ArrayView2<'b, F>,
        value: ArrayView2<'b, F>,
    ) -> Result<Inputs<'b, F>>
    where
        'a: 'b,
    {
        check_shape("query", &[self.num_queries(), query.ncols()], query.shape())?;
        check_shape("key", &[self.num_keys(), key.ncols()], key.shape())?;
        check_shape("value", &[self.num_keys(), value.ncols()], value.shape())?;
        Inputs { query, key, value, ..*self }.with_grouped_heads(self.heads, self.kv_heads)
    }

    /// Returns the same pairs, heads and channels that change the result, over arrays of another
    /// precision. `bias` is the bias in that precision, if there is one; data channels are left out.
    pub(crate) fn in_precision<'b, G: Element>(
        &self,
        query: ArrayView2<'b, G>,
        key: ArrayView2<'b, G>,
        value: ArrayView2<'b, G>,
        bias: Option<ArrayView3<'b, G>>,
    ) -> Result<Inputs<'b, G>>
    where
        'a: 'b,
    {
        let Self {
            pattern,
            causal,
            heads,
            kv_heads,
            mask,
            pair_mask,
            dropout,
            window,
            origin,
            segments,
            ..
        } = *self;
        let bias = self.bias.zip(bias).map(|(form, logits)| form.with_grid(logits));
        let inputs =
            Inputs::new(query, key, value, pattern)?.with_grouped_heads(heads, kv_heads)?;
        Ok(Inputs { causal, mask, pair_mask, bias, dropout, window, origin, segments, ..inputs })
    }

    /// Returns the same queries, keys and values over the latent pairs, which have no data of their
    /// own: mask of pairs, bias, weights of pairs, edge features, distances and layers are left out. Mask,
    /// causal pattern and dropout stay.
    ///
    /// # Errors
    /// As [`latent`](Self::latent).
    pub(crate) fn over_latent(&self, mechanism: &'static str) -> Result<Self> {
        let pattern = Pattern::Graph(self.latent(mechanism)?);
        let origin = self.origin.map(|origin| Origin { pairs: origin.latent_pairs, ..origin });
        let (pair_mask, bias, pair_weights) = (None, None, None);
        let whole = Self { pattern, origin, pair_mask, bias, pair_weights, ..*self };
        Ok(Self { edge_features: None, distances: None, layers: None, ..whole })
    }

    /// Splits the columns of query, key and value into `heads` equal blocks, starting with head 0. For
    /// mechanisms without heads of their own: [`MultiHead`](crate::MultiHead) and
    /// [`EdgeGat`](crate::EdgeGat) define their own and refuse inputs with several.
    ///
    /// # Errors
    /// [`Error::Heads`] if an array cannot be split; [`Error::InvalidArgument`] if `heads` is 0.
    pub fn with_heads(self, heads: usize) -> Result<Self> {
        self.with_grouped_heads(heads, heads)
    }

    /// Sets grouped heads (Ainslie et al. 2023, 2305.13245): splits queries into `heads` blocks, keys and
    /// values into only `kv_heads`. Query head h reads key/value head ⌊h · kv_heads / heads⌋, as with
    /// PyTorch's `enable_gqa`.
    ///
    /// # Errors
    /// [`Error::Heads`] if an array cannot be split; [`Error::InvalidArgument`] if `heads` or `kv_heads` is
    /// 0 or `kv_heads` does not divide `heads`.
    pub fn with_grouped_heads(mut self, heads: usize, kv_heads: usize) -> Result<Self> {
        if heads == 0 {
            return Err(Error::config("heads", "at least 1", heads));
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(Error::config(
                "kv_heads",
                format!("a divisor of heads = {heads}"),
                kv_heads,
            ));
        }
        for (what, array, heads) in [
            ("query", &self.query, heads),
            ("key", &self.key, kv_heads),
            ("value", &self.value, kv_heads),
        ] {
            let columns = array.ncols();
            if !columns.is_multiple_of(heads) || heads > columns.max(1) {
                return Err(Error::Heads { what, heads, columns });
            }
        }
        self.heads = heads;
        self.kv_heads = kv_heads;
        Ok(self)
    }

    /// Lets query i see only the keys j ≤ i: [`Causal::TopLeft`]. To decode with a cache, with fewer
    /// queries than keys, use [`with_causal_alignment`](Self::with_causal_alignment) with
    /// [`Causal::BottomRight`], or with [`Causal::Offset`] of the number of cached keys.
    #[must_use]
    pub fn with_causal(self) -> Self {
        self.with_causal_alignment(Causal::TopLeft)
    }

    /// Lets each query see only the keys up to the diagonal. Hidden pairs keep their numbers.
    /// On a graph, edges to later keys are hidden; in packed inputs and in a
    /// [`Graph::block_diagonal`], each segment has its own diagonal.
    #[must_use]
    pub fn with_causal_alignment(mut self, alignment: Causal) -> Self {
        self.causal = Some(alignment);
        self
    }

    /// Hides pairs: `mask` is num_queries × num_keys, or heads × num_queries × num_keys. Pairs with `true`
    /// take part, as in PyTorch's `scaled_dot_product_attention`. (`nn.MultiheadAttention` means the
    /// opposite.) An axis may have length 1: all heads, queries or keys then share its entry.
    ///
    /// A hidden pair is skipped, not multiplied by zero: NaN in its key, value or features changes
    /// nothing. On a graph, an edge is hidden if the mask is `false` at its query and key;
    /// [`with_pair_mask`](Self::with_pair_mask) hides edges by number.
    ///
    /// A padding mask, with one flag per key, is a mask of one row: `flags.view().insert_axis(Axis(0))`.
    /// Padded queries still get outputs.
    ///
    /// A mask with several heads is only for mechanisms that take a bias: they read it as logits of −∞
    /// ([`Bias::at`]).
    ///
    /// ```
    /// use graph_attention::ndarray::{Axis, array};
    /// use graph_attention::{Attention, Flash, Inputs};
    ///
    /// let x = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
    /// let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
    /// let is_key = array![true, false, false]; // the other keys are padding
    /// let inputs = inputs.with_mask(is_key.view().insert_axis(Axis(0)))?;
    /// assert_eq!(Flash::new().forward(&inputs)?.row(2), x.row(0));
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] if the mask has none of these shapes.
    pub fn with_mask<D: Dimension>(mut self, mask: ArrayView<'a, bool, D>) -> Result<Self> {
        self.mask = Some(grid("mask", &self, mask)?);
        Ok(self)
    }

    /// Hides pairs by number: `mask` has one flag per pair (on a graph, per edge), and pairs with `true`
    /// take part. If there is also a [mask of queries and keys](Self::with_mask), a pair takes part only if
    /// both are `true`.
    ///
    /// ```
    /// use graph_attention::ndarray::array;
    /// use graph_attention::{Attention, Flash, Graph, Inputs};
    ///
    /// let nodes = array![[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]];
    /// let graph = Graph::from_edges(3, 3, [(0, 1), (0, 2), (1, 2)])?;
    /// let keep = array![true, false, true]; // not the edge (0, 2)
    /// let inputs = Inputs::self_attention(nodes.view(), &graph)?.with_pair_mask(keep.view())?;
    /// assert_eq!(Flash::new().forward(&inputs)?.row(0), nodes.row(1));
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] if there is not one flag per pair.
    pub fn with_pair_mask(mut self, mask: ArrayView1<'a, bool>) -> Result<Self> {
        check_shape("pair mask", &[self.num_pairs()], mask.shape())?;
        self.pair_mask = Some(mask);
        Ok(self)
    }

    /// Adds `bias` to the logits, in one of two forms. Negative infinity hides a pair, as a mask does.
    ///
    /// * **By query and key:** heads × num_queries × num_keys, as in PyTorch; for dense inputs also
    ///   num_queries × num_keys, shared by the heads. An axis may have length 1: all heads, queries or
    ///   keys then share its entry, and its gradient is the sum of theirs.
    /// * **By pair:** num_pairs × heads, or num_pairs × 1, shared by the heads.
    ///
    /// The gradient has the shape of the array. The mechanism checks the number of heads, because it may
    /// define its own heads.
    ///
    /// # Errors
    /// [`Error::Shape`] if the bias has neither form.
    pub fn with_bias<D: Dimension>(mut self, bias: ArrayView<'a, F, D>) -> Result<Self> {
        self.bias = Some(Logits::new(&self, bias)?);
        Ok(self)
    }

    /// Multiplies the attention weight of each pair, after the softmax: `weights` is num_pairs × heads, or
    /// num_pairs × 1, shared by the heads.
    ///
    /// ```text
    /// o_i = Σ_j w_ij p_ij v_j,   p = softmax of the logits, which w does not change
    /// ```
    ///
    /// For edge weights, soft masks of edges that are themselves learned (Ying et al. 2019, 1903.03894), and
    /// edges that are dropped in training without a change of the others' weights. A pair with weight 0
    /// contributes nothing to the output, but still takes its share of the softmax: to leave it out of that too,
    /// use a [mask](Self::with_pair_mask). A weight that multiplies before the softmax normalises is a
    /// [bias](Self::with_bias) of its logarithm.
    ///
    /// The weights may have any sign. [`Gradients::pair_weights`](crate::Gradients::pair_weights) has their shape.
    /// [`attention_weights`](crate::Attention::attention_weights) are those before dropout and these factors.
    /// The mechanism checks the number of heads, because it may define its own heads.
    ///
    /// ```
    /// use graph_attention::ndarray::array;
    /// use graph_attention::{Attention, Flash, Graph, Inputs};
    ///
    /// let nodes = array![[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]];
    /// let graph = Graph::from_edges(3, 3, [(0, 1), (0, 2), (1, 2)])?;
    /// let weights = array![[1.0], [0.0], [0.5]]; // of the edges (0, 1), (0, 2), (1, 2)
    /// let inputs = Inputs::self_attention(nodes.view(), &graph)?.with_pair_weights(weights.view())?;
    /// let out = Flash::new().forward(&inputs)?;
    /// // Both neighbours of node 0 have half of the softmax, and node 1 has one neighbour.
    /// assert_eq!(out, array![[0.0, 0.5], [0.0, 0.5], [0.0, 0.0]]);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] if there is not one row per pair, or no column.
    pub fn with_pair_weights(mut self, weights: ArrayView2<'a, F>) -> Result<Self> {
        let expected = [self.num_pairs(), weights.ncols().max(1)];
        check_shape("pair_weights", &expected, weights.shape())?;
        self.pair_weights = Some(weights);
        Ok(self)
    }

    /// Sets the features of each pair: num_pairs × any number of columns, in pair order. Read by
    /// [`EdgeGat`](crate::EdgeGat), which must be configured for the same number of columns
    /// ([`EdgeGatConfig::edge_dim`](crate::EdgeGatConfig::edge_dim)).
    ///
    /// # Errors
    /// [`Error::Shape`] if there is not one row per pair.
    pub fn with_edge_features(mut self, features: ArrayView2<'a, F>) -> Result<Self> {
        check_shape("edge_features", &[self.num_pairs(), features.ncols()], features.shape())?;
        self.edge_features = Some(features);
        Ok(self)
    }

    /// Sets a distance for each pair (hops, weights, lengths): in dense inputs a num_queries × num_keys
    /// matrix, row by row. Read by [`EdgeRope`](crate::EdgeRope), which also computes the gradient.
    ///
    /// [`Graph::hop_distances`] counts hops in another graph. Edge weights, in the order of the list that
    /// the graph was made from, can be used as distances directly; layers are converted to numbers:
    ///
    /// ```
    /// use graph_attention::{Graph, Inputs};
    /// use graph_attention::ndarray::{Array1, Array2, array};
    ///
    /// let graph = Graph::from_edges(3, 3, [(2, 0), (0, 1)])?;
    /// let x = Array2::<f32>::zeros((3, 8));
    /// let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)?;
    /// let weights = array![0.5, 2.0];
    /// let weighted = inputs.with_distances(weights.view())?;
    /// let layers: Array1<f32> = [0u8, 3].map(f32::from).into_iter().collect();
    /// let layered = inputs.with_distances(layers.view())?;
    /// # assert_eq!((weighted.num_pairs(), layered.num_pairs()), (2, 2));
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] if there is not one distance per pair.
    pub fn with_distances(mut self, distances: ArrayView1<'a, F>) -> Result<Self> {
        check_shape("distances", &[self.num_pairs()], distances.shape())?;
        self.distances = Some(distances);
        Ok(self)
    }

    /// Sets a layer number for each pair, such as the layer of a link in an HNSW index, the hops of
    /// [`Graph::k_hop`] or the pattern of [`Graph::union`]. Read by
    /// [`LocalGlobal::joint`](crate::LocalGlobal::joint) and `gated`: 0 is local, anything above is global; and by
    /// [`score::BucketBias`](crate::score::BucketBias), where the numbers can also be types of edges.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is not one layer per pair.
    pub fn with_edge_layers(mut self, layers: &'a [u8]) -> Result<Self> {
        check_shape("edge layers", &[self.num_pairs()], &[layers.len()])?;
        self.layers = Some(layers);
        Ok(self)
    }

    /// Sets the coordinates of queries (num_queries × axes) and keys (num_keys × axes). Read by
    /// [`GraphRope`](crate::GraphRope).
    ///
    /// [`Graph::hops_from`] counts hops from anchors, and with the feature `spectral`
    /// `Graph::spectral_coordinates` embeds a graph by its resistances. One number per node, such as
    /// its level in an HNSW index, makes an array of one column. To combine several sources,
    /// concatenate their columns:
    ///
    /// ```
    /// use graph_attention::{Graph, Inputs};
    /// use graph_attention::ndarray::{Array2, Axis, array, concatenate};
    ///
    /// let graph = Graph::from_edges(3, 3, [(0, 1), (1, 2)])?;
    /// let levels = array![2f32, 0., 1.].insert_axis(Axis(1));
    /// let hops = graph.hops_from(&[[0]], 3.0)?;
    /// let positions = concatenate![Axis(1), levels, hops];
    /// let x = Array2::zeros((3, 8));
    /// let inputs = Inputs::graph(x.view(), x.view(), x.view(), &graph)?
    ///     .with_positions(positions.view(), positions.view())?;
    /// # assert_eq!(positions, array![[2., 0.], [0., 1.], [1., 2.]]);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] if a number of rows is wrong or queries and keys differ in their number of axes.
    pub fn with_positions(
        mut self,
        query: ArrayView2<'a, F>,
        key: ArrayView2<'a, F>,
    ) -> Result<Self> {
        let axes = query.ncols();
        check_shape("query positions", &[self.num_queries(), axes], query.shape())?;
        check_shape("key positions", &[self.num_keys(), axes], key.shape())?;
        self.positions = Some(Positions { query, key });
        Ok(self)
    }

    /// Sets a second graph of neighbours over the same queries and keys, besides the pairs of the inputs.
    /// Read by [`DualSpace`](crate::DualSpace), which then does not search for neighbours itself.
    ///
    /// # Errors
    /// [`Error::Shape`] if the graph has a different number of queries or keys.
    pub fn with_latent(mut self, latent: &'a Graph) -> Result<Self> {
        check_graph("latent", latent, &self.query, &self.key)?;
        self.latent = Some(latent);
        if let Some(origin) = &mut self.origin {
            origin.latent_pairs = None;
        }
        Ok(self)
    }

    /// Sets dropout on the attention weights. It applies in [`forward`](crate::Attention::forward) as well
    /// as in training (there is no training mode), so leave it out for inference.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the probability is not in [0, 1).
    pub fn with_dropout(mut self, dropout: Dropout) -> Result<Self> {
        dropout.validate()?;
        self.dropout = Some(dropout);
        Ok(self)
    }

    /// Lets each query see only keys at most `left` before and `right` after its own: key i, or with
    /// [`Causal::BottomRight`] key i + num_keys − num_queries. In selected inputs the numbers are those of
    /// the whole inputs. Only the kernels of softmax attention read it.
    #[must_use]
    pub(crate) fn with_window(mut self, [left, right]: [usize; 2]) -> Self {
        self.window = Some([left, right]);
        self
    }

    /// Returns the queries, num_queries × (heads · d).
    #[must_use]
    pub fn query(&self) -> ArrayView2<'a, F> {
        self.query
    }

    /// Returns the keys, num_keys × (kv_heads · d).
    #[must_use]
    pub fn key(&self) -> ArrayView2<'a, F> {
        self.key
    }

    /// Returns the values, num_keys × (kv_heads · d_v).
    #[must_use]
    pub fn value(&self) -> ArrayView2<'a, F> {
        self.value
    }

    /// Returns the number of queries.
    #[must_use]
    pub fn num_queries(&self) -> usize {
        self.query.nrows()
    }

    /// Returns the number of keys.
    #[must_use]
    pub fn num_keys(&self) -> usize {
        self.key.nrows()
    }

    /// Returns the number of pairs, including hidden ones: the number of rows of per-pair arrays.
    #[must_use]
    pub fn num_pairs(&self) -> usize {
        match self.pattern {
            Pattern::Dense => self.num_queries() * self.num_keys(),
            Pattern::Graph(graph) => graph.num_edges(),
            Pattern::Packed(segments) => segments.num_pairs(),
        }
    }

    /// Returns the number of query heads.
    #[must_use]
    pub fn num_heads(&self) -> usize {
        self.heads
    }

    /// Returns the number of key and value heads.
    #[must_use]
    pub fn num_kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Returns the columns of the queries that a head reads.
    ///
    /// # Panics
    /// Panics if there is no such head.
    #[must_use]
    pub fn query_columns(&self, head: usize) -> Range<usize> {
        self.columns_of(head, head, self.query.ncols() / self.heads)
    }

    /// Returns the columns of the keys that a query head reads: with grouped heads, those of its key head.
    ///
    /// # Panics
    /// Panics if there is no such head.
    #[must_use]
    pub fn key_columns(&self, head: usize) -> Range<usize> {
        self.columns_of(head, head * self.kv_heads / self.heads, self.key.ncols() / self.kv_heads)
    }

    /// Returns the columns of the values that a query head reads: with grouped heads, those of its value
    /// head. The columns of the outputs are those of as many heads as there are query heads.
    ///
    /// # Panics
    /// Panics if there is no such head.
    #[must_use]
    pub fn value_columns(&self, head: usize) -> Range<usize> {
        self.columns_of(head, head * self.kv_heads / self.heads, self.value.ncols() / self.kv_heads)
    }

    fn columns_of(&self, head: usize, block: usize, dim: usize) -> Range<usize> {
        assert!(head < self.heads, "head {head} of {}", self.heads);
        head_columns(block, dim)
    }

    /// Returns whether every query is paired with every key.
    pub(crate) fn is_dense(&self) -> bool {
        matches!(self.pattern, Pattern::Dense)
    }

    /// Returns the pattern of the pairs that exist.
    #[must_use]
    pub fn pattern(&self) -> Pattern<'a> {
        self.pattern
    }

    /// Returns the alignment of the causal pattern, if there is one. Use [`row`](Self::row) to find the
    /// keys that a query sees: [selected queries](Self::select_queries) keep the diagonal of the whole
    /// inputs.
    #[must_use]
    pub fn causal_alignment(&self) -> Option<Causal> {
        self.causal
    }

    /// Returns the additive logits, if there is a bias or a mask that differs between heads.
    #[must_use]
    pub fn bias(&self) -> Option<Bias<'a, F>> {
        Bias::new(self.bias, self.mask.filter(|mask| mask.shape()[0] > 1))
    }

    /// Returns the logits without the mask, as three axes: [`GradientsMut::bias`](crate::GradientsMut::bias).
    pub(crate) fn logits(&self) -> Option<ArrayView3<'a, F>> {
        self.bias.map(|bias| bias.as_grid())
    }

    /// Returns what the rows or columns of the bias belong to, if there is one.
    pub(crate) fn bias_axes(&self) -> Option<BiasAxes> {
        self.bias.map(|bias| bias.axes())
    }

    /// Returns the mask that all heads share, 1 × queries × keys, each of full length or 1.
    fn shared_mask(&self) -> Option<View3<'a, bool>> {
        self.mask.filter(|mask| mask.shape()[0] == 1)
    }

    /// Returns the segments of packed inputs.
    pub(crate) fn packed_segments(&self) -> Option<&'a Segments> {
        match self.pattern {
            Pattern::Packed(segments) => Some(segments),
            _ => None,
        }
    }

    /// Returns whether some query may not see all keys, for all heads.
    pub(crate) fn may_hide_keys(&self) -> bool {
        self.has(Channel::Mask) || self.segments.is_some()
    }

    /// Returns whether anything that all heads share may hide pairs of the pattern.
    pub(crate) fn may_hide_pairs(&self) -> bool {
        // Of a graph that knows no blocks, such as latent neighbours.
        let is_cut = match self.pattern {
            Pattern::Graph(graph) => self.segments.is_some() && graph.blocks().is_none(),
            _ => false,
        };
        self.has(Channel::Mask) || self.has_window() || is_cut
    }

    /// Returns the dense inputs of one segment of packed inputs, without latent neighbours.
    ///
    /// # Panics
    /// Panics if there is no such segment.
    pub(crate) fn segment(&self, segments: &Segments, segment: usize) -> Self {
        let queries = segments.queries(segment);
        let keys = segments.keys(segment);
        let pairs = segments.pairs(segment);
        fn rows<'a, T>(array: View2<'a, T>, rows: &Range<usize>) -> View2<'a, T> {
            array.slice_move(s![rows.clone(), ..])
        }
        let of_queries = |array| rows(array, &queries);
        let of_keys = |array| rows(array, &keys);
        fn of_grid<'a, T>(
            mut grid: View3<'a, T>,
            queries: &Range<usize>,
            keys: &Range<usize>,
        ) -> View3<'a, T> {
            for (axis, numbers) in [(1, queries), (2, keys)] {
                if grid.shape()[axis] > 1 {
                    grid.slice_axis_inplace(Axis(axis), numbers.clone().into());
                }
            }
            grid
        }
        let origin = self.origin.zip(self.whole_segments()).map(|(origin, whole)| {
            let whole_queries = whole.queries(segment);
            Origin {
                queries: origin.queries.map(|numbers| &numbers[queries.clone()]),
                keys: None,
                pairs: None,
                latent_pairs: None,
                num_queries: whole_queries.len(),
                num_keys: whole.keys(segment).len(),
                first_query: whole_queries.start,
                segments: None,
            }
        });
        Self {
            query: of_queries(self.query),
            key: of_keys(self.key),
            value: of_keys(self.value),
            pattern: Pattern::Dense,
            mask: self.mask.map(|mask| of_grid(mask, &queries, &keys)),
            pair_mask: self.pair_mask.map(|mask| mask.slice_move(s![pairs.clone()])),
            bias: self.bias.map(|bias| match bias {
                Logits::Pairs(logits) => Logits::Pairs(rows(logits, &pairs)),
                Logits::Grid { grid, num_axes } => {
                    Logits::Grid { grid: of_grid(grid, &queries, &keys), num_axes }
                }
            }),
            pair_weights: self.pair_weights.map(|weights| rows(weights, &pairs)),
            edge_features: self.edge_features.map(|features| rows(features, &pairs)),
            distances: self.distances.map(|distances| distances.slice_move(s![pairs.clone()])),
            layers: self.layers.map(|layers| &layers[pairs.clone()]),
            positions: self.positions.map(|positions| Positions {
                query: of_queries(positions.query),
                key: of_keys(positions.key),
            }),
            latent: None,
            dropout: self.dropout.map(|dropout| dropout.of_segment(segment)),
            origin,
            segments: None,
            ..*self
        }
    }

    /// Returns the same queries over all rows of a cache, whose last rows are the keys of these dense inputs.
    pub(crate) fn over_cache<'b>(
        &self,
        key: ArrayView2<'b, F>,
        value: ArrayView2<'b, F>,
        positions: Option<ArrayView2<'b, F>>,
    ) -> Result<Inputs<'b, F>>
    where
        'a: 'b,
    {
        let num_earlier = key.nrows() - self.num_keys();
        let inputs = Inputs::dense(self.query, key, value)?;
        let inputs = inputs.with_grouped_heads(self.heads, self.kv_heads)?;
        let inputs = match (self.positions, positions) {
            (Some(of_new), Some(of_cache)) => inputs.with_positions(of_new.query, of_cache)?,
            _ => inputs,
        };
        let causal = self.causal.map(|causal| match causal {
            Causal::TopLeft => Causal::Offset(num_earlier),
            Causal::Offset(offset) => Causal::Offset(num_earlier.saturating_add(offset)),
            Causal::BottomRight => causal,
        });
        Ok(Inputs { causal, ..inputs })
    }

    /// Returns the positions of the keys, if there are any.
    pub(crate) fn layers(&self) -> Option<&'a [u8]> {
        self.layers
    }

    /// Leaves out the edge layers.
    pub(crate) fn without_layers(&self) -> Self {
        Self { layers: None, ..*self }
    }

    pub(crate) fn key_positions(&self) -> Option<ArrayView2<'a, F>> {
        self.positions.map(|positions| positions.key)
    }

    /// Returns whether these are selected from other inputs.
    pub(crate) fn is_selected(&self) -> bool {
        self.origin.is_some()
    }

    /// Returns whether a mask of any kind may hide pairs.
    pub(crate) fn has_mask(&self) -> bool {
        self.mask.is_some() || self.pair_mask.is_some()
    }

    /// Returns the keys that the mask does not hide, if they are the same for every query and head; `None`
    /// if there is a mask of pairs.
    pub(crate) fn keys_in_mask(&self) -> Option<Vec<usize>> {
        let mut keys: Vec<usize> = (0..self.num_keys()).collect();
        if let Some(mask) = self.mask {
            let mut rows = mask.axis_iter(Axis(1));
            let first = rows.next();
            let is_shared = mask.strides()[1] == 0 || rows.all(|row| Some(row) == first);
            if mask.shape()[0] != 1 || !is_shared {
                return None;
            }
            let sees = |key| mask[slot_of(&mask, Pair { query: 0, key, index: 0 }, 0)];
            keys.retain(|&key| first.is_some() && sees(key));
        }
        self.pair_mask.is_none().then_some(keys)
    }

    /// Sets to −∞ the logits of those keys that a mask shared by all heads hides. `row` holds the logits of
    /// consecutive keys of dense inputs, starting at the pair `first`.
    #[inline]
    pub(crate) fn hide_masked(&self, first: Pair, row: &mut [F]) {
        if let Some(mask) = &self.shared_mask() {
            hide_row(mask, first, 0, row);
        }
        if let Some(mask) = &self.pair_mask {
            let mask = mask.slice(s![first.index..first.index + row.len()]);
            let hidden = row.iter_mut().zip(mask).filter(|(_, is_visible)| !**is_visible);
            hidden.for_each(|(logit, _)| *logit = F::neg_infinity());
        }
    }

    /// Returns whether masks and bias are the same for all queries.
    pub(crate) fn all_queries_share_mask(&self) -> bool {
        let is_shared = self.mask.is_none_or(|mask| mask.shape()[1] == 1);
        is_shared && self.pair_mask.is_none() && self.bias.is_none()
    }

    /// Returns the dropout, if there is any.
    #[must_use]
    pub fn dropout(&self) -> Option<Dropout> {
        self.dropout
    }

    /// Returns the factor by which dropout multiplies the weight of a pair; 1 without dropout. It is
    /// [`Dropout::multiplier`] of the pair's number, which for [selected
    /// queries](Self::select_queries) is the number in the whole inputs.
    ///
    /// # Panics
    /// Panics if there is no such pair: take pairs from [`row`](Self::row).
    #[inline]
    #[must_use]
    pub fn dropout_multiplier(&self, pair: Pair, head: usize) -> F {
        self.pair_dropout(pair).map_or(F::one(), |dropout| dropout.multiplier(head))
    }

    /// Returns the dropout of a pair, if there is any, for the factors of several heads.
    #[inline]
    pub(crate) fn pair_dropout(&self, pair: Pair) -> Option<PairDropout<F>> {
        let mut dropout = self.dropout?;
        if let Pattern::Packed(segments) = self.pattern {
            dropout = dropout.of_segment(segments.of_query(pair.query));
        }
        Some(dropout.of_pair(self.pair_number(pair)))
    }

    /// Computes the [`dropout_multiplier`](Self::dropout_multiplier) of consecutive keys of dense inputs,
    /// starting at the pair `first`.
    #[inline(always)]
    pub(crate) fn dropout_multipliers(&self, first: Pair, head: usize, multipliers: &mut [F]) {
        match (self.dropout, self.origin) {
            (Some(dropout), None) => {
                for (pair, multiplier) in (first.index..).zip(multipliers) {
                    *multiplier = dropout.multiplier(pair, head);
                }
            }
            _ => {
                for (at, multiplier) in multipliers.iter_mut().enumerate() {
                    let (key, index) = (first.key + at, first.index + at);
                    *multiplier = self.dropout_multiplier(Pair { key, index, ..first }, head);
                }
            }
        }
    }

    /// Returns the [weight](Self::with_pair_weights) of a pair, by which a mechanism multiplies its attention
    /// weight after the softmax; 1 without weights of pairs.
    ///
    /// # Panics
    /// Panics if there is no such pair or head: take pairs from [`row`](Self::row).
    #[inline]
    #[must_use]
    pub fn pair_weight(&self, pair: Pair, head: usize) -> F {
        self.pair_weights
            .map_or(F::one(), |weights| weights[pair_weight_slot(weights.ncols(), pair, head)])
    }

    /// Adds the gradient of the [weight](Self::pair_weight) of a pair and head to those of all, if these are
    /// wanted.
    ///
    /// # Panics
    /// Panics if there is no such pair or head.
    #[inline]
    pub fn add_pair_weight_gradient(
        &self,
        pair: Pair,
        head: usize,
        grad: F,
        grads: &mut crate::GradientsMut<'_, F>,
    ) {
        if let Some(sums) = &mut grads.pair_weights {
            let slot = pair_weight_slot(sums.ncols(), pair, head);
            sums[slot] += grad;
        }
    }

    /// Checks that the weights of pairs are shared by all heads or there is one for each of `heads` heads.
    ///
    /// # Errors
    /// [`Error::Shape`] if they do not fit.
    pub fn check_pair_weights(&self, heads: usize) -> Result<()> {
        match self.pair_weights {
            Some(weights) if ![1, heads].contains(&weights.ncols()) => {
                check_shape("pair_weights", &[weights.nrows(), heads], weights.shape())
            }
            _ => Ok(()),
        }
    }

    /// Returns the features of the pairs, one row per pair.
    ///
    /// # Errors
    /// [`Error::MissingInput`], naming `mechanism`, if there are none.
    pub fn edge_features(&self, mechanism: &'static str) -> Result<ArrayView2<'a, F>> {
        require(self.edge_features, mechanism, Channel::EdgeFeatures)
    }

    /// Returns the distances of the pairs.
    ///
    /// # Errors
    /// [`Error::MissingInput`], naming `mechanism`, if there are none.
    pub fn distances(&self, mechanism: &'static str) -> Result<ArrayView1<'a, F>> {
        require(self.distances, mechanism, Channel::Distances)
    }

    /// Returns the layers of the pairs.
    ///
    /// # Errors
    /// [`Error::MissingInput`], naming `mechanism`, if there are none.
    pub fn edge_layers(&self, mechanism: &'static str) -> Result<&'a [u8]> {
        require(self.layers, mechanism, Channel::EdgeLayers)
    }

    /// Returns the positions of the queries and of the keys.
    ///
    /// # Errors
    /// [`Error::MissingInput`], naming `mechanism`, if there are none.
    pub fn positions(
        &self,
        mechanism: &'static str,
    ) -> Result<(ArrayView2<'a, F>, ArrayView2<'a, F>)> {
        let positions = require(self.positions, mechanism, Channel::Positions)?;
        Ok((positions.query, positions.key))
    }

    /// Returns the second graph of neighbours.
    ///
    /// # Errors
    /// [`Error::MissingInput`], naming `mechanism`, if there is none.
    pub fn latent(&self, mechanism: &'static str) -> Result<&'a Graph> {
        require(self.latent, mechanism, Channel::Latent)
    }

    /// Returns whether a channel is set.
    #[must_use]
    pub fn has(&self, channel: Channel) -> bool {
        match channel {
            Channel::Mask => self.has_mask() || self.causal.is_some(),
            Channel::Bias => self.bias().is_some(),
            Channel::Dropout => self.dropout.is_some(),
            Channel::PairWeights => self.pair_weights.is_some(),
            Channel::Heads => self.heads > 1,
            Channel::EdgeFeatures => self.edge_features.is_some(),
            Channel::Distances => self.distances.is_some(),
            Channel::EdgeLayers => self.layers.is_some(),
            Channel::Positions => self.positions.is_some(),
            Channel::Latent => self.latent.is_some(),
        }
    }

    /// Refuses inputs with channels that a mechanism cannot honour. Call it first in, say, a mechanism
    /// that does not support masks.
    ///
    /// # Errors
    /// [`Error::Unsupported`], naming the first of `channels` that is set.
    pub fn check_absent(&self, mechanism: &'static str, channels: &[Channel]) -> Result<()> {
        match channels.iter().find(|channel| self.has(**channel)) {
            Some(&channel) => Err(Error::Unsupported { mechanism: mechanism.into(), channel }),
            None => Ok(()),
        }
    }

    /// Returns the shape of the gradient of each array that has one.
    pub(crate) fn gradient_shapes(&self) -> GradientShapes {
        let shape = |view: View2<'a, F>| [view.nrows(), view.ncols()];
        GradientShapes {
            query: shape(self.query),
            key: shape(self.key),
            value: shape(self.value),
            bias: self.bias.map(|bias| bias.shape()),
            pair_weights: self.pair_weights.map(shape),
            edge_features: self.edge_features.map(shape),
            distances: self.distances.map(|view| [view.len()]),
            query_positions: self.positions.map(|positions| shape(positions.query)),
            key_positions: self.positions.map(|positions| shape(positions.key)),
        }
    }
}

pub(crate) struct GradientShapes {
    pub(crate) query: [usize; 2],
    pub(crate) key: [usize; 2],
    pub(crate) value: [usize; 2],
    /// Of two or three axes.
    pub(crate) bias: Option<Vec<usize>>,
    pub(crate) pair_weights: Option<[usize; 2]>,
    pub(crate) edge_features: Option<[usize; 2]>,
    pub(crate) distances: Option<[usize; 1]>,
    pub(crate) query_positions: Option<[usize; 2]>,
    pub(crate) key_positions: Option<[usize; 2]>,
}

/// Returns the index of the weight of a pair and head in an array with this number of columns.
#[inline]
pub(crate) fn pair_weight_slot(columns: usize, pair: Pair, head: usize) -> [usize; 2] {
    [pair.index, if columns == 1 { 0 } else { head }]
}

/// Returns the columns of a head's block.
pub(crate) fn head_columns(head: usize, dim: usize) -> Range<usize> {
    head * dim..(head + 1) * dim
}

fn check_graph<F>(
    what: &'static str,
    graph: &Graph,
    query: &View2<'_, F>,
    key: &View2<'_, F>,
) -> Result<()> {
    check_shape(what, &[query.nrows(), key.nrows()], &[graph.num_queries(), graph.num_keys()])
}

fn require<T>(channel: Option<T>, mechanism: &'static str, name: Channel) -> Result<T> {
    channel.ok_or_else(|| Error::MissingInput { mechanism: mechanism.into(), channel: name })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, array};

    /// Compiles only while `Inputs` is covariant, as every decorator requires.
    fn shorten<'b, 'a: 'b>(inputs: Inputs<'a, f32>) -> Inputs<'b, f32> {
        inputs
    }

    fn keys_of(inputs: &Inputs<'_, f32>, query: usize) -> Vec<(usize, usize)> {
        inputs.row(query).map(|pair| (pair.key, pair.index)).collect()
    }

    #[test]
    fn rows_list_the_visible_pairs_with_their_numbers() -> Result<()> {
        let (q, k) = (Array2::zeros((2, 1)), Array2::zeros((3, 1)));
        let dense = shorten(Inputs::dense(q.view(), k.view(), k.view())?);
        assert_eq!(keys_of(&dense, 1), [(0, 3), (1, 4), (2, 5)]);
        assert_eq!(keys_of(&dense, 2), []);
        assert_eq!(keys_of(&dense.with_causal(), 0), [(0, 0)]);
        let (q, k) = (Array2::zeros((2, 4)), Array2::zeros((3, 4)));
        let heads = Inputs::dense(q.view(), k.view(), k.view())?.with_grouped_heads(4, 2)?;
        let other = heads.with_causal().with_arrays(q.view(), k.view(), k.view())?;
        assert_eq!((other.num_heads(), other.num_kv_heads()), (4, 2));
        assert_eq!(keys_of(&other, 0), [(0, 0)]);
        let bottom_right = dense.with_causal_alignment(Causal::BottomRight);
        assert_eq!(keys_of(&bottom_right, 0), [(0, 0), (1, 1)]);
        let offset = dense.with_causal_alignment(Causal::Offset(1));
        assert_eq!(keys_of(&offset, 0), [(0, 0), (1, 1)]);
        assert_eq!(keys_of(&offset, 1).len(), 3);
        let beyond = dense.with_causal_alignment(Causal::Offset(usize::MAX));
        assert_eq!(keys_of(&beyond, 0).len(), 3);

        let mask = array![[true, false, true], [false, true, true]];
        assert_eq!(keys_of(&dense.with_mask(mask.view())?.with_causal(), 1), [(1, 4)]);

        let graph = Graph::from_edges(2, 3, [(1, 2), (0, 1), (1, 0), (1, 2)])?;
        let sparse = Inputs::graph(q.view(), k.view(), k.view(), &graph)?;
        assert_eq!(keys_of(&sparse, 1), [(2, 0), (0, 2), (2, 3)]);
        assert_eq!(keys_of(&sparse.with_mask(mask.view())?, 0), []);
        assert_eq!(keys_of(&sparse.with_causal(), 1), [(0, 2)]);
        Ok(())
    }

    #[test]
    fn more_queries_than_keys_leave_the_first_rows_empty_at_the_bottom_right() -> Result<()> {
        let (q, k) = (Array2::zeros((3, 1)), Array2::zeros((2, 1)));
        let inputs = Inputs::<f32>::dense(q.view(), k.view(), k.view())?
            .with_causal_alignment(Causal::BottomRight);
        let seen: Vec<usize> = (0..3).map(|query| inputs.row(query).count()).collect();
        assert_eq!(seen, [0, 1, 2]);
        Ok(())
    }

    #[test]
    fn a_bias_is_read_in_either_form() -> Result<()> {
        let (q, k) = (Array2::zeros((2, 2)), Array2::zeros((3, 2)));
        let inputs = Inputs::<f32>::dense(q.view(), k.view(), k.view())?.with_heads(2)?;
        let pair = Pair { query: 1, key: 0, index: 3 };
        let matrix = Array2::from_shape_fn((2, 3), |(i, j)| (10 * i + j) as f32);
        let shared = inputs.with_bias(matrix.view())?.bias().unwrap();
        assert_eq!((shared.at(pair, 0), shared.at(pair, 1)), (10.0, 10.0));
        let per_head = Array2::from_shape_fn((6, 2), |(pair, head)| (10 * pair + head) as f32);
        let per_head = inputs.with_bias(per_head.view())?.bias().unwrap();
        assert_eq!((per_head.at(pair, 0), per_head.at(pair, 1)), (30.0, 31.0));
        assert!(per_head.check_heads(2).is_ok() && per_head.check_heads(3).is_err());

        // Axes of length 1 are shared.
        let of_keys = array![[1.0, 2.0, 3.0]];
        let of_keys = inputs.with_bias(of_keys.view())?.bias().unwrap();
        assert_eq!((of_keys.at(pair, 0), of_keys.slot(pair, 1)), (1.0, [0, 0, 0]));
        let grid = array![[[1.0], [2.0]], [[3.0], [4.0]]];
        let grid = inputs.with_bias(grid.view())?.bias().unwrap();
        assert_eq!((grid.at(pair, 0), grid.at(pair, 1)), (2.0, 4.0));
        assert_eq!(grid.slot(pair, 1), [1, 1, 0]);
        let error = inputs.with_bias(Array2::zeros((4, 3)).view()).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("bias, whose axes may also have length 1: expected shape [2, 3]")
        );
        Ok(())
    }

    #[test]
    fn masks_of_pairs_and_of_heads_hide_them() -> Result<()> {
        let (q, k) = (Array2::zeros((2, 2)), Array2::zeros((3, 2)));
        let inputs = Inputs::<f32>::dense(q.view(), k.view(), k.view())?.with_heads(2)?;
        let pairs = array![true, false, true, true, true, false];
        let masked = inputs.with_pair_mask(pairs.view())?;
        assert_eq!(keys_of(&masked, 0), [(0, 0), (2, 2)]);
        assert_eq!(keys_of(&masked, 1), [(0, 3), (1, 4)]);
        assert!(masked.bias().is_none() && masked.has(Channel::Mask));
        // Both hide.
        let keys = array![[false, true, true]];
        assert_eq!(keys_of(&masked.with_mask(keys.view())?, 0), [(2, 2)]);

        let heads = array![[[true, false, true]], [[true, true, true]]];
        let masked = inputs.with_mask(heads.view())?;
        assert_eq!(keys_of(&masked, 1).len(), 3);
        let bias = masked.bias().unwrap();
        let pair = Pair { query: 1, key: 1, index: 4 };
        assert_eq!((bias.at(pair, 0), bias.at(pair, 1)), (f32::NEG_INFINITY, 0.0));
        let error = bias.check_heads(3).unwrap_err();
        assert_eq!(error, Error::shape("mask", &[3, 1, 3], &[2, 1, 3]));
        let error = inputs.with_mask(array![[[true, true]]].view()).unwrap_err();
        assert!(matches!(error, Error::Shape { expected, .. } if expected == [1, 2, 3]));
        Ok(())
    }
}
