"""Random scripts through the GPU kernels in Triton's interpreter, against the reference."""

import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from kvant.ir.plan import AttentionPlan

from ..runtime.cache_random import make_case
from ..runtime.cache_runner import Case, Seen, run_case
from .cpu_cases import PLANS, constants_of
from .cpu_pairs import PAIRS, PAIRS_LONG
from .gpu_interpreter import interpreted

Record = Callable[[str, object], None]
SHORT = PLANS | {f"pairs-{i}": plan for i, plan in enumerate(PAIRS)}
LONG = {f"pairs-long-{i}": plan for i, plan in enumerate(PAIRS_LONG)}
IN_ALL, IN_ALL_LONG = 200, 2_000


@pytest.mark.parametrize("name", SHORT)
def test_random_cases_within_p7(name: str, record_property: Record) -> None:
    run_cases(name, SHORT[name], -(-IN_ALL // len(SHORT)), 3, record_property)


@pytest.mark.long
@pytest.mark.parametrize("name", SHORT | LONG)
def test_many_random_cases_within_p7(name: str, record_property: Record) -> None:
    plans = SHORT | LONG
    # Shorter scripts, for the interpreter is slow; there are ten times as many.
    run_cases(f"{name} long", plans[name], -(-IN_ALL_LONG // len(plans)), 1, record_property)


def case_of(name: str, tokens: int) -> Case:
    plan = SHORT[name]
    steps = (("append", tokens, None), ("append", 40, None), ("attend", 1), ("attend", 3))
    return Case(plan, constants_of(plan), 1, None, steps, seed=3, max_tokens=2_000)


@pytest.mark.parametrize("name", ["kivi-2bit", "int4-token-int", "ring", "raw", "maps"])
@pytest.mark.parametrize("tokens", [140, 476, 600, 1_500])
def test_splits_are_merged(name: str, tokens: int) -> None:
    """One split, just two, two, and three; the first ones behind the window of a ring."""
    run_case(interpreted, case_of(name, tokens), seen=Seen(garbage=(0xFF,)))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("int4-token-int", "v_codes & 15", "v_codes & 7"),
        ("int4-token-int", "newest[:, None])", "newest[:, None] + 1)"),
        ("kivi-2bit", "k_scale + k_zero", "k_scale"),
        ("kivi-2bit", "(w * sums)", "sums"),
        ("ring", "newest[:, None] - ", "newest[:, None] + 1 - "),
        ("maps", "even - odd", "odd - even"),
        ("slices", "_out_1 * shrink[:, None]", "_out_1"),
        ("dense-sparse", "k_index_1 - 32", "k_index_1 - 33"),
        ("dense-sparse", "v_value_2[:, None]", "0.0"),
    ],
)
def test_a_wrong_kernel_is_seen(name: str, old: str, new: str) -> None:
    case = case_of(name, 600 if "sums" in old else 140)
    with pytest.raises(AssertionError):
        run_case(partial(interpreted, change=(old, new)), case, seen=Seen(garbage=()))


def run_cases(
    name: str, plan: AttentionPlan, count: int, appends: int, record_property: Record
) -> None:
    rng, constants = np.random.default_rng(zlib.crc32(f"gpu {name}".encode())), constants_of(plan)
    worst = 0.0
    for i in range(count):
        seen = Seen(garbage=(0xFF,) if i % 3 == 0 else ())  # the interpreter is slow
        case = make_case(rng, plan, constants, most_columns=200, most_appends=appends)
        run_case(interpreted, case, seen=seen)
        worst = max(worst, seen.worst)
    record_property("cases of scripts through the GPU kernels in the interpreter, within P7", count)
    assert worst > 0
