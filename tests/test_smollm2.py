"""What must hold on a real model: SmolLM2-135M from its weights to quantized text.

The quick ones run in `make test`; the ones marked long score more tokens.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvant
from kvant.compiler.bind import ModelSource, open_model
from kvant.compiler.extras import find_packaged_smollm2
from kvant.compiler.quality import Quality, evaluate
from kvant.compiler.texts import demo_text
from kvant.runtime import load
from kvant.runtime.launch_reference import read_stream
from kvant.runtime.model_edits import edit_weights, restore_weights

from .runtime.cache_oracle import Oracle
from .runtime.cache_runner import Seen, check_attend, check_stored

pytestmark = pytest.mark.model

FOLDS = """
name = "folds"
[[rewrite]]
pass = "hadamard-v"
[[rewrite]]
pass = "smooth-k"
[k]
format = "int"
bits = 8
axis = "token"
group = "head"
[v]
format = "int"
bits = 8
axis = "token"
group = "head"
"""


OTHER_RECIPES = (
    "dense-sparse-4bit",
    "int4-token",
    "int8-token",
    "kivi-2bit",
    "ksort-bfp",
    "nf4",
    "quarot-kv2",
    "quarot-kv4",
    "qserve-kv4",
    "split-2bit",
    "turboquant-4bit",
)


@pytest.fixture(scope="session")
def source() -> ModelSource:
    return open_model(find_packaged_smollm2())


@pytest.fixture(scope="session")
def compiled(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compile a recipe for the CPU, once a session."""
    made: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("smollm2")

    def get(recipe: str) -> Any:
        if recipe not in made:
            out = folder / f"{Path(recipe).stem}.kvant"
            made[recipe] = kvant.compile(source, recipe, ["cpu"], out=out)
        return made[recipe]

    return get


@pytest.fixture(scope="session")
def quality(source: ModelSource, compiled: Any) -> Any:
    """Evaluate a recipe on 1,024 + 512 tokens, once a session."""
    made: dict[str, Quality] = {}

    def get(recipe: str) -> dict[str, Any]:
        if recipe not in made:
            made[recipe] = evaluate(compiled(recipe), source, demo_text(), tokens=512)
        return made[recipe].to_json()

    return get


def test_folds_alone_do_not_move_the_logits(
    source: ModelSource, compiled: Any, tmp_path: Path
) -> None:
    import torch

    recipe = tmp_path / "folds.toml"
    recipe.write_text(FOLDS)
    artifact = compiled(str(recipe))
    assert len(artifact.weight_edits) == 30 * 4  # q, k, v, o of every layer
    model = source.load("float32")
    ids = torch.tensor([source.tokenizer()(demo_text()[:2000])["input_ids"][:256]])
    with torch.inference_mode():
        plain = model(ids).logits.double()
        originals = edit_weights(model, artifact)
        moved = model(ids).logits.double()
        restore_weights(model, originals)
        back = model(ids).logits.double()
    relative = float((moved - plain).abs().max() / plain.abs().max())
    assert 0 < relative < 1e-5, relative
    assert torch.equal(back, plain)


def recorded(source: ModelSource, artifact: Any, tokens: int) -> list[tuple[np.ndarray, ...]]:
    """q, k and v [1, H, T, D] of each layer after RoPE, with the weights edited for `artifact`."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    seen: list[tuple[np.ndarray, ...]] = []

    def attend(module: Any, *qkv_and_mask: Any, **keywords: Any) -> Any:
        seen.append(tuple(x.numpy().copy() for x in qkv_and_mask[:3]))
        return sdpa_attention_forward(module, *qkv_and_mask, **keywords)

    AttentionInterface.register("test-record", attend)
    AttentionMaskInterface.register("test-record", sdpa_mask)
    model = source.load("float32")
    model.set_attn_implementation("test-record")
    with torch.inference_mode():
        edit_weights(model, artifact)
        model(torch.tensor([source.tokenizer()(demo_text()[:4000])["input_ids"][:tokens]]))
    return seen


@pytest.mark.parametrize(
    "recipe",
    ["kivi-4bit", *(pytest.param(name, marks=pytest.mark.long) for name in OTHER_RECIPES)],
)
def test_every_layer_on_its_own_keys_and_values(
    source: ModelSource, compiled: Any, recipe: str
) -> None:
    """Stored values are equal but for ties, outputs within P7, on what the model really writes."""
    artifact = compiled(recipe)
    layers = recorded(source, artifact, tokens=333)
    cache = artifact.new_cache(batch=1, max_tokens=512)
    oracles = []
    for index, (_, k, v) in enumerate(layers):
        cache.append(index, k, v)
        oracles.append(Oracle(artifact.plans[index], artifact.constants[index], 1, None))
        oracles[-1].append(k, v, None)
    cache.flush()
    trusted = 0
    for index, (oracle, (q, k, _)) in enumerate(zip(oracles, layers, strict=True)):
        oracle.flush()
        for stream, row in zip(cache.layers[index].streams, (oracle.k, oracle.v), strict=True):
            check_stored(stream, read_stream(stream)[0, :, : k.shape[2]], row[0], exact=False)
        seen = Seen()
        check_attend(cache, oracle, index, np.ascontiguousarray(q[:, :, -3:]), False, seen)
        trusted += seen.trusted
    assert trusted > 20, "too few layers would show a wrong scale"


def cpu_seconds() -> float:
    """Of this process and its children; on an idle machine no less than the time on the wall."""
    return sum(os.times()[:4])


def test_compile_is_quick_and_small(source: ModelSource, compiled: Any, tmp_path: Path) -> None:
    begin = cpu_seconds()
    artifact = kvant.compile(source, "kivi-4bit", ["cpu"], out=tmp_path / "a.kvant")
    assert cpu_seconds() - begin < 60
    size = sum(f.stat().st_size for f in artifact.path.rglob("*") if f.is_file())
    assert size < 5e6
    assert compiled("kivi-4bit").id == artifact.id  # made apart, from the same


def test_kivi_4bit(quality: Any) -> None:
    q = quality("kivi-4bit")
    assert abs(q["perplexity"] / q["perplexity_full"] - 1) < 0.02, q
    assert q["packed_share"] > 0.85
    assert q["kl_mean_low"] <= q["kl_mean"] <= q["kl_mean_high"]


@pytest.mark.long
def test_int8_token(quality: Any) -> None:
    assert quality("int8-token")["kl_mean"] < 0.003


@pytest.mark.long
def test_kivi_2bit_is_clearly_better_than_2_bits_per_token(
    source: ModelSource, quality: Any, tmp_path: Path
) -> None:
    two = tmp_path / "two.toml"
    stream = 'format = "int"\nbits = 2\naxis = "token"\ngroup = 32\nrecent = 128\n'
    two.write_text(f'name = "two"\n[k]\n{stream}\n[v]\n{stream}')
    kivi, plain = quality("kivi-2bit"), quality(str(two))
    assert kivi["bits_per_element"] <= plain["bits_per_element"] * 1.001
    assert kivi["kl_mean"] < 0.6 * plain["kl_mean"], (kivi, plain)
    assert kivi["kl_mean_high"] < plain["kl_mean_low"], (kivi, plain)


@pytest.mark.long
def test_split_2bit_is_better_than_kivi_2bit_at_no_more_bits(
    source: ModelSource, compiled: Any, quality: Any
) -> None:
    """On two texts, and at every length from 1,024 tokens on: outliers want bits, the rest few."""
    pairs = [(quality("split-2bit"), quality("kivi-2bit"))]
    other = demo_text()[80_000:]
    pairs.append(
        tuple(  # type: ignore[arg-type]
            evaluate(compiled(name), source, other, tokens=512).to_json()
            for name in ("split-2bit", "kivi-2bit")
        )
    )
    for split, kivi in pairs:
        assert split["bits_per_element"] <= kivi["bits_per_element"]
        assert split["kl_mean"] < 0.5 * kivi["kl_mean"], (split, kivi)
        assert split["kl_mean_high"] < kivi["kl_mean_low"], (split, kivi)
    ours, theirs = (compiled(name).plans[0] for name in ("split-2bit", "kivi-2bit"))
    for length in range(1024, 65_536, 61):
        assert ours.bytes(length) <= theirs.bytes(length), length


@pytest.mark.long
def test_dense_sparse_4bit_is_better_than_kivi_4bit_at_fewer_bits(
    source: ModelSource, compiled: Any, quality: Any
) -> None:
    ours, theirs = quality("dense-sparse-4bit"), quality("kivi-4bit")
    assert ours["bits_per_element"] < theirs["bits_per_element"]
    assert ours["kl_mean_high"] < theirs["kl_mean_low"], (ours, theirs)
    (plan, *_), (other, *_) = (compiled(n).plans for n in ("dense-sparse-4bit", "kivi-4bit"))
    for length in range(64, 65_536, 61):
        assert plan.bytes(length) <= other.bytes(length), length


@pytest.mark.long
@pytest.mark.parametrize(
    "recipe", ["ksort-bfp", "quarot-kv4", "qserve-kv4", "int4-token", "nf4", "turboquant-4bit"]
)
def test_every_other_recipe_is_usable(quality: Any, recipe: str) -> None:
    q = quality(recipe)
    assert q["kl_mean"] < 0.2, q
    assert q["bits_per_element"] < 8, q


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["kivi-4bit", "kivi-2bit", "int4-token"])
def test_kernels_cost_no_quality_beyond_the_encoding(
    source: ModelSource, compiled: Any, recipe: str
) -> None:
    """KL(full || packed kernels) is within 10 % of KL(full || reference) over 4,096 tokens."""
    artifact = compiled(recipe)
    reference = load(artifact.path, target="reference", id=artifact.id)
    text = demo_text()
    ours = evaluate(artifact, source, text, tokens=4096).to_json()
    theirs = evaluate(reference, source, text, tokens=4096).to_json()
    assert abs(ours["kl_mean"] / theirs["kl_mean"] - 1) < 0.10, (ours, theirs)
