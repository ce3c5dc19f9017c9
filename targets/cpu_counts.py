"""Instructions of the inner loops of integer dot products, counted in the assembly.

A count does not depend on how busy a machine is, so tests hold it. It is that of the loop with the
most dot products: loads, unpacking, products, and for values the sums of each block scaled.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ..ir.arrangements import QUAD, ROWS
from ..ir.encodings import Raw
from ..ir.plan import AttentionPlan
from ..ir.planes import code_bits
from .cpu_attend import MOST_SCORE_ROWS, MOST_VALUE_ROWS, attend
from .cpu_compile import assembly
from .cpu_dots import Dots, dots_of
from .cpu_pages import PageReader, readers_of
from .cpu_quads import lanes_of, layouts, value_lanes
from .cpu_rows import blocks
from .machines import Cpu
from .source import Source

# By kind of dot product, for codes of up to 4 bits and of 8: the instruction that takes them, and
# one that only loops of the other codes have. LLVM writes vpdpwssd as pmaddwd and a sum for
# processors on which that is faster.
DOT = {
    "pairs": (("pmaddubsw", None), ("pmaddwd", "pmaddubsw")),
    "vnni": (("vpdpbusd", None), ("vpdpwssd|pmaddwd", "vpdpbusd")),
    "neon": ((r"\bsdot", None), (r"\budot", None)),
    "neon-i8mm": (("usdot", r"\budot"), (r"\budot", None)),
}
_LABEL = re.compile(r"(\.?L\w+):")
_JUMP = re.compile(r"\s+(?:j\w+|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+(\.?L\w+)")
_INSTRUCTION = re.compile(r"\s+[a-z{]")


def instructions_per_element(plan: AttentionPlan, cpu: Cpu) -> dict[str, float | None]:
    """Return the instructions of the inner loop for each key and value element of a KV head.

    Args:
        plan: all query heads of a group count as one reader of the element.
        cpu: for which the kernel is compiled; it need not be this machine.

    Returns: by role; None where a stream is read in floats.
    """
    return {role: _count(plan, role, cpu) for role in ("k", "v")}


def _count(plan: AttentionPlan, role: str, cpu: Cpu) -> float | None:
    layout = layouts(plan)[role == "v"]
    if layout.kind == ROWS:
        return None
    stream, other = (plan.k, plan.v) if role == "k" else (plan.v, plan.k)
    # With the other stream raw, all dot products of the text are this stream's.
    raw = replace(other, tokens=replace(other.tokens, rest=Raw("f32"), flush="group"))
    k, v = (stream, raw) if role == "k" else (raw, stream)
    alone = replace(plan, k=k, v=v)
    readers = readers_of(stream, layout)
    text = assembly(Source(alone, (attend(alone, cpu),), _HEAD), cpu)
    most = MOST_SCORE_ROWS if role == "k" else MOST_VALUE_ROWS
    rows = blocks(plan.group, most)[0][1]
    total = 0.0
    for reader in readers:
        count = _count_reader(text, reader, role, cpu, rows)
        if count is None:
            return None
        total += count * rows * reader.width
    return total / sum(reader.width for reader in readers)


def _count_reader(text: str, reader: PageReader, role: str, cpu: Cpu, rows: int) -> float | None:
    """Return the instructions of the loop of a slice, for each of its elements and one row."""
    lanes = lanes_of(cpu) if role == "k" else value_lanes(reader.coded(), reader.width, cpu)
    name, other = DOT[cpu.dots][code_bits(reader.coded()) == 8]
    loops = inner_loops(text, name, other)
    counts = [(sum(bool(re.search(name, line)) for line in body), len(body)) for body in loops]
    dots, size = max(counts, default=(0, 0))
    products = dots * _codes_of_a_dot(dots_of(reader.coded(), cpu, lanes, signed=role == "k"), rows)
    return size / (products * lanes) if dots else None


def _codes_of_a_dot(dots: Dots, rows: int) -> float:
    """Return the codes that a counted instruction multiplies in each lane, on average."""
    if dots.biased:  # low and high bytes of each row, and once the codes alone
        return QUAD * rows / (2 * rows + 1)
    low_alone = dots.by_bytes and dots.cpu.dots == "neon-i8mm"
    return QUAD / dots.words if not low_alone else QUAD


def inner_loops(text: str, name: str, other: str | None = None) -> list[list[str]]:
    """Return the instructions of each loop with dot products that holds no other such loop.

    Args:
        text: assembly.
        name: pattern of the dot products.
        other: pattern of those whose loops do not count, or None.
    """
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    lines = [line for line in text.splitlines() if _LABEL.match(line) or _INSTRUCTION.match(line)]
    for i, line in enumerate(lines):
        label, jump = _LABEL.match(line), _JUMP.match(line)
        if label:
            labels[label[1]] = i
        if jump and jump[1] in labels:
            loops.append((labels[jump[1]], i))
    ours = [(a, b) for a, b in loops if any(re.search(name, line) for line in lines[a:b])]
    inner = [(a, b) for a, b in ours if not any(a <= c and d < b for c, d in ours)]
    bodies = [[x for x in lines[a : b + 1] if _INSTRUCTION.match(x)] for a, b in inner]
    if other is None:
        return bodies
    return [body for body in bodies if not any(re.search(other, line) for line in body)]


_HEAD = "from tvm.script import tirx as T\n"
