"""Passes and verifier agree on what a map may be folded past: one table, seen from both sides."""

from itertools import product

import numpy as np
import pytest

from kvant.ir.basis import NOT_PAST
from kvant.ir.encodings import Raw, Tokens
from kvant.ir.errors import KvantError
from kvant.ir.maps import Gather, Hadamard, Scale, dual
from kvant.ir.rewrite import Builder, rewrite
from kvant.ir.types import TensorType
from kvant.ir.verify import verify
from kvant.passes.sites import emit_write, find_site, fold_points, fold_refusal

TOLERANCE, CAUGHT = 1e-9, 1e-3
HEADS, WIDTH, CHANNELS = 2, 8, 12
MAPS = {
    "pair-scale": Scale("kvant.m", inverse=True),
    "scale": Scale("kvant.m", inverse=True),
    "rotation": Hadamard(WIDTH),
    "permutation": Gather("kvant.m"),
}
OPS = ("linear", "split_heads", "center", "rms_norm", "rope", "add")
# What the passes refuse beyond the verifier: it does not see the values of a scale; not built.
BEYOND = {("scale", "rope"), ("permutation", "rms_norm"), *((kind, "add") for kind in MAPS)}


def layer(op):
    """Return a layer with `op` on q, k and v, between their projections and the site."""
    b = Builder("layer")
    x = b.input("x", TensorType("f32", ("B", "T", CHANNELS)))
    table = TensorType("f32", (1, "T", WIDTH))
    after = {
        "center": lambda y, role: b.emit("center", y),
        "rms_norm": lambda y, role: b.emit(
            "rms_norm", y, b.param(f"{role}_norm.weight", TensorType("f32", (WIDTH,))), eps=1e-6
        ),
        "rope": lambda y, role: b.emit("rope", y, b.input("cos", table), b.input("sin", table)),
        "add": lambda y, role: b.emit("add", y, b.param("shift", TensorType("f32", (WIDTH,)))),
    }.get(op, lambda y, role: y)
    streams = {}
    for role in ("q", "k", "v"):
        w = b.param(f"{role}_proj.weight", TensorType("f32", (HEADS * WIDTH, CHANNELS)))
        y = b.emit("split_heads", b.emit("linear", x, w), heads=HEADS)
        streams[role] = after(y, role)
    for role in ("k", "v"):
        store = Tokens(rest=Raw("f32"))
        written = b.emit("cache_write", streams[role], basis=(), role=role, store=store)
        streams[role] = b.emit("cache_read", written)
    out = b.emit("merge_heads", b.emit("attend", *streams.values(), scale=WIDTH**-0.5))
    w = TensorType("f32", (CHANNELS, HEADS * WIDTH))
    return b.finish((b.emit("linear", out, b.param("o_proj.weight", w)),))


def folded(graph, kind, points_of):
    """Return the graph with the map in the weights of k, and its dual in those of q.

    Args:
        graph: a `layer`.
        kind: of map.
        points_of: path -> the ops whose weights take the map.
    """
    site = find_site(graph)
    maps = {site.k: MAPS[kind], site.q: dual(MAPS[kind])}
    points = {op: m for path, m in maps.items() for op in points_of(path)}

    def rule(b, op, args):
        if op in points:
            attrs = {"heads": HEADS}
            name, constants = type(points[op]).__name__.lower(), ()
            if name != "hadamard":
                dtype = "i64" if name == "gather" else "f64"
                constants = (b.param("kvant.m", TensorType(dtype, (HEADS, WIDTH))),)
            if name == "scale":
                attrs["inverse"] = points[op].inverse
            return b.copy(op, (args[0], b.emit(f"{name}_rows", args[1], *constants, **attrs)))[0]
        return emit_write(b, op, args[0], (MAPS[kind],)) if op == site.k_write else None

    return rewrite(graph, rule)


def projections(path):
    return tuple(op for op in path.ops if op.name == "linear")


def refusal(graph):
    """Return what the verifier says of a fold, or None."""
    try:
        verify(graph, after="fold")
    except KvantError as error:
        return error.what
    return None


def drawn(kit, graph):
    """Return a case of a layer; positions are RoPE's own, in halves."""
    rng = np.random.default_rng(5)
    params = {name: rng.normal(size=declared.shape) for name, declared in graph.params().items()}
    steps = []
    for positions in (np.arange(7), np.arange(7, 11)):
        angle = np.tile(positions[:, None] * 0.3 ** np.arange(WIDTH // 2), 2)[None]
        made = {"x": rng.normal(size=(2, len(positions), CHANNELS))}
        tables = {"cos": np.cos(angle), "sin": np.sin(angle)}
        steps.append(made | {name: tables[name] for name in graph.inputs() if name != "x"})
    return kit.Case(kit.Config(), graph, params, tuple(steps))


def constant(kind):
    """Return the array of `kvant.m`: scales, tied in RoPE pairs (c, c + D / 2) or not; an order."""
    rng = np.random.default_rng(7)
    if kind == "permutation":
        return np.stack([rng.permutation(WIDTH) for _ in range(HEADS)])
    scales = rng.uniform(0.5, 2.0, (HEADS, WIDTH))
    return np.tile(scales[:, : WIDTH // 2], 2) if kind == "pair-scale" else scales


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize(("kind", "op"), list(product(MAPS, OPS)))
def test_what_is_said_to_commute_does_and_nothing_else(kit, kind, op):
    case = drawn(kit, layer(op))
    want, _ = kit.run(case, case.graph, case.params)
    wrong = folded(case.graph, kind, projections)
    got, _ = kit.run(case, wrong, case.params | {"kvant.m": constant(kind)})
    refused = (type(MAPS[kind]), op) in NOT_PAST or (kind, op) in BEYOND
    assert (kit.relative(got, want) > CAUGHT) == refused
    assert refused or kit.relative(got, want) < TOLERANCE


@pytest.mark.parametrize(("kind", "op"), list(product(MAPS, OPS)))
def test_passes_and_verifier_agree_on_what_commutes(kind, op):
    graph = layer(op)
    path = find_site(graph).k
    through = refusal(folded(graph, kind, projections))
    assert (through is not None and "is folded into the weight, but" in through) == (
        (type(MAPS[kind]), op) in NOT_PAST
    )
    why = fold_refusal(path, kind)
    if (kind, op) in BEYOND:
        assert why is not None
        assert (type(MAPS[kind]), op) not in NOT_PAST, "the verifier refuses it as well"
    elif why is not None:
        assert through is not None
        assert why in through
    else:
        assert refusal(folded(graph, kind, lambda path: fold_points(path, kind))) is None


def test_a_scale_goes_into_the_norm_and_not_past_it():
    path = find_site(layer("rms_norm")).k
    for kind in ("scale", "pair-scale"):
        assert [op.name for op in fold_points(path, kind)] == ["rms_norm"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("rotation", "a rotation does not commute with center"),
        ("scale", "center subtracts the mean of the scaled channels"),
        ("pair-scale", "center subtracts the mean of the scaled channels"),
    ],
)
def test_a_map_that_center_stops_is_refused_and_not_blamed_on_the_pass(kind, reason):
    with pytest.raises(KvantError) as refused:
        fold_points(find_site(layer("center")).v, kind)
    assert refused.value.code == "illegal-fold"
    assert refused.value.what == f"a {kind} of v cannot be folded into weights: {reason}"


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize("op", ["center", "add"])
@pytest.mark.parametrize("name", ["smooth-k", "hadamard-v", "threshold-k", "threshold-v"])
def test_a_map_that_cannot_be_folded_stays_online(kit, name, op):
    case = drawn(kit, layer(op))
    after, arrays = kit.apply_passes(case, [name])
    online = {"hadamard", "scale"}
    assert online & {made.name for made in after.ops}
    want, _ = kit.run(case, case.graph, case.params)
    got, _ = kit.run(case, after, arrays)
    assert kit.relative(got, want) < TOLERANCE
