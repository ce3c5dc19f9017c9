"""Orders of the bytes of a page: rows, quads for instructions that sum four products a lane, tiles.

    rows            each field as it is: tokens, or groups of tokens, one after another
    channel-quads   u8[P, W] of codes as [P / 16, W / 4, 16, 4]: four bytes of one token a lane
    token-quads     u8[P, W] of codes as [P / 4, W, 4]: four tokens of one byte a lane
    tiles           codes as in rows: 64 tokens are one operand of a GPU's matrix product
    tiles-turned    codes turned around, [W, P]: the tokens of a byte column are neighbours

Quads and tiles turn scales, zeros, exponents and sparse entries of tokens around, [C / gc, P],
so that those of neighbouring tokens are neighbours; those of groups of tokens stay as they are.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .arrays import Array
from .encodings import Dense, Drop, Format, Int, SliceFormat, Slices, dense_of
from .planes import plane_widths

ROWS, CHANNEL_QUADS, TOKEN_QUADS = "rows", "channel-quads", "token-quads"
TILES, TURNED = "tiles", "tiles-turned"
KINDS = (ROWS, CHANNEL_QUADS, TOKEN_QUADS, TILES, TURNED)
# Numbers that share a lane of 32 bits; tokens that lie together in channel quads.
QUAD, TILE = 4, 16
CODES = ("codes", "high")


def holds(kind: str, fmt: Format | SliceFormat, tokens: int, channels: int) -> bool:
    """Return whether pages of a format can have an arrangement.

    Quads take codes of whole heads or of all slices; a plane of channels, a scale's channels and a
    scale's tokens must then be whole lanes of the sum.
    """
    if kind in (ROWS, TILES, TURNED):
        return True
    if isinstance(fmt, Slices):
        stored = [part for part in fmt.slices if not isinstance(part.format, Drop)]
        return all(holds(kind, part.format, tokens, part.width) for part in stored)
    dense = dense_of(fmt)
    if dense is None or tokens % TILE:
        return False
    widths = [width for _, width in plane_widths(dense, channels)]
    group = dense.group_channels
    if kind == CHANNEL_QUADS:
        whole_group = group == 1 or group % QUAD == 0
        return not any(w % QUAD for w in widths) and whole_group and fits_tokens(dense, TILE)
    return fits_tokens(dense, QUAD)


def fits_tokens(fmt: Dense, tokens: int) -> bool:
    """Return whether so many neighbouring tokens always share the scales of channels, if any."""
    per_channel = isinstance(fmt, Int) and fmt.axis == "channel"
    return not per_channel or fmt.group_tokens % tokens == 0


@lru_cache(maxsize=256)
def places(kind: str, tokens: int, name: str, rows: int, columns: int) -> Array:
    """Return int64[rows, columns], where the elements of a field are in it.

    Args:
        kind: one of KINDS.
        tokens: of a page.
        name: of the field, without the prefix of a slice.
        rows: of the field.
        columns: of the field.
    """
    natural = np.arange(rows * columns).reshape(rows, columns)
    if kind == ROWS or (name not in CODES and rows < tokens):
        return natural
    if name not in CODES or kind == TURNED:
        return natural.reshape(columns, rows).T
    if kind == TILES:
        return natural
    if kind == TOKEN_QUADS:
        quads = natural.reshape(rows // QUAD, columns, QUAD)
        return quads.swapaxes(1, 2).reshape(rows, columns)
    tiles = natural.reshape(rows // TILE, columns // QUAD, TILE, QUAD)
    return tiles.swapaxes(1, 2).reshape(rows, columns)
