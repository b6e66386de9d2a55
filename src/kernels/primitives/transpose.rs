//! Transposes in registers, which turn rows of queries into the lanes of a tile, and back.

use super::matmul::Vector;
use crate::kernels::Float;
use fearless_simd::{Level, Simd, SimdBase, SimdFloatElement};
use std::ops::AddAssign;

/// The largest length of a vector of any instruction set.
pub(super) const MOST: usize = 16;

/// Passes the transpose of a `num_rows` × `num_columns` matrix to `visit`, block by block: first column, first
/// row, and for each column from there on a vector of its entries. `row` returns a row; entries past the
/// last column are ignored. Entries past the last row are zeros.
#[inline(always)]
pub(crate) fn transposed<'a, S: Simd, F: SimdFloatElement + 'static>(
    simd: S,
    num_rows: usize,
    num_columns: usize,
    row: impl Fn(usize) -> &'a [F],
    mut visit: impl FnMut(usize, usize, &[Vector<S, F>]),
) {
    let len = Vector::<S, F>::LEN;
    let zeros = [Vector::<S, F>::splat(simd, F::from(0u8)); MOST];
    for first in (0..num_rows).step_by(len) {
        let count = len.min(num_rows - first);
        let mut column = 0;
        if count == len {
            // All rows have the same length for the compiler too, so it is checked once for all of them.
            let mut rows = [&[] as &[F]; MOST];
            for (r, slice) in rows[..len].iter_mut().enumerate() {
                *slice = &row(first + r)[..num_columns];
            }
            while column + len <= num_columns {
                let mut block = zeros;
                for (vector, row) in block[..len].iter_mut().zip(&rows[..len]) {
                    *vector = Vector::<S, F>::from_slice(simd, &row[column..column + len]);
                }
                let block = transpose_block::<S, F>(block);
                visit(column, first, &block[..len]);
                column += len;
            }
        }
        for column in (column..num_columns).step_by(len) {
            let mut block = zeros;
            for (r, vector) in block[..len].iter_mut().enumerate() {
                if r < count {
                    *vector = load_padded::<S, F>(simd, &row(first + r)[column..]);
                }
            }
            let block = transpose_block::<S, F>(block);
            visit(column, first, &block[..len.min(num_columns - column)]);
        }
    }
}

/// Transposes the first vectors, as many as a vector has lanes.
#[inline(always)]
fn transpose_block<S: Simd, F: SimdFloatElement + 'static>(
    block: [Vector<S, F>; MOST],
) -> [Vector<S, F>; MOST] {
    let len = Vector::<S, F>::LEN;
    interleave::<S, F, MOST>(block, len)
}

/// Turns the first `rows` vectors, a power of two, into their columns, one after another.
///
/// Interleaving the entries of the two halves moves the highest bit of an entry's address, (row, column),
/// to the lowest position. After as many steps as a row index has bits, columns have become rows.
#[inline(always)]
pub(crate) fn interleave<S: Simd, F: SimdFloatElement + 'static, const N: usize>(
    mut block: [Vector<S, F>; N],
    rows: usize,
) -> [Vector<S, F>; N] {
    let mut done = 1;
    while done < rows {
        let halves = block;
        for r in 0..rows / 2 {
            (block[2 * r], block[2 * r + 1]) = halves[r].interleave(halves[r + rows / 2]);
        }
        done *= 2;
    }
    block
}

/// Turns the columns of N vectors, one after another, into the vectors: the inverse of [`interleave`].
#[inline(always)]
pub(crate) fn deinterleave<S: Simd, F: SimdFloatElement + 'static, const N: usize>(
    mut block: [Vector<S, F>; N],
) -> [Vector<S, F>; N] {
    let mut done = 1;
    while done < N {
        let pairs = block;
        for r in 0..N / 2 {
            (block[r], block[r + N / 2]) = pairs[2 * r].deinterleave(pairs[2 * r + 1]);
        }
        done *= 2;
    }
    block
}

/// Loads the first entries of a row, with zeros past its end.
#[inline(always)]
fn load_padded<S: Simd, F: SimdFloatElement + 'static>(simd: S, row: &[F]) -> Vector<S, F> {
    let len = Vector::<S, F>::LEN;
    match row.get(..len) {
        Some(row) => Vector::<S, F>::from_slice(simd, row),
        None => Vector::<S, F>::from_slice(simd, &padded(row)[..len]),
    }
}

/// Compiled once, because it is only needed at the end of rows.
#[inline(never)]
fn padded<F: SimdFloatElement>(row: &[F]) -> [F; MOST] {
    let mut padded = [F::from(0u8); MOST];
    padded[..row.len()].copy_from_slice(row);
    padded
}

/// Stores as many of the entries as fit into the row.
#[inline(always)]
pub(crate) fn store_part<S: Simd, F: SimdFloatElement + 'static>(
    entries: Vector<S, F>,
    row: &mut [F],
) {
    match row.get_mut(..Vector::<S, F>::LEN) {
        Some(row) => entries.store_slice(row),
        None => {
            let len = row.len();
            row.copy_from_slice(&entries.as_slice()[..len]);
        }
    }
}

/// Adds as many of the entries as fit into the row to it.
#[inline(always)]
pub(crate) fn add_part<S: Simd, F: SimdFloatElement + AddAssign + 'static>(
    simd: S,
    entries: Vector<S, F>,
    row: &mut [F],
) {
    match row.get_mut(..Vector::<S, F>::LEN) {
        Some(row) => (Vector::<S, F>::from_slice(simd, row) + entries).store_slice(row),
        None => row.iter_mut().zip(entries.as_slice()).for_each(|(sum, &entry)| *sum += entry),
    }
}

/// Overwrites `columns`, each at a multiple of `stride`, with the columns of a matrix of this size. May overwrite
/// up to a whole vector of each, with meaningless numbers.
#[inline(never)]
pub(crate) fn to_columns<'a, F: Float>(
    level: Level,
    [num_rows, num_columns]: [usize; 2],
    row: impl Fn(usize) -> &'a [F],
    columns: &mut [F],
    stride: usize,
) {
    dispatch!(level, simd => columns_in_vectors(simd, [num_rows, num_columns], row, columns, stride));
}

#[inline(always)]
fn columns_in_vectors<'a, S: Simd, F: Float>(
    simd: S,
    [num_rows, num_columns]: [usize; 2],
    row: impl Fn(usize) -> &'a [F],
    columns: &mut [F],
    stride: usize,
) {
    let len = Vector::<S, F>::LEN;
    // Rows shorter than a vector would each be copied first.
    let whole = num_columns - num_columns % len;
    transposed(
        simd,
        num_rows,
        whole,
        #[inline(always)]
        |r| row(r),
        #[inline(always)]
        |column, first, vectors| {
            for (column, vector) in (column..).zip(vectors) {
                vector.store_slice(&mut columns[column * stride + first..][..len]);
            }
        },
    );
    for r in (0..num_rows).filter(|_| whole < num_columns) {
        for (column, &entry) in row(r)[..num_columns].iter().enumerate().skip(whole) {
            columns[column * stride + r] = entry;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::levels;

    #[inline(always)]
    fn check<S: Simd, F>(simd: S, num_rows: usize, num_columns: usize)
    where
        F: SimdFloatElement + From<u16> + PartialEq + 'static + std::fmt::Debug,
    {
        let len = Vector::<S, F>::LEN;
        let entry = |row, column| F::from((1 + row * num_columns + column) as u16);
        let rows: Vec<Vec<F>> = (0..num_rows)
            .map(|row| (0..num_columns).map(|column| entry(row, column)).collect())
            .collect();
        let mut visited = Vec::new();
        transposed::<S, F>(
            simd,
            num_rows,
            num_columns,
            |row| &rows[row],
            |column, row, vectors| {
                let vectors = vectors.iter().enumerate();
                let vectors =
                    vectors.map(|(c, vector)| (column + c, row, vector.as_slice().to_vec()));
                visited.extend(vectors);
            },
        );
        visited.sort_by_key(|&(column, row, _)| (column, row));
        let blocks = |column: usize| (0..num_rows).step_by(len).map(move |row| (column, row));
        let zero_past = |row: usize, column| {
            if row < num_rows { entry(row, column) } else { F::from(0u16) }
        };
        let expected: Vec<_> = (0..num_columns)
            .flat_map(blocks)
            .map(|(column, row)| {
                let entries = (row..row + len).map(|row| zero_past(row, column)).collect();
                (column, row, entries)
            })
            .collect();
        assert_eq!(visited, expected, "{num_rows} x {num_columns}, vectors of {len}");
    }

    #[test]
    fn columns_become_rows_at_every_size() {
        for level in levels() {
            for num_rows in [0, 1, 3, 4, 5, 8, 15, 16, 17, 33] {
                for num_columns in [0, 1, 2, 4, 7, 8, 9, 16, 31, 32] {
                    dispatch!(level, simd => check::<_, f32>(simd, num_rows, num_columns));
                    dispatch!(level, simd => check::<_, f64>(simd, num_rows, num_columns));
                }
            }
        }
    }
}
