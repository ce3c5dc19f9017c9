"""Runs the kernels of the targets cuda and hip on tensors of torch.

Nothing here waits for the device: what append and encode refuse is raised by `check`, which reads a
flag. A `Launcher` starts kernels, so the same code runs binaries through the driver and, in tests,
the kernels' source through Triton's interpreter.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from ctypes import c_int64
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import KvantError
from ..ir.halves import TILE, whole_tiles
from ..ir.layouts import PageLayout
from ..ir.plan import AttentionPlan
from .arguments import constant_arguments, stream_values
from .launch_block import SPLITS, Block, ceil_div
from .launch_block import attend as attend_block
from .launcher import Grid, Launcher, Prepared, refuse_capture
from .memory import Memory, TorchMemory
from .stream import Ints, New, Pair, Span, Steps, Stream

Array = NDArray[Any]
Tensor: TypeAlias = Any


class Kernels:
    """Implements `stream.Kernels` on a device.

    Args:
        plans: one per layer.
        constants: one mapping per layer, arrays by the names that the plan's maps use.
        keys: one per layer; layers of equal plans share a key.
        launches: by key, what launch.json says.
        launcher: what starts kernels.
        memory: of the device.
    """

    def __init__(
        self,
        plans: Sequence[AttentionPlan],
        constants: Sequence[Mapping[str, Array]],
        keys: Sequence[str],
        launches: Mapping[str, Mapping[str, Any]],
        launcher: Launcher,
        memory: TorchMemory,
    ) -> None:
        self._plans, self._keys = tuple(plans), tuple(keys)
        self._launches, self._launcher, self._memory = launches, launcher, memory
        self._constants = [
            {name: memory.place(array) for name, array in constant_arguments(plan, own).items()}
            for plan, own in zip(plans, constants, strict=True)
        ]

    @property
    def memory(self) -> Memory:
        """See `stream.Kernels`."""
        return self._memory

    def only(self, layer: int) -> "Kernels":
        """Return the kernels of one layer, as layer 0."""
        one = copy(self)
        one._plans, one._keys = (self._plans[layer],), (self._keys[layer],)
        one._constants = [self._constants[layer]]
        return one

    def layouts(self, layer: int) -> tuple[PageLayout, PageLayout]:
        """Return the layouts that the kernels were compiled for."""
        plan, (k, v) = self._plans[layer], self._launch_facts(layer)["layouts"]
        return replace(plan.k.page_layout(), kind=k), replace(plan.v.page_layout(), kind=v)

    def update(self, layer: int, streams: Pair, new: New | None, due: tuple[Span, Span]) -> None:
        """Store and encode in one launch; see `stream.Kernels`. What it cannot, `check` refuses."""
        refuse_capture(self._launcher, "append of a layer")
        k, v = streams
        tokens = 0 if new is None else new.k.shape[2]
        grid, encodes = self.append_grid(layer, len(k.length), tokens, _most(due[0]), _most(due[1]))
        if not grid[0] * grid[1]:
            return
        values = _stream_values(k) | _stream_values(v) | self._constants[layer]
        values |= {"before": k.length, "tokens": tokens} | encodes
        none = np.zeros(len(k.length), np.int64)
        values |= {"first": none, "count": none} | self.new_tokens(layer, k.tail, v.tail)
        if new is not None:
            values |= {"first": new.first, "count": new.count}
            values |= self.new_tokens(layer, new.k, new.v)
        for stream, (begin, end) in zip(streams, due, strict=True):
            role = stream.plan.role
            values |= {f"{role}_begin": begin, f"{role}_end": end, f"{role}_bad": stream.bad}
        self._call(layer, "append", grid, values)

    def new_tokens(self, layer: int, k: Tensor, v: Tensor) -> dict[str, Any]:
        """Return what append is given of new tokens: float32, bfloat16 or float16, as they are."""
        types = self._launch_facts(layer)["append"]["types"]
        of = {role: types[_name(x.dtype)] for role, x in (("k", k), ("v", v))}
        return {"k_x": k, "k_type": of["k"], "v_x": v, "v_type": of["v"]}

    def append_grid(
        self, layer: int, batch: int, tokens: int, k_due: int, v_due: int
    ) -> tuple[Grid, dict[str, int]]:
        """Return the grid of append, and the two numbers that say which program does what.

        Args:
            layer: index.
            batch: rows.
            tokens: new ones of each row.
            k_due: keys to encode of a row, at most.
            v_due: values to encode of a row, at most.
        """
        facts = self._launch_facts(layer)["append"]
        k, v = (
            facts[role]["programs"] * ceil_div(most, facts[role]["tokens"])
            for role, most in (("k", k_due), ("v", v_due))
        )
        programs = int(k + v) + 2 * ceil_div(tokens, facts["rows"])
        grid = programs, batch * self._plans[layer].k.heads, 1
        return grid, {"k_encodes": k, "v_encodes": v}

    def steps(self, layer: int, streams: Pair) -> Steps | None:
        """Return None: nothing is faster here than `update`."""
        return None

    def attend(self, layer: int, q: Tensor, k: Stream, v: Stream) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp; see `stream.Kernels`."""
        refuse_capture(self._launcher, "attend over a layer")
        if q.shape[2] == 1:
            return self._attend(layer, q.contiguous(), k, v)
        plan = self._plans[layer]
        block = Block(
            plan,
            self._launch_facts(layer),
            self._memory,
            _stream_values(k) | _stream_values(v) | self._constants[layer],
            partial(self._call, layer),
            partial(self._buffers, plan),
        )
        return attend_block(block, q, k.length)

    def _splits(self, layer: int, length: Ints) -> int:
        sink, size = self._plans[layer].k.tokens.sink, self._launch_facts(layer)["split_tokens"]
        return max(1, ceil_div(int(length.max()) - sink, size))

    def _attend(self, layer: int, q: Tensor, k: Stream, v: Stream) -> tuple[Tensor, Tensor]:
        """Attend one query of each row."""
        plan, facts = self._plans[layer], self._launch_facts(layer)
        batch, heads, queries, _ = q.shape
        tiles, rows = self.tiles_of_one(layer), self.rows_of_one(layer)
        groups = batch * plan.k.heads
        splits, parts = self.parts(layer, k.length, np.minimum(k.encoded, v.encoded))
        empty = self._memory.empty
        out = empty((batch, heads, queries, plan.v.channels))
        lse = empty((batch, heads, queries))
        values = _stream_values(k) | _stream_values(v) | self._constants[layer]
        values |= {"q": q, "length_of": k.length, "out": out, "lse": lse}
        values |= self._buffers(plan, groups * rows, parts)
        values |= {"splits": splits, "parts": parts, "rows": rows, "queries": queries}
        values |= {name: facts[name] for name in SPLITS} | {"alone": 1}
        self._call(layer, "prepare", (groups, tiles[0]), values)
        self._call(layer, "attend", (groups, parts, tiles[1]), values)
        self._call(layer, "combine", (groups, tiles[2]), values)
        return out, lse

    def parts(self, layer: int, length: Ints, encoded: Ints) -> tuple[int, int]:
        """Return how many splits one query a row has, and how many parts with what these leave.

        Args:
            layer: index.
            length: int64[B], tokens of each row.
            encoded: int64[B], end of what is encoded, as keys and as values.
        """
        plan, facts = self._plans[layer], self._launch_facts(layer)
        if not facts["rest_tokens"]:
            splits = self._splits(layer, length)
            return splits, splits
        begin, end = whole_tiles(length, encoded, plan.k.tokens.sink, plan.window)
        whole = np.maximum(end - begin, 0)
        seen = length if plan.window is None else np.minimum(length, plan.window)
        # A row with fewer tiles may have more splits: the rule is that of each row alone.
        splits = max(_splits_of(tiles, facts) for tiles in (whole // TILE).tolist())
        rest = max(1, ceil_div(int((seen - whole).max()), facts["rest_tokens"]))
        return splits, splits + rest

    def key_of(self, layer: int) -> str:
        """Return which kernels a layer has: equal for layers of the same plan."""
        return self._keys[layer]

    def most_parts(self, layer: int, length: int, raw: int) -> tuple[int, int]:
        """Return the most that `parts` may return for rows of up to some length.

        Args:
            layer: index.
            length: tokens of a row, at most.
            raw: tokens that are not encoded, at most, beside the sink.
        """
        plan, facts = self._plans[layer], self._launch_facts(layer)
        if not facts["rest_tokens"]:
            splits = self._splits(layer, np.array([length]))
            return splits, splits
        seen = length if plan.window is None else min(length, plan.window)
        splits = min(facts["most_splits"], ceil_div(seen // TILE, facts["least_tiles"]))
        # Tiles that are cut at both ends, and one that is cut at both.
        rest = min(seen, plan.k.tokens.sink + raw + 3 * TILE)
        return splits, splits + max(1, ceil_div(rest, facts["rest_tokens"]))

    def _buffers(self, plan: AttentionPlan, rows: int, parts: int) -> dict[str, Tensor]:
        """Return memory for the queries of all rows, and for their results of each part."""
        empty = self._memory.empty
        return {
            "query": empty((rows * plan.k.channels,)),
            # Integers of at most 16 bits each, and what one is worth.
            "query_codes": empty((ceil_div(rows * plan.k.channels, 2),)),
            "query_halves": empty((ceil_div(rows * plan.k.channels, 2),)),
            "query_step": empty((rows,)),
            "part_out": empty((rows * parts * plan.v.channels,)),
            "part_max": empty((rows * parts,)),
            "part_sum": empty((rows * parts,)),
        }

    @property
    def launcher(self) -> Launcher:
        """What starts kernels."""
        return self._launcher

    @property
    def torch_memory(self) -> TorchMemory:
        """Where arrays are."""
        return self._memory

    def facts(self, layer: int) -> Mapping[str, Any]:
        """Return what launch.json says of a layer's kernels."""
        return self._launch_facts(layer)

    def prepared(
        self, layer: int, kernel: str, values: Mapping[str, Any], changing: Sequence[str] = ()
    ) -> Prepared:
        """Return a kernel with the arguments that stay.

        Args:
            layer: index.
            kernel: its name.
            values: by name, beside the layer's constants.
            changing: names of tensors that are given at each start.
        """
        key, given = self._keys[layer], self._constants[layer] | dict(values)
        specs = [spec.partition(":") for spec in self._launches[key]["kernels"][kernel]]
        types = {name: dtype for name, _, dtype in specs}
        given |= {name: self._memory.nothing(types[name]) for name in changing}
        arguments = [self._stays(given[name], dtype) for name, _, dtype in specs]
        names = list(types)
        return self._launcher.prepare(
            key, kernel, arguments, [names.index(name) for name in changing]
        )

    def _stays(self, value: Any, dtype: str) -> Any:
        """Return an argument that stays: a tensor as the kernel's type, a number, or a cell."""
        if dtype:
            return self._memory.view(value, dtype)
        return value if isinstance(value, c_int64) else int(value)

    def rows_of_one(self, layer: int) -> int:
        """Return the rows of the tiles that one query of all heads of a group takes."""
        size = int(self._launch_facts(layer)["rows"]["attend"])
        return size * ceil_div(self._plans[layer].group, size)

    def tiles_of_one(self, layer: int) -> tuple[int, int, int]:
        """Return how many tiles of heads prepare, attend and combine have for one query."""
        rows, group = self._launch_facts(layer)["rows"], self._plans[layer].group
        prepare, attend, combine = (rows[name] for name in ("prepare", "attend", "combine"))
        return ceil_div(group, prepare), ceil_div(group, attend), ceil_div(group, combine)

    def scratch(self, layer: int, batch: int, parts: int) -> dict[str, Tensor]:
        """Return memory for what the kernels of one query a row leave for one another."""
        plan = self._plans[layer]
        return self._buffers(plan, batch * plan.k.heads * self.rows_of_one(layer), parts)

    def check(self, streams: Sequence[Stream]) -> None:
        """Wait for the device, and refuse what append or encode could not store.

        Raises: KvantError "non-finite" or "scale-overflow".
        """
        found = self._memory.fetch(self._memory.flat([stream.bad for stream in streams]))
        if not found.any():
            return
        for stream in streams:
            stream.bad[...] = 0
        at = 0
        for number, stream in enumerate(streams):
            own = found[at : at + 2 * stream.bad.shape[1]].reshape(2, -1)
            if own.any():
                raise _refusal(number // 2, stream, own)
            at += own.size

    def _call(
        self, layer: int, kernel: str, grid: Sequence[int], values: Mapping[str, Any]
    ) -> None:
        key = self._keys[layer]
        specs = self._launches[key]["kernels"][kernel]
        values = self._sent(specs, values)
        arguments = [self._argument(spec, values) for spec in specs]
        whole = (*grid, 1, 1)[:3]
        self._launcher.launch(key, kernel, (whole[0], whole[1], whole[2]), arguments)

    def _sent(self, specs: Sequence[str], values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the values with those of a kernel's that are on the host sent in one copy."""
        given = {name: values[name] for name in (spec.partition(":")[0] for spec in specs)}
        host = {name: x for name, x in given.items() if isinstance(x, np.ndarray)}
        return {
            **given,
            **dict(zip(host, self._memory.place_all(tuple(host.values())), strict=True)),
        }

    def _argument(self, spec: str, values: Mapping[str, Any]) -> Any:
        """Return one argument; arrays of the host are sent when a kernel asks for them."""
        name, _, dtype = spec.partition(":")
        value = values[name]
        if not dtype:
            return int(value)
        if isinstance(value, np.ndarray):
            value = self._memory.place(value)
        return self._memory.view(value, dtype)

    def _launch_facts(self, layer: int) -> Mapping[str, Any]:
        return self._launches[self._keys[layer]]


def _stream_values(stream: Stream) -> dict[str, Any]:
    """Return a stream's arguments; of its table only the columns in use."""
    used = 1 + int(np.flatnonzero((stream.table >= 0).any(axis=0)).max(initial=0))
    role, table = stream.plan.role, stream.table[:, :used].copy()
    return stream_values(stream) | {f"{role}_table": table, f"{role}_max_pages": used}


def _splits_of(tiles: int, facts: Mapping[str, Any]) -> int:
    """Return how many splits some whole tiles have; `gpu_whole.write_tiles` has the same rule."""
    return ceil_div(tiles, max(ceil_div(tiles, facts["most_splits"]), facts["least_tiles"]))


@cache
def _name(dtype: Any) -> str:
    """Return NumPy's name of a type of torch."""
    return str(dtype).removeprefix("torch.")


def _most(span: Span) -> int:
    """Return the most positions of a row in [begin, end)."""
    begin, end = span
    return int((end - begin).max(initial=0))


def _refusal(layer: int, stream: Stream, found: Ints) -> KvantError:
    """Return the first refusal of a stream's flags, int64[2, B H]: of append, then of encode."""
    kernel = int(np.flatnonzero(found.any(axis=1))[0])
    place = int(np.flatnonzero(found[kernel])[0])
    row, head = divmod(place, stream.plan.heads)
    role = stream.plan.role
    if kernel == 0:
        return KvantError(
            "non-finite",
            f"{role} was NaN or infinite in {stream.plan.tokens.raw.dtype} after its maps, row "
            f"{row}, head {head}, token {int(found[kernel, place]) - 1} of those given",
            where=f"layer {layer}, an append since the last check",
            fix="find out why the model gave such values; the cache must be reset",
        )
    return KvantError(
        "scale-overflow",
        f"a scale or value of {role} did not fit its type, row {row}, head {head}",
        where=f"layer {layer}, an encode since the last check",
        fix="store scales as bf16 or f32, or rotate or scale the channels first; the cache must be "
        "reset",
    )
