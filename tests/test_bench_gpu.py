"""`bench/gpu.py --bench` without a GPU: times by a clock that is told them, and made-up results."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_bench
import gpu_cells
import gpu_launch
import gpu_measure
import gpu_ours
import gpu_peers
import gpu_render
import pytest
import torch
from gpu_cells import Cell
from gpu_measure import Budget, Timed

from kvant.runtime.cache import Cache

from .targets.gpu_interpreter import interpreted
from .targets.gpu_tile_plans import TILED

CELL = Cell("decode", "int4-token", 1, 32 * 1024)


@dataclass
class Told:
    """A clock that is told how long each call takes, and keeps the order of the calls."""

    us: dict[str, float]
    asked: list[str] = field(default_factory=list)

    def time(self, call: Callable[[], str]) -> float:
        name = call()
        self.asked.append(name)
        return self.us[name] * (1.5 if self.asked.count(name) == 1 else 1.0)


def test_calls_take_turns_and_the_first_one_does_not_count() -> None:
    clock = Told({"a": 10.0, "b": 20.0})
    found = gpu_measure.in_turns({"a": lambda: "a", "b": lambda: "b"}, clock, rounds=3, each=2)
    assert found == {"a": (10.0,) * 3, "b": (20.0,) * 3}
    assert clock.asked == list("ab" + "aabb" * 3)


def test_a_ratio_is_of_medians_and_of_the_worst_round() -> None:
    peer, own = Timed((10.0, 12.0, 11.0)), Timed((5.0, 8.0, 5.0))
    assert gpu_measure.ratio(peer, own) == {"ratio": 11.0 / 5.0, "worst": 1.5}
    assert gpu_measure.best({"slow": own, "fast": Timed((1.0,))}) == "fast"
    assert gpu_measure.spread_too_far([peer]) is None
    assert gpu_measure.spread_too_far([peer, own]) == "rounds spread over 60%"


def test_the_host_is_timed_apart_from_the_device() -> None:
    waited: list[int] = []
    us = gpu_measure.host_us(lambda: None, lambda: waited.append(1), calls=10, rounds=3)
    assert 0.0 < us < 1e4
    assert len(waited) == 4


def contest(monkeypatch: pytest.MonkeyPatch, us: dict[str, float]) -> tuple[Any, Told]:
    monkeypatch.setattr(gpu_measure, "captured", lambda call: (call, True))
    calls = {name: (lambda name=name: name) for name in us}
    own = {name: calls[name] for name in us if name.startswith("ours")}
    plain = {name: calls[name] for name in us if name.startswith("plain")}
    others = {name: calls[name] for name in us if name not in own and name not in plain}
    clock = Told(us)
    return gpu_bench.contest(own, others, plain, clock), clock


def test_the_fastest_peer_counts_and_the_slow_ones_are_only_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    us = {"ours": 20.0, "ours, with append": 25.0, "plain Triton int4": 60.0}
    us |= {"p1": 40.0, "p2": 30.0, "p3": 50.0, "p4": 90.0}
    row, clock = contest(monkeypatch, us)
    assert (row["best"], row["ratio"], row["worst"]) == ("p2", 1.5, 1.5)
    assert set(row["times"]) == set(us) - {"p4"}
    assert row["first_look"]["p4"] == 90.0
    assert clock.asked.count("p4") < clock.asked.count("p3")
    assert contest(monkeypatch, {"ours": 2.0})[0]["refused"] == "no peer runs here"


def test_a_peer_that_is_wrong_or_raises_takes_no_part() -> None:
    want = torch.ones(2, 4, 8)

    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'flash_attn'")

    made = [
        ("right", lambda: lambda: want * 1.001),
        ("wrong", lambda: lambda: want * 1.1),
        ("nan", lambda: lambda: want * torch.nan),
        ("missing", missing),
    ]
    found, refused = gpu_bench.usable(made, want, 0.02)
    assert list(found) == ["right"]
    assert refused == {
        "wrong": "its output is wrong by 0.100 of itself",
        "nan": "its output is wrong by nan of itself",
        "missing": "ModuleNotFoundError: No module named 'flash_attn'",
    }


def test_a_peer_that_takes_too_long_to_begin_takes_no_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_bench, "PEER_SECONDS", 0.05)
    _, refused = gpu_bench.usable([("slow", lambda: time.sleep(9))], None, 1.0)
    assert refused == {"slow": "TimeoutError: it took more than 0.05 s to begin"}


def small_case(tokens: int = 70, heads: int = 1, group: int = 4, width: int = 128) -> Any:
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(2, heads * group, width, generator=draw)
    return gpu_peers.Case(
        q, *(torch.randn(2, heads, tokens, width, generator=draw) for _ in range(2))
    )


@pytest.mark.parametrize("folded", [True, False])
def test_torchs_peers_attend(folded: bool) -> None:
    case = small_case(heads=2)
    call = gpu_peers._sdpa(case, "MATH", folded=folded)
    assert gpu_ours.error(call(), gpu_bench.exact(case)) < 1e-5
    names = [name for name, _ in gpu_peers.decoders(case)]
    assert len(names) == len(set(names)) == 10


def test_an_unfused_append_stores_one_token() -> None:
    case = small_case()
    ((_, make),) = gpu_peers.appends(case)
    call = make()
    case.k[:, :, -1] = 0
    call()
    assert (case.k[:, :, -1] != 0).all()


def test_our_step_attends_over_all_tokens_of_a_case() -> None:
    plan = TILED["int4"]
    kernels = interpreted([plan], [{}])
    art: Any = SimpleNamespace(
        new_cache=lambda batch, max_tokens: Cache(
            [plan], kernels, batch=batch, max_tokens=max_tokens
        )
    )
    case = small_case(group=2)
    step = gpu_ours.step_of(art, case)
    for out in (step.attend(), step.whole()):  # it may run again
        assert gpu_ours.error(out, gpu_bench.exact(case)) < gpu_ours.ERRORS["int4-token"]
    assert step.cache.length == 70


def test_what_there_is_no_time_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    budget = Budget(100.0, lambda: now[0])
    now[0] = 80.0
    assert budget.left == 20.0
    row = gpu_bench.row_of(Path(), CELL, budget, Told({}))
    assert row == {"cell": asdict(CELL), "refused": "the time was up"}
    monkeypatch.setattr(gpu_bench, "decode", lambda *_: 1 / 0)
    now[0] = 0.0
    row = gpu_bench.row_of(Path(), CELL, budget, Told({}))
    assert row["refused"] == "ZeroDivisionError: division by zero"


# --- the page, from numbers that are made up


def made_up(cell: Cell, ours: float, peer: float, **fields: Any) -> dict[str, Any]:
    """A row whose numbers mean nothing."""
    times = {
        "ours": {"us": [ours, ours, ours * 1.1], "graph": True},
        "ours, with append": {"us": [ours + 4] * 3, "graph": True},
        "torch flash, group folded": {"us": [peer] * 3, "graph": False},
    }
    row = {"cell": asdict(cell), "times": times, "best": "torch flash, group folded"}
    row |= {"ratio": peer / ours, "worst": peer / (ours * 1.1), "first_look": {"slow one": 999.0}}
    row |= {"refused_peers": {"flash-attn 3": "ModuleNotFoundError: no"}, "error": 0.12}
    return row | {"bytes": 600_000_000, "predicted": 1.2 * ours} | fields


def page_of(*rows: dict[str, Any], **fields: Any) -> str:
    machine = {"name": "MADE UP", "kind": "sm_90", "sms": 132, "bandwidth": 4800.0, "memory": 1}
    data = {
        "machine": machine,
        "versions": {"torch": "0.0"},
        "checked": {"found": 9, "agree": 7, "failed": 1},
        "clocks": ["made up, 1 MHz", "made up, 2 MHz"],
        "rows": list(rows),
    }
    return gpu_render.page(data | fields)


def line_of(page: str, text: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| {text}"))


def test_goals_are_judged_by_their_worst_cell_and_losses_are_called_losses() -> None:
    short = Cell("decode", "int4-token", 1, 4096)
    page = page_of(made_up(CELL, 20.0, 30.0), made_up(short, 20.0, 17.0))
    assert line_of(page, "4-bit decode, batch 1, 32k") == (
        "| 4-bit decode, batch 1, 32k | 1.4 | 2 | decode int4-token 1x32k: 1.50 (1.36) | reached |"
    )
    assert "0.85" in line_of(page, "short context")
    assert line_of(page, "short context").endswith("| **missed, a loss** |")
    assert line_of(page, "8-bit decode").endswith("| - | not measured |")
    assert line_of(page, "cost model").endswith(
        "decode int4-token 1x32k: 1.20; decode int4-token 1x4k: 1.20 | aim reached |"
    )
    assert "7 of 9 artifacts agree, **1 fail**, 1 were left out for want of time" in page


def test_a_goal_of_two_cells_needs_both() -> None:
    first, second = gpu_cells.GOALS[2].cells
    one = page_of(made_up(first, 10.0, 30.0))
    assert line_of(one, "4-bit decode, batch 8").endswith("| incomplete |")
    both = page_of(made_up(first, 10.0, 40.0), made_up(second, 10.0, 34.0))
    assert line_of(both, "4-bit decode, batch 8").endswith("| aim reached |")
    # 600 MB in 10 us
    assert "12.50" in line_of(both, "share of the bandwidth")
    small = page_of(made_up(second, 10.0, 34.0, bytes=400_000_000))
    assert line_of(small, "share of the bandwidth").endswith("| - | not measured |")


def test_refused_rows_have_a_reason_and_do_not_count() -> None:
    far = {**made_up(CELL, 20.0, 30.0), "refused": "rounds spread over 60%"}
    page = page_of(far, {"cell": asdict(gpu_cells.CELLS[1]), "refused": "the time was up"})
    assert line_of(page, "4-bit decode, batch 1, 32k").endswith("| - | not measured |")
    assert "refused: rounds spread over 60%" in line_of(page, "decode int4-token 1x32k")
    assert "refused: the time was up" in line_of(page, "decode int4-token 1x128k")
    assert "30.0 (30.0-30.0, called)" in page
    assert "- decode int4-token 1x32k: slow one, slower at a first look, 999.0 us" in page
    assert "- decode int4-token 1x32k: flash-attn 3: ModuleNotFoundError: no" in page
    assert "- append int4-token 8x4k: not timed" in page


def test_launches_are_compared_with_tritons() -> None:
    page = page_of(launch={"ours": 4.0, "triton": 30.0})
    assert line_of(page, "launch overhead").endswith(
        "| 3 | 10 | 7.5 (4.0 us; Triton 30.0 us) | reached |"
    )
    assert "not measured" in line_of(page_of(launch={"ours": 4.0}), "launch overhead")


def test_results_are_of_a_gpu() -> None:
    """What is committed was measured, and is the page of its data."""
    if not gpu_bench.DATA.exists():
        assert not gpu_bench.PAGE.exists()
        return
    import json

    data = json.loads(gpu_bench.DATA.read_text())
    assert "MADE UP" not in str(data)
    assert gpu_bench.PAGE.read_text() == gpu_render.page(data)


def test_what_stays_makes_launches_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LAYERS": 2, "STEPS": 10, "ROUNDS": 3}.items():
        monkeypatch.setattr(gpu_launch, name, value)
    found = gpu_launch.measure("int4-token", batch=1, tokens=64)
    assert len(found) == 4
    anew = found["every argument anew"]
    # Forty times less on a quiet machine; the fewer layers, the less.
    assert found["what stays, stays"] < anew / 4
    assert found["decode_steps, launched"] < anew / 4
