"""A cache in a file: all of it, or an error and nothing.

    magic 8 bytes | version u32 | header bytes u32 | crc32 of the header u32 | header, JSON
    for each layer, k then v, for each row:
        sink tokens f32[H, n, D] | tail tokens f32[H, n, D] | for each page: crc32 u32 | page
    sha256 of everything before, 32 bytes

All numbers are little endian. What is restored is built beside what lives and handed out last.
"""

import fcntl
import hashlib
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..ir.arrangements import ROWS
from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan, StreamPlan
from . import strict_json
from .columns import Columns, Ints, new_columns
from .memory import Array
from .publish import flush_folder
from .stream import Stream, pages_before, take_pages
from .tails import make_room

if TYPE_CHECKING:
    from .cache import Cache, Layer

MAGIC = b"kvantst\n"
VERSION = 2
_HEAD = struct.Struct("<8sIII")
_CRC = struct.Struct("<I")
_DIGEST_BYTES = 32
_MAX_HEADER = 1 << 26
_MAX_POSITIONS = 1 << 32  # batch times max_tokens that a file may ask for
_FIX = "save the cache again, or start a new one"


def write_state(cache: "Cache", path: str | os.PathLike[str]) -> None:
    """Write a cache to a file, mode 0600, replacing what is there by one rename.

    Raises: KvantError "output-not-written"; the old file is as it was then.
    """
    out = Path(path).absolute()
    partial = out.with_name(f".{out.name}.partial")
    try:
        handle = _open_partial(partial)
        try:
            with os.fdopen(handle, "wb", closefd=False) as file:
                _write(cache, file)
            os.fsync(handle)
            os.replace(partial, out)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        flush_folder(out.parent)
    except OSError as error:
        raise KvantError(
            "output-not-written",
            f"the system refused to write {out.name}: {error.strerror}",
            where=str(out),
            fix="check free space, permissions, and that no other process saves to this path",
        ) from error


def read_state(
    path: str | os.PathLike[str],
    artifact_id: str,
    plans: Sequence[AttentionPlan],
    new_cache: Callable[[int, int, Ints], "Cache"],
) -> "Cache":
    """Return a new cache with the state in a file.

    Args:
        path: what `write_state` wrote.
        artifact_id: of the artifact whose state it must be.
        plans: of that artifact.
        new_cache: makes an empty cache of (batch, max_tokens, start).

    Raises: KvantError "state-missing", "state-version", "state-damaged", "state-other-artifact".
    """
    where = os.fspath(path)
    try:
        file = open(where, "rb")
    except OSError as error:
        raise KvantError(
            "state-missing",
            f"the state file cannot be opened: {error.strerror}",
            where=where,
            fix="check the path and its permissions",
        ) from error
    with file:
        reader = _Reader(file, where, hashlib.sha256())
        state = _read_header(reader, artifact_id, plans)
        _check_size(reader, state, plans)
        try:
            cache = new_cache(state.batch, state.max_tokens, state.start)
            _fill(reader, cache, state)
        except MemoryError as error:
            raise KvantError(
                "out-of-memory", "no memory for the saved cache", where=where, fix="free some"
            ) from error
        digest = reader.sha.digest()
        if file.read() != digest:
            _damaged("the sha256 of the content is not the one it was saved with", where)
    return cache


@dataclass(frozen=True, slots=True)
class LayerState:
    """What the header says of one layer: its columns, and the positions in pages of k and v."""

    columns: Columns
    held: tuple[Ints, Ints]
    encoded: tuple[Ints, Ints]


@dataclass(frozen=True, slots=True)
class State:
    """The header."""

    batch: int
    max_tokens: int
    reserved: int
    start: Ints
    layers: tuple[LayerState, ...]


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads and hashes. Raises: KvantError "state-damaged" at the end of the file."""

    file: BinaryIO
    where: str
    sha: Any

    def fill(self, target: NDArray[Any]) -> None:
        view = target.data.cast("B")
        if self.file.readinto(view) != len(view):  # type: ignore[attr-defined]
            _damaged("the file ends too early", self.where)
        self.sha.update(view)

    def take(self, count: int) -> bytes:
        target = np.empty(count, np.uint8)
        self.fill(target)
        return target.tobytes()


def _write(cache: "Cache", file: BinaryIO) -> None:
    sha = hashlib.sha256()

    def put(data: bytes) -> None:
        sha.update(data)
        file.write(data)

    header = strict_json.canonical(_header(cache))
    put(_HEAD.pack(MAGIC, VERSION, len(header), zlib.crc32(header)))
    put(header)
    for layer in cache.layers:
        for stream in layer.streams:
            for raw in _raw_parts(stream):
                put(stream.memory.fetch(raw).tobytes())
            for page in _pages(stream):
                data = stream.layout.arranged(stream.memory.fetch(page), ROWS).tobytes()
                put(_CRC.pack(zlib.crc32(data)) + data)
    file.write(sha.digest())


def _raw_parts(stream: Stream) -> Iterator[Array]:
    """Yield what is not encoded, in contiguous pieces that share memory with the stream."""
    for row in range(len(stream.length)):
        sinks, tail = _raw_counts(stream.plan, stream.length[row], stream.encoded[row])
        slot = int(stream.encoded[row] - stream.tail_first[row])
        for head in range(stream.plan.heads):
            if sinks:
                yield stream.sink[row, head, :sinks]
            if tail:
                yield stream.tail[row, head, slot : slot + tail]


def _pages(stream: Stream) -> Iterator[Array]:
    """Yield the pages in use, row by row."""
    begin, end = (pages_before(stream, p).tolist() for p in (stream.held, stream.encoded))
    for row, (first, last) in enumerate(zip(begin, end, strict=True)):
        for page in stream.table[row, first:last].tolist():
            yield stream.pages[page]


def _raw_counts(plan: StreamPlan, length: int, encoded: int) -> tuple[int, int]:
    """Return how many tokens of a row are in its sink and in its tail."""
    return min(int(length), plan.tokens.sink), max(0, int(length) - int(encoded))


def _header(cache: "Cache") -> strict_json.Json:
    return {
        "artifact": cache.artifact_id,
        "plans": _plan_digest([layer.plan for layer in cache.layers]),
        "batch": cache.batch,
        "max_tokens": cache.max_tokens,
        "reserved": cache.reserved,
        "start": cache.start.tolist(),
        "layers": [_layer_header(layer) for layer in cache.layers],
    }


def _layer_header(layer: "Layer") -> strict_json.Json:
    return {
        "columns": [[column, counts.tolist()] for column, counts in layer.columns.marks],
        "dense": layer.columns.is_dense,
        "held": [stream.held.tolist() for stream in layer.streams],
        "encoded": [stream.encoded.tolist() for stream in layer.streams],
    }


def _plan_digest(plans: Sequence[AttentionPlan]) -> str:
    """Return what tells plans, and so the bytes of pages, apart."""
    text = json.dumps([plan.to_json() for plan in plans], sort_keys=True)
    return hashlib.sha256(f"{sys.byteorder} {text}".encode()).hexdigest()


def _read_header(reader: _Reader, artifact_id: str, plans: Sequence[AttentionPlan]) -> State:
    """Return the checked header: every number is within bounds, and they agree with each other."""
    where = reader.where
    magic, version, size, crc = _HEAD.unpack(reader.take(_HEAD.size))
    if magic != MAGIC:
        _damaged("it is no state file of kvant", where)
    if version != VERSION:
        raise KvantError(
            "state-version",
            f"the state file has version {version}, this kvant reads {VERSION}",
            where=where,
            fix="use the kvant that saved it, or start a new cache",
        )
    if size > _MAX_HEADER:
        _damaged(f"a header of {size} bytes", where)
    raw = reader.take(size)
    if zlib.crc32(raw) != crc:
        _damaged("the checksum of the header is wrong", where)
    try:
        header: Any = strict_json.parse_object(raw, where)
        if (header["artifact"], header["plans"]) == (artifact_id, _plan_digest(plans)):
            return _state(header, plans)
        owner = str(header["artifact"])[:64]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        _damaged(f"the header makes no sense: {error!r}", where)
    raise KvantError(
        "state-other-artifact",
        f"the state belongs to artifact {owner!r}",
        where=where,
        fix=f"load that artifact; this one is {artifact_id!r}",
    )


def _state(header: Any, plans: Sequence[AttentionPlan]) -> State:
    """Return the header as records. Raises: ValueError, KeyError, TypeError, OverflowError."""
    batch, limit = _number(header["batch"], 1), _number(header["max_tokens"], 1)
    if batch * limit > _MAX_POSITIONS:
        raise ValueError(f"batch {batch} and max_tokens {limit}")
    start = _numbers(header["start"], batch)
    if len(header["layers"]) != len(plans):
        raise ValueError(f"{len(header['layers'])} layers")
    layers = tuple(
        _layer_state(layer, plan, start, limit)
        for layer, plan in zip(header["layers"], plans, strict=True)
    )
    return State(batch, limit, _number(header["reserved"], 0), start, layers)


def _layer_state(layer: Any, plan: AttentionPlan, start: Ints, limit: int) -> LayerState:
    marks = tuple((_number(c, 0), _numbers(counts, len(start))) for c, counts in layer["columns"])
    first = new_columns(start).marks[0]
    if not marks or marks[0][0] != 0 or marks[0][1].any() or marks[-1][0] > limit:
        raise ValueError("columns do not begin at 0, or pass max_tokens")
    for (before, low), (after, high) in zip((first, *marks), marks, strict=False):
        grown = high - low
        if (grown < 0).any() or (grown > np.maximum(after - np.maximum(before, start), 0)).any():
            raise ValueError(f"more tokens than columns at column {after}")
    length, streams = marks[-1][1], (plan.k, plan.v)
    (k_held, v_held), (k_end, v_end) = (
        [_numbers(row, len(start)) for row in layer[name]] for name in ("held", "encoded")
    )
    for stream, held, end in zip(streams, (k_held, v_held), (k_end, v_end), strict=True):
        past = end - stream.tokens.sink
        whole = past % stream.tokens.group_tokens == 0
        if not (whole & (past >= 0) & ((past == 0) | (end <= length))).all():
            raise ValueError(f"encoded to {end.tolist()} of {length.tolist()}")
        if not _may_begin(stream, plan.window, held, end, length).all():
            raise ValueError(f"pages from {held.tolist()} to {end.tolist()} of {length.tolist()}")
    return LayerState(Columns(start, marks, bool(layer["dense"])), (k_held, v_held), (k_end, v_end))


def _may_begin(
    stream: StreamPlan, window: int | None, held: Ints, end: Ints, length: Ints
) -> NDArray[np.bool_]:
    """Return bool[B], whether pages may begin at `held`: nothing that a query sees is missing."""
    gone = held - stream.tokens.sink
    if window is None:
        return np.asarray(gone == 0)
    whole = (gone > 0) & (gone % stream.page_tokens == 0)
    seen = np.minimum(length - window + 1, end)
    return np.asarray((gone == 0) | (whole & (held <= seen)))


def _number(value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} where a number from {least} on should be")
    return value


def _numbers(values: Any, count: int) -> Ints:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"not {count} numbers")
    return np.array([_number(value, 0) for value in values], np.int64)


def _check_size(reader: _Reader, state: State, plans: Sequence[AttentionPlan]) -> None:
    """Refuse a file that is not exactly as long as its header says, before memory is taken."""
    expected = reader.file.tell() + _DIGEST_BYTES
    for layer, plan in zip(state.layers, plans, strict=True):
        for stream, held, encoded in zip((plan.k, plan.v), layer.held, layer.encoded, strict=True):
            page_bytes = stream.page_layout().page_bytes + _CRC.size
            rows = (array.tolist() for array in (layer.columns.counts, held, encoded))
            for length, begin, end in zip(*rows, strict=True):
                raw = sum(_raw_counts(stream, length, end)) * stream.heads * stream.channels
                pages = -(-(end - begin) // stream.page_tokens)
                expected += raw * 4 + pages * page_bytes
    size = os.fstat(reader.file.fileno()).st_size
    if size != expected:
        _damaged(f"{size} bytes long, but its header describes {expected}", reader.where)


def _fill(reader: _Reader, cache: "Cache", state: State) -> None:
    """Read the content into an empty cache."""
    cache.reserved = state.reserved
    for layer, saved in zip(cache.layers, state.layers, strict=True):
        layer.marked = saved.columns
        for stream, held, encoded in zip(layer.streams, saved.held, saved.encoded, strict=True):
            take_pages(stream, held, encoded)
            stream.held, stream.encoded, stream.tail_first = held, encoded, encoded.copy()
            make_room(stream, saved.columns.counts)
            stream.length = saved.columns.counts
            for raw in _raw_parts(stream):
                content = np.empty(tuple(raw.shape), np.float32)
                reader.fill(content)
                raw[...] = stream.memory.place(content)
            for i, page in enumerate(_pages(stream)):
                (crc,) = _CRC.unpack(reader.take(_CRC.size))
                data = np.empty(stream.layout.page_bytes, np.uint8)
                reader.fill(data)
                rows = stream.plan.page_layout()
                page[...] = stream.memory.place(rows.arranged(data, stream.layout.kind))
                if zlib.crc32(data.tobytes()) != crc:
                    _damaged(f"page {i} of a {stream.plan.role} stream is damaged", reader.where)


def _open_partial(partial: Path) -> int:
    """Return a locked, empty file to write to; one that a killed process left is used again."""
    while True:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open and lock the holder may have published this very file.
            if partial.exists() and os.path.samestat(os.fstat(handle), partial.lstat()):
                os.fchmod(handle, 0o600)
                os.ftruncate(handle, 0)
                return handle
            os.close(handle)
        except BaseException:
            os.close(handle)
            raise


def _damaged(what: str, where: str) -> NoReturn:
    raise KvantError("state-damaged", what, where=where, fix=_FIX)
