"""Layers with a sliding window: a ring in the model's dtype by default, and the plan says so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvant
from kvant.compiler import recipe as recipes
from kvant.compiler import tables
from kvant.compiler.bind import open_model
from kvant.compiler.capture import capture
from kvant.compiler.facts import facts_of, smaller_from
from kvant.compiler.shape import Shape, shape_model
from kvant.compiler.variants import rewrite
from kvant.ir.encodings import Raw, Tokens
from kvant.runtime.artifact import Artifact

WINDOW = 100
QUANTIZE = {
    "name": "mine",
    "window": "quantize",
    "k": {"format": "int", "bits": 4, "axis": "channel", "group": 32, "sink": 4},
    "v": {"format": "int", "bits": 8, "axis": "token", "group": "head", "recent": 9},
}


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_a_shape_says_its_dtype(dtype: Any) -> None:
    model = shape_model(Shape(8, 2, 64, window=16, dtype=dtype))
    recipe = recipes.parse(QUANTIZE | {"window": "keep", "rule": []}, "mine.toml")
    # A second structure, without a window, lets the recipe quantize something.
    plain = shape_model(Shape(8, 2, 64))
    both = (*model.layers, type(model.layers[0])(1, 1, "layers.1."))
    mixed = type(model)(
        "mixed", "shape", (*model.graphs, *plain.graphs), both, model.facts, model.fingerprint
    )
    ring, packed = rewrite(mixed, recipe)
    assert ring.plan.window == 16
    assert ring.plan.k.tokens == ring.plan.v.tokens == Tokens(Raw(dtype), raw=Raw(dtype))
    assert packed.plan.k.tokens.quantizes


def test_the_dtype_is_what_the_model_says(make_model: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = make_model("gemma2")
    assert open_model(module).dtype == "f32"
    assert open_model(module.to(torch.float16)).dtype == "f16"
    module.to(torch.bfloat16).save_pretrained(tmp_path)
    source = open_model(tmp_path)
    assert source.dtype == "bf16"
    model = capture(source)
    assert model.facts["dtype"] == "bf16"
    variants = rewrite(model, recipes.parse(QUANTIZE | {"window": "keep"}, "mine.toml"))
    rings = {v.plan.window: v.plan.v.tokens for v in variants}
    assert rings[6] == Tokens(Raw("bf16"), raw=Raw("bf16"))
    assert rings[None].quantizes
    config = (tmp_path / "config.json").read_text()
    assert '"bfloat16"' in config
    (tmp_path / "config.json").write_text(config.replace('"bfloat16"', "null"))
    assert open_model(tmp_path).dtype == "f32"


@pytest.fixture(scope="module")
def artifacts(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """One model of local and global layers: kept and quantized windows."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("windows")
    options = {"head_dim": 64, "max_position_embeddings": 1024, "sliding_window": WINDOW}
    module = make_model("gemma3", **options).to(torch.bfloat16)
    own = recipes.parse(QUANTIZE, "mine.toml")
    return {
        name: kvant.compile(module, recipe, ["reference"], out=folder / name)
        for name, recipe in (("kept", "kivi-2bit"), ("quantized", own))
    }


@pytest.mark.parametrize("name", ["kept", "quantized"])
def test_bytes_in_use_are_what_the_plan_says(name: str, artifacts: dict[str, Artifact]) -> None:
    artifact = artifacts[name]
    plan = artifact.plans[0]
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(1, s.heads, 600, s.channels)) for s in (plan.k, plan.v))
    k, v = k.astype(np.float32), v.astype(np.float32)
    for length in (0, 1, 63, 64, 65, 99, 100, 226, 227, 228, 229, 292, 293, 295, 400, 600):
        want = sum(plan.bytes(length) for plan in artifact.plans)
        for ends in ((length,), (length // 3, length // 2, length)):
            cache, begin = artifact.new_cache(max_tokens=600), 0
            for end in ends:
                for layer in range(artifact.layer_count):
                    cache.append(layer, k[:, :, begin:end], v[:, :, begin:end])
                begin = end
            cache.flush()
            assert cache.bytes() == want, length
    local = next(plan for plan in artifact.plans if plan.window == WINDOW)
    # Fewer than window + 2 pages of tokens in pages, and the raw ones, whatever the length.
    assert local.bytes(100_000) <= max(local.bytes(n) for n in range(300, 500))


def test_bytes_of_a_ring_by_hand(artifacts: dict[str, Artifact]) -> None:
    plan = next(plan for plan in artifacts["kept"].plans if plan.window == WINDOW)
    assert plan.k.tokens == plan.v.tokens == Tokens(Raw("bf16"), raw=Raw("bf16"))
    page = plan.k.heads * 64 * 64 * 2 + 8
    # Page 0 goes when position 64 is older than the window of the next token by a page:
    # length - 100 + 1 - 64 >= 64.
    pages = {64: 1, 65: 2, 226: 4, 227: 3, 290: 4, 291: 3, 100_000: 4}
    assert {n: plan.bytes(n) / page for n in pages} == {n: 2 * c for n, c in pages.items()}
    assert plan.k.bytes(227) == 4 * page
    assert plan.k.bits_per_element(227, WINDOW) == 8 * 3 * page / (227 * plan.k.heads * 64)


def test_show_says_what_is_kept(artifacts: dict[str, Artifact]) -> None:
    facts = facts_of(artifacts["kept"])
    assert facts["kept"] == {"layers": [0, 1, 2, 3, 4], "dtypes": ["bf16"], "windows": [WINDOW]}
    assert tables.artifact_rows(facts)["kept as they are"] == (
        "layers 0, 1, 2, 3, 4, in bf16, a ring of the newest 100 tokens"
    )
    assert facts["bits_per_element"] < 2.0  # at 4,096 tokens, five of six layers hold 100 to 228
    assert facts["smaller_from"] == smaller_from(artifacts["kept"].plans)
    assert facts_of(artifacts["quantized"])["kept"] == {}
