//! The keys and values of a growing past: [`KeyValueCache`].

use crate::attention::{Attention, check_output};
use crate::error::{Channel, Error, Result, check_shape};
use crate::inputs::{Inputs, Pattern};
use crate::kernels::Float;
use crate::kernels::parallel::{self, Rest};
use ndarray::{ArrayView2, ArrayViewMut2, s};
use std::ops::Range;

/// The keys and values of the past of one sequence, so that [`Attention::decode`] computes them once: the
/// rows of a key are projected and rotated when they are appended, not again with each new query.
///
/// Plain rows: those of the innermost mechanism, for example num_keys × (kv_heads · d) inside a
/// [`MultiHead`](crate::MultiHead). Appending takes amortised O(new rows), and removing rows from either end
/// O(1). Several sequences of different lengths have a cache each.
///
/// ```
/// use graph_attention::{
///     Attention, Flash, GraphRopeConfig, Inputs, KeyValueCache, MultiHeadConfig, graph_rope::Layout,
/// };
/// use graph_attention::ndarray::{Array2, Axis, s};
/// use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
///
/// let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
/// let rope = GraphRopeConfig::new(4, Layout::Half).init(Flash::new())?;
/// let layer = MultiHeadConfig::new(8, 2).kv_heads(1).init::<f64, _>(rope, &mut rng)?;
/// let x = Array2::from_shape_fn((20, 8), |(i, j)| ((i * 7 + j * 3) % 11) as f64 / 11.0);
/// let at = Array2::from_shape_fn((20, 1), |(i, _)| i as f64);
/// let inputs = |rows: std::ops::Range<usize>| {
///     let (x, at) = (x.slice(s![rows.clone(), ..]), at.slice(s![rows, ..]));
///     Ok::<_, graph_attention::Error>(Inputs::dense(x, x, x)?.with_positions(at, at)?.with_causal())
/// };
///
/// let mut cache = [KeyValueCache::new()];
/// let mut out = layer.decode(&inputs(0..15)?, &mut cache)?; // the prompt at once
/// for row in 15..20 {
///     out.append(Axis(0), layer.decode(&inputs(row..row + 1)?, &mut cache)?.view()).unwrap();
/// }
/// let at_once = layer.forward(&inputs(0..20)?)?;
/// assert!((out - at_once).iter().all(|difference| difference.abs() < 1e-14));
/// assert_eq!(cache[0].key().dim(), (20, 4)); // projected and rotated, one key head
/// # Ok::<(), graph_attention::Error>(())
/// ```
///
/// **Forgetting.** [`truncate`](Self::truncate) takes back the last rows, for example of rejected drafts;
/// [`keep_last`](Self::keep_last) keeps a window; [`remove`](Self::remove) also keeps the first rows, such as
/// attention sinks (Xiao et al. 2023, 2309.17453). Keys keep the positions with which they were rotated.
///
/// **Saving.** With the feature `serde` a cache can be saved in any format. Otherwise save the arrays
/// [`key`](Self::key), [`value`](Self::value) and [`positions`](Self::positions), and
/// [`append`](Self::append) them to a new cache.
///
/// **Steps of your own**, for example with a bias: project the new rows with
/// [`MultiHead::project`](crate::MultiHead::project), rotate them with
/// [`GraphRope::rotate`](crate::GraphRope::rotate), append them, and attend to [`key`](Self::key) and
/// [`value`](Self::value) as to any other arrays.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KeyValueCache<F> {
    len: usize,
    key: GrowingRows<F>,
    value: GrowingRows<F>,
    /// Without columns if there are none.
    positions: GrowingRows<F>,
}

impl<F: Float> KeyValueCache<F> {
    /// Creates a cache without rows. The first rows that are appended determine the numbers of columns.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the keys, [`len`](Self::len) × columns, contiguous.
    #[must_use]
    pub fn key(&self) -> ArrayView2<'_, F> {
        self.key.view(self.len)
    }

    /// Returns the values, [`len`](Self::len) × columns, contiguous.
    #[must_use]
    pub fn value(&self) -> ArrayView2<'_, F> {
        self.value.view(self.len)
    }

    /// Returns the positions of the keys, [`len`](Self::len) × axes, if they were appended with positions.
    #[must_use]
    pub fn positions(&self) -> Option<ArrayView2<'_, F>> {
        (self.positions.columns > 0).then(|| self.positions.view(self.len))
    }

    /// Appends keys and their values as they are, without positions.
    ///
    /// # Errors
    /// [`Error::Shape`] if the numbers of rows differ, or if the cache has rows with other numbers of columns;
    /// [`Error::TooLarge`] if the rows do not fit in memory. The cache is then unchanged.
    pub fn append(&mut self, key: ArrayView2<'_, F>, value: ArrayView2<'_, F>) -> Result<()> {
        self.append_at(key, value, key.slice(s![.., ..0]))
    }

    /// Appends keys, their values and their positions as they are: keys are not rotated.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn append_at(
        &mut self,
        key: ArrayView2<'_, F>,
        value: ArrayView2<'_, F>,
        positions: ArrayView2<'_, F>,
    ) -> Result<()> {
        let rows = key.nrows();
        let new = [("key", key), ("value", value), ("key positions", positions)];
        let mut buffers = [&mut self.key, &mut self.value, &mut self.positions];
        for ((what, new), old) in new.iter().zip(&buffers) {
            let columns = if self.len == 0 { new.ncols() } else { old.columns };
            check_shape(*what, &[rows, columns], new.shape())?;
        }
        for ((what, new), old) in new.iter().zip(&mut buffers) {
            if self.len == 0 {
                old.restart(new.ncols());
            }
            old.reserve(what, rows)?;
        }
        for ((_, new), old) in new.into_iter().zip(buffers) {
            old.extend(new);
        }
        self.len += rows;
        Ok(())
    }

    /// Keeps only the first `len` rows. Does nothing if there are not more.
    pub fn truncate(&mut self, len: usize) {
        self.remove_rows(len.min(self.len)..self.len);
    }

    /// Keeps only the last `len` rows. Does nothing if there are not more. Takes amortised O(1) in a stream.
    pub fn keep_last(&mut self, len: usize) {
        self.remove_rows(0..self.len.saturating_sub(len));
    }

    /// Removes some rows, in O(rows before or after them, whichever are fewer).
    ///
    /// ```
    /// use graph_attention::KeyValueCache;
    /// use graph_attention::ndarray::array;
    ///
    /// let rows = array![[0.0], [1.0], [2.0], [3.0], [4.0]];
    /// let mut cache = KeyValueCache::new();
    /// cache.append(rows.view(), rows.view())?;
    /// // Keep one attention sink and a window of two.
    /// cache.remove(1..cache.len() - 2)?;
    /// assert_eq!(cache.key(), array![[0.0], [3.0], [4.0]]);
    /// # Ok::<(), graph_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are no such rows.
    pub fn remove(&mut self, rows: Range<usize>) -> Result<()> {
        if rows.start > rows.end || rows.end > self.len {
            let expected = format!("a range within 0..{}", self.len);
            return Err(Error::config("rows", expected, format!("{rows:?}")));
        }
        self.remove_rows(rows);
        Ok(())
    }

    fn remove_rows(&mut self, rows: Range<usize>) {
        for buffer in [&mut self.key, &mut self.value, &mut self.positions] {
            buffer.remove(rows.clone());
        }
        self.len -= rows.len();
    }

    /// Appends the keys, values and positions of dense inputs, and calls `forward` with all rows.
    fn append_and_attend(
        &mut self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
        forward: impl Fn(&Inputs<'_, F>, ArrayViewMut2<'_, F>) -> Result<()>,
    ) -> Result<()> {
        match inputs.key_positions() {
            Some(positions) => self.append_at(inputs.key(), inputs.value(), positions)?,
            None => self.append(inputs.key(), inputs.value())?,
        }
        forward(&inputs.over_cache(self.key(), self.value(), self.positions())?, out)
    }
}

/// [`Attention::decode_into`] of a mechanism that does not transform keys: appends them as they are, and
/// attends to all rows of the caches.
pub(crate) fn decode<F: Float, A: Attention<F> + ?Sized>(
    mechanism: &A,
    inputs: &Inputs<'_, F>,
    caches: &mut [KeyValueCache<F>],
    out: ArrayViewMut2<'_, F>,
) -> Result<()> {
    let forward =
        |inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>| mechanism.forward_into(inputs, out);
    decode_by(mechanism, inputs, caches, out, forward)
}

/// [`decode`] with another function than [`Attention::forward_into`].
pub(crate) fn decode_by<F: Float, A: Attention<F> + ?Sized>(
    mechanism: &A,
    inputs: &Inputs<'_, F>,
    caches: &mut [KeyValueCache<F>],
    out: ArrayViewMut2<'_, F>,
    forward: impl Fn(&Inputs<'_, F>, ArrayViewMut2<'_, F>) -> Result<()> + Send + Sync,
) -> Result<()> {
    check_output(mechanism, "out", inputs, out.shape())?;
    check_channels(mechanism.name(), inputs)?;
    let segments = inputs.packed_segments();
    check_shape("caches", &[segments.map_or(1, |segments| segments.len())], &[caches.len()])?;
    let lens: Vec<usize> = caches.iter().map(KeyValueCache::len).collect();
    let columns = inputs.key().ncols() + inputs.value().ncols();
    let keys = lens.iter().sum::<usize>() + inputs.num_keys();

    let mut rest = Rest::new(out);
    let mut results: Vec<Result<()>> = caches.iter().map(|_| Ok(())).collect();
    let tasks = caches.iter_mut().zip(&mut results).enumerate().map(|(number, (cache, result))| {
        let inputs = segments.map_or(*inputs, |segments| inputs.segment(segments, number));
        let out = rest.take(inputs.num_queries());
        (inputs, cache, out, result)
    });
    let work = keys.saturating_mul(columns);
    parallel::for_each(tasks.collect(), work, |(inputs, cache, out, result)| {
        *result = cache.append_and_attend(&inputs, out, &forward);
    });
    let result: Result<()> = results.into_iter().collect();
    if result.is_err() {
        caches.iter_mut().zip(lens).for_each(|(cache, len)| cache.truncate(len));
    }
    result
}

/// Refuses what counts the pairs of new queries and new keys, because there are cached keys too.
fn check_channels<F: Float>(mechanism: &'static str, inputs: &Inputs<'_, F>) -> Result<()> {
    if inputs.has_mask() {
        return Err(Error::Unsupported { mechanism: mechanism.into(), channel: Channel::Mask });
    }
    let of_pairs = [
        Channel::Bias,
        Channel::Dropout,
        Channel::PairWeights,
        Channel::EdgeFeatures,
        Channel::Distances,
        Channel::EdgeLayers,
        Channel::Latent,
    ];
    inputs.check_absent(mechanism, &of_pairs)?;
    if let Pattern::Graph(_) = inputs.pattern() {
        return Err(Error::config("inputs", "dense or packed inputs to decode", "a graph"));
    }
    if inputs.is_selected() {
        return Err(Error::config("inputs", "all queries to decode", "selected queries"));
    }
    Ok(())
}

/// Rows of a matrix that grows at its end and shrinks at both.
#[derive(Clone, Debug, Default)]
struct GrowingRows<F> {
    /// Numbers before `start` are those of removed rows.
    data: Vec<F>,
    start: usize,
    columns: usize,
}

impl<F: PartialEq> PartialEq for GrowingRows<F> {
    fn eq(&self, other: &Self) -> bool {
        self.columns == other.columns && self.data[self.start..] == other.data[other.start..]
    }
}

impl<F: Float> GrowingRows<F> {
    fn view(&self, len: usize) -> ArrayView2<'_, F> {
        ArrayView2::from_shape((len, self.columns), &self.data[self.start..]).expect("all rows")
    }

    /// Removes all rows.
    fn restart(&mut self, columns: usize) {
        *self = Self { data: std::mem::take(&mut self.data), start: 0, columns };
        self.data.clear();
    }

    /// Makes room for more rows: reuses that of removed rows if it is at least as much as the rest, else
    /// doubles, so that a stream moves each row a constant number of times.
    fn reserve(&mut self, what: &'static str, rows: usize) -> Result<()> {
        let too_large = || Error::TooLarge { what, shape: vec![rows, self.columns] };
        let more = rows.checked_mul(self.columns).ok_or_else(too_large)?;
        if more <= self.data.capacity() - self.data.len() {
            return Ok(());
        }
        let len = self.data.len() - self.start;
        if self.start >= len && more <= self.data.capacity() - len {
            self.data.copy_within(self.start.., 0);
            self.data.truncate(len);
        } else {
            let mut grown = Vec::new();
            let capacity = len.checked_add(more).and_then(|len| len.checked_mul(2));
            let capacity = capacity.ok_or_else(too_large)?;
            grown.try_reserve_exact(capacity).map_err(|_| too_large())?;
            grown.extend_from_slice(&self.data[self.start..]);
            self.data = grown;
        }
        self.start = 0;
        Ok(())
    }

    fn extend(&mut self, rows: ArrayView2<'_, F>) {
        match rows.as_slice() {
            Some(rows) => self.data.extend_from_slice(rows),
            None => self.data.extend(&rows),
        }
    }

    fn remove(&mut self, rows: Range<usize>) {
        let Self { data, start, columns } = self;
        let [first, end] = [rows.start, rows.end].map(|row| *start + row * *columns);
        if first - *start < data.len() - end {
            // The rows before move towards the rows after.
            data.copy_within(*start..first, *start + (end - first));
            *start += end - first;
        } else {
            data.drain(first..end);
        }
    }
}

#[cfg(feature = "serde")]
mod serde_impl {
    use super::{Float, KeyValueCache};
    use ndarray::{Array2, ArrayView2};
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize)]
    #[serde(rename = "KeyValueCache", bound = "F: Serialize + Clone")]
    struct Lent<'c, F> {
        key: ArrayView2<'c, F>,
        value: ArrayView2<'c, F>,
        positions: Option<ArrayView2<'c, F>>,
    }

    #[derive(Deserialize)]
    #[serde(rename = "KeyValueCache", deny_unknown_fields, bound = "F: Deserialize<'de>")]
    struct Owned<F> {
        key: Array2<F>,
        value: Array2<F>,
        positions: Option<Array2<F>>,
    }

    impl<F: Float + Serialize> Serialize for KeyValueCache<F> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let (key, value, positions) = (self.key(), self.value(), self.positions());
            Lent { key, value, positions }.serialize(serializer)
        }
    }

    impl<'de, F: Float + Deserialize<'de>> Deserialize<'de> for KeyValueCache<F> {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let Owned { key, value, positions } = Owned::deserialize(deserializer)?;
            let mut cache = Self::new();
            let appended = match &positions {
                Some(positions) => cache.append_at(key.view(), value.view(), positions.view()),
                None => cache.append(key.view(), value.view()),
            };
            appended.map_err(D::Error::custom)?;
            Ok(cache)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;

    /// Appends rows of two columns with ascending numbers.
    fn append(rows: &mut GrowingRows<f64>, numbers: Range<usize>) {
        let new = Array2::from_shape_fn((numbers.len(), 2), |(row, column)| {
            ((numbers.start + row) * 2 + column) as f64
        });
        rows.reserve("rows", new.nrows()).unwrap();
        rows.extend(new.view());
    }

    #[test]
    fn a_window_over_a_stream_keeps_its_memory_and_moves_rows_rarely() {
        let mut rows = GrowingRows { columns: 2, ..GrowingRows::default() };
        let mut moves = 0;
        for step in 0..10_000 {
            append(&mut rows, step..step + 1);
            let sinks = 3;
            // Three sinks and the last ten.
            if step >= 13 {
                moves += usize::from(rows.start == 0);
                rows.remove(sinks..sinks + 1);
            }
            let len = (step + 1).min(13);
            let view = rows.view(len);
            let expected = |row: usize| {
                if row < sinks { row } else { step + 1 + row - len }
            };
            for (row, numbers) in view.rows().into_iter().enumerate() {
                assert_eq!(numbers[0], 2.0 * expected(row) as f64, "{step}");
                assert_eq!(numbers[1], 2.0 * expected(row) as f64 + 1.0, "{step}");
            }
        }
        assert!(rows.data.capacity() < 13 * 2 * 6, "{}", rows.data.capacity());
        assert!(moves < 10_000 / 10, "{moves}");
    }

    #[test]
    fn any_rows_are_removed() {
        for len in [0, 1, 2, 7] {
            for start in 0..=len {
                for end in start..=len {
                    let mut rows = GrowingRows { columns: 2, ..GrowingRows::default() };
                    append(&mut rows, 0..len);
                    rows.remove(start..end);
                    append(&mut rows, len..len + 2);
                    let left: Vec<usize> = (0..start).chain(end..len + 2).collect();
                    let view = rows.view(left.len());
                    let numbers: Vec<usize> =
                        view.column(0).iter().map(|&x| x as usize / 2).collect();
                    assert_eq!(numbers, left);
                }
            }
        }
    }
}
