"""The kernels of one decode step of a layer, with the arguments that stay.

Tails, pages, tables, constants and all that a board holds are at the same addresses step after
step. So a step of a layer is a few addresses put in place, and the launches.
"""

from collections.abc import Mapping
from ctypes import c_int64
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from .arguments import stream_values
from .launch_block import SPLITS
from .launch_gpu import Kernels
from .launcher import Prepared
from .stream import Pair

Tensor: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Cells:
    """Numbers that kernels of all layers of a group read when they start.

    Attributes:
        k_encodes: programs that encode keys.
        v_encodes: programs that encode values.
        splits: that each row has for whole tiles.
        parts: the same, with those for what is left.
    """

    k_encodes: c_int64 = field(default_factory=c_int64)
    v_encodes: c_int64 = field(default_factory=c_int64)
    splits: c_int64 = field(default_factory=c_int64)
    parts: c_int64 = field(default_factory=c_int64)

    def named(self) -> dict[str, c_int64]:
        """Return the cells by the names that kernels use."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass(frozen=True, slots=True)
class LayerStep:
    """The launches of one layer.

    Attributes:
        made_of: the arrays whose addresses were taken.
        types: of new keys and values.
        append: given k and v.
        prepare: given q.
        attend: given nothing.
        combine: given out and lse.
    """

    made_of: tuple[object, ...]
    types: tuple[object, object]
    append: Prepared
    prepare: Prepared
    attend: Prepared
    combine: Prepared


def made_of(streams: Pair, scratch: object) -> tuple[object, ...]:
    """Return the arrays whose addresses a step's launches have."""
    k, v = streams
    return k.sink, k.tail, k.pool.pages, v.sink, v.tail, v.pool.pages, scratch


def bind_step(
    kernels: Kernels,
    layer: int,
    streams: Pair,
    new: tuple[Tensor, Tensor],
    given: Mapping[str, Any],
    scratch: Mapping[str, Tensor],
) -> LayerStep:
    """Return the launches of a layer.

    Args:
        kernels: of the device.
        layer: index.
        streams: k and v.
        new: keys and values of one token, for their types.
        given: by name: numbers of each row on the device (see `board.ROWS`), tables and cells.
        scratch: by name, what the kernels of attend leave for one another.
    """
    values: dict[str, Any] = {}
    for stream in streams:
        role = stream.plan.role
        values |= stream_values(stream)
        values |= {f"{role}_end": given[f"{role}_encoded"], f"{role}_bad": stream.bad}
    values |= given
    types = kernels.new_tokens(layer, *new)
    one: dict[str, Any] = {"queries": 1, "rows": kernels.rows_of_one(layer), "alone": 1, **scratch}
    one |= {"length_of": given["length"]}
    one |= {name: kernels.facts(layer)[name] for name in SPLITS}

    def call(kernel: str, own: dict[str, Any], *changing: str) -> Prepared:
        return kernels.prepared(layer, kernel, values | own, changing)

    return LayerStep(
        made_of(streams, scratch),
        (new[0].dtype, new[1].dtype),
        call("append", types | {"tokens": 1}, "k_x", "v_x"),
        call("prepare", one, "q"),
        call("attend", one),
        call("combine", one, "out", "lse"),
    )
