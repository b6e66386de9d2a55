//! The boundaries of the sequences of a packed batch.

use crate::error::{Error, Result};
use std::ops::Range;

/// The boundaries of the sequences in a packed batch, for [`Inputs::packed`](crate::Inputs::packed): which
/// queries and which keys belong to each segment. flash-attention's `cu_seqlens_q` and `cu_seqlens_k`.
///
/// ```
/// use graph_attention::Segments;
///
/// let segments = Segments::from_lengths(&[3, 0, 2])?; // of self-attention: as many keys as queries
/// assert_eq!((segments.queries(2), segments.keys(2)), (3..5, 3..5));
/// assert_eq!(segments.num_pairs(), 9 + 4);
/// assert_eq!(segments, Segments::from_offsets(&[0, 3, 3, 5], &[0, 3, 3, 5])?);
///
/// let cross = Segments::from_query_key_lengths(&[1, 2], &[4, 5])?;
/// assert_eq!(cross.pairs(1), 4..14);
/// # Ok::<(), graph_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "Offsets")
)]
pub struct Segments {
    /// The first query, key and pair of each segment, and at the end the number of all.
    queries: Vec<usize>,
    keys: Vec<usize>,
    #[cfg_attr(feature = "serde", serde(skip_serializing))]
    pairs: Vec<usize>,
}

/// The serialised form of [`Segments`], not yet validated.
#[cfg(feature = "serde")]
#[derive(serde::Deserialize)]
#[serde(rename = "Segments", expecting = "segments", deny_unknown_fields)]
struct Offsets {
    queries: Vec<usize>,
    keys: Vec<usize>,
}

#[cfg(feature = "serde")]
impl TryFrom<Offsets> for Segments {
    type Error = Error;

    fn try_from(Offsets { queries, keys }: Offsets) -> Result<Self> {
        Self::from_offsets(&queries, &keys)
    }
}

impl Segments {
    /// Creates segments with as many keys as queries, as in self-attention. A length may be 0.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the number of pairs overflows.
    pub fn from_lengths(lengths: &[usize]) -> Result<Self> {
        Self::from_query_key_lengths(lengths, lengths)
    }

    /// Creates segments with these numbers of queries and of keys, each of which may be 0.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not as many numbers of keys as of queries, [`Error::TooLarge`] if the
    /// number of pairs overflows.
    pub fn from_query_key_lengths(queries: &[usize], keys: &[usize]) -> Result<Self> {
        if queries.len() != keys.len() {
            return Err(Error::shape("key lengths", &[queries.len()], &[keys.len()]));
        }
        let offsets = |lengths: &mut dyn Iterator<Item = Option<usize>>| {
            let mut end = Some(0usize);
            let ends = lengths.map(|len| {
                end = end.zip(len).and_then(|(end, len)| end.checked_add(len));
                end
            });
            std::iter::once(Some(0)).chain(ends).collect::<Option<Vec<_>>>()
        };
        let queries_of = offsets(&mut queries.iter().copied().map(Some));
        let keys_of = offsets(&mut keys.iter().copied().map(Some));
        let pairs = queries.iter().zip(keys).map(|(&queries, &keys)| queries.checked_mul(keys));
        let pairs_of = offsets(&mut { pairs });
        match (queries_of, keys_of, pairs_of) {
            (Some(queries), Some(keys), Some(pairs)) => Ok(Self { queries, keys, pairs }),
            _ => Err(Error::TooLarge { what: "pairs", shape: vec![queries.len()] }),
        }
    }

    /// Creates segments from the offsets of their queries and keys: the first of each segment, and at the end
    /// the number of all.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if offsets do not begin with 0 or decrease, and as
    /// [`from_query_key_lengths`](Self::from_query_key_lengths).
    pub fn from_offsets(queries: &[usize], keys: &[usize]) -> Result<Self> {
        let lengths = |argument, offsets: &[usize]| -> Result<Vec<usize>> {
            let is_valid = offsets.first() == Some(&0) && offsets.is_sorted();
            if !is_valid {
                let expected = "numbers that begin with 0 and do not decrease";
                return Err(Error::config(argument, expected, format!("{offsets:?}")));
            }
            Ok(offsets.windows(2).map(|ends| ends[1] - ends[0]).collect())
        };
        let (queries, keys) = (lengths("query offsets", queries)?, lengths("key offsets", keys)?);
        Self::from_query_key_lengths(&queries, &keys)
    }

    /// Returns the number of segments.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queries.len() - 1
    }

    /// Returns whether there are no segments.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of queries of all segments.
    #[must_use]
    pub fn num_queries(&self) -> usize {
        self.queries[self.len()]
    }

    /// Returns the number of keys of all segments.
    #[must_use]
    pub fn num_keys(&self) -> usize {
        self.keys[self.len()]
    }

    /// Returns the number of pairs of all segments.
    #[must_use]
    pub fn num_pairs(&self) -> usize {
        self.pairs[self.len()]
    }

    /// Returns the queries of a segment.
    ///
    /// # Panics
    /// If there is no such segment.
    #[must_use]
    pub fn queries(&self, segment: usize) -> Range<usize> {
        self.queries[segment]..self.queries[segment + 1]
    }

    /// Returns the keys of a segment.
    ///
    /// # Panics
    /// If there is no such segment.
    #[must_use]
    pub fn keys(&self, segment: usize) -> Range<usize> {
        self.keys[segment]..self.keys[segment + 1]
    }

    /// Returns the pairs of a segment: query i and key j of a segment with n_k keys are its pair i · n_k + j.
    ///
    /// # Panics
    /// If there is no such segment.
    #[must_use]
    pub fn pairs(&self, segment: usize) -> Range<usize> {
        self.pairs[segment]..self.pairs[segment + 1]
    }

    /// The segment of a query.
    #[inline]
    pub(crate) fn of_query(&self, query: usize) -> usize {
        segment_of(&self.queries, query)
    }

    /// The segment of a key.
    #[inline]
    pub(crate) fn of_key(&self, key: usize) -> usize {
        segment_of(&self.keys, key)
    }

    /// The pairs of a query, one for each key of its segment.
    #[inline]
    pub(crate) fn pairs_of_query(&self, query: usize) -> Range<usize> {
        let segment = self.of_query(query);
        let len = self.keys(segment).len();
        let first = self.pairs[segment] + (query - self.queries[segment]) * len;
        first..first + len
    }

    /// The pairs of a key, one for each query of its segment, numbered key by key.
    #[inline]
    pub(crate) fn slots_of_key(&self, key: usize) -> Range<usize> {
        let segment = self.of_key(key);
        let len = self.queries(segment).len();
        let first = self.pairs[segment] + (key - self.keys[segment]) * len;
        first..first + len
    }

    /// The segments of some queries, by ascending numbers, with all of their keys.
    pub(crate) fn select_queries(&self, queries: &[usize]) -> Result<Self> {
        let starts = self.queries.iter().map(|&end| queries.partition_point(|&query| query < end));
        Self::from_offsets(&starts.collect::<Vec<_>>(), &self.keys)
    }
}

fn segment_of(offsets: &[usize], number: usize) -> usize {
    offsets.partition_point(|&start| start <= number) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_and_keys_find_their_segments() -> Result<()> {
        let segments = Segments::from_query_key_lengths(&[0, 2, 0, 1, 3], &[2, 3, 1, 0, 1])?;
        let of_query: Vec<usize> = (0..6).map(|query| segments.of_query(query)).collect();
        assert_eq!(of_query, [1, 1, 3, 4, 4, 4]);
        let of_key: Vec<usize> = (0..7).map(|key| segments.of_key(key)).collect();
        assert_eq!(of_key, [0, 0, 1, 1, 1, 2, 4]);
        let pairs: Vec<_> = (0..6).map(|query| segments.pairs_of_query(query)).collect();
        assert_eq!(pairs, [0..3, 3..6, 6..6, 6..7, 7..8, 8..9]);
        let some = segments.select_queries(&[1, 2, 5])?;
        assert_eq!(some, Segments::from_query_key_lengths(&[0, 1, 0, 1, 1], &[2, 3, 1, 0, 1])?);
        assert!(Segments::from_lengths(&[])?.is_empty());
        Ok(())
    }

    #[test]
    fn offsets_and_lengths_that_do_not_fit_are_errors() {
        let error = Segments::from_query_key_lengths(&[1, 2], &[1]).unwrap_err();
        assert_eq!(error, Error::shape("key lengths", &[2], &[1]));
        for offsets in [&[][..], &[1, 2], &[0, 3, 2]] {
            let error = Segments::from_offsets(&[0], offsets).unwrap_err();
            assert!(error.to_string().starts_with("key offsets: expected numbers"), "{error}");
        }
        let huge = usize::MAX / 2;
        for (queries, keys) in [([huge, 1], [3, 1]), ([huge, huge + 2], [1, 1])] {
            let error = Segments::from_query_key_lengths(&queries, &keys).unwrap_err();
            assert!(matches!(error, Error::TooLarge { .. }));
        }
    }
}
