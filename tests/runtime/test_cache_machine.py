"""Hypothesis drives cache and oracle through any order of calls."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from kvant.ir.encodings import Bfp, Int, Raw, Tokens
from kvant.ir.plan import AttentionPlan, StreamPlan
from kvant.runtime.cache import Cache
from kvant.runtime.launch_reference import Kernels

from .cache_oracle import Oracle
from .cache_runner import Case, Step, new_pair, run_step

K = Tokens(Int(2, "channel", 16, zero="int"), sink=2, recent=16, flush="block")
V = Tokens(Bfp(4, 16), sink=1, recent=3)
PLAN = AttentionPlan(
    q_heads=2,
    scale=0.3,
    softcap=None,
    window=None,
    q_maps=(),
    k=StreamPlan("k", 1, 16, (), K, 16),
    v=StreamPlan("v", 1, 16, (), V, 8),
    out_maps=(),
)


class CacheMachine(RuleBasedStateMachine):
    """Two rows, small pages; `run_step` compares after every call."""

    plan = PLAN
    cache: Cache
    oracles: list[Oracle]

    @initialize(start=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)))
    def begin(self, start: tuple[int, int] | None) -> None:
        case = Case(self.plan, {}, 2, start, (), seed=0, max_tokens=120)
        self.cache, self.oracles = new_pair(Kernels, case)
        self.rng = np.random.default_rng(0)

    def run(self, *step: object) -> None:
        one: Step = tuple(step)
        run_step(self.cache, self.oracles, one, self.rng, exact=True)

    @rule(tokens=st.integers(0, 20), padding=st.none() | st.tuples(*[st.integers(0, 20)] * 2))
    def append(self, tokens: int, padding: tuple[int, int] | None) -> None:
        tokens = min(tokens, 120 - self.cache.length)
        lengths = None if padding is None else tuple(min(n, tokens) for n in padding)
        self.run("append", tokens, lengths)

    @rule(tokens=st.integers(1, 20))
    def attend(self, tokens: int) -> None:
        self.run("attend", tokens)

    @rule()
    def flush(self) -> None:
        self.run("flush")

    @rule(removed=st.integers(0, 40))
    def truncate(self, removed: int) -> None:
        self.run("truncate", removed)

    @rule(n=st.sampled_from([0, 2, 10]))
    def reserve(self, n: int) -> None:
        self.run("reserve", n)

    @rule(index=st.tuples(*[st.integers(0, 1)] * 2))
    def reorder(self, index: tuple[int, int]) -> None:
        self.run("reorder", index)


RING = Tokens(Raw("bf16"), raw=Raw("bf16"))
RINGS = replace(PLAN, k=StreamPlan("k", 1, 16, (), RING, 8), v=StreamPlan("v", 1, 16, (), RING, 4))


# Windows smaller than a page, equal to one, larger; quantized, and rings as they are by default.
@pytest.mark.parametrize("window", [None, 3, 16, 37])
@pytest.mark.parametrize("stored", [PLAN, RINGS], ids=["quantized", "ring"])
def test_any_order_of_calls(stored: AttentionPlan, window: int | None) -> None:
    class Machine(CacheMachine):
        plan = replace(stored, window=window)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
