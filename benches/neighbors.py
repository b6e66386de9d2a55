"""Recall and time of hnswlib and faiss on keys like those of the bench `neighbors`, on one thread.

Run it with `python benches/neighbors.py`, after `pip install faiss-cpu hnswlib numpy`.
"""

import time
from importlib.metadata import version

import faiss
import hnswlib
import numpy as np

KEYS, DIM, QUERIES, K = 20_000, 64, 1000, 10
CONNECTIONS, CANDIDATES = 16, 200
ROUNDS, BLOCK = 6, 50


def cases(rng):
    """Yields names, spaces, keys and queries."""
    normal = rng.standard_normal((KEYS, DIM)), rng.standard_normal((QUERIES, DIM))
    for name, space in [("cosine", "cosine"), ("products", "ip"), ("Euclidean", "l2")]:
        yield f"normal, {name}", space, *normal
    long = np.exp(0.2 * rng.standard_normal((KEYS, 1)))
    yield "lognormal norms, products", "ip", long * normal[0], normal[1]
    centers = 2 * rng.standard_normal((200, DIM))
    around = [
        centers[rng.integers(200, size=n)] + 0.5 * rng.standard_normal((n, DIM))
        for n in (KEYS, QUERIES)
    ]
    yield "clusters, Euclidean", "l2", *around


def fastest(search, queries):
    """Returns the keys that were found and the time per query in µs, without pauses for other programs: the sum
    of the shortest times for each block of queries."""
    blocks = np.split(queries, QUERIES // BLOCK)
    times = [[] for _ in blocks]
    for _ in range(ROUNDS):
        found = []
        for block, times_of_block in zip(blocks, times):
            start = time.perf_counter()
            found.append(search(block))
            times_of_block.append(time.perf_counter() - start)
    return np.concatenate(found), sum(map(min, times)) / QUERIES * 1e6


def main():
    faiss.omp_set_num_threads(1)
    print("hnswlib", version("hnswlib"), "faiss-cpu", version("faiss-cpu"))
    for name, space, keys, queries in cases(np.random.default_rng(1)):
        if space == "cosine":
            keys, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (keys, queries))
        keys, queries = (np.ascontiguousarray(x, dtype=np.float32) for x in (keys, queries))
        scores = queries @ keys.T
        if space == "l2":
            scores -= (keys**2).sum(1) / 2
        nearest = np.argsort(-scores, axis=1)[:, :K]

        start = time.perf_counter()
        peer = hnswlib.Index(space, DIM)
        peer.init_index(KEYS, M=CONNECTIONS, ef_construction=CANDIDATES)
        peer.add_items(keys, num_threads=1)
        built = time.perf_counter()
        metric = faiss.METRIC_L2 if space == "l2" else faiss.METRIC_INNER_PRODUCT
        other = faiss.IndexHNSWFlat(DIM, CONNECTIONS, metric)
        other.hnsw.efConstruction = CANDIDATES
        other.add(keys)
        end = time.perf_counter()
        print(f"{name}: build hnswlib {built - start:.2f} s, faiss {end - built:.2f} s")
        for ef in [10, 20, 40, 70, 100, 150, 200, 300]:
            peer.set_ef(ef)
            other.hnsw.efSearch = ef
            searches = {
                "hnswlib": lambda block: peer.knn_query(block, k=K, num_threads=1)[0],
                "faiss": lambda block: other.search(block, K)[1],
            }
            for library, search in searches.items():
                found, micros = fastest(search, queries)
                hits = [np.isin(row, right).sum() for row, right in zip(found, nearest)]
                print(f"  ef {ef:3}, {library}: recall {np.mean(hits) / K:.4f}, {micros:.1f} µs")


if __name__ == "__main__":
    main()
