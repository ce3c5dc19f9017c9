"""plan.json: the distinct plans of an artifact, and which layer uses which."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn

from ..ir.errors import KvantError
from ..ir.plan import AttentionPlan
from .manifest import PLAN
from .strict_json import Json, canonical, parse_object

MAX_LAYERS = 4096
_KEY = re.compile(r"p(0|[1-9][0-9]{0,3})")


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """One layer of the model.

    Attributes:
        index: position in the model.
        structure: layers of the same structure had the same graph before rewriting.
        prefix: of its parameters, "model.layers.0.self_attn."; empty for a bare shape.
        graph: position of its rewritten graph in graph.kir.
        plan: key of its plan, which is also the folder of its kernels in a target: "p0".
    """

    index: int
    structure: int
    prefix: str
    graph: int
    plan: str


def write_plan(layers: Sequence[LayerEntry], plans: Sequence[AttentionPlan]) -> bytes:
    """Return plan.json of layers in order of index and of the plans p0, p1, ..."""
    table: dict[str, Json] = {f"p{i}": plan.to_json() for i, plan in enumerate(plans)}
    entries: list[Json] = [asdict(layer) for layer in layers]
    return canonical({"layers": entries, "plans": table})


def read_plan(raw: bytes, where: str) -> tuple[tuple[LayerEntry, ...], tuple[AttentionPlan, ...]]:
    """Return the layers and the plan of each layer.

    Raises: KvantError "plan-wrong", "json-...", or what the records of a plan raise.
    """
    place = f"{where}/{PLAN}"
    facts = parse_object(raw, place)
    match facts:
        case {"layers": [*entries], "plans": dict(table)} if len(facts) == 2:
            pass
        case _:
            _wrong("it must hold layers and plans, nothing else", place)
    if not 0 < len(entries) <= MAX_LAYERS:
        _wrong(f"it has {len(entries)} layers", place)
    plans = _plans(table, place)
    layers = tuple(_layer(entry, index, plans, place) for index, entry in enumerate(entries))
    unused = sorted(plans.keys() - {layer.plan for layer in layers})
    if unused:
        _wrong(f"no layer uses {', '.join(unused)}", place)
    return layers, tuple(plans[layer.plan] for layer in layers)


def _plans(table: Mapping[str, Json], place: str) -> dict[str, AttentionPlan]:
    plans = {}
    for key, value in table.items():
        if not _KEY.fullmatch(key):
            _wrong(f"{key!a} is not a plan key such as p0", place)
        plans[key] = AttentionPlan.from_json(value, f"{place}: {key}")
    return plans


def _layer(entry: Json, index: int, plans: Mapping[str, AttentionPlan], place: str) -> LayerEntry:
    match entry:
        case {
            "index": int(at),
            "structure": int(structure),
            "prefix": str(prefix),
            "graph": int(graph),
            "plan": str(plan),
            **rest,
        } if not rest and at == index and plan in plans and min(structure, graph) >= 0:
            return LayerEntry(at, structure, prefix, graph, plan)
        case _:
            _wrong(f"the entry of layer {index} is not well formed", place)


def _wrong(what: str, place: str) -> NoReturn:
    raise KvantError(
        "plan-wrong", what, where=place, fix="compile the artifact again with one version of kvant"
    )
