//! Parameters and buffers in [safetensors](https://huggingface.co/docs/safetensors) files, which PyTorch
//! and most other libraries read and write. Requires the feature `safetensors`.
//!
//! ```
//! use graph_attention::{Flash, MultiHead, MultiHeadConfig, params, safetensors};
//! use graph_attention::rand::{SeedableRng, rngs::Xoshiro256PlusPlus};
//!
//! let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
//! let config = MultiHeadConfig::new(4, 2);
//! let trained: MultiHead<f32, Flash> = config.init(Flash::new(), &mut rng)?;
//! let bytes = safetensors::to_bytes(&trained)?; // or `save`, to a file
//!
//! let mut fresh = config.init(Flash::new(), &mut rng)?;
//! safetensors::from_bytes(&mut fresh, &bytes)?; // or `load`, from a file
//! assert_eq!(params::state(&fresh), params::state(&trained));
//! # Ok::<(), graph_attention::Error>(())
//! ```
//!
//! A file of a whole model contains several mechanisms, each with a prefix. [`read`] extracts one of
//! them, for `from_params` of its configuration or for [`params::load_state`]:
//!
//! ```no_run
//! use graph_attention::{Flash, MultiHead, MultiHeadConfig, safetensors};
//!
//! let state = safetensors::read("model.safetensors", "encoder.layers.0.self_attn.")?;
//! let layer: MultiHead<f32, _> = MultiHeadConfig::new(512, 8).from_params(Flash::new(), state)?;
//! # Ok::<(), graph_attention::Error>(())
//! ```
//!
//! To save several mechanisms in one file, implement [`Params`] for the struct that holds them, with a
//! prefix for the names of each.
//!
//! **Element types.** Parameters are written as `f32` or `f64`, and are restored exactly (a NaN as some
//! NaN). F64, F32, BF16 and F16 tensors can be read as either; F64 is rounded to the nearest `f32`.
//!
//! **Untrusted files.** An invalid file is refused with an error, without a panic and with memory at most
//! proportional to its size. The whole file is read into memory.

use crate::error::{Error, Result};
use crate::kernels::Float;
use crate::params::{self, Params};
use ::safetensors::tensor::{Dtype, Metadata, View};
use ndarray::{ArrayD, ArrayViewD};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// The name that the format reserves for its metadata.
const RESERVED: &str = "__metadata__";

/// The largest header, as in other readers.
const MAX_HEADER: usize = 100_000_000;

/// The name in errors for bytes that are not from a file.
const BYTES: &str = "safetensors bytes";

/// Saves all parameters and buffers under their names. A file at `path` is overwritten in place; if
/// writing is interrupted, [`load`] refuses the incomplete file.
///
/// # Errors
/// [`Error::File`] if the file cannot be written, otherwise as [`to_bytes`].
pub fn save<F: Float>(params: &(impl Params<F> + ?Sized), path: impl AsRef<Path>) -> Result<()> {
    let (path, bytes) = (path.as_ref(), to_bytes(params)?);
    std::fs::write(path, bytes).map_err(|error| file(path.display(), "a writable file", error))
}

/// Returns the contents of the file that [`save`] writes; the same bytes for the same parameters.
///
/// # Errors
/// [`Error::DuplicateParam`] if two arrays have the same name, [`Error::InvalidArgument`] for the name
/// `__metadata__`, which the format reserves, [`Error::File`] if the names and shapes take more than the
/// format's limit of 100 MB.
pub fn to_bytes<F: Float>(params: &(impl Params<F> + ?Sized)) -> Result<Vec<u8>> {
    let mut tensors = BTreeMap::new();
    let mut result = Ok(());
    let mut add = |name: &str, param: ArrayViewD<'_, F>| {
        if name == RESERVED {
            result = Err(Error::config("name of a parameter", "a name that is not reserved", name));
        } else if tensors.insert(name.to_owned(), Tensor::new(param)).is_some() {
            result = Err(Error::DuplicateParam { name: name.to_owned() });
        }
    };
    params.visit_params(&mut add);
    params.visit_buffers(&mut add);
    result?;
    ::safetensors::serialize(tensors, None)
        .map_err(|error| file(BYTES, "parameters that fit the format", error))
}

/// Sets all parameters and buffers from a file that contains them, in any order, and nothing else. On an
/// error nothing is changed.
///
/// # Errors
/// As [`read`] and [`params::load_state`].
pub fn load<F: Float>(
    params: &mut (impl Params<F> + ?Sized),
    path: impl AsRef<Path>,
) -> Result<()> {
    params::load_state(params, read(path, "")?)
}

/// Like [`load`], but from the contents of a file.
///
/// # Errors
/// As [`read_bytes`] and [`params::load_state`].
pub fn from_bytes<F: Float>(params: &mut (impl Params<F> + ?Sized), bytes: &[u8]) -> Result<()> {
    params::load_state(params, read_bytes(bytes, "")?)
}

/// Reads the tensors whose names begin with `prefix`, in the order of the file; the prefix is removed
/// from the names. Other tensors may have any type; the prefix `""` reads all.
///
/// # Errors
/// [`Error::File`] if the file cannot be read, is not a complete safetensors file, or has a tensor with
/// this prefix that is not F64, F32, BF16 or F16.
pub fn read<F: Float>(path: impl AsRef<Path>, prefix: &str) -> Result<Vec<(String, ArrayD<F>)>> {
    let path = path.as_ref();
    let bytes =
        std::fs::read(path).map_err(|error| file(path.display(), "a readable file", error))?;
    tensors(&path.display().to_string(), &bytes, prefix)
}

/// Like [`read`], but from the contents of a file.
///
/// # Errors
/// As [`read`].
pub fn read_bytes<F: Float>(bytes: &[u8], prefix: &str) -> Result<Vec<(String, ArrayD<F>)>> {
    tensors(BYTES, bytes, prefix)
}

fn file(what: impl ToString, expected: &'static str, actual: impl ToString) -> Error {
    Error::File { what: what.to_string(), expected, actual: actual.to_string() }
}

/// A parameter or buffer as stored in the file.
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Tensor {
    fn new<F: Float>(param: ArrayViewD<'_, F>) -> Self {
        let values = param.iter().map(|value| value.as_f64());
        let single = size_of::<F>() == size_of::<f32>();
        let (dtype, data) = if single {
            (Dtype::F32, values.flat_map(|value| (value as f32).to_le_bytes()).collect())
        } else {
            (Dtype::F64, values.flat_map(f64::to_le_bytes).collect())
        };
        Self { dtype, shape: param.shape().to_vec(), data }
    }
}

impl View for Tensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.data.as_slice().into()
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// Returns the tensors with a prefix; errors name `source`.
fn tensors<F: Float>(source: &str, bytes: &[u8], prefix: &str) -> Result<Vec<(String, ArrayD<F>)>> {
    let (metadata, data) =
        split(bytes).map_err(|actual| file(source, "a complete safetensors file", actual))?;
    let mut tensors = Vec::new();
    for name in metadata.offset_keys() {
        let (Some(key), Some(info)) = (name.strip_prefix(prefix), metadata.info(&name)) else {
            continue;
        };
        let refused = |expected, actual| file(format!("{source}: tensor {name}"), expected, actual);
        // `Metadata` has checked that the tensors are contiguous and that each has the bytes of its
        // shape, and `split` that the last one ends with the data.
        let (start, end) = info.data_offsets;
        let values = decode(info.dtype, &data[start..end])
            .ok_or_else(|| refused("F64, F32, BF16 or F16", info.dtype.to_string()))?;
        // The shape of an empty tensor may still be too large for `ndarray`.
        let value = ArrayD::from_shape_vec(info.shape.as_slice(), values)
            .map_err(|_| refused("a shape that fits in memory", format!("{:?}", info.shape)))?;
        tensors.push((key.to_owned(), value));
    }
    Ok(tensors)
}

/// Returns the header of a file and its data, or a description of what is wrong.
///
/// `SafeTensors::deserialize` does the same, but adds the sizes without checks and so panics in debug
/// builds if the header claims nearly 2⁶⁴ bytes.
fn split(bytes: &[u8]) -> std::result::Result<(Metadata, &[u8]), String> {
    let (length, rest) =
        bytes.split_first_chunk().ok_or_else(|| format!("{} bytes", bytes.len()))?;
    let length = u64::from_le_bytes(*length);
    let (header, data) = (usize::try_from(length).ok().filter(|&length| length <= MAX_HEADER))
        .and_then(|length| rest.split_at_checked(length))
        .ok_or_else(|| format!("a header of {length} bytes in a file of {} bytes", bytes.len()))?;
    let metadata: Metadata =
        serde_json::from_slice(header).map_err(|error| format!("an invalid header: {error}"))?;
    let claimed = metadata.data_len();
    if claimed != data.len() {
        return Err(format!(
            "a header for {claimed} bytes of data, followed by {} bytes",
            data.len()
        ));
    }
    Ok((metadata, data))
}

/// Returns the elements of a tensor; `None` for a type that parameters never have.
fn decode<F: Float>(dtype: Dtype, data: &[u8]) -> Option<Vec<F>> {
    Some(match dtype {
        Dtype::F64 => elements(data, f64::from_le_bytes),
        Dtype::F32 => elements(data, |bytes| f32::from_le_bytes(bytes).into()),
        // The upper half of an f32.
        Dtype::BF16 => elements(data, |[low, high]| f32::from_le_bytes([0, 0, low, high]).into()),
        Dtype::F16 => elements(data, |bytes| half(u16::from_le_bytes(bytes))),
        _ => return None,
    })
}

fn elements<F: Float, const N: usize>(data: &[u8], value: impl Fn([u8; N]) -> f64) -> Vec<F> {
    data.as_chunks().0.iter().map(|&bytes| F::from_f64(value(bytes))).collect()
}

/// Converts an IEEE half: 1 bit of sign, 5 of exponent, 10 of mantissa.
fn half(bits: u16) -> f64 {
    let (exponent, mantissa) = (u64::from(bits >> 10 & 31), u64::from(bits & 1023));
    let size = match (exponent, mantissa) {
        // Subnormal: multiples of 2⁻²⁴.
        (0, _) => mantissa as f64 / f64::from(1 << 24),
        (31, 0) => f64::INFINITY,
        (31, _) => f64::NAN,
        // The exponent's bias is 15 here and 1023 in an f64.
        _ => f64::from_bits((exponent + 1023 - 15) << 52 | mantissa << 42),
    };
    if bits >> 15 == 0 { size } else { -size }
}
