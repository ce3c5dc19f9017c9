"""Random attention graphs with their arrays, and the check that a rewrite changes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from kvant.ir.arrays import Array
from kvant.ir.encodings import Raw, Tokens
from kvant.ir.evaluate import evaluate
from kvant.ir.graph import Graph, Value
from kvant.ir.rewrite import Builder, dead_code, rewrite
from kvant.ir.stats import LayerStats
from kvant.ir.types import TensorType
from kvant.ir.verify import verify
from kvant.ir.weight_edits import EDITS, apply_weight_edits, is_weight, weight_edits
from kvant.passes import PASSES

PROMPT, NEW = 7, 4
FAR = 100_000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*/*.kir")


@dataclass(frozen=True, slots=True)
class Config:
    """What a random attention layer looks like."""

    heads: int = 2
    group: int = 2
    width: int = 16
    value_width: int = 8
    channels: int = 12
    bias: bool = True
    # "head": QK-norm per head, shared [D]; "flat": over all heads, [H*D]; "layer": LayerNorm [H, D]
    norm: str = "none"
    offset: float = 0.0
    rope: bool = True
    softcap: float | None = None
    window: int | None = None
    fused: bool = False  # q, k and v are slices of one weight
    projected: bool = True  # False: q, k, v are the inputs
    value_norm: bool = False  # a norm over each head of v
    out_projected: bool = True  # False: the heads of the output are returned merged
    style: str = "half"  # of RoPE
    passed: int = 0  # channels that RoPE leaves as they are
    sinks: bool = False  # a learned sink a query head

    @property
    def q_heads(self) -> int:
        return self.heads * self.group


@dataclass(frozen=True, slots=True)
class Case:
    """A graph with arrays for two calls: a prompt, then tokens that read it as history."""

    config: Config
    graph: Graph
    params: Mapping[str, Array]
    steps: tuple[dict[str, Array], ...]


def random_config(seed: int) -> Config:
    rng = np.random.default_rng(seed)
    norm = str(rng.choice(["none", "head", "flat", "layer"]))
    return Config(
        heads=int(rng.integers(1, 4)),
        group=int(rng.integers(1, 5)),
        width=int(rng.choice([4, 8, 16])),
        value_width=int(rng.choice([2, 8, 16])),
        channels=int(rng.integers(5, 14)),
        bias=bool(rng.integers(2)),
        norm=norm,
        offset=float(rng.choice([0.0, 1.0])) if norm == "head" else 0.0,
        rope=bool(rng.random() < 0.8),
        softcap=[None, 5.0][rng.integers(2)],
        window=[None, 6][rng.integers(2)],
        fused=bool(rng.random() < 0.3),
        style=str(rng.choice(["half", "adjacent"])),
        passed=int(rng.choice([0, 0, 2])),
        sinks=bool(rng.random() < 0.3),
    )


def build(c: Config) -> Graph:
    """Return the graph of a layer, as capture gives it."""
    b = Builder("attention")
    shapes = {"q": (c.q_heads, c.width), "k": (c.heads, c.width), "v": (c.heads, c.value_width)}
    if c.projected:
        x = b.input("x", TensorType("f32", ("B", "T", c.channels)))
        table = TensorType("f32", (1, "T", c.width - c.passed))
        tables = (b.input("cos", table), b.input("sin", table)) if c.rope else ()
        total, start, streams = sum(h * d for h, d in shapes.values()), 0, {}
        for role, (heads, width) in shapes.items():
            rows = heads * width
            if c.fused:
                w = b.param("qkv_proj.weight", TensorType("f32", (total, c.channels)))
                w = b.emit("slice_rows", w, start=start, stop=start + rows)
            else:
                w = b.param(f"{role}_proj.weight", TensorType("f32", (rows, c.channels)))
            start += rows
            streams[role] = _stream(b, c, role, x, w, heads, width, tables)
    else:
        streams = {
            role: b.input(role, TensorType("f32", ("B", heads, "T", width)))
            for role, (heads, width) in shapes.items()
        }
    return b.finish((_attend(b, c, streams),))


def _attend(b: Builder, c: Config, streams: dict[str, Value]) -> Value:
    read = {}
    for role in ("k", "v"):
        write = b.emit(
            "cache_write", streams[role], basis=(), role=role, store=Tokens(rest=Raw("f32"))
        )
        read[role] = b.emit("cache_read", write)
    sinks = [b.param("sinks", TensorType("f32", (c.q_heads,)))] if c.sinks else []
    out = b.emit(
        "attend",
        streams["q"],
        read["k"],
        read["v"],
        *sinks,
        causal=True,
        scale=c.width**-0.5,
        softcap=c.softcap,
        window=c.window,
    )
    if c.projected and not c.out_projected:
        out = b.emit("merge_heads", out)
    elif c.projected:
        w = TensorType("f32", (c.channels, c.q_heads * c.value_width))
        bias = (b.param("o_proj.bias", TensorType("f32", (c.channels,))),) if c.bias else ()
        out = b.emit("linear", b.emit("merge_heads", out), b.param("o_proj.weight", w), *bias)
    return out


def _stream(
    b: Builder,
    c: Config,
    role: str,
    x: Value,
    w: Value,
    heads: int,
    width: int,
    tables: tuple[Value, ...],
) -> Value:
    rows = heads * width
    bias = (b.param(f"{role}_proj.bias", TensorType("f32", (rows,))),) if c.bias else ()
    y = b.emit("linear", x, w, *bias)
    normed = c.norm if role != "v" else "head" if c.value_norm else "none"
    shapes = {"head": (width,), "layer": (heads, width)}
    gamma = TensorType("f32", shapes.get(normed, (rows,)))
    if normed == "flat":
        y = b.emit("rms_norm", y, b.param(f"{role}_norm.weight", gamma), eps=1e-6)
    y = b.emit("split_heads", y, heads=heads)
    y = b.emit("center", y) if normed == "layer" else y
    if normed in ("head", "layer"):
        y = b.emit(
            "rms_norm",
            y,
            b.param(f"{role}_norm.weight", gamma),
            eps=1e-6,
            offset=c.offset * (role != "v"),
        )
    return b.emit("rope", y, *tables, style=c.style) if tables and role != "v" else y


def draw(config: Config, seed: int, batch: int = 2) -> Case:
    """Return a case with random arrays; positions are far apart, up to 1e5."""
    rng = np.random.default_rng([seed, 1])
    graph = build(config)
    params = {}
    for name, declared in graph.params().items():
        shape = tuple(int(str(size)) for size in declared.shape)
        values = rng.normal(size=shape) / np.sqrt(config.channels)
        # Rows differ in size, as they do in a model: else sorting and smoothing have nothing to do.
        uneven = np.exp(rng.normal(size=shape[:1]))
        params[name] = values * uneven.reshape(-1, *[1] * (len(shape) - 1))
    positions = np.sort(rng.choice(FAR, PROMPT + NEW, replace=False))
    steps = []
    for part in (slice(0, PROMPT), slice(PROMPT, None)):
        made = {}
        for name, declared in graph.inputs().items():
            known = {"B": batch, "T": len(positions[part])}
            sizes = [known.get(str(d), d) for d in declared.shape]
            made[name] = rng.normal(size=[int(str(size)) for size in sizes])
        if "cos" in made:
            made["cos"], made["sin"] = rope_tables(positions[part], config)
        steps.append(made)
    return Case(config, graph, params, tuple(steps))


def rope_tables(positions: Array, c: Config) -> tuple[Array, Array]:
    """Return cos and sin by channel, [1, T, R]."""
    pairs = (c.width - c.passed) // 2
    angle = positions[:, None] * 10000.0 ** (-np.arange(pairs) / pairs)
    angle = np.tile(angle, 2) if c.style == "half" else np.repeat(angle, 2, axis=-1)
    return np.cos(angle)[None], np.sin(angle)[None]


def run(case: Case, graph: Graph, params: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Return the outputs of both calls, joined along T, and the state after them."""
    outputs, state = [], None
    for inputs in case.steps:
        given = {name: inputs[name] for name in graph.inputs()}
        (out,), state = evaluate(graph, given, {n: params[n] for n in graph.params()}, state)
        outputs.append(out)
    return np.concatenate(outputs, axis=-2), dict(state or {})


def stats_of(case: Case) -> LayerStats:
    """Return what calibration on the case's own tokens would record."""
    _, state = run(case, case.graph, case.params)
    absmax = {role: np.abs(x).max(axis=(0, 2)) for role, x in state.items()}
    moment = {role: (x**2).mean(axis=(0, 2)) for role, x in state.items()}
    largest = {role: _largest(x) for role, x in state.items()}
    q = queries_of(case, case.graph, case.params)
    return LayerStats(
        absmax["k"],
        moment["k"],
        np.abs(q).max(axis=(0, 2)),
        (q**2).mean(axis=(0, 2)),
        absmax["v"],
        moment["v"],
        tokens=len(state["k"]) * (PROMPT + NEW),
        k_largest=largest["k"],
        v_largest=largest["v"],
    )


def _largest(x: Array, rows: int = 64) -> Array:
    """Return the largest |x| of each channel of x [B, H, T, D], descending, [rows, H, D]."""
    by_token = np.abs(x).transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])
    return np.sort(by_token, axis=0)[::-1][:rows]


def queries_of(case: Case, graph: Graph, params: Mapping[str, Array]) -> Array:
    """Return the queries as they meet the keys, [B, Hq, T, D]."""
    (attend,) = graph.find("attend")
    only = dead_code(Graph(graph.name, graph.ops, attend.args[:1]))
    return run(case, only, params)[0]


def relative(a: Array, b: Array) -> float:
    """Return the largest difference, relative to the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def apply_passes(
    case: Case, names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Graph, dict[str, Array]]:
    """Run passes as the compiler does; return the graph, and parameters with constants."""
    graph, params, stats = case.graph, dict(case.params), stats_of(case)
    for name in names:
        given = (options or {}).get(name, {})
        after = PASSES[name].run(graph, **given)
        verify(after, after=name)
        make, check = PASSES[name].constants, PASSES[name].check_constants
        if make is not None and after is not graph:
            made = make(graph, params, stats, **given)
            if check is not None:
                check(after, made)
            params |= made
        graph = after
    return graph, params


def fold_weights(graph: Graph, params: Mapping[str, Array]) -> tuple[Graph, dict[str, Array]]:
    """Return the graph without weight edits, and the parameters with them: what attach does."""
    folded = dict(params)
    for edit in weight_edits(graph):
        folded[edit.parameter] = apply_weight_edits(edit.ops, folded[edit.parameter], params)

    def rule(b: Builder, op: Any, args: tuple[Value, ...]) -> Value | None:
        if op.name == "param":
            name = op.attr("name")
            return b.param(name, replace(op.result.type, shape=np.shape(folded[name])))
        if op.name in EDITS and is_weight(graph, op.result):
            return args[0]
        return None

    return dead_code(rewrite(graph, rule)), folded


class Kit:
    """The functions of this file, for tests: `kit.draw(...)`."""

    Config, Case = Config, Case
    random_config = staticmethod(random_config)
    build = staticmethod(build)
    draw = staticmethod(draw)
    run = staticmethod(run)
    stats_of = staticmethod(stats_of)
    queries_of = staticmethod(queries_of)
    relative = staticmethod(relative)
    apply_passes = staticmethod(apply_passes)
    fold_weights = staticmethod(fold_weights)


@pytest.fixture
def kit() -> type[Kit]:
    return Kit
