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
from .bind import open_model
from .cli import QUIET
from .driver import compile
from .extras import find_packaged_smollm2
from .facts import facts_of
from .generation import generate
from .quality import Quality, evaluate
from .report import write_report
from .statistics import interval
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
    facts = facts_of(artifact)
    rows = _rows(artifact, facts, quality, generated, compiled)
    report = _report(facts, quality, generated, rows)
    table(f"SmolLM2-135M, {artifact.recipe}, this CPU", rows)
    console = Console(highlight=False)
    console.print(f"[dim]{escape(PROMPT)}[/]{escape(generated['text'])}\n")
    print(f"report: {report}")  # noqa: T201


def _rows(
    artifact: Any,
    found: dict[str, Any],
    quality: Quality,
    generated: dict[str, Any],
    compiled: float,
) -> list[tuple[str, str]]:
    """Return what the demo found: the artifact's own facts first, then what was measured."""
    facts = artifact_rows(found)
    # Bits and bytes come from the evaluation: they are of the cache that was measured.
    measured = quality_rows(
        quality.to_json() | {"cache_bytes_full": artifact.full_bytes_per_token()}
    )
    made = {
        "tokens per second": f"{generated['tokens_per_second']:.1f}",
        "compile": f"{compiled:.0f} s, artifact of {facts['size']}",
    }
    return [*measured.items(), ("smaller than bf16", facts["smaller than bf16"]), *made.items()]


def judged(quality: Quality) -> str:
    """Return one sentence that judges an evaluation from its numbers.

    The noise is half the 95 % interval of the mean difference of the two losses: what another text
    of the same length may move the result by.
    """
    moved = quality.nll_kvant - quality.nll_full
    low, high = interval(moved)
    mean, noise = float(moved.mean()), (high - low) / 2
    within = "within" if abs(mean) <= noise else "outside"
    return (
        f"Perplexity moved by {np.expm1(mean):+.2%}, which is {within} the noise of "
        f"{np.expm1(noise):.2%} (half the 95 % interval over {len(moved):,} tokens), and both "
        f"models prefer the same next token at {quality.agrees.mean():.1%} of the positions."
    )


def _report(
    facts: dict[str, Any],
    quality: Quality,
    generated: dict[str, Any],
    rows: list[tuple[str, str]],
) -> Path:
    positions = np.arange(len(quality.kl)) + quality.prompt
    loss = np.stack([positions, quality.nll_kvant - quality.nll_full])
    return write_report(
        FOLDER / "report.html",
        f"SmolLM2-135M with {facts['recipe']}",
        {"In short": rows, "Artifact": list(artifact_rows(facts).items())},
        {
            "KL by position": ("position", "KL, nats", np.stack([positions, quality.kl])),
            "Loss of the quantized model minus the other": ("position", "nats", loss),
        },
        lead=judged(quality),
        notes={
            "Artifact": f"Bits and bytes of the artifact are computed for a cache of "
            f"{facts['context']:,} tokens; those measured above are of a cache of "
            f"{quality.summary['context']:,}. Raw tokens weigh more in a shorter cache."
        },
        texts={"Generated": (PROMPT, generated["text"])},
    )


if __name__ == "__main__":
    try:
        main()
    except KvantError as error:
        sys.exit(f"kvant: {error}")
