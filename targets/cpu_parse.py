"""From the text of a kernel to TVM's functions, faster than TVM's own reader.

That one evaluates each node of an expression by itself, and most of a compile was spent there. What
kernels are written in is Python, so an expression can be evaluated as a whole; statements are TVM's
own. TVM also copies each node of Python's tree into one of its own, and back to evaluate it: of an
expression only the outermost node is copied here, and Python's own is kept beside it.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import Any

# TVM's reader looks into expressions of other kinds, such as names and subscripts.
OPERATIONS = (ast.BinOp, ast.BoolOp, ast.Compare, ast.UnaryOp)
KEPT = "kvant_kept"  # the attribute of a copied node that holds Python's own


class Kept:
    """A node of Python's tree that TVM need not copy."""

    def __init__(self, node: ast.expr) -> None:
        self.node = node


def parse(text: str) -> Any:
    """Return the function that a text of one kernel defines, as `tvm.script.from_source` does.

    Raises: tvm's errors, for a text that is no function.
    """
    from tvm.script import tirx
    from tvm.script.ir_builder import IRBuilder

    source, parser = _reader()
    with IRBuilder() as builder:
        parser(source(text), {}).parse(extra_vars={"T": tirx})
    return builder.get()


@lru_cache(maxsize=1)
def _reader() -> tuple[type, type]:
    """Return TVM's source and parser, with expressions kept whole; only who compiles needs tvm."""
    from tvm.script.parser.core import doc
    from tvm.script.parser.core.diagnostics import Source
    from tvm.script.parser.core.evaluator import _eval_expr
    from tvm.script.parser.core.parser import Parser

    doc.register_from_doc(Kept.__name__)(lambda kept: kept.node)

    def copied(node: Any) -> Any:
        """Return TVM's copy of a node; of an operation, or a call with arguments, the outermost."""
        if isinstance(node, list):
            return [copied(item) for item in node]
        if not isinstance(node, ast.AST) or isinstance(node, ast.arguments):
            return doc.to_doc(node)
        own = getattr(doc, type(node).__name__)
        fields = {name: getattr(node, name, None) for name in own._FIELDS}
        if isinstance(node, OPERATIONS) or (isinstance(node, ast.Call) and node.args):
            copy = own(**fields)
            setattr(copy, KEPT, Kept(node))
            return copy
        return own(**{name: copied(value) for name, value in fields.items()})

    class Whole(Source):  # type: ignore[misc]
        def as_ast(self) -> Any:
            return copied(ast.parse(self.source))

    class Reader(Parser):  # type: ignore[misc]
        def eval_expr(self, node: Any, extra_vars: dict[str, Any] | None = None) -> Any:
            names = self.var_table.get() | (extra_vars or {})
            value = _eval_expr(getattr(node, KEPT, node), names)
            # A comparison that nobody has asked for its truth becomes an expression.
            return value.asobject() if hasattr(value, "asobject") else value

    return Whole, Reader
