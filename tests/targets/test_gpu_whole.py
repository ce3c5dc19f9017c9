"""Pages in tiles: whole tiles as the matrix units read them, the rest, and what is no tile."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from kvant.ir.arrangements import ROWS, TILES, TURNED
from kvant.ir.encodings import Bfp, Lut, Raw, Sparse
from kvant.ir.encodings.lut import LLOYD, NF4
from kvant.ir.plan import AttentionPlan
from kvant.runtime.cache import Cache
from kvant.runtime.launch_reference import whole_tiles_of
from kvant.targets import gpu
from kvant.targets.gpu import emit, launch_facts
from kvant.targets.gpu_tiles import kinds, why_floats

from ..runtime.cache_runner import Case, Seen, random_kv, run_case
from . import gpu_interpreter, gpu_scripts
from .cpu_cases import BOTH, constants_of, int_format, plan_of
from .gpu_interpreter import Interpreter, interpreted
from .gpu_tile_plans import SINKS, TILED

# What is appended last is not encoded yet. Before it lie pages that are no whole tile.
SCRIPT = (("append", 215, None), ("append", 45, None), ("attend", 1), ("attend", 2))
SHORT = (("append", 235, None), ("append", 6, None), ("attend", 1))
TWO_SPLITS = (("append", 590, None), ("append", 10, None), ("attend", 1))
WHERE = {"int4": TILED["int4"], "kivi2": TILED["kivi2"]}


def case_of(plan: AttentionPlan, steps: Any = SCRIPT, batch: int = 1) -> Case:
    start = None if batch == 1 else (0, 17)
    return Case(plan, constants_of(plan), batch, start, steps, seed=3, max_tokens=2_000)


def tiles_of(cache: Cache, plan: AttentionPlan) -> list[tuple[int, int]]:
    return whole_tiles_of(plan, *cache.layers[0].streams)


def check_script(plan: AttentionPlan, backend: str = "cuda", garbage: Any = (0xFF,)) -> None:
    seen = Seen(garbage=garbage)
    cache = run_case(partial(interpreted, backend=backend), case_of(plan, batch=2), seen=seen)
    attends = sum(step[0] == "attend" for step in SCRIPT)
    assert seen.trusted, "a wrong scale would have passed"
    assert seen.poisoned == len(garbage) * attends
    for (begin, end), length in zip(tiles_of(cache, plan), cache.lengths, strict=True):
        assert begin < end < length, "the script shows nothing of tiles, or nothing of the rest"


@pytest.mark.parametrize("name", TILED)
def test_a_script_within_p7(name: str) -> None:
    check_script(TILED[name])


@pytest.mark.parametrize("name", TILED)
def test_a_script_within_p7_on_amd(name: str) -> None:
    check_script(TILED[name], "hip", (0xFF, 0x7A))


def test_a_script_with_learned_sinks() -> None:
    check_script(SINKS, garbage=())


def test_the_plans_are_of_every_kind() -> None:
    plans = TILED.values()
    assert {plan.group for plan in plans} >= set(range(1, 10))
    assert {plan.k.channels for plan in plans} >= {64, 96, 128, 256}
    formats = [(s.role, s.tokens.rest) for plan in plans for s in (plan.k, plan.v)]
    tokens = {(r, f.bits, f.zero) for r, f in formats if getattr(f, "axis", "") == "token"}
    assert {(b, z) for r, b, z in tokens} >= {
        (b, z) for b in (8,) for z in ("none", "int", "float")
    }
    assert {(b, z) for r, b, z in tokens} >= {(2, "none"), (2, "int"), (2, "float")}
    assert {(b, z) for r, b, z in tokens} >= {(4, "int"), (4, "float")}
    channel = {(f.zero, f.group) for _, f in formats if getattr(f, "axis", "") == "channel"}
    assert {zero for zero, _ in channel} == {"none", "int", "float"}
    assert {group for _, group in channel} >= {64, 128}
    assert {(r, f.mantissa) for r, f in formats if isinstance(f, Bfp)} == {
        (r, bits) for r in "kv" for bits in (4, 8)
    }
    assert {r for r, f in formats if isinstance(f, Lut)} == {"k", "v"}
    for option in ("softcap", "window"):
        assert any(getattr(plan, option) for plan in plans)
    assert any(plan.k.tokens.sink for plan in plans)


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_plans_of_tiles_take_the_fast_path(backend: str) -> None:
    for name, plan in TILED.items():
        assert why_floats(plan) is None, name
        source = emit(plan, backend)
        facts = launch_facts(source, backend)
        assert facts["layouts"] == kinds(plan, gpu.DIALECTS[backend])
        assert facts["layouts"] in ((TILES, TILES), (TILES, TURNED))
        assert facts["rest_tokens"] > 0
        (attend,) = (x for x in source.kernels if x.name == "attend")
        loop = attend.source().split("if split < splits")[1].split("    else:\n")[0]
        assert "tl.range(first" in loop
        # No scale meets a code, and nothing is masked but heads that are not there.
        assert "tl.float16" in loop or "_n," in loop
        assert "tail" not in loop
        assert "_here" not in loop


def channel(bits: int, group: int, **fields: Any) -> Any:
    return int_format(bits, "channel", group, **fields)


INT4 = int_format(4, "token", 64)
LIMITS = "scales of channels take f16, and groups of 32 tokens"
FLOATS: dict[str, tuple[AttentionPlan, str]] = {
    "float": (plan_of(INT4, INT4), "the recipe says compute = float"),
    "sinks": (
        plan_of(INT4, INT4, compute="int", k_tokens=BOTH),
        "keys and values keep different numbers of first tokens raw",
    ),
    "raw": (plan_of(INT4, Raw("f16"), compute="int"), "values: raw formats are read in floats"),
    "sparse": (
        plan_of(INT4, Sparse(INT4, 2, values="bf16"), compute="int"),
        "values: sparse entries in other types than f16",
    ),
    "table": (
        plan_of(INT4, Lut(2, 64, *LLOYD[2]), compute="int"),
        "values: no sequence unpacks the codes",
    ),
    "values": (plan_of(INT4, channel(4, 64), compute="int"), "values: scales of channels"),
    "three-bits": (
        plan_of(int_format(3, "token", 80), int_format(4, "token", 80), d=80, compute="int"),
        "keys: three bits take a multiple of 32 channels",
    ),
    "odd-planes": (
        plan_of(int_format(4, "token", 20), int_format(2, "token", 20), d=20, compute="int"),
        "values: scales or planes of an odd number of bytes",
    ),
    "odd-groups": (
        plan_of(int_format(4, "token", 96), int_format(4, "token", 3), d=96, compute="int"),
        "values: scales or planes of an odd number of bytes",
    ),
    "each": (
        plan_of(INT4, int_format(8, "token", 1), compute="int"),
        "values: a scale for each number",
    ),
    "few-results": (
        plan_of(
            int_format(4, "token", 16),
            Sparse(int_format(4, "token", 16), 1),
            group=1,
            d=16,
            compute="int",
        ),
        "values: three bits and sparse entries take more results of a KV head",
    ),
    "groups": (plan_of(channel(4, 48), INT4, compute="int"), f"keys: {LIMITS}"),
    "bf16": (plan_of(channel(4, 64, params="bf16"), INT4, compute="int"), f"keys: {LIMITS}"),
}


@pytest.mark.parametrize("name", FLOATS)
def test_why_pages_are_no_tiles(name: str) -> None:
    plan, why = FLOATS[name]
    assert why_floats(plan) == why
    assert kinds(plan) == (ROWS, ROWS)
    assert launch_facts(emit(plan))["rest_tokens"] == 0


@pytest.mark.parametrize("name", WHERE)
def test_splits_of_whole_tiles_are_merged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grids, launch = [], Interpreter.launch
    monkeypatch.setattr(
        Interpreter, "launch", lambda self, *a: (grids.append(a[1:3]), launch(self, *a))
    )
    run_case(interpreted, case_of(WHERE[name], TWO_SPLITS), seen=Seen(garbage=(0xFF,)))
    ((_, parts, _),) = {grid for kernel, grid in grids if kernel == "attend"}
    assert parts >= 3  # two splits, and a part of the rest


def test_a_shorter_row_may_have_more_splits() -> None:
    """33 tiles in splits of two are 17, and 32 tiles in splits of one are 32."""
    kernels = interpreted([TILED["int4"]], [{}])
    kernels._launches["p0"] = {**kernels._launches["p0"], "most_splits": 32, "least_tiles": 1}
    tokens = 64 * np.array([33, 32])
    assert kernels.parts(0, tokens, tokens)[0] == 32


def test_a_long_row_has_longer_splits_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("gpu", "gpu_whole"):
        monkeypatch.setattr(f"kvant.targets.{where}.MOST_SPLITS", 2)
    fmt = int_format(4, "token", 64)
    plan = plan_of(fmt, fmt, heads=1, group=3, compute="int")
    case = case_of(plan, (("append", 1_150, None), ("append", 1, None), ("attend", 1)))
    grids, launch = [], Interpreter.launch
    monkeypatch.setattr(
        Interpreter, "launch", lambda self, *a: (grids.append(a[1:3]), launch(self, *a))
    )
    run_case(interpreted, replace(case, max_tokens=2_000), seen=Seen(garbage=()))
    ((_, parts, _),) = {grid for kernel, grid in grids if kernel == "attend"}
    assert parts == 2 + 1  # 17 tiles in splits of 9, not of 8; and a part of the rest


def test_a_cache_that_was_cut_inside_a_tile() -> None:
    steps = (("append", 215, None), ("flush",), ("truncate", 30), ("attend", 1))
    plan = replace(TILED["int2"], window=None)
    cache = run_case(interpreted, case_of(plan, steps), seen=Seen(garbage=(0xFF,)))
    assert tiles_of(cache, plan) == [(4, 132)]


def outputs_of(plan: AttentionPlan, power: int, change: tuple[str, str] = ("", "")) -> Any:
    """Output and log-sum-exp over values times 2^power, the output divided by it again."""
    rng = np.random.default_rng(5)
    cache = Cache([plan], interpreted([plan], [{}], change), batch=1, max_tokens=400)
    for tokens in (135, 6):
        k, v = random_kv(rng, plan, 1, tokens)
        cache.append(0, k, np.ldexp(v, power))
    q = rng.normal(size=(1, plan.q_heads, 1, plan.k.channels)).astype(np.float32)
    out, lse = cache.attend(0, q, return_lse=True)
    return np.ldexp(out, -power), lse


@pytest.mark.parametrize("fmt", [Lut(4, 64, NF4), Bfp(8, 64), INT4], ids=["nf4", "bfp", "int4"])
def test_tiles_of_zeros_change_nothing(fmt: Any) -> None:
    """Scales of zero have no exponent to take out of weights."""
    plan, rng = plan_of(INT4, fmt, heads=1, compute="int"), np.random.default_rng(6)
    cache = Cache([plan], interpreted([plan], [{}]), batch=1, max_tokens=400)
    k, v = random_kv(rng, plan, 1, 200)
    v[:, :, :128] = 0.0  # two tiles, whose sums would overflow
    for part in (slice(0, 195), slice(195, 200)):  # what is due is encoded by the next append
        cache.append(0, k[:, :, part], v[:, :, part])
    q = 1e-3 * rng.normal(size=(1, plan.q_heads, 1, plan.k.channels)).astype(np.float32)
    out, lse = cache.attend(0, q, return_lse=True)
    assert np.isfinite(lse).all()
    weights = np.exp(k[0, 0] @ q[0, 0, 0] * plan.scale)
    want = weights @ v[0, 0] / weights.sum()
    assert np.abs(out[0, 0, 0] - want).max() < 0.15 * np.abs(want).max()


@pytest.mark.parametrize(
    ("name", "power"), [("int4", -7), ("int4", 12), ("int4-int8", -30), ("int4-int8", 30)]
)
def test_powers_of_two_of_values_change_nothing(name: str, power: int) -> None:
    """Exponents of scales are taken out of weights: float16 holds few of them."""
    plan = TILED[name]
    want = outputs_of(plan, 0)
    for one, other in zip(outputs_of(plan, power), want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())
    if abs(power) == 30:  # bfloat16
        with np.errstate(all="ignore"):
            wrong, _ = outputs_of(plan, power, (" + lift)", ")"))
        assert not np.allclose(wrong, want[0], rtol=0.1)


def attend_with(plan: AttentionPlan, change: tuple[str, str]) -> None:
    """Attend with kernels that are changed, and hold the output to P7."""
    gpu_scripts.attend_with(plan, SHORT, change)


def assert_caught(plan: AttentionPlan, old: str, new: str) -> None:
    text = emit(plan, plain=True).text()
    assert old in text[: text.index("def unpack(")], f"the kernels have no {old!r}"
    with pytest.raises(AssertionError, match="times what P7 allows"):
        attend_with(plan, (old, new))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        # whole tiles: masks and shifts of the sequences
        ("int4", "((x >> 4) & 15)", "((x >> 3) & 15)"),
        ("int4", "(x & 255)", "(x & 127)"),
        ("int4", "halves_8_ff(v_b0)", "halves_0_ff(v_b0)"),
        ("int8", "^ -128", "^ -127"),
        ("int3", "& 64)", "& 32)"),
        ("int3", "4.0, 2.0", "2.0, 2.0"),
        ("int3", "n = n >> 2", "n = n >> 1"),
        ("int3-channel", "4.0, 2.0", "4.0, 4.0"),
        # scales and zero points
        ("kivi2", "(weight * v_scale_2[:, None])", "(weight * v_scale_1[:, None])"),
        ("kivi2", "weight * zero[:, None]", "weight * 0.999"),
        ("kivi2", "(scales >> 16)", "scales"),
        ("kivi2", "beside = tl.dot", "beside = 0.999 * tl.dot"),
        ("kivi2", "// 32 * 2, place", "// 32 * 3, place"),
        ("kivi2", "column % 2 * 16", "column % 2 * 15"),
        ("kivi4-32", "beside = k_beside_1", "beside = k_beside_0"),
        ("slices-32", "+ (tl.arange(0, 2) * 32)", "+ (tl.arange(0, 2) * 0)"),
        ("int4-d256", "((k_t & 1) << 4)", "((k_t & 1) << 3)"),
        ("int4-d256", "((v_t & 1) << 4)", "((v_t & 2) << 3)"),
        ("int4-d256", "+ (v_t >> 1)", "+ ((v_t + 2) >> 1)"),
        ("kivi4", "-4.76837158203125e-07", "-4.172325134277344e-07"),
        ("kivi4-int", "k_b0_1_1_zero *", "k_b0_1_0_zero *"),
        ("int4", "n * scale[:, None] + zero[:, None] * k_sum_0", "n * scale[:, None] + k_sum_0"),
        ("int8-groups", "k_sum_1", "k_sum_0"),
        ("bfp", "<< 23).to(tl.float32, bitcast=True)", "<< 22).to(tl.float32, bitcast=True)"),
        # what a middle stands for
        ("int8", "- 128.0 * ", "- 127.0 * "),
        ("int8-groups", "(128.0 - ", "(127.0 - "),
        ("int8", "n = n * 256", "n = n * 255"),
        ("int8-groups", "k_b32_0_sum * 128", "k_b32_0_sum * 127"),
        # sparse entries
        ("sparse", "score += asked", "score += 0.99 * asked"),
        ("sparse", "v_t % 4 * 8", "v_t % 4 * 4"),
        ("sparse", "tl.where(x == y, z, 0.0)", "tl.where(x == y + 1, z, 0.0)"),
        ("sparse", "back = tl.exp2(-gap)", "back = 0.998 * tl.exp2(-gap)"),
        # the softmax
        ("int4", "v_b0_1_1_out * shrink)", "v_b0_1_1_out)"),
        ("int4", "total = total * shrink +", "total = total +"),
        ("int4", "v_zeros_0 * shrink + ", "v_zeros_0 + "),
        ("int4", "(v_b0_1_0_out - v_b0_0_0_out)", "(v_b0_1_0_out)"),
        # which tokens
        ("int4-ring", "first = first_tile +", "first = 1 + first_tile +"),
        ("int4", "tiles, last_tile)", "tiles, last_tile - 1)"),
        ("int4", "place = tile * 64", "place = first * 64"),
        ("int4", "whole_end = last_tile.to(tl.int64) * 64", "whole_end = last_tile * 64 + 16"),
        ("int4-ring", "whole_begin = first_tile.to(tl.int64) * 64 + 4", "whole_begin = oldest"),
        # the rest
        ("int4", "here = i < count", "here = i < count - 8"),
        ("int4-ring", "oldest = tl.maximum(length - 150, 0)", "oldest = length - 120"),
        ("int4", "k_codes & 15", "k_codes & 7"),
        ("int4", "v_place % 64", "v_place % 32"),
        ("int4-ring", "tl.where(i < before, oldest + i, ", "tl.where(i < 0, oldest + i, "),
    ],
)
def test_a_wrong_kernel_is_seen(name: str, old: str, new: str) -> None:
    assert_caught(TILED[name], old, new)


@pytest.mark.parametrize("new", ["index - own", "index + splits"])
def test_a_part_that_is_merged_from_elsewhere_is_seen(new: str) -> None:
    with pytest.raises(AssertionError, match="times what P7 allows"):
        attend_with(TILED["int4-ring"], ("index - own + splits", new))


@pytest.mark.parametrize("name", ["int4", "int4-ring"])
def test_the_right_kernel_passes_where_wrong_ones_are_seen(name: str) -> None:
    attend_with(TILED[name], ("", ""))


def test_a_rest_that_is_read_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs read it: the interpreter gets all tokens of a part at once elsewhere."""
    monkeypatch.setattr(gpu, "replace", lambda x, rest=0, **others: replace(x, **others))
    monkeypatch.setattr(gpu_interpreter, "module_of", gpu_interpreter.module_of.__wrapped__)
    plan = TILED["int4-ring"]
    tokens = gpu.DIALECTS["cuda"].rest
    assert re.search(rf"for at in range\(rest, count, {tokens}\)", emit(plan, plain=True).text())
    attend_with(plan, ("", ""))
    assert_caught(plan, "mass = mass * shrink", "mass = mass")
    assert_caught(plan, "v_out_0 * shrink[None, :]", "v_out_0")
