"""Random scripts through the GPU kernels in Triton's interpreter: how many, and how they are run.

The interpreter is slow, so the plans are shared out over two files, which run side by side.
"""

import zlib
from collections.abc import Callable

import numpy as np

from kvant.ir.plan import AttentionPlan

from ..runtime.cache_random import make_case
from ..runtime.cache_runner import Seen, run_case
from .cpu_cases import PLANS, constants_of
from .cpu_pairs import PAIRS
from .cpu_pairs_long import PAIRS_LONG
from .gpu_interpreter import interpreted

Record = Callable[[str, object], None]
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
        case = make_case(rng, plan, constants, most_columns=200, most_appends=appends)
        run_case(interpreted, case, seen=seen)
        worst = max(worst, seen.worst)
    record_property("cases of scripts through the GPU kernels in the interpreter, within P7", count)
    assert worst > 0
