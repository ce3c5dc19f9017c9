"""Sparse entries of whole tiles: a few numbers of each token, each in a channel that it names.

    keys      the query of the channel that an entry names, times its value, goes on the score
    values    a matrix of ones where a token names a channel, times the values, is one more product;
              its weights are float16 over the largest of the tile, whatever the scales are

Indices are read from the words that they lie in. Several entries of a token are added one by one.
"""

from __future__ import annotations

from ..ir.plan import AttentionPlan
from .gpu_blocks import Block, groups_of, write_by_memory
from .gpu_pages import PageReader
from .gpu_scales import byte_of_word, stored_of, worth_of
from .gpu_sequences import Named
from .gpu_text import LOG2_E, Kernel, across, as_f32, load

MOST_GAP = 120.0
"""Exponent of a tile's weights that float32 can undo; those of a larger one are as good as none."""
LEAST_FACTOR = 1e-36
"""Queries that are smaller make no score that float32 could tell from zero."""


def entries_of(reader: PageReader) -> int:
    """Return how many entries a token has."""
    return reader.part.sparse.count if reader.part.sparse is not None else 0


def write_places(kernel: Kernel, plan: AttentionPlan, v: tuple[Block, ...]) -> None:
    """Bind <cell>_channel, the channels of each cell's rows, f16."""
    for reader, _, cells in groups_of(v):
        if not entries_of(reader):
            continue
        for cell in cells:
            places = f"({cell.channels} - {reader.part.first}).to(tl.float32)"
            name, count = f"{cell.name}_channel", cell.block.wide
            write_by_memory(kernel, plan, name, places, count, "float16")


def write_entry_scores(kernel: Kernel, plan: AttentionPlan, k: tuple[Block, ...]) -> None:
    """Add what the entries of the tokens say to `score`; see `write_entry_factor`."""
    for reader in dict.fromkeys(block.reader for block in k):
        for e in range(entries_of(reader)):
            index, value = _entry(reader, e)
            first = f"{reader.part.first} + " if reader.part.first else ""
            at = f"(bh * rows + row)[None, :] * {plan.k.channels} + ({first}{index})[:, None]"
            kernel.line(f"asked = {load(f'query + {at}', 'exists[None, :]')}")
            kernel.line(f"score += asked * per_score[None, :] * ({value})[:, None]")


def write_entry_factor(kernel: Kernel, plan: AttentionPlan, k: tuple[Block, ...]) -> None:
    """Bind per_score, what makes products with `query` such as the scores of codes are, f32 [R]."""
    if not any(entries_of(block.reader) for block in k):
        return
    whole = "1.0" if plan.softcap is not None else str(LOG2_E)
    kernel.line(f"per_score = tl.where(factor > {LEAST_FACTOR}, {whole} / factor, 0.0)")


def write_entry_weights(kernel: Kernel, plan: AttentionPlan, v: tuple[Block, ...]) -> None:
    """Bind entry_w, the weights in float16, and `back`, what one is worth; bound before: weight."""
    if not any(entries_of(block.reader) for block in v):
        return
    kernel.note("weights of the entries, over the power of two of the tile's largest")
    factor = str(LOG2_E) if plan.softcap is not None else "factor"
    kernel.line(f"gap = tl.minimum(most - tl.ceil(tl.max(score, axis=0) * {factor}), {MOST_GAP})")
    kernel.line("entry_w = (weight * tl.exp2(gap)[None, :]).to(tl.float16)")
    kernel.line("back = tl.exp2(-gap)")


def write_entry_values(kernel: Kernel, v: tuple[Block, ...]) -> None:
    """Add the entries of the tokens to the outputs."""
    for reader, _, cells in groups_of(v):
        for e in range(entries_of(reader)):
            index, value = _entry(reader, e)
            kernel.line(f"index = ({index}).to(tl.float16)")
            kernel.line(f"value = ({value}).to(tl.float16)")
            for cell in cells:
                places = f"{across('index')}, {cell.name}_channel[:, None], {across('value')}"
                product = f"tl.dot({Named().name}({places}), entry_w)"
                unit = cell.unit / worth_of(reader)
                kernel.line(f"{cell.out} += {product} * (back * {unit!r})[None, :]")


def _entry(reader: PageReader, e: int) -> tuple[str, str]:
    """Return the channels in the part, i32 [N], and values, f32 [N], of entry e of each token."""
    if reader.part.sparse is None:
        raise TypeError("the part has no entries")
    value = as_f32(stored_of(reader, "value", e), reader.part.sparse.values)
    return byte_of_word(reader, "index", e), value
