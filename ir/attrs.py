"""What an attribute may be, and the table of the structured ones.

A structured attribute is a frozen dataclass that checks itself; the text form is
`tag(field = value, ...)`. Adding one: its class in a module of its own, one line here.
"""

from .encodings import Bfp, Drop, Int, Lut, Raw, Slice, Slices, Sparse, Tokens
from .maps import Gather, Hadamard, Map, Scale

Record = Raw | Int | Bfp | Lut | Sparse | Drop | Slice | Slices | Tokens | Map
AttrValue = bool | int | float | str | None | Record | tuple["AttrValue", ...]

ATTRS: dict[str, type[Record]] = {
    "raw": Raw,
    "int": Int,
    "bfp": Bfp,
    "lut": Lut,
    "sparse": Sparse,
    "drop": Drop,
    "slice": Slice,
    "slices": Slices,
    "tokens": Tokens,
    "hadamard": Hadamard,
    "gather": Gather,
    "scale": Scale,
}
