"""The commands: kvant compile | show | eval | run | bench | verify."""

import difflib
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..ir.errors import KvantError
from .tables import (
    artifact_rows,
    bench_tables,
    print_json,
    quality_rows,
    table,
    target_rows,
    values,
    verify_rows,
    working,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compile a model's attention and KV cache to quantized kernels, ahead of time.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name or .toml file.")]
TargetsOption = Annotated[
    list[str], typer.Option("--target", "-t", help="cpu, reference, ...; may be given twice.")
]
TargetOption = Annotated[
    str, typer.Option("--target", "-t", help="auto, cpu, reference, or a target's full name.")
]
Artifact = Annotated[str, typer.Argument(help="A folder made by `kvant compile`.")]
ModelOption = Annotated[str, typer.Option(help="The model that was compiled.")]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KvantError(
            "text-unreadable",
            f"the text cannot be read: {type(error).__name__}",
            where=path,
            fix="give a readable UTF-8 text file",
        ) from None


@app.command("compile")
def compile_(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or a .gguf file.")],
    recipe: RecipeOption = "kivi-4bit",
    target: TargetsOption = ["cpu"],  # noqa: B006
    output: Annotated[str | None, typer.Option("--out", "-o", help="Folder to create.")] = None,
    text: Annotated[str | None, typer.Option(help="File with calibration text.")] = None,
    dump_ir: Annotated[
        str | None, typer.Option(help="Folder for the graph after each pass.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a model into an artifact."""
    from .driver import compile
    from .facts import facts_of

    begin = time.perf_counter()
    with working(as_json) as say:
        words = None if text is None else _text(text)
        made = compile(model, recipe, target, words, output, dump_ir=dump_ir, progress=say)
    facts = facts_of(made) | {"path": str(made.path), "seconds": time.perf_counter() - begin}
    if as_json:
        print_json(facts)
        return
    table(f"compiled in {facts['seconds']:.0f} s", values(artifact_rows(facts)))
    print(
        f"what it is made of:  kvant show {made.path}\n"
        f"how fast it is:      kvant bench {made.path}\n"
        f"how good it is:      kvant eval {made.path} --model {model} --text FILE"
    )


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="An artifact, or recipes | targets | passes | env.")],
    as_json: Json = False,
) -> None:
    """Show an artifact, or list recipes, targets, passes, debug variables."""
    from .listing import LISTINGS

    if what in LISTINGS:
        title, columns, rows = LISTINGS[what]()
        if as_json:
            print_json([dict(zip(columns, row, strict=True)) for row in rows])
        else:
            table(title, rows, columns)
        return
    near = difflib.get_close_matches(what, LISTINGS, n=1)
    if near and not Path(what).exists():
        raise KvantError(
            "artifact-missing",
            f"there is no artifact {what!r}, and no list of that name",
            where="the argument of show",
            fix=f"did you mean: kvant show {near[0]}?",
        )
    from ..runtime.artifact import load
    from .facts import facts_of

    facts = facts_of(load(what, target="reference"))
    if as_json:
        print_json(facts)
        return
    table("artifact", values(artifact_rows(facts)))
    table("targets", target_rows(facts), ("name", "on this machine"))
    kernels = [(kernel["name"], kernel["does"]) for kernel in facts["kernels"]]
    if kernels:
        table("kernels", kernels, ("name", "does"))


@app.command("eval")
def eval_(
    artifact: Artifact,
    model: ModelOption,
    text: Annotated[str, typer.Option(help="A UTF-8 text file, not used for calibration.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to score after the prompt.")] = 512,
    prompt: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of it.")] = 1024,
    target: TargetOption = "auto",
    as_json: Json = False,
) -> None:
    """Compare the quantized model with the unquantized one on the same tokens."""
    from ..runtime.artifact import load
    from .bind import open_model
    from .quality import evaluate

    with working(as_json) as say:
        words = _text(text)
        say("reading the artifact and the model")
        loaded, source = load(artifact, target=target), open_model(model)
        say(f"evaluating {tokens} tokens, quantized and not")
        quality = evaluate(loaded, source, words, tokens=tokens, prompt=prompt).to_json()
    if as_json:
        print_json(quality)
        return
    known = quality | {"cache_bytes_full": loaded.full_bytes_per_token()}
    table(f"{quality['recipe']} on {quality['target']}", values(quality_rows(known)))


@app.command()
def run(
    artifact: Artifact,
    model: ModelOption,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 120,
    target: TargetOption = "auto",
    as_json: Json = False,
) -> None:
    """Generate text from the packed cache."""
    from ..runtime.artifact import load
    from .bind import open_model
    from .generation import generate

    with working(as_json) as say:
        say("reading the artifact and the model")
        loaded, source = load(artifact, target=target), open_model(model)
        if as_json:
            say("generating")
            result = generate(loaded, source, prompt, tokens)
    if as_json:
        print_json(result)
        return
    result = generate(loaded, source, prompt, tokens, lambda t: print(t, end="", flush=True))
    print()
    print(
        f"{result['tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s, "
        f"{result['cache_bytes']:,} bytes of cache for {result['context']:,} tokens",
        file=sys.stderr,
    )


@app.command()
def bench(
    artifact: Annotated[str | None, typer.Argument(help="An artifact: layer 0 is timed.")] = None,
    shape: Annotated[str | None, typer.Option(help="heads x kv heads x head size.")] = None,
    recipe: RecipeOption = "int4-token",
    target: TargetOption = "cpu",
    context: Annotated[str, typer.Option(help="Context lengths, separated by commas.")] = "4096",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    threads: Annotated[int, typer.Option(min=1, help="For us and for every peer.")] = 1,
    as_json: Json = False,
) -> None:
    """Time decode attention against the strongest peers present, interleaved."""
    from .benchmark import bench_artifact, bench_shape
    from .shape import parse_shape

    contexts, batches = _numbers(context, "--context"), _numbers(batch, "--batch")
    if (artifact is None) == (shape is None):
        raise typer.BadParameter("give an artifact or --shape, and not both")
    with working(as_json) as say:
        if shape is not None:
            parsed = parse_shape(shape)
            rows = bench_shape(parsed, recipe, target, contexts, batches, threads, say)
        else:
            rows = bench_artifact(str(artifact), target, contexts, batches, threads, say)
    if as_json:
        print_json(rows)
        return
    bench_tables(rows)


def _numbers(text: str, name: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{name} takes positive integers such as 4096,32768")
    return sorted(dict.fromkeys(numbers))


@app.command()
def verify(artifact: Artifact, target: TargetOption = "auto", as_json: Json = False) -> None:
    """Check hashes, compatibility, and every kernel against the reference."""
    from ..runtime.verify import verify as verify_artifact

    with working(as_json) as say:
        say("comparing every kernel with the reference")
        result: dict[str, Any] = verify_artifact(artifact, target=target)
    if as_json:
        print_json(result)
        return
    table("verified: everything agrees", values(verify_rows(result)))
