"""Tensors in and out: NumPy arrays and torch tensors, without importing torch.

A torch tensor is known by the module of its class. Whoever hands one over has imported torch, so
it can be looked up in `sys.modules` when the result must be a torch tensor again.
"""

import operator
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import KvantError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a tensor was, so that a result can become the same again.

    Attributes:
        library: "numpy" or "torch".
        dtype: "float32", "bfloat16" or "float16".
    """

    library: str
    dtype: str


F32 = np.dtype(np.float32)
_NUMPY_F32 = Kind("numpy", "float32")
_LAYOUT: tuple[Literal["C", "A", "W"], ...] = ("C", "A", "W")
_KINDS = {dtype: Kind("torch", dtype) for dtype in DTYPES}


def is_torch(value: object) -> bool:
    """Return whether the value is a torch.Tensor or of a class derived from it."""
    kind: Any = type(value)
    return _is_tensor(kind)


@cache
def _is_tensor(kind: Any) -> bool:
    return any(
        cls.__name__ == "Tensor" and cls.__module__.split(".")[0] == "torch" for cls in kind.__mro__
    )


def _wrong_type(name: str, value: object, expected: str) -> KvantError:
    return KvantError(
        "wrong-type",
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}, expected {expected}",
        where=name,
        fix="pass a torch tensor on the CPU or a NumPy array",
    )


def _wrong_dtype(name: str, dtype: object, expected: str) -> KvantError:
    return KvantError(
        "wrong-dtype",
        f"{name} has dtype {dtype}, expected {expected}",
        where=name,
        fix=f"convert {name} first",
    )


def _check_device(name: str, tensor: Any) -> None:
    if not tensor.is_cpu or _name(tensor.layout) != "strided":
        raise wrong_device(name, tensor, "cpu")


def wrong_device(name: str, tensor: Any, wanted: str) -> KvantError:
    """Return the refusal of a tensor that is elsewhere, or not laid out by strides."""
    return KvantError(
        "wrong-device",
        f"{name} is a {tensor.layout} tensor on device {tensor.device}, expected torch.strided on "
        f"{wanted}",
        where=name,
        fix="move it first, for example with "
        + (f"{name}.cpu()" if wanted == "cpu" else f'{name}.to("{wanted}")'),
    )


def kind_of_tensor(name: str, tensor: Any) -> Kind:
    """Return what a torch tensor is. Raises: KvantError "wrong-dtype"."""
    kind = _KINDS.get(_name(tensor.dtype))
    if kind is None:
        raise _wrong_dtype(name, _name(tensor.dtype), " or ".join(DTYPES))
    return kind


@cache
def _name(constant: object) -> str:
    """Return the name of a dtype or layout of torch."""
    return str(constant).removeprefix("torch.")


def check_shape(
    name: str, shape: tuple[int, ...], expected: tuple[int | str, ...], where: str
) -> None:
    """Raise KvantError "wrong-shape" unless the shape fits; a str in `expected` fits any size."""
    if shape == expected:
        return
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(shape, expected, strict=False)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise KvantError(
            "wrong-shape",
            f"{name} has shape {list(shape)}, expected [{wanted}]",
            where=where,
            fix="pass [batch, heads, tokens, channels] as the cache was created for",
        )


def read_floats(name: str, value: object) -> tuple[NDArray[np.float32], Kind]:
    """Return a tensor as a contiguous, aligned, writable float32 array and what it was.

    The array shares memory with a float32 tensor that is contiguous; otherwise it is a copy.

    Args:
        name: the argument's name, for errors.
        value: torch tensor on the CPU or NumPy array, f32, bf16 or f16.

    Raises: KvantError "wrong-type", "wrong-dtype" or "wrong-device".
    """
    if type(value) is np.ndarray and value.dtype == F32 and value.flags.carray:
        return value, _NUMPY_F32  # the common case in a decoding loop, without a copy
    if is_torch(value):
        tensor: Any = value
        kind = kind_of_tensor(name, tensor)
        _check_device(name, tensor)
        if tensor.requires_grad:
            tensor = tensor.detach()
        array: NDArray[np.float32] = (tensor if kind.dtype == "float32" else tensor.float()).numpy()
        return (array if array.flags.carray else np.require(array, np.float32, _LAYOUT)), kind
    if not isinstance(value, np.ndarray):
        raise _wrong_type(name, value, "a torch tensor or a NumPy array")
    if value.dtype.name not in DTYPES or not value.dtype.isnative:
        raise _wrong_dtype(name, value.dtype, " or ".join(DTYPES) + " in native byte order")
    return np.require(value, np.float32, _LAYOUT), Kind("numpy", value.dtype.name)


def write_floats(array: NDArray[np.float32], kind: Kind) -> Any:
    """Return an array as the kind of tensor that `read_floats` was given, rounded once."""
    if kind.library == "torch":
        torch: Any = sys.modules["torch"]
        return torch.from_numpy(array).to(getattr(torch, kind.dtype))
    # NumPy knows "bfloat16" only while ml_dtypes is loaded, which made the input possible.
    return array.astype(np.dtype(kind.dtype), copy=False)


def read_integers(name: str, value: object, size: int) -> NDArray[np.int64]:
    """Return a sequence, array or tensor of integers as a fresh int64[size].

    Raises: KvantError "wrong-type", "wrong-dtype" or "wrong-shape".
    """
    if is_torch(value):
        tensor: Any = value
        _check_device(name, tensor)
        if str(tensor.dtype) not in ("torch.int64", "torch.int32"):
            raise _wrong_dtype(name, tensor.dtype, "int64")
        array = tensor.detach().numpy()
    elif isinstance(value, np.ndarray | list | tuple):
        array = np.asarray(value, None if len(value) else np.int64)
    else:
        raise _wrong_type(name, value, "integers, one per row")
    if array.dtype.kind not in "iu":
        raise _wrong_dtype(name, array.dtype, "int64")
    check_shape(name, array.shape, (size,), where=name)
    return np.asarray(array, np.int64).copy()


def read_integer(name: str, value: object, least: int) -> int:
    """Return an integer argument. Raises: KvantError "wrong-value" if it is none or too small."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise wrong_value(name, value, "an integer")
    number = operator.index(value)
    if number < least:
        raise wrong_value(name, number, f"at least {least}")
    return number


def wrong_value(name: str, value: object, expected: str) -> KvantError:
    """Return the refusal of an argument whose value is out of its range."""
    return KvantError(
        "wrong-value",
        f"{name} is {value!r}, expected {expected}",
        where=name,
        fix=f"pass {name} within these limits",
    )


def check_finite(
    name: str,
    x: NDArray[np.float32],
    first: NDArray[np.int64],
    count: NDArray[np.int64],
    where: str,
) -> None:
    """Refuse NaN and infinity in tokens [first, first + count) of each row, and say where one is.

    Args:
        name: "k" or "v", for the error.
        x: f32[B, H, T, D].
        first: int64[B].
        count: int64[B].
        where: layer and call, for the error.

    Raises: KvantError "non-finite".
    """
    finite: NDArray[np.bool_] = np.isfinite(x)
    if finite.all():
        return
    for row in range(len(x)):
        begin = int(first[row])
        bad = np.argwhere(~finite[row, :, begin : begin + int(count[row])])
        if len(bad):
            head, token, channel = (int(i) for i in bad[0])
            raise KvantError(
                "non-finite",
                f"{name} holds {x[row, head, begin + token, channel]} in row {row}, head {head}, "
                f"token {begin + token}, channel {channel}",
                where=where,
                fix="find out why the model gave such values; nothing was stored",
            )
