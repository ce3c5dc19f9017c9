"""Runs the compiled kernels of the target cpu; needs tvm-ffi alone.

The library is loaded from bytes that were verified before, through a sealed memory file, and only
if this machine has what it needs. No arithmetic here: arrays are handed over as they lie in memory.
"""

import fcntl
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import KvantError
from ..ir.layouts import PageLayout
from ..ir.plan import AttentionPlan
from .arguments import constant_arguments, stream_values
from .bound import argument, bound_calls, bound_steps
from .machine import this_machine, why_not
from .memory import HOST, Memory
from .stream import Floats, Ints, New, Pair, Span, Steps, Stream, update_in_turn

Array = NDArray[Any]

# Queries of one launch: the partial results of more would not stay in the caches.
MOST_QUERIES = 128

# Bytes of a line of the caches.
LINE = 64

# Parts of attend for each thread, at least: so that all of them end at about the same time.
PARTS_OF_A_THREAD = 4

# Numbers of k or v that one call of the kernel step stores on one thread, at most: that takes some
# tens of microseconds.
MOST_STEP = 8192

# What changes of each row with every call of a kernel, in the order of `BoundKernel.rows`.
_ATTEND_ROWS = ("length_of", "k_encoded", "k_tail_first", "v_encoded", "v_tail_first")


@dataclass(slots=True)
class Library:
    """One loaded shared library.

    Attributes:
        functions: by kernel name.
        arguments: of each kernel, in order: "name:dtype" for arrays, "name" for int64.
        split_tokens: positions of one split.
        tile_queries: queries of one tile of attend_block.
        item_heads: KV heads that one part of attend takes at most, a divisor of all.
        layouts: kinds of the page layouts of k and v.
        decode: those of the functions that attend with one query a row, in order.
    """

    functions: dict[str, Callable[..., None]]
    arguments: dict[str, list[str]]
    split_tokens: int
    tile_queries: int
    item_heads: int
    layouts: tuple[str, str]
    decode: dict[str, Callable[..., None]] = field(init=False)

    def __post_init__(self) -> None:
        self.decode = {name: self.functions[name] for name in ("prepare", "attend", "combine")}

    def call(self, kernel: str, values: Mapping[str, Any]) -> None:
        """Call a kernel with arguments by name; an array is viewed as the dtype it asks for."""
        given = [argument(spec, values) for spec in self.arguments[kernel]]
        self.functions[kernel](*given)


def load_library(files: Mapping[str, bytes], where: str) -> Library:
    """Check the machine, then load.

    Args:
        files: "kernels.so" and "launch.json", verified.
        where: for messages.

    Raises: KvantError "machine-does-not-fit", "kernels-missing" or "kernels-not-loaded".
    """
    if not {"kernels.so", "launch.json"} <= files.keys():
        raise KvantError(
            "kernels-missing",
            f"no kernels.so or no launch.json; there are {', '.join(sorted(files)) or 'none'}",
            where=where,
            fix="compile the artifact again",
        )
    launch = json.loads(files["launch.json"])
    if not {"layouts", "item_heads"} <= launch.keys() or "step" not in launch.get("kernels", ()):
        raise KvantError(
            "kernels-missing",
            "launch.json lacks layouts, item_heads or the kernel step: an earlier version of kvant "
            "wrote it",
            where=where,
            fix="compile the artifact again",
        )
    reason = why_not(launch["facts"], this_machine())
    if reason is not None:
        raise KvantError(
            "machine-does-not-fit",
            f"the kernels do not run here: {reason}",
            where=where,
            fix="compile again on or for this machine, or load the target 'reference'",
        )
    module = _load(files["kernels.so"], where)
    return Library(
        {name: module[name] for name in launch["kernels"]},
        launch["kernels"],
        launch["split_tokens"],
        launch["tile_queries"],
        launch["item_heads"],
        tuple(launch["layouts"]),
    )


def _load(library: bytes, where: str) -> Any:
    """Load a shared library from memory that nobody can change any more."""
    # tvm-ffi would otherwise compile a helper for torch at import.
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    handle = os.memfd_create("kvant-kernels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        import tvm_ffi

        with open(handle, "wb", closefd=False) as file:
            file.write(library)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, seals)
        # NOTE: the loader takes a path it has seen before for the same library, and numbers of file
        # handles come back; so each library gets a path of its own.
        with tempfile.TemporaryDirectory(prefix="kvant-") as folder:
            link = Path(folder) / "kernels.so"
            link.symlink_to(f"/proc/self/fd/{handle}")
            return tvm_ffi.load_module(str(link))
    except (ImportError, OSError, RuntimeError) as error:
        raise KvantError(
            "kernels-not-loaded",
            f"the kernels could not be loaded: {str(error).splitlines()[-1]}",
            where=where,
            fix="see that apache-tvm-ffi is the version of the artifact, and /proc is mounted",
        ) from error
    finally:
        os.close(handle)


class _Scratch(threading.local):
    """Arrays between the kernels of one attend, kept for the next one; each thread has its own.

    NOTE: no __slots__ here: threads would share what is in a slot.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}

    def take(self, name: str, count: int, dtype: str) -> Array:
        """Return at least `count` elements; what is in them stays from the last call."""
        have = self.arrays.get(name)
        if have is None or have.size < count or have.dtype != dtype:
            # Kernels store whole vectors; one that lies in two lines takes twice as long.
            room = np.zeros(count * np.dtype(dtype).itemsize + LINE, np.uint8)
            first = -room.ctypes.data % LINE
            have = self.arrays[name] = room[first : first + room.size - LINE].view(dtype)
        return have


class Kernels:
    """Implements `stream.Kernels` with compiled kernels.

    Args:
        plans: one per layer.
        constants: one mapping per layer, arrays by the names that the plan's maps use.
        keys: one per layer; layers of equal plans share a key and a library.
        files: verified bytes, "<key>/kernels.so" and "<key>/launch.json".
    """

    memory: Memory = HOST

    def __init__(
        self,
        plans: Sequence[AttentionPlan],
        constants: Sequence[Mapping[str, Array]],
        keys: Sequence[str],
        files: Mapping[str, bytes],
    ) -> None:
        self._plans = tuple(plans)
        self._libraries = {
            key: load_library(_below(files, key), f"kernels of plan {key}")
            for key in dict.fromkeys(keys)
        }
        self._keys = tuple(keys)
        self._constants = [
            constant_arguments(plan, own) for plan, own in zip(plans, constants, strict=True)
        ]
        self._scratch = _Scratch()

    def layouts(self, layer: int) -> tuple[PageLayout, PageLayout]:
        """Return the layouts that the library was compiled for."""
        plan, (k, v) = self._plans[layer], self._library(layer).layouts
        own = plan.k.page_layout(), plan.v.page_layout()
        return replace(own[0], kind=k), replace(own[1], kind=v)

    def update(self, layer: int, streams: Pair, new: New | None, due: tuple[Span, Span]) -> None:
        """Store and encode; see `stream.Kernels`."""
        update_in_turn(self, layer, streams, new, due)

    def append(self, layer: int, stream: Stream, x: Floats, first: Ints, count: Ints) -> None:
        """Map and store new tokens; see `stream.Kernels.update`."""
        plan, batch = stream.plan, len(first)
        if not batch or not x.size:
            return
        bad = np.zeros(batch * plan.heads, np.int64)
        values = stream_values(stream) | self._constants[layer]
        values |= {"x": x, "first": first, "count": count, "bad": bad}
        values |= {"batch": batch, "tokens": x.shape[2]}
        self._library(layer).call(f"append_{plan.role}", values)
        if bad.any():
            row, head = divmod(int(np.flatnonzero(bad)[0]), plan.heads)
            token = int(bad[row * plan.heads + head]) - 1
            raise KvantError(
                "non-finite",
                f"{plan.role} is NaN or infinite in {plan.tokens.raw.dtype} after its maps, "
                f"row {row}, head {head}, token {token} of those given",
                where=f"layer {layer}, append",
                fix="find out why the model gave such values; nothing was stored",
            )

    def encode(self, layer: int, stream: Stream, begin: Ints, end: Ints) -> None:
        """Encode positions [begin, end) into pages; see `stream.Kernels.update`."""
        plan, batch = stream.plan, len(begin)
        bad = np.zeros(batch * plan.heads, np.int64)
        values = stream_values(stream) | {"begin": begin, "end": end, "bad": bad}
        if batch and bool((end > begin).any()):
            self._library(layer).call(f"encode_{plan.role}", values | {"batch": batch})
        if bad.any():
            row, head = divmod(int(np.flatnonzero(bad)[0]), plan.heads)
            raise KvantError(
                "scale-overflow",
                f"a scale or value of {plan.role} does not fit its type, row {row}, head {head}",
                where=f"layer {layer}, encode",
                fix="store scales as bf16 or f32, or rotate or scale the channels first",
            )

    def steps(self, layer: int, streams: Pair) -> Steps | None:
        """Return what appends one token a row in one call; see `stream.Kernels`."""
        (k, v), library, batch = streams, self._library(layer), len(streams[0].length)
        if batch * max(s.plan.elements_per_token for s in streams) > MOST_STEP:
            return None
        values = stream_values(k) | stream_values(v) | self._constants[layer] | {"batch": batch}
        return bound_steps(library.functions["step"], library.arguments["step"], values)

    def attend(self, layer: int, q: Floats, k: Stream, v: Stream) -> tuple[Floats, Floats]:
        """Return output and log-sum-exp; see `stream.Kernels`."""
        batch, heads, queries, _ = q.shape
        # The kernels write every number of both.
        out = np.empty((batch, heads, queries, v.plan.channels), np.float32)
        lse = np.empty((batch, heads, queries), np.float32)
        if not out.size:
            return out, lse
        if queries <= MOST_QUERIES:
            self._attend(layer, q, k, v, k.length, out, lse, decodes=queries == 1)
            return out, lse
        for begin in range(0, queries, MOST_QUERIES):
            part = slice(begin, min(queries, begin + MOST_QUERIES))
            some_out, some_lse = out[:, :, part].copy(), lse[:, :, part].copy()
            # These are the last queries of a row that ends where they end.
            length = k.length - (queries - part.stop)
            self._attend(layer, q[:, :, part], k, v, length, some_out, some_lse, decodes=False)
            out[:, :, part], lse[:, :, part] = some_out, some_lse
        return out, lse

    def check(self, streams: Sequence[Stream]) -> None:
        """Do nothing: append and encode refuse at once."""

    def _attend(
        self,
        layer: int,
        q: Floats,
        k: Stream,
        v: Stream,
        length: Ints,
        out: Floats,
        lse: Floats,
        *,
        decodes: bool,
    ) -> None:
        """Write out and lse; `decodes`: one query a row, else those of a block."""
        plan, library = self._plans[layer], self._library(layer)
        batch, _, queries, _ = q.shape
        longest = max(length.tolist()) - plan.k.tokens.sink
        splits = max(1, -(-longest // library.split_tokens))
        tiles = -(-queries // library.tile_queries)
        padded = 1 if decodes else tiles * library.tile_queries
        rows = padded * plan.group
        values: dict[str, Any] = {}
        values |= self._workspace(plan, batch * plan.k.heads * rows, splits)
        values |= {"q": q, "out": out, "lse": lse, "length_of": length, "batch": batch}
        values |= {"splits": splits, "rows": rows, "tiles": tiles, "queries": queries}
        if decodes:
            values["chunks"] = chunks_of(plan.k.heads, library.item_heads, batch * splits)
            self._attend_one(layer, k, v, values)
            return
        values |= stream_values(k) | stream_values(v) | self._constants[layer]
        for kernel in ("prepare", "attend_block", "combine"):
            library.call(kernel, values)

    def _attend_one(self, layer: int, k: Stream, v: Stream, values: dict[str, Any]) -> None:
        """Attend with one query a row, whose arguments are kept for the next token."""
        library, constants = self._library(layer), self._constants[layer]
        calls = bound_calls(library.decode, library.arguments, constants, _ATTEND_ROWS, k, v)
        values |= {name: values[name].reshape(-1) for name in ("q", "out", "lse")}
        rows = (values["length_of"], k.encoded, k.tail_first, v.encoded, v.tail_first)
        numbers = [number for row in rows for number in row.tolist()]
        for call in calls:
            call.rows[:] = numbers
            call(values)

    def _workspace(self, plan: AttentionPlan, rows: int, splits: int) -> dict[str, Array]:
        take, width = self._scratch.take, plan.k.channels
        codes = {None: "int8", 8: "int8", 16: "int16"}[plan.query_bits]
        return {
            "query": take("query", rows * width, "float32"),
            "q_codes": take(f"q_codes_{codes}", rows * width, codes),
            "q_step": take("q_step", rows, "float32"),
            "part_out": take("part_out", rows * splits * plan.v.channels, "float32"),
            "part_max": take("part_max", rows * splits, "float32"),
            "part_sum": take("part_sum", rows * splits, "float32"),
        }

    def _library(self, layer: int) -> Library:
        return self._libraries[self._keys[layer]]


def chunks_of(heads: int, most: int, items: int) -> int:
    """Return in how many chunks of heads `items` parts are cut, so that all threads have work.

    Whole rows of heads read memory in order, so there are no more chunks than that takes. The
    result has the same bits for any number.

    Args:
        heads: of keys and values.
        most: heads of a chunk at most.
        items: rows of the batch times splits.
    """
    threads = _threads()
    wanted = -(-PARTS_OF_A_THREAD * threads // items) if threads > 1 else 1
    least = max(heads // most, min(wanted, heads))
    return next(n for n in range(least, heads + 1) if heads % n == 0)


def _threads() -> int:
    """Return how many threads a kernel uses, about as `pool.c` counts them."""
    available = len(os.sched_getaffinity(0))
    wanted = os.environ.get("KVANT_NUM_THREADS", "")
    return max(1, min(available, int(wanted))) if wanted.isdecimal() else available


def _below(files: Mapping[str, bytes], key: str) -> dict[str, bytes]:
    prefix = f"{key}/"
    return {name[len(prefix) :]: data for name, data in files.items() if name.startswith(prefix)}
