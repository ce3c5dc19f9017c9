"""The kernel append in Triton's interpreter: one launch, and the reference's bytes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvant.ir.encodings import Sparse
from kvant.ir.errors import KvantError
from kvant.ir.plan import AttentionPlan
from kvant.runtime.cache import Cache
from kvant.runtime.launch_reference import Kernels as Reference
from kvant.targets import gpu
from kvant.targets.gpu import compile_kernels, emit, launch_facts
from kvant.targets.gpu_counts import count, resident
from kvant.targets.machines import GPUS

from ..runtime.cache_bytes import stored_bytes
from ..runtime.cache_runner import random_kv
from .cpu_cases import BOTH, PLANS, constants_of, int_format, plan_of, slices
from .gpu_interpreter import Interpreter, interpreted
from .gpu_tile_plans import TILED

# Channels of keys in groups of 16 tokens and of 64, the latter in two blocks of columns; values in
# blocks of 16 columns and of two.
RAGGED = plan_of(
    slices((64, int_format(4, "channel", 16)), (32, int_format(8, "channel", 64, zero="none"))),
    int_format(4, "channel", 32, zero="int", params="bf16"),
    heads=1,
    d=96,
    dv=36,
    k_tokens={"sink": 2},
    v_tokens={"sink": 2, "recent": 5},
)
PLANS_HERE = {
    "ragged": RAGGED,
    "dense-sparse": PLANS["dense-sparse"],
    "slices": PLANS["slices"],
    "int8-groups": TILED["int8-groups"],
    "maps": PLANS["maps"],
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of as many tokens as on a GPU."""
    monkeypatch.setattr(gpu, "PLAIN_NEW", gpu.DIALECTS["cuda"].new)


def own(plan: AttentionPlan) -> AttentionPlan:
    """The plan under a name of its own: modules of others are kept, with tiles of another size."""
    return replace(plan, scale=0.25)


def filled(kernels: Any, plan: AttentionPlan, as_torch: Any = None) -> Cache:
    """A cache whose rows differ in length: left and right padding, one token and many at once."""
    cache = Cache([plan], kernels, batch=2, max_tokens=256, start=[0, 3])
    rng = np.random.default_rng(11)
    for tokens, lengths in ((75, [75, 31]), (1, None), (6, [0, 6]), (1, None)):
        k, v = random_kv(rng, plan, 2, tokens)
        if as_torch is not None:
            k, v = as_torch(k, v)
        cache.append(0, k, v, lengths)
    cache.reserve(2)
    cache.flush()
    return cache


@pytest.mark.parametrize("name", PLANS_HERE)
def test_bytes_are_those_of_the_reference(name: str, small_tiles: None) -> None:
    plan = own(PLANS_HERE[name])
    constants = [constants_of(plan)]
    here = filled(interpreted([plan], constants), plan)
    there = filled(Reference([plan], constants), plan)
    here.check()
    assert stored_bytes(here) == stored_bytes(there)
    assert here.layers[0].k.encoded.tolist() == there.layers[0].k.encoded.tolist()
    assert all(s.encoded.max() > s.sinks for s in here.layers[0].streams)  # something was encoded


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("ragged", "block * 16", "0 * 16"),
        ("ragged", "(start + later)", "start"),
        ("ragged", "+ tl.load(first + b)", ""),
        ("ragged", "(program - k_encodes) //", "0 * (program - k_encodes) //"),
        ("dense-sparse", "// 16 == block", "// 16 >= 0"),
    ],
)
def test_a_wrong_kernel_is_seen(name: str, old: str, new: str) -> None:
    plan = PLANS_HERE[name]
    constants = [constants_of(plan)]
    here = filled(interpreted([plan], constants, (old, new)), plan)
    assert stored_bytes(here) != stored_bytes(filled(Reference([plan], constants), plan))


def test_new_tokens_of_16_bits_are_taken_as_they_are() -> None:
    plan = plan_of(int_format(4, "token", 32), int_format(4, "token", 32), d=32)
    kernels = interpreted([plan], [{}])
    found = []
    for k_type, v_type in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):

        def given(k: Any, v: Any, types: Any = (k_type, v_type)) -> Any:
            return tuple(torch.from_numpy(x).to(t) for x, t in zip((k, v), types, strict=True))

        def wide(k: Any, v: Any, given: Any = given) -> Any:
            return tuple(x.float() for x in given(k, v))

        one, other = (filled(kernels, plan, as_torch) for as_torch in (given, wide))
        assert stored_bytes(one) == stored_bytes(other)
        found.append(stored_bytes(one))
    assert found[0] != found[1]
    ones = torch.ones(2, dtype=torch.bfloat16)
    assert kernels.memory.fetch(ones).tolist() == [1, 1]  # NumPy has no bfloat16


@pytest.mark.parametrize("name", ["int4-token-int", "kivi-2bit", "maps"])
def test_an_append_is_one_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLANS[name]
    launched: list[str] = []
    monkeypatch.setattr(
        Interpreter, "launch", lambda self, key, kernel, *rest: launched.append(kernel)
    )
    cache = Cache([plan], interpreted([plan], [constants_of(plan)]), batch=2, max_tokens=256)
    for tokens in (70, 1, 1):
        cache.append(0, *random_kv(np.random.default_rng(0), plan, 2, tokens))
    assert launched == ["append"] * 3
    cache.flush()
    due = not cache.layers[0].k.encoded.tolist() == [70, 70]  # a window keeps what is newer
    assert launched == ["append"] * (3 + due)
    cache.flush()
    assert launched == ["append"] * (3 + due)


def test_one_program_encodes_what_fits_its_registers() -> None:
    def programs(k: Any, v: Any, **fields: Any) -> tuple[int, int, int, int]:
        facts = launch_facts(emit(plan_of(k, v, d=128, **fields)))["append"]
        return *facts["k"].values(), *facts["v"].values()

    # (tokens, programs) of k and v: about 1024 numbers, but at least 8 columns of each plane
    token = int_format(4, "token", 128)
    assert programs(token, token) == (4, 1, 4, 1)
    assert programs(int_format(4, "channel", 64), token) == (64, 8, 4, 1)
    assert programs(int_format(2, "channel", 32), token, k_tokens=BOTH) == (32, 4, 4, 1)
    assert programs(int_format(8, "channel", 32), token) == (32, 4, 4, 1)


CHANNELS, TOKENS = int_format(2, "channel", 64), int_format(2, "token", 128)
COUNTED = {
    "channel": plan_of(CHANNELS, TOKENS, d=128),
    "sparse": plan_of(Sparse(int_format(4, "channel", 64), 2), TOKENS, d=128),
    "slices": plan_of(slices((96, CHANNELS), (32, int_format(8, "channel", 64))), TOKENS, d=128),
    "d80": PLANS["int4-d80"],
}


def spills_of(name: str) -> tuple[int, int]:
    """Spills of append in the machine code, and how many blocks share a multiprocessor."""
    source = emit(COUNTED[name])
    kernels = tuple(kernel for kernel in source.kernels if kernel.name == "append")
    made = compile_kernels(replace(source, kernels=kernels), GPUS["sm_90"])["append"]
    found, facts = count(made.binary, "append"), made.facts
    blocks = resident(GPUS["sm_90"], found.registers, facts["shared"], facts["warps"])
    return found.spills, blocks


def test_numbers_of_a_group_stay_in_registers() -> None:
    spills, blocks = spills_of("channel")
    assert spills == 0
    assert blocks >= 4


@pytest.mark.long
@pytest.mark.parametrize("name", COUNTED)
def test_nothing_spills(name: str) -> None:
    assert spills_of(name)[0] == 0


def test_a_scale_that_does_not_fit_is_refused_by_check() -> None:
    plan = PLANS["kivi-2bit"]
    cache = Cache([plan], interpreted([plan], [{}]), batch=2, max_tokens=128)
    k, v = random_kv(np.random.default_rng(0), plan, 2, 66)
    k[1, 0, 3, 7], k[1, 0, 4, 7] = 1e6, -1e6
    cache.append(0, k, v)
    with np.errstate(over="ignore", invalid="ignore"):
        cache.flush()
    with pytest.raises(KvantError) as caught:
        cache.check()
    assert caught.value.code == "scale-overflow"
    assert caught.value.what == "a scale or value of k did not fit its type, row 1, head 0"
    cache.check()  # said once
