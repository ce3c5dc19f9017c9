"""The cache against its oracle: what attend reads, and what pages hold."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from kvant.runtime.cache import Cache
from kvant.runtime.columns import new_columns
from kvant.runtime.launch_reference import Kernels
from kvant.runtime.pages import open_pool

from .cache_bytes import poison, stored_bytes
from .cache_plans import ENCODINGS, D, feed, make_cache, make_plan, queries, refused, values
from .cache_runner import Case, new_pair, random_kv, run_case


@pytest.mark.parametrize("block", range(6))
def test_random_cases(
    block: int, cache_case: Callable[..., Cache], random_case: Callable[..., Case]
) -> None:
    for seed in range(12 * block, 12 * block + 12):
        cache_case(Kernels, random_case(np.random.default_rng(seed)), exact=True)


@pytest.mark.parametrize("name", ENCODINGS)
def test_lengths_around_groups_and_pages(name: str) -> None:
    tokens = ENCODINGS[name]
    plan = make_plan(tokens)
    g, page = tokens.group_tokens, plan.k.page_tokens
    lengths = {0, 1, g - 1, g, g + 1, tokens.recent + g, page - 1, page, page + 1}
    for length in sorted(lengths | {tokens.sink + page, tokens.sink + tokens.recent + page}):
        attend = [("attend", 1), ("attend", 3)]
        steps = [("append", length, None), *attend, ("append", 1, None), *attend]
        steps += [("flush",), *attend, ("append", 2, None), *attend]
        run_case(Kernels, Case(plan, {}, 1, None, tuple(steps), seed=length), exact=True)


def test_without_reserve_stored_is_what_the_encoding_simulates() -> None:
    """The oracle's own notion of `encoded` agrees with Tokens.simulate, which the graph uses."""
    for name, tokens in ENCODINGS.items():
        plan = make_plan(tokens)
        _, (oracle,) = new_pair(Kernels, Case(plan, {}, 1, None, (), 0))
        k, v = values(plan, 150)
        for old, new in itertools.pairwise((0, 1, 33, 97, 98, 150)):
            oracle.append(k[:, :, old:new], v[:, :, old:new])
            as_raw = tokens.raw.roundtrip(k[0])
            want = np.concatenate([tokens.simulate(as_raw[:, :old]), as_raw[:, old:new]], axis=1)
            assert np.array_equal(oracle.k[0].stored(), want), (name, old)


@pytest.mark.parametrize("name", ENCODINGS)
def test_stored_bytes_do_not_depend_on_chunks(name: str) -> None:
    plan = make_plan(ENCODINGS[name], ENCODINGS["int4-channel"])
    k, v = values(plan, 230, batch=2)
    chunks = [(), (1,) * 229, (64, 64, 64), (31, 1, 100), (229,)]
    seen = []
    for sizes in chunks:
        cache = make_cache(plan, batch=2, start=[0, 9])
        feed(cache, k, v, *sizes)
        cache.flush()
        seen.append(stored_bytes(cache))
    assert all(found == seen[0] for found in seen)
    assert any(len(part) for part in seen[0])


def test_rows_of_a_batch_are_as_alone() -> None:
    plan = make_plan(ENCODINGS["int4-channel"], ENCODINGS["int2-token-block"])
    starts = [0, 5, 40, 130]
    k, v = values(plan, 140, batch=4)
    q = queries(plan, 3, batch=4)
    together = make_cache(plan, batch=4, start=np.array(starts))
    feed(together, k, v, 100, 1)
    out = together.attend(0, q)
    for row, start in enumerate(starts):
        alone = make_cache(plan)
        for begin, end in ((0, 100), (100, 101), (101, 140)):
            begin = max(begin, start)
            if begin < end:
                alone.append(0, k[[row], :, begin:end], v[[row], :, begin:end])
        want = alone.attend(0, q[[row]])
        assert np.allclose(out[row], want[0], rtol=1e-6, atol=1e-6)
        assert together.lengths[row] == alone.length == 140 - start
    row_bytes = [len(part) for part in stored_bytes(together)]
    assert sum(row_bytes) > 0


def test_right_padding_is_as_if_it_were_not_there() -> None:
    plan = make_plan(ENCODINGS["int2-channel-block"], ENCODINGS["int4-token"])
    k, v = values(plan, 80, batch=2)
    q = queries(plan, 10, batch=2)
    padded, plain = make_cache(plan, batch=2), make_cache(plan)
    k[1, :, 70:], v[1, :, 70:] = np.nan, np.inf  # padding may hold anything
    padded.append(0, k, v, lengths=[80, 70])
    plain.append(0, k[[1], :, :70], v[[1], :, :70])
    # Columns 70..79 are the queries: all are padding in row 1.
    out, lse = padded.attend(0, q, return_lse=True)
    assert (out[1] == 0).all()
    assert np.isneginf(lse[1]).all()
    assert (out[0] != 0).any()
    for step in range(3):
        more = random_kv(np.random.default_rng(step), plan, 2, 4)
        padded.append(0, *more, lengths=np.array([4, 3]))
        plain.append(0, more[0][[1], :, :3], more[1][[1], :, :3])
        got = padded.attend(0, q[:, :, :4])[1]
        assert np.allclose(got[:, :3], plain.attend(0, q[[1], :, :3])[0], atol=1e-6)
        assert (got[:, 3] == 0).all()
    assert padded.lengths.tolist() == [92, 79]
    assert padded.length == 92


def test_reorder_gives_rows_pages_of_their_own() -> None:
    plan = make_plan(ENCODINGS["int4-token"])
    cache = make_cache(plan, batch=3)
    k, v = values(plan, 150, batch=3)
    q = queries(plan, 2, batch=3)
    feed(cache, k, v)
    cache.flush()
    used = sum(pool.used for pool in cache.pools.values())
    before = cache.attend(0, q[[0, 0, 0]])
    cache.reorder(np.array([2, 0, 2]))
    after = cache.attend(0, q[[0, 0, 0]])
    assert np.array_equal(after, before[[2, 0, 2]])
    assert sum(pool.used for pool in cache.pools.values()) == used
    more = values(plan, 70, batch=3, seed=3)
    cache.append(0, *more)
    cache.flush()
    twin = make_cache(plan, batch=3)
    feed(twin, k[[2, 0, 2]], v[[2, 0, 2]])
    twin.append(0, *more)
    twin.flush()
    assert stored_bytes(cache) == stored_bytes(twin)
    refused("wrong-value", lambda: cache.reorder([0, 1, 3]))
    refused("wrong-shape", lambda: cache.reorder([0, 1]))


def test_pages_that_come_back_are_used_again_and_clean() -> None:
    plan = make_plan(ENCODINGS["int8-token"])
    cache = make_cache(plan, max_tokens=4096)
    k, v = values(plan, 512)
    for _ in range(4):
        feed(cache, k, v)
        cache.flush()
        poison(cache, 0xFF)
        cache.truncate(0)
    (pool,) = cache.pools.values()
    assert (pool.used, pool.high) == (0, 16)  # 8 pages of k, 8 of v, whatever was truncated
    for _ in range(16):
        assert not pool.pages[pool.take()].any()
    pool.give_back([3, 5])
    refused("internal-page-error", lambda: pool.give_back([5]))
    refused("internal-page-error", lambda: pool.give_back([7, 7]))
    refused("internal-page-error", lambda: pool.give_back([16]))
    assert pool.used == 14


def test_a_pool_takes_address_space_but_no_memory() -> None:
    pool = open_pool(4096, 1 << 24)  # 64 GiB
    assert pool.pages.ctypes.data % 64 == 0
    pool.pages[(1 << 24) - 1] = 7
    assert pool.pages[(1 << 24) - 1].sum() == 7 * 4096
    assert refused("out-of-memory", lambda: open_pool(4096, 1 << 50)).fix
    empty = open_pool(4096, 0)
    refused("cache-full", empty.take)


def test_tail_is_small_again_after_a_long_prompt() -> None:
    plan = make_plan(ENCODINGS["int4-token"])
    cache = make_cache(plan, max_tokens=9000)
    k, v = values(plan, 8000)
    cache.append(0, k, v)
    assert cache.layers[0].k.tail.shape[2] >= 8000
    cache.flush()
    assert cache.layers[0].k.tail.shape[2] < 100
    moved = 0
    tail = cache.layers[0].k.tail
    for _ in range(200):
        cache.append(0, k[:, :, :1], v[:, :, :1])
        moved += cache.layers[0].k.tail is not tail
        tail = cache.layers[0].k.tail
    assert moved < 30  # not at every append


def test_bytes_are_what_the_plan_says() -> None:
    for name, tokens in ENCODINGS.items():
        plan = make_plan(tokens, ENCODINGS["int4-channel"])
        k, v = values(plan, 150)
        for length in (0, 1, 3, 31, 32, 64, 65, 68, 69, 100, 128, 150):
            cache = make_cache(plan)
            feed(cache, k[:, :, :length], v[:, :, :length])
            cache.flush()
            assert cache.bytes() == plan.k.bytes(length) + plan.v.bytes(length), (name, length)


def test_layers_advance_one_by_one() -> None:
    plan = make_plan(ENCODINGS["int8-token"])
    cache = Cache([plan] * 2, Kernels([plan] * 2, [{}] * 2), max_tokens=64)
    k, v = values(plan, 10)
    cache.append(0, k, v)
    assert (cache.length, *(layer.columns.length for layer in cache.layers)) == (0, 10, 0)
    cache.truncate(0)  # a step that broke off is taken back
    assert cache.layers[0].columns.length == 0
    for layer in (0, 1):
        cache.append(layer, k, v)
    assert cache.length == 10
    for layer in (-1, 2, "0", None, 1.0):
        refused("unknown-layer", lambda layer=layer: cache.append(layer, k, v))


def test_nothing_to_do_is_defined() -> None:
    plan = make_plan(ENCODINGS["int8-token"])
    cache = make_cache(plan, batch=2)
    k, v = values(plan, 4, batch=2)
    cache.flush()
    cache.append(0, k[:, :, :0], v[:, :, :0])
    out, lse = cache.attend(0, queries(plan, 0, 2), return_lse=True)
    assert out.shape == (2, 4, 0, D)
    assert lse.shape == (2, 4, 0)
    assert (cache.length, cache.bytes()) == (0, 0)
    late = make_cache(plan, batch=2, start=[4, 6])
    late.append(0, k, v)
    assert (late.attend(0, queries(plan, 4, 2)) == 0).all()
    assert late.lengths.tolist() == [0, 0]
    refused("wrong-shape", lambda: late.attend(0, queries(plan, 5, 2)))


def test_columns_against_counting() -> None:
    """Runs of columns, cut anywhere and reordered, count as a list of masks does."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        start = rng.integers(0, 12, 3)
        columns, valid = new_columns(start), np.zeros((3, 0), bool)
        for _ in range(8):
            if rng.random() < 0.25:
                n = int(rng.integers(0, columns.length + 1))
                columns, valid = columns.cut(n), valid[:, :n]
            if rng.random() < 0.2:
                index = rng.integers(0, 3, 3)
                columns, valid, start = columns.rows(index), valid[index], start[index]
            tokens = int(rng.integers(1, 7))
            lengths = rng.integers(0, tokens + 1, 3) if rng.random() < 0.4 else None
            at = np.arange(valid.shape[1], valid.shape[1] + tokens)
            new = at >= start[:, None]
            if lengths is not None:
                new &= np.arange(tokens) < lengths[:, None]
            first, count = columns.valid(tokens, lengths)
            assert (count == new.sum(1)).all()
            columns, valid = columns.grown(tokens, first, count), np.hstack([valid, new])
            for n in range(columns.length + 1):
                assert (columns.counts_at(n) == valid[:, :n].sum(1)).all()
            last = int(rng.integers(1, columns.length + 1))
            mask = columns.is_valid(last)
            want = valid[:, -last:]
            if mask is None:  # all valid ones stand at the end
                assert (np.sort(want, axis=1) == want).all()
            else:
                assert (mask == want).all()
    assert len(new_columns(start).grown(5, start * 0, start * 0 + 5).marks) == 2
