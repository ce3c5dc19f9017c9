"""Promises of the compiled kernels over random cases. How many ran is printed at the end.

A case is a random script of appends, attends, flushes, truncations and reorderings over a plan:
lengths 0, 1, g - 1, g, g + 1 and around pages, padding on both sides, batches of 1 to 3. A case is
mistrusted if none of its outputs would show a scale that is wrong by 0.1 %.
"""

import itertools
import os
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvant.ir.arrays import Array
from kvant.ir.plan import AttentionPlan
from kvant.runtime.cache import Cache
from kvant.runtime.launch_cpu import Kernels
from kvant.runtime.stream import Floats, Stream
from kvant.targets import cpu_scores_int, cpu_values_int, cpu_weights_int
from kvant.targets.cpu import compile_cpu, emit, this_cpu

from ..runtime.cache_bytes import stored_bytes
from ..runtime.cache_random import make_case, random_plan
from ..runtime.cache_runner import Case, Seen, random_kv, run_case
from .cpu_cases import INTEGER, INTEGER_PLANS, PLANS, constants_of, kernels_of, loaded
from .cpu_pairs import PAIRS, pairs
from .cpu_pairs_long import PAIRS_LONG

Record = Callable[[str, object], None]
SHORT = PLANS | {f"pairs-{i}": plan for i, plan in enumerate(PAIRS)}
LONG = {f"pairs-long-{i}": plan for i, plan in enumerate(PAIRS_LONG)}
IN_ALL, IN_ALL_LONG = 2_000, 4_836
BULK, THREADS = 8, 6
# Of a vector of values of INTEGER, which are those of a register.
LANES = this_cpu().vector // 4


def seeded(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVANT_NUM_THREADS", "1")


def test_the_plans_cover_pairs_of_options() -> None:
    """Six of seven pairs in `make test`, nearly all in `make test-long`."""
    every = pairs([*SHORT.values(), *LONG.values()])
    assert len(every) > 660
    assert len(pairs(SHORT.values())) > 0.85 * len(every)
    first = [plan for name, plan in PLANS.items() if name not in INTEGER_PLANS]
    assert len(pairs(first)) < 0.6 * len(every)


@pytest.mark.parametrize("name", SHORT)
def test_random_cases_within_p7(name: str, one_thread: None, record_property: Record) -> None:
    run_cases(name, SHORT[name], -(-IN_ALL // len(SHORT)), record_property)


@pytest.mark.long
@pytest.mark.parametrize("name", SHORT | LONG)
def test_many_random_cases_within_p7(name: str, one_thread: None, record_property: Record) -> None:
    plans = SHORT | LONG
    run_cases(f"{name} long", plans[name], -(-IN_ALL_LONG // len(plans)), record_property)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_random_plans_within_p7(seed: int, record_property: Record) -> None:
    rng = np.random.default_rng(seed)
    plan, constants = random_plan(rng)
    for _ in range(8):
        run_case(kernels_of, make_case(rng, plan, constants))
    record_property("cases of random plans through the CPU kernels, within P7", 8)


def run_cases(name: str, plan: AttentionPlan, count: int, record_property: Record) -> None:
    rng, constants = seeded(name), constants_of(plan)
    mistrusted, poisoned, worst = 0, 0, 0.0
    for _ in range(count):
        seen = Seen()
        case = make_case(rng, plan, constants, most_columns=220, most_appends=5)
        run_case(loaded, case, seen=seen)
        mistrusted, poisoned = mistrusted + (not seen.trusted), poisoned + seen.poisoned
        worst = max(worst, seen.worst)
    print(f"{name}: {count} cases, {mistrusted} mistrusted, worst {worst:.2f} of what P7 allows")
    record_property("cases of scripts through the CPU kernels, within P7", count)
    record_property("cases of these mistrusted: 0.1 % on the scale would not show", mistrusted)
    record_property("cases of attends over poisoned tails and pages, same bits", poisoned)
    assert worst > 0
    assert mistrusted <= 0.2 * count, "so many cases prove nothing that the others should be more"


def lengths_of(plan: AttentionPlan) -> list[int]:
    g, page, recent = plan.k.tokens.group_tokens, plan.v.page_tokens, plan.k.tokens.recent
    return [1, g - 1, g + 1, page - 1, page, page + 1, recent + g, 130]


@pytest.mark.parametrize("name", SHORT)
def test_bulk_append_equals_one_by_one(
    name: str, one_thread: None, record_property: Record
) -> None:
    plan, rng = SHORT[name], seeded(f"{name} bulk")
    for _ in range(BULK):
        tokens = max(1, int(rng.choice(lengths_of(plan))))
        start = rng.integers(0, min(tokens, 40), 2)
        k, v = random_kv(rng, plan, 2, tokens)
        some = np.sort(rng.integers(0, tokens + 1, 3)).tolist()
        ways = ([0, tokens], list(range(tokens + 1)), [0, *some, tokens])
        bulk, single, uneven = (stored_in_steps(plan, k, v, start, way) for way in ways)
        assert bulk == single == uneven, (tokens, start, some)
        assert any(bulk)
    record_property("cases of bulk append against one by one, same page bytes", BULK)


def stored_in_steps(
    plan: AttentionPlan, k: Array, v: Array, start: Array, ends: list[int]
) -> list[bytes]:
    cache = Cache([plan], loaded([plan], []), batch=2, max_tokens=400, start=start)
    for begin, end in itertools.pairwise(ends):
        cache.append(0, k[:, :, begin:end], v[:, :, begin:end])
    cache.flush()
    return stored_bytes(cache)


@pytest.mark.parametrize("name", SHORT)
def test_one_thread_equals_two(
    name: str, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    plan, rng = SHORT[name], seeded(f"{name} threads")
    for _ in range(THREADS):
        lengths = rng.integers(1, 700, 3)
        seed, queries = int(rng.integers(2**31)), int(rng.choice([1, 1, 2, 9]))
        results = []
        for threads in ("1", "2", "2"):
            monkeypatch.setenv("KVANT_NUM_THREADS", threads)
            results.append(everything(plan, lengths, queries, seed))
        assert results[0] == results[1] == results[2], (lengths, queries, seed)
    record_property("cases of one thread against two, same bits", THREADS)


def everything(plan: AttentionPlan, lengths: Array, queries: int, seed: int) -> list[bytes]:
    """All bytes that the kernels write: pages, tails, outputs, log-sum-exps."""
    rng, most = np.random.default_rng(seed), int(lengths.max())
    cache = Cache([plan], loaded([plan], []), batch=3, max_tokens=800, start=most - lengths)
    cache.append(0, *random_kv(rng, plan, 3, most))
    cache.flush()
    shape = (3, plan.q_heads, min(queries, most), plan.k.channels)
    q = rng.normal(size=shape).astype(np.float32)
    results = cache.kernels.attend(0, q, *cache.layers[0].streams)
    assert np.isfinite(results[1]).any()
    return [*stored_bytes(cache), *(array.tobytes() for array in results)]


class _WrongBy:
    """Kernels whose attend multiplies q by a factor: a wrong scale."""

    def __init__(self, kernels: Kernels, factor: float) -> None:
        self.update = kernels.update
        self.memory, self.check = kernels.memory, kernels.check
        self.layouts = kernels.layouts
        self.right, self.factor = kernels, np.float32(factor)

    def attend(self, layer: int, q: Floats, k: Stream, v: Stream) -> tuple[Floats, Floats]:
        return self.right.attend(layer, q * self.factor, k, v)


INTEGERS = [name for name, plan in SHORT.items() if plan.compute == "int"]
# One query and several take different kernels; both read pages here.
SCRIPT = (("append", 140, None), ("append", 40, None), ("attend", 1), ("attend", 3))


@pytest.mark.parametrize("name", [*INTEGERS, "kivi-2bit", "raw"])
@pytest.mark.parametrize("factor", [1.001, 0.999, 2.0])
def test_a_wrong_scale_is_seen(name: str, factor: float) -> None:
    plan = SHORT[name]
    case = Case(plan, constants_of(plan), 2, None, SCRIPT, seed=3)
    run_case(loaded, case)
    with pytest.raises(AssertionError, match="times what P7 allows"):
        run_case(lambda plans, own: _WrongBy(loaded(plans, own), factor), case)


def test_a_doubled_integer_dot_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = cpu_scores_int._sum
    monkeypatch.setattr(cpu_scores_int, "_sum", lambda *a: f"({right(*a)} + {right(*a)})")
    cpu = this_cpu()
    files = {f"p0/{name}": data for name, data in compile_cpu(emit(INTEGER, cpu), cpu).items()}
    case = Case(INTEGER, {}, 1, None, SCRIPT, seed=3)
    with pytest.raises(AssertionError, match="times what P7 allows"):
        run_case(lambda plans, own: Kernels(plans, own, ["p0"], files), case)


@pytest.mark.parametrize("mistake", ["steps", "zeros"])
def test_a_wrong_rounding_of_weights_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, or sums of zero points, that are wrong by 1 %."""
    module = {"steps": cpu_values_int, "zeros": cpu_weights_int}[mistake]
    right: Any = module.fma
    wrong = {
        "steps": lambda a, b, c: (
            right(f"({a} * T.broadcast(T.float32(1.01), {LANES}))", b, c)
            if a.startswith('T.Cast("float32')
            else right(a, b, c)
        ),
        "zeros": lambda a, b, c: (
            right(f"({a} * T.broadcast(T.float32(1.01), {LANES}))", b, c)
            if b.startswith("zero")
            else right(a, b, c)
        ),
    }
    monkeypatch.setattr(module, "fma", wrong[mistake])
    cpu = this_cpu()
    files = {f"p0/{name}": data for name, data in compile_cpu(emit(INTEGER, cpu), cpu).items()}
    case = Case(INTEGER, {}, 1, None, SCRIPT, seed=3)
    with pytest.raises(AssertionError, match="times what P7 allows"):
        run_case(lambda plans, own: Kernels(plans, own, ["p0"], files), case)
