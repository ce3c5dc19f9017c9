"""From an object file to a shared library: the C compiler links it with the thread pool.

This machine's `cc` links for this kind of machine, zig (from PyPI, as ziglang) for any other. There
is no system library of macOS to link with outside of macOS, so for it nothing is linked.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..ir.errors import KvantError
from .cpu_compile import failed
from .machines import Cpu

# The only symbol of TVM that a library may need: it lives in tvm-ffi.
ALLOWED = {"TVMFFIErrorSetRaisedFromCStrParts"}
# The glibc whose symbols zig links with; that of the oldest wheels of apache-tvm-ffi.
GLIBC = "2.28"
NO_CC = "no C compiler `cc` was found: install gcc or clang"
NO_ZIG = "needs zig, which is not installed: pip install 'kvant[cross]'"


def linked(cpu: Cpu) -> bool:
    """Return whether code for a processor becomes a shared library."""
    return cpu.system == "Linux"


def native(cpu: Cpu) -> bool:
    """Return whether this is the kind of machine that the processor is in."""
    here = os.uname()
    return (cpu.system, cpu.machine) == (here.sysname, here.machine)


def missing(cpu: Cpu) -> str | None:
    """Return what linking for a processor lacks here, "what: what to do", or None."""
    if not linked(cpu):
        return None
    if native(cpu):
        return None if shutil.which("cc") else NO_CC
    if importlib.util.find_spec("ziglang") is None:
        return f"linking for {cpu.system} on {cpu.machine} {NO_ZIG}"
    return None


def link(compiled: bytes, cpu: Cpu) -> bytes:
    """Link an object file and the thread pool; the result depends on nothing but its inputs.

    Raises: KvantError "no-c-compiler", "compiler-failed".
    """
    with tempfile.TemporaryDirectory(prefix="kvant-") as folder:
        place = Path(folder)
        (place / "kernels.o").write_bytes(compiled)
        (place / "exports").write_text("{ global: __tvm_ffi_*; local: *; };\n")
        shutil.copyfile(Path(__file__).with_name("pool.c"), place / "pool.c")
        flags = ["-shared", "-fPIC", "-O2", "-s", "-pthread", "-g0", "-fno-ident"]
        # nodelete: worker threads live in this code, so it must never be unloaded.
        link = ["--build-id=none", "--version-script=exports", "-z,nodelete", "-z,relro", "-z,now"]
        command = [*_compiler(cpu), *flags, *(f"-Wl,{flag}" for flag in link)]
        command += ["-o", "kernels.so", "kernels.o", "pool.c"]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        if done.returncode:
            raise failed(done.stderr.strip()[-600:])
        library = (place / "kernels.so").read_bytes()
    foreign = {name.decode() for name in re.findall(rb"\x00(_*TVM\w+)(?=\x00)", library)} - ALLOWED
    if foreign:
        raise failed(f"the library needs {', '.join(sorted(foreign))}, which tvm-ffi does not have")
    return library


def _compiler(cpu: Cpu) -> list[str]:
    """Return the command that compiles and links C for the machine of a processor."""
    reason = missing(cpu)
    if reason is not None:
        what, _, fix = reason.partition(": ")
        raise KvantError("no-c-compiler", what, where=f"target cpu:{cpu.name}", fix=fix)
    if native(cpu):
        return ["cc"]
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{cpu.triple}.{GLIBC}"]
