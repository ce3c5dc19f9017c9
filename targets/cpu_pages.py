"""Reading one page: the text of a code, a scale and a zero point of every format.

A stream has one reader, or one for each slice of its channels that is stored. A channel of a reader
is named by its plane i and its place w in the plane: channel = i * plane + w.
Every format then reads as

    x^[t, c] = code(t, c) * scale + zero

where the offset of a symmetric or block floating point code is folded into zero. The code of a
format with a table is the operand that it names, see `cpu_lookup.py`. Sparse entries are
added where they are: a score gets q value, an output p value, a decoded token the value itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import numpy as np

from ..ir.arrangements import CODES, QUAD, ROWS, TILE, TOKEN_QUADS
from ..ir.encodings import Dense, Drop, Int, Lut, Raw, Sparse
from ..ir.layouts import PageLayout, Part
from ..ir.plan import StreamPlan
from ..ir.planes import code_bits, offset
from .cpu_lookup import operand
from .cpu_text import Kernel, as_f32, at, bit_field, bits_as, cast, number, splat


@dataclass(frozen=True, slots=True)
class PageReader:
    """Text that reads one part of the channels of a stream in its present page.

    Attributes:
        layout: of the page.
        role: "k" or "v", the prefix of every name.
        part: the channels, [first, first + width) of the head.
        format: of the part; of a sparse part, its dense format.
    """

    layout: PageLayout
    role: str
    part: Part
    format: Raw | Dense

    @property
    def alone(self) -> bool:
        """Whether the channels are not sliced, so that this is all of them."""
        return not self.part.prefix

    @property
    def adds(self) -> bool:
        """Whether a reader of this stream comes before, to whose scores this one's are added."""
        return self.part.first > min(part.first for part in self.layout.parts if part.fields)

    @property
    def width(self) -> int:
        """Channels of the part."""
        return self.part.width

    def own(self, name: str) -> str:
        """Return a name that no other reader of the stream has."""
        return name + self.part.prefix.removesuffix(".")

    def channel(self, c: str) -> str:
        """Return the channel of the head that is channel c of the part."""
        return f"{self.part.first} + {c}" if self.part.first else c

    @property
    def planes(self) -> int:
        """Chunks of channels that share a byte."""
        return self.part.planes

    @property
    def plane(self) -> int:
        """Channels of a plane."""
        return self.part.plane

    @property
    def group(self) -> int:
        """Channels that share a scale: 1 with one for each channel, all of them for raw."""
        return self.width if isinstance(self.format, Raw) else self.format.group_channels

    @property
    def groups(self) -> int:
        """Scales of one token, where scales are of tokens."""
        return self.width // self.group

    @property
    def per_channel(self) -> bool:
        """Whether a scale belongs to one channel of a group of tokens."""
        fmt = self.format
        return isinstance(fmt, Int) and fmt.axis == "channel"

    @property
    def one_scale(self) -> bool:
        """Whether a token of the stream has no more than one scale."""
        is_raw = isinstance(self.format, Raw)
        return is_raw or (self.alone and not self.per_channel and self.groups == 1)

    @property
    def lanes(self) -> int:
        """Channels that are read at once: at most 8, inside one plane and one group."""
        group = self.plane if self.per_channel else self.group
        return gcd(8, gcd(self.plane, group))

    @property
    def sparse(self) -> Sparse | None:
        """The entries of each token, or None."""
        return self.part.sparse

    def begin(self, name: str) -> str:
        """Return where a field of head h of the present page begins; `open_page` binds it."""
        return self.own(f"{self.role}_{name}")

    def value(self, t: str, i: str, w: str) -> str:
        """Return `lanes` codes of token t as f32 (the values themselves of a raw format)."""
        fmt, n = self.format, self.lanes
        if isinstance(fmt, Raw):
            return as_f32(self._read("values", t, w, n), fmt.dtype, n)
        bits = code_bits(fmt)
        if bits == 8:
            return self.number(self._read("codes", t, w, n), n)
        if bits != 3:
            code = bit_field(self._read("codes", t, w, n), f"{bits} * ({i})", bits, n)
            return self.number(code, n)
        # 3 bit: eight planes of C/8; two of them lie behind one another in the bytes of two bits.
        low_at = f"({i}) % 2 * {self.plane} + {w}"
        low = bit_field(self._read("codes", t, low_at, n), f"({i}) // 2 * 2", 2, n)
        high = bit_field(self._read("high", t, w, n), i, 1, n)
        return self.number(f"({low} + {high} * {splat('T.uint8(4)', n)})", n)

    def number(self, codes: str, lanes: int) -> str:
        """Return codes of any integer type as f32: what is multiplied and added to `zero`."""
        if isinstance(self.format, Lut):
            codes = operand(self.format.operands, cast("int32", codes, lanes), lanes)
        return cast("float32", codes, lanes)

    def codes(self, t: str, byte: str, lanes: int, i: int) -> str:
        """Return `lanes` codes of plane i as bytes, of 4 or 8 bits."""
        raw = self._read("codes", t, byte, lanes)
        bits = code_bits(self.coded())
        return raw if bits == 8 else bit_field(raw, f"{4 * i}", 4, lanes)

    def scale(self, row: str, column: str, lanes: int) -> str:
        """Return scales of neighbours in a row of the parameters, f32."""
        fmt = self.coded()
        if isinstance(fmt, Int | Lut):
            return as_f32(self._read("scale", row, column, lanes), fmt.params, lanes)
        # The byte is the exponent field of an f32; 0 is zero and makes the whole block zero.
        wide = cast("int32", self._read("exponent", row, column, lanes), lanes)
        bits = f"T.shift_left({wide}, {splat('T.int32(23)', lanes)})"
        power = bits_as("float32", bits, lanes)
        return f"({power} * {number(2.0 ** (2 - fmt.mantissa), lanes)})"

    def zero(self, row: str, column: str, lanes: int, scale: str) -> str:
        """Return what is added to code * scale."""
        fmt = self.coded()
        if not isinstance(fmt, Int) or fmt.zero == "none":
            return f"({scale} * {number(-float(offset(fmt)), lanes)})"
        zero = as_f32(self._read("zero", row, column, lanes), fmt.params, lanes)
        return zero if fmt.zero == "float" else f"({zero} * ({number(-1.0, lanes)} * {scale}))"

    def zero_by_scale(self, row: str, column: str, lanes: int, scale: str) -> str:
        """Return the zero point in codes: what is added to a code before it is scaled."""
        fmt = self.coded()
        if not isinstance(fmt, Int) or fmt.zero == "none":
            return number(-float(offset(fmt)), lanes)
        zero = as_f32(self._read("zero", row, column, lanes), fmt.params, lanes)
        return f"({zero} / {scale})" if fmt.zero == "float" else f"({zero} * {number(-1.0, lanes)})"

    def write_entries(self, kernel: Kernel, first: str, last: str, add: Callable[[], None]) -> None:
        """Write what `add` writes for every entry of the tokens t of [first, last), if any.

        Bound are t, `channel` of the head, and `entry`, f32.
        """
        if self.sparse is None:
            return
        kernel.note("sparse entries")
        with (
            kernel.block(f"for t in T.serial({first}, T.max({first}, {last}))"),
            kernel.block(f"for e in T.serial({self.sparse.count})"),
        ):
            # No byte of a page may become an address outside the head.
            index = f'T.Cast("int64", {self._read("index", "t", "e", 1)})'
            place = f"T.min({index}, T.int64({self.width - 1}))"
            kernel.let("channel", self.channel(place))
            kernel.let("entry", as_f32(self._read("value", "t", "e", 1), self.sparse.values, 1))
            add()

    def exact(self, t: str, c: str, code: str) -> str:
        """Return channel c of token t decoded from its code, f64; the product has no rounding."""
        fmt = self.coded()
        row = f"T.truncdiv({t}, T.int64({fmt.group_tokens}))" if self.per_channel else t
        column = c if self.group == 1 else f"T.truncdiv({c}, T.int32({self.group}))"
        scale = cast("float64", self.scale(row, column, 1), 1)
        if isinstance(fmt, Lut):
            code = operand(fmt.operands, cast("int32", code, 1), 1)
        code = cast("float64", code, 1)
        if not isinstance(fmt, Int) or fmt.zero == "none":
            return f"(({code} - T.float64({float(offset(fmt))})) * {scale})"
        zero = cast("float64", as_f32(self._read("zero", row, column, 1), fmt.params, 1), 1)
        return (
            f"(({code} - {zero}) * {scale})"
            if fmt.zero == "int"
            else f"({code} * {scale} + {zero})"
        )

    def coded(self) -> Dense:
        """Return the format, which is not raw."""
        if isinstance(self.format, Raw):
            raise TypeError("a raw format has no codes")
        return self.format

    def place(self, name: str, row: str, column: str) -> str:
        """Return the index of an element of a field."""
        rows, columns = self.part.field(name).shape
        begin, kind = self.begin(name), self.layout.kind
        if kind == ROWS or (name not in CODES and rows < self.layout.tokens):
            return f"{begin} + {row} * {columns} + {column}"
        if name not in CODES:
            return f"{begin} + ({column}) * {rows} + {row}"
        if kind == TOKEN_QUADS:
            quad, inside = _split(row, QUAD)
            return f"{begin} + ({quad} * {columns} + {column}) * {QUAD} + {inside}"
        (tile, token), (quad, byte) = _split(row, TILE), _split(f"({column})", QUAD)
        place = f"({tile} * {columns // QUAD} + {quad}) * {TILE} + {token}"
        return f"{begin} + ({place}) * {QUAD} + {byte}"

    def quads(self, name: str, row: str, column: str, lanes: int) -> str:
        """Return the bytes of quads of `lanes` neighbours: of tokens (keys) or bytes (values)."""
        return at(f"{self.role}_uint8", self.place(name, row, column), QUAD * lanes)

    def plane_codes(
        self, i: int, bytes_of: Callable[[str, int], str], lanes: int, *, in_place: bool = False
    ) -> str:
        """Return codes of plane i as bytes.

        Args:
            i: the plane.
            bytes_of: (field, 0 or 1) -> bytes; 1 where the plane lies behind another one (3 bits).
            lanes: bytes.
            in_place: whether codes stay where they lie in the byte, and so are 2^(bits i) times as
                large; not of 3 bits.
        """
        bits = code_bits(self.coded())
        if bits == 8:
            return bytes_of("codes", 0)
        if in_place:
            mask = splat(f"T.uint8({(2**bits - 1) << bits * i})", lanes)
            return f"T.bitwise_and({bytes_of('codes', 0)}, {mask})"
        if bits != 3:
            return bit_field(bytes_of("codes", 0), str(bits * i), bits, lanes)
        low = bit_field(bytes_of("codes", i % 2), str(i // 2 * 2), 2, lanes)
        high = bit_field(bytes_of("high", 0), str(i), 1, lanes)
        shifted = f"T.shift_left({high}, {splat('T.uint8(2)', lanes)})"
        return f"T.bitwise_or({low}, {shifted})"

    def _read(self, name: str, row: str, column: str, lanes: int) -> str:
        place = self.place(name, f"({row})", column)
        return at(f"{self.role}_{self.part.field(name).dtype}", place, lanes)


def _split(value: str, size: int) -> tuple[str, str]:
    """Return the quotient and the remainder of an index by a power of two."""
    shift = size.bit_length() - 1
    return f"T.shift_right({value}, {shift})", f"T.bitwise_and({value}, {size - 1})"


Readers = tuple[PageReader, ...]


def readers_of(stream: StreamPlan, layout: PageLayout) -> Readers:
    """Return the readers of a stream, in storage order; dropped channels have none."""
    return tuple(
        PageReader(layout, stream.role, part, part.format)
        for part in layout.parts
        if not isinstance(part.format, Drop)
    )


def declare_pages(kernel: Kernel, readers: Readers) -> None:
    """Declare the typed views of the pages that the formats read."""
    for reader in readers:
        for field in reader.part.fields:
            kernel.array(f"{reader.role}_{field.dtype}", field.dtype)


def open_page(kernel: Kernel, readers: Readers, page: str) -> None:
    """Bind where each field of head h of a page begins, in elements of the field."""
    layout, role = readers[0].layout, readers[0].role
    kernel.let(f"{role}_block", f"{page} * {layout.page_bytes} + h * {layout.head_bytes}")
    for reader in readers:
        for field in reader.part.fields:
            size = np.dtype(field.dtype).itemsize
            start = f"{role}_block + {field.offset}"
            shift = size.bit_length() - 1
            value = f"T.shift_right({start}, T.int64({shift}))" if shift else start
            kernel.let(reader.begin(field.name), value)
