"""Tokens of a tile in float32, wherever they lie: in pages, in the raw tail, in the raw sink.

Each place is read under a mask and gives zero for tokens that lie elsewhere, so they add up. No
byte that means nothing is ever loaded. Bound before: position, i64 [N]; b, h, bh; <role>_end.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.plan import StreamPlan
from .gpu_pages import PageReader, readers_of
from .gpu_text import Kernel, across, both, load


@dataclass(frozen=True, slots=True)
class Piece:
    """Channels that are read, or summed, together: a plane of a reader.

    Attributes:
        reader: of the channels.
        plane: of the reader.
    """

    reader: PageReader
    plane: int

    @property
    def name(self) -> str:
        """Name of the values of a tile."""
        return f"{self.reader.name}_{self.plane}"

    @property
    def out(self) -> str:
        """Name of the sum of values."""
        return f"{self.reader.name}_out_{self.plane}"

    @property
    def channels(self) -> str:
        """The channels of the head."""
        return self.reader.channel(self.plane)


def pieces_of(stream: StreamPlan, kind: str) -> tuple[Piece, ...]:
    """Return all channels of a stream, plane by plane, from pages of a kind."""
    readers = readers_of(stream, kind)
    return tuple(Piece(reader, i) for reader in readers for i in range(reader.part.planes))


def readers_in(pieces: tuple[Piece, ...]) -> tuple[PageReader, ...]:
    """Return the readers of some pieces."""
    return tuple(dict.fromkeys(piece.reader for piece in pieces))


def write_place(kernel: Kernel, stream: StreamPlan, place: str, tokens: str, here: str) -> None:
    """Bind where tokens lie: their page and their place in it.

    Args:
        kernel: is written to.
        stream: of the tokens.
        place: token, or tokens, counted from the sink.
        tokens: more of the same page behind `place`, or "".
        here: mask of `place`, or "".
    """
    role, layout, size = stream.role, stream.page_layout(), stream.page_tokens
    kernel.line(f"{role}_place = {place}")
    table = f"{role}_table + b * {role}_max_pages + {role}_place // {size}"
    kernel.line(f"{role}_page = {load(table, here)}")
    block = f"{role}_page * {layout.page_bytes} + h * {layout.head_bytes}"
    kernel.line(f"{role}_block = {block}")
    kernel.line(f"{role}_t = {role}_place % {size}" + (f" + {tokens}" if tokens else ""))


def write_stored(kernel: Kernel, pieces: tuple[Piece, ...], here: str) -> None:
    """Bind the pieces that pages hold; `here` masks the tokens."""
    for reader in readers_in(pieces):
        if reader.is_stored:
            reader.write_codes(kernel, here)
            for i in range(reader.part.planes):
                reader.write_plane(kernel, i, here, f"{reader.name}_{i}")


def write_raw(kernel: Kernel, stream: StreamPlan, pieces: tuple[Piece, ...], seen: str) -> None:
    """Add to the pieces what tail and sink hold of the tokens that `seen` leaves."""
    role, sink = stream.role, stream.tokens.sink
    in_tail = f"(position >= {role}_end) & {seen}"
    in_tail = f"{in_tail} & (position >= {sink})" if sink else in_tail
    kernel.line(f"{role}_in_tail = {in_tail}")
    slot = f"bh * {role}_capacity + position - tl.load({role}_tail_first + b)"
    kernel.line(f"{role}_at_tail = ({slot}) * {stream.channels}")
    if sink:
        kernel.line(f"{role}_in_sink = (position >= 0) & (position < {sink}) & {seen}")
        kernel.line(f"{role}_at_sink = (bh * {sink} + position) * {stream.channels}")
    for piece in pieces:
        kernel.line(f"{piece.name} += {_raw(piece, 'tail')}")
        if sink:
            kernel.line(f"{piece.name} += {_raw(piece, 'sink')}")


def _raw(piece: Piece, buffer: str) -> str:
    """Return a piece of the tokens in a raw buffer, f32."""
    role = piece.reader.role
    pointer = f"{role}_{buffer} + {role}_at_{buffer}[:, None] + {across(piece.channels)}"
    return load(pointer, both(f"{role}_in_{buffer}[:, None]", across(piece.reader.columns)))
