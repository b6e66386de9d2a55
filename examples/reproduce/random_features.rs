//! The error of linear attention's random features (Choromanski et al. 2021, 2009.14794): for independent
//! projections their Lemma 2 has it in closed form.

use graph_attention::PerformerConfig;
use graph_attention::ndarray::Array2;
use graph_attention::performer::Projection;
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, StandardNormal};
use std::error::Error;

const COLUMNS: usize = 16;

/// Returns the mean squared error of estimated weights, divided by the variance of Lemma 2; over pairs of a query
/// and a key and over projections.
pub fn run(seed: u64) -> Result<f64, Box<dyn Error>> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut normal = || -> f64 { StandardNormal.sample(&mut rng) };
    let [query, key] =
        [(); 2].map(|()| Array2::from_shape_simple_fn((50, COLUMNS), || 0.5 * normal()));
    let exact = (query.dot(&key.t()) / (COLUMNS as f64).sqrt()).exp();
    let config = PerformerConfig::new(COLUMNS, 256).projection(Projection::Iid);
    let mut performer = config.init(&mut rng)?;
    let variance = Array2::from_shape_fn((50, 50), |(i, j)| {
        performer.relative_variance(query.row(i), key.row(j)).unwrap_or(f64::NAN)
    });
    let (mut errors, draws) = (0.0, 400);
    for _ in 0..draws {
        performer.redraw(&mut rng)?;
        let [q, k] = [&query, &key].map(|x| performer.feature_map(x.view()));
        let error = q?.dot(&k?.t()) / &exact - 1.0;
        errors += (error.pow2() / &variance).mean().ok_or("no pairs")? / f64::from(draws);
    }
    Ok(errors)
}
