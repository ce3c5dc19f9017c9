"""Where the arrays of a cache are: on the host, as NumPy arrays, or on a device, as torch tensors.

What a cache counts (lengths, tables) is always on the host, and `board.py` sends it to a device.
Sinks, tails and pages are where the kernels are, and only the few operations of `Memory` and slices
touch them.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import KvantError
from .pages import PagePool, open_pool
from .tensors import DTYPES, Kind, is_torch, kind_of_tensor, read_floats, write_floats, wrong_device

Array: TypeAlias = Any
"""A NumPy array or a torch tensor: both take slices, and a slice as the target of an assignment."""

_FIRST_PAGES = 16
ALIGNED = 16
"""Bytes: at a multiple of it every array of a device begins."""


class Memory(Protocol):
    """Arrays of one place."""

    @property
    def device(self) -> str:
        """The place, as torch calls it: "cpu", "cuda:0"."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Return f32 zeros."""

    def open_pool(self, page_bytes: int, capacity: int) -> PagePool:
        """Return a pool of at most `capacity` pages, whose memory grows with what is used."""

    def rows(self, x: Array, index: NDArray[np.int64]) -> Array:
        """Return a copy whose row i is row index[i] of x."""

    def fetch(self, x: Array) -> NDArray[Any]:
        """Return an array on the host: itself, or a copy."""

    def place(self, x: NDArray[Any]) -> Array:
        """Return an array of the host here: itself, or a copy."""

    def read_floats(self, name: str, value: object) -> tuple[Array, Kind]:
        """Return what a caller gave as f32 here, contiguous, and what it was.

        Raises: KvantError "wrong-type", "wrong-dtype" or "wrong-device".
        """

    def read_tokens(self, name: str, value: object) -> Array:
        """Return what a caller gave as new tokens, as the kernels here take them; contiguous.

        That is f32 on the host, and any type of DTYPES on a device.
        Raises: KvantError "wrong-type", "wrong-dtype" or "wrong-device".
        """

    def write_floats(self, x: Array, kind: Kind) -> Any:
        """Return an array of here as the kind of tensor that `read_floats` was given."""


class HostMemory:
    """NumPy arrays. A pool is address space that costs nothing until a page is written."""

    device = "cpu"

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """See `Memory`."""
        return np.zeros(shape, np.float32)

    def open_pool(self, page_bytes: int, capacity: int) -> PagePool:
        """See `Memory`."""
        return open_pool(page_bytes, capacity)

    def rows(self, x: Array, index: NDArray[np.int64]) -> Array:
        """See `Memory`."""
        return x[index]

    def fetch(self, x: Array) -> NDArray[Any]:
        """Return x itself."""
        return np.asarray(x)

    def place(self, x: NDArray[Any]) -> Array:
        """Return x itself."""
        return x

    def read_floats(self, name: str, value: object) -> tuple[Array, Kind]:
        """See `Memory`."""
        return read_floats(name, value)

    def read_tokens(self, name: str, value: object) -> Array:
        """See `Memory`."""
        return read_floats(name, value)[0]

    def write_floats(self, x: Array, kind: Kind) -> Any:
        """See `Memory`."""
        return write_floats(x, kind)


HOST = HostMemory()


class TorchMemory:
    """Tensors of torch's allocator on one device.

    Args:
        device: as torch calls it, "cuda:0".
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """See `Memory`."""
        return self._new("zeros", shape, "float32")

    def open_pool(self, page_bytes: int, capacity: int) -> PagePool:
        """Return a pool that begins small and doubles: kernels need its pages at one address."""

        def grown(count: int) -> Array:
            return self._new("zeros", (count, page_bytes), "uint8")

        first = grown(min(capacity, _FIRST_PAGES))
        return PagePool(first, capacity, _doubling(grown))

    def empty(self, shape: tuple[int, ...]) -> Array:
        """Return f32 that is not set to anything."""
        return self._new("empty", shape, "float32")

    def _new(self, how: str, shape: tuple[int, ...], dtype: str) -> Array:
        """Return a tensor that may be written inside torch.inference_mode and outside.

        Raises: KvantError "out-of-memory".
        """
        import torch

        try:
            with torch.inference_mode(False):
                new: Array = getattr(torch, how)
                return new(shape, dtype=getattr(torch, dtype), device=self.device)
        except torch.OutOfMemoryError as error:
            raise KvantError(
                "out-of-memory",
                f"{self.device} has no room for {list(shape)} of {dtype}",
                where="cache",
                fix="use a smaller batch or shorter rows, or free memory of the device",
            ) from error

    def flat(self, parts: Sequence[Array]) -> Array:
        """Return all numbers of some tensors, one after another."""
        import torch

        return torch.cat([part.reshape(-1) for part in parts])

    def join(self, parts: Sequence[Array]) -> Array:
        """Return [B, H, T, ...] of parts of T."""
        import torch

        return torch.cat(tuple(parts), dim=2)

    def view(self, x: Array, dtype: str) -> Array:
        """Return the bytes of a contiguous tensor as another type of NumPy's name, flat."""
        import torch

        return x.reshape(-1).view(getattr(torch, dtype))

    def rows(self, x: Array, index: NDArray[np.int64]) -> Array:
        """See `Memory`."""
        import torch

        with torch.inference_mode(False):
            return x[torch.from_numpy(np.ascontiguousarray(index)).to(self.device)]

    def fetch(self, x: Array) -> NDArray[Any]:
        """Return a copy on the host; bfloat16, which NumPy does not have, as float32."""
        import torch

        copy: NDArray[Any] = (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()
        return copy

    def place(self, x: NDArray[Any]) -> Array:
        """Return a copy on the device. CUDA stages small ones without waiting for the device."""
        import torch

        with torch.inference_mode(False):
            return torch.from_numpy(np.ascontiguousarray(x)).to(self.device, non_blocking=True)

    def place_all(self, arrays: Sequence[NDArray[Any]]) -> list[Array]:
        """Return the bytes of arrays on the device, uint8, sent as one block.

        Each begins at a multiple of ALIGNED bytes.
        """
        ends = np.cumsum([-(-x.nbytes // ALIGNED) * ALIGNED for x in arrays], dtype=np.int64)
        block = np.zeros(int(ends[-1]) if arrays else 0, np.uint8)
        spans = []
        for x, end in zip(arrays, ends.tolist(), strict=True):
            first = end - -(-x.nbytes // ALIGNED) * ALIGNED
            spans.append(slice(first, first + x.nbytes))
            block[spans[-1]] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        there = self.place(block) if arrays else block
        return [there[span] for span in spans]

    def read_floats(self, name: str, value: object) -> tuple[Array, Kind]:
        """Take a tensor of this device, or a NumPy array; a tensor from elsewhere is refused."""
        if is_torch(value):
            tensor, kind = self._checked(name, value)
            return _aligned(tensor.float().contiguous()), kind
        array, kind = read_floats(name, value)
        return self.place(array), kind

    def read_tokens(self, name: str, value: object) -> Array:
        """See `Memory`."""
        if is_torch(value):
            return _aligned(self._checked(name, value)[0].contiguous())
        return self.place(read_floats(name, value)[0])

    def _checked(self, name: str, value: object) -> tuple[Array, Kind]:
        """Return a tensor without its gradient, and what it is; one from elsewhere is refused."""
        tensor: Any = value
        if str(tensor.device) != self.device or str(tensor.layout) != "torch.strided":
            raise wrong_device(name, tensor, self.device)
        kind = kind_of_tensor(name, tensor)
        return tensor.detach(), kind

    def read_plain(self, value: object, shape: tuple[int, ...]) -> Array | None:
        """Return a tensor as `read_tokens` would, or none where it would be refused.

        It is for what comes at every token.
        """
        kind, strided, types, device = _plain(self.device)
        x: Any = value
        if type(x) is not kind or x.shape != shape or x.device != device or x.layout is not strided:
            return None
        if x.dtype not in types:
            return None
        if x.requires_grad or not x.is_contiguous():
            x = x.detach().contiguous()
        return _aligned(x)

    def nothing(self, dtype: str) -> Array:
        """Return a tensor of no numbers, of NumPy's name of a type."""
        import torch

        return torch.empty(0, dtype=getattr(torch, dtype), device=self.device)

    def write_floats(self, x: Array, kind: Kind) -> Any:
        """See `Memory`."""
        import torch

        if kind.library == "torch":
            return x.to(getattr(torch, kind.dtype))
        return write_floats(self.fetch(x), kind)


def _aligned(x: Array) -> Array:
    """Return a tensor as kernels are compiled for: it begins at a multiple of 16 bytes."""
    return x.clone() if x.data_ptr() % ALIGNED else x


def current_device() -> str:
    """Return torch's current GPU, "cuda:0"."""
    import torch

    return f"cuda:{torch.cuda.current_device()}"


@cache
def _plain(device: str) -> tuple[Any, Any, frozenset[Any], Any]:
    """Return what a plain tensor of a device is: its class, layout, types and device."""
    import torch

    types = frozenset(getattr(torch, name) for name in DTYPES)
    return torch.Tensor, torch.strided, types, torch.device(device)


def _doubling(new: Callable[[int], Array]) -> Callable[[Array, int], Array]:
    """Return a function that copies pages into a pool twice as large, within a limit."""

    def grow(pages: Array, limit: int) -> Array:
        larger = new(min(limit, 2 * len(pages)))
        larger[: len(pages)] = pages
        return larger

    return grow
