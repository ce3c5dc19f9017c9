"""Which bytes of a cache mean something: to compare these, and to fill all others with garbage."""

from typing import Any

import numpy as np

from kvant.runtime.cache import Cache, Stream

Array = np.ndarray[Any, np.dtype[Any]]


def live_bytes(stream: Stream, tokens: int) -> Array:
    """bool[page_bytes], the bytes of a page that belong to its first `tokens` tokens."""
    layout = stream.layout
    live = np.zeros((layout.heads, layout.head_bytes), bool)
    for field in layout.fields:
        kept = tokens * field.shape[0] // layout.tokens
        live[:, field.offset : field.offset + kept * (field.nbytes // field.shape[0])] = True
    return live.reshape(-1)


def stored_bytes(cache: Cache) -> list[bytes]:
    """All bytes that mean something, in an order that does not depend on slots or page numbers."""
    found = []
    for stream in (s for layer in cache.layers for s in layer.streams):
        for row, length in enumerate(stream.length.tolist()):
            encoded = int(stream.encoded[row])
            for i in range(0, encoded - stream.sinks, stream.layout.tokens):
                page = stream.pages[stream.table[row, i // stream.layout.tokens]]
                tokens = min(stream.layout.tokens, encoded - stream.sinks - i)
                found.append(page[live_bytes(stream, tokens)].tobytes())
            slot = encoded - int(stream.tail_first[row])
            found.append(stream.sink[row, :, :length].tobytes())
            found.append(stream.tail[row, :, slot : slot + max(0, length - encoded)].tobytes())
    return found


def poison(cache: Cache, byte: int) -> None:
    """Fill every byte that means nothing: free pages, ends of pages, of tails and of sinks."""
    used: dict[int, set[int]] = {size: set() for size in cache.pools}
    for stream in (s for layer in cache.layers for s in layer.streams):
        used[stream.layout.page_bytes] |= {int(p) for p in stream.table[stream.table >= 0]}
        for row, length in enumerate(stream.length.tolist()):
            encoded = int(stream.encoded[row])
            whole, rest = divmod(encoded - stream.sinks, stream.layout.tokens)
            if rest:
                stream.pages[stream.table[row, whole], ~live_bytes(stream, rest)] = byte
            slot = encoded - int(stream.tail_first[row])
            stop = slot + max(0, length - encoded)
            for dead in (
                stream.sink[row, :, length:],
                stream.tail[row, :, :slot],
                stream.tail[row, :, stop:],
            ):
                dead[...] = np.frombuffer(bytes([byte] * 4), np.float32)[0]
    for size, pool in cache.pools.items():
        free = [i for i in range(pool.capacity) if i not in used[size]]
        pool.pages[free] = byte
