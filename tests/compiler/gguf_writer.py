"""A small Llama as a GGUF file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")


def side_by_side(rows: Any, heads: int) -> Any:
    """Return q or k rows as GGUF stores them: i and i + D/2 of a head become 2i and 2i + 1."""
    per_head = rows.reshape(heads, 2, -1, rows.shape[-1])
    return np.ascontiguousarray(per_head.swapaxes(1, 2).reshape(rows.shape))


def write_gguf(path: Path, module: Any, arch: str = "llama") -> Path:
    """Write a small Llama as llama.cpp's converter does, in f32."""
    config = module.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, param in module.named_parameters():
        rows = param.detach().numpy()
        if "q_proj" in name:
            rows = side_by_side(rows, config.num_attention_heads)
        if "k_proj" in name:
            rows = side_by_side(rows, config.num_key_value_heads)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
