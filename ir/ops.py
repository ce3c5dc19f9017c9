"""OPS: the table of operations. One row: arity, attributes, type rule, NumPy meaning, equation.

Axes: B batch, T new tokens, S stored tokens, H heads, D head width, C channels. Heads are in
[B, H, T, D]. A constant with one row per KV head serves `repeat` query heads: head h reads row
h // repeat. The meaning is the only definition there is; targets and passes are held to it.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import attention
from .arrays import Array
from .attrs import AttrValue
from .encodings.tokens import Tokens
from .errors import KvantError
from .graph import Value
from .maps import Gather, Hadamard, Map, Scale, apply
from .types import CacheType, Dim, TensorType, Type, add_sizes

Attrs = Mapping[str, Any]  # of the kinds that the row declares: checked before a rule sees them
Operands = tuple[TensorType, ...]
Arrays = tuple[Array, ...]
REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Run:
    """What one evaluation carries besides values: names to arrays, and the state of each role."""

    inputs: Mapping[str, Array]
    params: Mapping[str, Array]
    state: dict[str, Array]


@dataclass(frozen=True, slots=True)
class Attr:
    """A declared attribute: a row of KINDS, and the default if it has one."""

    kind: str
    default: object = REQUIRED


@dataclass(frozen=True, slots=True)
class OpDef:
    """One operation. `arity` is a number of arguments, or the least and the most."""

    arity: int | tuple[int, int]
    attrs: dict[str, Attr]
    infer: Callable[[Operands, Attrs], tuple[Type, ...]]
    evaluate: "Meaning"
    equation: str


Meaning = Callable[[Run, Arrays, Attrs], Array | Arrays]
MapMeaning = Callable[[Run, Arrays, Attrs], Array]


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
    "rope style (half)": lambda v: v == "half",
    "token encoding": lambda v: isinstance(v, Tokens),
    "tuple of maps": lambda v: _all(v, lambda m: isinstance(m, Hadamard | Gather | Scale)),
}


# Type rules: the types of the operands -> the types of the results. They refuse what does not fit.
def _refuse(what: str) -> None:
    raise KvantError("ill-typed-op", what, where="the operands", fix="see kvant.ir.ops.OPS")


def _need(holds: bool, what: str) -> None:
    if not holds:
        _refuse(what)


def _declared(types: Operands, a: Attrs) -> tuple[Type, ...]:
    _refuse("its type is declared, not inferred; use Builder.input or Builder.param")
    return ()


def _broadcast(types: Operands, a: Attrs) -> tuple[Type, ...]:
    x, y = types
    long, short = (x.shape, y.shape) if len(x.shape) >= len(y.shape) else (y.shape, x.shape)
    short = (1,) * (len(long) - len(short)) + short
    fits = all(m == n or 1 in (m, n) for m, n in zip(long, short, strict=True))
    _need(fits, f"{x} and {y} do not fit together")
    shape = tuple(n if m == 1 else m for m, n in zip(long, short, strict=True))
    return (TensorType(x.dtype, shape),)


def _linear_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    x, w = types[:2]
    _need(len(w.shape) == 2, f"the weight must be [out, in], got {w}")
    _need(x.shape[-1:] == w.shape[1:], f"x is {x} but the weight is {w}")
    fits = len(types) == 2 or types[2].shape == w.shape[:1]
    _need(fits, f"the weight is {w} but the bias is {types[-1]}")
    return (TensorType(x.dtype, x.shape[:-1] + w.shape[:1]),)


def _slice_rows_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    (w,) = types
    rows = w.shape[0] if w.shape else 0
    _need(isinstance(rows, int), f"the rows of {w} must be a number")
    fits = a["start"] < a["stop"] <= int(rows)
    _need(fits, f"no rows {a['start']} to {a['stop']} in {w}")
    return (TensorType(w.dtype, (a["stop"] - a["start"], *w.shape[1:])),)


def _transpose_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    (w,) = types
    _need(len(w.shape) == 2, f"the weight must have two axes, got {w}")
    return (TensorType(w.dtype, w.shape[::-1]),)


def _split_heads_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    (x,) = types
    _need(len(x.shape) == 3, f"x must be [B, T, H*D], got {x}")
    b, t, c = x.shape
    fits = isinstance(c, int) and c % a["heads"] == 0
    _need(fits, f"{c} channels cannot be split into {a['heads']} heads")
    return (TensorType(x.dtype, (b, a["heads"], t, int(c) // a["heads"])),)


def _merge_heads_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    b, h, t, d = _heads(types[0])
    return (TensorType(types[0].dtype, (b, t, h * d)),)


def _heads(x: TensorType) -> tuple[Dim, int, Dim, int]:
    _need(len(x.shape) == 4, f"x must be [B, H, T, D], got {x}")
    b, h, t, d = x.shape
    _need(isinstance(h, int) and isinstance(d, int), f"H and D must be numbers, got {x}")
    return b, int(h), t, int(d)


def _split_last_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    (x,) = types
    fits = x.shape[-1:] == (sum(a["sizes"]),)
    _need(fits, f"{a['sizes']} does not add up to the last axis of {x}")
    return tuple(TensorType(x.dtype, (*x.shape[:-1], n)) for n in a["sizes"])


def _rms_norm_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    x, w = types
    shared = len(x.shape) > 0 and w.shape == x.shape[-1:]
    per_head = len(x.shape) == 4 and w.shape == (x.shape[1], x.shape[3])
    _need(shared or per_head, f"x is {x} but the weight is {w}; it must be [D] or [H, D]")
    return (x,)


def _rope_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    b, _, t, d = _heads(types[0])
    _need(d % 2 == 0, f"{d} channels do not make pairs")
    for table, name in zip(types[1:], ("cos", "sin"), strict=True):
        fits = table.shape in ((b, t, d), (1, t, d))
        _need(fits, f"{name} must be [{b} or 1, {t}, {d}], got {table}")
    return (types[0],)


def _hadamard_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    _power_of_two(types[0].shape[-1] if types[0].shape else 0)
    return (types[0],)


def _power_of_two(d: Dim) -> None:
    fits = isinstance(d, int) and d > 0 and d & (d - 1) == 0
    _need(fits, f"the head width must be a power of two, got {d}")


def _per_head_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    _, h, _, d = _heads(types[0])
    _constant(types[1], h, d, a)
    return (types[0],)


def _constant(s: TensorType, heads: int, width: Dim, a: Attrs) -> None:
    """Check a scale (its ops have `inverse`) or an order, with one row per KV head."""
    kind, repeat = ("a float" if "inverse" in a else "an integer"), a["repeat"]
    _need((s.dtype in ("i64", "i32")) == (kind == "an integer"), f"{s} must be {kind} tensor")
    _need(heads % repeat == 0, f"{heads} heads are not groups of {repeat}")
    fits = s.shape == (heads // repeat, width)
    _need(fits, f"the constant must be [{heads // repeat}, {width}] (KV heads, channels), got {s}")


def _rows_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    w, heads = types[0], a["heads"]
    s = types[1] if len(types) == 2 else None
    rows = w.shape[0] if w.shape else 0
    if s is not None and (w.shape == s.shape[1:] or w.shape == (heads, *s.shape[1:])):
        if heads > 1:  # a norm weight, [D] or [H, D]
            _constant(s, heads, w.shape[-1], a)
            return (TensorType(w.dtype, (heads, w.shape[-1])),)
    fits = len(w.shape) in (1, 2) and isinstance(rows, int) and rows % heads == 0
    _need(fits, f"the rows of {w} cannot be split into {heads} heads")
    if s is None:
        _power_of_two(int(rows) // heads)
    else:
        _constant(s, heads, int(rows) // heads, a)
    return (w,)


def _cols_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    w = types[0]
    _transpose_type((w,), a)
    _rows_type((TensorType(w.dtype, w.shape[::-1]), *types[1:]), a)
    return (w,)


def _cache_write_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    _heads(types[0])
    return (CacheType(a["role"]),)


def _cache_read_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    b, h, t, d = types[0].shape
    return (TensorType(types[0].dtype, (b, h, add_sizes("S", t), d)),)


def _attend_type(types: Operands, a: Attrs) -> tuple[Type, ...]:
    (b, hq, t, d), (bk, hk, n, dk), (bv, hv, nv, dv) = map(_heads, types)
    _need(b == bk == bv, f"the batches differ: q {types[0]}, k {types[1]}, v {types[2]}")
    _need((hk, n) == (hv, nv), f"k is {types[1]} but v is {types[2]}")
    _need(d == dk, f"q is {types[0]} but k is {types[1]}")
    _need(hq % hk == 0, f"{hq} query heads are not groups of {hk} KV heads")
    return (TensorType(types[0].dtype, (b, hq, t, dv)),)


# Meanings: arrays -> array (or a tuple where there are several results).
def _rms_norm(run: Run, arrays: Arrays, a: Attrs) -> Array:
    x, w = arrays
    w = (w[:, None, :] if w.ndim == 2 else w) + a["offset"]
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + a["eps"]) * w)


def _rope(run: Run, arrays: Arrays, a: Attrs) -> Array:
    x, cos, sin = arrays
    half = x.shape[-1] // 2
    turned = np.concatenate((-x[..., half:], x[..., :half]), axis=-1)
    return np.asarray(x * cos[:, None] + turned * sin[:, None])


def _map(kind: str) -> MapMeaning:
    """Return the map `kind` on x [..., H, T, D]; its constant is the second array."""

    def evaluate(run: Run, arrays: Arrays, a: Attrs) -> Array:
        x, rest = arrays[0], arrays[1:]
        made: dict[str, Map] = {"hadamard": Hadamard(x.shape[-1]), "gather": Gather("constant")}
        m = Scale("constant", a["inverse"]) if kind == "scale" else made[kind]
        constants = dict.fromkeys(("constant",) if rest else (), rest[-1] if rest else x)
        return apply((m,), x, constants, a.get("repeat", 1)).astype(x.dtype)

    return evaluate


def _map_rows(kind: str) -> MapMeaning:
    """Return the map `kind` on output channels: of a weight [H*D, n], a bias, a norm weight."""

    def evaluate(run: Run, arrays: Arrays, a: Attrs) -> Array:
        w, heads = arrays[0], a["heads"]
        width = arrays[1].shape[1] if len(arrays) == 2 else w.shape[0] // heads
        shape = w.shape if w.shape[0] == heads * width else (heads, width)
        if shape != w.shape:
            w = np.broadcast_to(w, shape)
        blocks = w.reshape(heads, width, -1).swapaxes(1, 2)  # channels last
        return _map(kind)(run, (blocks, *arrays[1:]), a).swapaxes(1, 2).reshape(shape)

    return evaluate


def _map_cols(kind: str) -> MapMeaning:
    """Return the map `kind` on the input channels of a weight [n, H*D]."""
    return lambda run, arrays, a: _map_rows(kind)(run, (arrays[0].T, *arrays[1:]), a).T


def _split_last(run: Run, arrays: Arrays, a: Attrs) -> Arrays:
    return tuple(np.split(arrays[0], np.cumsum(a["sizes"])[:-1], axis=-1))


def _merge_heads(run: Run, arrays: Arrays, a: Attrs) -> Array:
    b, h, t, d = arrays[0].shape
    return arrays[0].swapaxes(1, 2).reshape(b, t, h * d)


def _split_heads(run: Run, arrays: Arrays, a: Attrs) -> Array:
    b, t, c = arrays[0].shape
    return arrays[0].reshape(b, t, a["heads"], c // a["heads"]).swapaxes(1, 2)


def _cache_write(run: Run, arrays: Arrays, a: Attrs) -> Array:
    """Append x to the state, in full precision; give what is read: history as stored, then x."""
    (x,) = arrays
    empty = np.zeros((*x.shape[:2], 0, x.shape[3]), x.dtype)
    history = run.state.get(a["role"], empty)
    run.state[a["role"]] = np.concatenate((history, x), axis=2)
    return np.concatenate((a["store"].simulate(history).astype(x.dtype), x), axis=2)


def _attend(run: Run, arrays: Arrays, a: Attrs) -> Array:
    lengths = np.full(len(arrays[0]), arrays[1].shape[2], np.int64)
    return attention.attend(*arrays, lengths=lengths, **a)[0].astype(arrays[0].dtype)


HEADS, REPEAT = {"heads": Attr("count")}, {"repeat": Attr("count", 1)}
INVERSE, NAME = {"inverse": Attr("bool", False)}, {"name": Attr("text")}
WRITE = {"role": Attr("text"), "store": Attr("token encoding"), "basis": Attr("tuple of maps", ())}
ATTEND = {
    "scale": Attr("number"),
    "causal": Attr("bool", True),
    "softcap": Attr("number or none", None),
    "window": Attr("count or none", None),
}

OPS: dict[str, OpDef] = {
    "input": OpDef(0, NAME, _declared, lambda r, x, a: r.inputs[a["name"]], "y = given"),
    "param": OpDef(0, NAME, _declared, lambda r, x, a: r.params[a["name"]], "w = given by name"),
    "linear": OpDef(
        (2, 3), {}, _linear_type, lambda r, x, a: sum(x[2:], x[0] @ x[1].T), "y = x w^T + b"
    ),
    "add": OpDef(2, {}, _broadcast, lambda r, x, a: x[0] + x[1], "y = a + b"),
    "mul": OpDef(2, {}, _broadcast, lambda r, x, a: x[0] * x[1], "y = a b"),
    "slice_rows": OpDef(
        1,
        {"start": Attr("index"), "stop": Attr("count")},
        _slice_rows_type,
        lambda r, x, a: x[0][a["start"] : a["stop"]],
        "y[i] = w[start + i]",
    ),
    "transpose_w": OpDef(1, {}, _transpose_type, lambda r, x, a: x[0].T, "y[i, j] = w[j, i]"),
    "split_heads": OpDef(
        1, HEADS, _split_heads_type, _split_heads, "y[b, h, t, d] = x[b, t, h D + d]"
    ),
    "merge_heads": OpDef(
        1, {}, _merge_heads_type, _merge_heads, "y[b, t, h D + d] = x[b, h, t, d]"
    ),
    "split_last": OpDef(
        1,
        {"sizes": Attr("tuple of counts")},
        _split_last_type,
        _split_last,
        "y_i[..., j] = x[..., sum(sizes[:i]) + j]",
    ),
    "rms_norm": OpDef(
        2,
        {"eps": Attr("number"), "offset": Attr("number", 0.0)},
        _rms_norm_type,
        _rms_norm,
        "y = x / sqrt(mean(x^2) + eps) (w + offset), w [D] or [H, D]",
    ),
    "rope": OpDef(
        3,
        {"style": Attr("rope style (half)", "half")},
        _rope_type,
        _rope,
        "y = x cos + turn(x) sin, turn(x) = (-x[D/2:], x[:D/2])",
    ),
    "hadamard": OpDef(1, {}, _hadamard_type, _map("hadamard"), "y = x Hd, Hd orthonormal, order D"),
    "gather": OpDef(
        2, REPEAT, _per_head_type, _map("gather"), "y[h, c] = x[h, order[h // repeat, c]]"
    ),
    "scale": OpDef(
        2,
        REPEAT | INVERSE,
        _per_head_type,
        _map("scale"),
        "y[h, c] = x[h, c] s[h // repeat, c]^+-1",
    ),
    "cache_write": OpDef(
        1, WRITE, _cache_write_type, _cache_write, "state[role] = (state[role], x), as store says"
    ),
    "cache_read": OpDef(
        1, {}, _cache_read_type, lambda r, x, a: x[0], "y = (state as stored, x as given)"
    ),
    "attend": OpDef(
        3, ATTEND, _attend_type, _attend, "y = softmax(mask(cap(scale q k^T))) v, q at S + i"
    ),
    "scale_rows": OpDef(
        2,
        HEADS | REPEAT | INVERSE,
        _rows_type,
        _map_rows("scale"),
        "y[h D + c] = w[h D + c] s[h // repeat, c]^+-1",
    ),
    "scale_cols": OpDef(
        2,
        HEADS | REPEAT | INVERSE,
        _cols_type,
        _map_cols("scale"),
        "y[:, h D + c] = w[:, h D + c] s[h // repeat, c]^+-1",
    ),
    "gather_rows": OpDef(
        2,
        HEADS | REPEAT,
        _rows_type,
        _map_rows("gather"),
        "y[h D + c] = w[h D + order[h // repeat, c]]",
    ),
    "gather_cols": OpDef(
        2,
        HEADS | REPEAT,
        _cols_type,
        _map_cols("gather"),
        "y[:, h D + c] = w[:, h D + order[h // repeat, c]]",
    ),
    "hadamard_rows": OpDef(1, HEADS, _rows_type, _map_rows("hadamard"), "y_h = Hd w_h"),
    "hadamard_cols": OpDef(1, HEADS, _cols_type, _map_cols("hadamard"), "y_h = w_h Hd"),
}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `known` as a sentence part, with the likely meaning of `name` first."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1)
    listed = " ".join(names) or "(none)"
    return f"did you mean {close[0]}? It has: {listed}" if close else f"it has: {listed}"


def complete(name: str, attrs: Mapping[str, AttrValue]) -> tuple[tuple[str, AttrValue], ...]:
    """Return the attributes of an op sorted, with defaults filled in and numbers made floats."""
    full: dict[str, Any] = dict(attrs)
    for key, row in (OPS[name].attrs if name in OPS else {}).items():
        if key not in full and row.default is not REQUIRED:
            full[key] = row.default
        if row.kind.startswith("number") and type(full.get(key)) is int:
            full[key] = float(full[key])
    return tuple(sorted(full.items()))


def problems(
    name: str, args: tuple[Value, ...], attrs: tuple[tuple[str, AttrValue], ...]
) -> list[str]:
    """Return what is wrong with an op before its types are looked at; empty if nothing is."""
    if name not in OPS:
        return [f"no operation {name}; {nearest(name, OPS)}"]
    row, found = OPS[name], []
    least, most = row.arity if isinstance(row.arity, tuple) else (row.arity, row.arity)
    if not least <= len(args) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        found.append(f"{name} takes {wanted} arguments, got {len(args)}")
    for arg in args:
        if isinstance(arg.type, CacheType) != (name == "cache_read"):
            wanted = "a cache" if name == "cache_read" else "tensors"
            found.append(f"{name} takes {wanted}, but {arg} is {arg.type}")
    given = dict(attrs)
    for key in sorted(given.keys() - row.attrs.keys()):
        found.append(f"no attribute {key}; {nearest(key, row.attrs)}")
    for key, attr in sorted(row.attrs.items()):
        if key not in given:
            found.append(f"the attribute {key} is missing; it must be a {attr.kind}")
        elif not KINDS[attr.kind](given[key]):
            found.append(f"the attribute {key} = {given[key]!r} is not a {attr.kind}")
    return found


def infer(
    name: str,
    args: tuple[Value, ...],
    attrs: tuple[tuple[str, AttrValue], ...],
    written: Mapping[str, TensorType],
) -> tuple[Type, ...]:
    """Return the types of the results of an op without `problems`.

    Args:
        name: of the op.
        args: its arguments.
        attrs: its attributes, complete.
        written: what each cache value before the op was written with, by the value's name.

    Raises: KvantError ("ill-typed-op") if the type rule refuses.
    """
    types = tuple(a.type if isinstance(a.type, TensorType) else written[a.name] for a in args)
    return OPS[name].infer(types, dict(attrs))
