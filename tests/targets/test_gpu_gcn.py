"""Heads as rows on AMD: its sequences on all half-words, pages turned around, wrong kernels."""

import importlib.util
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvant.ir.arrangements import ROWS, TILES, TURNED
from kvant.ir.encodings import Sparse
from kvant.ir.layouts import PageLayout
from kvant.runtime.launch_gpu import Kernels
from kvant.targets.gpu import DIALECTS, HEAD, emit
from kvant.targets.gpu_gcn import BYTES, HALVES, Planes
from kvant.targets.gpu_lane_attend import HELPERS
from kvant.targets.gpu_lanes import is_wide, keys_of, values_of
from kvant.targets.gpu_tiles import kinds

from ..runtime.cache_runner import Case, Seen, new_pair, run_step
from . import gpu_interpreter
from .cpu_cases import constants_of, int_format, plan_of
from .gpu_assembly import OPCODES, WORD
from .gpu_interpreter import interpreted
from .gpu_tile_plans import TILED

Array = np.ndarray[Any, np.dtype[Any]]
HIP = DIALECTS["hip"]
WIDE = {name: plan for name, plan in TILED.items() if is_wide(plan)}
MOVED = (0, 2, 4, 6)
NUMBER = re.compile(r"(?<![\w$\[])(0x[0-9A-Fa-f]+|\d+)\b(?!\])")
PACKED = " op_sel_hi:[0,1]"


@cache
def sequences() -> tuple[Planes, ...]:
    """Those of all plans, and the others that a shape of head can ask for."""
    found = {one.sequence for x in WIDE.values() for p in keys_of(x) for one in p.unpacked}
    found |= {p.sequence for x in WIDE.values() for p in values_of(x.v)}
    found = {one for one in found if isinstance(one, Planes)}
    for bits in (2, 4, 8):
        found.add(Planes(BYTES, bits, 8 // bits))
        found |= {Planes(HALVES, bits, n, n * bits < 8) for n in (1, 2, 4) if n * bits <= 8}
    return tuple(sorted(found, key=lambda one: one.name))


def registers() -> Array:
    """Every half-word in each half of a register, beside random ones."""
    every = np.arange(1 << 16, dtype=np.int64)
    other = np.random.default_rng(0).integers(0, 1 << 16, len(every))
    return np.concatenate([every | other << 16, other | every << 16])


def moves(planes: Planes) -> tuple[int, ...]:
    """By how many bits the operand may be moved."""
    if not planes.moved:
        return (0,)
    return tuple(by for by in MOVED if by < planes.apart and by % planes.bits == 0)


def meaning(planes: Planes, x: Array, by: int = 0) -> list[Array]:
    """The registers that come out: of bytes u, the codes of each plane."""
    u = (x[:, None] >> np.arange(0, 32, 8)) & 255
    found, table = [], np.asarray(planes.table)
    for i in range(planes.planes):
        apart = 8 // planes.planes
        code = (u >> (i * apart + by)) & ((1 << planes.bits) - 1)
        if planes.table:
            code = table[code]
        elif planes.kind == BYTES and planes.bits == 8:
            code = (code - 128) & 255
        elif planes.kind == HALVES:
            code = code << i * apart
        found.append(code)
    if planes.kind == BYTES:
        return [(code << np.arange(0, 32, 8)).sum(axis=1) for code in found]
    return [c[:, p] | c[:, p + 2] << 16 for p in (0, 1) for c in found]


def packed_shift(by: Array, x: Array) -> Array:
    """v_pk_lshrrev_b16 with the low half of the count for both halves of x."""
    low, high = (x & 0xFFFF) >> (by & 15), (x >> 16) >> (by & 15)
    return low | high << 16


def evaluated(planes: Planes, lines: tuple[str, ...], x: Array, by: int = 0) -> list[Array]:
    given = [x, *([np.full_like(x, by | by << 16)] if planes.moved else [])]
    given += [np.full_like(x, word) for word in planes.constants for _ in range(2)]
    own = {f"${planes.results + i}": one for i, one in enumerate(given)}
    for line in lines:
        opcode, _, rest = line.partition(" ")
        if opcode == "v_pk_lshrrev_b16":
            assert rest.endswith(PACKED), "the high half would be moved by nothing"
            rest, function = rest.removesuffix(PACKED), packed_shift
        else:
            function = OPCODES[opcode]
        target, *names = (name.strip() for name in rest.split(","))
        read = [own[n] if n.startswith("$") else np.full_like(x, int(n, 0)) for n in names]
        own[target] = function(*read) & WORD
    results = [own[f"${i}"] for i in range(planes.results)]
    return results[2:] if planes.table and planes.kind == BYTES else results


def is_right(planes: Planes, lines: tuple[str, ...], x: Array) -> bool:
    return all(
        np.array_equal(one, other)
        for by in moves(planes)
        for one, other in zip(evaluated(planes, lines, x, by), meaning(planes, x, by), strict=True)
    )


def test_there_are_sequences_of_every_kind() -> None:
    kinds_ = {(s.kind, bool(s.table), s.moved) for s in sequences()}
    assert kinds_ == {
        *((kind, table, False) for kind in (BYTES, HALVES) for table in (False, True)),
        (HALVES, False, True),
    }
    assert len({s.name for s in sequences()}) == len(sequences()), "two have one name"


def test_instructions_unpack_every_half_word() -> None:
    for one in sequences():
        assert is_right(one, one.instructions, registers()), (one.name, one.instructions)


def test_the_source_has_the_instructions_and_their_registers() -> None:
    for one in sequences():
        text = one.source(plain=False)
        assert "\\n\\t".join(one.instructions) in text
        constraints = re.search(r'"((?:=&?v,)+(?:v,?)+)"', text)
        assert constraints is not None
        outs = [x for x in constraints[1].split(",") if x.startswith("=")]
        assert len(outs) == one.results
        # An operand is read after a first result was written, so none may share its register.
        assert all("&" in x for x in outs) or len(one.instructions) == 1
        assert constraints[1].count(",") + 1 - len(outs) == 1 + one.moved + 2 * len(one.constants)


def test_a_wrong_number_in_an_instruction_is_seen() -> None:
    count, x = 0, registers()[::37]
    for one in sequences():
        for i, line in enumerate(one.instructions):
            opcode, _, rest = line.partition(" ")
            for found in NUMBER.finditer(rest):
                wrong = f"{rest[: found.start()]}{int(found[0], 0) ^ 1:#x}{rest[found.end() :]}"
                lines = list(one.instructions)
                lines[i] = f"{opcode} {wrong}"
                assert not is_right(one, tuple(lines), x), (line, wrong)
                count += 1
    assert count > 20


def module_of(text: str, folder: Path) -> Any:
    path = folder / "plain.py"
    path.write_text(HEAD + text)
    spec = importlib.util.spec_from_file_location("plain", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_plain(one: Planes, folder: Path, change: tuple[str, str] = ("", "")) -> None:
    x = np.arange(1 << 16, dtype=np.int64)
    text = one.source(plain=True)
    count = len(meaning(one, x[:1]))
    names, given = ", ".join(f"y{i}" for i in range(count)), ", by" if one.moved else ""
    text += "\n\n@triton.jit\ndef unpack(x, by, out):\n"
    text += f"    at = tl.arange(0, {len(x)})\n"
    text += "    by = tl.load(by) + at.to(tl.int16) * 0\n"
    text += f"    {names} = {one.name}(tl.load(x + at){given})\n"
    for i in range(count):
        text += f"    tl.store(out + {i * len(x)} + at, y{i}.to(tl.int16, bitcast=True))\n"
    assert change[0] in text
    module = module_of(text.replace(*change) if change[0] else text, folder)
    for by in moves(one):
        out = torch.zeros((count, len(x)), dtype=torch.int16)
        moved = torch.tensor([by], dtype=torch.int16)
        module.unpack[(1,)](torch.from_numpy(x.astype(np.uint16).view(np.int16)), moved, out)
        for got, want in zip(out.numpy().view(np.uint16), meaning(one, x, by), strict=True):
            assert np.array_equal(got, want & 0xFFFF), one.name


def test_the_plain_form_unpacks_every_half_word(tmp_path: Path) -> None:
    for one in sequences():
        check_plain(one, tmp_path)


def test_a_wrong_plain_form_is_seen(tmp_path: Path) -> None:
    for one, change in (
        (Planes(BYTES, 4, 2), (">> 4", ">> 3")),
        (Planes(BYTES, 8, 1), ("-32640", "-32639")),
        (Planes(HALVES, 4, 1, True), (">> by", ">> 0 * by")),
        (Planes(HALVES, 2, 4), ("& 192)", "& 128)")),
        (Planes(HALVES, 2, 2, True), ("& 48)", "& 12)")),
    ):
        with pytest.raises(AssertionError, match=one.name):
            check_plain(one, tmp_path, change)


def test_how_numbers_are_put_in_order(tmp_path: Path) -> None:
    text = HELPERS + "\n\n@triton.jit\ndef run(x, out):\n    t = tl.arange(0, 8)\n"
    text += "    n = tl.load(x + t)[None, :]\n    h = (n.to(tl.int32) * 256 + n).to(tl.int16)\n"
    for i, what in enumerate(("in_bytes(h)", "in_line(n, n + 8)", "by_turns(n, n + 8)")):
        text += f"    tl.store(out + {16 * i} + tl.arange(0, 16)[None, :], {what}.to(tl.int16))\n"
    text += "    tl.store(out + 48 + t[None, :], in_turn(n))\n"
    out = torch.zeros(56, dtype=torch.int16)
    module_of(text, tmp_path).run[(1,)](torch.arange(8, dtype=torch.int16), out)
    got = out.numpy()
    assert got[:16].tolist() == [i // 2 for i in range(16)]
    assert got[16:32].tolist() == list(range(16))
    assert got[32:48].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert got[48:].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_codes_are_turned_around() -> None:
    layouts = {k: PageLayout(64, 2, 64, int_format(4, "token", 32), k) for k in (ROWS, TURNED)}
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (2, 64, 64)).astype(np.uint8)
    scale = rng.normal(size=(2, 64, 2)).astype(np.float16)
    fields = {"codes": codes, "scale": scale, "zero": -scale}
    pages = {kind: layout.pack(fields) for kind, layout in layouts.items()}
    for field in layouts[TURNED].fields:
        own = slice(field.offset, field.offset + field.nbytes)
        rows, turned = (pages[k][own].view(field.dtype) for k in (ROWS, TURNED))
        assert np.array_equal(turned, rows.reshape(field.shape).T.ravel()), field.name
    for name, values in layouts[TURNED].unpack(pages[TURNED]).items():
        assert np.array_equal(values, fields[name])


def test_which_plans_are_read_so() -> None:
    for name, plan in WIDE.items():
        assert kinds(plan, HIP) == (TILES, TURNED), name
        assert kinds(plan, DIALECTS["cuda"]) == (TILES, TILES), name
    fmt = int_format(4, "token", 64)
    sparse = plan_of(fmt, Sparse(fmt, 2), compute="int")
    three = plan_of(int_format(3, "token", 64), fmt, compute="int")
    assert not is_wide(sparse)
    assert is_wide(three)
    assert is_wide(plan_of(fmt, fmt, group=8, compute="int"))
    assert not is_wide(plan_of(fmt, fmt, group=9, compute="int"))
    assert TURNED not in kinds(sparse, HIP)


@cache
def filled(name: str) -> tuple[Any, Any, Kernels]:
    """A cache of a plan with whole tiles and a rest, its oracle and its kernels."""
    plan, made = TILED[name], []

    def factory(*arguments: Any) -> Kernels:
        made.append(partial(interpreted, backend="hip")(*arguments))
        return made[0]

    case = Case(plan, constants_of(plan), 1, None, (), seed=3, max_tokens=2_000)
    cache_, oracles = new_pair(factory, case)
    for step in (("append", 235, None), ("append", 6, None)):
        run_step(cache_, oracles, step, np.random.default_rng(3), exact=False)
    return cache_, oracles, made[0]


def attend_with(name: str, change: tuple[str, str]) -> None:
    cache_, oracles, kernels = filled(name)
    kernels._launcher.modules["p0"] = gpu_interpreter.module_of(TILED[name], change, "hip")
    seen, rng = Seen(garbage=()), np.random.default_rng(4)
    run_step(cache_, oracles, ("attend", 1), rng, exact=False, seen=seen)


WRONG = [
    ("int4", "tl.minimum(place + 128, newest)", "tl.minimum(place + 64, newest)"),
    ("int4", "v_w_0 = in_turn(w)", "v_w_0 = w"),
    ("int4", "n * scale[None, :] +", "n * 1.001 * scale[None, :] +"),
    ("kivi2", "k_q0_0_exact * zero_0", "k_q0_0_exact * zero_1"),
]
MORE_WRONG = [
    ("int4", "best = most", "best = most + 1"),
    ("int8", "* -256", "* -255"),
    ("int8", " - 128.0 * ", " - 127.0 * "),
    ("kivi2", "// 32 * 2)", "// 32 * 4)"),
    ("int3", "v_column // 16 + 30", "v_column // 16 + 31"),
    ("int3", "v_column % 16", "v_column % 8"),
    ("int3", "(k_words_1, k_high)", "(k_words_0, k_high)"),
    ("int3-d96", "+ 4) // 2", "+ 0) // 2"),
    ("kivi2", "column // 2 + 16", "column // 2"),
    ("kivi4", "* 8.0", "* 7.0"),
    ("kivi4-int", "less_0 + less_1", "less_0"),
    ("kivi4-32", "half_0, half_1", "half_0, half_0"),
    ("bfp", ">> t % 4 * 8", ">> t % 4 * 4"),
    ("int8-groups", "v_column) // 32) == 1", "v_column) // 32) == 0"),
]


def assert_caught(name: str, old: str, new: str) -> None:
    assert old in emit(TILED[name], "hip", plain=True).text(), f"the kernels have no {old!r}"
    with pytest.raises(AssertionError, match="times what P7 allows"):
        attend_with(name, (old, new))


@pytest.mark.parametrize(("name", "old", "new"), WRONG)
def test_a_wrong_kernel_is_seen(name: str, old: str, new: str) -> None:
    assert_caught(name, old, new)


@pytest.mark.long
@pytest.mark.parametrize(("name", "old", "new"), MORE_WRONG)
def test_another_wrong_kernel_is_seen(name: str, old: str, new: str) -> None:
    assert_caught(name, old, new)


def test_the_kernels_as_they_are_pass() -> None:
    for name in {name for name, _, _ in WRONG}:
        attend_with(name, ("", ""))
