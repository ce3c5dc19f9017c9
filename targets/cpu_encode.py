"""The kernel encode of one stream: tail tokens to the packed fields of a page.

Every quotient is taken in f64, as in ir/encodings, so that scales and codes are the same bits;
the scale is rounded to its stored type first and codes are made from what was stored. Of a sparse
part, the outliers of each token are found first; what is dense is encoded from the tokens cut to m
(see `ir/encodings/sparse.py`), and the entries hold what that left.
"""

from __future__ import annotations

from functools import partial
from math import gcd

import numpy as np

from ..ir.encodings import Bfp, Int, Lut, Raw, Sparse
from ..ir.layouts import PageLayout
from ..ir.plan import StreamPlan
from .cpu_encode_lut import write_lut
from .cpu_pages import PageReader, Readers, declare_pages, open_page, readers_of
from .cpu_planes import write_planes
from .cpu_text import (
    Kernel,
    as_f32,
    at,
    bits_as,
    cast,
    fold,
    number,
    pure,
    rint,
    splat,
    to_stored,
)

F64 = "float64"


def encode(stream: StreamPlan, layout: PageLayout) -> Kernel:
    """Return the kernel that encodes positions [begin, end) of each row, whole groups.

    `bad[b * H + h]` becomes 1 where a scale or value does not fit its stored type, else 0.
    """
    kernel, group = Kernel(f"encode_{stream.role}"), stream.tokens.group_tokens
    for name in ("begin", "end"):
        kernel.array(name, "int64")
    page_arguments(kernel, stream, layout)
    kernel.array("bad", "int64")
    kernel.scalar("batch")
    with kernel.block(f"for bh in T.parallel(batch * {stream.heads})"):
        kernel.let("mark", "bh")
        kernel.let("b", f"T.truncdiv(bh, T.int64({stream.heads}))")
        kernel.let("h", f"T.truncmod(bh, T.int64({stream.heads}))")
        kernel.line("bad[mark] = T.int64(0)")
        count = f"T.truncdiv(end[b] - begin[b], T.int64({group}))"
        with kernel.block(f"for i in T.serial({count})"):
            write_group(kernel, stream, layout, f"begin[b] + i * {group}")
    return kernel


def page_arguments(kernel: Kernel, stream: StreamPlan, layout: PageLayout) -> None:
    """Declare what is encoded and into what: the tail, the pages."""
    role = stream.role
    for name in (f"{role}_tail_first", f"{role}_table"):
        kernel.array(name, "int64")
    kernel.array(f"{role}_tail", "float32")
    declare_pages(kernel, readers_of(stream, layout))
    for name in (f"{role}_capacity", f"{role}_max_pages"):
        kernel.scalar(name)


def write_group(kernel: Kernel, stream: StreamPlan, layout: PageLayout, begin: str) -> None:
    """Encode the group of tokens from position `begin` on, of head h of row b; bh = b * H + h.

    `bad[mark]` becomes 1 where a scale or value does not fit its stored type.
    """
    role, readers = stream.role, readers_of(stream, layout)
    sink, size, width = stream.tokens.sink, stream.page_tokens, stream.channels
    group = stream.tokens.group_tokens
    kernel.scratch("codes", group * width, "uint8")
    entries = [reader.sparse.count for reader in readers if reader.sparse]
    if entries:
        kernel.scratch("cut", group * width)
        kernel.scratch("outliers", group * max(entries), "int32")
    kernel.scratch("limits", 16)
    kernel.scratch("exact", 8, F64)
    kernel.scratch("sizes", 8, "int32")
    kernel.let("place", f"{begin} - {sink}")
    kernel.let("page", f"T.truncdiv(place, T.int64({size}))")
    kernel.let("t", f"place - page * {size}")
    open_page(kernel, readers, f"{role}_table[b * {role}_max_pages + page]")
    kernel.let("slot", f"{begin} - {role}_tail_first[b]")
    kernel.let("source", f"(bh * {role}_capacity + slot) * {width}")
    _write_slices(kernel, readers, group)


def _write_slices(kernel: Kernel, readers: Readers, group: int) -> None:
    """Encode the tokens at `source` slice by slice, each in groups of its own."""
    if readers[0].alone:
        _write_group(kernel, readers[0])
        return
    kernel.let("t_all", "t")
    kernel.let("source_all", "source")
    for reader in readers:
        own = reader.format.group_tokens
        with kernel.block(f"for i_{reader.own('slice')} in T.serial({group // own})"):
            step = f"i_{reader.own('slice')} * {own}"
            kernel.let("t", f"t_all + {step}")
            start = f"source_all + {step} * {reader.layout.channels}"
            kernel.let("source", f"{start} + {reader.part.first}")
            _write_group(kernel, reader)


def _write_group(kernel: Kernel, reader: PageReader) -> None:
    """Encode the group of tokens at `source` into the page from token t on.

    `codes` holds the channels of the reader in rows as long as those of the tail.
    """
    if reader.sparse is not None:
        _write_outliers(kernel, reader, reader.sparse)
    match reader.format:
        case Raw() as fmt:
            _write_raw(kernel, reader, fmt)
            return
        case Int() as fmt:
            _write_int(kernel, reader, fmt)
        case Bfp() as fmt:
            _write_bfp(kernel, reader, fmt)
        case Lut() as fmt:

            def write_scale(g: str, wanted: str, params: str = fmt.params) -> str:
                return _write_stored(kernel, reader, "scale", ("t", g), wanted, params, 1)

            write_lut(kernel, reader, fmt, partial(_tail, reader), write_scale)
    write_planes(kernel, reader)
    if reader.sparse is not None:
        _write_entries(kernel, reader, reader.sparse)


def _tail(reader: PageReader, offset: str, lanes: int) -> str:
    """Return values of the group at `source`, f32; of a sparse part those that are cut to m."""
    if reader.sparse is not None:
        return at("cut", offset, lanes)
    return at(f"{reader.role}_tail", f"source + {offset}", lanes)


def _write_raw(kernel: Kernel, reader: PageReader, fmt: Raw) -> None:
    lanes = gcd(8, reader.width)
    with kernel.block(f"for j in T.serial({reader.width // lanes})"):
        value = cast(F64, _tail(reader, f"j * {lanes}", lanes), lanes)
        _write_stored(kernel, reader, "values", ("t", f"j * {lanes}"), value, fmt.dtype, lanes)


def _write_stored(
    kernel: Kernel,
    reader: PageReader,
    name: str,
    place: tuple[str, str],
    value: str,
    dtype: str,
    lanes: int,
) -> str:
    """Round f64 to its stored type, store it at (row, column), flag overflow; return it as f32."""
    index = reader.place(name, f"({place[0]})", place[1])
    # Through memory: TVM writes out what a name stands for wherever it is used, again and again.
    exact = at("exact", "0", lanes)
    kernel.line(f"{exact} = {value}")
    kernel.let(f"stored_{name}", to_stored(exact, dtype, lanes))
    view = f"{reader.role}_{reader.part.field(name).dtype}"
    kernel.line(f"{at(view, index, lanes)} = stored_{name}")
    kernel.let(f"single_{name}", as_f32(f"stored_{name}", dtype, lanes))
    # Inf or NaN: the bits without the sign are those of Inf or more.
    mask, most = splat("T.int32(0x7FFFFFFF)", lanes), "T.int32(0x7F800000)"
    bits = f"T.bitwise_and({bits_as('int32', f'single_{name}', lanes)}, {mask})"
    kernel.line(f"{at('sizes', '0', lanes)} = {bits}")
    fold(kernel, "sizes", lanes, "T.max({}, {})")
    kernel.line(f"bad[mark] = T.Select(sizes[0] < {most}, bad[mark], T.int64(1))")
    return f"single_{name}"


def _write_limits(kernel: Kernel, reader: PageReader, count: int, offset: str, lanes: int) -> None:
    """Write the least and largest of `count` vectors, by lanes; `offset` is a text in e."""
    low, high = at("limits", "0", lanes), at("limits", "8", lanes)
    first = _tail(reader, offset.replace("@", "0"), lanes)
    kernel.line(f"{low} = {first}")
    kernel.line(f"{high} = {first}")
    with kernel.block(f"for e in T.serial({count})"):
        kernel.let("value", _tail(reader, offset.replace("@", "e"), lanes))
        kernel.line(f"{low} = T.min({low}, value)")
        kernel.line(f"{high} = T.max({high}, value)")


def _fold_limits(kernel: Kernel, lanes: int) -> None:
    """Reduce the limits to those of all lanes."""
    fold(kernel, "limits", lanes, "T.min({}, {})")
    fold(kernel, "limits", lanes, "T.max({}, {})", 8)


def _write_int(kernel: Kernel, reader: PageReader, fmt: Int) -> None:
    """Write scale, zero and codes of each group of the token, or token group, at t.

    Scales of tokens are made one by one, scales of channels eight at once; codes eight at once.
    """
    width = reader.width
    if fmt.axis == "token":
        lanes = gcd(8, fmt.group)
        head, place = f"for g in T.serial({width // fmt.group})", ("t", "g")
        count, offset, many = fmt.group // lanes, f"g * {fmt.group} + @ * {lanes}", 1
    else:
        lanes = many = gcd(8, width)
        row = f"T.truncdiv(t, T.int64({fmt.group}))"
        head, place = f"for g in T.serial({width // lanes})", (row, f"g * {lanes}")
        count, offset = fmt.group, f"@ * {reader.layout.channels} + g * {lanes}"
    with kernel.block(head):
        _write_limits(kernel, reader, count, offset, lanes)
        if many == 1:
            _fold_limits(kernel, lanes)
        _write_range(kernel, fmt, many)
        kept = as_f32(to_stored("wanted", fmt.params, many), fmt.params, many)
        dead, none = number(fmt.dead_scale, many, F64), number(0.0, many)
        alive = f"T.Select({kept} == {none}, {dead}, wanted)"
        single = _write_stored(kernel, reader, "scale", place, alive, fmt.params, many)
        kernel.let("scale", cast(F64, single, many))
        _write_zero(kernel, reader, fmt, place, many)
        with kernel.block(f"for e in T.serial({count})"):
            kernel.let("value", cast(F64, _tail(reader, offset.replace("@", "e"), lanes), lanes))
            target = at("codes", offset.replace("@", "e"), lanes)
            kernel.line(f"{target} = {_code(fmt, lanes, many)}")


def _write_range(kernel: Kernel, fmt: Int, lanes: int) -> None:
    """Bind `low`, the least value, and `wanted`, the scale before it is rounded."""
    for name, place in (("low", "0"), ("high", "8")):
        clipped = f"{cast(F64, at('limits', place, lanes), lanes)} * {number(fmt.clip, lanes, F64)}"
        if fmt.zero == "int":
            least_or_most = "T.min" if name == "low" else "T.max"
            clipped = f"{least_or_most}({clipped}, {number(0.0, lanes, F64)})"
        kernel.let(name, clipped)
    span = "(high - low)"
    if fmt.zero == "none":
        span = f"T.max(low * {number(-1.0, lanes, F64)}, high)"
    kernel.let("wanted", f"{span} / {number(float(fmt.steps), lanes, F64)}")


def _write_zero(
    kernel: Kernel, reader: PageReader, fmt: Int, place: tuple[str, str], lanes: int
) -> None:
    """Store the zero point and bind it as `zero`, f64."""
    if fmt.zero == "none":
        return
    wanted = "low"
    if fmt.zero == "int":
        places = rint(f"low * {number(-1.0, lanes, F64)} / scale", lanes, F64)
        wanted = _clipped(places, 0.0, float(fmt.steps), lanes)
    single = _write_stored(kernel, reader, "zero", place, wanted, fmt.params, lanes)
    kernel.let("zero", cast(F64, single, lanes))


def _code(fmt: Int, lanes: int, many: int) -> str:
    """Return codes of the f64 vector `value`; scale and zero have `many` lanes, one or all."""
    scale, zero = (
        ("scale", "zero") if many == lanes else (splat("scale", lanes), splat("zero", lanes))
    )
    if fmt.zero == "float":
        code = rint(f"(value - {zero}) / {scale}", lanes, F64)
    elif fmt.zero == "int":
        code = f"({rint(f'value / {scale}', lanes, F64)} + {zero})"
    else:
        limit = float(fmt.steps)
        inside = _clipped(rint(f"value / {scale}", lanes, F64), -limit, limit, lanes)
        code = f"({inside} + {number(2.0 ** (fmt.bits - 1), lanes, F64)})"
    most = float(2**fmt.bits - 1)
    return cast("uint8", cast("int32", _clipped(code, 0.0, most, lanes), lanes), lanes)


def _clipped(value: str, low: float, high: float, lanes: int) -> str:
    return f"T.min(T.max({value}, {number(low, lanes, F64)}), {number(high, lanes, F64)})"


def _write_bfp(kernel: Kernel, reader: PageReader, fmt: Bfp) -> None:
    """Write exponent and codes of each block of the token at t."""
    p, lanes = fmt.mantissa, gcd(8, fmt.block)
    with kernel.block(f"for g in T.serial({reader.groups})"):
        offset = f"g * {fmt.block} + @ * {lanes}"
        _write_limits(kernel, reader, fmt.block // lanes, offset, lanes)
        _fold_limits(kernel, lanes)
        kernel.let("largest", f"T.max(limits[0] * {number(-1.0)}, limits[8])")
        # The exponent field of an f32 is floor(log2) + 127, and 0 below the normal numbers.
        byte = f"T.shift_right({bits_as('int32', 'largest', 1)}, T.int32(23))"
        kernel.let("byte", f"T.bitwise_and({byte}, T.int32(255))")
        target = f"{reader.role}_uint8[{reader.place('exponent', 't', 'g')}]"
        kernel.line(f'{target} = T.Cast("uint8", byte)')
        power = f'T.Cast("int64", T.int32({1023 + p - 2 + 127}) - byte)'
        kernel.let("factor", bits_as(F64, f"T.shift_left({power}, T.int64(52))", 1))
        # A block without an exponent holds zeros.
        kernel.let("times", f"T.Select(byte == T.int32(0), {number(0.0, 1, F64)}, factor)")
        with kernel.block(f"for e in T.serial({fmt.block // lanes})"):
            value = cast(F64, _tail(reader, offset.replace("@", "e"), lanes), lanes)
            limit = float(2 ** (p - 1) - 1)
            m = _clipped(
                rint(f"{value} * {splat('times', lanes)}", lanes, F64), -limit, limit, lanes
            )
            code = cast("int32", f"({m} + {number(2.0 ** (p - 1), lanes, F64)})", lanes)
            target = at("codes", offset.replace("@", "e"), lanes)
            kernel.line(f"{target} = {cast('uint8', code, lanes)}")


def _write_outliers(kernel: Kernel, reader: PageReader, sparse: Sparse) -> None:
    """Fill `outliers` with the channels of each token's entries, -1 for none, and `cut`.

    The entries are found one by one: the largest of those that come after the entry before, by
    size, and by channel among equals. One more gives m.
    """
    width, count = reader.width, sparse.count
    row = f"s * {reader.layout.channels}"
    for name in ("before", "found"):
        kernel.scratch(name, 1)
        kernel.scratch(f"{name}_at", 1, "int32")
    with kernel.block(f"for s in T.serial({sparse.group_tokens})"):
        kernel.line(f"before[0] = {number(float('inf'))}")
        kernel.line("before_at[0] = T.int32(-1)")
        with kernel.block(f"for e in T.serial({count + 1})"):
            kernel.line(f"found[0] = {number(-1.0)}")
            with kernel.block(f"for c in T.serial({width})"):
                kernel.let("size", _size(f"{reader.role}_tail[source + {row} + c]"))
                follows = "T.Or(size < before[0], T.And(size == before[0], c > before_at[0]))"
                with kernel.block(f"if T.And(size > found[0], {follows})"):
                    kernel.line("found[0] = size")
                    kernel.line("found_at[0] = c")
            kernel.line("before[0] = found[0]")
            kernel.line("before_at[0] = found_at[0]")
            with kernel.block(f"if e < {count}"):
                kernel.line(f"outliers[s * {count} + e] = before_at[0]")
        kernel.let("m", f"T.max(before[0], {number(float(np.float32(sparse.limit)))})")
        with kernel.block(f"for e in T.serial({count})"):
            kernel.let("channel", f"outliers[s * {count} + e]")
            above = f"{_size(f'{reader.role}_tail[source + {row} + channel]')} > m"
            kernel.line(f"outliers[s * {count} + e] = T.Select({above}, channel, T.int32(-1))")
        with kernel.block(f"for c in T.serial({width})"):
            kernel.let("value", f"{reader.role}_tail[source + {row} + c]")
            kernel.line(f"cut[{row} + c] = T.min(T.max(value, m * {number(-1.0)}), m)")


def _size(value: str) -> str:
    return pure("llvm.fabs", "float32", 1, value)


def _write_entries(kernel: Kernel, reader: PageReader, sparse: Sparse) -> None:
    """Store each token's entries: the channel, and what the dense code leaves of its value."""
    row = f"s * {reader.layout.channels}"
    with (
        kernel.block(f"for s in T.serial({sparse.group_tokens})"),
        kernel.block(f"for e in T.serial({sparse.count})"),
    ):
        kernel.let("outlier", f"outliers[s * {sparse.count} + e]")
        kernel.let("channel", "T.max(outlier, T.int32(0))")
        value = f"{reader.role}_tail[source + {row} + channel]"
        dense = reader.exact("(t + s)", "channel", f"codes[{row} + channel]")
        rest = f"{cast(F64, value, 1)} - {dense}"
        kernel.let("rest", f"T.Select(outlier < T.int32(0), {number(0.0, 1, F64)}, {rest})")
        _write_stored(kernel, reader, "value", ("t + s", "e"), "rest", sparse.values, 1)
        index = f"{reader.role}_uint8[{reader.place('index', '(t + s)', 'e')}]"
        kernel.line(f"{index} = {cast('uint8', 'channel', 1)}")
