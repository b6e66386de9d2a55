//! Parts of a problem that do not touch each other.

use ndarray::{ArrayViewMut2, Axis};
use std::ops::Range;

/// Runs a task for each part. Each writes to places of its own, so their order does not matter.
pub(crate) fn for_each<T: Send>(parts: Vec<T>, run: impl Fn(T) + Send + Sync) {
    parts.into_iter().for_each(run);
}

/// 0..len in steps.
pub(crate) fn ranges(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(step.max(1)).map(move |start| start..len.min(start + step))
}

/// The length of at most `parts` parts of `len`, in whole blocks.
pub(crate) fn part_len(len: usize, block: usize, parts: usize) -> usize {
    len.div_ceil(block).div_ceil(parts).max(1) * block
}

/// The rows of a matrix in chunks, without end: the last ones are empty.
pub(crate) fn row_chunks<F>(
    matrix: ArrayViewMut2<'_, F>,
    len: usize,
) -> impl Iterator<Item = ArrayViewMut2<'_, F>> {
    let mut rest = Some(matrix);
    std::iter::from_fn(move || {
        let rows = rest.take()?;
        let end = len.min(rows.nrows());
        let (chunk, after) = rows.split_at(Axis(0), end);
        rest = Some(after);
        Some(chunk)
    })
}
