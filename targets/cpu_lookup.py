"""Looking up codes in a table of `Lut`: as bytes by one instruction, or as numbers by shifts.

An operand is a table's entry plus OFFSET, an unsigned byte. For integer dot products a vector of
codes is the index of a byte shuffle, which every processor of `machines.py` has, and the table is
the register that it picks from. Elsewhere codes are lanes of 32 bits: four operands are a word,
and an operand is the word of its code, shifted by eight times the last two bits of the code.
"""

from __future__ import annotations

from .cpu_text import bits_as, cast, pure, splat
from .kernel_text import chosen_word
from .machines import Cpu

X86_SHUFFLES = {
    16: "llvm.x86.ssse3.pshuf.b.128",
    32: "llvm.x86.avx2.pshuf.b",
    64: "llvm.x86.avx512.pshuf.b.512",
}
NEON_SHUFFLE = "llvm.aarch64.neon.tbl1.v16i8"
# Bytes that a shuffle picks from.
TABLE = 16


def shuffled(cpu: Cpu, operands: tuple[int, ...], codes: str, lanes: int) -> str:
    """Return the operands of codes, bytes; `lanes` are 16, 32 or 64."""
    table = bytes(operands) * (TABLE // len(operands))
    halves = [int.from_bytes(table[i : i + 8], "little") for i in (0, 8)]
    pair = ", ".join(splat(f"T.int64({half})", lanes // 8) for half in halves)
    # On x86 each 16 bytes have a table of their own.
    order = [i % 2 * (lanes // 8) for i in range(lanes // 8)]
    register = bits_as("uint8", f"T.Shuffle([{pair}], {order})", lanes)
    if not cpu.dots.startswith("neon"):
        return pure(X86_SHUFFLES[lanes], "uint8", lanes, register, codes)
    return pure(NEON_SHUFFLE, "uint8", lanes, register, codes)


def operand(operands: tuple[int, ...], code: str, lanes: int) -> str:
    """Return the operands of codes, i32; codes are i32 too."""
    word = chosen_word(
        operands,
        lambda number: splat(f"T.uint32({number})", lanes),
        lambda bit, high, low: f"T.Select({_bit(code, bit, lanes)}, {high}, {low})",
    )
    last = f"T.bitwise_and({code}, {splat('T.int32(3)', lanes)})"
    shift = cast("uint32", f"T.shift_left({last}, {splat('T.int32(3)', lanes)})", lanes)
    byte = f"T.bitwise_and(T.shift_right({word}, {shift}), {splat('T.uint32(255)', lanes)})"
    return cast("int32", byte, lanes)


def _bit(code: str, bit: int, lanes: int) -> str:
    """Return whether codes have a bit, one by one."""
    masked = f"T.bitwise_and({code}, {splat(f'T.int32({bit})', lanes)})"
    return f"{masked} != {splat('T.int32(0)', lanes)}"
