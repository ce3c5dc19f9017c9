"""The kernel unpack: tokens of a cache as plain numbers, for many queries to read many times.

A tile of tokens of a KV head is read wherever it lies (`gpu_sources.py`), decoded in
float32, and written as rows of all channels. Under compute = int these are float16, less the power
of two that brings the largest of the tile just below 2^15 (`ir/halves_block.py`); else float32.
Each token is so decoded once a call, not once for each tile of queries.

Tokens past a row's length, and before what any query sees, are written as zero.
"""

from __future__ import annotations

from ..ir.plan import AttentionPlan, StreamPlan
from .gpu_attend import declare_stream, write_ends
from .gpu_sources import Piece, pieces_of, readers_in, write_place, write_raw, write_stored
from .gpu_text import Dialect, Kernel
from .gpu_tiles import kinds

LARGEST = 15
"""The largest number of a tile lies below 2^15 in float16."""
MOST_POWER = 60
"""Powers of two up to here are taken out of a tile."""


def plain_type(plan: AttentionPlan) -> str:
    """Return the type of the numbers that several queries are multiplied with."""
    return "float16" if plan.compute == "int" else "float32"


def unpack(plan: AttentionPlan, dialect: Dialect, tokens: int) -> Kernel:
    """Return the kernel that writes positions [first, first + count) as plain numbers.

    k_plain [B H, count, C] and k_power [B H, count / tokens], what a number of 1 is worth; of
    values the power is an exponent. `tokens`: of a tile. Grid: (tiles, B H, 2).
    """
    kernel = Kernel("unpack", warps=max(4, tokens // 16))
    kernel.array("length_of", "int64")
    for stream in (plan.k, plan.v):
        declare_stream(kernel, stream)
        kernel.array(f"{stream.role}_plain", plain_type(plan))
        kernel.array(f"{stream.role}_power", "float32")
    for name in ("first", "count", "queries"):
        kernel.scalar(name)
    kernel.line("tile = tl.program_id(0).to(tl.int64)")
    kernel.line("bh = tl.program_id(1).to(tl.int64)")
    kernel.line(f"b = bh // {plan.k.heads}")
    kernel.line(f"h = bh % {plan.k.heads}")
    write_ends(kernel)
    kernel.line(f"token = tile * {tokens} + tl.arange(0, {tokens})")
    kernel.line("position = first + token")
    kernel.line("seen = position < length")
    if plan.window is not None:  # pages behind the window may have been given back
        kernel.line(f"seen = seen & (position > length - queries - {plan.window})")
    with kernel.block("if tl.program_id(2) == 0"):
        _write_stream(kernel, plan, plan.k, kinds(plan, dialect)[0], tokens)
    with kernel.block("else"):
        _write_stream(kernel, plan, plan.v, kinds(plan, dialect)[1], tokens)
    return kernel


def _write_stream(
    kernel: Kernel, plan: AttentionPlan, stream: StreamPlan, kind: str, tokens: int
) -> None:
    """Write the tile of keys, or of values, from pages of a kind."""
    role, sink = stream.role, stream.tokens.sink
    pieces = pieces_of(stream, kind)
    for reader in readers_in(pieces):
        reader.write_columns(kernel)
    for piece in pieces:
        if not piece.reader.is_stored:
            shape = f"({tokens}, {piece.reader.wide})"
            kernel.line(f"{piece.name} = tl.zeros({shape}, tl.float32)")
    in_pages = f"seen & (position < {role}_end)" + (f" & (position >= {sink})" if sink else "")
    kernel.line(f"{role}_here = {in_pages}")
    place = f"position - {sink}" if sink else "position"
    write_place(kernel, stream, place, "", f"{role}_here")
    write_stored(kernel, pieces, f"{role}_here")
    write_raw(kernel, stream, pieces, "seen")
    if plain_type(plan) == "float16":
        _write_power(kernel, role, pieces, tokens)
    for piece in pieces:
        at = f"(bh * count + token)[:, None] * {stream.channels} + {piece.channels}[None, :]"
        inside = piece.reader.columns
        number = piece.name
        if plain_type(plan) == "float16":
            number = f"({number} * {role}_lower).to(tl.float16)"
        mask = f", mask={inside}[None, :]" if inside else ""
        kernel.line(f"tl.store({role}_plain + {at}, {number}{mask})")


def _write_power(kernel: Kernel, role: str, pieces: tuple[Piece, ...], tokens: int) -> None:
    """Bind <role>_lower, the power of two that numbers are multiplied with; store its inverse."""
    kernel.note("the exponent of the largest number of the tile")
    for number, piece in enumerate(pieces):
        most = f"tl.max(tl.max(tl.abs({piece.name}), axis=1), axis=0)"
        most = f"tl.maximum({role}_largest, {most})" if number else most
        kernel.line(f"{role}_largest = {most}")
    kernel.line(f"{role}_bits = {role}_largest.to(tl.int32, bitcast=True)")
    exponent = f"({role}_bits >> 23) - {126 + LARGEST}"
    bounded = f"tl.minimum(tl.maximum({exponent}, -{MOST_POWER}), {MOST_POWER})"
    kernel.line(f"{role}_exponent = {bounded}")
    kernel.line(f"{role}_lower = ((127 - {role}_exponent) << 23).to(tl.float32, bitcast=True)")
    power = f"((127 + {role}_exponent) << 23).to(tl.float32, bitcast=True)"
    power = power if role == "k" else f"{role}_exponent.to(tl.float32)"
    kernel.line(f"tl.store({role}_power + bh * (count // {tokens}) + tile, {power})")
