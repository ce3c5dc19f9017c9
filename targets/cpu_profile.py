"""Instructions that a decode step executes, counted exactly: each block of the assembly counts.

A copy of the kernels adds one to a counter of its own wherever straight code begins: at a label and
behind a conditional jump. The counters times the instructions of each block are what one step
executes: roundings, scores, softmax, values and merging, in floats or integers alike. It knows
nothing of how loops are nested, and a busy machine changes no count. For x86-64 alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ir.plan import AttentionPlan
from .cpu import emit, launch_facts
from .cpu_compile import assembly, failed
from .cpu_link import link
from .machines import Cpu
from .source import Source

KINDS = (
    ("dot", r"v?(?:pdpbusds?|pdpwssds?|pmaddubsw|pmaddwd)\b"),
    ("shift", r"v?ps(?:rl|ll|ra)\w+\b"),
    ("logic", r"v?(?:p(?:and|or|xor|andn)[dq]?|(?:and|or|xor|andn)p[sd]|pternlog[dq])\b"),
    ("float", r"v?(?:fn?m(?:add|sub)\w*|(?:mul|add|sub|max|min|div)[ps][sd])\b"),
    ("add", r"v?p(?:add|sub)[bwdq]\b"),
    ("convert", r"v?(?:cvt|pmov[sz]x|round|rndscale)\w+\b"),
    ("move", r"v?(?:mov|pbroadcast|broadcast|lddqu)\w*\b"),
)
"""Kinds of vector instructions; the first that fits counts. What fits none is "shuffle"."""

SCALAR = "scalar"
COUNTS = "counts"
DECODE = ("prepare", "attend", "combine")
_VECTOR = re.compile(r"%[xyz]mm\d")
_LABEL = re.compile(r"([.\w$]+):")
_SILENT = re.compile(r"\.L(?:tmp|func_begin|func_end)")
_INSTRUCTION = re.compile(r"\s+([a-z]\w*)(?:\s+(.*))?$")
_JUMP = re.compile(r"\s+j(?!mp)\w+\s")
_SECTION = re.compile(r"\s+\.(?:text|bss|data|section\s+(\S+?),)")
# Neither `mov` nor `lea` changes a flag.
_ADD_ONE = """\tmovq %rax, kvant_kept(%rip)
\tmovq kvant_counts+{0}(%rip), %rax
\tleaq 1(%rax), %rax
\tmovq %rax, kvant_counts+{0}(%rip)
\tmovq kvant_kept(%rip), %rax"""
# A function of tvm-ffi that returns where the counters are; and what takes the name of each kernel
# that is not counted.
_TAIL = """
\t.text
\t.globl __tvm_ffi_counts
__tvm_ffi_counts:
\tmovq $1, (%rcx)
\tleaq kvant_counts(%rip), %rax
\tmovq %rax, 8(%rcx)
{stubs}
\txorl %eax, %eax
\tretq
\t.local kvant_kept
\t.comm kvant_kept,8,8
\t.local kvant_counts
\t.comm kvant_counts,{size},64
"""


@dataclass(frozen=True, slots=True)
class Block:
    """Straight code.

    Attributes:
        kinds: number of its instructions by kind; "mem" after the kind of those that read or
            write memory.
    """

    kinds: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Counted:
    """A library that counts, and what its counters are of."""

    library: bytes
    launch: bytes
    blocks: tuple[Block, ...]

    def executed(self, counts: Sequence[int]) -> dict[str, int]:
        """Return the instructions executed, by kind, from how often each block was entered."""
        total: Counter[str] = Counter()
        for block, count in zip(self.blocks, counts, strict=True):
            for kind, size in block.kinds:
                total[kind] += size * count
        return {kind: count for kind, count in sorted(total.items()) if count}


def counting(plan: AttentionPlan, cpu: Cpu) -> Counted:
    """Return kernels of one decode step that count; they run on one thread alone.

    The other kernels of the library do nothing: its caches hold zeros, and no count depends on
    what they hold.

    Args:
        plan: what is computed.
        cpu: one that this machine can run, x86-64.

    Raises: KvantError "compiler-failed", "no-c-compiler".
    """
    source = emit(plan, cpu)
    kernels = tuple(kernel for kernel in source.kernels if kernel.name in DECODE)
    text, blocks = mark(assembly(Source(plan, kernels, source.head), cpu))
    names = [f"__tvm_ffi_{x.name}" for x in source.kernels if x.name not in DECODE]
    stubs = "\n".join(f"\t.globl {name}\n{name}:" for name in names)
    text += _TAIL.format(stubs=stubs, size=8 * len(blocks))
    library = link(_assembled(text), cpu)
    launch = launch_facts(source, cpu, library)
    launch["kernels"][COUNTS] = []
    return Counted(library, json.dumps(launch).encode(), tuple(blocks))


def mark(text: str) -> tuple[str, list[Block]]:
    """Return assembly whose blocks count, and what each one holds."""
    marked: list[str] = []
    kinds: list[Counter[str]] = []
    code = begins = False
    for line in text.splitlines():
        section, label, found = _SECTION.match(line), _LABEL.match(line), _INSTRUCTION.match(line)
        if section:
            code = line.strip() == ".text" or str(section[1]).startswith(".text")
        elif label and code and not _SILENT.match(line):
            begins = True
        elif found and code:
            if begins:
                marked.append(_ADD_ONE.format(8 * len(kinds)))
                kinds.append(Counter())
            kinds[-1][kind_of(found[1], found[2] or "")] += 1
            begins = bool(_JUMP.match(line))
        if not line.lstrip().startswith((".loc\t", ".file\t")):
            marked.append(line)
    return "\n".join(marked) + "\n", [Block(tuple(sorted(own.items()))) for own in kinds]


def kind_of(name: str, operands: str) -> str:
    """Return the kind of an instruction, with " mem" where an operand lies in memory."""
    if not _VECTOR.search(operands):
        return SCALAR
    kind = next((kind for kind, names in KINDS if re.match(names, name)), "shuffle")
    return f"{kind} mem" if "(" in operands else kind


def _assembled(text: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="kvant-") as folder:
        place = Path(folder)
        (place / "counts.s").write_text(text)
        command = ["cc", "-c", "-o", "counts.o", "counts.s"]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        if done.returncode:
            raise failed(done.stderr.strip()[-600:])
        return (place / "counts.o").read_bytes()
