"""Blocks of a tile of 64 tokens, and the operands of matrix products that they give.

A block is a column of bytes of a tile: it is loaded once and gives one operand for each cell,
which is a plane of the block's bytes, or of every second of them:

    bytes     an operand of i8: cell i holds bits i b, i b + 1, ... of each byte
    halves    an operand of f16, unpacked from half-words: cell (i, p) holds them of byte 2 w + p
    tables    operands of i8, as byte permutations look them up: see `Looked`

A cell's channels share one scale a token. Queries and outputs are cut in the same cells, so nothing
is ever interleaved. What is multiplied, and what it is rounded to, says `ir/halves.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from ..ir.encodings import Lut
from ..ir.layouts import ALIGN, Field, Part
from ..ir.plan import AttentionPlan, StreamPlan
from ..ir.planes import code_bits, low_bits
from .gpu_lookups import Entries, EntriesApart
from .gpu_pages import PageReader, block_in, coded, readers_of
from .gpu_sequences import STEP, Sequence, Triples
from .gpu_text import Kernel, across, load, padded

NEAR_BYTES = 64
"""Rows up to here: compilers see which addresses differ by a constant, if they are one sum of 32
bits beside the page. Of longer rows, beside slices, or where a tile is read in parts, they do not,
and that sum takes more."""
LEAST_BYTES = 32
"""Bytes of a token in a block: the least terms of a product of i8, and twice 16 for halves."""


@dataclass(frozen=True, slots=True)
class Block:
    """A column of bytes of a tile.

    Attributes:
        reader: of the whole part.
        first: byte of a token's row.
        width: bytes of a token.
        halves: whether it is read as half-words.
        near: whether addresses are sums of 32 bits, where rows are short; see NEAR_BYTES.
    """

    reader: PageReader
    first: int
    width: int
    halves: bool
    near: bool

    @property
    def name(self) -> str:
        """Name of the loaded operand."""
        return f"{self.reader.name}_b{self.first}"

    @property
    def bits(self) -> int:
        """Bits of a code that a byte holds; the third of three lies in a field of its own."""
        return low_bits(self.reader.coded())

    @property
    def plane(self) -> int:
        """Bytes of a plane."""
        return plane_bytes(self.reader.part)

    @property
    def wide(self) -> int:
        """Numbers of a token in the operand: bytes or half-words, padded."""
        size = 2 if self.halves else 1
        return padded(self.width // size, LEAST_BYTES // size)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The operands that the block gives."""
        if isinstance(self.unpacker, EntriesApart):
            groups = [Cell(self, i, 0).group for i in range(2)]
            planes = (None,) if groups[0] == groups[1] else (0, 1)
            return tuple(Looked(self, i or 0, p, i is None) for p in range(2) for i in planes)
        parities = range(2 if self.halves else 1)
        return tuple(Cell(self, i, p) for p in parities for i in range(8 // self.bits))

    def load(self, *, down: bool) -> str:
        """Return the load of the block: tokens down and bytes across, or the other way round."""
        return self._load("codes", self.first, f"tl.arange(0, {self.wide})", down=down)

    def load_high(self, *, down: bool) -> str:
        """Return the load of the third bits of the block's codes: two planes share a byte."""
        size = 2 if self.halves else 1
        first, columns = self.first // size, f"tl.arange(0, {self.wide})"
        columns = f"({columns} + {first})" if first else columns
        return self._load("high", 0, f"({columns} % {self.plane // 2 // size})", down=down)

    def write_factors(self, kernel: Kernel, plan: AttentionPlan) -> None:
        """Bind <block>_factor, what brings the third bit of each column above the low ones."""
        size, kind = (2, "int16") if self.halves else (1, "int8")
        columns = f"tl.arange(0, {self.wide})"
        first = self.plane // 2 // size - self.first // size
        factors = f"tl.where({columns} < {first}, 4.0, 2.0)"
        write_by_memory(kernel, plan, f"{self.name}_factor", factors, self.wide, kind)

    def _load(self, name: str, first: int, columns: str, *, down: bool) -> str:
        role, part = self.reader.role, self.reader.part
        size, kind = (2, "int16") if self.halves else (1, "int8")
        field = part.field(name)
        tokens, bytes_ = ("[:, None]", "[None, :]") if down else ("[None, :]", "[:, None]")
        inside = self.width // size
        mask = f"(tl.arange(0, {self.wide}) < {inside}){bytes_}" if inside < self.wide else ""
        row = field.shape[1]
        is_near = self.near and row <= NEAR_BYTES
        if name == "codes" and self.halves and is_near:
            at = self._near_halves(field, f"{role}_t{tokens}", f"{columns}{bytes_}", down=down)
            return load(at, mask)
        offset, block = (field.offset + first) // size, block_in(role, size)
        start = f"{role}_{kind} + {block}" + (f" + {offset}" if offset else "")
        at = f"{role}_t{tokens} * {row // size} + {columns}{bytes_}"
        return load(f"{start} + ({at})" if is_near else f"{start} + {at}", mask)

    def _near_halves(self, field: Field, tokens: str, columns: str, *, down: bool) -> str:
        """Return pointers to the half-words of the block's codes, counted in bytes.

        Of twice a number compilers do not see which sums differ by a constant. Triton is told of
        the pointers what it does not see.
        """
        role, row, offset = self.reader.role, field.shape[1], field.offset + self.first
        start = f"{role}_uint8 + {role}_block" + (f" + {offset}" if offset else "")
        at = f"({start} + ({tokens} * {row} + 2 * {columns})).to(tl.pointer_type(tl.int16))"
        hints = ((self.wide, gcd(row, offset, ALIGN)), (1, 1))
        many, multiple = zip(*(reversed(hints) if down else hints), strict=True)
        return f"tl.multiple_of(tl.max_contiguous({at}, {many}), {multiple})"

    @property
    def unpacker(self) -> Entries | EntriesApart | Triples | None:
        """What unpacks all cells at once: entries of a table, or codes of three bits."""
        fmt, lanes = self.reader.coded(), 16 if self.halves else 8
        if isinstance(fmt, Lut):
            return (Entries if self.halves else EntriesApart)(fmt.operands)
        return Triples(lanes) if code_bits(fmt) == 3 else None

    @property
    def unpacked(self) -> tuple[str, ...]:
        """Names of the operands that `unpacker` gives, in their order."""
        names = (name for cell in self.cells for name in cell.operands)
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class Cell:
    """One plane of a block, or of every second byte of it.

    Attributes:
        block: what is loaded.
        plane: i.
        parity: 0, or 1 for the odd bytes.
    """

    block: Block
    plane: int
    parity: int

    @property
    def step(self) -> int:
        """From one byte that is read to the next."""
        return 2 if self.block.halves else 1

    @property
    def start(self) -> int:
        """The first byte that is read."""
        return self.block.first + self.parity

    @property
    def first_channel(self) -> int:
        """Channel of the head that the first byte of a row has in this plane."""
        return self.block.reader.part.first + self.plane * self.block.plane

    @property
    def channels(self) -> str:
        """The channels of the head, as a vector."""
        first = self.first_channel + self.start
        numbers = f"tl.arange(0, {self.block.wide})"
        channels = f"{self.step} * {numbers}" if self.step > 1 else numbers
        return f"{channels} + {first}" if first else channels

    @property
    def stored(self) -> str:
        """Where gpu_prepare puts the queries of these channels, as a vector."""
        first = self.first_channel + self.block.first + self.parity * (self.block.width // 2)
        numbers = f"tl.arange(0, {self.block.wide})"
        return f"{numbers} + {first}" if first else numbers

    @property
    def inside(self) -> str:
        """Mask of the numbers of the operand that are channels, or "" if all are."""
        count = self.block.width // self.step
        return "" if count == self.block.wide else f"(tl.arange(0, {self.block.wide}) < {count})"

    @property
    def name(self) -> str:
        """Name of what belongs to the cell."""
        return f"{self.block.name}_{self.plane}" + (f"_{self.parity}" if self.block.halves else "")

    @property
    def out(self) -> str:
        """Name of the sums of values."""
        return f"{self.name}_out"

    @property
    def group(self) -> int:
        """Number of the scale of a token that the cell's channels share."""
        fmt = self.block.reader.coded()
        first = self.plane * self.block.plane + self.block.first
        return 0 if fmt.group_channels == 1 else first // fmt.group_channels

    @property
    def lift(self) -> int:
        """The bit of a byte in which codes begin."""
        return self.plane * self.block.bits

    @property
    def _shift(self) -> int:
        """Bits that codes are moved down: no more than must be, for units cost nothing."""
        if self.block.halves:
            return 8 * self.parity
        return 4 if 4 <= self.lift else 0

    @property
    def below(self) -> tuple[Cell, ...]:
        """The cells whose codes the operand holds too, in bits that were not masked out.

        Only of values, whose sums can be told apart when all is summed, with the same scale.
        """
        reader = self.block.reader
        is_lone = self.block.unpacker is not None or reader.role == "k" or reader.part.sparse
        if is_lone or self.lift + self.block.bits < 8:
            return ()
        below = tuple(Cell(self.block, i, self.parity) for i in range(self.plane))
        return below if all(cell.group == self.group for cell in below) else ()

    @property
    def sequence(self) -> Sequence | Entries | EntriesApart | Triples:
        """What unpacks it from the block."""
        if self.block.unpacker is not None:
            return self.block.unpacker
        own = ((1 << self.block.bits) - 1) << self.lift
        if self.block.halves:
            return Sequence(16, self._shift, 255 if self.below else own)
        mask = own >> self._shift
        return Sequence(8, self._shift, mask, flip=mask & 128)

    @property
    def centre(self) -> int:
        """The code that is zero in the operand: bytes are signed."""
        sequence = self.sequence
        return sequence.flip if isinstance(sequence, Sequence) else 0

    @property
    def unit(self) -> float:
        """What a code of 1, or an entry, is worth in the operand."""
        step = STEP if self.block.halves else 1.0
        if isinstance(self.block.unpacker, Entries | EntriesApart):
            return step
        down = 0 if self.block.halves else self._shift
        return step * 2.0 ** (self.lift - down)

    @property
    def operand(self) -> str:
        """The operand, unpacked from the block, or a name if all of it is unpacked at once."""
        if isinstance(self.sequence, Sequence):
            return f"{self.sequence.name}({self.block.name})"
        return self.name

    @property
    def operands(self) -> tuple[str, ...]:
        """What the queries or weights of the cell are multiplied with: products add up."""
        return (self.operand,)


@dataclass(frozen=True, slots=True)
class Looked(Cell):
    """Every second pair of bytes of a block, both planes, with the entries of a table.

    Number 4 w + 2 b + i of a token is plane i of byte 4 w + 2 p + b, p being the parity. Where
    planes have scales of their own each has a cell, and queries of the other's channels are zero.
    Which channels its numbers are is told by `stored`, not by `channels`.

    Attributes:
        whole: whether both planes share a scale.
    """

    whole: bool

    @property
    def stored(self) -> str:
        """Where gpu_prepare puts the queries of these channels, as a vector."""
        first = self.block.reader.part.first + 2 * self.block.first
        first += looked_first(self.block.width) * self.parity
        numbers = f"tl.arange(0, {self.block.wide})"
        return f"{numbers} + {first}" if first else numbers

    @property
    def inside(self) -> str:
        """Mask of the numbers that are channels of the cell, or "" if all are."""
        numbers, first = f"tl.arange(0, {self.block.wide})", looked_first(self.block.width)
        count = 2 * self.block.width - first if self.parity else first
        own = "" if self.whole else f"({numbers} % 2 == {self.plane})"
        here = "" if count == self.block.wide else f"({numbers} < {count})"
        return f"({own} & {here})" if own and here else own or here

    @property
    def name(self) -> str:
        """Name of what belongs to the cell."""
        return f"{self.block.name}_{self.parity}" + ("" if self.whole else f"_{self.plane}")

    @property
    def operands(self) -> tuple[str, ...]:
        """Entries of codes below 8, and of those from 8 on."""
        half = f"{self.block.name}_{self.parity}"
        return f"{half}_low", f"{half}_high"


def blocks_of(
    stream: StreamPlan, kind: str, *, halves: bool, words: bool = False, near: bool = False
) -> tuple[Block, ...]:
    """Return the blocks of a stream in tiles: as wide as a scale and a plane allow.

    Args:
        stream: the plan.
        kind: of the pages.
        halves: whether they are read as half-words.
        words: whether numbers of tokens that take two bytes are read from words.
        near: whether addresses are sums of 32 bits, where rows are short.
    """
    found = []
    for reader in (replace(reader, words=words) for reader in readers_of(stream, kind)):
        if not reader.is_stored:
            continue
        plane, width = plane_bytes(reader.part), block_bytes(reader.part)
        found += [Block(reader, first, width, halves, near) for first in range(0, plane, width)]
    return tuple(found)


def block_bytes(part: Part) -> int:
    """Return the bytes of a block: of a plane, or of a scale that has fewer channels."""
    plane, group = plane_bytes(part), coded(part).group_channels
    return plane if group == 1 else gcd(plane, group)


def plane_bytes(part: Part) -> int:
    """Return the bytes of a plane of the field of codes."""
    return part.width * low_bits(coded(part)) // 8


def looked_first(width: int) -> int:
    """Return how many codes the first two bytes of each word of a block's row hold, of `width`."""
    return width + width % 4


def groups_of(blocks: tuple[Block, ...]) -> list[tuple[PageReader, int, tuple[Cell, ...]]]:
    """Return (reader of the part, number of the scale, cells) of all cells, by their scale."""
    found: dict[tuple[str, int], tuple[PageReader, list[Cell]]] = {}
    for block in blocks:
        for cell in block.cells:
            key = block.reader.name, cell.group
            found.setdefault(key, (block.reader, []))[1].append(cell)
    return [(reader, group, tuple(cells)) for (_, group), (reader, cells) in found.items()]


def write_block(kernel: Kernel, block: Block, *, down: bool) -> None:
    """Load a block, and unpack its cells where that is done at once."""
    kernel.line(f"{block.name} = {block.load(down=down)}")
    if block.unpacker is None:
        return
    given = block.name
    if isinstance(block.unpacker, Triples):
        kernel.line(f"{block.name}_high = {block.load_high(down=down)}")
        factor = across(f"{block.name}_factor") if down else f"{block.name}_factor[:, None]"
        given += f", {block.name}_high, {factor}"
    kernel.line(f"{', '.join(block.unpacked)} = {block.unpacker.name}({given})")


def write_by_memory(
    kernel: Kernel, plan: AttentionPlan, name: str, values: str, count: int, kind: str
) -> None:
    """Bind a name to computed numbers, f32 [count], by way of this program's part of the results.

    Where another operand than a load meets codes, Triton does not unpack them in the order that
    matrix units take.
    """
    at = f"part_out + (bh * parts + split) * rows * {plan.v.channels} + tl.arange(0, {count})"
    kernel.line(f"tl.store({at}, {values})")
    kernel.line("tl.debug_barrier()")
    kernel.line(f"{name} = tl.load({at}).to(tl.{kind})")
    kernel.line("tl.debug_barrier()")
