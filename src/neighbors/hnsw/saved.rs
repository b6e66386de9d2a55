//! Saving and loading an index with its links.

use super::links::Links;
use super::{HnswConfig, HnswIndex};
use crate::error::{Error, Result};
use crate::kernels::Float;
use crate::kernels::keys::Keys;
use crate::kernels::problem::Rows;
use crate::neighbors::NeighborIndex;
use ndarray::{Array2, ArrayView2};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The serialised form: what cannot be computed from the keys. Not yet validated.
#[derive(Serialize, Deserialize)]
#[serde(rename = "HnswIndex", expecting = "an HNSW index", deny_unknown_fields)]
struct Saved<K> {
    config: HnswConfig,
    keys: K,
    removed: Vec<usize>,
    links: SavedLinks,
}

impl<F: Float + Serialize> Serialize for HnswIndex<F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let shape = (self.num_keys(), self.dim());
        let keys = ArrayView2::from_shape(shape, self.keys.rows(0..self.num_keys()));
        let saved = Saved {
            config: self.config.clone(),
            keys: keys.map_err(serde::ser::Error::custom)?,
            removed: self.removed.iter().map(|&key| key as usize).collect(),
            links: self.links.save(),
        };
        saved.serialize(serializer)
    }
}

impl<'de, F: Float + Deserialize<'de>> Deserialize<'de> for HnswIndex<F> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        Saved::deserialize(deserializer)?.load().map_err(D::Error::custom)
    }
}

impl<F: Float> Saved<Array2<F>> {
    fn load(self) -> Result<HnswIndex<F>> {
        let num_keys = self.keys.nrows();
        super::check_num_keys(num_keys)?;
        let rows = Rows::owned("keys", self.keys)?;
        let mut index = self.config.empty(Keys::new(rows, num_keys, self.config.metric)?)?;
        let linked = index.register(0..num_keys)?;
        index.links.load(&linked, self.links)?;
        index.remove(&self.removed).map_err(|_| {
            let expected = format!("different numbers below {num_keys}");
            Error::graph("removed", expected, format!("{:?}", self.removed))
        })?;
        Ok(index)
    }
}

/// The serialised form of [`Links`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedLinks {
    /// For each linked key and each of its layers, the links.
    links: Vec<Vec<Vec<u32>>>,
    /// For each linked key, the number of kept links.
    kept: Vec<usize>,
}

impl Links {
    fn save(&self) -> SavedLinks {
        let keys = (0..self.linked.len() as u32).filter(|&key| self.is_linked(key));
        let layers =
            |key| (0..=self.top_of(key)).map(|layer| self.of(key, layer).to_vec()).collect();
        SavedLinks {
            links: keys.clone().map(layers).collect(),
            kept: keys.map(|key| self.num_kept(key, 0)).collect(),
        }
    }

    /// Sets the links of keys that have none yet, after checking that a search can follow them.
    fn load(&mut self, keys: &[u32], saved: SavedLinks) -> Result<()> {
        let check = |what: String, expected: usize, actual: usize| {
            if expected == actual { Ok(()) } else { Err(Error::graph(what, expected, actual)) }
        };
        check("number of linked keys".into(), keys.len(), saved.links.len())?;
        check("number of kept links".into(), keys.len(), saved.kept.len())?;
        for &key in keys {
            self.linked[key as usize] = true;
            self.upper[key as usize] = vec![0; self.draw(key) * (self.connections + 1)];
        }
        for ((&key, layers), kept) in keys.iter().zip(saved.links).zip(saved.kept) {
            check(format!("layers of key {key}"), 1 + self.top_of(key), layers.len())?;
            for (layer, links) in layers.iter().enumerate() {
                let is_right = |&link: &u32| {
                    let is_linked = self.linked.get(link as usize) == Some(&true);
                    is_linked && self.top_of(link) >= layer
                };
                let is_short = links.len() <= self.capacity(layer);
                if !is_short || !links.iter().all(is_right) || (layer == 0 && kept > links.len()) {
                    let expected =
                        format!("at most {} keys of layer {layer}", self.capacity(layer));
                    return Err(Error::graph(
                        format!("links of key {key}"),
                        expected,
                        format!("{links:?}"),
                    ));
                }
                self.set(key, layer, kept, links);
            }
            if self.entry.is_none() || self.top_of(key) > self.top {
                (self.entry, self.top) = (Some(key), self.top_of(key));
            }
        }
        Ok(())
    }
}
