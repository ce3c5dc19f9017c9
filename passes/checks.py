"""What several passes refuse: words that an option does not know, heads without a rotation."""

from collections.abc import Sequence

from ..ir.errors import KvantError
from ..ir.graph import Graph


def check_word(name: str, option: str, value: object, known: Sequence[str]) -> None:
    """Refuse an option that is not one of the known words. Raises: KvantError ("bad-option")."""
    if value not in known:
        raise KvantError(
            "bad-option",
            f"{option} is {value!r}",
            where=f"pass {name}",
            fix=f"use one of: {' '.join(known)}",
        )


def check_head_size(width: int, graph: Graph) -> None:
    """Refuse a head width without a Hadamard matrix of its own.

    Raises: KvantError ("unsupported-head-size") that names the legal widths.
    """
    if width > 0 and width & (width - 1) == 0:
        return
    raise KvantError(
        "unsupported-head-size",
        f"a head of {width} channels has no Walsh-Hadamard matrix here",
        where=f"graph @{graph.name}",
        fix="leave the rotation out; legal head sizes are the powers of two",
    )
