"""Which streams of a plan the matrix units read as they are stored, and in which blocks.

A block is a column of bytes of a tile of 64 tokens: it is loaded once and gives one operand for
each cell, which is a plane of the block's bytes, or of every second of them:

    bytes     an operand of i8: cell i holds bits i b, i b + 1, ... of each byte
    halves    an operand of f16, unpacked from half-words: cell (i, p) holds them of byte 2 w + p

A cell's channels share one scale a token. Queries and outputs are cut in the same cells, so nothing
is ever interleaved. What is multiplied, and what it is rounded to, says `ir/halves.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from ..ir.arrangements import ROWS, TILES
from ..ir.encodings import Bfp, Drop, Int, Lut, Raw
from ..ir.halves import TILE, middle
from ..ir.layouts import Part
from ..ir.plan import AttentionPlan, StreamPlan
from ..ir.planes import code_bits
from .gpu_pages import PageReader, as_scale, readers_of
from .gpu_sequences import STEP, Entries, Sequence
from .gpu_text import Kernel, as_f32, load, padded

LEAST_TOKENS = 32
"""Tokens of a step of the loop over whole tiles, at least."""
LEAST_BYTES = 32
"""Bytes of a token in a block: the least terms of a product of i8, and twice 16 for halves."""


def kinds(plan: AttentionPlan) -> tuple[str, str]:
    """Return the arrangements of the pages of k and v: tiles if the matrix units read both."""
    is_tiled = why_floats(plan) is None
    return (TILES, TILES) if is_tiled else (ROWS, ROWS)


def step_tokens(plan: AttentionPlan) -> int:
    """Return N, the tokens of a step of the loop: those of a tile, or half as many.

    All of them share the scales of channels.
    """
    groups = [part.format.group_tokens for part in plan.k.page_layout().parts]
    return min([TILE, *(gcd(TILE, group) for group in groups if group > 1)])


def why_floats(plan: AttentionPlan) -> str | None:
    """Return None if whole tiles are multiplied as they are stored, or one sentence why not."""
    if plan.compute != "int":
        return "the recipe says compute = float"
    if plan.k.tokens.sink != plan.v.tokens.sink:
        return "keys and values keep different numbers of first tokens raw"
    for stream in (plan.k, plan.v):
        for part in stream.page_layout().parts:
            reason = _why_not(plan, stream.role, part)
            if reason:
                return f"{'keys' if stream.role == 'k' else 'values'}: {reason}"
    return None


def _why_not(plan: AttentionPlan, role: str, part: Part) -> str | None:
    """Return why the matrix units do not read a slice as it is stored, or None."""
    fmt = part.format
    if isinstance(fmt, Drop):
        return None
    if isinstance(fmt, Raw):
        return "raw formats are read in floats"
    if part.sparse is not None:
        return "sparse entries are added in floats"
    if code_bits(fmt) == 3 or (isinstance(fmt, Lut) and fmt.bits != 4):
        return "no sequence unpacks the codes"
    if isinstance(fmt, Int) and fmt.axis == "channel":
        if role == "v":
            return "scales of channels"
        if code_bits(fmt) == 8 or fmt.params != "f16" or fmt.group_tokens % LEAST_TOKENS:
            return "scales of channels take codes of up to 4 bits, f16, and groups of 32 tokens"
    elif role == "k" and plan.query_bits is None:
        return "slices of keys need scales of channels"
    return None


@dataclass(frozen=True, slots=True)
class Block:
    """A column of bytes of a tile.

    Attributes:
        reader: of the whole part.
        first: byte of a token's row.
        width: bytes of a token.
        halves: whether it is read as half-words.
    """

    reader: PageReader
    first: int
    width: int
    halves: bool

    @property
    def name(self) -> str:
        """Name of the loaded operand."""
        return f"{self.reader.name}_b{self.first}"

    @property
    def wide(self) -> int:
        """Numbers of a token in the operand: bytes or half-words, padded."""
        size = 2 if self.halves else 1
        return padded(self.width // size, LEAST_BYTES // size)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The operands that the block gives."""
        planes, parities = self.reader.part.planes, range(2 if self.halves else 1)
        return tuple(Cell(self, i, p) for p in parities for i in range(planes))

    def load(self, *, down: bool) -> str:
        """Return the load of the block: tokens down and bytes across, or the other way round."""
        role, part = self.reader.role, self.reader.part
        size, kind = (2, "int16") if self.halves else (1, "int8")
        field = part.field("codes")
        row, offset = field.shape[1] // size, (field.offset + self.first) // size
        block = f"{role}_block // 2" if self.halves else f"{role}_block"
        tokens, bytes_ = ("[:, None]", "[None, :]") if down else ("[None, :]", "[:, None]")
        columns = f"tl.arange(0, {self.wide})"
        start = f"{role}_{kind} + {block}" + (f" + {offset}" if offset else "")
        at = f"{start} + {role}_t{tokens} * {row} + {columns}{bytes_}"
        inside = self.width // size
        mask = "" if inside == self.wide else f", mask=({columns} < {inside}){bytes_}, other=0"
        return f"tl.load({at}{mask})"

    @property
    def entries(self) -> Entries | None:
        """What unpacks all cells at once, where codes name entries of a table."""
        fmt = self.reader.coded()
        return Entries(16 if self.halves else 8, fmt.operands) if isinstance(fmt, Lut) else None


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
        part = self.block.reader.part
        return part.first + self.plane * part.plane

    @property
    def channels(self) -> str:
        """The channels of the head, as a vector."""
        first = self.first_channel + self.start
        numbers = f"tl.arange(0, {self.block.wide})"
        channels = f"{self.step} * {numbers}" if self.step > 1 else numbers
        return f"{channels} + {first}" if first else channels

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
        first = self.plane * self.block.reader.part.plane + self.block.first
        return 0 if fmt.group_channels == 1 else first // fmt.group_channels

    @property
    def sequence(self) -> Sequence | Entries:
        """What unpacks it from the block."""
        if self.block.entries is not None:
            return self.block.entries
        bits = code_bits(self.block.reader.coded())
        at, mask = self.plane * bits, (1 << bits) - 1
        if self.block.halves:
            return Sequence(16, 8 * self.parity, mask << at)
        return Sequence(8, at, mask)

    @property
    def unit(self) -> float:
        """What a code of 1, or an entry, is worth in the operand."""
        if not self.block.halves:
            return 1.0
        bits = 0 if self.block.entries else code_bits(self.block.reader.coded())
        return STEP * 2.0 ** (self.plane * bits)

    @property
    def operand(self) -> str:
        """The operand, unpacked from the block; entries of tables have been."""
        if isinstance(self.sequence, Entries):
            return self.name
        is_whole = self.sequence.lanes == 8 and self.sequence.mask == 255
        return self.block.name if is_whole else f"{self.sequence.name}({self.block.name})"


def blocks_of(stream: StreamPlan, kind: str, *, halves: bool) -> tuple[Block, ...]:
    """Return the blocks of a stream in tiles: as wide as a scale and a plane allow.

    Args:
        stream: the plan.
        kind: of the pages.
        halves: whether they are read as half-words.
    """
    found = []
    for reader in readers_of(stream, kind):
        if not reader.is_stored:
            continue
        fmt, plane = reader.coded(), reader.part.plane
        width = plane if fmt.group_channels == 1 else gcd(plane, fmt.group_channels)
        found += [Block(reader, first, width, halves) for first in range(0, plane, width)]
    return tuple(found)


def per_channel(reader: PageReader) -> bool:
    """Return whether scales belong to channels."""
    fmt = reader.coded()
    return isinstance(fmt, Int) and fmt.axis == "channel"


def groups_of(blocks: tuple[Block, ...]) -> list[tuple[PageReader, int, tuple[Cell, ...]]]:
    """Return (reader of the part, number of the scale, cells) of all cells, by their scale."""
    found: dict[tuple[str, int], tuple[PageReader, list[Cell]]] = {}
    for block in blocks:
        for cell in block.cells:
            key = block.reader.name, cell.group
            found.setdefault(key, (block.reader, []))[1].append(cell)
    return [(reader, group, tuple(cells)) for (_, group), (reader, cells) in found.items()]


def middle_of(reader: PageReader) -> int:
    """Return the code from which a reader's codes are counted."""
    return middle(reader.coded())


def has_zero(reader: PageReader) -> bool:
    """Return whether a format stores zero points."""
    fmt = reader.coded()
    return isinstance(fmt, Int) and fmt.zero != "none"


def scale_of(reader: PageReader, group: int) -> str:
    """Return the scales of a tile's tokens, f32 [N]."""
    name = "exponent" if isinstance(reader.coded(), Bfp) else "scale"
    return as_scale(reader.coded(), load(reader.parameter_at(name, group)))


def zero_of(reader: PageReader, group: int) -> str:
    """Return the zero points of a tile's tokens, f32 [N]."""
    return as_f32(load(reader.parameter_at("zero", group)), affine(reader).params)


def write_block(kernel: Kernel, block: Block, *, down: bool) -> None:
    """Load a block, and unpack the cells of a table."""
    kernel.line(f"{block.name} = {block.load(down=down)}")
    if block.entries is not None:
        names = [cell.name for cell in block.cells]
        kernel.line(f"{', '.join(names)} = {block.entries.name}({block.name})")


def affine(reader: PageReader) -> Int:
    """Return the format of a reader, one with zero points."""
    fmt = reader.coded()
    if not isinstance(fmt, Int):
        raise TypeError("the format has no zero points")
    return fmt
