"""Rotate the values of every head by a Walsh-Hadamard matrix.

    cache(v), y = W_o o   ->   cache(v Hd), y = W_o' o'

    o' = sum_t p_t (v_t Hd) = o Hd,   y = sum_h W_o[h] o_h = sum_h (W_o[h] Hd) o'_h,   Hd Hd = 1

Values never meet RoPE, so both maps fold into weights: the rows (and bias) of v_proj, and the
columns of o_proj for every query head of the group. Where values or output do not touch a
projection (a graph without weights, a norm on v, a gate on the output) that side stays online.
Source: SpinQuant (Liu et al., 2024), rotation R2 with a Hadamard matrix; QuaRot (Ashkboos et al.,
2024) in the per-head form on both sides. Differs from it in: nothing.
"""

from ..ir.graph import Graph
from ..ir.maps import Hadamard
from .checks import check_head_size
from .sites import (
    find_site,
    fold_points,
    fold_refusal,
)
from .values import map_values


def hadamard_v(graph: Graph) -> Graph:
    """Rotate values by a Hadamard matrix, folded into v_proj and o_proj where there are any.

    Returns: the new graph; `graph` itself if it has no attention.
    Raises: KvantError ("unsupported-head-size", "already-applied").
    """
    site = find_site(graph)
    if site is None:
        return graph
    check_head_size(site.v.width, graph)
    write, read = (
        () if fold_refusal(path, "rotation") else fold_points(path, "rotation")
        for path in (site.v, site.out)
    )
    return map_values(graph, site, Hadamard(site.v.width), write, read)
