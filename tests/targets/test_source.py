"""The emitted source: a person reads the difference, and no compiler is needed to make it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvant.targets.cpu import emit
from kvant.targets.cpu_rows import blocks, row_stride, split_tokens
from kvant.targets.gpu import emit as emit_gpu
from kvant.targets.machines import CPUS

from .cpu_cases import PLANS

GOLDEN_CPU = CPUS["x86-64-v3"]
GOLDEN = Path(__file__).parent.parent / "golden"
CPU_CASES = (
    "int4-token-int.attend",
    "int4-token.encode_v",
    "kivi-2bit.attend",
    "lut3-int.encode_k",
    "maps.append_k",
    "raw.combine",  # with learned sinks
    "dense-sparse.attend",
    "dense-sparse.encode_v",
    "split-2bit.attend",
    "split-2bit.encode_k",
)
GPU_CASES = (
    "dense-sparse.append",
    "dense-sparse.attend",
    "int4-token-int.attend",  # whole tiles
    "int4-token-int.attend_block",
    "int4-token-int.unpack",
    "int4-token.append",
    "kivi-2bit.attend",
    "maps.append",
    "raw.combine",
)
TARGETS = [("cpu", case) for case in CPU_CASES] + [("gpu", case) for case in GPU_CASES]


@pytest.mark.parametrize(("target", "case"), TARGETS)
def test_golden(target: str, case: str) -> None:
    """KVANT_UPDATE_GOLDEN=1 renews the files; the diff is for a person."""
    of, _, name = case.partition(".")
    plan = PLANS[of]
    kernels = emit(plan, GOLDEN_CPU).kernels if target == "cpu" else emit_gpu(plan).kernels
    source = next(k for k in kernels if k.name == name).source()
    path = GOLDEN / target / f"{case}.{'tvmscript' if target == 'cpu' else 'triton'}"
    if os.environ.get("KVANT_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert source == path.read_text()


def test_emitting_imports_no_compiler() -> None:
    code = (
        "import sys\n"
        "from kvant.targets import TARGETS\n"
        "print(sorted({'tvm', 'torch', 'triton', 'tvm_ffi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("count", range(1, 40))
@pytest.mark.parametrize("most", [4, 8])
def test_blocks_cover_all_rows_once(count: int, most: int) -> None:
    rows = [row for first, size in blocks(count, most) for row in range(first, first + size)]
    assert rows == list(range(count))
    assert max(size for _, size in blocks(count, most)) <= most


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_splits_are_whole_pages_and_fit_the_scratch(plan: object) -> None:
    assert split_tokens(plan) % plan.k.page_tokens == 0  # type: ignore[attr-defined,arg-type]
    most = split_tokens(plan) + plan.k.tokens.sink  # type: ignore[attr-defined,arg-type]
    assert row_stride(plan) >= most + 15  # type: ignore[arg-type]
