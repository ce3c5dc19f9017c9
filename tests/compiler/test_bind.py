"""Opening models: three kinds of source, and the values they give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvant.compiler.bind import ModelSource, open_model
from kvant.compiler.capture import capture
from kvant.compiler.extras import find_packaged_smollm2
from kvant.compiler.self_check import check_capture
from kvant.compiler.weights import GgufWeights, SafetensorsWeights

from .conftest import MakeModel
from .gguf_writer import write_gguf

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

KEY = "model.layers.1.self_attn.k_proj.weight"


def stored(module: Any, name: str) -> Any:
    return module.get_parameter(name).detach().float().numpy()


def same_weights(source: ModelSource, module: Any) -> None:
    """Every parameter is there under its name, in order, equal, and is a copy."""
    assert source.names() == tuple(name for name, _ in module.named_parameters())
    for name in source.names():
        made = source.weight(name)
        assert made.dtype == np.float32
        assert np.array_equal(made, stored(module, name))
    made = source.weight(KEY)
    made[:] = 0
    assert np.array_equal(source.weight(KEY), stored(module, KEY))


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_folder(shard: str, make_model: MakeModel, tmp_path: Path) -> None:
    module = make_model("llama")
    path = tmp_path / "tiny-llama"
    module.save_pretrained(path, max_shard_size=shard)
    assert len(list(path.glob("*.safetensors"))) == (1 if shard == "1GB" else 8)
    source = open_model(str(path))
    assert (source.name, source.kind, source.path) == ("tiny-llama", "folder", path)
    assert source.config.num_key_value_heads == 2
    same_weights(source, module)
    loaded = source.load()
    assert not loaded.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), module.state_dict().values(), strict=True)
    )
    assert source.load("bfloat16").lm_head.weight.dtype == torch.bfloat16


def test_a_folder_in_bf16(make_model: MakeModel, tmp_path: Path) -> None:
    module = make_model("qwen2").bfloat16()
    module.save_pretrained(tmp_path)
    same_weights(open_model(tmp_path), module)


def test_a_checkpoint_of_the_base_model(make_model: MakeModel, tmp_path: Path) -> None:
    module = make_model("gpt2")
    module.transformer.save_pretrained(tmp_path)
    source = open_model(tmp_path)
    name = "transformer.h.1.attn.c_attn.weight"
    assert name in source.names()
    assert np.array_equal(source.weight(name), stored(module, name))


def test_a_torch_module(make_model: MakeModel) -> None:
    module = make_model("llama").bfloat16().train()
    source = open_model(module)
    assert (source.name, source.kind, source.path) == ("LlamaForCausalLM", "module", None)
    same_weights(source, module)
    loaded = source.load()
    assert (loaded.training, module.training) == (False, True)
    assert loaded.lm_head.weight.dtype == torch.float32
    loaded.lm_head.weight.detach().zero_()
    assert float(module.lm_head.weight.detach().abs().max()) > 0


def test_a_gguf_file(make_model: MakeModel, tmp_path: Path) -> None:
    module = make_model("llama")
    path = write_gguf(tmp_path / "tiny.Q4.gguf", module)
    source = open_model(path)
    assert (source.name, source.kind, source.path) == ("tiny.Q4", "gguf", path)
    same_weights(source, module)
    loaded = source.load()
    assert not loaded.training
    tokens = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, module(tokens).logits)
        loaded.lm_head.weight.zero_()  # writable, and not the file
    assert check_capture(loaded, capture(source)) <= 2e-6
    same_weights(source, module)


def test_a_tied_gguf_file_and_transformers_own_loader(
    make_model: MakeModel, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "tied.gguf", make_model("llama", tie_word_embeddings=True))
    ours = open_model(path).load()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("reader", [SafetensorsWeights, GgufWeights])
def test_capture_reads_no_weights(
    reader: type, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_model("llama")
    module.save_pretrained(tmp_path)
    gguf_file = write_gguf(tmp_path / "tiny.gguf", module)
    reads: list[str] = []
    read = reader.read
    monkeypatch.setattr(reader, "read", lambda self, key: reads.append(key) or read(self, key))
    source = open_model(tmp_path if reader is SafetensorsWeights else gguf_file)
    capture(source)
    assert reads == []
    source.weight(KEY)
    assert len(reads) == 1


@pytest.mark.model
def test_smollm2(smollm2: ModelSource, smollm2_module: Any) -> None:
    assert smollm2.name == "SmolLM2-135M-Instruct.Q4_1"
    assert len(smollm2.names()) == 272
    held = smollm2_module.state_dict()
    for name in smollm2.names():
        if "layers.0." in name or "layers.29." in name:
            assert np.array_equal(smollm2.weight(name), held[name].numpy())
    tokenizer = smollm2.tokenizer()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        best = int(smollm2_module(**prompt).logits[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"


@pytest.mark.model
@pytest.mark.long
def test_smollm2_is_what_transformers_loads(smollm2: ModelSource, smollm2_module: Any) -> None:
    from transformers import AutoModelForCausalLM

    path = find_packaged_smollm2()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    for name, value in theirs.state_dict().items():
        assert torch.equal(smollm2_module.state_dict()[name], value), name


def test_a_pickle_beside_safetensors_is_left_alone(make_model: MakeModel, tmp_path: Path) -> None:
    module = make_model("llama")
    module.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    same_weights(open_model(tmp_path), module)
