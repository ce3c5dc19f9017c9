"""Walking keys or values of one work item: its split of the positions, and where they are stored.

Split 0 holds the positions [0, sink + C), split i holds [sink + i C, sink + (i + 1) C), with C
whole pages of K. The bounds depend on nothing else, so neither the batch nor the number of threads
changes a bit.

Pages are outermost and heads innermost: the blocks of all heads of a page are neighbours, and
memory that is read in order comes by itself; a walk down one head's blocks waits for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from ..ir.arrangements import CODES, ROWS
from ..ir.layouts import PageLayout
from ..ir.plan import AttentionPlan, StreamPlan
from .cpu_pages import PageReader, Readers, declare_pages, open_page, readers_of
from .cpu_rows import split_tokens
from .cpu_text import Kernel

# Bytes of a line of the caches.
LINE = 64
# How many bytes before they are read, lines are asked for: memory takes some hundred cycles, in
# which a kernel reads about so much.
AHEAD = 8192
# Bytes that are asked for at once: a longer burst fills the queue of misses, and codes wait.
MOST_BURST = 256

# What it writes is done for each head of the item.
EachHead = Callable[[], AbstractContextManager[None]]
RawRegion = Callable[[str, str, str, str], None]
PageRegion = Callable[[], None]


def stream_arguments(kernel: Kernel, stream: StreamPlan, layout: PageLayout) -> Readers:
    """Declare the arguments that name a stream, and return the readers of its pages."""
    role, readers = stream.role, readers_of(stream, layout)
    if stream.tokens.sink:
        kernel.array(f"{role}_sink", "float32")
    kernel.array(f"{role}_tail", "float32")
    for name in ("tail_first", "table", "encoded"):
        kernel.array(f"{role}_{name}", "int64")
    declare_pages(kernel, readers)
    kernel.scalar(f"{role}_capacity")
    kernel.scalar(f"{role}_max_pages")
    return readers


def write_split(kernel: Kernel, plan: AttentionPlan) -> None:
    """Bind the positions [lo, hi) of split `split` of row b."""
    sink, size = plan.k.tokens.sink, split_tokens(plan)
    kernel.let("length", "length_of[b]")
    begin = f"split * {size} + {sink}" if sink else f"split * {size}"
    kernel.let("lo", f"T.Select(split > 0, {begin}, T.int64(0))" if sink else begin)
    kernel.let("hi", f"T.min(length, split * {size} + {sink + size})")


def write_regions(
    kernel: Kernel,
    readers: Readers,
    stream: StreamPlan,
    raw: RawRegion,
    page: PageRegion,
    each_head: EachHead | None = None,
    before: tuple[PageRegion, ...] = (),
) -> None:
    """Walk the positions [see0, see1) of a stream: sink, pages, tail.

    Args:
        kernel: where to write; b, see0, see1 are bound.
        readers: of the stream's pages.
        stream: the plan.
        raw: called with (buffer, base, first, last): position p is at base + p * channels.
        page: called inside the loop over pages; bound are <role>_pos, the position of the page's
            first token, and <role>_t0, <role>_t1, the tokens of the page that are wanted.
        each_head: writes the loop over heads [h0, h1), innermost; None where h is bound.
        before: as `page`, each for all heads before the first one's `page`, where streams are asked
            for ahead.
    """
    role, sink, width, size = stream.role, stream.tokens.sink, stream.channels, stream.page_tokens
    head = f"(b * {stream.heads} + h)"
    heads = each_head or nullcontext
    if sink:
        with heads():
            kernel.let(f"{role}_sink_base", f"{head} * {sink * width}")
            raw(f"{role}_sink", f"{role}_sink_base", "see0", f"T.min(see1, T.int64({sink}))")
    kernel.let(f"{role}_end", f"T.min(see1, {role}_encoded[b])")
    first = _page_of(sink, size)
    last = f"T.truncdiv({role}_end - {sink} + {size - 1}, T.int64({size}))"
    with kernel.block(f"for page in T.serial({first}, T.max({first}, {last}))"):
        kernel.let(f"{role}_pos", f"page * {size} + {sink}")
        kernel.let(f"{role}_t0", f"T.max(see0 - {role}_pos, T.int64(0))")
        kernel.let(f"{role}_t1", f"T.min({role}_end - {role}_pos, T.int64({size}))")
        kernel.let(f"{role}_page", f"{role}_table[b * {role}_max_pages + page]")
        if each_head is not None and asks_ahead(readers):
            _write_next(kernel, readers, last)
            _write_page(kernel, readers, page, each_head, before)
        else:
            with heads():
                open_page(kernel, readers, f"{role}_page")
                page()
    with heads():
        base = f"({head} * {role}_capacity - {role}_tail_first[b]) * {width}"
        kernel.let(f"{role}_tail_base", base)
        raw(f"{role}_tail", f"{role}_tail_base", f"T.max(see0, {role}_encoded[b])", "see1")


def _write_page(
    kernel: Kernel,
    readers: Readers,
    page: PageRegion,
    each_head: EachHead,
    before: tuple[PageRegion, ...],
) -> None:
    """Write what is done for each head of a page that is asked for ahead; see `write_regions`."""
    role = readers[0].role
    for number, write in enumerate(before, 1):
        with each_head():
            open_page(kernel, readers, f"{role}_page")
            # It reads the parameters of all heads, so they come a page before; beside what takes
            # longest, for a burst would fill the queue of misses.
            for reader in readers if number == len(before) else ():
                _write_parameter_asks(kernel, reader, f"{role}_block + {role}_next")
            write()
    with each_head():
        open_page(kernel, readers, f"{role}_page")
        _write_ahead(kernel, readers)
        if not before:
            for reader in readers:
                if len(parameter_bytes(reader)) <= MOST_BURST:
                    _write_parameter_asks(kernel, reader, f"{role}_ask")
        page()


def _write_next(kernel: Kernel, readers: Readers, last: str) -> None:
    """Bind `<role>_next`, the bytes from this page to the next one of the item."""
    role, layout = readers[0].role, readers[0].layout
    kernel.let("after", f"T.min(page + 1, {last} - 1)")
    step = f"{role}_table[b * {role}_max_pages + after] - {role}_page"
    kernel.let(f"{role}_next", f"({step}) * {layout.page_bytes}")


def _write_ahead(kernel: Kernel, readers: Readers) -> None:
    """Bind `<role>_ask`, the block to ask for while this one is read."""
    role, size = readers[0].role, readers[0].layout.head_bytes
    kernel.let("far", f"T.min(h1 - h0, T.int64({_blocks_ahead(size)}))")
    onward = f"{role}_next + (far - (h1 - h0)) * {size}"
    kernel.let(f"{role}_ask", f"{role}_block + T.Select(h + far < h1, far * {size}, {onward})")


def _write_parameter_asks(kernel: Kernel, reader: PageReader, block: str) -> None:
    """Ask for the parameters of a part in a block."""
    params = parameter_bytes(reader)
    write_asks(kernel, reader, f"{block} + {params.start}", len(params))


def _blocks_ahead(size: int) -> int:
    """Return how many blocks of `size` bytes lie between asking and reading."""
    return max(1, -(-AHEAD // size))


def asks_ahead(readers: Readers) -> bool:
    """Return whether a stream is asked for ahead: if it is read in quads."""
    return readers[0].layout.kind != ROWS


def code_bytes(reader: PageReader) -> range:
    """Return where the codes of a part lie in a head's block; its parameters follow."""
    fields = reader.part.fields
    first = min(field.offset for field in fields)
    return range(first, min(field.offset for field in fields if field.name not in CODES))


def parameter_bytes(reader: PageReader) -> range:
    """Return where the parameters of a part lie in a head's block: up to the next part."""
    begin, end = code_bytes(reader).stop, reader.layout.head_bytes
    parts = [field.offset for part in reader.layout.parts for field in part.fields[:1]]
    return range(begin, min((first for first in parts if first >= begin), default=end))


def write_asks(kernel: Kernel, reader: PageReader, place: str, size: int) -> None:
    """Ask for the lines of `size` bytes from a place in the pages on."""
    for line in range(0, size, LINE):
        kernel.prefetch(f"{reader.role}_uint8", f"{place} + {line}")


@dataclass(frozen=True, slots=True)
class Asks:
    """How loops that read the codes of a block ask for another block, line after line.

    Many parameters are asked for between codes, few at once, when the block begins.

    Attributes:
        reader: of the codes.
        tiles: of a block, one after another.
        steps: of a tile.
        parameters: whether nothing asks for parameters before.
    """

    reader: PageReader
    tiles: int
    steps: int
    parameters: bool

    @property
    def size(self) -> int:
        """Bytes of a step."""
        return len(code_bytes(self.reader)) // (self.tiles * self.steps)

    @property
    def _begin(self) -> str:
        return f"{self.reader.role}_ask + {code_bytes(self.reader).start}"

    def write_tile(self, kernel: Kernel, tile: str) -> None:
        """Ask at the beginning of a tile: for many parameters, for codes unless steps are lines."""
        params = parameter_bytes(self.reader)
        if self.parameters and len(params) > MOST_BURST:
            size = -(-len(params) // self.tiles)
            place = f"{self.reader.role}_ask + {params.start} + {tile} * {size}"
            write_asks(kernel, self.reader, place, size)
        if self.size % LINE:
            size = self.size * self.steps
            write_asks(kernel, self.reader, f"{self._begin} + {tile} * {size}", size)

    def write_step(self, kernel: Kernel, tile: str, step: str) -> None:
        """Ask at a step, where steps are whole lines."""
        if self.size % LINE == 0:
            place = f"({tile} * {self.steps} + {step}) * {self.size}"
            write_asks(kernel, self.reader, f"{self._begin} + {place}", self.size)


def write_first_asks(kernel: Kernel, readers: Readers, sink: int) -> None:
    """Ask for what no block before asks for: the first blocks of the item's first page."""
    layout, role = readers[0].layout, readers[0].role
    page = kernel.fresh(
        "asked", f"{role}_table[b * {role}_max_pages + {_page_of(sink, layout.tokens)}]"
    )
    block = f"{page} * {layout.page_bytes} + h0 * {layout.head_bytes}"
    lines = -(-layout.head_bytes // LINE) * _blocks_ahead(layout.head_bytes)
    with kernel.block(f"for line in T.serial(T.int64({lines}))"):
        kernel.prefetch(f"{role}_uint8", f"{block} + line * {LINE}")


def _page_of(sink: int, size: int) -> str:
    """Return the page of the first position of the item, past the sink."""
    first = f"T.max(see0 - {sink}, T.int64(0))"
    if size & (size - 1):
        return f"T.truncdiv({first}, T.int64({size}))"
    return f"T.shift_right({first}, T.int64({size.bit_length() - 1}))"
