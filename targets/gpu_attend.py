"""The kernel attend: one split of the keys for one tile of queries, by online softmax.

Split 0 holds the positions [0, sink + C), split i holds [sink + i C, sink + (i + 1) C), with C
whole pages of K. Tiles of N tokens begin at sink + j N, so a tile of pages lies in one page of K.
The bounds depend on nothing else, so the batch changes no bit.

A tile reads keys and values where they are: what is encoded from the pages; what is not yet, and
the sink, from the raw buffers. Tokens that lie elsewhere read as zero, so the two add up.
"""

from __future__ import annotations

from typing import TypeAlias

from ..ir.plan import AttentionPlan, StreamPlan
from .gpu_pages import PageReader, declare_pages, readers_of
from .gpu_text import LEAST_DOT, Kernel, across, both, load, padded
from .source import split_tokens

Readers: TypeAlias = tuple[PageReader, ...]


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
        for readers in (readers_of(plan.k), readers_of(plan.v))
    )


def block_rows(plan: AttentionPlan) -> int:
    """Return the rows (query, head of the group) of a tile of attend_block.

    As many as tokens, but the least where a tile has many columns: sm_89 has 99 KiB for both.
    """
    return tile_tokens(plan) if _columns(plan) <= 128 else LEAST_DOT


def decode_rows(plan: AttentionPlan) -> int:
    """Return the rows of a tile of attend: the group, made a size that a matrix product takes."""
    return padded(plan.group, LEAST_DOT)


def attend(plan: AttentionPlan, name: str, rows: int, precision: str) -> Kernel:
    """Return the kernel that attends a tile of rows to one split.

    Args:
        plan: what is stored and computed.
        name: "attend" or "attend_block".
        rows: of a tile, each a query of one head of the group: row = t * G + g.
        precision: of the matrix products, as Triton calls it.

    Grid: (B H, splits, tiles of rows).
    """
    kernel, n = Kernel(name), tile_tokens(plan)
    k, v = readers_of(plan.k), readers_of(plan.v)
    _declare(kernel, plan)
    kernel.line("bh = tl.program_id(0).to(tl.int64)")
    kernel.line(f"b = bh // {plan.k.heads}")
    kernel.line(f"h = bh % {plan.k.heads}")
    kernel.line("split = tl.program_id(1)")
    kernel.line(f"row = tl.program_id(2) * {rows} + tl.arange(0, {rows})")
    kernel.line("length = tl.load(length_of + b)")
    for role in ("k", "v"):
        kernel.line(f"{role}_end = tl.minimum(tl.load({role}_encoded + b), length)")
    for reader in (*k, *v):
        reader.write_columns(kernel)
    _write_queries(kernel, plan, k)
    _write_bounds(kernel, plan, rows, n)
    kernel.line(f'best = tl.full(({rows},), float("-inf"), tl.float32)')
    kernel.line(f"total = tl.zeros(({rows},), tl.float32)")
    for reader, i in planes_of(v):
        kernel.line(f"{reader.name}_out_{i} = tl.zeros(({rows}, {reader.wide}), tl.float32)")
    with kernel.block(f"for tile in range(begin, stop, {n})"):
        kernel.line(f"position = tile + tl.arange(0, {n})")
        _write_scores(kernel, plan, k, precision)
        _write_softmax(kernel, plan)
        _write_values(kernel, plan, v, precision)
    _write_partials(kernel, plan, v)
    return kernel


def planes_of(readers: Readers) -> list[tuple[PageReader, int]]:
    """Return every plane of every reader."""
    return [(reader, i) for reader in readers for i in range(reader.part.planes)]


def _declare(kernel: Kernel, plan: AttentionPlan) -> None:
    kernel.array("query", "float32")
    kernel.array("length_of", "int64")
    for stream in (plan.k, plan.v):
        role = stream.role
        if stream.tokens.sink:
            kernel.array(f"{role}_sink", "float32")
        kernel.array(f"{role}_tail", "float32")
        for name in ("tail_first", "encoded"):
            kernel.array(f"{role}_{name}", "int64")
        declare_pages(kernel, stream)
        kernel.scalar(f"{role}_capacity")
    for name in ("part_out", "part_max", "part_sum"):
        kernel.array(name, "float32")
    for name in ("splits", "rows", "queries"):
        kernel.scalar(name)


def _write_queries(kernel: Kernel, plan: AttentionPlan, k: Readers) -> None:
    """Bind <k>_query_i, the queries of each plane, and the position of each row."""
    kernel.note("the queries, one block for each plane of the keys")
    kernel.line(f"exists = row < queries * {plan.group}")
    for reader, i in planes_of(k):
        mask = both("exists[:, None]", across(reader.columns))
        at = f"(bh * rows + row)[:, None] * {plan.k.channels} + {across(reader.channel(i))}"
        kernel.line(f"{reader.name}_query_{i} = {load(f'query + {at}', mask)}")
    kernel.line(f"newest = tl.where(exists, length - queries + row // {plan.group}, -1)")


def _write_bounds(kernel: Kernel, plan: AttentionPlan, rows: int, n: int) -> None:
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


def _write_scores(kernel: Kernel, plan: AttentionPlan, k: Readers, precision: str) -> None:
    """Bind `score`, f32 [rows, N], -inf where a row does not see a key."""
    _write_sources(kernel, plan, plan.k, k)
    for number, (reader, i) in enumerate(planes_of(k)):
        q, x = f"{reader.name}_query_{i}", f"tl.trans({reader.name}_{i})"
        product = f'tl.dot({q}, {x}, input_precision="{precision}")'
        kernel.line(f"score {'+=' if number else '='} {product}")
    _write_seen(kernel, plan)
    if plan.softcap is not None:
        _write_softcap(kernel, plan.softcap)
    kernel.line('score = tl.where(seen, score, float("-inf"))')


def _write_seen(kernel: Kernel, plan: AttentionPlan) -> None:
    """Bind `seen`: causal, inside the window, and a position at all."""
    terms = ["(position[None, :] <= newest[:, None])", "(position[None, :] < stop)"]
    if plan.k.tokens.sink:
        terms.append("(position[None, :] >= 0)")
    if plan.window is not None:
        terms.append(f"(position[None, :] > newest[:, None] - {plan.window})")
    kernel.line(f"seen = {' & '.join(terms)}")


def _write_softcap(kernel: Kernel, cap: float) -> None:
    """Replace `score` by cap tanh(score / cap): a series below 0.3, else by the exponential."""
    kernel.note("softcap: cap tanh(score / cap)")
    kernel.line(f"y = score * {1.0 / cap!r}")
    kernel.line("z = y * y")
    series = "-0.008863235529902197"
    for term in (0.021869488536155203, -0.05396825396825397, 0.13333333333333333, -1.0 / 3.0):
        series = f"({series} * z + {term!r})"
    kernel.line(f"near = y + y * z * {series}")
    kernel.line("size = tl.minimum(tl.abs(y), 20.0)")
    kernel.line("far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)")
    kernel.line("far = tl.where(y < 0.0, -far, far)")
    kernel.line(f"score = {cap!r} * tl.where(size < 0.3, near, far)")


def _write_softmax(kernel: Kernel, plan: AttentionPlan) -> None:
    """Bind `weight`, the exponentials, and `shrink`, the factor on what was added up before."""
    kernel.note("online softmax")
    kernel.line("most = tl.maximum(best, tl.max(score, axis=1))")
    kernel.line('safe = tl.where(most > float("-inf"), most, 0.0)')
    kernel.line("weight = tl.exp(score - safe[:, None])")
    kernel.line("shrink = tl.exp(best - safe)")
    kernel.line("total = total * shrink + tl.sum(weight, axis=1)")
    kernel.line("best = most")


def _write_values(kernel: Kernel, plan: AttentionPlan, v: Readers, precision: str) -> None:
    """Add the tile's values to the outputs of each plane."""
    _write_sources(kernel, plan, plan.v, v)
    for reader, i in planes_of(v):
        out = f"{reader.name}_out_{i}"
        product = f'tl.dot(weight, {reader.name}_{i}, input_precision="{precision}")'
        kernel.line(f"{out} = {out} * shrink[:, None] + {product}")


def _write_sources(
    kernel: Kernel, plan: AttentionPlan, stream: StreamPlan, readers: Readers
) -> None:
    """Bind <reader>_i, the planes of a tile, f32 [N, width], read from pages and raw buffers."""
    role, n, sink = stream.role, tile_tokens(plan), stream.tokens.sink
    kernel.note(f"{'keys' if role == 'k' else 'values'}: what the pages hold")
    for reader, i in planes_of(readers):
        kernel.line(f"{reader.name}_{i} = tl.zeros(({n}, {reader.wide}), tl.float32)")
    with kernel.block(f"if (tile < {role}_end) & (tile + {n} > {sink})"):
        in_pages = f"(position >= {sink}) & (position < {role}_end) & (position < stop)"
        if plan.window is not None:  # pages behind the window may have been given back
            in_pages += " & (position >= oldest)"
        kernel.line(f"{role}_here = {in_pages}")
        _write_place(kernel, plan, stream)
        for reader in (reader for reader in readers if reader.is_stored):
            reader.write_codes(kernel, f"{role}_here")
            for i in range(reader.part.planes):
                reader.write_plane(kernel, i, f"{role}_here", f"{reader.name}_{i}")
    kernel.note("and what is not encoded")
    unencoded = f"(tile + {n} > {role}_end)"
    with kernel.block(f"if {unencoded} | (tile < {sink})" if sink else f"if {unencoded}"):
        _write_raw_masks(kernel, stream)
        for reader, i in planes_of(readers):
            kernel.line(f"{reader.name}_{i} += {_raw(reader, i, 'tail')}")
            if sink:
                kernel.line(f"{reader.name}_{i} += {_raw(reader, i, 'sink')}")


def _write_place(kernel: Kernel, plan: AttentionPlan, stream: StreamPlan) -> None:
    """Bind where the tokens of the tile lie: their page and their place in it."""
    role, n, layout = stream.role, tile_tokens(plan), stream.page_layout()
    sink, size = stream.tokens.sink, stream.page_tokens
    whole = size % n == 0 and sink % n == plan.k.tokens.sink % n
    place = "tile" if whole else "position"
    kernel.line(f"{role}_place = {place} - {sink}" if sink else f"{role}_place = {place}")
    table = f"{role}_table + b * {role}_max_pages + {role}_place // {size}"
    kernel.line(f"{role}_page = {load(table, '' if whole else f'{role}_here')}")
    block = f"{role}_page * {layout.page_bytes} + h * {layout.head_bytes}"
    kernel.line(f"{role}_block = {block}")
    token = f"{role}_place % {size}"
    kernel.line(f"{role}_t = {token} + tl.arange(0, {n})" if whole else f"{role}_t = {token}")


def _write_raw_masks(kernel: Kernel, stream: StreamPlan) -> None:
    role, sink = stream.role, stream.tokens.sink
    late = f"(position >= {role}_end) & (position < stop)"
    in_tail = f"{late} & (position >= {sink})" if sink else late
    kernel.line(f"{role}_in_tail = {in_tail}")
    slot = f"bh * {role}_capacity + position - tl.load({role}_tail_first + b)"
    kernel.line(f"{role}_at_tail = ({slot}) * {stream.channels}")
    if sink:
        in_sink = f"(position >= 0) & (position < {sink}) & (position < stop)"
        kernel.line(f"{role}_in_sink = {in_sink}")
        kernel.line(f"{role}_at_sink = (bh * {sink} + position) * {stream.channels}")


def _raw(reader: PageReader, i: int, buffer: str) -> str:
    """Return plane i of the tokens in a raw buffer, f32."""
    role = reader.role
    pointer = f"{role}_{buffer} + {role}_at_{buffer}[:, None] + {across(reader.channel(i))}"
    return load(pointer, both(f"{role}_in_{buffer}[:, None]", across(reader.columns)))


def _write_partials(kernel: Kernel, plan: AttentionPlan, v: Readers) -> None:
    kernel.note("the split's share of the result")
    kernel.line("part = (bh * splits + split) * rows + row")
    kernel.line("tl.store(part_max + part, best, mask=exists)")
    kernel.line("tl.store(part_sum + part, total, mask=exists)")
    for reader, i in planes_of(v):
        mask = both("exists[:, None]", across(reader.columns))
        at = f"part[:, None] * {plan.v.channels} + {across(reader.channel(i))}"
        kernel.line(f"tl.store(part_out + {at}, {reader.name}_out_{i}, mask={mask})")
