"""Taking tokens back: truncation and `reserve`, and which cuts are refused."""

import numpy as np
import pytest

from kvant.ir.encodings import Int, Tokens

from .cache_bytes import poison, stored_bytes
from .cache_plans import ENCODINGS, feed, make_cache, make_plan, queries, refused, values


@pytest.mark.parametrize("name", ENCODINGS)
def test_truncate_then_append_equals_never_appended(name: str) -> None:
    """Down to the encoded end, for every number of removed tokens, also after a poisoned tail."""
    plan = make_plan(ENCODINGS[name])
    k, v = values(plan, 140)
    other = values(plan, 60, seed=1)
    q = queries(plan, 2)
    for kept, extra in ((97, 1), (97, 20), (64, 3), (3, 2), (70, 60)):
        cut, never = make_cache(plan), make_cache(plan)
        for cache in (cut, never):
            feed(cache, k[:, :, :kept], v[:, :, :kept], 1)
        cut.append(0, other[0][:, :, :extra], other[1][:, :, :extra])
        cut.truncate(kept)  # the extra tokens were appended last, so all are still raw
        poison(cut, 0xFF)
        for cache in (cut, never):
            feed(cache, k[:, :, kept:], v[:, :, kept:], 1, 40)
        assert np.array_equal(cut.attend(0, q), never.attend(0, q))
        cut.flush()
        never.flush()
        assert stored_bytes(cut) == stored_bytes(never)


def test_truncate_below_the_encoded_end_keeps_whole_groups() -> None:
    plan = make_plan(Tokens(Int(4, "channel", 32), sink=4), ENCODINGS["int8-token"])
    k, v = values(plan, 200)
    for n in (0, 2, 4, 36, 68, 164, 197, 200):
        cut, never = make_cache(plan), make_cache(plan)
        feed(cut, k, v)
        cut.flush()
        cut.truncate(n)
        assert cut.length == n
        feed(never, k[:, :, :n], v[:, :, :n])
        never.flush()
        feed(cut, k[:, :, n:], v[:, :, n:])
        feed(never, k[:, :, n:], v[:, :, n:])
        assert stored_bytes(cut) == stored_bytes(never), n


def test_truncate_inside_a_group_names_the_nearest_cuts() -> None:
    plan = make_plan(Tokens(Int(4, "channel", 32), sink=4), ENCODINGS["int8-token"])
    cache = make_cache(plan, start=[10])
    feed(cache, *values(plan, 200))
    cache.flush()
    before = stored_bytes(cache)
    error = refused("truncate-inside-group", lambda: cache.truncate(60))
    # Row positions are columns - 10, so groups end at columns 14 + 32 i.
    assert str(error) == (
        "60 columns would cut a group of encoded tokens in two\n"
        "  where: truncate\n"
        "  fix: truncate to 46 or 78, or reserve(n) before speculative tokens"
        "  [truncate-inside-group]"
    )
    assert stored_bytes(cache) == before
    assert cache.length == 200
    cache.truncate(78)
    assert cache.length == 78
    assert cache.lengths.tolist() == [68]


def test_truncate_beyond_the_end_is_refused() -> None:
    cache = make_cache(make_plan(ENCODINGS["bf16"]))
    refused("wrong-value", lambda: cache.truncate(1))
    refused("wrong-value", lambda: cache.truncate(-1))
    refused("wrong-value", lambda: cache.truncate(True))
    refused("wrong-value", lambda: cache.truncate(0.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ENCODINGS)
def test_reserve_makes_every_roll_back_exact(name: str) -> None:
    plan = make_plan(ENCODINGS[name])
    k, v = values(plan, 170)
    draft = values(plan, 8, seed=2)
    q = queries(plan, 1)
    plain, drafting = make_cache(plan), make_cache(plan)
    for cache in (plain, drafting):
        feed(cache, k[:, :, :100], v[:, :, :100])
    drafting.reserve(8)
    for at in range(100, 170):
        rejected = at % 9
        for i in range(min(rejected, 8)):  # one by one, so that each append encodes what is due
            drafting.append(0, draft[0][:, :, i : i + 1], draft[1][:, :, i : i + 1])
        drafting.truncate(at)
        for cache in (plain, drafting):
            cache.append(0, k[:, :, at : at + 1], v[:, :, at : at + 1])
    drafting.reserve(0)
    for cache in (plain, drafting):
        cache.flush()
    assert stored_bytes(plain) == stored_bytes(drafting)
    assert np.array_equal(plain.attend(0, q), drafting.attend(0, q))
