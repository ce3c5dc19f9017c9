"""Calibration statistics against what the model's own cache and projections hold."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvant.compiler.bind import open_model
from kvant.compiler.calibrate import IMPLEMENTATION, calibrate, own_text, recording
from kvant.compiler.texts import demo_text, prose
from kvant.ir.errors import KvantError

from ..families import make_model

SKIPPED = 4


def tiny(kind: str = "llama") -> PreTrainedModel:
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    torch.manual_seed(0)
    made: PreTrainedModel = model(
        config(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            initializer_range=0.25,
            bos_token_id=3,
            eos_token_id=None,
        )
    )
    return made.eval()


def ids(count: int, seed: int = 1) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (count,), generator=random).tolist()


def seen_by(model: PreTrainedModel, tokens: list[int]) -> list[tuple[Any, Any, Any]]:
    """q, k, v [H, T, D] of each layer after RoPE, by a way that calibration does not use."""
    projected: list[Any] = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _m, _x, y: projected.append(y))
        for layer in model.model.layers
    ]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([tokens]), past_key_values=cache)
        cos, sin = model.model.rotary_emb(projected[0], torch.arange(len(tokens))[None])
    for hook in hooks:
        hook.remove()
    rows = []
    for y, layer in zip(projected, cache.layers, strict=True):
        q = y.view(1, len(tokens), 4, 16).transpose(1, 2)
        q, _ = apply_rotary_pos_emb(q, q, cos, sin)
        rows.append((q[0], layer.keys[0], layer.values[0]))
    return rows


def test_statistics_are_those_of_q_k_and_v_after_rope() -> None:
    model, tokens = tiny(), ids(100)
    stats = calibrate(open_model(model), tokens)
    assert sorted(stats) == [0, 1]
    for layer, found in enumerate(seen_by(model, tokens)):
        made = stats[layer]
        assert made.tokens == 100 - SKIPPED
        for name, x in zip("qkv", found, strict=True):
            kept = x[:, SKIPPED:].double().numpy()
            absmax, moment = (getattr(made, f"{name}_{s}") for s in ("absmax", "second_moment"))
            np.testing.assert_allclose(absmax, np.abs(kept).max(1), rtol=1e-5)
            np.testing.assert_allclose(moment, (kept**2).mean(1), rtol=1e-5)


def test_the_largest_values_are_those_of_all_windows_in_order() -> None:
    model, tokens = tiny(), ids(560)
    stats = calibrate(open_model(model), tokens)
    windows = [seen_by(model, tokens[i : i + 256]) for i in (0, 256, 512)]
    for layer, made in stats.items():
        for place, name in enumerate("kv", start=1):
            kept = torch.cat([window[layer][place][:, SKIPPED:] for window in windows], 1)
            sizes = np.abs(kept.double().numpy()).transpose(1, 0, 2)
            largest = getattr(made, f"{name}_largest")
            assert largest.shape == (64, 2, 16)
            assert largest.dtype == np.float64
            np.testing.assert_allclose(largest, -np.sort(-sizes, axis=0)[:64], rtol=1e-5)
            assert (largest[0] == getattr(made, f"{name}_absmax")).all()


def test_fewer_tokens_are_all_kept() -> None:
    made = calibrate(open_model(tiny()), ids(64))[1]
    assert made.tokens == len(made.k_largest) == len(made.v_largest) == 64 - SKIPPED
    np.testing.assert_allclose((made.v_largest**2).mean(0), made.v_second_moment)


def test_a_last_window_as_short_as_what_is_left_out() -> None:
    model, tokens = tiny(), ids(256 + SKIPPED)
    long, short = (calibrate(open_model(model), some)[1] for some in (tokens, tokens[:256]))
    assert long.tokens == short.tokens == 256 - SKIPPED
    assert (long.k_absmax == short.k_absmax).all()
    assert (long.v_largest == short.v_largest).all()


def test_a_long_text_is_cut_into_windows() -> None:
    model, tokens = tiny(), ids(600)
    made = calibrate(open_model(model), tokens, tokens=560)[1]
    assert made.tokens == 560 - 3 * SKIPPED
    parts = [seen_by(model, tokens[i : min(i + 256, 560)])[1][1] for i in (0, 256, 512)]
    kept = torch.cat([part[:, SKIPPED:] for part in parts], 1).double().numpy()
    np.testing.assert_allclose(made.k_second_moment, (kept**2).mean(1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_without_text_the_model_writes_its_own_and_always_the_same(kind: str) -> None:
    source = open_model(tiny(kind))
    one = calibrate(source, tokens=96)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    two = calibrate(source, tokens=96)
    torch.set_num_threads(threads)
    other = calibrate(source, tokens=96, seed=1)
    assert one[0].tokens == 8 * (12 - SKIPPED)
    assert one[0].q_absmax.shape == (4, 16)
    assert one[0].k_absmax.shape == one[0].v_second_moment.shape == (2, 16)
    for layer in (0, 1):
        assert (one[layer].k_absmax == two[layer].k_absmax).all()
        assert (one[layer].v_second_moment == two[layer].v_second_moment).all()
        assert (one[layer].k_largest == two[layer].k_largest).all()
    assert (one[1].k_absmax != other[1].k_absmax).any()


def test_a_text_is_no_longer_than_the_model_takes() -> None:
    """GPT-2 has learned positions: beyond the last there is nothing."""
    model = make_model("gpt2")
    assert own_text(model, 8 * 100, 0).shape == (8, 64)
    made = calibrate(open_model(model), [i % 64 for i in ids(150)], tokens=150)[0]
    assert made.tokens == 150 - 3 * SKIPPED


def test_a_first_token_outside_of_the_vocabulary_is_not_taken() -> None:
    model = make_model("glm4")
    model.generation_config.eos_token_id = 151_329
    assert own_text(model, 16, 0).max() < 64


def test_own_text_begins_with_bos_and_is_no_loop() -> None:
    with torch.no_grad():
        text = own_text(tiny(), 160, seed=0)
    assert text.shape == (8, 20)
    assert (text[:, 0] == 3).all()
    assert len({tuple(row) for row in text.tolist()}) == 8
    assert len(text.unique()) > 20


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_the_recorder_attends_as_the_model_does(family: str) -> None:
    """Softcap, window and learned sinks: later layers would see other keys without them."""
    model = make_model(family)
    tokens = torch.randint(0, 64, (2, 20), generator=torch.manual_seed(0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model.base_model(tokens).last_hidden_state
        with recording(model):
            found = model.base_model(tokens).last_hidden_state
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_nothing_is_left_behind() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    calibrate(open_model(model), ids(80))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    with recording(model):
        assert model.config._attn_implementation == IMPLEMENTATION
    assert model.config._attn_implementation == "sdpa"
    assert IMPLEMENTATION not in AttentionInterface._global_mapping
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_refuses_too_little_text() -> None:
    with pytest.raises(KvantError) as caught:
        calibrate(open_model(tiny()), ids(20))
    assert str(caught.value) == (
        "the text has 20 tokens; calibration needs 64\n  where: the calibration text\n"
        "  fix: give a text of about 384 characters of prose or more  [too-little-text]"
    )


def test_refuses_text_without_a_tokenizer() -> None:
    with pytest.raises(KvantError) as caught:
        calibrate(open_model(tiny()), "some words")
    assert caught.value.code == "no-tokenizer"


def test_demo_text_is_prose_enough_for_an_evaluation() -> None:
    text = demo_text()
    paragraphs = text.split("\n\n")
    assert len(text) > 60_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert "::=" not in text
    assert ">>>" not in text
    assert all(p[0].isupper() and len(p.split()) > 11 and "\n" not in p for p in paragraphs)


def test_prose_keeps_sentences_and_nothing_else() -> None:
    topic = (
        'The "while" statement\n*********************\n\n'
        'The "while" statement is used for repeated execution as long as an\n'
        "expression [1] is true, and not a moment longer.\n\n"
        '   while_stmt ::= "while" assignment_expression\n\n'
        "See also: some other section of these pages that is not quoted here:\n\n"
        "Changed in version 3.8: This is history, which is told in whole sentences too.\n\n"
        "Too short.\n"
    )
    expected = (
        "The while statement is used for repeated execution as long as an expression is true, "
        "and not a moment longer."
    )
    assert prose({"b": topic, "a": topic}) == expected
