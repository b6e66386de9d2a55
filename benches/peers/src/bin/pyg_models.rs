//! Layers that were trained in PyG, in this crate and in rten, which reads their ONNX models: milliseconds, the fastest of
//! several rounds, the peak of memory beside inputs and parameters, and the difference to PyG's outputs.
//!
//! ```sh
//! python benches/pyg.py FOLDER
//! RAYON_NUM_THREADS=1 RTEN_NUM_THREADS=1 cargo run --release --manifest-path benches/peers/Cargo.toml \
//!     --target-dir target --bin pyg_models FOLDER
//! ```

use graph_attention::ndarray::{Array2, ArrayD, Ix2};
use graph_attention::{Attention, EdgeGatConfig, Gradients, Graph, Inputs, edge_gat::Score};
use graph_attention::{safetensors, testing::hold_simd};
use peak_alloc::PeakAlloc;
use rten::{Model, Value, ValueOrView};
use rten_tensor::NdTensor;
use std::path::{Path, PathBuf};
use std::{env, error::Error, time::Instant};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const ROUNDS: usize = 5;

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

fn main() -> Result<()> {
    let folder =
        PathBuf::from(env::args().nth(1).ok_or("the folder that pyg.py wrote is missing")?);
    println!("{}", hold_simd()?);
    let file = folder.join("graph.safetensors");
    let (x, edge_attr) = (array(&file, "x")?, array(&file, "edge_attr")?);
    let edge_index: ArrayD<f64> = tensor(&file, "edge_index")?;
    let edge_index = edge_index.mapv(|node| node as usize).into_dimensionality::<Ix2>()?;
    let (sources, targets) = (edge_index.row(0), edge_index.row(1));
    let edges = targets.iter().copied().zip(sources.iter().copied());
    let graph = Graph::from_edges(x.nrows(), x.nrows(), edges)?;
    let _ = graph.transpose(); // computed once for all backward passes
    let inputs = Inputs::self_attention(x.view(), &graph)?.with_edge_features(edge_attr.view())?;

    for (name, score) in
        [("Gat", Score::Gat), ("GatV2", Score::GatV2), ("DotProduct", Score::DotProduct)]
    {
        let file = folder.join(format!("{name}.safetensors"));
        let expected = array(&file, "out")?;
        let config = EdgeGatConfig::new(score, x.ncols(), 16, 4).edge_dim(edge_attr.ncols());
        let gat = config.from_params(safetensors::read::<f32>(&file, "layer.")?)?;
        let mut out = Array2::zeros(expected.raw_dim());
        let error = difference(&gat.forward(&inputs)?, &expected);
        let forward = measure(|| Ok(gat.forward_into(&inputs, out.view_mut())?))?;
        let ones = Array2::ones(expected.raw_dim());
        let training = measure(|| {
            let mut grads = Gradients::zeros(&inputs, &gat)?;
            let (_, saved) = gat.forward_train(&inputs)?;
            Ok(gat.backward_into(&inputs, &saved, ones.view(), grads.view_mut())?)
        })?;
        println!("{name}: ours {forward}, error {error:.0e}; with backward {training}");

        let model = Model::load_file(folder.join(format!("{name}.onnx")))?;
        let index: Vec<i32> = edge_index.iter().map(|&node| node as i32).collect();
        let index = NdTensor::from_data([2, targets.len()], index);
        let values: [(_, Value); 3] = [
            (model.node_id("x")?, to_rten(&x).into()),
            (model.node_id("edge_index")?, index.into()),
            (model.node_id("edge_attr")?, to_rten(&edge_attr).into()),
        ];
        let id = model.node_id("out")?;
        let run = || -> Result<NdTensor<f32, 2>> {
            let views = values.iter().map(|(id, value)| (*id, ValueOrView::from(value)));
            let [out] = model.run_n(views.collect(), [id], None)?;
            Ok(out.try_into()?)
        };
        let out = Array2::from_shape_vec(expected.raw_dim(), run()?.into_data())?;
        let error = difference(&out, &expected);
        println!("{name}: rten {}, error {error:.0e}", measure(|| run().map(drop))?);
    }
    Ok(())
}

/// Runs it several times.
fn measure(mut run: impl FnMut() -> Result<()>) -> Result<String> {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_secs_f64() * 1e3);
    }
    PEAK.reset_peak_usage();
    let before = PEAK.current_usage();
    run()?;
    Ok(format!("{best:.0} ms, {} MB", (PEAK.peak_usage() - before) / 1_000_000))
}

fn tensor<F: graph_attention::Float>(file: &Path, name: &str) -> Result<ArrayD<F>> {
    let mut tensors = safetensors::read(file, name)?;
    Ok(tensors.pop().ok_or("the file has no such tensor")?.1)
}

fn array(file: &Path, name: &str) -> Result<Array2<f32>> {
    Ok(tensor(file, name)?.into_dimensionality()?)
}

fn to_rten(matrix: &Array2<f32>) -> NdTensor<f32, 2> {
    NdTensor::from_data(
        [matrix.nrows(), matrix.ncols()],
        matrix.iter().copied().collect::<Vec<_>>(),
    )
}

fn difference(a: &Array2<f32>, b: &Array2<f32>) -> f32 {
    (a - b).iter().fold(0.0, |max, difference| max.max(difference.abs()))
}
