"""The scratch of logits of one work item: a row for each query, and blocks of a head's rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..ir.plan import AttentionPlan
from . import source

# Logits in front of a row of the scratch: raw values are read in vectors that begin up to seven
# places early. It is also the widest vector of the softmax.
PAD = 16
# Tokens of a split, about: its logits still lie in the second cache, and fewer splits are merged.
SPLIT_TOKENS = 1024
# Logits of one item, unless a single head has more: they stay in the caches.
MOST_LOGITS = 36_864


@dataclass(frozen=True, slots=True)
class Rows:
    """A block of query rows of one KV head that share each unpacked code.

    Bound are `q_base`, where the head's row 0 is in `query`, and `logit_base`, where its position 0
    would be in the scratch.

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

    def of_item(self, r: str) -> str:
        """Return the number of row r among those of all heads of the item; `head_row` is bound."""
        return f"(head_row + {self.first} + {r})"

    def logit(self, r: str, position: str) -> str:
        """Return where the logit of a position of row r is in the scratch."""
        return f"logit_base + ({self.first} + {r}) * {self.stride} + {position}"


def blocks(count: int, most: int) -> list[tuple[int, int]]:
    """Return (first, size) of as few and as equal blocks as possible."""
    number_of = -(-count // most)
    edges = [count * i // number_of for i in range(number_of + 1)]
    return [(low, high - low) for low, high in pairwise(edges)]


def item_heads(plan: AttentionPlan) -> int:
    """Return the heads that an item takes at most, a divisor: their logits stay in the caches."""
    most = max(1, MOST_LOGITS // (plan.group * row_stride(plan)))
    return max(d for d in range(1, plan.k.heads + 1) if plan.k.heads % d == 0 and d <= most)


def split_tokens(plan: AttentionPlan) -> int:
    """Return the tokens of a split of attend, see `source.split_tokens`."""
    return source.split_tokens(plan, SPLIT_TOKENS)


def row_stride(plan: AttentionPlan) -> int:
    """Return the logits that the scratch holds for each query."""
    return PAD + -(-(plan.k.tokens.sink + split_tokens(plan)) // PAD) * PAD + PAD
