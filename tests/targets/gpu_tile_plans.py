"""Plans whose pages are tiles: every kind of what the matrix units read as it is stored."""

from dataclasses import replace
from typing import Any

from kvant.ir.encodings import Bfp, Drop, Lut, Sparse
from kvant.ir.encodings.lut import NF4
from kvant.ir.maps import Gather, Hadamard, Scale
from kvant.ir.plan import AttentionPlan

from .cpu_cases import BOTH, int_format, mapped, plan_of, slices

IN_BLOCKS: dict[str, Any] = {"recent": 128, "flush": "block"}

# All of one query a row: groups 1 to 9, heads of 64 to 256 channels, one KV head or two.
TILED: dict[str, AttentionPlan] = {
    "int4": plan_of(
        int_format(4, "token", 128), int_format(4, "token", 128), heads=1, d=128, compute="int"
    ),
    "int4-ring": plan_of(
        int_format(4, "token", 64),
        int_format(4, "token", 64),
        group=1,
        compute="int",
        k_tokens=BOTH,
        v_tokens=BOTH,
        window=150,
    ),
    "int8": plan_of(
        int_format(8, "token", 64, zero="none"),
        int_format(8, "token", 64),
        group=3,
        compute="int",
    ),
    "int8-groups": plan_of(
        int_format(8, "token", 32),
        int_format(8, "token", 32, zero="int"),
        heads=1,
        group=4,
        compute="int",
        v_tokens={"recent": 30},
    ),
    "int2": plan_of(
        int_format(2, "token", 64, zero="int"),
        int_format(2, "token", 64, zero="none"),
        heads=1,
        group=9,
        compute="int",
        k_tokens={"sink": 4},
        v_tokens={"sink": 4},
    ),
    "int3": plan_of(
        int_format(3, "token", 128),
        int_format(3, "token", 64),
        heads=1,
        d=128,
        compute="int",
        v_tokens={"recent": 20},
    ),
    "int3-channel": plan_of(
        int_format(3, "channel", 64),
        int_format(3, "token", 16, zero="none"),
        heads=1,
        group=2,
        compute="int",
        k_tokens=IN_BLOCKS,
    ),
    "int3-d96": plan_of(
        int_format(3, "channel", 128, zero="int"),
        int_format(3, "token", 48, zero="int"),
        heads=1,
        group=4,
        d=96,
        compute="int",
        k_tokens=IN_BLOCKS,
        v_tokens={"recent": 30},
    ),
    "int3-d256": plan_of(
        int_format(3, "token", 64, zero="none"),
        int_format(3, "token", 256),
        heads=1,
        group=2,
        d=256,
        compute="int",
    ),
    "int4-int8": plan_of(
        int_format(4, "token", 32, zero="int"),
        int_format(8, "token", 32, zero="none", params="bf16"),
        heads=1,
        group=5,
        compute="int",
        softcap=20.0,
    ),
    "int4-d96": plan_of(
        int_format(4, "token", 96, params="f32"),
        int_format(4, "token", 48),
        heads=1,
        group=6,
        d=96,
        compute="int",
    ),
    "int4-d256": plan_of(
        int_format(4, "token", 256),
        int_format(8, "token", 256, zero="float", params="bf16"),
        heads=1,
        group=2,
        d=256,
        compute="int",
    ),
    "kivi2": plan_of(
        int_format(2, "channel", 64),
        int_format(2, "token", 32),
        heads=1,
        d=128,
        compute="int",
        k_tokens=IN_BLOCKS,
        v_tokens={"recent": 40},
    ),
    "kivi4": plan_of(
        int_format(4, "channel", 128, zero="none"),
        int_format(4, "token", 32, zero="int"),
        heads=1,
        group=7,
        compute="int",
        k_tokens=IN_BLOCKS | BOTH,
        v_tokens=BOTH,
        softcap=20.0,
    ),
    "kivi4-int": plan_of(
        int_format(4, "channel", 64, zero="int"),
        int_format(4, "token", 64),
        heads=1,
        group=8,
        compute="int",
        window=200,
    ),
    "kivi4-32": plan_of(
        int_format(4, "channel", 32),
        int_format(4, "token", 64, zero="none"),
        heads=1,
        group=3,
        compute="int",
        k_tokens=IN_BLOCKS | BOTH,
        v_tokens=BOTH,
    ),
    "slices-32": plan_of(
        slices((32, int_format(4, "channel", 128)), (32, int_format(2, "channel", 32))),
        int_format(2, "token", 64),
        heads=1,
        group=4,
        compute="int",
        k_tokens=IN_BLOCKS,
    ),
    "slices": plan_of(
        slices(
            (16, Drop()),
            (96, int_format(2, "channel", 64)),
            (16, int_format(8, "channel", 32, zero="none")),
        ),
        int_format(2, "token", 64),
        heads=1,
        d=128,
        compute="int",
        k_tokens={"recent": 64, "flush": "block"},
    ),
    "sparse": plan_of(
        Sparse(int_format(4, "channel", 64), 1),
        Sparse(int_format(4, "token", 32), 2),
        heads=1,
        group=3,
        compute="int",
        k_tokens=IN_BLOCKS | BOTH,
        v_tokens=BOTH,
    ),
    "sparse-token": plan_of(
        Sparse(int_format(2, "token", 64), 2, limit=0.5),
        Sparse(Bfp(8, 64), 1),
        compute="int",
        softcap=20.0,
    ),
    "bfp": plan_of(Bfp(4, 32), Bfp(8, 64), heads=1, compute="int"),
    "bfp8": plan_of(Bfp(8, 64), Bfp(4, 32), heads=1, group=3, compute="int"),
    "nf4": plan_of(Lut(4, 64, NF4), Lut(4, 32, NF4, params="bf16"), heads=1, compute="int"),
    "nf4-planes": plan_of(Lut(4, 32, NF4), Lut(4, 64, NF4), heads=1, group=3, d=128, compute="int"),
    "nf4-100": plan_of(Lut(4, 100, NF4), Lut(4, 20, NF4), heads=1, group=2, d=100, compute="int"),
    "maps": mapped(
        plan_of(int_format(4, "token", 64), int_format(4, "token", 64), compute="int"),
        Scale("kvant.values"),
        Gather("kvant.order"),
        Hadamard(64),
        v_maps=(Hadamard(64),),
    ),
}
SINKS = replace(TILED["int4-ring"], sinks="kvant.sinks")
