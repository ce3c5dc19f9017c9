"""What the commands print: tables for people, JSON for programs, a spinner meanwhile."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .benchmark import pays_from

Rows = Sequence[Sequence[Any]]


def print_json(data: Any) -> None:
    """Print one JSON document; numbers that JSON does not have become null."""
    print(json.dumps(_plain(data), indent=2, sort_keys=True, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def working(as_json: bool) -> Iterator[Callable[[str], None]]:
    """Give a function that names the stage; a spinner on stderr shows it, but not with --json.

    Whatever a library prints meanwhile goes to stderr: stdout is for results.
    """
    console = Console(stderr=True, quiet=as_json)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with redirect_stdout(sys.stderr):
        bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        with bar:
            task = bar.add_task("starting", total=None)
            yield lambda stage: bar.update(task, description=escape(stage))


def table(title: str, rows: Rows, columns: Sequence[str] = ()) -> None:
    """Print rows under a title, with or without a line of headings."""
    made = Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=box.SIMPLE_HEAD,
        show_header=bool(columns),
        pad_edge=False,
    )
    width = max((len(row) for row in rows), default=len(columns))
    for index in range(width):
        header = columns[index] if columns else ""
        made.add_column(header, style="" if index else "cyan", overflow="fold", no_wrap=not index)
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    Console().print(made)


def values(rows: Mapping[str, Any]) -> Rows:
    """Return rows of (name, value) with floats cut to four digits and lists without brackets."""
    return [(name, _cell(value)) for name, value in rows.items()]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)


def artifact_rows(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return what to say of an artifact, from `facts_of`."""
    packed, full = facts["cache_bytes_per_token"], facts["bytes_full_per_token"]
    times = f"{full / packed:.1f} times as much"
    smaller = facts["smaller_from"]
    rows = {
        "model": f"{facts['model']}, {facts['layers']} layers",
        "recipe": facts["recipe"],
        "calibrated on": facts["calibration"] or "nothing",
        "targets": ", ".join(facts["targets"]),
        "bits per element": f"{facts['bits_per_element']:.2f} at {facts['context']:,} tokens "
        "(bf16: 16)",
        "cache bytes per token": f"{packed:,.0f} (bf16: {full:,}, {times})",
        "tokens per GB of cache": f"{facts['tokens_per_gb']:,.0f} (bf16: {1e9 / full:,.0f})",
        "smaller than bf16": "never" if smaller is None else f"from {smaller:,} tokens on",
    }
    if facts["kept"]:
        kept = facts["kept"]
        windows = ", ".join(f"{n:,}" for n in kept["windows"])
        ring = f", a ring of the newest {windows} tokens" if windows else ""
        dtypes = " and ".join(kept["dtypes"])
        rows["kept as they are"] = f"layers {_cell(kept['layers'])}, in {dtypes}{ring}"
    if "path" in facts:
        rows["path"] = facts["path"]
    return rows | {"size": f"{facts['size'] / 1e6:.2f} MB", "id": facts["id"]}


def target_rows(facts: Mapping[str, Any]) -> Rows:
    """Return each target of an artifact with what becomes of it on this machine."""
    chosen = {facts["chosen"]: "chosen: what `load` takes"} if facts["chosen"] else {}
    return sorted((chosen | facts["passed_over"]).items(), key=lambda row: row[0] not in chosen)


def quality_rows(q: Mapping[str, Any]) -> dict[str, str]:
    """Return what to say of an evaluation, from the keys of `kvant eval`."""
    packed, full = q["cache_bytes_per_token"], q.get("cache_bytes_full")
    times = f" (bf16: {full:,}, {full / packed:.1f} times as much)" if full else ""
    return {
        "perplexity": f"{q['perplexity']:.3f} (unquantized: {q['perplexity_full']:.3f}, "
        f"95 % of such texts {q['perplexity_full_low']:.1f} to {q['perplexity_full_high']:.1f})",
        "KL(unquantized || quantized)": f"{q['kl_mean']:.4f} "
        f"({q['kl_mean_low']:.4f} to {q['kl_mean_high']:.4f}; p99 {q['kl_p99']:.3f}; "
        f"noise floor {q['kl_noise_floor']:.4f})",
        "same first choice": f"{q['top1']:.1%} ({q['top1_low']:.1%} to {q['top1_high']:.1%})",
        "bits per element": f"{q['bits_per_element']:.2f} (bf16: 16)",
        "cache bytes per token": f"{packed:,.0f}{times}",
        "tokens per GB of cache": f"{1e9 / packed:,.0f}"
        + (f" (bf16: {1e9 / full:,.0f})" if full else ""),
        "read in packed form": f"{q['packed_share']:.0%} of the history",
        "measured on": f"{q['tokens']} tokens of {q['text']}; context {q['context']:,}",
    }


def bench_tables(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one table for each row of a benchmark, the fastest first, and what follows."""
    for row in rows:
        times = {"kvant": row["ms"]} | row["peers"]
        cells = [
            (name, f"{ms:.3f}", "" if name == "kvant" else f"{ms / row['ms']:.2f}x")
            for name, ms in sorted(times.items(), key=lambda item: item[1])
        ]
        title = (
            f"{row['recipe']} {row['shape']}, {row['target']}: context {row['context']:,}, "
            f"batch {row['batch']}, threads {row['threads']}"
        )
        table(title, cells, ("who", "ms (median)", "slower than kvant by"))
        print(
            f"{row['ms_min']:.3f} to {row['ms_max']:.3f} ms, "
            f"{row['gigabytes_per_second']:.1f} GB/s of {row['bytes']:,} packed bytes, "
            f"{1e9 * row['context'] * row['batch'] / row['bytes']:,.0f} tokens of this layer "
            f"per GB, max error {row['max_error']:.1e}\n"
        )
    for batch in pays_from(rows):
        print(f"batch {batch}: {pays_words([row for row in rows if row['batch'] == batch])}")


def pays_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return where we are faster than the best peer, in words, from the rows of one batch size."""
    if not any(row["peers"] for row in rows):
        return "no peer to compare with"
    (begin,) = pays_from(rows).values()
    contexts = [row["context"] for row in rows]
    if begin is None:
        return f"slower than the best peer at {max(contexts):,} tokens, the longest context timed"
    if begin == min(contexts):
        return f"faster than the best peer at every context timed (from {begin:,} tokens)"
    return f"faster than the best peer from {begin:,} tokens on"


def verify_rows(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to say of a verification, from the keys of `kvant verify`."""
    shares = {name: result[f"{name}_share"] for name in ("stored", "computed")}
    rows = {
        name.replace("_", " "): value
        for name, value in result.items()
        if value not in ({}, []) and not name.endswith("_share")
    }
    return rows | {
        "largest error, as a share of what is allowed": ", ".join(
            f"{name} {_decimal(share)}" for name, share in shares.items()
        )
    }


def _decimal(value: float) -> str:
    """Return a share with two digits that count, and no exponent."""
    if 0.0 < value < 1e-5:
        return "under 0.00001"
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")
