"""Rotate the values of every head by a Walsh-Hadamard matrix.

    cache(v), y = W_o o   ->   cache(v Hd), y = W_o' o'

    o' = sum_t p_t (v_t Hd) = o Hd,   y = sum_h W_o[h] o_h = sum_h (W_o[h] Hd) o'_h,   Hd Hd = 1

Values never meet RoPE, so both maps fold into weights: the rows (and bias) of v_proj, and the
columns of o_proj for every query head of the group. Where values or output do not touch a
projection (a graph without weights, a norm on v, a gate on the output) that side stays online.
Source: SpinQuant (Liu et al., 2024), rotation R2 with a Hadamard matrix; QuaRot (Ashkboos et al.,
2024) in the per-head form on both sides. Differs from it in: nothing.
"""

from ..ir.graph import Graph, Op, Value
from ..ir.maps import Hadamard
from ..ir.rewrite import Builder, rewrite
from .checks import check_head_size
from .sites import (
    Site,
    basis_of,
    check_once,
    emit_write,
    find_site,
    fold_into,
    fold_points,
    fold_refusal,
    with_folded,
)


def hadamard_v(graph: Graph) -> Graph:
    """Rotate values by a Hadamard matrix, folded into v_proj and o_proj where there are any.

    Returns: the new graph; `graph` itself if it has no attention.
    Raises: KvantError ("unsupported-head-size", "already-applied").
    """
    site = find_site(graph)
    if site is None:
        return graph
    check_head_size(site.v.width, graph)
    check_once(graph, site.v_write, Hadamard(site.v.width))
    write, read = (
        () if fold_refusal(path, "rotation") else fold_points(path, "rotation")
        for path in (site.v, site.out)
    )

    def rule(b: Builder, op: Op, args: tuple[Value, ...]) -> Value | None:
        if op in write:
            return fold_into(graph, b, op, args, lambda b, w, _: _rows(b, w, site))
        if op in read:
            w = b.emit("hadamard_cols", args[1], heads=site.out.heads, loc=op.loc)
            return b.copy(op, (args[0], w, *args[2:]))[0]
        if op == site.v_write:
            return _write(b, op, args[0], site, folded=bool(write))
        if op == site.attend and not read:
            return b.emit("hadamard", b.copy(op, args)[0], loc=op.loc)
        return None

    return rewrite(graph, rule)


def _rows(b: Builder, weight: Value, site: Site) -> Value:
    return b.emit("hadamard_rows", weight, heads=site.heads)


def _write(b: Builder, op: Op, v: Value, site: Site, folded: bool) -> Value:
    new = Hadamard(site.v.width)
    if folded:
        return emit_write(b, op, v, with_folded(op, site.v, new))
    return emit_write(b, op, b.emit("hadamard", v, loc=op.loc), (*basis_of(op), new))
