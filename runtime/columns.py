"""Which column of a batch is which token of a row.

The caller counts columns, as transformers does: every append adds T of them. A row counts only its
own tokens: columns before `start` (left padding) and columns past an append's `lengths` (right
padding) hold none. Positions are what a row counts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Columns:
    """The history of appends, as short as it can be.

    `marks` are (column, tokens per row before that column), in order. Between two marks a row first
    gets one token a column, then none: that is exact, because left padding stands at the beginning
    and right padding at the end of a run, and a run is closed where right padding occurs.

    Attributes:
        start: int64[B], first column that can hold a token.
        marks: the first is (0, zeros); the last is the present.
        is_dense: whether the last run has no right padding, so that it may grow.
    """

    start: Ints
    marks: tuple[tuple[int, Ints], ...]
    is_dense: bool = True

    @property
    def length(self) -> int:
        """Number of columns."""
        return self.marks[-1][0]

    @property
    def counts(self) -> Ints:
        """int64[B], tokens per row."""
        return self.marks[-1][1]

    def valid(self, tokens: int, lengths: Ints | None) -> tuple[Ints, Ints]:
        """Return the first valid column and the number of valid ones of the next `tokens` columns.

        Args:
            tokens: T of the append to come.
            lengths: int64[B], columns past it are right padding; None for all valid.

        Returns: first and count, int64[B]; tokens [first, first + count) are valid.
        """
        if lengths is None and max(self.start.tolist()) <= self.length:
            first = np.zeros(len(self.start), np.int64)  # the common case in a decoding loop
            return first, first + tokens
        first = np.clip(self.start - self.length, 0, tokens)
        end = tokens if lengths is None else lengths
        return first, np.maximum(end - first, 0)

    def grown(self, tokens: int, first: Ints, count: Ints) -> "Columns":
        """Return the history after an append of `tokens` columns; see `valid`."""
        mark = (self.length + tokens, self.counts + count)
        is_dense = set((first + count).tolist()) == {tokens}
        if self.is_dense and len(self.marks) > 1:
            return Columns(self.start, (*self.marks[:-1], mark), is_dense)
        return Columns(self.start, (*self.marks, mark), is_dense)

    @property
    def is_even(self) -> bool:
        """Whether one more column without padding gives every row one more token."""
        begun = max(self.start.tolist()) <= self.length
        return self.is_dense and len(self.marks) > 1 and begun

    def later(self, more: int) -> "Columns":
        """Return the history after `more` columns without padding, where `is_even`."""
        column, counts = self.marks[-1]
        return Columns(self.start, (*self.marks[:-1], (column + more, counts + more)))

    def counts_at(self, column: int) -> Ints:
        """Return int64[B], the tokens per row in columns [0, column); column <= length."""
        before, low = self.marks[0]
        for end, high in self.marks[1:]:
            if column <= end:
                run = np.maximum(column - np.maximum(before, self.start), 0)
                return np.asarray(np.minimum(low + run, high), np.int64)
            before, low = end, high
        return low

    def cut(self, column: int) -> "Columns":
        """Return the history of columns [0, column)."""
        if column >= self.length:
            return self
        counts = self.counts_at(column)
        kept = tuple(mark for mark in self.marks if mark[0] < column)
        if not kept:
            return new_columns(self.start)
        before, low = kept[-1]
        full = low + np.maximum(column - np.maximum(before, self.start), 0)
        return Columns(self.start, (*kept, (column, counts)), bool((counts == full).all()))

    def rows(self, index: Ints) -> "Columns":
        """Return the history whose row i is row index[i]."""
        marks = tuple((column, counts[index]) for column, counts in self.marks)
        return Columns(self.start[index], marks, self.is_dense)

    def is_valid(self, tokens: int) -> NDArray[np.bool_] | None:
        """Return bool[B, tokens], which of the last columns hold a token.

        None means that in every row the valid ones stand at the end, as after left padding.
        """
        if self.is_dense and (len(self.marks) < 2 or self.marks[-2][0] <= self.length - tokens):
            return None
        begin = self.length - tokens
        at = np.stack([self.counts_at(begin + i) for i in range(tokens + 1)], axis=1)
        return np.diff(at, axis=1) > 0


def new_columns(start: Ints) -> Columns:
    """Return the history before the first append."""
    return Columns(start, ((0, np.zeros(len(start), np.int64)),))


def to_end(q: Floats, valid: NDArray[np.bool_]) -> Floats:
    """Return q [B, H, T, D] with each row's valid columns moved to the end, in order."""
    moved = np.zeros_like(q)
    for row, columns in enumerate(valid):
        moved[row, :, q.shape[2] - int(columns.sum()) :] = q[row][:, columns]
    return moved


def from_end(x: Floats, valid: NDArray[np.bool_], fill: float) -> Floats:
    """Undo `to_end` on x [B, H, T, ...]; columns that are padding hold `fill`."""
    back = np.full_like(x, fill)
    for row, columns in enumerate(valid):
        back[row][:, columns] = x[row, :, x.shape[2] - int(columns.sum()) :]
    return back
