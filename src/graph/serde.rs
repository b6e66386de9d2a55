use super::Graph;
use crate::error::{Error, Result};
use crate::segments::Segments;
use ::serde::Deserialize;

/// The serialised form of a [`Graph`], not yet validated.
#[derive(Deserialize)]
#[serde(rename = "Graph", expecting = "a graph", deny_unknown_fields)]
pub(super) struct Parts {
    num_keys: usize,
    offsets: Vec<usize>,
    indices: Vec<u32>,
    edge_ids: Option<Vec<u32>>,
    #[serde(default)]
    blocks: Option<Box<Segments>>,
}

impl TryFrom<Parts> for Graph {
    type Error = Error;

    fn try_from(parts: Parts) -> Result<Self> {
        let graph = Self::from_csr(parts.num_keys, parts.offsets, parts.indices)?;
        if let Some(blocks) = &parts.blocks {
            let expected = [graph.num_queries(), graph.num_keys()];
            let actual = [blocks.num_queries(), blocks.num_keys()];
            if actual != expected {
                let [expected, actual] = [expected, actual].map(|sizes| format!("{sizes:?}"));
                return Err(Error::graph("queries and keys of the blocks", expected, actual));
            }
        }
        let graph = Self { blocks: parts.blocks, ..graph };
        let Some(edge_ids) = parts.edge_ids else { return Ok(graph) };
        let num_edges = graph.num_edges();
        if edge_ids.len() != num_edges {
            let expected = format!("one per slot, {num_edges}");
            return Err(Error::graph("edge_ids", expected, edge_ids.len()));
        }
        let mut seen = vec![false; num_edges];
        for (slot, &id) in edge_ids.iter().enumerate() {
            match seen.get_mut(id as usize) {
                Some(seen @ false) => *seen = true,
                _ => {
                    let expected = format!("a number below {num_edges} that no other slot has");
                    return Err(Error::graph(format!("edge_ids[{slot}]"), expected, id));
                }
            }
        }
        Ok(Self { edge_ids: Some(edge_ids), ..graph })
    }
}
