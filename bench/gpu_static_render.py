"""docs/gpu-static.md from docs/gpu-static.json: every number of the page comes from the data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvant.targets.kernel_text import GPU_KERNELS
from kvant.targets.machines import DEVICES, GPUS

MAIN = "32x8x128"
BASE, TOKENS = "fp16", "fp16-tokens"
BATCHES = (1, 4, 8, 16)
CONTEXTS = (1024, 4096, 16384, 32768, 65536, 131072)
GRID = tuple((batch, tokens) for batch in BATCHES for tokens in CONTEXTS)
SHOWN = ((1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768), (8, 131072))
"""Cells of the grid that the page has; the data has all."""
FAIR = {"cuda": 2.5, "hip": 4.0}
"""Instructions per element up to which our 16-bit kernel is worth a comparison. Public ones take
1.4 to 1.9 on NVIDIA's GPUs and, of the vector unit alone, 2.0 on AMD's."""
SECONDS = 10.0
RESIDENT = 2

Row = Mapping[str, Any]
Value = tuple[float, Row, str]
"""What is judged, of which row and kernel."""

HEAD = f"""# Our GPU kernels, judged with no GPU

Made by `make bench-gpu-static`. The numbers are in [gpu-static.json](gpu-static.json), and this
page is made from them. Every kernel is compiled by Triton {{triton}} for its kind of GPU, and its
machine code is counted ([targets/gpu_counts.py](../targets/gpu_counts.py)): NVIDIA's by the
nvdisasm in Triton's wheel, AMD's in the assembly. **Nothing here was measured on a GPU.**

**An element** is a key or value of one KV head. *Instructions per element* are those that a warp
issues in one pass through the main loop, times the threads of a block, over the elements of that
pass: the instructions of a lane for each number that is read. The *main loop* is the loop with
matrix instructions that has the fewest; the loop over tiles at the edges masks besides. Every
instruction of the loop counts, whether or not it is jumped over. *Ratio*: over the same number of
the 16-bit kernel `{BASE}`, made by the same compiler for the same shape and GPU: query heads are
rows of its matrix products, as public kernels have them. `{TOKENS}` is the same with tokens as
rows, the form of our own kernels ([bench/gpu_fp16.py](../bench/gpu_fp16.py)). On AMD the
instructions of the vector unit stand behind the bar; the other units issue beside it.

A recipe whose maps have constants of a model is compiled as it is: constants are arguments.
"""


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio of instructions that some encodings must reach.

    Attributes:
        text: of the row.
        recipes: the encodings.
        must: the largest ratio.
        aim: the ratio that is aimed at, or none.
    """

    text: str
    recipes: tuple[str, ...]
    must: float
    aim: float | None = None


# Encodings with scales of tokens, or of channels for at least 64 tokens, at heads of 128.
GOALS = (
    Goal("4-bit", ("int4-token", "qserve-kv4", "quarot-kv4", "int4-channel64"), 1.5, 1.25),
    Goal("8-bit", ("int8-token",), 1.4),
    Goal("2-bit", ("quarot-kv2", "int2-channel64"), 1.6),
    Goal("3-bit", ("int3-token",), 2.0),
    Goal("codebook 4-bit", ("turboquant-4bit", "nf4"), 1.8),
)


@dataclass(frozen=True, slots=True)
class Race:
    """A goal of time against the best 16-bit kernel on one H200, MAIN, one step of one layer.

    Attributes:
        recipe: of ours.
        batch: rows.
        tokens: of a row.
        must: the least ratio of its time to ours.
        aim: the ratio that is aimed at.
    """

    recipe: str
    batch: int
    tokens: int
    must: float
    aim: float


RACES = (
    Race("int4-token", 1, 4096, 0.9, 1.2),
    Race("int4-token", 1, 32768, 1.4, 2.0),
    Race("int4-token", 1, 131072, 2.1, 3.0),
    Race("int4-token", 8, 32768, 2.5, 3.3),
    Race("int4-token", 8, 131072, 2.5, 3.3),
    Race("int8-token", 8, 32768, 1.65, 1.9),
    Race("quarot-kv2", 8, 131072, 3.2, 5.0),
)
# Microseconds of the best bf16 kernel on a H200: the first three from vLLM's pull request 43232
# (FlashAttention 3, FlashInfer); at 128k tokens its bytes over the share of the bandwidth that it
# had at 8 rows of 32k, 4.24 TB/s.
BF16_US = {
    (1, 4096): 14.0,
    (1, 32768): 43.5,
    (8, 32768): 253.5,
    (1, 131072): 126.6,
    (8, 131072): 1013.0,
}
SHARE = (0.6, 0.8)
"""Of 4.8 TB/s, for 4 bits and at least 500 MB: what must be reached, and the aim."""


def page(data: Mapping[str, Any]) -> str:
    """Return the page of the documentation."""
    rows = data["rows"]
    main = [row for row in rows if row["shape"] == MAIN]
    parts = [HEAD.format(triton=data["triton"]), _goals(rows)]
    parts += [_gpu(kind, main) for kind in GPUS if any(row["gpu"] == kind for row in main)]
    parts += [_shapes(rows), _kernels(rows), _races(main), _predicted(main)]
    return "\n".join(part for part in parts if part)


def line(row: Row) -> str:
    """Return one row for a terminal."""
    name = f"{row['recipe']} {row['shape']} {row['gpu']}"
    if "refused" in row:
        return f"{name}: refused: {row['refused']}"
    attend = row["kernels"]["attend"]
    return (
        f"{name}: {row['per_element']:.2f} instructions an element, {attend['registers']} "
        f"registers, {attend['resident']} blocks, {row['main']['spills']} spills, "
        f"{row['main']['scalar_loads']} scalar loads, {_slowest(row):.1f} s"
    )


def ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """Return instructions per element over those of the 16-bit kernel, or none without it."""
    same = (
        x for x in rows if (x["recipe"], x["shape"], x["gpu"]) == (BASE, row["shape"], row["gpu"])
    )
    base = next(same, None)
    if base is None or "refused" in base or "refused" in row:
        return None
    return float(row["per_element"] / base["per_element"])


def is_fair(row: Row | None) -> bool:
    """Return whether a row of the 16-bit kernel is worth a comparison."""
    if row is None or "refused" in row:
        return False
    return bool(row["per_element"] <= FAIR[GPUS[row["gpu"]].backend])


def verdict(worst: float, must: float, aim: float | None = None) -> str:
    """Return how the largest of some numbers stands to a goal."""
    if aim is not None and worst <= aim:
        return "aim reached"
    return "reached" if worst <= must else "**missed**"


def _is_base(row: Row) -> bool:
    return bool(row["recipe"] == BASE and row["shape"] == MAIN)


def _slowest(row: Row) -> float:
    return max(float(kernel["seconds"]) for kernel in row["kernels"].values())


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _goals(rows: Sequence[Row]) -> str:
    made = [row for row in rows if "refused" not in row]
    refused = len(rows) - len(made)
    text = f"## The goals\n\n{len(made)} rows of a recipe, a shape and a kind of GPU"
    text += f"; {refused} refused, which miss every goal.\n\n" if refused else ".\n\n"
    head = ("goal", "must", "aim", "worst", "where", "")
    lines = [*_limits(made), *_ratios(rows)]
    base = [row for row in made if _is_base(row)]
    if base:
        each = [float(row["per_element"]) for row in base]
        name = f"`{BASE}` itself: instructions per element (public kernels: 1.4 to 1.9)"
        lines.append((name, "", "", f"{max(each):.2f}", f"least {min(each):.2f}", ""))
    return text + _table(head, iter(lines))


def _limits(made: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the goals that every row of a recipe has; the 16-bit kernels stand below them."""
    ours = [row for row in made if row["recipe"] not in (BASE, TOKENS)]
    theirs = [row for row in made if row["recipe"] in (BASE, TOKENS)]
    limits: tuple[tuple[str, float, str, Callable[[Sequence[Row]], list[Value]]], ...] = (
        ("seconds of a processor to compile a kernel", SECONDS, "{:.1f}", _seconds),
        ("spills in the main loop", 0, "{:.0f}", _of_loop("spills")),
        ("global loads of 1 or 2 bytes in the main loop", 0, "{:.0f}", _of_loop("scalar_loads")),
        ("shared memory, share of what a block may have", 1.0, "{:.2f}", _shared),
        ("blocks of attend on a multiprocessor, at least", -RESIDENT, "{:.0f}", _few),
    )
    lines = []
    for text, must, form, values in limits:
        lines.append(_limit(text, values(ours), must, form))
        base = values(theirs)
        if any(value > must for value, *_ in base):
            shown = _limit(f"the same of `{BASE}` and `{TOKENS}`, no recipes", base, must, form)
            lines.append((shown[0], "", "", *shown[3:5], ""))
    return lines


def _seconds(rows: Sequence[Row]) -> list[Value]:
    return [(float(x["seconds"]), row, name) for row in rows for name, x in row["kernels"].items()]


def _shared(rows: Sequence[Row]) -> list[Value]:
    return [
        (x["shared"] / GPUS[row["gpu"]].shared, row, name)
        for row in rows
        for name, x in row["kernels"].items()
    ]


def _few(rows: Sequence[Row]) -> list[Value]:
    return [(-float(row["kernels"]["attend"]["resident"]), row, "attend") for row in rows]


def _of_loop(name: str) -> Callable[[Sequence[Row]], list[Value]]:
    return lambda rows: [(float(row["main"][name]), row, "attend") for row in rows]


def _limit(text: str, values: Sequence[Value], must: float, form: str) -> tuple[str, ...]:
    if not values:
        return text, form.format(abs(must)), "", "", "", "not made"
    worst, row, kernel = max(values, key=lambda value: value[0])
    missed = sum(value[0] > must for value in values)
    where = f"`{row['recipe']}` {row['shape']} {row['gpu']}, {kernel}"
    judged = verdict(worst, must) + (f": {missed} of {len(values)}" if missed else "")
    return text, form.format(abs(must)), "", form.format(abs(worst)), where, judged


def _ratios(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Yield the goals for instructions, NVIDIA's and AMD's."""
    for goal in GOALS:
        for backend, maker in (("cuda", "NVIDIA"), ("hip", "AMD")):
            chosen = [
                row
                for row in rows
                if row["recipe"] in goal.recipes
                and row["shape"] == MAIN
                and GPUS[row["gpu"]].backend == backend
            ]
            text = f"{goal.text}, {maker}: instructions per element over those of 16 bits"
            numbers = f"{goal.must:g}", "" if goal.aim is None else f"{goal.aim:g}"
            values = [(ratio(row, rows), row) for row in chosen]
            known = [(value, row) for value, row in values if value is not None]
            if not known or len(known) < len(values):
                yield text, *numbers, "", "", "incomplete"
                continue
            worst, row = max(known, key=lambda value: value[0])
            judged = verdict(worst, goal.must, goal.aim)
            kinds = {row["gpu"] for row in chosen}
            base = [x for x in rows if _is_base(x) and x["gpu"] in kinds]
            if not all(map(is_fair, base)):
                judged = "**not judged**: our 16-bit kernel is no fair one"
            yield text, *numbers, f"{worst:.2f}", f"`{row['recipe']}` {row['gpu']}", judged


def _gpu(kind: str, main: Sequence[Row]) -> str:
    """Return one row for each recipe, sorted by instructions."""
    head = (
        "recipe",
        "instructions per element",
        "ratio",
        "matrix, shared, global, async",
        "float, convert, integer, rest",
        "per element of edge loops",
        "registers",
        "shared memory",
        "blocks",
        "spills: loop, kernel",
        "scalar loads",
        "s to compile",
    )
    chosen = [row for row in main if row["gpu"] == kind]
    title = f"## {kind}: {GPUS[kind].devices}, {MAIN}\n\n"
    order = sorted(chosen, key=lambda row: float(row.get("per_element", 0)))
    return title + _table(head, (_recipe(row, main) for row in order))


def _recipe(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    if "refused" in row:
        return f"`{row['recipe']}`", f"refused: {row['refused']}", *[""] * 10
    kinds, attend, of = row["main"]["kinds"], row["kernels"]["attend"], ratio(row, rows)
    memory = ("matrix", "shared", "global", "async copy")
    arithmetic = ("float", "convert", "integer")
    rest = sum(kinds.values()) - sum(kinds.get(kind, 0) for kind in (*memory, *arithmetic))
    shown = ", ".join(str(kinds.get(kind, 0)) for kind in memory)
    others = ", ".join([*(str(kinds.get(kind, 0)) for kind in arithmetic), str(rest)])
    each = f"{row['per_element']:.2f}"
    if GPUS[row["gpu"]].backend == "hip":
        each += f" \\| {row['vector_per_element']:.2f}"
    return (
        f"`{row['recipe']}`",
        each,
        "" if of is None else f"{of:.2f}",
        shown,
        others,
        ", ".join(f"{each:.1f}" for each in row["other_loops"]),
        str(attend["registers"]),
        f"{attend['shared'] / 1024:.0f} KiB",
        _bold(attend["resident"], attend["resident"] < RESIDENT),
        f"{_bold(row['main']['spills'], row['main']['spills'] > 0)}, {attend['spills']}",
        _bold(row["main"]["scalar_loads"], row["main"]["scalar_loads"] > 0),
        f"{attend['seconds']:.1f}",
    )


def _bold(value: object, wrong: bool) -> str:
    return f"**{value}**" if wrong else str(value)


def _shapes(rows: Sequence[Row]) -> str:
    others = [row for row in rows if row["shape"] != MAIN]
    if not others:
        return ""
    head = ("shape", "GPU", "recipe", "instructions per element", "ratio", "blocks", "spills")
    lines = []
    for row in others:
        first = (row["shape"], row["gpu"], f"`{row['recipe']}`")
        if "refused" in row:
            lines.append((*first, f"refused: {row['refused']}", "", "", ""))
            continue
        of, attend = ratio(row, rows), row["kernels"]["attend"]
        shown = "" if of is None else f"{of:.2f}"
        numbers = (str(attend["resident"]), str(row["main"]["spills"]))
        lines.append((*first, f"{row['per_element']:.2f}", shown, *numbers))
    return "## Other shapes\n\n" + _table(head, iter(lines))


def _kernels(rows: Sequence[Row]) -> str:
    """Return one row for each kernel: the worst of all recipes, shapes and GPUs."""
    made = [row for row in rows if "refused" not in row]
    if not made:
        return ""
    head = ("kernel", "s to compile, at most", "spills", "registers", "shared memory", "compiled")
    lines = []
    for name in GPU_KERNELS:
        found = [row["kernels"][name] for row in made if name in row["kernels"]]
        if not found:
            continue
        most = {key: max(x[key] for x in found) for key in found[0]}
        size = f"{most['shared'] / 1024:.1f} KiB"
        numbers = (f"{most['seconds']:.1f}", str(most["spills"]), str(most["registers"]), size)
        lines.append((f"`{name}`", *numbers, str(len(found))))
    return "## Every kernel, the worst of all rows\n\n" + _table(head, iter(lines))


def _races(main: Sequence[Row]) -> str:
    """Return the goals of time, with predicted times of ours and published ones of the peers."""
    head = ("predicted on one H200", "must", "aim", "bf16, published µs", "ours, predicted µs", "")
    of = {row["recipe"]: row for row in main if DEVICES[row["gpu"]].name == "H200"}
    if not any(row.get("predicted") for row in of.values()):
        return ""
    lines = []
    for race in RACES:
        place = race.batch, race.tokens
        cell, peer = _cell_of(of.get(race.recipe), place), BF16_US[place]
        first = (f"`{race.recipe}`, {race.batch} x {race.tokens // 1024}k: time of bf16 / ours",)
        numbers = (f"{race.must:g}", f"{race.aim:g}", f"{peer:g}")
        lines.append((*first, *numbers, *_raced(cell, peer, race.must, race.aim)))
    cell = _cell_of(of.get("int4-token"), (8, 131072))
    if cell is not None:
        share = cell["bytes"] / cell["us"] / (DEVICES["sm_90"].bandwidth * 1e3)
        judged = f"{share:.2f}, {_least(share, *SHARE)}"
        name = f"`int4-token`, 8 x 128k, {cell['bytes'] / 1e6:.0f} MB: share of 4.8 TB/s"
        lines.append((name, *map(str, SHARE), "", f"{cell['us']:.0f}", judged))
    text = "## Goals of time, predicted\n\n"
    text += "**Predicted, not measured**; the peers' times are published ones, not measured by us: "
    text += "vLLM's pull request 43232; at 128k, bytes at the rate that bf16 had there.\n\n"
    return text + _table(head, iter(lines))


def _raced(cell: Row | None, peer: float, must: float, aim: float) -> tuple[str, str]:
    if cell is None:
        return "", "not made"
    times = peer / cell["us"]
    return f"{cell['us']:.1f}", f"{times:.2f}, {_least(times, must, aim)}"


def _least(value: float, must: float, aim: float) -> str:
    return "aim" if value >= aim else "must" if value >= must else "**missed**"


def _predicted(main: Sequence[Row]) -> str:
    """Return the predicted times of every recipe, one table for each device."""
    text = "## Predicted times\n\n"
    text += (
        "**Predicted, not measured**: microseconds of one decode step of one layer of "
        f"{MAIN} by [targets/cost.py](../targets/cost.py), and in brackets how many times faster "
        "than our 16-bit kernel is predicted to be, where that one is a fair one (up to "
        f"{FAIR['cuda']:g} instructions per element, on AMD's {FAIR['hip']:g}). Behind them what "
        "limits it: reading, issue of instructions, matrix units, or what is fixed (launches, "
        "beginnings of blocks, merging). The data has batches of 1 to 16 and 1k to 128k tokens.\n"
    )
    shown = False
    for kind, device in DEVICES.items():
        chosen = [row for row in main if row["gpu"] == kind and row.get("predicted")]
        if not chosen:
            continue
        shown = True
        base = next((row for row in chosen if _is_base(row) and is_fair(row)), None)
        head = ("recipe, predicted µs", *(f"{b} x {n // 1024}k" for b, n in SHOWN))
        title = f"\n### Predicted: {device.name}, {device.bandwidth / 1e3:.1f} TB/s\n\n"
        text += title + _table(head, (_times(row, base) for row in chosen))
    return text if shown else ""


def _times(row: Row, base: Row | None) -> tuple[str, ...]:
    cells = []
    for place in SHOWN:
        cell, other = _cell_of(row, place), _cell_of(base, place)
        faster = f" ({other['us'] / cell['us']:.2f}x)" if cell and other else ""
        cells.append(f"{cell['us']:.0f}{faster} {cell['limit']}" if cell else "")
    return f"`{row['recipe']}`", *cells


def _cell_of(row: Row | None, place: tuple[int, int]) -> Row | None:
    """Return the prediction of a row for (batch, tokens), if there is one."""
    cells: Sequence[Row] = row["predicted"] if row is not None else []
    return next((cell for cell in cells if (cell["batch"], cell["tokens"]) == place), None)
