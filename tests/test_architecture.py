"""Who may import whom, how large things may grow, and what an import may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "ir": {"ir"},
    "passes": {"passes", "ir"},
    "targets": {"targets", "ir"},
    "runtime": {"runtime", "ir"},
    "compiler": {"compiler", "passes", "targets", "runtime", "ir"},
}
HEAVY = ("torch", "transformers", "tvm", "tvm_ffi", "triton", "onnx", "gguf", "accelerate")
TOP_LEVEL_EXCEPTION = {"runtime/huggingface.py"}
CORE = "types attrs graph ops text verify evaluate rewrite".split()
CORE_LINES = 800
FILE_LINES = 400
FUNCTION_LINES = 40
FORBIDDEN_CALLS = {"eval", "exec", "compile"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill"}


def sources() -> list[Path]:
    return sorted(p for folder in ALLOWED for p in (ROOT / folder).rglob("*.py"))


def folder_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imported_folders(path: Path, tree: ast.AST) -> set[str]:
    """Folders of kvant that a file imports, resolved from its relative imports."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module or "").split("."))
            names = [target[0]] if target[0] else [alias.name for alias in node.names]
            found.update(name for name in names if name in ALLOWED)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvant"):
            found.add("kvant-by-name")
    return found


def code_lines(path: Path) -> int:
    """Lines that are neither blank nor a comment nor a docstring."""
    text = path.read_text()
    silent = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            first = node.body[0]
            silent.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return sum(
        1
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#") and number not in silent
    )


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    found = imported_folders(path, ast.parse(path.read_text()))
    assert found <= ALLOWED[folder_of(path)], f"{path} imports {found}"


def test_arrows_would_be_seen() -> None:
    tree = ast.parse("from ..compiler.driver import compile")
    assert imported_folders(ROOT / "ir" / "graph.py", tree) == {"compiler"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_imports_are_inside_functions(path: Path) -> None:
    if str(path.relative_to(ROOT)) in TOP_LEVEL_EXCEPTION:
        return
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        heavy = [name for name in names if name.split(".")[0] in HEAVY]
        assert not heavy, f"{path} imports {heavy} at its top"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_dangerous_constructs(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            mine = node.func.id == "compile" and folder_of(path) == "compiler"
            assert mine or node.func.id not in FORBIDDEN_CALLS, f"{path}:{node.lineno}"
        if isinstance(node, ast.Import):
            assert not {a.name for a in node.names} & FORBIDDEN_MODULES, path
        if isinstance(node, ast.ImportFrom):
            assert node.module not in FORBIDDEN_MODULES, path
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: assert is for tests"


def test_core_stays_small() -> None:
    sizes = {name: code_lines(ROOT / "ir" / f"{name}.py") for name in CORE}
    assert sum(sizes.values()) < CORE_LINES, f"the core of the IR has too many lines: {sizes}"
    assert all(size > 10 for size in sizes.values()), sizes


def test_the_count_leaves_out_what_is_no_code(tmp_path: Path) -> None:
    path = tmp_path / "counted.py"
    path.write_text(
        '"""Two\nlines."""\n\n# a comment\nx = 1  # one\n\n\ndef f():\n    """F."""\n    return x\n'
    )
    assert code_lines(path) == 3


def test_sizes() -> None:
    files = sorted(((code_lines(p), str(p.relative_to(ROOT))) for p in sources()), reverse=True)
    functions = sorted(
        (
            (node.end_lineno - node.lineno - _docstring_lines(node) + 1, f"{path.name}:{node.name}")
            for path in sources()
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
        ),
        reverse=True,
    )
    print("largest files:", files[:5], "largest functions:", functions[:5], sep="\n")
    assert files[0][0] <= FILE_LINES, files[:5]
    assert functions[0][0] <= FUNCTION_LINES, functions[:5]


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def test_runtime_import_is_small() -> None:
    code = (
        "import sys, time; begin = time.perf_counter(); import kvant.runtime; "
        "print(time.perf_counter() - begin); "
        f"print([m for m in {(*HEAVY, 'kvant.compiler')!r} if m in sys.modules])"
    )
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds, loaded = done.stdout.splitlines()
        assert loaded == "[]", loaded
        times.append(float(seconds))
    assert min(times) < 0.5, times
