//! Running independent parts of a problem on threads.

use ndarray::{ArrayViewMut2, Axis};
use std::ops::Range;

/// The number of multiplications, about 50 µs of work, below which waking other threads costs more than
/// it saves.
#[cfg(feature = "parallel")]
const WORTH_SHARING: usize = 4_000_000;

/// Runs a task for each part. Each task writes to its own memory, so neither their order nor the number
/// of threads changes the result.
pub(crate) fn for_each<T: Send>(parts: Vec<T>, work: usize, run: impl Fn(T) + Send + Sync) {
    // The kernels are compiled into `run`; if called in two places, it would be compiled twice.
    let run: &(dyn Fn(T) + Send + Sync) = &run;
    #[cfg(feature = "parallel")]
    if shares(work) > 1 && parts.len() > 1 {
        use std::sync::{Mutex, PoisonError};
        let parts: Vec<_> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
        return for_each_index(parts.len(), &|index| {
            let part = parts[index].lock().unwrap_or_else(PoisonError::into_inner).take();
            part.into_iter().for_each(run);
        });
    }
    let _ = work;
    parts.into_iter().for_each(run);
}

/// Returns the number of threads that would share this work.
pub(crate) fn shares(work: usize) -> usize {
    #[cfg(feature = "parallel")]
    if work >= WORTH_SHARING {
        return rayon::current_num_threads();
    }
    let _ = work;
    1
}

/// Not generic, so that the code that shares work among threads is compiled once, not for every task.
///
/// The calling thread takes tasks too, so it does not wait while others wake, which may take longer than all of the
/// tasks.
#[cfg(feature = "parallel")]
fn for_each_index(len: usize, run: &(dyn Fn(usize) + Sync)) {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let next = AtomicUsize::new(0);
    let take_tasks = || loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        if index >= len {
            return;
        }
        run(index);
    };
    let others = len.min(rayon::current_num_threads()) - 1;
    rayon::in_place_scope(|scope| {
        for _ in 0..others {
            scope.spawn(|_| take_tasks());
        }
        take_tasks();
    });
}

/// 0..len in steps.
pub(crate) fn ranges(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(step.max(1)).map(move |start| start..len.min(start + step))
}

/// 0..len in at most `count` parts of about the same length, in whole blocks.
pub(crate) fn parts(len: usize, block: usize, count: usize) -> Vec<Range<usize>> {
    parts_of_work(len, block, count, |_| 1)
}

/// 0..len in at most `count` parts of about the same work, in whole blocks, given that of each block.
pub(crate) fn parts_of_work(
    len: usize,
    block: usize,
    count: usize,
    work: impl Fn(Range<usize>) -> usize,
) -> Vec<Range<usize>> {
    let blocks: Vec<_> = ranges(len, block).collect();
    let count = count.min(blocks.len()) as u128;
    // Every block has a fixed cost.
    let work = |block: &Range<usize>| 1 + work(block.clone()) as u128;
    let total: u128 = blocks.iter().map(work).sum();
    let (mut parts, mut start, mut done) = (Vec::new(), 0, 0);
    for block in &blocks {
        let shares = [done, done + work(block)].map(|done| done * count / total);
        done += work(block);
        if shares[1] > shares[0] {
            parts.push(start..block.end);
            start = block.end;
        }
    }
    parts
}

/// The rows of a matrix that have not been handed out yet.
pub(crate) struct Rest<'a, F>(Option<ArrayViewMut2<'a, F>>);

impl<'a, F> Rest<'a, F> {
    pub(crate) fn new(matrix: ArrayViewMut2<'a, F>) -> Self {
        Self(Some(matrix))
    }

    /// Returns the next rows.
    ///
    /// # Panics
    /// If there are not enough rows.
    pub(crate) fn take(&mut self, len: usize) -> ArrayViewMut2<'a, F> {
        let rest = self.0.take().expect("an earlier call did not panic");
        let (chunk, rest) = rest.split_at(Axis(0), len);
        self.0 = Some(rest);
        chunk
    }
}

/// Splits the rows of a matrix into chunks of these lengths.
pub(crate) fn row_chunks<F>(
    matrix: ArrayViewMut2<'_, F>,
    lens: impl IntoIterator<Item = usize>,
) -> impl Iterator<Item = ArrayViewMut2<'_, F>> {
    let mut rest = Rest::new(matrix);
    lens.into_iter().map(move |len| rest.take(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_whole_blocks_and_cover_everything_once() {
        let triangle = |block: Range<usize>| block.end;
        let sizes = [(0, 3, 4), (1, 3, 4), (12, 3, 4), (13, 3, 4), (100, 7, 4), (5, 9, 1)];
        for (len, block, count, parts) in sizes.into_iter().flat_map(|(len, block, count)| {
            let of_work = parts_of_work(len, block, count, triangle);
            [parts(len, block, count), of_work].map(|parts| (len, block, count, parts))
        }) {
            assert!(parts.len() <= count);
            let ends: Vec<usize> = parts.iter().map(|part| part.end).collect();
            let starts: Vec<usize> = parts.iter().map(|part| part.start).collect();
            assert_eq!(starts.first().copied().unwrap_or(0), 0);
            assert_eq!(ends.last().copied().unwrap_or(0), len);
            assert!(starts.iter().skip(1).zip(&ends).all(|(start, end)| start == end));
            assert!(starts.iter().all(|start| start % block == 0));
            assert!(parts.iter().all(|part| !part.is_empty()));
        }
    }

    #[cfg(feature = "parallel")]
    #[test]
    fn each_task_runs_once_on_any_number_of_threads() {
        use std::sync::Mutex;
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let pool = pool.expect("threads");
            for (len, work) in [(0, WORTH_SHARING), (1, WORTH_SHARING), (7, 0), (7, WORTH_SHARING)]
            {
                let done = Mutex::new(Vec::new());
                pool.install(|| {
                    for_each((0..len).collect(), work, |task: usize| {
                        // Tasks that share work of their own.
                        for_each(vec![0, 1], work, |part| done.lock().unwrap().push((task, part)));
                    });
                });
                let mut done = done.into_inner().unwrap();
                done.sort_unstable();
                let expected: Vec<_> = (0..len).flat_map(|task| [(task, 0), (task, 1)]).collect();
                assert_eq!(done, expected, "{threads} threads");
            }
        }
    }

    #[test]
    fn parts_have_the_same_work() {
        let work = |part: &Range<usize>| part.clone().map(|query| query + 1).sum::<usize>();
        let parts = parts_of_work(4096, 32, 4, |block| work(&block));
        let of_parts: Vec<_> = parts.iter().map(work).collect();
        assert_eq!(parts.len(), 4);
        let fair = work(&(0..4096)) / 4;
        assert!(of_parts.iter().all(|work| work.abs_diff(fair) < fair / 10), "{of_parts:?}");
    }
}
