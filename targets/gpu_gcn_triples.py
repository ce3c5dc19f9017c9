"""Short sequences of AMD's instructions for codes of three bits; see `gpu_gcn.py`.

Two bits of a code stand in a byte of the field of codes, four planes of them, and the third in a
byte of another field, eight planes: bit 2 i of it belongs to plane i of the first half of the
columns, bit 2 i + 1 to plane i of the second half. So one move of a register brings the third bits
of all four planes of a column above their low ones, and one instruction that picks bits from two
registers puts every second plane together, between bits that a mask takes out.

    bytes_4x3_<h>        x, high -> 4 i16     codes of each plane, both bytes, of columns of half h
    halves_4x3_<h>       x, high -> 8 f16     the same of the even byte, then of the odd one, as
                                              float16: plane i is worth 2^(2 i - 24)
    halves_<n>x3_moved   x, high, turn        the half is that of each lane: `turn` says by how
                                              many bits the third bits move down, modulo 32
                         ..., by              for n < 4: every (4 / n)th plane, after `by` bits
"""

from __future__ import annotations

from dataclasses import dataclass

from .gpu_gcn import BYTES, assembly

LOW = 0x3333
"""Of a half-word, the low bits of every second plane."""
ABOVE = 2
"""The bit of a code that is its third."""


@dataclass(frozen=True, slots=True)
class Triples:
    """What unpacks planes of two half-words and of those with their third bits.

    Attributes:
        kind: BYTES or HALVES.
        planes: how many come out, of four.
        half: of the columns, or None where each lane has its own.
    """

    kind: str
    planes: int
    half: int | None = None

    @property
    def name(self) -> str:
        """Name of the function in the emitted source."""
        return f"{self.kind}_{self.planes}x3_{'moved' if self.half is None else self.half}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """Operands, i16 each; their registers follow the results, and the last one is a mask."""
        if self.half is not None:
            return ("x", "high")
        return ("x", "high", "turn") if self.planes == 4 else ("x", "high", "turn", "by")

    @property
    def results(self) -> int:
        """How many registers are written, $0, $1, ..."""
        return self.planes if self.kind == BYTES else 2 * self.planes

    @property
    def apart(self) -> int:
        """Bits from one plane to the next."""
        return 8 // self.planes

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instructions; operands are the arguments, then the mask."""
        if self.kind == BYTES:
            return self._bytes()
        return self._all_halves() if self.planes == 4 else self._some_halves()

    def _register(self, name: str) -> str:
        return f"${self.results + (*self.arguments, 'mask').index(name)}"

    def _bytes(self) -> tuple[str, ...]:
        x, high, mask = (self._register(name) for name in ("x", "high", "mask"))
        odd = (f"v_lshrrev_b32 $2, 1, {high}",) if self.half else ()
        codes = "0x07070707"
        return (
            f"v_lshlrev_b32 $0, {ABOVE - (self.half or 0)}, {high}",
            f"v_bfi_b32 $0, {mask}, {x}, $0",
            f"v_lshrrev_b32 $1, 2, {x}",
            *odd,
            f"v_bfi_b32 $1, {mask}, $1, {'$2' if odd else high}",
            "v_lshrrev_b32 $2, 4, $0",
            "v_lshrrev_b32 $3, 4, $1",
            *(f"v_and_b32 ${i}, {codes}, ${i}" for i in range(4)),
        )

    def _all_halves(self) -> tuple[str, ...]:
        x, high, mask = (self._register(name) for name in ("x", "high", "mask"))
        turn = self._register("turn") if self.half is None else str(32 - ABOVE + self.half)
        # The first byte: planes 0 and 2 in $6, planes 1 and 3 in $3; the third bits stay in $7.
        return (
            f"v_alignbit_b32 $7, {high}, {high}, {turn}",
            f"v_bfi_b32 $6, {mask}, {x}, $7",
            f"v_bfi_b32 $3, {mask}, $7, {x}",
            *_masked(("$0", "$1", "$2", "$3"), "$6", "$3"),
            f"v_lshrrev_b32 $5, 8, {x}",
            "v_alignbit_b32 $7, $7, $7, 8",
            f"v_bfi_b32 $6, {mask}, $5, $7",
            f"v_bfi_b32 $7, {mask}, $7, $5",
            *_masked(("$4", "$5", "$6", "$7"), "$6", "$7"),
        )

    def _some_halves(self) -> tuple[str, ...]:
        x, high, turn, by, mask = (self._register(n) for n in (*self.arguments, "mask"))
        last = f"${self.results - 1}"
        codes = [f"0x{(7 << 4 * i) * 0x00010001:08X}" for i in range(self.planes)]
        even = (f"v_and_b32 ${i}, {code}, {last}" for i, code in enumerate(codes))
        odd = (f"v_and_b32 ${self.planes + i}, {code}, {last}" for i, code in enumerate(codes))
        return (
            f"v_lshrrev_b32 $0, {by}, {x}",
            f"v_alignbit_b32 {last}, {high}, {high}, {turn}",
            f"v_bfi_b32 {last}, {mask}, $0, {last}",
            *even,
            f"v_lshrrev_b32 {last}, 8, {last}",
            *odd,
        )

    @property
    def plain(self) -> str:
        """What comes out, in plain Triton, by way of `third`: bit 2 is the third of plane 0."""
        terms = []
        if self.kind == BYTES:
            for i in range(4):
                codes = f"((x >> {2 * i}) & 771) | ((third >> {2 * i}) & 1028)"
                terms.append(f"({codes}).to(tl.int16)")
            return ", ".join(terms)
        by = " + by" if "by" in self.arguments else ""
        for down in (0, 8):
            for i in range(self.planes):
                low, top = (bits << i * self.apart for bits in (3, 1 << ABOVE))
                codes = f"((x >> ({down}{by})) & {low}) | ((third >> {down}) & {top})"
                terms.append(f"({codes}).to(tl.int16).to(tl.float16, bitcast=True)")
        return ", ".join(terms)

    def source(self, *, plain: bool) -> str:
        """Return the function in Triton."""
        head = f"\n\n@triton.jit\ndef {self.name}({', '.join(self.arguments)}):\n"
        if plain:
            turn = f"(turn + {ABOVE}) % 32" if self.half is None else str(self.half)
            third = f"((high.to(tl.int32) & 65535) << {ABOVE}) >> ({turn})"
            return f"{head}    third = {third}\n    return {self.plain}\n"
        kind = "tl.int16" if self.kind == BYTES else "tl.float16"
        operands = (*self.arguments, "mask")
        call = assembly(self.instructions, [kind] * self.results, operands, len(operands))
        return f"{head}    mask = tl.full(x.shape, {LOW}, tl.int16)\n    return {call}"


def _masked(outs: tuple[str, ...], even: str, odd: str) -> tuple[str, ...]:
    """Return how four planes of a byte come out of registers with every second one of them."""
    masks = (f"0x{(7 << 2 * i) * 0x00010001:08X}" for i in range(4))
    sources = (even, odd, even, odd)
    each = zip(outs, masks, sources, strict=True)
    return tuple(f"v_and_b32 {out}, {mask}, {given}" for out, mask, given in each)
