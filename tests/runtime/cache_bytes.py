"""Which bytes of a cache mean something: to compare these, and to fill all others with garbage."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from kvant.ir.arrangements import ROWS
from kvant.ir.layouts import PageLayout
from kvant.runtime.cache import Cache
from kvant.runtime.stream import Stream

Array = np.ndarray[Any, np.dtype[Any]]


def live_bytes(stream: Stream, tokens: int) -> Array:
    """bool[page_bytes], the bytes of a page that belong to its first `tokens` tokens."""
    return _live_bytes(stream.layout, tokens)


@lru_cache(maxsize=1024)
def _live_bytes(of: PageLayout, tokens: int) -> Array:
    layout = replace(of, kind=ROWS)
    live = np.zeros((layout.heads, layout.head_bytes), np.uint8)
    for field in layout.fields:
        kept = tokens * field.shape[0] // layout.tokens
        live[:, field.offset : field.offset + kept * (field.nbytes // field.shape[0])] = 1
    return layout.arranged(live.reshape(-1), of.kind).astype(bool)


def stored_bytes(cache: Cache) -> list[bytes]:
    """All bytes that mean something, pages in rows, in an order without slots or page numbers."""
    found = []
    for stream in (s for layer in cache.layers for s in layer.streams):
        for row, length in enumerate(stream.length.tolist()):
            encoded = int(stream.encoded[row])
            begin = int(stream.held[row]) - stream.sinks
            for i in range(begin, encoded - stream.sinks, stream.layout.tokens):
                pages = stream.memory.fetch(stream.pages)
                page = pages[stream.table[row, i // stream.layout.tokens]]
                tokens = min(stream.layout.tokens, encoded - stream.sinks - i)
                live = np.where(live_bytes(stream, tokens), page, np.uint8(0))
                found.append(stream.layout.arranged(live, ROWS).tobytes())
            slot = encoded - int(stream.tail_first[row])
            sink, tail = stream.memory.fetch(stream.sink), stream.memory.fetch(stream.tail)
            found.append(sink[row, :, :length].tobytes())
            found.append(tail[row, :, slot : slot + max(0, length - encoded)].tobytes())
    return found


def poison(cache: Cache, byte: int) -> None:
    """Fill every byte that means nothing: free pages, ends of pages, of tails and of sinks.

    The arrays are in the memory of the host: what `fetch` gives shares it, tensor or not.
    """
    used: dict[int, set[int]] = {size: set() for size in cache.pools}
    for stream in (s for layer in cache.layers for s in layer.streams):
        used[stream.layout.page_bytes] |= {int(p) for p in stream.table[stream.table >= 0]}
        for row, length in enumerate(stream.length.tolist()):
            encoded = int(stream.encoded[row])
            whole, rest = divmod(encoded - stream.sinks, stream.layout.tokens)
            if rest:
                pages = stream.memory.fetch(stream.pages)
                pages[stream.table[row, whole], ~live_bytes(stream, rest)] = byte
            slot = encoded - int(stream.tail_first[row])
            stop = slot + max(0, length - encoded)
            for dead in (
                stream.memory.fetch(stream.sink)[row, :, length:],
                stream.memory.fetch(stream.tail)[row, :, :slot],
                stream.memory.fetch(stream.tail)[row, :, stop:],
            ):
                dead[...] = np.frombuffer(bytes([byte] * 4), np.float32)[0]
    for size, pool in cache.pools.items():
        free = [i for i in range(len(pool.pages)) if i not in used[size]]
        cache.memory.fetch(pool.pages)[free] = byte
