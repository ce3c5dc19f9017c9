"""Every invariant of a graph, in one function that reports all it finds.

Here is the form: known ops, arity, attributes, types, single assignment, definition before use,
roles. What maps of the cached streams may be where is in basis.py; it is looked at when the form is
right. Values are not seen: that a folded scale is tied in RoPE pairs is checked where it is made.
"""

from collections.abc import Iterator
from dataclasses import replace

from . import basis
from .attrs import AttrValue
from .errors import KvantError
from .graph import Graph, Op, Value
from .ops import infer, problems
from .text import print_op
from .types import TensorType, Type

Problem = tuple[int, str]  # the place of the op (len(ops) is the return line), what is wrong


def verify(graph: Graph, after: str | None = None) -> None:
    """Check every invariant.

    Args:
        graph: the graph.
        after: the pass that made it, for the message.

    Raises: KvantError ("ill-formed-graph") with each guilty line and all that is wrong with it.
    """
    found = list(_form(graph)) or list(basis.problems(graph))
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
