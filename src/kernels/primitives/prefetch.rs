//! Asking the CPU for rows ahead of their use.

/// Most lines of a row that are asked for: what follows them the CPU fetches by itself.
const MOST_LINES: usize = 8;
const LINE: usize = 64;

/// Asks for the first lines of a row. Changes nothing but the time that reading it takes.
#[inline(always)]
pub(crate) fn prefetch<F>(row: &[F]) {
    let lines = size_of_val(row).div_ceil(LINE).min(MOST_LINES);
    for line in 0..lines {
        prefetch_line(&row[line * LINE / size_of::<F>()]);
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(unsafe_code, reason = "there is no safe prefetch; without, graphs are a third slower")]
fn prefetch_line<F>(value: &F) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: the instruction is part of every x86-64 and only a hint: it reads nothing, writes
    // nothing and never faults, and the address is that of a live value besides.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) }
}

/// No other CPU has one in stable Rust.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn prefetch_line<F>(_: &F) {}
