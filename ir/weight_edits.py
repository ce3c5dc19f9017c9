"""Weight edits: what the passes did to parameters, as maps and not as weights.

An edit is the chain of weight ops of the graph on one parameter. It is written to weight_edits.json
and applied to a checkpoint at load time, with the meaning that OPS gives to each op:

param -> views -> weight ops -> linear      becomes      (parameter, weight ops in order)

An op may mean a part of the parameter only (the q rows of a fused weight) or its transpose: its
view. The edit is made in place there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .arrays import Array
from .errors import KvantError
from .graph import Graph, Op, Value
from .ops import OPS, Run, complete, infer, problems
from .types import TensorType

EDITS = (
    "add",
    "scale_rows",
    "scale_cols",
    "gather_rows",
    "gather_cols",
    "hadamard_rows",
    "hadamard_cols",
)
WEIGHT_VIEWS = ("slice_rows", "transpose_w")
View = tuple[bool, tuple[int, int] | None]  # transposed, and then which rows; None for all
WHOLE: View = (False, None)


@dataclass(frozen=True, slots=True)
class WeightOp:
    """One op on a parameter.

    Attributes:
        op: a row of OPS.
        constant: name of its second operand, or None.
        heads: heads of the parameter's rows or columns.
        repeat: heads that share a row of the constant.
        inverse: divide by the constant (scales only).
        transposed: the op sees the transpose of the parameter.
        rows: (start, stop) of the rows that the op sees, after transposing; None for all.
    """

    op: str
    constant: str | None = None
    heads: int = 1
    repeat: int = 1
    inverse: bool = False
    transposed: bool = False
    rows: tuple[int, int] | None = None

    def to_json(self, prefix: str = "") -> dict[str, Any]:
        """Return the record of weight_edits.json; `prefix` goes before the constant's name."""
        record: dict[str, Any] = {
            "op": self.op,
            "heads": self.heads,
            "constant": None if self.constant is None else prefix + self.constant,
            "repeat": self.repeat,
            "inverse": self.inverse,
        }
        if self.transposed:
            record["transposed"] = True
        if self.rows is not None:
            record["rows"] = list(self.rows)
        return record

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "WeightOp":
        """Read what `to_json` gave. Raises: KvantError ("bad-weight-edit")."""
        unknown = sorted(set(record) - {f.name for f in fields(WeightOp)})
        if unknown or record.get("op") not in EDITS:
            raise _bad(f"{dict(record)!r} is no weight op", "weight_edits.json")
        rows = record.get("rows")
        return WeightOp(**{**record, "rows": None if rows is None else tuple(rows)})


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


Chain = tuple[WeightOp, ...]


def is_weight(graph: Graph, value: Value) -> bool:
    """Return whether a value is a parameter, seen through weight ops."""
    op = graph.producer(value)
    if op.name == "add":
        return all(is_weight(graph, arg) for arg in op.args)
    if op.name in WEIGHT_VIEWS + EDITS:
        return is_weight(graph, op.args[0])
    return op.name == "param"


def weight_edits(graph: Graph) -> list[WeightEdit]:
    """Return the edits of a layer graph: one for each parameter that a pass touched, in order.

    Raises: KvantError ("shared-weight") if two uses of the same rows want different edits,
        ("unsupported-view") if a pass edited a part that is sliced before it is transposed.
    """
    edits: list[WeightEdit] = []
    for op in graph.find("param"):
        name = op.attr_as("name", str)
        uses = dict.fromkeys(_uses(graph, op.result, WHOLE))
        _check_disjoint(name, list(uses))
        ops = tuple(op for _, chain in uses for op in chain)
        edits += [WeightEdit(name, ops)] if ops else []
    return edits


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
    made = np.array(weight, dtype=np.float64)
    for given in edits:
        op = given if isinstance(given, WeightOp) else WeightOp.from_json(given)
        made = _apply(op, made, constants)
    return made


def _uses(graph: Graph, value: Value, view: View) -> Iterator[tuple[View, Chain]]:
    """Give the part that each use of a weight sees, and the edits made to it."""
    for user in graph.users(value):
        is_first = user.args[0] == value and is_weight(graph, user.result)
        if user.name in WEIGHT_VIEWS and is_first:
            yield from _uses(graph, user.result, _narrowed(view, user))
        elif user.name in EDITS and is_first:
            op = _weight_op(graph, user, view)
            for _, rest in _uses(graph, user.result, view):
                yield view, (op, *rest)
        else:
            yield view, ()


def _narrowed(view: View, op: Op) -> View:
    """Return the view of a view."""
    transposed, rows = view
    if op.name == "slice_rows":
        first = rows[0] if rows else 0
        return transposed, (first + op.attr_as("start", int), first + op.attr_as("stop", int))
    if rows is None:
        return not transposed, None
    raise KvantError(
        "unsupported-view",
        "a weight is sliced and then transposed",
        where=f"{op.name} {op.result}",
        fix="transpose first in the importer",
    )


def _weight_op(graph: Graph, op: Op, view: View) -> WeightOp:
    constant = None
    if len(op.args) == 2:
        constant = graph.producer(op.args[1]).attr_as("name", str)
    made = WeightOp(op.name, constant, **dict(op.attrs))  # type: ignore[arg-type]
    return replace(made, transposed=view[0], rows=view[1])


def _check_disjoint(name: str, uses: list[tuple[View, Chain]]) -> None:
    """Refuse two uses that overlap, where one is edited: the checkpoint holds the rows once."""
    for i, (one, chain) in enumerate(uses):
        for other, edits in uses[i + 1 :]:
            if (chain or edits) and _overlap(one, other):
                raise KvantError(
                    "shared-weight",
                    f"parameter {name} is used twice, and a pass edits only one of the uses",
                    where=f"parameter {name}",
                    fix="leave that pass out for this model",
                )


def _overlap(one: View, other: View) -> bool:
    (flipped, a), (flipped_too, b) = one, other
    if flipped != flipped_too or a is None or b is None:
        return True
    return a[0] < b[1] and b[0] < a[1]


def _apply(op: WeightOp, weight: Array, constants: Mapping[str, Array]) -> Array:
    """Apply one op to the part of the weight that it sees."""
    if op.transposed:
        return _apply(replace(op, transposed=False), weight.T, constants).T
    if op.rows is None:
        return _edit(op, weight, constants)
    start, stop = op.rows
    if not 0 <= start < stop <= weight.shape[0]:
        raise _bad(f"no rows {start} to {stop} in a weight of shape {weight.shape}", op.op)
    edited = _edit(op, weight[start:stop], constants)
    return np.concatenate((weight[:start], edited, weight[stop:]))


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
