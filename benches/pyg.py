"""Graph attention layers of PyG, also exported to ONNX: forward time, training time and memory on one thread.

    pip install torch==2.15.0 torch_geometric==2.8.1 onnx onnxruntime==1.32.0 safetensors
    python benches/pyg.py FOLDER

FOLDER receives the ONNX models, their parameters, the graph, and the outputs. With these files,
`benches/peers/src/bin/pyg_models.rs` measures the same layers of this crate, and rten. The graph has 50,000 nodes with 64 features and
800,000 edges with 8; a few nodes are the source of many edges.
"""

import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch_geometric
from safetensors.numpy import save_file
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv

NODES, EDGES, ROUNDS = 50_000, 800_000, 5
FEATURES, OF_EDGES = 64, 8
SIZES = dict(in_channels=FEATURES, out_channels=16, heads=4, edge_dim=OF_EDGES)


def measure(run):
    """Returns the fastest time in ms, and by how many MB the resident memory grew at most."""
    run()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return f"{1e3 * best:.0f} ms, {(resident('VmHWM') - before) / 1e3:.0f} MB"


def resident(key):
    """Returns a line of Linux's report on this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


def main(folder):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    print("PyG", torch_geometric.__version__, "onnxruntime", onnxruntime.__version__)
    draw = np.random.default_rng(1)
    names = draw.permutation(NODES)
    targets = np.sort(draw.integers(0, NODES, EDGES))
    sources = names[(NODES * draw.random(EDGES) ** 3).astype(int)]
    x, edge_attr = torch.randn(NODES, FEATURES), torch.randn(EDGES, OF_EDGES)
    edge_index = torch.tensor(np.stack([sources, targets]))
    inputs = {"x": x.numpy(), "edge_index": edge_index.numpy(), "edge_attr": edge_attr.numpy()}
    # Numbers of nodes as floats, since the crate reads only these from safetensors.
    save_file(inputs | {"edge_index": edge_index.double().numpy()}, folder / "graph.safetensors")
    layers = {
        "Gat": GATConv(**SIZES, add_self_loops=False),
        "GatV2": GATv2Conv(**SIZES, add_self_loops=False),
        "DotProduct": TransformerConv(**SIZES),
    }
    for name, layer in layers.items():
        path = str(folder / f"{name}.onnx")
        torch.onnx.export(
            layer.eval(),
            (x[:100], edge_index[:, :400] % 100, edge_attr[:400]),
            path,
            input_names=list(inputs),
            output_names=["out"],
            dynamic_axes={"x": {0: "nodes"}, "edge_index": {1: "edges"}, "edge_attr": {0: "edges"}},
            opset_version=18,
            dynamo=False,
        )
        with torch.no_grad():
            out = layer(x, edge_index, edge_attr).numpy()
            forward = measure(lambda: layer(x, edge_index, edge_attr))
        params = {f"layer.{key}": param.numpy() for key, param in layer.state_dict().items()}
        save_file(params | {"out": out}, folder / f"{name}.safetensors")

        def train():
            wanted = x.clone().requires_grad_(), edge_attr.clone().requires_grad_()
            layer(wanted[0], edge_index, wanted[1]).sum().backward()

        print(f"{name}: PyG {forward}; with backward {measure(train)}", flush=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        error = np.abs(session.run(None, inputs)[0] - out).max()
        print(f"{name}: onnxruntime {measure(lambda: session.run(None, inputs))}, error {error:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
