"""Order the channels of every value head, so that channels that share a block are alike.

    cache(v), y = W_o o   ->   cache(gather(v, p)), y = W_o' o'

    sum_h sum_c W_o[h, p(c)] o_h[p(c)] = sum_h sum_c W_o[h, c] o_h[c]      for every permutation p

Values never meet RoPE, so the order folds: into the rows and bias of v_proj, and into the columns
of o_proj for every query head of the group. The order is `kvant.v_order` [H, D], ascending, equal
channels as they were; by the row norms of W_v, or from calibration:

    rms      sqrt(E[v_c^2])
    range    max|v_c|
    fisher   max v_c^2 |W_o[:, c]|^2    what rounding v_c adds to the layer's output

Source: our own extension of K-sort (Trukhanov and Soloveychik, 2024), which sorts keys only.
"""

from collections.abc import Mapping

from ..ir.arrays import Array
from ..ir.graph import Graph
from ..ir.maps import Gather
from ..ir.stats import LayerStats
from .checks import check_word
from .constants import (
    SORT_KEYS,
    SortKey,
    absmax,
    check_order,
    need_site,
    need_stats,
    order_by,
    root_mean_square,
    row_norms,
    value_sensitivity,
)
from .sites import find_site, fold_points, folded_of
from .values import map_values

ORDER = "kvant.v_order"


def sort_v(graph: Graph, *, key: SortKey = "weight") -> Graph:
    """Order values by their channels' size, folded into v_proj and o_proj.

    Args:
        graph: of a layer.
        key: "weight": norms of the rows of W_v with bias; the others as above, from calibration.

    Returns: the new graph; `graph` itself if it has no attention.
    Raises: KvantError ("already-applied", "bad-option", "illegal-fold").
    """
    check_word("sort-v", "key", key, SORT_KEYS)
    site = find_site(graph)
    if site is None:
        return graph
    write, read = fold_points(site.v, "permutation"), fold_points(site.out, "permutation")
    return map_values(graph, site, Gather(ORDER), write, read)


def sort_v_constants(
    graph: Graph,
    weights: Mapping[str, Array],
    stats: LayerStats | None,
    *,
    key: SortKey = "weight",
) -> dict[str, Array]:
    """Return {"kvant.v_order"}: i64 [H, D], ascending. Arguments as in `sort_k_constants`."""
    check_word("sort-v", "key", key, SORT_KEYS)
    site = need_site(graph)
    if key == "weight":
        return {ORDER: order_by(row_norms(graph, site.v, weights))}
    seen, maps = need_stats(stats, "sort-v"), folded_of(site.v_write, site.v)
    if key == "fisher":
        return {ORDER: order_by(value_sensitivity(graph, site, maps, seen, weights))}
    size = root_mean_square if key == "rms" else absmax
    return {ORDER: order_by(size(site.v, maps, seen, weights))}


def check_sort_v(graph: Graph, constants: Mapping[str, Array]) -> None:
    """Refuse an order that is not a permutation. Raises: KvantError ("bad-constant")."""
    site = need_site(graph)
    check_order(ORDER, constants, site.heads, site.v.width)
