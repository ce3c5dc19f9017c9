"""Decode steps on a device: what is launched, what stays, and what a captured graph may replay."""

from collections.abc import Sequence
from ctypes import c_int64
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from kvant.ir.errors import KvantError
from kvant.ir.plan import AttentionPlan
from kvant.runtime.cache import Cache
from kvant.runtime.launch_gpu import Kernels
from kvant.runtime.launch_reference import Kernels as Reference
from kvant.runtime.memory import TorchMemory
from kvant.targets.gpu import emit, launch_facts

from ..targets.cpu_cases import PLANS, constants_of
from ..targets.gpu_interpreter import Interpreter, interpreted
from ..targets.gpu_tile_plans import TILED
from .cache_runner import random_kv

ROWS = "first count before length_of k_begin k_end v_begin v_end".split()
ROWS += "k_encoded v_encoded k_tail_first v_tail_first".split()
NUMBERS = "tokens k_encodes v_encodes k_type v_type queries rows splits parts alone".split()
NUMBERS += "least_tiles most_splits k_capacity v_capacity".split()


@dataclass
class Launched:
    """A launch: where its numbers were, and what they were."""

    kernel: str
    grid: Any
    given: dict[str, Any]
    addresses: dict[str, Any]

    @property
    def counted(self) -> dict[str, Any]:
        rows = {n: self.given[n].tolist() for n in ROWS if n in self.given}
        return rows | {n: int(self.given[n]) for n in NUMBERS if n in self.given}


@dataclass
class Recorder:
    """Starts nothing, and keeps what was started."""

    names: dict[str, list[str]]
    launches: list[Launched] = field(default_factory=list)
    capturing: bool = False

    def launch(self, key: str, kernel: str, grid: Any, arguments: Sequence[Any]) -> None:
        given = dict(zip(self.names[kernel], arguments, strict=True))
        addresses = {n: x.data_ptr() if torch.is_tensor(x) else x for n, x in given.items()}
        given = {n: x.clone() if n in ROWS else x for n, x in given.items()}
        self.launches.append(Launched(kernel, grid, given, addresses))

    def prepare(self, key: str, kernel: str, arguments: Any, changing: Any) -> Any:
        return Prepared(self, key, kernel, list(arguments), list(changing))

    def stream(self) -> int:
        return 0

    def is_capturing(self) -> bool:
        return self.capturing


@dataclass
class Prepared:
    launcher: Any
    key: str
    kernel: str
    arguments: list[Any]
    changing: list[int]

    def start(self, grid: Any, stream: int, *changing: Any) -> None:
        for place, value in zip(self.changing, changing, strict=True):
            self.arguments[place] = value
        given = [x.value if isinstance(x, c_int64) else x for x in self.arguments]
        self.launcher.launch(self.key, self.kernel, grid, given)


def recorded(plan: AttentionPlan, layers: int = 2, **options: Any) -> tuple[Cache, Recorder]:
    """A cache whose kernels do nothing."""
    launch = launch_facts(emit(plan))
    names = {k: [x.partition(":")[0] for x in v] for k, v in launch["kernels"].items()}
    recorder = Recorder(names)
    plans, keys = [plan] * layers, ["p0"] * layers
    kernels = Kernels(
        plans, [constants_of(plan)] * layers, keys, {"p0": launch}, recorder, TorchMemory("cpu")
    )
    return Cache(plans, kernels, **({"batch": 2, "max_tokens": 2_000} | options)), recorder


def token(plan: AttentionPlan, tokens: int = 1) -> tuple[Any, Any, Any]:
    """k, v and q of two rows."""
    return (
        torch.ones(2, plan.k.heads, tokens, plan.k.channels),
        torch.ones(2, plan.v.heads, tokens, plan.v.channels),
        torch.ones(2, plan.q_heads, tokens, plan.k.channels),
    )


def check_same(fast: Recorder, slow: Recorder) -> None:
    """Both started the same kernels over the same numbers."""
    for one, other in zip(fast.launches, slow.launches, strict=True):
        assert (one.kernel, one.grid) == (other.kernel, other.grid)
        assert one.counted == other.counted, one.kernel
    fast.launches.clear()
    slow.launches.clear()


def check_tables(cache: Cache, launches: list[Launched]) -> None:
    """The tables on the device are those that the host counts with, where a kernel reads them."""
    at = 0
    for launched in (x for x in launches if x.kernel == "attend"):
        for stream in cache.layers[at % len(cache.layers)].streams:
            role = stream.plan.role
            width = launched.given[f"{role}_max_pages"]
            table = launched.given[f"{role}_table"][: 2 * width].reshape(2, width).numpy()
            held = stream.table[:, :width] >= 0
            assert (table[held] == stream.table[:, :width][held]).all()
        at += 1


# One scale a token; with a sink and a window; blocks of keys; kernels in float32.
KINDS = {name: TILED[name] for name in ("int4", "int4-ring", "kivi2")} | {"slices": PLANS["slices"]}
SLOW = [pytest.param(name, marks=pytest.mark.long) for name in ("kivi2", "slices")]
SCRIPT = "1 " * 40 + "a f 1 1 r 1 1 1 3 1 1 1 t 1 1 p 1 1 " + "1 " * 100


@pytest.mark.parametrize("name", ["int4", "int4-ring", *SLOW])
def test_what_stays_is_not_made_anew_and_the_rest_is_as_ever(name: str) -> None:
    plan = KINDS[name]
    (fast, own), (slow, other) = (recorded(plan, start=[0, 7]) for _ in range(2))
    _, _, q = token(plan)
    soon = 0
    for cache in (fast, slow):
        for layer in (0, 1):
            cache.append(layer, *token(plan, 90)[:2])
    for step in SCRIPT.split():
        for cache in (fast, slow):
            for layer in (0, 1):
                if cache is slow:
                    cache.decode = None
                match step:
                    case "1" | "3":
                        cache.append(layer, *token(plan, int(step))[:2])
                    case "p" if layer:  # one layer is given back what it was to have
                        cache.flush_layer(layer)
                    case "r" | "t" | "f" if not layer:
                        {"r": lambda c: c.reorder([1, 0]), "f": lambda c: c.flush()}.get(
                            step, lambda c: c.truncate(c.layers[0].columns.length - 1)
                        )(cache)
                if cache is slow:
                    cache.decode = None
                if step in "1a":
                    known = fast.decode is not None and fast.decode.members[layer].is_known
                    soon += cache is fast and known
                    cache.attend(layer, q)
        check_tables(fast, own.launches)
        check_same(own, other)
        for one, two in zip(fast.layers, slow.layers, strict=True):
            for s, t in zip(one.streams, two.streams, strict=True):
                for field_ in ("length", "encoded", "held", "tail_first"):
                    assert (getattr(s, field_) == getattr(t, field_)).all(), field_
            assert one.columns.length == two.columns.length
    assert soon > 240


def test_a_step_is_one_copy_and_four_launches_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = TILED["int4"]
    cache, recorder = recorded(plan, layers=3)
    k, v, q = token(plan)
    for _ in range(2):
        for layer in range(3):
            cache.append(layer, k, v)
            cache.attend(layer, q)
    recorder.launches.clear()
    placed: list[Any] = []
    monkeypatch.setattr(TorchMemory, "place", lambda self, x: placed.append(x))
    for layer in range(3):
        cache.append(layer, k, v)
        cache.attend(layer, q)
    assert [x.kernel for x in recorder.launches] == ["append", "prepare", "attend", "combine"] * 3
    assert not placed  # the board's own copy is `copy_`
    assert recorder.launches[0].given["k_x"] is k


def test_another_type_of_new_tokens_is_told_to_the_kernel() -> None:
    plan = TILED["int4"]
    cache, recorder = recorded(plan, layers=1)
    k, v, q = token(plan)
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.float16):
        cache.append(0, k.to(dtype), v.to(dtype))
        assert cache.attend(0, q.to(dtype)).dtype is dtype
    types = [x.given["k_type"] for x in recorder.launches if x.kernel == "append"]
    assert types == [0, 0, 1, 2]


# --- steps at fixed addresses


def planned(
    plan: AttentionPlan, tokens: int, prompt: int = 90, **options: Any
) -> tuple[Cache, Any, Recorder]:
    cache, recorder = recorded(plan, **options)
    for layer in (0, 1):
        cache.append(layer, *token(plan, prompt)[:2])
    steps = cache.decode_steps(tokens)
    recorder.launches.clear()
    return cache, steps, recorder


@pytest.mark.parametrize("name", ["int4-ring", "kivi2", *SLOW[1:]])
def test_two_replays_differ_in_what_memory_holds_alone(name: str) -> None:
    plan = KINDS[name]
    cache, steps, recorder = planned(plan, 150, start=[0, 7])
    slow, other = recorded(plan, start=[0, 7])
    for layer in (0, 1):
        slow.append(layer, *token(plan, 90)[:2])
    slow.flush()
    other.launches.clear()
    k, v, q = token(plan)
    addresses: list[Any] = []
    for _ in range(150):
        steps.plan()
        for layer in (0, 1):
            steps.append(layer, k, v)
            steps.attend(layer, q)
            slow.append(layer, k, v)
            slow.decode = None
            slow.attend(layer, q)
        for launched in recorder.launches:
            launched.addresses.pop("out", None)  # torch's allocator gives it; in a graph, its pool
        addresses.append([(x.kernel, x.grid, x.addresses) for x in recorder.launches])
        check_tables(cache, recorder.launches)
        for one, two in zip(recorder.launches, other.launches, strict=True):
            rows = [{n: x for n, x in r.counted.items() if n in ROWS} for r in (one, two)]
            for name_ in ("k_tail_first", "v_tail_first"):  # their tails have other sizes
                for own in rows:
                    own.pop(name_, None)
            assert rows[0] == rows[1], one.kernel
            assert all(a >= b for a, b in zip(one.grid, two.grid, strict=True)), one.kernel
        recorder.launches.clear()
        other.launches.clear()
    assert all(one == addresses[0] for one in addresses)
    assert (cache.lengths == slow.lengths).all()


@pytest.mark.parametrize(  # rows alike; rows encoded in turns
    "name", ["int4", pytest.param("kivi2", marks=pytest.mark.long)]
)
def test_a_full_tail_is_moved_to_its_own_front(name: str) -> None:
    cache, steps, _ = planned(TILED[name], 900, prompt=5, start=[0, 3])
    stream = cache.layers[1].k
    tail, moved = stream.tail, 0
    for row in (0, 1):
        for position in range(int(stream.encoded[row]), int(stream.length[row])):
            tail[row, :, position - int(stream.tail_first[row])] = position
    for _ in range(900):
        before, waiting = stream.tail_first, stream.encoded
        steps.plan()
        moved += stream.tail_first is not before
        assert stream.tail is tail
        for row in (0, 1):
            length, first = int(stream.length[row]), int(stream.tail_first[row])
            tail[row, :, length - 1 - first] = length - 1  # what append does
            for position in range(int(waiting[row]), length):  # the step may encode the first ones
                assert (tail[row, :, position - first] == position).all()
    assert moved >= 2


@dataclass
class Captured(Interpreter):
    """Keeps launches with the numbers that they had, and runs them when they are replayed."""

    modules: Any
    capturing: bool = False
    graph: list[Any] = field(default_factory=list)

    def launch(self, key: str, kernel: str, grid: Any, arguments: Sequence[Any]) -> None:
        if self.capturing:
            self.graph.append((key, kernel, grid, tuple(arguments)))
        else:
            super().launch(key, kernel, grid, arguments)

    def replay(self) -> None:
        for launched in self.graph:
            super().launch(*launched)


def test_a_replayed_graph_attends_to_what_was_appended_since() -> None:
    plan = TILED["int4"]
    kernels: Any = interpreted([plan], [{}])
    launcher = kernels._launcher = Captured(kernels._launcher.modules)
    cache, plain = (
        Cache([plan], target, batch=2, max_tokens=400, start=[0, 5])
        for target in (kernels, Reference([plan], [{}]))
    )
    rng = np.random.default_rng(1)
    prompt = random_kv(rng, plan, 2, 126)
    for one in (cache, plain):
        one.append(0, *prompt)
    steps = cache.decode_steps(100)
    k, v, q = token(plan)
    steps.plan()
    launcher.capturing = True
    steps.append(0, k, v)
    out = steps.attend(0, q)
    launcher.capturing = False
    for step in range(4):  # the first row's second tile is whole after the third token
        new_k, new_v = random_kv(rng, plan, 2, 1)
        new_q = rng.normal(size=q.shape).astype(np.float32)
        for there, here in ((k, new_k), (v, new_v), (q, new_q)):
            there.copy_(torch.from_numpy(here))
        if step:
            steps.plan()
        for _ in range(2 if step == 1 else 1):  # a step that runs twice stores the same
            launcher.replay()
        plain.append(0, new_k, new_v)
        np.testing.assert_allclose(out.numpy(), plain.attend(0, new_q), rtol=0, atol=3e-3)
    cache.check()
    assert cache.length == 130


@pytest.mark.long
def test_the_batch_changes_no_bit() -> None:
    """Rows are split by their own length, and their parts are merged in an order of their own."""
    plan = TILED["int4"]
    kernels = interpreted([plan], [{}])
    kernels._launches["p0"] |= {"least_tiles": 1, "most_splits": 2}
    rng = np.random.default_rng(4)
    k, v = random_kv(rng, plan, 2, 210)
    q = rng.normal(size=(2, plan.q_heads, 1, plan.k.channels)).astype(np.float32)
    both = Cache([plan], kernels, batch=2, max_tokens=400, start=[0, 120])
    both.append(0, k, v)
    both.flush()
    out = both.attend(0, q)
    for row, first in ((0, 0), (1, 120)):
        alone = Cache([plan], kernels, batch=1, max_tokens=400)
        one = slice(row, row + 1)
        alone.append(0, k[one, :, first:], v[one, :, first:])
        alone.flush()
        assert np.array_equal(alone.attend(0, q[one])[0], out[row])


def test_room_is_made_before_and_then_it_is_full() -> None:
    plan = TILED["int4"]
    cache, steps, _ = planned(plan, 3)
    assert all(len(pool.pages) >= pool.used for pool in cache.pools.values())
    k, v, q = token(plan)
    for _ in range(3):
        steps.plan()
        steps.append(0, k, v)
        steps.attend(0, q)
    with pytest.raises(KvantError) as caught:
        steps.plan()
    assert (caught.value.code, caught.value.what) == (
        "cache-full",
        "the decode steps were made for 93 columns, and the cache has them",
    )
    with pytest.raises(KvantError) as caught:
        cache.decode_steps(2_000)
    assert (caught.value.code, caught.value.what) == (
        "cache-full",
        "2000 more columns after 93 pass the limit of 2000",
    )


@pytest.mark.parametrize("change", ["append", "flush", "truncate", "reorder"])
def test_steps_end_when_another_call_changes_the_cache(change: str) -> None:
    plan = TILED["int4"]
    cache, steps, _ = planned(plan, 50)
    k, v, _ = token(plan)
    steps.plan()
    match change:
        case "append":
            cache.append(1, k, v)
        case "flush":
            cache.flush_layer(1)
        case "truncate":
            cache.truncate(89)
        case "reorder":
            cache.reorder([1, 0])
    with pytest.raises(KvantError) as caught:
        steps.plan()
    assert (caught.value.code, caught.value.what) == (
        "steps-ended",
        "another call has changed the cache since the last step",
    )


def test_what_is_counted_cannot_be_captured() -> None:
    plan = TILED["int4"]
    cache, steps, recorder = planned(plan, 50)
    k, v, q = token(plan)
    steps.plan()
    recorder.capturing = True
    steps.append(0, k, v)
    steps.attend(0, q)
    wrong = {
        "a step is planned": steps.plan,
        "memory is made for decode steps": lambda: cache.decode_steps(3),
        "append of a layer": lambda: cache.append(0, k, v),
        "attend over a layer": lambda: cache.attend(0, q),
    }
    for what, call in wrong.items():
        with pytest.raises(KvantError) as caught:
            call()
        assert caught.value.code == "graph-capture", what
        assert caught.value.what == (
            f"{what} while a CUDA graph is captured; a replay would use the counts of now again"
        )


def test_a_step_must_be_planned() -> None:
    plan = TILED["int4"]
    _, steps, _ = planned(plan, 50)
    k, v, q = token(plan)
    with pytest.raises(KvantError) as caught:
        steps.append(0, k, v)
    assert str(caught.value).startswith("append of a decode step before any was planned")
    assert caught.value.code == "not-planned"
    steps.plan()
    with pytest.raises(KvantError) as caught:
        steps.attend(0, q)
    assert caught.value.what == "attend of a decode step before its append"
    with pytest.raises(KvantError) as caught:
        steps.append(2, k, v)
    assert caught.value.code == "unknown-layer"
    with pytest.raises(KvantError) as caught:
        steps.append(0, k[:, :, :, :5], v)
    assert caught.value.code == "wrong-shape"


def test_decode_steps_are_for_devices() -> None:
    plan = PLANS["kivi-2bit"]
    cache = Cache([plan], Reference([plan], [constants_of(plan)]), batch=1)
    with pytest.raises(KvantError) as caught:
        cache.decode_steps(5)
    assert (caught.value.code, caught.value.what) == (
        "not-on-a-device",
        "the cache is on cpu, where nothing is captured",
    )
    plan = TILED["int4"]
    torn, _ = recorded(plan)
    torn.append(0, *token(plan)[:2])
    with pytest.raises(KvantError) as caught:
        torn.decode_steps(5)
    assert (caught.value.code, caught.value.what) == (
        "steps-ended",
        "the layers have different numbers of columns",
    )
