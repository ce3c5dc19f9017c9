"""The kernels of the target cuda on a GPU, compiled where there is none.

    python bench/gpu.py --build sm_90   # anywhere: an artifact for every recipe, in build/gpu
    python bench/gpu.py --check         # on the GPU: loads them and verifies every kernel
    python bench/gpu.py --bench         # on the GPU: the same, then times; under nine minutes
    python bench/gpu.py --render        # docs/gpu-bench.md again from its data

To check, a machine needs torch, numpy, safetensors, cuda-core with cuda-bindings, and this tree
with build/gpu; it needs no compiler. Only binaries for its own kind of GPU are loaded. What is
timed is compared with torch, and with FlashAttention, FlashInfer and Triton where they are there.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import gpu_bench
import gpu_render
from gpu_measure import Budget, open_clock

import kvant
from kvant.runtime.machine import this_gpu

FOLDER = Path(__file__).resolve().parent.parent / "build" / "gpu"
CHECK_SHARE = 0.35
"""Of the time of --bench, for the kernels' comparison with the reference."""
SHAPES = {"8x2x64": (8, 2, 64), "32x8x128": (32, 8, 128), "4x1x256": (4, 1, 256)}


def build(folder: Path, gpus: list[str]) -> None:
    """Compile every recipe that needs no model, for every shape."""
    from kvant.compiler import recipe as recipes

    folder.mkdir(parents=True, exist_ok=True)
    for name in recipes.names():
        for label, (heads, kv_heads, width) in SHAPES.items():
            out = folder / f"{name}-{label}.kvant"
            shape = kvant.Shape(heads=heads, kv_heads=kv_heads, head_dim=width)
            try:
                kvant.compile(shape, name, [f"cuda:{gpu}" for gpu in gpus], out=out)
            except kvant.KvantError as error:
                print(f"{out.name}: not built: {error.what}")
                continue
            print(f"{out.name}: built for {', '.join(gpus)}")


def check(folder: Path, budget: Budget | None = None) -> dict[str, int]:
    """Verify every artifact of a folder on this machine's GPU, those that are timed first.

    Args:
        folder: of the artifacts.
        budget: of a whole run, of which this may take CHECK_SHARE; None for as long as it takes.

    Returns: how many were found, agree, and failed; the others were left out.
    """
    paths = list(gpu_bench.artifacts(folder))
    found = {"found": len(paths), "agree": 0, "failed": 0}
    for path in paths:
        if budget is not None and budget.left < (1 - CHECK_SHARE) * budget.seconds:
            break
        # A process each: after an illegal access a process can use the GPU no more.
        command = [*(sys.executable, "-m", "kvant.runtime", "verify"), str(path), "-t", "cuda"]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True)
        if done.returncode:
            found["failed"] += 1
            print(f"{path.name}: FAILED\n{done.stderr.strip()[-2000:]}")
            continue
        result = json.loads(done.stdout)
        shares = f"stored {result['stored_share']:.2f}, computed {result['computed_share']:.2f}"
        print(f"{path.name}: {result['cases']} cases on {result['target']}, {shares} of the bound")
        found["agree"] += 1
    print(f"{found['agree']} of {found['found']} artifacts agree with the reference")
    return found


def bench(folder: Path) -> int:
    """Check, then time, and write data and page; return how many artifacts fail."""
    budget = Budget(gpu_bench.SECONDS)
    checked = check(folder, budget)
    if checked["agree"]:
        data = gpu_bench.run(folder, checked, budget, open_clock())
        print(gpu_render.page(data))
    return checked["failed"] if checked["agree"] else 1


def main() -> None:
    """Build, check, time or render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--build", nargs="+", metavar="GPU", help="compile, for sm_80, sm_90, ...")
    what.add_argument("--check", action="store_true", help="verify on this machine's GPU")
    what.add_argument("--bench", action="store_true", help="verify, then time, beside others")
    what.add_argument("--render", action="store_true", help="the page again from its data")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the artifacts are")
    options = parser.parse_args()
    if options.build:
        build(options.folder, options.build)
        return
    if options.render:
        gpu_bench.write(json.loads(gpu_bench.DATA.read_text()))
        return
    gpu, reason = this_gpu()
    if gpu is None:
        sys.exit(reason)
    if options.bench:
        sys.exit(bench(options.folder))
    found = check(options.folder)
    sys.exit(found["failed"] if found["found"] else 1)


if __name__ == "__main__":
    main()
