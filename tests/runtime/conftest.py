"""Fixtures through which any target's kernels run the tests of the cache."""

from collections.abc import Callable

import pytest

from kvant.runtime.cache import Cache

from .cache_random import make_case
from .cache_runner import Case, run_case


@pytest.fixture(scope="session")
def cache_case() -> Callable[..., Cache]:
    """run_case(kernels_factory, case, exact=False); see cache_runner.py."""
    return run_case


@pytest.fixture(scope="session")
def random_case() -> Callable[..., Case]:
    """make_case(rng, plan=None, constants=None); see cache_random.py."""
    return make_case
