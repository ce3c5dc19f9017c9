"""One HTML file with what a compile and an evaluation found: tables and inline plots, no script."""

import io
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

INK, SOFT, LINE = "#1d2433", "#7a869a", "#2f6fde"


def write_report(
    path: Path,
    title: str,
    tables: Mapping[str, list[tuple[str, str]]],
    curves: Mapping[str, tuple[str, str, np.ndarray]],
    *,
    lead: str = "",
    notes: Mapping[str, str] | None = None,
    texts: Mapping[str, tuple[str, str]] | None = None,
) -> Path:
    """Write the report and return its path.

    Args:
        path: file to write.
        title: headline.
        tables: heading -> rows of (name, value).
        curves: heading -> (x label, y label, array [2, N] of x and y).
        lead: one sentence that judges the result.
        notes: heading of a table -> what to know about it.
        texts: heading -> (prompt, what a model wrote after it).
    """
    from jinja2 import Environment

    template = (resources.files("kvant.compiler") / "report.html.j2").read_text(encoding="utf-8")
    plots = {heading: _plot(*curve) for heading, curve in curves.items()}
    page = Environment(autoescape=True).from_string(template)
    path.parent.mkdir(parents=True, exist_ok=True)
    html = page.render(
        title=title, lead=lead, tables=tables, notes=notes or {}, texts=texts or {}, plots=plots
    )
    path.write_text(html, encoding="utf-8")
    return path


def _plot(x_label: str, y_label: str, points: np.ndarray) -> str:
    """Return an inline SVG of one curve, with its running mean on top."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    x, y = points
    figure, axes = pyplot.subplots(figsize=(7.2, 2.6))
    axes.plot(x, y, color=SOFT, linewidth=0.6, alpha=0.6)
    width = max(1, len(y) // 24)
    mean = np.convolve(y, np.ones(width) / width, mode="valid")
    axes.plot(x[width // 2 : width // 2 + len(mean)], mean, color=LINE, linewidth=1.8)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "kvant"}):  # else ids differ from run to run
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text: Any = buffer.getvalue()
    return str(text[text.index("<svg") :])
