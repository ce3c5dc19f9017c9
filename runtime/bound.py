"""Arguments of compiled kernels that are converted once, for calls that come at every token.

A kernel takes some twenty arrays. Most of them (tail, table, pages, constants) are the same ones at
every step, and handing an array over takes longer than storing a token. What is made of such
objects belongs to these very ones, so it is used while `are_still` says that they are there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import stream_values
from .stream import Steps, Stream

Array = NDArray[Any]
Kernel = Callable[..., Any]

_TYPES: dict[str, np.dtype[Any]] = {
    f"{kind}{bits}": np.dtype(f"{kind}{bits}")
    for kind, widths in (("uint", (8, 16)), ("int", (8, 16, 32, 64)), ("float", (16, 32, 64)))
    for bits in widths
}


def are_still(made_of: tuple[object, ...], present: tuple[object, ...]) -> bool:
    """Return whether all objects are the very ones that something was made of."""
    return all(map(is_, made_of, present))


def arrays_of(stream: Stream) -> tuple[object, ...]:
    """Return the arrays that stay for long; what changes inside them, a kernel sees."""
    return stream.sink, stream.tail, stream.table, stream.pool.pages


@dataclass(slots=True)
class BoundKernel:
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

    Attributes:
        made_of: the objects that were converted.
        calls: made of these.
    """

    made_of: tuple[object, ...]
    calls: tuple[BoundKernel, ...]


def bind(
    kernel: Kernel,
    arguments: Sequence[str],
    values: Mapping[str, Any],
    rows: Sequence[str],
    batch: int,
) -> BoundKernel:
    """Return a kernel with the arguments that stay.

    Args:
        kernel: the function.
        arguments: its arguments, as in launch.json.
        values: by name; what is not there, changes.
        rows: names of int64[B] arguments that change, in the order of `BoundKernel.rows`.
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
    return BoundKernel(kernel, given, places, numbers.reshape(-1))


def bound_calls(
    kernels: Mapping[str, Kernel],
    arguments: Mapping[str, Sequence[str]],
    constants: Mapping[str, Array],
    rows: Sequence[str],
    k: Stream,
    v: Stream,
) -> tuple[BoundKernel, ...]:
    """Return kernels with what two streams of a layer have now; kept with `k` for the next time.

    Args:
        kernels: functions by name.
        arguments: of each kernel, as in launch.json.
        constants: of the layer, by argument name.
        rows: as for `bind`.
        k: keys.
        v: values of the same layer.
    """
    made_of = (kernels, constants, *arrays_of(k), *arrays_of(v))
    bound = k.bound
    if not isinstance(bound, Bound) or not are_still(bound.made_of, made_of):
        batch = len(k.length)
        values = {**stream_values(k), **stream_values(v), **constants, "batch": batch}
        calls = (bind(f, arguments[name], values, rows, batch) for name, f in kernels.items())
        bound = k.bound = Bound(made_of, tuple(calls))
    return bound.calls


def bound_steps(kernel: Kernel, arguments: Sequence[str], values: Mapping[str, Any]) -> Steps:
    """Return the kernel step with its arguments in the block of memory where it looks for them.

    Args:
        kernel: the function.
        arguments: what it finds in the block, as in launch.json.
        values: by name.
    """
    given = [argument(spec, values) for spec in arguments]
    arrays = tuple(x for x in given if isinstance(x, np.ndarray))
    words = [x.ctypes.data if isinstance(x, np.ndarray) else x for x in given]
    block = np.array(words, np.int64)
    return Steps(partial(kernel, block.ctypes.data), (block, *arrays))


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
    flat = (
        value
        if value.ndim == 1 and value.flags.c_contiguous
        else np.ascontiguousarray(value).ravel()
    )
    wanted = _TYPES[dtype]
    return flat if flat.dtype == wanted else flat.view(wanted)


def _converted(value: Any) -> Any:
    """Return an array as a tensor of tvm-ffi, which is handed over faster."""
    if not isinstance(value, np.ndarray):
        return value
    import tvm_ffi

    return tvm_ffi.from_dlpack(value)
