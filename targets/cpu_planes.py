"""Packing codes into the planes of a page: whole vectors of bytes, in the order of its layout.

In rows, the bytes of a token are neighbours. Of channel quads, four are; of token quads none, so
words of 32 bits are written that hold the bytes of four tokens: of all four where they are encoded
together, else with three bytes as they were.
"""

from __future__ import annotations

from math import gcd

from ..ir.arrangements import CHANNEL_QUADS, QUAD, ROWS, TOKEN_QUADS
from ..ir.planes import ARRAYS, code_bits
from .cpu_pages import PageReader
from .cpu_text import Kernel, at, bit_field, bits_as, cast, splat

# Words of 32 bits that are written at once, at most: one register of 64 bytes, or more of fewer.
WORDS = 16


def write_planes(kernel: Kernel, reader: PageReader) -> None:
    """Pack the codes of a group of tokens from token t on into the planes of the page."""
    fmt, kind = reader.coded(), reader.layout.kind
    tokens = QUAD if kind == TOKEN_QUADS and fmt.group_tokens % QUAD == 0 else 1
    with kernel.block(f"for s in T.serial({fmt.group_tokens // tokens})"):
        for name, bits, first in ARRAYS[code_bits(fmt)]:
            plane = reader.width * bits // 8
            lanes = gcd(WORDS if kind == TOKEN_QUADS else 4 * WORDS, plane)
            with kernel.block(f"for w in T.serial({plane // lanes})"):
                column = f"w * {lanes}"
                packed = [
                    kernel.fresh(
                        "packed", _packed(reader, bits, first, f"s * {tokens} + {i}", column, lanes)
                    )
                    for i in range(tokens)
                ]
                _write_bytes(kernel, reader, name, packed, column, lanes)


def _packed(reader: PageReader, bits: int, first: int, token: str, column: str, lanes: int) -> str:
    """Return bytes of a plane: `bits` bits, from bit `first` on, of the codes of a token."""
    count, whole = 8 // bits, code_bits(reader.coded())
    text = ""
    for i in range(count):
        place = f"({token}) * {reader.layout.channels} + {i * reader.width // count} + {column}"
        code = at("codes", place, lanes)
        if bits < whole:
            code = bit_field(code, str(first), bits, lanes)
        if not i:
            text = code
            continue
        shifted = f"T.shift_left({code}, {splat(f'T.uint8({i * bits})', lanes)})"
        text = f"T.bitwise_or({text}, {shifted})"
    return text


def _write_bytes(
    kernel: Kernel, reader: PageReader, name: str, packed: list[str], column: str, lanes: int
) -> None:
    """Store bytes of a plane from `column` on: of token t + s, or of four from t + 4 s on."""
    page, kind = f"{reader.role}_uint8", reader.layout.kind

    def place(row: str, own: str) -> str:
        return reader.place(name, row, own)

    if kind == ROWS:
        kernel.line(f"{at(page, place('(t + s)', column), lanes)} = {packed[0]}")
        return
    if kind == CHANNEL_QUADS:
        for first in range(0, lanes, QUAD):
            quad = f"T.Shuffle([{packed[0]}], {list(range(first, first + QUAD))})"
            target = at(page, place("(t + s)", f"{column} + {first}"), QUAD)
            kernel.line(f"{target} = {quad if lanes > QUAD else packed[0]}")
        return
    wide = [cast("uint32", value, lanes) for value in packed]
    if len(packed) == QUAD:
        target = at(page, place(f"(t + s * {QUAD})", column), QUAD * lanes)
        words = wide[0]
        for i in range(1, QUAD):
            shifted = f"T.shift_left({wide[i]}, {splat(f'T.uint32({8 * i})', lanes)})"
            words = f"T.bitwise_or({words}, {shifted})"
    else:
        # One byte of each word changes.
        target = at(page, place(f"T.bitwise_and(t + s, {-QUAD})", column), QUAD * lanes)
        kernel.let("shift", f'T.Cast("uint32", T.bitwise_and(t + s, {QUAD - 1}) * 8)')
        others = "T.bitwise_xor(T.shift_left(T.uint32(255), shift), T.uint32(0xFFFFFFFF))"
        kept = f"T.bitwise_and({bits_as('uint32', target, lanes)}, {splat(others, lanes)})"
        words = f"T.bitwise_or({kept}, T.shift_left({wide[0]}, {splat('shift', lanes)}))"
    kernel.line(f"{target} = {bits_as('uint8', words, QUAD * lanes)}")
