"""Repeated calls of Triton's language compute what its interpreter does, bit for bit."""

from typing import Any

import numpy as np
import pytest

from kvant.runtime.cache import Cache

from ..runtime.cache_bytes import stored_bytes
from ..runtime.cache_runner import random_kv
from . import gpu_replay
from .cpu_cases import PLANS, constants_of
from .cpu_pairs import PAIRS
from .gpu_interpreter import interpreted

CASES = {"maps": PLANS["maps"], "kivi": PLANS["kivi-2bit-int"], "pairs": PAIRS[1]}


def everything(name: str) -> list[bytes]:
    """All bytes that the kernels of a plan write: pages, outputs, log-sum-exps."""
    plan, rng = CASES[name], np.random.default_rng(11)
    kernels = interpreted([plan], [constants_of(plan)])
    cache = Cache([plan], kernels, batch=1, max_tokens=400)
    results: list[bytes] = []
    for tokens, queries in ((70, 3), (1, 1), (70, 1)):
        cache.append(0, *random_kv(rng, plan, 1, tokens))
        q = rng.normal(size=(1, plan.q_heads, queries, plan.k.channels)).astype(np.float32)
        results += [x.tobytes() for x in cache.attend(0, q, return_lse=True)]
    return [*stored_bytes(cache), *results]


@pytest.mark.parametrize("name", CASES)
def test_what_is_repeated_is_what_triton_does(name: str) -> None:
    with gpu_replay.plain():
        want = everything(name)
    assert everything(name) == want  # written down here, at the latest
    assert everything(name) == want


def test_a_wrong_program_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program is held to Triton's own result; where it differs, Triton does each call."""
    real, asked = gpu_replay._tensor_of, []

    def wrong(data: Any, *rest: Any) -> Any:
        asked.append(data)
        return real(data.astype("c8"), *rest)

    monkeypatch.setattr(gpu_replay, "LANGUAGE", gpu_replay.Language())
    monkeypatch.setattr(gpu_replay.interpreter, "_patch_attr", gpu_replay.LANGUAGE.patch)
    with gpu_replay.plain():
        want = everything("maps")
    monkeypatch.setattr(gpu_replay, "_tensor_of", wrong)
    assert everything("maps") == want
    count = len(asked)
    assert everything("maps") == want
    assert len(asked) == count > 0
