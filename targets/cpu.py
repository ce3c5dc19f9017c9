"""The target cpu: plan -> TVMScript text -> one shared library.

The library holds at most eight kernels and the thread pool (pool.c). It needs libc and the error
function of tvm-ffi, nothing else; identical plans give identical bytes.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan
from .cpu_append import append
from .cpu_attend import TILE_QUERIES, attend, attend_block
from .cpu_combine import combine
from .cpu_compile import link, object_file
from .cpu_encode import encode
from .cpu_prepare import prepare
from .cpu_text import Kernel
from .kernel_text import KERNELS
from .source import Source, split_tokens, why_not
from .target import Build, Stage, Target

ISA = "x86-64-v3"
# In Linux' spelling (/proc/cpuinfo), what the instructions of an ISA level need beyond x86-64.
FEATURES = {ISA: ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "ssse3")}
TVM_FFI = "0.1.15"


HEAD = '"""Kernels of one attention plan in TVMScript, written by kvant."""\n\n'
HEAD += "from tvm.script import tirx as T\n"


def emit(plan: AttentionPlan) -> Source[Kernel]:
    """Return the kernels of a plan as text."""
    kernels = (
        prepare(plan),
        append(plan.k),
        append(plan.v),
        encode(plan.k),
        encode(plan.v),
        attend(plan),
        attend_block(plan),
        combine(plan),
    )
    return Source(plan, kernels, HEAD)


def compile_cpu(source: Source[Kernel], isa: str = ISA) -> dict[str, bytes]:
    """Return kernels.so, kernels.py and launch.json of what was emitted.

    Args:
        source: of a plan that `why_not` accepts.
        isa: a key of FEATURES.

    Raises: KvantError "unknown-isa", "no-c-compiler", "compiler-failed".
    """
    if isa not in FEATURES:
        raise KvantError(
            "unknown-isa", f"no ISA {isa!r}", where="target cpu", fix=f"use: {', '.join(FEATURES)}"
        )
    library = link(object_file(source, isa))
    launch = {
        "facts": _facts(library, isa),
        "kernels": {kernel.name: kernel.arguments() for kernel in source.kernels},
        "split_tokens": split_tokens(source.plan),
        "tile_queries": TILE_QUERIES,
    }
    text = json.dumps(launch, indent=1, sort_keys=True) + "\n"
    return {
        "kernels.so": library,
        "kernels.py": source.text().encode(),
        "launch.json": text.encode(),
    }


def available() -> str | None:
    """Return None if libraries can be built here, or one sentence why not."""
    if shutil.which("cc") is None:
        return "no C compiler `cc` was found: install gcc or clang"
    try:
        import tvm  # noqa: F401
    except ImportError:
        return "apache-tvm is not installed: pip install 'kvant[compile]'"
    return None


def this_isa(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the ISA level that this machine runs, by the flags of its processor.

    Raises: KvantError "machine-does-not-fit" if it lacks AVX2 or another feature of the lowest one.
    """
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.M)
    lacking = sorted(set(FEATURES[ISA]) - set(found[1].split() if found else ()))
    if lacking:
        raise KvantError(
            "machine-does-not-fit",
            f"this machine lacks {', '.join(lacking)}; the kernels need {ISA}",
            where="target cpu",
            fix=f"name the machine to build for: cpu:{ISA}; or use the target 'reference'",
        )
    return ISA


def _facts(library: bytes, isa: str) -> dict[str, Any]:
    versions = {tuple(map(int, m)) for m in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)}
    major, minor = max(versions, default=(2, 17))
    return {
        "kind": "cpu",
        "system": "Linux",
        "machine": "x86_64",
        "features": list(FEATURES[isa]),
        "glibc": f"{major}.{minor}",
        "packages": {"apache-tvm-ffi": TVM_FFI},
        "kernels": KERNELS,
    }


def _binary(source: Source[Kernel]) -> Build:
    files = compile_cpu(source)
    return Build(f"cpu-{ISA}", json.loads(files["launch.json"])["facts"], files)


CPU = Target(
    name=f"cpu:{ISA}",
    summary="x86-64 with AVX2 and FMA, by TVM; `cpu` is this machine",
    supports=why_not,
    available=available,
    stages=(Stage("source", emit), Stage("binary", _binary)),
)
