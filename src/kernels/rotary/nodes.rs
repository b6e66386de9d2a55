//! Rows of a matrix, each rotated by its position.

use super::super::parallel::{self, Rest, row_chunks};
use super::super::problem::Rows;
use super::super::rows::add_to_row;
use super::{Rotary, Turn, is_zero};
use crate::inputs::head_columns;
use crate::kernels::Float;
use fearless_simd::Level;
use ndarray::{Array2, Array3, ArrayViewMut2, ArrayViewMut3, Axis, s};
use std::ops::Range;

/// The largest number of parts, of whole blocks, in which rows are distributed to threads.
const PARTS: usize = 64;
const BLOCK: usize = 16;

/// The cost of the sine and cosine of an angle, in multiplications.
const WORK_OF_ANGLE: usize = 50;

fn work(rotary: &Rotary, rows: usize, columns: usize) -> usize {
    rows.saturating_mul(columns + WORK_OF_ANGLE * rotary.frequencies.ncols())
}

/// Overwrites `out` with the heads of `x`, each row rotated by its row of `positions`.
pub(in super::super) fn rotate<F: Float>(
    rotary: &Rotary,
    level: Level,
    positions: &Rows<'_, F>,
    x: &Rows<'_, F>,
    out: ArrayViewMut2<'_, F>,
) {
    fn run<F: Float>(
        level: Level,
        rotary: &Rotary,
        positions: &Rows<'_, F>,
        x: &Rows<'_, F>,
        rows: Range<usize>,
        mut out: ArrayViewMut2<'_, F>,
    ) {
        let mut turn = Turn::new(level, rotary);
        for (row, mut out) in rows.zip(out.rows_mut()) {
            let out = out.as_slice_mut().expect("an array of our own");
            turn.set(positions.row(row), 1.0);
            turn.apply(x.row(row), out);
        }
    }
    let (rows, columns) = out.dim();
    let parts = parallel::parts(rows, BLOCK, PARTS);
    let outs = row_chunks(out, parts.iter().map(|part| part.len()));
    let tasks: Vec<_> = parts.iter().cloned().zip(outs).collect();
    parallel::for_each(tasks, work(rotary, rows, columns), |(rows, out)| {
        run(level, rotary, positions, x, rows, out);
    });
}

/// Adds the gradients of `x`, of the positions and of the frequencies, given the gradient of the output of
/// [`rotate`].
pub(in super::super) fn rotate_vjp<F: Float>(
    rotary: &Rotary,
    level: Level,
    positions: &Rows<'_, F>,
    x: &Rows<'_, F>,
    grad_out: &Array2<F>,
    grads: RotationGradients<'_, F>,
) {
    let RotationGradients { x: grad_x, positions: grad_positions, frequencies } = grads;
    let (rows, columns) = grad_out.dim();
    let parts = parallel::parts(rows, BLOCK, PARTS);
    let mut unwanted = [(); 2].map(|()| Array2::zeros((rows, 0)));
    let [no_x, no_positions] = unwanted.each_mut().map(|none| none.view_mut());
    let mut rest = Rest::new(grad_x.unwrap_or(no_x));
    let mut rest_of_positions = Rest::new(grad_positions.unwrap_or(no_positions));
    let (axes, angles) = rotary.frequencies.dim();
    let count = if frequencies.is_some() { parts.len() } else { 0 };
    let mut sums = Array3::zeros((count, axes, angles));
    let mut sums_of_parts = sums.axis_chunks_iter_mut(Axis(0), 1);
    let tasks = parts.iter().map(|part| {
        let len = part.len();
        (part.clone(), [rest.take(len), rest_of_positions.take(len)], sums_of_parts.next())
    });
    let tasks: Vec<_> = tasks.collect();
    parallel::for_each(tasks, work(rotary, rows, columns), |(rows, grads, sums)| {
        let pass = Backward { rotary, positions, x, grad_out, rows };
        pass.run(level, grads, sums);
    });
    if let Some(grad) = frequencies {
        sums.outer_iter().for_each(|sums| *grad += &sums);
    }
}

/// Where [`rotate_vjp`] adds; `None` is not computed.
#[derive(Debug)]
pub struct RotationGradients<'g, F> {
    pub(crate) x: Option<ArrayViewMut2<'g, F>>,
    pub(crate) positions: Option<ArrayViewMut2<'g, F>>,
    pub(crate) frequencies: Option<&'g mut Array2<f64>>,
}

/// Some rows of a backward pass.
struct Backward<'r, F: Float> {
    rotary: &'r Rotary,
    positions: &'r Rows<'r, F>,
    x: &'r Rows<'r, F>,
    grad_out: &'r Array2<F>,
    rows: Range<usize>,
}

impl<F: Float> Backward<'_, F> {
    fn run(
        &self,
        level: Level,
        [mut grad_x, mut grad_positions]: [ArrayViewMut2<'_, F>; 2],
        mut sums: Option<ArrayViewMut3<'_, f64>>,
    ) {
        let Self { rotary, positions, x, grad_out, .. } = *self;
        let head_dim = rotary.head_dim;
        let mut turn = Turn::new(level, rotary);
        let mut back = vec![F::zero(); head_dim];
        let mut grad_angles = vec![F::zero(); rotary.frequencies.ncols()];
        let wants_positions = grad_positions.ncols() > 0;
        let wants_angles = wants_positions || sums.is_some();
        for (r, row) in self.rows.clone().enumerate() {
            let grad_out = grad_out.row(row).to_slice().expect("an array of our own");
            // For a row or head that nothing reads, the position may be NaN.
            if is_zero(grad_out) {
                continue;
            }
            turn.set(positions.row(row), -1.0);
            grad_angles.fill(F::zero());
            let num_heads = grad_out.len() / head_dim;
            let heads = grad_out.chunks_exact(head_dim).zip(x.row(row).chunks_exact(head_dim));
            for (head, (grad_out, x)) in heads.enumerate().filter(|(_, (grad, _))| !is_zero(grad)) {
                // x' = R x, so the gradient of x is Rᵀ times the gradient of x'.
                let block = turn.block(head, num_heads);
                turn.apply_block(block, grad_out, &mut back);
                if wants_angles {
                    turn.add_cross_products(block, x, &back, &mut grad_angles);
                }
                if grad_x.ncols() > 0 {
                    let grad_x = grad_x.slice_mut(s![r, head_columns(head, head_dim)]);
                    add_to_row(grad_x, F::one(), &back);
                }
            }
            // α = Σ θ x
            if wants_positions {
                let sums = grad_positions.row_mut(r).into_iter().zip(rotary.frequencies.rows());
                for (sum, frequencies) in sums {
                    let terms = frequencies.into_iter().zip(&grad_angles);
                    let total: f64 = terms.map(|(theta, grad)| theta * grad.as_f64()).sum();
                    *sum += F::from_f64(total);
                }
            }
            if let Some(sums) = &mut sums {
                for (axis, &x) in positions.row(row).iter().enumerate() {
                    for (p, &grad) in grad_angles.iter().enumerate() {
                        sums[[0, axis, p]] += x.as_f64() * grad.as_f64();
                    }
                }
            }
        }
    }
}
