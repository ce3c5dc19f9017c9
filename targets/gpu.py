"""The targets cuda and hip: plan -> Triton text -> one binary a kernel, with no GPU present.

Identical plans give identical bytes. A binary runs on its own kind of GPU alone, by the driver,
with no Triton on that machine.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan
from .gpu_append import APPEND_ROWS, append
from .gpu_attend import attend, block_rows, decode_rows
from .gpu_combine import combine
from .gpu_encode import encode, tokens_at_once
from .gpu_prepare import ROWS, prepare
from .gpu_text import Kernel
from .kernel_text import KERNELS
from .machines import GPUS, Gpu
from .source import Source, split_tokens
from .source import why_not as why_no_target
from .target import Build, Stage, Target

TRITON = "3.9.0"
MOST_CHANNELS = 256
WARPS = 4
# Variables that the compiling process gets; others could change what is compiled.
KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
# What a machine needs to load the binaries, by major version.
PACKAGES = {"cuda": {"cuda-bindings": "", "cuda-core": "1", "torch": "2"}, "hip": {"torch": "2"}}


HEAD = '"""Kernels of one attention plan in Triton, written by kvant."""\n\n'
HEAD += "import triton\nimport triton.language as tl\n"
# Products of f32 on tensor cores: three products of tf32 on NVIDIA's; AMD's take f32 as it is.
PRECISION = {"cuda": "tf32x3", "hip": "ieee"}


def emit(plan: AttentionPlan, backend: str = "cuda") -> Source[Kernel]:
    """Return the kernels of a plan as text."""
    precision = PRECISION[backend]
    kernels = (
        prepare(plan),
        append(plan.k),
        append(plan.v),
        encode(plan.k),
        encode(plan.v),
        attend(plan, "attend", decode_rows(plan), precision),
        attend(plan, "attend_block", block_rows(plan), precision),
        combine(plan),
    )
    return Source(plan, kernels, HEAD)


def launch_facts(source: Source[Kernel]) -> dict[str, Any]:
    """Return what a launcher must know, whatever the GPU."""
    return {
        "kernels": {kernel.name: kernel.arguments() for kernel in source.kernels},
        "split_tokens": split_tokens(source.plan),
        "rows": {
            "attend": decode_rows(source.plan),
            "attend_block": block_rows(source.plan),
            "prepare": ROWS,
            "combine": ROWS,
        },
        "tokens": {
            "append": APPEND_ROWS,
            "encode_k": tokens_at_once(source.plan.k),
            "encode_v": tokens_at_once(source.plan.v),
        },
    }


def compile_gpu(source: Source[Kernel], gpu: Gpu) -> dict[str, bytes]:
    """Return the binaries of all kernels, kernels.py and launch.json.

    Raises: KvantError "compiler-failed", "shared-memory".
    """
    text = source.text()
    with tempfile.TemporaryDirectory(prefix="kvant-") as folder:
        place = Path(folder)
        (place / "kernels.py").write_text(text)
        job = {
            "target": (gpu.backend, gpu.arch, gpu.warp),
            "kernels": {
                kernel.name: {
                    "signature": kernel.signature(),
                    "warps": WARPS,
                    # What is stored is that of NumPy to the bit: no product and sum in one.
                    "fusion": kernel.name.startswith("attend"),
                }
                for kernel in source.kernels
            },
        }
        (place / "job.json").write_text(json.dumps(job))
        _run(place, gpu)
        names = [kernel.name for kernel in source.kernels]
        binaries = {name: (place / f"{name}.bin").read_bytes() for name in names}
        facts = {name: json.loads((place / f"{name}.json").read_text()) for name in names}
    for name, fact in facts.items():
        _check(name, fact, gpu)
    suffix = "cubin" if gpu.backend == "cuda" else "hsaco"
    kept = {n: {k: f[k] for k in ("entry", "shared", "warps")} for n, f in facts.items()}
    launch = launch_facts(source) | {
        "facts": _facts(gpu),
        "threads": WARPS * gpu.warp,
        "binaries": {name: fact | {"file": f"{name}.{suffix}"} for name, fact in kept.items()},
    }
    files = {f"{name}.{suffix}": data for name, data in binaries.items()}
    return files | {
        "kernels.py": text.encode(),
        "launch.json": (json.dumps(launch, indent=1, sort_keys=True) + "\n").encode(),
    }


def _run(folder: Path, gpu: Gpu) -> None:
    """Compile the job of a folder, with an empty cache and little else of the environment."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment = kept | {"TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", f"{__package__}.gpu_compile", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise KvantError(
            "compiler-failed",
            f"Triton failed for {gpu.name}: {done.stderr.strip()[-600:]}",
            where=f"target {gpu.backend}",
            fix="this is a bug in kvant or in the installed compilers; please report it",
        )


def _check(name: str, fact: dict[str, Any], gpu: Gpu) -> None:
    """Refuse a binary that the GPU could not launch."""
    if fact["shared"] > gpu.shared or fact["scratch"]:
        raise KvantError(
            "shared-memory",
            f"kernel {name} needs {fact['shared']} bytes of shared memory and {fact['scratch']} of "
            f"scratch; {gpu.name} gives a block {gpu.shared}, and no scratch is set up",
            where=f"target {gpu.backend}:{gpu.name}",
            fix="use a smaller head, or leave this target out",
        )


def _facts(gpu: Gpu) -> dict[str, Any]:
    return {
        "kind": gpu.backend,
        "system": "Linux",
        "gpu": gpu.name,
        "packages": PACKAGES[gpu.backend],
        "kernels": KERNELS,
    }


def why_not(plan: AttentionPlan) -> str | None:
    """Return one sentence why a plan cannot be built, or None."""
    return why_no_target(plan, MOST_CHANNELS)


def available() -> str | None:
    """Return None if binaries can be built here, or one sentence why not."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed: pip install 'kvant[compile]'"
    if version != TRITON:
        return f"triton {version} is installed, {TRITON} is needed: pip install triton=={TRITON}"
    return None


def _binary(gpu: Gpu, source: Source[Kernel]) -> Build:
    files = compile_gpu(source, gpu)
    return Build(f"{gpu.backend}-{gpu.name}", json.loads(files["launch.json"])["facts"], files)


def target_of(gpu: Gpu) -> Target:
    """Return the target of a kind of GPU."""
    return Target(
        name=f"{gpu.backend}:{gpu.name}",
        summary=f"{gpu.devices}, by Triton",
        supports=why_not,
        available=available,
        stages=(
            Stage("source", partial(emit, backend=gpu.backend)),
            Stage("binary", partial(_binary, gpu)),
        ),
    )


GPU_TARGETS = tuple(target_of(gpu) for gpu in GPUS.values())
