"""Planes of codes: how the codes of a token share bytes, split in chunks and never interleaved.

Codes of 2, 4 and 8 bits are one array of bytes; those of 3 bits are two. `ir/layouts.py` says where
the arrays lie in a page.
"""

from __future__ import annotations

import numpy as np

from .arrays import Array
from .encodings import Bfp, Dense, Lut
from .encodings.lut import OFFSET
from .errors import KvantError

# The arrays of codes by their bits: name, bits of a code that it holds, and from which bit on.
ARRAYS: dict[int, tuple[tuple[str, int, int], ...]] = {
    2: (("codes", 2, 0),),
    3: (("codes", 2, 0), ("high", 1, 2)),
    4: (("codes", 4, 0),),
    8: (("codes", 8, 0),),
}


def code_bits(fmt: Dense) -> int:
    """Return the bits of a stored code.

    Raises: KvantError("no-layout") if no layout holds codes of that width.
    """
    bits = fmt.mantissa if isinstance(fmt, Bfp) else fmt.bits
    if bits not in ARRAYS:
        raise KvantError(
            "no-layout",
            f"no page layout holds codes of {bits} bits",
            where="page layout",
            fix=f"use one of: {', '.join(str(b) for b in ARRAYS)} bits",
        )
    return bits


def low_bits(fmt: Dense) -> int:
    """Return how many bits of a code the array "codes" holds."""
    return ARRAYS[code_bits(fmt)][0][1]


def offset(fmt: Dense) -> int:
    """Return what kernels take from what they multiply, in a format without zero points."""
    return OFFSET if isinstance(fmt, Lut) else 1 << code_bits(fmt) - 1


def plane_widths(fmt: Dense, channels: int) -> list[tuple[str, int]]:
    """Return (plane name, bytes a token) of the codes."""
    arrays = ARRAYS[code_bits(fmt)]
    per_byte = 8 // min(bits for _, bits, _ in arrays)
    if channels % per_byte:
        raise KvantError(
            "channels-do-not-pack",
            f"{channels} channels of {code_bits(fmt)} bits do not fill whole bytes",
            where="page layout",
            fix=f"use a multiple of {per_byte} channels, or 8 bits",
        )
    return [(name, channels * bits // 8) for name, bits, _ in arrays]


def pack_plane(codes: Array, bits: int) -> Array:
    """Pack codes of 1, 2, 4 or 8 bits [..., C] to bytes u8 [..., C * bits / 8].

    With n = 8 / bits, byte j holds the channels j + i C/n, i = 0..n-1, at bit i * bits (low first).
    """
    per_byte = 8 // bits
    chunks = codes.reshape(*codes.shape[:-1], per_byte, codes.shape[-1] // per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8)[:, None] * np.uint8(bits)
    packed: Array = np.bitwise_or.reduce(chunks.astype(np.uint8) << shifts, axis=-2)
    return packed


def unpack_plane(packed: Array, bits: int) -> Array:
    """Undo `pack_plane`: u8 [..., C * bits / 8] to codes u8 [..., C]."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8)[:, None] * np.uint8(bits)
    chunks = (packed[..., None, :] >> shifts) & np.uint8(2**bits - 1)
    codes: Array = chunks.reshape(*packed.shape[:-1], per_byte * packed.shape[-1])
    return codes


def pack_codes(fmt: Dense, fields: dict[str, Array]) -> dict[str, Array]:
    """Return the fields of a format with codes packed to planes."""
    codes = fields["codes"]
    plane_widths(fmt, codes.shape[-1])
    return fields | {
        name: pack_plane((codes >> np.uint8(first)) & np.uint8(2**bits - 1), bits)
        for name, bits, first in ARRAYS[code_bits(fmt)]
    }


def unpack_codes(fmt: Dense, planes: dict[str, Array]) -> dict[str, Array]:
    """Return the planes of a format as fields with one code a byte."""
    arrays = ARRAYS[code_bits(fmt)]
    parts = [unpack_plane(planes[name], bits) << np.uint8(first) for name, bits, first in arrays]
    packed = {name for name, _, _ in arrays}
    fields = {name: array for name, array in planes.items() if name not in packed}
    return {"codes": np.bitwise_or.reduce(parts), **fields}
