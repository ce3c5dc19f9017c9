"""The kernel attend_block: many queries a row over tokens that `gpu_unpack.py` wrote.

Flash attention: queries are the rows [R] of a tile, row = t * G + g for query t of head g of the
group, and keys and values come as tiles of N tokens, plain numbers of float16 (`compute = int`) or
float32. Tiles that every row sees whole take a loop without masks; the others, at the diagonal and
at the edge of a window, a second one. What is rounded says `ir/halves_block.py`: every factor that
a tile or a row brings along is a power of two.

A split is some tiles, as many as the host says; it depends on how many queries there are and on
nothing else, so the batch changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..ir.plan import AttentionPlan
from .gpu_text import LEAST_DOT, LN_2, LOG2_E, Dialect, Kernel, both, load, write_softcap
from .gpu_unpack import LARGEST, MOST_POWER, plain_type

LARGE = 200 << 10
"""Bytes of shared memory of GPUs whose matrix units read it themselves, sm_90 and sm_100."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the kernel.

    Attributes:
        rows: R of a tile of queries.
        tokens: N of a tile of keys.
        piece: channels of one matrix product, at most. With more of them than rows, Triton shares
            them out over the warps.
        stages: tiles on their way at once.
        warps: of a block.
    """

    rows: int
    tokens: int
    piece: int
    stages: int
    warps: int


def shape_of(plan: AttentionPlan, shared: int) -> Shape:
    """Return the sizes for a GPU with so many bytes of shared memory for a block.

    More keys a tile mean less to do a key, for outputs are shrunk once a tile; where operands of
    the matrix units are registers, there is no place for more than 64. docs/gpu.md has the counts.
    """
    is_wide = max(plan.k.channels, plan.v.channels) > 128
    if plain_type(plan) == "float32":
        return Shape(32, 16 if is_wide else 32, 64, 1, 4)
    is_large = shared >= LARGE
    stages = 1 if is_wide and not is_large else 2
    return Shape(128, 128 if is_large and not is_wide else 64, 128 if is_large else 64, stages, 8)


@dataclass(frozen=True, slots=True)
class Piece:
    """Channels of a head that are one block: a power of two of them.

    Attributes:
        first: channel.
        width: channels of the block.
        inside: how many of them the head has.
    """

    first: int
    width: int
    inside: int

    @property
    def channels(self) -> str:
        """The channels, as a vector."""
        numbers = f"tl.arange(0, {self.width})"
        return f"({numbers} + {self.first})" if self.first else numbers

    @property
    def mask(self) -> str:
        """Mask of the channels that the head has, along columns, or "" if it has all."""
        if self.inside == self.width:
            return ""
        return f"(tl.arange(0, {self.width}) < {self.inside})[None, :]"


def pieces_of(channels: int, most: int) -> tuple[Piece, ...]:
    """Return the pieces of a head, the largest first; 96 channels are 64 and 32."""
    found, first = [], 0
    while first < channels:
        left = channels - first
        width = max(LEAST_DOT, min(most, 1 << (left.bit_length() - 1)))
        found.append(Piece(first, width, min(width, left)))
        first += width
    return tuple(found)


def attend_block(plan: AttentionPlan, dialect: Dialect, shape: Shape) -> Kernel:
    """Return the kernel that attends a tile of queries, causal between them, to one split.

    Grid: (B H, splits, tiles of rows).
    """
    kernel = Kernel("attend_block", warps=shape.warps)
    kernel.facts = {"rows": shape.rows, "tokens": shape.tokens, "type": plain_type(plan)}
    k, v = (pieces_of(x.channels, shape.piece) for x in (plan.k, plan.v))
    _declare(kernel, plan)
    _write_rows(kernel, plan, shape.rows)
    _write_queries(kernel, plan, k)
    _write_bounds(kernel, plan, shape.tokens)
    kernel.note("sums: the largest score in powers of two, the denominator, the outputs")
    kernel.line(f'best = tl.full(({shape.rows},), float("-inf"), tl.float32)')
    kernel.line(f"total = tl.zeros(({shape.rows},), tl.float32)")
    for i, piece in enumerate(v):
        kernel.line(f"out_{i} = tl.zeros(({shape.rows}, {piece.width}), tl.float32)")
    precision = "" if is_narrow(plan) else f', input_precision="{dialect.precision}"'
    for masked in (False, True):
        with _loop(kernel, plan, shape, masked=masked):
            if is_narrow(plan):
                kernel.line(f"number = tile // {shape.tokens}")
            _write_scores(kernel, plan, k, precision)
            if masked:
                _write_mask(kernel, plan)
            _write_weights(kernel, plan, masked=masked)
            _write_values(kernel, plan, v, precision)
    _write_partials(kernel, plan, v)
    return kernel


def is_narrow(plan: AttentionPlan) -> bool:
    """Return whether products are of float16."""
    return plain_type(plan) == "float16"


def _declare(kernel: Kernel, plan: AttentionPlan) -> None:
    kernel.array("query", "float32")
    kernel.array("length_of", "int64")
    for role in ("k", "v"):
        kernel.array(f"{role}_plain", plain_type(plan))
        kernel.array(f"{role}_power", "float32")
    for name in ("part_out", "part_max", "part_sum"):
        kernel.array(name, "float32")
    for name in ("first", "count", "split", "part", "parts", "rows", "queries"):
        kernel.scalar(name)


def _write_rows(kernel: Kernel, plan: AttentionPlan, rows: int) -> None:
    """Bind the rows, whether they exist, and the position of each, -1 for none."""
    kernel.line("bh = tl.program_id(0).to(tl.int64)")
    kernel.line(f"length = tl.load(length_of + bh // {plan.k.heads})")
    kernel.line(f"row = tl.program_id(2) * {rows} + tl.arange(0, {rows})")
    kernel.line(f"exists = row < queries * {plan.group}")
    newest = f"(length - queries).to(tl.int32) + row // {plan.group}"
    kernel.line(f"newest = tl.where(exists, {newest}, -1)")
    kernel.line("last = tl.max(newest, axis=0)")


def _write_queries(kernel: Kernel, plan: AttentionPlan, pieces: tuple[Piece, ...]) -> None:
    """Bind q_i, the operands of the queries, and `factor`, what makes scores powers of two."""
    kernel.note("the queries, less the power of two of their largest")
    for i, piece in enumerate(pieces):
        at = f"query + (bh * rows + row)[:, None] * {plan.k.channels} + {piece.channels}[None, :]"
        kernel.line(f"q_{i} = {load(at, both('exists[:, None]', piece.mask))}")
    factor = "1.0" if plan.softcap is not None else repr(LOG2_E)
    if not is_narrow(plan):
        kernel.line(f"factor = {factor}")
        return
    for i in range(len(pieces)):
        most = f"tl.max(tl.abs(q_{i}), axis=1)"
        kernel.line(f"largest = {f'tl.maximum(largest, {most})' if i else most}")
    exponent = f"(largest.to(tl.int32, bitcast=True) >> 23) - {126 + LARGEST}"
    kernel.line(f"exponent = tl.minimum(tl.maximum({exponent}, -{MOST_POWER}), {MOST_POWER})")
    kernel.line("lower = ((127 - exponent) << 23).to(tl.float32, bitcast=True)")
    kernel.line(f"factor = ((127 + exponent) << 23).to(tl.float32, bitcast=True) * {factor}")
    for i in range(len(pieces)):
        kernel.line(f"q_{i} = (q_{i} * lower[:, None]).to(tl.float16)")


def _write_bounds(kernel: Kernel, plan: AttentionPlan, n: int) -> None:
    """Bind [begin, stop), what some row sees of the split, and [whole, end), what all rows see.

    Positions are counted from `first`.
    """
    kernel.note("tokens of the split that some row sees, and whole tiles that all rows see")
    kernel.line("origin = first.to(tl.int32)")
    kernel.line("tokens = split.to(tl.int32)")
    kernel.line("begin = tl.program_id(1) * tokens")
    kernel.line("stop = tl.minimum(begin + tokens, last + 1 - origin)")
    kernel.line("least = tl.min(tl.where(exists, newest, last), axis=0)")
    if plan.window is None:
        kernel.line("whole = begin")
    else:
        behind = f"- {plan.window - 1} - origin"
        kernel.line(f"begin = tl.maximum(begin, (least {behind}) // {n} * {n})")
        kernel.line(f"whole = tl.maximum(begin, (last {behind} + {n - 1}) // {n} * {n})")
    kernel.line(f"end = tl.minimum(stop, least + 1 - origin) // {n} * {n}")
    kernel.line("end = tl.maximum(end, begin)")
    if plan.window is not None:
        kernel.line("whole = tl.minimum(whole, end)")
    kernel.note("where tiles lie")
    kernel.line(f"t = tl.arange(0, {n})")
    kernel.line("wide = tl.full((), 1, tl.int64)")
    for stream in (plan.k, plan.v):
        role = stream.role
        kernel.line(f"{role}_head = {role}_plain + bh * count * {stream.channels}")
        if is_narrow(plan):
            kernel.line(f"{role}_powers = {role}_power + bh * (count // {n})")


@contextmanager
def _loop(kernel: Kernel, plan: AttentionPlan, shape: Shape, *, masked: bool) -> Iterator[None]:
    """Write the loop over the tiles that all rows see, or over the others; binds `tile`."""
    n, stages = shape.tokens, shape.stages
    if not masked:
        kernel.note("tiles that all rows see")
        with kernel.block(f"for tile in tl.range(whole, end, {n}, num_stages={stages})"):
            yield
        return
    kernel.note("tiles that some rows see in part")
    if plan.window is None:
        with kernel.block(f"for tile in tl.range(end, stop, {n}, num_stages=1)"):
            yield
        return
    with kernel.block(f"for at in tl.range(begin, stop - end + whole, {n}, num_stages=1)"):
        kernel.line("tile = tl.where(at < whole, at, at - whole + end)")
        yield


def _tile(plan: AttentionPlan, role: str, piece: Piece) -> str:
    """Return the load of some channels of a tile, [N, width]."""
    channels = (plan.k if role == "k" else plan.v).channels
    at = f"(t[:, None] * {channels} + {piece.channels}[None, :])"
    return load(f"{role}_head + tile * wide * {channels} + {at}", piece.mask)


def _write_scores(
    kernel: Kernel, plan: AttentionPlan, pieces: tuple[Piece, ...], precision: str
) -> None:
    """Bind `score`, f32 [R, N], which is to be multiplied with what `_factor` says."""
    for i, piece in enumerate(pieces):
        kernel.line(f"k = {_tile(plan, 'k', piece)}")
        more = ", score" if i else ""
        kernel.line(f"score = tl.dot(q_{i}, tl.trans(k){more}{precision})")
    if is_narrow(plan):
        kernel.line("scale = factor * tl.load(k_powers + number)")
    if plan.softcap is not None:
        kernel.line(f"score = score * {'scale[:, None]' if is_narrow(plan) else 'factor'}")
        write_softcap(kernel, plan.softcap)


def _factor(plan: AttentionPlan) -> str:
    """Return what makes the scores of a tile powers of two: a number, or one for each row."""
    if plan.softcap is not None:
        return repr(LOG2_E)
    return "scale" if is_narrow(plan) else "factor"


def _write_mask(kernel: Kernel, plan: AttentionPlan) -> None:
    """Make the scores of keys that a row does not see -inf: causal, and inside the window."""
    kernel.line("position = (tile + origin + t)[None, :]")
    seen = "position <= newest[:, None]"
    if plan.window is not None:
        seen = f"({seen}) & (position > newest[:, None] - {plan.window})"
    kernel.line(f'score = tl.where({seen}, score, float("-inf"))')


def _write_weights(kernel: Kernel, plan: AttentionPlan, *, masked: bool) -> None:
    """Bind `weight`, the exponentials, and `shrink`, the factor on what was added up before.

    The largest exponential is 2^LARGEST, and the exponent of the values of a tile is in it.
    """
    narrow, factor = is_narrow(plan), _factor(plan)
    largest = f"tl.ceil(tl.max(score, axis=1) * {factor})"
    if narrow:
        kernel.line("lift = tl.load(v_powers + number)")
        largest += f" + (lift - {LARGEST}.0)"
    kernel.line(f"most = tl.maximum(best, {largest})")
    safe = "most"
    if masked:
        kernel.line('safe = tl.where(most > float("-inf"), most, 0.0)')
        safe = "safe"
    kernel.line(f"less = {safe} - lift" if narrow else f"less = {safe}")
    across = f"{factor}[:, None]" if factor == "scale" else factor
    kernel.line(f"weight = tl.exp2(score * {across} - less[:, None])")
    kernel.line(f"shrink = tl.exp2(best - {safe})")
    sums = "tl.sum(weight, axis=1)" + (" * tl.exp2(-lift)" if narrow else "")
    kernel.line(f"total = total * shrink + {sums}")
    kernel.line("best = most")
    if narrow:
        kernel.line("weight = weight.to(tl.float16)")


def _write_values(
    kernel: Kernel, plan: AttentionPlan, pieces: tuple[Piece, ...], precision: str
) -> None:
    """Add the tile's values to the outputs."""
    for i, piece in enumerate(pieces):
        kernel.line(f"v = {_tile(plan, 'v', piece)}")
        more = f"out_{i} * shrink[:, None]{precision}"
        kernel.line(f"out_{i} = tl.dot(weight, v, {more})")


def _write_partials(kernel: Kernel, plan: AttentionPlan, v: tuple[Piece, ...]) -> None:
    kernel.note("the split's share of the result")
    kernel.line("at = (bh * parts + part + tl.program_id(1)) * rows + row")
    kernel.line(f"tl.store(part_max + at, best * {LN_2}, mask=exists)")
    kernel.line('kept = exists & (best > float("-inf"))  # of others nothing more is read')
    kernel.line("tl.store(part_sum + at, total, mask=kept)")
    for i, piece in enumerate(v):
        place = f"part_out + at[:, None] * {plan.v.channels} + {piece.channels}[None, :]"
        mask = both("kept[:, None]", piece.mask)
        kernel.line(f"tl.store({place}, out_{i}, mask={mask})")
