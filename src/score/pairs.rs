//! The pairs that a slice of logits belongs to.

use crate::inputs::Pair;
use fearless_simd::Level;
use std::ops::Range;

/// The pairs of a slice of logits: of one head, and either some queries with some keys, or one query with some
/// keys, or one key with some queries.
///
/// Visit them with [`for_each`](Self::for_each) and [`for_each_with`](Self::for_each_with), which compile to
/// vectorised loops if the function that they call is simple. The slice may contain pairs that a mask, a causal
/// pattern, a window or a bias hides; their results are ignored.
#[derive(Clone, Copy, Debug)]
pub struct ScorePairs<'a> {
    pub(crate) level: Level,
    pub(crate) head: usize,
    /// The rows of the slice, and the entries of each.
    pub(crate) outer: Side<'a>,
    pub(crate) inner: Side<'a>,
    /// Whether a row has one query and some keys; otherwise it has one key and some queries.
    pub(crate) rows_are_queries: bool,
    pub(crate) indices: Indices<'a>,
    pub(crate) layers: Option<&'a [u8]>,
}

/// Some queries or keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Side<'a> {
    /// Their numbers in the inputs that the caller gave.
    pub(crate) numbers: &'a [u32],
    /// Their positions, which the causal pattern aligns.
    pub(crate) positions: &'a [i32],
}

/// The numbers of the pairs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Indices<'a> {
    /// Of dense inputs: `first` is that of the first query and key of the slice.
    Dense { first: usize, num_keys: usize, num_keys_of_whole: usize },
    /// Of the only row; `numbers` are those in the inputs that the caller gave, if they differ.
    Listed { pairs: &'a [Pair], numbers: Option<&'a [usize]> },
}

/// One pair and head, as a [`ScoreFunction`](super::ScoreFunction) sees it. Queries, keys and pairs have the
/// numbers that they have in the inputs; in each segment of a packed batch they begin with 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScorePair {
    /// The head.
    pub head: usize,
    /// The query.
    pub query: usize,
    /// The key.
    pub key: usize,
    /// The number of the pair, as in [`Pair::index`].
    pub index: usize,
    /// The position of the key minus the position of the query: 0 for the query's own key, negative for earlier
    /// keys. The query is at the position that [`Causal`](crate::Causal) gives it, so the distance is right in
    /// decoding too. Positions count within a segment, or a block of a block-diagonal graph.
    pub distance: i32,
    /// The number of the pair in the arrays at hand.
    local: usize,
}

/// One row of the slice.
struct Row<'a> {
    entries: Range<usize>,
    number: u32,
    position: i32,
    /// The number of the first pair, and what it grows by; in the arrays at hand and in the caller's.
    first: [usize; 2],
    step: [usize; 2],
    inner: Side<'a>,
}

impl<'a> ScorePairs<'a> {
    /// Returns the head of all pairs.
    #[inline]
    #[must_use]
    pub fn head(&self) -> usize {
        self.head
    }

    /// Returns the number of pairs, the length of the slice of logits.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.outer.numbers.len() * self.inner.numbers.len()
    }

    /// Returns whether there are none.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the smallest and the largest distance of a key from a query, exactly, or a wider range.
    #[inline]
    #[must_use]
    pub fn distances(&self) -> Range<i32> {
        let ends = |positions: &[i32]| {
            let (first, last) = (positions.first().copied(), positions.last().copied());
            match self.indices {
                // Ascending.
                Indices::Dense { .. } => first.zip(last),
                Indices::Listed { .. } => {
                    positions.iter().copied().min().zip(positions.iter().copied().max())
                }
            }
        };
        let (Some(outer), Some(inner)) = (ends(self.outer.positions), ends(self.inner.positions))
        else {
            return 0..0;
        };
        let (queries, keys) = if self.rows_are_queries { (outer, inner) } else { (inner, outer) };
        keys.0 - queries.1..keys.1 - queries.0 + 1
    }

    /// Returns the edge layer of a pair ([`Inputs::with_edge_layers`](crate::Inputs::with_edge_layers)), 0
    /// without edge layers.
    #[inline(always)]
    #[must_use]
    pub fn layer(&self, pair: ScorePair) -> u8 {
        self.layers.map_or(0, |layers| layers[pair.local])
    }

    /// Calls a function with each pair and its entry in `values`.
    #[inline(always)]
    pub fn for_each<T>(&self, values: &mut [T], mut visit: impl FnMut(ScorePair, &mut T)) {
        for row in self.rows() {
            let values = &mut values[row.entries.clone()];
            self.visit_row(&row, values.iter_mut(), &mut visit);
        }
    }

    /// Calls a function with each pair, its entry in `logits`, and its entry in `grads`.
    #[inline(always)]
    pub fn for_each_with<T: Copy>(
        &self,
        logits: &[T],
        grads: &mut [T],
        mut visit: impl FnMut(ScorePair, T, &mut T),
    ) {
        for row in self.rows() {
            let grads = grads[row.entries.clone()].iter_mut();
            let both = logits[row.entries.clone()].iter().zip(grads);
            self.visit_row(&row, both, |pair, (logit, grad)| visit(pair, *logit, grad));
        }
    }

    /// Iterates over the rows.
    #[inline(always)]
    fn rows(&self) -> impl Iterator<Item = Row<'a>> {
        let Self { outer, inner, rows_are_queries, indices, .. } = *self;
        let len = inner.numbers.len();
        outer.numbers.iter().zip(outer.positions).enumerate().map(
            #[inline(always)]
            move |(r, (&number, &position))| {
                let (first, step) = match indices {
                    Indices::Listed { .. } => ([0; 2], [0; 2]),
                    Indices::Dense { first, num_keys, num_keys_of_whole } => {
                        if rows_are_queries {
                            let whole = number as usize * num_keys_of_whole;
                            ([first + r * num_keys, whole], [1, 1])
                        } else {
                            ([first + r, number as usize], [num_keys, num_keys_of_whole])
                        }
                    }
                };
                Row { entries: r * len..(r + 1) * len, number, position, first, step, inner }
            },
        )
    }

    /// Calls a function with the pairs of a row and the items that belong to them.
    #[inline(always)]
    fn visit_row<I>(
        &self,
        row: &Row<'a>,
        items: impl Iterator<Item = I>,
        mut visit: impl FnMut(ScorePair, I),
    ) {
        let Self { head, rows_are_queries, indices, .. } = *self;
        let Row { number, position, first, step, inner, .. } = *row;
        let inner = inner.numbers.iter().zip(inner.positions);
        match indices {
            Indices::Dense { .. } if rows_are_queries => {
                for (i, (item, (&key, &key_position))) in items.zip(inner).enumerate() {
                    let (query, key) = (number as usize, key as usize);
                    let (index, local) = (first[1] + key, first[0] + i);
                    let distance = key_position - position;
                    visit(ScorePair { head, query, key, index, distance, local }, item);
                }
            }
            Indices::Dense { .. } => {
                for (i, (item, (&query, &query_position))) in items.zip(inner).enumerate() {
                    let (query, key) = (query as usize, number as usize);
                    let (index, local) = (first[1] + query * step[1], first[0] + i * step[0]);
                    let distance = position - query_position;
                    visit(ScorePair { head, query, key, index, distance, local }, item);
                }
            }
            Indices::Listed { pairs, numbers } => {
                let listed = pairs.iter().enumerate();
                for ((item, (&other, &other_position)), (i, pair)) in items.zip(inner).zip(listed) {
                    let (mut query, mut key) = (number as usize, other as usize);
                    let mut distance = other_position - position;
                    if !rows_are_queries {
                        (query, key, distance) = (key, query, -distance);
                    }
                    let local = pair.index;
                    let index = numbers.map_or(local, |numbers| numbers[i]);
                    visit(ScorePair { head, query, key, index, distance, local }, item);
                }
            }
        }
    }
}
