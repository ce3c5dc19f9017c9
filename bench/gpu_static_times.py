"""Predicted times of docs/gpu-static.md, beside published ones of 16-bit kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_static_rows import FAIR, MAIN, Row, is_base, is_fair, table

from kvant.targets.machines import DEVICES

SHOWN = ((1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768), (8, 131072))
"""Cells of the grid that the page has; the data has all."""


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


def races(main: Sequence[Row]) -> str:
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
    return text + table(head, iter(lines))


def _raced(cell: Row | None, peer: float, must: float, aim: float) -> tuple[str, str]:
    if cell is None:
        return "", "not made"
    times = peer / cell["us"]
    return f"{cell['us']:.1f}", f"{times:.2f}, {_least(times, must, aim)}"


def _least(value: float, must: float, aim: float) -> str:
    return "aim" if value >= aim else "must" if value >= must else "**missed**"


def predicted(main: Sequence[Row]) -> str:
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
        base = next((row for row in chosen if is_base(row) and is_fair(row)), None)
        head = ("recipe, predicted µs", *(f"{b} x {n // 1024}k" for b, n in SHOWN))
        title = f"\n### Predicted: {device.name}, {device.bandwidth / 1e3:.1f} TB/s\n\n"
        text += title + table(head, (_times(row, base) for row in chosen))
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
