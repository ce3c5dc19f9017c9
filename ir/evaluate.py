"""The reference interpreter: the rows of OPS, one after another."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .arrays import Array
from .errors import KvantError
from .graph import Graph
from .ops import OPS, Run
from .types import Dim, TensorType

State = dict[str, Array]


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
    Raises: KvantError ("missing-array", "wrong-shape", "wrong-dtype") if an array does not fit.
    """
    sizes: dict[str, int] = {}
    given = {
        "input": _arrays(graph.inputs(), inputs, dtype, "input", sizes),
        "param": _arrays(graph.params(), params, dtype, "param", sizes),
    }
    stored = {role: np.asarray(x, dtype) for role, x in (state or {}).items()}
    run = Run(given["input"], given["param"], stored)
    now: dict[str, Array] = {}
    for op in graph.ops:
        arrays = tuple(now[a.name] for a in op.args)
        made = OPS[op.name].evaluate(run, arrays, dict(op.attrs))
        results = made if isinstance(made, tuple) else (made,)
        now.update((r.name, x) for r, x in zip(op.results, results, strict=True))
    return tuple(now[o.name] for o in graph.outputs), run.state


def _arrays(
    types: dict[str, TensorType],
    given: Mapping[str, Array],
    dtype: npt.DTypeLike,
    kind: str,
    sizes: dict[str, int],
) -> dict[str, Array]:
    """Return the arrays that the graph declares, checked; symbolic sizes are bound in `sizes`."""
    found = {}
    for name, declared in types.items():
        where = f"{kind} {name}"
        if name not in given:
            fix = f"pass an array of type {declared}; given: {' '.join(sorted(given)) or '(none)'}"
            raise KvantError("missing-array", f"no array for {name}", where=where, fix=fix)
        x = np.asarray(given[name])
        fits = len(x.shape) == len(declared.shape)
        if not fits or not all(map(lambda d, n: _bind(d, n, sizes), declared.shape, x.shape)):
            bound = ", ".join(f"{key} = {n}" for key, n in sizes.items()) or "no size known yet"
            what = f"{name} has the shape {list(x.shape)}, not {declared}"
            raise KvantError("wrong-shape", what, where=where, fix=f"pass {declared}, {bound}")
        integer = declared.dtype[0] in "iu"
        if integer != np.issubdtype(x.dtype, np.integer):
            what = f"{name} holds {x.dtype}, not {declared.dtype}"
            raise KvantError("wrong-dtype", what, where=where, fix=f"pass {declared}")
        found[name] = x if integer else x.astype(dtype)
    return found


def _bind(dim: Dim, size: int, sizes: dict[str, int]) -> bool:
    """Say whether `size` is what `dim` stands for; a name seen first is bound to it."""
    if isinstance(dim, int):
        return dim == size
    if "+" in dim and dim not in sizes:
        terms = [int(d) if d.isdigit() else sizes.get(d) for d in dim.split("+")]
        return None in terms or sum(t for t in terms if t is not None) == size
    return sizes.setdefault(dim, size) == size
