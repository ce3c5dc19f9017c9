"""How model code spells rotary position embedding, and what all of it is to kvant: one `rope`.

    x * cos + rotate_half(x) * sin                       rotate_half by halves or by neighbours
    cat(a * cos - b * sin, b * cos + a * sin)            a, b the halves of x; tables by pair
    cat(either of them on x[..., :R], x[..., R:])        the rest passes through

A matcher looks and emits nothing, as in idioms.py.
"""

from dataclasses import dataclass, replace

from .idioms import Node, cut, every_second, is_last, is_op, operands, peel, sizes


@dataclass(frozen=True, slots=True)
class Rope:
    """One rotation.

    Attributes:
        x: what is turned, whole heads.
        cos: the input that holds the table; its first R or R / 2 entries are read.
        sin: like cos.
        style: which channels are a pair, see kvant/ir/rope.py.
        rotated: R, the channels that are turned.
        by_pair: whether the tables hold an entry a pair, R / 2, and not one a channel.
    """

    x: Node
    cos: Node
    sin: Node
    style: str
    rotated: int
    by_pair: bool


def rotates(node: Node, axis: int) -> Rope | None:
    """Match RoPE in any spelling; `axis` is that of the heads, where the tables are unsqueezed."""
    node = peel(node)
    parts = _joined(node)
    if parts is None:
        return _sum_of_turns(node, axis)
    turned, rest = parts
    inner = _sum_of_turns(turned, axis) or _pair_of_halves(turned, axis)
    begin, passed = None if inner is None else cut(inner.x), cut(rest)
    if inner is None or begin is None or passed is None:
        return _pair_of_halves(node, axis)
    x, width = peel(begin[0]), sizes(node)[-1]
    fits = begin[1:] == (0, inner.rotated) and passed[1:] == (inner.rotated, width)
    whole = fits and peel(passed[0]) is x and sizes(x)[-1] == width
    return replace(inner, x=x) if whole else None


def _joined(node: Node) -> tuple[Node, Node] | None:
    """Match cat(a, b) along the last axis."""
    if not is_op(node, "aten.cat.default") or len(node.args[0]) != 2:
        return None
    a, b = map(peel, node.args[0])
    return (a, b) if is_last(node, (*node.args, 0)[1]) else None


def _sum_of_turns(node: Node, axis: int) -> Rope | None:
    """Match x * cos + rotate_half(x) * sin."""
    for straight, turned in operands(node, "aten.add.Tensor"):
        for x, cos in operands(straight, "aten.mul.Tensor"):
            for other, sin in operands(turned, "aten.mul.Tensor"):
                style = _turned_by(other, x)
                found = style and _with_tables(x, cos, sin, axis, style)
                if found:
                    return found
    return None


def _pair_of_halves(node: Node, axis: int) -> Rope | None:
    """Match cat(a * cos - b * sin, b * cos + a * sin), a and b the halves of x."""
    parts = _joined(node)
    if parts is None or not is_op(parts[0], "aten.sub.Tensor") or parts[0].kwargs:
        return None
    minus = tuple(map(peel, parts[0].args))
    for first, cos in operands(minus[0], "aten.mul.Tensor"):
        for second, sin in operands(minus[1], "aten.mul.Tensor"):
            x = _halves(first, second)
            if x is not None and _is_sum(parts[1], (second, cos), (first, sin)):
                return _with_tables(x, cos, sin, axis, "half")
    return None


def _is_sum(node: Node, *products: tuple[Node, Node]) -> bool:
    """Whether a node is the sum of two products, each of these two factors."""
    wanted = tuple(set(product) for product in products)
    for terms in operands(node, "aten.add.Tensor"):
        factors = [operands(term, "aten.mul.Tensor") for term in terms]
        if all(factors) and tuple(set(found[0]) for found in factors) == wanted:
            return True
    return False


def _halves(first: Node, second: Node) -> Node | None:
    """Match x[..., :D/2] and x[..., D/2:]: return x."""
    lower, upper = cut(first), cut(second)
    if lower is None or upper is None or peel(lower[0]) is not peel(upper[0]):
        return None
    x = peel(lower[0])
    width = sizes(x)[-1]
    half = width // 2 if isinstance(width, int) else -1
    return x if lower[1:] == (0, half) and upper[1:] == (half, width) else None


def _turned_by(node: Node, x: Node) -> str | None:
    """Return the style in which a node is x with the channels of each pair exchanged, one negated.

    Matches cat(-x[..., D/2:], x[..., :D/2]) and flatten(stack(-x[..., 1::2], x[..., ::2])).
    """
    if (parts := _joined(node)) is not None and is_op(parts[0], "aten.neg.default"):
        return "half" if _halves(parts[1], peel(parts[0].args[0])) is x else None
    if not is_op(node, "aten.flatten.using_ints") or list(node.args[1:]) not in ([-2], [-2, -1]):
        return None
    stack = peel(node.args[0])
    if not is_op(stack, "aten.stack.default") or not is_last(stack, (*stack.args, 0)[1]):
        return None
    minus, even = map(peel, stack.args[0])
    if not is_op(minus, "aten.neg.default"):
        return None
    odd = every_second(peel(minus.args[0]))
    return "adjacent" if odd == (x, 1) and every_second(even) == (x, 0) else None


def _with_tables(x: Node, cos: Node, sin: Node, axis: int, style: str) -> Rope | None:
    """Return the rotation of x if cos and sin are tables that it can have."""
    rotated = sizes(x)[-1]
    if not isinstance(rotated, int):
        return None
    found = [_table(t, n, axis, style, rotated) for t, n in ((cos, "cos"), (sin, "sin"))]
    if found[0] is None or found[1] is None or found[0][1] != found[1][1]:
        return None
    return Rope(x, found[0][0], found[1][0], style, rotated, found[0][1])


def _table(node: Node, name: str, axis: int, style: str, rotated: int) -> tuple[Node, bool] | None:
    """Match the input called `name`, unsqueezed at `axis`: return it and whether it is by pair.

    By channel it is R wide. By pair it is R / 2 wide, where the code computes with halves, or its
    first R / 2 entries are repeated one by one, where neighbours are pairs.
    """
    pairs = rotated // 2
    repeated = is_op(node, "aten.repeat_interleave.self_int")
    if repeated:
        if style != "adjacent" or node.args[1] != 2 or not is_last(node, node.args[2]):
            return None
        node = peel(node.args[0])
        if sizes(node)[-1] != pairs:
            return None
        begun = cut(node)
        if begun is not None and begun[1] == 0:
            node = peel(begun[0])
    if not is_op(node, "aten.unsqueeze.default") or node.args[1] % 4 != axis:
        return None
    table = peel(node.args[0])
    if table.op != "placeholder" or table.name != name:
        return None
    by_pair = repeated or sizes(table)[-1] == pairs
    return (table, by_pair) if by_pair or sizes(table)[-1] == rotated else None
