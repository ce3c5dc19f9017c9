"""The rows of docs/gpu-static.json: which one others are compared with, and tables of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvant.targets.machines import GPUS

MAIN = "32x8x128"
BASE, TOKENS = "fp16", "fp16-tokens"
FAIR = {"cuda": 2.5, "hip": 4.0}
"""Instructions per element up to which our 16-bit kernel is worth a comparison. Public ones take
1.4 to 1.9 on NVIDIA's GPUs and, of the vector unit alone, 2.0 on AMD's."""

Row = Mapping[str, Any]


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


def is_base(row: Row) -> bool:
    """Return whether a row is the one that others of its GPU are compared with."""
    return bool(row["recipe"] == BASE and row["shape"] == MAIN)


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """Return a table of the page."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
