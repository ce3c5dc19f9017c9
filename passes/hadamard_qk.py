"""Rotate queries and keys of every head by a Walsh-Hadamard matrix, after RoPE.

    scores(q, cache(k))   ->   scores(q Hd, cache(k Hd))

    <q Hd, k Hd> = <q, k>      because Hd is orthonormal

RoPE and a QK-norm stand between the projections and this place and do not commute with a rotation,
so the map is online on both sides: on k at append, on q in prepare. Nothing is folded.
Source: QuaRot (Ashkboos et al., 2024); SpinQuant (Liu et al., 2024), rotation R3. Differs from it
in: nothing.
"""

from ..ir.graph import Graph, Op, Value
from ..ir.maps import Hadamard
from ..ir.rewrite import Builder, rewrite
from .checks import check_head_size
from .sites import basis_of, check_once, emit_write, find_site


def hadamard_qk(graph: Graph) -> Graph:
    """Rotate q and k by a Hadamard matrix after RoPE, online.

    Returns: the new graph; `graph` itself if it has no attention.
    Raises: KvantError ("unsupported-head-size", "already-applied").
    """
    site = find_site(graph)
    if site is None:
        return graph
    check_head_size(site.k.width, graph)
    new = Hadamard(site.k.width)
    check_once(graph, site.k_write, new)

    def rule(b: Builder, op: Op, args: tuple[Value, ...]) -> Value | None:
        if op == site.k_write:
            k = b.emit("hadamard", args[0], loc=op.loc)
            return emit_write(b, op, k, (*basis_of(op), new))
        if op == site.attend:
            return b.copy(op, (b.emit("hadamard", args[0], loc=op.loc), *args[1:]))[0]
        return None

    return rewrite(graph, rule)
