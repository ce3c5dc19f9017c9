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
from kvant.targets.gpu_compile import WORDS, check_words
from kvant.targets.gpu_lookups import Entries, EntriesApart, Held, Unpacker, words_of
from kvant.targets.gpu_sequences import GCN, PLAIN, PTX, Named, Sequence, Times, Triples
from kvant.targets.gpu_whole import sequences_of

from .cpu_cases import PLANS
from .cpu_pairs import PAIRS
from .cpu_pairs_long import PAIRS_LONG
from .gpu_assembly import Assembly, UnknownInstruction, assembly_of, evaluated
from .gpu_tile_plans import TILED

Array = np.ndarray[Any, np.dtype[Any]]
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
def sequences() -> tuple[Unpacker, ...]:
    found = {s for plan in plans() for d in DIALECTS.values() for s in sequences_of(plan, d)}
    return tuple(sorted(found, key=lambda s: (type(s).__name__, s.lanes, s.name)))


def meaning(sequence: Unpacker, lanes: Array, *others: Array) -> list[Array]:
    """The bits of each result for lanes of the operands, unsigned."""
    match sequence:
        case Sequence():
            return [((lanes >> sequence.shift) & sequence.mask) ^ sequence.flip]
        case Entries():
            table = np.asarray(sequence.operands)
            return [table[(lanes >> at) & 15] for at in range(0, sequence.lanes, 4)]
        case EntriesApart():
            return entries_apart(np.asarray(sequence.operands), lanes)
        case Held():
            return [lanes, *(np.full_like(lanes, word) for word in sequence.words)]
        case Triples():
            return [code_of_three(sequence, i, lanes, *others) for i in range(sequence.results)]
        case Times():
            x, y = (one.astype(np.uint16).view(np.float16) for one in (lanes, *others))
            with np.errstate(all="ignore"):
                return [(x * y).view(np.uint16).astype(np.int64)]
        case Named():
            x, y, z = (one.astype(np.uint16).view(np.float16) for one in (lanes, *others))
            is_one = (x == y).astype(np.float16)
            with np.errstate(all="ignore"):
                return [(is_one * z).view(np.uint16).astype(np.int64)]


def entries_apart(table: Array, lanes: Array) -> list[Array]:
    """Of each word of four bytes, the codes of the first two bytes and then of the last two."""
    pairs = lanes.reshape(-1, 2, 2)
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(-1, 2, 4)
    halves = (codes[:, i].reshape(lanes.shape) for i in range(2))
    return [np.where(own, table[c], 0) for c in halves for own in (c < 8, c >= 8)]


def code_of_three(sequence: Triples, number: int, low: Array, high: Array, factor: Array) -> Array:
    """Code `number` in its place: its low two bits, and its third bit of a pair."""
    byte, plane = divmod(number, 4) if sequence.lanes == 16 else (0, number)
    place = 2 * (plane % 2) if sequence.lanes == 8 else 2 * plane
    low, high = low >> 8 * byte, high >> 8 * byte
    third = np.where(factor == 4, high >> 2 * plane, high >> 2 * plane + 1) & 1
    return (((low >> 2 * plane) & 3) | third << 2) << place


def lanes_of(registers: Array, lanes: int) -> Array:
    """The lanes of registers, the lowest bits first, [N, 32 / lanes]."""
    return (registers[:, None] >> np.arange(0, 32, lanes)) & ((1 << lanes) - 1)


def registers() -> Array:
    """Every half-word in each half of a register, beside random ones."""
    other = np.random.default_rng(0).integers(0, 1 << 16, len(EVERY))
    return np.concatenate([EVERY | other << 16, other | EVERY << 16])


def operands_of(sequence: Unpacker, x: Array) -> tuple[Array, ...]:
    """x, and what a sequence takes beside it: random registers, and factors of all lanes."""
    rng = np.random.default_rng(1)
    match sequence:
        case Triples():
            factor = sum(1 << at for at in range(0, 32, sequence.lanes))
            return x, rng.permutation(x), rng.choice([2, 4], len(x)) * factor
        case Times():
            return x, rng.permutation(x)
        case Named():  # integers, of which some are equal, and numbers
            small = rng.integers(0, 4, (4, len(x))).astype(np.float16).view(np.uint16)
            a, b, c, d = small.astype(np.int64)
            return a | b << 16, c | d << 16, x & 0xBFFFBFFF
        case Held():  # the number of a tile
            return (x & 0x7FFFFFFF,)
    return (x,)


def tables_of(sequence: Unpacker, x: Array) -> dict[str, Array]:
    """The registers of the kernel that a lookup finds its table in."""
    if not isinstance(sequence, Entries | EntriesApart):
        return {}
    held = Held(words_of(sequence.operands))
    fill = assembly_of(held.source(PTX))
    assert fill is not None
    return dict(zip(fill.kept, evaluated(fill, *operands_of(held, x))[1:], strict=True))


def is_right(sequence: Unpacker, assembly: Assembly, x: Array) -> bool:
    given = operands_of(sequence, x)
    want = meaning(sequence, *(lanes_of(one, sequence.lanes) for one in given))
    try:
        got = evaluated(assembly, *given, held=tables_of(sequence, x))
    except KeyError:
        return False
    return len(got) == len(want) and all(
        np.array_equal(lanes_of(one, sequence.lanes), other)
        for one, other in zip(got, want, strict=True)
    )


def assemblies(sequence: Unpacker) -> dict[str, Assembly]:
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
    assert {
        (Sequence, 8),
        (Sequence, 16),
        (Entries, 16),
        (EntriesApart, 8),
        (Held, 32),
        (Triples, 8),
        (Triples, 16),
    } <= kinds
    assert any(isinstance(s, Sequence) and s.flip for s in sequences())
    assert {Times(), Named()} <= set(sequences())
    # One kernel has one `Held` at most.
    unpackers = [s for s in sequences() if not isinstance(s, Held)]
    assert len({s.name for s in unpackers}) == len(unpackers), "two have one name"


def test_instructions_unpack_every_half_word() -> None:
    for sequence in sequences():
        for form, assembly in assemblies(sequence).items():
            assert is_right(sequence, assembly, registers()), (sequence.name, form, assembly.lines)
            kind = {8: "int8", 16: "float16", 32: "int32"}[sequence.lanes]
            assert set(assembly.dtypes) == {kind}
            assert assembly.pack == 32 // sequence.lanes
            letter = "r" if form == PTX else "v"
            constraints = (*assembly.outputs, *assembly.operands)
            assert {text.strip("=&") for text in constraints} == {letter}


def is_unused(lines: tuple[str, ...], i: int, number: str) -> bool:
    """Whether it is the second operand of a permutation, not picked, or masked out later."""
    opcode, *_, selector = lines[i].split()
    digits = selector.removeprefix("0x")
    is_picked = not digits.isdigit() or max(digits) >= "4"
    is_last = i + 1 == len(lines)
    return opcode == "prmt.b32" and number == "0" and not (is_picked and is_last)


def test_a_wrong_number_in_an_instruction_is_seen() -> None:
    """Every one of them, off by its lowest bit or the next: masks, shifts, selectors, tables."""
    count, x = 0, registers()[::37]
    for sequence in sequences():
        for assembly in assemblies(sequence).values():
            for i, line in enumerate(assembly.lines):
                for found in NUMBER.finditer(line):
                    if is_unused(assembly.lines, i, found[0]):
                        continue
                    numbers = (f"{int(found[0], 0) ^ bit:#x}" for bit in (1, 2))
                    wrong = (line[: found.start()] + n + line[found.end() :] for n in numbers)
                    changed = ((*assembly.lines[:i], w, *assembly.lines[i + 1 :]) for w in wrong)
                    made = (replace(assembly, lines=lines) for lines in changed)
                    assert not all(is_right(sequence, one, x) for one in made), (line, found[0])
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
    wrong = Assembly(("brev.b32 $0, $1",), ("=r",), ("r",), 4, ("int8",))
    with pytest.raises(UnknownInstruction, match=r"'brev.b32' in 'brev.b32 \$0, \$1'"):
        evaluated(wrong, registers())


def run_plain(
    sequence: Unpacker, given: tuple[Array, ...], folder: Path, change: tuple[str, str]
) -> list[Array]:
    """The plain form in Triton's interpreter, the bits of each result."""
    kind = {8: "int8", 16: "float16", 32: "int32"}[sequence.lanes]
    names, count = [f"y{i}" for i in range(sequence.results)], len(given[0])
    takes = [f"x{i}" for i in range(len(given))]
    text = HEAD + sequence.source(PLAIN)
    text += f"\n\n@triton.jit\ndef unpack({', '.join(takes)}, out):\n"
    numbers = f"tl.arange(0, {count // 4})[:, None] * 4 + tl.arange(0, 4)[None, :]"
    numbers = numbers if isinstance(sequence, EntriesApart) else f"tl.arange(0, {count})"
    text += f"    at = {numbers}\n"
    loads = ", ".join(f"tl.load({name} + at)" for name in takes)
    text += f"    {', '.join(names)} = {sequence.name}({loads})\n"
    for i, name in enumerate(names):
        text += f"    tl.store(out + {i * count} + at, {name})\n"
    path = folder / f"{sequence.name}_{sequence.lanes}.py"
    path.write_text(text.replace(*change) if change[0] else text)
    spec = importlib.util.spec_from_file_location("plain", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = torch.zeros((len(names), count), dtype=getattr(torch, kind))
    own = {8: np.uint8, 16: np.uint16, 32: np.uint32}[sequence.lanes]
    is_float = isinstance(sequence, Times | Named)
    dtype = "float16" if is_float else f"int{sequence.lanes}"
    tensors = (torch.from_numpy(x.astype(own).view(dtype)) for x in given)
    module.unpack[(1,)](*tensors, out)
    return [one.astype(np.int64) for one in out.numpy().view(own)]


def check_plain(sequence: Unpacker, folder: Path, change: tuple[str, str] = ("", "")) -> None:
    numbers = EVERY[: 1 << sequence.lanes]
    if isinstance(sequence, EntriesApart):
        numbers = np.random.default_rng(2).integers(0, 256, 1 << 12)
    every = operands_of(sequence, numbers)
    given = [one & ((1 << sequence.lanes) - 1) for one in every]
    got = run_plain(sequence, tuple(given), folder, change)
    for one, other in zip(got, meaning(sequence, *given)[: sequence.results], strict=True):
        if isinstance(sequence, Times | Named):  # a NaN may have any bits, a zero any sign
            halves = (x.astype(np.uint16).view(np.float16) for x in (one, other))
            assert np.array_equal(*halves, equal_nan=True), sequence.name
        else:
            assert np.array_equal(one, other), sequence.name


def test_the_plain_form_unpacks_every_lane(tmp_path: Path) -> None:
    for sequence in sequences():
        check_plain(sequence, tmp_path)


def test_a_wrong_plain_form_is_seen(tmp_path: Path) -> None:
    table = EntriesApart(tuple(range(0, 96, 6)))
    for change in (("(0, 1, 3, 4, 2)", "(0, 1, 2, 3, 4)"), (">> 4", ">> 3"), ("< 8", "< 7")):
        with pytest.raises(AssertionError):
            check_plain(table, tmp_path, change)
    for sequence in (Sequence(8, 4, 15), Sequence(16, 8, 240)):
        shift = f">> {sequence.shift}"
        for change in ((shift, ">> 2"), (f"& {sequence.mask}", "& 14")):
            with pytest.raises(AssertionError):
                check_plain(sequence, tmp_path, change)


def test_bytes_of_several_rows_in_a_register_are_refused() -> None:
    def line(layout: str, mark: str = WORDS) -> str:
        kind = f"tensor<64x64xi8, {layout}>"
        return f'%1:2 = tt.elementwise_inline_asm "{{ {mark} prmt" %0 : {kind} -> {kind}, {kind}'

    check_words(line("#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>"))
    check_words(line("#blocked", mark=""))
    with pytest.raises(ValueError, match=r"a table's codes are not an operand: .*#blocked"):
        check_words(line("#blocked"))


def test_tables_that_differ_in_one_entry_have_functions_of_their_own() -> None:
    one = tuple(range(16))
    for kind in (Entries, EntriesApart):
        assert kind(one).name != kind((*one[:-1], 100)).name
