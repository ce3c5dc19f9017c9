"""Random scripts through the GPU kernels in Triton's interpreter, against the reference."""

from functools import partial

import pytest

from ..runtime.cache_runner import Case, Seen, run_case
from .cpu_cases import PLANS, constants_of
from .gpu_interpreter import interpreted
from .gpu_scripts import EACH, EACH_LONG, Record, run_cases


@pytest.mark.parametrize("name", PLANS)
def test_random_cases_within_p7(name: str, record_property: Record) -> None:
    run_cases(name, PLANS[name], EACH, 3, record_property)


@pytest.mark.long
@pytest.mark.parametrize("name", PLANS)
def test_many_random_cases_within_p7(name: str, record_property: Record) -> None:
    """Shorter scripts, for the interpreter is slow; there are ten times as many."""
    run_cases(f"{name} long", PLANS[name], EACH_LONG, 1, record_property)


def case_of(name: str, tokens: int) -> Case:
    plan = PLANS[name]
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
        ("int4-token-int", "position <= newest[:, None]", "position <= newest[:, None] + 1"),
        ("kivi-2bit", "k_scale + k_zero", "k_scale"),
        ("kivi-2bit", "(w * sums)", "sums"),
        ("ring", "newest[None, :] - ", "newest[None, :] + 1 - "),
        ("maps", "even - odd", "odd - even"),
        ("slices", "_out_1 * shrink[None, :]", "_out_1"),
        ("dense-sparse", "k_index_1 - 32", "k_index_1 - 33"),
        ("dense-sparse", "v_value_2[:, None]", "0.0"),
        ("lut3-int", "(k_code & 3) << 3", "(k_code & 1) << 3"),
    ],
)
def test_a_wrong_kernel_is_seen(name: str, old: str, new: str) -> None:
    case = case_of(name, 600 if "sums" in old else 140)
    with pytest.raises(AssertionError):
        run_case(partial(interpreted, change=(old, new)), case, seen=Seen(garbage=()))
