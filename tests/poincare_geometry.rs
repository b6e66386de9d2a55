//! The Poincaré ball: laws, gradients, and comparison with mpmath.

mod common;

use approx::{abs_diff_eq, assert_abs_diff_eq};
use common::close::{assert_close_in_length, close_in_length};
use common::random::rng;
use common::strategies::points;
use graph_attention::geometry::poincare::*;
use graph_attention::ndarray::{Array2, ArrayView2};
use graph_attention::{Error, Float, Result};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use rand::{RngExt, rngs::Xoshiro256PlusPlus};
use serde_json::Value;
use std::collections::BTreeMap;
use std::slice::from_ref;

type Vectors<F> = Vec<Vec<F>>;
type Forward<F> = fn(&[Vec<F>], F) -> Result<Vec<F>>;
type Vjp<F> = fn(&[Vec<F>], F, &[F]) -> Result<Vectors<F>>;

/// A function of the module: it maps arrays and c to the result, and its vector–Jacobian product maps the
/// gradient of the result to the gradients of the arrays and, last, of c.
struct Function<F> {
    name: &'static str,
    forward: Forward<F>,
    vjp: Vjp<F>,
}

fn zeros<F: Float>(vectors: &[Vec<F>]) -> Vectors<F> {
    vectors.iter().map(|vector| vec![F::zero(); vector.len()]).collect()
}

/// Views row-major data as a matrix.
fn matrix<F>(data: &[F], rows: usize) -> ArrayView2<'_, F> {
    ArrayView2::from_shape((rows, data.len() / rows), data).unwrap()
}

/// The margin of all projections in these tests.
const MARGIN: f64 = 0.0625;

/// A function of two vectors with a vector as its result.
macro_rules! of_two {
    ($name:ident, $vjp:ident) => {
        Function {
            name: stringify!($name),
            forward: |a, c| {
                let mut out = vec![F::zero(); a[1].len()];
                $name(&a[0], &a[1], c, &mut out)?;
                Ok(out)
            },
            vjp: |a, c, g| {
                let mut grads = zeros(a);
                let [x, y] = &mut grads[..] else { unreachable!() };
                let grad_c = $vjp(&a[0], &a[1], c, g, x, y)?;
                grads.push(vec![grad_c]);
                Ok(grads)
            },
        }
    };
}

/// A function of three vectors with a vector as its result.
macro_rules! of_three {
    ($name:ident, $vjp:ident) => {
        Function {
            name: stringify!($name),
            forward: |a, c| {
                let mut out = vec![F::zero(); a[0].len()];
                $name(&a[0], &a[1], &a[2], c, &mut out)?;
                Ok(out)
            },
            vjp: |a, c, g| {
                let mut grads = zeros(a);
                let [x, y, v] = &mut grads[..] else { unreachable!() };
                let grad_c = $vjp(&a[0], &a[1], &a[2], c, g, x, y, v)?;
                grads.push(vec![grad_c]);
                Ok(grads)
            },
        }
    };
}

/// A function of one vector with a vector as its result.
macro_rules! of_one {
    ($name:ident, $vjp:ident, $extra:expr) => {
        Function {
            name: stringify!($name),
            forward: |a, c| {
                let mut out = vec![F::zero(); (a[0].len() as isize + $extra) as usize];
                $name(&a[0], c, &mut out)?;
                Ok(out)
            },
            vjp: |a, c, g| {
                let mut grads = zeros(a);
                let grad_c = $vjp(&a[0], c, g, &mut grads[0])?;
                grads.push(vec![grad_c]);
                Ok(grads)
            },
        }
    };
}

fn functions<F: Float>() -> Vec<Function<F>> {
    vec![
        Function {
            name: "conformal_factor",
            forward: |a, c| Ok(vec![conformal_factor(&a[0], c)?]),
            vjp: |a, c, g| {
                let mut grads = zeros(a);
                let grad_c = conformal_factor_vjp(&a[0], c, g[0], &mut grads[0])?;
                grads.push(vec![grad_c]);
                Ok(grads)
            },
        },
        Function {
            name: "distance",
            forward: |a, c| Ok(vec![distance(&a[0], &a[1], c)?]),
            vjp: |a, c, g| {
                let mut grads = zeros(a);
                let [x, y] = &mut grads[..] else { unreachable!() };
                let grad_c = distance_vjp(&a[0], &a[1], c, g[0], x, y)?;
                grads.push(vec![grad_c]);
                Ok(grads)
            },
        },
        of_two!(mobius_add, mobius_add_vjp),
        of_two!(exp_map, exp_map_vjp),
        of_two!(log_map, log_map_vjp),
        of_one!(exp_map_origin, exp_map_origin_vjp, 0),
        of_one!(log_map_origin, log_map_origin_vjp, 0),
        of_one!(to_klein, to_klein_vjp, 0),
        of_one!(from_klein, from_klein_vjp, 0),
        of_one!(to_lorentz, to_lorentz_vjp, 1),
        of_one!(from_lorentz, from_lorentz_vjp, -1),
        Function {
            name: "geodesic",
            forward: |a, c| {
                let mut out = vec![F::zero(); a[0].len()];
                geodesic(&a[0], &a[1], a[2][0], c, &mut out)?;
                Ok(out)
            },
            vjp: |a, c, g| {
                let mut grads = zeros(a);
                let [x, y, t] = &mut grads[..] else { unreachable!() };
                let (grad_t, grad_c) = geodesic_vjp(&a[0], &a[1], a[2][0], c, g, x, y)?;
                t[0] = grad_t;
                grads.push(vec![grad_c]);
                Ok(grads)
            },
        },
        of_three!(parallel_transport, parallel_transport_vjp),
        of_three!(gyration, gyration_vjp),
        Function {
            name: "project",
            forward: |a, c| {
                let mut out = vec![F::zero(); a[0].len()];
                project(&a[0], c, F::from_f64(MARGIN), &mut out)?;
                Ok(out)
            },
            vjp: |a, c, g| {
                let mut grads = zeros(a);
                let grad_c = project_vjp(&a[0], c, F::from_f64(MARGIN), g, &mut grads[0])?;
                grads.push(vec![grad_c]);
                Ok(grads)
            },
        },
        Function {
            name: "mobius_scalar_mul",
            forward: |a, c| {
                let mut out = vec![F::zero(); a[1].len()];
                mobius_scalar_mul(a[0][0], &a[1], c, &mut out)?;
                Ok(out)
            },
            vjp: |a, c, g| {
                let mut grads = zeros(a);
                let (grad_r, grad_c) = mobius_scalar_mul_vjp(a[0][0], &a[1], c, g, &mut grads[1])?;
                grads[0][0] = grad_r;
                grads.push(vec![grad_c]);
                Ok(grads)
            },
        },
        Function {
            name: "mobius_mat_vec",
            forward: |a, c| {
                let m = matrix(&a[0], a[0].len() / a[1].len());
                let mut out = vec![F::zero(); m.nrows()];
                mobius_mat_vec(m, &a[1], c, &mut out)?;
                Ok(out)
            },
            vjp: |a, c, g| {
                let m = matrix(&a[0], a[0].len() / a[1].len());
                let mut grads = zeros(a);
                let mut grad_m = Array2::zeros(m.dim());
                let grad_c = mobius_mat_vec_vjp(m, &a[1], c, g, grad_m.view_mut(), &mut grads[1])?;
                grads[0] = grad_m.into_iter().collect();
                grads.push(vec![grad_c]);
                Ok(grads)
            },
        },
        Function {
            name: "midpoint",
            forward: |a, c| {
                let points = matrix(&a[0], a[1].len());
                let mut out = vec![F::zero(); points.ncols()];
                midpoint(points, &a[1], c, &mut out)?;
                Ok(out)
            },
            vjp: |a, c, g| {
                let points = matrix(&a[0], a[1].len());
                let mut grads = zeros(a);
                let mut grad_points = Array2::zeros(points.dim());
                let grad_c =
                    midpoint_vjp(points, &a[1], c, g, grad_points.view_mut(), &mut grads[1])?;
                grads[0] = grad_points.into_iter().collect();
                grads.push(vec![grad_c]);
                Ok(grads)
            },
        },
    ]
}

/// Draws a random direction.
fn unit(rng: &mut Xoshiro256PlusPlus, n: usize) -> Vec<f64> {
    loop {
        let x: Vec<f64> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
        let norm = norm(&x);
        if norm > 0.1 {
            return x.iter().map(|x| x / norm).collect();
        }
    }
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Draws a point of the ball, at most `reach` of the way to the boundary; any vector if c = 0.
fn point(rng: &mut Xoshiro256PlusPlus, n: usize, c: f64, reach: f64) -> Vec<f64> {
    let length = reach * rng.random_range(0.0..1.0) / c.sqrt().max(0.5);
    unit(rng, n).into_iter().map(|x| x * length).collect()
}

/// Draws arguments of a function, none near the boundary.
fn arguments(rng: &mut Xoshiro256PlusPlus, name: &str, n: usize, c: f64) -> Vectors<f64> {
    match name {
        "conformal_factor" | "log_map_origin" | "to_klein" | "from_klein" | "to_lorentz" => {
            vec![point(rng, n, c, 0.9)]
        }
        "from_lorentz" => {
            let mut out = vec![0.0; n + 1];
            to_lorentz(&point(rng, n, c, 0.9), c, &mut out).unwrap();
            vec![out]
        }
        "project" => vec![point(rng, n, c, 2.0)],
        "mobius_scalar_mul" => vec![vec![rng.random_range(-2.0..2.0)], point(rng, n, c, 0.9)],
        "mobius_mat_vec" => {
            let m = (0..3 * n).map(|_| rng.random_range(-1.0..1.0)).collect();
            vec![m, point(rng, n, c, 0.9)]
        }
        "parallel_transport" | "gyration" => {
            vec![point(rng, n, c, 0.9), point(rng, n, c, 0.9), point(rng, n, 1.0, 2.0)]
        }
        "geodesic" => {
            let ends = [point(rng, n, c, 0.9), point(rng, n, c, 0.9)];
            [&ends[..], &[vec![rng.random_range(-0.5..1.5)]]].concat()
        }
        "midpoint" => {
            let points = (0..4).flat_map(|_| point(rng, n, c, 0.9)).collect();
            vec![points, (0..4).map(|_| rng.random_range(0.1..2.0)).collect()]
        }
        "exp_map_origin" => vec![point(rng, n, c, 2.0)],
        "exp_map" => vec![point(rng, n, c, 0.8), point(rng, n, c, 0.8)],
        _ => vec![point(rng, n, c, 0.9), point(rng, n, c, 0.9)],
    }
}

#[test]
fn vector_jacobian_products_are_the_slopes() {
    let mut rng = rng(7);
    for function in functions::<f64>() {
        let name = function.name;
        let mut worst = 0.0_f64;
        for case in 0..200 {
            let n = [1, 2, 3, 7][case % 4];
            let c = [1.0, 0.1, 2.5, 1e-3][case / 4 % 4];
            let a = arguments(&mut rng, name, n, c);
            let value = (function.forward)(&a, c).unwrap();
            let g: Vec<f64> = value.iter().map(|_| rng.random_range(-1.0..1.0)).collect();
            let mut all = a.clone();
            all.push(vec![c]);
            let grads = (function.vjp)(&a, c, &g).unwrap();
            let loss = |all: &[Vec<f64>]| -> f64 {
                let (c, a) = all.split_last().unwrap();
                let out = (function.forward)(a, c[0]).unwrap();
                out.iter().zip(&g).map(|(out, g)| out * g).sum()
            };
            for (k, grad) in grads.iter().enumerate() {
                for (i, &grad) in grad.iter().enumerate() {
                    let step = 1e-5 * all[k][i].abs().max(if k == a.len() { 0.0 } else { 0.1 });
                    let mut moved = |by: f64| {
                        let old = all[k][i];
                        all[k][i] = old + by;
                        let loss = loss(&all);
                        all[k][i] = old;
                        loss
                    };
                    let slope = (moved(step) - moved(-step)) / (2.0 * step);
                    let size = 1.0 + grad.abs();
                    let is_slope = abs_diff_eq!(grad, slope, epsilon = 1e-7 * size);
                    assert!(is_slope, "{name} {case} {k} {i}: {grad} instead of {slope}");
                    worst = worst.max((grad - slope).abs() / size);
                }
            }
        }
        println!("{name}: {worst:.1e}");
    }
}

/// The functions whose result is a point of the ball, of Klein's ball, or of a smaller ball.
const POINTS: [&str; 11] = [
    "mobius_add",
    "exp_map",
    "exp_map_origin",
    "mobius_scalar_mul",
    "mobius_mat_vec",
    "midpoint",
    "geodesic",
    "to_klein",
    "from_klein",
    "from_lorentz",
    "project",
];

/// Beyond the last representable point in a direction, the result is the nearest possible point.
#[test]
fn results_past_the_last_point_are_inside() {
    let end = call("exp_map", &[vec![0.9, 0.0], vec![1e3, 1.0]], 1.0);
    assert!(conformal_factor(&end, 1.0).is_ok(), "{end:?}");
    let exact = [1.0 - 1.385_040_857_767e-9, 5.263_156_575_303_182e-5];
    assert_abs_diff_eq!(end[0], exact[0], epsilon = 1.2e-16);
    assert_abs_diff_eq!(end[1], exact[1], epsilon = 2e-20);
    let ten = vec![10.0, 0.0, 0.0, 10.0];
    for r in [0.75, 0.9, 0.97, 1.0_f64.next_down()] {
        for x in [vec![r, 0.0], vec![0.6 * r, -0.8 * r]] {
            let image = call("mobius_mat_vec", &[ten.clone(), x.clone()], 1.0);
            assert!(conformal_factor(&image, 1.0).is_ok() && norm(&image) > 1.0 - 1e-7);
            let x: Vec<f32> = x.iter().map(|&x| x as f32).collect();
            let m = Array2::from_diag_elem(2, 10.0_f32);
            let mut image = [0.0; 2];
            if conformal_factor(&x, 1.0).is_ok() {
                mobius_mat_vec(m.view(), &x, 1.0, &mut image).unwrap();
                assert!(conformal_factor(&image, 1.0).is_ok(), "{image:?}");
            }
        }
    }
    // The last points on two sides, also of Klein's ball.
    let last = 1.0_f64.next_down();
    for name in ["mobius_add", "to_klein", "from_lorentz"] {
        let a = match name {
            "mobius_add" => vec![vec![last, 0.0], vec![0.0, last]],
            "to_klein" => vec![vec![0.6 * last, -0.8 * last]],
            _ => vec![vec![1e17, 0.6e17, -0.8e17]],
        };
        assert!(conformal_factor(&call(name, &a, 1.0), 1.0).is_ok(), "{name}");
    }
}

/// Tries all points around: in the plane hardly any is nearer to the true result.
#[test]
fn results_past_the_last_point_are_the_nearest_inside() {
    let mut rng = rng(47);
    let (mut count, mut not_nearest, mut worst) = (0, 0, 1.0_f64);
    for case in 0..1200 {
        let (n, c) = (2 + case % 2, [1.0_f32, 0.7, 2.3][case / 2 % 3]);
        let mut direction = unit(&mut rng, n);
        if case % 5 == 0 {
            direction[0] *= 1e-3;
        }
        let size = norm(&direction);
        let v: Vec<f32> = direction.iter().map(|x| (40.0 * x / size) as f32).collect();
        let mut out = vec![0.0; n];
        exp_map_origin(&v, c, &mut out).unwrap();
        assert!(conformal_factor(&out, c).is_ok());
        let wide: Vec<f64> = v.iter().copied().map(f64::from).collect();
        let reach = f64::from(c).sqrt() * norm(&wide);
        let exact: Vec<f64> = wide.iter().map(|x| x / reach).collect();
        let away = |x: &[f32]| -> f64 {
            norm(&x.iter().zip(&exact).map(|(x, exact)| f64::from(*x) - exact).collect::<Vec<_>>())
        };
        let rounded: Vec<f32> = exact.iter().map(|&x| x as f32).collect();
        if conformal_factor(&rounded, c).is_ok() {
            assert_eq!(out, rounded);
            continue;
        }
        let mut least = away(&out);
        const REACH: usize = 4;
        for at in 0..(2 * REACH + 1).pow(n as u32) {
            let mut at = at;
            let point: Vec<f32> = rounded
                .iter()
                .map(|&x| {
                    let place = f64::from(x) - f64::from(x * (1.0 - f32::EPSILON / 2.0));
                    let steps = (at % (2 * REACH + 1)) as f64 - REACH as f64;
                    at /= 2 * REACH + 1;
                    (f64::from(x) + steps * place) as f32
                })
                .collect();
            if away(&point) < least && conformal_factor(&point, c).is_ok() {
                least = away(&point);
            }
        }
        count += 1;
        not_nearest += usize::from(least < away(&out));
        worst = worst.max(away(&out) / least);
    }
    println!("{not_nearest} of {count} are not the nearest, and {worst:.2} times as far at worst");
    assert!(count > 400 && not_nearest * 20 < count && worst < 2.0);
}

fn numbers<F: Float>(value: &Value) -> Vec<F> {
    value.as_array().unwrap().iter().map(|x| F::from_f64(x.as_f64().unwrap())).collect()
}

fn float_norm<F: Float>(x: impl IntoIterator<Item = F>) -> f64 {
    let x: Vec<f64> = x.into_iter().map(F::as_f64).collect();
    let largest = x.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
    if largest == 0.0 {
        0.0
    } else {
        largest * norm(&x.iter().map(|x| x / largest).collect::<Vec<_>>())
    }
}

/// Returns the error, NaN if a number is not finite, and the norm of the expected result.
fn error<F: Float>(actual: &[F], expected: &Value) -> (f64, f64) {
    let expected: Vec<f64> = numbers(expected);
    assert_eq!(actual.len(), expected.len());
    let difference: Vec<f64> = actual.iter().zip(&expected).map(|(a, b)| a.as_f64() - b).collect();
    let is_number = difference.iter().all(|x| x.is_finite());
    let error = if is_number { float_norm(difference) } else { f64::NAN };
    (error, float_norm(expected))
}

/// Compares every function with mpmath. Returns the number of comparisons.
fn answers_of_mpmath<F: Float>(kind: &str, ordinary: f64) -> usize {
    let golden: Value = serde_json::from_str(include_str!("golden/poincare.json")).unwrap();
    let (functions, epsilon) = (functions::<F>(), F::epsilon().as_f64());
    let mut worst = BTreeMap::<String, f64>::new();
    let mut note = |class: String, value: f64| {
        let worst = worst.entry(class).or_default();
        *worst = worst.max(value);
    };
    let mut count = 0;
    for case in golden["cases"].as_array().unwrap() {
        if case["kind"] != kind {
            continue;
        }
        count += 1;
        let text = |name: &str| case[name].as_str().unwrap();
        let (name, label) = (text("function"), text("label"));
        let class = label.split([',', ' ']).next().unwrap();
        let function = functions.iter().find(|function| function.name == name).unwrap();
        let a: Vectors<F> = case["inputs"].as_array().unwrap().iter().map(numbers).collect();
        let c = F::from_f64(case["c"].as_f64().unwrap());
        let g: Vec<F> = numbers(&case["grad_out"]);
        let mut parts = vec![((function.forward)(&a, c).unwrap(), &case["out"], "out_condition")];
        for (k, grad) in (function.vjp)(&a, c, &g).unwrap().into_iter().enumerate() {
            parts.push((grad, &case["grads"][k], "grad_conditions"));
        }
        for (k, (actual, expected, condition)) in parts.into_iter().enumerate() {
            let what = format!("{kind}, {name}, {label}, {condition} {k}");
            let condition = match &case[condition] {
                Value::Array(conditions) => conditions[k - 1].as_f64().unwrap(),
                condition => condition.as_f64().unwrap(),
            };
            let (error, size) = error(&actual, expected);
            // Underflow is not an error.
            let error = if error < F::min_positive_value().as_f64() { 0.0 } else { error };
            let unit = epsilon * size + f64::EPSILON * condition;
            assert!(error <= K * unit, "{what}: {error:e} of {size:e}, condition {condition:e}");
            note(format!("{class}, in units of rounding and condition"), error / unit.max(1e-300));
            // For points close together the difference is exact.
            let exact = class == "ordinary" || (class == "gap" && name == "distance" && k < 3);
            let exact = exact || (class == "gap" && name == "log_map" && k == 0);
            // And 1 − c|x|² is exact for the point as given, whatever the condition.
            let of_alpha = ["conformal_factor", "distance", "log_map_origin"].contains(&name);
            let exact = exact || (class == "boundary" && of_alpha && k == 0);
            if exact {
                assert!(error <= ordinary * size, "{what}: {error:e} of {size:e}");
                note(format!("{class}, relative"), error / size.max(1e-300));
            }
        }
    }
    for (class, worst) in &worst {
        println!("{kind}, {class}: {worst:.1e}");
    }
    count
}

/// The allowed error, in units in the last place of the result and of every argument in turn; measured:
/// 4.1.
const K: f64 = 8.0;

#[test]
fn answers_are_those_of_mpmath() {
    assert!(answers_of_mpmath::<f64>("f64", 1e-13) > 300);
    assert!(answers_of_mpmath::<f32>("f32", 5e-7) > 100);
}

/// Calls a function by name, on vectors that it must accept.
fn call(name: &str, a: &[Vec<f64>], c: f64) -> Vec<f64> {
    let function = functions::<f64>().into_iter().find(|function| function.name == name).unwrap();
    (function.forward)(a, c).unwrap()
}

fn minus(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| -x).collect()
}

/// Some hundred roundings at points at most nine tenths of the way to the boundary, where 1 − c|x|² is at
/// least 0.19.
const LAW: f64 = 1e-12;

/// [`close_in_length`] with the error type of `proptest`.
fn close(
    what: &str,
    tolerance: f64,
    actual: &[f64],
    expected: &[f64],
) -> std::result::Result<(), TestCaseError> {
    close_in_length(what, tolerance, actual, expected).map_err(TestCaseError::fail)
}

/// Generates a number of columns and a curvature.
fn balls(curvatures: &'static [f64]) -> impl Strategy<Value = (usize, f64)> {
    (select(&[1, 2, 3, 7][..]), select(curvatures))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn laws(
        ((n, c), [x, y, a], v) in balls(&[1.0, 0.1, 2.5, 1e-6, 0.0]).prop_flat_map(|(n, c)| {
            let ball = || points(n, c, 0.9);
            (Just((n, c)), [ball(), ball(), ball()], points(n, 1.0, 2.0))
        }),
        t in 0.0..1.0f64,
        r in -2.0..2.0f64,
    ) {
        let of = |name: &str, a: &[&Vec<f64>]| {
            let a: Vectors<f64> = a.iter().map(|&x| x.clone()).collect();
            call(name, &a, c)
        };

        let sum = of("mobius_add", &[&x, &y]);
        close("cancellation", LAW, &of("mobius_add", &[&minus(&x), &sum]), &y)?;

        let length = of("distance", &[&x, &y]);
        let moved = [&x, &y].map(|x| of("mobius_add", &[&a, x]));
        // Both may be far out, and rounding of the points then loses digits of d.
        let far = 1e-10;
        close("isometry", far, &of("distance", &[&moved[0], &moved[1]]), &length)?;

        let log = of("log_map", &[&x, &y]);
        let lambda = of("conformal_factor", &[&x])[0];
        close("length of log", LAW, &[lambda * norm(&log)], &length)?;
        close("exp of log", LAW, &of("exp_map", &[&x, &log]), &y)?;
        let between = of("geodesic", &[&x, &y, &vec![t]]);
        let later = log.iter().map(|log| t * log).collect();
        close("geodesic", LAW, &between, &of("exp_map", &[&x, &later]))?;
        let way = of("distance", &[&x, &between])[0];
        close("its speed", LAW, &[way], &[t * length[0]])?;
        prop_assert_eq!(of("geodesic", &[&x, &y, &vec![0.0]]), x.clone());
        prop_assert_eq!(of("geodesic", &[&x, &y, &vec![1.0]]), y.clone());
        let origin = vec![0.0; n];
        let log = of("log_map", &[&origin, &y]);
        close("log at the origin", LAW, &of("log_map_origin", &[&y]), &log)?;
        close("exp of it", LAW, &of("exp_map_origin", &[&log]), &y)?;
        close("exp at the origin", LAW, &of("exp_map", &[&origin, &log]), &y)?;

        let carried = of("parallel_transport", &[&x, &y, &v]);
        let lambda_y = of("conformal_factor", &[&y])[0];
        close("transport", LAW, &[lambda_y * norm(&carried)], &[lambda * norm(&v)])?;
        let back = of("parallel_transport", &[&y, &x, &carried]);
        close("there and back", LAW, &back, &v)?;
        let turned = of("gyration", &[&x, &y, &a]);
        let outer = of("mobius_add", &[&x, &of("mobius_add", &[&y, &a])]);
        let by_sums = of("mobius_add", &[&minus(&sum), &outer]);
        close("gyration", 1e-9, &turned, &by_sums)?;

        close("Klein", LAW, &of("from_klein", &[&of("to_klein", &[&x])]), &x)?;
        if c > 0.0 {
            let on_hyperboloid = of("to_lorentz", &[&x]);
            let space = norm(&on_hyperboloid[1..]);
            let form = c * (on_hyperboloid[0] - space) * (on_hyperboloid[0] + space);
            close("hyperboloid", 1e-11, &[form], &[1.0])?;
            close("Lorentz", LAW, &of("from_lorentz", &[&on_hyperboloid]), &x)?;
        }

        let scaled = of("mobius_scalar_mul", &[&vec![r], &x]);
        let diagonal = (0..n * n).map(|i| if i % (n + 1) == 0 { r } else { 0.0 }).collect();
        close("r I", LAW, &of("mobius_mat_vec", &[&diagonal, &x]), &scaled)?;
        let distance = of("distance", &[&origin, &scaled])[0];
        close("r d", LAW, &[distance], &[r.abs() * of("distance", &[&origin, &x])[0]])?;
    }
}

/// Geodesics between opposite ends of the ball, for which the logarithm's direction is coarse.
#[test]
fn geodesics_across_the_ball() {
    for gap in [1e-6, 1e-10, 1e-14] {
        let far = 1.0 - gap;
        let (x, y) = (vec![far * 0.6, far * 0.8], vec![-far * 0.6, far * 0.8]);
        // The midpoint is on the axis of symmetry; its distance follows from Pythagoras' theorem.
        let half = call("geodesic", &[x.clone(), y.clone(), vec![0.5]], 1.0);
        let square = 0.64 * far * far;
        let height =
            2.0 * far * 0.8 / (1.0 + far * far + ((1.0 + far * far).powi(2) - 4.0 * square).sqrt());
        assert_close_in_length("half-way", 4e-16, &half, &[0.0, height]);
        let back = call("geodesic", &[y, x.clone(), vec![1.0]], 1.0);
        assert_eq!(back, x);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn midpoints_of_all_models_are_one(
        (c, points, a) in balls(&[1.0, 0.1, 2.5, 1e-3]).prop_flat_map(|(n, c)| {
            (Just(c), vec(points(n, c, 0.9), 5), points(n, c, 0.9))
        }),
        weights in vec(0.0..2.0f64, 5).prop_filter("a weight", |w| w.iter().any(|&w| w > 0.0)),
    ) {
        let mean = |points: &[Vec<f64>]| call("midpoint", &[points.concat(), weights.clone()], c);
        let weighted = |rows: &[Vec<f64>], weights: &[f64]| -> Vec<f64> {
            let column =
                |i: usize| rows.iter().zip(weights).map(|(row, w)| row[i] * w).sum::<f64>();
            (0..rows[0].len()).map(column).collect()
        };
        let m = mean(&points);

        // Einstein: the mean of Klein's coordinates, weighted with the Lorentz factors.
        let klein: Vectors<f64> = points.iter().map(|x| call("to_klein", from_ref(x), c)).collect();
        let factor = |k: &Vec<f64>| (1.0 - c * norm(k).powi(2)).sqrt().recip();
        let factors: Vec<f64> = klein.iter().zip(&weights).map(|(k, w)| w * factor(k)).collect();
        let total: f64 = factors.iter().sum();
        let k = weighted(&klein, &factors).iter().map(|k| k / total).collect();
        close("Einstein", 1e-10, &call("from_klein", &[k], c), &m)?;

        // Lorentz: the mean, scaled back to the hyperboloid.
        let lorentz: Vectors<f64> =
            points.iter().map(|x| call("to_lorentz", from_ref(x), c)).collect();
        let mean_lorentz = weighted(&lorentz, &weights);
        let space = norm(&mean_lorentz[1..]);
        let size = (c * (mean_lorentz[0] - space) * (mean_lorentz[0] + space)).sqrt();
        let centroid = mean_lorentz.iter().map(|x| x / size).collect();
        close("Lorentz", 1e-10, &call("from_lorentz", &[centroid], c), &m)?;

        let translate = |x: &Vec<f64>| call("mobius_add", &[a.clone(), x.clone()], c);
        let moved: Vectors<f64> = points.iter().map(translate).collect();
        close("translation", 1e-10, &mean(&moved), &translate(&m))?;
    }
}

#[test]
fn limits_at_zero_curvature() {
    let mut rng = rng(17);
    for function in functions::<f64>() {
        if function.name.ends_with("lorentz") {
            continue;
        }
        for case in 0..100 {
            let a = arguments(&mut rng, function.name, [1, 2, 3, 7][case % 4], 0.0);
            let flat = (function.forward)(&a, 0.0).unwrap();
            let g: Vec<f64> = flat.iter().map(|_| rng.random_range(-1.0..1.0)).collect();
            let grads = (function.vjp)(&a, 0.0, &g).unwrap();
            let curved = (function.forward)(&a, 1e-12).unwrap();
            assert_close_in_length(function.name, 1e-10, &curved, &flat);
            for (grad, flat) in (function.vjp)(&a, 1e-12, &g).unwrap().iter().zip(&grads) {
                assert_close_in_length(function.name, 1e-9, grad, flat);
            }
        }
    }
    let (x, y) = (vec![3.0, -4.0], vec![1.0, 1.0]);
    assert_eq!(call("conformal_factor", from_ref(&x), 0.0), [2.0]);
    assert_eq!(call("distance", &[x.clone(), y.clone()], 0.0), [2.0 * 29.0_f64.sqrt()]);
    assert_eq!(call("mobius_add", &[x.clone(), y.clone()], 0.0), [4.0, -3.0]);
    assert_eq!(call("log_map", &[x.clone(), y.clone()], 0.0), [-2.0, 5.0]);
    assert_eq!(call("midpoint", &[[x, y].concat(), vec![1.0, 3.0]], 0.0), [1.5, -0.25]);
}

#[test]
fn equal_points() {
    let (x, g) = ([0.3, -0.9], [1.0, -2.0]);
    for c in [1.0, 0.0] {
        assert_eq!(distance(&x, &x, c), Ok(0.0));
        let (mut grad_x, mut grad_y) = ([0.0; 2], [0.0; 2]);
        assert_eq!(distance_vjp(&x, &x, c, 1.0, &mut grad_x, &mut grad_y), Ok(0.0));
        assert_eq!((grad_x, grad_y), ([0.0; 2], [0.0; 2]));
        let x = x.to_vec();
        assert_eq!(call("log_map", &[x.clone(), x.clone()], c), [0.0, 0.0]);
        assert_eq!(call("mobius_add", &[x.clone(), minus(&x)], c), [0.0, 0.0]);
        let carried = call("parallel_transport", &[x.clone(), x.clone(), g.to_vec()], c);
        assert_close_in_length("transport to the same point", 1e-15, &carried, &g);
        let twice = call("midpoint", &[[&x[..], &x].concat(), vec![1.0, 2.0]], c);
        assert_close_in_length("midpoint of one", 1e-15, &twice, &x);
    }
}

#[test]
fn gradients_are_added() {
    let mut rng = rng(19);
    let (x, y, g) = ([0.1, 0.5], [-0.4, 0.2], [0.3, 0.8]);
    let mut grads = ([0.0; 2], [0.0; 2]);
    log_map_vjp(&x, &y, 1.0, &g, &mut grads.0, &mut grads.1).unwrap();
    let start: [f64; 2] = [rng.random(), rng.random()];
    let mut added = (start, [1.0; 2]);
    log_map_vjp(&x, &y, 1.0, &g, &mut added.0, &mut added.1).unwrap();
    for (i, start) in start.iter().enumerate() {
        assert_eq!(added.0[i], start + grads.0[i]);
        assert_eq!(added.1[i], 1.0 + grads.1[i]);
    }
}

#[test]
fn projection_is_explicit() {
    let (x, margin) = ([3.0, -4.0], 0.0625);
    let mut out = [0.0; 2];
    project(&x, 4.0, margin, &mut out).unwrap();
    assert_close_in_length("outside", 1e-15, &out, &[0.28125, -0.375]);
    project(&x, 0.0, margin, &mut out).unwrap();
    assert_eq!(out, x);
    project(&[0.3, -0.3], 4.0, margin, &mut out).unwrap();
    assert_eq!(out, [0.3, -0.3]);
    // The smallest margin leaves no point outside, in either precision.
    let mut rng = rng(23);
    for _ in 0..10_000 {
        let c = rng.random_range(0.01..10.0);
        let x = unit(&mut rng, 3);
        let mut out = [0.0; 3];
        project(&x.iter().map(|x| 1e3 * x).collect::<Vec<_>>(), c, 4.0 * f64::EPSILON, &mut out)
            .unwrap();
        conformal_factor(&out, c).unwrap();
        let (x, c) = (x.iter().map(|&x| 1e3 * x as f32).collect::<Vec<_>>(), c as f32);
        let mut out = [0.0; 3];
        project(&x, c, 4.0 * f32::EPSILON, &mut out).unwrap();
        conformal_factor(&out, c).unwrap();
    }
}

#[test]
fn bad_input() {
    let config = |field, expected: &'static str, actual: &str| Error::InvalidArgument {
        argument: field,
        expected: expected.into(),
        actual: actual.into(),
    };
    let shape = |what: &'static str, expected: &[usize], actual: &[usize]| Error::Shape {
        what: what.into(),
        expected: expected.to_vec(),
        actual: actual.to_vec(),
    };
    let (x, far) = ([0.6, 0.0], [0.0, 2.0]);

    for function in functions::<f64>() {
        let name = function.name;
        let mut rng = rng(29);
        let a = arguments(&mut rng, name, 2, 1.0);
        let g = vec![1.0; (function.forward)(&a, 1.0).unwrap().len()];
        for (c, text) in [(-1.0, "-1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
            let expected = config("c", "a finite number, at least 0", text);
            assert_eq!((function.forward)(&a, c), Err(expected.clone()), "{name}");
            assert_eq!((function.vjp)(&a, c, &g), Err(expected), "{name}");
        }
        // One coordinate too few for the gradient of the result.
        if g.len() > 1 && name != "mobius_mat_vec" {
            let refused = (function.vjp)(&a, 1.0, &g[1..]);
            assert!(matches!(refused, Err(Error::Shape { .. })), "{name}");
        }
        // NaN is propagated, from every argument in turn.
        for k in 0..a.len() {
            let mut a = a.clone();
            a[k][0] = f64::NAN;
            let out = (function.forward)(&a, 1.0).unwrap();
            assert!(out.iter().any(|out| out.is_nan()), "{name}");
            let grads = (function.vjp)(&a, 1.0, &g).unwrap();
            // The projection is the identity unless a point is known to be outside.
            let identity = name == "project";
            assert!(identity || grads.concat().iter().any(|grad| grad.is_nan()), "{name}");
        }
        // Each argument that must be a point, outside and on the boundary.
        let points: &[(usize, &'static str)] = match name {
            "conformal_factor" | "to_klein" | "to_lorentz" | "exp_map" => &[(0, "x")],
            "log_map_origin" => &[(0, "y")],
            "from_klein" => &[(0, "k")],
            "distance" | "mobius_add" | "log_map" | "parallel_transport" | "geodesic" => {
                &[(0, "x"), (1, "y")]
            }
            "gyration" => &[(0, "a"), (1, "b")],
            "mobius_scalar_mul" | "mobius_mat_vec" => &[(1, "x")],
            _ => &[],
        };
        for &(k, what) in points {
            for length in [2.0, 1.0, f64::INFINITY] {
                let mut a = a.clone();
                a[k] = vec![0.0, -length];
                let expected =
                    Error::Domain { what: what.into(), row: 0, norm: length, limit: 1.0 };
                assert_eq!((function.forward)(&a, 1.0), Err(expected.clone()), "{name}");
                assert_eq!((function.vjp)(&a, 1.0, &g), Err(expected), "{name}");
            }
        }
    }

    let mut two = [0.0; 2];
    let forever = geodesic(&x, &x, f64::INFINITY, 1.0, &mut two);
    assert_eq!(forever, Err(config("t", "a finite number", "inf")));
    let mut three = [0.0; 3];
    assert_eq!(distance(&x, &three, 1.0), Err(shape("y", &[2], &[3])));
    assert_eq!(mobius_add(&x, &x, 1.0, &mut three), Err(shape("out", &[2], &[3])));
    assert_eq!(to_lorentz(&x, 1.0, &mut two), Err(shape("out", &[3], &[2])));
    assert_eq!(from_lorentz(&x, 1.0, &mut two), Err(shape("point", &[3], &[2])));
    let m = Array2::<f64>::zeros((2, 3));
    assert_eq!(mobius_mat_vec(m.view(), &x, 1.0, &mut two), Err(shape("m", &[2, 2], &[2, 3])));
    assert_eq!(
        midpoint(m.view(), &[1.0; 3], 1.0, &mut three),
        Err(shape("points", &[3, 3], &[2, 3]))
    );

    let curved = config("c", "a finite number above 0", "0");
    assert_eq!(to_lorentz(&x, 0.0, &mut three), Err(curved.clone()));
    assert_eq!(from_lorentz(&three.clone(), 0.0, &mut two), Err(curved));
    let off = Error::Domain { what: "point".into(), row: 0, norm: 3.0, limit: 3.0 };
    assert_eq!(from_lorentz(&[2.0, 0.0, 3.0], 1.0, &mut two), Err(off));

    let expected = "a number from 4 ε to below 1";
    for (margin, text) in [(0.0, "0"), (1.0, "1"), (-0.5, "-0.5"), (f64::NAN, "NaN")] {
        let refused = project(&x, 1.0, margin, &mut two);
        assert_eq!(refused, Err(config("margin", expected, text)));
    }
    let infinite =
        Error::Domain { what: "x".into(), row: 0, norm: f64::INFINITY, limit: f64::INFINITY };
    assert_eq!(project(&[f64::INFINITY, 0.0], 1.0, 0.1, &mut two), Err(infinite.clone()));
    assert_eq!(conformal_factor(&[f64::INFINITY, 0.0], 0.0), Err(infinite));

    let points = Array2::from_shape_vec((2, 2), [x, far].concat()).unwrap();
    let row = Error::Domain { what: "points".into(), row: 1, norm: 2.0, limit: 1.0 };
    assert_eq!(midpoint(points.view(), &[1.0, 0.0], 1.0, &mut two), Err(row));
    let expected = "finite numbers, at least 0 and not all 0";
    for (weights, text) in
        [([1.0, -0.5], "-0.5"), ([f64::INFINITY, 1.0], "inf"), ([0.0, 0.0], "no positive weight")]
    {
        let refused = midpoint(points.view(), &weights, 0.1, &mut two);
        assert_eq!(refused, Err(config("weights", expected, text)));
    }
}

/// Draws a point for which naive formulas break.
fn hard_point<F: Float>(
    rng: &mut Xoshiro256PlusPlus,
    n: usize,
    c: F,
    before: Option<&Vec<F>>,
) -> Vec<F> {
    let tiny = if F::epsilon().as_f64() < 1e-10 { 1e-300 } else { 1e-37 };
    let inside = |x: &[F]| conformal_factor(x, c).is_ok();
    let radius = 1.0 / c.as_f64().sqrt().max(1e-3);
    let scaled = |x: &[f64], by: f64| -> Vec<F> { x.iter().map(|x| F::from_f64(x * by)).collect() };
    let times = |x: &[F], by: f64| -> Vec<F> { x.iter().map(|&x| x * F::from_f64(by)).collect() };
    let direction = unit(rng, n);
    let chosen = match (rng.random_range(0..10), before) {
        (0, Some(x)) => x.clone(),
        (1, Some(x)) => times(x, -1.0),
        (2, Some(x)) => times(x, rng.random_range(-1.0..1.0)),
        (3, Some(x)) => {
            // Differs in the last place of one coordinate.
            let mut x = x.clone();
            x[0] *= F::one() + F::epsilon();
            x
        }
        (4, _) => scaled(&direction, tiny * rng.random_range(0.0..2.0)),
        (5, _) => vec![F::zero(); n],
        (6 | 7, _) => {
            // The last point of this direction inside the ball.
            let mut by = radius * (1.0 + 2.0 * F::epsilon().as_f64());
            while !inside(&scaled(&direction, by)) {
                by *= 1.0 - F::epsilon().as_f64() / 2.0;
            }
            scaled(&direction, by)
        }
        (8, _) => {
            let margin = 10.0_f64.powf(rng.random_range(-16.0..0.0));
            scaled(&direction, radius * (1.0 - margin))
        }
        _ => scaled(&direction, radius * rng.random_range(0.0..0.99)),
    };
    if inside(&chosen) { chosen } else { scaled(&direction, 0.5 * radius) }
}

/// Calls all functions at [`hard_point`]s: every value and gradient must be finite. Returns the number
/// of calls.
fn all_finite<F: Float>(seed: u64, rounds: usize) -> usize {
    let mut rng = rng(seed);
    let functions = functions::<F>();
    let (mut count, mut refused) = (0, 0);
    for round in 0..rounds {
        let n = [1, 2, 3, 7][round % 4];
        let c = F::from_f64([1.0, 0.1, 2.5, 1e-6, 0.0][round / 4 % 5]);
        for function in &functions {
            let name = function.name;
            let x = hard_point(&mut rng, n, c, None);
            let y = hard_point(&mut rng, n, c, Some(&x));
            let length = [1e-30, 0.1, 1.0, 30.0, 1e3, 1e10][round / 20 % 6];
            let alpha = 2.0 / conformal_factor(&x, c).unwrap().as_f64();
            let by = if rng.random() { length * alpha } else { length };
            let v: Vec<F> = if rng.random() {
                let size = float_norm(x.iter().copied()).max(1e-3);
                x.iter().map(|x| F::from_f64(-by / size * x.as_f64())).collect()
            } else {
                unit(&mut rng, n).iter().map(|v| F::from_f64(by * v)).collect()
            };
            let a = match name {
                "conformal_factor" | "log_map_origin" | "to_klein" | "from_klein" => vec![x],
                "exp_map_origin" | "project" => vec![v],
                "exp_map" => vec![x, v],
                "distance" | "mobius_add" | "log_map" => vec![x, y],
                "parallel_transport" | "gyration" => {
                    vec![x, y, unit(&mut rng, n).iter().map(|&v| F::from_f64(v)).collect()]
                }
                "geodesic" => {
                    let t = [0.0, 0.5, 1.0, rng.random(), -0.25, 3.0][rng.random_range(0..6)];
                    vec![x, y, vec![F::from_f64(t)]]
                }
                "mobius_scalar_mul" => {
                    vec![vec![F::from_f64(rng.random_range(-3.0..3.0) * length.min(1e3))], x]
                }
                "mobius_mat_vec" => {
                    let m = (0..2 * n).map(|_| F::from_f64(rng.random_range(-1.0..1.0))).collect();
                    vec![m, x]
                }
                "midpoint" => {
                    let z = hard_point(&mut rng, n, c, Some(&y));
                    let mut weights: Vec<F> =
                        (0..3).map(|_| F::from_f64(rng.random_range(0.01..2.0))).collect();
                    weights[round % 3] = F::from_f64([0.0, 1e-20, 1.0, 1e20][round / 3 % 4]);
                    vec![[x, y, z].concat(), weights]
                }
                _ if c == F::zero() => continue,
                "to_lorentz" => vec![x],
                "from_lorentz" => {
                    let mut point = vec![F::zero(); n + 1];
                    to_lorentz(&x, c, &mut point).unwrap();
                    vec![point]
                }
                other => panic!("{other}"),
            };
            count += 1;
            let out = match (function.forward)(&a, c) {
                // Within the last ulps a point of the hyperboloid is rounded off it.
                Err(Error::Domain { what, .. }) if what == "point" => {
                    refused += 1;
                    continue;
                }
                out => out.unwrap(),
            };
            let g: Vec<F> = out.iter().map(|_| F::from_f64(rng.random_range(-1.0..1.0))).collect();
            let grads = (function.vjp)(&a, c, &g).unwrap();
            let finite = out.iter().chain(grads.iter().flatten()).all(|x| x.is_finite());
            assert!(finite, "{name}, c = {c}: {a:?} makes {out:?}, {g:?} {grads:?}");
            let is_point = POINTS.contains(&name);
            assert!(!is_point || conformal_factor(&out, c).is_ok(), "{name}, c = {c}: {a:?}");
        }
    }
    assert!(refused * 20 < count);
    count
}

#[test]
fn nothing_overflows() {
    assert!(all_finite::<f64>(31, 700) + all_finite::<f32>(37, 700) > 20_000);
}

/// The same a hundred times as long:
///
/// ```sh
/// cargo test --release --test poincare_geometry -- --ignored
/// ```
#[test]
#[ignore = "a million cases: run in release"]
fn nothing_overflows_in_a_million_cases() {
    assert!(all_finite::<f64>(41, 40_000) + all_finite::<f32>(43, 40_000) > 1_000_000);
}
