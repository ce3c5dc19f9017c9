"""OPS: the table of operations. One row: type rule, attributes, NumPy meaning, equation.

Axes: B batch, T new tokens, S stored tokens, H heads, D head width; heads are in [B, H, T, D]. A
constant with one row per KV head serves `repeat` query heads: head h reads row h // repeat.

A type rule is a signature: one group of axes for each operand, an arrow, the result; `|` parts the
cases. Equal names are equal sizes. `*` alone is any number of axes; names of attributes are their
values, and kv is heads // repeat. even (at most D) and pow2 (a power of two) are what they say,
and `int` is an integer tensor.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import attention, rope
from .arrays import Array
from .attrs import AttrValue
from .encodings.tokens import Tokens
from .errors import KvantError, nearest
from .graph import Value
from .maps import Map, map_cols, map_heads, map_rows
from .types import CacheType, Dim, TensorType, Type, add_sizes

Arrays = tuple[Array, ...]
Attrs = Mapping[str, Any]  # of the kinds that the row declares: checked before a rule sees them
AttrItems = tuple[tuple[str, AttrValue], ...]
Operands = tuple[TensorType, ...]
TypeRule = Callable[[Operands, Attrs], tuple[Type, ...]]


@dataclass(frozen=True, slots=True)
class Run:
    """What one evaluation carries besides values: names to arrays, and the state of each role."""

    inputs: Mapping[str, Array]
    params: Mapping[str, Array]
    state: dict[str, Array]


Meaning = Callable[[Run, Arrays, Attrs], Array | Arrays]


@dataclass(frozen=True, slots=True)
class OpDef:
    """One operation.

    Attributes:
        arity: number of operands, or the numbers it may be.
        rule: a signature, or a function where that cannot say it.
        attrs: for each attribute a row of KINDS, and the default if it has one.
        evaluate: the meaning; a tuple of arrays where there are several results.
        equation: the meaning for a reader.
    """

    arity: int | tuple[int, ...]
    rule: str | TypeRule
    attrs: Mapping[str, tuple[Any, ...]]
    evaluate: Meaning
    equation: str


def _is_int(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _all(value: object, holds: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple) and all(map(holds, value))


KINDS: dict[str, Callable[[object], bool]] = {
    "text": lambda v: isinstance(v, str),
    "bool": lambda v: isinstance(v, bool),
    "count": lambda v: _is_int(v, 1),
    "count or none": lambda v: v is None or _is_int(v, 1),
    "index": lambda v: _is_int(v, 0),
    "number": _is_number,
    "number or none": lambda v: v is None or _is_number(v),
    "tuple of counts": lambda v: v != () and _all(v, lambda n: _is_int(n, 1)),
    "rope style (half, adjacent)": lambda v: v in rope.STYLES,
    "token encoding": lambda v: isinstance(v, Tokens),
    "tuple of maps": lambda v: _all(v, lambda m: isinstance(m, Map)),
}


# Type rules that no signature says: the types of the operands -> the types of the results.
def _need(holds: bool, what: str) -> None:
    if not holds:
        raise KvantError("ill-typed-op", what, where="the operands", fix="see kvant.ir.ops.OPS")


def _declared(types: Operands, a: Attrs) -> tuple[Type, ...]:
    _need(False, "its type is declared, not inferred; use Builder.input or Builder.param")
    return ()


def _broadcast(types: Operands, a: Attrs) -> tuple[Type, ...]:
    rank = max(len(t.shape) for t in types)
    x, y = ((1,) * (rank - len(t.shape)) + t.shape for t in types)
    fits = all(m == n or 1 in (m, n) for m, n in zip(x, y, strict=True))
    _need(fits, f"{types[0]} and {types[1]} do not fit together")
    shape = tuple(n if m == 1 else m for m, n in zip(x, y, strict=True))
    return (TensorType(types[0].dtype, shape),)


def _slice_rows(types: Operands, a: Attrs) -> tuple[Type, ...]:
    (w,), start, stop = types, a["start"], a["stop"]
    rows = w.shape[0] if w.shape else 0
    fits = isinstance(rows, int) and start < stop <= rows
    _need(fits, f"{w} has no rows {start} to {stop}")
    return (TensorType(w.dtype, (stop - start, *w.shape[1:])),)


def _split_last(types: Operands, a: Attrs) -> tuple[Type, ...]:
    (x,), sizes = types, a["sizes"]
    _need(x.shape[-1:] == (sum(sizes),), f"{sizes} does not add up to the last axis of {x}")
    return tuple(TensorType(x.dtype, (*x.shape[:-1], n)) for n in sizes)


# Type rules that are signatures.
def _cases(rule: str) -> list[tuple[list[list[str]], str]]:
    """Return the cases: names of the axes of each operand, and the result."""
    parts = [case.split(" -> ") for case in rule.split(" | ")]
    return [([axes.split() for axes in left.split(", ")], right) for left, right in parts]


def _signature(name: str, rule: str, types: Operands, a: Attrs) -> tuple[Type, ...]:
    """Return the result's type by the first case that fits."""
    why: list[str] = []
    for operands, right in _cases(rule):
        sizes: dict[str, Any] = dict(a)
        if "heads" in a and "repeat" in a and a["heads"] % a["repeat"] == 0:
            sizes["kv"] = a["heads"] // a["repeat"]
        problem = match(operands, types, sizes) if len(operands) == len(types) else None
        if problem is None and len(operands) == len(types):
            if right == "cache":
                return (CacheType(a["role"]),)
            dims = [d for axis in right.split() for d in _result_sizes(axis, sizes)]
            return (TensorType(types[0].dtype, tuple(dims)),)
        why += [problem] if problem else []
    wanted = " or ".join(case.split(" -> ")[0] for case in rule.split(" | "))
    given = ", ".join(map(str, types))
    _need(False, f"{name} takes {wanted}, got {given}: {'; or '.join(dict.fromkeys(why))}")
    return ()


def _result_sizes(axis: str, sizes: Mapping[str, Any]) -> tuple[Dim, ...]:
    if axis == "S+T":
        return (add_sizes("S", sizes["T"]),)
    if axis == "*":
        return tuple(sizes["*"])
    return (math.prod(sizes[n] for n in axis.split("*")) if "*" in axis else sizes[axis],)


def match(operands: list[list[str]], types: Operands, sizes: dict[str, Any]) -> str | None:
    """Bind the names of axes to sizes.

    Args:
        operands: the names of the axes of each operand; a number is that size.
        types: of the operands.
        sizes: what is known by name; what is found is added.

    Returns: what does not fit, or None.
    """
    pairs: list[tuple[str, Any]] = []
    for names, given in zip(operands, types, strict=True):
        axes, shape = [n for n in names if n != "int"], given.shape
        if axes != names and given.dtype not in ("i64", "i32"):
            return f"{given} is not integer"
        if axes[:1] == ["*"]:
            many = len(shape) - len(axes) + 1
            pairs.append(("*", shape[: max(many, 0)]))
            axes, shape = axes[1:], shape[max(many, 0) :]
        if len(axes) != len(shape):
            return f"{given} is not [{', '.join(names)}]"
        pairs += zip(axes, shape, strict=True)
    pairs.sort(key=lambda pair: len(pair[0]) > 1 and "*" in pair[0])  # products last
    return next((why for axis, size in pairs if (why := _bind(axis, size, sizes))), None)


def _bind(axis: str, size: Any, sizes: dict[str, Any]) -> str | None:
    """Bind one axis: a number, a name, or a product with one unknown name."""
    if axis.isdigit():
        return None if size == int(axis) else f"{size} is not {axis}"
    names = [axis] if axis == "*" else axis.split("*")
    free = [n for n in names if n not in sizes]
    if len(names) > 1:
        known = math.prod(sizes[n] for n in names if n in sizes)
        if not isinstance(size, int) or size % known or (not free and size != known):
            return f"{axis} is {size}, not {'a multiple of ' if free else ''}{known}"
        size //= known
    for name in free:
        sizes[name] = size
        if name == "even" and (not isinstance(size, int) or size % 2 or size > sizes["D"]):
            return f"{size} is not even, or more than {sizes['D']}"
        if name == "pow2" and (not _is_int(size, 1) or size & (size - 1)):
            return f"{size} is no power of two"
    if len(names) == 1 and sizes[axis] != size:
        return f"{axis} is {sizes[axis]} and {size}"
    return None


# Meanings: arrays -> array, or a tuple where there are several results.
def _rms_norm(run: Run, arrays: Arrays, a: Attrs) -> Array:
    x, w = arrays
    gain = (w[:, None, :] if w.ndim == 2 else w) + a["offset"]
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + a["eps"]) * gain)


def _map(of: Callable[..., Array], kind: str) -> Meaning:
    """Return the meaning of the op that is the map `kind`, applied by `of` of ir/maps.py."""
    return lambda run, arrays, a: of(kind, *arrays, **a)


def _split_heads(run: Run, arrays: Arrays, a: Attrs) -> Array:
    b, t, c = arrays[0].shape
    return arrays[0].reshape(b, t, a["heads"], c // a["heads"]).swapaxes(1, 2)


def _merge_heads(run: Run, arrays: Arrays, a: Attrs) -> Array:
    b, h, t, d = arrays[0].shape
    return arrays[0].swapaxes(1, 2).reshape(b, t, h * d)


def _cache_write(run: Run, arrays: Arrays, a: Attrs) -> Array:
    """Append x to the state, in full precision; give what is read: history as stored, x as raw."""
    (x,) = arrays
    empty = np.zeros((*x.shape[:2], 0, x.shape[3]), x.dtype)
    history = run.state.get(a["role"], empty)
    run.state[a["role"]] = np.concatenate((history, x), axis=2)
    read = np.concatenate((a["store"].simulate(history), a["store"].as_raw(x)), axis=2)
    return read.astype(x.dtype)


def _attend(run: Run, arrays: Arrays, a: Attrs) -> Array:
    lengths = np.full(len(arrays[0]), arrays[1].shape[2], np.int64)
    given = {"lengths": lengths, "sinks": (*arrays, None)[3], **a}
    return attention.attend(*arrays[:3], **given)[0].astype(arrays[0].dtype)


_NAME = {"name": ("text",)}
_REPEAT: dict[str, tuple[Any, ...]] = {"repeat": ("count", 1)}
_SCALE = _REPEAT | {"inverse": ("bool", False)}
_HEADS: dict[str, tuple[Any, ...]] = {"heads": ("count",)}
_SPAN = {"start": ("index",), "stop": ("count",)}
_NORM = {"eps": ("number",), "offset": ("number", 0.0)}
_STYLE: dict[str, tuple[Any, ...]] = {"style": ("rope style (half, adjacent)", "half")}
_WRITE = {"role": ("text",), "store": ("token encoding",), "basis": ("tuple of maps", ())}
_ATTEND = {
    "scale": ("number",),
    "causal": ("bool", True),
    "softcap": ("number or none", None),
    "window": ("count or none", None),
}
# Rows of a weight, a bias, a norm weight; {} is what marks the constant's type.
_ROWS = (
    "heads*D N, {0}kv D -> heads*D N | heads*D, {0}kv D -> heads*D"
    " | D, {0}kv D -> heads D | heads D, {0}kv D -> heads D"
)

# fmt: off
OPS: dict[str, OpDef] = {
    "input": OpDef(0, _declared, _NAME, lambda r, x, a: r.inputs[a["name"]], "y = given"),
    "param": OpDef(0, _declared, _NAME, lambda r, x, a: r.params[a["name"]], "w = given"),
    "add": OpDef(2, _broadcast, {}, lambda r, x, a: x[0] + x[1], "y = a + b"),
    "mul": OpDef(2, _broadcast, {}, lambda r, x, a: x[0] * x[1], "y = a b"),
    "linear": OpDef((2, 3), "* C, O C -> * O | * C, O C, O -> * O", {},
                    lambda r, x, a: sum(x[2:], x[0] @ x[1].T), "y = x w^T + b"),
    "slice_rows": OpDef(1, _slice_rows, _SPAN, lambda r, x, a: x[0][a["start"] : a["stop"]],
                        "y[i] = w[start + i]"),
    "transpose_w": OpDef(1, "O C -> C O", {}, lambda r, x, a: x[0].T, "y[i, j] = w[j, i]"),
    "split_heads": OpDef(1, "B T heads*D -> B heads T D", _HEADS, _split_heads,
                         "y[b, h, t, d] = x[b, t, h D + d]"),
    "merge_heads": OpDef(1, "B H T D -> B T H*D", {}, _merge_heads,
                         "y[b, t, h D + d] = x[b, h, t, d]"),
    "split_last": OpDef(1, _split_last, {"sizes": ("tuple of counts",)},
                        lambda r, x, a: tuple(np.split(x[0], np.cumsum(a["sizes"])[:-1], -1)),
                        "y_i[..., j] = x[..., sum(sizes[:i]) + j]"),
    "center": OpDef(1, "* -> *", {}, lambda r, x, a: x[0] - x[0].mean(-1, keepdims=True),
                    "y = x - mean(x)"),
    "rms_norm": OpDef(2, "* D, D -> * D | B H T D, H D -> B H T D", _NORM, _rms_norm,
                      "y = x / sqrt(mean(x^2) + eps) (w + offset)"),
    "rope": OpDef(3, "B H T D, B T even, B T even -> B H T D"
                  " | B H T D, 1 T even, 1 T even -> B H T D", _STYLE,
                  lambda r, x, a: rope.turn(x[0], x[1], x[2], a["style"]),
                  "y = x cos + turn(x) sin on the first channels, by pairs; see ir/rope.py"),
    "spread": OpDef(1, "* W -> * width", _STYLE | {"width": ("count",)},
                    lambda r, x, a: rope.spread(x[0], a["width"], a["style"]),
                    "y[..., c] = x[..., pair of channel c], c < width"),
    "hadamard": OpDef(1, "* pow2 -> * pow2", {}, _map(map_heads, "hadamard"), "y = Hd x"),
    "gather": OpDef(2, "B repeat*H T D, int H D -> B repeat*H T D", _REPEAT,
                    _map(map_heads, "gather"), "y[h, c] = x[h, order[h // repeat, c]]"),
    "scale": OpDef(2, "B repeat*H T D, H D -> B repeat*H T D", _SCALE, _map(map_heads, "scale"),
                   "y[h, c] = x[h, c] s[h // repeat, c], or divided by it"),
    "cache_write": OpDef(1, "B H T D -> cache", _WRITE, _cache_write, "state += x"),
    "cache_read": OpDef(1, "B H T D -> B H S+T D", {}, lambda r, x, a: x[0],
                        "y = (stored tokens as store keeps them, new tokens as given)"),
    "attend": OpDef((3, 4), "B G*H T D, B H N D, B H N V -> B G*H T V"
                    " | B G*H T D, B H N D, B H N V, G*H -> B G*H T V", _ATTEND, _attend,
                    "y = softmax(mask(cap(scale q k^T))) v, query i at position S + i;"
                    " a sink [G*H] adds exp(sink) to the softmax's sum"),
    "scale_rows": OpDef(2, _ROWS.format(""), _HEADS | _SCALE, _map(map_rows, "scale"),
                        "y[h D + c] = w[h D + c] s[h // repeat, c], or divided by it"),
    "scale_cols": OpDef(2, "N heads*D, kv D -> N heads*D", _HEADS | _SCALE, _map(map_cols, "scale"),
                        "y[:, h D + c] = w[:, h D + c] s[h // repeat, c], or divided by it"),
    "gather_rows": OpDef(2, _ROWS.format("int "), _HEADS | _REPEAT, _map(map_rows, "gather"),
                         "y[h D + c] = w[h D + order[h // repeat, c]]"),
    "gather_cols": OpDef(2, "N heads*D, int kv D -> N heads*D", _HEADS | _REPEAT,
                         _map(map_cols, "gather"),
                         "y[:, h D + c] = w[:, h D + order[h // repeat, c]]"),
    "hadamard_rows": OpDef(1, "heads*pow2 N -> heads*pow2 N | heads*pow2 -> heads*pow2", _HEADS,
                           _map(map_rows, "hadamard"), "y_h = Hd w_h"),
    "hadamard_cols": OpDef(1, "N heads*pow2 -> N heads*pow2", _HEADS,
                           _map(map_cols, "hadamard"), "y_h = w_h Hd"),
}
# fmt: on


def complete(name: str, attrs: Mapping[str, AttrValue]) -> AttrItems:
    """Return the attributes of an op sorted, with defaults filled in and numbers made floats."""
    full: dict[str, Any] = dict(attrs)
    for key, (kind, *default) in (OPS[name].attrs if name in OPS else {}).items():
        if default:
            full.setdefault(key, default[0])
        if kind.startswith("number") and type(full.get(key)) is int:
            full[key] = float(full[key])
    return tuple(sorted(full.items()))


def problems(name: str, args: tuple[Value, ...], attrs: AttrItems) -> list[str]:
    """Return what is wrong with an op before its types are looked at; empty if nothing is."""
    if name not in OPS:
        return [f"no operation {name}; {nearest(name, OPS)}"]
    row, found, given = OPS[name], [], dict(attrs)
    arity = row.arity if isinstance(row.arity, tuple) else (row.arity,)
    if len(args) not in arity:
        found.append(f"{name} takes {' or '.join(map(str, arity))} operands, got {len(args)}")
    for arg in args:
        if isinstance(arg.type, CacheType) != (name == "cache_read"):
            wanted = "a cache" if name == "cache_read" else "tensors"
            found.append(f"{name} takes {wanted}, but {arg} is {arg.type}")
    for key in sorted(given.keys() - row.attrs.keys()):
        found.append(f"no attribute {key}; {nearest(key, row.attrs)}")
    for key, (kind, *_) in sorted(row.attrs.items()):
        if key not in given:
            found.append(f"the attribute {key} is missing; it must be: {kind}")
        elif not KINDS[kind](given[key]):
            found.append(f"the attribute {key} = {given[key]!r} must be: {kind}")
    return found


def infer(
    name: str, args: tuple[Value, ...], attrs: AttrItems, written: Mapping[str, TensorType]
) -> tuple[Type, ...]:
    """Return the types of the results of an op without `problems`.

    Args:
        name: of the op.
        args: its operands.
        attrs: its attributes, complete.
        written: what each cache value before the op was written with, by the value's name.

    Raises: KvantError ("ill-typed-op") if the type rule refuses.
    """
    found = [a.type if isinstance(a.type, TensorType) else written.get(a.name) for a in args]
    _need(None not in found, f"{' '.join(map(str, args))} was not written")
    types = tuple(t for t in found if t is not None)
    rule, given = OPS[name].rule, dict(attrs)
    return _signature(name, rule, types, given) if isinstance(rule, str) else rule(types, given)
