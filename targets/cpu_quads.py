"""Which streams of a plan are read by integer dot products, and so stored in quads."""

from __future__ import annotations

from math import gcd

from ..ir.arrangements import CHANNEL_QUADS, QUAD, ROWS, TOKEN_QUADS, fits_tokens, holds
from ..ir.encodings import Dense, Drop, Int, Raw
from ..ir.integers import BLOCK
from ..ir.layouts import PageLayout
from ..ir.plan import AttentionPlan, StreamPlan
from ..ir.planes import code_bits, plane_widths
from .machines import Cpu

DOT_NAMES = {
    "pairs": "pmaddubsw, pmaddwd",
    "vnni": "vpdpbusd, vpdpwssd",
    "neon": "sdot, udot",
    "neon-i8mm": "usdot, udot",
}
# Sums of 32 bits hold so many products of codes of 8 bits and integers of 16.
MOST_WIDE = 256


def layouts(plan: AttentionPlan) -> tuple[PageLayout, PageLayout]:
    """Return the page layouts of k and v. They are the same for all processors."""
    k = _layout(plan.k, CHANNEL_QUADS if _quads_of_keys(plan) else ROWS)
    v = _layout(plan.v, TOKEN_QUADS if _quads_of_values(plan) else ROWS)
    return k, v


def why_floats(plan: AttentionPlan, role: str) -> str | None:
    """Return None if a stream is read by integer dot products, or one sentence why not."""
    if plan.compute != "int":
        return "the recipe says compute = float"
    stream = plan.k if role == "k" else plan.v
    parts = _coded(stream)
    if parts is None:
        return "raw formats are read in floats"
    if role == "k" and not _rounds_queries(plan, parts):
        return "slices of keys need scales of channels"
    if role == "v" and plan.k.tokens.sink != plan.v.tokens.sink:
        return "keys and values keep different numbers of first tokens raw"
    if (_quads_of_keys if role == "k" else _quads_of_values)(plan):
        return None
    return "channels or groups do not fill whole lanes of four"


def path_of(plan: AttentionPlan, role: str, cpu: Cpu) -> str:
    """Return in words how `attend` reads a stream, and if in floats, why."""
    reason = why_floats(plan, role)
    return f"floats ({reason})" if reason else f"integer dot products ({DOT_NAMES[cpu.dots]})"


def integer_queries(plan: AttentionPlan) -> str | None:
    """Return the type of the integers of queries that are rounded once a step, or None."""
    if plan.query_bits is None or not _quads_of_keys(plan):
        return None
    return f"int{plan.query_bits}"


def lanes_of(cpu: Cpu) -> int:
    """Return the 32-bit lanes of a vector register."""
    return cpu.vector // 4


def value_lanes(fmt: Dense, channels: int, cpu: Cpu) -> int:
    """Return the lanes in which values are read: those of one plane and one scale."""
    return gcd(lanes_of(cpu), _value_chunk(fmt, channels))


def _layout(stream: StreamPlan, kind: str) -> PageLayout:
    rest = stream.tokens.rest
    return PageLayout(stream.page_tokens, stream.heads, stream.channels, rest, kind)


def _coded(stream: StreamPlan) -> list[tuple[Dense, int]] | None:
    """Return format and channels of each slice that is stored; None if part of it is raw."""
    parts = []
    for part in _layout(stream, ROWS).parts:
        if isinstance(part.format, Raw):
            return None
        if not isinstance(part.format, Drop):
            parts.append((part.format, part.width))
    return parts


def _quads_of_keys(plan: AttentionPlan) -> bool:
    parts = _coded(plan.k)
    if plan.compute != "int" or parts is None:
        return False
    if not _rounds_queries(plan, parts):
        return False
    if not holds(CHANNEL_QUADS, plan.k.tokens.rest, plan.k.page_tokens, plan.k.channels):
        return False
    return all(code_bits(fmt) != 8 or width <= MOST_WIDE for fmt, width in parts)


def _quads_of_values(plan: AttentionPlan) -> bool:
    parts = _coded(plan.v)
    if plan.compute != "int" or parts is None:
        return False
    if not holds(TOKEN_QUADS, plan.v.tokens.rest, plan.v.page_tokens, plan.v.channels):
        return False
    # Blocks of weights must lie inside one split, and inside one group of tokens.
    whole = plan.k.tokens.sink == plan.v.tokens.sink
    whole = whole and all(fits_tokens(fmt, BLOCK) for fmt, _ in parts)
    return whole and all(_value_chunk(fmt, width) % QUAD == 0 for fmt, width in parts)


def _rounds_queries(plan: AttentionPlan, parts: list[tuple[Dense, int]]) -> bool:
    """Return whether queries become integers: once a step, or with the scales of channels."""
    of_channels = all(isinstance(fmt, Int) and fmt.axis == "channel" for fmt, _ in parts)
    return plan.query_bits is not None or of_channels


def _value_chunk(fmt: Dense, channels: int) -> int:
    """Return the channels in a row that share bytes and scale, at most."""
    width = min(width for _, width in plane_widths(fmt, channels))
    group = fmt.group_channels
    return width if group in (1, channels) else gcd(width, group)
