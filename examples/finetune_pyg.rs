//! A graph attention network trained in PyG learns classes that arrive later, in Rust, and goes back to PyG.
//!
//! ```sh
//! cargo run --release -p examples --features safetensors --example finetune_pyg
//! cargo run --release -p examples --features safetensors --example finetune_pyg -- <folder> <model from PyG> <new model>
//! python examples/finetune_pyg.py check <folder> <new model>
//! ```
//!
//! The script beside this example trains the model in PyG, and loads the new one: all its parameters have PyG's
//! names, and its outputs are those of Rust. The folder has the files of `data/papers`.

use examples::{Adam, Gat, data::Nodes, metrics};
use graph_attention::ndarray::{Array2, ArrayViewD, ArrayViewMutD, Ix2, Slice};
use graph_attention::rand::{Rng, SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{Dropout, Inputs, Params, params, safetensors};
use std::{env, error::Error};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let contained = ["data/papers", "data/pyg_papers.safetensors", "../target/papers.safetensors"];
    let contained = contained.map(|file| format!("{}/{file}", env!("CARGO_MANIFEST_DIR")));
    let [folder, pyg, new] = args.try_into().unwrap_or(contained);
    let nodes = Nodes::read(&folder)?;
    let graph = nodes.graph.with_self_loops()?;
    let x = nodes.features_by_count();
    let inputs = Inputs::self_attention(x.view(), &graph)?;
    let [train, test] = ["train", "test"].map(|split| nodes.split(split));
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);

    // The model from PyG, and the outputs that it had there.
    let mut state = safetensors::read::<f32>(&pyg, "")?;
    let out = state.iter().position(|(name, _)| name == "out").ok_or("no outputs in the file")?;
    let out = state.swap_remove(out).1.into_dimensionality::<Ix2>()?;
    let old_classes = out.ncols();
    let mut old = Gat::new(x.ncols(), old_classes, &mut rng)?;
    params::load_state(&mut old, state)?;
    let difference = (old.forward(&inputs)? - &out).iter().fold(0f32, |max, d| max.max(d.abs()));
    println!(
        "{old_classes} classes from PyG: largest difference from its outputs {difference:.0e}"
    );
    assert!(difference < 1e-4);

    // More rows for more classes: those of PyG's stay as they are, the others are random.
    let mut model = Gat::new(x.ncols(), nodes.classes(), &mut rng)?;
    model.visit_params_mut(&mut |name, mut wide| {
        let Some(value) = params::get(&old, name) else { return };
        let rows = |axis| Slice::from(..value.len_of(axis));
        wide.slice_each_axis_mut(|along| rows(along.axis)).assign(&value);
    });
    let (old_test, new_test): (Vec<_>, _) =
        test.iter().partition(|&&(_, class)| class < old_classes);
    let report = |when: &str, logits: &Array2<f32>| {
        let [all, old, new] =
            [&test, &old_test, &new_test].map(|nodes| metrics::accuracy(logits, nodes));
        println!("{when}: {all:.3} of all right, {old:.3} of old classes, {new:.3} of new ones");
        new
    };
    let before = report("as it came", &out);
    let mut adam = Adam::new(0.005, &model).weight_decay(5e-4);
    for _step in 0..300 {
        let dropped = inputs.with_dropout(Dropout { probability: 0.6, seed: rng.next_u64() })?;
        let (logits, passed) = model.forward_train(&dropped)?;
        let (_, grad) = metrics::cross_entropy(&logits, &train);
        let grads = model.backward(&dropped, &passed, grad.view())?;
        adam.step(&mut model, &grads)?;
    }
    let out = model.forward(&inputs)?;
    let after = report("trained on", &out);
    assert!(after > before + 0.5, "it learns the new classes");
    safetensors::save(&Answered { model, out }, &new)?;
    println!("saved as {new}");
    Ok(())
}

/// A model with its outputs, for the script to compare.
struct Answered {
    model: Gat,
    out: Array2<f32>,
}

impl Params<f32> for Answered {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.model.visit_params(visitor);
    }
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.model.visit_params_mut(visitor);
    }
    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        visitor("out", self.out.view().into_dyn());
    }
}
