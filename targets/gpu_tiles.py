"""Which streams of a plan the matrix units read as they are stored.

Their pages are tiles: `gpu_blocks.py` says how one of 64 tokens is cut, `gpu_scales.py` what
belongs to its tokens. What is multiplied, and what it is rounded to, says `ir/halves.py`.
"""

from __future__ import annotations

from math import gcd

from ..ir.arrangements import ROWS, TILES, TURNED
from ..ir.encodings import Drop, Int, Lut, Raw
from ..ir.halves import TILE
from ..ir.layouts import Part
from ..ir.plan import AttentionPlan
from ..ir.planes import code_bits
from .gpu_blocks import block_bytes, plane_bytes
from .gpu_lanes import is_wide
from .gpu_text import Dialect

LEAST_TOKENS = 32
"""Tokens that share scales of channels, at least."""
LEAST_RESULTS = 64
"""Numbers of a part's results, which are memory to build operands in, at least."""


def kinds(plan: AttentionPlan, dialect: Dialect | None = None) -> tuple[str, str]:
    """Return the arrangements of the pages of k and v: tiles if the matrix units read both."""
    if why_floats(plan) is not None:
        return ROWS, ROWS
    return TILES, TURNED if dialect and dialect.lanes and is_wide(plan) else TILES


def key_tokens(plan: AttentionPlan) -> int:
    """Return the tokens of a tile whose keys are multiplied at once: those of a channel's scale."""
    groups = [part.format.group_tokens for part in plan.k.page_layout().parts]
    return min([TILE, *(gcd(TILE, group) for group in groups if group > 1)])


def why_floats(plan: AttentionPlan) -> str | None:
    """Return None if whole tiles are multiplied as they are stored, or one sentence why not."""
    if plan.compute != "int":
        return "the recipe says compute = float"
    if plan.k.tokens.sink != plan.v.tokens.sink:
        return "keys and values keep different numbers of first tokens raw"
    for stream in (plan.k, plan.v):
        for part in stream.page_layout().parts:
            reason = _why_not(plan, stream.role, part)
            if reason:
                return f"{'keys' if stream.role == 'k' else 'values'}: {reason}"
    return None


def _why_not(plan: AttentionPlan, role: str, part: Part) -> str | None:
    """Return why the matrix units do not read a slice as it is stored, or None."""
    fmt = part.format
    if isinstance(fmt, Drop):
        return None
    if isinstance(fmt, Raw):
        return "raw formats are read in floats"
    if part.sparse is not None and part.sparse.values != "f16":
        return "sparse entries in other types than f16"
    if isinstance(fmt, Lut) and fmt.bits != 4:
        return "no sequence unpacks the codes"
    if block_bytes(part) % 2 or plane_bytes(part) % 2:
        return "scales or planes of an odd number of bytes"
    if code_bits(fmt) == 3 and part.width % 32:
        return "three bits take a multiple of 32 channels"
    if (code_bits(fmt) == 3 or part.sparse) and plan.group * plan.v.channels < LEAST_RESULTS:
        return "three bits and sparse entries take more results of a KV head"
    if fmt.group_channels == 1 and not (isinstance(fmt, Int) and fmt.axis == "channel"):
        return "a scale for each number"
    if isinstance(fmt, Int) and fmt.axis == "channel":
        if role == "v":
            return "scales of channels"
        if fmt.params != "f16" or fmt.group_tokens % LEAST_TOKENS:
            return "scales of channels take f16, and groups of 32 tokens"
    elif role == "k" and plan.query_bits is None:
        return "slices of keys need scales of channels"
    return None
