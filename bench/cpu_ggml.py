"""llama.cpp and ik_llama.cpp: their attention op over their own cache, through ctypes.

One graph with the op `ggml_flash_attn_ext`, planned once and computed again and again, as their
own programs do. Keys and values are quantized by the library itself. A row of the cache lies as
llama.cpp keeps it, [token, head, channel], or one head after another; what is faster counts.

llama.cpp rotates queries, keys and values around this op where the cache is quantized. That time is
not counted here: it would be time of the peer.
"""

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cpu_contest import Array, Contestant, Setting, threads_up_to

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
MASK_ROWS = 64  # both libraries want the mask's queries padded, to 16 or 64
SPARE = 4 << 20  # bytes of a context beside its tensors: headers, padding and the graph
FLAGS = ("avx2", "avx512", "avx512_vnni", "avx512_bf16")

Pointer = ctypes.c_void_p
Long = ctypes.c_int64
Shape4 = tuple[int, int, int, int]


class _Init(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", Pointer), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    """ggml_cplan; what follows its work buffer differs, so there is room for any of it."""

    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", Pointer),
        ("rest", ctypes.c_uint8 * 240),
    )


class _PoolParams(ctypes.Structure):
    """ggml_threadpool_params: given out by value and handed back by address, never read."""

    _fields_ = (("all", ctypes.c_uint8 * 4096),)


@dataclass(frozen=True, slots=True)
class Library:
    """A build of ggml.

    Attributes:
        module: where its shared object is: a module, and a file beside it or the module itself.
        file: name of that file, relative to the package; "" for the module's own.
        pool: it takes a thread pool of ours, which saves a little at every call.
        mask: its fast path wants a mask.
    """

    module: str
    file: str
    pool: bool
    mask: bool


LIBRARIES = {
    "llama": Library("xllamacpp.xllamacpp", "", pool=True, mask=False),
    "ik": Library("ik_llama_cpp", "lib/libggml.so", pool=False, mask=True),
}


def open_library(name: str) -> ctypes.CDLL:
    """Return the shared object of LIBRARIES, with the signatures that are used here."""
    facts = LIBRARIES[name]
    spec = importlib.util.find_spec(facts.module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{facts.module} is not installed: make bench-cpu installs it")
    path = Path(spec.origin)
    lib = ctypes.CDLL(str(path.parent / facts.file if facts.file else path))
    ints, pointers = ctypes.c_int, Pointer
    plan = (pointers, ints, pointers) if facts.pool else (pointers, ints)
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "ggml_init": (pointers, (_Init,)),
        "ggml_free": (None, (pointers,)),
        "ggml_new_tensor_4d": (pointers, (pointers, ints, Long, Long, Long, Long)),
        "ggml_view_4d": (pointers, (pointers,) * 2 + (Long,) * 4 + (ctypes.c_size_t,) * 4),
        "ggml_get_data": (pointers, (pointers,)),
        "ggml_row_size": (ctypes.c_size_t, (ints, Long)),
        "ggml_quantize_chunk": (
            ctypes.c_size_t,
            (ints, pointers, pointers, Long, Long, Long, pointers),
        ),
        "ggml_flash_attn_ext": (pointers, (pointers,) * 5 + (ctypes.c_float,) * 3),
        "ggml_new_graph": (pointers, (pointers,)),
        "ggml_build_forward_expand": (None, (pointers, pointers)),
        "ggml_graph_plan": (_Plan, plan),
        "ggml_graph_compute": (ints, (pointers, ctypes.POINTER(_Plan))),
    }
    if facts.pool:
        signatures["ggml_threadpool_params_default"] = (_PoolParams, (ints,))
        signatures["ggml_threadpool_new"] = (pointers, (ctypes.POINTER(_PoolParams),))
        signatures["ggml_threadpool_free"] = (None, (pointers,))
    for symbol, (result, arguments) in signatures.items():
        function = getattr(lib, symbol)
        function.restype, function.argtypes = result, arguments
    return lib


def built_for(name: str) -> str:
    """Return the vector instructions that a library was built with."""
    lib = open_library(name)
    return " ".join(flag for flag in FLAGS if getattr(lib, f"ggml_cpu_has_{flag}")())


def settings(threads: int, batch: int) -> Iterator[Setting]:
    """Yield every way to lay out and call that is tried."""
    for count in threads_up_to(threads):
        for layout in ("by token", "by head"):
            for rows in ("one op a row", "one op")[: 1 if batch == 1 else 2]:
                yield {"threads": count, "cache": layout, "rows": rows}


class _Context:
    """A context of ggml with tensors of our data."""

    def __init__(self, lib: ctypes.CDLL, facts: Library, size: int) -> None:
        self.lib, self.facts = lib, facts
        self.pointer = lib.ggml_init(_Init(size + SPARE, None, False))
        if not self.pointer:
            raise MemoryError(f"ggml found no {size:,} bytes")

    def tensor(self, kind: str, x: Array, ne: Shape4, order: Shape4 = (0, 1, 2, 3)) -> int:
        """Return a tensor that holds x, quantized and aligned to 64 bytes.

        Args:
            kind: of TYPES.
            x: C-contiguous.
            ne: shape as the op reads it, fastest axis first.
            order: axes of ne as they lie in memory, fastest first; 0 comes first.
        """
        lib, width, rows = self.lib, ne[0], x.size // ne[0]
        row = int(lib.ggml_row_size(TYPES[kind], width))
        base = lib.ggml_new_tensor_4d(self.pointer, TYPES[kind], width, rows + 64, 1, 1)
        at = lib.ggml_get_data(base)
        offset = -at % 64
        if kind == "f32":
            ctypes.memmove(at + offset, x.ctypes.data, x.nbytes)
        else:
            target = at + offset
            lib.ggml_quantize_chunk(TYPES[kind], x.ctypes.data, target, 0, rows, width, None)
        strides, size = {}, row
        for axis in order[1:]:
            strides[axis] = size
            size *= ne[axis]
        steps = (strides[1], strides[2], strides[3])
        return int(lib.ggml_view_4d(self.pointer, base, *ne, *steps, offset))

    def cache(self, kind: str, x: Array, layout: str) -> int:
        """Return keys or values [B, H, N, D] as the op reads them: ne = D, N, H, B."""
        batch, heads, tokens, width = x.shape
        ne = (width, tokens, heads, batch)
        if layout == "by head":
            return self.tensor(kind, np.ascontiguousarray(x), ne)
        return self.tensor(kind, np.ascontiguousarray(x.transpose(0, 2, 1, 3)), ne, (0, 2, 1, 3))

    def mask(self, tokens: int) -> int:
        """Return a mask that hides nothing."""
        hidden = np.zeros((MASK_ROWS, tokens), np.float32)
        return self.tensor("f16", hidden, (tokens, MASK_ROWS, 1, 1))


@contextmanager
def _pool(lib: ctypes.CDLL, wanted: bool, threads: int) -> Iterator[int | None]:
    """Give a thread pool of ggml's while the block runs, where it takes one."""
    if not wanted:
        yield None
        return
    params = lib.ggml_threadpool_params_default(threads)
    pool = lib.ggml_threadpool_new(ctypes.byref(params))
    try:
        yield pool
    finally:
        lib.ggml_threadpool_free(pool)


def _graph(
    context: _Context, kind: str, qkv: tuple[Array, Array, Array], scale: float, setting: Setting
) -> tuple[int, list[tuple[int, int]]]:
    """Return a graph of the op, and its results, each with the rows of the batch that it holds."""
    (q, k, v), lib = qkv, context.lib
    batch, heads, _, width = q.shape
    mask = context.mask(k.shape[2]) if context.facts.mask else None
    single = setting["rows"] == "one op"
    parts = [slice(None)] if single else [slice(i, i + 1) for i in range(batch)]
    graph, outputs = int(lib.ggml_new_graph(context.pointer)), []
    for part in parts:
        rows = q[part].shape[0]
        query = context.tensor("f32", np.ascontiguousarray(q[part]), (width, 1, heads, rows))
        keys, values = (context.cache(kind, x[part], str(setting["cache"])) for x in (k, v))
        node = lib.ggml_flash_attn_ext(context.pointer, query, keys, values, mask, scale, 0.0, 0.0)
        lib.ggml_build_forward_expand(graph, node)
        outputs.append((int(node), rows))
    return graph, outputs


def open_peer(
    name: str, kind: str, qkv: tuple[Array, Array, Array], scale: float, setting: Setting
) -> Contestant:
    """Return one step of attention by a library over a cache of type `kind`.

    Args:
        name: of LIBRARIES.
        kind: of TYPES.
        qkv: [B, Hq, 1, D], [B, H, N, D], [B, H, N, D].
        scale: of the logits.
        setting: of `settings`.
    """
    q, k, _ = qkv
    lib, facts = open_library(name), LIBRARIES[name]
    heads, width = q.shape[1], q.shape[3]
    stored = 2 * (k.size // width) * int(lib.ggml_row_size(TYPES[kind], width))
    context = _Context(lib, facts, stored + 2 * q.nbytes + 2 * (MASK_ROWS + 64) * k.shape[2])
    graph, outputs = _graph(context, kind, qkv, scale, setting)
    threads = int(setting["threads"])
    pool = _pool(lib, facts.pool, threads)
    handle = pool.__enter__()
    plan = lib.ggml_graph_plan(graph, threads, *((handle,) if facts.pool else ()))
    work = np.zeros(plan.work_size + 64, np.uint8)
    plan.work_data = work.ctypes.data + (-work.ctypes.data) % 64

    def run() -> None:
        if lib.ggml_graph_compute(graph, ctypes.byref(plan)):
            raise RuntimeError(f"{name} could not compute")

    def output() -> Array:
        found = []
        for node, rows in outputs:
            size = rows * heads * width
            data = (ctypes.c_float * size).from_address(lib.ggml_get_data(node))
            found.append(np.frombuffer(data, np.float32, size).reshape(rows, heads, width))
        return np.concatenate(found)

    def close() -> None:
        work.resize(0, refcheck=False)
        pool.__exit__(None, None, None)
        lib.ggml_free(context.pointer)

    return Contestant(f"{name}_{kind}", setting, run, output, stored, close)
