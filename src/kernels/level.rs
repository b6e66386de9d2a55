//! The instruction set that the kernels use.

use crate::error::{Error, Result};
use fearless_simd::Level;
use std::sync::OnceLock;

/// The environment variable that [`hold_down`] reads.
const VARIABLE: &str = "GRAPH_ATTENTION_SIMD";

static LEVEL: OnceLock<Level> = OnceLock::new();

/// Returns the best instruction set of the CPU, unless it is limited.
pub(crate) fn level() -> Level {
    *LEVEL.get_or_init(Level::new)
}

/// Sets the instruction set from the environment variable for the rest of the process, and returns its
/// name: `avx512`, `avx2`, `sse2`, or with the feature `scalar` also `scalar`; the best one if the
/// variable is not set.
pub(crate) fn hold_down() -> Result<String> {
    let best = Level::new();
    let level = match std::env::var(VARIABLE) {
        Err(_) => best,
        Ok(name) => named(best, &name).ok_or_else(|| {
            let expected = "avx512, avx2, sse2 or scalar, as far as CPU and features have it";
            Error::config(VARIABLE, expected, name)
        })?,
    };
    let (wanted, used) = (name(level), name(*LEVEL.get_or_init(|| level)));
    if wanted == used { Ok(wanted) } else { Err(Error::config(VARIABLE, wanted, used)) }
}

/// As in `avx2`.
fn name(level: Level) -> String {
    let name = format!("{level:?}");
    name.split(['(', ' ']).next().unwrap_or_default().to_lowercase()
}

fn named(best: Level, name: &str) -> Option<Level> {
    #[cfg(target_arch = "x86_64")]
    {
        use fearless_simd::Simd;
        match name {
            "avx512" => return best.as_avx512().map(Simd::level),
            "avx2" => return best.as_avx2().map(Simd::level),
            "sse2" => return best.as_sse2().map(Simd::level),
            _ => {}
        }
    }
    #[cfg(feature = "scalar")]
    if name == "scalar" {
        return Some(Level::fallback());
    }
    let _ = (best, name);
    None
}
