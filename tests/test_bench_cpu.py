"""`make bench-cpu`: what it refuses, what it computes, and that its page is made from its data.

No other engine is imported here; the peers are checked whenever they are measured.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cpu
import cpu_cells
import cpu_contest
import cpu_limit
import cpu_measure
import cpu_model
import cpu_ort
import cpu_pair
import cpu_peers
import cpu_prefill
import cpu_recipes
import cpu_render
import numpy as np
import pytest

import kvant
from kvant.targets.machines import CPUS

BENCH = str(Path(cpu.__file__).parent)
CELL = cpu_cells.Cell("int4-token", "2x1x64", 100, 1, 1)
QUIET = [1.0, 1.1, 1.0, 1.05, 1.0]


def row(**changes: Any) -> dict[str, Any]:
    """A row as it is kept: ours twice as fast."""
    cell = {"recipe": "int4-token", "shape": "32x8x128", "context": 4096, "batch": 1, "threads": 1}
    times = cpu_measure.compare(QUIET, [2 * x for x in QUIET])
    facts = {"bytes": 4_465_664, "peer_bytes": 4_718_592, "ours_error": 0.1, "peer_error": 0.12}
    facts |= {"share": 0.5, "resident": "L3", "peer_setting": {"threads": 1}, "others": 0.01}
    return cell | {"peer": "ik_q4_0"} | times | facts | changes


def data(*rows: dict[str, Any], bf16_dots: bool = False) -> dict[str, Any]:
    facts = {"processor": "P", "family": "1/2", "flags": ["avx2"], "cores": 2, "memory_gib": 24}
    machine = facts | {"l3_bytes": 32 << 20, "bf16_dots": bf16_dots}
    return {
        "cells": list(rows),
        "models": [],
        "machine": machine,
        "versions": {"torch": "2"},
        "source": "s",
    }


def goal_line(page: str, text: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| {text}"))


def test_the_page_is_made_from_the_data() -> None:
    if not cpu.DATA.exists() and not cpu.PAGE.exists():
        pytest.skip("nothing was measured yet: make bench-cpu")
    assert cpu.PAGE.read_text() == cpu_render.page(json.loads(cpu.DATA.read_text()))


def test_no_engine_is_imported_before_a_pair_is_measured() -> None:
    engines = ("torch", "onnxruntime", "onnx", "xllamacpp", "ik_llama_cpp", "transformers")
    code = (
        f"import sys; sys.path.insert(0, {BENCH!r}); import cpu, cpu_pair, cpu_peers;"
        f"print([m for m in {engines!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ratio_is_time_of_the_peer_over_ours() -> None:
    found = cpu_measure.compare([1.0, 2.0, 4.0], [3.0, 5.0, 6.0])
    assert found["ratio"] == 2.5
    assert found["worst"] == 1.5
    assert found["ours_ms"] == {"median": 2.0, "low": 1.0, "high": 4.0}
    assert found["rounds"] == 3


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    samples = cpu_measure.take_turns(lambda: calls.append("a"), lambda: calls.append("b"), rounds=5)
    turns = "".join(x for x, before in zip(calls, ["", *calls], strict=False) if x != before)
    assert turns == "ab" * 6  # the first pair counts the calls of a turn
    assert [len(x) for x in samples] == [5, 5]


def test_a_busy_machine_is_refused_without_timing() -> None:
    def never() -> None:
        raise RuntimeError("timed on a busy machine")

    found = cpu_measure.measure(never, never, attempts=1, idle=lambda: 0.5)
    assert found == {"refused": "machine busy: others used 50% of the cores"}


@pytest.mark.parametrize("when", ["meanwhile", "after"])
def test_a_machine_that_becomes_busy_is_refused(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_measure, "take_turns", lambda *_, **__: [QUIET, QUIET])
    used = iter([0.0, 1e6 if when == "meanwhile" else 0.0])
    clock = (cpu_measure.Clock(wall, next(used), 0.0) for wall in (0.0, 1.0))
    monkeypatch.setattr(cpu_measure, "read_clock", lambda: next(clock))
    idle = iter([0.0, 0.5 if when == "after" else 0.0])
    found = cpu_measure.measure(int, int, attempts=1, idle=lambda: next(idle))
    assert found["refused"].startswith("machine busy: others used")


def test_a_quiet_machine_gives_numbers_and_a_second_try_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_measure, "take_turns", lambda *_, **__: [QUIET, QUIET])
    monkeypatch.setattr(cpu_measure, "share_of_others", lambda *_: 0.01)
    monkeypatch.setattr(cpu_measure.time, "sleep", lambda _: None)
    idle = iter([0.5, 0.0, 0.0])
    found = cpu_measure.measure(int, int, attempts=2, idle=lambda: next(idle))
    assert found["ratio"] == 1.0
    assert found["others"] == 0.01


def test_rounds_that_spread_are_refused() -> None:
    steady, wild = cpu_measure.times(QUIET), cpu_measure.times([1.0, 1.0, 1.31])
    assert cpu_measure.why_refused(steady, steady, [0.0]) is None
    for pair in ((steady, wild), (wild, steady)):
        assert "spread" in str(cpu_measure.why_refused(*pair, [0.0]))


def test_others_are_all_that_this_process_did_not_use(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 4000 50 6 7 8 0 0\ncpu0 1 1 1 1\n")
    clock = cpu_measure.read_clock(stat)
    assert clock.all == pytest.approx((100 + 20 + 30 + 6 + 7 + 8) / 100)
    before, after = cpu_measure.Clock(0.0, 5.0, 1.0), cpu_measure.Clock(2.0, 8.0, 3.0)
    assert cpu_measure.share_of_others(before, after, cores=2) == 0.25


def fake_ours(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace ours by something that gives zeros and is off by `share` of what is allowed."""

    def opened(folder: Path, qkv: cpu_peers.QKV, threads: int) -> tuple[Any, Any, Any]:
        zeros = np.zeros(qkv[0].shape[:2] + qkv[0].shape[3:], np.float32)
        step = cpu_contest.Contestant("ours", {}, lambda: None, lambda: zeros, 10, lambda: None)
        return step, None, SimpleNamespace(target="cpu", id="a")

    monkeypatch.setattr(cpu_peers, "open_ours", opened)
    monkeypatch.setattr(cpu_peers, "share_of_tolerance", lambda *_: share)


@pytest.mark.parametrize("share", [1.01, float("inf"), float("nan")])
def test_a_kernel_out_of_tolerance_gets_no_time(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ours(share, monkeypatch)
    found = cpu_pair.measure(CELL, "kvant:int8-token", [tmp_path / "a", tmp_path / "b"], True)
    assert found["refused"].startswith("out of tolerance")
    assert "ours_ms" not in found


def test_a_peer_that_computes_something_else_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ours(0.5, monkeypatch)

    def fastest(peer: Any, qkv: cpu_peers.QKV, scale: float, threads: int) -> Any:
        return cpu_peers.open_ours(tmp_path, qkv, threads)[0]

    monkeypatch.setattr(cpu_peers, "fastest", fastest)
    found = cpu_pair.measure(CELL, "ik_q8_0", [tmp_path / "a"], True)
    assert found["refused"].startswith("the peer's output is wrong by 1:")
    assert "ours_ms" not in found


def test_a_check_is_repeated_only_for_other_bits(tmp_path: Path) -> None:
    checks: Iterator[float] = iter([0.25, 0.5])
    given, path = np.ones(3, np.float32), tmp_path / "checked.json"
    seen = [
        cpu_pair.once(path, "a", x, lambda: next(checks)) for x in (given, given, given + 1, given)
    ]
    assert seen == [0.25, 0.25, 0.5, 0.25]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cpu_recipes.compiled(tmp_path_factory.mktemp("bench"), CELL.recipe, (2, 1, 64))


@pytest.mark.parametrize("batch", [1, 2])
def test_the_share_of_the_tolerance_sees_a_wrong_kernel(artifact: Path, batch: int) -> None:
    qkv = cpu_peers.tensors(kvant.Shape(2, 1, 64), CELL.context, batch)
    ours, cache, loaded = cpu_peers.open_ours(artifact, qkv, 1)
    assert cpu_peers.share_of_tolerance(loaded, qkv, cache) <= 1.0
    ours.run()
    right = cpu_contest.truth(*qkv, 64**-0.5)
    assert cpu_contest.error(ours.output(), right) < cpu_peers.ERRORS[4]
    attend: Callable[..., Any] = cache.kernels.attend
    cache.kernels = SimpleNamespace(
        attend=lambda *x: [y * np.float32(1.001) for y in attend(*x)], memory=cache.kernels.memory
    )
    assert not cpu_peers.share_of_tolerance(loaded, qkv, cache) <= 1.0


@pytest.mark.parametrize("scales", ["PER_CHANNEL", "PER_TENSOR"])
@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_for_onnx_runtime_decode_to_what_was_given(bits: int, scales: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 8), dtype=np.float32)
    codes, step = cpu_ort.quantize(x, bits, scales)
    if bits == 4:
        pairs = np.stack([codes & 15, codes >> 4], axis=-1).astype(np.int8) - 8
        codes = pairs.reshape(x.shape)
    step = step.reshape(3, 1, 8) if scales == "PER_CHANNEL" else step
    assert np.abs(codes * step - x).max() <= 0.5 * step.max() * 1.0001


def test_truth_is_softmax_attention() -> None:
    q, k, v = cpu_peers.tensors(kvant.Shape(4, 2, 8), 7, 2)
    row, head = 1, 3
    weights = np.exp(q[row, head, 0].astype(np.float64) @ k[row, 1].T.astype(np.float64) * 0.5)
    expected = weights @ v[row, 1].astype(np.float64) / weights.sum()
    np.testing.assert_allclose(cpu_contest.truth(q, k, v, 0.5)[row, head], expected, rtol=1e-12)


def test_arrays_begin_at_a_cache_line() -> None:
    for x in (cpu_contest.aligned((3, 5)), cpu_contest.aligned_copy(np.ones(7, np.int8))):
        assert x.ctypes.data % 64 == 0


def test_a_cell_is_written_as_it_is_read() -> None:
    cell = cpu_cells.parse_cell("int4-token,32x8x128,4096,1,2")
    assert (cell.recipe, cell.shape, cell.context, cell.batch, cell.threads) == (
        "int4-token",
        "32x8x128",
        4096,
        1,
        2,
    )
    assert cpu_cells.parse_cell(str(cell)) == cell
    assert cpu_cells.elements(cell) == 2 * 8 * 4096 * 128


def test_the_whole_grid_is_there() -> None:
    pairs = cpu_cells.whole_grid(["int4-token", "quarot-kv4"], cores=2)
    points = {(c.shape, c.context, c.batch, c.threads) for c, _ in pairs}
    assert len(points) == 4 * 5 * 2 * 2
    peers = {peer for cell, peer in pairs if cell.recipe == "int4-token"}
    assert {"ik_q4_0", "llama_q4_0", "ort_int4", "torch_f32", "torch_bf16"} <= peers
    assert {peer for cell, peer in pairs if cell.recipe == "quarot-kv4"} == {"kvant:int4-token"}
    assert {c.threads for c, _ in cpu_cells.whole_grid(["int4-token"], cores=1)} == {1}


def test_what_does_not_fit_is_listed_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_cells, "memory_available", lambda: 8 << 30)
    large = cpu_cells.Cell("int4-token", "32x32x128", 131072, 4, 1)
    assert cpu.pair(large, "ik_q4_0", tmp_path)["refused"].startswith("does not fit: needs about")
    assert not list(tmp_path.iterdir())


def test_refused_cells_show_the_reason_and_no_number() -> None:
    page = cpu_render.page(data({**row(), "refused": "machine busy: others used 50% of the cores"}))
    line = next(x for x in page.splitlines() if "ik_q4_0 |" in x)
    assert "refused: machine busy" in line
    assert "2.00" not in page


def test_losses_are_shown_as_losses() -> None:
    lost = row(**cpu_measure.compare([2 * x for x in QUIET], QUIET))
    page = cpu_render.page(data(lost))
    assert "**0.50**" in page
    assert "**missed, a loss**" in goal_line(page, "int4 decode at 4k and 16k vs ik_llama.cpp q4_0")


def test_a_goal_is_judged_by_its_worst_cell() -> None:
    other = row(context=16384, **cpu_measure.compare(QUIET, [1.3 * x for x in QUIET]))
    line = goal_line(cpu_render.page(data(row(), other)), "int4 decode at 4k and 16k vs ik")
    assert line.endswith("| 4k, 1 thread: 2.00 (2.00); 16k, 1 thread: 1.30 (1.30) | reached |")
    assert cpu_render.verdict([2.0, 2.5], 1.2, 2.0) == "aim reached"
    assert cpu_render.verdict([1.1], 1.2, 2.0) == "**missed**"
    assert cpu_render.verdict([], 1.2, 2.0) == "not measured"
    refused = {**other, "refused": "machine busy"}
    line = goal_line(cpu_render.page(data(row(), refused)), "int4 decode at 4k and 16k vs ik")
    assert line.endswith("| incomplete |")


def test_the_best_of_torch_counts_and_bf16_not_where_the_machine_has_its_dots() -> None:
    slow = row(peer="torch_f32", **cpu_measure.compare(QUIET, [4 * x for x in QUIET]))
    fast = row(peer="torch_bf16")
    text = "int4 decode vs the best of torch SDPA"
    assert "2.00 (2.00)" in goal_line(cpu_render.page(data(slow, fast)), text)
    page = cpu_render.page(data(slow, fast, bf16_dots=True))
    assert "4.00 (4.00)" in goal_line(page, text)
    assert "not counted" in page
    assert "torch_bf16" in page


def test_a_share_of_the_bandwidth_compares_bytes_a_second() -> None:
    assert cpu_render.bandwidth_share(probe()) == 0.5  # half the time for a quarter of the bytes
    page = cpu_render.page(data(probe()))
    assert "| `int4-token` at 4k | L3 |" in page
    assert "| 0.12, floats |" in page


def swept(
    answers: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    **more: Any,
) -> dict[str, Any]:
    """Run a sweep whose processes give `answers` by their peer, in turn; return its data."""
    none = {"refused": "no such"}
    given = {peer: iter(rows) for peer, rows in answers.items()}
    monkeypatch.setattr(cpu, "DATA", tmp_path / "docs.json")
    monkeypatch.setattr(cpu, "PAGE", tmp_path / "docs.md")
    monkeypatch.setattr(cpu, "PROGRESS", {"headline": tmp_path / "progress.json"})
    monkeypatch.setattr(cpu, "source", lambda: more.get("source", "s"))
    monkeypatch.setattr(cpu, "versions", lambda: more.get("versions", {"torch": "2"}))
    monkeypatch.setattr(cpu.cells, "machine", lambda: data()["machine"])
    monkeypatch.setattr(cpu, "_child", lambda call, _: next(given.get(call[3], iter([none])), none))
    options = {"keep": False, "even_if_busy": False, "artifacts": None}
    options |= {"data": cpu.PROGRESS["headline"]}
    cell = cpu_cells.parse_cell("int4-token,32x8x128,4096,1,1")
    cpu.sweep([(cell, peer) for peer in answers], argparse.Namespace(**options | more))
    return dict(json.loads(cpu.PROGRESS["headline"].read_text()))


BUSY = {"refused": "machine busy: others"}


def test_a_whole_sweep_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = swept({"ik_q4_0": [row()]}, tmp_path, monkeypatch)
    assert json.loads(cpu.DATA.read_text()) == found
    assert cpu.PAGE.read_text() == cpu_render.page(found)
    assert {r["what"] for r in found["models"]} == set(cpu_cells.MODEL_GOALS)


def test_noisy_numbers_are_not_published_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = row(busy="machine busy", source="s")
    found = swept({"ik_q4_0": [noisy]}, tmp_path, monkeypatch, even_if_busy=True)
    assert found["cells"] == [noisy]
    assert not cpu.DATA.exists()
    found = swept({"ik_q4_0": [row()]}, tmp_path, monkeypatch, keep=True)
    assert found["cells"] == [row(source="s")]


def test_keep_goes_on_with_what_these_kernels_did_not_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept({"ik_q4_0": [row()], "torch_f32": [{"refused": "failed: x"}]}, tmp_path, monkeypatch)
    again = {"ik_q4_0": [row(ratio=9.0)], "torch_f32": [row(peer="torch_f32")]}
    found = swept(again, tmp_path, monkeypatch, keep=True)["cells"]
    assert [(r["peer"], r["ratio"]) for r in found] == [("ik_q4_0", 2.0), ("torch_f32", 2.0)]
    found = swept(again, tmp_path, monkeypatch, keep=True, source="t")["cells"]
    assert [(r["ratio"], r["source"]) for r in found] == [(9.0, "t"), (2.0, "t")]
    with pytest.raises(SystemExit, match="is of another versions: measure without --keep"):
        swept(again, tmp_path, monkeypatch, keep=True, versions={"torch": "3"})


def test_what_was_refused_for_noise_is_tried_again_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        "ik_q4_0": [BUSY, row()],
        "torch_f32": [row(peer="torch_f32")],
        "ik_q8_0": [BUSY] * 9,
        "ort_f32": [{"refused": "out of tolerance"}, row(peer="ort_f32")],
    }
    found = {r["peer"]: r for r in swept(answers, tmp_path, monkeypatch)["cells"]}
    assert found["ik_q4_0"]["ratio"] == found["torch_f32"]["ratio"] == 2.0
    assert found["ik_q8_0"]["refused"] == BUSY["refused"]
    assert found["ort_f32"]["refused"] == "out of tolerance"
    assert len(found) == len(answers)


def test_a_sweep_on_a_busy_machine_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = {str(i): [BUSY] for i in range(cpu.PATIENCE + 1)}
    with pytest.raises(SystemExit, match="stopped: machine busy: others"):
        swept(busy, tmp_path, monkeypatch)
    kept = json.loads(cpu.PROGRESS["headline"].read_text())["cells"]
    assert len(kept) == cpu.PATIENCE
    assert not cpu.DATA.exists()


def probe(**changes: Any) -> dict[str, Any]:
    """A row beside the memory: 1 ms, of which 0.5 ms are reading and 0.84 instructions."""
    facts = {"bytes": 100, "peer_bytes": 400, "instructions": {"k": 0.125, "v": None}}
    facts |= {"executed": {"dot": 300, "scalar": 100}, "loop_instructions": 1000}
    facts |= {"floats": {"k": None, "v": "the recipe says so"}, "left_out": []}
    third = {"third_ms": {"median": 2.1, "low": 2.0, "high": 2.2}}
    return row(peer=cpu_cells.PROBE, peer_error=None, **facts | third | changes)


def test_the_limit_is_the_larger_of_bytes_and_instructions() -> None:
    ours = probe()["ours_ms"]["median"]
    assert cpu_render.limit_times(probe()) == pytest.approx((ours / 2, 0.84))
    assert cpu_render.limit_share(probe()) == pytest.approx(0.84 / ours)
    few = probe(executed={"dot": 10})
    assert cpu_render.limit_share(few) == pytest.approx(0.5)
    assert cpu_render.what_limits(probe()) == (
        "Instructions: 0.84 ms of instructions, 0.50 ms of reading; values go through floats, "
        "because the recipe says so."
    )
    assert cpu_render.what_limits(few).startswith("Bytes: 0.02 ms")
    assert "50% of the time is waiting and calls." in cpu_render.what_limits(few)
    page = cpu_render.page(data(probe(recipe="ksort-bfp", left_out=["sort-k"])))
    assert "| `ksort-bfp` without sort-k at 4k | L3 |" in page
    goal = goal_line(cpu_render.page(data(probe())), "int4 and 2-bit: share of the machine's limit")
    assert goal.endswith("| 0.7 | 0.85 | `int4-token` 4k, 1 thread: 0.84 | reached |")
    uncounted = {k: x for k, x in probe().items() if k not in ("executed", "third_ms")}
    goal = goal_line(cpu_render.page(data(uncounted)), "int4 and 2-bit: share of the machine's")
    assert goal.endswith("`int4-token` 4k, 1 thread: not counted | incomplete |")


def test_a_third_takes_turns_and_must_be_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_measure, "share_of_others", lambda *_: 0.0)
    rounds = [QUIET, QUIET, [3.0] * 5]
    monkeypatch.setattr(cpu_measure, "take_turns", lambda *runs, **_: rounds[: len(runs)])
    found = cpu_measure.measure(int, int, third=int, attempts=1, idle=lambda: 0.0)
    assert found["third_ms"]["median"] == 3.0
    assert "third_ms" not in cpu_measure.measure(int, int, attempts=1, idle=lambda: 0.0)
    rounds[2] = [1.0, 1.0, 2.0]
    found = cpu_measure.measure(int, int, third=int, attempts=1, idle=lambda: 0.0)
    assert "beside both spread" in found["refused"]


def test_every_recipe_and_every_shape_has_a_row_in_the_short_run() -> None:
    names = cpu_recipes.names()
    assert {"int4-token", "ksort-bfp", "split-2bit", "qserve-kv4", "quarot-kv2"} <= set(names)
    assert cpu_recipes.left_out("ksort-bfp") == ["sort-k"]
    assert cpu_recipes.left_out("quarot-kv2") == []
    pairs = cpu_cells.headline(names, cores=2)
    probed = {c.recipe for c, peer in pairs if peer == cpu_cells.PROBE and c.context == 65536}
    assert probed == set(names)
    assert {c.shape for c, _ in pairs} == set(cpu_cells.SHAPES)
    assert {c.batch for c, _ in pairs} == set(cpu_cells.BATCHES)
    assert any(c.recipe.endswith(f"{cpu_recipes.AT}{cpu_cells.AVX2}") for c, _ in pairs)
    assert {c.threads for c, _ in cpu_cells.headline(names, cores=1)} == {1}


def test_kernels_for_another_processor_are_labelled() -> None:
    other = row(recipe="int4-token@x86-64-v3")
    page = cpu_render.page(data(other))
    assert "| `int4-token` for x86-64-v3 | ik_q4_0 | 2.00 |" in page
    assert "4k, 1 thread: 2.00 (2.00)" in goal_line(page, "int4 decode, our kernels for x86-64-v3")


def test_two_bits_beside_four_show_both_errors() -> None:
    wide = {"recipe": "kivi-2bit", "shape": "32x32x128", "context": 32768}
    page = cpu_render.page(data(row(**wide, peer="kvant:int4-token")))
    line = goal_line(page, "2-bit (`kivi-2bit`) decode vs our int4")
    assert "32k, 1 thread: 2.00 (2.00; error 0.10 beside 0.12) | aim reached |" in line


def test_the_loop_mixes_kinds_as_they_were_executed() -> None:
    kinds = cpu_limit.mixed({"dot": 2, "move mem": 1, "scalar": 1})
    assert len(kinds) == cpu_limit.BODY
    assert kinds.count("dot") == cpu_limit.BODY // 2
    assert kinds[:4].count("dot") == 2
    text = cpu_limit.loop_text({"dot": 1, "move mem": 1}, CPUS["znver4"])
    assert "vpdpbusd %zmm" in text
    instructions = [x for x in text.splitlines() if x.startswith("\t") and x[1] != "."]
    assert len(instructions) == cpu_limit.BODY + 2  # with vzeroupper and ret
    every = {kind: 1 for kind in cpu_limit.KINDS}
    for cpu_name in ("x86-64-v3", "znver4"):
        assert cpu_limit.loop_text(every, CPUS[cpu_name], order=1)


def test_a_ratio_that_no_attention_exceeds_follows_from_the_free_run() -> None:
    found = {"ours_ms": {"median": 200.0}, "peer_ms": {"median": 400.0}}
    text = cpu_model._at_most(found | {"third_ms": {"median": 100.0}})
    assert "40.0 tokens/s, which is 50% of our time: no attention reaches more than 4.00" in text
    assert cpu_model._at_most({"refused": "x"}) == ""


def test_a_block_of_queries_is_checked(artifact: Path) -> None:
    shape = kvant.Shape(2, 1, 64)
    qkv = cpu_peers.tensors(shape, 600, 1, cpu_cells.QUERIES)
    _, cache, loaded = cpu_peers.open_ours(artifact, qkv, 1)
    assert cpu_prefill._share(loaded, cache, qkv[0]) <= 1.0
    right = cpu_prefill._truth(*qkv, shape.logit_scale, np.array([5, cpu_cells.QUERIES - 1]))
    last = cpu_contest.truth(qkv[0][:, :, -1:], *qkv[1:], shape.logit_scale)
    np.testing.assert_allclose(right[:, :, 1], last, rtol=1e-9)
    found = cache.attend(0, qkv[0])[:, :, [5, -1]]
    assert cpu_contest.error(found, right) < cpu_peers.ERRORS[4]
    attend: Callable[..., Any] = cache.kernels.attend
    cache.kernels = SimpleNamespace(
        attend=lambda *x: [y * np.float32(1.01) for y in attend(*x)], memory=cache.kernels.memory
    )
    assert not cpu_prefill._share(loaded, cache, qkv[0]) <= 1.0
