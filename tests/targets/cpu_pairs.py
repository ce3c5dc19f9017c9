"""More plans: with those of `cpu_cases`, pairs of options stand together in some plan.

Options of a stream: role, kind (raw, bfp, int by token or channel, sparse, slices), bits, kind of
zero, type of scales, sink, window, type of the tail. Of a plan: query heads a group, head width,
window or cap of the scores, arithmetic, online maps; and these with kind and bits of K and V. Found
greedily: each plan brings a dozen pairs or more; those of `cpu_pairs_long` bring a few.
"""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

from kvant.ir.encodings import Bfp, Drop, Int, Lut, Raw, Slices, Sparse
from kvant.ir.maps import Gather, Hadamard, Scale
from kvant.ir.plan import AttentionPlan, StreamPlan

from .cpu_cases import int_format, mapped, plan_of, slices

PAIRS: tuple[AttentionPlan, ...] = (
    mapped(
        plan_of(
            Sparse(int_format(2, "token", 32, zero="int"), 4),
            Sparse(Bfp(8, 16), 1, limit=1.0),
            heads=1,
            group=5,
            d=160,
            k_tokens={"sink": 4, "recent": 24, "flush": "block", "raw": Raw("bf16")},
            v_tokens={"sink": 9, "recent": 24, "raw": Raw("f16")},
            window=50,
        ),
        Gather("kvant.order"),
    ),
    plan_of(
        Sparse(int_format(8, "channel", 48, zero="none"), 2, limit=0.5),
        Sparse(int_format(3, "token", 32), 1, values="f32"),
        heads=2,
        group=1,
        d=128,
        softcap=15.0,
        k_tokens={"recent": 40},
        v_tokens={"recent": 32, "flush": "block"},
    ),
    mapped(
        plan_of(
            int_format(8, "channel", 64, zero="none", params="bf16"),
            int_format(2, "token", 32, zero="int", params="f32"),
            heads=2,
            group=5,
            d=96,
            k_tokens={"sink": 1, "recent": 40, "raw": Raw("f16")},
            v_tokens={"sink": 1, "raw": Raw("bf16")},
            window=50,
        ),
        Scale("kvant.values"),
    ),
    mapped(
        plan_of(
            Raw("bf16"),
            Bfp(4, 16),
            heads=1,
            group=1,
            d=160,
            k_tokens={"sink": 4, "recent": 24, "flush": "block", "raw": Raw("bf16")},
            v_tokens={"sink": 9, "recent": 24, "flush": "block", "raw": Raw("bf16")},
            softcap=15.0,
        ),
        Scale("kvant.values"),
    ),
    mapped(
        plan_of(
            Bfp(8, 16),
            Raw("bf16"),
            heads=2,
            group=1,
            d=128,
            k_tokens={"sink": 4},
            v_tokens={"sink": 4, "recent": 20},
            softcap=15.0,
        ),
        Gather("kvant.order"),
    ),
    mapped(
        plan_of(
            Raw("f16"),
            int_format(4, "channel", 32, zero="int", params="f32"),
            heads=1,
            group=8,
            d=128,
            k_tokens={"sink": 9, "recent": 40, "raw": Raw("f16")},
            v_tokens={"sink": 4, "recent": 20},
            softcap=15.0,
        ),
        Hadamard(128),
    ),
    mapped(
        plan_of(
            int_format(8, "token", 32, zero="int", params="bf16"),
            int_format(3, "token", 32, zero="int", params="bf16"),
            heads=2,
            group=1,
            d=32,
            k_tokens={"recent": 24, "flush": "block"},
            v_tokens={"sink": 4, "recent": 40, "raw": Raw("bf16")},
            softcap=15.0,
            compute="int",
        ),
        Hadamard(32),
    ),
    plan_of(
        Raw("f32"),
        Bfp(8, 32),
        heads=1,
        group=3,
        d=128,
        k_tokens={"sink": 9, "recent": 16, "flush": "block", "raw": Raw("f16")},
        v_tokens={"recent": 16, "flush": "block"},
        window=50,
    ),
    plan_of(
        Bfp(8, 16),
        int_format(4, "channel", 64, zero="none", params="f32"),
        heads=2,
        group=3,
        d=160,
        k_tokens={"sink": 4, "raw": Raw("f16")},
        v_tokens={"recent": 64, "flush": "block", "raw": Raw("bf16")},
        window=50,
    ),
    plan_of(
        int_format(4, "channel", 48, params="bf16"),
        Raw("f32"),
        heads=2,
        group=1,
        d=96,
        k_tokens={"sink": 4, "recent": 96, "flush": "block", "raw": Raw("f16")},
        v_tokens={"sink": 4, "recent": 40},
        window=50,
    ),
    mapped(
        plan_of(
            slices((96, int_format(2, "token", 32)), (32, int_format(8, "token", 16))),
            slices((64, Drop()), (16, int_format(4, "token", 16)), (48, Raw("f32"))),
            heads=2,
            group=8,
            d=128,
            k_tokens={"recent": 16, "flush": "block", "raw": Raw("bf16")},
            v_tokens={"sink": 4, "recent": 16, "flush": "block"},
            window=50,
        ),
        Gather("kvant.order"),
    ),
)


def pairs(plans: Iterable[AttentionPlan]) -> set[Any]:
    """All pairs of options that stand together in one of the plans."""
    found: set[Any] = set()
    for plan in plans:
        own = _plan_options(plan)
        found |= {frozenset(pair) for pair in combinations(own.items(), 2)}
        sides = [_stream_options(stream) for stream in (plan.k, plan.v)]
        for options in sides:
            found |= {frozenset(pair) for pair in combinations(options.items(), 2)}
            cross = [(f"{options['role']} {name}", options[name]) for name in ("kind", "bits")]
            found |= {frozenset((one, two)) for one in cross for two in own.items()}
        found.add(("k and v", sides[0]["kind"], sides[1]["kind"]))
    return found


def _stream_options(stream: StreamPlan) -> dict[str, Any]:
    tokens = stream.tokens
    options: dict[str, Any] = {"role": stream.role, "sink": tokens.sink > 0}
    options["window"] = tokens.flush if tokens.recent else "none"
    options["tail"] = tokens.raw.dtype != "f32"
    match tokens.rest:
        case Int(bits=bits, axis=axis, zero=zero, params=params):
            return options | {"kind": axis, "bits": bits, "zero": zero, "params": params}
        case Bfp(mantissa=bits):
            return options | {"kind": "bfp", "bits": f"mantissa {bits}"}
        case Lut(bits=bits, sigmas=sigmas, params=params):
            scale = "largest" if sigmas is None else "mean"
            return options | {"kind": "lut", "bits": bits, "zero": scale, "params": params}
        case Sparse(limit=limit):
            return options | {"kind": "sparse", "bits": "static" if limit else "top"}
        case Slices(slices=parts):
            dropped = any(isinstance(part.format, Drop) for part in parts)
            return options | {"kind": "slices", "bits": "dropped" if dropped else "stored"}
        case Raw(dtype=dtype):
            return options | {"kind": "raw", "bits": dtype}


def _plan_options(plan: AttentionPlan) -> dict[str, Any]:
    width = plan.k.channels
    return {
        "group": "one" if plan.group == 1 else "few" if plan.group <= 4 else "many",
        "width": "small" if width <= 64 else "odd" if width % 64 else "large",
        "limit": "window" if plan.window else "softcap" if plan.softcap else "none",
        "compute": plan.compute,
        "maps": bool(plan.k.maps),
    }
