//! Attention in a page: who attends to whom on small graphs, and a graph attention network that trains there.
//! The mechanisms, their gradients and the training are those of the crate, as WebAssembly; the page only
//! draws.

mod graphs;
mod training;
mod weights;

use wasm_bindgen::prelude::*;

type Result<T> = std::result::Result<T, JsError>;

/// Returns the name of the instruction set of the kernels.
#[wasm_bindgen]
pub fn instruction_set() -> Result<String> {
    Ok(graph_attention::testing::hold_simd()?)
}

/// Returns the names of the graphs.
#[wasm_bindgen]
pub fn graph_names() -> Vec<String> {
    graphs::NAMES.map(str::to_owned).to_vec()
}

/// A graph, and the picture of it.
#[wasm_bindgen]
pub struct Graph(graphs::Example);

#[wasm_bindgen]
impl Graph {
    /// Creates one of [`graph_names`].
    #[wasm_bindgen(constructor)]
    pub fn new(name: &str) -> Result<Graph> {
        Ok(Graph(graphs::Example::new(name)?))
    }

    /// Returns x and y of each node, from 0 to 1.
    pub fn places(&self) -> Vec<f64> {
        self.0.places.iter().flatten().copied().collect()
    }

    /// Returns the class of each node.
    pub fn classes(&self) -> Vec<u32> {
        self.0.classes.iter().map(|&class| class as u32).collect()
    }

    /// Returns the nodes whose class is known in training.
    pub fn known(&self) -> Vec<u32> {
        self.0.known.iter().map(|&node| node as u32).collect()
    }

    /// Returns the two ends of each edge.
    pub fn edges(&self) -> Vec<u32> {
        self.0.edges.iter().flat_map(|&(u, v)| [u as u32, v as u32]).collect()
    }

    /// Returns the weights of a mechanism, n × n, and zero for nodes that do not see each other.
    pub fn weights(
        &self,
        mechanism: &str,
        everyone: bool,
        temperature: f64,
        curvature: f64,
        radius: usize,
    ) -> Result<Vec<f64>> {
        let settings = weights::Settings { everyone, temperature, curvature, radius };
        Ok(weights::weights(&self.0, mechanism, &settings)?.into_iter().collect())
    }
}

/// A network in training.
#[wasm_bindgen]
pub struct Training(training::Training);

#[wasm_bindgen]
impl Training {
    /// Draws the parameters of a network for a graph.
    #[wasm_bindgen(constructor)]
    pub fn new(graph: &Graph, seed: u32) -> Result<Training> {
        Ok(Training(training::Training::new(&graph.0, seed.into())?))
    }

    /// Takes one step of gradient descent and returns the loss before it.
    pub fn step(&mut self) -> Result<f64> {
        Ok(self.0.step()?)
    }

    /// Returns the share of each class at each node, n × classes.
    pub fn shares(&self) -> Result<Vec<f64>> {
        Ok(self.0.forward()?.shares.into_iter().collect())
    }

    /// Returns the weights of the first layer, the mean over its heads, n × n.
    pub fn weights(&self) -> Result<Vec<f64>> {
        Ok(self.0.weights()?.into_iter().collect())
    }

    /// Returns the norm of the gradient of the loss with respect to each node.
    pub fn node_gradients(&self) -> Result<Vec<f64>> {
        Ok(self.0.node_gradients()?.into_iter().collect())
    }

    /// Returns the change of the loss in a random direction of the parameters: by the gradient, and by two
    /// more forward passes.
    pub fn gradient_check(&self) -> Result<Vec<f64>> {
        Ok(self.0.gradient_check()?.to_vec())
    }
}
