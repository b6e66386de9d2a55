//! Two mechanisms, and a gate that mixes their outputs.

use super::{NAME, by_edge_layer};
use crate::attention::{Attention, Saved};
use crate::element::{sigmoid, try_array, try_zeros};
use crate::error::{Error, Result, check_shape};
use crate::gradients::{GradientsMut, param_slot};
use crate::inputs::{Inputs, SelectedInputs, head_columns};
use crate::kernels::Float;
use crate::params;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Ix1, Ix2, s};
use std::mem::take;

/// The names of the two mechanisms, for errors and parameters.
pub(super) const SIDES: [&str; 2] = ["local", "global"];

#[derive(Debug)]
pub(super) struct Gate<F: Float> {
    /// w, heads × columns of a head.
    pub(super) weight: Array2<F>,
    /// b.
    pub(super) bias: Array1<F>,
    /// The local mechanism and the global one.
    pub(super) inner: [Box<dyn Attention<F>>; 2],
}

/// How a head of a query mixes the two outputs.
#[derive(Clone, Copy, Debug)]
enum Mix<F> {
    /// The query sees no pair.
    Nothing,
    /// The query sees pairs of one kind only and takes the output of that kind.
    Only(usize),
    /// The share of the local output; the rest is the share of the global output.
    Both(F),
}

pub(super) struct State<F, T = Saved> {
    /// num_queries × heads.
    mixes: Array2<Mix<F>>,
    /// The output and the saved state of each side.
    sides: [(Array2<F>, T); 2],
}

impl<F: Float> Mix<F> {
    /// Returns the share of a side; `None` if it is left out, whatever its output.
    fn share(self, side: usize) -> Option<F> {
        match self {
            Self::Nothing => None,
            Self::Only(kind) => (kind == side).then(F::one),
            Self::Both(local) => Some(if side == 0 { local } else { F::one() - local }),
        }
    }
}

impl<F: Float> Gate<F> {
    pub(super) fn output_dim(&self, inputs: &Inputs<'_, F>) -> usize {
        self.inner[0].output_dim(inputs)
    }

    fn num_heads(&self) -> usize {
        self.bias.len()
    }

    fn check(&self, inputs: &Inputs<'_, F>) -> Result<()> {
        let heads = self.num_heads();
        let what = "heads of the inputs, which must match the gate";
        check_shape(what, &[heads], &[inputs.num_heads()])?;
        check_shape("query", &[inputs.num_queries(), self.weight.len()], inputs.query().shape())?;
        let [local, global] = self.inner.each_ref().map(|inner| inner.output_dim(inputs));
        if local != global {
            let what = format!(
                "output columns of global ({}), which must match local ({})",
                self.inner[1].name(),
                self.inner[0].name()
            );
            return Err(Error::shape(what, &[local], &[global]));
        }
        if !local.is_multiple_of(heads) {
            return Err(Error::Heads { what: "output", heads, columns: local });
        }
        Ok(())
    }

    /// Computes how each head of each query mixes the two outputs.
    fn mixes(&self, inputs: &Inputs<'_, F>) -> Result<Array2<Mix<F>>> {
        let layers = inputs.edge_layers(NAME)?;
        let (rows, heads) = (inputs.num_queries(), self.num_heads());
        let mut mixes = try_array("mixes", Ix2(rows, heads), Mix::Nothing)?;
        let mut kinds = vec![[false; 2]; heads];
        for (query, mut mixes) in mixes.rows_mut().into_iter().enumerate() {
            kinds.fill([false; 2]);
            for pair in inputs.row(query) {
                let side = usize::from(layers[pair.index] > 0);
                for (head, kinds) in kinds.iter_mut().enumerate() {
                    kinds[side] |= inputs.bias().is_none_or(|bias| {
                        // An inner mechanism may have more heads than the gate.
                        let columns = bias.num_heads();
                        let of_head = if columns == heads { head..head + 1 } else { 0..columns };
                        of_head.into_iter().any(|head| bias.at(pair, head) != F::neg_infinity())
                    });
                }
            }
            for (head, (mix, kinds)) in mixes.iter_mut().zip(&kinds).enumerate() {
                *mix = match kinds {
                    [false, false] => Mix::Nothing,
                    [true, false] => Mix::Only(0),
                    [false, true] => Mix::Only(1),
                    [true, true] => Mix::Both(self.local_share(inputs, query, head)),
                };
            }
        }
        Ok(mixes)
    }

    /// σ(w · q + b)
    fn local_share(&self, inputs: &Inputs<'_, F>, query: usize, head: usize) -> F {
        let columns = head_columns(head, self.weight.ncols());
        let query = inputs.query().slice_move(s![query, columns]);
        sigmoid(self.weight.row(head).dot(&query) + self.bias[head])
    }

    /// Overwrites `out`, running each side with `forward`.
    fn run<T>(
        &self,
        inputs: &Inputs<'_, F>,
        mut out: ArrayViewMut2<'_, F>,
        forward: impl Fn(&dyn Attention<F>, &Inputs<'_, F>) -> Result<(Array2<F>, T)>,
    ) -> Result<State<F, T>> {
        self.check(inputs)?;
        let parts = by_edge_layer(inputs)?;
        let run = |side: usize| {
            let inner = &*self.inner[side];
            forward(inner, &parts[side].inputs())
                .map_err(|error| error.in_part(SIDES[side], inner.name(), None))
        };
        let sides = [run(0)?, run(1)?];
        let mixes = self.mixes(inputs)?;
        out.fill(F::zero());
        let dim = out.ncols() / self.num_heads();
        for ((query, head), mix) in mixes.indexed_iter() {
            let mut out = out.slice_mut(s![query, head_columns(head, dim)]);
            for (side, (answer, _)) in sides.iter().enumerate() {
                if let Some(share) = mix.share(side) {
                    out.scaled_add(share, &answer.slice(s![query, head_columns(head, dim)]));
                }
            }
        }
        Ok(State { mixes, sides })
    }

    pub(super) fn forward(&self, inputs: &Inputs<'_, F>, out: ArrayViewMut2<'_, F>) -> Result<()> {
        self.run(inputs, out, |inner, inputs| Ok((inner.forward(inputs)?, ()))).map(drop)
    }

    pub(super) fn forward_train(
        &self,
        inputs: &Inputs<'_, F>,
        out: ArrayViewMut2<'_, F>,
    ) -> Result<State<F>> {
        self.run(inputs, out, |inner, inputs| inner.forward_train(inputs))
    }

    pub(super) fn backward(
        &self,
        inputs: &Inputs<'_, F>,
        State { mixes, sides }: &State<F>,
        grad_out: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        self.check(inputs)?;
        let heads = self.num_heads();
        check_shape("saved mixes", &[inputs.num_queries(), heads], mixes.shape())?;
        for (answer, _) in sides {
            check_shape("saved answers", grad_out.shape(), answer.shape())?;
        }
        let dim = grad_out.ncols() / heads;
        let parts = by_edge_layer(inputs)?;
        let mut first = 2;
        for (side, (_, saved)) in sides.iter().enumerate() {
            // y += share · answer
            let mut grad_answer = try_zeros("grad_answer", grad_out.nrows(), grad_out.ncols())?;
            for ((query, head), mix) in mixes.indexed_iter() {
                if let Some(share) = mix.share(side) {
                    let columns = s![query, head_columns(head, dim)];
                    grad_answer.slice_mut(columns).scaled_add(share, &grad_out.slice(columns));
                }
            }
            let inner = &*self.inner[side];
            let end = first + params::count(inner);
            let mut grads = grads.reborrow();
            grads.params = &mut take(&mut grads.params)[first..end];
            first = end;
            parts[side].backward(grads, |inputs, grads| {
                inner
                    .backward_into(inputs, saved, grad_answer.view(), grads)
                    .map_err(|error| error.in_part(SIDES[side], inner.name(), None))
            })?;
        }

        // y = a y_local + (1 − a) y_global
        self.vjp(inputs, mixes, grads, |query, head| {
            let columns = s![query, head_columns(head, dim)];
            let (grad, local, global) =
                (grad_out.slice(columns), sides[0].0.slice(columns), sides[1].0.slice(columns));
            grad.dot(&local) - grad.dot(&global)
        })
    }

    /// Adds the gradients that follow from those of the local shares.
    fn vjp(
        &self,
        inputs: &Inputs<'_, F>,
        mixes: &Array2<Mix<F>>,
        mut grads: GradientsMut<'_, F>,
        grad_share: impl Fn(usize, usize) -> F,
    ) -> Result<()> {
        let [weight, bias, ..] = grads.params else { return Ok(()) };
        let (mut grad_weight, mut grad_bias) =
            (param_slot::<F, Ix2>(weight), param_slot::<F, Ix1>(bias));
        for ((query, head), &mix) in mixes.indexed_iter() {
            let Mix::Both(share) = mix else { continue };
            // a = σ(z), z = w · q + b
            let grad_logit = share * (F::one() - share) * grad_share(query, head);
            let columns = s![query, head_columns(head, self.weight.ncols())];
            grad_bias[head] += grad_logit;
            let query = inputs.query();
            grad_weight.row_mut(head).scaled_add(grad_logit, &query.slice(columns));
            if let Some(grad) = &mut grads.query {
                grad.slice_mut(columns).scaled_add(grad_logit, &self.weight.row(head));
            }
        }
        Ok(())
    }

    pub(super) fn attention_weights(&self, inputs: &Inputs<'_, F>) -> Result<Array2<F>> {
        self.check(inputs)?;
        let (mixes, parts) = (self.mixes(inputs)?, by_edge_layer(inputs)?);
        let mut total: Option<Array2<F>> = None;
        for (side, part) in parts.iter().enumerate() {
            let weights = self.weights_of(side, part)?;
            let columns = weights.ncols();
            let total = match &mut total {
                Some(total) => total,
                None => total.insert(try_zeros("weights", inputs.num_pairs(), columns)?),
            };
            let what = "weights of global, which must match local";
            check_shape(what, &[total.ncols()], &[columns])?;
            let of_head = columns / self.num_heads();
            part.add_weights(&weights, total, |query, column| {
                mixes[[query, column / of_head]].share(side).unwrap_or_default()
            });
        }
        Ok(total.unwrap_or_default())
    }

    /// The weights of one side, among its own pairs.
    fn weights_of(&self, side: usize, part: &SelectedInputs<'_, F>) -> Result<Array2<F>> {
        let (inner, heads) = (&*self.inner[side], self.num_heads());
        let weights = inner
            .attention_weights(&part.inputs())
            .map_err(|error| error.in_part(SIDES[side], inner.name(), None))?;
        match weights.ncols() {
            columns if columns.is_multiple_of(heads) => Ok(weights),
            columns => Err(Error::Heads { what: "weights", heads, columns }),
        }
    }

    pub(super) fn attention_weights_backward(
        &self,
        inputs: &Inputs<'_, F>,
        grad_weights: ArrayView2<'_, F>,
        mut grads: GradientsMut<'_, F>,
    ) -> Result<()> {
        self.check(inputs)?;
        let (mixes, parts) = (self.mixes(inputs)?, by_edge_layer(inputs)?);
        // Σ p dp of each side
        let mut products = [(); 2].map(|()| Array2::<F>::zeros(mixes.raw_dim()));
        let mut first = 2;
        for (side, part) in parts.iter().enumerate() {
            let weights = self.weights_of(side, part)?;
            let shape = [inputs.num_pairs(), weights.ncols()];
            check_shape("grad_weights", &shape, grad_weights.shape())?;
            let of_head = (weights.ncols() / self.num_heads()).max(1);
            // p = share · p of the side
            let grad = part.rows_of_weights(grad_weights)?;
            let grad = grad.view();
            let mut grad_side = try_zeros("grad_weights", grad.nrows(), grad.ncols())?;
            let of_part = part.inputs();
            for pair in (0..of_part.num_queries()).flat_map(|query| of_part.row(query)) {
                for column in 0..weights.ncols() {
                    let (at, mix) = ([pair.index, column], [pair.query, column / of_head]);
                    if let Some(share) = mixes[mix].share(side)
                        && weights[at] != F::zero()
                    {
                        products[side][mix] += weights[at] * grad[at];
                        grad_side[at] = share * grad[at];
                    }
                }
            }
            let inner = &*self.inner[side];
            let end = first + params::count(inner);
            let mut grads = grads.reborrow();
            grads.params = &mut take(&mut grads.params)[first..end];
            first = end;
            part.backward(grads, |inputs, grads| {
                inner
                    .attention_weights_backward_into(inputs, grad_side.view(), grads)
                    .map_err(|error| error.in_part(SIDES[side], inner.name(), None))
            })?;
        }
        let [local, global] = &products;
        self.vjp(inputs, &mixes, grads, |query, head| local[[query, head]] - global[[query, head]])
    }
}
