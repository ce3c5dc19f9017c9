"""Read the plan of one attention structure off its rewritten graph.

Where each part comes from:

what stands between projection or RoPE and cache_write   online maps of the stream (append)
what stands before attend's q                             q_maps (prepare)
what stands after attend                                  out_maps (on the output)
cache_write's `store`                                     tokens, formats, windows
"""

from typing import Literal

from .basis import map_of, maps_after, maps_before
from .encodings import Tokens
from .errors import KvantError
from .graph import Graph, Op, Value
from .layouts import page_tokens
from .maps import Map
from .plan import AttentionPlan, StreamPlan
from .types import TensorType


def plan_from_graph(graph: Graph, compute: Literal["float", "int"] = "float") -> AttentionPlan:
    """Return the plan of a graph with one attention site.

    Args:
        graph: verified and rewritten; every cache_write has its final `store`.
        compute: arithmetic of attend, see `AttentionPlan`.

    Raises: KvantError("no-attention-site", "unsupported-attention", "basis-disagrees") where the
        runtime cannot serve the graph, and what the records of the plan raise.
    """
    sites = graph.find("attend")
    if len(sites) != 1:
        raise KvantError(
            "no-attention-site",
            f"{len(sites)} attend operations",
            where=f"graph @{graph.name}",
            fix="pass a graph with exactly one",
        )
    site = sites[0]
    if site.attr("causal") is not True:
        raise _unsupported(graph, "attention that is not causal", "only causal attention is cached")
    q, k_read, v_read = site.args[:3]
    k, v = _stream(graph, k_read, "k"), _stream(graph, v_read, "v")
    q_heads, _ = _head_shape(graph, q)
    repeat = q_heads // k.heads
    softcap, window = site.attr("softcap"), site.attr("window")
    return AttentionPlan(
        q_heads=q_heads,
        scale=site.attr_as("scale", float),
        softcap=None if softcap is None else site.attr_as("softcap", float),
        window=None if window is None else site.attr_as("window", int),
        q_maps=_maps(graph, maps_before(graph, q)[0], repeat),
        k=k,
        v=v,
        out_maps=_maps(graph, maps_after(graph, site.result)[0], repeat),
        compute=compute,
        sinks=_sinks(graph, site),
    )


def _sinks(graph: Graph, site: Op) -> str | None:
    """Return the name of the parameter that holds the learned sinks."""
    if len(site.args) == 3:
        return None
    made = graph.producer(site.args[3])
    if made.name != "param":
        raise _unsupported(graph, f"sinks made by {made.name}", "use a parameter")
    return made.attr_as("name", str)


def _stream(graph: Graph, read: Value, role: str) -> StreamPlan:
    """Return the stream that attend reads through `read`."""
    reader = graph.producer(read)
    if reader.name != "cache_read":
        what = f"{reader.name} between cache_read and attend, on {role}"
        raise _unsupported(graph, what, "move the map to q (for k) or to the output (for v)")
    writer = graph.producer(reader.args[0])
    if writer.name != "cache_write" or writer.attr("role") != role:
        raise _unsupported(graph, f"{read} is not read from cache[{role}]", "write the role first")
    heads, channels = _head_shape(graph, writer.args[0])
    maps = _maps(graph, maps_before(graph, writer.args[0])[0], 1)
    basis = writer.attr_as("basis", tuple)
    # Folded maps stand before the online ones: they are nearer to the weights.
    if maps and basis[-len(maps) :] != maps:
        raise KvantError(
            "basis-disagrees",
            f"cache[{role}] has the basis {basis}, but {maps} are applied to it",
            where=f"graph @{graph.name}: {writer.result}",
            fix="a pass that maps a stream must add the same map to its basis",
        )
    tokens = writer.attr_as("store", Tokens)
    return StreamPlan(role, heads, channels, maps, tokens, page_tokens(tokens.rest))


def _head_shape(graph: Graph, value: Value) -> tuple[int, int]:
    """Return (heads, channels) of a value [B, H, T, D]."""
    shape = value.type.shape if isinstance(value.type, TensorType) else ()
    if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        fix = "heads and channels are axes 1 and 3, known numbers"
        raise _unsupported(graph, f"{value} has the type {value.type}", fix)
    return shape[1], shape[3]


def _maps(graph: Graph, ops: tuple[Op, ...], repeat: int) -> tuple[Map, ...]:
    """Return the maps of online ops; their constants must be such that an artifact can hold."""
    for op in ops:
        constant = graph.producer(op.args[-1])
        if op.name != "hadamard" and (constant.name != "param" or op.attr("repeat") != repeat):
            what = f"{op.name} by {constant.name} with repeat {op.attr('repeat')}"
            raise _unsupported(graph, what, f"use a parameter, and repeat {repeat}")
    return tuple(map_of(graph, op) for op in ops)


def _unsupported(graph: Graph, what: str, fix: str) -> KvantError:
    return KvantError("unsupported-attention", what, where=f"graph @{graph.name}", fix=fix)
