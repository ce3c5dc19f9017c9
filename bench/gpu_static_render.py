"""docs/gpu-static.md from docs/gpu-static.json: every number of the page comes from the data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gpu_static_times
from gpu_static_rows import BASE, MAIN, TOKENS, Row, is_base, is_fair, ratio, table

from kvant.targets.kernel_text import GPU_KERNELS
from kvant.targets.machines import GPUS

BATCHES = (1, 4, 8, 16)
CONTEXTS = (1024, 4096, 16384, 32768, 65536, 131072)
GRID = tuple((batch, tokens) for batch in BATCHES for tokens in CONTEXTS)
SECONDS = 10.0
RESIDENT = 2

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


def page(data: Mapping[str, Any]) -> str:
    """Return the page of the documentation."""
    rows = data["rows"]
    main = [row for row in rows if row["shape"] == MAIN]
    parts = [HEAD.format(triton=data["triton"]), _goals(rows)]
    parts += [_gpu(kind, main) for kind in GPUS if any(row["gpu"] == kind for row in main)]
    parts += [
        _shapes(rows),
        _kernels(rows),
        gpu_static_times.races(main),
        gpu_static_times.predicted(main),
    ]
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


def verdict(worst: float, must: float, aim: float | None = None) -> str:
    """Return how the largest of some numbers stands to a goal."""
    if aim is not None and worst <= aim:
        return "aim reached"
    return "reached" if worst <= must else "**missed**"


def _slowest(row: Row) -> float:
    return max(float(kernel["seconds"]) for kernel in row["kernels"].values())


def _goals(rows: Sequence[Row]) -> str:
    made = [row for row in rows if "refused" not in row]
    refused = len(rows) - len(made)
    text = f"## The goals\n\n{len(made)} rows of a recipe, a shape and a kind of GPU"
    text += f"; {refused} refused, which miss every goal.\n\n" if refused else ".\n\n"
    head = ("goal", "must", "aim", "worst", "where", "")
    lines = [*_limits(made), *_ratios(rows)]
    base = [row for row in made if is_base(row)]
    if base:
        each = [float(row["per_element"]) for row in base]
        name = f"`{BASE}` itself: instructions per element (public kernels: 1.4 to 1.9)"
        lines.append((name, "", "", f"{max(each):.2f}", f"least {min(each):.2f}", ""))
    return text + table(head, iter(lines))


def _limits(made: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Yield the goals of all recipes' rows, each with the 16-bit kernels that miss it below."""
    bases = (BASE, TOKENS)
    ours = _limited([row for row in made if row["recipe"] not in bases])
    theirs = _limited([row for row in made if row["recipe"] in bases])
    for (text, must, form, values), (*_, base) in zip(ours, theirs, strict=True):
        yield _limit(text, values, must, form)
        if any(value > must for value, *_ in base):
            name = f"the same of `{BASE}` and `{TOKENS}`, no recipes"
            _, _, _, worst, where, _ = _limit(name, base, must, form)
            yield name, "", "", worst, where, ""


def _limited(made: Sequence[Row]) -> list[tuple[str, float, str, list[Value]]]:
    """Return (goal, what it may be at most, how it is written, values) of the goals of all rows."""
    kernels = [(row, name, x) for row in made for name, x in row["kernels"].items()]
    seconds = [(float(x["seconds"]), row, name) for row, name, x in kernels]
    shared = [(x["shared"] / GPUS[row["gpu"]].shared, row, name) for row, name, x in kernels]
    spills = [(float(row["main"]["spills"]), row, "attend") for row in made]
    scalar = [(float(row["main"]["scalar_loads"]), row, "attend") for row in made]
    few = [(-float(row["kernels"]["attend"]["resident"]), row, "attend") for row in made]
    return [
        ("seconds of a processor to compile a kernel", SECONDS, "{:.1f}", seconds),
        ("spills in the main loop", 0, "{:.0f}", spills),
        ("global loads of 1 or 2 bytes in the main loop", 0, "{:.0f}", scalar),
        ("shared memory, share of what a block may have", 1.0, "{:.2f}", shared),
        ("blocks of attend on a multiprocessor, at least", -RESIDENT, "{:.0f}", few),
    ]


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
            base = [x for x in rows if is_base(x) and x["gpu"] in kinds]
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
    return title + table(head, (_recipe(row, main) for row in order))


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
    return "## Other shapes\n\n" + table(head, iter(lines))


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
    return "## Every kernel, the worst of all rows\n\n" + table(head, iter(lines))
