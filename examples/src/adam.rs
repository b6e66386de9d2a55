use graph_attention::ndarray::{ArrayD, ArrayViewD, ArrayViewMutD, Zip};
use graph_attention::{Params, Result, params};

/// The optimiser Adam (Kingma & Ba 2014, 1412.6980).
///
/// Its state is a set of buffers, so a struct that visits the parameters of a model and the buffers of its
/// optimiser can be saved and resumed: see the example `transformer`.
pub struct Adam {
    /// The learning rate.
    pub rate: f32,
    /// λ: λ times the parameter is added to its gradient, as in PyTorch's `optim.Adam`.
    pub weight_decay: f32,
    step: ArrayD<f32>,
    /// The running means of each parameter's gradient and of its square.
    moments: Vec<[ArrayD<f32>; 2]>,
}

impl Adam {
    pub fn new(rate: f32, model: &impl Params<f32>) -> Self {
        let moments = params::zeros(model).into_iter().map(|zeros| [zeros.clone(), zeros]);
        Self { rate, weight_decay: 0.0, step: ArrayD::zeros(vec![]), moments: moments.collect() }
    }

    /// Sets the weight decay. Default: 0.
    pub fn weight_decay(mut self, weight_decay: f32) -> Self {
        self.weight_decay = weight_decay;
        self
    }

    /// Returns the number of steps so far.
    pub fn steps(&self) -> u64 {
        self.step[[]] as u64
    }

    /// Moves the parameters of the model, in the order of their gradients.
    pub fn step(&mut self, model: &mut impl Params<f32>, grads: &[ArrayD<f32>]) -> Result<()> {
        self.step += 1.0;
        let unbiased = [0.9f64, 0.999].map(|beta| 1.0 - beta.powf(f64::from(self.step[[]])));
        // The means are unbiased in the step size, so ε is the ε̂ of the paper's section 2, as in TensorFlow.
        let rate = self.rate * (unbiased[1].sqrt() / unbiased[0]) as f32;
        let Self { weight_decay, moments, .. } = self;
        let mut moments = moments.iter_mut();
        params::update(model, grads, |_name, param, grad| {
            let Some([mean, square]) = moments.next() else { return };
            Zip::from(param).and(mean).and(square).and(grad).for_each(
                |param, mean, square, &grad| {
                    let grad = grad + *weight_decay * *param;
                    *mean += 0.1 * (grad - *mean);
                    *square += 0.001 * (grad * grad - *square);
                    *param -= rate * *mean / (square.sqrt() + 1e-8);
                },
            );
        })
    }
}

impl Params<f32> for Adam {
    fn visit_params<'a>(&'a self, _: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {}
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {}
    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        visitor("step", self.step.view());
        for (number, [mean, square]) in self.moments.iter().enumerate() {
            visitor(&format!("mean.{number}"), mean.view());
            visitor(&format!("square.{number}"), square.view());
        }
    }
    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        visitor("step", self.step.view_mut());
        for (number, [mean, square]) in self.moments.iter_mut().enumerate() {
            visitor(&format!("mean.{number}"), mean.view_mut());
            visitor(&format!("square.{number}"), square.view_mut());
        }
    }
}
