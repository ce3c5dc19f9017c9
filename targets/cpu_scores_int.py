"""Scores of integer dot products, for keys in channel quads: a lane of a vector is a token.

    scales of tokens     s[r, t] = a_r sum_g s_tg <n_r, code_t>_g + sum_g (sum q)_rg z_tg
    scales of channels   s[r, t] = a_r <n_r, code_t> + a_r sum_c n_rc z_c / s_c, by token group

n_r are the integers of query row r, a_r is their step: rounded once a step by `prepare`, or here,
for each group of tokens, from q times the scales (`ir/integers.py`). A token past the end may be
computed where that stays inside its page; the caller overwrites or masks what it gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import gcd

from ..ir.arrangements import QUAD
from ..ir.integers import most_integer
from .cpu_dots import Add, Dots, dots_of
from .cpu_pages import PageReader
from .cpu_quads import lanes_of
from .cpu_regions import Asks
from .cpu_rows import Rows
from .cpu_text import Kernel, at, cast, fma, fold, fold_rows, number, pure, rint, row_blocks, splat
from .machines import Cpu

# Bytes of rounded queries or weights that lie in the first cache beside all else.
MOST_AT_ONCE = 16_384


@dataclass(frozen=True, slots=True)
class KeyDots:
    """What the scores of one stream of keys need.

    Attributes:
        reader: of the pages.
        dots: of the machine.
        rows: query rows of a head.
        heads: with scales of channels, those of an item if the integers of all of them are made
            before the first product of a page, and 1 if they take turns.
        early: whether parameters are asked for before the first product of a page.
    """

    reader: PageReader
    dots: Dots
    rows: int
    heads: int
    early: bool = False

    @property
    def integers(self) -> str:
        """Name of the integers of the queries."""
        return self.reader.own("q_integers")

    @property
    def quads(self) -> int:
        """Quads of a query."""
        return self.reader.width // QUAD

    @property
    def rounded_rows(self) -> int:
        """Rows that are rounded before the first product, with scales of channels."""
        groups = self.reader.layout.tokens // self.reader.format.group_tokens
        return self.rows * self.heads * groups

    def row(self, rows: Rows, r: int) -> str:
        """Return the number of row r among those whose integers are there at once.

        With scales of channels these are those of token group g; neighbours stay neighbours.
        """
        if not self.reader.per_channel:
            return rows.of_item(str(r))
        row = rows.of_item(str(r)) if self.heads > 1 else f"{rows.first} + {r}"
        return f"(g * {self.rows * self.heads} + {row})"

    def side(self, rows: int) -> int:
        """Return the vectors of tokens that are multiplied together with each word of a query."""
        reader, dots = self.reader, self.dots
        tokens = reader.format.group_tokens if reader.per_channel else reader.layout.tokens
        most = max(dots.most_sums, rows)
        return next(s for s in (4, 2, 1) if s * rows <= most and tokens % (s * dots.lanes) == 0)

    def segments(self, group: int) -> list[tuple[tuple[int, ...], int, int]]:
        """Return (planes, begin, end) of the quads of a group of channels, in quads of a plane."""
        reader = self.reader
        size = reader.width if reader.per_channel else reader.group
        found: dict[tuple[int, int], list[int]] = {}
        for i in range(reader.planes):
            begin = max(group * size, i * reader.plane) - i * reader.plane
            end = min((group + 1) * size, (i + 1) * reader.plane) - i * reader.plane
            if begin < end:
                found.setdefault((begin // QUAD, end // QUAD), []).append(i)
        return [(tuple(planes), *place) for place, planes in found.items()]


def key_dots(reader: PageReader, rows: int, heads: int, cpu: Cpu) -> KeyDots:
    """Return what the scores of a stream of keys need, for items of at most so many heads."""
    dots = dots_of(reader.coded(), cpu, lanes_of(cpu), signed=True)
    keys = KeyDots(reader, dots, rows, heads)
    keys = replace(keys, dots=replace(dots, shared=keys.side(rows)))
    if not reader.per_channel:
        return keys
    size = keys.dots.bytes_of(keys.rounded_rows * keys.quads)
    return keys if size <= MOST_AT_ONCE else replace(keys, heads=1)


def score_scratch_int(kernel: Kernel, keys: KeyDots) -> None:
    """Declare what the scores of one item need; fill what holds for all of its pages.

    That is the integers of all rows; with scales of channels they are made for each page.
    """
    reader, width = keys.reader, keys.reader.width
    rows = keys.rounded_rows if reader.per_channel else keys.rows * keys.heads
    kernel.scratch(keys.integers, rows * width, keys.dots.integers)
    keys.dots.declare(kernel, keys.integers, rows * keys.quads)
    if reader.per_channel:
        kernel.scratch(reader.own("q_scaled"), keys.rows * width)
        for name in ("q_steps", "q_zeros"):
            kernel.scratch(reader.own(name), rows)
        return
    quads = f"item_rows * {keys.quads}"
    with kernel.block(f"for i in T.serial({quads})"):
        codes = at("q_codes", f"item_row * {width} + i * {QUAD}", QUAD)
        keys.dots.store_integers(kernel, keys.integers, f"i * {QUAD}", codes, QUAD)
    keys.dots.write_layout(kernel, keys.integers, "T.int64(0)", quads)
    kernel.scratch("q_sums", rows * reader.groups)
    lanes = gcd(8, reader.group)
    kernel.scratch("sum", lanes)
    with kernel.block(f"for i in T.serial(item_rows * {reader.groups})"):
        kernel.line(f"{at('sum', '0', lanes)} = {number(0.0, lanes)}")
        with kernel.block(f"for j in T.serial(T.int64({reader.group // lanes}))"):
            part = at("query", f"item_row * {width} + i * {reader.group} + j * {lanes}", lanes)
            kernel.line(f"{at('sum', '0', lanes)} = {at('sum', '0', lanes)} + {part}")
        fold(kernel, "sum", lanes, "({} + {})")
        kernel.line("q_sums[i] = sum[0]")


def write_page_scores_int(kernel: Kernel, keys: KeyDots, rows: Rows) -> None:
    """Write the scores of the present page for a block of rows."""
    reader, lanes = keys.reader, keys.dots.lanes
    tokens = reader.format.group_tokens if reader.per_channel else reader.layout.tokens
    side = keys.side(rows.count)
    if not reader.per_channel:
        with kernel.block(f"for v in T.serial({_steps('k_t1', side * lanes)})"):
            kernel.let("t", f"v * {side * lanes}")
            keys.dots.declare_sums(kernel, rows.count * side)
            for group in range(reader.groups):
                _write_dots(kernel, keys, rows, group, side)
                _write_token_scales(kernel, keys, rows, group, side)
        return
    if keys.heads == 1:
        write_page_queries_int(kernel, keys, rows)
    with kernel.block(_each_group(keys)):
        last = f"T.min(k_t1 - g * {tokens}, T.int64({tokens}))"
        with kernel.block(f"for v in T.serial({_steps(last, side * lanes)})"):
            kernel.let("t", f"g * {tokens} + v * {side * lanes}")
            keys.dots.declare_sums(kernel, rows.count * side)
            _write_dots(kernel, keys, rows, 0, side)
            for r, j in _each(rows, side):
                step, zero = (
                    splat(f"{reader.own(name)}[{keys.row(rows, r)}]", lanes)
                    for name in ("q_steps", "q_zeros")
                )
                value = fma(_sum(keys, r * side + j), step, zero)
                target = _logits(rows, r, j, lanes)
                kernel.line(f"{target} = {f'{target} + {value}' if reader.adds else value}")


def write_page_queries_int(kernel: Kernel, keys: KeyDots, rows: Rows) -> None:
    """Round a block of rows for the present page, with scales of channels."""
    with kernel.block(_each_group(keys)):
        _write_rounding(kernel, keys, rows)


def _each_group(keys: KeyDots) -> str:
    """Return the head of a loop over the token groups of a page that hold wanted tokens."""
    return f"for g in T.serial({_steps('k_t1', keys.reader.format.group_tokens)})"


def _steps(count: str, size: int) -> str:
    return f"T.truncdiv({count} + {size - 1}, T.int64({size}))"


def _each(rows: Rows, side: int) -> list[tuple[int, int]]:
    return [(r, j) for r in range(rows.count) for j in range(side)]


def _sum(keys: KeyDots, i: int) -> str:
    lanes = keys.dots.lanes
    return cast("float32", keys.dots.sum(i), lanes)


def _logits(rows: Rows, r: int, j: int, lanes: int) -> str:
    return at("logits", rows.logit(str(r), f"k_pos + t + {j * lanes}"), lanes)


def _write_dots(kernel: Kernel, keys: KeyDots, rows: Rows, group: int, side: int) -> None:
    """Write acc[r * side + j], the dots of row r with the tokens t + j lanes on, over a group."""
    reader, size = keys.reader, side * keys.dots.lanes
    tiles, steps = reader.layout.tokens // size, reader.plane // QUAD
    asks = Asks(reader, tiles, steps, not keys.early)
    tile = f"T.truncdiv(t, T.int64({size}))"
    keys.dots.write_zeros(kernel, rows.count * side)
    if group == 0 and rows.first == "0":
        asks.write_tile(kernel, tile)
    for planes, begin, end in keys.segments(group):

        def step(s: str, add: Add, planes: tuple[int, ...] = planes, begin: int = begin) -> None:
            if 0 in planes and rows.first == "0":
                asks.write_step(kernel, tile, f"{begin} + {s}")
            for j in range(side):
                place = f"(t + {j * keys.dots.lanes})", f"({begin} + {s}) * {QUAD}"
                bytes_of = write_quads(kernel, keys.reader, *place, keys.dots.lanes)
                for i in planes:
                    quad = i * keys.reader.plane // QUAD + begin
                    operands = write_plane(kernel, keys.reader, bytes_of, i, keys.dots)
                    _write_products(keys, rows, operands, quad, partial(_at, add, side, j))

        count, steps = rows.count * side, end - begin
        keys.dots.write_sums(kernel, keys.integers, count, steps, len(planes), step, side)


def _at(add: Add, side: int, j: int, r: int, half: int, codes: str, first: str) -> None:
    """Add to the sum of row r and vector j."""
    add(r * side + j, half, codes, first)


def _write_products(keys: KeyDots, rows: Rows, operands: list[str], quad: int, add: Add) -> None:
    """Add the products of operands with a quad of each row to its sum."""
    for half, operand in enumerate(operands):
        for r in range(rows.count):
            add(r, half, operand, f"{keys.row(rows, r)} * {keys.quads} + {quad}")


def inverse_of(largest: str, most: int, lanes: int) -> str:
    """Return the factors that make integers of numbers up to `largest`.

    One is 0 where all numbers are so small that it would be infinite: none of them counts.
    """
    enough, one = f"{largest} > {number(2.0**-100, lanes)}", number(1.0, lanes)
    quotient = f"{number(float(most), lanes)} / T.Select({enough}, {largest}, {one})"
    return f"T.Select({enough}, {quotient}, {number(0.0, lanes)})"


def write_quads(
    kernel: Kernel, reader: PageReader, row: str, column: str, lanes: int
) -> Mapping[tuple[str, int], str]:
    """Bind the quads of all planes at a place; return their names, see `PageReader.plane_codes`."""
    names = {("codes", 0): kernel.fresh("bytes", reader.quads("codes", row, column, lanes))}
    if reader.planes == 8:
        behind = reader.quads("codes", row, f"{column} + {reader.plane}", lanes)
        names["codes", 1] = kernel.fresh("bytes", behind)
        names["high", 0] = kernel.fresh("high", reader.quads("high", row, column, lanes))
    return names


def write_plane(
    kernel: Kernel,
    reader: PageReader,
    bytes_of: Mapping[tuple[str, int], str],
    i: int,
    dots: Dots,
    *,
    in_place: bool = False,
) -> list[str]:
    """Bind the codes of plane i of the bound quads; return what to multiply, by word."""
    lanes = QUAD * dots.lanes
    text = reader.plane_codes(i, lambda *x: bytes_of[x], lanes, in_place=in_place)
    codes = kernel.fresh("codes", text)
    return [kernel.fresh("half", operand) for operand in dots.operands(codes)]


def _write_token_scales(kernel: Kernel, keys: KeyDots, rows: Rows, group: int, side: int) -> None:
    """Turn the dots of a group into scores: times step and scale, and the zero points."""
    reader, lanes = keys.reader, keys.dots.lanes
    for j in range(side):
        at_token = f"(t + {j * lanes})", str(group), lanes
        scale = kernel.fresh("scale", reader.scale(*at_token))
        zero = kernel.fresh("zero", reader.zero(*at_token, scale))
        for r in range(rows.count):
            row = rows.of_item(str(r))
            step = splat(f"q_step[item_row + {row}]", lanes)
            shift = f"{splat(f'q_sums[{row} * {reader.groups} + {group}]', lanes)} * {zero}"
            value = fma(f"{_sum(keys, r * side + j)} * {step}", scale, shift)
            target = _logits(rows, r, j, lanes)
            kernel.line(f"{target} = {value}" if group == 0 else f"{target} = {target} + {value}")


def _write_rounding(kernel: Kernel, keys: KeyDots, rows: Rows) -> None:
    """Fill the integers of q times the scales of token group g, their steps and zero points."""
    reader, width, own = keys.reader, keys.reader.width, keys.reader.own
    lanes = gcd(keys.dots.lanes, width)
    for name in ("most", "total"):
        kernel.scratch(name, rows.count * lanes)
    for name in ("largest", "inverse", "step"):
        kernel.scratch(name, rows.count + 4)
    for r in range(rows.count):
        for name in ("most", "total"):
            kernel.line(f"{at(name, str(r * lanes), lanes)} = {number(0.0, lanes)}")
    with kernel.block(f"for j in T.unroll({width // lanes})"):
        kernel.let("scale", reader.scale("g", f"j * {lanes}", lanes))
        for r in range(rows.count):
            query = at("query", rows.query(str(r), reader.channel(f"j * {lanes}")), lanes)
            u = kernel.fresh("u", f"{query} * scale")
            kernel.line(f"{at(own('q_scaled'), f'{r * width} + j * {lanes}', lanes)} = {u}")
            most = at("most", str(r * lanes), lanes)
            kernel.line(f"{most} = T.max({most}, {pure('llvm.fabs', 'float32', lanes, u)})")
    for first, count in row_blocks(rows.count):
        _write_steps(kernel, keys, rows, lanes, first, count)
    count = keys.dots.stored_at_once(width // lanes)
    with kernel.block(f"for j in T.unroll({width // lanes // count})"):
        _write_integers(kernel, keys, rows, lanes, count)
    for first, count in row_blocks(rows.count):
        totals = [at("total", str((first + i) * lanes), lanes) for i in range(count)]
        fold_rows(kernel, totals, lanes, "({} + {})", "largest", first)
        total, step = (at(name, str(first), count) for name in ("largest", "step"))
        kernel.line(f"{at(own('q_zeros'), keys.row(rows, first), count)} = {total} * {step}")
    place = f"{keys.row(rows, 0)} * {keys.quads}"
    keys.dots.write_layout(kernel, keys.integers, place, f"T.int64({rows.count * keys.quads})")


def _write_integers(kernel: Kernel, keys: KeyDots, rows: Rows, lanes: int, count: int) -> None:
    """Write the integers of each row in `count` vectors of channels from j count lanes on.

    They are summed times zero points to `total`, by lanes.
    """
    reader, width, own = keys.reader, keys.reader.width, keys.reader.own
    channels = [f"j * {count * lanes} + {i * lanes}" for i in range(count)]
    ratios = []
    for channel in channels:
        scale = kernel.fresh("scale", reader.scale("g", channel, lanes))
        ratio = reader.zero_by_scale("g", channel, lanes, scale)
        ratios.append(kernel.fresh("ratio", ratio))
    for r in range(rows.count):
        total, numbers = at("total", str(r * lanes), lanes), []
        for channel, ratio in zip(channels, ratios, strict=True):
            u = at(own("q_scaled"), f"{r * width} + {channel}", lanes)
            n = kernel.fresh("n", rint(f"{u} * {splat(f'inverse[{r}]', lanes)}", lanes))
            kernel.line(f"{total} = {fma(n, ratio, total)}")
            numbers.append(n)
        place = f"{keys.row(rows, r)} * {width} + j * {count * lanes}"
        keys.dots.store(kernel, keys.integers, place, numbers, lanes)


def _write_steps(
    kernel: Kernel, keys: KeyDots, rows: Rows, lanes: int, first: int, count: int
) -> None:
    """Write steps of some rows, and their inverses, from the largest numbers by lanes."""
    n = most_integer(keys.dots.bits)
    most = [at("most", str((first + i) * lanes), lanes) for i in range(count)]
    fold_rows(kernel, most, lanes, "T.max({}, {})", "largest", first)
    largest, inverse, step = (
        at(name, str(first), count) for name in ("largest", "inverse", "step")
    )
    kernel.line(f"{inverse} = {inverse_of(largest, n, count)}")
    kernel.line(f"{step} = {largest} / {number(float(n), count)}")
    steps = at(keys.reader.own("q_steps"), keys.row(rows, first), count)
    kernel.line(f"{steps} = {step}")
