"""The core of the IR stays small enough to be read in an hour."""

import ast
from pathlib import Path

import kvant.ir

CORE = ("types", "attrs", "graph", "ops", "text", "verify", "evaluate", "rewrite")
LIMIT = 800
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def code_lines(source: str) -> int:
    """Count lines that are not blank, not a comment and not in a docstring."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            documentation.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    kept = [line.strip() for n, line in lines if n not in documentation and line.strip()]
    return sum(not line.startswith("#") for line in kept)


def test_the_core_stays_under_its_limit():
    folder = Path(kvant.ir.__file__).parent
    sizes = {name: code_lines((folder / f"{name}.py").read_text()) for name in CORE}
    total = sum(sizes.values())
    assert total < LIMIT, f"{total} lines: {sizes}"
    assert all(size > 10 for size in sizes.values()), sizes


def test_the_count_leaves_out_what_is_no_code():
    source = (
        '"""Two\nlines."""\n\n# a comment\nx = 1  # one\n\n\ndef f():\n    """F."""\n    return x\n'
    )
    assert code_lines(source) == 3
