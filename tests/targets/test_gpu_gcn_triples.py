"""Codes of three bits on AMD: their sequences on all pairs of bytes, in assembly and in Triton."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvant.targets.gpu import emit
from kvant.targets.gpu_gcn import BYTES, HALVES
from kvant.targets.gpu_gcn_triples import LOW, Triples

from .gpu_assembly import Assembly, assembly_of, evaluated
from .test_gpu_gcn import NUMBER, WIDE, module_of

Array = np.ndarray[Any, np.dtype[Any]]
ALL = (
    *(Triples(kind, 4, half) for kind in (BYTES, HALVES) for half in (0, 1)),
    *(Triples(HALVES, planes) for planes in (1, 2, 4)),
)
EVERY = np.arange(1 << 16, dtype=np.int64)


def places(one: Triples) -> list[tuple[int, int]]:
    """(share, half) of the lanes that call it."""
    halves = (0, 1) if one.half is None else (one.half,)
    return [(share, half) for half in halves for share in range(4 // one.planes)]


def moves(one: Triples, share: int, half: int) -> dict[str, int]:
    """What the operands by the side of the registers are."""
    every = {"turn": (2 * share + half - 2) % 32, "by": 2 * share}
    return {name: x for name, x in every.items() if name in one.arguments}


def registers(seed: int = 0) -> tuple[Array, Array]:
    """Every pair of bytes, of codes and of third bits, in each byte; the others are random."""
    rng = np.random.default_rng(seed)
    x, high = rng.integers(0, 1 << 32, (2, 4, 1 << 16))
    for i in range(4):
        kept = ~(255 << 8 * i)
        x[i] = x[i] & kept | (EVERY & 255) << 8 * i
        high[i] = high[i] & kept | (EVERY >> 8) << 8 * i
    return x.reshape(-1), high.reshape(-1)


def meaning(one: Triples, x: Array, high: Array, share: int, half: int) -> list[Array]:
    """The registers that come out; bytes of half-words count as two of four here."""
    u, v = ((y[:, None] >> np.arange(0, 32, 8)) & 255 for y in (x, high))
    found = []
    for j in range(one.planes):
        i = j * (4 // one.planes) + share
        code = (u >> 2 * i) & 3 | ((v >> (2 * i + half)) & 1) << 2
        found.append(code << j * 8 // one.planes if one.kind == HALVES else code)
    if one.kind == BYTES:
        return [(code << np.arange(0, 32, 8)).sum(axis=1) for code in found]
    return [c[:, p] | c[:, p + 2] << 16 for p in (0, 1) for c in found]


def is_right(one: Triples, assembly: Assembly, x: Array, high: Array) -> bool:
    for share, half in places(one):
        both = [n | n << 16 for n in (*moves(one, share, half).values(), LOW)]
        given = [np.full_like(x, n) for n in both]
        got = evaluated(assembly, x, high, *given)
        want = meaning(one, x, high, share, half)
        if not all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)):
            return False
    return True


def test_all_that_plans_call_are_here() -> None:
    found = {
        text.split("(")[0]
        for plan in WIDE.values()
        for text in re.findall(r"(?:bytes|halves)_\dx3_\w+\(", source_of(plan))
    }
    assert found == {one.name for one in ALL}


def source_of(plan: Any) -> str:
    return emit(plan, "hip", plain=True).text()


def test_instructions_unpack_every_pair_of_bytes() -> None:
    x, high = registers()
    for one in ALL:
        assembly = assembly_of(one.source(plain=False))
        assert assembly is not None
        assert len(assembly.outputs) == one.results
        assert all("&" in text for text in assembly.outputs), "an operand is read later"
        assert is_right(one, assembly, x, high), (one.name, assembly.lines)


def test_a_wrong_number_in_an_instruction_is_seen() -> None:
    count, (x, high) = 0, (y[::37] for y in registers(1))
    for one in ALL:
        assembly = assembly_of(one.source(plain=False))
        assert assembly is not None
        for i, line in enumerate(assembly.lines):
            opcode, _, rest = line.partition(" ")
            for found in NUMBER.finditer(rest):
                wrong = f"{rest[: found.start()]}{int(found[0], 0) ^ 1:#x}{rest[found.end() :]}"
                lines = list(assembly.lines)
                lines[i] = f"{opcode} {wrong}"
                changed = replace(assembly, lines=tuple(lines))
                assert not is_right(one, changed, x, high), (line, wrong)
                count += 1
    assert count > 50


def check_plain(one: Triples, folder: Path, change: tuple[str, str] = ("", "")) -> None:
    x, high = (y[:, None] >> np.array([0, 16]) & 0xFFFF for y in (z[::3] for z in registers(2)))
    names = ", ".join(f"y{i}" for i in range(one.results))
    more = "".join(f", {name}" for name in one.arguments[2:])
    text = one.source(plain=True)
    text += "\n\n@triton.jit\ndef unpack(x, high, turn, by, out):\n"
    text += "    at = tl.program_id(0) * 32768 + tl.arange(0, 32768)\n"
    text += "    turn = tl.load(turn) + at.to(tl.int16) * 0\n"
    text += "    by = tl.load(by) + at.to(tl.int16) * 0\n"
    inside = f"mask=at < {x.size}, other=0"
    text += f"    x, high = tl.load(x + at, {inside}), tl.load(high + at, {inside})\n"
    text += f"    {names} = {one.name}(x, high{more})\n"
    for i in range(one.results):
        stored = f"y{i}.to(tl.int16, bitcast=True)"
        text += f"    tl.store(out + {i * x.size} + at, {stored}, mask=at < {x.size})\n"
    assert change[0] in text
    module = module_of(text.replace(*change) if change[0] else text, folder)
    given = [torch.from_numpy(y.reshape(-1).astype(np.uint16).view(np.int16)) for y in (x, high)]
    for share, half in places(one):
        out = torch.zeros((one.results, x.size), dtype=torch.int16)
        moved = {"turn": 0, "by": 0} | moves(one, share, half)
        own = [torch.tensor([moved[name]], dtype=torch.int16) for name in ("turn", "by")]
        module.unpack[(-(-x.size // 32768),)](*given, *own, out)
        word = x[:, 0] | x[:, 1] << 16
        want = meaning(one, word, high[:, 0] | high[:, 1] << 16, share, half)
        for got, register in zip(out.numpy().view(np.uint16), want, strict=True):
            halves = got.reshape(-1, 2).astype(np.int64)
            assert np.array_equal(halves[:, 0] | halves[:, 1] << 16, register), one.name


def test_the_plain_form_unpacks_every_pair_of_bytes(tmp_path: Path) -> None:
    for one in ALL:
        check_plain(one, tmp_path)


def test_a_wrong_plain_form_is_seen(tmp_path: Path) -> None:
    for one, change in (
        (Triples(BYTES, 4, 1), ("& 1028)", "& 1032)")),
        (Triples(BYTES, 4, 0), (">> (0)", ">> (1)")),
        (Triples(HALVES, 4, 0), ("& 256)", "& 512)")),
        (Triples(HALVES, 2), ("8 + by", "8 + 0 * by")),
        (Triples(HALVES, 1), ("(turn + 2)", "(turn + 1)")),
    ):
        with pytest.raises(AssertionError, match=one.name):
            check_plain(one, tmp_path, change)
