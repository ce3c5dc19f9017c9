"""From the text of a kernel to TVM's functions, faster than TVM's own reader.

That one evaluates each node of an expression by itself, and most of a compile was spent there. What
kernels are written in is Python, so an expression can be evaluated as a whole; statements are TVM's
own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any


def parse(text: str) -> Any:
    """Return the function that a text of one kernel defines, as `tvm.script.from_source` does.

    Raises: tvm's errors, for a text that is no function.
    """
    from tvm.script import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.parser.core.diagnostics import Source

    with IRBuilder() as builder:
        _parser()(Source(text), {}).parse(extra_vars={"T": tirx})
    return builder.get()


@lru_cache(maxsize=1)
def _parser() -> type:
    """Return TVM's parser with expressions evaluated whole; only who compiles needs tvm."""
    from tvm.script.parser.core.evaluator import _eval_expr
    from tvm.script.parser.core.parser import Parser

    class Whole(Parser):  # type: ignore[misc]
        def eval_expr(self, node: Any, extra_vars: dict[str, Any] | None = None) -> Any:
            value = _eval_expr(node, self.var_table.get() | (extra_vars or {}))
            # A comparison that nobody has asked for its truth becomes an expression.
            return value.asobject() if hasattr(value, "asobject") else value

    return Whole
