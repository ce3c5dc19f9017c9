"""What is measured: the grid, the pairs, the goals of the first table, and what fits this machine.

No engine is imported here.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHAPES = ("32x8x128", "32x32x128", "9x3x64", "4x1x256")
CONTEXTS = (1024, 4096, 16384, 65536, 131072)
BATCHES = (1, 4)
MAIN = "32x8x128"
OURS = "kvant:"  # a peer that is another recipe of ours
PROBE = "read_bandwidth"
PREFILL = "torch_prefill"  # a block of queries, causal, instead of one
QUERIES = 512
BF16_DOTS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
FLAGS_ARM = ("asimddp", "i8mm", "bf16", "sve")

PAIRS: dict[str, tuple[str, ...]] = {
    "int4-token": (
        "ik_q4_0",
        "ik_f16",
        "llama_q4_0",
        "llama_f16",
        "ort_int4",
        "ort_f32",
        "torch_f32",
        "torch_bf16",
    ),
    "int8-token": ("ik_q8_0", "llama_q8_0", "ort_int8"),
    "kivi-4bit": ("ik_q4_0",),
    "kivi-2bit": ("ik_q4_0", OURS + "int4-token"),
    "quarot-kv2": ("ik_q4_0", OURS + "int4-token"),
}
"""Whom each recipe meets at every point of the grid; other recipes meet our own int4-token."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point: a recipe, a shape, how many tokens, rows and threads."""

    recipe: str
    shape: str
    context: int
    batch: int
    threads: int

    def __str__(self) -> str:
        return f"{self.recipe},{self.shape},{self.context},{self.batch},{self.threads}"


@dataclass(frozen=True, slots=True)
class Goal:
    """A row of the first table.

    Attributes:
        text: what is compared.
        must: what it has to reach; none for what is only shown.
        aim: what it should reach.
        cells: where; the worst one counts.
        peers: whom each cell meets; the best one counts.
        of: what is measured: "time" of peer / ours, share of the "bandwidth", or of the "limit".
    """

    text: str
    must: float | None
    aim: float | None
    cells: tuple[Cell, ...]
    peers: tuple[str, ...]
    of: str = "time"


def _cells(recipe: str, contexts: tuple[int, ...], threads: tuple[int, ...]) -> tuple[Cell, ...]:
    return tuple(Cell(recipe, MAIN, n, 1, t) for n in contexts for t in threads)


_BOTH, _SHORT = (1, 2), (4096, 16384)
_INT4, _INT8 = _cells("int4-token", _SHORT, _BOTH), _cells("int8-token", (16384,), _BOTH)
_LONG = (65536,)
_LIMITED = (
    *_cells("int4-token", (*_SHORT, *_LONG), _BOTH),
    *_cells("quarot-kv2", (16384, *_LONG), _BOTH),
    *_cells("kivi-2bit", _LONG, _BOTH),
)


def _wide(recipe: str) -> tuple[Cell, ...]:
    return tuple(Cell(recipe, "32x32x128", 32768, 1, threads) for threads in _BOTH)


GOALS = (
    Goal("int4 decode at 4k and 16k vs ik_llama.cpp q4_0", 1.2, 2.0, _INT4, ("ik_q4_0",)),
    Goal("int8 decode at 16k vs ik_llama.cpp q8_0", 1.3, 3.0, _INT8, ("ik_q8_0",)),
    Goal("int4 decode vs llama.cpp q4_0", 10.0, 20.0, _INT4, ("llama_q4_0",)),
    Goal("int8 decode vs llama.cpp q8_0", 6.0, 12.0, _INT8, ("llama_q8_0",)),
    Goal("int8 decode vs ONNX Runtime int8", 2.0, 4.0, _INT8, ("ort_int8",)),
    Goal("int4 decode vs ONNX Runtime int4", 5.0, 8.0, _INT4, ("ort_int4",)),
    Goal("int4 decode vs the best of torch SDPA", 3.0, 5.0, _INT4, ("torch_f32", "torch_bf16")),
    *(
        Goal(
            f"2-bit (`{recipe}`) decode vs our int4, 32x32x128, beyond L3",
            1.3,
            1.7,
            _wide(recipe),
            (OURS + "int4-token",),
        )
        for recipe in ("quarot-kv2", "kivi-2bit")
    ),
    Goal(
        "int8 at 64k, 2 threads: share of measured read bandwidth",
        0.7,
        0.9,
        (Cell("int8-token", MAIN, 65536, 1, 2),),
        (PROBE,),
        "bandwidth",
    ),
    Goal("int4 and 2-bit: share of the machine's limit", 0.7, 0.85, _LIMITED, (PROBE,), "limit"),
)

AVX2 = "x86-64-v3"
"""The processor that the wheels of the two builds of ggml are made for."""

SHOWN = (
    Goal(
        f"int4 decode, our kernels for {AVX2}, vs ik_llama.cpp q4_0",
        None,
        None,
        _cells(f"int4-token@{AVX2}", _SHORT, _BOTH),
        ("ik_q4_0",),
    ),
    Goal(
        f"int8 decode, our kernels for {AVX2}, vs ik_llama.cpp q8_0",
        None,
        None,
        _cells(f"int8-token@{AVX2}", _SHORT, _BOTH),
        ("ik_q8_0",),
    ),
    Goal(
        f"prefill: {QUERIES} queries at the end of a 4-bit cache, causal, vs torch SDPA fp32",
        None,
        None,
        _cells("int4-token", _SHORT, (1,)),
        (PREFILL,),
    ),
)

_SAMPLE = tuple(
    (Cell(recipe, shape, 4096, batch, 1), peer)
    for shape, batch in ((MAIN, 4), ("32x32x128", 1), ("9x3x64", 1), ("9x3x64", 4), ("4x1x256", 1))
    for recipe, peer in (
        ("int4-token", "ik_q4_0"),
        ("int4-token", "torch_f32"),
        ("int8-token", "ik_q8_0"),
    )
)
"""Of the other shapes and batches, what takes little time."""

_STORE = "append of one token, all layers of SmolLM2, vs torch copying it in bf16: "
MODEL_GOALS: dict[str, tuple[str, float, float]] = {
    "append-int4-token": (_STORE + "`int4-token`", 0.5, 1.0),
    "append-kivi-4bit": (_STORE + "`kivi-4bit`", 0.5, 1.0),
    "generate": ("SmolLM2 `generate` at 8k, `kivi-4bit`, vs DynamicCache fp32", 1.3, 2.0),
    "generate-quantized": ("the same vs QuantizedCache 4-bit", 5.0, 20.0),
    "generate-batch": ("`generate` of 4 rows at 8k, `kivi-4bit`, vs DynamicCache fp32", 1.3, 2.0),
    "generate-quantized-batch": ("the same 4 rows vs QuantizedCache 4-bit", 5.0, 20.0),
}


MODELS: dict[str, tuple[str, ...]] = {
    "append": ("append-int4-token", "append-kivi-4bit"),
    "generate": ("generate",),
    "generate-quantized": ("generate-quantized",),
    "generate-batch": ("generate-batch",),
    "generate-quantized-batch": ("generate-quantized-batch",),
}
"""What one process measures on the model: the rows it gives."""


def parse_cell(text: str) -> Cell:
    """Return the cell written as recipe,shape,context,batch,threads."""
    recipe, shape, *numbers = text.split(",")
    context, batch, threads = (int(x) for x in numbers)
    return Cell(recipe, shape, context, batch, threads)


def headline(recipes: list[str], cores: int) -> list[tuple[Cell, str]]:
    """Return the pairs of the first tables, one of each recipe with the memory itself, a sample."""
    goals = (*GOALS, *SHOWN)
    pairs = [(cell, peer) for goal in goals for cell in goal.cells for peer in goal.peers]
    pairs += [(Cell(recipe, MAIN, 65536, 1, 1), PROBE) for recipe in recipes]
    pairs += _SAMPLE
    return [pair for pair in dict.fromkeys(pairs) if pair[0].threads <= cores]


def whole_grid(recipes: list[str], cores: int) -> list[tuple[Cell, str]]:
    """Return every pair of the grid."""
    points = [
        (shape, context, batch, threads)
        for shape in SHAPES
        for context in CONTEXTS
        for batch in BATCHES
        for threads in sorted({1, min(2, cores)})
    ]
    return [
        (Cell(recipe, *point), peer)
        for point in points
        for recipe in recipes
        for peer in PAIRS.get(recipe, (OURS + "int4-token",))
    ]


def numbers_of(shape: str) -> tuple[int, int, int]:
    """Return query heads, kv heads and channels of "32x8x128"."""
    heads, kv_heads, width = (int(x) for x in shape.split("x"))
    return heads, kv_heads, width


def elements(cell: Cell) -> int:
    """Return the keys and values that a step reads."""
    _, kv_heads, width = numbers_of(cell.shape)
    return 2 * cell.batch * kv_heads * cell.context * width


def bytes_needed(cell: Cell) -> int:
    """Return the memory that a pair needs at its peak, measured and rounded up.

    Either the unquantized numbers, our cache and the reference in float64 of one row; or the
    unquantized numbers, our cache and a peer that keeps both a float32 and a bf16 copy.
    """
    whole = 4 * elements(cell)
    row = whole // cell.batch
    return (3 << 29) + max(whole * 13 // 10 + row * 5, whole * 3)


def memory_available(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the bytes that a process can take now."""
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise SystemExit("/proc/meminfo names no MemAvailable")


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Return the facts that a reader needs: processor, vector instructions, cores, caches."""
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    return {
        "processor": facts.get("model name", "unknown"),
        "family": f"{facts.get('cpu family', '?')}/{facts.get('model', '?')}",
        "flags": [flag for flag in (*FLAGS, *FLAGS_ARM) if flag in flags],
        "bf16_dots": bool(flags & BF16_DOTS),
        "cores": len(os.sched_getaffinity(0)),
        "l3_bytes": l3_bytes(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
    }


def l3_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of the last-level cache; 0 where the system does not tell."""
    sizes = {}
    for path in folder.glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
        sizes[int((path.parent / "level").read_text())] = int(text.rstrip("KM")) * unit
    return sizes[max(sizes)] if sizes else 0


def resident(size: int, cache: int) -> str:
    """Return where a cache of so many bytes lies while it is read over and over."""
    return "L3" if size <= cache else "DRAM"


def key(row: dict[str, Any]) -> tuple[str, str]:
    """Return what a row of the data is about: its cell and its peer."""
    cell = Cell(**{name: row[name] for name in asdict(Cell("", "", 0, 0, 0))})
    return str(cell), str(row["peer"])
