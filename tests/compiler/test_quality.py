"""Evaluation on a tiny random model, with the real cache and the reference kernels."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvant.compiler.bind import open_model
from kvant.compiler.quality import Protocol, Quality, evaluate, packed_share
from kvant.compiler.statistics import interval, kl, log_softmax
from kvant.compiler.texts import name_of
from kvant.ir.encodings import Int, Raw, Tokens
from kvant.ir.errors import KvantError
from kvant.ir.layouts import page_tokens
from kvant.ir.plan import AttentionPlan, StreamPlan
from kvant.runtime import artifact as artifacts
from kvant.runtime.artifact import Artifact
from kvant.runtime.huggingface import attach
from kvant.runtime.launch_reference import Kernels
from kvant.runtime.plan_file import LayerEntry

KEYS = (
    "perplexity_full perplexity kl_mean kl_mean_low kl_mean_high kl_p99 kl_noise_floor top1 "
    "bits_per_element packed_share cache_bytes_per_token tokens context recipe target "
    "perplexity_full_low perplexity_full_high perplexity_low perplexity_high "
    "kl_p99_low kl_p99_high top1_low top1_high text"
).split()
LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB = 2, 4, 2, 16, 97
LOSSLESS = Tokens(rest=Raw("f32"))
INT8 = Tokens(rest=Int(bits=8, axis="token", group=WIDTH))
INT4 = Tokens(rest=Int(bits=4, axis="token", group=WIDTH))
WINDOWED = Tokens(rest=Int(bits=4, axis="channel", group=8), sink=3, recent=16, flush="block")


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HEADS * WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def ids(count: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def artifact_of(k: Tokens, v: Tokens, **changes: Any) -> Artifact:
    streams = [
        StreamPlan(role, KV_HEADS, WIDTH, (), tokens, page_tokens(tokens.rest))
        for role, tokens in (("k", k), ("v", v))
    ]
    plan = AttentionPlan(HEADS, WIDTH**-0.5, None, None, (), *streams, ())
    plans, constants = (plan,) * LAYERS, ({},) * LAYERS
    facts = {"hidden": HEADS * WIDTH}
    about = {"name": "tiny", "architecture": "LlamaForCausalLM", "facts": facts, "weights": {}}
    prefixes = [f"model.layers.{i}.self_attn." for i in range(LAYERS)]
    made = Artifact(
        path=Path("nowhere"),
        id="0123456789abcdef" * 4,
        manifest={"recipe": "test", "calibration": None, "model": about},
        target="reference",
        layers=tuple(LayerEntry(i, 0, prefix, 0, "p0") for i, prefix in enumerate(prefixes)),
        plans=plans,
        constants=constants,
        tensors={},
        weight_edits=(),
        kernels=Kernels(plans, constants),
        passed_over={},
    )
    return dataclasses.replace(made, **changes)


def run(model: Any, k: Tokens, v: Tokens, **options: Any) -> Quality:
    settings = {"tokens": 40, "prompt": 48, "block": 16} | options
    return evaluate(artifact_of(k, v), open_model(model), ids(400), **settings)


def test_keys_are_exactly_the_stable_ones(model: Any) -> None:
    made = run(model, INT8, INT8).to_json()
    assert sorted(made) == sorted(KEYS)
    assert (made["tokens"], made["context"]) == (40, 88)
    assert (made["recipe"], made["target"]) == ("test", "reference")
    assert made["text"] == name_of(ids(400))
    assert all(isinstance(value, float | int | str) for value in made.values())


def test_the_text_of_the_calibration_is_refused(model: Any) -> None:
    artifact = artifact_of(INT8, INT8)
    artifact.manifest["calibration"] = name_of(ids(400))
    with pytest.raises(KvantError) as caught:
        evaluate(artifact, open_model(model), ids(400), tokens=40, prompt=48, block=16)
    assert caught.value.code == "text-not-held-out"
    evaluate(artifact, open_model(model), ids(401), tokens=40, prompt=48, block=16)


def test_a_lossless_cache_changes_nothing(model: Any) -> None:
    found = run(model, LOSSLESS, LOSSLESS)
    made = found.to_json()
    assert found.kl.max() < 1e-9
    assert made["top1"] == 1.0
    assert made["perplexity"] == pytest.approx(made["perplexity_full"], rel=1e-6)
    assert made["packed_share"] == 0.0
    assert found.kl.shape == found.nll_full.shape == found.nll_kvant.shape == found.agrees.shape


def test_fewer_bits_cost_more(model: Any) -> None:
    eight, four = run(model, INT8, INT8).to_json(), run(model, INT4, INT4).to_json()
    assert 1e-7 < eight["kl_mean"] < 0.05 * four["kl_mean"]
    for made in (eight, four):
        assert made["kl_mean_low"] < made["kl_mean"] < made["kl_mean_high"] < made["kl_p99"]
        for name in ("perplexity_full", "perplexity", "kl_p99", "top1"):
            assert made[f"{name}_low"] <= made[name] <= made[f"{name}_high"], name
        assert made["perplexity_full_low"] < made["perplexity_full_high"]
    assert eight["packed_share"] > 0.8
    page = KV_HEADS * (64 * WIDTH + 2 * 64 * 2)  # codes, scales, zeros
    size = 2 * LAYERS * (2 * page + 2 * 8)
    assert eight["cache_bytes_per_token"] == size / 88
    assert eight["bits_per_element"] == 8 * size / (88 * 2 * LAYERS * KV_HEADS * WIDTH)


def test_perplexity_is_that_of_plain_passes_over_each_window(model: Any) -> None:
    text = ids(400)
    # A context of 80 leaves room for 32 scored tokens: windows of 32, 32 and 6.
    made = run(model, WINDOWED, INT4, tokens=70, context=80).to_json()
    assert made["context"] == 80
    losses = []
    for begin, scored in ((0, 32), (81, 32), (162, 6)):
        window = torch.tensor([text[begin : begin + 48 + scored + 1]])
        with torch.no_grad():
            scores = model(window[:, :-1]).logits[0, 48:].double()
        losses.append(torch.nn.functional.cross_entropy(scores, window[0, 49:], reduction="none"))
    expected = torch.cat(losses).mean().exp().item()
    assert made["perplexity_full"] == pytest.approx(expected, rel=1e-5)
    assert made["perplexity"] != pytest.approx(expected, rel=1e-5)


def test_blocks_read_what_is_stored(model: Any) -> None:
    """The KL of the last block, once more, by hand."""
    text = ids(400)
    found = run(model, INT4, INT4)
    source = open_model(model).load("float32")
    with torch.no_grad():
        exact = source(torch.tensor([text[:88]])).logits[0, 80:].double()
        attached, cache = attach(source, artifact_of(INT4, INT4))
        for begin, end in ((0, 48), (48, 64), (64, 80)):
            attached(torch.tensor([text[begin:end]]), past_key_values=cache)
        scores = attached(torch.tensor([text[80:88]]), past_key_values=cache).logits[0].double()
    p, q = exact.log_softmax(-1), scores.log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).numpy()
    np.testing.assert_allclose(found.kl[32:], expected, rtol=1e-4, atol=1e-9)
    assert found.agrees[32:].tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


def test_packed_share_is_what_the_cache_holds(model: Any) -> None:
    protocol = Protocol(prompt=37, block=7, window=30, tokens=30)
    artifact = artifact_of(WINDOWED, INT8)
    source = open_model(model).load("float32")
    attached, cache = attach(source, artifact)
    text, at, packed, total = torch.tensor([ids(100)]), 37, 0, 0
    with torch.no_grad():
        attached(text[:, :37], past_key_values=cache)
        while at < 67:
            n = min(7, 67 - at)
            attached(text[:, at : at + n], past_key_values=cache)
            for layer in cache.packed.layers:
                for stream in layer.streams:
                    packed += n * (int(stream.encoded[0]) - stream.sinks)
                    total += sum(at + i + 1 for i in range(n))
            at += n
    assert packed_share(artifact.plans, protocol) == packed / total
    assert 0.3 < packed / total < 0.95


def test_noise_floor_is_measured_against_the_reference(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rough(Kernels):
        """A target whose sums are rounded, as a faster kernel's might be."""

        def attend(self, layer: int, q: Any, k: Any, v: Any) -> Any:
            out, lse = super().attend(layer, q, k, v)
            return out.astype(np.float16).astype(np.float32), lse

    reference = artifact_of(INT4, INT4)
    rough = dataclasses.replace(
        reference, target="rough", kernels=Rough(reference.plans, reference.constants)
    )
    asked: list[Any] = []

    def load(path: Any, target: str, id: str) -> Artifact:
        asked.append((path, target, id))
        return reference

    monkeypatch.setattr(artifacts, "load", load)
    found = evaluate(rough, open_model(model), ids(400), tokens=40, prompt=48, block=16)
    made = found.to_json()
    assert asked == [(Path("nowhere"), "reference", reference.id)]
    assert made["target"] == "rough"
    assert 0 < made["kl_noise_floor"] < 0.05 * made["kl_mean"]
    assert found.noise_tokens == 40
    assert run(model, INT4, INT4).to_json()["kl_noise_floor"] == 0.0


def test_protocol_counts_its_tokens() -> None:
    protocol = Protocol(prompt=10, block=4, window=6, tokens=15)
    assert protocol.needed == 3 * 11 + 15
    windows = list(protocol.windows(range(100)))
    assert [len(window) for window in windows] == [17, 17, 14]
    assert [t for window in windows for t in window] == list(range(protocol.needed))


def test_interval_covers_the_mean_and_respects_neighbours() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        low, high = interval(random.exponential(1.0, 400), seed=seed)
        hits += low < 1.0 < high
    assert 50 <= hits <= 60
    alone = random.exponential(1.0, 64)
    together = np.repeat(alone, 16)
    narrow, wide = interval(random.permutation(together)), interval(together)
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert interval(np.full(50, 0.25)) == (0.25, 0.25)


def test_kl_is_the_textbook_one() -> None:
    random = np.random.default_rng(0)
    one, two = random.normal(0, 5, (7, 50)), random.normal(0, 5, (7, 50))
    p, q = (torch.from_numpy(x).log_softmax(-1) for x in (one, two))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(kl(log_softmax(one), log_softmax(two)), expected, rtol=1e-12)
    np.testing.assert_allclose(kl(log_softmax(one), log_softmax(one)), 0.0, atol=1e-15)


def test_refuses_too_little_text(model: Any) -> None:
    with pytest.raises(KvantError) as caught:
        evaluate(artifact_of(INT8, INT8), open_model(model), ids(88), tokens=40, prompt=48)
    assert str(caught.value) == (
        "the text has 88 tokens; the evaluation needs 89\n  where: the evaluation text\n"
        "  fix: give a text of about 534 characters of prose or more  [too-little-text]"
    )


def test_refuses_a_prompt_that_leaves_no_room(model: Any) -> None:
    with pytest.raises(KvantError) as caught:
        run(model, INT8, INT8, prompt=256)
    assert caught.value.code == "bad-protocol"
    assert caught.value.what == (
        "40 tokens in blocks of 16 after a prompt of 256 do not fit a context of 256"
    )
