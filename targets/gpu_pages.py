"""Reading tokens of a stream on a GPU: one block of channels for each plane, never interleaved.

A stream has one reader, or one for each slice of its channels. Channel i plane + w of a reader lies
in bits of byte w (see `ir/layouts.py`), so a page is read once and gives one block [tokens, plane]
for each plane i. Every format then reads as

    x^[t, c] = code(t, c) * scale + zero

The code of a format with a table is the operand that it names (`ir/encodings/lut.py`), picked from
words of four. A token that is masked out reads as zero, whatever lies in memory. Sparse entries are
added to the blocks: each is compared with the channels of its token's row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..ir.arrangements import CODES, ROWS, TURNED
from ..ir.encodings import Bfp, Dense, Drop, Int, Lut, Raw
from ..ir.layouts import PageLayout, Part
from ..ir.plan import StreamPlan
from ..ir.planes import code_bits, offset
from .gpu_text import LEAST_DOT, Kernel, across, as_f32, both, down, load, padded
from .kernel_text import chosen_word


@dataclass(frozen=True, slots=True)
class PageReader:
    """Text that reads one part of the channels of a stream.

    Names of the kernel that begin with the role are of the stream: bound before a page is read are
    <role>_t (token of the page) and <role>_block (first byte of the head block). Names that begin
    with `name` are of the reader.

    Attributes:
        stream: the plan.
        layout: of its pages.
        part: the channels, [first, first + width) of the head.
        words: whether numbers of two bytes that tokens have are read from words of four.
    """

    stream: StreamPlan
    layout: PageLayout
    part: Part
    words: bool = False

    @property
    def role(self) -> str:
        """Prefix of the stream's names."""
        return self.stream.role

    @property
    def name(self) -> str:
        """Prefix of the reader's names."""
        return self.role + self.part.prefix.removesuffix(".")

    @property
    def is_stored(self) -> bool:
        """Whether pages hold the channels; those of zero bits are only in sink and tail."""
        return not isinstance(self.part.format, Drop)

    @property
    def wide(self) -> int:
        """Columns of a block: the plane, made a power of two that products of matrices take."""
        return padded(self.part.plane, LEAST_DOT)

    @property
    def columns(self) -> str:
        """Mask of the columns that are channels, or "" if all are."""
        return "" if self.wide == self.part.plane else f"({self.name}_w < {self.part.plane})"

    def channel(self, i: int) -> str:
        """Return the channels of the head in plane i, as a vector."""
        first = self.part.first + i * self.part.plane
        return f"({self.name}_w + {first})" if first else f"{self.name}_w"

    def write_columns(self, kernel: Kernel) -> None:
        """Bind the columns of a block."""
        kernel.line(f"{self.name}_w = tl.arange(0, {self.wide})")

    def write_codes(self, kernel: Kernel, here: str) -> None:
        """Load what all planes of a block need once: bytes and entries; `here` masks its tokens."""
        name, fmt = self.name, self.part.format
        self._write_entries(kernel, here)
        if isinstance(fmt, Raw | Drop):
            return
        if code_bits(fmt) != 3:
            kernel.line(f"{name}_codes = {self._block('codes', 0, here)}.to(tl.int32)")
            return
        for half in (0, 1):
            low = self._block("codes", half * self.part.plane, here)
            kernel.line(f"{name}_codes_{half} = {low}.to(tl.int32)")
        kernel.line(f"{name}_high = {self._block('high', 0, here)}.to(tl.int32)")

    def write_plane(self, kernel: Kernel, i: int, here: str, out: str) -> None:
        """Bind `out` to the values of plane i, f32 [tokens, width]."""
        if isinstance(self.part.format, Raw):
            values = self._block("values", 0, here)
            kernel.line(f"{out} = {as_f32(values, self.part.format.dtype)}")
            return
        self._write_decoded(kernel, i, here, out)
        if self.part.sparse is not None:
            for e in range(self.part.sparse.count):
                place = f"({self.name}_index_{e} - {i * self.part.plane})"
                named = f"{across(f'{self.name}_w')} == {down(place)}"
                kernel.line(f"{out} += tl.where({named}, {down(f'{self.name}_value_{e}')}, 0.0)")

    def _write_entries(self, kernel: Kernel, here: str) -> None:
        """Bind <name>_index_e and <name>_value_e, the sparse entries of each token, if any."""
        if self.part.sparse is None:
            return
        for e in range(self.part.sparse.count):
            index, value = (load(self.parameter_at(f, e), here) for f in ("index", "value"))
            kernel.line(f"{self.name}_index_{e} = {index}.to(tl.int32)")
            kernel.line(f"{self.name}_value_{e} = {as_f32(value, self.part.sparse.values)}")

    def _write_decoded(self, kernel: Kernel, i: int, here: str, out: str) -> None:
        """Bind `out` to what the codes of plane i say."""
        name, fmt = self.name, self.coded()
        scale, zero = self._parameters(i, here)
        kernel.line(f"{name}_scale = {scale}")
        code = f"({self._code(i)}).to(tl.float32)"
        if isinstance(fmt, Lut):
            kernel.line(f"{name}_code = {self._code(i)}")
            code = f"{operand(fmt.operands, f'{name}_code')}.to(tl.float32)"
        if not isinstance(fmt, Int) or fmt.zero == "none":
            kernel.line(f"{out} = ({code} - {float(offset(fmt))}) * {name}_scale")
            return
        kernel.line(f"{name}_zero = {zero}")
        if fmt.zero == "int":
            kernel.line(f"{out} = ({code} - {name}_zero) * {name}_scale")
        else:
            kernel.line(f"{out} = {code} * {name}_scale + {name}_zero")

    def _code(self, i: int) -> str:
        """Return the codes of plane i, i32."""
        bits = code_bits(self.coded())
        if bits == 8:
            return f"{self.name}_codes"
        if bits != 3:
            return _bits(f"{self.name}_codes", bits * i, bits, last=i == self.part.planes - 1)
        # Two planes of an eighth lie behind one another in the bytes of the low two bits.
        low = _bits(f"{self.name}_codes_{i % 2}", i // 2 * 2, 2, last=i // 2 == 3)
        return f"{low} | ({_bits(f'{self.name}_high', i, 1, last=i == 7)} << 2)"

    def _parameters(self, i: int, here: str) -> tuple[str, str]:
        """Return scale and zero of plane i, f32, as [tokens, 1], [1, width] or [tokens, width]."""
        fmt = self.coded()
        if isinstance(fmt, Bfp):
            return as_scale(fmt, self._parameter("exponent", i, here)), ""
        is_lone = isinstance(fmt, Lut) or fmt.zero == "none"
        zero = "" if is_lone else as_f32(self._parameter("zero", i, here), fmt.params)
        return as_scale(fmt, self._parameter("scale", i, here)), zero

    def _parameter(self, name: str, i: int, here: str) -> str:
        """Return the stored parameters of plane i."""
        group = self.part.width // self.part.field(name).shape[1]
        first = i * self.part.plane
        if (first + self.part.plane - 1) // group == first // group:
            return f"{load(self.parameter_at(name, first // group), here)}[:, None]"
        column = f"{self.name}_w + {first}" if first else f"{self.name}_w"
        column = column if group == 1 else f"({column}) // {group}"
        column = f"(({column}) * {self.layout.tokens})" if self.is_turned(name) else f"({column})"
        pointer = self._at(name, down(f"({self.row(name)})"), across(column))
        return load(pointer, both(down(here), across(self.columns)))

    def is_turned(self, name: str) -> bool:
        """Return whether a field lies as [columns, tokens] in the page: `ir/arrangements.py`."""
        is_own = self.part.field(name).shape[0] == self.layout.tokens
        if name in CODES:
            return self.layout.kind == TURNED
        return self.layout.kind != ROWS and is_own

    def parameter_at(self, name: str, column: int) -> str:
        """Return the pointers to each token's number in a column of a field."""
        at = column * self.layout.tokens if self.is_turned(name) else column
        return self._at(name, self.row(name), at)

    def at(self, name: str, first: int) -> str:
        """Return the pointers to a field from column `first` on, [tokens, width]."""
        column = across(f"{self.name}_w") + (f" + {first}" if first else "")
        if self.is_turned(name):
            column = f"({column}) * {self.layout.tokens}"
        return self._at(name, down(f"({self.row(name)})"), column)

    def _block(self, name: str, first: int, here: str) -> str:
        """Return the elements of a field from column `first` on, [tokens, width]."""
        return load(self.at(name, first), both(down(here), across(self.columns)))

    def _at(self, name: str, row: str, column: str | int) -> str:
        start = f"{self.role}_{self.part.field(name).dtype} + {row}"
        return start if column == 0 else f"{start} + {column}"

    def row(self, name: str) -> str:
        """Return the index of the first element of each token's row, in elements of the field."""
        field, role = self.part.field(name), self.role
        size = np.dtype(field.dtype).itemsize
        tokens = self.layout.tokens // field.shape[0]
        index = f"{role}_t" if tokens == 1 else f"({role}_t // {tokens})"
        block = block_in(role, size)
        start = f"{block} + {field.offset // size}" if field.offset else block
        return f"{start} + {index}" + ("" if self.is_turned(name) else f" * {field.shape[1]}")

    def coded(self) -> Dense:
        """Return the format, one with codes."""
        return coded(self.part)


def coded(part: Part) -> Dense:
    """Return the format of a part, one with codes."""
    if isinstance(part.format, Raw | Drop):
        raise TypeError("the format has no codes")
    return part.format


def block_in(role: str, size: int) -> str:
    """Return where the head block begins, in numbers of `size` bytes."""
    # A shift: that it is never negative, the compiler does not know.
    return f"{role}_block" if size == 1 else f"({role}_block >> {size.bit_length() - 1})"


def readers_of(stream: StreamPlan, kind: str) -> tuple[PageReader, ...]:
    """Return the readers of a stream's channels, in storage order, from pages of a kind."""
    layout = replace(stream.page_layout(), kind=kind)
    return tuple(PageReader(stream, layout, part) for part in layout.parts)


def declare_pages(kernel: Kernel, stream: StreamPlan) -> None:
    """Declare the typed views of a stream's pages, and the table that names them."""
    for field in stream.page_layout().fields:
        kernel.array(f"{stream.role}_{field.dtype}", field.dtype)
    kernel.array(f"{stream.role}_table", "int64")
    kernel.scalar(f"{stream.role}_max_pages")


def as_scale(fmt: Dense, stored: str) -> str:
    """Return what a stored scale, or exponent, is, f32."""
    if not isinstance(fmt, Bfp):
        return as_f32(stored, fmt.params)
    power = f"({stored}.to(tl.int32) << 23).to(tl.float32, bitcast=True)"
    return f"{power} * {2.0 ** (2 - fmt.mantissa)}"


def operand(operands: tuple[int, ...], code: str) -> str:
    """Return the operands of codes, i32; `code` is a name."""
    word = chosen_word(
        operands, str, lambda bit, high, low: f"tl.where(({code} & {bit}) != 0, {high}, {low})"
    )
    return f"(({word} >> (({code} & 3) << 3)) & 255)"


def _bits(value: str, shift: int, bits: int, *, last: bool) -> str:
    """Return `bits` bits of a byte from bit `shift` on; nothing stands above the last ones."""
    shifted = f"({value} >> {shift})" if shift else value
    return shifted if last else f"({shifted} & {2**bits - 1})"


def tail_group(reader: PageReader, g: int, size: int) -> str:
    """Return what the tail holds of group g of `size` channels, f32 [tokens, padded(size)]."""
    first = reader.part.first + g * size
    column = f"(j + {first})[None, :]" if first else "j[None, :]"
    pointer = f"{reader.role}_tail + slot[:, None] * {reader.stream.channels} + {column}"
    inside = "" if padded(size) == size else f"(j < {size})[None, :]"
    return load(pointer, both("here[:, None]", inside))
