//! The inner loops, on slices: the only place where speed may cost beauty.
//!
//! The instruction set is chosen at run time by `fearless_simd`, once for each task; every function
//! that computes in vectors is generic over it and `#[inline(always)]`, since a call across the
//! boundary costs ten times the work. `matmul`, `exp2` and `vector` are the primitives, `problem` is
//! softmax attention laid out for them. `dense` walks it in tiles of queries × keys, `rows` row by
//! row; neither ever holds more than a tile of logits. What they are checked against is the plain
//! `ScaledDotProduct`.

/// Calls `$op` with the token `$simd` of an instruction set, compiled for it.
///
/// `fearless_simd::dispatch!` compiles its argument for every x86 level there is; SSE4.2 is as slow
/// as SSE2 here, and each level costs seconds of build time.
macro_rules! dispatch {
    ($level:expr, $simd:ident => $op:expr) => {{
        let level: fearless_simd::Level = $level;
        #[cfg(target_arch = "x86_64")]
        {
            use fearless_simd::Simd as _;
            if let Some($simd) = level.as_avx512() {
                $simd.vectorize(#[inline(always)] || $op)
            } else if let Some($simd) = level.as_avx2() {
                $simd.vectorize(#[inline(always)] || $op)
            } else if let Some($simd) = level.as_sse2() {
                $simd.vectorize(#[inline(always)] || $op)
            } else {
                without_sse2!(level, $simd => $op)
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            fearless_simd::dispatch!(level, $simd => $op)
        }
    }};
}

/// Every x86-64 has SSE2; only the tests of the kernels also run without.
#[cfg(target_arch = "x86_64")]
macro_rules! without_sse2 {
    ($level:expr, $simd:ident => $op:expr) => {
        match $level {
            #[cfg(test)]
            fearless_simd::Level::Fallback($simd) => $op,
            _ => unreachable!("SSE2 is part of x86-64"),
        }
    };
}

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
        levels.extend(best.as_sse2().map(Simd::level));
    }
    levels
}
