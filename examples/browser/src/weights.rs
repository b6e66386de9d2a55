//! The weights of the mechanisms that are not trained.

use crate::graphs::Example;
use graph_attention::ndarray::Array2;
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Attention, Error, Flash, Graph, GraphRopeConfig, Inputs, LocalGlobal, PerformerConfig,
    PoincareConfig, Result, graph_rope::Layout, local_global::Window, poincare::Coordinates,
};
use std::f64::consts::PI;

pub(crate) struct Settings {
    /// Nodes attend to all nodes, not only to their neighbours.
    pub(crate) everyone: bool,
    pub(crate) temperature: f64,
    pub(crate) curvature: f64,
    pub(crate) radius: usize,
}

/// Returns the weights of all pairs, n × n.
pub(crate) fn weights(
    example: &Example,
    mechanism: &str,
    settings: &Settings,
) -> Result<Array2<f64>> {
    let n = example.classes.len();
    let everyone = Graph::from_edges(n, n, (0..n * n).map(|pair| (pair / n, pair % n)))?;
    let pattern = if settings.everyone { &everyone } else { &example.graph };

    // Nodes are similar if they have the same neighbours: scores are 4 times the cosine of two rows.
    let neighbours = Array2::from_shape_fn((n, n), |(u, v)| {
        f64::from(example.graph.neighbors(u).contains(&(v as u32)))
    });
    let mut x = neighbours.clone();
    for mut row in x.rows_mut() {
        row *= (4.0 * (n as f64).sqrt() / row.sum()).sqrt();
    }
    let queries = &x / settings.temperature;
    let alike = Inputs::graph(queries.view(), x.view(), x.view(), pattern)?;

    match mechanism {
        "softmax" => of(&Flash::new(), &alike),
        "window" => {
            of(&LocalGlobal::sliding_window(Window::new(settings.radius), Flash::new())?, &alike)
        }
        "performer" => {
            let rng = &mut Xoshiro256PlusPlus::seed_from_u64(1);
            of(&PerformerConfig::new(n, 512).init(rng)?, &alike)
        }
        "poincare" => {
            // The mean of the neighbours: close to the origin if there are many.
            let means = Array2::from_shape_fn((n, n), |(u, v)| {
                3.0 * neighbours[[u, v]] / neighbours.row(u).sum()
            });
            let poincare = PoincareConfig::new().coordinates(Coordinates::Tangent);
            let poincare = poincare.curvature(settings.curvature).temperature(settings.temperature);
            of(
                &poincare.init()?,
                &Inputs::graph(means.view(), means.view(), means.view(), pattern)?,
            )
        }
        "hops" => {
            // All nodes are the same but for the hops between them: 5, the maximum, turn by π.
            let same = Array2::from_elem((n, 4), 2.0);
            let queries = &same / settings.temperature;
            let hops = example.graph.hop_distances(pattern, 5, 5.0)? * (PI / 5.0);
            let inputs = Inputs::graph(queries.view(), same.view(), same.view(), pattern)?;
            let rope = GraphRopeConfig::new(4, Layout::Half).base(1.0).init_edges()?;
            of(&rope, &inputs.with_distances(hops.view())?)
        }
        _ => Err(Error::InvalidArgument {
            argument: "mechanism",
            expected: "softmax, window, performer, poincare or hops".into(),
            actual: mechanism.into(),
        }),
    }
}

/// Returns the weights of a mechanism as a matrix, the mean over heads.
pub(crate) fn of(attention: &dyn Attention<f64>, inputs: &Inputs<'_, f64>) -> Result<Array2<f64>> {
    let of_pairs = attention.attention_weights(inputs)?;
    let mut weights = Array2::zeros((inputs.num_queries(), inputs.num_keys()));
    for pair in (0..inputs.num_queries()).flat_map(|query| inputs.row(query)) {
        let row = of_pairs.row(pair.index);
        weights[[pair.query, pair.key]] += row.sum() / row.len() as f64;
    }
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graphs::NAMES;

    #[test]
    fn rows_of_weights_sum_to_one_and_settings_change_them() -> Result<()> {
        for (name, everyone) in NAMES.into_iter().flat_map(|name| [(name, true), (name, false)]) {
            let example = Example::new(name)?;
            for mechanism in ["softmax", "window", "performer", "poincare", "hops"] {
                let with = |temperature, curvature, radius| {
                    let settings = Settings { everyone, temperature, curvature, radius };
                    weights(&example, mechanism, &settings)
                };
                let usual = with(1.0, 1.0, 4)?;
                for row in usual.rows() {
                    assert!((row.sum() - 1.0).abs() < 1e-9, "{mechanism} on {name}: {}", row.sum());
                }
                assert_ne!(usual, with(0.3, 1.0, 4)?, "the temperature of {mechanism} on {name}");
                let curved = usual != with(1.0, 2.0, 4)?;
                assert_eq!(curved, mechanism == "poincare", "the curvature of {mechanism}");
                let wider = usual != with(1.0, 1.0, 9)?;
                assert_eq!(wider, mechanism == "window" && (everyone || wider), "the radius");
            }
        }
        Ok(())
    }
}
