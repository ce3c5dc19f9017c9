"""Code for NEON under an emulator of its processor, beside its twin that runs here.

Needs qemu-aarch64 of QEMU 6.1 or later, which knows usdot: Debian's qemu-user-static; and zig.
"""

import importlib.util
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvant.ir.arrays import Array
from kvant.ir.plan import AttentionPlan
from kvant.runtime import launch_cpu
from kvant.targets import cpu_link
from kvant.targets.cpu import HEAD
from kvant.targets.cpu_attend import attend
from kvant.targets.cpu_compile import compile_source
from kvant.targets.machines import Cpu
from kvant.targets.source import Source

from .cpu_cases import PLANS
from .test_cpu import compare
from .test_cpu_neon import NEON, SMALL, TWINS, meant_by

HERE = Path(__file__).parent
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
# Codes of DLPack by NumPy's kinds.
CODES = {"i": 0, "u": 1, "f": 2}
NAMES = [*SMALL, "int8-channel-int", "bfp-int", "slices-int", "int4-token-int", "lut4-int"]

Argument = int | Array
Call = tuple[list[Argument], list[Argument]]

pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="there is no qemu-aarch64"),
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="there is no zig"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Filled with the arguments of each call of attend, before it and after it."""
    found: list[Call] = []
    load = launch_cpu._load

    def recorded(kernel: Callable[..., None]) -> Callable[..., None]:
        def call(*given: Any) -> None:
            arrays = [x if isinstance(x, int) else np.asarray(np.from_dlpack(x)) for x in given]
            before = [x if isinstance(x, int) else x.copy() for x in arrays]
            kernel(*given)
            found.append((before, [x if isinstance(x, int) else x.copy() for x in arrays]))

        return call

    class Module:
        def __init__(self, *given: Any) -> None:
            self.module = load(*given)

        def __getitem__(self, name: str) -> Callable[..., None]:
            kernel = self.module[name]
            return recorded(kernel) if name == "attend" else kernel

    monkeypatch.setattr(launch_cpu, "_load", Module)
    monkeypatch.setenv("KVANT_NUM_THREADS", "1")
    return found


def built(plan: AttentionPlan, cpu: Cpu, folder: Path) -> Path:
    """A program of Linux that calls attend, made of the code for a processor."""
    linux = replace(cpu, triple="aarch64-linux-gnu", system="Linux", machine="aarch64")
    source = Source(plan, (attend(plan, linux),), HEAD)
    (folder / "kernels.o").write_bytes(compile_source(source, linux).object)
    pool = Path(cpu_link.__file__).with_name("pool.c")
    command = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
    files = ["-o", "attend", "kernels.o", str(HERE / "emulated.c"), str(pool)]
    subprocess.run([*command, *files], cwd=folder, check=True)
    return folder / "attend"


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def written(x: Argument) -> bytes:
    """An argument as emulated.c reads it."""
    if isinstance(x, int):
        return numbers(0, x)
    kind = (1, CODES[x.dtype.kind], 8 * x.itemsize, x.ndim, x.nbytes)
    return numbers(*kind, *x.shape) + x.tobytes()


def emulated(program: Path, given: list[Argument]) -> list[Argument]:
    """The arguments after a call."""
    folder = program.parent
    (folder / "in.bin").write_bytes(numbers(len(given)) + b"".join(map(written, given)))
    assert QEMU is not None
    subprocess.run([QEMU, "-cpu", "max", str(program)], cwd=folder, check=True)
    data, after = (folder / "out.bin").read_bytes(), list(given)
    for i, x in enumerate(given):
        if not isinstance(x, int):
            after[i] = np.frombuffer(data, x.dtype, x.size).reshape(x.shape)
            data = data[x.nbytes :]
    return after


@pytest.mark.parametrize(
    ("cpu", "twin"), [*zip(NEON, TWINS, strict=True)], ids=[cpu.name for cpu in NEON]
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.long
def test_the_code_computes_what_its_twin_does(
    name: str,
    cpu: Cpu,
    twin: Cpu,
    calls: list[Call],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for fused products, which may turn the rounding of a weight that is almost a tie."""
    plan = (PLANS | SMALL)[name]
    with monkeypatch.context() as inner:
        meant_by(inner)
        compare(plan, [300, 0, 130, 1], 1, twin)
    program = built(plan, cpu, tmp_path)
    assert calls
    for before, after in calls:
        changed = 0
        for have, want, old in zip(emulated(program, before), after, before, strict=True):
            if written(want) == written(old):
                assert written(have) == written(want)
                continue
            changed += 1
            assert np.allclose(have, want, rtol=1e-5, atol=1e-3, equal_nan=True)
        assert changed == 3  # outputs, maxima and sums of the parts
