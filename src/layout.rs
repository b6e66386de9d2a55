//! Conversions between PyTorch's arrays of heads and batches and the layout of [`Inputs`](crate::Inputs).
//!
//! Inputs have one row per query or key, with the heads side by side: n × (heads · d). In PyTorch, heads and
//! batches are axes: batch × heads × n × d. Each function here returns a view if the strides allow it, and a
//! copy otherwise. The results are [`CowArray`]s; pass their [`view`](ndarray::ArrayRef::view) to the rest of
//! the crate.
//!
//! ```
//! use graph_attention::ndarray::{Array3, s};
//! use graph_attention::{Attention, Flash, Inputs, layout};
//!
//! // 2 heads, 3 positions, 4 columns, as in PyTorch.
//! let x = Array3::from_shape_fn((2, 3, 4), |(head, row, column)| (head + row * column) as f64);
//! let rows = layout::merge_heads(x.view());
//! assert_eq!(rows.dim(), (3, 8));
//!
//! let inputs = Inputs::dense(rows.view(), rows.view(), rows.view())?.with_heads(2)?;
//! let out = Flash::new().forward(&inputs)?;
//! let out = layout::split_heads(out.view(), 2)?;
//! assert_eq!(out.dim(), (2, 3, 4));
//!
//! let weights = Flash::new().attention_weights(&inputs)?; // 9 pairs × 2 heads
//! let weights = layout::weights_by_head(weights.view(), 3, 3)?;
//! assert!((weights.slice(s![1, 2, ..]).sum() - 1.0).abs() < 1e-15); // of query 2 in head 1
//! # Ok::<(), graph_attention::Error>(())
//! ```

use crate::error::{Error, Result, check_shape};
use ndarray::{
    Array, ArrayView, ArrayView2, ArrayView3, ArrayView4, Axis, CowArray, Dimension, Ix2, Ix3, Ix4,
};

/// Converts heads × n × d to n × (heads · d), the layout of [`Inputs`](crate::Inputs).
#[must_use]
pub fn merge_heads<T: Clone>(heads: ArrayView3<'_, T>) -> CowArray<'_, T, Ix2> {
    let (num_heads, rows, columns) = heads.dim();
    let mut rows_first = heads.permuted_axes([1, 0, 2]);
    if !rows_first.is_empty() && rows_first.merge_axes(Axis(1), Axis(2)) {
        return rows_first.index_axis_move(Axis(1), 0).into();
    }
    copied(rows_first, Ix2(rows, num_heads * columns))
}

/// Converts n × (heads · d) to heads × n × d.
///
/// # Errors
/// [`Error::Heads`] if the columns do not split into `heads` equal blocks.
pub fn split_heads<T: Clone>(
    rows: ArrayView2<'_, T>,
    heads: usize,
) -> Result<CowArray<'_, T, Ix3>> {
    let (num_rows, columns) = rows.dim();
    let shape = Ix3(num_rows, heads, columns_of_head(heads, columns)?);
    Ok(reshaped(rows, shape).permuted_axes([1, 0, 2]))
}

/// Converts batch × heads × n × d to (batch · n) × (heads · d): the sequences of the batch are
/// concatenated.
#[must_use]
pub fn merge_batch<T: Clone>(batch: ArrayView4<'_, T>) -> CowArray<'_, T, Ix2> {
    let (len, num_heads, rows, columns) = batch.dim();
    let mut rows_first = batch.permuted_axes([0, 2, 1, 3]);
    let is_merged = !batch.is_empty()
        && rows_first.merge_axes(Axis(2), Axis(3))
        && rows_first.merge_axes(Axis(0), Axis(1));
    if is_merged {
        return rows_first.index_axis_move(Axis(2), 0).index_axis_move(Axis(0), 0).into();
    }
    let merged = Ix2(len * rows, num_heads * columns);
    copied(batch.permuted_axes([0, 2, 1, 3]), merged)
}

/// Converts (batch · n) × (heads · d) to batch × heads × n × d.
///
/// # Errors
/// [`Error::InvalidArgument`] if the rows do not split into `batch` equal blocks, [`Error::Heads`] if the
/// columns do not split into `heads`.
pub fn split_batch<T: Clone>(
    rows: ArrayView2<'_, T>,
    batch: usize,
    heads: usize,
) -> Result<CowArray<'_, T, Ix4>> {
    let (num_rows, columns) = rows.dim();
    if batch == 0 || !num_rows.is_multiple_of(batch) {
        return Err(Error::config("batch", format!("a divisor of the {num_rows} rows"), batch));
    }
    let shape = Ix4(batch, num_rows / batch, heads, columns_of_head(heads, columns)?);
    Ok(reshaped(rows, shape).permuted_axes([0, 2, 1, 3]))
}

/// Converts the [attention weights](crate::Attention::attention_weights) of dense inputs, pairs × heads, to
/// heads × num_queries × num_keys.
///
/// # Errors
/// [`Error::Shape`] if there is not one row per pair.
pub fn weights_by_head<T: Clone>(
    weights: ArrayView2<'_, T>,
    num_queries: usize,
    num_keys: usize,
) -> Result<CowArray<'_, T, Ix3>> {
    let heads = weights.ncols();
    check_shape("weights", &[num_queries.saturating_mul(num_keys), heads], weights.shape())?;
    Ok(reshaped(weights, Ix3(num_queries, num_keys, heads)).permuted_axes([2, 0, 1]))
}

fn columns_of_head(heads: usize, columns: usize) -> Result<usize> {
    if heads == 0 || !columns.is_multiple_of(heads) {
        return Err(Error::Heads { what: "rows", heads, columns });
    }
    Ok(columns / heads)
}

/// Reshapes an array in row-major order, to a shape with the same number of elements.
fn reshaped<T: Clone, D: Dimension>(array: ArrayView2<'_, T>, shape: D) -> CowArray<'_, T, D> {
    match array.into_shape_with_order(shape.clone()) {
        Ok(view) => view.into(),
        Err(_) => copied(array, shape),
    }
}

/// Copies an array to a shape with the same number of elements.
fn copied<'a, T: Clone, D: Dimension, E: Dimension>(
    array: ArrayView<'_, T, D>,
    shape: E,
) -> CowArray<'a, T, E> {
    let numbers = array.iter().cloned().collect();
    Array::from_shape_vec(shape, numbers).expect("as many numbers").into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, Array3, Array4, s};

    /// Returns an array with these axes whose numbers encode their indices.
    fn batch(len: usize, heads: usize, rows: usize, columns: usize) -> Array4<usize> {
        Array4::from_shape_fn((len, heads, rows, columns), |(b, h, r, c)| {
            b * 1000 + h * 100 + r * 10 + c
        })
    }

    #[test]
    fn heads_and_batches_come_back() -> Result<()> {
        for (len, heads, rows, columns) in [(2, 3, 4, 5), (1, 1, 1, 1), (2, 1, 3, 2), (3, 2, 0, 4)]
        {
            let x = batch(len, heads, rows, columns);
            let merged = merge_batch(x.view());
            let at = |row: usize, column: usize| {
                x[[row / rows, column / columns, row % rows, column % columns]]
            };
            let expected = Array2::from_shape_fn((len * rows, heads * columns), |(r, c)| at(r, c));
            assert_eq!(merged, expected);
            assert_eq!(split_batch(merged.view(), len, heads)?, x);
            for x in x.outer_iter() {
                assert_eq!(split_heads(merge_heads(x).view(), heads)?, x);
            }
            // Rows in reverse order with gaps are copied.
            let mut apart = Array2::zeros((2 * len * rows, heads * columns));
            let mut apart = apart.slice_mut(s![..;-2, ..]);
            apart.assign(&expected);
            assert_eq!(split_batch(apart.view(), len, heads)?, x);
        }
        Ok(())
    }

    #[test]
    fn nothing_is_copied_where_strides_allow() -> Result<()> {
        let rows = Array2::from_shape_fn((4, 6), |(row, column)| 10 * row + column);
        let heads = split_heads(rows.view(), 3)?;
        assert!(heads.is_view() && merge_heads(heads.view()).is_view());
        let batch = split_batch(rows.view(), 2, 3)?;
        assert!(batch.is_view());
        let merged = merge_batch(batch.view());
        assert!(merged.is_view());
        assert_eq!(merged, rows);
        assert!(merge_heads(Array3::<u8>::zeros((1, 2, 3)).view()).is_view());
        assert!(!merge_heads(Array3::<u8>::zeros((2, 2, 3)).view()).is_view());
        let weights = weights_by_head(rows.view(), 2, 2)?;
        assert!(weights.is_view());
        assert_eq!(weights[[5, 1, 0]], rows[[2, 5]]);
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_split_are_errors() {
        let rows = Array2::<f32>::zeros((4, 6));
        let heads = |heads| Error::Heads { what: "rows", heads, columns: 6 };
        assert_eq!(split_heads(rows.view(), 4).unwrap_err(), heads(4));
        assert_eq!(split_heads(rows.view(), 0).unwrap_err(), heads(0));
        assert_eq!(split_batch(rows.view(), 2, 5).unwrap_err(), heads(5));
        for batch in [0, 3] {
            let error = split_batch(rows.view(), batch, 1).unwrap_err();
            assert_eq!(error, Error::config("batch", "a divisor of the 4 rows", batch));
        }
        let error = weights_by_head(rows.view(), 2, 3).unwrap_err();
        assert_eq!(error, Error::shape("weights", &[6, 6], &[4, 6]));
    }
}
