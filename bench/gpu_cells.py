"""What `bench/gpu.py --bench` times, and what issue 5 asks of it."""

from dataclasses import dataclass

SHAPE = "32x8x128"
HEADS, KV_HEADS, WIDTH = 32, 8, 128


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to time.

    Attributes:
        kind: "decode" (one query a row, one layer), "prefill" (a prompt appended and attended) or
            "append" (one token a row).
        recipe: of ours.
        batch: rows.
        tokens: of a row.
    """

    kind: str
    recipe: str
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        """Name for people and for files."""
        return f"{self.kind} {self.recipe} {self.batch}x{self.tokens // 1024}k"


def _decode(recipe: str, *sizes: tuple[int, int]) -> tuple[Cell, ...]:
    return tuple(Cell("decode", recipe, batch, k * 1024) for batch, k in sizes)


@dataclass(frozen=True, slots=True)
class Goal:
    """A line of the issue's table.

    Attributes:
        text: what is compared.
        of: "ratio" (time of the best 16-bit peer over ours), "share" (of the memory's bandwidth),
            "launch" (Triton's host time of a launch over ours) or "model" (predicted over
            measured).
        cells: all of which must reach it.
        must: to be reached; for "model", how far off a prediction may be.
        aim: the same, better.
    """

    text: str
    of: str
    cells: tuple[Cell, ...]
    must: float
    aim: float


MODEL = {"must": (0.7, 1.4), "aim": (0.85, 1.2)}
"""Predicted over measured time: from, to."""
LEAST_BYTES = 500_000_000
"""Of packed keys and values, where the share of the bandwidth is judged."""

GOALS = (
    Goal("4-bit decode, batch 1, 32k", "ratio", _decode("int4-token", (1, 32)), 1.4, 2.0),
    Goal("4-bit decode, batch 1, 128k", "ratio", _decode("int4-token", (1, 128)), 2.1, 3.0),
    Goal(
        "4-bit decode, batch 8, 32k-128k",
        "ratio",
        _decode("int4-token", (8, 32), (8, 128)),
        2.5,
        3.3,
    ),
    Goal("8-bit decode, batch 8, 32k", "ratio", _decode("int8-token", (8, 32)), 1.65, 1.9),
    Goal("2-bit decode, batch 8, 128k", "ratio", _decode("quarot-kv2", (8, 128)), 3.2, 5.0),
    Goal(
        "share of the bandwidth, 4-bit, 500 MB or more",
        "share",
        _decode("int4-token", (8, 128)),
        0.6,
        0.8,
    ),
    Goal("short context, 4k, batch 1", "ratio", _decode("int4-token", (1, 4)), 0.9, 1.2),
    Goal(
        "prefill 8k with a 4-bit cache",
        "ratio",
        (Cell("prefill", "int4-token", 1, 8192),),
        0.7,
        1.0,
    ),
    Goal("fused append, batch 8", "ratio", (Cell("append", "int4-token", 8, 4096),), 0.9, 1.2),
    Goal("launch overhead against Triton's launcher", "launch", (), 3.0, 10.0),
    Goal(
        "cost model: predicted / measured", "model", (), *(limits[0] for limits in MODEL.values())
    ),
)

CELLS = tuple(dict.fromkeys(cell for goal in GOALS for cell in goal.cells))
"""Each once, in the order of the goals: what comes late may be left out when time is up."""
