"""The kernel encode of one stream: tail tokens to the packed fields of a page.

Every quotient is taken in f64, as in ir/encodings, so that scales and codes are the same bits; the
scale is rounded to its stored type first and codes are made from what was stored. One program
encodes one group of tokens, or ENCODE_TOKENS where each token stands for itself.
"""

from __future__ import annotations

from ..ir.encodings import Bfp, Int, Raw
from ..ir.layouts import code_bits
from ..ir.plan import StreamPlan
from .gpu_pages import PageReader, declare_pages, readers_of
from .gpu_prepare import write_rint
from .gpu_text import LARGEST, Kernel, across, as_f32, both, load, padded, write_bf16_bits

ENCODE_TOKENS = 16
"""Tokens of one program of encode, if each is encoded by itself."""


def tokens_at_once(stream: StreamPlan) -> int:
    """Return the tokens of one program of encode."""
    group = stream.tokens.group_tokens
    return ENCODE_TOKENS if group == 1 else group


def encode(stream: StreamPlan) -> Kernel:
    """Return the kernel that encodes positions [begin, end) of each row, whole groups.

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
    for reader in readers_of(stream):
        if reader.is_stored:
            reader.write_columns(kernel)
            _write_part(kernel, stream, reader)
    return kernel


def _write_part(kernel: Kernel, stream: StreamPlan, reader: PageReader) -> None:
    """Encode the channels of one reader, group by group of its own format."""
    count, fmt = tokens_at_once(stream), reader.part.format
    group = fmt.group_tokens if fmt.group_tokens > 1 else count
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
    match reader.part.format:
        case Raw() as fmt:
            _write_raw(kernel, reader, fmt)
        case Int(axis="channel") as fmt:
            _write_channels(kernel, reader, fmt)
        case Int() as fmt:
            _write_tokens(kernel, reader, fmt)
        case Bfp() as fmt:
            _write_blocks(kernel, reader, fmt)


def _tail(reader: PageReader, i: int) -> str:
    """Return the tail's values of plane i, f64 [tokens, width]."""
    pointer = f"slot[:, None] * {reader.stream.channels} + {across(reader.channel(i))}"
    return f"{load(f'{reader.role}_tail + {pointer}', _mask(reader))}.to(tl.float64)"


def _group(reader: PageReader, g: int, size: int) -> str:
    """Return the tail's values of group g of `size` channels, f32 [tokens, padded(size)]."""
    first = reader.part.first + g * size
    column = f"(j + {first})[None, :]" if first else "j[None, :]"
    pointer = f"{reader.role}_tail + slot[:, None] * {reader.stream.channels} + {column}"
    inside = "" if padded(size) == size else f"(j < {size})[None, :]"
    return load(pointer, both("here[:, None]", inside))


def _write_limits(kernel: Kernel, mask: str, *, axis: int) -> None:
    """Bind the least and the largest of x along an axis, of what the mask keeps."""
    for name, extreme, sign in (("low", "min", ""), ("high", "max", "-")):
        kept = f'tl.where({mask}, x, {sign}float("inf"))' if mask else "x"
        kernel.line(f"{name} = tl.{extreme}({kept}, axis={axis})")


def _mask(reader: PageReader) -> str:
    return both("here[:, None]", across(reader.columns))


def _write_raw(kernel: Kernel, reader: PageReader, fmt: Raw) -> None:
    kernel.line(f"x = {_tail(reader, 0)}")
    _write_stored(kernel, reader, "values", "x", fmt.dtype)
    kernel.line(f"tl.store({reader.at('values', 0)}, stored, mask={_mask(reader)})")
    _write_flag(kernel, f"tl.where({_mask(reader)}, single, 0.0)")


def _write_stored(kernel: Kernel, reader: PageReader, name: str, value: str, dtype: str) -> None:
    """Bind `stored` to an f64 rounded once to its stored type, and `single` to that as f32."""
    if dtype == "f16":
        # NOTE: by way of f32 it would be rounded twice; cut there, and mark what was cut.
        kernel.line(f"bits = {value}.to(tl.int64, bitcast=True)")
        kernel.line("odd = tl.where((bits & 536870911) != 0, 536870912, 0)")
        kernel.line("bits = (bits & -536870912) | odd")
        kernel.line("stored = bits.to(tl.float64, bitcast=True).to(tl.float32).to(tl.float16)")
    elif dtype == "bf16":
        write_bf16_bits(kernel, f"{value}.to(tl.float32)")
        kernel.line("stored = bits.to(tl.uint16)")
    else:
        kernel.line(f"stored = {value}.to(tl.float32)")
    kernel.line(f"single = {as_f32('stored', dtype)}")


def _write_flag(kernel: Kernel, value: str) -> None:
    """Flag a head where a stored number is not finite."""
    wrong = f"tl.max(tl.where(tl.abs({value}) <= {LARGEST}, 0, 1))"
    with kernel.block(f"if {wrong} > 0"):
        kernel.line("tl.store(bad + bh, 1)")


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
        _write_code(kernel, fmt, f"code_{i}", "scale[None, :]", "zero[None, :]")
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
    _write_stored(kernel, reader, "scale", "wanted", fmt.params)
    kernel.note("a scale that rounds to zero is stored as 1")
    kernel.line("wanted = tl.where(single == 0.0, 1.0, wanted)")
    _write_stored(kernel, reader, "scale", "wanted", fmt.params)
    target = f"{role}_{reader.part.field('scale').dtype}"
    kernel.line(f"tl.store({target} + row + {column}, stored, mask={mask})")
    _write_flag(kernel, f"tl.where({mask}, single, 0.0)")
    kernel.line("scale = single.to(tl.float64)")
    if fmt.zero == "none":
        return
    if fmt.zero == "int":
        kernel.line("low = -low / scale")
        write_rint(kernel, "low")
        kernel.line(f"low = tl.minimum(tl.maximum(low, 0.0), {float(fmt.steps)})")
    _write_stored(kernel, reader, "zero", "low", fmt.params)
    kernel.line(f"tl.store({target} + zero_row + {column}, stored, mask={mask})")
    _write_flag(kernel, f"tl.where({mask}, single, 0.0)")
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
        kernel.line(f"x = {_group(reader, g, group)}.to(tl.float64)")
        _write_limits(kernel, "" if wide == group else f"(j < {group})[None, :]", axis=1)
        kernel.line(f"row = {reader.row('scale')}")
        if fmt.zero != "none":
            kernel.line(f"zero_row = {reader.row('zero')}")
        _write_parameters(kernel, reader, fmt, str(g), "here")
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
    role, block, p = reader.role, fmt.block, fmt.mantissa
    wide = padded(block)
    kernel.line(f"j = tl.arange(0, {wide})")
    for g in range(reader.part.width // block):
        kernel.note(f"block {g}: channels {g * block} to {(g + 1) * block - 1}")
        kernel.line(f"largest = tl.max(tl.abs({_group(reader, g, block)}), axis=1)")
        kernel.line("byte = (largest.to(tl.int32, bitcast=True) >> 23) & 255")
        target = f"{role}_uint8 + {reader.row('exponent')} + {g}"
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
    _write_planes(kernel, reader)


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
