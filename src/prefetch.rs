//! Prefetching of rows before their use.

/// The largest number of prefetched lines of a row; the CPU fetches later lines by itself.
const MOST_LINES: usize = 8;
const LINE: usize = 64;

/// Prefetches the first lines of a row and the last one. Only affects the time that reading it takes.
#[inline(always)]
pub(crate) fn prefetch<F>(row: &[F]) {
    let len_of_line = LINE / size_of::<F>();
    for line in row.chunks(len_of_line).take(MOST_LINES) {
        prefetch_line(&line[0]);
    }
    // A row that does not start where a line starts has its end in one more line.
    if let Some(last) = row.last().filter(|_| row.len() >= len_of_line) {
        prefetch_line(last);
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(unsafe_code, reason = "there is no safe prefetch; without, graphs are a third slower")]
fn prefetch_line<F>(value: &F) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: the instruction is part of every x86-64 and only a hint: it reads nothing, writes nothing
    // and never faults, and the address is that of a live value.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) }
}

/// Other CPUs have no such instruction in stable Rust.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn prefetch_line<F>(_: &F) {}
