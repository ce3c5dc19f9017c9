"""The tables [[k.slice]] and [[v.slice]] of a recipe: some channels, and how they are stored."""

from collections.abc import Sequence
from typing import Annotated, Literal

from ..ir.encodings import Bfp, Drop, Int, Raw, Slice, Slices
from ..ir.encodings.slices import SLICE_CHANNELS, SliceFormat
from ..ir.errors import KvantError
from .extras import need

try:
    from pydantic import BaseModel, ConfigDict, Field
except ModuleNotFoundError:
    need("pydantic")
    raise


class Table(BaseModel):
    """A table of a recipe: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class _Channels(Table):
    channels: int | Literal["rest"]


class RawSlice(_Channels):
    """Channels kept in a floating-point dtype."""

    format: Literal["bf16", "f16", "f32"]

    def bind(self, channels: int) -> SliceFormat:
        """Return the format of a slice of `channels` channels."""
        return Raw(self.format)


class IntSlice(_Channels):
    """Affine integers; `group = "slice"` means one group over the whole slice."""

    format: Literal["int"]
    bits: int = Field(ge=1, le=8)
    axis: Literal["token", "channel"]
    group: int | Literal["slice"]
    zero: Literal["none", "int", "float"] = "float"
    params: Literal["f16", "bf16", "f32"] = "f16"
    clip: float = Field(default=1.0, gt=0.0, le=1.0)

    def bind(self, channels: int) -> SliceFormat:
        """Return the format of a slice of `channels` channels."""
        group = channels if self.group == "slice" else int(self.group)
        return Int(self.bits, self.axis, group, self.zero, self.params, self.clip)


class BfpSlice(_Channels):
    """Block floating point along the channels."""

    format: Literal["bfp"]
    mantissa: int = Field(ge=2, le=8)
    block: int | Literal["slice"]

    def bind(self, channels: int) -> SliceFormat:
        """Return the format of a slice of `channels` channels."""
        return Bfp(self.mantissa, channels if self.block == "slice" else int(self.block))


class DropSlice(_Channels):
    """Channels that are not stored at all; they are read as zeros."""

    format: Literal["drop"]

    def bind(self, channels: int) -> SliceFormat:
        """Return the format of a slice of any size."""
        return Drop()


AnySlice = Annotated[RawSlice | IntSlice | BfpSlice | DropSlice, Field(discriminator="format")]
SLICES: dict[str, type[BaseModel]] = {"int": IntSlice, "bfp": BfpSlice, "drop": DropSlice}
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
    formats = [table.bind(width) for table, width in zip(tables, chosen, strict=True)]
    return Slices(tuple(Slice(width, fmt) for width, fmt in zip(chosen, formats, strict=True)))
