"""Divide each channel of k, or of v, by its threshold: an outlier is then what is above 1.

    scores(q, cache(k))     ->   scores(q t, cache(k / t))
    cache(v), y = W_o o     ->   cache(v / t), y = W_o' o'

    sum_c (q_c t_c) (k_c / t_c) = sum_c q_c k_c,   W_o'[h, c] = W_o[h, c] t_c,   o'_c = o_c / t_c

t is `kvant.k_threshold` [H, D] or `kvant.v_threshold` [H, Dv], one row per key/value head, shared
by its query heads; for N calibration tokens

    t_c = the (n + 1)-th largest |x_c|,   n = floor(share N)

so at most n of them are beyond it; 1 where that is 0, or too small for a normal float32.

Thresholds of keys are always online, after RoPE, also in a layer without RoPE: they differ within
a rotary pair. Those of values fold into the rows and bias of v_proj and the columns of o_proj; the
side that does not touch a projection (a norm on v, a gate on the output, a graph without weights)
stays online. Statistics are seen through the maps of earlier passes. A later map changes what is
compared with 1: `smooth-k` and rotations come before, or not at all; an order may come after.
Source: KVQuant (Hooper et al., 2024), outliers by thresholds that are calibrated for each channel.
Differs from it in: keys after RoPE; one threshold of |x|, not an upper and a lower one; values have
static thresholds too, where the paper looks at each token.
"""

from collections.abc import Mapping
from math import floor

import numpy as np

from ..ir.arrays import Array
from ..ir.errors import KvantError
from ..ir.graph import Graph, Op
from ..ir.maps import Map, Scale
from ..ir.stats import LayerStats
from .constants import check_positive, mapped, need_site, need_stats
from .sites import (
    Path,
    basis_of,
    check_once,
    find_site,
    fold_points,
    fold_refusal,
    folded_of,
    scale_keys_online,
)
from .values import map_values

K_THRESHOLD = "kvant.k_threshold"
V_THRESHOLD = "kvant.v_threshold"
MOST = 0.05  # more than that are no outliers


def threshold_k(graph: Graph, *, share: float = 0.01) -> Graph:
    """Divide each channel of k by a calibrated threshold and multiply q by it, online.

    Args:
        graph: of a layer.
        share: of a channel's calibration values, how many are beyond its threshold; (0, 0.05].

    Returns: the new graph; `graph` itself if it has no attention.
    Raises: KvantError ("already-applied", "bad-option").
    """
    _check_share("threshold-k", share)
    site = find_site(graph)
    if site is None:
        return graph
    new = Scale(K_THRESHOLD, inverse=True)
    check_once(graph, site.k_write, new)
    return scale_keys_online(graph, site, new)


def threshold_v(graph: Graph, *, share: float = 0.01) -> Graph:
    """Divide each channel of v by a calibrated threshold and undo it, folded where it can be.

    Args:
        graph: of a layer.
        share: as in `threshold_k`.

    Returns: the new graph; `graph` itself if it has no attention.
    Raises: KvantError ("already-applied", "bad-option").
    """
    _check_share("threshold-v", share)
    site = find_site(graph)
    if site is None:
        return graph
    new = Scale(V_THRESHOLD, inverse=True)
    return map_values(graph, site, new, _points(site.v), _points(site.out))


def threshold_k_constants(
    graph: Graph, weights: Mapping[str, Array], stats: LayerStats | None, *, share: float = 0.01
) -> dict[str, Array]:
    """Return {"kvant.k_threshold": f64 [H, D]}.

    Args:
        graph: the graph before this pass.
        weights: constants of earlier passes by name; the weights themselves are not needed.
        stats: of the layer.
        share: as in `threshold_k`.

    Raises: KvantError ("needs-stats", "rotated-basis", "bad-option").
    """
    site = need_site(graph)
    return {K_THRESHOLD: _thresholds(site.k, basis_of(site.k_write), stats, weights, share)}


def threshold_v_constants(
    graph: Graph, weights: Mapping[str, Array], stats: LayerStats | None, *, share: float = 0.01
) -> dict[str, Array]:
    """Return {"kvant.v_threshold": f64 [H, Dv]}. Arguments as in `threshold_k_constants`."""
    site = need_site(graph)
    maps = folded_of(site.v_write, site.v) if _points(site.v) else basis_of(site.v_write)
    return {V_THRESHOLD: _thresholds(site.v, maps, stats, weights, share)}


def check_threshold_k(graph: Graph, constants: Mapping[str, Array]) -> None:
    """Refuse thresholds that are not positive numbers. Raises: KvantError ("bad-constant")."""
    site = need_site(graph)
    check_positive(K_THRESHOLD, constants, (site.heads, site.k.width))


def check_threshold_v(graph: Graph, constants: Mapping[str, Array]) -> None:
    """Refuse thresholds that are not positive numbers. Raises: KvantError ("bad-constant")."""
    site = need_site(graph)
    check_positive(V_THRESHOLD, constants, (site.heads, site.v.width))


def _thresholds(
    path: Path,
    maps: tuple[Map, ...],
    stats: LayerStats | None,
    constants: Mapping[str, Array],
    share: float,
) -> Array:
    """Return the threshold of each channel after `maps`, [H, D]: orders and scales keep ranks."""
    name = f"threshold-{path.role}"
    _check_share(name, share)
    seen = need_stats(stats, name)
    largest = seen.k_largest if path.role == "k" else seen.v_largest
    if largest is None:
        raise KvantError(
            "needs-stats",
            f"{name} needs the largest values of each channel, which these statistics leave out",
            where=f"pass {name}",
            fix="record them: LayerStats.k_largest and v_largest",
        )
    beyond = floor(share * seen.tokens)
    if beyond >= len(largest):
        raise KvantError(
            "bad-option",
            f"share is {share}: {beyond} of {seen.tokens} values of a channel, and the "
            f"statistics hold its {len(largest)} largest",
            where=f"pass {name}",
            fix=f"use at most {(len(largest) - 1) / seen.tokens:.4g}",
        )
    size = mapped(path, maps, largest[beyond], constants)
    return np.where(size < np.finfo(np.float32).tiny, 1.0, size)


def _points(path: Path) -> tuple[Op, ...]:
    """Return the projection, with its bias, that takes the scale; none if it stays online."""
    points = () if fold_refusal(path, "scale") else fold_points(path, "scale")
    # A norm's weight could take it too, but attach cannot give every norm a row for each head.
    return () if any(op.name == "rms_norm" for op in points) else points


def _check_share(name: str, share: object) -> None:
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if not is_number or not 0.0 < share <= MOST:  # type: ignore[operator]
        raise KvantError(
            "bad-option",
            f"share is {share!r}",
            where=f"pass {name}",
            fix=f"use a number above 0, up to {MOST}; the paper uses 0.01",
        )
