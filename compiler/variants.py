"""A recipe applied to a model: one rewritten graph for every distinct (structure, storage)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..ir.errors import KvantError
from ..ir.graph import Graph
from ..ir.plan import AttentionPlan
from ..ir.plan_from_graph import plan_from_graph
from . import recipe as recipes
from .capture import Layer, Model
from .pipeline import Trace, run, within


@dataclass(frozen=True, slots=True)
class Variant:
    """One rewritten graph, and the layers that use it."""

    graph: Graph
    plan: AttentionPlan
    traces: tuple[Trace, ...]
    layers: tuple[Layer, ...]


def rewrite(
    model: Model,
    recipe: recipes.Recipe,
    dump: str | Path | None = None,
    where: str | None = None,
) -> tuple[Variant, ...]:
    """Apply a recipe to every distinct (structure, storage) of a model.

    Args:
        model: captured.
        recipe: what to do with it.
        dump: folder for the graph after every pass; with several graphs, one folder for each.
        where: how errors name the recipe, such as its file; by its name if not given.

    Raises: KvantError if a pass changes no graph at all, or a rule matches nothing.
    """
    where = where or recipes.place(recipe, recipe)
    streams = recipes.streams_of(recipe, len(model.layers), where)
    groups: dict[Any, list[Layer]] = {}
    for layer, (k, v) in zip(model.layers, streams, strict=True):
        groups.setdefault((layer.structure, k, v), []).append(layer)
    variants = []
    for index, ((structure, k, v), layers) in enumerate(groups.items()):
        graph = model.graphs[structure]
        plan = plan_from_graph(graph)
        store: dict[str, Any] = {
            "window": recipe.window,
            "context": model.facts.get("max_tokens"),
            "dtype": model.facts["dtype"],
        }
        for stream, plain in ((k, plan.k), (v, plan.v)):
            place = f"{where}: {plain.role}"
            with within(place):
                store[plain.role] = recipes.tokens(stream, plain.channels, place)
        steps = [(item.name, item.options) for item in recipe.rewrite]
        place = f"graph{index}" if len(groups) > 1 else ""
        folder = Path(dump) / place if dump else None
        with within(where):
            traces = run(graph, [*steps, ("store", store), ("dead-code", {})], folder)
            after = traces[-1].after
            plan = _plan(after, recipe.compute)
        variants.append(Variant(after, plan, traces, tuple(layers)))
    _refuse_idle(variants, where)
    if recipe.compute not in [variant.plan.compute for variant in variants]:
        with within(where):
            plan_from_graph(variants[0].graph, recipe.compute)
    return tuple(variants)


def _plan(graph: Graph, compute: Literal["float", "int"]) -> AttentionPlan:
    """Return the plan; layers whose keys have no integer products (those kept) compute in float."""
    try:
        return plan_from_graph(graph, compute)
    except KvantError as error:
        if error.code != "integer-compute":
            raise
    return plan_from_graph(graph)


def _refuse_idle(variants: list[Variant], where: str) -> None:
    """A pass of the recipe that changed nothing anywhere is an error, not a shrug."""
    for index, first in enumerate(variants[0].traces[:-1]):
        if not all(_is_idle(variant, variant.traces[index]) for variant in variants):
            continue
        if first.name == "store":
            windows = any(variant.plan.window for variant in variants)
            raise KvantError(
                "quantizes-nothing",
                "every layer keeps its keys and values as they are"
                + (": all of them have a sliding window" if windows else ""),
                where=where,
                fix='add `window = "quantize"` to the recipe'
                if windows
                else "give k or v a format with fewer bits",
            )
        raise KvantError(
            "pass-changes-nothing",
            f"pass {first.name} changed none of the model's layers",
            where=where,
            fix="remove it from the recipe, or choose a recipe for this kind of model",
        )


def _is_idle(variant: Variant, trace: Trace) -> bool:
    """Whether a pass left a graph as it was; a ring in the model's dtype is not the recipe's."""
    is_ring = variant.plan.window is not None and trace.options.get("window") == "keep"
    return not trace.changed or is_ring
