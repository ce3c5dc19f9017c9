"""A model attached to kernels of the target cuda, in Triton's interpreter: the text is the same."""

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvant.ir.encodings import Int, Tokens  # noqa: E402
from kvant.runtime.huggingface import attach, detach  # noqa: E402

from ..targets.gpu_interpreter import interpreted  # noqa: E402
from .tiny_models import (  # noqa: E402
    artifact_of,
    generate,
    left_padded,
    logits,
    prompt,
    refusal,
    tiny,
)

INT8 = Tokens(rest=Int(bits=8, axis="token", group=16), sink=2)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def on_gpu(artifact: Any) -> Any:
    """The artifact with kernels on tensors of torch."""
    return replace(artifact, kernels=interpreted(list(artifact.plans), list(artifact.constants)))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_the_text_is_that_of_the_plain_model(options: Any) -> None:
    model = tiny("llama")
    ids = prompt(tokens=40)
    expected = generate(model, ids, max_new_tokens=8, **options)
    model, cache = attach(model, on_gpu(artifact_of(model)))
    assert torch.equal(generate(model, ids, cache, max_new_tokens=8, **options), expected)
    assert isinstance(cache.packed.layers[0].k.pages, torch.Tensor)


def test_quantized_and_padded_rows_are_those_of_the_reference() -> None:
    model = tiny("qwen3")
    ids, mask = left_padded(30, 9, 21)
    found = []
    for place in (lambda artifact: artifact, on_gpu):
        model, cache = attach(model, place(artifact_of(model, INT8, INT8)))
        logits(model, ids, cache, attention_mask=mask)
        step = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        found.append(logits(model, ids[:, :1], cache, attention_mask=step))
        detach(model)
    assert (found[0] - found[1]).abs().max() < 1e-4 * found[0].abs().max()


def test_a_model_elsewhere_is_refused() -> None:
    model = tiny("llama")
    artifact = on_gpu(artifact_of(model))
    artifact.kernels.memory.device = "cuda:1"
    error = refusal(attach, model, artifact)
    assert error.code == "wrong-device"
    assert error.what.endswith("is on cpu; this artifact's kernels run on cuda:1")
    assert error.fix == 'move the model with model.to("cuda:1")'
