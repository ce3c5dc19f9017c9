"""Divide the channels of k by a static scale and multiply those of q by it.

    scores(q, cache(k))   ->   scores(q lambda, cache(k / lambda))

    sum_c (q_c lambda_c) (k_c / lambda_c) = sum_c q_c k_c      for every lambda without zeros

lambda is `kvant.k_smooth` [H, D], one row per key/value head, shared by its query heads:

    lambda_c = max(a_c, a_c')^alpha,   a_c = max_t |k_tc|,   c' = the other channel of the RoPE pair

(c itself where RoPE passes a channel through), and 1 where the maximum is 0.

A scale that is equal within a pair commutes with RoPE, so both sides fold into weights: rows and
biases of q_proj and k_proj, or the weights of a QK-norm, which would normalise an earlier scale
away. A shared norm weight [D] becomes [H, D]. A norm that multiplies by (w + offset) needs
w' = (w + offset) s - offset = (w + shift) s, with `kvant.q_norm_shift` and `kvant.k_norm_shift`
= offset (1 - 1 / s). Where a side cannot fold (a graph without projections), both scale online,
after RoPE.
Source: QServe (Lin et al., 2024), SmoothAttention. Differs from it in: biases are scaled too
(their code forgets them); a = max over calibration tokens; no search for alpha.
"""

from collections.abc import Mapping

import numpy as np

from ..ir.arrays import Array
from ..ir.errors import KvantError
from ..ir.graph import Graph, Op, Value
from ..ir.maps import Scale
from ..ir.rewrite import Builder, rewrite
from ..ir.stats import LayerStats
from ..ir.types import TensorType
from .constants import absmax, bad_constant, check_positive, need_site, need_stats
from .sites import (
    Kind,
    Path,
    Site,
    basis_of,
    check_once,
    emit_write,
    find_site,
    fold_into,
    fold_points,
    fold_refusal,
    folded_of,
    partners,
    scale_keys_online,
    with_folded,
)

SMOOTH = "kvant.k_smooth"


def smooth_k(graph: Graph, *, alpha: float = 0.5) -> Graph:
    """Divide k by a pair-tied scale per channel and multiply q by it, folded into weights.

    Args:
        graph: of a layer.
        alpha: exponent of the largest |k|, in [0, 1]; 0 changes nothing, 1 makes all alike.

    Returns: the new graph; `graph` itself if it has no attention.
    Raises: KvantError ("already-applied", "bad-option", "illegal-fold").
    """
    _check_alpha(alpha)
    site = find_site(graph)
    if site is None:
        return graph
    new = Scale(SMOOTH, inverse=True)
    check_once(graph, site.k_write, new)
    of_q, of_k = _points(site)
    if not of_k:
        return scale_keys_online(graph, site, new)

    def rule(b: Builder, op: Op, args: tuple[Value, ...]) -> Value | None:
        if op in of_q or op in of_k:
            path = site.q if op in of_q else site.k
            return fold_into(graph, b, op, args, lambda b, w, op: _fold(b, w, op, path, site))
        if op == site.k_write:
            return emit_write(b, op, args[0], with_folded(op, site.k, new))
        return None

    return rewrite(graph, rule)


def smooth_k_constants(
    graph: Graph, weights: Mapping[str, Array], stats: LayerStats | None, *, alpha: float = 0.5
) -> dict[str, Array]:
    """Return {"kvant.k_smooth": f64 [H, D]}, and the shifts of norms with an offset.

    Args:
        graph: the graph before this pass.
        weights: constants of earlier passes by name; the weights themselves are not needed.
        stats: of the layer.
        alpha: as in `smooth_k`.

    Raises: KvantError ("needs-stats", "rotated-basis", "bad-option").
    """
    _check_alpha(alpha)
    site = need_site(graph)
    of_q, of_k = _points(site)
    maps = folded_of(site.k_write, site.k) if of_k else basis_of(site.k_write)
    size = absmax(site.k, maps, need_stats(stats, "smooth-k"), weights)
    rope = site.k.rope
    if rope is not None:
        size = np.maximum(size, size[:, partners(rope)])
    smooth = np.where(size > 0.0, size, 1.0) ** alpha
    made = {SMOOTH: smooth}
    factors = (np.repeat(smooth, site.group, axis=0), 1.0 / smooth)
    for path, points, factor in zip((site.q, site.k), (of_q, of_k), factors, strict=True):
        for op in points:
            if _offset(op):
                made[_shift_name(path)] = _offset(op) * (1.0 - 1.0 / factor)
    return made


def check_smooth_k(graph: Graph, constants: Mapping[str, Array]) -> None:
    """Refuse scales that are not positive, or that differ within a RoPE pair.

    Args:
        graph: the graph before this pass, or after it.
        constants: by name.

    Raises: KvantError ("bad-constant") with the reason.
    """
    site = need_site(graph)
    smooth = check_positive(SMOOTH, constants, (site.heads, site.k.width))
    if site.k.rope is None:
        return
    other = smooth[:, partners(site.k.rope)]
    if not np.array_equal(smooth, other):
        head, channel = (int(i) for i in np.argwhere(smooth != other)[0])
        what = (
            f"head {head} scales channel {channel} by {smooth[head, channel]:.6g} and the other "
            f"channel of its RoPE pair by {other[head, channel]:.6g}; "
            "a scale that differs inside a RoPE pair does not commute with RoPE"
        )
        raise bad_constant(SMOOTH, what, "use the larger of the two for both")


def _points(site: Site) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """Return the fold points of q and of k; none at all if one side must stay online."""
    paths = (site.q, site.k)
    if any(fold_refusal(path, _kind(path)) for path in paths):
        return (), ()
    of_q, of_k = (fold_points(path, _kind(path)) for path in paths)
    return of_q, of_k


def _fold(b: Builder, weight: Value, op: Op, path: Path, site: Site) -> Value:
    """Emit the scaled weight, bias or norm weight of a fold point."""
    s = b.param(SMOOTH, TensorType("f64", (site.heads, site.k.width)))
    if _offset(op):
        weight = _shifted(b, weight, op, path)
    is_key = path.role == "k"
    heads, repeat = path.heads, path.repeat
    return b.emit("scale_rows", weight, s, heads=heads, repeat=repeat, inverse=is_key)


def _shifted(b: Builder, weight: Value, op: Op, path: Path) -> Value:
    """Emit the weight of a norm with an offset, moved so that scaling it scales the sum."""
    if weight.tensor.shape == (path.heads * path.width,) and path.heads > 1:
        raise KvantError(
            "illegal-fold",
            "a norm over all heads together with an offset is not built",
            where=f"{op.name} {op.result}",
            fix="leave smooth-k out for this model",
        )
    shift = b.param(_shift_name(path), TensorType("f64", (path.heads, path.width)))
    return b.emit("add", weight, shift)


def _kind(path: Path) -> Kind:
    return "scale" if path.rope is None else "pair-scale"


def _offset(op: Op) -> float:
    return op.attr_as("offset", float) if op.name == "rms_norm" else 0.0


def _shift_name(path: Path) -> str:
    return f"kvant.{path.role}_norm_shift"


def _check_alpha(alpha: object) -> None:
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not 0.0 <= alpha <= 1.0:  # type: ignore[operator]
        raise KvantError(
            "bad-option",
            f"alpha is {alpha!r}",
            where="pass smooth-k",
            fix="use a number from 0 to 1; the paper uses 0.5",
        )
