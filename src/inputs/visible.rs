//! Which pairs a query sees, and by which numbers.

use super::bias::slot_of;
use super::{Causal, Inputs, Origin, Pair, Pattern, View3};
use crate::dropout::Dropout;
use crate::element::Element;
use crate::segments::Segments;
use ndarray::s;
use std::ops::Range;

impl<'a, F: Element> Inputs<'a, F> {
    /// Returns the pairs of a query that are not hidden by mask or causal pattern, with their numbers.
    /// Empty for a query that does not exist.
    ///
    /// (A bias of −∞ also hides a pair, but for one head at a time: [`Bias::at`](super::Bias::at).)
    pub fn row(&self, query: usize) -> impl Iterator<Item = Pair> + use<'a, F> {
        let Self { pattern, pair_mask, .. } = *self;
        let mask = self.shared_mask();
        let visible = self.visible_keys(query);
        let (slots, first_pair) = match pattern {
            _ if query >= self.num_queries() => (0..0, 0),
            Pattern::Dense => (visible.clone(), query * self.num_keys()),
            Pattern::Graph(graph) => (graph.slots(query), 0),
            Pattern::Packed(segments) => {
                let keys = segments.keys(segments.of_query(query));
                (visible.clone(), segments.pairs_of_query(query).start.wrapping_sub(keys.start))
            }
        };
        slots.filter_map(move |slot| {
            let (key, index) = match pattern {
                Pattern::Dense | Pattern::Packed(_) => (slot, first_pair.wrapping_add(slot)),
                Pattern::Graph(graph) => (graph.key(slot), graph.edge_id(slot)),
            };
            let pair = Pair { query, key, index };
            let visible = visible.contains(&key)
                && mask.is_none_or(|mask| mask[slot_of(&mask, pair, 0)])
                && pair_mask.is_none_or(|mask| mask[index]);
            visible.then_some(pair)
        })
    }

    /// Returns whether a pair is visible: not hidden by mask, causal pattern or window.
    #[inline]
    pub(crate) fn sees(&self, pair: Pair) -> bool {
        self.sees_key(pair.query, pair.key) && self.pair_mask.is_none_or(|mask| mask[pair.index])
    }

    /// Returns whether a key is visible to a query: not hidden by a mask of queries and keys, causal
    /// pattern or window. The pair need not exist.
    #[inline]
    pub(crate) fn sees_key(&self, query: usize, key: usize) -> bool {
        let sees = |mask: View3<'a, bool>| mask[slot_of(&mask, Pair { query, key, index: 0 }, 0)];
        self.visible_keys(query).contains(&key) && self.shared_mask().is_none_or(sees)
    }

    /// Returns the keys that segments, causal pattern and window leave to a query. Both ends ascend with the
    /// query.
    #[inline]
    pub(crate) fn visible_keys(&self, query: usize) -> Range<usize> {
        match self.segments {
            None => self.first_visible_key(query)..self.num_visible_keys(query),
            Some(segments) if query < segments.num_queries() => {
                let keys = segments.keys(segments.of_query(query));
                let [start, end] = self.visible_numbers(query).map(|number| number.min(keys.len()));
                keys.start + start..keys.start + end
            }
            Some(_) => 0..0,
        }
    }

    /// Returns the first key that the window leaves to a query of inputs without segments.
    #[inline]
    pub(crate) fn first_visible_key(&self, query: usize) -> usize {
        self.num_keys_before(self.visible_numbers(query)[0])
    }

    /// Returns the first key after those that causal pattern and window leave to a query of inputs without
    /// segments.
    pub(crate) fn num_visible_keys(&self, query: usize) -> usize {
        self.num_keys_before(self.visible_numbers(query)[1])
    }

    /// Returns the ends of [`visible_keys`](Self::visible_keys), by the numbers in the whole inputs or in the
    /// whole segment.
    #[inline]
    fn visible_numbers(&self, query: usize) -> [usize; 2] {
        let diagonal = || self.diagonal(query);
        let start = match self.window {
            None => 0,
            Some([left, _]) => diagonal().saturating_sub(left.saturating_add(1)),
        };
        let end = match (self.causal, self.window) {
            (None, None) => usize::MAX,
            (Some(_), _) => diagonal(),
            (None, Some([_, right])) => diagonal().saturating_add(right),
        };
        [start, end]
    }

    /// Returns the first query to which causal pattern and window leave a key.
    pub(crate) fn first_query_seeing(&self, key: usize) -> usize {
        let key = self.key_number(key);
        self.num_queries_before(match (self.causal, self.window) {
            (None, None) => 0,
            (None, Some([_, right])) => key.saturating_sub(right),
            (Some(_), _) => self.before_diagonal(key),
        })
    }

    /// Returns the first query after those to which the window leaves a key.
    pub(crate) fn num_queries_seeing(&self, key: usize) -> usize {
        let Some([left, _]) = self.window else { return self.num_queries() };
        let end = self.key_number(key).saturating_add(left).saturating_add(1);
        self.num_queries_before(self.before_diagonal(end))
    }

    /// Returns the number of keys up to and including a query's own (the diagonal), in the whole inputs.
    pub(crate) fn diagonal(&self, query: usize) -> usize {
        let (number, [num_queries, num_keys]) = self.query_place(query);
        let end = number.saturating_add(1);
        match self.causal {
            Some(Causal::BottomRight) => end.saturating_add(num_keys).saturating_sub(num_queries),
            Some(Causal::Offset(offset)) => end.saturating_add(offset),
            Some(Causal::TopLeft) | None => end,
        }
    }

    /// Returns the position of a query, that of its own key; it may be before the first key.
    pub(crate) fn query_position(&self, query: usize) -> i64 {
        let (number, [num_queries, num_keys]) = self.query_place(query);
        let number = number as i64;
        match self.causal {
            Some(Causal::BottomRight) => number + num_keys as i64 - num_queries as i64,
            Some(Causal::Offset(offset)) => number.saturating_add_unsigned(offset as u64),
            Some(Causal::TopLeft) | None => number,
        }
    }

    /// Returns the number of a query, and the numbers of queries and keys: in the whole inputs, or in its
    /// segment.
    fn query_place(&self, query: usize) -> (usize, [usize; 2]) {
        let number = self.query_number(query);
        match self.segments.zip(self.whole_segments()) {
            None => (number, self.whole_sizes()),
            Some((segments, whole)) => {
                let segment = segments.of_query(query);
                let queries = whole.queries(segment);
                (number - queries.start, [queries.len(), whole.keys(segment).len()])
            }
        }
    }

    /// Returns the number of the query whose own key this is, in the whole inputs.
    fn before_diagonal(&self, key: usize) -> usize {
        match self.causal {
            Some(Causal::BottomRight) => {
                let [num_queries, num_keys] = self.whole_sizes();
                key.saturating_add(num_queries).saturating_sub(num_keys)
            }
            Some(Causal::Offset(offset)) => key.saturating_sub(offset),
            Some(Causal::TopLeft) | None => key,
        }
    }

    /// Returns the first query whose own key is this one or a later one; `key` is a number in the whole
    /// inputs.
    pub(crate) fn first_query_from(&self, key: usize) -> usize {
        self.num_queries_before(self.before_diagonal(key))
    }

    /// Returns the numbers of queries and keys that define causal pattern and window.
    pub(crate) fn whole_sizes(&self) -> [usize; 2] {
        self.origin.map_or([self.num_queries(), self.num_keys()], |origin| {
            [origin.num_queries, origin.num_keys]
        })
    }

    /// Returns the number of a key in the whole inputs, or in the whole segment.
    pub(crate) fn key_place(&self, key: usize) -> usize {
        match self.segments {
            None => self.key_number(key),
            Some(segments) => key - segments.keys(segments.of_key(key)).start,
        }
    }

    /// Returns an upper bound, exclusive, of the positions of queries and keys in the whole inputs, or in the
    /// longest segment.
    pub(crate) fn num_positions(&self) -> usize {
        let cached = if let Some(Causal::Offset(offset)) = self.causal { offset } else { 0 };
        let num = |[queries, keys]: [usize; 2]| keys.max(queries.saturating_add(cached));
        match self.whole_segments() {
            None => num(self.whole_sizes()),
            Some(segments) => {
                let sizes =
                    |segment| [segments.queries(segment).len(), segments.keys(segment).len()];
                (0..segments.len()).map(|segment| num(sizes(segment))).max().unwrap_or(0)
            }
        }
    }

    /// Returns how many of the keys have a number below this one in the whole inputs.
    #[inline]
    pub(crate) fn num_keys_before(&self, number: usize) -> usize {
        match self.origin.and_then(|origin| origin.keys) {
            None => number.min(self.num_keys()),
            Some(keys) => count_below(keys, number),
        }
    }

    /// Returns how many of the queries have a number below this one in the whole inputs.
    fn num_queries_before(&self, number: usize) -> usize {
        match self.origin.and_then(|origin| origin.queries) {
            None => number,
            Some(queries) => count_below(queries, number.saturating_add(self.first_number())),
        }
    }

    /// Returns the number of a pair in the inputs that these were selected from, if they were selected, and
    /// its own number otherwise.
    #[inline]
    pub(crate) fn pair_number(&self, pair: Pair) -> usize {
        if let (Pattern::Packed(segments), Some(whole)) = (self.pattern, self.whole_segments()) {
            let segment = segments.of_query(pair.query);
            let (queries, keys) = (whole.queries(segment), whole.keys(segment));
            let query = self.query_number(pair.query) - queries.start;
            return query * keys.len() + (pair.key - keys.start);
        }
        match self.origin {
            None => pair.index,
            Some(Origin { pairs: Some(pairs), .. }) => pairs[pair.index],
            Some(_) if matches!(self.pattern, Pattern::Graph(_)) => pair.index,
            Some(origin) => {
                self.query_number(pair.query) * origin.num_keys + self.key_number(pair.key)
            }
        }
    }

    /// The segments of the inputs that these were selected from, if they were selected.
    pub(super) fn whole_segments(&self) -> Option<&'a Segments> {
        self.origin.map_or(self.segments, |origin| origin.segments)
    }

    /// The number that counts as 0 among the numbers of selected queries.
    pub(super) fn first_number(&self) -> usize {
        self.origin.map_or(0, |origin| origin.first_query)
    }

    /// Returns the number of a query in the inputs that these were selected from. If they were not
    /// selected, or there is no such query, returns `query`.
    pub(crate) fn query_number(&self, query: usize) -> usize {
        let queries = self.origin.and_then(|origin| origin.queries);
        let number = queries.and_then(|queries| queries.get(query));
        number.map_or(query, |number| number - self.first_number())
    }

    /// Returns the dropout of the row of a query in an array with one row for each, and the number of the row. Both
    /// count within the segment of packed inputs, and in the whole inputs if these were selected.
    pub(crate) fn dropout_of_row(&self, query: usize) -> Option<(Dropout, usize)> {
        let (dropout, number) = (self.dropout?, self.query_number(query));
        Some(match (self.pattern, self.whole_segments()) {
            (Pattern::Packed(segments), Some(whole)) => {
                let segment = segments.of_query(query);
                (dropout.of_segment(segment), number - whole.queries(segment).start)
            }
            _ => (dropout, number),
        })
    }

    /// Returns the number of a key in the inputs that these were selected from, if they were selected, and
    /// its own number otherwise.
    pub(crate) fn key_number(&self, key: usize) -> usize {
        let keys = self.origin.and_then(|origin| origin.keys);
        keys.map_or(key, |keys| keys[key])
    }

    /// Returns an upper bound of the number of pairs of dense inputs that the window leaves.
    pub(crate) fn num_pairs_in_window(&self) -> usize {
        let keys = self.window.map(|[left, right]| left.saturating_add(right).saturating_add(1));
        let pairs = keys.map_or(usize::MAX, |keys| self.num_queries().saturating_mul(keys));
        self.num_pairs().min(pairs)
    }

    /// Returns whether each query sees only the keys of a window.
    pub(crate) fn has_window(&self) -> bool {
        self.window.is_some()
    }
}

/// The smallest range that contains both.
pub(crate) fn hull(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    a.start.min(b.start)..a.end.max(b.end)
}

/// The keys that some queries see under a mask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    /// All keys that any of the queries sees are in this range.
    pub(crate) keys: Range<usize>,
    /// Whether each of the queries sees all of them, and there is no bias.
    pub(crate) is_all: bool,
}

impl Shown {
    pub(crate) const NOTHING: Self = Self { keys: 0..0, is_all: true };

    fn all(keys: Range<usize>) -> Self {
        Self { keys, is_all: true }
    }

    /// What one query sees of some keys, given which of them it sees.
    fn of(
        keys: &Range<usize>,
        mut seen: impl DoubleEndedIterator<Item = bool> + ExactSizeIterator,
    ) -> Self {
        let Some(first) = seen.position(|sees| sees) else { return Self::NOTHING };
        let after_first = seen.rposition(|sees| sees).map_or(0, |place| place + 1);
        let start = keys.start + first;
        Self { keys: start..start + 1 + after_first, is_all: false }
    }

    /// What one query sees of some keys, given its mask of them.
    fn by(mask: &[bool], keys: &Range<usize>) -> Self {
        // Counting is vectorised, as a loop with a way out would not be.
        let count =
            |mask: &[bool]| usize::from(mask.iter().map(|&sees| u8::from(sees)).sum::<u8>());
        match mask.chunks(128).map(count).sum::<usize>() {
            0 => Self::NOTHING,
            count if count == mask.len() => Self::all(keys.clone()),
            count => {
                let shown = Self::of(keys, mask.iter().copied());
                Self { is_all: count == shown.keys.len(), ..shown }
            }
        }
    }

    /// What two queries see.
    pub(crate) fn and(self, other: &Self) -> Self {
        let keys = match (self.keys.is_empty(), other.keys.is_empty()) {
            (true, _) => other.keys.clone(),
            (_, true) => self.keys.clone(),
            _ => hull(&self.keys, &other.keys),
        };
        let is_all = self.is_all && other.is_all && self.keys == other.keys;
        Self { keys, is_all }
    }
}

impl<F: Element> Inputs<'_, F> {
    /// Passes to `visit`, for each of some ranges of keys, its number and what masks and bias show of it to a
    /// query of dense inputs and a head.
    pub(crate) fn for_each_shown(
        &self,
        query: usize,
        head: usize,
        tiles: impl Iterator<Item = Range<usize>>,
        mut visit: impl FnMut(usize, Shown),
    ) {
        let tiles = tiles.enumerate();
        let (Some(mask), None, None) = (self.shared_mask(), self.pair_mask, self.bias()) else {
            // Not the causal pattern and the window, which differ between queries that share a mask.
            let sees = |key| {
                let pair = Pair { query, key, index: query * self.num_keys() + key };
                self.shared_mask().is_none_or(|mask| mask[slot_of(&mask, pair, 0)])
                    && self.pair_mask.is_none_or(|mask| mask[pair.index])
                    && self.bias().is_none_or(|bias| bias.at(pair, head) != F::neg_infinity())
            };
            return tiles.for_each(|(number, tile)| {
                visit(number, Shown::of(&tile, tile.clone().map(sees)));
            });
        };
        let [_, row, _] = slot_of(&mask, Pair { query, key: 0, index: 0 }, 0);
        let mask = mask.slice(s![0usize, row, ..]);
        let slice = mask.to_slice();
        tiles.for_each(|(number, tile)| {
            let shown = match (mask.len(), slice) {
                (1, _) if mask[0] => Shown::all(tile),
                (1, _) => Shown::NOTHING,
                (_, Some(mask)) => Shown::by(&mask[tile.clone()], &tile),
                (_, None) => Shown::of(&tile, mask.slice(s![tile.clone()]).iter().copied()),
            };
            visit(number, shown);
        });
    }
}

/// Returns how many of the ascending `numbers` are below `number`. Takes constant time if they are evenly
/// spaced, as in a dilated window.
fn count_below(numbers: &[usize], number: usize) -> usize {
    if let &[first, .., last] = numbers
        && first < number
        && number <= last
    {
        let guess = (number - 1 - first).saturating_mul(numbers.len() - 1) / (last - first) + 1;
        if let Some(&[below, not_below]) = numbers.get(guess - 1..=guess)
            && below < number
            && number <= not_below
        {
            return guess;
        }
    }
    numbers.partition_point(|&other| other < number)
}

#[cfg(test)]
mod tests {
    use super::{Shown, count_below};
    use crate::inputs::Inputs;
    use ndarray::{Array2, s};
    use std::ops::Range;

    /// What some queries see of a tile, from the definition.
    fn shown_to(mask: &Array2<bool>, queries: Range<usize>, tile: Range<usize>) -> Shown {
        let seen = |key: &usize| queries.clone().any(|query| mask[[query, *key]]);
        let keys: Vec<usize> = tile.filter(seen).collect();
        let (Some(&first), Some(&last)) = (keys.first(), keys.last()) else {
            return Shown::NOTHING;
        };
        let block = mask.slice(s![queries, first..=last]);
        Shown { keys: first..last + 1, is_all: block.iter().all(|&sees| sees) }
    }

    #[test]
    fn the_keys_that_masks_show_are_found() {
        let masks: [fn(usize, usize) -> bool; 5] = [
            |query, key| query / 3 == key / 5,
            |query, key| (query * 7 + key * key) % 5 < 2,
            |_, key| key < 13,
            |query, _| query != 1,
            |_, _| true,
        ];
        for sees in masks {
            let mask = Array2::from_shape_fn((6, 20), |(query, key)| sees(query, key));
            let columns = mask.t().as_standard_layout().into_owned();
            let x = Array2::<f64>::zeros((20, 2));
            let inputs = Inputs::dense(x.slice(s![..6, ..]), x.view(), x.view()).unwrap();
            let bias = mask.mapv(|sees| if sees { 0.0 } else { f64::NEG_INFINITY });
            let tiles = [0..7, 7..14, 14..20, 9..9];
            for (inputs, knows_all) in [
                (inputs.with_mask(mask.view()).unwrap(), true),
                (inputs.with_mask(columns.t()).unwrap(), false),
                (inputs.with_bias(bias.view()).unwrap(), false),
            ] {
                for queries in [0..6, 0..1, 2..4] {
                    let mut shown: [Option<Shown>; 4] = Default::default();
                    for query in queries.clone() {
                        inputs.for_each_shown(
                            query,
                            0,
                            tiles.iter().cloned(),
                            |number, of_query| {
                                let before = shown[number].take();
                                shown[number] = Some(match before {
                                    None => of_query,
                                    Some(before) => of_query.and(&before),
                                });
                            },
                        );
                    }
                    for (shown, tile) in shown.iter().zip(&tiles) {
                        let expected = shown_to(&mask, queries.clone(), tile.clone());
                        let shown = shown.as_ref().unwrap();
                        assert_eq!(shown.keys, expected.keys, "{queries:?} {tile:?}");
                        match knows_all {
                            true => {
                                assert_eq!(shown.is_all, expected.is_all, "{queries:?} {tile:?}")
                            }
                            // Only a mask whose rows lie in one piece is asked.
                            false => assert!(expected.is_all || !shown.is_all),
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn numbers_below_are_counted_evenly_spaced_or_not() {
        for numbers in [&[][..], &[4], &[4, 9], &[0, 3, 6, 9], &[5, 7, 9, 11], &[2, 3, 11, 12, 13]]
        {
            for number in 0..16 {
                let expected = numbers.iter().filter(|&&other| other < number).count();
                assert_eq!(count_below(numbers, number), expected, "{numbers:?} {number}");
            }
            assert_eq!(count_below(numbers, usize::MAX), numbers.len());
        }
        assert_eq!(count_below(&[0, 1, usize::MAX], usize::MAX - 1), 2);
    }
}
