"""Scales, zero points and exponents of a tile's tokens, and what they say of its codes."""

from __future__ import annotations

from ..ir.encodings import Bfp, Int
from ..ir.halves import middle
from .gpu_pages import PageReader, as_scale, block_in
from .gpu_text import as_f32, load


def per_channel(reader: PageReader) -> bool:
    """Return whether scales belong to channels."""
    fmt = reader.coded()
    return isinstance(fmt, Int) and fmt.axis == "channel"


def affine(reader: PageReader) -> Int:
    """Return the format of a reader, one with zero points."""
    fmt = reader.coded()
    if not isinstance(fmt, Int):
        raise TypeError("the format has no zero points")
    return fmt


def has_zero(reader: PageReader) -> bool:
    """Return whether a format stores zero points."""
    fmt = reader.coded()
    return isinstance(fmt, Int) and fmt.zero != "none"


def middle_of(reader: PageReader) -> int:
    """Return the code from which a reader's codes are counted."""
    return middle(reader.coded())


def scale_of(reader: PageReader, group: int) -> str:
    """Return the scales of a tile's tokens over `worth_of` the format, f32 [N]."""
    fmt = reader.coded()
    if not isinstance(fmt, Bfp):
        return as_scale(fmt, stored_of(reader, "scale", group))
    exponent = byte_of_word(reader, "exponent", group)
    return f"({exponent} << 23).to(tl.float32, bitcast=True)"


def worth_of(reader: PageReader) -> float:
    """Return what all scales are multiplied with besides, a power of two: once, at the end."""
    fmt = reader.coded()
    return 2.0 ** (2 - fmt.mantissa) if isinstance(fmt, Bfp) else 1.0


def zero_of(reader: PageReader, group: int) -> str:
    """Return the zero points of a tile's tokens, f32 [N]."""
    return as_f32(stored_of(reader, "zero", group), affine(reader).params)


def byte_of_word(reader: PageReader, name: str, column: int) -> str:
    """Return the bytes of a tile's tokens in a column of a field, i32 [N], from their words.

    The tile's bytes are fewer than copies to shared memory of four bytes a thread would be.
    """
    field, role = reader.part.field(name), reader.role
    first = (field.offset + column * reader.layout.tokens) // 4
    word = load(f"{role}_int32 + {block_in(role, 4)} + {first} + {role}_t // 4")
    return f"(({word} >> {role}_t % 4 * 8) & 255)"


def in_words(reader: PageReader, name: str) -> bool:
    """Return whether a field of tokens is read from words, two numbers in each."""
    is_short = reader.part.field(name).dtype in ("float16", "uint16")
    return reader.words and is_short and reader.is_turned(name)


def stored_of(reader: PageReader, name: str, column: int) -> str:
    """Return the numbers of a tile's tokens in a column of a field, in its type, [N].

    Copies to shared memory take four bytes a thread at least; where a thread has one number of two
    bytes, it takes the word that holds it (`PageReader.words`).
    """
    if not in_words(reader, name):
        return load(reader.parameter_at(name, column))
    field, role = reader.part.field(name), reader.role
    first = (field.offset + column * reader.layout.tokens * 2) // 4
    word = load(f"{role}_int32 + {block_in(role, 4)} + {first} + ({role}_t >> 1)")
    half = f"({word} >> (({role}_t & 1) << 4)).to(tl.{field.dtype.replace('float', 'int')})"
    return f"{half}.to(tl.float16, bitcast=True)" if field.dtype == "float16" else half
