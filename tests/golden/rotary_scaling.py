"""Golden answers of rotary frequencies for longer contexts, for the Rust tests.

Writes rotary_scaling.json next to this file. To make it again (Python 3.11):

    pip install torch==2.15.0 transformers==5.24.0
    python tests/golden/rotary_scaling.py

The frequencies and the attention factor are those of transformers' `ROPE_INIT_FUNCTIONS`, whose `torch.float`
is replaced by float64 meanwhile. Queries and keys are rotated by `GPTNeoXRotaryEmbedding` and
`apply_rotary_pos_emb` of GPT-NeoX, which rotates a part of the columns and multiplies it by the attention
factor; the rest of the columns stays.

Layout: no batch axis and one head: x is n x d, positions n.
"""

import json
import platform
import zlib
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from transformers import GPTNeoXConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXRotaryEmbedding,
    apply_rotary_pos_emb,
)

PEERS = "torch", "transformers"
HEADS = 1
POSITIONS = 1, 500, 131071


def array(tensor):
    tensor = tensor.detach()
    return {"shape": list(tensor.shape), "data": tensor.flatten().tolist()}


def case(name, head_dim, base, rope_type, part=1.0, max_len=4096, **parameters):
    config = GPTNeoXConfig(
        hidden_size=HEADS * head_dim, num_attention_heads=HEADS, max_position_embeddings=max_len,
        rope_parameters={"rope_type": rope_type, "rope_theta": base,
                         "partial_rotary_factor": part, **parameters})
    torch.manual_seed(zlib.crc32(name.encode()))
    x = torch.randn(1, HEADS, len(POSITIONS), head_dim)
    positions = torch.tensor([POSITIONS])
    double = mock.patch.multiple(torch, float=torch.float64, float32=torch.float64)
    with double, mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        rotary = GPTNeoXRotaryEmbedding(config)
        if rope_type == "dynamic":  # as if reading max(POSITIONS) + 1 tokens
            rotary.inv_freq, rotary.attention_scaling = ROPE_INIT_FUNCTIONS["dynamic"](
                config, seq_len=max(POSITIONS) + 1)
        frequencies, factor = rotary.inv_freq, float(rotary.attention_scaling)
        angles = positions[..., None].double() * frequencies
        cos, sin = (torch.cat((f(angles), f(angles)), -1) * factor for f in (torch.cos, torch.sin))
        if rope_type != "dynamic":
            own = rotary(x, positions)
            assert torch.equal(own[0], cos) and torch.equal(own[1], sin)
        out, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert frequencies.dtype == torch.float64 and out.dtype == torch.float64

    def rows(heads):
        return array(heads[0].transpose(0, 1).reshape(len(POSITIONS), -1))

    return {
        "name": name, "head_dim": head_dim, "rotary_dim": int(head_dim * part), "base": base,
        "rope_type": rope_type, "max_len": max_len, "parameters": parameters,
        "frequencies": array(frequencies), "attention_factor": factor,
        "positions": list(POSITIONS), "x": rows(x), "out": rows(out),
    }


def cases():
    yield case("linear", 64, 1e4, "linear", factor=4.0)
    yield case("linear, partial", 80, 1e4, "linear", part=0.25, factor=2.5)
    yield case("dynamic", 64, 1e4, "dynamic", factor=2.0)
    yield case("dynamic, partial", 96, 5e5, "dynamic", part=0.5, max_len=8192, factor=4.0)
    qwen = {"factor": 4.0, "original_max_position_embeddings": 32768}
    yield case("yarn, Qwen", 128, 1e6, "yarn", max_len=131072, **qwen)
    for part in 0.25, 0.5, 0.75:
        yield case(f"yarn, {part}", 64, 1e4, "yarn", part=part, factor=16.0,
                   original_max_position_embeddings=4096)
    yield case("yarn, not truncated", 64, 150000.0, "yarn", factor=32.0, beta_fast=32.0,
               beta_slow=1.0, truncate=False, original_max_position_embeddings=4096)
    yield case("yarn, DeepSeek", 64, 1e4, "yarn", factor=40.0, beta_fast=32, beta_slow=1,
               mscale=1.0, mscale_all_dim=0.707, original_max_position_embeddings=4096)
    yield case("yarn, factor", 64, 1e4, "yarn", factor=8.0, attention_factor=0.9,
               beta_fast=16.0, beta_slow=2.0, original_max_position_embeddings=2048)
    # The ramp begins before the first pair, ends after the last one, or has no length.
    yield case("yarn, short", 16, 1e4, "yarn", factor=4.0, original_max_position_embeddings=64)
    yield case("yarn, low base", 8, 4.0, "yarn", factor=4.0,
               original_max_position_embeddings=2048)
    yield case("yarn, one pair", 8, 1e4, "yarn", part=0.25, factor=4.0,
               original_max_position_embeddings=2048)
    yield case("yarn, no factor", 64, 1e4, "yarn", factor=1.0,
               original_max_position_embeddings=4096)
    llama = {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192}
    yield case("llama3, 3.1", 128, 5e5, "llama3", max_len=131072, factor=8.0, **llama)
    yield case("llama3, 3.2", 64, 5e5, "llama3", max_len=131072, factor=32.0, **llama)
    yield case("llama3, partial", 64, 1e4, "llama3", part=0.5, factor=2.0, low_freq_factor=2.0,
               high_freq_factor=3.0, original_max_position_embeddings=500)


def main():
    torch.set_default_dtype(torch.float64)
    versions = {"python": platform.python_version()}
    versions |= {peer: version(peer) for peer in PEERS}
    text = (
        '{\n"generator": "tests/golden/rotary_scaling.py",\n'
        f'"versions": {json.dumps(versions)},\n'
        '"cases": [\n' + ",\n".join(json.dumps(c, allow_nan=False) for c in cases()) + "\n]\n}\n"
    )
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
