use super::sample::normal;
use super::{Broken, Report, Sample, Shapes, Violation, arrays, for_each_case, require, succeed};
use crate::{Attention, Error, Gradients, Inputs, params};
use ndarray::{ArrayViewD, ArrayViewMutD};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;

/// The allowed error of a derivative, relative to the largest derivative of its array.
const TOLERANCE: f64 = 1e-7;

/// The lower bound of the largest derivative of an array in the comparison: a difference quotient of a
/// loss of order 10 is only accurate to about 1e-11.
const FLOOR: f64 = 1e-2;

/// The step of the difference quotient. The five-point formula has an error of h⁴ f⁽⁵⁾ / 30 ≈ 1e-17 f⁽⁵⁾
/// and a rounding error of 1e-16 f / h ≈ 1e-12 f, and such a small step rarely crosses a kink.
const STEP: f64 = 1e-4;

/// Checks the backward pass of a mechanism against central differences in `f64`, on small random inputs of
/// every kind: the gradients of query, key, value, bias, weights of pairs, edge features, distances,
/// positions and of every parameter, each along two directions to 1e-7 of its largest entry; and the backward
/// pass of its attention weights, if it has both. Also checks that a saved state can be restored: the same
/// parameters and buffers are visited for writing and for reading, and
/// [`params::load_state`](crate::params::load_state) sets them all.
///
/// The parameters are moved a little first, so that equal ones differ. Parameters and buffers are restored at
/// the end.
///
/// # Errors
/// The first derivative that differs, with the case, the array and both values; or the array that cannot
/// be restored.
pub fn check_gradients(
    mechanism: &mut dyn Attention<f64>,
    shapes: &Shapes,
) -> Result<Report, Violation> {
    let old = params::state(mechanism);
    spread_params(mechanism);
    let result = for_each_case(mechanism, shapes, |mechanism, sample| {
        state_comes_back(mechanism)?;
        // Where zeros meet, distances and norms may have a kink.
        if sample.has_zeros {
            return Ok(());
        }
        let inputs = succeed("the sample is valid", sample.inputs())?;
        let (out, saved) = succeed("forward_train succeeds", mechanism.forward_train(&inputs))?;
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(6);
        let grad_out = normal([out.nrows(), out.ncols()], 1.0, &mut rng);
        let analytic = mechanism.backward(&inputs, &saved, grad_out.view());
        let analytic = succeed("backward succeeds", analytic)?;
        let law = "backward is the derivative of forward";
        compare_all(law, mechanism, sample, &analytic, |mechanism, inputs| {
            Ok((mechanism.forward(inputs)? * &grad_out).sum())
        })?;

        // Not every mechanism with weights has their derivative.
        let Ok(weights) = mechanism.attention_weights(&inputs) else { return Ok(()) };
        let grad_weights = normal([weights.nrows(), weights.ncols()], 1.0, &mut rng);
        let analytic = match mechanism.attention_weights_backward(&inputs, grad_weights.view()) {
            Err(Error::NoWeights { .. }) => return Ok(()),
            analytic => succeed("attention_weights_backward succeeds", analytic)?,
        };
        let law = "attention_weights_backward is the derivative of attention_weights";
        compare_all(law, mechanism, sample, &analytic, |mechanism, inputs| {
            Ok((mechanism.attention_weights(inputs)? * &grad_weights).sum())
        })
    });
    // Shared parameters were not changed, and a state that does not come back has been reported.
    if params::state(mechanism) != old {
        let _ = params::load_state(mechanism, old);
    }
    result
}

/// Moves all parameters a little, each by a different amount: with equal ones, as fresh parameters often are,
/// a backward pass could mix them up without a difference.
fn spread_params(mechanism: &mut dyn Attention<f64>) {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(12);
    mechanism.visit_params_mut(&mut |_, mut param| {
        let noise = normal([1, param.len()], 0.02, &mut rng);
        param.iter_mut().zip(noise).for_each(|(param, noise): (&mut f64, f64)| *param += noise);
    });
}

/// Compares the gradients of a loss with its central differences: of each array along two directions, in which
/// every entry counts, and if these differ, entry by entry.
fn compare_all(
    law: &'static str,
    mechanism: &mut dyn Attention<f64>,
    sample: &Sample<f64>,
    analytic: &Gradients<f64>,
    loss: impl Fn(&dyn Attention<f64>, &Inputs<'_, f64>) -> crate::Result<f64>,
) -> Result<(), Broken> {
    let mut sample = sample.clone();
    let loss = |mechanism: &dyn Attention<f64>, sample: &Sample<f64>| {
        let law = "forward succeeds near the inputs";
        succeed(law, sample.inputs().and_then(|inputs| loss(mechanism, &inputs)))
    };
    let input_arrays = arrays(analytic).len() - analytic.params.len();
    for (array, (name, gradient)) in arrays(analytic).into_iter().enumerate() {
        let param = array.checked_sub(input_arrays);
        let mut agrees = true;
        for turn in [1.0, 2.0] {
            // Between 0.5 and 1, or −0.5 and −1, and for no two entries the same.
            let direction = |entry: usize| {
                let x = (entry as f64 * 0.618_034 + turn * 0.271_828).fract() - 0.5;
                x + 0.5 * x.signum()
            };
            let step = |entry, delta: f64| move |old: f64| old + delta * direction(entry);
            let along = numeric_derivative(|delta| match param {
                None => {
                    let mut moved = sample.clone();
                    for entry in 0..gradient.len() {
                        set(&mut moved, name, entry, step(entry, delta));
                    }
                    loss(mechanism, &moved)
                }
                Some(param) => {
                    let entries = 0..gradient.len();
                    let move_entry = |entry| set_param(mechanism, param, entry, step(entry, delta));
                    let old: Vec<f64> = entries.map(move_entry).collect();
                    let loss = loss(mechanism, &sample);
                    for (entry, &old) in old.iter().enumerate() {
                        set_param(mechanism, param, entry, |_| old);
                    }
                    loss
                }
            })?;
            let products = gradient.iter().enumerate();
            let expected: f64 = products.map(|(entry, grad)| grad * direction(entry)).sum();
            let size = gradient.iter().fold(FLOOR, |max, grad| max.max(grad.abs()));
            agrees &= (along - expected).abs() <= TOLERANCE * size;
        }
        if agrees {
            continue;
        }
        let numeric: Result<Vec<f64>, Broken> = (0..gradient.len())
            .map(|entry| match param {
                None => numeric_derivative(|delta| {
                    let old = set(&mut sample, name, entry, |old| old + delta);
                    let loss = loss(mechanism, &sample);
                    set(&mut sample, name, entry, |_| old);
                    loss
                }),
                Some(param) => numeric_derivative(|delta| {
                    let old = set_param(mechanism, param, entry, |old| old + delta);
                    let loss = loss(mechanism, &sample);
                    set_param(mechanism, param, entry, |_| old);
                    loss
                }),
            })
            .collect();
        compare(law, mechanism, param, name, gradient, &numeric?)?;
    }
    Ok(())
}

fn state_comes_back(mechanism: &mut dyn Attention<f64>) -> Result<(), Broken> {
    let law = "the arrays visited for writing are those visited for reading";
    let old = params::state(mechanism);
    let (num_params, mut lent) = (params::count(mechanism), Vec::new());
    let mut lend = |name: &str, mut array: ArrayViewMutD<'_, f64>| {
        lent.push((name.to_owned(), array.shape().to_vec()));
        // A different finite number for each.
        array.mapv_inplace(|x| if x == 0.5 { 0.25 } else { 0.5 });
    };
    mechanism.visit_params_mut(&mut lend);
    mechanism.visit_buffers_mut(&mut lend);
    if lent.is_empty() {
        // There are none, or they are shared.
        return Ok(());
    }
    let shown: Vec<_> = old.iter().map(|(name, x)| (name.clone(), x.shape().to_vec())).collect();
    let mut lent_params = 0;
    mechanism.visit_params_mut(&mut |_, _| lent_params += 1);
    require(law, lent == shown && lent_params == num_params, || {
        format!("{shown:?} are visited for reading, {lent:?} for writing")
    })?;
    let changed = params::state(mechanism);
    for ((name, old), (_, new)) in old.iter().zip(&changed) {
        let all_changed = old.iter().zip(new).all(|(old, new)| old != new);
        require(law, all_changed, || format!("{name} reads a value other than was written"))?;
    }
    let law = "a saved state can be restored";
    succeed(law, params::load_state(mechanism, old.iter().rev().cloned()))?;
    require(law, params::state(mechanism) == old, || {
        format!("{old:?} was loaded, but the state is {:?}", params::state(mechanism))
    })
}

/// (f(−2h) − 8 f(−h) + 8 f(h) − f(2h)) / 12h
fn numeric_derivative(mut f: impl FnMut(f64) -> Result<f64, Broken>) -> Result<f64, Broken> {
    let difference = 8.0 * (f(STEP)? - f(-STEP)?) - (f(2.0 * STEP)? - f(-2.0 * STEP)?);
    Ok(difference / (12.0 * STEP))
}

/// Changes one entry of an input and returns the old value.
fn set(sample: &mut Sample<f64>, name: &str, entry: usize, new: impl Fn(f64) -> f64) -> f64 {
    let array = match name {
        "key" => &mut sample.key,
        "value" => &mut sample.value,
        "pair_weights" => sample.pair_weights.as_mut().expect("it has a gradient"),
        "edge_features" => &mut sample.edge_features,
        "query_positions" => &mut sample.query_positions,
        "key_positions" => &mut sample.key_positions,
        "bias" => {
            let bias = sample.bias.as_mut().expect("it has a gradient");
            return replace(bias.iter_mut(), entry, new);
        }
        "distances" => return replace(sample.distances.iter_mut(), entry, new),
        _ => &mut sample.query,
    };
    replace(array.iter_mut(), entry, new)
}

/// Changes one entry of a parameter and returns the old value.
fn set_param(
    mechanism: &mut dyn Attention<f64>,
    param: usize,
    entry: usize,
    new: impl Fn(f64) -> f64,
) -> f64 {
    let (mut old, mut visited) = (f64::NAN, 0);
    mechanism.visit_params_mut(&mut |_, mut array| {
        if visited == param {
            old = replace(array.iter_mut(), entry, &new);
        }
        visited += 1;
    });
    old
}

fn replace<'a>(
    mut entries: impl Iterator<Item = &'a mut f64>,
    entry: usize,
    new: impl Fn(f64) -> f64,
) -> f64 {
    entries.nth(entry).map_or(f64::NAN, |value| std::mem::replace(value, new(*value)))
}

fn compare(
    law: &'static str,
    mechanism: &dyn Attention<f64>,
    param: Option<usize>,
    name: &str,
    analytic: ArrayViewD<'_, f64>,
    numeric: &[f64],
) -> Result<(), Broken> {
    let name = match param {
        None => name.to_owned(),
        Some(param) => params::state(mechanism)[param].0.clone(),
    };
    let values = analytic.iter().chain(numeric);
    let largest = values.fold(FLOOR, |max, value| max.max(value.abs()));
    for (entry, (&analytic, &numeric)) in analytic.iter().zip(numeric).enumerate() {
        let holds = largest.is_finite() && (analytic - numeric).abs() <= TOLERANCE * largest;
        require(law, holds, || {
            format!("{name}, entry {entry}: backward gives {analytic:e}, differences {numeric:e}")
        })?;
    }
    Ok(())
}
