"""Tiny random models, artifacts that fit them, and ways to run both: for tests of the adapter."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvant.ir.encodings import Int, Raw, Tokens
from kvant.ir.errors import KvantError
from kvant.ir.layouts import page_tokens
from kvant.ir.plan import AttentionPlan, StreamPlan
from kvant.runtime.artifact import Artifact
from kvant.runtime.huggingface import attach
from kvant.runtime.launch_reference import Kernels
from kvant.runtime.model_checks import sampled
from kvant.runtime.plan_file import LayerEntry

LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB = 2, 4, 2, 16, 97
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
LOSSLESS = Tokens(rest=Raw("f32"))
INT8 = Tokens(rest=Int(bits=8, axis="token", group=WIDTH))
KIVI_K = Tokens(rest=Int(bits=4, axis="channel", group=32), sink=2, recent=32, flush="block")


def tiny(kind: str = "llama", seed: int = 0, **options: Any) -> PreTrainedModel:
    config, model = MODELS[kind]
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HEADS * WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "sliding_window": None,
    }
    made: PreTrainedModel = model(config(**(settings | options)))
    for name, parameter in made.named_parameters():  # norms and biases that are not 1 and 0
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    return made.eval()


def plan_of(model: PreTrainedModel, k: Tokens = LOSSLESS, v: Tokens = LOSSLESS) -> AttentionPlan:
    heads = model.config.num_key_value_heads
    streams = {
        role: StreamPlan(role, heads, WIDTH, (), tokens, page_tokens(tokens.rest))
        for role, tokens in (("k", k), ("v", v))
    }
    return AttentionPlan(
        q_heads=model.config.num_attention_heads,
        scale=WIDTH**-0.5,
        softcap=None,
        window=getattr(model.config, "sliding_window", None),
        q_maps=(),
        out_maps=(),
        **streams,
    )


def artifact_of(
    model: PreTrainedModel, k: Tokens = LOSSLESS, v: Tokens = LOSSLESS, **changes: Any
) -> Artifact:
    """An artifact as `load` would return it, without a folder."""
    layers = model.config.num_hidden_layers
    plans = (plan_of(model, k, v),) * layers
    prefixes = [f"model.layers.{i}.self_attn." for i in range(layers)]
    weights = {
        f"{prefix}k_proj.weight": list(
            sampled(model.get_parameter(f"{prefix}k_proj.weight").detach().reshape(-1), 16)
        )
        for prefix in prefixes
    }
    artifact = Artifact(
        path=Path("nowhere"),
        id="0123456789abcdef" * 4,
        manifest={
            "recipe": "test",
            "calibration": None,
            "model": {
                "name": "tiny",
                "architecture": type(model).__name__,
                "facts": {"hidden": model.config.hidden_size},
                "weights": weights,
            },
        },
        target="reference",
        layers=tuple(LayerEntry(i, 0, prefix, 0, "p0") for i, prefix in enumerate(prefixes)),
        plans=plans,
        constants=({},) * layers,
        tensors={},
        weight_edits=(),
        kernels=Kernels(plans, ({},) * layers),
        passed_over={},
    )
    return dataclasses.replace(artifact, **changes)


def prompt(rows: int = 1, tokens: int = 70, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (rows, tokens), generator=generator)


def generate(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None, **options: Any) -> Any:
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, past_key_values=cache, **options)


def logits(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **options).logits


def refusal(call: Any, *args: Any, **kwargs: Any) -> KvantError:
    with pytest.raises(KvantError) as caught:
        call(*args, **kwargs)
    return caught.value


def left_padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompt(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return ids * mask, mask


def lookup_is_greedy(
    model: PreTrainedModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """See that prompt lookup, with drafts rejected, gives the greedy text; return the cache."""
    expected = generate(model, ids, max_new_tokens=40)
    model, cache = attach(model, artifact_of(model))
    crops, crop = [], cache.crop
    monkeypatch.setattr(cache, "crop", lambda count: (crops.append(count), crop(count)))
    found = generate(model, ids, cache, max_new_tokens=40, prompt_lookup_num_tokens=5)
    assert torch.equal(found, expected)
    assert min(crops) < 0, "no draft was rejected"
    return cache
