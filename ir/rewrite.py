"""The few ways to build, walk and rebuild a graph."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from .attrs import AttrValue
from .errors import KvantError
from .graph import Graph, Op, Value
from .ops import complete, infer, problems
from .types import TensorType

Text = str | None
Rule = Callable[["Builder", Op, tuple[Value, ...]], Value | tuple[Value, ...] | None]


class Builder:
    """Makes a graph op by op; each op is checked and typed when it is emitted.

    Args:
        name: of the graph, printed as @name.
        taken: names that new values must not use.
    """

    def __init__(self, name: str, taken: Iterable[str] = ()) -> None:
        self.name = name
        self.ops: list[Op] = []
        self._taken = set(taken)
        self._written: dict[str, TensorType] = {}

    def input(self, name: str, type: TensorType) -> Value:
        """Declare the input `name`, or return it if it is declared already."""
        return self._declare(Op("input", (), (("name", name),), (Value("", type),)))

    def param(self, name: str, type: TensorType) -> Value:
        """Declare the parameter `name` (relative to the layer), or return the one there is."""
        return self._declare(Op("param", (), (("name", name),), (Value("", type),)))

    def emit(
        self, op: str, /, *args: Value, loc: Text = None, hint: Text = None, **attrs: AttrValue
    ) -> Value:
        """Append an op that gives one value. See emit_all."""
        made = self.emit_all(op, *args, loc=loc, hint=hint, **attrs)
        if len(made) == 1:
            return made[0]
        raise self._refused(op, args, f"{op} gives {len(made)} values, not one; use emit_all")

    def emit_all(
        self, op: str, /, *args: Value, loc: Text = None, hint: Text = None, **attrs: AttrValue
    ) -> tuple[Value, ...]:
        """Append an op; attributes not given take their default.

        Args:
            op: a row of OPS other than `input` and `param`.
            args: values made before.
            loc: the model's own source line.
            hint: what to call the results; a number is added where that name is taken.
            attrs: attributes of the op.

        Returns: its results.
        Raises: KvantError ("ill-typed-op") if the op does not fit its arguments.
        """
        return self._append(Op(op, args, complete(op, attrs), (), loc), hint or op)

    def copy(self, op: Op, args: tuple[Value, ...]) -> tuple[Value, ...]:
        """Append `op` on other arguments: same names, types inferred again."""
        if op.name in ("input", "param"):
            return (self._declare(op),)
        return self._append(replace(op, args=args))

    def finish(self, outputs: Iterable[Value]) -> Graph:
        """Return the graph. It is not verified."""
        return Graph(self.name, tuple(self.ops), tuple(outputs))

    def _append(self, op: Op, hint: str = "") -> tuple[Value, ...]:
        """Append `op` with its types inferred; without a hint its results keep their names."""
        if found := problems(op.name, op.args, op.attrs):
            raise self._refused(op.name, op.args, "; ".join(found))
        types = infer(op.name, op.args, op.attrs, self._written)
        names = [self._fresh(hint) for _ in types] if hint else [r.name for r in op.results]
        results = tuple(Value(n, t) for n, t in zip(names, types, strict=True))
        self.ops.append(replace(op, results=results))
        if op.name == "cache_write":
            self._written[names[0]] = op.args[0].tensor
        return results

    def _declare(self, op: Op) -> Value:
        """Append an input or a parameter; give the old one where it is declared already.

        A result without a name gets a fresh one.
        """
        for old in self.ops:
            if (old.name, old.attrs) == (op.name, op.attrs):
                if old.result.type == op.result.type:
                    return old.result
                what = f"{op.attr('name')} is {old.result.type}, not {op.result.type}"
                raise self._refused(op.name, (), what)
        name = op.result.name or self._fresh(str(op.attr("name")))
        self.ops.append(replace(op, results=(Value(name, op.result.type),)))
        return self.ops[-1].result

    def _refused(self, op: str, args: tuple[Value, ...], what: str) -> KvantError:
        where = " ".join([f"graph @{self.name}:", op, *map(str, args)])
        return KvantError("ill-typed-op", what, where=where, fix="the table is kvant.ir.ops.OPS")

    def _fresh(self, hint: str) -> str:
        """Return a name not used yet, made of `hint`."""
        stem = re.sub(r"\W", "_", hint)
        name, count = stem, 0
        while name in self._taken:
            count += 1
            name = f"{stem}_{count}"
        self._taken.add(name)
        return name


def rewrite(graph: Graph, fn: Rule) -> Graph:
    """Rebuild `graph` with `fn` deciding about each op.

    Args:
        graph: a well-formed graph.
        fn: called as fn(builder, op, new_args); returns what stands for the op's results now,
            or None to keep the op. It may emit ops before it returns.

    Returns: the new graph; `graph` itself if nothing changed. Ops no longer used stay: dead_code.
    """
    builder = Builder(graph.name, (r.name for op in graph.ops for r in op.results))
    now: dict[str, Value] = {}
    for op in graph.ops:
        args = tuple(now[a.name] for a in op.args)
        made = fn(builder, op, args)
        new = builder.copy(op, args) if made is None else made
        new = (new,) if isinstance(new, Value) else new
        now.update((r.name, n) for r, n in zip(op.results, new, strict=True))
    after = builder.finish(now[o.name] for o in graph.outputs)
    return graph if after == graph else after


def dead_code(graph: Graph) -> Graph:
    """Drop ops whose results nobody uses; inputs stay. Returns `graph` itself if none is dead."""
    used = {o.name for o in graph.outputs}
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if op.name == "input" or any(r.name in used for r in op.results):
            used.update(a.name for a in op.args)
            kept.append(op)
    if len(kept) == len(graph.ops):
        return graph
    return Graph(graph.name, tuple(reversed(kept)), graph.outputs)
