"""Sequences that unpack codes: their instructions, evaluated on every half-word, and in plain.

Each form is compared with a meaning in NumPy that knows neither: what code lies in which bits.
"""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gpu_static
import numpy as np
import pytest
import torch

from kvant.ir.errors import KvantError
from kvant.targets.gpu import DIALECTS, HEAD
from kvant.targets.gpu_sequences import GCN, PLAIN, PTX, Entries, Sequence
from kvant.targets.gpu_whole import sequences_of

from .cpu_cases import PLANS
from .cpu_pairs import PAIRS
from .cpu_pairs_long import PAIRS_LONG
from .gpu_assembly import Assembly, UnknownInstruction, assembly_of, evaluated
from .gpu_tile_plans import TILED

Array = np.ndarray[Any, np.dtype[Any]]
Unpacks = Sequence | Entries
SHAPES = ("32x8x128", "8x2x64", "4x1x256")
NUMBER = re.compile(r"(?<![\w$])(0x[0-9A-Fa-f]+|\d+)\b")
EVERY = np.arange(1 << 16, dtype=np.int64)


def plans() -> Iterator[Any]:
    yield from (*PLANS.values(), *PAIRS, *PAIRS_LONG, *TILED.values())
    for name in gpu_static.names():
        for shape in SHAPES:
            try:
                yield gpu_static.plan_of(name, shape)
            except KvantError:  # a recipe that does not fit a shape
                continue


@cache
def sequences() -> tuple[Unpacks, ...]:
    found = {s for plan in plans() for d in DIALECTS.values() for s in sequences_of(plan, d)}
    return tuple(sorted(found, key=lambda s: (type(s).__name__, s.lanes, s.name)))


def meaning(sequence: Unpacks, lanes: Array) -> list[Array]:
    """The bits of each result for lanes of the operand, unsigned."""
    if isinstance(sequence, Sequence):
        return [(lanes >> sequence.shift) & sequence.mask]
    table = np.asarray(sequence.operands)
    return [table[(lanes >> at) & 15] for at in range(0, sequence.lanes, 4)]


def lanes_of(registers: Array, lanes: int) -> Array:
    """The lanes of registers, the lowest bits first, [N, 32 / lanes]."""
    return (registers[:, None] >> np.arange(0, 32, lanes)) & ((1 << lanes) - 1)


def registers() -> Array:
    """Every half-word in each half of a register, beside random ones."""
    other = np.random.default_rng(0).integers(0, 1 << 16, len(EVERY))
    return np.concatenate([EVERY | other << 16, other | EVERY << 16])


def is_right(sequence: Unpacks, assembly: Assembly, x: Array) -> bool:
    want = meaning(sequence, lanes_of(x, sequence.lanes))
    try:
        got = evaluated(assembly, x)
    except KeyError:
        return False
    return len(got) == len(want) and all(
        np.array_equal(lanes_of(one, sequence.lanes), other)
        for one, other in zip(got, want, strict=True)
    )


def assemblies(sequence: Unpacks) -> dict[str, Assembly]:
    """The forms that are assembly; where AMD gets none, it gets the plain form."""
    found = {}
    for form in (PTX, GCN):
        assembly = assembly_of(sequence.source(form))
        if assembly is None:
            assert form == GCN, "NVIDIA's compiler unpacks each number alone"
            assert sequence.source(form) == sequence.source(PLAIN)
        else:
            found[form] = assembly
    return found


def test_there_are_sequences_of_every_kind() -> None:
    kinds = {(type(s), s.lanes) for s in sequences()}
    assert {(Sequence, 8), (Sequence, 16), (Entries, 16)} <= kinds
    assert len({s.name for s in sequences()}) == len(sequences()), "two have one name"


def test_instructions_unpack_every_half_word() -> None:
    for sequence in sequences():
        for form, assembly in assemblies(sequence).items():
            assert is_right(sequence, assembly, registers()), (sequence.name, form, assembly.lines)
            kind = "int8" if sequence.lanes == 8 else "float16"
            assert set(assembly.dtypes) == {kind}
            assert assembly.pack == 32 // sequence.lanes
            letter = "r" if form == PTX else "v"
            constraints = (*assembly.outputs, assembly.operand)
            assert {text.strip("=&") for text in constraints} == {letter}


def is_unused(line: str, number: str) -> bool:
    """Whether it is the second operand of a permutation that picks bytes of the first alone."""
    opcode, *_, selector = line.split()
    digits = selector.removeprefix("0x")
    return opcode == "prmt.b32" and number == "0" and digits.isdigit() and max(digits) < "4"


def test_a_wrong_number_in_an_instruction_is_seen() -> None:
    """Every one of them, off by its lowest bit: masks, shifts, selectors, words of tables."""
    count, x = 0, registers()[::37]
    for sequence in sequences():
        for assembly in assemblies(sequence).values():
            for i, line in enumerate(assembly.lines):
                for found in NUMBER.finditer(line):
                    if is_unused(line, found[0]):
                        continue
                    wrong = f"{int(found[0], 0) ^ 1:#x}"
                    line_ = line[: found.start()] + wrong + line[found.end() :]
                    lines = (*assembly.lines[:i], line_, *assembly.lines[i + 1 :])
                    wrong_one = replace(assembly, lines=lines)
                    assert not is_right(sequence, wrong_one, x), (line, line_)
                    count += 1
    assert count > 20


def test_a_register_that_is_written_too_early_is_seen() -> None:
    """Without "&" a compiler may give an output the register of the operand."""
    for sequence in sequences():
        for assembly in assemblies(sequence).values():
            bare = tuple(text.replace("&", "") for text in assembly.outputs)
            if len(bare) > 1:
                assert not is_right(sequence, replace(assembly, outputs=bare), registers()[::37])


def test_an_unknown_instruction_is_named() -> None:
    wrong = Assembly(("brev.b32 $0, $1",), ("=r",), "r", 4, ("int8",))
    with pytest.raises(UnknownInstruction, match=r"'brev.b32' in 'brev.b32 \$0, \$1'"):
        evaluated(wrong, registers())


def run_plain(sequence: Unpacks, x: Array, folder: Path, change: tuple[str, str]) -> list[Array]:
    """The plain form in Triton's interpreter, the bits of each result."""
    kind = "int8" if sequence.lanes == 8 else "float16"
    names = [f"y{i}" for i in range(sequence.results)]
    text = HEAD + sequence.source(PLAIN) + "\n\n@triton.jit\ndef unpack(x, out):\n"
    text += f"    at = tl.arange(0, {len(x)})\n"
    text += f"    {', '.join(names)} = {sequence.name}(tl.load(x + at))\n"
    for i, name in enumerate(names):
        text += f"    tl.store(out + {i * len(x)} + at, {name})\n"
    path = folder / f"{sequence.name}_{sequence.lanes}.py"
    path.write_text(text.replace(*change) if change[0] else text)
    spec = importlib.util.spec_from_file_location("plain", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = torch.zeros((len(names), len(x)), dtype=getattr(torch, kind))
    own = {8: np.uint8, 16: np.uint16}[sequence.lanes]
    module.unpack[(1,)](torch.from_numpy(x.astype(own).view(f"int{sequence.lanes}")), out)
    return [one.astype(np.int64) for one in out.numpy().view(own)]


def check_plain(sequence: Unpacks, folder: Path, change: tuple[str, str] = ("", "")) -> None:
    x = EVERY[: 1 << sequence.lanes]
    got = run_plain(sequence, x, folder, change)
    for one, other in zip(got, meaning(sequence, x), strict=True):
        assert np.array_equal(one, other), sequence.name


def test_the_plain_form_unpacks_every_lane(tmp_path: Path) -> None:
    for sequence in sequences():
        check_plain(sequence, tmp_path)


def test_a_wrong_plain_form_is_seen(tmp_path: Path) -> None:
    for sequence in (Sequence(8, 4, 15), Sequence(16, 8, 240)):
        shift = f">> {sequence.shift}"
        for change in ((shift, ">> 2"), (f"& {sequence.mask}", "& 14")):
            with pytest.raises(AssertionError):
                check_plain(sequence, tmp_path, change)


def test_tables_that_differ_in_one_entry_have_functions_of_their_own() -> None:
    one = tuple(range(16))
    for lanes in (8, 16):
        assert Entries(lanes, one).name != Entries(lanes, (*one[:-1], 100)).name
