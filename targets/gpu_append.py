"""The kernel append: what an append does to k and v of a layer, in one launch.

    new k [B, H, T, D] --> maps --> one rounding --> sink, tail         (the same of v)
    tail of k, tokens that were due before --> codes, scales --> pages  (the same of v)

The four parts are programs of one grid. None waits for another: what is due are tokens that stood
in the tail before this append (`Tokens.encoded_end` of the old length), and new ones go to slots
after them. So a step of decoding is one launch, whatever the formats, and takes as long as its
longest program.

A token that stands for itself goes through the tail too, and is encoded by the next append: until
then it is attended as it came, and `truncate`, `reserve` and a saved state count on that. What it
costs is one read of 4 bytes a number, by then from the cache of the GPU, in a program beside the
one that stores the next token.

RoPE is before all of this: every plan stores keys that were turned already, and a map after it does
not commute with it (`ir/basis.py`).
"""

from __future__ import annotations

from ..ir.plan import AttentionPlan, StreamPlan
from .gpu_encode import declare_encode, programs_of, tokens_of, warps_of, write_encode
from .gpu_store import TYPES, declare_store, write_store
from .gpu_text import Dialect, Kernel


def append(plan: AttentionPlan, kinds: tuple[str, str], dialect: Dialect) -> Kernel:
    """Return the kernel that stores T new tokens a row of k and v and encodes what is due.

    Of row b new are the tokens first[b] + [0, count[b]) of k_x and v_x; they become positions
    before[b], before[b] + 1, ... Due are positions [k_begin[b], k_end[b]) of k, and of v: whole
    groups. What cannot be stored, `k_bad` and `v_bad`, int64[2, B H], say: of new tokens, then of
    encoded ones.

    Grid: (k_encodes + v_encodes + 2 ceil(T / rows), B H); how many programs encode so many tokens,
    `facts` says.

    Args:
        plan: what is stored.
        kinds: arrangement of the pages of k and of v.
        dialect: of the machine.
    """
    kernel, streams = Kernel("append"), (plan.k, plan.v)
    for name in ("first", "count", "before"):
        kernel.array(name, "int64")
    for stream in streams:
        _declare(kernel, stream)
    for name in ("tokens", "k_encodes", "v_encodes"):
        kernel.scalar(name)
    kernel.facts |= {"rows": dialect.new, "types": TYPES}
    kernel.warps = max(warps_of(s, kind, dialect) for s, kind in zip(streams, kinds, strict=True))
    for stream, kind in zip(streams, kinds, strict=True):
        kernel.facts[stream.role] = {
            "tokens": tokens_of(stream, dialect),
            "programs": programs_of(stream, kind, dialect),
        }
    kernel.line("program = tl.program_id(0)")
    kernel.line("bh = tl.program_id(1).to(tl.int64)")
    kernel.line(f"b = bh // {plan.k.heads}")
    kernel.line(f"h = bh % {plan.k.heads}")
    kernel.line("first_store = k_encodes + v_encodes")
    kernel.line("stores = (tl.num_programs(0) - first_store) // 2")
    _write_parts(kernel, plan, kinds, dialect)
    return kernel


def _declare(kernel: Kernel, stream: StreamPlan) -> None:
    role = stream.role
    declare_store(kernel, stream)
    kernel.array(f"{role}_tail", "float32")
    kernel.array(f"{role}_tail_first", "int64")
    kernel.scalar(f"{role}_capacity")
    declare_encode(kernel, stream)
    kernel.array(f"{role}_bad", "int64")


def _write_parts(
    kernel: Kernel, plan: AttentionPlan, kinds: tuple[str, str], dialect: Dialect
) -> None:
    """Write what the programs do, one sort after another; those that take longest come first."""
    kernel.note("programs that encode due keys")
    with kernel.block("if program < k_encodes"):
        write_encode(kernel, plan.k, kinds[0], "program", dialect)
    kernel.note("programs that encode due values")
    with kernel.block("if (program >= k_encodes) & (program < first_store)"):
        write_encode(kernel, plan.v, kinds[1], "program - k_encodes", dialect)
    kernel.note("programs that store new keys")
    with kernel.block("if (program >= first_store) & (program < first_store + stores)"):
        write_store(kernel, plan.k, "program - first_store", dialect.new)
    kernel.note("programs that store new values")
    with kernel.block("if program >= first_store + stores"):
        write_store(kernel, plan.v, "program - first_store - stores", dialect.new)
