"""Idioms of exported programs: how model code spells what is one op to kvant.

A matcher takes a node of a torch.export graph and returns the parts of the idiom, or None. It emits
nothing. Ops that only pass numbers on (casts between floating types, copies) are looked through.
"""

from typing import Any

from ..ir.types import Dim

Node = Any  # torch.fx.Node; torch is not imported here

VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
_COPIES = (
    "aten.contiguous.default",
    "aten.alias.default",
    "aten.clone.default",
    "aten.detach.default",
)
_CASTS = (
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten._to_copy.default",
    "aten.type_as.default",
)


def is_op(node: Node, *targets: str) -> bool:
    """Whether a node calls one of these ops."""
    return str(getattr(node, "target", None)) in targets


def sizes(node: Node) -> tuple[Dim, ...]:
    """Return the sizes of a node's tensor; a symbolic one as its text."""
    return tuple(d if type(d) is int else str(d) for d in node.meta["val"].shape)


def is_last(node: Node, axis: int) -> bool:
    """Whether `axis`, counted from either end, is the last axis of a node's tensor."""
    return axis % len(sizes(node)) == len(sizes(node)) - 1


def peel(node: Node) -> Node:
    """Return the node behind ops that leave the numbers as they are."""
    while (inner := _same(node)) is not None:
        node = inner
    return node


def _same(node: Node) -> Node | None:
    """Return the node that `node` only passes on, or None."""
    if is_op(node, "aten.cat.default"):
        wide = [part for part in node.args[0] if sizes(part)[-1] != 0]
        return wide[0] if len(wide) == 1 and sizes(wide[0]) == sizes(node) else None
    if is_op(node, "aten.dropout.default"):
        return None if node.args[2] else node.args[0]
    if is_op(node, *_CASTS):
        both = node.meta["val"].dtype, node.args[0].meta["val"].dtype
        return node.args[0] if all(dtype.is_floating_point for dtype in both) else None
    if is_op(node, *VIEWS, "aten.slice.Tensor", "aten.expand.default"):
        return node.args[0] if sizes(node) == sizes(node.args[0]) else None
    return node.args[0] if is_op(node, *_COPIES) else None


def swaps_time_and_heads(node: Node) -> bool:
    """Match transpose(x, 1, 2) of four axes."""
    if not is_op(node, "aten.transpose.int") or len(sizes(node)) != 4:
        return False
    return sorted(axis % 4 for axis in node.args[1:]) == [1, 2]


def splits_heads(node: Node) -> int | None:
    """Match view([B, T, H*D] -> [B, T, H, D]): return H."""
    if not is_op(node, *VIEWS) or len(sizes(node)) != 4:
        return None
    *outer, heads, width = sizes(node)
    if isinstance(heads, int) and isinstance(width, int):
        return heads if sizes(node.args[0]) == (*outer, heads * width) else None
    return None


def merges_heads(node: Node) -> bool:
    """Match view([B, T, H, D] -> [B, T, H*D])."""
    if not is_op(node, *VIEWS) or len(sizes(node.args[0])) != 4:
        return False
    *outer, heads, width = sizes(node.args[0])
    if isinstance(heads, int) and isinstance(width, int):
        return sizes(node) == (*outer, heads * width)
    return False


def conv1d(node: Node) -> tuple[Node, Node, Node] | None:
    """Match view(addmm(bias, view(x), w)), the library's Conv1D: return (x, w, bias)."""
    if not is_op(node, *VIEWS) or not is_op(node.args[0], "aten.addmm.default"):
        return None
    product = node.args[0]
    if len(product.args) != 3 or product.kwargs or not is_op(product.args[1], *VIEWS):
        return None
    bias, flat, w = product.args
    x = flat.args[0]
    return (x, w, bias) if sizes(x)[:-1] == sizes(node)[:-1] else None


def cut(node: Node) -> tuple[Node, int, int] | None:
    """Match x[..., start:stop], as a slice or as an item of a split: return (x, start, stop)."""
    if is_op(node, "<built-in function getitem>"):
        return _item(node.args[0], node.args[1])
    if not is_op(node, "aten.slice.Tensor"):
        return None
    given = list(node.args)
    x, axis, start, stop, step = given + [None, 0, None, None, 1][len(given) :]
    width = sizes(x)[-1]
    if not is_last(x, axis) or step != 1 or not isinstance(width, int):
        return None
    begin, end = start or 0, width if stop is None else min(stop, width)
    return (x, begin, end) if 0 <= begin < end else None


def every_second(node: Node) -> tuple[Node, int] | None:
    """Match x[..., start::2] with start 0 or 1: return (x, start)."""
    if not is_op(node, "aten.slice.Tensor"):
        return None
    given = list(node.args)
    x, axis, start, stop, step = given + [None, 0, None, None, 1][len(given) :]
    width = sizes(x)[-1]
    whole = isinstance(width, int) and (stop is None or stop >= width)
    fits = whole and is_last(x, axis) and step == 2 and (start or 0) in (0, 1)
    return (peel(x), start or 0) if fits else None


def _item(split: Node, index: int) -> tuple[Node, int, int] | None:
    kinds = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
    if not is_op(split, *kinds):
        return None
    x, size, axis = (*split.args, 0)[:3]
    width = sizes(x)[-1]
    if not is_last(x, axis) or not isinstance(width, int):
        return None
    size = -(-width // size) if is_op(split, "aten.chunk.default") else size
    parts = list(size) if isinstance(size, list | tuple) else [size] * (width // size)
    start = sum(parts[:index])
    return x, start, start + parts[index]


def operands(node: Node, target: str) -> list[tuple[Node, Node]]:
    """Return the operands of a commutative op in both orders, peeled; none if it is another op."""
    node = peel(node)
    if not is_op(node, target) or node.kwargs or len(node.args) != 2:
        return []
    if not all(hasattr(arg, "meta") for arg in node.args):
        return []
    a, b = map(peel, node.args)
    return [(a, b), (b, a)]


def stored_less_one(weight: Node) -> tuple[Node, float]:
    """Return (parameter, offset) of w or w + 1."""
    weight = peel(weight)
    if is_op(weight, "aten.add.Tensor") and weight.args[1] == 1 and not weight.kwargs:
        return peel(weight.args[0]), 1.0
    return weight, 0.0


def normalised(node: Node) -> tuple[Node, float] | None:
    """Match x * rsqrt(mean(x^2, -1) + eps): return (x, eps)."""
    for x, root in operands(node, "aten.mul.Tensor"):
        if not is_op(root, "aten.rsqrt.default"):
            continue
        total = peel(root.args[0])
        if not is_op(total, "aten.add.Tensor") or not isinstance(total.args[1], float):
            continue
        mean = peel(total.args[0])
        if not is_op(mean, "aten.mean.dim") or list(mean.args[1:]) != [[-1], True]:
            continue
        square = peel(mean.args[0])
        power = is_op(square, "aten.pow.Tensor_Scalar") and square.args[1] == 2
        if power and _are_alike(peel(square.args[0]), x):
            return x, float(total.args[1])
    return None


def _are_alike(a: Node, b: Node) -> bool:
    """Whether two nodes are one, or the same difference computed twice."""
    twice = is_op(a, "aten.sub.Tensor") and is_op(b, "aten.sub.Tensor") and a.kwargs == b.kwargs
    return a is b or (twice and list(map(peel, a.args)) == list(map(peel, b.args)))


def centered(node: Node) -> Node | None:
    """Match x - mean(x, -1): return x."""
    if not is_op(node, "aten.sub.Tensor") or node.kwargs or not hasattr(node.args[1], "meta"):
        return None
    x, mean = map(peel, node.args)
    is_mean = is_op(mean, "aten.mean.dim") and list(mean.args[1:]) == [[-1], True]
    return x if is_mean and peel(mean.args[0]) is x else None
