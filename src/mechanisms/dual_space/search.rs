//! Where latent neighbours come from if the inputs bring none.

use crate::error::{Result, check_shape};
use crate::float::Float;
use crate::graph::Graph;
use crate::inputs::{Inputs, Pattern};
use crate::neighbors::{ExactIndex, Metric, NeighborIndex, NeighborSearch};

/// How a [`DualSpace`](crate::DualSpace) finds latent neighbours: the k keys most similar to each
/// query, but not the node itself.
///
/// Whole rows of queries are compared with whole rows of keys, which need as many columns. Keys that
/// mask or causal pattern hide from a query are not among its k.
///
/// ```
/// use graph_attention::dual_space::LatentSearch;
/// use graph_attention::neighbors::{ExactIndex, Metric};
/// use graph_attention::ndarray::array;
///
/// // Among the keys of the inputs, anew in every forward pass.
/// let search = LatentSearch::new(8, Metric::Cosine).threshold(0.5).exclude_graph(true);
///
/// // Among keys that stay what they are, in an index that is built once.
/// let keys = array![[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]];
/// let index = ExactIndex::from_array(keys, Metric::Cosine)?;
/// let kept = LatentSearch::with_index(8, index).threshold(0.5);
/// # let _: [LatentSearch<f64>; 2] = [search, kept];
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Debug)]
pub struct LatentSearch<F: Float> {
    index: Index<F>,
    search: NeighborSearch<'static, F>,
    exclude_graph: bool,
}

#[derive(Debug)]
enum Index<F> {
    /// An exact one over the keys of the inputs.
    OfInputs(Metric),
    Kept(Box<dyn NeighborIndex<F>>),
}

impl<F: Float> LatentSearch<F> {
    /// Among the keys of the inputs: every query is compared with every key
    /// ([`ExactIndex`]), in every forward pass.
    #[must_use]
    pub fn new(k: usize, metric: Metric) -> Self {
        Self::of(k, Index::OfInputs(metric))
    }

    /// In an index that is built beforehand, over the keys that all inputs to come will have. It may be
    /// approximate, or compare other features of the keys than those that attend.
    #[must_use]
    pub fn with_index(k: usize, index: impl NeighborIndex<F> + 'static) -> Self {
        Self::of(k, Index::Kept(Box::new(index)))
    }

    fn of(k: usize, index: Index<F>) -> Self {
        let search = NeighborSearch::new(k).exclude_self(true);
        Self { index, search, exclude_graph: false }
    }

    /// Only keys of at least this similarity, in the units of the metric. Default: all.
    #[must_use]
    pub fn threshold(mut self, similarity: F) -> Self {
        self.search = self.search.threshold(similarity);
        self
    }

    /// Whether query i never finds key i. Default: `true`; `false` is for queries and keys that are
    /// not the same nodes.
    #[must_use]
    pub fn exclude_self(mut self, exclude: bool) -> Self {
        self.search = self.search.exclude_self(exclude);
        self
    }

    /// Whether queries do not find the keys that they attend to in the graph of the inputs: in dense
    /// inputs these are all. Default: `false`.
    #[must_use]
    pub fn exclude_graph(mut self, exclude: bool) -> Self {
        self.exclude_graph = exclude;
        self
    }

    /// The neighbours of the queries.
    pub(super) fn find(&self, inputs: &Inputs<'_, F>) -> Result<Graph> {
        let mut search = self.search.visible_in(inputs);
        match inputs.pattern() {
            Pattern::Graph(graph) if self.exclude_graph => search = search.exclude(graph),
            Pattern::Dense if self.exclude_graph => search.k = 0,
            _ => {}
        }
        let found = match &self.index {
            Index::OfInputs(metric) => {
                ExactIndex::new(inputs.key(), *metric)?.search(inputs.query(), &search)
            }
            Index::Kept(index) => {
                check_shape("keys of the index", &[inputs.num_keys()], &[index.num_keys()])?;
                index.search(inputs.query(), &search)
            }
        };
        Ok(found?.graph)
    }
}
