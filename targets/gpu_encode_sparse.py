"""Encoding sparse entries: the outliers of each token, and what the dense code leaves of them.

What is dense is encoded from the tokens cut to m in between; see `ir/encodings/sparse.py`.
"""

from __future__ import annotations

import numpy as np

from ..ir.encodings import Sparse
from .gpu_pages import PageReader, tail_group
from .gpu_text import Kernel, across, both, down, padded, write_flag, write_stored


def write_outliers(kernel: Kernel, reader: PageReader, sparse: Sparse) -> None:
    """Bind m, and of each entry e: at_e, its channel, x_e, its value, and dense_e = 0; [tokens]."""
    width = reader.part.width
    kernel.note("the largest channels of each token, one by one; of equal ones the first")
    kernel.line(f"j = tl.arange(0, {padded(width)})")
    kernel.line(f"x = {tail_group(reader, 0, width)}")
    is_whole = padded(width) == width
    size = "tl.abs(x)" if is_whole else f"tl.where((j < {width})[None, :], tl.abs(x), -1.0)"
    kernel.line(f"size = {size}")
    for e in range(sparse.count):
        kernel.line("m = tl.max(size, axis=1)")
        kernel.line(f"at_{e} = tl.min(tl.where(size == m[:, None], j[None, :], {width}), axis=1)")
        kernel.line(f"chosen = j[None, :] == at_{e}[:, None]")
        kernel.line(f"x_{e} = tl.sum(tl.where(chosen, x, 0.0), axis=1)")
        kernel.line(f"dense_{e} = tl.zeros_like(x_{e}).to(tl.float64)")
        kernel.line("size = tl.where(chosen, -1.0, size)")
    kernel.note("what is dense is cut to m")
    limit = float(np.float32(sparse.limit))
    kernel.line("m = tl.max(size, axis=1)")
    if limit > 0.0:
        kernel.line(f"m = tl.maximum(m, {limit!r})")


def write_dense(kernel: Kernel, reader: PageReader, i: int, decoded: str) -> None:
    """Add to dense_e what the codes of plane i say, where the channel of entry e is in it."""
    if reader.part.sparse is None:
        return
    kernel.line(f"dense = {decoded}")
    for e in range(reader.part.sparse.count):
        named = f"{across(f'{reader.name}_w')} == {down(f'(at_{e} - {i * reader.part.plane})')}"
        kept = f"tl.where({both(named, across(reader.columns))}, dense, 0.0)"
        kernel.line(f"dense_{e} += tl.sum({kept}, axis=1)")


def write_entries(kernel: Kernel, reader: PageReader, sparse: Sparse) -> None:
    """Store each token's entries: the channel, and what the dense code leaves of its value."""
    kernel.note("entries, as many as are above m")
    for e in range(sparse.count):
        kernel.line(f"above = tl.abs(x_{e}) > m")
        kernel.line(f"rest = tl.where(above, x_{e}.to(tl.float64) - dense_{e}, 0.0)")
        write_stored(kernel, "rest", sparse.values)
        kernel.line(f"tl.store({reader.parameter_at('value', e)}, stored, mask=here)")
        write_flag(kernel, "tl.where(here, single, 0.0)")
        index = reader.parameter_at("index", e)
        kernel.line(f"tl.store({index}, tl.where(above, at_{e}, 0).to(tl.uint8), mask=here)")
