"""docs/errors.md names every error code of the source, what it means, and where it is raised.

Meanings are written by hand. Renew the list of files with `python tests/test_errors.py`.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
FOLDERS = ("ir", "passes", "targets", "runtime", "compiler")
ROW = re.compile(r"\| `([^`]+)` \| (.*?) \| (.*?) \|")


def codes_of(tree: ast.Module) -> Iterator[str]:
    """Yield the codes that a file raises, also those that go through a function of its own."""
    raises = {"KvantError": 0}
    for node in ast.walk(tree):
        names = [a.arg for a in node.args.args] if isinstance(node, ast.FunctionDef) else []
        if "code" in names and any(call_of(inner) == "KvantError" for inner in ast.walk(node)):
            raises[node.name] = names.index("code")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and call_of(node) in raises:
            given = node.args[raises[call_of(node)] :][:1]
            for word in (w for argument in given for w in ast.walk(argument)):
                if isinstance(word, ast.Constant) and isinstance(word.value, str):
                    yield word.value


def call_of(node: ast.AST) -> str:
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return node.func.id if named else ""


def raised() -> dict[str, list[str]]:
    """Return the files that raise each code."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for code in codes_of(ast.parse(path.read_text())):
                found[code].add(str(path.relative_to(ROOT)))
    return {code: sorted(files) for code, files in sorted(found.items())}


def documented() -> dict[str, tuple[str, str]]:
    """Return meaning and files of each code of the page."""
    return {code: (meaning, files) for code, meaning, files in ROW.findall(PAGE.read_text())}


def test_every_code_is_documented_and_no_other() -> None:
    assert sorted(documented()) == sorted(raised())


def test_where_codes_are_raised() -> None:
    found = {code: ", ".join(f"`{file}`" for file in files) for code, files in raised().items()}
    assert {code: files for code, (_, files) in documented().items()} == found


def test_codes_are_words_in_kebab_case_with_a_meaning() -> None:
    for code, (meaning, _) in documented().items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code), code
        assert len(meaning.split()) >= 3, f"{code}: {meaning!r}"


def test_codes_behind_a_function_are_seen() -> None:
    source = (
        "def no(code, x):\n    raise KvantError(code, x, where='', fix='')\nno('a-b', 1)\n"
        "raise KvantError('c' if x else 'd', '', where='', fix='')\n"
    )
    assert sorted(codes_of(ast.parse(source))) == ["a-b", "c", "d"]


def renew() -> None:
    """Write the table again: all codes of the source, with the meanings that the page has."""
    known = documented()
    head = PAGE.read_text().partition("| code |")[0]
    rows = ["| code | meaning | raised in |", "| --- | --- | --- |"]
    for code, files in raised().items():
        meaning = known.get(code, ("", ""))[0]
        rows.append(f"| `{code}` | {meaning} | {', '.join(f'`{file}`' for file in files)} |")
    PAGE.write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    renew()
