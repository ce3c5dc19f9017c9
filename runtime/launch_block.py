"""Attention of several queries a row on a GPU: tokens are unpacked once, then read many times.

Positions are cut into splits. How long they are depends on the plan and on how many queries there
are, never on the batch or on the rows' lengths, so neither changes a bit. As many splits at a time
as SCRATCH_BYTES hold are written as plain numbers by the kernel unpack, and attended by the kernel
attend_block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..ir.plan import AttentionPlan
from .memory import TorchMemory

Tensor: TypeAlias = Any
Values: TypeAlias = Mapping[str, Any]
Ints: TypeAlias = NDArray[np.int64]

MOST_QUERIES, LEAST_QUERIES = 8192, 16
"""Queries of one launch, at most and at least."""
PARTIAL_BYTES = 256 << 20
"""What the partial results of one launch may take, where that leaves LEAST_QUERIES."""
SCRATCH_BYTES = 512 << 20
"""What tokens as plain numbers may take, where that leaves one split."""
SPLITS = "least_tiles", "most_splits"
"""Facts of plan and machine by which a row's length alone says how its whole tiles are split."""
LEAST_SPLIT, MOST_SPLIT = 512, 8192
"""Tokens of a split."""
PROGRAMS = 256
"""Programs that fill a GPU: with as many tiles of queries and heads, splits are longest."""


@dataclass(frozen=True, slots=True)
class Block:
    """What one call needs of its layer.

    Attributes:
        plan: of the layer.
        facts: of its kernels.
        memory: of the device.
        values: arguments of the kernels by name: streams, constants.
        call: starts (kernel, grid, values).
        buffers: (rows, parts) -> what the kernels leave for one another.
    """

    plan: AttentionPlan
    facts: Mapping[str, Any]
    memory: TorchMemory
    values: Values
    call: Callable[[str, Sequence[int], Values], None]
    buffers: Callable[[int, int], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Plain:
    """Positions as plain numbers.

    Attributes:
        first: position.
        count: of positions, whole tiles.
        part: number of the first split.
        splits: that they are.
        arrays: keys, values, and their powers.
    """

    first: int
    count: int
    part: int
    splits: int
    arrays: Values


def split_tokens(plan: AttentionPlan, rows: int, queries: int) -> int:
    """Return the tokens of a split: the more programs the queries make, the longer.

    Args:
        plan: of the layer.
        rows: of a tile of attend_block.
        queries: of a call.
    """
    programs = plan.k.heads * ceil_div(queries * plan.group, rows)
    longer = MOST_SPLIT // LEAST_SPLIT
    return LEAST_SPLIT * min(longer, max(1, 1 << (programs * longer // PROGRAMS).bit_length() >> 1))


def attend(block: Block, q: Tensor, length: Ints) -> tuple[Tensor, Tensor]:
    """Return output [B, Hq, T, Dv] and log-sum-exp [B, Hq, T] of the last T queries of each row.

    Args:
        block: the layer.
        q: [B, Hq, T, D], float32.
        length: int64[B], tokens of each row.
    """
    plan, queries = block.plan, q.shape[2]
    size = split_tokens(plan, block.facts["attend_block"]["rows"], queries)
    behind = 0 if plan.window is None else int(length.min()) - queries - plan.window + 1
    spans = _spans(block, len(length), size, max(0, behind) // size, int(length.max()))
    step = _queries_at_once(block, len(length), sum(spans[-1]))
    plain: Plain | None = None
    parts = []
    for begin in range(0, queries, step):
        end = min(queries, begin + step)
        # These are the last queries of a row that ends where they end.
        own = _Queries(block, q[:, :, begin:end].contiguous(), length - (queries - end), spans)
        for part, splits in spans:
            if plain is None or plain.part != part:
                plain = _unpack(block, length, queries, size, part, splits)
            if part and part == spans[0][0]:
                own.skip(plain, part)
            own.attend(plain, size)
        parts.append(own.result())
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return block.memory.join(outs), block.memory.join(lses)


def _spans(block: Block, batch: int, size: int, first: int, stop: int) -> list[tuple[int, int]]:
    """Return (number of the first split, splits) of what is unpacked at a time."""
    plan = block.plan
    each = np.dtype(block.facts["attend_block"]["type"]).itemsize * (
        plan.k.channels + plan.v.channels
    )
    most = max(1, SCRATCH_BYTES // (each * size * batch * plan.k.heads))
    last = max(first + 1, ceil_div(stop, size))
    return [(at, min(most, last - at)) for at in range(first, last, most)]


def _queries_at_once(block: Block, batch: int, parts: int) -> int:
    """Return how many queries of each row one launch may take."""
    row = 4 * parts * (block.plan.v.channels + 2)
    most = PARTIAL_BYTES // (row * batch * block.plan.q_heads)
    return max(LEAST_QUERIES, min(MOST_QUERIES, most))


def _unpack(block: Block, length: Ints, queries: int, size: int, part: int, splits: int) -> Plain:
    """Return the tokens of some splits as plain numbers; those past all rows are left out."""
    plan, tile = block.plan, block.facts["attend_block"]["tokens"]
    first = part * size
    count = tile * max(1, ceil_div(min(splits * size, int(length.max()) - first), tile))
    groups = len(length) * plan.k.heads
    arrays: dict[str, Any] = {}
    for stream in (plan.k, plan.v):
        numbers = groups * count * stream.channels
        words = numbers * np.dtype(block.facts["attend_block"]["type"]).itemsize // 4
        arrays[f"{stream.role}_plain"] = block.memory.empty((words,))
        arrays[f"{stream.role}_power"] = block.memory.empty((groups * count // tile,))
    values = {**block.values, **arrays, "length_of": length}
    values |= {"first": first, "count": count, "queries": queries}
    block.call("unpack", (count // tile, groups, 2), values)
    return Plain(first, count, part, splits, arrays)


class _Queries:
    """Queries of one launch, and their results so far."""

    def __init__(
        self, block: Block, q: Tensor, length: Ints, spans: Sequence[tuple[int, int]]
    ) -> None:
        plan, facts = block.plan, block.facts
        batch, _, self._count, _ = q.shape
        self._block = block
        self._shape = tuple(q.shape[:3])
        self._groups, needed = batch * plan.k.heads, self._count * plan.group
        self._tiles = ceil_div(needed, facts["attend_block"]["rows"])
        rows = self._tiles * facts["attend_block"]["rows"]
        parts = sum(spans[-1])
        values = {**block.values, **block.buffers(self._groups * rows, parts)}
        values |= {"q": q, "length_of": length, "rows": rows, "queries": self._count}
        values |= {name: facts[name] for name in SPLITS}
        self._values = values | {"parts": parts, "splits": parts, "alone": 0}
        grid = (self._groups, ceil_div(needed, facts["rows"]["prepare"]))
        block.call("prepare", grid, self._values)

    def attend(self, plain: Plain, size: int) -> None:
        """Attend to what is there as plain numbers."""
        place = {"first": plain.first, "count": plain.count, "split": size, "part": plain.part}
        values = {**self._values, **plain.arrays, **place}
        self._block.call("attend_block", (self._groups, plain.splits, self._tiles), values)

    def skip(self, plain: Plain, parts: int) -> None:
        """Note that no query sees the first parts: splits of no tokens."""
        values = {**self._values, **plain.arrays, "first": 0, "count": 0, "split": 0, "part": 0}
        self._block.call("attend_block", (self._groups, parts, self._tiles), values)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp."""
        block, empty = self._block, self._block.memory.empty
        out, lse = empty((*self._shape, block.plan.v.channels)), empty(self._shape)
        needed = self._count * block.plan.group
        grid = (self._groups, ceil_div(needed, block.facts["rows"]["combine"]))
        block.call("combine", grid, {**self._values, "out": out, "lse": lse})
        return out, lse


def ceil_div(count: int, size: int) -> int:
    """Return how many pieces of a size hold so many."""
    return -(-count // size)
