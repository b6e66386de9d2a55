//! Losses with their gradients, and measures of quality.

use graph_attention::ndarray::Array2;

/// Returns the mean over some (row, class) of −ln softmax(logits)\[class\], and its gradient.
pub fn cross_entropy(logits: &Array2<f32>, rows: &[(usize, usize)]) -> (f32, Array2<f32>) {
    let (mut loss, mut grad) = (0.0, Array2::zeros(logits.raw_dim()));
    for &(row, class) in rows {
        let logits = logits.row(row);
        let largest = logits.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let exps = logits.mapv(|logit| (logit - largest).exp());
        let sum = exps.sum();
        loss += sum.ln() + largest - logits[class];
        let mut grad = grad.row_mut(row);
        grad += &(exps / sum);
        grad[class] -= 1.0;
    }
    let n = rows.len() as f32;
    (loss / n, grad / n)
}

/// Returns the mean over some (row, class), with classes 0 and 1, of −ln of the probability σ(logit) of class 1 or
/// 1 − σ(logit) of class 0, and its gradient; the logits have one column.
pub fn binary_cross_entropy(logits: &Array2<f32>, rows: &[(usize, usize)]) -> (f32, Array2<f32>) {
    let (mut loss, mut grad) = (0.0, Array2::zeros(logits.raw_dim()));
    for &(row, class) in rows {
        let sign = if class == 1 { 1.0 } else { -1.0 };
        let margin = sign * logits[[row, 0]];
        // ln(1 + exp(−margin)), which does not overflow
        loss += (-margin.abs()).exp().ln_1p() + (-margin).max(0.0);
        grad[[row, 0]] -= sign / (1.0 + margin.exp());
    }
    let n = rows.len() as f32;
    (loss / n, grad / n)
}

/// Returns the share of (row, class) whose class has the largest logit; a class without a column is never right.
pub fn accuracy(logits: &Array2<f32>, rows: &[(usize, usize)]) -> f64 {
    let is_right = |&&(row, class): &&(usize, usize)| {
        let logits = logits.row(row);
        logits.get(class).is_some_and(|of_class| logits.iter().all(|logit| logit <= of_class))
    };
    rows.iter().filter(is_right).count() as f64 / rows.len() as f64
}

/// Returns the area under the ROC curve: the share of pairs of a positive and a negative example in which the
/// positive one has the larger score; equal scores count half.
pub fn roc_auc(examples: impl IntoIterator<Item = (f32, bool)>) -> f64 {
    let mut examples: Vec<_> = examples.into_iter().collect();
    examples.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut below, mut pairs) = (0.0, 0.0);
    for equal in examples.chunk_by(|a, b| a.0 == b.0) {
        let positive = equal.iter().filter(|(_, positive)| *positive).count() as f64;
        let negative = equal.len() as f64 - positive;
        pairs += positive * (below + negative / 2.0);
        below += negative;
    }
    pairs / (below * (examples.len() as f64 - below))
}

/// Returns the average precision of a ranking, best first: the mean over the relevant items, of which there are
/// `total`, of the share of relevant ones among those up to it; 0 for those that are not ranked.
pub fn average_precision(ranking: impl IntoIterator<Item = bool>, total: usize) -> f64 {
    let places = (1u32..).zip(ranking).filter(|&(_, relevant)| relevant);
    let precisions = (1u32..).zip(places).map(|(k, (place, _))| f64::from(k) / f64::from(place));
    precisions.sum::<f64>() / total as f64
}

/// Returns the mean and the standard deviation (of a population, as `numpy.std`).
pub fn mean_and_std(values: &[f64]) -> [f64; 2] {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n;
    [mean, variance.sqrt()]
}
