"""Where tokens come in: an array that is filled at every step, so that kernels know it already."""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tensors import DTYPES, F32, is_torch


class Inlet:
    """f32 numbers of one step, for what comes nearly always; all else is read with all checks.

    Args:
        shape: of what comes.
    """

    __slots__ = ("_dtypes", "_tensor", "array")

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.array: NDArray[np.float32] = np.zeros(shape, np.float32)
        self._tensor: Any = None
        self._dtypes: tuple[Any, ...] = ()

    def take(self, value: object) -> bool:
        """Copy an f32 array of NumPy in, or a tensor of torch that is on the host; or do nothing.

        Returns: whether it was taken. What is not has another shape, type or place.
        """
        if type(value) is np.ndarray:
            if value.dtype != F32 or value.shape != self.array.shape:
                return False
            self.array[...] = value
            return True
        return is_torch(value) and self._take_tensor(value)

    def _take_tensor(self, value: Any) -> bool:
        if self._tensor is None:
            self._open_to_torch()
        tensor = self._tensor
        fits = value.dtype in self._dtypes and value.shape == tensor.shape
        if not fits or not value.is_cpu or value.layout is not tensor.layout:
            return False
        tensor.copy_(value.detach() if value.requires_grad else value)
        return True

    def _open_to_torch(self) -> None:
        torch: Any = sys.modules["torch"]
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._tensor = torch.from_numpy(self.array)
        self._dtypes = tuple(getattr(torch, name) for name in DTYPES)
