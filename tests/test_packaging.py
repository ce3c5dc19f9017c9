"""The list of packages in pyproject.toml is by hand; this keeps it true."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("compiler", "ir", "passes", "runtime", "targets")


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        ".".join(("kvant", *path.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == found | {"kvant"}


def test_no_bare_import() -> None:
    code = (
        "import kvant.runtime, kvant.ir, sys; "
        "print([n for n in sys.modules if n in ('ir', 'runtime')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_link_for_type_checkers() -> None:
    link = ROOT / ".root" / "kvant"
    assert link.is_symlink()
    assert link.resolve() == ROOT


def test_version_is_one() -> None:
    import kvant

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert kvant.__version__ == project["project"]["version"]
