"""Targets: from a plan to kernels. TARGETS is the table; one file a target."""

from ..ir.errors import KvantError
from .cpu import CPU
from .reference import REFERENCE
from .target import Build, Stage, Target

__all__ = ["TARGETS", "Build", "Stage", "Target", "resolve"]

TARGETS: dict[str, Target] = {target.name: target for target in (REFERENCE, CPU)}

# What a user may write besides the names of the table.
_ALSO = {"cpu": CPU.name}


def resolve(name: str) -> Target:
    """Return the target that a user means: "reference", "cpu" (this machine), "cpu:x86-64-v3".

    Raises: KvantError "unknown-target".
    """
    target = TARGETS.get(_ALSO.get(name, name))
    if target is None:
        raise KvantError(
            "unknown-target",
            f"no target {name!r}",
            where="targets",
            fix=f"use one of: {', '.join(sorted([*TARGETS, *_ALSO]))}",
        )
    return target
