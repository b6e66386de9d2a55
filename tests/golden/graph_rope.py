"""Golden answers of rotary position embeddings, with gradients, for the Rust tests.

Writes graph_rope.json next to this file. To make it again (Python 3.11):

    pip install torch==2.12.1 transformers==5.23.0 rotary-embedding-torch==0.9.1 \
        mpmath==1.3.0
    python tests/golden/graph_rope.py

Two peers rotate: `apply_rotary_pos_emb` of transformers' Llama (layout "half") and
`apply_rotary_emb` of rotary-embedding-torch (layout "interleaved"). Everything is
float64 on the CPU; the peers' own frequencies would be float32, so they are computed
here by the peers' formula, 1 / base ** (arange(0, dim, 2) / dim), one block of pairs
for each axis where there are several, or drawn.

Layout: no batch axis, and heads are blocks of columns: query is n_q x (heads*d), key
n_k x (kv_heads*d), value n_k x (kv_heads*d_v), out n_q x (heads*d_v); the pairs are all
of them, row after row. Where a case has "distances", one for each pair, the query
stands at 0 and the key at the distance; otherwise it has positions of both. Gradients
are those of sum(out * grad_out).

"angles" are frequencies and positions with the sine and cosine of their exact product,
by mpmath.
"""

import json
import platform
import zlib
from importlib.metadata import version
from pathlib import Path

import rotary_embedding_torch
import torch
from mpmath import mp, mpf
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


PEERS = "torch", "transformers", "rotary-embedding-torch", "mpmath"


def rotate(layout, x, angles):
    """x: ... x d, angles: ... x pairs; the columns after the first 2 * pairs stay."""
    if layout == "interleaved":
        angles = angles.repeat_interleave(2, -1)
        return rotary_embedding_torch.apply_rotary_emb(angles, x, freqs_seq_dim=None)
    angles = torch.cat((angles, angles), -1)
    turned, rest = x.split((angles.shape[-1], x.shape[-1] - angles.shape[-1]), -1)
    cos, sin = angles.cos(), angles.sin()
    turned = apply_rotary_pos_emb(turned, turned, cos, sin, unsqueeze_dim=0)[0][0]
    return torch.cat((turned, rest), -1)


def default_frequencies(base, blocks):
    """axes x pairs: axis a has a block of blocks[a] pairs for itself."""
    frequencies = torch.zeros(len(blocks), sum(blocks))
    for axis, count in enumerate(blocks):
        start = sum(blocks[:axis])
        dim = 2 * count
        frequencies[axis, start:start + count] = 1 / base ** (torch.arange(0, dim, 2) / dim)
    return frequencies


def array(x):
    assert x.isfinite().all()
    return {"shape": list(x.shape), "data": x.detach().flatten().tolist()}


def case(name, layout, head_dim, blocks, base=10000.0, heads=1, kv_heads=1, drawn=False,
         distances=False, causal=False, size=1.0):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) * 1000).round() / 1000

    n_q, n_k, value_dim, axes = 5, 7, 3, len(blocks)
    inputs = {
        "query": normal(n_q, heads * head_dim),
        "key": normal(n_k, kv_heads * head_dim),
        "value": normal(n_k, kv_heads * value_dim),
        "frequencies": normal(axes, sum(blocks)) if drawn else default_frequencies(base, blocks),
    }
    if distances:
        inputs["distances"] = size * normal(n_q * n_k)
    fixed = {}
    if not distances:
        fixed = {f"{side}_positions": size * normal(n, axes)
                 for side, n in (("query", n_q), ("key", n_k))}
    for x in inputs.values():
        x.requires_grad_()

    def split(x, heads):
        return x.reshape(len(x), heads, -1).transpose(0, 1)  # heads x rows x columns

    query, key, value = (split(inputs[x], h) for x, h in
                         (("query", heads), ("key", kv_heads), ("value", kv_heads)))
    frequencies = inputs["frequencies"]
    if distances:
        key, value = (x.repeat_interleave(heads // kv_heads, 0) for x in (key, value))
        angles = inputs["distances"].reshape(n_q, n_k, 1) * frequencies[0]
        keys = key[:, None].expand(heads, n_q, n_k, head_dim)
        keys = torch.stack([rotate(layout, k, angles) for k in keys])
        scores = torch.einsum("hid,hijd->hij", query, keys) / head_dim ** 0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(n_q, n_k).tril().bool(), -torch.inf)
        out = scores.softmax(-1) @ value
    else:
        query, key = (
            torch.stack([rotate(layout, head, fixed[positions] @ frequencies) for head in x])
            for x, positions in ((query, "query_positions"), (key, "key_positions")))
        out = scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=causal, enable_gqa=True)[0]
    out = out.transpose(0, 1).reshape(n_q, -1)
    grad_out = normal(*out.shape)
    (out * grad_out).sum().backward()
    return {
        "name": name, "layout": layout, "head_dim": head_dim, "rotary_dim": 2 * sum(blocks),
        "axes": axes, "base": None if drawn else base, "heads": heads, "kv_heads": kv_heads,
        "causal": causal,
        **{key: array(x) for key, x in {**inputs, **fixed}.items()},
        "grad_out": array(grad_out), "out": array(out),
        **{f"grad_{key}": array(x.grad) for key, x in inputs.items()},
    }


def cases():
    for layout in "half", "interleaved":
        yield case(f"{layout}", layout, 8, [4], size=10)
        yield case(f"{layout}_heads", layout, 6, [3], base=100.0, heads=4, kv_heads=2, causal=True,
                   size=5)
        yield case(f"{layout}_partial", layout, 7, [2], base=2.0, heads=2, kv_heads=2)
        yield case(f"{layout}_axes", layout, 11, [3, 2], base=50.0, size=10)
        yield case(f"{layout}_matrix", layout, 8, [2, 1, 1], drawn=True, heads=2, kv_heads=1)
        yield case(f"{layout}_wide", layout, 64, [32], size=30)
        yield case(f"{layout}_distances", layout, 8, [4], distances=True, size=10)
        yield case(f"{layout}_distances_heads", layout, 6, [3], base=100.0, heads=4, kv_heads=2,
                   distances=True, causal=True, size=3)
        yield case(f"{layout}_distances_partial", layout, 7, [2], drawn=True, heads=2, kv_heads=2,
                   distances=True)


def angles():
    mp.dps = 60
    for frequency in 1.0, 0.1, 1 / 3, 10000 ** (-62 / 64):
        for position in 0.0, -1.7, 1e5 + 0.3, 1e7 + 0.1, -123456789.75, 3e14 / 7:
            angle = mpf(frequency) * mpf(position)
            yield [frequency, position, float(mp.sin(angle)), float(mp.cos(angle))]


def main():
    torch.set_default_dtype(torch.float64)
    versions = {"python": platform.python_version()}
    versions |= {peer: version(peer) for peer in PEERS}
    text = (
        '{\n"generator": "tests/golden/graph_rope.py",\n'
        f'"versions": {json.dumps(versions)},\n'
        f'"angles": {json.dumps(list(angles()))},\n'
        '"cases": [\n' + ",\n".join(json.dumps(c, allow_nan=False) for c in cases()) + "\n]\n}\n"
    )
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
