"""What a target emits of a plan, whatever the language: kernels, splits, and what no target takes.

From an encoding to a binary, on both sides (`cpu_` for TVM, `gpu_` for Triton):

    ir/encodings   fields of a format        ir/layouts, ir/planes   their bytes; Part: a slice
    *_append       new tokens, mapped        *_encode                groups of tokens to fields
    gpu_store      the same on a GPU, where gpu_append is both of them in one kernel
    *_pages        code * scale + zero       *_maps, *_prepare       queries, mapped and rounded
    *_attend       one split of the keys     *_combine               the splits merged
    *_text         idioms of the language    *_compile               text to binary

The format is matched in `*_encode` and in `PageReader` of `*_pages`. A CPU kernel walks a split
(`cpu_regions`) for all scores, then for all values, over a scratch of logits (`cpu_rows`); a GPU
kernel does scores, softmax and values of one tile after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Generic, TypeVar

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan
from .kernel_text import KernelText, kernels_text

SPLIT_TOKENS = 512
MOST_GROUP = 64

K = TypeVar("K", bound=KernelText)


@dataclass(frozen=True, slots=True)
class Source(Generic[K]):
    """The emitted kernels of a plan, in the order of KERNELS, or of GPU_KERNELS.

    Attributes:
        plan: what is stored and computed.
        kernels: one for each name.
        head: first lines of kernels.py: what is in it, and its imports.
    """

    plan: AttentionPlan
    kernels: tuple[K, ...]
    head: str

    def text(self) -> str:
        """Return kernels.py."""
        return kernels_text(self.head, {kernel.name: kernel.source() for kernel in self.kernels})


def split_tokens(plan: AttentionPlan, near: int = SPLIT_TOKENS) -> int:
    """Return C, the tokens of a split: whole pages of K, near so many, at most 2,048 if it can.

    Split 0 holds the positions [0, sink + C), split i holds [sink + i C, sink + (i + 1) C). The
    bounds depend on nothing else, so neither the batch nor the number of threads changes a bit.
    """
    page = plan.k.page_tokens
    both_whole = lcm(page, near)
    return both_whole if both_whole <= 2048 else page * max(1, near // page)


def why_not(plan: AttentionPlan, most_channels: int | None = None) -> str | None:
    """Return one sentence why no kernels can be made of a plan, or None.

    Args:
        plan: what is stored and computed.
        most_channels: of a head, or None for any number.
    """
    if plan.group > MOST_GROUP:
        return f"{plan.group} query heads share a KV head; at most {MOST_GROUP} are supported"
    for stream in (plan.k, plan.v):
        if most_channels is not None and stream.channels > most_channels:
            return f"heads of {stream.channels} channels; at most {most_channels} are supported"
        try:
            stream.page_layout()
        except KvantError as error:
            return f"{error.what}: {error.fix}"
    return None
