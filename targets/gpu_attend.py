"""The kernel attend in float32: one split of the keys for one query a row.

Split 0 holds the positions [0, sink + C), split i holds [sink + i C, sink + (i + 1) C), with C
whole pages of K. Tiles of N tokens begin at sink + j N, so a tile of pages lies in one page of K.
The bounds depend on nothing else, so the batch changes no bit.

Tokens are rows and queries columns, [N, R]. A tile reads keys and values where they are, and
multiplies them in float32 (`gpu_sources.py`). Where pages are tiles, one query a row is attended by
`gpu_whole.py` instead.

Exponentials are powers of two, and the largest score is rounded up to a whole number: what was
summed before is then shrunk by a power of two, without rounding.
"""

from __future__ import annotations

from ..ir.arrangements import ROWS
from ..ir.plan import AttentionPlan, StreamPlan
from .gpu_pages import declare_pages, readers_of
from .gpu_sources import Piece, pieces_of, readers_in, write_place, write_raw, write_stored
from .gpu_text import (
    LN_2,
    LOG2_E,
    Dialect,
    Kernel,
    both,
    down,
    load,
    padded,
    write_softcap,
)
from .gpu_tiles import kinds
from .source import split_tokens


def tile_tokens(plan: AttentionPlan) -> int:
    """Return N: tokens of a tile; the more columns its planes have, the fewer."""
    most = 8192 // _columns(plan)
    return max(16, min(64, 1 << (most.bit_length() - 1)))


def _columns(plan: AttentionPlan) -> int:
    """Return the columns that a tile keeps in shared memory: all planes, or twice the widest."""
    return max(
        max(
            2 * max(r.wide for r in readers),
            sum(r.wide * r.part.planes for r in readers),
        )
        for readers in (readers_of(plan.k, ROWS), readers_of(plan.v, ROWS))
    )


def decode_rows(plan: AttentionPlan, dialect: Dialect) -> int:
    """Return the rows of a tile of attend: the group, made a size that a matrix product takes."""
    return padded(plan.group, dialect.least_rows)


def attend(plan: AttentionPlan, dialect: Dialect) -> Kernel:
    """Return the kernel that attends one query a row, all heads of a group, to one split."""
    return _attend(plan, "attend", decode_rows(plan, dialect), dialect)


def _attend(plan: AttentionPlan, name: str, rows: int, dialect: Dialect) -> Kernel:
    """Return the kernel for a tile of rows: row = t * G + g, query t of head g of the group.

    Grid: (B H, splits, tiles of rows).
    """
    kernel, n = Kernel(name), tile_tokens(plan)
    own = zip((plan.k, plan.v), kinds(plan, dialect), strict=True)
    k, v = (pieces_of(stream, kind) for stream, kind in own)
    declare(kernel, plan)
    write_row(kernel, plan, rows)
    for reader in (*readers_in(k), *readers_in(v)):
        reader.write_columns(kernel)
    _write_queries(kernel, plan, k)
    _write_bounds(kernel, plan, n)
    kernel.line(f'best = tl.full(({rows},), float("-inf"), tl.float32)')
    kernel.line(f"total = tl.zeros(({rows},), tl.float32)")
    for piece in v:
        kernel.line(f"{piece.out} = tl.zeros(({piece.reader.wide}, {rows}), tl.float32)")
    with kernel.block(f"for tile in range(begin, stop, {n})"):
        kernel.line(f"position = tile + tl.arange(0, {n})")
        _write_scores(kernel, plan, k, dialect.precision)
        _write_softmax(kernel)
        _write_values(kernel, plan, v, dialect.precision)
    _write_partials(kernel, plan, v)
    return kernel


def write_row(kernel: Kernel, plan: AttentionPlan, rows: int = 0) -> None:
    """Bind the KV head and the split of a program, and how far its row is filled and encoded.

    `rows`: of a tile of queries, if there are several.
    """
    kernel.line("bh = tl.program_id(0).to(tl.int64)")
    kernel.line(f"b = bh // {plan.k.heads}")
    kernel.line(f"h = bh % {plan.k.heads}")
    kernel.line("split = tl.program_id(1)")
    if rows:
        kernel.line(f"row = tl.program_id(2) * {rows} + tl.arange(0, {rows})")
    write_ends(kernel)


def write_ends(kernel: Kernel) -> None:
    """Bind how far row b is filled, and encoded."""
    kernel.line("length = tl.load(length_of + b)")
    for role in ("k", "v"):
        kernel.line(f"{role}_end = tl.minimum(tl.load({role}_encoded + b), length)")


def declare(kernel: Kernel, plan: AttentionPlan) -> None:
    """Declare what every kernel takes that attends."""
    kernel.array("query", "float32")
    kernel.array("length_of", "int64")
    for stream in (plan.k, plan.v):
        declare_stream(kernel, stream)
    for name in ("part_out", "part_max", "part_sum"):
        kernel.array(name, "float32")
    for name in ("parts", "rows", "queries"):
        kernel.scalar(name)


def declare_stream(kernel: Kernel, stream: StreamPlan) -> None:
    """Declare where the tokens of a stream are."""
    role = stream.role
    if stream.tokens.sink:
        kernel.array(f"{role}_sink", "float32")
    kernel.array(f"{role}_tail", "float32")
    for name in ("tail_first", "encoded"):
        kernel.array(f"{role}_{name}", "int64")
    declare_pages(kernel, stream)
    kernel.scalar(f"{role}_capacity")


def _write_queries(kernel: Kernel, plan: AttentionPlan, k: tuple[Piece, ...]) -> None:
    """Bind <k>_query_i, the queries of each plane [channels, R], and the position of each row."""
    kernel.note("the queries, one block for each plane of the keys")
    kernel.line(f"exists = row < queries * {plan.group}")
    for piece in k:
        mask = both("exists[None, :]", down(piece.reader.columns))
        at = f"(bh * rows + row)[None, :] * {plan.k.channels} + {down(piece.channels)}"
        kernel.line(f"{piece.reader.name}_query_{piece.plane} = {load(f'query + {at}', mask)}")
    kernel.line(f"newest = tl.where(exists, length - queries + row // {plan.group}, -1)")


def _write_bounds(kernel: Kernel, plan: AttentionPlan, n: int) -> None:
    """Bind begin and stop: the tiles of the split that a row of the tile can see."""
    sink, size = plan.k.tokens.sink, split_tokens(plan)
    kernel.note("the tokens of the split that some row sees")
    kernel.line(f"begin = split.to(tl.int64) * {size}" + (f" + {sink}" if sink else ""))
    kernel.line(f"stop = tl.minimum(begin + {size}, tl.max(newest, axis=0) + 1)")
    if sink:
        kernel.line(f"begin = tl.where(split == 0, {sink - -(-sink // n) * n}, begin)")
    if plan.window is not None:
        first = "tl.min(tl.where(exists, newest, length), axis=0)"
        kernel.line(f"oldest = {first} - {plan.window - 1}")
        kernel.line(f"begin += tl.maximum(oldest - begin, 0) // {n} * {n}")


def _write_scores(
    kernel: Kernel, plan: AttentionPlan, k: tuple[Piece, ...], precision: str
) -> None:
    """Bind `score`, f32 [N, R], in powers of two; -inf where a row does not see a key."""
    _write_sources(kernel, plan, k)
    for number, piece in enumerate(k):
        q = f"{piece.reader.name}_query_{piece.plane}"
        product = f'tl.dot({piece.name}, {q}, input_precision="{precision}")'
        kernel.line(f"score {'+=' if number else '='} {product}")
    _write_seen(kernel, plan)
    if plan.softcap is not None:
        write_softcap(kernel, plan.softcap)
    kernel.line(f'score = tl.where(seen, score * {LOG2_E}, float("-inf"))')


def _write_seen(kernel: Kernel, plan: AttentionPlan) -> None:
    """Bind `seen`: causal, inside the window, and a position at all."""
    terms = ["(position[:, None] <= newest[None, :])", "(position[:, None] < stop)"]
    if plan.k.tokens.sink:
        terms.append("(position[:, None] >= 0)")
    if plan.window is not None:
        terms.append(f"(position[:, None] > newest[None, :] - {plan.window})")
    kernel.line(f"seen = {' & '.join(terms)}")


def _write_softmax(kernel: Kernel) -> None:
    """Bind `weight`, the exponentials, and `shrink`, the factor on what was added up before."""
    kernel.note("online softmax")
    kernel.line("most = tl.maximum(best, tl.ceil(tl.max(score, axis=0)))")
    kernel.line('safe = tl.where(most > float("-inf"), most, 0.0)')
    kernel.line("weight = tl.exp2(score - safe[None, :])")
    kernel.line("shrink = tl.exp2(best - safe)")
    kernel.line("total = total * shrink + tl.sum(weight, axis=0)")
    kernel.line("best = most")


def _write_values(
    kernel: Kernel, plan: AttentionPlan, v: tuple[Piece, ...], precision: str
) -> None:
    """Add the tile's values to the outputs of each plane."""
    _write_sources(kernel, plan, v)
    for piece in v:
        product = f'tl.dot(tl.trans({piece.name}), weight, input_precision="{precision}")'
        kernel.line(f"{piece.out} = {piece.out} * shrink[None, :] + {product}")


def _write_sources(kernel: Kernel, plan: AttentionPlan, pieces: tuple[Piece, ...]) -> None:
    """Bind the pieces of a tile, f32 [N, width], read from pages and raw buffers."""
    stream, n = pieces[0].reader.stream, tile_tokens(plan)
    role, sink, size = stream.role, stream.tokens.sink, stream.page_tokens
    kernel.note(f"{'keys' if role == 'k' else 'values'}: what the pages hold")
    for piece in pieces:
        kernel.line(f"{piece.name} = tl.zeros(({n}, {piece.reader.wide}), tl.float32)")
    with kernel.block(f"if (tile < {role}_end) & (tile + {n} > {sink})"):
        in_pages = f"(position >= {sink}) & (position < {role}_end) & (position < stop)"
        if plan.window is not None:  # pages behind the window may have been given back
            in_pages += " & (position >= oldest)"
        kernel.line(f"{role}_here = {in_pages}")
        is_lone = size % n == 0 and sink % n == plan.k.tokens.sink % n
        place = "tile" if is_lone else "position"
        place = f"{place} - {sink}" if sink else place
        within = (f"tl.arange(0, {n})", "") if is_lone else ("", f"{role}_here")
        write_place(kernel, stream, place, *within)
        write_stored(kernel, pieces, f"{role}_here")
    kernel.note("and what is not encoded")
    unencoded = f"(tile + {n} > {role}_end)"
    with kernel.block(f"if {unencoded} | (tile < {sink})" if sink else f"if {unencoded}"):
        write_raw(kernel, stream, pieces, "(position < stop)")


def _write_partials(kernel: Kernel, plan: AttentionPlan, v: tuple[Piece, ...]) -> None:
    kernel.note("the split's share of the result")
    kernel.line("part = (bh * parts + split) * rows + row")
    kernel.line(f"tl.store(part_max + part, best * {LN_2}, mask=exists)")
    kernel.line("tl.store(part_sum + part, total, mask=exists)")
    for piece in v:
        mask = both("exists[None, :]", down(piece.reader.columns))
        at = f"part[None, :] * {plan.v.channels} + {down(piece.channels)}"
        kernel.line(f"tl.store(part_out + {at}, {piece.out}, mask={mask})")
