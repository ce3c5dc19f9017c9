"""The target cpu: plan -> TVMScript text -> one shared library, for one processor of CPUS.

The library holds at most nine kernels and the thread pool (pool.c). It needs libc and the error
function of tvm-ffi, nothing else; identical plans give identical bytes. For macOS there is an
object file instead, and its assembly.
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan
from .cpu_append import append
from .cpu_attend import TILE_QUERIES, attend, attend_block
from .cpu_combine import combine
from .cpu_compile import compile_source
from .cpu_encode import encode
from .cpu_link import link, linked, missing
from .cpu_prepare import prepare
from .cpu_quads import layouts, path_of
from .cpu_rows import item_heads, split_tokens
from .cpu_step import step
from .cpu_text import Kernel
from .kernel_text import HOST_KERNELS, KERNELS
from .machines import CPUS, Cpu
from .source import Source, why_not
from .target import Build, Stage, Target

TVM_FFI = "0.1.15"


HEAD = '"""Kernels of one attention plan in TVMScript, written by kvant."""\n\n'
HEAD += "from tvm.script import tirx as T\n"


def emit(plan: AttentionPlan, cpu: Cpu) -> Source[Kernel]:
    """Return the kernels of a plan as text."""
    k, v = layouts(plan)
    kernels = (
        prepare(plan),
        append(plan.k),
        append(plan.v),
        encode(plan.k, k),
        encode(plan.v, v),
        step(plan, (k, v)),
        attend(plan, cpu),
        attend_block(plan, cpu),
        combine(plan),
    )
    return Source(plan, kernels, HEAD)


def compile_cpu(source: Source[Kernel], cpu: Cpu) -> dict[str, bytes]:
    """Return kernels.py, launch.json, and kernels.so or what stands for it.

    Where no library can be linked (macOS) these are kernels.o and kernels.s, its assembly.

    Args:
        source: emitted for `cpu`, of a plan that `why_not` accepts.
        cpu: which processor.

    Raises: KvantError "no-c-compiler", "compiler-failed".
    """
    code = compile_source(source, cpu, with_assembly=not linked(cpu))
    if linked(cpu):
        binaries = {"kernels.so": link(code.object, cpu)}
    else:
        binaries = {"kernels.o": code.object, "kernels.s": code.assembly.encode()}
    launch = launch_facts(source, cpu, binaries.get("kernels.so"))
    text = json.dumps(launch, indent=1, sort_keys=True) + "\n"
    return binaries | {"kernels.py": source.text().encode(), "launch.json": text.encode()}


def launch_facts(source: Source[Kernel], cpu: Cpu, library: bytes | None) -> dict[str, Any]:
    """Return launch.json: what the runtime has to know of a library of all kernels of a source."""
    return {
        "facts": _facts(source.plan, cpu, library),
        "item_heads": item_heads(source.plan),
        "kernels": {kernel.name: kernel.arguments() for kernel in source.kernels},
        "layouts": [layout.kind for layout in layouts(source.plan)],
        "split_tokens": split_tokens(source.plan),
        "tile_queries": TILE_QUERIES,
    }


def available(cpu: Cpu) -> str | None:
    """Return None if kernels for a processor can be built here, or one sentence why not."""
    reason = missing(cpu)
    if reason is not None:
        return reason
    try:
        import tvm  # noqa: F401
    except ImportError:
        return "apache-tvm is not installed: pip install 'kvant[compile]'"
    return None


def this_cpu(
    cpuinfo: Path = Path("/proc/cpuinfo"), system: str | None = None, machine: str | None = None
) -> Cpu:
    """Return the first of CPUS whose libraries this machine runs, by the flags of its processor.

    Args:
        cpuinfo: where the flags are.
        system: as platform.system() says; this one's if not given.
        machine: as platform.machine() says; this one's if not given.

    Raises: KvantError "machine-does-not-fit" if it lacks a feature of the lowest one.
    """
    place = (system or os.uname().sysname, machine or os.uname().machine)
    here = [cpu for cpu in CPUS.values() if (cpu.system, cpu.machine) == place and linked(cpu)]
    flags = _flags(cpuinfo)
    for cpu in here:
        if set(cpu.features) <= flags:
            return cpu
    least = min(here, key=lambda cpu: len(cpu.features), default=None)
    what = f"no CPU target is for {' on '.join(place)}"
    if least is not None:
        lacking = ", ".join(sorted(set(least.features) - flags))
        what = f"this machine lacks {lacking}; the kernels need {least.name} at least"
    raise KvantError(
        "machine-does-not-fit",
        what,
        where="target cpu",
        fix="name the machine to build for, such as cpu:x86-64-v3; or use the target 'reference'",
    )


def _flags(cpuinfo: Path) -> set[str]:
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    return set(found[1].split()) if found else set()


def _facts(plan: AttentionPlan, cpu: Cpu, library: bytes | None) -> dict[str, Any]:
    paths = f"keys by {path_of(plan, 'k', cpu)}, values by {path_of(plan, 'v', cpu)}"
    facts = {
        "kind": "cpu",
        "system": cpu.system,
        "machine": cpu.machine,
        "features": sorted(cpu.features),
        "packages": {"apache-tvm-ffi": TVM_FFI},
        "kernels": KERNELS | HOST_KERNELS | {"attend": f"{KERNELS['attend']}; {paths}"},
    }
    if library is not None:
        versions = {tuple(map(int, m)) for m in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)}
        major, minor = max(versions, default=(2, 17))
        facts["glibc"] = f"{major}.{minor}"
    return facts


def _binary(cpu: Cpu, source: Source[Kernel]) -> Build:
    files = compile_cpu(source, cpu)
    return Build(f"cpu-{cpu.name}", json.loads(files["launch.json"])["facts"], files)


def _target(cpu: Cpu) -> Target:
    return Target(
        name=f"cpu:{cpu.name}",
        summary=cpu.summary,
        supports=why_not,
        available=partial(available, cpu),
        stages=(Stage("source", partial(emit, cpu=cpu)), Stage("binary", partial(_binary, cpu))),
    )


CPU_TARGETS = tuple(_target(cpu) for cpu in CPUS.values())
