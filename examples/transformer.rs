//! A transformer over a graph: a linear map, a stack of layers, and a linear head infer the sides of a karate
//! club from two labelled members. Training stops halfway, is saved with the state of its optimiser, and resumes
//! with the same bits.
//!
//! ```sh
//! cargo run --release -p examples --features safetensors --example transformer
//! ```

use graph_attention::ndarray::{Array2, ArrayD, ArrayViewD, ArrayViewMutD, Zip};
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Attention, Dropout, Flash, Graph, Inputs, Linear, LinearConfig, MultiHead, MultiHeadConfig,
    Params, Result, Stack, StackConfig, TransformerLayer, TransformerLayerConfig, params,
    params::prefixed,
    rowwise::{Activation, NormConfig, Normalization},
    safetensors,
};

fn main() -> Result<()> {
    let edges = include_str!("data/karate_club/edges.csv").lines().skip(1).flat_map(|line| {
        let (u, v) = line.split_once(',').expect("two members");
        let [u, v] = [u, v].map(|member| member.parse().expect("a number"));
        [(u, v), (v, u)]
    });
    let graph = Graph::from_edges(34, 34, edges)?.with_self_loops()?;
    let members = Array2::eye(34); // each member has its own column

    let mut training = Training::new(1)?;
    training.run(&members, &graph, 60)?;
    // Halfway: one file for parameters, moments and step.
    let halfway = safetensors::to_bytes(&training)?; // or `save`, to a file
    training.run(&members, &graph, 60)?;

    let mut resumed = Training::new(2)?;
    safetensors::from_bytes(&mut resumed, &halfway)?;
    resumed.run(&members, &graph, 60)?;
    assert_eq!(params::state(&resumed), params::state(&training), "as if it had never stopped");

    let (_, out) = training.model.forward(&members, &graph, None)?;
    let right = |(&out, side): (&f32, u8)| (out > 0.0) == (side == b'h');
    let right = out.iter().zip(SIDES.bytes()).filter(|&member| right(member)).count();
    println!("{right} of 34 sides right");
    assert!(right >= 30, "friends take sides together");
    Ok(())
}

/// Two layers with 2 heads of 8 columns, between two linear maps.
struct Model {
    project: Linear<f32>,
    encoder: Stack<f32, TransformerLayer<f32, MultiHead<f32, Flash>>>,
    head: Linear<f32>,
}

/// What the backward pass needs of a forward pass: the output of `project`, that of `encoder`, and its state.
type Forward = (Array2<f32>, Array2<f32>, graph_attention::Saved);

impl Model {
    fn new(rng: &mut Xoshiro256PlusPlus) -> Result<Self> {
        let layers = (0..2).map(|_| {
            let heads = MultiHeadConfig::new(16, 2).init(Flash::new(), rng)?;
            let config = TransformerLayerConfig::new(16, 32).activation(Activation::Gelu);
            config.norm_first(true).init(heads, rng)
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = NormConfig::new(Normalization::Layer, 16);
        Ok(Self {
            encoder: StackConfig::new().norm(norm).checkpointing(true).init(layers)?,
            project: LinearConfig::new(34, 16).init(rng)?,
            head: LinearConfig::new(16, 1).init(rng)?,
        })
    }

    fn forward(
        &self,
        members: &Array2<f32>,
        graph: &Graph,
        dropout: Option<Dropout>,
    ) -> Result<(Forward, Array2<f32>)> {
        let x = self.project.forward(members.view())?;
        let (encoded, saved) = self.encoder.forward_train(&inputs(&x, graph, dropout)?)?;
        let out = self.head.forward(encoded.view())?;
        Ok(((x, encoded, saved), out))
    }

    /// Returns the gradients of the parameters, in their order.
    fn backward(
        &self,
        members: &Array2<f32>,
        graph: &Graph,
        dropout: Option<Dropout>,
        (x, encoded, saved): &Forward,
        grad_out: &Array2<f32>,
    ) -> Result<Vec<ArrayD<f32>>> {
        let head = self.head.backward(encoded.view(), grad_out.view())?;
        let encoder = self.encoder.backward(&inputs(x, graph, dropout)?, saved, head.x.view())?;
        let project = self.project.backward(members.view(), encoder.self_attention()?.view())?;
        Ok([project.params, encoder.params, head.params].concat())
    }
}

fn inputs<'a>(
    x: &'a Array2<f32>,
    graph: &'a Graph,
    dropout: Option<Dropout>,
) -> Result<Inputs<'a, f32>> {
    let inputs = Inputs::self_attention(x.view(), graph)?;
    dropout.map_or(Ok(inputs), |dropout| inputs.with_dropout(dropout))
}

impl Params<f32> for Model {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.project.visit_params(&mut prefixed("project", visitor));
        self.encoder.visit_params(&mut prefixed("encoder", visitor));
        self.head.visit_params(&mut prefixed("head", visitor));
    }
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.project.visit_params_mut(&mut prefixed("project", visitor));
        self.encoder.visit_params_mut(&mut prefixed("encoder", visitor));
        self.head.visit_params_mut(&mut prefixed("head", visitor));
    }
}

/// A model with its optimiser, Adam (Kingma & Ba 2014, 1412.6980).
struct Training {
    model: Model,
    step: ArrayD<f32>,
    /// The running means of each parameter's gradient and of its square.
    moments: Vec<[ArrayD<f32>; 2]>,
}

impl Training {
    fn new(seed: u64) -> Result<Self> {
        let model = Model::new(&mut Xoshiro256PlusPlus::seed_from_u64(seed))?;
        let moments = params::zeros(&model).into_iter().map(|zeros| [zeros.clone(), zeros]);
        Ok(Self { moments: moments.collect(), model, step: ArrayD::zeros(vec![]) })
    }

    fn run(&mut self, members: &Array2<f32>, graph: &Graph, steps: usize) -> Result<()> {
        for _ in 0..steps {
            let step = self.step[[]] as u64;
            let dropout = Some(Dropout { probability: 0.1, seed: step });
            let (forward, out) = self.model.forward(members, graph, dropout)?;
            // The logistic loss ln(1 + exp(−sign · output)) of the two who quarrelled, and its gradient.
            let (mut loss, mut grad_out) = (0.0, Array2::zeros(out.raw_dim()));
            for (member, sign) in [(0, 1.0), (33, -1.0)] {
                let wrong = (-sign * out[[member, 0]]).exp();
                loss += wrong.ln_1p();
                grad_out[[member, 0]] = -sign * wrong / (1.0 + wrong);
            }
            if step.is_multiple_of(30) {
                println!("step {step:3}: loss {loss:.4}");
            }
            let grads = self.model.backward(members, graph, dropout, &forward, &grad_out)?;
            self.adam(&grads)?;
        }
        Ok(())
    }

    fn adam(&mut self, grads: &[ArrayD<f32>]) -> Result<()> {
        self.step += 1.0;
        let [mean_factor, square_factor] =
            [0.9f32, 0.999].map(|beta| 1.0 - beta.powf(self.step[[]]));
        let mut moments = self.moments.iter_mut();
        params::update(&mut self.model, grads, |_name, param, grad| {
            let Some([mean, square]) = moments.next() else { return };
            Zip::from(param).and(mean).and(square).and(grad).for_each(
                |param, mean, square, &grad| {
                    *mean += 0.1 * (grad - *mean);
                    *square += 0.001 * (grad * grad - *square);
                    *param -=
                        0.003 * (*mean / mean_factor) / ((*square / square_factor).sqrt() + 1e-8);
                },
            );
        })
    }
}

/// The moments are buffers, which are saved and loaded with the parameters.
impl Params<f32> for Training {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.model.visit_params(visitor);
    }
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.model.visit_params_mut(visitor);
    }
    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        visitor("adam.step", self.step.view());
        for (number, [mean, square]) in self.moments.iter().enumerate() {
            visitor(&format!("adam.mean.{number}"), mean.view());
            visitor(&format!("adam.square.{number}"), square.view());
        }
    }
    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        visitor("adam.step", self.step.view_mut());
        for (number, [mean, square]) in self.moments.iter_mut().enumerate() {
            visitor(&format!("adam.mean.{number}"), mean.view_mut());
            visitor(&format!("adam.square.{number}"), square.view_mut());
        }
    }
}

/// The side that each member took: Mr Hi's (member 0) or the officer's (member 33).
const SIDES: &str = "hhhhhhhhhohhhhoohhohohoooooooooooo";
