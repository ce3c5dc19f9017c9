"""The adapter on tiny random models, with the real cache and the reference kernels."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
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

from kvant.ir.encodings import Bfp, Int, Raw, Tokens
from kvant.ir.errors import KvantError
from kvant.ir.layouts import page_tokens
from kvant.ir.plan import AttentionPlan, StreamPlan
from kvant.ir.weight_edits import WeightEdit, WeightOp
from kvant.runtime.artifact import Artifact
from kvant.runtime.huggingface import attach, detach
from kvant.runtime.launch_reference import Kernels
from kvant.runtime.model_checks import sampled
from kvant.runtime.model_edits import rounded
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


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


# --- generate ---------------------------------------------------------------------------------


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
    expected = generate(model, ids, max_new_tokens=40)
    model, cache = attach(model, artifact_of(model))
    crops, crop = [], cache.crop
    monkeypatch.setattr(cache, "crop", lambda count: (crops.append(count), crop(count)))
    found = generate(model, ids, cache, max_new_tokens=40, prompt_lookup_num_tokens=5)
    assert torch.equal(found, expected)
    assert min(crops) < 0, "no draft was rejected"
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


def left_padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompt(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return ids * mask, mask


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


# --- what is stored ---------------------------------------------------------------------------


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


# --- attach and detach ------------------------------------------------------------------------


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


# --- refusals ---------------------------------------------------------------------------------


def test_refuses_another_models_weights() -> None:
    model, other = tiny(), tiny(seed=7)
    error = refusal(attach, other, artifact_of(model))
    assert error.code == "wrong-weights"
    assert error.what.startswith("model.layers.0.self_attn.k_proj.weight begins a sample with ")
    assert error.fix == "attach the weights that were compiled, or compile these"
    assert other.config._attn_implementation == "sdpa"


def test_accepts_the_same_weights_in_bf16() -> None:
    model = tiny()
    artifact = artifact_of(model)
    attach(model.to(torch.bfloat16), artifact)


def test_refuses_another_architecture() -> None:
    error = refusal(attach, tiny("qwen2"), artifact_of(tiny("llama")))
    assert error.code == "wrong-architecture"
    assert error.what == (
        "the model is a Qwen2ForCausalLM; the artifact was made from a LlamaForCausalLM (tiny)"
    )


def test_refuses_another_structure() -> None:
    artifact = artifact_of(tiny())
    error = refusal(attach, tiny(num_hidden_layers=3), artifact)
    assert (error.code, error.what) == ("wrong-structure", "the model has 3 layers, the artifact 2")
    error = refusal(attach, tiny(num_key_value_heads=4), artifact)
    assert error.what == (
        "the model has 4 query and 4 kv heads of 16 channels, the artifact 4 and 2 of 16"
    )
    error = refusal(attach, tiny(hidden_size=48), artifact)
    assert error.what == "the model is 48 channels wide, the compiled one 64"


def test_refuses_an_artifact_of_a_shape() -> None:
    model = tiny()
    layers = tuple(LayerEntry(i, 0, "", 0, "p0") for i in range(LAYERS))
    error = refusal(attach, model, artifact_of(model, layers=layers))
    assert error.code == "artifact-without-model"
    assert error.what == "the artifact was compiled from a shape, tiny, not from a model"


def test_refuses_what_is_no_transformers_model() -> None:
    model = tiny()
    error = refusal(attach, nn.Sequential(model), artifact_of(model))
    assert error.code == "unsupported-model"
    assert error.what == "a torch.nn.modules.container.Sequential is not a transformers model"


class LoraLinear(nn.Module):
    """What an adapter library puts in the place of a projection."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base


class Linear4bit(nn.Linear):
    """What a quantization library puts there."""


class PackedTensor(torch.Tensor):
    """What torch's own quantization keeps in a plain Linear."""


def with_projection(change: Any) -> PreTrainedModel:
    model = tiny()
    attention = model.model.layers[1].self_attn
    attention.v_proj = change(attention.v_proj)
    return model


def packed(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(PackedTensor), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("change", "code", "what"),
    [
        (LoraLinear, "adapted-projection", "is a LoraLinear around a base layer (LoRA)"),
        (
            lambda linear: Linear4bit(64, 32, bias=False),
            "quantized-projection",
            "is a Linear4bit holding a Tensor of torch.float32, not a plain torch.nn.Linear",
        ),
        (
            packed,
            "quantized-projection",
            "is a Linear holding a PackedTensor of torch.float32, not a plain torch.nn.Linear",
        ),
        (
            lambda linear: linear.to("meta"),
            "offloaded-projection",
            "v_proj.weight is on the meta device: it is offloaded or was never loaded",
        ),
        (
            lambda linear: linear.double(),
            "wrong-dtype",
            "v_proj.weight has dtype torch.float64, expected float32, bfloat16 or float16",
        ),
    ],
    ids=["lora", "linear4bit", "torchao", "meta", "float64"],
)
def test_refuses_a_projection_it_cannot_edit(change: Any, code: str, what: str) -> None:
    error = refusal(attach, with_projection(change), artifact_of(tiny()))
    assert error.code == code
    assert error.what.startswith("model.layers.1.self_attn.v_proj")
    assert error.what.endswith(what)


def padded_call(mask: Any, **options: Any) -> KvantError:
    model = tiny()
    model, cache = attach(model, artifact_of(model))
    ids = prompt(2, 8)
    return refusal(logits, model, ids, cache, attention_mask=torch.tensor(mask), **options)


def test_refuses_right_padding() -> None:
    error = padded_call([[1] * 8, [1] * 5 + [0] * 3])
    assert error.code == "unsupported-mask"
    assert error.what == "the attention mask hides tokens that come after visible ones"
    assert error.fix == 'pad on the left: tokenizer.padding_side = "left"'


def test_refuses_a_hole_in_a_mask() -> None:
    error = padded_call([[1] * 8, [0, 1, 0, 1, 1, 1, 1, 1]])
    assert error.what == "the attention mask hides tokens that come after visible ones"


def test_refuses_a_row_of_padding() -> None:
    error = padded_call([[1] * 8, [0] * 8])
    assert (error.code, error.what) == (
        "unsupported-mask",
        "a row of the attention mask is all padding",
    )


def test_refuses_a_mask_of_another_length() -> None:
    error = padded_call([[1] * 9] * 2)
    assert error.what == (
        "the attention mask has shape [2, 9], expected [2, 8]: 0 columns in the cache and 8 new"
    )


def test_refuses_a_4d_mask() -> None:
    error = padded_call(np.tril(np.ones((8, 8), bool))[None, None].repeat(2, 0))
    assert (error.code, error.what) == ("unsupported-mask", "the attention mask has 4 dimensions")


def test_refuses_packed_sequences() -> None:
    packed_positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    error = padded_call([[1] * 8] * 2, position_ids=packed_positions)
    what = "position_ids jump within a row, so several sequences seem to be packed into it"
    assert (error.code, error.what) == ("unsupported-mask", what)
    model, _ = attach(model := tiny(), artifact_of(model))
    error = refusal(logits, model, prompt(2, 8), position_ids=packed_positions, use_cache=False)
    assert error.code == "unsupported-mask"
    assert error.what.startswith("the model or its inputs ask for packed sequences")


def test_refuses_a_mask_that_changes() -> None:
    model, (ids, mask) = tiny(), left_padded(8, 5)
    model, cache = attach(model, artifact_of(model))
    logits(model, ids, cache, attention_mask=mask)
    new, ones = prompt(2, 1), torch.ones(2, 1, dtype=torch.long)
    error = refusal(logits, model, new, cache, attention_mask=torch.ones(2, 9))
    assert error.code == "unsupported-mask"
    assert error.what == "the padding of the attention mask changed since the prompt"
    cache.reset()
    logits(model, ids, cache, attention_mask=mask)
    logits(model, new, cache, attention_mask=torch.cat([mask, ones], 1))


def test_refuses_a_second_prompt_without_reset() -> None:
    model, ids = tiny(), prompt(1, 20)
    model, cache = attach(model, artifact_of(model))
    generate(model, ids, cache)
    error = refusal(generate, model, prompt(1, 10, seed=4), cache)
    assert error.code == "empty-input"
    assert error.what == "the prompt has no token beyond the 43 in the cache"
    error = refusal(logits, model, prompt(1, 10), cache, attention_mask=torch.ones(1, 10))
    assert error.code == "unsupported-mask"
    assert error.fix.endswith("cache.reset() for a new prompt")


def test_refuses_another_cache_with_history() -> None:
    model, ids = tiny(), prompt(1, 20)
    model, _ = attach(model, artifact_of(model))
    error = refusal(generate, model, ids)
    assert error.code == "foreign-cache"
    assert error.what == (
        "an attached model was called with a history of 20 tokens in a cache that is not kvant's"
    )


def test_refuses_a_model_that_is_not_attached() -> None:
    model, stranger, ids = tiny(), tiny(), prompt()
    model, cache = attach(model, artifact_of(model))
    error = refusal(generate, stranger, ids, cache)
    assert error.code == "not-attached"
    stranger, _ = attach(stranger, artifact_of(stranger))
    cache.reset()
    error = refusal(logits, stranger, ids, cache)
    assert error.what == "the cache belongs to another model of the same kind"


def test_refuses_attention_weights_and_dropout() -> None:
    model, ids = tiny(attention_dropout=0.1), prompt()
    model, cache = attach(model, artifact_of(model))
    error = refusal(logits, model.train(), ids, cache)
    assert (error.code, error.what) == (
        "training-mode",
        "the model asks for attention dropout of 0.1",
    )
    cache.reset()
    error = refusal(logits, model.eval(), ids, cache, cu_seq_lens_q=torch.tensor([0, 70]))
    assert error.code == "unsupported-keyword"
    assert error.what == "the model passes cu_seq_lens_q to its attention"


def test_refuses_another_scale() -> None:
    model, ids = tiny(), prompt()
    model, cache = attach(model, artifact_of(model))
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    error = refusal(logits, model, ids, cache)
    assert error.code == "wrong-structure"
    assert error.what == (
        "the model attends with scale 0.5, window None, softcap None; "
        "the artifact has 0.25, None and None"
    )


def test_a_full_cache_is_refused_and_a_torn_pass_is_seen() -> None:
    model = tiny()
    model, cache = attach(model, artifact_of(model), max_tokens=72)
    logits(model, prompt(), cache)
    assert refusal(logits, model, prompt(1, 3), cache).code == "cache-full"
    logits(model, prompt(1, 2), cache)  # the refusal changed nothing
    cache.reset()
    broken = model.model.layers[1].self_attn.k_proj.weight
    broken.data[0, 0] = float("nan")
    assert refusal(logits, model, prompt(), cache).code == "non-finite"
    broken.data[0, 0] = 0.0
    assert refusal(logits, model, prompt(), cache).code == "torn-cache"
    cache.reset()
    logits(model, prompt(), cache)


def test_refuses_to_crop_upwards_or_into_groups() -> None:
    model = tiny()
    model, cache = attach(model, artifact_of(model, KIVI_K, INT8))
    logits(model, prompt(), cache)
    assert refusal(cache.crop, 5).what == "crop(5) of a cache of 70 tokens"
    error = refusal(cache.crop, -20)
    assert error.code == "truncate-inside-group"
    assert cache.get_seq_length() == 70
    cache.crop(-3)
    assert cache.get_seq_length() == 67


def test_refuses_to_change_the_number_of_rows() -> None:
    model = tiny()
    model, cache = attach(model, artifact_of(model))
    logits(model, prompt(), cache)
    for call in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices([0])):
        assert refusal(call).what == "the number of rows of a packed cache cannot change"


def test_refuses_a_deep_copy() -> None:
    model = tiny()
    _, cache = attach(model, artifact_of(model))
    error = refusal(copy.deepcopy, cache)
    assert (error.code, error.what) == (
        "unsupported-copy",
        "a packed cache cannot be copied with copy.deepcopy",
    )
