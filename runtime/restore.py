"""A cache from the file that `Cache.save` wrote."""

from os import PathLike
from typing import Protocol

from ..ir.plan import AttentionPlan
from .cache import Cache
from .state_file import read_state
from .stream import Ints, Kernels


class Source(Protocol):
    """What `restore` needs to know of an artifact."""

    @property
    def id(self) -> str:
        """Id of the artifact."""

    @property
    def plans(self) -> tuple[AttentionPlan, ...]:
        """One plan per layer."""

    @property
    def kernels(self) -> Kernels:
        """What appends, encodes and attends."""


def restore(source: Source, path: str | PathLike[str]) -> Cache:
    """Return a new cache with the state that `Cache.save` wrote; the file is checked whole.

    Raises: KvantError "state-missing", "state-version", "state-damaged", "state-other-artifact".
    """

    def new_cache(batch: int, max_tokens: int, start: Ints) -> Cache:
        return Cache(
            source.plans,
            source.kernels,
            batch=batch,
            max_tokens=max_tokens,
            start=start,
            artifact_id=source.id,
        )

    return read_state(path, source.id, source.plans, new_cache)
