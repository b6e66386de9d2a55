use super::Graph;
use crate::error::Result;
use ::sprs::{CompressedStorage, CsMatViewI, SpIndex};

impl Graph {
    /// Creates a graph from the stored entries of a sparse matrix of the crate `sprs`, stored by rows
    /// (CSR) or by columns (CSC). Requires the feature `sprs`.
    ///
    /// **Direction.** Rows are queries and columns are keys, so attention is the matrix of weights times
    /// the matrix of values: entry (i, j) lets query i attend to key j. (If the rows of an adjacency
    /// matrix are the sources of edges, pass its `transpose_view`, which corresponds to PyG's `adj_t`.) A
    /// non-square matrix is a graph between two sets of nodes. Every stored entry is a pair, even if it
    /// is zero.
    ///
    /// **Pair order.** Pairs are in the order of [`data`](CsMatViewI::data) with either storage: pair p
    /// has the value `matrix.data()[p]`. O(rows + columns + entries).
    ///
    /// ```
    /// use graph_attention::ndarray::{ArrayView2, array};
    /// use graph_attention::{Attention, Flash, Graph, Inputs};
    /// use sprs::CsMat;
    ///
    /// // By columns: queries 0 and 1 attend to key 0, query 0 attends to key 2.
    /// let matrix = CsMat::new_csc((2, 3), vec![0, 2, 2, 3], vec![0, 1, 0], vec![0.5, 9.0, 0.5]);
    /// let graph = Graph::from_sprs(matrix.view())?;
    /// assert_eq!(graph.row(0).collect::<Vec<_>>(), [(0, 0), (2, 2)]); // key and pair
    ///
    /// let queries = array![[0.0], [0.0]];
    /// let keys = array![[1.0], [2.0], [3.0]];
    /// let bias = ArrayView2::from_shape((graph.num_edges(), 1), matrix.data()).expect("one a pair");
    /// let inputs = Inputs::graph(queries.view(), keys.view(), keys.view(), &graph)?.with_bias(bias)?;
    /// assert_eq!(Flash::new().forward(&inputs)?, array![[2.0], [1.0]]);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Graph`](crate::Error::Graph) if there are more than `u32::MAX` rows, columns or entries.
    pub fn from_sprs<N, I: SpIndex, Iptr: SpIndex>(
        matrix: CsMatViewI<'_, N, I, Iptr>,
    ) -> Result<Self> {
        let storage = matrix.storage();
        let entries = matrix.outer_iterator().enumerate().flat_map(|(outer, line)| {
            let (indices, _) = line.into_raw_storage();
            indices.iter().map(move |inner| match storage {
                CompressedStorage::CSR => (outer, inner.index()),
                CompressedStorage::CSC => (inner.index(), outer),
            })
        });
        Self::from_edges(matrix.rows(), matrix.cols(), entries)
    }
}
