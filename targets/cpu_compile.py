"""From text to a shared library: TVM makes an object file, the C compiler links it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ..ir.errors import KvantError
from .cpu_text import Kernel
from .source import Source

# The only symbol of TVM that a library may need: it lives in tvm-ffi.
ALLOWED = {"TVMFFIErrorSetRaisedFromCStrParts"}


def object_file(source: Source[Kernel], isa: str) -> bytes:
    """Compile the text to an object file."""
    import tvm
    from tvm.script import from_source
    from tvm.script import tirx as script
    from tvm.tirx.build import tir_to_runtime

    target = tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": isa})
    known = tvm.get_global_func("target.llvm_get_cpu_archlist")(target)
    # NOTE: LLVM compiles for a generic processor, without an error, when it does not know the name.
    if isa not in list(known):
        raise _failed(f"LLVM does not know the processor {isa}")
    functions = {
        kernel.name: from_source(kernel.source(), {"T": script}) for kernel in source.kernels
    }
    module = tir_to_runtime(_lower(tvm.IRModule(functions), target), {}, target)
    with tempfile.TemporaryDirectory(prefix="kvant-") as folder:
        path = Path(folder) / "kernels.o"
        module.write_to_file(str(path), "o")
        return path.read_bytes()


def _lower(module: Any, target: Any) -> Any:
    """Run the passes of TVM that these kernels need.

    The default pipeline takes twice as long; and it narrows 64-bit offsets, shrinks buffers by what
    it believes of data-dependent indices, and turns selects into branches. None of that is wanted.
    """
    import tvm
    from tvm.s_tir import transform as blocks
    from tvm.tirx import transform as tirx

    passes = [
        tirx.BindTarget(target.with_host(target)),
        blocks.LowerInitBlock(),
        blocks.PlanAndUpdateBufferAllocationLocation(),
        blocks.ConvertBlocksToOpaque(),
        blocks.LowerOpaqueBlock(),
        tirx.FlattenBuffer(),
        tirx.VectorizeLoop(True),
        tirx.StorageRewrite(),
        tirx.UnrollLoop(),
        tirx.StmtSimplify(),
        tirx.VerifyMemory(),
        tirx.AnnotateEntryFunc(),
        tirx.SplitHostDevice(),
        tirx.MakePackedAPI(),
        tirx.LowerTVMBuiltin(),
        tirx.LowerIntrin(),
    ]
    return tvm.transform.Sequential(passes)(module)


def link(compiled: bytes) -> bytes:
    """Link an object file and the thread pool; the result depends on nothing but its inputs."""
    cc = shutil.which("cc")
    if cc is None:
        raise KvantError(
            "no-c-compiler",
            "no C compiler `cc` was found",
            where="target cpu",
            fix="install gcc or clang; it links the kernels and builds the thread pool",
        )
    with tempfile.TemporaryDirectory(prefix="kvant-") as folder:
        place = Path(folder)
        (place / "kernels.o").write_bytes(compiled)
        (place / "exports").write_text("{ global: __tvm_ffi_*; local: *; };\n")
        shutil.copyfile(Path(__file__).with_name("pool.c"), place / "pool.c")
        flags = ["-shared", "-fPIC", "-O2", "-s", "-pthread", "-g0", "-fno-ident"]
        # nodelete: worker threads live in this code, so it must never be unloaded.
        link = ["--build-id=none", "--version-script=exports", "-z,nodelete", "-z,relro", "-z,now"]
        command = [cc, *flags, *(f"-Wl,{flag}" for flag in link), "-o", "kernels.so", "kernels.o"]
        done = subprocess.run([*command, "pool.c"], cwd=place, capture_output=True, text=True)
        if done.returncode:
            raise _failed(done.stderr.strip()[-600:])
        library = (place / "kernels.so").read_bytes()
    foreign = {name.decode() for name in re.findall(rb"\x00(_*TVM\w+)(?=\x00)", library)} - ALLOWED
    if foreign:
        raise _failed(
            f"the library needs {', '.join(sorted(foreign))}, which tvm-ffi does not have"
        )
    return library


def _failed(what: str) -> KvantError:
    return KvantError(
        "compiler-failed",
        what,
        where="target cpu",
        fix="this is a bug in kvant or in the installed compilers; please report it",
    )
