"""Golden answers of PyTorch's transformer encoder, with gradients, for the Rust tests.

Writes torch_transformer.json next to this file. To make it again (Python 3.11):

    python -m venv ~/torchenv && . ~/torchenv/bin/activate
    pip install torch==2.15.0 numpy==2.4.6
    python tests/golden/torch_transformer.py

Everything is float64 on the CPU. The inputs are the same on every machine; the
last digits of the answers can depend on the processor (order of summation).

The modules are in training mode without dropout: in evaluation mode PyTorch
replaces the outputs of padded rows by zeros. Gradients are those of
sum(out * grad_out).
"""

import json
import platform
import zlib
from pathlib import Path

import torch
from torch import nn

EMBED, HEADS, HIDDEN, LENGTH = 6, 3, 5, 4


class Draw:
    """Random numbers seeded by the case's name, so that adding a case changes no other."""

    def __init__(self, name):
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape):
        # Three decimals are enough, and keep the JSON small.
        x = torch.randn(*shape, generator=self.generator)
        return (x * 1000).round() / 1000


def array(x):
    """A tensor for the JSON: row-major, booleans as 0/1."""
    assert x.isfinite().all()
    data = x.detach().int() if x.dtype == torch.bool else x.detach()
    return {"shape": list(x.shape), "data": data.flatten().tolist()}


def case(name, layers=None, norm=False, norm_first=False, activation="relu", bias=True,
         epsilon=1e-5, padding=None, causal=False):
    """One layer, or an encoder of so many layers. `padding` lists the hidden keys."""
    draw = Draw(name)
    module = nn.TransformerEncoderLayer(
        EMBED, HEADS, dim_feedforward=HIDDEN, dropout=0.0, activation=activation,
        layer_norm_eps=epsilon, batch_first=True, norm_first=norm_first, bias=bias)
    if layers is not None:
        module = nn.TransformerEncoder(
            module, layers, norm=nn.LayerNorm(EMBED) if norm else None,
            enable_nested_tensor=False)
    with torch.no_grad():  # all parameters, also those that start as 0 or 1
        for key, parameter in module.named_parameters():
            is_scale = "norm" in key and key.endswith("weight")
            parameter.copy_(draw.normal(*parameter.shape) / 2 + (1 if is_scale else 0))
    params = dict(module.named_parameters())
    assert list(params) == list(module.state_dict())

    x = draw.normal(LENGTH, EMBED).requires_grad_()
    grad_out = draw.normal(LENGTH, EMBED)
    hidden = None
    if padding is not None:
        hidden = torch.zeros(LENGTH, dtype=torch.bool)
        hidden[padding] = True
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else None
    # The names of the masks of a layer and of an encoder differ.
    options = {"src_mask" if layers is None else "mask": mask, "src_key_padding_mask": hidden}
    out = module(x, **options)
    grads = torch.autograd.grad(out, [x, *params.values()], grad_out)
    return {
        "name": name, "layers": layers, "norm": norm, "norm_first": norm_first,
        "activation": activation, "bias": bias, "epsilon": epsilon, "causal": causal,
        "hidden_keys": None if hidden is None else array(hidden),
        "x": array(x), "grad_out": array(grad_out), "out": array(out), "grad_x": array(grads[0]),
        "params": {key: array(p) for key, p in params.items()},
        "grad_params": {key: array(g) for key, g in zip(params, grads[1:], strict=True)},
    }


def cases():
    for norm_first in False, True:
        for activation in "relu", "gelu":
            order = "pre" if norm_first else "post"
            options = {"norm_first": norm_first, "activation": activation}
            name = f"{order}_{activation}"
            yield case(f"layer_{name}", **options)
            yield case(f"layer_{name}_padding", padding=[1], **options)
            yield case(f"layer_{name}_causal", causal=True, **options)
            yield case(f"encoder_{name}", layers=2, norm=norm_first, **options)
            yield case(f"encoder_{name}_padding_causal", layers=3, norm=norm_first,
                       padding=[2], causal=True, **options)
    yield case("layer_no_bias", bias=False, activation="gelu")
    yield case("layer_epsilon", epsilon=0.1, norm_first=True)
    yield case("encoder_norm_after_post", layers=2, norm=True)


def main():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    # One case a line. Floats as repr, which reads back exactly.
    lines = ",\n".join(json.dumps(case, allow_nan=False) for case in cases())
    text = (
        '{\n"generator": "tests/golden/torch_transformer.py",\n'
        f'"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]\n}}\n'
    )
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
