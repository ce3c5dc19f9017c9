"""How long attend takes on a GPU: a prediction from bytes, counted instructions and facts.

Blocks of the grid run in waves, as many at once as the multiprocessors hold. A wave of m blocks
takes the largest of three times, after a beginning of its own:

    read    m bytes / min(bandwidth, m ahead / latency)
    issue   b instructions / (min(lanes, b warps lanes of a warp) clock)
    matrix  b products / (products a clock, clock)     b = ceil(m / multiprocessors)

    time = sum of the waves + merging the splits + launches

`ahead` are the bytes that a block has asked for and not yet got: few blocks cannot fill the memory
however fast it is (Little's law). All numbers of this module are predictions; none was measured.
Source: the roofline of issue slots follows Williams et al., Roofline, 2009, with instructions for
operations; waves, FlashInfer's XQA kernel (its pull request 4904).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from ..ir.plan import AttentionPlan
from .machines import Device

BANDWIDTH_SHARE = 0.88
"""Of the maker's bandwidth that the best public kernels reach: 4.24 of 4.8 TB/s (vLLM's pull
request 43232, bf16 on H200, 8 rows of 32k tokens)."""
ISSUE_SHARE = 0.75
"""Of the issue slots that a loop fills, as it waits now and then. Assumed."""
WARP_SHARE = 0.5
"""Of a scheduler's slots that one warp alone fills, as it waits for its own results. Assumed."""
SCHEDULERS = 4
"""Of a multiprocessor (or compute unit); each issues for its own warps."""
BEGINNING = 3
"""Loads that wait for one another before a block's first product: length, table, tile."""
CACHE_LATENCY = 0.35
"""Microseconds of a load that the second cache holds: what combine waits for. Assumed."""
MERGE_PASSES = 2
"""Times that combine goes over the splits: for the largest score, then for the sums."""
LEAST_SPLITS, MOST_SPLITS = 4, 128
"""Of a row; what lies between is tried."""
BATCHES, LENGTHS = (1, 2, 8), (4096, 32768, 131072)
"""Rows, and tokens of a row, for which a number of splits must do."""


@dataclass(frozen=True, slots=True)
class Attend:
    """What is known of a compiled kernel attend.

    Attributes:
        per_element: instructions of a lane for each key and value element.
        rows: of a tile, padding included: each is multiplied by every element.
        warps: of a block.
        resident: blocks that a multiprocessor holds at once.
        ahead: bytes that a block has under way.
        split_tokens: tokens of a split, at least; a split is whole multiples of them.
        merged: splits that combine reads at once.
        kernels: launches of a step: prepare, attend, combine.
        most_splits: of a row; longer rows have longer splits. None: as many as there are.
    """

    per_element: float
    rows: int
    warps: int
    resident: int
    ahead: float
    split_tokens: int
    merged: int
    kernels: int = 3
    most_splits: int | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """Predicted microseconds of one decode step of one layer.

    Attributes:
        read, issue, matrix: what each limit alone would take, of all waves.
        work: the waves, each by its largest limit.
        begin: beginnings of the waves.
        merge: reading what the splits left.
        launch: of all kernels.
    """

    read: float
    issue: float
    matrix: float
    work: float
    begin: float
    merge: float
    launch: float

    @property
    def total(self) -> float:
        """Microseconds of the step."""
        return self.work + self.begin + self.merge + self.launch

    @property
    def limit(self) -> str:
        """What holds the step back: "read", "issue", "matrix", or "fixed" (all that is no work)."""
        if self.work < self.total / 2:
            return "fixed"
        return max(("read", "issue", "matrix"), key=lambda name: float(getattr(self, name)))


@dataclass(frozen=True, slots=True)
class Block:
    """The share of one block of the grid: bytes read, instructions of lanes, products."""

    bytes: float
    instructions: float
    products: float


def decode(
    device: Device, plan: AttentionPlan, attend: Attend, batch: int, tokens: int
) -> tuple[Cost, int]:
    """Predict a step of one new token a row, and return the splits with it.

    Args:
        device: where it runs.
        plan: what is stored.
        attend: the kernel.
        batch: rows, all of `tokens` tokens.
        tokens: of a row, all that is due encoded.
    """
    count = max(1, ceil((tokens - plan.k.tokens.sink) / attend.split_tokens))
    if attend.most_splits is not None:
        count = ceil(count / ceil(count / attend.most_splits))
    blocks = batch * plan.k.heads * count
    seen = tokens if plan.window is None else min(tokens, plan.window)
    elements = batch * plan.k.heads * seen * (plan.k.channels + plan.v.channels)
    block = Block(
        bytes=batch * _stored(plan, tokens) / blocks,
        instructions=elements * attend.per_element / blocks,
        products=elements * attend.rows / blocks,
    )
    merge = _merge(device, attend, count, batch * plan.q_heads * (plan.v.channels + 2) * 4)
    return _waves(device, attend, block, blocks, merge), count


def most_splits(device: Device, plan: AttentionPlan, attend: Attend) -> int:
    """Return the most splits of a row that are best for all of BATCHES and LENGTHS.

    A batch alone would be best with splits of its own: one row must fill the memory with what it
    has asked for, eight rows do so with few splits each. But then the batch would change the order
    of sums. So one number is taken, by which the worst of them loses least.

    Args:
        device: where it runs.
        plan: what is stored.
        attend: the kernel; a split is whole multiples of its split_tokens.
    """
    counts = range(LEAST_SPLITS, MOST_SPLITS + 1)
    lost = dict.fromkeys(counts, 1.0)
    for batch in BATCHES:
        for tokens in LENGTHS:
            times = {
                most: decode(device, plan, replace(attend, most_splits=most), batch, tokens)[
                    0
                ].total
                for most in counts
            }
            best = min(times.values())
            lost = {most: max(worst, times[most] / best) for most, worst in lost.items()}
    return min(counts, key=lambda most: lost[most])


def _stored(plan: AttentionPlan, tokens: int) -> int:
    """Return the bytes of a row."""
    return sum(stream.bytes(tokens, plan.window) for stream in (plan.k, plan.v))


def _waves(device: Device, attend: Attend, block: Block, blocks: int, merge: float) -> Cost:
    """Return the cost of a grid: full waves, then one of what is left."""
    slots = device.sms * attend.resident
    full, rest = divmod(blocks, slots)
    waves = [(full, slots)] * (full > 0) + [(1, rest)] * (rest > 0)
    limits = [(many, _limits(device, attend, block, m)) for many, m in waves]
    read, issue, matrix = (sum(many * x[i] for many, x in limits) for i in range(3))
    return Cost(
        read=read,
        issue=issue,
        matrix=matrix,
        work=sum(many * max(x) for many, x in limits),
        # A later wave begins while the other blocks of the multiprocessor work.
        begin=(1 + (full + (rest > 0) - 1) / attend.resident) * BEGINNING * device.latency,
        merge=merge,
        launch=attend.kernels * device.launch,
    )


def _limits(device: Device, attend: Attend, block: Block, m: int) -> tuple[float, float, float]:
    """Return the microseconds of a wave of m blocks by each limit: read, issue, matrix."""
    a_microsecond = device.bandwidth * BANDWIDTH_SHARE * 1e3
    under_way = m * attend.ahead / device.latency
    busiest = ceil(m / device.sms)
    by_warps = busiest * attend.warps * WARP_SHARE / SCHEDULERS
    lanes = device.lanes * min(ISSUE_SHARE, by_warps)
    return (
        m * block.bytes / min(a_microsecond, under_way),
        busiest * block.instructions / (lanes * device.clock * 1e3),
        busiest * block.products / (device.matrix * device.clock * 1e3),
    )


def _merge(device: Device, attend: Attend, count: int, size: int) -> float:
    """Return the microseconds that combine reads for: `size` bytes of each split, in turns."""
    turns = MERGE_PASSES * ceil(count / attend.merged)
    return max(turns * CACHE_LATENCY, count * size / (device.bandwidth * BANDWIDTH_SHARE * 1e3))
