"""Layers with a sliding window: pages come back, and nothing that is asked for is ever missing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvant.runtime.cache import Cache
from kvant.runtime.launch_reference import Kernels
from kvant.runtime.pages import open_pool
from kvant.runtime.restore import restore
from kvant.runtime.stream import new_stream

from .cache_bytes import poison, stored_bytes
from .cache_interrupt import interrupting
from .cache_random import make_case, random_plan
from .cache_runner import Case, run_case
from .test_cache_state import sealed
from .window_plans import (
    PAGE,
    STORES,
    WINDOWS,
    Strict,
    feed,
    make_cache,
    plan_of,
    queries,
    refusal,
    used,
    values,
)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("window", WINDOWS)
def test_scripts_over_windows(window: int, store: str) -> None:
    """Against the oracle, which keeps every token; free pages are filled with garbage."""
    rng, plan = np.random.default_rng(window), plan_of(window, store)
    for _ in range(4):
        case = make_case(rng, plan, {})
        run_case(Strict, case, exact=True)


def test_random_plans_with_windows() -> None:
    rng = np.random.default_rng(3)
    for _ in range(25):
        plan, constants = random_plan(rng)
        windowed = replace(plan, window=int(rng.choice([1, 7, 30, 64, 100])))
        run_case(Strict, make_case(rng, windowed, constants), exact=True)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("window", [5, PAGE, 37])
def test_ten_windows_take_no_more_pages_than_a_few(window: int, store: str) -> None:
    plan = plan_of(window, store)
    cache, total = make_cache(plan), 10 * window + 150
    k, v = values(plan, total)
    pages, highs = [], []
    for at in range(total):
        feed(cache, k, v, at + 1)
        pages.append(used(cache))
        highs.append(sum(pool.high for pool in cache.pools.values()))
    after = 3 * window + 120  # the ring is full, whatever the store
    assert max(pages[after:]) == max(pages[: after + 1])
    assert highs[-1] == highs[after], "pages that came back are not used again"
    most = sum(-(-(window + 2 * s.page_tokens) // s.page_tokens) + 1 for s in (plan.k, plan.v))
    recent = 24 // PAGE if store == "block" else 0
    assert max(pages) <= most + recent
    assert cache.layers[0].k.held[0] > 5 * window


def test_a_long_prompt_takes_pages_for_its_last_window_alone() -> None:
    plan = plan_of(20)
    cache = make_cache(plan)
    k, v = values(plan, 700)
    feed(cache, k, v, 700)
    cache.flush()
    assert cache.layers[0].k.held[0] == 672  # 700 - 20 + 1 - a page of 8, in whole pages
    assert sum(pool.high for pool in cache.pools.values()) == used(cache) == 4 + 3
    # Only now is the tail as small as what came last.
    assert cache.layers[0].k.tail.shape[2] < 100


@pytest.mark.parametrize("window", WINDOWS)
def test_a_pool_is_as_large_as_its_rings(window: int) -> None:
    """Long appends in a row, so that old and new pages of a whole window are there at once."""
    plan = plan_of(window, "f32")
    capacities = []
    for max_tokens in (500, 1_000_000):
        cache = make_cache(plan, batch=2, max_tokens=max_tokens)
        k, v = values(plan, 500, batch=2)
        feed(cache, k, v, 100, 200, 350, 350 + window + PAGE, 500)
        cache.flush()
        capacities.append([pool.capacity for pool in cache.pools.values()])
    assert capacities[0] == capacities[1]
    highs = [pool.high for pool in cache.pools.values()]
    assert all(c <= 2 * h for c, h in zip(capacities[1], highs, strict=True)), "far too large"


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("window", WINDOWS)
def test_bytes_are_what_the_plan_says(window: int, store: str) -> None:
    plan = plan_of(window, store)
    k, v = values(plan, 200)
    for length in (0, 1, 7, 8, 9, 30, 63, 64, 65, 100, 150, 199, 200):
        for ways in ((length,), (length // 3, length // 2, length), range(1, length + 1)):
            cache = make_cache(plan)
            feed(cache, k, v, *ways)
            cache.flush()
            assert cache.bytes() == plan.bytes(length), length
    unwindowed = plan.k.bytes(200) + plan.v.bytes(200)
    assert plan.bytes(200) < unwindowed


@pytest.mark.parametrize("store", STORES)
def test_pages_do_not_depend_on_chunks(store: str) -> None:
    plan = plan_of(13, store)
    k, v = values(plan, 160, batch=2)
    seen = []
    for ends in ((160,), range(1, 161), (50, 51, 120, 160)):
        cache = make_cache(plan, batch=2, start=[0, 9])
        feed(cache, k, v, *ends)
        cache.flush()
        seen.append(stored_bytes(cache))
    assert seen[0] == seen[1] == seen[2]


def test_a_page_given_back_may_be_anothers_at_once() -> None:
    """Row 1 begins when row 0 has given pages back, and takes these."""
    plan = plan_of(10)
    cache, alone = make_cache(plan, batch=2), make_cache(plan)
    k, v = values(plan, 220, batch=2)
    q = queries(2, batch=2)
    for at in range(0, 220, 5):
        lengths = None if at >= 110 else [5, 0]
        part = k[:, :, at : at + 5], v[:, :, at : at + 5]
        cache.append(0, *part, lengths)
        alone.append(0, part[0][:1], part[1][:1])
        poison(cache, 0xFF)
        assert np.array_equal(cache.attend(0, q)[:1], alone.attend(0, q[:1]))
    high = sum(pool.high for pool in cache.pools.values())
    assert high == 2 * sum(pool.high for pool in alone.pools.values())


def test_right_padding_does_not_reach_behind_the_window() -> None:
    """The made-up queries of a padded row would: `Strict` sees all queries of a call."""
    plan = plan_of(10)
    cache = make_cache(plan, batch=3)
    k, v = values(plan, 200, batch=3)
    rows = [make_cache(plan) for _ in range(3)]
    q = queries(60, batch=3)
    for at, tokens, lengths in ((0, 100, None), (100, 60, [60, 3, 0]), (160, 4, [1, 4, 3])):
        part = k[:, :, at : at + tokens], v[:, :, at : at + tokens]
        cache.append(0, *part, lengths)
        out, lse = cache.attend(0, q[:, :, :tokens], return_lse=True)
        for row, count in enumerate(lengths or [tokens] * 3):
            assert (out[row, :, count:] == 0).all()
            assert np.isneginf(lse[row, :, count:]).all()
            if count:
                rows[row].append(0, *(x[row : row + 1, :, :count] for x in part))
                alone = rows[row].attend(0, q[row : row + 1, :, :count], return_lse=True)
                assert np.array_equal(out[row, :, :count], alone[0][0])
                assert np.array_equal(lse[row, :, :count], alone[1][0])
        cache.flush()
    assert cache.layers[0].k.held.tolist() == [144, 88, 80]


def test_reorder_moves_rings() -> None:
    plan = plan_of(20, "quantized")
    cache = make_cache(plan, batch=3, start=[0, 50, 90])
    k, v = values(plan, 160, batch=3)
    feed(cache, k, v, 100)
    cache.flush()
    before, index = cache.attend(0, queries(2)[[0, 0, 0]]), [2, 0, 0]
    cache.reorder(np.array(index))
    assert np.array_equal(cache.attend(0, queries(2)[[0, 0, 0]]), before[index])
    twin = make_cache(plan, batch=3, start=[90, 0, 0])
    feed(twin, k[index], v[index], 100)
    for each in (cache, twin):
        each.append(0, k[:, :, 100:], v[:, :, 100:])
        each.flush()
    assert stored_bytes(cache) == stored_bytes(twin)
    assert used(cache) == used(twin)


class Source:
    """Stands for an artifact of one layer."""

    id = "a"
    plans = (plan_of(20, "quantized"),)
    kernels = Kernels(plans, [{}])


def test_a_ring_in_a_file(tmp_path: Path) -> None:
    plan = Source.plans[0]
    cache = Cache(Source.plans, Source.kernels, batch=2, max_tokens=400, artifact_id="a")
    k, v = values(plan, 300, batch=2)
    feed(cache, k, v, 200)
    cache.flush()
    poison(cache, 0xFF)
    cache.save(tmp_path / "state")
    assert (tmp_path / "state").stat().st_size < 2 * cache.bytes()
    twin = restore(Source(), tmp_path / "state")
    assert stored_bytes(twin) == stored_bytes(cache)
    assert (used(twin), twin.bytes()) == (used(cache), cache.bytes())
    for each in (cache, twin):
        feed(each, k, v, 210, 300)
    assert np.array_equal(twin.attend(0, queries(3, 2)), cache.attend(0, queries(3, 2)))


@pytest.mark.parametrize(
    ("held", "what"),
    [
        (170, "pages from [170, 171] to"),  # not whole pages
        (187, "pages from [187, 171] to"),  # past what the next query sees
        (203, "pages from [203, 171] to"),  # past what is encoded
        (0, "pages from [0, 171] to"),  # in the sink
        (163, "bytes long, but its header describes"),  # a page that is not there
        (3, "bytes long, but its header describes"),
    ],
)
def test_files_that_lie_about_a_ring_are_refused(tmp_path: Path, held: int, what: str) -> None:
    plan, path = Source.plans[0], tmp_path / "state"
    cache = Cache(Source.plans, Source.kernels, batch=2, max_tokens=400, artifact_id="a")
    feed(cache, *values(plan, 200, batch=2), 200)
    cache.flush()
    assert cache.layers[0].k.held.tolist() == [171, 171]
    cache.save(path)
    good = path.read_bytes()
    path.write_bytes(sealed(good, lambda h: h["layers"][0]["held"][0].__setitem__(0, held)))
    assert what in refusal(lambda: restore(Source(), path))


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_an_interruption_gives_nothing_back(fail_at: int) -> None:
    plan = plan_of(20)
    kernels = Strict([plan], [{}])
    countdown = interrupting(kernels)
    cache, never = Cache([plan], kernels, max_tokens=512), make_cache(plan)
    k, v = values(plan, 300)
    for each in (cache, never):
        feed(each, k, v, 80, 200)
    pages, held = used(cache), cache.layers[0].k.held.copy()
    countdown.left = fail_at
    with pytest.raises(KeyboardInterrupt):
        feed(cache, k, v, 300)
    countdown.left = -1
    assert used(cache) == pages == used(never)
    assert (cache.layers[0].k.held == held).all()
    assert np.array_equal(cache.attend(0, queries(120)), never.attend(0, queries(120)))
    for each in (cache, never):
        feed(each, k, v, 300)
        each.flush()
    assert stored_bytes(cache) == stored_bytes(never)


def test_without_a_window_nothing_is_given_back() -> None:
    plan = plan_of(None)
    stream = new_stream(plan.k, open_pool(64, 4), 1, 100)
    assert stream.window is None
    case = Case(plan, {}, 1, None, (("append", 90, None), ("append", 90, None)), seed=1)
    assert run_case(Kernels, case, exact=True).layers[0].k.held.tolist() == [0]
