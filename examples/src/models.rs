use graph_attention::ndarray::{Array2, ArrayD, ArrayView2, ArrayViewD, ArrayViewMutD};
use graph_attention::rand::Rng;
use graph_attention::rowwise::Activation;
use graph_attention::{
    Attention, Dropout, EdgeGat, EdgeGatConfig, Inputs, Linear, LinearConfig, Params, Result,
    Saved, edge_gat::Score, params::prefixed,
};

/// A mechanism for self-attention between two linear maps: `project` from the columns of the data, and `head` to
/// those of the answer.
pub struct Between<A> {
    pub project: Linear<f32>,
    pub body: A,
    pub head: Linear<f32>,
}

/// What the backward pass of [`Between`] needs of a forward pass: the inputs of `body` and `head`, and a state.
pub type Passed = (Array2<f32>, Array2<f32>, Saved);

impl<A: Attention<f32>> Between<A> {
    /// Puts a mechanism that maps rows of `columns[1]` columns to rows of as many between two linear maps, from
    /// `columns[0]` and to `columns[2]`.
    pub fn new(columns: [usize; 3], body: A, rng: &mut impl Rng) -> Result<Self> {
        let project = LinearConfig::new(columns[0], columns[1]).init(rng)?;
        Ok(Self { project, body, head: LinearConfig::new(columns[1], columns[2]).init(rng)? })
    }

    pub fn forward(&self, inputs: &Inputs<'_, f32>) -> Result<Array2<f32>> {
        let x = self.project.forward(inputs.query())?;
        let body = self.body.forward(&with_rows(inputs, &x)?)?;
        self.head.forward(body.view())
    }

    pub fn forward_train(&self, inputs: &Inputs<'_, f32>) -> Result<(Array2<f32>, Passed)> {
        let x = self.project.forward(inputs.query())?;
        let (body, saved) = self.body.forward_train(&with_rows(inputs, &x)?)?;
        Ok((self.head.forward(body.view())?, (x, body, saved)))
    }

    /// Returns the gradients of the parameters.
    pub fn backward(
        &self,
        inputs: &Inputs<'_, f32>,
        (x, body, saved): &Passed,
        grad_out: ArrayView2<'_, f32>,
    ) -> Result<Vec<ArrayD<f32>>> {
        let head = self.head.backward(body.view(), grad_out)?;
        let body = self.body.backward(&with_rows(inputs, x)?, saved, head.x.view())?;
        let project = self.project.backward(inputs.query(), body.self_attention()?.view())?;
        Ok([project.params, body.params, head.params].concat())
    }
}

/// Returns the same pairs over other rows.
fn with_rows<'a>(inputs: &Inputs<'a, f32>, x: &'a Array2<f32>) -> Result<Inputs<'a, f32>> {
    inputs.with_arrays(x.view(), x.view(), x.view())
}

impl<A: Params<f32>> Params<f32> for Between<A> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.project.visit_params(&mut prefixed("project", visitor));
        self.body.visit_params(&mut prefixed("body", visitor));
        self.head.visit_params(&mut prefixed("head", visitor));
    }
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.project.visit_params_mut(&mut prefixed("project", visitor));
        self.body.visit_params_mut(&mut prefixed("body", visitor));
        self.head.visit_params_mut(&mut prefixed("head", visitor));
    }
    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.body.visit_buffers(&mut prefixed("body", visitor));
    }
    fn visit_buffers_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.body.visit_buffers_mut(&mut prefixed("body", visitor));
    }
}

/// Two graph attention layers with an ELU between them (Veličković et al. 2018, 1710.10903), named as in PyG.
/// Dropout of the inputs also drops entries of the rows that each layer gets.
#[derive(Clone)]
pub struct Gat {
    pub conv1: EdgeGat<f32>,
    pub conv2: EdgeGat<f32>,
}

/// What the backward pass of [`Gat`] needs of a forward pass.
pub struct GatPassed {
    /// The rows that each layer got.
    rows: [Array2<f32>; 2],
    saved: [Saved; 2],
    /// The output of the first layer, before the ELU.
    hidden: Array2<f32>,
}

impl Gat {
    /// Creates the network of the paper: 8 heads of 8 columns, then one head with a column for each class.
    pub fn new(columns: usize, classes: usize, rng: &mut impl Rng) -> Result<Self> {
        let conv1 = EdgeGatConfig::new(Score::Gat, columns, 8, 8).init(rng)?;
        let conv2 = EdgeGatConfig::new(Score::Gat, 8 * 8, classes, 1).average_heads(true);
        Ok(Self { conv1, conv2: conv2.init(rng)? })
    }

    pub fn forward(&self, inputs: &Inputs<'_, f32>) -> Result<Array2<f32>> {
        let hidden = self.conv1.forward(inputs)?.mapv(|x| Activation::Elu.value(x));
        self.conv2.forward(&with_rows(inputs, &hidden)?)
    }

    pub fn forward_train(&self, inputs: &Inputs<'_, f32>) -> Result<(Array2<f32>, GatPassed)> {
        let x = rows_of_layer(inputs.query(), inputs, 0);
        let (hidden, first) = self.conv1.forward_train(&of_layer(inputs, &x, 0)?)?;
        let h = rows_of_layer(hidden.mapv(|x| Activation::Elu.value(x)).view(), inputs, 1);
        let (out, second) = self.conv2.forward_train(&of_layer(inputs, &h, 1)?)?;
        Ok((out, GatPassed { rows: [x, h], saved: [first, second], hidden }))
    }

    /// Returns the gradients of the parameters.
    pub fn backward(
        &self,
        inputs: &Inputs<'_, f32>,
        GatPassed { rows: [x, h], saved: [first, second], hidden }: &GatPassed,
        grad_out: ArrayView2<'_, f32>,
    ) -> Result<Vec<ArrayD<f32>>> {
        let of_second = self.conv2.backward(&of_layer(inputs, h, 1)?, second, grad_out)?;
        // The backward pass of dropout drops the same entries.
        let mut grad = rows_of_layer(of_second.self_attention()?.view(), inputs, 1);
        grad.zip_mut_with(hidden, |grad, &x| *grad *= Activation::Elu.slope(x));
        let inputs = of_layer(inputs, x, 0)?;
        let of_first = self.conv1.backward_params(&inputs, first, grad.view())?;
        Ok([of_first, of_second.params].concat())
    }
}

impl Params<f32> for Gat {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.conv1.visit_params(&mut prefixed("conv1", visitor));
        self.conv2.visit_params(&mut prefixed("conv2", visitor));
    }
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.conv1.visit_params_mut(&mut prefixed("conv1", visitor));
        self.conv2.visit_params_mut(&mut prefixed("conv2", visitor));
    }
}

/// Returns the inputs of a layer over its rows, with its own dropout.
fn of_layer<'a>(
    inputs: &Inputs<'a, f32>,
    x: &'a Array2<f32>,
    layer: usize,
) -> Result<Inputs<'a, f32>> {
    let dropout = inputs.dropout().map(|dropout| dropout.of_layer(layer));
    with_dropout(with_rows(inputs, x)?, dropout)
}

/// Returns the rows that a layer gets, of which the dropout of the inputs drops entries.
fn rows_of_layer(x: ArrayView2<'_, f32>, inputs: &Inputs<'_, f32>, layer: usize) -> Array2<f32> {
    dropped(x, inputs.dropout().map(|dropout| dropout.of_layer(2 + layer)))
}

/// Sets the dropout of attention weights, if there is one.
pub fn with_dropout<'a>(
    inputs: Inputs<'a, f32>,
    dropout: Option<Dropout>,
) -> Result<Inputs<'a, f32>> {
    dropout.map_or(Ok(inputs), |dropout| inputs.with_dropout(dropout))
}

/// Dropout of the entries of an array, with the hash that the crate uses for attention weights: give it another
/// seed. Its backward pass is itself.
pub fn dropped(x: ArrayView2<'_, f32>, dropout: Option<Dropout>) -> Array2<f32> {
    let Some(dropout) = dropout else { return x.to_owned() };
    Array2::from_shape_fn(x.raw_dim(), |(row, column)| match x[[row, column]] {
        0.0 => 0.0, // most words of a text; the hash would take longer than the rest
        x => x * dropout.multiplier::<f32>(row, column),
    })
}
