"""The one error class of kvant."""


class KvantError(Exception):
    """A refusal: what was refused, where, and how to fix it.

    Args:
        code: stable kebab-case name, for scripts; never reused for another meaning.
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
