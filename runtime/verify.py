"""Compare every kernel of an artifact with the reference, on this machine.

Two questions that never share a tolerance:

    stored    do append and encode write what the reference writes? The difference of the decoded
              values, against the error that the encoding makes anyway.
    computed  does attend compute what the stored bits say? The reference attends over the very
              pages that the kernels wrote; the bound is that of `ir/tolerance.py`, which gives
              integer arithmetic no more than float.

Rows of different lengths, sinks, whole and partial pages, tails, and one and several queries take
part; the random numbers are the same every time.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..ir.errors import KvantError
from ..ir.layouts import PageLayout
from ..ir.maps import apply
from ..ir.plan import AttentionPlan, StreamPlan
from ..ir.tolerance import score_rounding, share_of_allowed
from .artifact import Artifact, load, read_contents
from .cache import Cache
from .constants import Array
from .launch_gpu import Kernels as DeviceKernels
from .launch_reference import Kernels as ReferenceKernels
from .launch_reference import read_stream
from .memory import Memory
from .stream import Floats, Kernels, New, Pair, Span, Steps, Stream
from .target import choose_target

BATCH = 2
START = 3
"""First valid column of the second row, so that the rows differ in length."""

STORED_SHARE = 0.2
"""Stored values may differ by this share of the encoding's own error (root mean square): a value
that lies between two codes may fall on either side."""

SINGLE = 12
"""Appends of one token in a row."""
LONGEST_WINDOW = 4096
"""Tokens; a longer sliding window is not filled, because that takes too long."""


@dataclass(frozen=True, slots=True)
class _Shifted:
    """Kernels of one layer of an artifact, for a cache whose only layer is layer 0."""

    kernels: Kernels
    at: int

    @property
    def memory(self) -> Memory:
        """See `stream.Kernels`."""
        return self.kernels.memory

    def layouts(self, layer: int) -> tuple[PageLayout, PageLayout]:
        """See `stream.Kernels`."""
        return self.kernels.layouts(self.at + layer)

    def check(self, streams: Sequence[Stream]) -> None:
        """See `stream.Kernels`."""
        self.kernels.check(streams)

    def update(self, layer: int, streams: Pair, new: New | None, due: tuple[Span, Span]) -> None:
        """See `stream.Kernels`."""
        self.kernels.update(self.at + layer, streams, new, due)

    def steps(self, layer: int, streams: Pair) -> Steps | None:
        """See `stream.Kernels`."""
        return self.kernels.steps(self.at + layer, streams)

    def attend(self, layer: int, q: Floats, k: Stream, v: Stream) -> tuple[Floats, Floats]:
        """See `stream.Kernels`."""
        return self.kernels.attend(self.at + layer, q, k, v)


def _alone(kernels: Kernels, layer: int) -> Kernels:
    """Return the kernels of one layer, for a cache whose only layer is layer 0."""
    return kernels.only(layer) if isinstance(kernels, DeviceKernels) else _Shifted(kernels, layer)


def verify(path: str | Path, target: str = "auto", id: str | None = None) -> dict[str, Any]:
    """Check hashes, compatibility, constants, and every kernel against the reference.

    Every target is checked that was asked for and runs on this machine: of "auto" and of a kind
    such as "cpu" all of them, not only the one that `load` takes.

    Args:
        path: folder of an artifact.
        target: as for `load`.
        id: as for `load`.

    Returns: what was checked, and the largest errors seen, each as a share of what is allowed.
    Raises: KvantError of `load`, or "kernel-disagrees".
    """
    artifact = load(path, target, id)
    contents = read_contents(path, artifact.id)
    also = choose_target(artifact.manifest["targets"], target, os.fspath(path)).also
    others = (load(path, name, artifact.id) for name in also)
    reference = ReferenceKernels(artifact.plans, artifact.constants)
    layers = _representatives(artifact)
    stored, computed, cases = 0.0, 0.0, 0
    for checked in (artifact, *others):
        for layer in layers:
            for result in _check_layer(checked, reference, layer, os.fspath(path)):
                stored, computed = max(stored, result[0]), max(computed, result[1])
                cases += 1
    return {
        "id": artifact.id,
        "recipe": artifact.recipe,
        "target": artifact.target,
        "also_checked": list(also),
        "passed_over": {n: why for n, why in artifact.passed_over.items() if n not in also},
        "files": len(contents.files),
        "bytes": sum(len(data) for data in contents.files.values()),
        "layers": artifact.layer_count,
        "plans": len({entry.plan for entry in artifact.layers}),
        "layers_checked": list(layers),
        "cases": cases,
        "stored_share": stored,
        "computed_share": computed,
    }


def _representatives(artifact: Artifact) -> tuple[int, ...]:
    """Return the first and the last layer of each plan: they differ in nothing but constants."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for entry in artifact.layers:
        first.setdefault(entry.plan, entry.index)
        last[entry.plan] = entry.index
    return tuple(sorted({*first.values(), *last.values()}))


def _check_layer(
    artifact: Artifact, reference: ReferenceKernels, layer: int, where: str
) -> list[tuple[float, float]]:
    """Return (stored, computed) of each case of one layer, as shares of what is allowed."""
    plan, constants = artifact.plans[layer], artifact.constants[layer]
    rng = np.random.default_rng(layer)
    caches = [
        Cache((plan,), _alone(kernels, layer), batch=BATCH, max_tokens=1 << 20, start=[0, START])
        for kernels in (artifact.kernels, reference)
    ]
    history: tuple[list[Floats], list[Floats]] = ([], [])
    results = []
    # So many that with their group they fill more than the sixteen rows of a product of matrices.
    queries = max(5, -(-17 // plan.group))
    for tokens in _steps(plan):
        k, v = (_values(rng, stream, tokens) for stream in (plan.k, plan.v))
        history[0].append(k)
        history[1].append(v)
        for cache in caches:
            # On a device: a tensor of it, for the kernels that come at every token take no other.
            cache.append(0, cache.memory.place(k), cache.memory.place(v))
        shares = []
        for i, stream in enumerate((plan.k, plan.v)):
            given = apply(stream.maps, np.concatenate(history[i], axis=2), constants)
            ours, theirs = (cache.layers[0].streams[i] for cache in caches)
            shares.append(_stored_share(ours, theirs, given))
        q = rng.standard_normal((BATCH, plan.q_heads, min(tokens, queries), plan.k.channels))
        error = computed_share(caches[0], reference, layer, plan, q.astype(np.float32))
        results.append((max(shares), error))
        caches[0].check()
        if not max(shares) <= 1.0 or not error <= 1.0:
            _disagrees(artifact, layer, caches[0].length, max(shares), error, where)
    return results


def _steps(plan: AttentionPlan) -> list[int]:
    """Return sizes of appends that pass every boundary: sink, group, recent, page, and one more.

    A sliding window, unless it is very long, is passed too: its first pages are given back.
    """
    streams = (plan.k, plan.v)
    raw = max(s.tokens.sink + s.tokens.recent for s in streams)
    page = max(s.page_tokens for s in streams)
    # Single tokens at the end: a decoding loop, which has a kernel of its own on the CPU.
    steps = [5, raw + page, 1, page + 7, *[1] * SINGLE]
    if plan.window is None or plan.window > LONGEST_WINDOW:
        return steps
    return [*steps, plan.window + page, 1, 5]


def _values(rng: np.random.Generator, stream: StreamPlan, tokens: int) -> Floats:
    """Return keys or values with a few large channels, as real ones have, f32[B, H, T, D].

    Each eighth token has one channel that is far larger still: an outlier by any threshold.
    """
    x = rng.standard_normal((BATCH, stream.heads, tokens, stream.channels))
    x *= np.exp(rng.standard_normal((1, stream.heads, 1, stream.channels)))
    x[:, :, ::8, rng.integers(stream.channels)] *= 16.0
    return x.astype(np.float32)


def _stored_share(ours: Stream, theirs: Stream, given: Array) -> float:
    """Return the difference of what two streams hold, as a share of what is allowed."""
    a, b = read_stream(ours), read_stream(theirs)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    padding = given.shape[2] - ours.length
    exact = np.zeros_like(b)
    for row, skip in enumerate(padding.tolist()):
        exact[row, :, : given.shape[2] - skip] = given[row, :, skip:]
        exact[row, :, ours.sinks : int(ours.held[row])] = 0.0  # given back: read as zeros
    # Maps in float32 round by about 2^-22 of the largest value before anything is encoded.
    allowed = STORED_SHARE * _rms(b - exact) + 2.0**-20 * float(np.abs(exact).max(initial=0.0))
    return _rms(a - b) / allowed if allowed else 0.0


def computed_share(
    cache: Cache, reference: ReferenceKernels, layer: int, plan: AttentionPlan, q: Floats
) -> float:
    """Return the error of attend over the same pages, as a share of what is allowed."""
    k, v = cache.layers[0].streams
    memory = cache.memory
    given = memory.place(q)
    if q.shape[2] == 1:  # the way of a decoding loop
        found = cache.attend(0, given, return_lse=True)
    else:
        found = cache.kernels.attend(0, given, k, v)
    out, lse = (memory.fetch(x) for x in found)
    *right, slack = reference.attend_and_slack(np.float64, layer, q, k, v)
    plain = reference.attend_in(np.float32, layer, q, k, v)
    floor = score_rounding(reference.queries(layer, q), read_stream(k), plan.scale)
    largest = float(np.abs(read_stream(v)).max(initial=0.0))
    return max(
        share_of_allowed(out, right[0], plain[0], floor * largest + slack),
        # One number a query: the last axis is 1 long.
        share_of_allowed(lse[..., None], right[1][..., None], plain[1][..., None], floor),
    )


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def _disagrees(
    artifact: Artifact, layer: int, length: int, stored: float, computed: float, where: str
) -> NoReturn:
    raise KvantError(
        "kernel-disagrees",
        f"the kernels of {artifact.target} differ from the reference in layer {layer} after "
        f"{length} tokens: stored values by {stored:.3g} times what is allowed, outputs by "
        f"{computed:.3g} times",
        where=f"{where}/targets/{artifact.target}/{artifact.layers[layer].plan}",
        fix="do not use this artifact on this machine; compile again, and report the lines above",
    )
