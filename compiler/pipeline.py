"""The one loop over passes: run, verify, check the promise, dump, time."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ir.errors import KvantError
from ..ir.graph import Graph
from ..ir.text import print_graph
from ..ir.verify import verify
from ..passes import PASSES
from .debug import DUMP_IR, TRACE

Step = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Trace:
    """What one pass did to one graph."""

    name: str
    options: Mapping[str, Any]
    before: Graph
    after: Graph
    seconds: float

    @property
    def changed(self) -> bool:
        """True if the pass returned another graph."""
        return self.after != self.before


def run(graph: Graph, steps: Sequence[Step], dump: Path | None = None) -> tuple[Trace, ...]:
    """Run passes over a graph and return what each of them did.

    Args:
        graph: a verified graph.
        steps: (pass name, options) in order.
        dump: folder for the graph before and after every pass; KVANT_DUMP_IR if not given.

    Raises: KvantError from a pass or from the verifier, with the pass named.
    """
    verify(graph, after="capture")
    folder = dump or (Path(DUMP_IR.get()) if DUMP_IR.get() else None)
    _dump(folder, graph, 0, "input")
    traces = []
    for index, (name, options) in enumerate(steps, 1):
        begin = time.perf_counter()
        after = _apply(name, graph, options)
        verify(after, after=name)
        trace = Trace(name, options, graph, after, time.perf_counter() - begin)
        if TRACE.get() == "1":
            print(f"kvant: pass {name}: {trace.seconds * 1e3:.1f} ms", file=sys.stderr)  # noqa: T201
        _dump(folder, after, index, name)
        traces.append(trace)
        graph = after
    return tuple(traces)


def _apply(name: str, graph: Graph, options: Mapping[str, Any]) -> Graph:
    try:
        return PASSES[name].run(graph, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise KvantError(
            "unknown-key",
            f"pass {name} does not take these options: {', '.join(sorted(options))}",
            where=f"rewrite with pass = {name!r}",
            fix="`kvant show passes` lists every pass with its options",
        ) from None


def _dump(folder: Path | None, graph: Graph, index: int, name: str) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{graph.name}-{index:02d}-{name}.kir").write_text(print_graph(graph))
