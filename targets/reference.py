"""The target without kernels: the runtime computes in NumPy what the plan says."""

from ..ir.plan import AttentionPlan
from .target import Build, Stage, Target


def _supports(plan: AttentionPlan) -> None:
    """Every plan: what has no page layout is refused earlier."""


def _available() -> None:
    """Everywhere."""


def _build(plan: AttentionPlan) -> Build:
    return Build("reference", {"kind": "reference"}, {})


REFERENCE = Target(
    name="reference",
    summary="NumPy in float64: slow, runs everywhere, the measure of all others",
    supports=_supports,
    available=_available,
    stages=(Stage("plan", _build),),
)
