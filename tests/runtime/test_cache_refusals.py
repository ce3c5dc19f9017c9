"""What the cache refuses, or what interrupts it, changes nothing."""

import numpy as np
import pytest

from kvant.ir.maps import Hadamard
from kvant.ir.plan import AttentionPlan, StreamPlan
from kvant.runtime.cache import Cache
from kvant.runtime.launch_reference import Kernels

from .cache_bytes import stored_bytes
from .cache_interrupt import interrupting
from .cache_plans import ENCODINGS, D, feed, make_cache, make_plan, queries, refused, values


def test_full_cache_is_refused_before_anything_changes() -> None:
    plan = make_plan(ENCODINGS["int4-token"])
    cache = make_cache(plan, max_tokens=100)
    k, v = values(plan, 101)
    feed(cache, k[:, :, :90], v[:, :, :90])
    before, out = stored_bytes(cache), cache.attend(0, queries(plan, 1))
    error = refused("cache-full", lambda: cache.append(0, k[:, :, :11], v[:, :, :11]))
    assert "11 more columns after 90 pass the limit of 100" in error.what
    assert stored_bytes(cache) == before
    assert np.array_equal(out, cache.attend(0, queries(plan, 1)))
    feed(cache, k[:, :, :10], v[:, :, :10])
    assert cache.length == 100


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_is_refused_before_anything_changes(role: str, value: float) -> None:
    plan = make_plan(ENCODINGS["int4-token"])
    cache = make_cache(plan, batch=2)
    k, v = values(plan, 50, batch=2)
    feed(cache, k, v)
    before, out = stored_bytes(cache), cache.attend(0, queries(plan, 1, 2))
    bad_k, bad_v = k.copy(), v.copy()
    (bad_k if role == "k" else bad_v)[1, 0, 17, 5] = value
    error = refused("non-finite", lambda: cache.append(0, bad_k, bad_v))
    assert str(error) == (
        f"{role} holds {value} in row 1, head 0, token 17, channel 5\n"
        "  where: layer 0, append\n"
        "  fix: find out why the model gave such values; nothing was stored  [non-finite]"
    )
    assert stored_bytes(cache) == before
    assert np.array_equal(out, cache.attend(0, queries(plan, 1, 2)))
    padded = make_cache(plan, batch=2, start=[0, 18])
    padded.append(0, bad_k, bad_v)  # token 17 of row 1 is padding here
    assert padded.lengths.tolist() == [50, 32]


def test_overflow_in_the_maps_is_refused_before_anything_changes() -> None:
    plan = make_plan(ENCODINGS["bf16"])
    maps = StreamPlan("k", 2, D, (Hadamard(D),), plan.k.tokens, plan.k.page_tokens)
    plan = AttentionPlan(4, 1.0, None, None, (Hadamard(D),), maps, plan.v, ())
    cache = make_cache(plan)
    k, v = values(plan, 5)
    error = refused("non-finite", lambda: cache.append(0, np.full_like(k, 3e38), v))
    assert error.what == "k is NaN or infinite in f32 after its maps, row 0"
    assert cache.length == 0


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_interruption_in_a_kernel_changes_nothing(fail_at: int) -> None:
    plan = make_plan(ENCODINGS["int4-channel"])
    kernels = Kernels([plan], [{}])
    countdown = interrupting(kernels)
    cache, never = (Cache([plan], kernels, max_tokens=512), make_cache(plan))
    k, v = values(plan, 200)
    q = queries(plan, 2)
    feed(cache, k[:, :, :150], v[:, :, :150])
    feed(never, k[:, :, :150], v[:, :, :150])
    countdown.left = fail_at
    with pytest.raises(KeyboardInterrupt):
        cache.append(0, k[:, :, 150:], v[:, :, 150:])
    assert cache.length == 150
    assert sum(pool.used for pool in cache.pools.values()) == 0
    assert stored_bytes(cache) == stored_bytes(never)
    assert np.array_equal(cache.attend(0, q), never.attend(0, q))
    for each in (cache, never):
        feed(each, k[:, :, 150:], v[:, :, 150:])
        each.flush()
    assert stored_bytes(cache) == stored_bytes(never)


def test_sizes_of_a_new_cache_are_checked() -> None:
    plan = make_plan(ENCODINGS["bf16"])
    refused("wrong-value", lambda: make_cache(plan, batch=0))
    refused("wrong-value", lambda: make_cache(plan, max_tokens=0))
    refused("wrong-value", lambda: make_cache(plan, start=[-1]))
    refused("wrong-shape", lambda: make_cache(plan, start=[0, 0]))
    refused("wrong-value", lambda: make_cache(plan).reserve(-1))
