"""Time decode attention against the strongest peers present, in one interleaved run.

Every number is a median over rounds in which all contestants take turns (A B C, A B C, ...), so
that a busy machine slows all of them alike. Ratios are results; milliseconds are context.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .shape import Shape

if TYPE_CHECKING:
    from ..runtime.artifact import Artifact

Run = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one contestant over all rounds."""

    median: float
    low: float
    high: float


def interleave(contestants: dict[str, Run], rounds: int, seconds: float = 0.1) -> dict[str, Timing]:
    """Time each contestant `rounds` times in turns.

    Args:
        contestants: name -> call without arguments.
        rounds: number of turns; each turn repeats the call to last about `seconds` / rounds.
        seconds: time one contestant may take over all rounds, beyond one call a round.
    """
    repeat = {}
    for name, run in contestants.items():
        run()
        begin = time.perf_counter()
        run()
        took = time.perf_counter() - begin
        repeat[name] = max(1, min(50, int(seconds / rounds / max(took, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            begin = time.perf_counter()
            for _ in range(repeat[name]):
                run()
            samples[name].append((time.perf_counter() - begin) / repeat[name] * 1e3)
    return {n: Timing(statistics.median(s), min(s), max(s)) for n, s in samples.items()}


def torch_peers(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, threads: int
) -> dict[str, Run]:
    """Return torch's SDPA over an unquantized cache: fp32 and bf16, GQA by flag and folded.

    Args:
        q: [B, H_q, 1, D]; k, v: [B, H_kv, N, D].
    """
    import torch

    torch.set_num_threads(threads)
    group = q.shape[1] // k.shape[1]
    attention = torch.nn.functional.scaled_dot_product_attention
    peers: dict[str, Run] = {}
    for dtype in (torch.float32, torch.bfloat16):
        tq, tk, tv = (torch.from_numpy(x).to(dtype) for x in (q, k, v))
        folded = tq.reshape(q.shape[0], k.shape[1], group, q.shape[3])
        name = f"torch {torch.__version__} sdpa {str(dtype).removeprefix('torch.')}"
        peers[f"{name} enable_gqa"] = lambda a=tq, b=tk, c=tv: attention(
            a, b, c, scale=scale, enable_gqa=True
        )
        peers[f"{name} folded"] = lambda a=folded, b=tk, c=tv: attention(a, b, c, scale=scale)
    return peers


def bench(
    artifact: "Artifact",
    shape: Shape,
    contexts: Sequence[int],
    batches: Sequence[int],
    threads: int,
    rounds: int = 7,
    peers: bool = True,
) -> list[dict[str, Any]]:
    """Return one row per (context, batch): our time, the peers' times, bytes and error.

    Raises: KvantError from the cache, for shapes that the artifact does not have.
    """
    rng = np.random.default_rng(0)
    rows = []
    for context in contexts:
        for batch in batches:
            size = (batch, shape.kv_heads, context)
            k = rng.standard_normal((*size, shape.head_dim), dtype=np.float32)
            v = rng.standard_normal((*size, shape.values), dtype=np.float32)
            q = rng.standard_normal((batch, shape.heads, 1, shape.head_dim), dtype=np.float32)
            rows.append(_row(artifact, shape, q, k, v, threads, rounds, peers))
    return rows


def _row(
    artifact: "Artifact",
    shape: Shape,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    threads: int,
    rounds: int,
    peers: bool,
) -> dict[str, Any]:
    cache = artifact.new_cache(batch=q.shape[0], max_tokens=k.shape[2] + 1)
    cache.append(0, k, v)
    cache.flush()
    contestants: dict[str, Run] = {"kvant": lambda: cache.attend(0, q)}
    if peers:
        contestants |= torch_peers(q, k, v, shape.logit_scale, threads)
    times = interleave(contestants, rounds)
    ours = times.pop("kvant")
    size = cache.bytes() // artifact.layer_count
    return {
        "target": artifact.target,
        "recipe": artifact.recipe,
        "shape": f"{shape.heads}x{shape.kv_heads}x{shape.head_dim}",
        "context": k.shape[2],
        "batch": q.shape[0],
        "threads": threads,
        "ms": ours.median,
        "ms_min": ours.low,
        "ms_max": ours.high,
        "gigabytes_per_second": size / ours.median / 1e6,
        "bytes": size,
        "max_error": _error(artifact, q, k, v, cache.attend(0, q)),
        "peers": {name: timing.median for name, timing in times.items()},
    }


def _error(
    artifact: "Artifact", q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray
) -> float:
    """Return max |kernel - reference| over the same stored bits, relative to max |reference|."""
    from ..runtime.artifact import load

    oracle = load(artifact.path, target="reference", id=artifact.id)
    cache = oracle.new_cache(batch=q.shape[0], max_tokens=k.shape[2] + 1)
    cache.append(0, k, v)
    cache.flush()
    expected = cache.attend(0, q)
    return float(np.abs(out - expected).max() / np.abs(expected).max())


def bench_shape(
    shape: Shape,
    recipe: str,
    target: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    threads: int,
    rounds: int = 7,
) -> list[dict[str, Any]]:
    """Compile a shape into a temporary artifact and time it."""
    from .driver import compile

    with tempfile.TemporaryDirectory() as folder:
        artifact = compile(shape, recipe, [target], out=Path(folder) / "bench.kvant")
        return bench(artifact, shape, contexts, batches, threads, rounds)
