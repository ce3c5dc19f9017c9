"""Read an artifact: check first, trust afterwards, load native code last.

The order is that of cheap and safe first: the folder, the manifest, the pinned id, the closed
world, every size and digest, this machine, the plan and the constants. Native code is loaded only
then, from the bytes whose digest was compared. A refusal at any step leaves nothing behind.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan
from .constants import Array, by_layer, check_maps, read_constants, read_weight_edits
from .folder import check_closed_world, open_folder, read_small, read_verified
from .manifest import (
    CONSTANTS,
    ID,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    PLAN,
    WEIGHT_EDITS,
    Manifest,
    read_manifest,
)
from .plan_file import LayerEntry, read_plan
from .target import Chosen, build_kernels, choose_target, kernel_rows

if TYPE_CHECKING:
    from .cache import Cache
    from .stream import Kernels

SHOWN_CONTEXT = 4096
"""Tokens of the cache for which `show` gives bits and bytes."""


@dataclass(frozen=True, slots=True)
class Contents:
    """A folder whose every byte was compared with its manifest."""

    path: Path
    manifest: Manifest
    files: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """An artifact with the kernels of one target, ready to serve.

    Attributes:
        path: folder it was read from; nothing is read from it any more.
        id: sha256 of the manifest, hexadecimal.
        manifest: all facts of the manifest.
        target: name of the chosen target, such as "cpu-x86-64-v3" or "reference".
        layers: index, parameter prefix and plan key of each layer.
        plans: plan of each layer, by index.
        constants: arrays of each layer by short name, read-only, by index.
        tensors: the same arrays by full key, "layers.0.kvant.k_order".
        weight_edits: {"parameter", "ops"} objects, in the form of weight_edits.json.
        kernels: what computes.
        passed_over: why each other target was not chosen.
    """

    path: Path
    id: str
    manifest: dict[str, Any] = field(repr=False)
    target: str
    layers: tuple[LayerEntry, ...] = field(repr=False)
    plans: tuple[AttentionPlan, ...] = field(repr=False)
    constants: tuple[dict[str, Array], ...] = field(repr=False)
    tensors: dict[str, Array] = field(repr=False)
    weight_edits: tuple[dict[str, Any], ...] = field(repr=False)
    kernels: "Kernels" = field(repr=False)
    passed_over: dict[str, str] = field(repr=False)

    @property
    def layer_count(self) -> int:
        """Number of layers."""
        return len(self.plans)

    @property
    def recipe(self) -> str:
        """Name of the recipe."""
        return str(self.manifest["recipe"])

    @property
    def calibration(self) -> str | None:
        """What the compiler calls the text that constants were calibrated on, if any."""
        text = self.manifest["calibration"]
        return None if text is None else str(text)

    def plan_of(self, layer: int) -> AttentionPlan:
        """Return the plan of one layer."""
        return self.plans[layer]

    def new_cache(self, batch: int = 1, max_tokens: int = 32768, start: object = None) -> "Cache":
        """Return an empty cache of this artifact.

        Args:
            batch: rows.
            max_tokens: limit of the tokens in a row; memory is taken by page, as needed.
            start: int64[B], first valid column of each row (left padding); all valid if none.

        Raises: KvantError for sizes that are not positive or do not fit.
        """
        from .cache import Cache

        return Cache(
            self.plans,
            self.kernels,
            batch=batch,
            max_tokens=max_tokens,
            start=start,
            artifact_id=self.id,
        )

    def restore(self, path: str | Path) -> "Cache":
        """Return the cache that `Cache.save` wrote to a file, if it was a cache of this artifact.

        Raises: KvantError if the file is damaged or belongs to another artifact.
        """
        from .restore import restore

        return restore(self, path)

    def full_bytes_per_token(self) -> int:
        """Return the bytes of a token in a cache of 16-bit floats, for comparison."""
        return 2 * sum(plan.elements_per_token for plan in self.plans)

    def show(self) -> dict[str, Any]:
        """Return what `show` prints; bits and bytes are of a cache of SHOWN_CONTEXT tokens."""
        size = sum(plan.bytes(SHOWN_CONTEXT) for plan in self.plans)
        elements = sum(plan.elements_per_token for plan in self.plans)
        targets = self.manifest["targets"]
        return {
            "id": self.id,
            "model": self.manifest["model"]["name"],
            "recipe": self.recipe,
            "calibration": self.calibration,
            "targets": sorted(targets),
            "layers": self.layer_count,
            "bits_per_element": 8.0 * size / (elements * SHOWN_CONTEXT),
            "cache_bytes_per_token": size / SHOWN_CONTEXT,
            "context": SHOWN_CONTEXT,
            "kernels": kernel_rows(targets),
        }


def read_contents(path: str | Path, id: str | None = None) -> Contents:
    """Return the verified bytes of an artifact; nothing of it is loaded or run.

    Args:
        path: folder that holds manifest.json.
        id: refuse any other artifact than this one.

    Raises: KvantError, see `kvant.runtime.manifest` and `kvant.runtime.folder` for the codes.
    """
    where = os.fspath(path)
    root = open_folder(where)
    try:
        raw = _manifest_bytes(root, where)
        id_file = read_small(root, ID, where, 128)
        manifest = read_manifest(raw, id_file, id, where)
        check_closed_world(root, [MANIFEST, ID, *manifest.files], where)
        files = read_verified(root, manifest.files, where)
    finally:
        os.close(root)
    return Contents(Path(path), manifest, files)


def load(path: str | Path, target: str = "auto", id: str | None = None) -> Artifact:
    """Return an artifact, ready to serve. It is native code: load only what you built or pinned.

    Args:
        path: folder made by `kvant compile`.
        target: "auto" for the best that runs here, "cpu", "cuda", a full name, or "reference".
            "auto" never falls back to the reference when the artifact has compiled kernels.
        id: refuse any other artifact than this one.

    Raises: KvantError of `read_contents`, "unknown-target", "no-usable-target", "plan-wrong",
        "constants-wrong", "constants-unreadable", "weight-edits-wrong".
    """
    contents = read_contents(path, id)
    where = os.fspath(path)
    chosen = choose_target(contents.manifest.targets, target, where)
    return _assemble(contents, chosen, where)


def _assemble(contents: Contents, chosen: Chosen, where: str) -> Artifact:
    """Read plan and constants, check them against each other, and build the kernels last."""
    files = contents.files
    layers, plans = read_plan(files[PLAN], where)
    tensors = read_constants(files[CONSTANTS], len(layers), where)
    constants = by_layer(tensors, len(layers))
    for index, (plan, own) in enumerate(zip(plans, constants, strict=True)):
        check_maps(plan, own, index, where)
    edits = read_weight_edits(files[WEIGHT_EDITS], tensors, where)
    kernels = build_kernels(chosen, layers, plans, constants, files, where)
    return Artifact(
        path=contents.path,
        id=contents.manifest.id,
        manifest=contents.manifest.facts,
        target=chosen.name,
        layers=layers,
        plans=plans,
        constants=constants,
        tensors=tensors,
        weight_edits=edits,
        kernels=kernels,
        passed_over=chosen.passed_over,
    )


def _manifest_bytes(root: int, where: str) -> bytes:
    try:
        return read_small(root, MANIFEST, where, MAX_MANIFEST_BYTES)
    except KvantError as error:
        if error.code != "file-missing":
            raise
        raise KvantError(
            "manifest-missing",
            "the folder holds no manifest.json",
            where=where,
            fix="give the folder that `kvant compile` made",
        ) from None
