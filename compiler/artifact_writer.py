"""Write an artifact: the same inputs give the same bytes, and so the same id.

No time, no path and no host name goes in; JSON has one spelling, safetensors one metadata key.
"""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan
from ..ir.text import print_graph
from ..runtime.manifest import (
    CONSTANTS,
    GRAPH,
    ID,
    MANIFEST,
    PLAN,
    RECIPE,
    SCHEMA,
    WEIGHT_EDITS,
    id_of,
)
from ..runtime.plan_file import LayerEntry, write_plan
from ..runtime.publish import publish_folder
from ..runtime.strict_json import Json, canonical

if TYPE_CHECKING:
    from ..targets import Build
    from .capture import Model
    from .variants import Variant

_TOOLS = ("numpy", "torch", "transformers", "apache-tvm", "apache-tvm-ffi")


def write_artifact(
    out: Path,
    *,
    model: "Model",
    recipe: str,
    recipe_toml: str,
    variants: Sequence["Variant"],
    plans: Sequence[AttentionPlan],
    constants: Mapping[int, Mapping[str, np.ndarray]],
    weight_edits: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Any],
    calibration: str | None,
    targets: Mapping[str, Mapping[str, "Build"]],
) -> str:
    """Create the folder `out` and return the id of the artifact in it.

    Args:
        out: path that does not exist.
        model: name, architecture, structure facts and fingerprint go into the manifest.
        recipe: name of the recipe.
        recipe_toml: its text.
        variants: the rewritten graphs with their layers.
        plans: the distinct plans; plan i has the key "p<i>".
        constants: arrays by layer and short name, float32, float64 or int64.
        weight_edits: {"parameter", "ops"} in order; an op names its constant by full key.
        weights: samples of a few weights, to know the model again.
        calibration: what to call the text that constants were calibrated on, if any.
        targets: by requested target and plan key, what was built.

    Raises: KvantError "output-exists", "output-folder-missing" or "output-not-written"; nothing is
        left behind.
    """
    files = {
        PLAN: write_plan(_entries(variants, plans), plans),
        RECIPE: recipe_toml.encode(),
        GRAPH: _graphs(variants),
        CONSTANTS: _constants(constants),
        WEIGHT_EDITS: canonical([dict(edit) for edit in weight_edits]),
    }
    table, built = _targets(targets)
    files |= built
    manifest = canonical(
        {
            "schema": {"major": SCHEMA[0], "minor": SCHEMA[1]},
            "kvant": __version__,
            "requires": [],
            "tools": _tool_versions(),
            "model": _model(model) | {"weights": _plain(weights)},
            "recipe": recipe,
            "calibration": calibration,
            "targets": table,
            "files": {name: _listed(data) for name, data in files.items()},
        }
    )
    identity = id_of(manifest)
    publish_folder(out, files | {MANIFEST: manifest, ID: identity.encode() + b"\n"})
    return identity


def _model(model: "Model") -> dict[str, Json]:
    return {
        "name": model.name,
        "architecture": model.architecture,
        "facts": _plain(model.facts),
        "fingerprint": model.fingerprint,
    }


def _listed(data: bytes) -> Json:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _entries(variants: Sequence["Variant"], plans: Sequence[AttentionPlan]) -> list[LayerEntry]:
    """Return one entry for each layer, in order of index."""
    entries = [
        LayerEntry(
            layer.index, layer.structure, layer.prefix, graph, f"p{plans.index(variant.plan)}"
        )
        for graph, variant in enumerate(variants)
        for layer in variant.layers
    ]
    return sorted(entries, key=lambda entry: entry.index)


def _graphs(variants: Sequence["Variant"]) -> bytes:
    """Return all graphs, each with its own "kvant 1" line, without the folders of locations."""
    texts = []
    for variant in variants:
        graph = variant.graph
        ops = tuple(dataclasses.replace(op, loc=_without_folder(op.loc)) for op in graph.ops)
        texts.append(print_graph(dataclasses.replace(graph, ops=ops)))
    return "\n".join(texts).encode()


def _without_folder(loc: str | None) -> str | None:
    """Return "model.py:7: code" of "/some/where/model.py:7: code"; a relative path stays."""
    if loc is None or not loc.startswith("/"):
        return loc
    path, mark, rest = loc.partition(":")
    return path.rsplit("/", 1)[-1] + mark + rest


def _constants(constants: Mapping[int, Mapping[str, np.ndarray]]) -> bytes:
    from safetensors.numpy import save

    arrays = {
        f"layers.{layer}.{name}": np.ascontiguousarray(array)
        for layer, own in sorted(constants.items())
        for name, array in sorted(own.items())
    }
    # More than one key here would come out in another order in every process.
    return bytes(save(arrays, metadata={"format": "kvant"}))


def _targets(
    targets: Mapping[str, Mapping[str, "Build"]],
) -> tuple[dict[str, Json], dict[str, bytes]]:
    """Return the manifest's table of targets, and all their files by path in the artifact."""
    table: dict[str, Json] = {}
    files: dict[str, bytes] = {}
    for requested, builds in targets.items():
        names = {build.target for build in builds.values()}
        if len(names) != 1:
            raise ValueError(f"target {requested} was built as {sorted(names)}")
        target = names.pop()
        own = {
            f"targets/{target}/{key}/{name}": data
            for key, build in builds.items()
            for name, data in build.files.items()
        }
        table[target] = _target_facts(list(builds.items())) | {"files": list[Json](sorted(own))}
        files |= own
    return table, files


def _target_facts(builds: Iterable[tuple[str, "Build"]]) -> dict[str, Json]:
    """Return the facts of one target; kernels are named "<plan key>/<kernel>"."""
    facts: dict[str, Json] = {}
    kernels: dict[str, Json] = {}
    for key, build in builds:
        own = build.facts.get("kernels", {})
        for name, does in own.items() if isinstance(own, dict) else ():
            kernels[f"{key}/{name}"] = does
        rest = {name: value for name, value in build.facts.items() if name != "kernels"}
        if facts and facts != rest:
            raise KvantError(
                "target-facts",
                f"plans of one target were built for different machines: {facts} and {rest}",
                where=f"target {build.target}",
                fix="this is a bug in kvant, please report it",
            )
        facts = rest
    return facts | {"kernels": kernels}


def _tool_versions() -> dict[str, Json]:
    """Return the versions of what took part; a package that is not installed did not."""
    versions: dict[str, Json] = {}
    for name in _TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _plain(value: Any) -> Json:
    """Return a value as JSON: records and arrays become objects and lists, a path its name."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.generic() | np.ndarray():
            return _plain(value.tolist())
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case Path():
            return value.name
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _plain(dataclasses.asdict(value))
        case Iterable():
            return [_plain(item) for item in value]
    raise TypeError(f"{value!r} cannot be written to a manifest")
