"""What a kernel for a GPU will issue, counted in its machine code: no GPU, no noise.

NVIDIA's comes from a cubin by nvdisasm, AMD's from the assembly that Triton writes. Counted are the
loops that hold matrix instructions and no loop that does: those over tokens. The **main loop** is
the one of them with the fewest instructions for a token; beside it may stand a loop over what is
not a whole tile of the pages, which masks besides.

A count is that of every instruction that stands in the loop, so it is an upper bound where pieces
are jumped over. What a warp runs only when its threads have parted (BRA.DIV, BRA.CONV) never runs
here and is left out. One pass through a loop is one pass through it in Triton, which unrolls none.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..ir.plan import AttentionPlan
from .gpu_loops import Loop, innermost, loops_of
from .machines import Gpu

# Kinds of instructions; the first pattern that an opcode begins with says its kind.
SASS = {
    "matrix": r"([BDHIQO]|HG|IG|QG|BG|UTC[A-Z]*)MMA",
    "async copy": r"LDGSTS|LDGDEPBAR|UBLKCP|UTMA|CP_ASYNC|UTMACMDFLUSH",
    "spill": r"LDL|STL",
    "shared": r"LDS|STS|ATOMS|LDT|STT|UTCCP",
    "global": r"LDG|STG|LD\b|ST\b|ATOM|RED\b|REDG|CCTL",
    "barrier": r"BAR|DEPBAR|MEMBAR|WARP|SYNCS|ERRBAR|FENCE|BSSY|BSYNC|BREAK|ENDCOLL|B2R|UTCBAR",
    "shuffle": r"SHFL|REDUX|CREDUX|VOTE|MATCH",
    "convert": r"F2|I2|FRND|HADD2\.F32",
    "predicate": r"[FIDH]SETP|HSETP2|PLOP3|P2R|R2P|PSETP|VOTEU|U[IF]SETP|UPLOP3",
    "branch": r"BRA|BRX|JMP|CALL|RET|EXIT|NANOSLEEP|YIELD",
    "float": r"[FDH](ADD|MUL|FMA|MNMX|SEL|SET)|MUFU|FCHK|FSWZ|HFMA2|HADD2|HMUL2|HMNMX2|HSET2",
    "constant": r"U?LDC",
    "uniform": r"U[A-Z]|R2UR|S2UR",
    "move": r"MOV|IMAD\.MOV|CS2R|S2R|NOP|PRMT\.MOV",
    "integer": r"",
}
GCN = {
    "matrix": r"v_(mfma|smfmac|wmma)",
    "async copy": r"(buffer|global)_load_(lds|dword\w* .*\blds\b)",
    "spill": r"scratch_|\S+ .*Folded (Spill|Reload)",
    "shuffle": r"ds_(b?permute|swizzle)|v_(readlane|writelane|readfirstlane)|\S+_dpp",
    "shared": r"ds_",
    "global": r"(global|buffer|flat)_",
    "barrier": r"s_barrier|s_waitcnt|s_nop|s_sleep|s_wait|s_setprio|s_delay",
    "convert": r"v_cvt|v_(rndne|trunc|floor|ceil|fract)_",
    "predicate": r"v_cmpx?_|v_cndmask",
    "branch": r"s_(c?branch|endpgm|setpc|swappc|getpc)",
    "float": r"v_(pk_)?\w+_(f16|f32|f64|bf16|legacy)|v_dot",
    "scalar": r"s_",
    "move": r"v_(mov|accvgpr|swap|pk_mov)",
    "integer": r"",
}
# Bytes that one thread loads; what a pattern does not find takes 4.
SASS_BYTES = {r"\.[US]8": 1, r"\.[US]16": 2, r"\.64\b": 8, r"\.128\b": 16, r"\.256\b": 32}
GCN_BYTES = {
    r"_[us]?byte": 1,
    r"_[us]?short": 2,
    r"dwordx2": 8,
    r"dwordx3": 12,
    r"dwordx4": 16,
}
REGISTERS_AT_ONCE = 8
"""A thread gets registers in portions of this many, on both makers' GPUs."""
QUARTERS = 4
"""Parts of a multiprocessor (or compute unit), each with a scheduler and its share of registers."""
RESERVED = {"cuda": 1024, "hip": 0}
"""Bytes of shared memory that each block takes besides its own (CUDA guide, from sm_80 on)."""

_SASS_LINE = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;"
)
_SASS_LABEL = re.compile(r"([.$]\S+|\w+):\s*$")
_GCN_LABEL = re.compile(r"(\.?\w+):")
# Lines of assembly that kernels bring along begin in the first column.
_GCN_LINE = re.compile(r"\s*([a-z]\w+.*?)\s*$")
_COMMENT = re.compile(r";(?!.*Folded).*")


@dataclass(frozen=True, slots=True)
class LoopCount:
    """What stands in a loop.

    Attributes:
        kinds: instructions of each kind; their sum is what one warp issues in one step.
        loads: bytes that a thread loads from global memory -> how many such loads.
        opcodes: the most frequent instructions, for people.
        inner: loops inside it, whose instructions are counted once.
    """

    kinds: Mapping[str, int]
    loads: Mapping[int, int]
    opcodes: tuple[tuple[str, int], ...]
    inner: int

    @property
    def instructions(self) -> int:
        """Instructions that a warp issues in one step."""
        return sum(self.kinds.values())

    @property
    def vector(self) -> int:
        """Instructions of AMD's vector unit: all but memory, matrix, scalar ones and waiting."""
        aside = ("matrix", "async copy", "spill", "shared", "global", "barrier", "branch", "scalar")
        return sum(count for kind, count in self.kinds.items() if kind not in aside)

    @property
    def spills(self) -> int:
        """Loads and stores of registers that did not fit."""
        return self.kinds.get("spill", 0)

    @property
    def single(self) -> bool:
        """Whether AMD's matrix instructions are those of float32."""
        return any(re.match(r"v_mfma_f32_\w+_x?f32", opcode) for opcode, _ in self.opcodes)

    @property
    def scalar_loads(self) -> int:
        """Global loads of 1 or 2 bytes a thread."""
        return sum(count for size, count in self.loads.items() if size < 4)


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass through a loop of attend, as its text says.

    Attributes:
        tokens: of a pass.
        stages: tiles under way.
        single: whether its products are of float32.
    """

    tokens: int
    stages: int
    single: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """What stands in a kernel.

    Attributes:
        loops: the innermost ones with matrix instructions, in the order of the code.
        instructions: of the whole kernel.
        spills: of the whole kernel.
        registers: of a thread; of AMD's both kinds together.
        stack: bytes of a thread in local memory.
    """

    loops: tuple[LoopCount, ...]
    instructions: int
    spills: int
    registers: int
    stack: int


def main_loop(counts: Counts, passes: Sequence[Pass]) -> tuple[LoopCount, Pass]:
    """Return the main loop and a pass through it: the fewest instructions for a token.

    Args:
        counts: of attend.
        passes: its loops in the text, which the compiler leaves in their order. Where it made two
            of one, all of them must take the same tokens.

    Raises: ValueError where it cannot be said how many tokens a loop takes.
    """
    loops = counts.loops
    if sorted(one.single for one in loops) == sorted(one.single for one in passes):
        # AMD's compiler changes their order: those of float32 apart, the others apart.
        loops = tuple(sorted(loops, key=lambda one: one.single))
        passes = sorted(passes, key=lambda one: one.single)
    if len(loops) == len(passes) > 0:
        pairs = list(zip(loops, passes, strict=True))
    elif counts.loops and len({one.tokens for one in passes}) == 1:
        pairs = [(loop, passes[0]) for loop in counts.loops]
    else:
        many = f"{len(passes)} loops, the code {len(counts.loops)} with matrix instructions"
        raise ValueError(f"the text has {many}")
    return min(pairs, key=lambda pair: pair[0].instructions / pair[1].tokens)


def count(binary: bytes, name: str = "attend") -> Counts:
    """Count a cubin, by the nvdisasm that comes with Triton.

    Raises: OSError or CalledProcessError where nvdisasm cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="kvant-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        run = subprocess.run([nvdisasm(), str(path)], capture_output=True, text=True, check=True)
    return count_sass(run.stdout, name)


def nvdisasm() -> str:
    """Return the path of NVIDIA's disassembler. Raises: ImportError without Triton."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm")


def count_sass(text: str, name: str = "attend") -> Counts:
    """Count what nvdisasm wrote of a kernel."""
    lines, labels = _sass(text)
    follows = [_sass_follows(i, *line, labels) for i, line in enumerate(lines)]
    words = [opcode for _, opcode, _ in lines]
    facts = {what: _fact(text, what, name) for what in ("REGCOUNT", "FRAME_SIZE")}
    return _counts(words, follows, SASS, SASS_BYTES, facts["REGCOUNT"], facts["FRAME_SIZE"])


def count_gcn(text: str) -> Counts:
    """Count the assembly of a kernel for AMD."""
    code, _, facts = text.partition("\n.Lfunc_end")
    lines, labels = _gcn(code)
    follows = [_gcn_follows(i, line, labels, len(lines)) for i, line in enumerate(lines)]
    registers = _field(facts, "vgpr_count")
    return _counts(
        lines, follows, GCN, GCN_BYTES, registers, _field(facts, "private_segment_fixed_size")
    )


def elements(plan: AttentionPlan, tokens: int) -> int:
    """Return the key and value elements of one KV head in some tokens."""
    return tokens * (plan.k.channels + plan.v.channels)


def passes_of(source: str, tile: int) -> tuple[Pass, ...]:
    """Return the loops with matrix products in the text of attend, in its order.

    Args:
        source: of one kernel, in Triton.
        tile: tokens of what a loop without a step of its own counts.

    Raises: ValueError where a step is no number.
    """
    lines = source.splitlines()
    found = []
    for i, line in enumerate(lines):
        head = re.match(r"( *)for \w+ in (?:tl\.)?range\((.*)\):", line)
        if head is None or not any("tl.dot" in x for x in _body(lines[i + 1 :], head[1])):
            continue
        stages = re.search(r"num_stages=(\d+)", head[2])
        bounds = re.sub(r", \w+=\w+", "", re.sub(r"\([^()]*\)", "", head[2])).split(", ")
        step = int(bounds[2]) if len(bounds) == 3 else tile
        single = any("input_precision" in x for x in _body(lines[i + 1 :], head[1]))
        found.append(Pass(step, int(stages[1]) if stages else 1, single))
    return tuple(found)


def _body(lines: Sequence[str], indent: str) -> Iterator[str]:
    """Yield the lines of a block whose head has an indent."""
    return takewhile(lambda line: not line.strip() or line.startswith(f"{indent} "), lines)


def per_element(instructions: int, warps: int, lanes: int, elements: int) -> float:
    """Return instructions of a lane for each element: what every public count of this kind is.

    Args:
        instructions: that a warp issues in one step.
        warps: of a block; all of them work on the same elements.
        lanes: threads of a warp.
        elements: keys and values of one step of a block.
    """
    return instructions * warps * lanes / elements


def resident(gpu: Gpu, registers: int, shared: int, warps: int) -> int:
    """Return how many blocks a multiprocessor holds at once.

    Args:
        gpu: the kind.
        registers: of a thread.
        shared: bytes of a block.
        warps: of a block.
    """
    each = -(-max(registers, 1) // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE * gpu.warp
    held = min(gpu.warps, gpu.registers // QUARTERS // each * QUARTERS)
    by_shared = gpu.shared_per_sm // max(shared + RESERVED[gpu.backend], 1)
    return min(held // warps, by_shared, gpu.blocks)


def _counts(
    words: Sequence[str],
    follows: Sequence[Sequence[int]],
    kinds: Mapping[str, str],
    sizes: Mapping[str, int],
    registers: int,
    stack: int,
) -> Counts:
    kind = [_kind(word, kinds) for word in words]
    matrix = {i for i, x in enumerate(kind) if x == "matrix"}
    loops = sorted(innermost(loops_of(follows), matrix), key=lambda loop: loop.places)
    found = tuple(_loop_count(loop, words, kind, sizes) for loop in loops)
    return Counts(found, len(words), kind.count("spill"), registers, stack)


def _loop_count(
    loop: Loop, words: Sequence[str], kind: Sequence[str], sizes: Mapping[str, int]
) -> LoopCount:
    kinds = Counter(kind[i] for i in loop.places)
    loads = Counter(
        _bytes(words[i], sizes)
        for i in loop.places
        if kind[i] == "global" and re.match(r"LD|\w+_load", words[i])
    )
    opcodes = Counter(words[i].split()[0] for i in loop.places)
    return LoopCount(dict(kinds), dict(loads), tuple(opcodes.most_common()), len(loop.inner))


def _kind(word: str, kinds: Mapping[str, str]) -> str:
    return next(kind for kind, pattern in kinds.items() if re.match(pattern, word))


def _bytes(word: str, sizes: Mapping[str, int]) -> int:
    return next((size for pattern, size in sizes.items() if re.search(pattern, word)), 4)


def _sass(text: str) -> tuple[list[tuple[str, str, str]], dict[str, int]]:
    """Return (predicate, opcode, operands) of each instruction, and where each label points."""
    lines: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        instruction, label = _SASS_LINE.match(line), _SASS_LABEL.match(line)
        if instruction:
            lines.append((instruction[1] or "", instruction[2], instruction[3]))
        elif label:
            labels[label[1]] = len(lines)
    return lines, labels


def _sass_follows(
    i: int, predicate: str, opcode: str, operands: str, labels: Mapping[str, int]
) -> tuple[int, ...]:
    """Return the instructions that may come after one."""
    name, _, kind = opcode.partition(".")
    target = re.search(r"`\(([^)]+)\)", operands)
    chance = predicate not in ("", "@PT") or re.search(r"!?\bU?P\d", operands) is not None
    after = (i + 1,) if chance else ()
    if name == "BRA" and target and target[1] in labels and "DIV" not in kind:
        return (*(() if "CONV" in kind else after), labels[target[1]])
    if name in ("EXIT", "RET", "BRX", "JMX", "JMP", "KILL"):
        return after
    return (i + 1,)


def _fact(text: str, what: str, name: str) -> int:
    """Return a number that the cubin says of a function, or 0."""
    pattern = rf"EIATTR_{what}\n(?:(?!EIATTR_).)*?index@\({re.escape(name)}\)\n"
    found = re.search(pattern + r".*?\.word\s+(0x[0-9a-f]+)", text, re.DOTALL)
    return int(found[1], 16) if found else 0


def _gcn(text: str) -> tuple[list[str], dict[str, int]]:
    """Return the instructions, and where each label points."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = _COMMENT.sub("", line)
        label, instruction = _GCN_LABEL.match(line), _GCN_LINE.match(line)
        if label:
            labels[label[1]] = len(lines)
        elif instruction:
            lines.append(instruction[1])
    return lines, labels


def _gcn_follows(i: int, line: str, labels: Mapping[str, int], size: int) -> tuple[int, ...]:
    """Return the instructions that may come after one."""
    name, *rest = line.split()
    after = (i + 1,) if i + 1 < size else ()
    if name.startswith(("s_branch", "s_cbranch")) and rest[0] in labels:
        return (labels[rest[0]], *(after if name != "s_branch" else ()))
    return () if name in ("s_endpgm", "s_setpc_b64") else after


def _field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    return int(found[1]) if found else 0
