"""What takes part in a comparison: one step of attention, its result, and its bytes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array: TypeAlias = NDArray[np.float32]
Setting: TypeAlias = Mapping[str, int | str]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One engine under one setting.

    Attributes:
        name: of the engine and what its cache holds, "ik_q4_0".
        setting: how it is called.
        run: one step.
        output: what the last step gave, [B, Hq, D].
        bytes: of keys and values with their scales.
        close: gives its memory back.
    """

    name: str
    setting: Setting
    run: Callable[[], Any]
    output: Callable[[], Array]
    bytes: int
    close: Callable[[], None]


def threads_up_to(limit: int) -> list[int]:
    """Return the numbers of threads to try."""
    return sorted({1, max(1, limit // 2), limit})


def aligned(shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Return an array that begins at a cache line, as engines allocate their own."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + size].view(dtype).reshape(shape)


def aligned_copy(x: NDArray[Any]) -> NDArray[Any]:
    """Return a copy that begins at a cache line."""
    copy = aligned(x.shape, x.dtype)
    copy[...] = x
    return copy


def truth(q: Array, k: Array, v: Array, scale: float) -> NDArray[np.float64]:
    """Return attention in float64 over what was given, [B, Hq, D], a head at a time."""
    batch, heads, _, _ = q.shape
    group = heads // k.shape[1]
    out = np.zeros((batch, heads, v.shape[3]))
    for row in range(batch):
        for head in range(k.shape[1]):
            own = slice(head * group, (head + 1) * group)
            logits = q[row, own, 0].astype(np.float64) @ k[row, head].astype(np.float64).T * scale
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[row, own] = weights @ v[row, head].astype(np.float64)
    return out


def error(found: Array, right: NDArray[np.float64]) -> float:
    """Return the length of the error over the length of what is right."""
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))
