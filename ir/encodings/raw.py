"""Raw storage: bf16, f16 or f32; and the checks that all encodings share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import STORED, Array, FloatName, from_stored, to_stored
from ..errors import KvantError

FLOAT_NAMES: tuple[str, ...] = tuple(STORED)


def check_choice(where: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a field value that is not one of the allowed words."""
    if value not in allowed:
        raise KvantError(
            "bad-encoding",
            f"{name} is {value!r}",
            where=where,
            fix=f"use one of: {', '.join(allowed)}",
        )


def check_integer(where: str, name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse a field value that is not an integer of [low, high]."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):  # type: ignore[operator]
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise KvantError(
            "bad-encoding",
            f"{name} is {value!r}",
            where=where,
            fix=f"use an integer {limits}",
        )


def check_divides(where: str, group: int, size: int, axis: str) -> None:
    """Refuse a group that does not divide an axis; name the groups that do."""
    if size % group:
        legal = [d for d in range(1, size + 1) if size % d == 0]
        raise KvantError(
            "group-does-not-divide",
            f"groups of {group} do not divide {size} {axis}",
            where=where,
            fix=f"use one of: {', '.join(str(d) for d in legal)}",
        )


def stored_finite(x: Array, dtype: str, name: str, where: str) -> tuple[Array, Array]:
    """Round x to a stored number type and refuse what does not fit.

    Returns: the stored array, and its values in float64.
    Raises: KvantError("not-finite") for NaN; KvantError("scale-overflow") where rounding gives Inf.
    """
    stored = to_stored(x, dtype)
    values = from_stored(stored, dtype)
    if not np.isfinite(values).all():
        if np.isnan(x).any():
            raise KvantError(
                "not-finite",
                "the values to encode contain NaN",
                where=where,
                fix="find where the model makes NaN; nothing was stored",
            )
        raise KvantError(
            "scale-overflow",
            f"a {name} of {np.max(np.abs(x)):.6g} does not fit {dtype}",
            where=where,
            fix="store it as bf16 or f32, or rotate or scale the channels first",
        )
    return stored, values


@dataclass(frozen=True, slots=True)
class Raw:
    """Values as they are, rounded to `dtype`.

    Field of `encode`: "values" [..., T, C] in the array type of `dtype` (bf16 as its uint16 bits).
    """

    dtype: FloatName

    def __post_init__(self) -> None:
        """Refuse an unknown number type."""
        check_choice("raw", "dtype", self.dtype, FLOAT_NAMES)

    @property
    def group_tokens(self) -> int:
        """Tokens that are encoded together: one."""
        return 1

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return STORED[self.dtype].itemsize

    def check(self, channels: int, where: str) -> None:
        """Accept any number of channels from one on."""
        check_integer(where, "channels", channels, 1)

    def encode(self, x: Array) -> dict[str, Array]:
        """Return {"values"} of x [..., T, C].

        Raises: KvantError("not-finite" or "scale-overflow") for what `dtype` cannot hold.
        """
        return {"values": stored_finite(x, self.dtype, "value", self.dtype)[0]}

    def decode(self, fields: Mapping[str, Array]) -> Array:
        """Return the values in float64, [..., T, C]."""
        return from_stored(fields["values"], self.dtype)

    def roundtrip(self, x: Array) -> Array:
        """Return what reading gives after storing x."""
        return self.decode(self.encode(x))
