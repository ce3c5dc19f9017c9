"""docs/bench-cpu.md from docs/bench-cpu.json: every number of the page comes from the data."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpu_cells import (
    GOALS,
    MAIN,
    MODEL_GOALS,
    OURS,
    PROBE,
    SHOWN,
    Cell,
    Goal,
    elements,
    key,
)
from cpu_measure import BUSY, SPREAD

EXPLAINED = 0.7  # of the limit; of what is below, the sentence says that it waits

Row = Mapping[str, Any]

LIMIT = """**The machine's limit** of a step is the larger of two times, both measured in the same
rounds as the step. Bytes: all that is stored, over the bandwidth of the plain reader. Instructions:
all that one step executes, which are the roundings of queries and weights, scores, softmax, values
and merging, over the rate that the machine sustains. They are counted by a copy of the kernels that
counts how often each straight piece of its assembly is entered
([targets/cpu_profile.py](../targets/cpu_profile.py)); Python and the thread pool are not counted.
The rate is that of a loop with the same numbers of each kind of instruction (dot products, float
arithmetic, logic, shifts, conversions, shuffles, moves, scalars; with or without memory), of which
none waits for another, over data in the first cache, on as many threads
([bench/cpu_limit.py](../bench/cpu_limit.py)). Every encoding has the sentence that follows from
these numbers.
"""

HEAD = """# Our CPU kernels beside every CPU engine

Made by `make bench-cpu` (the first tables, the encodings, a sample of the grid; about 25 minutes)
and `make bench-cpu-full` (the whole grid, hours, in as many pieces as one likes); one pair alone is
`python bench/cpu.py --cell int4-token,32x8x128,4096,1,1 --peer ik_q4_0`. The numbers are in
[bench-cpu.json](bench-cpu.json), and this page is made from them. Sources of the kernels: {source}.

{machine}

**What a ratio means.** Time of the peer over time of ours: above 1 we are faster; below 1 is a loss
and stays in the table. Both are one decode step of one layer: one query token, softmax, everything
a caller waits for. Ours is `cache.attend`, with the rounding of the queries and the merge of the
parts; ONNX Runtime's step also stores one token; the rotation that llama.cpp adds around its
quantized cache is not counted. A number is the median of {rounds} rounds in which both take turns
in one process, pinned to as many cores as the threads; in brackets the worst round. Peers run under
the fastest setting that the threads allow. The data is normal random.

**What is refused.** A cell is no number where others used over {busy} of the cores before, during
or after it, or where the rounds of either spread over {spread}; where our kernel is further from
the float64 reference over the same stored bits than [allowed](../ir/tolerance.py); where a peer's
output is wrong; or where it does not fit in memory. L3 or DRAM: where our packed bytes fit.
"""


def page(data: Mapping[str, Any]) -> str:
    """Return the page of the documentation."""
    rows, facts = data["cells"], data["machine"]
    rounds = max((row.get("rounds", 0) for row in rows), default=0)
    parts = [
        HEAD.format(
            machine=_machine(facts, data["versions"]),
            source=data["source"],
            rounds=rounds,
            busy=f"{BUSY:.0%}",
            spread=f"{SPREAD:.0%}",
        ),
        LIMIT,
        _goals(rows, data["models"], bool(facts["bf16_dots"])),
        _encodings(rows),
        _grid(rows),
    ]
    return "\n".join(part for part in parts if part)


def line(row: Row) -> str:
    """Return one row for a terminal."""
    cell, peer = key(dict(row))
    if "refused" in row:
        return f"{cell} vs {peer}: refused: {row['refused']}"
    times = f"{row['ours_ms']['median']:.3f} and {row['peer_ms']['median']:.3f} ms"
    share = f", {bandwidth_share(row):.2f} of the read bandwidth" if peer == PROBE else ""
    limit = limit_share(row)
    share += "" if limit is None else f", {limit:.2f} of the limit. {what_limits(row)}"
    busy = f" BUSY, NO RESULT: {row['busy']}" if "busy" in row else ""
    return f"{cell} vs {peer}: {row['ratio']:.2f} (worst {row['worst']:.2f}), {times}{share}{busy}"


def model_line(row: Row) -> str:
    """Return one row on the model for a terminal."""
    if "refused" in row:
        return f"{row['what']}: refused: {row['refused']}"
    times = f"{row['ours_ms']['median']:.3f} and {row['peer_ms']['median']:.3f} ms"
    busy = f" BUSY, NO RESULT: {row['busy']}" if "busy" in row else ""
    return f"{row['what']}: {row['ratio']:.2f} (worst {row['worst']:.2f}), {times}{busy}"


def bandwidth_share(row: Row) -> float:
    """Return bytes a second of ours over those of the plain reader in the same rounds."""
    return float(row["ratio"] * row["bytes"] / row["peer_bytes"])


def limit_times(row: Row) -> tuple[float, float] | None:
    """Return milliseconds that the bytes and the instructions of a step need at least, or none."""
    if "executed" not in row or "third_ms" not in row:
        return None
    read = row["bytes"] / row["peer_bytes"] * row["peer_ms"]["median"]
    issue = sum(row["executed"].values()) / row["loop_instructions"] * row["third_ms"]["median"]
    return float(read), float(issue)


def limit_share(row: Row) -> float | None:
    """Return the machine's limit over the time of a step, or none where nothing was counted."""
    times = limit_times(row)
    return None if times is None else max(times) / float(row["ours_ms"]["median"])


def what_limits(row: Row) -> str:
    """Return one sentence, made of the numbers of a row."""
    times, share = limit_times(row), limit_share(row)
    if times is None or share is None:
        return "Instructions are not counted here."
    read, issue = times
    bound = "Instructions" if issue > read else "Bytes"
    text = f"{bound}: {issue:.2f} ms of instructions, {read:.2f} ms of reading"
    why = {"k": "keys", "v": "values"}
    reasons: dict[str, list[str]] = {}
    for role, reason in row["floats"].items():
        if reason:
            reasons.setdefault(reason, []).append(why[role])
    for reason, roles in reasons.items():
        text += f"; {' and '.join(roles)} go through floats, because {reason}"
    if share < EXPLAINED:
        text += f"; {1 - share:.0%} of the time is waiting and calls"
    return text + "."


def _machine(facts: Row, versions: Row) -> str:
    cache = f"{facts['l3_bytes'] / 2**20:.0f} MiB of L3"
    flags = ", ".join(facts["flags"])
    engines = "; ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        f"Machine: {facts['processor']} (family/model {facts['family']}), {facts['cores']} cores, "
        f"{cache}, {facts['memory_gib']} GiB; it has {flags}. Engines: {engines}. A library built "
        "for avx2 uses no wider vectors on this machine, whatever it has: its wheel is what a user "
        "gets, and its own build for this machine would be faster."
    )


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _goals(rows: Sequence[Row], models: Sequence[Row], bf16_dots: bool) -> str:
    found = {key(dict(row)): row for row in rows}
    text = "## The goals\n\n" + _table(
        ("time of peer / ours, 32x8x128, batch 1", "must", "aim", "measured", ""),
        (_goal_row(goal, found, bf16_dots) for goal in GOALS),
    )
    shown_too = [_goal_row(goal, found, bf16_dots) for goal in SHOWN]
    text += (
        "\nWithout a goal. Our kernels for AVX2 are what a machine with no wider vectors runs, "
        "and what the libraries built for AVX2 are compared with fairly.\n\n"
    )
    text += _table(
        ("time of peer / ours, 32x8x128, batch 1", "measured"),
        ((row[0], row[3]) for row in shown_too),
    )
    of = {row["what"]: row for row in models}
    shown = (name for name in MODEL_GOALS if name in of)
    text += "\n" + _table(
        ("on SmolLM2-135M", "must", "aim", "measured", ""),
        (_model_row(name, of[name]) for name in shown),
    )
    if bf16_dots:
        text += (
            "\nThis machine has dot products of bf16, so the comparison with torch's bf16 is shown "
            "in the grid and not counted here.\n"
        )
    return text


def verdict(values: Sequence[float], must: float, aim: float) -> str:
    """Return how the least of the measured values stands to a goal."""
    if not values:
        return "not measured"
    if min(values) >= aim:
        return "aim reached"
    if min(values) >= must:
        return "reached"
    return "**missed**" if min(values) >= 1 or must < 1 else "**missed, a loss**"


def _goal_row(goal: Goal, found: Mapping[tuple[str, str], Row], bf16_dots: bool) -> tuple[str, ...]:
    values, texts = [], []
    peers = [peer for peer in goal.peers if not (bf16_dots and peer == "torch_bf16")]
    several = len({cell.recipe for cell in goal.cells}) > 1
    for cell in goal.cells:
        rows = [found[str(cell), peer] for peer in peers if (str(cell), peer) in found]
        if not rows:
            continue
        label = f"{cell.context // 1024}k, {_threads(cell.threads)}"
        label = f"`{cell.recipe}` {label}" if several else label
        refused = [row["refused"] for row in rows if "refused" in row]
        value = None if refused else _value(goal, row := min(rows, key=lambda x: float(x["ratio"])))
        if value is None:
            texts.append(f"{label}: " + (f"refused: {refused[0]}" if refused else "not counted"))
            continue
        values.append(value)
        texts.append(f"{label}: {value:.2f}{_beside(goal, row)}")
    measured = "; ".join(texts) or "not measured"
    if goal.must is None or goal.aim is None:
        return goal.text, "", "", measured, ""
    whole = len(values) == len(texts)
    judged = verdict(values, goal.must, goal.aim) if whole else "incomplete"
    return goal.text, f"{goal.must:g}", f"{goal.aim:g}", measured, judged


def _value(goal: Goal, row: Row) -> float | None:
    """Return what a goal measures of a row; none where there is nothing to measure it by."""
    kinds = {"bandwidth": bandwidth_share, "limit": limit_share}
    return kinds[goal.of](row) if goal.of in kinds else float(row["ratio"])


def _beside(goal: Goal, row: Row) -> str:
    """Return what stands behind a measured value: its worst round, and errors of two encodings."""
    if goal.of != "time":
        return ""
    if str(row["peer"]).startswith(OURS):
        errors = f"error {row['ours_error']:.2f} beside {row['peer_error']:.2f}"
        return f" ({row['worst']:.2f}; {errors})"
    return f" ({row['worst']:.2f})"


def _model_row(name: str, row: Row) -> tuple[str, ...]:
    text, must, aim = MODEL_GOALS[name]
    if "refused" in row:
        return text, f"{must:g}", f"{aim:g}", f"refused: {row['refused']}", ""
    measured = f"{row['ratio']:.2f} ({row['worst']:.2f}): {row['detail']}"
    return text, f"{must:g}", f"{aim:g}", measured, verdict([row["ratio"]], must, aim)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _encodings(rows: Sequence[Row]) -> str:
    """Return one row for each recipe: what a step reads, how fast, and what limits it."""
    chosen = [
        row for row in rows if row["peer"] == PROBE and row["shape"] == MAIN and row["threads"] == 1
    ]
    if not chosen:
        return ""
    head = (
        "recipe",
        "where",
        "bytes per element",
        "ms",
        "GB/s of stored bytes",
        "share of read bandwidth",
        "G elements/s",
        "instructions per element: inner loop of keys, of values",
        "all executed",
        "share of the machine's limit",
        "what limits it",
        "error",
        "share of tolerance",
    )
    intro = (
        f"## Encodings\n\nOne layer of {MAIN}, one thread, against a plain read of a buffer far "
        "larger than L3 in the same rounds. Bytes are all that is stored: codes, scales, raw "
        "tokens, page table. Instructions are for each key or value of a KV head and all query "
        "heads of its group together: those of the inner loops as they stand in the assembly "
        "(`targets/cpu_counts.py`), then all that one step executes. A recipe whose rewrites need "
        "a model is measured without them. The error is that of "
        "the output against float64 over the unquantized "
        "numbers; the last column is the kernel's own error over what is allowed.\n\n"
    )
    return intro + _table(head, (_encoding_row(row) for row in sorted(chosen, key=key_of)))


def key_of(row: Row) -> tuple[Any, ...]:
    """Return what rows are sorted by: shape, context, batch, threads, recipe, peer."""
    sizes = (row["context"], row["batch"], row["threads"])
    return (row["shape"] != MAIN, row["shape"], *sizes, row["recipe"], row["peer"])


def _encoding_row(row: Row) -> tuple[str, ...]:
    without = row.get("left_out", [])
    name = f"`{row['recipe']}`{' without ' if without else ''}{', '.join(without)}"
    name += f" at {row['context'] // 1024}k"
    if "refused" in row:
        return name, f"refused: {row['refused']}", *[""] * 11
    count = elements(Cell(row["recipe"], row["shape"], row["context"], row["batch"], 1))
    seconds, share = row["ours_ms"]["median"] / 1e3, limit_share(row)
    return (
        name,
        row["resident"],
        f"{row['bytes'] / count:.3f}",
        f"{row['ours_ms']['median']:.2f}",
        f"{row['bytes'] / seconds / 1e9:.1f}",
        f"{bandwidth_share(row):.2f}",
        f"{count / seconds / 1e9:.2f}",
        ", ".join("floats" if n is None else f"{n:.2f}" for n in row["instructions"].values()),
        f"{sum(row['executed'].values()) / count:.2f}" if "executed" in row else "",
        "" if share is None else f"{share:.2f}",
        what_limits(row),
        f"{row['ours_error']:.4f}",
        f"{row['share']:.2f}",
    )


def _grid(rows: Sequence[Row]) -> str:
    shown = sorted((row for row in rows if row["peer"] != PROBE), key=key_of)
    if not shown:
        return ""
    head = (
        "shape",
        "tokens",
        "batch",
        "threads",
        "recipe",
        "peer",
        "ratio",
        "worst",
        "ms, ours",
        "ms, peer",
        "where",
        "error, ours",
        "error, peer",
        "peer's setting",
    )
    losses = sum(1 for row in shown if row.get("ratio", 1.0) < 1.0)
    counted = sum(1 for row in shown if "ratio" in row)
    intro = (
        f"## All pairs\n\n{counted} measured, {len(shown) - counted} refused or not fitting; in "
        f"{losses} of them the peer is faster (in bold). Milliseconds: median, and from the "
        "fastest to the slowest round.\n\n"
    )
    return intro + _table(head, (_grid_row(row) for row in shown))


def _grid_row(row: Row) -> tuple[str, ...]:
    peer = str(row["peer"]).replace(OURS, "our ")
    recipe, _, cpu = str(row["recipe"]).partition("@")
    recipe = f"`{recipe}`" + (f" for {cpu}" if cpu else "")
    sizes = (row["context"], row["batch"], row["threads"])
    start = (row["shape"], *(f"{n:,}" for n in sizes), recipe, peer)
    if "refused" in row:
        return *start, f"refused: {row['refused']}", *[""] * 7
    ratio = f"{row['ratio']:.2f}"
    setting = ", ".join(f"{name} {value}" for name, value in sorted(row["peer_setting"].items()))
    return (
        *start,
        ratio if row["ratio"] >= 1 else f"**{ratio}**",
        f"{row['worst']:.2f}",
        _times(row["ours_ms"]),
        _times(row["peer_ms"]),
        row["resident"],
        f"{row['ours_error']:.4f}",
        "" if row["peer_error"] is None else f"{row['peer_error']:.4f}",
        setting,
    )


def _times(found: Mapping[str, float]) -> str:
    return f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
