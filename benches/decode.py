"""PyTorch's time of one more token, for the table of `decode` in README.md: python decode.py

The workload is that of decode.rs: a layer of 512 columns in 8 heads of 64, in f32, on one thread. Keys and values are
in a preallocated cache. Prints the fastest and the median of 15 rounds, in microseconds.
"""

import statistics
import time

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

COLUMNS, HEADS, WINDOW = 512, 8, 256


def measure(run):
    """Returns the fastest and the median time of a run."""
    for _ in range(3):
        run()
    start = time.perf_counter()
    run()
    count = max(1, min(2000, int(0.03 / (time.perf_counter() - start))))
    times = []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(count):
            run()
        times.append((time.perf_counter() - start) / count * 1e6)
    return min(times), statistics.median(times)


def in_heads(rows):
    return rows.view(1, -1, HEADS, COLUMNS // HEADS).transpose(1, 2)


@torch.inference_mode()
def main():
    torch.set_num_threads(1)
    torch.manual_seed(1)
    weights = [torch.randn(COLUMNS, COLUMNS) / COLUMNS**0.5 for _ in range(4)]
    bias = torch.zeros(COLUMNS)
    token = torch.randn(1, COLUMNS)
    print("torch", torch.__version__)
    for length in [1 << 8, 1 << 11, 1 << 13, 1 << 16]:
        keys, values = [torch.randn(length + 1, COLUMNS) for _ in range(2)]

        def layer(first=0):
            query, key, value = [linear(token, weight, bias) for weight in weights[:3]]
            keys[length:] = key
            values[length:] = value
            heads = [in_heads(rows) for rows in (query, keys[first:], values[first:])]
            context = scaled_dot_product_attention(*heads)
            return linear(context.transpose(1, 2).reshape(1, COLUMNS), weights[3], bias)

        def attention():
            return scaled_dot_product_attention(in_heads(token), in_heads(keys), in_heads(values))

        def projections():
            return [linear(token, weight, bias) for weight in weights]

        runs = {
            "layer": layer,
            "layer, window": lambda: layer(length + 1 - WINDOW),
            "attention": attention,
            "projections": projections,
        }
        for name, run in runs.items():
            fastest, median = measure(run)
            print(f"{length:6} {name:14} {fastest:9.1f} {median:9.1f}")


if __name__ == "__main__":
    main()
