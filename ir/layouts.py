"""Page bytes: where the fields of one page lie, with pack and unpack.

A page holds `tokens` tokens of one row, layer and role. It is one block per head; a block is the
format's fields one after another, each at a multiple of 64 bytes, in this order:

    codes      8 bit  u8[P, C]      byte j: channel j
               4 bit  u8[P, C / 2]  byte j: channel j in the low nibble, j + C/2 in the high one
               2 bit  u8[P, C / 4]  bits 2i, 2i+1 of byte j: channel j + i C/4
               3 bit  the low two bits of the codes as for 2 bit, then
    high       3 bit  u8[P, C / 8]  bit i of byte j: bit 2 of channel j + i C/8
    scale zero        [P / gt, C / gc] in the array type of `params`
    exponent          u8[P, C / block]
    values            [P, C] of a raw format
    index value       u8[P, n] and [P, n] of sparse entries, after the fields of the dense format

Of slices, the fields of each one lie one after another, over its own channels, and are named with
its number: "0.codes", "0.scale", "1.codes".

Codes are split in chunks of channels and never interleaved, so that one mask gives neighbours.

That is the arrangement "rows"; `ir/arrangements.py` has two more of the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm, prod

import numpy as np

from .arrangements import KINDS, ROWS, holds, places
from .arrays import STORED, Array
from .encodings import Bfp, Dense, Drop, Format, Lut, Raw, SliceFormat, Slices, Sparse
from .encodings.raw import check_integer
from .encodings.slices import with_prefix
from .errors import KvantError
from .planes import code_bits, pack_codes, plane_widths, unpack_codes

ALIGN = 64


@dataclass(frozen=True, slots=True)
class Field:
    """One array of a head block.

    Attributes:
        name: "codes", "high", "scale", "zero", "exponent", "values", "index" or "value"; of slices,
            "1.codes".
        dtype: NumPy name: "uint8", "uint16" (bf16), "float16", "float32".
        shape: [rows, columns]; rows are tokens, or groups of tokens.
        offset: bytes from the start of the head block.
    """

    name: str
    dtype: str
    shape: tuple[int, int]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Part:
    """Channels of a head that are stored in one format: a slice, or all of them.

    Attributes:
        prefix: of the names of its fields in the page: "1." of slice 1, empty without slices.
        first: channel.
        width: channels.
        format: how they are stored; of a sparse one, its dense format.
        sparse: the sparse format, or None.
        fields: in a head block, named without the prefix; none where the channels are dropped.
    """

    prefix: str
    first: int
    width: int
    format: Raw | Dense | Drop
    sparse: Sparse | None
    fields: tuple[Field, ...]

    @property
    def planes(self) -> int:
        """Chunks of channels that share a byte; 3-bit codes have eight, of which pairs share."""
        if isinstance(self.format, Raw | Drop):
            return 1
        return 8 if code_bits(self.format) == 3 else 8 // code_bits(self.format)

    @property
    def plane(self) -> int:
        """Channels of a chunk."""
        return self.width // self.planes

    def field(self, name: str) -> Field:
        """Return a field by its name without the prefix."""
        return next(field for field in self.fields if field.name == name)


def page_tokens(fmt: Format) -> int:
    """Return the tokens of a page: 64, or the least multiple of 64 and the format's group."""
    return lcm(64, fmt.group_tokens)


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The bytes of one page.

    Attributes:
        tokens: tokens of a page, whole groups.
        heads: KV heads.
        channels: channels of a head.
        format: how values are encoded.
        kind: name of the arrangement, one of KINDS.
        fields: the arrays of a head block, in order; they follow from the others.
        head_bytes: bytes of a head block, a multiple of 64.
    """

    tokens: int
    heads: int
    channels: int
    format: Format
    kind: str = ROWS
    fields: tuple[Field, ...] = dataclasses.field(init=False, repr=False, compare=False)
    head_bytes: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse sizes that the format or the arrangement does not take."""
        where = "page layout"
        for name in ("tokens", "heads", "channels"):
            check_integer(where, name, getattr(self, name), 1)
        if self.kind not in KINDS:
            raise KvantError(
                "unknown-layout",
                f"no layout {self.kind!r}",
                where=where,
                fix=f"use: {', '.join(KINDS)}",
            )
        self.format.check(self.channels, where)
        group = self.format.group_tokens
        if self.tokens % group:
            raise KvantError(
                "group-does-not-divide",
                f"groups of {group} tokens do not divide pages of {self.tokens}",
                where=where,
                fix=f"use pages of {page_tokens(self.format)} tokens",
            )
        fields = _fields(self)
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "head_bytes", _aligned(fields[-1].offset + fields[-1].nbytes))
        if self.kind != ROWS and not holds(self.kind, self.format, self.tokens, self.channels):
            raise KvantError(
                "unknown-layout",
                f"no {self.kind} of {self.format} in {self.channels} channels",
                where=where,
                fix="use rows",
            )

    @property
    def parts(self) -> tuple[Part, ...]:
        """The slices of a head, in storage order; one part without slices."""
        fields = {field.name: field for field in self.fields}
        parts, first = [], 0
        for prefix, width, fmt in _slices(self.format, self.channels):
            own = tuple(
                replace(field, name=name.removeprefix(prefix))
                for name, field in fields.items()
                if name.startswith(prefix)
            )
            sparse = fmt if isinstance(fmt, Sparse) else None
            dense = fmt.dense if isinstance(fmt, Sparse) else fmt
            parts.append(Part(prefix, first, width, dense, sparse, own))
            first += width
        return tuple(parts)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.heads * self.head_bytes

    def pack(self, fields: Mapping[str, Array]) -> Array:
        """Return a page, uint8[page_bytes], of fields [H, P, ...] as the format's `encode` gives.

        Bytes between fields are zero. Raises: KvantError if the fields are not one whole page.
        """
        page = np.zeros(self.page_bytes, dtype=np.uint8)
        self.write(page, 0, fields)
        return page

    def unpack(self, page: Array) -> dict[str, Array]:
        """Return the fields [..., H, P, ...] of pages uint8[..., page_bytes]."""
        return self.read(page, 0, self.tokens)

    def write(self, page: Array, first_token: int, fields: Mapping[str, Array]) -> None:
        """Write whole groups of tokens into a page, from `first_token` of the page on.

        Args:
            page: uint8[page_bytes], writable; bytes of other tokens keep their values.
            first_token: a multiple of the group.
            fields: of n tokens, [H, n, ...]; n is a multiple of the group.

        Raises: KvantError if the tokens do not fit or a field is missing or has another shape.
        """
        planes = _to_planes(self.format, fields)
        count = self._token_count(planes)
        self._check_tokens(first_token, count)
        for field in self.fields:
            view = self._view(page, field)
            places = self._places(field)[self._rows(field, first_token, count)]
            shape = (*view.shape[:-1], *places.shape)
            if planes[field.name].shape != shape:
                raise KvantError(
                    "field-shape",
                    f"field {field.name} has shape {planes[field.name].shape}",
                    where="page layout",
                    fix=f"pass shape {shape}",
                )
            view[..., places] = planes[field.name]

    def read(self, page: Array, first_token: int, count: int) -> dict[str, Array]:
        """Return a copy of the fields [..., H, count, ...] of pages uint8[..., page_bytes]."""
        self._check_tokens(first_token, count)
        planes = {
            field.name: self._view(page, field)[
                ..., self._places(field)[self._rows(field, first_token, count)]
            ]
            for field in self.fields
        }
        return _from_planes(self.format, planes)

    def arranged(self, pages: Array, kind: str) -> Array:
        """Return pages uint8[..., page_bytes] in another arrangement: a copy, if it is another."""
        if kind == self.kind:
            return pages
        other = replace(self, kind=kind)
        copy = np.zeros_like(pages)
        for field in self.fields:
            elements = self._view(pages, field)[..., self._places(field)]
            other._view(copy, field)[..., other._places(field)] = elements
        return copy

    def _view(self, page: Array, field: Field) -> Array:
        """Return a field of pages uint8[..., page_bytes] as [..., H, elements], no copy."""
        if page.dtype != np.uint8 or page.shape[-1] != self.page_bytes:
            raise KvantError(
                "field-shape",
                f"a page of type {page.dtype} and shape {page.shape}",
                where="page layout",
                fix=f"pass uint8 [..., {self.page_bytes}]",
            )
        blocks = page.reshape(*page.shape[:-1], self.heads, self.head_bytes)
        return blocks[..., field.offset : field.offset + field.nbytes].view(field.dtype)

    def _places(self, field: Field) -> Array:
        return places(self.kind, self.tokens, field.name.rpartition(".")[2], *field.shape)

    def _rows(self, field: Field, first_token: int, count: int) -> slice:
        tokens_per_row = self.tokens // field.shape[0]
        return slice(first_token // tokens_per_row, (first_token + count) // tokens_per_row)

    def _token_count(self, planes: Mapping[str, Array]) -> int:
        missing = {field.name for field in self.fields} - set(planes)
        if missing:
            raise KvantError(
                "field-shape",
                f"no field {', '.join(sorted(missing))}",
                where="page layout",
                fix="pass the fields that the format's encode gives",
            )
        return int(planes[self.fields[0].name].shape[-2])

    def _check_tokens(self, first_token: int, count: int) -> None:
        group = self.format.group_tokens
        inside = 0 <= first_token and 0 <= count and first_token + count <= self.tokens
        if not inside or first_token % group or count % group:
            raise KvantError(
                "page-range",
                f"tokens {first_token}..{first_token + count} of a page of {self.tokens}",
                where="page layout",
                fix=f"pass whole groups of {group} tokens inside the page",
            )


@lru_cache(maxsize=256)
def _fields(layout: PageLayout) -> tuple[Field, ...]:
    """Return the fields with their offsets."""
    offset, fields = 0, []
    for prefix, width, fmt in _slices(layout.format, layout.channels):
        for name, dtype, shape in _arrays(fmt, layout.tokens, width):
            field = Field(prefix + name, dtype.name, shape, offset)
            offset = _aligned(offset + field.nbytes)
            fields.append(field)
    return tuple(fields)


def _slices(fmt: Format, channels: int) -> list[tuple[str, int, SliceFormat]]:
    """Return (prefix of the names of fields, channels, format) of each slice."""
    if not isinstance(fmt, Slices):
        return [("", channels, fmt)]
    return [(f"{i}.", part.width, part.format) for i, part in enumerate(fmt.slices)]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def _arrays(
    fmt: SliceFormat, rows: int, channels: int
) -> list[tuple[str, np.dtype[np.generic], tuple[int, int]]]:
    """Return (name, type, shape) of each field of a format."""
    byte = np.dtype(np.uint8)
    if isinstance(fmt, Drop):
        return []
    if isinstance(fmt, Raw):
        return [("values", STORED[fmt.dtype], (rows, channels))]
    if isinstance(fmt, Sparse):
        shape = (rows, fmt.count)
        entries = [("index", byte, shape), ("value", STORED[fmt.values], shape)]
        return _arrays(fmt.dense, rows, channels) + entries
    arrays = [(name, byte, (rows, width)) for name, width in plane_widths(fmt, channels)]
    shape = (rows // fmt.group_tokens, channels // fmt.group_channels)
    if isinstance(fmt, Bfp):
        return [*arrays, ("exponent", byte, shape)]
    names = ("scale",) if isinstance(fmt, Lut) or fmt.zero == "none" else ("scale", "zero")
    return [*arrays, *((name, STORED[fmt.params], shape) for name in names)]


def _to_planes(fmt: Format, fields: Mapping[str, Array]) -> dict[str, Array]:
    """Return the fields with codes packed to planes."""
    return _each_slice(fmt, fields, pack_codes)


def _from_planes(fmt: Format, planes: Mapping[str, Array]) -> dict[str, Array]:
    """Return the planes as fields with one code a byte."""
    return _each_slice(fmt, planes, unpack_codes)


def _each_slice(
    fmt: Format,
    arrays: Mapping[str, Array],
    step: Callable[[Dense, dict[str, Array]], dict[str, Array]],
) -> dict[str, Array]:
    """Return the arrays of all slices, after `step(format, arrays)` where a slice has codes."""
    done: dict[str, Array] = {}
    for prefix, _, part in _slices(fmt, 0):
        own = with_prefix(prefix, arrays)
        dense = part.dense if isinstance(part, Sparse) else part
        if isinstance(dense, Dense) and "codes" in own:
            own = step(dense, own)
        done |= {prefix + name: array for name, array in own.items()}
    return done
