"""Short sequences of machine instructions that unpack codes: four bytes, or two numbers, at once.

A compiler that is given shifts and masks of 8- or 16-bit numbers works on each alone. Here a 32-bit
register with several neighbours is one operand, as the hardware has it. Each sequence stands in
three forms: PTX for NVIDIA, GCN for AMD, and the same in plain Triton for its interpreter, which
takes no assembly. `tests/targets/test_gpu_sequences.py` evaluates the instructions on every
half-word and finds the plain form.

    bytes_<s>_<m>       u8 -> i8      (x >> s) & m of each byte; _f: its highest bit turned over
    halves_<s>_<m>      i16 -> f16    (x >> s) & m of each half-word, as float16: m 2^-24, exactly,
                                      for a subnormal of float16 is an integer of steps of 2^-24
    triples             u8 -> i8      codes of three bits: their low two in a byte, four planes of
                                      them, and their third in a byte of another field; four results
    triple_halves       i16 -> f16    the same of each half-word; eight results
    times               f16 -> f16    x y
    named               f16 -> f16    z where x = y, else 0

Source of the subnormals: IEEE 754, binary16; matrix units of NVIDIA since sm_80 and of AMD since
CDNA3 multiply them at full rate (CUDA and CDNA3 ISA manuals). No bias is left to remove. Tables are
looked up by `gpu_lookups.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

PTX, GCN, PLAIN = "ptx", "gcn", "plain"
STEP = 2.0**-24
"""What a subnormal float16 counts in."""


class Emitted(Protocol):
    """A sequence, as its function is emitted."""

    @property
    def name(self) -> str:
        """Name of the function in the emitted source."""

    @property
    def lanes(self) -> int:
        """Bits of a lane: 8, 16 or 32."""

    @property
    def results(self) -> int:
        """How many registers come out: $0, $1, ...; operands follow them."""

    @property
    def plain(self) -> str:
        """What it does, in plain Triton: an expression, or lines that end with `return`."""

    def instructions(self, form: str) -> tuple[str, ...]:
        """Return the instructions; the form is PTX or GCN."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """((x >> shift) & mask) ^ flip of each lane of a 32-bit register.

    Attributes:
        lanes: bits of a lane, 8 or 16; the result is i8, or f16 with those bits.
        shift: to the right.
        mask: of one lane.
        flip: of one lane, 0 or its highest bit, which makes a byte from 0 on one from -128 on.
    """

    lanes: int
    shift: int
    mask: int
    flip: int = 0

    @property
    def name(self) -> str:
        """Name of the function in the emitted source."""
        kind = "bytes" if self.lanes == 8 else "halves"
        return f"{kind}_{self.shift}_{self.mask:02x}" + ("_f" if self.flip else "")

    @property
    def results(self) -> int:
        """How many registers come out: $0."""
        return 1

    def instructions(self, form: str) -> tuple[str, ...]:
        """Return the instructions, from $1 to $0. A shift may cross lanes: the mask takes it out.

        Args:
            form: PTX or GCN.
        """
        x, lines, width = "$1", [], self.lanes
        mask, flip = (f"0x{_lanes(bits, self.lanes):08X}" for bits in (self.mask, self.flip))
        if (form, width, self.shift) == (PTX, 16, 8):
            # Bytes 1 and 3, each before a zero: one operand of several planes.
            lines, x, width = ["prmt.b32 $0, $1, 0, 0x4341;"], "$0", 8
        elif self.shift:
            shift = f"v_lshrrev_b32 $0, {self.shift}, $1"
            lines += [shift if form == GCN else f"shr.b32 $0, $1, {self.shift};"]
            x = "$0"
        if self.mask < (1 << width) - 1:
            lines += [f"v_and_b32 $0, {mask}, {x}" if form == GCN else f"and.b32 $0, {x}, {mask};"]
            x = "$0"
        if self.flip:
            lines += [f"v_xor_b32 $0, {flip}, {x}" if form == GCN else f"xor.b32 $0, {x}, {flip};"]
        return tuple(lines)

    @property
    def plain(self) -> str:
        """What it does to x, in plain Triton."""
        shifted = f"(x >> {self.shift})" if self.shift else "x"
        cast = ".to(tl.int8)" if self.lanes == 8 else ".to(tl.float16, bitcast=True)"
        masked = shifted if self.mask == (1 << self.lanes) - 1 else f"({shifted} & {self.mask})"
        return f"({masked} ^ -{self.flip}){cast}" if self.flip else f"{masked}{cast}"

    def source(self, form: str) -> str:
        """Return the function in Triton.

        Args:
            form: PTX, GCN or PLAIN.
        """
        return function_text(self, form, "")


@dataclass(frozen=True, slots=True)
class Triples:
    """Codes of three bits, in all lanes of a 32-bit register.

    Bits 2 i and 2 i + 1 of a byte are the low ones of the code of plane i. Its third is bit 2 i of
    a byte of `high` where `factor` is 4, and bit 2 i + 1 where it is 2: times the factor either
    stands above the low ones. A result has units of 2^(2 i), less 16 for the upper planes of bytes.

    Attributes:
        lanes: bits of a lane, 8 or 16; results are i8 of planes 0..3, or f16 of those of the even
            byte and then of the odd byte.
    """

    lanes: int

    @property
    def name(self) -> str:
        """Name of the function in the emitted source."""
        return "triples" if self.lanes == 8 else "triple_halves"

    @property
    def results(self) -> int:
        """How many registers come out: $0, $1, ...; x, high and factor follow them."""
        return self.lanes // 2

    def instructions(self, form: str) -> tuple[str, ...]:
        """Return the instructions, which may use the registers w, x, y, z; factors are all alike.

        Args:
            form: PTX; AMD gets the plain form.
        """
        codes, high, factor = (f"${self.results + i}" for i in range(3))
        upper = f"shr.b32 x, {codes}, 4;" if self.lanes == 8 else f"prmt.b32 x, {codes}, 0, 0x4341;"
        lines = [f"and.b32 w, {factor}, {(1 << self.lanes) - 1};"]
        for step, move in enumerate((f"mov.b32 x, {codes};", upper)):
            lines += [move, f"shr.b32 y, {high}, {step * self.lanes // 2};", "mul.lo.u32 y, y, w;"]
            for i in range(self.results // 2):
                low, top = (f"0x{_lanes(bits << 2 * i, self.lanes):08X}" for bits in (3, 4))
                lines.append(f"and.b32 z, y, {top};")
                # (x & low) | z
                lines.append(f"lop3.b32 ${step * self.results // 2 + i}, x, {low}, z, 0xEA;")
        return tuple(lines)

    @property
    def plain(self) -> str:
        """What it does to x, high and factor, in plain Triton."""
        cast = ".to(tl.int8)" if self.lanes == 8 else ".to(tl.int16).to(tl.float16, bitcast=True)"
        terms = []
        for number in range(self.results):
            step, i = divmod(number, self.results // 2)
            down = step * self.lanes // 2
            third = f"((high.to(tl.int32) >> {down}) * factor) & {4 << 2 * i}"
            terms.append(f"(((x >> {down}) & {3 << 2 * i}) | ({third})){cast}")
        return ", ".join(terms)

    def source(self, form: str) -> str:
        """Return the function in Triton.

        Args:
            form: PTX, GCN or PLAIN.
        """
        return function_text(self, PTX if form == PTX else PLAIN, "{ .reg .b32 w, x, y, z; ")


@dataclass(frozen=True, slots=True)
class Times:
    """The product of two float16, rounded once, in both lanes of a 32-bit register."""

    name: str = "times"
    results: int = 1
    lanes: int = 16

    def instructions(self, form: str) -> tuple[str, ...]:
        """Return the instruction, from $1 and $2 to $0.

        Args:
            form: PTX or GCN.
        """
        return ("v_pk_mul_f16 $0, $1, $2",) if form == GCN else ("mul.rn.f16x2 $0, $1, $2;",)

    @property
    def plain(self) -> str:
        """What it does to x and y, in plain Triton."""
        return "x * y"

    def source(self, form: str) -> str:
        """Return the function in Triton.

        Args:
            form: PTX, GCN or PLAIN.
        """
        return function_text(self, form, "")


@dataclass(frozen=True, slots=True)
class Named:
    """z where x is y, else 0, in both lanes of float16 of a 32-bit register."""

    name: str = "named"
    results: int = 1
    lanes: int = 16

    def instructions(self, form: str) -> tuple[str, ...]:
        """Return the instructions, from $1, $2 and $3 to $0, by the register t.

        Args:
            form: PTX; AMD gets the plain form.
        """
        return ("set.eq.f16x2.f16x2 t, $1, $2;", "mul.rn.f16x2 $0, t, $3;")

    @property
    def plain(self) -> str:
        """What it does to x, y and z, in plain Triton."""
        return "tl.where(x == y, z, 0.0).to(tl.float16)"

    def source(self, form: str) -> str:
        """Return the function in Triton.

        Args:
            form: PTX, GCN or PLAIN.
        """
        return function_text(self, PTX if form == PTX else PLAIN, "{ .reg .b32 t; ")


def _lanes(lane: int, lanes: int) -> int:
    """Return the bits of one lane, in all lanes of a register."""
    return sum(lane << at for at in range(0, 32, lanes))


def function_text(sequence: Emitted, form: str, registers: str) -> str:
    """Return the text of a function in Triton.

    Args:
        sequence: what it does.
        form: PTX, GCN or PLAIN.
        registers: what opens the assembly if it needs registers, in PTX: a block of its own, or
            what declares them for the whole kernel, which no compiler may leave out.
    """
    others = {Triples: ["high", "factor"], Times: ["y"], Named: ["y", "z"]}
    given = ["x", *others.get(type(sequence), [])]
    head = f"\n\n@triton.jit\ndef {sequence.name}({', '.join(given)}):\n"
    if form == PLAIN:
        plain = sequence.plain
        return head + (plain if "\n" in plain else f"    return {plain}") + "\n"
    count, lines = sequence.results, sequence.instructions(form)
    kind = {8: "tl.int8", 16: "tl.float16", 32: "tl.int32"}[sequence.lanes]
    register = "r" if form == PTX else "v"
    clobber = "=&" if len(lines) > 1 else "="
    outs = ",".join([f"{clobber}{register}"] * count)
    is_block = registers.startswith("{")
    closing = " }" if is_block and form == PTX else ""
    text = " ".join(lines) if form == PTX else "\\n".join(lines)
    opening = registers if form == PTX else ""
    dtype = kind if count == 1 else f"({', '.join([kind] * count)})"
    return (
        f"{head}    return tl.inline_asm_elementwise(\n"
        f'        "{opening}{text}{closing}",\n'
        f'        "{",".join([outs, *([register] * len(given))])}",\n'
        f"        [{', '.join(given)}],\n"
        f"        dtype={dtype},\n"
        f"        is_pure={is_block or not registers},\n"
        f"        pack={32 // sequence.lanes},\n"
        f"    )\n"
    )
