"""What the adapter refuses: models, masks and calls that it would serve wrongly."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)

from kvant.ir.errors import KvantError
from kvant.runtime.huggingface import attach
from kvant.runtime.plan_file import LayerEntry

from .tiny_models import (
    INT8,
    KIVI_K,
    LAYERS,
    artifact_of,
    generate,
    left_padded,
    logits,
    prompt,
    refusal,
    tiny,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


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
