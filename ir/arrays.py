"""Arrays, and the three stored number types: f32, f16, bf16 (its bits are kept as uint16)."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
FloatName: TypeAlias = Literal["bf16", "f16", "f32"]

# The NumPy type that holds each number type in memory; little endian, as pages and files are.
STORED: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype("<u2"),
    "f16": np.dtype("<f2"),
    "f32": np.dtype("<f4"),
}


def to_bf16_bits(x: Array) -> Array:
    """Return the bfloat16 bits of x as uint16, rounded to nearest, ties to even.

    Args:
        x: any shape, any float type; rounded to f32 first. NaN stays NaN, overflow gives Inf.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    # Adding 0x7FFF plus the last kept bit carries exactly when the dropped half is above one
    # half, or is one half and the kept part is odd.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(is_nan, quiet, rounded).astype(np.uint16)


def from_bf16_bits(bits: Array) -> Array:
    """Return the f32 values of bfloat16 bits given as uint16; exact."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_stored(x: Array, dtype: str) -> Array:
    """Return x rounded to nearest even in the array type that holds `dtype` ("bf16", "f16", "f32").

    Overflow gives Inf; the caller decides what that means.
    """
    if dtype == "bf16":
        return to_bf16_bits(x)
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(STORED[dtype])


def from_stored(stored: Array, dtype: str) -> Array:
    """Return the float64 values of an array made by `to_stored`; exact."""
    values = from_bf16_bits(stored) if dtype == "bf16" else np.asarray(stored)
    return values.astype(np.float64)
