"""Tables of codes on every processor: the shuffle, the sums of 16 bits, what a mistake would do."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvant
from kvant.ir.arrangements import ROWS
from kvant.ir.encodings import Lut
from kvant.ir.encodings.lut import LARGEST, LLOYD, NF4
from kvant.runtime.cache import Cache
from kvant.runtime.launch_cpu import Kernels
from kvant.runtime.launch_reference import Kernels as Reference
from kvant.runtime.verify import verify
from kvant.targets import cpu_dots, cpu_encode_lut, cpu_pages
from kvant.targets.cpu import HEAD, compile_cpu, emit, this_cpu
from kvant.targets.cpu_attend import attend
from kvant.targets.cpu_compile import assembly
from kvant.targets.cpu_lookup import operand, shuffled
from kvant.targets.cpu_quads import why_floats
from kvant.targets.machines import CPUS, Cpu
from kvant.targets.source import Source

from ..runtime.cache_runner import Case, run_case
from .cpu_cases import LUT, PLANS, kernels_of, loaded, plan_of
from .test_cpu import compare, filled
from .test_cpu_variants import RUN_HERE

LUT4 = PLANS["lut4-int"]
PAIRS_HERE = [cpu for cpu in RUN_HERE if cpu.dots == "pairs"]
SMALL = plan_of(Lut(4, 64, NF4), Lut(4, 64, *LLOYD[4]), compute="int")
SHUFFLES = {"x86_64": r"\bv?pshufb\b", "aarch64": r"\btbl\b", "arm64": r"\btbl\b"}
SCRIPT = (("append", 140, None), ("append", 40, None), ("attend", 1), ("attend", 3))


@pytest.mark.parametrize("cpu", CPUS.values(), ids=CPUS)
def test_codes_are_looked_up_by_a_shuffle(cpu: Cpu) -> None:
    text = assembly(Source(SMALL, (attend(SMALL, cpu),), HEAD), cpu)
    assert re.search(SHUFFLES[cpu.machine], text)
    call = shuffled(cpu, SMALL.k.tokens.rest.operands, "codes", cpu.vector)  # type: ignore[union-attr]
    assert f'"uint8x{cpu.vector}"' in call


@pytest.mark.parametrize("cpu", RUN_HERE, ids=lambda cpu: cpu.name)
@pytest.mark.parametrize("queries", [1, 9])
def test_every_processor_computes_what_the_pages_say(cpu: Cpu, queries: int) -> None:
    compare(LUT4, [300, 0, 130, 1], queries, cpu)


@pytest.mark.parametrize("cpu", RUN_HERE, ids=lambda cpu: cpu.name)
def test_every_processor_stores_the_same_bytes(cpu: Cpu) -> None:
    compiled, reference = filled(LUT4, [300, 1, 130], cpu=cpu)
    for have, want in zip(compiled.layers[0].streams, reference.layers[0].streams, strict=True):
        high = have.pool.high
        assert high == want.pool.high > 0
        assert np.array_equal(have.layout.arranged(have.pages[:high], ROWS), want.pages[:high])


@pytest.mark.parametrize("cpu", PAIRS_HERE, ids=lambda cpu: cpu.name)
def test_the_largest_products_fit_their_sums(cpu: Cpu) -> None:
    """All codes at the last entry, all integers at 127: a sum that saturates would be wrong."""
    fmt = Lut(2, 64, (-LARGEST, -1, 1, LARGEST), params="f32")
    plan = plan_of(fmt, fmt, heads=1, compute="int")
    rng, caches = np.random.default_rng(0), []
    ones = np.ones((1, 1, 64, 64), np.float32)
    k = ones * rng.uniform(1, 2, (1, 1, 64, 1)).astype(np.float32)
    for kernels in (kernels_of([plan], [{}], cpu), Reference([plan], [{}])):
        cache = Cache([plan], kernels, batch=1)
        cache.append(0, k, ones)
        cache.flush()
        caches.append(cache)
    q = np.full((1, 2, 1, 64), 0.01, np.float32)
    (out, lse), (want, want_lse) = (c.attend(0, q, return_lse=True) for c in caches)
    assert np.allclose(out, 1.0, atol=1e-6)
    assert np.allclose(out, want, atol=1e-6)
    assert np.allclose(lse, want_lse, atol=1e-6)


def test_both_streams_are_read_by_integer_dot_products() -> None:
    assert why_floats(LUT4, "k") is None
    assert why_floats(LUT4, "v") is None
    assert why_floats(LUT, "k") == "the recipe says compute = float"


def wrong_shuffle(cpu: Cpu, operands: tuple[int, ...], codes: str, lanes: int) -> str:
    return shuffled(cpu, (*operands[:-1], operands[-1] - 1), codes, lanes)


def wrong_operand(operands: tuple[int, ...], code: str, lanes: int) -> str:
    return operand((*operands[:-1], operands[-1] - 1), code, lanes)


@pytest.mark.parametrize(
    ("name", "module", "what", "wrong"),
    [
        ("lut4-int", cpu_dots, "shuffled", wrong_shuffle),
        ("lut4-int", cpu_pages, "operand", wrong_operand),
        ("lut", cpu_pages, "operand", wrong_operand),
    ],
)
def test_an_entry_that_is_wrong_by_one_is_seen(
    name: str, module: Any, what: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, cpu = PLANS[name], this_cpu()
    case = Case(plan, {}, 1, None, SCRIPT, seed=3)
    run_case(loaded, case)
    monkeypatch.setattr(module, what, wrong)
    files = {f"p0/{name}": data for name, data in compile_cpu(emit(plan, cpu), cpu).items()}
    with pytest.raises(AssertionError, match="times what P7 allows"):
        run_case(lambda plans, own: Kernels(plans, own, ["p0"], files), case)


def test_a_threshold_on_the_wrong_side_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers in the middle of two entries: the lower one is stored."""
    fmt = Lut(2, 64, (-6, -2, 2, 6), params="f32")
    plan = plan_of(fmt, fmt)
    x = np.tile(np.array([6, 4, 0, -4], np.float32), (1, 2, 3, 16))

    def pages(kernels: Any) -> bytes:
        cache = Cache([plan], kernels, batch=1)
        cache.append(0, x, x)
        cache.flush()
        return cache.layers[0].streams[0].pages[0].tobytes()

    want = pages(Reference([plan], [{}]))
    assert pages(kernels_of([plan], [{}])) == want
    right = cpu_encode_lut._code
    monkeypatch.setattr(
        cpu_encode_lut, "_code", lambda *a: right(*a).replace("value >", "value >=")
    )
    cpu = this_cpu()
    files = {f"p0/{name}": data for name, data in compile_cpu(emit(plan, cpu), cpu).items()}
    assert pages(Kernels([plan], [{}], ["p0"], files)) != want


@pytest.mark.parametrize("recipe", ["nf4", "turboquant-4bit"])
def test_the_recipes_compute_what_the_stored_bits_say(recipe: str, tmp_path: Path) -> None:
    shape = kvant.Shape(4, 2, 64)
    art = kvant.compile(shape, recipe, ["reference", "cpu"], out=tmp_path / "a")
    (plan,) = set(art.plans)
    assert plan.compute == "int"
    assert plan.query_bits == 8
    assert len(plan.k.maps) == len(plan.v.maps) == (recipe != "nf4")
    assert why_floats(plan, "k") is why_floats(plan, "v") is None
    assert verify(art.path, f"cpu:{this_cpu().name}", art.id)["cases"] > 0
