"""Constants and weight edits of an artifact: read, and checked for what they must be.

A permutation that repeats a channel or a scale of zero would not crash anything: it would only
make every answer wrong. So it is looked for here, once, at load.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import KvantError
from ..ir.maps import Gather, Map, Scale, constant_problem
from ..ir.plan import AttentionPlan, StreamPlan
from ..ir.weight_edits import EDITS, WeightOp
from .manifest import CONSTANTS, WEIGHT_EDITS
from .strict_json import Json, parse

Array: TypeAlias = NDArray[Any]

_KEY = re.compile(r"layers\.(\d{1,6})\.(.+)")
_DTYPES = ("float32", "float64", "int64")
_FIX = "compile the artifact again; if the constants are your own, correct them"


def read_constants(raw: bytes, layers: int, where: str) -> dict[str, Array]:
    """Return the arrays of constants.safetensors by key, read-only.

    Raises: KvantError "constants-unreadable" or "constants-wrong".
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    place = f"{where}/{CONSTANTS}"
    try:
        arrays: dict[str, Array] = load(raw)
    except (SafetensorError, KeyError, ValueError) as error:
        raise KvantError(
            "constants-unreadable", f"not a safetensors file: {error}", where=place, fix=_FIX
        ) from None
    for key, array in arrays.items():
        match = _KEY.fullmatch(key)
        if match is None or int(match[1]) >= layers:
            _wrong(key, f"is no constant of one of the {layers} layers", place)
        if array.dtype.name not in _DTYPES:
            _wrong(key, f"has dtype {array.dtype}; known are {', '.join(_DTYPES)}", place)
        if not np.isfinite(array).all():
            _wrong(key, "holds NaN or infinity", place)
        array.flags.writeable = False
    return arrays


def by_layer(arrays: Mapping[str, Array], layers: int) -> tuple[dict[str, Array], ...]:
    """Return the constants of each layer under their short names."""
    split: tuple[dict[str, Array], ...] = tuple({} for _ in range(layers))
    for key, array in arrays.items():
        match = _KEY.fullmatch(key)
        if match is not None:
            split[int(match[1])][match[2]] = array
    return split


def check_maps(plan: AttentionPlan, constants: Mapping[str, Array], layer: int, where: str) -> None:
    """Refuse a layer whose maps or sinks name a constant that is missing or is not what they need.

    Raises: KvantError "constants-wrong".
    """
    if plan.sinks is not None:
        array, key = constants.get(plan.sinks), f"layers.{layer}.{plan.sinks}"
        if _present(array, key, (plan.q_heads,), f"{where}/{CONSTANTS}").dtype.kind != "f":
            _wrong(key, "holds a sink that is not a float", f"{where}/{CONSTANTS}")
    uses: list[tuple[Map, StreamPlan]] = [(m, plan.k) for m in plan.k.maps + plan.q_maps]
    uses += [(m, plan.v) for m in plan.v.maps + plan.out_maps]
    for m, stream in uses:
        shape = (stream.heads, stream.channels)
        match m:
            case Gather(order=name):
                check_order(constants.get(name), f"layers.{layer}.{name}", shape, where)
            case Scale(values=name):
                check_scale(constants.get(name), f"layers.{layer}.{name}", shape, where)


def check_order(array: Array | None, key: str, shape: tuple[int, ...] | None, where: str) -> None:
    """Refuse anything but int64[H, D] whose rows are permutations of 0..D-1."""
    place = f"{where}/{CONSTANTS}"
    array = _present(array, key, shape, place)
    if array.dtype != np.int64 or constant_problem("gather", array):
        _wrong(key, f"is not a permutation of 0..{array.shape[-1] - 1} in every row", place)


def check_scale(array: Array | None, key: str, shape: tuple[int, ...] | None, where: str) -> None:
    """Refuse anything but floats [H, D], all above zero."""
    place = f"{where}/{CONSTANTS}"
    array = _present(array, key, shape, place)
    if array.dtype.kind != "f" or constant_problem("scale", array):
        _wrong(key, "holds a scale that is not above zero", place)


def check_shift(array: Array | None, key: str, where: str) -> None:
    """Refuse anything but floats [H, D]; they may have any sign."""
    place = f"{where}/{CONSTANTS}"
    array = _present(array, key, None, place)
    if array.dtype.kind != "f":
        _wrong(key, "holds a shift that is not a float", place)


def read_weight_edits(
    raw: bytes, constants: Mapping[str, Array], where: str
) -> tuple[dict[str, Json], ...]:
    """Return the weight edits after every operation and constant of them was checked.

    Raises: KvantError "json-...", "weight-edits-wrong" or "constants-wrong".
    """
    place = f"{where}/{WEIGHT_EDITS}"
    edits = parse(raw, place)
    if not isinstance(edits, list):
        _wrong_edit("the file holds no list", place)
    seen: set[str] = set()
    checked = []
    for edit in edits:
        parameter = edit.get("parameter") if isinstance(edit, dict) else None
        ops = edit.get("ops") if isinstance(edit, dict) else None
        if not (isinstance(edit, dict) and isinstance(parameter, str) and isinstance(ops, list)):
            _wrong_edit("an edit has no parameter or no list of ops", place)
        if parameter in seen:
            _wrong_edit(f"{parameter!a} is edited twice", place)
        seen.add(parameter)
        for op in ops:
            _check_edit(parameter, op, constants, where)
        checked.append(edit)
    return tuple(checked)


def _check_edit(parameter: str, op: Json, constants: Mapping[str, Array], where: str) -> None:
    place = f"{where}/{WEIGHT_EDITS}"
    if not isinstance(op, dict) or op.get("op") not in EDITS:
        _wrong_edit(f"{parameter!a} has an unknown operation", place)
    name, key = str(op["op"]), op.get("constant")
    if not _are_options(op):
        _wrong_edit(f"{name} of {parameter!a} has options that make no sense", place)
    if name.startswith("hadamard"):
        if key is not None:
            _wrong_edit(f"{name} of {parameter!a} takes no constant", place)
        return
    if not isinstance(key, str):
        _wrong_edit(f"{name} of {parameter!a} names no constant", place)
    if name.startswith("gather"):
        check_order(constants.get(key), key, None, where)
    elif name.startswith("scale"):
        check_scale(constants.get(key), key, None, where)
    else:
        check_shift(constants.get(key), key, where)


def _are_options(op: Mapping[str, Json]) -> bool:
    """Return whether all fields of a `WeightOp` but `op` and `constant` are what they must be."""
    counts = (op.get("heads", 1), op.get("repeat", 1))
    flags = (op.get("inverse", False), op.get("transposed", False))
    rows = op.get("rows")
    if not (isinstance(rows, list) and len(rows) == 2):
        rows = [0, 1 if rows is None else -1]
    return (
        op.keys() <= {field.name for field in fields(WeightOp)}
        and all(type(count) is int and count >= 1 for count in counts)
        and all(isinstance(flag, bool) for flag in flags)
        and all(type(row) is int for row in rows)
        and 0 <= rows[0] < rows[1]  # type: ignore[operator]
    )


def _present(array: Array | None, key: str, shape: tuple[int, ...] | None, place: str) -> Array:
    if array is None:
        _wrong(key, "is missing", place)
    if array.shape != shape if shape is not None else array.ndim != 2:
        wanted = "[heads, channels]" if shape is None else list(shape)
        _wrong(key, f"has shape {list(array.shape)}, expected {wanted}", place)
    return array


def _wrong(key: str, problem: str, place: str) -> NoReturn:
    raise KvantError("constants-wrong", f"{key!a} {problem}", where=place, fix=_FIX)


def _wrong_edit(problem: str, place: str) -> NoReturn:
    raise KvantError("weight-edits-wrong", problem, where=place, fix=_FIX)
