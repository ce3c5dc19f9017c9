"""Who is compared: kvant's recipes, torch, ONNX Runtime, llama.cpp, ik_llama.cpp, and the memory.

Each peer has settings: ways to lay out its cache and to call it, threads among them. All are tried
for a moment, and the fastest takes part. Its error against float64 over the unquantized numbers
must be below what its bits explain: a peer with a larger error is bound wrongly and gets no time.
"""

import ctypes
import functools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_ggml
import cpu_ort
import numpy as np
from cpu_contest import Array, Contestant, Setting, aligned, error, threads_up_to
from numpy.typing import NDArray

import kvant
from kvant.compiler.benchmark import torch_peers
from kvant.compiler.debug import NUM_THREADS

QKV = tuple[Array, Array, Array]
CHUNK = 4096  # tokens of one append while a cache is filled
PROBE_BYTES = 512 << 20
ERRORS = {32: 1e-4, 16: 2e-2, 8: 5e-2, 4: 0.5}
"""The largest error of a peer whose cache has so many bits, on normal random numbers."""


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine with one type of cache.

    Attributes:
        bits: of a stored number; 0 for what computes no attention.
        package: that must be installed, as pip calls it.
        settings: (threads, batch) -> what is tried.
        open: (q, k, v and their scale, setting) -> the contestant.
    """

    bits: int
    package: str
    settings: Callable[[int, int], Iterator[Setting]]
    open: Callable[[QKV, float, Setting], Contestant]


class WrongPeer(Exception):
    """A peer computes something else: our binding is wrong."""


def tensors(shape: kvant.Shape, context: int, batch: int, queries: int = 1) -> QKV:
    """Return normal random q, k and v: [B, Hq, Tq, D], [B, H, N, D], [B, H, N, D]."""
    rng = np.random.default_rng(0)
    size = (batch, shape.kv_heads, context, shape.head_dim)
    k, v, q = aligned(size), aligned(size), aligned((batch, shape.heads, queries, shape.head_dim))
    for x in (q, k, v):
        rng.standard_normal(out=x, dtype=np.float32)
    return q, k, v


def open_ours(folder: Path, qkv: QKV, threads: int) -> tuple[Contestant, Any, Any]:
    """Return a step of ours, its cache and its artifact.

    The cache is filled as a decoder leaves it: the last append is one token, and what was due
    before is encoded.
    """
    from kvant.runtime.artifact import load

    os.environ[NUM_THREADS.name] = str(threads)
    q, k, v = qkv
    artifact = load(folder, target="cpu")
    tokens = k.shape[2]
    cache = artifact.new_cache(batch=q.shape[0], max_tokens=tokens)
    for begin in range(0, tokens - 1, CHUNK):
        part = slice(begin, min(tokens - 1, begin + CHUNK))
        cache.append(0, k[:, :, part], v[:, :, part])
    cache.append(0, k[:, :, -1:], v[:, :, -1:])
    last: list[Array] = []

    def run() -> None:
        last[:] = [cache.attend(0, q)]

    def output() -> Array:
        return last[0][:, :, 0]

    name = f"kvant_{artifact.recipe}"
    setting: Setting = {"threads": threads, "target": artifact.target}
    step = Contestant(name, setting, run, output, cache.bytes(), lambda: None)
    return step, cache, artifact


def share_of_tolerance(artifact: Any, qkv: QKV, cache: Any) -> float:
    """Return the error of our kernels over the stored bits as a share of what is allowed.

    Rows are checked one by one, each in a cache of its own, and the rows of `cache` must equal them
    to the last bit: rows never meet in a kernel.
    """
    from kvant.runtime.launch_reference import Kernels
    from kvant.runtime.verify import computed_share

    reference, plan, shares = Kernels(artifact.plans, artifact.constants), artifact.plan_of(0), []
    out = cache.attend(0, qkv[0])
    for row in range(len(out)):
        q, k, v = (x[row : row + 1] for x in qkv)
        single = cache
        if len(out) > 1:
            threads = int(os.environ[NUM_THREADS.name])
            single = open_ours(artifact.path, (q, k, v), threads)[1]
        if not np.array_equal(single.attend(0, q), out[row : row + 1]):
            return float("inf")
        shares.append(computed_share(single, reference, 0, plan, q))
    return max(shares)


def tolerance(share: float) -> str | None:
    """Return why a kernel gets no time, or none; `share` is its error over what is allowed."""
    if share <= 1.0:
        return None
    return f"out of tolerance: the kernel's error is {share:.3g} times what is allowed"


def _torch_settings(dtype: str, threads: int, batch: int) -> Iterator[Setting]:
    for count in threads_up_to(threads):
        for call in ("enable_gqa", "folded"):
            yield {"threads": count, "call": call, "dtype": dtype}


def _open_torch(qkv: QKV, scale: float, setting: Setting) -> Contestant:
    q, k, v = qkv
    shape = kvant.Shape(q.shape[1], k.shape[1], k.shape[3], scale=scale)
    runs, _ = torch_peers(q, k, v, shape, int(setting["threads"]))
    wanted = f"{setting['dtype']} {setting['call']}"
    (step,) = (run for name, run in runs.items() if name.endswith(wanted))
    width = {"float32": 4, "bfloat16": 2}[str(setting["dtype"])]

    def output() -> Array:
        found = step().float().numpy().reshape(q.shape[0], q.shape[1], -1)
        return np.array(found, np.float32)

    name = f"torch_{setting['dtype']}"
    return Contestant(name, setting, step, output, 2 * k.size * width, lambda: None)


def _probe_settings(threads: int, batch: int) -> Iterator[Setting]:
    for how in ("glibc memchr", "numpy max of int64", "torch sum of float32"):
        yield {"threads": threads, "read by": how}


def _open_probe(qkv: QKV, scale: float, setting: Setting) -> Contestant:
    """Return a reader of a buffer far larger than the last-level cache, each thread its part."""
    import torch

    threads = int(setting["threads"])
    torch.set_num_threads(1)
    whole = aligned((PROBE_BYTES // 8,), np.int64)
    whole[:] = 0x3F8000003F800000  # two floats 1.0, and no byte that memchr looks for
    parts = np.array_split(whole, threads)
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = (
        (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t),
        ctypes.c_void_p,
    )
    readers: dict[str, Callable[[NDArray[np.int64]], Any]] = {
        "glibc memchr": lambda x: memchr(x.ctypes.data, 0x55, x.nbytes),
        "numpy max of int64": lambda x: x.max(),
        "torch sum of float32": lambda x: torch.from_numpy(x.view(np.float32)).sum(),
    }
    read = readers[str(setting["read by"])]
    pool = ThreadPoolExecutor(threads)

    def run() -> None:
        if threads == 1:
            read(whole)
        else:
            list(pool.map(read, parts))

    def nothing() -> Array:
        raise TypeError("the probe computes nothing")

    close = functools.partial(pool.shutdown, wait=True)
    return Contestant("read_bandwidth", setting, run, nothing, PROBE_BYTES, close)


def _ggml(library: str, kind: str, bits: int, package: str) -> Peer:
    return Peer(
        bits, package, cpu_ggml.settings, functools.partial(cpu_ggml.open_peer, library, kind)
    )


def _ort(kind: str, bits: int) -> Peer:
    def settings(threads: int, batch: int) -> Iterator[Setting]:
        return cpu_ort.settings(kind, threads)

    return Peer(bits, "onnxruntime", settings, functools.partial(cpu_ort.open_peer, kind))


def _torch(dtype: str, bits: int) -> Peer:
    return Peer(bits, "torch", functools.partial(_torch_settings, dtype), _open_torch)


PEERS: dict[str, Peer] = {
    "ik_q4_0": _ggml("ik", "q4_0", 4, "ik-llama-cpp-python"),
    "ik_q8_0": _ggml("ik", "q8_0", 8, "ik-llama-cpp-python"),
    "ik_f16": _ggml("ik", "f16", 16, "ik-llama-cpp-python"),
    "llama_q4_0": _ggml("llama", "q4_0", 4, "xllamacpp"),
    "llama_q8_0": _ggml("llama", "q8_0", 8, "xllamacpp"),
    "llama_f16": _ggml("llama", "f16", 16, "xllamacpp"),
    "ort_int4": _ort("int4", 4),
    "ort_int8": _ort("int8", 8),
    "ort_f32": _ort("f32", 32),
    "torch_f32": _torch("float32", 32),
    "torch_bf16": _torch("bfloat16", 16),
    "read_bandwidth": Peer(0, "numpy", _probe_settings, _open_probe),
}


def fastest(peer: Peer, qkv: QKV, scale: float, threads: int) -> Contestant:
    """Return the peer under its fastest setting: the least of a few calls of each."""
    best: tuple[float, Setting] | None = None
    for setting in peer.settings(threads, qkv[0].shape[0]):
        contestant = peer.open(qkv, scale, setting)
        took = least(contestant.run)
        contestant.close()
        if best is None or took < best[0]:
            best = took, setting
    if best is None:
        raise ValueError("a peer without settings")
    return peer.open(qkv, scale, best[1])


def least(run: Callable[[], Any], seconds: float = 0.15) -> float:
    """Return the seconds of the fastest of 3 to 50 calls after two that do not count."""
    run()
    run()
    begin = time.perf_counter()
    found: list[float] = []
    while len(found) < 3 or (len(found) < 50 and time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def check_peer(name: str, contestant: Contestant, right: NDArray[np.float64]) -> float | None:
    """Return the error of a peer; none where there is nothing to compare.

    Args:
        name: of PEERS.
        contestant: it.
        right: attention over the unquantized numbers.

    Raises: WrongPeer where its bits do not explain the error.
    """
    if PEERS[name].bits == 0:
        return None
    contestant.run()
    found = error(contestant.output(), right)
    if not found <= ERRORS[PEERS[name].bits]:
        raise WrongPeer(f"the peer's output is wrong by {found:.3g}: our binding, not a result")
    return found
