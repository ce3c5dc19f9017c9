"""What `kvant show recipes | targets | passes | env` lists."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from ..passes import PASSES
from ..targets import TARGETS
from . import recipe as recipes
from .debug import VARIABLES

Listing = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]


def _recipes() -> Listing:
    loaded = [recipes.load(name)[0] for name in recipes.names()]
    rows: list[tuple[Any, ...]] = [(r.name, r.summary, r.source) for r in loaded]
    return f"recipes (default: {recipes.DEFAULT})", ("name", "summary", "source"), rows


def _targets() -> Listing:
    rows: list[tuple[Any, ...]] = [
        (name, target.summary, target.available() or "yes") for name, target in TARGETS.items()
    ]
    return "targets", ("name", "summary", "builds here"), rows


def _passes() -> Listing:
    rows: list[tuple[Any, ...]] = []
    for name, definition in PASSES.items():
        added = name in recipes.ADDED_BY_KVANT  # no recipe asks for these, nor sets their options
        options = [
            re.sub(r"kvant\.[\w.]*\.", "", str(p))
            for p in inspect.signature(definition.run).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY and not added
        ]
        does = (inspect.getdoc(definition.run) or "").partition("\n")[0]
        does += " (added by kvant)" if added else ""
        rows.append((name, "exact" if definition.exact else "lossy", ", ".join(options), does))
    return "passes", ("name", "promise", "options", "does"), rows


def _environment() -> Listing:
    rows: list[tuple[Any, ...]] = [(v.name, v.default, v.get(), v.does) for v in VARIABLES]
    return "debug variables", ("name", "default", "now", "does"), rows


LISTINGS: dict[str, Callable[[], Listing]] = {
    "recipes": _recipes,
    "targets": _targets,
    "passes": _passes,
    "env": _environment,
}
