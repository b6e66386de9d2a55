//! Independent tasks.

/// Runs the tasks. Each writes to places of its own, so the order does not matter.
pub(crate) fn for_each<T: Send>(tasks: Vec<T>, _work: usize, run: impl Fn(T) + Send + Sync) {
    tasks.into_iter().for_each(run);
}
