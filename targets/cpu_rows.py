"""The scratch of logits of one work item: a row for each query, and blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..ir.plan import AttentionPlan
from .source import split_tokens

# Logits in front of a row of the scratch: a vector may begin up to seven places early.
PAD = 8


@dataclass(frozen=True, slots=True)
class Rows:
    """A block of query rows that share each unpacked code.

    Attributes:
        first: text of the first row.
        count: rows, at most 8.
        channels: of a query.
        stride: logits of the scratch for each row.
    """

    first: str
    count: int
    channels: int
    stride: int

    def query(self, r: str, c: str) -> str:
        """Return where channel c of row r is in `query`."""
        return f"q_base + ({self.first} + {r}) * {self.channels} + {c}"

    def logit(self, r: str, position: str) -> str:
        """Return where the logit of a position of row r is in the scratch."""
        return f"({self.first} + {r}) * {self.stride} + {position} - lo + {PAD}"


def blocks(count: int, most: int) -> list[tuple[int, int]]:
    """Return (first, size) of as few and as equal blocks as possible."""
    number_of = -(-count // most)
    edges = [count * i // number_of for i in range(number_of + 1)]
    return [(low, high - low) for low, high in pairwise(edges)]


def row_stride(plan: AttentionPlan) -> int:
    """Return the logits that the scratch holds for each query."""
    return PAD + -(-(plan.k.tokens.sink + split_tokens(plan)) // 8) * 8 + 8
