//! Tests of what is special to `MultiHead`: initial parameters, inner names, and inner gradients.

use graph_attention::ndarray::{Array2, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD};
use graph_attention::{
    Attention, Flash, GradientsMut, Inputs, MultiHeadConfig, Params, Result, Saved, params,
};
use rand::{SeedableRng, rngs::Xoshiro256PlusPlus};

#[test]
fn fresh_parameters_fill_their_range() -> Result<()> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(4);
    let packed = MultiHeadConfig::new(24, 2).init::<f64, _>(Flash::new(), &mut rng)?;
    let separate = MultiHeadConfig::new(24, 2).key_dim(6).output_dim(30);
    let separate = separate.init::<f64, _>(Flash::new(), &mut rng)?;
    // Glorot: √(6 / (rows + columns)) of PyTorch's array; output weights: 1/√inputs.
    let glorot = |rows: f64, columns: f64| (6.0 / (rows + columns)).sqrt();
    for (name, value) in params::state(&packed).into_iter().chain(params::state(&separate)) {
        let bound = match (name.as_str(), value.shape()[0]) {
            ("in_proj_weight", _) => glorot(72.0, 24.0),
            ("q_proj_weight" | "v_proj_weight", _) => glorot(24.0, 24.0),
            ("k_proj_weight", _) => glorot(24.0, 6.0),
            ("out_proj.weight", _) => 1.0 / 24f64.sqrt(),
            _ => 0.0,
        };
        let largest = value.iter().copied().fold(f64::MIN, f64::max);
        let smallest = value.iter().copied().fold(f64::MAX, f64::min);
        assert!(value.iter().all(|x| x.abs() <= bound), "{name}");
        // Some of the 144 or more draws come near either end.
        assert!(largest >= 0.9 * bound && smallest <= -0.9 * bound, "{name}");
    }
    Ok(())
}

#[test]
fn parameters_inside_are_named_and_updated() -> Result<()> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(5);
    let inner = MultiHeadConfig::new(4, 1).bias(false).init(Flash::new(), &mut rng)?;
    let mut outer = MultiHeadConfig::new(4, 1).init(inner, &mut rng)?;
    let names: Vec<_> = params::state(&outer).into_iter().map(|(name, _)| name).collect();
    let own = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"];
    let inside = ["inner.in_proj_weight", "inner.out_proj.weight"];
    assert_eq!(names, [&own[..], &inside].concat());

    let x = Array2::from_shape_fn((3, 4), |(i, j)| (i * 4 + j) as f64 / 10.0);
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?;
    let (out, saved) = outer.forward_train(&inputs)?;
    let grads = outer.backward(&inputs, &saved, out.view())?;
    params::update(&mut outer, &grads.params, |_, mut param, grad| {
        param.scaled_add(-0.01, &grad);
    })?;
    let loss = |out: &Array2<f64>| out.mapv(|y| y * y).sum();
    assert!(loss(&outer.forward(&inputs)?) < loss(&out));
    Ok(())
}

/// A mechanism that outputs zeros, with the gradient 1 for every edge feature and distance.
#[derive(Debug)]
struct ReadsEdges;

impl Params<f64> for ReadsEdges {
    fn visit_params<'a>(&'a self, _: &mut dyn FnMut(&str, ArrayViewD<'a, f64>)) {}
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, f64>)) {}
}

impl Attention<f64> for ReadsEdges {
    fn name(&self) -> &'static str {
        "reads_edges"
    }
    fn output_dim(&self, inputs: &Inputs<'_, f64>) -> usize {
        inputs.value().ncols()
    }
    fn forward_into(&self, _: &Inputs<'_, f64>, mut out: ArrayViewMut2<'_, f64>) -> Result<()> {
        out.fill(0.0);
        Ok(())
    }
    fn forward_train_into(
        &self,
        x: &Inputs<'_, f64>,
        out: ArrayViewMut2<'_, f64>,
    ) -> Result<Saved> {
        self.forward_into(x, out)?;
        Ok(Saved::new("reads_edges", ()))
    }
    fn backward_into(
        &self,
        _: &Inputs<'_, f64>,
        _: &Saved,
        _: ArrayView2<'_, f64>,
        mut grads: GradientsMut<'_, f64>,
    ) -> Result<()> {
        grads.edge_features.iter_mut().for_each(|grad| *grad += 1.0);
        grads.distances.iter_mut().for_each(|grad| *grad += 1.0);
        Ok(())
    }
}

#[test]
fn gradients_of_the_pairs_come_through() -> Result<()> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(6);
    let layer = MultiHeadConfig::new(4, 2).init(ReadsEdges, &mut rng)?;
    let (x, features) = (Array2::ones((2, 4)), Array2::ones((4, 3)));
    let inputs = Inputs::dense(x.view(), x.view(), x.view())?
        .with_edge_features(features.view())?
        .with_distances(features.column(0))?;
    let (out, saved) = layer.forward_train(&inputs)?;
    let grads = layer.backward(&inputs, &saved, out.view())?;
    assert_eq!(grads.edge_features.map(|grad| grad.sum()), Some(12.0));
    assert_eq!(grads.distances.map(|grad| grad.sum()), Some(4.0));
    Ok(())
}
