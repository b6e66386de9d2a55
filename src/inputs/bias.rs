//! Additive logits, and masks that differ between heads.

use super::{Inputs, Pair, View2, View3};
use crate::element::Element;
use crate::error::{Error, Result, check_shape};
use ndarray::{ArrayView, ArrayView1, ArrayView3, ArrayViewMut3, Axis, Dimension, Ix2, Ix3, s};

/// The additive logits of inputs, as returned by [`Inputs::bias`]. If a [mask](Inputs::with_mask) differs
/// between heads, a pair has the logit −∞ for the heads from which it is hidden.
///
/// Set by [`Inputs::with_bias`] and [`Inputs::with_mask`].
#[derive(Clone, Copy, Debug)]
pub struct Bias<'a, F> {
    logits: Option<Logits<'a, F>>,
    /// A mask that differs between heads.
    mask: Option<View3<'a, bool>>,
}

/// What the rows or columns of a bias, and of its gradient, belong to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum BiasAxes {
    /// One row for each pair.
    Pairs,
    /// One row for each query; with `by_key` one column for each key.
    Queries { by_key: bool },
    /// One column for each key, shared by the queries.
    Keys,
    /// Shared by all pairs.
    Shared,
}

/// The two forms of additive logits.
#[derive(Clone, Copy, Debug)]
pub(super) enum Logits<'a, F> {
    /// num_pairs × heads, or num_pairs × 1.
    Pairs(View2<'a, F>),
    /// Heads × queries × keys; `num_axes` is 2 if the caller's array has no axis of heads.
    Grid { grid: View3<'a, F>, num_axes: usize },
}

impl<'a, F: Element> Logits<'a, F> {
    /// Creates logits from an array in one of the forms of [`Inputs::with_bias`].
    pub(super) fn new<D: Dimension>(
        inputs: &Inputs<'a, F>,
        bias: ArrayView<'a, F, D>,
    ) -> Result<Self> {
        let (num_pairs, is_dense) = (inputs.num_pairs(), inputs.is_dense());
        let matrix = [inputs.num_queries(), inputs.num_keys()];
        let is_matrix = is_dense && bias.shape() == matrix;
        let is_pairs = matches!(*bias.shape(), [rows, columns] if rows == num_pairs && columns > 0);
        if is_pairs && !is_matrix {
            let bias = bias.into_dimensionality::<Ix2>();
            return Ok(Self::Pairs(bias.expect("it has two axes")));
        }
        if !is_dense && bias.ndim() == 2 {
            return Err(Error::shape("bias", &[num_pairs, inputs.num_heads()], bias.shape()));
        }
        let num_axes = bias.ndim();
        Ok(Self::Grid { grid: grid("bias", inputs, bias)?, num_axes })
    }

    /// Returns the logits as three axes; by pair they are 1 × num_pairs × (heads or 1).
    pub(super) fn as_grid(&self) -> ArrayView3<'a, F> {
        match *self {
            Self::Pairs(logits) => logits.insert_axis(Axis(0)),
            Self::Grid { grid, .. } => grid,
        }
    }

    /// Returns the shape of the caller's array.
    pub(super) fn shape(&self) -> Vec<usize> {
        match self {
            Self::Pairs(logits) => logits.shape().to_vec(),
            Self::Grid { grid, num_axes } => grid.shape()[3 - num_axes..].to_vec(),
        }
    }

    /// Returns other logits, given as three axes, in the same form.
    pub(super) fn with_grid<'b, G: Element>(&self, logits: ArrayView3<'b, G>) -> Logits<'b, G> {
        match *self {
            Self::Pairs(_) => Logits::Pairs(logits.index_axis_move(Axis(0), 0)),
            Self::Grid { num_axes, .. } => Logits::Grid { grid: logits, num_axes },
        }
    }

    /// What its rows or columns belong to.
    pub(super) fn axes(&self) -> BiasAxes {
        match self {
            Self::Pairs(_) => BiasAxes::Pairs,
            Self::Grid { grid, .. } => match grid.shape() {
                [_, 1, 1] => BiasAxes::Shared,
                [_, 1, _] => BiasAxes::Keys,
                shape => BiasAxes::Queries { by_key: shape[2] != 1 },
            },
        }
    }

    fn num_heads(&self) -> usize {
        match self {
            Self::Pairs(logits) => logits.ncols(),
            Self::Grid { grid, .. } => grid.shape()[0],
        }
    }

    #[inline]
    fn slot(&self, pair: Pair, head: usize) -> [usize; 3] {
        match self {
            Self::Pairs(logits) => [0, pair.index, if logits.ncols() == 1 { 0 } else { head }],
            Self::Grid { grid, .. } => slot_of(grid, pair, head),
        }
    }
}

/// Returns the index of a pair and head in an array whose axes of length 1 are shared.
#[inline]
pub(super) fn slot_of<T>(grid: &View3<'_, T>, pair: Pair, head: usize) -> [usize; 3] {
    let (heads, queries, keys) = grid.dim();
    let at = |len: usize, number: usize| if len == 1 { 0 } else { number };
    [at(heads, head), at(queries, pair.query), at(keys, pair.key)]
}

/// Views an array of two or three axes as heads × queries × keys, each of full length or 1. The number of
/// heads is checked by the mechanism.
pub(super) fn grid<'a, F: Element, T, D: Dimension>(
    what: &'static str,
    inputs: &Inputs<'a, F>,
    array: ArrayView<'a, T, D>,
) -> Result<View3<'a, T>> {
    let mut expected = vec![inputs.num_queries(), inputs.num_keys()];
    if array.ndim() == 3 {
        expected.insert(0, array.shape()[0].max(1));
    }
    let axes = array.shape().iter().zip(&expected);
    let fits = array.ndim() == expected.len()
        && axes.clone().all(|(&len, &expected)| len == expected || len == 1);
    if !fits {
        let what = format!("{what}, whose axes may also have length 1");
        return Err(Error::shape(what, &expected, array.shape()));
    }
    let array = array.into_dyn();
    let array = if array.ndim() == 2 { array.insert_axis(Axis(0)) } else { array };
    Ok(array.into_dimensionality::<Ix3>().expect("it has three axes"))
}

impl<'a, F: Element> Bias<'a, F> {
    /// Returns `None` if there is neither.
    pub(super) fn new(
        logits: Option<Logits<'a, F>>,
        mask: Option<View3<'a, bool>>,
    ) -> Option<Self> {
        (logits.is_some() || mask.is_some()).then_some(Self { logits, mask })
    }

    /// Returns the logit of a pair for a head. Negative infinity hides the pair from that head: skip it,
    /// so that NaN in its key or value cannot leak.
    ///
    /// # Panics
    /// Panics if there is no such pair or head: take pairs from [`Inputs::row`].
    #[inline]
    #[must_use]
    pub fn at(&self, pair: Pair, head: usize) -> F {
        if let Some(mask) = &self.mask
            && !mask[slot_of(mask, pair, head)]
        {
            return F::neg_infinity();
        }
        match &self.logits {
            None => F::zero(),
            Some(Logits::Pairs(logits)) => {
                logits[[pair.index, if logits.ncols() == 1 { 0 } else { head }]]
            }
            Some(Logits::Grid { grid, .. }) => grid[slot_of(grid, pair, head)],
        }
    }

    /// Returns the index in [`GradientsMut::bias`](crate::GradientsMut::bias) to which the gradient of the
    /// logit of a pair and head is added. Pairs and heads that share a logit share the index.
    #[inline]
    #[must_use]
    pub fn slot(&self, pair: Pair, head: usize) -> [usize; 3] {
        self.logits.as_ref().map_or([0; 3], |logits| logits.slot(pair, head))
    }

    /// Overwrites `row` with the logits of consecutive keys of dense inputs, starting at the pair `first`.
    #[inline]
    pub(crate) fn write_row(&self, first: Pair, head: usize, row: &mut [F]) {
        fn copy<F: Element>(from: ArrayView1<'_, F>, row: &mut [F]) {
            match from.to_slice() {
                Some(from) => row.copy_from_slice(from),
                None => row.iter_mut().zip(from).for_each(|(logit, &bias)| *logit = bias),
            }
        }
        let len = row.len();
        match &self.logits {
            None => row.fill(F::zero()),
            Some(Logits::Pairs(logits)) => {
                let column = if logits.ncols() == 1 { 0 } else { head };
                copy(logits.slice(s![first.index..first.index + len, column]), row);
            }
            Some(Logits::Grid { grid, .. }) => {
                let [head, query, key] = slot_of(grid, first, head);
                match grid.shape()[2] {
                    1 => row.fill(grid[[head, query, 0]]),
                    _ => copy(grid.slice(s![head, query, key..key + len]), row),
                }
            }
        }
        if let Some(mask) = &self.mask {
            hide_row(mask, first, head, row);
        }
    }

    /// Adds to `sum` the gradients of the logits of consecutive keys of dense inputs, starting at the pair
    /// `first`.
    #[inline]
    pub(crate) fn add_row(
        &self,
        first: Pair,
        head: usize,
        grads: &[F],
        sum: &mut ArrayViewMut3<'_, F>,
    ) {
        let [head, row, column] = self.slot(first, head);
        let len = grads.len();
        let sums = match &self.logits {
            None => return,
            Some(Logits::Pairs(_)) => sum.slice_mut(s![0, row..row + len, column]),
            Some(Logits::Grid { grid, .. }) if grid.shape()[2] == 1 => {
                sum[[head, row, 0]] += grads.iter().copied().sum::<F>();
                return;
            }
            Some(Logits::Grid { .. }) => sum.slice_mut(s![head, row, column..column + len]),
        };
        sums.into_iter().zip(grads).for_each(|(sum, &grad)| *sum += grad);
    }

    /// Returns the number of heads of the bias: 1 if all heads share it.
    #[must_use]
    pub fn num_heads(&self) -> usize {
        let of_logits = self.logits.as_ref().map_or(1, Logits::num_heads);
        of_logits.max(self.mask.map_or(1, |mask| mask.shape()[0]))
    }

    /// Checks that bias and mask are shared by all heads or have one entry for each of `heads` heads.
    ///
    /// # Errors
    /// [`Error::Shape`], naming the array and the expected number of heads, if one does not fit.
    pub fn check_heads(&self, heads: usize) -> Result<()> {
        if let Some(logits) = &self.logits
            && ![1, heads].contains(&logits.num_heads())
        {
            let mut expected = logits.shape();
            let axis = if matches!(logits, Logits::Pairs(_)) { 1 } else { 0 };
            expected[axis] = heads;
            return check_shape("bias", &expected, &logits.shape());
        }
        match &self.mask {
            Some(mask) if mask.shape()[0] != heads => {
                let (_, queries, keys) = mask.dim();
                check_shape("mask", &[heads, queries, keys], mask.shape())
            }
            _ => Ok(()),
        }
    }
}

/// Sets to −∞ the logits of those keys that the mask hides. `row` holds the logits of consecutive keys,
/// starting at the pair `first`.
#[inline]
pub(super) fn hide_row<F: Element>(
    mask: &View3<'_, bool>,
    first: Pair,
    head: usize,
    row: &mut [F],
) {
    fn hide<F: Element>(logit: &mut F, is_visible: bool) {
        *logit = if is_visible { *logit } else { F::neg_infinity() };
    }
    let [head, query, key] = slot_of(mask, first, head);
    if mask.shape()[2] == 1 {
        if !mask[[head, query, 0]] {
            row.fill(F::neg_infinity());
        }
        return;
    }
    let mask = mask.slice(s![head, query, key..key + row.len()]);
    match mask.to_slice() {
        Some(mask) => row.iter_mut().zip(mask).for_each(|(logit, &mask)| hide(logit, mask)),
        None => row.iter_mut().zip(mask).for_each(|(logit, &mask)| hide(logit, mask)),
    }
}
