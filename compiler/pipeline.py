"""The one loop over passes: run, verify, check the promise, dump, time."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ir.errors import KvantError
from ..ir.graph import Graph
from ..ir.text import print_graph
from ..ir.verify import verify
from ..passes import PASSES
from .debug import TRACE, write_dump

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
        dump: folder for the graph before and after every pass.

    Raises: KvantError from a pass or from the verifier, with the pass named.
    """
    verify(graph, after="capture")
    _dump(dump, graph, 0, "input")
    traces = []
    for index, (name, options) in enumerate(steps, 1):
        begin = time.perf_counter()
        with within(f"pass {name}"):
            after = PASSES[name].run(graph, **options)
        verify(after, after=name)
        trace = Trace(name, options, graph, after, time.perf_counter() - begin)
        if TRACE.get() == "1":
            print(f"kvant: pass {name}: {trace.seconds * 1e3:.1f} ms", file=sys.stderr)  # noqa: T201
        _dump(dump, after, index, name)
        traces.append(trace)
        graph = after
    return tuple(traces)


@contextmanager
def within(place: str) -> Iterator[None]:
    """Say in every refusal of the block that it happened in `place`, if it does not say so yet."""
    try:
        yield
    except KvantError as error:
        if place in error.where:
            raise
        where = f"{place}: {error.where}"
        raise KvantError(error.code, error.what, where=where, fix=error.fix) from error


def _dump(folder: Path | None, graph: Graph, index: int, name: str) -> None:
    if folder is not None:
        write_dump(folder / f"{index:02d}-{name}.kir", print_graph(graph).encode())
