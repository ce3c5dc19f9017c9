"""Weight edits: what the passes did to parameters, as maps and not as weights.

An edit is the chain of weight ops of the graph on one parameter. It is written to
weight_edits.json and applied to a checkpoint at load time, with the meaning that OPS gives to each
op. Views at the head of a chain (`slice_rows`, `transpose_w`) say which part of the parameter is
meant; the edit is made in place there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import Array
from .errors import KvantError
from .graph import Value
from .ops import OPS, Run, complete, infer, problems
from .types import TensorType

VIEWS = ("slice_rows", "transpose_w")
EDITS = (
    "add",
    "scale_rows",
    "scale_cols",
    "gather_rows",
    "gather_cols",
    "hadamard_rows",
    "hadamard_cols",
)
_KEYS = {"op", "constant", "heads", "repeat", "inverse", "start", "stop"}


@dataclass(frozen=True, slots=True)
class WeightOp:
    """One op on a parameter.

    Attributes:
        op: a row of OPS.
        constant: name of its second operand, or None.
        heads: heads of the parameter's rows or columns.
        repeat: heads that share a row of the constant.
        inverse: divide by the constant (scales only).
        start, stop: the rows of `slice_rows`.
    """

    op: str
    constant: str | None = None
    heads: int = 1
    repeat: int = 1
    inverse: bool = False
    start: int | None = None
    stop: int | None = None

    def to_json(self, prefix: str = "") -> dict[str, Any]:
        """Return the record of weight_edits.json; `prefix` goes before the constant's name."""
        record: dict[str, Any] = {
            "op": self.op,
            "heads": self.heads,
            "constant": None if self.constant is None else prefix + self.constant,
            "repeat": self.repeat,
            "inverse": self.inverse,
        }
        rows = {"start": self.start, "stop": self.stop} if self.op == "slice_rows" else {}
        return record | rows

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "WeightOp":
        """Read what `to_json` gave. Raises: KvantError ("bad-weight-edit")."""
        unknown = sorted(set(record) - _KEYS)
        if unknown or record.get("op") not in VIEWS + EDITS:
            raise _bad(f"{dict(record)!r} is no weight op", "weight_edits.json")
        return WeightOp(**record)


@dataclass(frozen=True, slots=True)
class WeightEdit:
    """A parameter, by its name relative to the layer, and the ops on it in order."""

    parameter: str
    ops: tuple[WeightOp, ...]

    def to_json(self, prefix: str = "", layer: int | None = None) -> dict[str, Any]:
        """Return the record of weight_edits.json.

        Args:
            prefix: of the layer's parameters, such as "model.layers.0.self_attn.".
            layer: its index: constants are then named "layers.<index>.<name>".
        """
        key = "" if layer is None else f"layers.{layer}."
        return {"parameter": prefix + self.parameter, "ops": [op.to_json(key) for op in self.ops]}


def apply_weight_edits(
    edits: Sequence[WeightOp | Mapping[str, Any]], weight: Array, constants: Mapping[str, Array]
) -> Array:
    """Apply the ops of one edit to a parameter.

    Args:
        edits: in order; records of weight_edits.json or `WeightOp`.
        weight: the parameter as the checkpoint has it, any float type.
        constants: arrays by the names that the ops use.

    Returns: float64. The shape of `weight`, but [H, D] for a norm weight [D] shared by H heads.
    Raises: KvantError ("bad-weight-edit") if an op does not fit the weight or its constant.
    """
    ops = [op if isinstance(op, WeightOp) else WeightOp.from_json(op) for op in edits]
    return _apply(ops, np.array(weight, dtype=np.float64), constants)


def _apply(ops: Sequence[WeightOp], weight: Array, constants: Mapping[str, Array]) -> Array:
    if not ops:
        return weight
    op, rest = ops[0], ops[1:]
    if op.op == "transpose_w":
        return _apply(rest, weight.T, constants).T
    if op.op == "slice_rows":
        whole, rows = weight.copy(), slice(op.start, op.stop)
        whole[rows] = _apply(rest, weight[rows], constants)
        return whole
    return _apply(rest, _edit(op, weight, constants), constants)


def _edit(op: WeightOp, weight: Array, constants: Mapping[str, Array]) -> Array:
    """Apply one op as OPS means it, after the type rule has accepted it."""
    operands: tuple[Array, ...] = (weight,)
    if op.constant is not None:
        if op.constant not in constants:
            raise _bad(f"there is no constant {op.constant}", op.op)
        constant = np.asarray(constants[op.constant])
        is_integer = np.issubdtype(constant.dtype, np.integer)
        operands = (weight, constant if is_integer else constant.astype(np.float64))
    given = {"heads": op.heads, "repeat": op.repeat, "inverse": op.inverse}
    attrs = complete(op.op, {key: given[key] for key in OPS[op.op].attrs})
    values = tuple(
        Value(f"operand{i}", TensorType("f64" if x.dtype.kind == "f" else "i64", x.shape))
        for i, x in enumerate(operands)
    )
    try:
        found = problems(op.op, values, attrs)
        infer(op.op, values, attrs, {})
    except KvantError as error:
        found = [error.what]
    if found:
        raise _bad("; ".join(found), f"{op.op} on a weight of shape {weight.shape}")
    made = OPS[op.op].evaluate(Run({}, {}, {}), operands, dict(attrs))
    return np.asarray(made[0] if isinstance(made, tuple) else made)


def _bad(what: str, where: str) -> KvantError:
    return KvantError(
        "bad-weight-edit", what, where=where, fix="use the artifact with the model it was made for"
    )
