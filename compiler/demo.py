"""`make demo`: a real model from weights to text through a packed cache, in one table."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from ..ir.errors import KvantError
from . import recipe as recipes
from .bind import find_packaged_smollm2, open_model
from .cli import QUIET
from .driver import compile
from .facts import facts_of
from .generation import generate
from .quality import Quality, evaluate
from .report import write_report
from .tables import artifact_rows, quality_rows, table, working
from .texts import demo_text

PROMPT = "Once upon a time, in a small village by the sea, there lived a clockmaker who"
FOLDER = Path("demo")


def main() -> None:
    """Compile SmolLM2-135M for this CPU, verify, evaluate, generate, report."""
    from ..runtime.verify import verify

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    recipe = sys.argv[1] if len(sys.argv) > 1 else recipes.DEFAULT
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    begin = time.perf_counter()
    with working(as_json=False) as say:
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
    table(f"SmolLM2-135M, {artifact.recipe}, this CPU", rows)
    console = Console(highlight=False)
    console.print(f"[dim]{escape(PROMPT)}[/]{escape(generated['text'])}\n")
    print(f"report: {report}")  # noqa: T201


def _rows(
    artifact: Any, quality: Quality, generated: dict[str, Any], compiled: float
) -> list[tuple[str, str]]:
    """Return what the demo found: the artifact's own facts first, then what was measured."""
    facts = artifact_rows(facts_of(artifact))
    # Bits and bytes come from the evaluation: they are of the cache that was measured.
    measured = quality_rows(
        quality.to_json() | {"cache_bytes_full": artifact.full_bytes_per_token()}
    )
    made = {
        "tokens per second": f"{generated['tokens_per_second']:.1f}",
        "compile": f"{compiled:.0f} s, artifact of {facts['size']}",
    }
    return [*measured.items(), ("smaller than bf16", facts["smaller than bf16"]), *made.items()]


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


if __name__ == "__main__":
    try:
        main()
    except KvantError as error:
        sys.exit(f"kvant: {error}")
