"""Compiled kernels over rings of pages: what was given back is never read."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvant.ir.plan import AttentionPlan
from kvant.runtime.cache import Cache
from kvant.runtime.stream import Floats, Stream

from ..runtime.cache_random import make_case
from ..runtime.cache_runner import Case, Seen, random_kv, run_case
from .cpu_cases import PLANS, Constants, constants_of, loaded

WINDOWED = [name for name, plan in PLANS.items() if plan.window is not None]

# Long enough that pages come back; then one query and several, and rows with right padding.
SCRIPT = (
    ("append", 250, None),
    ("attend", 9),
    *(("append", 20, None), ("attend", 20), ("attend", 1)) * 6,
    ("append", 90, (90, 3)),
    ("attend", 90),
    ("append", 1, None),
    ("attend", 1),
    ("flush",),
    ("attend", 12),
    ("truncate", 40),
    ("attend", 1),
    ("reorder", (1, 1)),
    ("append", 300, None),
    ("attend", 150),
)


class Trapped:
    """The compiled kernels, for which every page that is not there is a page of NaN."""

    def __init__(self, plans: list[AttentionPlan], constants: list[Constants]) -> None:
        self.right = loaded(plans, constants)
        self.update = self.right.update
        self.memory, self.check = self.right.memory, self.right.check
        self.layouts, self.steps = self.right.layouts, self.right.steps

    def attend(self, layer: int, q: Floats, k: Stream, v: Stream) -> tuple[Floats, Floats]:
        return self.right.attend(layer, q, _trap(k), _trap(v))


def _trap(stream: Stream) -> Stream:
    page = stream.pool.capacity - 1
    assert stream.pool.high <= page
    stream.pages[page] = 0xFF
    return replace(stream, table=np.where(stream.table < 0, page, stream.table))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVANT_NUM_THREADS", "1")


def test_windows_of_all_sizes_are_here() -> None:
    """Smaller than a page, and larger; the default ring, other floats, and quantized."""
    plans = [PLANS[name] for name in WINDOWED]
    assert {plan.window for plan in plans} >= {7, 64, 100}
    assert {plan.k.tokens.quantizes for plan in plans} == {True, False}
    assert any(plan.k.tokens.rest == plan.k.tokens.raw for plan in plans)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("start", [None, (0, 30)])
def test_rings_within_p7_over_poison(name: str, start: Any) -> None:
    plan = PLANS[name]
    seen = Seen()
    case = Case(plan, constants_of(plan), 2, start, SCRIPT, seed=5, max_tokens=900)
    cache = run_case(Trapped, case, seen=seen)
    (layer,) = cache.layers
    assert (layer.k.held >= 128).all()
    assert (layer.v.held >= 128).all()
    assert seen.trusted
    assert seen.poisoned == 2 * sum(step[0] == "attend" for step in SCRIPT)


@pytest.mark.parametrize("name", WINDOWED)
def test_random_scripts_of_long_rows(name: str) -> None:
    plan, rng = PLANS[name], np.random.default_rng(11)
    given_back = 0
    for _ in range(12):
        case = make_case(rng, plan, constants_of(plan))
        begin = (("append", int(rng.integers(200, 330)), None), ("attend", 3))
        case = replace(case, steps=begin + case.steps, max_tokens=700)
        given_back += int((run_case(Trapped, case).layers[0].k.held > plan.k.tokens.sink).any())
    assert given_back > 5


def test_many_windows_in_constant_memory() -> None:
    """Ten windows through the ring of 64 tokens: the pages of the first are used to the end."""
    plan = PLANS["ring"]
    cache = Cache([plan], loaded([plan], [{}]), max_tokens=4096)
    k, v = random_kv(np.random.default_rng(0), plan, 1, 1000)
    highs = []
    for at in range(1000):
        cache.append(0, k[:, :, at : at + 1], v[:, :, at : at + 1])
        highs.append(sum(pool.high for pool in cache.pools.values()))
    assert highs[-1] == highs[300] == 2 * 3
    cache.flush()
    assert cache.bytes() == plan.bytes(1000)
