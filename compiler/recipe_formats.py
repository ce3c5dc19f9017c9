"""The formats of a recipe as tables: of a whole stream, or of a slice of its channels.

`recipe.py` adds a window to a format and has a stream; here `[[k.slice]]` and `[[v.slice]]` add a
number of channels, and `sparse` adds entries for outliers.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from ..ir.encodings import (
    Bfp,
    Dense,
    Drop,
    Int,
    Lut,
    Raw,
    Slice,
    SliceFormat,
    Slices,
    Sparse,
    Term,
)
from ..ir.encodings.lut import LLOYD, MOST_SIGMAS, NF4
from ..ir.encodings.slices import SLICE_CHANNELS
from ..ir.errors import KvantError
from .extras import need

try:
    from pydantic import BaseModel, ConfigDict, Field
except ModuleNotFoundError:
    need("pydantic")
    raise

FloatWord = Literal["f16", "bf16", "f32"]


class Table(BaseModel):
    """A table of a recipe: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class SparseTable(Table):
    """Entries for the outliers of each token, beside the dense format."""

    count: int = Field(ge=1)
    limit: float = Field(default=0.0, ge=0.0)
    values: FloatWord = "f16"

    def bind(self, dense: Dense) -> Sparse:
        """Return the format with the entries."""
        return Sparse(dense, self.count, self.limit, self.values)


class RawTable(Table):
    """Numbers kept in a floating-point dtype."""

    format: FloatWord

    def bind(self, channels: int, where: str) -> Term:
        """Return the format for `channels` channels."""
        return Raw(self.format)


class IntTable(Table):
    """Affine integers; `group` is a number, or a word for all channels at hand."""

    format: Literal["int"]
    bits: int = Field(ge=1, le=8)
    axis: Literal["token", "channel"]
    group: int | str
    zero: Literal["none", "int", "float"] = "float"
    params: FloatWord = "f16"
    clip: float = Field(default=1.0, gt=0.0, le=1.0)
    sparse: SparseTable | None = None

    def bind(self, channels: int, where: str) -> Term:
        """Return the format for `channels` channels."""
        group = channels if isinstance(self.group, str) else self.group
        dense = Int(self.bits, self.axis, group, self.zero, self.params, self.clip)
        return dense if self.sparse is None else self.sparse.bind(dense)


class BfpTable(Table):
    """Block floating point along the channels."""

    format: Literal["bfp"]
    mantissa: int = Field(ge=2, le=8)
    block: int | str
    sparse: SparseTable | None = None

    def bind(self, channels: int, where: str) -> Term:
        """Return the format for `channels` channels."""
        dense = Bfp(self.mantissa, channels if isinstance(self.block, str) else self.block)
        return dense if self.sparse is None else self.sparse.bind(dense)


class LutTable(Table):
    """Codes into a table of integers, given by name or as it is."""

    format: Literal["lut"]
    bits: int = Field(ge=2, le=4)
    group: int | str
    table: Literal["nf4", "lloyd"] | tuple[int, ...]
    sigmas: float | None = Field(default=None, gt=0.0, le=MOST_SIGMAS)
    params: FloatWord = "f16"
    sparse: SparseTable | None = None

    def bind(self, channels: int, where: str) -> Term:
        """Return the format for `channels` channels.

        Raises: KvantError("bad-encoding") for a table that does not fit the bits.
        """
        group = channels if isinstance(self.group, str) else self.group
        table, sigmas = self.table, self.sigmas
        if table == "lloyd":
            table, own = LLOYD[self.bits]
            sigmas = own if sigmas is None else sigmas
        dense = Lut(self.bits, group, NF4 if table == "nf4" else table, sigmas, self.params)
        return dense if self.sparse is None else self.sparse.bind(dense)


class _Channels(Table):
    channels: int | Literal["rest"]


class RawSlice(RawTable, _Channels):
    """A slice of raw numbers."""


class IntSlice(IntTable, _Channels):
    """A slice of integers; `group = "slice"` means one group over the whole slice."""

    group: int | Literal["slice"]


class BfpSlice(BfpTable, _Channels):
    """A slice of block floating point; `block = "slice"` means one block over the whole slice."""

    block: int | Literal["slice"]


class LutSlice(LutTable, _Channels):
    """A slice of codes into a table; `group = "slice"` means one group over the whole slice."""

    group: int | Literal["slice"]


class DropSlice(_Channels):
    """Channels that are not stored at all; they are read as zeros."""

    format: Literal["drop"]

    def bind(self, channels: int, where: str) -> SliceFormat:
        """Return the format of a slice of any size."""
        return Drop()


AnySlice = Annotated[
    RawSlice | IntSlice | BfpSlice | LutSlice | DropSlice, Field(discriminator="format")
]
SLICES: dict[str, type[BaseModel]] = {"int": IntSlice, "bfp": BfpSlice, "lut": LutSlice}
SLICES["drop"] = DropSlice
SLICES |= dict.fromkeys(("bf16", "f16", "f32"), RawSlice)


def bind_slices(tables: Sequence[AnySlice], channels: int, where: str) -> Slices:
    """Return the slices of heads of `channels` channels; at most one takes the rest.

    Raises: KvantError("slices-do-not-fit") for a slice without channels, or if two take the rest;
        what the formats raise.
    """
    widths = [None if table.channels == "rest" else int(table.channels) for table in tables]
    rest = channels - sum(width for width in widths if width is not None)
    chosen = [rest if width is None else width for width in widths]
    if widths.count(None) > 1 or min(chosen) < 1:
        raise KvantError(
            "slices-do-not-fit",
            f"slices of {' + '.join(str(table.channels) for table in tables)} channels do not make "
            f"up a head of {channels}",
            where=where,
            fix=f"use multiples of {SLICE_CHANNELS} channels that sum to {channels}; one slice may "
            'take the "rest"',
        )
    formats = [table.bind(width, where) for table, width in zip(tables, chosen, strict=True)]
    return Slices(tuple(Slice(width, fmt) for width, fmt in zip(chosen, formats, strict=True)))
