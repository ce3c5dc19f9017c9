"""A real model of another family: Gemma-3-270M from its GGUF file to quantized text.

1 + w norms on q and k, five local layers to a global one with another RoPE base, one KV head of 256
channels. Its packages hold 240 MB; where they are missing, these tests are skipped.
"""

from typing import Any

import pytest
import torch

import kvant
from kvant.compiler.bind import ModelSource, open_model
from kvant.compiler.capture import capture
from kvant.compiler.generation import generate
from kvant.compiler.quality import evaluate
from kvant.compiler.self_check import check_capture
from kvant.compiler.texts import demo_text
from kvant.ir.errors import KvantError

pytestmark = [pytest.mark.model, pytest.mark.long]


@pytest.fixture(scope="module")
def source() -> ModelSource:
    try:
        return open_model("gemma3-270m")
    except KvantError as error:
        pytest.skip(f"{error.what}; {error.fix}")


@pytest.fixture(scope="module")
def compiled(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("gemma3") / "kivi.kvant"
    return kvant.compile(source, "kivi-4bit", ["cpu"], out=out)


def test_norms_are_stored_less_one(source: ModelSource) -> None:
    """llama.cpp writes w + 1, transformers computes with w + 1: ours must be w."""
    import gguf

    path = source.path
    assert path is not None
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for ours, theirs in (
        ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ):
        assert abs(source.weight(ours) + 1 - stored[theirs].data).max() < 1e-6


def test_its_structures_match_torch(source: ModelSource) -> None:
    model = capture(source)
    assert [layer.structure for layer in model.layers] == ([0] * 5 + [1]) * 3
    assert [g.find("attend")[0].attr("window") for g in model.graphs] == [512, None]
    module = source.load("float32").double()  # so that only our rounding is seen
    assert check_capture(module, model, layers=[0, 5]) <= 2e-6


def test_the_global_layers_are_packed_and_cost_little(source: ModelSource, compiled: Any) -> None:
    packed = [plan.k.tokens.quantizes for plan in compiled.plans]
    assert packed == ([False] * 5 + [True]) * 3
    found = evaluate(compiled, source, demo_text(), tokens=128, prompt=768).to_json()
    assert 20 < found["perplexity_full"] < 60
    assert 1e-5 < found["kl_mean"] < 0.004
    assert abs(found["perplexity"] / found["perplexity_full"] - 1) < 0.02


def test_it_goes_on_with_a_sentence_as_torch_does(source: ModelSource, compiled: Any) -> None:
    """So short a context is all in the raw window: what differs would be wrong, not lossy."""
    tokenizer, model = source.tokenizer(), source.load("float32")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert int(prompt["input_ids"][0, 0]) == tokenizer.bos_token_id
    with torch.inference_mode():
        plain = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    new = plain[0, prompt["input_ids"].shape[1] :]
    made = generate(compiled, source, "The capital of France is", 12)
    assert made["text"] == tokenizer.decode(new, skip_special_tokens=True)
