use super::Partial;
use crate::kernels::Float;
use ::serde::{Deserialize, Deserializer, Serialize, Serializer};
use ndarray::{Array2, ArrayView2};

/// The serialised form of a [`Partial`]. JSON has no −∞, so the shift of a query without keys is 0.
#[derive(Serialize)]
#[serde(rename = "Partial", bound(serialize = "F: Serialize"))]
struct Parts<'a, F> {
    out: ArrayView2<'a, F>,
    shift: Array2<F>,
    sum: ArrayView2<'a, F>,
}

/// The same, owned and not yet validated.
#[derive(Deserialize)]
#[serde(
    rename = "Partial",
    expecting = "a partial result",
    deny_unknown_fields,
    bound(deserialize = "F: Deserialize<'de>")
)]
struct OwnedParts<F> {
    out: Array2<F>,
    shift: Array2<F>,
    sum: Array2<F>,
}

impl<F: Float + Serialize> Serialize for Partial<F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut shift = self.normalizer.shift.clone();
        shift.zip_mut_with(&self.normalizer.sum, |shift, &sum| {
            if sum == F::zero() {
                *shift = F::zero();
            }
        });
        Parts { out: self.out(), shift, sum: self.sum() }.serialize(serializer)
    }
}

impl<'de, F: Float + Deserialize<'de>> Deserialize<'de> for Partial<F> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let parts = OwnedParts::<F>::deserialize(deserializer)?;
        Self::new(parts.out, parts.shift, parts.sum).map_err(::serde::de::Error::custom)
    }
}
