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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..ir.arrangements import TILES, TURNED
from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan
from .gpu_append import append
from .gpu_attend import attend, decode_rows
from .gpu_block import attend_block, shape_of
from .gpu_combine import combine
from .gpu_lane_attend import sequences_text as lane_sequences
from .gpu_prepare import ROWS, prepare
from .gpu_rest import PART
from .gpu_sequences import GCN, PLAIN, PTX
from .gpu_splits import split_facts
from .gpu_text import Dialect, Kernel
from .gpu_tiles import kinds
from .gpu_unpack import unpack
from .gpu_whole import LEAST_TILES, MOST_SPLITS, attend_tiles, sequences_of
from .kernel_text import GPU_KERNELS
from .machines import GPUS, Gpu
from .source import Source, split_tokens
from .source import why_not as why_no_target
from .target import Build, Stage, Target

TRITON = "3.9.0"
MOST_CHANNELS = 256
# Variables that the compiling process gets; others could change what is compiled.
KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
# Tokens of one program of append where kernels are read line by line; see `emit`.
PLAIN_NEW = 16
# What a machine needs to load the binaries, by major version.
PACKAGES = {"cuda": {"cuda-bindings": "", "cuda-core": "1", "torch": "2"}, "hip": {"torch": "2"}}


HEAD = '"""Kernels of one attention plan in Triton, written by kvant."""\n\n'
HEAD += "import triton\nimport triton.language as tl\n"
# Products of f32 on tensor cores: three products of tf32 on NVIDIA's; AMD's take f32 as it is.
# AMD's matrix products have 16 columns, or 4 rows and 64 columns (`gpu_lanes.py`); its compiler
# takes no four bytes as an operand of assembly.
DIALECTS = {
    "cuda": Dialect(PTX, "tf32x3", threads=32, period=8, has_bytes=True, least_rows=8, stages=3),
    "hip": Dialect(
        GCN,
        "ieee",
        threads=64,
        period=16,
        has_bytes=False,
        least_rows=16,
        stages=2,
        lanes=True,
    ),
}


def emit(
    plan: AttentionPlan,
    backend: str = "cuda",
    *,
    plain: bool = False,
    shared: int = 0,
    float_max: bool = False,
) -> Source[Kernel]:
    """Return the kernels of a plan as text.

    Args:
        plan: what is stored and computed.
        backend: "cuda" or "hip".
        plain: without assembly, as Triton's interpreter takes it.
        shared: bytes of shared memory for a block of the GPU; 0 for kernels that any can launch.
        float_max: of the GPU; see `machines.Gpu`.
    """
    dialect = replace(DIALECTS[backend], float_max=float_max)
    if plain:  # the interpreter takes as long for a line, whatever its arrays
        dialect = replace(dialect, rest=PART, new=PLAIN_NEW)
    (k, v), shape = kinds(plan, dialect), shape_of(plan, shared)
    kernels = (
        prepare(plan, codes=k == TILES, looked=dialect.has_bytes),
        append(plan, (k, v), dialect),
        attend_tiles(plan, dialect) if k == TILES else attend(plan, dialect),
        unpack(plan, dialect, shape.tokens),
        attend_block(plan, dialect, shape),
        combine(plan, tiles=k == TILES),
    )
    form = PLAIN if plain else dialect.form
    return Source(plan, kernels, HEAD + sequences_text(plan, dialect, form))


def sequences_text(plan: AttentionPlan, dialect: Dialect, form: str) -> str:
    """Return the functions that unpack codes in the kernels of a plan."""
    if kinds(plan, dialect)[1] == TURNED:
        return lane_sequences(plan, plain=form == PLAIN)
    found = sorted(sequences_of(plan, dialect), key=lambda sequence: sequence.name)
    return "".join(sequence.source(form) for sequence in found)


def launch_facts(source: Source[Kernel], backend: str = "cuda") -> dict[str, Any]:
    """Return what a launcher must know, whatever the GPU."""
    own = {kernel.name: kernel.facts for kernel in source.kernels}
    return {
        "layouts": kinds(source.plan, DIALECTS[backend]),
        "kernels": {kernel.name: kernel.arguments() for kernel in source.kernels},
        "split_tokens": split_tokens(source.plan),
        "least_tiles": LEAST_TILES,
        "most_splits": MOST_SPLITS,
        # Of a part of what whole tiles leave; 0 where pages are no tiles.
        "rest_tokens": PART if kinds(source.plan, DIALECTS[backend])[0] == TILES else 0,
        "rows": {
            "attend": decode_rows(source.plan, DIALECTS[backend]),
            "prepare": ROWS,
            "combine": ROWS,
        },
        **{name: own.get(name, {}) for name in ("append", "attend_block")},
    }


def compile_gpu(source: Source[Kernel], gpu: Gpu) -> dict[str, bytes]:
    """Return the binaries of all kernels, kernels.py and launch.json.

    Raises: KvantError "compiler-failed", "shared-memory".
    """
    made = compile_kernels(source, gpu)
    for name, kernel in made.items():
        _check(name, kernel.facts, gpu)
    suffix = "cubin" if gpu.backend == "cuda" else "hsaco"
    kept = {n: {k: m.facts[k] for k in ("entry", "shared", "warps")} for n, m in made.items()}
    launch = launch_facts(source, gpu.backend)
    launch |= _splits(source.plan, launch, gpu, kept["attend"]) if "attend" in kept else {}
    launch |= {
        "facts": _facts(gpu),
        "binaries": {
            name: fact | {"file": f"{name}.{suffix}", "threads": fact["warps"] * gpu.warp}
            for name, fact in kept.items()
        },
    }
    files = {f"{name}.{suffix}": kernel.binary for name, kernel in made.items()}
    return files | {
        "kernels.py": source.text().encode(),
        "launch.json": (json.dumps(launch, indent=1, sort_keys=True) + "\n").encode(),
    }


def _splits(
    plan: AttentionPlan, launch: dict[str, Any], gpu: Gpu, attend: dict[str, Any]
) -> dict[str, int]:
    """Return how rows are split; `attend`: facts of the binary."""
    stages = DIALECTS[gpu.backend].stages
    given = launch["rows"]["attend"], attend["shared"], attend["warps"], stages
    return split_facts(plan, gpu, *given)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as Triton made it: its binary, launch facts, and on AMD its assembly."""

    binary: bytes
    facts: dict[str, Any]
    assembly: str


def compile_kernels(source: Source[Kernel], gpu: Gpu) -> dict[str, Compiled]:
    """Return what Triton makes of each kernel, whether or not the GPU can launch it.

    Raises: KvantError "compiler-failed".
    """
    with tempfile.TemporaryDirectory(prefix="kvant-") as folder:
        place = Path(folder)
        (place / "kernels.py").write_text(source.text())
        job = {
            "target": (gpu.backend, gpu.arch, gpu.warp),
            "kernels": {
                kernel.name: {
                    "signature": kernel.signature(),
                    "warps": kernel.warps,
                    "registers": kernel.registers,
                    # What is stored is that of NumPy to the bit: no product and sum in one.
                    "fusion": kernel.name.startswith("attend"),
                }
                for kernel in source.kernels
            },
        }
        (place / "job.json").write_text(json.dumps(job))
        _run(place, gpu)
        return {
            kernel.name: Compiled(
                (place / f"{kernel.name}.bin").read_bytes(),
                json.loads((place / f"{kernel.name}.json").read_text()),
                (place / f"{kernel.name}.s").read_text(),
            )
            for kernel in source.kernels
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
        "kernels": GPU_KERNELS,
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
    source = partial(emit, backend=gpu.backend, shared=gpu.shared, float_max=gpu.float_max)
    return Target(
        name=f"{gpu.backend}:{gpu.name}",
        summary=f"{gpu.devices}, by Triton",
        supports=why_not,
        available=available,
        stages=(
            Stage("source", source),
            Stage("binary", partial(_binary, gpu)),
        ),
    )


GPU_TARGETS = tuple(target_of(gpu) for gpu in GPUS.values())
