use super::{Metric, Neighbor, NeighborIndex, NeighborSearch, Neighbors, collect};
use crate::error::{Result, check_shape};
use crate::kernels::Float;
use crate::kernels::keys::Keys;
use crate::kernels::level::level;
use crate::kernels::problem::Rows;
use ndarray::{Array2, ArrayView1, ArrayView2, Axis};

/// An exact index, which compares every query with every key.
///
/// Similarities of the given rows are computed in `f64`, also for `f32`, and ties go to the lower number,
/// so the result is the same on every CPU and for any number of threads. This costs little: products of
/// whole tiles in the element's own precision first exclude the keys that cannot be among the nearest,
/// with a margin above their rounding error. For [`Metric::Euclidean`] these are sums of squared
/// differences, so close points far from the origin are distinguished.
///
/// Takes O(queries · keys · dim) time, and O(keys) memory besides the keys and O(queries · k). If many
/// similarities are within the rounding error of the k-th (thousands of copies of one key), or increase
/// with the keys' numbers, more keys are processed twice.
///
/// ```
/// use graph_attention::neighbors::{ExactIndex, Metric, NeighborIndex, NeighborSearch};
/// use graph_attention::ndarray::array;
///
/// let keys = array![[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [f32::NAN, 1.0]];
/// let queries = array![[0.6, 0.8]];
/// let index = ExactIndex::new(keys.view(), Metric::Dot)?; // borrows the keys
/// let found = index.search(queries.view(), &NeighborSearch::new(2))?;
/// assert_eq!(found.graph.neighbors(0), [2, 0]);
/// assert_eq!(found.similarities.to_vec(), [10.0, 5.0]);
///
/// // An index that owns its keys can be kept.
/// let index = ExactIndex::from_array(keys, Metric::Euclidean)?;
/// let kept: Box<dyn NeighborIndex<f32>> = Box::new(index);
/// assert_eq!(kept.search(queries.view(), &NeighborSearch::new(1))?.graph.neighbors(0), [1]);
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Debug)]
pub struct ExactIndex<'a, F: Float> {
    keys: Keys<'a, F>,
}

impl<'a, F: Float> ExactIndex<'a, F> {
    /// Creates an index over `keys`, num_keys × dim, which are borrowed (and copied only if their rows
    /// are not contiguous). O(num_keys · dim).
    ///
    /// # Errors
    /// [`Error::Graph`](crate::Error::Graph) if there are more than `u32::MAX` keys,
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if a curvature is not positive and finite,
    /// [`Error::TooLarge`](crate::Error::TooLarge) if memory is refused.
    pub fn new(keys: ArrayView2<'a, F>, metric: Metric) -> Result<Self> {
        Ok(Self { keys: Keys::new(Rows::new("keys", keys)?, keys.nrows(), metric)? })
    }

    /// Creates an index that owns its keys, and so can outlive the caller's arrays.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_array(keys: Array2<F>, metric: Metric) -> Result<Self> {
        let num_keys = keys.nrows();
        Ok(Self { keys: Keys::new(Rows::owned("keys", keys)?, num_keys, metric)? })
    }

    /// Returns the measure of similarity.
    #[must_use]
    pub fn metric(&self) -> Metric {
        self.keys.metric()
    }
}

impl<F: Float> NeighborIndex<F> for ExactIndex<'_, F> {
    fn num_keys(&self) -> usize {
        self.keys.len()
    }

    fn dim(&self) -> usize {
        self.keys.dim()
    }

    fn nearest_into(
        &self,
        query: ArrayView1<'_, F>,
        k: usize,
        nearest: &mut Vec<Neighbor<F>>,
    ) -> Result<()> {
        check_shape("query", &[self.dim()], query.shape())?;
        let found = self.search(query.insert_axis(Axis(0)), &NeighborSearch::new(k))?;
        let keys = found.graph.indices().iter().zip(found.similarities);
        nearest.clear();
        nearest.extend(keys.map(|(&key, similarity)| Neighbor { key: key as usize, similarity }));
        Ok(())
    }

    fn search(
        &self,
        queries: ArrayView2<'_, F>,
        search: &NeighborSearch<'_, F>,
    ) -> Result<Neighbors<F>> {
        let num_keys = self.num_keys();
        search.check(queries.dim(), num_keys, self.dim())?;
        let rows = Rows::new("queries", queries)?;
        search_all(&self.keys, &rows, queries.nrows(), search)
    }
}

/// Compares every query with every key. The search must have been checked.
pub(super) fn search_all<F: Float>(
    keys: &Keys<'_, F>,
    queries: &Rows<'_, F>,
    num_queries: usize,
    search: &NeighborSearch<'_, F>,
) -> Result<Neighbors<F>> {
    let work = num_queries.saturating_mul(keys.dim()).saturating_mul(keys.len());
    let level = level();
    let accepts = |query, key: u32, similarity| {
        search.accepts(query, Neighbor { key: key as usize, similarity })
    };
    collect(num_queries, keys.len(), search.k, work, |rows, lists| {
        F::nearest(level, keys, queries, rows, search.threshold, &accepts, lists);
        Ok(())
    })
}
