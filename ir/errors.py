"""The one error class of kvant, and the hint for a name that is not there."""

import difflib
from collections.abc import Iterable


class KvantError(Exception):
    """A refusal: what was refused, where, and how to fix it.

    Args:
        code: stable kebab-case name, for scripts; never reused for another meaning. All of them
            are listed in docs/errors.md.
        what: one sentence that contains the offending values.
        where: the file, argument, or graph position.
        fix: what the user can do now.
    """

    def __init__(self, code: str, what: str, *, where: str, fix: str) -> None:
        super().__init__(f"{what}\n  where: {where}\n  fix: {fix}  [{code}]")
        self.code = code
        self.what = what
        self.where = where
        self.fix = fix


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `known` as a part of a sentence, with the likely meaning of `name` first."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1)
    return (f"did you mean {close[0]}? " if close else "") + f"known: {' '.join(names) or 'none'}"
