"""Outputs of integer dot products, for values in token quads: a lane of a vector is a channel.

    w[r, t] = p[r, t] s_t for scales of tokens, p[r, t] for scales of channels
    n[r, t] = [w / a],  a = max w / n_max  for each row and block of 32 tokens
    o[r, c] += a sum_t n code  (+ zero points: a sum_t n z_t / s_t)            scales of tokens
    o[r, c] += a (s_c sum_t n code + z_c sum_t n)                              scales of channels

Weights of tokens that are not wanted are zero, and codes are finite whatever the bytes, so nothing
that lies past the end gets into a sum. What is rounded: `ir/integers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.arrangements import QUAD
from ..ir.integers import BLOCK, most_integer
from .cpu_dots import Add, Dots, dots_of
from .cpu_pages import PageReader
from .cpu_quads import lanes_of, value_lanes
from .cpu_regions import Asks
from .cpu_rows import Rows
from .cpu_scores_int import inverse_of, write_plane, write_quads
from .cpu_text import Kernel, at, cast, fma, fold, number, rint, splat
from .machines import Cpu


@dataclass(frozen=True, slots=True)
class ValueDots:
    """What the values of one stream need.

    Attributes:
        reader: of the pages.
        dots: of the machine, in lanes of channels.
        lanes: tokens at once where weights are rounded.
        rows: query rows of a head.
    """

    reader: PageReader
    dots: Dots
    lanes: int
    rows: int

    @property
    def integers(self) -> str:
        """Name of the rounded weights."""
        return self.reader.own("w_integers")

    @property
    def steps(self) -> str:
        """Name of the steps of blocks."""
        return self.reader.own("w_steps")

    @property
    def zeros(self) -> str:
        """Name of the sums of zero points."""
        return self.reader.own("w_zeros")

    @property
    def groups(self) -> int:
        """Weights of one token: one for each of its scales."""
        return 1 if self.reader.per_channel else self.reader.groups

    @property
    def blocks(self) -> int:
        """Blocks of weights of a page."""
        return self.reader.layout.tokens // BLOCK

    def planes_at_once(self, rows: int) -> int:
        """Return the planes of channels that are summed together."""
        return max(1, min(self.reader.planes, self.dots.most_sums // rows))


def value_dots(reader: PageReader, rows: int, cpu: Cpu) -> ValueDots:
    """Return what the values of a stream need."""
    lanes = value_lanes(reader.coded(), reader.width, cpu)
    return ValueDots(reader, dots_of(reader.coded(), cpu, lanes), lanes_of(cpu), rows)


def value_scratch_int(kernel: Kernel, values: ValueDots) -> None:
    """Declare what the values of one head need for a page; heads take turns."""
    rows, groups, blocks = values.rows, values.groups, values.blocks
    kernel.scratch(values.integers, rows * groups * blocks * BLOCK, values.dots.integers)
    values.dots.declare(kernel, values.integers, rows * groups * blocks * BLOCK // QUAD)
    kernel.scratch(values.steps, rows * groups * blocks)
    # Sums of a page's rounded weights times zero points; with scales of channels, of the weights.
    kernel.scratch(values.zeros, rows * (blocks if values.reader.per_channel else groups))


def write_page_values_int(kernel: Kernel, values: ValueDots, rows: Rows) -> None:
    """Add the values of the present page to a block of rows."""
    reader = values.reader
    shift = f"T.int64({BLOCK.bit_length() - 1})"
    first = kernel.fresh("first_block", f"T.shift_right(v_t0, {shift})")
    last = kernel.fresh("last_block", f"T.max({first}, T.shift_right(v_t1 + {BLOCK - 1}, {shift}))")
    loop = f"for block in T.serial({first}, {last})"
    with kernel.block(f"for group in T.serial(T.int64({values.groups}))"):
        if not reader.per_channel:
            for r in range(rows.count):
                kernel.line(f"{values.zeros}[{_zero(values, rows, r, 'group')}] = {number(0.0)}")
        # Most pages are wanted whole: then there is nothing to mask.
        with kernel.block(f"if v_t1 - v_t0 == {reader.layout.tokens}"), kernel.block(loop):
            _write_rounding(kernel, values, rows, whole=True)
        with kernel.block("else"), kernel.block(loop):
            _write_rounding(kernel, values, rows, whole=False)
    most = values.planes_at_once(rows.count)
    for plane in range(0, reader.planes, most):
        planes = range(plane, min(plane + most, reader.planes))
        with kernel.block(f"for u in T.serial(T.int64({reader.plane // values.dots.lanes}))"):
            _write_chunk(kernel, values, rows, planes, loop)


def _write_rounding(kernel: Kernel, values: ValueDots, rows: Rows, *, whole: bool) -> None:
    """Fill integers, steps and zero sums of a block of tokens, some unwanted if not `whole`."""
    lanes, reader = values.lanes, values.reader
    most = most_integer(values.dots.bits)
    kernel.scratch("w", rows.count * BLOCK)
    for r in range(rows.count):
        kernel.scratch(f"most{r}", lanes)
        kernel.line(f"{at(f'most{r}', '0', lanes)} = {number(0.0, lanes)}")
    if not whole:
        for name, edge in (("place0", "v_t0"), ("place1", "v_t1")):
            kernel.let(name, splat(f'T.Cast("int32", {edge})', lanes))
    with kernel.block(f"for i in T.unroll({BLOCK // lanes})"):
        _write_place(kernel, lanes, whole=whole)
        if not reader.per_channel:
            kernel.let("scale", reader.scale("t", "group", lanes))
        for r in range(rows.count):
            p = at("logits", rows.logit(str(r), "v_pos + t"), lanes)
            weight = p if reader.per_channel else f"({p} * scale)"
            wanted = kernel.fresh("weight", _inside(weight, number(0.0, lanes), whole=whole))
            kernel.line(f"{at('w', f'{r * BLOCK} + i * {lanes}', lanes)} = {wanted}")
            largest = at(f"most{r}", "0", lanes)
            kernel.line(f"{largest} = T.max({largest}, {wanted})")
    for r in range(rows.count):
        fold(kernel, f"most{r}", lanes, "T.max({}, {})")
        kernel.let(f"largest{r}", f"most{r}[0]")
        kernel.let(f"inverse{r}", inverse_of(f"largest{r}", most))
        step = f"largest{r} * {number(1.0 / most)}"
        kernel.line(f"{values.steps}[{_step(values, rows, r, 'group')}] = {step}")
        kernel.line(f"{at(f'most{r}', '0', lanes)} = {number(0.0, lanes)}")
    _write_integers(kernel, values, rows, whole=whole)


def _write_place(kernel: Kernel, lanes: int, *, whole: bool) -> None:
    """Bind t, the first token of vector i of the block, and where masks need it, all of them."""
    kernel.let("t", f"block * {BLOCK} + i * {lanes}")
    if not whole:
        kernel.let("place", f'T.ramp(T.Cast("int32", t), 1, {lanes})')


def _write_integers(kernel: Kernel, values: ValueDots, rows: Rows, *, whole: bool) -> None:
    """Round the block of weights `w`, lay it out, and keep its sums with zero points."""
    lanes, reader = values.lanes, values.reader
    with kernel.block(f"for i in T.unroll({BLOCK // lanes})"):
        _write_place(kernel, lanes, whole=whole)
        ratio = number(1.0, lanes)
        if not reader.per_channel:
            kernel.let("scale", reader.scale("t", "group", lanes))
            ratio = reader.zero_by_scale("t", "group", lanes, "scale")
        kernel.let("zero", _inside(ratio, number(0.0, lanes), whole=whole))
        for r in range(rows.count):
            weight = at("w", f"{r * BLOCK} + i * {lanes}", lanes)
            n = kernel.fresh("n", rint(f"{weight} * {splat(f'inverse{r}', lanes)}", lanes))
            total = at(f"most{r}", "0", lanes)
            kernel.line(f"{total} = {fma(n, 'zero', total)}")
            place = f"{_first_integer(values, rows, r)} + i * {lanes}"
            values.dots.store(kernel, values.integers, place, n, lanes)
    for r in range(rows.count):
        fold(kernel, f"most{r}", lanes, "({} + {})")
        zeros = f"{values.zeros}[{_zero(values, rows, r, 'group')}]"
        total = f"most{r}[0] * {values.steps}[{_step(values, rows, r, 'group')}]"
        kernel.line(f"{zeros} = {total if reader.per_channel else f'{zeros} + {total}'}")
        first = f"T.truncdiv({_first_integer(values, rows, r)}, {QUAD})"
        values.dots.write_layout(kernel, values.integers, first, f"T.int64({BLOCK // QUAD})")


def _inside(value: str, other: str, *, whole: bool) -> str:
    """Return value in the lanes of wanted tokens, other elsewhere."""
    if whole:
        return value
    return f"T.Select(place >= place0, T.Select(place < place1, {value}, {other}), {other})"


def _step(values: ValueDots, rows: Rows, r: int, group: str) -> str:
    """Return where the step of the present block is, for a row and a group."""
    return f"(({rows.first} + {r}) * {values.groups} + {group}) * {values.blocks} + block"


def _zero(values: ValueDots, rows: Rows, r: int, group: str) -> str:
    """Return where the zero points' sum of a row and a group is, or of the present block."""
    if values.reader.per_channel:
        return _step(values, rows, r, group)
    return f"({rows.first} + {r}) * {values.groups} + {group}"


def _first_integer(values: ValueDots, rows: Rows, r: int) -> str:
    return f"({_step(values, rows, r, 'group')}) * {BLOCK}"


def _write_chunk(kernel: Kernel, values: ValueDots, rows: Rows, planes: range, loop: str) -> None:
    """Add the page to the outputs of the channels at place u of some planes."""
    reader, dots, lanes = values.reader, values.dots, values.dots.lanes
    sums = [(k * rows.count + r, r, i) for k, i in enumerate(planes) for r in range(rows.count)]
    kernel.scratch("out", len(sums) * lanes)
    for i in planes:
        kernel.let(f"group{i}", _group(values, i))
    for n, r, i in sums:
        start = _target(values, rows, r, i)
        if not reader.per_channel:
            zeros = splat(f"{values.zeros}[{_zero(values, rows, r, f'group{i}')}]", lanes)
            start = f"{start} + {zeros}"
        kernel.line(f"{at('out', str(n * lanes), lanes)} = {start}")
    asks = Asks(reader, reader.plane // lanes * values.blocks, BLOCK // QUAD)
    first_time = 0 in planes and rows.first == "0"
    tile = f"(u * {values.blocks} + block)"
    with kernel.block(loop):
        if first_time:
            asks.write_tile(kernel, tile)
        dots.declare_sums(kernel, len(sums))
        dots.write_zeros(kernel, len(sums))

        def step(s: str, add: Add) -> None:
            if first_time:
                asks.write_step(kernel, tile, s)
            row = f"(block * {BLOCK} + {s} * {QUAD})"
            bytes_of = write_quads(kernel, reader, row, f"u * {lanes}", lanes)
            operands = {i: write_plane(kernel, reader, bytes_of, i, dots) for i in planes}
            for n, r, i in sums:
                first = f"({_step(values, rows, r, f'group{i}')}) * {BLOCK // QUAD}"
                for half, operand in enumerate(operands[i]):
                    word = f"({first} + {s}) * {dots.words} + {half}"
                    add(n, operand, dots.word(values.integers, word))

        dots.write_sums(kernel, len(sums), BLOCK // QUAD, 1, step)
        for k, i in enumerate(planes):
            _write_scaled(kernel, values, rows, i, k * rows.count)
    for n, r, i in sums:
        kernel.line(f"{_target(values, rows, r, i)} = {at('out', str(n * lanes), lanes)}")


def _group(values: ValueDots, i: int) -> str:
    """Return the group of scales of the channels at place u of plane i."""
    if values.groups == 1:
        return "T.int64(0)"
    reader = values.reader
    return f"T.truncdiv({i * reader.plane} + u * {values.dots.lanes}, T.int64({reader.group}))"


def _target(values: ValueDots, rows: Rows, r: int, i: int) -> str:
    channel = values.reader.channel(f"{i * values.reader.plane} + u * {values.dots.lanes}")
    place = f"o_base + ({rows.first} + {r}) * {rows.channels} + {channel}"
    return at("part_out", place, values.dots.lanes)


def _write_scaled(kernel: Kernel, values: ValueDots, rows: Rows, i: int, first: int) -> None:
    """Add the sums of one block in plane i to `out`, scaled; with zero points of channels."""
    reader, lanes = values.reader, values.dots.lanes
    scale = zero = ""
    if reader.per_channel:
        group = f"T.truncdiv(block * {BLOCK}, T.int64({reader.format.group_tokens}))"
        place = group, f"{i * reader.plane} + u * {lanes}", lanes
        scale = kernel.fresh("scale", reader.scale(*place))
        zero = kernel.fresh("zero", reader.zero(*place, scale))
    for r in range(rows.count):
        index = _step(values, rows, r, f"group{i}")
        out = at("out", str((first + r) * lanes), lanes)
        total = cast("float32", at("acc", str((first + r) * lanes), lanes), lanes)
        step = splat(f"{values.steps}[{index}]", lanes)
        if reader.per_channel:
            zeros = splat(f"{values.zeros}[{index}]", lanes)
            kernel.line(f"{out} = {fma(f'{total} * {step}', scale, fma(zeros, zero, out))}")
        else:
            kernel.line(f"{out} = {fma(total, step, out)}")
