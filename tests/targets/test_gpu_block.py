"""Several queries a row: tokens as plain numbers, and products of float16 with many rows."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvant.ir.encodings import Int
from kvant.ir.halves_block import digits, single
from kvant.ir.plan import AttentionPlan
from kvant.runtime import launch_block
from kvant.runtime.cache import Cache
from kvant.runtime.launch_block import split_tokens
from kvant.targets.gpu import emit, launch_facts
from kvant.targets.gpu_block import pieces_of
from kvant.targets.machines import GPUS

from ..runtime.cache_runner import Case, Seen, random_kv, run_case
from . import gpu_interpreter, gpu_scripts
from .cpu_cases import BOTH, constants_of, int_format, plan_of
from .gpu_interpreter import Interpreter, interpreted

INT4 = int_format(4, "token", 64)
PLAN = plan_of(INT4, INT4, heads=1, group=3, compute="int")
RING = replace(plan_of(INT4, INT4, heads=1, compute="int", k_tokens=BOTH, v_tokens=BOTH), window=90)
SLICED = plan_of(  # of 80 channels, cut into 64 and 16
    int_format(3, "token", 80), int_format(8, "token", 40), heads=1, d=80, compute="int"
)
SCALES = plan_of(  # float32 scales: what is decoded is rounded twice
    int_format(4, "token", 64, params="f32"),
    int_format(2, "token", 32, params="f32"),
    heads=1,
    compute="int",
)
PLANS = {"int4": PLAN, "ring": RING}
STEPS = (("append", 150, None), ("append", 7, None))


def case_of(plan: AttentionPlan, *attends: int, batch: int = 1) -> Case:
    steps = (*STEPS, *(("attend", n) for n in attends))
    start = None if batch == 1 else (0, 17)
    return Case(plan, constants_of(plan), batch, start, steps, seed=3, max_tokens=2_000)


@pytest.mark.long
@pytest.mark.parametrize("plan", [PLAN, RING, SLICED, SCALES], ids=["int4", "ring", "d80", "f32"])
def test_queries_within_p7(plan: AttentionPlan) -> None:
    seen = Seen(garbage=(0xFF,))
    run_case(interpreted, case_of(plan, 2, 60, batch=2), seen=seen)
    assert seen.trusted, "a wrong scale would have passed"
    assert seen.poisoned == 2


def attend_with(plan: AttentionPlan, change: tuple[str, str], queries: int) -> None:
    gpu_scripts.attend_with(plan, (*STEPS, ("attend", queries)), change)


WRONG = [
    ("int4", "position <= newest[:, None]", "position < newest[:, None]"),
    ("int4", "(t[:, None] * 64 + ", "(t[:, None] // 2 * 64 + "),
    ("int4", "k_powers + number)", "k_powers + number) * 1.001"),
    ("int4", "tl.load(v_powers + number)", "tl.load(v_powers + number) + 1.0"),
    ("int4", "* tl.exp2(-lift)", "* tl.exp2(-lift) * 1.001"),
    ("int4", "total * shrink +", "total +"),
    ("int4", "out_0 * shrink[:, None]", "out_0"),
    ("int4", "end = tl.minimum(stop, least + 1 - origin)", "end = tl.minimum(stop, last + 1)"),
    ("int4", "seen = position < length", "seen = position < length - 1"),
    ("int4", "factor = ((127 + exponent)", "factor = ((128 + exponent)"),
    ("int4", "q_0 * lower[:, None]", "q_0 * 1.001 * lower[:, None]"),
    ("ring", "newest[:, None] - 90", "newest[:, None] - 91"),
    ("ring", "(last - 89 - origin", "(least - 89 - origin"),
    ("ring", "at - whole + end", "at - whole + end + 1"),
    ("ring", "(position >= 4)", "(position >= 5)"),
]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [WRONG[0], *(pytest.param(*wrong, marks=pytest.mark.long) for wrong in WRONG[1:])],
)
def test_a_wrong_kernel_is_seen(name: str, old: str, new: str) -> None:
    with pytest.raises(AssertionError, match="times what P7 allows"):
        attend_with(PLANS[name], (old, new), 70)


@pytest.mark.parametrize("name", ["int4", pytest.param("ring", marks=pytest.mark.long)])
def test_the_right_kernel_passes_where_wrong_ones_are_seen(name: str) -> None:
    attend_with(PLANS[name], ("", ""), 70)


def outputs_of(plan: AttentionPlan, power: int) -> Any:
    """Outputs and log-sum-exps over keys and values times 2^power, brought back."""
    rng = np.random.default_rng(5)
    cache = Cache([plan], interpreted([plan], [{}]), batch=1, max_tokens=400)
    k, v = random_kv(rng, plan, 1, 135)
    cache.append(0, np.ldexp(k, power), np.ldexp(v, power))
    q = rng.normal(size=(1, plan.q_heads, 9, plan.k.channels)).astype(np.float32)
    out, lse = cache.attend(0, np.ldexp(q, -power), return_lse=True)
    return np.ldexp(out, -power), lse


@pytest.mark.long
def test_powers_of_two_change_nothing() -> None:
    want = outputs_of(PLAN, 0)
    for power in (-30, 30):
        for one, other in zip(outputs_of(PLAN, power), want, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())


@pytest.mark.long
@pytest.mark.parametrize("plan", [PLAN, RING], ids=["int4", "ring"])
def test_scratch_changes_no_bit(plan: AttentionPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits that are unpacked one after another give what they give together."""
    for name in ("LEAST_SPLIT", "MOST_SPLIT"):
        monkeypatch.setattr(launch_block, name, 64)
    cache, _, kernels = gpu_scripts.filled(plan, STEPS)
    kernels._launcher.modules["p0"] = gpu_interpreter.module_of(plan)
    q = np.random.default_rng(6).normal(size=(1, plan.q_heads, 20, 64)).astype(np.float32)
    launched, launch = [], Interpreter.launch
    monkeypatch.setattr(
        Interpreter, "launch", lambda self, *a: (launched.append(a[1]), launch(self, *a))
    )
    whole = cache.attend(0, q, return_lse=True)
    assert launched.count("unpack") == 1
    monkeypatch.setattr(launch_block, "SCRATCH_BYTES", 1)
    parts = cache.attend(0, q, return_lse=True)
    assert launched.count("unpack") > 2
    for one, other in zip(whole, parts, strict=True):
        assert np.array_equal(one, other)


def test_splits_grow_with_queries_alone() -> None:
    plan = plan_of(INT4, INT4, heads=8, group=4, compute="int")
    sizes = [split_tokens(plan, 128, queries) for queries in (2, 33, 128, 512, 1024, 8192)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (launch_block.LEAST_SPLIT, launch_block.MOST_SPLIT)
    assert all(size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize("channels", [16, 64, 72, 80, 96, 128, 192, 256])
def test_pieces_are_the_head(channels: int) -> None:
    pieces = pieces_of(channels, 64)
    assert [piece.first for piece in pieces] == [
        sum(p.inside for p in pieces[:i]) for i in range(len(pieces))
    ]
    assert sum(piece.inside for piece in pieces) == channels
    assert all(16 <= piece.width <= 64 for piece in pieces)
    assert sum(piece.width for piece in pieces) - channels < 16


def test_larger_gpus_take_larger_tiles() -> None:
    facts = {
        name: launch_facts(emit(PLAN, gpu.backend, shared=gpu.shared), gpu.backend)["attend_block"]
        for name, gpu in GPUS.items()
    }
    assert {name for name, fact in facts.items() if fact["tokens"] == 128} == {"sm_90", "sm_100"}
    assert all(fact["type"] == "float16" for fact in facts.values())
    plain = launch_facts(emit(replace(PLAN, compute="float")))["attend_block"]
    assert plain["type"] == "float32"


def test_digits_are_those_of_float16() -> None:
    x = np.random.default_rng(1).normal(size=4096) * 8
    half = digits(x)
    np.testing.assert_array_equal(half, x.astype(np.float16).astype(np.float64))
    np.testing.assert_array_equal(digits(np.ldexp(x, 40)), np.ldexp(half, 40))
    assert digits(np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11])).tolist() == [1.0, 1 + 2.0**-9]


def test_long_scales_are_rounded_as_products_are() -> None:
    x = np.random.default_rng(2).normal(size=(1, 64, 64))
    for params in ("f16", "f32"):
        fmt = Int(4, "token", 64, params=params)  # type: ignore[arg-type]
        fields = fmt.encode(x)
        once = fmt.decode(fields).astype(np.float32)
        assert np.array_equal(single(fmt, fields), once) == (params == "f16")
        np.testing.assert_allclose(single(fmt, fields), once, rtol=1e-5, atol=1e-6)
