"""The pool that pages come from: one array, pages given out and taken back by index.

On the host the array is a mapping as large as the cache may ever become, but no memory is reserved
for it: a page costs memory from the moment it is first written (in a large pool, with what lies in
the same 2 MiB). Elsewhere the array grows. A page
that was used before is cleared when it is given out again, so nobody ever sees the bytes of its
former owner.
"""

import mmap
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ir.errors import KvantError

# Python names this flag only from 3.13 on; the value is the same on every Linux we support.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_HUGE = 8 << 20  # bytes; a smaller pool is not worth a page of 2 MiB


@dataclass(slots=True)
class PagePool:
    """Pages of one size.

    Invariant: `used` + free = `high`, where pages [high, capacity) were never given out.

    Attributes:
        pages: uint8[count, page_bytes], NumPy or torch, each row aligned to 64 bytes.
        capacity: number of pages that can be in use at once.
        grow: gives an array with more pages of (pages, capacity), where there is not room for all.
        high: number of pages that were ever given out.
    """

    pages: Any
    capacity: int
    grow: Callable[[Any, int], Any] | None = None
    high: int = 0
    _free: list[int] = field(default_factory=list)
    _is_free: set[int] = field(default_factory=set)

    @property
    def used(self) -> int:
        """Number of pages in use."""
        return self.high - len(self._free)

    def take(self) -> int:
        """Give out one page, all bytes zero.

        Returns: its index.
        Raises: KvantError "cache-full" if every page is in use.
        """
        if self._free:
            index = self._free.pop()
            self._is_free.remove(index)
            self.pages[index] = 0
            return index
        if self.high == self.capacity:
            raise KvantError(
                "cache-full",
                f"all {self.capacity} pages of {self.pages.shape[1]} bytes are in use",
                where="page pool",
                fix="create the cache with a larger max_tokens or truncate it",
            )
        if self.grow is not None and self.high == len(self.pages):
            self.pages = self.grow(self.pages, self.capacity)
        self.high += 1
        return self.high - 1

    def reserve(self, count: int) -> None:
        """Make the array so large that `count` more pages, or all there may be, stay in it."""
        needed = min(self.capacity, self.used + count)
        while self.grow is not None and len(self.pages) < needed:
            self.pages = self.grow(self.pages, needed)

    def give_back(self, indices: Iterable[int]) -> None:
        """Take pages back. Their bytes stay until the page is given out again.

        Raises: KvantError "internal-page-error" if a page is not in use; nothing is taken then.
        """
        batch = [int(index) for index in indices]
        wrong = [i for i in batch if not 0 <= i < self.high or i in self._is_free]
        if wrong or len(set(batch)) != len(batch):
            raise KvantError(
                "internal-page-error",
                f"pages {batch} were given back, but {wrong or 'some twice'} are not in use",
                where="page pool",
                fix="this is a bug in kvant, please report it",
            )
        self._free.extend(batch)
        self._is_free.update(batch)


def open_pool(page_bytes: int, capacity: int) -> PagePool:
    """Map address space for a pool; memory is used only as pages are written.

    Args:
        page_bytes: size of a page, a multiple of 64.
        capacity: the most pages that can be in use at once.

    Raises: KvantError "out-of-memory" if the system refuses the address space.
    """
    size = max(1, page_bytes * capacity)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    try:
        mapping = mmap.mmap(-1, size, flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        raise KvantError(
            "out-of-memory",
            f"the system refused {size} bytes of address space for the cache: {error}",
            where=f"page pool of {capacity} pages of {page_bytes} bytes",
            fix="lower batch or max_tokens, or raise the limit (ulimit -v, vm.overcommit_memory)",
        ) from error
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # A long cache is read from end to end: fewer, larger pages of memory spare table walks.
        with suppress(OSError):  # a system without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    flat = np.frombuffer(mapping, np.uint8, count=page_bytes * capacity)
    return PagePool(flat.reshape(capacity, page_bytes), capacity)
