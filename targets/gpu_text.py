"""Text of a kernel in Triton: lines with indentation, arguments, and the idioms used.

Everything is text so that the emitted source can be read, dumped and kept as a golden. All offsets
are 64-bit: they start from a 64-bit head or row. Blocks of Triton have powers of two as sizes;
where a size is none, the block is larger and a mask leaves out the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .kernel_text import LARGEST_F32, KernelText

# How Triton calls the number types of NumPy.
TYPES = {
    "int8": "i8",
    "uint8": "u8",
    "int16": "i16",
    "uint16": "u16",
    "int32": "i32",
    "int64": "i64",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
}
# Exponentials are powers of two.
LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453
LARGEST = repr(LARGEST_F32)
WARPS = 4
LEAST_DOT = 16
"""The least rows, columns and terms of a product of matrices."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the machines of one maker take a kernel.

    Attributes:
        form: of short sequences of instructions; see `gpu_sequences.py`.
        precision: of products of float32, as Triton calls it.
        threads: of a warp.
        period: rows of a product's results after which a thread's own rows begin again.
        has_bytes: whether four bytes in a register can be unpacked at once.
        least_rows: the least queries of a matrix product, where they are its columns.
        stages: tiles on their way at once.
        rest: tokens that are multiplied at once where tiles are not whole.
        lanes: whether heads are rows of whole tiles, four at least; see `gpu_lanes.py`.
        new: tokens of one program of append, where each stands for itself.
        elements: numbers that one program of append encodes, near so many where it can.
        float_max: whether a warp finds its largest float32 in one instruction, as it does integers.
    """

    form: str
    precision: str
    threads: int
    period: int
    has_bytes: bool
    least_rows: int
    stages: int
    rest: int = 16
    new: int = 4
    elements: int = 1024
    lanes: bool = False
    float_max: bool = False


@dataclass(slots=True)
class Kernel(KernelText):
    """One kernel in Triton while it is written.

    Attributes:
        warps: of a block.
        registers: of a thread at most, or None to leave it to the compiler.
        facts: what launch.json says of it besides.
    """

    warps: int = WARPS
    registers: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def signature(self) -> dict[str, str]:
        """Return the arguments as Triton's compiler reads them."""
        arrays = {name: f"*{TYPES[dtype]}" for name, dtype in self.buffers}
        return arrays | dict.fromkeys(self.scalars, "i64")

    def source(self) -> str:
        """Return the whole function."""
        names = [name for name, _ in self.buffers] + self.scalars
        head = ["@triton.jit", f"def {self.name}(", *(f"    {name}," for name in names), "):"]
        return "\n".join(head + self.lines) + "\n"


def padded(size: int, least: int = 1) -> int:
    """Return the least power of two that holds `size` and `least`."""
    return 1 << (max(size, least) - 1).bit_length()


def load(pointer: str, mask: str = "") -> str:
    """Return a load; where the mask is false it gives 0 and touches no memory."""
    return f"tl.load({pointer}, mask={mask}, other=0)" if mask else f"tl.load({pointer})"


def both(*masks: str) -> str:
    """Return the conjunction of masks; an empty one is true."""
    kept = [mask for mask in masks if mask]
    return " & ".join(kept) if len(kept) < 2 else " & ".join(f"({mask})" for mask in kept)


def down(name: str) -> str:
    """Return a vector along the rows of a block."""
    return f"{name}[:, None]" if name else ""


def across(name: str) -> str:
    """Return a vector along the columns of a block."""
    return f"{name}[None, :]" if name else ""


def as_f32(stored: str, dtype: str) -> str:
    """Return a stored f16, bf16 (as its bits) or f32 as f32; exact."""
    if dtype == "bf16":
        return f"({stored}.to(tl.int32) << 16).to(tl.float32, bitcast=True)"
    return stored if dtype == "f32" else f"{stored}.to(tl.float32)"


def write_bf16_bits(kernel: Kernel, value: str) -> None:
    """Bind `bits` to the bfloat16 bits of an f32, to nearest even, i32. A NaN may wrap around."""
    kernel.line(f"bits = {value}.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF")
    kernel.line("bits = ((bits + 32767 + ((bits >> 16) & 1)) >> 16).to(tl.int32)")


def number(value: float) -> str:
    """Return a constant."""
    return f'float("{value!r}")' if value in (float("inf"), float("-inf")) else repr(value)


def write_rint(kernel: Kernel, name: str) -> None:
    """Round an f64 to the nearest integer, ties to even: adding 1.5 2^52 leaves no place for more.

    Exact for |x| < 2^51.
    """
    kernel.line(f"{name} = ({name} + 6755399441055744.0) - 6755399441055744.0")


def write_stored(kernel: Kernel, value: str, dtype: str) -> None:
    """Bind `stored` to an f64 rounded once to its stored type, and `single` to that as f32."""
    if dtype == "f16":
        # NOTE: by way of f32 it would be rounded twice; cut there, and mark what was cut.
        kernel.line(f"bits = {value}.to(tl.int64, bitcast=True)")
        kernel.line("odd = tl.where((bits & 536870911) != 0, 536870912, 0)")
        kernel.line("bits = (bits & -536870912) | odd")
        kernel.line("stored = bits.to(tl.float64, bitcast=True).to(tl.float32).to(tl.float16)")
    elif dtype == "bf16":
        write_bf16_bits(kernel, f"{value}.to(tl.float32)")
        kernel.line("stored = bits.to(tl.uint16)")
    else:
        kernel.line(f"stored = {value}.to(tl.float32)")
    kernel.line(f"single = {as_f32('stored', dtype)}")


def narrow(single: str, dtype: str) -> str:
    """Return an f32 as its stored type, which holds it exactly."""
    if dtype == "bf16":
        return f"({single}.to(tl.int32, bitcast=True) >> 16).to(tl.uint16)"
    return single if dtype == "f32" else f"{single}.to(tl.float16)"


def write_flag(kernel: Kernel) -> None:
    """Set `flag` where a stored number, `single`, is not finite; what is masked out is zero."""
    kernel.line(f"wrong = tl.where(tl.abs(single) <= {LARGEST}, 0, 1)")
    kernel.line("tl.store(flag + 0 * wrong, 1, mask=wrong > 0)")


def write_softcap(kernel: Kernel, cap: float) -> None:
    """Replace `score` by cap tanh(score / cap): a series below 0.3, else by the exponential."""
    kernel.note("softcap: cap tanh(score / cap)")
    kernel.line(f"y = score * {1.0 / cap!r}")
    kernel.line("z = y * y")
    series = "-0.008863235529902197"
    for term in (0.021869488536155203, -0.05396825396825397, 0.13333333333333333, -1.0 / 3.0):
        series = f"({series} * z + {term!r})"
    kernel.line(f"near = y + y * z * {series}")
    kernel.line("size = tl.minimum(tl.abs(y), 20.0)")
    kernel.line("far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)")
    kernel.line("far = tl.where(y < 0.0, -far, far)")
    kernel.line(f"score = {cap!r} * tl.where(size < 0.3, near, far)")
