//! Comparisons of arrays with expected ones. The macros of `approx` compare single numbers; they take no
//! description of the case.

use approx::abs_diff_ne;
use graph_attention::Float;
use graph_attention::ndarray::{ArrayRef, Dimension};
use std::fmt::Display;

/// Returns an error that names the first number farther than `tolerance` from the expected one. NaN and
/// infinity are close to nothing. For `proptest`, which shrinks a failing case if it does not panic.
pub(crate) fn close<F: Float, D: Dimension>(
    what: impl Display,
    tolerance: f64,
    actual: &ArrayRef<F, D>,
    expected: &ArrayRef<F, D>,
) -> Result<(), String> {
    if actual.shape() != expected.shape() {
        return Err(format!("{what}: {:?} instead of {:?}", actual.shape(), expected.shape()));
    }
    for ((at, actual), expected) in actual.indexed_iter().zip(expected) {
        let (actual, expected) = (actual.as_f64(), expected.as_f64());
        if abs_diff_ne!(actual, expected, epsilon = tolerance) {
            return Err(format!(
                "{what}, at {at:?}: {actual:e} instead of {expected:e}, more than {tolerance:e} off"
            ));
        }
    }
    Ok(())
}

/// Asserts that arrays are [`close`].
#[track_caller]
pub(crate) fn assert_close<F: Float, D: Dimension>(
    what: impl Display,
    tolerance: f64,
    actual: &ArrayRef<F, D>,
    expected: &ArrayRef<F, D>,
) {
    if let Err(error) = close(what, tolerance, actual, expected) {
        panic!("{error}");
    }
}

/// Asserts the same with a tolerance relative to the size of the expected array: its largest number, or
/// `least` if that is larger.
#[track_caller]
pub(crate) fn assert_close_in_size<F: Float, D: Dimension>(
    what: impl Display,
    tolerance: f64,
    least: f64,
    actual: &ArrayRef<F, D>,
    expected: &ArrayRef<F, D>,
) {
    let size = expected.iter().fold(least, |size, x| size.max(x.as_f64().abs()));
    assert!(0.0 < size && size < f64::INFINITY, "{what}: nothing to compare with");
    assert_close(what, tolerance * size, actual, expected);
}

/// Returns an error if the length of the difference exceeds `tolerance`, relative to the length of the
/// expected vector, or to 1 if that is larger.
pub(crate) fn close_in_length(
    what: impl Display,
    tolerance: f64,
    actual: &[f64],
    expected: &[f64],
) -> Result<(), String> {
    let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let apart =
        length(&mut actual.iter().zip(expected).map(|(actual, expected)| actual - expected));
    let size = length(&mut expected.iter().copied()).max(1.0);
    if actual.len() != expected.len() || abs_diff_ne!(apart, 0.0, epsilon = tolerance * size) {
        return Err(format!("{what}: {actual:?} instead of {expected:?}, {apart:e} off"));
    }
    Ok(())
}

/// Asserts that vectors are [`close_in_length`].
#[track_caller]
pub(crate) fn assert_close_in_length(
    what: impl Display,
    tolerance: f64,
    actual: &[f64],
    expected: &[f64],
) {
    if let Err(error) = close_in_length(what, tolerance, actual, expected) {
        panic!("{error}");
    }
}

/// Returns the error of a number as a multiple of its bound. Infinities and NaN must be equal to the expected
/// ones; otherwise the error is infinite.
pub(crate) fn error_in_bounds(actual: f64, expected: f64, bound: f64) -> f64 {
    let is_same = actual == expected || (actual.is_nan() && expected.is_nan());
    let ratio = if is_same { 0.0 } else { (actual - expected).abs() / bound };
    if ratio.is_nan() { f64::INFINITY } else { ratio }
}
