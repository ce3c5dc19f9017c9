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
# Of the processors that one machine may fit: wide vectors with dot products of bytes first. A test
# holds the order to that of targets/machines.py.
_BEST_CPUS = ("sapphirerapids", "znver4", "x86-64-v4", "alderlake", "x86-64-v3", "x86-64-v2")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The target to use.

    Attributes:
        name: of the target.
        facts: of the target.
        passed_over: one sentence for each other one.
        also: which of those asked for would run here too, best first.
    """

    name: str
    facts: Mapping[str, Json]
    passed_over: dict[str, str]
    also: tuple[str, ...] = ()


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
    chosen, *also = sorted(usable, key=lambda name: _rank(name, asked[name]))
    others = {n: reasons.get(n) or f"{chosen} was preferred" for n in compiled if n != chosen}
    return Chosen(chosen, asked[chosen], others, tuple(also))


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
    if (facts["kind"], facts.get("system")) == ("cpu", "Darwin"):
        return (
            "it is an object file and assembly for macOS, which nothing links to a library that "
            "could be loaded"
        )
    return why_not(facts, machine)


def _rank(name: str, facts: Mapping[str, Json]) -> tuple[int, int, int, str]:
    """Order targets: the kind, the known processors, then who uses more of the processor."""
    kind, features = str(facts["kind"]), facts.get("features")
    count = len(features) if isinstance(features, list) else 0
    processor = name.removeprefix(f"{kind}-")
    return _place(_FASTEST_FIRST, kind), _place(_BEST_CPUS, processor), -count, name


def _place(order: Sequence[str], name: str) -> int:
    """Return where a name is in an order; what is not in it comes after all."""
    return order.index(name) if name in order else len(order)


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
