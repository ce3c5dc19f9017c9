"""The adapter on tiny random models, with the real cache and the reference kernels."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    PreTrainedModel,
)

from kvant.ir.encodings import Bfp, Raw, Tokens
from kvant.ir.weight_edits import WeightEdit, WeightOp
from kvant.runtime.artifact import Artifact
from kvant.runtime.huggingface import attach, detach
from kvant.runtime.model_edits import rounded

from .tiny_models import (
    HEADS,
    INT8,
    KIVI_K,
    KV_HEADS,
    LAYERS,
    LOSSLESS,
    MODELS,
    artifact_of,
    generate,
    left_padded,
    logits,
    lookup_is_greedy,
    prompt,
    refusal,
    tiny,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_text_is_that_of_the_plain_model(kind: str) -> None:
    model, ids = tiny(kind), prompt()
    expected = generate(model, ids)
    model, cache = attach(model, artifact_of(model))
    assert torch.equal(generate(model, ids, cache), expected)
    assert len(expected[0, 70:].unique()) > 5, "the text is too dull to prove anything"
    assert cache.get_seq_length() == 93


def test_sampled_text_is_that_of_the_plain_model() -> None:
    model, ids = tiny(), prompt(3)
    torch.manual_seed(5)
    expected = generate(model, ids, do_sample=True)
    model, cache = attach(model, artifact_of(model))
    torch.manual_seed(5)
    assert torch.equal(generate(model, ids, cache, do_sample=True), expected)


@pytest.mark.parametrize("k", [LOSSLESS, Tokens(rest=Raw("f32"), sink=3, recent=5)])
def test_beams_are_those_of_the_plain_model(k: Tokens) -> None:
    model, ids = tiny(), prompt(2)
    expected = generate(model, ids, num_beams=4, num_return_sequences=2)
    model, cache = attach(model, artifact_of(model, k))
    found = generate(model, ids, cache, num_beams=4, num_return_sequences=2)
    assert torch.equal(found, expected)


def test_prompt_lookup_is_greedy_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(), prompt(tokens=12).repeat(1, 6)
    cache = lookup_is_greedy(model, ids, monkeypatch)
    assert cache.get_seq_length() == 12 * 6 + 39


def test_a_rejected_draft_leaves_no_trace() -> None:
    model, ids, draft = tiny(), prompt(tokens=64), prompt(tokens=33, seed=9)
    model, cache = attach(model, artifact_of(model, KIVI_K, INT8))
    logits(model, ids, cache)
    expected = logits(model, draft[:, :1], cache)
    expected_bytes = cache.bytes()
    cache.reset()
    cache.activate_past_recording()
    logits(model, torch.cat([ids, draft], 1), cache)
    cache.crop(-33)
    assert cache.packed.layers[1].v.encoded[0] == 64, "what stays was not packed"
    assert torch.equal(logits(model, draft[:, :1], cache), expected)
    assert cache.bytes() == expected_bytes


@pytest.mark.parametrize(("k", "v"), [(LOSSLESS, LOSSLESS), (KIVI_K, INT8)])
def test_a_left_padded_batch_is_each_row_alone(k: Tokens, v: Tokens) -> None:
    model = tiny()
    model, cache = attach(model, artifact_of(model, k, v))
    ids, mask = left_padded(70, 33, 70, 1)
    found = generate(model, ids, cache, attention_mask=mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        cache.reset()
        alone = generate(model, ids[row : row + 1, 70 - length :], cache)
        assert torch.equal(found[row, 70 - length :], alone[0]), f"row {row}"


def test_left_padded_text_is_that_of_the_plain_model() -> None:
    model = tiny("qwen3")
    ids, mask = left_padded(40, 12, 25)
    expected = generate(model, ids, attention_mask=mask)
    model, cache = attach(model, artifact_of(model))
    assert torch.equal(generate(model, ids, cache, attention_mask=mask), expected)


def test_reset_serves_the_next_prompt_with_another_batch() -> None:
    model = tiny()
    expected = [generate(model, prompt(rows, 20 + rows)) for rows in (1, 3, 2)]
    model, cache = attach(model, artifact_of(model))
    for rows, text in zip((1, 3, 2), expected, strict=True):
        assert torch.equal(generate(model, prompt(rows, 20 + rows), cache), text)
        cache.reset()
        assert cache.bytes() == 0
        assert cache.get_seq_length() == 0


def test_a_conversation_continues_in_the_same_cache() -> None:
    model, ids = tiny(), prompt()
    plain = DynamicCache(config=model.config)
    first = generate(model, ids, plain)
    second_prompt = torch.cat([first, prompt(tokens=9, seed=3)], 1)
    expected = generate(model, second_prompt, plain)
    model, cache = attach(model, artifact_of(model))
    generate(model, ids, cache)
    assert torch.equal(generate(model, second_prompt, cache), expected)


def test_a_prompt_in_chunks_is_the_same_prompt() -> None:
    model, ids = tiny(), prompt(2)
    expected = generate(model, ids)
    model, cache = attach(model, artifact_of(model))
    assert torch.equal(generate(model, ids, cache, prefill_chunk_size=32), expected)


def test_a_window_is_the_models_own() -> None:
    model, ids = tiny("mistral", sliding_window=16), prompt()
    expected = generate(model, ids)
    model, cache = attach(model, artifact_of(model))
    assert torch.equal(generate(model, ids, cache), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_close(dtype: torch.dtype) -> None:
    model, ids = tiny().to(dtype), prompt(2)
    expected = logits(model, ids).float()
    model, cache = attach(model, artifact_of(model))
    logits(model, ids[:, :60], cache)
    found = logits(model, ids[:, 60:], cache)
    assert found.dtype == dtype
    scale = expected.abs().max()
    assert (found.float() - expected[:, 60:]).abs().max() < 0.02 * scale


def test_the_prompt_is_packed_layer_by_layer_and_read_packed() -> None:
    model, ids = tiny(), prompt(tokens=350)
    exact = logits(model, ids)
    model, cache = attach(model, artifact_of(model, KIVI_K, INT8))
    logits(model, ids[:, :349], cache)
    k, v = cache.packed.layers[1].streams
    assert (k.encoded[0], v.encoded[0]) == (2 + 320, 349)
    assert k.tail.shape[2] < 100, "the raw prompt was kept"
    last = logits(model, ids[:, 349:], cache)
    error = (last - exact[:, 349:]).abs().max()
    assert 0 < error < 0.5 * exact.abs().max(), "nothing was quantized, or everything was lost"


def test_only_the_prompt_is_exact() -> None:
    model, ids = tiny(), prompt(tokens=40)
    exact = logits(model, ids)
    model, cache = attach(model, artifact_of(model, Tokens(rest=Bfp(4, 16)), INT8))
    assert torch.equal(logits(model, ids, cache), exact)


def test_bytes_count_the_packed_cache() -> None:
    model = tiny()
    model, cache = attach(model, artifact_of(model, INT8, INT8))
    assert cache.bytes() == 0
    logits(model, prompt(tokens=64), cache)
    page = 2 * (64 * 16 + 2 * 64 * 2)  # two kv heads of codes, scales and zeros
    assert cache.bytes() == LAYERS * 2 * (page + 8)


def test_detach_gives_the_old_text_back() -> None:
    model, ids = tiny(), prompt()
    before, implementation = logits(model, ids), model.config._attn_implementation
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model, cache = attach(model, artifact_of(model))
    assert model.config._attn_implementation == "kvant"
    assert detach(model) is model
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, ids), before)
    error = refusal(logits, model, ids, cache)
    assert error.code == "not-attached"
    assert refusal(detach, model).what == "the model is not attached to an artifact"


def test_attaching_twice_gives_two_caches() -> None:
    model, ids = tiny(), prompt()
    artifact = artifact_of(model)
    model, one = attach(model, artifact)
    model, two = attach(model, artifact)
    text = generate(model, ids, one)
    assert torch.equal(generate(model, ids, two), text)
    other = dataclasses.replace(artifact, id="f" * 64)
    error = refusal(attach, model, other)
    assert error.code == "already-attached"
    assert error.what == "the model is attached to artifact 0123456789ab, not ffffffffffff"


def test_an_attached_model_without_a_cache_is_the_plain_model() -> None:
    model, ids = tiny(), prompt(2)
    expected = logits(model, ids)
    model, _ = attach(model, artifact_of(model))
    assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids, use_cache=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    random = np.random.default_rng(0)
    half = torch.tensor(1.0, dtype=dtype)
    step = float(torch.nextafter(half, half * 2) - half)
    # Ties, and ties moved by less than float32 can see: these two steps would round wrongly.
    ties = 1.0 + step * (random.integers(0, 50, 400) + 0.5)
    x = np.concatenate([ties, ties * (1 + 1e-12), ties * (1 - 1e-12), random.normal(0, 1, 400)])
    found = rounded(x, dtype).double().numpy()
    near = x[:, None] + np.zeros(3)
    grid = torch.from_numpy(x).to(dtype)
    infinity = torch.full_like(grid, float("inf"))
    candidates = torch.stack(
        [torch.nextafter(grid, -infinity), grid, torch.nextafter(grid, infinity)], 1
    ).double()
    best = np.abs(candidates.numpy() - near).min(1)
    assert (np.abs(found - x) == best).all()


def rotated_values(model: PreTrainedModel) -> Artifact:
    """An artifact whose values are stored rotated, folded into two weights of each layer."""
    edits = []
    for i in range(LAYERS):
        prefix = f"model.layers.{i}.self_attn."
        for name, op, heads in (
            ("v_proj", "hadamard_rows", KV_HEADS),
            ("o_proj", "hadamard_cols", HEADS),
        ):
            edits.append(WeightEdit(f"{name}.weight", (WeightOp(op, heads=heads),)).to_json(prefix))
    return artifact_of(model, weight_edits=tuple(edits))


def test_folds_change_the_weights_but_not_the_text() -> None:
    model, ids = tiny(), prompt()
    expected, exact = generate(model, ids), logits(model, ids)
    old = model.model.layers[0].self_attn.v_proj.weight.detach().clone()
    model, cache = attach(model, rotated_values(model))
    assert not torch.allclose(model.model.layers[0].self_attn.v_proj.weight, old)
    assert torch.equal(generate(model, ids, cache), expected)
    assert (logits(model, ids) - exact).abs().max() < 1e-4 * exact.abs().max()
    detach(model)
    assert torch.equal(logits(model, ids), exact)


def test_a_refused_edit_leaves_the_model_as_it_was() -> None:
    model, ids = tiny(), prompt()
    expected, good = logits(model, ids), rotated_values(model)
    bad = {"parameter": "model.layers.1.self_attn.o_proj.weight", "ops": [{"op": "melt"}]}
    artifact = dataclasses.replace(good, weight_edits=(*good.weight_edits, bad))
    assert refusal(attach, model, artifact).code == "bad-weight-edit"
    assert torch.equal(logits(model, ids), expected)
    assert model.config._attn_implementation == "sdpa"
