"""docs/gpu-bench.md from docs/gpu-bench.json: every number of the page comes from the data."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gpu_cells import CELLS, GOALS, LEAST_BYTES, MODEL, Cell, Goal

Row = Mapping[str, Any]

HEAD = """# Our GPU kernels beside others, measured

Made by `python bench/gpu.py --bench` on {name} ({kind}, {sms} multiprocessors, {bandwidth:.0f} GB/s
as its maker says), from artifacts that were compiled where there is no GPU. The numbers are in
[gpu-bench.json](gpu-bench.json), and this page is made from them. Versions: {versions}.

Before anything was timed, kernels were compared with the reference on that GPU: {checked}.

**What a ratio means.** Time of the best 16-bit peer over time of ours, medians of {rounds} rounds
in which both take turns in one process; in brackets our worst round. Below 1 is a loss, and stays
in the table. Times are between events around a replayed graph, over a cold second cache; "called"
where a graph could not be captured. `ours` attends; `with append` also stores the token and encodes
what is due. Bytes are all that is stored: codes, scales, raw tokens, tables. Data is normal
random. Clocks were left as they are: {clocks}
"""
ROUNDS_OF_NONE = 0


def page(data: Row) -> str:
    """Return the page of the documentation."""
    machine, rows = data["machine"], data["rows"]
    rounds = next((len(r["times"]["ours"]["us"]) for r in rows if "times" in r), ROUNDS_OF_NONE)
    head = HEAD.format(
        **{key: machine[key] for key in ("name", "kind", "sms", "bandwidth")},
        versions=", ".join(f"{name} {v}" for name, v in data["versions"].items()),
        checked=_checked(data["checked"]),
        rounds=rounds,
        clocks="; then ".join(data["clocks"]) + ".",
    )
    return "\n".join([head, _goals(data), _times(rows), _left_out(rows)])


def _checked(found: Row) -> str:
    agree = f"{found['agree']} of {found['found']} artifacts agree"
    left = found["found"] - found["agree"] - found["failed"]
    parts = [agree, f"**{found['failed']} fail**" if found["failed"] else "none fails"]
    return ", ".join([*parts, *([f"{left} were left out for want of time"] if left else [])])


def verdict(values: Sequence[float], goal: Goal) -> str:
    """Return what the values of all cells of a goal mean; none where one is missing."""
    if not values:
        return "not measured"
    if goal.of == "model":
        must, aim = MODEL["must"], MODEL["aim"]
        if all(aim[0] <= value <= aim[1] for value in values):
            return "aim reached"
        return "reached" if all(must[0] <= value <= must[1] for value in values) else "**missed**"
    worst = min(values)
    if worst >= goal.aim:
        return "aim reached"
    if worst >= goal.must:
        return "reached"
    return "**missed, a loss**" if goal.of == "ratio" and worst < 1 else "**missed**"


def _goals(data: Row) -> str:
    lines = ["| goal | must | aim | found | |", "|---|---|---|---|---|"]
    for goal in GOALS:
        found = _found(goal, data)
        values, complete = [value for _, value in found], len(found) >= len(goal.cells) > 0
        complete = complete or (bool(found) and not goal.cells)
        shown = "; ".join(text for text, _ in found) or "-"
        must, aim = _limits(goal)
        said = verdict(values, goal) if complete or not found else "incomplete"
        lines.append(f"| {goal.text} | {must} | {aim} | {shown} | {said} |")
    return "\n".join(["## The issue's table", "", *lines, ""])


def _limits(goal: Goal) -> tuple[str, str]:
    if goal.of == "model":
        return tuple(f"{low:g}-{high:g}" for low, high in MODEL.values())  # type: ignore[return-value]
    return f"{goal.must:g}", f"{goal.aim:g}"


def _found(goal: Goal, data: Row) -> list[tuple[str, float]]:
    """Return (text, value) of what was measured for a goal."""
    if goal.of == "launch":
        launch = data.get("launch", {})
        if "triton" not in launch:
            return []
        times = launch["triton"] / launch["ours"]
        return [(f"{times:.1f} ({launch['ours']:.1f} us; Triton {launch['triton']:.1f} us)", times)]
    rows = [row for row in data["rows"] if "ratio" in row and "refused" not in row]
    if goal.of == "model":
        known = [row for row in rows if row.get("predicted")]
        return [
            (f"{_name(row)}: {x:.2f}", x)
            for row, x in ((row, row["predicted"] / _us(row)) for row in known)
        ]
    own = [row for cell in goal.cells for row in rows if row["cell"] == asdict(cell)]
    if goal.of == "share":
        shares = ((row, _rate(row) / data["machine"]["bandwidth"]) for row in own)
        return [(f"{x:.2f}", x) for row, x in shares if row["bytes"] >= LEAST_BYTES]
    return [(f"{_name(row)}: {row['ratio']:.2f} ({row['worst']:.2f})", row["ratio"]) for row in own]


def _name(row: Row) -> str:
    return Cell(**row["cell"]).name


def _us(row: Row, name: str = "ours") -> float:
    return statistics.median(row["times"][name]["us"])


def _rate(row: Row) -> float:
    """Return GB/s of all that is stored."""
    return float(row["bytes"]) / _us(row) / 1e3


def _times(rows: Sequence[Row]) -> str:
    lines = [
        "| cell | ours us | with append | best peer | its us | plain Triton int4 | GB/s | error | "
        "predicted us |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "times" not in row or "best" not in row:
            lines.append(f"| {_name(row)} | refused: {row['refused']} | | | | | | | |")
            continue
        texts = [_time(row, "ours"), _time(row, "ours, with append"), row["best"]]
        texts += [_time(row, row["best"]), _time(row, "plain Triton int4")]
        texts.append(f"{_rate(row):.0f}" if "bytes" in row else "-")
        texts.append(f"{row['error']:.3f}" if "error" in row else "-")
        texts.append(f"{row['predicted']:.1f}" if row.get("predicted") else "-")
        why = f" (refused: {row['refused']})" if "refused" in row else ""
        lines.append(f"| {_name(row)}{why} | {' | '.join(texts)} |")
    return "\n".join(["## All cells", "", *lines, ""])


def _time(row: Row, name: str) -> str:
    """Return a median and its rounds' least and most."""
    if name not in row["times"]:
        return "-"
    found = row["times"][name]
    us, called = found["us"], "" if found["graph"] else ", called"
    return f"{statistics.median(us):.1f} ({min(us):.1f}-{max(us):.1f}{called})"


def _left_out(rows: Sequence[Row]) -> str:
    lines = [f"- {Cell(**asdict(cell)).name}: not timed" for cell in CELLS if not _has(cell, rows)]
    for row in rows:
        for name, us in list(row.get("first_look", {}).items()):
            if name not in row["times"]:
                lines.append(f"- {_name(row)}: {name}, slower at a first look, {us:.1f} us")
        for name, why in row.get("refused_peers", {}).items():
            lines.append(f"- {_name(row)}: {name}: {why}")
    return "\n".join(["## What took no part", "", *(lines or ["Nothing."]), ""])


def _has(cell: Cell, rows: Sequence[Row]) -> bool:
    return any(row["cell"] == asdict(cell) for row in rows)
