"""Golden answers of PyTorch Geometric's attention layers, with gradients, for the Rust tests.

Writes pyg_conv.json next to this file. To make it again (Python 3.11):

    python -m venv ~/torchenv && . ~/torchenv/bin/activate
    pip install torch==2.12.1 torch_geometric==2.8.1 numpy==2.4.6 "setuptools<82"
    python tests/golden/pyg_conv.py

Everything is float64 on the CPU, and small. The inputs are the same on every
machine; the last digits of the answers can depend on the processor (order of
summation).

Layout: node features are nodes x channels, edge features edges x edge_dim, edge
e goes from edge_index.src[e] to edge_index.dst[e] and is a message to its
target; heads are blocks of columns of out (their mean if not concat); alpha is
edges x heads, in the order of the edges. x_dst is null where one set of nodes is
both sources and targets (then x_src's gradient is the whole one). The params are
the layer's state_dict, in its order; with share_weights (GATv2Conv) lin_l and
lin_r are one tensor, and both names have its whole gradient. For GATConv,
share_weights says that one lin projects sources and targets; for
TransformerConv, residual is root_weight. Gradients are those of
sum(out * grad_out). No input of LeakyReLU is near its kink, and GATConv's are on
both sides of it: other draws are made again, from the name with "#1", "#2", ...
Self loops are never added by the layer; the section "self_loops" shows how it
would add them.
"""

import json
import math
import platform
import zlib
from pathlib import Path

import numpy
import torch
import torch_geometric
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv
from torch_geometric.utils import add_self_loops, remove_self_loops

KINK = 1e-3  # no input of LeakyReLU is as near to 0 as this


class Draw:
    """Random inputs seeded by the case's name, so that adding a case changes no other."""

    def __init__(self, name):
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape, scale=1):
        # Three decimals are enough, and keep the JSON small.
        x = torch.randn(*shape, generator=self.generator) * scale
        return (x * 1000).round() / 1000

    def edges(self, n_src, n_dst, count, loops):
        """`count` different edges; every target has one, and they are not sorted."""
        pairs = [(s, t) for s in range(n_src) for t in range(n_dst) if loops or s != t]
        while True:
            order = torch.randperm(len(pairs), generator=self.generator)[:count].tolist()
            src, dst = zip(*(pairs[i] for i in order), strict=True)
            if set(dst) == set(range(n_dst)) and list(dst) != sorted(dst):
                return torch.tensor([src, dst])


# Two edges from 4 to 1, two from 1 to 3 and two loops at 3; loops at 0, 3, 4 and
# 5, where 5 has no other edge to it; none to 2 and 6; none from 6. Seven nodes.
ODD_EDGES = [(4, 1), (0, 0), (1, 3), (3, 3), (4, 1), (2, 0), (0, 4), (5, 5),
             (5, 1), (1, 0), (4, 4), (1, 3), (3, 3), (3, 4)]
# From five sources to seven targets: none to 3 and 6, two from 2 to 5; "loops"
# (1, 1) and (4, 4), which here are edges like any other; none from 3.
ODD_BIPARTITE_EDGES = [(2, 5), (0, 1), (4, 4), (1, 0), (2, 5), (0, 4), (1, 1),
                       (4, 2), (2, 0), (4, 5), (0, 2), (2, 4)]


def array(x):
    """A tensor for the JSON: row-major."""
    return None if x is None else {"shape": list(x.shape), "data": x.detach().flatten().tolist()}


def finite(x):
    """An answer for the JSON: never NaN or infinite."""
    assert x.isfinite().all()
    return array(x)


def edge_list(edge_index):
    return {"src": edge_index[0].tolist(), "dst": edge_index[1].tolist()}


# --- Part 1: the layers ------------------------------------------------------


def by_hand(conv, x_src, x_dst, edge_index, edge_attr):
    """The logits, edges x heads, and the inputs of LeakyReLU (None if it has none)."""
    src, dst = edge_index

    def project(name, x, rows=slice(None)):
        return getattr(conv, name)(x).reshape(-1, conv.heads, conv.out_channels)[rows]

    edge = 0 if edge_attr is None else project("lin_edge", edge_attr)
    if isinstance(conv, GATConv):
        names = ("lin_src", "lin_dst") if conv.lin is None else ("lin", "lin")
        before = (project(names[0], x_src, src) * conv.att_src).sum(-1)
        before = before + (project(names[1], x_dst, dst) * conv.att_dst).sum(-1)
        if edge_attr is not None:
            before = before + (edge * conv.att_edge).sum(-1)
        return torch.where(before < 0, conv.negative_slope * before, before), before
    if isinstance(conv, GATv2Conv):
        before = project("lin_l", x_src, src) + project("lin_r", x_dst, dst) + edge
        after = torch.where(before < 0, conv.negative_slope * before, before)
        return (after * conv.att).sum(-1), before
    key = project("lin_key", x_src, src) + edge
    return (project("lin_query", x_dst, dst) * key).sum(-1) / math.sqrt(conv.out_channels), None


def softmax_by_hand(logits, dst):
    alpha = torch.empty_like(logits)
    for target in dst.unique():
        alpha[dst == target] = logits[dst == target].softmax(0)
    return alpha


def both_signs(before, dst):
    """Whether in every head some target has edges on both sides of the kink: else
    GATConv's att_dst only shifts that target's logits, and has gradient 0."""
    groups = [before[dst == target] for target in dst.unique()]
    return torch.stack([(g < 0).any(0) & (g > 0).any(0) for g in groups]).any(0).all()


def layer(conv_class, name, in_channels=3, out_channels=2, heads=1, n_src=5, n_dst=None,
          edges=10, loops=False, edge_dim=None, concat=True, bias=True, residual=None, beta=None,
          negative_slope=0.2, share_weights=None):
    """One case. `edges` is a number of edges to draw or a list of them; it is
    bipartite if `n_dst` is given. `residual`, `beta` and `share_weights` are
    given to the layer only if they are not None (residual as root_weight to
    TransformerConv)."""
    options = {"heads": heads, "concat": concat, "edge_dim": edge_dim, "bias": bias}
    if conv_class is TransformerConv:
        negative_slope = None
        residual = True if residual is None else residual
        options |= {"root_weight": residual}
        if beta is not None:
            options["beta"] = beta
    else:
        options |= {"add_self_loops": False, "negative_slope": negative_slope}
        if residual is not None:
            options["residual"] = residual
        if share_weights is not None:
            options["share_weights"] = share_weights
    one_size = isinstance(in_channels, int)
    in_src, in_dst = (in_channels, in_channels) if one_size else in_channels
    bipartite = n_dst is not None
    if not bipartite:
        assert in_src == in_dst
        n_dst = n_src

    attempt = 0
    while True:
        draw = Draw(f"{name}#{attempt}" if attempt else name)
        conv = conv_class(in_channels, out_channels, **options)
        # All parameters, also the biases, which start as 0. With share_weights
        # the state_dict has the same one under two names.
        params = dict(conv.named_parameters(remove_duplicate=False))
        assert list(params) == list(conv.state_dict())
        drawn = set()
        with torch.no_grad():
            for parameter in params.values():
                if id(parameter) not in drawn:
                    parameter.copy_(draw.normal(*parameter.shape, scale=0.5))
                    drawn.add(id(parameter))
        x_src = draw.normal(n_src, in_src).requires_grad_()
        x_dst = draw.normal(n_dst, in_dst).requires_grad_() if bipartite else None
        if isinstance(edges, int):
            edge_index = draw.edges(n_src, n_dst, edges, loops=bipartite or loops)
        else:
            edge_index = torch.tensor(edges).T.contiguous()
        count = edge_index.shape[1]
        edge_attr = None if edge_dim is None else draw.normal(count, edge_dim).requires_grad_()
        grad_out = draw.normal(n_dst, out_channels * (heads if concat else 1))

        targets = x_dst if bipartite else x_src
        logits, before = by_hand(conv, x_src, targets, edge_index, edge_attr)
        if before is None or before.abs().min() > KINK and (
                conv_class is GATv2Conv or both_signs(before, edge_index[1])):
            break
        attempt += 1

    x = (x_src, x_dst) if bipartite else x_src
    out, (same_edges, alpha) = conv(x, edge_index, edge_attr, return_attention_weights=True)
    assert torch.equal(same_edges, edge_index)
    dst = edge_index[1]
    assert (dst.diff() < 0).any()  # not sorted
    torch.testing.assert_close(alpha, softmax_by_hand(logits, dst), rtol=1e-12, atol=1e-14)
    assert alpha.shape == (count, heads) and out.shape == grad_out.shape
    sums = torch.zeros(n_dst, heads).index_add(0, dst, alpha)
    seen = torch.zeros(n_dst, dtype=torch.bool).index_fill(0, dst, True)
    torch.testing.assert_close(sums, seen[:, None].expand(n_dst, heads).double(),
                               rtol=1e-14, atol=1e-14)

    # A target with no edge to it gets 0 from the attention, and then as any
    # other the residual and the bias.
    alone = torch.zeros(n_dst, out.shape[1])
    if conv_class is TransformerConv:
        if residual:
            root = conv.lin_skip(targets)
            alone = root
            if beta:
                gate = conv.lin_beta(torch.cat([root * 0, root, -root], -1)).sigmoid()
                alone = gate * root
    else:
        if residual:
            alone = alone + conv.res(targets)
        if bias:
            alone = alone + conv.bias
    torch.testing.assert_close(out[~seen], alone[~seen], rtol=1e-14, atol=1e-14)

    leaves = [x_src] + [t for t in (x_dst, edge_attr) if t is not None]
    # Without root_weight lin_skip is there, but unused; its gradient is then 0.
    grads = torch.autograd.grad(out, leaves + list(params.values()), grad_out,
                                allow_unused=True, materialize_grads=True)
    by_leaf = {id(t): g for t, g in zip(leaves, grads, strict=False)}
    return {
        "name": name, "conv": conv_class.__name__, "heads": heads, "out_channels": out_channels,
        "in_src": in_src, "in_dst": in_dst, "bipartite": bipartite, "concat": concat,
        "edge_dim": edge_dim, "negative_slope": negative_slope, "residual": bool(residual),
        "beta": bool(beta),
        "share_weights": one_size if conv_class is GATConv else bool(share_weights),
        "bias": bias,
        "x_src": array(x_src), "x_dst": array(x_dst), "edge_index": edge_list(edge_index),
        "edge_attr": array(edge_attr), "params": {k: array(p) for k, p in params.items()},
        "out": finite(out), "alpha": finite(alpha), "grad_out": array(grad_out),
        "grads": {
            "x_src": finite(by_leaf[id(x_src)]),
            "x_dst": None if x_dst is None else finite(by_leaf[id(x_dst)]),
            "edge_attr": None if edge_attr is None else finite(by_leaf[id(edge_attr)]),
            "params": {k: finite(g)
                       for k, g in zip(params, grads[len(leaves):], strict=True)},
        },
    }


def layer_cases():
    for prefix, conv in ("gat", GATConv), ("gatv2", GATv2Conv), ("transformer", TransformerConv):
        yield layer(conv, f"{prefix}_plain", in_channels=4, out_channels=3)
        yield layer(conv, f"{prefix}_edge_concat", heads=3, edge_dim=2, n_src=6, edges=15)
        yield layer(conv, f"{prefix}_edge_mean", heads=3, edge_dim=2, concat=False,
                    out_channels=4, edges=12)
        # Fewer targets than sources, and more.
        yield layer(conv, f"{prefix}_bipartite", in_channels=(3, 5), n_src=6, n_dst=4,
                    heads=2, edge_dim=3, out_channels=3, edges=13)
        yield layer(conv, f"{prefix}_bipartite_odd_edges", in_channels=(4, 2), n_src=5, n_dst=7,
                    heads=2, edge_dim=2, edges=ODD_BIPARTITE_EDGES, residual=True)
        yield layer(conv, f"{prefix}_odd_edges", n_src=7, heads=2, edge_dim=2, out_channels=3,
                    edges=ODD_EDGES)
        yield layer(conv, f"{prefix}_no_bias", heads=2, edge_dim=1, bias=False)
    for prefix, conv in ("gat", GATConv), ("gatv2", GATv2Conv):
        yield layer(conv, f"{prefix}_residual", heads=2, residual=True, loops=True)
        yield layer(conv, f"{prefix}_residual_mean", heads=2, concat=False, edge_dim=2,
                    out_channels=5, residual=True)
        yield layer(conv, f"{prefix}_slope", heads=2, edge_dim=2, n_src=4, edges=9,
                    negative_slope=0.05)
    # Sources and targets projected apart, yet the same nodes; and the other way round.
    yield layer(GATConv, "gat_two_projections", in_channels=(3, 3), heads=2, edge_dim=2)
    yield layer(GATConv, "gat_bipartite_one_projection", n_src=5, n_dst=4, heads=2, edge_dim=2)
    yield layer(GATv2Conv, "gatv2_shared", heads=2, edge_dim=2, share_weights=True)
    yield layer(GATv2Conv, "gatv2_bipartite_shared", n_src=4, n_dst=5, heads=2, edge_dim=2,
                share_weights=True)
    for suffix, concat in ("", True), ("_mean", False):
        yield layer(TransformerConv, f"transformer_no_root{suffix}", heads=2, concat=concat,
                    edge_dim=2, out_channels=3, residual=False)
        yield layer(TransformerConv, f"transformer_beta{suffix}", heads=2, concat=concat,
                    edge_dim=2, beta=True, loops=True)
    yield layer(TransformerConv, "transformer_beta_no_bias_odd_edges", n_src=7, heads=2,
                edges=ODD_EDGES, beta=True, bias=False)


# --- Part 2: self loops ------------------------------------------------------


def self_loops(name, fill_value, num_nodes=7, edges=ODD_EDGES, channels=2):
    """What GATConv and GATv2Conv do if add_self_loops is True: existing loops go,
    with their features, and one for each node comes at the end. "mean" is the
    mean over the edges to the node, loops left out; 0 if there are none."""
    draw = Draw(name)
    edge_index = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T
    count = edge_index.shape[1]
    edge_attr = None if channels is None else draw.normal(count, channels)
    bare_index, bare_attr = remove_self_loops(edge_index, edge_attr)
    out_index, out_attr = add_self_loops(bare_index, bare_attr, fill_value=fill_value,
                                         num_nodes=num_nodes)
    kept = edge_index[0] != edge_index[1]
    loops = torch.arange(num_nodes).expand(2, -1)
    assert torch.equal(out_index, torch.cat([edge_index[:, kept], loops], 1))
    if edge_attr is not None:
        for node in range(num_nodes):
            into = edge_attr[kept & (edge_index[1] == node)]
            want = torch.full((channels,), 0.0 if fill_value == "mean" else fill_value)
            if fill_value == "mean" and len(into):
                want = into.mean(0)
            torch.testing.assert_close(out_attr[kept.sum() + node], want)
    return {
        "name": name, "fill_value": fill_value, "num_nodes": num_nodes,
        "edge_index": edge_list(edge_index), "edge_attr": array(edge_attr),
        "out_edge_index": edge_list(out_index),
        "out_edge_attr": None if out_attr is None else finite(out_attr),
    }


def self_loop_cases():
    for name, fill_value in ("mean", "mean"), ("zero", 0.0), ("number", 2.5):
        yield self_loops(f"loops_{name}", fill_value)
    yield self_loops("loops_no_features", "mean", channels=None)
    yield self_loops("loops_only", "mean", num_nodes=3, edges=[(1, 1), (0, 0), (1, 1)])
    # Nodes 4 and 5 have no edge at all.
    yield self_loops("loops_more_nodes", "mean", num_nodes=6, channels=3,
                     edges=[(3, 0), (1, 2), (2, 2), (0, 2), (3, 0), (0, 1)])


def main():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)

    def dumps(x):
        # Floats as repr, which reads back exactly; NaN and Infinity refused.
        return json.dumps(x, allow_nan=False, separators=(",", ":"))

    def lines(cases):  # one case a line
        return "[\n" + ",\n".join(dumps(case) for case in cases) + "\n]"

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_geometric": torch_geometric.__version__,
        "numpy": numpy.__version__,
    }
    text = (
        '{\n"generator":"tests/golden/pyg_conv.py",\n'
        f'"versions":{dumps(versions)},\n'
        f'"cases":{lines(layer_cases())},\n'
        f'"self_loops":{lines(self_loop_cases())}\n'
        "}\n"
    )
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
