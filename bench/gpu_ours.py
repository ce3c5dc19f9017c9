"""Our side of the comparison on a GPU: artifacts compiled elsewhere, and what they store."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_cells
from gpu_peers import Case

from kvant.runtime.artifact import Artifact, load
from kvant.runtime.cache import Cache

Tensor = Any
CHUNK = 4096
"""Tokens that are appended at once while a cache is filled."""
STEPS = 16
ERRORS = {"int8-token": 0.03, "int4-token": 0.3, "quarot-kv2": 1.2}
"""Root mean square of the difference to exact attention, over the output, that an encoding of
normal random data may have. Only `--check` compares the kernels with what the stored bits say."""


def artifact(folder: Path, recipe: str) -> Artifact:
    """Return the artifact of a recipe for this GPU."""
    return load(folder / f"{recipe}-{gpu_cells.SHAPE}.kvant", target="cuda")


def random_case(batch: int, tokens: int, queries: int | None = None) -> Case:
    """Return normal random keys, values and queries on the current GPU.

    `queries`: of a row, [B, Hq, queries, D]; None for one, [B, Hq, D].
    """
    import torch

    draw = torch.Generator("cuda").manual_seed(batch * tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device="cuda", dtype=torch.bfloat16)

    width = gpu_cells.WIDTH
    q = (gpu_cells.HEADS, width) if queries is None else (gpu_cells.HEADS, queries, width)
    kv = batch, gpu_cells.KV_HEADS, tokens, width
    return Case(normal(batch, *q), normal(*kv), normal(*kv))


def filled(art: Artifact, case: Case, room: int = 0) -> Cache:
    """Return a cache of one layer with the keys and values of a case, all that is due encoded."""
    batch, _, tokens, _ = case.k.shape
    cache = art.new_cache(batch=batch, max_tokens=tokens + room)
    for begin in range(0, tokens, CHUNK):
        part = slice(begin, begin + CHUNK)
        cache.append(0, case.k[:, :, part].contiguous(), case.v[:, :, part].contiguous())
        cache.flush()
    return cache


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step over a filled cache, planned: it may run any number of times.

    The last token of the case is the step's own, so that all peers attend to the same tokens.

    Attributes:
        cache: what is attended.
        append: stores the token, and encodes what is due.
        attend: its attention, [B, Hq, D].
    """

    cache: Cache
    append: Callable[[], None]
    attend: Callable[[], Tensor]

    def whole(self) -> Tensor:
        """Append and attend."""
        self.append()
        return self.attend()


def step_of(art: Artifact, case: Case) -> Step:
    """Return the step of a case, after its append ran once."""
    cache = filled(art, Case(case.q, case.k[:, :, :-1], case.v[:, :, :-1]), STEPS)
    steps = cache.decode_steps(STEPS)
    k, v = (x[:, :, -1:].contiguous() for x in (case.k, case.v))
    q = case.q[:, :, None].contiguous()
    steps.plan()
    steps.append(0, k, v)
    return Step(cache, lambda: steps.append(0, k, v), lambda: steps.attend(0, q)[:, :, 0])


def prefill(art: Artifact, case: Case) -> Callable[[], Tensor]:
    """Return a prompt's way through an empty cache: append, encode, attend over what is stored."""
    batch, _, tokens, _ = case.k.shape
    cache = art.new_cache(batch=batch, max_tokens=tokens)

    def call() -> Tensor:
        cache.truncate(0)
        cache.append(0, case.k, case.v)
        cache.flush()
        return cache.attend(0, case.q)

    return call


def error(found: Tensor, want: Tensor) -> float:
    """Return the root mean square of a difference, over that of what is wanted."""
    difference, want = (found.float() - want.float()), want.float()
    return float((difference.square().mean() / want.square().mean()).sqrt())
