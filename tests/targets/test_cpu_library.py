"""The shared library: what it needs, when it is refused, and what a refusal leaves behind."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvant.ir.encodings import Int, Raw
from kvant.ir.errors import KvantError
from kvant.runtime.cache import Cache
from kvant.runtime.launch_cpu import chunks_of, load_library
from kvant.targets import TARGETS, Build, resolve
from kvant.targets.cpu import compile_cpu, emit, this_cpu
from kvant.targets.cpu_link import link
from kvant.targets.kernel_text import HOST_KERNELS, KERNELS
from kvant.targets.machines import CPUS

from .cpu_cases import HEADLINE, KIVI, PLANS, constants_of, files_of, kernels_of, mapped, plan_of

V3 = CPUS["x86-64-v3"]
NAMES = set(KERNELS | HOST_KERNELS)


def test_identical_plans_give_identical_bytes() -> None:
    here = this_cpu()
    assert compile_cpu(emit(KIVI, here), here) == files_of(KIVI)


def test_a_library_needs_only_libc_and_the_error_function_of_tvm_ffi(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    library.write_bytes(files_of(KIVI)["kernels.so"])
    lines = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[-2:] for line in lines.stdout.splitlines()]
    undefined = {name for kind, name in symbols if kind == "U" and "GLIBC" not in name}
    assert undefined == {"TVMFFIErrorSetRaisedFromCStrParts"}
    assert {name for kind, name in symbols if kind == "T"} == {f"__tvm_ffi_{k}" for k in NAMES}


def test_at_most_nine_kernels_and_every_one_is_explained() -> None:
    launch = json.loads(files_of(KIVI)["launch.json"])
    assert set(launch["kernels"]) == set(launch["facts"]["kernels"]) == NAMES
    assert len(NAMES) <= 9


def test_no_path_of_this_machine_is_in_the_library() -> None:
    library = files_of(KIVI)["kernels.so"]
    assert not re.search(rb"/(tmp|home|root|work)/", library)


def test_the_kernels_use_avx2_registers_and_fma(tmp_path: Path) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    library = tmp_path / "kernels.so"
    library.write_bytes(files_of(PLANS["int4-token-int"], V3)["kernels.so"])
    text = subprocess.run(["objdump", "-d", library], capture_output=True, text=True).stdout
    for instruction in ("vpmaddubsw", "vpmaddwd", "vfmadd231ps"):
        assert re.search(rf"{instruction} .*%ymm", text), instruction
    assert "%zmm" not in text


def test_it_runs_where_only_tvm_ffi_is() -> None:
    """In a new process: no import of tvm, and the kernels compute."""
    code = """
import sys, numpy as np
sys.path.insert(0, {tests!r})
from kvant.runtime.launch_cpu import load_library
files = {{n: open({folder!r} + "/" + n, "rb").read() for n in ("kernels.so", "launch.json")}}
load_library(files, "test")
assert "tvm" not in sys.modules, "tvm was imported"
print("loaded")
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, data in files_of(KIVI).items():
            (Path(folder) / name).write_bytes(data)
        script = code.format(folder=folder, tests=str(Path(__file__).parent))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "loaded", done.stderr


@pytest.mark.parametrize(
    ("fact", "value", "says"),
    [
        ("features", ["avx2", "avx1024"], "it needs avx1024"),
        ("glibc", "9.9", "it needs glibc 9.9 or newer"),
        ("machine", "aarch64", "it is for Linux on aarch64"),
        ("packages", {"apache-tvm-ffi": "7.0"}, "it was built for apache-tvm-ffi 7.0"),
    ],
)
def test_a_machine_that_does_not_fit_is_refused_before_loading(
    fact: str, value: object, says: str
) -> None:
    launch = json.loads(files_of(KIVI)["launch.json"])
    launch["facts"][fact] = value
    files = {"kernels.so": b"not even a library", "launch.json": json.dumps(launch).encode()}
    with pytest.raises(KvantError) as caught:
        load_library(files, "here")
    assert caught.value.code == "machine-does-not-fit"
    assert says in caught.value.what


def test_broken_bytes_are_refused() -> None:
    files = dict(files_of(KIVI))
    files["kernels.so"] = b"\x7fELF" + bytes(4000)
    with pytest.raises(KvantError) as caught:
        load_library(files, "here")
    assert caught.value.code == "kernels-not-loaded"
    with pytest.raises(KvantError) as caught:
        load_library({}, "here")
    assert caught.value.code == "kernels-missing"
    for spoil in (
        lambda launch: launch.pop("layouts"),
        lambda launch: launch.pop("item_heads"),
        lambda launch: launch["kernels"].pop("step"),
    ):
        old = json.loads(files["launch.json"])
        spoil(old)
        with pytest.raises(KvantError, match="an earlier version of kvant wrote it") as caught:
            load_library(files | {"launch.json": json.dumps(old).encode()}, "here")
        assert caught.value.code == "kernels-missing"


@pytest.mark.parametrize(
    ("heads", "most", "items", "threads", "chunks"),
    [
        (8, 8, 1, "1", 1),
        (8, 8, 1, "2", 8),
        (8, 8, 3, "2", 4),
        (8, 8, 8, "2", 1),
        (12, 4, 8, "2", 3),
        (7, 7, 2, "2", 7),
        (1, 1, 1, "2", 1),
        (8, 2, 100, "1", 4),
    ],
)
def test_heads_are_cut_only_where_threads_want_work(
    heads: int, most: int, items: int, threads: str, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVANT_NUM_THREADS", threads)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    assert chunks_of(heads, most, items) == chunks


def test_two_libraries_do_not_take_each_others_place() -> None:
    """The loader knows libraries by path; each must get its own."""
    plans = [KIVI, PLANS["raw"]]
    kernels = kernels_of(plans, [constants_of(plan) for plan in plans])
    rng = np.random.default_rng(0)
    for layer, plan in enumerate(plans):
        cache = Cache(plans, kernels, batch=1, max_tokens=128)
        k, v = (
            rng.normal(size=(1, s.heads, 3, s.channels)).astype(np.float32)
            for s in (plan.k, plan.v)
        )
        cache.append(layer, k, v)
        assert np.array_equal(cache.layers[layer].k.tail[:, :, :3], k)


def test_no_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvant.targets.cpu_link.shutil.which", lambda name: None)
    assert "no C compiler" in (TARGETS["cpu:x86-64-v3"].available() or "")
    with pytest.raises(KvantError) as caught:
        link(b"", V3)
    assert caught.value.code == "no-c-compiler"


def test_targets_by_name() -> None:
    assert resolve("cpu") is TARGETS[f"cpu:{this_cpu().name}"]
    build = resolve("reference").build(KIVI)
    assert build == Build("reference", {"kind": "reference"}, {})
    with pytest.raises(KvantError) as caught:
        resolve("cpu:x86-64-v9")
    assert str(caught.value) == (
        "there is no target 'cpu:x86-64-v9'\n  where: the targets argument\n"
        "  fix: did you mean: cpu:x86-64-v4, cpu:x86-64-v3, cpu:x86-64-v2? "
        "`kvant show targets` lists all  [unknown-target]"
    )


def test_a_format_without_layout_is_not_supported() -> None:
    plan = plan_of(Int(5, "token", 32), Raw("f32"))
    with pytest.raises(KvantError) as caught:
        resolve("cpu").build(plan)
    assert caught.value.code == "target-does-not-support"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_append_refuses_before_it_stores(bad: float) -> None:
    plan = PLANS["maps"]
    kernels = kernels_of([plan], [constants_of(plan)])
    cache = Cache([plan], kernels, batch=2, max_tokens=128)
    x = np.ones((2, plan.k.heads, 5, plan.k.channels), np.float32)
    x[1, 1, 3, 17] = bad
    stream = cache.layers[0].k
    before = stream.tail.copy()
    with pytest.raises(KvantError) as caught:
        kernels.append(0, stream, x, np.zeros(2, np.int64), np.full(2, 5))
    assert caught.value.code == "non-finite"
    assert "row 1, head 1, token 3" in caught.value.what
    assert np.array_equal(stream.tail, before)
    # The bad token is not among those that count.
    kernels.append(0, stream, x, np.zeros(2, np.int64), np.full(2, 3))


def test_maps_that_overflow_are_refused() -> None:
    plan = mapped(plan_of(Raw("f32"), Raw("f32")), *PLANS["maps"].k.maps[2:])
    kernels = kernels_of([plan], [{}])
    stream = Cache([plan], kernels, batch=1, max_tokens=64).layers[0].k
    x = np.full((1, 2, 1, 64), 3e38, np.float32)
    with pytest.raises(KvantError) as caught:
        kernels.append(0, stream, x, np.zeros(1, np.int64), np.ones(1, np.int64))
    assert caught.value.code == "non-finite"


def test_a_scale_that_does_not_fit_is_refused() -> None:
    plan = replace(HEADLINE, v=replace(HEADLINE.v, tokens=replace(HEADLINE.v.tokens, sink=0)))
    kernels = kernels_of([plan], [{}])
    cache = Cache([plan], kernels, batch=1, max_tokens=64)
    x = np.ones((1, 2, 1, 128), np.float32)
    huge = x.copy()
    huge[..., 0] = 3e6
    cache.append(0, x, huge)
    with pytest.raises(KvantError) as caught:
        cache.flush()
    assert caught.value.code == "scale-overflow"
