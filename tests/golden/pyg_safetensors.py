"""A PyTorch Geometric model of two attention layers, as a safetensors file.

Writes examples/data/pyg_gat.safetensors. To make it again (Python 3.11):

    python -m venv ~/torchenv && . ~/torchenv/bin/activate
    pip install torch==2.12.1 torch_geometric==2.8.1 safetensors==0.8.0 numpy==2.4.6
    pip install "setuptools<82"
    python tests/golden/pyg_safetensors.py

The file has the model's state_dict, float32, with PyG's names ("conv1.att", ...),
and a graph with its answer: "graph.edge_index" (int64, 2 x E, sources and then
targets), "graph.edge_attr", "graph.x" and "graph.out", where

    out = conv2(elu(conv1(x, edge_index, edge_attr)), edge_index, edge_attr)

The layers add no self loops; the graph has two of its own. The weights are
random, not trained. The inputs are the same on every machine; the last digits of
the answer can depend on the processor (order of summation).
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import elu
from torch_geometric.nn import GATConv, GATv2Conv

# Six nodes: a ring, some edges back or across, two loops.
EDGES = [(0, 1), (2, 3), (1, 0), (4, 5), (3, 4), (1, 2), (5, 0), (2, 2), (0, 3),
         (5, 4), (2, 1), (4, 1), (0, 0), (3, 5)]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = GATv2Conv(4, 3, heads=2, edge_dim=2, add_self_loops=False)
        self.conv2 = GATConv(6, 2, heads=1, edge_dim=2, concat=True, add_self_loops=False)

    def forward(self, x, edge_index, edge_attr):
        x = elu(self.conv1(x, edge_index, edge_attr))
        return self.conv2(x, edge_index, edge_attr)


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale * 1000).round() / 1000

    model = Model().eval()
    with torch.no_grad():  # all parameters, also the biases, which start as 0
        for parameter in model.parameters():
            parameter.copy_(normal(*parameter.shape, scale=0.5))
    x = normal(6, 4)
    edge_index = torch.tensor(EDGES).T.contiguous()
    edge_attr = normal(len(EDGES), 2)
    with torch.no_grad():
        out = model(x, edge_index, edge_attr)

    tensors = model.state_dict() | {
        "graph.edge_index": edge_index,
        "graph.edge_attr": edge_attr,
        "graph.x": x,
        "graph.out": out,
    }
    path = Path(__file__).parents[2] / "examples" / "data" / "pyg_gat.safetensors"
    save_file(tensors, path)

    # What was written is what was computed with; float64 gives nearly the same answer.
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k], t) for k, t in tensors.items())
    model.load_state_dict({k: t for k, t in read.items() if not k.startswith("graph.")})
    graph = [read[f"graph.{k}"] for k in ("x", "edge_index", "edge_attr")]
    with torch.no_grad():
        exact = model.double()(graph[0].double(), graph[1], graph[2].double())
    torch.testing.assert_close(read["graph.out"].double(), exact, rtol=1e-5, atol=1e-6)
    assert path.stat().st_size < 8192


if __name__ == "__main__":
    main()
