"""Outputs: o[r, c] += sum_t p[r, t] x^[t, c] for one block of query rows.

    scales of tokens     w = p s, first for all tokens of the page; o += sum_t w code + sum_t p z
    scales of channels   o += s sum_t p code + z sum_t p, for each group of tokens
    raw                  o += sum_t p x
    sparse entries       o_c += p value, one by one

Channels are outermost and stay in registers while the tokens go by. A token that is not wanted is
never read into a sum: zero times NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from ..ir.encodings import Raw
from .cpu_pages import PageReader, Readers
from .cpu_rows import Rows
from .cpu_text import Kernel, at, fma, number, splat

# Sums that are kept in registers; the other half of the sixteen holds weights and codes.
MOST_SUMS = 8


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum over tokens for the channels of some planes, places [begin, end) of each.

    Attributes:
        planes: whose bytes are shared.
        plane: channels of a plane.
        base: channel of the head that is the first of the reader.
        begin: first place.
        end: last place plus one.
        lanes: channels at once.
        first: text of the first token.
        last: text of the end of the tokens.
        weight: (row, token) -> scalar.
        value: (token, plane, place) -> vector.
        start: (row, target, channel) -> vector that the sum begins with.
        finish: (row, target, sum, channel) -> vector that is stored.
    """

    planes: tuple[int, ...]
    plane: int
    base: int
    begin: int
    end: int
    lanes: int
    first: str
    last: str
    weight: Callable[[str, str], str]
    value: Callable[[str, str, str], str]
    start: Callable[[str, str, str], str]
    finish: Callable[[str, str, str, str], str]


Step = Callable[[str, str, str], str]


def write_sum(kernel: Kernel, rows: Rows, part: Sum) -> None:
    """Write one sum: for each chunk of channels, over all tokens."""
    n, lanes = rows.count, part.lanes
    chunks = (part.end - part.begin) // lanes
    most = max(1, MOST_SUMS // (n * len(part.planes)))
    side = max(d for d in range(1, most + 1) if chunks % d == 0)

    def each(step: Step, *, loads: bool) -> None:
        """Write a step for every plane, chunk and row; with `loads`, the value is bound to x."""
        for order, plane in enumerate(part.planes):
            with kernel.block(f"for j in T.unroll({side})"):
                place = f"{part.begin} + (u * {side} + j) * {lanes}"
                if loads:
                    kernel.let("x", part.value("t", str(plane), place))
                with kernel.block(f"for r in T.unroll({n})"):
                    acc = at("acc", f"(({order * side} + j) * {n} + r) * {lanes}", lanes)
                    channel = plane * part.plane
                    target = _target(rows, "r", f"{part.base + channel} + {place}", lanes)
                    kernel.line(step(acc, target, f"{channel} + {place}"))

    def begin(acc: str, target: str, channel: str) -> str:
        return f"{acc} = {part.start('r', target, channel)}"

    def add(acc: str, target: str, channel: str) -> str:
        return f"{acc} = {fma(splat(part.weight('r', 't'), lanes), 'x', acc)}"

    def finish(acc: str, target: str, channel: str) -> str:
        return f"{target} = {part.finish('r', target, acc, channel)}"

    with kernel.block(f"for u in T.serial({chunks // side})"):
        kernel.scratch("acc", len(part.planes) * side * n * lanes)
        each(begin, loads=False)
        with kernel.block(f"for t in T.serial({part.first}, {part.last})"):
            each(add, loads=True)
        each(finish, loads=False)


def _target(rows: Rows, r: str, channel: str, lanes: int) -> str:
    index = f"o_base + ({rows.first} + {r}) * {rows.channels} + {channel}"
    return at("part_out", index, lanes)


def write_raw_values(
    kernel: Kernel, rows: Rows, buffer: str, base: str, first: str, last: str
) -> None:
    """Add raw f32 values at positions [first, last)."""
    width, lanes = rows.channels, gcd(8, rows.channels)
    begin = kernel.fresh("first", first)
    end = kernel.fresh("last", f"T.max({begin}, {last})")
    write_sum(
        kernel,
        rows,
        Sum(
            planes=(0,),
            plane=width,
            base=0,
            begin=0,
            end=width,
            lanes=lanes,
            first=begin,
            last=end,
            weight=lambda r, t: f"logits[{rows.logit(r, t)}]",
            value=lambda t, i, w: at(buffer, f"{base} + ({t}) * {width} + {w}", lanes),
            start=lambda r, target, c: target,
            finish=lambda r, target, acc, c: acc,
        ),
    )


def value_scratch(kernel: Kernel, readers: Readers, rows: int) -> None:
    """Declare what the values of one head need for a page; heads and readers take turns."""
    tokens = readers[0].layout.tokens
    coded = [reader for reader in readers if not isinstance(reader.format, Raw)]
    groups = [reader.groups for reader in coded if not reader.per_channel]
    if coded:
        kernel.scratch("p_sum", rows * 8)
    if groups:
        kernel.scratch("weights", rows * tokens)
    if max(groups, default=1) > 1:
        kernel.scratch("v_scales", tokens * max(groups))
        kernel.scratch("v_zeros", tokens * max(groups))


def write_page_values(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
    """Add the values of the present page to a block of rows."""
    if isinstance(reader.format, Raw):
        logit = lambda r, t: f"logits[{rows.logit(r, f'v_pos + {t}')}]"  # noqa: E731
        for part in _plane_sums(reader, 0, reader.width, "v_t0", "v_t1", logit):
            write_sum(kernel, rows, part)
    elif reader.per_channel:
        _channel_scales(kernel, reader, rows)
    else:
        for g in range(reader.groups):
            _token_weights(kernel, reader, rows, g)
            _token_group(kernel, reader, rows, g)
    write_entry_values(kernel, reader, rows)


def write_entry_values(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
    """Add the sparse entries of the present page, if any, to the outputs of a block of rows."""

    def add() -> None:
        with kernel.block(f"for r in T.unroll({rows.count})"):
            target = _target(rows, "r", "channel", 1)
            weight = f"logits[{rows.logit('r', 'v_pos + t')}]"
            kernel.line(f"{target} = {fma(weight, 'entry', target)}")

    reader.write_entries(kernel, "v_t0", "v_t1", add)


def _plane_sums(
    reader: PageReader,
    low: int,
    high: int,
    first: str,
    last: str,
    weight: Callable[[str, str], str],
    start: Callable[[str, str, str], str] = lambda r, target, c: target,
    finish: Callable[[str, str, str, str], str] = lambda r, target, acc, c: acc,
) -> list[Sum]:
    """Return the sums of channels [low, high): planes with the same places together."""
    by_places: dict[tuple[int, int], list[int]] = {}
    for i in range(reader.planes):
        begin = max(low, i * reader.plane) - i * reader.plane
        end = min(high, (i + 1) * reader.plane) - i * reader.plane
        if begin < end:
            by_places.setdefault((begin, end), []).append(i)
    sums = []
    for (begin, end), planes in by_places.items():
        for i in range(0, len(planes), 2):
            group = tuple(planes[i : i + 2])
            plane, lanes = reader.plane, reader.lanes
            sums.append(
                Sum(
                    group,
                    plane,
                    reader.part.first,
                    begin,
                    end,
                    lanes,
                    first,
                    last,
                    weight,
                    reader.value,
                    start,
                    finish,
                )
            )
    return sums


def _masked(
    kernel: Kernel, rows: Rows, first: str, last: str, write: Callable[[str], None]
) -> None:
    """Write a loop over eight tokens at once that covers [first, last); see `_inside`."""
    begin = kernel.fresh("eight", f"T.shift_right({first}, T.int64(3))")
    end = kernel.fresh("eight", f"T.max({begin}, T.shift_right({last} + 7, T.int64(3)))")
    with kernel.block(f"for r in T.unroll({rows.count})"):
        kernel.line(f"{at('p_sum', f'({rows.first} + r) * 8', 8)} = {number(0.0, 8)}")
    with kernel.block(f"for eight in T.serial({begin}, {end})"):
        kernel.let("place", 'T.ramp(T.Cast("int32", eight) * 8, 1, 8)')
        for name, edge in (("place0", first), ("place1", last)):
            kernel.let(name, splat(f'T.Cast("int32", {edge})', 8))
        write("eight * 8")
    with kernel.block(f"for r in T.unroll({rows.count})"):
        lanes = [f"p_sum[({rows.first} + r) * 8 + {i}]" for i in range(8)]
        kernel.line(f"{lanes[0]} = {' + '.join(lanes)}")


def _inside(value: str, other: str) -> str:
    """Return value in the lanes of [first, last), other elsewhere.

    NOTE: a vector of bools must not be bound to a name: TVM's analyzer takes none.
    """
    return f"T.Select(place >= place0, T.Select(place < place1, {value}, {other}), {other})"


def _token_weights(kernel: Kernel, reader: PageReader, rows: Rows, g: int) -> None:
    """Write weights[r, t] = p s of group g, and p_sum[r] = sum p z."""
    if reader.groups > 1 and g == 0:
        _write_page_params(kernel, reader)
    tokens = reader.layout.tokens

    def write(t: str) -> None:
        if reader.groups == 1:
            kernel.let("scale", reader.scale(t, "0", 8))
            kernel.let("zero", reader.zero(t, "0", 8, "scale"))
        else:
            kernel.let("scale", at("v_scales", f"{g * tokens} + {t}", 8))
            kernel.let("zero", at("v_zeros", f"{g * tokens} + {t}", 8))
        with kernel.block(f"for r in T.unroll({rows.count})"):
            kernel.let("p", at("logits", rows.logit("r", f"v_pos + {t}"), 8))
            kernel.line(f"{at('weights', f'({rows.first} + r) * {tokens} + {t}', 8)} = p * scale")
            total = at("p_sum", f"({rows.first} + r) * 8", 8)
            kernel.line(f"{total} = {_inside(fma('p', 'zero', total), total)}")

    _masked(kernel, rows, "v_t0", "v_t1", write)


def _write_page_params(kernel: Kernel, reader: PageReader) -> None:
    """Copy the scales and zeros of the wanted tokens to f32 scratch, group by group."""
    tokens = reader.layout.tokens
    with (
        kernel.block("for t in T.serial(v_t0, T.max(v_t0, v_t1))"),
        kernel.block(f"for g in T.serial(T.int64({reader.groups}))"),
    ):
        kernel.let("scale", reader.scale("t", "g", 1))
        kernel.line(f"v_scales[g * {tokens} + t] = scale")
        kernel.line(f"v_zeros[g * {tokens} + t] = {reader.zero('t', 'g', 1, 'scale')}")


def _token_group(kernel: Kernel, reader: PageReader, rows: Rows, g: int) -> None:
    tokens, lanes = reader.layout.tokens, reader.lanes

    def weight(r: str, t: str) -> str:
        return f"weights[({rows.first} + {r}) * {tokens} + {t}]"

    def start(r: str, target: str, c: str) -> str:
        return f"{target} + {splat(f'p_sum[({rows.first} + {r}) * 8]', lanes)}"

    low, high = g * reader.group, (g + 1) * reader.group
    for part in _plane_sums(reader, low, high, "v_t0", "T.max(v_t0, v_t1)", weight, start):
        write_sum(kernel, rows, part)


def _channel_scales(kernel: Kernel, reader: PageReader, rows: Rows) -> None:
    size, lanes = reader.format.group_tokens, reader.lanes

    def total(t: str) -> None:
        with kernel.block(f"for r in T.unroll({rows.count})"):
            kernel.let("p", at("logits", rows.logit("r", f"v_pos + {t}"), 8))
            target = at("p_sum", f"({rows.first} + r) * 8", 8)
            kernel.line(f"{target} = {_inside(f'{target} + p', target)}")

    def weight(r: str, t: str) -> str:
        return f"logits[{rows.logit(r, f'v_pos + {t}')}]"

    def finish(r: str, target: str, acc: str, c: str) -> str:
        scale = reader.scale("g", c, lanes)
        shift = f"{splat(f'p_sum[({rows.first} + {r}) * 8]', lanes)}"
        return fma(acc, scale, fma(reader.zero("g", c, lanes, f"({scale})"), shift, target))

    g0 = f"T.truncdiv(v_t0, T.int64({size}))"
    g1 = f"T.truncdiv(T.max(v_t1, T.int64(0)) + {size - 1}, T.int64({size}))"
    with kernel.block(f"for g in T.serial({g0}, T.max({g0}, {g1}))"):
        kernel.let("first", f"T.max(v_t0, g * {size})")
        kernel.let("last", f"T.min(v_t1, (g + 1) * {size})")
        _masked(kernel, rows, "first", "last", total)
        zero = number(0.0, lanes)
        sums = _plane_sums(
            reader,
            0,
            reader.width,
            "first",
            "last",
            weight,
            lambda r, target, c: zero,
            finish,
        )
        for part in sums:
            write_sum(kernel, rows, part)
