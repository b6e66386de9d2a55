//! The links of an HNSW index: how they are set, and how a search follows them.

use crate::dropout::mix;
use crate::kernels::Float;
use crate::kernels::keys::{Keys, Origin};
use crate::kernels::level::level;
use crate::kernels::parallel::{self, ranges};
use crate::prefetch::prefetch;
use std::collections::VecDeque;
use std::ops::Range;

/// The number of keys that are inserted at the same time. A constant, so that the links do not depend on
/// the number of threads.
const BATCH: usize = 64;
/// The number of keys of a batch that one task searches for.
const PER_TASK: usize = 8;
/// The number of keys in front whose links are prefetched.
const AHEAD: usize = 8;
/// The number of links that a key keeps to others below it in the tree. Few, since they are not the best links;
/// two are enough that most keys have room.
const CHILDREN: usize = 2;
/// The largest number of layers.
const MAX_LAYERS: usize = 16;

/// A key and its score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scored {
    pub(super) key: u32,
    pub(super) score: f32,
}

/// A [`Scored`] as a number: the better, the smaller; of equal scores the lower key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Packed(u64);

impl Packed {
    /// Marks a key whose links were followed. So keys have 31 bits.
    const FOLLOWED: u64 = 1 << 31;

    #[inline(always)]
    fn new(key: u32, score: f32) -> Self {
        let bits = score.to_bits();
        // Ascends as the score descends.
        let order = if bits >> 31 == 1 { bits } else { !bits & (u32::MAX >> 1) };
        Self(u64::from(order) << 32 | u64::from(key))
    }

    #[inline(always)]
    fn key(self) -> u32 {
        (self.0 & (Self::FOLLOWED - 1)) as u32
    }

    #[inline(always)]
    fn unpack(self) -> Scored {
        let order = (self.0 >> 32) as u32;
        let bits = if order >> 31 == 1 { order } else { !order & (u32::MAX >> 1) };
        Scored { key: self.key(), score: f32::from_bits(bits) }
    }
}

/// The memory of a search, kept from one to the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// One bit for each key.
    visited: Vec<u64>,
    pool: Vec<Packed>,
    ids: Vec<u32>,
    scores: Vec<f32>,
}

/// The links of all keys. A key that is not [linked](Self::is_linked) has none.
///
/// In the lowest layer, the first links of a key are *kept*: they form a tree over all linked keys, in
/// both directions, so every key can be reached from every other.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Links {
    /// M.
    pub(super) connections: usize,
    /// For each key [`stride`](Self::stride) numbers: the number of links, the number of kept ones, and
    /// the links.
    ground: Vec<u32>,
    /// For each key and each layer above, M + 1 numbers: the number of links, and the links.
    pub(super) upper: Vec<Vec<u32>>,
    pub(super) linked: Vec<bool>,
    /// Where searches start: the first key of the highest layer.
    pub(super) entry: Option<u32>,
    pub(super) top: usize,
}

impl Links {
    pub(super) fn new(connections: usize) -> Self {
        let (ground, upper, linked) = Default::default();
        Self { connections, ground, upper, linked, entry: None, top: 0 }
    }

    /// Reserves memory for as many more keys, none of them linked; returns whether there is enough.
    pub(super) fn grow(&mut self, more: usize) -> bool {
        let len = more.saturating_mul(self.stride());
        let reserved = self.ground.try_reserve(len).and_then(|()| self.upper.try_reserve(more));
        let is_enough = reserved.and_then(|()| self.linked.try_reserve(more)).is_ok();
        if is_enough {
            self.ground.resize(self.ground.len() + len, 0);
            self.upper.resize(self.upper.len() + more, Vec::new());
            self.linked.resize(self.linked.len() + more, false);
        }
        is_enough
    }

    fn stride(&self) -> usize {
        2 * self.connections + 2
    }

    pub(super) fn is_linked(&self, key: u32) -> bool {
        self.linked[key as usize]
    }

    /// The largest number of links of a key in a layer.
    pub(super) fn capacity(&self, layer: usize) -> usize {
        if layer == 0 { 2 * self.connections } else { self.connections }
    }

    /// Returns the highest layer of a key.
    pub(super) fn top_of(&self, key: u32) -> usize {
        self.upper[key as usize].len() / (self.connections + 1)
    }

    /// Draws the highest layer of a key, from its number alone: in each layer a key is with probability
    /// 1 / M also in the next.
    pub(super) fn draw(&self, key: u32) -> usize {
        let uniform = ((mix(u64::from(key)) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let layer = -uniform.ln() / (self.connections as f64).ln();
        (layer as usize).min(MAX_LAYERS - 1)
    }

    #[inline(always)]
    pub(super) fn of(&self, key: u32, layer: usize) -> &[u32] {
        if layer == 0 {
            let list = &self.ground[key as usize * self.stride()..];
            &list[2..2 + list[0] as usize]
        } else {
            let list = &self.upper[key as usize][(layer - 1) * (self.connections + 1)..];
            &list[1..1 + list[0] as usize]
        }
    }

    /// The number of kept links.
    pub(super) fn num_kept(&self, key: u32, layer: usize) -> usize {
        if layer == 0 { self.ground[key as usize * self.stride() + 1] as usize } else { 0 }
    }

    pub(super) fn set(&mut self, key: u32, layer: usize, kept: usize, links: &[u32]) {
        if layer == 0 {
            let stride = self.stride();
            let list = &mut self.ground[key as usize * stride..][..stride];
            (list[0], list[1]) = (links.len() as u32, kept as u32);
            list[2..2 + links.len()].copy_from_slice(links);
        } else {
            let list = &mut self.upper[key as usize][(layer - 1) * (self.connections + 1)..];
            list[0] = links.len() as u32;
            list[1..1 + links.len()].copy_from_slice(links);
        }
    }

    /// Finds keys of the lowest layer: the `ef` best that are accepted, the best first, and all others
    /// that were met on the way and are not worse.
    pub(super) fn search<F: Float>(
        &self,
        keys: &Keys<'_, F>,
        query: &[F],
        ef: usize,
        accepts: impl Fn(u32) -> bool,
        scratch: &mut Scratch,
    ) -> Vec<Scored> {
        let origin = Origin::of_query(query);
        let Some(start) = self.descend(keys, origin, 0, scratch) else { return Vec::new() };
        self.search_layer(keys, origin, 0, &[start], ef, accepts, scratch)
    }

    /// Walks from the entry to ever better keys, down to above `layer`.
    fn descend<F: Float>(
        &self,
        keys: &Keys<'_, F>,
        origin: Origin<'_, F>,
        layer: usize,
        scratch: &mut Scratch,
    ) -> Option<Scored> {
        let entry = self.entry?;
        F::scores(level(), keys, origin, &[entry], &mut scratch.scores);
        let mut best = Packed::new(entry, scratch.scores[0]);
        for layer in (layer + 1..=self.top).rev() {
            loop {
                let links = self.of(best.key(), layer);
                F::scores(level(), keys, origin, links, &mut scratch.scores);
                let packed = links.iter().zip(&scratch.scores);
                let nearest = packed.map(|(&key, &score)| Packed::new(key, score)).min();
                match nearest.filter(|&nearest| nearest < best) {
                    Some(nearest) => best = nearest,
                    None => break,
                }
            }
        }
        Some(best.unpack())
    }

    /// Follows the links of one layer, always those of the best key so far, until those of the best `ef`
    /// are followed.
    #[expect(clippy::too_many_arguments, reason = "all of them vary")]
    fn search_layer<F: Float>(
        &self,
        keys: &Keys<'_, F>,
        origin: Origin<'_, F>,
        layer: usize,
        starts: &[Scored],
        ef: usize,
        accepts: impl Fn(u32) -> bool,
        scratch: &mut Scratch,
    ) -> Vec<Scored> {
        let Scratch { visited, pool, ids, scores } = scratch;
        visited.clear();
        visited.resize(self.linked.len().div_ceil(64), 0);
        let mut visit = |key: u32| {
            let (word, bit) = (&mut visited[key as usize / 64], 1 << (key % 64));
            let is_new = *word & bit == 0;
            *word |= bit;
            is_new
        };
        // The best so far, sorted. It ends with the ef-th accepted key.
        pool.clear();
        pool.extend(starts.iter().map(|start| Packed::new(start.key, start.score)));
        pool.sort_unstable();
        pool.iter().for_each(|start| _ = visit(start.key()));
        let mut accepted = pool.iter().filter(|start| accepts(start.key())).count();
        let mut next = 0;
        while let Some(best) = pool.get_mut(next) {
            let key = best.key();
            let is_followed = best.0 & Packed::FOLLOWED != 0;
            best.0 |= Packed::FOLLOWED;
            next += 1;
            if is_followed {
                continue;
            }
            let links = self.of(key, layer);
            ids.resize(links.len(), 0);
            let mut count = 0;
            for &link in links {
                // Without a branch, which no CPU could predict.
                ids[count] = link;
                count += usize::from(visit(link));
            }
            ids.truncate(count);
            F::scores(level(), keys, origin, ids, scores);
            for (&key, &score) in ids.iter().zip(scores.iter()) {
                let found = Packed::new(key, score);
                let is_full = accepted >= ef;
                if is_full && pool.last().is_none_or(|&last| found > last) {
                    continue;
                }
                let place = pool.partition_point(|&other| other < found);
                pool.insert(place, found);
                next = next.min(place);
                // The links of those in front will soon be followed.
                if layer == 0 && place < next + AHEAD {
                    prefetch(&self.ground[key as usize * self.stride()..][..self.stride()]);
                }
                accepted += usize::from(accepts(key));
                if accepted > ef {
                    pool.pop();
                    accepted -= 1;
                }
                while accepted == ef && pool.last().is_some_and(|last| !accepts(last.key())) {
                    pool.pop();
                }
            }
        }
        pool.iter().map(|found| found.unpack()).collect()
    }

    /// Links keys, in batches: the candidates of a batch are found among the earlier keys, on several
    /// threads, and among the batch itself.
    pub(super) fn insert<F: Float>(&mut self, keys: &Keys<'_, F>, new: &[u32], ef: usize) {
        for batch in ranges(new.len(), BATCH) {
            self.insert_batch(keys, &new[batch], ef);
        }
    }

    fn insert_batch<F: Float>(&mut self, keys: &Keys<'_, F>, batch: &[u32], ef: usize) {
        let tops: Vec<_> = batch.iter().map(|&key| self.draw(key)).collect();
        let mut found = vec![Candidates::default(); batch.len()];
        let tasks: Vec<(Range<usize>, &mut [Candidates])> =
            ranges(batch.len(), PER_TASK).zip(found.chunks_mut(PER_TASK)).collect();
        let candidates = ef.saturating_mul(self.stride()).min(self.linked.len());
        let work = batch.len().saturating_mul(candidates).saturating_mul(keys.dim());
        parallel::for_each(tasks, work, |(places, found)| {
            let mut scratch = Scratch::default();
            for (place, found) in places.zip(found) {
                *found = self.candidates(keys, batch, &tops, place, ef, &mut scratch);
            }
        });
        let scratch = &mut Scratch::default();
        for (place, &key) in batch.iter().enumerate() {
            self.linked[key as usize] = true;
            self.upper[key as usize] = vec![0; tops[place] * (self.connections + 1)];
            self.plant(batch, place, &found[place].nearest);
            for (layer, chosen) in found[place].chosen.iter().enumerate() {
                let kept = self.num_kept(key, layer);
                let mut links = self.of(key, layer)[..kept].to_vec();
                let more = chosen.iter().filter(|&chosen| !links.contains(chosen));
                let more: Vec<_> = more.copied().take(self.capacity(layer) - kept).collect();
                links.extend(more);
                self.set(key, layer, kept, &links);
            }
        }
        for (&key, found) in batch.iter().zip(&found) {
            for (layer, chosen) in found.chosen.iter().enumerate() {
                chosen.iter().for_each(|&other| self.link_back(keys, layer, other, key, scratch));
            }
        }
        for (&key, &top) in batch.iter().zip(&tops) {
            if self.entry.is_none() || top > self.top {
                (self.entry, self.top) = (Some(key), top);
            }
        }
    }

    /// Finds candidates for the links of a new key, and chooses among them.
    fn candidates<F: Float>(
        &self,
        keys: &Keys<'_, F>,
        batch: &[u32],
        tops: &[usize],
        place: usize,
        ef: usize,
        scratch: &mut Scratch,
    ) -> Candidates {
        let (key, top) = (batch[place], tops[place]);
        let origin = Origin::of_key(keys, key);
        F::scores(level(), keys, origin, batch, &mut scratch.scores);
        let of_batch = batch.iter().zip(&scratch.scores);
        let of_batch: Vec<_> = of_batch.map(|(&key, &score)| Packed::new(key, score)).collect();
        let mut starts = Vec::from_iter(self.descend(keys, origin, top, scratch));
        let mut answer = Candidates { chosen: vec![Vec::new(); top + 1], nearest: Vec::new() };
        for layer in (0..=top).rev() {
            if layer <= self.top && !starts.is_empty() {
                starts = self.search_layer(keys, origin, layer, &starts, ef, |_| true, scratch);
            }
            let earlier = starts.iter().filter(|_| layer <= self.top);
            let mut all: Vec<_> = earlier.map(|c| Packed::new(c.key, c.score)).collect();
            let others = of_batch.iter().zip(tops).enumerate();
            let others = others.filter(|&(other, (_, &top))| other != place && top >= layer);
            all.extend(others.map(|(_, (packed, _))| packed));
            all.sort_unstable();
            all.truncate(ef);
            // In the lowest layer half of the room is left for links back.
            let most = if layer == 0 { 3 * self.connections / 2 } else { self.connections };
            answer.chosen[layer] = choose(keys, &all, most, scratch);
            if layer == 0 {
                answer.nearest = all.iter().map(|packed| packed.key()).collect();
            }
        }
        answer
    }

    /// Adds the key at a place of the batch to the tree: below the nearest key that has room.
    fn plant(&mut self, batch: &[u32], place: usize, nearest: &[u32]) {
        let key = batch[place];
        let Some(root) = self.entry.or(Some(batch[0])).filter(|&root| root != key) else { return };
        let is_later = |other: &u32| batch[place..].contains(other);
        let mut parents: VecDeque<u32> =
            nearest.iter().copied().filter(|other| !is_later(other)).collect();
        if parents.is_empty() {
            parents.push_back(root);
        }
        let mut parent = root;
        while let Some(next) = parents.pop_front() {
            parent = next;
            if self.num_kept(parent, 0) <= CHILDREN {
                break;
            }
            if parents.is_empty() {
                parents.extend(&self.of(parent, 0)[1..self.num_kept(parent, 0)]);
            }
        }
        let kept = self.num_kept(parent, 0);
        let mut links = self.of(parent, 0).to_vec();
        links.retain(|&link| link != key);
        links.insert(kept, key);
        links.truncate(self.capacity(0));
        self.set(parent, 0, kept + 1, &links);
        self.set(key, 0, 1, &[parent]);
    }

    /// Links `from` to `to`. If `from` has no room, this is decided by the rule of [`choose`], for the new
    /// link and those to keys that are farther.
    fn link_back<F: Float>(
        &mut self,
        keys: &Keys<'_, F>,
        layer: usize,
        from: u32,
        to: u32,
        scratch: &mut Scratch,
    ) {
        let (kept, links) = (self.num_kept(from, layer), self.of(from, layer));
        if links.contains(&to) {
            return;
        }
        let mut links = links.to_vec();
        if links.len() < self.capacity(layer) {
            links.push(to);
            return self.set(from, layer, kept, &links);
        }
        links.push(to);
        F::scores(level(), keys, Origin::of_key(keys, from), &links, &mut scratch.scores);
        let of_from = std::mem::take(&mut scratch.scores);
        links.pop();
        F::scores(level(), keys, Origin::of_key(keys, to), &links, &mut scratch.scores);
        let of_to = &scratch.scores;
        let new = of_from[links.len()];
        if of_from.iter().zip(of_to).any(|(&old, &between)| old >= new && between > new) {
            return;
        }
        let mut left = links[..kept].to_vec();
        let mut worst: Option<(f32, usize)> = None;
        for at in kept..links.len() {
            let old = of_from[at];
            if old < new && of_to[at] > old {
                continue;
            }
            if worst.is_none_or(|(score, _)| old < score) {
                worst = Some((old, left.len()));
            }
            left.push(links[at]);
        }
        if left.len() == links.len() {
            let Some((_, at)) = worst.filter(|&(score, _)| score < new) else { return };
            left.remove(at);
        }
        left.push(to);
        self.set(from, layer, kept, &left);
    }
}

/// The candidates for the links of a new key.
#[derive(Clone, Debug, Default)]
struct Candidates {
    /// For each layer from the lowest.
    chosen: Vec<Vec<u32>>,
    /// In the lowest layer, the nearest first.
    nearest: Vec<u32>,
}

/// Chooses links in different directions: each candidate, the nearest first, unless it is nearer to one
/// already chosen than to the key itself (algorithm 4 of the paper).
fn choose<F: Float>(
    keys: &Keys<'_, F>,
    candidates: &[Packed],
    most: usize,
    scratch: &mut Scratch,
) -> Vec<u32> {
    let mut chosen: Vec<u32> = Vec::with_capacity(most);
    for candidate in candidates.iter().map(|packed| packed.unpack()) {
        if chosen.len() == most {
            break;
        }
        let origin = Origin::of_key(keys, candidate.key);
        // Few at a time, since most candidates are soon excluded.
        let is_apart = chosen.chunks(8).all(|chosen| {
            F::scores(level(), keys, origin, chosen, &mut scratch.scores);
            scratch.scores.iter().all(|&score| score <= candidate.score)
        });
        if is_apart {
            chosen.push(candidate.key);
        }
    }
    chosen
}
