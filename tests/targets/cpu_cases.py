"""Plans for the tests of the target cpu, and their compiled kernels: compiled once a session.

The workers of a session share what they compile through a folder (`tests/conftest.py`).
"""

import hashlib
import os
import pickle
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kvant.ir.arrays import Array
from kvant.ir.encodings import Bfp, Drop, Int, Lut, Raw, Slice, SliceFormat, Slices, Sparse, Tokens
from kvant.ir.encodings.lut import LLOYD, NF4
from kvant.ir.encodings.tokens import Format
from kvant.ir.layouts import page_tokens
from kvant.ir.maps import Gather, Hadamard, Map, Scale
from kvant.ir.plan import AttentionPlan, StreamPlan
from kvant.runtime.launch_cpu import Kernels
from kvant.targets.cpu import compile_cpu, emit, this_cpu
from kvant.targets.machines import Cpu

Constants = dict[str, Array]
BOTH = {"sink": 4}
COMPILED = "KVANT_TEST_COMPILED"  # names the folder


def stream(role: str, fmt: Format, heads: int, channels: int, **tokens: Any) -> StreamPlan:
    return StreamPlan(role, heads, channels, (), Tokens(fmt, **tokens), page_tokens(fmt))


def plan_of(
    k: Format,
    v: Format,
    heads: int = 2,
    group: int = 2,
    d: int = 64,
    dv: int | None = None,
    *,
    k_tokens: dict[str, Any] | None = None,
    v_tokens: dict[str, Any] | None = None,
    compute: str = "float",
    softcap: float | None = None,
    window: int | None = None,
    sinks: str | None = None,
) -> AttentionPlan:
    return AttentionPlan(
        heads * group,
        d**-0.5,
        softcap,
        window,
        (),
        stream("k", k, heads, d, **(k_tokens or {})),
        stream("v", v, heads, dv or d, **(v_tokens or {})),
        (),
        compute,  # type: ignore[arg-type]
        sinks,
    )


def mapped(plan: AttentionPlan, *maps: Map, v_maps: tuple[Map, ...] = ()) -> AttentionPlan:
    """The plan with online maps on K (and their duals on q), and on V (undone on the output)."""
    dual = tuple(replace(m, inverse=not m.inverse) if isinstance(m, Scale) else m for m in maps)
    k, v = replace(plan.k, maps=maps), replace(plan.v, maps=v_maps)
    return replace(plan, k=k, v=v, q_maps=dual, out_maps=v_maps)


def constants_of(plan: AttentionPlan) -> Constants:
    rng, shape = np.random.default_rng(7), (plan.k.heads, plan.k.channels)
    return {
        "kvant.order": np.stack([rng.permutation(shape[1]) for _ in range(shape[0])]),
        "kvant.values": rng.uniform(0.5, 2.0, shape),
        "kvant.sinks": rng.normal(size=plan.q_heads),
    }


def files_of(plan: AttentionPlan, cpu: Cpu | None = None) -> dict[str, bytes]:
    """Compiled for a processor, by default the best that fits this machine."""
    return _files_of(plan, cpu or this_cpu())


@lru_cache(maxsize=64)
def _files_of(plan: AttentionPlan, cpu: Cpu) -> dict[str, bytes]:
    source = emit(plan, cpu)
    name = hashlib.sha256(f"{cpu}\n{plan}\n{source.text()}".encode()).hexdigest()
    path = Path(os.environ[COMPILED]) / name
    if not path.exists():
        own = path.with_suffix(f".{os.getpid()}")
        own.write_bytes(pickle.dumps(compile_cpu(source, cpu)))
        own.replace(path)
    files: dict[str, bytes] = pickle.loads(path.read_bytes())
    return files


def kernels_of(
    plans: list[AttentionPlan], constants: list[Constants], cpu: Cpu | None = None
) -> Kernels:
    keys = [f"p{plans.index(plan)}" for plan in plans]
    files = {
        f"{key}/{name}": data
        for key, plan in zip(keys, plans, strict=True)
        for name, data in files_of(plan, cpu).items()
    }
    return Kernels(plans, constants, keys, files)


@lru_cache(maxsize=128)
def _loaded(plan: AttentionPlan, layers: int) -> Kernels:
    return kernels_of([plan] * layers, [constants_of(plan)] * layers)


def loaded(plans: list[AttentionPlan], constants: list[Constants]) -> Kernels:
    """As `kernels_of`, for equal layers with `constants_of` their plan; loaded once a session."""
    return _loaded(plans[0], len(plans))


def int_format(bits: int, axis: str, group: int, **fields: Any) -> Int:
    return Int(bits, axis, group, **fields)  # type: ignore[arg-type]


def slices(*parts: tuple[int, SliceFormat]) -> Slices:
    return Slices(tuple(Slice(width, fmt) for width, fmt in parts))


HEADLINE = plan_of(
    int_format(4, "token", 128), int_format(4, "token", 128), d=128, k_tokens=BOTH, v_tokens=BOTH
)
INTEGER = replace(HEADLINE, compute="int")
KIVI = plan_of(
    int_format(2, "channel", 32),
    int_format(2, "token", 32),
    k_tokens={"recent": 32, "flush": "block"},
    v_tokens={"recent": 40},
)
SPLIT = plan_of(
    slices((48, int_format(2, "channel", 32)), (16, int_format(8, "channel", 64))),
    slices((16, Drop()), (48, int_format(2, "token", 16))),
    k_tokens={"sink": 4, "recent": 64, "flush": "block"},
    v_tokens={"sink": 4, "recent": 32},
)
DENSE_SPARSE = plan_of(
    Sparse(int_format(4, "channel", 32), 2, limit=1.0),
    Sparse(int_format(4, "token", 64), 3),
    k_tokens={"recent": 32, "flush": "block"},
    v_tokens={"recent": 32},
)
LUT = plan_of(
    Lut(4, 40, NF4, params="bf16"),
    slices((32, Lut(2, 16, (-63, -3, 5, 40), sigmas=1.5)), (32, Sparse(Lut(3, 32, *LLOYD[3]), 2))),
    d=80,
    dv=64,
    group=3,
    v_tokens={"sink": 2},
)

# Integer dot products: each format that has them, on both sides, with many scales and with one.
INTEGER_PLANS: dict[str, AttentionPlan] = {
    "kivi-2bit-int": replace(KIVI, compute="int"),
    "int3-int": plan_of(
        int_format(3, "channel", 32, params="f32", zero="none"),
        int_format(3, "token", 64, zero="int"),
        heads=1,
        group=8,
        d=128,
        dv=64,
        compute="int",
        window=100,
    ),
    "int8-channel-int": plan_of(
        int_format(8, "channel", 48, zero="int", params="bf16"),
        int_format(8, "channel", 64),
        group=3,
        d=48,
        dv=32,
        compute="int",
    ),
    "int8-int": plan_of(
        int_format(8, "token", 32, zero="none"),
        int_format(8, "token", 32, zero="none", params="f32"),
        group=1,
        d=256,
        dv=128,
        compute="int",
        k_tokens={"sink": 3},
        v_tokens={"sink": 3, "recent": 40},
    ),
    "bfp-int": plan_of(
        Bfp(8, 12),
        Bfp(4, 32),
        heads=6,
        group=12,
        d=72,
        dv=64,
        compute="int",
        softcap=20.0,
        v_tokens={"recent": 64, "flush": "block"},
    ),
    "int4-groups-d192-int": plan_of(
        int_format(4, "token", 64, zero="int"),
        int_format(4, "channel", 32, zero="none"),
        group=5,
        d=192,
        dv=80,
        compute="int",
        window=130,
    ),
    "split-2bit-int": replace(SPLIT, compute="int"),
    "slices-int": plan_of(
        slices(
            (32, int_format(4, "channel", 32)), (16, Drop()), (32, int_format(8, "channel", 64))
        ),
        slices(
            (16, Lut(4, 16, NF4)), (32, Sparse(int_format(4, "channel", 32), 2)), (16, Bfp(8, 16))
        ),
        d=80,
        dv=64,
        group=3,
        compute="int",
    ),
    "dense-sparse-int": replace(DENSE_SPARSE, compute="int"),
    "sparse-groups-int": plan_of(
        Sparse(Bfp(4, 16), 3, values="f32"),
        Sparse(int_format(8, "channel", 32), 2, limit=0.5, values="bf16"),
        group=3,
        compute="int",
        k_tokens={"sink": 2},
        v_tokens={"sink": 2},
    ),
    "lut4-int": plan_of(
        Lut(4, 32, NF4, params="bf16"),
        Lut(4, 64, *LLOYD[4]),
        heads=3,
        group=1,
        compute="int",
    ),
    "lut3-int": plan_of(
        Lut(3, 96, *LLOYD[3], params="f32"),
        Lut(2, 32, (-63, -3, 5, 40)),
        group=5,
        d=96,
        dv=64,
        compute="int",
        k_tokens={"recent": 24},
        v_tokens={"recent": 40},
    ),
}

# Each format stands on both sides, each option somewhere; head sizes 32 to 256, groups 1 to 8.
PLANS: dict[str, AttentionPlan] = {
    "int4-token": HEADLINE,
    "int4-token-int": INTEGER,
    "kivi-2bit": KIVI,
    "int4-groups-int": plan_of(
        int_format(4, "token", 32, zero="int"),
        int_format(4, "channel", 16, zero="none"),
        group=1,
        compute="int",
    ),
    "int8-groups-int": plan_of(
        int_format(8, "token", 32, params="f32"),
        int_format(8, "channel", 48, zero="int", params="bf16"),
        group=5,
        compute="int",
        k_tokens={"sink": 2},
        v_tokens={"sink": 1},
    ),
    "int4-d80": plan_of(
        int_format(4, "token", 80),
        int_format(3, "token", 96, zero="none"),
        d=80,
        dv=96,
        compute="int",
    ),
    "int3-d96": plan_of(
        int_format(3, "channel", 32, params="f32"),
        int_format(8, "token", 96),
        d=96,
        group=3,
        softcap=20.0,
    ),
    "int2-d256": plan_of(
        int_format(2, "token", 64, zero="int", params="bf16"),
        int_format(3, "channel", 64),
        d=256,
        window=100,
    ),
    "bfp": plan_of(Bfp(4, 16), Bfp(8, 32), group=7, d=32, v_tokens={"sink": 3, "recent": 5}),
    "raw": plan_of(
        Raw("bf16"),
        Raw("f16"),
        group=8,
        window=7,
        v_tokens={"recent": 64, "flush": "block"},
        sinks="kvant.sinks",
    ),
    **INTEGER_PLANS,
    "lut": LUT,
    "split-2bit": SPLIT,
    "slices": plan_of(
        slices(
            (16, Drop()),
            (16, Raw("bf16")),
            (32, Bfp(4, 16)),
            (16, int_format(3, "token", 16, zero="none")),
            (16, int_format(4, "channel", 48, zero="int")),
        ),
        slices((16, Raw("f16")), (32, int_format(3, "channel", 48)), (16, Bfp(8, 8))),
        d=96,
        dv=64,
        group=5,
        softcap=20.0,
    ),
    "dense-sparse": DENSE_SPARSE,
    "sparse": plan_of(
        Sparse(Bfp(4, 16), 1, values="bf16"),
        slices(
            (32, Raw("bf16")),
            (16, Sparse(int_format(3, "channel", 48, zero="int"), 3, limit=0.7)),
            (48, Sparse(int_format(2, "channel", 32, zero="none", params="f32"), 1, values="f32")),
        ),
        d=80,
        dv=96,
        group=5,
        v_tokens={"sink": 3},
    ),
    "ring": plan_of(
        Raw("bf16"),
        Raw("bf16"),
        window=64,
        k_tokens={"raw": Raw("bf16")},
        v_tokens={"raw": Raw("bf16")},
    ),
    "maps": mapped(
        plan_of(int_format(4, "token", 64, clip=0.9), Raw("f32"), k_tokens={"raw": Raw("bf16")}),
        Scale("kvant.values"),
        Gather("kvant.order"),
        Hadamard(64),
        v_maps=(Hadamard(64),),
    ),
}
