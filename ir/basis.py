"""Which maps stand where in a graph, and which are illegal there.

    basis of cache[k] = M    q gets M^-T    basis of cache[v] = N    the output gets N^-1

A map is folded into weights (`scale_rows` ...) or online (`scale` ...); folded ones act first. So
that a rewrite is exact, each map of a stream is in the basis of its cache, is mirrored on q or
undone after attend, hits weight and bias alike, and is not folded past an op that it does not
commute with.
"""

from collections.abc import Iterator

from .graph import Graph, Op, Value
from .maps import ONLINE, Gather, Hadamard, Map, Scale, dual
from .text import print_attr

Maps = tuple[Map, ...]
Problem = tuple[int, str]  # the place of the op, what is wrong

_AHEAD = "keep it online after rope, with its dual on q"
# (map, op that it would be folded past) -> why it may not be, what to do instead. A scale may pass
# rope if it is equal within each pair: who makes the constant must see to that.
NOT_PAST: dict[tuple[type[Map], str], tuple[str, str]] = {
    (Hadamard, "rope"): ("a rotation does not commute with rope", _AHEAD),
    (Hadamard, "center"): ("a rotation does not commute with center", _AHEAD),
    (Hadamard, "rms_norm"): ("a rotation does not commute with rms_norm", _AHEAD),
    (Gather, "rope"): ("rope turns each channel pair at its own frequency", _AHEAD),
    (Scale, "center"): (
        "center subtracts the mean of the scaled channels",
        "scale the norm weight",
    ),
    (Scale, "rms_norm"): (
        "rms_norm divides by the scaled norm",
        "scale the norm weight instead",
    ),
}


def problems(graph: Graph) -> Iterator[Problem]:
    """Yield maps that are not recorded, not mirrored, not undone, or that do not commute."""
    for place, op in enumerate(graph.ops):
        if op.name == "linear" and len(op.args) == 3:
            weight, bias = (weight_maps(graph, w, "_rows") for w in op.args[1:])
            if weight != bias:
                said = f"the weight is in basis {print_attr(weight)}"
                yield place, f"{said} but the bias in {print_attr(bias)}"
        if op.name in ("rope", "rms_norm", "center"):
            own = weight_maps(graph, op.args[1], "_rows") if op.name == "rms_norm" else ()
            rotated = [m for m in own if isinstance(m, Hadamard)]
            for m in (*folded(graph, op.args[0]), *rotated):
                if (type(m), op.name) in NOT_PAST:
                    said = "; ".join(NOT_PAST[type(m), op.name])
                    yield place, f"{print_attr(m)} is folded into the weight, but {said}"
        if op.name == "cache_write":
            found, basis = applied(graph, op.args[0]), op.attr_as("basis", tuple)
            if found != basis:
                said = f"the basis is {print_attr(basis)}, but what is applied is"
                yield place, f"{said} {print_attr(found)}"
        if op.name == "attend":
            yield from ((place, what) for what in _mirrored(graph, op))


def _mirrored(graph: Graph, attend: Op) -> Iterator[str]:
    """Yield where the queries are not in the dual basis, or the output is not mapped back."""
    k, v = (print_attr(stored(graph, value)) for value in attend.args[1:3])
    q = print_attr(tuple(map(dual, applied(graph, attend.args[0]))))
    if q != k:
        yield f"the stored keys are in basis {k} but the queries are in {q}, the dual of theirs"
    back = undone(graph, attend.result)
    if back is not None and print_attr(back) != v:
        said = f"the stored values are in basis {v} but the output is mapped back from"
        yield f"{said} {print_attr(back)}"


def stored(graph: Graph, value: Value) -> Maps:
    """Return the basis of what is read; of a value without a cache, what is applied to it."""
    op = graph.producer(value)
    is_read = op.name == "cache_read"
    return graph.producer(op.args[0]).attr_as("basis", tuple) if is_read else applied(graph, value)


def applied(graph: Graph, value: Value) -> Maps:
    """Return the maps that end in `value`: those folded into weights, then those online."""
    online, end = maps_before(graph, value)
    return (*folded(graph, end), *(map_of(graph, op) for op in online))


def folded(graph: Graph, value: Value) -> Maps:
    """Return the maps folded into the weights that `value` comes from; () without a projection."""
    op = graph.producer(value)
    if op.name in ("rope", "split_heads", "center", *ONLINE):
        return folded(graph, op.args[0])
    if op.name == "rms_norm":
        return (*folded(graph, op.args[0]), *weight_maps(graph, op.args[1], "_rows"))
    return weight_maps(graph, op.args[1], "_rows") if op.name == "linear" else ()


def undone(graph: Graph, value: Value) -> Maps | None:
    """Return the maps whose inverses are applied to attend's output; None where it is not seen."""
    ops, end = maps_after(graph, value)
    maps = [map_of(graph, op) for op in ops]
    if any(isinstance(m, Gather) for m in maps):  # the inverse order is another constant
        return None
    online = tuple(dual(m) for m in reversed(maps))  # of the other kinds the dual is the inverse
    for op in graph.users(end)[:1]:
        merged = graph.users(op.result) if op.name == "merge_heads" else ()
        if merged and merged[0].name == "linear":
            columns = weight_maps(graph, merged[0].args[1], "_cols")
            return (*map(dual, columns), *online)
    return online


def weight_maps(graph: Graph, value: Value, side: str) -> Maps:
    """Return the maps on the rows (`_rows`) or columns (`_cols`) of a weight, first one first."""
    ops, below = maps_before(graph, value, side)
    maps = tuple(map_of(graph, op) for op in ops)
    op = graph.producer(below)
    if op.name == "add":  # a norm weight moved by its offset before it is scaled
        return (*weight_maps(graph, op.args[0], side), *maps)
    return maps


def maps_before(graph: Graph, value: Value, side: str = "") -> tuple[tuple[Op, ...], Value]:
    """Return the ops of the maps that end in `value`, first one first, and the value before them.

    Args:
        graph: that holds the value.
        value: a stream, or a weight.
        side: "" for online maps, "_rows" or "_cols" for those of a weight.
    """
    names, ops = [name + side for name in ONLINE], []
    while (op := graph.producer(value)).name in names:
        ops.append(op)
        value = op.args[0]
    return tuple(reversed(ops)), value


def maps_after(graph: Graph, value: Value) -> tuple[tuple[Op, ...], Value]:
    """Return the ops of the online maps that begin at `value`, and the value after them."""
    ops: list[Op] = []
    while len(users := graph.users(value)) == 1 and users[0].name in ONLINE:
        ops += users
        value = users[0].result
    return tuple(ops), value


def map_of(graph: Graph, op: Op) -> Map:
    """Return the map of an online op or a weight op; its constant by parameter name."""
    if op.name.startswith("hadamard"):
        shape = op.args[0].tensor.shape
        width = shape[0] if op.name == "hadamard_rows" else shape[-1]
        heads = dict(op.attrs).get("heads", 1)
        return Hadamard(int(str(width)) // int(str(heads)))
    made = graph.producer(op.args[1])
    name = made.attr_as("name", str) if made.name == "param" else str(op.args[1])
    return Gather(name) if op.name[0] == "g" else Scale(name, op.attr_as("inverse", bool))
