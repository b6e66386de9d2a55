"""Golden answers of PyTorch Geometric's attention layers with numbers for each edge: weights that multiply
alpha after the softmax, and a bias that is added to the logits before it, with gradients.

Writes pyg_pairs.json next to this file, with the layout of pyg_conv.json. To make it again, as in pyg_conv.py:

    python tests/golden/pyg_pairs.py

PyG has no argument for either, so the softmax that a layer calls is replaced by one that adds the bias before and
multiplies by the weights after it; everything else is the layer's own. alpha is without the weights. weights and
edge_bias are edges x heads, or edges x 1, or null.
"""

import json
import platform
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy
import torch
import torch_geometric
from pyg_conv import Draw, array, edge_list, finite
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv
from torch_geometric.utils import softmax

MODULES = {GATConv: "gat_conv", GATv2Conv: "gatv2_conv", TransformerConv: "transformer_conv"}


def layer(conv_class, name, heads, edge_dim, weights, edge_bias, concat=True, beta=False):
    """One case. `weights` and `edge_bias` are their numbers of columns, or None."""
    draw = Draw(name)
    options = {"heads": heads, "concat": concat, "edge_dim": edge_dim}
    options |= {"beta": beta} if conv_class is TransformerConv else {"add_self_loops": False}
    conv = conv_class((4, 3), 3, **options)
    params = dict(conv.named_parameters())
    with torch.no_grad():
        for parameter in params.values():
            parameter.copy_(draw.normal(*parameter.shape, scale=0.5))
    x_src, x_dst = draw.normal(6, 4).requires_grad_(), draw.normal(5, 3).requires_grad_()
    edge_index = draw.edges(6, 5, 16, loops=True)
    count = edge_index.shape[1]
    columns = {"edge_attr": edge_dim, "weights": weights, "edge_bias": edge_bias}
    of_edges = {
        key: None if n is None else draw.normal(count, n).requires_grad_()
        for key, n in columns.items()
    }
    grad_out = draw.normal(5, 3 * (heads if concat else 1))
    alphas = []

    def weighted(logits, *args, **kwargs):
        if of_edges["edge_bias"] is not None:
            logits = logits + of_edges["edge_bias"]
        alphas.append(softmax(logits, *args, **kwargs))
        return alphas[-1] if of_edges["weights"] is None else alphas[-1] * of_edges["weights"]

    module = import_module(f"torch_geometric.nn.conv.{MODULES[conv_class]}")
    with mock.patch.object(module, "softmax", weighted):
        out = conv((x_src, x_dst), edge_index, of_edges["edge_attr"])
    (alpha,) = alphas
    assert alpha.shape == (count, heads) and out.shape == grad_out.shape

    named = {"x_src": x_src, "x_dst": x_dst} | of_edges
    leaves = {key: leaf for key, leaf in named.items() if leaf is not None}
    grads = torch.autograd.grad(out, [*leaves.values(), *params.values()], grad_out)
    by_leaf = dict(zip(leaves, grads, strict=False))
    is_transformer = conv_class is TransformerConv
    return {
        "name": name, "conv": conv_class.__name__, "heads": heads, "out_channels": 3,
        "in_src": 4, "in_dst": 3, "concat": concat, "bias": True,
        "negative_slope": None if is_transformer else 0.2, "residual": is_transformer,
        "beta": beta, "share_weights": False,
        "x_src": array(x_src), "x_dst": array(x_dst), "edge_index": edge_list(edge_index),
        **{key: array(leaf) for key, leaf in of_edges.items()},
        "params": {key: array(p) for key, p in params.items()},
        "out": finite(out), "alpha": finite(alpha), "grad_out": array(grad_out),
        "grads": {
            **{key: finite(by_leaf[key]) if key in by_leaf else None for key in named},
            "params": {key: finite(g)
                       for key, g in zip(params, grads[len(leaves):], strict=True)},
        },
    }


def cases():
    for prefix, conv in ("gat", GATConv), ("gatv2", GATv2Conv), ("transformer", TransformerConv):
        yield layer(conv, f"{prefix}_weights", 2, None, 1, None)
        yield layer(conv, f"{prefix}_weights_of_heads", 3, 2, 3, None, concat=False)
        yield layer(conv, f"{prefix}_bias", 2, 2, None, 1)
        yield layer(conv, f"{prefix}_bias_of_heads", 2, None, None, 2)
        yield layer(conv, f"{prefix}_both", 2, 3, 1, 2)
    yield layer(TransformerConv, "transformer_beta_both", 2, 2, 2, 1, beta=True)


def main():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)

    def dumps(x):
        return json.dumps(x, allow_nan=False, separators=(",", ":"))

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_geometric": torch_geometric.__version__,
        "numpy": numpy.__version__,
    }
    lines = ",\n".join(dumps(case) for case in cases())
    text = (
        '{\n"generator":"tests/golden/pyg_pairs.py",\n'
        f'"versions":{dumps(versions)},\n"cases":[\n{lines}\n]\n}}\n'
    )
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
