"""What `kvant show` and `kvant compile` say of an artifact, as one dictionary."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..ir.encodings import Raw
from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan
from ..runtime.target import choose_target

if TYPE_CHECKING:
    from ..runtime.artifact import Artifact

LONGEST = 32768
"""Tokens up to which it is looked for where a cache becomes smaller than one of 16-bit floats."""

_STEP = 16


def facts_of(artifact: "Artifact") -> dict[str, Any]:
    """Return what `Artifact.show` gives, and what follows from it.

    Added: tokens_per_gb; bytes_full_per_token (16-bit floats); smaller_from (tokens of context, or
    None); size (bytes on disk); kept (layers that stay as they are); chosen and passed_over (which
    target runs here, and one sentence for each other).
    """
    facts = artifact.show()
    chosen, passed_over = _targets_here(artifact.manifest["targets"], str(artifact.path))
    return facts | {
        "tokens_per_gb": 1e9 / facts["cache_bytes_per_token"],
        "bytes_full_per_token": artifact.full_bytes_per_token(),
        "smaller_from": smaller_from(artifact.plans),
        "size": sum(f.stat().st_size for f in artifact.path.rglob("*") if f.is_file()),
        "kept": _kept(artifact.plans),
        "chosen": chosen,
        "passed_over": passed_over,
    }


def smaller_from(plans: Iterable[AttentionPlan]) -> int | None:
    """Return the context from which on the cache is smaller than one of 16-bit floats, in tokens.

    Looked for in steps of 16 tokens; None if it is not so at `LONGEST`.
    """
    count = Counter(plans)

    def spared(length: int) -> int:
        """Bytes less than in 16-bit floats; negative for more."""
        return sum(
            times * (2 * length * plan.elements_per_token - plan.bytes(length))
            for plan, times in count.items()
        )

    found = None
    for length in range(LONGEST, 0, -_STEP):
        # One token more opens a page: the worst length of the step.
        if min(spared(length), spared(length + 1)) <= 0:
            break
        found = length
    return found


def _kept(plans: Iterable[AttentionPlan]) -> dict[str, Any]:
    """Return the layers that are not quantized, their dtypes, and the windows of their rings."""
    layers = {
        index: plan
        for index, plan in enumerate(plans)
        if not (plan.k.tokens.quantizes or plan.v.tokens.quantizes)
    }
    if not layers:
        return {}
    formats = {s.tokens.rest for plan in layers.values() for s in (plan.k, plan.v)}
    return {
        "layers": list(layers),
        "dtypes": sorted(fmt.dtype for fmt in formats if isinstance(fmt, Raw)),
        "windows": sorted({plan.window for plan in layers.values() if plan.window}),
    }


def _targets_here(
    targets: Mapping[str, Mapping[str, Any]], where: str
) -> tuple[str | None, dict[str, str]]:
    """Return the target that `load` takes on this machine, and why each other is not taken."""
    reasons: dict[str, str] = {}
    try:
        chosen = choose_target(targets, "auto", where)
        return chosen.name, chosen.passed_over
    except KvantError:
        for name in targets:
            try:
                choose_target(targets, name, where)
            except KvantError as error:
                reasons[name] = error.what
    return None, reasons
