"""Golden answers of attention in the Poincaré ball, with gradients, for the Rust tests.

Writes poincare_attention.json next to this file. To make it again (Python 3.11):

    pip install mpmath==1.3.0
    python tests/golden/poincare_attention.py

Everything is computed with mpmath to 140 digits or more from the definitions below,
the gradients by central differences; so every number is right to the last digit of
the float64 it is rounded to. The inputs are numbers of float64, or of float32 where
"precision" says so, and are taken as exactly those numbers.

Layout: heads are blocks of columns: query is n_q x (heads*d), key n_k x (heads*d),
value n_k x (heads*d_v), out n_q x (heads*d_v). Each head is in a ball of its own, of
curvature -c. The pairs (query, key) are all of them, or `edges`, a list of [i, j] in
which a pair may come more than once. The bias, shared by the heads, is n_q x n_k, or
edges x 1. Gradients are those of sum(out * grad_out).

    coordinates   ball: a row (of a head) is a point x, sqrt(c) |x| < 1.
                  tangent: it is a vector v at the origin, the point is exp_0(v), and
                  the output's row is log_0(point).
    weights       p = softmax over the pairs of a query of -d(q, k) / tau + bias
    aggregation   midpoint: b / (1 + sqrt(1 - c |b|^2)) where
                      b = sum(p l y) / sum(p (l - 1)), l = 2 / (1 - c |y|^2)
                  tangent_origin: exp_0(sum(p log_0(y)))
                  tangent_query: exp_q(sum(p log_q(y)))
                  frechet: the point m where sum(p d(m, y)^2) is least

A query without pairs has the output 0, in either coordinates, and zero gradients.
The distance has no gradient between coincident points: where a query is equal to a
key, this pair's distance counts as the constant 0.

"perturbation" is, entry by entry, the largest change of the answer seen in six trials
in which every number of the input (query, key, value, bias, grad_out, c, tau) is
multiplied by 1 + u t, u the unit roundoff (2^-53, or 2^-24 for f32), t random in
[-2, 2]: what the rounding of the input alone explains. Where a query is equal to a
key, both are moved alike, so that they stay equal.
"""

import itertools
import json
import math
import platform
import random
import struct
from functools import lru_cache
from pathlib import Path

import mpmath
from mpmath import mp, mpf

STEP = mpf(10) ** -45  # of the differences, relative
TRIALS = 6

# --- The Poincaré ball: points are tuples of mpf -----------------------------


def dot(x, y):
    return mp.fdot(x, y)


def norm(x):
    return mp.sqrt(mp.fdot(x, x))


def times(a, x):
    return tuple(a * e for e in x)


def combine(weights, points):
    return tuple(mp.fdot(weights, column) for column in zip(*points))


def atanh_ratio(s):
    """artanh(s) / s"""
    return mp.atanh(s) / s if s else mpf(1)


def tanh_ratio(s):
    return mp.tanh(s) / s if s else mpf(1)


def lam(x, c):
    return 2 / (1 - c * dot(x, x))


def add(x, y, c):
    """Möbius addition."""
    xy, xx, yy = dot(x, y), dot(x, x), dot(y, y)
    a, b = 1 + 2 * c * xy + c * yy, 1 - c * xx
    denominator = 1 + 2 * c * xy + c * c * xx * yy
    return tuple((a * p + b * q) / denominator for p, q in zip(x, y))


@lru_cache(maxsize=4096)
def exp_0(v, c):
    return times(tanh_ratio(mp.sqrt(c) * norm(v)), v)


@lru_cache(maxsize=4096)
def log_0(x, c):
    return times(atanh_ratio(mp.sqrt(c) * norm(x)), x)


def exp_map(x, v, c):
    half = lam(x, c) / 2
    return add(x, times(half * tanh_ratio(mp.sqrt(c) * half * norm(v)), v), c)


def log_map(x, y, c):
    z = add(times(-1, x), y, c)
    return times(2 / lam(x, c) * atanh_ratio(mp.sqrt(c) * norm(z)), z)


@lru_cache(maxsize=4096)
def distance(x, y, c):
    difference = norm([p - q for p, q in zip(x, y)])
    return 2 / mp.sqrt(c) * mp.asinh(
        mp.sqrt(c) * difference / mp.sqrt((1 - c * dot(x, x)) * (1 - c * dot(y, y))))


# --- Aggregations ------------------------------------------------------------


def midpoint(p, points, c):
    lams = [lam(y, c) for y in points]
    denominator = mp.fdot(p, [l - 1 for l in lams])
    b = combine([w * l / denominator for w, l in zip(p, lams)], points)
    return times(1 / (1 + mp.sqrt(1 - c * dot(b, b))), b)


class Frechet:
    """Newton's method. The point and the inverse of the Jacobian last found for a
    (head, query) start the search for the next; this changes the work, not the answer.
    """

    def __init__(self, scale):
        self.scale = scale  # of the values
        self.last = {}

    def residual(self, m, p, points, c):
        return combine(p, [log_map(m, y, c) for y in points])

    def inverse_jacobian(self, m, p, points, c):
        n, h = len(m), self.scale * mpf(10) ** (-mp.dps // 3)
        jacobian = mp.matrix(n, n)
        for b in range(n):
            up, down = (self.residual([e + s * h * (a == b) for a, e in enumerate(m)],
                                      p, points, c) for s in (1, -1))
            for a in range(n):
                jacobian[a, b] = (up[a] - down[a]) / (2 * h)
        return mp.inverse(jacobian)

    def __call__(self, where, p, points, c):
        tolerance = self.scale * mpf(10) ** (20 - mp.dps)
        if where not in self.last:
            m = midpoint(p, points, c)
            for _ in range(20):  # Karcher's iteration, to come near
                m = exp_map(m, self.residual(m, p, points, c), c)
            self.last[where] = m, self.inverse_jacobian(m, p, points, c)
        m, inverse = self.last[where]
        for n in range(1, 60):
            r = self.residual(m, p, points, c)
            step = tuple(inverse * mp.matrix(r))
            m = tuple(e - s for e, s in zip(m, step))
            if norm(step) < tolerance:
                break
            if n % 4 == 0:
                inverse = self.inverse_jacobian(m, p, points, c)
        else:
            raise ArithmeticError("no convergence")
        assert norm(self.residual(m, p, points, c)) < tolerance
        # After a short search the old start stays: the next differences are around it too.
        if n > 4:
            self.last[where] = m, self.inverse_jacobian(m, p, points, c)
        return m


# --- Attention ---------------------------------------------------------------


class Attention:
    """The attention of one case: its inputs are a dict of rows of mpf."""

    def __init__(self, case, scale):
        self.case = case
        self.heads = case["heads"]
        self.n_q, self.n_k = len(case["query"]), len(case["key"])
        self.edges = case["edges"]
        pairs = self.edges
        if pairs is None:
            pairs = itertools.product(range(self.n_q), range(self.n_k))
        # Of each query: the key and the place of the bias, pair by pair.
        self.pairs = [[] for _ in range(self.n_q)]
        for e, (i, j) in enumerate(pairs):
            self.pairs[i].append((j, (i, j) if self.edges is None else (e, 0)))
        self.coincident = {
            (h, i, j)
            for h in range(self.heads) for i in range(self.n_q) for j in range(self.n_k)
            if self.block(case["query"], i, h) == self.block(case["key"], j, h)}
        self.frechet = Frechet(scale)
        self.row = lru_cache(maxsize=1024)(self.row)

    def block(self, rows, i, h):
        d = len(rows[i]) // self.heads
        return tuple(rows[i][h * d:(h + 1) * d])

    def points(self, rows, h, c):
        rows = [self.block(rows, i, h) for i in range(len(rows))]
        return tuple(exp_0(x, c) for x in rows) if self.tangent else tuple(rows)

    @property
    def tangent(self):
        return self.case["coordinates"] == "tangent"

    def weights(self, h, i, q, keys, bias, c, tau):
        logits = []
        for (j, _), b in zip(self.pairs[i], bias):
            d = mpf(0) if (h, i, j) in self.coincident else distance(q, keys[j], c)
            logits.append(b - d / tau)
        top = max(logits)
        terms = [mp.exp(s - top) for s in logits]
        total = mp.fsum(terms)
        return tuple(t / total for t in terms)

    def aggregate(self, h, i, q, p, points, c):
        aggregation = self.case["aggregation"]
        if aggregation == "midpoint":
            return midpoint(p, points, c)
        if aggregation == "tangent_origin":
            return exp_0(combine(p, [log_0(y, c) for y in points]), c)
        if aggregation == "tangent_query":
            return exp_map(q, combine(p, [log_map(q, y, c) for y in points]), c)
        assert aggregation == "frechet"
        return self.frechet((h, i), p, points, c)

    def row(self, h, i, q, keys, values, bias, c, tau):
        """The output of query i in head h; `bias` by pairs."""
        p = self.attention_weights(h, i, q, keys, bias, c, tau)
        points = [values[j] for j, _ in self.pairs[i]]
        m = self.aggregate(h, i, q, p, points, c)
        return log_0(m, c) if self.tangent else m

    def __call__(self, x, heads=None):
        """All outputs, (head, query) -> vector, or of some heads only."""
        c, tau = x["c"][0][0], x["tau"][0][0]
        out = {}
        for h in range(self.heads) if heads is None else heads:
            queries, keys, values = (self.points(x[k], h, c) for k in ("query", "key", "value"))
            d_v = len(values[0])
            for i, pairs in enumerate(self.pairs):
                bias = tuple(x["bias"][a][b] if "bias" in x else mpf(0) for _, (a, b) in pairs)
                # Keys and values without a pair do not matter.
                seen = {j for j, _ in pairs}
                out[h, i] = self.row(
                    h, i, queries[i],
                    tuple(k if j in seen else None for j, k in enumerate(keys)),
                    tuple(y if j in seen else None for j, y in enumerate(values)),
                    bias, c, tau) if pairs else (mpf(0),) * d_v
        return out

    def rows(self, out):
        return [[e for h in range(self.heads) for e in out[h, i]] for i in range(self.n_q)]

    def loss(self, out, x):
        return mp.fsum(dot(y, self.block(x["grad_out"], i, h)) for (h, i), y in out.items())

    def gradients(self, x, scale):
        grads = {}
        for name, rows in x.items():
            if name == "grad_out":
                continue
            unit = mpf(1) if name in ("bias", "tau", "c") else scale
            grads[name] = []
            for a, row in enumerate(rows):
                grads[name].append([])
                h = STEP * (max(map(abs, row)) or unit)
                for b, e in enumerate(row):
                    heads = None
                    if name in ("query", "key", "value"):
                        heads = [b // (len(row) // self.heads)]
                    ends = []
                    for end in e + h, e - h:
                        rows[a][b] = end
                        ends.append(self.loss(self(x, heads), x))
                    rows[a][b] = e
                    change = ends[0] - ends[1]
                    # An exact 0, seen through the errors of 140 digits.
                    if abs(change) < mpf(10) ** (50 - mp.dps) * max(map(abs, ends)):
                        change = mpf(0)
                    grads[name][a].append(change / (2 * h))
        return grads

    def answer(self, x, scale):
        answer = {"out": self.rows(self(x))}
        for name, g in self.gradients(x, scale).items():
            answer["grad_" + name] = g
        return answer


# --- Checks: identities that share no formula with the above -----------------


def close(a, b, size):
    assert abs(a - b) <= mpf(10) ** -35 * size, (a, b, size)


def check(attention, x, answer, scale):
    """The inputs and answer of a case."""
    c, tau = x["c"][0][0], x["tau"][0][0]
    root = mp.sqrt(c)
    case = attention.case

    def lift(y):  # to the hyperboloid t^2 - |s|^2 = 1
        yy = c * dot(y, y)
        return ((1 + yy) / (1 - yy), *times(2 * root / (1 - yy), y))

    def product(a, b):
        return a[0] * b[0] - dot(a[1:], b[1:])

    for h in range(attention.heads):
        queries, keys, values = (attention.points(x[k], h, c) for k in ("query", "key", "value"))
        for i, pairs in enumerate(attention.pairs):
            if not pairs:
                assert not any(attention.block(answer["out"], i, h))
                assert not any(attention.block(answer["grad_query"], i, h))
                continue
            # The distance on the hyperboloid.
            q = lift(queries[i])
            distances = [mp.acosh(max(mpf(1), product(q, lift(keys[j])))) / root
                         for j, _ in pairs]
            for (j, _), d in zip(pairs, distances):
                close(d, distance(queries[i], keys[j], c), max(d, scale))
            w = [mp.exp((x["bias"][a][b] if "bias" in x else 0) - d / tau)
                 for d, (_, (a, b)) in zip(distances, pairs)]
            p = [e / mp.fsum(w) for e in w]
            out = attention.block(answer["out"], i, h)
            m = exp_0(out, c) if attention.tangent else out
            lifted = [lift(values[j]) for j, _ in pairs]
            if case["aggregation"] == "midpoint":  # the centroid on the hyperboloid
                s = combine(p, lifted)
                length = mp.sqrt(product(s, s))
                expected = [e / (length + s[0]) / root for e in s[1:]]
            elif case["aggregation"] == "tangent_origin":
                v = combine(p, [times(mp.acosh(y[0]) / (norm(y[1:]) or 1), y[1:])
                                for y in lifted])
                expected = times(mp.tanh(norm(v) / 2) / (norm(v) or 1) / root, v)
            else:
                # Logarithms on the hyperboloid, at the query or at the answer.
                base = q if case["aggregation"] == "tangent_query" else lift(m)
                v = [mpf(0)] * len(base)
                for weight, y in zip(p, lifted):
                    cosh = product(base, y)
                    across = [e - cosh * f for e, f in zip(y, base)]
                    length = mp.sqrt(max(mpf(0), -product(across, across)))
                    if length:
                        factor = weight * mp.acosh(max(mpf(1), cosh)) / length
                        v = [e + factor * f for e, f in zip(v, across)]
                length = mp.sqrt(max(mpf(0), -product(v, v)))
                if case["aggregation"] == "tangent_query":
                    s = [mp.cosh(length) * e for e in base]
                    if length:
                        s = [e + mp.sinh(length) / length * f for e, f in zip(s, v)]
                    expected = [e / (1 + s[0]) / root for e in s[1:]]
                else:
                    close(length, 0, scale)
                    expected = m
            for a, b in zip(m, expected):
                close(a, b, max(norm(m), scale))

    # Euler's identity: with points and tau a times and c 1 / a^2 times as large, out is a
    # times as large.
    def pairing(name):
        return [e * g for r, s in zip(x[name], answer["grad_" + name]) for e, g in zip(r, s)]

    loss = mp.fsum(e * g for r, s in zip(answer["out"], x["grad_out"]) for e, g in zip(r, s))
    terms = [*pairing("query"), *pairing("key"), *pairing("value"), *pairing("tau"),
             *[-2 * e for e in pairing("c")]]
    close(mp.fsum(terms), loss, max(map(abs, [*terms, loss])))

    # Rotations: of query and key, and of value, out and, so, grad_out.
    def torque(terms, h, a, b):
        torques = []
        for vectors, grads in terms:
            for i in range(len(vectors)):
                v, g = attention.block(vectors, i, h), attention.block(grads, i, h)
                torques += [v[a] * g[b], -v[b] * g[a]]
        close(mp.fsum(torques), 0, max(map(abs, torques)))

    place = [(x["query"], answer["grad_query"]), (x["key"], answer["grad_key"])]
    content = [(x["value"], answer["grad_value"]), (x["grad_out"], answer["out"])]
    for h in range(attention.heads):
        if case["aggregation"] == "tangent_query":
            groups = [place + content]
        else:
            groups = [place, content]
        for group in groups:
            for a, b in itertools.combinations(range(len(attention.block(group[0][0], 0, h))), 2):
                torque(group, h, a, b)

    # The same bias for all pairs of a query changes nothing.
    if "bias" in x:
        for pairs in attention.pairs:
            g = [answer["grad_bias"][a][b] for _, (a, b) in pairs]
            close(mp.fsum(g), 0, max([*map(abs, g), mpf(0)]))


# --- Cases -------------------------------------------------------------------


def to_f32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def as_rows(case, exact):
    """The inputs as rows of mpf; those of a case are rows of floats."""
    names = ["query", "key", "value", *(["bias"] if case["bias"] else []), "grad_out"]
    rows = {k: case[k] for k in names}
    rows |= {"c": [[case["c"]]], "tau": [[case["tau"]]]}
    return {k: [[exact(e) for e in r] for r in v] for k, v in rows.items()}


def perturbed(case, attention, x, draw):
    """The inputs of one trial."""
    u = mpf(2) ** (-24 if case["precision"] == "f32" else -53)

    def factor():
        return 1 + u * mpf(draw.uniform(-2, 2))

    x = {k: [[e * factor() for e in r] for r in v] for k, v in x.items()}
    shared = {}
    for h, i, j in sorted(attention.coincident):
        for name, a in ("query", i), ("key", j):
            rows, plain = x[name], case[name]
            d = len(rows[a]) // attention.heads
            point = (h, attention.block(plain, a, h))
            rows[a][h * d:(h + 1) * d] = shared.setdefault(point, rows[a][h * d:(h + 1) * d])
    return x


def solve(case):
    """The case as it is written to the JSON."""
    scale = mpf(case.pop("scale"))
    digits = case.pop("digits")
    for name in "query", "key", "value", "bias", "grad_out":
        for e in itertools.chain(*(case[name] or [])):
            assert case["precision"] == "f64" or e == to_f32(e)
    with mp.workdps(digits):
        attention = Attention(case, scale)
        x = as_rows(case, mpf)
        answer = attention.answer(x, scale)
        check(attention, x, answer, scale)
        draw = random.Random(case["name"] + " perturbation")
        trials = [attention.answer(perturbed(case, attention, x, draw), scale)
                  for _ in range(TRIALS)]

        def entry(name):
            rows = answer[name]
            changes = [[max(abs(t[name][a][b] - e) for t in trials) for b, e in enumerate(r)]
                       for a, r in enumerate(rows)]
            return array(rows) | {
                "perturbation": [float(f"{float(e):.3g}") for r in changes for e in r]}

        result = {k: case[k] for k in (
            "name", "coordinates", "aggregation", "precision", "c", "tau", "heads", "edges")}
        for name in "query", "key", "value", "bias", "grad_out":
            result[name] = None if case[name] is None else array(case[name])
        for name in "out", *("grad_" + k for k in ("query", "key", "value", "bias", "c", "tau")):
            result[name] = entry(name) if name in answer else None
    exp_0.cache_clear()
    log_0.cache_clear()
    distance.cache_clear()
    return result


def array(rows):
    data = [float(e) + 0.0 for r in rows for e in r]
    assert all(map(math.isfinite, data))
    return {"shape": [len(rows), len(rows[0])], "data": data}


class Draw(random.Random):
    """Random inputs seeded by the case's name, so that adding a case changes no other."""

    def direction(self, d):
        v = [self.gauss(0, 1) for _ in range(d)]
        length = math.hypot(*v)
        return [e / length for e in v]

    def beside(self, w, angle):
        """A direction near w."""
        t = self.direction(len(w))
        along = sum(a * b for a, b in zip(t, w))
        return [a + angle * (b - along * a) for a, b in zip(w, t)]

    def normal(self, n, d, scale=1.0):
        return [[round(self.gauss(0, 1), 3) * scale for _ in range(d)] for _ in range(n)]

    def vectors(self, n, d, low, high, digits=3):
        """Of lengths in [low, high]."""
        return [[round(e * r, digits) for e in self.direction(d)]
                for r in (self.uniform(low, high) for _ in range(n))]


def beside_heads(blocks):
    """Rows of the heads' blocks, side by side."""
    return [list(itertools.chain(*rows)) for rows in zip(*blocks)]


def make(name, coordinates, aggregation, c, tau, query, key, value, draw, heads=1, edges=None,
         bias=False, precision="f64", scale="1", digits=140, grad_scale=1.0):
    n_q, n_k, width = len(query), len(key), len(value[0])
    if bias:
        bias = draw.normal(len(edges), 1) if edges else draw.normal(n_q, n_k)
    case = {
        "name": name, "coordinates": coordinates, "aggregation": aggregation,
        "precision": precision, "c": c, "tau": tau, "heads": heads, "edges": edges,
        "query": query, "key": key, "value": value, "bias": bias or None,
        "grad_out": draw.normal(n_q, width, grad_scale), "scale": scale, "digits": digits,
    }
    if precision == "f32":
        for k in "query", "key", "value", "bias", "grad_out":
            if case[k]:
                case[k] = [[to_f32(e) for e in r] for r in case[k]]
        case["c"], case["tau"] = to_f32(c), to_f32(tau)
    return case


COORDINATES = "ball", "tangent"
AGGREGATIONS = "midpoint", "tangent_origin", "tangent_query", "frechet"
# n_q, n_k, d, d_v
SIZES = (2, 3, 5, 2), (3, 5, 2, 3), (2, 5, 3, 2), (2, 3, 2, 5)


def ordinary_rows(draw, coordinates, n, d, c, heads=1):
    """Points at distances up to about 3 / sqrt(c) of the origin."""
    radius = (0.1, 0.9) if coordinates == "ball" else (0.1, 1.5)
    low, high = (r / math.sqrt(c) for r in radius)
    return beside_heads([draw.vectors(n, d, low, high) for _ in range(heads)])


def ordinary(name, coordinates, aggregation, c, tau, size, heads=1, **options):
    n_q, n_k, d, d_v = size
    if aggregation == "tangent_query":
        d_v = d
    draw = Draw(name)
    query, key, value = (ordinary_rows(draw, coordinates, n, width, c, heads)
                         for n, width in ((n_q, d), (n_k, d), (n_k, d_v)))
    return make(name, coordinates, aggregation, c, tau, query, key, value, draw, heads, **options)


def ordinary_cases():
    curvatures, temperatures = (0.3, 1.0, 2.7), (0.5, 1.0, 1.7)
    for a, coordinates in enumerate(COORDINATES):
        for b, aggregation in enumerate(AGGREGATIONS):
            for n, c in enumerate(curvatures):
                yield ordinary(
                    f"ordinary_{coordinates}_{aggregation}_c{c:g}", coordinates, aggregation,
                    c, temperatures[(a + b + n) % 3], SIZES[(a + b + n) % 4],
                    heads=2 if n == 1 else 1, bias=(b + n) % 2 == 0)
            # Query 1 has no edge, two pairs come twice, key 3 has no edge.
            edges = [[2, 4], [0, 1], [2, 0], [0, 1], [0, 2], [2, 4], [2, 1]]
            yield ordinary(f"graph_{coordinates}_{aggregation}", coordinates, aggregation,
                           curvatures[b % 3], temperatures[(a + b) % 3], (3, 5, 2, 3),
                           heads=2 - a, edges=edges, bias=b % 2 == a)
            # Nearly flat: the points are at distances of about 1.
            draw = Draw(f"flat_{coordinates}_{aggregation}")
            d_v = 3 if aggregation == "tangent_query" else 2
            yield make(f"flat_{coordinates}_{aggregation}", coordinates, aggregation, 1e-6, 1.0,
                       draw.normal(2, 3), draw.normal(5, 3), draw.normal(5, d_v), draw)


def boundary_cases():
    """Points of norm near 1; a cluster's distances among themselves are about 1."""
    def cluster(draw, w, n, gap):
        return [[e * (1 - r) for e in draw.beside(w, r * draw.uniform(0.2, 1))]
                for r in (gap * draw.uniform(0.5, 2) for _ in range(n))]

    def spread(draw, n, d, power):
        return [[e * (1 - 10 ** -draw.uniform(3, power)) for e in draw.direction(d)]
                for _ in range(n)]

    for aggregation in "midpoint", "tangent_origin":
        for gap, precision in (1e-3, "f64"), (1e-6, "f64"), (1e-10, "f64"), (1e-4, "f32"):
            name = f"boundary_{aggregation}_cluster_{gap:g}"
            draw = Draw(name)
            w, y = draw.direction(3), draw.direction(2)
            yield make(name, "ball", aggregation, 1.0, 1.0, cluster(draw, w, 2, gap),
                       cluster(draw, w, 5, gap), cluster(draw, y, 5, gap), draw,
                       precision=precision)
        name = f"boundary_{aggregation}_spread"
        draw = Draw(name)
        yield make(name, "ball", aggregation, 1.0, 17.0, spread(draw, 2, 2, 10),
                   spread(draw, 5, 2, 10), spread(draw, 5, 3, 10), draw, bias=True)
        # A cluster on an axis, where the points' places beside it are exact.
        name = f"boundary_{aggregation}_axis"
        draw = Draw(name)
        yield make(name, "ball", aggregation, 1.0, 0.5, cluster(draw, [1.0, 0.0], 2, 1e-10),
                   cluster(draw, [1.0, 0.0], 3, 1e-10), cluster(draw, [0.0, -1.0], 3, 1e-10),
                   draw)


def deep_cases():
    """Tangent vectors v whose points are far from the origin, at 2 |v|."""
    def cluster(draw, w, n, radius):  # distances among themselves of about 1
        rows = []
        for _ in range(n):
            length = radius / 2 + draw.uniform(-0.4, 0.4)
            angle = 2 * math.exp(-2 * length) * draw.uniform(0.2, 1)
            rows.append([e * length for e in draw.beside(w, angle)])
        return rows

    for precision, radii, (low, high), axis in (
            ("f64", (21, 28, 36), (20, 37), (16.0, 16.4, 17.9)),
            ("f32", (9, 13, 16), (8, 17), (4.0, 4.375, 8.25))):
        for aggregation in "midpoint", "tangent_origin":
            prefix = f"deep_{precision}_{aggregation}"

            def deep(name, tau, query, key, value, **options):
                return make(name, "tangent", aggregation, 1.0, tau, query, key, value, draw,
                            precision=precision, **options)

            for radius in radii:
                draw = Draw(name := f"{prefix}_cluster_{radius}")
                w, y = draw.direction(3), draw.direction(2)
                yield deep(name, 1.0, cluster(draw, w, 2, radius), cluster(draw, w, 5, radius),
                           cluster(draw, y, 5, radius))
            # On an axis the places beside it are as exact as one likes.
            draw = Draw(name := f"{prefix}_cluster_axis")
            yield deep(name, 0.5, cluster(draw, [-1.0, 0.0], 2, radii[-1]),
                       cluster(draw, [-1.0, 0.0], 3, radii[-1]),
                       cluster(draw, [0.0, 1.0], 3, radii[-1]))
            draw = Draw(name := f"{prefix}_spread")
            yield deep(name, 13.0, draw.vectors(2, 2, low / 2, high / 2),
                       draw.vectors(5, 2, low / 2, high / 2),
                       draw.vectors(5, 3, low / 2, high / 2), bias=True)
            draw = Draw(name := f"{prefix}_line")
            line = [[e, 0.0] for e in axis]
            yield deep(name, 1.0, [[axis[0] + 0.125, 0.0], [axis[2] - 0.5, 0.0]], line, line)
            # Some near the origin, some far; the first query is equal to a key.
            draw = Draw(name := f"{prefix}_mixed")
            key = (draw.vectors(2, 2, low / 2, high / 2) + draw.vectors(2, 2, 0.1, 2)
                   + draw.vectors(1, 2, 3, 5))
            yield deep(name, 7.0, [key[0][:], *draw.vectors(1, 2, 0.1, 2)], key,
                       draw.vectors(2, 3, 0.1, 2) + draw.vectors(3, 3, low / 2, high / 2))


def coincident_cases():
    for a, coordinates in enumerate(COORDINATES):
        for b, aggregation in enumerate(AGGREGATIONS):
            c = (0.3, 1.0, 2.7)[b % 3]
            # Query 0 is key 2 in head 0, query 1 is key 0 in head 1.
            case = ordinary(f"coincident_{coordinates}_{aggregation}", coordinates, aggregation,
                            c, 0.5, (2, 3, 2, 2), heads=2)
            case["query"][0][:2] = case["key"][2][:2]
            case["query"][1][2:] = case["key"][0][2:]
            yield case
            # The origin: query 0 and key 1, coincident, and value 2, all 0.
            case = ordinary(f"origin_{coordinates}_{aggregation}", coordinates, aggregation,
                            c, 1.0, (2, 3, 2, 5), bias=a == 0)
            for name, i in ("query", 0), ("key", 1), ("value", 2):
                case[name][i] = [0.0] * len(case[name][i])
            yield case
        # Query 0 is equal to no key, query 1 to all.
        case = ordinary(f"all_keys_equal_{coordinates}", coordinates, "midpoint", 1.0, 0.5,
                        (2, 3, 2, 5), bias=True)
        case["key"] = [case["key"][0][:] for _ in case["key"]]
        case["query"][1] = case["key"][0][:]
        yield case
        case = ordinary(f"all_values_zero_{coordinates}", coordinates, "midpoint", 1.0, 0.5,
                        (2, 3, 2, 5))
        case["value"] = [[0.0] * len(r) for r in case["value"]]
        yield case
        # Query, key and value the same; each is given a gradient of its own.
        for aggregation in "midpoint", "tangent_query":
            case = ordinary(f"self_attention_{coordinates}_{aggregation}", coordinates,
                            aggregation, 1.0, 1.0, (3, 3, 2, 2))
            case["key"], case["value"] = ([r[:] for r in case["query"]] for _ in "kv")
            yield case


def tiny_cases():
    """Squares of these do not underflow in float64, but squares of squares do."""
    for coordinates in COORDINATES:
        for aggregation in AGGREGATIONS:
            name = f"tiny_{coordinates}_{aggregation}"
            draw = Draw(name)
            d_v = 2 if aggregation == "tangent_query" else 3
            yield make(name, coordinates, aggregation, 1.0, 1.0, draw.normal(2, 2, 1e-150),
                       draw.normal(3, 2, 1e-150), draw.normal(3, d_v, 1e-150), draw,
                       scale="1e-150", digits=700)


def far_cases():
    """Tangent vectors so long that f32 cannot hold the exponentials of their distances."""
    for precision, (low, high) in ("f32", (30, 280)), ("f64", (150, 335)):
        for aggregation in "midpoint", "tangent_origin":
            for kind, c, tau, near in ("spread", 1.0, 60.0, 0), ("mixed", 0.5, 35.0, 3):
                name = f"far_{precision}_{aggregation}_{kind}"
                draw = Draw(name)

                def rows(n, d, near):
                    unit = 1 / math.sqrt(c)
                    return (draw.vectors(near, d, 0.1 * unit, 2 * unit)
                            + draw.vectors(n - near, d, low / 2 * unit, high / 2 * unit))

                yield make(name, "tangent", aggregation, c, tau, rows(3, 2, near // 2),
                           rows(6, 2, near), rows(6, 3, near), draw, bias=near > 0,
                           precision=precision, digits=900)


def sharp_cases():
    """Softmaxes with nearly all weight on one key, where the gradients of the logits are small."""
    for precision in "f32", "f64":
        for aggregation in AGGREGATIONS:
            name = f"sharp_{precision}_{aggregation}"
            yield make(name, "ball", aggregation, 1.0, 0.05, [[0.1, 0.2]],
                       [[0.15, 0.3], [-0.5, 0.4], [0.6, 0.0]],
                       [[0.2, 0.1], [-0.3, 0.5], [0.1, -0.6]], Draw(name), precision=precision)
        for aggregation in "midpoint", "tangent_origin":
            # Queries near to one key each, and as many as are computed in tiles.
            name = f"sharp_many_{precision}_{aggregation}"
            draw = Draw(name)
            keys = draw.vectors(4, 2, 0.3, 0.8)
            queries = [[e + 0.01 * t for e, t in zip(keys[n % 4], draw.direction(2))]
                       for n in range(9)]
            yield make(name, "ball", aggregation, 1.0, 0.06, queries, keys,
                       draw.vectors(4, 2, 0.1, 0.9), draw, precision=precision, bias=True)


def cases():
    yield from ordinary_cases()
    yield from boundary_cases()
    yield from deep_cases()
    yield from coincident_cases()
    yield from tiny_cases()
    yield from far_cases()
    yield from sharp_cases()


def main():
    def dumps(x):
        # Floats as repr, which reads back exactly; NaN and Infinity refused.
        return json.dumps(x, allow_nan=False)

    solved = [solve(case) for case in cases()]
    assert len({case["name"] for case in solved}) == len(solved)
    versions = {"python": platform.python_version(), "mpmath": mpmath.__version__}
    text = (
        '{\n"generator": "tests/golden/poincare_attention.py",\n'
        f'"versions": {dumps(versions)},\n'
        '"cases": [\n' + ",\n".join(map(dumps, solved)) + "\n]\n}\n"
    )
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
