"""Fixtures: any target's kernels in the tests of the cache, a small artifact for its reader."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kvant.runtime.cache import Cache

from .artifact_maker import Made, make
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


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A new artifact with stand-in code."""
    return make(tmp_path / "tiny.kvant", monkeypatch)
