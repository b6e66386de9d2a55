//! Local and global pairs by the order of queries and keys.

use crate::error::{Error, Result};
use crate::inputs::{Inputs, Pair};
use crate::kernels::Float;
use std::collections::BTreeMap;

/// The pairs that a [`LocalGlobal::sliding_window`](super::LocalGlobal::sliding_window) keeps: a window
/// around each query, and global positions.
///
/// ```text
/// −left · dilation ≤ j − i ≤ right · dilation  and  dilation | i − j,    or i global, or j global
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct Window {
    left: usize,
    right: usize,
    dilation: usize,
    /// Ascending, each once.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "ascending"))]
    globals: Vec<usize>,
}

/// Queries and keys by number, `None` for all, and which of their pairs are kept.
pub(super) struct Block {
    pub(super) queries: Option<Vec<usize>>,
    pub(super) keys: Option<Vec<usize>>,
    pub(super) kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Pairs in the window, the first pairs of their queries.
    Window,
    /// All pairs: global keys outside the window.
    Far,
    /// All pairs of global queries, which are ignored in other blocks.
    Global,
}

impl Window {
    /// Creates a window of `radius` keys on either side of a query, and its own key, without gaps and
    /// without globals.
    #[must_use]
    pub fn new(radius: usize) -> Self {
        Self::sides(radius, radius)
    }

    /// `left` keys before a query, its own, and `right` keys after it: flash-attention's `window_size`.
    #[must_use]
    pub fn sides(left: usize, right: usize) -> Self {
        Self { left, right, dilation: 1, globals: Vec::new() }
    }

    /// Sets the dilation: only every `dilation`-th key is kept, so the window reaches `dilation` times as
    /// far. Default: 1.
    #[must_use]
    pub fn dilation(mut self, dilation: usize) -> Self {
        self.dilation = dilation;
        self
    }

    /// Sets the global positions, which attend to all positions and which all positions attend to.
    /// Duplicates count once.
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

    /// Refuses global positions that have neither a query nor a key.
    pub(super) fn check_globals<F: Float>(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        let len = inputs.num_positions();
        match self.globals.last() {
            Some(&last) if last >= len => {
                Err(Error::config("globals", format!("positions below {len}"), last))
            }
            _ => Ok(()),
        }
    }

    /// Returns the distances of the farthest keys in the window, before a query and after it.
    pub(super) fn reach(&self) -> [usize; 2] {
        [self.left, self.right].map(|keys| keys.saturating_mul(self.dilation))
    }

    fn is_global(&self, position: usize) -> bool {
        self.globals.binary_search(&position).is_ok()
    }

    /// Whether a pair is kept.
    pub(super) fn keeps<F: Float>(&self, inputs: &Inputs<'_, F>, pair: Pair) -> bool {
        let key = inputs.key_place(pair.key);
        let Some(query) = position(inputs, pair.query) else { return self.is_global(key) };
        self.is_in_window(query, key) || self.is_global(query) || self.is_global(key)
    }

    fn is_in_window(&self, query: usize, key: usize) -> bool {
        let distance = query.abs_diff(key);
        let [left, right] = self.reach();
        let reach = if key <= query { left } else { right };
        distance <= reach && distance.is_multiple_of(self.dilation)
    }

    /// Returns the queries at global positions.
    pub(super) fn global_queries<F: Float>(&self, inputs: &Inputs<'_, F>) -> Vec<usize> {
        let query = |&global: &usize| {
            let query = inputs.first_query_from(global);
            let is_there = query < inputs.num_queries() && position(inputs, query) == Some(global);
            is_there.then_some(query)
        };
        self.globals.iter().filter_map(query).collect()
    }

    /// Returns the keys at global positions.
    fn global_keys<F: Float>(&self, inputs: &Inputs<'_, F>) -> Vec<usize> {
        let key = |&global: &usize| {
            let key = inputs.num_keys_before(global);
            (key < inputs.num_keys() && inputs.key_number(key) == global).then_some(key)
        };
        self.globals.iter().filter_map(key).collect()
    }

    /// Returns the keys of a class from the first to the last that a window around one of its queries
    /// contains. The queries have ascending positions.
    fn keys_of_class<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        class: usize,
        queries: &[(usize, usize)],
    ) -> Vec<usize> {
        let (Some((_, first)), Some((_, last))) = (queries.first(), queries.last()) else {
            return Vec::new();
        };
        let [left, right] = self.reach();
        let first = match first.checked_sub(left) {
            Some(first) => first,
            None => class,
        };
        let end = last.saturating_add(right).saturating_add(1).min(inputs.num_positions());
        let key_at = |number| {
            let key = inputs.num_keys_before(number);
            (key < inputs.num_keys() && inputs.key_number(key) == number).then_some(key)
        };
        (first..end).step_by(self.dilation).filter_map(key_at).collect()
    }

    /// Visits the kept pairs of dense inputs in blocks. A pair is in only one block, unless its query is
    /// global.
    ///
    /// With a dilation, a query only meets keys at distances that are multiples of the dilation, so the
    /// positions fall into classes, each with a window without gaps. The set of global keys outside the
    /// window is the same for a run of queries of a class, and changes only at the ends of the windows
    /// around global positions.
    pub(super) fn for_each_block<F: Float>(
        &self,
        inputs: &Inputs<'_, F>,
        mut visit: impl FnMut(Block) -> Result<()>,
    ) -> Result<()> {
        let mut visit = |queries: Option<Vec<usize>>, keys: Option<Vec<usize>>, kind| {
            let is_empty =
                |numbers: &Option<Vec<usize>>| numbers.as_ref().is_some_and(Vec::is_empty);
            if is_empty(&queries) || is_empty(&keys) {
                return Ok(());
            }
            visit(Block { queries, keys, kind })
        };
        let has_gaps = self.dilation > 1;
        if !has_gaps {
            visit(None, None, Kind::Window)?;
        }
        if !has_gaps && self.globals.is_empty() {
            return Ok(());
        }

        // The queries with their positions, by class.
        let mut queries_of: BTreeMap<usize, Vec<(usize, usize)>> = BTreeMap::new();
        for query in 0..inputs.num_queries() {
            if let Some(position) = position(inputs, query) {
                queries_of.entry(position % self.dilation).or_default().push((query, position));
            }
        }
        if has_gaps {
            for (class, queries) in &queries_of {
                let keys = self.keys_of_class(inputs, *class, queries);
                let queries = queries.iter().map(|&(query, _)| query).collect();
                visit(Some(queries), Some(keys), Kind::Window)?;
            }
        }

        let global_keys = self.global_keys(inputs);
        for (class, queries) in queries_of {
            let mut ends = vec![0, queries.len()];
            for global in self.globals.iter().filter(|&global| global % self.dilation == class) {
                let [left, right] = self.reach();
                let first = global.saturating_sub(right);
                let last = global.saturating_add(left);
                ends.push(queries.partition_point(|&(_, position)| position < first));
                ends.push(queries.partition_point(|&(_, position)| position <= last));
            }
            ends.sort_unstable();
            ends.dedup();
            for run in ends.windows(2) {
                let run = &queries[run[0]..run[1]];
                let is_far = |&&key: &&usize| !self.is_in_window(run[0].1, inputs.key_number(key));
                let keys = global_keys.iter().filter(is_far).copied().collect();
                let queries = run.iter().map(|&(query, _)| query).collect();
                visit(Some(queries), Some(keys), Kind::Far)?;
            }
        }
        visit(Some(self.global_queries(inputs)), None, Kind::Global)
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

/// Returns the key at a query's position. It is `None` before the first key, where a causal pattern
/// aligned with the last key puts queries that see nothing.
fn position<F: Float>(inputs: &Inputs<'_, F>, query: usize) -> Option<usize> {
    inputs.diagonal(query).checked_sub(1)
}
