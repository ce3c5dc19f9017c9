"""Recipes that sort, then store by blocks or slices: from TOML to what attention reads.

A model of 64 channels a head whose rows of W_k differ in size; the cache is fed with keys that do.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvant.compiler import recipe as recipes
from kvant.compiler.driver import compile
from kvant.ir.arrays import Array

D, TOKENS = 64, 256
SORT = {"rewrite": [{"pass": "sort-k", "key": "weight"}]}


@pytest.fixture(scope="module")
def model(make_model: Any) -> Any:
    """One layer; every seventh row of W_k is some 20 times as large as the others."""
    module = make_model("llama", head_dim=D, num_hidden_layers=1, max_position_embeddings=1024)
    weight = module.model.layers[0].self_attn.k_proj.weight
    weight.data[::7] *= 20.0
    return module


def error(model: Any, data: dict[str, Any], folder: Path, target: str = "reference") -> Array:
    """What the packed cache changes in the outputs of attention over channel-scaled keys."""
    recipe = recipes.parse(data | {"name": "mine"}, "mine.toml")
    artifact = compile(model, recipe, targets=(target,), out=folder)
    plan, rng = artifact.plans[0], np.random.default_rng(3)
    rows = np.linalg.norm(model.model.layers[0].self_attn.k_proj.weight.detach().numpy(), axis=1)
    size = rows.reshape(plan.k.heads, 1, D) / rows.mean()
    k, v = (rng.normal(size=(1, plan.k.heads, TOKENS, D)).astype(np.float32) for _ in range(2))
    # Queries are small where keys are large, so that every channel has its say in the scores.
    q = 0.3 * rng.normal(size=(1, plan.q_heads, 4, D)) / np.repeat(size, plan.group, axis=0)
    cache = artifact.new_cache(max_tokens=512)
    cache.append(0, (k * size).astype(np.float32), v)
    exact = cache.attend(0, q.astype(np.float32))
    cache.flush()
    return np.asarray(cache.attend(0, q.astype(np.float32)) - exact, np.float64)


def bfp(block: int, **more: Any) -> dict[str, Any]:
    return {"k": {"format": "bfp", "mantissa": 4, "block": block}, "v": {"format": "f32"}} | more


@pytest.mark.parametrize("block", [16, 32, 64])
def test_ksort_at_blocks_of_16_32_and_64(model: Any, block: int, tmp_path: Path) -> None:
    """Blocks of alike channels lose less; where a block is the whole head, it changes nothing."""
    recipe, _ = recipes.load("ksort-bfp")
    assert [r.name for r in recipe.rewrite] == ["sort-k"]
    plain = error(model, bfp(block), tmp_path / "plain")
    sorted_ = error(model, bfp(block, **SORT), tmp_path / "sorted")
    if block == D:
        assert np.abs(sorted_ - plain).max() < 1e-6
        assert np.abs(plain).max() > 1e-3, "nothing was rounded: the test proves nothing"
    else:
        assert (sorted_**2).mean() < 0.7 * (plain**2).mean()


@pytest.mark.parametrize("block", [16, 32, 64])
def test_the_shipped_recipe_works_at_every_block(model: Any, block: int, tmp_path: Path) -> None:
    text = recipes.load("ksort-bfp")[1]
    (shipped,) = re.findall(r"block = (\d+)\n\n\[v\]", text)
    data = tomllib.loads(text.replace(f"block = {shipped}\n\n[v]", f"block = {block}\n\n[v]"))
    assert data["k"]["block"] == block
    want = error(model, data, tmp_path / "reference")
    assert np.abs(want).max() > 1e-3
    if block != 32:  # the recipe's own block is among the cases of the CPU kernels
        got = error(model, data, tmp_path / "cpu", "cpu")
        assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()


def test_outliers_in_a_slice_of_their_own_cost_less_than_bits_for_all(
    model: Any, tmp_path: Path
) -> None:
    """2 bits, with 8 for the last 16 channels: sorted, that beats 3 bits for all and no sort."""

    def ints(bits: int, **more: Any) -> dict[str, Any]:
        return {"format": "int", "bits": bits, "axis": "token", "group": 16} | more

    split = [ints(2, channels="rest"), ints(8, channels=16)]
    k = {"format": "slices", "slice": split}
    v = {"v": {"format": "f32"}}
    errors = {
        "split and sorted": error(model, {"k": k, **v, **SORT}, tmp_path / "a"),
        "split": error(model, {"k": k, **v}, tmp_path / "b"),
        "3 bits": error(model, {"k": ints(3), **v}, tmp_path / "c"),
    }
    mean = {name: float((e**2).mean()) for name, e in errors.items()}
    assert mean["split and sorted"] < 0.5 * min(mean["split"], mean["3 bits"]), mean


def test_blocks_after_sorting_and_splitting(model: Any, tmp_path: Path) -> None:
    """Block floating point in slices: outliers with 8-bit mantissas, the least channels dropped."""

    def block(channels: int | str, mantissa: int) -> dict[str, Any]:
        return {"channels": channels, "format": "bfp", "mantissa": mantissa, "block": 16}

    slices = [{"channels": 16, "format": "drop"}, block("rest", 4), block(16, 8)]
    data = bfp(16) | {"k": {"format": "slices", "slice": slices}}
    split = error(model, data | SORT, tmp_path / "a")
    unsorted = error(model, data, tmp_path / "b")
    assert (split**2).mean() < 0.6 * (unsorted**2).mean()
    assert (split**2).mean() > 0
