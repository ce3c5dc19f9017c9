"""Random plans and scripts for the cache, with lengths around groups and pages."""

from dataclasses import replace
from typing import Any

import numpy as np

from kvant.ir.encodings import (
    Bfp,
    Dense,
    Drop,
    Format,
    Int,
    Lut,
    Raw,
    Slice,
    Slices,
    Sparse,
    Term,
    Tokens,
)
from kvant.ir.encodings.lut import LLOYD
from kvant.ir.layouts import page_tokens
from kvant.ir.maps import Gather, Hadamard, Map, Scale
from kvant.ir.plan import AttentionPlan, StreamPlan

from .cache_oracle import Constants
from .cache_runner import Case, Step


def random_format(rng: Any, channels: int) -> Format:
    if rng.random() < 0.8:
        return random_term(rng, channels)
    cuts = np.flatnonzero(rng.random(channels // 16 - 1) < 0.5) + 1
    widths = 16 * np.diff([0, *cuts, channels // 16])
    slices = [Slice(int(width), random_term(rng, int(width))) for width in widths]
    if len(slices) > 1 and rng.random() < 0.4:
        place = int(rng.integers(len(slices)))
        slices[place] = Slice(slices[place].width, Drop())
    return Slices(tuple(slices))


def random_term(rng: Any, channels: int) -> Term:
    """A format for a whole head, or for one slice of 16 channels or more; sparse now and then."""
    fmt = random_plain(rng, channels)
    if isinstance(fmt, Raw) or rng.random() < 0.8:
        return fmt
    values = str(rng.choice(["f16", "bf16", "f32"]))
    limit = float(rng.choice([0.0, 1.0, 2.5]))
    return Sparse(fmt, int(rng.choice([1, 2, 5])), limit, values)  # type: ignore[arg-type]


def random_plain(rng: Any, channels: int) -> Raw | Dense:
    """A format without sparse entries."""
    kind = rng.choice(["raw", "int", "int", "int", "int", "bfp", "lut"])
    if kind == "raw":
        return Raw(str(rng.choice(["f32", "bf16", "f16"])))  # type: ignore[arg-type]
    if kind == "bfp":
        return Bfp(int(rng.choice([4, 8])), int(np.gcd(channels, rng.choice([16, 32]))))
    if kind == "lut":
        table, own = LLOYD[bits := int(rng.choice([2, 3, 4]))]
        group = int(np.gcd(channels, rng.choice([16, 32, 64])))
        return Lut(bits, group, table, own if rng.random() < 0.5 else None)
    axis = str(rng.choice(["token", "channel"]))
    groups = [16, int(np.gcd(channels, 32)), channels] if axis == "token" else [16, 32, 64, 128]
    return Int(
        bits=int(rng.choice([2, 3, 4, 8])),
        axis=axis,  # type: ignore[arg-type]
        group=int(rng.choice(groups)),
        zero=str(rng.choice(["float", "int", "none"])),  # type: ignore[arg-type]
        params=str(rng.choice(["f16", "bf16", "f32"])),  # type: ignore[arg-type]
    )


def random_tokens(rng: Any, channels: int) -> Tokens:
    rest = random_format(rng, channels)
    sink = int(rng.choice([0, 0, 1, 4, 50]))
    raw = Raw("bf16" if rng.random() < 0.2 else "f32")
    if rng.random() < 0.3:
        recent = rest.group_tokens * int(rng.choice([1, 2]))
        recent = max(recent, 16) if rest.group_tokens == 1 else recent
        return Tokens(rest, sink, recent, "block", raw)
    return Tokens(rest, sink, int(rng.choice([0, 0, 3, 40])), "group", raw)


def random_plan(rng: Any) -> tuple[AttentionPlan, Constants]:
    """A plan over the encodings, with online maps now and then, and the constants it names."""
    heads, group, d, dv = (int(rng.choice(c)) for c in ([1, 2, 3], [1, 2, 4], [32, 64], [32, 64]))
    maps = [(), (), (Hadamard(d),), (Gather("order"),), (Scale("values"), Hadamard(d))]
    k_maps: tuple[Map, ...] = maps[int(rng.integers(len(maps)))]
    k_tokens, v_tokens = random_tokens(rng, d), random_tokens(rng, dv)
    constants = {
        "order": np.stack([rng.permutation(d) for _ in range(heads)]),
        "values": rng.uniform(0.5, 2.0, (heads, d)).astype(np.float32),
        "sinks": rng.normal(size=heads * group).astype(np.float32),
    }
    v_maps: tuple[Map, ...] = (Hadamard(dv),) if rng.random() < 0.2 else ()
    rest = k_tokens.rest
    is_int = any(tokens.quantizes for tokens in (k_tokens, v_tokens))
    plan = AttentionPlan(
        q_heads=heads * group,
        scale=float(d**-0.5),
        softcap=20.0 if rng.random() < 0.2 else None,
        window=int(rng.choice([1, 7, 64, 100])) if rng.random() < 0.3 else None,
        q_maps=tuple(replace(m, inverse=True) if isinstance(m, Scale) else m for m in k_maps),
        k=StreamPlan("k", heads, d, k_maps, k_tokens, page_tokens(rest)),
        v=StreamPlan("v", heads, dv, v_maps, v_tokens, page_tokens(v_tokens.rest)),
        out_maps=v_maps,
        compute="int" if is_int and rng.random() < 0.5 else "float",
        sinks="sinks" if rng.random() < 0.2 else None,
    )
    return plan, constants


def make_case(
    rng: Any,
    plan: AttentionPlan | None = None,
    constants: Constants | None = None,
    most_columns: int = 300,
    most_appends: int = 8,
    most_queries: int = 1000,
) -> Case:
    """A case whose lengths sit around groups and pages.

    Args:
        rng: a numpy Generator.
        plan: use this plan (compiled kernels are dear); a random one if not given.
        constants: of that plan.
        most_columns: of the whole script.
        most_appends: in it, each with an attend after it.
        most_queries: of an attend.
    """
    if plan is None:
        plan, constants = random_plan(rng)
    g, page = plan.k.tokens.rest.group_tokens, plan.k.page_tokens
    edges = [0, 1, 1, 1, 2, g - 1, g, g + 1, page - 1, page, page + 1, plan.k.tokens.recent, 33]
    batch, steps, total = int(rng.choice([1, 1, 2, 3])), [], 0
    start = tuple(int(s) for s in rng.integers(0, 40, batch)) if rng.random() < 0.4 else None
    for _ in range(int(rng.integers(min(3, most_appends), most_appends + 1))):
        tokens = int(rng.choice(edges))
        if total + tokens > most_columns:
            continue
        lengths = None
        if rng.random() < 0.2:
            lengths = tuple(int(n) for n in rng.integers(0, tokens + 1, batch))
        steps += [
            ("append", tokens, lengths),
            ("attend", int(rng.choice([1, 1, 3, min(max(1, tokens), most_queries)]))),
        ]
        total += tokens
        steps += random_extra(rng, batch)
    seed, layers = int(rng.integers(2**31)), int(rng.choice([1, 1, 2]))
    return Case(plan, constants or {}, batch, start, tuple(steps), seed, layers)


def random_extra(rng: Any, batch: int) -> list[Step]:
    """Now and then something other than append and attend."""
    choice = rng.random()
    if choice < 0.15:
        return [("flush",), ("attend", 2)]
    if choice < 0.35:
        return [("truncate", int(rng.choice([0, 1, 5, 16, 32, 64, 10_000]))), ("attend", 1)]
    if choice < 0.45:
        return [("reserve", int(rng.choice([0, 4, 20])))]
    if choice < 0.6:
        return [("reorder", tuple(int(i) for i in rng.integers(0, batch, batch))), ("attend", 2)]
    return []
