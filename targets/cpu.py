"""The target cpu: plan -> TVMScript text -> one shared library.

The library holds at most eight kernels and the thread pool (pool.c). It needs libc and the error
function of tvm-ffi, nothing else; identical plans give identical bytes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan
from .cpu_append import append
from .cpu_attend import attend, attend_block
from .cpu_encode import encode
from .cpu_prepare import combine, prepare
from .cpu_regions import TILE_QUERIES, split_tokens
from .cpu_text import Kernel
from .kernel_text import KERNELS, kernels_text
from .target import Build, Stage, Target

ISA = "x86-64-v3"
# In Linux' spelling (/proc/cpuinfo), what the instructions of an ISA level need beyond x86-64.
FEATURES = {ISA: ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "ssse3")}
TVM_FFI = "0.1.15"
MOST_GROUP = 64
# The only symbol of TVM that a library may need: it lives in tvm-ffi.
ALLOWED = {"TVMFFIErrorSetRaisedFromCStrParts"}


@dataclass(frozen=True, slots=True)
class Source:
    """The emitted kernels of a plan, in the order of KERNELS."""

    plan: AttentionPlan
    kernels: tuple[Kernel, ...]

    def text(self) -> str:
        """Return kernels.py."""
        head = '"""Kernels of one attention plan in TVMScript, written by kvant."""\n\n'
        head += "from tvm.script import tirx as T\n"
        return kernels_text(head, {kernel.name: kernel.source() for kernel in self.kernels})


def emit(plan: AttentionPlan) -> Source:
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
    return Source(plan, kernels)


def compile_cpu(plan: AttentionPlan, isa: str = ISA) -> dict[str, bytes]:
    """Return kernels.so, kernels.py and launch.json of a plan.

    Args:
        plan: one that `why_not` accepts.
        isa: a key of FEATURES.

    Raises: KvantError "unknown-isa", "no-c-compiler", "compiler-failed".
    """
    if isa not in FEATURES:
        raise KvantError(
            "unknown-isa", f"no ISA {isa!r}", where="target cpu", fix=f"use: {', '.join(FEATURES)}"
        )
    source = emit(plan)
    library = _link(_object(source, isa))
    launch = {
        "facts": _facts(library, isa),
        "kernels": {kernel.name: kernel.arguments() for kernel in source.kernels},
        "split_tokens": split_tokens(plan),
        "tile_queries": TILE_QUERIES,
    }
    text = json.dumps(launch, indent=1, sort_keys=True) + "\n"
    return {
        "kernels.so": library,
        "kernels.py": source.text().encode(),
        "launch.json": text.encode(),
    }


def why_not(plan: AttentionPlan) -> str | None:
    """Return one sentence why a plan cannot be built, or None."""
    if plan.group > MOST_GROUP:
        return f"{plan.group} query heads share a KV head; at most {MOST_GROUP} are supported"
    try:
        plan.k.page_layout()
        plan.v.page_layout()
    except KvantError as error:
        return f"{error.what}: {error.fix}"
    return None


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


def _object(source: Source, isa: str) -> bytes:
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


def _link(compiled: bytes) -> bytes:
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


def _binary(source: Source) -> Build:
    files = compile_cpu(source.plan)
    return Build(f"cpu-{ISA}", json.loads(files["launch.json"])["facts"], files)


CPU = Target(
    name=f"cpu:{ISA}",
    summary="x86-64 with AVX2 and FMA, by TVM; `cpu` is this machine",
    supports=why_not,
    available=available,
    stages=(Stage("source", emit), Stage("binary", _binary)),
)
