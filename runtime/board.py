"""What the host counts, where kernels of a device read it: one block, sent once a step.

    numbers   int64[layers that count alike, ROWS, B]   sent whole, each step
    tables    int64 of all streams, one after another   an entry is sent when its page is taken

Addresses stay, so kernels are given them once. Rows begin at multiples of 16 bytes, as the kernels
were compiled for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .counts import Taken
from .memory import ALIGNED, TorchMemory
from .stream import Ints, Stream

Tensor: TypeAlias = Any

ROWS = (
    *("first", "count", "before", "length"),
    *("k_begin", "k_encoded", "k_tail_first", "v_begin", "v_encoded", "v_tail_first"),
)
"""Numbers of each row, by the names that `Board.rows` has them under."""
_PLACE = {name: place for place, name in enumerate(ROWS)}
_EVEN = ALIGNED // 8


@dataclass(frozen=True, slots=True)
class Board:
    """Counts and tables of one cache on its device.

    Attributes:
        numbers: int64[groups, ROWS, B made even], on the host.
        here: the same memory, as a tensor of the host.
        there: the block on the device.
        tables: int64, tables of all streams on the device, flat.
        starts: where the table of each stream begins.
        widths: columns of each table.
        batch: B.
    """

    numbers: NDArray[np.int64]
    here: Tensor
    there: Tensor
    tables: Tensor
    starts: tuple[int, ...]
    widths: tuple[int, ...]
    batch: int

    def write(self, group: int, values: Mapping[str, Ints]) -> None:
        """Set numbers of a group of layers, on the host."""
        block = self.numbers[group]
        for name, value in values.items():
            block[_PLACE[name], : self.batch] = value

    def send(self, taken: Sequence[Taken]) -> None:
        """Send all numbers to the device, and the pages that were taken, on the current stream.

        Nothing waits: CUDA stages what is not pinned before the call returns.
        """
        self.there.copy_(self.here, non_blocking=True)
        if not taken:
            return
        import torch

        new = np.array(
            [(self.starts[n] + row * self.widths[n] + i, page) for n, row, i, page in taken],
            np.int64,
        )
        sent = torch.from_numpy(np.ascontiguousarray(new.T)).to(
            self.there.device, non_blocking=True
        )
        self.tables[sent[0]] = sent[1]

    def rows(self, group: int) -> dict[str, Tensor]:
        """Return the numbers of a group on the device, int64[B] each, by the names of ROWS."""
        return {name: self.there[group, place, : self.batch] for name, place in _PLACE.items()}

    def table(self, number: int) -> Tensor:
        """Return the table of a stream on the device, flat int64[B columns]."""
        start = self.starts[number]
        return self.tables[start : start + self.batch * self.widths[number]]


def open_board(
    memory: TorchMemory, groups: int, streams: Sequence[Stream], widths: Sequence[int]
) -> Board:
    """Return a board with the present tables of all streams.

    Args:
        memory: of the device.
        groups: of layers that count alike.
        streams: k and v of each layer, in order.
        widths: columns of each stream's table that kernels may read.
    """
    import torch

    batch = len(streams[0].length)
    numbers = np.zeros((groups, len(ROWS), -(-batch // _EVEN) * _EVEN), np.int64)
    parts, starts, at = [], [], 0
    for stream, width in zip(streams, widths, strict=True):
        size = -(-batch * width // _EVEN) * _EVEN
        part = np.zeros(size, np.int64)
        part[: batch * width] = stream.table[:, :width].reshape(-1)
        parts.append(part)
        starts.append(at)
        at += size
    return Board(
        numbers,
        torch.from_numpy(numbers),
        memory.place(numbers.copy()),
        memory.place(np.concatenate(parts)),
        tuple(starts),
        tuple(widths),
        batch,
    )
