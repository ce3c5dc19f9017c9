"""What kernels of every target are given, by the names that launch.json uses."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.maps import Gather, Map, Scale, argument_name
from ..ir.plan import AttentionPlan
from .stream import Stream

Array = NDArray[Any]

_OF_A_STREAM = (
    *("sink", "tail", "tail_first", "table", "encoded", "length", "capacity", "max_pages"),
    # the pages, by the type as which they are read
    *("uint8", "uint16", "float16", "float32", "int8", "int16", "int32"),
)
_NAMES = {role: tuple(f"{role}_{name}" for name in _OF_A_STREAM) for role in ("k", "v")}


def stream_values(stream: Stream) -> dict[str, Any]:
    """Return everything a kernel may ask of a stream, by name."""
    pages, tail, table = stream.pages.reshape(-1), stream.tail, stream.table
    given = (stream.sink, tail, stream.tail_first, table, stream.encoded, stream.length)
    sizes = tail.shape[2], table.shape[1]
    return dict(zip(_NAMES[stream.plan.role], (*given, *sizes, *[pages] * 7), strict=True))


def constant_arguments(plan: AttentionPlan, constants: Mapping[str, Array]) -> dict[str, Array]:
    """Return learned sinks and the constants of all maps, as kernels name and type them."""
    maps: list[Map] = [*plan.k.maps, *plan.v.maps, *plan.q_maps, *plan.out_maps]
    arguments: dict[str, Array] = {}
    if plan.sinks is not None:
        arguments["sinks"] = np.array(constants[plan.sinks], np.float32)
    for m in maps:
        match m:
            case Gather(order=name):
                arguments[argument_name(name, "order")] = np.array(constants[name], np.int32)
            case Scale(values=name):
                arguments[argument_name(name, "scale")] = np.array(constants[name], np.float64)
    return arguments
