"""Instructions of the inner loops: static, so no noise; budgets that may only fall."""

import pytest

from kvant.ir.encodings import Bfp, Raw
from kvant.ir.plan import AttentionPlan
from kvant.targets.cpu import emit
from kvant.targets.cpu_counts import instructions_per_element
from kvant.targets.cpu_quads import path_of, why_floats
from kvant.targets.machines import CPUS

from .cpu_cases import DENSE_SPARSE, HEADLINE, SPLIT, int_format, plan_of


def headline(k: object, v: object, heads: int = 8, group: int = 4) -> AttentionPlan:
    return plan_of(k, v, heads=heads, group=group, d=128, compute="int")  # type: ignore[arg-type]


INT4, INT8, INT2, INT3 = (int_format(bits, "token", 128) for bits in (4, 8, 2, 3))
PLANS = {
    "int4": headline(INT4, INT4),
    "int4-mha": headline(INT4, INT4, heads=32, group=1),
    "int8": headline(INT8, INT8),
    "int2": headline(INT2, INT2),
    "int3": headline(INT3, INT3),
    "kivi-4bit": headline(int_format(4, "channel", 32), int_format(4, "token", 32)),
    "bfp": headline(Bfp(4, 32), Bfp(4, 32)),
}
# (keys, values), for each element of a KV head and all query heads of its group.
BUDGET = {
    ("int4", "x86-64-v3"): (0.37, 0.49),
    ("int4", "znver4"): (0.14, 0.18),
    ("int4", "neoverse-v2"): (0.69, 0.85),
    ("int4-mha", "x86-64-v3"): (0.17, 0.19),
    ("int4-mha", "znver4"): (0.06, 0.08),
    ("int8", "x86-64-v3"): (0.99, 0.75),
    ("int8", "znver4"): (0.27, 0.25),
    ("int2", "x86-64-v3"): (0.37, 0.49),
    ("int2", "znver4"): (0.15, 0.19),
    ("int3", "znver4"): (0.18, 0.25),
    ("kivi-4bit", "x86-64-v3"): (0.37, 0.50),
    ("kivi-4bit", "znver4"): (0.14, 0.14),
    ("bfp", "znver4"): (0.20, 0.14),
}
# Lower than this share of its budget, a count shows that the budget is out of date.
SLACK = 0.85


@pytest.mark.parametrize(("plan", "cpu"), BUDGET, ids=lambda x: x)
def test_inner_loops_stay_within_their_budget(plan: str, cpu: str) -> None:
    counts = instructions_per_element(PLANS[plan], CPUS[cpu])
    for role, most in zip("kv", BUDGET[plan, cpu], strict=True):
        count = counts[role]
        assert count is not None
        assert count <= most, f"{role}: {count:.3f} instructions for each element"
        assert count >= SLACK * most, f"{role}: {count:.3f}; lower the budget of {most}"


def test_a_wasted_instruction_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvant.targets import cpu_pages

    right = cpu_pages.bit_field
    monkeypatch.setattr(
        cpu_pages,
        "bit_field",
        lambda raw, shift, bits, lanes: right(
            f"T.bitwise_xor({raw}, T.broadcast(T.uint8(85), {lanes}))", shift, bits, lanes
        ),
    )
    counts = instructions_per_element(PLANS["int4"], CPUS["x86-64-v3"])
    assert counts["k"] is not None
    assert counts["k"] > BUDGET["int4", "x86-64-v3"][0]


def test_a_stream_in_floats_has_no_count_and_says_why() -> None:
    v3 = CPUS["x86-64-v3"]
    assert instructions_per_element(HEADLINE, v3) == {"k": None, "v": None}
    assert why_floats(HEADLINE, "k") == "the recipe says compute = float"
    mixed = headline(Raw("bf16"), INT4)
    assert "raw, sliced and sparse" in path_of(mixed, "k", v3)
    assert path_of(mixed, "v", v3) == "integer dot products (pmaddubsw, pmaddwd)"
    assert path_of(mixed, "v", CPUS["neoverse-v2"]) == "integer dot products (usdot)"
    sinks = plan_of(INT4, INT4, d=128, compute="int", k_tokens={"sink": 4})
    assert why_floats(sinks, "k") is None
    assert "different numbers of first tokens" in str(why_floats(sinks, "v"))
    odd = plan_of(int_format(4, "token", 2), int_format(4, "channel", 16), compute="int")
    for role in ("k", "v"):
        assert "whole lanes" in str(why_floats(odd, role))
    for plan in (SPLIT, DENSE_SPARSE):
        assert why_floats(plan, "k") is not None


def test_the_path_stands_beside_the_kernel() -> None:
    source = emit(PLANS["int4"], CPUS["znver4"])
    text = next(kernel.source() for kernel in source.kernels if kernel.name == "attend")
    assert "vpdpbusd.512" in text
    assert "llvm.prefetch" in text
