//! Graphs whose nodes have features and classes, from files or contained in this package.

use graph_attention::Graph;
use graph_attention::ndarray::{Array2, Axis};
use std::{collections::HashMap, error::Error, fs, path::Path};

/// A graph of citations or friendships, in which the classes of some nodes are known.
pub struct Nodes {
    /// Every edge in both directions, without self-loops.
    pub graph: Graph,
    /// Zeros and ones, one row per node.
    pub features: Array2<f32>,
    /// The class and the split of each node: `train`, `val`, `test` or others.
    labels: Vec<(Option<usize>, String)>,
}

impl Nodes {
    /// Reads a folder with `nodes.csv`, which has the columns `label` and `split`, `edges.csv` with `u` and `v`,
    /// and `features.txt`, whose line i lists the columns that are 1 for node i. Cora and Citeseer are at
    /// github.com/kimiyoung/planetoid.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self, Box<dyn Error>> {
        let text = |file| text(folder.as_ref().join(file));
        Self::parse([&text("nodes.csv")?, &text("edges.csv")?, &text("features.txt")?])
    }

    /// Returns the members of a karate club, their friendships, and the sides that they took when it split: class 0
    /// went with Mr Hi (member 0), class 1 with the officer (member 33); these two are in the split `train`. From
    /// Zachary 1977, doi 10.1086/jar.33.4.3629752.
    pub fn karate_club() -> Self {
        Self::parse([
            include_str!("../data/karate_club/nodes.csv"),
            include_str!("../data/karate_club/edges.csv"),
            include_str!("../data/karate_club/features.txt"),
        ])
        .expect("complete files")
    }

    fn parse([nodes, edges, features]: [&str; 3]) -> Result<Self, Box<dyn Error>> {
        let labels: Vec<_> = rows(nodes)?
            .iter()
            .map(|row| (row["label"].parse().ok(), row["split"].clone()))
            .collect();
        let n = labels.len();
        let lists = features.lines().map(|line| line.split_whitespace().map(str::parse).collect());
        let lists: Vec<Vec<usize>> = lists.collect::<Result<_, _>>()?;
        let columns = lists.iter().flatten().max().map_or(0, |last| last + 1);
        let mut features = Array2::zeros((n, columns));
        for (mut row, ones) in features.rows_mut().into_iter().zip(lists) {
            ones.into_iter().for_each(|column| row[column] = 1.0);
        }
        Ok(Self { graph: undirected(n, &pairs(edges)?)?, features, labels })
    }

    /// Returns the features, divided by the number of ones in their row.
    pub fn features_by_count(&self) -> Array2<f32> {
        let ones = self.features.sum_axis(Axis(1)).insert_axis(Axis(1));
        &self.features / &ones.mapv(|ones| ones.max(1.0))
    }

    /// Returns the class of a node.
    ///
    /// # Panics
    /// If it is not known.
    pub fn class(&self, node: usize) -> usize {
        self.labels[node].0.expect("a known class")
    }

    /// Returns the nodes of a split with their classes.
    pub fn split(&self, name: &str) -> Vec<(usize, usize)> {
        let nodes = self.labels.iter().enumerate().filter(|(_, (_, split))| split == name);
        nodes.filter_map(|(node, (class, _))| Some((node, (*class)?))).collect()
    }

    /// Returns all nodes whose classes are known, with their classes.
    pub fn labelled(&self) -> Vec<(usize, usize)> {
        let nodes = self.labels.iter().enumerate();
        nodes.filter_map(|(node, (class, _))| Some((node, (*class)?))).collect()
    }

    /// Returns the number of classes.
    pub fn classes(&self) -> usize {
        self.labelled().iter().map(|&(_, class)| class + 1).max().unwrap_or(0)
    }
}

/// Reads a file; the error names it.
pub fn text(path: impl AsRef<Path>) -> Result<String, Box<dyn Error>> {
    let path = path.as_ref();
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// Returns the rows of a CSV file by the names of its columns.
pub fn rows(text: &str) -> Result<Vec<HashMap<String, String>>, csv::Error> {
    csv::Reader::from_reader(text.as_bytes()).into_deserialize().collect()
}

/// Returns the rows of a CSV file with two columns of numbers.
pub fn pairs(text: &str) -> Result<Vec<(usize, usize)>, csv::Error> {
    csv::Reader::from_reader(text.as_bytes()).into_deserialize().collect()
}

/// Returns the graph of some edges, each in both directions, without self-loops.
pub fn undirected(n: usize, edges: &[(usize, usize)]) -> graph_attention::Result<Graph> {
    let edges = edges.iter().filter(|(u, v)| u != v);
    Graph::from_edges(n, n, edges.flat_map(|&(u, v)| [(u, v), (v, u)]))
}
