"""`make bench-cpu`: what it refuses and what it computes; its page: test_bench_cpu_page.py.

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

from .bench_rows import QUIET, data, row

BENCH = str(Path(cpu.__file__).parent)
CELL = cpu_cells.Cell("int4-token", "2x1x64", 100, 1, 1)


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
