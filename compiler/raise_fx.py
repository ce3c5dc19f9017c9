"""Raise a torch.export program of one attention module into a graph.

Demand-driven: start at the output and recognise one idiom after the other. What an idiom eats is
never emitted, nothing is left half raised, and an op that no rule takes stops with the model's
own source line. Types are f32 whatever the model's dtype: a graph's meaning is over real numbers.

`heads` raises a node that lies as [B, T, H, D]; `value` raises any other. Both give heads in
[B, H, T, D], so the model's transposes vanish and a norm or RoPE may stand on either side of one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..ir.encodings import Raw, Tokens
from ..ir.errors import KvantError
from ..ir.graph import Graph, Value
from ..ir.rewrite import Builder
from ..ir.types import TensorType
from ..ir.verify import verify
from . import idioms
from .idioms import Node, is_op, peel, sizes
from .rope_idioms import Rope, rotates

Program = Any  # torch.export.ExportedProgram
_LATENT = "attention over a latent (MLA) is not built"
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \S+\n\s*(?P<text>[^\n]+)')


@dataclass(frozen=True, slots=True)
class Site:
    """Where the program comes from, for messages and locations.

    Attributes:
        name: of the graph.
        file: source file of the attention module's forward, as Python reports it.
        shown: the same file as it is printed: relative to its package.
        inputs: type of each input of the program, by its name; a name not here is a helper input.
    """

    name: str
    file: str
    shown: str
    inputs: dict[str, TensorType]


@dataclass(slots=True)
class Raise:
    """The state of one raise: what has been emitted for which node."""

    site: Site
    builder: Builder
    params: dict[str, str]  # name of a placeholder -> parameter name relative to the module
    made: dict[tuple[Node, str], Value] = field(default_factory=dict)
    written: set[Node] = field(default_factory=set)

    def emit(self, node: Node, op: str, *args: Value, **attrs: Any) -> Value:
        """Emit an op for `node`, with its location."""
        return self.builder.emit(op, *args, loc=location(self.site, node), **attrs)


def raise_program(program: Program, site: Site) -> Graph:
    """Return the graph of an exported attention module.

    Args:
        program: exported module whose first output is the attention's output.
        site: names and places.

    Raises: KvantError ("unsupported-op") for what no rule takes, with the model's own source line.
    """
    params = {
        spec.arg.name: spec.target.split(".", 1)[1]
        for spec in program.graph_signature.input_specs
        if spec.kind.name == "PARAMETER"
    }
    r = Raise(site, Builder(site.name), params)
    nodes = list(program.graph.nodes)
    output = nodes[-1].args[0][0]
    graph = r.builder.finish((value(r, output),))
    for node in nodes:
        if is_op(node, "kvant.cache_write.default") and node not in r.written:
            refuse(r, node, "is stored in the cache but never read by the attention")
    roles = sorted(op.attr_as("role", str) for op in graph.find("cache_write"))
    if roles != ["k", "v"] or len(graph.find("attend")) != 1:
        refuse(r, output, f"is not one attention over one k and one v (cached: {roles})")
    verify(graph)
    return graph


def location(site: Site, node: Node) -> str | None:
    """Return `file:line: source text` of the frame in the module's own forward, if recorded."""
    for frame in _FRAME.finditer(node.meta.get("stack_trace") or ""):
        if frame["file"] == site.file:
            return f"{site.shown}:{frame['line']}: {frame['text'].strip()}"
    return None


def refuse(
    r: Raise, node: Node, why: str = "is not part of an attention that kvant knows"
) -> NoReturn:
    """Raise KvantError ("unsupported-op") that shows the node and the model's own source line."""
    raise KvantError(
        "unsupported-op",
        f"{node.target}({', '.join(map(str, node.args))}) {why}",
        where=location(r.site, node) or f"{r.site.shown} (no line recorded)",
        fix="leave this model out, or add a rule to kvant/compiler/raise_fx.py",
    )


def value(r: Raise, node: Node) -> Value:
    """Return the value of a node that does not lie as [B, T, H, D]."""
    node = peel(node)
    if (node, "value") not in r.made:
        rule = _placeholder if node.op == "placeholder" else RULES.get(str(node.target))
        made = None if rule is None else rule(r, node)
        r.made[node, "value"] = made if made is not None else refuse(r, node)
    return r.made[node, "value"]


def heads(r: Raise, node: Node) -> Value:
    """Return the value [B, H, T, D] of a node that lies as [B, T, H, D]."""
    node = peel(node)
    if (node, "heads") not in r.made:
        made = _heads(r, node)
        r.made[node, "heads"] = made if made is not None else refuse(r, node)
    return r.made[node, "heads"]


def _heads(r: Raise, node: Node) -> Value | None:
    if idioms.swaps_time_and_heads(node):
        return value(r, node.args[0])
    count = idioms.splits_heads(node)
    if count is not None:
        return r.emit(node, "split_heads", value(r, node.args[0]), heads=count)
    return _norm(r, node, heads) or _center(r, node, heads) or _rope(r, node, heads, axis=2)


# Rules: a node whose op they are listed for -> its value, or None where the idiom is another.
def _placeholder(r: Raise, node: Node) -> Value | None:
    if node.name in r.params:
        return r.builder.param(r.params[node.name], TensorType("f32", sizes(node)))
    type = r.site.inputs.get(node.name)
    return None if type is None else r.builder.input(node.name, type)


def _parameter(r: Raise, node: Node) -> Value:
    node = peel(node)
    if node.name not in r.params:
        refuse(r, node, "stands where a parameter of the module is expected")
    return value(r, node)


def _linear(r: Raise, node: Node) -> Value:
    x, *params = node.args
    source = value(r, x)
    weights = [_parameter(r, p) for p in params if p is not None]
    return _project(r, node, source, weights, weights[0].name)


def _project(r: Raise, node: Node, x: Value, weights: list[Value], name: str) -> Value:
    return r.emit(node, "linear", x, *weights, hint=name.removesuffix("_weight"))


def _cut(r: Raise, node: Node) -> Value | None:
    """Channels of a fused projection are the projection with these rows of its weight and bias."""
    found = idioms.cut(node)
    if found is None:
        return None
    fused, start, stop = peel(found[0]), *found[1:]
    if (conv := idioms.conv1d(fused)) is not None:
        source = value(r, conv[0])
        weights = [_transposed(r, node, conv[1]), _parameter(r, conv[2])]
    elif is_op(fused, "aten.linear.default"):
        source = value(r, fused.args[0])
        weights = [_parameter(r, p) for p in fused.args[1:] if p is not None]
    else:
        return None
    rows = [r.emit(node, "slice_rows", w, hint=w.name, start=start, stop=stop) for w in weights]
    return _project(r, node, source, rows, weights[0].name)


def _transposed(r: Raise, node: Node, weight: Node) -> Value:
    param = _parameter(r, weight)
    key = (peel(weight), "transposed")
    if key not in r.made:
        r.made[key] = r.emit(node, "transpose_w", param, hint=param.name)
    return r.made[key]


def _view(r: Raise, node: Node) -> Value | None:
    if (conv := idioms.conv1d(node)) is not None:
        source = value(r, conv[0])
        weights = [_transposed(r, node, conv[1]), _parameter(r, conv[2])]
        return _project(r, node, source, weights, weights[0].name)
    if idioms.merges_heads(node):
        return r.emit(node, "merge_heads", heads(r, node.args[0]))
    return None


def _transpose(r: Raise, node: Node) -> Value | None:
    return heads(r, node.args[0]) if idioms.swaps_time_and_heads(node) else None


def _norm(r: Raise, node: Node, raised: Callable[[Raise, Node], Value]) -> Value | None:
    """RMSNorm: weight * x / sqrt(mean(x^2) + eps), the weight stored as it is or less one."""
    for scale, normal in idioms.operands(node, "aten.mul.Tensor"):
        weight, offset = idioms.stored_less_one(scale)
        found = idioms.normalised(normal)
        if found is not None and weight.name in r.params:
            args = raised(r, found[0]), _parameter(r, weight)
            return r.emit(node, "rms_norm", *args, eps=found[1], offset=offset)
    return None


def _torch_norm(r: Raise, node: Node) -> Value | None:
    x, shape, weight, eps = (*node.args, None, None)[:4]
    if list(shape) != list(sizes(x)[-1:]) or weight is None or eps is None:
        return None
    return r.emit(node, "rms_norm", value(r, x), _parameter(r, weight), eps=float(eps), offset=0.0)


def _center(r: Raise, node: Node, raised: Callable[[Raise, Node], Value]) -> Value | None:
    x = idioms.centered(node)
    return None if x is None else r.emit(node, "center", raised(r, x))


def _rope(r: Raise, node: Node, raised: Callable[[Raise, Node], Value], axis: int) -> Value | None:
    found = rotates(node, axis)
    if found is None:
        return None
    tables = [_rope_table(r, node, table, found) for table in (found.cos, found.sin)]
    return r.emit(node, "rope", raised(r, found.x), *tables, style=found.style)


def _rope_table(r: Raise, node: Node, table: Node, found: Rope) -> Value:
    """Return a table with an entry for each channel; q and k share it."""
    given = value(r, table)
    if not found.by_pair:
        return given
    key = (table, f"by channel, {found.style} of {found.rotated}")
    if key not in r.made:
        options = {"width": found.rotated, "style": found.style}
        r.made[key] = r.emit(node, "spread", given, hint=table.name, **options)
    return r.made[key]


def _cache_write(r: Raise, node: Node) -> Value:
    x, _, role = node.args
    r.written.add(node)
    store = Tokens(rest=Raw("f32"))
    cache = r.emit(
        node, "cache_write", value(r, x), hint=f"{role}_cache", basis=(), role=role, store=store
    )
    return r.emit(node, "cache_read", cache, hint=role)


def _attend(r: Raise, node: Node) -> Value:
    q, k, v, sinks, scale, window, softcap = node.args
    for role, part in (("k", peel(k)), ("v", peel(v))):
        if not is_op(part, "kvant.cache_write.default") or part.args[2] != role:
            refuse(r, part, f"is attended to as {role}, {_instead(part, role)}")
    parts = [value(r, q), value(r, k), value(r, v)]
    parts += [] if sinks is None else [_parameter(r, sinks)]
    options = {"scale": scale, "window": window, "softcap": softcap}
    return r.emit(node, "attend", *parts, causal=True, **options)


def _instead(node: Node, role: str) -> str:
    """Return what a node is that should be what the cache returned for a role."""
    behind = list(node.all_input_nodes)
    while behind:
        if is_op(below := behind.pop(), "kvant.cache_write.default"):
            return f"but made of what the cache holds: {_LATENT}"
        behind += below.all_input_nodes
    return f"but the cache did not return it as {role}"


RULES: dict[str, Callable[[Raise, Node], Value | None]] = {
    "aten.linear.default": _linear,
    "aten.slice.Tensor": _cut,
    "<built-in function getitem>": _cut,
    "aten.transpose.int": _transpose,
    **dict.fromkeys(idioms.VIEWS, _view),
    "aten.add.Tensor": lambda r, node: _rope(r, node, value, axis=1),
    "aten.cat.default": lambda r, node: _rope(r, node, value, axis=1),
    "aten.mul.Tensor": lambda r, node: _norm(r, node, value),
    "aten.sub.Tensor": lambda r, node: _center(r, node, value),
    "aten.rms_norm.default": _torch_norm,
    "kvant.cache_write.default": _cache_write,
    "kvant.attend.default": _attend,
}
