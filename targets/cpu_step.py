"""The kernel step: what an append of few tokens does to a layer, in one call on one thread.

Calling a kernel takes longer than storing a token, so a decode step makes one call for four: append
keys, append values, and encode of both what is due from before.
"""

from __future__ import annotations

from ..ir.layouts import PageLayout
from ..ir.plan import AttentionPlan
from .cpu_append import write_tokens
from .cpu_encode import encode_arguments, write_groups
from .cpu_text import Kernel
from .kernel_text import append_arguments


def step(plan: AttentionPlan, layouts: tuple[PageLayout, PageLayout]) -> Kernel:
    """Return the kernel that stores k_x and v_x, and encodes [k_begin, k_end), [v_begin, v_end).

    `bad[0]` becomes 0 if all went well. After it come the marks of append for k and for v, then
    those of encode, B H of each. New tokens are stored as they are looked at: they count only once
    the caller moves `length`.
    """
    kernel, streams = Kernel("step"), (plan.k, plan.v)
    for stream, layout in zip(streams, layouts, strict=True):
        append_arguments(kernel, stream, f"{stream.role}_x")
        encode_arguments(kernel, stream, layout, *_span(stream.role))
    for name in ("batch", "tokens"):
        kernel.scalar(name)
    marks = f"batch * {plan.k.heads}"
    for i, stream in enumerate(streams):
        with kernel.block(f"for bh in T.serial(batch * {stream.heads})"):
            kernel.let("mark", f"1 + {i} * {marks} + bh")
            write_tokens(kernel, stream, f"{stream.role}_x", "count[b]", check=True, store=True)
    for i, (stream, layout) in enumerate(zip(streams, layouts, strict=True)):
        with kernel.block(f"for bh in T.serial(batch * {stream.heads})"):
            kernel.let("mark", f"1 + {2 + i} * {marks} + bh")
            write_groups(kernel, stream, layout, *_span(stream.role))
    kernel.line("bad[0] = T.int64(0)")
    with kernel.block(f"for i in T.serial(4 * {marks})"):
        kernel.line("bad[0] = T.max(bad[0], bad[1 + i])")
    return kernel


def _span(role: str) -> tuple[str, str]:
    return f"{role}_begin", f"{role}_end"
