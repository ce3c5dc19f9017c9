"""Short sequences of machine instructions that unpack codes: four bytes, or two numbers, at once.

A compiler that is given shifts and masks of 8- or 16-bit numbers works on each alone. Here a 32-bit
register with several neighbours is one operand, as the hardware has it. Each sequence stands in
three forms: PTX for NVIDIA, GCN for AMD, and the same in plain Triton for its interpreter, which
takes no assembly. `tests/targets/test_gpu_sequences.py` evaluates the instructions on every
half-word and finds the plain form.

    bytes_<s>_<m>       u8 -> i8      (x >> s) & m of each byte
    halves_<s>_<m>      i16 -> f16    (x >> s) & m of each half-word, as float16: m 2^-24, exactly,
                                      for a subnormal of float16 is an integer of steps of 2^-24
    entries_<t>         u8 -> i8      the operand in table t of the low code of each byte, and of
                                      the high one; two results
    entry_halves_<t>    i16 -> f16    the same of each half-word, even bytes and then odd ones, as
                                      float16; four results

Source of the subnormals: IEEE 754, binary16; matrix units of NVIDIA since sm_80 and of AMD since
CDNA3 multiply them at full rate (CUDA and CDNA3 ISA manuals). No bias is left to remove. Tables: a
byte permutation picks four of eight bytes. With bit 3 set, a selector of PTX's `prmt` gives copies
of the sign of a byte, and operands have none: so the half of the table that a code does not name
gives zero, and both halves are combined by `or`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .kernel_text import chosen_word

PTX, GCN, PLAIN = "ptx", "gcn", "plain"
STEP = 2.0**-24
"""What a subnormal float16 counts in."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """(x >> shift) & mask of each lane of a 32-bit register.

    Attributes:
        lanes: bits of a lane, 8 or 16; the result is i8, or f16 with those bits.
        shift: to the right.
        mask: of one lane.
    """

    lanes: int
    shift: int
    mask: int

    @property
    def name(self) -> str:
        """Name of the function in the emitted source."""
        kind = "bytes" if self.lanes == 8 else "halves"
        return f"{kind}_{self.shift}_{self.mask:02x}"

    @property
    def whole_mask(self) -> int:
        """The mask of all lanes of a register."""
        return sum(self.mask << at for at in range(0, 32, self.lanes))

    @property
    def results(self) -> int:
        """How many registers come out: $0."""
        return 1

    def instructions(self, form: str) -> tuple[str, ...]:
        """Return the instructions, from $1 to $0. A shift may cross lanes: the mask takes it out.

        Args:
            form: PTX or GCN.
        """
        mask = f"0x{self.whole_mask:08X}"
        if form == GCN:
            if not self.shift:
                return (f"v_and_b32 $0, {mask}, $1",)
            return (f"v_lshrrev_b32 $0, {self.shift}, $1", f"v_and_b32 $0, {mask}, $0")
        if not self.shift:
            return (f"and.b32 $0, $1, {mask};",)
        if (self.lanes, self.shift, self.mask) == (16, 8, 255):
            return ("prmt.b32 $0, $1, 0, 0x4341;",)  # bytes 1 and 3, each before a zero
        return (f"shr.b32 $0, $1, {self.shift};", f"and.b32 $0, $0, {mask};")

    @property
    def plain(self) -> str:
        """What it does to x, in plain Triton."""
        shifted = f"(x >> {self.shift})" if self.shift else "x"
        cast = "" if self.lanes == 8 else ".to(tl.float16, bitcast=True)"
        return f"({shifted} & {self.mask}){cast}"

    def source(self, form: str) -> str:
        """Return the function in Triton.

        Args:
            form: PTX, GCN or PLAIN.
        """
        return _function(self, form, "")


@dataclass(frozen=True, slots=True)
class Entries:
    """The operands in a table that codes of 4 bits name, in all lanes of a 32-bit register.

    Attributes:
        lanes: bits of a lane, 8 or 16; results are i8 of the low and of the high code of a byte,
            or f16 of those of the even byte and of the odd byte.
        operands: sixteen, 0..127 each.
    """

    lanes: int
    operands: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the function: with the whole table, for two may differ in one entry."""
        kind = "entries" if self.lanes == 8 else "entry_halves"
        return f"{kind}_{bytes(self.operands).hex()}"

    @property
    def results(self) -> int:
        """How many registers come out: $0, $1, ...; the operand follows them."""
        return 2 if self.lanes == 8 else 4

    @property
    def words(self) -> tuple[str, ...]:
        """The table as four words."""
        parts = (self.operands[i : i + 4] for i in range(0, 16, 4))
        return tuple(f"0x{int.from_bytes(bytes(part), 'little'):08X}" for part in parts)

    def instructions(self, form: str) -> tuple[str, ...]:
        """Return the instructions, which may use the registers w, x, y, z.

        Args:
            form: PTX; AMD gets the plain form.
        """
        t = self.words
        # Half-words first become (even bytes of both lanes, odd bytes of both).
        head = ("prmt.b32 w, $4, 0, 0x3120;",) if self.lanes == 16 else ("mov.b32 w, $2;",)
        look = (
            "xor.b32 x, w, 0x88888888;",
            f"prmt.b32 y, {t[0]}, {t[1]}, w;",
            f"prmt.b32 z, {t[2]}, {t[3]}, x;",
            "or.b32 y, y, z;",
            "shr.b32 w, w, 16;",
            "shr.b32 x, x, 16;",
            f"prmt.b32 z, {t[0]}, {t[1]}, w;",
            f"prmt.b32 x, {t[2]}, {t[3]}, x;",
            "or.b32 z, z, x;",
        )
        if self.lanes == 8:
            # y: low and high of byte 0, of byte 1; z: of bytes 2 and 3.
            return (*head, *look, "prmt.b32 $0, y, z, 0x6420;", "prmt.b32 $1, y, z, 0x7531;")
        halves = ("and.b32 {0}, {1}, 0x00FF00FF;", "prmt.b32 {0}, {1}, 0, 0x4341;")
        tail = [halves[i % 2].format(f"${i}", "yz"[i // 2]) for i in range(4)]
        return (*head, *look, *tail)

    @property
    def plain(self) -> str:
        """What it does to x, in plain Triton."""
        cast = ".to(tl.int8)"
        if self.lanes == 16:
            cast = ".to(tl.int16).to(tl.float16, bitcast=True)"
        wide = "x.to(tl.int32)"
        shifts = (0, 4) if self.lanes == 8 else (0, 4, 8, 12)
        picked = [f"{_operand(self.operands, wide, shift)}{cast}" for shift in shifts]
        return ", ".join(picked)

    def source(self, form: str) -> str:
        """Return the function in Triton.

        Args:
            form: PTX, GCN or PLAIN.
        """
        return _function(self, PTX if form == PTX else PLAIN, "{ .reg .b32 w, x, y, z; ")


def _operand(operands: tuple[int, ...], x: str, shift: int) -> str:
    """Return the operand that the code at a bit of x names, i32, in plain Triton."""
    code = f"(({x} >> {shift}) & 15)"

    def choose(bit: int, high: str, low: str) -> str:
        return f"tl.where(({code} & {bit}) != 0, {high}, {low})"

    word = chosen_word(operands, str, choose)
    return f"(({word} >> (({code} & 3) << 3)) & 255)"


def _function(sequence: Sequence | Entries, form: str, registers: str) -> str:
    """Return the text of a function in Triton.

    Args:
        sequence: what it does.
        form: PTX, GCN or PLAIN.
        registers: what opens the assembly if it needs registers, in PTX.
    """
    head = f"\n\n@triton.jit\ndef {sequence.name}(x):\n"
    if form == PLAIN:
        return f"{head}    return {sequence.plain}\n"
    count, lines = sequence.results, sequence.instructions(form)
    kind = "tl.int8" if sequence.lanes == 8 else "tl.float16"
    register = "r" if form == PTX else "v"
    clobber = "=&" if len(lines) > 1 else "="
    outs = ",".join([f"{clobber}{register}"] * count)
    closing = " }" if registers and form == PTX else ""
    text = " ".join(lines) if form == PTX else "\\n".join(lines)
    opening = registers if form == PTX else ""
    dtype = kind if count == 1 else f"({', '.join([kind] * count)})"
    return (
        f"{head}    return tl.inline_asm_elementwise(\n"
        f'        "{opening}{text}{closing}",\n'
        f'        "{outs},{register}",\n'
        f"        [x],\n"
        f"        dtype={dtype},\n"
        f"        is_pure=True,\n"
        f"        pack={32 // sequence.lanes},\n"
        f"    )\n"
    )
