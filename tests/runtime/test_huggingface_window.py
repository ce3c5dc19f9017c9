"""Models with sliding windows: the text is the plain model's while pages come back to the pool."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvant.ir.encodings import Raw, Tokens  # noqa: E402
from kvant.runtime.huggingface import attach  # noqa: E402

from .tiny_models import (  # noqa: E402
    LAYERS,
    artifact_of,
    generate,
    left_padded,
    logits,
    lookup_is_greedy,
    prompt,
    refusal,
    tiny,
)

WINDOW = 16
PAGE = 64
BF16 = Tokens(rest=Raw("bf16"), raw=Raw("bf16"))


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def sliding() -> Any:
    return tiny("mistral", sliding_window=WINDOW)


def rings(cache: Any) -> list[int]:
    """First position that each stream still holds, of the first row."""
    return [int(s.held[0]) for layer in cache.packed.layers for s in layer.streams]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_the_text_is_that_of_the_plain_model(options: Any) -> None:
    model, ids = sliding(), prompt(tokens=200)
    torch.manual_seed(3)
    expected = generate(model, ids, max_new_tokens=100, **options)
    model, cache = attach(model, artifact_of(model))
    torch.manual_seed(3)
    assert torch.equal(generate(model, ids, cache, max_new_tokens=100, **options), expected)
    assert rings(cache) == [192] * 2 * LAYERS  # 299 - 16 + 1 - 64, in whole pages
    assert sum(pool.used for pool in cache.packed.pools.values()) <= 3 * 2 * LAYERS * 3


def test_a_prompt_leaves_its_last_window_alone() -> None:
    model = sliding()
    model, cache = attach(model, artifact_of(model))
    logits(model, prompt(tokens=400), cache)
    assert rings(cache) == [320] * 2 * LAYERS
    assert sum(pool.high for pool in cache.packed.pools.values()) == 2 * 2 * LAYERS
    assert cache.bytes() == LAYERS * cache.artifact.plans[0].bytes(400)


def test_prompt_lookup_rolls_back_over_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = sliding(), prompt(tokens=12).repeat(1, 15)
    cache = lookup_is_greedy(model, ids, monkeypatch)
    assert min(rings(cache)) > 0


def test_a_conversation_can_be_taken_back_by_a_page() -> None:
    model, ids = sliding(), prompt(tokens=300)
    expected = logits(model, ids)[:, -PAGE:]
    model, cache = attach(model, artifact_of(model))
    logits(model, ids, cache)
    cache.flush()
    cache.crop(-PAGE)
    found = logits(model, ids[:, -PAGE:], cache)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    cache.flush()
    error = refusal(cache.crop, -(PAGE + PAGE))
    assert error.code == "truncate-behind-window"
    assert cache.get_seq_length() == 300


def test_left_padded_rows_have_rings_of_their_own() -> None:
    model = sliding()
    model, cache = attach(model, artifact_of(model))
    ids, mask = left_padded(200, 33, 170, 1)
    found = generate(model, ids, cache, attention_mask=mask, max_new_tokens=60)
    for row, length in enumerate(mask.sum(1).tolist()):
        cache.reset()
        alone = generate(model, ids[row : row + 1, -length:], cache, max_new_tokens=60)
        assert torch.equal(found[row, -60:], alone[0, -60:])


def test_the_dtype_of_the_model_loses_nothing() -> None:
    """A ring in bfloat16 under a model in bfloat16: keys and values are stored as they come."""
    model, ids = sliding().to(torch.bfloat16), prompt(tokens=200)
    model, cache = attach(model, artifact_of(model, BF16, BF16))
    found = logits(model, ids, cache), logits(model, ids[:, :9], cache)
    model, exact = attach(model, artifact_of(model))
    assert cache.packed.layers[0].k.plan.tokens.rest == Raw("bf16")
    expected = logits(model, ids, exact), logits(model, ids[:, :9], exact)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert 2 * cache.bytes() < 1.1 * exact.bytes()
