"""The machine's limit of a decode step: its bytes and its instructions, and how fast those can go.

Instructions are those that one step executes, counted by a copy of the kernels over a cache of the
size that is timed (`targets/cpu_profile.py`). The rate that the machine sustains is that of a loop
with the same numbers of each kind of instruction over data in the first cache, in which no
instruction waits for another one; of a few orders the fastest. It knows no branch that is foreseen
wrongly and no miss.
"""

import ctypes
import os
import random
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cpu_peers
import numpy as np

from kvant.compiler.debug import NUM_THREADS
from kvant.runtime import launch_cpu
from kvant.runtime.cache import Cache
from kvant.targets.cpu_profile import COUNTS, SCALAR, counting
from kvant.targets.machines import Cpu

ORDERS = 4  # that are tried
BODY = 192  # instructions of the loop
TRIPS = 400_000  # of the loop in one run: milliseconds, beside which waking threads is nothing
CHUNK = 4096  # tokens of one append
DATA = 4096  # bytes that the loop reads and writes

# One instruction of each kind: {d} is a register that is written and read by nobody soon, {a} one
# that is only added to, {s} one that is never written, {m} memory.
_PLAIN = {
    "shift": "vpsrlw $4, {s}, {d}",
    "logic": "vpand{q} {s}, {t}, {d}",
    "float": "vfmadd231ps {s}, {t}, {a}",
    "add": "vpaddd {s}, {t}, {d}",
    "convert": "vcvtdq2ps {s}, {d}",
    "move": "vmovaps {s}, {d}",
    "shuffle": "vpshufb {s}, {t}, {d}",
    "logic mem": "vpand{q} {m}, {t}, {d}",
    "float mem": "vfmadd231ps {m}, {t}, {a}",
    "add mem": "vpaddd {m}, {t}, {d}",
    "convert mem": "vcvtdq2ps {m}, {d}",
    "move mem": "vmovdqu{w} {m}, {d}",
    "shuffle mem": "vpshufb {m}, {t}, {d}",
    "shift mem": "vmovdqu{w} {m}, {d}",
    SCALAR: "leaq 64(%rsi), %{r}",
}
_DOTS = {
    "vnni": {"dot": "vpdpbusd {s}, {t}, {a}", "dot mem": "vpdpbusd {m}, {t}, {a}"},
    "pairs": {"dot": "vpmaddubsw {s}, {t}, {d}", "dot mem": "vpmaddubsw {m}, {t}, {d}"},
}
KINDS = (*_PLAIN, *_DOTS["vnni"])
_SCALARS = ("rax", "rdx", "r8", "r9", "r10", "r11")


def executed(artifact: Any, cpu: Cpu, batch: int, tokens: int) -> dict[str, int] | None:
    """Return the instructions that one decode step executes, by kind.

    Args:
        artifact: whose first layer is counted, on any target.
        cpu: whose kernels are compiled and run.
        batch: rows.
        tokens: of each row.

    Returns: none where they are not counted: on what is not x86-64 with AVX.
    """
    if cpu.dots not in _DOTS or cpu.vector < 32:
        return None
    plan = artifact.plan_of(0)
    counted = counting(plan, cpu)
    files = {"p/kernels.so": counted.library, "p/launch.json": counted.launch}
    kernels = launch_cpu.Kernels([plan], [artifact.constants[0]], ["p"], files)
    where = kernels._library(0).functions[COUNTS]()
    cache = Cache([plan], kernels, batch=batch, max_tokens=tokens)
    counts = [min(CHUNK, tokens - 1 - begin) for begin in range(0, tokens - 1, CHUNK)]
    for count in (*counts, 1):
        shape = (batch, plan.k.heads, count)
        cache.append(0, *(np.zeros((*shape, x.channels), np.float32) for x in (plan.k, plan.v)))
    threads = os.environ.get(NUM_THREADS.name)
    os.environ[NUM_THREADS.name] = "1"
    cache.attend(0, np.zeros((batch, plan.group * plan.k.heads, 1, plan.k.channels), np.float32))
    del os.environ[NUM_THREADS.name]
    if threads is not None:
        os.environ[NUM_THREADS.name] = threads
    return counted.executed((ctypes.c_int64 * len(counted.blocks)).from_address(int(where)))


def loop_text(kinds: Mapping[str, int], cpu: Cpu, order: int = 0) -> str:
    """Return assembly of `kvant_loop(memory, trips)`: BODY instructions of the given kinds.

    Args:
        kinds: how many of each kind.
        cpu: whose vectors.
        order: 0 for each kind spread evenly, else the number of a random order.
    """
    register = {16: "xmm", 32: "ymm", 64: "zmm"}[cpu.vector]
    wide = cpu.vector == 64
    last = 32 if wide else 16
    table = _PLAIN | _DOTS[cpu.dots]
    body, chosen = [], mixed(kinds)
    if order:
        random.Random(order).shuffle(chosen)
    for i, kind in enumerate(chosen):
        fields = {
            "d": f"%{register}{last - 1 - i % 4}",
            "a": f"%{register}{i % (last - 6)}",
            "s": f"%{register}{last - 5}",
            "t": f"%{register}{last - 6}",
            "m": f"{i * cpu.vector % DATA}(%rdi)",
            "q": "d" if wide else "",
            "w": "64" if wide else "",
            "r": _SCALARS[i % len(_SCALARS)],
        }
        body.append("\t" + table[kind].format(**fields))
    head = ["\t.text", "\t.globl kvant_loop", "kvant_loop:", "\t.p2align 6", "1:"]
    tail = ["\tsubq $1, %rsi", "\tjne 1b", "\tvzeroupper", "\tretq"]
    return "\n".join([*head, *body[:-2], *tail]) + '\n\t.section .note.GNU-stack,"",@progbits\n'


def mixed(kinds: Mapping[str, int]) -> list[str]:
    """Return BODY kinds in the given proportions, each spread evenly; jumps count as scalar."""
    whole = sum(kinds.values())
    places = []
    for kind, count in kinds.items():
        share = round(BODY * count / whole)
        places += [((i + 0.5) / share, kind) for i in range(share)]
    found = [kind for _, kind in sorted(places)]
    return (found + [SCALAR] * BODY)[:BODY]


def fastest_loop(kinds: Mapping[str, int], cpu: Cpu, threads: int) -> "IssueLoop":
    """Return the loop in the fastest of a few orders."""
    loops = [IssueLoop(kinds, cpu, threads, order) for order in range(ORDERS)]
    return min(loops, key=lambda loop: cpu_peers.least(loop.run))


class IssueLoop:
    """The loop, on some threads at once.

    Args:
        kinds: how many instructions of each kind.
        cpu: whose vectors.
        threads: that run it.
        order: see `loop_text`.
    """

    def __init__(self, kinds: Mapping[str, int], cpu: Cpu, threads: int, order: int = 0) -> None:
        with tempfile.TemporaryDirectory(prefix="kvant-") as folder:
            place = Path(folder)
            (place / "loop.s").write_text(loop_text(kinds, cpu, order))
            command = ["cc", "-shared", "-o", "loop.so", "loop.s"]
            subprocess.run(command, cwd=place, check=True)
            self._loop = ctypes.CDLL(str(place / "loop.so")).kvant_loop
        self._loop.argtypes, self._loop.restype = (ctypes.c_void_p, ctypes.c_int64), None
        self._memory = [(ctypes.c_char * (DATA + 128))() for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)
        self.instructions = BODY * TRIPS * threads

    def run(self) -> None:
        """Execute `instructions` instructions."""
        list(self._pool.map(self._one, self._memory))

    def _one(self, memory: Any) -> None:
        begin = ctypes.addressof(memory)
        self._loop(begin + -begin % 64, TRIPS)
