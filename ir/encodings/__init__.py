"""Encodings: how a stream's numbers are stored. One file a format family.

Every format has `group_tokens`, `check(channels, where)`, `encode(x) -> fields`, `decode(fields)`
and `roundtrip(x)`; fields are named arrays as a page holds them, except that codes are one a byte.
"""

from .affine import Int
from .bfp import Bfp
from .raw import Raw
from .slices import Drop, Plain, Slice, Slices
from .tokens import Format, Tokens

__all__ = ["Bfp", "Drop", "Format", "Int", "Plain", "Raw", "Slice", "Slices", "Tokens"]
