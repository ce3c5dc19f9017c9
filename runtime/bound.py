"""Arguments of compiled kernels that are converted once, for calls that come at every token.

A kernel takes some twenty arrays. Most of them (tail, table, pages, constants) are the same ones at
every step, and handing an array over takes longer than storing a token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import stream_values
from .stream import Stream

Array = NDArray[Any]
Kernel = Callable[..., None]


@dataclass(slots=True)
class Call:
    """One kernel with those of its arguments that stay.

    Attributes:
        kernel: the function.
        given: its arguments in order, None for those that change.
        places: where the arguments that change stand, by name.
        rows: int64[n B]; what the kernel reads as its n arguments of one number a row that change.
    """

    kernel: Kernel
    given: list[Any]
    places: dict[str, int]
    rows: NDArray[np.int64]

    def __call__(self, changing: Mapping[str, Any]) -> None:
        """Call the kernel with flat arrays and numbers for all of `places`, and with `rows`."""
        given = self.given.copy()  # another thread may attend over the same streams
        for name, place in self.places.items():
            given[place] = changing[name]
        self.kernel(*given)


@dataclass(frozen=True, slots=True)
class Bound:
    """The calls that attend over two streams.

    A view belongs to one array. `made_of` are the objects that were converted: as soon as a stream
    has another one (its tail grew, its rows were reordered), none of the calls is used any more.
    """

    made_of: tuple[object, ...]
    calls: tuple[Call, ...]


def bind(
    kernel: Kernel,
    arguments: Sequence[str],
    values: Mapping[str, Any],
    rows: Sequence[str],
    batch: int,
) -> Call:
    """Return a kernel with the arguments that stay.

    Args:
        kernel: the function.
        arguments: its arguments, as in launch.json.
        values: by name; what is not there, changes.
        rows: names of int64[B] arguments that change, in the order of `Call.rows`.
        batch: B.
    """
    numbers = np.zeros((len(rows), batch), np.int64)
    values = {**values, **dict(zip(rows, numbers, strict=True))}
    given: list[Any] = []
    places: dict[str, int] = {}
    for spec in arguments:
        name = spec.partition(":")[0]
        if name not in values:
            places[name] = len(given)
        given.append(_converted(argument(spec, values)) if name in values else None)
    return Call(kernel, given, places, numbers.reshape(-1))


def bound_calls(
    kernels: Mapping[str, Kernel],
    arguments: Mapping[str, Sequence[str]],
    constants: Mapping[str, Array],
    rows: Sequence[str],
    k: Stream,
    v: Stream,
) -> tuple[Call, ...]:
    """Return kernels with what two streams of a layer have now; kept with `k` for the next time.

    Args:
        kernels: functions by name.
        arguments: of each kernel, as in launch.json.
        constants: of the layer, by argument name.
        rows: as for `bind`.
        k: keys.
        v: values of the same layer.
    """
    # What changes inside these, a kernel sees.
    parts = (k.sink, k.tail, k.table, k.pool.pages, v.sink, v.tail, v.table, v.pool.pages)
    made_of = (kernels, constants, *parts)
    bound = k.bound
    if not isinstance(bound, Bound) or not all(map(is_, made_of, bound.made_of)):
        batch = len(k.length)
        values = {**stream_values(k), **stream_values(v), **constants, "batch": batch}
        calls = (bind(f, arguments[name], values, rows, batch) for name, f in kernels.items())
        bound = k.bound = Bound(made_of, tuple(calls))
    return bound.calls


def argument(spec: str, values: Mapping[str, Any]) -> Any:
    """Return one argument: an array flat, as the dtype that the kernel asks for, or a number.

    Args:
        spec: "name:dtype" of an array, "name" of a number.
        values: by name.
    """
    name, _, dtype = spec.partition(":")
    value = values[name]
    if not dtype:
        return int(value)
    flat = np.ascontiguousarray(value).reshape(-1)
    return flat if flat.dtype == dtype else flat.view(dtype)


def _converted(value: Any) -> Any:
    """Return an array as a tensor of tvm-ffi, which is handed over faster."""
    if not isinstance(value, np.ndarray):
        return value
    import tvm_ffi

    return tvm_ffi.from_dlpack(value)
