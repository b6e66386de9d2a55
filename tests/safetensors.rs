//! Saving and loading of safetensors files: bits are preserved, and a bad file changes nothing.
#![cfg(feature = "safetensors")]

mod common;

use allocation_counter::measure;
use common::parameters::{mechanisms, multi_head};
use graph_attention::ndarray::{Array2, ArrayD, ArrayView1, ArrayViewD, ArrayViewMutD, IxDyn};
use graph_attention::{Error, Flash, Float, MultiHeadConfig, Params, Result, params, safetensors};
use std::fmt::Write;
use std::path::PathBuf;

/// Generates arrays with any names.
#[derive(Clone)]
struct Bag<F>(Vec<(String, ArrayD<F>)>);

impl<F: Float> Params<F> for Bag<F> {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, F>)) {
        self.0.iter().for_each(|(name, value)| visitor(name, value.view()));
    }
    fn visit_params_mut<'a>(&'a mut self, visitor: &mut dyn FnMut(&str, ArrayViewMutD<'a, F>)) {
        self.0.iter_mut().for_each(|(name, value)| visitor(name, value.view_mut()));
    }
}

fn bag<F: Float>(params: &[(&str, &[usize], &[F])]) -> Bag<F> {
    let param = |&(name, shape, values): &(&str, &[usize], &[F])| {
        (name.to_owned(), ArrayD::from_shape_vec(IxDyn(shape), values.to_vec()).unwrap())
    };
    Bag(params.iter().map(param).collect())
}

/// Builds a file as in the specification of the format: the length of the header, the header, the data.
fn assemble(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Returns the names, shapes and bits of a state; all NaNs are equal.
fn bits<F: Float>(params: &(impl Params<F> + ?Sized)) -> Vec<(String, Vec<usize>, Vec<u64>)> {
    let bits = |x: &F| if x.is_nan() { u64::MAX } else { x.as_f64().to_bits() };
    params::state(params)
        .into_iter()
        .map(|(name, value)| {
            (name, value.shape().to_vec(), value.iter().map(bits).collect::<Vec<_>>())
        })
        .collect()
}

fn temporary(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", std::process::id()))
}

/// Returns the message for a refused file, and checks the rules of [`Error::File`].
#[track_caller]
fn refusal<T>(result: Result<T>) -> String {
    match result {
        Err(error @ Error::File { .. }) => error.to_string(),
        Err(error) => panic!("{error:?}"),
        Ok(_) => panic!("accepted"),
    }
}

fn mechanisms_come_back<F: Float>(precision: &str) -> Result<()> {
    for (index, (saved, mut loaded)) in
        mechanisms::<F>(1).into_iter().zip(mechanisms::<F>(9)).enumerate()
    {
        let bytes = safetensors::to_bytes(&*saved)?;
        assert_eq!(bytes, safetensors::to_bytes(&saved)?);
        safetensors::from_bytes(&mut *loaded, &bytes)?;
        assert_eq!(bits(&loaded), bits(&saved));

        let path = temporary(&format!("{precision}-{index}"));
        // Nothing is left of an earlier, longer file.
        std::fs::write(&path, vec![7; bytes.len() + 100]).unwrap();
        safetensors::save(&*saved, &path)?;
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        let mut loaded = mechanisms::<F>(9).swap_remove(index);
        safetensors::load(&mut loaded, &path)?;
        assert_eq!(bits(&loaded), bits(&saved));
        std::fs::remove_file(path).unwrap();
    }
    Ok(())
}

#[test]
fn mechanisms_come_back_as_the_same_bits() -> Result<()> {
    mechanisms_come_back::<f32>("f32")?;
    mechanisms_come_back::<f64>("f64")
}

fn values_come_back<F: Float>(values: &[F]) -> Result<()> {
    let mut saved = bag(&[
        ("none", &[0, 3], &[]),
        ("one", &[], &values[..1]),
        ("quoted \" \\ \n é 🦀", &[values.len()], values),
        ("", &[1, 1, 1], &values[..1]),
    ]);
    // A view that is not contiguous is written in the order of its indices.
    let matrix = Array2::from_shape_fn((3, 2), |(i, j)| F::from_f64((i * 2 + j) as f64));
    saved.0.push(("transposed".into(), matrix.reversed_axes().into_dyn()));
    let mut loaded = saved.clone();
    loaded.0.iter_mut().for_each(|(_, value)| value.fill(F::from_f64(5.0)));
    safetensors::from_bytes(&mut loaded, &safetensors::to_bytes(&saved)?)?;
    assert_eq!(bits(&loaded), bits(&saved));
    Ok(())
}

#[test]
fn special_values_come_back_as_the_same_bits() -> Result<()> {
    let nans = [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffc1_2345)];
    let edges = [-0.0, f32::from_bits(1), f32::MIN_POSITIVE / 2.0, f32::MIN_POSITIVE, f32::MAX];
    let infinities = [f32::INFINITY, f32::NEG_INFINITY, 1.0 / 3.0];
    values_come_back(&[&nans[..], &edges, &infinities].concat())?;
    let nans = [f64::NAN, -f64::NAN, f64::from_bits(0x7ff0_0000_0000_0001)];
    let edges = [-0.0, f64::from_bits(1), f64::MIN_POSITIVE / 2.0, f64::MIN_POSITIVE, f64::MAX];
    let infinities = [f64::INFINITY, f64::NEG_INFINITY, 1.0 / 3.0];
    values_come_back(&[&nans[..], &edges, &infinities].concat())
}

#[test]
fn precisions_are_converted() -> Result<()> {
    let values = [-0.0, 1.0 / 3.0, 1e300, -1e300, 1e-40, 1e-300, f64::NAN, 16_777_217.0];
    let double = bag(&[("x", &[8], &values)]);
    let mut single = bag(&[("x", &[8], &[0f32; 8])]);
    safetensors::from_bytes(&mut single, &safetensors::to_bytes(&double)?)?;
    let rounded = bag(&[("x", &[8], &values.map(|x| x as f32))]);
    assert_eq!(bits(&single), bits(&rounded));
    // The way back is exact.
    let mut widened = bag(&[("x", &[8], &[0f64; 8])]);
    safetensors::from_bytes(&mut widened, &safetensors::to_bytes(&single)?)?;
    assert_eq!(bits(&widened), bits(&single));

    for (double, mut single) in mechanisms::<f64>(1).into_iter().zip(mechanisms::<f32>(9)) {
        safetensors::from_bytes(&mut single, &safetensors::to_bytes(&double)?)?;
        let rounded: Vec<_> = params::state(&double)
            .into_iter()
            .map(|(name, value)| (name, value.mapv(|x| x as f32)))
            .collect();
        assert_eq!(params::state(&single), rounded);
    }
    Ok(())
}

#[test]
fn halves_are_read_exactly() -> Result<()> {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let read = |dtype: &str| {
        let header =
            format!(r#"{{"x":{{"dtype":"{dtype}","shape":[256,256],"data_offsets":[0,131072]}}}}"#);
        safetensors::read_bytes::<f64>(&assemble(&header, &all), "")
    };
    for (dtype, exponent_bits) in [("F16", 5), ("BF16", 8)] {
        let mantissa_bits = 15 - exponent_bits;
        let bias = (1 << (exponent_bits - 1)) - 1;
        for (code, &value) in read(dtype)?[0].1.iter().enumerate() {
            let mantissa = (code % (1 << mantissa_bits)) as f64 / f64::from(1 << mantissa_bits);
            let exponent = (code >> mantissa_bits) as i32 % (1 << exponent_bits);
            let size = if exponent == (1 << exponent_bits) - 1 {
                if mantissa == 0.0 { f64::INFINITY } else { f64::NAN }
            } else if exponent == 0 {
                mantissa * 2f64.powi(1 - bias)
            } else {
                (1.0 + mantissa) * 2f64.powi(exponent - bias)
            };
            let expected = if code >> 15 == 1 { -size } else { size };
            let same = value.to_bits() == expected.to_bits() || value.is_nan() && expected.is_nan();
            assert!(same, "{dtype} {code:#06x}: {value} instead of {expected}");
        }
    }
    Ok(())
}

#[test]
fn a_file_by_the_specification_is_read() -> Result<()> {
    // Names in no order, a header of an odd length, so that nothing is aligned, and metadata.
    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"#,
        r#""b":{"dtype":"F32","shape":[2,2],"data_offsets":[3,19]},"#,
        r#""a":{"dtype":"F64","shape":[1],"data_offsets":[19,27]},"#,
        r#""flags":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}} "#,
    );
    let data = [
        &[1, 0, 1][..],
        &[0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64, 0, 0, 0, 192], // 1, 2, 3, −2
        &[0, 0, 0, 0, 0, 0, 224, 63],                              // 0.5
    ];
    let bytes = assemble(header, &data.concat());
    let read = |prefix| safetensors::read_bytes::<f32>(&bytes, prefix);
    let b = bag(&[("", &[2, 2], &[1.0, 2.0, 3.0, -2.0])]).0;
    assert_eq!(read("b")?, b);
    assert_eq!(read("a")?, bag(&[("", &[1], &[0.5])]).0);
    assert_eq!(read("c")?, []);
    let message = refusal(read(""));
    assert!(message.contains("tensor flags: expected F64, F32") && message.contains("got BOOL"));

    // The written file follows the specification.
    let written = safetensors::to_bytes(&bag(&[("b", &[2, 2], &[1f32, 2.0, 3.0, -2.0])]))?;
    let header = r#"{"b":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
    let padded = header.len().next_multiple_of(8);
    assert_eq!(written, assemble(&format!("{header:padded$}"), data[1]));
    Ok(())
}

#[test]
fn a_file_from_python_is_read() -> Result<()> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/pyg_gat.safetensors");
    let read = |prefix| safetensors::read::<f64>(path, prefix);
    // Parameters and inputs are thousandths, so wrong bytes cannot go unnoticed.
    let thousandths = |value: &ArrayD<f64>| {
        value.iter().all(|x| x.abs() < 5.0 && ((x * 1e3).round() - x * 1e3).abs() < 1e-3)
    };
    for (prefix, count) in [("conv1.", 7), ("conv2.", 6)] {
        let state = read(prefix)?;
        assert_eq!(state.len(), count);
        assert!(state.iter().any(|(name, _)| name == "lin_edge.weight"));
        assert!(state.iter().all(|(_, value)| thousandths(value)));
    }
    let x = read("graph.x")?.swap_remove(0).1;
    assert_eq!(x.shape(), [6, 4]);
    assert!(thousandths(&x) && x.iter().any(|&x| x != 0.0));
    let message = refusal(read("graph."));
    assert!(message.starts_with(path) && message.contains("graph.edge_index"), "{message}");
    assert!(message.ends_with("got I64"), "{message}");
    Ok(())
}

#[test]
fn mechanisms_are_taken_out_of_a_model() -> Result<()> {
    let config = MultiHeadConfig::new(4, 2);
    let layers = [1, 2].map(|seed| multi_head::<f32, _>(&config, Flash::new(), seed));
    let names = ["layers.0.", "layers.1."];
    let model = layers.iter().zip(names).flat_map(|(layer, prefix)| {
        params::state(layer)
            .into_iter()
            .map(move |(name, value)| (format!("{prefix}{name}"), value))
    });
    let mut model: Vec<_> = model.collect();
    model.push(("head.weight".into(), ArrayD::ones(IxDyn(&[3]))));
    let path = temporary("model");
    safetensors::save(&Bag(model.clone()), &path)?;
    for (layer, prefix) in layers.iter().zip(names) {
        let state = safetensors::read(&path, prefix)?;
        let loaded = config.from_params(Flash::new(), state)?;
        assert_eq!(bits::<f32>(&loaded), bits(layer));
    }
    assert_eq!(safetensors::read::<f32>(&path, "")?.len(), model.len());
    // The whole file has more than one mechanism.
    let whole = safetensors::load(&mut layers[0].clone(), &path);
    assert!(matches!(whole, Err(Error::UnknownParam { .. })));
    std::fs::remove_file(path).unwrap();
    Ok(())
}

#[test]
fn other_parameters_are_refused_and_change_nothing() -> Result<()> {
    let mut params = bag(&[("a", &[2], &[1.0, 2.0]), ("b", &[1, 2], &[3.0, 4.0])]);
    let before = params.0.clone();
    let mut load = |state: &[(&str, &[usize], &[f64])]| {
        let bytes = safetensors::to_bytes(&bag(state)).unwrap();
        let error = safetensors::from_bytes(&mut params, &bytes).unwrap_err();
        assert_eq!(params.0, before);
        error
    };
    let (a, b): ((_, &[_], &[_]), (_, &[_], &[_])) =
        (("a", &[2], &[0.0; 2]), ("b", &[1, 2], &[0.0; 2]));
    let unknown =
        |name: &str| Error::UnknownParam { name: name.into(), known: vec!["a".into(), "b".into()] };
    assert_eq!(load(&[a, ("c", &[1, 2], &[0.0; 2])]), unknown("c"));
    assert_eq!(load(&[a, b, ("c", &[1], &[0.0])]), unknown("c"));
    assert_eq!(load(&[a]), Error::MissingParam { name: "b".into() });
    assert_eq!(load(&[]), Error::MissingParam { name: "a".into() });
    let shape = Error::Shape { what: "b".into(), expected: vec![1, 2], actual: vec![2, 1] };
    assert_eq!(load(&[a, ("b", &[2, 1], &[0.0; 2])]), shape);

    let header = r#"{"a":{"dtype":"F64","shape":[2],"data_offsets":[0,16]},"b":{"dtype":"I64","shape":[1,2],"data_offsets":[16,32]}}"#;
    let integers = safetensors::from_bytes(&mut params, &assemble(header, &[0; 32]));
    let message = refusal(integers);
    assert!(
        message.contains("tensor b: expected F64") && message.ends_with("got I64"),
        "{message}"
    );
    assert_eq!(params.0, before);
    Ok(())
}

#[test]
fn parameters_without_a_place_in_a_file_are_refused() {
    let one: (&[usize], &[f64]) = (&[1], &[0.0]);
    let twice = bag(&[("a", one.0, one.1), ("b", one.0, one.1), ("a", one.0, one.1)]);
    let error = safetensors::to_bytes(&twice).unwrap_err();
    assert_eq!(error, Error::DuplicateParam { name: "a".into() });
    let path = temporary("reserved");
    let error = safetensors::save(&bag(&[("__metadata__", one.0, one.1)]), &path).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { .. }), "{error:?}");
    assert!(error.to_string().contains("__metadata__"));
    assert!(!path.exists());
}

/// A mechanism's parameter and buffer with the given names.
struct Pair(&'static str, &'static str);

impl Params<f64> for Pair {
    fn visit_params<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f64>)) {
        visitor(self.0, ArrayView1::from(&[0.0]).into_dyn());
    }
    fn visit_params_mut<'a>(&'a mut self, _: &mut dyn FnMut(&str, ArrayViewMutD<'a, f64>)) {}
    fn visit_buffers<'a>(&'a self, visitor: &mut dyn FnMut(&str, ArrayViewD<'a, f64>)) {
        visitor(self.1, ArrayView1::from(&[1.0; 2]).into_dyn());
    }
}

#[test]
fn buffers_are_written_beside_parameters() -> Result<()> {
    let bytes = safetensors::to_bytes(&Pair("a", "b"))?;
    let same = bag::<f64>(&[("a", &[1], &[0.0]), ("b", &[2], &[1.0, 1.0])]);
    assert_eq!(bytes, safetensors::to_bytes(&same)?);
    let twice = safetensors::to_bytes(&Pair("a", "a")).unwrap_err();
    assert_eq!(twice, Error::DuplicateParam { name: "a".into() });
    let reserved = safetensors::to_bytes(&Pair("a", "__metadata__")).unwrap_err();
    assert!(matches!(reserved, Error::InvalidArgument { .. }), "{reserved:?}");
    Ok(())
}

#[test]
fn paths_are_named_when_they_fail() {
    let mut params = bag(&[("a", &[1], &[1.0])]);
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let nowhere = directory.join("no such directory").join("file");
    for path in [&directory, &nowhere] {
        let name = path.display().to_string();
        let messages = [
            refusal(safetensors::save(&params, path)),
            refusal(safetensors::load(&mut params, path)),
            refusal(safetensors::read::<f64>(path, "")),
        ];
        assert!(messages.iter().all(|message| message.starts_with(&name)), "{messages:?}");
    }
    let empty = temporary("empty");
    std::fs::write(&empty, []).unwrap();
    let message = refusal(safetensors::load(&mut params, &empty));
    assert!(message.starts_with(&empty.display().to_string()) && message.ends_with("got 0 bytes"));
    std::fs::remove_file(empty).unwrap();
}

#[test]
fn every_truncation_is_refused() -> Result<()> {
    let mut params = multi_head::<f32, _>(&MultiHeadConfig::new(2, 1), Flash::new(), 1);
    let bytes = safetensors::to_bytes(&params)?;
    let before = params::state(&params);
    for length in 0..bytes.len() {
        refusal(safetensors::from_bytes(&mut params, &bytes[..length]));
    }
    refusal(safetensors::from_bytes(&mut params, &[&bytes[..], &[0]].concat()));
    assert_eq!(params::state(&params), before);
    Ok(())
}

#[test]
fn no_flipped_byte_of_the_header_panics() -> Result<()> {
    let mut params = bag(&[("ab", &[2], &[1f32, 2.0]), ("c", &[1, 2], &[3.0, 4.0])]);
    let before = params.0.clone();
    let bytes = safetensors::to_bytes(&params)?;
    let header = bytes.len() - 16;
    for at in 0..header {
        for flip in 1..=u8::MAX {
            let mut bytes = bytes.clone();
            bytes[at] ^= flip;
            // Changed white space, and some changed numbers, mean the same.
            if safetensors::from_bytes(&mut params, &bytes).is_err() {
                assert_eq!(params.0, before, "byte {at} flipped by {flip}");
            } else {
                params.0.clone_from(&before);
            }
            let _ = safetensors::read_bytes::<f64>(&bytes, "");
        }
    }
    Ok(())
}

#[test]
fn impossible_headers_are_refused() {
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let max = u64::MAX;
    let all = format!("[0,{max}]");
    // Sizes that add up to nearly 2⁶⁴: with the header's own they overflow.
    let mut many = String::from("{");
    let (step, mut start) = ((1u64 << 60) - 1, 0u64);
    for index in 0.. {
        let bytes = step.min(max - start);
        let end = start + bytes;
        let comma = if index == 0 { "" } else { "," };
        let entry = format!(
            r#"{comma}"{index}":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[{start},{end}]}}"#
        );
        many.push_str(&entry);
        start = end;
        if end == max {
            break;
        }
    }
    many.push('}');
    let headers = [
        String::new(),
        "null".into(),
        "[]".into(),
        "{".repeat(10_000),
        r#"{"a":"#.repeat(10_000),
        tensor("F32", "[1152921504606846976]", "[0,4611686018427387904]"),
        tensor("F32", "[1152921504606846976]", "[0,4]"),
        tensor("F64", "[4611686018427387904,4]", "[0,0]"),
        tensor("U8", "[18446744073709551615]", &all),
        tensor("F32", "[18446744073709551616]", "[0,4]"),
        tensor("F32", "[-1]", "[0,4]"),
        tensor("F32", "[1]", "[4,0]"),
        tensor("F32", "[1]", "[4,8]"),
        tensor("F32", "[1]", "[0,4,8]"),
        tensor("F32", "[2]", "[0,4]"),
        tensor("F31", "[1]", "[0,4]"),
        tensor("F4", "[1]", "[0,1]"),
        // No elements, but the product of the other lengths is more than an array may have.
        tensor("F64", "[0,4611686018427387904,4]", "[0,0]"),
        many,
    ];
    for header in &headers {
        for data in [0, 4, 8] {
            let bytes = assemble(header, &vec![0; data]);
            let allocations = measure(|| {
                refusal(safetensors::read_bytes::<f64>(&bytes, ""));
            });
            let limit = 64 * bytes.len() as u64 + 4096;
            assert!(allocations.bytes_max < limit, "{header}: {allocations:?}");
        }
    }
    for length in [1, 1 << 20, 100_000_000, 100_000_001, 1 << 60, max - 8, max - 7, max] {
        let allocations = measure(|| {
            refusal(safetensors::read_bytes::<f64>(&length.to_le_bytes(), ""));
        });
        assert!(allocations.bytes_max < 4096, "{length}: {allocations:?}");
    }
}

#[test]
fn memory_is_in_proportion_to_the_file() -> Result<()> {
    // The most expensive files: shapes of many zeros, and many empty tensors.
    let zeros = format!(
        r#"{{"a":{{"dtype":"F32","shape":[0{}],"data_offsets":[0,0]}}}}"#,
        ",0".repeat(100_000)
    );
    let mut nothings = String::from("{");
    for index in 0..5_000 {
        let comma = if index == 0 { "" } else { "," };
        write!(nothings, r#"{comma}"{index}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#)
            .unwrap();
    }
    nothings.push('}');
    for header in [zeros, nothings] {
        let bytes = assemble(&header, &[]);
        let mut result = Ok(Vec::new());
        let allocations = measure(|| result = safetensors::read_bytes::<f64>(&bytes, ""));
        result?;
        assert!(allocations.bytes_max < 64 * bytes.len() as u64, "{allocations:?}");
    }

    // Reading a large tensor takes the memory of the tensor.
    let saved = bag(&[("a", &[100_000], &vec![1f64; 100_000])]);
    let bytes = safetensors::to_bytes(&saved)?;
    let mut result = Ok(Vec::new());
    let allocations = measure(|| result = safetensors::read_bytes::<f64>(&bytes, ""));
    assert_eq!(result?, saved.0);
    assert!(allocations.bytes_max < bytes.len() as u64 + 4096, "{allocations:?}");
    Ok(())
}
