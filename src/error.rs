use std::borrow::Cow;
use std::fmt;

/// A `Result` with the [`Error`] of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The reason why a call was refused.
///
/// Every variant contains the data of its message: the argument, the expected value and the actual value.
///
/// ```
/// use graph_attention::ndarray::Array2;
/// use graph_attention::{Attention, Error, Flash, Inputs};
///
/// let (query, key, value) = (Array2::zeros((2, 4)), Array2::zeros((3, 5)), Array2::zeros((3, 1)));
/// let error = Inputs::<f32>::dense(query.view(), key.view(), query.view()).unwrap_err();
/// assert_eq!(error.to_string(), "value: expected shape [3, 4], got [2, 4]");
///
/// // Requirements of a mechanism are checked when it is called.
/// let inputs = Inputs::<f32>::dense(query.view(), key.view(), value.view())?;
/// assert!(matches!(Flash::new().forward(&inputs), Err(Error::Shape { .. })));
/// # Ok::<(), Error>(())
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// An array has the wrong shape.
    #[error("{what}: expected shape {expected:?}, got {actual:?}")]
    Shape {
        /// The argument, e.g. `mask` or `grads.key`.
        what: Cow<'static, str>,
        /// The required shape.
        expected: Vec<usize>,
        /// The actual shape.
        actual: Vec<usize>,
    },
    /// The columns of an array cannot be split into equal heads.
    #[error(
        "{what}: expected columns that split into {heads} heads of equal positive size, got {columns} columns"
    )]
    Heads {
        /// The argument, e.g. `key`.
        what: &'static str,
        /// The requested number of heads.
        heads: usize,
        /// The actual number of columns.
        columns: usize,
    },
    /// A mechanism needs a channel that is missing from the inputs.
    #[error("{mechanism} needs {channel}: set them with `Inputs::{}`", channel.setter())]
    MissingInput {
        /// [`Attention::name`](crate::Attention::name) of the mechanism; `expert 2 (edge_gat)` of an
        /// expert in a mixture, `cross (flash)` of a branch.
        mechanism: Cow<'static, str>,
        /// The channel it needs.
        channel: Channel,
    },
    /// The inputs have a channel that changes the output and that a mechanism cannot honour.
    #[error("{mechanism} does not support {channel}: {}", channel.removal())]
    Unsupported {
        /// [`Attention::name`](crate::Attention::name) of the mechanism; `expert 2 (edge_gat)` of an
        /// expert in a mixture, `cross (flash)` of a branch.
        mechanism: Cow<'static, str>,
        /// The channel it cannot honour.
        channel: Channel,
    },
    /// The inputs have data that the mechanism reads only with a setting that is not set.
    #[error(
        "{mechanism} reads {channel} only with `{setting}`: set it, or leave {channel} out of the inputs"
    )]
    MissingSetting {
        /// [`Attention::name`](crate::Attention::name) of the mechanism; `expert 2 (edge_gat)` of an
        /// expert in a mixture, `cross (flash)` of a branch.
        mechanism: Cow<'static, str>,
        /// The setting, e.g. `EdgeGatConfig::edge_dim`.
        setting: &'static str,
        /// The channel that would be ignored.
        channel: Channel,
    },
    /// A setting or a scalar argument has a value outside its range.
    #[error("{argument}: expected {expected}, got {actual}")]
    InvalidArgument {
        /// The argument or setting, e.g. `dropout.probability`.
        argument: &'static str,
        /// The valid range.
        expected: Cow<'static, str>,
        /// The actual value.
        actual: String,
    },
    /// A point is on or outside the boundary of its space.
    #[error("{what}: expected a norm less than {limit} in row {row}, got {norm}")]
    Domain {
        /// The argument, e.g. `query`.
        what: Cow<'static, str>,
        /// The row; 0 for a single point.
        row: usize,
        /// The norm of the point.
        norm: f64,
        /// The upper bound of the norm.
        limit: f64,
    },
    /// The parts of a graph contradict each other.
    #[error("graph: {what}: expected {expected}, got {actual}")]
    Graph {
        /// The part, e.g. `edges[3].key`.
        what: Cow<'static, str>,
        /// The required value or form.
        expected: String,
        /// The actual value.
        actual: String,
    },
    /// An array of this shape does not fit in memory.
    #[error("{what}: expected a size that fits in memory, got shape {shape:?}")]
    TooLarge {
        /// The array.
        what: &'static str,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The mechanism has no attention weights to return.
    #[error("{mechanism} has no attention weights")]
    NoWeights {
        /// [`Attention::name`](crate::Attention::name) of the mechanism.
        mechanism: &'static str,
    },
    /// The saved state of a forward pass was passed to a different mechanism, or to one with different options
    /// or in a different precision.
    #[error(
        "{mechanism}: expected the state saved by its own forward pass ({expected}), got one saved by {saved_by} ({actual})"
    )]
    SavedMismatch {
        /// [`Attention::name`](crate::Attention::name) of the mechanism that was called.
        mechanism: &'static str,
        /// The mechanism that made the state.
        saved_by: &'static str,
        /// The type of the expected state, or the options of the mechanism.
        expected: Cow<'static, str>,
        /// The type of the actual state, or the options it was made with.
        actual: Cow<'static, str>,
    },
    /// A parameter of this name does not exist.
    #[error("parameter {name}: expected one of [{}], got an unknown name", known.join(", "))]
    UnknownParam {
        /// The unknown name.
        name: String,
        /// The known names.
        known: Vec<String>,
    },
    /// A parameter appears twice in a state.
    #[error("parameter {name}: expected one value, got two")]
    DuplicateParam {
        /// The name.
        name: String,
    },
    /// A parameter is missing from a state that must be complete.
    #[error("parameter {name}: expected a value, got a state without this name")]
    MissingParam {
        /// The missing name.
        name: String,
    },
    /// A file of parameters cannot be read or written, or its contents are invalid.
    #[error("{what}: expected {expected}, got {actual}")]
    File {
        /// The file, or a part of it.
        what: String,
        /// The required value or form.
        expected: &'static str,
        /// The actual value.
        actual: String,
    },
}

impl Error {
    pub(crate) fn shape(
        what: impl Into<Cow<'static, str>>,
        expected: &[usize],
        actual: &[usize],
    ) -> Self {
        Self::Shape { what: what.into(), expected: expected.to_vec(), actual: actual.to_vec() }
    }

    pub(crate) fn config(
        argument: &'static str,
        expected: impl Into<Cow<'static, str>>,
        actual: impl ToString,
    ) -> Self {
        Self::InvalidArgument { argument, expected: expected.into(), actual: actual.to_string() }
    }

    /// A state of the same mechanism with different options.
    pub(crate) fn saved_options(
        mechanism: &'static str,
        expected: &impl fmt::Debug,
        actual: &impl fmt::Debug,
    ) -> Self {
        let [expected, actual] = [format!("{expected:?}"), format!("{actual:?}")];
        let (expected, actual) = (expected.into(), actual.into());
        Self::SavedMismatch { mechanism, saved_by: mechanism, expected, actual }
    }

    pub(crate) fn graph(
        what: impl Into<Cow<'static, str>>,
        expected: impl ToString,
        actual: impl ToString,
    ) -> Self {
        Self::Graph {
            what: what.into(),
            expected: expected.to_string(),
            actual: actual.to_string(),
        }
    }

    /// Converts the error of an inner mechanism into an error of the outer one: names the part, such as
    /// `cross` or `expert 2`, and uses the outer query numbers if the part got only some of the queries.
    pub(crate) fn in_part(
        self,
        part: impl fmt::Display,
        name: &str,
        queries: Option<&[usize]>,
    ) -> Self {
        let of_part = |name: &str| format!("{part} ({name})");
        match self {
            Self::MissingInput { mechanism: name, channel } => {
                Self::MissingInput { mechanism: of_part(&name).into(), channel }
            }
            Self::Unsupported { mechanism: name, channel } => {
                Self::Unsupported { mechanism: of_part(&name).into(), channel }
            }
            Self::MissingSetting { mechanism: name, setting, channel } => {
                Self::MissingSetting { mechanism: of_part(&name).into(), setting, channel }
            }
            Self::Shape { what, expected, actual } => {
                let what = format!("{}: {what}", of_part(name)).into();
                Self::Shape { what, expected, actual }
            }
            Self::Domain { what, row, norm, limit } => {
                let queries = queries.filter(|_| what.ends_with("query"));
                let row = queries.and_then(|queries| queries.get(row)).copied().unwrap_or(row);
                let what = format!("{}: {what}", of_part(name)).into();
                Self::Domain { what, row, norm, limit }
            }
            other => other,
        }
    }
}

/// Checks that `what` has the expected shape.
pub(crate) fn check_shape(
    what: impl Into<Cow<'static, str>>,
    expected: &[usize],
    actual: &[usize],
) -> Result<()> {
    if expected == actual { Ok(()) } else { Err(Error::shape(what, expected, actual)) }
}

/// The optional parts of [`Inputs`](crate::Inputs).
///
/// The first five change which pairs attend, or how much: a mechanism honours them or refuses them with
/// [`Error::Unsupported`]. The others are data that a mechanism may read or ignore, by the rules
/// described at [`Inputs`](crate::Inputs).
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// A boolean mask or a causal pattern.
    Mask,
    /// Additive logits.
    Bias,
    /// Dropout on the weights.
    Dropout,
    /// A factor of each weight.
    PairWeights,
    /// More than one head in the layout of query, key and value.
    Heads,
    /// One row of features per pair.
    EdgeFeatures,
    /// One distance per pair.
    Distances,
    /// One layer number per pair.
    EdgeLayers,
    /// Coordinates of queries and keys.
    Positions,
    /// A second graph over the same keys.
    Latent,
}

impl Channel {
    /// Returns what to do if a mechanism does not support it.
    fn removal(self) -> &'static str {
        match self {
            Self::Heads => "remove `Inputs::with_heads`",
            _ => "leave it out of the inputs",
        }
    }

    /// Returns the method of [`Inputs`](crate::Inputs) that sets it.
    fn setter(self) -> &'static str {
        match self {
            Self::Mask => "with_mask",
            Self::Bias => "with_bias",
            Self::Dropout => "with_dropout",
            Self::PairWeights => "with_pair_weights",
            Self::Heads => "with_heads",
            Self::EdgeFeatures => "with_edge_features",
            Self::Distances => "with_distances",
            Self::EdgeLayers => "with_edge_layers",
            Self::Positions => "with_positions",
            Self::Latent => "with_latent",
        }
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mask => "a mask or causal pattern",
            Self::Bias => "an additive bias",
            Self::Dropout => "dropout",
            Self::PairWeights => "weights of pairs",
            Self::Heads => "several heads",
            Self::EdgeFeatures => "edge features",
            Self::Distances => "distances",
            Self::EdgeLayers => "edge layers",
            Self::Positions => "positions",
            Self::Latent => "latent neighbours",
        })
    }
}
