"""What the whole tiles of a row leave: its first tokens and its last ones.

Tokens before the first whole tile and behind the last, in parts of PART, in the same launch as the
whole tiles: programs behind those of the splits. They are few, lie anywhere, and are multiplied in
float32, a few at a time: the rows of one matrix product.
"""

from __future__ import annotations

from ..ir.plan import AttentionPlan
from .gpu_sources import Piece, pieces_of, readers_in, write_place, write_raw, write_stored
from .gpu_text import LN_2, LOG2_E, Dialect, Kernel, both, down, load, write_softcap
from .gpu_tiles import kinds

PART = 64
"""Tokens of a part."""


def write_rest(kernel: Kernel, plan: AttentionPlan, rows: int, dialect: Dialect) -> None:
    """Attend to one part of what is left.

    Bound before: bh, b, h, split, length, k_end, v_end, whole_begin, whole_end, oldest. No name of
    the other branch is bound again: both ends of an `if` bind the same.

    Args:
        kernel: is written to.
        plan: what is stored and computed.
        rows: heads of the group, padded.
        dialect: of the machine.
    """
    own = zip((plan.k, plan.v), kinds(plan, dialect), strict=True)
    k, v = (pieces_of(stream, kind) for stream, kind in own)
    kernel.line(f"head = tl.arange(0, {rows})")
    for reader in (*readers_in(k), *readers_in(v)):
        reader.write_columns(kernel)
    for piece in k:
        at = f"(bh * rows + head)[None, :] * {plan.k.channels} + {down(piece.channels)}"
        mask = both(f"(head < {plan.group})[None, :]", down(piece.reader.columns))
        kernel.line(f"{piece.name}_query = {load(f'query + {at}', mask)}")
    kernel.note("tokens before the whole tiles, then tokens behind them")
    kernel.line(f"rest = (split - splits) * {PART}")
    kernel.line("is_none = whole_end <= whole_begin")
    kernel.line("before = tl.where(is_none, length - oldest, whole_begin - oldest)")
    kernel.line("behind = tl.where(is_none, 0, length - whole_end)")
    kernel.line(f"count = tl.minimum(before + behind, rest + {PART})")
    kernel.line(f'top = tl.full(({rows},), float("-inf"), tl.float32)')
    kernel.line(f"mass = tl.zeros(({rows},), tl.float32)")
    for piece in v:
        kernel.line(f"{piece.out} = tl.zeros(({piece.reader.wide}, {rows}), tl.float32)")
    with kernel.block(f"for at in range(rest, count, {dialect.rest})"):
        kernel.line(f"i = at + tl.arange(0, {dialect.rest})")
        kernel.line("here = i < count")
        kernel.line("position = tl.where(i < before, oldest + i, whole_end + i - before)")
        _write_scores(kernel, plan, k, dialect)
        _write_values(kernel, v, dialect)
    kernel.note("the part's share of the result")
    kernel.line("slot = (bh * parts + split) * rows + head")
    kernel.line(f"tl.store(part_max + slot, top * {LN_2}, mask=head < {plan.group})")
    kernel.line(f"tl.store(part_sum + slot, mass, mask=head < {plan.group})")
    for piece in v:
        at = f"slot[None, :] * {plan.v.channels} + {down(piece.channels)}"
        mask = both(f"(head < {plan.group})[None, :]", down(piece.reader.columns))
        kernel.line(f"tl.store(part_out + {at}, {piece.out}, mask={mask})")


def _write_scores(
    kernel: Kernel, plan: AttentionPlan, k: tuple[Piece, ...], dialect: Dialect
) -> None:
    """Bind `weight`, the exponentials of the tokens, [N, R], and `shrink`."""
    _write_sources(kernel, k, dialect.rest)
    for number, piece in enumerate(k):
        product = f'tl.dot({piece.name}, {piece.name}_query, input_precision="{dialect.precision}")'
        kernel.line(f"score {'+=' if number else '='} {product}")
    if plan.softcap is not None:
        write_softcap(kernel, plan.softcap)
    kernel.line(f'score = tl.where(here[:, None], score * {LOG2_E}, float("-inf"))')
    kernel.line("most = tl.maximum(top, tl.ceil(tl.max(score, axis=0)))")
    kernel.line("weight = tl.exp2(score - most[None, :])")
    kernel.line("shrink = tl.exp2(top - most)")
    kernel.line("mass = mass * shrink + tl.sum(weight, axis=0)")
    kernel.line("top = most")


def _write_values(kernel: Kernel, v: tuple[Piece, ...], dialect: Dialect) -> None:
    _write_sources(kernel, v, dialect.rest)
    for piece in v:
        product = f'tl.dot(tl.trans({piece.name}), weight, input_precision="{dialect.precision}")'
        kernel.line(f"{piece.out} = {piece.out} * shrink[None, :] + {product}")


def _write_sources(kernel: Kernel, pieces: tuple[Piece, ...], tokens: int) -> None:
    """Bind the pieces of the tokens, f32 [N, width], from pages and raw buffers."""
    stream = pieces[0].reader.stream
    role, sink = stream.role, stream.tokens.sink
    kernel.note("keys" if role == "k" else "values")
    in_pages = f"here & (position < {role}_end)" + (f" & (position >= {sink})" if sink else "")
    kernel.line(f"{role}_here = {in_pages}")
    for piece in pieces:
        if not piece.reader.is_stored:
            wide = piece.reader.wide
            kernel.line(f"{piece.name} = tl.zeros(({tokens}, {wide}), tl.float32)")
    place = f"position - {sink}" if sink else "position"
    write_place(kernel, stream, place, "", f"{role}_here")
    write_stored(kernel, pieces, f"{role}_here")
    write_raw(kernel, stream, pieces, "here")
