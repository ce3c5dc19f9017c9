"""Where new tokens are, for a kernel that reads them at their address."""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .stream import TYPES
from .tensors import DTYPES, F32, is_torch

_F32 = TYPES.index("float32")


class Inlet:
    """The tokens of one step of a stream: where they are, for what comes nearly always.

    Args:
        shape: of what comes.

    Attributes:
        type: the number type of what was taken last, a number of TYPES.
    """

    __slots__ = ("_address", "_array", "_kept", "_others", "_shape", "_tensor", "_types", "type")

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.type = _F32
        self._shape = shape
        self._array: NDArray[np.float32] = np.zeros(shape, np.float32)
        self._address = int(self._array.ctypes.data)
        self._tensor: Any = None  # torch.Tensor, once one came
        self._types: dict[Any, int] = {}
        self._others: frozenset[Any] = frozenset()
        self._kept: Any = None  # memory at the address that was given last, if it is nobody else's

    def take(self, value: object) -> int:
        """Return the address of the numbers of an array of NumPy or a tensor of torch, and `type`.

        They lie there without gaps as long as `value` lives and nothing else is taken.

        Returns: 0 for what is not taken: another shape, type or place.
        """
        if type(value) is not self._tensor:
            return self._take_other(value)
        tensor: Any = value
        try:
            if tensor.shape != self._shape or not tensor.is_cpu:
                return 0
            kind = self._types.get(tensor.dtype)
            if kind is None or not tensor.is_contiguous():
                return self._convert(tensor)
            self.type = kind
            address: int = tensor.data_ptr()
        except RuntimeError:
            return 0  # torch refuses to say where: a tensor without memory, or of another layout
        return address

    def _take_other(self, value: object) -> int:
        if type(value) is np.ndarray:
            if value.dtype != F32 or value.shape != self._shape:
                return 0
            self._array[...] = value
            self.type = _F32
            return self._address
        if self._tensor is None and is_torch(value):
            self._open_to_torch()
            return self.take(value)
        return 0

    def _convert(self, tensor: Any) -> int:
        if tensor.dtype not in self._others:
            return 0
        self._kept = tensor.detach().float().contiguous()
        self.type = _F32
        return int(self._kept.data_ptr())

    def _open_to_torch(self) -> None:
        torch: Any = sys.modules["torch"]
        self._tensor = torch.Tensor
        self._types = {getattr(torch, name): i for i, name in enumerate(TYPES)}
        self._others = frozenset(getattr(torch, name) for name in DTYPES)
