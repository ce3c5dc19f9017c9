"""The command line: kvant compile | show | eval | run | bench | verify."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..ir.errors import KvantError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compile a model's attention and KV cache to quantized kernels, ahead of time.",
)
out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name or .toml file.")]
TargetOption = Annotated[
    list[str], typer.Option("--target", "-t", help="cpu, reference, ...; may be given twice.")
]
Artifact = Annotated[str, typer.Argument(help="A folder made by `kvant compile`.")]


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, sort_keys=True, default=str))


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out.print(table)


def _status(quiet: bool) -> Any:
    """A spinner on stderr that names the stage; silent for --json."""
    return Console(stderr=True, quiet=quiet).status("")


def _text(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KvantError(
            "text-unreadable",
            f"the text cannot be read: {error.__class__.__name__}",
            where=path,
            fix="give a readable UTF-8 text file",
        ) from None


@app.command("compile")
def compile_(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or a .gguf file.")],
    recipe: RecipeOption = "kivi-4bit",
    target: TargetOption = ["cpu"],  # noqa: B006
    output: Annotated[str | None, typer.Option("--out", "-o", help="Folder to create.")] = None,
    text: Annotated[str | None, typer.Option(help="Calibration text.")] = None,
    dump_ir: Annotated[
        str | None, typer.Option(help="Folder for the graph after each pass.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a model into an artifact."""
    from .driver import compile

    begin = time.perf_counter()
    with _status(as_json) as status:
        artifact = compile(
            model,
            recipe,
            target,
            _text(text),
            output,
            dump_ir=dump_ir,
            progress=lambda stage: status.update(f"{stage} ..."),
        )
    facts = artifact.show() | {"path": str(artifact.path), "seconds": time.perf_counter() - begin}
    if as_json:
        _print_json(facts)
        return
    _show_facts(facts)


def _show_facts(facts: dict[str, Any]) -> None:
    rows = [(key, value) for key, value in facts.items() if key not in ("layers", "kernels")]
    _table("artifact", ("", ""), rows)
    kernels = facts.get("kernels", [])
    if kernels:
        _table(
            "kernels", ("name", "what it reads and writes"), [tuple(k.values()) for k in kernels]
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
            _print_json([dict(zip(columns, row, strict=True)) for row in rows])
        else:
            _table(title, columns, rows)
        return
    from ..runtime.artifact import load

    facts = load(what, target="reference").show()
    if as_json:
        _print_json(facts)
        return
    _show_facts(facts)


@app.command("eval")
def eval_(
    artifact: Artifact,
    model: Annotated[str, typer.Option(help="The model that was compiled.")],
    text: Annotated[str, typer.Option(help="A UTF-8 text file, not used for calibration.")],
    tokens: Annotated[int, typer.Option(help="Tokens to score after the prompt.")] = 512,
    target: Annotated[str, typer.Option("--target", "-t")] = "auto",
    as_json: Json = False,
) -> None:
    """Compare the quantized model with the unquantized one on the same tokens."""
    from ..runtime.artifact import load
    from .bind import open_model
    from .quality import evaluate

    words = _text(text) or ""
    with _status(as_json) as status:
        status.update("evaluating ...")
        result = evaluate(load(artifact, target=target), open_model(model), words, tokens=tokens)
    if as_json:
        _print_json(result.to_json())
        return
    _table("quality", ("measure", "value"), list(result.to_json().items()))


@app.command()
def run(
    artifact: Artifact,
    model: Annotated[str, typer.Option(help="The model that was compiled.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 120,
    target: Annotated[str, typer.Option("--target", "-t")] = "auto",
    as_json: Json = False,
) -> None:
    """Generate text from the packed cache."""
    from ..runtime.artifact import load
    from .bind import open_model
    from .generation import generate

    result = generate(
        load(artifact, target=target),
        open_model(model),
        prompt,
        tokens,
        on_text=None if as_json else lambda piece: print(piece, end="", flush=True),
    )
    if as_json:
        _print_json(result)
        return
    print()
    err.print(
        f"{result['tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s, "
        f"cache {result['cache_bytes'] / 1e6:.2f} MB"
    )


@app.command()
def bench(
    artifact: Annotated[str | None, typer.Argument(help="An artifact of a shape.")] = None,
    shape: Annotated[str | None, typer.Option(help="heads x kv heads x head size.")] = None,
    recipe: RecipeOption = "int4-token",
    target: Annotated[str, typer.Option("--target", "-t")] = "cpu",
    context: Annotated[str, typer.Option(help="Context lengths, separated by commas.")] = "4096",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    threads: Annotated[int, typer.Option(help="Threads for us and for every peer.")] = 1,
    as_json: Json = False,
) -> None:
    """Time decode attention against the strongest peers present, interleaved."""
    os.environ["KVANT_NUM_THREADS"] = str(threads)
    from .benchmark import bench as time_artifact
    from .benchmark import bench_shape, shape_of
    from .shape import parse_shape

    contexts, batches = (
        _numbers(text, name) for text, name in ((context, "--context"), (batch, "--batch"))
    )
    with _status(as_json) as status:
        status.update("timing ...")
        if artifact is not None:
            from ..runtime.artifact import load

            loaded = load(artifact, target=target)
            rows = time_artifact(loaded, shape_of(loaded), contexts, batches, threads)
        elif shape is not None:
            rows = bench_shape(parse_shape(shape), recipe, target, contexts, batches, threads)
        else:
            raise typer.BadParameter("give an artifact or --shape")
    if as_json:
        _print_json(rows)
        return
    _bench_table(rows)


def _bench_table(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        cells = [("kvant", f"{row['ms']:.3f}", "1.00")]
        cells += [(n, f"{ms:.3f}", f"{ms / row['ms']:.2f}") for n, ms in row["peers"].items()]
        title = (
            f"{row['recipe']} {row['shape']} context {row['context']} batch {row['batch']} "
            f"threads {row['threads']}: {row['gigabytes_per_second']:.1f} GB/s of packed bytes, "
            f"max error {row['max_error']:.1e}"
        )
        _table(title, ("who", "ms (median)", "times ours"), cells)


def _numbers(text: str, name: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{name} takes positive integers such as 4096,32768")
    return numbers


@app.command()
def verify(
    artifact: Artifact,
    target: Annotated[str, typer.Option("--target", "-t")] = "auto",
    as_json: Json = False,
) -> None:
    """Check hashes, compatibility, and every kernel against the reference."""
    from ..runtime.verify import verify as verify_artifact

    result = verify_artifact(artifact, target=target)
    if as_json:
        _print_json(result)
        return
    _table("verified", ("check", "result"), [(k, v) for k, v in result.items()])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit status 0, 1 refused, 2 usage, 70 our bug."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(args=arguments, standalone_mode=True)
    except KvantError as error:
        if "--json" in arguments:
            fields = {
                "code": error.code,
                "what": error.what,
                "where": error.where,
                "fix": error.fix,
            }
            _print_json({"error": fields})
        else:
            err.print(f"[bold red]kvant:[/] {error.what}", highlight=False)
            err.print(
                f"  where: {error.where}\n  fix: {error.fix}  \\[{error.code}]", highlight=False
            )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        import traceback

        traceback.print_exc()
        err.print("kvant: this is our bug. Please report the lines above with the command you ran.")
        sys.exit(70)


if __name__ == "__main__":
    main()
