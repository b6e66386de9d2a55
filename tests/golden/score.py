"""Golden answers for functions of the logits, for the Rust tests.

Writes score.json next to this file:

* PyTorch's flex_attention: soft cap, ALiBi, relative positions, sinks through the log-sum-exp, and several
  at once. It has no backward pass on the CPU, so the gradients are autograd's of the same formula in plain
  operations, whose output must be that of flex_attention;
* transformers' T5Attention._relative_position_bucket;
* ONNX's reference implementation of Attention with `softcap` and a mask.

To make it again (Python 3.11):

    pip install torch==2.15.0 transformers==5.24.0 onnx==1.23.2 numpy==2.4.6
    python tests/golden/score.py

Everything is float64 on the CPU. Heads are blocks of columns: query is n_q x (heads * d).
"""

import json
from pathlib import Path

import numpy
import onnx
import torch
import transformers
from onnx.reference import ReferenceEvaluator
from torch.nn.attention.flex_attention import flex_attention
from transformers.models.t5.modeling_t5 import T5Attention

HEADS, QUERIES, KEYS, DIM, VALUE_DIM = 4, 11, 13, 5, 3


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randn(*shape, generator=generator, dtype=torch.float64) * 1000).round() / 1000).requires_grad_()


def array(x):
    x = torch.as_tensor(x).detach()
    return {"shape": list(x.shape), "data": x.flatten().tolist()}


def columns(x):
    """1 x heads x n x d as n x (heads * d)."""
    return x[0].transpose(0, 1).flatten(1)


def bucket(distance, count, max_distance, is_bidirectional):
    return T5Attention._relative_position_bucket(distance, is_bidirectional, count, max_distance)


def flex_cases():
    slopes = torch.tensor([2.0 ** -(2 * (head + 1)) for head in range(HEADS)], dtype=torch.float64)
    learned = slopes.clone().requires_grad_()
    table, sinks = normal(4, 12, HEADS), normal(5, HEADS)
    buckets = bucket(torch.arange(KEYS)[None] - torch.arange(QUERIES)[:, None], 12, 20, True)

    def soft_cap(score, b, h, q, k):
        return 1.5 * torch.tanh(score / 1.5)

    def alibi(score, b, h, q, k):
        return score - learned[h] * (q - k).abs()

    def relative(score, b, h, q, k):
        return score + table[buckets[q, k], h]

    def plain(score, b, h, q, k):
        return score

    def all_of_them(score, b, h, q, k):
        return relative(alibi(soft_cap(score, b, h, q, k), b, h, q, k), b, h, q, k)

    cases = [
        ("soft_cap", soft_cap, [], False),
        ("alibi", alibi, [learned], False),
        ("relative", relative, [table], False),
        ("sinks", plain, [sinks], True),
        ("all", all_of_them, [learned, table, sinks], True),
    ]
    for name, score, params, has_sinks in cases:
        query = normal(1, 1, HEADS, QUERIES, DIM)
        key = normal(2, 1, HEADS, KEYS, DIM)
        value = normal(3, 1, HEADS, KEYS, VALUE_DIM)
        with torch.no_grad():
            arrays = [x.detach() for x in (query, key, value)]
            flex, log_sum = flex_attention(*arrays, score_mod=score, return_lse=True)
            if has_sinks:
                # The keys' share of the softmax with one more logit.
                flex = flex * torch.sigmoid(log_sum - sinks[None, :, None])[..., None]
        head, i, j = torch.meshgrid(
            torch.arange(HEADS), torch.arange(QUERIES), torch.arange(KEYS), indexing="ij"
        )
        logits = score(query @ key.transpose(2, 3) / DIM**0.5, 0, head, i, j)
        if has_sinks:
            more = sinks[None, :, None, None].expand(1, HEADS, QUERIES, 1)
            logits = torch.cat([logits, more], dim=3)
        out = torch.softmax(logits, dim=3)[..., :KEYS] @ value
        assert (out - flex).abs().max() < 1e-14
        grad_out = normal(6, 1, HEADS, QUERIES, VALUE_DIM).detach()
        grads = torch.autograd.grad((out * grad_out).sum(), [query, key, value, *params])
        yield {
            "name": name,
            "query": array(columns(query)),
            "key": array(columns(key)),
            "value": array(columns(value)),
            "grad_out": array(columns(grad_out)),
            "params": [array(param) for param in params],
            "out": array(columns(out)),
            "grads": [array(columns(grad)) for grad in grads[:3]],
            "grad_params": [array(grad) for grad in grads[3:]],
        }


def t5_cases():
    for count, max_distance, is_bidirectional in [
        (32, 128, True),
        (32, 128, False),
        (12, 20, True),
        (8, 100, False),
        (64, 1000, True),
        (320, 800, True),
    ]:
        buckets = bucket(torch.arange(-1500, 1501), count, max_distance, is_bidirectional).tolist()
        changes = [i for i in range(len(buckets)) if i == 0 or buckets[i] != buckets[i - 1]]
        yield {
            "count": count,
            "max_distance": max_distance,
            "is_bidirectional": is_bidirectional,
            # The distances from which on there is another bucket.
            "distances": [i - 1500 for i in changes],
            "buckets": [buckets[i] for i in changes],
        }


def onnx_cases():
    for cap in [2.0, 0.5]:
        for with_mask in [False, True]:
            names = ["Q", "K", "V"] + ["attn_mask"] * with_mask
            node = onnx.helper.make_node(
                "Attention", names, ["Y"], softcap=cap, q_num_heads=HEADS, kv_num_heads=HEADS
            )
            double = onnx.TensorProto.DOUBLE
            inputs = [onnx.helper.make_tensor_value_info(name, double, None) for name in names]
            outputs = [onnx.helper.make_tensor_value_info("Y", double, None)]
            graph = onnx.helper.make_graph([node], "attention", inputs, outputs)
            model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
            arrays = [
                normal(7, QUERIES, HEADS * DIM),
                normal(8, KEYS, HEADS * DIM),
                normal(9, KEYS, HEADS * VALUE_DIM),
            ]
            feed = {name: x.detach().numpy()[None] for name, x in zip(names, arrays)}
            mask = normal(10, QUERIES, KEYS).detach()
            if with_mask:
                feed["attn_mask"] = mask.numpy()
            (out,) = ReferenceEvaluator(model).run(None, feed)
            yield {
                "cap": cap,
                "query": array(arrays[0]),
                "key": array(arrays[1]),
                "value": array(arrays[2]),
                "bias": array(mask.flatten()[:, None]) if with_mask else None,
                "out": array(out[0]),
            }


def main():
    golden = {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "onnx": onnx.__version__,
            "numpy": numpy.__version__,
        },
        "flex": list(flex_cases()),
        "t5": list(t5_cases()),
        "onnx": list(onnx_cases()),
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(path, path.stat().st_size)


main()
