"""Encoding sparse entries: the outliers of each token, and what the dense code leaves of them.

What is dense is encoded from the tokens cut to m in between; see `ir/encodings/sparse.py`.
"""

from __future__ import annotations

import numpy as np

from ..ir.encodings import Sparse
from .gpu_pages import PageReader, tail_group
from .gpu_text import Kernel, both, padded, write_flag, write_stored


def write_outliers(kernel: Kernel, reader: PageReader, sparse: Sparse) -> None:
    """Bind m, and of each entry e: at_e, its channel, and x_e, its value; [tokens]."""
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
        kernel.line("size = tl.where(chosen, -1.0, size)")
    kernel.note("what is dense is cut to m")
    limit = float(np.float32(sparse.limit))
    kernel.line("m = tl.max(size, axis=1)")
    if limit > 0.0:
        kernel.line(f"m = tl.maximum(m, {limit!r})")


def write_dense(kernel: Kernel, reader: PageReader, decoded: str) -> None:
    """Bind dense_e to what the codes say at the channel of entry e; 0 where it is elsewhere."""
    if reader.part.sparse is None:
        return
    kernel.line(f"dense = {decoded}")
    inside = f"{reader.columns}[None, None, :]" if reader.columns else ""
    for e in range(reader.part.sparse.count):
        named = both(f"channel[None, :, :] == at_{e}[:, None, None]", inside)
        kernel.line(f"dense_{e} = tl.sum(tl.where({named}, dense, 0.0), axis=2)")
        kernel.line(f"dense_{e} = tl.sum(dense_{e}, axis=1)")


def write_entries(kernel: Kernel, reader: PageReader, sparse: Sparse, columns: int) -> None:
    """Store each token's entries: the channel, and what the dense code leaves of its value.

    Where a program has only some columns of the planes, it stores the entries of their channels.
    """
    kernel.note("entries, as many as are above m")
    for e in range(sparse.count):
        own = "here"
        if columns < reader.wide:
            kernel.line(f"own = here & (at_{e} % {reader.part.plane} // {columns} == block)")
            own = "own"
        kernel.line(f"above = ({own}) & (tl.abs(x_{e}) > m)")
        kernel.line(f"rest = tl.where(above, x_{e}.to(tl.float64) - dense_{e}, 0.0)")
        write_stored(kernel, "rest", sparse.values)
        kernel.line(f"tl.store({reader.parameter_at('value', e)}, stored, mask={own})")
        write_flag(kernel)
        index = reader.parameter_at("index", e)
        kernel.line(f"tl.store({index}, tl.where(above, at_{e}, 0).to(tl.uint8), mask={own})")
