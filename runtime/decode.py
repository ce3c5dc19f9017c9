"""Decode steps on a device: one new token a row in every layer.

Between two steps little changes: every row is one token longer, and now and then a page is taken.
So the host counts once a step for all layers that count alike (`counts.py`), sends what it counted
in one small copy (`board.py`), and starts kernels whose arguments stay (`launch_step.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..ir.errors import KvantError
from .board import open_board
from .bound import are_still
from .counts import (
    Counts,
    counted_alike,
    make_tails,
    most_encoded,
    most_waiting,
    next_counts,
    settle,
    take_pages_alike,
)
from .launch_gpu import Kernels
from .launch_step import Cells, LayerStep, bind_step, made_of
from .launcher import Grid, refuse_capture
from .stream import Ints, Pair, drop_pages

if TYPE_CHECKING:
    from .cache import Layer

Tensor: TypeAlias = Any


@dataclass(slots=True)
class Group:
    """Layers that count alike.

    Attributes:
        members: their indices.
        rows: what the board has of them on the device, by name.
        counts: those of the step under way; none before the first.
        append: grid of the kernel.
        cells: what the kernels of all layers read as they start.
        parts: that a row may have; the grid of attend.
        room: parts for which there is scratch memory.
        scratch: what the kernels of attend leave for one another.
        lse: where combine leaves what nobody asked for.
    """

    members: tuple[int, ...]
    rows: dict[str, Tensor]
    counts: Counts | None = None
    append: Grid = (0, 0, 0)
    cells: Cells = field(default_factory=Cells)
    parts: int = 0
    room: int = 0
    scratch: dict[str, Tensor] = field(default_factory=dict)
    lse: Tensor = None


@dataclass(slots=True)
class Member:
    """A layer.

    Attributes:
        layer: its state in the cache.
        streams: k and v.
        group: of the layers that count alike.
        shapes: of one token's k, v, q and output.
        tables: by the names of arguments, tables of k and v on the device and their widths.
        tiles: of prepare, attend and combine for one query.
        state: what the layer's counts were when they were last seen.
        step: its launches, once there are any.
    """

    layer: "Layer"
    streams: Pair
    group: Group
    shapes: tuple[tuple[int, ...], ...]
    tables: dict[str, Any]
    tiles: tuple[int, int, int]
    state: tuple[object, ...]
    step: LayerStep | None = None

    @property
    def is_known(self) -> bool:
        """Whether nothing else has changed the layer's counts."""
        k, v = self.streams
        length, k_encoded, v_encoded = self.state
        return length is k.length and k_encoded is k.encoded and v_encoded is v.encoded

    def see(self) -> None:
        """Keep what is counted now."""
        k, v = self.streams
        self.state = k.length, k.encoded, v.encoded


class Decode:
    """One new token a row in every layer of a cache.

    A layer that anything else happens to is noticed: its arrays are no longer the ones that were
    counted on. Then `append` returns False, or `attend` None, and the caller goes the long way.

    Args:
        layers: of the cache.
        kernels: of its device.
        most: columns of the cache.
        reserved: `Cache.reserved`.
        tokens: of a row, for which addresses and grids are made once and stay; None: as needed.
    """

    def __init__(
        self,
        layers: Sequence["Layer"],
        kernels: Kernels,
        most: int,
        reserved: int,
        tokens: int | None = None,
    ) -> None:
        self.kernels, self.most, self.reserved, self.tokens = kernels, most, reserved, tokens
        self.waiting: set[int] = set()
        members = counted_alike(layers, [kernels.key_of(i) for i in range(len(layers))])
        streams = [stream for layer in layers for stream in layer.streams]
        widths = [stream.table.shape[1] for stream in streams]
        self._board = open_board(kernels.torch_memory, len(members), streams, widths)
        self._groups = [Group(own, self._board.rows(n)) for n, own in enumerate(members)]
        group_of = {i: group for group in self._groups for i in group.members}
        self.members = tuple(self._member(i, layer, group_of[i]) for i, layer in enumerate(layers))
        for group in self._groups:
            shape = self.members[group.members[0]].shapes[3][:3]
            group.lse = kernels.torch_memory.empty(shape)
            if tokens is not None:
                self._fix(group, tokens)

    def _member(self, index: int, layer: "Layer", group: Group) -> Member:
        tables: dict[str, Any] = {}
        for number, stream in enumerate(layer.streams, 2 * index):
            role = stream.plan.role
            tables[f"{role}_table"] = self._board.table(number)
            tables[f"{role}_max_pages"] = self._board.widths[number]
        tiles, k, v = self.kernels.tiles_of_one(index), layer.k, layer.v
        seen = k.length, k.encoded, v.encoded
        return Member(layer, layer.streams, group, _shapes(layer), tables, tiles, seen)

    @property
    def is_planned(self) -> bool:
        """Whether a step was counted, and its counts were sent."""
        return all(group.counts is not None for group in self._groups)

    def append(self, index: int, k: Tensor, v: Tensor) -> bool:
        """Append one token to a layer, [B, H, 1, D] each. Return whether it was done."""
        if not self.waiting and not self.advance():
            return False
        if index not in self.waiting or not self.members[index].is_known:
            return False
        self.launch_append(index, k, v)
        self.settle(index)
        return True

    def attend(self, index: int, q: object, wants_lse: bool) -> tuple[Tensor, Tensor] | None:
        """Return output, of the type of q, and log-sum-exp of the newest token's queries, or none.

        Args:
            index: of the layer.
            q: [B, Hq, 1, D] where not none is wanted.
            wants_lse: whether the latter may be kept.
        """
        if not self.is_planned or index in self.waiting or not self.members[index].is_known:
            return None
        x = self.read(index, 2, q)
        if x is None:
            return None
        refuse_capture(self.kernels.launcher, "attend over a layer")
        return self.launch_attend(index, x, wants_lse)

    def advance(self) -> bool:
        """Count the next token of every row, and send the counts; nothing of them counts yet.

        Returns: whether that can be done: all layers are where they were left, and there is room.
        Raises: KvantError "graph-capture", "cache-full" of a pool, "out-of-memory".
        """
        refuse_capture(self.kernels.launcher, "append of a layer")
        ready = all(member.is_known for member in self.members)
        if not ready or self.members[0].layer.columns.length >= self.most:
            return False
        taken = []
        try:
            for number, group in enumerate(self._groups):
                taken += self._count(number, group)
        except BaseException:
            # What was counted was not sent: until the next step is, all go the long way.
            for group in self._groups:
                group.counts = None
            for member in self.members:
                for stream in member.streams:
                    drop_pages(stream)
            raise
        self._board.send(taken)
        self.waiting = set(range(len(self.members)))
        return True

    def settle(self, index: int) -> None:
        """Let the new token of a layer count."""
        member = self.members[index]
        if member.group.counts is not None:
            settle(member.layer, member.group.counts)
            member.see()
            self.waiting.discard(index)

    def launch_append(self, index: int, k: Tensor, v: Tensor) -> None:
        """Start what stores the new token of a layer and encodes what is due."""
        member = self.members[index]
        group, step = member.group, member.step
        if (
            step is None
            or step.types != (k.dtype, v.dtype)
            or not are_still(step.made_of, made_of(member.streams, group.scratch))
        ):
            given = {**group.rows, **member.tables, **group.cells.named()}
            step = member.step = bind_step(
                self.kernels, index, member.streams, (k, v), given, group.scratch
            )
        step.append.start(group.append, self.kernels.launcher.stream(), k, v)

    def launch_attend(self, index: int, q: Tensor, wants_lse: bool) -> tuple[Tensor, Tensor]:
        """Start what attends; return output and log-sum-exp, [B, Hq, 1, Dv] and [B, Hq, 1].

        The same layer's append was launched before. The log-sum-exp of all calls that do not want
        it is one tensor.
        """
        member = self.members[index]
        group, step, shape = member.group, member.step, member.shapes[3]
        if step is None:
            raise _not_appended(index)
        x, dtype = q, q.dtype
        if dtype is not group.lse.dtype:
            x = q.float()
        out = x.new_empty(shape)
        lse = x.new_empty(shape[:3]) if wants_lse else group.lse
        stream, heads, tiles = self.kernels.launcher.stream(), group.append[1], member.tiles
        step.prepare.start((heads, tiles[0], 1), stream, x)
        step.attend.start((heads, group.parts, tiles[1]), stream)
        step.combine.start((heads, tiles[2], 1), stream, out, lse)
        return (out if x is q else out.to(dtype)), lse

    def read(self, index: int, what: int, value: object) -> Tensor | None:
        """Return k, v or q (0, 1, 2) of a layer's one token as kernels take it, or none.

        None is what is no plain tensor of this device, or has another shape.
        """
        return self.kernels.torch_memory.read_plain(value, self.members[index].shapes[what])

    def _count(self, number: int, group: Group) -> list[Any]:
        """Count for a group of layers, make room, and write its part of the board."""
        members = [self.members[i] for i in group.members]
        counts = next_counts(members[0].layer, self.reserved)
        taken = []
        for role in (0, 1):
            streams = [member.streams[role] for member in members]
            make_tails(streams, counts.length, stay=self.tokens is not None)
            new = take_pages_alike(streams, counts.begin[role], counts.end[role])
            taken += [(2 * group.members[n] + role, row, i, page) for n, row, i, page in new]
        group.counts = counts
        self._size(group, counts)
        self._board.write(number, _numbers(counts, members[0].streams))
        return taken

    def _size(self, group: Group, counts: Counts) -> None:
        """Choose the grids of a step; those for a capacity were chosen before."""
        if self.tokens is not None:
            return
        index = group.members[0]
        k, v = (
            int((end - begin).max()) for begin, end in zip(counts.begin, counts.end, strict=True)
        )
        encoded = np.minimum(*counts.end)
        self._set(group, (k, v), self.kernels.parts(index, counts.length, encoded))

    def _fix(self, group: Group, tokens: int) -> None:
        """Choose grids and scratch memory for any of so many steps."""
        index = group.members[0]
        streams = self.members[index].streams
        length = int(streams[0].length.max()) + tokens
        k, v = (most_encoded(stream.plan.tokens) for stream in streams)
        raw = max(most_waiting(stream, self.reserved) for stream in streams)
        self._set(group, (k, v), self.kernels.most_parts(index, length, raw))

    def _set(self, group: Group, due: tuple[int, int], parts: tuple[int, int]) -> None:
        """Set the grids of a group, and make scratch memory where there is too little.

        Args:
            group: layers.
            due: tokens of a row to encode, at most, of k and of v.
            parts: splits of a row, and its parts with what these leave.
        """
        index, cells = group.members[0], group.cells
        batch = self.members[index].shapes[0][0]
        group.append, encodes = self.kernels.append_grid(index, batch, 1, *due)
        group.parts = parts[1]
        cells.k_encodes.value, cells.v_encodes.value = encodes["k_encodes"], encodes["v_encodes"]
        cells.splits.value, cells.parts.value = parts
        if group.parts > group.room:
            group.room = group.parts if self.tokens is not None else 2 * group.parts
            group.scratch = self.kernels.scratch(index, batch, group.room)


def open_decode(
    layers: Sequence["Layer"], kernels: object, most: int, reserved: int
) -> Decode | None:
    """Return the decode steps that may follow on a device, or none: elsewhere, or torn layers."""
    if not isinstance(kernels, Kernels) or len({layer.columns.length for layer in layers}) > 1:
        return None
    return Decode(layers, kernels, most, reserved)


def _numbers(counts: Counts, streams: Pair) -> dict[str, Ints]:
    """Return the rows of a board; see `board.ROWS`."""
    values = {name: getattr(counts, name) for name in ("first", "count", "before", "length")}
    for stream, begin, end in zip(streams, counts.begin, counts.end, strict=True):
        role = stream.plan.role
        values |= {f"{role}_begin": begin, f"{role}_encoded": end}
        values[f"{role}_tail_first"] = stream.tail_first
    return values


def _not_appended(index: int) -> KvantError:
    return KvantError(
        "not-planned",
        "attend of a decode step before its append",
        where=f"layer {index}, attend",
        fix="append the token's keys and values to the layer first",
    )


def _shapes(layer: "Layer") -> tuple[tuple[int, ...], ...]:
    """Return the shapes of one token's k, v, q and output."""
    batch, plan = len(layer.k.length), layer.plan
    sizes = (
        (plan.k.heads, plan.k.channels),
        (plan.v.heads, plan.v.channels),
        (plan.q_heads, plan.k.channels),
        (plan.q_heads, plan.v.channels),
    )
    return tuple((batch, heads, 1, channels) for heads, channels in sizes)
