"""Walking the keys of one work item: its split of the positions, and where they are stored.

Split 0 holds the positions [0, sink + C), split i holds [sink + i C, sink + (i + 1) C), with C
whole pages of K. The bounds depend on nothing else, so neither the batch nor the number of threads
changes a bit.
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir.arrangements import ROWS
from ..ir.layouts import PageLayout
from ..ir.plan import AttentionPlan, StreamPlan
from .cpu_pages import Readers, declare_pages, open_page, readers_of
from .cpu_text import Kernel
from .source import split_tokens

# Bytes of a line of the caches.
LINE = 64

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
    kernel: Kernel, readers: Readers, stream: StreamPlan, raw: RawRegion, page: PageRegion
) -> None:
    """Walk the positions [see0, see1) of a stream: sink, pages, tail.

    Args:
        kernel: where to write; b, h, see0, see1 are bound.
        readers: of the stream's pages.
        stream: the plan.
        raw: called with (buffer, base, first, last): position p is at base + p * channels.
        page: called inside the loop over pages; bound are <role>_pos, the position of the page's
            first token, and <role>_t0, <role>_t1, the tokens of the page that are wanted.
    """
    role, sink, width, size = stream.role, stream.tokens.sink, stream.channels, stream.page_tokens
    head = f"(b * {stream.heads} + h)"
    if sink:
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
        if readers and readers[0].layout.kind != ROWS:
            _write_ahead(kernel, readers, last)
        open_page(kernel, readers, f"{role}_page")
        page()
    base = f"({head} * {role}_capacity - {role}_tail_first[b]) * {width}"
    kernel.let(f"{role}_tail_base", base)
    raw(f"{role}_tail", f"{role}_tail_base", f"T.max(see0, {role}_encoded[b])", "see1")


def _write_ahead(kernel: Kernel, readers: Readers, last: str) -> None:
    """Bind `<role>_ahead`, the bytes from a byte of this page to the same one of the next."""
    role, layout = readers[0].role, readers[0].layout
    kernel.let("after", f"T.min(page + 1, T.max({last} - 1, page))")
    step = f"{role}_table[b * {role}_max_pages + after] - {role}_page"
    kernel.let(f"{role}_ahead", f"({step}) * {layout.page_bytes}")


def write_ask(kernel: Kernel, readers: Readers, sink: int, head: str) -> None:
    """Ask for a head's block of the item's first page of a stream, if it is read in quads."""
    layout, role = readers[0].layout, readers[0].role
    if layout.kind == ROWS:
        return
    page = kernel.fresh(
        "asked", f"{role}_table[b * {role}_max_pages + {_page_of(sink, layout.tokens)}]"
    )
    block = f"{page} * {layout.page_bytes} + ({head}) * {layout.head_bytes}"
    with kernel.block(f"for line in T.serial(T.int64({-(-layout.head_bytes // LINE)}))"):
        kernel.prefetch(f"{role}_uint8", f"{block} + line * {LINE}")


def _page_of(sink: int, size: int) -> str:
    """Return the page of the first position of the item, past the sink."""
    first = f"T.max(see0 - {sink}, T.int64(0))"
    if size & (size - 1):
        return f"T.truncdiv({first}, T.int64({size}))"
    return f"T.shift_right({first}, T.int64({size.bit_length() - 1}))"
