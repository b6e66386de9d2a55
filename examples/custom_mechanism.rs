//! Writing your own mechanism: the mean of the neighbours. It can be used as an expert, an inner
//! mechanism or a bench entry like any other, and the crate's checks find its mistakes.
//!
//! ```sh
//! cargo run --release -p examples --example custom_mechanism
//! ```
//!
//! Half of the lines are the signatures of the trait.

use graph_attention::ndarray::{Array2, ArrayView2, ArrayViewD, ArrayViewMut2, ArrayViewMutD};
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::testing::{Shapes, check_attention, check_gradients};
use graph_attention::{Attention, Channel, GradientsMut, Inputs, MultiHeadConfig};
use graph_attention::{Params, Result, Saved, check_output};

/// oᵢ = Σⱼ vⱼ / |N(i)|
#[derive(Debug)]
struct Mean;

const NAME: &str = "mean";

impl Params<f64> for Mean {
    fn visit_params<'a>(&'a self, _: &mut dyn FnMut(&str, ArrayViewD<'a, f64>)) {}
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, f64>)) {}
}

impl Attention<f64> for Mean {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_dim(&self, inputs: &Inputs<'_, f64>) -> usize {
        inputs.value().ncols()
    }

    fn forward_into(
        &self,
        inputs: &Inputs<'_, f64>,
        mut out: ArrayViewMut2<'_, f64>,
    ) -> Result<()> {
        // Refuse, instead of ignoring, inputs that would change the output and are not supported.
        let unsupported = [Channel::Bias, Channel::Dropout, Channel::PairWeights, Channel::Heads];
        inputs.check_absent(NAME, &unsupported)?;
        check_output(self, "out", inputs, out.shape())?;
        out.fill(0.0);
        for query in 0..inputs.num_queries() {
            let share = 1.0 / inputs.row(query).count() as f64;
            for pair in inputs.row(query) {
                out.row_mut(query).scaled_add(share, &inputs.value().row(pair.key));
            }
        }
        Ok(())
    }

    fn forward_train_into(
        &self,
        inputs: &Inputs<'_, f64>,
        out: ArrayViewMut2<'_, f64>,
    ) -> Result<Saved> {
        self.forward_into(inputs, out)?;
        Ok(Saved::new(NAME, ()))
    }

    fn backward_into(
        &self,
        inputs: &Inputs<'_, f64>,
        saved: &Saved,
        grad_out: ArrayView2<'_, f64>,
        mut grads: GradientsMut<'_, f64>,
    ) -> Result<()> {
        saved.state::<()>(NAME)?;
        check_output(self, "grad_out", inputs, grad_out.shape())?;
        grads.check(NAME, inputs, self)?;
        for query in 0..inputs.num_queries() {
            let share = 1.0 / inputs.row(query).count() as f64;
            for pair in inputs.row(query) {
                if let Some(grad) = &mut grads.value {
                    grad.row_mut(pair.key).scaled_add(share, &grad_out.row(query));
                }
            }
        }
        Ok(())
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let shapes = Shapes::new(3, 2, 5);
    let report = check_attention(&Mean, &shapes)?;
    println!("the contract holds in {} cases; refused: {:?}", report.checked.len(), report.refused);
    check_gradients(&mut Mean, &shapes)?;
    println!("the gradients match finite differences");
    let words = ["bias", "dropout", "weights of pairs"];
    assert!(report.refused.iter().all(|case| words.iter().any(|&word| case.contains(word))));

    // Inside learned projections. All nodes see the same neighbours here, so their outputs are the same.
    let layer = MultiHeadConfig::new(4, 1).init(Mean, &mut Xoshiro256PlusPlus::seed_from_u64(5))?;
    let nodes = Array2::<f64>::eye(4);
    let out = layer.forward(&Inputs::dense(nodes.view(), nodes.view(), nodes.view())?)?;
    println!("{} around {}: each outputs {:.3}", layer.name(), layer.inner().name(), out.row(0));
    assert!(out.rows().into_iter().all(|row| (&row - &out.row(0)).mapv(f64::abs).sum() < 1e-12));
    Ok(())
}
