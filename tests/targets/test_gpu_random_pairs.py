"""Random scripts through the GPU kernels in the interpreter: plans that cover pairs of options."""

import pytest

from .cpu_pairs import PAIRS
from .cpu_pairs_long import PAIRS_LONG
from .gpu_scripts import EACH, EACH_LONG, Record, run_cases

SHORT = {f"pairs-{i}": plan for i, plan in enumerate(PAIRS)}
LONG = {f"pairs-long-{i}": plan for i, plan in enumerate(PAIRS_LONG)}


@pytest.mark.parametrize("name", SHORT)
def test_random_cases_within_p7(name: str, record_property: Record) -> None:
    run_cases(name, SHORT[name], EACH, 3, record_property)


@pytest.mark.long
@pytest.mark.parametrize("name", SHORT | LONG)
def test_many_random_cases_within_p7(name: str, record_property: Record) -> None:
    run_cases(f"{name} long", (SHORT | LONG)[name], EACH_LONG, 1, record_property)
