"""Layers with a sliding window: how far back tokens can be taken, and what a call may ask."""

import numpy as np
import pytest

from kvant.runtime.cache import Cache

from .cache_bytes import poison, stored_bytes
from .window_plans import PAGE, feed, make_cache, plan_of, queries, refusal, used, values


@pytest.mark.parametrize("store", ["ring", "quantized"])
def test_truncate_by_a_page_is_as_if_never_appended(store: str) -> None:
    plan = plan_of(11, store)
    k, v = values(plan, 260)
    q = queries(3)
    for length in range(90, 110):
        for removed in range(PAGE + 1):
            cut, never, n = make_cache(plan), make_cache(plan), length - removed
            feed(cut, k + np.float32(1), v + np.float32(1), length)
            cut.truncate(0)
            feed(cut, k, v, 50, length)
            cut.flush()
            if store == "quantized" and not _between_groups(cut, n):
                assert "truncate-inside-group" in refusal(lambda: cut.truncate(n))  # noqa: B023
                continue
            cut.truncate(n)
            feed(never, k, v, n)
            never.flush()
            poison(cut, 0xFF)
            for cache in (cut, never):
                feed(cache, k, v, n + 1, n + 40)
            assert np.array_equal(cut.attend(0, q), never.attend(0, q))
            for cache in (cut, never):
                feed(cache, k, v, 150)
                cache.flush()
            assert stored_bytes(cut) == stored_bytes(never)


def _between_groups(cache: Cache, n: int) -> bool:
    return all(
        n >= s.encoded[0] or n <= s.sinks or (n - s.sinks) % s.plan.tokens.group_tokens == 0
        for s in cache.layers[0].streams
    )


def test_truncate_behind_the_window_names_what_works() -> None:
    plan = plan_of(20)
    cache = make_cache(plan, batch=2, start=[0, 30])
    feed(cache, *values(plan, 200, batch=2), 200)
    cache.flush()
    before, held = stored_bytes(cache), cache.layers[0].k.held.tolist()
    assert held == [168, 136]
    # Row 1 counts 30 fewer: its pages from 136 on hold the window of 155, column 185; row 0's
    # from 168 on that of 187. V has pages of 16, from 160 and 128 on.
    assert refusal(lambda: cache.truncate(150)) == (
        "150 columns would need tokens that a sliding window has given back\n"
        "  where: truncate\n"
        "  fix: truncate to 187, or reserve(n) before speculative tokens  [truncate-behind-window]"
    )
    assert stored_bytes(cache) == before
    assert refusal(lambda: cache.truncate(186))
    cache.truncate(187)
    assert refusal(lambda: cache.truncate(1))
    cache.truncate(0)
    assert (used(cache), cache.bytes()) == (0, 0)


def test_cuts_that_keep_window_and_groups_are_named() -> None:
    plan = plan_of(20, "quantized", page=32)
    cache = make_cache(plan)
    feed(cache, *values(plan, 206), 206)
    cache.flush()
    assert cache.layers[0].k.held[0] == 131  # so 150 is the first cut that keeps the window
    named = {100: "155,", 149: "155,", 151: "0 or 155,", 160: "155 or 163,", 196: "195 or 203,"}
    for n, numbers in named.items():
        code = "truncate-behind-window" if n < 150 else "truncate-inside-group"
        message = refusal(lambda n=n: cache.truncate(n))
        assert f"fix: truncate to {numbers} or reserve(n)" in message
        assert message.endswith(f"[{code}]")
    cache.truncate(155)


def test_reserve_keeps_more_to_take_back() -> None:
    plan = plan_of(9)
    k, v = values(plan, 200)
    kept, plain = make_cache(plan), make_cache(plan)
    kept.reserve(60)
    for cache in (kept, plain):
        feed(cache, k, v, *range(1, 181))
        cache.flush()
    assert "truncate-behind-window" in refusal(lambda: plain.truncate(120))
    kept.truncate(120)
    never = make_cache(plan)
    feed(never, k, v, 119, 120)
    assert np.array_equal(kept.attend(0, queries(1)), never.attend(0, queries(1)))


def test_queries_behind_the_window_are_refused() -> None:
    plan = plan_of(20)
    cache = make_cache(plan)
    k, v = values(plan, 200)
    feed(cache, k, v, 100, 160)
    cache.attend(0, queries(60))  # all of the last append
    cache.flush()
    cache.attend(0, queries(PAGE))
    assert refusal(lambda: cache.attend(0, queries(60))) == (
        "the first of 60 queries sees tokens that were given back: only the newest 20 are sure to "
        "be there\n"
        "  where: layer 0, attend\n"
        "  fix: attend with the columns of an append before the next append or flush, or reserve(n)"
        " before it  [window-given-back]"
    )
