"""Compiled kernels against float64: outputs within P7, stored bits equal to the encoder's."""

import numpy as np
import pytest

from kvant.ir.arrangements import ROWS
from kvant.ir.plan import AttentionPlan
from kvant.runtime.cache import Cache
from kvant.runtime.launch_reference import Kernels as Reference
from kvant.targets.machines import Cpu

from ..runtime.cache_bytes import poison
from .cpu_cases import HEADLINE, INTEGER, KIVI, PLANS, constants_of, kernels_of


@pytest.fixture(params=PLANS, ids=str)
def plan(request: pytest.FixtureRequest) -> AttentionPlan:
    return PLANS[request.param]


def filled(
    plan: AttentionPlan, lengths: list[int], seed: int = 0, cpu: Cpu | None = None
) -> list[Cache]:
    """A cache on compiled kernels and one on the reference, appended to in uneven steps."""
    constants, rng = constants_of(plan), np.random.default_rng(seed)
    kernels = (kernels_of([plan], [constants], cpu), Reference([plan], [constants]))
    caches = [Cache([plan], k, batch=len(lengths), max_tokens=2048) for k in kernels]
    done = 0
    while done < max(lengths):
        tokens = int(rng.integers(1, 150))
        count = np.clip(np.array(lengths) - done, 0, tokens)
        k, v = (
            rng.normal(size=(len(lengths), s.heads, tokens, s.channels)).astype(np.float32)
            for s in (plan.k, plan.v)
        )
        k[..., 3] *= 8
        v[:, :, :: 1 + tokens // 2] = 1.5
        for cache in caches:
            cache.append(0, k, v, count)
        done += tokens
    for cache in caches:
        cache.flush()
    return caches


def test_pages_are_the_encoders_bytes(plan: AttentionPlan) -> None:
    compiled, reference = filled(plan, [300, 1, 130])
    for have, want in zip(compiled.layers[0].streams, reference.layers[0].streams, strict=True):
        assert np.array_equal(have.tail, want.tail)
        assert have.pool.high == want.pool.high
        assert np.array_equal(have.table, want.table)
        own = have.table[have.table >= 0]
        assert len(own)
        rows = have.layout.arranged(have.pages[own], ROWS)
        assert np.array_equal(rows, want.pages[own])


@pytest.mark.parametrize("queries", [1, 9])
def test_queries_round_as_the_reference_rounds(plan: AttentionPlan, queries: int) -> None:
    """Tight also under compute = int: queries are rounded in float64, so no integer differs."""
    compare(plan, [700, 0, 130, 1], queries)


@pytest.mark.parametrize("plan", [HEADLINE, INTEGER, KIVI], ids=["float", "int", "kivi"])
@pytest.mark.parametrize("queries", [2, 130])
def test_several_splits(plan: AttentionPlan, queries: int) -> None:
    """Rows of more than two splits beside empty ones; more queries than one launch takes."""
    compare(plan, [1200, 0, 517, 1], queries)


def compare(plan: AttentionPlan, lengths: list[int], queries: int, cpu: Cpu | None = None) -> None:
    compiled, reference = filled(plan, lengths, seed=3, cpu=cpu)
    q = np.random.default_rng(5).normal(size=(4, plan.q_heads, queries, plan.k.channels))
    q = q.astype(np.float32)
    poison(compiled, 0xFF)
    out, lse = compiled.kernels.attend(0, q, *compiled.layers[0].streams)
    # Over quads the reference must read the very pages, to round what the kernels round.
    read = reference if plan.compute == "float" else compiled
    want, want_lse = reference.kernels.attend(0, q, *read.layers[0].streams)
    assert np.abs(out - want).max() < 8e-6
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    seen = np.isfinite(want_lse)
    assert np.abs(lse[seen] - want_lse[seen]).max() < 1e-5
    assert seen[0].all()
    assert not seen[1].any()
    assert np.isfinite(out).all()


def test_a_row_alone_equals_the_row_in_company() -> None:
    compiled, _ = filled(HEADLINE, [1200, 40, 517], seed=3)
    streams = compiled.layers[0].streams
    q = np.random.default_rng(5).normal(size=(3, 4, 1, 128)).astype(np.float32)
    together, _ = compiled.kernels.attend(0, q, *streams)
    compiled.reorder(np.array([2, 2, 2]))
    alone, _ = compiled.kernels.attend(0, q[[2, 2, 2]], *compiled.layers[0].streams)
    assert np.array_equal(alone[0], together[2])
    assert np.array_equal(alone[1], together[2])


@pytest.mark.parametrize("name", ["int4-token-int", "int8-int", "kivi-2bit-int"])
def test_attention_to_one_key_alone(name: str) -> None:
    """All other probabilities underflow: a block of weights may have nothing but subnormals."""
    plan = PLANS[name]
    compiled, reference = filled(plan, [300, 170], seed=4)
    streams = compiled.layers[0].streams
    for size in (30.0, 60.0, 100.0, 300.0):
        q = np.random.default_rng(6).normal(size=(2, plan.q_heads, 1, plan.k.channels))
        q = (size * q).astype(np.float32)
        out, _ = compiled.kernels.attend(0, q, *streams)
        want, _ = reference.kernels.attend(0, q, *streams)
        assert np.abs(out - want).max() < 1e-3 * np.abs(want).max()
