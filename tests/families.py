"""The model families that kvant is tested on: one table for the tests and for docs/models.md.

Each is a small random model of transformers, with the attention of the real one: its own head
sizes, windows shorter than the prompt, as many layers as there are kinds of them. A family is
raised and compared with torch (tests/compiler/test_capture.py); rewritten, attached and generated
with (tests/runtime/test_huggingface_families.py).
"""

from dataclasses import dataclass
from typing import Any

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
WIDE = SMALL | {"head_dim": 16}  # D4: head_dim is not hidden / heads
WINDOW = {"sliding_window": 6}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        config: class of its configuration in transformers.
        options: for a small one.
        models: models people know it by.
        is_long: whether only `make test-long` runs it: its attention is like another's.
    """

    config: str
    options: dict[str, Any]
    models: str
    is_long: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", SMALL, "Llama 2 and 3, SmolLM2, TinyLlama, Yi"),
    "mistral": Family("MistralConfig", SMALL | WINDOW, "Mistral 7B"),
    "qwen2": Family("Qwen2Config", SMALL, "Qwen2, Qwen2.5"),
    "qwen3": Family("Qwen3Config", WIDE, "Qwen3"),
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        WIDE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "Qwen3-30B-A3B",
    ),
    "gemma2": Family("Gemma2Config", WIDE | WINDOW, "Gemma 2"),
    "gemma3": Family("Gemma3TextConfig", WIDE | WINDOW | {"num_hidden_layers": 6}, "Gemma 3"),
    "phi3": Family("Phi3Config", SMALL, "Phi-3, Phi-3.5"),
    "phi4-mini": Family("Phi3Config", WIDE | {"partial_rotary_factor": 0.75}, "Phi-4-mini"),
    "olmo2": Family("Olmo2Config", SMALL, "OLMo 2"),
    "gpt2": Family(
        "GPT2Config",
        {"n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 64, "n_positions": 64}
        | {"bos_token_id": None, "eos_token_id": None},
        "GPT-2, DistilGPT-2",
    ),
    "smollm3": Family("SmolLM3Config", SMALL | {"num_hidden_layers": 4}, "SmolLM3"),
    "cohere": Family("CohereConfig", SMALL | {"use_qk_norm": True}, "Command R, Command R+"),
    "cohere2": Family(
        "Cohere2Config", SMALL | WINDOW | {"num_hidden_layers": 4}, "Command R7B, Command A"
    ),
    "glm4": Family("Glm4Config", WIDE, "GLM-4 0414"),
    "gpt-oss": Family("GptOssConfig", WIDE | WINDOW | EXPERTS, "gpt-oss-20b, gpt-oss-120b"),
    "mixtral": Family("MixtralConfig", SMALL | EXPERTS, "Mixtral 8x7B", is_long=True),
    "ministral": Family("MinistralConfig", WIDE | WINDOW, "Ministral", is_long=True),
    "gemma": Family("GemmaConfig", WIDE, "Gemma 1", is_long=True),
    "olmo": Family("OlmoConfig", SMALL, "OLMo 1", is_long=True),
    "olmo3": Family("Olmo3Config", SMALL | WINDOW | {"num_hidden_layers": 4}, "OLMo 3", True),
    "phi": Family("PhiConfig", SMALL, "Phi-1.5, Phi-2", is_long=True),
    "stablelm": Family("StableLmConfig", SMALL, "StableLM", is_long=True),
    "starcoder2": Family("Starcoder2Config", SMALL, "StarCoder2", is_long=True),
    "granite": Family("GraniteConfig", SMALL, "Granite 3", is_long=True),
    "glm": Family("GlmConfig", WIDE, "GLM-4 9B", is_long=True),
    "ernie4.5": Family("Ernie4_5Config", WIDE, "ERNIE 4.5", is_long=True),
    "exaone4": Family("Exaone4Config", SMALL, "EXAONE 4", is_long=True),
    "nemotron": Family("NemotronConfig", SMALL, "Nemotron", is_long=True),
    "seed-oss": Family("SeedOssConfig", WIDE, "Seed-OSS", is_long=True),
    "apertus": Family("ApertusConfig", WIDE, "Apertus", is_long=True),
}

REFUSED: dict[str, Family] = {
    "deepseek-v3": Family(
        "DeepseekV3Config",
        SMALL
        | {"n_routed_experts": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
        "DeepSeek V2 and V3, Kimi K2",
    ),
    "llama4": Family(
        "Llama4TextConfig",
        WIDE | EXPERTS | {"intermediate_size_mlp": 32, "no_rope_layers": [1, 0]},
        "Llama 4",
    ),
    "gpt-neox": Family("GPTNeoXConfig", SMALL, "Pythia, GPT-NeoX"),
    "falcon": Family("FalconConfig", SMALL, "Falcon"),
    "opt": Family(
        "OPTConfig",
        {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "ffn_dim": 32}
        | {"vocab_size": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 48},
        "OPT",
    ),
}


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return a small random model in evaluation mode, fp32, on the CPU.

    Args:
        family: of FAMILIES or REFUSED.
        seed: of its weights; every one is random, norms and biases too.
        changes: to its options.
    """
    import torch
    import transformers

    from kvant.compiler.self_check import randomize

    row = (FAMILIES | REFUSED)[family]
    config = getattr(transformers, row.config)(**row.options | changes)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(module, seed)
    return module.eval()
