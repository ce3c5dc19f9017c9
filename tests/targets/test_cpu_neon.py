"""The text for NEON, run here: each of its instructions is replaced by what it computes."""

import re
from dataclasses import replace

import numpy as np
import pytest

from kvant.ir.arrangements import QUAD
from kvant.ir.arrays import Array
from kvant.ir.integers import BLOCK, most_integer
from kvant.targets import cpu_dots, cpu_lookup
from kvant.targets.cpu import HEAD
from kvant.targets.cpu_attend import attend
from kvant.targets.cpu_compile import _lower, assembly
from kvant.targets.cpu_counts import DOT, inner_loops
from kvant.targets.cpu_dots import Add, Dots, dots_of
from kvant.targets.cpu_quads import MOST_WIDE
from kvant.targets.cpu_text import Kernel, at, bits_as, cast, pure
from kvant.targets.machines import CPUS, Cpu
from kvant.targets.source import Source

from .cpu_cases import PLANS, int_format, plan_of
from .test_cpu import compare
from .test_cpu_variants import RUN_HERE

V2 = CPUS["x86-64-v2"]
NEON = [cpu for cpu in CPUS.values() if cpu.dots.startswith("neon")]
# The same text, for LLVM's code of this machine.
TWINS = [
    replace(cpu, name=f"{cpu.name}-twin", triple=V2.triple, mcpu=V2.mcpu, system="Linux")
    for cpu in NEON
]
TWINS = [replace(cpu, machine="x86_64", features=V2.features, fma=False) for cpu in TWINS]
INTRINSIC = re.compile(r"llvm\.aarch64\.neon\.(s|u|us)dot\.v4i32\.v16i8")
SHUFFLE = "llvm.x86.ssse3.pshuf.b.128"


def meaning(intrinsic: str, dtype: str, lanes: int, *arguments: str) -> str:
    """`pure`, without the instructions of NEON: Arm's manual, SDOT, UDOT, USDOT, TBL."""
    if intrinsic == cpu_lookup.NEON_SHUFFLE:
        return pure(SHUFFLE, dtype, lanes, *arguments)
    found = INTRINSIC.fullmatch(intrinsic)
    if found is None:
        assert "aarch64" not in intrinsic, intrinsic
        return pure(intrinsic, dtype, lanes, *arguments)
    total, *factors = arguments
    kinds = {"s": ("int8", "int8"), "u": ("uint8", "uint8"), "us": ("uint8", "int8")}[found[1]]
    wide = (
        cast("int32", bits_as(kind, factor, 16), 16)
        for kind, factor in zip(kinds, factors, strict=True)
    )
    products = " * ".join(wide)
    summands = (f"T.Shuffle([{products}], {[*range(i, 16, 4)]})" for i in range(4))
    return " + ".join([total, *summands])


def meant_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the text for NEON be written as what it means."""
    for module in (cpu_dots, cpu_lookup):
        monkeypatch.setattr(module, "pure", meaning)


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    meant_by(monkeypatch)


def sums(dots: Dots, codes: Array, integers: Array, side: int) -> Array:
    """int32[rows, side * lanes], the sums of the text for u8[quads, side * lanes, 4] codes.

    Args:
        dots: of what.
        codes: of each quad and lane.
        integers: [rows, quads * 4].
        side: vectors.
    """
    import tvm
    from tvm.script import from_source
    from tvm.script import tirx as script
    from tvm.tirx.build import tir_to_runtime

    (rows, width), quads, n = integers.shape, len(codes), dots.lanes
    kernel = Kernel("sums")
    for name, dtype in (("codes", "uint8"), ("given", dots.integers), ("out", "int32")):
        kernel.array(name, dtype)
    kernel.scratch("integers", rows * width, dots.integers)
    dots.declare(kernel, "integers", rows * quads)
    with kernel.block(f"for i in T.serial(T.int64({rows * quads}))"):
        given = at("given", f"i * {QUAD}", QUAD)
        dots.store_integers(kernel, "integers", f"i * {QUAD}", given, QUAD)
    dots.write_layout(kernel, "integers", "T.int64(0)", f"T.int64({rows * quads})")
    dots.declare_sums(kernel, rows * side)
    dots.write_zeros(kernel, rows * side)

    def step(s: str, add: Add) -> None:
        for j in range(side):
            place = f"({s} * {side} + {j}) * {QUAD * n}"
            own = kernel.fresh("codes", at("codes", place, QUAD * n))
            for half, operand in enumerate(dots.operands(own)):
                for r in range(rows):
                    add(r * side + j, half, operand, str(r * quads))

    dots.write_sums(kernel, "integers", rows * side, quads, 1, step, side)
    for i in range(rows * side):
        kernel.line(f"{at('out', str(i * n), n)} = {dots.sum(i)}")
    target = tvm.target.Target({"kind": "llvm", "mtriple": dots.cpu.triple, "mcpu": dots.cpu.mcpu})
    module = tvm.IRModule({"sums": from_source(kernel.source(), {"T": script})})
    run = tir_to_runtime(_lower(module, target), {}, target)
    out = tvm.runtime.tensor(np.zeros(rows * side * n, np.int32))
    given = (tvm.runtime.tensor(x.reshape(-1)) for x in (codes, integers))
    run["sums"](*given, out)
    return np.asarray(out.numpy().reshape(rows, side * n))


FORMATS = {bits: int_format(bits, "token", 64) for bits in (4, 8)}


@pytest.mark.parametrize("cpu", [*TWINS, *RUN_HERE], ids=lambda cpu: cpu.name)
@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.usefixtures("_here")
def test_sums_are_exact_up_to_the_largest(cpu: Cpu, bits: int, signed: bool) -> None:
    """Random ones, and as many of the largest products of either sign as one sum ever has."""
    dots, most = dots_of(FORMATS[bits], cpu, cpu.vector // 4, signed=signed), most_integer(bits)
    rng, quads, side = np.random.default_rng(bits), (MOST_WIDE if signed else BLOCK) // QUAD, 2
    codes = rng.integers(0, 1 << bits, (quads, side * dots.lanes, QUAD)).astype(np.uint8)
    codes[:, 0], codes[:, 1] = (1 << bits) - 1, 0
    integers = rng.integers(-most if signed else 0, most + 1, (3, quads * QUAD))
    integers[0] = most
    integers[1] = -most if signed else most // 2
    want = np.einsum("qtk,rqk->rt", codes.astype(np.int64), integers.reshape(3, quads, QUAD))
    assert np.abs(want).max() == want[0, 0] == most * ((1 << bits) - 1) * quads * QUAD < 2**31
    have = sums(dots, codes, integers.astype(dots.integers), side)
    assert np.array_equal(have, want)


# What is stored of 8 bits by tokens and by channels, one of them with channels for every lane.
TOKEN8, CHANNEL8 = int_format(8, "token", 16), int_format(8, "channel", 32, zero="int")
SMALL = {
    "tokens": plan_of(TOKEN8, CHANNEL8, heads=1, group=3, d=32, dv=16, compute="int"),
    "channels": plan_of(CHANNEL8, TOKEN8, heads=1, group=1, d=32, dv=16, compute="int"),
}
LONG = [
    *SMALL,
    "int8-int",
    "int8-channel-int",
    "bfp-int",
    "slices-int",
    "kivi-2bit-int",
    "lut4-int",
]
LARGE = plan_of(int_format(8, "token", 64), int_format(8, "token", 64), compute="int")
OF_LANES = re.compile(r"\s(?:mul|ml[as]|[su]ml?al?l)2?(?:\.4s)?\s+v\d+(?:\.4s|, v)|\sld1r|\sdup")


@pytest.mark.parametrize(
    ("name", "cpu"),
    [*zip(SMALL, reversed(TWINS), strict=True)],
    ids=lambda x: getattr(x, "name", x),
)
@pytest.mark.usefixtures("_here")
def test_attention_rounds_as_the_reference_rounds(name: str, cpu: Cpu) -> None:
    compare(SMALL[name], [300, 0, 130, 1], 1, cpu)


@pytest.mark.long
@pytest.mark.parametrize("cpu", TWINS, ids=lambda cpu: cpu.name)
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.usefixtures("_here")
def test_attention_over_every_format(name: str, cpu: Cpu, queries: int) -> None:
    compare((PLANS | SMALL)[name], [300, 0, 130, 1], queries, cpu)


@pytest.mark.parametrize("cpu", NEON, ids=lambda cpu: cpu.name)
def test_bytes_are_multiplied_and_words_never(cpu: Cpu) -> None:
    """In loops with dot products: nothing of 32 bits is multiplied, no word is laid out."""
    text = assembly(Source(LARGE, (attend(LARGE, cpu),), HEAD), cpu)
    loops = inner_loops(text, *DOT[cpu.dots][True])
    assert len(loops) > 1
    for body in loops:
        assert not [line for line in body if OF_LANES.search(line)]
    high = r"\busdot" if cpu.dots == "neon-i8mm" else r"\budot"
    assert all(re.search(high + r".*\[3\]", "".join(body)) for body in loops)
