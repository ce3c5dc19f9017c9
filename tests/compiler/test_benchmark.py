"""Timing is fair: in turns, the same threads, peers that compute the same."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvant
from kvant.compiler import benchmark
from kvant.compiler.benchmark import bench, bench_artifact, bench_shape, interleave, pays_from
from kvant.compiler.shape import Shape
from kvant.runtime import load

# The stable keys of the contract, word for word.
KEYS = (
    "target recipe shape context batch threads ms ms_min ms_max gigabytes_per_second bytes "
    "max_error peers"
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    shape = Shape(8, 2, 32, v_head_dim=16, layers=3, scale=0.3)
    out = tmp_path_factory.mktemp("bench") / "a.kvant"
    return kvant.compile(shape, "int8-token", ["reference"], out=out)


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    timing = interleave({n: lambda n=n: calls.append(n) for n in "abc"}, rounds=5, seconds=0.0)
    assert "".join(calls) == "aabbcc" + "abc" * 5  # warmed up first, then in turns
    assert all(0 <= t.low <= t.median <= t.high for t in timing.values())


def test_a_row_has_the_keys_of_the_contract(artifact: Any) -> None:
    rows = bench(artifact, [40], [2], threads=1, rounds=1)
    assert [set(row) for row in rows] == [set(KEYS.split())]
    row = rows[0]
    assert (row["target"], row["recipe"], row["shape"]) == ("reference", "int8-token", "8x2x32")
    assert (row["context"], row["batch"], row["threads"]) == (40, 2, 1)
    assert row["max_error"] == 0.0  # the reference against itself, over the same bits
    assert len(row["peers"]) == 4
    assert all("torch" in name and ms > 0 for name, ms in row["peers"].items())


def test_bytes_are_those_of_the_one_layer_that_is_timed(artifact: Any) -> None:
    row = bench(artifact, [64], [1], threads=1, rounds=1)[0]
    plan = artifact.plan_of(0)
    assert row["bytes"] == plan.k.bytes(64) + plan.v.bytes(64)
    assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)


def test_the_shape_of_an_artifact_is_that_of_layer_0(artifact: Any) -> None:
    assert benchmark.shape_of(artifact) == Shape(8, 2, 32, 16, scale=0.3)


@pytest.mark.parametrize("window", [None, 7])
def test_every_peer_computes_what_we_compute(window: int | None) -> None:
    shape = Shape(8, 2, 32, 16, scale=0.3, window=window)
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal(size, dtype=np.float32)
        for size in ((2, 8, 1, 32), (2, 2, 40, 32), (2, 2, 40, 16))
    )
    logits = 0.3 * np.einsum("bhgc,bhnc->bhgn", q.reshape(2, 2, 4, 32), k)
    if window is not None:
        logits[..., :-window] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    right = np.einsum("bhgn,bhnc->bhgc", weights / weights.sum(-1, keepdims=True), v)
    peers, restore = benchmark.torch_peers(q, k, v, shape, threads=1)
    restore()
    assert len(peers) == 4
    for name, run in peers.items():
        error = np.abs(run().float().numpy().reshape(right.shape) - right).max()
        assert error < (2e-2 if "bfloat16" in name else 1e-5), name


def test_sdpa_has_no_softcap_so_it_is_no_peer_there() -> None:
    ones = np.ones((1, 2, 8, 32), np.float32)
    peers, _ = benchmark.torch_peers(ones[:, :, :1], ones, ones, Shape(2, 2, 32, softcap=5.0), 1)
    assert peers == {}


def test_peers_and_kernels_get_the_same_threads_and_both_are_given_back(
    artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    seen = []

    def watch(contestants: dict[str, Any], rounds: int) -> Any:
        seen.append((os.environ["KVANT_NUM_THREADS"], torch.get_num_threads()))
        return interleave(contestants, rounds)

    monkeypatch.setattr(benchmark, "interleave", watch)
    monkeypatch.delenv("KVANT_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    bench(artifact, [8], [1], threads=1, rounds=1)
    torch.set_num_threads(2)
    bench(artifact, [8], [1], threads=1, rounds=1)
    assert seen == [("1", 1), ("1", 1)]
    assert torch.get_num_threads() == 2
    assert "KVANT_NUM_THREADS" not in os.environ
    torch.set_num_threads(before)


def row(context: int, ms: float, *peers: float, batch: int = 1) -> dict[str, Any]:
    return {
        "context": context,
        "batch": batch,
        "ms": ms,
        "peers": {str(i): p for i, p in enumerate(peers)},
    }


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(1, 2, 1, 3), row(2, 2, 3, 4), row(4, 2, 5, 4)], {1: 2}),
        ([row(4, 2, 5), row(1, 2, 5)], {1: 1}),
        ([row(1, 1, 5), row(2, 6, 5), row(4, 1, 5)], {1: 4}),
        ([row(1, 1, 5), row(2, 6, 5)], {1: None}),
        ([row(1, 1, 1)], {1: None}),
        ([row(1, 2, 3), row(1, 3, 2, batch=8)], {1: 1, 8: None}),
    ],
)
def test_where_it_begins_to_pay(rows: list[dict[str, Any]], expected: dict[int, Any]) -> None:
    assert pays_from(rows) == expected


def test_a_shape_is_compiled_aside_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stages: list[str] = []
    rows = bench_shape(
        Shape(4, 2, 16), "int4-token", "reference", [20, 8], [1], 1, say=stages.append
    )
    assert [row["context"] for row in rows] == [20, 8]
    assert stages[-2:] == ["timing context 20, batch 1", "timing context 8, batch 1"]
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_timed_from_its_folder(artifact: Any) -> None:
    rows = bench_artifact(str(artifact.path), "reference", [8], [1], 1)
    assert rows[0]["recipe"] == load(artifact.path).recipe


@pytest.mark.long
def test_int4_is_not_slower_than_the_best_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kvant bench --shape 32x8x128 -r int4-token -t cpu --context 4096`, one thread."""
    monkeypatch.setenv("KVANT_NUM_THREADS", "1")
    shape = Shape(heads=32, kv_heads=8, head_dim=128)
    (row,) = bench_shape(shape, "int4-token", "cpu", [4096], [1], threads=1)
    assert len(row["peers"]) == 4
    assert row["ms"] <= min(row["peers"].values()), row
