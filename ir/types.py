"""The types of values: tensors with symbolic sizes, and caches."""

import re
from dataclasses import dataclass

from .errors import KvantError

Dim = int | str  # a str is a symbolic size: "B", "T", "S", or a sum such as "S+T"

DTYPES = ("f64", "f32", "f16", "bf16", "i64", "i32", "i8", "u8", "bool")
_DIM = re.compile(r"[A-Za-z_]\w*(\+[A-Za-z_0-9]\w*)*")


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor: element type and sizes, printed as `f32[B, 3, T, 64]`.

    Raises: KvantError ("bad-type") for an unknown dtype or a size that is no size.
    """

    dtype: str
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            _refuse(f"no dtype {self.dtype!r}", str(self), "use one of: " + " ".join(DTYPES))
        for dim in self.shape:
            if not (_DIM.fullmatch(dim) if isinstance(dim, str) else type(dim) is int and dim >= 0):
                _refuse(f"{dim!r} is no size", str(self), "use an int >= 0, a name, or a sum")

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class CacheType:
    """The declared state of one role of a layer: all tokens so far. Printed as `cache[k]`."""

    role: str

    def __str__(self) -> str:
        return f"cache[{self.role}]"


Type = TensorType | CacheType


def add_sizes(a: Dim, b: Dim) -> Dim:
    """Return the size a + b; symbolic if one of them is (`S` and `T` give `S+T`)."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if a == 0 or b == 0:
        return b if a == 0 else a
    return f"{a}+{b}"


def _refuse(what: str, where: str, fix: str) -> None:
    raise KvantError("bad-type", what, where=where, fix=fix)
