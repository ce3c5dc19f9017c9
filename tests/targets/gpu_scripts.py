"""Scripts through the GPU kernels in Triton's interpreter: random ones, and those of wrong kernels.

The interpreter is slow, so the plans are shared out over two files, which run side by side.
"""

import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from kvant.ir.plan import AttentionPlan
from kvant.runtime.cache import Cache
from kvant.runtime.launch_gpu import Kernels

from ..runtime.cache_oracle import Oracle
from ..runtime.cache_random import make_case
from ..runtime.cache_runner import Case, Seen, new_pair, run_case, run_step
from . import gpu_interpreter
from .cpu_cases import PLANS, constants_of
from .cpu_pairs import PAIRS
from .cpu_pairs_long import PAIRS_LONG
from .gpu_interpreter import interpreted

Record = Callable[[str, object], None]
MOST_QUERIES = 20  # two tiles; the kernels before and after them go query by query
SHORT = len(PLANS) + len(PAIRS)
EACH = -(-200 // SHORT)
EACH_LONG = -(-2_000 // (SHORT + len(PAIRS_LONG)))


def run_cases(
    name: str, plan: AttentionPlan, count: int, appends: int, record_property: Record
) -> None:
    rng, constants = np.random.default_rng(zlib.crc32(f"gpu {name}".encode())), constants_of(plan)
    worst = 0.0
    for i in range(count):
        seen = Seen(garbage=(0xFF,) if i % 3 == 0 else ())  # the interpreter is slow
        sizes = {"most_columns": 200, "most_appends": appends, "most_queries": MOST_QUERIES}
        case = make_case(rng, plan, constants, **sizes)
        run_case(interpreted, case, seen=seen)
        worst = max(worst, seen.worst)
    record_property("cases of scripts through the GPU kernels in the interpreter, within P7", count)
    assert worst > 0


@lru_cache
def filled(plan: AttentionPlan, appends: Any) -> tuple[Cache, list[Oracle], Kernels]:
    """A cache after some appends, its oracle and its kernels: one for all wrong kernels."""
    made: list[Kernels] = []

    def factory(*arguments: Any) -> Kernels:
        made.append(interpreted(*arguments))
        return made[0]

    case = Case(plan, constants_of(plan), 1, None, appends, seed=3, max_tokens=2_000)
    cache, oracles = new_pair(factory, case)
    for step in appends:
        run_step(cache, oracles, step, np.random.default_rng(3), exact=False)
    return cache, oracles, made[0]


def attend_with(plan: AttentionPlan, steps: Any, change: tuple[str, str]) -> None:
    """Attend, the last of some steps, with kernels that are changed; hold the output to P7."""
    cache, oracles, kernels = filled(plan, steps[:-1])
    kernels._launcher.modules["p0"] = gpu_interpreter.module_of(plan, change)
    seen, rng = Seen(garbage=()), np.random.default_rng(4)
    run_step(cache, oracles, steps[-1], rng, exact=False, seen=seen)
