"""The kernel encode of one stream: tail tokens to the packed fields of a page.

Every quotient is taken in f64, as in ir/encodings, so that scales and codes are the same bits; the
scale is rounded to its stored type first and codes are made from what was stored. One program
encodes one group of tokens, or ENCODE_TOKENS where each token stands for itself. Of a sparse part,
what is dense is encoded from the tokens cut to m (see `ir/encodings/sparse.py`), and the entries
hold what that left.
"""

from __future__ import annotations

from ..ir.encodings import Bfp, Int, Lut, Raw
from ..ir.encodings.lut import OFFSET, PARTS
from ..ir.plan import StreamPlan
from ..ir.planes import code_bits
from .gpu_encode_sparse import write_dense, write_entries, write_outliers
from .gpu_pages import PageReader, declare_pages, operand, readers_of, tail_group
from .gpu_text import (
    Kernel,
    across,
    both,
    load,
    padded,
    write_flag,
    write_rint,
    write_stored,
)

ENCODE_TOKENS = 16
"""Tokens of one program of encode, if each is encoded by itself."""


def tokens_at_once(stream: StreamPlan) -> int:
    """Return the tokens of one program of encode."""
    group = stream.tokens.group_tokens
    return ENCODE_TOKENS if group == 1 else group


def encode(stream: StreamPlan, kind: str) -> Kernel:
    """Return the kernel that encodes positions [begin, end) of each row, whole groups.

    `kind`: arrangement of the pages.

    `bad[b * H + h]` becomes 1 where a scale or value does not fit its stored type.
    Grid: (ceil(most tokens of a row / tokens_at_once), B H).
    """
    kernel, role, heads = Kernel(f"encode_{stream.role}"), stream.role, stream.heads
    for name in ("begin", "end", f"{role}_tail_first"):
        kernel.array(name, "int64")
    kernel.array(f"{role}_tail", "float32")
    declare_pages(kernel, stream)
    kernel.array("bad", "int64")
    kernel.scalar(f"{role}_capacity")
    kernel.line("bh = tl.program_id(1).to(tl.int64)")
    kernel.line(f"b = bh // {heads}")
    kernel.line(f"h = bh % {heads}")
    kernel.line(f"start = tl.load(begin + b) + tl.program_id(0) * {tokens_at_once(stream)}")
    kernel.line("stop = tl.load(end + b)")
    stored = [reader for reader in readers_of(stream, kind) if reader.is_stored]
    # Names bound outside a loop cannot have another shape inside it, so loops come first.
    for reader in sorted(stored, key=lambda r: _own_group(stream, r) == tokens_at_once(stream)):
        reader.write_columns(kernel)
        _write_part(kernel, stream, reader)
    return kernel


def _own_group(stream: StreamPlan, reader: PageReader) -> int:
    """Return the tokens that the format of a reader encodes together, or all of the program."""
    group = reader.part.format.group_tokens
    return group if group > 1 else tokens_at_once(stream)


def _write_part(kernel: Kernel, stream: StreamPlan, reader: PageReader) -> None:
    """Encode the channels of one reader, group by group of its own format."""
    count, group = tokens_at_once(stream), _own_group(stream, reader)
    if group == count:
        _write_group(kernel, stream, reader, "start", count)
        return
    kernel.note("groups of these channels are shorter than those of others")
    with kernel.block(f"for first in range(0, {count}, {group})"):
        _write_group(kernel, stream, reader, "start + first", group)


def _write_group(
    kernel: Kernel, stream: StreamPlan, reader: PageReader, start: str, count: int
) -> None:
    """Encode `count` tokens from `start` on: one group, or tokens that stand for themselves."""
    role, sink, size = stream.role, stream.tokens.sink, stream.page_tokens
    kernel.line(f"i = tl.arange(0, {padded(count)})")
    kernel.line(f"position = {start} + i")
    inside = "" if padded(count) == count else f" & (i < {count})"
    kernel.line(f"here = (position < stop){inside}")
    kernel.note("where the tokens come from, and the pages that they go to")
    kernel.line(f"slot = bh * {role}_capacity + position - tl.load({role}_tail_first + b)")
    kernel.line(f"place = position - {sink}" if sink else "place = position")
    table = f"{role}_table + b * {role}_max_pages + place // {size}"
    kernel.line(f"page = {load(table, 'here')}")
    kernel.line(f"{role}_t = place % {size}")
    block = f"page * {reader.layout.page_bytes} + h * {reader.layout.head_bytes}"
    kernel.line(f"{role}_block = {block}")
    if reader.part.sparse is not None:
        write_outliers(kernel, reader, reader.part.sparse)
    match reader.part.format:
        case Raw() as fmt:
            _write_raw(kernel, reader, fmt)
        case Int(axis="channel") as fmt:
            _write_channels(kernel, reader, fmt)
        case Int() as fmt:
            _write_tokens(kernel, reader, fmt)
        case Bfp() as fmt:
            _write_blocks(kernel, reader, fmt)
        case Lut() as fmt:
            _write_entries_of_table(kernel, reader, fmt)
    if reader.part.sparse is not None:
        write_entries(kernel, reader, reader.part.sparse)


def _tail(reader: PageReader, i: int) -> str:
    """Return the tail's values of plane i, f64 [tokens, width]."""
    pointer = f"slot[:, None] * {reader.stream.channels} + {across(reader.channel(i))}"
    return f"{_cut(reader, load(f'{reader.role}_tail + {pointer}', _mask(reader)))}.to(tl.float64)"


def _cut(reader: PageReader, values: str) -> str:
    """Return values of the tail, of a sparse part cut to m, f32 [tokens, ...]."""
    if reader.part.sparse is None:
        return values
    return f"tl.minimum(tl.maximum({values}, -m[:, None]), m[:, None])"


def _write_limits(kernel: Kernel, mask: str, *, axis: int) -> None:
    """Bind the least and the largest of x along an axis, of what the mask keeps."""
    for name, extreme, sign in (("low", "min", ""), ("high", "max", "-")):
        kept = f'tl.where({mask}, x, {sign}float("inf"))' if mask else "x"
        kernel.line(f"{name} = tl.{extreme}({kept}, axis={axis})")


def _mask(reader: PageReader) -> str:
    return both("here[:, None]", across(reader.columns))


def _write_raw(kernel: Kernel, reader: PageReader, fmt: Raw) -> None:
    kernel.line(f"x = {_tail(reader, 0)}")
    write_stored(kernel, "x", fmt.dtype)
    kernel.line(f"tl.store({reader.at('values', 0)}, stored, mask={_mask(reader)})")
    write_flag(kernel, f"tl.where({_mask(reader)}, single, 0.0)")


def _write_channels(kernel: Kernel, reader: PageReader, fmt: Int) -> None:
    """Encode one group of tokens, channel by channel: all planes, one after another."""
    name, plane = reader.name, reader.part.plane
    kernel.line("alive = tl.max(here.to(tl.int32), axis=0)  # 0 where the row has no such group")
    for i in range(reader.part.planes):
        kernel.note(f"channels {i * plane} to {(i + 1) * plane - 1}")
        kernel.line(f"x = {_tail(reader, i)}")
        _write_limits(kernel, "here[:, None]", axis=0)
        mask = f"({name}_w < alive * {plane})"
        for limit in ("low", "high"):
            kernel.line(f"{limit} = tl.where({mask}, {limit}, 0.0)")
        kernel.note("the group's row of the parameters, the same for all of its tokens")
        kernel.line(f"row = tl.max(tl.where(here, {reader.row('scale')}, 0), axis=0)")
        if fmt.zero != "none":
            kernel.line(f"zero_row = tl.max(tl.where(here, {reader.row('zero')}, 0), axis=0)")
        _write_parameters(kernel, reader, fmt, f"{name}_w + {i * plane}", mask)
        scale, zero = across("scale"), across("zero")
        _write_code(kernel, fmt, f"code_{i}", scale, zero)
        write_dense(kernel, reader, i, _decoded(fmt, f"code_{i}", scale, zero))
    _write_planes(kernel, reader)


def _write_parameters(kernel: Kernel, reader: PageReader, fmt: Int, column: str, mask: str) -> None:
    """Store scale and zero of the groups with limits low, high at row + column; bind them, f64."""
    role = reader.role
    kernel.line(f"low = low * {fmt.clip!r}")
    kernel.line(f"high = high * {fmt.clip!r}")
    if fmt.zero == "int":
        kernel.line("low = tl.minimum(low, 0.0)")
        kernel.line("high = tl.maximum(high, 0.0)")
    span = "tl.maximum(-low, high)" if fmt.zero == "none" else "(high - low)"
    kernel.line(f"wanted = {span} / {float(fmt.steps)}")
    write_stored(kernel, "wanted", fmt.params)
    kernel.note(f"what is stored for a scale that rounds to zero: {fmt.dead_scale!r}")
    kernel.line(f"wanted = tl.where(single == 0.0, {fmt.dead_scale!r}, wanted)")
    write_stored(kernel, "wanted", fmt.params)
    target = f"{role}_{reader.part.field('scale').dtype}"
    kernel.line(f"tl.store({target} + row + {column}, stored, mask={mask})")
    write_flag(kernel, f"tl.where({mask}, single, 0.0)")
    kernel.line("scale = single.to(tl.float64)")
    if fmt.zero == "none":
        return
    if fmt.zero == "int":
        kernel.line("low = -low / scale")
        write_rint(kernel, "low")
        kernel.line(f"low = tl.minimum(tl.maximum(low, 0.0), {float(fmt.steps)})")
    write_stored(kernel, "low", fmt.params)
    kernel.line(f"tl.store({target} + zero_row + {column}, stored, mask={mask})")
    write_flag(kernel, f"tl.where({mask}, single, 0.0)")
    kernel.line("zero = single.to(tl.float64)")


def _write_code(kernel: Kernel, fmt: Int, out: str, scale: str, zero: str) -> None:
    """Bind `out` to the codes of x, i32."""
    if fmt.zero == "float":
        kernel.line(f"n = (x - {zero}) / {scale}")
    else:
        kernel.line(f"n = x / {scale}")
    write_rint(kernel, "n")
    if fmt.zero == "int":
        kernel.line(f"n = n + {zero}")
    elif fmt.zero == "none":
        limit = float(fmt.steps)
        kernel.line(f"n = tl.minimum(tl.maximum(n, -{limit}), {limit}) + {2.0 ** (fmt.bits - 1)}")
    most = float(2**fmt.bits - 1)
    kernel.line(f"{out} = tl.minimum(tl.maximum(n, 0.0), {most}).to(tl.int32)")


def _write_tokens(kernel: Kernel, reader: PageReader, fmt: Int) -> None:
    """Encode tokens one by one: first the groups of channels, then the planes, which cut them."""
    group = fmt.group
    groups = reader.part.width // group
    wide = padded(group)
    kernel.line(f"j = tl.arange(0, {wide})")
    for g in range(groups):
        kernel.note(f"group {g}: channels {g * group} to {(g + 1) * group - 1}")
        kernel.line(f"x = {_cut(reader, tail_group(reader, g, group))}.to(tl.float64)")
        _write_limits(kernel, "" if wide == group else f"(j < {group})[None, :]", axis=1)
        kernel.line(f"row = {reader.row('scale')}")
        if fmt.zero != "none":
            kernel.line(f"zero_row = {reader.row('zero')}")
        step = reader.layout.tokens if reader.is_turned("scale") else 1
        _write_parameters(kernel, reader, fmt, str(g * step), "here")
        kernel.line(f"scale_{g} = scale")
        if fmt.zero != "none":
            kernel.line(f"zero_{g} = zero")
    for i in range(reader.part.planes):
        kernel.note(
            f"codes of channels {i * reader.part.plane} to {(i + 1) * reader.part.plane - 1}"
        )
        kernel.line(f"x = {_tail(reader, i)}")
        _spread(kernel, reader, i, group, "scale")
        if fmt.zero != "none":
            _spread(kernel, reader, i, group, "zero")
        _write_code(kernel, fmt, f"code_{i}", "scale", "zero")
        write_dense(kernel, reader, i, _decoded(fmt, f"code_{i}", "scale", "zero"))
    _write_planes(kernel, reader)


def _spread(kernel: Kernel, reader: PageReader, i: int, group: int, name: str) -> None:
    """Bind `name` to the parameter of each channel of plane i, [tokens, width]."""
    first, last = i * reader.part.plane, (i + 1) * reader.part.plane - 1
    kernel.line(f"{name} = {name}_{first // group}[:, None]")
    for g in range(first // group + 1, last // group + 1):
        begins = f"({reader.name}_w >= {g * group - first})[None, :]"
        kernel.line(f"{name} = tl.where({begins}, {name}_{g}[:, None], {name})")


def _write_blocks(kernel: Kernel, reader: PageReader, fmt: Bfp) -> None:
    """Encode tokens of block floating point: an exponent for each block, then the planes."""
    block, p = fmt.block, fmt.mantissa
    wide = padded(block)
    kernel.line(f"j = tl.arange(0, {wide})")
    for g in range(reader.part.width // block):
        kernel.note(f"block {g}: channels {g * block} to {(g + 1) * block - 1}")
        values = _cut(reader, tail_group(reader, g, block))
        kernel.line(f"largest = tl.max(tl.abs({values}), axis=1)")
        kernel.line("byte = (largest.to(tl.int32, bitcast=True) >> 23) & 255")
        target = reader.parameter_at("exponent", g)
        kernel.line(f"tl.store({target}, byte.to(tl.uint8), mask=here)")
        kernel.note("2^(p - 2 - e), or 0 for a block without an exponent, which holds zeros")
        kernel.line(f"power = ({1023 + p - 2 + 127} - byte).to(tl.int64) << 52")
        kernel.line(f"times_{g} = tl.where(byte == 0, 0.0, power.to(tl.float64, bitcast=True))")
    for i in range(reader.part.planes):
        kernel.note(
            f"codes of channels {i * reader.part.plane} to {(i + 1) * reader.part.plane - 1}"
        )
        kernel.line(f"x = {_tail(reader, i)}")
        _spread(kernel, reader, i, block, "times")
        kernel.line("n = x * times")
        write_rint(kernel, "n")
        limit, middle = float(2 ** (p - 1) - 1), 2.0 ** (p - 1)
        kernel.line(f"n = tl.minimum(tl.maximum(n, -{limit}), {limit}) + {middle}")
        kernel.line(f"code_{i} = n.to(tl.int32)")
        # The product with a power of two is undone without rounding.
        undone = f"(n - {middle}) / tl.where(times == 0.0, 1.0, times)"
        write_dense(kernel, reader, i, undone)
    _write_planes(kernel, reader)


def _write_entries_of_table(kernel: Kernel, reader: PageReader, fmt: Lut) -> None:
    """Encode tokens into a table: a scale for each group, then the codes, plane by plane."""
    wide = padded(fmt.group)
    kernel.line(f"j = tl.arange(0, {wide})")
    for g in range(reader.part.width // fmt.group):
        kernel.note(f"group {g}: channels {g * fmt.group} to {(g + 1) * fmt.group - 1}")
        kernel.line(f"x = {_cut(reader, tail_group(reader, g, fmt.group))}.to(tl.float64)")
        kernel.line("wanted = tl.max(tl.abs(x), axis=1)")
        if fmt.sigmas is None:
            kernel.line(f"wanted = wanted / {float(fmt.most)}")
        else:
            _write_mean(kernel, fmt, fmt.sigmas)
        write_stored(kernel, "wanted", fmt.params)
        target = reader.parameter_at("scale", g)
        kernel.line(f"tl.store({target}, stored, mask=here)")
        write_flag(kernel, "tl.where(here, single, 0.0)")
        kernel.line(f"scale_{g} = single.to(tl.float64)")
    for i in range(reader.part.planes):
        kernel.note(
            f"codes of channels {i * reader.part.plane} to {(i + 1) * reader.part.plane - 1}"
        )
        kernel.line(f"x = {_tail(reader, i)}")
        _spread(kernel, reader, i, fmt.group, "scale")
        counts = [f"(x > scale * {middle}).to(tl.int32)" for middle in fmt.middles]
        kernel.line(f"code_{i} = {' + '.join(counts)}")
        entry = f"({operand(fmt.operands, f'code_{i}')} - {OFFSET}).to(tl.float64)"
        write_dense(kernel, reader, i, f"{entry} * scale")
    _write_planes(kernel, reader)


def _write_mean(kernel: Kernel, fmt: Lut, sigmas: float) -> None:
    """Turn `wanted`, the largest value, into the scale: the sum of squares is of whole numbers."""
    kernel.line(f"part = wanted / {PARTS}")
    kernel.line("n = x / tl.where(part > 0.0, part, 1.0)[:, None]")
    write_rint(kernel, "n")
    kernel.line(f"mean = tl.sum(n * n, axis=1) / {float(fmt.group)}")
    kernel.line(f"wanted = part * tl.sqrt(mean) * {sigmas / fmt.most!r}")


def _write_planes(kernel: Kernel, reader: PageReader) -> None:
    """Pack the codes of all planes and store the bytes."""
    bits, mask, plane = code_bits(reader.coded()), _mask(reader), reader.part.plane
    kernel.note("the planes share bytes")
    if bits != 3:
        terms = [f"(code_{i} << {bits * i})" if i else "code_0" for i in range(reader.part.planes)]
        kernel.line(f"byte = {' | '.join(terms)}")
        kernel.line(f"tl.store({reader.at('codes', 0)}, byte.to(tl.uint8), mask={mask})")
        return
    for half in (0, 1):
        terms = [f"((code_{2 * i + half} & 3) << {2 * i})" for i in range(4)]
        kernel.line(f"byte = {' | '.join(terms)}")
        target = reader.at("codes", half * plane)
        kernel.line(f"tl.store({target}, byte.to(tl.uint8), mask={mask})")
    kernel.line(f"byte = {' | '.join(f'((code_{i} >> 2) << {i})' for i in range(8))}")
    kernel.line(f"tl.store({reader.at('high', 0)}, byte.to(tl.uint8), mask={mask})")


def _decoded(fmt: Int, code: str, scale: str, zero: str) -> str:
    """Return codes as decoded, f64; the product has no rounding."""
    code = f"{code}.to(tl.float64)"
    if fmt.zero == "float":
        return f"{code} * {scale} + {zero}"
    middle = zero if fmt.zero == "int" else str(2.0 ** (fmt.bits - 1))
    return f"({code} - {middle}) * {scale}"
