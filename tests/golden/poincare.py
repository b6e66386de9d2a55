"""Golden answers for the geometry of the Poincaré ball, with gradients, to 60 digits and more.

Writes poincare.json next to this file. To make it again (Python 3.11; some seconds):

    python -m venv ~/mpenv && . ~/mpenv/bin/activate
    pip install mpmath==1.3.0
    python tests/golden/poincare.py

Every function is written as in the textbooks, with all the cancellation that this means, and
computed with so many digits that it does not matter; derivatives are central differences. The
inputs are f64 (or f32) numbers, exactly. All is the same on every machine.

Beside each answer stands its condition, the norm over the components f of sum |df/dx x| over all
inputs x (c and the gradient of the result among them): what the answer changes when every input
changes by one part in one.
"""

import json
import math
import platform
import random
import struct
import zlib
from pathlib import Path

import mpmath
from mpmath import mp, mpf

# --- The functions, as in the textbooks ---------------------------------------


def dot(x, y):
    return mp.fsum(a * b for a, b in zip(x, y, strict=True))


def norm(x):
    return mp.sqrt(dot(x, x))


def times(k, x):
    return [k * a for a in x]


def plus(x, y):
    return [a + b for a, b in zip(x, y, strict=True)]


def minus(x):
    return [-a for a in x]


def conformal_factor(c, x):
    return [2 / (1 - c * dot(x, x))]


def add(c, x, y):
    xy, xx, yy = dot(x, y), dot(x, x), dot(y, y)
    top = plus(times(1 + 2 * c * xy + c * yy, x), times(1 - c * xx, y))
    return times(1 / (1 + 2 * c * xy + c * c * xx * yy), top)


def distance(c, x, y):
    return [2 / mp.sqrt(c) * mp.atanh(mp.sqrt(c) * norm(add(c, minus(x), y)))]


def exp_map_origin(c, v):
    r = mp.sqrt(c) * norm(v)
    return times(mp.tanh(r) / r, v) if r else v


def log_map_origin(c, y):
    r = mp.sqrt(c) * norm(y)
    return times(mp.atanh(r) / r, y) if r else y


def exp_map(c, x, v):
    return add(c, x, exp_map_origin(c, times(conformal_factor(c, x)[0] / 2, v)))


def log_map(c, x, y):
    return times(2 / conformal_factor(c, x)[0], log_map_origin(c, add(c, minus(x), y)))


def scalar_mul(c, r, x):
    return exp_map_origin(c, times(r[0], log_map_origin(c, x)))


def mat_vec(c, m, x):
    n = len(x)
    mx = [dot(m[i:i + n], x) for i in range(0, len(m), n)]
    ratio = norm(mx) / norm(x)
    length = mp.tanh(ratio * mp.atanh(mp.sqrt(c) * norm(x))) / mp.sqrt(c)
    return times(length / norm(mx), mx)


def gyration(c, a, b, v):
    # Linear in v, which need not be in the ball.
    small = mpf(2) ** -10 / (1 + norm(v)) / (1 + mp.sqrt(c))
    moved = add(c, a, add(c, b, times(small, v)))
    return times(1 / small, add(c, minus(add(c, a, b)), moved))


def parallel_transport(c, x, y, v):
    ratio = conformal_factor(c, x)[0] / conformal_factor(c, y)[0]
    return times(ratio, gyration(c, y, minus(x), v))


def geodesic(c, x, y, t):
    return exp_map(c, x, times(t[0], log_map(c, x, y)))


MARGIN = 0.0625


def project(c, x):
    limit = (1 - mpf(MARGIN)) / mp.sqrt(c)
    return times(limit / norm(x), x) if norm(x) > limit else x


def midpoint(c, points, weights):
    n = len(points) // len(weights)
    rows = [points[i:i + n] for i in range(0, len(points), n)]
    factors = [conformal_factor(c, row)[0] for row in rows]
    top = [mp.fsum(w * f * row[i] for w, f, row in zip(weights, factors, rows)) for i in range(n)]
    bottom = mp.fsum(w * (f - 1) for w, f in zip(weights, factors))
    return scalar_mul(c, [mpf(1) / 2], times(1 / bottom, top))


def to_klein(c, x):
    return times(2 / (1 + c * dot(x, x)), x)


def from_klein(c, k):
    return times(1 / (1 + mp.sqrt(1 - c * dot(k, k))), k)


def to_lorentz(c, x):
    factor = conformal_factor(c, x)[0]
    return [(factor - 1) / mp.sqrt(c)] + times(factor, x)


def from_lorentz(c, p):
    return times(1 / (1 + mp.sqrt(c) * p[0]), p[1:])


# --- Values, gradients, conditions --------------------------------------------


def rounded(x, kind):
    return struct.unpack("f", struct.pack("f", x))[0] if kind == "f32" else float(x)


def number(x, c):
    """Without the noise of the differences, and of c = 0, which is 1e-30 here."""
    return 0.0 if abs(x) < mpf(10) ** (-mp.dps // 2) or (not c and abs(x) < 1e-25) else float(x)


def size(x):
    return float(f"{float(norm(x)):.2e}")


def case(name, kind, label, function, c, inputs, scale=1.0, digits=200):
    """One case; `scale` is the smallest length in it that matters."""
    mp.dps = digits
    inputs = [[rounded(x, kind) for x in vector] for vector in inputs]
    c = rounded(c, kind)
    lengths = [len(vector) for vector in inputs]
    # Every function is smooth in c: its limit is met to 30 digits here.
    exact_c = mpf(c) if c else mpf(10) ** -30
    variables = [mpf(x) for vector in inputs for x in vector] + [exact_c]
    steps = [mpf(scale) * mpf(10) ** -30] * (len(variables) - 1) + [exact_c * mpf(10) ** -20]

    def evaluate(moves=()):
        flat = list(variables)
        for k, sign in moves:
            flat[k] += sign * steps[k]
        vectors, start = [], 0
        for length in lengths:
            vectors.append(flat[start:start + length])
            start += length
        return function(flat[-1], *vectors)

    value = evaluate()
    rng = random.Random(zlib.crc32((name + label).encode()))
    grad_out = [rounded(round(rng.uniform(-1, 1), 3), kind) for _ in value]
    g = [mpf(x) for x in grad_out]
    at = {}

    def loss(*moves):
        key = tuple(moves)
        if key not in at:
            at[key] = evaluate(moves)
        return at[key]

    every = range(len(variables))
    jacobian = [times(1 / (2 * steps[k]), plus(loss((k, 1)), minus(loss((k, -1))))) for k in every]
    grads = [dot(g, column) for column in jacobian]
    # What c = 0 stands for has no relative change.
    sizes = [abs(x) for x in variables[:-1]] + [mpf(c)]
    value_condition = [
        mp.fsum(abs(jacobian[k][i]) * sizes[k] for k in every) for i in range(len(value))]
    base = dot(g, value)
    single = {(k, s): dot(g, loss((k, s))) for k in every for s in (1, -1)}

    def second(k, l):
        if k == l:
            return (single[k, 1] - 2 * base + single[k, -1]) / steps[k] ** 2
        both = dot(g, loss((k, 1), (l, 1))) + dot(g, loss((k, -1), (l, -1)))
        rest = single[k, 1] + single[k, -1] + single[l, 1] + single[l, -1]
        return (both - rest + 2 * base) / (2 * steps[k] * steps[l])

    condition = [mp.fsum(abs(jacobian[k][i] * g[i]) for i in range(len(value))) for k in every]
    for k in every:
        for l in range(k + 1):
            h = abs(second(k, l))
            condition[k] += h * sizes[l]
            if k != l:
                condition[l] += h * sizes[k]
    out_grads, conditions, start = [], [], 0
    for length in [*lengths, 1]:
        out_grads.append([number(x, c) for x in grads[start:start + length]])
        conditions.append(size(condition[start:start + length]))
        start += length
    return {
        "function": name, "kind": kind, "label": label, "c": c, "inputs": inputs,
        "grad_out": grad_out, "out": [number(x, c) for x in value], "grads": out_grads,
        "out_condition": size(value_condition), "grad_conditions": conditions,
    }


# --- Inputs -------------------------------------------------------------------


class Draw:
    def __init__(self, label):
        self.rng = random.Random(zlib.crc32(label.encode()))

    def unit(self, n):
        x = [self.rng.gauss(0, 1) for _ in range(n)]
        length = math.hypot(*x)
        return [a / length for a in x]

    def vector(self, n, length):
        return [a * length for a in self.unit(n)]

    def point(self, n, c, low=0.2, high=0.8):
        return self.vector(n, self.rng.uniform(low, high) / max(math.sqrt(c), 0.3))


def scaled(k, x):
    return [k * a for a in x]


def near(x, y, by):
    """x moved by `by` towards the direction of y."""
    return [a + by * b for a, b in zip(x, y)]


FUNCTIONS = {
    "conformal_factor": conformal_factor, "distance": distance, "mobius_add": add,
    "mobius_scalar_mul": scalar_mul, "mobius_mat_vec": mat_vec, "exp_map": exp_map,
    "log_map": log_map, "exp_map_origin": exp_map_origin, "log_map_origin": log_map_origin,
    "parallel_transport": parallel_transport, "gyration": gyration, "project": project,
    "midpoint": midpoint, "to_klein": to_klein, "from_klein": from_klein,
    "to_lorentz": to_lorentz, "from_lorentz": from_lorentz, "geodesic": geodesic,
}
ONE = ["conformal_factor", "log_map_origin", "to_klein", "from_klein", "to_lorentz"]
TWO = ["distance", "mobius_add", "log_map"]


def lorentz(c, x):
    mp.dps = 60
    return [float(a) for a in to_lorentz(mpf(c), [mpf(a) for a in x])]


def arguments(name, draw, n, c, point):
    """Arguments of a function, whose points are drawn by `point`."""
    if name in ONE or name == "project":
        return [point()]
    if name == "exp_map_origin":
        return [draw.vector(n, draw.rng.uniform(0.3, 2) / max(math.sqrt(c), 0.3))]
    if name in TWO:
        return [point(), point()]
    if name == "exp_map":
        x = point()
        alpha = 1 - c * math.fsum(a * a for a in x)
        return [x, draw.vector(n, alpha * draw.rng.uniform(0.3, 2) / max(math.sqrt(c), 0.3))]
    if name == "mobius_scalar_mul":
        return [[draw.rng.choice([-0.7, 0.5, 1.6])], point()]
    if name == "mobius_mat_vec":
        rows = {1: 2, 2: 3, 3: 2, 7: 2}[n]
        return [[draw.rng.uniform(-0.6, 0.6) for _ in range(rows * n)], point()]
    if name in ("parallel_transport", "gyration"):
        return [point(), point(), draw.vector(n, 1)]
    if name == "geodesic":
        return [point(), point(), [draw.rng.choice([-0.7, 0.25, 0.5, 0.8, 1.6])]]
    if name == "from_lorentz":
        return [lorentz(c, point())]
    if name == "midpoint":
        count = 3
        weights = [draw.rng.uniform(0.1, 2) for _ in range(count)]
        return [[a for _ in range(count) for a in point()], weights]
    raise ValueError(name)


def cases():
    for name, function in FUNCTIONS.items():
        curved = name in ("to_lorentz", "from_lorentz")

        def make(kind, label, c, inputs, **options):
            return case(name, kind, label, function, c, inputs, **options)

        # Ordinary points.
        for kind, n, c in [("f64", 1, 1), ("f64", 2, 2.5), ("f64", 3, 0.1), ("f64", 7, 1),
                           ("f64", 2, 1e-8), ("f64", 3, 0), ("f32", 2, 1), ("f32", 3, 0.1),
                           ("f32", 1, 2.5), ("f32", 2, 0)]:
            if curved and c == 0:
                continue
            if name == "midpoint" and n == 7:
                n = 3
            if name == "project" and c == 0:
                continue
            if name == "gyration" and n == 1:
                n = 2  # on a line it is the identity, and its gradients are zero
            label = f"ordinary, {n} dimensions, c = {c}"
            draw = Draw(label + name)
            # Of projected points some are moved, and some are not.
            low, high = (0.2, 1.7) if name == "project" else (0.2, 0.8)
            inputs = arguments(name, draw, n, c, lambda: draw.point(n, c, low, high))
            yield make(kind, label, c, inputs)

        # Near the boundary: every point by itself, and all close together.
        for delta, n, c, kind in [(1e-3, 2, 1, "f64"), (1e-6, 3, 1, "f64"), (1e-8, 2, 2.5, "f64"),
                                  (1e-10, 2, 1, "f64"), (1e-4, 2, 1, "f32"), (1e-6, 2, 1, "f32")]:
            if name in ("project", "exp_map_origin"):
                continue
            label = f"boundary, {delta}"
            draw = Draw(label + name)
            length = (1 - delta) / math.sqrt(c)
            inputs = arguments(name, draw, n, c, lambda: draw.vector(n, length))
            yield make(kind, label, c, inputs, scale=delta)
            if name in ONE or name in ("mobius_scalar_mul", "mobius_mat_vec", "from_lorentz"):
                continue
            if kind == "f32":
                continue
            middle = draw.unit(n)

            def close():
                away = near(middle, draw.unit(n), 3 * delta)
                size = math.hypot(*away)
                shorter = 1 - delta * draw.rng.uniform(0.5, 3)
                return scaled(shorter / size / math.sqrt(c), away)

            inputs = arguments(name, draw, n, c, close)
            if name in ("mobius_add", "gyration"):
                inputs[0] = scaled(-1, inputs[0])
            yield make(kind, label + ", close", c, inputs, scale=delta)
            if name == "midpoint":
                continue
            ordinary = draw.vector(n, 0.5 / math.sqrt(c))
            if name != "exp_map":
                yield make(kind, label + ", second", c, [ordinary, *inputs[1:]], scale=delta)
                yield make(kind, label + ", first", c, [inputs[0], ordinary, *inputs[2:]],
                           scale=delta)
                opposite = scaled(-1, inputs[0])
                opposite[0] *= 1 - delta
                yield make(kind, label + ", opposite", c, [inputs[0], opposite, *inputs[2:]],
                           scale=delta)
            else:
                x = inputs[0]
                # To the other side of the ball.
                inwards = scaled(-4 * delta * 2.3, x)
                yield make(kind, label + ", inwards", c, [x, inwards], scale=delta)
                yield make(kind, label + ", outwards", c, [x, scaled(delta, x)], scale=delta)
                far = scaled(-math.log(2 / delta) / 2 * 2 * delta, x)
                yield make(kind, label + ", across", c, [x, far], scale=delta)
                yield make(kind, label + ", from inside", c,
                           [ordinary, draw.vector(n, math.log(1 / delta) / 2 / math.sqrt(c))],
                           scale=delta)
        if name == "exp_map_origin":
            for kind, length in [("f64", 5.0), ("f64", 11.0), ("f64", 1e-200), ("f32", 5.0),
                                 ("f32", 1e-30)]:
                label = f"length {length}"
                yield make(kind, label, 1, [Draw(label).vector(3, length)],
                           scale=min(length, 1), digits=900 if length < 1e-100 else 250)

        # Tiny separations.
        for kind, gap, digits in [("f64", 1e-300, 1400), ("f64", 1e-200, 1000), ("f64", 1e-12, 250),
                                  ("f32", 1e-30, 350)]:
            x, y = [0.5, gap], [0.5, -1.5 * gap]
            origin, small = [gap, 2 * gap], [-gap, gap / 2]
            for place, (x, y) in [("", (x, y)), (" at the origin", (origin, small))]:
                label = f"gap {gap}{place}"
                if name in ("mobius_add", "gyration"):
                    y = scaled(-1, y)
                if name in ("distance", "mobius_add", "log_map"):
                    yield make(kind, label, 1, [x, y], scale=gap, digits=digits)
                if name in ("parallel_transport", "gyration") and gap == 1e-200:
                    yield make(kind, label, 1, [x, y, [0.3, 0.7]], scale=gap, digits=digits)
                if name == "exp_map" and gap != 1e-200:
                    yield make(kind, label, 1, [x, [-gap, gap / 3]], scale=gap, digits=digits)
                if name == "midpoint" and gap == 1e-200:
                    yield make(kind, label, 1, [[*x, *y], [1.0, 0.25]], scale=gap, digits=digits)

        # On one line, and exactly opposite.
        for c in (1, 0.1):
            x = [0.5, -0.25]
            for k in (-1, -0.5, 0.5, 1.5):
                if (k == -1 and name == "mobius_add") or k != -1:
                    if name in TWO:
                        yield make("f64", f"collinear {k}, c = {c}", c, [x, scaled(k, x)])
                    if name in ("parallel_transport", "gyration"):
                        inputs = [x, scaled(k, x), [1.0, 0.5]]
                        yield make("f64", f"collinear {k}, c = {c}", c, inputs)


        # One point much nearer to the origin than the other, and t much nearer to an end.
        for tiny, digits in [(1e-3, 200), (1e-8, 200), (1e-11, 250), (1e-30, 400)]:
            for c, kind in [(1, "f64"), (2.5, "f64"), (0.1, "f32")]:
                if name not in (*TWO, "parallel_transport", "gyration", "exp_map", "geodesic"):
                    continue
                if kind == "f32" and tiny != 1e-8:
                    continue
                label = f"lopsided, {tiny}, c = {c}"
                draw = Draw(label + name)
                x, y, v = draw.vector(2, tiny), draw.point(2, c), draw.vector(2, 1)
                others = {"parallel_transport": [v], "gyration": [v], "geodesic": [[0.3]]}
                others = others.get(name, [])
                yield make(kind, label, c, [x, y, *others], scale=tiny, digits=digits)
                yield make(kind, label + ", second", c, [y, x, *others], scale=tiny, digits=digits)
                if name == "geodesic":
                    z = draw.point(2, c)
                    yield make(kind, label + ", start", c, [z, y, [tiny]], scale=tiny,
                               digits=digits)


        # Results nearer to the boundary than any number: they are rounded to a point inside.
        for c, kind in [(1, "f64"), (2.5, "f64"), (0.1, "f64"), (1, "f32"), (2.5, "f32")]:
            label = f"past the last point, c = {c}"
            draw = Draw(label + name)
            x = draw.point(2, c)
            radius = 1 / math.sqrt(c)
            far = {
                "exp_map": [x, draw.vector(2, 45 * radius)],
                "exp_map_origin": [draw.vector(3, 45 * radius)],
                "mobius_scalar_mul": [[40.0], x],
                "mobius_mat_vec": [[40.0, 1.0, -3.0, 55.0], x],
            }
            if name in far:
                yield make(kind, label, c, far[name], digits=300)


def main():
    lines = []
    for one in cases():
        flat = [one["out"], *one["grads"]]
        assert all(math.isfinite(x) for vector in flat for x in vector), one
        lines.append(json.dumps(one, allow_nan=False, separators=(",", ":")))
    versions = {"python": platform.python_version(), "mpmath": mpmath.__version__}
    text = (
        '{\n"generator": "tests/golden/poincare.py",\n'
        f'"versions": {json.dumps(versions)},\n'
        '"cases": [\n' + ",\n".join(lines) + "\n]\n}\n"
    )
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
