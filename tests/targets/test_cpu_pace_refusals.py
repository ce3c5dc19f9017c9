"""One token after another: what is refused, interrupted or forked leaves no trace."""

import os
import sys
from typing import Any

import numpy as np
import pytest

from kvant.ir.errors import KvantError
from kvant.ir.plan import AttentionPlan
from kvant.runtime import launch_cpu, pace
from kvant.runtime.cache import Cache

from .cpu_cases import HEADLINE, PLANS
from .cpu_twins import Twins
from .test_cpu_pace import PACED


@pytest.fixture(params=PACED, ids=str)
def plan(request: pytest.FixtureRequest) -> AttentionPlan:
    return PACED[request.param]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_refused_token_leaves_no_trace(plan: AttentionPlan, bad: float) -> None:
    twins = Twins(plan)
    twins.append(70, *[1] * 5)
    assert twins.left() > 2
    for i in (0, 1):
        new = twins.new(1)
        new[i][1, 1, 0, 5] = bad
        for cache in twins.caches:
            with pytest.raises(KvantError) as caught:
                cache.append(0, *new)
            assert caught.value.code == "non-finite"
            assert "row 1, head 1, token 0" in caught.value.what
        twins.append(1, 1)
    twins.check()


@pytest.mark.parametrize("role", ["k", "v"])
def test_a_scale_that_overflows_is_refused_at_every_append_until_it_is_cut(role: str) -> None:
    """The token itself is finite and is stored; its scale is made when the next one comes."""
    twins = Twins(HEADLINE)
    twins.append(70, *[1] * 5)
    assert twins.left() > 2
    large = twins.new(1)
    large["kv".index(role)][1, 1, 0, 5] = 3e6  # of 15 steps, one is beyond f16
    for cache in twins.caches:
        cache.append(0, *large)
    for _ in range(3):
        new = twins.new(1)
        for cache in twins.caches:
            with pytest.raises(KvantError) as caught:
                cache.append(0, *new)
            assert caught.value.code == "scale-overflow"
        twins.check()
    twins.both(lambda cache: cache.truncate(cache.length - 1))
    twins.append(*[1] * 9)
    twins.check()


def test_a_refusal_that_moved_the_tail_or_took_a_page_is_seen() -> None:
    """Neither changes what is stored, but both change where: at every place of page and tail."""
    twins = Twins(HEADLINE)
    twins.append(70, 1)
    for size, follows in [(3, 1)] * 150 + [(1, 2), (1, 1)] * 66:
        new = twins.new(size)
        new[0][0, 0, -1, 0] = np.nan
        for cache in twins.caches:
            with pytest.raises(KvantError):
                cache.append(0, *new)
        twins.append(follows)
    twins.check()
    own = twins.caches[0]
    used = sum(pool.used for pool in own.pools.values())
    assert used == sum(int((stream.table >= 0).sum()) for stream in own.layers[0].streams)
    own.truncate(0)
    assert not any(pool.used for pool in own.pools.values())


@pytest.mark.parametrize("case", ["dtype", "size"])
def test_nothing_is_looked_ahead_where_no_pace_results(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins, looks = Twins(HEADLINE), []
    right = pace._alike
    monkeypatch.setattr(pace, "_alike", lambda *given: looks.append(given) or right(*given))
    if case == "size":
        monkeypatch.setattr(launch_cpu, "MOST_STEP", 1)
    for _ in range(9):
        new = [x.astype(np.float16) if case == "dtype" else x for x in twins.new(1)]
        for cache in twins.caches:
            cache.append(0, *new)
    twins.check()
    assert not looks
    monkeypatch.undo()
    twins.append(1, 1)
    assert twins.left()


class Interrupt:
    """Raises KeyboardInterrupt before line number `at` of what an append runs of some files."""

    FILES = ("pace.py", "inlet.py", "stream.py", "columns.py")

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, frame: Any, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(self.FILES):
            return None
        if event == "line":
            self.at -= 1
            if self.at < 0:
                raise KeyboardInterrupt
        return self


def interrupted(cache: Cache, at: int, new: Any) -> bool:
    """Append, but for an interrupt before line `at`; return whether it has that many lines."""
    interrupt = Interrupt(at)
    sys.settrace(interrupt)
    try:
        cache.append(0, *new)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return interrupt.at < 0


LINES = {"at the pace": 20, "looking ahead": 100, "after another append": 100}


@pytest.mark.parametrize("when", LINES)
@pytest.mark.parametrize("name", ["int4-token", "maps"])
def test_an_interrupted_append_counts_whole_or_not_at_all(name: str, when: str) -> None:
    """At every line: what is appended next lies where it belongs."""
    twins = Twins(PLANS[name])
    own, right = twins.caches
    for line in range(1000):
        twins.append(2, 1)
        while twins.left() < 3:
            twins.append(1)
        if when == "looking ahead":
            # Where pages are full, and tails too.
            twins.append(*[1] * twins.left())
        if when == "after another append":
            twins.append(2, 1)
        before, new = own.length, twins.new(1)
        goes_on = interrupted(own, line, new)
        if own.length > before:
            right.append(0, *new)
        assert own.length == right.length
        twins.append(1, 1)
        if when == "at the pace":
            twins.append(*[1] * twins.left())
        twins.check()
        if own.length > 800:
            twins.both(lambda cache: cache.truncate(7))
        if not goes_on:
            assert line > LINES[when], "the append has more lines than were interrupted"
            return
    raise AssertionError("the append never came to its end")


def test_a_fork_in_mid_pace_parts_the_caches() -> None:
    """Both processes go on from the same state, and neither sees what the other one appends."""
    twins = Twins(HEADLINE)
    twins.append(70, *[1] * 5)
    assert twins.left() > 2
    child = os.fork()
    if child == 0:
        status = 3
        try:
            twins.new(1)
            twins.append(*[1] * 80)
            twins.check()
            status = 0
        finally:
            os._exit(status)
    twins.append(*[1] * 80)
    assert os.waitpid(child, 0)[1] == 0
    twins.check()
    twins.append(*[1] * 80)
    twins.check()
