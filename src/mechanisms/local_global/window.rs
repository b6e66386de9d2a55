//! Local and global by the order of queries and keys.

use crate::error::{Error, Result};
use crate::float::{Float, try_vec};
use crate::inputs::{Inputs, Pair};

/// Which pairs a [`LocalGlobal::by_order`](super::LocalGlobal::by_order) keeps: a window around each
/// query, and global positions.
///
/// ```text
/// |i − j| ≤ radius · dilation  and  dilation | i − j,    or i global, or j global
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct Window {
    radius: usize,
    dilation: usize,
    /// Ascending, each once.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "ascending"))]
    globals: Vec<usize>,
}

/// Queries and keys by number, `None` for all, of which every pair is kept, or those in the window.
pub(super) struct Block {
    pub(super) queries: Option<Vec<usize>>,
    pub(super) keys: Option<Vec<usize>>,
    pub(super) in_window: bool,
}

impl Window {
    /// `radius` keys to either side of a query, and its own, without gaps and without globals.
    #[must_use]
    pub fn new(radius: usize) -> Self {
        Self { radius, dilation: 1, globals: Vec::new() }
    }

    /// Takes only every `dilation`-th key, and so reaches as many times farther; 1 unless set.
    #[must_use]
    pub fn dilation(mut self, dilation: usize) -> Self {
        self.dilation = dilation;
        self
    }

    /// Positions that attend to all and that all attend to. Repeated ones count once.
    #[must_use]
    pub fn globals(mut self, globals: &[usize]) -> Self {
        self.globals = ascending_once(globals.to_vec());
        self
    }

    pub(super) fn validate(&self) -> Result<()> {
        if self.dilation == 0 {
            return Err(Error::config("dilation", "at least 1", self.dilation));
        }
        Ok(())
    }

    /// Refuses global positions where neither a query nor a key stands.
    pub(super) fn check_globals<F: Float>(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        let [num_queries, num_keys] = inputs.whole_sizes();
        let len = num_queries.max(num_keys);
        match self.globals.last() {
            Some(&last) if last >= len => {
                Err(Error::config("globals", format!("positions below {len}"), last))
            }
            _ => Ok(()),
        }
    }

    /// The distance of the farthest key in the window.
    pub(super) fn reach(&self) -> usize {
        self.radius.saturating_mul(self.dilation)
    }

    fn is_global(&self, position: usize) -> bool {
        self.globals.binary_search(&position).is_ok()
    }

    /// Whether a pair is kept.
    pub(super) fn keeps<F: Float>(&self, inputs: &Inputs<'_, F>, pair: Pair) -> bool {
        let key = inputs.key_number(pair.key);
        let Some(query) = position(inputs, pair.query) else { return self.is_global(key) };
        let distance = query.abs_diff(key);
        let in_window = distance <= self.reach() && distance.is_multiple_of(self.dilation);
        in_window || self.is_global(query) || self.is_global(key)
    }

    /// The kept pairs of dense inputs as blocks, of which no two have a pair in common: global queries
    /// with all keys; the others with global keys; and what is left, in the window, where a query only
    /// meets keys whose distance is a multiple of the dilation.
    pub(super) fn blocks<F: Float>(&self, inputs: &Inputs<'_, F>) -> Result<Vec<Block>> {
        let [num_queries, num_keys] = [inputs.num_queries(), inputs.num_keys()];
        if self.globals.is_empty() && self.dilation == 1 {
            return Ok(vec![Block { queries: None, keys: None, in_window: true }]);
        }
        // Queries and keys whose positions leave the same rest.
        let largest = inputs.whole_sizes().into_iter().max().unwrap_or(0);
        let num_classes = self.dilation.min(largest.max(1));
        let mut classes = try_vec("dilation", &[num_classes], [Vec::new(), Vec::new()])?;
        let [mut global_queries, mut other_queries, mut global_keys] = [const { Vec::new() }; 3];
        for query in 0..num_queries {
            match position(inputs, query) {
                Some(position) if self.is_global(position) => global_queries.push(query),
                Some(position) => {
                    other_queries.push(query);
                    classes[position % self.dilation][0].push(query);
                }
                None => other_queries.push(query),
            }
        }
        for key in 0..num_keys {
            let position = inputs.key_number(key);
            if self.is_global(position) {
                global_keys.push(key);
            } else {
                classes[position % self.dilation][1].push(key);
            }
        }
        let mut blocks = Vec::new();
        let mut push = |queries: Vec<usize>, keys: Option<Vec<usize>>, in_window| {
            if !queries.is_empty() && keys.as_ref().is_none_or(|keys| !keys.is_empty()) {
                blocks.push(Block { queries: Some(queries), keys, in_window });
            }
        };
        for [queries, keys] in classes {
            push(queries, Some(keys), true);
        }
        push(other_queries, Some(global_keys), false);
        push(global_queries, None, false);
        Ok(blocks)
    }
}

fn ascending_once(mut globals: Vec<usize>) -> Vec<usize> {
    globals.sort_unstable();
    globals.dedup();
    globals
}

#[cfg(feature = "serde")]
fn ascending<'de, D: serde::Deserializer<'de>>(
    globals: D,
) -> std::result::Result<Vec<usize>, D::Error> {
    serde::Deserialize::deserialize(globals).map(ascending_once)
}

/// The number of the key where a query stands; `None` before the first, where a causal pattern that
/// ends at the last key puts queries that see nothing.
fn position<F: Float>(inputs: &Inputs<'_, F>, query: usize) -> Option<usize> {
    inputs.diagonal(query).checked_sub(1)
}
