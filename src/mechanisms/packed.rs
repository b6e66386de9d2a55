//! Packed inputs, segment by segment: each as the dense inputs that it is, on whichever thread is free.

use crate::attention::{Attention, Saved, check_output};
use crate::error::{Result, check_shape};
use crate::gradients::{GradientsMut, PartOfBias};
use crate::inputs::{BiasAxes, Inputs};
use crate::kernels::Float;
use crate::kernels::parallel::{self, Rest};
use crate::params;
use crate::segments::Segments;
use ndarray::{Array3, ArrayD, ArrayView2, ArrayViewMut2, ArrayViewMut3, Axis, s};
use std::ops::Range;

/// Segments whose gradients of parameters are kept at a time, until they are added up in order.
const AT_ONCE: usize = 128;

/// The states of the segments.
struct States(Vec<Saved>);

/// Runs a function for each segment with its dense inputs and its rows of the output. Returns the results in
/// order, or the first error.
pub(super) fn for_each_segment<F: Float, T: Send>(
    inputs: &Inputs<'_, F>,
    segments: &Segments,
    out: ArrayViewMut2<'_, F>,
    run: impl Fn(&Inputs<'_, F>, ArrayViewMut2<'_, F>) -> Result<T> + Send + Sync,
) -> Result<Vec<T>> {
    let work = work(inputs);
    let mut out = Rest::new(out);
    let mut results: Vec<Option<Result<T>>> = (0..segments.len()).map(|_| None).collect();
    let tasks = results.iter_mut().enumerate();
    let tasks =
        tasks.map(|(number, result)| (number, out.take(segments.queries(number).len()), result));
    parallel::for_each(tasks.collect(), work, |(number, out, result)| {
        *result = Some(run(&inputs.segment(segments, number), out));
    });
    results.into_iter().map(|result| result.expect("every task was run")).collect()
}

/// The multiplications of a product over all pairs.
fn work<F: Float>(inputs: &Inputs<'_, F>) -> usize {
    inputs.num_pairs().saturating_mul(inputs.query().ncols() + inputs.value().ncols())
}

/// [`Attention::forward_into`] for packed inputs.
pub(super) fn forward<F: Float>(
    mechanism: &impl Attention<F>,
    inputs: &Inputs<'_, F>,
    segments: &Segments,
    out: ArrayViewMut2<'_, F>,
) -> Result<()> {
    check_output(mechanism, "out", inputs, out.shape())?;
    for_each_segment(inputs, segments, out, |inputs, out| mechanism.forward_into(inputs, out))?;
    Ok(())
}

/// [`Attention::forward_train_into`] for packed inputs.
pub(super) fn forward_train<F: Float>(
    mechanism: &impl Attention<F>,
    inputs: &Inputs<'_, F>,
    segments: &Segments,
    out: ArrayViewMut2<'_, F>,
) -> Result<Saved> {
    check_output(mechanism, "out", inputs, out.shape())?;
    let run = |inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>| {
        mechanism.forward_train_into(inputs, out)
    };
    Ok(Saved::new(mechanism.name(), States(for_each_segment(inputs, segments, out, run)?)))
}

/// [`Attention::backward_into`] for packed inputs.
pub(super) fn backward<F: Float>(
    mechanism: &impl Attention<F>,
    inputs: &Inputs<'_, F>,
    segments: &Segments,
    saved: &Saved,
    grad_out: ArrayView2<'_, F>,
    grads: GradientsMut<'_, F>,
) -> Result<()> {
    let States(states) = saved.state(mechanism.name())?;
    check_shape("saved segments", &[segments.len()], &[states.len()])?;
    check_output(mechanism, "grad_out", inputs, grad_out.shape())?;
    backward_by_segment(mechanism, inputs, segments, grads, |number, inputs, grads| {
        let grad_out = grad_out.slice(s![segments.queries(number), ..]);
        mechanism.backward_into(inputs, &states[number], grad_out, grads)
    })
}

/// Runs a backward pass for each segment, with its rows of the gradients. Gradients that segments share, of
/// the parameters and of a bias, are added up in the order of the segments.
pub(super) fn backward_by_segment<F: Float>(
    mechanism: &impl Attention<F>,
    inputs: &Inputs<'_, F>,
    segments: &Segments,
    grads: GradientsMut<'_, F>,
    run: impl Fn(usize, &Inputs<'_, F>, GradientsMut<'_, F>) -> Result<()> + Send + Sync,
) -> Result<()> {
    grads.check(mechanism.name(), inputs, mechanism)?;
    let mut rest = RestOfGradients::new(inputs, grads);
    let work = work(inputs);
    for numbers in parallel::ranges(segments.len(), AT_ONCE) {
        let of_segment =
            |number| (number, rest.take(segments, number), params::zeros(mechanism), Ok(()));
        let mut tasks: Vec<_> = numbers.map(of_segment).collect();
        parallel::for_each(tasks.iter_mut().collect(), work, |task| {
            let (number, grads, params, result) = task;
            *result = run(*number, &inputs.segment(segments, *number), grads.view_mut(params));
        });
        for (_, grads, params, result) in tasks {
            result?;
            rest.add_shared(grads.bias, &params);
        }
    }
    Ok(())
}

/// The gradients of the segments that are not given away yet, and what all segments share.
struct RestOfGradients<'g, F> {
    query: Option<Rest<'g, F>>,
    key: Option<Rest<'g, F>>,
    value: Option<Rest<'g, F>>,
    pair_weights: Option<Rest<'g, F>>,
    edge_features: Option<Rest<'g, F>>,
    distances: Option<Rest<'g, F>>,
    query_positions: Option<Rest<'g, F>>,
    key_positions: Option<Rest<'g, F>>,
    bias: Option<(BiasAxes, ArrayViewMut3<'g, F>)>,
    params: &'g mut [ArrayD<F>],
}

/// The gradients of one segment.
struct SegmentGradients<'g, F> {
    query: Option<ArrayViewMut2<'g, F>>,
    key: Option<ArrayViewMut2<'g, F>>,
    value: Option<ArrayViewMut2<'g, F>>,
    pair_weights: Option<ArrayViewMut2<'g, F>>,
    edge_features: Option<ArrayViewMut2<'g, F>>,
    distances: Option<ArrayViewMut2<'g, F>>,
    query_positions: Option<ArrayViewMut2<'g, F>>,
    key_positions: Option<ArrayViewMut2<'g, F>>,
    bias: Option<PartOfBias<'g, F>>,
}

impl<'g, F: Float> RestOfGradients<'g, F> {
    fn new(inputs: &Inputs<'_, F>, grads: GradientsMut<'g, F>) -> Self {
        let rest = |rows: Option<ArrayViewMut2<'g, F>>| rows.map(Rest::new);
        Self {
            query: rest(grads.query),
            key: rest(grads.key),
            value: rest(grads.value),
            pair_weights: rest(grads.pair_weights),
            edge_features: rest(grads.edge_features),
            distances: rest(grads.distances.map(|grad| grad.insert_axis(Axis(1)))),
            query_positions: rest(grads.query_positions),
            key_positions: rest(grads.key_positions),
            bias: inputs.bias_axes().zip(grads.bias),
            params: grads.params,
        }
    }

    /// The gradients of the next segment.
    fn take(&mut self, segments: &Segments, segment: usize) -> SegmentGradients<'g, F> {
        let [queries, keys, pairs] =
            [segments.queries(segment), segments.keys(segment), segments.pairs(segment)];
        let take = |rest: &mut Option<Rest<'g, F>>, rows: &Range<usize>| {
            rest.as_mut().map(|rest| rest.take(rows.len()))
        };
        let bias = self.bias.take().map(|(axes, grad)| {
            let (axis, len) = match axes {
                BiasAxes::Pairs => (1, pairs.len()),
                BiasAxes::Queries { .. } => (1, queries.len()),
                BiasAxes::Keys => (2, keys.len()),
                BiasAxes::Shared => {
                    let copy = Array3::zeros(grad.raw_dim());
                    self.bias = Some((axes, grad));
                    return PartOfBias::Copy(copy);
                }
            };
            let (mut part, rest) = grad.split_at(Axis(axis), len);
            self.bias = Some((axes, rest));
            if let BiasAxes::Queries { by_key: true } = axes {
                part.slice_axis_inplace(Axis(2), keys.clone().into());
            }
            PartOfBias::Own(part)
        });
        SegmentGradients {
            query: take(&mut self.query, &queries),
            key: take(&mut self.key, &keys),
            value: take(&mut self.value, &keys),
            pair_weights: take(&mut self.pair_weights, &pairs),
            edge_features: take(&mut self.edge_features, &pairs),
            distances: take(&mut self.distances, &pairs),
            query_positions: take(&mut self.query_positions, &queries),
            key_positions: take(&mut self.key_positions, &keys),
            bias,
        }
    }

    /// Adds the gradients of what a segment shares with the others.
    fn add_shared(&mut self, bias: Option<PartOfBias<'_, F>>, params: &[ArrayD<F>]) {
        if let (Some((_, sum)), Some(bias)) = (&mut self.bias, bias.and_then(PartOfBias::into_copy))
        {
            *sum += &bias;
        }
        self.params.iter_mut().zip(params).for_each(|(sum, param)| *sum += param);
    }
}

impl<F: Float> SegmentGradients<'_, F> {
    fn view_mut<'v>(&'v mut self, params: &'v mut [ArrayD<F>]) -> GradientsMut<'v, F> {
        fn view<'v, F>(rows: &'v mut Option<ArrayViewMut2<'_, F>>) -> Option<ArrayViewMut2<'v, F>> {
            rows.as_mut().map(|rows| rows.view_mut())
        }
        GradientsMut {
            query: view(&mut self.query),
            key: view(&mut self.key),
            value: view(&mut self.value),
            bias: self.bias.as_mut().map(PartOfBias::view_mut),
            pair_weights: view(&mut self.pair_weights),
            edge_features: view(&mut self.edge_features),
            distances: view(&mut self.distances).map(|rows| rows.index_axis_move(Axis(1), 0)),
            query_positions: view(&mut self.query_positions),
            key_positions: view(&mut self.key_positions),
            params,
        }
    }
}
