"""Compile kernels to binaries: python -m kvant.targets.gpu_compile FOLDER.

FOLDER holds kernels.py and job.json; for each kernel a binary is written, <name>.json with its
launch facts and the seconds of a processor that it took, and <name>.s, AMD's assembly. A process
of its own, because Triton decides at import whether it interprets, reads a dozen variables, and a
fault in its native code would end the caller.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "TRITON_DISABLE_LINE_INFO": "1",  # it would put paths into the binaries
    "TRITON_DEFAULT_FP_FUSION": "1",  # the default changes from one version to the next
    # AMD's loads by descriptors: 4 instructions to make one, and no fewer for what it loads.
    "AMDGCN_USE_BUFFER_OPS": "0",
}
WORDS = "/* words */"
"""What assembly begins with that moves bytes within a register; see `gpu_sequences.py`."""
POINTERS_ALIGNED = 16
"""Bytes: what the compiler may believe of every array; the launcher holds to it."""


def main(folder: Path) -> None:
    """Compile every kernel of the job."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    job = json.loads((folder / "job.json").read_text())
    target = GPUTarget(*job["target"])
    module = _import(folder / "kernels.py")
    for name, kernel in job["kernels"].items():
        begin = sum(os.times()[:4])
        signature = kernel["signature"]
        aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
        hints = {(i,): [["tt.divisibility", POINTERS_ALIGNED]] for i in aligned}
        source = ASTSource(getattr(module, name), signature, {}, hints)
        options = {"num_warps": kernel["warps"], "num_stages": 1}
        options["enable_fp_fusion"] = kernel["fusion"]
        if kernel["registers"] is not None and target.backend == "cuda":
            options["maxnreg"] = kernel["registers"]
        made = triton.compile(source, target=target, options=options)
        check_words(made.asm["ttgir"])
        binary = made.asm["cubin" if target.backend == "cuda" else "hsaco"]
        facts = {
            "entry": made.metadata.name,
            "shared": made.metadata.shared,
            "warps": made.metadata.num_warps,
            "scratch": made.metadata.global_scratch_size + made.metadata.profile_scratch_size,
            "seconds": sum(os.times()[:4]) - begin,
        }
        (folder / f"{name}.bin").write_bytes(binary)
        (folder / f"{name}.s").write_text(made.asm.get("amdgcn", ""))
        (folder / f"{name}.json").write_text(json.dumps(facts))


def check_words(text: str) -> None:
    """Raise ValueError where assembly marked WORDS has no four neighbours in its registers.

    A register has the elements that a thread holds one after the other: neighbours of a row where
    they are an operand of a product of bytes. Elsewhere they may belong to several rows.

    Args:
        text: of a kernel, in Triton's last form that has layouts.
    """
    for line in text.splitlines():
        if WORDS in line and "kWidth = 4" not in line.split("->")[-1]:
            raise ValueError(f"a table's codes are not an operand: {line.split('->')[-1]}")


def _import(path: Path) -> Any:
    """Import the kernels from their file: Triton reads their source there."""
    spec = importlib.util.spec_from_file_location("kernels", path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update(ENVIRONMENT)
    main(Path(sys.argv[1]))
