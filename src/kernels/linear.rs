//! Affine maps of rows, for mechanisms with projections.
//!
//! The products are those of `ndarray`, in parts that threads share. Few rows and sparse rows are multiplied
//! here, where that is faster.

use super::gathered::plain_dot;
use super::level::level;
use super::parallel::{self, parts, row_chunks};
use super::primitives::matmul::Vector;
use super::problem::Rows;
use crate::element::{all_finite, try_zeros};
use crate::error::Result;
use crate::kernels::Float;
use fearless_simd::{Level, Simd, SimdBase, SimdFloat};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, s};
use std::ops::Range;

/// The rows of a product are distributed to threads in whole blocks.
const BLOCK: usize = 96;

/// A factor is sparse if fewer than one in this many entries are nonzero.
const SPARSE: usize = 16;

/// Fewer rows are multiplied one by one with the rows of a weight, which is then not copied: the copy would take
/// longer than the product.
const FEW_ROWS: usize = 8;

/// The gradient of a weight is a sum over rows, in at most this many parts, which are added in order.
const SUMS: usize = 4;

/// Whether a product overwrites numbers or is added to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Overwrite,
    Add,
}

/// Overwrites `out` with x Wᵀ + b, for a `weight` W of outputs × inputs as in PyTorch.
pub(super) fn linear_into<F: Float>(
    x: ArrayView2<'_, F>,
    weight: ArrayView2<'_, F>,
    bias: Option<ArrayView1<'_, F>>,
    mut out: ArrayViewMut2<'_, F>,
) -> Result<()> {
    transposed_product(x, weight, Target::Overwrite, out.view_mut())?;
    if let Some(bias) = bias {
        out += &bias;
    }
    Ok(())
}

/// Computes x Wᵀ + b.
pub(super) fn linear<F: Float>(
    x: ArrayView2<'_, F>,
    weight: ArrayView2<'_, F>,
    bias: Option<ArrayView1<'_, F>>,
) -> Result<Array2<F>> {
    let mut out = try_zeros("projection", x.nrows(), weight.nrows())?;
    linear_into(x, weight, bias, out.view_mut())?;
    Ok(out)
}

/// out += x Wᵀ + b.
pub(super) fn add_linear<F: Float>(
    x: ArrayView2<'_, F>,
    weight: ArrayView2<'_, F>,
    bias: Option<ArrayView1<'_, F>>,
    mut out: ArrayViewMut2<'_, F>,
) -> Result<()> {
    transposed_product(x, weight, Target::Add, out.view_mut())?;
    if let Some(bias) = bias {
        out += &bias;
    }
    Ok(())
}

/// y = x Wᵀ + b, so with g the gradient of y: grad_x += g W.
pub(super) fn linear_input_vjp<F: Float>(
    weight: ArrayView2<'_, F>,
    grad_out: ArrayView2<'_, F>,
    grad_x: ArrayViewMut2<'_, F>,
) -> Result<()> {
    product(grad_out, weight, Target::Add, grad_x)
}

/// y = x Wᵀ + b, so with g the gradient of y: grad_W += gᵀ x, grad_b += Σ_rows g.
///
/// A row of x that the loss does not depend on (g = 0, for example a masked key) is skipped: NaN in it
/// does not reach grad_W.
pub(super) fn linear_params_vjp<F: Float>(
    x: ArrayView2<'_, F>,
    grad_out: ArrayView2<'_, F>,
    grad_weight: ArrayViewMut2<'_, F>,
    grad_bias: Option<ArrayViewMut1<'_, F>>,
) -> Result<()> {
    let finite = without_dead_rows(x, grad_out)?;
    add_transposed_product(
        grad_out,
        finite.as_ref().map_or(x, |finite| finite.view()),
        grad_weight,
    )?;
    if let Some(mut grad_bias) = grad_bias {
        grad_bias += &grad_out.sum_axis(Axis(0));
    }
    Ok(())
}

/// Returns the rows without those that are not finite and have no gradient, if there are any.
fn without_dead_rows<F: Float>(
    x: ArrayView2<'_, F>,
    grad: ArrayView2<'_, F>,
) -> Result<Option<Array2<F>>> {
    if is_finite(x) {
        return Ok(None);
    }
    let mut copy = try_zeros("product", x.nrows(), x.ncols())?;
    for ((row, mut copy), grad) in x.rows().into_iter().zip(copy.rows_mut()).zip(grad.rows()) {
        if row.iter().all(|value| value.is_finite()) || grad.iter().any(|&grad| grad != F::zero()) {
            copy.assign(&row);
        }
    }
    Ok(Some(copy))
}

/// Computes left · rightᵀ.
fn transposed_product<F: Float>(
    left: ArrayView2<'_, F>,
    right: ArrayView2<'_, F>,
    target: Target,
    out: ArrayViewMut2<'_, F>,
) -> Result<()> {
    if left.nrows() >= FEW_ROWS || left.is_empty() || right.as_slice().is_none() {
        return product(left, right.t(), target, out);
    }
    let work = left.len().saturating_mul(right.nrows());
    let (left, right) = (Rows::new("product", left)?, Rows::new("product", right)?);
    let level = level();
    let parts = parts(out.ncols(), BLOCK, parallel::shares(work));
    let mut rest = Some(out);
    let tasks = parts.into_iter().map(|columns| {
        let (out, others) = rest.take().expect("all columns").split_at(Axis(1), columns.len());
        rest = Some(others);
        (columns, out)
    });
    parallel::for_each(tasks.collect(), work, |(columns, out)| {
        few_rows(level, &left, &right, columns, target, out);
    });
    Ok(())
}

/// Computes left · right. A sparse `left` is multiplied entry by entry, with the same result unless zeros
/// meet values that are not finite.
fn product<F: Float>(
    left: ArrayView2<'_, F>,
    right: ArrayView2<'_, F>,
    target: Target,
    mut out: ArrayViewMut2<'_, F>,
) -> Result<()> {
    let work = left.len().saturating_mul(right.ncols());
    let is_sparse = is_sparse(left) && is_finite(right);
    if target == Target::Overwrite && (work == 0 || is_sparse) {
        out.fill(F::zero());
    }
    if work == 0 {
        return Ok(());
    }
    // Each part copies the right factor.
    let parts = parts(out.nrows(), BLOCK, parallel::shares(work));
    let outs = row_chunks(out, parts.iter().map(|part| part.len()));
    let tasks: Vec<_> = parts.iter().cloned().zip(outs).collect();
    if is_sparse {
        let (left, right) = (Rows::new("product", left)?, Rows::new("product", right)?);
        parallel::for_each(tasks, work / SPARSE, |(rows, mut out)| {
            for (mut out, row) in out.rows_mut().into_iter().zip(rows) {
                for (inner, &factor) in non_zeros(left.row(row)) {
                    out.scaled_add(factor, &ArrayView1::from(right.row(inner)));
                }
            }
        });
        return Ok(());
    }
    let beta = if target == Target::Add { F::one() } else { F::zero() };
    parallel::for_each(tasks, work, |(rows, mut out)| {
        general_mat_mul(F::one(), &left.slice(s![rows, ..]), &right, beta, &mut out);
    });
    Ok(())
}

/// out += leftᵀ · right; a sparse `right` as in [`product`].
fn add_transposed_product<F: Float>(
    left: ArrayView2<'_, F>,
    right: ArrayView2<'_, F>,
    mut out: ArrayViewMut2<'_, F>,
) -> Result<()> {
    let work = left.len().saturating_mul(out.ncols());
    if work == 0 {
        return Ok(());
    }
    if is_sparse(right) && is_finite(left) {
        let right = Rows::new("product", right)?;
        let mut transposed = try_zeros("product", out.ncols(), out.nrows())?;
        for (row, left) in left.rows().into_iter().enumerate() {
            for (column, &factor) in non_zeros(right.row(row)) {
                transposed.row_mut(column).scaled_add(factor, &left);
            }
        }
        out += &transposed.t();
        return Ok(());
    }
    let parts = parts(left.nrows(), BLOCK, SUMS);
    if parts.len() == 1 {
        general_mat_mul(F::one(), &left.t(), &right, F::one(), &mut out);
        return Ok(());
    }
    let mut sums = try_zeros("product", parts.len() * out.nrows(), out.ncols())?;
    let lens = parts.iter().map(|_| out.nrows());
    let tasks: Vec<_> = parts.iter().cloned().zip(row_chunks(sums.view_mut(), lens)).collect();
    parallel::for_each(tasks, work, |(rows, mut sum)| {
        let [left, right] = [left, right].map(|factor| factor.slice_move(s![rows.clone(), ..]));
        general_mat_mul(F::one(), &left.t(), &right, F::zero(), &mut sum);
    });
    sums.axis_chunks_iter(Axis(0), out.nrows()).for_each(|sum| out += &sum);
    Ok(())
}

/// Whether so few entries are nonzero that skipping the zeros is faster, for example words in a document.
fn is_sparse<F: Float>(matrix: ArrayView2<'_, F>) -> bool {
    let most = matrix.len() / SPARSE;
    let mut count = 0;
    // Most rows of a dense matrix are not read.
    for row in matrix.rows() {
        if count >= most {
            return false;
        }
        count += row.iter().filter(|&&value| value != F::zero()).count();
    }
    count < most
}

fn is_finite<F: Float>(matrix: ArrayView2<'_, F>) -> bool {
    match matrix.as_slice() {
        Some(values) => all_finite(values),
        None => matrix.iter().all(|value| value.is_finite()),
    }
}

/// Iterates over the nonzero entries of a row, with their positions. Skips runs of zeros at once.
fn non_zeros<F: Float>(row: &[F]) -> impl Iterator<Item = (usize, &F)> {
    const STRETCH: usize = 16;
    let any = |values: &[F]| values.iter().fold(false, |any, &value| any | (value != F::zero()));
    let stretches = row.chunks(STRETCH).zip((0..).step_by(STRETCH)).filter(move |(v, _)| any(v));
    let entries = stretches.flat_map(|(values, start)| (start..).zip(values));
    entries.filter(|&(_, &value)| value != F::zero())
}

/// Computes `columns` of left · rightᵀ for few rows of `left`.
fn few_rows<F: Float>(
    level: Level,
    left: &Rows<'_, F>,
    right: &Rows<'_, F>,
    columns: Range<usize>,
    target: Target,
    out: ArrayViewMut2<'_, F>,
) {
    dispatch!(level, simd => few_rows_in_vectors(simd, left, right, columns, target, out));
}

/// A row takes as long as reading the weight. Its rows are read in order, a few at a time, so that the CPU fetches
/// them ahead and no sum waits for another; further rows of `left` find them in the cache.
#[inline(always)]
fn few_rows_in_vectors<S: Simd, F: Float>(
    simd: S,
    left: &Rows<'_, F>,
    right: &Rows<'_, F>,
    columns: Range<usize>,
    target: Target,
    mut out: ArrayViewMut2<'_, F>,
) {
    const AT_ONCE: usize = 4;
    let first = columns.start;
    let is_added = target == Target::Add;
    for start in columns.clone().step_by(AT_ONCE) {
        let count = AT_ONCE.min(columns.end - start);
        for row in 0..out.nrows() {
            let own = left.row(row);
            let mut sums = [F::zero(); AT_ONCE];
            if count == AT_ONCE {
                let mut rows = [own; AT_ONCE];
                for (row, at) in rows.iter_mut().zip(start..) {
                    *row = right.row(at);
                }
                sums = dots(simd, own, rows);
            } else {
                for (sum, at) in sums.iter_mut().zip(start..start + count) {
                    [*sum] = dots(simd, own, [right.row(at)]);
                }
            }
            for n in 0..count {
                let out = &mut out[[row, start - first + n]];
                *out = if is_added { *out + sums[n] } else { sums[n] };
            }
        }
    }
}

/// Σ aᵢ bᵢ for N rows b, each in two vectors of sums. The same for any N.
#[inline(always)]
fn dots<S: Simd, F: Float, const N: usize>(simd: S, own: &[F], rows: [&[F]; N]) -> [F; N] {
    let len = Vector::<S, F>::LEN;
    let zero = Vector::<S, F>::splat(simd, F::zero());
    let (mut even, mut odd) = ([zero; N], [zero; N]);
    let whole = own.len() - own.len() % (2 * len);
    for at in (0..whole).step_by(2 * len) {
        let a = Vector::<S, F>::from_slice(simd, &own[at..][..len]);
        let b = Vector::<S, F>::from_slice(simd, &own[at + len..][..len]);
        for n in 0..N {
            let row = &rows[n][at..][..2 * len];
            even[n] = Vector::<S, F>::from_slice(simd, &row[..len]).mul_add(a, even[n]);
            odd[n] = Vector::<S, F>::from_slice(simd, &row[len..]).mul_add(b, odd[n]);
        }
    }
    let mut sums = [F::zero(); N];
    for n in 0..N {
        let rest = plain_dot(&own[whole..], &rows[n][whole..]);
        sums[n] = (even[n] + odd[n]).reduce_sum() + rest;
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn only_rows_without_a_gradient_are_skipped() {
        let x = array![[f64::NAN, 1.0], [2.0, f64::INFINITY], [3.0, 0.0]];
        let weight_gradient = |grad_out: Array2<f64>| {
            let mut grad = Array2::zeros((1, 2));
            linear_params_vjp(x.view(), grad_out.view(), grad.view_mut(), None).unwrap();
            grad
        };
        assert_eq!(weight_gradient(array![[0.0], [0.0], [2.0]]), array![[6.0, 0.0]]);
        let touched = weight_gradient(array![[1.0], [0.0], [2.0]]);
        assert!(touched[[0, 0]].is_nan() && touched[[0, 1]] == 1.0);
    }

    /// Small integers, so that every order of summation gives the same sum.
    fn entries(rows: usize, columns: usize, salt: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 7 + j * 3 + salt) % 11) as f32 - 5.0)
    }

    #[test]
    fn products_are_those_of_ndarray_at_every_size() -> Result<()> {
        for rows in [0, 1, 5, 6, 7, 95, 96, 97, 200, 400] {
            for inputs in [0, 1, 7, 16, 33] {
                for outputs in [0, 1, 6, 31, 32, 33, 65] {
                    let (x, weight) = (entries(rows, inputs, 1), entries(outputs, inputs, 2));
                    let bias = entries(1, outputs, 3);
                    let y = linear(x.view(), weight.view(), Some(bias.row(0)))?;
                    assert_eq!(y, x.dot(&weight.t()) + &bias, "{rows} {inputs} {outputs}");

                    let grad_out = entries(rows, outputs, 4);
                    // Into columns of a larger array, stored column by column.
                    let mut grad_x = entries(inputs, rows + 2, 5).reversed_axes();
                    let expected = &grad_x.slice(s![1..rows + 1, ..]) + &grad_out.dot(&weight);
                    let view = grad_x.slice_mut(s![1..rows + 1, ..]);
                    linear_input_vjp(weight.view(), grad_out.view(), view)?;
                    assert_eq!(grad_x.slice(s![1..rows + 1, ..]), expected);

                    let mut grad_weight = weight.clone();
                    let mut grad_bias = bias.row(0).to_owned();
                    let reversed = x.slice(s![..;-1, ..]);
                    let (weight_view, bias_view) = (grad_weight.view_mut(), grad_bias.view_mut());
                    linear_params_vjp(reversed, grad_out.view(), weight_view, Some(bias_view))?;
                    assert_eq!(grad_weight, weight + grad_out.t().dot(&reversed));
                    assert_eq!(grad_bias, &bias.row(0) + &grad_out.sum_axis(Axis(0)));
                }
            }
        }
        Ok(())
    }

    /// The shares of threads are rows, so each sum is the same.
    #[cfg(feature = "parallel")]
    #[test]
    fn products_do_not_depend_on_the_threads() -> Result<()> {
        let numbers = |rows, columns| entries(rows, columns, 1).mapv(|x| (x * 0.7).sin());
        let (x, weight, grad_out) = (numbers(701, 200), numbers(67, 200), numbers(701, 67));
        assert!(parallel::shares(x.len() * weight.nrows()) == rayon::current_num_threads());
        let results = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.expect("threads").install(|| -> Result<_> {
                let y = linear(x.view(), weight.view(), None)?;
                let (mut grad_x, mut grad_weight) = (numbers(701, 200), numbers(67, 200));
                linear_input_vjp(weight.view(), grad_out.view(), grad_x.view_mut())?;
                linear_params_vjp(x.view(), grad_out.view(), grad_weight.view_mut(), None)?;
                Ok([y, grad_x, grad_weight])
            })
        };
        let expected = results(1)?;
        for threads in [2, 3, 8] {
            assert_eq!(results(threads)?, expected);
        }
        Ok(())
    }

    #[test]
    fn sparse_factors_change_nothing() -> Result<()> {
        let x = Array2::from_shape_fn((50, 40), |(i, j)| match (i * 40 + j) % 23 {
            0 => (i % 5) as f32 - 2.0,
            _ => 0.0,
        });
        assert!(is_sparse(x.view()));
        let mut weight = entries(9, 40, 1);
        let grad_out = entries(50, 9, 2);
        let mut grad_weight = weight.clone();
        linear_params_vjp(x.view(), grad_out.view(), grad_weight.view_mut(), None)?;
        assert_eq!(grad_weight, &weight + grad_out.t().dot(&x));
        assert_eq!(linear(x.view(), weight.view(), None)?, x.dot(&weight.t()));
        // A weight that is not finite reaches all rows.
        weight[[3, 7]] = f32::NAN;
        assert!(linear(x.view(), weight.view(), None)?.column(3).iter().all(|y| y.is_nan()));
        Ok(())
    }
}
