"""Which target of an artifact runs here, why the others do not, and its kernels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan
from .constants import Array
from .machine import Machine, this_machine, why_not
from .plan_file import LayerEntry
from .strict_json import Json

if TYPE_CHECKING:
    from .stream import Kernels

REFERENCE = "reference"
_FASTEST_FIRST = ("cuda", "hip", "cpu")
_RUNS_HERE = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The target to use: its name, its facts, and one sentence for each that was passed over."""

    name: str
    facts: Mapping[str, Json]
    passed_over: dict[str, str]


def choose_target(
    targets: Mapping[str, Mapping[str, Json]],
    wanted: str,
    where: str,
    machine: Machine | None = None,
) -> Chosen:
    """Return the fastest target that runs here among those wanted.

    Args:
        targets: facts by name, from the manifest.
        wanted: "auto", "reference", a kind such as "cpu", or a name ("cpu:x86-64-v3" too).
        where: path of the artifact.
        machine: where it should run; this machine if not given.

    Raises: KvantError "unknown-target" if the artifact has none of that name or kind,
        "no-usable-target" with one sentence for each.
    """
    if wanted == REFERENCE:
        return Chosen(REFERENCE, {"kind": REFERENCE}, {})
    compiled = {name: facts for name, facts in targets.items() if facts["kind"] != REFERENCE}
    name = wanted.replace(":", "-")
    if wanted == "auto":
        if REFERENCE in targets and not compiled:
            return Chosen(REFERENCE, targets[REFERENCE], {})
        asked = compiled
    else:
        asked = {n: f for n, f in compiled.items() if name in (n, f["kind"])}
        if not asked:
            raise KvantError(
                "unknown-target",
                f"the artifact has no target {wanted!a}; it has {_list(targets)}",
                where=where,
                fix="load one of these, compile again with `-t`, or load the slow 'reference'",
            )
    machine = this_machine() if machine is None else machine
    reasons = {name: _why_not(facts, machine) for name, facts in asked.items()}
    usable = [name for name, reason in reasons.items() if reason is None]
    if not usable:
        _refuse_all({n: str(reason) for n, reason in reasons.items()}, where)
    chosen = min(usable, key=lambda name: _rank(name, asked[name]))
    others = {n: reasons.get(n) or f"{chosen} was preferred" for n in compiled if n != chosen}
    return Chosen(chosen, asked[chosen], others)


def build_kernels(
    chosen: Chosen,
    layers: Sequence[LayerEntry],
    plans: Sequence[AttentionPlan],
    constants: Sequence[Mapping[str, Array]],
    files: Mapping[str, bytes],
    where: str,
) -> "Kernels":
    """Return the kernels of the chosen target; native code is loaded here and nowhere else.

    Args:
        chosen: the target.
        layers: which plan key each layer uses.
        plans: plan of each layer.
        constants: arrays of each layer.
        files: verified bytes of the artifact.
        where: path of the artifact.
    """
    if chosen.facts["kind"] == REFERENCE:
        from .launch_reference import Kernels as ReferenceKernels

        return ReferenceKernels(plans, constants)
    folder = f"targets/{chosen.name}/"
    own = {name[len(folder) :]: data for name, data in files.items() if name.startswith(folder)}
    keys = [layer.plan for layer in layers]
    if chosen.facts["kind"] == "cuda":
        from .cuda import CudaLauncher, read_launches
        from .launch_gpu import Kernels as GpuKernels
        from .memory import TorchMemory, current_device

        launches, memory = read_launches(keys, own), TorchMemory(current_device())
        launcher = CudaLauncher(launches, own, memory.device)
        return GpuKernels(plans, constants, keys, launches, launcher, memory)
    from .launch_cpu import Kernels as CpuKernels

    return CpuKernels(plans, constants, keys, own)


def kernel_rows(targets: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return one row for each compiled kernel of each target: its name, and what it does."""
    return [
        {"name": f"{target}/{kernel}", "does": str(does)}
        for target, facts in sorted(targets.items())
        for kernel, does in sorted(facts.get("kernels", {}).items())
    ]


def _why_not(facts: Mapping[str, Json], machine: Machine) -> str | None:
    if facts["kind"] not in _RUNS_HERE:
        return f"this version of the runtime does not run targets of kind {facts['kind']!r}"
    return why_not(facts, machine)


def _rank(name: str, facts: Mapping[str, Json]) -> tuple[int, int, str]:
    """Order targets: the kind first, then the one that uses more of the processor."""
    kind, features = str(facts["kind"]), facts.get("features")
    place = _FASTEST_FIRST.index(kind) if kind in _FASTEST_FIRST else len(_FASTEST_FIRST)
    return place, -len(features) if isinstance(features, list) else 0, name


def _refuse_all(reasons: Mapping[str, str], where: str) -> NoReturn:
    lines = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
    raise KvantError(
        "no-usable-target",
        f"no compiled target of the artifact runs here: {lines or 'it has none'}",
        where=where,
        fix="install what is missing, or compile for this machine; target='reference' runs "
        "anywhere, slowly",
    )


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
