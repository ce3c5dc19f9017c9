"""Dot products of quads: four codes times four integers, summed into a lane of 32 bits.

    codes of up to 4 bits, integers of 8      pairs   pmaddubsw, a few sums of 16 bits, pmaddwd
                                              vnni    vpdpbusd
                                              neon    sdot, usdot
    operands of tables, integers of 8         pairs   pmaddubsw, pmaddwd at once; else as above
    codes of 8 bits, integers of 16           pairs   pmaddwd on even and odd codes
                                              vnni    vpdpwssd on even and odd codes
                                              neon    four products of 32 bits

A quad of integers is one 32-bit word in every lane (of 16 bits: two words, of the even and of the
odd ones). Where the instruction takes a word from memory for all lanes it is read as it is;
elsewhere it is laid out in all lanes beforehand, so that it is an operand in memory there too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir.arrangements import QUAD
from ..ir.encodings import Dense, Lut
from ..ir.planes import code_bits
from .cpu_lookup import shuffled
from .cpu_text import Kernel, at, bits_as, cast, pure, splat
from .machines import Cpu

BYTE_PAIRS = {
    16: "llvm.x86.ssse3.pmadd.ub.sw.128",
    32: "llvm.x86.avx2.pmadd.ub.sw",
    64: "llvm.x86.avx512.pmaddubs.w.512",
}
WORD_PAIRS = {
    16: "llvm.x86.sse2.pmadd.wd",
    32: "llvm.x86.avx2.pmadd.wd",
    64: "llvm.x86.avx512.pmaddw.d.512",
}
NEON = {"neon": "llvm.aarch64.neon.sdot", "neon-i8mm": "llvm.aarch64.neon.usdot"}

# Numbers 0, 1, 2, 3 of a quad of 16-bit integers lie in this order: even ones, odd ones.
EVEN_ODD = (0, 2, 1, 3)
# Products that are written out one after another; a loop of more takes long to compile.
MOST_WRITTEN_OUT = 128

# Writes acc i += codes times a word of integers; arguments: i, codes, word.
Add = Callable[[int, str, str], None]


@dataclass(frozen=True, slots=True)
class Dots:
    """How one machine sums quads of one width of code.

    Attributes:
        cpu: the machine.
        bits: of a code.
        lanes: of 32 bits; at most those of a register.
        table: what is multiplied in place of each code, or None.
    """

    cpu: Cpu
    bits: int
    lanes: int
    table: tuple[int, ...] | None = None

    @property
    def wide_codes(self) -> bool:
        """Whether codes have 8 bits, and integers 16."""
        return self.bits == 8

    @property
    def integers(self) -> str:
        """Type of the integers."""
        return "int16" if self.wide_codes else "int8"

    @property
    def words(self) -> int:
        """32-bit words of a quad of integers."""
        return 2 if self.wide_codes else 1

    @property
    def laid_out(self) -> bool:
        """Whether words are laid out in all lanes beforehand."""
        return self.cpu.machine == "x86_64" and (self.cpu.dots, self.cpu.vector) != ("vnni", 64)

    @property
    def most_sums(self) -> int:
        """Sums that are kept in registers at once.

        Pairs need registers besides: as many sums of 16 bits, or ones and what is not summed yet;
        without AVX-512 there are sixteen.
        """
        crowded = self.cpu.dots == "pairs" or self.wide_codes
        return 4 if crowded and self.cpu.vector < 64 else 8

    @property
    def sums_of_16(self) -> int:
        """Products that one sum of 16 bits holds, or 0 where sums have 32 bits at once."""
        if self.cpu.dots != "pairs" or self.wide_codes or self.table is not None:
            return 0
        return 32767 // (2 * 127 * ((1 << self.bits) - 1))

    def operands(self, codes: str) -> list[str]:
        """Return the texts to multiply of a vector of codes, one for each word of integers."""
        if self.table is not None:
            return [shuffled(self.cpu, self.table, codes, QUAD * self.lanes)]
        if not self.wide_codes:
            return [codes]
        n = 2 * self.lanes
        pairs = bits_as("uint16", codes, n)
        even = f"T.bitwise_and({pairs}, {splat('T.uint16(255)', n)})"
        odd = f"T.shift_right({pairs}, {splat('T.uint16(8)', n)})"
        return [bits_as("int16", half, n) for half in (even, odd)]

    def word(self, buffer: str, index: str) -> str:
        """Return word `index` of the integers in a buffer in every lane."""
        if self.laid_out:
            return at(f"{buffer}_laid_out", f"({index}) * {self.lanes}", self.lanes)
        return splat(self._word(buffer, index), self.lanes)

    def _word(self, buffer: str, index: str) -> str:
        size = 4 // self.words
        return f'T.reinterpret("int32", {at(buffer, f"({index}) * {size}", size)})'

    def declare(self, kernel: Kernel, buffer: str, quads: int) -> None:
        """Declare what `write_layout` fills; needed also where it fills nothing."""
        if self.laid_out:
            kernel.scratch(f"{buffer}_laid_out", quads * self.words * self.lanes, "int32")

    def write_layout(self, kernel: Kernel, buffer: str, first: str, quads: str) -> None:
        """Lay out the words of quads from number `first` on, if that is needed."""
        if not self.laid_out:
            return
        with kernel.block(f"for i in T.serial({quads} * {self.words})"):
            kernel.let("word", f"({first}) * {self.words} + i")
            target = at(f"{buffer}_laid_out", f"word * {self.lanes}", self.lanes)
            kernel.line(f"{target} = {splat(self._word(buffer, 'word'), self.lanes)}")

    def store(self, kernel: Kernel, buffer: str, place: str, value: str, lanes: int) -> None:
        """Store whole numbers, f32, as integers of a buffer; of 16 bits in the order EVEN_ODD."""
        whole = cast(self.integers, cast("int32", value, lanes), lanes)
        if self.wide_codes:
            order = [i // QUAD * QUAD + EVEN_ODD[i % QUAD] for i in range(lanes)]
            whole = f"T.Shuffle([{kernel.fresh('natural', whole)}], {order})"
        kernel.line(f"{at(buffer, place, lanes)} = {whole}")

    def declare_sums(self, kernel: Kernel, total: int) -> None:
        """Declare `acc`, int32[total * lanes]."""
        kernel.scratch("acc", total * self.lanes, "int32")

    def write_zeros(self, kernel: Kernel, total: int) -> None:
        """Fill `acc` with zeros."""
        self._write_zeros(kernel, "acc", total, self.lanes, "int32")

    def write_sums(
        self, kernel: Kernel, total: int, steps: int, terms: int, step: Callable[[str, Add], None]
    ) -> None:
        """Write acc += sums over `steps` steps.

        Args:
            kernel: where to write.
            total: number of sums.
            steps: of the loop.
            terms: how often a step adds to each sum, counted in quads.
            step: writes step number s with an `Add`.
        """
        if not self.sums_of_16:
            with kernel.block(f"for s in {_loop(steps, total * terms)}"):
                step("s", lambda i, codes, word: self._add(kernel, i, codes, word))
            return
        most = max(1, self.sums_of_16 // terms)
        at_once = next(n for n in range(min(most, steps), 0, -1) if steps % n == 0)
        lanes = 2 * self.lanes
        with kernel.block(f"for chunk in T.serial(T.int64({steps // at_once}))"):
            kernel.scratch("short", total * lanes, "int16")
            self._write_zeros(kernel, "short", total, lanes, "int16")
            with kernel.block(f"for s in {_loop(at_once, total * terms)}"):
                step(
                    f"(chunk * {at_once} + s)",
                    lambda i, codes, word: self._add_short(kernel, i, codes, word),
                )
            with kernel.block(f"for i in T.unroll({total})"):
                acc = at("acc", f"i * {self.lanes}", self.lanes)
                short = at("short", f"i * {lanes}", lanes)
                ones = splat("T.int16(1)", lanes)
                pairs = pure(WORD_PAIRS[4 * self.lanes], "int32", self.lanes, short, ones)
                kernel.line(f"{acc} = {acc} + {pairs}")

    def _write_zeros(self, kernel: Kernel, name: str, count: int, lanes: int, dtype: str) -> None:
        with kernel.block(f"for i in T.unroll({count})"):
            kernel.line(f"{at(name, f'i * {lanes}', lanes)} = {splat(f'T.{dtype}(0)', lanes)}")

    def _add_short(self, kernel: Kernel, i: int, codes: str, word: str) -> None:
        n = 2 * self.lanes
        short = at("short", str(i * n), n)
        integers = bits_as("int8", word, 4 * self.lanes)
        pairs = pure(BYTE_PAIRS[4 * self.lanes], "int16", n, codes, integers)
        kernel.line(f"{short} = {short} + {pairs}")

    def _add(self, kernel: Kernel, i: int, codes: str, word: str) -> None:
        n = self.lanes
        acc = at("acc", str(i * n), n)
        if self.wide_codes:
            kernel.line(f"{acc} = {self._add_words(acc, codes, word)}")
            return
        integers = bits_as("int8", word, 4 * n)
        if self.cpu.dots == "vnni":
            total = pure(f"llvm.x86.avx512.vpdpbusd.{32 * n}", "int32", n, acc, codes, integers)
        elif self.cpu.dots == "pairs":
            pairs = pure(BYTE_PAIRS[4 * n], "int16", 2 * n, codes, integers)
            ones = splat("T.int16(1)", 2 * n)
            total = f"{acc} + {pure(WORD_PAIRS[4 * n], 'int32', n, pairs, ones)}"
        else:
            name = f"{NEON[self.cpu.dots]}.v{n}i32.v{4 * n}i8"
            own = codes if self.cpu.dots == "neon-i8mm" else bits_as("int8", codes, 4 * n)
            total = pure(name, "int32", n, acc, own, integers)
        kernel.line(f"{acc} = {total}")

    def _add_words(self, acc: str, codes: str, word: str) -> str:
        n = self.lanes
        integers = bits_as("int16", word, 2 * n)
        if self.cpu.dots == "vnni":
            return pure(f"llvm.x86.avx512.vpdpwssd.{32 * n}", "int32", n, acc, codes, integers)
        if self.cpu.dots == "pairs":
            return f"{acc} + {pure(WORD_PAIRS[4 * n], 'int32', n, codes, integers)}"
        wide, half = bits_as("int32", codes, n), splat("T.int32(16)", n)
        low = f"T.bitwise_and({wide}, {splat('T.int32(65535)', n)})"
        low_integer = f"T.shift_right(T.shift_left({word}, {half}), {half})"
        high, high_integer = f"T.shift_right({wide}, {half})", f"T.shift_right({word}, {half})"
        return f"{acc} + {low} * {low_integer} + {high} * {high_integer}"


def dots_of(fmt: Dense, cpu: Cpu, lanes: int) -> Dots:
    """Return how a machine sums quads of a format."""
    return Dots(cpu, code_bits(fmt), lanes, fmt.operands if isinstance(fmt, Lut) else None)


def _loop(count: int, size: int) -> str:
    """Return the head of a loop, written out if it is short; `size` is that of its body."""
    short = count <= 8 and count * size <= MOST_WRITTEN_OUT
    return f"T.unroll({count})" if short else f"T.serial(T.int64({count}))"
