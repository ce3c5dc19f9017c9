"""Targets: from a plan to kernels. TARGETS is the table; `source.py` says which file does what."""

import difflib

from ..ir.errors import KvantError
from .cpu import CPU_TARGETS, this_cpu
from .gpu import GPU_TARGETS
from .reference import REFERENCE
from .target import Build, Stage, Target

__all__ = ["TARGETS", "Build", "Stage", "Target", "resolve"]

TARGETS: dict[str, Target] = {
    target.name: target for target in (REFERENCE, *CPU_TARGETS, *GPU_TARGETS)
}


def resolve(name: str) -> Target:
    """Return the target that a user means: "reference", "cpu:x86-64-v3", or "cpu".

    "cpu" is the best one that this machine runs.


    Raises: KvantError "unknown-target" (with the nearest names), "machine-does-not-fit".
    """
    target = TARGETS.get(f"cpu:{this_cpu().name}" if name == "cpu" else name)
    if target is None:
        known = ("cpu", *TARGETS)
        near = difflib.get_close_matches(name, known, 3, 0.5) or known
        raise KvantError(
            "unknown-target",
            f"there is no target {name!r}",
            where="the targets argument",
            fix=f"did you mean: {', '.join(near)}? `kvant show targets` lists all",
        )
    return target
