"""Every invariant of a graph, in one function that reports all it finds.

Form: known ops, arity, attributes, types, single assignment, definition before use, one write a role.
Maps: with M what is applied to the keys before they are stored, folded into weights or online,

    the basis of cache[k] is M,   the queries get M^-T,   and cache[v]'s M is undone after attend.

Not seen here: values. That a folded scale is tied in RoPE pairs is checked where it is made.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from .attrs import AttrValue
from .errors import KvantError
from .graph import Graph, Op, Value
from .maps import Gather, Hadamard, Map, Scale, dual
from .ops import infer, problems
from .text import print_attr, print_op
from .types import TensorType, Type

Problem = tuple[int, str]  # the place of the op (len(ops) is the return line), what is wrong
Maps = tuple[Map, ...]

_ONLINE = ("hadamard", "gather", "scale")
_AHEAD = "keep it online after rope, with its dual on q"
_ILLEGAL = {
    (Hadamard, "rms_norm"): f"a rotation does not commute with rms_norm; {_AHEAD}",
    (Hadamard, "rope"): f"a rotation does not commute with rope; {_AHEAD}",
    (Gather, "rope"): f"rope turns each channel pair at its own frequency; {_AHEAD}",
    (Scale, "rms_norm"): "rms_norm divides by the scaled norm; scale the norm weight instead",
}


def verify(graph: Graph, after: str | None = None) -> None:
    """Check every invariant.

    Args:
        graph: the graph.
        after: the pass that made it, for the message.

    Raises: KvantError ("ill-formed-graph") that shows each guilty line and all that is wrong with it.
    """
    found = list(_form(graph)) or list(_maps(graph))
    if not found:
        return
    made = f" after pass {after}" if after else ""
    fix = f"the pass {after} broke the graph: report it" if after else "correct the marked lines"
    what = f"@{graph.name} is not well formed{made}\n{_wounds(graph, found)}"
    raise KvantError("ill-formed-graph", what, where=f"graph @{graph.name}", fix=fix)


def _wounds(graph: Graph, found: list[Problem]) -> str:
    """Return the guilty lines, each with the line before it and what is wrong below it."""
    shown: list[str] = []
    guilty = {place for place, _ in found}
    last = ("return " + " ".join(map(str, graph.outputs))).strip()
    for place in range(len(graph.ops) + 1):
        op = graph.ops[place] if place < len(graph.ops) else None
        line = print_op(replace(op, loc=None)) if op else last
        if place in guilty:
            shown.append(f"x   {line}")
            shown += [f"    ^ {what}" for at, what in found if at == place]
            shown += [f"    from: {op.loc}"] if op and op.loc else []
        elif place + 1 in guilty:
            shown.append(f"    {line}")
    return "\n".join(shown)


def _form(graph: Graph) -> Iterator[Problem]:
    """Yield what is wrong with ops one by one."""
    everywhere = {r.name for op in graph.ops for r in op.results}
    defined: dict[str, Value] = {}
    written: dict[str, TensorType] = {}
    once: dict[tuple[str, AttrValue], Type] = {}
    for place, op in enumerate(graph.ops):
        found = [*_uses(op.args, defined, everywhere), *problems(op.name, op.args, op.attrs)]
        found += ["the attributes are not sorted"] if tuple(sorted(op.attrs)) != op.attrs else []
        found = found or list(_types(op, written))
        for result in op.results:
            if result.name in defined:
                found.append(f"{result} is defined twice")
            defined[result.name] = result
        if not found and op.name in ("input", "param", "cache_write"):
            found += _declared(op, once)
        if not found and op.name == "cache_write":
            written[op.result.name] = op.args[0].tensor
        yield from ((place, what) for what in found)
    last = _uses(graph.outputs, defined, everywhere) if graph.outputs else ["nothing is returned"]
    yield from ((len(graph.ops), what) for what in last)


def _uses(args: tuple[Value, ...], defined: dict[str, Value], names: set[str]) -> Iterator[str]:
    for arg in args:
        if arg.name not in defined:
            where = "later in the graph" if arg.name in names else "nowhere"
            yield f"{arg} is defined {where}"
        elif defined[arg.name] != arg:
            yield f"{arg} is used as {arg.type}, but defined as {defined[arg.name].type}"


def _types(op: Op, written: dict[str, TensorType]) -> Iterator[str]:
    """Yield where the types of the results are not what the op gives."""
    if op.name in ("input", "param"):
        if len(op.results) != 1 or not isinstance(op.results[0].type, TensorType):
            yield f"{op.name} gives one tensor"
        return
    try:
        types = infer(op.name, op.args, op.attrs, written)
    except KvantError as refusal:
        yield refusal.what
        return
    except KeyError as unknown:
        yield f"%{unknown.args[0]} was not written"
        return
    if len(types) != len(op.results):
        yield f"{len(op.results)} results are named, but {op.name} gives {len(types)}"
        return
    for result, type in zip(op.results, types, strict=True):
        if result.type != type:
            yield f"the type is {result.type}, but {op.name} gives {type}"


def _declared(op: Op, once: dict[tuple[str, AttrValue], Type]) -> Iterator[str]:
    """Yield where an input, a parameter or a role disagrees with an earlier declaration."""
    key = (op.name, op.attr("role" if op.name == "cache_write" else "name"))
    if key in once and op.name == "cache_write":
        yield f"{op.result.type} is written twice"
    elif once.setdefault(key, op.result.type) != op.result.type:
        yield f"the {op.name} {key[1]} is {op.result.type} here, but {once[key]} above"


def _maps(graph: Graph) -> Iterator[Problem]:
    """Yield maps that are not recorded, not mirrored, not undone, or that do not commute."""
    for place, op in enumerate(graph.ops):
        if op.name == "linear" and len(op.args) == 3:
            weight, bias = (_weight_maps(graph, w, "_rows") for w in op.args[1:])
            if weight != bias:
                yield place, f"the weight is in basis {_text(weight)} but the bias in {_text(bias)}"
        if op.name in ("rope", "rms_norm"):
            own = _weight_maps(graph, op.args[1], "_rows") if op.name == "rms_norm" else ()
            rotated = [m for m in own if isinstance(m, Hadamard)]
            for m in (*_folded(graph, op.args[0]), *rotated):
                if reason := _ILLEGAL.get((type(m), op.name)):
                    yield place, f"{print_attr(m)} is folded into the weight, but {reason}"
        if op.name == "cache_write":
            applied, basis = _applied(graph, op.args[0]), op.attr_as("basis", tuple)
            if applied != basis:
                what = f"the basis is {_text(basis)}, but what is applied is {_text(applied)}"
                yield place, what
        if op.name == "attend":
            yield from ((place, what) for what in _mirrored(graph, op))


def _mirrored(graph: Graph, attend: Op) -> Iterator[str]:
    """Yield where the queries are not in the dual basis, or the output is not mapped back."""
    k, v = (_stored(graph, value) for value in attend.args[1:])
    q = tuple(map(dual, _applied(graph, attend.args[0])))
    if q != k:
        what = f"the stored keys are in basis {_text(k)} but the queries are in {_text(q)}"
        yield f"{what} (each map of the keys needs its dual on q)"
    undone = _undone(graph, attend.result)
    if undone is not None and undone != v:
        yield f"the stored values are in basis {_text(v)} but the output is mapped from {_text(undone)}"


def _stored(graph: Graph, value: Value) -> Maps:
    """Return the basis of what is read; of a value without a cache, what is applied to it."""
    op = graph.producer(value)
    if op.name != "cache_read":
        return _applied(graph, value)
    return graph.producer(op.args[0]).attr_as("basis", tuple)


def _applied(graph: Graph, value: Value) -> Maps:
    """Return the maps that end in `value`: those folded into weights, then those online."""
    online, end = _chain(graph, value, lambda op: op.name in _ONLINE)
    return (*_folded(graph, end), *online)


def _folded(graph: Graph, value: Value) -> Maps:
    """Return the maps folded into the weights that `value` comes from; empty without a projection."""
    op = graph.producer(value)
    if op.name in ("rope", "split_heads", *_ONLINE):
        return _folded(graph, op.args[0])
    if op.name == "rms_norm":
        return (*_folded(graph, op.args[0]), *_weight_maps(graph, op.args[1], "_rows"))
    return _weight_maps(graph, op.args[1], "_rows") if op.name == "linear" else ()


def _undone(graph: Graph, value: Value) -> Maps | None:
    """Return the maps whose inverses are applied to attend's output; None where it is not seen."""
    online: Maps = ()
    while len(users := graph.users(value)) == 1 and users[0].name in _ONLINE:
        m, value = _map(graph, users[0]), users[0].result
        if isinstance(m, Gather):  # the inverse order is another constant
            return None
        online = (dual(m), *online)  # of these two kinds the dual is the inverse
    for op in users[:1]:
        merged = graph.users(op.result) if op.name == "merge_heads" else ()
        if merged and merged[0].name == "linear":
            columns = _weight_maps(graph, merged[0].args[1], "_cols")
            return (*map(dual, columns), *online)
    return online


def _weight_maps(graph: Graph, value: Value, side: str) -> Maps:
    """Return the maps on the rows (`_rows`) or columns (`_cols`) of a weight, first one first."""
    return _chain(graph, value, lambda op: op.name in [name + side for name in _ONLINE])[0]


def _chain(graph: Graph, value: Value, is_map: Callable[[Op], bool]) -> tuple[Maps, Value]:
    """Return the maps that end in `value`, first one first, and the value before them."""
    maps: Maps = ()
    while is_map(op := graph.producer(value)):
        maps, value = (_map(graph, op), *maps), op.args[0]
    return maps, value


def _map(graph: Graph, op: Op) -> Map:
    """Return the map of an online op or a weight op; its constant by parameter name."""
    if op.name.startswith("hadamard"):
        shape = op.args[0].tensor.shape
        width = shape[0] if op.name == "hadamard_rows" else shape[-1]
        heads = dict(op.attrs).get("heads", 1)
        return Hadamard(int(str(width)) // int(str(heads)))
    made = graph.producer(op.args[1])
    name = made.attr_as("name", str) if made.name == "param" else str(op.args[1])
    return Gather(name) if op.name[0] == "g" else Scale(name, op.attr_as("inverse", bool))


def _text(maps: Maps) -> str:
    return print_attr(maps)
