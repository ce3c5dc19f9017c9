"""What the tests of sliding windows share: plans, caches that watch their kernels, tokens."""

import itertools
from typing import Any

import numpy as np
import pytest

from kvant.ir.encodings import Int, Raw, Tokens
from kvant.ir.errors import KvantError
from kvant.ir.plan import AttentionPlan, StreamPlan
from kvant.runtime.cache import Cache
from kvant.runtime.launch_reference import Kernels
from kvant.runtime.stream import Stream

from .cache_oracle import Array
from .cache_runner import random_kv

D, PAGE = 16, 8
RING = Tokens(Raw("bf16"), raw=Raw("bf16"))
STORES = {
    "ring": (RING, RING),
    "f32": (Tokens(Raw("f32")), Tokens(Raw("f32"))),
    "quantized": (Tokens(Int(4, "channel", 8), sink=3), Tokens(Int(8, "token", 16), recent=5)),
    "block": (Tokens(Int(2, "channel", 4), sink=1, recent=24, flush="block"), RING),
}
WINDOWS = [1, 5, PAGE, PAGE + 1, 3 * PAGE, 37]  # smaller than a page, equal to pages, larger


def plan_of(window: int | None, store: str = "ring", page: int = PAGE) -> AttentionPlan:
    k, v = STORES[store]
    return AttentionPlan(
        q_heads=4,
        scale=0.25,
        softcap=None,
        window=window,
        q_maps=(),
        k=StreamPlan("k", 2, D, (), k, page),
        v=StreamPlan("v", 2, D, (), v, 2 * page),
        out_maps=(),
    )


class Strict(Kernels):
    """The reference, where no query of a call may see a position that was given back.

    Also queries whose result is dropped: a compiled kernel would read outside the pool.
    """

    def attend(self, layer: int, q: Any, k: Stream, v: Stream) -> Any:
        for stream in (k, v):
            assert stream.window is not None
            seen = np.maximum(0, stream.length - q.shape[2] - stream.window + 1)
            assert ((stream.held == stream.sinks) | (seen >= stream.held)).all()
        return super().attend(layer, q, k, v)


def make_cache(plan: AttentionPlan, batch: int = 1, **options: Any) -> Cache:
    options = {"max_tokens": 800} | options
    return Cache([plan], Strict([plan], [{}]), batch=batch, **options)


def values(plan: AttentionPlan, tokens: int, batch: int = 1, seed: int = 0) -> tuple[Array, Array]:
    return random_kv(np.random.default_rng(seed), plan, batch, tokens)


def queries(tokens: int, batch: int = 1) -> Array:
    return np.random.default_rng(9).normal(size=(batch, 4, tokens, D)).astype(np.float32)


def feed(cache: Cache, k: Array, v: Array, *ends: int) -> None:
    for begin, end in itertools.pairwise((cache.length, *ends)):
        cache.append(0, k[:, :, begin:end], v[:, :, begin:end])


def used(cache: Cache) -> int:
    return sum(pool.used for pool in cache.pools.values())


def refusal(call: Any) -> str:
    with pytest.raises(KvantError) as caught:
        call()
    return str(caught.value)
