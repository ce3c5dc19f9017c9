"""compile(): a model, a recipe and targets become an artifact."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan
from ..ir.weight_edits import weight_edits
from ..runtime.model_checks import sampled
from ..runtime.publish import refuse_existing
from . import recipe as recipes
from .bind import ModelSource, open_model
from .capture import Model, capture
from .debug import DUMP_IR, DUMP_KERNELS, TRACE, write_dump
from .layer_constants import compute_constants
from .self_check import self_check
from .shape import Shape, shape_model
from .variants import Variant, rewrite

if TYPE_CHECKING:
    from ..runtime.artifact import Artifact
    from ..targets import Build, Target

Progress = Callable[[str], None]
_SAMPLED = 16  # weights of each layer that an artifact knows its model by


@dataclass(slots=True)
class Clock:
    """Says which stage runs; with KVANT_TRACE=1 also how long the one before took."""

    progress: Progress
    _last: tuple[str, float] | None = None

    def stage(self, name: str) -> None:
        """End the stage before, begin this one and say so."""
        self.stop()
        self.progress(name)
        self._last = (name, time.perf_counter())

    def stop(self) -> None:
        """End the stage that runs."""
        if self._last is not None and TRACE.get() == "1":
            name, begin = self._last
            seconds = time.perf_counter() - begin
            print(f"kvant: stage {name}: {seconds:.2f} s", file=sys.stderr)  # noqa: T201
        self._last = None


def compile(
    model: Any,
    recipe: str | Path | recipes.Recipe = recipes.DEFAULT,
    targets: Iterable[str] = ("cpu",),
    text: str | None = None,
    out: str | Path | None = None,
    *,
    dump_ir: str | Path | None = None,
    progress: Progress = lambda stage: None,
) -> "Artifact":
    """Compile the attention of a model and return the artifact, loaded.

    Args:
        model: a Hugging Face folder, a .gguf file, a torch module, or a `Shape`.
        recipe: name of a recipe, path of a .toml file, or a `Recipe`.
        targets: targets such as "cpu" or "reference"; the artifact is loaded for the first one, or
            for the reference if that one is for another kind of machine.
        text: calibration text; made by the model itself if a recipe needs it and none is given.
        out: folder to create; "<model>-<recipe>.kvant" if not given. It must not exist.
        dump_ir: folder for the graph after every pass; KVANT_DUMP_IR if not given.
        progress: called with the name of each stage.

    Raises: KvantError for everything that is wrong with the input; nothing is left behind.
    """
    from .artifact_writer import write_artifact

    clock = Clock(progress)
    chosen, toml = recipes.load(recipe)
    resolved = resolve_targets(targets)
    if out:
        refuse_existing(Path(out))
    source, captured = _capture(clock, model)
    path = Path(out or f"{captured.name}-{chosen.name}.kvant")
    refuse_existing(path)
    clock.stage("rewrite")
    variants = rewrite(captured, chosen, dump_ir or DUMP_IR.get(), recipes.place(recipe, chosen))
    constants, calibration = compute_constants(clock.stage, variants, source, text, captured.facts)
    plans, binaries = _kernels(clock, variants, resolved)
    clock.stage("write")
    identity = write_artifact(
        path,
        model=captured,
        recipe=chosen.name,
        recipe_toml=toml,
        variants=variants,
        plans=plans,
        constants=constants,
        weight_edits=_edits(variants),
        weights=_sample(captured, source),
        calibration=calibration,
        targets=binaries,
    )
    clock.stop()
    return _load(path, next(iter(resolved)), identity)


def resolve_targets(names: Iterable[str]) -> dict[str, "Target"]:
    """Return the targets that a user named, by their full names, in the order given.

    Raises: KvantError "no-target", "unknown-target" (with the nearest names),
        "machine-does-not-fit", or "target-not-available" (what is missing to build for it).
    """
    from ..targets import resolve

    found: dict[str, Target] = {}
    for name in (names,) if isinstance(names, str) else names:
        target = resolve(name)
        reason = target.available()
        if reason is not None:
            what, _, fix = reason.partition(": ")
            raise KvantError(
                "target-not-available",
                what,
                where=f"target {name}",
                fix=fix or "use the target 'reference'",
            )
        found[target.name] = target
    if not found:
        raise KvantError(
            "no-target",
            "no target is named",
            where="the targets argument",
            fix="name at least one, such as cpu; `kvant show targets` lists all",
        )
    return found


def _load(path: Path, target: str, identity: str) -> "Artifact":
    """Return the artifact for its first target, or for the reference if that runs elsewhere."""
    from ..runtime.artifact import load

    try:
        return load(path, target=target, id=identity)
    except KvantError as error:
        if error.code != "no-usable-target":
            raise
    return load(path, target="reference", id=identity)


def _kernels(
    clock: Clock, variants: tuple[Variant, ...], targets: Mapping[str, "Target"]
) -> tuple[list[AttentionPlan], dict[str, dict[str, "Build"]]]:
    """Return the distinct plans, and what each target made of each of them."""
    clock.stage("kernels")
    plans = list(dict.fromkeys(variant.plan for variant in variants))
    builds: dict[str, dict[str, Build]] = {}
    for name, target in targets.items():
        builds[name] = {
            f"p{i}": target.build(plan, _kernel_dump(plan, Path(name.replace(":", "-")) / f"p{i}"))
            for i, plan in enumerate(plans)
        }
    return plans, builds


def _kernel_dump(plan: AttentionPlan, place: Path) -> Callable[[str, Any], None] | None:
    """Return what writes the result of each stage of a target below KVANT_DUMP_KERNELS, if set.

    A stage gives text (an object with `text`) or files (a `Build`); the plan itself comes first.
    """
    if not DUMP_KERNELS.get():
        return None
    folder = Path(DUMP_KERNELS.get()) / place
    write_dump(folder / "plan.json", json.dumps(plan.to_json(), indent=1).encode())

    def dump(stage: str, result: Any) -> None:
        if hasattr(result, "text"):
            write_dump(folder / f"{stage}.py", result.text().encode())
        for name, data in getattr(result, "files", {}).items():
            write_dump(folder / stage / name, data)

    return dump


def _capture(clock: Clock, model: Any) -> tuple[ModelSource | None, Model]:
    """Return where the weights come from (nowhere for a shape), and the captured model.

    The captured graphs are compared with the model itself on small random weights.
    """
    clock.stage("capture")
    if isinstance(model, Shape):
        return None, shape_model(model)
    source = model if isinstance(model, ModelSource) else open_model(model)
    captured = capture(source)
    self_check(source, captured)
    return source, captured


def _edits(variants: tuple[Variant, ...]) -> list[dict[str, Any]]:
    """Return the weight edits of all layers, by full parameter name."""
    edits = []
    for variant in variants:
        chains = weight_edits(variant.graph)
        for layer in variant.layers:
            edits += [edit.to_json(layer.prefix, layer.index) for edit in chains]
    return sorted(edits, key=lambda edit: str(edit["parameter"]))


def _sample(model: Model, source: ModelSource | None) -> dict[str, list[float]]:
    """Return a few weights of each layer: enough to know the model again."""
    if source is None:
        return {}
    samples = {}
    for layer in model.layers:
        own = [n for n in source.names() if n.startswith(layer.prefix) and n.endswith("weight")]
        # The key projection; where projections are fused, the first weight there is.
        for name in sorted(own, key=lambda n: ".k_proj" not in n)[:1]:
            samples[name] = list(sampled(source.weight(name).reshape(-1), _SAMPLED))
    return samples
