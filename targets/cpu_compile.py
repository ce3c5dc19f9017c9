"""From text to machine code: TVM and LLVM make an object file, and the same as assembly."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ir.errors import KvantError
from .cpu_parse import parse
from .cpu_text import Kernel
from .machines import Cpu
from .source import Source

# Functions of libraries that LLVM calls where a processor lacks an instruction. Neither libc nor
# tvm-ffi has them, so a library that needs one would not load.
LIBRARY_CALLS = re.compile(
    rb"\0_?((?:fma|exp2?|log2?|rint|nearbyint|round(?:even)?|floor|ceil|trunc|sqrt|pow|tanh|fmod)f?"
    rb"|__\w+[hsdtx][fi]\d?)(?=\0)"
)
# TVM writes these two itself, for processors that cannot convert halves.
WRITTEN = {"__extendhfsf2", "__truncsfhf2"}


@dataclass(frozen=True, slots=True)
class Code:
    """What LLVM made of kernels: an object file, and its assembly where that was asked for."""

    object: bytes
    assembly: str


def compile_source(source: Source[Kernel], cpu: Cpu, *, with_assembly: bool = False) -> Code:
    """Compile the text for a processor.

    Args:
        source: the text.
        cpu: the processor.
        with_assembly: whether to write assembly too; LLVM needs a fifth longer then.

    Raises: KvantError "compiler-failed" if LLVM does not know the processor, made code for another
        one, or code that calls a function which no library has.
    """
    module = _module(source, cpu)
    made = _object(module)
    _check_calls(made, cpu)
    return Code(made, str(module.inspect_source("asm")) if with_assembly else "")


def assembly(source: Source[Kernel], cpu: Cpu) -> str:
    """Return the assembly of all kernels, as LLVM writes it; nothing is made of it.

    Raises: KvantError "compiler-failed" if LLVM does not know the processor or made code for
        another one.
    """
    return str(_module(source, cpu).inspect_source("asm"))


def _module(source: Source[Kernel], cpu: Cpu) -> Any:
    """Return LLVM's module of the text, for that very processor."""
    import tvm
    from tvm.s_tir.analysis import verify_well_formed
    from tvm.tirx.build import tir_to_runtime

    target = tvm.target.Target({"kind": "llvm", "mtriple": cpu.triple, "mcpu": cpu.mcpu})
    known = tvm.get_global_func("target.llvm_get_cpu_archlist")(target)
    # NOTE: LLVM compiles for a generic processor, without an error, when it does not know the name.
    if cpu.mcpu not in list(known):
        raise failed(f"LLVM does not know the processor {cpu.mcpu}")
    functions = tvm.IRModule({kernel.name: parse(kernel.source()) for kernel in source.kernels})
    verify_well_formed(functions)
    module = tir_to_runtime(_lower(functions, target), {}, target)
    _check_processor(str(module.inspect_source("ll")), cpu)
    return module


def _object(module: Any) -> bytes:
    with tempfile.TemporaryDirectory(prefix="kvant-") as folder:
        path = Path(folder) / "kernels.o"
        module.write_to_file(str(path), "o")
        return path.read_bytes()


def _check_processor(intermediate: str, cpu: Cpu) -> None:
    """Refuse code for another processor."""
    told = set(re.findall(r'"target-cpu"="([^"]*)"', intermediate))
    if told != {cpu.mcpu}:
        raise failed(f"LLVM made code for {', '.join(sorted(told)) or 'any'}, not for {cpu.mcpu}")


def _check_calls(made: bytes, cpu: Cpu) -> None:
    """Refuse code that calls what is in no library."""
    foreign = {name.decode() for name in LIBRARY_CALLS.findall(made)} - WRITTEN
    if foreign:
        raise failed(
            f"the code for {cpu.name} calls {', '.join(sorted(foreign))}, which is in no library"
        )


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


def failed(what: str) -> KvantError:
    """Return the error of a compiler that did not do what it should."""
    return KvantError(
        "compiler-failed",
        what,
        where="target cpu",
        fix="this is a bug in kvant or in the installed compilers; please report it",
    )
