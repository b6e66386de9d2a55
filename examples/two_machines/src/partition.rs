//! Which worker owns which nodes and edges.

use crate::exchange::Result;
use graph_attention::Graph;
use graph_attention::rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The edges of the graph, one after the other, so that no worker holds them all.
#[derive(Clone, Debug)]
pub(crate) enum Edges {
    File { path: PathBuf, num_nodes: usize },
    Generated { num_nodes: usize },
}

impl Edges {
    /// Reads the edges of a file once, to count the nodes.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut edges = Self::File { path: path.to_owned(), num_nodes: usize::MAX };
        let mut num = 0;
        edges.for_each(|query, key| num = num.max(query.max(key) + 1))?;
        if let Self::File { num_nodes, .. } = &mut edges {
            *num_nodes = num;
        }
        Ok(edges)
    }

    pub(crate) fn num_nodes(&self) -> usize {
        match *self {
            Self::File { num_nodes, .. } | Self::Generated { num_nodes } => num_nodes,
        }
    }

    pub(crate) fn num_edges(&self) -> Result<usize> {
        let mut num = 0;
        self.for_each(|_, _| num += 1)?;
        Ok(num)
    }

    /// Visits the edges as (query, key).
    pub(crate) fn for_each(&self, mut visit: impl FnMut(usize, usize)) -> Result<()> {
        match self {
            Self::File { path, num_nodes } => {
                let in_file =
                    |error: &dyn ToString| format!("{}: {}", path.display(), error.to_string());
                let file = File::open(path).map_err(|error| in_file(&error))?;
                for (number, line) in BufReader::new(file).lines().enumerate() {
                    let line = line.map_err(|error| in_file(&error))?;
                    if line.trim().is_empty() || line.starts_with('#') {
                        continue;
                    }
                    let mut nodes = line.split_whitespace().map(str::parse::<usize>);
                    match [nodes.next(), nodes.next(), nodes.next()] {
                        [Some(Ok(query)), Some(Ok(key)), None] if query.max(key) < *num_nodes => {
                            visit(query, key);
                        }
                        _ => {
                            let line =
                                format!("line {}: expected `query key`, got `{line}`", number + 1);
                            return Err(in_file(&line).into());
                        }
                    }
                }
            }
            // Each node attends to itself, to six nodes nearby and to one anywhere.
            &Self::Generated { num_nodes } => {
                for query in 0..num_nodes {
                    let mut rng = Xoshiro256PlusPlus::seed_from_u64(query as u64);
                    visit(query, query);
                    for _ in 0..6 {
                        let key = query + 20 * num_nodes + rng.random_range(0..41) - 20;
                        visit(query, key % num_nodes);
                    }
                    visit(query, rng.random_range(0..num_nodes));
                }
            }
        }
        Ok(())
    }
}

/// Consecutive nodes for each worker.
pub(crate) struct Partition {
    pub(crate) num_nodes: usize,
    pub(crate) workers: usize,
}

impl Partition {
    pub(crate) fn nodes(&self, worker: usize) -> Range<usize> {
        let start = |worker: usize| worker * self.num_nodes / self.workers;
        start(worker)..start(worker + 1)
    }

    fn owner(&self, node: usize) -> usize {
        ((node + 1) * self.workers - 1) / self.num_nodes
    }

    /// The number of edges between workers.
    pub(crate) fn num_cut(&self, edges: &Edges) -> Result<usize> {
        let mut num = 0;
        edges.for_each(|query, key| num += usize::from(self.owner(query) != self.owner(key)))?;
        Ok(num)
    }
}

/// The edges that begin or end at the nodes of one worker. Nodes are numbered within their worker.
pub(crate) struct Links {
    /// For each worker, the own nodes that attend to nodes there, ascending.
    pub(crate) asking: Vec<Vec<usize>>,
    /// For each worker, the edges from its asking nodes to own nodes.
    pub(crate) asked: Vec<Graph>,
}

impl Links {
    pub(crate) fn new(edges: &Edges, partition: &Partition, me: usize) -> Result<Self> {
        let own = partition.nodes(me);
        let mut asking = vec![vec![]; partition.workers];
        let mut asked = vec![vec![]; partition.workers];
        edges.for_each(|query, key| {
            if own.contains(&query) {
                asking[partition.owner(key)].push(query - own.start);
            }
            if own.contains(&key) {
                asked[partition.owner(query)].push((query, key - own.start));
            }
        })?;
        for nodes in &mut asking {
            nodes.sort_unstable();
            nodes.dedup();
        }
        let graph = |edges: Vec<(usize, usize)>| {
            let mut queries: Vec<usize> = edges.iter().map(|&(query, _)| query).collect();
            queries.sort_unstable();
            queries.dedup();
            let row = |query| queries.partition_point(|&other| other < query);
            let edges = edges.into_iter().map(|(query, key)| (row(query), key));
            Graph::from_edges(queries.len(), own.len(), edges)
        };
        let asked = asked.into_iter().map(graph).collect::<graph_attention::Result<_>>()?;
        Ok(Self { asking, asked })
    }
}
