"""`make demo`: a real model from weights to text through a packed cache, in one table."""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..ir.errors import KvantError
from . import recipe as recipes
from .bind import find_packaged_smollm2, open_model
from .driver import compile
from .generation import generate
from .quality import Quality, evaluate
from .report import write_report
from .texts import demo_text

PROMPT = "Once upon a time, in a small village by the sea, there lived a clockmaker who"
FOLDER = Path("demo")


def main() -> None:
    """Compile SmolLM2-135M for this CPU, verify, evaluate, generate, report."""
    from ..runtime.verify import verify

    console = Console()
    recipe = sys.argv[1] if len(sys.argv) > 1 else recipes.DEFAULT
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    begin = time.perf_counter()
    with console.status("") as status:

        def say(stage: str) -> None:
            status.update(f"[{time.perf_counter() - begin:4.0f} s] {stage} ...")

        say("reading the model")
        source = open_model(find_packaged_smollm2())
        artifact = compile(source, recipe, ["cpu"], out=FOLDER / "smollm2.kvant", progress=say)
        compiled = time.perf_counter() - begin
        say("verifying every kernel against the reference")
        verify(artifact.path)
        say("evaluating 1,024 + 512 tokens, quantized and not")
        quality = evaluate(artifact, source, demo_text(), tokens=512)
        say("generating 120 tokens")
        generated = generate(artifact, source, PROMPT, 120)
    rows = _rows(artifact, quality, generated, compiled)
    report = _report(artifact, quality, generated, rows)
    _print(console, artifact.recipe, rows, generated["text"], report)


def _rows(
    artifact: Any, quality: Quality, generated: dict[str, Any], compiled: float
) -> list[tuple[str, str]]:
    q = quality.to_json()
    full = artifact.full_bytes_per_token()
    packed = q["cache_bytes_per_token"]
    size = sum(f.stat().st_size for f in Path(artifact.path).rglob("*") if f.is_file())
    return [
        ("bits per element", f"{q['bits_per_element']:.2f}  (bf16: 16)"),
        (
            "cache bytes per token",
            f"{packed:,.0f}  (bf16: {full:,.0f}, {full / packed:.1f} times more)",
        ),
        ("tokens per GB of cache", f"{1e9 / packed:,.0f}  (bf16: {1e9 / full:,.0f})"),
        ("perplexity", f"{q['perplexity']:.3f}  (unquantized: {q['perplexity_full']:.3f})"),
        (
            "KL(unquantized || quantized)",
            f"{q['kl_mean']:.4f}  ({q['kl_mean_low']:.4f} to {q['kl_mean_high']:.4f}; "
            f"p99 {q['kl_p99']:.3f}; noise floor {q['kl_noise_floor']:.4f})",
        ),
        ("same first choice", f"{q['top1']:.1%}"),
        ("read in packed form", f"{q['packed_share']:.0%} of the history"),
        ("tokens per second", f"{generated['tokens_per_second']:.1f}"),
        ("compile", f"{compiled:.0f} s, artifact of {size / 1e6:.2f} MB"),
    ]


def _report(
    artifact: Any, quality: Quality, generated: dict[str, Any], rows: list[tuple[str, str]]
) -> Path:
    positions = np.arange(len(quality.kl)) + quality.prompt
    loss = np.stack([positions, quality.nll_kvant - quality.nll_full])
    return write_report(
        FOLDER / "report.html",
        f"SmolLM2-135M with {artifact.recipe}",
        {
            "In short": rows,
            "Artifact": [(k, str(v)) for k, v in artifact.show().items() if k != "kernels"],
            "Generated": [(PROMPT, generated["text"])],
        },
        {
            "KL by position": ("position", "KL, nats", np.stack([positions, quality.kl])),
            "Loss of the quantized model minus the other": ("position", "nats", loss),
        },
    )


def _print(
    console: Console, recipe: str, rows: list[tuple[str, str]], text: str, report: Path
) -> None:
    table = Table(
        title=f"SmolLM2-135M, {recipe}, this CPU", title_justify="left", show_header=False
    )
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    console.print(f"[dim]{PROMPT}[/]{text}\n", highlight=False)
    console.print(f"report: {report}")


if __name__ == "__main__":
    try:
        main()
    except KvantError as error:
        sys.exit(f"kvant: {error}")
