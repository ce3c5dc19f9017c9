"""PASSES: the table of rewrites, one line a pass, with what it promises."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..ir.arrays import Array
from ..ir.graph import Graph
from ..ir.rewrite import dead_code
from .hadamard_qk import hadamard_qk
from .hadamard_v import hadamard_v
from .smooth_k import check_smooth_k, smooth_k, smooth_k_constants
from .sort_k import check_sort_k, sort_k, sort_k_constants
from .sort_v import check_sort_v, sort_v, sort_v_constants
from .store import store, store_error_bound
from .thresholds import (
    check_threshold_k,
    check_threshold_v,
    threshold_k,
    threshold_k_constants,
    threshold_v,
    threshold_v_constants,
)


def _never(options: Mapping[str, Any]) -> bool:
    return False


def _always(options: Mapping[str, Any]) -> bool:
    return True


def _by_stats(options: Mapping[str, Any]) -> bool:
    return bool(options.get("key", "weight") != "weight")


@dataclass(frozen=True, slots=True)
class PassDef:
    """One pass and its promise; tests/passes/test_contracts.py holds it to it.

    Attributes:
        run: run(graph, **options) -> graph; the same object if nothing changed.
        exact: the graph's meaning is unchanged, up to float rounding.
        constants: constants(graph_before, weights, stats, **options) -> arrays by name, of one
            layer; `weights` holds its parameters and the constants of earlier passes.
        check_constants: check(graph, constants) refuses constants that would not be exact.
        needs_stats: whether the constants need calibration under these options.
        bound: for a lossy pass: how far its result may be off.
        unproven: why a promise is not tested; the number of these may only fall.
    """

    run: Callable[..., Graph]
    exact: bool = False
    constants: Callable[..., dict[str, Array]] | None = None
    check_constants: Callable[[Graph, Mapping[str, Array]], None] | None = None
    needs_stats: Callable[[Mapping[str, Any]], bool] = _never
    bound: Callable[..., Array] | None = None
    unproven: str | None = None


PASSES: dict[str, PassDef] = {
    "hadamard-v": PassDef(hadamard_v, exact=True),
    "hadamard-qk": PassDef(hadamard_qk, exact=True),
    "smooth-k": PassDef(smooth_k, True, smooth_k_constants, check_smooth_k, _always),
    "sort-k": PassDef(sort_k, True, sort_k_constants, check_sort_k, _by_stats),
    "sort-v": PassDef(sort_v, True, sort_v_constants, check_sort_v, _by_stats),
    "threshold-k": PassDef(threshold_k, True, threshold_k_constants, check_threshold_k, _always),
    "threshold-v": PassDef(threshold_v, True, threshold_v_constants, check_threshold_v, _always),
    "store": PassDef(store, bound=store_error_bound),
    "dead-code": PassDef(dead_code, exact=True),
}
