"""List what the passes did to every parameter, for weight_edits.json.

param -> views -> weight ops -> linear      becomes      (parameter, views and weight ops in order)
"""

from collections.abc import Iterator
from dataclasses import replace

from ..ir.errors import KvantError
from ..ir.graph import Graph, Op, Value
from ..ir.weight_edits import EDITS, WeightEdit, WeightOp
from .sites import WEIGHT_VIEWS, is_weight

View = tuple[bool, tuple[int, int] | None]  # transposed, and then which rows; None for all
Chain = tuple[WeightOp, ...]
WHOLE: View = (False, None)


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
