//! The inner loops, on slices: the only place where speed may cost beauty.
//!
//! The instruction set is chosen at run time by `fearless_simd`, once for each task; every function
//! that computes in vectors is generic over it and `#[inline(always)]`, since a call across the
//! boundary costs ten times the work. `matmul`, `exp2` and `vector` are the primitives, `problem` is
//! softmax attention laid out for them. `dense` walks it in tiles of queries × keys, `rows` row by
//! row; neither ever holds more than a tile of logits. What they are checked against is the plain
//! `ScaledDotProduct`.

pub(crate) mod dense;
pub(crate) mod exp2;
pub(crate) mod linear;
pub(crate) mod matmul;
pub(crate) mod parallel;
pub(crate) mod problem;
pub(crate) mod rows;
pub(crate) mod vector;

/// Every instruction set that this CPU has, and none at all.
#[cfg(test)]
pub(crate) fn levels() -> Vec<fearless_simd::Level> {
    use fearless_simd::{Level, Simd};
    let best = Level::new();
    let mut levels = vec![best, Level::fallback()];
    #[cfg(target_arch = "x86_64")]
    {
        levels.extend(best.as_avx2().map(Simd::level));
        levels.extend(best.as_sse4_2().map(Simd::level));
        levels.extend(best.as_sse2().map(Simd::level));
    }
    levels
}
