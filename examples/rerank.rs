//! Which papers will a new paper cite? An index finds those with similar words; attention over these hits and the
//! papers that they cite or are cited by ranks them again.
//!
//! ```sh
//! cargo run --release -p examples --example rerank                 # 600 papers, drawn
//! cargo run --release -p examples --example rerank -- <folder>     # Cora
//! ```
//!
//! For each query the candidates are a graph of their own: a candidate attends to those that it is linked to by a
//! citation, and to those with similar words. It starts from its similarity to the query, whether it is a hit, and
//! how many candidates it is linked to. Four fifths of the papers are known; the links of the new ones are unknown
//! to the index, the graph and the training. Without attention, that is if each candidate attends only to
//! itself, the same network learns less. Recall and average precision count all known papers that a new one is
//! linked to, found or not.

use examples::{Adam, Between, data, metrics};
use graph_attention::ndarray::{Array2, Axis};
use graph_attention::neighbors::{ExactIndex, Metric, NeighborIndex, NeighborSearch, Neighbors};
use graph_attention::rand::{Rng, RngExt, SeedableRng, rngs::Xoshiro256PlusPlus, seq::SliceRandom};
use graph_attention::{
    DualSpace, DualSpaceConfig, Flash, Graph, Inputs, MultiHeadConfig, TransformerLayer,
    TransformerLayerConfig, dual_space::Fusion,
};
use indicatif::ProgressBar;
use std::{
    collections::{HashMap, HashSet},
    env, error,
};

type Result<T> = std::result::Result<T, Box<dyn error::Error>>;

const HITS: usize = 30;
const WIDTH: usize = 32;
/// The number of queries in a batch.
const BATCH: usize = 32;
const EPOCHS: usize = 5;

fn main() -> Result<()> {
    let rng = &mut Xoshiro256PlusPlus::seed_from_u64(1);
    let (words, citations) = match env::args().nth(1) {
        Some(folder) => data::Nodes::read(folder).map(|papers| (papers.features, papers.graph))?,
        None => drawn(600, rng)?,
    };
    let corpus = Corpus::new(words, citations, rng)?;
    let is_linked = |query: &usize| corpus.links(*query).next().is_some();
    let (mut new, mut known) = (corpus.new.clone(), corpus.known.clone());
    new.retain(is_linked);
    known.retain(is_linked);

    let by_index = new.iter().map(|&query| corpus.hits(query, 100).map(|hit| hit.0).collect());
    let mut table = vec![("cosine", corpus.quality(&new, by_index.collect()))];
    for (name, epochs, is_alone) in [
        ("attention, untrained", 0, false),
        ("without attention", EPOCHS, true),
        ("attention, trained", EPOCHS, false),
    ] {
        let batch = |queries: &[usize]| Batch::new(&corpus, queries, is_alone);
        // The same initial parameters and batches each time.
        let rng = &mut Xoshiro256PlusPlus::seed_from_u64(2);
        let mut model = model(rng)?;
        let mut adam = Adam::new(0.003, &model);
        let mut known = known.clone();
        let bar = ProgressBar::new((epochs * known.len().div_ceil(BATCH)) as u64);
        for _epoch in 0..epochs {
            known.shuffle(rng);
            for queries in known.chunks(BATCH) {
                let batch = batch(queries)?;
                let inputs = batch.inputs()?;
                let (scores, passed) = model.forward_train(&inputs)?;
                let (_, grad) = metrics::binary_cross_entropy(&scores, &batch.labels);
                let grads = model.backward(&inputs, &passed, grad.view())?;
                adam.step(&mut model, &grads)?;
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        let rankings = new.iter().map(|&query| {
            let batch = batch(&[query])?;
            let scores = model.forward(&batch.inputs()?)?;
            let mut order: Vec<_> = batch.candidates.iter().zip(scores.column(0)).collect();
            order.sort_by(|a, b| b.1.total_cmp(a.1));
            Ok(order.into_iter().map(|(&candidate, _)| candidate).collect())
        });
        table.push((name, corpus.quality(&new, rankings.collect::<Result<Vec<_>>>()?)));
    }
    println!("{} new papers, {} known ones", new.len(), corpus.known.len());
    println!("ranked by               recall@10    MAP");
    for (name, [recall, map]) in &table {
        println!("{name:<22}  {recall:.3}        {map:.3}");
    }
    let is_worse =
        |&(_, [recall, map]): &(_, [f64; 2])| recall < table[3].1[0] && map < table[3].1[1];
    assert!(table[..3].iter().all(is_worse), "a better order");
    Ok(())
}

type Model = Between<TransformerLayer<f32, DualSpace<f32>>>;

/// A transformer layer around attention in two spaces, between two linear maps.
fn model(rng: &mut impl Rng) -> Result<Model> {
    let mut heads = || MultiHeadConfig::new(WIDTH, 4).init(Flash::new(), rng);
    let (links, alike, cross) = (heads()?, heads()?, heads()?);
    let dual = DualSpaceConfig::new(Fusion::Linear { output_dim: WIDTH }, WIDTH);
    let dual = dual.init(links, alike, cross, rng)?;
    let layer = TransformerLayerConfig::new(WIDTH, WIDTH).norm_first(true).init(dual, rng)?;
    Ok(Between::new([3, WIDTH, 1], layer, rng)?)
}

struct Corpus {
    citations: Graph,
    known: Vec<usize>,
    new: Vec<usize>,
    /// The known papers with similar words, as positions in `known`.
    found: Neighbors<f32>,
    /// Words, weighted by their rareness, of length 1.
    words: Array2<f32>,
    is_new: Vec<bool>,
}

impl Corpus {
    fn new(mut words: Array2<f32>, citations: Graph, rng: &mut impl Rng) -> Result<Self> {
        let n = words.nrows();
        words *= &words.sum_axis(Axis(0)).mapv(|papers| (n as f32 / papers.max(1.0)).ln());
        for mut row in words.rows_mut() {
            row /= row.dot(&row).sqrt().max(1e-6);
        }
        let mut order: Vec<usize> = (0..n).collect();
        order.shuffle(rng);
        let (new, known) = order.split_at(n / 5);
        let mut is_new = vec![false; n];
        new.iter().for_each(|&paper| is_new[paper] = true);
        // A known paper also finds itself.
        let index = ExactIndex::from_array(words.select(Axis(0), known), Metric::Cosine)?;
        let found = index.search(words.view(), &NeighborSearch::new(101))?;
        Ok(Self { citations, known: known.to_vec(), new: new.to_vec(), found, words, is_new })
    }

    /// The known papers with the most similar words, most similar first.
    fn hits(&self, paper: usize, k: usize) -> impl Iterator<Item = (usize, f32)> {
        let hits = self.found.row(paper).map(|hit| (self.known[hit.key], hit.similarity));
        hits.filter(move |&(hit, _)| hit != paper).take(k)
    }

    /// The known papers that a paper cites or is cited by.
    fn links(&self, paper: usize) -> impl Iterator<Item = usize> {
        let links = self.citations.neighbors(paper).iter().map(|&other| other as usize);
        links.filter(|&other| !self.is_new[other])
    }

    /// Returns the mean recall among the first 10, and the mean average precision.
    fn quality(&self, queries: &[usize], rankings: Vec<Vec<usize>>) -> [f64; 2] {
        let each = queries.iter().zip(rankings).map(|(&query, ranking)| {
            let links: HashSet<usize> = self.links(query).collect();
            let relevant: Vec<_> = ranking.iter().map(|paper| links.contains(paper)).collect();
            let recall = relevant.iter().take(10).filter(|&&is| is).count() as f64;
            let precision = metrics::average_precision(relevant, links.len());
            (recall / links.len() as f64, precision)
        });
        let (recalls, precisions): (Vec<_>, Vec<_>) = each.unzip();
        [recalls, precisions].map(|values| metrics::mean_and_std(&values)[0])
    }
}

/// The candidates of some queries: as many graphs without edges between them. A candidate that is alone attends only
/// to itself.
struct Batch {
    candidates: Vec<usize>,
    x: Array2<f32>,
    citations: Graph,
    alike: Graph,
    /// Whether each candidate is linked to the query: 1, else 0.
    labels: Vec<(usize, usize)>,
}

impl Batch {
    fn new(corpus: &Corpus, queries: &[usize], is_alone: bool) -> Result<Self> {
        let (mut candidates, mut x, mut labels) = (vec![], vec![], vec![]);
        let (mut citations, mut alike) = (vec![], vec![]);
        for &query in queries {
            let first = candidates.len();
            let mut position = HashMap::new();
            let hits: Vec<usize> = corpus.hits(query, HITS).map(|(hit, _)| hit).collect();
            let around = hits.iter().flat_map(|&hit| corpus.links(hit));
            for paper in hits.iter().copied().chain(around).filter(|&paper| paper != query) {
                position.entry(paper).or_insert_with(|| {
                    candidates.push(paper);
                    candidates.len() - 1
                });
            }
            let links: HashSet<usize> = corpus.links(query).collect();
            for (place, &paper) in candidates[first..].iter().enumerate() {
                let row = first + place;
                let linked = corpus.links(paper).filter_map(|other| position.get(&other));
                let linked: Vec<_> = linked.map(|&other| (row, other)).collect();
                let similarity = corpus.words.row(query).dot(&corpus.words.row(paper));
                let is_hit = if place < hits.len() { 1.0 } else { 0.0 };
                x.push([similarity, is_hit, (linked.len() as f32).ln_1p()]);
                citations.extend(linked);
                let similar = corpus.hits(paper, 10).filter_map(|(hit, _)| position.get(&hit));
                alike.extend(similar.map(|&other| (row, other)));
                labels.push((row, usize::from(links.contains(&paper))));
            }
        }
        if is_alone {
            citations.clear();
            alike.clear();
        }
        let n = candidates.len();
        let citations = Graph::from_edges(n, n, citations)?.with_self_loops()?;
        let alike = Graph::from_edges(n, n, alike)?;
        Ok(Self { candidates, x: x.into(), citations, alike, labels })
    }

    fn inputs(&self) -> graph_attention::Result<Inputs<'_, f32>> {
        Inputs::self_attention(self.x.view(), &self.citations)?.with_latent(&self.alike)
    }
}

/// Draws papers in groups of ten, which share some rare words, and which mostly cite each other.
fn drawn(n: usize, rng: &mut impl Rng) -> Result<(Array2<f32>, Graph)> {
    let group = |paper: usize| paper / 10;
    let mut words = Array2::zeros((n, 100 + n / 10 * 4));
    for paper in 0..n {
        for _ in 0..10 {
            words[[paper, rng.random_range(0..100)]] = 1.0;
        }
        for _ in 0..2 {
            words[[paper, 100 + 4 * group(paper) + rng.random_range(0..4)]] = 1.0;
        }
    }
    let edges = (0..3 * n).map(|edge| {
        let paper = edge / 3;
        let near = 10 * group(paper) + rng.random_range(0..10);
        (paper, if rng.random_bool(0.7) { near } else { rng.random_range(0..n) })
    });
    Ok((words, data::undirected(n, &edges.collect::<Vec<_>>())?))
}
