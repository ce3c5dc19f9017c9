"""Due tokens of a stream, from the tail to the packed fields of pages.

Every quotient is taken in f64, as in ir/encodings, so that scales and codes are the same bits; the
scale is rounded to its stored type first and codes are made from what was stored. One program
encodes some tokens that stand for themselves, or one group of tokens; and where channels have
scales of their own, only some columns of each plane, for the numbers of a group must fit the
registers. Of a sparse part, what is dense is encoded from the tokens cut to m (see
`ir/encodings/sparse.py`), and the entries hold what that left.
"""

from __future__ import annotations

from ..ir.encodings import Bfp, Int, Lut, Raw
from ..ir.encodings.lut import OFFSET, PARTS
from ..ir.plan import StreamPlan
from ..ir.planes import code_bits
from .gpu_encode_sparse import write_dense, write_entries, write_outliers
from .gpu_pages import PageReader, declare_pages, operand, readers_of
from .gpu_text import (
    WARPS,
    Dialect,
    Kernel,
    across,
    both,
    load,
    narrow,
    padded,
    write_flag,
    write_rint,
    write_stored,
)

LEAST_COLUMNS = 8
"""Of a plane in one program: that many numbers of the tail are one sector of memory."""
WORDS_OF_A_WARP, MOST_WARPS = 32 * 32, 16
"""Registers that hold the numbers which a program encodes, a quarter of all that threads have."""


def tokens_of(stream: StreamPlan, dialect: Dialect) -> int:
    """Return the tokens that one program encodes."""
    group = stream.tokens.group_tokens
    return dialect.new if group == 1 else group


def programs_of(stream: StreamPlan, kind: str, dialect: Dialect) -> int:
    """Return how many programs encode the same tokens, each its columns of the planes."""
    return max((_blocks(reader, dialect) for reader in _stored(stream, kind)), default=1)


def warps_of(stream: StreamPlan, kind: str, dialect: Dialect) -> int:
    """Return the warps of a block, so that a thread has few numbers of what it encodes."""
    words, tokens = 0, padded(tokens_of(stream, dialect))
    for reader in _stored(stream, kind):
        part = reader.part
        words = max(words, 2 * tokens * part.planes * _columns(reader, dialect))
        if part.sparse is not None:
            # The largest channels are looked for in whole tokens, as f32.
            words = max(words, tokens * padded(part.width))
    return min(MOST_WARPS, max(WARPS, padded(-(-words // WORDS_OF_A_WARP))))


def declare_encode(kernel: Kernel, stream: StreamPlan) -> None:
    """Declare what is due, where it is, and the pages that it goes to."""
    for name in ("begin", "end"):
        kernel.array(f"{stream.role}_{name}", "int64")
    declare_pages(kernel, stream)


def write_encode(
    kernel: Kernel, stream: StreamPlan, kind: str, program: str, dialect: Dialect
) -> None:
    """Encode tokens of [begin, end) of row b, head h; end is the end of a group.

    `bad[1, b H + h]` becomes 1 where a scale or value does not fit its stored type.

    Args:
        kernel: where to write.
        stream: the plan.
        kind: arrangement of the pages.
        program: number among those that encode the stream.
        dialect: of the machine.
    """
    role, count = stream.role, tokens_of(stream, dialect)
    programs = programs_of(stream, kind, dialect)
    tile = f"({program}) // {programs}" if programs > 1 else f"({program})"
    kernel.line(f"start = tl.load({role}_begin + b) + {tile} * {count}")
    kernel.line(f"stop = tl.load({role}_end + b)")
    kernel.line(f"tail = bh * {role}_capacity - tl.load({role}_tail_first + b)")
    if programs > 1:
        kernel.line(f"block = ({program}) % {programs}")
    readers = _stored(stream, kind)
    with kernel.block("if start < stop"):
        kernel.line(f"flag = {role}_bad + tl.num_programs(1) + bh")
        # Names bound outside a loop cannot have another shape inside it, so loops come first.
        for reader in sorted(readers, key=lambda r: _own_group(stream, r, count) == count):
            if programs == 1 or len(readers) == 1:
                _write_part(kernel, stream, reader, dialect)
                continue
            with kernel.block(f"if block < {_blocks(reader, dialect)}"):
                _write_part(kernel, stream, reader, dialect)


def _stored(stream: StreamPlan, kind: str) -> list[PageReader]:
    return [reader for reader in readers_of(stream, kind) if reader.is_stored]


def _columns(reader: PageReader, dialect: Dialect) -> int:
    """Return the columns of a plane that one program encodes: a power of two."""
    fmt = reader.part.format
    if not isinstance(fmt, Int) or fmt.axis != "channel":
        return reader.wide
    fitting = dialect.elements // (padded(fmt.group) * padded(reader.part.planes))
    columns = max(LEAST_COLUMNS, fitting)
    return reader.wide if columns >= reader.part.plane else columns


def _blocks(reader: PageReader, dialect: Dialect) -> int:
    """Return into how many blocks the columns of a plane are cut."""
    return -(-reader.part.plane // _columns(reader, dialect))


def _own_group(stream: StreamPlan, reader: PageReader, count: int) -> int:
    """Return the tokens that the format of a reader encodes together, or all of the program."""
    group = reader.part.format.group_tokens
    return group if group > 1 else count


def _write_part(kernel: Kernel, stream: StreamPlan, reader: PageReader, dialect: Dialect) -> None:
    """Encode the channels of one reader, group by group of its own format."""
    count = tokens_of(stream, dialect)
    columns, group = _columns(reader, dialect), _own_group(stream, reader, count)
    if columns == reader.wide:
        reader.write_columns(kernel)
    else:
        kernel.line(f"{reader.name}_w = block * {columns} + tl.arange(0, {columns})")
    if group == count:
        _write_group(kernel, reader, "start", count, columns)
        return
    kernel.note("groups of these channels are shorter than those of others")
    with kernel.block(f"for later in range(0, {count}, {group})"):
        _write_group(kernel, reader, "(start + later)", group, columns)


def _write_group(kernel: Kernel, reader: PageReader, start: str, count: int, columns: int) -> None:
    """Encode `count` tokens from `start` on: one group, or tokens that stand for themselves."""
    kernel.line(f"i = tl.arange(0, {padded(count)})")
    kernel.line(f"position = {start} + i")
    inside = "" if padded(count) == count else f" & (i < {count})"
    kernel.line(f"here = (position < stop){inside}")
    kernel.line("slot = tail + position")
    _write_pages(kernel, reader, start)
    if reader.part.sparse is not None:
        write_outliers(kernel, reader, reader.part.sparse)
    match reader.part.format:
        case Raw() as fmt:
            _write_raw(kernel, reader, fmt)
        case Int(axis="channel") as fmt:
            _write_channels(kernel, reader, fmt)
        case Int() as fmt:
            _write_tokens(kernel, reader, fmt, padded(count))
        case Bfp() as fmt:
            _write_blocks(kernel, reader, fmt, padded(count))
        case Lut() as fmt:
            _write_entries_of_table(kernel, reader, fmt, padded(count))
    if reader.part.sparse is not None:
        write_entries(kernel, reader, reader.part.sparse, columns)


def _write_pages(kernel: Kernel, reader: PageReader, start: str) -> None:
    """Bind the tokens' place in their pages, and of channels with scales the group's rows."""
    stream, role, fmt = reader.stream, reader.role, reader.part.format
    sink, size = stream.tokens.sink, stream.page_tokens
    table, place = f"{role}_table + b * {role}_max_pages + place // {size}", f"place % {size}"
    # A group lies in one page.
    alone = stream.tokens.group_tokens == 1
    first = "position" if alone else start
    kernel.line(f"place = {first} - {sink}" if sink else f"place = {first}")
    kernel.line(f"page = {load(table, 'here' if alone else '')}")
    block = f"page * {reader.layout.page_bytes} + h * {reader.layout.head_bytes}"
    kernel.line(f"{role}_block = {block}")
    kernel.line(f"{role}_t = {place}")
    if isinstance(fmt, Int) and fmt.axis == "channel":
        kernel.note("the group's row of the parameters")
        kernel.line(f"row = {reader.row('scale')}")
        if fmt.zero != "none":
            kernel.line(f"zero_row = {reader.row('zero')}")
    if not alone:
        kernel.line(f"{role}_t = {place} + i")


def _write_values(kernel: Kernel, reader: PageReader) -> None:
    """Bind x, f64 [tokens, planes, columns], to the tail's values, and channel to their places."""
    part = reader.part
    kernel.line(f"p = tl.arange(0, {part.planes})")
    kernel.line(f"channel = p[:, None] * {part.plane} + {across(f'{reader.name}_w')}")
    place = f"(channel + {part.first})" if part.first else "channel"
    columns = f"{reader.columns}[None, None, :]" if reader.columns else ""
    _write_load(kernel, reader, "x", place, columns)


def _write_groups(kernel: Kernel, reader: PageReader, size: int) -> None:
    """Bind y, f64 [tokens, groups, channels], to the tail's values in groups of channels."""
    groups = reader.part.width // size
    kernel.line(f"g = tl.arange(0, {padded(groups)})")
    kernel.line(f"j = tl.arange(0, {padded(size)})")
    first = f"{reader.part.first} + " if reader.part.first else ""
    inside = "" if padded(groups) == groups else f"(g < {groups})[None, :, None]"
    place = f"({first}g[:, None] * {size} + j[None, :])"
    _write_load(kernel, reader, "y", place, both(inside, _in_group(size)))


def _write_load(kernel: Kernel, reader: PageReader, out: str, place: str, inside: str) -> None:
    """Bind `out` to what the tail holds at places [..., ...] of each token, cut to m; f64."""
    pointer = f"slot[:, None, None] * {reader.stream.channels} + {place}[None, :, :]"
    values = load(f"{reader.role}_tail + {pointer}", both("here[:, None, None]", inside))
    if reader.part.sparse is not None:
        values = f"tl.minimum(tl.maximum({values}, -m[:, None, None]), m[:, None, None])"
    kernel.line(f"{out} = {values}.to(tl.float64)")


def _in_group(size: int) -> str:
    """Return the mask of y's numbers that are in a group, or "" if all are."""
    return "" if padded(size) == size else f"(j < {size})[None, None, :]"


def _write_limits(kernel: Kernel, x: str, mask: str, *, axis: int) -> None:
    """Bind the least and the largest of x along an axis, of what the mask keeps."""
    for name, extreme, sign in (("low", "min", ""), ("high", "max", "-")):
        kept = f'tl.where({mask}, {x}, {sign}float("inf"))' if mask else x
        kernel.line(f"{name} = tl.{extreme}({kept}, axis={axis})")


def _write_raw(kernel: Kernel, reader: PageReader, fmt: Raw) -> None:
    mask = both("here[:, None]", across(reader.columns))
    pointer = f"slot[:, None] * {reader.stream.channels} + {across(reader.channel(0))}"
    kernel.line(f"x = {load(f'{reader.role}_tail + {pointer}', mask)}.to(tl.float64)")
    write_stored(kernel, "x", fmt.dtype)
    kernel.line(f"tl.store({reader.at('values', 0)}, stored, mask={mask})")
    write_flag(kernel)


def _write_channels(kernel: Kernel, reader: PageReader, fmt: Int) -> None:
    """Encode one group of tokens, each channel by a scale of its own."""
    _write_values(kernel, reader)
    inside = "" if padded(fmt.group) == fmt.group else "here[:, None, None]"
    _write_limits(kernel, "x", inside, axis=0)
    _write_parameters(kernel, reader, fmt, "channel", across(reader.columns))
    _write_codes(kernel, reader, fmt, "scale[None, :, :]", "zero[None, :, :]")
    _write_bytes(kernel, reader)


def _write_tokens(kernel: Kernel, reader: PageReader, fmt: Int, tokens: int) -> None:
    """Encode tokens one by one: first the scales of groups of channels, then the codes."""
    _write_groups(kernel, reader, fmt.group)
    # Groups that are none hold zeros.
    _write_limits(kernel, "y", _in_group(fmt.group), axis=2)
    column = _write_rows(kernel, reader, fmt.group, "scale")
    if fmt.zero != "none":
        kernel.line(f"zero_row = ({reader.row('zero')})[:, None]")
    _write_parameters(kernel, reader, fmt, column, _mask_of_groups(reader, fmt.group))
    names = ("scale",) if fmt.zero == "none" else ("scale", "zero")
    _spread(kernel, reader, fmt.group, *names)
    _write_codes(kernel, reader, fmt, "scale", "zero")
    _write_bytes(kernel, reader, tokens)


def _write_rows(kernel: Kernel, reader: PageReader, size: int, name: str) -> str:
    """Bind each token's row of a field with a number a group; return the groups' places in it."""
    kernel.line(f"row = ({reader.row(name)})[:, None]")
    return f"g[None, :] * {reader.layout.tokens}" if reader.is_turned(name) else "g[None, :]"


def _mask_of_groups(reader: PageReader, size: int) -> str:
    groups = reader.part.width // size
    return both("here[:, None]", "" if padded(groups) == groups else f"(g < {groups})[None, :]")


def _write_parameters(kernel: Kernel, reader: PageReader, fmt: Int, column: str, mask: str) -> None:
    """Store scale and zero of the groups with limits low, high at row + column; bind them, f64."""
    kernel.line(f"low = low * {fmt.clip!r}")
    kernel.line(f"high = high * {fmt.clip!r}")
    if fmt.zero == "int":
        kernel.line("low = tl.minimum(low, 0.0)")
        kernel.line("high = tl.maximum(high, 0.0)")
    span = "tl.maximum(-low, high)" if fmt.zero == "none" else "(high - low)"
    kernel.line(f"wanted = {span} / {float(fmt.steps)}")
    write_stored(kernel, "wanted", fmt.params)
    kernel.note(f"what is stored for a scale that rounds to zero: {fmt.dead_scale!r}")
    kernel.line(f"single = tl.where(single == 0.0, {fmt.dead_scale!r}, single)")
    kernel.line(f"stored = {narrow('single', fmt.params)}")
    target = f"{reader.role}_{reader.part.field('scale').dtype}"
    masked = f", mask={mask}" if mask else ""
    kernel.line(f"tl.store({target} + row + {column}, stored{masked})")
    write_flag(kernel)
    kernel.line("scale = single.to(tl.float64)")
    if fmt.zero == "none":
        return
    if fmt.zero == "int":
        kernel.line("low = -low / scale")
        write_rint(kernel, "low")
        kernel.line(f"low = tl.minimum(tl.maximum(low, 0.0), {float(fmt.steps)})")
    write_stored(kernel, "low", fmt.params)
    kernel.line(f"tl.store({target} + zero_row + {column}, stored{masked})")
    write_flag(kernel)
    kernel.line("zero = single.to(tl.float64)")


def _write_codes(kernel: Kernel, reader: PageReader, fmt: Int, scale: str, zero: str) -> None:
    """Bind code, i32, to the codes of x by scales and zeros that fit its shape."""
    kernel.line(f"n = (x - {zero}) / {scale}" if fmt.zero == "float" else f"n = x / {scale}")
    write_rint(kernel, "n")
    if fmt.zero == "int":
        kernel.line(f"n = n + {zero}")
    elif fmt.zero == "none":
        limit = float(fmt.steps)
        kernel.line(f"n = tl.minimum(tl.maximum(n, -{limit}), {limit}) + {2.0 ** (fmt.bits - 1)}")
    most = float(2**fmt.bits - 1)
    kernel.line(f"code = tl.minimum(tl.maximum(n, 0.0), {most}).to(tl.int32)")
    write_dense(kernel, reader, _decoded(fmt, scale, zero))


def _spread(kernel: Kernel, reader: PageReader, size: int, *names: str) -> None:
    """Bind x, channel, and each name, a number a group [tokens, groups], in one shape."""
    part, groups = reader.part, reader.part.width // size
    if all(padded(n) == n for n in (size, groups, part.plane)) and not reader.columns:
        kernel.line("x = y")
        kernel.line(f"channel = g[:, None] * {size} + j[None, :]")
        for name in names:
            kernel.line(f"{name} = {name}[:, :, None]")
        return
    kernel.note("groups and planes do not share their bounds: each channel has that of its group")
    _write_values(kernel, reader)
    for name in names:
        kernel.line(f"of = {name}")
        for group in range(groups):
            chosen = f"tl.where((g == {group})[None, :], of, 0.0)"
            kernel.line(f"each = tl.sum({chosen}, axis=1)[:, None, None]")
            later = f"(channel >= {group * size})[None, :, :]"
            kernel.line(f"{name} = tl.where({later}, each, {name})" if group else f"{name} = each")


def _write_blocks(kernel: Kernel, reader: PageReader, fmt: Bfp, tokens: int) -> None:
    """Encode tokens of block floating point: an exponent for each block, then the codes."""
    p = fmt.mantissa
    _write_groups(kernel, reader, fmt.block)
    kernel.line("largest = tl.max(tl.abs(y), axis=2).to(tl.float32)")
    kernel.line("byte = (largest.to(tl.int32, bitcast=True) >> 23) & 255")
    column = _write_rows(kernel, reader, fmt.block, "exponent")
    target = f"{reader.role}_uint8 + row + {column}"
    mask = _mask_of_groups(reader, fmt.block)
    kernel.line(f"tl.store({target}, byte.to(tl.uint8), mask={mask})")
    kernel.note("2^(p - 2 - e), or 0 for a block without an exponent, which holds zeros")
    kernel.line(f"power = ({1023 + p - 2 + 127} - byte).to(tl.int64) << 52")
    kernel.line("times = tl.where(byte == 0, 0.0, power.to(tl.float64, bitcast=True))")
    _spread(kernel, reader, fmt.block, "times")
    kernel.line("n = x * times")
    write_rint(kernel, "n")
    limit, middle = float(2 ** (p - 1) - 1), 2.0 ** (p - 1)
    kernel.line(f"n = tl.minimum(tl.maximum(n, -{limit}), {limit}) + {middle}")
    kernel.line("code = n.to(tl.int32)")
    # The product with a power of two is undone without rounding.
    write_dense(kernel, reader, f"(n - {middle}) / tl.where(times == 0.0, 1.0, times)")
    _write_bytes(kernel, reader, tokens)


def _write_entries_of_table(kernel: Kernel, reader: PageReader, fmt: Lut, tokens: int) -> None:
    """Encode tokens into a table: a scale for each group, then the codes."""
    _write_groups(kernel, reader, fmt.group)
    kernel.line("wanted = tl.max(tl.abs(y), axis=2)")
    if fmt.sigmas is None:
        kernel.line(f"wanted = wanted / {float(fmt.most)}")
    else:
        _write_mean(kernel, fmt, fmt.sigmas)
    write_stored(kernel, "wanted", fmt.params)
    column = _write_rows(kernel, reader, fmt.group, "scale")
    target = f"{reader.role}_{reader.part.field('scale').dtype} + row + {column}"
    kernel.line(f"tl.store({target}, stored, mask={_mask_of_groups(reader, fmt.group)})")
    write_flag(kernel)
    kernel.line("scale = single.to(tl.float64)")
    _spread(kernel, reader, fmt.group, "scale")
    counts = [f"(x > scale * {middle}).to(tl.int32)" for middle in fmt.middles]
    kernel.line(f"code = {' + '.join(counts)}")
    entry = f"({operand(fmt.operands, 'code')} - {OFFSET}).to(tl.float64)"
    write_dense(kernel, reader, f"{entry} * scale")
    _write_bytes(kernel, reader, tokens)


def _write_mean(kernel: Kernel, fmt: Lut, sigmas: float) -> None:
    """Turn `wanted`, the largest value, into the scale: the sum of squares is of whole numbers."""
    kernel.line(f"part = wanted / {PARTS}")
    kernel.line("n = y / tl.where(part > 0.0, part, 1.0)[:, :, None]")
    write_rint(kernel, "n")
    kernel.line(f"mean = tl.sum(n * n, axis=2) / {float(fmt.group)}")
    kernel.line(f"wanted = part * tl.sqrt(mean) * {sigmas / fmt.most!r}")


def _write_bytes(kernel: Kernel, reader: PageReader, tokens: int = 0) -> None:
    """Store the bytes of the codes: each plane has bits of its own in them.

    `tokens`: those of `code`, where its other two axes are groups and not planes.
    """
    bits, mask = code_bits(reader.coded()), both("here[:, None]", across(reader.columns))
    kernel.note("the planes share bytes")
    if tokens:
        shape = f"({tokens}, {reader.part.planes}, {reader.wide})"
        kernel.line(f"code = tl.reshape(code, {shape})")
        kernel.line(f"p = tl.arange(0, {reader.part.planes})")

    def store(terms: str, field: str, first: int) -> None:
        kernel.line(f"byte = tl.sum({terms}, axis=1)")
        kernel.line(f"tl.store({reader.at(field, first)}, byte.to(tl.uint8), mask={mask})")

    if bits != 3:
        store(f"code << (p * {bits})[None, :, None]" if bits < 8 else "code", "codes", 0)
        return
    low = "(code & 3) << (p // 2 * 2)[None, :, None]"
    for half in (0, 1):
        own = f"tl.where((p % 2 == {half})[None, :, None], {low}, 0)"
        store(own, "codes", half * reader.part.plane)
    store("(code >> 2) << p[None, :, None]", "high", 0)


def _decoded(fmt: Int, scale: str, zero: str) -> str:
    """Return codes as decoded, f64; the product has no rounding."""
    if fmt.zero == "float":
        return f"code.to(tl.float64) * {scale} + {zero}"
    middle = zero if fmt.zero == "int" else str(2.0 ** (fmt.bits - 1))
    return f"(code.to(tl.float64) - {middle}) * {scale}"
