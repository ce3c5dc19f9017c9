"""Lookups of 4-bit codes in a table of sixteen operands, by byte permutations in registers.

    entry_halves_<t>    i16 -> f16    the operand in table t of the low code of the even byte, and
                                      of the high one, then of the odd byte; four results
    entries_apart_<t>   u8 -> i8      the same of pairs of bytes of each word, as they are looked
                                      up: see `EntriesApart`; four results
    hold_tables         i32 -> i32    nothing to x; fills the registers that tables lie in

A byte permutation picks four of eight bytes. With bit 3 set, a selector of PTX's `prmt` gives
copies of the sign of a byte, and operands have none: so the half of the table that a code does not
name gives zero, and both halves are combined by `or`, or each has a product of its own. Source: PTX
ISA, "prmt". Forms are those of `gpu_sequences.py`; AMD gets the plain one.
"""

from __future__ import annotations

from dataclasses import dataclass

from .gpu_compile import WORDS
from .gpu_sequences import PLAIN, PTX, Named, Sequence, Times, Triples, function_text
from .kernel_text import chosen_word


@dataclass(frozen=True, slots=True)
class Entries:
    """The operands in a table that codes of 4 bits name, in both half-words of a 32-bit register.

    Results are f16 of the low and of the high code of the even byte, then of the odd byte.

    Attributes:
        operands: sixteen, 0..127 each.
    """

    operands: tuple[int, ...]
    lanes: int = 16
    results: int = 4

    @property
    def name(self) -> str:
        """Name of the function: with the whole table, for two may differ in one entry."""
        return f"entry_halves_{bytes(self.operands).hex()}"

    def instructions(self, form: str) -> tuple[str, ...]:
        """Return the instructions, which may use the registers v, w, x, y, z and those of `Held`.

        Args:
            form: PTX; AMD gets the plain form.
        """
        # y: low and high of byte 0, of byte 1; z: of bytes 2 and 3. Selectors from 8 on give zero.
        order = ("C480", "D591", "E6A2", "F7B3")
        return (
            *_looked_up(self.operands, f"${self.results}", ("y", "v", "z", "x")),
            "or.b32 y, y, v;",
            "or.b32 z, z, x;",
            *(f"prmt.b32 ${i}, y, z, 0x{order[i]};" for i in range(self.results)),
        )

    @property
    def plain(self) -> str:
        """What it does to x, in plain Triton."""
        cast, wide = ".to(tl.int16).to(tl.float16, bitcast=True)", "x.to(tl.int32)"
        codes = (f"(({wide} >> {shift}) & 15)" for shift in (0, 4, 8, 12))
        return ", ".join(f"{_operand(self.operands, code)}{cast}" for code in codes)

    def source(self, form: str) -> str:
        """Return the function in Triton.

        Args:
            form: PTX, GCN or PLAIN.
        """
        return function_text(self, PTX if form == PTX else PLAIN, "{ .reg .b32 v, w, x, y, z; ")


@dataclass(frozen=True, slots=True)
class EntriesApart:
    """The operands in a table that codes of 4 bits name, as byte permutations give them.

    Of a word of four bytes: the low and the high code of byte 0 and of byte 1, then of bytes 2 and
    3; each twice, where codes below 8 and codes from 8 on have their entries, and zeros beside.
    Products with both add up, so nothing puts them together. The compiler's process checks that
    four neighbours are in a register.

    Attributes:
        operands: sixteen, 0..127 each.
    """

    operands: tuple[int, ...]
    lanes: int = 8
    results: int = 4

    @property
    def name(self) -> str:
        """Name of the function: with the whole table, for two may differ in one entry."""
        return f"entries_apart_{bytes(self.operands).hex()}"

    def instructions(self, form: str) -> tuple[str, ...]:
        """Return the instructions, which may use the registers w, x and those of `Held`.

        Args:
            form: PTX; AMD has no bytes here.
        """
        return _looked_up(self.operands, f"${self.results}", ("$0", "$1", "$2", "$3"))

    @property
    def plain(self) -> str:
        """What it does to x [N, bytes], in plain Triton, line by line."""
        low = _operand(self.operands[:8], "code")
        high = _operand(self.operands[8:], "code")
        return f"""\
    words = tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)).to(tl.int32)
    codes = tl.permute(tl.join(words & 15, (words >> 4) & 15), (0, 1, 3, 4, 2))
    first, second = tl.split(codes)
    code = tl.reshape(first, x.shape)
    first_low = tl.where(code < 8, {low}, 0).to(tl.int8)
    first_high = tl.where(code < 8, 0, {high}).to(tl.int8)
    code = tl.reshape(second, x.shape)
    second_low = tl.where(code < 8, {low}, 0).to(tl.int8)
    second_high = tl.where(code < 8, 0, {high}).to(tl.int8)
    return first_low, first_high, second_low, second_high"""

    def source(self, form: str) -> str:
        """Return the function in Triton.

        Args:
            form: PTX, GCN or PLAIN.
        """
        opening = f"{{ {WORDS} .reg .b32 w, x; "
        return function_text(self, PTX if form == PTX else PLAIN, opening)


@dataclass(frozen=True, slots=True)
class Held:
    """Words that registers hold from here on: x is given back, and is not negative.

    A constant that an instruction takes from a register is moved there before each of them, for
    the assembler finds that cheap. Of these it cannot know that they are constants.

    Attributes:
        words: the constants, of 32 bits.
    """

    words: tuple[int, ...]
    name: str = "hold_tables"
    lanes: int = 32
    results: int = 1

    @property
    def registers(self) -> tuple[str, ...]:
        """Their names, which stand until the end of the kernel."""
        return tuple(f"table_{word:08X}" for word in self.words)

    def instructions(self, form: str) -> tuple[str, ...]:
        """Return the instructions, from $1 to $0.

        Args:
            form: PTX; AMD gets the plain form.
        """
        fill = (
            f"xor.b32 {register}, $0, 0x{word:08X};"
            for register, word in zip(self.registers, self.words, strict=True)
        )
        return ("shr.u32 $0, $1, 31;", *fill, "mov.b32 $0, $1;")

    @property
    def plain(self) -> str:
        """What it does to x, in plain Triton."""
        return "x"

    def source(self, form: str) -> str:
        """Return the function in Triton.

        Args:
            form: PTX, GCN or PLAIN.
        """
        # No braces: the registers belong to the whole kernel.
        registers = f".reg .b32 {', '.join(self.registers)}; "
        return function_text(self, PTX if form == PTX else PLAIN, registers)


def words_of(operands: tuple[int, ...]) -> tuple[int, ...]:
    """Return a table of sixteen bytes as four words."""
    parts = (operands[i : i + 4] for i in range(0, 16, 4))
    return tuple(int.from_bytes(bytes(part), "little") for part in parts)


def _operand(operands: tuple[int, ...], code: str) -> str:
    """Return the operand that a code names, i32, in plain Triton."""

    def choose(bit: int, high: str, low: str) -> str:
        return f"tl.where(({code} & {bit}) != 0, {high}, {low})"

    word = chosen_word(operands, str, choose)
    return f"(({word} >> (({code} & 3) << 3)) & 255)"


def _looked_up(operands: tuple[int, ...], x: str, outs: tuple[str, ...]) -> tuple[str, ...]:
    """Return the permutations of the word x, by the registers w and x.

    Args:
        operands: of the table.
        x: the register of the codes.
        outs: of its first two bytes, codes below 8 and from 8 on; the same of its last two.
    """
    t = Held(words_of(operands)).registers
    below, above = f"{t[0]}, {t[1]}", f"{t[2]}, {t[3]}"
    return (
        f"xor.b32 x, {x}, 0x88888888;",
        f"prmt.b32 {outs[0]}, {below}, {x};",
        f"prmt.b32 {outs[1]}, {above}, x;",
        f"shr.b32 w, {x}, 16;",
        "shr.b32 x, x, 16;",
        f"prmt.b32 {outs[2]}, {below}, w;",
        f"prmt.b32 {outs[3]}, {above}, x;",
    )


Unpacker = Sequence | Entries | EntriesApart | Held | Triples | Times | Named
