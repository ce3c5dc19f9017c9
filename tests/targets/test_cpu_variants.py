"""One artifact for many processors: the table, what LLVM makes for each, and who is chosen."""

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvant
from kvant.ir.errors import KvantError
from kvant.runtime.machine import _LLVM_NAMES, this_machine, why_not
from kvant.runtime.target import _BEST_CPUS
from kvant.runtime.verify import verify
from kvant.targets import TARGETS
from kvant.targets.cpu import HEAD, _facts, compile_cpu, this_cpu
from kvant.targets.cpu_attend import attend
from kvant.targets.cpu_combine import combine
from kvant.targets.cpu_compile import _check_calls, _check_processor, assembly, compile_source
from kvant.targets.cpu_link import link
from kvant.targets.kernel_text import KERNELS
from kvant.targets.machines import CPUS, Cpu
from kvant.targets.source import Source

from .cpu_cases import HEADLINE, PLANS, int_format, plan_of
from .test_cpu import compare, filled

X86 = [cpu for cpu in CPUS.values() if cpu.machine == "x86_64"]
RUN_HERE = [cpu for cpu in X86 if why_not(_facts(HEADLINE, cpu, None), this_machine()) is None]
V2, V3 = CPUS["x86-64-v2"], CPUS["x86-64-v3"]
INT4 = int_format(4, "token", 64)
SMALL = plan_of(INT4, INT4, compute="int")

# What LLVM has for a processor beyond the table: tuning; what the system switches on; and what only
# an intrinsic, a lock or a branch chooses, never arithmetic.
NEVER_CHOSEN = """
    64bit 64bit-mode adx aes allow-light-256-bit amx-bf16 amx-int8 amx-tile branchfusion cldemote
    clflushopt clwb clzero cmov crc32 cx8 enqcmd ermsb fsgsbase fsrm fxsr hreset idivl-to-divb
    idivq-to-divl invpcid kl macrofusion mmx movdir64b movdiri mwaitx nopl pclmul pconfig pku prfchw
    ptwrite rdpid rdpru rdrnd rdseed sahf sbb-dep-breaking serialize sha shstk sse sse2 sse4a
    tsxldtrk uintr vaes vpclmulqdq vzeroupper waitpkg wbnoinvd widekl x87 xsavec xsaveopt xsaves
""".split()
TUNING = re.compile("fast-|false-deps-|prefer-|slow-|no-bypass-|tuning-|use-|branch-hint")
OTHER_NAMES = {"lahf_lm": "sahf", "bmi1": "bmi"}

# As they stand in assembly; macOS writes the shape of a vector behind the instruction.
MARKS = {
    "avx512": r"%[xyz]mm(?:1[6-9]|2\d|3[01])|%zmm|%k[1-7]",
    "avx": r"%ymm|\bv(?:add|mul)ps\b",
    "sse4_1": r"\b(?:pmov[sz]x|pinsr[bdq]|pextr[bdq]|round[ps][sd]|insertps)",
}
REGISTERS = {64: r"%zmm\d", 32: r"%ymm\d", 16: r"%xmm\d|\bv\d+\.|\.[24][sd]\s+v\d"}
# The instruction that sums products of 4-bit codes, by `Cpu.dots`.
DOT_INSTRUCTIONS = {
    "pairs": r"v?pmaddubsw",
    "vnni": r"vpdpbusd",
    "neon": r"\bsdot(?:\.4s)?\s",
    "neon-i8mm": r"usdot(?:\.4s)?\s",
}


def only(kernel: str, cpu: Cpu) -> Source[Any]:
    """One kernel of 4-bit keys and values: a sixth of the time of all eight."""
    written = attend(SMALL, cpu) if kernel == "attend" else combine(SMALL)
    return Source(SMALL, (written,), HEAD)


def check_dots(text: str, cpu: Cpu) -> None:
    """See that the assembly of integer kernels has the instruction of the processor."""
    assert re.search(DOT_INSTRUCTIONS[cpu.dots], text), (cpu.name, DOT_INSTRUCTIONS[cpu.dots])


def test_every_processor_is_a_target() -> None:
    assert [name for name in TARGETS if name.startswith("cpu:")] == [f"cpu:{n}" for n in CPUS]
    assert "linked" not in TARGETS["cpu:neoverse-v2"].summary
    assert "no library" in TARGETS["cpu:apple-m1"].summary


def test_the_runtime_prefers_processors_in_the_order_of_the_table() -> None:
    assert tuple(cpu.name for cpu in X86) == _BEST_CPUS


@pytest.mark.parametrize("cpu", CPUS.values(), ids=CPUS)
def test_the_features_are_those_that_llvm_uses(cpu: Cpu) -> None:
    """Both ways: LLVM has each feature, and may use none that a machine need not have."""
    import tvm

    target = tvm.target.Target({"kind": "llvm", "mtriple": cpu.triple, "mcpu": cpu.mcpu})
    used = set(map(str, tvm.get_global_func("target.llvm_get_cpu_features")(target)))
    names = {
        _LLVM_NAMES.get(f, OTHER_NAMES.get(f, f.replace("avx512_", "avx512"))) for f in cpu.features
    }
    if cpu.machine != "x86_64":
        assert {"neon", "dotprod"} <= used
        assert ("i8mm" in used) == (cpu.dots == "neon-i8mm")
        return
    assert names <= used, names - used
    more = {f for f in used - names if not TUNING.match(f)} - set(NEVER_CHOSEN)
    assert not more


def cpuinfo(folder: Path, flags: set[str], key: str = "flags") -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor : 0\n{key}\t: {' '.join(sorted(flags))}\n")
    return path


@pytest.mark.parametrize("cpu", [c for c in CPUS.values() if c.system == "Linux"], ids=str)
def test_the_best_that_fits_is_built(cpu: Cpu, tmp_path: Path) -> None:
    key = "flags" if cpu.machine == "x86_64" else "Features"
    path = cpuinfo(tmp_path, {*cpu.features, "more"}, key)
    assert this_cpu(path, cpu.system, cpu.machine) == cpu


def test_an_old_machine_gets_what_it_can_run(tmp_path: Path) -> None:
    less = cpuinfo(tmp_path, set(V3.features) - {"avx2"})
    assert this_cpu(less, "Linux", "x86_64") == V2


def test_a_machine_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    path = cpuinfo(tmp_path, set(V2.features) - {"ssse3", "sse4_1"})
    with pytest.raises(KvantError) as caught:
        this_cpu(path, "Linux", "x86_64")
    assert str(caught.value) == (
        "this machine lacks sse4_1, ssse3; the kernels need x86-64-v2 at least\n"
        "  where: target cpu\n"
        "  fix: name the machine to build for, such as cpu:x86-64-v3; or use the target "
        "'reference'  [machine-does-not-fit]"
    )
    with pytest.raises(KvantError, match="no CPU target is for Darwin on arm64"):
        this_cpu(path, "Darwin", "arm64")
    with pytest.raises(KvantError, match="this machine lacks cx16, "):
        this_cpu(tmp_path / "nothing", "Linux", "x86_64")


@pytest.mark.parametrize("cpu", CPUS.values(), ids=CPUS)
def test_the_code_uses_the_vectors_of_the_processor(cpu: Cpu) -> None:
    text = assembly(only("attend", cpu), cpu)
    assert re.search(REGISTERS[cpu.vector], text), f"no vectors of {cpu.vector} bytes"
    for wider in (size for size in REGISTERS if size > cpu.vector):
        assert not re.search(REGISTERS[wider], text), f"vectors of {wider} bytes"
    check_dots(text, cpu)
    for feature, mark in MARKS.items():
        has = {"avx512": "avx512f"}.get(feature, feature) in cpu.features
        # From AVX on the same instructions have other names.
        if feature != "sse4_1" or "avx" not in cpu.features:
            assert bool(re.search(mark, text)) == has, feature
    fused = re.search(r"\bvfn?m(add|sub)\d+ps|\bfml[as]", text) is not None
    assert fused == cpu.fma


def test_code_for_another_processor_is_refused() -> None:
    """As LLVM makes it, without a word, for a name that it does not know."""
    told = 'attributes #0 = { "target-cpu"="x86-64-v3" }'
    good = b"\x7fELF\0memset\0exports\0"

    def check(intermediate: str, made: bytes) -> None:
        _check_processor(intermediate, V3)
        _check_calls(made, V3)

    check(told, good)
    cases = {
        "LLVM made code for any, not for x86-64-v3": ("", good),
        "LLVM made code for x86-64, not for x86-64-v3": (told.replace("-v3", ""), good),
        "the code for x86-64-v3 calls __divdf3, fmaf, which is in no library": (
            told,
            good + b"fmaf\0__extendhfsf2\0__divdf3\0",
        ),
        "the code for x86-64-v3 calls expf, which is in no library": (told, good + b"_expf\0"),
    }
    for says, (intermediate, made) in cases.items():
        with pytest.raises(KvantError) as caught:
            check(intermediate, made)
        assert (caught.value.code, caught.value.what) == ("compiler-failed", says)
    with pytest.raises(KvantError, match="LLVM does not know the processor z80"):
        compile_source(only("combine", V3), replace(V3, mcpu="z80"))


def test_a_call_of_a_library_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In real code: the two functions that TVM adds, were they not among those that it adds."""
    monkeypatch.setattr("kvant.targets.cpu_compile.WRITTEN", set[str]())
    with pytest.raises(KvantError, match="calls __extendhfsf2, __truncsfhf2, which is in no"):
        compile_source(only("attend", V2), V2)


def digests() -> dict[str, str]:
    """Of everything that is built of one kernel: linked by cc, by zig, and not linked."""
    cpus = (CPUS[name] for name in ("x86-64-v3", "neoverse-v2", "apple-m1"))
    built = {cpu.name: compile_cpu(only("combine", cpu), cpu) for cpu in cpus}
    return {
        f"{name}/{file}": hashlib.sha256(data).hexdigest()
        for name, files in built.items()
        for file, data in files.items()
    }


def test_the_same_bytes_come_from_another_process() -> None:
    code = (
        "import json, importlib; "
        f"m = importlib.import_module({__name__!r}); print(json.dumps(m.digests()))"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    import json

    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert digests() == theirs
    assert {"apple-m1/kernels.o", "apple-m1/kernels.s", "neoverse-v2/kernels.so"} <= theirs.keys()
    assert "apple-m1/kernels.so" not in theirs


def test_a_library_for_arm_is_linked_here(tmp_path: Path) -> None:
    cpu = CPUS["neoverse-v2"]
    files = compile_cpu(only("combine", cpu), cpu)
    library = files["kernels.so"]
    # ELF: the kind of machine, 183 for AArch64, is at byte 18.
    assert int.from_bytes(library[18:20], "little") == 183
    needed = set(re.findall(rb"(?<=\0)lib[\w.]+\.so[.\d]*(?=\0)", library))
    assert needed <= {b"libc.so.6", b"libpthread.so.0"}
    assert max(re.findall(rb"GLIBC_([\d.]+)", library)) <= b"2.28"
    assert b"__tvm_ffi_combine\0" in library
    assert b"KVANT_NUM_THREADS\0" in library  # of pool.c


def test_without_zig_only_foreign_targets_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvant.targets.cpu_link.importlib.util.find_spec", lambda name: None)
    reason = (
        "linking for Linux on aarch64 needs zig, which is not installed: pip install 'kvant[cross]'"
    )
    assert TARGETS["cpu:neoverse-v2"].available() == reason
    assert all(TARGETS[f"cpu:{n}"].available() is None for n in CPUS if n != "neoverse-v2")
    with pytest.raises(KvantError) as caught:
        link(b"", CPUS["neoverse-v2"])
    assert str(caught.value) == (
        "linking for Linux on aarch64 needs zig, which is not installed\n"
        "  where: target cpu:neoverse-v2\n"
        "  fix: pip install 'kvant[cross]'  [no-c-compiler]"
    )


@pytest.mark.parametrize("queries", [1, 9])
def test_the_lowest_level_computes_too(queries: int) -> None:
    """No fma, no instruction for halves: SSE 4.2 alone."""
    compare(PLANS["raw"], [300, 0, 130, 1], queries, V2)


def test_the_lowest_level_stores_the_same_bytes() -> None:
    compiled, reference = filled(PLANS["raw"], [300, 1, 130], cpu=V2)
    for have, want in zip(compiled.layers[0].streams, reference.layers[0].streams, strict=True):
        assert have.pool.high == want.pool.high > 0
        assert np.array_equal(have.pages[: have.pool.high], want.pages[: want.pool.high])


def test_one_artifact_for_all_processors(tmp_path: Path) -> None:
    """Every variant that runs here is verified; the others are named with a reason."""
    names = [f"cpu:{cpu.name}" for cpu in (*reversed(RUN_HERE), CPUS["apple-m1"])]
    shape = kvant.Shape(2, 1, 32)
    art = kvant.compile(shape, "int4-token", names, out=tmp_path / "fat.kvant")
    assert art.target == f"cpu-{RUN_HERE[-1].name}"  # the first one named
    best = kvant.load(art.path, id=art.id)
    assert best.target == f"cpu-{RUN_HERE[0].name}"
    others = {f"cpu-{cpu.name}": f"{best.target} was preferred" for cpu in RUN_HERE[1:]}
    macos = (
        "it is an object file and assembly for macOS, which nothing links to a library that could "
        "be loaded"
    )
    assert best.passed_over == others | {"cpu-apple-m1": macos}
    result = verify(art.path, id=art.id)
    assert result["target"] == best.target
    assert result["also_checked"] == [f"cpu-{cpu.name}" for cpu in RUN_HERE[1:]]
    assert result["passed_over"] == {"cpu-apple-m1": macos}
    assert result["cases"] == len(RUN_HERE) * verify(art.path, best.target, art.id)["cases"]
    with pytest.raises(KvantError) as caught:
        kvant.load(art.path, target="cpu:apple-m1", id=art.id)
    assert caught.value.code == "no-usable-target"
    assert macos in caught.value.what
    folder = art.path / "targets" / "cpu-apple-m1" / "p0"
    assert sorted(f.name for f in folder.iterdir()) == [
        "kernels.o",
        "kernels.py",
        "kernels.s",
        "launch.json",
    ]
    assert {
        name for name in KERNELS if f"__tvm_ffi_{name}:" not in (folder / "kernels.s").read_text()
    } == set()
