"""A small artifact with stand-in native code, for the tests of its reader."""

import hashlib
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvant.compiler.artifact_writer import write_artifact
from kvant.compiler.capture import Layer
from kvant.compiler.variants import Variant
from kvant.ir.encodings import Int, Sparse, Tokens
from kvant.ir.errors import KvantError
from kvant.ir.graph import Graph
from kvant.ir.maps import Gather, Scale
from kvant.ir.plan import AttentionPlan, StreamPlan
from kvant.runtime import load
from kvant.runtime.machine import this_machine
from kvant.runtime.strict_json import canonical
from kvant.targets import Build

HEADS, CHANNELS, LAYERS = 2, 16, 3
ORDER, SMOOTH, SINKS = "kvant.k_order", "kvant.k_smooth", "sinks"
SO = "targets/cpu-test/p0/kernels.so"
# What refusals say to do.
COPY = "copy the artifact again from its source, or compile it again"
COPY_FILES = "copy the artifact again from its source, with `cp -rL`, or compile it again"


def plan(bits: int = 4, recent: int = 0, sinks: str | None = None) -> AttentionPlan:
    maps = (Gather(ORDER), Scale(SMOOTH))
    k = StreamPlan("k", HEADS, CHANNELS, maps, Tokens(Int(bits, "token", 16), recent=recent), 64)
    v = StreamPlan("v", HEADS, CHANNELS, (), Tokens(Int(bits, "token", 8), sink=2), 64)
    q_maps = (Gather(ORDER), Scale(SMOOTH, inverse=True))
    return AttentionPlan(4, 0.25, None, None, q_maps, k, v, (), sinks=sinks)


PLANS = (plan(), plan(bits=8, recent=3, sinks=SINKS))
INTEGER_PLANS = tuple(replace(one, compute="int") for one in PLANS)


def sparse_plans(limit: float) -> tuple[AttentionPlan, ...]:
    """The same plans with one entry a token beside every format."""

    def with_entries(stream: StreamPlan) -> StreamPlan:
        rest = Sparse(stream.tokens.rest, 1, limit)
        return replace(stream, tokens=replace(stream.tokens, rest=rest))

    return tuple(replace(one, k=with_entries(one.k), v=with_entries(one.v)) for one in PLANS)


def cpu_facts(**changes: Any) -> dict[str, Any]:
    """Facts of a target that runs here; keyword arguments replace or add some."""
    machine = this_machine()
    facts = {
        "kind": "cpu",
        "system": machine.system,
        "machine": machine.machine,
        "features": [],
        "glibc": "2.17",
        "packages": {"numpy": np.__version__},
        "kernels": {"append": "stores tokens", "attend": "reads the cache"},
    }
    return facts | changes


def native_files(seed: int) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    return {
        "kernels.so": b"\x7fELF" + rng.bytes(3000),
        "kernels.py": b"# readable source\n",
        "launch.json": canonical({"plan": seed}),
    }


def constants() -> dict[int, dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return {
        layer: {
            ORDER: np.stack([rng.permutation(CHANNELS) for _ in range(HEADS)]),
            SMOOTH: rng.uniform(0.5, 2.0, (HEADS, CHANNELS)),
            SINKS: rng.normal(size=4),
        }
        for layer in range(LAYERS)
    }


def weight_edits() -> list[dict[str, Any]]:
    rows = {"op": "hadamard_rows", "heads": 2, "constant": None, "repeat": 1, "inverse": False}
    scale = rows | {"op": "scale_rows", "constant": f"layers.0.{SMOOTH}"}
    return [
        {"parameter": "model.layers.0.self_attn.k_proj.weight", "ops": [scale]},
        {"parameter": "model.layers.0.self_attn.v_proj.weight", "ops": [rows]},
    ]


def builds(name: str = "cpu-test", **facts: Any) -> dict[str, Build]:
    """What a target made of both plans; keyword arguments change its facts."""
    return {f"p{i}": Build(name, cpu_facts(**facts), native_files(i)) for i in range(2)}


def write(out: Path, plans: tuple[AttentionPlan, ...] = PLANS, **changes: Any) -> str:
    """Write the small artifact; keyword arguments replace those of `write_artifact`."""
    layers = tuple(Layer(i, 0, f"model.layers.{i}.self_attn.") for i in range(LAYERS))
    variants = (
        Variant(Graph("attention", (), ()), plans[0], (), (layers[0], layers[2])),
        Variant(Graph("attention", (), ()), plans[1], (), (layers[1],)),
    )
    model = types.SimpleNamespace(
        name="tiny",
        architecture="LlamaForCausalLM",
        facts={"heads": 4, "theta": 1e4, "types": ("full",)},
        fingerprint="f" * 64,
    )
    arguments: dict[str, Any] = {
        "model": model,
        "recipe": "kivi-4bit",
        "recipe_toml": 'name = "kivi-4bit"\n',
        "variants": variants,
        "plans": plans,
        "constants": constants(),
        "weight_edits": weight_edits(),
        "weights": {"model.layers.0.self_attn.k_proj.weight": [0.5, -0.25]},
        "calibration": None,
        "targets": {"cpu": builds()},
    }
    return write_artifact(out, **(arguments | changes))


def seal_raw(folder: Path, raw: bytes) -> str:
    """Write a manifest and the ID that fits it: what someone who tampers would do."""
    identity = hashlib.sha256(raw).hexdigest()
    (folder / "manifest.json").write_bytes(raw)
    (folder / "ID").write_text(identity + "\n")
    return identity


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda facts: None) -> str:
    """Make sizes, digests and ID fit the files again, then change the manifest."""
    facts = json.loads((folder / "manifest.json").read_bytes())
    for name, entry in facts["files"].items():
        path = folder / name
        if path.is_file():
            data = path.read_bytes()
            entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    change(facts)
    return seal_raw(folder, canonical(facts))


@dataclass
class Made:
    """A written artifact; `loaded` names the files that the stand-in for native code was given."""

    folder: Path
    id: str
    loaded: list[str]


def make(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Made:
    """Write an artifact and put a stand-in for `launch_cpu` in place that really calls dlopen."""
    from kvant.runtime.launch_reference import Kernels as Reference

    loaded: list[str] = []

    class Kernels(Reference):
        def __init__(self, plans: Any, constants: Any, keys: Any, files: dict[str, bytes]) -> None:
            import ctypes

            ctypes.CDLL(None)
            loaded.extend(sorted(files))
            super().__init__(plans, constants)

    stand_in = types.ModuleType("kvant.runtime.launch_cpu")
    stand_in.Kernels = Kernels  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvant.runtime.launch_cpu", stand_in)
    return Made(folder, write(folder, **changes), loaded)


def refusal(made: Made, **options: Any) -> KvantError:
    """Load and return the refusal; native code must not have been touched."""
    with pytest.raises(KvantError) as caught:
        load(made.folder, **options)
    assert made.loaded == []
    assert caught.value.__cause__ is None
    return caught.value


def expect(made: Made, code: str, what: str, fix: str, where: str = "", **options: Any) -> None:
    place = str(made.folder) + (f"/{where}" if where else "")
    found = str(refusal(made, **options))
    assert found == f"{what}\n  where: {place}\n  fix: {fix}  [{code}]"
