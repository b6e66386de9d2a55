//! A transformer over a graph: a linear map, a stack of layers, and a linear head infer the sides of a karate
//! club from two labelled members. Training stops halfway, is saved with the state of its optimiser, and resumes
//! with the same bits.
//!
//! ```sh
//! cargo run --release -p examples --features safetensors --example transformer
//! ```

use examples::{Adam, Between, data::Nodes, metrics};
use graph_attention::ndarray::{ArrayViewD, ArrayViewMutD};
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Dropout, Flash, Inputs, MultiHead, MultiHeadConfig, Params, Result, Stack, StackConfig,
    TransformerLayer, TransformerLayerConfig, params,
    params::prefixed,
    rowwise::{Activation, NormConfig, Normalization},
    safetensors,
};

fn main() -> Result<()> {
    let club = Nodes::karate_club();
    let graph = club.graph.with_self_loops()?;
    let inputs = Inputs::self_attention(club.features.view(), &graph)?;
    let known = club.split("train"); // the two members who quarrelled

    let mut training = Training::new(1)?;
    training.run(&inputs, &known, 60)?;
    // Halfway: one file for parameters, moments and step.
    let halfway = safetensors::to_bytes(&training)?; // or `save`, to a file
    training.run(&inputs, &known, 60)?;

    let mut resumed = Training::new(2)?;
    safetensors::from_bytes(&mut resumed, &halfway)?;
    resumed.run(&inputs, &known, 60)?;
    assert_eq!(params::state(&resumed), params::state(&training), "as if it had never stopped");

    let right = metrics::accuracy(&training.model.forward(&inputs)?, &club.labelled());
    println!("{:.0} of 34 sides right", 34.0 * right);
    assert!(right > 0.85, "friends take sides together");
    Ok(())
}

type Layer = TransformerLayer<f32, MultiHead<f32, Flash>>;

/// A model with its optimiser.
struct Training {
    model: Between<Stack<f32, Layer>>,
    adam: Adam,
}

impl Training {
    /// Two layers with 2 heads of 8 columns, between two linear maps.
    fn new(seed: u64) -> Result<Self> {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let layers = (0..2).map(|_| {
            let heads = MultiHeadConfig::new(16, 2).init(Flash::new(), &mut rng)?;
            let config = TransformerLayerConfig::new(16, 32).activation(Activation::Gelu);
            config.norm_first(true).init(heads, &mut rng)
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = NormConfig::new(Normalization::Layer, 16);
        let encoder = StackConfig::new().norm(norm).checkpointing(true).init(layers)?;
        let model = Between::new([34, 16, 2], encoder, &mut rng)?;
        Ok(Self { adam: Adam::new(0.003, &model), model })
    }

    fn run(
        &mut self,
        inputs: &Inputs<'_, f32>,
        known: &[(usize, usize)],
        steps: u64,
    ) -> Result<()> {
        for _ in 0..steps {
            let step = self.adam.steps();
            let dropped = inputs.with_dropout(Dropout { probability: 0.1, seed: step })?;
            let (out, passed) = self.model.forward_train(&dropped)?;
            let (loss, grad) = metrics::cross_entropy(&out, known);
            if step.is_multiple_of(30) {
                println!("step {step:3}: loss {loss:.4}");
            }
            let grads = self.model.backward(&dropped, &passed, grad.view())?;
            self.adam.step(&mut self.model, &grads)?;
        }
        Ok(())
    }
}

/// The state of the optimiser is a set of buffers, which are saved and loaded with the parameters.
impl Params<f32> for Training {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.model.visit_params(visitor);
    }
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.model.visit_params_mut(visitor);
    }
    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.adam.visit_buffers(&mut prefixed("adam", visitor));
    }
    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.adam.visit_buffers_mut(&mut prefixed("adam", visitor));
    }
}
