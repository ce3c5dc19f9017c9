"""Loops of a piece of machine code, from its jumps alone.

A loop is a strongly connected part of the graph of instructions; without the instructions by which
it is entered, the parts that are left are the loops inside it. So it does not matter where in the
text a compiler puts the pieces of a loop, or in which of them it begins. Source: Steensgaard,
Sequentializing Program Dependence Graphs for Irreducible Programs, 1993.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Edges: TypeAlias = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop of the code.

    Attributes:
        places: its instructions, in the order of the text.
        inner: the loops in it.
    """

    places: tuple[int, ...]
    inner: tuple[Loop, ...]


def loops_of(follows: Edges) -> tuple[Loop, ...]:
    """Return the outermost loops.

    Args:
        follows: for each instruction, those that may be next.
    """
    return _loops(follows, range(len(follows)))


def innermost(loops: Sequence[Loop], wanted: Collection[int]) -> Iterator[Loop]:
    """Yield the loops that hold a wanted instruction and no loop that holds one."""
    for loop in loops:
        deeper = list(innermost(loop.inner, wanted))
        if deeper:
            yield from deeper
        elif any(place in wanted for place in loop.places):
            yield loop


def _loops(follows: Edges, places: Collection[int]) -> tuple[Loop, ...]:
    """Return the outermost loops within some instructions."""
    found = []
    for part in _connected(follows, places):
        if len(part) == 1 and part[0] not in follows[part[0]]:
            continue
        inside = set(part)
        entered = {j for i in places if i not in inside for j in follows[i] if j in inside}
        # A loop that nothing enters is the code's end; any of its instructions begins it.
        rest = inside - (entered or {part[0]})
        found.append(Loop(tuple(sorted(part)), _loops(follows, sorted(rest))))
    return tuple(sorted(found, key=lambda loop: loop.places))


def _connected(follows: Edges, places: Collection[int]) -> Iterator[list[int]]:
    """Yield the strongly connected parts of the graph of some instructions (Tarjan, 1972)."""
    inside, number, low = set(places), dict[int, int](), dict[int, int]()
    stack: list[int] = []
    waiting: set[int] = set()
    for root in places:
        if root in number:
            continue
        path: list[tuple[int, Iterator[int]]] = []
        begin = root
        while True:
            if begin >= 0:
                number[begin] = low[begin] = len(number)
                stack.append(begin)
                waiting.add(begin)
                path.append((begin, iter([j for j in follows[begin] if j in inside])))
            place, rest = path[-1]
            begin = -1
            for j in rest:
                if j not in number:
                    begin = j
                    break
                if j in waiting:
                    low[place] = min(low[place], number[j])
            if begin >= 0:
                continue
            path.pop()
            if path:
                low[path[-1][0]] = min(low[path[-1][0]], low[place])
            if low[place] == number[place]:
                at = stack.index(place)
                part, stack[at:] = stack[at:], []
                waiting.difference_update(part)
                yield part
            if not path:
                break
