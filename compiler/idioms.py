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


def _item(split: Node, index: int) -> tuple[Node, int, int] | None:
    if not is_op(split, "aten.split.Tensor", "aten.split_with_sizes.default"):
        return None
    x, size, axis = (*split.args, 0)[:3]
    width = sizes(x)[-1]
    if not is_last(x, axis) or not isinstance(width, int):
        return None
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
        if power and peel(square.args[0]) is x:
            return x, float(total.args[1])
    return None


def rotates(node: Node, axis: int) -> tuple[Node, Node, Node] | None:
    """Match half-split RoPE, x * cos + rotate_half(x) * sin: return (x, cos, sin).

    cos and sin are placeholders unsqueezed at `axis`, the axis of the heads.
    """
    for straight, turned in operands(node, "aten.add.Tensor"):
        for x, cos in operands(straight, "aten.mul.Tensor"):
            for half, sin in operands(turned, "aten.mul.Tensor"):
                tables = _table(cos, "cos", axis), _table(sin, "sin", axis)
                if all(tables) and _rotated_half(half) is x:
                    return x, *tables
    return None


def _table(node: Node, name: str, axis: int) -> Node | None:
    """Match unsqueeze(table, axis) of the input called `name`."""
    if not is_op(node, "aten.unsqueeze.default") or node.args[1] % 4 != axis:
        return None
    table = peel(node.args[0])
    return table if table.op == "placeholder" and table.name == name else None


def _rotated_half(node: Node) -> Node | None:
    """Match cat(-x[..., D/2:], x[..., :D/2]): return x."""
    if not is_op(node, "aten.cat.default") or len(node.args[0]) != 2:
        return None
    minus, low = map(peel, node.args[0])
    if not is_last(node, (*node.args, 0)[1]) or not is_op(minus, "aten.neg.default"):
        return None
    upper, lower = cut(peel(minus.args[0])), cut(low)
    if upper is None or lower is None:
        return None
    x, width = peel(lower[0]), sizes(node)[-1]
    half = width // 2 if isinstance(width, int) else -1
    whole = sizes(x)[-1] == width and peel(upper[0]) is x
    return x if whole and upper[1:] == (half, width) and lower[1:] == (0, half) else None
