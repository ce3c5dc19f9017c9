"""List what the passes did to every parameter, for weight_edits.json.

param -> views -> weight ops -> linear      becomes      (parameter, views and weight ops in order)
"""

from collections.abc import Iterator

from ..ir.errors import KvantError
from ..ir.graph import Graph, Op, Value
from ..ir.types import Dim
from ..ir.weight_edits import EDITS, VIEWS, WeightEdit, WeightOp
from .sites import is_weight

Chain = tuple[WeightOp, ...]
Region = tuple[tuple[int, int], ...]


def weight_edits(graph: Graph) -> list[WeightEdit]:
    """Return the edits of a layer graph, in the order of its parameters.

    A parameter that no pass touched has none; one that is used in slices (fused q, k, v) has one
    for each slice touched.

    Raises: KvantError ("shared-weight") if two uses of the same rows want different edits.
    """
    edits: list[WeightEdit] = []
    for op in graph.find("param"):
        name = op.attr_as("name", str)
        if name.startswith("kvant."):
            continue
        chains = list(dict.fromkeys(_chains(graph, op.result)))
        _check_disjoint(name, op.result, chains)
        edits += [WeightEdit(name, chain) for chain in chains if _is_edit(chain)]
    return edits


def _chains(graph: Graph, value: Value) -> Iterator[Chain]:
    """Give the chain of weight ops of every use of a weight; views alone for one not edited."""
    users = graph.users(value)
    for user in users:
        if user.name in VIEWS + EDITS and user.args[0] == value and is_weight(graph, user.result):
            for rest in _chains(graph, user.result):
                yield (_weight_op(graph, user), *rest)
        else:
            yield ()
    if not users:
        yield ()


def _weight_op(graph: Graph, op: Op) -> WeightOp:
    attrs = dict(op.attrs)
    constant = None
    if len(op.args) == 2:
        constant = graph.producer(op.args[1]).attr_as("name", str)
    return WeightOp(op.name, constant, **attrs)  # type: ignore[arg-type]


def _is_edit(chain: Chain) -> bool:
    return any(op.op in EDITS for op in chain)


def _check_disjoint(name: str, value: Value, chains: list[Chain]) -> None:
    """Refuse two uses that overlap, where one is edited: the checkpoint holds the rows once."""
    for i, one in enumerate(chains):
        for other in chains[i + 1 :]:
            if not (_is_edit(one) or _is_edit(other)):
                continue
            regions = zip(_region(value, one), _region(value, other), strict=True)
            if all(a[0] < b[1] and b[0] < a[1] for a, b in regions):
                raise KvantError(
                    "shared-weight",
                    f"parameter {name} is used twice, and a pass edits only one of the uses",
                    where=f"{value}: {[op.op for op in one]} and {[op.op for op in other]}",
                    fix="leave that pass out for this model",
                )


def _region(value: Value, chain: Chain) -> Region:
    """Return the rows and columns of the parameter that a chain edits."""
    shape: tuple[Dim, ...] = value.tensor.shape
    region = [(0, int(size)) for size in shape]
    order = list(range(len(region)))
    for op in chain:
        if op.op in EDITS:
            break
        if op.op == "transpose_w":
            order.reverse()
        elif op.start is not None and op.stop is not None:
            low = region[order[0]][0]
            region[order[0]] = (low + op.start, low + op.stop)
    return tuple(region)
