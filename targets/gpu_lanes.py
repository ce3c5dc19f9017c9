"""Whole tiles on AMD's machines: four heads as rows, and a lane for each token or each channel.

The matrix products of `gpu_whole.py` have at least 16 columns there, of which a group of four heads
fills a quarter. AMD has one of 4 rows and 64 columns besides, 4x4x4 in 16 blocks: a lane then holds
one token of the keys, or one column of bytes of the values, and all of its numbers of the other
axis. So nothing passes through shared memory on its way to a product, and what belongs to a token
is one number a lane.

    keys        a lane loads the row of its token, in portions of 16 bytes
    values      pages hold their codes turned around (`ir/arrangements.py`): a lane loads a column
    narrow      columns of fewer than 64 bytes are loaded by several lanes, each of which unpacks
                some of the planes: its codes are moved to the lowest bits first
    three bits  third bits are loaded beside the others (`gpu_gcn_triples.py`)

Where the channels of a product have several scales, its queries are masked, or its sums are picked
lane by lane, so that no code meets a scale. The arithmetic is that of `gpu_whole.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd

import numpy as np

from ..ir.arrangements import TILES, TURNED
from ..ir.encodings import Bfp, Drop, Int, Lut
from ..ir.layouts import Part
from ..ir.plan import AttentionPlan, StreamPlan
from ..ir.planes import code_bits, low_bits
from .gpu_gcn import BYTES, HALVES, Planes
from .gpu_gcn_triples import ABOVE, Triples
from .gpu_pages import PageReader, as_scale, readers_of
from .gpu_text import as_f32, padded

LANES = 64
"""Columns of a product, which is tokens of a tile: a wave."""
MOST_HEADS = 8
"""Heads of a group: for more of them, products of 16 rows and 16 columns are fewer."""
PORTION = 8
"""Half-words of 16 bytes, the most that a lane loads at once."""


@dataclass(frozen=True)
class Row:
    """Bytes that a lane loads: of keys a row of its token, of values a column.

    Attributes:
        name: what they are bound to.
        field: of the page.
        first: byte of a token that it begins with.
    """

    name: str
    field: str
    first: int = 0


@dataclass(frozen=True)
class Unpacked:
    """One call of what unpacks planes.

    Attributes:
        sequence: what is called.
        operands: as text.
        planes: that come out.
    """

    sequence: Planes | Triples
    operands: str
    planes: range


@dataclass(frozen=True)
class Keys:
    """One part of the keys.

    Attributes:
        reader: of the part.
        is_exact: whether products are with bytes of q.
    """

    reader: PageReader
    is_exact: bool

    @property
    def name(self) -> str:
        """Prefix of its names."""
        return self.reader.name

    @property
    def row(self) -> int:
        """Bytes of a plane of a token: all of its bytes, but where codes have three bits."""
        return self.reader.part.plane

    @property
    def portion(self) -> int:
        """Half-words that are loaded at once."""
        return gcd(self.row // 2, PORTION)

    @property
    def portions(self) -> int:
        """How many are loaded: the last one again where they are no power of two."""
        return padded(self.row // 2 // self.portion)

    @property
    def wide(self) -> int:
        """Bytes of such a row in a lane."""
        return 2 * self.portion * self.portions

    @property
    def joined(self) -> int:
        """Planes that are the terms of one product: it takes 64 at least."""
        return max(1, LANES // self.wide)

    @property
    def products(self) -> range:
        """Numbers of the products."""
        return range(-(-self.reader.part.planes // self.joined))

    @property
    def terms(self) -> int:
        """Terms of a product."""
        return self.wide * self.joined

    @property
    def rows(self) -> tuple[Row, ...]:
        """What is loaded of a token."""
        if not has_thirds(self.reader):
            return (Row(f"{self.name}_words", "codes"),)
        low = (Row(f"{self.name}_words_{half}", "codes", half * self.row) for half in (0, 1))
        return (*low, Row(f"{self.name}_high", "high"))

    @property
    def unpacked(self) -> tuple[Unpacked, ...]:
        """What unpacks all planes."""
        kind, names = BYTES if self.is_exact else HALVES, [row.name for row in self.rows]
        if not has_thirds(self.reader):
            planes = self.reader.part.planes
            sequence = planes_of(self.reader, kind, planes)
            return (Unpacked(sequence, names[0], range(planes)),)
        return tuple(
            Unpacked(Triples(kind, 4, half), f"{names[half]}, {names[2]}", range(half, 8, 2))
            for half in (0, 1)
        )

    def planes(self, product: int) -> tuple[int, ...]:
        """Return the planes of a product; where they are too few, the last one again."""
        last = self.reader.part.planes - 1
        return tuple(min(product * self.joined + i, last) for i in range(self.joined))

    def channels(self, product: int, each: int = 1) -> str:
        """Return the channels of the head that belong to terms, as a vector of every `each`."""
        return self._term(product, each, self.reader.part.first)

    def inside(self, product: int) -> str:
        """Return the mask of the terms that are channels, or "" if all are."""
        k, left = f"tl.arange(0, {self.terms})", self.reader.part.planes - product * self.joined
        byte = f"{k} % {self.wide}" if self.joined > 1 else k
        found = [f"({byte} < {self.row})"] if self.wide > self.row else []
        if left < self.joined:
            found.append(f"({k} // {self.wide} < {left})")
        return " & ".join(found)

    def scales(self, product: int) -> tuple[int, ...]:
        """Return the numbers of the scales of a token that a product's channels have."""
        group, part = self.reader.coded().group_channels, self.reader.part
        if group == 1:
            return (0,)
        first = product * self.joined * part.plane
        end = min(first + self.joined * part.plane, part.width)
        return tuple(range(first // group, (end - 1) // group + 1))

    def scale_is(self, product: int, scale: int) -> str:
        """Return the mask of the terms with a scale, or "" if all have it."""
        if len(self.scales(product)) == 1:
            return ""
        return f"(({self._term(product, 1, 0)}) // {self.reader.coded().group_channels} == {scale})"

    @property
    def all_scales(self) -> tuple[int, ...]:
        """Numbers of the scales of a token."""
        return tuple(sorted({scale for i in self.products for scale in self.scales(i)}))

    def raised(self, product: int, each: int = 1) -> str:
        """Return 2^(bits below a term's plane), f32, of every `each` term, or "" if all are 1."""
        first, bits = product * self.joined, low_bits(self.reader.coded())
        shared = 2 if has_thirds(self.reader) else 1
        if self.joined == 1:
            below = first // shared * bits
            return repr(2.0**below) if below else ""
        plane = f"tl.arange(0, {self.terms // each}) // {self.wide // each}"
        plane = f"({plane} + {first})" + (f" // {shared}" if shared > 1 else "")
        power = f"((127 + {bits} * ({plane})) << 23)"
        return f"{power}.to(tl.float32, bitcast=True)[None, :]"

    def _term(self, product: int, each: int, more: int) -> str:
        """Return the channel of each term, counted from -`more`."""
        plane, wide = self.reader.part.plane, self.wide // each
        first = more + product * self.joined * plane
        k = f"tl.arange(0, {self.terms // each})"
        channel = f"{each} * {k}" if each > 1 else k
        if self.joined > 1:
            byte = f"{each} * ({k} % {wide})" if each > 1 else f"{k} % {wide}"
            channel = f"{k} // {wide} * {plane} + {byte}"
        return f"{channel} + {first}" if first else channel


@dataclass(frozen=True)
class Values:
    """One part of the values.

    Attributes:
        reader: of the part.
    """

    reader: PageReader

    @property
    def name(self) -> str:
        """Prefix of its names."""
        return self.reader.name

    @property
    def row(self) -> int:
        """Byte columns."""
        return self.reader.part.field("codes").shape[1]

    @property
    def wide(self) -> int:
        """Columns of the product."""
        return max(LANES, padded(self.row))

    @property
    def shares(self) -> int:
        """Lanes that share a column, each with every so manyth plane; tables unpack all at once."""
        if isinstance(self.reader.coded(), Lut):
            return 1
        return min(self._planes, self.wide // padded(self.row))

    @property
    def planes(self) -> int:
        """Planes that a lane unpacks."""
        return self._planes // self.shares

    @property
    def _planes(self) -> int:
        """Planes of a column of the field of codes."""
        return 8 // low_bits(self.reader.coded())

    @property
    def sequence(self) -> Planes | Triples:
        """What unpacks them."""
        if has_thirds(self.reader):
            return Triples(HALVES, self.planes)
        return planes_of(self.reader, HALVES, self.planes, moved=self.shares > 1)

    @property
    def columns(self) -> tuple[Row, ...]:
        """What a lane loads: two columns share one of third bits."""
        words, high = Row(f"{self.name}_words", "codes"), Row(f"{self.name}_high", "high")
        return (words, high) if has_thirds(self.reader) else (words,)

    @property
    def column(self) -> str:
        """The column of each lane; where there are too few, the last one again."""
        inside = f"tl.arange(0, {self.wide})"
        if self.wide > padded(self.row):
            inside = f"{inside} % {padded(self.row)}"
        return inside if padded(self.row) == self.row else f"tl.minimum({inside}, {self.row - 1})"

    @property
    def moves(self) -> dict[str, str]:
        """By how many bits each lane moves what it loads, by the name of the operand."""
        lane = f"tl.arange(0, {self.wide}) // {padded(self.row)}"
        # Lanes beyond the last share do what the first one does.
        share = lane if self.shares * padded(self.row) == self.wide else f"{lane} % {self.shares}"
        found = {"by": f"{share} * {low_bits(self.reader.coded())}"} if self.shares > 1 else {}
        if not has_thirds(self.reader):
            return found
        down = f"{self.name}_column // {self.row // 2} + {32 - ABOVE}"
        own = f"{found['by']} + " if found else ""
        return {"turn": f"({own}{down}) % 32", **found}

    def channels(self, plane: int) -> str:
        """Return the channel of the head of each lane."""
        share = f"tl.arange(0, {self.wide}) // {padded(self.row)}"
        first = self.reader.part.first + plane * self.shares * self.row
        channel = f"{self.name}_column"
        if self.shares > 1:
            channel = f"{share} * {self.row} + {channel}"
        return f"{channel} + {first}" if first else channel

    @property
    def inside(self) -> str:
        """Mask of the lanes that have channels of their own, or "" if all have."""
        lane, wide = f"tl.arange(0, {self.wide})", padded(self.row)
        found = []
        if wide > self.row:
            found.append(f"({lane} % {wide} < {self.row})")
        if self.shares * wide < self.wide:
            found.append(f"({lane} < {self.shares * wide})")
        return " & ".join(found)

    def scales(self, plane: int) -> tuple[int, ...]:
        """Return the numbers of the scales of a token that the lanes of a plane have."""
        group = self.reader.coded().group_channels
        if group == 1:
            return (0,)
        planes = np.arange(self.shares)[:, None] + plane * self.shares
        channels = planes * self.row + np.arange(self.row)
        return tuple(int(x) for x in np.unique(channels // group))

    def scale_of(self, plane: int) -> str:
        """Return the number of the scale of each lane."""
        first = self.reader.part.first
        channel = f"{self.channels(plane)} - {first}" if first else self.channels(plane)
        return f"({channel}) // {self.reader.coded().group_channels}"

    def unit(self, plane: int) -> float:
        """Return what a code of 1 is worth in a product."""
        return 2.0 ** (plane * self.sequence.apart - 24)

    @property
    def all_scales(self) -> tuple[int, ...]:
        """Numbers of the scales of a token."""
        return tuple(sorted({scale for i in range(self.planes) for scale in self.scales(i)}))


def is_wide(plan: AttentionPlan) -> bool:
    """Return whether a plan in tiles is read so: no sparse entries."""
    if plan.group > MOST_HEADS:
        return False
    parts = (*plan.k.page_layout().parts, *plan.v.page_layout().parts)
    return all(_is_wide(part) for part in parts if not isinstance(part.format, Drop))


def _is_wide(part: Part) -> bool:
    """Return whether a lane unpacks a part: its rows, and columns, are whole half-words."""
    return part.sparse is None and part.plane % 2 == 0


def keys_of(plan: AttentionPlan) -> tuple[Keys, ...]:
    """Return the parts of the keys that pages hold."""
    readers = readers_of(plan.k, TILES)
    return tuple(
        Keys(reader, plan.query_bits is not None) for reader in readers if reader.is_stored
    )


def values_of(stream: StreamPlan) -> tuple[Values, ...]:
    """Return the parts of the values that pages hold."""
    return tuple(Values(reader) for reader in readers_of(stream, TURNED) if reader.is_stored)


def has_thirds(reader: PageReader) -> bool:
    """Return whether the third bits of codes lie in a field of their own."""
    return code_bits(reader.coded()) == 3


def planes_of(reader: PageReader, kind: str, planes: int, *, moved: bool = False) -> Planes:
    """Return what unpacks some planes of a reader."""
    fmt = reader.coded()
    return Planes(kind, code_bits(fmt), planes, moved, fmt.operands if isinstance(fmt, Lut) else ())


@dataclass(frozen=True)
class Stored:
    """A number that each token of a tile has, as a lane loads it: in a word with its neighbours.

    Attributes:
        reader: of the part.
        field: "scale", "zero" or "exponent".
        scale: number of the column of the field.
    """

    reader: PageReader
    field: str
    scale: int

    @property
    def name(self) -> str:
        """Name of the word."""
        return f"{self.reader.name}_{self.field}_{self.scale}_word"

    @cached_property
    def size(self) -> int:
        """Bytes of a number."""
        return np.dtype(self.reader.part.field(self.field).dtype).itemsize

    def load(self, inside: str) -> str:
        """Return the load of the words, i32 [tokens]; `inside` is the tile's first token or ""."""
        reader, role = self.reader, self.reader.role
        offset = (
            reader.part.field(self.field).offset + self.scale * reader.layout.tokens * self.size
        )
        token = f"({inside} + t)" if inside else "t"
        index = token if self.size == 4 else f"{token} // {4 // self.size}"
        return f"tl.load({role}_int32 + {role}_block // 4 + {offset // 4} + {index})"

    @property
    def number(self) -> str:
        """The numbers, f32 [tokens]."""
        fmt, word = self.reader.coded(), self.name
        dtype = self.reader.part.field(self.field).dtype
        bits = f"({word} >> t % {4 // self.size} * {8 * self.size})" if self.size < 4 else word
        stored = {
            "uint8": f"({bits} & 255)",
            "uint16": bits,
            "float16": f"{bits}.to(tl.int16).to(tl.float16, bitcast=True)",
            "float32": f"{bits}.to(tl.float32, bitcast=True)",
        }[dtype]
        if self.field != "zero":
            return as_scale(fmt, stored)
        return as_f32(stored, fmt.params if isinstance(fmt, Int) else "f32")


def scale_in(reader: PageReader, scale: int) -> Stored:
    """Return where a scale, or exponent, of each token is."""
    return Stored(reader, "exponent" if isinstance(reader.coded(), Bfp) else "scale", scale)
