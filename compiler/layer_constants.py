"""What the passes of a recipe compute for each layer, from its weights and from statistics."""

from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..ir.errors import KvantError
from ..ir.stats import LayerStats
from ..passes import PASSES
from .bind import ModelSource
from .shape import shape_sinks
from .variants import Variant
from .weights import LayerWeights

Stage = Callable[[str], None]


def compute_constants(
    stage: Stage,
    variants: tuple[Variant, ...],
    source: ModelSource | None,
    text: str | None,
    facts: Mapping[str, Any],
) -> tuple[dict[int, dict[str, np.ndarray]], str | None]:
    """Return by layer what each pass computes from weights and statistics; and the text's name.

    Learned sinks are constants too: weights that the kernels read.

    Args:
        stage: called with the name of each stage that begins.
        variants: the rewritten graphs, with what each pass did.
        source: where weights come from; None for a shape, which has none.
        text: calibration text; made by the model itself if a pass needs it and none is given.
        facts: of the captured model.

    Raises: KvantError "needs-a-model", and what calibration and the passes refuse.
    """
    if source is None:
        _refuse_without_weights(variants)
    stats, name = _calibrate(stage, source, variants, text)
    stage("constants")
    made: dict[int, dict[str, np.ndarray]] = {}
    for variant in variants:
        for layer in variant.layers:
            sinks = variant.plan.sinks
            weights: Any = shape_sinks(facts, layer.index)
            if source is not None:
                weights = LayerWeights(source, layer.prefix)
            own: dict[str, np.ndarray] = {} if sinks is None else {sinks: weights[sinks]}
            known = ChainMap(own, weights)  # a pass may build on the constants of earlier ones
            for trace in variant.traces:
                definition = PASSES[trace.name]
                if definition.constants is not None and trace.changed:
                    of_layer = stats.get(layer.index)
                    own |= definition.constants(trace.before, known, of_layer, **trace.options)
                if definition.check_constants is not None and trace.changed:
                    definition.check_constants(trace.after, own)
            made[layer.index] = own
    return made, name


def _refuse_without_weights(variants: tuple[Variant, ...]) -> None:
    """Refuse passes that compute constants from weights or statistics: a shape has neither."""
    wanting = {
        trace.name: None
        for variant in variants
        for trace in variant.traces
        if PASSES[trace.name].constants is not None and trace.changed
    }
    if wanting:
        raise KvantError(
            "needs-a-model",
            f"pass {', '.join(wanting)} computes constants from weights, and a shape has none",
            where="the model argument",
            fix="compile a model, or choose a recipe without that pass",
        )


def _calibrate(
    stage: Stage, source: ModelSource | None, variants: tuple[Variant, ...], text: str | None
) -> tuple[Mapping[int, LayerStats], str | None]:
    """Return the statistics that the passes of a recipe ask for, and what to call their text."""
    wanting = {
        trace.name
        for variant in variants
        for trace in variant.traces
        if PASSES[trace.name].needs_stats(trace.options)
    }
    if not wanting or source is None:
        return {}, None
    from .calibrate import calibrate, named

    stage("calibrate")
    return calibrate(source, text), named(text)
