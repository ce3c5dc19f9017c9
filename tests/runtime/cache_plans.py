"""What the tests of the cache share: plans of many encodings, tokens, and how to feed them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvant.ir.encodings import Bfp, Drop, Int, Lut, Raw, Slice, Slices, Sparse, Tokens
from kvant.ir.encodings.lut import LLOYD, NF4
from kvant.ir.errors import KvantError
from kvant.ir.layouts import page_tokens
from kvant.ir.plan import AttentionPlan, StreamPlan
from kvant.runtime.cache import Cache
from kvant.runtime.launch_reference import Kernels

from .cache_oracle import Array
from .cache_runner import random_kv

D = 32
KIVI = Tokens(Int(2, "channel", 32), recent=64, flush="block")
ENCODINGS = {
    "bf16": Tokens(Raw("bf16")),
    "f32-sink-recent": Tokens(Raw("f32"), sink=4, recent=5),
    "int8-token": Tokens(Int(8, "token", 32, zero="none")),
    "int4-token": Tokens(Int(4, "token", 16, zero="int"), sink=1),
    "int3-token": Tokens(Int(3, "token", 32, params="bf16"), recent=7),
    "int2-token-block": Tokens(Int(2, "token", 16), sink=4, recent=16, flush="block"),
    "int4-channel": Tokens(Int(4, "channel", 32), sink=4),
    "int2-channel-block": KIVI,
    "int3-channel-96": Tokens(Int(3, "channel", 96, zero="int"), recent=3),
    "int8-channel": Tokens(Int(8, "channel", 64, zero="none", params="f32"), sink=2, recent=40),
    "int4-token-bf16": Tokens(Int(4, "token", 32), sink=4, recent=9, raw=Raw("bf16")),
    "int4-many-sinks": Tokens(Int(4, "token", 32), sink=100),
    "bfp8": Tokens(Bfp(8, 32)),
    "bfp4-sink-recent": Tokens(Bfp(4, 16), sink=3, recent=10),
    "nf4": Tokens(Lut(4, 16, NF4), sink=1),
    "lloyd3-recent": Tokens(Lut(3, 32, *LLOYD[3], params="bf16"), recent=7),
    "slices-2-and-8": Tokens(
        Slices((Slice(16, Int(2, "channel", 32)), Slice(16, Int(8, "token", 16)))),
        sink=4,
        recent=64,
        flush="block",
    ),
    "slices-dropped": Tokens(
        Slices((Slice(16, Drop()), Slice(16, Int(3, "channel", 48)))), recent=9
    ),
    "sparse-channel": Tokens(Sparse(Int(4, "channel", 32), 2, limit=1.0), sink=4, recent=9),
    "sparse-token": Tokens(Sparse(Int(2, "token", 16), 3, values="bf16"), sink=1),
    "slices-raw-and-bfp": Tokens(Slices((Slice(16, Raw("bf16")), Slice(16, Bfp(4, 8)))), sink=1),
}


def make_plan(k: Tokens, v: Tokens | None = None, heads: int = 2, **options: Any) -> AttentionPlan:
    v = k if v is None else v
    return AttentionPlan(
        q_heads=2 * heads,
        scale=D**-0.5,
        softcap=None,
        window=None,
        q_maps=(),
        k=StreamPlan("k", heads, D, (), k, page_tokens(k.rest)),
        v=StreamPlan("v", heads, D, (), v, page_tokens(v.rest)),
        out_maps=(),
        **options,
    )


def make_cache(plan: AttentionPlan, batch: int = 1, max_tokens: int = 512, **options: Any) -> Cache:
    return Cache([plan], Kernels([plan], [{}]), batch=batch, max_tokens=max_tokens, **options)


def feed(cache: Cache, k: Array, v: Array, *chunks: int) -> None:
    """Append k and v to layer 0 in chunks of these sizes, the rest at once."""
    at = 0
    for size in (*chunks, k.shape[2] - sum(chunks)):
        cache.append(0, k[:, :, at : at + size], v[:, :, at : at + size])
        at += size


def values(plan: AttentionPlan, tokens: int, batch: int = 1, seed: int = 0) -> tuple[Array, Array]:
    return random_kv(np.random.default_rng(seed), plan, batch, tokens)


def queries(plan: AttentionPlan, tokens: int, batch: int = 1) -> Array:
    rng = np.random.default_rng(99)
    return rng.normal(size=(batch, plan.q_heads, tokens, D)).astype(np.float32)


def refused(code: str, call: Callable[[], object]) -> KvantError:
    with pytest.raises(KvantError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value
