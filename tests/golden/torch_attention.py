"""Golden answers of PyTorch's attention, with gradients, for the Rust tests.

Writes torch_attention.json next to this file. To make it again (Python 3.11):

    python -m venv ~/torchenv && . ~/torchenv/bin/activate
    pip install torch==2.12.1 numpy==2.4.6 "setuptools<82"
    python tests/golden/torch_attention.py

Everything is float64 on the CPU. The inputs are the same on every machine; the
last digits of the answers can depend on the processor (order of summation).

Layout: no batch axis, and heads are blocks of columns: query is
n_q x (heads*d), key n_k x (kv_heads*d), value n_k x (kv_heads*d_v), out
n_q x (heads*d_v). Gradients are those of sum(out * grad_out).
"""

import json
import platform
import zlib
from pathlib import Path

import numpy
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

INF = float("inf")


class Draw:
    """Random inputs seeded by the case's name, so that adding a case changes no other."""

    def __init__(self, name):
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape):
        # Three decimals are enough, and keep the JSON small.
        x = torch.randn(*shape, generator=self.generator)
        return (x * 1000).round() / 1000

    def mask(self, n_q, n_k, dead_rows=()):
        """About two thirds True; only `dead_rows` are False all along."""
        mask = torch.rand(n_q, n_k, generator=self.generator) < 0.67
        mask[torch.arange(n_q), torch.arange(n_q) % n_k] = True
        mask[list(dead_rows)] = False
        return mask


def array(x):
    """A tensor for the JSON: row-major, booleans as 0/1, -inf as "-inf"."""
    if x is None:
        return None
    data = x.detach().int() if x.dtype == torch.bool else x.detach()
    flat = ["-inf" if v == -INF else v for v in data.flatten().tolist()]
    return {"shape": list(x.shape), "data": flat}


def finite(x):
    """An answer for the JSON: never NaN or infinite."""
    assert x.isfinite().all()
    return array(x)


def leaf(x):
    return x.clone().requires_grad_()


def split(x, heads):
    """n x (heads*d) -> heads x n x d."""
    return x.reshape(x.shape[0], heads, -1).transpose(0, 1)


def merge(x):
    """heads x n x d -> n x (heads*d)."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def causal_mask(n_q, n_k, alignment):
    """True where query i may see key j: j <= i, or j <= i + n_k - n_q (bottom right)."""
    diagonal = n_k - n_q if alignment == "bottom_right" else 0
    return torch.ones(n_q, n_k, dtype=torch.bool).tril(diagonal)


# --- Part 1: scaled_dot_product_attention ------------------------------------


def sdpa(name, n_q=5, n_k=7, d=3, d_v=2, heads=1, kv_heads=None, scale=None, causal=None,
         mask=None, bias=None, logits=None):
    """One case. `mask` and `bias` are functions of the Draw; `logits`, if given,
    is the size to which the largest logit is brought by scaling the queries."""
    draw = Draw(name)
    kv_heads = kv_heads or heads
    query = draw.normal(n_q, heads * d)
    key = draw.normal(n_k, kv_heads * d)
    value = leaf(draw.normal(n_k, kv_heads * d_v))
    grad_out = draw.normal(n_q, heads * d_v)
    mask = mask(draw) if mask else None
    bias = leaf(bias(draw)) if bias else None
    if logits:
        # With two equal keys some rows are a tie: without them nearly every row
        # would be one-hot, and its gradient zero.
        key[1] = key[0]
        top = (split(query, heads) @ split(key, kv_heads).mT).abs().max() / d**0.5
        query = (query * (logits / top)).round()
    query, key = leaf(query), leaf(key)

    # In torch's boolean mask here True takes part; its own is_causal is aligned top left.
    allowed = torch.ones(n_q, n_k, dtype=torch.bool) if mask is None else mask
    if causal:
        allowed = allowed & causal_mask(n_q, n_k, causal)
    if causal == "top_left" and mask is None and bias is None:
        options = {"is_causal": True}
    elif bias is not None:
        options = {"attn_mask": bias.masked_fill(~allowed, -INF)}
    elif causal or mask is not None:
        options = {"attn_mask": allowed}
    else:
        options = {}
    with sdpa_kernel(SDPBackend.MATH):
        out = scaled_dot_product_attention(
            split(query, heads), split(key, kv_heads), split(value, kv_heads),
            scale=scale, enable_gqa=kv_heads != heads, **options)

        # Query head h reads key and value head floor(h * kv_heads / heads):
        # consecutive query heads share one (repeat_interleave, not tiling).
        shared = torch.arange(heads) * kv_heads // heads
        spread = scaled_dot_product_attention(
            split(query, heads), split(key, kv_heads)[shared], split(value, kv_heads)[shared],
            scale=scale, **options)
    torch.testing.assert_close(out, spread, rtol=1e-12, atol=1e-12)

    # A query that sees no key: PyTorch (since 2.5) itself answers 0, with zero
    # gradients; nothing is replaced here, only checked (also by finite()).
    seen = allowed.expand(heads, n_q, n_k)
    if bias is not None:
        seen = seen & (bias > -INF)
    dead = ~seen.any(-1)
    assert (out[dead] == 0).all()

    out = merge(out)
    leaves = [query, key, value] + ([] if bias is None else [bias])
    grads = torch.autograd.grad(out, leaves, grad_out)
    assert (split(grads[0], heads)[dead] == 0).all()
    return {
        "name": name, "heads": heads, "kv_heads": kv_heads, "scale": scale, "causal": causal,
        "mask": array(mask), "bias": array(bias),
        "query": array(query), "key": array(key), "value": array(value),
        "grad_out": array(grad_out), "out": finite(out),
        "grad_query": finite(grads[0]), "grad_key": finite(grads[1]),
        "grad_value": finite(grads[2]),
        "grad_bias": None if bias is None else finite(grads[3]),
    }


def bias_with_inf(draw, *shape, dead):
    """Some entries -inf, and the rows at index `dead` -inf all along."""
    bias = draw.normal(*shape)
    bias[..., ~draw.mask(*shape[-2:])] = -INF
    bias[dead] = -INF
    return bias


def sdpa_cases():
    yield sdpa("plain_one_head")
    yield sdpa("plain_three_heads", heads=3)
    yield sdpa("d1_dv1", d=1, d_v=1)
    yield sdpa("explicit_scale", heads=2, scale=0.37)
    for alignment in "top_left", "bottom_right":
        yield sdpa(f"causal_{alignment}_square", n_q=5, n_k=5, heads=2, causal=alignment)
        yield sdpa(f"causal_{alignment}_wide", n_q=5, n_k=7, heads=2, causal=alignment)
        # Bottom right with more queries than keys: the first queries see nothing.
        yield sdpa(f"causal_{alignment}_tall", n_q=7, n_k=5, heads=2, causal=alignment)
    yield sdpa("mask", heads=2, mask=lambda r: r.mask(5, 7))
    yield sdpa("mask_dead_rows", heads=2, mask=lambda r: r.mask(5, 7, dead_rows=[0, 3]))
    yield sdpa("bias_shared", heads=3, bias=lambda r: r.normal(5, 7))
    yield sdpa("bias_per_head", heads=3, bias=lambda r: r.normal(3, 5, 7))
    yield sdpa("bias_shared_inf", heads=2, bias=lambda r: bias_with_inf(r, 5, 7, dead=2))
    # Here query 2 sees nothing in head 1 only.
    yield sdpa("bias_per_head_inf", heads=3,
               bias=lambda r: bias_with_inf(r, 3, 5, 7, dead=(1, 2)))
    yield sdpa("one_query", n_q=1, heads=2)
    yield sdpa("one_key", n_k=1, heads=2)
    yield sdpa("one_query_one_key", n_q=1, n_k=1, heads=2)
    yield sdpa("large_logits", heads=2, logits=1e4)
    yield sdpa("grouped_6_2", heads=6, kv_heads=2)
    yield sdpa("grouped_6_1", heads=6, kv_heads=1)
    yield sdpa("causal_bias", heads=2, causal="top_left", bias=lambda r: r.normal(2, 5, 7))
    # All at once; bottom right and the mask leave queries 0, 1 and 4 nothing.
    yield sdpa("everything", n_q=7, n_k=5, heads=4, kv_heads=2, scale=0.81,
               causal="bottom_right", mask=lambda r: r.mask(7, 5),
               bias=lambda r: r.normal(4, 7, 5))
    yield sdpa("larger", n_q=37, n_k=53, d=19, d_v=11, heads=2)


# --- Part 2: nn.MultiheadAttention -------------------------------------------


def multi_head(name, embed_dim=6, num_heads=3, kdim=None, vdim=None, bias=True, n_q=5, n_k=7,
               mask=None, attn_bias=None, causal=False, self_attention=False):
    """One case. `mask` and `attn_bias` are functions of the Draw."""
    draw = Draw(name)
    module = torch.nn.MultiheadAttention(
        embed_dim, num_heads, bias=bias, kdim=kdim, vdim=vdim, dtype=torch.float64)
    with torch.no_grad():  # all parameters, also the biases, which start as 0
        for parameter in module.parameters():
            parameter.copy_(draw.normal(*parameter.shape) / 2)
    params = dict(module.named_parameters())
    assert list(params) == list(module.state_dict())

    query = leaf(draw.normal(n_q, embed_dim))
    if self_attention:  # separate leaves, so three separate gradients
        key, value = leaf(query.detach()), leaf(query.detach())
    else:
        key = leaf(draw.normal(n_k, kdim or embed_dim))
        value = leaf(draw.normal(n_k, vdim or embed_dim))
    grad_out = draw.normal(n_q, embed_dim)

    # Our mask says 1 = takes part; a boolean attn_mask of this module says the
    # opposite, True = left out. A float attn_mask is added to the logits.
    mask = mask(draw) if mask else None
    attn_bias = attn_bias(draw) if attn_bias else None
    assert sum([mask is not None, attn_bias is not None, causal]) <= 1
    attn_mask = attn_bias
    if mask is not None:
        attn_mask = ~mask
    if causal:
        attn_mask = ~causal_mask(n_q, n_k, "top_left")

    out, weights = module(query, key, value, attn_mask=attn_mask, average_attn_weights=False)
    grads = torch.autograd.grad(out, [query, key, value, *params.values()], grad_out)
    return {
        "name": name, "embed_dim": embed_dim, "num_heads": num_heads,
        "kdim": module.kdim, "vdim": module.vdim, "bias": bias,
        "mask": array(mask), "attn_bias": array(attn_bias), "causal": causal,
        "query": array(query), "key": array(key), "value": array(value),
        "grad_out": array(grad_out), "out": finite(out), "weights": finite(weights),
        "params": {k: array(p) for k, p in params.items()},
        "grad_params": {k: finite(g) for k, g in zip(params, grads[3:], strict=True)},
        "grad_query": finite(grads[0]), "grad_key": finite(grads[1]),
        "grad_value": finite(grads[2]),
    }


def multi_head_cases():
    yield multi_head("packed")
    yield multi_head("self_attention", self_attention=True)
    yield multi_head("separate_dims", kdim=4, vdim=9)
    yield multi_head("no_bias", bias=False)
    yield multi_head("separate_dims_no_bias", kdim=4, vdim=9, bias=False)
    yield multi_head("mask", mask=lambda r: r.mask(5, 7))
    yield multi_head("attn_bias_per_head", attn_bias=lambda r: r.normal(3, 5, 7))
    yield multi_head("causal", causal=True)
    yield multi_head("one_head", num_heads=1, embed_dim=4)
    yield multi_head("one_query", n_q=1)


def main():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)

    def dumps(x):
        # Floats as repr, which reads back exactly; NaN and Infinity refused.
        return json.dumps(x, allow_nan=False)

    def lines(cases):  # one case a line
        return "[\n" + ",\n".join(dumps(case) for case in cases) + "\n]"

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    text = (
        '{\n"generator": "tests/golden/torch_attention.py",\n'
        f'"versions": {dumps(versions)},\n'
        f'"sdpa": {lines(sdpa_cases())},\n'
        f'"multi_head": {lines(multi_head_cases())}\n'
        "}\n"
    )
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
