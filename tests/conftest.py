"""What several test files share: a generator of random attention layers."""

import os

# Triton reads it when it is imported. The compiler of kvant starts a process without it.
os.environ["TRITON_INTERPRET"] = "1"
# Products are small here: a second thread for each, NumPy's or torch's, costs more than it computes
# and takes the processor from the other worker. Read at the import, by child processes too.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvant.ir.arrays import Array
from kvant.ir.encodings.raw import Raw
from kvant.ir.encodings.tokens import Tokens
from kvant.ir.graph import Graph, Value
from kvant.ir.rewrite import Builder
from kvant.ir.types import TensorType

# By seconds, most first. What the first compiles, files further on share.
SLOWEST = (
    "test_cpu_random.py",
    "test_gpu_random.py",
    "test_smollm2.py",
    "test_cpu_counts.py",
    "test_capture.py",
    "test_huggingface_families.py",
    "test_gpu_whole.py",
    "test_gpu_counts.py",
    "test_cli.py",
    "test_driver.py",
    "test_cpu_variants.py",
    "test_gpu_random_pairs.py",
)
AttentionCase = tuple[Graph, dict[str, Array], dict[str, Array], dict[str, Any]]


def _draw_dims(rng: np.random.Generator, fixed: dict[str, Any]) -> dict[str, Any]:
    """Return sizes and variations; what is in `fixed` is not drawn."""
    dims: dict[str, Any] = {
        "batch": int(rng.integers(1, 3)),
        "tokens": int(rng.integers(1, 7)),
        "kv_heads": int(rng.integers(1, 4)),
        "group": int(rng.integers(1, 5)),
        "head_dim": int(rng.choice([4, 8, 16])),
        "v_head_dim": int(rng.choice([4, 8, 16])),
        "hidden": int(rng.choice([8, 24])),
        "bias": bool(rng.integers(2)),
        "out_bias": bool(rng.integers(2)),
        "qk_norm": bool(rng.integers(2)),
        "norm_offset": float(rng.choice([0.0, 1.0])),
        "rope": bool(rng.random() < 0.85),
        "position": int(rng.choice([0, 17, 5_000, 1_000_003])),
        "softcap": float(rng.uniform(2, 30)) if rng.random() < 0.3 else None,
        "window": int(rng.integers(1, 6)) if rng.random() < 0.3 else None,
        "rope_style": str(rng.choice(["half", "adjacent"])),
        "passed": int(rng.choice([0, 0, 2])),
        "sinks": bool(rng.random() < 0.3),
    }
    unknown = fixed.keys() - dims.keys()
    if unknown:
        raise ValueError(f"no such variation: {sorted(unknown)}; there are {sorted(dims)}")
    dims.update(fixed)
    dims["heads"] = dims["kv_heads"] * dims["group"]
    return dims


def _projection(b: Builder, x: Value, name: str, heads: int, width: int, bias: bool) -> Value:
    out = heads * width
    wires = [b.param(f"{name}_proj.weight", TensorType("f32", (out, x.tensor.shape[-1])))]
    if bias:
        wires.append(b.param(f"{name}_proj.bias", TensorType("f32", (out,))))
    flat = b.emit("linear", x, *wires, hint=f"{name}_flat", loc=f"{name} = self.{name}_proj(x)")
    return b.emit("split_heads", flat, heads=heads, hint=name)


def _build_graph(dims: dict[str, Any]) -> Graph:
    b = Builder("attention")
    x = b.input("x", TensorType("f32", ("B", "T", dims["hidden"])))
    turn = TensorType("f32", ("B", "T", dims["head_dim"] - dims["passed"]))
    tables = (b.input("cos", turn), b.input("sin", turn)) if dims["rope"] else ()
    width, values = dims["head_dim"], dims["v_head_dim"]
    streams = {}
    for name, heads in (("q", dims["heads"]), ("k", dims["kv_heads"])):
        s = _projection(b, x, name, heads, width, dims["bias"])
        if dims["qk_norm"]:
            w = b.param(f"{name}_norm.weight", TensorType("f32", (width,)))
            s = b.emit("rms_norm", s, w, eps=1e-6, offset=dims["norm_offset"], hint=f"{name}_norm")
        if tables:
            s = b.emit("rope", s, *tables, style=dims["rope_style"], hint=f"{name}_rope")
        streams[name] = s
    streams["v"] = _projection(b, x, "v", dims["kv_heads"], values, dims["bias"])
    store = Tokens(rest=Raw("f32"))
    caches = [
        b.emit("cache_write", streams[role], role=role, store=store, hint=f"{role}_cache")
        for role in ("k", "v")
    ]
    read = [b.emit("cache_read", cache, hint=f"{cache.name}_read") for cache in caches]
    attrs = {"scale": width**-0.5, "softcap": dims["softcap"], "window": dims["window"]}
    sinks = [b.param("sinks", TensorType("f32", (dims["heads"],)))] if dims["sinks"] else []
    y = b.emit("merge_heads", b.emit("attend", streams["q"], *read, *sinks, **attrs))
    wires = [b.param("o_proj.weight", TensorType("f32", (dims["hidden"], dims["heads"] * values)))]
    if dims["out_bias"]:
        wires.append(b.param("o_proj.bias", TensorType("f32", (dims["hidden"],))))
    return b.finish((b.emit("linear", y, *wires, hint="y"),))


def _draw_arrays(
    rng: np.random.Generator, dims: dict[str, Any], graph: Graph
) -> tuple[dict[str, Array], dict[str, Array]]:
    params = {}
    for name, kind in graph.params().items():
        shape = [int(n) for n in kind.shape]
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 1.0
        params[name] = rng.normal(size=shape) * scale
    inputs = {"x": rng.normal(size=(dims["batch"], dims["tokens"], dims["hidden"]))}
    if dims["rope"]:
        pairs = (dims["head_dim"] - dims["passed"]) // 2
        position = dims["position"] + np.arange(dims["tokens"], dtype=np.float64)
        angle = position[:, None] * 10_000.0 ** (-np.arange(pairs) / pairs)
        by_half = dims["rope_style"] == "half"
        angle = np.tile(angle, 2) if by_half else np.repeat(angle, 2, axis=-1)
        angles = np.broadcast_to(angle, (dims["batch"], *angle.shape))
        inputs |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    return inputs, params


@pytest.fixture(scope="session")
def random_attention_graph() -> Callable[..., AttentionCase]:
    """Return make(rng, **fixed) -> (graph, inputs, params, dims): one attention layer.

    Varied, and held by giving it by name: batch tokens kv_heads group head_dim v_head_dim hidden
    bias out_bias qk_norm norm_offset rope position softcap window rope_style passed (channels that
    RoPE leaves as they are) sinks; dims also has heads. Parameters
    are named as in transformers: q_proj.weight, q_norm.weight, o_proj.bias ... Inputs are x, cos
    and sin for `tokens` positions from `position` on; slice them along axis 1 to run in steps.
    """

    def make(rng: np.random.Generator, **fixed: Any) -> AttentionCase:
        dims = _draw_dims(rng, fixed)
        graph = _build_graph(dims)
        inputs, params = _draw_arrays(rng, dims, graph)
        return graph, inputs, params, dims

    return make


@pytest.fixture
def lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that keeps float64 as it is, so that only the rewrite itself can be seen."""
    for name in ("as_raw", "simulate"):
        monkeypatch.setattr(Tokens, name, lambda self, x: np.array(x, np.float64))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many cases the promises were tried on: `record_property("cases of <what>", n)`."""
    totals: dict[str, int] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties if report.when == "call" else ():
            if name.startswith("cases of "):
                totals[name] = totals.get(name, 0) + value
    if totals:
        terminalreporter.section("random cases")
    for name, total in totals.items():
        terminalreporter.line(f"{total:>7,} {name.removeprefix('cases of ')}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left alone with one."""
    last = len(SLOWEST)
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, last))


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Name the folder in which the workers of this session share kernels (`cpu_cases.COMPILED`)."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder of its own in the session's
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVANT_TEST_COMPILED", str(folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_vocabularies() -> Iterator[None]:
    """Let transformers read a GGUF file as `compiler/weights.py` does: through a plain array."""
    from gguf import GGUFReader

    slow = GGUFReader._get

    def get(self: Any, *args: Any, **options: Any) -> Any:
        self.data = self.data.view(np.ndarray)
        return slow(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFReader, "_get", get)
        yield


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Let torch compute in one thread: tiny models gain nothing by more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
