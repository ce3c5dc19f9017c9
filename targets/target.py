"""What a target is: three small records, no base class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan


@dataclass(frozen=True, slots=True)
class Build:
    """What a target makes of one plan.

    Attributes:
        target: name of the target with its machine, "cpu-x86-64-v3"; a folder is called so.
        facts: what a machine must have: kind, system, machine, features, glibc, packages, kernels
            (what each one does, by name).
        files: content by file name.
    """

    target: str
    facts: Mapping[str, Any]
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step from a plan to a `Build`: its name, and a function of the former stage's result."""

    name: str
    run: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of machine that kernels can be made for.

    Attributes:
        name: as a user writes it, "cpu:x86-64-v3".
        summary: one sentence.
        supports: a plan -> None, or one sentence why not and what to do.
        available: None if kernels can be built here, or one sentence why not and what to do.
        stages: each takes what the former one gave; the first a plan, the last gives a `Build`.
    """

    name: str
    summary: str
    supports: Callable[[AttentionPlan], str | None]
    available: Callable[[], str | None]
    stages: tuple[Stage, ...]

    def build(self, plan: AttentionPlan, dump: Callable[[str, Any], None] | None = None) -> Build:
        """Run all stages.

        Args:
            plan: what to build.
            dump: called with the name and the result of each stage.

        Raises: KvantError "target-does-not-support", "no-c-compiler", "compiler-failed".
        """
        reason = self.supports(plan)
        if reason is not None:
            raise KvantError(
                "target-does-not-support",
                reason,
                where=f"target {self.name}",
                fix="change the recipe, or use the target 'reference'",
            )
        result: Any = plan
        for stage in self.stages:
            result = stage.run(result)
            if dump is not None:
                dump(stage.name, result)
        if not isinstance(result, Build):
            raise TypeError(f"target {self.name}: the last stage gave {type(result).__name__}")
        return result
