"""How rows are split over the blocks of a GPU: two numbers, by plan and machine.

    tiles of a split = max(ceil(whole tiles of the row / most_splits), least_tiles)

This closed form is all that is chosen at run time, by the kernels (`gpu_whole.write_tiles`) and by
the launcher, which must know how many programs to start. It depends on the row's length and on two
numbers that the cost model gives when the artifact is compiled: not on the batch, which therefore
changes no bit of a row's output.
"""

from __future__ import annotations

from ..ir.arrangements import TILES
from ..ir.halves import TILE
from ..ir.plan import AttentionPlan
from .cost import Attend, most_splits
from .gpu_combine import COMBINE_ELEMENTS
from .gpu_counts import resident
from .gpu_prepare import ROWS
from .gpu_tiles import kinds
from .gpu_whole import MOST_REGISTERS
from .machines import DEVICES, Gpu

PER_ELEMENT = 1.5
"""Instructions of a lane for each element. Assumed; docs/gpu-static.md has the counts."""
MANY = 64
"""Pages of a row, in which sink and tail are a small share of the bytes."""


def split_facts(
    plan: AttentionPlan, gpu: Gpu, rows: int, shared: int, warps: int, stages: int
) -> dict[str, int]:
    """Return the two numbers, or none where attend reads no tiles.

    Args:
        plan: what is stored and computed.
        gpu: the kind; that of DEVICES stands for all of it.
        rows: of a tile of attend.
        shared: bytes of shared memory of a block.
        warps: of a block.
        stages: tiles on their way at once.
    """
    if kinds(plan) != (TILES, TILES):
        return {}
    attend = Attend(
        per_element=PER_ELEMENT,
        rows=rows,
        warps=warps,
        resident=max(1, resident(gpu, MOST_REGISTERS, shared, warps)),
        ahead=tile_bytes(plan, TILE) * max(stages - 1, 0.5),
        split_tokens=TILE,
        merged=merged_at_once(plan),
    )
    return {"least_tiles": 1, "most_splits": most_splits(DEVICES[gpu.name], plan, attend)}


def tile_bytes(plan: AttentionPlan, tokens: int) -> float:
    """Return the bytes of keys and values of so many tokens of one head, scales included."""
    many = MANY * plan.k.page_tokens
    stored = sum(stream.bytes(many, plan.window) for stream in (plan.k, plan.v))
    seen = many if plan.window is None else min(many, plan.window)
    return stored * tokens / (seen * plan.k.heads)


def merged_at_once(plan: AttentionPlan) -> int:
    """Return how many splits combine reads at once."""
    return max(1, COMBINE_ELEMENTS // (ROWS * plan.v.channels))
