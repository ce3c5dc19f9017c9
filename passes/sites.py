"""An attention site: where q, k and v come from, where the output goes, which maps fold where.

A pass puts a map M on a stream and its dual on the other side. `fold_points` pushes the map from
the site towards the weights, as far as the algebra allows:

                     pair-scale      scale           rotation      permutation
    split_heads      passes          passes          passes        passes
    rope             passes          refused         refused       refused
    center           refused         refused         refused       passes
    rms_norm         its weight      its weight      refused       refused
    add              refused         refused         refused       refused
    linear           its rows        its rows        its rows      its rows

(`rms_norm` takes the map and ends the walk: what changes before a norm is normalised away.) What
cannot be folded stays online, after RoPE on k and q. What does not commute is said in ir/basis.py,
by which graphs are verified; here is what that cannot see, and what is not built. Source: research
on the commutant of RoPE, and SpinQuant's names for the places.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from ..ir.arrays import Array
from ..ir.basis import NOT_PAST
from ..ir.encodings.tokens import Tokens
from ..ir.errors import KvantError
from ..ir.graph import Graph, Op, Value
from ..ir.maps import ONLINE, Gather, Hadamard, Map, Scale
from ..ir.rewrite import Builder, rewrite
from ..ir.rope import partner
from ..ir.types import TensorType
from ..ir.weight_edits import is_weight

_STREAM = (*ONLINE, "rope", "rms_norm", "center", "split_heads", "add", "linear")

Kind = Literal["pair-scale", "scale", "rotation", "permutation", "shift"]
# The map of each kind; a shift, which is not built, has none.
_MAP: dict[Kind, type[Map]] = {
    "pair-scale": Scale,
    "scale": Scale,
    "rotation": Hadamard,
    "permutation": Gather,
}
# (kind of map, op it would have to pass) -> why it may not, where NOT_PAST would let it.
_REFUSED: dict[tuple[Kind, str], str] = {
    ("scale", "rope"): "a scale that differs inside a RoPE pair does not commute with RoPE",
    ("permutation", "rms_norm"): "not built: the norm's weight would have to move too",
    **{(kind, "add"): "a bias added by an op of its own is not built" for kind in _MAP},
}
_NO_SHIFT = (
    "a shift is not built; RoPE would make it depend on the position, and under a softcap or "
    "beside a learned sink a shift of the keys would not even be exact"
)

EmitFold = Callable[[Builder, Value, Op], Value]


@dataclass(frozen=True, slots=True)
class Path:
    """The ops of one stream, from its source to the site (q, k, v) or from the site on (out).

    Attributes:
        role: "q", "k", "v" or "out".
        ops: in order of execution, without `cache_write`, `cache_read` and `attend`.
        heads: heads of the stream: query heads for q and out, key/value heads for k and v.
        repeat: heads that share one row of a constant: the group size for q and out, else 1.
        width: channels of a head.
    """

    role: str
    ops: tuple[Op, ...]
    heads: int
    repeat: int
    width: int

    @property
    def online(self) -> tuple[Op, ...]:
        """The maps that stay online: next to the site, in order of execution."""
        ops = self.ops if self.role == "out" else self.ops[::-1]
        count = 0
        while count < len(ops) and ops[count].name in ONLINE:
            count += 1
        return ops[:count] if self.role == "out" else ops[:count][::-1]

    @property
    def source(self) -> tuple[Op, ...]:
        """The ops before the online maps (for out: after them), in order of execution."""
        count = len(self.online)
        return self.ops[count:] if self.role == "out" else self.ops[: len(self.ops) - count]

    @property
    def rope(self) -> Op | None:
        """The RoPE op of the path, if it has one."""
        return next((op for op in self.ops if op.name == "rope"), None)


@dataclass(frozen=True, slots=True)
class Site:
    """One `attend` with its two cache streams.

    Attributes:
        attend, k_write, v_write: the ops.
        q, k, v, out: the paths.
        heads: key/value heads H.
        group: query heads per key/value head; query head h reads head h // group.
    """

    attend: Op
    k_write: Op
    v_write: Op
    q: Path
    k: Path
    v: Path
    out: Path
    heads: int
    group: int


def find_site(graph: Graph) -> Site | None:
    """Return the attention site of a layer graph, or None if it has none.

    Raises: KvantError if there are several, or if k or v do not come from the cache.
    """
    attends = graph.find("attend")
    if not attends:
        return None
    if len(attends) > 1:
        raise KvantError(
            "several-attention-sites",
            f"the graph has {len(attends)} attend ops",
            where=f"graph @{graph.name}",
            fix="capture one graph per layer; constants are named per layer",
        )
    attend = attends[0]
    q, k, v = attend.args[:3]
    k_write, v_write = _cache_write(graph, k), _cache_write(graph, v)
    q_heads, _ = _heads_and_width(q)
    heads, k_width = _heads_and_width(k_write.args[0])
    _, v_width = _heads_and_width(v_write.args[0])
    group = q_heads // heads
    return Site(
        attend=attend,
        k_write=k_write,
        v_write=v_write,
        q=Path("q", _walk_back(graph, q), q_heads, group, k_width),
        k=Path("k", _walk_back(graph, k_write.args[0]), heads, 1, k_width),
        v=Path("v", _walk_back(graph, v_write.args[0]), heads, 1, v_width),
        out=Path("out", _walk_on(graph, attend.result), q_heads, group, v_width),
        heads=heads,
        group=group,
    )


def partners(rope: Op) -> Array:
    """Return for every channel of a head the other one of its RoPE pair, or itself."""
    x, cos, _ = (arg.tensor.shape[-1] for arg in rope.args)
    return partner(rope.attr_as("style", str), int(str(cos)), int(str(x)))


def fold_refusal(path: Path, kind: Kind) -> str | None:
    """Return why a map of `kind` cannot reach weights along `path`, or None if it can.

    Args:
        path: of a site.
        kind: "pair-scale", "scale", "rotation", "permutation" or "shift".
    """
    found = _fold_walk(path, kind)
    return found if isinstance(found, str) else None


def fold_points(path: Path, kind: Kind) -> tuple[Op, ...]:
    """Return the ops whose weights take a map of `kind` that is wanted at the site.

    Raises: KvantError ("illegal-fold") with the reason, where the map cannot get there.
    """
    found = _fold_walk(path, kind)
    if isinstance(found, str):
        raise KvantError(
            "illegal-fold",
            f"a {kind} of {path.role} cannot be folded into weights: {found}",
            where=f"the {path.role} path: {' '.join(op.name for op in path.ops) or 'empty'}",
            fix="keep the map online, after RoPE on k and q, or leave it out",
        )
    return found


def fold_into(graph: Graph, b: Builder, op: Op, args: tuple[Value, ...], emit: EmitFold) -> Value:
    """Emit a fold point again with `emit` applied to its weight and to its bias alike.

    Args:
        graph: the graph that holds `op`.
        b: builder of the new graph.
        op: one of `fold_points`.
        args: its arguments in the new graph.
        emit: called as emit(builder, weight, op) for each.
    """
    new = tuple(
        emit(b, now, op) if is_weight(graph, old) else now
        for old, now in zip(op.args, args, strict=True)
    )
    return b.copy(op, new)[0]


def emit_write(
    b: Builder, op: Op, x: Value, basis: tuple[Map, ...], store: Tokens | None = None
) -> Value:
    """Emit a `cache_write` again, of another value in another basis or stored in another way."""
    attrs = {**dict(op.attrs), "basis": basis, "store": store or store_of(op)}
    return b.copy(replace(op, attrs=tuple(sorted(attrs.items()))), (x,))[0]


def scale_keys_online(graph: Graph, site: Site, new: Scale) -> Graph:
    """Divide k by a constant [H, D] at append and multiply q by it in prepare, after RoPE.

    Args:
        graph: of a layer.
        site: its attention site.
        new: the map of the keys, with `inverse`; the queries get its dual.
    """
    shape = TensorType("f64", (site.heads, site.k.width))

    def rule(b: Builder, op: Op, args: tuple[Value, ...]) -> Value | None:
        if op == site.k_write:
            k = b.emit("scale", args[0], b.param(new.values, shape), inverse=True, loc=op.loc)
            return emit_write(b, op, k, (*basis_of(op), new))
        if op == site.attend:
            q = b.emit("scale", args[0], b.param(new.values, shape), repeat=site.group, loc=op.loc)
            return b.copy(op, (q, *args[1:]))[0]
        return None

    return rewrite(graph, rule)


def basis_of(write: Op) -> tuple[Map, ...]:
    """Return what was applied to a stream before storage, folded or online, first one first."""
    basis = write.attr("basis")
    return basis if isinstance(basis, tuple) else ()  # type: ignore[return-value]


def store_of(write: Op) -> Tokens:
    """Return how a stream is stored."""
    return write.attr_as("store", Tokens)


def folded_of(write: Op, path: Path) -> tuple[Map, ...]:
    """Return the part of the basis that is folded into weights: it acts before what is online."""
    basis = basis_of(write)
    return basis[: len(basis) - len(path.online)]


def with_folded(write: Op, path: Path, new: Map) -> tuple[Map, ...]:
    """Return the basis with one more folded map."""
    folded = folded_of(write, path)
    return (*folded, new, *basis_of(write)[len(folded) :])


def check_once(graph: Graph, write: Op, new: Map) -> None:
    """Refuse a map that the stream already has: its constant would have two meanings.

    Raises: KvantError ("already-applied").
    """
    if new in basis_of(write):
        raise KvantError(
            "already-applied",
            f"stream {write.attr_as('role', str)} is already in the basis {new}",
            where=f"graph @{graph.name}: {write.result}",
            fix="name the pass once in the recipe",
        )


def _fold_walk(path: Path, kind: Kind) -> tuple[Op, ...] | str:
    """Return the fold points of a map, or why there are none."""
    if kind == "shift":
        return _NO_SHIFT
    if path.role == "out":
        return _fold_walk_on(path)
    for op in reversed(path.source):
        if op.name == "linear" or (op.name == "rms_norm" and _MAP[kind] is Scale):
            return (op,)
        reason, _ = NOT_PAST.get((_MAP[kind], op.name), (None, ""))
        if reason := reason or _REFUSED.get((kind, op.name)):
            return reason
        if op.name in ONLINE:
            return f"{op.name} {op.result} stands between the site and the weights"
    return "there is no projection; its values come from outside the graph"


def _fold_walk_on(path: Path) -> tuple[Op, ...] | str:
    names = tuple(op.name for op in path.source)
    if names == ("merge_heads", "linear"):
        return path.source[1:]
    return "the attention output does not go straight into a projection"


def _heads_and_width(value: Value) -> tuple[int, int]:
    """Return H and D of a value [B, H, T, D]."""
    shape = value.tensor.shape
    if len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int):
        return shape[1], shape[3]
    raise KvantError(
        "ill-formed-graph",
        f"{value} is {value.type}, not [B, H, T, D] with known H and D",
        where=f"attention site at {value}",
        fix="split the heads before the cache",
    )


def _cache_write(graph: Graph, read: Value) -> Op:
    """Return the cache_write behind an argument of attend."""
    op = graph.producer(read)
    if op.name == "cache_read":
        return graph.producer(op.args[0])
    raise KvantError(
        "ill-formed-graph",
        f"attend reads {read}, which {op.name} gives, not cache_read",
        where=f"graph @{graph.name}",
        fix="write k and v to the cache and read them back",
    )


def _walk_back(graph: Graph, value: Value) -> tuple[Op, ...]:
    """Return the ops from a stream's source to `value`."""
    ops: list[Op] = []
    while (op := graph.producer(value)).name in _STREAM and not is_weight(graph, value):
        data = [a for a in op.args if not is_weight(graph, a)]
        if op.name == "add" and len(data) != 1:
            break  # a sum of two streams, not a bias
        ops.append(op)
        if op.name == "linear":
            break
        value = op.args[0] if op.name != "add" else data[0]
    return tuple(reversed(ops))


def _walk_on(graph: Graph, value: Value) -> tuple[Op, ...]:
    """Return the ops that alone use the attention output, up to the projection."""
    ops: list[Op] = []
    while value not in graph.outputs and len(users := graph.users(value)) == 1:
        op = users[0]
        if op.name not in (*ONLINE, "merge_heads", "linear") or op.args[0] != value:
            break
        ops.append(op)
        if op.name == "linear":
            break
        value = op.result
    return tuple(ops)
