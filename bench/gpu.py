"""The kernels of the target cuda on a GPU, compiled where there is none.

    python bench/gpu.py --build sm_90   # anywhere: an artifact for every recipe, in build/gpu
    python bench/gpu.py --check         # on the GPU: loads them and verifies every kernel

To check, a machine needs torch, numpy, safetensors, cuda-core with cuda-bindings, and this tree
with build/gpu; it needs no compiler. Only binaries for its own kind of GPU are loaded.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import kvant
from kvant.runtime.machine import this_gpu

FOLDER = Path(__file__).resolve().parent.parent / "build" / "gpu"
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


def check(folder: Path) -> int:
    """Verify every artifact of a folder on this machine's GPU; return how many failed."""
    gpu, reason = this_gpu()
    if gpu is None:
        print(reason)
        return 1
    found = sorted(folder.glob("*.kvant"))
    failed = 0
    for path in found:
        # A process each: after an illegal access a process can use the GPU no more.
        command = [
            sys.executable,
            "-m",
            "kvant.runtime",
            "verify",
            str(path),
            "-t",
            "cuda",
            "--json",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            failed += 1
            print(f"{path.name}: FAILED\n{done.stderr.strip()[-2000:]}")
            continue
        result = json.loads(done.stdout)
        shares = f"stored {result['stored_share']:.2f}, computed {result['computed_share']:.2f}"
        print(f"{path.name}: {result['cases']} cases on {result['target']}, {shares} of the bound")
    print(f"{len(found) - failed} of {len(found)} artifacts agree with the reference on {gpu}")
    return failed if found else 1


def main() -> None:
    """Build or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--build", nargs="+", metavar="GPU", help="compile, for sm_80, sm_90, ...")
    what.add_argument("--check", action="store_true", help="verify on this machine's GPU")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the artifacts are")
    options = parser.parse_args()
    if options.build:
        build(options.folder, options.build)
        return
    sys.exit(check(options.folder))


if __name__ == "__main__":
    main()
