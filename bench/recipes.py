"""Every recipe on SmolLM2-135M: bits, quality, speed. Writes docs/results.md.

    python bench/recipes.py
    python bench/recipes.py mine.toml other.toml     prints their rows and writes nothing

The text is prose from Python's own documentation; nothing is calibrated on it.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import kvant
from kvant.compiler import recipe as recipes
from kvant.compiler.benchmark import bench_shape
from kvant.compiler.bind import open_model
from kvant.compiler.quality import evaluate
from kvant.compiler.texts import demo_text
from kvant.targets.cpu import this_cpu

SHAPE = kvant.Shape(heads=32, kv_heads=8, head_dim=128)
OUT = Path(__file__).resolve().parent.parent / "docs" / "results.md"
HEAD = """# Every recipe on one page

Made by `python bench/recipes.py`. SmolLM2-135M, 1,024 tokens of prompt, then 512 scored in blocks
of 64 that read the packed cache; {full:.3f} is the perplexity of the unquantized model on the same
tokens. Bits are those of a whole cache of 4,096 tokens: codes, scales, raw tail, page table. The
last column is one layer of 32x8x128 at context 4,096, one thread, interleaved: time of the best of
torch's SDPA (fp32 and bf16, group by flag and folded) over ours, with the kernels for `{cpu}`.

| recipe | bits per element | bf16 is larger by | perplexity | KL (95 % interval) \
| same first choice | faster than torch by |
|---|---|---|---|---|---|---|
"""


def measure(source: Any, name: str) -> tuple[dict[str, Any], str]:
    """Return the quality of a recipe, and its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = kvant.compile(source, name, ["cpu"], out=Path(folder) / "model.kvant")
        bits = artifact.show()["bits_per_element"]
        q = evaluate(artifact, source, demo_text(), tokens=512).to_json()
    interval = f"{q['kl_mean']:.4f} ({q['kl_mean_low']:.4f} to {q['kl_mean_high']:.4f})"
    cells = (f"`{name}`", f"{bits:.2f}", f"{16 / bits:.1f}x", f"{q['perplexity']:.3f}", interval)
    return q, "| " + " | ".join((*cells, f"{q['top1']:.1%}", speed(name))) + " |"


def speed(name: str) -> str:
    """Return how much faster than torch's best a layer of SHAPE is under a recipe."""
    try:
        (timing,) = bench_shape(SHAPE, name, "cpu", [4096], [1], threads=1)
    except kvant.KvantError as error:
        if error.code not in ("needs-a-model", "needs-weights"):
            raise
        return "needs a model"
    return f"{min(timing['peers'].values()) / timing['ms']:.1f}x"


def main(chosen: list[str]) -> None:
    """Measure recipes; of all of ours, write the page."""
    source = open_model("smollm2")
    rows, full = [], 0.0
    for name in chosen or recipes.names():
        quality, row = measure(source, name)
        full = quality["perplexity_full"]
        print(row, flush=True)
        rows.append(row)
    if not chosen:
        OUT.write_text(
            HEAD.format(full=full, cpu=this_cpu().name) + "\n".join(rows) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
