//! A batch of sentences of different lengths in one call, without padding: a model with causal attention
//! reads the letters of each word and learns to guess the next one.
//!
//! ```sh
//! cargo run --release -p examples --example packed_batch
//! ```

use graph_attention::ndarray::{Array1, Array2, Axis, s};
use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
use graph_attention::{
    Attention, Flash, GraphRopeConfig, Inputs, MultiHeadConfig, Result, Segments,
};
use graph_attention::{graph_rope::Layout, params};

const TEXT: &str = "the quick brown fox jumps over the lazy dog and the dog sleeps under the tree while \
    the fox looks for another brown dog that jumps over the tree";
const LETTERS: usize = 27;

fn main() -> Result<()> {
    // Each word is a sequence. A letter is a row with one 1; its target is the next letter, or the end.
    let words: Vec<&str> = TEXT.split_whitespace().collect();
    let lengths: Vec<usize> = words.iter().map(|word| word.len()).collect();
    let segments = Segments::from_lengths(&lengths)?;
    let number = |letter: u8| usize::from(letter - b'a');
    let letters: Vec<usize> = words.iter().flat_map(|word| word.bytes().map(number)).collect();
    let ends = words
        .iter()
        .flat_map(|word| word.bytes().skip(1).map(number).chain([LETTERS - 1]).collect::<Vec<_>>());
    let targets: Vec<usize> = ends.collect();
    let place = words.iter().flat_map(|word| (0..word.len()).map(|place| place as f64));
    let positions: Array2<f64> = place.collect::<Array1<f64>>().insert_axis(Axis(1));
    let x = Array2::from_shape_fn((letters.len(), LETTERS), |(row, letter)| {
        f64::from(u8::from(letters[row] == letter))
    });
    println!("{} words, {} letters, {} pairs", words.len(), x.nrows(), segments.num_pairs());

    let inputs = Inputs::packed(x.view(), x.view(), x.view(), &segments)?
        .with_causal()
        .with_positions(positions.view(), positions.view())?;
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
    let rope = GraphRopeConfig::new(9, Layout::Half).rotary_dim(8).init(Flash::new())?;
    let mut model = MultiHeadConfig::new(LETTERS, 3).init(rope, &mut rng)?;

    let mut losses = vec![];
    for _step in 0..300 {
        let (mut logits, saved) = model.forward_train(&inputs)?;
        // The cross-entropy, and its gradient in place of the logits.
        let mut loss = 0.0;
        for (mut row, &target) in logits.rows_mut().into_iter().zip(&targets) {
            let max = row.fold(f64::NEG_INFINITY, |max, &logit| max.max(logit));
            row.mapv_inplace(|logit| (logit - max).exp());
            row /= row.sum();
            loss -= row[target].ln();
            row[target] -= 1.0;
        }
        losses.push(loss / targets.len() as f64);
        let grads = model.backward_params(&inputs, &saved, logits.view())?;
        params::update(&mut model, &grads, |_, mut param, grad| param.scaled_add(-0.02, &grad))?;
    }
    println!("loss {:.3}, after 300 steps {:.3}", losses[0], losses[299]);
    assert!(losses[299] < 0.4 * losses[0]);

    // The second word alone gives the same: it never saw its neighbours.
    let out = model.forward(&inputs)?;
    let rows = s![segments.queries(1), ..];
    let (word, places) = (x.slice(rows), positions.slice(rows));
    let alone = Inputs::dense(word, word, word)?.with_causal().with_positions(places, places)?;
    let difference = (&model.forward(&alone)? - &out.slice(rows)).mapv(f64::abs).sum();
    println!("\"{}\" alone differs by {difference:.0e}", words[1]);
    assert!(difference < 1e-12);
    Ok(())
}
