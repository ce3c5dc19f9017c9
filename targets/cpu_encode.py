"""The kernel encode of one stream: tail tokens to the packed fields of a page.

Every quotient is taken in f64, as in ir/encodings, so that scales and codes are the same bits;
the scale is rounded to its stored type first and codes are made from what was stored.
"""

from __future__ import annotations

from ..ir.encodings import Bfp, Int, Raw
from ..ir.layouts import code_bits
from ..ir.plan import StreamPlan
from .cpu_append import bf16_bits
from .cpu_codes import PageReader, as_f32
from .cpu_text import Kernel, bits_as, number, rint

F64 = "float64"
LARGEST = number(3.4028234663852886e38)


def encode(stream: StreamPlan) -> Kernel:
    """Return the kernel that encodes positions [begin, end) of each row, whole groups.

    `bad[b * H + h]` becomes 1 where a scale or value does not fit its stored type, else 0.
    """
    kernel, role, heads = Kernel(f"encode_{stream.role}"), stream.role, stream.heads
    reader = PageReader(stream.page_layout(), role)
    for name in ("begin", "end", f"{role}_tail_first", f"{role}_table"):
        kernel.array(name, "int64")
    kernel.array(f"{role}_tail", "float32")
    reader.arrays(kernel)
    kernel.array("bad", "int64")
    for name in ("batch", f"{role}_capacity", f"{role}_max_pages"):
        kernel.scalar(name)
    sink, size, width = stream.tokens.sink, stream.page_tokens, stream.channels
    group = stream.tokens.group_tokens
    with kernel.block(f"for bh in T.parallel(batch * {heads})"):
        kernel.let("b", f"T.truncdiv(bh, T.int64({heads}))")
        kernel.let("h", f"T.truncmod(bh, T.int64({heads}))")
        kernel.scratch("codes", group * width, "uint8")
        kernel.scratch("limits", 2)
        kernel.line("bad[bh] = T.int64(0)")
        with kernel.block(f"for i in T.serial(T.truncdiv(end[b] - begin[b], T.int64({group})))"):
            kernel.let("place", f"begin[b] + i * {group} - {sink}")
            kernel.let("page", f"T.truncdiv(place, T.int64({size}))")
            kernel.let("t", f"place - page * {size}")
            reader.open_page(kernel, f"{role}_table[b * {role}_max_pages + page]")
            slot = f"begin[b] + i * {group} - {role}_tail_first[b]"
            kernel.let("source", f"(bh * {role}_capacity + {slot}) * {width}")
            _write_group(kernel, stream, reader)
    return kernel


def _write_group(kernel: Kernel, stream: StreamPlan, reader: PageReader) -> None:
    """Encode the group of tokens at `source` into the page from token t on."""
    match stream.tokens.rest:
        case Raw() as fmt:
            _write_raw(kernel, reader, fmt)
            return
        case Int() as fmt:
            _write_int(kernel, stream, reader, fmt)
        case Bfp() as fmt:
            _write_bfp(kernel, stream, reader, fmt)
    _write_planes(kernel, reader, stream.tokens.group_tokens)


def _value(stream_role: str, offset: str) -> str:
    return f"{stream_role}_tail[source + {offset}]"


def _write_raw(kernel: Kernel, reader: PageReader, fmt: Raw) -> None:
    with kernel.block(f"for c in T.serial({reader.layout.channels})"):
        kernel.let("value", _value(reader.role, "c"))
        _write_stored(kernel, reader, "values", "t", "c", 'T.Cast("float64", value)', fmt.dtype)


def _write_stored(
    kernel: Kernel, reader: PageReader, name: str, row: str, column: str, value: str, dtype: str
) -> str:
    """Round an f64 value to its stored type, store it, flag overflow; return its f32 text."""
    field = next(field for field in reader.layout.fields if field.name == name)
    target = (
        f"{reader.role}_{field.dtype}[{reader.role}_{name} + ({row}) * {field.shape[1]} + {column}]"
    )
    kernel.let(f"exact_{name}", value)
    single = f'T.Cast("float32", exact_{name})'
    if dtype == "f32":
        stored = single
    elif dtype == "bf16":
        stored = f'T.Cast("uint16", {bf16_bits(single)})'
    else:
        stored = f'T.Cast("float16", {_round_to_odd(kernel, f"exact_{name}")})'
    kernel.let(f"stored_{name}", stored)
    kernel.line(f"{target} = stored_{name}")
    kernel.let(f"single_{name}", as_f32(f"stored_{name}", dtype, 1))
    finite = f"T.abs(single_{name}) <= {LARGEST}"
    kernel.line(f"bad[bh] = T.Select({finite}, bad[bh], T.int64(1))")
    return f"single_{name}"


def _round_to_odd(kernel: Kernel, value: str) -> str:
    """Return an f64 as f32 such that f16 of that is rounded once: cut, and mark what was cut."""
    bits = bits_as("int64", value, 1)
    low = f"T.bitwise_and({bits}, T.int64({(1 << 29) - 1}))"
    mark = f"T.Select({low} != T.int64(0), T.int64({1 << 29}), T.int64(0))"
    cut = f"T.bitwise_and({bits}, T.int64({-(1 << 29)}))"
    return f'T.Cast("float32", {bits_as(F64, f"T.bitwise_or({cut}, {mark})", 1)})'


def _write_limits(kernel: Kernel, reader: PageReader, count: int, offset: str) -> None:
    """Write the least and the largest of `count` values at `offset`, a text in i."""
    first = _value(reader.role, offset.replace("@", "0"))
    kernel.line(f"limits[0] = {first}")
    kernel.line(f"limits[1] = {first}")
    with kernel.block(f"for e in T.serial({count})"):
        value = _value(reader.role, offset.replace("@", "e"))
        kernel.line(f"limits[0] = T.min(limits[0], {value})")
        kernel.line(f"limits[1] = T.max(limits[1], {value})")


def _write_int(kernel: Kernel, stream: StreamPlan, reader: PageReader, fmt: Int) -> None:
    """Write scale, zero and codes of each group of the token, or token group, at t."""
    width = stream.channels
    if fmt.axis == "token":
        count, head, offset = (
            fmt.group,
            f"for g in T.serial({width // fmt.group})",
            f"g * {fmt.group} + @",
        )
        row = "t"
    else:
        count, head, offset = fmt.group, f"for g in T.serial({width})", f"@ * {width} + g"
        row = f"T.truncdiv(t, T.int64({fmt.group}))"
    with kernel.block(head):
        _write_limits(kernel, reader, count, offset)
        clip = number(fmt.clip, 1, F64)
        kernel.let("low0", f'T.Cast("float64", limits[0]) * {clip}')
        kernel.let("high0", f'T.Cast("float64", limits[1]) * {clip}')
        zero64 = number(0.0, 1, F64)
        if fmt.zero == "int":
            kernel.let("low", f"T.min(low0, {zero64})")
            kernel.let("high", f"T.max(high0, {zero64})")
        else:
            kernel.let("low", "low0")
            kernel.let("high", "high0")
        negative = number(-1.0, 1, F64)
        span = f"T.max(low * {negative}, high)" if fmt.zero == "none" else "(high - low)"
        kernel.let("wanted", f"{span} / {number(float(fmt.steps), 1, F64)}")
        alive = _alive(kernel, fmt)
        single = _write_stored(kernel, reader, "scale", row, "g", alive, fmt.params)
        kernel.let("scale", f'T.Cast("float64", {single})')
        _write_zero(kernel, reader, fmt, row)
        with kernel.block(f"for e in T.serial({count})"):
            kernel.let(
                "value", f'T.Cast("float64", {_value(reader.role, offset.replace("@", "e"))})'
            )
            kernel.line(f"codes[{offset.replace('@', 'e')}] = {_code(fmt)}")


def _alive(kernel: Kernel, fmt: Int) -> str:
    """Return the wanted scale, or 1 where it would be stored as zero."""
    if fmt.params == "f16":
        kept = f'T.Cast("float32", T.Cast("float16", {_round_to_odd(kernel, "wanted")}))'
    else:
        single = 'T.Cast("float32", wanted)'
        kept = (
            single
            if fmt.params == "f32"
            else as_f32(f'T.Cast("uint16", {bf16_bits(single)})', "bf16", 1)
        )
    kernel.let("kept", kept)
    return f"T.Select(kept == {number(0.0)}, {number(1.0, 1, F64)}, wanted)"


def _write_zero(kernel: Kernel, reader: PageReader, fmt: Int, row: str) -> None:
    """Store the zero point and bind it as `zero`, f64."""
    if fmt.zero == "none":
        return
    wanted = "low"
    if fmt.zero == "int":
        places = rint(f"low * {number(-1.0, 1, F64)} / scale", 1, F64)
        wanted = _clipped(places, 0.0, float(fmt.steps))
    single = _write_stored(kernel, reader, "zero", row, "g", wanted, fmt.params)
    kernel.let("zero", f'T.Cast("float64", {single})')


def _code(fmt: Int) -> str:
    most = float(2**fmt.bits - 1)
    if fmt.zero == "float":
        code = rint("(value - zero) / scale", 1, F64)
    elif fmt.zero == "int":
        code = f"({rint('value / scale', 1, F64)} + zero)"
    else:
        limit = float(fmt.steps)
        inside = _clipped(rint("value / scale", 1, F64), -limit, limit)
        code = f"({inside} + {number(2.0 ** (fmt.bits - 1), 1, F64)})"
    return f'T.Cast("uint8", T.Cast("int32", {_clipped(code, 0.0, most)}))'


def _clipped(value: str, low: float, high: float) -> str:
    return f"T.min(T.max({value}, {number(low, 1, F64)}), {number(high, 1, F64)})"


def _write_bfp(kernel: Kernel, stream: StreamPlan, reader: PageReader, fmt: Bfp) -> None:
    """Write exponent and codes of each block of the token at t."""
    width, p = stream.channels, fmt.mantissa
    field = next(field for field in reader.layout.fields if field.name == "exponent")
    with kernel.block(f"for g in T.serial({width // fmt.block})"):
        _write_limits(kernel, reader, fmt.block, f"g * {fmt.block} + @")
        kernel.let("largest", f"T.max(limits[0] * {number(-1.0)}, limits[1])")
        # The exponent field of an f32 is floor(log2) + 127, and 0 below the normal numbers.
        byte = f"T.shift_right({bits_as('int32', 'largest', 1)}, T.int32(23))"
        kernel.let("byte", f"T.bitwise_and({byte}, T.int32(255))")
        target = f"{reader.role}_uint8[{reader.role}_exponent + t * {field.shape[1]} + g]"
        kernel.line(f'{target} = T.Cast("uint8", byte)')
        power = f'T.Cast("int64", T.int32({1023 + p - 2 + 127}) - byte)'
        kernel.let("factor", bits_as(F64, f"T.shift_left({power}, T.int64(52))", 1))
        with kernel.block(f"for e in T.serial({fmt.block})"):
            value = f'T.Cast("float64", {_value(reader.role, f"g * {fmt.block} + e")})'
            limit = float(2 ** (p - 1) - 1)
            kernel.let("m", _clipped(rint(f"{value} * factor", 1, F64), -limit, limit))
            kernel.let("kept", f"T.Select(byte == T.int32(0), {number(0.0, 1, F64)}, m)")
            code = f'T.Cast("int32", kept + {number(2.0 ** (p - 1), 1, F64)})'
            kernel.line(f'codes[g * {fmt.block} + e] = T.Cast("uint8", {code})')


def _write_planes(kernel: Kernel, reader: PageReader, tokens: int) -> None:
    """Pack the codes of `tokens` tokens from token t on into the planes of the page."""
    layout, role = reader.layout, reader.role
    fmt = layout.format
    if isinstance(fmt, Raw):
        return
    bits, width = code_bits(fmt), layout.channels
    with kernel.block(f"for s in T.serial({tokens})"):
        if bits != 3:
            _write_plane(kernel, f"{role}_codes", width, bits, "{}")
        else:
            _write_plane(kernel, f"{role}_codes", width, 2, "T.bitwise_and({}, T.uint8(3))")
            _write_plane(kernel, f"{role}_high", width, 1, "T.shift_right({}, T.uint8(2))")


def _write_plane(kernel: Kernel, start: str, width: int, bits: int, part: str) -> None:
    count = 8 // bits
    plane = width // count
    with kernel.block(f"for w in T.serial({plane})"):
        terms = []
        for i in range(count):
            code = part.format(f"codes[s * {width} + {i * plane} + w]")
            terms.append(f"T.shift_left({code}, T.uint8({i * bits}))" if i else code)
        text = terms[0]
        for term in terms[1:]:
            text = f"T.bitwise_or({text}, {term})"
        role = start.split("_")[0]
        kernel.line(f"{role}_uint8[{start} + (t + s) * {plane} + w] = {text}")
