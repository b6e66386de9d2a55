//! Matrix products of small tiles, in registers.
//!
//! The right factor is read in *panels* of [`panel_width`] columns: two vectors side by side. The
//! left factor is read as it lies, in one of two ways: in [`rows_times`] the inner index runs along
//! its rows, in [`columns_times`] from row to row. Six rows of the result at a time are twelve sums,
//! two vectors of the panel and one factor: fifteen registers, of which even AVX2 has sixteen.

use fearless_simd::{Simd, SimdBase, SimdFloat, SimdFloatElement};

/// The widest vector of the CPU.
pub(crate) type Vector<S, F> = <F as SimdFloatElement>::Native<S>;

/// A row of a panel.
pub(crate) type PanelRow<S, F> = [Vector<S, F>; 2];

/// Rows of the result at a time.
const ROWS: usize = 6;

/// Columns of a panel.
#[inline(always)]
pub(crate) fn panel_width<S: Simd, F: SimdFloatElement + 'static>() -> usize {
    2 * Vector::<S, F>::LEN
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

/// A row-major matrix whose rows start `stride` apart, from some column on.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, F> {
    pub(crate) data: &'a [F],
    pub(crate) stride: usize,
}

impl<'a, F> Matrix<'a, F> {
    /// Without its first columns.
    #[inline(always)]
    pub(crate) fn skip_columns(self, column: usize) -> Self {
        Self { data: self.data.get(column..).unwrap_or_default(), ..self }
    }

    #[inline(always)]
    fn rows(self) -> std::slice::Chunks<'a, F> {
        self.data.chunks(self.stride.max(1))
    }
}

/// Left · right, where `left(m)` is row m of the left factor. Hands each row of each panel of the
/// product to `visit`, with its row and first column.
#[inline(always)]
pub(crate) fn rows_times<'l, S: Simd, F: SimdFloatElement + 'static>(
    simd: S,
    num_rows: usize,
    left: impl Fn(usize) -> &'l [F],
    right: Matrix<'_, F>,
    columns: usize,
    visit: impl FnMut(usize, usize, PanelRow<S, F>),
) {
    rows_with::<S, F, false>(simd, num_rows, left, right, columns, visit);
}

/// Σₜ (left\[m, t\] − right\[t, n\])² in place of the products of [`rows_times`]. Through
/// |a|² + |b|² − 2 a·b it would be faster, and lose the distance between near points.
#[inline(always)]
pub(crate) fn squared_distances<'l, S: Simd, F: SimdFloatElement + 'static>(
    simd: S,
    num_rows: usize,
    left: impl Fn(usize) -> &'l [F],
    right: Matrix<'_, F>,
    columns: usize,
    visit: impl FnMut(usize, usize, PanelRow<S, F>),
) {
    rows_with::<S, F, true>(simd, num_rows, left, right, columns, visit);
}

/// [`squared_distances`] or [`rows_times`].
#[inline(always)]
pub(crate) fn rows_with<'l, S: Simd, F: SimdFloatElement + 'static, const SQUARE: bool>(
    simd: S,
    num_rows: usize,
    left: impl Fn(usize) -> &'l [F],
    right: Matrix<'_, F>,
    columns: usize,
    mut visit: impl FnMut(usize, usize, PanelRow<S, F>),
) {
    for column in (0..columns).step_by(panel_width::<S, F>()) {
        let panel = right.skip_columns(column);
        for start in (0..num_rows).step_by(ROWS) {
            // Past the end the last row is repeated, and its result not looked at.
            let mut rows = [left(start); ROWS];
            for (m, row) in rows.iter_mut().enumerate() {
                *row = left((start + m).min(num_rows - 1));
            }
            let sums = rows_with_panel::<S, F, SQUARE>(simd, rows, panel);
            for (m, sums) in sums.into_iter().enumerate().take(num_rows - start) {
                visit(start + m, column, sums);
            }
        }
    }
}

#[inline(always)]
fn rows_with_panel<S: Simd, F: SimdFloatElement + 'static, const SQUARE: bool>(
    simd: S,
    rows: [&[F]; ROWS],
    panel: Matrix<'_, F>,
) -> [PanelRow<S, F>; ROWS] {
    let mut sums = [splat(simd, F::from(0u8)); ROWS];
    let len = rows[0].len();
    // Slices of one known length let the compiler drop the bounds checks below.
    let rows = rows.map(|row| &row[..len]);
    for (t, panel_row) in panel.rows().take(len).enumerate() {
        let [a, b] = load::<S, F>(simd, panel_row);
        for m in 0..ROWS {
            let factor = Vector::<S, F>::splat(simd, rows[m][t]);
            sums[m] = if SQUARE {
                let (a, b) = (factor - a, factor - b);
                [a.mul_add(a, sums[m][0]), b.mul_add(b, sums[m][1])]
            } else {
                [factor.mul_add(a, sums[m][0]), factor.mul_add(b, sums[m][1])]
            };
        }
    }
    sums
}

/// Leftᵀ · right, where row m of the product belongs to column m of the left factor. Hands each row
/// of each panel of the product to `visit`, with its row and first column.
#[inline(always)]
pub(crate) fn columns_times<S: Simd, F: SimdFloatElement + 'static>(
    simd: S,
    num_rows: usize,
    left: Matrix<'_, F>,
    right: Matrix<'_, F>,
    columns: usize,
    mut visit: impl FnMut(usize, usize, PanelRow<S, F>),
) {
    for column in (0..columns).step_by(panel_width::<S, F>()) {
        let panel = right.skip_columns(column);
        let mut start = 0;
        while start < num_rows {
            let left = left.skip_columns(start);
            match num_rows - start {
                6.. => {
                    let sums = columns_times_panel::<S, F, 6>(simd, left, panel);
                    visit_rows(sums, &mut start, column, &mut visit);
                }
                4.. => {
                    let sums = columns_times_panel::<S, F, 4>(simd, left, panel);
                    visit_rows(sums, &mut start, column, &mut visit);
                }
                _ => {
                    let sums = columns_times_panel::<S, F, 1>(simd, left, panel);
                    visit_rows(sums, &mut start, column, &mut visit);
                }
            }
        }
    }
}

#[inline(always)]
fn visit_rows<R, const M: usize>(
    sums: [R; M],
    start: &mut usize,
    column: usize,
    visit: &mut impl FnMut(usize, usize, R),
) {
    for (m, sums) in sums.into_iter().enumerate() {
        visit(*start + m, column, sums);
    }
    *start += M;
}

#[inline(always)]
fn columns_times_panel<S: Simd, F: SimdFloatElement + 'static, const M: usize>(
    simd: S,
    left: Matrix<'_, F>,
    panel: Matrix<'_, F>,
) -> [PanelRow<S, F>; M] {
    let mut sums = [splat(simd, F::from(0u8)); M];
    for (left_row, panel_row) in left.rows().zip(panel.rows()) {
        let left_row = &left_row[..M];
        let [a, b] = load::<S, F>(simd, panel_row);
        for m in 0..M {
            let factor = Vector::<S, F>::splat(simd, left_row[m]);
            sums[m] = [factor.mul_add(a, sums[m][0]), factor.mul_add(b, sums[m][1])];
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::levels;

    /// Small integers, so that every order of summation gives the same sum.
    fn entries(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7 + seed * 5) % 11) as f32 - 5.0).collect()
    }

    /// (left · right, rightward of transposed left) by both kernels, and by plain loops.
    #[inline(always)]
    fn check<S: Simd>(simd: S, rows: usize, inner: usize, panels: usize) {
        let columns = panels * panel_width::<S, f32>();
        let stride = columns + 3;
        let left = entries(rows * inner, 1);
        let mut right = entries(inner * stride, 2);
        right.truncate(right.len().saturating_sub(3));
        let right = Matrix { data: &right, stride };
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
        let row = |m| &left[m * inner..][..inner];
        rows_times(simd, rows, row, right, columns, |m, n, sums| {
            store::<S, f32>(sums, &mut product[m * columns + n..]);
        });
        assert_eq!(product, expected, "rows {rows} x {inner} x {columns}");

        product.fill(f32::NAN);
        squared_distances(simd, rows, row, right, columns, |m, n, sums| {
            store::<S, f32>(sums, &mut product[m * columns + n..]);
        });
        assert_eq!(product, distances, "distances {rows} x {inner} x {columns}");

        let mut transposed = vec![0.0; inner * (rows + 1)];
        for (m, t) in (0..rows * inner).map(|at| (at / inner, at % inner)) {
            transposed[t * (rows + 1) + m] = left[m * inner + t];
        }
        let transposed = Matrix { data: &transposed, stride: rows + 1 };
        let mut product = vec![f32::NAN; rows * columns];
        columns_times(simd, rows, transposed, right, columns, |m, n, sums| {
            store::<S, f32>(sums, &mut product[m * columns + n..]);
        });
        assert_eq!(product, expected, "columns {rows} x {inner} x {columns}");
    }

    #[test]
    fn products_are_those_of_plain_loops_at_every_size() {
        for level in levels() {
            for rows in [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 17] {
                for inner in [1, 2, 7, 16, 33] {
                    for panels in [0, 1, 3] {
                        dispatch!(level, simd => check(simd, rows, inner, panels));
                    }
                }
            }
        }
    }

    #[test]
    fn a_product_over_nothing_is_zero() {
        #[inline(always)]
        fn run<S: Simd>(simd: S) -> (f32, usize) {
            let right: Matrix<'_, f32> = Matrix { data: &[], stride: 1 };
            let (mut sum, mut visits) = (0.0, 0);
            let columns = panel_width::<S, f32>();
            rows_times(
                simd,
                2,
                |_| &[][..],
                right,
                columns,
                |_, _, [a, b]: PanelRow<S, f32>| {
                    visits += 1;
                    sum += (a + b).as_slice().iter().sum::<f32>();
                },
            );
            (sum, visits)
        }
        for level in levels() {
            assert_eq!(dispatch!(level, simd => run(simd)), (0.0, 2));
        }
    }
}
