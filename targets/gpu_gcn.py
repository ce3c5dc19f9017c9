"""Short sequences of AMD's instructions: all planes of two half-words in a 32-bit register.

AMD's compiler takes two half-words as an operand of assembly, but no four bytes: `int16` goes in,
and what comes out is `int16`, two bytes each, or float16. As in `gpu_sequences.py`, a subnormal of
float16 is an integer of steps of 2^-24; matrix units of AMD take them since CDNA3. In three forms:
GCN, the same in plain Triton, and what they mean, which is `tests/targets/test_gpu_gcn.py`.

    bytes_<n>x<b>       i16 -> n i16    codes of b bits of each plane, both bytes; those of 8 bits
                                        are counted from 128, as signed bytes are
    halves_<n>x<b>      i16 -> 2n f16   the same of the even byte, then of the odd one, as float16:
                                        plane i is worth 2^(8 i / n - 24)
    ..._<table>                         the operands in a table of 16 that they name

With `moved`, a second operand says by how many bits the register is shifted first.

Source: AMD, CDNA3 ISA manual, VOP1 to VOP3P. A byte permutation picks four of eight bytes, so two
look up a table, one of its lower half and one of its upper half, for which bit 3 of the codes is
flipped. With a selector of 8 to 11 it gives the sign of byte 1, 3, 5 or 7, with 12 it gives 0, and
above 255: what a permutation finds for codes of the other half. Operands are at most 127, so where
all bytes of the table are inverted but those of codes 4 and 12, the sign is 255 too, and what is
found for the other half turns exactly the inverted ones back: one `xor` ends it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .gpu_pages import operand

BYTES, HALVES = "bytes", "halves"
LOW = 0x00FF00FF
"""The even byte of each half-word."""
TABLE_WORDS = 4
"""Registers that hold a table."""
WHOLE = (4, 12)
"""Codes whose operands a table holds as they are."""


@dataclass(frozen=True, slots=True)
class Planes:
    """What unpacks all planes of two half-words.

    Attributes:
        kind: BYTES or HALVES.
        bits: of a code.
        planes: how many come out.
        moved: whether a second operand shifts the first one.
        table: sixteen operands, 0..127 each, or none.
    """

    kind: str
    bits: int
    planes: int
    moved: bool = False
    table: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Name of the function in the emitted source: with the whole table, if it has one."""
        name = f"{self.kind}_{self.planes}x{self.bits}" + ("_moved" if self.moved else "")
        return f"{name}_{bytes(self.table).hex()}" if self.table else name

    @property
    def results(self) -> int:
        """How many registers are written, $0, $1, ...; operands follow them."""
        if self.table:
            return 4  # where bytes come out, the first two are scratch
        return self.planes if self.kind == BYTES else 2 * self.planes

    @property
    def constants(self) -> tuple[int, ...]:
        """The table as words that stay in registers: inverted, but what codes of WHOLE name."""
        stored = [x if i in WHOLE else x ^ 255 for i, x in enumerate(self.table)]
        parts = (stored[i : i + 4] for i in range(0, len(stored), 4))
        return tuple(int.from_bytes(bytes(part), "little") for part in parts)

    @property
    def apart(self) -> int:
        """Bits from one plane to the next in a half-word; those of a table stand by themselves."""
        return 0 if self.table else 8 // self.planes

    def mask(self, plane: int) -> int:
        """Return the mask of a plane: of one byte, or of one half-word."""
        return ((1 << self.bits) - 1) << (0 if self.kind == BYTES else plane * self.apart)

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instructions; operands are x, what it is moved by, then each constant twice."""
        x, last = f"${self.results}", f"${self.results - 1}"
        if self.table:
            looked_up = (*self._looked_up("$2", x, 0), *self._looked_up("$3", x, 4))
            return looked_up if self.kind == BYTES else (*looked_up, *_halves_of_bytes())
        if self.kind == BYTES:
            return self._bytes(x)
        lines = []
        if self.moved:
            lines.append(f"v_lshrrev_b32 {last}, ${self.results + 1}, {x}")
            x = last
        lines += [f"v_and_b32 ${i}, 0x{self.mask(i):04X}{self.mask(i):04X}, {x}" for i in self._all]
        if self.bits == 8:
            return (*lines, f"v_pk_lshrrev_b16 $1, 8, {x} op_sel_hi:[0,1]")
        lines.append(f"v_lshrrev_b32 {last}, 8, {x}")
        odd = (
            f"v_and_b32 ${self.planes + i}, 0x{self.mask(i):04X}{self.mask(i):04X}"
            for i in self._all
        )
        return (*lines, *(f"{line}, {last}" for line in odd))

    @property
    def _all(self) -> range:
        return range(self.planes)

    def _bytes(self, x: str) -> tuple[str, ...]:
        if self.bits == 8:
            return (f"v_xor_b32 $0, 0x80808080, {x}",)
        mask = f"0x{self.mask(0) * 0x01010101:08X}"
        lines = [f"v_and_b32 $0, {mask}, {x}"]
        for i in range(1, self.planes):
            lines += [f"v_lshrrev_b32 ${i}, {i * self.bits}, {x}", f"v_and_b32 ${i}, {mask}, ${i}"]
        return tuple(lines)

    def _looked_up(self, out: str, x: str, shift: int) -> tuple[str, ...]:
        """Return how `out` becomes the operands of codes at a bit of each byte; $0, $1 change."""
        first = self.results + 1
        t = [f"${first + 2 * i}" for i in range(TABLE_WORDS)]
        return (
            *((f"v_lshrrev_b32 {out}, {shift}, {x}",) if shift else ()),
            f"v_and_b32 {out}, 0x0F0F0F0F, {out if shift else x}",
            f"v_xor_b32 $1, 0x08080808, {out}",
            f"v_perm_b32 $0, {t[1]}, {t[0]}, {out}",
            f"v_perm_b32 $1, {t[3]}, {t[2]}, $1",
            f"v_xor_b32 {out}, $0, $1",
        )

    @property
    def plain(self) -> tuple[str, ...]:
        """What comes out for x, in plain Triton."""
        if self.table:
            low, high = (_entries(self.table, shift) for shift in (0, 4))
            if self.kind == BYTES:
                return tuple(f"({a} | ({b} << 8)).to(tl.int16)" for a, b in (low, high))
            picked = (low[0], high[0], low[1], high[1])
            return tuple(f"{x}.to(tl.int16).to(tl.float16, bitcast=True)" for x in picked)
        if self.kind == BYTES:
            if self.bits == 8:
                return ("x ^ -32640",)
            mask = self.mask(0) * 0x0101
            return tuple(f"(x >> {i * self.bits}) & {mask}" for i in self._all)
        x = "(x >> by)" if self.moved else "x"
        bytes_ = (x, f"({x} >> 8)")
        cast = "to(tl.float16, bitcast=True)"
        return tuple(f"({b} & {self.mask(i)}).{cast}" for b in bytes_ for i in self._all)

    def source(self, *, plain: bool) -> str:
        """Return the function in Triton."""
        arguments = "x, by" if self.moved else "x"
        head = f"\n\n@triton.jit\ndef {self.name}({arguments}):\n"
        if plain:
            return f"{head}    return {', '.join(self.plain)}\n"
        names = [f"t{i}" for i in range(len(self.constants))]
        for name, word in zip(names, self.constants, strict=True):
            head += f"    {name} = tl.full(x.shape, 0x{word:08X}, tl.int32)\n"
        operands = (*arguments.split(", "), *names)
        # NOTE: two numbers of 32 bits are two registers, both the same.
        registers = len(operands) + len(names)
        kind = "tl.int16" if self.kind == BYTES else "tl.float16"
        call = assembly(self.instructions, [kind] * self.results, operands, registers)
        if self.table and self.kind == BYTES:
            return f"{head}    _, _, low, high = {call}    return low, high\n"
        return f"{head}    return {call}"


def assembly(
    lines: tuple[str, ...], results: list[str], operands: tuple[str, ...], registers: int
) -> str:
    """Return a call of assembly on two half-words.

    Args:
        lines: instructions.
        results: type of each.
        operands: in Triton.
        registers: that the operands are in.
    """
    outs = "=v" if len(lines) == 1 else "=&v"
    constraints = [outs] * len(results) + ["v"] * registers
    # NOTE: lines that begin in the first column are not counted as instructions.
    text = "\\n\\t".join(lines)
    dtype = results[0] if len(results) == 1 else f"({', '.join(results)})"
    return (
        f"tl.inline_asm_elementwise(\n"
        f'        "{text}",\n'
        f'        "{",".join(constraints)}",\n'
        f"        [{', '.join(operands)}],\n"
        f"        dtype={dtype},\n"
        f"        is_pure=True,\n"
        f"        pack=2,\n"
        f"    )\n"
    )


def _halves_of_bytes() -> tuple[str, ...]:
    """Return how even and odd bytes of $2 and $3 become four registers of half-words."""
    even = [f"v_and_b32 $0, 0x{LOW:08X}, $2", f"v_and_b32 $1, 0x{LOW:08X}, $3"]
    return (*even, *(f"v_pk_lshrrev_b16 ${i}, 8, ${i} op_sel_hi:[0,1]" for i in (2, 3)))


def _entries(table: tuple[int, ...], shift: int) -> tuple[str, str]:
    """Return the operands that codes at a bit of the even and of the odd byte name, i32."""
    codes = (f"((x.to(tl.int32) >> {at}) & 15)" for at in (shift, shift + 8))
    low, high = (operand(table, code) for code in codes)
    return low, high
