"""Store the channels of every key head in another order: those that share a block are alike.

    scores(q, cache(k))   ->   scores(gather(q, p), cache(gather(k, p)))

    sum_c q[p(c)] k[p(c)] = sum_c q[c] k[c]      for every permutation p

The order is `kvant.k_order` [H, D], one per key/value head, shared by its query heads. It is a
storage order after RoPE and is never folded: under RoPE a channel's angle belongs to its place.
Source: "Accurate Block Quantization in LLMs with Outliers" (Trukhanov and Soloveychik, 2024),
K-sort: argsort of the row norms of W_k. Differs from it in: the bias and a norm weight count;
post-RoPE; three other keys, from calibration, of which the last is ours:

    rms      sqrt(E[k_c^2])
    range    max|k_c|               as SKVQ (Duanmu et al., 2024) groups channels
    fisher   max k_c^2 E[q_c^2]     what rounding k_c adds to the variance of the scores

The order is ascending, so that a recipe of slices finds the outliers in its last slice. Equal
channels stay in their old order.
"""

from collections.abc import Mapping

from ..ir.arrays import Array
from ..ir.basis import map_of
from ..ir.graph import Graph, Op, Value
from ..ir.maps import Gather
from ..ir.rewrite import Builder, rewrite
from ..ir.stats import LayerStats
from ..ir.types import TensorType
from .checks import check_word
from .constants import (
    SORT_KEYS,
    SortKey,
    absmax,
    check_order,
    key_sensitivity,
    mapped,
    need_site,
    need_stats,
    order_by,
    root_mean_square,
    row_norms,
)
from .sites import basis_of, check_once, emit_write, find_site

ORDER = "kvant.k_order"


def sort_k(graph: Graph, *, key: SortKey = "weight") -> Graph:
    """Store keys in the order of their channels' size; gather k at append and q in prepare.

    Args:
        graph: of a layer.
        key: "weight": norms of the rows of W_k with bias; the others as above, from calibration.

    Returns: the new graph; `graph` itself if it has no attention.
    Raises: KvantError ("already-applied", "bad-option").
    """
    check_word("sort-k", "key", key, SORT_KEYS)
    site = find_site(graph)
    if site is None:
        return graph
    check_once(graph, site.k_write, Gather(ORDER))

    def rule(b: Builder, op: Op, args: tuple[Value, ...]) -> Value | None:
        order = TensorType("i64", (site.heads, site.k.width))
        if op == site.k_write:
            k = b.emit("gather", args[0], b.param(ORDER, order), loc=op.loc)
            return emit_write(b, op, k, (*basis_of(op), Gather(ORDER)))
        if op == site.attend:
            q = b.emit("gather", args[0], b.param(ORDER, order), repeat=site.group, loc=op.loc)
            return b.copy(op, (q, *args[1:]))[0]
        return None

    return rewrite(graph, rule)


def sort_k_constants(
    graph: Graph,
    weights: Mapping[str, Array],
    stats: LayerStats | None,
    *,
    key: SortKey = "weight",
) -> dict[str, Array]:
    """Return {"kvant.k_order"}: i64 [H, D], ascending, equal channels in their old order.

    Args:
        graph: the graph before this pass.
        weights: parameters of the layer, and constants of earlier passes, by name.
        stats: needed for every key but "weight".
        key: as in `sort_k`.

    Raises: KvantError ("needs-stats", "needs-weights", "illegal-fold", "bad-option").
    """
    check_word("sort-k", "key", key, SORT_KEYS)
    site = need_site(graph)
    if key == "weight":
        maps = tuple(map_of(graph, op) for op in site.k.online)
        return {ORDER: order_by(mapped(site.k, maps, row_norms(graph, site.k, weights), weights))}
    seen, maps = need_stats(stats, "sort-k"), basis_of(site.k_write)
    if key == "fisher":
        return {ORDER: order_by(key_sensitivity(site, maps, seen, weights))}
    size = root_mean_square if key == "rms" else absmax
    return {ORDER: order_by(size(site.k, maps, seen, weights))}


def check_sort_k(graph: Graph, constants: Mapping[str, Array]) -> None:
    """Refuse an order that is not a permutation of the channels of every head.

    Raises: KvantError ("bad-constant").
    """
    site = need_site(graph)
    check_order(ORDER, constants, site.heads, site.k.width)
