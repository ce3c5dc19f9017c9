"""Runs the kernels of the targets cuda and hip on tensors of torch.

Nothing here waits for the device: what append and encode refuse is raised by `check`, which reads a
flag. A `Launcher` starts kernels, so the same code runs binaries through the driver and, in tests,
the kernels' source through Triton's interpreter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import KvantError
from ..ir.halves import TILE, whole_tiles
from ..ir.layouts import PageLayout
from ..ir.plan import AttentionPlan
from .arguments import constant_arguments, stream_values
from .memory import Memory, TorchMemory
from .stream import Ints, Pair, Steps, Stream

Array = NDArray[Any]
Tensor: TypeAlias = Any
Grid: TypeAlias = tuple[int, int, int]

MOST_QUERIES, LEAST_QUERIES = 1024, 16
"""Queries of one launch, at most and at least."""
PARTIAL_BYTES = 256 << 20
"""What the partial results of one launch may take, where that leaves LEAST_QUERIES."""


class Launcher(Protocol):
    """Starts kernels."""

    def launch(self, key: str, kernel: str, grid: Grid, arguments: Sequence[Any]) -> None:
        """Start a kernel of plan `key` on torch's current stream; numbers are int64."""


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

    def layouts(self, layer: int) -> tuple[PageLayout, PageLayout]:
        """Return the layouts that the kernels were compiled for."""
        plan, (k, v) = self._plans[layer], self._launch_facts(layer)["layouts"]
        return replace(plan.k.page_layout(), kind=k), replace(plan.v.page_layout(), kind=v)

    def append(self, layer: int, stream: Stream, x: Tensor, first: Ints, count: Ints) -> None:
        """Map and store new tokens; see `stream.Kernels`. What is not finite, `check` refuses."""
        batch, heads, tokens, _ = x.shape
        if not batch or not tokens:
            return
        values = _stream_values(stream) | self._constants[layer]
        values |= {"x": x, "first": first, "count": count, "bad": stream.bad[0], "tokens": tokens}
        tile = self._launch_facts(layer)["tokens"]["append"]
        self._call(
            layer, f"append_{stream.plan.role}", (_tiles(tokens, tile), batch * heads), values
        )

    def steps(self, layer: int, streams: Pair) -> Steps | None:
        """Return None: nothing is faster here than `append` and `encode`."""
        return None

    def encode(self, layer: int, stream: Stream, begin: Ints, end: Ints) -> None:
        """Encode positions [begin, end) into pages; see `stream.Kernels`."""
        batch, most = len(begin), int((end - begin).max(initial=0))
        if most <= 0:
            return
        name = f"encode_{stream.plan.role}"
        values = _stream_values(stream) | {"begin": begin, "end": end, "bad": stream.bad[1]}
        tile = self._launch_facts(layer)["tokens"][name]
        self._call(layer, name, (_tiles(most, tile), batch * stream.plan.heads), values)

    def attend(self, layer: int, q: Tensor, k: Stream, v: Stream) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp; see `stream.Kernels`."""
        queries = q.shape[2]
        parts, step = [], self._queries_at_once(layer, k, q.shape[0])
        for begin in range(0, queries, step):
            end = min(queries, begin + step)
            # These are the last queries of a row that ends where they end.
            length = k.length - (queries - end)
            own = q[:, :, begin:end].contiguous()
            parts.append(self._attend(layer, own, k, v, length, alone=queries == 1))
        if len(parts) == 1:
            return parts[0]
        outs, lses = zip(*parts, strict=True)
        return self._memory.join(outs), self._memory.join(lses)

    def _queries_at_once(self, layer: int, k: Stream, batch: int) -> int:
        """Return how many queries of each row one launch may take."""
        plan = self._plans[layer]
        row = 4 * self._splits(layer, k.length) * (plan.v.channels + 2)
        most = PARTIAL_BYTES // (row * batch * plan.q_heads)
        return max(LEAST_QUERIES, min(MOST_QUERIES, most))

    def _splits(self, layer: int, length: Ints) -> int:
        sink, size = self._plans[layer].k.tokens.sink, self._launch_facts(layer)["split_tokens"]
        return max(1, _tiles(int(length.max()) - sink, size))

    def _attend(
        self, layer: int, q: Tensor, k: Stream, v: Stream, length: Ints, *, alone: bool
    ) -> tuple[Tensor, Tensor]:
        """Attend the queries of one launch; `alone`: one query a row, and all that was asked."""
        plan, facts = self._plans[layer], self._launch_facts(layer)
        batch, heads, queries, _ = q.shape
        needed = queries * plan.group
        kernel = "attend" if alone else "attend_block"
        tiles = _tiles(needed, facts["rows"][kernel])
        rows = tiles * facts["rows"][kernel]
        groups = batch * plan.k.heads
        splits, rest = self._splits(layer, length), 0
        if alone and facts["rest_tokens"]:
            splits, rest = self._parts_of_tiles(layer, k, v)
        grid = (groups, splits + rest, tiles)
        empty = self._memory.empty
        out = empty((batch, heads, queries, plan.v.channels))
        lse = empty((batch, heads, queries))
        values = _stream_values(k) | _stream_values(v) | self._constants[layer]
        values |= {"q": q, "length_of": length, "out": out, "lse": lse}
        values |= self._buffers(plan, groups * rows, splits + rest)
        values |= {"splits": splits, "parts": splits + rest, "rows": rows, "queries": queries}
        self._call(layer, "prepare", (groups, _tiles(needed, facts["rows"]["prepare"])), values)
        self._call(layer, kernel, grid, values)
        self._call(layer, "combine", (groups, _tiles(needed, facts["rows"]["combine"])), values)
        return out, lse

    def _parts_of_tiles(self, layer: int, k: Stream, v: Stream) -> tuple[int, int]:
        """Return how many splits the whole tiles have, and how many parts what they leave."""
        window, facts = self._plans[layer].window, self._launch_facts(layer)
        begin, end = whole_tiles(k.length, np.minimum(k.encoded, v.encoded), k.sinks, window)
        seen = k.length if window is None else np.minimum(k.length, window)
        rest = seen - np.maximum(end - begin, 0)
        last = np.where(end > begin, end - k.sinks, 0)
        tokens = np.maximum(TILE * -(-last // (facts["most_splits"] * TILE)), facts["split_tokens"])
        return int((-(-last // tokens)).max()), _tiles(int(rest.max()), facts["rest_tokens"])

    def _buffers(self, plan: AttentionPlan, rows: int, parts: int) -> dict[str, Tensor]:
        """Return memory for the queries of all rows, and for their results of each part."""
        empty = self._memory.empty
        return {
            "query": empty((rows * plan.k.channels,)),
            # Integers of at most 16 bits each, and what one is worth.
            "query_codes": empty((_tiles(rows * plan.k.channels, 2),)),
            "query_step": empty((rows,)),
            "part_out": empty((rows * parts * plan.v.channels,)),
            "part_max": empty((rows * parts,)),
            "part_sum": empty((rows * parts,)),
        }

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
        arguments = [
            self._argument(spec, values) for spec in self._launches[key]["kernels"][kernel]
        ]
        whole = (*grid, 1, 1)[:3]
        self._launcher.launch(key, kernel, (whole[0], whole[1], whole[2]), arguments)

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


def _tiles(count: int, size: int) -> int:
    return -(-count // size)


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
