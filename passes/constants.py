"""What the makers of constants share: sizes of channels, in the basis before the pass; and checks.

Statistics and weights are the original model's. A constant made for the second pass of a recipe
must see what the first pass did: weights are read through the weight ops of the graph, statistics
through the maps of the basis. Earlier constants are looked up in `weights` under their own names,
`kvant.<something>`.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from ..ir.arrays import Array
from ..ir.errors import KvantError
from ..ir.evaluate import evaluate
from ..ir.graph import Graph, Value
from ..ir.maps import Hadamard, Map, Scale, apply, constant_problem
from ..ir.rewrite import dead_code
from ..ir.stats import LayerStats
from ..ir.weight_edits import is_weight
from .sites import Path, Site, find_site, fold_points

Maps = tuple[Map, ...]
SortKey = Literal["weight", "rms", "range", "fisher"]
SORT_KEYS = get_args(SortKey)


def need_site(graph: Graph) -> Site:
    """Return the attention site. Raises: KvantError ("no-attention-site") if there is none."""
    site = find_site(graph)
    if site is not None:
        return site
    raise KvantError(
        "no-attention-site",
        "constants were asked for, but the graph has no attend op",
        where=f"graph @{graph.name}",
        fix="make constants only for graphs that the pass changed",
    )


def need_stats(stats: LayerStats | None, name: str) -> LayerStats:
    """Return statistics that must be there. Raises: KvantError ("needs-stats")."""
    if stats is not None:
        return stats
    raise KvantError(
        "needs-stats",
        f"{name} is calibrated, and there are no statistics",
        where=f"pass {name}",
        fix="compile a model with weights, or leave the pass out",
    )


def weight_value(graph: Graph, value: Value, weights: Mapping[str, Array]) -> Array:
    """Return what a weight value is after all weight ops on it, in float64.

    Raises: KvantError ("needs-weights") that names a parameter which is not among `weights`.
    """
    part = dead_code(Graph(graph.name, graph.ops, (value,)))
    names = part.params()
    for name in names:
        if name not in weights:
            raise KvantError(
                "needs-weights",
                f"there is no array for parameter {name}",
                where=f"graph @{graph.name}: {value}",
                fix="pass the layer's weights together with the constants of earlier passes",
            )
    only = Graph(graph.name, tuple(op for op in part.ops if op.name != "input"), (value,))
    (made,), _ = evaluate(only, {}, {name: weights[name] for name in names})
    return made


def row_norms(graph: Graph, path: Path, weights: Mapping[str, Array]) -> Array:
    """Return sqrt(|w_r|^2 + b_r^2) of the row r of each channel, times |norm weight|, [H, D].

    Maps that are online are not looked at.

    Raises: KvantError ("no-projection" if the stream comes from outside; "needs-weights").
    """
    total, gain = np.zeros(path.heads * path.width), np.ones((path.heads, path.width))
    if not any(op.name == "linear" for op in path.source):
        raise KvantError(
            "no-projection",
            f"the {path.role} stream has no projection whose rows could be measured",
            where=f"graph @{graph.name}",
            fix='use key = "rms" with a model, or leave the pass out',
        )
    for op in path.source:
        for arg in (a for a in op.args if is_weight(graph, a)):
            array = weight_value(graph, arg, weights)
            if op.name == "rms_norm":
                flat = array.size == total.size
                array = array.reshape(gain.shape) if flat else array
                gain = gain * np.abs(array + op.attr_as("offset", float))
            else:
                total += (array**2).sum(axis=1) if array.ndim == 2 else array**2
    return np.asarray(np.sqrt(total).reshape(gain.shape) * gain)


def absmax(path: Path, maps: Maps, stats: LayerStats, constants: Mapping[str, Array]) -> Array:
    """Return the largest |x| per head and channel of k or v, [H, D], after `maps`."""
    size = stats.k_absmax if path.role == "k" else stats.v_absmax
    return mapped(path, maps, size, constants)


def root_mean_square(
    path: Path, maps: Maps, stats: LayerStats, constants: Mapping[str, Array]
) -> Array:
    """Return sqrt(E[x^2]) per head and channel of k or v, [H, D], after `maps`."""
    moment = stats.k_second_moment if path.role == "k" else stats.v_second_moment
    return mapped(path, maps, np.sqrt(np.asarray(moment, np.float64)), constants)


def key_sensitivity(
    site: Site, maps: Maps, stats: LayerStats, constants: Mapping[str, Array]
) -> Array:
    """Return max k_c^2 E[q_c^2] per key channel, [H, D], after `maps`; the mean is over a group.

    Up to a factor, this is what a channel's rounding adds to the variance of the scores: its step
    grows with its range, and d<q, k>/dk_c = q_c, so E[q_c^2] is the Fisher information of the
    scores (seen with Gaussian noise of variance 1) about k_c. A scale on k is undone on q.
    """
    moment = np.asarray(stats.q_second_moment, np.float64)
    per_head = moment.reshape(site.heads, site.group, -1).mean(axis=1)
    size = np.asarray(stats.k_absmax, np.float64) ** 2 * per_head
    return mapped(site.k, tuple(m for m in maps if not isinstance(m, Scale)), size, constants)


def value_sensitivity(
    graph: Graph,
    site: Site,
    maps: Maps,
    stats: LayerStats,
    weights: Mapping[str, Array],
) -> Array:
    """Return max v_c^2 |W_o[:, c]|^2 per value channel, [H, Dv], after `maps`.

    The same for values: what leaves the layer is y = W_o o, and dy/do_c is column c of W_o; the
    squared norms are summed over the query heads of a group, each of which reads v_c.
    """
    (projection,) = fold_points(site.out, "permutation")
    squares = (weight_value(graph, projection.args[1], weights) ** 2).sum(axis=0)
    per_head = squares.reshape(site.heads, site.group, -1).sum(axis=1)
    return np.asarray(absmax(site.v, maps, stats, weights) ** 2 * per_head)


def named_array(name: str, constants: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """Return a constant of the right shape. Raises: KvantError ("bad-constant")."""
    if name not in constants:
        raise bad_constant(name, "it is missing", "make it with the pass's `constants`")
    array = np.asarray(constants[name])
    if array.shape != shape:
        raise bad_constant(name, f"its shape is {array.shape}", f"use {shape}: heads, channels")
    return array


def check_positive(name: str, constants: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """Return scales, all of them positive numbers. Raises: KvantError ("bad-constant")."""
    scales = named_array(name, constants, shape)
    if problem := constant_problem("scale", scales):
        raise bad_constant(name, problem, "use scales above 0")
    return scales


def order_by(size: Array) -> Array:
    """Return the channels of each head by ascending size, equal ones as they were, i64 [H, D]."""
    return np.argsort(size, axis=-1, kind="stable").astype(np.int64)


def check_order(name: str, constants: Mapping[str, Array], heads: int, width: int) -> None:
    """Refuse an order whose rows are not permutations. Raises: KvantError ("bad-constant")."""
    order = named_array(name, constants, (heads, width))
    if problem := constant_problem("gather", order):
        raise bad_constant(name, problem, "use integers that name every channel once per head")


def bad_constant(name: str, what: str, fix: str) -> KvantError:
    """Return the refusal of a constant."""
    return KvantError("bad-constant", f"constant {name}: {what}", where=name, fix=fix)


def mapped(path: Path, maps: Maps, size: Array, constants: Mapping[str, Array]) -> Array:
    """Return the sizes [H, D] of channels after maps.

    Raises: KvantError ("rotated-basis"): after a rotation the size of one channel is not known.
    """
    if any(isinstance(m, Hadamard) for m in maps):
        raise KvantError(
            "rotated-basis",
            f"the {path.role} stream is rotated, so the size of one channel is not known",
            where=f"the {path.role} path",
            fix="put the pass before the rotation in the recipe",
        )
    # Orders and scales act on sizes as on values; a negative scale would not, hence abs.
    return np.abs(apply(maps, np.asarray(size, np.float64)[:, None, :], constants))[:, 0, :]
