"""Golden answers of lucidrains' performer-pytorch, with gradients, for the Rust tests.

Writes performer.json next to this file. To make it again (Python 3.11):

    python -m venv ~/torchenv && . ~/torchenv/bin/activate
    pip install torch==2.12.1 performer-pytorch==1.1.4 numpy==2.4.6 "setuptools<82"
    python tests/golden/performer.py

Everything is float64 on the CPU. Its epsilon, which is added to every feature and
biases the estimate, is set to 0; so is that of the causal form. Its features are
those of q d^(-1/4), and so of the softmax of q.k / sqrt(d).

Layout: n x (heads*d), as in torch_attention.py.
"""

import importlib.metadata
import json
from pathlib import Path

import torch
from performer_pytorch.performer_pytorch import (
    causal_linear_attention_noncuda,
    generalized_kernel,
    linear_attention,
    softmax_kernel,
)


def array(tensor):
    return {"shape": list(tensor.shape), "data": tensor.flatten().tolist()}


def columns(tensor):
    """heads x n x d to n x (heads*d)."""
    return tensor.transpose(0, 1).flatten(1)


def case(name, seed, kind, heads, n_q, n_k, d, d_v, m, causal=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (x * 1000).round() / 1000

    inputs = [normal(heads, n_q, d), normal(heads, n_k, d), normal(heads, n_k, d_v)]
    for x in inputs:
        x.requires_grad_()
    projection = normal(m, d)
    projection.requires_grad_()
    q, k, v = [x[None] for x in inputs]
    if kind == "positive":
        phi_q = softmax_kernel(q, projection_matrix=projection, is_query=True, eps=0.0)
        phi_k = softmax_kernel(k, projection_matrix=projection, is_query=False, eps=0.0)
    else:
        phi_q = generalized_kernel(q, projection_matrix=projection, kernel_epsilon=1e-3)
        phi_k = generalized_kernel(k, projection_matrix=projection, kernel_epsilon=1e-3)
    if causal:
        out = causal_linear_attention_noncuda(phi_q, phi_k, v, eps=0.0)
    else:
        out = linear_attention(phi_q, phi_k, v)
    grad_out = normal(heads, n_q, d_v)
    (out[0] * grad_out).sum().backward()
    result = {"name": name, "features": kind, "heads": heads, "causal": causal}
    for what, x in zip(["query", "key", "value"], inputs):
        result[what] = array(columns(x.detach()))
        result["grad_" + what] = array(columns(x.grad))
    result["projection"] = array(projection.detach())
    result["grad_projection"] = array(projection.grad)
    result["grad_out"] = array(columns(grad_out))
    result["out"] = array(columns(out.detach()[0]))
    return result


cases = [
    case("positive", 1, "positive", 1, 5, 7, 3, 2, 11),
    case("heads", 2, "positive", 2, 5, 7, 3, 2, 13),
    case("causal", 3, "positive", 2, 7, 7, 3, 5, 11, causal=True),
    case("relu", 4, "relu", 2, 5, 7, 3, 2, 11),
]
versions = {p: importlib.metadata.version(p) for p in ["torch", "performer-pytorch"]}
path = Path(__file__).with_name("performer.json")
path.write_text(json.dumps({"versions": versions, "cases": cases}))
