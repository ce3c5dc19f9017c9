"""Runs a script on a cache and on the oracle, and compares after every step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvant.ir.errors import KvantError
from kvant.ir.halves import Halves
from kvant.ir.halves_block import Narrow
from kvant.ir.integers import Integers
from kvant.ir.plan import AttentionPlan
from kvant.ir.tolerance import score_rounding, share_of_allowed
from kvant.runtime.cache import Cache
from kvant.runtime.launch_reference import read_stream, rounding_of
from kvant.runtime.stream import Kernels, Stream

from .cache_bytes import poison
from .cache_oracle import Array, Constants, Oracle, OracleStream

Factory = Callable[[list[AttentionPlan], list[Constants]], Kernels]
Step = tuple[Any, ...]  # ("append", T, lengths | None), ("attend", T_q), ("flush",), ...


@dataclass(frozen=True)
class Case:
    """A plan, a batch and a script. `seed` fixes all values; repr(case) is the reproducer."""

    plan: AttentionPlan
    constants: Constants
    batch: int
    start: tuple[int, ...] | None
    steps: tuple[Step, ...]
    seed: int
    layers: int = 1
    max_tokens: int = 320


def new_pair(factory: Factory, case: Case) -> tuple[Cache, list[Oracle]]:
    """Return an empty cache and its oracles, one per layer."""
    plans, constants = [case.plan] * case.layers, [case.constants] * case.layers
    kernels = factory(plans, constants)
    start = None if case.start is None else np.array(case.start)
    cache = Cache(
        plans, kernels, batch=case.batch, max_tokens=case.max_tokens, start=start, artifact_id="t"
    )
    return cache, [
        Oracle(p, c, case.batch, case.start) for p, c in zip(plans, constants, strict=True)
    ]


@dataclass
class Seen:
    """What running a case showed.

    Attributes:
        garbage: bytes with which each attend is repeated.
        poisoned: attends repeated over garbage, each time bit for bit the same.
        worst: largest error as a share of what P7 allows.
        trusted: at least one output would have passed the bound if the scale were wrong by 0.1 %; a
            case without (an empty cache, say) proves little.
    """

    garbage: tuple[int, ...] = (0xFF, 0x7A)
    poisoned: int = 0
    worst: float = 0.0
    trusted: bool = False


def run_case(factory: Factory, case: Case, exact: bool = False, seen: Seen | None = None) -> Cache:
    """Run the script on the cache and the oracle, and compare after every step.

    What is stored is compared after each step that changes it, and after the last: an attend that
    wrote to it is seen there.

    Args:
        factory: makes kernels of (plans, constants), one of each per layer.
        case: what to do.
        exact: the kernels encode in float64, so that stored bits equal the oracle's and outputs are
            those of float64. Otherwise outputs are held to P7 on what the pages really hold, and
            what they hold to one step of the encoding.
        seen: filled with what was seen.

    Returns: the cache, for more checks.
    """
    cache, oracles = new_pair(factory, case)
    rng, seen = np.random.default_rng(case.seed), seen or Seen()
    for number, step in enumerate(case.steps):
        changes = step[0] != "attend" or step is case.steps[-1]
        try:
            run_step(cache, oracles, step, rng, exact, seen, stored=changes)
        except AssertionError as error:
            raise AssertionError(f"step {number} {step} of {case!r}: {error}") from error
    return cache


def run_step(
    cache: Cache,
    oracles: list[Oracle],
    step: Step,
    rng: Any,
    exact: bool,
    seen: Seen | None = None,
    stored: bool = True,
) -> None:
    """Run one step of a script on both; `stored` says that what is stored is compared, too."""
    seen = seen or Seen()
    match step:
        case ("append", tokens, lengths):
            for layer, oracle in enumerate(oracles):
                k, v = random_kv(rng, oracle.plan, cache.batch, tokens)
                padding = None if lengths is None else np.array(lengths)
                cache.append(layer, k, v, padding)
                if tokens:
                    oracle.append(k, v, padding)
        case ("attend", queries):
            for layer, oracle in enumerate(oracles):
                tokens = min(queries, len(oracle.valid))
                shape = (cache.batch, oracle.plan.q_heads, tokens, oracle.plan.k.channels)
                q = rng.normal(size=shape).astype(np.float32)
                if oracle.can_attend(tokens):
                    check_attend(cache, oracle, layer, q, exact, seen)
                else:
                    refused("window-given-back", lambda q=q, i=layer: cache.attend(i, q))
        case ("flush",):
            cache.flush()
            for oracle in oracles:
                oracle.flush()
        case ("reserve", n):
            cache.reserve(n)
            for oracle in oracles:
                oracle.reserve = n
        case ("reorder", index):
            cache.reorder(np.array(index))
            for oracle in oracles:
                oracle.reorder(np.array(index))
        case ("truncate", removed):
            n = max(0, len(oracles[0].valid) - removed)
            if all(oracle.can_cut(n) for oracle in oracles):
                cache.truncate(n)
                for oracle in oracles:
                    oracle.cut(n)
            else:
                refused("truncate-", lambda: cache.truncate(n))
    if stored:
        check_state(cache, oracles, exact)


def refused(code: str, call: Callable[[], object]) -> None:
    with pytest.raises(KvantError) as caught:
        call()
    assert caught.value.code.startswith(code), caught.value


def check_state(cache: Cache, oracles: list[Oracle], exact: bool) -> None:
    """Compare lengths, encoded ends, stored values and counts of pages."""
    for layer, oracle in zip(cache.layers, oracles, strict=True):
        assert layer.columns.length == len(oracle.valid) == cache.length
        for stream, rows in zip(layer.streams, (oracle.k, oracle.v), strict=True):
            assert stream.length.tolist() == [row.x.shape[1] for row in rows]
            assert stream.encoded.tolist() == [row.end for row in rows]
            assert stream.held.tolist() == [row.gone for row in rows]
            decoded = read_stream(stream)
            for b, row in enumerate(rows):
                check_stored(stream, decoded[b, :, : row.x.shape[1]], row, exact)
    in_use = [page for layer in cache.layers for s in layer.streams for page in pages_of(s)]
    assert len(in_use) == sum(pool.used for pool in cache.pools.values())
    assert len(set(in_use)) == len(in_use), "a page with two owners"


def pages_of(stream: Stream) -> list[tuple[int, int]]:
    """(page bytes, index) of each page in the table; the table holds exactly what is needed."""
    size, page = stream.layout.tokens, np.arange(stream.table.shape[1])
    first = (stream.held - stream.sinks) // size
    last = -(-(stream.encoded - stream.sinks) // size)
    need = (page >= first[:, None]) & (page < last[:, None])
    assert ((stream.table >= 0) == need).all()
    return [(stream.layout.page_bytes, int(page)) for page in stream.table[stream.table >= 0]]


def check_stored(stream: Stream, decoded: Array, row: OracleStream, exact: bool) -> None:
    """What the pages decode to is what the encoding says of the history."""
    want = row.stored()
    want[:, row.plan.tokens.sink : row.gone] = 0.0
    if exact:
        assert np.array_equal(decoded, want), "stored bits differ from the encoding's"
        return
    # A kernel that encodes in float32 may round the other way at a tie, by one step, and rarely.
    error = np.abs(decoded - want)
    far = error > 1e-5 * np.abs(want).max(initial=1.0)
    steps = np.abs(want - row.x) + np.abs(decoded - row.x)
    assert not (far & (error > 1.001 * steps + 1e-5)).any(), "stored values are off by over a step"
    assert far.mean() <= 0.01 if far.size else True, f"{far.mean():.2%} of the codes differ"


def check_attend(
    cache: Cache, oracle: Oracle, layer: int, q: Array, exact: bool, seen: Seen
) -> None:
    """Outputs agree within the bound, and garbage where nothing is stored changes no bit."""
    out, lse = cache.attend(layer, q, return_lse=True)
    if exact:
        want, want_lse = oracle.attend(q)
        check_close("output", out, want, 1e-6 * np.abs(want).max(initial=1.0))
        check_close("lse", finite(lse), finite(want_lse), 1e-5)
        assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    else:
        bound = Bound(cache, oracle, layer, q)
        shares = bound.shares(out, lse)
        worst = max(shares)
        assert worst <= 1, f"output, lse are off by {shares} times what P7 allows"
        seen.worst = max(seen.worst, worst)
        seen.trusted = seen.trusted or max(bound.shares(*bound.with_wrong_scale())) > 1
    for garbage in seen.garbage:
        poison(cache, garbage)
        again, again_lse = cache.attend(layer, q, return_lse=True)
        assert np.array_equal(out, again), "garbage past the length changed the output"
        assert np.array_equal(lse, again_lse)
        seen.poisoned += 1


class Bound:
    """P7 for one attend, on what the pages really hold; the formula is in `ir/tolerance.py`."""

    def __init__(self, cache: Cache, oracle: Oracle, layer: int, q: Array) -> None:
        k, v = (read_stream(s) for s in cache.layers[layer].streams)
        self.oracle, self.q = oracle, q
        self.rows = [
            (k[row, :, : one.x.shape[1]], v[row, :, : one.x.shape[1]])
            for row, one in enumerate(oracle.k)
        ]
        rounding = score_rounding(oracle.queries(q), k, oracle.plan.scale)
        streams = cache.layers[layer].streams
        self.rounding = {n: rounding_of(oracle.plan, *streams, n) for n in (1, 2)}
        self.near, self.slack = 4 * rounding, 0.0
        self.want, self.plain = self._attend(q), self._attend(q, np.float32)
        self.floors = rounding * float(np.abs(v).max(initial=0.0)) + self.slack, rounding

    def _attend(self, q: Array, dtype: Any = np.float64) -> tuple[Array, Array]:
        used: list[Integers | Halves | Narrow] = []

        def products(row: int, queries: int) -> Integers | Halves | Narrow | None:
            rounding = self.rounding[min(queries, 2)]
            if rounding is None:
                return None
            used.append(rounding.row(row))
            used[-1].near = self.near
            return used[-1]

        found = self.oracle.attend(q, self.rows.__getitem__, dtype, products)
        spread = self.oracle.plan.v.channels if self.oracle.plan.out_maps else 1
        for one in used:
            self.slack = max(self.slack, spread * float(one.slack.max(initial=0.0)))
        return found

    def shares(self, out: Array, lse: Array) -> tuple[float, float]:
        """Errors of output and lse as shares of what is allowed."""
        (o, e), (plain_o, plain_e) = self.want, self.plain
        return (
            share_of_allowed(out, o, plain_o, self.floors[0]),
            share_of_allowed(lse[..., None], e[..., None], plain_e[..., None], self.floors[1]),
        )

    def with_wrong_scale(self) -> tuple[Array, Array]:
        """What a kernel would give whose scale is wrong by 0.1 %."""
        return self._attend(1.001 * self.q)


def check_close(name: str, have: Array, want: Array, bound: float) -> None:
    worst = float(np.abs(have - want).max(initial=0.0))
    assert worst <= bound, f"{name} is off by {worst:.3g}, allowed are {bound:.3g}"


def finite(x: Array) -> Array:
    return np.where(np.isneginf(x), 0.0, x)


def random_kv(rng: Any, plan: AttentionPlan, batch: int, tokens: int) -> tuple[Array, Array]:
    """Keys with a few large channels, values without, and now and then a constant group."""
    k = rng.normal(size=(batch, plan.k.heads, tokens, plan.k.channels)).astype(np.float32)
    k *= 1 + 8 * (np.arange(plan.k.channels) % 7 == 3).astype(np.float32)
    v = rng.normal(size=(batch, plan.v.heads, tokens, plan.v.channels)).astype(np.float32)
    if tokens and rng.random() < 0.1:
        v[:, 0] = rng.choice([0.0, 1.5])
    return k, v
