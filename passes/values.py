"""A map of the values: folded into W_v and W_o as far as it goes, online where it does not.

    cache(v), y = W_o o   ->   cache(M v), y = (W_o M^-1) o'

Each side folds by itself: rows and bias of v_proj, columns of o_proj; else M stands before the
cache, or its inverse after attend.
"""

from typing import Any

from ..ir.graph import Graph, Op, Value
from ..ir.maps import Gather, Hadamard, Map, Scale
from ..ir.rewrite import Builder, rewrite
from ..ir.types import TensorType
from .sites import Site, basis_of, check_once, emit_write, fold_into, with_folded


def map_values(
    graph: Graph, site: Site, new: Map, write: tuple[Op, ...], read: tuple[Op, ...]
) -> Graph:
    """Return the graph with one more map of the values.

    Args:
        graph: of a layer.
        site: of its attention.
        new: a Hadamard, or an order or scale whose constant is [H, Dv]. An order must fold.
        write: where it folds on the way to the cache, see `fold_points`; online if empty.
        read: where its inverse folds after attend; online if empty.

    Raises: KvantError ("already-applied").
    """
    check_once(graph, site.v_write, new)
    kind, there, back = _op_of(new, site)

    def emit(b: Builder, name: str, x: Value, loc: str | None = None, **attrs: Any) -> Value:
        return b.emit(name, x, *_constant(b, new, site), loc=loc, **attrs)

    def rows(b: Builder, weight: Value, op: Op) -> Value:
        return emit(b, f"{kind}_rows", weight, heads=site.heads, **there)

    def rule(b: Builder, op: Op, args: tuple[Value, ...]) -> Value | None:
        if op in write:
            return fold_into(graph, b, op, args, rows)
        if op in read:
            w = emit(b, f"{kind}_cols", args[1], op.loc, heads=site.out.heads, **back)
            return b.copy(op, (args[0], w, *args[2:]))[0]
        if op == site.v_write and write:
            return emit_write(b, op, args[0], with_folded(op, site.v, new))
        if op == site.v_write:
            v = emit(b, kind, args[0], op.loc, **there)
            return emit_write(b, op, v, (*basis_of(op), new))
        if op == site.attend and not read:
            return emit(b, kind, b.copy(op, args)[0], op.loc, **back)
        return None

    return rewrite(graph, rule)


def _op_of(new: Map, site: Site) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the op that applies a map, and its attributes before the cache and after attend."""
    match new:
        case Hadamard():
            return "hadamard", {}, {}
        case Gather():
            return "gather", {}, {"repeat": site.group}
        case Scale(inverse=inverse):
            back: dict[str, Any] = {"repeat": site.group, "inverse": not inverse}
            return "scale", {"inverse": inverse}, back


def _constant(b: Builder, new: Map, site: Site) -> tuple[Value, ...]:
    """Return the constant of a map as a parameter, or nothing if it has none."""
    shape = (site.heads, site.v.width)
    match new:
        case Hadamard():
            return ()
        case Gather(order=name):
            return (b.param(name, TensorType("i64", shape)),)
        case Scale(values=name):
            return (b.param(name, TensorType("f64", shape)),)
