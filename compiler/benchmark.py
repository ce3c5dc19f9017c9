"""Time decode attention against the strongest peers present, in one interleaved run.

Every number is a median over rounds in which all contestants take turns (A B C, A B C, ...), so
that a busy machine slows all of them alike. Ratios are results; milliseconds are context.
"""

import functools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .debug import NUM_THREADS
from .extras import need
from .shape import Shape

if TYPE_CHECKING:
    from ..runtime.artifact import Artifact
    from ..runtime.cache import Cache

Run = Callable[[], Any]
Array: TypeAlias = NDArray[np.float32]


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
    q: Array, k: Array, v: Array, shape: Shape, threads: int
) -> tuple[dict[str, Run], Callable[[], None]]:
    """Return torch's SDPA over an unquantized cache, and what gives torch its threads back.

    fp32 and bf16, GQA by flag and folded into the queries. With a sliding window they hold just
    the keys in it. SDPA has no softcap and no learned sinks: such a shape has no peer.

    Args:
        q: [B, H_q, 1, D].
        k: [B, H_kv, N, D].
        v: [B, H_kv, N, Dv].
        shape: scale, window, softcap, sinks.
        threads: for torch.
    """
    if shape.softcap is not None or shape.sinks:
        return {}, lambda: None
    torch = need("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    group = q.shape[1] // k.shape[1]
    first = max(0, k.shape[2] - (shape.window or k.shape[2]))
    attention = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, scale=shape.logit_scale
    )
    peers: dict[str, Run] = {}
    for dtype in (torch.float32, torch.bfloat16):
        tq, tk, tv = (
            torch.from_numpy(np.ascontiguousarray(x)).to(dtype)
            for x in (q, k[:, :, first:], v[:, :, first:])
        )
        folded = tq.reshape(q.shape[0], k.shape[1], group, q.shape[3])
        name = f"torch {torch.__version__} sdpa {str(dtype).removeprefix('torch.')}"
        peers[f"{name} enable_gqa"] = functools.partial(attention, tq, tk, tv, enable_gqa=True)
        peers[f"{name} folded"] = functools.partial(attention, folded, tk, tv)
    return peers, lambda: torch.set_num_threads(before)


def shape_of(artifact: "Artifact") -> Shape:
    """Return the shape of an artifact's layer 0."""
    plan = artifact.plan_of(0)
    return Shape(
        plan.q_heads,
        plan.k.heads,
        plan.k.channels,
        plan.v.channels,
        scale=plan.scale,
        softcap=plan.softcap,
        window=plan.window,
        sinks=plan.sinks is not None,
    )


def bench(
    artifact: "Artifact",
    contexts: Sequence[int],
    batches: Sequence[int],
    threads: int,
    say: Callable[[str], None] = lambda stage: None,
    rounds: int = 7,
) -> list[dict[str, Any]]:
    """Time layer 0 of an artifact.

    Args:
        artifact: with the target to time.
        contexts: tokens in the cache.
        batches: rows.
        threads: of our kernels and of each peer.
        say: called with what is being timed.
        rounds: turns of each contestant; the median counts.

    Returns: one row for each context and batch: our time, the peers' times, bytes and error.
    """
    rng = np.random.default_rng(0)
    shape = shape_of(artifact)
    rows = []
    with _threads(threads):
        for context in contexts:
            for batch in batches:
                say(f"timing context {context:,}, batch {batch}")
                size = (batch, shape.kv_heads, context)
                k = rng.standard_normal((*size, shape.head_dim), dtype=np.float32)
                v = rng.standard_normal((*size, shape.values), dtype=np.float32)
                q = rng.standard_normal((batch, shape.heads, 1, shape.head_dim), dtype=np.float32)
                rows.append(_row(artifact, shape, (q, k, v), threads, rounds))
    return rows


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Give our kernels a number of threads while the block runs."""
    before = os.environ.get(NUM_THREADS.name)
    os.environ[NUM_THREADS.name] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ[NUM_THREADS.name]
        else:
            os.environ[NUM_THREADS.name] = before


def _row(
    artifact: "Artifact", shape: Shape, qkv: tuple[Array, Array, Array], threads: int, rounds: int
) -> dict[str, Any]:
    q, k, v = qkv
    cache = artifact.new_cache(batch=q.shape[0], max_tokens=k.shape[2] + 1)
    cache.append(0, k, v)
    cache.flush_layer(0)
    peers, restore = torch_peers(q, k, v, shape, threads)
    try:
        times = interleave({"kvant": lambda: cache.attend(0, q)} | peers, rounds)
    finally:
        restore()
    ours = times.pop("kvant")
    size = cache.bytes()
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
        "max_error": _error(artifact, cache, q),
        "peers": {name: timing.median for name, timing in times.items()},
    }


def _error(artifact: "Artifact", cache: "Cache", q: Array) -> float:
    """Return max |kernel - reference| over the very bits that are stored, by max |reference|."""
    from ..runtime.launch_reference import Kernels

    reference = Kernels(artifact.plans, artifact.constants)
    expected, _ = reference.attend(0, q, *cache.layers[0].streams)
    return float(np.abs(cache.attend(0, q) - expected).max() / np.abs(expected).max())


def pays_from(rows: Sequence[Mapping[str, Any]]) -> dict[int, int | None]:
    """Return for each batch the least measured context from which on we beat the best peer.

    None: not at the longest measured one. A row without peers is beaten by nobody.
    """
    found: dict[int, int | None] = {}
    for row in sorted(rows, key=lambda row: (row["batch"], -int(row["context"]))):
        batch, wins = row["batch"], row["ms"] < min(row["peers"].values(), default=math.inf)
        if batch not in found:
            found[batch] = row["context"] if wins else None
            beaten = not wins
        elif wins and not beaten:
            found[batch] = row["context"]
        else:
            beaten = True
    return found


def bench_artifact(
    path: str,
    target: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    threads: int,
    say: Callable[[str], None] = lambda stage: None,
) -> list[dict[str, Any]]:
    """Load an artifact and time its layer 0; see `bench`."""
    from ..runtime.artifact import load

    return bench(load(path, target=target), contexts, batches, threads, say)


def bench_shape(
    shape: Shape,
    recipe: str,
    target: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    threads: int,
    say: Callable[[str], None] = lambda stage: None,
) -> list[dict[str, Any]]:
    """Compile a shape into a temporary artifact and time it; see `bench`."""
    from .driver import compile

    with tempfile.TemporaryDirectory(prefix="kvant-") as folder:
        artifact = compile(shape, recipe, [target], out=Path(folder) / "bench.kvant", progress=say)
        return bench(artifact, contexts, batches, threads, say)
