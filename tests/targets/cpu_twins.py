"""Two caches that are given the same, one on compiled kernels and one on the reference."""

from collections.abc import Callable

import numpy as np

from kvant.ir.arrays import Array
from kvant.ir.plan import AttentionPlan
from kvant.runtime.cache import Cache
from kvant.runtime.launch_reference import Kernels as Reference

from ..runtime.cache_bytes import stored_bytes
from .cpu_cases import constants_of, loaded


class Twins:
    """A cache on compiled kernels and one on the reference, which knows no short way."""

    def __init__(self, plan: AttentionPlan, start: list[int] | None = None) -> None:
        constants = [constants_of(plan)]
        kernels = (loaded([plan], constants), Reference([plan], constants))
        self.caches = [Cache([plan], own, batch=2, max_tokens=1024, start=start) for own in kernels]
        self.plan, self.rng = plan, np.random.default_rng(0)

    def new(self, tokens: int) -> tuple[Array, Array]:
        k, v = (
            self.rng.normal(size=(2, s.heads, tokens, s.channels)).astype(np.float32)
            for s in (self.plan.k, self.plan.v)
        )
        return k, v

    def append(self, *sizes: int) -> None:
        for size in sizes:
            new = self.new(size)
            for cache in self.caches:
                cache.append(0, *new)

    def both(self, call: Callable[[Cache], object]) -> None:
        for cache in self.caches:
            call(cache)

    def left(self) -> int:
        """How many appends may still go the short way."""
        pace = self.caches[0].layers[0].pace
        return 0 if pace is None else pace.left

    def check(self) -> None:
        own, right = (cache.layers[0] for cache in self.caches)
        for have, want in zip(own.streams, right.streams, strict=True):
            for name in ("held", "encoded", "length"):
                assert np.array_equal(getattr(have, name), getattr(want, name)), name
        assert own.columns.length == right.columns.length
        for column in range(own.columns.length + 1):
            assert np.array_equal(own.columns.counts_at(column), right.columns.counts_at(column))
        assert stored_bytes(self.caches[0]) == stored_bytes(self.caches[1])
