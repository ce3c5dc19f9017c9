"""The targets cuda and hip: what is compiled, what is refused, and what a launcher is given."""

import json
import os
import resource
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import kvant
from kvant.ir.arrangements import ROWS, TILES
from kvant.ir.encodings import Sparse
from kvant.ir.errors import KvantError
from kvant.ir.plan import AttentionPlan
from kvant.runtime.launch_reference import Kernels as Reference
from kvant.runtime.machine import this_gpu
from kvant.runtime.memory import TorchMemory
from kvant.runtime.verify import verify
from kvant.targets import TARGETS
from kvant.targets.gpu import compile_gpu, emit, launch_facts, why_not
from kvant.targets.kernel_text import GPU_KERNELS
from kvant.targets.machines import GPUS

from ..runtime.cache_bytes import stored_bytes
from ..runtime.cache_runner import random_kv
from .cpu_cases import KIVI, PLANS, constants_of, int_format, loaded, plan_of
from .gpu_interpreter import Interpreter, interpreted
from .gpu_tile_plans import TILED

KINDS_OF_PLAN = "int4-token-int kivi-2bit bfp lut slices dense-sparse sparse maps".split()
SECONDS = 10.0  # of a processor, for one binary
SHAPE = kvant.Shape(heads=4, kv_heads=2, head_dim=64, dtype="f32")


def test_binaries_are_the_same_each_time_and_fit_the_gpu() -> None:
    gpu = GPUS["sm_89"]
    one, two = (compile_gpu(emit(KIVI), gpu) for _ in range(2))
    assert one == two
    launch = json.loads(one["launch.json"])
    assert set(launch["binaries"]) == set(GPU_KERNELS)
    assert len(GPU_KERNELS) <= 8
    for name, binary in launch["binaries"].items():
        assert one[binary["file"]][:4] == b"\x7fELF"
        assert binary["shared"] <= gpu.shared, name
    assert {binary["threads"] for binary in launch["binaries"].values()} == {128}
    for path in (sys.prefix, os.getcwd(), "/tmp/"):
        assert not any(path.encode() in data for data in one.values()), path


@pytest.mark.long
@pytest.mark.parametrize("gpu", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("plan", KINDS_OF_PLAN)
def test_every_kind_of_gpu(plan: str, gpu: str) -> None:
    target = TARGETS[f"{GPUS[gpu].backend}:{gpu}"]
    build = target.build(PLANS[plan])
    assert build.target == f"{GPUS[gpu].backend}-{gpu}"
    assert build.facts["gpu"] == gpu
    suffix = "cubin" if GPUS[gpu].backend == "cuda" else "hsaco"
    assert sum(name.endswith(suffix) for name in build.files) == len(GPU_KERNELS)


@pytest.mark.long
@pytest.mark.parametrize("plan", ["kivi-2bit", "slices", "sparse"])
def test_a_binary_is_compiled_in_ten_seconds(plan: str) -> None:
    source = emit(PLANS[plan])
    for kernel in source.kernels:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        compile_gpu(replace(source, kernels=(kernel,)), GPUS["sm_90"])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        assert 0.0 < spent < SECONDS, (kernel.name, spent)


@pytest.mark.long
@pytest.mark.parametrize("entries", [0, 2])
def test_heads_of_256_channels_fit_the_smallest_gpu(entries: int) -> None:
    k, v = int_format(4, "channel", 64), int_format(4, "token", 256)
    formats = (Sparse(k, entries), Sparse(v, entries)) if entries else (k, v)
    build = TARGETS["cuda:sm_89"].build(plan_of(*formats, d=256))
    assert sum(name.endswith("cubin") for name in build.files) == len(GPU_KERNELS)


def test_what_cannot_be_built_is_said() -> None:
    assert why_not(KIVI) is None
    many = plan_of(int_format(8, "token", 64), int_format(8, "token", 64), group=65)
    assert why_not(many) == "65 query heads share a KV head; at most 64 are supported"
    wide = plan_of(int_format(8, "token", 512), int_format(8, "token", 512), d=512)
    assert why_not(wide) == "heads of 512 channels; at most 256 are supported"


def test_shared_memory_is_held_to_the_table() -> None:
    small = replace(GPUS["sm_90"], name="sm_90", shared=1024)
    with pytest.raises(KvantError) as caught:
        compile_gpu(emit(KIVI), small)
    assert caught.value.code == "shared-memory"
    assert "sm_90 gives a block 1024" in caught.value.what


def test_a_failing_compiler_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = replace(GPUS["sm_90"], arch=90, backend="none")
    with pytest.raises(KvantError) as caught:
        compile_gpu(emit(KIVI), unknown)
    assert caught.value.code == "compiler-failed"
    assert caught.value.what.startswith("Triton failed for sm_90: ")


def test_kernels_of_an_earlier_version_are_refused() -> None:
    from kvant.runtime.cuda import read_launches

    launch = launch_facts(emit(KIVI))
    written = {"p0/launch.json": json.dumps(launch).encode()}
    assert read_launches(["p0", "p0"], written)["p0"]["layouts"] == list(launch["layouts"])
    del launch["least_tiles"]
    with pytest.raises(KvantError) as caught:
        read_launches(["p0"], {"p0/launch.json": json.dumps(launch).encode()})
    assert caught.value.code == "kernels-missing"
    assert caught.value.what == (
        "launch.json lacks layouts or least_tiles: an earlier version of kvant wrote it"
    )


def test_another_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.1.0")
    assert TARGETS["cuda:sm_90"].available() == (
        "triton 3.1.0 is installed, 3.9.0 is needed: pip install triton==3.9.0"
    )


def test_not_finite_is_refused_by_check() -> None:
    from kvant.runtime.cache import Cache

    plan = PLANS["kivi-2bit"]
    kernels = interpreted([plan] * 2, [constants_of(plan)] * 2)
    cache, other = (Cache([plan] * 2, kernels, batch=2, max_tokens=64) for _ in range(2))
    k, v = random_kv(np.random.default_rng(0), plan, 2, 5)
    for layer in (0, 1):
        cache.append(layer, k, v)
    cache.check()
    v[1, 0, 3, 7] = np.nan
    for layer in (0, 1):
        cache.append(layer, k, v)
    assert other.length == 0  # another cache of the same kernels has nothing to say
    with pytest.raises(KvantError) as caught:
        assert cache.length
    assert caught.value.code == "non-finite"
    assert caught.value.what == (
        "v was NaN or infinite in f32 after its maps, row 1, head 0, token 3 of those given"
    )
    assert caught.value.where == "layer 0, an append since the last check"
    cache.check()  # said once


def test_many_queries_are_attended_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvant.runtime.cache import Cache

    plan = PLANS["ring"]
    cache = Cache([plan], interpreted([plan], [constants_of(plan)]), batch=2, start=[0, 9])
    rng = np.random.default_rng(3)
    cache.append(0, *random_kv(rng, plan, 2, 50))
    q = rng.normal(size=(2, plan.q_heads, 45, plan.k.channels)).astype(np.float32)
    whole = cache.attend(0, q, return_lse=True)
    launched, launch = [], Interpreter.launch
    monkeypatch.setattr(
        Interpreter, "launch", lambda self, *a: (launched.append(a[1]), launch(self, *a))
    )
    monkeypatch.setattr("kvant.runtime.launch_block.PARTIAL_BYTES", 1)
    parts = cache.attend(0, q, return_lse=True)
    assert launched.count("combine") == 3  # 16, 16 and 13 queries
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    cache.attend(0, q[:, :, :33])
    assert "attend" not in launched  # the 33rd query alone in a launch is rounded as the others are


def test_tensors_made_in_inference_mode_may_be_written_outside() -> None:
    memory = TorchMemory("cpu")
    with torch.inference_mode():
        made = [memory.zeros((2, 3)), memory.empty((4,)), memory.place(np.zeros(3))]
        pool = memory.open_pool(64, 40)
        taken = [pool.take() for _ in range(20)]  # the pool grows once
    for x in (*made, pool.pages):
        x[...] = 0
    pool.give_back(taken[:1])
    assert pool.take() == taken[0]


def test_an_array_that_is_not_aligned_is_copied() -> None:
    memory = TorchMemory("cpu")
    x = torch.arange(9.0)[1:].reshape(1, 1, 2, 4)
    read, _ = memory.read_floats("k", x)
    assert read.data_ptr() % 16 == 0
    assert torch.equal(read, x)
    sparse = torch.eye(2).to_sparse()
    with pytest.raises(KvantError) as caught:
        memory.read_floats("k", sparse)
    assert caught.value.code == "wrong-device"


@pytest.mark.parametrize("name", [*KINDS_OF_PLAN, "int3-d96", "int8-groups"])
def test_pages_are_those_of_the_cpu(name: str) -> None:
    """Both targets store the bytes of `ir/encodings`, so what one wrote the other can read."""
    from kvant.runtime.cache import Cache

    plan = (TILED | PLANS)[name]
    k, v = random_kv(np.random.default_rng(5), plan, 2, 150)
    found = []
    for kernels in (interpreted, loaded):
        cache = Cache([plan], kernels([plan], [constants_of(plan)]), batch=2, max_tokens=256)
        cache.append(0, k, v)
        cache.flush()
        found.append(stored_bytes(cache))
        if name == "int8-groups":  # two scales a token, so their order in a page matters
            assert (cache.layers[0].k.layout.kind == TILES) == (kernels is interpreted)
    assert found[0] == found[1]


@dataclass
class Stored:
    """Stands for an artifact of one layer."""

    plans: tuple[AttentionPlan, ...]
    kernels: Any
    id: str = "a1"


def test_a_state_file_of_tiles_is_restored_in_rows(tmp_path: Any) -> None:
    """A file holds pages in rows: what a GPU saved goes on elsewhere, and comes back."""
    from kvant.runtime.cache import Cache
    from kvant.runtime.restore import restore

    plan = TILED["int8-groups"]
    own = interpreted([plan], [{}])
    cache = Cache([plan], own, batch=2, max_tokens=256, start=[0, 9], artifact_id="a1")
    rng = np.random.default_rng(6)
    for tokens in (140, 20):
        cache.append(0, *random_kv(rng, plan, 2, tokens))
    assert cache.layers[0].k.layout.kind == cache.layers[0].v.layout.kind == TILES
    cache.save(tmp_path / "state")
    there = restore(Stored((plan,), Reference([plan], [{}])), tmp_path / "state")
    assert there.layers[0].k.layout.kind == ROWS
    assert stored_bytes(there) == stored_bytes(cache)
    q = rng.normal(size=(2, plan.q_heads, 1, plan.k.channels)).astype(np.float32)
    # Rows are not rounded as tiles are: float16 has 11 digits.
    np.testing.assert_allclose(there.attend(0, q), cache.attend(0, q), rtol=0, atol=2e-3)
    there.save(tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "state").read_bytes()
    back = restore(Stored((plan,), own), tmp_path / "back")
    assert back.layers[0].k.layout.kind == TILES
    assert stored_bytes(back) == stored_bytes(cache)
    assert np.array_equal(back.attend(0, q), cache.attend(0, q))


def test_one_artifact_for_a_cpu_and_a_gpu(tmp_path: Any) -> None:
    art = kvant.compile(SHAPE, "int8-token", ["cpu:x86-64-v3", "cuda:sm_90"], out=tmp_path / "a")
    assert sorted(art.manifest["targets"]) == ["cpu-x86-64-v3", "cuda-sm_90"]
    kernels = [row["name"] for row in art.show()["kernels"]]
    assert "cuda-sm_90/p0/attend" in kernels
    assert "cpu-x86-64-v3/p0/attend" in kernels
    found, _ = this_gpu()
    if found is None:
        assert art.target == "cpu-x86-64-v3"
        with pytest.raises(KvantError) as caught:
            kvant.load(art.path, target="cuda", id=art.id)
        assert caught.value.code == "no-usable-target"
        assert "cuda-sm_90: " in caught.value.what


@pytest.mark.gpu
@pytest.mark.skipif(this_gpu()[0] is None, reason=this_gpu()[1])
def test_verify_on_a_gpu(tmp_path: Any) -> None:
    gpu, _ = this_gpu()
    art = kvant.compile(SHAPE, "kivi-4bit", [f"cuda:{gpu}"], out=tmp_path / "a")
    assert verify(art.path, target="cuda")["target"] == f"cuda-{gpu}"
