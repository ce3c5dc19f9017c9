"""Other models than Llama, compiled and attached: right, or refused; never silently wrong.

What is stored here loses nothing: groups of one channel, whose minimum is the value itself. So the
logits of an attached model are those of the plain one, and every rewrite is seen by itself.
"""

import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

import kvant
from kvant.compiler.self_check import randomize
from kvant.ir.errors import KvantError
from kvant.runtime.huggingface import attach, detach

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WIDE = SMALL | {"head_dim": 16}
FULL = {"layer_types": ["full_attention"] * 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", WIDE),  # norms [B, T, H, D], then transposes
    "gemma2": ("Gemma2Config", WIDE | FULL),  # softcap: the prompt reads the cache, too
    "gemma3": ("Gemma3TextConfig", WIDE | FULL),  # norms with an offset, after the transpose
    "phi3": ("Phi3Config", SMALL),  # q, k and v in one weight
    "olmo2": ("Olmo2Config", SMALL),  # a norm over all heads
}
STREAM = 'format = "int"\nbits = 8\naxis = "token"\ngroup = 1\nparams = "f32"\n'
RECIPE = (
    'name = "lossless"\n[[rewrite]]\npass = "smooth-k"\n[[rewrite]]\npass = "hadamard-v"\n'
    f"[k]\n{STREAM}[v]\n{STREAM}"
)


def make(family: str, **changes: Any) -> PreTrainedModel:
    name, options = FAMILIES[family]
    config = getattr(transformers, name)(**options | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, 0)
    made: PreTrainedModel = model.eval()
    return made


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return compiled(family) -> its artifact, made once."""
    folder, before = tmp_path_factory.mktemp("families"), torch.get_num_threads()
    (folder / "lossless.toml").write_text(RECIPE)
    torch.set_num_threads(1)

    @functools.cache
    def made(family: str) -> Any:
        out = folder / f"{family}.kvant"
        return kvant.compile(make(family), folder / "lossless.toml", ["reference"], out=out)

    yield made
    torch.set_num_threads(before)


def logits(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids, past_key_values=cache).logits
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothed_and_rotated_is_the_plain_model(family: str, compiled: Any) -> None:
    model, ids = make(family), torch.randint(2, 60, (2, 40), generator=torch.manual_seed(0))
    expected = logits(model, ids)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    artifact = compiled(family)
    model, cache = attach(model, artifact)
    assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    # 4 and 2 tokens are as many as there are heads: a norm weight on the wrong axis would fit.
    steps = ((0, 21), (21, 25), (25, 27), (27, 28), (28, 40))
    found = torch.cat([logits(model, ids[:, a:b], cache) for a, b in steps], 1)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    detach(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.shape == before[name].shape


def test_a_fused_weight_is_edited_by_rows(compiled: Any) -> None:
    artifact = compiled("phi3")
    edits = {edit["parameter"]: edit["ops"] for edit in artifact.weight_edits}
    rows = [tuple(op["rows"]) for op in edits["model.layers.0.self_attn.qkv_proj.weight"]]
    assert sorted(rows) == [(0, 64), (64, 96), (96, 128)]


def test_a_norm_with_an_offset_is_shifted_by_any_sign(compiled: Any) -> None:
    artifact = compiled("gemma3")
    shift = artifact.constants[0]["kvant.k_norm_shift"]
    assert shift.shape == (2, 16)
    assert (shift < 0).any() or (shift > 0).any()
    names = {op["op"] for edit in artifact.weight_edits for op in edit["ops"]}
    assert "add" in names
    json.dumps(artifact.weight_edits)
    assert np.isfinite(shift).all()


def test_refuses_a_norm_that_cannot_hold_a_row_for_each_head(compiled: Any) -> None:
    model = make("qwen3")
    artifact = compiled("qwen3")
    for layer in model.model.layers:  # same numbers, but a norm that insists on its shape
        old = layer.self_attn.q_norm
        layer.self_attn.q_norm = torch.nn.RMSNorm(16, eps=old.variance_epsilon)
        layer.self_attn.q_norm.weight = old.weight
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(KvantError) as caught:
        attach(model, artifact)
    error = caught.value
    assert error.code == "unsupported-norm"
    name = "model.layers.0.self_attn.q_norm.weight"
    assert error.what.startswith(f"{name} cannot hold a row for each head: ")
    assert error.where == "attach(model, artifact)"
    assert error.fix == (
        "compile with a recipe that does not fold scales into norms (without smooth-k)"
    )
    assert model.config._attn_implementation != "kvant"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
