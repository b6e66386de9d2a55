//! Matrix products of small tiles, in registers.
//!
//! The right factor is read in *panels* of [`panel_width`] columns: two vectors side by side. The left
//! factor is read in place, in one of two ways: in [`rows_times`] the inner index runs along its rows, in
//! [`columns_times`] from row to row. Six rows of the result at a time are twelve sums, two vectors of
//! the panel and one factor: fifteen registers; even AVX2 has sixteen. AVX-512 has thirty-two, enough for
//! a *strip* of two panels, which reads each factor of the left half as often.
//!
//! The functions are compiled once for each type and instruction set and called for a tile at a time: if
//! inlined into every kernel, they would make the build take minutes. The loops over the inner index use
//! zipped iterators, which have no bounds checks; with one index for six rows, each step of twelve
//! multiply-adds would have six of them.

use crate::kernels::Float;
use crate::kernels::primitives::transpose::MOST as MOST_LANES;
use fearless_simd::{Level, Simd, SimdBase, SimdFloat, SimdFloatElement};
use std::ops::Range;

/// The widest vector of the CPU.
pub(crate) type Vector<S, F> = <F as SimdFloatElement>::Native<S>;

/// A row of a panel.
pub(crate) type PanelRow<S, F> = [Vector<S, F>; 2];

/// Rows of the result at a time.
pub(super) const ROWS: usize = 6;

/// The number of rows of the factors of [`columns_times`] that are summed from zero before the sum is added
/// to the target. A single sum, to which small terms are added one by one, would lose digits; but each sum
/// takes the time of three rows.
const ROWS_OF_SUM: usize = 48;

/// The panels of a strip.
const PANELS: usize = 2;

/// Lanes of a vector.
pub(crate) fn vector_len<F: Float>(level: Level) -> usize {
    #[inline(always)]
    fn len<S: Simd, F: Float>(_: S) -> usize {
        Vector::<S, F>::LEN
    }
    dispatch!(level, simd => len::<_, F>(simd))
}

/// Columns of a panel.
pub(crate) fn panel_len<F: Float>(level: Level) -> usize {
    2 * vector_len::<F>(level)
}

/// [`panel_len`] for an instruction set that is known at compile time.
#[inline(always)]
pub(crate) fn panel_width<S: Simd, F: SimdFloatElement + 'static>() -> usize {
    2 * Vector::<S, F>::LEN
}

/// Columns of a strip: the lanes of a product that are computed together, if there are that many.
pub(crate) fn strip_len<F: Float>(level: Level) -> usize {
    #[inline(always)]
    fn len<S: Simd, F: Float>(_: S) -> usize {
        strip_width::<S, F>()
    }
    dispatch!(level, simd => len::<_, F>(simd))
}

/// [`strip_len`] for an instruction set that is known at compile time.
#[inline(always)]
fn strip_width<S: Simd, F: SimdFloatElement + 'static>() -> usize {
    panel_width::<S, F>() * if has_strips::<S, F>() { PANELS } else { 1 }
}

/// Whether there are registers for the sums of two panels: only AVX-512 has such long vectors.
#[inline(always)]
fn has_strips<S: Simd, F: SimdFloatElement + 'static>() -> bool {
    Vector::<S, F>::LEN * size_of::<F>() == 64
}

#[inline(always)]
pub(crate) fn splat<S: Simd, F: SimdFloatElement + 'static>(simd: S, value: F) -> PanelRow<S, F> {
    [Vector::<S, F>::splat(simd, value); 2]
}

#[inline(always)]
pub(crate) fn load<S: Simd, F: SimdFloatElement + 'static>(simd: S, row: &[F]) -> PanelRow<S, F> {
    let len = Vector::<S, F>::LEN;
    let row = &row[..2 * len];
    [Vector::<S, F>::from_slice(simd, &row[..len]), Vector::<S, F>::from_slice(simd, &row[len..])]
}

#[inline(always)]
pub(crate) fn store<S: Simd, F: SimdFloatElement + 'static>([a, b]: PanelRow<S, F>, row: &mut [F]) {
    let len = Vector::<S, F>::LEN;
    let row = &mut row[..2 * len];
    a.store_slice(&mut row[..len]);
    b.store_slice(&mut row[len..]);
}

/// Rows of `stride` entries, used from `column` on. All rows are complete, so a loop over them checks the
/// length of only one.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, F> {
    pub(crate) data: &'a [F],
    pub(crate) stride: usize,
    pub(crate) column: usize,
}

/// The largest stride and number of rows. If the compiler knows that their product does not overflow,
/// `chunks_exact` need not divide it by one of them.
const MOST: usize = u32::MAX as usize;

impl<'a, F> Matrix<'a, F> {
    #[inline(always)]
    pub(crate) fn new(data: &'a [F], stride: usize) -> Self {
        Self { data, stride, column: 0 }
    }

    /// Without its first columns.
    #[inline(always)]
    pub(crate) fn skip_columns(self, columns: usize) -> Self {
        Self { column: self.column + columns, ..self }
    }

    #[inline(always)]
    fn num_rows(self) -> usize {
        self.data.len() / self.stride.max(1)
    }

    /// Without its first rows.
    #[inline(always)]
    fn skip_rows(self, rows: usize) -> Self {
        Self { data: &self.data[rows * self.stride..], ..self }
    }

    /// The first rows, from the column on.
    #[inline(always)]
    fn rows(self, num_rows: usize) -> impl Iterator<Item = &'a [F]> + use<'a, F> {
        let (stride, column) = (self.stride.clamp(1, MOST), self.column);
        self.data[..num_rows.min(MOST) * stride].chunks_exact(stride).map(
            #[inline(always)]
            move |row| &row[column..],
        )
    }
}

/// A left factor with `len` used columns.
#[derive(Clone, Copy)]
pub(crate) struct Left<'l, F> {
    pub(crate) rows: Matrix<'l, F>,
    pub(crate) len: usize,
}

impl<'l, F> Left<'l, F> {
    /// Creates it from all columns of contiguous rows.
    #[inline(always)]
    pub(crate) fn new(data: &'l [F], stride: usize) -> Self {
        Self { rows: Matrix::new(data, stride), len: stride }
    }

    /// The first columns.
    #[inline(always)]
    pub(crate) fn with_len(self, len: usize) -> Self {
        Self { len, ..self }
    }

    #[inline(always)]
    fn row(self, row: usize) -> &'l [F] {
        let Matrix { data, stride, column } = self.rows;
        &data[row * stride + column..][..self.len]
    }
}

/// How a product is combined with the existing numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target<'t, F> {
    Add,
    /// Overwrites without reading: an untouched page of zeros is not allocated yet, and reading would
    /// fault twice.
    Overwrite,
    /// Multiplies by a factor for each column, then adds.
    Rescale(&'t [F]),
}

/// The target of a product: rows of `stride` entries, with the given number of columns from `start` on.
pub(crate) struct Out<'o, F> {
    pub(crate) data: &'o mut [F],
    pub(crate) stride: usize,
    pub(crate) start: usize,
    pub(crate) columns: usize,
}

impl<'o, F: Float> Out<'o, F> {
    /// All columns.
    #[inline(always)]
    pub(crate) fn new(data: &'o mut [F], stride: usize) -> Self {
        Self { data, stride, start: 0, columns: stride }
    }

    /// Some columns of rows of `stride`.
    #[inline(always)]
    pub(crate) fn columns(data: &'o mut [F], stride: usize, columns: Range<usize>) -> Self {
        Self { data, stride, start: columns.start, columns: columns.len() }
    }

    /// Stores the first `count` of some rows of a panel, or as much of them as there are columns.
    #[inline(always)]
    fn put<S: Simd, const M: usize>(
        &mut self,
        simd: S,
        (row, column): (usize, usize),
        sums: [PanelRow<S, F>; M],
        count: usize,
        target: Target<'_, F>,
    ) {
        let panel = panel_width::<S, F>();
        let columns = self.columns - column;
        let mut rows = &mut self.data[row * self.stride + self.start + column..];
        if count == M && columns >= panel {
            for sums in sums {
                let (row, later_rows) = rows.split_at_mut(self.stride.min(rows.len()));
                let sums = match target {
                    Target::Overwrite => sums,
                    Target::Add => {
                        let [a, b] = load::<S, F>(simd, row);
                        [a + sums[0], b + sums[1]]
                    }
                    Target::Rescale(factors) => {
                        let [a, b] = load::<S, F>(simd, row);
                        let factors = load::<S, F>(simd, &factors[column..]);
                        [a.mul_add(factors[0], sums[0]), b.mul_add(factors[1], sums[1])]
                    }
                };
                store::<S, F>(sums, row);
                rows = later_rows;
            }
            return;
        }
        let mut entries = [[F::zero(); 2 * MOST_LANES]; M];
        for (entries, sums) in entries.iter_mut().zip(sums) {
            store::<S, F>(sums, entries);
        }
        let target = match target {
            Target::Rescale(factors) => Target::Rescale(&factors[column..]),
            target => target,
        };
        put_part(&entries[..count], panel.min(columns), target, rows, self.stride);
    }
}

/// [`Out::put`] for some rows, or for rows shorter than a panel. Compiled once, because it is only needed
/// at the ends.
#[inline(never)]
fn put_part<F: Float>(
    rows: &[[F; 2 * MOST_LANES]],
    len: usize,
    target: Target<'_, F>,
    out: &mut [F],
    stride: usize,
) {
    for (row, out) in rows.iter().zip(out.chunks_mut(stride)) {
        let entries = out[..len].iter_mut().zip(row);
        match target {
            Target::Overwrite => entries.for_each(|(out, &sum)| *out = sum),
            Target::Add => entries.for_each(|(out, &sum)| *out += sum),
            Target::Rescale(factors) => {
                entries.zip(factors).for_each(|((out, &sum), &factor)| *out = *out * factor + sum);
            }
        }
    }
}

/// Computes left · right for some rows of `left`; `right` in whole panels.
#[inline(never)]
pub(crate) fn rows_times<F: Float>(
    level: Level,
    num_rows: usize,
    left: Left<'_, F>,
    right: Matrix<'_, F>,
    target: Target<'_, F>,
    mut out: Out<'_, F>,
) {
    let columns = out.columns;
    dispatch!(level, simd => rows_with::<_, F, false>(
        simd,
        num_rows,
        left,
        right,
        columns,
        #[inline(always)]
        |row, column, sums, count| out.put(simd, (row, column), sums, count, target),
    ));
}

/// [`rows_times`] with a column for each of `maxima`, which it raises to the largest entries.
#[inline(never)]
pub(crate) fn rows_times_with_max<F: Float>(
    level: Level,
    num_rows: usize,
    left: Left<'_, F>,
    right: Matrix<'_, F>,
    maxima: &mut [F],
    out: Out<'_, F>,
) {
    dispatch!(level, simd => with_max(simd, num_rows, left, right, maxima, out));
}

#[inline(always)]
fn with_max<S: Simd, F: Float>(
    simd: S,
    num_rows: usize,
    left: Left<'_, F>,
    right: Matrix<'_, F>,
    maxima: &mut [F],
    mut out: Out<'_, F>,
) {
    rows_with::<S, F, false>(
        simd,
        num_rows,
        left,
        right,
        maxima.len(),
        #[inline(always)]
        |row, column, sums, count| {
            let maxima = &mut maxima[column..];
            let mut max = load::<S, F>(simd, maxima);
            for [a, b] in sums {
                max = [max[0].max(a), max[1].max(b)];
            }
            store::<S, F>(max, maxima);
            out.put(simd, (row, column), sums, count, Target::Overwrite);
        },
    );
}

/// Like [`rows_times`], but Σₜ (left\[m, t\] − right\[t, n\])² instead of products. |a|² + |b|² − 2 a·b
/// would be faster, but lose the distance between close points.
#[inline(never)]
pub(crate) fn squared_distances<F: Float>(
    level: Level,
    num_rows: usize,
    left: Left<'_, F>,
    right: Matrix<'_, F>,
    mut out: Out<'_, F>,
) {
    let columns = out.columns;
    dispatch!(level, simd => rows_with::<_, F, true>(
        simd,
        num_rows,
        left,
        right,
        columns,
        #[inline(always)]
        |row, column, sums, count| out.put(simd, (row, column), sums, count, Target::Overwrite),
    ));
}

/// The body of [`squared_distances`] or [`rows_times`]: passes six rows of each panel at a time to
/// `visit`, with the first row and column and the number of rows. Past the end the last row is repeated.
#[inline(always)]
pub(crate) fn rows_with<S: Simd, F: SimdFloatElement + 'static, const SQUARE: bool>(
    simd: S,
    num_rows: usize,
    left: Left<'_, F>,
    right: Matrix<'_, F>,
    columns: usize,
    mut visit: impl FnMut(usize, usize, [PanelRow<S, F>; ROWS], usize),
) {
    for (column, is_strip) in strips::<S, F>(columns) {
        let right = right.skip_columns(column);
        if is_strip {
            rows_of_strip::<S, F, SQUARE, PANELS>(simd, num_rows, left, right, column, &mut visit);
        } else {
            rows_of_strip::<S, F, SQUARE, 1>(simd, num_rows, left, right, column, &mut visit);
        }
    }
}

/// The first columns of strips, and of a panel where only one is left; and which it is.
#[inline(always)]
fn strips<S: Simd, F: SimdFloatElement + 'static>(
    columns: usize,
) -> impl Iterator<Item = (usize, bool)> {
    (0..columns).step_by(strip_width::<S, F>()).map(
        #[inline(always)]
        move |column| (column, has_strips::<S, F>() && columns - column > panel_width::<S, F>()),
    )
}

/// [`rows_with`] for P panels, of which the first starts at `column` of the product.
#[inline(always)]
fn rows_of_strip<S: Simd, F: SimdFloatElement + 'static, const SQUARE: bool, const P: usize>(
    simd: S,
    num_rows: usize,
    left: Left<'_, F>,
    right: Matrix<'_, F>,
    column: usize,
    visit: &mut impl FnMut(usize, usize, [PanelRow<S, F>; ROWS], usize),
) {
    for start in (0..num_rows).step_by(ROWS) {
        let mut rows = [left.row(start); ROWS];
        for (m, row) in rows.iter_mut().enumerate() {
            *row = left.row((start + m).min(num_rows - 1));
        }
        let [a, b, c, d, e, f] = rows;
        let factors = a.iter().zip(b).zip(c).zip(d).zip(e).zip(f);
        let mut sums = [[splat(simd, F::from(0u8)); ROWS]; P];
        for ((((((a, b), c), d), e), f), row) in factors.zip(right.rows(left.len)) {
            add_row::<S, F, SQUARE, ROWS, P>(simd, &mut sums, &[*a, *b, *c, *d, *e, *f], row);
        }
        for (p, sums) in sums.into_iter().enumerate() {
            let column = column + p * panel_width::<S, F>();
            visit(start, column, sums, ROWS.min(num_rows - start));
        }
    }
}

/// Computes leftᵀ · right, where row m of the product belongs to column m of the left factor. The sums
/// are over the rows of both factors.
#[inline(never)]
pub(crate) fn columns_times<F: Float>(
    level: Level,
    left: Left<'_, F>,
    right: Matrix<'_, F>,
    target: Target<'_, F>,
    out: Out<'_, F>,
) {
    dispatch!(level, simd => columns_with(simd, left, right, target, out));
}

#[inline(always)]
fn columns_with<S: Simd, F: Float>(
    simd: S,
    left: Left<'_, F>,
    right: Matrix<'_, F>,
    target: Target<'_, F>,
    mut out: Out<'_, F>,
) {
    let num_rows = left.rows.num_rows().min(right.num_rows());
    for (column, is_strip) in strips::<S, F>(out.columns) {
        let right = right.skip_columns(column);
        if is_strip {
            columns_of_strip::<S, F, PANELS>(simd, num_rows, left, right, column, target, &mut out);
        } else {
            columns_of_strip::<S, F, 1>(simd, num_rows, left, right, column, target, &mut out);
        }
    }
}

#[inline(always)]
fn columns_of_strip<S: Simd, F: Float, const P: usize>(
    simd: S,
    num_rows: usize,
    left: Left<'_, F>,
    right: Matrix<'_, F>,
    column: usize,
    target: Target<'_, F>,
    out: &mut Out<'_, F>,
) {
    let mut row = 0;
    while row < left.len {
        let rows = left.rows.skip_columns(row);
        let place = (row, column);
        row += match left.len - row {
            6.. => put_sums::<S, F, 6, P>(simd, num_rows, rows, right, target, place, out),
            4.. => put_sums::<S, F, 4, P>(simd, num_rows, rows, right, target, place, out),
            _ => put_sums::<S, F, 1, P>(simd, num_rows, rows, right, target, place, out),
        };
    }
}

/// Stores M rows of P panels of the product; returns their number.
#[inline(always)]
fn put_sums<S: Simd, F: Float, const M: usize, const P: usize>(
    simd: S,
    num_rows: usize,
    mut left: Matrix<'_, F>,
    mut right: Matrix<'_, F>,
    mut target: Target<'_, F>,
    (row, column): (usize, usize),
    out: &mut Out<'_, F>,
) -> usize {
    let mut rest = num_rows;
    loop {
        let count = rest.min(ROWS_OF_SUM);
        let mut sums = [[splat(simd, F::zero()); M]; P];
        for (factors, row) in left.rows(count).zip(right.rows(count)) {
            add_row::<S, F, false, M, P>(simd, &mut sums, first(factors), row);
        }
        for (p, sums) in sums.into_iter().enumerate() {
            out.put(simd, (row, column + p * panel_width::<S, F>()), sums, M, target);
        }
        rest -= count;
        if rest == 0 {
            return M;
        }
        (left, right, target) = (left.skip_rows(count), right.skip_rows(count), Target::Add);
    }
}

#[inline(always)]
fn first<F, const M: usize>(row: &[F]) -> &[F; M] {
    // A reference: with SSE2 a copy would go through the stack, and be read while it is still being written.
    row.first_chunk().expect("a row of the left factor has M columns from here on")
}

#[inline(always)]
fn load_strip<S: Simd, F: SimdFloatElement + 'static, const P: usize>(
    simd: S,
    row: &[F],
) -> [PanelRow<S, F>; P] {
    let panel = panel_width::<S, F>();
    let row = &row[..P * panel];
    std::array::from_fn(
        #[inline(always)]
        |p| load::<S, F>(simd, &row[p * panel..]),
    )
}

/// sums\[p, m\] += factors\[m\] · row\[p\], or (factors\[m\] − row\[p\])².
#[inline(always)]
fn add_row<
    S: Simd,
    F: SimdFloatElement + 'static,
    const SQUARE: bool,
    const M: usize,
    const P: usize,
>(
    simd: S,
    sums: &mut [[PanelRow<S, F>; M]; P],
    factors: &[F; M],
    row: &[F],
) {
    let row = load_strip::<S, F, P>(simd, row);
    for m in 0..M {
        let factor = Vector::<S, F>::splat(simd, factors[m]);
        for p in 0..P {
            for half in 0..2 {
                let sum = &mut sums[p][m][half];
                *sum = if SQUARE {
                    let difference = factor - row[p][half];
                    difference.mul_add(difference, *sum)
                } else {
                    factor.mul_add(row[p][half], *sum)
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::levels;

    /// Small integers, so that every order of summation gives the same sum.
    fn entries(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7 + seed * 5) % 11) as f32 - 5.0).collect()
    }

    fn whole(data: &mut [f32], columns: usize) -> Out<'_, f32> {
        Out::new(data, columns)
    }

    /// (left · right, rightward of transposed left) by both kernels, and by plain loops.
    fn check(level: Level, rows: usize, inner: usize, panels: usize) {
        let columns = panels * panel_len::<f32>(level);
        let stride = columns + 3;
        let left = entries(rows * inner, 1);
        let right = entries(inner * stride, 2);
        let right = Matrix::new(&right, stride);
        let mut expected = vec![0.0; rows * columns];
        let mut distances = expected.clone();
        for (m, t, n) in (0..rows * inner * columns)
            .map(|at| (at / (inner * columns), at / columns % inner, at % columns))
        {
            let (left, right): (f32, f32) = (left[m * inner + t], right.data[t * stride + n]);
            expected[m * columns + n] += left * right;
            distances[m * columns + n] += (left - right).powi(2);
        }

        let mut product = vec![f32::NAN; rows * columns];
        let rows_of_left = Left::new(&left, inner);
        rows_times(
            level,
            rows,
            rows_of_left,
            right,
            Target::Overwrite,
            whole(&mut product, columns),
        );
        assert_eq!(product, expected, "rows {rows} x {inner} x {columns}");
        rows_times(level, rows, rows_of_left, right, Target::Add, whole(&mut product, columns));
        assert!(product.iter().zip(&expected).all(|(&sum, &once)| sum == 2.0 * once));
        let factors: Vec<f32> = (0..columns).map(|column| column as f32).collect();
        rows_times(
            level,
            rows,
            rows_of_left,
            right,
            Target::Rescale(&factors),
            whole(&mut product, columns),
        );
        for (at, (&sum, &once)) in product.iter().zip(&expected).enumerate() {
            assert_eq!(sum, 2.0 * once * factors[at % columns] + once);
        }

        if panels == 1 {
            product.fill(f32::NAN);
            let mut max = vec![3.0; columns];
            rows_times_with_max(
                level,
                rows,
                rows_of_left,
                right,
                &mut max,
                whole(&mut product, columns),
            );
            assert_eq!(product, expected);
            for (column, &max) in max.iter().enumerate() {
                let entries = expected.iter().skip(column).step_by(columns);
                assert_eq!(max, entries.copied().fold(3.0, f32::max));
            }
        }

        product.fill(f32::NAN);
        squared_distances(level, rows, rows_of_left, right, whole(&mut product, columns));
        assert_eq!(product, distances, "distances {rows} x {inner} x {columns}");

        let mut transposed = vec![0.0; inner * (rows + 1)];
        for (m, t) in (0..rows * inner).map(|at| (at / inner, at % inner)) {
            transposed[t * (rows + 1) + m] = left[m * inner + t];
        }
        let transposed = Left::new(&transposed, rows + 1).with_len(rows);
        let mut product = vec![f32::NAN; rows * columns];
        columns_times(level, transposed, right, Target::Overwrite, whole(&mut product, columns));
        assert_eq!(product, expected, "columns {rows} x {inner} x {columns}");

        // Columns that do not fill the last panel.
        for columns in (columns.saturating_sub(3)..columns).filter(|&columns| columns > 0) {
            let mut product = vec![1.0; rows * columns];
            columns_times(level, transposed, right, Target::Add, whole(&mut product, columns));
            for (at, &sum) in product.iter().enumerate() {
                let (m, n) = (at / columns, at % columns);
                assert_eq!(sum, 1.0 + expected[m * panels * panel_len::<f32>(level) + n]);
            }
        }
    }

    #[test]
    fn products_are_those_of_plain_loops_at_every_size() {
        for level in levels() {
            for rows in [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 17] {
                // More than are summed at once.
                for inner in [1, 2, 7, 33, 97, 200] {
                    for panels in [0, 1, 3] {
                        check(level, rows, inner, panels);
                    }
                }
            }
        }
    }

    #[test]
    fn a_product_over_nothing_is_zero() {
        for level in levels() {
            let columns = panel_len::<f32>(level);
            let mut product = vec![f32::NAN; 2 * columns];
            let (left, right) = (Left::new(&[], 0), Matrix::new(&[], columns));
            rows_times(level, 2, left, right, Target::Overwrite, whole(&mut product, columns));
            assert!(product.iter().all(|&sum| sum == 0.0));
        }
    }
}
