"""Dot products of quads: four codes times four integers, summed into a lane of 32 bits.

    codes of up to 4 bits, integers of 8      pairs   pmaddubsw, a few sums of 16 bits, pmaddwd
                                              vnni    vpdpbusd
                                              neon    sdot, usdot
    operands of tables, integers of 8         pairs   pmaddubsw, pmaddwd at once; else as above
    codes of 8 bits, integers of 16           pairs   pmaddwd on even and odd codes
                                              vnni    vpdpwssd on even and odd codes
                                              neon    udot on low bytes, usdot or udot on high ones

A quad of integers is one 32-bit word in every lane (of 16 bits: two words, of the even and of the
odd ones, or of the low and of the high bytes). Where the instruction takes a word from memory for
all lanes it is read as it is. Elsewhere several vectors of codes share one that is put in all lanes
of a register; if there is but one vector, words are laid out in all lanes beforehand, so that they
are operands in memory there too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import gcd

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
# Narrow two vectors of integers to one, a piece of 16 bytes of each in turn.
PACKED = {
    16: ("llvm.x86.sse2.packssdw.128", "llvm.x86.sse2.packsswb.128"),
    32: ("llvm.x86.avx2.packssdw", "llvm.x86.avx2.packsswb"),
}
NEON = {"neon": "llvm.aarch64.neon.sdot", "neon-i8mm": "llvm.aarch64.neon.usdot"}
# For codes of 8 bits: with low bytes, and with high ones.
NEON_LOW = "llvm.aarch64.neon.udot"
NEON_HIGH = {"neon": NEON_LOW, "neon-i8mm": "llvm.aarch64.neon.usdot"}

# Numbers 0, 1, 2, 3 of a quad of 16-bit integers lie in this order: even ones, odd ones.
EVEN_ODD = (0, 2, 1, 3)
# Or their bytes do in this one: low ones, high ones.
LOW_HIGH = (0, 2, 4, 6, 1, 3, 5, 7)
# Products that are written out one after another; a loop of more takes long to compile.
MOST_WRITTEN_OUT = 128
# Sums that lie together in scratch.
MOST_PIECE = 8

# Writes acc i += codes times a word of integers, in step s; arguments: i, which word of the quad,
# codes, and the quad of step 0.
Add = Callable[[int, int, str, str], None]
Step = Callable[[str, Add], None]


@dataclass(frozen=True, slots=True)
class Dots:
    """How one machine sums quads of one width of code.

    Attributes:
        cpu: the machine.
        bits: of a code.
        lanes: of 32 bits; at most those of a register.
        table: what is multiplied in place of each code, or None.
        signed: whether integers may be negative.
        shared: vectors of codes at once that are multiplied with the same word.
    """

    cpu: Cpu
    bits: int
    lanes: int
    table: tuple[int, ...] | None = None
    signed: bool = True
    shared: int = 1

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
    def by_bytes(self) -> bool:
        """Whether integers of 16 bits are multiplied as low and high bytes."""
        return self.wide_codes and self.cpu.dots in NEON

    @property
    def biased(self) -> bool:
        """Whether high bytes are stored plus 128, for want of an instruction for signed ones."""
        return self.by_bytes and self.signed and NEON_HIGH[self.cpu.dots] == NEON_LOW

    @property
    def laid_out(self) -> bool:
        """Whether words are laid out in all lanes beforehand: if each is an operand but once."""
        by_memory = self.cpu.dots in NEON or (self.cpu.dots, self.cpu.vector) == ("vnni", 64)
        return not by_memory and self.shared == 1

    def bytes_of(self, quads: int) -> int:
        """Return the bytes in which the integers of so many quads are read."""
        return 4 * self.words * quads * (self.lanes if self.laid_out else 1)

    @property
    def in_place(self) -> bool:
        """Whether codes may be multiplied where they lie in their bytes: as any unsigned bytes."""
        return self.cpu.dots == "vnni" and self.bits in (2, 4) and self.table is None

    @property
    def most_sums(self) -> int:
        """Sums that are kept in registers at once.

        Pairs need registers besides: as many sums of 16 bits, or ones and what is not summed yet;
        without AVX-512 and NEON there are sixteen.
        """
        crowded = self.cpu.dots == "pairs" or (self.wide_codes and not self.by_bytes)
        if self.cpu.vector == 64 and not crowded:
            return 16
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
        if not self.wide_codes or self.by_bytes:
            return [codes] * self.words
        n = 2 * self.lanes
        pairs = bits_as("uint16", codes, n)
        even = f"T.bitwise_and({pairs}, {splat('T.uint16(255)', n)})"
        odd = f"T.shift_right({pairs}, {splat('T.uint16(8)', n)})"
        return [bits_as("int16", half, n) for half in (even, odd)]

    def _word_at(self, buffer: str, first: str, s: str, half: int) -> str:
        """Return a word of quad first + s of the integers in a buffer, in every lane."""
        index = f"(({first}) + {s}) * {self.words} + {half}"
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

    def stored_at_once(self, count: int) -> int:
        """Return how many of `count` vectors of whole numbers are stored at once.

        Integers of several make one register; AVX-512 narrows each vector in one instruction.
        """
        return 1 if self.cpu.vector == 64 else gcd(count, 4 // (1 + self.wide_codes))

    def store(
        self, kernel: Kernel, buffer: str, place: str, vectors: list[str], lanes: int
    ) -> None:
        """Store vectors of whole numbers, f32, as integers of a buffer, one after another."""
        size = lanes * len(vectors)
        if self._is_packed(len(vectors), lanes):
            whole = self._packed(kernel, vectors, lanes)
        else:
            value = f"T.Shuffle({vectors}, {list(range(size))})".replace("'", "")
            value = value if len(vectors) > 1 else vectors[0]
            whole = cast(self.integers, cast("int32", value, size), size)
        self.store_integers(kernel, buffer, place, whole, size)

    def _is_packed(self, count: int, lanes: int) -> bool:
        """Return whether so many vectors make one register of integers, by PACKED."""
        narrowed = 2 if self.wide_codes else 4
        is_full = count == narrowed and 4 * lanes == self.cpu.vector
        return is_full and self.cpu.dots not in NEON and self.cpu.vector in PACKED

    def _packed(self, kernel: Kernel, vectors: list[str], lanes: int) -> str:
        """Return the integers of vectors of whole numbers, which fit: nothing saturates."""
        to_16, to_8 = PACKED[self.cpu.vector]
        names = [kernel.fresh("whole", cast("int32", vector, lanes)) for vector in vectors]
        pairs = [
            kernel.fresh("pair", pure(to_16, "int16", 2 * lanes, *names[i : i + 2]))
            for i in range(0, len(names), 2)
        ]
        packed = pairs[0] if self.wide_codes else pure(to_8, "int8", 4 * lanes, *pairs)
        if self.cpu.vector == 16:
            return packed
        # Halves of 16 bytes hold a piece of each vector; the pieces of a vector are neighbours.
        kind, count = ("int64", 4) if self.wide_codes else ("int32", 8)
        order = tuple(i // 2 + i % 2 * (count // 2) for i in range(count))
        pieces = _shuffled(kernel, bits_as(kind, packed, count), order, count)
        return bits_as(self.integers, pieces, lanes * len(vectors))

    def store_integers(
        self, kernel: Kernel, buffer: str, place: str, value: str, lanes: int
    ) -> None:
        """Store whole quads of integers in a buffer; of 16 bits by EVEN_ODD or LOW_HIGH."""
        if self.by_bytes:
            if self.biased:
                value = f"T.bitwise_xor({value}, {splat('T.int16(-32768)', lanes)})"
            value = _shuffled(kernel, bits_as("uint8", value, 2 * lanes), LOW_HIGH, 2 * lanes)
            value = bits_as("int16", value, lanes)
        elif self.wide_codes:
            value = _shuffled(kernel, value, EVEN_ODD, lanes)
        kernel.line(f"{at(buffer, place, lanes)} = {value}")

    def declare_sums(self, kernel: Kernel, total: int) -> None:
        """Declare the sums, int32[lanes] each, and what is summed beside them.

        They lie in pieces that a stack takes (docs/cpu.md, traps).
        """
        for first in range(0, total, MOST_PIECE):
            count = min(total - first, MOST_PIECE)
            kernel.scratch(f"acc{first // MOST_PIECE}", count * self.lanes, "int32")
        for name in [*["high"] * self.by_bytes, *["own"] * self.biased]:
            kernel.scratch(name, total * self.lanes, "int32")

    def sum(self, i: int) -> str:
        """Return sum number i."""
        return at(f"acc{i // MOST_PIECE}", str(i % MOST_PIECE * self.lanes), self.lanes)

    def write_zeros(self, kernel: Kernel, total: int) -> None:
        """Fill the sums with zeros."""
        for i in range(total):
            kernel.line(f"{self.sum(i)} = {splat('T.int32(0)', self.lanes)}")

    def write_sums(
        self,
        kernel: Kernel,
        buffer: str,
        total: int,
        steps: int,
        terms: int,
        step: Step,
        side: int = 1,
    ) -> None:
        """Write acc += sums over `steps` steps.

        Args:
            kernel: where to write.
            buffer: of the integers.
            total: number of sums.
            steps: of the loop.
            terms: how often a step adds to each sum, counted in quads.
            step: writes step number s with an `Add`.
            side: sums number i, i + side, i + 2 side... have the same codes; others may not.
        """
        if self.by_bytes:
            self._write_byte_sums(kernel, buffer, total, steps, step, side)
            return
        if not self.sums_of_16:

            def write(i: int, half: int, codes: str, word: str) -> None:
                self._add(kernel, i, codes, word)

            self._write_steps(kernel, buffer, steps, total * terms, step, write)
            return
        most = max(1, self.sums_of_16 // terms)
        at_once = next(n for n in range(min(most, steps), 0, -1) if steps % n == 0)
        lanes = 2 * self.lanes
        with kernel.block(f"for chunk in T.serial(T.int64({steps // at_once}))"):
            kernel.scratch("short", total * lanes, "int16")
            self._write_zeros(kernel, "short", total, lanes, "int16")
            with kernel.block(f"for s in {_loop(at_once, total * terms)}"):
                place = f"(chunk * {at_once} + s)"

                def add(i: int, half: int, codes: str, first: str) -> None:
                    self._add_short(kernel, i, codes, self._word_at(buffer, first, place, half))

                step(place, add)
            for i in range(total):
                acc, short = self.sum(i), at("short", str(i * lanes), lanes)
                ones = splat("T.int16(1)", lanes)
                pairs = pure(WORD_PAIRS[4 * self.lanes], "int32", self.lanes, short, ones)
                kernel.line(f"{acc} = {acc} + {pairs}")

    def _write_steps(
        self, kernel: Kernel, buffer: str, steps: int, size: int, step: Step, write: Add
    ) -> None:
        """Write the loop over steps, of so many products each, with a writer that takes words.

        NEON multiplies with a word of a register, so the words of several steps are one vector.
        """
        most = QUAD // self.words if self.cpu.dots in NEON else 1
        n = gcd(most, steps)
        with kernel.block(f"for s in {_loop(steps // n, n * size)}"):
            for t in range(n):

                def add(i: int, half: int, codes: str, first: str, t: int = t) -> None:
                    if n == most > 1:
                        vector = at(buffer, f"(({first}) + s * {n}) * {QUAD}", n * QUAD)
                        lanes = [t * self.words + half] * self.lanes
                        word = f"T.Shuffle([{bits_as('int32', vector, QUAD)}], {lanes})"
                    else:
                        word = self._word_at(buffer, first, f"(s * {n} + {t})", half)
                    write(i, half, codes, word)

                step(f"(s * {n} + {t})" if n > 1 else "s", add)

    def _write_byte_sums(
        self, kernel: Kernel, buffer: str, total: int, steps: int, step: Step, side: int
    ) -> None:
        """Write acc += sums of codes c times integers w = 256 high + low, low = 0..255.

        Biased high bytes are high + 128: sum c high = sum c (high + 128) - 128 sum c.
        Low bytes are summed in acc itself.

        No sum leaves 32 bits. Of MOST_WIDE = 256 products at most, that of low bytes and that of
        biased ones is 256 * 255 * 255 < 2^24; with -128 <= high <= 127, 256 |sum c high| is at most
        256 * 256 * 255 * 128 = 2,139,095,040, and |sum c w| 256 * 255 * 32,767 = 2,139,029,760,
        both less than 2^31 = 2,147,483,648.
        """
        n = self.lanes
        self._write_zeros(kernel, "high", total, n, "int32")
        if self.biased:
            self._write_zeros(kernel, "own", side, n, "int32")
        add = partial(self._add_byte, kernel, side)
        self._write_steps(kernel, buffer, steps, 2 * total, step, add)
        for i in range(total):
            acc, high = self.sum(i), at("high", str(i * n), n)
            if self.biased:
                codes = at("own", str(i % side * n), n)
                high = f"({high} - {codes} * {splat('T.int32(128)', n)})"
            kernel.line(f"{acc} = {acc} + {high} * {splat('T.int32(256)', n)}")

    def _add_byte(
        self, kernel: Kernel, side: int, i: int, half: int, codes: str, word: str
    ) -> None:
        n = self.lanes
        intrinsic = NEON_HIGH[self.cpu.dots] if half else NEON_LOW
        own = at("high", str(i * n), n) if half else self.sum(i)
        added = [(own, intrinsic, bits_as("int8", word, 4 * n))]
        if self.biased and half and i < side:
            added.append((at("own", str(i * n), n), NEON_LOW, splat("T.int8(1)", 4 * n)))
        for place, intrinsic, integers in added:
            dot = pure(f"{intrinsic}.v{n}i32.v{4 * n}i8", "int32", n, place, codes, integers)
            kernel.line(f"{place} = {dot}")

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
        acc = self.sum(i)
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
        return f"{acc} + {pure(WORD_PAIRS[4 * n], 'int32', n, codes, integers)}"


def dots_of(fmt: Dense, cpu: Cpu, lanes: int, *, signed: bool) -> Dots:
    """Return how a machine sums quads of a format times integers, `signed` if any may be < 0."""
    table = fmt.operands if isinstance(fmt, Lut) else None
    return Dots(cpu, code_bits(fmt), lanes, table, signed)


def _shuffled(kernel: Kernel, value: str, order: tuple[int, ...], lanes: int) -> str:
    """Return a vector with each piece of so many lanes in an order."""
    size = len(order)
    whole = [i // size * size + order[i % size] for i in range(lanes)]
    return f"T.Shuffle([{kernel.fresh('natural', value)}], {whole})"


def _loop(count: int, size: int) -> str:
    """Return the head of a loop, written out if it is short; `size` is that of its body."""
    short = count <= 8 and count * size <= MOST_WRITTEN_OUT
    return f"T.unroll({count})" if short else f"T.serial(T.int64({count}))"
