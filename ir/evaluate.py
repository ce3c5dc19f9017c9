"""The reference interpreter: the rows of OPS, one after another."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Array
from .errors import KvantError, nearest
from .graph import Graph
from .ops import OPS, Run, match
from .types import TensorType

State = dict[str, Array]
Types = dict[str, TensorType]


def evaluate(
    graph: Graph,
    inputs: Mapping[str, Array],
    params: Mapping[str, Array],
    state: Mapping[str, Array] | None = None,
    dtype: npt.DTypeLike = np.float64,
) -> tuple[tuple[Array, ...], State]:
    """Run a well-formed graph on T new tokens.

    Args:
        graph: the graph.
        inputs: arrays by input name.
        params: arrays by parameter name.
        state: of each role, the S tokens appended so far, in the stored basis and full precision,
            [B, H, S, D]; None for an empty cache. It is not changed.
        dtype: in which floats are computed.

    Returns: the outputs, and the state with the new tokens.
    Raises: KvantError ("missing-array", "wrong-array") if an array does not fit.
    """
    sizes: dict[str, Any] = {}
    arrays_in = _arrays(graph.inputs(), inputs, dtype, sizes)
    weights = _arrays(graph.params(), params, dtype, sizes)
    stored = {role: np.asarray(x, dtype) for role, x in (state or {}).items()}
    run = Run(arrays_in, weights, stored)
    now: dict[str, Array] = {}
    for op in graph.ops:
        arrays = tuple(now[a.name] for a in op.args)
        made = OPS[op.name].evaluate(run, arrays, dict(op.attrs))
        results = made if isinstance(made, tuple) else (made,)
        now.update((r.name, x) for r, x in zip(op.results, results, strict=True))
    return tuple(now[o.name] for o in graph.outputs), run.state


def _arrays(
    types: Types, given: Mapping[str, Array], dtype: npt.DTypeLike, sizes: dict[str, Any]
) -> dict[str, Array]:
    """Return the arrays that the graph declares, checked; symbolic sizes are bound in `sizes`."""
    found = {}
    for name, declared in types.items():
        where, fix = f"the array {name}", f"pass an array of type {declared}"
        if name not in given:
            what = f"no array is given for {name}; {nearest(name, given)}"
            raise KvantError("missing-array", what, where=where, fix=fix)
        x, integer = np.asarray(given[name]), declared.dtype[0] in "iu"
        axes = [str(dim) for dim in declared.shape]
        why = match([axes], (TensorType(declared.dtype, x.shape),), sizes)
        if integer != np.issubdtype(x.dtype, np.integer):
            why = f"it holds {x.dtype}"
        if why:
            raise KvantError("wrong-array", f"{name} does not fit: {why}", where=where, fix=fix)
        found[name] = x if integer else x.astype(dtype)
    return found
