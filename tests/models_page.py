"""docs/models.md: its tables, made of the families and of what capture finds in them.

Nothing here is said of a model by hand: each cell is read off the graphs that were captured.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvant.compiler.capture import Model
from kvant.ir.errors import KvantError
from kvant.ir.graph import Graph, Op

from .families import FAMILIES, REFUSED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
TAKEN_HEAD = (
    "| models | class in transformers | rotary embedding | norm of q and k | window | besides | "
    "tested by |"
)
REFUSED_HEAD = "| models | class in transformers | refused with | at |"


def taken_row(name: str, model: Model) -> str:
    """Return the row of a family that was captured."""
    family = FAMILIES[name]
    graphs = [model.graphs[layer.structure] for layer in model.layers]
    cells = (
        family.models,
        f"`{model.architecture}`",
        _somewhere(map(_rotary, graphs)),
        _somewhere(map(_norm, graphs)),
        _somewhere(map(_window, graphs)),
        ", ".join(_besides(graphs)) or "-",
        "`make test-long`" if family.is_long else "`make test`",
    )
    return f"| {' | '.join(cells)} |"


def refused_row(name: str, architecture: str, error: KvantError) -> str:
    """Return the row of a family that is refused."""
    place = ":".join(part for part in error.where.split(":") if not part.isdigit())
    cells = (REFUSED[name].models, f"`{architecture}`", f"`{error.code}`", f"`{place}`")
    return f"| {' | '.join(cells)} |"


def _somewhere(found: Iterable[str]) -> str:
    """Return what all layers have; or what some have."""
    kinds = list(dict.fromkeys(found))
    some = [kind for kind in kinds if kind != "-"]
    return kinds[0] if len(kinds) == 1 else f"{' or '.join(some)}, in some layers"


def _rotary(graph: Graph) -> str:
    for op in graph.find("rope"):
        width, turned = (arg.tensor.shape[-1] for arg in op.args[:2])
        pairs = {"half": "halves", "adjacent": "neighbours"}[op.attr_as("style", str)]
        part = "" if width == turned else f", first {100 * int(turned) // int(width)} %"  # type: ignore[arg-type]
        return f"{pairs}{part}"
    return "-"


def _norm(graph: Graph) -> str:
    for op in graph.find("rms_norm"):
        over = "each head" if len(op.args[0].tensor.shape) == 4 else "all heads"
        kind = "LayerNorm" if graph.find("center") else "RMSNorm"
        return f"{kind} over {over}" + (", stored less 1" if op.attr("offset") else "")
    return "-"


def _window(graph: Graph) -> str:
    return "-" if graph.find("attend")[0].attr("window") is None else "sliding"


def _besides(graphs: list[Graph]) -> list[str]:
    """Return what else a reader may want to know is taken, each once."""
    attends = [graph.find("attend")[0] for graph in graphs]
    has = {
        "scores capped": any(op.attr("softcap") for op in attends),
        "learned sinks": any(len(op.args) == 4 for op in attends),
        "its own scale": any(not _is_usual(op) for op in attends),
        "q, k, v in one weight": bool(graphs[0].find("slice_rows")),
        "Conv1D": bool(graphs[0].find("transpose_w")),
        "biases": any(len(op.args) == 3 for op in graphs[0].find("linear")),
    }
    return [words for words, holds in has.items() if holds]


def _is_usual(attend: Op) -> bool:
    width = int(attend.args[0].tensor.shape[-1])  # type: ignore[arg-type]
    return abs(attend.attr_as("scale", float) - width**-0.5) < 1e-9


def tables() -> tuple[list[str], list[str]]:
    """Return the rows of both tables as the page has them."""
    parts: list[list[str]] = []
    for line in PAGE.read_text().splitlines():
        if line in (TAKEN_HEAD, REFUSED_HEAD):
            parts.append([])
        elif line.startswith("| ") and not line.startswith("| ---"):
            parts[-1].append(line)
    taken, refused = parts
    return taken, refused


def renew(taken: Mapping[str, str], refused: Mapping[str, str]) -> None:
    """Write the tables again; the words around them are by hand."""
    made = {TAKEN_HEAD: taken, REFUSED_HEAD: refused}
    lines: list[str] = []
    for line in PAGE.read_text().splitlines():
        if line in made:
            lines += [line, "| --- " * (line.count("|") - 1) + "|", *made[line].values()]
        elif not line.startswith("|"):
            lines.append(line)
    PAGE.write_text("\n".join(lines) + "\n")


def all_rows(capture: Any, make: Any, open_model: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Capture every family; return the rows of both tables by name."""
    taken = {name: taken_row(name, capture(open_model(make(name)))) for name in FAMILIES}
    refused = {}
    for name in REFUSED:
        module = make(name)
        try:
            capture(open_model(module))
        except KvantError as error:
            refused[name] = refused_row(name, type(module).__name__, error)
    return taken, refused
