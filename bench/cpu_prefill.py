"""A block of new queries at the end of a long cache: ours against torch's SDPA in fp32.

Queries are causal between them. Torch is given what it needs beforehand: unquantized keys and
values, and the mask. It is called in each way that it has for groups, and the fastest takes part.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cpu_measure
import cpu_peers
import numpy as np
from cpu_cells import QUERIES, Cell, l3_bytes, numbers_of, resident
from cpu_contest import Array, error

import kvant

SAMPLED = 16  # of the queries, evenly, are compared with float64
CHECKED = 64  # of the last queries are compared with the reference over the same stored bits


def measure(cell: Cell, folder: Path, even_if_busy: bool) -> dict[str, Any]:
    """Return what is known of a block of queries: errors, bytes, times or why there are none.

    Args:
        cell: its context counts the new tokens.
        folder: our artifact.
        even_if_busy: see `cpu_measure.measure`.
    """
    shape = kvant.Shape(*numbers_of(cell.shape))
    q, k, v = cpu_peers.tensors(shape, cell.context, cell.batch, QUERIES)
    contestant, cache, artifact = cpu_peers.open_ours(folder, (q, k, v), cell.threads)
    row = {
        "target": artifact.target,
        "bytes": contestant.bytes,
        "resident": resident(contestant.bytes, l3_bytes()),
        "share": _share(artifact, cache, q),
        "peer_bytes": 2 * k.nbytes,
    }
    refusal = cpu_peers.tolerance(row["share"])
    if refusal:
        return row | {"refused": refusal}
    chosen = np.linspace(0, QUERIES - 1, SAMPLED).astype(int)
    right = _truth(q, k, v, shape.logit_scale, chosen)
    row["ours_error"] = error(cache.attend(0, q)[:, :, chosen], right)
    call, peer = _fastest(_torch(q, k, v, shape.logit_scale, cell.threads))
    row["peer_error"] = error(peer().numpy().reshape(q.shape)[:, :, chosen], right)
    if not row["peer_error"] <= cpu_peers.ERRORS[32]:
        return row | {"refused": "the peer's output is wrong: our binding, not a result"}
    row["peer_setting"] = {"call": call, "dtype": "float32", "threads": cell.threads}
    ours = partial(cache.attend, 0, q)
    return row | cpu_measure.measure(ours, peer, even_if_busy=even_if_busy)


def _share(artifact: Any, cache: Any, q: Array) -> float:
    """Return the error over what is allowed; infinite if a part of the block gives other bits."""
    from kvant.runtime.launch_reference import Kernels
    from kvant.runtime.verify import computed_share

    part = np.ascontiguousarray(q[:, :, -CHECKED:])
    if not np.array_equal(cache.attend(0, q)[:, :, -CHECKED:], cache.attend(0, part)):
        return float("inf")
    reference = Kernels(artifact.plans, artifact.constants)
    return computed_share(cache, reference, 0, artifact.plan_of(0), part)


def _truth(q: Array, k: Array, v: Array, scale: float, chosen: Any) -> Any:
    """Return attention in float64 for some of the queries, [B, Hq, SAMPLED, D]."""
    from kvant.ir.attention import attend

    outputs = []
    for i in chosen:
        lengths = np.full(len(q), k.shape[2] - (q.shape[2] - 1 - i), np.int64)
        outputs.append(attend(q[:, :, i : i + 1], k, v, lengths=lengths, scale=scale)[0])
    return np.concatenate(outputs, axis=2)


def _torch(
    q: Array, k: Array, v: Array, scale: float, threads: int
) -> dict[str, Callable[[], Any]]:
    """Return torch's ways to attend, by name."""
    import torch

    torch.set_num_threads(threads)
    tq, tk, tv = (torch.from_numpy(x) for x in (q, k, v))
    group, queries, tokens = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    last = torch.arange(tokens - queries, tokens)[:, None]
    seen = torch.arange(tokens)[None] <= last
    mask = torch.zeros(queries, tokens).masked_fill(~seen, float("-inf"))
    attention = partial(torch.nn.functional.scaled_dot_product_attention, scale=scale)
    folded = tq.reshape(q.shape[0], k.shape[1], group * queries, q.shape[3])
    whole = [x.repeat_interleave(group, dim=1) for x in (tk, tv)]
    return {
        "enable_gqa": partial(attention, tq, tk, tv, attn_mask=mask, enable_gqa=True),
        "folded": partial(attention, folded, tk, tv, attn_mask=mask.repeat(group, 1)),
        "expanded before": partial(attention, tq, *whole, attn_mask=mask),
    }


def _fastest(ways: dict[str, Callable[[], Any]]) -> tuple[str, Callable[[], Any]]:
    return min(ways.items(), key=lambda way: cpu_peers.least(way[1]))
