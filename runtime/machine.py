"""What this machine can run, and why it cannot run what was compiled for another one.

A library for other instructions loads without complaint and dies at the first call, so the answer
has to come before loading.
"""

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .strict_json import Json

# Linux and LLVM spell a few features differently; everything is compared in LLVM's spelling.
_LLVM_NAMES = {
    "abm": "lzcnt",
    "pni": "sse3",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "avx_vnni": "avxvnni",
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fullfp16",
}


def this_gpu() -> tuple[str | None, str]:
    """Return the kind of this machine's GPU, "sm_90"; or None, and why there is none."""
    try:
        import torch

        if not torch.cuda.is_available():
            return None, "torch finds no NVIDIA GPU, or was built without CUDA"
        major, minor = torch.cuda.get_device_capability()
    # Whatever the driver's libraries raise where there is no driver or no device.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return None, f"no NVIDIA GPU was found: {reason}"
    return f"sm_{major}{minor}", ""


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts of a machine.

    Attributes:
        system: "Linux".
        machine: of the processor, "x86_64".
        features: of the processor, in LLVM's spelling.
        glibc: (major, minor), or none.
        gpu: gives the kind of its GPU, "sm_90", or none and why; asked only where one is needed.
    """

    system: str
    machine: str
    features: frozenset[str]
    glibc: tuple[int, int] | None
    gpu: Callable[[], tuple[str | None, str]] = this_gpu


def this_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    """Return the facts of the machine that runs this process."""
    facts = os.uname()
    return Machine(facts.sysname, facts.machine, _features(cpuinfo), _glibc())


def why_not(facts: Mapping[str, Json], machine: Machine) -> str | None:
    """Return one sentence why a target cannot run on a machine, or none if it can.

    Args:
        facts: of the target, from the manifest: system, machine, features, glibc, packages, gpu.
        machine: where it should run.
    """
    system, name = facts.get("system", machine.system), facts.get("machine", machine.machine)
    if (system, name) != (machine.system, machine.machine):
        return (
            f"it is for {system} on {name}; this machine is {machine.system} on {machine.machine}"
        )
    wanted = facts.get("features")
    features = {str(f) for f in wanted} if isinstance(wanted, list) else set()
    lacking = sorted(features - machine.features)
    if lacking:
        return f"it needs {', '.join(lacking)}, which this processor does not have"
    floor = facts.get("glibc")
    if isinstance(floor, str) and (machine.glibc is None or machine.glibc < _version(floor)):
        have = "none" if machine.glibc is None else ".".join(map(str, machine.glibc))
        return f"it needs glibc {floor} or newer; this system has {have}"
    packages = facts.get("packages", {})
    for package, version in packages.items() if isinstance(packages, dict) else ():
        reason = _why_not_package(package, str(version), str(facts["kind"]))
        if reason:
            return reason
    wanted_gpu = facts.get("gpu")
    return None if wanted_gpu is None else _why_not_gpu(str(wanted_gpu), machine)


def _why_not_gpu(wanted: str, machine: Machine) -> str | None:
    """A binary runs on its own kind of GPU alone."""
    found, reason = machine.gpu()
    if found is None:
        return reason
    return None if found == wanted else f"it is for {wanted}; this machine's GPU is {found}"


def _why_not_package(package: str, wanted: str, kind: str) -> str | None:
    """Compare as many parts of a version as are wanted, two at most; "" takes any."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {package} is not installed (pip install 'kvant[{kind}]')"
    parts = wanted.split(".")[:2]
    if wanted and found.split(".")[: len(parts)] != parts:
        return f"it was built for {package} {wanted}; installed is {found}"
    return None


def _features(cpuinfo: Path) -> frozenset[str]:
    """Return what the first processor of /proc/cpuinfo can do, in Linux' and LLVM's spelling."""
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = value.split()
            llvm = {_LLVM_NAMES.get(flag, flag.replace("avx512_", "avx512")) for flag in flags}
            return frozenset(flags) | llvm
    return frozenset()


def _glibc() -> tuple[int, int] | None:
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return None
    return _version(text.removeprefix("glibc ")) if text.startswith("glibc ") else None


def _version(text: str) -> tuple[int, int]:
    major, minor = (text.split(".") + ["0"])[:2]
    return int(major), int(minor)
