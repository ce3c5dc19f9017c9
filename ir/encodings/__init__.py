"""Encodings: how a stream's numbers are stored. One file a format family.

Every format has `group_tokens`, `check(channels, where)`, `encode(x) -> fields`, `decode(fields)`
and `roundtrip(x)`; fields are named arrays as a page holds them, except that codes are one a byte.
`Drop`, which only a slice can be, stores nothing, so it has no `decode`: `Slices` fills in zeros.
"""

from .affine import Int
from .bfp import Bfp
from .lut import Lut
from .raw import Raw
from .slices import Drop, Slice, SliceFormat, Slices, Term
from .sparse import Dense, Sparse, dense_of
from .tokens import Format, Tokens

__all__ = [
    "Bfp",
    "Dense",
    "Drop",
    "Format",
    "Int",
    "Lut",
    "Raw",
    "Slice",
    "SliceFormat",
    "Slices",
    "Sparse",
    "Term",
    "Tokens",
    "dense_of",
]
