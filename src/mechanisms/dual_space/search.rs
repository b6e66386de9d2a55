//! The search for latent neighbours, if the inputs have none.

use crate::error::{Result, check_shape};
use crate::graph::Graph;
use crate::inputs::{Inputs, Pattern};
use crate::kernels::Float;
use crate::neighbors::{ExactIndex, Metric, NeighborIndex, NeighborSearch};

/// A search for the latent neighbours of a [`DualSpace`](crate::DualSpace): the k keys most similar to
/// each query, except the node itself.
///
/// Whole rows of queries are compared with whole rows of keys, so they need the same number of columns.
/// Keys that mask or causal pattern hide from a query are not among its k neighbours.
///
/// ```
/// use graph_attention::dual_space::LatentSearch;
/// use graph_attention::neighbors::{ExactIndex, Metric};
/// use graph_attention::ndarray::array;
///
/// // Search the keys of the inputs, in every forward pass.
/// let search = LatentSearch::new(8, Metric::Cosine).threshold(0.5).exclude_graph(true);
///
/// // Search keys that never change, in an index that is built once.
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
    /// An exact index over the keys of the inputs.
    OfInputs(Metric),
    Kept(Box<dyn NeighborIndex<F>>),
}

impl<F: Float> LatentSearch<F> {
    /// Creates a search over the keys of the inputs: every query is compared with every key
    /// ([`ExactIndex`]), in every forward pass.
    #[must_use]
    pub fn new(k: usize, metric: Metric) -> Self {
        Self::of(k, Index::OfInputs(metric))
    }

    /// Creates a search in an existing index, over the keys that all later inputs will have. The index
    /// may be approximate, or compare features of the keys other than those used for attention.
    #[must_use]
    pub fn with_index(k: usize, index: impl NeighborIndex<F> + 'static) -> Self {
        Self::of(k, Index::Kept(Box::new(index)))
    }

    fn of(k: usize, index: Index<F>) -> Self {
        let search = NeighborSearch::new(k).exclude_self(true);
        Self { index, search, exclude_graph: false }
    }

    /// Sets the smallest similarity of neighbours, in the units of the metric. Default: no threshold.
    #[must_use]
    pub fn threshold(mut self, similarity: F) -> Self {
        self.search = self.search.threshold(similarity);
        self
    }

    /// Sets whether query i never finds key i. Default: `true`; use `false` if queries and keys are not
    /// the same nodes.
    #[must_use]
    pub fn exclude_self(mut self, exclude: bool) -> Self {
        self.search = self.search.exclude_self(exclude);
        self
    }

    /// Sets whether queries do not find the keys that they attend to in the graph of the inputs; in dense
    /// inputs these are all keys. Default: `false`.
    #[must_use]
    pub fn exclude_graph(mut self, exclude: bool) -> Self {
        self.exclude_graph = exclude;
        self
    }

    /// Finds the neighbours of the queries.
    pub(super) fn find(&self, inputs: &Inputs<'_, F>) -> Result<Graph> {
        let mut search = self.search.visible_in(inputs);
        match inputs.pattern() {
            Pattern::Graph(graph) if self.exclude_graph => search = search.exclude(graph),
            Pattern::Dense | Pattern::Packed(_) if self.exclude_graph => search.k = 0,
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
