"""The PyG side of the example `finetune_pyg`, with torch 2.15.0, torch_geometric 2.8.1, safetensors 0.8.0.

    python examples/finetune_pyg.py draw  FOLDER                    # writes a small graph of papers
    python examples/finetune_pyg.py train FOLDER MODEL [CLASSES]    # trains a GAT on the first classes, 4 by default
    python examples/finetune_pyg.py check FOLDER MODEL              # loads a model that was trained on in Rust

The files `data/papers` and `data/pyg_papers.safetensors` of the examples were made by the first two commands. A model is a
safetensors file with the state dict under PyG's names and the logits of all nodes as `out`. The folder may be that of
another graph, such as Cora: `nodes.csv` with the columns `label` and `split`, `edges.csv`, and `features.txt` with the
columns that are 1 in each row.
"""

import csv
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, dropout, elu
from torch_geometric.nn import GATConv


class Gat(torch.nn.Module):
    def __init__(self, columns, classes):
        super().__init__()
        self.conv1 = GATConv(columns, 8, heads=8, dropout=0.6)
        self.conv2 = GATConv(64, classes, heads=1, concat=False, dropout=0.6)

    def forward(self, x, edges):
        x = dropout(x, 0.6, self.training)
        x = dropout(elu(self.conv1(x, edges)), 0.6, self.training)
        return self.conv2(x, edges)


def read(folder):
    """Returns features, edges in both directions, classes (-1 where unknown) and splits."""
    nodes = list(csv.DictReader(open(folder / "nodes.csv")))
    rows = [[int(i) for i in line.split()] for line in open(folder / "features.txt")]
    x = torch.zeros(len(nodes), 1 + max(max(row, default=0) for row in rows))
    for i, row in enumerate(rows):
        x[i, row] = 1 / max(len(row), 1)
    pairs = [(int(e["u"]), int(e["v"])) for e in csv.DictReader(open(folder / "edges.csv"))]
    edges = torch.tensor([(v, u) for u, v in pairs] + pairs).T
    return x, edges, torch.tensor([int(n["label"]) for n in nodes]), [n["split"] for n in nodes]


def draw(folder, papers=180, classes=6, words=60):
    """Every class has ten words of its own, and papers mostly cite papers of their class."""
    rng = random.Random(1)
    label = [i % classes for i in range(papers)]
    lines = []
    for i in range(papers):
        own = [10 * label[i] + rng.randrange(10) for _ in range(3)]
        lines.append(sorted({*own, *(rng.randrange(words) for _ in range(5))}))
    edges = set()
    while len(edges) < 2 * papers:
        u, v = rng.randrange(papers), rng.randrange(papers)
        if u < v and (label[u] == label[v] or rng.random() < 0.08):
            edges.add((u, v))
    split = ["train" if i < 36 else "test" for i in range(papers)]
    folder.mkdir(parents=True, exist_ok=True)
    nodes = "".join(f"{i},{label[i]},{split[i]}\n" for i in range(papers))
    (folder / "nodes.csv").write_text("node,label,split\n" + nodes)
    (folder / "edges.csv").write_text("u,v\n" + "".join(f"{u},{v}\n" for u, v in sorted(edges)))
    (folder / "features.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in lines))


def train(folder, path, classes=4):
    torch.manual_seed(0)
    x, edges, label, split = read(folder)
    known = (label >= 0) & (label < classes)
    known_in = {s: known & torch.tensor([t == s for t in split]) for s in ("train", "test")}
    model = Gat(x.shape[1], classes)
    adam = torch.optim.Adam(model.parameters(), lr=0.005, weight_decay=5e-4)
    for _ in range(300):
        adam.zero_grad()
        rows = known_in["train"]
        cross_entropy(model(x, edges)[rows], label[rows]).backward()
        adam.step()
    model.eval()
    with torch.no_grad():
        out = model(x, edges)
    rows = known_in["test"]
    right = (out.argmax(1) == label)[rows].float().mean()
    print(f"{right:.1%} of {int(rows.sum())} test nodes of the first {classes} classes right")
    save_file({**model.state_dict(), "out": out}, path)


def check(folder, path):
    x, edges, label, split = read(folder)
    state = load_file(path)
    expected = state.pop("out")
    model = Gat(x.shape[1], expected.shape[1])
    model.load_state_dict(state)  # refuses missing, unknown and misshapen parameters
    model.eval()
    with torch.no_grad():
        out = model(x, edges)
    difference = (out - expected).abs().max()
    rows = torch.tensor([s == "test" for s in split])
    right = (out.argmax(1) == label)[rows].float().mean()
    print(f"PyG: {right:.1%} of {int(rows.sum())} test nodes right; "
          f"largest difference from the outputs in Rust {difference:.1e}")
    assert difference < 1e-5 * expected.abs().max()


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, folder, *rest = sys.argv[1:]
    arguments = [Path(folder), *rest[:1], *map(int, rest[1:])]
    {"draw": draw, "train": train, "check": check}[command](*arguments)
