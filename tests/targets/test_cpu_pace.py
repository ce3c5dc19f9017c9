"""One token after another: the short way of an append, and all that ends it."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvant
from kvant.ir.arrays import Array
from kvant.ir.errors import KvantError
from kvant.ir.plan import AttentionPlan
from kvant.runtime.cache import Cache
from kvant.runtime.pace import Pace
from kvant.runtime.state_file import read_state
from kvant.runtime.verify import verify
from kvant.targets.cpu import this_cpu

from .cpu_cases import HEADLINE, INTEGER_PLANS, KIVI, PLANS
from .cpu_twins import Twins

PACED = {
    "int4-token": HEADLINE,
    "kivi-2bit": KIVI,
    "maps": PLANS["maps"],
    "quads": INTEGER_PLANS["int8-int"],
}


@pytest.fixture(params=PACED, ids=str)
def plan(request: pytest.FixtureRequest) -> AttentionPlan:
    return PACED[request.param]


def test_the_short_way_is_taken_and_stores_the_same(plan: AttentionPlan) -> None:
    twins, short = Twins(plan, [0, 3]), 0
    twins.append(70)
    for _ in range(300):
        before = twins.left()
        twins.append(1)
        short += twins.left() == before - 1
    assert short > 200
    twins.check()


CHANGES: dict[str, Callable[[Cache], object]] = {
    "truncate": lambda cache: cache.truncate(cache.length - 1),
    "reorder": lambda cache: cache.reorder(np.array([1, 1])),
    "swap": lambda cache: cache.reorder(np.array([1, 0])),
    "flush": lambda cache: cache.flush(),
    "reserve": lambda cache: cache.reserve(9),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_layer_ends_the_pace(plan: AttentionPlan, change: str) -> None:
    twins = Twins(plan)
    twins.append(70, *[1] * 20)
    for _ in range(4):
        twins.both(CHANGES[change])
        twins.append(*[1] * 7)
    twins.check()


def test_more_tokens_at_once_end_the_pace(plan: AttentionPlan) -> None:
    twins = Twins(plan)
    for size in (70, 3, 200, 1):  # the tail grows, and is small again
        twins.append(*[1] * 9, size)
    twins.append(*[1] * 9)
    twins.check()


def test_attend_sees_every_token(plan: AttentionPlan) -> None:
    """The calls of attend are kept too: a tail that moved must not be read where it was."""
    twins = Twins(plan)
    twins.append(70)
    q = np.random.default_rng(1).normal(size=(2, plan.q_heads, 1, plan.k.channels))
    for change in (*CHANGES.values(), *CHANGES.values()):
        for size in (*[1] * 30, 40):
            twins.append(size)
            have, want = (cache.attend(0, q.astype(np.float32)) for cache in twins.caches)
            assert np.abs(have - want).max() < 2e-2 * np.abs(want).max()
        twins.both(change)
    twins.check()


def test_a_full_cache_is_refused(plan: AttentionPlan) -> None:
    twins = Twins(plan)
    twins.append(1000, *[1] * 24)
    for cache in twins.caches:
        with pytest.raises(KvantError) as caught:
            cache.append(0, *twins.new(1))
        assert caught.value.code == "cache-full"
    twins.check()


def test_other_shapes_and_types_are_refused_as_ever(plan: AttentionPlan) -> None:
    twins = Twins(plan)
    twins.append(70, *[1] * 5)
    k, v = twins.new(1)
    for wrong, code in (
        (k[:1], "wrong-shape"),
        (k.astype(int), "wrong-dtype"),
        ("k", "wrong-type"),
    ):
        with pytest.raises(KvantError) as caught:
            twins.caches[0].append(0, wrong, v)
        assert caught.value.code == code
    twins.append(1)
    twins.check()


def test_a_restored_cache_goes_on(plan: AttentionPlan, tmp_path: Path) -> None:
    twins = Twins(plan)
    twins.append(70, *[1] * 9)
    for i, cache in enumerate(twins.caches):
        cache.save(tmp_path / f"state{i}")

        def new_cache(batch: int, max_tokens: int, start: Array, cache: Cache = cache) -> Cache:
            return Cache([plan], cache.kernels, batch=batch, max_tokens=max_tokens, start=start)

        twins.caches[i] = read_state(tmp_path / f"state{i}", "", [plan], new_cache)
    twins.append(*[1] * 70)
    twins.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_of_torch_are_taken(plan: AttentionPlan, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    twins = Twins(plan)
    twins.append(70, *[1] * 3)
    for i in range(6):
        k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in twins.new(1))
        # Other strides, and what a graph of gradients gives.
        k = k.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        if i > 3:
            v = torch.cat([v, -v], 3)[..., : v.shape[3]]
        before = twins.left()
        with torch.inference_mode(i % 2 == 0):
            for cache in twins.caches:
                cache.append(0, k, v)
        assert twins.left() == before - 1
    twins.check()


def test_a_tail_that_is_gone_is_not_kept() -> None:
    """Not by the pace, nor by the arguments of attend; also a tail of v alone."""
    cache = Twins(HEADLINE).caches[0]
    k, v = (np.ones((2, 2, 400, 128), np.float32) for _ in range(2))
    q = np.ones((2, 4, 1, 128), np.float32)
    for let_go in (Cache.flush, lambda cache: cache.truncate(0)):
        cache.reserve(4000)
        cache.append(0, k, v)
        cache.append(0, k[:, :, :1], v[:, :, :1])
        cache.append(0, k[:, :, :1], v[:, :, :1])
        cache.attend(0, q)
        tails = [weakref.ref(stream.tail) for stream in cache.layers[0].streams]
        cache.reserve(0)
        let_go(cache)
        gc.collect()
        assert [tail() is None for tail in tails] == [True, True]


def test_verify_reaches_the_short_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, right = [], Pace.append

    def counted(self: Pace, *given: Any) -> bool:
        taken.append(right(self, *given))
        return taken[-1]

    monkeypatch.setattr(Pace, "append", counted)
    shape = kvant.Shape(heads=4, kv_heads=2, head_dim=64)
    art = kvant.compile(shape, "int4-token", [f"cpu:{this_cpu().name}"], out=tmp_path / "a")
    verify(art.path)
    assert sum(taken) >= 4
